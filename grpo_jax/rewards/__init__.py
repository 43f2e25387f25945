"""Rewards: named, weighted functions of completions, and the one place that runs them.

A reward function has the signature that TRL users know, and may be asynchronous,

    (prompts, completions, completion_ids, **columns) -> list of float, steps or None

with one item a completion. It is called by keyword; `columns` are the columns of the prompts, repeated for
each completion. A list of `(end_token, score)` pairs in an item's place rewards steps of reasoning (process
supervision, arXiv 2402.03300, section 4.1.3); `end_token` is the index of a step's last token among the
completion's. None means "does not apply to this one". What a reward function does wrong is an error at
once, and never 0. Training calls it in a thread, so that a signal stops a run at once: it can set no handlers.

How rewards compose, in this order: a function says something, which is what the log shows, and what a reward that
depends on it sees (`Reward.after`, `composition.gated`); each number is clipped (`Reward.low`, `high`); each reward is
standardized within its group, if so wished (`AdvantageConfig.normalize_each`); the weighted sum.
"""

import asyncio
import contextlib
import dataclasses
import functools
import graphlib
import inspect
import math
import operator
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeAlias

import numpy as np

__all__ = ["Item", "Judged", "Reward", "RewardError", "Scores", "score"]

_LARGEST = 1e18  # whose square, in a deviation, float32 still holds

Steps: TypeAlias = list[tuple[int, float]]  # (end_token, score) of each step, ascending
Item: TypeAlias = float | Steps | None  # what a reward function says of a completion


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward:
    """A reward function, its name in the metrics, and how it counts in the sum."""

    name: str
    function: Callable[..., Any]  # returns Sequence[Item], or an awaitable of it
    weight: float = 1.0
    low: float = -math.inf  # what is less counts as this much (of steps, each); the log shows it as it is
    high: float = math.inf  # and what is more as this
    # Names of rewards that it depends on: it runs after them, and gets `scores`, by name a `Judged` list of one number
    # or None a completion, as the functions said them (of steps, their sum), with `failed`, where nobody knows it.
    after: tuple[str, ...] = ()
    # Its function runs programs on the device (`model.ModelReward`): where there is one like that, nothing is scored
    # while the device samples, for two threads would run programs at once, in memory that is meant for one, and in no
    # one order on all devices of a process, on which `hosts.own_mesh` relies.
    on_device: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or not self.low <= self.high:
            raise ValueError(
                f"reward {self.name!r}: weight={self.weight} must be finite, and low={self.low} at most "
                f"high={self.high}."
            )
        if isinstance(self.after, str):
            raise ValueError(f"reward {self.name!r}: after={self.after!r} must be a tuple of names: ({self.after!r},).")


class Judged(list[Item]):
    """What a reward function may return in place of a list: one item a completion, and how judging each went."""

    def __init__(self, items: Iterable[Item], *, failed: Sequence[bool], seconds: Sequence[float]):
        """`failed`: the judge came to no verdict (a limit, a crash); `seconds`: what an item took."""
        super().__init__(items)
        self.failed, self.seconds = list(map(bool, failed)), list(map(float, seconds))
        if not len(self) == len(self.failed) == len(self.seconds):
            raise ValueError(f"{len(self)} items, {len(self.failed)} failed and {len(self.seconds)} seconds: one each.")


class RewardError(ValueError):
    """A reward function raised, or returned something that is not one item a completion."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """The rewards of a step: one number a completion from each function, NaN where it does not apply."""

    # Each [B] float64. Of a process reward, the sum over the steps: the return of the completion, which is what
    # outcome supervision sees (no steps: 0). Process supervision sees `by_token`.
    by_name: Mapping[str, np.ndarray]
    # Of the functions that gave steps, [B]: the steps of each completion, None where an item was none.
    steps: Mapping[str, Sequence[Steps | None]] = dataclasses.field(default_factory=dict)
    # Of the functions that say so (`Judged`), [B] bool: where the judge came to no verdict.
    failed: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    # [B] float64: how long an item took; of a function that does not say, its whole call. None of a replay.
    seconds: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, items: Mapping[str, Sequence[Any]]) -> "Scores":
        """From one item a completion by name, as functions return them or as a journal's JSON holds them."""
        steps = {
            name: [None if not _is_steps(x) else [(end, value) for end, value in x] for x in values]
            for name, values in items.items()
            if any(map(_is_steps, values))
        }
        by_name = {name: np.array([_return(x) for x in values], np.float64) for name, values in items.items()}
        return cls(by_name=by_name, steps=steps)

    def items(self) -> dict[str, list[Any]]:
        """The inverse of `of`: by name one `Item` a completion, which JSON keeps exactly."""
        plain = {n: [None if math.isnan(v) else v for v in values.tolist()] for n, values in self.by_name.items()}
        for name, steps in self.steps.items():
            plain[name] = [value if x is None else x for value, x in zip(plain[name], steps, strict=True)]
        return plain

    def record(self) -> dict[str, Any]:
        """What a journal holds: `items`, and of failures the indices of their completions, where there are any."""
        failed = {name: np.flatnonzero(of).tolist() for name, of in self.failed.items() if of.any()}
        return {"scores": self.items(), **({"failed": failed} if failed else {})}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "Scores":
        """The inverse of `record`, but for what was measured."""
        scores, failed = cls.of(record["scores"]), {}
        for name, indices in record.get("failed", {}).items():
            failed[name] = np.zeros(len(scores.by_name[name]), bool)
            failed[name][indices] = True
        return dataclasses.replace(scores, failed=failed)

    @classmethod
    def join(cls, parts: Sequence["Scores"]) -> "Scores":
        """Of the completions of all parts, in order."""
        if len(parts) == 1:
            return parts[0]
        items = [part.items() for part in parts]
        failed = {name: np.concatenate([p.of_failed(name) for p in parts]) for part in parts for name in part.failed}
        measured = [name for name in items[0] if all(name in part.seconds for part in parts)]
        return dataclasses.replace(
            cls.of({name: [x for item in items for x in item[name]] for name in items[0]}),
            failed=failed,
            seconds={name: np.concatenate([part.seconds[name] for part in parts]) for name in measured},
        )

    def take(self, completions: np.ndarray) -> "Scores":
        """Of these completions, by their indices."""
        return dataclasses.replace(
            self.of({name: [items[i] for i in completions] for name, items in self.items().items()}),
            failed={name: of[completions] for name, of in self.failed.items()},
            seconds={name: of[completions] for name, of in self.seconds.items()},
        )

    def of_failed(self, name: str) -> np.ndarray:
        """[B] bool: where the judge of that name came to no verdict."""
        return self.failed.get(name, np.zeros(len(self.by_name[name]), bool))

    def clipped(self, rewards: Sequence[Reward]) -> "Scores":
        """As the sum sees them: each number, of steps each step's, between its reward's `low` and `high`."""
        bounded = {r.name: r for r in rewards if (r.low, r.high) != (-math.inf, math.inf)}
        if not bounded:
            return self
        clip = lambda r, x: None if x is None else min(max(x, r.low), r.high)
        items = self.items()
        for name, r in bounded.items():
            items[name] = [[(end, clip(r, v)) for end, v in x] if _is_steps(x) else clip(r, x) for x in items[name]]
        return dataclasses.replace(self, **{n: getattr(Scores.of(items), n) for n in ("by_name", "steps")})

    def unknown(self, rewards: Sequence[Reward]) -> np.ndarray:
        """[B] bool: completions whose sum nobody knows.

        A judge that counts in it came to no verdict and gave no number in its place, or nothing at all applies.
        """
        missing = {name: np.isnan(values) for name, values in self.by_name.items()}
        failed = [self.of_failed(r.name) & missing[r.name] for r in rewards if r.weight]
        return np.any([np.all([missing[r.name] for r in rewards], axis=0), *failed], axis=0)

    def by_token(self, name: str, lengths: Sequence[int] | np.ndarray, columns: int) -> np.ndarray:
        """[B, T] float64: the reward of the step that ends at a token, NaN where none does.

        A plain number is one step, which ends with the completion of that length.
        """
        tokens = np.full((len(lengths), columns), np.nan)
        for row, item, length in zip(tokens, self.items()[name], lengths, strict=True):
            for end, value in item if _is_steps(item) else [] if item is None else [(length - 1, item)]:
                row[end] = value
        return tokens

    def total(self, rewards: Sequence[Reward]) -> np.ndarray:
        """[B] float64: the weighted sum of the rewards that apply, each clipped; NaN where it is unknown."""
        by_name = self.clipped(rewards).by_name
        total = sum((r.weight * np.nan_to_num(by_name[r.name]) for r in rewards), start=np.zeros(()))
        return np.where(self.unknown(rewards), np.nan, total)


def score(
    rewards: Sequence[Reward],
    *,
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
) -> Scores:
    """Runs every reward function on B completions, asynchronous ones at the same time, and checks what comes back.

    One that depends on others runs when these are there.

    Raises:
      RewardError: naming the function and the completion, if it needs a column that the prompts do not
        have, depends on a reward that there is not or in the end on itself, raises, returns another number of
        items, or an item that is neither a finite number, nor steps, nor None; or if no reward applies to a
        completion, and no judge of it has failed.
    """
    if len({r.name for r in rewards}) < len(rewards):
        raise RewardError(
            f"two reward functions have the same name: {[r.name for r in rewards]}; give one another: Reward(name=...)."
        )
    arguments = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    taken = arguments.keys() | ({"scores"} if any(r.after for r in rewards) else set())
    if taken := sorted(taken & columns.keys()):
        raise RewardError(f"the column {taken[0]!r} has the name of an argument of reward functions: rename it.")
    ordered = _ordered(rewards)
    for reward in rewards:
        _check_signature(reward, columns, {**arguments, **({"scores": None} if reward.after else {})})
    returned = _call(ordered, {**arguments, **columns})
    scores = dataclasses.replace(
        Scores.of({r.name: returned[r.name] for r in rewards}),
        failed={r.name: np.array(returned[r.name].failed, bool) for r in rewards if any(returned[r.name].failed)},
        seconds={r.name: np.array(returned[r.name].seconds, np.float64) for r in rewards},
    )
    nothing = np.all([np.isnan(values) for values in scores.by_name.values()], axis=0)
    nothing &= ~np.any([scores.of_failed(r.name) for r in rewards], axis=0)
    if nothing.any():
        i = int(np.argmax(nothing))
        raise RewardError(
            f"every reward function ({', '.join(scores.by_name)}) returned None for completion {i}, "
            f"{completions[i]!r} to prompt {prompts[i]!r}: at least one must give a number."
        )
    return scores


def _ordered(rewards: Sequence[Reward]) -> list[Reward]:
    """Each behind those that it depends on."""
    by_name = {r.name: r for r in rewards}
    for reward in rewards:
        if unknown := [name for name in reward.after if name not in by_name]:
            raise RewardError(
                f"reward {reward.name!r} depends on {unknown[0]!r}, and the rewards are {', '.join(by_name)}: name one "
                "of those, or give that reward too (with weight 0, if it is not to count)."
            )
    try:
        order = graphlib.TopologicalSorter({r.name: r.after for r in rewards}).static_order()
        return [by_name[name] for name in order]
    except graphlib.CycleError as error:
        raise RewardError(
            f"rewards depend on each other in a circle: {' -> '.join(error.args[1])}. Leave out one of these."
        ) from None


def _is_steps(item: Any) -> bool:
    return isinstance(item, list | tuple)


def _return(item: Item) -> float:
    if item is None:
        return math.nan
    return float(sum(value for _, value in item) if isinstance(item, list | tuple) else item)


def _check_signature(reward: Reward, columns: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    try:
        parameters = inspect.signature(reward.function).parameters.values()
    except (TypeError, ValueError):  # written in C without one: the call will say what is wrong
        return
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    missing = [p.name for p in named if p.default is p.empty and p.name not in {**arguments, **columns}]
    if missing:
        raise RewardError(
            f"reward function {reward.name!r} needs the column {missing[0]!r}, and the prompts have "
            f"{', '.join(map(repr, sorted(columns))) or 'none'}: name one of those, or give the prompts that column"
            + (" (scores are of the rewards that Reward.after names)." if missing[0] == "scores" else ".")
        )
    surplus = sorted({**arguments, **columns}.keys() - {p.name for p in named})
    if surplus and not any(p.kind == p.VAR_KEYWORD for p in parameters):
        raise RewardError(
            f"reward function {reward.name!r} does not take {', '.join(map(repr, surplus))}: end its parameters with "
            "**columns, which takes what it does not need."
        )


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """The loop of the asynchronous functions, in a thread of its own.

    So they run where a loop runs already, as in a notebook, and a client that a function keeps open lives
    from step to step.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="asynchronous rewards", daemon=True).start()
    return loop


async def _timed(awaitable: Awaitable[Any]) -> tuple[Any, float]:
    """What comes, and when."""
    return await awaitable, time.perf_counter()


def _call(ordered: Sequence[Reward], arguments: Mapping[str, Any]) -> dict[str, Judged]:
    """What each function returns, checked; one that depends on others is called when they are there."""
    by_name = {reward.name: reward for reward in ordered}
    returned: dict[str, Judged] = {}
    running: dict[str, Future[tuple[Any, float]]] = {}
    begun: dict[str, float] = {}

    def of(name: str) -> Judged:
        if name not in returned:
            with _blaming(by_name[name], arguments):
                values, ended = running[name].result()
            returned[name] = _judged(by_name[name], values, ended - begun[name], arguments)
        return returned[name]

    try:
        for name, reward in by_name.items():
            known = {other: _numbers(of(other)) for other in reward.after}
            begun[name] = time.perf_counter()
            with _blaming(reward, arguments):
                values = reward.function(**arguments, **({"scores": known} if reward.after else {}))
            if inspect.isawaitable(values):
                running[name] = asyncio.run_coroutine_threadsafe(_timed(values), _event_loop())
            else:
                returned[name] = _judged(reward, values, time.perf_counter() - begun[name], arguments)
        return {name: of(name) for name in by_name}
    finally:
        for future in running.values():
            future.cancel()  # does nothing to those that are done: only an exception leaves others


def _numbers(judged: Judged) -> Judged:
    """As those that depend on them see them: of steps, their sum."""
    numbers = (None if x is None else _return(x) for x in judged)
    return Judged(numbers, failed=judged.failed, seconds=judged.seconds)


@contextlib.contextmanager
def _blaming(reward: Reward, arguments: Mapping[str, Any]) -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit) as error:
        prompts, completions = arguments["prompts"], arguments["completions"]
        raise RewardError(
            f"reward function {reward.name!r} raised {type(error).__name__}: {error} (on {len(completions)} "
            f"completions, the first {completions[0]!r} to prompt {prompts[0]!r})"
        ) from error


def _judged(reward: Reward, values: Any, seconds: float, arguments: Mapping[str, Any]) -> Judged:
    """What a function returned, checked; where it does not say what an item took, it is the whole call."""
    named = {name: arguments[name] for name in ("prompts", "completions", "completion_ids")}
    items = _checked(reward, values, **named)
    says = values if isinstance(values, Judged) else None
    failed, took = (says.failed, says.seconds) if says else ([False] * len(items), [seconds] * len(items))
    return Judged(items, failed=failed, seconds=took)


def _checked(reward: Reward, values: Any, prompts, completions, completion_ids) -> list[Item]:
    try:
        values = list(values)
    except TypeError:
        raise RewardError(
            f"reward function {reward.name!r} returned {values!r}; expected a list with one number or None a "
            "completion."
        ) from None
    if len(values) != len(completions):
        raise RewardError(
            f"reward function {reward.name!r} returned {len(values)} values for {len(completions)} completions; "
            "expected one a completion, in their order."
        )
    items: list[Item] = []
    for i, value in enumerate(values):
        try:
            items.append(_item(value, len(completion_ids[i])))
        except (TypeError, ValueError, OverflowError) as error:
            why = f" ({error})" if _is_steps(value) or isinstance(error, ValueError) else ""
            raise RewardError(
                f"reward function {reward.name!r} returned {value!r} for completion {i}, {completions[i]!r} to prompt "
                f"{prompts[i]!r}{why}; expected a finite number, a list of (end_token, score) pairs in ascending "
                "order, or None where it does not apply."
            ) from None
    return items


def _item(value: Any, tokens: int) -> Item:
    """An item as Python's own numbers; an error where it is none for a completion of that many tokens."""
    if value is None:
        return None
    if not _is_steps(value):
        return _finite(value)
    steps = [(operator.index(end), _finite(number)) for end, number in value]
    before = -1
    for end, _ in steps:
        if not before < end < tokens:
            raise ValueError(
                f"end_token {end} must be above {before}, where the step before it ends, and below {tokens}, the "
                "number of tokens"
            )
        before = end
    _finite(_return(steps))
    return steps


def _finite(value: Any) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{value} is not finite")
    if abs(value) > _LARGEST:
        raise ValueError(f"{value} is beyond {_LARGEST:g}, and advantages are taken in float32")
    return float(value)

"""Rewards: named, weighted functions of completions, and the one place that runs them.

A reward function has the signature that TRL users know, and may be asynchronous,

    (prompts, completions, completion_ids, **columns) -> list of float, steps or None

with one item a completion. It is called by keyword; `columns` are the columns of the prompts, repeated for
each completion. A list of `(end_token, score)` pairs in an item's place rewards steps of reasoning (process
supervision, arXiv 2402.03300, section 4.1.3); `end_token` is the index of a step's last token among the
completion's. None means "does not apply to this one". What a reward function does wrong is an error at
once, and never 0.
"""

import asyncio
import contextlib
import dataclasses
import functools
import inspect
import math
import operator
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeAlias

import numpy as np

__all__ = ["Item", "Judged", "Reward", "RewardError", "Scores", "score"]

Steps: TypeAlias = list[tuple[int, float]]  # (end_token, score) of each step, ascending
Item: TypeAlias = float | Steps | None  # what a reward function says of a completion


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward:
    """A reward function, its name in the metrics, and its weight in the sum."""

    name: str
    function: Callable[..., Any]  # returns Sequence[Item], or an awaitable of it
    weight: float = 1.0


class Judged(list[Item]):
    """What a reward function may return in place of a list: one item a completion, and how judging each went."""

    def __init__(self, items: Iterable[Item], *, failed: Sequence[bool], seconds: Sequence[float]):
        """`failed`: the judge came to no verdict (a limit, a crash); `seconds`: what an item took."""
        super().__init__(items)
        self.failed, self.seconds = list(failed), list(seconds)
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
        """[B] float64: the weighted sum of the rewards that apply."""
        return sum((r.weight * np.nan_to_num(self.by_name[r.name]) for r in rewards), start=np.zeros(()))


def score(
    rewards: Sequence[Reward],
    *,
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
) -> Scores:
    """Runs every reward function on B completions, asynchronous ones at the same time, and checks what comes back.

    Raises:
      RewardError: naming the function and the completion, if it needs a column that the prompts do not
        have, raises, returns another number of items, or an item that is neither a finite number, nor
        steps, nor None; or if no reward applies to a completion.
    """
    if len({r.name for r in rewards}) < len(rewards):
        raise RewardError(f"two reward functions have the same name: {[r.name for r in rewards]}.")
    arguments = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    if taken := sorted(arguments.keys() & columns):
        raise RewardError(f"the column {taken[0]!r} has the name of an argument of every reward function: rename it.")
    for reward in rewards:
        _check_signature(reward, columns, arguments)
    returned = _call(rewards, {**arguments, **columns})
    scores = Scores.of({r.name: _checked(r, values, **arguments) for r, values in zip(rewards, returned, strict=True)})
    nothing = np.all([np.isnan(values) for values in scores.by_name.values()], axis=0)
    if nothing.any():
        i = int(np.argmax(nothing))
        raise RewardError(
            f"every reward function ({', '.join(scores.by_name)}) returned None for completion {i}, "
            f"{completions[i]!r} to prompt {prompts[i]!r}: at least one must give a number."
        )
    return scores


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
            f"{', '.join(map(repr, sorted(columns))) or 'none'}: name one of those, or give the prompts that column."
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


async def _wait_for(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _call(rewards: Sequence[Reward], arguments: Mapping[str, Any]) -> list[Any]:
    """What each function returns."""
    returned: list[Any] = []
    running: dict[int, Future[Any]] = {}
    try:
        for i, reward in enumerate(rewards):
            with _blaming(reward, arguments):
                returned.append(reward.function(**arguments))
            if inspect.isawaitable(returned[i]):
                running[i] = asyncio.run_coroutine_threadsafe(_wait_for(returned[i]), _event_loop())
        for i, future in running.items():
            with _blaming(rewards[i], arguments):
                returned[i] = future.result()
    finally:
        for future in running.values():
            future.cancel()  # does nothing to those that are done: only an exception leaves others
    return returned


@contextlib.contextmanager
def _blaming(reward: Reward, arguments: Mapping[str, Any]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        prompts, completions = arguments["prompts"], arguments["completions"]
        raise RewardError(
            f"reward function {reward.name!r} raised {type(error).__name__}: {error} (on {len(completions)} "
            f"completions, the first {completions[0]!r} to prompt {prompts[0]!r})"
        ) from error


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
            why = f" ({error})" if _is_steps(value) else ""
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
    return float(value)

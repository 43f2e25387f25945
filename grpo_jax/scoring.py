"""The shell between sampled completions and their advantages: rewards, their journal, and what is said of both."""

import dataclasses
import functools
import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

from grpo_jax import hosts
from grpo_jax.data.sources import Mapped, Prompt
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.rewards import Reward, RewardError, Scores, score
from grpo_jax.telemetry import WorkdirError
from grpo_jax.types import Groups, Rollout

__all__ = [
    "Ahead",
    "Journal",
    "ScoredGroups",
    "completion_texts",
    "groups_of",
    "interruptibly",
    "journaled_scores",
    "on_every_host",
    "rollout_metrics",
    "samples_of_group",
    "score_completions",
    "score_rollout",
    "scores_of_all",
]

_T = TypeVar("_T")
_LOOK = 0.1  # seconds between looks whether to stop


class Journal(Protocol):
    """Where a step's rewards are written durably before they are used, and read when the step is replayed.

    A step has several waves of completions where groups are sampled until enough have signal; else it has wave 0. A
    record is what `Scores.record` gives: plain JSON. Every process journals its own completions.
    """

    def knows(self, step: int, wave: int) -> bool:
        """Whether there is a record, of these completions or others: asked before all are sampled."""
        ...

    def read(self, step: int, wave: int, digest: str) -> Mapping[str, Any] | None:
        """The record of these completions at this step, or None."""
        ...

    def write(self, step: int, wave: int, digest: str, record: Mapping[str, Any]) -> None:
        """Returns when the record is durable."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ScoredGroups:
    """P groups that were sampled, with all that rewards said of them; on the host."""

    prompts: Sequence[Prompt]  # read when they are asked for: of several processes each reads its own
    groups: Groups
    scores: Scores
    total: np.ndarray  # [P, G] float64, the weighted sum of the rewards, not normalized; NaN where it is unknown
    constant: np.ndarray  # [P] bool, groups without signal

    @classmethod
    def join(cls, parts: Sequence["ScoredGroups"]) -> "ScoredGroups":
        """All in one, in order."""
        return cls(
            prompts=Mapped(lambda at: at[0][at[1]], [(p.prompts, i) for p in parts for i in range(len(p.prompts))]),
            groups=jax.tree.map(lambda *x: np.concatenate(x), *(part.groups for part in parts)),
            scores=Scores.join([part.scores for part in parts]),
            total=np.concatenate([part.total for part in parts]),
            constant=np.concatenate([part.constant for part in parts]),
        )


def groups_of(rollout: Rollout, prompts: range) -> Rollout:
    """Of a rollout that lies on the host, the groups of some of its prompts."""
    count = len(rollout.prompt_mask)
    return jax.tree.map(lambda x: x[len(x) // count * prompts.start : len(x) // count * prompts.stop], rollout)


def completion_texts(rollout: Rollout, tokenizer: Tokenizer) -> tuple[list[list[int]], list[str]]:
    """Token ids and texts of the completions of a rollout that lies on the host."""
    ids = [row[keep].tolist() for row, keep in zip(rollout.completion_tokens, rollout.mask, strict=True)]
    return ids, [tokenizer.decode(row) for row in ids]


def score_rollout(
    rewards: Sequence[Reward], prompts: Sequence[Prompt], rollout: Rollout, tokenizer: Tokenizer, group_size: int
) -> Scores:
    """Rewards of a rollout that lies on the host.

    Raises:
      RewardError: as `score_completions`.
    """
    return score_completions(rewards, prompts, *completion_texts(rollout, tokenizer), group_size)


def score_completions(
    rewards: Sequence[Reward], prompts: Sequence[Prompt], ids: Sequence[Sequence[int]], texts: Sequence[str],
    group_size: int,
) -> Scores:  # fmt: skip
    """Rewards of B completions, given as token ids and as texts, a group for each prompt.

    Raises:
      RewardError: a reward function did something wrong, or the prompts do not all have the same columns.
    """
    if not prompts:  # of several processes, one may have none
        return Scores.of({reward.name: [] for reward in rewards})
    for prompt in prompts:
        if prompt.columns.keys() != prompts[0].columns.keys():
            raise RewardError(
                f"prompt {prompt.text!r} has the columns {sorted(prompt.columns)}, and prompt {prompts[0].text!r} has "
                f"{sorted(prompts[0].columns)}: give all the same, with None where one has no value."
            )
    each = [prompt for prompt in prompts for _ in range(group_size)]
    columns = {name: [p.columns[name] for p in each] for name in prompts[0].columns}
    return score(rewards, prompts=[p.text for p in each], completions=texts, completion_ids=ids, columns=columns)


class Ahead:
    """Scores one thing after the other in a thread, while the one that added them does something else.

    After one that raised no other begins. On the way out it waits for the one that runs, but not where somebody wants
    an end (`loop.Stopped`, a second Ctrl-C): a reward may take hours, and what kills may not wait.
    """

    def __init__(self) -> None:
        self._futures: list[Future[Any]] = []
        self._closed = False

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._closed = True
        if kind is None or issubclass(kind, Exception):
            for future in self._futures:
                future.exception()

    def add(self, function: Callable[[], Any]) -> None:
        """Returns at once."""
        before, future = self._futures[-1:], Future()

        def run() -> None:
            for other in before:
                other.exception()  # waits
            try:
                with jax.profiler.TraceAnnotation("rewards"):
                    future.set_result(None if self._closed else function())
            except BaseException as error:
                self._closed = True
                future.set_exception(error)

        # Not an executor: the interpreter waits for the threads of those when it ends, for one that hangs too.
        threading.Thread(target=run, name="rewards", daemon=True).start()
        self._futures.append(future)  # of a thread that could not start nobody may wait

    def check(self) -> None:
        """Raises what a function has raised so far."""
        for future in self._futures:
            if future.done():
                future.result()

    def results(self, interrupt: Callable[[], None] = lambda: None) -> list[Any]:
        """Of all, in order, once they are there; raises what one has raised.

        `interrupt` is called meanwhile and may raise; but where there are several processes, only when all are there,
        for the others would wait for this one.
        """
        while jax.process_count() == 1 and wait(self._futures, _LOOK, FIRST_EXCEPTION).not_done:
            self.check()
            interrupt()
        return [future.result() for future in self._futures]


def interruptibly(
    functions: Sequence[Callable[[], _T]], rewards: Sequence[Reward], interrupt: Callable[[], None]
) -> list[_T]:  # fmt: skip
    """What functions give that score by these rewards, one after the other in a thread, while this one may be stopped.

    They run in this one where a reward uses the device: what runs there is short, and must not run into the end of the
    interpreter.
    """
    if any(reward.on_device for reward in rewards):
        return [function() for function in functions]
    with Ahead() as ahead:
        for function in functions:
            ahead.add(function)
        return ahead.results(interrupt)


def on_every_host(compute: Callable[[], _T], patience: float = 3600.0) -> _T:
    """What `compute` gives on this process, once all have their rewards: `hosts.together`.

    Raises:
      RewardError: on every process, if `compute` raised on any, or did not end on all in time.
      WorkdirError: on every process, where what one of them has could not be written.
    """
    return hosts.together(
        compute, kind=RewardError, also=(WorkdirError,), waits_for="had their rewards", patience=patience
    )


def scores_of_all(scores: Scores, parts: Sequence[int], group_size: int) -> Scores:
    """Those of all completions, in their order, from what each process has of its own; every process must call it.

    Args:
      scores: of this process: of its `hosts.share` of each part.
      parts: prompts that were sampled at a time.
      group_size: completions of each.
    """
    if jax.process_count() == 1:
        return scores
    seconds = {name: taken.tolist() for name, taken in scores.seconds.items()}
    every = [
        dataclasses.replace(
            Scores.of_record(said["record"]), seconds={n: np.array(s, np.float64) for n, s in said["seconds"].items()}
        )
        for said in hosts.gathered({"record": scores.record(), "seconds": seconds})
    ]
    prompts = np.arange(sum(parts))
    of_parts = np.split(prompts, np.cumsum(parts)[:-1])
    shares = [of[[*hosts.share(range(len(of)), i)]] for i in range(len(every)) for of in of_parts]
    order = np.concatenate(shares)[:, None] * group_size + np.arange(group_size)[None]
    return Scores.join(every).take(np.argsort(order.reshape(-1)))


@functools.partial(jax.profiler.annotate_function, name="rewards")  # a part of a step, in its profile
def journaled_scores(
    compute: Callable[[], Scores], rewards: Sequence[Reward], rollout: Rollout, journal: Journal, step: int, wave: int
) -> Scores:  # fmt: skip
    """What the journal knows of these completions, else what `compute` says of them, in the journal before it returns.

    Where there are several processes, each has its completions and its journal, and none goes on before all have done
    this.

    Raises:
      RewardError, WorkdirError: as `on_every_host`; or the journal knows them by other names than those of the rewards.
    """
    names = {reward.name for reward in rewards}
    digest = hashlib.sha256(rollout.completion_tokens.tobytes() + rollout.mask.tobytes()).hexdigest()[:16]

    def known_or_computed() -> Scores:
        recorded = journal.read(step, wave, digest)
        if recorded is not None:
            if (known := {*recorded["scores"]}) != names:
                raise RewardError(
                    f"the journal has rewards {sorted(known)} of step {step}, and the run has {sorted(names)}: give "
                    "them their names back, or begin a new workdir."
                )
            return Scores.of_record(recorded)
        scores = compute()
        journal.write(step, wave, digest, scores.record())
        return scores

    return on_every_host(known_or_computed)


def rollout_metrics(rewards: Sequence[Reward], fresh: ScoredGroups) -> dict[str, float]:
    """Of all groups that a step sampled, whether it trains on them or not."""
    rollout, constant = fresh.groups.rollout, fresh.constant
    lengths, finished, known = rollout.mask.sum(axis=1), rollout.finished, ~np.isnan(fresh.total)
    spreads = [of[known[i]].std(ddof=1) for i, of in enumerate(fresh.total) if known[i].sum() > 1]
    metrics = {
        "reward": fresh.total[known].mean() if known.any() else 0.0,
        "reward_std": np.mean(spreads) if spreads else 0.0,
        "frac_reward_zero_std": constant.mean(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1 - finished.mean(),
        "completions/mean_terminated_length": lengths[finished].mean() if finished.any() else 0.0,
        "completions/unknown_reward": float(known.size - known.sum()),
    }
    # "All right" and "all wrong" are said of the first reward: the one that judges, by convention.
    judged = fresh.scores.by_name[rewards[0].name].reshape(fresh.total.shape)
    verdicts = judged.reshape(-1)[~fresh.scores.of_failed(rewards[0].name)]  # where it failed nothing is known
    verdicts = verdicts[~np.isnan(verdicts)]  # nor is there anything to be right where it does not apply
    metrics["accuracy"] = (verdicts > 0.5).mean() if verdicts.size else 0.0
    metrics["frac_groups_all_right"] = (constant & (judged.min(axis=1) > 0.5)).mean()
    metrics["frac_groups_all_wrong"] = (constant & (judged.max(axis=1) <= 0.5)).mean()
    said, counted = fresh.scores.items(), fresh.scores.clipped(rewards).items()
    for reward in rewards:
        name = reward.name
        metrics |= {f"rewards/{name}/{key}": value for key, value in _of_reward(fresh.scores, name).items()}
        if said[name] != counted[name]:
            metrics[f"rewards/{name}/clipped"] = sum(x != y for x, y in zip(said[name], counted[name], strict=True))
    return {name: float(value) for name, value in (metrics | _latencies(fresh.scores)).items()}


def _of_reward(scores: Scores, name: str) -> dict[str, float]:
    """What a function said, before it is clipped; `failed` are the completions on which it came to no verdict."""
    values = scores.by_name[name]
    applicable = values[~np.isnan(values)]
    return {
        "mean": applicable.mean() if applicable.size else 0.0,
        "std": applicable.std(ddof=1) if applicable.size > 1 else 0.0,
        "not_applicable": float(values.size - applicable.size),
        "failed": float(scores.of_failed(name).sum()),
    }


def _latencies(scores: Scores) -> dict[str, float]:
    """Percentiles over the completions of a step; a replay has none."""
    metrics = {}
    for name, seconds in scores.seconds.items():
        measured = seconds[~np.isnan(seconds)]
        for key, percent in (("p50", 50), ("p95", 95), ("max", 100)) if measured.size else ():
            metrics[f"time/rewards/{name}/{key}_seconds"] = np.percentile(measured, percent)
    return metrics


def samples_of_group(
    fresh: ScoredGroups, group: int, advantages: np.ndarray, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """One group for people to read, completion by completion; advantages [G] are those of its completions.

    A reward that nobody knows, of the sum or of a function, is None.
    """
    size, rollout = fresh.total.shape[1], fresh.groups.rollout
    members = range(group * size, (group + 1) * size)
    _, texts = completion_texts(jax.tree.map(lambda x: x[members.start : members.stop], rollout), tokenizer)
    said, known = fresh.scores.by_name, lambda value: None if np.isnan(value) else float(value)
    return [
        {
            "prompt": fresh.prompts[group].text, "completion": text, "finished": bool(rollout.finished[i]),
            "reward": known(fresh.total.reshape(-1)[i]), "advantage": float(advantage),
            **{f"rewards/{name}": known(values[i]) for name, values in said.items()},
        }
        for i, text, advantage in zip(members, texts, advantages, strict=True)
    ]  # fmt: skip

"""Evaluation on held-out prompts: greedy accuracy; pass@k, mean@k and maj@k of samples; the completions themselves."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from grpo_jax import hosts
from grpo_jax.compiling import Lowering
from grpo_jax.data.sources import Source
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.rewards import Reward
from grpo_jax.sampler import Sampler
from grpo_jax.scoring import completion_texts, groups_of, interruptibly, on_every_host, score_rollout, scores_of_all
from grpo_jax.types import Policy, PyTree, SamplingParams

__all__ = ["EvaluationConfig", "Evaluator", "maj_at_k", "pass_at_k"]

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured on held-out prompts."""

    every: int = 50  # steps between greedy evaluations
    prompts: int = 512  # for greedy accuracy
    sampled_prompts: int = 128  # prompts for pass@k, which is measured before and after training only
    samples: int = 64  # completions of each prompt for pass@k; k goes up to this
    temperature: float = 1.0  # of the samples for pass@k
    top_p: float = 1.0  # they are drawn among the likeliest tokens of this mass; 1: all
    completions: int = 8192  # sampled at a time at most, which bounds the memory; it does not change what is measured

    def __post_init__(self) -> None:
        sizes = {
            name: getattr(self, name) for name in ("every", "prompts", "sampled_prompts", "samples", "completions")
        }
        if low := [f"{name}={size}" for name, size in sizes.items() if size < 1]:
            raise ValueError(f"{', '.join(low)} must be 1 or more.")
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature={self.temperature} must be above 0, top_p={self.top_p} in (0, 1].")


def pass_at_k(correct: np.ndarray, k: int) -> float:
    r"""The chance that one of k completions is right, unbiased from n >= k of them (arXiv 2107.03374, eq. 1).

    .. math:: \mathrm{pass@}k = \mathbb E_{prompts}\Big[1 - \binom{n-c}{k} \Big/ \binom{n}{k}\Big]

    Args:
      correct: [P, n] bool.
      k: from 1 to n.

    Raises:
      ValueError: k is not from 1 to n.
    """
    n = correct.shape[1]
    _check_k(k, n)
    return float(np.mean([1 - math.comb(n - int(c), k) / math.comb(n, k) for c in correct.sum(axis=1)]))


def maj_at_k(answers: Sequence[Sequence[str | None]], correct: np.ndarray, k: int) -> float:
    """The share of prompts whose most frequent answer is right (self-consistency, arXiv 2203.11171).

    Answers that are equally frequent count in equal parts, and completions with the same answer too where the
    judge does not say the same of them. A completion without an answer has no vote; without any vote, the prompt
    counts as wrong.

    Args:
      answers: [P, n], what each completion answers; None: nothing.
      correct: [P, n] bool.
      k: the first k completions vote, from 1 to n.

    Raises:
      ValueError: k is not from 1 to n.
    """
    _check_k(k, correct.shape[1])
    shares = []
    for row_answers, row_correct in zip(answers, correct, strict=True):
        votes: dict[str, list[bool]] = {}
        for answer, right in zip(row_answers[:k], row_correct[:k], strict=True):
            if answer is not None:
                votes.setdefault(answer, []).append(bool(right))
        most = max(map(len, votes.values()), default=0)
        shares.append(np.mean([np.mean(rights) for rights in votes.values() if len(rights) == most]) if votes else 0.0)
    return float(np.mean(shares))


def _check_k(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k={k} must be from 1 to the number of samples, {n}.")


class Evaluator:
    """Measures parameters on the first prompts of a source; the same prompts and random numbers every time."""

    def __init__(
        self, policy: Policy, mesh: Mesh, tokenizer: Tokenizer, source: Source, rewards: Sequence[Reward],
        config: EvaluationConfig, *, max_tokens: int, max_prompt_tokens: int, key: jax.Array,
        answer: Callable[[str], str | None] | None = None, stop: Sequence[str] = (), copies: float = 4,
    ):  # fmt: skip
        """The first of `rewards` judges: above 0.5 is right, anything else, None too, wrong. The others are reported.

        Where a judge failed (`Judged.failed`) nothing is known: such completions are counted and in no mean; in pass@k
        and maj@k, which need them all, they are wrong.

        `answer`: what a completion answers, for maj@k; equal answers are equal strings (`rewards.answers.extract_*`).
        `stop`: strings that end a completion. `copies`: see `Sampler`.

        Raises:
          ValueError: there is no reward, two have the same name, or one that does not judge is named `accuracy`;
            or `config.completions` is less than one prompt's on each device.
        """
        names = [r.name for r in rewards]
        if not names or len({*names}) < len(names) or "accuracy" in names[1:]:
            raise ValueError(
                f"rewards named {names}: expected at least one, of different names, of which only the first, which "
                "judges, may be 'accuracy'."
            )
        self._source, self._rewards, self._config, self._tokenizer = source, rewards, config, tokenizer
        self._answer, self._max_tokens = answer, max_tokens
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        sampler: Callable[[int], Sampler] = lambda group: Sampler(
            policy,
            mesh,
            tokenizer,
            group_size=group,
            max_tokens=max_tokens,
            max_prompt_tokens=max_prompt_tokens,
            key=key,
            stop=stop,
            copies=copies,
        )
        self._greedy, self._sampled = sampler(1), sampler(config.samples)
        self._greedy_batch = _batch_size(config.prompts, 1, config.completions, shards)
        self._sampled_batch = _batch_size(config.sampled_prompts, config.samples, config.completions, shards)

    def lowerings(self, params: PyTree) -> list[Lowering]:
        """The programs that it runs, of parameters or their shapes and places."""
        sizes = (self._sampled, self._sampled_batch), (self._greedy, self._greedy_batch)
        return [lowering for sampler, size in sizes for lowering in sampler.lowerings(params, size)]

    def records(
        self, params: Any, *, sampled: bool, interrupt: Callable[[], None] = lambda: None
    ) -> Iterator[dict[str, Any]]:
        """Completions with their scores, prompt by prompt: the greedy ones, or `config.samples` of each prompt.

        Yields:
          `index` of the prompt, `sample` within it, `temperature` (0: greedy), `prompt`, `completion`, `finished`
          (false where it was cut), `tokens` (how many), `rewards` by name (None: does not apply, or nobody knows),
          `failed` (names of those whose judge came to no verdict) and `columns`.

        Raises:
          RewardError: as `scoring.on_every_host`, on every process.
        """
        c = self._config
        total, temperature = (c.sampled_prompts, c.temperature) if sampled else (c.prompts, 0.0)
        sampler, size = (self._sampled, self._sampled_batch) if sampled else (self._greedy, self._greedy_batch)
        group, choice = sampler.group_size, SamplingParams(temperature=temperature, top_p=c.top_p)
        for start in range(0, total, size):
            ids = range(start, min(start + size, total))
            prompts = [self._source(i) for i in ids]
            # Every batch has the same compiled shape: the last is filled up with a prompt that is then dropped.
            texts, filled = [p.text for p in prompts], size - len(ids)
            texts_and_ids = texts + texts[:1] * filled, [*ids, *[start] * filled]
            limits = np.repeat([[self._max_tokens], [0]], [len(ids), filled], axis=0).repeat(group, axis=1)
            rollout = hosts.fetched(sampler(params, *texts_and_ids, choice, interrupt, limits))
            rollout = jax.tree.map(lambda x, n=len(ids): x[: len(x) // size * n], rollout)
            own = hosts.share(range(len(ids)))  # of several processes each judges its part
            of_own = groups_of(rollout, own)
            judge = functools.partial(
                score_rollout, self._rewards, [prompts[i] for i in own], of_own, self._tokenizer, group
            )
            (scores,) = on_every_host(functools.partial(interruptibly, [judge], self._rewards, interrupt))
            scores = scores_of_all(scores, [len(ids)], group)
            for i, (tokens, completion) in enumerate(zip(*completion_texts(rollout, self._tokenizer), strict=True)):
                prompt, sample = divmod(i, group)
                yield {
                    "index": ids[prompt], "sample": sample, "temperature": temperature,
                    "prompt": texts[prompt], "completion": completion,
                    "finished": bool(rollout.finished[i]), "tokens": len(tokens),
                    "rewards": {name: None if np.isnan(v[i]) else float(v[i]) for name, v in scores.by_name.items()},
                    "failed": [name for name in scores.by_name if scores.of_failed(name)[i]],
                    "columns": dict(prompts[prompt].columns),
                }  # fmt: skip

    def summarize(self, records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """What all `records` of one kind or of both say, as `greedy` and `full` return it; failures are logged."""
        greedy: list[Mapping[str, Any]] = []
        sampled: list[Mapping[str, Any]] = []
        for record in records:
            (sampled if record["temperature"] > 0 else greedy).append(record)
        for reward in self._rewards:
            if lost := [r["completion"] for r in (*greedy, *sampled) if reward.name in r["failed"]]:
                _LOG.warning(
                    "evaluation: %s came to no verdict on %d of %d completions, the first of them %.300r",
                    reward.name, len(lost), len(greedy) + len(sampled), lost[0],
                )  # fmt: skip
        return {
            **(self._of_greedy(greedy) if greedy else {}),
            **(self._of_samples(sampled) if sampled else {}),
        }

    def greedy(self, params: Any, interrupt: Callable[[], None] = lambda: None) -> dict[str, float]:
        """`eval/accuracy`: share of prompts whose greedy completion is right; `eval/{name}`: mean of another reward.

        Means are over the completions to which a reward applies; `eval/{name}/not_applicable` counts the others,
        where there are any, and `eval/{name}/failed` those of them on which its judge failed: `eval/accuracy/failed`
        where the reward that judges did.
        """
        return self.summarize(self.records(params, sampled=False, interrupt=interrupt))

    def full(self, params: Any, interrupt: Callable[[], None] = lambda: None) -> dict[str, float]:
        """What `greedy` measures, and what n samples of each prompt say.

        `eval/pass@k` and, where the evaluator was given `answer`, `eval/maj@k`, each for k = 1, 4, 16, ... up to n;
        `eval/mean@n`, the mean of the reward that judges, None as 0; `eval/{name}/mean@n`, that of another; and
        `/failed` behind both, as in `greedy`.
        """
        sampled = list(self.records(params, sampled=True, interrupt=interrupt))
        return self.summarize([*sampled, *self.records(params, sampled=False, interrupt=interrupt)])

    def _of_greedy(self, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        judge, *others = self._rewards
        metrics = _of_judge("eval/accuracy", (_values(records, judge) > 0.5).astype(float), _failed(records, judge))
        for reward in others:
            metrics |= _mean(f"eval/{reward.name}", _values(records, reward), _failed(records, reward))
        return metrics

    def _of_samples(self, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        n = self._config.samples
        judged = _values(records, self._rewards[0]).reshape(-1, n)
        correct = judged > 0.5
        ks: Sequence[int] = sorted({4**i for i in range(10) if 4**i < n} | {n})
        metrics = {f"eval/pass@{k}": pass_at_k(correct, k) for k in ks}
        failed = _failed(records, self._rewards[0])
        metrics |= _of_judge(f"eval/mean@{n}", np.nan_to_num(judged).reshape(-1), failed)
        for reward in self._rewards[1:]:
            metrics |= _mean(f"eval/{reward.name}/mean@{n}", _values(records, reward), _failed(records, reward))
        if self._answer is not None:
            answers = [self._answer(record["completion"]) for record in records]
            grouped = [answers[i : i + n] for i in range(0, len(answers), n)]
            metrics |= {f"eval/maj@{k}": maj_at_k(grouped, correct, k) for k in ks}
        return metrics


def _batch_size(prompts: int, samples: int, completions: int, shards: int) -> int:
    """Prompts at a time: a multiple of the devices, as few batches as fit, and those as small as they can be."""
    largest = completions // (samples * shards) * shards
    if not largest:
        raise ValueError(
            f"evaluation.completions={completions} is less than one prompt's {samples} on each of {shards} devices "
            f"(data x fsdp): make it at least {samples * shards}."
        )
    batches = math.ceil(prompts / largest)
    return math.ceil(prompts / (batches * shards)) * shards


def _values(records: Sequence[Mapping[str, Any]], reward: Reward) -> np.ndarray:
    """[B] float64, NaN where the reward does not apply."""
    return np.array([record["rewards"][reward.name] for record in records], np.float64)


def _failed(records: Sequence[Mapping[str, Any]], reward: Reward) -> np.ndarray:
    """[B] bool: where its judge came to no verdict."""
    return np.array([reward.name in record["failed"] for record in records], bool)


def _of_judge(name: str, values: np.ndarray, failed: np.ndarray) -> dict[str, float]:
    """The mean over the completions that were judged; 0 where none was, as where none is right."""
    known = values[~failed]
    return {name: float(known.mean()) if known.size else 0.0, **_count(f"{name}/failed", failed)}


def _mean(name: str, values: np.ndarray, failed: np.ndarray) -> dict[str, float]:
    missing = np.isnan(values)
    mean = {} if missing.all() else {name: float(values[~missing].mean())}
    return {**mean, **_count(f"{name}/not_applicable", missing), **_count(f"{name}/failed", failed)}


def _count(name: str, of: np.ndarray) -> dict[str, float]:
    return {name: float(of.sum())} if of.any() else {}

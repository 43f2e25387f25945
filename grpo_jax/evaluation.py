"""Evaluation on held-out prompts: greedy accuracy, and pass@k from samples."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from grpo_jax.data.sources import Source
from grpo_jax.rewards import Reward
from grpo_jax.rollouts import Sampler, Tokenizer, score_rollout
from grpo_jax.types import Policy, SamplingParams

__all__ = ["EvaluationConfig", "Evaluator", "pass_at_k"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured on held-out prompts."""

    every: int = 50  # steps between greedy evaluations
    prompts: int = 512  # for greedy accuracy
    sampled_prompts: int = 128  # prompts for pass@k, which is measured before and after training only
    samples: int = 64  # completions of each prompt for pass@k; k goes up to this
    temperature: float = 1.0  # of the samples for pass@k

    def __post_init__(self) -> None:
        if min(self.every, self.prompts, self.sampled_prompts, self.samples) < 1 or self.temperature <= 0:
            raise ValueError(f"{self}: every number must be above 0.")


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
    if not 1 <= k <= n:
        raise ValueError(f"k={k} must be from 1 to the number of samples, {n}.")
    return float(np.mean([1 - math.comb(n - int(c), k) / math.comb(n, k) for c in correct.sum(axis=1)]))


class Evaluator:
    """Measures parameters on the first prompts of a source; the same prompts and random numbers every time."""

    def __init__(
        self, policy: Policy, mesh: Mesh, tokenizer: Tokenizer, source: Source, accuracy: Reward,
        config: EvaluationConfig, *, max_tokens: int, max_prompt_tokens: int, key: jax.Array,
    ):  # fmt: skip
        """`accuracy`: the reward that says right (above 0.5) or wrong."""
        self._source, self._accuracy, self._config, self._tokenizer = source, accuracy, config, tokenizer
        sampler: Callable[[int], Sampler] = lambda group: Sampler(
            policy,
            mesh,
            tokenizer,
            group_size=group,
            max_tokens=max_tokens,
            max_prompt_tokens=max_prompt_tokens,
            key=key,
        )
        self._greedy, self._sampled = sampler(1), sampler(config.samples)

    def _correct(self, sampler: Sampler, params: Any, prompts: int, temperature: float, interrupt) -> np.ndarray:
        problems = [self._source(i) for i in range(prompts)]
        rollout = jax.device_get(
            sampler(
                params, [p.text for p in problems], range(prompts), SamplingParams(temperature=temperature), interrupt
            )
        )
        scores = score_rollout([self._accuracy], problems, rollout, self._tokenizer, sampler.group_size)
        return scores.by_name[self._accuracy.name].reshape(prompts, sampler.group_size) > 0.5

    def greedy(self, params: Any, interrupt: Callable[[], None] = lambda: None) -> dict[str, float]:
        """`eval/accuracy`: share of prompts whose greedy completion is right."""
        return {
            "eval/accuracy": float(self._correct(self._greedy, params, self._config.prompts, 0.0, interrupt).mean())
        }

    def full(self, params: Any, interrupt: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Greedy accuracy, and `eval/pass@k` for k = 1, 4, 16, ... up to the number of samples."""
        c = self._config
        correct = self._correct(self._sampled, params, c.sampled_prompts, c.temperature, interrupt)
        ks: Sequence[int] = sorted({4**i for i in range(10) if 4**i < c.samples} | {c.samples})
        return {**self.greedy(params, interrupt), **{f"eval/pass@{k}": pass_at_k(correct, k) for k in ks}}

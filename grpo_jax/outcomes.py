"""What the completions of a rollout were worth -> their advantages, by the estimators that objectives choose from."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.advantages import (
    BASELINES,
    SCALES,
    Baseline,
    Scale,
    combine_rewards,
    constant_groups,
    gae,
    group_advantages,
    group_mean,
    group_std,
    leave_one_out_mean,
    no_baseline,
    no_scale,
    process_advantages,
    whiten,
)
from grpo_jax.types import Array, record

__all__ = [
    "AdvantageConfig",
    "Estimator",
    "Outcome",
    "leave_one_out_gae",
    "outcome_supervision",
    "process_supervision",
    "whitened_gae",
    "without_signal",
]


@record
class Outcome:
    """What the completions of a rollout were worth."""

    rewards: Array  # [P, G] float32, the weighted sum
    counted: Array  # [P, G] bool, the completions that count in baselines and scales
    mask: Array  # [B, T] bool, the tokens of completions
    # [B, T] float32, the reward of the step that ends at a token, NaN where none does; None: nobody asks for steps
    step_rewards: Array | None = None
    penalties: Array | None = None  # [B, T] float32, taken from the rewards; None: nothing is


# (Outcome, *, some of ddof, epsilon, baseline, scale, smoothing, discount) -> advantages [B] or [B, T] float32
Estimator: TypeAlias = Callable[..., jax.Array]


def _returns(outcome: Outcome) -> jax.Array:
    """[P, G]: rewards less what is taken from them."""
    if outcome.penalties is None:
        return jnp.asarray(outcome.rewards)
    return outcome.rewards - jnp.where(outcome.mask, outcome.penalties, 0).sum(axis=1).reshape(outcome.rewards.shape)


def without_signal(outcome: Outcome) -> jax.Array:
    """[P] bool: groups in which all rewards are equal, those of their steps where there are any; penalties aside."""
    if outcome.step_rewards is None:
        return constant_groups(outcome.rewards, outcome.counted)
    steps = outcome.step_rewards.reshape(len(outcome.rewards), -1)
    return constant_groups(steps, ~jnp.isnan(steps) & jnp.repeat(outcome.counted, outcome.mask.shape[1], axis=1))


def outcome_supervision(
    outcome: Outcome, *, ddof: int, epsilon: float, baseline: Baseline = group_mean, scale: Scale = group_std
) -> jax.Array:
    """[B] float32: `group_advantages`, the same for every token of a completion."""
    options = {"ddof": ddof, "epsilon": epsilon, "counted": outcome.counted}
    return group_advantages(_returns(outcome), baseline=baseline, scale=scale, **options).reshape(-1)


def process_supervision(outcome: Outcome, *, ddof: int, epsilon: float) -> jax.Array:
    """[B, T] float32: `process_advantages`; with one step at each completion's end, those of `outcome_supervision`."""
    if outcome.step_rewards is None:
        raise ValueError("process supervision needs the rewards of steps: Outcome.step_rewards is None.")
    return process_advantages(
        outcome.step_rewards, outcome.mask, outcome.rewards.shape[1], ddof=ddof, epsilon=epsilon,
        counted=outcome.counted.reshape(-1),
    )  # fmt: skip


def leave_one_out_gae(outcome: Outcome, *, smoothing: float, discount: float) -> jax.Array:
    r"""Generalized advantage estimation without a critic: a state is worth what the others of its group got.

    .. math:: \hat A_{i,t} = \sum_{l \ge 0} (\gamma\lambda)^l \delta_{i,t+l}, \quad
       \delta_{i,t} = r_{i,t} + \gamma V_{i,t+1} - V_{i,t}, \quad V_{i,t} = \frac{1}{G-1} \sum_{j \ne i} R_j

    with R the reward of a completion less its penalties, r the same at each token (the reward at the last one), and a
    value of 0 behind the last token. V is a Monte-Carlo estimate of the prompt's value, and knows nothing of a
    completion's own tokens: with :math:`\lambda = 1` the expected gradient is the policy gradient. With less, and
    :math:`\gamma = 1`, no penalties, :math:`\hat A_{i,t} = \lambda^{|o_i|-1-t} (R_i - V_i)`: tokens far from the end
    count less, and the gradient is biased, as it is not with an exact critic.

    Args:
      outcome: of completions of one token or more.
      smoothing: lambda, in [0, 1].
      discount: gamma, in [0, 1]; below 1 a state far from the end is still worth V.

    Returns:
      [B, T] float32; 0 where the mask is false.
    """
    mask = jnp.asarray(outcome.mask)
    values = leave_one_out_mean(_returns(outcome), outcome.counted).reshape(-1, 1)
    last = jnp.arange(mask.shape[1])[None] == mask.sum(axis=1, keepdims=True) - 1
    rewards = jnp.where(last, outcome.rewards.reshape(-1, 1), 0)
    rewards = rewards if outcome.penalties is None else rewards - outcome.penalties
    values = jnp.broadcast_to(values, mask.shape)
    return gae(rewards, values, mask, discount=discount, smoothing=smoothing)[0]


def whitened_gae(outcome: Outcome, *, ddof: int, epsilon: float, smoothing: float, discount: float) -> jax.Array:
    """[B, T] float32: `leave_one_out_gae`, standardized over the tokens of the batch, as PPO is implemented."""
    advantages = leave_one_out_gae(outcome, smoothing=smoothing, discount=discount)
    return whiten(advantages, outcome.mask, ddof=ddof, epsilon=epsilon, counted=outcome.counted.reshape(-1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """How rewards become advantages."""

    baseline: str = ""  # group, leave_one_out, batch or none; empty: the objective's own
    scale: str = ""  # what they are divided by, the deviation of: group, batch, or none; empty: the objective's own
    ddof: int = 1  # 1: sample deviation (divide by G - 1); 0: divide by G
    epsilon: float = 1e-4  # added to the standard deviation
    smoothing: float = 0.95  # lambda of generalized advantage estimation (ppo): 1 is unbiased
    discount: float = 1.0  # gamma of the same
    normalize_each: bool = False  # each reward is standardized within its group before the weighted sum (GDPO)
    count_truncated: bool = True  # completions that were cut at the limit count in baseline and scale
    train_truncated: bool = True  # and train

    def __post_init__(self) -> None:
        if self.ddof not in (0, 1) or self.epsilon < 0:
            raise ValueError(f"ddof={self.ddof} must be 0 or 1, epsilon={self.epsilon} 0 or more.")
        if not (0 <= self.smoothing <= 1 and 0 <= self.discount <= 1):
            raise ValueError(f"smoothing={self.smoothing} and discount={self.discount} must be in [0, 1].")
        for name, table in (("baseline", BASELINES), ("scale", SCALES)):
            if getattr(self, name) not in ("", *table):
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(table)}, or empty.")

    def of(self, estimator: Estimator) -> Callable[[Outcome], jax.Array]:
        """An objective's estimator with these options, compiled.

        Raises:
          ValueError: an option is set that it has no place for.
        """
        taken, default = inspect.signature(estimator).parameters, AdvantageConfig()
        values = {
            name: getattr(self, name) for name in ("baseline", "scale", "ddof", "epsilon", "smoothing", "discount")
        }
        refused = [f"{n}={v!r}" for n, v in values.items() if n not in taken and v != getattr(default, n)]
        options: dict[str, Any] = {n: v for n, v in values.items() if n in taken}
        for name, table in (("baseline", BASELINES), ("scale", SCALES)):
            if name in taken:
                options[name] = table.get(options[name], taken[name].default)
        baseline, scale = options.get("baseline"), options.get("scale")
        if scale is no_scale and not self.normalize_each:
            refused += [f"{n}={values[n]!r}" for n in ("ddof", "epsilon") if values[n] != getattr(default, n)]
        if scale is no_scale and baseline is no_baseline and not (self.count_truncated or self.normalize_each):
            refused.append("count_truncated=False")
        if refused:
            raise ValueError(
                f"the objective's advantages have no place for {', '.join(refused)}: leave it out, or take another "
                "objective."
            )
        return jax.jit(functools.partial(estimator, **options))

    def counted(self, finished: np.ndarray) -> np.ndarray:
        """[...] bool, of completions that ended or did not."""
        return np.asarray(finished) | self.count_truncated

    def combine(self, rewards: np.ndarray, weights: np.ndarray, counted: np.ndarray) -> np.ndarray:
        """K rewards [K, P, M], NaN where one does not apply -> their sum [P, M] float32, NaN where none does.

        M are completions, or tokens of a group at which steps end; counted [P, M] bool.
        """
        each = None
        if self.normalize_each:
            each = lambda r, counted: group_advantages(
                r, ddof=self.ddof, epsilon=self.epsilon, counted=counted & of_group
            )
        of_group = jnp.asarray(counted)
        combined = combine_rewards(jnp.asarray(rewards, jnp.float32), jnp.asarray(weights, jnp.float32), each=each)
        return np.where(np.isnan(rewards).all(axis=0), np.nan, np.asarray(combined)).astype(np.float32)

"""What multiplies a token's surrogate: importance weights against the sampler, and the choice of tokens that learn."""

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from grpo_jax.losses import Level, sequence_product, token_level
from grpo_jax.metrics import EffectiveSampleSize, Max, Metrics, masked_mean

__all__ = ["CORRECTIONS", "importance_correction", "top_entropies"]

# Options of `importance_correction`, by the names that TRL's users know.
CORRECTIONS: Mapping[str, Mapping[str, Any]] = {
    "token_truncate": {"level": token_level, "masked": False},
    "token_mask": {"level": token_level, "masked": True},
    "sequence_truncate": {"level": sequence_product, "masked": False},
    "sequence_mask": {"level": sequence_product, "masked": True},
}


def importance_correction(
    logprobs: jax.Array,
    sampler_logprobs: jax.Array,
    mask: jax.Array,
    *,
    level: Level = token_level,
    bound: float = 2.0,
    masked: bool = False,
) -> tuple[jax.Array, Metrics]:
    r"""Truncated or masked importance sampling between the trainer's policy and the sampler's.

    .. math:: w = \pi_{old} / \mu, \qquad c = \min(w, C) \quad\text{or}\quad c = w\,[1/C \le w \le C]

    Sampler and trainer compute the same policy in different precision, or the sampler's is some steps older. Truncated:
    TIS (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"), at the level of
    sequences as Ionides 2008. Masked: IcePop (Ling team 2025) and MIS (Liu et al. 2025), which leave out what is too
    far away on either side. The `level` is `token_level`, or `sequence_product` for whole completions.

    Args:
      logprobs: [B, T] float32, of the trainer before its update (old), at the sampling temperature.
      sampler_logprobs: [B, T] float32, of the sampler.
      mask: [B, T] bool; elsewhere they may be anything.
      level: log-ratios [B, T], mask -> logarithms of the weights [B, T].
      bound: C, above 1.
      masked: leave out what is outside of the bounds in place of cutting it.

    Returns:
      c [B, T] float32, without a gradient, and metrics: mean and largest difference of the log-probabilities,
      effective sample size of w as a share of the tokens, and the fraction of w outside of [1 / C, C].

    Raises:
      ValueError: the bound is not above 1.
    """
    chex.assert_equal_shape([logprobs, sampler_logprobs, mask])
    if not bound > 1:
        raise ValueError(f"bound={bound} must be above 1.")
    log_ratio = jnp.where(mask, jax.lax.stop_gradient(logprobs) - sampler_logprobs, 0)
    # A cap that no honest weight reaches: a product of thousands of ratios must not become inf.
    weights = jnp.exp(jnp.clip(level(log_ratio, mask), -30.0, 30.0))
    outside = (weights > bound) | (weights < 1 / bound)
    correction = jnp.where(outside, 0, weights) if masked else jnp.minimum(weights, bound)
    difference, counted = jnp.abs(log_ratio), jnp.where(mask, weights, 0)
    name = "sampling/sampling_logp_difference"
    metrics = {
        f"{name}/mean": masked_mean(difference, mask),
        f"{name}/max": Max(top=jnp.where(mask, difference, 0).max()),
        "sampling/effective_sample_size": EffectiveSampleSize(
            total=counted.sum(), squares=jnp.square(counted).sum(), count=mask.sum().astype(jnp.float32)
        ),
        "sampling/frac_out_of_bounds": masked_mean(outside, mask),
    }
    return correction, metrics


def top_entropies(entropies: jax.Array, mask: jax.Array, share: float) -> jax.Array:
    r"""Which tokens are among the `share` of the greatest entropy: :math:`[H_{i,t} \ge \tau_\rho]`, [B, T] bool.

    The forking tokens of arXiv 2506.01939 (eq. 5: a fifth of all, over the whole batch) carry the gradient. All of
    equal entropy with the last one that is taken are taken too.

    Raises:
      ValueError: the share is not in (0, 1].
    """
    chex.assert_equal_shape([entropies, mask])
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must be in (0, 1].")
    descending = -jnp.sort(-jnp.where(mask, entropies, -jnp.inf), axis=None)
    count = mask.sum()
    last = jnp.ceil(share * count - 1e-6 * count).astype(jnp.int32) - 1  # rounding of the product adds no token
    return mask & (entropies >= descending[jnp.maximum(last, 0)])

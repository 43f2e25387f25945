"""Surrogates, KL estimators and token weights. Arrays in, `(scalar, metrics)` out; no model, no config.

Every loss is the sum over tokens of weight times term. The weights come from the mask of a *whole*
optimizer minibatch, so that cutting the minibatch into microbatches, or over devices, changes nothing.
"""

import chex
import jax
import jax.numpy as jnp

from grpo_jax.metrics import Metrics, masked_mean

__all__ = [
    "clipped_surrogate",
    "grpo_loss",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "sequence_mean",
    "supervised_loss",
    "token_mean",
]


# Token weights: mask [B, T] bool -> weights [B, T] float32 ----------------------------------------


def sequence_mean(mask: jax.Array) -> jax.Array:
    r"""Mean over the tokens of a completion, then over completions: :math:`1 / (B\,|o_i|)`.

    The 1/G sum_i 1/|o_i| sum_t of DeepSeekMath's eq. 3. A completion without tokens counts in B.
    """
    chex.assert_rank(mask, 2)
    lengths = jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    return mask / (lengths * mask.shape[0]).astype(jnp.float32)


def token_mean(mask: jax.Array) -> jax.Array:
    r"""Mean over all tokens of the minibatch: :math:`1 / \sum_i |o_i|` (DAPO, arXiv 2503.14476, eq. 8)."""
    chex.assert_rank(mask, 2)
    return mask / jnp.maximum(mask.sum(), 1).astype(jnp.float32)


# KL estimators: log-probabilities [...] of the policy and the reference -> [...] ------------------


def kl_k1(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    r""":math:`k_1 = -d,\ d = \log\pi_{ref} - \log\pi_\theta`; unbiased, of either sign (Schulman 2020).

    Used as a loss, its expected gradient on-policy is zero: it belongs into the reward.
    """
    return logprobs - ref_logprobs


def kl_k2(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    r""":math:`k_2 = d^2/2`; biased, and its on-policy gradient is that of the KL (Schulman 2020)."""
    return jnp.square(ref_logprobs - logprobs) / 2


def kl_k3(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    r""":math:`k_3 = e^d - 1 - d`; unbiased and never negative (DeepSeekMath, eq. 4).

    ``expm1``, because ``exp(d) - 1 - d`` loses all its digits where the two policies are close.
    """
    d = ref_logprobs - logprobs
    return jnp.expm1(d) - d


# Losses --------------------------------------------------------------------------------------------


def clipped_surrogate(log_ratio: jax.Array, advantages: jax.Array, *, clip_low: float, clip_high: float) -> jax.Array:
    r"""PPO's clipped objective, to be maximized (arXiv 1707.06347, eq. 7), term by term.

    .. math:: \min\big(\rho A,\ \mathrm{clip}(\rho, 1-\epsilon_{low}, 1+\epsilon_{high})\,A\big)

    with :math:`\rho = e^{log\_ratio}`.

    Args:
      log_ratio: [B, T] float32, log-probability now minus then; finite.
      advantages: [B, T] or [B, 1] float32.
      clip_low: epsilon below 1.
      clip_high: epsilon above 1.

    Returns:
      [B, T] float32.
    """
    chex.assert_rank([log_ratio, advantages], 2)
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    return jnp.minimum(ratio * advantages, clipped * advantages)


def grpo_loss(
    logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    old_logprobs: jax.Array | None = None,
    ref_logprobs: jax.Array | None = None,
    weights: jax.Array | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.04,
) -> tuple[jax.Array, Metrics]:
    r"""Minus the objective of GRPO (DeepSeekMath, arXiv 2402.03300, eq. 3 and 4).

    .. math::
       J = \frac1G \sum_i \frac1{|o_i|} \sum_t \Big\{ \min\big(\rho_{i,t} \hat A_{i,t},\,
           \mathrm{clip}(\rho_{i,t}, 1-\epsilon, 1+\epsilon)\, \hat A_{i,t}\big) - \beta\, k_3 \Big\},
       \quad \rho_{i,t} = \frac{\pi_\theta(o_{i,t})}{\pi_{old}(o_{i,t})},
       \quad k_3 = \frac{\pi_{ref}}{\pi_\theta} - 1 - \log\frac{\pi_{ref}}{\pi_\theta}

    The first on-policy step prints a loss near 0: ratios are 1, and the advantages of a group sum to 0.
    The gradient is not 0.

    Args:
      logprobs: [B, T] float32, of the completion tokens under the policy; where the mask is false
        they may be anything, also -inf.
      advantages: [B] or [B, T] float32.
      mask: [B, T] bool, the tokens that train.
      old_logprobs: [B, T], under the policy that is being improved upon. None: this is the first
        update after the rollout, and they are `stop_gradient(logprobs)`.
      ref_logprobs: [B, T], under the frozen reference. Needed where kl_coef is not 0.
      weights: [B, T] float32, `sequence_mean(mask)` of the whole minibatch; None: of this mask.
      clip_low: epsilon below 1.
      clip_high: epsilon above 1.
      kl_coef: beta.

    Returns:
      The loss, [] float32, and metrics: `clip_ratio/low_mean`, `clip_ratio/high_mean`,
      `clip_ratio/region_mean`, and `kl` where kl_coef is not 0: means over the tokens of the mask.

    Raises:
      ValueError: kl_coef is not 0 and ref_logprobs is None.
    """
    chex.assert_rank([logprobs, mask], 2)
    chex.assert_equal_shape([x for x in (logprobs, mask, old_logprobs, ref_logprobs, weights) if x is not None])
    if kl_coef and ref_logprobs is None:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logprobs; pass them, or kl_coef=0.")
    advantages = advantages[:, None] if advantages.ndim == 1 else advantages
    weights = sequence_mean(mask) if weights is None else weights
    # Masked before any exp: inf * 0 is NaN, in values and in gradients.
    logprobs = jnp.where(mask, logprobs, 0)
    old = jax.lax.stop_gradient(logprobs) if old_logprobs is None else jnp.where(mask, old_logprobs, 0)
    log_ratio = logprobs - old
    terms = clipped_surrogate(log_ratio, advantages, clip_low=clip_low, clip_high=clip_high)
    low = (log_ratio < jnp.log1p(-clip_low)) & (advantages < 0)
    high = (log_ratio > jnp.log1p(clip_high)) & (advantages > 0)
    metrics = {
        "clip_ratio/low_mean": masked_mean(low, mask),
        "clip_ratio/high_mean": masked_mean(high, mask),
        "clip_ratio/region_mean": masked_mean(low | high, mask),
    }
    if kl_coef and ref_logprobs is not None:
        kl = kl_k3(logprobs, jnp.where(mask, ref_logprobs, 0))
        metrics["kl"] = masked_mean(kl, mask)
        terms -= kl_coef * kl
    return -(weights * jnp.where(mask, terms, 0)).sum(), metrics


def supervised_loss(
    logprobs: jax.Array, mask: jax.Array, *, weights: jax.Array | None = None
) -> tuple[jax.Array, Metrics]:
    r"""Negative log-likelihood per token, :math:`-\sum_{i,t} w_{i,t} \log\pi_\theta(o_{i,t})`.

    Args:
      logprobs: [B, T] float32; anything where the mask is false.
      mask: [B, T] bool.
      weights: [B, T] float32, `token_mean(mask)` of the whole minibatch; None: of this mask.

    Returns:
      The loss, [] float32, and no metrics.
    """
    chex.assert_equal_shape([logprobs, mask])
    weights = token_mean(mask) if weights is None else weights
    return -(weights * jnp.where(mask, logprobs, 0)).sum(), {}

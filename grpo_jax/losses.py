"""Surrogates, KL estimators and token weights. Arrays in, `(scalar, metrics)` out; no model, no config.

Every loss is the sum over tokens of weight times term. The weights come from the mask of a *whole*
optimizer minibatch, so that cutting the minibatch into microbatches, or over devices, changes nothing.
"""

from collections.abc import Callable
from typing import TypeAlias

import chex
import jax
import jax.numpy as jnp

from grpo_jax.metrics import Metrics, masked_mean

__all__ = [
    "clipped",
    "clipped_surrogate",
    "clipped_weight",
    "dpo_loss",
    "fixed_length",
    "grpo_loss",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "mirror_descent",
    "policy_loss",
    "sequence_level",
    "sequence_level_token_gradient",
    "sequence_mean",
    "sequence_product",
    "sequence_sum",
    "soft_gate",
    "supervised_loss",
    "token_level",
    "token_mean",
    "unclipped",
    "with_gradient_of_k2",
]

Level: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
Estimator: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
Surrogate: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]


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


def sequence_sum(mask: jax.Array) -> jax.Array:
    r"""Sum over the tokens of a completion, mean over completions: :math:`1 / B` (log-probabilities of whole ones)."""
    chex.assert_rank(mask, 2)
    return mask / jnp.float32(mask.shape[0])


def fixed_length(mask: jax.Array) -> jax.Array:
    r"""Sum over tokens, divided by the same number whatever their length: :math:`1 / (B\,T)` (Dr. GRPO, 2503.20783).

    T is the limit to which completions are padded. The paper's listing divides by it, its eq. 2 by nothing.
    """
    chex.assert_rank(mask, 2)
    return mask / jnp.float32(mask.size)


# Levels: log-ratios [B, T] of policy and old policy, mask [B, T] -> logarithms of importance weights [B, T] ---


def token_level(log_ratio: jax.Array, mask: jax.Array) -> jax.Array:
    r""":math:`\rho_{i,t} = \pi_\theta(o_{i,t}) / \pi_{old}(o_{i,t})`: a weight for every token."""
    del mask
    return log_ratio


def sequence_level(log_ratio: jax.Array, mask: jax.Array) -> jax.Array:
    r""":math:`s_i = (\pi_\theta(o_i) / \pi_{old}(o_i))^{1/|o_i|}` for all tokens of a completion (GSPO, eq. 7)."""
    lengths = jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    return jnp.broadcast_to(log_ratio.sum(axis=1, keepdims=True, where=mask) / lengths, log_ratio.shape)


def sequence_level_token_gradient(log_ratio: jax.Array, mask: jax.Array) -> jax.Array:
    r""":math:`s_{i,t} = \mathrm{sg}[s_i]\, \pi_\theta(o_{i,t}) / \mathrm{sg}[\pi_\theta(o_{i,t})]` (GSPO-token).

    The value of `sequence_level`; the gradient reaches each token with its own advantage.
    """
    stop = jax.lax.stop_gradient
    return stop(sequence_level(log_ratio, mask)) + log_ratio - stop(log_ratio)


def sequence_product(log_ratio: jax.Array, mask: jax.Array) -> jax.Array:
    r""":math:`\pi(o_i) / \mu(o_i)` for all tokens of a completion: the importance weight of the whole of it."""
    return jnp.broadcast_to(log_ratio.sum(axis=1, keepdims=True, where=mask), log_ratio.shape)


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

    Its on-policy gradient is that of the KL in the other direction, :math:`KL(\pi_{ref} \| \pi_\theta)`.
    ``expm1``, because ``exp(d) - 1 - d`` loses all its digits where the two policies are close.
    """
    d = ref_logprobs - logprobs
    return jnp.expm1(d) - d


def with_gradient_of_k2(estimator: Estimator) -> Estimator:
    """An estimator's value with the gradient of `kl_k2`, which on-policy is that of the KL itself."""

    def estimate(logprobs, ref_logprobs):
        k2 = kl_k2(logprobs, ref_logprobs)
        return jax.lax.stop_gradient(estimator(logprobs, ref_logprobs) - k2) + k2

    return estimate


# Surrogates: (log_weight [B, T], logprobs [B, T], advantages [B, 1 or T]) -> (terms, low, high), each [B, T] ---
# Terms are to be maximized; low and high say where the clip holds a term constant.


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


def clipped(clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float = 0.0) -> Surrogate:
    r"""`clipped_surrogate` of the weights; with a dual clip at c > 1, never below :math:`c A` where A < 0.

    (Dual-clip PPO, arXiv 1912.09729, eq. 5: a huge ratio times a negative advantage has no bound else.)

    Raises:
      ValueError: dual_clip is neither 0 nor above 1.
    """
    if dual_clip and not dual_clip > 1:
        raise ValueError(f"dual_clip={dual_clip} must be above 1, or 0 for none.")

    def surrogate(log_weight, logprobs, advantages):
        del logprobs
        terms = clipped_surrogate(log_weight, advantages, clip_low=clip_low, clip_high=clip_high)
        low = (log_weight < jnp.log1p(-clip_low)) & (advantages < 0)
        high = (log_weight > jnp.log1p(clip_high)) & (advantages > 0)
        if dual_clip:
            bound = dual_clip * advantages
            held = (advantages < 0) & (terms < bound)
            terms, high = jnp.where(held, bound, terms), high | held
        return terms, low, high

    return surrogate


def unclipped() -> Surrogate:
    r""":math:`\rho A`, importance sampling without a bound; on-policy its gradient is :math:`A \nabla\log\pi`."""

    def surrogate(log_weight, logprobs, advantages):
        del logprobs
        return jnp.exp(log_weight) * advantages, *_nowhere(log_weight)

    return surrogate


def clipped_weight(clip_low: float = 1.0, clip_high: float = 4.0) -> Surrogate:
    r""":math:`\mathrm{sg}[\mathrm{clip}(\rho, 1-\epsilon_{low}, 1+\epsilon_{high})]\, A \log\pi`.

    CISPO (MiniMax-M1, arXiv 2506.13585): a clipped token still has a gradient, of bounded weight. The
    paper bounds the weight from above only, which is clip_low=1.
    """

    def surrogate(log_weight, logprobs, advantages):
        weight = jnp.exp(log_weight)
        bounded = jax.lax.stop_gradient(jnp.clip(weight, 1 - clip_low, 1 + clip_high))
        return bounded * advantages * logprobs, weight < 1 - clip_low, weight > 1 + clip_high

    return surrogate


def soft_gate(positive: float = 1.0, negative: float = 1.05) -> Surrogate:
    r""":math:`\frac{4}{\tau}\,\sigma(\tau(\rho - 1))\, A`, with a temperature for each sign of A.

    SAPO (arXiv 2511.20347): the gradient fades as the ratio leaves 1, where a clip cuts it off.
    """

    def surrogate(log_weight, logprobs, advantages):
        del logprobs
        sharpness = jnp.where(advantages > 0, positive, negative)
        gate = jax.nn.sigmoid(sharpness * jnp.expm1(log_weight)) * 4 / sharpness
        return gate * advantages, *_nowhere(log_weight)

    return surrogate


def mirror_descent(kl_coef: float = 1.0) -> Surrogate:
    r""":math:`\rho A - \lambda (\rho\log\rho - \rho + 1)`: a penalty for leaving the old policy in place of the clip.

    MDPO (arXiv 2005.09814), on-policy: its sample mean over the old policy's tokens is
    :math:`KL(\pi_\theta \| \pi_{old})`, and no term of it is negative. :math:`\lambda` is the paper's 1 / t_k.
    """

    def surrogate(log_weight, logprobs, advantages):
        del logprobs
        weight = jnp.exp(log_weight)
        return weight * advantages - kl_coef * (weight * log_weight - jnp.expm1(log_weight)), *_nowhere(log_weight)

    return surrogate


def _nowhere(like: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros(like.shape, bool), jnp.zeros(like.shape, bool)


# Losses --------------------------------------------------------------------------------------------


def policy_loss(
    logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    surrogate: Surrogate,
    level: Level = token_level,
    old_logprobs: jax.Array | None = None,
    clamp: float = 0.0,
    ref_logprobs: jax.Array | None = None,
    kl: Estimator = kl_k3,
    kl_coef: float = 0.0,
    weighted_kl: bool = False,
    entropies: jax.Array | None = None,
    entropy_coef: float = 0.0,
    correction: jax.Array | None = None,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    r"""Minus the objective of a policy gradient, of which every one of the family is a case.

    .. math:: J = \sum_{i,t} w_{i,t} \big\{ c_{i,t}\, S(\rho_{i,t}, \hat A_{i,t}) - \beta\, KL_{i,t}
              + \eta\, H_{i,t} \big\}

    with the importance weights :math:`\rho` of a level, a surrogate S, an estimator of the KL to the reference, and
    token weights w.

    Args:
      logprobs: [B, T] float32, of the completion tokens under the policy; where the mask is false they may be anything,
        also -inf.
      advantages: [B] or [B, T] float32.
      mask: [B, T] bool, the tokens that train.
      surrogate: (log_weight, logprobs, advantages) -> terms to be maximized, and where a clip holds them.
      level: log-ratios [B, T], mask -> logarithms of importance weights [B, T].
      old_logprobs: [B, T], under the policy that is being improved upon. None: this is the first update after the
        rollout, and they are `stop_gradient(logprobs)`.
      clamp: log-ratios are cut to [-clamp, clamp], and have no gradient beyond; 0: they are not.
      ref_logprobs: [B, T], under the frozen reference. Needed where kl_coef is not 0.
      kl: estimator of the KL to the reference.
      kl_coef: beta.
      weighted_kl: the estimate is multiplied by the token's ratio, gradient included: unbiased also where the old
        policy sampled (DeepSeek-V3.2, arXiv 2512.02556).
      entropies: [B, T], with gradient. Needed where entropy_coef is not 0.
      entropy_coef: eta.
      correction: [B, T] float32, c: of `corrections`, and 0 where a token's surrogate is to be left out.
      weights: [B, T] float32, of the whole minibatch; None: `sequence_mean(mask)`.

    Returns:
      The loss, [] float32, and metrics: `clip_ratio/low_mean`, `clip_ratio/high_mean`, `clip_ratio/region_mean`, and
      `kl` where kl_coef is not 0: means over the tokens of the mask, as sums and counts that add up over parts
      (`metrics.Mean`); `.value()` is the number, `metrics.finalize` those of a dictionary.

    Raises:
      ValueError: a coefficient is not 0, and what it multiplies is None.
    """
    chex.assert_rank([logprobs, mask], 2)
    given = (logprobs, mask, old_logprobs, ref_logprobs, entropies, correction, weights)
    chex.assert_equal_shape([x for x in given if x is not None])
    if kl_coef and ref_logprobs is None:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logprobs; pass them, or kl_coef=0.")
    if entropy_coef and entropies is None:
        raise ValueError(f"entropy_coef={entropy_coef} needs entropies; pass them, or entropy_coef=0.")
    chex.assert_shape(advantages, mask.shape if advantages.ndim == 2 else mask.shape[:1])
    advantages = advantages[:, None] if advantages.ndim == 1 else advantages
    weights = sequence_mean(mask) if weights is None else weights
    # Masked before any exp: inf * 0 is NaN, in values and in gradients.
    logprobs = jnp.where(mask, logprobs, 0)
    old = jax.lax.stop_gradient(logprobs) if old_logprobs is None else jnp.where(mask, old_logprobs, 0)
    log_ratio = jnp.clip(logprobs - old, -clamp, clamp) if clamp else logprobs - old
    terms, low, high = surrogate(level(log_ratio, mask), logprobs, advantages)
    terms = terms if correction is None else jnp.where(mask, correction, 0) * terms
    metrics = {
        "clip_ratio/low_mean": masked_mean(low, mask),
        "clip_ratio/high_mean": masked_mean(high, mask),
        "clip_ratio/region_mean": masked_mean(low | high, mask),
    }
    if kl_coef and ref_logprobs is not None:
        divergence = kl(logprobs, jnp.where(mask, ref_logprobs, 0))
        divergence = divergence * jnp.exp(log_ratio) if weighted_kl else divergence
        metrics["kl"] = masked_mean(divergence, mask)
        terms -= kl_coef * divergence
    if entropy_coef and entropies is not None:
        terms += entropy_coef * jnp.where(mask, entropies, 0)
    return -(weights * jnp.where(mask, terms, 0)).sum(), metrics


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

    `policy_loss` with the `clipped` surrogate, arguments and results as there. The first on-policy step prints a loss
    near 0: ratios are 1, and the advantages of a group sum to 0. The gradient is not 0.

    Args:
      logprobs: [B, T] float32, of the completion tokens under the policy.
      advantages: [B] or [B, T] float32.
      mask: [B, T] bool, the tokens that train.
      old_logprobs: [B, T], under the policy that is being improved upon; None: this is the first update.
      ref_logprobs: [B, T], under the frozen reference. Needed where kl_coef is not 0.
      weights: [B, T] float32, `sequence_mean(mask)` of the whole minibatch; None: of this mask.
      clip_low: epsilon below 1.
      clip_high: epsilon above 1.
      kl_coef: beta.

    Returns:
      The loss, [] float32, and metrics.

    Raises:
      ValueError: kl_coef is not 0 and ref_logprobs is None.
    """
    return policy_loss(
        logprobs, advantages, mask, surrogate=clipped(clip_low, clip_high), old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs, kl_coef=kl_coef, weights=weights,
    )  # fmt: skip


def dpo_loss(
    chosen: jax.Array, rejected: jax.Array, ref_chosen: jax.Array, ref_rejected: jax.Array, *, beta: float = 0.1
) -> tuple[jax.Array, Metrics]:
    r"""Direct preference optimization (arXiv 2305.18290, eq. 7), of log-probabilities of whole completions.

    .. math:: L = -\frac1n \sum_i \log\sigma\Big(\beta \log\frac{\pi_\theta(y_w)}{\pi_{ref}(y_w)}
              - \beta \log\frac{\pi_\theta(y_l)}{\pi_{ref}(y_l)}\Big)

    Args:
      chosen: [n] float32, summed over the tokens of the completion that is preferred, under the policy.
      rejected: [n] float32, of the other one.
      ref_chosen: [n] float32, under the reference.
      ref_rejected: [n] float32.
      beta: how strongly the reference holds.

    Returns:
      The loss, [] float32, and metrics: `accuracy`, where the margin is above 0, and `margin`, its mean.
    """
    chex.assert_equal_shape([chosen, rejected, ref_chosen, ref_rejected])
    chex.assert_rank(chosen, 1)
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    everywhere = jnp.ones(margin.shape, bool)
    metrics = {"accuracy": masked_mean(margin > 0, everywhere), "margin": masked_mean(margin, everywhere)}
    return -jax.nn.log_sigmoid(margin).mean(), metrics


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

r"""Rewards -> advantages: the baseline of GRPO is the group itself, so there is no critic.

An estimator is a baseline and a scale, `group_advantages(rewards, baseline=..., scale=...)`:

    GRPO (DeepSeekMath, arXiv 2402.03300)         group           group
    Dr. GRPO (arXiv 2503.20783)                   group           none
    RLOO (arXiv 2402.14740)                       leave_one_out   none
    REINFORCE++ with baseline (arXiv 2501.03262)  group           batch
    REINFORCE with a batch baseline               batch           none
    REINFORCE (Williams 1992)                     none            none

Without a scale, the expected gradient is the policy gradient for `leave_one_out` and `none`, (G - 1)/G of it
for `group`, and (B - 1)/B of it for `batch`, because a reward is part of its own baseline there. A group's
scale changes the direction too.
"""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import chex
import jax
import jax.numpy as jnp

__all__ = [
    "BASELINES",
    "SCALES",
    "Baseline",
    "Scale",
    "batch_mean",
    "batch_std",
    "combine_rewards",
    "constant_groups",
    "gae",
    "group_advantages",
    "group_mean",
    "group_std",
    "leave_one_out_mean",
    "no_baseline",
    "no_scale",
    "process_advantages",
    "whiten",
]

# (rewards [P, G], counted [P, G] bool or None: all) -> [P, G]
Baseline: TypeAlias = Callable[[jax.Array, jax.Array | None], jax.Array]
# (rewards [P, G], centered [P, G]: rewards minus baseline, counted, ddof=, epsilon=) -> divisor [P, 1] or [1, 1]
Scale: TypeAlias = Callable[..., jax.Array]


def _constant(x: jax.Array, counted: jax.Array | None, axis: int | None) -> jax.Array:
    """Whether all that counts is equal, or nothing does: then max <= min, and never where a NaN counts."""
    low, high = (x, x) if counted is None else (jnp.where(counted, x, jnp.inf), jnp.where(counted, x, -jnp.inf))
    return high.max(axis=axis, keepdims=True) <= low.min(axis=axis, keepdims=True)


def _needs_two(size: int, what: str) -> None:
    if size < 2:
        raise ValueError(
            f"{what} size {size}: an advantage relative to a {what} needs at least 2 members. Sample more, or take "
            "baseline and scale 'none'."
        )


def constant_groups(rewards: jax.Array, counted: jax.Array | None = None) -> jax.Array:
    """Which groups carry no signal: [P, G] -> [P] bool, true where all rewards of a group that count are equal.

    Of one reward, or of none, they are. `counted` is [P, G] bool; None: all count.
    """
    return _constant(rewards, counted, -1)[:, 0]


# Baselines. Where all that one averages is equal, a reward is its own baseline: its advantage is exactly 0,
# which floating point alone does not give, as the mean of equal numbers need not equal them. ------------------


def group_mean(rewards: jax.Array, counted: jax.Array | None = None) -> jax.Array:
    r""":math:`\mathrm{mean}(r)` over the group (DeepSeekMath, arXiv 2402.03300, section 4.1.2)."""
    _needs_two(rewards.shape[1], "group")
    mean = jnp.mean(rewards, axis=-1, keepdims=True, where=counted)
    return jnp.where(_constant(rewards, counted, -1), rewards, mean)


def leave_one_out_mean(rewards: jax.Array, counted: jax.Array | None = None) -> jax.Array:
    r""":math:`\frac{1}{G-1}\sum_{j \ne i} r_j` (RLOO, arXiv 2402.14740); of those that count."""
    _needs_two(rewards.shape[1], "group")
    counts = jnp.ones(rewards.shape, bool) if counted is None else counted
    own = jnp.where(counts, rewards, 0)
    others = counts.sum(axis=-1, keepdims=True) - counts
    mean = (own.sum(axis=-1, keepdims=True) - own) / jnp.maximum(others, 1)
    return jnp.where(_constant(rewards, counted, -1), rewards, mean)


def batch_mean(rewards: jax.Array, counted: jax.Array | None = None) -> jax.Array:
    r""":math:`\mathrm{mean}(r)` over all groups: one baseline for easy prompts and hard ones."""
    _needs_two(rewards.size, "batch")
    return jnp.where(_constant(rewards, counted, None), rewards, jnp.mean(rewards, keepdims=True, where=counted))


def no_baseline(rewards: jax.Array, counted: jax.Array | None = None) -> jax.Array:
    """0: REINFORCE."""
    del counted
    return jnp.zeros_like(rewards)


# Scales. Without spread there is nothing to divide by, and the divisor is infinite: advantages are 0, where a
# completion that does not count would get its deviation / epsilon. -------------------------------------------


def group_std(rewards: jax.Array, centered: jax.Array, counted: jax.Array | None, *, ddof: int, epsilon: float):
    r""":math:`\mathrm{std}(r) + \epsilon` over the group's rewards (DeepSeekMath, section 4.1.2)."""
    del centered
    _needs_two(rewards.shape[1], "group")
    std = jnp.std(rewards, axis=-1, ddof=ddof, keepdims=True, where=counted)
    return jnp.where(_constant(rewards, counted, -1), jnp.inf, std + epsilon)


def batch_std(rewards: jax.Array, centered: jax.Array, counted: jax.Array | None, *, ddof: int, epsilon: float):
    r""":math:`\mathrm{std}(r - b) + \epsilon` over all groups (REINFORCE++, arXiv 2501.03262).

    Of what is left after the baseline, so that advantages have deviation 1 whatever the baseline is. Lite PPO
    (arXiv 2508.08221) is implemented with the deviation of the rewards themselves, which counts how much
    prompts differ in difficulty too, and shrinks the advantages where they do.
    """
    del rewards
    _needs_two(centered.size, "batch")
    std = jnp.std(centered, ddof=ddof, keepdims=True, where=counted)
    return jnp.where(_constant(centered, counted, None), jnp.inf, std + epsilon)


def no_scale(rewards: jax.Array, centered: jax.Array, counted: jax.Array | None, *, ddof: int, epsilon: float):
    """1, and no epsilon: Dr. GRPO (arXiv 2503.20783)."""
    del centered, counted, ddof, epsilon
    return jnp.ones((1, 1), rewards.dtype)


BASELINES: Mapping[str, Baseline] = {
    "group": group_mean,
    "leave_one_out": leave_one_out_mean,
    "batch": batch_mean,
    "none": no_baseline,
}
SCALES: Mapping[str, Scale] = {"group": group_std, "batch": batch_std, "none": no_scale}


def group_advantages(
    rewards: jax.Array,
    *,
    baseline: Baseline = group_mean,
    scale: Scale = group_std,
    ddof: int = 1,
    epsilon: float = 1e-4,
    counted: jax.Array | None = None,
) -> jax.Array:
    r"""Rewards standardized within their group (DeepSeekMath, arXiv 2402.03300, section 4.1.2), or a variant.

    .. math:: \hat A_{i,t} = \tilde r_i = \frac{r_i - \mathrm{mean}(r)}{\mathrm{std}(r) + \epsilon}

    with another baseline in place of the mean, and another scale in place of the deviation. The paper names
    neither the kind of standard deviation nor epsilon; the defaults are those of its wide-spread
    implementation (sample deviation, 1e-4).

    Where the baseline is the group's, a group whose rewards are all equal gets advantages of exactly 0, and so
    does a group with fewer than two that count; likewise the batch, where the baseline is the batch's. A scale
    of what has no spread gives 0 too, with any baseline.

    Args:
      rewards: [P, G] float, the rewards of each prompt's group; G >= 2 where baseline or scale are the group's,
        P G >= 2 where they are the batch's.
      baseline: one of `BASELINES`, or another such function.
      scale: one of `SCALES`, or another such function; it adds epsilon itself.
      ddof: 1 divides the squared deviations by their number less 1, 0 by their number.
      epsilon: added to the standard deviation, in units of reward.
      counted: [P, G] bool, the completions that count in baseline and scale; None: all. The others are
        measured by the same baseline and scale, and may be NaN ("no reward"), which gives exactly 0. A NaN
        that counts makes NaN of all that it counts in.

    Returns:
      [P, G] float32. The same for every token of a completion (outcome supervision).

    Raises:
      ValueError: fewer members than baseline or scale need, ddof not 0 or 1, or counted of another shape.
    """
    chex.assert_rank(rewards, 2)
    if ddof not in (0, 1):
        raise ValueError(f"ddof={ddof} must be 0 (divide by the number of rewards) or 1 (by one less).")
    rewards = jnp.asarray(rewards, jnp.float32)
    if counted is not None:
        _same_shape("counted", counted, "rewards", rewards)
        chex.assert_type(counted, bool)
    centered = rewards - baseline(rewards, counted)
    advantages = centered / scale(rewards, centered, counted, ddof=ddof, epsilon=epsilon)
    return advantages if counted is None else jnp.where(jnp.isnan(rewards) & ~counted, 0, advantages)


def _same_shape(name: str, x: jax.Array, other_name: str, other: jax.Array) -> None:
    if x.shape != other.shape:
        raise ValueError(f"{name} has shape {x.shape}; expected {other.shape}, that of {other_name}: one value each.")


def combine_rewards(
    rewards: jax.Array, weights: jax.Array, *, each: Callable[..., jax.Array] | None = None
) -> jax.Array:
    r"""The weighted sum of K rewards, each normalized within its group before that if so wished.

    .. math:: r_i = \sum_{k:\ r_{k,i}\ \mathrm{applies}} w_k\, f(r_{k,i})

    with :math:`f` the identity (as `rewards.Scores.total` of what is known) or `each`. Summed first, rewards of
    different combinations collapse to the same advantage, and the one of the largest spread decides. GDPO (arXiv
    2601.05242) is `each=group_advantages`, and then the advantages of the sum over the batch:
    `group_advantages(combined, baseline=batch_mean, scale=batch_std)`.

    Args:
      rewards: [K, P, G] float, NaN where a reward does not apply: it adds nothing there.
      weights: [K] float.
      each: `(rewards [P, G], counted=[P, G] bool: where it applies) -> [P, G]`, such as `group_advantages`;
        None: as they are.

    Returns:
      [P, G] float32; 0 where no reward applies.

    Raises:
      ValueError: not one weight a reward.
    """
    chex.assert_rank([rewards, weights], [3, 1])
    if rewards.shape[0] != weights.shape[0]:
        raise ValueError(
            f"{weights.shape[0]} weights for {rewards.shape[0]} rewards, of shape {rewards.shape}: give one weight "
            "for each reward."
        )
    rewards, weights = jnp.asarray(rewards, jnp.float32), jnp.asarray(weights, jnp.float32)
    applies = ~jnp.isnan(rewards)
    if each is not None:
        rewards = jax.vmap(lambda r, counted: each(r, counted=counted))(rewards, applies)
    return (weights[:, None, None] * jnp.where(applies, rewards, 0)).sum(axis=0)


# Advantages of tokens ------------------------------------------------------------------------------------------


def process_advantages(
    step_rewards: jax.Array,
    mask: jax.Array,
    group_size: int,
    *,
    ddof: int = 1,
    epsilon: float = 1e-4,
    counted: jax.Array | None = None,
) -> jax.Array:
    r"""Process supervision (DeepSeekMath, arXiv 2402.03300, section 4.1.3).

    .. math::
       \tilde r_i^{(j)} = \frac{r_i^{(j)} - \mathrm{mean}(R)}{\mathrm{std}(R) + \epsilon}, \quad
       \hat A_{i,t} = \sum_{j:\ end(j) \ge t} \tilde r_i^{(j)}

    with R the rewards of all steps of all completions of the group: one with more steps weighs more in it. A
    group whose steps' rewards are all equal, or that has fewer than two, gets exactly 0.

    Args:
      step_rewards: [B, T] float, the reward of the step that ends at a token; NaN where none does.
      mask: [B, T] bool, the tokens of completions.
      group_size: G, at least 2; it divides B.
      ddof: as in `group_advantages`.
      epsilon: as in `group_advantages`.
      counted: [B] bool, the completions whose steps count in R; None: all. The others are measured by them.

    Returns:
      [B, T] float32; 0 behind a completion's last step, and where the mask is false.

    Raises:
      ValueError: G < 2 or no divisor of B, shapes that differ, or ddof not 0 or 1.
    """
    chex.assert_rank([step_rewards, mask], 2)
    _same_shape("mask", mask, "step_rewards", step_rewards)
    completions, columns = mask.shape
    if group_size < 2 or completions % group_size:
        raise ValueError(
            f"group_size={group_size}, step_rewards of shape {step_rewards.shape}: expected groups of 2 or more, and a "
            "multiple of that of completions."
        )
    group = lambda x: x.reshape(-1, group_size * columns)
    ends = ~jnp.isnan(step_rewards) & mask
    of_group = ends if counted is None else ends & counted[:, None]
    normalized = group_advantages(group(step_rewards), ddof=ddof, epsilon=epsilon, counted=group(of_group))
    ahead = jnp.cumsum(jnp.where(ends, normalized.reshape(mask.shape), 0)[:, ::-1], axis=1)[:, ::-1]
    return jnp.where(mask, ahead, 0)


def gae(
    rewards: jax.Array, values: jax.Array, mask: jax.Array, *, discount: float = 1.0, smoothing: float = 0.95
) -> tuple[jax.Array, jax.Array]:
    r"""Generalized advantage estimation (arXiv 1506.02438, eq. 16), for those who have a critic.

    .. math::
       \hat A_t = \sum_{l \ge 0} (\gamma\lambda)^l \delta_{t+l}, \quad \delta_t = r_t + \gamma V_{t+1} - V_t

    The value behind the last token of the mask is 0: the completion ends there. So it is for one that was cut
    at T, of which nobody knows the value behind the cut.

    Args:
      rewards: [B, T] float, of each token; a reward of the whole completion stands at its last token.
      values: [B, T] float, :math:`V_t` of what stands before token t.
      mask: [B, T] bool, true on a prefix; where it is false, rewards and values may be anything.
      discount: gamma, in [0, 1].
      smoothing: lambda, in [0, 1]: 1 is the return minus the value, 0 the error of one step.

    Returns:
      Advantages and returns (advantages + values, what the critic learns), [B, T] float32 each; 0 where the
      mask is false.

    Raises:
      ValueError: shapes that differ, or discount or smoothing not in [0, 1].
    """
    chex.assert_rank([rewards, values, mask], 2)
    _same_shape("values", values, "rewards", rewards)
    _same_shape("mask", mask, "rewards", rewards)
    if not (0 <= discount <= 1 and 0 <= smoothing <= 1):
        raise ValueError(f"discount={discount} and smoothing={smoothing} must be in [0, 1].")
    rewards, values = (jnp.where(mask, x, 0).astype(jnp.float32) for x in (rewards, values))
    errors = rewards + discount * jnp.pad(values[:, 1:], ((0, 0), (0, 1))) - values

    def backward(later, error):
        advantage = error + discount * smoothing * later
        return advantage, advantage

    _, advantages = jax.lax.scan(backward, jnp.zeros(rewards.shape[0]), errors.T, reverse=True)
    advantages = advantages.T  # 0 behind the mask, as rewards and values are
    return advantages, advantages + values


def whiten(
    advantages: jax.Array,
    mask: jax.Array,
    *,
    ddof: int = 0,
    epsilon: float = 1e-4,
    counted: jax.Array | None = None,
) -> jax.Array:
    r"""Advantages standardized over all tokens of the batch (REINFORCE++, arXiv 2501.03262).

    .. math:: \frac{A_{i,t} - \mathrm{mean}(A)}{\mathrm{std}(A) + \epsilon}

    A long completion weighs more than a short one in mean and deviation. Equal advantages become exactly 0.

    Args:
      advantages: [B, T] float; anything where the mask is false.
      mask: [B, T] bool. Of the whole batch: parts of it have other means.
      ddof: as in `group_advantages`.
      epsilon: added to the standard deviation.
      counted: [B] bool, the completions whose tokens count in mean and deviation; None: all.

    Returns:
      [B, T] float32; 0 where the mask is false.

    Raises:
      ValueError: shapes that differ, or B T < 2.
    """
    chex.assert_rank([advantages, mask], 2)
    _same_shape("mask", mask, "advantages", advantages)
    options = {"ddof": ddof, "epsilon": epsilon, "counted": mask if counted is None else mask & counted[:, None]}
    return jnp.where(mask, group_advantages(advantages, baseline=batch_mean, scale=batch_std, **options), 0)

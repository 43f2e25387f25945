"""Rewards of a group -> advantages: the baseline of GRPO is the group itself, so there is no critic."""

import chex
import jax
import jax.numpy as jnp

__all__ = ["constant_groups", "group_advantages"]


def constant_groups(rewards: jax.Array) -> jax.Array:
    """Which groups carry no signal: [P, G] -> [P] bool, true where all rewards of a group are equal."""
    return rewards.max(axis=-1) == rewards.min(axis=-1)


def group_advantages(rewards: jax.Array, *, ddof: int = 1, epsilon: float = 1e-4) -> jax.Array:
    r"""Rewards standardized within their group (DeepSeekMath, arXiv 2402.03300, section 4.1.2).

    .. math:: \hat A_{i,t} = \tilde r_i = \frac{r_i - \mathrm{mean}(r)}{\mathrm{std}(r) + \epsilon}

    The paper names neither the kind of standard deviation nor epsilon; the defaults are those of its
    wide-spread implementation (sample deviation, 1e-4). A group whose rewards are all equal gets
    advantages of exactly 0, which floating point alone does not give: the mean of equal numbers need
    not equal them, and 1e-8 / 1e-8 is not small.

    Args:
      rewards: [P, G] float, the rewards of each prompt's group; G >= 2.
      ddof: 1 divides the squared deviations by G - 1, 0 by G.
      epsilon: added to the standard deviation, in units of reward.

    Returns:
      [P, G] float32. The same for every token of a completion (outcome supervision).

    Raises:
      ValueError: G < 2, where every advantage would be 0; or ddof not 0 or 1.
    """
    chex.assert_rank(rewards, 2)
    if rewards.shape[1] < 2:
        raise ValueError(f"group size {rewards.shape[1]}: an advantage relative to a group needs at least 2 members.")
    if ddof not in (0, 1):
        raise ValueError(f"ddof={ddof} must be 0 (divide by G) or 1 (divide by G - 1).")
    rewards = rewards.astype(jnp.float32)
    mean = rewards.mean(axis=-1, keepdims=True)
    std = rewards.std(axis=-1, ddof=ddof, keepdims=True)
    return jnp.where(constant_groups(rewards)[:, None], 0.0, (rewards - mean) / (std + epsilon))

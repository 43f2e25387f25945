"""Named objectives: what the train step minimizes, each a composition of the pieces in `losses`."""

import dataclasses
import functools
from collections.abc import Callable

import jax

from grpo_jax import losses
from grpo_jax.metrics import Metrics

__all__ = ["LossConfig", "Objective", "grpo", "supervised"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Objective:
    """A loss on arrays, and what has to be computed for it. Static under jit."""

    # (logprobs, advantages, mask, *, old_logprobs, ref_logprobs, weights) -> (loss, metrics)
    loss: Callable[..., tuple[jax.Array, Metrics]]
    token_weights: Callable[[jax.Array], jax.Array]  # mask [b, T] of a whole minibatch -> weights
    needs_reference: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The objective of GRPO."""

    kl_coef: float = 0.04  # beta; 0: no reference is held and no reference pass runs
    clip_low: float = 0.2  # epsilon below a ratio of 1
    clip_high: float = 0.2  # epsilon above a ratio of 1

    def __post_init__(self) -> None:
        if self.kl_coef < 0:
            raise ValueError(f"kl_coef={self.kl_coef} must be 0 or more.")
        if not 0 < self.clip_low < 1 or self.clip_high <= 0:
            raise ValueError(f"clip_low={self.clip_low} must lie in (0, 1), clip_high={self.clip_high} above 0.")


def grpo(config: LossConfig = LossConfig()) -> Objective:
    """DeepSeekMath's GRPO with outcome supervision: `losses.grpo_loss`, mean per completion."""
    return Objective(
        loss=functools.partial(losses.grpo_loss, **dataclasses.asdict(config)),
        token_weights=losses.sequence_mean,
        needs_reference=config.kl_coef != 0,
    )


def supervised() -> Objective:
    """Maximum likelihood of the completions, mean per token; advantages are not looked at."""

    def loss(logprobs, advantages, mask, *, old_logprobs, ref_logprobs, weights):
        del advantages, old_logprobs, ref_logprobs
        return losses.supervised_loss(logprobs, mask, weights=weights)

    return Objective(loss=loss, token_weights=losses.token_mean)

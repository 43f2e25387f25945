"""The optimizers by name, and their state in the host's memory, where a device is to have room for other things."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from grpo_jax.types import PyTree

__all__ = ["HOST", "OptimizerConfig", "brought_over", "make_optimizer"]

_T = TypeVar("_T")
HOST = "pinned_host"  # memory of the host from which a device copies by itself, as JAX names it


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimizer with warm-up, a schedule, and clipping by global norm."""

    kind: str = "adamw"  # adamw, or adafactor, whose state is a small part of the model and not twice its size
    learning_rate: float = 1e-6  # at its peak
    warmup_steps: int = 10  # optimizer steps, linear from 0
    decay: str = "constant"  # after the warm-up: constant, linear or cosine to 0 at the end
    clip_norm: float = 1.0  # 0 = no clipping
    b1: float = 0.9  # decay of Adam's mean of gradients
    b2: float = 0.98  # decay of Adam's mean of squares
    epsilon: float = 1e-8  # in Adam's denominator
    weight_decay: float = 0.0  # a step, times the learning rate
    max_skipped: int = 5  # optimizer steps in a row that may be skipped, for NaN or inf; then the run stops
    offload: bool = False  # the state lies in the host's memory but for an update, which waits for it: GPUs and TPUs

    def __post_init__(self) -> None:
        if self.kind not in _SCALES:
            raise ValueError(f"kind={self.kind!r} must be one of {', '.join(_SCALES)}.")
        if self.decay not in ("constant", "linear", "cosine"):
            raise ValueError(f"decay={self.decay!r} must be 'constant', 'linear' or 'cosine'.")
        if self.learning_rate < 0 or self.clip_norm < 0 or self.warmup_steps < 0:
            raise ValueError(
                f"learning_rate={self.learning_rate}, clip_norm={self.clip_norm} and warmup_steps={self.warmup_steps} "
                "must be 0 or more."
            )
        if self.max_skipped < 1:
            raise ValueError(f"max_skipped={self.max_skipped} must be 1 or more.")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        idle = [f"{x}={getattr(self, x)}" for x in ("b1", "b2", "epsilon") if getattr(self, x) != defaults[x]]
        if self.kind != "adamw" and idle:
            raise ValueError(f"{', '.join(idle)}: of adamw alone, without effect on kind={self.kind!r}; leave it out.")


def _adafactor(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adafactor (Shazeer and Stern, arXiv 1804.04235), algorithms 4 and 5 without momentum.

    The mean of squares V of a matrix is R C / mean(R), of its means over columns, R, and over rows, C; its decay is
    1 - t^-0.8, and the root of the mean square of an update at most 1. As optax.adafactor, but that a step is not
    multiplied by the size of the parameter (the paper's relative steps), so that a learning rate means what it means
    in AdamW. A matrix is made of the two largest axes where both have 128 or more, in each layer of a stack by itself;
    leaves without keep all of V. An update is clipped by leaf: a stack of layers is one.
    """
    del config
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon)


_SCALES = {"adamw": _adam, "adafactor": _adafactor}  # what makes a direction of a gradient


def make_optimizer(config: OptimizerConfig, total_steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optax optimizer of a configuration, and its learning rate as a function of the optimizer step.

    Weights decay beside the direction and with the learning rate, as in AdamW (arXiv 1711.05101), whatever the kind.
    """
    peak, rest = config.learning_rate, max(total_steps - config.warmup_steps, 1)
    tails = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
    }
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps) if config.warmup_steps else tails[config.decay]()
    schedule = optax.join_schedules([warmup, tails[config.decay]()], [config.warmup_steps])
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    scale = optax.chain(
        _SCALES[config.kind](config),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
    return optax.chain(clip, scale), schedule


def brought_over(update: Callable[[PyTree], _T], opt_state: PyTree, where: PyTree, grads: PyTree) -> _T:
    """`update(opt_state)`, of a state that may lie in the host's memory: it comes for that, and goes back.

    Args:
      update: state -> a record with the new one as `opt_state`.
      opt_state: of any optimizer.
      where: its shardings.
      grads: which there are when it comes.

    Returns:
      What `update` makes; inside jit, where not all of the state lies on the devices.
    """
    if all(place.memory_kind != HOST for place in jax.tree.leaves(where)):
        return update(opt_state)
    near = jax.tree.map(lambda place: place.with_memory_kind("device"), where)

    def there_and_back(state: PyTree) -> _T:
        updated: Any = update(jax.device_put(state, near))
        return dataclasses.replace(updated, opt_state=jax.device_put(updated.opt_state, where))

    def never(state: PyTree) -> _T:
        nothing: Any = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(there_and_back, state))
        return dataclasses.replace(nothing, opt_state=state)

    # Always so, which the compiler does not know: else it fetches the state when a step begins, and activations have to
    # find room beside it. (An optimization barrier does not keep it from that.)
    return jax.lax.cond(optax.tree.norm(grads) != -1, there_and_back, never, opt_state)

"""The optimizers by name, and their state in the host's memory, where a device is to have room for other things."""

import dataclasses
from typing import Any

import jax
import optax

from grpo_jax.types import PyTree

__all__ = ["HOST", "OptimizerConfig", "brought_over", "make_optimizer"]

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
    offload: bool = False  # the state lies in the host's memory but for an update, which waits for it: GPUs and TPUs

    def __post_init__(self) -> None:
        if self.kind not in _SCALES:
            raise ValueError(f"kind={self.kind!r} must be one of {', '.join(_SCALES)}.")
        if self.decay not in ("constant", "linear", "cosine"):
            raise ValueError(f"decay={self.decay!r} must be 'constant', 'linear' or 'cosine'.")
        if self.learning_rate < 0 or self.clip_norm < 0 or self.warmup_steps < 0:
            raise ValueError(f"{self}: learning_rate, clip_norm and warmup_steps must be 0 or more.")
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


def brought_over(optimizer: optax.GradientTransformation, where: PyTree) -> optax.GradientTransformation:
    """The optimizer, with a state that may lie in the host's memory: it comes for an update, and goes back.

    Args:
      optimizer: any.
      where: shardings of its state.

    Returns:
      The optimizer itself where all of its state lies on the devices; else one for use inside jit.
    """
    if all(place.memory_kind != HOST for place in jax.tree.leaves(where)):
        return optimizer
    near = jax.tree.map(lambda place: place.with_memory_kind("device"), where)

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> Any:
        def there_and_back(state):
            directions, state = optimizer.update(updates, jax.device_put(state, near), params)
            return directions, jax.device_put(state, where)

        # Always so, which the compiler does not know: else it fetches the state when a step begins, and activations
        # have to find room beside it. (An optimization barrier does not keep it from that.)
        is_there = optax.tree.norm(updates) != -1
        return jax.lax.cond(is_there, there_and_back, lambda state: (updates, state), state)

    return optax.GradientTransformation(optimizer.init, update)

"""A phase of a run: the state and the train step of its configuration, and the loop from there to its end."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from experiments import runs
from grpo_jax import loop, objectives, optimizers, training
from grpo_jax.checkpoints import CheckpointConfig, Checkpoints
from grpo_jax.compiling import Lowering, compile_all
from grpo_jax.debugging import naming_nans
from grpo_jax.demonstrations import Demonstrations
from grpo_jax.evaluation import Evaluator
from grpo_jax.models import lora as lora_lib
from grpo_jax.models import peft
from grpo_jax.models.lora import LoraConfig
from grpo_jax.models.transformer import TransformerConfig
from grpo_jax.rollouts import GroupRollouts
from grpo_jax.screen import say
from grpo_jax.storage import Path
from grpo_jax.types import Policy, Surplus, TrainState

__all__ = ["optimizer_of", "phase", "restored"]


def phase(
    params: Callable[[], Any], *, policy: Policy, model: TransformerConfig, mesh: Mesh, key: jax.Array,
    objective: objectives.Objective, experience: Any, workdir: Path, title: str,
    optimizer: optimizers.OptimizerConfig, update: training.UpdateConfig, steps: int, checkpoints: CheckpointConfig,
    surplus: Surplus | None = None, make_step: Callable[..., Any] | None = None, lora: LoraConfig = LoraConfig(),
    debug_nans: bool = False,
    **options: Any,
) -> tuple[TrainState, list[dict[str, Any]]]:  # fmt: skip
    """One phase of a run: `loop.train` from what `params()` gives, and lets go of it.

    `make_step`: (optimizer, like=, clip_norm=) -> train step; None: `training.make_train_step`, of the objective.
    `debug_nans`: stop where the first NaN is made, and say where that is.
    Where there is a checkpoint to go on from, nobody asks for the parameters: a model's directory may be gone.
    `lora`: adapters that train beside them; `policy` is `lora.adapted_policy`'s then.
    """
    transformation, schedule = optimizers.make_optimizer(optimizer, steps * update.epochs * update.minibatches)
    saved = runs.saved_step(workdir)
    if saved is not None:
        shapes, _ = lora_lib.abstract(model, lora)
        state = training.abstract_train_state(
            policy, shapes, transformation, objective, mesh, surplus, optimizer.offload
        )
    else:
        adapted = _adapted(params, model, lora, mesh, jax.random.fold_in(key, 2))
        state = training.init_train_state(policy, adapted, transformation, objective, mesh, surplus, optimizer.offload)
        del adapted
    if make_step is None:
        key = jax.random.fold_in(key, 1)
        make_step = lambda transformation, **made: training.make_train_step(
            policy, transformation, objective, update, key=key, **made
        )
    step = make_step(transformation, like=state, clip_norm=optimizer.clip_norm)
    step = naming_nans(step) if debug_nans else step
    if (saved or 0) < steps:  # else nothing is left to run
        say(f"{title}: compiling, half a minute or more until the first step, for which Ctrl-C may wait")
        compile_all(_lowerings(state, step, experience, options.get("evaluator")))
    return loop.train(
        state, train_step=step, experience=experience, steps=steps,
        workdir=workdir, title=title, learning_rate=schedule, checkpoints=checkpoints,
        max_skipped=optimizer.max_skipped, **options,
    )  # fmt: skip


def _adapted(params: Callable[[], Any], model: TransformerConfig, lora: LoraConfig, mesh: Mesh, key: jax.Array) -> Any:
    """Parameters, with adapters where there are to be some: as they begin, or as PEFT saved them."""
    if not lora.rank:
        return params()
    if lora.adapter:
        adapters = peft.load(lora.adapter, model, lora, mesh)
    else:
        adapters = lora_lib.init_adapters(model, lora, key, mesh)
    return lora_lib.adapted(params(), adapters, lora)


def _lowerings(state: TrainState, step: Any, experience: Any, evaluator: Any) -> list[Lowering]:
    """The programs of a loop that are known before they run: one that the loop came to, it would wait for alone."""
    of_evaluation = evaluator.lowerings(state.params) if isinstance(evaluator, Evaluator) else []
    # A train step of another kind may not be jitted.
    known = isinstance(experience, GroupRollouts | Demonstrations) and hasattr(step, "lower")
    return of_evaluation + (experience.lowerings(state, step) if known else [])


def optimizer_of(saved: Mapping[str, Any]) -> optimizers.OptimizerConfig:
    """What says how the state of a saved configuration's optimizer looks, and no more: each experiment has defaults."""
    return optimizers.OptimizerConfig(kind=saved["optimizer"].get("kind", "adamw"))


def restored(
    workdir: Path, step: int | None, *, policy: Policy, model: TransformerConfig, mesh: Mesh,
    optimizer: optimizers.OptimizerConfig, objective: objectives.Objective, surplus: Surplus | None = None,
    lora: LoraConfig = LoraConfig(),
) -> TrainState:  # fmt: skip
    """The state of a checkpoint, the latest where no step is named; whoever writes there is left alone.

    All of it lies on the devices, also that of an optimizer whose state did not: they need not be those of the run.

    Raises:
      ValueError: there is no such checkpoint, or it is of another model, optimizer or objective.
    """
    transformation, _ = optimizers.make_optimizer(optimizer, 1)
    shapes, _ = lora_lib.abstract(model, lora)
    like = training.abstract_train_state(policy, shapes, transformation, objective, mesh, surplus)
    return Checkpoints(workdir / "checkpoints", read_only=True).restore(like, step)

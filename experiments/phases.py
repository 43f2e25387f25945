"""A phase of a run: the state and the train step of its configuration, and the loop from there to its end."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from experiments import runs
from grpo_jax import loop, objectives, training
from grpo_jax.checkpoints import CheckpointConfig, Checkpoints
from grpo_jax.models.transformer import TransformerConfig, abstract_params
from grpo_jax.types import Policy, Surplus, TrainState

__all__ = ["optimizer_of", "phase", "restored"]


def phase(
    params: Callable[[], Any], *, policy: Policy, model: TransformerConfig, mesh: Mesh, key: jax.Array,
    objective: objectives.Objective, experience: Any, workdir: pathlib.Path, title: str,
    optimizer: training.OptimizerConfig, update: training.UpdateConfig, steps: int, checkpoints: CheckpointConfig,
    surplus: Surplus | None = None, make_step: Callable[..., Any] | None = None, **options: Any,
) -> tuple[TrainState, list[dict[str, Any]]]:  # fmt: skip
    """One phase of a run: `loop.train` from what `params()` gives, and lets go of it.

    `make_step`: (optimizer, like=, clip_norm=) -> train step; None: `training.make_train_step`, of the objective.
    Where there is a checkpoint to go on from, nobody asks for the parameters: a model's directory may be gone.
    """
    transformation, schedule = training.make_optimizer(optimizer, steps * update.epochs * update.minibatches)
    if runs.begun(workdir):
        state = training.abstract_train_state(
            policy, abstract_params(model)[0], transformation, objective, mesh, surplus, optimizer.offload
        )
    else:
        state = training.init_train_state(policy, params(), transformation, objective, mesh, surplus, optimizer.offload)
    if make_step is None:
        key = jax.random.fold_in(key, 1)
        make_step = lambda transformation, **made: training.make_train_step(
            policy, transformation, objective, update, key=key, **made
        )
    step = make_step(transformation, like=state, clip_norm=optimizer.clip_norm)
    return loop.train(
        state, train_step=step, experience=experience, steps=steps, workdir=workdir, title=title,
        learning_rate=schedule, checkpoints=checkpoints, **options,
    )  # fmt: skip


def optimizer_of(saved: Mapping[str, Any]) -> training.OptimizerConfig:
    """What says how the state of a saved configuration's optimizer looks, and no more: each experiment has defaults."""
    return training.OptimizerConfig(kind=saved["optimizer"].get("kind", "adamw"))


def restored(
    workdir: pathlib.Path, step: int | None, *, policy: Policy, model: TransformerConfig, mesh: Mesh,
    optimizer: training.OptimizerConfig, objective: objectives.Objective, surplus: Surplus | None = None,
) -> TrainState:  # fmt: skip
    """The state of a checkpoint, the latest where no step is named; whoever writes there is left alone.

    All of it lies on the devices, also that of an optimizer whose state did not: they need not be those of the run.

    Raises:
      ValueError: there is no such checkpoint, or it is of another model, optimizer or objective.
    """
    transformation, _ = training.make_optimizer(optimizer, 1)
    like = training.abstract_train_state(policy, abstract_params(model)[0], transformation, objective, mesh, surplus)
    return Checkpoints(workdir / "checkpoints", read_only=True).restore(like, step)

"""Checkpoints with Orbax: written in the background, atomic, the latest few and the best kept."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from grpo_jax.telemetry import WorkdirError
from grpo_jax.types import TrainState

__all__ = ["CheckpointConfig", "Checkpoints"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and what to keep."""

    every: int = 50  # steps between checkpoints
    keep_latest: int = 2  # how many of the newest to keep
    keep_best: int = 1  # how many of the best to keep, by held-out accuracy

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep_latest < 1 or self.keep_best < 0:
            raise ValueError(f"{self}: every and keep_latest must be 1 or more, keep_best 0 or more.")


class Checkpoints:
    """The checkpoints of one run, by step."""

    def __init__(
        self, directory: pathlib.Path, config: CheckpointConfig = CheckpointConfig(), *, read_only: bool = False
    ):
        """`read_only`: leave alone what another process may be writing there."""
        policies = ocp.training.preservation_policies
        kept: list[Any] = [policies.LatestN(config.keep_latest)]
        if config.keep_best:
            kept.append(
                policies.BestN(get_metric_fn=_metric, n=config.keep_best, keep_checkpoints_without_metrics=False)
            )
        checkpointer: Any = ocp.training.Checkpointer  # its annotations are narrower than what it takes
        self._checkpointer = checkpointer(
            directory.absolute(),
            cleanup_tmp_directories=not read_only,
            preservation_policy=policies.AnyPreservationPolicy(kept),
        )

    @property
    def steps(self) -> list[int]:
        """The steps there are, in order."""
        return sorted(c.step for c in self._checkpointer.checkpoints)

    @property
    def best(self) -> int | None:
        """The step with the highest metric, None where none was measured."""
        measured = [c for c in self._checkpointer.checkpoints if _metric(c.metrics) > -1e30]
        return max(measured, key=lambda c: (_metric(c.metrics), c.step)).step if measured else None

    def save(self, state: TrainState, metric: float | None = None) -> None:
        """Copies the state off the devices and writes it in the background; a step there already is left alone."""
        step = int(state.step)
        if step in self.steps:
            return
        metrics = {} if metric is None else {"metric": metric}
        with self._explained():
            self._checkpointer.save_checkpointables_async(
                step, {"state": state}, metrics=metrics, custom_metadata=_shapes(state), force=True
            )

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """The state at a step (None: the latest), bit-equal, laid out as `like`, which may be on another mesh.

        Raises:
          ValueError: there is no such step, or it holds a model of another shape.
        """
        if not self.steps or (step is not None and step not in self.steps):
            which = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            raise ValueError(f"{which} in {self._checkpointer.directory}; there are {self.steps}.")
        step = self.steps[-1] if step is None else step
        saved = self._checkpointer.checkpointables_metadata(step).custom_metadata
        wanted = _shapes(like)
        wrong = [
            f"{k}: saved {saved.get(k)}, expected {wanted.get(k)}"
            for k in {**saved, **wanted}
            if saved.get(k) != wanted.get(k)
        ]
        if wrong:
            raise ValueError(
                f"checkpoint {step} in {self._checkpointer.directory} is of another model, optimizer or objective:\n  "
                + "\n  ".join(wrong[:10])
            )
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        return self._checkpointer.load_checkpointables(step, {"state": abstract})["state"]

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
          WorkdirError: it could not be written.
        """
        with self._explained():
            self._checkpointer.wait()

    def close(self) -> None:
        """Waits as `wait` does, and lets go of the directory."""
        with self._explained():
            self._checkpointer.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a full disk is an OSError here and a ValueError there, from a thread of Orbax
            raise WorkdirError(
                f"cannot write a checkpoint in {self._checkpointer.directory}: {error}\nThose already saved, of steps "
                f"{self.steps}, are intact: mend this and run the same command again to continue."
            ) from error


def _metric(metrics: Any) -> float:
    return float((metrics or {}).get("metric", -1e30))  # BestN keeps the largest


def _shapes(state: TrainState) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}" for path, x in leaves}

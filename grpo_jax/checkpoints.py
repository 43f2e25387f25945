"""Checkpoints with Orbax: written in the background, atomic, the latest few and the best kept.

Each holds a fingerprint of every array, and is taken only where it is what was saved; else the one before it is, and
the bad one is set aside in `checkpoints_bad/`, never deleted.
"""

import contextlib
import dataclasses
import json
import logging
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from grpo_jax import hosts, storage
from grpo_jax.fingerprints import fingerprints
from grpo_jax.storage import Path
from grpo_jax.telemetry import WorkdirError
from grpo_jax.types import TrainState

__all__ = ["PATIENCE", "CheckpointConfig", "CheckpointError", "Checkpoints"]

PATIENCE = 1200  # seconds that a save may take


class CheckpointError(WorkdirError, ValueError):
    """There is no such checkpoint, none that is good, or it is of another shape."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and what to keep."""

    every: int = 50  # steps between checkpoints
    keep_latest: int = 2  # how many of the newest to keep
    keep_best: int = 1  # how many of the best to keep, by held-out accuracy

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep_latest < 1 or self.keep_best < 0:
            raise ValueError(
                f"every={self.every} and keep_latest={self.keep_latest} must be 1 or more, "
                f"keep_best={self.keep_best} 0 or more."
            )


class _Bad(Exception):
    """A checkpoint that cannot be read, or is not what was saved."""


class Checkpoints:
    """The checkpoints of one run, by step."""

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig = CheckpointConfig(),
        *,
        read_only: bool = False,
        say: Callable[[str], None] = print,
    ):
        """Opens the directory.

        Args:
          directory: where they are.
          config: what to keep.
          read_only: leave alone what another process may be writing there.
          say: gets a line for each that is set aside.

        Raises:
          WorkdirError: the directory cannot be written.
        """
        policies = ocp.training.preservation_policies
        kept: list[Any] = [policies.LatestN(config.keep_latest)]
        if config.keep_best:
            kept.append(
                policies.BestN(get_metric_fn=_metric, n=config.keep_best, keep_checkpoints_without_metrics=False)
            )
        self._directory, self._say = directory if storage.is_remote(directory) else directory.absolute(), say
        self._failed = False  # something could not be written
        self._checkpointer: Any = None  # where nothing is written; it would read metrics, which may be bad
        if read_only:
            return
        self._make_ready()
        checkpointer: Any = ocp.training.Checkpointer  # its annotations are narrower than what it takes
        with _quiet():
            self._checkpointer = checkpointer(
                self._directory, preservation_policy=policies.AnyPreservationPolicy(kept), cleanup_tmp_directories=True
            )

    def _make_ready(self) -> None:
        """Of all processes: makes the directory, and sets aside metrics that cannot be read, for Orbax."""

        def mend() -> None:
            try:
                self._mend()
            except OSError as error:
                why = f"cannot write checkpoints in {self._directory}: {error}. Mend this first."
                raise WorkdirError(why) from error

        hosts.first_does(mend, kind=WorkdirError)

    def _mend(self) -> None:
        storage.make_directory(self._directory)
        if storage.is_remote(self._directory):
            self._remove_rests()
        for path in self._directory.glob("*/metrics/metrics"):
            try:
                json.loads(path.read_text())
            except ValueError as error:
                where = self._set_aside(path.parent, f"{path.parent.parent.name}.metrics")
                self._say(f"the metric of checkpoint {path.parent.parent.name} is lost ({error}): set aside in {where}")

    def _remove_rests(self) -> None:
        """What a kill left of a checkpoint in a store: Orbax would do it beside us, who may write that step anew."""
        whole = self._whole()
        with contextlib.suppress(FileNotFoundError):
            for path in list(self._directory.iterdir()):
                if path.name.isdecimal() and int(path.name) not in whole:
                    storage.remove_tree(path)

    def _whole(self) -> list[int]:
        """The steps that are there, as files say it."""
        # Where nothing can be renamed, Orbax writes a file last, which says that all is there.
        pattern = "*/commit_success.txt" if storage.is_remote(self._directory) else "*/"
        found = (path.relative_to(self._directory).parts[0] for path in self._directory.glob(pattern))
        return sorted(int(name) for name in found if name.isdecimal())

    def _set_aside(self, what: Path, name: str) -> Path:
        place = self._directory.with_name(f"{self._directory.name}_bad")
        storage.make_directory(place)
        names = (name if i == 0 else f"{name}.{i}" for i in range(10**6))
        target = next(place / name for name in names if not (place / name).exists())
        storage.move(what, target)
        return target

    @property
    def steps(self) -> list[int]:
        """The steps there are, in order."""
        if self._checkpointer is None:
            return self._whole()
        return sorted(c.step for c in self._checkpointer.checkpoints)

    def prepare(self, state: TrainState) -> None:
        """Compiles what `save` asks of a state, so that no checkpoint waits for it."""
        fingerprints(state)

    def save(self, state: TrainState, metric: float | None = None, patience: int = PATIENCE) -> None:
        """Copies the state off the devices and writes it in the background; a step there already is left alone.

        Args:
          state: to be saved.
          metric: held-out accuracy, by which the best are kept; None: not measured.
          patience: seconds that it may take. Where one of several processes cannot write its part, all hear of it when
            they are over.
        """
        step = int(state.step)
        if step in self.steps:
            return
        metrics = {} if metric is None else {"metric": metric}
        described = _sealed({"shapes": _shapes(state), "fingerprints": fingerprints(state)})
        # Where Orbax cannot make its directories in the background, threads wait for them for 20 minutes, and with them
        # the end of the process.
        at_once = ocp.Context()
        at_once.asynchronous.create_directories_asynchronously = False
        at_once.asynchronous.timeout_secs = patience
        with self._explained(), at_once:
            self._checkpointer.save_checkpointables_async(
                step, {"state": state}, metrics=metrics, custom_metadata=described, force=True
            )

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """The state at a step, bit-equal to what was saved, laid out as `like`, which may be on another mesh.

        None: the latest that is good. Those after it are set aside, unless this is `read_only`.

        Raises:
          CheckpointError: there is no such step, it holds a model of another shape, or none is good.
        """
        if not self.steps or (step is not None and step not in self.steps):
            which = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            raise CheckpointError(f"{which} in {self._directory}; there are {self.steps or 'none'}.")
        bad: dict[int, _Bad] = {}
        for candidate in reversed(self.steps) if step is None else [step]:
            try:
                state = self._read(like, candidate)
            except _Bad as error:
                bad[candidate] = error
                continue
            for of, error in bad.items():
                self._leave_behind(of, error, candidate)
            if bad and self._checkpointer is not None:
                self._checkpointer.reload()
            return state
        reasons = "".join(f"\n  step {of}: {error}" for of, error in bad.items())
        raise CheckpointError(
            f"no checkpoint in {self._directory} can be read, and nothing was changed there:{reasons}\n"
            "Bring one back from a copy, or choose another --workdir to start anew."
            if step is None
            else f"checkpoint {step} in {self._directory} cannot be read: {bad[step]}. There are {self.steps}."
        )

    def _leave_behind(self, step: int, error: _Bad, instead: int) -> None:
        """Of all processes: sets a bad checkpoint aside, and says so."""
        where = "left where it is"
        if self._checkpointer is not None:
            if hosts.is_first():
                where = f"set aside in {self._set_aside(self._directory / str(step), str(step))}"
            hosts.agreed(True)  # the others look at the directory afterwards
        if hosts.is_first():
            self._say(f"checkpoint {step} is bad ({error}): {where}; taking that of step {instead}.")

    def _read(self, like: TrainState, step: int) -> TrainState:
        """Of all processes: the state of a step.

        Raises:
          _Bad: one of them cannot read it, or it is not what was saved.
          CheckpointError: it is of another shape.
        """
        place: Any = self._directory / str(step)  # Orbax's annotations are narrower than what it takes
        # What one process cannot read is bad for all: they would go on from different steps.
        described = self._of_all(lambda: _unsealed(ocp.checkpointables_metadata(str(place)).custom_metadata))
        saved, wanted = described["shapes"], _shapes(like)
        wrong = [
            f"{k}: saved {saved.get(k)}, expected {wanted.get(k)}"
            for k in {**saved, **wanted}
            if saved.get(k) != wanted.get(k)
        ]
        if wrong:
            raise CheckpointError(
                f"checkpoint {step} in {self._directory} is of another model, optimizer or objective:\n  "
                + "\n  ".join(wrong[:10])
            )
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        state = self._of_all(lambda: ocp.load_checkpointables(str(place), {"state": abstract})["state"])
        found = fingerprints(state)
        differ = [name for name, value in described["fingerprints"].items() if found[name] != value]
        if differ:
            raise _Bad(f"{len(differ)} of {len(found)} arrays are not what was saved, {differ[0]} for one")
        return state

    def _of_all(self, read: Callable[[], Any]) -> Any:
        """What `read` gives, where it does on every process; _Bad where it does not on one."""
        found, reason = None, "another process cannot read it"
        try:
            with _quiet():
                found = read()
        except (MemoryError, jax.errors.JaxRuntimeError):  # not the checkpoint's fault
            raise
        except Exception as error:  # of Orbax, TensorStore and JSON: what a damaged file makes of them
            reason = _first_line(error)
        if hosts.agreed(found is None):
            raise _Bad(reason)
        return found

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
          WorkdirError: it could not be written.
        """
        with self._explained():
            self._checkpointer.wait()

    def close(self) -> None:
        """Waits as `wait` does, and lets go of the directory; what a failed save leaves is not said again.

        Raises:
          WorkdirError: as `wait`, unless something has raised that before.
        """
        said = [WorkdirError] if self._failed else []  # or it would stand in the place of what has ended the run
        with contextlib.suppress(*said), self._explained():
            self._checkpointer.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a full disk is an OSError here and a ValueError there, from a thread of Orbax
            self._failed = True
            raise WorkdirError(
                f"cannot write a checkpoint in {self._directory}: {error}\nThose already saved, of steps "
                f"{self.steps}, are intact: mend this and run the same command again to continue."
            ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the pages that Orbax logs about a damaged file: we say what it comes to, in a line."""
    logger, nothing = logging.getLogger("absl"), lambda record: record.levelno >= logging.CRITICAL
    logger.addFilter(nothing)
    try:
        yield
    finally:
        logger.removeFilter(nothing)


def _first_line(error: BaseException) -> str:
    """The innermost reason in a line: what Orbax raises says little, and what it was raised from much."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].partition(" [tensorstore_spec=")[0][:300]


def _sealed(described: dict[str, Any]) -> dict[str, Any]:
    """With a checksum, so that damage to it is not taken for another model."""
    text = json.dumps(described)
    return {"described": text, "checksum": zlib.crc32(text.encode())}


def _unsealed(metadata: Any) -> dict[str, Any]:
    """What `_sealed` was given.

    Raises:
      ValueError: it is damaged, or gone.
    """
    text = (metadata or {}).get("described")
    if not isinstance(text, str) or zlib.crc32(text.encode()) != (metadata or {}).get("checksum"):
        raise ValueError("its description is damaged, gone, or of another version of grpo_jax")
    return json.loads(text)


def _metric(metrics: Any) -> float:
    return float((metrics or {}).get("metric", -1e30))  # BestN keeps the largest


def _shapes(state: TrainState) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}" for path, x in leaves}

"""What a run says of itself, and the files that hold it.

Metric names are those that TRL users know. Names under `time/` are measured and differ from run to run;
all others are the same bits whenever a run is repeated or resumed.

`time/step_seconds` is from the end of one update to the end of the next, without evaluations, and the sum of five:
`rollout` (prompts, sampling, the completions on the host), `reward`, `reference` (they run beside each other: what was
left of its pass when the rewards were there; on a GPU, which holds whoever asks for it, `reward` is what was left of
those), `update` (the old policy's pass included) and `other` (advantages; logs, checkpoint and profile of the step
before). A rollout that is cut to the memory is scored wave by wave while the next is sampled, and `reward` is what was
left of that.
`time/rewards/NAME/p50_seconds`, `p95_seconds` and `max_seconds` are of the completions of a step: what one took, where
the function says so (`rewards.Judged`), else its whole call. A step whose rewards were read from the journal has none.
`time/elapsed_seconds` is the sum of all steps so far; `time/evaluation_seconds` stands where there was one.
"""

import contextlib
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from grpo_jax import storage
from grpo_jax.jsonl import JsonLines, OtherRunError, open_lines, read_jsonl
from grpo_jax.storage import Path

__all__ = ["RewardJournal", "RunLog", "WorkdirError", "read_jsonl", "write_atomically"]

Metrics = Mapping[str, float]


class WorkdirError(RuntimeError):
    """The workdir cannot be used: unwritable, full, another run's, or of another configuration."""


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OtherRunError as error:
        raise WorkdirError(str(error)) from error
    except OSError as error:
        raise WorkdirError(
            f"cannot write {path}: {error.strerror or error}. Checkpoints already saved are intact: mend this (free "
            "space, permissions) and run the same command again to continue, or choose another --workdir."
        ) from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a whole file or none of it.

    Raises:
      WorkdirError: it cannot be written.
    """
    with _explained(path):
        storage.write(path, content.encode() if isinstance(content, str) else content)


class _Lines:
    """JSON lines of a workdir, whose errors say what is safe."""

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], bool]):
        """Opens them, and drops those for which `keep` is false."""
        self._path = path
        with _explained(path):
            self._lines: JsonLines = open_lines(path, keep)
        self.rows = self._lines.rows

    def append(self, row: Mapping[str, Any], durable: bool = False) -> None:
        with _explained(self._path):
            self._lines.append(row, durable)

    def flush(self) -> None:
        with _explained(self._path):
            self._lines.flush()

    def close(self) -> None:
        with _explained(self._path):
            self._lines.close()


class RewardJournal:
    """Rewards by step, on disk before they are used: a replayed step reads what the world said the first time.

    `rewards.jsonl`: one line a wave of a step, `{"step", "wave", "digest", "scores"}`, and `"failed"` where judges came
    to no verdict: by name, the indices of the completions. The digest is of the completions; a replay that sampled
    others (another machine, another layout) is scored anew, with a line on the screen. Each process journals its own
    completions: all but the first in `rewards.PROCESS.jsonl`.
    """

    def __init__(self, workdir: Path, say: Callable[[str], None] = print, process: int = 0):
        """`process`: of several, whose completions these are, from 0."""
        name = f"rewards.{process}.jsonl" if process else "rewards.jsonl"
        self._lines = _Lines(workdir / name, keep=lambda row: True)
        self._recorded = {(row["step"], row.get("wave", 0)): row for row in self._lines.rows}
        self._say = say

    def knows(self, step: int, wave: int) -> bool:
        """Whether there is a record, of these completions or others."""
        return (step, wave) in self._recorded

    def read(self, step: int, wave: int, digest: str) -> Mapping[str, Any] | None:
        """The record of these completions at this step, or None."""
        row = self._recorded.get((step, wave))
        if row is None:
            return None
        if row["digest"] != digest:
            self._say(f"step {step}: the replay sampled other completions than the journal knows; scoring them anew.")
            return None
        return {name: value for name, value in row.items() if name not in ("step", "wave", "digest")}

    def write(self, step: int, wave: int, digest: str, record: Mapping[str, Any]) -> None:
        """Returns when the record, `Scores.record`, is on disk."""
        self._lines.append({"step": step, "wave": wave, "digest": digest, **record}, durable=True)

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()


class _Board:
    """A TensorBoard event file, written when it is told to; for a store, on disk until `save`.

    tensorboardX's own SummaryWriter leaves that to a thread that waits by the wall clock: after a jump back it writes
    nothing for as long as that. The times in the file count on from the start, whatever the clock does.
    """

    def __init__(self, directory: Path):
        """In place of all event files that are there."""
        from tensorboardX import event_file_writer, summary  # imports protobuf: half a second
        from tensorboardX.proto import event_pb2

        stale = list(directory.glob("events.out.tfevents.*"))
        self._target: Path | None = None
        if storage.is_remote(directory):
            storage.remove(stale)
            self._target, self._scratch = directory, tempfile.TemporaryDirectory(prefix="grpo_jax_tensorboard_")
            directory = pathlib.Path(self._scratch.name)
        else:
            for file in stale:
                file.unlink()
            directory.mkdir(exist_ok=True)
        generated: Any = event_pb2  # protobuf makes its names at run time
        self._directory, self._summary, self._event = pathlib.Path(directory), summary, generated.Event
        self._file = event_file_writer.EventsWriter(str(directory / "events"))
        self._began = time.time() - time.perf_counter()

    def write(self, row: Mapping[str, Any]) -> None:
        now = self._began + time.perf_counter()
        for name, value in row.items():
            if name != "step":
                scalar = self._summary.scalar(name, value)
                self._file.write_event(self._event(wall_time=now, step=row["step"], summary=scalar))

    def flush(self) -> None:
        self._file.flush()

    def save(self) -> None:
        """Copies the whole file, as it was flushed, into the store, if it is to be there."""
        if self._target is not None:
            storage.upload(self._directory, self._target)

    def close(self) -> None:
        self._file.close()
        self.save()


class RunLog:
    """`metrics.jsonl`, `samples.jsonl` and TensorBoard event files of one run, cut back to a step."""

    def __init__(self, workdir: Path, step: int, *, write: bool = True):
        """Opens the logs and drops everything after `step`, which is where the run goes on from.

        `write`: false where another process writes them, and this one only keeps `rows`.
        """
        self._writes = write
        if not write:
            self._rows = [row for row in read_jsonl(workdir / "metrics.jsonl") if row["step"] <= step]
            return
        self._metrics = _Lines(workdir / "metrics.jsonl", keep=lambda row: row["step"] <= step)
        self._samples = _Lines(workdir / "samples.jsonl", keep=lambda row: row["step"] <= step)
        self._place = workdir / "tensorboard"
        with _explained(self._place):
            self._board = _Board(self._place)
        self._rows = self._metrics.rows
        for row in self._rows:
            self._board.write(row)
        self._board.flush()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The metrics so far, one dictionary a step."""
        return self._rows

    def write(self, step: int, metrics: Metrics, samples: Sequence[Mapping[str, Any]] = ()) -> None:
        """Appends a step; when this returns, a kill of the process loses nothing of it. In a store, after `save`."""
        row = {"step": step, **{name: metrics[name] for name in sorted(metrics)}}
        self._rows.append(row)
        if not self._writes:
            return
        for sample in samples:
            self._samples.append({"step": step, **sample})
        self._metrics.append(row)
        self._board.write(row)
        self._board.flush()

    def save(self) -> None:
        """To be called before a checkpoint is: what was written is in the workdir when this returns."""
        if not self._writes:
            return
        self._samples.flush()
        self._metrics.flush()
        with _explained(self._place):
            self._board.save()

    def close(self) -> None:
        """Saves and closes the files."""
        if not self._writes:
            return
        with contextlib.ExitStack() as closing:
            closing.enter_context(_explained(self._place))
            for thing in (self._board, self._samples, self._metrics):
                closing.callback(thing.close)

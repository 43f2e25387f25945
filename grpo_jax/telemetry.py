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

import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["RewardJournal", "RunLog", "WorkdirError", "read_jsonl", "write_atomically"]

Metrics = Mapping[str, float]


class WorkdirError(RuntimeError):
    """The workdir cannot be used: unwritable, full, or of another configuration."""


def _explained(path: pathlib.Path, error: OSError) -> WorkdirError:
    return WorkdirError(
        f"cannot write {path}: {error.strerror or error}. Checkpoints already saved are intact: mend this (free "
        "space, permissions) and run the same command again to continue, or choose another --workdir."
    )


def write_atomically(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a whole file or none of it.

    Raises:
      WorkdirError: it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise _explained(path, error) from error


def read_jsonl(path: pathlib.Path) -> list[dict[str, Any]]:
    """The whole lines of a file; a last line that was cut short by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().split("\n")[:-1]:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class _JsonLines:
    """An append-only file of JSON lines with a `step`, which can be cut back to a step."""

    def __init__(self, path: pathlib.Path, keep: Callable[[dict[str, Any]], bool]):
        """Opens the file and drops the lines for which `keep` is false."""
        self.path = path
        self.rows = [row for row in read_jsonl(path) if keep(row)]
        try:
            if path.exists():
                write_atomically(path, "".join(json.dumps(row) + "\n" for row in self.rows))
            self._file = path.open("a")
        except OSError as error:
            raise _explained(path, error) from error

    def append(self, row: Mapping[str, Any], durable: bool = False) -> None:
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            if durable:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise _explained(self.path, error) from error

    def close(self) -> None:
        try:
            self._file.close()  # flushes again what a full disk has refused
        except OSError as error:
            raise _explained(self.path, error) from error


class RewardJournal:
    """Rewards by step, on disk before they are used: a replayed step reads what the world said the first time.

    `rewards.jsonl`: one line a wave of a step, `{"step", "wave", "digest", "scores"}`, and `"failed"` where judges came
    to no verdict: by name, the indices of the completions. The digest is of the completions; a replay that sampled
    others (another machine, another layout) is scored anew, with a line on the screen. Each process journals its own
    completions: all but the first in `rewards.PROCESS.jsonl`.
    """

    def __init__(self, workdir: pathlib.Path, say: Callable[[str], None] = print, process: int = 0):
        """`process`: of several, whose completions these are, from 0."""
        name = f"rewards.{process}.jsonl" if process else "rewards.jsonl"
        self._lines = _JsonLines(workdir / name, keep=lambda row: True)
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
    """A TensorBoard event file, written when it is told to.

    tensorboardX's own SummaryWriter leaves that to a thread that waits by the wall clock: after a jump back it writes
    nothing for as long as that. The times in the file count on from the start, whatever the clock does.
    """

    def __init__(self, directory: pathlib.Path):
        from tensorboardX import event_file_writer, summary  # imports protobuf: half a second
        from tensorboardX.proto import event_pb2

        generated: Any = event_pb2  # protobuf makes its names at run time
        self._summary, self._event = summary, generated.Event
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

    def close(self) -> None:
        self._file.close()


class RunLog:
    """`metrics.jsonl`, `samples.jsonl` and TensorBoard event files of one run, cut back to a step."""

    def __init__(self, workdir: pathlib.Path, step: int, *, write: bool = True):
        """Opens the logs and drops everything after `step`, which is where the run goes on from.

        `write`: false where another process writes them, and this one only keeps `rows`.
        """
        self._writes = write
        if not write:
            self._rows = [row for row in read_jsonl(workdir / "metrics.jsonl") if row["step"] <= step]
            return
        self._metrics = _JsonLines(workdir / "metrics.jsonl", keep=lambda row: row["step"] <= step)
        self._samples = _JsonLines(workdir / "samples.jsonl", keep=lambda row: row["step"] <= step)
        directory = workdir / "tensorboard"
        try:
            for stale in directory.glob("events.out.tfevents.*"):
                stale.unlink()
            directory.mkdir(exist_ok=True)
            self._board = _Board(directory)
        except OSError as error:
            raise _explained(directory, error) from error
        self._rows = self._metrics.rows
        for row in self._rows:
            self._board.write(row)
        self._board.flush()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The metrics so far, one dictionary a step."""
        return self._rows

    def write(self, step: int, metrics: Metrics, samples: Sequence[Mapping[str, Any]] = ()) -> None:
        """Appends a step; when this returns, a kill of the process loses nothing of it."""
        row = {"step": step, **{name: metrics[name] for name in sorted(metrics)}}
        self._rows.append(row)
        if not self._writes:
            return
        for sample in samples:
            self._samples.append({"step": step, **sample})
        self._metrics.append(row)
        self._board.write(row)
        self._board.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        if not self._writes:
            return
        self._metrics.close()
        self._samples.close()
        self._board.close()

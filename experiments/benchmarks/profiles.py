"""What a turn consists of: a trace of it, and the operations or kernels in it that took longest, by program."""

import collections
import dataclasses
import heapq
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from experiments.benchmarks import measure
from experiments.benchmarks.workload import Workload
from grpo_jax import profiling

__all__ = ["Profile", "Profiled", "profiled", "read"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profiled(Workload):
    """The workload, and where a profile of it goes."""

    profile: str = ""  # a directory for a trace of one more turn of ours, whose operations are listed; empty: none
    operations: int = 20  # that are listed

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.operations < 1:
            raise ValueError(f"operations={self.operations} must be 1 or more.")
        if self.profile:
            place = pathlib.Path(self.profile).absolute()
            there = next(path for path in (place, *place.parents) if path.exists())
            if not there.is_dir() or not os.access(there, os.W_OK):
                raise ValueError(
                    f"profile={self.profile!r} must be a directory, or make one: {there} cannot be written."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """What devices did, in seconds."""

    busy: float  # when any operation ran
    operations: Mapping[tuple[str, str], tuple[float, int]]  # by program and name: seconds, and how often it ran

    def table(self, seconds: float, most: int) -> str:
        """Those that took longest, of a turn of so many seconds, in Markdown; several run at a time."""
        whole = sum(taken for taken, _ in self.operations.values())
        chosen = heapq.nlargest(most, self.operations.items(), key=lambda item: item[1])
        shown = sum(taken for _, (taken, _) in chosen)
        programs: dict[str, float] = collections.defaultdict(float)
        for (program, _), (taken, _) in self.operations.items():
            programs[program] += taken
        largest = sorted(programs.items(), key=lambda item: -item[1])
        by_program = ", ".join(f"{name} {taken:.3g}" for name, taken in largest if taken > 0.001 * whole)
        row = lambda *cells: f"| {' | '.join(cells)} |"
        lines = [row("program", "operation", "seconds", "times", "us each"), "|---" * 5 + "|"]
        for (program, name), (taken, times) in chosen:
            lines.append(row(program, name, f"{taken:.3g}", str(times), f"{1e6 * taken / times:.3g}"))
        return (
            f"the profile of a turn of {seconds:.3g} s: devices were busy for {self.busy:.3g} s; operations took "
            f"{whole:.3g} s together ({by_program})\n\n" + "\n".join(lines)
            + f"\n\nand {len(self.operations) - len(chosen)} more of {whole - shown:.3g} s"
        )  # fmt: skip


def profiled(options: Profiled, turn: Callable[[], Any]) -> list[str]:
    """A turn under the profiler, if it is asked for: the table, for `measure.report`'s `tables`."""
    if not options.profile:
        return []
    with jax.profiler.trace(options.profile, profiler_options=profiling.options()):
        seconds, _ = measure.seconds(turn)
    newest = max(pathlib.Path(options.profile).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    how = f"The trace is in {newest.parent}: `tensorboard --logdir={options.profile}` (pip install tensorboard xprof)."
    return [f"{read(newest).table(seconds, options.operations)}\n\n{how}"]


def read(path: pathlib.Path) -> Profile:
    """What a trace of `jax.profiler` says of devices: kernels of a GPU, operations of a TPU or a CPU.

    An operation that is made of others, as a loop is, has the time that these do not have.
    """
    operations: dict[tuple[str, str], tuple[float, int]] = {}
    intervals: list[tuple[float, float]] = []
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            if events := _operations(plane.name, line):
                intervals += [(start, end) for start, end, _ in events]
                for name, own in _exclusive(events):
                    seconds, times = operations.get(name, (0.0, 0))
                    operations[name] = seconds + own / 1e9, times + 1
    return Profile(busy=_union(intervals) / 1e9, operations=operations)


def _operations(plane: str, line: Any) -> list[tuple[float, float, tuple[str, str]]]:
    """Start and end in ns, program and name of the operations of one line; none where it holds something else."""
    device = plane.startswith("/device:")
    if device and not line.name.startswith(("Stream", "XLA Ops")):
        return []  # the same again, by step, by module or by source
    found = []
    for event in line.events:
        stats = dict(event.stats)
        if not device and "hlo_op" not in stats:
            continue  # what the host does
        program = str(stats.get("hlo_module", "")).removeprefix("jit_")
        name = re.sub(r"[._]\d+$", "", event.name)  # the 12 of fusion.12, of which a loop unrolled has many
        found.append((event.start_ns, event.start_ns + event.duration_ns, (program, name)))
    return found


def _exclusive(events: Iterable[tuple[float, float, tuple[str, str]]]) -> list[tuple[tuple[str, str], float]]:
    """Name and ns of each, without what others within it take; those of one thread or stream."""
    done: list[tuple[tuple[str, str], float]] = []
    around: list[list[Any]] = []  # end, name, own time, from the outermost
    for start, end, name in sorted(events, key=lambda event: (event[0], -event[1])):
        while around and around[-1][0] <= start:
            _, closed, own = around.pop()
            done.append((closed, own))
        if around:
            around[-1][2] -= min(end, around[-1][0]) - start
        around.append([end, name, end - start])
    return done + [(name, own) for _, name, own in around]


def _union(intervals: Iterable[tuple[float, float]]) -> float:
    """How long any of these lasts."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total

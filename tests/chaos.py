"""Kills a short run with SIGKILL at random moments, again and again, and compares its end with a run never killed.

    python -m tests.chaos --output=runs/chaos --kills=50 --each=5

With `--signal=SIGTERM` it is asked to stop, as one is whose machine is taken away: how long that takes is counted. With
`--here` it runs where JAX finds devices, GPUs or TPUs, and with `--deterministic`; else on a CPU. What follows is the
run's: `--here --mesh.fsdp=2` takes two of them.

The run is `experiments.gsm8k` with a tiny model and problems of its own making: from its start to its export, through
`tests.told`, which tells the part of the step that it is in. Each start has one part as its aim, where there is still
some kill missing, and is killed at a random moment of it; what it was really in, the pipe says when it is dead. A run
that comes to its end is compared and, while kills are missing, another one begins. `chaos.json` has the figures.
"""

import argparse
import collections
import dataclasses
import functools
import json
import math
import os
import pathlib
import platform
import random
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from grpo_jax.checkpoints import Checkpoints
from tests import processes
from tests.ends import last_state, untimed

__all__ = ["PARTS", "Kill", "chaos", "differences"]

PARTS = ("rollout", "rewards", "update", "save", "export")
# A reward that takes its time: a tiny model's completions are judged before one could aim.
REWARD = """
import time

def patient(completions, **columns):
    time.sleep(0.05)
    return [float(len(set(text))) for text in completions]
"""
FLAGS = [
    "--data.max_prompt_tokens=160", "--rollout.prompts=4", "--rollout.group_size=4", "--rollout.max_tokens=16",
    "--rollout.stop=('e',)", "--rollout.max_waves=2", "--update.microbatches=1", "--optimizer.learning_rate=1e-3",
    "--optimizer.warmup_steps=0", "--policy.compute_dtype=float32", "--policy.remat=none", "--evaluation.prompts=4",
    "--evaluation.sampled_prompts=2", "--evaluation.samples=2", "--evaluation.every=1000", "--train.samples_every=1",
]  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aim:
    """When to kill."""

    part: str
    occurrence: int  # the part's, in this process, from 1
    delay: float  # seconds after it has begun


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kill:
    """What a process was doing when the signal came."""

    part: str  # the one that was aimed at, if it was in it; else the one that began last; or "start" or "between"
    parts: tuple[str, ...]  # all that it was in
    step: int  # from 1; 0: before the first
    status: int  # that it ended with; of a signal the negative number
    newest: int  # checkpoint there is then; 0: none
    seconds: float  # since its start, to its end
    grace: float  # seconds from the signal to its end
    torn: tuple[str, ...]  # what was left half written


class Life:
    """One process of the run: what it tells, and its end."""

    def __init__(
        self, flags: Sequence[str], log: pathlib.Path, aim: Aim | None, how: signal.Signals = signal.SIGKILL,
        here: bool = False,
    ):  # fmt: skip
        """Runs until it ends, or gets the signal as aimed and ends of that.

        Raises:
          RuntimeError: it failed.
        """
        self.step, self.killed, self.seconds, self.grace = 0, False, 0.0, 0.0
        self.within: list[str] = []  # the parts it is in, as they began
        self.took: dict[str, list[float]] = collections.defaultdict(list)  # seconds, of each part that ended
        self._began: dict[str, float] = {}
        self._seen = collections.Counter[str]()
        self._aim, self._deadline, self._how = aim, float("inf"), how
        self._sent: float | None = None
        self._then: list[str] = []  # what it was in
        reader, writer = os.pipe()
        environment = processes.environment(None if here else 1, TOLD_IN="gsm8k", TOLD_TO=str(writer))
        started = time.monotonic()
        with log.open("a") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.told", *flags], cwd=processes.ROOT, env=environment, stdout=said,
                stderr=said, pass_fds=[writer],
            )  # fmt: skip
        os.close(writer)
        for line in self._lines(reader, process):
            self._hear(line)
        self.status = status = process.wait()
        ended = time.monotonic()
        self.seconds, self.killed = ended - started, self._sent is not None and status in (-how, 128 + how)
        if self.killed and self._sent is not None:
            self.grace = ended - self._sent
        if how != signal.SIGKILL:  # of which nothing follows, but what had been told and not yet heard
            self.within = self._then
        os.close(reader)
        if status and not (self.killed and aim):
            raise RuntimeError(f"the run ended with {status}:\n{log.read_text()[-4000:]}")

    def _lines(self, reader: int, process: "subprocess.Popen[bytes]") -> Iterator[str]:
        """What it tells, until it is dead; kills it when it is time."""
        rest = b""
        while True:
            left = None if self._deadline == float("inf") else max(0.0, self._deadline - time.monotonic())
            if not select.select([reader], [], [], left)[0]:
                process.send_signal(self._how)
                self._sent, self._deadline, self._then = time.monotonic(), float("inf"), [*self.within]
                continue
            if not (data := os.read(reader, 65536)):
                return
            *whole, rest = (rest + data).split(b"\n")
            yield from (line.decode() for line in whole)

    def _hear(self, line: str) -> None:
        kind, name = line.split()
        now = time.monotonic()
        if kind == "step":
            self.step = int(name)
        elif kind == ">":
            self.within.append(name)
            self._began[name] = now
            self._seen[name] += bool(self.step) or name == "export"  # rewards are tried and evaluated before, too
            if self._aim and (self._aim.part, self._aim.occurrence) == (name, self._seen[name]):
                self._deadline = now + self._aim.delay
        else:
            self.within.remove(name)
            self.took[name].append(now - self._began[name])


def differences(killed: pathlib.Path, straight: pathlib.Path) -> list[str]:
    """What differs between the ends of two runs but for times; empty where nothing does."""
    names = {path.name for place in (killed, straight) for path in (place / "export").iterdir()}
    same = lambda name: (
        all((place / "export" / name).exists() for place in (killed, straight))
        and ((killed / "export" / name).read_bytes() == (straight / "export" / name).read_bytes())
    )
    found = [f"export/{name}" for name in sorted(names) if not same(name)]
    logs = ("metrics.jsonl", "samples.jsonl", "rewards.jsonl")
    found += [name for name in logs if untimed(killed / name) != untimed(straight / name)]
    ours, theirs = last_state(killed), last_state(straight)
    return found + [
        f"checkpoint{name}"
        for name in sorted({**ours, **theirs})
        if name not in ours or name not in theirs or ours[name].tobytes() != theirs[name].tobytes()
    ]


def torn(workdir: pathlib.Path) -> tuple[str, ...]:
    """What a kill has left half written in a workdir."""
    found = [path for pattern in ("checkpoints/*tmp*", "*.part") for path in workdir.glob(pattern)]
    found += [path for path in workdir.glob("*.jsonl") if path.stat().st_size and path.read_bytes()[-1:] != b"\n"]
    return tuple(sorted(str(path.relative_to(workdir)) for path in found))


def next_aim(
    rng: random.Random, done: Mapping[str, int], kills: int, each: int, took: Mapping[str, Sequence[float]]
) -> Aim | None:
    """Where the next process is killed; None where there were enough kills.

    The export comes last, for a run gets there once.
    """
    missing = {part: max(0, each - done.get(part, 0)) for part in PARTS}
    inside = [part for part in PARTS[:-1] if missing[part]]
    if not inside and sum(done.values()) + missing["export"] < kills:
        inside = list(PARTS[:-1])
    if not inside and not missing["export"]:
        return None
    part = rng.choice(inside) if inside else "export"
    if part == "export":  # a kill that comes too late costs a run
        return Aim(part=part, occurrence=1, delay=rng.uniform(0, 0.7 * min(took[part])))
    return Aim(part=part, occurrence=rng.randint(1, 3), delay=rng.uniform(0, 0.9 * statistics.median(took[part])))


def newest(workdir: pathlib.Path) -> int:
    """The step of a workdir's newest checkpoint that is whole; 0 where there is none."""
    place = workdir / "checkpoints"
    return max(Checkpoints(place, read_only=True).steps if place.is_dir() else [], default=0)


def prepare(output: pathlib.Path, steps: int, every: int) -> list[str]:
    """Problems, a model and a reward; flags of the run, which saves after so many steps, but for its workdir."""
    processes.python(
        "-m", "experiments.tiny_gsm8k", f"--output={output / 'tiny'}", "--train=32", "--test=4", "--vocabulary=300"
    )  # fmt: skip
    (output / "patient.py").write_text(REWARD)
    return [
        f"--model={output / 'tiny' / 'model'}", f"--data.train_file={output / 'tiny' / 'train.jsonl'}",
        f"--data.test_file={output / 'tiny' / 'test.jsonl'}", f"--reward={output / 'patient.py'}:patient=0.01",
        f"--train.steps={steps}", f"--checkpoints.every={every}", *FLAGS,
    ]  # fmt: skip


def chaos(
    output: pathlib.Path, *, kills: int, each: int, seed: int, how: signal.Signals = signal.SIGKILL, here: bool = False,
    more: Sequence[str] = (), say: Any = print,
) -> dict[str, Any]:  # fmt: skip
    """Kills runs in `output` until there were enough kills in all and in each part, and compares their ends.

    Returns:
      The figures, as in `chaos.json`; `different` is empty where every run ended with the same bits.
    """
    output = output.absolute()
    rng, started, steps = random.Random(seed), time.monotonic(), 4 + kills // 2
    # Killed, it must come to new steps before the next kill; asked to stop, it saves where it is.
    flags, log = prepare(output, steps, 1 if how == signal.SIGKILL else 3), output / "log.txt"
    flags += ["--deterministic"] * here + [*more]
    straight = Life([f"--workdir={output / 'straight'}", *flags], log, None, here=here)
    say(f"never killed: {steps} steps in {straight.seconds:.1f} s")
    done: list[Kill] = []
    different: list[str] = []
    runs, finished = 0, True
    took = straight.took
    aim, started_again = next_aim(rng, {}, kills, each, took), 0
    while aim or not finished:
        if (started_again := started_again + 1) > 20 + 4 * kills:
            raise RuntimeError(
                f"{started_again - 1} starts were not enough: {collections.Counter(k.part for k in done)}"
            )
        runs, finished = runs + finished, False
        workdir = output / f"run{runs}"
        if (workdir / "export").exists():  # the last kill came too late for its aim, and there is no other export
            aim = None
        life = Life([f"--workdir={workdir}", *flags], log, aim, how, here)
        for part, seconds in life.took.items():
            took[part] += seconds
        if life.killed and aim:
            kill = Kill(
                part=_hit(life, aim), parts=tuple(life.within), step=life.step, status=life.status,
                newest=newest(workdir), seconds=life.seconds, grace=life.grace, torn=torn(workdir),
            )  # fmt: skip
            done.append(kill)
            say(_line(len(done), runs, kill))
        else:
            finished = True
            found = differences(workdir, output / "straight")
            different += [f"run {runs}: {name}" for name in found]
            say(f"run {runs} has ended after {len(done)} kills in all: {', '.join(found) or 'the same bits'}")
        aim = next_aim(rng, collections.Counter(kill.part for kill in done), kills, each, took)
    figures = {
        "signal": how.name, "kills": len(done), "runs": runs, "steps": steps, "seed": seed, "different": different,
        "seconds": time.monotonic() - started, "machine": f"{os.cpu_count()} x {platform.machine()}",
        "device": _device(output / "straight"),
        "parts": {part: _figures([kill for kill in done if kill.part == part]) for part in _parts(done)},
        "log": [dataclasses.asdict(kill) for kill in done],
    }  # fmt: skip
    (output / "chaos.json").write_text(json.dumps(figures, indent=2) + "\n")
    say(table(figures))
    return figures


def _device(workdir: pathlib.Path) -> str:
    """On how many of which devices it ran."""
    read = lambda name: json.loads((workdir / name).read_text())
    return f"{math.prod(read('config.json')['mesh'].values())} of {read('summary.json')['device']}"


def _hit(life: Life, aim: Aim) -> str:
    if not life.step and "export" not in life.within:
        return "start"
    return aim.part if aim.part in life.within else (life.within or ["between"])[-1]


def _line(number: int, run: int, kill: Kill) -> str:
    beside = ", ".join(part for part in kill.parts if part != kill.part)
    half = f"; half written: {', '.join(kill.torn)}" if kill.torn else ""
    where = f"{kill.part} ({beside})" if beside else kill.part
    ended = f"ended {kill.seconds:.2f} s after its start and {kill.grace:.2f} s after the signal"
    return f"kill {number:2}: run {run}, step {kill.step}, in {where}, {ended}{half}"


def _parts(done: Sequence[Kill]) -> list[str]:
    return [*PARTS, *sorted({kill.part for kill in done} - {*PARTS})]


def _figures(done: Sequence[Kill]) -> dict[str, Any]:
    return {
        "kills": len(done), "steps": len({kill.step for kill in done}), "torn": sum(bool(k.torn) for k in done),
        "grace": max((kill.grace for kill in done), default=0.0),
    }  # fmt: skip


def table(figures: Mapping[str, Any]) -> str:
    """The figures for people, as Markdown."""
    lines = [
        "| killed in | times | in so many steps | with something half written | ended within, seconds |",
        "|---|---|---|---|---|",
    ]
    for part, row in figures["parts"].items():
        lines.append(f"| {part} | {row['kills']} | {row['steps']} | {row['torn']} | {row['grace']:.2f} |")
    ends = "all with the same bits" if not figures["different"] else f"DIFFERENT: {figures['different']}"
    total = f"{figures['kills']} times {figures['signal']} in {figures['runs']} runs of {figures['steps']} steps"
    return "\n".join(
        [*lines, "", f"{total}, {ends}; seed {figures['seed']}, {figures['device']}, {figures['seconds']:.0f} s."]
    )


def main() -> None:
    """Exits with 1 where a run ended with other bits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="a new directory")
    parser.add_argument("--kills", type=int, default=50, help="in all, at least")
    parser.add_argument("--each", type=int, default=5, help="in each part, at least")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--signal", choices=("SIGKILL", "SIGTERM"), default="SIGKILL", help="that it gets")
    parser.add_argument("--here", action="store_true", help="where JAX finds devices, with --deterministic")
    given, more = parser.parse_known_args()
    if given.output.exists():
        sys.exit(f"error: {given.output} is there already: name a new directory.")
    if given.kills < 1 or given.each < 0:
        sys.exit(f"error: --kills={given.kills} must be 1 or more, and --each={given.each} 0 or more.")
    given.output.mkdir(parents=True)
    jax.config.update("jax_platforms", "cpu")  # the devices are for the runs: this process only compares
    figures = chaos(
        given.output, kills=given.kills, each=given.each, seed=given.seed, how=signal.Signals[given.signal],
        here=given.here, more=more, say=functools.partial(print, flush=True),
    )  # fmt: skip
    sys.exit(bool(figures["different"]))


if __name__ == "__main__":
    main()

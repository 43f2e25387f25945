"""Two things side by side: in turns in one run, medians and spread, ratios turn by turn, as a table and as JSON.

A program is a frozen dataclass of options, whose fields are its flags, and a function from them to what it measured:

    if __name__ == "__main__":
        measure.command(Options, run)
"""

import dataclasses
import gc
import importlib.util
import inspect
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any, TypeVar

import jax
import numpy as np
from absl import flags, logging

from experiments.flags import field_comments
from experiments.process import check_file, interruptible, no_arguments, peak_rss, resident
from grpo_jax.telemetry import WorkdirError, write_atomically

__all__ = [
    "Options",
    "Output",
    "command",
    "fresh",
    "machine",
    "need",
    "need_host_memory",
    "report",
    "rss",
    "said",
    "seconds",
    "turns",
]

_PACKAGES = ("grpo-jax", "jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers", "trl", "google-tunix")
_EXTRA = {"torch": "parity", "transformers": "parity", "trl": "parity"}
_ROOT = pathlib.Path(__file__).parents[2]

_QUIET = 0.25  # cores that others may keep busy
_BUSY = (
    "others kept {:.1f} cores busy: threads that wait for one another suffer most, PyTorch's above all, so that ratios "
    "are not to be trusted; run it again when all is quiet."
)
_T = TypeVar("_T")
Values = Mapping[str, Mapping[str, Sequence[float]]]  # of each side by metric, one a round


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """What every program has; a subclass says what is measured."""

    json: str = ""  # a file for everything that was measured; empty: none

    def flags(self, **changes: Any) -> list[str]:
        """The command line that gives these options; those that are the defaults are left out."""
        values = dataclasses.asdict(dataclasses.replace(self, **changes))
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        text = lambda value: ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        return [f"--{name}={text(value)}" for name, value in values.items() if value != defaults[name]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Output):
    """What every program has that takes turns."""

    rounds: int = 5  # turns of each side, after one that warms up
    seed: int = 0  # of all that is random

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds} must be 1 or more.")


def need(*packages: str) -> None:
    """Raises ValueError with what to install where one of these is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        extra = sorted({_EXTRA[name] for name in missing})
        raise ValueError(f"{', '.join(missing)} not installed: pip install -e '.[{','.join(extra)}]' brings the peers.")


def seconds(run: Callable[[], _T]) -> tuple[float, _T]:
    """How long something takes, and what it returns."""
    started = time.perf_counter()
    value = run()
    return time.perf_counter() - started, value


def turns(
    sides: Mapping[str, Callable[[], Mapping[str, float]]], rounds: int, warmup: int = 1
) -> dict[str, dict[str, list[float]]]:
    """Runs all sides one after the other, so many times, after a round that compiles and warms up.

    Args:
      sides: by name, what runs once and says what it took.
      rounds: that count.
      warmup: rounds before, that do not count; 0 where each run is a process of its own.

    Returns:
      Of each side and metric, one number a round.
    """
    measured: dict[str, dict[str, list[float]]] = {name: {} for name in sides}
    for turn in range(warmup + rounds):
        for name, run in sides.items():
            gc.collect()  # nobody pays for what another has left
            metrics = run()
            if turn >= warmup:
                for metric, value in metrics.items():
                    measured[name].setdefault(metric, []).append(float(value))
    return measured


def _spread(values: Sequence[float]) -> dict[str, Any]:
    each = [float(value) for value in values]
    return {"median": float(np.median(each)), "min": min(each), "max": max(each), "values": each}


def _ratio(metric: str, ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """How many times better ours is, turn by turn (what else the machine did then, both had): rates, or costs."""
    more, less = (ours, theirs) if metric.endswith("_per_second") else (theirs, ours)
    with np.errstate(divide="ignore", invalid="ignore"):
        return [float(np.divide(a, b)) for a, b in zip(more, less, strict=True)]


def report(module: str, options: Output, measured: Values, *, ours: str = "ours", **more: Any) -> dict[str, Any]:
    """Everything that was measured, as JSON wants it.

    Args:
      module: the program's name, as `python -m` takes it.
      options: of the run.
      measured: what `turns` returns. A metric called `*_per_second` is a rate, `*_reward` has no ratio, the rest are
        costs.
      ours: the side that others are compared with; a peer's ratio above 1 says that ours is better.
      **more: further entries, among them `tables` and `notes`, lists of text for the screen.
    """
    sides = {side: {name: _spread(values) for name, values in of.items()} for side, of in measured.items()}
    ratios = {
        side: {
            name: _spread(_ratio(name, measured[ours][name], of[name]))
            for name in of
            if name in measured[ours] and not name.endswith("_reward")
        }
        for side, of in measured.items()
        if side != ours and ours in measured
    }
    return {
        "program": module.rpartition(".")[2],
        "command": " ".join(["python", "-m", module, *options.flags(json="")]),
        "options": dataclasses.asdict(options),
        "machine": machine(),
        "versions": versions(),
        "ours": ours,
        "measured": sides,
        "ratios": ratios,
        **more,
    }


def _busy_cores(window: float = 0.25) -> float | None:
    """How many cores others keep busy while this process sleeps for so many seconds; None where nothing says."""
    path = pathlib.Path("/proc/stat")
    if not path.exists():
        return None

    def ticks() -> tuple[int, int]:
        user, nice, system, idle, waiting, *rest = map(int, path.read_text().splitlines()[0].split()[1:9])
        return user + nice + system + sum(rest), idle + waiting

    (busy, idle), _ = ticks(), time.sleep(window)
    after_busy, after_idle = ticks()
    share = (after_busy - busy) / max(after_busy - busy + after_idle - idle, 1)
    return share * (os.cpu_count() or 1)


def machine() -> dict[str, Any]:
    """What it ran on; `busy_cores` are kept so by others, None where the system does not say."""
    model = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = jax.devices()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model, "cores": cores, "memory_bytes": memory, "busy_cores": _busy_cores(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Of Python and of the packages that are there."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cell(metric: str, spread: Mapping[str, Any]) -> str:
    scale, unit = (2**20, " MiB") if metric.endswith("bytes") else (1, "")
    show = lambda value: f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.4g}"
    middle, low, high = (show(spread[name] / scale) for name in ("median", "min", "max"))
    return f"{middle}{unit}" if spread["min"] == spread["max"] else f"{middle}{unit} ({low}..{high})"


def table(result: Mapping[str, Any]) -> str:
    """Medians (min..max) of all sides, and how many times better ours is, in Markdown."""
    ours, sides, ratios = result["ours"], result["measured"], result["ratios"]
    metrics = list(dict.fromkeys(name for of in sides.values() for name in of))
    headers = ["", *sides, *(f"{ours} against {peer}, times" for peer in ratios)]
    lines = [f"| {' | '.join(headers)} |", "|---" * len(headers) + "|"]
    for name in metrics:
        cells = [_cell(name, of[name]) if name in of else "" for of in sides.values()]
        cells += [_cell("", of[name]) if name in of else "" for of in ratios.values()]
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    how = "; ratios are taken turn by turn, above 1: ours is better" if ratios else ""
    return "\n".join(lines) + f"\n\nmedians (smallest..largest){how}"


def said(result: Mapping[str, Any]) -> str:
    """All that the screen shows: the command, what it ran on, and the table."""
    on, what = result["machine"], result["versions"]
    seed = result["options"].get("seed", result["options"].get("seeds"))
    others = on["busy_cores"] or 0.0
    busy = [_BUSY.format(others)] if others > _QUIET else []
    head = (
        f"{result['command']}\n{on['cpu']}, {on['cores']} cores, {on['memory_bytes'] / 2**30:.0f} GiB; "
        f"{on['devices']}; seed {seed}\n{', '.join(f'{name} {v}' for name, v in what.items())}"
    )
    parts = [head, *([table(result)] if result["measured"] else []), *result.get("tables", ())]
    return "\n\n".join([*parts, *result.get("notes", ()), *busy])


# Memory, in processes of their own -------------------------------------------------------------------


def need_host_memory() -> None:
    """Raises ValueError where arrays lie elsewhere than in the host's memory, which is what is measured."""
    if (platform := jax.default_backend()) != "cpu":
        raise ValueError(f"this measures the host's memory, and arrays lie on a {platform}: set JAX_PLATFORMS=cpu.")


def rss() -> int:
    """The bytes that this process holds now; where the system does not say, the most that it has held."""
    return resident("VmRSS") or peak_rss()


def fresh(module: str, options: Output, **changes: Any) -> dict[str, Any]:
    """Runs the program in a process of its own with some options changed: what `run` returned there.

    Raises:
      RuntimeError: it failed; with what it said.
    """
    command = [sys.executable, "-m", module, *options.flags(**changes, json="")]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# The command line ------------------------------------------------------------------------------------


def _define(options: type[Output]) -> None:
    """A flag for every field, with its comment as help and its default."""
    makers = {int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string, bool: flags.DEFINE_bool}
    comments = field_comments(options)
    for field in dataclasses.fields(options):
        name, default = field.name, field.default
        help_text = comments.get(name) or name
        if isinstance(default, tuple):
            flags.DEFINE_list(name, [str(item) for item in default], help_text)
        else:
            makers[type(default)](name, default, help_text)  # pyright: ignore[reportArgumentType]
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])  # so that --help shows it


def _given(options: type[Output]) -> Output:
    """The options of the command line.

    Raises:
      ValueError: a value that the options refuse.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value: Any = flags.FLAGS[field.name].value
        if isinstance(field.default, tuple):
            value = tuple(type(field.default[0])(item) for item in value)
        values[field.name] = value
    return options(**values)


def command(options: type[Output], run: Callable[[Any], dict[str, Any]]) -> None:
    """A program: flags from the fields, what was measured on the screen and, as JSON, in `--json`.

    A result that is no report is printed as a line of JSON: what `fresh` reads.
    """
    module = inspect.getmodule(run)
    sys.modules["__main__"].__doc__ = module.__doc__ if module else None

    def main(argv: list[str]) -> None:
        no_arguments(argv)
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            given = _given(options)
            check_file("json", given.json)
            before = _busy_cores()
            result = run(given)
            if before is not None and "machine" in result:  # who came and went has disturbed as well
                result["machine"]["busy_cores"] = max(before, result["machine"]["busy_cores"])
            print(said(result) if "program" in result else json.dumps(result))
            if given.json:
                write_atomically(pathlib.Path(given.json), json.dumps(result, indent=2) + "\n")
        except (ValueError, WorkdirError) as error:
            sys.exit(f"error: {error}")

    _define(options)
    interruptible(main)

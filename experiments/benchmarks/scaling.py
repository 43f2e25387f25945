"""How rollout, step and memory of ours grow with B, G, T, V and parameters: one at a time around a base point.

python -m experiments.benchmarks.scaling [--size=5m] [--vary=B,G,T,V,N] [--factors=0.5,1,2,4] [--nomemory]

B = prompts x group grows by prompts, its microbatches with it; G at that same B. Exponents are slopes of log seconds,
or log bytes, over log size by least squares: 1 is linear, 0 is independent. Beside them: from where on the slope
between neighbours differs by more than 0.2 from what is expected.
"""

import dataclasses
import itertools
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments import footprint
from experiments.benchmarks import measure, memory
from experiments.benchmarks.workload import SIZES, Ours, Workload

# What grows, and the exponents that are expected of seconds and, at most, of bytes.
EXPECTED = {"B": 1.0, "G": 0.0, "T": 1.0, "V": 1.0, "N": 1.0}
COLUMNS = {"rollout_seconds": "rollout, seconds", "step_seconds": "step, seconds", "bytes": "memory, bytes"}
TOLERANCE = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Workload):
    """The base point, and what moves away from it."""

    vary: tuple[str, ...] = tuple(EXPECTED)  # B completions, G of a prompt, T tokens, V vocabulary, N parameters
    factors: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)  # of the base point's B, G, T and V
    sizes: tuple[str, ...] = ("1m", "5m", "20m")  # of models, for N
    memory: bool = True  # peaks of a step beyond the model too, each in a process of its own
    rounds: int = 3  # turns of each point, after one that warms up

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := sorted({*self.vary} - {*EXPECTED}):
            raise ValueError(f"vary={unknown} must be among {', '.join(EXPECTED)}.")
        if unknown := sorted({*self.sizes} - {*SIZES}):
            raise ValueError(f"sizes={unknown} must be among {', '.join(SIZES)}.")
        if min(self.factors) <= 0:
            raise ValueError(f"factors={self.factors} must be above 0.")

    def points(self, what: str) -> dict[float, Workload]:
        """The workloads of one sweep, by what grows in it; those that do not come out even are left out."""
        times = lambda value: [(f, round(value * f)) for f in self.factors if value * f == round(value * f) >= 1]
        if what == "B":
            parts = lambda factor: max(1, round(self.microbatches * factor))
            each = [self.workload(prompts=p, microbatches=parts(f)) for f, p in times(self.prompts)]
            return {w.prompts * w.group: w for w in each}
        if what == "G":
            groups = [g for _, g in times(self.group) if g >= 2 and self.prompts * self.group % g == 0]
            return {g: self.workload(group=g, prompts=self.prompts * self.group // g) for g in groups}
        if what == "T":
            return {t: self.workload(tokens=t) for _, t in times(self.tokens)}
        if what == "V":
            return {v: self.workload(vocabulary=v) for _, v in times(self.model.vocab_size)}
        each = [self.workload(size=size, vocabulary=0) for size in self.sizes]
        return {footprint.parameters(w.model): w for w in each}


def fit(sizes: Sequence[float], costs: Sequence[float]) -> tuple[float, float | None]:
    r"""The exponent a of costs ~ sizes^a by least squares of logarithms, and its standard error; None of two points.

    .. math:: a = S_{xy} / S_{xx},\quad s_a^2 = \frac{\sum_i r_i^2}{(n - 2) S_{xx}}
    """
    x, y = np.log(sizes), np.log(costs)
    x, y = x - x.mean(), y - y.mean()
    slope = (x @ y) / (x @ x)
    residuals = y - slope * x
    error = float(np.sqrt(residuals @ residuals / (len(x) - 2) / (x @ x))) if len(x) > 2 else None
    return float(slope), error


def leaves(sizes: Sequence[float], costs: Sequence[float], expected: float, at_most: bool = False) -> float | None:
    """The size from which the slope to the next differs from the expected one, or is above it; None: it never is."""
    for (x, a), (next_x, b) in itertools.pairwise(zip(sizes, costs, strict=True)):
        beyond = np.log(b / a) / np.log(next_x / x) - expected
        if (beyond if at_most else abs(beyond)) > TOLERANCE:
            return x
    return None


def _side(workload: Workload, scratch: pathlib.Path) -> Callable[[], dict[str, float]]:
    """Rollout and step of a point, once each."""
    ours = Ours(workload)
    rollout, step = ours.rollout(), ours.step(scratch)

    def run() -> dict[str, float]:
        tokens = float(workload.limits.sum())
        rolling, _ = measure.seconds(rollout)
        stepping = step()["seconds"]
        return {
            "rollout_seconds": rolling, "step_seconds": stepping,
            "rollout_tokens_per_second": tokens / rolling, "step_tokens_per_second": tokens / stepping,
        }  # fmt: skip

    return run


def _exponents(what: str, sweep: Mapping[float, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, Any]]:
    """Of each cost of a sweep."""
    sizes, fitted = sorted(sweep), {}
    for name in COLUMNS:
        if len(sizes) > 1 and name in sweep[sizes[0]]:
            costs = [float(np.median(sweep[size][name])) for size in sizes]
            exponent, error = fit(sizes, costs)
            fitted[name] = {
                "exponent": exponent, "standard_error": error,
                "leaves": leaves(sizes, costs, EXPECTED[what], at_most=name == "bytes"),
            }  # fmt: skip
    return fitted


def _table(what: str, sweep: Mapping[float, Mapping[str, Sequence[float]]], fitted: Mapping[str, Any]) -> str:
    """A sweep in Markdown, with its exponents."""
    median = lambda of, name: float(np.median(of[name]))
    lines = [f"| {what} | rollout tokens/s | step tokens/s | peak beyond the model |", "|---|---|---|---|"]
    for size in sorted(sweep):
        of = sweep[size]
        held = f"{median(of, 'bytes') / 2**20:,.0f} MiB" if "bytes" in of else ""
        speeds = (f"{median(of, f'{name}_tokens_per_second'):,.0f}" for name in ("rollout", "step"))
        lines.append(f"| {size:,.0f} | {' | '.join(speeds)} | {held} |")
    lines += ["", f"| {what}^a, {EXPECTED[what]:g} expected | a | standard error | leaves it at |", "|---|---|---|---|"]
    for name, of in fitted.items():
        where = "" if of["leaves"] is None else f"{of['leaves']:,.0f}"
        error = "" if of["standard_error"] is None else f"{of['standard_error']:.2f}"
        lines.append(f"| {COLUMNS[name]} | {of['exponent']:.2f} | {error} | {where} |")
    return "\n".join(lines)


def run(options: Options) -> dict[str, Any]:
    """Measures all points in turns, and fits each sweep."""
    if options.memory:
        measure.need_host_memory()
    sweeps = {what: options.points(what) for what in options.vary}
    points = {w: i for i, w in enumerate(dict.fromkeys(w for sweep in sweeps.values() for w in sweep.values()))}
    with tempfile.TemporaryDirectory() as scratch:
        sides = {}
        for workload, i in points.items():
            (workdir := pathlib.Path(scratch) / str(i)).mkdir()
            sides[str(i)] = _side(workload, workdir)
        measured = measure.turns(sides, options.rounds)
    if options.memory:
        for workload, i in points.items():
            alone = memory.Options(**dataclasses.asdict(workload))
            held = measure.fresh(memory.MODULE, alone, only="ours")
            measured[str(i)]["bytes"] = [held["peak_beyond_model_bytes"]]
    of = {what: {size: measured[str(points[w])] for size, w in sweep.items()} for what, sweep in sweeps.items()}
    exponents = {what: _exponents(what, sweep) for what, sweep in of.items()}
    tables = [_table(what, sweep, exponents[what]) for what, sweep in of.items()]
    return measure.report(
        "experiments.benchmarks.scaling", options, {}, tables=tables, exponents=exponents,
        points={what: {str(size): dict(values) for size, values in sweep.items()} for what, sweep in of.items()},
    )  # fmt: skip


if __name__ == "__main__":
    measure.command(Options, run)

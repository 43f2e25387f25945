"""Pictures of runs, from their logs."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

__all__ = ["comparison", "curve"]

Rows = Sequence[Mapping[str, Any]]


def _series(rows: Rows, x: str, y: str) -> tuple[list[float], list[float]]:
    points = [(row[x], row[y]) for row in rows if x in row and y in row]
    return [p[0] for p in points], [p[1] for p in points]


def _smooth(values: Sequence[float], width: int = 20) -> list[float]:
    return [
        sum(values[max(0, i - width + 1) : i + 1]) / len(values[max(0, i - width + 1) : i + 1])
        for i in range(len(values))
    ]


def curve(rows: Rows, path: pathlib.Path, title: str) -> None:
    """Reward and held-out accuracy over steps, KL and entropy, length, or the loss where no reward is."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    steps, reward = _series(rows, "step", "reward")
    left.plot(steps, reward, color="tab:blue", alpha=0.25, linewidth=0.8)
    if reward:
        left.plot(steps, _smooth(reward), color="tab:blue", label="reward (train, sampled)")
    left.plot(*_series(rows, "step", "eval/accuracy"), "o-", color="tab:orange", label="accuracy (held out, greedy)")
    left.set(xlabel="step", ylim=(0, 1.15), title=title)
    left.legend(fontsize=8, loc="lower right")
    for axis, names in ((middle, ("kl", "entropy")), (right, ("completions/mean_length",) if reward else ("loss",))):
        for name in names:
            x, y = _series(rows, "step", name)
            if y:
                axis.plot(x, _smooth(y), label=name)
        axis.set(xlabel="step")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def comparison(runs: Mapping[str, Sequence[Rows]], path: pathlib.Path) -> None:
    """Held-out greedy accuracy over wall time: a colour a method, a line a seed."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for i, (name, seeds) in enumerate(runs.items()):
        for j, rows in enumerate(seeds):
            x, y = _series(rows, "time/elapsed_seconds", "eval/accuracy")
            axis.plot(x, y, "o-", markersize=3, color=f"C{i}", alpha=0.8, label=name if j == 0 else None)
    axis.set(xlabel="seconds of training (two CPU cores)", ylabel="held-out greedy accuracy", ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)

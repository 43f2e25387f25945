"""Pictures of runs, from their logs."""

import io
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter, SymmetricalLogLocator

from grpo_jax.preferences import Bin
from grpo_jax.storage import Path
from grpo_jax.telemetry import write_atomically

__all__ = ["WIDTH", "comparison", "curve", "interquartile_mean", "learning", "multiples", "optimization", "reliability"]

Rows = Sequence[Mapping[str, Any]]
WIDTH = 20  # steps that a smoothed value is made of


def _series(rows: Rows, x: str, y: str) -> tuple[list[float], list[float]]:
    points = [(row[x], row[y]) for row in rows if x in row and y in row]
    return [p[0] for p in points], [p[1] for p in points]


def _smooth(values: Sequence[float], width: int = WIDTH) -> list[float]:
    return [
        sum(values[max(0, i - width + 1) : i + 1]) / len(values[max(0, i - width + 1) : i + 1])
        for i in range(len(values))
    ]


def _save(figure: Figure, path: Path) -> None:
    """As PNG."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    write_atomically(path, picture.getvalue())


def curve(rows: Rows, path: Path, title: str) -> None:
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
        if axis.has_data():
            axis.legend(fontsize=8)
    _save(figure, path)


def comparison(runs: Mapping[str, Sequence[Rows]], path: Path) -> None:
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
    _save(figure, path)


def interquartile_mean(values: Sequence[float]) -> float:
    """The mean without the lowest and the highest quarter: KL estimates have single steps that dwarf all others."""
    cut = len(values) // 4
    return float(np.sort(values)[cut : len(values) - cut].mean())


def _over_seeds(seeds: Sequence[Rows], name: str) -> tuple[list[float], np.ndarray, np.ndarray]:
    """Steps, and at each the mean over seeds and their standard deviation (ddof 1; 0 of one seed)."""
    values = np.array([_series(rows, "step", name)[1] for rows in seeds])
    if not name.startswith("eval/"):
        windows = [slice(max(0, i - WIDTH), i) for i in range(1, values.shape[1] + 1)]
        values = np.array([[interquartile_mean(row[window]) for window in windows] for row in values])
    deviation = values.std(axis=0, ddof=1) if len(seeds) > 1 else np.zeros(values.shape[1])
    return _series(seeds[0], "step", name)[0], values.mean(axis=0), deviation


def multiples(
    runs: Mapping[str, Sequence[Rows]], panels: Mapping[str, str], path: Path, logarithmic: Collection[str] = ()
) -> None:
    """A panel a metric over steps, a line a method: the mean over seeds, with a band of one standard deviation.

    Metrics under `eval/` are drawn as they were measured, others as interquartile means of the last `WIDTH` steps, seed
    by seed; those of `logarithmic` on an axis that is linear up to 0.01 only. A metric that no run has gets no panel.
    """
    measured = {name for seeds in runs.values() for rows in seeds for name in rows[-1]}
    panels = {name: title for name, title in panels.items() if name in measured}
    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(2, (len(panels) + 1) // 2).flatten()
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, (name, title) in zip(axes, panels.items(), strict=False):
        for i, (method, seeds) in enumerate(runs.items()):
            steps, mean, deviation = _over_seeds(seeds, name)
            color, line = f"C{i % 10}", ("-", "--", ":")[i // 10 % 3]
            marker = "o" if name.startswith("eval/") else None
            axis.plot(steps, mean, line, marker=marker, markersize=3, linewidth=1.3, color=color, label=method)
            axis.fill_between(steps, mean - deviation, mean + deviation, color=color, alpha=0.12, linewidth=0)
        if name in logarithmic:
            axis.set_yscale("symlog", linthresh=0.01)
            axis.yaxis.set_major_formatter(ScalarFormatter())
            axis.yaxis.set_minor_locator(SymmetricalLogLocator(base=10, linthresh=0.01, subs=(2, 5)))
            axis.yaxis.set_minor_formatter(ScalarFormatter())
            axis.tick_params(axis="y", which="minor", labelsize=7)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(runs), 6))
    count = max(map(len, runs.values()))
    over = f"mean and standard deviation of {count} seeds; " if count > 1 else ""
    smoothed = f"{over}held-out accuracy as measured, all else interquartile means of up to {WIDTH} steps"
    figure.suptitle(smoothed, fontsize=9)
    _save(figure, path)


def learning(logs: Mapping[str, Mapping[int, Rows]], samples: int, path: Path) -> None:
    """Mean reward over completions and over wall time: a colour a side, a thin line a seed, a thick one their mean.

    Means over the last steps, up to `WIDTH`. `samples`: completions a step. Over time the mean goes as far as the
    quickest seed of a side does.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for i, (side, seeds) in enumerate(logs.items()):
        lines = [_smooth(_series(rows, "step", "reward")[1]) for rows in seeds.values()]
        clocks = [_series(rows, "step", "time/elapsed_seconds")[1] for rows in seeds.values()]
        counts = samples * np.arange(1, len(lines[0]) + 1)
        grid = np.linspace(max(clock[0] for clock in clocks), min(clock[-1] for clock in clocks), 200)
        over_time = np.mean([np.interp(grid, clock, line) for clock, line in zip(clocks, lines, strict=True)], axis=0)
        for line, clock in zip(lines, clocks, strict=True):
            left.plot(counts, line, color=f"C{i}", alpha=0.35, linewidth=0.8)
            right.plot(clock, line, color=f"C{i}", alpha=0.35, linewidth=0.8)
        left.plot(counts, np.mean(lines, axis=0), color=f"C{i}", linewidth=2, label=f"{side}, {len(lines)} seeds")
        right.plot(grid, over_time, color=f"C{i}", linewidth=2, label=f"{side}, {len(lines)} seeds")
    left.set(xlabel="completions", ylabel="mean reward (train, sampled)")
    right.set(xlabel="seconds of training")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend()
    _save(figure, path)


def reliability(bins: Sequence[Bin], path: Path) -> None:
    """How often a reward model is right, beside how sure it is; how many pairs each point stands for is its size."""
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axis = figure.subplots()
    filled = [b for b in bins if b.count]
    total = sum(b.count for b in filled)
    axis.plot([0.5, 1], [0.5, 1], color="gray", linewidth=0.8, label="calibrated")
    axis.plot([b.confidence for b in filled], [b.accuracy for b in filled], color="tab:blue", linewidth=0.8)
    axis.scatter(
        [b.confidence for b in filled], [b.accuracy for b in filled], s=[20 + 400 * b.count / total for b in filled],
        color="tab:blue", alpha=0.6, label=f"{total} held-out pairs",
    )  # fmt: skip
    axis.set(xlabel="confidence, sigmoid of the difference", ylabel="accuracy", xlim=(0.48, 1.02), ylim=(-0.02, 1.05))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    _save(figure, path)


def optimization(arms: Mapping[str, Sequence[Rows]], path: Path) -> None:
    """Proxy and true reward over the square root of the KL to the start: a colour an arm, a thin line a seed.

    As in arXiv 2210.10760, figure 1, and with what the proxy says of the start as its 0. Means over the last steps, up
    to `WIDTH`; a dot where a seed ends.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for i, (arm, seeds) in enumerate(arms.items()):
        for j, rows in enumerate(seeds):
            distance = np.sqrt(np.maximum(_smooth([row["kl_to_start"] for row in rows]), 0))
            for axis, name in zip(axes, ("rewards/proxy/mean", "rewards/rule/mean"), strict=True):
                values = np.array(_smooth([row[name] for row in rows]))
                values = values - rows[0][name] if "proxy" in name else values
                axis.plot(distance, values, color=f"C{i}", linewidth=1.2, alpha=0.8, label=arm if j == 0 else None)
                axis.plot(distance[-1], values[-1], "o", color=f"C{i}", markersize=4)
    axes[0].set(title="the reward model's score, minus the start's", ylabel="proxy reward")
    axes[1].set(title="the hidden rule", ylabel="true reward")
    for axis in axes:
        axis.set(xlabel="sqrt(KL to the warm start), nats a completion")
        axis.grid(alpha=0.3)
        axis.legend()
    _save(figure, path)

"""Objectives side by side on Countdown: the same warm start, the same prompts by seed, one run for each and seed.

python -m experiments.compare --objectives=grpo,dr_grpo,gspo --seeds=0,1,2 --workdir=runs/compare

All flags of experiments.countdown apply to every run alike. With one optimizer step a rollout the ratio to the old
policy is 1 wherever a gradient is taken: no clip acts, and objectives differ in their advantages and token weights
alone. So the defaults are others here, 16 optimizer steps a rollout and fewer rollouts: --update.epochs=4
--update.minibatches=4 --update.microbatches=2 --train.steps=60 --evaluation.every=5.

WORKDIR/NAME/seed_S is the workdir of an ordinary run. The same command goes on where it was interrupted; with other
--objectives or --seeds, runs that are finished are read and not repeated. Writes compare.png, compare.md, compare.json.
"""

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from experiments import countdown, footprint, plots, process, runs
from experiments import flags as sections
from grpo_jax import profiling, workdirs
from grpo_jax.rewards import RewardError
from grpo_jax.storage import Path
from grpo_jax.telemetry import read_jsonl, write_atomically

OBJECTIVES = flags.DEFINE_list(
    "objectives",
    ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "rloo", "reinforce_plus_plus", "mdpo"],
    "What is compared, by name: see docs/objectives.md.",
)
SEEDS = flags.DEFINE_list("seeds", ["0"], "Of the prompts and of all sampling: a run of each objective for each.")
# Where they are not countdown's. A microbatch is then half as many completions as there.
DEFAULTS = {
    "update.epochs": 4,
    "update.minibatches": 4,
    "update.microbatches": 2,
    "train.steps": 60,
    "evaluation.every": 5,
}
VARIED = {"loss.objective": "--objectives", "train.seed": "--seeds"}
ELSEWHERE = (
    "baselines",
    "deterministic",
    "debug_nans",
    "eval_only",
    "eval_step",
    "warm_start_only",
)  # flags of experiments.countdown's own
flags.adopt_module_key_flags(sections)  # so that --help shows them
flags.declare_key_flag("workdir")

PANELS = {
    "reward": "reward (train, sampled)",
    "eval/accuracy": "accuracy (held out, greedy)",
    "kl": "KL to the reference, a token",
    "entropy": "entropy, nats a token",
    "completions/mean_length": "length of a completion, tokens",
    "clip_ratio/region_mean": "share of tokens that a clip holds",
}
LOGARITHMIC = ("kl", "clip_ratio/region_mean")  # objectives differ in them by orders of magnitude
# Of the table: header, format.
COLUMNS = {
    "eval/accuracy": ("greedy", ".1%"),
    "eval/pass@1": ("pass@1", ".1%"),
    "eval/pass@64": ("pass@64", ".1%"),
    "reward": ("reward", ".3f"),
    "kl": ("KL", ".3f"),
    "entropy": ("entropy", ".3f"),
    "completions/mean_length": ("length", ".2f"),
    "clip_ratio/region_mean": ("clipped", ".1%"),
    "time/elapsed_seconds": ("seconds", ".0f"),
}
Logs = Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]]  # rows of metrics.jsonl by objective and seed


def check_flags() -> None:
    """Raises ValueError where a flag of experiments.countdown is given that has no place here."""
    given = lambda name: flags.FLAGS[name].present
    for name in filter(given, ELSEWHERE):
        raise ValueError(f"--{name} is for experiments.countdown alone: leave it out.")
    for name in filter(given, VARIED):
        raise ValueError(f"--{name} is what differs between the runs: leave it out, and name all in {VARIED[name]}.")


def configurations(
    base: Mapping[str, Any], objectives: Sequence[str], seeds: Sequence[str]
) -> dict[tuple[str, int], dict[str, Any]]:
    """The configuration of each run, by objective and seed: `base` but for these two.

    Raises:
      ValueError: a list is empty, holds something twice or what there is not.
    """
    sections.check_distinct("objectives", objectives)
    parsed = sections.seeds_of(seeds)
    return {
        (name, seed): {
            **base,
            "loss": dataclasses.replace(base["loss"], objective=name),
            "train": dataclasses.replace(base["train"], seed=seed),
        }
        for seed, name in itertools.product(parsed, objectives)
    }


def open_workdirs(workdir: Path, configs: Mapping[tuple[str, int], Mapping[str, Any]]) -> None:
    """`config.json` of the whole, without what differs, and of each run; WorkdirError where there is another."""
    shared = runs.as_json(next(iter(configs.values())))
    for name in VARIED:
        section, field = name.split(".")
        del shared[section][field]
    workdirs.open_workdir(workdir, shared)
    for run, config in configs.items():
        workdirs.open_workdir(place(workdir, *run), runs.as_json(config))


def place(workdir: Path, objective: str, seed: int) -> Path:
    """The workdir of one run."""
    return workdir / objective / f"seed_{seed}"


def numbers(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the table says of one run: held-out metrics and times at its end, others where their line ends."""
    last = rows[1:][-plots.WIDTH :]  # the first row is before step 1
    smooth = lambda name: plots.interquartile_mean([row[name] for row in last])
    at_end = lambda name: name.startswith(("eval/", "time/"))
    return {name: rows[-1][name] if at_end(name) else smooth(name) for name in COLUMNS if name in rows[-1]}


def summarized(logs: Logs) -> dict[str, Any]:
    """`compare.json`: of each objective and metric the mean over seeds, their standard deviation (ddof 1), and each."""

    def over_seeds(values: Mapping[int, float]) -> dict[str, Any]:
        each = list(values.values())
        deviation = float(np.std(each, ddof=1)) if len(each) > 1 else None
        return {"mean": float(np.mean(each)), "deviation": deviation, "seeds": values}

    objectives = {}
    for name, seeds in logs.items():
        by_seed = {seed: numbers(rows) for seed, rows in seeds.items()}
        metrics = next(iter(by_seed.values()))
        objectives[name] = {key: over_seeds({seed: by_seed[seed][key] for seed in by_seed}) for key in metrics}
    start = next(iter(next(iter(logs.values())).values()))[0]  # the same for all
    return {"warm_start": {name: start[name] for name in COLUMNS if name in start}, "objectives": objectives}


def table(summary: Mapping[str, Any]) -> str:
    """What `summarized` says, in Markdown; a metric that no run has, as KL without a coefficient, has no column."""
    rows = {f"`{name}`": row for name, row in summary["objectives"].items()}
    columns = {name: of for name, of in COLUMNS.items() if any(name in row for row in rows.values())}

    def cell(row: Mapping[str, Any], name: str, form: str) -> str:
        if name not in row:
            return ""
        mean, deviation = row[name]["mean"], row[name]["deviation"]
        return format(mean, form) + ("" if deviation is None else f" ± {format(deviation, form).rstrip('%')}")

    start = {name: {"mean": value, "deviation": None} for name, value in summary["warm_start"].items()}
    lines = [
        f"| objective | {' | '.join(header for header, _ in columns.values())} |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for name, row in {"warm start": start, **rows}.items():
        lines.append(f"| {name} | {' | '.join(cell(row, key, form) for key, (_, form) in columns.items())} |")
    return "\n".join(lines)


def caption(config: Mapping[str, Any], seeds: Sequence[int]) -> str:
    """What the numbers and the picture are of."""
    rollout, update = config["rollout"], config["update"]
    of = f"seeds {', '.join(map(str, seeds))}: mean ± standard deviation" if len(seeds) > 1 else f"seed {seeds[0]}"
    return (
        f"{config['train'].steps} steps of {rollout.prompts} prompts x {rollout.group_size} completions, "
        f"{update.epochs * update.minibatches} optimizer steps each; {of}. Greedy and pass@k: held-out problems, after "
        f"the last step; all else but the seconds: interquartile means of up to {plots.WIDTH} last steps."
    )


def report(workdir: Path, configs: Mapping[tuple[str, int], Mapping[str, Any]]) -> None:
    """Writes the picture, the table and the numbers of finished runs, from their logs; prints the table."""
    logs: dict[str, dict[int, Any]] = {}
    for name, seed in configs:
        logs.setdefault(name, {})[seed] = read_jsonl(place(workdir, name, seed) / "metrics.jsonl")
    summary = summarized(logs)
    said = f"{caption(next(iter(configs.values())), list(next(iter(logs.values()))))}\n\n{table(summary)}\n"
    write_atomically(workdir / "compare.json", json.dumps(summary, indent=2) + "\n")
    write_atomically(workdir / "compare.md", said)
    by_name = {name: list(seeds.values()) for name, seeds in logs.items()}
    plots.multiples(by_name, PANELS, workdir / "compare.png", LOGARITHMIC)
    print(f"{said}\ncompare.png, compare.md and compare.json are in {workdir}")


def main(argv: list[str]) -> None:
    """Makes the runs that are not there yet, and puts all beside each other."""
    workdir = runs.directory_of(argv, countdown.WORKDIR)
    try:
        check_flags()
        configs = configurations(countdown.configuration(workdir), OBJECTIVES.value, SEEDS.value)
        profile = profiling.steps_of(countdown.PROFILE.value, next(iter(configs.values()))["train"].steps)
        print(process.cache_compilations(countdown.CACHE.value), flush=True)
        for config in configs.values():
            countdown.Experiment(config).check()
        print(countdown.Experiment(next(iter(configs.values()))).check_rewards(workdir), end="", flush=True)
    except RewardError:
        raise  # `process.command` shows where in a user's file it was
    except ValueError as error:
        sys.exit(f"error: {error}")
    open_workdirs(workdir, configs)
    missing = [run for run in configs if not runs.complete(place(workdir, *run))]
    print(f"{len(configs)} runs, of which {len(configs) - len(missing)} are finished", flush=True)
    params = countdown.warm_start(countdown.Experiment(configs[missing[0]]), workdir) if missing else None
    for i, (name, seed) in enumerate(missing):
        started, config, directory = time.perf_counter(), configs[name, seed], place(workdir, name, seed)
        print(f"{name}, seed {seed}: run {i + 1} of {len(missing)}", flush=True)
        rows = countdown.Experiment(config).train(params, directory, f"{name}, seed {seed}", profile)
        summary = runs.summary(directory, rows, seed, footprint.parameters(config["model"]), started)
        runs.finish(directory, rows, summary, f"Countdown, {name}")
    report(workdir, configs)


if __name__ == "__main__":
    for flag, default in DEFAULTS.items():
        flags.FLAGS.set_default(flag, default)
    process.command(main)

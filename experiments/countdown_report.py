"""The picture and the table of several finished `experiments.countdown --baselines` runs, one a seed.

python -m experiments.countdown_report --picture=docs/countdown.png runs/seed0 runs/seed1 runs/seed2
"""

import json
import sys

from absl import flags

from experiments import plots, process
from grpo_jax import storage
from grpo_jax.storage import Path
from grpo_jax.telemetry import read_jsonl

PICTURE = flags.DEFINE_string("picture", "countdown.png", "Where the picture is written.")
METHODS = {
    "GRPO": ".",
    "supervision on own correct samples": "baselines/supervision_on_own_correct_samples",
    "continued supervision": "baselines/continued_supervision",
}


def table(workdirs: list[Path]) -> str:
    """Held-out accuracy before and after, a row a seed and method, in Markdown."""
    lines = ["| seed | method | greedy | pass@1 | pass@64 | seconds of training |", "|---|---|---|---|---|---|"]
    for workdir in workdirs:
        seed = json.loads((workdir / "summary.json").read_text())["seed"]
        runs = {name: read_jsonl(workdir / place / "metrics.jsonl") for name, place in METHODS.items()}
        rows = {"warm start": runs["GRPO"][0], **{name: run[-1] for name, run in runs.items()}}
        for name, row in rows.items():
            numbers = (f"{row[f'eval/{key}']:.1%}" for key in ("accuracy", "pass@1", "pass@64"))
            lines.append(f"| {seed} | {name} | {' | '.join(numbers)} | {row['time/elapsed_seconds']:.0f} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Prints the table and draws the picture."""
    workdirs = [storage.path(name) for name in argv[1:]]
    if not workdirs:
        sys.exit("error: name the workdirs of finished runs with --baselines.")
    needed = ["summary.json", *(f"{place}/metrics.jsonl" for place in METHODS.values())]
    for path in (workdir / name for workdir in workdirs for name in needed):
        if not path.exists():
            sys.exit(f"error: there is no {path}: name the workdirs of finished runs with --baselines.")
    runs = {name: [read_jsonl(w / place / "metrics.jsonl") for w in workdirs] for name, place in METHODS.items()}
    plots.comparison(runs, storage.path(PICTURE.value))
    print(table(workdirs))


if __name__ == "__main__":
    process.command(main)

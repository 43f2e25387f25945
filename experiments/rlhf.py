"""Learning from preferences, all of it, on a laptop: warm start, reward model, GRPO against it, and the truth.

python -m experiments.rlhf --workdir=runs/rlhf

A prompt names three letters, and a text of letters and exclamation marks answers it. A hidden rule likes texts that
mention all three, and exclamation marks, up to three of them; more is shouting. Only a labeller knows it: pairs of the
warm start's own texts are compared by it, with noise, and a reward model learns from these. In such texts nobody
shouts, so that the reward model has never seen what is wrong with it, and GRPO finds out: without a KL penalty the
score rises while the truth falls (arXiv 2210.10760). Both are measured at every step, with KL and without.

--iterations=3 is algorithm 1 of arXiv 2402.03300: the reward model goes on with pairs of the new policy's texts and a
tenth of old ones, and the reference becomes the policy.
"""

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from experiments import flags as sections
from experiments import footprint, process, rlhf_run, runs
from experiments.flags import section
from grpo_jax import hosts, sharding, training, workdirs
from grpo_jax.checkpoints import CheckpointConfig
from grpo_jax.telemetry import WorkdirError, write_atomically

WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where everything is written; an interrupted run there goes on.", required=True
)
ITERATIONS = flags.DEFINE_integer(
    "iterations", 1, "Of GRPO, before each but the first of which the reward model goes on with new pairs.",
    lower_bound=1,
)  # fmt: skip
SEEDS = flags.DEFINE_list("seeds", ["0"], "Of everything; each is a run of its own in WORKDIR/seedN.")
CACHE = sections.compilation_cache()
DISTRIBUTED = sections.distributed()
DEBUG_NANS = sections.debug_nans()
SECTIONS: dict[str, type[Any]] = {
    "model": rlhf_run.ModelConfig,
    "warm_start": rlhf_run.SupervisedConfig,
    "preferences": rlhf_run.PreferenceConfig,
    "reward_model": rlhf_run.RewardModelConfig,
    "rollout": rlhf_run.GroupConfig,
    "loss": rlhf_run.LossConfig,
    "optimizer": rlhf_run.OptimizerConfig,
    "update": training.UpdateConfig,
    "train": rlhf_run.TrainConfig,
    "mesh": sharding.MeshConfig,
    "checkpoints": CheckpointConfig,
}
# A step is one wave: the KL to the start is measured on what it samples.
SKIPPED = {"rollout": ("max_waves",)}
FLAGS_OF = {name: section(name, cls, skip=SKIPPED.get(name, ())) for name, cls in SECTIONS.items()}
flags.adopt_module_key_flags(sections)  # so that --help shows them
# The report -------------------------------------------------------------------------------------------

LAST = 20  # steps that a number of the summary is a mean of


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def summarize(arms: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Of each arm: proxy and truth at first and last; the best that the truth has been, and the worst since then."""
    made = {}
    for arm, rows in arms.items():
        truth = [
            _mean(rows[max(0, i - LAST) : i], "rewards/rule/mean") for i in range(min(LAST, len(rows)), len(rows) + 1)
        ]
        made[arm] = {
            "truth_first": rows[0]["rewards/rule/mean"], "truth_best": max(truth),
            "truth_worst": min(truth[int(np.argmax(truth)) :]), "truth_last": truth[-1],
            "proxy_first": rows[0]["rewards/proxy/mean"],
            "proxy_last": _mean(rows[-LAST:], "rewards/proxy/mean"),
            "kl_last": _mean(rows[-LAST:], "kl_to_start"),
        }  # fmt: skip
    return made


def table(summaries: dict[int, dict[str, dict[str, float]]]) -> str:
    """Of every seed and arm a line."""
    lines = [
        "| seed | arm | KL to the start | proxy | truth: start | best | worst since | end |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for seed, arms in summaries.items():
        for arm, of in arms.items():
            lines.append(
                f"| {seed} | {arm} | {of['kl_last']:.1f} | {of['proxy_first']:.2f} -> {of['proxy_last']:.2f} | "
                f"{of['truth_first']:.2f} | {of['truth_best']:.2f} | {of['truth_worst']:.2f} | {of['truth_last']:.2f} |"
            )
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Runs, or goes on with, every seed in --workdir."""
    workdir, started = runs.directory_of(argv, WORKDIR), time.perf_counter()
    try:
        process.join_hosts(DISTRIBUTED.value)
        config = runs.configured({name: flag.value for name, flag in FLAGS_OF.items()})
        seeds = sections.seeds_of(SEEDS.value)
        print(process.cache_compilations(CACHE.value), flush=True)
        experiments = {seed: rlhf_run.Experiment(config, seed, debug_nans=DEBUG_NANS.value) for seed in seeds}
    except ValueError as error:
        sys.exit(f"error: {error}")
    # Seeds may be added later.
    workdirs.open_workdir(workdir, {"iterations": ITERATIONS.value, **runs.as_json(config)})
    parameters, rollout = footprint.parameters(config["model"].transformer), config["rollout"]
    mesh = experiments[seeds[0]].mesh
    print(
        f"{process.devices()}; {parameters:,} parameters\n"
        f"{footprint.batch_arithmetic(rollout, config['update'], mesh, rollout.max_tokens)}",
        flush=True,
    )  # fmt: skip
    results = {seed: experiments[seed].run(workdir / f"seed{seed}", ITERATIONS.value) for seed in seeds}
    summaries = {seed: summarize(result["arms"]) for seed, result in results.items()}
    from experiments import plots  # imports matplotlib: half a second

    curves = {arm: [results[seed]["arms"][arm] for seed in seeds] for arm in rlhf_run.ARMS}
    written = {
        "seeds": {
            str(seed): {**summaries[seed], "reward_models": result["reward_models"],
                        "evaluations": result["evaluations"]}
            for seed, result in results.items()
        },
        "wall_seconds": time.perf_counter() - started, "device": process.devices(), "parameters": parameters,
    }  # fmt: skip

    def write() -> None:
        plots.optimization(curves, workdir / "rlhf.png")
        write_atomically(workdir / "summary.json", json.dumps(written, indent=2) + "\n")

    hosts.first_does(write, kind=WorkdirError)
    said = "; ".join(f"{r['reward_models']['first']['accuracy']:.1%}" for r in results.values())
    print(f"{table(summaries)}\nheld-out accuracy of the reward models: {said}; everything is in {workdir}")


if __name__ == "__main__":
    process.command(main)

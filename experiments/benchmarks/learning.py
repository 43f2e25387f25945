"""Whether it learns as TRL does: the same warm start, prompts, rewards and hyperparameters, seed by seed.

python -m experiments.benchmarks.learning --workdir=runs/learning [--seeds=0,1,2] [--train.steps=100]

Countdown, with all flags of experiments.countdown. Its warm start is exported as a Hugging Face directory that both
sides load. The bundled model multiplies a tied embedding by sqrt(width), which no family there does: so it is exported
as a Llama with a head of its own, the embedding holding that factor already. It computes the same, to the bit where the
width is a power of 4, but head and embedding are then two parameters, on both sides alike.

Runs that are finished are read and not repeated; ours goes on where it was interrupted, TRL begins that seed anew.
Writes learning.png to the workdir. Needs `.[parity]`.
"""

import dataclasses
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments import countdown, plots, runs
from experiments.benchmarks import measure
from experiments.flags import check_distinct
from grpo_jax import objectives, workdirs
from grpo_jax.models.pretrained import load, read_config, save
from grpo_jax.telemetry import read_jsonl, write_atomically

SIDES = ("ours", "trl")
STEPS = 100  # of a run, where --train.steps does not say


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(measure.Output):
    """Which runs."""

    seeds: tuple[int, ...] = (0, 1, 2)  # of the prompts and of all sampling: a run of each side for each

    def __post_init__(self) -> None:
        check_distinct("seeds", self.seeds)


def export(config: Mapping[str, Any], workdir: pathlib.Path) -> pathlib.Path:
    """The warm start of a configuration as a Hugging Face directory of the workdir."""
    directory = workdir / "model"
    if not directory.exists():
        params, model = countdown.warm_start(countdown.Experiment(dict(config)), workdir), config["model"]
        embedding = params["embedding"]
        params = {**params, "head": embedding, "embedding": embedding * np.float32(model.width**0.5)}
        untied = dataclasses.replace(model, tied=False, scale_embedding=False, compute_dtype="float32")
        save(directory, params, untied, extra={"eos_token_id": countdown.Countdown.tokenizer.eos_ids[0]})
    return directory


def seeded(config: Mapping[str, Any], directory: pathlib.Path, seed: int) -> dict[str, Any]:
    """The configuration of one run, with the exported model's shape."""
    train = dataclasses.replace(config["train"], seed=seed)
    return {**config, "train": train, "model": read_config(directory)}


def check(config: Mapping[str, Any]) -> None:
    """Raises ValueError where the two cannot be given the same hyperparameters."""
    given = dataclasses.asdict(config["loss"])
    if given != dataclasses.asdict(objectives.LossConfig(kl_coef=given["kl_coef"])):
        raise ValueError("--loss.*: of the objective only --loss.kl_coef can be another here.")
    if config["advantages"] != type(config["advantages"])():
        raise ValueError("--advantages.*: leave them out here.")
    update, rollout = config["update"], config["rollout"]
    if (update.epochs, update.minibatches, update.reference_every, rollout.max_waves) != (1, 1, 0, 1) or rollout.stop:
        raise ValueError("one update a rollout here: leave out epochs, minibatches, reference_every, max_waves, stop.")


def run_ours(config: dict[str, Any], directory: pathlib.Path, workdir: pathlib.Path) -> list[dict[str, float]]:
    """The log of one run of ours: reward and seconds by step."""
    experiment = countdown.Experiment(config)
    _, rows = experiment.run(
        load(directory, experiment.mesh), objective=experiment.objective, experience=experiment.rollouts(),
        workdir=workdir, title=f"ours, seed {config['train'].seed}", optimizer=config["optimizer"],
        update=config["update"], steps=config["train"].steps, samples_every=config["train"].samples_every,
    )  # fmt: skip
    return rows[1:]


def run_trl(config: dict[str, Any], directory: pathlib.Path, workdir: pathlib.Path) -> list[dict[str, float]]:
    """The same of TRL's trainer."""
    from experiments.benchmarks import peers

    experiment, rollout, optimizer = countdown.Experiment(config), config["rollout"], config["optimizer"]
    steps, log = config["train"].steps, peers.RewardLog()
    prompts = [experiment.task.source("train")(i) for i in range(steps * rollout.prompts)]
    columns = {"prompt": [p.text for p in prompts]} | {
        name: [p.columns[name] for p in prompts] for name in prompts[0].columns
    }
    schedule = {"constant": "constant_with_warmup"}.get(optimizer.decay, optimizer.decay)
    trainer = peers.grpo_trainer(
        directory, workdir / "out", peers.character_tokenizer(experiment.task.tokenizer.token_bytes), columns,
        [reward.function for reward in experiment.rewards], callbacks=[log],
        reward_weights=[reward.weight for reward in experiment.rewards], beta=config["loss"].kl_coef,
        num_generations=rollout.group_size, max_completion_length=experiment.max_tokens, max_steps=steps,
        per_device_train_batch_size=rollout.prompts * rollout.group_size, learning_rate=optimizer.learning_rate,
        lr_scheduler_type=schedule, warmup_steps=optimizer.warmup_steps, max_grad_norm=optimizer.clip_norm,
        adam_beta1=optimizer.b1, adam_beta2=optimizer.b2, adam_epsilon=optimizer.epsilon,
        weight_decay=optimizer.weight_decay, temperature=rollout.temperature, top_k=rollout.top_k, top_p=rollout.top_p,
        min_p=rollout.min_p or None,
        seed=config["train"].seed,
    )  # fmt: skip
    log.of(trainer)
    trainer.train()
    return log.rows


def finished(side: str, config: dict[str, Any], directory: pathlib.Path, workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The log of one run: read where it is finished, else made now."""
    place = workdir / side / f"seed_{config['train'].seed}"
    workdirs.open_workdir(place, runs.as_json(config))
    path = place / "finished.jsonl"
    if not path.exists():
        started = time.perf_counter()
        rows = {"ours": run_ours, "trl": run_trl}[side](config, directory, place)
        kept = [{name: row[name] for name in ("step", "reward", "time/elapsed_seconds")} for row in rows]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
        shutil.rmtree(place / "out", ignore_errors=True)
        print(f"{side}, seed {config['train'].seed}: {time.perf_counter() - started:.0f} s", flush=True)
    return read_jsonl(path)


def summarized(logs: Mapping[str, Mapping[int, Sequence[Mapping[str, float]]]]) -> dict[str, dict[str, list[float]]]:
    """Of each side, a number a seed: mean reward of the last steps and of all, a step's median time, and all time."""
    last = lambda rows: float(np.mean([row["reward"] for row in rows[-plots.WIDTH :]]))
    clock = lambda rows: [row["time/elapsed_seconds"] for row in rows]
    measured = {}
    for side, seeds in logs.items():
        measured[side] = {
            "final_reward": [last(rows) for rows in seeds.values()],
            "mean_reward": [float(np.mean([row["reward"] for row in rows])) for rows in seeds.values()],
            "step_seconds": [float(np.median(np.diff([0.0, *clock(rows)]))) for rows in seeds.values()],
            "seconds": [clock(rows)[-1] for rows in seeds.values()],
        }
    return measured


def noise(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """How many standard errors lie between two means over seeds (Welch); None of one seed."""
    if len(ours) < 2:
        return None
    error = np.sqrt(np.var(ours, ddof=1) / len(ours) + np.var(theirs, ddof=1) / len(theirs))
    return float((np.mean(ours) - np.mean(theirs)) / max(error, 1e-12))


def compare(config: Mapping[str, Any], options: Options, workdir: pathlib.Path) -> dict[str, Any]:
    """Makes the runs that are not there yet, ours and TRL's in turns; writes the picture and the numbers."""
    measure.need("torch", "transformers", "trl")
    check(config)
    workdir.mkdir(parents=True, exist_ok=True)
    directory = export(config, workdir)
    logs: dict[str, dict[int, Any]] = {side: {} for side in SIDES}
    for seed in options.seeds:
        for side in SIDES:
            logs[side][seed] = finished(side, seeded(config, directory, seed), directory, workdir)
    measured = summarized(logs)
    apart = {name: noise(measured["ours"][name], measured["trl"][name]) for name in ("final_reward", "mean_reward")}
    samples = config["rollout"].prompts * config["rollout"].group_size
    plots.learning(logs, samples, workdir / "learning.png")
    notes = [
        f"{name.replace('_', ' ')}: ours less TRL's is {value:+.2f} standard errors of the difference of the means"
        for name, value in apart.items()
        if value is not None
    ]
    return measure.report(
        "experiments.benchmarks.learning", options, measured, standard_errors_apart=apart, steps=config["train"].steps,
        logs={side: {str(seed): rows for seed, rows in of.items()} for side, of in logs.items()},
        configuration=runs.as_json(config), notes=[*notes, f"learning.png is in {workdir}"],
        command=" ".join(["python -m experiments.benchmarks.learning", *sys.argv[1:]]),
    )  # fmt: skip


def run(options: Options) -> dict[str, Any]:
    """As the flags say, those of experiments.countdown too."""
    workdir = pathlib.Path(countdown.WORKDIR.value)
    return compare(countdown.configuration(workdir), options, workdir)


if __name__ == "__main__":
    from absl import flags

    flags.adopt_module_key_flags(countdown)  # so that --help shows them
    flags.FLAGS.set_default("train.steps", STEPS)
    measure.command(Options, run)

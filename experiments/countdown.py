"""GRPO on Countdown, from a warm start to a held-out evaluation, on a laptop: no download, no accelerator.

python -m experiments.countdown --workdir=runs/countdown
"""

import dataclasses
import functools
import json
import pathlib
import sys
import tempfile
from typing import Any

import flax.serialization
import jax
import numpy as np
from absl import flags

from experiments import flags as sections
from experiments import footprint, games, process, runs
from grpo_jax import objectives, profiling, sharding, storage, workdirs
from grpo_jax.checkpoints import CheckpointConfig
from grpo_jax.data.countdown import Countdown, CountdownConfig
from grpo_jax.evaluation import EvaluationConfig
from grpo_jax.models.transformer import TransformerConfig, abstract_params
from grpo_jax.outcomes import AdvantageConfig
from grpo_jax.rewards import Reward, RewardError
from grpo_jax.rewards.countdown import countdown_accuracy, countdown_format
from grpo_jax.rollouts import RolloutConfig
from grpo_jax.storage import Path
from grpo_jax.telemetry import write_atomically


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run."""

    steps: int = 300  # rollout steps
    seed: int = 0  # of the prompts and of all sampling
    format_reward: float = 0.1  # weight of the format reward beside the accuracy reward of weight 1
    samples_every: int = 50  # steps between sampled completions on the screen

    def __post_init__(self) -> None:
        if min(self.steps, self.samples_every) < 1:
            raise ValueError(f"steps={self.steps} and samples_every={self.samples_every} must be 1 or more.")


BASELINES = flags.DEFINE_bool(
    "baselines", False, "Then also run continued supervision, and supervision on own samples."
)
DETERMINISTIC = sections.deterministic()
WARM_START_ONLY = flags.DEFINE_bool("warm_start_only", False, "Make the warm start, write it to the workdir and stop.")
SECTIONS: dict[str, type[Any]] = {
    "task": CountdownConfig,
    "model": TransformerConfig,
    "warm_start": games.WarmStartConfig,
    "rollout": RolloutConfig,
    "advantages": AdvantageConfig,
    "loss": games.LossConfig,
    "optimizer": games.OptimizerConfig,
    "update": games.UpdateConfig,
    "train": TrainConfig,
    "mesh": sharding.MeshConfig,
    "evaluation": EvaluationConfig,
    "checkpoints": CheckpointConfig,
}
SKIPPED = games.SKIPPED
GIVEN = games.define_flags(SECTIONS)
WORKDIR, EVAL_ONLY, EVAL_STEP, PROFILE, CACHE, DEBUG_NANS = (
    GIVEN.workdir, GIVEN.eval_only, GIVEN.eval_step, GIVEN.profile, GIVEN.cache, GIVEN.debug_nans,
)  # fmt: skip
for module in (games, sections):
    flags.adopt_module_key_flags(module)  # so that --help shows them
SHIPPED_WARM_START = pathlib.Path(__file__).with_name("countdown_warm_start.msgpack")

TRIAL_STEPS = 20  # of a baseline, to see how many fit into a time
ACCURACY = Reward(name="accuracy", function=countdown_accuracy)


def configuration(workdir: Path) -> dict[str, Any]:
    """Every section, from the flags; a run that is only evaluated keeps its own but for how it is evaluated."""
    makers = {name: flag.value for name, flag in GIVEN.sections.items()}
    saved = workdir if EVAL_ONLY.value else None
    return games.configuration(makers, Countdown.tokenizer, saved, GIVEN.reward.value)


class Experiment(games.Experiment):
    """Countdown's pieces."""

    def __init__(self, config: dict[str, Any], *, debug_nans: bool = False):
        form = Reward(name="format", function=countdown_format, weight=config["train"].format_reward)
        super().__init__(config, Countdown, ACCURACY, (ACCURACY, form), debug_nans=debug_nans)


def warm_start(experiment: Experiment, workdir: Path) -> Any:
    """Parameters before GRPO: the shipped file where it fits the flags, else made here (and kept in the workdir)."""
    model = {
        name: value for name, value in dataclasses.asdict(experiment.config["model"]).items() if name in games.MODEL
    }
    described = {name: dataclasses.asdict(experiment.config[name]) for name in ("task", "warm_start")} | {
        "model": {"vocab_size": Countdown.tokenizer.vocab_size, **model}
    }
    if SHIPPED_WARM_START.exists() and not WARM_START_ONLY.value:
        shipped: Any = flax.serialization.msgpack_restore(SHIPPED_WARM_START.read_bytes())
        if json.loads(shipped["configuration"]) == described:
            print(f"warm start: {SHIPPED_WARM_START.name}, shipped with the repository", flush=True)
            return flax.serialization.from_state_dict(abstract_params(experiment.config["model"])[0], shipped["params"])
    config: games.WarmStartConfig = experiment.config["warm_start"]
    print(
        f"warm start: supervision on {config.steps} x {config.batch} demonstrations, since the one shipped with the "
        "repository was made with other --task, --model or --warm_start flags (--warm_start.steps makes it shorter)",
        flush=True,
    )
    params = games.warmed(experiment, workdir)
    packed = {
        "params": flax.serialization.to_state_dict(jax.device_get(params)),
        "configuration": json.dumps(described),
    }
    write_atomically(workdir / "warm_start.msgpack", flax.serialization.msgpack_serialize(packed))
    return params


def run_baselines(experiment: Experiment, params: Any, workdir: Path, seconds: float) -> dict[str, list[Any]]:
    """What could explain the gain away, for the same wall time: more of the same, and the best of one's own.

    Each gets the optimizer of GRPO, its decay too, over as many steps as fit into `seconds`, by a short trial.
    """
    config = experiment.config
    more = games.demonstrations(Countdown(config["task"], config["train"].seed + 1_000_003), config["warm_start"].batch)
    # Completions of the warm start itself, of which only the right ones train.
    own = experiment.rollouts(
        config=dataclasses.replace(config["rollout"], max_waves=1), objective=objectives.supervised(),
        advantages=AdvantageConfig(), params_of=lambda state: params,
        select=lambda s: s.by_name[ACCURACY.name] > 0.5,
    )  # fmt: skip
    curves = {}
    for name, experience in (("continued supervision", more), ("supervision on own correct samples", own)):
        run = functools.partial(
            experiment.run, params, objective=objectives.supervised(), experience=experience, title=name,
            optimizer=config["optimizer"], update=config["update"],
        )  # fmt: skip
        directory = workdir / "baselines" / name.replace(" ", "_")
        if not (directory / "steps").exists():
            with tempfile.TemporaryDirectory() as scratch:
                _, trial = run(workdir=pathlib.Path(scratch), steps=TRIAL_STEPS)
            step_seconds = np.median([row["time/step_seconds"] for row in trial[2:]])  # the first step compiles
            storage.make_directory(directory)
            write_atomically(directory / "steps", str(max(1, round(seconds / step_seconds))))
        _, curves[name] = run(
            workdir=directory, steps=int((directory / "steps").read_text()), evaluator=experiment.evaluator,
            evaluate_every=config["evaluation"].every,
        )  # fmt: skip
    return curves


def main(argv: list[str]) -> None:
    """Runs, goes on with, or evaluates the run in --workdir."""
    workdir = runs.directory_of(argv, WORKDIR)
    if EVAL_STEP.value is not None and not EVAL_ONLY.value:
        sys.exit("error: --eval_step needs --eval_only.")
    if PROFILE.value and (EVAL_ONLY.value or WARM_START_ONLY.value):
        sys.exit("error: --profile is of steps of GRPO: leave it out.")
    if DETERMINISTIC.value:
        process.make_deterministic(workdir)
    try:
        config = configuration(workdir)
        profile = profiling.steps_of(PROFILE.value, config["train"].steps)
        if DETERMINISTIC.value:
            print(process.said_of_deterministic(workdir), flush=True)
        print(process.cache_compilations(CACHE.value), flush=True)
        experiment = Experiment(config, debug_nans=DEBUG_NANS.value)
        experiment.check()
        if not EVAL_ONLY.value:
            print(experiment.check_rewards(workdir), end="", flush=True)
    except RewardError:
        raise  # `process.command` shows where in a user's file it was
    except ValueError as error:
        sys.exit(f"error: {error}")
    if EVAL_ONLY.value:
        games.evaluate_only(experiment, workdir, EVAL_STEP.value)
        return
    workdirs.open_workdir(workdir, runs.as_json(config, DETERMINISTIC.value))
    params = warm_start(experiment, workdir)
    if WARM_START_ONLY.value:
        return
    parameters = footprint.parameters(config["model"])
    task = config["task"]
    print(
        f"jax {jax.__version__} on {jax.devices()[0].device_kind}; {parameters:,} parameters; "
        f"{task.numbers} numbers from 1 to {task.max_number}, targets to {task.max_target}\n"
        f"{footprint.batch_arithmetic(config['rollout'], config['update'], experiment.mesh, experiment.max_tokens)}\n"
        f"{runs.remarks(config['loss'], config['update'])}",
        end="",
        flush=True,
    )
    rows = experiment.train(params, workdir, config["loss"].objective, profile)
    summary = runs.summary(workdir, rows, config["train"].seed, parameters)
    curves = {"GRPO": rows}
    if BASELINES.value:
        curves |= run_baselines(experiment, params, workdir, summary["training_seconds"])
        summary["baselines"] = {name: curves[name][-1] for name in curves if name != "GRPO"}
        from experiments import plots  # imports matplotlib: half a second

        plots.comparison({name: [rows] for name, rows in curves.items()}, workdir / "comparison.png")
    runs.finish(workdir, rows, summary, "Countdown")
    print(
        f"held-out greedy accuracy {summary['accuracy_before']:.1%} -> {summary['accuracy_after']:.1%} in "
        f"{summary['training_seconds']:.0f} s of training; everything is in {workdir}"
    )


if __name__ == "__main__":
    process.command(main)

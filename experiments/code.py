"""GRPO on small programming puzzles, judged by running what the model writes against hidden tests in a sandbox.

python -m experiments.code --workdir=runs/code

A warm start by supervision on imperfect programs, made in the run, and then GRPO by passing tests; on a laptop.
"""

import dataclasses
import functools
import sys
from typing import Any

from absl import flags

from experiments import flags as sections
from experiments import footprint, games, process, runs
from grpo_jax import evaluation, profiling, sharding, workdirs
from grpo_jax.checkpoints import CheckpointConfig
from grpo_jax.data.puzzles import PuzzleConfig, Puzzles
from grpo_jax.models.transformer import TransformerConfig
from grpo_jax.outcomes import AdvantageConfig
from grpo_jax.rewards import Reward, RewardError
from grpo_jax.rewards import code as judges
from grpo_jax.rollouts import RolloutConfig
from grpo_jax.storage import Path

# Defaults for a task of this size, where the library's and Countdown's are for others.


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmStartConfig(games.WarmStartConfig):
    """Supervision on imperfect programs, before GRPO."""

    steps: int = 400  # optimizer steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig(evaluation.EvaluationConfig):
    """What is measured on held-out puzzles."""

    every: int = 20  # steps between greedy evaluations
    prompts: int = 256  # for greedy accuracy
    samples: int = 16  # completions of each prompt for pass@k; k goes up to this


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeConfig(judges.CodeConfig):
    """How programs are judged, and what each may use."""

    cpu_seconds: float = 1.0  # CPU time of a program, whatever else the machine does


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run."""

    steps: int = 60  # rollout steps
    seed: int = 0  # of the puzzles and of all sampling
    samples_every: int = 20  # steps between sampled completions on the screen

    def __post_init__(self) -> None:
        if min(self.steps, self.samples_every) < 1:
            raise ValueError(f"steps={self.steps} and samples_every={self.samples_every} must be 1 or more.")


SECTIONS: dict[str, type[Any]] = {
    "task": PuzzleConfig,
    "code": CodeConfig,
    "model": TransformerConfig,
    "warm_start": WarmStartConfig,
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


class Experiment(games.Experiment):
    """The puzzles' pieces."""

    def __init__(self, config: dict[str, Any], *, debug_nans: bool = False):
        """Raises RewardError where programs cannot be isolated."""
        self.judge = judges.CodeReward(config["code"])
        strict = Reward(name="accuracy", function=self.judge.strict())
        super().__init__(config, Puzzles, strict, (Reward(name="tests", function=self.judge),), debug_nans=debug_nans)


def main(given: games.Given, argv: list[str]) -> None:
    """Runs, goes on with, or evaluates the run in --workdir."""
    workdir = runs.directory_of(argv, given.workdir)
    if given.eval_step.value is not None and not given.eval_only.value:
        sys.exit("error: --eval_step needs --eval_only.")
    try:
        makers = {name: flag.value for name, flag in given.sections.items()}
        saved = workdir if given.eval_only.value else None
        config = games.configuration(makers, Puzzles.tokenizer, saved, given.reward.value)
        profile = profiling.steps_of(given.profile.value, config["train"].steps)
        print(process.cache_compilations(given.cache.value), flush=True)
        experiment = Experiment(config, debug_nans=given.debug_nans.value)
        experiment.check()
        if not given.eval_only.value:
            print(experiment.check_rewards(workdir), end="", flush=True)
    except RewardError:
        raise  # `process.command` says it, and where in a user's file it was
    except ValueError as error:
        sys.exit(f"error: {error}")
    if given.eval_only.value:
        games.evaluate_only(experiment, workdir, given.eval_step.value)
        return
    workdirs.open_workdir(workdir, runs.as_json(config))
    run(experiment, workdir, profile)


def run(experiment: Experiment, workdir: Path, profile: range = range(0)) -> None:
    """A warm start, GRPO, and what came of it."""
    config = experiment.config
    params = games.warmed(experiment, workdir)
    print(description(experiment), end="", flush=True)
    rows = experiment.train(params, workdir, config["loss"].objective, profile)
    summary = runs.summary(workdir, rows, config["train"].seed, footprint.parameters(config["model"]))
    runs.finish(workdir, rows, summary, "Programming puzzles")
    print(
        f"held-out greedy accuracy {summary['accuracy_before']:.1%} -> {summary['accuracy_after']:.1%} in "
        f"{summary['training_seconds']:.0f} s of training; everything is in {workdir}"
    )


def description(experiment: Experiment) -> str:
    """What runs, in lines."""
    config = experiment.config
    return (
        f"{process.devices()}; {footprint.parameters(config['model']):,} parameters\n"
        f"{footprint.batch_arithmetic(config['rollout'], config['update'], experiment.mesh, experiment.max_tokens)}\n"
        f"{runs.remarks(config['loss'], config['update'])}"
    )


if __name__ == "__main__":
    GIVEN = games.define_flags(SECTIONS)
    for module in (games, sections):
        flags.adopt_module_key_flags(module)  # so that --help shows them
    process.command(functools.partial(main, GIVEN))

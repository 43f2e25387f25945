"""Supervised fine-tuning on the worked solutions of the same problems: a warm start for GRPO.

python -m experiments.sft --model=Qwen2.5-0.5B --workdir=runs/sft

The completion that is learned is the published solution, and the end; `--data.*` means what it means for
experiments.gsm8k, so that both put problems to the model in the same words.
"""

import dataclasses
import sys
from typing import Any

import jax
from absl import flags

from experiments import flags as sections
from experiments import footprint, phases, process, runs, tasks
from experiments.flags import section
from grpo_jax import objectives, optimizers, profiling, sharding, training, workdirs
from grpo_jax.checkpoints import CheckpointConfig
from grpo_jax.data import sources
from grpo_jax.demonstrations import Demonstrations
from grpo_jax.models import lora, pretrained
from grpo_jax.storage import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(optimizers.OptimizerConfig):
    """An optimizer with warm-up, a schedule, and clipping by global norm."""

    learning_rate: float = 1e-5  # at its peak
    decay: str = "cosine"  # after the warm-up: constant, linear or cosine to 0 at the end


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run."""

    steps: int = 350  # optimizer steps
    batch: int = 64  # demonstrations a step
    max_tokens: int = 512  # longer solutions are dropped, and counted; completions in evaluations end there
    seed: int = 0  # of the order of the problems

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.max_tokens) < 1 or self.seed < 0:
            raise ValueError(
                f"steps={self.steps}, batch={self.batch} and max_tokens={self.max_tokens} must be 1 or more, "
                f"seed={self.seed} 0 or more."
            )


WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where everything is written; an interrupted run there goes on.", required=True
)
MODEL = flags.DEFINE_string("model", None, "A Hugging Face directory: config, safetensors, tokenizer.", required=True)
PROFILE = sections.profile()
CACHE = sections.compilation_cache()
DETERMINISTIC = sections.deterministic()
DEBUG_NANS = sections.debug_nans()
DISTRIBUTED = sections.distributed()
SECTIONS: dict[str, type[Any]] = {
    "policy": tasks.ModelConfig,
    "lora": lora.LoraConfig,
    "data": tasks.DataConfig,
    "optimizer": OptimizerConfig,
    "update": training.UpdateConfig,
    "train": TrainConfig,
    "mesh": sharding.MeshConfig,
    "evaluation": tasks.EvaluationConfig,
    "checkpoints": CheckpointConfig,
}
FLAGS_OF = {name: section(name, cls) for name, cls in SECTIONS.items()}
flags.adopt_module_key_flags(sections)  # so that --help shows them


class Experiment(tasks.Opened):
    """The pieces of one configuration, without the parameters."""

    def __init__(self, model: Path, config: dict[str, Any]):
        """Raises ValueError, before anything expensive starts, where the pieces do not fit together."""
        self.config, train = config, config["train"]
        super().__init__(model, config)
        self.policy = lora.adapted_policy(self.policy, self.model, config["lora"])
        shapes, _ = lora.abstract(self.model, config["lora"])
        training.check_divides(train.batch, config["update"], self.mesh)
        runs.check_offload(config["optimizer"], self.mesh)
        self.evaluator = self.task.evaluator(
            self.policy,
            self.mesh,
            config["evaluation"],
            max_tokens=train.max_tokens,
            stop=(),
            copies=footprint.copies_held(self.policy, shapes, config["optimizer"]),
        )
        fits = lambda prompt: len(self.tokenizer.encode(prompt.columns["solution"], continues=True)) < train.max_tokens
        self.prompts = [prompt for prompt in self.task.train if fits(prompt)]
        if not self.prompts:
            raise ValueError(f"no solution has fewer than train.max_tokens={train.max_tokens} tokens: raise it.")

    def demonstrations(self) -> Demonstrations:
        """Problems and their published solutions, in their order by seed."""
        train, source = self.config["train"], sources.shuffled(self.prompts, self.config["train"].seed)
        return Demonstrations(
            source=lambda cursor: (source(cursor).text, source(cursor).columns["solution"]), tokenizer=self.tokenizer,
            batch=train.batch, max_prompt_tokens=self.config["data"].max_prompt_tokens, max_tokens=train.max_tokens,
            end_id=self.task.end_id,
        )  # fmt: skip


def main(argv: list[str]) -> None:
    """Trains, or goes on with, the run in --workdir, and exports the model."""
    workdir, model = runs.directory_of(argv, WORKDIR), runs.place_of(MODEL)
    if DETERMINISTIC.value:
        process.make_deterministic(workdir)
    try:
        process.join_hosts(DISTRIBUTED.value)
        config = runs.configured({name: flag.value for name, flag in FLAGS_OF.items()})
        profile = profiling.steps_of(PROFILE.value, config["train"].steps)
        if DETERMINISTIC.value:
            print(process.said_of_deterministic(workdir), flush=True)
        print(process.cache_compilations(CACHE.value), flush=True)
        experiment = Experiment(runs.description(model, workdir), config)
        sections.check_debugging(DEBUG_NANS.value, experiment.mesh)
    except ValueError as error:
        sys.exit(f"error: {error}")
    train, parameters, count = config["train"], footprint.parameters(experiment.model), len(experiment.prompts)
    dropped = len(experiment.task.train) - count
    print(
        f"{process.devices()}; {parameters:,} parameters of {model}"
        f"{footprint.trains(experiment.model, config['lora'])}\n"
        f"{count} demonstrations ({dropped} more, the end included, have more than {train.max_tokens} tokens); "
        f"{train.batch} a step, an epoch is {count / train.batch:.1f} steps",
        flush=True,
    )
    workdirs.open_workdir(workdir, {"model": str(model), **runs.as_json(config, DETERMINISTIC.value)})
    runs.keep_description(model, workdir)
    state, rows = phases.phase(
        lambda: pretrained.load(model, experiment.mesh, dtype=config["lora"].base_dtype), policy=experiment.policy,
        model=experiment.model,
        mesh=experiment.mesh, key=jax.random.key(train.seed), objective=objectives.supervised(),
        experience=experiment.demonstrations(), workdir=workdir, title="sft", optimizer=config["optimizer"],
        update=config["update"], steps=train.steps, checkpoints=config["checkpoints"], evaluator=experiment.evaluator,
        evaluate_every=config["evaluation"].every, profile=profile, lora=config["lora"], debug_nans=DEBUG_NANS.value,
    )  # fmt: skip
    export = runs.export(workdir, state.params, experiment.model, lora=config["lora"])
    summary = runs.summary(workdir, rows, train.seed, parameters)
    runs.finish(workdir, rows, summary, "supervised")
    print(
        f"test accuracy ({config['data'].judge}, greedy) {summary['accuracy_before']:.1%} -> "
        f"{summary['accuracy_after']:.1%} in {summary['training_seconds']:.0f} s of training; the model is in {export}"
    )


if __name__ == "__main__":
    process.command(main)

"""GRPO on GSM8K from a Hugging Face directory to a Hugging Face directory.

python -m experiments.gsm8k --model=Qwen2.5-0.5B --workdir=runs/gsm8k

The defaults follow SimpleRL-Zoo (arXiv 2503.18892) for base models from 0.5B to 14B: its simple prompt, groups of 8 at
temperature 1, optimizer steps of 256 prompts, learning rate 5e-7, KL coefficient 1e-4, clipping at 0.2, and the right
answer as the only reward. Departures: a rollout is 256 prompts and not 1,024, so that every optimizer step is
on-policy; completions end at 512 tokens and not 8,192, and at a stop string; no entropy bonus; 10 steps of warm-up;
GSM8K alone, without the easiest of MATH; the last number is the answer. For instruct models, verl's recipe:

    --data.template=chat --data.instruction=gsm8k --data.judge=strict --loss.kl_coef=1e-3 --optimizer.learning_rate=1e-6

With `--lora.rank=16 --optimizer.learning_rate=1e-5` adapters train, and the model is frozen and its own reference.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from experiments import flags as sections
from experiments import footprint, phases, process, runs, scorers, tasks, user_rewards
from experiments.flags import section
from grpo_jax import objectives, optimizers, outcomes, profiling, rollouts, sharding, training, workdirs
from grpo_jax.checkpoints import CheckpointConfig
from grpo_jax.data import sources
from grpo_jax.models import lora, pretrained
from grpo_jax.rewards import Reward, RewardError
from grpo_jax.sampler import Sampler
from grpo_jax.storage import Path

# Defaults for pretrained models, where the library's are for any.


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig(rollouts.RolloutConfig):
    """What is sampled at every step: prompts x group_size completions."""

    prompts: int = 256  # prompts a step
    max_tokens: int = 512  # a completion is cut there
    stop: tuple[str, ...] = ("\nQuestion:",)  # strings that end a completion too, as a Python tuple: ('Question:',)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig(objectives.LossConfig):
    """The objective of GRPO."""

    kl_coef: float = 1e-4  # beta; 0: no reference is held and no reference pass runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(optimizers.OptimizerConfig):
    """An optimizer with warm-up, a schedule, and clipping by global norm."""

    learning_rate: float = 5e-7  # at its peak
    b2: float = 0.999  # decay of Adam's mean of squares


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateConfig(training.UpdateConfig):
    """How one rollout becomes optimizer steps: epochs x minibatches of them."""

    microbatches: int = 64  # parts of a minibatch, one after the other; saves memory, and short completions fill fewer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run."""

    steps: int = 200  # rollout steps
    seed: int = 0  # of the order of the problems and of all sampling
    samples_every: int = 10  # steps between sampled completions on the screen

    def __post_init__(self) -> None:
        if min(self.steps, self.samples_every) < 1 or self.seed < 0:
            raise ValueError(
                f"steps={self.steps} and samples_every={self.samples_every} must be 1 or more, seed={self.seed} 0 or "
                "more."
            )


MODEL = flags.DEFINE_string(
    "model", None, "A directory as downloaded from the Hugging Face hub: config, safetensors, tokenizer.", required=True
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where everything is written; an interrupted run there goes on.", required=True
)
REWARD = sections.rewards()
PROFILE = sections.profile()
CACHE = sections.compilation_cache()
DETERMINISTIC = sections.deterministic()
DEBUG_NANS = sections.debug_nans()
DISTRIBUTED = sections.distributed()
SECTIONS: dict[str, type[Any]] = {
    "policy": tasks.ModelConfig,
    "lora": lora.LoraConfig,
    "data": tasks.DataConfig,
    "reward": tasks.RewardConfig,
    "reward_model": scorers.RewardModelConfig,
    "rollout": RolloutConfig,
    "advantages": outcomes.AdvantageConfig,
    "loss": LossConfig,
    "optimizer": OptimizerConfig,
    "update": UpdateConfig,
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
        self.config = config
        super().__init__(model, config)
        self.policy = lora.adapted_policy(self.policy, self.model, config["lora"])
        self.key, self.objective = jax.random.key(config["train"].seed), objectives.make_objective(config["loss"])
        rollout = config["rollout"]
        if not rollout.max_tokens:
            raise ValueError("rollout.max_tokens=0 must be 1 or more: GSM8K says nothing about how long answers are.")
        training.check_divides(rollout.prompts * rollout.group_size, config["update"], self.mesh)
        training.check_reference(self.objective, config["update"], self.policy)
        runs.check_offload(config["optimizer"], self.mesh)
        runs.check_multiples(self.mesh, {"rollout.prompts": rollout.prompts})
        self.surplus = rollouts.surplus_of(
            rollout, self.objective, max_prompt_tokens=config["data"].max_prompt_tokens, max_tokens=rollout.max_tokens
        )
        users = config["rewards"].rewards if "rewards" in config else ()
        self.rewards = self.task.rewards(config["reward"], rollout.max_tokens, users)
        shapes, axes = lora.abstract(self.model, config["lora"])
        self.copies = footprint.copies_held(self.policy, shapes, config["optimizer"], config["loss"])
        judge = config["reward_model"]
        self.scorer = scorers.OpenedScorer(judge, self.mesh) if judge.directory else None
        self.own_bytes = sharding.device_bytes(shapes, axes, self.mesh)
        # What a reward model takes of the memory, in the sampler's measure.
        copies = self.copies + (math.ceil(self.scorer.bytes / self.own_bytes) if self.scorer else 0)
        self.evaluator = self.task.evaluator(
            self.policy, self.mesh, config["evaluation"], max_tokens=rollout.max_tokens, stop=rollout.stop,
            copies=copies,
        )  # fmt: skip
        self.sampler = Sampler(
            self.policy, self.mesh, self.tokenizer, group_size=rollout.group_size, max_tokens=rollout.max_tokens,
            max_prompt_tokens=config["data"].max_prompt_tokens, key=jax.random.fold_in(self.key, 0),
            stop=rollout.stop, slots=rollout.slots, copies=copies,
        )  # fmt: skip

    def check_rewards(self, workdir: Path, rewards: Sequence[Reward]) -> str:
        """What `user_rewards.check_rewards` says of all that train; RewardError where one is wrong."""
        return user_rewards.check_rewards(
            workdir, self.config, rewards, lambda: self.task.right_answers(2), self.tokenizer, self.task.end_id
        )  # fmt: skip

    def rollouts(self) -> rollouts.GroupRollouts:
        """GRPO's experience, from the training problems in their order by seed."""
        rollout = self.config["rollout"]
        beside = (
            [self.scorer.reward(self.tokenizer, held=math.ceil(self.copies * self.own_bytes))] if self.scorer else []
        )
        return rollouts.GroupRollouts(
            sampler=self.sampler,
            source=sources.shuffled(self.task.train, self.config["train"].seed),
            rewards=[*self.rewards, *beside],
            config=rollout,
            advantages=self.config["advantages"],
            objective=self.objective,
            reference_logprobs=training.make_reference_logprobs(self.policy, self.config["update"], self.mesh),
        )

    def print_plan(self) -> int:
        """Says what is about to happen; returns the number of parameters."""
        config, rollout = self.config, self.config["rollout"]
        parameters = footprint.parameters(self.model)
        estimate = footprint.estimate(
            self.model, self.policy, self.mesh, self.sampler, rollout=rollout, update=config["update"],
            optimizer=config["optimizer"], loss=config["loss"], adapters=config["lora"],
        )  # fmt: skip
        epoch = len(self.task.train) / rollout.prompts
        print(
            f"{process.devices()}; {parameters:,} parameters of {MODEL.value}"
            f"{footprint.trains(self.model, config['lora'])}\n"
            f"{footprint.batch_arithmetic(rollout, config['update'], self.mesh, rollout.max_tokens)}\n"
            f"{runs.remarks(config['loss'], config['update'])}"
            f"{len(self.task.train)} training problems, an epoch is {epoch:.1f} steps; {len(self.task.test)} test "
            f"problems\n{footprint.line(estimate)}",
            flush=True,
        )
        return parameters


def main(argv: list[str]) -> None:
    """Trains, or goes on with, the run in --workdir, and exports the final policy."""
    workdir, model = runs.directory_of(argv, WORKDIR), runs.place_of(MODEL)
    if DETERMINISTIC.value:
        process.make_deterministic(workdir)
    try:
        process.join_hosts(DISTRIBUTED.value)
        config = runs.configured({name: flag.value for name, flag in FLAGS_OF.items()})
        config |= user_rewards.named(REWARD.value)
        profile = profiling.steps_of(PROFILE.value, config["train"].steps)
        if DETERMINISTIC.value:
            print(process.said_of_deterministic(workdir), flush=True)
        print(process.cache_compilations(CACHE.value), flush=True)
        experiment = Experiment(runs.description(model, workdir), config)
        sections.check_debugging(DEBUG_NANS.value, experiment.mesh)
        experience, parameters = experiment.rollouts(), experiment.print_plan()
        print(experiment.check_rewards(workdir, experience.rewards), end="", flush=True)
    except RewardError:
        raise  # `process.command` shows where in a user's file it was
    except ValueError as error:
        sys.exit(f"error: {error}")
    workdirs.open_workdir(workdir, {"model": str(model), **runs.as_json(config, DETERMINISTIC.value)})
    runs.keep_description(model, workdir)
    state, rows = phases.phase(
        lambda: pretrained.load(model, experiment.mesh, dtype=config["lora"].base_dtype), policy=experiment.policy,
        model=experiment.model,
        mesh=experiment.mesh, key=experiment.key, objective=experiment.objective, experience=experience,
        workdir=workdir, title=config["loss"].objective, optimizer=config["optimizer"], update=config["update"],
        steps=config["train"].steps, checkpoints=config["checkpoints"], evaluator=experiment.evaluator,
        evaluate_every=config["evaluation"].every, samples_every=config["train"].samples_every,
        surplus=experiment.surplus, profile=profile, lora=config["lora"], debug_nans=DEBUG_NANS.value,
    )  # fmt: skip
    export = runs.export(workdir, state.params, experiment.model, lora=config["lora"])
    summary = runs.summary(workdir, rows, config["train"].seed, parameters)
    runs.finish(workdir, rows, summary, "GSM8K")
    print(
        f"test accuracy ({config['data'].judge}, greedy) {summary['accuracy_before']:.1%} -> "
        f"{summary['accuracy_after']:.1%} in {summary['training_seconds']:.0f} s of training; the policy is in "
        f"{export}, everything else in {workdir}"
    )


if __name__ == "__main__":
    process.command(main)

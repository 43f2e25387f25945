"""What experiments with a small model and generated problems share: their pieces, and a warm start made in the run."""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
from absl import flags

from experiments import flags as experiment_flags
from experiments import footprint, phases, runs, user_rewards
from grpo_jax import objectives, optimizers, sharding, training
from grpo_jax.checkpoints import CheckpointConfig
from grpo_jax.data.sources import Source
from grpo_jax.data.tokenizer import ByteTokenizer
from grpo_jax.demonstrations import Demonstrations
from grpo_jax.evaluation import Evaluator
from grpo_jax.models.transformer import TransformerConfig, abstract_params, init_params, make_policy
from grpo_jax.rewards import Reward
from grpo_jax.rollouts import GroupRollouts, surplus_of
from grpo_jax.sampler import Sampler
from grpo_jax.storage import Path
from grpo_jax.types import TrainState

__all__ = [
    "MODEL",
    "SKIPPED",
    "Experiment",
    "Given",
    "LossConfig",
    "OptimizerConfig",
    "Task",
    "UpdateConfig",
    "WarmStartConfig",
    "configuration",
    "define_flags",
    "demonstrations",
    "evaluate_only",
    "supervised_optimizer",
    "warmed",
]  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmStartConfig:
    """Supervision on imperfect demonstrations, before GRPO."""

    steps: int = 10_000  # optimizer steps
    batch: int = 64  # demonstrations a step
    learning_rate: float = 3e-3  # at its peak; cosine to 0
    seed: int = 0  # of the initial parameters and of the demonstrations

    def __post_init__(self) -> None:
        if min(self.steps, self.batch) < 1 or self.learning_rate <= 0:
            raise ValueError(
                f"steps={self.steps}, batch={self.batch} and learning_rate={self.learning_rate} must be above 0."
            )


# Defaults for a model of this size, where the library's are for language models of the usual sizes.


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig(objectives.LossConfig):
    """The objective of GRPO."""

    kl_coef: float = 0.01  # beta; 0: no reference is held and no reference pass runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(optimizers.OptimizerConfig):
    """An optimizer with warm-up, a schedule, and clipping by global norm."""

    learning_rate: float = 5e-4
    decay: str = "linear"  # after the warm-up: constant, linear or cosine to 0 at the end


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateConfig(training.UpdateConfig):
    """How one rollout becomes optimizer steps: epochs x minibatches of them."""

    microbatches: int = 4  # parts of a minibatch, one after the other; they fit the caches of a CPU better


# What makes a model here; the families of pretrained models differ in more, and parameters stay float32 whatever
# computes with them.
MODEL = ("layers", "width", "heads", "kv_heads", "head_width", "mlp_width", "rope_base", "norm_epsilon")
SKIPPED = {f.name for f in dataclasses.fields(TransformerConfig)} - {*MODEL, "compute_dtype", "sampler_dtype"}


class Task(Protocol):
    """Generated problems of a seed, as `data.countdown.Countdown` has them."""

    tokenizer: ByteTokenizer

    @property
    def max_prompt_tokens(self) -> int:
        """The longest prompt there can be, in tokens."""
        ...

    @property
    def max_completion_tokens(self) -> int:
        """What a right answer needs, in tokens."""
        ...

    def problem(self, split: str, index: int) -> Any:
        """Problem `index` of `train` or `held_out`."""
        ...

    def demonstration(self, index: int) -> tuple[Any, str]:
        """Training problem `index`, which has a `prompt`, and what an imperfect demonstrator writes."""
        ...

    def source(self, split: str) -> Source:
        """The problems of a split as prompts."""
        ...


class Experiment:
    """The pieces of one configuration, built once and shared by the phases of the run."""

    def __init__(
        self, config: dict[str, Any], make_task: Callable[[Any, int], Task], judge: Reward, rewards: Sequence[Reward],
        *, debug_nans: bool = False,
    ):  # fmt: skip
        """`make_task` of the section `task` and a seed; `judge` says right or wrong, `rewards` train.

        `debug_nans`: as `phases.phase` says, in every phase.
        """
        self.config, self.make_task, self.debug_nans = config, make_task, debug_nans
        train, rollout = self.config["train"], self.config["rollout"]
        self.mesh = sharding.make_mesh(self.config["mesh"])
        self.policy = make_policy(self.config["model"], self.mesh)
        self.task = make_task(self.config["task"], train.seed)
        self.key, self.objective = jax.random.key(train.seed), objectives.make_objective(config["loss"])
        self.max_tokens = rollout.max_tokens or self.task.max_completion_tokens
        self.rewards = (*rewards, *(config["rewards"].rewards if "rewards" in config else ()))
        sizes = {"max_tokens": self.max_tokens, "max_prompt_tokens": self.task.max_prompt_tokens}
        shapes, _ = abstract_params(config["model"])
        copies = footprint.copies_held(self.policy, shapes, config["optimizer"], config["loss"])
        tokenizer = self.task.tokenizer
        self.sampler = Sampler(
            self.policy,
            self.mesh,
            tokenizer,
            group_size=rollout.group_size,
            stop=rollout.stop,
            slots=rollout.slots,
            key=jax.random.fold_in(self.key, 0),
            copies=copies,
            **sizes,
        )
        self.surplus = surplus_of(rollout, self.objective, **sizes)
        # Other tasks and seeds share no held-out problem with training: being held out is a property of a problem.
        self.evaluator = Evaluator(
            self.policy, self.mesh, tokenizer, make_task(self.config["task"], 0).source("held_out"), (judge,),
            self.config["evaluation"], key=jax.random.key(0), copies=copies, **sizes,
        )  # fmt: skip

    def check(self) -> None:
        """Raises ValueError where sizes do not fit together, before anything expensive starts."""
        experiment_flags.check_debugging(self.debug_nans, self.mesh)
        rollout = self.config["rollout"]
        training.check_divides(rollout.prompts * rollout.group_size, self.config["update"], self.mesh)
        training.check_reference(self.objective, self.config["update"], self.policy)
        runs.check_offload(self.config["optimizer"], self.mesh)
        sizes = {"rollout.prompts": rollout.prompts, "warm_start.batch": self.config["warm_start"].batch}
        runs.check_multiples(self.mesh, sizes)
        self.task.problem("held_out", 0)
        self.rollouts()

    def check_rewards(self, workdir: Path) -> str:
        """What `user_rewards.check_rewards` says of them; RewardError where one is wrong."""
        source, problem, tokenizer = self.task.source("train"), self.task.problem, self.task.tokenizer
        samples = lambda: [(source(i), problem("train", i).solution) for i in range(2)]
        return user_rewards.check_rewards(
            workdir, self.config, self.rewards, samples, tokenizer, tokenizer.eos_ids[0]
        )  # fmt: skip

    def rollouts(self, **changes: Any) -> GroupRollouts:
        """GRPO's experience, from training problems."""
        options = {"config": self.config["rollout"], "advantages": self.config["advantages"]}
        return GroupRollouts(
            sampler=self.sampler, source=self.task.source("train"), rewards=self.rewards,
            reference_logprobs=training.make_reference_logprobs(self.policy, self.config["update"], self.mesh),
            **{"objective": self.objective, **options, **changes},
        )  # fmt: skip

    def run(self, params: Any, **options: Any) -> tuple[TrainState, list[dict[str, Any]]]:
        """One phase from `params`, with the options of `phases.phase`."""
        config, shared = self.config, {"policy": self.policy, "mesh": self.mesh, "key": self.key}
        shared |= {"model": config["model"], "checkpoints": config["checkpoints"], "debug_nans": self.debug_nans}
        return phases.phase(lambda: params, **{**shared, **options})

    def train(
        self, params: Any, workdir: Path, title: str, profile: range = range(0)
    ) -> list[dict[str, Any]]:  # fmt: skip
        """The phase with the objective that the flags name, from `params`: its log."""
        config = self.config
        _, rows = self.run(
            params, objective=self.objective, experience=self.rollouts(), workdir=workdir, title=title,
            optimizer=config["optimizer"], update=config["update"], steps=config["train"].steps,
            evaluator=self.evaluator, evaluate_every=config["evaluation"].every,
            samples_every=config["train"].samples_every, surplus=self.surplus, profile=profile,
        )  # fmt: skip
        return rows


def configuration(
    makers: Mapping[str, Callable[..., Any]], tokenizer: ByteTokenizer, saved: Path | None,
    rewards: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """Every section, from the flags; a run that is only evaluated keeps its own but for how it is evaluated.

    Args:
      makers: of each section.
      tokenizer: which says how large the model's vocabulary is.
      saved: the workdir of that run.
      rewards: what `--reward` names; nothing to a run that is only evaluated.
    """
    makers = {**makers, "model": functools.partial(makers["model"], vocab_size=tokenizer.vocab_size)}
    if saved is None:
        return runs.configured(makers) | user_rewards.named(rewards)
    kept = runs.saved_configuration(saved)
    kept["optimizer"]["offload"] = False  # nothing is updated, and the devices may be others
    return runs.configured(makers, {name: kept[name] for name in kept if name not in ("evaluation", "mesh")})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given:
    """The flags of an experiment, before and after the command line is read."""

    workdir: "flags.FlagHolder[str]"
    eval_only: "flags.FlagHolder[bool]"
    eval_step: "flags.FlagHolder[int | None]"
    reward: "flags.FlagHolder[list[str]]"
    profile: "flags.FlagHolder[str | None]"
    cache: "flags.FlagHolder[str | None]"
    debug_nans: "flags.FlagHolder[bool]"
    sections: Mapping[str, experiment_flags.Section[Any]]  # by name


def define_flags(sections: Mapping[str, type[Any]]) -> Given:
    """Flags for what every experiment takes, and `--section.field` for each field of its sections."""
    return Given(
        workdir=flags.DEFINE_string(
            "workdir", None, "Where everything is written; an interrupted run there goes on.", required=True
        ),
        eval_only=flags.DEFINE_bool("eval_only", False, "Evaluate a checkpoint of the workdir and stop."),
        eval_step=flags.DEFINE_integer(
            "eval_step", None, "The checkpoint that --eval_only takes; the latest by default."
        ),
        reward=experiment_flags.rewards(),
        profile=experiment_flags.profile(),
        cache=experiment_flags.compilation_cache(),
        debug_nans=experiment_flags.debug_nans(),
        sections={
            name: experiment_flags.section(name, cls, skip=SKIPPED if name == "model" else ())
            for name, cls in sections.items()
        },
    )


def demonstrations(task: Task, batch: int) -> Demonstrations:
    """Supervised experience from a task's imperfect demonstrator."""

    def source(cursor: int) -> tuple[str, str]:
        problem, text = task.demonstration(cursor)
        return problem.prompt, text

    return Demonstrations(
        source=source, tokenizer=task.tokenizer, batch=batch, max_prompt_tokens=task.max_prompt_tokens,
        max_tokens=task.max_completion_tokens, end_id=task.tokenizer.eos_ids[0],
    )  # fmt: skip


def supervised_optimizer(config: Mapping[str, Any], decay: str) -> optimizers.OptimizerConfig:
    """Of a warm start, from the sections; it gives up where GRPO's does."""
    return optimizers.OptimizerConfig(
        learning_rate=config["warm_start"].learning_rate, warmup_steps=100, decay=decay,
        max_skipped=config["optimizer"].max_skipped,
    )  # fmt: skip


def warmed(experiment: Experiment, workdir: Path) -> Any:
    """Parameters after supervision on imperfect demonstrations, in `workdir`/warm_start."""
    config: WarmStartConfig = experiment.config["warm_start"]
    state, _ = experiment.run(
        init_params(experiment.config["model"], jax.random.key(config.seed)), objective=objectives.supervised(),
        experience=demonstrations(experiment.make_task(experiment.config["task"], config.seed), config.batch),
        workdir=workdir / "warm_start", title="warm start", optimizer=supervised_optimizer(experiment.config, "cosine"),
        update=training.UpdateConfig(), steps=config.steps, checkpoints=CheckpointConfig(every=1000),
    )  # fmt: skip
    return state.params


def evaluate_only(experiment: Experiment, workdir: Path, step: int | None) -> None:
    """Evaluates a checkpoint of the workdir in full and prints the result as JSON."""
    config = experiment.config
    try:
        state = phases.restored(
            workdir, step, policy=experiment.policy, model=config["model"], mesh=experiment.mesh,
            optimizer=config["optimizer"], objective=experiment.objective, surplus=experiment.surplus,
        )  # fmt: skip
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(json.dumps({"step": int(state.step), **experiment.evaluator.full(state.params)}))

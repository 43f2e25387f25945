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
from absl import app, flags

from experiments import flags as sections
from experiments import runs, user_rewards
from experiments.flags import section
from grpo_jax import loop, objectives, profiling, sharding, training
from grpo_jax.checkpoints import CheckpointConfig
from grpo_jax.data.countdown import Countdown, CountdownConfig
from grpo_jax.evaluation import EvaluationConfig, Evaluator
from grpo_jax.models.transformer import TransformerConfig, abstract_params, init_params, make_policy
from grpo_jax.outcomes import AdvantageConfig
from grpo_jax.rewards import Reward, RewardError
from grpo_jax.rewards.countdown import countdown_accuracy, countdown_format
from grpo_jax.rollouts import Demonstrations, GroupRollouts, RolloutConfig, surplus_of
from grpo_jax.sampler import Sampler
from grpo_jax.telemetry import write_atomically
from grpo_jax.types import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmStartConfig:
    """Supervision on imperfect demonstrations, before GRPO."""

    steps: int = 10_000  # optimizer steps
    batch: int = 64  # demonstrations a step
    learning_rate: float = 3e-3  # at its peak; cosine to 0
    seed: int = 0  # of the initial parameters and of the demonstrations

    def __post_init__(self) -> None:
        if min(self.steps, self.batch) < 1 or self.learning_rate <= 0:
            raise ValueError(f"{self}: steps, batch and learning_rate must be above 0.")


# Defaults for a model of this size, where the library's are for language models of the usual sizes.


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig(objectives.LossConfig):
    """The objective of GRPO."""

    kl_coef: float = 0.01  # beta; 0: no reference is held and no reference pass runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(training.OptimizerConfig):
    """AdamW with warm-up, a schedule, and clipping by global norm."""

    learning_rate: float = 5e-4
    decay: str = "linear"  # after the warm-up: constant, linear or cosine to 0 at the end


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateConfig(training.UpdateConfig):
    """How one rollout becomes optimizer steps: epochs x minibatches of them."""

    microbatches: int = 4  # parts of a minibatch, one after the other; they fit the caches of a CPU better


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run."""

    steps: int = 300  # rollout steps
    seed: int = 0  # of the prompts and of all sampling
    format_reward: float = 0.1  # weight of the format reward beside the accuracy reward of weight 1
    samples_every: int = 50  # steps between sampled completions on the screen

    def __post_init__(self) -> None:
        if min(self.steps, self.samples_every) < 1:
            raise ValueError(f"{self}: steps and samples_every must be 1 or more.")


WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where everything is written; an interrupted run there goes on.", required=True
)
EVAL_ONLY = flags.DEFINE_bool("eval_only", False, "Evaluate a checkpoint of the workdir and stop.")
EVAL_STEP = flags.DEFINE_integer("eval_step", None, "The checkpoint that --eval_only takes; the latest by default.")
BASELINES = flags.DEFINE_bool(
    "baselines", False, "Then also run continued supervision, and supervision on own samples."
)
WARM_START_ONLY = flags.DEFINE_bool("warm_start_only", False, "Make the warm start, write it to the workdir and stop.")
REWARD = sections.rewards()
PROFILE = sections.profile()
CACHE = sections.compilation_cache()
SECTIONS: dict[str, type[Any]] = {
    "task": CountdownConfig,
    "model": TransformerConfig,
    "warm_start": WarmStartConfig,
    "rollout": RolloutConfig,
    "advantages": AdvantageConfig,
    "loss": LossConfig,
    "optimizer": OptimizerConfig,
    "update": UpdateConfig,
    "train": TrainConfig,
    "mesh": sharding.MeshConfig,
    "evaluation": EvaluationConfig,
    "checkpoints": CheckpointConfig,
}
# What makes a model here; the families of pretrained models differ in more, and parameters stay float32 whatever
# computes with them.
MODEL = ("layers", "width", "heads", "kv_heads", "head_width", "mlp_width", "rope_base", "norm_epsilon")
SKIPPED = {f.name for f in dataclasses.fields(TransformerConfig)} - {*MODEL, "compute_dtype", "sampler_dtype"}
FLAGS_OF = {name: section(name, cls, skip=SKIPPED if name == "model" else ()) for name, cls in SECTIONS.items()}
flags.adopt_module_key_flags(sections)  # so that --help shows them
SHIPPED_WARM_START = pathlib.Path(__file__).with_name("countdown_warm_start.msgpack")

TRIAL_STEPS = 20  # of a baseline, to see how many fit into a time
ACCURACY = Reward(name="accuracy", function=countdown_accuracy)


def configuration(workdir: pathlib.Path) -> dict[str, Any]:
    """Every section, from the flags; a run that is only evaluated keeps its own but for how it is evaluated."""
    makers = {name: flag.value for name, flag in FLAGS_OF.items()}
    makers["model"] = functools.partial(makers["model"], vocab_size=Countdown.tokenizer.vocab_size)
    if not EVAL_ONLY.value:
        return runs.configured(makers) | user_rewards.named(REWARD.value)
    saved = runs.saved_configuration(workdir)
    return runs.configured(makers, {name: saved[name] for name in saved if name not in ("evaluation", "mesh")})


class Experiment:
    """The pieces of one configuration, built once and shared by the phases of the run."""

    def __init__(self, config: dict[str, Any]):
        self.config = config
        train, rollout = self.config["train"], self.config["rollout"]
        self.mesh = sharding.make_mesh(self.config["mesh"])
        self.policy = make_policy(self.config["model"], self.mesh)
        self.task = Countdown(self.config["task"], train.seed)
        self.key, self.objective = jax.random.key(train.seed), objectives.make_objective(config["loss"])
        self.max_tokens = rollout.max_tokens or self.task.max_completion_tokens
        self.rewards = (
            ACCURACY,
            Reward(name="format", function=countdown_format, weight=train.format_reward),
            *(config["rewards"].rewards if "rewards" in config else ()),
        )
        sizes = {"max_tokens": self.max_tokens, "max_prompt_tokens": self.task.max_prompt_tokens}
        tokenizer = self.task.tokenizer
        self.sampler = Sampler(
            self.policy,
            self.mesh,
            tokenizer,
            group_size=rollout.group_size,
            stop=rollout.stop,
            slots=rollout.slots,
            key=jax.random.fold_in(self.key, 0),
            copies=runs.copies_held(config["loss"]),
            **sizes,
        )
        self.surplus = surplus_of(rollout, self.objective, **sizes)
        # Other tasks and seeds share no held-out problem with training: being held out is a property of a problem.
        self.evaluator = Evaluator(
            self.policy, self.mesh, tokenizer, Countdown(self.config["task"], 0).source("held_out"), (ACCURACY,),
            self.config["evaluation"], key=jax.random.key(0), copies=runs.copies_held(config["loss"]), **sizes,
        )  # fmt: skip

    def check(self) -> None:
        """Raises ValueError where sizes do not fit together, before anything expensive starts."""
        rollout = self.config["rollout"]
        training.check_divides(rollout.prompts * rollout.group_size, self.config["update"], self.mesh)
        training.check_reference(self.objective, self.config["update"])
        sizes = {"rollout.prompts": rollout.prompts, "warm_start.batch": self.config["warm_start"].batch}
        runs.check_multiples(self.mesh, sizes)
        self.task.problem("held_out", 0)
        self.rollouts()

    def check_rewards(self) -> str:
        """What the rewards say of a sample, where the user's own are among them; RewardError where one is wrong."""
        if "rewards" not in self.config:
            return ""
        source, problem = self.task.source("train"), self.task.problem
        samples = [(source(i), problem("train", i).solution) for i in range(2)]
        return f"{user_rewards.check(self.rewards, samples, self.task.tokenizer, self.task.tokenizer.eos_ids[0])}\n"

    def rollouts(self, **changes: Any) -> GroupRollouts:
        """GRPO's experience, from training problems."""
        options = {"config": self.config["rollout"], "advantages": self.config["advantages"]}
        return GroupRollouts(
            sampler=self.sampler, source=self.task.source("train"), rewards=self.rewards,
            reference_logprobs=training.make_reference_logprobs(self.policy, self.config["update"], self.mesh),
            **{"objective": self.objective, **options, **changes},
        )  # fmt: skip

    def run(self, params: Any, **options: Any) -> tuple[TrainState, list[dict[str, Any]]]:
        """One phase from `params`, with the options of `runs.phase`."""
        config, shared = self.config, {"policy": self.policy, "mesh": self.mesh, "key": self.key}
        shared |= {"model": config["model"], "checkpoints": config["checkpoints"]}
        return runs.phase(lambda: params, **{**shared, **options})

    def train(
        self, params: Any, workdir: pathlib.Path, title: str, profile: range = range(0)
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


def demonstrations(task: Countdown, batch: int) -> Demonstrations:
    """Supervised experience from a task's imperfect demonstrator."""

    def source(cursor: int) -> tuple[str, str]:
        problem, text = task.demonstration(cursor)
        return problem.prompt, text

    return Demonstrations(
        source=source, tokenizer=task.tokenizer, batch=batch, max_prompt_tokens=task.max_prompt_tokens,
        max_tokens=task.max_completion_tokens, end_id=task.tokenizer.eos_ids[0],
    )  # fmt: skip


def warm_start(experiment: Experiment, workdir: pathlib.Path) -> Any:
    """Parameters before GRPO: the shipped file where it fits the flags, else made here (and kept in the workdir)."""
    model = {name: value for name, value in dataclasses.asdict(experiment.config["model"]).items() if name in MODEL}
    described = {name: dataclasses.asdict(experiment.config[name]) for name in ("task", "warm_start")} | {
        "model": {"vocab_size": Countdown.tokenizer.vocab_size, **model}
    }
    if SHIPPED_WARM_START.exists() and not WARM_START_ONLY.value:
        shipped: Any = flax.serialization.msgpack_restore(SHIPPED_WARM_START.read_bytes())
        if json.loads(shipped["configuration"]) == described:
            print(f"warm start: {SHIPPED_WARM_START.name}, shipped with the repository", flush=True)
            return flax.serialization.from_state_dict(abstract_params(experiment.config["model"])[0], shipped["params"])
    config: WarmStartConfig = experiment.config["warm_start"]
    print(
        f"warm start: supervision on {config.steps} x {config.batch} demonstrations, since the one shipped with the "
        "repository was made with other --task, --model or --warm_start flags (--warm_start.steps makes it shorter)",
        flush=True,
    )
    fresh = init_params(experiment.config["model"], jax.random.key(config.seed))
    state, _ = experiment.run(
        fresh, objective=objectives.supervised(),
        experience=demonstrations(Countdown(experiment.config["task"], config.seed), config.batch),
        workdir=workdir / "warm_start", title="warm start", optimizer=_supervised_optimizer(config, "cosine"),
        update=training.UpdateConfig(), steps=config.steps, checkpoints=CheckpointConfig(every=1000),
    )  # fmt: skip
    packed = {
        "params": flax.serialization.to_state_dict(jax.device_get(state.params)),
        "configuration": json.dumps(described),
    }
    write_atomically(workdir / "warm_start.msgpack", flax.serialization.msgpack_serialize(packed))
    return state.params


def _supervised_optimizer(config: WarmStartConfig, decay: str) -> training.OptimizerConfig:
    return training.OptimizerConfig(learning_rate=config.learning_rate, warmup_steps=100, decay=decay)


def run_baselines(experiment: Experiment, params: Any, workdir: pathlib.Path, seconds: float) -> dict[str, list[Any]]:
    """What could explain the gain away, for the same wall time: more of the same, and the best of one's own.

    Each gets the optimizer of GRPO, its decay too, over as many steps as fit into `seconds`, by a short trial.
    """
    config = experiment.config
    more = demonstrations(Countdown(config["task"], config["train"].seed + 1_000_003), config["warm_start"].batch)
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
            directory.mkdir(parents=True, exist_ok=True)
            write_atomically(directory / "steps", str(max(1, round(seconds / step_seconds))))
        _, curves[name] = run(
            workdir=directory, steps=int((directory / "steps").read_text()), evaluator=experiment.evaluator,
            evaluate_every=config["evaluation"].every,
        )  # fmt: skip
    return curves


def evaluate_only(experiment: Experiment, workdir: pathlib.Path) -> None:
    """Evaluates a checkpoint of the workdir in full and prints the result as JSON."""
    config = experiment.config
    try:
        state = runs.restored(
            workdir, EVAL_STEP.value, policy=experiment.policy, model=config["model"], mesh=experiment.mesh,
            optimizer=config["optimizer"], objective=experiment.objective, surplus=experiment.surplus,
        )  # fmt: skip
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(json.dumps({"step": int(state.step), **experiment.evaluator.full(state.params)}))


def main(argv: list[str]) -> None:
    """Runs, goes on with, or evaluates the run in --workdir."""
    workdir = runs.directory_of(argv, WORKDIR)
    if EVAL_STEP.value is not None and not EVAL_ONLY.value:
        raise app.UsageError("--eval_step needs --eval_only.")
    if PROFILE.value and (EVAL_ONLY.value or WARM_START_ONLY.value):
        raise app.UsageError("--profile is of steps of GRPO: leave it out.")
    try:
        config = configuration(workdir)
        profile = profiling.steps_of(PROFILE.value, config["train"].steps)
        print(runs.cache_compilations(CACHE.value), flush=True)
        experiment = Experiment(config)
        experiment.check()
        if not EVAL_ONLY.value:
            print(experiment.check_rewards() + user_rewards.said_of_changes(workdir, config), end="", flush=True)
    except RewardError:
        raise  # `runs.command` shows where in a user's file it was
    except ValueError as error:
        sys.exit(f"error: {error}")
    if EVAL_ONLY.value:
        evaluate_only(experiment, workdir)
        return
    loop.open_workdir(workdir, runs.as_json(config))
    params = warm_start(experiment, workdir)
    if WARM_START_ONLY.value:
        return
    parameters = runs.parameters(config["model"])
    task = config["task"]
    print(
        f"jax {jax.__version__} on {jax.devices()[0].device_kind}; {parameters:,} parameters; "
        f"{task.numbers} numbers from 1 to {task.max_number}, targets to {task.max_target}\n"
        f"{runs.batch_arithmetic(config['rollout'], config['update'], experiment.mesh, experiment.max_tokens)}\n"
        f"{runs.remarks(config['loss'], config['update'])}"
        "compiling, once: it takes some 20 seconds until the first step",
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
        f"{summary['wall_seconds']:.0f} s; everything is in {workdir}"
    )


if __name__ == "__main__":
    runs.command(main)

"""GRPO on Countdown, from a warm start to a held-out evaluation, on a laptop: no download, no accelerator.

python -m experiments.countdown --workdir=runs/countdown
"""

import dataclasses
import functools
import json
import pathlib
import platform
import resource
import sys
import tempfile
import time
import traceback
from importlib import metadata
from typing import Any

_STARTED = time.perf_counter()

import flax.serialization  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
from absl import app, flags, logging  # noqa: E402

from experiments import flags as sections  # noqa: E402
from experiments import plots  # noqa: E402
from experiments.flags import section  # noqa: E402
from grpo_jax import loop, objectives, sharding, training  # noqa: E402
from grpo_jax.checkpoints import CheckpointConfig, Checkpoints  # noqa: E402
from grpo_jax.data.countdown import Countdown, CountdownConfig  # noqa: E402
from grpo_jax.data.tokenizer import pad  # noqa: E402
from grpo_jax.evaluation import EvaluationConfig, Evaluator  # noqa: E402
from grpo_jax.models.transformer import TransformerConfig, init_params, make_policy  # noqa: E402
from grpo_jax.rewards import Reward, RewardError  # noqa: E402
from grpo_jax.rewards.countdown import countdown_accuracy, countdown_format  # noqa: E402
from grpo_jax.rollouts import AdvantageConfig, Experience, GroupRollouts, RolloutConfig, Sampler  # noqa: E402
from grpo_jax.telemetry import WorkdirError, write_atomically  # noqa: E402
from grpo_jax.types import TrainBatch, TrainState  # noqa: E402


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
SKIPPED = {f.name for f in dataclasses.fields(TransformerConfig)} - {*MODEL, "compute_dtype"}
FLAGS_OF = {name: section(name, cls, skip=SKIPPED if name == "model" else ()) for name, cls in SECTIONS.items()}
flags.adopt_module_key_flags(sections)  # so that --help shows them
SHIPPED_WARM_START = pathlib.Path(__file__).with_name("countdown_warm_start.msgpack")

TRIAL_STEPS = 20  # of a baseline, to see how many fit into a time
ACCURACY = Reward(name="accuracy", function=countdown_accuracy)


def configuration(workdir: pathlib.Path) -> dict[str, Any]:
    """Every section, from the flags; a run that is only evaluated keeps its own but for how it is evaluated."""
    values = {name: flag.value for name, flag in FLAGS_OF.items()}
    values["model"] = functools.partial(values["model"], vocab_size=Countdown.tokenizer.vocab_size)
    if EVAL_ONLY.value:
        try:
            saved = json.loads((workdir / "config.json").read_text())
        except OSError as error:
            raise WorkdirError(f"--eval_only needs the workdir of a run, and {workdir} is none: {error}") from error
        values |= {
            name: functools.partial(values[name], **saved[name]) for name in saved if name not in ("evaluation", "mesh")
        }
    return {name: make() for name, make in values.items()}


class Experiment:
    """The pieces of one configuration, built once and shared by the phases of the run."""

    def __init__(self, config: dict[str, Any]):
        self.config = config
        train, rollout = self.config["train"], self.config["rollout"]
        self.mesh = sharding.make_mesh(self.config["mesh"])
        self.policy = make_policy(self.config["model"])
        self.task = Countdown(self.config["task"], train.seed)
        self.key = jax.random.key(train.seed)
        self.max_tokens = rollout.max_tokens or self.task.max_completion_tokens
        self.rewards = (ACCURACY, Reward(name="format", function=countdown_format, weight=train.format_reward))
        sizes = {"max_tokens": self.max_tokens, "max_prompt_tokens": self.task.max_prompt_tokens}
        tokenizer = self.task.tokenizer
        self.sampler = Sampler(
            self.policy,
            self.mesh,
            tokenizer,
            group_size=rollout.group_size,
            stop=rollout.stop,
            key=jax.random.fold_in(self.key, 0),
            **sizes,
        )
        # Other tasks and seeds share no held-out problem with training: being held out is a property of a problem.
        self.evaluator = Evaluator(
            self.policy, self.mesh, tokenizer, Countdown(self.config["task"], 0).source("held_out"), (ACCURACY,),
            self.config["evaluation"], key=jax.random.key(0), **sizes,
        )  # fmt: skip

    def check(self) -> None:
        """Raises ValueError where sizes do not fit together, before anything expensive starts."""
        rollout = self.config["rollout"]
        training.check_divides(rollout.prompts * rollout.group_size, self.config["update"], self.mesh)
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        sizes = {
            "rollout.prompts": rollout.prompts,
            "warm_start.batch": self.config["warm_start"].batch,
        }
        for name, size in sizes.items():
            if size % shards:
                raise ValueError(
                    f"--{name}={size} does not divide over {shards} devices (data x fsdp): make it a multiple."
                )
        self.task.problem("held_out", 0)

    def rollouts(self, **changes: Any) -> GroupRollouts:
        """GRPO's experience, from training problems."""
        return GroupRollouts(
            sampler=self.sampler, source=self.task.source("train"), rewards=self.rewards,
            config=self.config["rollout"], advantages=self.config["advantages"], **changes,
        )  # fmt: skip

    def run(
        self, params: Any, objective: objectives.Objective, experience: Any, workdir: pathlib.Path, title: str,
        optimizer: training.OptimizerConfig, update: training.UpdateConfig, steps: int, **options: Any,
    ) -> tuple[TrainState, list[dict[str, Any]]]:  # fmt: skip
        """One phase: `loop.train` from `params`."""
        transformation, schedule = training.make_optimizer(optimizer, steps * update.epochs * update.minibatches)
        state = training.init_train_state(self.policy, params, transformation, objective, self.mesh)
        step = training.make_train_step(
            self.policy, transformation, objective, update, like=state, key=jax.random.fold_in(self.key, 1)
        )
        return loop.train(
            state, train_step=step, experience=experience, steps=steps, workdir=workdir, title=title,
            learning_rate=schedule, **{"checkpoints": self.config["checkpoints"], **options},
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demonstrations:
    """Supervised experience: a batch of demonstrations at the state's cursor."""

    task: Countdown
    batch: int

    def __call__(self, state: TrainState, journal: Any, interrupt: Any) -> Experience:
        """The next demonstrations; nothing is sampled and nothing scored."""
        del journal, interrupt
        encode, cursor = self.task.tokenizer.encode, int(state.cursor)
        pairs = [self.task.demonstration(i) for i in range(cursor, cursor + self.batch)]
        end = list(self.task.tokenizer.eos_ids[:1])
        prompts, prompt_mask = pad([encode(p.prompt) for p, _ in pairs], self.task.max_prompt_tokens)
        texts, mask = pad([encode(text) + end for _, text in pairs], self.task.max_completion_tokens)
        batch = TrainBatch(
            prompt_tokens=prompts, prompt_mask=prompt_mask, completion_tokens=texts, mask=mask,
            advantages=np.ones(self.batch, np.float32), sampler_logprobs=None,
            temperature=np.ones(self.batch, np.float32),
        )  # fmt: skip
        return Experience(batch=batch, prompts_consumed=self.batch, train_tokens=int(prompt_mask.sum() + mask.sum()))


def warm_start(experiment: Experiment, workdir: pathlib.Path) -> Any:
    """Parameters before GRPO: the shipped file where it fits the flags, else made here (and kept in the workdir)."""
    model = {name: value for name, value in dataclasses.asdict(experiment.config["model"]).items() if name in MODEL}
    described = {name: dataclasses.asdict(experiment.config[name]) for name in ("task", "warm_start")} | {
        "model": {"vocab_size": Countdown.tokenizer.vocab_size, **model}
    }
    fresh = init_params(experiment.config["model"], jax.random.key(experiment.config["warm_start"].seed))
    if SHIPPED_WARM_START.exists() and not WARM_START_ONLY.value:
        shipped: Any = flax.serialization.msgpack_restore(SHIPPED_WARM_START.read_bytes())
        if json.loads(shipped["configuration"]) == described:
            print(f"warm start: {SHIPPED_WARM_START.name}, shipped with the repository", flush=True)
            return flax.serialization.from_state_dict(fresh, shipped["params"])
    config: WarmStartConfig = experiment.config["warm_start"]
    print(
        f"warm start: supervision on {config.steps} x {config.batch} demonstrations, since the one shipped with the "
        "repository was made with other --task, --model or --warm_start flags (--warm_start.steps makes it shorter)",
        flush=True,
    )
    demonstrations = Demonstrations(task=Countdown(experiment.config["task"], config.seed), batch=config.batch)
    state, _ = experiment.run(
        fresh, objectives.supervised(), demonstrations, workdir / "warm_start", "warm start",
        _supervised_optimizer(config, "cosine"), training.UpdateConfig(), config.steps,
                checkpoints=CheckpointConfig(every=1000),
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
    more = Demonstrations(
        task=Countdown(config["task"], config["train"].seed + 1_000_003), batch=config["warm_start"].batch
    )
    # Completions of the warm start itself, of which only the right ones train.
    own = experiment.rollouts(params_of=lambda state: params, select=lambda s: s.by_name[ACCURACY.name] > 0.5)
    curves = {}
    for name, experience in (("continued supervision", more), ("supervision on own correct samples", own)):
        run = functools.partial(
            experiment.run, params, objectives.supervised(), experience, title=name, optimizer=config["optimizer"],
            update=config["update"],
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


def summarize(rows: list[dict[str, Any]], seed: int, parameters: int) -> dict[str, Any]:
    """`summary.json`: what came out, and what it took."""
    after = [row for row in rows if row["step"] > 0]
    # The first step compiles, and a median does not mind.
    median = lambda name: float(np.median([row[name] for row in after]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    evaluations = lambda row: {name: value for name, value in row.items() if name.startswith("eval/")}
    packages = ("grpo-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "chex", "numpy")
    return {
        "accuracy_before": rows[0]["eval/accuracy"],
        "accuracy_after": rows[-1]["eval/accuracy"],
        "before": evaluations(rows[0]),
        "after": evaluations(rows[-1]),
        "steps": rows[-1]["step"],
        "training_seconds": rows[-1]["time/elapsed_seconds"],
        "wall_seconds": time.perf_counter() - _STARTED,
        "rollout_tokens_per_second": median("time/rollout_tokens_per_second"),
        "train_tokens_per_second": median("time/train_tokens_per_second"),
        "peak_rss_bytes": peak,
        "seed": seed,
        "parameters": parameters,
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _print_plan(experiment: Experiment, parameters: int) -> None:
    c, task = experiment.config["rollout"], experiment.config["task"]
    u, m = experiment.config["update"], experiment.config["mesh"]
    shards, completions = m.data * m.fsdp, c.prompts * c.group_size
    print(
        f"jax {jax.__version__} on {jax.devices()[0].device_kind}; {parameters:,} parameters; "
        f"{task.numbers} numbers from 1 to {task.max_number}, targets to {task.max_target}\n"
        f"a step: {c.prompts} prompts x {c.group_size} = {completions} completions of up to {experiment.max_tokens} "
        "tokens; "
        f"{u.epochs} epochs x {u.minibatches} minibatches = {u.epochs * u.minibatches} optimizer steps of "
        f"{completions // u.minibatches} completions, {completions // (u.minibatches * u.microbatches * shards)} "
        f"at a time on each of {shards} data shards\n"
        "compiling, once: it takes some 20 seconds until the first step",
        flush=True,
    )


def evaluate_only(experiment: Experiment, workdir: pathlib.Path) -> None:
    """Evaluates a checkpoint of the workdir in full and prints the result as JSON."""
    config = experiment.config
    objective = objectives.grpo(config["loss"])
    transformation, _ = training.make_optimizer(config["optimizer"], 1)
    params = init_params(config["model"], jax.random.key(0))  # for their shapes
    like = training.init_train_state(experiment.policy, params, transformation, objective, experiment.mesh)
    store = Checkpoints(workdir / "checkpoints", config["checkpoints"], read_only=True)
    try:
        state = store.restore(like, EVAL_STEP.value)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(json.dumps({"step": int(state.step), **experiment.evaluator.full(state.params)}))


def main(argv: list[str]) -> None:
    """Runs, goes on with, or evaluates the run in --workdir."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; flags are written --name=value.")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax writes a page of INFO lines a checkpoint
    if not WORKDIR.value.strip():
        raise app.UsageError("--workdir is empty: name a directory.")
    if EVAL_STEP.value is not None and not EVAL_ONLY.value:
        raise app.UsageError("--eval_step needs --eval_only.")
    workdir = pathlib.Path(WORKDIR.value)
    try:
        config = configuration(workdir)
        experiment = Experiment(config)
        experiment.check()
    except ValueError as error:
        sys.exit(f"error: {error}")
    if EVAL_ONLY.value:
        evaluate_only(experiment, workdir)
        return
    loop.open_workdir(workdir, {name: dataclasses.asdict(section) for name, section in config.items()})
    params = warm_start(experiment, workdir)
    if WARM_START_ONLY.value:
        return
    parameters = sum(x.size for x in jax.tree.leaves(params))
    _print_plan(experiment, parameters)
    _, rows = experiment.run(
        params, objectives.grpo(config["loss"]), experiment.rollouts(), workdir, "grpo", config["optimizer"],
        config["update"], config["train"].steps, evaluator=experiment.evaluator,
        evaluate_every=config["evaluation"].every, samples_every=config["train"].samples_every,
    )  # fmt: skip
    finished = workdir / "summary.json"  # a run that was complete before keeps the times it took then
    summary = (
        json.loads(finished.read_text()) if finished.exists() else summarize(rows, config["train"].seed, parameters)
    )
    curves = {"GRPO": rows}
    if BASELINES.value:
        curves |= run_baselines(experiment, params, workdir, summary["training_seconds"])
        summary["baselines"] = {name: curves[name][-1] for name in curves if name != "GRPO"}
        plots.comparison({name: [rows] for name, rows in curves.items()}, workdir / "comparison.png")
    plots.curve(rows, workdir / "curve.png", f"Countdown, seed {summary['seed']}")
    write_atomically(finished, json.dumps(summary, indent=2) + "\n")
    print(
        f"held-out greedy accuracy {summary['accuracy_before']:.1%} -> {summary['accuracy_after']:.1%} in "
        f"{summary['wall_seconds']:.0f} s; everything is in {workdir}"
    )


def run() -> None:
    """The command: absl's `app.run`, with the errors that a user can mend as one line instead of a traceback."""
    try:
        app.run(main)
    except (WorkdirError, RewardError, OSError) as error:
        if error.__cause__ is not None and isinstance(error, RewardError):
            traceback.print_exception(error.__cause__)  # where in the user's function it went wrong
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run()

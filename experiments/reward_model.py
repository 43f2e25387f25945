"""A reward model from preferences: Bradley-Terry on pairs, from a Hugging Face directory to another.

python -m experiments.reward_model --model=Qwen2.5-0.5B --workdir=runs/reward_model \\
    --data.train_file=train.jsonl --data.test_file=test.jsonl

A line of the files is {"prompt": ..., "chosen": ..., "rejected": ...}, and may have a "margin"; without "prompt" both
texts are whole. Starts from a language model, with a score that begins at 0, or from a ForSequenceClassification
directory with one label, which it also writes: experiments.gsm8k takes it, or the workdir, with
--reward_model.directory.
"""

import dataclasses
import functools
import json
import math
import pathlib
import sys
from typing import Any

import jax
from absl import flags

from experiments import flags as sections
from experiments import footprint, phases, process, runs, scorers
from experiments.flags import section
from grpo_jax import hosts, objectives, optimizers, profiling, reward_model, sharding, training, workdirs
from grpo_jax.checkpoints import CheckpointConfig
from grpo_jax.data import sources
from grpo_jax.data.templates import make_template
from grpo_jax.data.tokenizer import PretrainedTokenizer
from grpo_jax.memory import least_memory
from grpo_jax.models import pretrained
from grpo_jax.models.transformer import abstract_params, make_policy
from grpo_jax.preferences import Pair, PairEvaluator, PairExperience, as_rows, encode_pairs, pair_record
from grpo_jax.rewards.model import Scorer
from grpo_jax.storage import Path
from grpo_jax.telemetry import WorkdirError, write_atomically


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """How the model computes."""

    compute_dtype: str = "bfloat16"  # of activations and products: bfloat16 or float32; parameters are float32
    attention: str = "xla"  # of the training pass: xla (anywhere), cudnn (NVIDIA GPUs) or splash (TPUs)
    remat: str = "full"  # computed again in the backward pass: none (norms alone), dots (attention too), full


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Preferences, and how they are put to the model."""

    train_file: str = ""  # JSON lines with prompt, chosen, rejected, and as may be margin
    test_file: str = ""  # the same, held out
    dataset: str = ""  # in place of files, the name of a prepared TFDS data set with these fields
    train_split: str = "train"  # of the data set
    test_split: str = "test"  # of the data set; 'train[90%:]' where it has none, with 'train[:90%]' for training
    directory: str = ""  # where TFDS keeps data sets; empty: TFDS_DATA_DIR, else ~/tensorflow_datasets
    template: str = "plain"  # of the prompt: plain, qa, r1, or chat (the tokenizer's)
    system: str = ""  # system message, for chat
    max_tokens: int = 1024  # pairs with a longer text, prompt and end included, are dropped, and counted

    def __post_init__(self) -> None:
        if bool(self.dataset) == bool(self.train_file and self.test_file) or (self.dataset and self.train_file):
            raise ValueError(
                f"train_file={self.train_file!r}, test_file={self.test_file!r}, dataset={self.dataset!r}: give both "
                "files, or the name of a TFDS data set."
            )
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens={self.max_tokens} must be 2 or more.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """The loss of preferences."""

    center_coef: float = 0.0  # lambda, of the squared sum of a pair's scores: where 0 is; 0.01 is usual
    margins: bool = True  # the margins of the data count; False: all are 0

    def __post_init__(self) -> None:
        if self.center_coef < 0:
            raise ValueError(f"center_coef={self.center_coef} must be 0 or more.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(optimizers.OptimizerConfig):
    """An optimizer with warm-up, a schedule, and clipping by global norm."""

    learning_rate: float = 1e-5  # at its peak
    decay: str = "cosine"  # after the warm-up: constant, linear or cosine to 0 at the end


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run."""

    steps: int = 350  # optimizer steps
    batch: int = 64  # pairs a step; how many at a time is derived from the memory
    seed: int = 0  # of the order of the pairs

    def __post_init__(self) -> None:
        if min(self.steps, self.batch) < 1 or self.seed < 0:
            raise ValueError(
                f"steps={self.steps} and batch={self.batch} must be 1 or more, seed={self.seed} 0 or more."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured on held-out pairs."""

    every: int = 50  # steps between evaluations
    pairs: int = 1024  # the first so many; all there are where there are fewer
    bins: int = 10  # of confidence, for the calibration error and the picture

    def __post_init__(self) -> None:
        if min(self.every, self.pairs, self.bins) < 1:
            raise ValueError(f"every={self.every}, pairs={self.pairs} and bins={self.bins} must be 1 or more.")


WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where everything is written; an interrupted run there goes on.", required=True
)
MODEL = flags.DEFINE_string(
    "model", None, "A Hugging Face directory: a language model, or a reward model to go on with.", required=True
)
PROFILE = sections.profile()
CACHE = sections.compilation_cache()
DISTRIBUTED = sections.distributed()
DEBUG_NANS = sections.debug_nans()
SECTIONS: dict[str, type[Any]] = {
    "policy": ModelConfig,
    "data": DataConfig,
    "reward": RewardConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "mesh": sharding.MeshConfig,
    "evaluation": EvaluationConfig,
    "checkpoints": CheckpointConfig,
}
FLAGS_OF = {name: section(name, cls) for name, cls in SECTIONS.items()}
flags.adopt_module_key_flags(sections)  # so that --help shows them


class Experiment:
    """The pieces of one configuration, without the parameters."""

    def __init__(self, directory: Path, config: dict[str, Any]):
        """Raises ValueError, before anything expensive starts, where the pieces do not fit together."""
        self.config, train = config, config["train"]
        self.mesh = sharding.make_mesh(config["mesh"])
        hosts.check_mesh(self.mesh)
        self.model = pretrained.read_config(directory, score=True, **dataclasses.asdict(config["policy"]))
        runs.check_attention(self.model)
        self.policy = make_policy(self.model, self.mesh)
        self.tokenizer = PretrainedTokenizer.load(directory, self.model.vocab_size)
        self.pad_id = scorers.padding(directory, self.tokenizer)
        runs.check_multiples(self.mesh, {"train.batch": train.batch})
        runs.check_offload(config["optimizer"], self.mesh)
        self.pairs, held_out = self._pairs("train"), self._pairs("test")
        shapes, axes = abstract_params(self.model)
        own, memory = sharding.device_bytes(shapes, axes, self.mesh), least_memory()
        held = math.ceil(own * footprint.copies_held(self.policy, shapes, config["optimizer"]))
        self._room = float("inf") if memory is None else 0.9 * memory - held - own  # and gradients
        scorer = Scorer(self.policy, self.mesh, vocab_size=self.model.vocab_size, pad_id=self.pad_id, held=held)
        evaluation = config["evaluation"]
        self.evaluator = PairEvaluator(scorer, held_out[: evaluation.pairs], bins=evaluation.bins)

    def _pairs(self, split: str) -> list[Pair]:
        data = self.config["data"]
        if data.dataset:
            name = data.train_split if split == "train" else data.test_split
            records = sources.Mapped(pair_record, sources.tfds_records(data.dataset, name, data.directory or None))
        else:
            file = pathlib.Path(data.train_file if split == "train" else data.test_file)
            if not file.is_file():
                raise ValueError(f"--data.{split}_file={file} is not a file.")
            records = sources.json_records(file, pair_record)
        end = self.tokenizer.turn_end_id() if data.template == "chat" else None
        return encode_pairs(
            records, self.tokenizer, template=make_template(data.template, self.tokenizer, system=data.system),
            end_id=self.tokenizer.end_id if end is None else end, max_tokens=data.max_tokens,
            say=lambda text: print(f"{split} pairs: {text}", flush=True),
        )  # fmt: skip

    def experience(self) -> PairExperience:
        """Training pairs, in their order by seed."""
        pairs = self.pairs
        if not self.config["reward"].margins:
            pairs = [dataclasses.replace(pair, margin=0.0) for pair in self.pairs]
        train = self.config["train"]
        return PairExperience(source=sources.shuffled(pairs, train.seed), batch=train.batch)

    def make_step(self, optimizer: Any, **made: Any) -> Any:
        """The train step, for `phases.phase`."""
        loss = functools.partial(reward_model.bradley_terry, center_coef=self.config["reward"].center_coef)
        return reward_model.make_pair_step(
            self.policy, optimizer, loss, pad_id=self.pad_id, room=self._room, **made
        )  # fmt: skip


def main(argv: list[str]) -> None:
    """Trains, or goes on with, the run in --workdir, and exports the reward model."""
    workdir, given = runs.directory_of(argv, WORKDIR), runs.place_of(MODEL)
    try:
        process.join_hosts(DISTRIBUTED.value)
        config = runs.configured({name: flag.value for name, flag in FLAGS_OF.items()})
        profile = profiling.steps_of(PROFILE.value, config["train"].steps)
        print(process.cache_compilations(CACHE.value), flush=True)
        experiment = Experiment(runs.description(given, workdir), config)
        sections.check_debugging(DEBUG_NANS.value, experiment.mesh)
    except ValueError as error:
        sys.exit(f"error: {error}")
    train, parameters, count = config["train"], footprint.parameters(experiment.model), len(experiment.pairs)
    print(
        f"{process.devices()}; {parameters:,} parameters of {given}\n"
        f"{count} pairs; {train.batch} a step, an epoch is {count / train.batch:.1f} steps",
        flush=True,
    )
    workdirs.open_workdir(workdir, {"model": str(given), **runs.as_json(config)})
    runs.keep_description(given, workdir)
    state, rows = phases.phase(
        lambda: pretrained.load(given, experiment.mesh, score=True), policy=experiment.policy, model=experiment.model,
        mesh=experiment.mesh, key=jax.random.key(train.seed), objective=objectives.supervised(),
        experience=experiment.experience(), workdir=workdir, title="reward model", optimizer=config["optimizer"],
        update=training.UpdateConfig(), steps=train.steps, checkpoints=config["checkpoints"],
        evaluator=experiment.evaluator, evaluate_every=config["evaluation"].every, make_step=experiment.make_step,
        profile=profile, debug_nans=DEBUG_NANS.value,
    )  # fmt: skip
    export = runs.export(workdir, state.params, experiment.model, {"pad_token_id": experiment.pad_id})
    bins = experiment.evaluator.bins(state.params)
    from experiments import plots  # imports matplotlib: half a second

    def write() -> None:
        write_atomically(workdir / "reliability.json", json.dumps(as_rows(bins), indent=2) + "\n")
        plots.reliability(bins, workdir / "reliability.png")

    hosts.first_does(write, kind=WorkdirError)
    summary = runs.summary(workdir, rows, train.seed, parameters)
    runs.finish(workdir, rows, summary, "reward model")
    print(
        f"held-out accuracy {summary['accuracy_before']:.1%} -> {summary['accuracy_after']:.1%}, calibration error "
        f"{rows[-1]['eval/calibration_error']:.3f}, in {summary['training_seconds']:.0f} s of training; the reward "
        f"model is in {export}"
    )


if __name__ == "__main__":
    process.command(main)

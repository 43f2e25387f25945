"""Problems with checkable answers as sources of prompts, with the rewards that judge them."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from experiments import runs
from grpo_jax import evaluation, hosts, sharding
from grpo_jax.data import sources
from grpo_jax.data.benchmarks import aime, math500
from grpo_jax.data.gsm8k import gsm8k_record, gsm8k_records
from grpo_jax.data.sources import Prompt, Record
from grpo_jax.data.templates import make_template
from grpo_jax.data.tokenizer import PretrainedTokenizer
from grpo_jax.evaluation import Evaluator
from grpo_jax.models import pretrained
from grpo_jax.models.transformer import make_policy
from grpo_jax.rewards import Reward, mathematics
from grpo_jax.rewards.answers import (
    boxed,
    boxed_integer,
    extract_boxed,
    extract_boxed_integer,
    extract_flexible,
    extract_strict,
    gsm8k_flexible,
    gsm8k_strict,
)
from grpo_jax.rewards.style import repetition, soft_overlong, think_answer_format
from grpo_jax.storage import Path
from grpo_jax.types import Policy

__all__ = ["DataConfig", "EvaluationConfig", "ModelConfig", "Opened", "RewardConfig", "Task"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """How the model computes."""

    compute_dtype: str = "bfloat16"  # of activations and products: bfloat16 or float32; parameters are float32
    sampler_dtype: str = ""  # of the sampler, evaluations too: bfloat16, or int8 (matrices alone); empty: compute_dtype
    attention: str = "xla"  # of the training pass: xla (anywhere), cudnn (NVIDIA GPUs) or splash (TPUs)
    remat: str = "full"  # computed again in the backward pass: none (norms alone), dots (attention too), full


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig(evaluation.EvaluationConfig):
    """What is measured on the test problems."""

    every: int = 20  # steps between greedy evaluations
    prompts: int = 1319  # for greedy accuracy; all there are where there are fewer
    sampled_prompts: int = 1319  # for mean@k, pass@k and maj@k, before and after training; all there are at most
    samples: int = 4  # completions of each of them; k goes up to this
    completions: int = 1024  # sampled at a time at most, which bounds the memory; it does not change what is measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The problems, and how they are put to the model."""

    dataset: str = "gsm8k"  # gsm8k, or from --data.test_file, for evaluation alone: math500, aime
    directory: str = ""  # where TFDS keeps data sets; empty: TFDS_DATA_DIR, else ~/tensorflow_datasets
    train_file: str = ""  # GSM8K's train.jsonl, or a file like it, in place of TFDS
    test_file: str = ""  # the same of test.jsonl; of math500 and aime, the published file
    template: str = "qa"  # plain, qa (base models), r1 (think/answer), or chat (the tokenizer's)
    instruction: str = ""  # follows the question: gsm8k (verl's, asks for ####), boxed, or a text
    system: str = ""  # system message, for chat
    variables: str = ""  # of the chat template, as JSON: {"enable_thinking": false}
    judge: str = "flexible"  # of gsm8k: flexible (the last number) or strict (behind ####); of all: math_verify
    max_prompt_tokens: int = 256  # training prompts that are longer are dropped, and counted

    def __post_init__(self) -> None:
        if self.dataset not in _DATASETS:
            raise ValueError(
                f"dataset={self.dataset!r} must be one of {', '.join(_DATASETS)}: there is a judge for these."
            )
        if self.dataset != "gsm8k" and not self.test_file:
            raise ValueError(f"dataset={self.dataset!r} is read from its published file: give --data.test_file.")
        judges = (*(_JUDGES["gsm8k"] if self.dataset == "gsm8k" else ("flexible",)), "math_verify")
        if self.judge == "math_verify":
            mathematics.need()
        if self.judge not in judges:
            raise ValueError(f"judge={self.judge!r} of dataset={self.dataset!r} must be one of {', '.join(judges)}.")
        if self.max_prompt_tokens < 1:
            raise ValueError(f"max_prompt_tokens={self.max_prompt_tokens} must be 1 or more.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What is rewarded beside the right answer."""

    format: float = 0.0  # weight of think/answer tags
    overlong: int = 0  # the last tokens before the limit, over which a punishment grows to -1 (DAPO); 0: none
    repetition: float = 0.0  # largest punishment of repeated 3-grams, 0 or below

    def __post_init__(self) -> None:
        if self.overlong < 0 or self.repetition > 0:
            raise ValueError(f"overlong={self.overlong} must be 0 or more, repetition={self.repetition} 0 or below.")


def _variables(config: DataConfig) -> dict[str, Any]:
    try:
        variables = json.loads(config.variables or "{}")
    except ValueError:
        variables = None
    if not isinstance(variables, dict):
        raise ValueError(f'variables={config.variables!r} must be a JSON object: {{"enable_thinking": false}}.')
    return variables


# What judges, and what a completion answers, for maj@k.
_JUDGES = {
    "gsm8k": {"flexible": (gsm8k_flexible, extract_flexible), "strict": (gsm8k_strict, extract_strict)},
    "math500": {"accuracy": (boxed, extract_boxed)},
    "aime": {"accuracy": (boxed_integer, extract_boxed_integer)},
}
_DATASETS: dict[str, Callable[[os.PathLike[str]], Sequence[Record]]] = {
    "gsm8k": lambda path: sources.json_records(path, gsm8k_record), "math500": math500, "aime": aime,
}  # fmt: skip


class Opened:
    """A Hugging Face directory and the problems that its model is to solve, without the parameters."""

    def __init__(self, directory: Path, config: Mapping[str, Any]):
        """Raises ValueError where sections `mesh`, `policy` and `data` do not fit the model, or the devices."""
        self.mesh = sharding.make_mesh(config["mesh"])
        hosts.check_mesh(self.mesh)
        self.model = pretrained.read_config(directory, **dataclasses.asdict(config["policy"]))
        self.policy = make_policy(self.model, self.mesh)
        self.tokenizer = PretrainedTokenizer.load(directory, self.model.vocab_size)
        runs.check_attention(self.model)
        self.task = Task(config["data"], self.tokenizer)


class Task:
    """The problems of a configuration, tokenized by the model that is to solve them."""

    def __init__(self, config: DataConfig, tokenizer: PretrainedTokenizer):
        """Reads nothing yet."""
        self._config, self._tokenizer, variables = config, tokenizer, _variables(config)
        self._template = make_template(
            config.template, tokenizer, instruction=config.instruction, system=config.system, **variables
        )
        self.end_id = tokenizer.end_id  # what ends a demonstration
        if config.template == "chat":
            if "strftime_now" in (tokenizer.chat_template or "") and "date_string" not in variables:
                raise ValueError(
                    "this model's chat template writes today's date, so that a run would not repeat tomorrow: fix it, "
                    'for example --data.variables=\'{"date_string": "26 Jul 2024"}\'.'
                )
            turn_end = tokenizer.turn_end_id(**variables)
            self.end_id = tokenizer.end_id if turn_end is None else turn_end
        if self.end_id not in tokenizer.eos_ids:
            raise ValueError(
                f"the chat template ends a turn with {tokenizer.backend.id_to_token(self.end_id)!r}, and completions "
                f"would go on behind it: set eos_token_id in the model's generation_config.json to "
                f"{[*tokenizer.eos_ids, self.end_id]}, or take another template (qa, for base models)."
            )

    def _records(self, split: str) -> Sequence[Record]:
        c = self._config
        file = c.train_file if split == "train" else c.test_file
        if file:
            if not pathlib.Path(file).is_file():
                raise ValueError(f"--data.{split}_file={file} is not a file: give a path, or none to read from TFDS.")
            return _DATASETS[c.dataset](pathlib.Path(file))
        return gsm8k_records(split, c.directory or None)

    @functools.cached_property
    def train(self) -> Sequence[Prompt]:
        """Training prompts that are not too long; how many are, is said."""
        if self._config.dataset != "gsm8k":
            raise ValueError(f"dataset={self._config.dataset!r} is for evaluation alone: train on gsm8k.")
        prompts = sources.make_prompts(self._records("train"), self._template)
        say = lambda text: print(f"training problems: {text}", flush=True)
        return sources.drop_long(prompts, self._tokenizer, self._config.max_prompt_tokens, say)

    @functools.cached_property
    def test(self) -> Sequence[Prompt]:
        """Every test prompt, however long."""
        return list(sources.make_prompts(self._records("test"), self._template))

    @functools.cached_property
    def max_test_tokens(self) -> int:
        """Of the longest test prompt, up to the next multiple of 32."""
        return -(-max(len(self._tokenizer.encode(prompt.text)) for prompt in self.test) // 32) * 32

    @property
    def _judge(self) -> str:
        c = self._config
        return c.judge if c.dataset == "gsm8k" or c.judge == "math_verify" else "accuracy"

    @property
    def answer(self) -> Callable[[str], str | None]:
        """What a completion answers, for maj@k; of math_verify, which votes on nothing, the data set's first."""
        judges = _JUDGES[self._config.dataset]
        return judges.get(self._judge, next(iter(judges.values())))[1]

    def judges(self) -> list[Reward]:
        """What says right or wrong: the first judges, another is reported beside it."""
        chosen = self._judge
        functions: dict[str, Callable[..., Any]] = {n: f for n, (f, _) in _JUDGES[self._config.dataset].items()}
        if chosen == "math_verify":
            functions["math_verify"] = mathematics.math_verify
        order = [chosen, *(name for name in functions if name != chosen)]
        return [Reward(name=name, function=functions[name], weight=float(name == chosen)) for name in order]

    def rewards(self, c: RewardConfig, max_tokens: int, users: Sequence[Reward] = ()) -> list[Reward]:
        """What trains: the judges, what is rewarded beside them, and a user's own."""
        beside = []
        if c.format:
            beside.append(Reward(name="format", function=think_answer_format, weight=c.format))
        if c.overlong:
            beside.append(Reward(name="overlong", function=soft_overlong(max_tokens, c.overlong)))
        if c.repetition:
            beside.append(Reward(name="repetition", function=repetition(3, c.repetition)))
        return [*self.judges(), *beside, *users]

    def right_answers(self, count: int) -> list[tuple[Prompt, str]]:
        """The first training prompts, with their published solutions."""
        return [(prompt, prompt.columns["solution"]) for prompt in self.train[:count]]

    def evaluator(
        self, policy: Policy, mesh: Mesh, config: EvaluationConfig, *, max_tokens: int, stop: Sequence[str],
        copies: float,
    ) -> Evaluator:  # fmt: skip
        """Measures on the test problems, on all where there are fewer than asked for; `copies`: see `Sampler`."""
        most = len(self.test)
        config = dataclasses.replace(
            config, prompts=min(config.prompts, most), sampled_prompts=min(config.sampled_prompts, most)
        )
        return Evaluator(
            policy, mesh, self._tokenizer, sources.in_order(self.test), self.judges(), config, max_tokens=max_tokens,
            max_prompt_tokens=self.max_test_tokens, key=jax.random.key(0), answer=self.answer, stop=stop,
            copies=copies,
        )  # fmt: skip

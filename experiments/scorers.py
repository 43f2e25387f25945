"""Reward models, from the workdir of a run or a Hugging Face directory, as one of GRPO's rewards."""

import dataclasses
import json
from typing import Any

from jax.sharding import Mesh

from experiments import footprint, phases, runs
from grpo_jax import hosts, objectives, sharding, storage
from grpo_jax.data.tokenizer import PretrainedTokenizer, Tokenizer
from grpo_jax.memory import least_memory
from grpo_jax.models import pretrained
from grpo_jax.models.transformer import abstract_params, make_policy
from grpo_jax.rewards import Reward
from grpo_jax.rewards.model import ModelReward, Scorer, same_tokens
from grpo_jax.storage import Path

__all__ = ["OpenedScorer", "RewardModelConfig", "padding"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """A reward model beside the other rewards."""

    directory: str = ""  # workdir of experiments.reward_model, or a Hugging Face ForSequenceClassification; empty: none
    weight: float = 1.0  # of its score in the sum; 0: it is reported alone
    compute_dtype: str = "bfloat16"  # of activations and products: bfloat16 or float32


def padding(directory: Path, tokenizer: PretrainedTokenizer) -> int | None:
    """Which id is passed over when the last token of a text is looked for, as `transformers` does it.

    Of a reward model, config.json's `pad_token_id`; of a language model, from which one is to be made, the tokenizer's.
    """
    if not pretrained.read_config(directory).score:
        return tokenizer.pad_id
    return json.loads((directory / "config.json").read_text()).get("pad_token_id")


class OpenedScorer:
    """A reward model, without its parameters."""

    def __init__(self, config: RewardModelConfig, mesh: Mesh):
        """Raises ValueError where there is none that fits. Of several processes each holds one: `hosts.own_mesh`."""
        self._config, self._all, given = config, mesh, storage.path(config.directory)
        storage.check(given)
        self._mesh = hosts.own_mesh(mesh)
        self._workdir = given if (given / "checkpoints").is_dir() else None
        if not given.is_dir():
            raise ValueError(f"--reward_model.directory={given} is no directory: experiments.reward_model makes one.")
        place = given if self._workdir is None else given / "model"
        model = pretrained.read_config(place, compute_dtype=config.compute_dtype)
        if self._workdir is None and not model.score:
            raise ValueError(
                f"{given} holds a language model, which has no score: python -m experiments.reward_model "
                f"--model={given} makes a reward model of it."
            )
        if self._workdir is not None and "center_coef" not in runs.saved_configuration(given).get("reward", {}):
            raise ValueError(f"{given} is the workdir of another experiment: expected one of experiments.reward_model.")
        self.model, memory = dataclasses.replace(model, score=True), least_memory()
        if memory is not None and self.bytes > memory:
            gib = lambda n: f"{n / 2**30:.2f} GiB"
            raise ValueError(
                f"{given} takes {gib(self.bytes)} of each of {self._mesh.size} devices, which have {gib(memory)}: take "
                "a smaller reward model, or more devices (of several processes each holds one: give each more)."
            )
        self.policy, self._given = make_policy(self.model, self._mesh), given
        self.tokenizer = PretrainedTokenizer.load(place, self.model.vocab_size)
        self.pad_id = padding(place, self.tokenizer)

    @property
    def bytes(self) -> int:
        """Of the parameters on a device."""
        shapes, axes = abstract_params(self.model)
        return sharding.device_bytes(shapes, axes, self._mesh)

    def params(self) -> Any:
        """The parameters, on the mesh; of a workdir those of the latest checkpoint. All processes must call it."""
        if self._workdir is None:
            return pretrained.load(self._given, self._mesh)
        saved = runs.saved_configuration(self._workdir)
        # On the devices of all, for the optimizer's state comes with it.
        params = phases.restored(
            self._workdir, None, policy=make_policy(self.model, self._all), model=self.model, mesh=self._all,
            optimizer=phases.optimizer_of(saved), objective=objectives.supervised(),
        ).params  # fmt: skip
        return hosts.moved(params, sharding.shardings(*abstract_params(self.model), self._mesh))

    def reward(self, tokenizer: Tokenizer, held: int = 0) -> Reward:
        """The reward named `reward_model`; whether tokens or text go to it is said.

        Args:
          tokenizer: the policy's.
          held: bytes of a device that the policy's training takes.
        """
        same = same_tokens(tokenizer, self.tokenizer)
        how = "as tokens" if same else "through text, for its tokenizer is another"
        print(f"reward model: {self._given}, {footprint.parameters(self.model):,} parameters, asked {how}", flush=True)
        scorer = Scorer(
            self.policy, self._mesh, vocab_size=self.model.vocab_size, pad_id=self.pad_id, held=held + self.bytes
        )
        function = ModelReward(
            scorer=scorer, params=self.params(), tokenizer=tokenizer, own=None if same else self.tokenizer,
            end_id=None if same else self.tokenizer.end_id,
        )  # fmt: skip
        return Reward(name="reward_model", function=function, weight=self._config.weight, on_device=True)

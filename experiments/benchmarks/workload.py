"""What is measured: a model, prompts, lengths and a reward that both sides get, and our side of it."""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.measure import Options
from grpo_jax.data.sources import Prompt
from grpo_jax.logprobs import completion_logprobs
from grpo_jax.models.pretrained import load, read_config
from grpo_jax.models.transformer import TransformerConfig, init_params, make_policy
from grpo_jax.objectives import LossConfig, make_objective
from grpo_jax.optimizers import OptimizerConfig, make_optimizer
from grpo_jax.rewards import Reward
from grpo_jax.rollouts import GroupRollouts, RolloutConfig
from grpo_jax.sampler import Sampler
from grpo_jax.sharding import make_mesh
from grpo_jax.telemetry import RewardJournal
from grpo_jax.training import UpdateConfig, init_train_state, make_reference_logprobs, make_train_step
from grpo_jax.types import Rollout, SamplingParams

__all__ = ["EOS", "PAD", "SIZES", "Ours", "Workload", "completion_reward"]

PAD, EOS = 0, 1  # ids of the peers; prompts hold neither
# Qwen2's family, tied, by about how many parameters: 5m is the usual one of these programs, tiny is for tests, and 0.5b
# and 1.5b are Qwen2.5's.
_FIELDS = ("vocab_size", "layers", "width", "heads", "kv_heads", "head_width", "mlp_width")
SIZES = {
    "tiny": (128, 2, 32, 4, 2, 8, 64),
    "1m": (4096, 3, 128, 4, 2, 32, 256),
    "5m": (4096, 4, 256, 8, 2, 32, 1024),
    "20m": (8192, 6, 512, 8, 2, 64, 1280),
    "0.1b": (16_384, 12, 768, 12, 2, 64, 2560),
    "0.5b": (151_936, 24, 896, 14, 2, 64, 4864),
    "1.5b": (151_936, 28, 1536, 12, 2, 128, 8960),
}
_FAMILY: dict[str, Any] = {"scale_embedding": False, "qkv_bias": True, "rope_base": 1e6, "norm_epsilon": 1e-6}
LENGTHS = ("full", "geometric")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload(Options):
    """P prompts of L tokens, G completions of each, of lengths that are given and the same on both sides."""

    size: str = "5m"  # of the model: tiny, 1m, 5m, 20m, 0.1b, 0.5b, 1.5b parameters, of Qwen2's shape
    prompts: int = 8  # P
    group: int = 8  # G, completions of each prompt
    prompt_tokens: int = 68  # L, of every prompt
    max_prompt_tokens: int = 0  # to which ours' sampler pads prompts; 0: L
    tokens: int = 128  # T, of a completion at most
    lengths: str = "full"  # of completions: full, all T; geometric, with mean T / 4, cut at T
    slots: int = 0  # completions that ours decodes at a time; 0: as many as the sampler thinks best
    microbatches: int = 0  # parts of ours' update; 0: of two completions each
    peer_microbatches: int = 1  # TRL accumulates gradients over so many parts of a step; 1: a step is one batch
    dtype: str = "float32"  # of activations and products: float32 or bfloat16
    sampler_dtype: str = ""  # of the sampler's weights: bfloat16, int8, ...; empty: as dtype
    attention: str = "xla"  # implementation of ours' training pass: xla, cudnn (GPU) or splash (TPU)
    vocabulary: int = 0  # V; 0: that of the size

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size not in SIZES:
            raise ValueError(f"size={self.size!r} must be one of {', '.join(SIZES)}.")
        if self.lengths not in LENGTHS:
            raise ValueError(f"lengths={self.lengths!r} must be one of {', '.join(LENGTHS)}.")
        if min(self.prompts, self.prompt_tokens, self.tokens) < 1 or self.group < 2:
            raise ValueError("prompts, prompt_tokens and tokens must be 1 or more, group 2 or more.")
        if not self.max_prompt_tokens:
            object.__setattr__(self, "max_prompt_tokens", self.prompt_tokens)
        if self.max_prompt_tokens < self.prompt_tokens:
            raise ValueError(
                f"max_prompt_tokens={self.max_prompt_tokens} must be prompt_tokens={self.prompt_tokens} or more."
            )
        completions = self.prompts * self.group
        if not self.microbatches:
            object.__setattr__(self, "microbatches", completions // (1 if completions % 2 else 2))
        for name, parts in (("microbatches", self.microbatches), ("peer_microbatches", self.peer_microbatches)):
            if parts < 1 or completions % parts:
                raise ValueError(f"{name}={parts} must divide prompts x group = {completions}.")

    def workload(self, **changes: Any) -> "Workload":
        """The same with changes, and without what a program adds."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(Workload)}
        return Workload(**values | changes)

    @property
    def computing(self) -> dict[str, Any]:
        """How the model is computed."""
        return {"compute_dtype": self.dtype, "attention": self.attention, "sampler_dtype": self.sampler_dtype}

    @property
    def model(self) -> TransformerConfig:
        """The shape, as computed with here."""
        sizes = dict(zip(_FIELDS, SIZES[self.size], strict=True))
        sizes["vocab_size"] = self.vocabulary or sizes["vocab_size"]
        return TransformerConfig(**sizes, **_FAMILY, **self.computing)

    @functools.cached_property
    def prompt_ids(self) -> np.ndarray:
        """[P, L] int32, neither EOS nor padding."""
        rng = np.random.default_rng((self.seed, 0))
        return rng.integers(2, self.model.vocab_size, (self.prompts, self.prompt_tokens)).astype(np.int32)

    @functools.cached_property
    def limits(self) -> np.ndarray:
        """[P, G] int32, how many tokens each completion has; drawn once."""
        shape = self.prompts, self.group
        if self.lengths == "full":
            return np.full(shape, self.tokens, np.int32)
        drawn = np.random.default_rng((self.seed, 1)).geometric(min(1.0, 4 / self.tokens), shape)
        return np.minimum(drawn, self.tokens).astype(np.int32)

    @property
    def texts(self) -> list[str]:
        """The prompts as the tokenizers on both sides read them: ids as decimal numbers."""
        return [" ".join(map(str, row)) for row in self.prompt_ids.tolist()]

    def check(self, lengths: np.ndarray, side: str) -> None:
        """Raises RuntimeError unless a side produced completions [B] of the lengths that were asked for."""
        if not np.array_equal(lengths, self.limits.reshape(-1)):
            raise RuntimeError(f"{side} made completions of {lengths.tolist()} tokens, not {self.limits.tolist()}.")


def completion_reward(
    prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **columns: object
) -> list[float]:
    """The share of even ids: next to nothing to compute, and different for each completion."""
    del prompts, completions, columns
    return [float(np.mean(np.asarray(ids) % 2 == 0)) for ids in completion_ids]


class NumberTokenizer:
    """Text of decimal numbers <-> those ids. No id of the model ends a completion: lengths are given."""

    pad_id = PAD

    def __init__(self, vocab_size: int):
        self.eos_ids = (vocab_size,)
        self.token_bytes = [b"%d " % i for i in range(vocab_size)]

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Ids of a text."""
        del continues
        return [int(word) for word in text.split()]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids."""
        return " ".join(map(str, ids))


class LimitedSampler(Sampler):
    """The sampler with the lengths of a workload."""

    limits: np.ndarray  # [P, G] int32

    def waves(
        self, params: Any, prompts: Any, prompt_ids: Any, sampling_params: Any, interrupt: Any = lambda: None,
        limits: Any = None,
    ) -> Iterator[Rollout]:  # fmt: skip
        """As the sampler's."""
        return super().waves(params, prompts, prompt_ids, sampling_params, interrupt, self.limits)


class Ours:
    """Our side of a workload, on one device: a random model, or that of a Hugging Face directory."""

    def __init__(self, workload: Workload, directory: pathlib.Path | None = None):
        self.workload, self.mesh = workload, make_mesh()
        self.config = workload.model if directory is None else read_config(directory, **workload.computing)
        self.policy = make_policy(self.config, self.mesh)
        key = jax.random.key(workload.seed)
        self.params = init_params(self.config, key) if directory is None else load(directory, self.mesh)

    @functools.cached_property
    def sampler(self) -> LimitedSampler:
        """Compiled when it is called first."""
        w = self.workload
        sampler = LimitedSampler(
            self.policy, self.mesh, NumberTokenizer(self.config.vocab_size), group_size=w.group, max_tokens=w.tokens,
            max_prompt_tokens=w.max_prompt_tokens, key=jax.random.key(w.seed), slots=w.slots,
        )  # fmt: skip
        sampler.limits = w.limits
        return sampler

    def rollout(self, temperature: float = 1.0) -> Callable[[], Rollout]:
        """Samples the workload once, and waits until it lies on the host."""
        w, params, sampling = self.workload, self.params, SamplingParams(temperature=temperature)
        return lambda: jax.device_get(self.sampler(params, w.texts, range(w.prompts), sampling))

    def mismatch(self, rollout: Rollout) -> dict[str, float]:
        """How far the sampler's log-probabilities are from those that the trainer takes of the same tokens."""
        w, policy = self.workload, self.policy
        take = jax.jit(lambda params, *columns: completion_logprobs(policy, params, *columns)[0])
        differences = []
        for p in range(w.prompts):
            of_prompt, members = slice(p, p + 1), slice(p * w.group, (p + 1) * w.group)
            prompt = (np.repeat(x[of_prompt], w.group, axis=0) for x in (rollout.prompt_tokens, rollout.prompt_mask))
            mask = rollout.mask[members]
            logprobs = take(self.params, *prompt, rollout.completion_tokens[members], mask)
            differences.append(np.abs(np.asarray(logprobs) - rollout.logprobs[members])[mask])
        every = np.concatenate(differences)
        return {"mean": float(every.mean()), "max": float(every.max())}

    def step(self, workdir: pathlib.Path, kl_coef: float = 0.04) -> Callable[[], dict[str, float]]:
        """A whole GRPO step: rollout, rewards (journaled in the workdir), reference, update; what took how long."""
        w = self.workload
        objective, (optimizer, _) = make_objective(LossConfig(kl_coef=kl_coef)), make_optimizer(OptimizerConfig(), 1)
        texts, journal = w.texts, RewardJournal(workdir)
        update = UpdateConfig(microbatches=w.microbatches)
        experience = GroupRollouts(
            sampler=self.sampler, source=lambda cursor: Prompt(text=texts[cursor % w.prompts]),
            rewards=(Reward(name="reward", function=completion_reward),), objective=objective,
            config=RolloutConfig(prompts=w.prompts, group_size=w.group),
            reference_logprobs=make_reference_logprobs(self.policy, update, self.mesh),
        )  # fmt: skip
        state = init_train_state(self.policy, self.params, optimizer, objective, self.mesh)
        self.params = None  # the state has its own
        train_step = make_train_step(
            self.policy, optimizer, objective, update, like=state, key=jax.random.key(w.seed)
        )  # fmt: skip

        def step() -> dict[str, float]:
            nonlocal state
            started = time.perf_counter()
            experienced = experience(state, journal, lambda: None)
            updating = time.perf_counter()
            w.check(np.asarray(experienced.batch.mask).sum(axis=1), "ours")
            state, metrics = train_step(state, experienced.batch)
            metrics = jax.device_get(metrics)
            state = dataclasses.replace(state, cursor=state.cursor + w.prompts)
            ended = time.perf_counter()
            return {
                "seconds": ended - started, "generation_seconds": experienced.rollout_seconds,
                "update_seconds": ended - updating + experienced.reference_seconds,
            }  # fmt: skip

        return step

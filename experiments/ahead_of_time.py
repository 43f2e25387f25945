"""A run on devices that need not be here: its pieces from shapes alone, and its programs, compiled ahead of time."""

import dataclasses
import functools
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import collectives, footprint, runs, tasks
from grpo_jax import floors, objectives, optimizers, prefill, rollouts, sampling, sharding, training
from grpo_jax.data.sources import Prompt
from grpo_jax.data.tokenizer import ByteTokenizer
from grpo_jax.models import lora, pretrained
from grpo_jax.models.shapes import SHAPES, shape
from grpo_jax.models.transformer import TransformerConfig, make_policy
from grpo_jax.optimizers import HOST
from grpo_jax.sampler import Sampler

__all__ = [
    "PROGRAMS",
    "SECTIONS",
    "LossConfig",
    "Planned",
    "RolloutConfig",
    "UpdateConfig",
    "beside",
    "compiled",
    "model_of",
    "needs",
    "sent",
]

PROGRAMS = ("train", "reference", "sampler")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig(rollouts.RolloutConfig):
    """What is sampled at every step: prompts x group_size completions."""

    prompts: int = 256  # prompts a step
    max_tokens: int = 512  # a completion is cut there
    max_prompt_tokens: int = 256  # of the longest prompt

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.max_tokens, self.max_prompt_tokens) < 1:
            raise ValueError(
                f"max_tokens={self.max_tokens} and max_prompt_tokens={self.max_prompt_tokens} must be 1 or more."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig(objectives.LossConfig):
    """The objective of GRPO."""

    kl_coef: float = 1e-4  # beta; 0: no reference is held and no reference pass runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateConfig(training.UpdateConfig):
    """How one rollout becomes optimizer steps: epochs x minibatches of them."""

    microbatches: int = 64  # parts of a minibatch, one after the other; saves memory, and short completions fill fewer


SECTIONS: dict[str, type[Any]] = {
    "policy": tasks.ModelConfig,
    "lora": lora.LoraConfig,
    "rollout": RolloutConfig,
    "loss": LossConfig,
    "optimizer": optimizers.OptimizerConfig,
    "update": UpdateConfig,
    "mesh": sharding.MeshConfig,
}


def model_of(name: str, policy: tasks.ModelConfig) -> TransformerConfig:
    """A published shape by name, or that of a Hugging Face directory, as it is computed with.

    Raises:
      ValueError: it is neither.
    """
    if name in SHAPES:
        return dataclasses.replace(shape(name), **dataclasses.asdict(policy))
    if not pathlib.Path(name).is_dir():
        raise ValueError(f"--model={name} is no directory, and no shape that is known: {', '.join(SHAPES)}.")
    return pretrained.read_config(pathlib.Path(name), **dataclasses.asdict(policy))


class Planned:
    """The pieces of a run on devices that need not be here, and what it holds on each of them."""

    def __init__(self, model: TransformerConfig, config: dict[str, Any], devices: Any, memory: float | None):
        """Raises ValueError where the pieces do not fit together. `memory`: bytes of a device, None: no limit."""
        self.model, self.config, rollout, update = model, config, config["rollout"], config["update"]
        self.mesh = sharding.make_mesh(config["mesh"], devices)
        tpus = [device for device in self.mesh.devices.flat if device.platform == "tpu"]
        self.slices = len({getattr(device, "slice_index", 0) for device in tpus}) or 1
        if slow := {*sharding.between_slices(self.mesh)} - {"data"} if tpus else ():
            raise ValueError(
                f"{' and '.join(sorted(slow))} would go from slice to slice, where links are slow, and no floor is "
                f"known of that: make --mesh.data a multiple of --slices={self.slices}."
            )
        self.policy = lora.adapted_policy(make_policy(model, self.mesh), model, config["lora"])
        self.objective = objectives.make_objective(config["loss"])
        self.completions = rollout.prompts * rollout.group_size
        training.check_divides(self.completions, update, self.mesh)
        runs.check_multiples(self.mesh, {"rollout.prompts": rollout.prompts})
        self.optimizer, _ = optimizers.make_optimizer(config["optimizer"], 100)
        sizes = {"max_tokens": rollout.max_tokens, "max_prompt_tokens": rollout.max_prompt_tokens}
        self.state = training.abstract_train_state(
            self.policy, lora.abstract(model, config["lora"])[0], self.optimizer, self.objective, self.mesh,
            rollouts.surplus_of(rollout, self.objective, **sizes), config["optimizer"].offload,
        )  # fmt: skip
        copies = footprint.copies_held(self.policy, self.state.params, config["optimizer"], config["loss"])
        self.sampler = Sampler(
            self.policy, self.mesh, ByteTokenizer(), group_size=rollout.group_size, key=jax.random.key(0),
            slots=rollout.slots, memory=2**62 if memory is None else int(memory), copies=copies, **sizes,
        )  # fmt: skip
        # Of which only shapes are asked: no prompt, and no reward.
        self.experience = rollouts.GroupRollouts(
            sampler=self.sampler, source=lambda i: Prompt(text=""), rewards=(), config=rollout,
            objective=self.objective,
            reference_logprobs=training.make_reference_logprobs(self.policy, update, self.mesh),
        )  # fmt: skip

    @functools.cached_property
    def held(self) -> dict[str, int]:
        """Bytes of a device that the run holds at every moment, without what lies in the host's memory.

        With dynamic sampling also the groups that wait for the next step; but not those of the waves before the one
        that is sampled, which are some 13 bytes a token of a completion too, split over the devices.
        """

        def size(tree: Any) -> int:
            leaves = [x for x in jax.tree.leaves(tree) if x.sharding.memory_kind != HOST]
            return sum(int(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize for x in leaves)

        state = self.state
        waiting = {} if state.surplus is None else {"groups that wait": size(state.surplus)}
        return {
            "parameters": size(state.params),
            "reference": size(state.reference),
            "optimizer": size(state.opt_state),
            **waiting,
        }

    @functools.cached_property
    def _chunks(self) -> list[tuple[int, int]]:
        rollout, shards = self.config["rollout"], self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        plan = self.sampler.plan(self.state.params, rollout.prompts)
        return prefill.chunks(self.policy, plan.prompts, rollout.max_prompt_tokens, shards)

    @functools.cached_property
    def sampled(self) -> dict[str, int]:
        """Bytes of a device that the sampler holds: its weights, and the caches of prompts and of completions."""
        rollout, plan = self.config["rollout"], self.sampler.plan(self.state.params, self.config["rollout"].prompts)
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        rows, width = sampling.arrange(plan.prompts, rollout.group_size, plan.slots, shards)
        columns = sum(count * of_chunk for count, of_chunk in self._chunks)
        place = functools.partial(sharding.device_bytes, mesh=self.mesh, rules=sharding.SAMPLER_RULES)
        cache = lambda *sizes: place(jax.eval_shape(lambda: self.policy.init_cache(*sizes)), self.policy.cache_axes)
        weights = jax.eval_shape(self.policy.prepare, self.state.params)
        copied = (rows, width) != (plan.prompts, rollout.group_size)  # prompts' caches, into the rows that read them
        return {
            "sampler weights": place(weights, self.policy.sampler_axes),
            "caches of prompts": cache(plan.prompts, 1, columns) + copied * cache(rows, 1, columns),
            "caches of completions": cache(rows, width, rollout.max_tokens),
        }

    @functools.cached_property
    def updated(self) -> dict[str, int]:
        """Bytes of a device that gradients and what layers keep for the backward pass take, by formulas."""
        rollout = self.config["rollout"]
        return footprint.updating(
            self.model, self.policy, self.mesh, completions=self.completions,
            columns=rollout.max_prompt_tokens + rollout.max_tokens, update=self.config["update"],
            adapters=self.config["lora"],
        )  # fmt: skip

    def train(self) -> Any:
        """The compiled train step, of the batch that a run gives it."""
        step: Any = training.make_train_step(
            self.policy, self.optimizer, self.objective, self.config["update"], like=self.state, key=jax.random.key(0)
        )
        return step.lower(self.state, self.experience.abstract_batch()).compile()

    def reference(self) -> Any:
        """The compiled pass of the reference."""
        sampled = self.sampler.abstract_rollout(self.config["rollout"].prompts)
        logprobs: Any = self.experience.reference_logprobs
        return logprobs.lower(rollouts.reference_of(self.state), sampled, 1.0).compile()

    def sample(self) -> tuple[Any, Any]:
        """The compiled prefill, and a compiled chunk of decoding."""
        return self.sampler.compile(self.state.params, self.config["rollout"].prompts)

    def work(self) -> dict[str, floors.Work]:
        """What the parts of a step need at least, all completions full."""
        c, rollout, update = self.model, self.config["rollout"], self.config["update"]
        plan = self.sampler.plan(self.state.params, rollout.prompts)
        step = floors.Step(
            prompt_tokens=rollout.max_prompt_tokens, max_tokens=rollout.max_tokens,
            lengths=np.full((rollout.prompts, rollout.group_size), rollout.max_tokens), slots=plan.slots,
            chunks=sum(count for count, _ in self._chunks),
            waves=rollout.prompts // plan.prompts, epochs=update.epochs, minibatches=update.minibatches,
            microbatches=update.microbatches, reference=self.objective.needs_reference, remat=c.remat,
            adapters=footprint.adapters_of(self.config["lora"]), compute_bytes=jnp.dtype(c.compute_dtype).itemsize,
            cache_bytes=jnp.dtype(c.decoding_dtype).itemsize,
            sampler_bytes=1 if c.sampler_dtype == "int8" else jnp.dtype(c.decoding_dtype).itemsize,
        )  # fmt: skip
        layout = floors.Layout(**dataclasses.asdict(self.config["mesh"]), slices=self.slices)
        return floors.of_step(floors.Model.of(c), step, layout)


def needs(program: Any) -> dict[str, int]:
    """Bytes of a device, as the compiler says of a compiled program."""
    m = program.memory_analysis()
    return {
        "arguments": m.argument_size_in_bytes, "temporaries": m.temp_size_in_bytes,
        "outputs": m.output_size_in_bytes - m.alias_size_in_bytes, "code": m.generated_code_size_in_bytes,
    }  # fmt: skip


def _too_large(error: Exception) -> dict[str, Any]:
    """What the compiler said of a program that is larger than the memory: bytes used, and those there are."""
    unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    amount = r"([\d.]+)([KMGT])"
    said = re.search(rf"Used {amount} of {amount} hbm|\({amount}\) exceeds available HBM \({amount}\)", str(error))
    if not said:
        return {"said": str(error)[:500]}
    used, of_used, limit, of_limit = filter(None, said.groups())
    return {"used": float(used) * unit[of_used], "limit": float(limit) * unit[of_limit]}


def compiled(planned: Planned, programs: tuple[str, ...] = PROGRAMS) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Compiles, one program after the other.

    Yields:
      Its name, what came out (seconds, and bytes as of `needs`; or that it is too large, or what went wrong), and the
      compiled program, where there is one.
    """
    makers: dict[str, tuple[tuple[str, ...], Callable[[], Any]]] = {
        "train": (("train",), lambda: (planned.train(),)),
        "reference": (("reference",), lambda: (planned.reference(),)),
        "sampler": (("start", "decode"), planned.sample),
    }
    for asked in programs:
        names, make = makers[asked]
        if asked == "reference" and not planned.objective.needs_reference:
            continue
        started = time.perf_counter()
        try:
            made = make()
        except jax.errors.JaxRuntimeError as error:
            said = {"too_large": _too_large(error)} if "RESOURCE_EXHAUSTED" in str(error) else {"error": str(error)}
            yield asked, {"seconds": time.perf_counter() - started, **said}, None
            continue
        seconds = time.perf_counter() - started  # of both of the sampler's programs
        for name, program in zip(names, made, strict=True):
            yield name, {"seconds": seconds, **needs(program)}, program


def beside(name: str, planned: Planned) -> int:
    """Bytes of what a run holds while a program runs, beside the program's arguments."""
    held = planned.held
    always = sum(held.values())
    return {
        "train": 0,  # takes the whole state
        "reference": always - (held["reference"] or held["parameters"]),  # of adapters it is in the parameters
        "start": always - held["parameters"],
        "decode": always,
    }[name]


def sent(program: Any, planned: Planned) -> tuple[float, float]:
    """Bytes that a device sends in a train step, by its collectives, if all of its microbatches hold something.

    Over links, and from slice to slice.
    """
    update, rollout, mesh = planned.config["update"], planned.config["rollout"], planned.mesh.shape
    parts = update.microbatches * update.minibatches * mesh["data"] * mesh["fsdp"]
    tokens = planned.completions * rollout.max_tokens // parts
    ids, shards = planned.model.vocab_size, mesh["fsdp"] * mesh["tensor"]
    ids, meet = (ids // shards, mesh["fsdp"]) if ids % shards == 0 else (ids // mesh["tensor"], 1)
    at_once = max(1, 2**24 // (min(ids, 4096) * meet))  # as `logprobs` cuts the tokens that come to a part of the head
    outer = [update.microbatches] if update.microbatches > 1 else []
    found = collectives.sent(program.as_text(), [*outer, max(1, -(-tokens // at_once)), 1, 1, 1])
    slow = sum(one.bytes for one in found if one.kind == collectives.SLICES)
    return sum(one.bytes for one in found) - slow, slow

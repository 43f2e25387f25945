"""Whether a run will fit, and how fast it can be at best, on machines that are not here.

python -m experiments.plan --model=qwen2.5-0.5b --topology=v5e:4x4 --mesh.fsdp=16 --rollout.prompts=128

Compiles what a run compiles (the train step, the reference's pass, the sampler's prefill and decoding) from shapes
alone, for a TPU topology (libtpu) or NVIDIA GPUs (the CUDA plugin of JAX), on any machine, and prints what each program
needs of a device beside what the run holds meanwhile; then what the step has to compute, read and send by
`grpo_jax.floors`, all completions full, and which of the three takes longest at the rates that the chip's maker
publishes. Nothing is read but config.json, where --model is a directory.
"""

import dataclasses
import functools
import json
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import chips, collectives, footprint, process, runs, tasks
from experiments import flags as sections
from experiments.flags import section
from grpo_jax import floors, objectives, optimizers, rollouts, sampling, sharding, training
from grpo_jax.data.sources import Prompt
from grpo_jax.data.tokenizer import ByteTokenizer
from grpo_jax.models import lora, pretrained
from grpo_jax.models.shapes import SHAPES, shape
from grpo_jax.models.transformer import TransformerConfig, make_policy
from grpo_jax.optimizers import HOST
from grpo_jax.sampler import Sampler
from grpo_jax.telemetry import write_atomically

__all__ = ["PROGRAMS", "Planned", "compiled", "model_of", "needs"]

PROGRAMS = ("train", "reference", "sampler")
_GB = 1e9


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
    def sampled(self) -> dict[str, int]:
        """Bytes of a device that the sampler holds: its weights, and the caches of prompts and of completions."""
        rollout, plan = self.config["rollout"], self.sampler.plan(self.state.params, self.config["rollout"].prompts)
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        rows, width = sampling.arrange(plan.prompts, rollout.group_size, plan.slots, shards)
        count, columns = sampling.chunks(plan.prompts, rollout.max_prompt_tokens, shards)
        place = functools.partial(sharding.device_bytes, mesh=self.mesh, rules=sharding.SAMPLER_RULES)
        cache = lambda *sizes: place(jax.eval_shape(lambda: self.policy.init_cache(*sizes)), self.policy.cache_axes)
        weights = jax.eval_shape(self.policy.prepare, self.state.params)
        copied = (rows, width) != (plan.prompts, rollout.group_size)  # prompts' caches, into the rows that read them
        return {
            "sampler weights": place(weights, self.policy.sampler_axes),
            "caches of prompts": cache(plan.prompts, 1, count * columns) + copied * cache(rows, 1, count * columns),
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
        count, _ = sampling.chunks(
            plan.prompts, rollout.max_prompt_tokens, self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        )
        step = floors.Step(
            prompt_tokens=rollout.max_prompt_tokens, max_tokens=rollout.max_tokens,
            lengths=np.full((rollout.prompts, rollout.group_size), rollout.max_tokens), slots=plan.slots, chunks=count,
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


def _beside(name: str, planned: Planned) -> int:
    """Bytes of what a run holds while a program runs, beside the program's arguments."""
    held = planned.held
    always = sum(held.values())
    return {
        "train": 0,  # takes the whole state
        "reference": always - (held["reference"] or held["parameters"]),  # of adapters it is in the parameters
        "start": always - held["parameters"],
        "decode": always,
    }[name]


def _sent(program: Any, planned: Planned) -> tuple[float, float]:
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


def report(
    planned: Planned, chip: chips.Chip, programs: tuple[str, ...], keep: Callable[[dict], None]
) -> dict[str, Any]:
    """Everything that is known, as plain values; `keep` gets what there is after each program."""
    result: dict[str, Any] = {
        "devices": planned.mesh.size,
        "memory": chip.memory,
        "parameters": footprint.parameters(planned.model),
        "held": planned.held,
        "sampled": planned.sampled,
        "updated": planned.updated,
        "plan": dataclasses.asdict(planned.sampler.plan(planned.state.params, planned.config["rollout"].prompts)),
        "work": {
            name: {
                "flop": work.flop, "memory": dict(work.memory), "interconnect": dict(work.interconnect),
                "network": dict(work.network), "milliseconds": work.milliseconds(chip.rates),
                "bottleneck": work.bottleneck(chip.rates),
            }
            for name, work in planned.work().items()
        },
        "programs": {},
    }  # fmt: skip
    keep(result)
    print(
        f"compiling {', '.join(programs)}: minutes, or half of them and some percent more or less memory with "
        "JAX_OPTIMIZATION_LEVEL=O0 in the environment", flush=True,
    )  # fmt: skip
    for name, said, program in compiled(planned, programs):
        if program is not None:
            total = sum(said[part] for part in ("arguments", "temporaries", "outputs", "code")) + _beside(name, planned)
            said |= {"total": total, "fits": total <= chip.memory}
            if name == "train":
                said["sent"], said["sent_to_slices"] = _sent(program, planned)
        said["peak_rss"] = process.peak_rss()
        result["programs"][name] = said
        print(line(name, said, chip), flush=True)
        keep(result)
    return result


def line(name: str, said: dict[str, Any], chip: chips.Chip) -> str:
    """What a program needs, in words."""
    took = f"compiled in {said['seconds']:.0f} s, with {said['peak_rss'] / _GB:.1f} GB here"
    if "error" in said:
        return f"{name}: does not compile: {said['error'][:500]}"
    if "total" not in said:
        used = said["too_large"].get("used")
        by = "" if used is None else f": {used / _GB:.1f} GB, {(used - said['too_large']['limit']) / _GB:.1f} too many"
        return f"{name}: DOES NOT FIT by itself{by}; {took}"
    room = (chip.memory - said["total"]) / _GB
    verdict = f"fits, {room:.1f} GB are left" if room >= 0 else f"DOES NOT FIT: {-room:.1f} GB too many"
    return (
        f"{name}: {said['total'] / _GB:.2f} GB at its most, {verdict} (arguments {said['arguments'] / _GB:.2f}, "
        f"temporaries {said['temporaries'] / _GB:.2f}, results {said['outputs'] / _GB:.2f}, beside it "
        f"{(said['total'] - sum(said[x] for x in ('arguments', 'temporaries', 'outputs', 'code'))) / _GB:.2f}); {took}"
    )


def head(result: dict[str, Any]) -> str:
    """What is known without a compiler."""
    gb = lambda sizes: ", ".join(f"{name} {size / _GB:.2f}" for name, size in sizes.items())
    plan = result["plan"]
    lines = [
        f"{result['parameters']:,} parameters on {result['devices']} devices of {result['memory'] / _GB:.0f} GB",
        f"GB of a device, always: {gb(result['held'])}",
        f"GB of a device, while it samples {plan['prompts']} prompts at a time, "
        f"{plan['slots'] or 'all'} completions of theirs: {gb(result['sampled'])}",
        f"GB of a device, while it updates, by formulas: {gb(result['updated'])}",
        "",
        f"{'of a step, a device':<12}{'TFLOP':>11}{'GB read':>10}{'GB sent':>10}"
        f"{'compute':>12}{'memory':>12}{'links':>12}   at best, and limited by",
    ]
    total: dict[str, float] = dict.fromkeys(("compute", "memory", "interconnect"), 0.0)
    slow = sum(sum(work["network"].values()) for work in result["work"].values())
    for name, work in result["work"].items():
        ms = work["milliseconds"]
        total = {kind: total[kind] + ms[kind] for kind in total}
        lines.append(
            f"{name:<19} {work['flop'] / 1e12:>10.2f} {sum(work['memory'].values()) / _GB:>9.2f} "
            f"{sum(work['interconnect'].values()) / _GB:>9.2f}"
            + "".join(f" {ms[kind]:>8.1f} ms" for kind in total)
            + f"   {max(ms.values()):.1f} ms, {work['bottleneck']}"
        )
    least = sum(max(work["milliseconds"].values()) for work in result["work"].values())
    lines.append(f"{'step':<50}" + "".join(f" {ms:>8.1f} ms" for ms in total.values()) + f"   {least:.1f} ms")
    if slow:
        ms = sum(work["milliseconds"].get("network", 0.0) for work in result["work"].values())
        lines.append(f"{'from slice to slice':<41}{slow / _GB:>9.2f}{'':>36}{ms:>9.1f} ms over the network")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Plans, and prints."""
    if len(argv) > 1:
        sys.exit(f"error: unexpected arguments {argv[1:]}; flags are written --name=value.")
    values, path = flags.FLAGS, flags.FLAGS.json
    try:
        chips.absent()
        if unknown := {*values.programs} - {*PROGRAMS}:
            raise ValueError(f"--programs={','.join(sorted(unknown))} must be among {', '.join(PROGRAMS)}.")
        config = runs.configured({name: flag.value for name, flag in FLAGS_OF.items()})
        chip, _ = chips.chip_of(values.topology)
        if path and not (folder := pathlib.Path(path).absolute().parent).is_dir():
            raise ValueError(f"--json={path}: there is no directory {folder}.")
        kernels = {"cudnn": "needs cuDNN and its GPU"} | ({"splash": "is for TPUs"} if chip.target else {})
        if wrong := kernels.get(config["policy"].attention):
            other = "xla" if chip.target else "splash or xla"
            raise ValueError(
                f"--policy.attention={config['policy'].attention} {wrong}: to plan for {values.topology} give {other}."
            )
        if values.slices > 1 and not chip.rates.network:
            raise ValueError(
                f"--slices={values.slices} of {values.topology}: what goes from slice to slice in a second is not "
                f"published; it is of {', '.join(name for name, c in chips.CHIPS.items() if c.rates.network)}."
            )
        devices = chips.devices_of(values.topology, values.slices)
        planned = Planned(model_of(values.model, config["policy"]), config, devices, chip.memory)
        if planned.mesh.size != len(devices):
            raise ValueError(
                f"the mesh has {planned.mesh.size} devices, and --topology={values.topology} has {len(devices)}: make "
                "--mesh.data x --mesh.fsdp x --mesh.tensor as many."
            )

        def keep(result: dict[str, Any]) -> None:
            if not result["programs"]:
                print(f"{head(result)}\n", flush=True)
            if path:
                about = {
                    "model": values.model,
                    "topology": values.topology,
                    "slices": values.slices,
                    **runs.as_json(config),
                }
                write_atomically(pathlib.Path(path), json.dumps({**about, **result}, indent=1) + "\n")

        report(planned, chip, tuple(values.programs), keep)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.DEFINE_string("model", None, f"A Hugging Face directory, or a shape: {', '.join(SHAPES)}.", required=True)
    flags.DEFINE_string(
        "topology", None, f"A chip among {', '.join(chips.CHIPS)}, and how many: v5e:8x8, v5p:4x4x4, h100:8.",
        required=True,
    )  # fmt: skip
    flags.DEFINE_integer("slices", 1, "So many of the topology, joined by a data-centre network (TPUs).", lower_bound=1)
    flags.DEFINE_list("programs", list(PROGRAMS), f"What is compiled, among {', '.join(PROGRAMS)}.")
    flags.DEFINE_string("json", "", "A file for everything that is known, written after each program; empty: none.")
    FLAGS_OF = {name: section(name, cls) for name, cls in SECTIONS.items()}
    flags.adopt_module_key_flags(sections)
    process.command(main)

"""What a run will take: the arithmetic of a step, and the memory of a device, estimated from shapes."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grpo_jax import floors, objectives, optimizers, sharding, training
from grpo_jax.logprobs import CHUNK
from grpo_jax.memory import device_memory
from grpo_jax.models import lora
from grpo_jax.models.attention import queries_at_a_time
from grpo_jax.models.transformer import TransformerConfig, abstract_params
from grpo_jax.rollouts import RolloutConfig
from grpo_jax.sampler import Sampler, rollout_bytes
from grpo_jax.types import Policy, PyTree

__all__ = ["batch_arithmetic", "copies_held", "estimate", "line", "moments", "parameters", "trained_share", "trains"]


def parameters(config: TransformerConfig) -> int:
    """How many a model has."""
    return sum(x.size for x in jax.tree.leaves(abstract_params(config)[0]))


def trained_share(policy: Policy, params: PyTree) -> float:
    """Of the bytes of a policy's parameters, or of their shapes: 1, or of adapters little."""
    return _bytes(policy.split.parts(params)[0]) / _bytes(params)


def _bytes(tree: PyTree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def trains(config: TransformerConfig, adapters: lora.LoraConfig) -> str:
    """What is said of a model that is not trained itself; empty where it is."""
    if not adapters.rank:
        return ""
    count = sum(x.size for x in jax.tree.leaves(lora.abstract_adapters(config, adapters)[0]))
    return (
        f", which are frozen; {count:,} of adapters beside them train (rank {adapters.rank}, {adapters.alpha:g} / "
        f"{adapters.rank} times, of {', '.join(adapters.targets)})"
    )


def batch_arithmetic(rollout: RolloutConfig, update: training.UpdateConfig, mesh: Mesh, max_tokens: int) -> str:
    """A step in numbers: prompts x group -> completions -> microbatches per device -> optimizer steps."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    completions = rollout.prompts * rollout.group_size
    each = completions // update.minibatches
    tokens = f"{max_tokens} tokens" + (f", in up to {rollout.max_waves} waves" if rollout.max_waves > 1 else "")
    return (
        f"a step: {rollout.prompts} prompts x {rollout.group_size} = {completions} completions of up to "
        f"{tokens}; {update.epochs} epochs x {update.minibatches} minibatches = {update.epochs * update.minibatches} "
        f"optimizer steps of {each} completions, {each // (update.microbatches * shards)} at a time on each of "
        f"{shards} data shards; {'short ones share rows' if update.microbatches > 1 else _UNSHARED}"
    )


_UNSHARED = "with more --update.microbatches short ones would share rows and cost less"


def moments(policy: Policy, params: PyTree, optimizer: optimizers.OptimizerConfig) -> float:
    """How many times a policy's parameters the optimizer's state is, on a device: 2 of Adam's where all of them train.

    0 where it lies on the host. `params`: shapes will do.
    """
    if optimizer.offload:
        return 0.0
    trained, _ = policy.split.parts(params)
    state = jax.eval_shape(optimizers.make_optimizer(optimizer, 1)[0].init, trained)
    return _bytes([x for x in jax.tree.leaves(state) if x.ndim]) / _bytes(params)


def copies_held(
    policy: Policy, params: PyTree, optimizer: optimizers.OptimizerConfig, loss: objectives.LossConfig | None = None
) -> float:
    """How many times a training run holds a policy's parameters: themselves, the optimizer's state, and a reference.

    Of the last only where there is one, and where it is not in the parameters. `params`: shapes will do.
    """
    reference = loss is not None and loss.kl_coef > 0 and policy.split.reference is None
    return 1 + moments(policy, params, optimizer) + reference


def adapters_of(config: lora.LoraConfig) -> floors.Adapters | None:
    """What floors know of adapters; None where there are none."""
    base_bytes = jnp.dtype(config.base_dtype).itemsize
    return floors.Adapters(rank=config.rank, targets=config.targets, base_bytes=base_bytes) if config.rank else None


def _rows(completions: int, update: training.UpdateConfig, mesh: Mesh) -> int:
    """Of a microbatch, on a device."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    return max(1, completions // (update.minibatches * update.microbatches * shards))


def updating(
    config: TransformerConfig, policy: Policy, mesh: Mesh, *, completions: int, columns: int,
    update: training.UpdateConfig, adapters: lora.LoraConfig = lora.LoraConfig(),
) -> dict[str, int]:  # fmt: skip
    """Bytes of a device while an update is computed, by formulas: gradients, and what layers keep of a microbatch.

    Of one layer all that a backward pass asks for, however the others are made again. `columns`: of a row.
    """
    shapes, axes = lora.abstract(config, adapters)
    gradients = sharding.device_bytes(shapes, axes, mesh) * trained_share(policy, shapes)
    rows, model, own = _rows(completions, update, mesh), floors.Model.of(config), adapters_of(adapters)
    of_layer = lambda remat: floors.kept(model, remat, own, mesh.shape["tensor"])
    of_token = round((config.layers - 1) * of_layer(config.remat) + of_layer("none"))
    scores = 0 if config.attention != "xla" else 2 * rows * config.heads * queries_at_a_time(columns) * columns * 4
    return {
        "gradients": round(gradients * (1 + (update.microbatches > 1))),  # and their sum
        "activations": rows * columns * of_token * jnp.dtype(config.compute_dtype).itemsize + scores,
    }


def estimate(
    config: TransformerConfig, policy: Policy, mesh: Mesh, sampler: Sampler, *, rollout: RolloutConfig,
    update: training.UpdateConfig, optimizer: optimizers.OptimizerConfig, loss: objectives.LossConfig,
    adapters: lora.LoraConfig = lora.LoraConfig(),
) -> dict[str, int]:  # fmt: skip
    """Bytes a device needs, estimated from shapes: `state` all the time, beside it `update` or `rollout`.

    A compiler needs somewhat more or less: it fuses, and keeps copies.
    """
    shapes, axes = lora.abstract(config, adapters)
    params = sharding.device_bytes(shapes, axes, mesh)
    plan, max_tokens = sampler.plan(shapes, rollout.prompts), sampler.max_tokens
    on_device = moments(policy, shapes, dataclasses.replace(optimizer, offload=False))
    brought = round(params * on_device) if optimizer.offload else 0
    completions, columns = rollout.prompts * rollout.group_size, sampler.max_prompt_tokens + max_tokens
    updated = updating(config, policy, mesh, completions=completions, columns=columns, update=update, adapters=adapters)
    logits = _rows(completions, update, mesh) * max_tokens * config.vocab_size // mesh.shape["tensor"]
    logits = min(5 * 4 * logits, 2 * 4 * CHUNK)  # whole, with their softmax and its gradient, or in chunks
    return {
        "state": round(params * copies_held(policy, shapes, optimizer, loss)),
        # Moments come when activations and logits have gone.
        "update": updated["gradients"] + max(updated["activations"] + logits, brought),
        "rollout": rollout_bytes(
            policy,
            mesh,
            shapes,
            prompts=plan.prompts,
            group_size=rollout.group_size,
            slots=plan.slots,
            max_prompt_tokens=sampler.max_prompt_tokens,
            max_tokens=max_tokens,
        ),
    }


def line(bytes_of: Mapping[str, int]) -> str:
    """`estimate` in words, beside what the device has, where it says."""
    gib = lambda n: f"{n / 2**30:.2f} GiB"
    total = bytes_of["state"] + max(bytes_of["update"], bytes_of["rollout"])
    limit = device_memory()
    parts = ", ".join(f"{name} {gib(n)}" for name, n in bytes_of.items())
    line = f"memory a device, estimated: {gib(total)} ({parts})"
    if limit is None:
        return line
    return f"{line} of {gib(limit)}" + (
        "; this will hardly fit: more --update.microbatches, fewer --rollout.prompts, or more devices along --mesh.fsdp"
        if total > limit
        else ""
    )

"""A minibatch as packed microbatches over a mesh: what an update, or a pass of log-probabilities, loops over.

Every device packs the completions that it holds (`packing`), and takes the same number of its rows at a time. Short
completions fill few rows, and the loop ends with the last microbatch that holds any on any device.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax.logprobs import row_logprobs
from grpo_jax.packing import SLOTS, Rows, pack
from grpo_jax.sharding import per_device
from grpo_jax.types import Array, Policy, PyTree, TrainBatch, record

__all__ = ["Microbatches", "frozen_logprobs", "over_data", "over_parts", "pack_microbatches"]

_T = TypeVar("_T")


@record
class Microbatches:
    """The rows of a minibatch of b completions, and what goes by its completions; inside `over_data` a shard's."""

    rows: Rows  # [data, b / data, ...]
    of: PyTree  # leaves [data, b / data, ...]
    count: Array  # [] int32, how many microbatches hold something; at least 1
    tokens: Array  # [parts] int32: no device is asked for more log-probabilities than that in each

    def part(self, i: jax.Array | int, mesh: Mesh) -> Rows:
        """The rows of a data shard's microbatch: as many of each device."""

        def cut(x):
            own = x.reshape(mesh.shape["fsdp"], -1, *x.shape[1:])
            size = own.shape[1] // self.tokens.shape[0]
            return jax.lax.dynamic_slice_in_dim(own, i * size, size, axis=1).reshape(-1, *x.shape[1:])

        return jax.tree.map(cut, self.rows)


def pack_microbatches(policy: Policy, batch: TrainBatch, of: PyTree, parts: int, mesh: Mesh) -> Microbatches:
    """At most `parts` microbatches of b completions, of rows that hold as many as the policy can tell apart.

    Args:
      policy: the model.
      batch: b completions; b divides into parts x data x fsdp.
      of: arrays [b, ...], to be carried along.
      parts: the number of microbatches that hold b rows.
      mesh: data and fsdp split completions.
    """
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    arrays = batch.prompt_tokens, batch.prompt_mask, batch.completion_tokens, batch.mask, batch.temperature
    shards = jax.tree.map(lambda x: x.reshape(data, x.shape[0] // data, *x.shape[1:]), (arrays, of))
    arrays, of = jax.lax.with_sharding_constraint(shards, NamedSharding(mesh, PartitionSpec("data", "fsdp")))
    slots = min(SLOTS, policy.max_segments or SLOTS)
    rows: Rows = jax.vmap(per_device(functools.partial(pack, slots=slots), mesh), spmd_axis_name="data")(*arrays)
    filled = (rows.segments[..., 0] > 0).reshape(data * fsdp, parts, -1).any(axis=2)  # the first ones, in each device
    tokens = rows.mask.reshape(data * fsdp, parts, -1).sum(axis=2)
    return Microbatches(
        rows=rows, of=of, count=jnp.maximum(filled.sum(axis=1).max(), 1), tokens=tokens.max(axis=0).astype(jnp.int32)
    )


def over_data(function: Callable[[PyTree, Microbatches], _T], params: PyTree, microbatches: Microbatches) -> _T:
    """`function(params, shard)` for each data shard, as an axis of the arrays: [data, ...].

    So nothing is reduced over data inside of `function`, and only rows over fsdp are left for XLA to split. The count
    and the tokens of microbatches are the same for all shards: loops must not differ between them.
    """

    def of_shard(rows, of):
        return function(params, dataclasses.replace(microbatches, rows=rows, of=of))

    return jax.vmap(of_shard, spmd_axis_name="data")(microbatches.rows, microbatches.of)


def over_parts(
    function: Callable[[Rows, jax.Array], tuple[jax.Array, ...]],
    shard: Microbatches,
    mesh: Mesh,
    out: tuple[jax.Array, ...],
) -> tuple[jax.Array, ...]:
    """`function(rows, i)` of a data shard's microbatches, one after the other, each result put in its place.

    Args:
      function: the rows of microbatch i -> [r, n] of each row.
      shard: of the rows R, inside of `over_data`.
      mesh: fsdp splits rows.
      out: [R, n] each, what stands where a microbatch holds nothing and is not run.
    """

    def put(whole, part, i):
        own, part = (x.reshape(mesh.shape["fsdp"], -1, x.shape[1]) for x in (whole, part))
        start = i * part.shape[1]
        return jax.lax.dynamic_update_slice_in_dim(own, part, start, axis=1).reshape(whole.shape)

    def add(i, out):
        return tuple(put(whole, x, i) for whole, x in zip(out, function(shard.part(i, mesh), i), strict=True))

    return jax.lax.fori_loop(0, shard.count, add, out)


def frozen_logprobs(
    policy: Policy, params: PyTree, microbatches: Microbatches, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and entropies [B, T] under fixed parameters; the microbatches are packed with their mask."""

    def of_shard(params, shard: Microbatches):
        def of_part(rows, i):
            return row_logprobs(policy, params, rows, count=shard.tokens[i], mesh=mesh)[:2]

        zeros = jnp.zeros(shard.rows.mask.shape)
        unpack = functools.partial(per_device(Rows.unpack, mesh), shard.rows)
        return tuple(unpack(x, shard.of) for x in over_parts(of_part, shard, mesh, (zeros, zeros)))

    of_all = over_data(of_shard, params, microbatches)
    logprobs, entropies = (jax.lax.stop_gradient(x.reshape(-1, x.shape[-1])) for x in of_all)
    return logprobs, entropies

"""Prompts into caches: each is read once, in chunks of columns, so that memory is bounded however long they are."""

import functools

import jax
import jax.numpy as jnp

from grpo_jax.types import Policy, PyTree

__all__ = ["chunks", "prefill"]

_PREFILL_TOKENS = 2**14  # a device extends its prompts' caches by at most so many tokens at a time, which bounds memory
_SMALLEST_CHUNK = 64


def chunks(prompts: int, columns: int, devices: int) -> tuple[int, int]:
    """In how many chunks of how many columns prompts are prefilled."""
    chunks = -(-columns // max(_SMALLEST_CHUNK, _PREFILL_TOKENS * devices // prompts))
    return chunks, -(-columns // chunks)


def prefill(
    policy: Policy, params: PyTree, prepared: PyTree, tokens: jax.Array, lengths: jax.Array, devices: int
) -> tuple[jax.Array, PyTree, jax.Array]:  # fmt: skip
    """Extends empty caches by prompts [P, L], padded on the right.

    Args:
      policy: the model.
      params: its training parameters.
      prepared: its sampler parameters.
      tokens: [P, L] int32.
      lengths: [P] int32, from 1.
      devices: over which prompts lie.

    Returns:
      The hidden state [P, D] behind each prompt, the caches of all, and their columns [chunks x columns of a chunk].
    """
    extended = functools.partial(policy.prefill, params) if policy.prefill else policy.extend
    prompts = len(tokens)
    count, width = chunks(prompts, tokens.shape[1], devices)
    columns = jnp.arange(count * width)
    tokens, index = jnp.pad(tokens, ((0, 0), (0, columns.size - tokens.shape[1]))), columns[None]
    positions = jnp.where(index < lengths[:, None], index, -1)[:, None]  # [P, 1, columns]

    def extend(i, cache: PyTree) -> tuple[jax.Array, PyTree]:
        part = lambda x: jax.lax.dynamic_slice_in_dim(x, i * width, width, axis=x.ndim - 1)
        column = i * width
        hidden, cache = extended(prepared, part(tokens)[:, None], part(positions), cache, column, positions)
        last = jnp.clip(lengths - 1 - i * width, 0, width - 1)
        return jnp.take_along_axis(hidden[:, 0], last[:, None, None], axis=1)[:, 0], cache

    def step(i, carry):
        last, cache = carry
        hidden, cache = extend(i, cache)
        return jnp.where((lengths > i * width)[:, None], hidden, last), cache

    cache = policy.init_cache(prompts, 1, columns.size)
    last = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(extend, 0, cache)[0])
    if count == 1:  # not worth a loop
        return *step(0, (last, cache)), columns
    return *jax.lax.fori_loop(0, -(-lengths.max() // width), step, (last, cache)), columns

"""Prompts into caches: each is read once, in chunks of columns, so that memory is bounded however long they are.

A chunk that no prompt reaches is not computed. Where the policy says so the caches are cut into blocks, as those of
completions are, and a block that no prompt reaches is not read when completions are sampled.
"""

import functools
import itertools

import jax
import jax.numpy as jnp

from grpo_jax.types import Policy, PyTree

__all__ = ["chunks", "cut", "prefill"]

_BLOCK = 64  # columns; a cache is cut at multiples of it
_PREFILL_TOKENS = 2**14  # a device extends its prompts' caches by at most so many tokens at a time, which bounds memory
_SMALLEST_CHUNK = 64


def cut(columns: int) -> list[int]:
    """A cache's columns in blocks: a quarter, a quarter and a half of them, none less than half of another's size."""
    part = -(-columns // (4 * _BLOCK)) * _BLOCK
    ends = [0, *(end for end in (part, 2 * part) if end + part // 2 <= columns), columns]
    return [end - first for first, end in itertools.pairwise(ends)]


def chunks(policy: Policy, prompts: int, columns: int, devices: int) -> list[tuple[int, int]]:
    """Of every block of the prompts' caches, how many chunks of how many columns it has and is filled in."""
    widest = max(_SMALLEST_CHUNK, _PREFILL_TOKENS * devices // prompts)
    sizes = cut(columns) if policy.prompts_in_blocks else [columns]
    counts = [-(-size // widest) for size in sizes]
    return [(count, -(-size // count)) for size, count in zip(sizes, counts, strict=True)]


def prefill(
    policy: Policy, params: PyTree, prepared: PyTree, tokens: jax.Array, lengths: jax.Array, devices: int
) -> tuple[jax.Array, list[PyTree], list[jax.Array]]:  # fmt: skip
    """Extends empty caches by prompts [P, L], padded on the right.

    Args:
      policy: the model.
      params: its training parameters.
      prepared: its sampler parameters.
      tokens: [P, L] int32.
      lengths: [P] int32, from 1.
      devices: over which prompts lie.

    Returns:
      The hidden state [P, D] behind each prompt, and of each block the caches of all and its columns.
    """
    extended = functools.partial(policy.prefill, params) if policy.prefill else policy.extend
    prompts, longest = len(tokens), lengths.max()
    parts = chunks(policy, prompts, tokens.shape[1], devices)
    starts = list(itertools.accumulate((count * width for count, width in parts), initial=0))
    index = jnp.arange(starts[-1])
    tokens = jnp.pad(tokens, ((0, 0), (0, index.size - tokens.shape[1])))
    positions = jnp.where(index[None] < lengths[:, None], index[None], -1)[:, None]  # [P, 1, columns]
    keys = jnp.split(positions, starts[1:-1], axis=-1)

    def step(block, before, i, carry):
        """Extends the caches of a block by a chunk."""
        last, cache = carry
        width = parts[block][1]
        first = starts[block] + i * width
        part = lambda x: jax.lax.dynamic_slice_in_dim(x, first, width, axis=x.ndim - 1)
        others = [(of_block, seen, None) for of_block, seen in zip(before, keys, strict=False)]
        hidden, cache = extended(
            prepared, part(tokens)[:, None], part(positions), cache, i * width, keys[block], others
        )
        place = jnp.clip(lengths - 1 - first, 0, width - 1)
        hidden = jnp.take_along_axis(hidden[:, 0], place[:, None, None], axis=1)[:, 0]
        return jnp.where((lengths > first)[:, None], hidden, last), cache

    empty = [policy.init_cache(prompts, 1, count * width) for count, width in parts]
    like = jax.eval_shape(lambda: step(0, (), 0, (0.0, empty[0])))[0]
    last, caches = jnp.zeros(like.shape, like.dtype), ()
    for block, (count, width) in enumerate(parts):
        extend, begun = functools.partial(step, block, caches), (last, empty[block])
        if block == 0 and count == 1:  # not worth a loop
            last, cache = extend(0, begun)
        else:
            reached = jnp.clip(-(-(longest - starts[block]) // width), 0, count)
            last, cache = jax.lax.fori_loop(0, reached, extend, begun)
        caches = (*caches, cache)
    return last, list(caches), jnp.split(index, starts[1:-1])

"""Ragged prompts and completions -> contiguous, right-padded rows [R, S] of segments, and back.

Rows are what fused attention can do, and short completions share one, so that what a pass costs goes by real tokens;
losses never see them. A prompt and its completion are one segment. Besides its S = L + T columns a row has T places for
completion tokens, so that what is unembedded of R rows is never more than [R, T].
"""

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grpo_jax.sharding import per_device
from grpo_jax.types import Array, record

__all__ = ["SLOTS", "Rows", "pack", "take_columns"]

SLOTS = 16  # W where a policy does not say: a row of completions a sixteenth of the limit is full


@record
class Rows:
    """Rows for `Policy.hidden`, and where completion tokens are predicted from; R of them, or a part of these."""

    tokens: Array  # [R, S] int32
    positions: Array  # [R, S] int32, from 0 in each segment
    segments: Array  # [R, S] int32, from 1; 0 = padding
    targets: Array  # [R, T] int32, the tokens of a row's completions, one after the other
    predictors: Array  # [R, T] int32, column of the token before each of these
    mask: Array  # [R, T] bool, which of them there are
    temperature: Array  # [R, T] float32
    members: Array  # [R, W] int32, which completion each segment holds; B: none
    starts: Array  # [R, W] int32, where its tokens begin among the targets

    def slots(self, values: jax.Array, mesh: Mesh | None = None) -> jax.Array:
        """[R, T] -> [R W, T]: what belongs to each row's targets, by completion; anything behind a completion's end."""
        (rows, columns), slots = values.shape, self.starts.shape[1]
        at = jnp.minimum(self.starts[..., None] + jnp.arange(columns)[None, None], columns - 1)
        return take_columns(values, at.reshape(rows, -1), mesh).reshape(rows * slots, columns)

    def of_members(self, tree: Array) -> Array:
        """[B, ...] -> [R W, ...] for every leaf: what belongs to the completion in each slot; zeros where none is."""
        members = self.members.reshape(-1)
        return jax.tree.map(lambda x: x.at[members].get(mode="fill", fill_value=0), tree)

    def unpack(self, values: jax.Array, mask: jax.Array) -> jax.Array:
        """[R, T] of all rows -> [B, T], 0 where `mask` [B, T], which was packed, is false."""
        (completions, columns), slots = mask.shape, self.members.shape[1]
        every = jnp.arange(self.members.size, dtype=jnp.int32)
        slot = jnp.zeros(completions, jnp.int32).at[self.members.reshape(-1)].set(every, mode="drop")
        at = jnp.minimum(self.starts.reshape(-1)[slot][:, None] + jnp.arange(columns)[None], columns - 1)
        return jnp.where(mask, values[(slot // slots)[:, None], at], 0)


def take_columns(values: jax.Array, at: jax.Array, mesh: Mesh | None = None) -> jax.Array:
    """[R, S, ...] at columns [R, J] -> [R, J, ...], with a gradient that stays in the rows of each device too."""

    @jax.custom_vjp
    def take(values, at):
        return per_device(jax.vmap(lambda row, at: row[at]), mesh)(values, at)

    def add(cotangents, at):
        zeros = jnp.zeros((at.shape[0], *values.shape[1:]), values.dtype)
        return jax.vmap(lambda row, at, x: row.at[at].add(x))(zeros, at, cotangents)

    take.defvjp(lambda values, at: (take(values, at), at), lambda at, x: (per_device(add, mesh)(x, at), None))
    return take(values, at)


def pack(
    prompt_tokens: jax.Array,
    prompt_mask: jax.Array,
    completion_tokens: jax.Array,
    mask: jax.Array,
    temperature: jax.Array | float = 1.0,
    *,
    slots: int = 1,
) -> Rows:
    """Joins each prompt and its completion without holes, and lays them into as few rows as first-fit finds.

    Longest first, each into the first row that has room for it (first-fit decreasing, in columns, places and slots).
    Completions without a token have nothing to learn from, and are left out.

    Args:
      prompt_tokens: [B, L] int32.
      prompt_mask: [B, L] bool; padding on either side, so that no result depends on its width.
      completion_tokens: [B, T] int32.
      mask: [B, T] bool, true on a prefix of each completion.
      temperature: [] or [B] float, carried along for the softmax.
      slots: W, the most completions a row; 1: completion b is row b.

    Returns:
      Rows with R = B, which always suffices, and S = L + T; those that hold nothing come last.
    """
    chex.assert_equal_shape([prompt_tokens, prompt_mask])
    chex.assert_equal_shape([completion_tokens, mask])
    (completions, columns), width = mask.shape, prompt_mask.shape[1] + mask.shape[1]
    tokens = jnp.concatenate([prompt_tokens, completion_tokens], axis=1)
    real = jnp.concatenate([prompt_mask, mask], axis=1)
    lines = jnp.take_along_axis(tokens, jnp.argsort(~real, axis=1, stable=True), axis=1)  # real tokens first, in order
    ends = jnp.sum(mask, axis=1)
    lengths = jnp.where(ends > 0, real.sum(axis=1), 0)
    prompts = lengths - ends  # meaningless where nothing is
    members = _first_fit(lengths, ends, width, columns, slots)
    fill = lambda x: jnp.take(x, members, mode="fill", fill_value=0)
    first, starts = (_before(fill(x)) for x in (lengths, ends))

    def laid(starts, sizes, columns):
        """Of each column of a row: whether it holds anything, its slot, its completion, and the place in that."""
        column = jnp.arange(columns)[None]
        slot = (column[:, None] >= (starts + sizes)[..., None]).sum(axis=1)  # of those, [R, columns], that have ended
        there = slot < slots
        slot = jnp.minimum(slot, slots - 1)
        of_slot = lambda x: jnp.take_along_axis(x, slot, axis=1)
        return there, slot, jnp.minimum(of_slot(members), completions - 1), column - of_slot(starts)

    there, slot, member, at = laid(first, fill(lengths), width)
    holds, of_slot, of, token = laid(starts, fill(ends), columns)
    before = jnp.take_along_axis(first + fill(prompts), of_slot, axis=1) - 1
    temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), (completions,))
    return Rows(
        tokens=jnp.where(there, lines[member, jnp.where(there, at, 0)], 0),
        positions=jnp.where(there, at, 0),
        segments=jnp.where(there, slot + 1, 0),
        targets=jnp.where(holds, lines[of, jnp.where(holds, prompts[of] + token, 0)], 0),
        predictors=jnp.where(holds, before + token, 0),
        mask=holds,
        temperature=jnp.where(holds, temperature[of], 1),
        members=members,
        starts=starts,
    )


def _before(sizes: jax.Array) -> jax.Array:
    """[R, W] -> [R, W]: the sum of what comes before each in its row."""
    return jnp.cumsum(sizes, axis=1) - sizes


def _first_fit(lengths: jax.Array, ends: jax.Array, width: int, places: int, slots: int) -> jax.Array:
    """Which completion goes where, members [R, W], by how many columns and how many places of a row each takes, [B]."""
    completions = lengths.shape[0]
    every = jnp.arange(completions, dtype=jnp.int32)
    if slots == 1:
        return jnp.where(lengths > 0, every, completions)[:, None]

    def lay(free, b):
        """Into the first row with room; nothing goes nowhere."""
        columns, places, slots = free
        row = jnp.argmax((columns >= lengths[b]) & (places >= ends[b]) & (slots > 0))
        row = jnp.where(lengths[b] > 0, row, completions)
        taken = ((columns, lengths[b]), (places, ends[b]), (slots, 1))
        return tuple(x.at[row].add(-jnp.int32(n), mode="drop") for x, n in taken), (row, slots[row])

    order = jnp.argsort(-lengths, stable=True).astype(jnp.int32)
    free = tuple(jnp.full_like(lengths, n) for n in (width, places, slots))
    _, (rows, left) = jax.lax.scan(lay, free, order)
    nobody = jnp.full((completions, slots), completions, jnp.int32)
    return nobody.at[rows, slots - left].set(order, mode="drop")

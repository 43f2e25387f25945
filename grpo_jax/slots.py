"""Which completion is in which slot: queues of prompts and members, slots that change hands, results in order.

`in_order`, `flush`, `change_hands` and `copy_rows` are of what one device has, see `sharding.per_device`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from grpo_jax.token_choice import Choice
from grpo_jax.types import PyTree, record

__all__ = [
    "Queue",
    "Results",
    "Slots",
    "arrange",
    "at_once",
    "change_hands",
    "copy_rows",
    "empty",
    "flush",
    "in_order",
    "write",
]


@record
class Queue:
    """The prompts, and which of their members wait for a slot."""

    prompt_ids: jax.Array  # [P] uint32
    lengths: jax.Array  # [P] int32, tokens of the prompt
    first: Choice  # [P, G], the first token of every completion
    ended: jax.Array  # [P, G] bool, that token is an EOS
    stop_state: jax.Array  # [P, G] int32, row of the stop table behind it
    limits: jax.Array  # [P, G] int32, from 0 to T: tokens at most
    members: jax.Array  # [P, G] int32, in the order of service: first those that are not done with their first token
    waiting: jax.Array  # [P] int32, how many those are


@record
class Slots:
    """Who is where. Indices of prompts count within a device."""

    prompt: jax.Array  # [R] int32, P of a device: none yet
    prompt_id: jax.Array  # [R] uint32
    prompt_length: jax.Array  # [R] int32
    taken: jax.Array  # [P] int32, members that have had a slot
    member: jax.Array  # [R, W] int32
    length: jax.Array  # [R, W] int32, tokens so far, the one whose keys are not in the cache yet included
    limit: jax.Array  # [R, W] int32
    stop_state: jax.Array  # [R, W] int32
    ended: jax.Array  # [R, W] bool, by an EOS or a stop string
    alive: jax.Array  # [R, W] bool, neither ended nor full


@record
class Results:
    """Completions that have left their slots; of the others, the first token."""

    tokens: Choice  # [P, G, T]
    lengths: jax.Array  # [P, G] int32
    finished: jax.Array  # [P, G] bool


def arrange(prompts: int, group_size: int, slots: int, devices: int = 1) -> tuple[int, int]:
    """Rows R and slots W of a row for about so many slots; (P, G) where they are enough for all, or 0.

    Few slots a row, since a row waits for the last of its members before it takes another prompt: with lengths that are
    exponentially distributed, slots work for G / (G - W + W H_W) of the time, H_W = 1 + 1/2 + ... + 1/W: 0.37 for
    G = W = 8, 0.65 for W = 4, 0.89 for W = 2. Many, since they share what is read of the prompt.

    Raises:
      ValueError: slots are less than 0, or prompts do not divide over the devices.
    """
    if slots < 0:
        raise ValueError(f"slots={slots} must be 1 or more, or 0 for one for every completion.")
    if prompts % devices:
        raise ValueError(
            f"{prompts} prompts do not divide over {devices} devices (data x fsdp); use a multiple of {devices}."
        )
    if not 0 < slots < prompts * group_size:
        return prompts, group_size
    each, prompts = max(1, slots // devices), prompts // devices
    width = min(each, max(1, group_size // 4, each // prompts))
    return devices * min(prompts, each // width), width


def write(ring: Choice, new: Choice, column: jax.Array | int) -> Choice:
    """Puts tokens [R, W] into a column of the ring [R, W, T]."""
    return jax.tree.map(lambda to, x: jax.lax.dynamic_update_index_in_dim(to, x, column, axis=2), ring, new)


def in_order(queue: Queue) -> Queue:
    """Puts those first that wait for a slot."""
    waits = ~queue.ended & (queue.limits > 1)
    return dataclasses.replace(
        queue,
        members=jnp.argsort(~waits, axis=1, stable=True).astype(jnp.int32),
        waiting=waits.sum(axis=1, dtype=jnp.int32),
    )


def at_once(queue: Queue, devices: int) -> Slots:
    """A slot for every completion."""
    (prompts, group), limits = queue.limits.shape, queue.limits
    local = jnp.arange(prompts, dtype=jnp.int32) % (prompts // devices)
    return Slots(
        prompt=local, prompt_id=queue.prompt_ids, prompt_length=queue.lengths, taken=jnp.full(prompts, group),
        member=jnp.broadcast_to(jnp.arange(group)[None], limits.shape),
        length=jnp.minimum(limits, 1), limit=limits, stop_state=queue.stop_state, ended=queue.ended,
        alive=~queue.ended & (limits > 1),
    )  # fmt: skip


def empty(rows: int, width: int, prompts: int, devices: int) -> Slots:
    """Nobody anywhere."""
    row, slot = jnp.zeros(rows, jnp.int32), jnp.zeros((rows, width), jnp.int32)
    return Slots(
        prompt=row + prompts, prompt_id=row.astype(jnp.uint32), prompt_length=row,
        taken=jnp.zeros(prompts * devices, jnp.int32), member=slot, length=slot, limit=slot, stop_state=slot,
        ended=slot > 0, alive=slot > 0,
    )  # fmt: skip


def _take(queue: Queue, slots: Slots) -> tuple[Slots, jax.Array, jax.Array]:
    """Free rows take prompts and free slots members: slots, which rows [R] and which slots [R, W] have new ones.

    A row with nothing to do takes the prompt of which most members wait: one that is in no row yet, and in the end one
    whose row is late.
    """
    of_prompt = lambda x, prompt: x.at[prompt].get(mode="fill", fill_value=0)
    free, waiting = ~slots.alive, queue.waiting - slots.taken
    idle = free.all(axis=1) & (of_prompt(waiting, slots.prompt) == 0)
    most, of_most = jax.lax.top_k(waiting, len(idle))
    rank = jnp.maximum(jnp.cumsum(idle) - 1, 0)
    new_row = idle & (most[rank] > 0)
    prompt = jnp.where(new_row, of_most[rank], slots.prompt)
    # Rows that have the same prompt deal its members out one row after the other.
    same_before = jnp.tril(prompt[:, None] == prompt[None, :], -1)
    dealt = of_prompt(slots.taken, prompt) + (same_before * free.sum(axis=1)[None, :]).sum(axis=1)
    place = dealt[:, None] + jnp.cumsum(free, axis=1) - 1
    new = free & (place < of_prompt(queue.waiting, prompt)[:, None])
    new_row &= new.any(axis=1)  # rows before it may have taken the last members: no cache is copied for nobody
    prompt = jnp.where(new_row, prompt, slots.prompt)
    member = jnp.where(new, queue.members.at[prompt[:, None], place].get(mode="clip"), slots.member)
    of_member = lambda x, old: jnp.where(new, x.at[prompt[:, None], member].get(mode="clip"), old)
    of_row = lambda x, old: jnp.where(new_row, x.at[prompt].get(mode="clip"), old)
    return (
        Slots(
            prompt=prompt,
            prompt_id=of_row(queue.prompt_ids, slots.prompt_id),
            prompt_length=of_row(queue.lengths, slots.prompt_length),
            taken=slots.taken.at[prompt].add(new.sum(axis=1, dtype=jnp.int32), mode="drop"),
            member=member,
            length=jnp.where(new, 1, slots.length),
            limit=of_member(queue.limits, slots.limit),
            stop_state=of_member(queue.stop_state, slots.stop_state),
            ended=slots.ended & ~new,
            alive=slots.alive | new,
        ),
        new_row,
        new,
    )


def flush(column: jax.Array, leaving: jax.Array, slots: Slots, written: Choice, results: Results) -> Results:
    """Adds the completions of the slots `leaving` [R, W], whose last tokens are in `column`, to the results."""
    width, columns = slots.member.shape[1], written.ids.shape[-1]
    (chosen,) = jnp.nonzero(leaving.reshape(-1), size=leaving.size, fill_value=0)

    def add(i, results: Results) -> Results:
        row, slot = jnp.divmod(chosen[i], width)
        prompt, member, length = slots.prompt[row], slots.member[row, slot], slots.length[row, slot]
        begin = (column - length + 1) % columns

        def unroll(ring, out):
            line = jax.lax.dynamic_slice(ring, (row, slot, 0), (1, 1, columns))
            line = jax.lax.dynamic_slice_in_dim(jnp.concatenate([line, line], axis=-1), begin, columns, axis=2)
            return jax.lax.dynamic_update_slice(out, line, (prompt, member, 0))

        return Results(
            tokens=jax.tree.map(unroll, written, results.tokens),
            lengths=results.lengths.at[prompt, member].set(length),
            finished=results.finished.at[prompt, member].set(slots.ended[row, slot]),
        )

    return jax.lax.fori_loop(0, leaving.sum(), add, results)


def change_hands(
    column: jax.Array, queue: Queue, slots: Slots, leaving: jax.Array, written: Choice, results: Results
) -> tuple[Slots, jax.Array, Choice, Results]:
    """Those that leave, with their last tokens in `column`, are added to the results, and what waits begins there."""
    results = flush(column, leaving, slots, written, results)
    # Without a slot that was left, or a row that has nothing to do while somebody waits, nothing is to be decided.
    idle, waits = ~slots.alive.any(axis=1), queue.waiting > slots.taken
    stay = lambda queue, slots: (slots, jnp.zeros(slots.prompt.shape, bool), jnp.zeros(slots.alive.shape, bool))
    slots, new_row, new = jax.lax.cond(leaving.any() | (idle.any() & waits.any()), _take, stay, queue, slots)

    def begin(first, ring):
        old = jax.lax.dynamic_index_in_dim(ring, column, axis=2, keepdims=False)
        return jnp.where(new, first.at[slots.prompt[:, None], slots.member].get(mode="clip"), old)

    return slots, new_row, write(written, jax.tree.map(begin, queue.first, written), column), results


def copy_rows(new_row: jax.Array, prompt: jax.Array, prompts: PyTree, rows: PyTree) -> PyTree:
    """The rows `new_row` [R] take the caches of their prompts."""
    (chosen,) = jnp.nonzero(new_row, size=new_row.size, fill_value=0)

    def copy(i, rows):
        take = lambda x: jax.lax.dynamic_index_in_dim(x, prompt[chosen[i]], keepdims=False)
        return jax.tree.map(lambda to, x: jax.lax.dynamic_update_index_in_dim(to, take(x), chosen[i], 0), rows, prompts)

    return jax.lax.fori_loop(0, new_row.sum(), copy, rows)

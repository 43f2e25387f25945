"""Sampling: prefill once a prompt, then one compiled loop in which slots take one completion after the other.

A row of slots holds the cache of one prompt, stored once and read by all of them; the members of the prompt's group
pass through its slots. A slot whose completion has ended takes the next member that waits, and a row whose members are
done the prompt of which most wait, so that the cost follows the tokens and not slots x the longest. Where there is a
slot for every completion, completions stay where they are and nothing of that is compiled.

All slots write the same column of the cache at a time, which goes round and round in the T columns there are: column c
was written (now - c) mod T tokens ago, and counts where the slot's completion is at least that old. So a slot that
changes hands forgets without being cleared. The columns are cut into blocks, of which those are read that there is
something in.

The random numbers of a completion depend on (key, prompt id, member, token index) alone, so that no batch size, order,
padding, number of slots or mesh changes them.

`generate` is the whole thing as one pure function. Where somebody waits for it, `start` and then `decode` in chunks of
a few tokens do the same, so that signals, progress and streaming have a turn.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grpo_jax import sharding
from grpo_jax.logprobs import unembed
from grpo_jax.prefill import cut, prefill
from grpo_jax.slots import (
    Queue,
    Results,
    Slots,
    arrange,
    at_once,
    change_hands,
    copy_rows,
    empty,
    flush,
    in_order,
    write,
)
from grpo_jax.token_choice import Choice, choose_tokens
from grpo_jax.types import Policy, PyTree, Rollout, SamplingParams, record

__all__ = [
    "Decoding",
    "Prefilled",
    "blocks",
    "collect",
    "decode",
    "generate",
    "placement",
    "start",
]


@record
class Prefilled:
    """What the decode loop only reads."""

    params: PyTree  # of the sampler
    prompts: list[PyTree]  # caches of a row and slot each, in blocks of columns; leaves [P, ...]
    columns: list[jax.Array]  # int32, 0, 1, ...: the blocks' columns
    longest: jax.Array  # [] int32, tokens of the longest prompt
    queue: Queue
    key: jax.Array  # typed
    sampling: SamplingParams
    eos_ids: jax.Array  # [E] int32
    pad_id: jax.Array  # [] int32
    stop_table: jax.Array | None  # [states, ids] int32, see `data.stops`; None: no stop strings


@record
class Decoding:
    """What the decode loop carries."""

    step: jax.Array  # [] int32; it writes column step mod T
    slots: Slots
    cache: list[PyTree]  # of each of `blocks`, see `Policy.init_cache`
    written: Choice  # [R, W, T], tokens in the columns that their keys have
    prefix: list[PyTree] | None  # of the rows' prompts, leaves [R, ...]; None: a row for every prompt, as in Prefilled
    results: Results | None  # None: a slot for every completion
    # [] int32, tokens of the longest completion in a slot; 0: every one has ended or is full. Made anew whenever slots
    # change, so that over a mesh a token sends one number: it says when to stop, and how far back a block is seen.
    oldest: jax.Array

    def done(self) -> jax.Array:
        """[] bool: every completion has ended or is full."""
        return self.oldest == 0


def blocks(policy: Policy, columns: int) -> list[int]:
    """The columns that a cache of completions is cut into: a step reads only the blocks that a slot sees something of.

    Each has a loop of its own, since a slice of columns would be a copy of them. One block where the policy reads only
    what is visible.
    """
    return [columns] if policy.reads_visible else cut(columns)


def _oldest(slots: Slots) -> jax.Array:
    return jnp.where(slots.alive, slots.length, 0).max().astype(jnp.int32)


def _keys(key: jax.Array, prompt_ids: jax.Array, members: jax.Array, index: jax.Array) -> jax.Array:
    """[R, W] typed keys of the tokens `index` [R, W] of members [R, W] of the prompts [R]."""
    of = jax.vmap(jax.random.fold_in, (None, 0))(key, prompt_ids)
    for part in (members, index):
        of = jax.vmap(jax.vmap(jax.random.fold_in, (None if of.ndim == 1 else 0, 0)))(of, part)
    return of


def _ends(
    eos_ids: jax.Array, table: jax.Array | None, stop_state: jax.Array, ids: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Whether tokens end their completions, and the rows of the stop table behind them; all of one shape."""
    ended = jnp.isin(ids, eos_ids)
    if table is not None:
        # Ids that the tokenizer does not know write nothing that a stop string could continue.
        stop_state = table.at[stop_state, ids].get(mode="fill", fill_value=0)
        ended |= stop_state == table.shape[0] - 1
    return ended, stop_state


def _placed(policy: Policy, mesh: Mesh | None) -> Policy:
    """A policy whose sampler parameters and caches lie where decoding wants them: nothing is gathered for a token."""
    if mesh is None:
        return policy

    def constrained(tree: PyTree, axes: PyTree) -> PyTree:
        return jax.lax.with_sharding_constraint(tree, sharding.shardings(tree, axes, mesh, sharding.SAMPLER_RULES))

    return dataclasses.replace(
        policy,
        prepare=lambda params: constrained(policy.prepare(params), policy.sampler_axes),
        init_cache=lambda *shape: constrained(policy.init_cache(*shape), policy.cache_axes),
    )


def start(
    policy: Policy,
    params: PyTree,
    prompt_tokens: jax.Array,
    prompt_mask: jax.Array,
    prompt_ids: jax.Array,
    key: jax.Array,
    *,
    group_size: int,
    max_tokens: int,
    eos_ids: jax.Array,
    pad_id: jax.Array | int,
    sampling: SamplingParams,
    stop_table: jax.Array | None = None,
    limits: jax.Array | None = None,
    slots: int = 0,
    mesh: Mesh | None = None,
) -> tuple[Prefilled, Decoding]:
    """Prefills every prompt once, chooses the first token of each completion, and fills the slots. See `generate`."""
    chex.assert_rank([prompt_tokens, prompt_mask, prompt_ids], [2, 2, 1])
    chex.assert_equal_shape([prompt_tokens, prompt_mask])
    policy = _placed(policy, mesh)
    devices = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
    shape = prompts, group = len(prompt_ids), group_size
    rows, width = arrange(prompts, group, slots, devices)
    limits = jnp.full(shape, max_tokens) if limits is None else jnp.clip(limits, 0, max_tokens)
    chex.assert_shape(limits, shape)
    to_the_left = jnp.argsort(~prompt_mask, axis=1, stable=True)
    lengths = prompt_mask.sum(axis=1, dtype=jnp.int32)
    prepared = policy.prepare(params)
    prompt_tokens = jnp.take_along_axis(prompt_tokens, to_the_left, axis=1)
    hidden, caches, columns = prefill(policy, params, prepared, prompt_tokens, lengths, devices)
    eos_ids = jnp.asarray(eos_ids, jnp.int32)
    stop_table = None if stop_table is None else jnp.asarray(stop_table, jnp.int32)
    queue = _queue(
        unembed(hidden, policy.head(prepared)), prompt_ids.astype(jnp.uint32), lengths, limits, key, sampling,
        functools.partial(_ends, eos_ids, stop_table), at_a_time=max(1, rows * width // prompts),
    )  # fmt: skip
    if refilled := (rows, width) != shape:
        queue = sharding.per_device(in_order, mesh, sharding.BATCH_AXES)(queue)
    prefilled = Prefilled(
        params=prepared, prompts=caches, columns=columns, longest=lengths.max(), queue=queue, key=key,
        sampling=sampling, eos_ids=eos_ids, pad_id=jnp.asarray(pad_id, jnp.int32), stop_table=stop_table,
    )  # fmt: skip
    blank = lambda *of: jax.tree.map(lambda x: jnp.zeros((*of, max_tokens), x.dtype), queue.first)
    begun = lambda: write(blank(*shape), queue.first, 0)
    state = Decoding(
        step=jnp.zeros((), jnp.int32),
        slots=empty(rows, width, prompts // devices, devices) if refilled else at_once(queue, devices),
        cache=[policy.init_cache(rows, width, size) for size in blocks(policy, max_tokens)],
        written=blank(rows, width) if refilled else begun(),
        prefix=[policy.init_cache(rows, 1, len(of)) for of in columns] if refilled else None,
        results=Results(tokens=begun(), lengths=jnp.minimum(limits, 1), finished=queue.ended) if refilled else None,
        oldest=jnp.int32(0),
    )
    if refilled:
        return prefilled, _refill(policy, prefilled, state, jnp.zeros((rows, width), bool), mesh)
    return prefilled, dataclasses.replace(state, oldest=_oldest(state.slots))


def _queue(
    logits: jax.Array, prompt_ids: jax.Array, lengths: jax.Array, limits: jax.Array, key: jax.Array,
    sampling: SamplingParams, ends: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]], at_a_time: int,
) -> Queue:  # fmt: skip
    """Every completion with its first token, of the logits [P, V] behind the prompts; so many members at a time."""
    prompts, group = limits.shape

    def first_of(member):
        same = jnp.full((prompts, 1), member)
        return choose_tokens(logits, _keys(key, prompt_ids, same, jnp.zeros_like(same))[:, 0], sampling)

    first = jax.lax.map(first_of, jnp.arange(group), batch_size=at_a_time)
    first = jax.tree.map(lambda x: x.swapaxes(0, 1), first)
    nothing = jnp.zeros(limits.shape, jnp.int32)
    ended, stop_state = ends(nothing, first.ids)
    return Queue(
        prompt_ids=prompt_ids, lengths=lengths, first=first, limits=limits, ended=ended & (limits > 0),
        stop_state=stop_state, members=nothing, waiting=lengths,
    )  # fmt: skip


def placement(policy: Policy, prefilled: Prefilled, state: Decoding, mesh: Mesh) -> tuple[Prefilled, Decoding]:
    """Where what `start` returns lies: rows and prompts over data and fsdp, heads of caches and weights over tensor."""
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    place = functools.partial(sharding.shardings, mesh=mesh, rules=sharding.SAMPLER_RULES)
    every = lambda where, tree: jax.tree.map(lambda _: where, tree)
    return (
        dataclasses.replace(
            every(whole, prefilled),
            params=place(prefilled.params, policy.sampler_axes),
            prompts=[place(block, policy.cache_axes) for block in prefilled.prompts],
            queue=every(rows, prefilled.queue),
        ),
        dataclasses.replace(
            every(rows, state),
            step=whole,
            oldest=whole,
            cache=[place(block, policy.cache_axes) for block in state.cache],
            prefix=None if state.prefix is None else [place(block, policy.cache_axes) for block in state.prefix],
        ),
    )


# The loop -------------------------------------------------------------------------------------------


def _refill(policy: Policy, prefilled: Prefilled, state: Decoding, leaving: jax.Array, mesh: Mesh | None) -> Decoding:
    """Gives the slots `leaving` [R, W] to the next, at the beginning of a step."""
    per_device = functools.partial(sharding.per_device, mesh=mesh)
    column = state.step % state.written.ids.shape[-1]
    change = per_device(change_hands, axes=sharding.BATCH_AXES, whole=1)
    slots, new_row, written, results = change(
        column, prefilled.queue, state.slots, leaving, state.written, state.results
    )
    copy = copy_rows
    if mesh is not None and mesh.size > 1:
        specs = jax.tree.map(lambda place: place.spec, placement(policy, prefilled, state, mesh)[1].prefix)
        rows = jax.sharding.PartitionSpec(sharding.BATCH_AXES)
        copy = jax.shard_map(
            copy_rows, mesh=mesh, in_specs=(rows, rows, specs, specs), out_specs=specs, check_vma=False
        )
    prefix = copy(new_row, slots.prompt, prefilled.prompts, state.prefix)
    return dataclasses.replace(
        state, slots=slots, written=written, results=results, prefix=prefix, oldest=_oldest(slots)
    )


def _append(policy: Policy, prefilled: Prefilled, mesh: Mesh | None, block: int, state: Decoding) -> Decoding:
    """Writes the keys of every slot's last token into a block of the cache, and chooses the next one."""
    slots, columns = state.slots, state.written.ids.shape[-1]
    column = state.step % columns
    age = (column - jnp.arange(columns)) % columns
    position = slots.prompt_length[:, None] + slots.length - 1
    read = slots.alive[..., None] & (age[None, None] < slots.length[..., None])
    positions = jnp.where(read, position[..., None] - age[None, None], -1)
    starts = list(itertools.accumulate(blocks(policy, columns), initial=0))
    positions = jnp.split(positions, starts[1:-1], axis=-1)
    if state.results is None:  # columns are written once: those before have been, and those behind have not
        others = [(state.cache[i], positions[i], None) for i in range(block)]
    else:  # and here slots may see what was written a round ago; the last column of those blocks is their youngest
        others = [
            (state.cache[i], positions[i], age[starts[i + 1] - 1] < state.oldest)
            for i in range(len(positions))
            if i != block
        ]
    index = [columns[None, None] for columns in prefilled.columns]
    of_prompts = [jnp.where(i < slots.prompt_length[:, None, None], i, -1) for i in index]
    reached = [None, *(columns[0] < prefilled.longest for columns in prefilled.columns[1:])]
    prompts = zip(prefilled.prompts if state.prefix is None else state.prefix, of_prompts, reached, strict=True)
    hidden, written = policy.extend(
        prefilled.params, jax.lax.dynamic_index_in_dim(state.written.ids, column, axis=2), position[..., None],
        state.cache[block], column - starts[block], positions[block], [*others, *prompts],
    )  # fmt: skip
    keys = _keys(prefilled.key, slots.prompt_id, slots.member, slots.length)
    choice = choose_tokens(unembed(hidden[:, :, 0], policy.head(prefilled.params)), keys, prefilled.sampling)
    ended, stop_state = _ends(prefilled.eos_ids, prefilled.stop_table, slots.stop_state, choice.ids)
    length, ended = slots.length + slots.alive, slots.ended | (slots.alive & ended)
    alive = slots.alive & ~ended & (length < slots.limit)
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        slots=dataclasses.replace(slots, length=length, ended=ended, alive=alive, stop_state=stop_state),
        cache=[*state.cache[:block], written, *state.cache[block + 1 :]],
        written=write(state.written, choice, (column + 1) % columns),
    )
    if state.results is None:
        return dataclasses.replace(state, oldest=_oldest(state.slots))
    return _refill(policy, prefilled, state, slots.alive & ~alive, mesh)


def decode(policy: Policy, prefilled: Prefilled, state: Decoding, steps: int, mesh: Mesh | None = None) -> Decoding:
    """Appends up to `steps` tokens in every slot, in a `while_loop` for each block of the cache, round and round."""
    stop, columns = state.step + steps, state.written.ids.shape[-1]
    ends = list(itertools.accumulate(blocks(policy, columns), initial=0))
    going = lambda state: ~state.done() & (state.step < stop)

    def one_round(state: Decoding) -> Decoding:
        for block, (first, end) in enumerate(itertools.pairwise(ends)):
            inside = lambda column, first=first, end=end: (first <= column) & (column < end)
            within = lambda state, inside=inside: going(state) & inside(state.step % columns)
            state = jax.lax.while_loop(within, functools.partial(_append, policy, prefilled, mesh, block), state)
        return state

    # A single loop goes round by itself, and where no slot is refilled there is one round.
    once = state.results is None or len(state.cache) == 1
    return one_round(state) if once else jax.lax.while_loop(going, one_round, state)


def collect(
    prefilled: Prefilled, state: Decoding, prompt_tokens: jax.Array, prompt_mask: jax.Array, mesh: Mesh | None = None
) -> Rollout:
    """The completions so far, as a record in the order of the prompts; those that wait have their first token."""
    slots, results = state.slots, state.results
    columns = state.written.ids.shape[-1]
    if results is None:
        results = Results(tokens=state.written, lengths=slots.length, finished=slots.ended)
    else:
        add = sharding.per_device(flush, mesh, sharding.BATCH_AXES, whole=1)
        results = add(state.step % columns, slots.alive, slots, state.written, results)
    mask = jnp.arange(columns)[None, None] < results.lengths[..., None]
    flat = lambda x: x.reshape(-1, columns)
    real = lambda x: flat(jnp.where(mask, x, 0))
    return Rollout(
        prompt_tokens=prompt_tokens,
        prompt_mask=prompt_mask,
        completion_tokens=flat(jnp.where(mask, results.tokens.ids, prefilled.pad_id)),
        mask=flat(mask),
        finished=results.finished.reshape(-1),
        logprobs=real(results.tokens.logprobs),
        sampler_logprobs=real(results.tokens.sampler_logprobs),
    )


def generate(
    policy: Policy,
    params: PyTree,
    prompt_tokens: jax.Array,
    prompt_mask: jax.Array,
    prompt_ids: jax.Array,
    key: jax.Array,
    *,
    group_size: int,
    max_tokens: int,
    eos_ids: jax.Array,
    pad_id: jax.Array | int,
    sampling: SamplingParams = SamplingParams(),
    stop_table: jax.Array | None = None,
    limits: jax.Array | None = None,
    slots: int = 0,
    mesh: Mesh | None = None,
) -> Rollout:
    """Samples `group_size` completions of every prompt. Pure: jit it with the first, the sizes and the mesh static.

    Args:
      policy: the model (static).
      params: its training parameters; `policy.prepare` is called on them once.
      prompt_tokens: [P, L] int32, at least one token each.
      prompt_mask: [P, L] bool; padding on either side.
      prompt_ids: [P] int32, what the randomness of a prompt's completions depends on: its cursor id.
      key: typed key; consumed.
      group_size: G (static).
      max_tokens: T (static); a completion without EOS is cut there and not `finished`.
      eos_ids: [E] int32; any of them ends a completion, also as its first token.
      pad_id: [] int32, written after the end; may be one of eos_ids, since masks never look at it.
      sampling: traced; changing it does not recompile.
      stop_table: [states, ids] int32, what `data.stops.stop_table` makes of stop strings: a completion ends with the
        token whose bytes complete one, inclusive.
      limits: [P, G] int32, where completions are cut before T; 0: nothing is sampled. None: T for all.
      slots: completions decoded at a time, about (static; see `arrange`); 0: all.
      mesh: over which prompts lie, along data and fsdp (static): every device has a queue of its own.

    Returns:
      Rollout, with completion b that of prompt b // G.
    """
    prefilled, state = start(
        policy, params, prompt_tokens, prompt_mask, prompt_ids, key, group_size=group_size, max_tokens=max_tokens,
        eos_ids=eos_ids, pad_id=pad_id, sampling=sampling, stop_table=stop_table, limits=limits, slots=slots, mesh=mesh,
    )  # fmt: skip
    state = decode(policy, prefilled, state, 2**31 - 1, mesh)  # until it ends
    return collect(prefilled, state, prompt_tokens, prompt_mask, mesh)

"""Sampling: prefill once a prompt, then one compiled loop for all members of all groups.

The members of a group are the slots of a row; the row's prompt cache is stored once and read by all of
them. The random numbers of a completion depend on (key, prompt id, member, token index) alone, so that
no batch size, order, padding or mesh changes them.

`generate` is the whole thing as one pure function. Where somebody waits for it, `start` and then
`decode` in chunks of a few tokens do the same, so that signals, progress and streaming have a turn.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from grpo_jax.logprobs import Head, unembed
from grpo_jax.types import Policy, PyTree, Rollout, SamplingParams, record

__all__ = ["Decoding", "choose_tokens", "collect", "decode", "generate", "start", "truncate"]


@record
class Prefilled:
    """What the decode loop only reads."""

    params: PyTree  # of the sampler
    prefix: PyTree  # prompt caches, leaves [P, 1, L, ...]
    prefix_positions: jax.Array  # [P, 1, L] int32, -1 = padding
    keys: jax.Array  # [P, G] typed keys, one a completion
    sampling: SamplingParams
    eos_ids: jax.Array  # [E] int32
    pad_id: jax.Array  # [] int32
    stop_table: jax.Array | None  # [states, ids] int32, see `data.stops`; None: no stop strings


@record
class Decoding:
    """What the decode loop carries. Token `t` of every slot is written into column t of the cache."""

    length: jax.Array  # [] int32, tokens chosen so far by slots that are alive
    alive: jax.Array  # [P, G] bool, no EOS yet and no stop string
    stop_state: jax.Array  # [P, G] int32, row of the stop table
    tokens: jax.Array  # [P, G, T] int32
    mask: jax.Array  # [P, G, T] bool
    logprobs: jax.Array  # [P, G, T] float32
    sampler_logprobs: jax.Array  # [P, G, T] float32
    cache: PyTree  # leaves [P, G, T, ...]
    key_positions: jax.Array  # [P, G, T] int32, -1 = empty

    def done(self) -> jax.Array:
        """[] bool: every completion has ended or is full."""
        return ~self.alive.any() | (self.length >= self.tokens.shape[-1])


def truncate(logits: jax.Array, top_k: jax.Array | int, top_p: jax.Array | float) -> jax.Array:
    """Sets to -inf all but the top_k logits, and all beyond the smallest set of mass top_p among those.

    Args:
      logits: [..., V] float32.
      top_k: [] int32; 0 keeps all. Logits equal to the k-th are kept too.
      top_p: [] float32 in (0, 1]; 1 keeps all (nucleus sampling, arXiv 1904.09751). The most likely
        token is always kept.

    Returns:
      [..., V] float32.
    """
    vocabulary = logits.shape[-1]

    def cut(logits):
        ordered = jnp.sort(logits, axis=-1, descending=True)
        kth = jnp.where(top_k > 0, jnp.clip(top_k, 1, vocabulary), vocabulary) - 1
        threshold = jnp.take(ordered, kth, axis=-1)[..., None]
        probabilities = jax.nn.softmax(jnp.where(ordered >= threshold, ordered, -jnp.inf), axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        nucleus = jnp.where((before < top_p) | (top_p >= 1), ordered, jnp.inf).min(axis=-1, keepdims=True)
        return jnp.where(logits >= jnp.maximum(threshold, nucleus), logits, -jnp.inf)

    # A scalar predicate, so that nothing is sorted where no truncation is asked for.
    return jax.lax.cond((jnp.asarray(top_k) > 0) | (jnp.asarray(top_p) < 1), cut, lambda x: x, logits)


def choose_tokens(
    logits: jax.Array, keys: jax.Array, sampling: SamplingParams
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws a token from each row of logits, by the Gumbel-max trick.

    Args:
      logits: [..., V] float32.
      keys: [...] typed keys; consumed.
      sampling: temperature 0 chooses the most likely token.

    Returns:
      tokens [...] int32; logprobs [...] float32 under the untruncated softmax at the temperature (at 1
      where it is 0), which is what the trainer recomputes; sampler_logprobs [...] float32 under the
      distribution sampled from (0 where it is greedy).
    """
    chex.assert_equal_shape([logits[..., 0], keys])
    greedy = jnp.asarray(sampling.temperature) <= 0
    scaled = logits / jnp.where(greedy, 1.0, sampling.temperature)
    kept = truncate(scaled, sampling.top_k, sampling.top_p)
    draw = lambda key: jax.random.gumbel(key, logits.shape[-1:])
    for _ in range(keys.ndim):
        draw = jax.vmap(draw)
    noise = draw(keys)
    tokens = jnp.argmax(kept + jnp.where(greedy, 0.0, noise), axis=-1).astype(jnp.int32)
    at = lambda values: jnp.take_along_axis(values, tokens[..., None], axis=-1)[..., 0]
    logprobs = at(jax.nn.log_softmax(scaled, axis=-1))
    return tokens, logprobs, jnp.where(greedy, 0.0, at(jax.nn.log_softmax(kept, axis=-1)))


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
) -> tuple[Prefilled, Decoding]:
    """Prefills every prompt once and chooses the first token of each completion. Arguments as `generate`."""
    chex.assert_rank([prompt_tokens, prompt_mask, prompt_ids], [2, 2, 1])
    chex.assert_equal_shape([prompt_tokens, prompt_mask])
    prompts, columns = prompt_tokens.shape
    positions = jnp.where(prompt_mask, jnp.cumsum(prompt_mask, axis=1) - 1, -1)[:, None]  # [P, 1, L]
    sampler_params = policy.prepare(params)
    hidden, prefix = policy.extend(
        sampler_params, prompt_tokens[:, None], positions, policy.init_cache(prompts, 1, columns), 0, positions
    )
    last = jnp.argmax(positions, axis=-1)[..., None]  # [P, 1, 1]
    hidden = jnp.take_along_axis(hidden, last[..., None], axis=2)[:, :, 0]  # [P, 1, D]
    logits = unembed(hidden, policy.head(sampler_params))

    fold = jax.vmap(jax.random.fold_in, (None, 0))
    keys = jax.vmap(fold, (0, None))(fold(key, prompt_ids), jnp.arange(group_size))
    prefilled = Prefilled(
        params=sampler_params, prefix=prefix, prefix_positions=positions, keys=keys, sampling=sampling,
        eos_ids=jnp.asarray(eos_ids, jnp.int32), pad_id=jnp.asarray(pad_id, jnp.int32),
        stop_table=None if stop_table is None else jnp.asarray(stop_table, jnp.int32),
    )  # fmt: skip
    shape = (prompts, group_size, max_tokens)
    empty = Decoding(
        length=jnp.zeros((), jnp.int32),
        alive=jnp.ones(shape[:2], bool),
        stop_state=jnp.zeros(shape[:2], jnp.int32),
        tokens=jnp.full(shape, prefilled.pad_id),
        mask=jnp.zeros(shape, bool),
        logprobs=jnp.zeros(shape),
        sampler_logprobs=jnp.zeros(shape),
        cache=policy.init_cache(*shape),
        key_positions=jnp.full(shape, -1),
    )
    return prefilled, _append(prefilled, empty, jnp.broadcast_to(logits, (*shape[:2], logits.shape[-1])))


def _append(prefilled: Prefilled, state: Decoding, logits: jax.Array) -> Decoding:
    """Chooses the token at column `length` of every slot."""
    token_keys = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(prefilled.keys, state.length)
    tokens, logprobs, sampler_logprobs = choose_tokens(logits, token_keys, prefilled.sampling)
    tokens = jnp.where(state.alive, tokens, prefilled.pad_id)

    def write(values, new):
        return jax.lax.dynamic_update_index_in_dim(values, new, state.length, axis=2)

    ended, stop_state = jnp.isin(tokens, prefilled.eos_ids), state.stop_state
    if (table := prefilled.stop_table) is not None:
        # Ids that the tokenizer does not know write nothing that a stop string could continue.
        stop_state = table.at[stop_state, tokens].get(mode="fill", fill_value=0)
        ended |= stop_state == table.shape[0] - 1
    return Decoding(
        length=state.length + 1,
        alive=state.alive & ~ended,
        stop_state=stop_state,
        tokens=write(state.tokens, tokens),
        mask=write(state.mask, state.alive),
        logprobs=write(state.logprobs, jnp.where(state.alive, logprobs, 0)),
        sampler_logprobs=write(state.sampler_logprobs, jnp.where(state.alive, sampler_logprobs, 0)),
        cache=state.cache,
        key_positions=state.key_positions,
    )


def decode(policy: Policy, prefilled: Prefilled, state: Decoding, steps: int) -> Decoding:
    """Appends up to `steps` tokens to every completion that is alive, in one `while_loop`."""
    prompt_lengths = prefilled.prefix_positions.max(axis=-1) + 1  # [P, 1]
    head: Head = policy.head(prefilled.params)
    stop = state.length + steps

    def body(state: Decoding) -> Decoding:
        column = state.length - 1  # of the token chosen last, whose keys are not in the cache yet
        position = jnp.broadcast_to(prompt_lengths + column, state.alive.shape)
        token = jax.lax.dynamic_index_in_dim(state.tokens, column, axis=2)
        key_positions = jax.lax.dynamic_update_index_in_dim(state.key_positions, position, column, axis=2)
        hidden, cache = policy.extend(
            prefilled.params, token, position[..., None], state.cache, column, key_positions,
            prefilled.prefix, prefilled.prefix_positions,
        )  # fmt: skip
        state = dataclasses.replace(state, cache=cache, key_positions=key_positions)
        return _append(prefilled, state, unembed(hidden[:, :, 0], head))

    return jax.lax.while_loop(lambda s: ~s.done() & (s.length < stop), body, state)


def collect(state: Decoding, prompt_tokens: jax.Array, prompt_mask: jax.Array) -> Rollout:
    """The completions so far, as a record in the order of the prompts."""
    flat = lambda x: x.reshape(-1, x.shape[-1])
    return Rollout(
        prompt_tokens=prompt_tokens,
        prompt_mask=prompt_mask,
        completion_tokens=flat(state.tokens),
        mask=flat(state.mask),
        finished=~state.alive.reshape(-1),
        logprobs=flat(state.logprobs),
        sampler_logprobs=flat(state.sampler_logprobs),
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
) -> Rollout:
    """Samples `group_size` completions of every prompt. Pure: jit it with the first and the sizes static.

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

    Returns:
      Rollout, with completion b that of prompt b // G.
    """
    prefilled, state = start(
        policy, params, prompt_tokens, prompt_mask, prompt_ids, key, group_size=group_size,
        max_tokens=max_tokens, eos_ids=eos_ids, pad_id=pad_id, sampling=sampling, stop_table=stop_table,
    )  # fmt: skip
    return collect(decode(policy, prefilled, state, max_tokens), prompt_tokens, prompt_mask)

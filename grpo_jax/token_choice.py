"""Choosing a token: temperature, top-k, top-p, min-p, and a draw from what they leave.

The vocabulary is never sorted and no noise is drawn over it: a threshold is found by halving the range of floats, and a
draw is the inverse of the distribution function, first over blocks of the vocabulary and then within one.
"""

import functools

import chex
import jax
import jax.numpy as jnp

from grpo_jax.types import SamplingParams, record

__all__ = ["Choice", "choose_tokens", "truncate"]

_MOST_BLOCKS = 128  # a power of two, so that a vocabulary that is split over devices is cut between blocks
_SMALLEST_BLOCK = 128


@record
class Choice:
    """Tokens and what is known of them."""

    ids: jax.Array  # [...] int32
    logprobs: jax.Array  # [...] float32, of the untruncated softmax at the temperature (greedy: at 1)
    sampler_logprobs: jax.Array  # [...] float32, of the distribution they were drawn from (greedy: 0)


def _ordered(x: jax.Array) -> jax.Array:
    """float32 -> uint32 of the same order."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)  # -0 is 0
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(2**31))


def _largest_threshold(keys: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """[...]: the largest t such that the weights of all keys >= t sum up to at least `target`; bit by bit, 32 sums.

    keys [..., V] uint32; weights [..., V] float32, not below 0; target [...] float32.
    """

    def decide(i, threshold):
        tried = threshold | (jnp.uint32(2**31) >> i.astype(jnp.uint32))
        reached = jnp.where(keys >= tried[..., None], weights, 0.0).sum(axis=-1) >= target
        return jnp.where(reached, tried, threshold)

    return jax.lax.fori_loop(0, 32, decide, jnp.zeros(keys.shape[:-1], jnp.uint32))


def _kept(logits: jax.Array, sampling: SamplingParams) -> jax.Array:
    """[..., V] bool: what top_k, top_p and min_p leave of logits at the temperature."""
    keys, lead = _ordered(logits), logits.shape[:-1]
    largest = logits.max(axis=-1)
    zero = jnp.zeros(lead, jnp.uint32)
    top_k = jnp.minimum(jnp.asarray(sampling.top_k), logits.shape[-1])
    by_count = lambda: _largest_threshold(
        keys, jnp.ones(logits.shape), jnp.broadcast_to(top_k, lead).astype(jnp.float32)
    )
    threshold = jax.lax.cond(top_k > 0, by_count, lambda: zero)

    def by_mass():
        mass = jnp.where(keys >= threshold[..., None], jnp.exp(logits - largest[..., None]), 0.0)
        return _largest_threshold(keys, mass, sampling.top_p * mass.sum(axis=-1))

    nucleus = jax.lax.cond(jnp.asarray(sampling.top_p) < 1, by_mass, lambda: zero)
    likely = _ordered(largest + jnp.log(jnp.asarray(sampling.min_p)))  # log 0 = -inf keeps all
    threshold = jnp.maximum(jnp.maximum(threshold, nucleus), likely)
    return keys >= jnp.minimum(threshold, _ordered(largest))[..., None]


def truncate(logits: jax.Array, sampling: SamplingParams) -> jax.Array:
    """Sets to -inf the logits of what cannot be sampled.

    Top-k keeps the k largest; top-p (nucleus sampling, arXiv 1904.09751) the smallest set of them whose mass, among
    those, reaches it; min-p (arXiv 2407.01082) what is at least that share as likely as the likeliest. Equals of the
    last that is kept are kept too, and the likeliest always is.

    Args:
      logits: [..., V] float32, divided by the temperature.
      sampling: top_k 0, top_p 1 and min_p 0 keep all.

    Returns:
      [..., V] float32.
    """
    return jnp.where(_kept(logits, sampling), logits, -jnp.inf)


def _invert(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """[...] int32: the index at which the running sum of weights [..., n] passes `uniform` [...] of the whole.

    Never one of weight 0, whatever order the sums are rounded in.
    """
    sums = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0.0)
    return jnp.argmax(sums > (uniform * sums.max(axis=-1))[..., None], axis=-1).astype(jnp.int32)


def choose_tokens(logits: jax.Array, keys: jax.Array, sampling: SamplingParams) -> Choice:
    r"""Draws a token from each row of logits.

    .. math:: F(v) \le u < F(v + 1), \qquad F(v) = \sum_{w < v} \pi_w,\quad u \sim \mathrm{Uniform}[0, 1)

    in two steps, of a block of the vocabulary and of a token in it, each with a uniform number of its own.

    Args:
      logits: [..., V] float32.
      keys: [...] typed keys; consumed.
      sampling: temperature 0 chooses the most likely token, the first of equals.

    Returns:
      Choice of [...].
    """
    chex.assert_equal_shape([logits[..., 0], keys])
    greedy = jnp.asarray(sampling.temperature) <= 0
    # Divided where it is used: of a large vocabulary, no second array of logits is written and read.
    temperature = jnp.where(greedy, 1.0, sampling.temperature)
    largest = logits.max(axis=-1) / temperature
    vocabulary = logits.shape[-1]
    count = min(_MOST_BLOCKS, 1 << (max(1, vocabulary // _SMALLEST_BLOCK).bit_length() - 1))
    size = -(-vocabulary // count)
    draw = functools.partial(jax.random.uniform, shape=(2,))
    for _ in range(keys.ndim):
        draw = jax.vmap(draw)
    # In the middle of steps of 2^-23, for at 0 the first of any weight would be taken, however small.
    uniform = jnp.where(greedy, 0.0, draw(keys) + 2**-24)

    def invert(kept):
        """Tokens [...] of what is kept, and the logarithms of its mass and of theirs."""
        padded = jnp.pad(kept, [(0, 0)] * keys.ndim + [(0, count * size - vocabulary)], constant_values=-jnp.inf)
        blocks = padded.reshape(*keys.shape, count, size)
        masses = jnp.exp(blocks / temperature - largest[..., None, None]).sum(axis=-1)
        masses = jax.lax.optimization_barrier(masses)  # or their sum is made of all of the vocabulary once more
        block = _invert(masses, uniform[..., 0])
        within = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :] / temperature
        index = _invert(jnp.exp(within - largest[..., None]), uniform[..., 1])
        chosen = jnp.take_along_axis(within, index[..., None], axis=-1)[..., 0]
        return block * size + index, largest + jnp.log(masses.sum(axis=-1)), chosen

    def plain():
        ids, mass, chosen = invert(logits)
        return Choice(ids=ids, logprobs=chosen - mass, sampler_logprobs=chosen - mass)

    def truncated():
        scaled = logits / temperature
        likeliest = lambda: scaled == largest[..., None]
        kept = jax.lax.cond(greedy, likeliest, lambda: _kept(scaled, sampling))
        ids, mass, chosen = invert(jnp.where(kept, logits, -jnp.inf))
        whole = jax.nn.logsumexp(scaled, axis=-1)
        return Choice(ids=ids, logprobs=chosen - whole, sampler_logprobs=jnp.where(greedy, 0.0, chosen - mass))

    # Scalar predicates, so that nothing is looked for where nothing is left out.
    cut = (jnp.asarray(sampling.top_k) > 0) | (jnp.asarray(sampling.top_p) < 1) | (jnp.asarray(sampling.min_p) > 0)
    return jax.lax.cond(greedy | cut, truncated, plain)

"""Log-probabilities and entropies of tokens from hidden states.

Only completion positions are unembedded, and losses see [B, T] and never [B, T, V].
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from grpo_jax.packing import pack
from grpo_jax.types import Policy

__all__ = ["completion_logprobs", "token_logprobs", "unembed"]

Head = tuple[jax.Array, jax.Array | None, float | None]


def unembed(hidden: jax.Array, head: Head) -> jax.Array:
    """Logits in float32: hidden [..., D] and a head (kernel [D, V], bias, soft cap) -> [..., V]."""
    kernel, bias, soft_cap = head
    logits = jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias.reshape((1,) * (logits.ndim - 1) + (-1,))
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def token_logprobs(
    hidden: jax.Array, head: Head, tokens: jax.Array, temperature: jax.Array | float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of tokens, and entropies of the distributions they were drawn from.

    Args:
      hidden: [..., D], the state before each token.
      head: kernel [D, V], bias [V] or None, soft cap or None.
      tokens: [...] int32.
      temperature: of the softmax, broadcast against [..., V]; 0 (greedy sampling) stands for 1, as in `sampling`.

    Returns:
      logprobs [...] float32 and entropies [...] float32, in nats; no gradient flows through entropies.
    """
    chex.assert_equal_shape([hidden[..., 0], tokens])
    logits = unembed(hidden, head) / jnp.where(temperature > 0, temperature, 1.0)
    all_logprobs = jax.nn.log_softmax(logits, axis=-1)
    logprobs = jnp.take_along_axis(all_logprobs, tokens[..., None], axis=-1)[..., 0]
    fixed = jax.lax.stop_gradient(all_logprobs)
    entropies = -jnp.where(jnp.isfinite(fixed), jnp.exp(fixed) * fixed, 0).sum(axis=-1)
    return logprobs, entropies


def completion_logprobs(
    policy: Policy,
    params: Any,
    prompt_tokens: jax.Array,
    prompt_mask: jax.Array,
    completion_tokens: jax.Array,
    mask: jax.Array,
    temperature: jax.Array | float = 1.0,
) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    """Log-probabilities of completions given their prompts, under `policy` with `params`.

    Args:
      policy: the model.
      params: its parameters.
      prompt_tokens: [B, L] int32, padding on either side.
      prompt_mask: [B, L] bool.
      completion_tokens: [B, T] int32.
      mask: [B, T] bool, true on a prefix of each completion.
      temperature: [] or [B, 1, 1] float, of the softmax.

    Returns:
      logprobs [B, T], entropies [B, T] (float32; meaningless where the mask is false), and the model's aux.
    """
    rows = pack(prompt_tokens, prompt_mask, completion_tokens, mask)
    hidden, aux = policy.hidden(params, rows.tokens, rows.positions, rows.segments)
    states = rows.completions(hidden)
    return *token_logprobs(states, policy.head(params), completion_tokens, temperature), aux

"""Ragged prompts and completions -> contiguous, right-padded rows [R, S] of segments, and back.

Rows are what fused attention can do; losses never see them. One completion a row for now.
"""

import chex
import jax
import jax.numpy as jnp

from grpo_jax.types import record

__all__ = ["Rows", "pack"]


@record
class Rows:
    """Rows for `Policy.hidden`, and where each completion token is predicted from."""

    tokens: jax.Array  # [R, S] int32
    positions: jax.Array  # [R, S] int32, from 0 in each segment
    segments: jax.Array  # [R, S] int32, 0 = padding
    predictors: jax.Array  # [B, T] int32, column of the token before completion token t

    def completions(self, values: jax.Array) -> jax.Array:
        """[R, S, D] -> [B, T, D]: the values from which completion tokens are predicted."""
        return jnp.take_along_axis(values, self.predictors[..., None], axis=1)


def pack(prompt_tokens: jax.Array, prompt_mask: jax.Array, completion_tokens: jax.Array, mask: jax.Array) -> Rows:
    """Joins each prompt and its completion into one row without holes.

    Args:
      prompt_tokens: [B, L] int32.
      prompt_mask: [B, L] bool; padding on either side, so that no result depends on its width.
      completion_tokens: [B, T] int32.
      mask: [B, T] bool, true on a prefix of each completion.

    Returns:
      Rows with R = B and S = L + T.
    """
    chex.assert_equal_shape([prompt_tokens, prompt_mask])
    chex.assert_equal_shape([completion_tokens, mask])
    tokens = jnp.concatenate([prompt_tokens, completion_tokens], axis=1)
    real = jnp.concatenate([prompt_mask, mask], axis=1)
    order = jnp.argsort(~real, axis=1, stable=True)  # real tokens first, in their order
    real = jnp.take_along_axis(real, order, axis=1)
    columns = jnp.arange(tokens.shape[1])[None]
    length = prompt_mask.sum(axis=1, keepdims=True)
    return Rows(
        tokens=jnp.where(real, jnp.take_along_axis(tokens, order, axis=1), 0),
        positions=jnp.where(real, columns, 0),
        segments=real.astype(jnp.int32),
        predictors=jnp.maximum(length - 1 + jnp.arange(completion_tokens.shape[1])[None], 0),
    )

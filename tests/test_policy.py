"""A `Policy` made of an NNX model, with the lines that the README shows: sampler and trainer need no more."""

import pathlib
import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import grpo_jax as grpo

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
V, D = 12, 8


class MyDecoder(nnx.Module):
    """The mean of all tokens so far, beside the token itself: the least that needs a cache."""

    cache_axes = ("batch", None, None, None)

    def __init__(self, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (V, D)))
        self.mix = nnx.Param(jax.random.normal(rngs.params(), (D, D)) / D**0.5)

    def _mixed(self, x, values, visible):
        weights = visible / jnp.maximum(visible.sum(-1, keepdims=True), 1)
        return jnp.tanh(x + (weights @ values) @ self.mix[...])

    def hidden(self, tokens, positions, segments):
        x = self.embedding[...][tokens]
        same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, None, :] > 0)
        return self._mixed(x, x, same & (positions[:, :, None] >= positions[:, None, :])), {}

    def head(self):
        return self.embedding[...], None, None

    @staticmethod
    def init_cache(rows, width, columns):
        return jnp.zeros((rows, width, columns, D))

    def extend(self, tokens, positions, cache, column, key_positions, before=()):
        x = self.embedding[...][tokens]
        cache = jax.lax.dynamic_update_slice(cache, x, (0, 0, column, 0))
        to_all = lambda y: jnp.broadcast_to(y, (*tokens.shape[:2], *y.shape[2:]))
        values, keys = (
            jnp.concatenate([*map(to_all, x)], axis=2)
            for x in zip(*[pair for *pair, _ in before], (cache, key_positions), strict=True)
        )
        visible = (keys[:, :, None, :] >= 0) & (keys[:, :, None, :] <= positions[..., None])
        return self._mixed(x, values, visible), cache


def test_an_nnx_model_samples_and_trains():
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "nnx.split" in block]
    names: dict = {"MyDecoder": MyDecoder, "jax": jax, "grpo": grpo}
    exec(textwrap.dedent(code), names)
    policy, params = names["policy"], names["params"]
    prompts, mask = jnp.full((4, 3), 5), jnp.array([[True] * 3] * 3 + [[True, True, False]])
    rollout = grpo.generate(
        policy, params, prompts, mask, jnp.arange(4), jax.random.key(0), group_size=4, max_tokens=5,
        eos_ids=jnp.array([1]), pad_id=0,
    )  # fmt: skip
    batch = grpo.train_batch(rollout, grpo.group_advantages(jnp.arange(16.0).reshape(4, 4)))
    logprobs, _, _ = grpo.completion_logprobs(
        policy, params, batch.prompt_tokens, batch.prompt_mask, batch.completion_tokens, batch.mask
    )
    np.testing.assert_allclose(np.where(batch.mask, logprobs - rollout.logprobs, 0), 0, atol=1e-5)

    optimizer, objective = optax.sgd(0.1), grpo.grpo()
    state = grpo.init_train_state(policy, params, optimizer, objective, grpo.make_mesh())
    step = grpo.make_train_step(policy, optimizer, objective, like=state, key=jax.random.key(0))
    state, metrics = step(state, batch)
    assert metrics["grad_norm"] > 0.01
    assert not np.array_equal(jax.tree.leaves(state.params)[0], jax.tree.leaves(params)[0])

"""The sampler's side of the decoder: caches, lower precision, and that it says what the trainer says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import sharding
from grpo_jax.models.leaves import project
from grpo_jax.models.transformer import init_params, make_policy
from tests import oracle
from tests.decoders import EVERYTHING, FAMILIES, LINES, random_params, rows


def prefill(policy, params, extend, lines, width, chunk):
    """Caches `lines`, left-padded, in chunks; returns (hidden, prefix, positions) as the sampler holds them."""
    tokens, real = oracle.pad(lines, width, "left")
    positions = np.where(real, np.cumsum(real, axis=1) - 1, -1)[:, None]
    cache, seen, chunks = policy.init_cache(len(lines), 1, width), np.full((len(lines), 1, width), -1), []
    for column in range(0, width, chunk):
        now = slice(column, column + chunk)
        seen[:, :, now] = positions[:, :, now]
        hidden, cache = extend(params, tokens[:, None, now], positions[:, :, now], cache, column, jnp.array(seen))
        chunks.append(hidden)
    return np.concatenate(chunks, axis=2), cache, positions


@pytest.mark.parametrize("chunk", [6, 3, 2])
@pytest.mark.parametrize("steps", [1, 2])  # tokens that each call of extend appends
def test_cached_is_uncached(policy, params, extend, hidden_of, chunk, steps):
    """Two prompts, three slots each with its own continuation, of 4 tokens."""
    prompts = [[3, 4, 5, 6, 7], [8, 9]]
    continuations = np.random.default_rng(0).integers(0, 20, (2, 3, 4))
    lines = [prompts[i] + continuations[i, w].tolist() for i, w in np.ndindex(2, 3)]
    expected = hidden_of(params, *rows(lines, 9))

    hidden, prefix, prefix_positions = prefill(policy, params, extend, prompts, 6, chunk)
    for i, prompt in enumerate(prompts):
        np.testing.assert_allclose(hidden[i, 0, 6 - len(prompt) :], expected[3 * i, : len(prompt)], atol=1e-4)

    # The slots hold garbage of their last owners, which key_positions = -1 hides.
    cache = jax.tree.map(lambda x: x + 100.0, policy.init_cache(2, 3, 4))
    seen = np.full((2, 3, 4), -1)
    for t in range(0, 4, steps):
        now = slice(t, t + steps)
        positions = np.array([len(p) for p in prompts])[:, None, None] + np.arange(4)[now] + np.zeros((2, 3, 1), int)
        seen[:, :, now] = positions
        args = continuations[:, :, now], positions, cache, t, jnp.array(seen), [(prefix, prefix_positions, None)]
        hidden, cache = extend(params, *args)
        for i, w in np.ndindex(2, 3):
            first = len(prompts[i]) + t
            np.testing.assert_allclose(hidden[i, w], expected[3 * i + w, first : first + steps], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_sampler_says_is_what_the_trainer_says(family):
    """Far beyond the windows, with prompts in chunks, several tokens a call and two slots of a row."""
    config = FAMILIES[family]
    policy, params = make_policy(config), random_params(config)
    rng = np.random.default_rng(0)
    prompt, ends = rng.integers(0, config.vocab_size, 8), rng.integers(0, config.vocab_size, (2, 12))
    expected, _ = jax.jit(policy.hidden)(params, *rows([[*prompt, *end] for end in ends], 20))
    extend = jax.jit(lambda params, *args: policy.extend(policy.prepare(params), *args))
    hidden, prefix, prefix_positions = prefill(policy, params, extend, [prompt], 9, 3)
    np.testing.assert_allclose(hidden[0, 0, 1:], expected[0, :8], atol=2e-4)
    cache, seen = policy.init_cache(1, 2, 12), np.full((1, 2, 12), -1)
    for t in range(0, 12, 3):
        now = slice(t, t + 3)
        seen[:, :, now] = positions = np.broadcast_to(8 + np.arange(12)[now], (1, 2, 3))
        hidden, cache = extend(
            params, ends[None, :, now], positions, cache, t, jnp.array(seen), [(prefix, prefix_positions, None)]
        )
        np.testing.assert_allclose(hidden[0], expected[:, 8:][:, now], atol=2e-4)


def test_a_slot_given_to_another_completion_forgets(policy, params, extend):
    """The same calls on a used cache and on a fresh one give the same bits."""
    tokens, positions = np.array([[[5]], [[6]]]), np.zeros((2, 1, 1), int)
    seen = np.full((2, 1, 3), -1)
    seen[:, :, 1] = 0
    fresh = policy.init_cache(2, 1, 3)
    used = jax.tree.map(lambda x: 50 * jax.random.normal(jax.random.key(0), x.shape), fresh)
    visible = np.zeros_like(seen)  # what not hiding the old contents would give
    results = [extend(params, tokens, positions, c, 1, s)[0] for c, s in [(fresh, seen), (used, seen), (used, visible)]]
    np.testing.assert_array_equal(results[0], results[1])
    assert np.abs(results[0] - results[2]).max() > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampler_parameters(config, params, dtype):
    """Cast, and taken apart into layers: the only other change is that of the type."""
    policy = make_policy(dataclasses.replace(config, compute_dtype=dtype))
    prepared = policy.prepare(params)
    assert prepared["layers"][0]["query"].dtype == dtype
    layers = jax.tree.map(lambda *xs: np.stack(xs).astype(np.float32), *prepared["layers"])
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=0 if dtype == "float32" else 2**-8)
    jax.tree.map(close, {**jax.tree.map(np.float32, prepared), "layers": [layers]}, params)


@pytest.mark.parametrize(("sampler_dtype", "error"), [("bfloat16", 0.03), ("int8", 0.02)])
def test_a_sampler_of_lower_precision(config, params, hidden_of, sampler_dtype, error):
    """Close to the trainer, and not it; the trainer is what it was."""
    policy = make_policy(dataclasses.replace(config, sampler_dtype=sampler_dtype))
    prepared = jax.jit(policy.prepare)(params)
    tokens, positions, segments = rows(LINES[:1], 7)
    cache = policy.init_cache(1, 1, 7)
    assert {x.dtype for x in jax.tree.leaves(cache)} == {jnp.dtype("bfloat16" if error == 0.03 else "float32")}
    hidden, _ = jax.jit(policy.extend)(prepared, tokens[:, None], positions[:, None], cache, 0, positions[:, None])
    expected = hidden_of(params, tokens, positions, segments)
    np.testing.assert_array_equal(jax.jit(policy.hidden)(params, tokens, positions, segments)[0], expected)
    differ = np.abs(hidden[:, 0].astype(np.float32) - expected).mean() / np.abs(expected).mean()
    assert 1e-3 < differ < error


def test_integers_are_split_over_devices_as_what_they_stand_for(config, params):
    pytest.importorskip("qwix")
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, tensor=2))
    policy = make_policy(dataclasses.replace(config, sampler_dtype="int8"))
    prepared = policy.prepare(params)
    places = sharding.shardings(prepared, policy.sampler_axes, mesh, sharding.SAMPLER_RULES)
    layer, place = prepared["layers"][0], places["layers"][0]
    spec = jax.sharding.PartitionSpec
    assert layer["query"].qvalue.dtype == jnp.int8
    assert (place["query"].qvalue.spec, place["query"].scale.spec) == (spec(None, "tensor", None),) * 2
    output = place["output"]
    assert (output.qvalue.spec, output.scale.spec) == (spec("tensor", None, None), spec(None, None, None))
    for name in ("query", "key", "value", "gate", "up"):
        whole = params["layers"][0][name][0]
        np.testing.assert_allclose(project(jnp.eye(config.width), layer[name]), whole, atol=np.abs(whole).max() / 120)
    eye = jnp.eye(config.heads * config.head_width).reshape(-1, config.heads, config.head_width)
    whole = params["layers"][0]["output"][0]
    got = project(eye, layer["output"], axes=2).reshape(whole.shape)
    np.testing.assert_allclose(got, whole, atol=np.abs(whole).max() / 120)


@pytest.mark.parametrize("sampler_dtype", ["", "int8"])
def test_prompts_compile_a_layer_of_each_kind_and_come_out_as_tokens_do(sampler_dtype):
    """Two places, and a layer behind; over a cache that holds something already, as the second of two chunks does."""
    config = dataclasses.replace(EVERYTHING, windows=(4, 0), layers=5, sampler_dtype=sampler_dtype)
    policy, params = make_policy(config), init_params(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, (2, 1, 3)), jnp.int32)
    positions, keys = jnp.array([[[3, 4, 5]], [[3, 4, -1]]]), jnp.array([[[0, 1, 2, 3, 4, 5]], [[0, 1, 2, 3, 4, -1]]])
    cache = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), policy.init_cache(2, 1, 6))

    def extended(prefill):
        function = lambda params: (
            policy.prefill(params, policy.prepare(params), tokens, positions, cache, 3, keys)  # pyright: ignore[reportOptionalCall]
            if prefill
            else policy.extend(policy.prepare(params), tokens, positions, cache, 3, keys)
        )
        return jax.jit(function)

    compare = lambda got, expected: np.testing.assert_allclose(got, expected, atol=1e-5)
    jax.tree.map(compare, *(extended(prefill)(params) for prefill in (True, False)))
    # Nine products each of two kinds of layers, and of the one behind, in place of five.
    products = [extended(prefill).lower(params).as_text().count("dot_general") for prefill in (True, False)]
    assert products == [3 * 9, 5 * 9]

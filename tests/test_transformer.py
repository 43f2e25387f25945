import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.logprobs import unembed
from grpo_jax.models.transformer import init_params, make_policy
from tests import oracle
from tests.decoders import EVERYTHING, FAMILIES, LINES, program, random_params, rows


def numpy_frequency(config, i, window):
    """Of pair i of a head, in radians a position. Llama 3's stretching as its authors wrote it, by wavelengths."""
    if window and config.window_rope_base:
        return config.window_rope_base ** (-2 * i / config.head_width)
    frequency = config.rope_base ** (-2 * i / config.head_width)
    if not config.rope_low_factor:
        return frequency / config.rope_factor
    wavelength = 2 * math.pi / frequency
    if wavelength < config.rope_length / config.rope_high_factor:
        return frequency
    if wavelength > config.rope_length / config.rope_low_factor:
        return frequency / config.rope_factor
    smooth = (config.rope_length / wavelength - config.rope_low_factor) / (
        config.rope_high_factor - config.rope_low_factor
    )
    return (1 - smooth) * frequency / config.rope_factor + smooth * frequency


def numpy_cap(x, cap):
    return cap * np.tanh(x / cap) if cap else x


NUMPY_ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def numpy_layer(config, layer, window, xs):
    """One layer on a line of residuals, token by token and head by head."""

    def norm(x, name):
        return numpy_norm(config, x, layer[name])

    def project(x, name, head):
        out = norm(x, "attention_norm") @ layer[name][:, head]
        out = out + layer[f"{name}_bias"][head] if config.qkv_bias else out
        return norm(out, f"{name}_norm") if config.qk_norm and name != "value" else out

    def rotate(x, position):
        half = config.head_width // 2
        angles = [position * numpy_frequency(config, i, window) for i in range(half)]
        z = (x[:half] + 1j * x[half:]) * np.exp(1j * np.array(angles))
        return np.concatenate([z.real, z.imag])

    mixed = [np.zeros(config.width) for _ in xs]
    for head in range(config.heads):
        group = head * config.kv_heads // config.heads
        keys = [rotate(project(x, "key", group), t) for t, x in enumerate(xs)]
        values = [project(x, "value", group) for x in xs]
        for t, x in enumerate(xs):
            query, first = rotate(project(x, "query", head), t), max(0, t + 1 - window) if window else 0
            scale = math.sqrt(config.query_scale or config.head_width)
            scores = [numpy_cap(query @ key / scale, config.attention_cap) for key in keys[first : t + 1]]
            seen = zip(oracle.softmax(scores), values[first : t + 1], strict=True)
            mixed[t] += sum(w * v for w, v in seen) @ layer["output"][head]
    xs = [x + (norm(m, "attention_post_norm") if config.post_norms else m) for x, m in zip(xs, mixed, strict=True)]
    for t, x in enumerate(xs):
        y = norm(x, "mlp_norm")
        y = (NUMPY_ACTIVATIONS[config.activation](y @ layer["gate"]) * (y @ layer["up"])) @ layer["down"]
        xs[t] = x + (norm(y, "mlp_post_norm") if config.post_norms else y)
    return xs


def numpy_norm(config, x, scale):
    return x / np.sqrt((x**2).mean() + config.norm_epsilon) * (config.unit_offset + scale)


def numpy_decoder(config, params, line):
    """The decoder on one line of tokens: hidden states and logits."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    xs = [params["embedding"][token] * (config.width**0.5 if config.scale_embedding else 1.0) for token in line]
    places = len(params["layers"])
    stacked = places * len(params["layers"][0]["query"])
    for n in range(config.layers):
        if n < stacked:
            layer = {name: leaf[n // places] for name, leaf in params["layers"][n % places].items()}
        else:
            layer = params["tail"][n - stacked]
        xs = numpy_layer(config, layer, config.windows[n % len(config.windows)], xs)
    hidden = np.stack([numpy_norm(config, x, params["norm"]) for x in xs])
    kernel = params["embedding" if config.tied else "head"]
    return hidden, numpy_cap(hidden @ kernel.T, config.logit_cap)


def test_hidden_is_the_decoder_written_in_numpy(config, params, hidden_of):
    got = hidden_of(params, *rows(LINES, 8))
    for line, hidden in zip(LINES, got, strict=True):
        np.testing.assert_allclose(hidden[: len(line)], numpy_decoder(config, params, line)[0], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_the_decoder_written_in_numpy(family):
    config = FAMILIES[family]
    policy, params = make_policy(config), random_params(config)
    line = np.random.default_rng(1).integers(0, config.vocab_size, 11)
    hidden, _ = jax.jit(policy.hidden)(params, *rows([line], 12))
    expected, expected_logits = numpy_decoder(config, params, line)
    np.testing.assert_allclose(hidden[0, :11], expected, atol=2e-4)
    np.testing.assert_allclose(unembed(hidden, policy.head(params))[0, :11], expected_logits, atol=2e-4)


def test_causality(params, hidden_of):
    tokens, positions, segments = rows(LINES, 8)
    before = hidden_of(params, tokens, positions, segments)
    changed = np.array(tokens)
    changed[:, 3] = 19
    after = hidden_of(params, changed, positions, segments)
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert (np.abs(before - after)[0, 3:7].max(axis=-1) > 1e-3).all()


def test_segments_do_not_see_each_other(params, hidden_of):
    """Two segments in one row are two rows."""
    first, second = LINES
    tokens = np.array([first + second])
    positions = np.array([[*range(len(first)), *range(len(second))]])
    segments = np.array([[1] * len(first) + [2] * len(second)])
    apart = hidden_of(params, *rows(LINES, 8))
    together = hidden_of(params, tokens, positions, segments)[0]
    np.testing.assert_allclose(together[: len(first)], apart[0, : len(first)], atol=1e-5)
    np.testing.assert_allclose(together[len(first) :], apart[1, : len(second)], atol=1e-5)
    leaking = hidden_of(params, tokens, positions, np.ones_like(segments))[0]
    assert np.abs(leaking[len(first) :] - apart[1, : len(second)]).max() > 1e-2


def test_padding_does_not_matter(params, hidden_of):
    tokens, positions, segments = rows(LINES, 8)
    narrow = hidden_of(params, tokens, positions, segments)
    assert jnp.isfinite(narrow).all()
    wide_tokens, wide_positions, wide_segments = rows(LINES, 12)
    wide = hidden_of(params, np.where(wide_segments, wide_tokens, 17), wide_positions, wide_segments)
    for i, line in enumerate(LINES):
        np.testing.assert_allclose(narrow[i, : len(line)], wide[i, : len(line)], atol=1e-5)


def test_axes_name_every_dimension(config, policy, params):
    sizes = {
        "layers": config.layers, "embed": config.width, "heads": config.heads, "kv_heads": config.kv_heads,
        "head": config.head_width, "mlp": config.mlp_width, "vocab": config.vocab_size, "batch": 2 * 3,
    }  # fmt: skip
    is_axes = lambda x: isinstance(x, tuple)
    trees = [
        (params, policy.param_axes),
        (policy.prepare(params), policy.sampler_axes),
        (policy.init_cache(2, 3, 5), policy.cache_axes),
    ]
    for tree, axes in trees:
        assert jax.tree.structure(axes, is_leaf=is_axes) == jax.tree.structure(tree)
        for leaf, names in zip(jax.tree.leaves(tree), jax.tree.leaves(axes, is_leaf=is_axes), strict=True):
            assert all(n is None or size == sizes[n] for size, n in zip(leaf.shape, names, strict=True)), names


def test_parameters_depend_on_the_key(config):
    init = jax.jit(init_params, static_argnums=0)
    first, second, again = (init(config, jax.random.key(seed)) for seed in (0, 1, 0))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    for name in ("query", "key", "value", "output", "gate", "up", "down"):
        leaf = first["layers"][0][name]
        assert np.abs(leaf - second["layers"][0][name]).max() > 0.1
        assert np.abs(leaf[0] - leaf[1]).max() > 0.1, f"{name}: two layers with the same weights"


def test_bfloat16_computes_in_bfloat16(config, params, hidden_of):
    low_config = dataclasses.replace(config, compute_dtype="bfloat16")
    batch = rows(LINES, 8)
    low = jax.jit(make_policy(low_config).hidden)(params, *batch)[0]
    assert low.dtype == jnp.bfloat16
    difference = np.abs(low.astype(jnp.float32) - hidden_of(params, *batch))[batch[2] > 0]
    assert 1e-4 < difference.max() < 0.2
    kept = jax.eval_shape(lambda: init_params(low_config, jax.random.key(0)))
    assert {x.dtype for x in jax.tree.leaves(kept)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("layers", [12, 14])
def test_deep_models_compile_as_shallow_ones(layers):
    """A program holds each layer of the pattern once, and the tail."""
    config = dataclasses.replace(EVERYTHING, windows=(4,) * 5 + (0,), layers=layers)
    products = program(config).count("stablehlo.dot_general")
    deeper = program(dataclasses.replace(config, layers=layers + 12)).count("stablehlo.dot_general")
    shallow = program(dataclasses.replace(config, layers=12)).count("stablehlo.dot_general")
    assert products == deeper
    each = 7 + 2  # seven matrices and two products of attention
    assert shallow == 6 * each + 1
    assert products - shallow == (layers - 12) * each


def test_remat_changes_no_value_but_the_memory():
    kept = dataclasses.replace(EVERYTHING, layers=8, width=32, mlp_width=128)
    params, batch = random_params(kept), rows(np.random.default_rng(0).integers(0, 24, (4, 64)), 64)
    results, memory = [], []
    for remat in ("none", "dots", "full"):
        policy = make_policy(dataclasses.replace(kept, remat=remat))
        total = lambda p, policy=policy: jnp.square(policy.hidden(p, *batch)[0]).mean()
        compiled = jax.jit(jax.value_and_grad(total)).lower(params).compile()
        results.append(compiled(params))
        memory.append(compiled.memory_analysis().temp_size_in_bytes)  # pyright: ignore[reportOptionalMemberAccess]
    for again in results[1:]:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), results[0], again)
    none, dots, full = memory
    assert dots < 0.95 * none  # what attention gave is one of ten
    assert full < 0.75 * dots

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models.transformer import TransformerConfig, init_params, make_policy, project
from tests import oracle

LINES = [[3, 4, 5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]


@pytest.fixture(scope="module")
def hidden_of(policy):
    return jax.jit(lambda *args: policy.hidden(*args)[0])


@pytest.fixture(scope="module")
def extend(policy):
    return jax.jit(lambda params, *args: policy.extend(policy.prepare(params), *args))


def rows(lines, width):
    tokens, real = oracle.pad(lines, width)
    return tokens, np.where(real, np.arange(width), 0), real.astype(np.int32)


def numpy_decoder(config, params, line):
    """The decoder on one line of tokens, token by token and head by head."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean() + config.norm_epsilon) * scale

    def rotate(x, position):
        half = config.head_width // 2
        angles = [position * config.rope_base ** (-i / half) for i in range(half)]
        z = (x[:half] + 1j * x[half:]) * np.exp(1j * np.array(angles))
        return np.concatenate([z.real, z.imag])

    xs = [params["embedding"][token] * config.width**0.5 for token in line]
    for n in range(config.layers):
        layer = {name: leaf[n] for name, leaf in params["layers"][0].items()}
        project = lambda x, name, head, layer=layer: norm(x, layer["attention_norm"]) @ layer[name][:, head]
        mixed = [np.zeros(config.width) for _ in line]
        for head in range(config.heads):
            group = head * config.kv_heads // config.heads
            keys = [rotate(project(x, "key", group), t) for t, x in enumerate(xs)]
            values = [project(x, "value", group) for x in xs]
            for t, x in enumerate(xs):
                query = rotate(project(x, "query", head), t)
                weights = oracle.softmax([query @ key / config.head_width**0.5 for key in keys[: t + 1]])
                mixed[t] += sum(w * v for w, v in zip(weights, values, strict=False)) @ layer["output"][head]
        xs = [x + m for x, m in zip(xs, mixed, strict=True)]
        for t, x in enumerate(xs):
            y = norm(x, layer["mlp_norm"])
            gate = y @ layer["gate"]
            xs[t] = x + (gate / (1 + np.exp(-gate)) * (y @ layer["up"])) @ layer["down"]
    return np.stack([norm(x, params["norm"]) for x in xs])


def test_hidden_is_the_decoder_written_in_numpy(config, params, hidden_of):
    got = hidden_of(params, *rows(LINES, 8))
    for line, hidden in zip(LINES, got, strict=True):
        np.testing.assert_allclose(hidden[: len(line)], numpy_decoder(config, params, line), atol=1e-4)


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
        args = continuations[:, :, now], positions, cache, t, jnp.array(seen), prefix, prefix_positions
        hidden, cache = extend(params, *args)
        for i, w in np.ndindex(2, 3):
            first = len(prompts[i]) + t
            np.testing.assert_allclose(hidden[i, w], expected[3 * i + w, first : first + steps], atol=1e-4)


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


def test_axes_name_every_dimension(config, policy, params):
    sizes = {
        "layers": config.layers, "embed": config.width, "heads": config.heads, "kv_heads": config.kv_heads,
        "head": config.head_width, "mlp": config.mlp_width, "vocab": config.vocab_size, "batch": 2,
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampler_parameters(config, params, dtype):
    """Cast, and taken apart into layers: the only other change is that of the type."""
    policy = make_policy(dataclasses.replace(config, compute_dtype=dtype))
    prepared = policy.prepare(params)
    assert prepared["layers"][0]["query"].dtype == dtype
    layers = jax.tree.map(lambda *xs: np.stack(xs).astype(np.float32), *prepared["layers"])
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=0 if dtype == "float32" else 2**-8)
    jax.tree.map(close, {**jax.tree.map(np.float32, prepared), "layers": [layers]}, params)


def test_project():
    x, leaf = jnp.arange(6.0).reshape(1, 2, 3), jnp.arange(12.0).reshape(2, 3, 2)
    np.testing.assert_allclose(project(x, leaf, axes=2), [[110, 125]])
    np.testing.assert_allclose(project(x, leaf[0]), [[[10, 13], [28, 40]]])
    assert project(x.astype(jnp.bfloat16), leaf[0]).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"heads": 4, "kv_heads": 3}, "multiple of kv_heads=3"),
        ({"head_width": 5}, "head_width=5 must be even"),
        ({"compute_dtype": "float16"}, "compute_dtype='float16'"),
    ],
)
def test_config_errors(options, match):
    with pytest.raises(ValueError, match=match):
        TransformerConfig(vocab_size=20, **options)

import dataclasses
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import sharding
from grpo_jax.logprobs import unembed
from grpo_jax.models.leaves import project, scattered
from grpo_jax.models.transformer import TransformerConfig, abstract_params, init_params, make_policy
from tests import oracle

SIZES = {"vocab_size": 24, "width": 16, "heads": 4, "kv_heads": 2, "head_width": 8, "mlp_width": 24}
GEMMA = {"post_norms": True, "unit_offset": True, "activation": "gelu", "query_scale": 11}
# What the models of a family have, in small: Llama 3's stretched positions reach from those that stay to those that
# are stretched in full, and 5 and 8 layers of Gemma's patterns leave 1 and 2 for the tail.
FAMILIES = {
    name: TransformerConfig(**{**SIZES, **fields})
    for name, fields in {
        "llama": {"layers": 3, "scale_embedding": False, "tied": False, "rope_base": 500.0, "rope_factor": 8.0,
                  "rope_low_factor": 1.0, "rope_high_factor": 4.0, "rope_length": 64},
        "qwen2": {"layers": 2, "scale_embedding": False, "qkv_bias": True, "rope_base": 1e6},
        "qwen3": {"layers": 2, "scale_embedding": False, "qk_norm": True, "rope_base": 1e6, "tied": False},
        "gemma2": {**GEMMA, "layers": 5, "windows": (4, 0), "attention_cap": 2.0, "logit_cap": 3.0},
        "gemma3": {**GEMMA, "layers": 8, "windows": (4,) * 5 + (0,), "qk_norm": True, "rope_base": 1e4,
                   "window_rope_base": 100.0, "rope_factor": 8.0},
    }.items()
}  # fmt: skip
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


def random_params(config, seed=0):
    """Random in every leaf: what norms and biases begin with hides whether they are used."""
    rng, (shapes, _) = np.random.default_rng(seed), abstract_params(config)

    def fill(path, leaf):
        around = 1.0 - config.unit_offset if "norm" in path[-1].key else 0.0
        return jnp.asarray(rng.normal(around, 0.25, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


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


def test_int8_without_qwix(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ValueError, match=r"\.\[int8\]"):
        dataclasses.replace(config, sampler_dtype="int8")


def test_project():
    x, leaf = jnp.arange(6.0).reshape(1, 2, 3), jnp.arange(12.0).reshape(2, 3, 2)
    np.testing.assert_allclose(project(x, leaf, axes=2), [[110, 125]])
    np.testing.assert_allclose(project(x, leaf[0]), [[[10, 13], [28, 40]]])
    assert project(x.astype(jnp.bfloat16), leaf[0]).dtype == jnp.bfloat16


def test_a_scattered_weight_is_the_weight_and_so_is_its_gradient():
    """Its gradient is made with the axis last that is split, and stands again where it stood."""
    rng = np.random.default_rng(0)
    x, weight = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 6), (6, 4, 3)))
    loss = lambda of, weight: jnp.sin(project(x, of(weight))).sum()
    plain = jax.value_and_grad(lambda w: loss(lambda w: w, w))(weight)
    turned = jax.value_and_grad(lambda w: loss(lambda w: scattered(w, jnp.float32), w))
    jax.tree.map(np.testing.assert_array_equal, turned(weight), plain)
    (barrier,) = [e for e in jax.make_jaxpr(turned)(weight).eqns if e.primitive.name == "optimization_barrier"]
    assert barrier.outvars[0].aval.shape == (12, 6)


# Every field of the configuration -------------------------------------------------------------------

EVERYTHING = TransformerConfig(
    **{**SIZES, **GEMMA}, layers=2, windows=(4, 0), qkv_bias=True, qk_norm=True, tied=False, attention_cap=2.0,
    logit_cap=3.0, window_rope_base=100.0, rope_factor=8.0, rope_low_factor=1.0, rope_high_factor=4.0, rope_length=64,
)  # fmt: skip
OTHER = {
    "vocab_size": 25, "layers": 4, "width": 24, "heads": 2, "kv_heads": 4, "head_width": 4, "mlp_width": 16,
    "rope_base": 100.0, "norm_epsilon": 1e-3, "compute_dtype": "bfloat16", "sampler_dtype": "int8",
    "attention": "splash", "remat": "full", "score": True,
    "tied": True, "scale_embedding": False, "qkv_bias": False, "qk_norm": False, "post_norms": False,
    "unit_offset": False, "activation": "silu", "query_scale": 0, "attention_cap": 0.0, "logit_cap": 0.0,
    "windows": (3, 0), "window_rope_base": 0.0, "rope_factor": 4.0, "rope_low_factor": 0.5, "rope_high_factor": 8.0,
    "rope_length": 32,
}  # fmt: skip


def traced(config):
    """The logits of a batch, which nothing computes."""
    policy, (shapes, _) = make_policy(config), abstract_params(config)
    logits = lambda params, *batch: unembed(policy.hidden(params, *batch)[0], policy.head(params))
    return jax.jit(logits).trace(shapes, *[jax.ShapeDtypeStruct((2, 128), jnp.int32)] * 3)


def program(config):
    return traced(config).lower().as_text()


def sampler_program(config):
    policy, (shapes, _) = make_policy(config), abstract_params(config)

    def step(params):
        one = jnp.zeros((1, 1, 1), jnp.int32)
        return policy.extend(policy.prepare(params), one, one, policy.init_cache(1, 1, 4), 0, jnp.zeros((1, 1, 4)))

    return jax.jit(step).lower(shapes).as_text()


def test_every_field_changes_the_program():
    before = program(EVERYTHING)
    assert program(dataclasses.replace(EVERYTHING)) == before  # and nothing else does
    for field, value in OTHER.items():
        after = dataclasses.replace(EVERYTHING, **{field: value})
        if field == "sampler_dtype":
            assert sampler_program(after) != sampler_program(EVERYTHING)
        elif field in ("attention", "remat"):  # splash is lowered for TPUs alone; remat is of gradients, see below
            assert str(traced(after).jaxpr) != str(traced(EVERYTHING).jaxpr), field
        else:
            assert program(after) != before, field
    assert set(OTHER) == {field.name for field in dataclasses.fields(TransformerConfig)}


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


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"heads": 4, "kv_heads": 3}, "multiple of kv_heads=3"),
        ({"head_width": 5}, "head_width=5 must be even"),
        ({"compute_dtype": "float16"}, "compute_dtype='float16'"),
        ({"sampler_dtype": "int4"}, "sampler_dtype='int4'"),
        ({"layers": 0}, "every size must be 1 or more"),
        ({"remat": True}, "remat=True must be 'none', 'dots' or 'full'; True was what is 'full' now"),
        ({"remat": "False"}, "remat='False' must be"),
        ({"activation": "relu"}, r"activation='relu' must be one of \['gelu', 'silu'\]"),
        ({"windows": ()}, r"windows=\(\) must be numbers of tokens"),
        ({"windows": (4, -1)}, r"windows=\(4, -1\) must be"),
        ({"rope_low_factor": 4.0, "rope_high_factor": 1.0, "rope_length": 8}, "rope_high_factor=1.0 above it"),
        ({"rope_low_factor": 1.0, "rope_high_factor": 4.0}, "rope_length=0 above 0"),
    ],
)
def test_config_errors(options, match):
    with pytest.raises(ValueError, match=match):
        TransformerConfig(vocab_size=20, **options)

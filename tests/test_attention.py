import functools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import sharding
from grpo_jax.models import attention
from grpo_jax.models.attention import make_attention
from grpo_jax.sharding import MeshConfig, make_mesh
from tests import TPU_COMPILER

HEADS, KV_HEADS, WIDTH, SCALE = 4, 2, 8, 0.3
OPTIONS = [{}, {"window": 3}, {"soft_cap": 1.5}, {"window": 5, "soft_cap": 0.7}]
make = functools.partial(make_attention, heads=HEADS, kv_heads=KV_HEADS, head_width=WIDTH, scale=SCALE)


def rows_of(lengths, columns):
    """Positions and segments [R, S] of rows that hold segments of these lengths, right padded."""
    positions, segments = np.zeros((2, len(lengths), columns), np.int32)
    for r, row in enumerate(lengths):
        positions[r, : sum(row)] = [position for n in row for position in range(n)]
        segments[r, : sum(row)] = [i + 1 for i, n in enumerate(row) for _ in range(n)]
    return positions, segments


def inputs(lengths, columns, width=WIDTH, seed=0):
    rng, rows = np.random.default_rng(seed), len(lengths)
    draw = lambda heads: rng.normal(size=(rows, columns, heads, width)).astype(np.float32)
    return draw(HEADS), draw(KV_HEADS), draw(KV_HEADS), *rows_of(lengths, columns)


def oracle(query, key, value, positions, segments, *, window=0, soft_cap=0.0):
    """One query at a time, in float64; 0 for padding."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    output = np.zeros_like(query)
    for r, s, h in np.ndindex(query.shape[:3]):
        kv_head, scores, seen = h * key.shape[2] // query.shape[2], [], []
        for t in range(query.shape[1]):
            near = positions[r, t] <= positions[r, s] and (not window or positions[r, t] > positions[r, s] - window)
            if segments[r, s] > 0 and segments[r, t] == segments[r, s] and near:
                score = SCALE * query[r, s, h] @ key[r, t, kv_head]
                scores.append(soft_cap * np.tanh(score / soft_cap) if soft_cap else score)
                seen.append(t)
        if seen:
            weights = np.exp(scores - np.max(scores))
            output[r, s, h] = weights / weights.sum() @ value[r, seen, kv_head]
    return output


def real(segments):
    return (np.asarray(segments) > 0)[..., None, None]


def value_and_grads(attend):
    """Outputs of real queries and gradients of a sum over them, which padding enters nowhere."""

    def loss(query, key, value, positions, segments):
        output = jnp.where((segments > 0)[..., None, None], attend(query, key, value, positions, segments), 0)
        return jnp.sin(output.astype(jnp.float32)).sum(), output

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)


def through_layers(attend):
    """Two layers as the model runs them: a scan whose body is rematerialized."""

    def run(query, *rest):
        layer = jax.checkpoint(lambda x, _: (attend(x, *rest), None))
        return jax.lax.scan(layer, query, None, length=2)[0]

    return run


@pytest.fixture
def interpreted(monkeypatch):
    """Splash attention in the Pallas interpreter, with blocks of 128 so that short rows have several.

    `force_tpu_interpret_mode` has side effects, which `jax.checkpoint` refuses.
    """
    monkeypatch.setattr(attention, "_LARGEST_BLOCK", 128)
    make_mha = functools.partial(attention.splash.make_splash_mha, interpret=True)
    monkeypatch.setattr(attention.splash, "make_splash_mha", make_mha)


LENGTHS = [[9], [12], [4, 5], [1, 3, 6, 2], []]  # ragged, full, packed, packed and full, empty


@pytest.fixture(params=[128, 5], ids=["one block", "blocks"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(attention, "_SMALLEST_BLOCK", request.param)


@pytest.mark.parametrize("options", OPTIONS)
def test_xla_is_the_formula(options, blocks):
    args = inputs(LENGTHS, 12)
    output = make("xla", **options)(*map(jnp.asarray, args))
    np.testing.assert_allclose(np.where(real(args[4]), output, 0), oracle(*args, **options), atol=2e-6)
    assert np.isfinite(output).all()


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_are_differences_of_the_formula(options, blocks):
    args = inputs([[7], [3, 4]], 8)
    _, grads = value_and_grads(make("xla", **options))(*map(jnp.asarray, args))
    rng, step = np.random.default_rng(1), 1e-5
    for i in range(3):
        direction = rng.normal(size=args[i].shape)
        moved = lambda by, i=i, d=direction: [
            x.astype(np.float64) + by * d if j == i else x for j, x in enumerate(args)
        ]
        above, below = (np.sin(oracle(*moved(by), **options)).sum() for by in (step, -step))
        np.testing.assert_allclose((grads[i] * direction).sum(), (above - below) / (2 * step), rtol=2e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_xla_without_options_computes_what_it_always_did_bit_by_bit(dtype):
    query, key, value, positions, segments = inputs(LENGTHS, 12)
    query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))

    def before(query, key, value):
        r, s, _, c = query.shape
        same = segments[:, :, None] == segments[:, None, :]
        visible = same & (positions[:, :, None] >= positions[:, None, :]) & (segments[:, None, :] > 0)
        grouped = query.reshape(r, s, key.shape[2], -1, c)
        scores = jnp.einsum("rskgc,rtkc->rkgst", grouped, key, preferred_element_type=jnp.float32)
        scores = jnp.where(visible[:, None, None], scores * c**-0.5, -1e30)
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        return jnp.einsum("rkgst,rtkc->rskgc", weights, value).reshape(query.shape)

    now = make("xla", scale=WIDTH**-0.5)
    output = jax.jit(now)(query, key, value, positions, segments)
    assert output.dtype == dtype
    np.testing.assert_array_equal(output, jax.jit(before)(query, key, value))


LONG = [[150], [60, 70], [1, 128, 21]]  # segments end inside, before and at the edges of blocks of 128


@pytest.mark.parametrize("options", [{}, {"window": 20}, {"window": 130, "soft_cap": 0.7}])
def test_splash_is_xla(interpreted, options):
    args = [jnp.asarray(x) for x in inputs(LONG, 150)]
    (_, output), grads = jax.jit(value_and_grads(make("splash", **options)))(*args)
    (_, expected), expected_grads = jax.jit(value_and_grads(make("xla", **options)))(*args)
    np.testing.assert_allclose(output, expected, atol=2e-6)
    for grad, want in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, want, atol=2e-5)


@pytest.mark.parametrize(("columns", "blocks"), [(100, [128]), (512, [512]), (640, [384] * 2), (1300, [512] * 3)])
def test_splash_takes_few_and_equal_blocks(monkeypatch, columns, blocks):
    made = []

    def fake(mask, *, block_sizes, **_):
        made.append((mask.shape, block_sizes.block_q, block_sizes.block_kv_dq))
        return lambda query, key, value, segment_ids: query

    monkeypatch.setattr(attention.splash, "make_splash_mha", fake)
    args = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs([[columns]], columns)]
    assert jax.eval_shape(make("splash"), *args).shape == (1, columns, HEADS, WIDTH)
    assert made == [((HEADS, sum(blocks), sum(blocks)), blocks[0], blocks[0])]


def test_splash_splits_over_the_mesh_as_the_train_step_does(interpreted):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    args = [jnp.asarray(x) for x in inputs([[150], [60, 70], [140], [30, 30, 30]] * 2, 150)]
    options = {"window": 90, "soft_cap": 3.0}
    by_data = [x.reshape(2, 4, *x.shape[1:]) for x in args]
    step = jax.vmap(value_and_grads(through_layers(make("splash", mesh=mesh, **options))), spmd_axis_name="data")
    compiled = jax.jit(step).lower(*by_data).compile()
    (_, output), grads = compiled(*by_data)
    (_, expected), expected_grads = jax.jit(value_and_grads(through_layers(make("xla", **options))))(*args)
    np.testing.assert_allclose(output.reshape(expected.shape), expected, atol=2e-6)
    for grad, want in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad.reshape(want.shape), want, atol=2e-5)
    # Each of the eight devices works on one of two data shards, two of its four rows, two of four heads.
    assert output.sharding.shard_shape(output.shape) == (1, 2, 150, HEADS // 2, WIDTH)
    # Whole inputs are cut and results stay where they are: nothing travels but the loss of each data shard.
    collective = r"(\S+) (?:all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)\("
    assert set(re.findall(collective, str(compiled.as_text()))) == {"f32[1]{0}"}


def test_heads_that_do_not_divide_stay_whole_and_it_is_said(interpreted, caplog):
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    assert KV_HEADS % 4
    sharding.warn_once.cache_clear()
    attend = make("splash", mesh=mesh)
    assert "heads=4 and kv_heads=2 do not both divide over tensor=4" in caplog.text
    args = [jnp.asarray(x) for x in inputs([[9], [4, 5]], 12)]
    output = np.where(real(args[4]), jax.jit(attend)(*args), 0)
    np.testing.assert_allclose(output, oracle(*args), atol=2e-6)


def half(lengths, columns=12):
    query, key, value, positions, segments = inputs(lengths, columns)
    return [jnp.asarray(x, jnp.bfloat16) for x in (query, key, value)] + [jnp.asarray(positions), jnp.asarray(segments)]


@pytest.fixture
def without_cudnn(monkeypatch):
    """The same call with jax's own XLA implementation, which reads the arguments as cuDNN does."""
    call = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *args, implementation, **options: call(*args, **options)
    )
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("window", [0, 1, 3])
def test_cudnn_is_asked_for_the_formula(without_cudnn, window):
    args = half([[9], [12], [1]])
    output = np.asarray(make("cudnn", window=window)(*args), np.float32)
    np.testing.assert_allclose(np.where(real(args[4]), output, 0), oracle(*args, window=window), atol=0.02)


def test_cudnn_never_mixes_segments(without_cudnn):
    args = half([[9], [4, 5], [12]])
    (_, output), grads = jax.jit(value_and_grads(make("cudnn")))(*args)
    for x in (output, *grads):
        finite = np.isfinite(np.asarray(x[:, :9], np.float32)).all(axis=(1, 2, 3))
        np.testing.assert_array_equal(finite, [True, False, True])
    with pytest.raises(ValueError, match="several segments of a row"):  # where they can be looked at
        make("cudnn")(*args)


@pytest.mark.parametrize("split", [False, True])
def test_cudnn_lowers_to_its_kernels(monkeypatch, split):
    # Only the version is asked of the machine while lowering; a machine without cuDNN has none.
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91_000)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)) if split else None
    args = [jnp.stack([x] * 2) for x in half([[100]] * 4, 100)]
    step = jax.vmap(value_and_grads(through_layers(make("cudnn", window=7, mesh=mesh))), spmd_axis_name="data")
    text = jax.jit(step).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "custom_call @__cudnn$fmha" in line]
    assert sum("@__cudnn$fmhaSoftmaxBackward(" in call for call in calls) == 1
    # Eight rows and four heads, or what one of the devices holds of them.
    kernel_input = f"tensor<{'2x100x2' if split else '8x100x4'}x{WIDTH}xbf16>"
    for call in calls:
        assert kernel_input in call
        assert r"sliding_window_length\22: 7," in call
        assert r"mask_type\22: \22CAUSAL\22" in call
        assert rf"fmha_scale\22: {SCALE}," in call


def test_splash_lowers_to_its_kernels():
    args = [jnp.asarray(x) for x in inputs(LONG, 150)]
    step = jax.jit(value_and_grads(through_layers(make("splash", window=20, soft_cap=2.0))))
    text = step.trace(*args).lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.custom_call @tpu_custom_call" in text
    for phase in ("fwd", "dq", "dkv"):
        assert f"splash_mha_{phase}_segmented" in text


@pytest.mark.parametrize(
    ("implementation", "options", "match"),
    [
        ("flash", {}, r"attention 'flash' is unknown; choose one of \['cudnn', 'splash', 'xla'\]"),
        ("xla", {"kv_heads": 3}, "heads=4 must be a multiple of kv_heads=3"),
        ("xla", {"head_width": 0}, "head_width must be 1 or more"),
        ("xla", {"scale": 0.0}, r"scale=0.0 must be finite and above 0"),
        ("xla", {"soft_cap": -1.0}, r"soft_cap=-1.0 must be finite and above 0, or 0 for none"),
        ("splash", {"window": -1}, "window=-1 must be 1 or more, or 0"),
        ("cudnn", {"soft_cap": 50.0}, r"'cudnn' cannot cap scores \(soft_cap=50.0\)"),
        ("cudnn", {"head_width": 12}, "multiple of 8 and at most 256, not 12"),
        ("cudnn", {"head_width": 512}, "multiple of 8 and at most 256, not 512"),
    ],
)
def test_refusals(implementation, options, match):
    with pytest.raises(ValueError, match=match):
        make(implementation, **options)


def test_cudnn_refuses_float32():
    with pytest.raises(ValueError, match="bfloat16 or float16, not float32"):
        make("cudnn")(*map(jnp.asarray, inputs([[9]], 12)))


def test_wrong_shapes_are_refused():
    query, key, value, positions, segments = map(jnp.asarray, inputs([[9]], 12))
    with pytest.raises(AssertionError, match="shape"):
        make("xla")(query, query, value, positions, segments)
    with pytest.raises(AssertionError, match="shape"):
        make("xla")(query, key, value, positions[:, :-1], segments)


COMPILE = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
from grpo_jax.models.attention import make_attention
from grpo_jax.sharding import MeshConfig, make_mesh

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), devices)
heads, rows = NamedSharding(mesh, P("data", "fsdp", None, "tensor")), NamedSharding(mesh, P("data", "fsdp"))
# Qwen2.5 0.5B's heads; Gemma 2's cap, window and width, in float32, which is the most that VMEM must hold.
for h, k, c, dtype, options in [(14, 2, 64, "bfloat16", {}), (8, 4, 256, "float32", dict(soft_cap=50.0, window=700))]:
    attend = make_attention("splash", heads=h, kv_heads=k, head_width=c, scale=c**-0.5, mesh=mesh, **options)
    loss = lambda *args: jax.checkpoint(attend)(*args).astype(jnp.float32).sum()
    step = jax.vmap(jax.grad(loss, argnums=(0, 1, 2)), spmd_axis_name="data")
    args = [jax.ShapeDtypeStruct((1, 4, 1000, n, c), dtype, sharding=heads) for n in (h, k, k)]
    args += [jax.ShapeDtypeStruct((1, 4, 1000), "int32", sharding=rows)] * 2
    text = jax.jit(step).lower(*args).compile().as_text()
    assert 'custom_call_target="tpu_custom_call"' in text
    assert not any(name in text for name in ("all-gather", "all-reduce", "all-to-all")), "something travels"
print("compiled")
"""


def test_splash_compiles_for_a_tpu():
    pytest.importorskip("libtpu")
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=TPU_COMPILER, capture_output=True, text=True, timeout=300
    )
    assert "compiled" in done.stdout, done.stderr[-3000:]

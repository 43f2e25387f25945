"""Attention of slots against loops in float64: products, and the kernel, which a CPU interprets."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models import slot_attention
from grpo_jax.sharding import MeshConfig, make_mesh

SCALE, CAP = 0.3, 2.0


def oracle(query, cache, visible):
    """The quotient of what is mixed and the sum, and the logarithm of the sum of exponentials; of nothing 0, -inf."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, cache["key"], cache["value"]))
    if query.ndim == 3:
        query, key, value = query[:, None], key[:, None], value[:, None]
    mixed, logs = np.zeros(query.shape), np.full(query.shape[:3], -np.inf)
    for n, k, m in np.ndindex(*query.shape[:3]):
        columns = np.flatnonzero(visible[n, m // (query.shape[2] // visible.shape[1])])
        if columns.size:
            scores = CAP * np.tanh(SCALE * (query[n, k, m] @ key[n, k][:, columns]) / CAP)
            logs[n, k, m] = np.log(np.exp(scores).sum())
            mixed[n, k, m] = np.exp(scores - logs[n, k, m]) @ value[n, k][columns]
    return mixed, logs


def case(seed, n, heads, m, j, c, columns, cached):
    rng = np.random.default_rng(seed)
    of = (heads,) if heads > 1 else ()
    visible = rng.random((n, j, columns)) < 0.1
    visible[:, :, columns // 3 : 2 * columns // 3] = False  # whole tiles of it
    visible[1] = False  # a slot that sees nothing
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    cache = {"key": draw(n, *of, c, cached), "value": draw(n, *of, cached, c)}
    return draw(n, *of, m, c), cache, jnp.asarray(visible)


def gpu(capability="9.0", platform="gpu"):
    return types.SimpleNamespace(platform=platform, compute_capability=capability)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """No GPU is here; for one that is not here the kernel is compiled (test_plan)."""
    interpreted = functools.partial(slot_attention._attend_tiles, interpret=True)
    monkeypatch.setattr(slot_attention, "_attend_tiles", interpreted)


def kernel_of(kv_heads, head_width, scale=SCALE, soft_cap=CAP, mesh=None) -> slot_attention.AttendBlock:
    kernel = slot_attention.make_kernel(
        gpu(), kv_heads=kv_heads, head_width=head_width, scale=scale, soft_cap=soft_cap, mesh=mesh
    )
    assert kernel is not None
    return kernel


OWN = {
    "few queries": (2, 7, 1, 16, 640),
    "wide": (2, 3, 1, 256, 128),
    "one head": (1, 32, 1, 16, 60),
    "not a power of two": (2, 18, 1, 32, 120),
}
SHARED = {"shared, one head": (1, 6, 3, 16, 60), "shared": (2, 80, 8, 32, 120)}


@pytest.mark.parametrize(
    ("how", "shape"),
    [
        *(pytest.param("products", shape, id=f"{name}-products") for name, shape in (OWN | SHARED).items()),
        *(
            pytest.param(how, shape, id=f"{name}-{how}")
            for name, shape in OWN.items()
            for how in ("kernel", "kernel on a mesh")
        ),
    ],
)
def test_attention_to_a_cache(how, shape):
    heads, m, j, c, columns = shape
    cached = columns if how == "products" else -(-columns // 64) * 64
    query, cache, visible = case(1, 4, heads, m, j, c, columns, cached)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)) if "mesh" in how else None
    if how == "products":
        attend = functools.partial(slot_attention._attend_block, scale=SCALE, soft_cap=CAP)
    else:
        attend = kernel_of(heads, c, mesh=mesh)
    most, total, mixed = jax.tree.map(np.asarray, jax.jit(attend)(query, cache, visible))
    expected, logs = oracle(query, cache, visible)
    seen = np.isfinite(logs)
    with np.errstate(divide="ignore", invalid="ignore"):
        got, sums = (x.reshape(*logs.shape, -1) for x in (mixed / total, most + np.log(total)))
    assert 0 < seen.sum() < seen.size
    np.testing.assert_allclose(got[seen], expected[seen], atol=1e-5)
    np.testing.assert_allclose(sums[..., 0][seen], logs[seen], atol=1e-5)
    if "kernel" in how:  # so that nothing comes of what a slot does not see, whatever is there
        assert (total.reshape(logs.shape)[~seen] == 0).all()
        assert (mixed.reshape(expected.shape)[~seen] == 0).all()


def test_the_kernel_does_not_read_what_is_not_visible():
    query, cache, visible = case(2, 3, 2, 4, 1, 16, 640, 640)
    tiles = ~np.asarray(visible).reshape(3, 10, 64).any(-1)
    assert 0 < tiles.sum() < tiles.size
    spoiled = jnp.where(np.repeat(tiles, 64, axis=1)[:, None, :, None], jnp.nan, cache["value"])
    attend = kernel_of(2, 16)
    for got, expected in zip(
        attend(query, cache | {"value": spoiled}, visible), attend(query, cache, visible), strict=True
    ):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("device", "width"),
    [
        (jax.devices("cpu")[0], 64),
        (gpu(platform="tpu"), 64),
        (gpu(), 80),
        (gpu(), 8),
        (gpu("7.5"), 64),
        (gpu("gfx942"), 64),
    ],
    ids=["cpu", "tpu", "not a power of two", "narrow", "before Ampere", "AMD"],
)
def test_where_there_is_no_kernel(device, width):
    assert not slot_attention.make_kernel(device, kv_heads=2, head_width=width, scale=1.0, soft_cap=0.0, mesh=None)


def test_the_kernel_is_lowered_for_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    attend = kernel_of(2, 64, soft_cap=0.0)
    shape = lambda *sizes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(sizes, dtype)
    cache = {"key": shape(4, 2, 64, 512), "value": shape(4, 2, 512, 64)}
    traced = jax.jit(attend).trace(shape(4, 2, 7, 64), cache, shape(4, 1, 512, dtype=jnp.bool_))
    assert "attend_tiles" in traced.lower(lowering_platforms=("cuda",)).as_text()

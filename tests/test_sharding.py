import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from grpo_jax import sharding
from grpo_jax.models.transformer import make_policy
from grpo_jax.objectives import LossConfig, grpo
from grpo_jax.sharding import MeshConfig, make_mesh, shardings
from grpo_jax.training import init_train_state


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def spec(shape, axes, mesh, **options):
    return shardings({"w": jax.ShapeDtypeStruct(shape, jnp.float32)}, {"w": axes}, mesh, **options)["w"].spec


@pytest.mark.parametrize(
    ("axes", "training", "sampling"),
    [
        (("embed", "heads", "head"), P("fsdp", "tensor", None), P(None, "tensor", None)),
        (("heads", "head", "embed"), P("tensor", None, "fsdp"), P("tensor", None, None)),
        (("embed", "kv_heads", "head"), P("fsdp", "tensor", None), P(None, "tensor", None)),
        (("layers", "embed", "mlp"), P(None, "fsdp", "tensor"), P(None, None, "tensor")),
        (("vocab", "embed"), P("tensor", "fsdp"), P("tensor", None)),
        (("batch", None, "kv_heads"), P(("data", "fsdp"), None, "tensor"), P(("data", "fsdp"), None, "tensor")),
    ],
)
def test_the_table(mesh, axes, training, sampling):
    shape = (8,) * len(axes)
    assert spec(shape, axes, mesh) == training
    assert spec(shape, axes, mesh, rules=sharding.SAMPLER_RULES) == sampling


@pytest.mark.parametrize(
    ("axes", "rules", "match"),
    [
        (("embed", "width"), sharding.RULES, r"\['w'\]: unknown logical axis 'width'"),
        (("embed",), {"embed": "model"}, "unknown mesh axis 'model'"),
        (("heads", "mlp"), sharding.RULES, r"\['w'\]: mesh axis 'tensor' is used twice"),
        (("batch", "embed"), sharding.RULES, "mesh axis 'fsdp' is used twice"),
    ],
)
def test_errors(mesh, axes, rules, match):
    with pytest.raises(ValueError, match=match):
        spec((8,) * len(axes), axes, mesh, rules=rules)


def test_what_does_not_divide_is_replicated_and_logged(mesh, caplog):
    assert spec((7, 8), ("embed", "mlp"), mesh) == P(None, "tensor")
    assert "['w']: embed of size 7 does not divide over ('fsdp',) (2 parts): replicated." in caplog.text
    caplog.clear()
    assert spec((2, 8), ("batch", "mlp"), mesh) == P(None, "tensor")  # 2 rows over 2 x 2 parts
    assert "batch of size 2" in caplog.text
    caplog.clear()
    spec((8, 8), ("embed", "mlp"), mesh)
    assert not caplog.text


def test_mesh_shape_and_order():
    mesh = make_mesh(MeshConfig(data=2, fsdp=3))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 3, "tensor": 1}
    assert list(mesh.devices.flat) == jax.devices()[:6]


@pytest.mark.parametrize(
    ("sizes", "match"), [((4, 3, 1), "data=4 x fsdp=3 x tensor=1 needs 12"), ((1, 0, 1), "fsdp=0")]
)
def test_mesh_errors(sizes, match):
    with pytest.raises(ValueError, match=match):
        make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))))


def test_batches_lie_over_data_and_fsdp(mesh):
    x = jax.device_put(np.arange(8), sharding.batch_sharding(mesh))
    assert sorted(s.index[0].start for s in x.addressable_shards) == [0, 0, 2, 2, 4, 4, 6, 6]
    assert jax.device_put(np.arange(8), sharding.replicated(mesh)).is_fully_replicated


def test_optimizer_moments_lie_where_parameters_lie(config, policy, params, mesh):
    state = init_train_state(policy, params, optax.adamw(1e-3), grpo(), mesh)
    where = jax.tree.map(lambda x: x.sharding.spec, state)
    assert where.params["layers"][0]["query"] == P(None, "fsdp", "tensor", None)
    assert where.params["embedding"] == P("tensor", "fsdp")
    adam = where.opt_state[0]
    assert where.params == adam.mu == adam.nu == where.reference
    assert state.opt_state[0].count.is_fully_replicated
    assert state.step.is_fully_replicated
    assert state.cursor.is_fully_replicated
    query = state.params["layers"][0]["query"]
    assert query.addressable_shards[0].data.size == query.size // 4


def test_a_model_that_does_not_divide_still_trains(config, params, mesh, caplog):
    sharding._warn_once.cache_clear()  # another test may have been told
    odd = make_policy(dataclasses.replace(config, kv_heads=1))
    (layers,) = params["layers"]
    params = {**params, "layers": [{**layers, "key": layers["key"][:, :, :1], "value": layers["key"][:, :, 1:]}]}
    state = init_train_state(odd, params, optax.sgd(1.0), grpo(LossConfig(kl_coef=0.0)), mesh)
    assert state.params["layers"][0]["key"].sharding.spec == P(None, "fsdp", None, None)
    assert "kv_heads of size 1" in caplog.text

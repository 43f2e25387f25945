import dataclasses
import re

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
from grpo_jax.training import UpdateConfig, init_train_state, make_train_step
from grpo_jax.types import TrainBatch
from tests.test_training import collectives


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
    sharding.warn_once.cache_clear()  # another test may have been told
    odd = make_policy(dataclasses.replace(config, kv_heads=1))
    (layers,) = params["layers"]
    params = {**params, "layers": [{**layers, "key": layers["key"][:, :, :1], "value": layers["key"][:, :, 1:]}]}
    state = init_train_state(odd, params, optax.sgd(1.0), grpo(LossConfig(kl_coef=0.0)), mesh)
    assert state.params["layers"][0]["key"].sharding.spec == P(None, "fsdp", None, None)
    assert "kv_heads of size 1" in caplog.text


# Slices ---------------------------------------------------------------------------------------------


def numbers(text):
    return [*map(int, text.split(","))]


def places_of(dims, order):
    """Places in the mesh in the order of XLA's iota notation: [4,2]T(1,0)."""
    places = np.arange(np.prod(numbers(dims))).reshape(numbers(dims))
    return places.transpose(numbers(order)) if order else places


def groups_of(line):
    """Which places in the mesh a collective of compiled text joins, in each of the notations of XLA."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return [numbers(pair) for pair in re.findall(r"(\d+,\d+)", pairs[1])]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        return places_of(*iota.groups()[1:]).reshape(numbers(iota[1])).tolist()
    if not (
        mesh := re.search(
            r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}", line
        )
    ):
        return [
            numbers(group) for group in re.findall(r"(\d[\d,]*)", re.search(r"replica_groups=\{(.*?)\}\}", line)[1])
        ]
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
    joined = {name: (int(before or 1), int(part or sizes[name]))
              for name, before, part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", mesh[4])}  # fmt: skip
    places = places_of(mesh[2], mesh[3]) if mesh[2] else np.arange(np.prod([*sizes.values()]))
    shape, last = [], []
    for name, size in sizes.items():
        before, part = joined.get(name, (size, 1))
        last += [len(shape) + 1] if name in joined else []
        shape += [before, part, size // (before * part)]
    moved = np.moveaxis(places.reshape(shape), last, range(-len(last), 0))
    return moved.reshape(-1, np.prod([part for _, part in joined.values()])).tolist()


def crossing(text):
    """The collectives that join the first four places of a mesh with the others: outside of loops, and inside."""
    crosses = lambda line: any(len({place // 4 for place in group}) > 1 for group in groups_of(line))
    return [[*filter(crosses, lines)] for lines in collectives(text)]


def test_over_slices_data_goes_and_one_sum_of_gradients(config, params):
    interleaved = lambda device: device.id % 2
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), slice_of=interleaved)
    assert sharding.between_slices(mesh, interleaved) == ("data",)
    assert [{device.id % 2 for device in half.flat} for half in mesh.devices] == [{0}, {1}]
    rng, objective = np.random.default_rng(0), grpo(LossConfig(kl_coef=0.0))
    tokens = lambda columns: rng.integers(2, config.vocab_size, (32, columns)).astype(np.int32)
    batch = TrainBatch(
        prompt_tokens=tokens(4), prompt_mask=np.ones((32, 4), bool), completion_tokens=tokens(6),
        mask=np.ones((32, 6), bool), advantages=rng.normal(size=32).astype(np.float32), sampler_logprobs=None,
        temperature=np.ones(32, np.float32),
    )  # fmt: skip

    def step_on(mesh):
        policy = make_policy(config, mesh)
        state = init_train_state(policy, params, optax.sgd(1.0), objective, mesh)
        update, key = UpdateConfig(microbatches=2), jax.random.key(0)
        step = make_train_step(policy, optax.sgd(1.0), objective, update, like=state, key=key)
        compiled = step.lower(state, jax.device_put(batch, sharding.batch_sharding(mesh))).compile()
        return compiled, state

    compiled, state = step_on(mesh)
    alone, one = step_on(make_mesh())
    outside, inside = crossing(compiled.as_text())
    assert not inside
    assert outside
    assert all(" all-reduce" in line for line in outside)
    on_slices, _ = compiled(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
    on_one, _ = alone(one, jax.device_put(batch, sharding.batch_sharding(make_mesh())))
    same = lambda got, expected: np.testing.assert_allclose(got, expected, atol=1e-5)
    jax.tree.map(same, on_slices.params, on_one.params)
    # The negative control: fsdp over the slices gathers parameters from one to the other, in the loop.
    _, inside = crossing(step_on(make_mesh(MeshConfig(fsdp=4, tensor=2), slice_of=interleaved))[0].as_text())
    assert inside


def test_what_slices_refuse_and_warn_of(caplog):
    halves = lambda device: device.id // 4
    with pytest.raises(ValueError, match=r"mesh of 6 devices takes 4, 2 of slices"):
        make_mesh(MeshConfig(fsdp=6), slice_of=halves)
    assert sharding.between_slices(make_mesh(MeshConfig(fsdp=4), slice_of=halves), halves) == ()
    assert not caplog.text
    assert sharding.between_slices(make_mesh(MeshConfig(tensor=8), slice_of=halves), halves) == ("tensor",)
    assert "mesh: tensor goes from slice to slice" in caplog.text

"""Adapters against the dense weights that they stand for, and what training with them holds and computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import logprobs as logprobs_lib
from grpo_jax import sharding, training
from grpo_jax.logprobs import token_logprobs, unembed
from grpo_jax.models.leaves import MATRICES, Adapted, bare, merged, project
from grpo_jax.models.lora import LoraConfig, abstract, adapted, adapted_policy, init_adapters
from grpo_jax.models.transformer import TransformerConfig, abstract_params, make_policy
from grpo_jax.objectives import grpo
from grpo_jax.training import UpdateConfig, abstract_train_state, init_train_state, make_train_step
from tests.test_training import KEY, LOSS, assert_trees_close, make_batch, mesh_of

# Two places in the pattern and a layer left over, biases, and no two sizes alike.
MODEL = TransformerConfig(
    vocab_size=38, layers=5, width=22, heads=6, kv_heads=2, head_width=4, mlp_width=26, windows=(0, 3), qkv_bias=True
)
LORA = LoraConfig(rank=3, alpha=6.0, targets=("query", "value", "output", "down"))


def random(shapes, seed, scale=0.3):
    """Random in every leaf: the zeros that adapters begin with hide whether they are used."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, scale, x.shape), jnp.float32), shapes)


def with_adapters(lora=LORA, model=MODEL, sizes=(1, 1, 1)):
    """(policy, parameters whose adapters count) on a mesh."""
    policy = adapted_policy(make_policy(model, mesh_of(*sizes)), model, lora)
    return policy, random(abstract(model, lora)[0], 1)


def matrices(name, stacked, leaf):
    """A [layers, in, r] and B [layers, r, out] of an adapter, float64."""
    a, b = (np.asarray(x, np.float64) for x in (leaf.a, leaf.b))
    inputs = int(np.prod(leaf.base.shape[stacked : stacked + MATRICES[name]]))
    return a.reshape(-1, inputs, a.shape[-1]), b.reshape(
        -1, a.shape[-1], leaf.base[0].size // inputs if stacked else leaf.base.size // inputs
    )


def whole(params):
    """Parameters without adapters, of which these are the sum: by NumPy in float64, a matrix at a time."""

    def of(leaf, name, stacked):
        if not isinstance(leaf, Adapted):
            return leaf
        a, b = matrices(name, stacked, leaf)
        return jnp.asarray(
            np.asarray(leaf.base, np.float64) + leaf.scale * (a @ b).reshape(leaf.base.shape), jnp.float32
        )

    layers = lambda group, stacked: [{k: of(x, k, stacked) for k, x in layer.items()} for layer in params[group]]
    return {**params, "layers": layers("layers", 1), "tail": layers("tail", 0)}


@pytest.mark.parametrize(("name", "inputs", "outputs"), [("query", (5,), (2, 3)), ("output", (2, 3), (5,))])
def test_a_projection_is_that_of_the_sum_and_so_are_its_gradients(name, inputs, outputs):
    rng, rank, scale = np.random.default_rng(0), 2, 1.5
    x, base, a, b, up = (rng.normal(size=s) for s in ((7, *inputs), inputs + outputs, (*inputs, rank),
                                                      (rank, *outputs), (7, *outputs)))  # fmt: skip
    flat = lambda y: y.reshape(-1, int(np.prod(outputs)))
    X, W, A, B, U = x.reshape(7, -1), base.reshape(-1, flat(b).shape[1]), a.reshape(-1, rank), flat(b), flat(up)
    S = W + scale * A @ B
    expected = {"x": U @ S.T, "a": scale * X.T @ U @ B.T, "b": scale * A.T @ X.T @ U}

    def loss(given):
        leaf = Adapted(base=jnp.asarray(base, jnp.float32), a=given["a"], b=given["b"], scale=scale)
        out = project(given["x"], leaf, len(inputs))
        return (out * jnp.asarray(up, jnp.float32)).sum(), out

    given = {k: jnp.asarray(v, jnp.float32) for k, v in {"x": x, "a": a, "b": b}.items()}
    (_, out), grads = jax.value_and_grad(loss, has_aux=True)(given)
    np.testing.assert_allclose(flat(np.asarray(out)), X @ S, rtol=1e-5, atol=1e-5)
    for k, v in expected.items():
        np.testing.assert_allclose(grads[k], v.reshape(given[k].shape), rtol=1e-5, atol=1e-5)
    assert merged({"w": Adapted(base=given["a"], a=given["a"], b=jnp.zeros((rank, rank)), scale=1.0)})["w"].shape


def test_a_policy_with_adapters_is_one_of_the_sums():
    policy, params = with_adapters()
    plain, tokens = make_policy(MODEL), np.random.default_rng(0).integers(0, 38, (2, 9))
    arguments = tokens, np.tile(np.arange(9), (2, 1)), np.ones_like(tokens)
    logits = jax.jit(lambda policy, p: unembed(policy.hidden(p, *arguments)[0], policy.head(p)), static_argnums=0)
    ours = logits(policy, params)
    np.testing.assert_allclose(ours, logits(plain, whole(params)), atol=1e-5)
    assert np.abs(ours - logits(plain, bare(params))).max() > 0.1
    # The sampler decodes with the sums.
    assert_trees_close(jax.jit(policy.prepare)(params), plain.prepare(whole(params)))
    assert policy.sampler_axes == plain.sampler_axes
    int8 = adapted_policy(make_policy(dataclasses.replace(MODEL, sampler_dtype="int8")), MODEL, LORA)
    described = lambda p: jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(int8.prepare, p))
    assert described(params) == described(bare(params))
    # Adapters as they begin: B is zero, and A of the size that PEFT gives it.
    params = adapted(bare(params), init_adapters(MODEL, LORA, jax.random.key(0), mesh_of(1, 1, 1)), LORA)
    np.testing.assert_array_equal(logits(policy, params), logits(policy, bare(params)))
    a = params["layers"][0]["output"].a
    assert a.shape == (2, 6, 4, 3)
    assert 0.9 / 24**0.5 < np.abs(a).max() <= 1 / 24**0.5
    assert len(np.unique(a)) == a.size  # every layer its own


DESCENT = optax.sgd(1.0, momentum=0.0)  # the change is the gradient, and yet there is a moment, as Adam has two
UPDATE = UpdateConfig(microbatches=2)


@pytest.fixture(scope="module")
def updated():
    """Parameters and a batch; on one device the parameters after an update, its metrics, and what it held."""
    policy, params = with_adapters()
    batch = dataclasses.replace(make_batch(make_policy(MODEL), bare(params)), sampler_logprobs=None)
    return params, batch, *one_update(policy, params, batch)


def one_update(policy, params, batch, sizes=(1, 1, 1)):
    mesh = mesh_of(*sizes)
    state = init_train_state(policy, params, DESCENT, grpo(LOSS), mesh)
    where = jax.tree.map(lambda x: x.sharding, state)
    step = make_train_step(policy, DESCENT, grpo(LOSS), UPDATE, like=state, key=KEY).lower(state, batch).compile()
    # Adapters as they begin: the policy is its reference, and yet they learn.
    begun = adapted(bare(params), init_adapters(MODEL, LORA, jax.random.key(0), mesh), LORA)
    _, metrics = step(init_train_state(policy, begun, DESCENT, grpo(LOSS), mesh), batch)
    assert metrics["kl"] == pytest.approx(0, abs=1e-7)
    assert metrics["grad_norm"] > 1e-3
    state, metrics = step(state, batch)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, where))
    return jax.device_get(state.params), jax.device_get(metrics), step.memory_analysis()


def test_an_update_is_the_gradient_of_the_sums_by_the_chain_rule_and_holds_one_copy_of_the_weights(updated):
    """The reference is the base: a full update with it as the reference gives dW; dA = s dW B', dB = s A' dW.

    That holds weights, reference and moment, three times all; ours the base, and the adapters and their moment.
    """
    params, batch, after, metrics, ours = updated
    plain, mesh = make_policy(MODEL), mesh_of(1, 1, 1)
    state = init_train_state(plain, whole(params), DESCENT, grpo(LOSS), mesh)
    state = dataclasses.replace(state, reference=jax.tree.map(jnp.copy, bare(params)))
    step = make_train_step(plain, DESCENT, grpo(LOSS), UPDATE, like=state, key=KEY).lower(state, batch).compile()
    size, theirs = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree)), step.memory_analysis()
    base, adapters, small = size(bare(params)), size(params) - size(bare(params)), size(batch) + 100
    assert 0 <= theirs.argument_size_in_bytes - 3 * base <= small
    assert 0 <= ours.argument_size_in_bytes - (base + 2 * adapters) <= small
    # Nor is there another while it runs: in the state's place it leaves the state, and it has no gradients of weights.
    assert ours.alias_size_in_bytes >= base + 2 * adapters
    assert ours.temp_size_in_bytes < theirs.temp_size_in_bytes - base

    state, expected = step(state, batch)
    dense = jax.tree.map(lambda x, y: np.asarray(x, np.float64) - y, whole(params), jax.device_get(state.params))
    for name in ("kl", "loss"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-4, atol=1e-6)
    assert metrics["kl"] > 1e-3
    jax.tree.map(np.testing.assert_array_equal, bare(after), bare(params))  # frozen, to the bit
    seen = 0
    for group, stacked in (("layers", 1), ("tail", 0)):
        for old, new, grads in zip(params[group], after[group], dense[group], strict=True):
            for name, leaf in old.items():
                if not isinstance(leaf, Adapted):
                    continue
                a, b = matrices(name, stacked, leaf)
                w = grads[name].reshape(len(a), a.shape[1], -1)
                expected = {"a": leaf.scale * w @ b.swapaxes(1, 2), "b": leaf.scale * a.swapaxes(1, 2) @ w}
                for side, gradient in expected.items():
                    change = getattr(leaf, side) - getattr(new[name], side)
                    np.testing.assert_allclose(change.reshape(gradient.shape), gradient, rtol=1e-3, atol=2e-6)
                seen += 1
    assert seen == 3 * len(LORA.targets)


def test_an_update_on_a_mesh_is_that_on_one_device(monkeypatch, updated):
    """Also where log-probabilities come in chunks, whose gradient is our own."""
    monkeypatch.setitem(token_logprobs.__kwdefaults__, "chunk", 32)
    monkeypatch.setattr(logprobs_lib, "_IDS", 4)
    params, batch, after, metrics, _ = updated
    policy, _ = with_adapters(sizes=(2, 2, 2))
    ours, said, _ = one_update(policy, params, batch, (2, 2, 2))
    assert_trees_close(ours, after)
    assert_trees_close(
        {k: said[k] for k in ("loss", "kl", "grad_norm")}, {k: metrics[k] for k in ("loss", "kl", "grad_norm")}
    )


def products(jaxpr):
    """Shapes of all products of matrices in a program, its loops included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(sorted(size for size in equation.outvars[0].aval.shape if size > 1))
        for value in equation.params.values():
            for part in value if isinstance(value, tuple) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from products(inner)


@pytest.mark.parametrize("chunked", [False, True])
def test_no_gradient_of_a_weight_is_formed(monkeypatch, chunked):
    if chunked:
        monkeypatch.setitem(token_logprobs.__kwdefaults__, "chunk", 32)
    plain = make_policy(MODEL)
    shapes, mesh = abstract_params(MODEL)[0], mesh_of(1, 1, 1)
    matrices = {"query": (22, 24), "key": (8, 22), "up": (22, 26), "head": (22, 38)}  # sorted; output and down as these
    batch = dataclasses.replace(make_batch(plain, random(shapes, 1)), sampler_logprobs=None)
    found = {}
    for lora in (LoraConfig(), LORA):
        policy = adapted_policy(plain, MODEL, lora)
        like = abstract_train_state(policy, abstract(MODEL, lora)[0], optax.adamw(1e-3), grpo(LOSS), mesh)
        step = make_train_step(policy, optax.adamw(1e-3), grpo(LOSS), UpdateConfig(microbatches=2), like=like, key=KEY)
        formed = {*products(jax.make_jaxpr(step)(like, batch).jaxpr)}
        found[lora.rank] = {name for name, shape in matrices.items() if shape in formed}
    assert found == {0: {*matrices}, LORA.rank: set()}


def test_a_reference_that_moves_is_refused():
    policy, params = with_adapters()
    like = abstract_train_state(policy, params, optax.sgd(1.0), grpo(LOSS), mesh_of(1, 1, 1))
    assert like.reference is None
    with pytest.raises(ValueError, match="reference_every=2: with adapters"):
        make_train_step(policy, optax.sgd(1.0), grpo(LOSS), UpdateConfig(reference_every=2), like=like, key=KEY)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": -1}, "rank=-1 of LoRA must be 0"),
        ({"rank": 2, "alpha": 0.0}, "alpha=0.0 above 0"),
        ({"rank": 2, "targets": ("q_proj",)}, "must be some of"),
        ({"rank": 2, "targets": ()}, "must be some of"),
        ({"rank": 2, "targets": "query"}, "must be some of"),
        ({"rank": 2, "targets": ("up", "up")}, "must name none twice"),
        ({"adapter": "there"}, "adapter='there' of LoRA without a rank, and 0 makes no adapters: give --lora.rank too"),
        ({"base_dtype": "bfloat16", "alpha": 8.0}, "alpha=8.0 and base_dtype='bfloat16' of LoRA without a rank"),
        ({"rank": 2, "base_dtype": "int8"}, "base_dtype='int8' of LoRA must be"),
    ],
)
def test_bad_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**fields)


def test_moments_and_adapters_lie_as_their_weights_do():
    policy, params = with_adapters(sizes=(1, 2, 2))
    like = abstract_train_state(policy, params, optax.adam(1.0), grpo(LOSS), mesh_of(1, 2, 2))
    spec = lambda x: tuple(x.sharding.spec)
    layer, moments = like.params["layers"][0], like.opt_state[0].mu["layers"][0]
    assert spec(layer["query"].base) == (None, "fsdp", "tensor", None)
    assert spec(layer["query"].a) == (None, "fsdp", None) == spec(moments["query"]["a"])
    assert spec(layer["query"].b) == (None, None, "tensor", None) == spec(moments["query"]["b"])
    assert spec(layer["output"].a) == (None, "tensor", None, None)
    assert spec(layer["output"].b) == (None, None, "fsdp")
    assert spec(like.params["tail"][0]["down"].a) == ("tensor", None)
    assert len(jax.tree.leaves(like.opt_state[0].mu)) == 2 * 3 * len(LORA.targets)
    held = sharding.device_bytes(like.params, policy.param_axes, mesh_of(1, 2, 2))
    assert held < sharding.device_bytes(like.params, policy.param_axes, mesh_of(1, 1, 1)) / 3


@pytest.mark.parametrize("changes", [{"rank": 4}, {"alpha": 7.0}, {"targets": ("query",)}, {"base_dtype": "bfloat16"}])
def test_every_field_changes_something(changes):
    """Of `adapter`, tests/test_gsm8k.py shows it."""
    other = dataclasses.replace(LORA, **changes)
    described = lambda config: [
        jax.tree.structure(abstract(MODEL, config)[0]),
        *jax.tree.leaves(abstract(MODEL, config)[0]),
    ]
    assert described(LORA) == described(dataclasses.replace(LORA))
    assert described(LORA) != described(other)


def test_without_a_rank_nothing_changes():
    policy, off = make_policy(MODEL), LoraConfig()
    assert adapted_policy(policy, MODEL, off) is policy
    assert jax.tree.structure(abstract(MODEL, off)) == jax.tree.structure(abstract_params(MODEL))
    assert policy.split is training.Policy.split

"""Optimizers against what their papers say, in NumPy and float64; and where their state lies."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from grpo_jax import sharding
from grpo_jax.checkpoints import Checkpoints
from grpo_jax.models.transformer import TransformerConfig, init_params, make_policy
from grpo_jax.objectives import LossConfig, grpo
from grpo_jax.optimizers import HOST, OptimizerConfig, make_optimizer
from grpo_jax.training import UpdateConfig, init_train_state, make_train_step
from grpo_jax.types import TrainBatch
from tests import TPU_COMPILER

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("options", "expected"),  # learning rate at optimizer steps 0, 2, 4, 9, 14
    [
        ({}, [0, 1, 2, 2, 2]),
        ({"decay": "linear"}, [0, 1, 2, 1, 0]),
        ({"decay": "cosine"}, [0, 1, 2, 1, 0]),
        ({"warmup_steps": 0}, [2, 2, 2, 2, 2]),
        ({"warmup_steps": 0, "decay": "linear"}, [2, 12 / 7, 10 / 7, 5 / 7, 0]),
        ({"warmup_steps": 0, "decay": "cosine"}, [1 + np.cos(np.pi * n / 14) for n in (0, 2, 4, 9, 14)]),
    ],
)
def test_schedules(options, expected):
    _, schedule = make_optimizer(OptimizerConfig(**{"learning_rate": 2.0, "warmup_steps": 4, **options}), 14)
    np.testing.assert_allclose([schedule(n) for n in (0, 2, 4, 9, 14)], expected, atol=1e-6)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_the_optimizer_is_clipped_adamw(clip_norm):
    config = OptimizerConfig(
        learning_rate=0.1, warmup_steps=2, clip_norm=clip_norm, b1=0.7, b2=0.8, epsilon=1e-2, weight_decay=0.3
    )
    optimizer, _ = make_optimizer(config, 10)
    got = {"w": jnp.array([1.0, -2.0]), "v": jnp.array([3.0])}
    state = optimizer.init(got)
    w, mean, square = np.array([1.0, -2.0, 3.0]), np.zeros(3), np.zeros(3)
    gradients = np.array([[3.0, 4.0, 12.0], [0.1, -0.2, 0.3], [1.0, 0.0, -1.0]])  # the first of norm 13
    for n, gradient in enumerate(gradients):
        tree = {"w": jnp.array(gradient[:2], jnp.float32), "v": jnp.array(gradient[2:], jnp.float32)}
        updates, state = optimizer.update(tree, state, got)
        got = optax.apply_updates(got, updates)
        norm = np.sqrt((gradient**2).sum())
        g = gradient * min(1, clip_norm / norm) if clip_norm else gradient
        mean, square = 0.7 * mean + 0.3 * g, 0.8 * square + 0.2 * g**2
        direction = mean / (1 - 0.7 ** (n + 1)) / (np.sqrt(square / (1 - 0.8 ** (n + 1))) + 1e-2)
        w = w - 0.1 * min(n / 2, 1) * (direction + 0.3 * w)
    np.testing.assert_allclose(np.concatenate([got["w"], got["v"]]), w, rtol=1e-5)


def adafactor_direction(gradient, rows, columns, t):
    """Algorithm 4 of arXiv 1804.04235 for a matrix, and its decay by eq. 9: the direction, and both means after it."""
    decay = 1 - t**-0.8
    square = gradient**2 + 1e-30
    rows, columns = decay * rows + (1 - decay) * square.mean(1), decay * columns + (1 - decay) * square.mean(0)
    return gradient / np.sqrt(np.outer(rows, columns) / rows.mean()), rows, columns


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_adafactor(clip_norm):
    """A stack of two matrices, and a vector, over three steps: of the stack each matrix has its own factors."""
    rng, rate, weight_decay = np.random.default_rng(0), 0.1, 0.3
    config = OptimizerConfig(
        kind="adafactor", learning_rate=rate, warmup_steps=2, clip_norm=clip_norm, weight_decay=weight_decay
    )
    optimizer, _ = make_optimizer(config, 10)
    w, v = rng.normal(size=(2, 128, 160)), rng.normal(size=5)
    got = {"w": jnp.array(w, jnp.float32), "v": jnp.array(v, jnp.float32)}
    state, update = optimizer.init(got), jax.jit(optimizer.update)
    factors, squares = [(np.zeros(128), np.zeros(160))] * 2, np.zeros(5)
    for t in range(1, 4):
        of_w, of_v = rng.normal(size=w.shape) * rng.uniform(0.1, 9, (2, 128, 1)), rng.normal(size=5) * 10
        tree = {"w": jnp.array(of_w, jnp.float32), "v": jnp.array(of_v, jnp.float32)}
        updates, state = update(tree, state, got)
        got = optax.apply_updates(got, updates)
        norm = np.sqrt((of_w**2).sum() + (of_v**2).sum())
        of_w, of_v = (g * min(1, clip_norm / norm) if clip_norm else g for g in (of_w, of_v))
        results = [adafactor_direction(g, *factors[i], t) for i, g in enumerate(of_w)]
        factors, squares = [result[1:] for result in results], t**-0.8 * of_v**2 + (1 - t**-0.8) * squares
        for x, direction in ((w, np.stack([result[0] for result in results])), (v, of_v / np.sqrt(squares))):
            direction = direction / max(1, np.sqrt((direction**2).mean()))
            x -= rate * min((t - 1) / 2, 1) * (direction + weight_decay * x)
    np.testing.assert_allclose(got["w"], w, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got["v"], v, rtol=1e-4)
    held = sum(x.size for x in jax.tree.leaves(state))
    assert held == 2 * (128 + 160) + 5 + 2 + 3  # two counts, and one element for each of three that there are not


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"decay": "exponential"}, "decay='exponential'"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"clip_norm": -1.0}, "clip_norm"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"kind": "sgd"}, "kind='sgd' must be one of adamw, adafactor"),
        ({"kind": "adafactor", "b2": 0.9, "epsilon": 1.0}, r"b2=0\.9, epsilon=1\.0: of adamw alone"),
    ],
)
def test_config_errors(options, match):
    with pytest.raises(ValueError, match=match):
        OptimizerConfig(**options)


# Where the state lies -------------------------------------------------------------------------------

WIDE = TransformerConfig(vocab_size=128, layers=2, width=128, heads=2, kv_heads=2, head_width=128, mlp_width=256)
SPLIT = {"data": 2, "fsdp": 2, "tensor": 2}


def stepped(config, options, offload=False, minibatches=1, **axes):
    """A state before and after an update, and what a step said."""
    mesh, rng = sharding.make_mesh(sharding.MeshConfig(**axes)), np.random.default_rng(0)
    policy, params = make_policy(config, mesh), init_params(config, jax.random.key(0))
    optimizer, _ = make_optimizer(OptimizerConfig(warmup_steps=0, learning_rate=1e-2, **options), 10)
    objective = grpo(LossConfig(kl_coef=0.0))
    state = init_train_state(policy, params, optimizer, objective, mesh, offload=offload)
    tokens = lambda columns: rng.integers(2, config.vocab_size, (16, columns)).astype(np.int32)
    batch = TrainBatch(
        prompt_tokens=tokens(4), prompt_mask=np.ones((16, 4), bool), completion_tokens=tokens(6),
        mask=np.arange(6) < rng.integers(1, 7, (16, 1)), advantages=rng.normal(size=16).astype(np.float32),
        sampler_logprobs=None, temperature=np.ones(16, np.float32),
    )  # fmt: skip
    step = make_train_step(
        policy, optimizer, objective, UpdateConfig(minibatches=minibatches), like=state, key=jax.random.key(1)
    )
    return step(state, jax.device_put(batch, sharding.batch_sharding(mesh)))[0]


def kinds(tree):
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree) if x.ndim}


@pytest.fixture(scope="module")
def whole():
    """Adafactor's state after a step, on one device."""
    return stepped(WIDE, {"kind": "adafactor"})


def test_factored_state_is_split_over_a_mesh_as_what_it_is_of(whole, tmp_path):
    split = stepped(WIDE, {"kind": "adafactor"}, **SPLIT)
    for ours, theirs in zip(jax.tree.leaves(split), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
    ((factored, _), *_) = split.opt_state[1]
    of = lambda tree, name: (tree["layers"][0][name].shape, tree["layers"][0][name].sharding.spec)
    # gate [N, D, F] and down [N, F, D]: by row are means over the longer of both axes, and by column the others.
    assert of(factored.v_row, "gate") == ((2, 128), PartitionSpec(None, "fsdp"))
    assert of(factored.v_col, "gate") == ((2, 256), PartitionSpec(None, "tensor"))
    assert of(factored.v_row, "down") == ((2, 128), PartitionSpec(None, "fsdp"))
    assert of(factored.v_col, "query") == ((2, 2, 128), PartitionSpec(None, "tensor", None))
    assert of(factored.v, "gate") == ((1,), PartitionSpec())
    assert of(factored.v, "mlp_norm") == ((2, 128), PartitionSpec(None, "fsdp"))
    store = Checkpoints(tmp_path)
    store.save(split)
    store.wait()
    restored = store.restore(whole)
    store.close()
    for ours, theirs, like in zip(*map(jax.tree.leaves, (restored, split, whole)), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
        assert ours.sharding == like.sharding


def test_state_in_the_memory_of_the_host_learns_the_same_and_is_restored_there(config, tmp_path):
    on_devices = stepped(config, {}, minibatches=2, fsdp=2)
    on_host = stepped(config, {}, offload=True, minibatches=2, fsdp=2)
    assert kinds(on_devices.opt_state) == kinds(on_host.params) == {"device"}
    assert kinds(on_host.opt_state) == {HOST}
    for ours, theirs in zip(jax.tree.leaves(on_host), jax.tree.leaves(on_devices), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    store = Checkpoints(tmp_path)
    store.save(on_host)
    store.wait()
    for like in (on_host, on_devices):  # as `evaluate` has it, which leaves nothing on the host
        restored = store.restore(like)
        assert kinds(restored.opt_state) == kinds(like.opt_state)
        for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(on_host), strict=True):
            assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    store.close()


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e .[tpu]")
def test_state_in_the_memory_of_the_host_is_not_in_that_of_a_tpu():
    """As its compiler says, of four chips that are not here: see compile_offloaded.py."""
    command = [sys.executable, "-m", "tests.compile_offloaded"]
    environment = {**TPU_COMPILER, "JAX_OPTIMIZATION_LEVEL": "O0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    needs = {program["name"]: program for program in map(json.loads, done.stdout.splitlines())}
    params = needs["on chips"]["params"]
    near = lambda n: pytest.approx(n * params, rel=0.02)  # a batch is little beside it
    assert (needs["on chips"]["arguments"], needs["on chips"]["host"]) == (near(3), 0)
    assert (needs["on the host"]["arguments"], needs["on the host"]["host"]) == (near(1), near(2))
    # Nor do they come while there are activations.
    assert needs["on the host"]["temporaries"] < needs["on chips"]["temporaries"] + params / 2

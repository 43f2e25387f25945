"""Eight CPU devices, no silent broadcasting between ranks, and one tiny policy for all tests."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and run little: LLVM's optimizations would double their time. Eight devices share a few cores, and
# XLA ends the process where one of them lets the others wait for 40 s. Flags that are set already win.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_cpu_collective_call_terminate_timeout_seconds=300 "
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)
# And enough threads for them, as `sharding.cpu_threads` says: with one each, collectives wait forever.
os.environ.setdefault("PJRT_NPROC", "32")

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models.transformer import TransformerConfig, init_params, make_policy
from tests import sandboxes

jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None, max_examples=50)
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="session")
def config():
    return TransformerConfig(vocab_size=20, layers=2, width=16, heads=4, kv_heads=2, head_width=4, mlp_width=24)


@pytest.fixture(scope="session")
def policy(config):
    return make_policy(config)


@pytest.fixture(scope="session")
def params(config):
    """Random in every leaf: the scales of norms begin at 1, which hides whether they are used."""
    rng, shapes = np.random.default_rng(0), jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

    def fill(path, leaf):
        is_scale = "norm" in path[-1].key
        return jnp.asarray(rng.normal(1.0 * is_scale, 0.25, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


@pytest.fixture(scope="session")
def hidden_of(policy):
    return jax.jit(lambda *args: policy.hidden(*args)[0])


@pytest.fixture(scope="session")
def extend(policy):
    return jax.jit(lambda params, *args: policy.extend(policy.prepare(params), *args))


def pytest_terminal_summary(terminalreporter):
    """Under which isolation hostile programs ran: what their tests say holds for it alone."""
    from grpo_jax.rewards.sandbox import SandboxError, isolation

    try:
        terminalreporter.write_line(isolation().description)
    except SandboxError as error:
        terminalreporter.write_line(f"sandbox: none ({error})")


@pytest.fixture(scope="module")
def marked():
    """What marks the processes of a module's sandboxes."""
    with sandboxes.marked() as mark:
        yield mark

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grpo_jax import fingerprints as lib
from grpo_jax import sharding
from grpo_jax.fingerprints import fingerprints

VALUES = {
    "float32": np.random.default_rng(0).normal(size=(8, 3, 4)).astype(np.float32),
    "bfloat16": np.random.default_rng(1).normal(size=(4, 6)).astype(jnp.bfloat16),
    "int32": np.array(-7, np.int32),
    "int8": np.arange(-8, 8, dtype=np.int8),
    "bool": np.array([[True, False], [False, True]]),
    "empty": np.zeros((0, 3), np.float32),
}


def by_hand(x: np.ndarray) -> int:
    """With Python's integers."""
    kind, total = f"u{x.dtype.itemsize}", 0
    bits = x.astype(np.int64).reshape(-1) if x.dtype.kind in "ib" else np.ascontiguousarray(x).view(kind).reshape(-1)
    for i, b in enumerate(bits.tolist()):
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            i = (i ^ (i >> shift)) * factor % 2**32
        total += b * (i | 1)
    return total % 2**32


def test_against_a_loop():
    found = fingerprints(VALUES)
    assert found == {f"[{name!r}]": by_hand(value) for name, value in VALUES.items()}
    assert fingerprints({}) == {}


@pytest.mark.parametrize("spec", [("data", "fsdp"), ("fsdp", None), (None, "fsdp"), (("data", "fsdp"), None)])
def test_the_same_on_any_mesh_without_moving_an_array(spec):
    x = VALUES["float32"].reshape(8, 12)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=4))
    there = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    assert fingerprints(there) == fingerprints(x)
    compiled = lib._sum.lower(there).compile().as_text()
    assert "all-gather" not in compiled
    assert "all-reduce" in compiled


def test_every_flipped_bit_and_every_swap_is_seen():
    x = VALUES["bfloat16"]
    before, bits = fingerprints(x), x.view(np.uint16)
    changed = [bits.copy() for _ in range(16 * bits.size)]
    for i, copy in enumerate(changed):
        copy.reshape(-1)[i // 16] ^= 1 << i % 16
    for i in range(bits.size - 1):
        copy = bits.copy().reshape(-1)
        copy[[i, i + 1]] = copy[[i + 1, i]]
        changed.append(copy.reshape(bits.shape))
    seen = jax.jit(jax.vmap(lambda b: lib._sum(jax.lax.bitcast_convert_type(b, jnp.bfloat16))))(np.stack(changed))
    assert not (np.asarray(seen) == before[""]).any()

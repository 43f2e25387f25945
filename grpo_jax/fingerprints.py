"""A sum of the bits of each array: whether what was restored is what was saved, whatever the mesh."""

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.optimizers import HOST
from grpo_jax.types import PyTree

__all__ = ["fingerprints"]


def fingerprints(tree: PyTree) -> dict[str, int]:
    r"""A number of each array, by its name: equal for equal bits and shapes, on any mesh.

    .. math:: \sum_i b_i \, w(i) \bmod 2^{32}

    with the bits :math:`b_i` of element i as a number, and an odd weight that looks random. Odd numbers have an
    inverse, so that any change of one element changes the sum; other changes go unnoticed once in :math:`2^{32}`.
    Each device sums what it holds, in one pass; XLA for CPUs keeps the products, so that arrays come one after the
    other. It is against accidents, not against people.

    Args:
      tree: arrays of at most 64 bits an element, on the devices or the host; of several processes, all must ask.

    Returns:
      Numbers below 2^32 by `jax.tree_util.keystr`.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): int(np.asarray(_sum(_near(x)))) for path, x in leaves}


def _near(x: jax.Array) -> jax.Array:
    """Where it can be summed up: on the devices."""
    on_host = isinstance(x, jax.Array) and x.sharding.memory_kind == HOST
    return jax.device_put(x, x.sharding.with_memory_kind("device")) if on_host else x


@jax.jit
def _sum(x: jax.Array) -> jax.Array:
    """[] uint32."""
    bits = _bits(x)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):  # of the element in the whole array, wherever it lies
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    # The finalizer of MurmurHash3: neighbours, and multiples of powers of two, get weights that have nothing in common.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        index = (index ^ (index >> shift)) * jnp.uint32(factor)
    return (bits * (index | 1)).sum(dtype=jnp.uint32)


def _bits(x: jax.Array) -> jax.Array:
    """The bits of each element as a uint32; of 64 bits, as two along an axis more."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.integer) and x.dtype.itemsize <= 4:
        return x.astype(jnp.uint32)  # modulo 2^32, which tells them apart
    width = min(x.dtype.itemsize, 4) * 8
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}")).astype(jnp.uint32)

"""What a weight of the decoder's layers may be: an array, one with an adapter (LoRA), or integers; `project` knows all.

LoRA (arXiv 2106.09685) adds to a frozen W [in, out] a product of two narrow matrices that train,

    y = x W + s (x A) B,    A [in, r], B [r, out], s = alpha / r,

computed in that order, so that neither W + s A B nor a gradient of W is formed where it trains. What decodes takes the
sum, once a rollout (`merged`), for decoding reads every weight at every token.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.types import Array, PyTree, record

__all__ = ["MATRICES", "Adapted", "bare", "merged", "project", "quantized", "quantized_axes", "scattered"]

# The matrices of a layer, and how many leading axes of each are inputs.
MATRICES = {"query": 1, "key": 1, "value": 1, "output": 2, "gate": 1, "up": 1, "down": 1}


@record
class Adapted:
    """A frozen weight and its adapter; a stack of layers has a leading axis N in all three."""

    base: Array  # [inputs..., outputs...]; first, where Linen looks for the shape of a weight
    a: Array  # [inputs..., r] float32
    b: Array  # [r, outputs...] float32
    scale: float = dataclasses.field(metadata={"static": True})  # s


def project(x: jax.Array, leaf: Any, axes: int = 1) -> jax.Array:
    """Contracts the last `axes` axes of x with the first of a weight leaf, in x's dtype.

    The leaf is an array, `Adapted`, or qwix's of integers with a scale for each output; scaling those is less than
    scaling it.
    As a product of matrices, for in the gradient of one with more axes XLA's CPU compiler transposes the cotangents.
    """
    if isinstance(leaf, Adapted):
        return project(x, leaf.base, axes) + project(leaf.scale * project(x, leaf.a, axes), leaf.b)
    matrix, scale = (leaf.qvalue, leaf.scale) if hasattr(leaf, "qvalue") else (leaf, None)
    inputs, outputs = math.prod(matrix.shape[:axes]), matrix.shape[axes:]
    out = jnp.matmul(x.reshape(-1, inputs), matrix.astype(x.dtype).reshape(inputs, -1))
    if scale is not None:
        out = out * jnp.broadcast_to(scale.astype(x.dtype).reshape(1, -1), out.shape)
    return out.reshape(*x.shape[: x.ndim - axes], *outputs)


@jax.custom_vjp
def _turned(matrix: jax.Array) -> jax.Array:
    return matrix


def _turned_bwd(_: None, grad: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.optimization_barrier(grad.T).T,)  # or XLA turns the product back


_turned.defvjp(lambda matrix: (matrix, None), _turned_bwd)


def scattered(weight: jax.Array, dtype: Any) -> jax.Array:
    """A weight [in, outputs...] as it is multiplied with, whose gradient is made as [outputs, in] and then turned.

    Where the first axis is split over devices (the width, over fsdp), each keeps its part of a sum over them. XLA's
    compiler for TPUs makes a reduce-scatter of that where the axis is the last one, and else an all-reduce, of twice
    the bytes.
    """
    return _turned(weight.astype(dtype).reshape(weight.shape[0], -1)).reshape(weight.shape)


def _is_adapted(leaf: Any) -> bool:
    return isinstance(leaf, Adapted)


def bare(tree: PyTree) -> PyTree:
    """A tree without its adapters: those of a policy's parameters are what they were before any training."""
    return jax.tree.map(lambda leaf: leaf.base if _is_adapted(leaf) else leaf, tree, is_leaf=_is_adapted)


def merged(tree: PyTree) -> PyTree:
    """A tree, not of stacks, whose adapters are added to their weights: W + s A B, in float32."""

    def sum_of(leaf):
        if not _is_adapted(leaf):
            return leaf
        rank = leaf.b.shape[0]
        # Once a rollout: not in the fewer bits that accelerators multiply float32 with.
        product = jnp.matmul(
            leaf.scale * leaf.a.reshape(-1, rank), leaf.b.reshape(rank, -1), precision=jax.lax.Precision.HIGHEST
        )
        return leaf.base.astype(jnp.float32) + product.reshape(leaf.base.shape)

    return jax.tree.map(sum_of, tree, is_leaf=_is_adapted)


def quantized(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer whose matrices are 8-bit integers with a scale for each output."""
    import qwix  # an extra

    return layer | {
        name: qwix.quantize(layer[name], "int8", channelwise_axes=range(axes, layer[name].ndim))
        for name, axes in MATRICES.items()
    }


def quantized_axes(layer: dict[str, Any], axes: dict[str, Any]) -> dict[str, Any]:
    """Logical axes of `quantized`, of which `layer` has the shapes."""
    of = lambda name: dataclasses.replace(
        layer[name],
        qvalue=axes[name],
        scale=(None,) * MATRICES[name] + axes[name][MATRICES[name] :],
    )
    return axes | {name: of(name) for name in MATRICES}

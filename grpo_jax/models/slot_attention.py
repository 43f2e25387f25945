"""What a token of a slot sees, for decoding: caches of keys and values, which are written in place and read in blocks.

    scores = cap * tanh(scale * query · key / cap), or scale * query · key without a cap
    output = sum over the visible columns of softmax(scores) * value

The prompt's cache is one for all slots of a row, and completions have their own, all in blocks; what is attended to in
each is joined as in flash attention (arXiv 2205.14135, algorithm 1). A block is read whole, by products that XLA makes;
on a GPU a kernel reads a slot's own, and of it the tiles in which something is visible.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from grpo_jax.models.attention import MASKED, capped
from grpo_jax.sharding import BATCH_AXES

__all__ = ["AttendBlock", "attend_slots", "cache_axes", "cache_shapes", "make_kernel"]

# (query [N, K, M, C], cache, visible [N, J, columns]) -> float32, not yet divided: the largest score and the sum of
# exponentials [N, K, M, 1], and what they mix [N, K, M, C]. No K where there is one head of keys.
AttendBlock: TypeAlias = Callable[[jax.Array, dict[str, jax.Array], jax.Array], tuple[jax.Array, jax.Array, jax.Array]]

_TILE = 64  # columns that are read together, at most
# Of the kernel, whose products have at least so many rows and columns; two tiles of keys and of values, of which one is
# on its way, take 64 KiB of the 99 that the processors of the smallest GPUs have.
_FEWEST_QUERIES = _SMALLEST_WIDTH = 16
_TILE_BYTES = 2**14


def cache_axes(platform: str, kv_heads: int) -> dict[str, tuple[str | None, ...]]:
    """What a layer's cache holds, as logical axes: key [N, K, C, columns], and value or, on a TPU, value turned.

    N = R * W slots, or the R rows that share it. No axis of a single head: XLA drops an axis of one between what writes
    and what reads, and on a CPU then copies the cache for either. Processors without matrix units are fast where no
    product contracts what is contiguous in both of its factors. A TPU lays the last axis out in lines of 128, which
    columns fill and heads often do not.
    """
    heads = ("kv_heads",) if kv_heads > 1 else ()
    turned: tuple[str | None, ...] = ("batch", *heads, "head", None)
    values = {"turned": turned} if platform == "tpu" else {"value": ("batch", *heads, None, "head")}
    return {"key": turned, **values}


def cache_shapes(
    axes: dict[str, tuple[str | None, ...]], *, slots: int, kv_heads: int, head_width: int, columns: int, tiled: bool,
    whole_tiles: bool = False,
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """Shapes of a layer's cache by `cache_axes`, of N slots.

    `tiled`: keys are [N, tiles * K, C, columns / tiles], all heads of the first columns first. A CPU reads such a tile
    in one go, and [C, columns] in lines that are far apart: 0.17 and not 0.38 ms for 4 MB. Only for several heads.
    `whole_tiles`: a few columns more, so that the kernel's tiles divide them.
    """
    columns = -(-columns // _TILE) * _TILE if whole_tiles else columns
    sizes = {"batch": slots, "kv_heads": kv_heads, "head": head_width, None: columns}
    shapes = {name: tuple(sizes[axis] for axis in of) for name, of in axes.items()}
    if tiled and kv_heads > 1:
        tiles = -(-columns // _TILE)
        shapes["key"] = (slots, tiles * kv_heads, head_width, -(-columns // tiles))
    return shapes


def _of_all_columns(visible: jax.Array, columns: int) -> jax.Array:
    """[..., columns]: nothing is visible of those that a cache has more."""
    return jnp.pad(visible, [(0, 0)] * (visible.ndim - 1) + [(0, columns - visible.shape[-1])])


def _tiles(key: jax.Array, heads: tuple[int, ...]) -> int:
    return key.shape[1] // heads[0] if heads else 1


def _untiled(x: jax.Array, tiles: int) -> jax.Array:
    """[N, tiles * K, M, columns / tiles] -> [N, K, M, columns]."""
    if tiles == 1:
        return x
    x = jnp.moveaxis(x.reshape(len(x), tiles, -1, *x.shape[2:]), 1, 3)
    return x.reshape(*x.shape[:3], -1)


def _tiled(x: jax.Array, tiles: int) -> jax.Array:
    """The inverse of `_untiled`."""
    if tiles == 1:
        return x
    x = jnp.moveaxis(x.reshape(*x.shape[:3], tiles, -1), 3, 1)
    return x.reshape(len(x), -1, *x.shape[3:])


def attend_slots(query, key, value, cache, column, visible, before, *, scale, soft_cap, kernel=None):
    """Writes key/value into `cache` at `column`, then attends to it and to the caches `before`, which are only read.

    query [R, W, J, H, C], key/value [R, W, J, K, C], cache as in `cache_axes`, visible [R, W, J, columns]; each of
    `before`: a cache, what of it is visible, [R, W, J, columns], and whether anything is, [] bool: where it says no, it
    is not read; None: yes. A cache of R rows, as of their prompts, is read by all slots of a row: their queries are the
    rows of one product, and nothing is copied. `kernel`: of `make_kernel`.

    Returns:
      What was mixed, like the query, and the cache.
    """
    r, w, j, _, c = query.shape
    kv_heads, dtype = key.shape[3], cache["key"].dtype
    heads = (kv_heads,) if kv_heads > 1 else ()

    def write(name, new, *order):
        """New columns [R, W, J, K, C] in the order of the cache's axes, at their place."""
        new = new.transpose(order).reshape(r * w, *heads, *(new.shape[i] for i in order[3:])).astype(dtype)
        tiles = _tiles(cache[name], heads) if name == "key" else 1
        if tiles > 1 and j == 1:
            tile, offset = jnp.divmod(column, cache[name].shape[-1])
            return jax.lax.dynamic_update_slice(cache[name], new, (0, tile * kv_heads, 0, offset))
        into = _untiled(cache[name], tiles)
        start = (0,) * (new.ndim - 2) + ((column, 0) if name == "value" else (0, column))
        return _tiled(jax.lax.dynamic_update_slice(into, new, start), tiles)

    written = {"key": write("key", key, 0, 1, 3, 4, 2)}
    if "value" in cache:
        written["value"] = write("value", value, 0, 1, 3, 2, 4)
    else:
        written["turned"] = write("turned", value, 0, 1, 3, 4, 2)
    # [N, K, M, C] of M = J * H / K queries that read the same keys.
    grouped = query.reshape(r, w, j, kv_heads, -1, c).transpose(0, 1, 3, 2, 4, 5).reshape(r * w, *heads, -1, c)

    products = functools.partial(_attend_block, scale=scale, soft_cap=soft_cap)

    def read(cache, visible):
        if len(cache["key"]) == r * w:
            attend = kernel if kernel and j == 1 else products
            return attend(grouped, cache, visible.reshape(r * w, j, -1))
        together = lambda x: jnp.moveaxis(x.reshape(r, w, *x.shape[1:]), 1, -3).reshape(r, *heads, -1, x.shape[-1])
        apart = lambda x: jnp.moveaxis(x.reshape(r, *heads, w, -1, x.shape[-1]), -3, 1).reshape(
            r * w, *heads, -1, x.shape[-1]
        )
        return map(apart, products(together(grouped), cache, visible.reshape(r, w * j, -1)))

    def join(cache, visible, most, total, mixed):
        block_most, block_total, block_mixed = read(cache, visible)
        largest = jnp.maximum(most, block_most)
        ours, theirs = jnp.exp(most - largest), jnp.exp(block_most - largest)
        return largest, ours * total + theirs * block_total, ours * mixed + theirs * block_mixed

    most, total, mixed = read(written, visible)
    for *block, live in before:
        add = functools.partial(join, *block)
        joined = (most, total, mixed)
        most, total, mixed = add(*joined) if live is None else jax.lax.cond(live, add, lambda *same: same, *joined)
    # Finite also for a slot that sees nothing, in whose cache a NaN would stay; others have a total of at least exp(0).
    mixed = (mixed / jnp.maximum(total, 1)).astype(query.dtype)
    mixed = mixed.reshape(r, w, kv_heads, j, -1, c).transpose(0, 1, 3, 2, 4, 5)
    return mixed.reshape(query.shape), written


def _attend_block(query, cache, visible, *, scale, soft_cap):
    """An `AttendBlock` of plain products; query head m sees what `visible` says of m // (M / J)."""
    values = cache["value"] if "value" in cache else cache["turned"].swapaxes(-1, -2)
    visible = _of_all_columns(visible, values.shape[-2])
    tiles = _tiles(cache["key"], query.shape[1:-2])
    query_of_tiles = query if tiles == 1 else jnp.tile(query, (1, tiles, 1, 1))
    scores = jnp.einsum("...mc,...ct->...mt", query_of_tiles, cache["key"], preferred_element_type=jnp.float32)
    scores = _untiled(scores, tiles)[..., : visible.shape[-1]]
    scores = capped(scores * scale, soft_cap)
    seen = jnp.repeat(visible, query.shape[-2] // visible.shape[-2], axis=-2)
    seen = jnp.expand_dims(seen, range(1, query.ndim - 2))
    scores = jnp.where(seen, scores, MASKED)
    most = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - most)
    mixed = jnp.einsum("...mt,...tc->...mc", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return most, weights.sum(axis=-1, keepdims=True), mixed


# The kernel -----------------------------------------------------------------------------------------


def _has_triton(device: Any) -> bool:
    """XLA compiles what Pallas makes for NVIDIA's GPUs since Ampere, and refuses it for those before."""
    capability = str(getattr(device, "compute_capability", "")).partition(".")[0]
    return device.platform == "gpu" and capability.isdigit() and int(capability) >= 8


def make_kernel(
    device: Any, *, kv_heads: int, head_width: int, scale: float, soft_cap: float, mesh: Mesh | None
) -> AttendBlock | None:
    """An `AttendBlock` that reads, of every slot, the tiles in which something is visible, once; None: not here.

    For caches of one slot each on GPUs, where the width of a head is a power of two. What XLA makes of the same reads
    all columns, and writes scores that the softmax reads twice. Of a cache that slots share there is one product of all
    their queries, which XLA splits over more of the chip than there are rows.

    Args:
      device: a `jax.Device`, one of those it runs on.
      kv_heads: K.
      head_width: C.
      scale: multiplies the scores.
      soft_cap: of the scores; 0 = none.
      mesh: over which slots and heads lie: a device attends to its own; None: one device.
    """
    if not _has_triton(device) or head_width < _SMALLEST_WIDTH or head_width & (head_width - 1):
        return None
    attend = functools.partial(_attend_tiles, scale=scale, soft_cap=soft_cap)
    if mesh is None or mesh.size == 1:
        return attend
    heads = ("tensor",) if kv_heads > 1 and kv_heads % mesh.shape["tensor"] == 0 else (None,) * (kv_heads > 1)
    split, rows = P(BATCH_AXES, *heads), P(BATCH_AXES)
    return jax.shard_map(attend, mesh=mesh, in_specs=(split, split, rows), out_specs=split, check_vma=False)


def _attend_tiles(query, cache, visible, *, scale, soft_cap, interpret=False):
    """An `AttendBlock` of slots of their own, visible [N, 1, columns]: a program for every slot and head of keys."""
    if one_head := query.ndim == 3:
        query, cache = jax.tree.map(lambda x: x[:, None], (query, cache))
    key, value = cache["key"], cache["value"]
    (n, kv_heads, m, c), columns = query.shape, key.shape[-1]
    visible = _of_all_columns(visible, columns)[:, 0]
    tile = max(16, min(_TILE, _TILE_BYTES // (c * key.dtype.itemsize)))
    tiles = columns // tile
    # Tiles in which a slot sees something come first, in their order.
    rank = jnp.cumsum(visible.reshape(n, tiles, tile).any(axis=-1), axis=-1, dtype=jnp.int32)
    order = jnp.argmax(rank[:, None] > jnp.arange(tiles)[None, :, None], axis=-1).astype(jnp.int32)
    queries = max(_FEWEST_QUERIES, 1 << (m - 1).bit_length())
    of_slot = lambda *shape: pl.BlockSpec((None, *shape), lambda i, k: (i, *(0,) * len(shape)))
    of_head = lambda *shape: pl.BlockSpec((None, None, *shape), lambda i, k: (i, k, *(0,) * len(shape)))
    like = lambda *shape: jax.ShapeDtypeStruct((n, kv_heads, m, *shape), jnp.float32)
    most, total, mixed = pl.pallas_call(
        functools.partial(_tiles_kernel, count=m, tile=tile, scale=scale, soft_cap=soft_cap),
        grid=(n, kv_heads),
        in_specs=[
            of_slot(tiles), of_slot(), of_slot(columns), of_head(queries, c), of_head(c, columns), of_head(columns, c),
        ],
        out_specs=[of_head(queries), of_head(queries), of_head(queries, c)],
        out_shape=[like(), like(), like(c)],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="attend_tiles",
    )(order, rank[:, -1], visible.astype(jnp.int8), query, key, value)  # fmt: skip
    results = most[..., None], total[..., None], mixed
    return tuple(x[:, 0] for x in results) if one_head else results


def _tiles_kernel(
    order, filled, seen, query, key, value, *results, count: int, tile: int, scale: float, soft_cap: float
):
    """order [tiles], filled [], seen [columns], query [M, C], of which `count` are real, key [C, columns], value."""
    queries = query.shape[0]
    real = jnp.arange(queries) < count
    q = triton.load(query.at[:, :], mask=real[:, None], other=0)

    def read(i, carry):
        most, total, mixed = carry
        columns = pl.ds(order[i] * tile, tile)
        scores = capped(triton.dot(q, key[:, columns]) * scale, soft_cap)
        scores = jnp.where((seen[columns] != 0)[None], scores, MASKED)
        largest = jnp.maximum(most, scores.max(axis=1))
        weights, fade = jnp.exp(scores - largest[:, None]), jnp.exp(most - largest)
        values = value[columns, :]
        return (
            largest,
            fade * total + weights.sum(axis=1),
            fade[:, None] * mixed + triton.dot(weights.astype(values.dtype), values),
        )

    nothing = jnp.full(queries, MASKED), jnp.zeros(queries), jnp.zeros(query.shape)
    for ref, result in zip(results, jax.lax.fori_loop(0, filled[()], read, nothing), strict=True):
        mask = real if result.ndim == 1 else real[:, None]
        triton.store(ref.at[(slice(None),) * result.ndim], result, mask=mask)

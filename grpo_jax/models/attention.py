"""What a token of a row sees, for the training pass: XLA everywhere, cuDNN on NVIDIA GPUs, splash on TPUs.

    scores = cap * tanh(scale * query · key / cap), or scale * query · key without a cap
    output = sum over the visible keys of softmax(scores) * value

A query sees the keys of its own segment at positions in (p - window, p]. Nothing holds [S, S] scores: the fused kernels
none, XLA those of a block of queries. Rows are contiguous: later columns of a segment have later positions.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from grpo_jax.sharding import warn_once

__all__ = ["MASKED", "Attend", "capped", "make_attention", "queries_at_a_time"]

# (query [R, S, H, C], key [R, S, K, C], value [R, S, K, C], positions [R, S], segments [R, S]) -> [R, S, H, C]
Attend: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

MASKED = -1e30  # a score; finite, so that who sees no key gets numbers and not NaN
_LANES = 128  # of a TPU's vector register: blocks of splash attention are multiples of it
# 512 x 512 float32 scores are 1 MiB of the 16 MiB of scoped VMEM, so that they, their gradients and blocks of heads
# as wide as 256 fit on every TPU; smaller blocks spend their time between blocks.
_LARGEST_BLOCK = 512
# Of XLA's attention: blocks save at most half, of which 8 leave an eighth; each is compiled.
_MOST_BLOCKS, _SMALLEST_BLOCK = 8, 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Spec:
    """What a row of attention computes; see `make_attention`."""

    heads: int  # H
    kv_heads: int  # K
    head_width: int  # C
    scale: float
    soft_cap: float  # 0 = none
    window: int  # 0 = all

    def __post_init__(self) -> None:
        if min(self.heads, self.kv_heads, self.head_width) < 1:
            raise ValueError(f"{self}: heads, kv_heads and head_width must be 1 or more.")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}.")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale={self.scale} must be finite and above 0; head_width**-0.5 is usual.")
        if not (math.isfinite(self.soft_cap) and self.soft_cap >= 0):
            raise ValueError(f"soft_cap={self.soft_cap} must be finite and above 0, or 0 for none.")
        if self.window < 0:
            raise ValueError(f"window={self.window} must be 1 or more, or 0 to see all.")


def capped(scores: jax.Array, cap: float) -> jax.Array:
    """Scores within (-cap, cap), and close to what they were where they are small; 0: as they are."""
    return cap * jnp.tanh(scores / cap) if cap else scores


def queries_at_a_time(columns: int) -> int:
    """Of a row of so many columns, whose scores XLA's attention holds."""
    return -(-columns // min(_MOST_BLOCKS, -(-columns // _SMALLEST_BLOCK)))


def _xla(spec: _Spec, mesh: Mesh | None) -> Attend:
    """Plain products; XLA splits them over any mesh by itself. Holds float32 scores of a few queries at a time.

    Queries come in blocks, each with the columns up to its end: half the work, for what is behind is masked anyway. Of
    a block the backward pass keeps nothing, and computes the scores again.
    """
    del mesh

    # Cut inside, for what all blocks are cut from is kept once.
    @functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(0, 1, 2))
    def of_block(before, first, end, query, key, value, positions, segments):
        query, key, value = query[:, first:end], key[:, before:end], value[:, before:end]
        distance = positions[:, first:end, None] - positions[:, None, before:end]
        key_segments = segments[:, None, before:end]
        visible = (segments[:, first:end, None] == key_segments) & (distance >= 0) & (key_segments > 0)
        if spec.window:
            visible &= distance < spec.window
        r, s, _, c = query.shape
        grouped = query.reshape(r, s, key.shape[2], -1, c)
        scores = jnp.einsum("rskgc,rtkc->rkgst", grouped, key, preferred_element_type=jnp.float32) * spec.scale
        scores = capped(scores, spec.soft_cap)
        weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, MASKED), axis=-1).astype(value.dtype)
        return jnp.einsum("rkgst,rtkc->rskgc", weights, value).reshape(query.shape)

    def attend(*arrays):
        columns = arrays[0].shape[1]
        size = queries_at_a_time(columns)
        blocks = [(first, min(first + size, columns)) for first in range(0, columns, size)]
        before = lambda first: max(0, first - spec.window + 1) if spec.window else 0
        return jnp.concatenate([of_block(before(first), first, end, *arrays) for first, end in blocks], axis=1)

    return attend


def _cudnn(spec: _Spec, mesh: Mesh | None) -> Attend:
    """cuDNN's fused attention: causal, one segment a row, half precision."""
    if spec.soft_cap:
        raise ValueError(
            f"attention 'cudnn' cannot cap scores (soft_cap={spec.soft_cap}): cuDNN's kernel has no place between "
            "the product and the softmax. Choose 'xla', or 'splash' on a TPU."
        )
    if spec.head_width % 8 or spec.head_width > 256:
        raise ValueError(
            f"attention 'cudnn' needs a head_width that is a multiple of 8 and at most 256, not {spec.head_width}. "
            "Choose 'xla'."
        )

    def attend(query, key, value, positions, segments):
        del positions
        if query.dtype not in (jnp.bfloat16, jnp.float16):
            raise ValueError(
                f"attention 'cudnn' computes in bfloat16 or float16, not {query.dtype}: cuDNN has no fused kernel for "
                "wider types. Choose compute_dtype='bfloat16', or attention 'xla'."
            )
        # Rows are right padded, so causality alone keeps padding from every real query; what padded queries return
        # is never read. Lengths would save some blocks, and bring the kernel's special case of an empty row.
        mixed = jax.nn.dot_product_attention(
            query, key, value, scale=spec.scale, is_causal=True, implementation="cudnn",
            local_window_size=(spec.window - 1, 0) if spec.window else None,
        )  # fmt: skip
        if not isinstance(segments, Tracer) and (segments > 1).any():
            raise ValueError(
                "attention 'cudnn' cannot tell several segments of a row apart: its kernel is causal over whole rows. "
                "Give it one segment a row, or choose 'xla', or 'splash' on a TPU."
            )
        # A factor, not a `where`: the gradients of a row that mixed its segments must be NaN too.
        several = (segments > 1).any(axis=1)
        return mixed * jnp.where(several, jnp.nan, 1).astype(mixed.dtype)[:, None, None, None]

    return _over_mesh(attend, spec, mesh)


def _splash(spec: _Spec, mesh: Mesh | None) -> Attend:
    """Splash attention: blocks that the causal or local mask empties are skipped, segments are masked.

    The kernel has no scale, so the query is scaled, in float32, and rounded to its own dtype again.
    """

    def attend(query, key, value, positions, segments):
        del positions
        columns = query.shape[1]
        blocks = -(-columns // _LARGEST_BLOCK)
        block = -(-columns // (blocks * _LANES)) * _LANES  # as few and as equal blocks as hold the row
        padding = blocks * block - columns
        kernel = _splash_kernel(spec, query.shape[2], columns + padding, block)
        heads_first = lambda x: jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))
        # Padding is segment 0 and sees itself, so that no query is without a key.
        ids = jnp.pad(segments.astype(jnp.int32), ((0, 0), (0, padding)))
        scaled = (query.astype(jnp.float32) * spec.scale).astype(query.dtype)
        mixed = jax.vmap(kernel)(
            heads_first(scaled), heads_first(key), heads_first(value), splash.SegmentIds(q=ids, kv=ids)
        )
        return mixed.swapaxes(1, 2)[:, :columns]

    return _over_mesh(attend, spec, mesh)


def _splash_kernel(spec: _Spec, heads: int, columns: int, block: int) -> Callable[..., Any]:
    """The kernel of one row, [H, S, C]; built while tracing, because its tables of blocks depend on S."""
    shape = (columns, columns)
    one = splash_mask.LocalMask(shape, (spec.window - 1, 0), 0) if spec.window else splash_mask.CausalMask(shape)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    return splash.make_splash_mha(
        splash_mask.MultiHeadMask([one] * heads),
        block_sizes=splash.BlockSizes(**dict.fromkeys(names, block)),
        attn_logits_soft_cap=spec.soft_cap or None,
        head_shards=1,
        q_seq_shards=1,
    )


def _over_mesh(attend: Attend, spec: _Spec, mesh: Mesh | None) -> Attend:
    """Runs a kernel, which XLA cannot split, on each device's own rows and heads.

    Rows are split over fsdp here and over data by the train step's `vmap(..., spmd_axis_name="data")`; outside of
    such a vmap every data shard computes all rows.
    """
    if mesh is None:
        return attend
    parts = mesh.shape["tensor"]
    divides = spec.heads % parts == 0 and spec.kv_heads % parts == 0
    if not divides:
        warn_once(
            f"attention: heads={spec.heads} and kv_heads={spec.kv_heads} do not both divide over tensor={parts}: each "
            "tensor shard computes all."
        )
    heads, rows = P("fsdp", None, "tensor" if divides else None, None), P("fsdp", None)
    # Kernels do not say over which axes their outputs vary, so that jax cannot check it.
    return jax.shard_map(attend, mesh=mesh, in_specs=(heads,) * 3 + (rows,) * 2, out_specs=heads, check_vma=False)


_IMPLEMENTATIONS: dict[str, Callable[[_Spec, Mesh | None], Attend]] = {"xla": _xla, "cudnn": _cudnn, "splash": _splash}


def make_attention(
    implementation: str,
    *,
    heads: int,
    kv_heads: int,
    head_width: int,
    scale: float,
    soft_cap: float = 0.0,
    window: int = 0,
    mesh: Mesh | None = None,
) -> Attend:
    """Chooses how rows attend: causal within a segment, softmax in float32.

    Args:
      implementation: 'xla' (anywhere), 'cudnn' (NVIDIA GPUs) or 'splash' (TPUs).
      heads: H, query heads; query head h reads key/value head h // (H / K).
      kv_heads: K, key/value heads; divides H.
      head_width: C.
      scale: multiplies the scores.
      soft_cap: scores become soft_cap * tanh(scores / soft_cap) (Gemma 2, arXiv 2408.00118); 0 = as they are.
      window: a query sees this many positions, its own included; 0 = all.
      mesh: over which the kernels run, axes data, fsdp and tensor; None: on one device.

    Returns:
      attend(query [R, S, H, C], key [R, S, K, C], value [R, S, K, C], positions [R, S], segments [R, S]) ->
      [R, S, H, C] in the dtype of the query. Rows are contiguous and right padded, positions go up by one within a
      segment, segment 0 is padding, whose outputs mean nothing. 'cudnn' returns NaN for a row that holds a segment
      above 1, and raises ValueError for float32.

    Raises:
      ValueError: an unknown implementation, or something that it cannot do.
    """
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"attention {implementation!r} is unknown; choose one of {sorted(_IMPLEMENTATIONS)}.")
    spec = _Spec(heads=heads, kv_heads=kv_heads, head_width=head_width, scale=scale, soft_cap=soft_cap, window=window)
    chosen = _IMPLEMENTATIONS[implementation](spec, mesh)

    def attend(query, key, value, positions, segments):
        rows, columns = segments.shape
        chex.assert_shape(query, (rows, columns, heads, head_width))
        chex.assert_shape([key, value], (rows, columns, kv_heads, head_width))
        chex.assert_shape(positions, (rows, columns))
        return chosen(query, key, value, positions, segments)

    return attend

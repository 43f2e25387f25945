"""One decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, gated MLP.

Linen defines a block and its parameters; the functions of the `Policy` below run it. Parameters are a
plain tree: `{'embedding': [V, D], 'layers': {... leaves [N, ...]}, 'norm': [D]}`. Layers are stacked, so
that training scans over them, and `prepare` takes them apart for decoding, because indexing a stack
inside the decode loop makes XLA copy all of it at every token.
"""

import dataclasses
import functools
import operator
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from grpo_jax.types import Policy

__all__ = ["TransformerConfig", "init_params", "make_policy", "project"]

_MASKED = -1e30  # finite, so that a row without any key gives a uniform softmax and not NaN


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape and precision of the decoder."""

    vocab_size: int  # V, tokens there are
    layers: int = 4  # N, blocks
    width: int = 64  # D, of the residual stream
    heads: int = 4  # H, query heads
    kv_heads: int = 4  # K, key/value heads; divides `heads`
    head_width: int = 16  # C, of a head; even
    mlp_width: int = 192  # hidden units of a block
    rope_base: float = 10_000.0  # longest wavelength of the rotary positions, over 2 pi
    norm_epsilon: float = 1e-6  # added to the mean square in RMSNorm
    compute_dtype: str = "float32"  # of activations and products; parameters stay float32

    def __post_init__(self) -> None:
        sizes = (self.vocab_size, self.layers, self.width, self.heads, self.kv_heads, self.head_width, self.mlp_width)
        if min(sizes) < 1:
            raise ValueError(f"{self}: every size must be 1 or more.")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}.")
        if self.head_width % 2:
            raise ValueError(f"head_width={self.head_width} must be even: rotary positions turn pairs.")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"compute_dtype={self.compute_dtype!r} must be 'float32' or 'bfloat16'.")


def project(x: jax.Array, leaf: jax.Array, axes: int = 1) -> jax.Array:
    """Contracts the last `axes` axes of x with the first of a weight leaf, in x's dtype."""
    return jnp.tensordot(x, leaf.astype(x.dtype), axes=axes)


def _rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return (x32 * inverse * jnp.broadcast_to(scale, x.shape)).astype(x.dtype)


def _rotate(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotary positions (RoFormer, arXiv 2104.09864): x [..., heads, C], positions [...]."""
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.multiply.outer(positions[..., None].astype(jnp.float32), frequencies)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


class _Block(nn.Module):
    """One layer. `attend(query, key, value) -> (mixed, cache)` decides what a token sees."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x, positions, attend):
        c = self.config
        normal = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        small = nn.initializers.variance_scaling(1.0 / c.layers, "fan_in", "truncated_normal")

        def weight(name, shape, axes, init=normal, inputs=1) -> Any:
            # Linen's fan_in of a [D, H, C] kernel would be D*H; initialize it as the matrix it is.
            rows = functools.reduce(lambda a, b: a * b, shape[:inputs])
            matrix = lambda key: init(key, (rows, -(-_size(shape) // rows))).reshape(shape)
            return self.param(name, nn.with_partitioning(matrix, axes))

        def norm(name, x) -> jax.Array:
            ones = nn.with_partitioning(lambda key: jnp.ones(c.width), ("embed",))
            return _rms_norm(x, cast(jax.Array, self.param(name, ones)), c.norm_epsilon)

        heads, kv_heads = ("embed", "heads", "head"), ("embed", "kv_heads", "head")
        y = norm("attention_norm", x)
        query = project(y, weight("query", (c.width, c.heads, c.head_width), heads))
        key = project(y, weight("key", (c.width, c.kv_heads, c.head_width), kv_heads))
        value = project(y, weight("value", (c.width, c.kv_heads, c.head_width), kv_heads))
        mixed, cache = attend(_rotate(query, positions, c.rope_base), _rotate(key, positions, c.rope_base), value)
        output = weight("output", (c.heads, c.head_width, c.width), ("heads", "head", "embed"), small, 2)
        x = x + project(mixed, output, axes=2)

        y = norm("mlp_norm", x)
        gate = project(y, weight("gate", (c.width, c.mlp_width), ("embed", "mlp")))
        up = project(y, weight("up", (c.width, c.mlp_width), ("embed", "mlp")))
        x = x + project(nn.silu(gate) * up, weight("down", (c.mlp_width, c.width), ("mlp", "embed"), small))
        return x, cache


def _size(shape):
    return functools.reduce(lambda a, b: a * b, shape)


def _attend_row(query, key, value, visible):
    """Attention inside rows: query [R, S, H, C], key/value [R, S, K, C], visible [R, S, S] bool."""
    r, s, _, c = query.shape
    grouped = query.reshape(r, s, key.shape[2], -1, c)
    scores = jnp.einsum("rskgc,rtkc->rkgst", grouped, key, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores * c**-0.5, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("rkgst,rtkc->rskgc", weights, value).reshape(query.shape), None


def _attend_slots(query, key, value, cache, column, visible, prefix, prefix_visible):
    """Writes key/value at `column`, then attends to the slot's own columns and the row's prefix.

    query [R, W, J, H, C], key/value [R, W, J, K, C], cache leaves [R, W, columns, K, C], prefix leaves
    [R, 1, L, K, C], visible [R, W, J, columns], prefix_visible [R, W, J, L]. The prefix is read once for
    all W slots of a row: one product, no copy of it per slot; both score blocks share one softmax.
    """
    r, w, j, _, c = query.shape
    cache = {
        "key": jax.lax.dynamic_update_slice(cache["key"], key.astype(cache["key"].dtype), (0, 0, column, 0, 0)),
        "value": jax.lax.dynamic_update_slice(cache["value"], value.astype(cache["value"].dtype), (0, 0, column, 0, 0)),
    }
    grouped = query.reshape(r, w, j, key.shape[3], -1, c)
    scores = jnp.einsum("rwjkgc,rwtkc->rwkgjt", grouped, cache["key"], preferred_element_type=jnp.float32)
    masks = [visible]
    if prefix is not None:
        shared = jnp.einsum("rwjkgc,rlkc->rwkgjl", grouped, prefix["key"][:, 0], preferred_element_type=jnp.float32)
        scores, masks = jnp.concatenate([shared, scores], axis=-1), [prefix_visible, visible]
    mask = jnp.concatenate(masks, axis=-1)[:, :, None, None]
    weights = jax.nn.softmax(jnp.where(mask, scores * c**-0.5, _MASKED), axis=-1).astype(value.dtype)
    own = weights[..., -cache["key"].shape[2] :]
    mixed = jnp.einsum("rwkgjt,rwtkc->rwjkgc", own, cache["value"])
    if prefix is not None:
        length = prefix["value"].shape[2]
        mixed += jnp.einsum("rwkgjl,rlkc->rwjkgc", weights[..., :length], prefix["value"][:, 0])
    return mixed.reshape(query.shape), cache


def init_params(config: TransformerConfig, key: jax.Array) -> dict[str, Any]:
    """Random float32 parameters; the key is consumed. Unembedding is the embedding (tied)."""
    return nn.unbox(_init_boxed(config, key))


def _init_boxed(config: TransformerConfig, key: jax.Array) -> dict[str, Any]:
    embedding_key, layers_key = jax.random.split(key)
    block, x = _Block(config), jnp.zeros((1, 1, config.width))
    attend = lambda q, k, v: (q, None)
    init_layer = lambda key: block.init(key, x, jnp.zeros((1, 1), jnp.int32), attend)["params"]
    layers = jax.vmap(init_layer)(jax.random.split(layers_key, config.layers))
    add_layer_axis = lambda box: box.replace(names=("layers", *box.names))
    boxed = lambda x: isinstance(x, nn.Partitioned)
    embedding = jax.random.normal(embedding_key, (config.vocab_size, config.width)) * config.width**-0.5
    return {
        "embedding": nn.Partitioned(embedding, ("vocab", "embed")),
        "layers": jax.tree.map(add_layer_axis, layers, is_leaf=boxed),
        "norm": nn.Partitioned(jnp.ones(config.width), ("embed",)),
    }


def make_policy(config: TransformerConfig) -> Policy:
    """The decoder as a `Policy`: build it once, since jit caches by its identity."""
    block, dtype = _Block(config), jnp.dtype(config.compute_dtype)
    boxes = jax.eval_shape(lambda: _init_boxed(config, jax.random.key(0)))
    param_axes = jax.tree.map(lambda box: box.names, boxes, is_leaf=lambda x: isinstance(x, nn.Partitioned))

    def embed(params, tokens):
        # The embedding has rows of norm 1 (so that tied logits start small); activations start at variance 1.
        return params["embedding"][tokens].astype(dtype) * dtype.type(config.width**0.5)

    def hidden(params, tokens, positions, segments):
        same = segments[:, :, None] == segments[:, None, :]
        visible = same & (positions[:, :, None] >= positions[:, None, :]) & (segments[:, None, :] > 0)
        attend = functools.partial(_attend_row, visible=visible)

        def layer(x, layer_params):
            return block.apply({"params": layer_params}, x, positions, attend)

        x, _ = jax.lax.scan(layer, embed(params, tokens), params["layers"])
        return _rms_norm(x, params["norm"], config.norm_epsilon), {}

    def head(params):
        return params["embedding"].T, None, None

    def prepare(params):
        layers = [jax.tree.map(operator.itemgetter(i), params["layers"]) for i in range(config.layers)]
        # The scales of norms stay float32, as the trainer uses them.
        return jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, {**params, "layers": layers})

    def init_cache(rows, width, columns):
        shape = (rows, width, columns, config.kv_heads, config.head_width)
        return [{"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)} for _ in range(config.layers)]

    def extend(params, tokens, positions, cache, column, key_positions, prefix=None, prefix_positions=None):
        def sees(keys):  # [R, W or 1, columns] -> [R, W, J, columns]
            return (keys[:, :, None, :] >= 0) & (keys[:, :, None, :] <= positions[..., None])

        visible = sees(key_positions)
        prefix_visible = None if prefix is None else sees(prefix_positions)
        x, new_cache = embed(params, tokens), []
        for i, layer_params in enumerate(params["layers"]):
            attend = functools.partial(
                _attend_slots, cache=cache[i], column=column, visible=visible,
                prefix=None if prefix is None else prefix[i], prefix_visible=prefix_visible,
            )  # fmt: skip
            x, layer_cache = block.apply({"params": layer_params}, x, positions, attend)
            new_cache.append(layer_cache)
        return _rms_norm(x, params["norm"], config.norm_epsilon), new_cache

    layer_axes = jax.tree.map(lambda axes: axes[1:], param_axes["layers"], is_leaf=lambda x: isinstance(x, tuple))
    leaf_axes = ("batch", None, None, "kv_heads", "head")
    return Policy(
        hidden=hidden,
        head=head,
        prepare=prepare,
        init_cache=init_cache,
        extend=extend,
        param_axes=param_axes,
        sampler_axes={**param_axes, "layers": [layer_axes] * config.layers},
        cache_axes=[{"key": leaf_axes, "value": leaf_axes}] * config.layers,
    )

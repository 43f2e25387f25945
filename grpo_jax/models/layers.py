"""What the decoder is made of: RMSNorm, rotary positions, a block in Flax Linen, and the tree of its parameters."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from grpo_jax.models.config import ACTIVATIONS, TransformerConfig
from grpo_jax.models.leaves import project, scattered

__all__ = ["Block", "abstract_params", "embed", "init_params", "rms_norm", "rope_frequencies"]


def rms_norm(x: jax.Array, scale: jax.Array, config: TransformerConfig) -> jax.Array:
    """x / sqrt(mean(x^2) + epsilon) * scale, over the last axis (arXiv 1910.07467, equation 4), in float32."""
    x32, scale = x.astype(jnp.float32), scale.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + config.norm_epsilon)
    scale = 1 + scale if config.unit_offset else scale
    return (x32 * inverse * jnp.broadcast_to(scale, x.shape)).astype(x.dtype)


def rope_frequencies(config: TransformerConfig, window: int) -> jax.Array:
    """[C / 2] radians a position: base ** (-2i / C), stretched for long contexts (Llama 3, arXiv 2407.21783, 3.4)."""
    half = config.head_width // 2
    local = window and config.window_rope_base
    frequencies = (config.window_rope_base if local else config.rope_base) ** (
        -jnp.arange(half, dtype=jnp.float32) / half
    )
    if local or config.rope_factor == 1:
        return frequencies
    if not config.rope_low_factor:
        return frequencies / config.rope_factor
    low, high = config.rope_low_factor, config.rope_high_factor
    turns = config.rope_length * frequencies / (2 * math.pi)  # within the old context
    keep = jnp.clip((turns - low) / (high - low), 0, 1)  # 1: a short wavelength, which stays
    return frequencies * (keep + (1 - keep) / config.rope_factor)


def _rotate(x: jax.Array, positions: jax.Array, frequencies: jax.Array) -> jax.Array:
    """Rotary positions (RoFormer, arXiv 2104.09864): x [..., heads, C], positions [...]."""
    angles = jnp.multiply.outer(positions[..., None].astype(jnp.float32), frequencies)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def embed(params: dict[str, Any], tokens: jax.Array, config: TransformerConfig, dtype: DTypeLike) -> jax.Array:
    """Tokens [...] -> [..., D] of `dtype`."""
    x = params["embedding"][tokens].astype(dtype)
    # Small models of our own have embeddings of norm 1 (so that tied logits start small), as Gemma does.
    return x * x.dtype.type(config.width**0.5) if config.scale_embedding else x


class Block(nn.Module):
    """One layer. `attend(query, key, value) -> (mixed, cache)` decides what a token sees."""

    config: TransformerConfig
    trains: bool = False  # a backward pass comes to it
    scatters: bool = False  # gradients of the matrices behind a norm are made as `scattered` says

    @nn.compact
    def __call__(self, x, positions, frequencies, attend):
        """x [..., D] at positions [...] -> what it becomes, and what `attend` gave beside it."""
        c = self.config
        normal = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        small = nn.initializers.variance_scaling(1.0 / c.layers, "fan_in", "truncated_normal")
        # The backward pass keeps what goes into norms, gates and matrices: what is elementwise costs less again than to
        # be stored and read, in float32 for each step of a norm, and a matrix lies there already, before it was cast.
        # (XLA may keep it yet where no loop over layers is between both passes. With "dots" and "full", see `hidden`.)
        as_it_is = lambda function: function
        again = functools.partial(jax.checkpoint, prevent_cse=False) if self.trains else as_it_is
        kept = again if c.remat == "none" else as_it_is

        def weight(name, shape, axes, init=normal, inputs=1) -> Any:
            # Linen's fan_in of a [D, H, C] kernel would be D*H; initialize it as the matrix it is.
            rows = math.prod(shape[:inputs])
            matrix = lambda key: init(key, (rows, math.prod(shape) // rows)).reshape(shape)
            return self.param(name, nn.with_partitioning(matrix, axes))

        def norm_scale(name, width=c.width, axis="embed") -> Any:
            return self.param(name, nn.with_partitioning(lambda key: jnp.full(width, 1.0 - c.unit_offset), (axis,)))

        normed = kept(lambda x, scale: rms_norm(x, scale, c))

        @kept
        def products(x, scale, matrices) -> list[jax.Array]:
            turns = lambda matrix: self.scatters and isinstance(matrix, jax.Array)
            y = rms_norm(x, scale, c)
            return [project(y, scattered(matrix, y.dtype) if turns(matrix) else matrix) for matrix in matrices]

        def into_heads(name, count) -> tuple[Any, Any, Any]:
            axis = "heads" if name == "query" else "kv_heads"
            matrix = weight(name, (c.width, count, c.head_width), ("embed", axis, "head"))
            zeros = nn.with_partitioning(lambda key: jnp.zeros((count, c.head_width)), (axis, "head"))
            bias = self.param(f"{name}_bias", zeros) if c.qkv_bias else None
            has_norm = c.qk_norm and name != "value"
            return matrix, bias, norm_scale(f"{name}_norm", c.head_width, "head") if has_norm else None

        def of_heads(name, out, bias, scale) -> jax.Array:
            if bias is not None:
                out = out + jnp.broadcast_to(bias.astype(out.dtype), out.shape)
            out = out if scale is None else normed(out, scale)
            return out if name == "value" else _rotate(out, positions, frequencies)

        attention_norm = norm_scale("attention_norm")
        heads = {"query": c.heads, "key": c.kv_heads, "value": c.kv_heads}
        matrices, biases, scales = zip(*(into_heads(*of) for of in heads.items()), strict=True)
        made = products(x, attention_norm, matrices)
        mixed, cache = attend(*map(of_heads, heads, made, biases, scales))
        output = weight("output", (c.heads, c.head_width, c.width), ("heads", "head", "embed"), small, 2)
        y = kept(functools.partial(project, axes=2))(mixed, output)
        x = x + (normed(y, norm_scale("attention_post_norm")) if c.post_norms else y)

        mlp_norm = norm_scale("mlp_norm")
        gate, up = products(
            x, mlp_norm, [weight(name, (c.width, c.mlp_width), ("embed", "mlp")) for name in ("gate", "up")]
        )
        down = weight("down", (c.mlp_width, c.width), ("mlp", "embed"), small)
        y = again(lambda gate, up, down: project(ACTIVATIONS[c.activation](gate) * up, down))(gate, up, down)
        return x + (normed(y, norm_scale("mlp_post_norm")) if c.post_norms else y), cache


def init_params(config: TransformerConfig, key: jax.Array) -> dict[str, Any]:
    """Random float32 parameters; the key is consumed."""
    return nn.unbox(_init_boxed(config, key))


def _is_box(x: Any) -> bool:
    return isinstance(x, nn.Partitioned)


def _init_boxed(config: TransformerConfig, key: jax.Array) -> dict[str, Any]:
    embedding_key, layers_key = jax.random.split(key)
    block, x = Block(config), jnp.zeros((1, 1, config.width))
    attend = lambda q, k, v: (q, None)
    frequencies = rope_frequencies(config, 0)
    init_layer = lambda key: block.init(key, x, jnp.zeros((1, 1), jnp.int32), frequencies, attend)["params"]
    layers = jax.vmap(init_layer)(jax.random.split(layers_key, config.layers))
    of = lambda function: jax.tree.map(function, layers, is_leaf=_is_box)
    places = len(config.pattern)
    whole = config.layers // places * places
    stack = lambda place: of(lambda box: box.replace(value=box.value[place:whole:places], names=("layers", *box.names)))
    embedding = jax.random.normal(embedding_key, (config.vocab_size, config.width)) * config.width**-0.5
    boxed = {
        "embedding": nn.Partitioned(embedding, ("vocab", "embed")),
        "layers": [stack(place) for place in range(places)],
        "norm": nn.Partitioned(jnp.full(config.width, 1.0 - config.unit_offset), ("embed",)),
    }
    if whole < config.layers:
        boxed["tail"] = [of(lambda box, i=i: box.replace(value=box.value[i])) for i in range(whole, config.layers)]
    if config.score:
        boxed["score"] = nn.Partitioned(jnp.zeros((1, config.width)), (None, "embed"))
    elif not config.tied:
        boxed["head"] = nn.Partitioned(embedding, ("vocab", "embed"))
    return boxed


def abstract_params(config: TransformerConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shapes of the parameters, as ShapeDtypeStructs, and the same tree of their logical axes."""
    boxes = jax.eval_shape(lambda: _init_boxed(config, jax.random.key(0)))
    return nn.unbox(boxes), jax.tree.map(lambda box: box.names, boxes, is_leaf=_is_box)

"""One decoder-only transformer for many families: Llama 3, Qwen 2 and 3, Gemma 2 and 3, and small ones of one's own.

RMSNorm, rotary positions, grouped-query attention, gated MLP; `TransformerConfig` says in what the families
differ, and `pretrained.py` reads it from a Hugging Face directory. Linen defines a block and its parameters;
the functions of the `Policy` below run it. Parameters are a plain tree,

    {'embedding': [V, D], 'norm': [D], 'head': [V, D] where untied, 'layers': [stack, ...], 'tail': [layer, ...]}

(a reward model has a `score` [1, D] in the head's place)
with a stack for each place in the pattern of windows, leaves [N // places, ...], so that training scans over
the pattern, and the layers that are left over in `tail`. `prepare` takes the stacks apart for decoding, because
indexing a stack inside the decode loop makes XLA copy all of it at every token. Matrices of layers may be more than
arrays: `leaves.py`.
"""

import dataclasses
import functools
import importlib.util
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax.models.attention import make_attention
from grpo_jax.models.leaves import merged, project, quantized, quantized_axes, scattered
from grpo_jax.models.slot_attention import attend_slots, cache_axes, cache_shapes, make_kernel
from grpo_jax.sharding import SAMPLER_RULES, shardings
from grpo_jax.types import Policy

__all__ = ["REMAT", "TransformerConfig", "abstract_params", "init_params", "make_policy"]

# What the backward pass finds of a layer, by name, as options of `jax.checkpoint`; the layer's input is kept always.
REMAT: dict[str, dict[str, Any] | None] = {
    "none": None,  # what products and attention gave: the most memory, and of these nothing is computed again
    # What products with weights gave: queries, keys, values, gate, up and what is added to the residual stream.
    # Attention is computed again too, which is little where sequences are short.
    "dots": {"policy": jax.checkpoint_policies.dots_with_no_batch_dims_saveable},
    "full": {},  # nothing: the least memory, and the forward pass is computed twice, a third more work
}
_ACTIVATIONS = {"silu": nn.silu, "gelu": functools.partial(nn.gelu, approximate=True)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape, family and precision of the decoder."""

    vocab_size: int  # V, tokens there are
    layers: int = 4  # N, blocks
    width: int = 64  # D, of the residual stream
    heads: int = 4  # H, query heads
    kv_heads: int = 4  # K, key/value heads; divides `heads`
    head_width: int = 16  # C, of a head; even
    mlp_width: int = 192  # hidden units of a block
    rope_base: float = 10_000.0  # longest wavelength of the rotary positions, over 2 pi
    norm_epsilon: float = 1e-6  # added to the mean square in RMSNorm
    compute_dtype: str = "float32"  # of activations and products; parameters stay as they are
    sampler_dtype: str = ""  # of the sampler: bfloat16, or int8 for its matrices alone (qwix); empty: compute_dtype
    attention: str = "xla"  # implementation of the training pass: xla, cudnn (GPU) or splash (TPU)
    remat: str = "none"  # none, dots or full: what of a layer the backward pass computes again, and so is not kept
    # In what families differ.
    tied: bool = True  # the unembedding is the embedding
    score: bool = False  # the head is one row, a score, in place of the vocabulary's: a reward model
    scale_embedding: bool = True  # embeddings are multiplied by sqrt(width)
    qkv_bias: bool = False  # queries, keys and values have biases
    qk_norm: bool = False  # queries and keys go through an RMSNorm per head, before the rotary positions
    post_norms: bool = False  # what attention and MLP add goes through an RMSNorm of its own
    unit_offset: bool = False  # RMSNorm multiplies by 1 + its scale
    activation: str = "silu"  # of the MLP's gate: silu, or gelu (its tanh approximation)
    query_scale: int = 0  # scores are divided by its square root; 0: head_width
    attention_cap: float = 0.0  # scores s become cap * tanh(s / cap); 0: off
    logit_cap: float = 0.0  # the same of the logits
    windows: tuple[int, ...] = (0,)  # how many tokens back each layer sees, itself included; repeats; 0: all
    window_rope_base: float = 0.0  # rope_base of the layers with a window, whose positions are not scaled; 0: as all
    rope_factor: float = 1.0  # wavelengths are stretched by this (position interpolation)
    rope_low_factor: float = 0.0  # Llama 3: only those above rope_length / this are stretched in full; 0: all are
    rope_high_factor: float = 0.0  # Llama 3: those below rope_length / this stay
    rope_length: int = 0  # Llama 3: context length before stretching

    def __post_init__(self) -> None:
        object.__setattr__(self, "windows", tuple(self.windows))  # JSON makes lists of them
        sizes = (self.vocab_size, self.layers, self.width, self.heads, self.kv_heads, self.head_width, self.mlp_width)
        if min(sizes) < 1:
            raise ValueError(f"{self}: every size must be 1 or more.")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}.")
        if self.head_width % 2:
            raise ValueError(f"head_width={self.head_width} must be even: rotary positions turn pairs.")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"compute_dtype={self.compute_dtype!r} must be 'float32' or 'bfloat16'.")
        if self.sampler_dtype not in ("", "float32", "bfloat16", "int8"):
            raise ValueError(f"sampler_dtype={self.sampler_dtype!r} must be 'float32', 'bfloat16', 'int8' or empty.")
        if self.sampler_dtype == "int8" and importlib.util.find_spec("qwix") is None:
            raise ValueError("sampler_dtype='int8' needs qwix: pip install -e '.[int8]'.")
        if self.remat not in REMAT:
            raise ValueError(
                f"remat={self.remat!r} must be 'none', 'dots' or 'full'; True was what is 'full' now, and False 'none'."
            )
        if self.activation not in _ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} must be one of {sorted(_ACTIVATIONS)}.")
        if not self.windows or min(self.windows) < 0:
            raise ValueError(f"windows={self.windows} must be numbers of tokens, 0 for all.")
        if self.rope_low_factor and not (self.rope_high_factor > self.rope_low_factor and self.rope_length):
            raise ValueError(
                f"rope_low_factor={self.rope_low_factor} needs rope_high_factor={self.rope_high_factor} above it "
                f"and rope_length={self.rope_length} above 0."
            )

    @property
    def decoding_dtype(self) -> str:
        """Of the sampler's products and caches; integers are matrices alone."""
        return self.compute_dtype if self.sampler_dtype in ("", "int8") else self.sampler_dtype

    @property
    def pattern(self) -> tuple[int, ...]:
        """The windows that the training pass scans over; no longer than the layers."""
        return self.windows[: self.layers]


def _rms_norm(x: jax.Array, scale: jax.Array, config: TransformerConfig) -> jax.Array:
    x32, scale = x.astype(jnp.float32), scale.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + config.norm_epsilon)
    scale = 1 + scale if config.unit_offset else scale
    return (x32 * inverse * jnp.broadcast_to(scale, x.shape)).astype(x.dtype)


def _frequencies(config: TransformerConfig, window: int) -> jax.Array:
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


class _Block(nn.Module):
    """One layer. `attend(query, key, value) -> (mixed, cache)` decides what a token sees."""

    config: TransformerConfig
    trains: bool = False  # a backward pass comes to it
    scatters: bool = False  # gradients of the matrices behind a norm are made as `scattered` says

    @nn.compact
    def __call__(self, x, positions, frequencies, attend):
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

        normed = kept(lambda x, scale: _rms_norm(x, scale, c))

        @kept
        def products(x, scale, matrices) -> list[jax.Array]:
            turns = lambda matrix: self.scatters and isinstance(matrix, jax.Array)
            y = _rms_norm(x, scale, c)
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
        y = again(lambda gate, up, down: project(_ACTIVATIONS[c.activation](gate) * up, down))(gate, up, down)
        return x + (normed(y, norm_scale("mlp_post_norm")) if c.post_norms else y), cache


def init_params(config: TransformerConfig, key: jax.Array) -> dict[str, Any]:
    """Random float32 parameters; the key is consumed."""
    return nn.unbox(_init_boxed(config, key))


def _is_box(x: Any) -> bool:
    return isinstance(x, nn.Partitioned)


def _init_boxed(config: TransformerConfig, key: jax.Array) -> dict[str, Any]:
    embedding_key, layers_key = jax.random.split(key)
    block, x = _Block(config), jnp.zeros((1, 1, config.width))
    attend = lambda q, k, v: (q, None)
    frequencies = _frequencies(config, 0)
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


def make_policy(config: TransformerConfig, mesh: Mesh | None = None) -> Policy:
    """The decoder as a `Policy`: build it once, since jit caches by its identity.

    Args:
      config: the model.
      mesh: where the training pass runs, with axes data, fsdp and tensor: splits activations over fsdp by rows, so
        that XLA gathers a layer's weights when it comes to it. Left alone, it splits activations along the width, as
        the weights are, and sums every product over fsdp, the logits too. Splash attention needs a mesh on more
        than one device.

    Raises:
      ValueError: the attention implementation cannot do what the model asks for.
    """
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    platform = device.platform
    layer_cache = cache_axes(platform, config.kv_heads)
    tiled = platform == "cpu" and (mesh is None or mesh.shape["tensor"] == 1)
    mesh = None if mesh is None or mesh.size == 1 else mesh  # on one device there is nothing to say
    # For libtpu; on CPUs it is tested. (Where data has one part, XLA multiplies and sums in rings, which a gradient
    # that is turned would keep it from.)
    scatters = mesh is not None and min(mesh.shape["data"], mesh.shape["fsdp"]) > 1 and platform != "gpu"
    block, trained = _Block(config), _Block(config, trains=True, scatters=scatters)
    dtype, sampler_dtype = jnp.dtype(config.compute_dtype), jnp.dtype(config.decoding_dtype)
    int8 = config.sampler_dtype == "int8"
    shapes, param_axes = abstract_params(config)
    scale, pattern = (config.query_scale or config.head_width) ** -0.5, config.pattern
    attention = {
        window: make_attention(
            config.attention, heads=config.heads, kv_heads=config.kv_heads, head_width=config.head_width, scale=scale,
            soft_cap=config.attention_cap, window=window, mesh=mesh,
        )
        for window in set(pattern)
    }  # fmt: skip
    windows = [pattern[i % len(pattern)] for i in range(config.layers)]
    kernel = make_kernel(
        device, kv_heads=config.kv_heads, head_width=config.head_width, scale=scale, soft_cap=config.attention_cap,
        mesh=mesh,
    )  # fmt: skip

    def split(x, *axes):
        """The array, split over these axes of the mesh; over data the train step's `vmap` splits it."""
        return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))

    def embed(params, tokens, dtype=dtype):
        x = params["embedding"][tokens].astype(dtype)
        # Small models of our own have embeddings of norm 1 (so that tied logits start small), as Gemma does.
        return x * dtype.type(config.width**0.5) if config.scale_embedding else x

    def final_norm(params, x):
        return _rms_norm(x, params["norm"], config)

    def hidden(params, tokens, positions, segments):
        def layer(window, x, layer_params):
            attend = lambda q, k, v: (attention[window](q, k, v, positions, segments), None)
            x, _ = trained.apply({"params": layer_params}, x, positions, _frequencies(config, window), attend)
            return split(x, "fsdp", None, None)

        options = REMAT[config.remat]
        again = layer if options is None else jax.checkpoint(layer, static_argnums=0, **options)
        layers = {w: functools.partial(again, w) for w in pattern}

        def body(x, stacks):
            for window, layer_params in zip(pattern, stacks, strict=True):
                x = layers[window](x, layer_params)
            return x, None

        # A device looks all rows up in its part of the table, split over fsdp by width, before they change places.
        # (Of a tied head `token_logprobs` wants parts by ids: looked up in those, rows would be sums over devices.)
        table = params["embedding"]
        if mesh is not None:
            table = jax.lax.with_sharding_constraint(table, shardings(table, param_axes["embedding"], mesh))
        x = split(embed({"embedding": table}, split(tokens, None, None)), None, None, "fsdp")
        x, _ = jax.lax.scan(body, split(x, "fsdp", None, None), params["layers"])
        for window, layer_params in zip(pattern, params.get("tail", ()), strict=False):
            x = layers[window](x, layer_params)
        return final_norm(params, x), {}

    def head(params):
        if config.score:
            return params["score"], None, None
        return params["embedding" if config.tied else "head"], None, config.logit_cap or None

    def take(stack, i):
        return jax.tree.map(lambda x: x[i], stack)

    def unstacked(layers, tail, take=take):
        return [take(layers[i % len(pattern)], i // len(pattern)) for i in range(config.layers - len(tail))] + tail

    def of_sampler(tree):
        """In the sampler's precision; scales of norms stay as the trainer uses them, and so do those of integers."""
        cast = lambda x: x if hasattr(x, "qvalue") or x.ndim < 2 else x.astype(sampler_dtype)
        return jax.tree.map(cast, tree, is_leaf=lambda x: hasattr(x, "qvalue"))

    def sampler_layer(layer):
        layer = merged(layer)
        return of_sampler(quantized(layer) if int8 else layer)

    def prepare(params):
        rest = {name: leaf for name, leaf in params.items() if name not in ("layers", "tail")}
        layers = unstacked(params["layers"], params.get("tail", []))
        return {**of_sampler(rest), "layers": [sampler_layer(layer) for layer in layers]}

    def init_cache(rows, width, columns):
        shapes = cache_shapes(
            layer_cache, slots=rows * width, kv_heads=config.kv_heads, head_width=config.head_width, columns=columns,
            tiled=tiled, whole_tiles=kernel is not None,
        )  # fmt: skip
        layer = lambda: {name: jnp.zeros(shape, sampler_dtype) for name, shape in shapes.items()}
        return [layer() for _ in range(config.layers)]

    def extending(positions, column, key_positions):
        """What a layer makes of x and of its cache, beside which it reads others; key_positions are those of all."""

        def sees(keys, window):  # [R, W or 1, columns] -> [R, W, J, columns]
            back = positions[..., None] - keys[:, :, None, :]
            seen = (keys[:, :, None, :] >= 0) & (back >= 0)
            return seen & (back < window) if window else seen

        visible = {w: [sees(keys, w) for keys in key_positions] for w in set(pattern)}

        def layer(window, x, layer_params, layer_cache, before=()):
            own, *others = visible[window]
            attend = functools.partial(
                attend_slots, cache=layer_cache, column=column, visible=own, scale=scale,
                soft_cap=config.attention_cap, kernel=kernel,
                before=[(of_layer, seen, live) for (of_layer, live), seen in zip(before, others, strict=True)],
            )  # fmt: skip
            return block.apply({"params": layer_params}, x, positions, _frequencies(config, window), attend)

        return layer

    def extend(params, tokens, positions, cache, column, key_positions, before=()):
        layer = extending(positions, column, [key_positions, *(keys for _, keys, _ in before)])
        x, written = embed(params, tokens, sampler_dtype), []
        for i, (window, layer_params) in enumerate(zip(windows, params["layers"], strict=True)):
            x, of_layer = layer(window, x, layer_params, cache[i], [(layers[i], live) for layers, _, live in before])
            written.append(of_layer)
        return final_norm(params, x), written

    def prefill(params, prepared, tokens, positions, cache, column, key_positions):
        layer, tail = extending(positions, column, [key_positions]), params.get("tail", [])
        places, whole = len(pattern), config.layers - len(tail)

        def body(x, stacks):
            written = []
            for window, axes, layer_params, layer_cache in zip(pattern, sampler_layers, *stacks, strict=False):
                layer_params = sampler_layer(layer_params)
                if mesh is not None:  # gathered over fsdp here, in the sampler's precision
                    place = shardings(layer_params, axes, mesh, SAMPLER_RULES)
                    layer_params = jax.lax.with_sharding_constraint(layer_params, place)
                x, of_layer = layer(window, x, layer_params, layer_cache)
                written.append(of_layer)
            return x, written

        stacks = [jax.tree.map(lambda *x: jnp.stack(x), *cache[place:whole:places]) for place in range(places)]
        x, stacks = jax.lax.scan(body, embed(prepared, tokens, sampler_dtype), (params["layers"], stacks))
        written = []
        for window, layer_params, layer_cache in zip(pattern, prepared["layers"][whole:], cache[whole:], strict=False):
            x, of_layer = layer(window, x, layer_params, layer_cache)
            written.append(of_layer)
        return final_norm(prepared, x), unstacked(stacks, written)

    is_axes = lambda x: isinstance(x, tuple)
    layer_axes = lambda stack, i: jax.tree.map(lambda axes: axes[1:], stack, is_leaf=is_axes)
    rest = {name: axes for name, axes in param_axes.items() if name not in ("layers", "tail")}
    sampler_layers = unstacked(param_axes["layers"], param_axes.get("tail", []), layer_axes)
    if int8:
        weights = jax.eval_shape(prepare, shapes)["layers"]
        sampler_layers = [quantized_axes(*layer) for layer in zip(weights, sampler_layers, strict=True)]
    return Policy(
        hidden=hidden,
        head=head,
        prepare=prepare,
        init_cache=init_cache,
        extend=extend,
        prefill=prefill,
        param_axes=param_axes,
        sampler_axes={**rest, "layers": sampler_layers},
        cache_axes=[layer_cache] * config.layers,
        reads_visible=kernel is not None,
        skips_blocks=platform != "gpu",  # where a condition costs a trip to the host
        max_segments=1 if config.attention == "cudnn" else None,  # its kernel knows no segments
    )

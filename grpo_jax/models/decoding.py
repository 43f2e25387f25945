"""The decoder as the sampler runs it: weights laid out for one token at a time, caches, and what extends them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grpo_jax.models.config import TransformerConfig
from grpo_jax.models.layers import Block, embed, rms_norm, rope_frequencies
from grpo_jax.models.leaves import merged, quantized, quantized_axes
from grpo_jax.models.slot_attention import attend_slots, cache_axes, cache_shapes, make_kernel
from grpo_jax.sharding import SAMPLER_RULES, shardings

__all__ = ["Decoder"]


class Decoder:
    """What a `Policy` wants for sampling, as methods that are pure functions."""

    def __init__(
        self, config: TransformerConfig, shapes: dict[str, Any], axes: dict[str, Any], mesh: Mesh | None, device: Any
    ):  # fmt: skip
        """Of a model, its parameters as of `abstract_params`, on a mesh of several devices or on one (None)."""
        self._config, self._mesh, platform = config, mesh, device.platform
        self._block, self._dtype, self._pattern = Block(config), jnp.dtype(config.decoding_dtype), config.pattern
        self._windows = [self._pattern[i % len(self._pattern)] for i in range(config.layers)]
        self._layer_cache = cache_axes(platform, config.kv_heads)
        self._tiled = platform == "cpu" and (mesh is None or mesh.shape["tensor"] == 1)
        self._kernel = make_kernel(
            device, kv_heads=config.kv_heads, head_width=config.head_width, scale=config.attention_scale,
            soft_cap=config.attention_cap, mesh=mesh,
        )  # fmt: skip
        self.reads_visible = self._kernel is not None
        # Elsewhere one product of all of a group's queries reads a prompt once for the group, and three behind
        # conditions, trips to the host on a GPU, are not expected to cost less.
        self.prompts_in_blocks = platform == "cpu"
        self.cache_axes = [self._layer_cache] * config.layers
        self.sampler_axes = self._sampler_axes(shapes, axes)

    def prepare(self, params: dict[str, Any]) -> dict[str, Any]:
        """Training parameters as decoding reads them: adapters merged, cast or quantized, layer by layer.

        Indexing a stack inside the decode loop makes XLA copy all of it at every token.
        """
        layers = self._unstacked(params["layers"], params.get("tail", []))
        return {**self._cast(_without_layers(params)), "layers": [self._prepared_layer(layer) for layer in layers]}

    def init_cache(self, rows: int, width: int, columns: int) -> list[dict[str, jax.Array]]:
        """Empty caches of rows x width slots, of each layer."""
        shapes = cache_shapes(
            self._layer_cache, slots=rows * width, kv_heads=self._config.kv_heads, head_width=self._config.head_width,
            columns=columns, tiled=self._tiled, whole_tiles=self._kernel is not None,
        )  # fmt: skip
        layer = lambda: {name: jnp.zeros(shape, self._dtype) for name, shape in shapes.items()}
        return [layer() for _ in range(self._config.layers)]

    def extend(self, params, tokens, positions, cache, column, key_positions, before=()):
        """`Policy.extend`."""
        layer = self._extending(positions, column, [key_positions, *(keys for _, keys, _ in before)])
        x, written = embed(params, tokens, self._config, self._dtype), []
        for i, (window, layer_params) in enumerate(zip(self._windows, params["layers"], strict=True)):
            x, of_layer = layer(window, x, layer_params, cache[i], [(layers[i], live) for layers, _, live in before])
            written.append(of_layer)
        return rms_norm(x, params["norm"], self._config), written

    def prefill(self, params, prepared, tokens, positions, cache, column, key_positions, before=()):
        """`Policy.prefill`: scans over the pattern of layers, so that one of each window is compiled."""
        layer = self._extending(positions, column, [key_positions, *(keys for _, keys, _ in before)])
        pattern, tail = self._pattern, params.get("tail", [])
        places, whole = len(pattern), self._config.layers - len(tail)
        caches = [(cache[i], [layers[i] for layers, *_ in before]) for i in range(self._config.layers)]
        lives = [live for *_, live in before]

        def body(x, stacks):
            written = []
            for window, axes, layer_params, (own, others) in zip(
                pattern, self.sampler_axes["layers"], *stacks, strict=False
            ):
                layer_params = self._prepared_layer(layer_params)
                if self._mesh is not None:  # gathered over fsdp here, in the sampler's precision
                    place = shardings(layer_params, axes, self._mesh, SAMPLER_RULES)
                    layer_params = jax.lax.with_sharding_constraint(layer_params, place)
                x, of_layer = layer(window, x, layer_params, own, zip(others, lives, strict=True))
                written.append(of_layer)
            return x, written

        stacks = [jax.tree.map(lambda *x: jnp.stack(x), *caches[place:whole:places]) for place in range(places)]
        x = embed(prepared, tokens, self._config, self._dtype)
        x, stacks = jax.lax.scan(body, x, (params["layers"], stacks))
        written = []
        for window, layer_params, (own, others) in zip(
            pattern, prepared["layers"][whole:], caches[whole:], strict=False
        ):
            x, of_layer = layer(window, x, layer_params, own, zip(others, lives, strict=True))
            written.append(of_layer)
        return rms_norm(x, prepared["norm"], self._config), self._unstacked(stacks, written)

    def _extending(self, positions, column, key_positions):
        """What a layer makes of x and of its cache, beside which it reads others; key_positions are those of all."""

        def sees(keys, window):  # [R, W or 1, columns] -> [R, W, J, columns]
            back = positions[..., None] - keys[:, :, None, :]
            seen = (keys[:, :, None, :] >= 0) & (back >= 0)
            return seen & (back < window) if window else seen

        visible = {w: [sees(keys, w) for keys in key_positions] for w in set(self._pattern)}

        def layer(window, x, layer_params, layer_cache, before=()):
            own, *others = visible[window]
            attend = functools.partial(
                attend_slots, cache=layer_cache, column=column, visible=own, scale=self._config.attention_scale,
                soft_cap=self._config.attention_cap, kernel=self._kernel,
                before=[(of_layer, seen, live) for (of_layer, live), seen in zip(before, others, strict=True)],
            )  # fmt: skip
            frequencies = rope_frequencies(self._config, window)
            return self._block.apply({"params": layer_params}, x, positions, frequencies, attend)

        return layer

    def _unstacked(self, layers, tail, take=lambda stack, i: jax.tree.map(lambda x: x[i], stack)):
        places = len(self._pattern)
        return [take(layers[i % places], i // places) for i in range(self._config.layers - len(tail))] + tail

    def _cast(self, tree):
        """In the sampler's precision; scales of norms stay as the trainer uses them, and so do those of integers."""
        cast = lambda x: x if hasattr(x, "qvalue") or x.ndim < 2 else x.astype(self._dtype)
        return jax.tree.map(cast, tree, is_leaf=lambda x: hasattr(x, "qvalue"))

    def _prepared_layer(self, layer):
        layer = merged(layer)
        return self._cast(quantized(layer) if self._config.sampler_dtype == "int8" else layer)

    def _sampler_axes(self, shapes: dict[str, Any], axes: dict[str, Any]) -> dict[str, Any]:
        """The logical axes of what `prepare` returns."""
        of_layer = lambda stack, i: jax.tree.map(lambda axes: axes[1:], stack, is_leaf=lambda x: isinstance(x, tuple))
        layers = self._unstacked(axes["layers"], axes.get("tail", []), of_layer)
        if self._config.sampler_dtype == "int8":
            weights = jax.eval_shape(self.prepare, shapes)["layers"]
            layers = [quantized_axes(*layer) for layer in zip(weights, layers, strict=True)]
        return {**_without_layers(axes), "layers": layers}


def _without_layers(tree: dict[str, Any]) -> dict[str, Any]:
    return {name: leaf for name, leaf in tree.items() if name not in ("layers", "tail")}

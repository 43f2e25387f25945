"""One decoder-only transformer for many families: Llama 3, Qwen 2 and 3, Gemma 2 and 3, and small ones of one's own.

RMSNorm, rotary positions, grouped-query attention, gated MLP: `layers.py`. `TransformerConfig` says in what families
differ, and `pretrained.py` reads it from a Hugging Face directory. The training pass is below, the sampler's side of
the `Policy` in `decoding.py`. Parameters are a plain tree,

    {'embedding': [V, D], 'norm': [D], 'head': [V, D] where untied, 'layers': [stack, ...], 'tail': [layer, ...]}

(a reward model has a `score` [1, D] in the head's place)
with a stack for each place in the pattern of windows, leaves [N // places, ...], so that training scans over
the pattern, and the layers that are left over in `tail`. Matrices of layers may be more than arrays: `leaves.py`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax.models.attention import make_attention
from grpo_jax.models.config import REMAT, TransformerConfig
from grpo_jax.models.decoding import Decoder
from grpo_jax.models.layers import Block, abstract_params, embed, init_params, rms_norm, rope_frequencies
from grpo_jax.sharding import shardings
from grpo_jax.types import Policy

__all__ = ["REMAT", "TransformerConfig", "abstract_params", "init_params", "make_policy"]


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
    mesh = None if mesh is None or mesh.size == 1 else mesh  # on one device there is nothing to say
    shapes, axes = abstract_params(config)
    hidden = _make_hidden(config, axes, mesh, device)
    decoder = Decoder(config, shapes, axes, mesh, device)

    def head(params):
        if config.score:
            return params["score"], None, None
        return params["embedding" if config.tied else "head"], None, config.logit_cap or None

    return Policy(
        hidden=hidden,
        head=head,
        prepare=decoder.prepare,
        init_cache=decoder.init_cache,
        extend=decoder.extend,
        prefill=decoder.prefill,
        param_axes=axes,
        sampler_axes=decoder.sampler_axes,
        cache_axes=decoder.cache_axes,
        reads_visible=decoder.reads_visible,
        prompts_in_blocks=decoder.prompts_in_blocks,
        max_segments=1 if config.attention == "cudnn" else None,  # its kernel knows no segments
    )


def _make_hidden(
    config: TransformerConfig, axes: dict[str, Any], mesh: Mesh | None, device: Any
) -> Callable[..., Any]:  # fmt: skip
    """`Policy.hidden`: the training pass; axes: of the parameters."""
    # For libtpu; on CPUs it is tested. (Where data has one part, XLA multiplies and sums in rings, which a gradient
    # that is turned would keep it from.)
    scatters = mesh is not None and min(mesh.shape["data"], mesh.shape["fsdp"]) > 1 and device.platform != "gpu"
    block, pattern = Block(config, trains=True, scatters=scatters), config.pattern
    attention = {
        window: make_attention(
            config.attention, heads=config.heads, kv_heads=config.kv_heads, head_width=config.head_width,
            scale=config.attention_scale, soft_cap=config.attention_cap, window=window, mesh=mesh,
        )
        for window in set(pattern)
    }  # fmt: skip

    def split(x, *axes):
        """The array, split over these axes of the mesh; over data the train step's `vmap` splits it."""
        return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))

    def hidden(params, tokens, positions, segments):
        def layer(window, x, layer_params):
            attend = lambda q, k, v: (attention[window](q, k, v, positions, segments), None)
            x, _ = block.apply({"params": layer_params}, x, positions, rope_frequencies(config, window), attend)
            return split(x, "fsdp", None, None)

        options = REMAT[config.remat]
        again = layer if options is None else jax.checkpoint(layer, static_argnums=0, **options)
        layers = {window: functools.partial(again, window) for window in pattern}

        def body(x, stacks):
            for window, layer_params in zip(pattern, stacks, strict=True):
                x = layers[window](x, layer_params)
            return x, None

        # A device looks all rows up in its part of the table, split over fsdp by width, before they change places.
        # (Of a tied head `token_logprobs` wants parts by ids: looked up in those, rows would be sums over devices.)
        table = params["embedding"]
        if mesh is not None:
            table = jax.lax.with_sharding_constraint(table, shardings(table, axes["embedding"], mesh))
        x = embed({"embedding": table}, split(tokens, None, None), config, config.compute_dtype)
        x = split(split(x, None, None, "fsdp"), "fsdp", None, None)
        x, _ = jax.lax.scan(body, x, params["layers"])
        for window, layer_params in zip(pattern, params.get("tail", ()), strict=False):
            x = layers[window](x, layer_params)
        return rms_norm(x, params["norm"], config), {}

    return hidden

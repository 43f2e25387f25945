"""Small decoders of every family, their parameters, and what is asked of several of them."""

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.logprobs import unembed
from grpo_jax.models.transformer import TransformerConfig, abstract_params, make_policy
from tests import oracle

__all__ = ["EVERYTHING", "FAMILIES", "LINES", "program", "random_params", "rows", "traced"]

SIZES = {"vocab_size": 24, "width": 16, "heads": 4, "kv_heads": 2, "head_width": 8, "mlp_width": 24}
GEMMA = {"post_norms": True, "unit_offset": True, "activation": "gelu", "query_scale": 11}
# What the models of a family have, in small: Llama 3's stretched positions reach from those that stay to those that
# are stretched in full, and 5 and 8 layers of Gemma's patterns leave 1 and 2 for the tail.
FAMILIES = {
    name: TransformerConfig(**{**SIZES, **fields})
    for name, fields in {
        "llama": {"layers": 3, "scale_embedding": False, "tied": False, "rope_base": 500.0, "rope_factor": 8.0,
                  "rope_low_factor": 1.0, "rope_high_factor": 4.0, "rope_length": 64},
        "qwen2": {"layers": 2, "scale_embedding": False, "qkv_bias": True, "rope_base": 1e6},
        "qwen3": {"layers": 2, "scale_embedding": False, "qk_norm": True, "rope_base": 1e6, "tied": False},
        "gemma2": {**GEMMA, "layers": 5, "windows": (4, 0), "attention_cap": 2.0, "logit_cap": 3.0},
        "gemma3": {**GEMMA, "layers": 8, "windows": (4,) * 5 + (0,), "qk_norm": True, "rope_base": 1e4,
                   "window_rope_base": 100.0, "rope_factor": 8.0},
    }.items()
}  # fmt: skip
LINES = [[3, 4, 5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]
EVERYTHING = TransformerConfig(
    **{**SIZES, **GEMMA}, layers=2, windows=(4, 0), qkv_bias=True, qk_norm=True, tied=False, attention_cap=2.0,
    logit_cap=3.0, window_rope_base=100.0, rope_factor=8.0, rope_low_factor=1.0, rope_high_factor=4.0, rope_length=64,
)  # fmt: skip


def rows(lines, width):
    tokens, real = oracle.pad(lines, width)
    return tokens, np.where(real, np.arange(width), 0), real.astype(np.int32)


def random_params(config, seed=0):
    """Random in every leaf: what norms and biases begin with hides whether they are used."""
    rng, (shapes, _) = np.random.default_rng(seed), abstract_params(config)

    def fill(path, leaf):
        around = 1.0 - config.unit_offset if "norm" in path[-1].key else 0.0
        return jnp.asarray(rng.normal(around, 0.25, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def traced(config):
    """The logits of a batch, which nothing computes."""
    policy, (shapes, _) = make_policy(config), abstract_params(config)
    logits = lambda params, *batch: unembed(policy.hidden(params, *batch)[0], policy.head(params))
    return jax.jit(logits).trace(shapes, *[jax.ShapeDtypeStruct((2, 128), jnp.int32)] * 3)


def program(config):
    return traced(config).lower().as_text()

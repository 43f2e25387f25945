"""Shapes of published models, by name: enough to plan with, or to begin from random weights, without a download.

`shape("qwen2.5-7b")` is what `pretrained.read_config` reads from that model's directory. The rows are the sizes in the
models' own config.json files, and the families' defaults do the rest.
"""

from collections.abc import Mapping
from typing import Any

from grpo_jax.models.families import parse_config
from grpo_jax.models.transformer import TransformerConfig

__all__ = ["SHAPES", "shape"]

# model_type, and what is the same in a line of models.
_QWEN2: Mapping[str, Any] = {"model_type": "qwen2", "rope_theta": 1e6}
_LLAMA: Mapping[str, Any] = {"model_type": "llama", "rope_theta": 5e5, "rms_norm_eps": 1e-5, "vocab_size": 128_256}
_LLAMA_32: Mapping[str, Any] = {
    **_LLAMA,
    "tie_word_embeddings": True,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
_QWEN3: Mapping[str, Any] = {"model_type": "qwen3", "rope_theta": 1e6, "vocab_size": 151_936, "head_dim": 128}
_GEMMA3: Mapping[str, Any] = {"model_type": "gemma3_text"}
# Those that also see pictures, of which this is the text model: more ids, and positions that are stretched.
_GEMMA3_SEES: Mapping[str, Any] = {
    **_GEMMA3, "vocab_size": 262_208, "sliding_window": 1024, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}  # fmt: skip
_SMALL, _LARGE = {"vocab_size": 151_936, "tie_word_embeddings": True}, {"vocab_size": 152_064}
_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")

SHAPES: Mapping[str, tuple[Mapping[str, Any], tuple[int, int, int, int, int]]] = {
    "qwen2.5-0.5b": (_QWEN2 | _SMALL, (24, 896, 14, 2, 4864)),
    "qwen2.5-1.5b": (_QWEN2 | _SMALL, (28, 1536, 12, 2, 8960)),
    "qwen2.5-3b": (_QWEN2 | _SMALL, (36, 2048, 16, 2, 11_008)),
    "qwen2.5-7b": (_QWEN2 | _LARGE, (28, 3584, 28, 4, 18_944)),
    "qwen2.5-14b": (_QWEN2 | _LARGE | {"rms_norm_eps": 1e-5}, (48, 5120, 40, 8, 13_824)),
    "qwen2.5-32b": (_QWEN2 | _LARGE | {"rms_norm_eps": 1e-5}, (64, 5120, 40, 8, 27_648)),
    "qwen2.5-72b": (_QWEN2 | _LARGE | {"rms_norm_eps": 1e-5}, (80, 8192, 64, 8, 29_568)),
    "llama-3-8b": (_LLAMA, (32, 4096, 32, 8, 14_336)),
    "llama-3-70b": (_LLAMA, (80, 8192, 64, 8, 28_672)),
    "llama-3.2-1b": (_LLAMA_32, (16, 2048, 32, 8, 8192)),
    "llama-3.2-3b": (_LLAMA_32, (28, 3072, 24, 8, 8192)),
    "qwen3-0.6b": (_QWEN3 | {"tie_word_embeddings": True}, (28, 1024, 16, 8, 3072)),
    "qwen3-1.7b": (_QWEN3 | {"tie_word_embeddings": True}, (28, 2048, 16, 8, 6144)),
    "qwen3-4b": (_QWEN3 | {"tie_word_embeddings": True}, (36, 2560, 32, 8, 9728)),
    "qwen3-8b": (_QWEN3, (36, 4096, 32, 8, 12_288)),
    "qwen3-14b": (_QWEN3, (40, 5120, 40, 8, 17_408)),
    "qwen3-32b": (_QWEN3, (64, 5120, 64, 8, 25_600)),
    "gemma-3-1b": (_GEMMA3 | {"vocab_size": 262_144, "sliding_window": 512}, (26, 1152, 4, 1, 6912)),
    "gemma-3-4b": (_GEMMA3_SEES, (34, 2560, 8, 4, 10_240)),
    "gemma-3-12b": (_GEMMA3_SEES, (48, 3840, 16, 8, 15_360)),
    "gemma-3-27b": (_GEMMA3_SEES | {"head_dim": 128, "query_pre_attn_scalar": 168}, (62, 5376, 32, 16, 21_504)),
}


def shape(name: str) -> TransformerConfig:
    """The configuration of a published model, as `TransformerConfig` has it; float32, and without remat.

    Raises:
      ValueError: the table has no such name.
    """
    if name not in SHAPES:
        raise ValueError(f"{name!r} is no published shape that is known here: {', '.join(SHAPES)}.")
    common, sizes = SHAPES[name]
    return parse_config({**common, **dict(zip(_SIZES, sizes, strict=True))})

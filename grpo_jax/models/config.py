"""Shape, family and precision of the decoder, as data: `pretrained.py` reads it from a Hugging Face directory."""

import dataclasses
import functools
import importlib.util
from typing import Any

import flax.linen as nn
import jax

__all__ = ["ACTIVATIONS", "REMAT", "TransformerConfig"]

# What the backward pass finds of a layer, by name, as options of `jax.checkpoint`; the layer's input is kept always.
REMAT: dict[str, dict[str, Any] | None] = {
    "none": None,  # what products and attention gave: the most memory, and of these nothing is computed again
    # What products with weights gave: queries, keys, values, gate, up and what is added to the residual stream.
    # Attention is computed again too, which is little where sequences are short.
    "dots": {"policy": jax.checkpoint_policies.dots_with_no_batch_dims_saveable},
    "full": {},  # nothing: the least memory, and the forward pass is computed twice, a third more work
}
ACTIVATIONS = {"silu": nn.silu, "gelu": functools.partial(nn.gelu, approximate=True)}


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
        sizes = ("vocab_size", "layers", "width", "heads", "kv_heads", "head_width", "mlp_width")
        if low := [f"{name}={getattr(self, name)}" for name in sizes if getattr(self, name) < 1]:
            raise ValueError(f"{', '.join(low)} must be 1 or more.")
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
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} must be one of {sorted(ACTIVATIONS)}.")
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
    def attention_scale(self) -> float:
        """Scores of attention are multiplied by it."""
        return (self.query_scale or self.head_width) ** -0.5

    @property
    def pattern(self) -> tuple[int, ...]:
        """The windows that the training pass scans over; no longer than the layers."""
        return self.windows[: self.layers]

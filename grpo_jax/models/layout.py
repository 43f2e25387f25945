"""Which of Hugging Face's tensors is which of our parameters, and in what order its axes stand there.

Theirs are matrices (out, in), a tensor a layer; ours are (in, out) with heads apart, a stack for each place in the
pattern of layers. `_NAMES` and the two tables below it are the whole mapping.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from grpo_jax.models.transformer import TransformerConfig, abstract_params
from grpo_jax.types import PyTree

__all__ = ["EMBEDDING", "HEAD", "Tensor", "flat", "layout"]

# Ours -> theirs within a layer, and the order of our axes in theirs, where heads x head is one axis.
_NAMES = {
    "query": ("self_attn.q_proj.weight", (1, 2, 0)),
    "key": ("self_attn.k_proj.weight", (1, 2, 0)),
    "value": ("self_attn.v_proj.weight", (1, 2, 0)),
    "query_bias": ("self_attn.q_proj.bias", (0, 1)),
    "key_bias": ("self_attn.k_proj.bias", (0, 1)),
    "value_bias": ("self_attn.v_proj.bias", (0, 1)),
    "query_norm": ("self_attn.q_norm.weight", (0,)),
    "key_norm": ("self_attn.k_norm.weight", (0,)),
    "output": ("self_attn.o_proj.weight", (2, 0, 1)),
    "gate": ("mlp.gate_proj.weight", (1, 0)),
    "up": ("mlp.up_proj.weight", (1, 0)),
    "down": ("mlp.down_proj.weight", (1, 0)),
    "attention_norm": ("input_layernorm.weight", (0,)),
    "mlp_norm": ("post_attention_layernorm.weight", (0,)),
}
_POST_NORM_NAMES = {
    "attention_post_norm": ("post_attention_layernorm.weight", (0,)),
    "mlp_norm": ("pre_feedforward_layernorm.weight", (0,)),
    "mlp_post_norm": ("post_feedforward_layernorm.weight", (0,)),
}
_OUTER_NAMES = {
    "embedding": ("model.embed_tokens.weight", (0, 1)),
    "norm": ("model.norm.weight", (0,)),
    "head": ("lm_head.weight", (0, 1)),
    "score": ("score.weight", (0, 1)),
}
HEAD, EMBEDDING = _OUTER_NAMES["head"][0], _OUTER_NAMES["embedding"][0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """One of their tensors, and what it is of ours."""

    name: str
    order: tuple[int, ...]  # our axes in theirs
    shape: tuple[int, ...]  # ours
    axes: tuple[str | None, ...]  # ours, logical names

    @property
    def apart(self) -> tuple[int, ...]:
        """Their shape with heads and head apart."""
        return tuple(self.shape[i] for i in self.order)

    @property
    def merged(self) -> int | None:
        """Which of their axes is heads x head."""
        names = [self.axes[i] for i in self.order]
        return names.index("head") - 1 if len(names) > 1 and "head" in names else None

    @property
    def their_shape(self) -> tuple[int, ...]:
        """Shape in the file."""
        m, apart = self.merged, self.apart
        return apart if m is None else (*apart[:m], apart[m] * apart[m + 1], *apart[m + 2 :])

    def read(self, tensor: Any, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of ours out of an open tensor of theirs, reading no more than that."""
        ranges = [slice(*s.indices(n)[:2]) for s, n in zip(index, self.shape, strict=True)]
        theirs, m = [ranges[i] for i in self.order], self.merged
        if m is None:
            return tensor[tuple(theirs)].transpose(np.argsort(self.order))
        heads, within, width = theirs[m], theirs[m + 1], self.apart[m + 1]
        values = tensor[(*theirs[:m], slice(heads.start * width, heads.stop * width), *theirs[m + 2 :])]
        values = values.reshape(*values.shape[:m], -1, width, *values.shape[m + 1 :])
        return values[(slice(None),) * (m + 1) + (within,)].transpose(np.argsort(self.order))

    def write(self, ours: np.ndarray) -> np.ndarray:
        """Theirs, contiguous."""
        return np.ascontiguousarray(ours.transpose(self.order).reshape(self.their_shape))


def layout(config: TransformerConfig) -> tuple[dict[str, Any], PyTree, PyTree]:
    """Our tree, its leaves `Tensor`s, or lists of them where the leaf is a stack; its shapes; its axes."""
    shapes, axes = abstract_params(config)
    names = _NAMES | (_POST_NORM_NAMES if config.post_norms else {})
    places, tail = len(config.pattern), len(shapes.get("tail", ()))

    def in_layer(i, leaf_name, shape, leaf_axes):
        name, order = names[leaf_name]
        return Tensor(name=f"model.layers.{i}.{name}", order=order, shape=shape, axes=leaf_axes)

    def stack(place):
        return {
            k: [in_layer(place + places * i, k, x.shape[1:], axes["layers"][place][k][1:]) for i in range(x.shape[0])]
            for k, x in shapes["layers"][place].items()
        }

    def outer(k):
        name, order = _OUTER_NAMES[k]
        return Tensor(name=name, order=order, shape=shapes[k].shape, axes=axes[k])

    tree: dict[str, Any] = {k: outer(k) for k in shapes if k in _OUTER_NAMES}
    tree["layers"] = [stack(place) for place in range(places)]
    if tail:
        first = config.layers - tail
        tree["tail"] = [
            {k: in_layer(first + i, k, x.shape, axes["tail"][i][k]) for k, x in shapes["tail"][i].items()}
            for i in range(tail)
        ]
    return tree, shapes, axes


def flat(tree: PyTree) -> list[Tensor]:
    """The tensors of such a tree."""
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Tensor))

"""Low-rank adapters (LoRA, arXiv 2106.09685): a frozen model, and beside chosen matrices narrow ones that train.

    config = LoraConfig(rank=16, alpha=32.0)
    policy = adapted_policy(make_policy(model, mesh), model, config)
    params = adapted(load(directory, mesh), init_adapters(model, config, key, mesh), config)

`params` are the model's with `leaves.Adapted` in the place of those matrices, and all that takes a policy's parameters
takes them. `policy.split` says that the adapters alone train, and that the reference is the model without them.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grpo_jax import sharding
from grpo_jax.models.leaves import MATRICES, Adapted, bare
from grpo_jax.models.transformer import TransformerConfig, abstract_params
from grpo_jax.types import Policy, PyTree, Split

__all__ = ["LoraConfig", "abstract", "abstract_adapters", "adapted", "adapted_policy", "init_adapters"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters in place of all parameters: what trains."""

    rank: int = 0  # r, columns of A and rows of B; 0: no adapters, and all parameters train
    alpha: float = 16.0  # adapters count alpha / rank times
    targets: tuple[str, ...] = tuple(MATRICES)  # matrices that get one, as a Python tuple: ('query','value')
    adapter: str = ""  # a directory in PEFT's format to begin with; empty: A random, B zero
    base_dtype: str = "float32"  # of what does not train: float32, or bfloat16, which takes half the memory

    def __post_init__(self) -> None:
        if isinstance(self.targets, list):
            object.__setattr__(self, "targets", tuple(self.targets))  # JSON makes lists of them
        if self.rank < 0 or not self.alpha > 0:
            raise ValueError(f"rank={self.rank} of LoRA must be 0 (off) or more, alpha={self.alpha} above 0.")
        if isinstance(self.targets, str) or not self.targets or {*self.targets} - {*MATRICES}:
            raise ValueError(
                f"targets={self.targets!r} of LoRA must be some of {tuple(MATRICES)} (PEFT's q_proj, k_proj, v_proj, "
                "o_proj, gate_proj, up_proj, down_proj), which as a flag is --lora.targets=\"('query','value')\"."
            )
        if len({*self.targets}) < len(self.targets):
            raise ValueError(f"targets={self.targets!r} of LoRA must name none twice.")
        if self.base_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"base_dtype={self.base_dtype!r} of LoRA must be 'float32' or 'bfloat16'.")
        given = [
            f"{f.name}={value!r}" for f in dataclasses.fields(self) if (value := getattr(self, f.name)) != f.default
        ]
        if not self.rank and given:
            raise ValueError(
                f"{' and '.join(given)} of LoRA without a rank, and 0 makes no adapters: give --lora.rank too; of an "
                "adapter that is there it is r in its adapter_config.json, as its alpha and targets are."
            )

    @property
    def scale(self) -> float:
        """How many times adapters count."""
        return self.alpha / self.rank


def _in_layers(function: Callable[..., dict[str, Any]], params: PyTree, *others: PyTree) -> dict[str, list[Any]]:
    """A function of each stack, and of each layer in the tail."""
    return {
        group: [function(*layer) for layer in zip(*(tree[group] for tree in (params, *others)), strict=True)]
        for group in ("layers", "tail")
        if group in params
    }


def abstract_adapters(model: TransformerConfig, config: LoraConfig) -> tuple[PyTree, PyTree]:
    """Shapes of the adapters, as ShapeDtypeStructs, and the same tree of their logical axes.

        {'layers': [{target: {'a': [N // places, inputs..., r], 'b': [N // places, r, outputs...]}}], 'tail': [...]}

    An adapter lies as its weight does: A's inputs and B's outputs, and the ranks are not split.
    """

    shapes, axes = abstract_params(model)

    def adapters_of(layer: dict[str, Any], names: dict[str, Any], rank: int | None, leaf: Callable[..., Any]) -> Any:
        def one(name):
            stacked = names[name][0] == "layers"
            whole, inputs = tuple(getattr(layer[name], "shape", layer[name])), stacked + MATRICES[name]
            return {"a": leaf((*whole[:inputs], rank)), "b": leaf((*whole[:stacked], rank, *whole[inputs:]))}

        return {name: one(name) for name in config.targets}

    of = lambda tree, *how: _in_layers(lambda *layer: adapters_of(*layer, *how), tree, axes)
    return of(shapes, config.rank, lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)), of(axes, None, tuple)


def abstract(model: TransformerConfig, config: LoraConfig) -> tuple[PyTree, PyTree]:
    """`abstract_params` of a model with adapters; without where the rank is 0."""
    if not config.rank:
        return abstract_params(model)
    (shapes, axes), (of_adapters, axes_of_adapters) = abstract_params(model), abstract_adapters(model, config)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, config.base_dtype), shapes)
    return adapted(shapes, of_adapters, config), adapted(axes, axes_of_adapters, config)


def init_adapters(model: TransformerConfig, config: LoraConfig, key: jax.Array, mesh: Mesh) -> PyTree:
    """Adapters that change nothing yet, in their places on a mesh; the key is consumed.

    B is zero and A uniform within 1 / sqrt(inputs), as PEFT begins (Kaiming's uniform with a = sqrt(5)).
    """
    shapes, axes = abstract_adapters(model, config)

    def make(key):
        keys = iter(jax.random.split(key, len(jax.tree.leaves(shapes))))

        def one(path, x):
            own, name = next(keys), path[-2].key
            if path[-1].key == "b":
                return jnp.zeros(x.shape, x.dtype)
            inputs = math.prod(x.shape[x.ndim - 1 - MATRICES[name] : -1])
            return jax.random.uniform(own, x.shape, x.dtype, -(inputs**-0.5), inputs**-0.5)

        return jax.tree_util.tree_map_with_path(one, shapes)

    return jax.jit(make, out_shardings=sharding.shardings(shapes, axes, mesh))(key)


def adapted(params: PyTree, adapters: PyTree, config: LoraConfig) -> PyTree:
    """A model's parameters with adapters; of shapes and of logical axes too."""

    def join(layer, own):
        return layer | {name: Adapted(base=layer[name], **pair, scale=config.scale) for name, pair in own.items()}

    return params | _in_layers(join, params, adapters)


def adapted_policy(policy: Policy, model: TransformerConfig, config: LoraConfig) -> Policy:
    """A model's policy as one of parameters with adapters, which alone train; itself where the rank is 0."""
    if not config.rank:
        return policy

    def adapters(layer):
        return {name: {"a": leaf.a, "b": leaf.b} for name, leaf in layer.items() if isinstance(leaf, Adapted)}

    split = Split(
        parts=lambda params: (_in_layers(adapters, params), bare(params)),
        join=lambda trained, frozen: adapted(frozen, trained, config),
        reference=bare,
    )
    return dataclasses.replace(policy, param_axes=abstract(model, config)[1], split=split)

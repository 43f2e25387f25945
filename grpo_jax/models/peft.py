"""Adapters in the format of Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors, in and out.

    save("adapter", params, model, config, base="Qwen2.5-0.5B")
    adapters = load("adapter", model, config, mesh)

What a configuration says that this library does not do is refused: leaving it out would give another model.
"""

import json
import os
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from grpo_jax import hosts, sharding, storage
from grpo_jax.models.directories import made
from grpo_jax.models.families import PretrainedError
from grpo_jax.models.layout import Tensor, layout
from grpo_jax.models.leaves import MATRICES, Adapted
from grpo_jax.models.lora import LoraConfig, abstract_adapters
from grpo_jax.models.transformer import TransformerConfig
from grpo_jax.types import PyTree

__all__ = ["load", "read_config", "save"]

Path = str | os.PathLike[str]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PROJECTIONS = {
    "query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj", "gate": "gate_proj", "up": "up_proj",
    "down": "down_proj",
}  # fmt: skip
_OURS = {theirs: ours for ours, theirs in _PROJECTIONS.items()}
# What a configuration may say without changing what the adapter computes: where it came from, how it began, what was
# dropped while it trained, and options of what is refused where it is on.
_HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "inference_mode", "layers_pattern", "lora_dropout",
    "megatron_core", "peft_version", "qalora_group_size", "rank_pattern", "revision", "runtime_config", "task_type",
}  # fmt: skip
_READ = {"peft_type", "r", "lora_alpha", "target_modules", "bias", "init_lora_weights"}
_ADVICE = {
    "use_rslora": "its scale is alpha / sqrt(r); set lora_alpha to alpha * sqrt(r) and use_rslora to false.",
    "modules_to_save": "whole modules are trained beside it; merge it into its model with PEFT, and load that.",
}


def read_config(directory: Path) -> LoraConfig:
    """Rank, alpha and targets of an adapter.

    Raises:
      PretrainedError: there is none, or it does what this library does not: anything but plain LoRA of a decoder's
        own projections, of one rank in all layers.
    """
    path = storage.path(directory) / _CONFIG
    try:
        raw = json.loads(path.read_text())
        kind, rank, alpha, targets = (raw[name] for name in ("peft_type", "r", "lora_alpha", "target_modules"))
    except FileNotFoundError:
        raise PretrainedError(
            f"there is no {_CONFIG} in {directory}: expected an adapter as PEFT saves it (`model.save_pretrained`)."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PretrainedError(
            f"cannot read {path}: {type(error).__name__}: {error}. Save it again with PEFT."
        ) from error
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or not (rank > 0 and alpha > 0):
        raise PretrainedError(f"{path}: r={rank!r} and lora_alpha={alpha!r} must be numbers above 0.")
    if kind != "LORA":
        raise PretrainedError(f"{path}: peft_type={kind!r} is not supported: expected 'LORA'.")
    if raw.get("bias", "none") != "none":
        raise PretrainedError(
            f"{path}: bias={raw['bias']!r} is not supported: expected 'none'; biases do not train here."
        )
    if isinstance(raw.get("init_lora_weights"), str) and raw["init_lora_weights"] != "gaussian":
        raise PretrainedError(
            f"{path}: init_lora_weights={raw['init_lora_weights']!r} may have changed the model that it belongs to, "
            "and is not supported: expected true, false or 'gaussian'."
        )
    on = lambda value: bool(value) and not (isinstance(value, Mapping) and not any(value.values()))
    for name in sorted(raw.keys() - _READ - _HARMLESS):
        if on(raw[name]):
            raise PretrainedError(
                f"{path}: {name}={raw[name]!r} is not supported: {_ADVICE.get(name, 'expected none.')}"
            )
    for name, one in (("rank_pattern", rank), ("alpha_pattern", alpha)):
        if {*(raw.get(name) or {}).values()} - {one}:
            raise PretrainedError(f"{path}: {name}={raw[name]!r} is not supported: expected {one} everywhere.")
    if not isinstance(targets, list) or not targets or {*targets} - {*_OURS}:
        raise PretrainedError(
            f"{path}: target_modules={targets!r} is not supported: expected a list of some of {', '.join(_OURS)}."
        )
    return LoraConfig(rank=rank, alpha=alpha, targets=tuple(name for name in MATRICES if _PROJECTIONS[name] in targets))


def _check(directory: Path, config: LoraConfig) -> None:
    """Raises PretrainedError where an adapter is not as the configuration says."""
    theirs = read_config(directory)
    of = lambda c: (c.rank, c.alpha, {*c.targets})
    if of(theirs) != of(config):
        raise PretrainedError(
            f"{directory} has rank={theirs.rank} alpha={theirs.alpha} targets={theirs.targets}, and the run "
            f"rank={config.rank} alpha={config.alpha} targets={config.targets}: give --lora.rank={theirs.rank} "
            f'--lora.alpha={theirs.alpha} --lora.targets="{theirs.targets}".'
        )


def _names(tensor: Tensor) -> dict[str, str]:
    """Theirs of a weight's adapter."""
    module = "base_model.model." + tensor.name.removesuffix(".weight")
    return {"a": f"{module}.lora_A.weight", "b": f"{module}.lora_B.weight"}


def load(directory: Path, model: TransformerConfig, config: LoraConfig, mesh: Mesh) -> PyTree:
    """Adapters as PEFT saved them, float32, as `init_adapters` makes them.

    Raises:
      PretrainedError: it is of another rank, alpha or targets, of another model, or does what `read_config` refuses.
    """
    _check(directory, config)
    path = storage.path(directory) / _WEIGHTS
    shapes, axes = abstract_adapters(model, config)
    tree, _, _ = layout(model)
    try:
        with storage.fetched(path) as here, safe_open(here, "flax") as file:  # NumPy has no bfloat16
            found = {name: np.asarray(file.get_tensor(name).astype(jnp.float32)) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise PretrainedError(f"cannot read {path}: {error}. Save it again with PEFT, as safetensors.") from error

    def read(tensor: Tensor, side: str, shape: tuple[int, ...]) -> np.ndarray:
        name = _names(tensor)[side]
        # Theirs are (out, in): [r, inputs] and [outputs, r].
        matrix = (-1, shape[-1]) if side == "a" else (shape[0], -1)
        wanted = np.empty(shape, np.int8).reshape(matrix).T.shape
        if name not in found or found[name].shape != wanted:
            what = f"of shape {found[name].shape}" if name in found else "missing"
            raise PretrainedError(f"{path}: tensor {name} is {what}; this model's adapter has {wanted} there.")
        return found.pop(name).T.reshape(shape)

    def leaf(path, struct, place):
        group, i, name, side = path[0].key, path[1].idx, path[2].key, path[3].key
        tensors = tree[group][i][name]
        if isinstance(tensors, Tensor):
            values = read(tensors, side, struct.shape)
        else:
            values = np.stack([read(tensor, side, struct.shape[1:]) for tensor in tensors])
        return jax.make_array_from_callback(struct.shape, place, lambda index: values[index])

    adapters = jax.tree_util.tree_map_with_path(leaf, shapes, sharding.shardings(shapes, axes, mesh))
    if found:
        raise PretrainedError(f"{path} holds tensor {min(found)}, unexpected: this model's adapter has none such.")
    return adapters


def _tensors(params: PyTree, model: TransformerConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Theirs by name, on the host."""
    theirs = lambda x, rows: np.ascontiguousarray(np.asarray(hosts.fetched(x), np.float32).reshape(rows).T)
    tree, _, _ = layout(model)
    for group in ("layers", "tail"):
        for layer, own in zip(tree.get(group, ()), params.get(group, ()), strict=True):
            for name, leaf in own.items():
                if not isinstance(leaf, Adapted):
                    continue
                stacked = isinstance(layer[name], list)
                for i, tensor in enumerate(layer[name] if stacked else [layer[name]]):
                    a, b = (x[i] if stacked else x for x in (leaf.a, leaf.b))
                    names = _names(tensor)
                    yield names["a"], theirs(a, (-1, a.shape[-1]))
                    yield names["b"], theirs(b, (b.shape[0], -1))


def save(directory: Path, params: PyTree, model: TransformerConfig, config: LoraConfig, *, base: str) -> None:
    """Writes the adapters among a policy's parameters as PEFT reads them (`PeftModel.from_pretrained(base, ...)`).

    All of it or nothing: it is written beside its place and then renamed.

    Args:
      directory: to be made; must not exist, or be empty.
      params: of `lora.adapted`.
      model: their configuration.
      config: of the adapters.
      base: name or directory of the model that they belong to, for whoever loads them.

    Raises:
      PretrainedError: the directory is in use, or cannot be written.
    """
    directory, tensors = storage.path(directory), dict(_tensors(params, model))
    if not hosts.is_first():  # it has handed its parts over
        return
    described = {
        "base_model_name_or_path": base, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "lora_alpha": config.alpha, "lora_dropout": 0.0, "peft_type": "LORA",
        "r": config.rank, "target_modules": [_PROJECTIONS[name] for name in config.targets],
        "task_type": "SEQ_CLS" if model.score else "CAUSAL_LM", "use_dora": False, "use_rslora": False,
    }  # fmt: skip
    with made(directory) as part:
        with storage.written(part / _WEIGHTS) as file:
            save_file(tensors, file, metadata={"format": "pt"})
        storage.write(part / _CONFIG, (json.dumps(described, indent=2, sort_keys=True) + "\n").encode())

"""Hugging Face directories in and out: config.json and safetensors; no PyTorch, and never a pickle.

    config = read_config("Qwen2.5-0.5B", compute_dtype="bfloat16")
    params = load("Qwen2.5-0.5B", mesh)
    save("out", params, config, source="Qwen2.5-0.5B")

`families.py` says which configurations there are, `layout.py` which tensor is which parameter, `weight_files.py` which
file holds it. Nothing is rounded on the way but by `dtype`. A directory may be `gs://...` in an object store
(`storage`): its weights are read by ranges of bytes, and written a file at a time.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError
from safetensors.numpy import save_file

from grpo_jax import hosts, sharding, storage
from grpo_jax.models.directories import made
from grpo_jax.models.families import PretrainedError, as_score, differences, parse_config, write_config
from grpo_jax.models.layout import EMBEDDING, HEAD, Tensor, flat, layout
from grpo_jax.models.leaves import Adapted, bare, merged
from grpo_jax.models.transformer import TransformerConfig, abstract_params
from grpo_jax.models.weight_files import DTYPES, WeightFiles, read_json
from grpo_jax.types import PyTree

__all__ = ["PretrainedError", "copy_description", "load", "read_config", "save", "saved_dtype"]

Path = str | os.PathLike[str]

_CARRIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*",
    "generation_config.json",
)  # fmt: skip


def read_config(directory: Path, **overrides: Any) -> TransformerConfig:
    """The decoder's configuration, from config.json in the old spelling or the new.

    Args:
      directory: as downloaded from the hub.
      **overrides: fields of TransformerConfig that are not the model's but the run's: compute_dtype, sampler_dtype,
        attention, remat; `score=True` makes a reward model of a language model, as `load` does.

    Raises:
      PretrainedError: there is no such file, or it describes something that this decoder is not.
    """
    path = storage.path(directory) / "config.json"
    raw = read_json(path)
    try:
        config = parse_config(raw)
    except PretrainedError as error:
        raise PretrainedError(f"{path}: {error}") from None
    return dataclasses.replace(config, **overrides)


def saved_dtype(directory: Path) -> str:
    """In what a checkpoint says that it is saved (`dtype`, formerly `torch_dtype`): float32 where it does not say."""
    raw = read_json(storage.path(directory) / "config.json")
    return str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")


def _dtype(name: str) -> np.dtype[Any]:
    if name not in DTYPES.values():
        raise PretrainedError(f"dtype {name!r} of weights must be one of {sorted(DTYPES.values())}.")
    return jnp.dtype(name)


def load(
    directory: Path,
    mesh: Mesh,
    rules: sharding.Rules = sharding.RULES,
    dtype: str | None = "float32",
    *,
    score: bool = False,
) -> dict[str, Any]:
    """Parameters from a Hugging Face directory, each slice straight to its place on the mesh.

    What the host holds beyond the arrays themselves is about one tensor of the checkpoint.

    Args:
      directory: config.json, and *.safetensors with an index where there are several.
      mesh: where the parameters go.
      rules: logical axis -> mesh axes.
      dtype: of the parameters; float32 to train them, None for what config.json says.
      score: a reward model of whatever is there: of a language model all but its head, and a score that begins at 0.

    Returns:
      Parameters for `make_policy(read_config(directory))`; with `score`, for `read_config(directory, score=True)`.

    Raises:
      PretrainedError: an architecture we do not have, a tensor missing, unexpected or of another shape, a
        corrupt file, a head that is tied and yet another: naming file and tensor, before anything is loaded.
    """
    directory = storage.path(directory)
    config, to = read_config(directory), _dtype(dtype or saved_dtype(directory))
    begins, config = score and not config.score, dataclasses.replace(config, score=score or config.score)
    files, (tree, shapes, axes) = WeightFiles(directory), layout(config)
    if begins:
        del tree["score"]
        files.file_of.pop(HEAD, None)  # what nobody asks for is not read
    wanted = flat(tree)
    if config.tied and not config.score and {HEAD, EMBEDDING} <= files.file_of.keys():  # some write it all the same
        _check_tied(files)
        del files.file_of[HEAD]
    files.check(wanted)
    where = sharding.shardings(shapes, axes, mesh, rules)

    def one(tensor: Tensor, place: NamedSharding) -> jax.Array:
        opened, read = files[tensor.name], {}

        def callback(index):
            key = str(index)  # devices that hold the same slice read it once
            if key not in read:
                read[key] = tensor.read(opened, index)
            return read[key]

        try:
            return jax.make_array_from_callback(tensor.shape, place, callback)
        except (SafetensorError, OSError) as error:
            raise PretrainedError(f"cannot read {files.where(tensor.name)}: {error}") from error

    def leaf(tensors: Tensor | list[Tensor], shape: jax.ShapeDtypeStruct, place: NamedSharding) -> jax.Array:
        if isinstance(tensors, Tensor):
            return _cast(to, place)(one(tensors, place)).block_until_ready()
        stack = jax.jit(lambda: jnp.zeros(shape.shape, to), out_shardings=place)()
        layer_place = NamedSharding(mesh, PartitionSpec(*place.spec[1:]))
        for i, tensor in enumerate(tensors):  # wait, or a fast disk fills the host's memory in front of a slow device
            stack = _put(place)(stack, one(tensor, layer_place), i).block_until_ready()
        return stack

    is_leaf = lambda x: isinstance(x, Tensor) or (isinstance(x, list) and isinstance(x[0], Tensor))
    those = lambda full: {name: full[name] for name in tree}
    params = jax.tree.map(leaf, tree, those(shapes), those(where), is_leaf=is_leaf)
    if begins:
        params["score"] = hosts.put(np.zeros(shapes["score"].shape, to), where["score"])
    return params


@functools.cache
def _cast(dtype: Any, place: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x.astype(dtype), out_shardings=place)


@functools.cache
def _put(place: NamedSharding) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    put = lambda stack, x, i: jax.lax.dynamic_update_index_in_dim(stack, x.astype(stack.dtype), i, 0)
    return jax.jit(put, donate_argnums=0, out_shardings=place)


def _check_tied(files: WeightFiles) -> None:
    embedding, head = files[EMBEDDING], files[HEAD]
    same = embedding.get_shape() == head.get_shape()
    rows = head.get_shape()[0]
    for i in range(0, rows if same else 0, 4096):
        some = slice(i, min(i + 4096, rows))  # slices of a file do not stop at its end by themselves
        same = same and np.array_equal(embedding[some], head[some])
    if not same:
        raise PretrainedError(
            f"{files.where(HEAD)} differs from {EMBEDDING}, though config.json ties them "
            "(tie_word_embeddings): set it to false to use this head, or take the tensor out."
        )


def save(
    directory: Path,
    params: PyTree,
    config: TransformerConfig,
    *,
    source: Path | None = None,
    dtype: str | None = None,
    extra: Mapping[str, Any] | None = None,
    shard_bytes: int = 2 * 2**30,
) -> None:
    """Writes a Hugging Face directory that `transformers` and all that reads such directories can load.

    All of it or nothing: it is written beside its place and then renamed; in a store each file is written on disk and
    copied, config.json last, without which it is no model. Of several processes, each of which must call
    it, the first writes; what is split over hosts comes to it a layer's matrix at a time.

    Args:
      directory: to be made; must not exist, or be empty.
      params: of `make_policy(config)`; adapters in them are added to their weights.
      config: their configuration.
      source: a directory whose config.json, tokenizer and template files are carried along; it may also hold a
        tokenizer alone. Of a reward model, that of the language model from which it was made will do.
      dtype: of the tensors written; None for the parameters' own.
      extra: entries of config.json beyond the decoder's, such as eos_token_id and max_position_embeddings.
      shard_bytes: weights above this are split over several files with an index; the host holds this much.

    Raises:
      PretrainedError: the directory is in use, `source` is not there or of another model, no family of Hugging
        Face's describes this one, `params` are not of `config`, or the disk is full.
    """
    directory, source = storage.path(directory), None if source is None else storage.path(source)
    if not hosts.is_first():  # its part in handing them over
        for _, x in _leaves(params, config):
            jax.block_until_ready(hosts.on_all(x))
        return
    _check_params(bare(params), config)
    raw = _config_of(config, source)
    written = _dtype(dtype or str(jax.tree.leaves(params)[0].dtype))
    raw["torch_dtype" if "torch_dtype" in raw else "dtype"] = str(written)
    raw |= extra or {}
    if differ := differences(config, parse_config(raw)):
        raise PretrainedError(f"`extra` would make config.json that of another model: {'; '.join(differ)}.")
    with made(directory) as part:
        _write_weights(part, _named(params, config, dtype), shard_bytes)
        if source is not None:
            _carry(source, part)
        storage.write(part / "config.json", (json.dumps(raw, indent=2, sort_keys=True) + "\n").encode())


def copy_description(source: Path, directory: Path) -> None:
    """Copies what says how to use the weights of a Hugging Face directory: config.json, tokenizer and templates.

    Raises:
      PretrainedError: there is no config.json, or the disk is full.
    """
    source, directory = storage.path(source), storage.path(directory)
    read_json(source / "config.json")
    with made(directory) as part:
        _carry(source, part)
        storage.copy(source / "config.json", part / "config.json")


def _carry(source: storage.Path, directory: storage.Path) -> None:
    for pattern in _CARRIED:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                storage.copy(path, directory / path.name)


def _check_params(params: PyTree, config: TransformerConfig) -> None:
    shapes = lambda tree: {jax.tree_util.keystr(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    found, wanted = shapes(params), shapes(abstract_params(config)[0])
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise PretrainedError(
                f"params{name} has shape {found.get(name)}; a model of this configuration has {wanted.get(name)} there."
            )


def _config_of(config: TransformerConfig, source: storage.Path | None) -> dict[str, Any]:
    """config.json: the source's own where it has one, which must describe this model; else written anew."""
    if source is not None and not source.is_dir():
        raise PretrainedError(f"source {source} is not a directory: expected one with a tokenizer to carry along.")
    if source is None or not (source / "config.json").exists():
        return write_config(config)
    raw = read_json(source / "config.json")
    raw = as_score(raw) if config.score and not read_config(source).score else raw
    if differ := differences(config, parse_config(raw)):
        raise PretrainedError(f"{source / 'config.json'} is of another model: {'; '.join(differ)}.")
    return raw


def _named(params: PyTree, config: TransformerConfig, dtype: str | None) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors one by one, on the host."""
    for tensor, x in _leaves(params, config):
        ours = np.asarray(hosts.fetched(x))
        theirs = tensor.write(ours.astype(jnp.dtype(dtype or ours.dtype), copy=False))
        # What devices hold, and on CPUs that is all of them, is not to stay while a file is filled.
        yield tensor.name, theirs.copy() if np.may_share_memory(theirs, ours) else theirs


def _leaves(params: PyTree, config: TransformerConfig) -> Iterator[tuple[Tensor, jax.Array]]:
    """Their tensors one by one, and what they are of ours, with adapters added."""
    tree, _, _ = layout(config)
    of_layer = lambda stack, i: jax.tree.map(lambda x: x[i], stack)  # of an adapter too

    def walk(tensors, ours):
        if isinstance(tensors, Tensor):
            yield tensors, _merged(ours) if isinstance(ours, Adapted) else ours
        elif isinstance(tensors, dict):
            for name in tensors:
                yield from walk(tensors[name], ours[name])
        else:  # a stack, or a list of layers or stacks
            for i, tensor in enumerate(tensors):
                yield from walk(tensor, of_layer(ours, i) if isinstance(tensor, Tensor) else ours[i])

    return walk(tree, params)


_merged = jax.jit(merged)  # a weight at a time: nobody holds a second model


def _write_weights(part: storage.Path, tensors: Iterator[tuple[str, np.ndarray]], shard_bytes: int) -> None:
    shards: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    total = parameters = 0

    def flush():
        if held:
            with storage.written(part / f"{len(shards)}.safetensors") as file:
                save_file(held, file, metadata={"format": "pt"})
            shards.append(list(held))
            held.clear()

    for name, tensor in tensors:
        if sum(x.nbytes for x in held.values()) + tensor.nbytes > shard_bytes:
            flush()
        held[name] = tensor
        total, parameters = total + tensor.nbytes, parameters + tensor.size
    flush()
    if len(shards) == 1:
        storage.move(part / "0.safetensors", part / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        storage.move(part / f"{i}.safetensors", part / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total, "total_parameters": parameters}, "weight_map": weight_map}
    described = json.dumps(index, indent=2, sort_keys=True) + "\n"
    storage.write(part / "model.safetensors.index.json", described.encode())

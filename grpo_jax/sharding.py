"""A mesh, and the one table from logical axes (what a dimension is) to mesh axes (where it lies)."""

import collections
import dataclasses
import functools
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

__all__ = [
    "BATCH_AXES",
    "RULES",
    "SAMPLER_RULES",
    "MeshConfig",
    "batch_sharding",
    "between_slices",
    "cpu_threads",
    "device_bytes",
    "make_mesh",
    "per_device",
    "replicated",
    "shardings",
    "warn_once",
]

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # prompts and completions are split over both

Rules: TypeAlias = Mapping[str, str | tuple[str, ...] | None]

# fsdp splits every matrix along the model width; tensor splits heads, hidden units and the vocabulary.
RULES: Rules = {
    "batch": BATCH_AXES,
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head": None,
    "mlp": "tensor",
    "vocab": "tensor",
}
# The sampler gathers over fsdp once a rollout, in `prepare`, and not once a token.
SAMPLER_RULES: Rules = {**RULES, "embed": None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis of the mesh."""

    data: int = 1  # copies of the parameters, each with its part of the batch
    fsdp: int = 1  # parts of the parameters and optimizer state; splits the batch too
    tensor: int = 1  # parts of every layer


def _slice_of(device: Any) -> int:
    return getattr(device, "slice_index", None) or 0


def cpu_threads(devices: int) -> int:
    """PJRT_NPROC for a CPU that is made so many devices.

    What each device runs, and what is handed to it next, takes a thread of one pool, which has as many as there are
    cores or devices. A device that finds none lets the others wait in their collective until XLA ends the process.
    """
    return max(4 * devices, os.cpu_count() or 1)


def make_mesh(
    config: MeshConfig = MeshConfig(), devices: Sequence[Any] | None = None, slice_of: Callable[[Any], int] = _slice_of
) -> Mesh:
    """A mesh with axes data, fsdp and tensor over the first devices there are.

    Where devices are in several slices (TPU pods, or nodes of GPUs, between which links are slow), those of one stand
    together: `data` goes over the slices, and the other axes stay within one, as far as `data` is a multiple of their
    number. Then one sum of gradients is all that an update sends from slice to slice.

    Args:
      config: devices along each axis.
      devices: None: all there are.
      slice_of: the number of a device's slice.

    Raises:
      ValueError: an axis below 1, more devices asked for than there are, or not as many of each slice.
    """
    sizes = tuple(getattr(config, axis) for axis in MESH_AXES)
    devices = list(jax.devices() if devices is None else devices)
    wanted = " x ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    if min(sizes) < 1:
        raise ValueError(f"mesh {wanted}: every axis must be 1 or more.")
    if math.prod(sizes) > len(devices):
        more = (
            f" (XLA_FLAGS=--xla_force_host_platform_device_count={math.prod(sizes)} PJRT_NPROC="
            f"{cpu_threads(math.prod(sizes))} in the environment make so many of a CPU, with threads enough.)"
        )
        raise ValueError(
            f"mesh {wanted} needs {math.prod(sizes)} devices; there are {len(devices)} {devices[0].platform} devices."
            + (more if devices[0].platform == "cpu" else "")
        )
    chosen = sorted(devices, key=slice_of)[: math.prod(sizes)]
    of_slices = collections.Counter(map(slice_of, chosen))
    if len({*of_slices.values()}) > 1:
        raise ValueError(
            f"mesh of {len(chosen)} devices takes {', '.join(map(str, of_slices.values()))} of slices that it must "
            "share alike: make it a multiple of their number."
        )
    mesh = Mesh(np.asarray(chosen).reshape(sizes), MESH_AXES)
    # Over nodes of GPUs fsdp is what everybody does.
    slow = {*between_slices(mesh, slice_of)} & {"tensor", *(["fsdp"] if chosen[0].platform == "tpu" else [])}
    if slow:
        warn_once(
            f"mesh: {' and '.join(sorted(slow))} goes from slice to slice, where links are slow and what it sends is "
            f"much; --mesh.data={len(of_slices)}, or a multiple, keeps it within one of the {len(of_slices)}."
        )
    return mesh


def between_slices(mesh: Mesh, slice_of: Callable[[Any], int] = _slice_of) -> tuple[str, ...]:
    """The axes along which a mesh goes from one slice of devices to another."""
    slices = np.vectorize(slice_of)(mesh.devices)
    differs = lambda axis: bool((slices != slices.take([0], axis=axis)).any())
    return tuple(name for axis, name in enumerate(mesh.axis_names) if differs(axis))


@functools.cache
def warn_once(text: str) -> None:
    """Logs a warning, unless it has been logged before."""
    logging.getLogger(__name__).warning(text)


def _spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, rules: Rules, name: str) -> PartitionSpec:
    spec, used = [], set()
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and axis not in rules:
            raise ValueError(f"{name}: unknown logical axis {axis!r}; the rules know {sorted(rules)}.")
        target = rules[axis] if axis is not None else None
        target = (target,) if isinstance(target, str) else tuple(target or ())
        for mesh_axis in target:
            if mesh_axis not in mesh.shape:
                raise ValueError(
                    f"logical axis {axis!r} maps to unknown mesh axis {mesh_axis!r}; has {mesh.axis_names}."
                )
            if mesh_axis in used:
                raise ValueError(f"{name}: mesh axis {mesh_axis!r} is used twice by logical axes {axes}.")
        parts = math.prod(mesh.shape[a] for a in target)
        if size % parts:
            alike = re.sub(r"\[\d+\]", "[i]", name)  # layers, which are many
            warn_once(f"{alike}: {axis} of size {size} does not divide over {target} ({parts} parts): replicated.")
            target = ()
        used.update(target)
        spec.append(target if len(target) > 1 else (target[0] if target else None))
    return PartitionSpec(*spec)


def shardings(abstract: Any, axes: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Where each leaf of a tree lies.

    Args:
      abstract: tree of arrays or ShapeDtypeStructs.
      axes: the same tree, leaves are tuples of logical axis names (None = not split).
      mesh: the mesh.
      rules: logical axis -> mesh axis, axes, or None.

    Returns:
      The same tree of NamedShardings. A dimension that its mesh axes do not divide is replicated, with
      a line in the log.

    Raises:
      ValueError: an unknown logical or mesh axis, or a mesh axis used twice in one leaf.
    """

    def one(path, leaf, leaf_axes):
        name = jax.tree_util.keystr(path) or "an array"
        return NamedSharding(mesh, _spec(leaf_axes, leaf.shape, mesh, rules, name))

    return jax.tree_util.tree_map_with_path(one, abstract, axes)


def device_bytes(abstract: Any, axes: Any, mesh: Mesh, rules: Rules = RULES) -> int:
    """Bytes of a tree on one device, where `shardings` puts it."""
    places = jax.tree.leaves(shardings(abstract, axes, mesh, rules))
    sizes = zip(jax.tree.leaves(abstract), places, strict=True)
    return sum(math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize for x, place in sizes)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def per_device(
    function: Callable[..., Any], mesh: Mesh | None, axes: str | tuple[str, ...] = "fsdp", whole: int = 0
) -> Callable[..., Any]:  # fmt: skip
    """`function` of what each device has: the leading axis of all arguments and results is split over `axes`.

    The first `whole` arguments are the same on every device. In the train step, whose `vmap` splits over data, the axes
    are fsdp alone. For what indexes by computed indices, of which XLA does not know that they stay within a device's
    own rows. Not to be differentiated: over tensor, its transpose would sum up gradients that are the same everywhere.
    """
    if mesh is None or mesh.size == 1:
        return function
    rows = PartitionSpec(axes)

    def split(*args):
        specs = (PartitionSpec(),) * whole + (rows,) * (len(args) - whole)
        # Scans under a vmap that names an axis do not pass the check.
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)(*args)

    return split

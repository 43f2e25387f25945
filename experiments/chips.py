"""Chips that one may plan for: what their makers publish of them, and what compilers want to know of those not here.

Rates are peaks of one chip. Makers publish what goes over links in both directions together; what a chip can send is
half of it. What goes over the network, from slice to slice, is published of a chip, or of a pod of 256. Memory is in
decimal units, as published: a little of it is taken before a program starts.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax
from jax.experimental import topologies

from grpo_jax.floors import Rates

__all__ = ["CHIPS", "Chip", "absent", "chip_of", "devices_of"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of chip."""

    rates: Rates
    memory: float  # bytes
    source: str  # the page of its maker
    target: str = ""  # of a GPU: how XLA describes it, `GpuTargetConfigProto` in text form


def _hopper(name: str, memory: int, bandwidth: int) -> str:
    """What XLA knows of a GPU of compute capability 9.0: NVIDIA's CUDA programming guide, and what drivers report."""
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 }}
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  device_memory_size: {memory} memory_bandwidth: {bandwidth} l2_cache_size: {50 * 2**20}
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: {228 * 2**10} shared_memory_per_block: {48 * 2**10}
  shared_memory_per_block_optin: {227 * 2**10}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 2 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{name}"
"""


_GOOGLE, _NVIDIA = "https://docs.cloud.google.com/tpu/docs", "https://www.nvidia.com/en-us/data-center"
CHIPS = {
    "v4": Chip(rates=Rates(flop=275e12, memory=1200e9, interconnect=300e9 / 2), memory=32e9, source=f"{_GOOGLE}/v4"),
    "v5e": Chip(
        rates=Rates(flop=197e12, memory=819e9, interconnect=400e9 / 2, network=6.4e12 / 8 / 256), memory=16e9,
        source=f"{_GOOGLE}/v5e",
    ),
    "v5p": Chip(
        rates=Rates(flop=459e12, memory=2765e9, interconnect=1200e9 / 2, network=50e9 / 8), memory=95e9,
        source=f"{_GOOGLE}/v5p",
    ),
    "v6e": Chip(
        rates=Rates(flop=918e12, memory=1638e9, interconnect=800e9 / 2, network=25.6e12 / 8 / 256), memory=32e9,
        source=f"{_GOOGLE}/v6e",
    ),
    "h100": Chip(
        rates=Rates(flop=989e12, memory=3.35e12, interconnect=900e9 / 2), memory=80e9, source=f"{_NVIDIA}/h100/ (SXM)",
        target=_hopper("NVIDIA H100 80GB HBM3", 84_978_434_048, 3_352_320_000_000),
    ),
    "h200": Chip(
        rates=Rates(flop=989e12, memory=4.8e12, interconnect=900e9 / 2), memory=141e9, source=f"{_NVIDIA}/h200/ (SXM)",
        target=_hopper("NVIDIA H200", 150_754_820_096, 4_814_400_000_000),
    ),
}  # fmt: skip

# Slices that one can have (the pages above): of a plane, and of a torus up to one cube of 64 chips.
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBES = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4))

# libtpu reads these when it is loaded, and otherwise looks for a TPU, and for the machine that has it.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip


def absent() -> None:
    """Has JAX compute on the CPU, and libtpu look for no TPU; to be called before JAX or libtpu has begun."""
    os.environ.update(_ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")


def chip_of(topology: str) -> tuple[Chip, str]:
    """The chip of `v5e:8x8`, and how many of them: `8x8`.

    Raises:
      ValueError: it is no topology, or not one of these chips.
    """
    name, _, shape = topology.partition(":")
    if name not in CHIPS or not shape or not all(size.isdecimal() and int(size) for size in shape.split("x")):
        raise ValueError(
            f"topology={topology!r} must be a chip among {', '.join(CHIPS)} and how many: v5e:8x8, v5p:4x4x4; of GPUs "
            "hosts x GPUs of a host, or GPUs alone: h100:2x8, h100:8."
        )
    return CHIPS[name], shape


def _check_shape(topology: str, sizes: Sequence[int]) -> None:
    """Raises ValueError where a chip has no slice of this shape: for some of them libtpu ends the process."""
    flat = topology.startswith(("v5e", "v6e"))
    known = _FLAT if flat else _CUBES
    if tuple(sizes) not in known and (flat or len(sizes) != 3 or any(size % 4 for size in sizes)):
        names = ", ".join("x".join(map(str, shape)) for shape in known)
        raise ValueError(
            f"topology={topology}: there is no such slice. There are {names}"
            + ("." if flat else ", and others of three multiples of 4, 4x4x8.")
        )


def _check_libtpu(topology: str) -> None:
    """Raises ValueError unless libtpu is there, of a version that JAX goes with: others speak another language."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"topology={topology}: compiling for TPUs needs their compiler: pip install -e '.[tpu]'.")
    installed = metadata.version("libtpu")
    pins = (
        re.match(r"libtpu\s*==\s*([\w.]+?)(\.\*)?\s*(;|$)", required) for required in metadata.requires("jax") or ()
    )
    wanted = [pin[1] for pin in pins if pin]
    if wanted and not any(f"{installed}.".startswith(f"{version}.") for version in wanted):
        raise ValueError(
            f"topology={topology}: libtpu {installed} is installed, and jax {jax.__version__} goes with {wanted[0]}, "
            "which pip install -e '.[tpu]' brings."
        )


def devices_of(topology: str, slices: int = 1) -> Sequence[Any]:
    """Devices of a topology that is not here, to compile for; `absent` comes first.

    Args:
      topology: a chip and how many, of each slice.
      slices: of TPUs, that a data-centre network joins.

    Raises:
      ValueError: as `chip_of`, or what compiles for such chips is not installed, or does not know the topology; GPUs
        have no slices.
    """
    chip, shape = chip_of(topology)
    if slices < 1 or (slices > 1 and chip.target):
        raise ValueError(f"slices={slices} of {topology} must be 1 or more, and of GPUs 1: say hosts x GPUs, h100:2x8.")
    if not chip.target:
        _check_libtpu(topology)
        sizes = [int(size) for size in shape.split("x")]
        _check_shape(topology, sizes)
        # Hosts have four chips, unless there are fewer.
        few = {"chips_per_host_bounds": [*sizes, 1, 1][:3]} if math.prod(sizes) < 4 else {}
        try:
            return topologies.get_topology_desc(
                platform="tpu", topology_name=topology, num_slices=slices, **few
            ).devices
        except Exception as error:
            raise ValueError(f"topology={topology} is none that libtpu knows: {error}") from error
    if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda12") is None:
        raise ValueError(
            f"topology={topology}: compiling for GPUs needs jax-cuda12-plugin and jax-cuda12-pjrt of JAX's version, "
            f"{jax.__version__}: pip install --no-deps jax-cuda12-plugin=={jax.__version__} "
            f"jax-cuda12-pjrt=={jax.__version__}."
        )
    sizes = shape.split("x")
    if len(sizes) > 2:
        raise ValueError(f"topology={topology}: of GPUs give hosts x GPUs of a host, as in h100:2x8.")
    hosts, gpus = ["1", *sizes][-2:]
    return topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=chip.target, topology=f"1x{hosts}x{gpus}"
    ).devices

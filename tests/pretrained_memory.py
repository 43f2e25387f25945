"""What `load` and `save` hold of the host's memory beyond the arrays, over 8 CPU devices, or on several hosts (Linux).

    python -m tests.pretrained_memory make DIRECTORY MIB DTYPE
    python -m tests.pretrained_memory load DIRECTORY data=2 fsdp=2 tensor=2
    python -m tests.pretrained_memory host DIRECTORY EXPORT --distributed fsdp=4

`make` writes a random model of about so many MiB in several files. `load` prints JSON in bytes and seconds: `arrays`,
what the arrays take; `peak_beyond_arrays`, by how much the process' anonymous memory grew beyond that at its highest;
`rss_beyond_arrays`, the same with the pages of the mapped files, which the kernel drops when it needs them;
`largest_tensor` of the files; `load` and `read`, seconds, the latter for reading the files and nothing else.

`host` is one of several processes (`hosts.initialize` says what `--distributed` may be), which load together and export
to EXPORT. Each prints to the standard error: `arrays`, its own; `load`, `save` and `whole`, by how much its anonymous
memory grew at its highest while it loaded, exported for the second time (the first compiles), and at last read all
files whole, which nothing here should do.
"""

import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterator

os.environ["JAX_PLATFORMS"] = "cpu"
if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    os.environ.setdefault("PJRT_NPROC", "32")  # as in conftest

import jax
import jax.numpy as jnp
from safetensors import safe_open
from safetensors.numpy import load_file

from grpo_jax import hosts
from grpo_jax.models.pretrained import load, read_config, save
from grpo_jax.models.transformer import TransformerConfig, abstract_params
from grpo_jax.sharding import MeshConfig, make_mesh
from grpo_jax.types import PyTree

MIB = 2**20
FILES = 5  # of what `make` writes
FILE = 24 * MIB  # of what `host` exports


def model(parameters: int) -> TransformerConfig:
    """A model of about so many parameters: of small tensors, or, from 2**27 on, with an embedding of 2**27."""
    width, mlp_width, vocab_size = (512, 2048, 2048) if parameters < 2**27 else (1024, 4096, 128 * 1024)
    one = TransformerConfig(
        vocab_size=vocab_size, layers=1, width=width, mlp_width=mlp_width, heads=8, kv_heads=2, head_width=width // 8,
        scale_embedding=False,
    )  # fmt: skip
    layer = sum(x.size for x in jax.tree.leaves(abstract_params(one)[0]["layers"]))
    return dataclasses.replace(one, layers=max(2, round((parameters - vocab_size * width) / layer)))


def make(directory: pathlib.Path, mib: int, dtype: str) -> None:
    config = model(mib * MIB // jnp.dtype(dtype).itemsize)
    shapes, _ = abstract_params(config)
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    params = [jax.random.normal(key, x.shape, dtype) for key, x in zip(keys, leaves, strict=True)]
    save(directory, tree.unflatten(params), config, shard_bytes=mib * MIB // FILES)


def memory() -> dict[str, int]:
    lines = (line.split() for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[0] in ("RssAnon:", "VmRSS:")}


@contextlib.contextmanager
def growth() -> Iterator[dict[str, int]]:
    """By how much this process' memory has grown at its highest, once the block has ended."""
    # What was freed before and not given back would be used first, and not be seen.
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before, peak, done = memory(), memory(), threading.Event()

    def watch():
        while not done.wait(0.002):
            for name, now in memory().items():
                peak[name] = max(peak[name], now)

    watcher = threading.Thread(target=watch)
    watcher.start()
    grown: dict[str, int] = {}
    try:
        yield grown
    finally:
        done.set()
        watcher.join()
        grown.update({name: peak[name] - before[name] for name in peak})


def bytes_here(params: PyTree) -> int:
    return sum(shard.data.nbytes for x in jax.tree.leaves(params) for shard in x.addressable_shards)


def measured_load(directory: pathlib.Path, mesh: jax.sharding.Mesh) -> dict[str, float]:
    jnp.zeros(1).block_until_ready()  # the backend's own memory is there before
    start = time.perf_counter()
    with growth() as grown:
        params = jax.block_until_ready(load(directory, mesh, dtype=None))
        seconds = time.perf_counter() - start
    arrays = bytes_here(params)
    return {
        "arrays": arrays,
        "peak_beyond_arrays": grown["RssAnon"] - arrays,
        "rss_beyond_arrays": grown["VmRSS"] - arrays,
        "load": seconds,
    }


def measured_host(directory: pathlib.Path, export: pathlib.Path, mesh: jax.sharding.Mesh) -> dict[str, int]:
    """Of one of several processes: all of them at each of these at the same time."""
    hosts.agreed(0)
    with growth() as loading:
        params = jax.block_until_ready(load(directory, mesh, dtype=None))
    save(export.with_name("before"), params, read_config(directory), shard_bytes=FILE)
    hosts.agreed(0)
    with growth() as saving:
        save(export, params, read_config(directory), shard_bytes=FILE)
    hosts.agreed(0)
    with growth() as reading:
        whole = [load_file(path) for path in sorted(export.glob("*.safetensors"))]
        assert sum(x.nbytes for tensors in whole for x in tensors.values()) > bytes_here(params)
    each = {"load": loading, "save": saving, "whole": reading}
    return {"arrays": bytes_here(params)} | {name: grown["RssAnon"] for name, grown in each.items()}


def read(paths: list[pathlib.Path]) -> float:
    start, buffer = time.perf_counter(), bytearray(64 * MIB)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def largest_tensor(paths: list[pathlib.Path]) -> int:
    files = [safe_open(path, "numpy") for path in paths]
    return max(file.get_tensor(name).nbytes for file in files for name in file.keys())  # noqa: SIM118


if __name__ == "__main__":
    command, directory = sys.argv[1], pathlib.Path(sys.argv[2])
    if command == "make":
        make(directory, int(sys.argv[3]), sys.argv[4])
    else:
        sizes = lambda words: MeshConfig(**{name: int(size) for name, size in (word.split("=") for word in words)})
        if command == "host":
            hosts.initialize(sys.argv[4])
            said = measured_host(directory, pathlib.Path(sys.argv[3]), make_mesh(sizes(sys.argv[5:])))
            print(json.dumps(said), file=sys.stderr)  # all of them may speak there
        else:
            measured = measured_load(directory, make_mesh(sizes(sys.argv[3:])))
            paths = sorted(directory.glob("*.safetensors"))
            print(json.dumps({**measured, "read": read(paths), "largest_tensor": largest_tensor(paths)}))

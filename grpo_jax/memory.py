"""How much memory a device has, and how much a function needs, by its jaxpr: batches are cut to what there is."""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from grpo_jax import hosts

__all__ = ["device_memory", "least_memory", "most_alive", "parts_that_fit"]


def _container_limits(root: str = "/sys/fs/cgroup") -> list[int]:
    """Bytes that a container may have, by Linux' control groups of version 2 and 1; none where there is no limit."""
    paths = [pathlib.Path(root, name) for name in ("memory.max", "memory/memory.limit_in_bytes")]
    said = [path.read_text().strip() for path in paths if path.exists()]
    return [int(text) for text in said if text.isdecimal()]


def device_memory() -> int | None:
    """Bytes of a device, or its part of the host's memory where it is a CPU; None: it does not say."""
    device, *others = jax.local_devices()
    if device.platform == "cpu":
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return min([host, *_container_limits()]) // (1 + len(others))
    return (device.memory_stats() or {}).get("bytes_limit")


def least_memory() -> int | None:
    """`device_memory`, the least of all processes', so that they cut batches alike; None: one does not say."""
    said = hosts.gathered(device_memory())
    return None if None in said else min(said)


def most_alive(jaxpr: Any, given: Sequence[int] = ()) -> int:
    """Bytes alive at the worst moment of a jaxpr: `given` of its arguments, which it may overwrite, and what it makes.

    As if a compiler made no array of a broadcast or of another shape, and wrote what is elementwise over what it is
    made of, but no product. Of a loop it sees one round.
    """
    is_variable = lambda x: not hasattr(x, "val")
    last_use = {x: i for i, equation in enumerate(jaxpr.eqns) for x in filter(is_variable, equation.invars)}
    last_use |= dict.fromkeys(filter(is_variable, jaxpr.outvars), len(jaxpr.eqns))
    alive = dict(zip(jaxpr.invars, given, strict=False))
    most = sum(alive.values())
    for i, equation in enumerate(jaxpr.eqns):
        name = equation.primitive.name
        dying = [alive.pop(x, 0) if is_variable(x) and last_use[x] == i else 0 for x in equation.invars]
        made = [x.aval.size * x.aval.dtype.itemsize for x in equation.outvars]
        if name in ("broadcast_in_dim", "iota", "dynamic_update_slice"):  # the last writes into an argument
            made = [0] * len(made)
        elif name in ("reshape", "squeeze", "expand_dims"):
            made = [sum(dying)]
        parts = [x for value in equation.params.values() for x in (value if isinstance(value, tuple) else (value,))]
        inner = [getattr(x, "jaxpr", x) for x in parts if hasattr(getattr(x, "jaxpr", x), "eqns")]
        both = sum(dying) + sum(made) if name == "dot_general" else max(sum(dying), sum(made))
        most = max(most, sum(alive.values()) + max([both, *(most_alive(part, dying) for part in inner)]))
        alive |= dict(zip(equation.outvars, made, strict=True))
    return most


def parts_that_fit(
    rows: int, columns: int, bytes_of: Callable[[int], int], room: float, tokens: int = 2**13
) -> int:  # fmt: skip
    """Into how many equal parts rows are cut, each after the other.

    The fewest whose rows need no more than `room`, and hold no more than `tokens` (or one row): of more a device is
    not faster, and the more parts, the fewer rows are run where short sequences share some.

    Args:
      rows: of a device.
      columns: of a row.
      bytes_of: rows at a time -> bytes, what a pass over them needs at the worst moment.
      room: bytes there are.
    """
    sizes = [rows // parts for parts in range(1, rows + 1) if rows % parts == 0]
    small = [size for size in sizes if size * columns <= tokens] or [1]
    return rows // next((size for size in small if room == float("inf") or bytes_of(size) <= room), 1)

"""Several processes that run one program: the same script on every host, as JAX wants it.

All of them hold the same host values and take the same decisions; what differs is only who does what: each reads its
prompts and scores its completions, each device holds its part of the arrays, and the first process writes files and
speaks.
Whatever only one of them sees (a signal, an error, a file) is told to all before anybody acts on it.

With one process everything here is what its name says, and costs nothing.
"""

import collections
import contextlib
import functools
import itertools
import json
import os
import pathlib
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from grpo_jax import sharding
from grpo_jax.types import PyTree

__all__ = [
    "HEARTBEAT",
    "HostError",
    "agreed",
    "check_mesh",
    "ends_with",
    "fetched",
    "first_does",
    "gathered",
    "held",
    "initialize",
    "is_first",
    "moved",
    "on_all",
    "own_mesh",
    "put",
    "share",
    "together",
]

_T = TypeVar("_T")
_SAID = 1000  # bytes of an error that other processes hear of
HEARTBEAT = 60  # seconds without a sign of life after which a process counts as dead, and all others end
_SHUTDOWN = 10  # seconds that one which ends with an error waits for the others, before they are told
_STILL = 30  # seconds between two lines that say that this process waits for others to come


class HostError(RuntimeError):
    """A process could not go on, or did not come where the others waited for it."""


def initialize(asked: str | None, heartbeat: int = HEARTBEAT, patience: int = 300) -> str:
    """Joins this process to the others of a run; to be called before JAX is asked for anything.

    Where the others do not come, it ends the process with a line, for JAX would do so with pages. The standard output
    of all but the first goes nowhere from here on: they say the same. Errors and warnings go to the standard error of
    each.

    Args:
      asked: `off`: there are no others. `auto`: TPU pod slices, Slurm and Open MPI say who they are. Elsewhere
        `HOST:PORT,PROCESS,COUNT`: where the first process can be reached, which one this is, from 0, and how many.
      heartbeat: seconds after which a process that gives no sign of life counts as dead.
      patience: seconds that it waits for the others.

    Returns:
      A line for the screen, empty where there are no others.

    Raises:
      ValueError: it is none of these, or nothing here says who is who.
      HostError: the others did not come.
    """
    if asked == "off":
        return ""
    options: dict[str, Any] = {"heartbeat_timeout_seconds": heartbeat, "shutdown_timeout_seconds": _SHUTDOWN}
    options["initialization_timeout"] = patience + 60  # we are there before
    if asked != "auto":
        match = re.fullmatch(r"(\S+:\d+),(\d+),(\d+)", asked or "")
        if match is None or not int(match[2]) < int(match[3]):
            raise ValueError(
                f"--distributed={asked or ''} must be off, auto or HOST:PORT,PROCESS,COUNT with PROCESS from 0 to "
                "COUNT - 1, as 10.0.0.1:8476,0,2 and 10.0.0.1:8476,1,2."
            )
        _check_address(match[1])
        options |= {"coordinator_address": match[1], "process_id": int(match[2]), "num_processes": int(match[3])}
        options["cluster_detection_method"] = "deactivate"
    # It would take SIGTERM for itself; `loop.StopSignals` agrees on it between steps, and between tokens.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with _waiting(f"--distributed={asked}", patience):
            jax.distributed.initialize(**options)
    except ValueError as error:
        if asked != "auto":
            raise ValueError(f"--distributed={asked}: {error}") from error
        raise ValueError(
            f"--distributed=auto finds no TPU pod slice, Slurm or MPI job ({error}): say who is who, as "
            "--distributed=HOST:PORT,PROCESS,COUNT."
        ) from error
    except jax.errors.JaxRuntimeError as error:
        raise HostError(f"not all processes of --distributed={asked} came: {error!s:.500}") from error
    if options.get("num_processes") not in (None, jax.process_count()):
        raise HostError(
            f"--distributed={asked} says how many processes there are, and {jax.process_count()} have come."
        )
    if not is_first():
        sys.stdout = pathlib.Path(os.devnull).open("w")  # noqa: SIM115, for as long as the process runs
    devices = f"{jax.device_count()} devices, {jax.local_device_count()} of them here"
    count = f"{jax.process_count()} process{'es' if jax.process_count() > 1 else ''}"
    return f"{count}, of which this is number {jax.process_index()}; {devices}"


@contextlib.contextmanager
def _waiting(what: str, patience: int) -> Iterator[None]:
    """While JAX waits for the other processes, where Python hears no signal: says so, and ends it when that is over.

    Ctrl-C ends the process at once, without a word.
    """
    came = threading.Event()

    def watch() -> None:
        say = lambda text: sys.stderr.write(f"{what}: {text}\n")  # at once, for JAX writes there too
        say(f"waiting for the other processes, for {patience} s at most")
        until = time.monotonic() + patience
        while not came.wait(min(_STILL, max(0.0, until - time.monotonic()))):
            if time.monotonic() >= until:
                say(
                    f"error: not all processes came within {patience} s. Start as many as it says, each with a number "
                    "of its own and the address of the first."
                )
                os._exit(1)
            say("still waiting for the other processes")

    threading.Thread(target=watch, name="waiting", daemon=True).start()
    handler = None
    with contextlib.suppress(ValueError):  # not in the main thread
        handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        came.set()
        if handler is not None:
            signal.signal(signal.SIGINT, handler)


def ends_with(status: int) -> None:
    """Has this process, of several, end with a status while it may be that the others go on.

    They are waited for at the end of the interpreter, that all may end well; where they do not come, JAX would end this
    one with pages and a status of its own a second later.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        last = threading.Timer(_SHUTDOWN - 1, os._exit, (status,))
        last.daemon = True
        last.start()


def _check_address(address: str) -> None:
    """Raises ValueError where nobody can be reached there, which JAX would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        if not 0 < int(port) < 2**16:
            raise ValueError(f"--distributed={address},...: a port is a number from 1 to 65535.")
        socket.getaddrinfo(host.strip("[]"), int(port))
    except OSError as error:
        raise ValueError(f"--distributed={address},...: there is no machine {host!r} ({error}).") from error


def is_first() -> bool:
    """Whether this process writes and speaks."""
    return jax.process_index() == 0


def share(places: range, process: int | None = None) -> range:
    """Which of these a process does, None: this one; in order, to within one the same number each."""
    process, count = jax.process_index() if process is None else process, jax.process_count()
    return places[len(places) * process // count : len(places) * (process + 1) // count]


def check_mesh(mesh: Mesh) -> None:
    """Raises ValueError unless every device of every process is in the mesh: all take part in all programs."""
    if jax.process_count() > 1 and mesh.size != jax.device_count():
        shape = " x ".join(f"{name}={size}" for name, size in mesh.shape.items())
        raise ValueError(
            f"mesh {shape} has {mesh.size} devices, and {jax.process_count()} processes have {jax.device_count()} "
            "together: give a mesh of all of them."
        )


def own_mesh(mesh: Mesh) -> Mesh:
    """This process's devices of a mesh, all along fsdp, for what it computes alone; with one process the mesh itself.

    One thread starts all programs of a process, so that on all of its devices they stand in one order, those that are
    its own between those of all. One of its own waits for no other process, and those of all are in the same order
    everywhere: so nobody waits for ever, wherever each puts its own, and however many.

    Raises:
      ValueError: processes have different numbers of devices there: what they plan would differ.
    """
    if jax.process_count() == 1:
        return mesh
    counts = collections.Counter(device.process_index for device in mesh.devices.flat)
    if len({*counts.values()}) > 1:
        raise ValueError(f"processes have {sorted(counts.values())} devices of the mesh: give each as many.")
    return sharding.make_mesh(sharding.MeshConfig(fsdp=len(mesh.local_devices)), mesh.local_devices)


# Arrays -----------------------------------------------------------------------------------------------


@functools.cache
def _everywhere(mesh: Mesh) -> Callable[[PyTree], PyTree]:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))


def on_all(tree: PyTree) -> PyTree:
    """Arrays that lie in parts on several hosts, whole on every device; others as they are. All must call it."""

    def one(x: Any) -> Any:
        split = isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
        return _everywhere(x.sharding.mesh)(x) if split else x  # pyright: ignore[reportAttributeAccessIssue]

    return jax.tree.map(one, tree)


def fetched(tree: PyTree) -> PyTree:
    """`jax.device_get`, also of arrays that lie in parts on several hosts, one array at a time. All must call it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)  # all at once
    return jax.tree.map(lambda x: jax.device_get(on_all(x)), tree)


def put(tree: PyTree, place: Sharding) -> PyTree:
    """Host arrays onto devices: each process hands over the parts that its devices hold, and needs no others."""
    if jax.process_count() == 1:
        return jax.device_put(tree, place)
    one = lambda x: jax.make_array_from_callback(x.shape, place, lambda index: x[index])
    return jax.tree.map(lambda x: one(np.asarray(x)), tree)


def held(count: int, place: Sharding) -> Sequence[int]:
    """Which of so many rows, placed so, this process's devices hold, in order; with one process all."""
    parts = filter(None, place.addressable_devices_indices_map((count,)).values())
    return sorted({row for (part,) in parts for row in range(count)[part]})


def moved(tree: PyTree, places: PyTree) -> PyTree:
    """Arrays on devices of all processes to other places, one at a time; also to this one's alone. All must call it."""
    if jax.process_count() == 1:
        return jax.device_put(tree, places)
    return jax.tree.map(lambda x, place: put(fetched(x), place), tree, places)


# Words ------------------------------------------------------------------------------------------------


def agreed(value: int) -> int:
    """The largest of what all processes say; all must call it."""
    if jax.process_count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def gathered(value: Any) -> Sequence[Any]:
    """What each process says, plain JSON, in their order; all must call it."""
    if jax.process_count() == 1:
        return [value]
    said = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(len(said)))).reshape(-1)
    padded = np.zeros(1 << int(lengths.max()).bit_length(), np.uint8)  # a power of two: few programs are compiled
    padded[: len(said)] = said
    every = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    return [json.loads(row[:length].tobytes()) for row, length in zip(every, lengths, strict=True)]


def together(
    compute: Callable[[], _T], *, kind: type[Exception] = HostError, also: tuple[type[Exception], ...] = (),
    waits_for: str = "were here", patience: float = 3600.0,
) -> _T:  # fmt: skip
    """What `compute` gives on this process, once it has ended on all of them; with one process, just that.

    Every process must call it. A process that dies is noticed by `jax.distributed`, which ends the others.

    Args:
      compute: runs once.
      kind: of error that says enough without its name, and that the others hear of, whatever happened.
      also: kinds that say enough too; where it was one of these, it is what the others hear of.
      waits_for: what is said of the processes that did not come: not all ...
      patience: seconds that a process waits for the others, when it has ended.

    Raises:
      kind, or one of `also`: on every process, if `compute` raised on any, with the number of the first such process
        and the beginning of what it said; `kind` if it did not end on all in time.
    """
    if jax.process_count() == 1:
        return compute()
    result, error, kinds = None, None, (kind, *also)
    try:
        result = compute()
    except Exception as raised:
        error = raised
    status = np.zeros(1 + _SAID, np.uint8)  # whether it failed, 1 + of which kind it is, and what it says
    if error is not None:
        said = str(error) if isinstance(error, kinds) else f"{type(error).__name__}: {error}"
        which = next((i for i, one in enumerate(kinds) if isinstance(error, one)), 0)
        text = bytes([1 + which]) + said.encode(errors="replace")[:_SAID]
        status[: len(text)] = np.frombuffer(text, np.uint8)
    try:
        _meet(patience)
    except Exception as late:
        raise kind(
            f"process {jax.process_index()} of {jax.process_count()}: not all processes {waits_for} within "
            f"{patience:g} s of each other: {late!s:.500}"
        ) from late
    every = np.asarray(multihost_utils.process_allgather(status)).reshape(-1, len(status))
    failed = np.flatnonzero(every[:, 0]).tolist()
    if failed:
        others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        of_kind, heard = kinds[every[failed[0], 0] - 1], every[failed[0], 1:].tobytes().rstrip(b"\0")
        raise of_kind(f"process {failed[0]} of {len(every)}{others}: {heard.decode(errors='replace')}") from error
    return result  # pyright: ignore[reportReturnType]


def first_does(compute: Callable[[], Any], *, kind: type[Exception] = HostError) -> None:
    """Files that are everybody's: the first process writes them, and none goes on before they are there.

    Raises:
      kind: on every process, if it raised.
    """
    together(compute if is_first() else lambda: None, kind=kind)


_meetings = itertools.count()  # the same on every process


def _meet(patience: float) -> None:
    """Waits for the other processes: longer than a collective would (gloo and NCCL give up after a minute or less)."""
    from orbax.checkpoint import multihost  # has a barrier that needs no device

    barrier, key, met = multihost.get_barrier_sync_fn(), f"grpo_jax/{next(_meetings)}", Future()

    def wait() -> None:
        try:
            met.set_result(barrier(key=key, timeout_ms=round(1000 * patience)))
        except BaseException as error:
            met.set_exception(error)

    # In a thread, since a signal would not be handled meanwhile; which ends with the process.
    threading.Thread(target=wait, name="barrier", daemon=True).start()
    met.result()

"""One run a workdir: a lock that ends with the process that holds it, however it ends; in a store, within a minute."""

import errno
import fcntl
import json
import os
import socket
import time
from typing import Any

from grpo_jax import storage
from grpo_jax.leases import InUse, Lease, owner
from grpo_jax.storage import Path
from grpo_jax.telemetry import WorkdirError

__all__ = ["lock"]

_HELD: dict[str, int] = {}  # open descriptors by path, until this process ends: to close one would drop its lock
_LEASES: dict[str, Lease] = {}


def lock(workdir: Path) -> None:
    """Holds `WORKDIR/.lock` until this process ends, SIGKILL included; done again by the same process, it does nothing.

    A POSIX record lock: it is of the process, children do not inherit it, and NFS has it too. Where a file system has
    no locks, nothing is held, and a line says so. In a store it is a `leases.Lease`, which outlives its holder by less
    than a minute.

    Raises:
      WorkdirError: another process holds it; the file says which.
    """
    path = workdir / ".lock"
    if storage.is_remote(path):
        _lease(workdir, path)
        return
    name = str(path.resolve())
    if name in _HELD and _same(_HELD[name], path):
        return
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise WorkdirError(f"cannot write to workdir {workdir}: {error}. Choose another --workdir.") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = owner(os.pread(file, 1000, 0))
        os.close(file)
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            print(f"workdir {workdir}: no lock ({error.strerror}), a second run there would go unnoticed", flush=True)
            return
        raise _in_use(workdir, holder) from error
    os.ftruncate(file, 0)
    os.pwrite(file, (json.dumps(_said()) + "\n").encode(), 0)
    _HELD[name] = file


def _lease(workdir: Path, path: Path) -> None:
    if (lease := _LEASES.get(str(path))) is not None and lease.held:
        return
    try:
        _LEASES[str(path)] = Lease(path, _said(), say=lambda line: print(line, flush=True))
    except InUse as error:
        raise _in_use(workdir, str(error)) from error
    except (ValueError, TimeoutError) as error:  # TensorStore's
        why = f"{error}" or "the store does not answer"
        raise WorkdirError(f"cannot write to workdir {workdir}: {why}. Choose another --workdir.") from error


def _said() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}


def _in_use(workdir: Path, holder: str) -> WorkdirError:
    return WorkdirError(
        f"workdir {workdir} is in use by {holder}. Wait until it has ended, or stop it, or choose another --workdir."
    )


def _same(file: int, path: Path) -> bool:
    """Whether that file is still the one at the path: someone may have removed the directory."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except OSError:
        return False

"""One run a workdir: a lock that ends with the process that holds it, however it ends."""

import errno
import fcntl
import json
import os
import pathlib
import socket
import time

from grpo_jax.telemetry import WorkdirError

__all__ = ["lock"]

_HELD: dict[str, int] = {}  # open descriptors by path, until this process ends: to close one would drop its lock


def lock(workdir: pathlib.Path) -> None:
    """Holds `WORKDIR/.lock` until this process ends, SIGKILL included; done again by the same process, it does nothing.

    A POSIX record lock: it is of the process, children do not inherit it, and NFS has it too. Where a file system has
    no locks, nothing is held, and a line says so.

    Raises:
      WorkdirError: another process holds it; the file says which.
    """
    path = workdir / ".lock"
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
        owner = _owner(os.pread(file, 1000, 0))
        os.close(file)
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            print(f"workdir {workdir}: no lock ({error.strerror}), a second run there would go unnoticed", flush=True)
            return
        raise WorkdirError(
            f"workdir {workdir} is in use by {owner}. Wait until it has ended, or stop it, or choose another --workdir."
        ) from error
    said = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    os.ftruncate(file, 0)
    os.pwrite(file, (json.dumps(said) + "\n").encode(), 0)
    _HELD[name] = file


def _same(file: int, path: pathlib.Path) -> bool:
    """Whether that file is still the one at the path: someone may have removed the directory."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except OSError:
        return False


def _owner(content: bytes) -> str:
    """Who the file says it is; in the moment between its lock and its line, nobody."""
    try:
        said = json.loads(content)
        return f"process {said['pid']} on {said['host']}, since {said['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"

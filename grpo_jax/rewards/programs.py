"""Programs, their limits, and the process at the other side of the sandbox that runs one after the other."""

import base64
import contextlib
import dataclasses
import glob
import importlib.util
import json
import os
import pathlib
import select
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from typing import Any

from grpo_jax.rewards import disk
from grpo_jax.rewards.fences import DEVICES, write_all
from grpo_jax.rewards.literals import encode

__all__ = ["Job", "ProgramLimits", "Ran", "SandboxError", "Worker", "call"]

# Read once: a worker that is replaced after hours is what the first one was, whatever has become of the files.
_MODULES = {
    f"grpo_jax.rewards.{name}": pathlib.Path(__file__).with_name(f"{name}.py").read_text()
    for name in ("literals", "fences", "disk", "confined")
}
_BOOTSTRAP = """
import json, sys, types
options = json.loads(sys.argv[1])
for name, text in {"grpo_jax": "", "grpo_jax.rewards": "", **options["modules"]}.items():
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(text, name, "exec"), module.__dict__)
module.start(options)
"""
_BUBBLE = "/grpo-sandbox"  # what can be written in bubblewrap's file tree
_GRACE = 30.0  # seconds beyond a program's wall time, after which the sandbox itself is broken
_START = 60.0  # seconds it may take to start
_LARGEST = 64 << 20  # bytes of a reply
_MOST_OUTPUT = 24_000  # KiB: twice that in base 64, and what stands around it, is a reply


class SandboxError(RuntimeError):
    """The sandbox itself is broken, or isolates less than was asked for; never what a program did."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramLimits:
    """What one program may use."""

    cpu_seconds: float = 2.0  # CPU time of a program, whatever else the machine does
    wall_seconds: float = 60.0  # a backstop for programs that sleep; far more than a busy machine needs
    memory_mib: int = 256  # address space
    file_mib: int = 16  # the temporary directory, of 1000 files and directories, 100 deep, and each file
    output_kib: int = 256  # of standard output, and of what calls return
    processes: int = 8  # processes and threads

    def __post_init__(self) -> None:
        if min(self.cpu_seconds, self.wall_seconds) <= 0:
            raise ValueError(f"cpu_seconds={self.cpu_seconds} and wall_seconds={self.wall_seconds} must be above 0.")
        if self.memory_mib < 64:
            raise ValueError(f"memory_mib={self.memory_mib} must be 64 or more: Python itself needs some 40.")
        if min(self.file_mib, self.output_kib, self.processes) < 1:
            raise ValueError(
                f"file_mib={self.file_mib}, output_kib={self.output_kib} and processes={self.processes} must be 1 or "
                "more."
            )
        if self.output_kib > _MOST_OUTPUT:
            raise ValueError(f"output_kib={self.output_kib} must be {_MOST_OUTPUT} or less.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A program, and what it is asked: calls of its functions, or standard input."""

    program: str
    calls: tuple[Mapping[str, Any], ...] | None = None  # each by `call`; None: it runs to its end, as a main program
    stdin: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ran:
    """What came of a program; all of it but `ended` and the times is what the program says."""

    ended: str  # exit: by itself or by a signal; else the limit that it has used up: cpu, wall, output or disk
    code: int  # its exit code, or minus the signal
    cpu_seconds: float  # its own, and of those of its processes that it has waited for
    seconds: float
    stdout: bytes
    # Of each call ("returned", JSON of `literals`) or ("raised", text); none where a limit has ended it.
    results: tuple[tuple[str, Any], ...]


def call(function: str, /, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
    """A call of a program's function with literals.

    Raises:
      Unsendable: an argument is no literal.
    """
    return {"call": function, "args": encode(list(args)), "kwargs": encode(kwargs)}


# A worker -------------------------------------------------------------------------------------------


def _visible() -> list[str]:
    """What a program may read of this host: Python's library, and the system's for what that loads."""
    python = [sysconfig.get_path("stdlib"), f"{sys.base_prefix}/lib", f"{sys.base_exec_prefix}/lib"]
    places = ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", *map(os.path.realpath, python)]
    return sorted(dict.fromkeys(places), key=len)  # what is below another is seen with it


def _hidden() -> list[str]:
    """What is installed beside Python's library: a program has that library alone."""
    found = [
        os.path.realpath(path) for place in _visible() for name in ("site-packages", "dist-packages")
        for path in glob.glob(f"{place}/python*/{name}")
    ]  # fmt: skip
    return sorted(set(found))


def _in_bubblewrap(seccomp: str | None, limits: ProgramLimits) -> list[str]:
    """The interpreter, where nothing but what is visible can be seen, and one directory alone can be written.

    That one is as large as a program's. Everything else is read-only without Landlock, too: what bubblewrap makes of
    itself (its root, its /dev with a /dev/shm) has no bound.
    """
    bwrap, python = shutil.which("bwrap"), os.path.realpath(sys.executable)
    if bwrap is None:
        raise SandboxError("bwrap is not installed")
    shown = [word for path in (*_visible(), python) for word in ("--ro-bind-try", path, path)]
    empty = [word for path in _hidden() for word in ("--tmpfs", path, "--remount-ro", path)]
    devices = [word for path in DEVICES for word in ("--dev-bind", path, path)]
    return [
        bwrap, "--unshare-all", "--new-session", "--cap-drop", "ALL", "--hostname", "sandbox", "--proc", "/proc",
        "--tmpfs", "/dev", *devices, "--remount-ro", "/dev", "--size", str(limits.file_mib << 20), "--tmpfs", _BUBBLE,
        *shown, *empty, *(["--ro-bind", seccomp, seccomp] if seccomp else []), "--remount-ro", "/", python,
    ]  # fmt: skip


class Worker:
    """A process that runs a program after the other; of one thread at a time."""

    def __init__(self, mechanism: str, limits: ProgramLimits, workers: int = 1):
        """Raises SandboxError where this one does not work here; `workers`: how many there are of its kind."""
        self._mechanism, self._limits, module = mechanism, limits, importlib.util.find_spec("pyseccomp")
        options = {
            "mechanism": mechanism, "visible": _visible(), "hidden": _hidden(), "seccomp": module and module.origin,
            "modules": _MODULES, "scratch": _BUBBLE if mechanism == "bubblewrap" else None, "workers": workers,
        }  # fmt: skip
        # As isolated as -I, but with the same hashes in every run: the order of a set may decide a verdict.
        flags = ["-P", "-s", "-S", "-B", "-X", "utf8", "-c", _BOOTSTRAP, json.dumps(options)]
        command = _in_bubblewrap(options["seccomp"], limits) if mechanism == "bubblewrap" else [sys.executable]
        self._process = subprocess.Popen(
            [*command, *flags],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/", bufsize=0,
            env={"PYTHONHASHSEED": "0"}, start_new_session=True,  # Ctrl-C is ours
        )  # fmt: skip
        self.hello: Mapping[str, Any] = {"scratch": None}
        try:
            self.hello = self._read(_START)
        except BaseException:
            self.close()
            raise

    def run(self, job: Job) -> Ran:
        """Runs one program.

        Raises:
          SandboxError: whoever runs it is gone, or says nothing.
        """
        data = json.dumps({**vars(job), "limits": vars(self._limits)}).encode()
        assert self._process.stdin is not None
        try:
            write_all(self._process.stdin.fileno(), struct.pack(">I", len(data)) + data)
        except (OSError, ValueError) as error:  # the second where the pipe is closed
            raise SandboxError(f"the sandbox's process has ended: {error}") from error
        said = self._read(self._limits.wall_seconds + _GRACE)
        said["stdout"], lines = base64.b64decode(said["stdout"]), base64.b64decode(said["results"])
        return Ran(**{**said, "results": tuple(map(_result, lines.split(b"\n")[:-1]))})

    def _read(self, seconds: float) -> dict[str, Any]:
        end = time.monotonic() + seconds
        (size,) = struct.unpack(">I", self._exactly(4, end))
        if size > _LARGEST:
            raise SandboxError(f"a reply of {size} bytes")
        said = json.loads(self._exactly(size, end))
        if "broken" in said:
            raise SandboxError(f"the sandbox could not be set up: {said['broken']}")
        return said

    def _exactly(self, size: int, end: float) -> bytes:
        assert self._process.stdout is not None
        fd, data = self._process.stdout.fileno(), bytearray()
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while len(data) < size:
            if not poll.poll(max(0.0, 1000 * (end - time.monotonic()))):
                raise SandboxError("the sandbox's process says nothing any more")
            part = os.read(fd, size - len(data))
            if not part:
                raise SandboxError("the sandbox's process has ended")
            data += part
        return bytes(data)

    def kill(self) -> None:
        """Ends the process, and with it all that it has started; from any thread, and then `run` fails."""
        if self._mechanism == "limits":  # it has to end what runs by itself
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
        if self._mechanism == "bubblewrap":  # whose child is the first process of the namespace
            with contextlib.suppress(OSError, ValueError):
                pid = self._process.pid
                for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                    os.kill(int(child), signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        if self._mechanism == "limits" and self.hello["scratch"] is not None:
            disk.removed(self.hello["scratch"])  # which it has done, if it could

    def close(self) -> None:
        """Ends the process when it has tidied up; only from the thread that runs programs by it."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)  # it ends when its input does
        self.kill()


def _result(line: bytes) -> tuple[str, Any]:
    """A line that a program wrote, or `("failed", ...)` where it is none of ours."""
    try:
        kind, content = json.loads(line)
        if kind in ("returned", "raised", "failed"):
            return kind, content
    except (ValueError, TypeError, RecursionError):
        pass
    return "failed", "it wrote among its results"

"""The parent's end of a worker process: starts it, sends it items, reads replies, and says how it ended."""

import contextlib
import dataclasses
import itertools
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from grpo_jax.rewards import Item, RewardError, worker

__all__ = ["Limits", "Outcome", "Process"]

_STARTS = 3  # in a row that may end before they are ready
_GRACE = 5.0  # seconds of wall time until a worker is killed that its own timers should have ended
_SHOWN = 100  # bytes of what is no reply, in messages
_LINES = 10  # of what a worker wrote to standard error before it ended, in messages
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
# Sets in the same order in every process, no files beside sources, and no threads of numerical libraries.
_SET = {
    "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What an item may take. Importing its function does not count."""

    cpu_seconds: float = 5.0  # of all threads of the worker, not of processes that it starts
    wall_seconds: float = 120.0  # a backstop for what waits and does not compute; far more than a busy machine needs
    memory_mib: int = 1024  # of address space beyond what the worker has when the function is imported (on Linux)

    def __post_init__(self) -> None:
        if not 0 < self.cpu_seconds <= self.wall_seconds or self.memory_mib < 1:
            raise ValueError(
                f"cpu_seconds={self.cpu_seconds} must be above 0, wall_seconds={self.wall_seconds} no less, "
                f"memory_mib={self.memory_mib} 1 or more."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How judging an item went."""

    item: Item = None  # what the function returned
    seconds: float = 0.0  # of wall time
    failure: str | None = None  # why there is no verdict: the worker ended
    detail: str = ""  # to the failure: what the worker said
    error: str | None = None  # what the function raised


class _NoReplyError(ConnectionError):
    """What came is no reply to what was asked: somebody else has written to the socket."""


class Process:
    """A worker that one thread talks to; started when it is needed, and again after it has ended."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0  # in a row that ended before the worker was ready

    def judge(self, function: str, payloads: Sequence[bytes]) -> Iterator[Outcome | None]:
        """One outcome an item, in their order; None where the worker ended before its turn.

        Args:
          function: `module:name` or `file.py:name`.
          payloads: pickled keyword arguments.

        Raises:
          RewardError: the function cannot be loaded, or workers do not start, or end whenever they do.
        """
        if not self._sent(function, payloads):
            yield from [None] * len(payloads)
            return
        for done in range(len(payloads)):
            started = time.perf_counter()
            try:
                reply = self._reply(self._limits.wall_seconds + _GRACE, {"item", "seconds"})
            except OSError as error:
                failure, detail = self._why(error, *self.end())
                yield Outcome(failure=failure, detail=detail, seconds=time.perf_counter() - started)
                yield from [None] * (len(payloads) - done - 1)
                return
            yield Outcome(**reply)

    def _sent(self, function: str, payloads: Sequence[bytes]) -> bool:
        """Whether the function is loaded and the first item begins; else the worker has ended, and no item did that."""
        seconds = worker.LOAD_SECONDS[1] + _GRACE
        try:
            if self._process is None:
                self._start()
            self._socket.settimeout(seconds)
            self._write((function, payloads))
            error = self._reply(seconds, {"loaded"}).get("error")
        except OSError as error:
            started = self._process is not None
            status, said = self.end()
            self._starts = (self._starts + 1) % _STARTS
            if not self._starts and not started:
                raise RewardError(f"a worker process for {function} could not be started: {error}.") from error
            if not self._starts:
                late = _late(*worker.LOAD_SECONDS).get(status)  # no limit of an item's
                why = f"{late} to import it" if late else f"ended with status {status}{_last_lines(said)}"
                raise RewardError(
                    f"{_STARTS} worker processes in a row ended before {function} was loaded: the last {why}."
                ) from None
            return False
        if error is not None:
            raise RewardError(f"{function} cannot be loaded: {error}")
        self._starts = 0
        return True

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ} | _SET
        command = [sys.executable, "-P", worker.__file__, str(theirs.fileno()), str(os.getpid())]
        with theirs:
            try:
                self._process = subprocess.Popen(
                    command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    pass_fds=[theirs.fileno()], start_new_session=True,
                )  # fmt: skip
            except OSError:
                ours.close()
                raise
        self._socket, self._numbers = ours, itertools.count()  # of its replies
        self._replies: BinaryIO = ours.makefile("rb")
        limits = self._limits
        self._write((sys.path, limits.cpu_seconds, limits.wall_seconds, limits.memory_mib * 2**20))

    def _write(self, request: Any) -> None:
        data = pickle.dumps(request)
        self._socket.sendall(worker.LENGTH.pack(len(data)) + data)

    def _reply(self, seconds: float, says: set[str]) -> dict[str, Any]:
        """The next one within that time, which says that or has an `error`; OSError where there is none."""
        self._socket.settimeout(seconds)
        line = self._replies.readline()
        if not line.endswith(b"\n"):
            raise ConnectionError
        with contextlib.suppress(ValueError, TypeError):  # it is no JSON, or no pair
            number, reply = json.loads(line)
            if number == next(self._numbers) and isinstance(reply, dict) and reply.keys() in (says, {"error"}):
                return reply
        raise _NoReplyError(repr(line[:_SHOWN]))

    def _why(self, error: OSError, status: int, said: str) -> tuple[str, str]:
        """What an item failed of, by which failures are counted, and what its worker said."""
        if isinstance(error, _NoReplyError):
            return "its worker said what is no reply to it", f": {error}"
        limits = self._limits
        known = _late(limits.cpu_seconds, limits.wall_seconds)
        known[worker.OUT_OF_MEMORY] = f"needed more than {limits.memory_mib} MiB"
        if status in known:
            return f"it {known[status]}", ""
        return f"its worker ended with status {status}", _last_lines(said)

    def interrupt(self) -> None:
        """Ends what the thread that uses this waits for, as if the worker had ended; from any thread."""
        with contextlib.suppress(OSError, AttributeError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def end(self) -> tuple[int, str]:
        """Ends the worker, and what its functions have started, processes and temporary files.

        Returns:
          Its status, its own where it had ended by itself, and the last that it wrote to standard error.
        """
        if self._process is None:
            return 0, ""
        process, self._process = self._process, None
        self._replies.close()
        self._socket.close()
        try:
            report, _ = process.communicate(timeout=_GRACE)  # the end of its standard input is that of all
        except subprocess.TimeoutExpired:  # somebody has stopped its supervisor, which alone knows what there is to end
            process.send_signal(signal.SIGCONT)
            try:
                report, _ = process.communicate(timeout=_GRACE)
            except subprocess.TimeoutExpired:  # or nobody reads the standard error that it passes on
                process.kill()
                report, _ = process.communicate()
        found = json.loads(report or "{}")
        return found.get("status", -signal.SIGKILL), found.get("said", "")


def _late(cpu: float, wall: float) -> dict[int, str]:
    """What a worker's status says of time, where it had so many seconds."""
    return {
        -signal.SIGPROF: f"took more than {cpu:g} s of CPU time",
        -signal.SIGALRM: f"took more than {wall:g} s",
    }


def _last_lines(said: str) -> str:
    lines = said.splitlines()[-_LINES:]
    return ", after it wrote to standard error:\n  " + "\n  ".join(lines) if lines else ""

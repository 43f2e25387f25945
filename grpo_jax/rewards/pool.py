"""Worker processes for rewards that need containment: what hangs, crashes or eats memory takes nothing with it.

    reward = pooled("my_rewards:judge", limits=Limits(cpu_seconds=2))  # or "my_rewards.py:judge"

makes a reward function out of `judge(*, completion, answer, **rest) -> item`, a function of one completion. A worker
is a fresh Python that runs `worker.py`, without JAX, without the parent's `__main__`, and with little of its
environment. Limits are in CPU time, so that a busy machine changes no verdict; wall time is a backstop. This contains
accidents; it is no sandbox for hostile programs.

A thread of the parent serves each worker: it sends a few items at a time and reads a reply for each, so that the item
in whose course a worker ended is known, and the others are neither lost nor blamed.
"""

import atexit
import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Literal

from grpo_jax.rewards import Item, Judged, RewardError, worker
from grpo_jax.rewards.concurrent import arguments_of_each

__all__ = ["Limits", "OnFailure", "Outcome", "Pool", "check_policy", "judge", "pooled", "resolved"]

OnFailure = Literal["error", "none"]  # what is done about an item without a verdict

_LOG = logging.getLogger(__name__)
_SHOWN = 300  # characters of an item in a message
_BATCH = 16  # items sent to a worker at a time, at most: what waits behind an item that hangs
_STARTS = 3  # workers that may end before they are ready, one after the other
_GRACE = 5.0  # seconds of wall time until a worker is killed that its own timers should have ended
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
    failure: str | None = None  # why there is no verdict


class _Run:
    """Items that one caller waits for."""

    def __init__(self, function: str, count: int):
        self.function, self.outcomes = function, [Outcome()] * count
        self.left, self.error, self.done = count, None, threading.Event()

    def stop(self, error: Exception) -> None:
        self.error = self.error or error
        self.done.set()


@dataclasses.dataclass(slots=True, eq=False)
class _Task:
    """One item of a run."""

    run: _Run
    index: int
    payload: bytes
    again: bool = False  # a worker has ended in its course


class Pool:
    """Calls functions named by path in worker processes; from any thread, from several at once.

    Processes start when they are first needed, and end with `close`, at the end of a `with` block, at exit, and when
    this process is gone, however it ended.
    """

    def __init__(self, workers: int = 0, limits: Limits | None = None):
        """`workers`: processes; 0: one for each core that this process may use.

        Raises:
          ValueError: workers is below 0.
        """
        if workers < 0:
            raise ValueError(f"workers={workers} must be 1 or more, or 0 for one a core.")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._limits, self._count, self._process = limits or Limits(), workers or cores, os.getpid()
        self._queue: deque[_Task] = deque()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._workers: list[_Worker] = []
        self._closed = False

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(self, function: str, items: Sequence[Mapping[str, Any]]) -> list[Outcome]:
        """Calls a function with each item as its keyword arguments.

        An item in whose course a worker ends, by a limit or a crash, is tried once more, in another worker.

        Raises:
          ValueError: `function` is not "module:name" or "file.py:name" of a file that is there.
          RewardError: it cannot be loaded, or raised; or an item cannot be sent.
          RuntimeError: the pool is closed, or belongs to the process that this one was forked from.
        """
        function = resolved(function)
        if not items:
            return []
        run = _Run(function, len(items))
        tasks = [_Task(run, i, _pickled(item, i, function)) for i, item in enumerate(items)]
        with self._changed:
            if self._closed or os.getpid() != self._process:
                raise RuntimeError("this pool is closed, or was made before a fork: make another one.")
            self._start()
            self._queue.extend(tasks)
            self._changed.notify_all()
        try:
            run.done.wait()
        finally:
            run.done.set()  # after an exception in this thread, what is left is dropped
        if run.error is not None:
            raise run.error
        return run.outcomes

    def close(self) -> None:
        """Ends all workers. Who waits for items gets an error."""
        if os.getpid() != self._process:
            return
        with self._changed:
            self._closed = True
            for task in self._queue:
                task.run.stop(RuntimeError("the pool was closed before all items were judged."))
            self._changed.notify_all()
        for thread in self._threads:
            while thread.is_alive():
                for each in self._workers:
                    each.kill()
                thread.join(0.1)
        atexit.unregister(self.close)

    def _start(self) -> None:
        if self._threads:
            return
        atexit.register(self.close)
        for i in range(self._count):
            self._workers.append(_Worker(self._limits))
            name, arguments = f"rewards {i}", (self._workers[i],)
            self._threads.append(threading.Thread(target=self._serve, args=arguments, name=name, daemon=True))
        for thread in self._threads:
            thread.start()

    def _take(self) -> list[_Task]:
        """The next items of one run for a worker, as soon as there are some; none where the pool is closed."""
        with self._changed:
            while not self._closed:
                while self._queue and self._queue[0].run.done.is_set():
                    self._queue.popleft()
                if self._queue:
                    return self._batch()
                self._changed.wait()
        return []

    def _batch(self) -> list[_Task]:
        tasks = [self._queue.popleft()]
        most = min(_BATCH, 1 + len(self._queue) // (2 * self._count))  # fewer at the end: workers end together
        while len(tasks) < most and not tasks[0].again and self._queue[0].run is tasks[0].run:
            if self._queue[0].again:
                break
            tasks.append(self._queue.popleft())
        return tasks

    def _serve(self, process: "_Worker") -> None:
        try:
            while tasks := self._take():
                try:
                    for task, outcome in process.judge(tasks):
                        self._settle(task, outcome)
                except Exception as error:
                    process.end()  # it would go on with the rest, of which nobody wants to know
                    tasks[0].run.stop(error)
        finally:
            process.end()

    def _settle(self, task: _Task, outcome: Outcome | None) -> None:
        """Records what came of an item; it is judged (again) where nothing came, or it failed for the first time."""
        with self._changed:
            if self._closed:
                task.run.stop(RuntimeError("the pool was closed before all items were judged."))
            elif outcome is None or (outcome.failure is not None and not task.again):
                task.again = task.again or outcome is not None
                self._queue.appendleft(task)
                self._changed.notify()
            else:
                task.run.outcomes[task.index] = outcome
                task.run.left -= 1
                if not task.run.left:
                    task.run.done.set()


class _Worker:
    """A process that one thread talks to; started when it is needed, and again after it has ended."""

    def __init__(self, limits: Limits):
        self._limits, self._lock = limits, threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0  # in a row that ended before the worker was ready

    def judge(self, tasks: Sequence[_Task]) -> Iterator[tuple[_Task, Outcome | None]]:
        """Each item with its outcome; with None where the worker ended before its turn.

        Raises:
          RewardError: as `Pool.run`.
        """
        done = 0
        try:
            self._send(tasks)
            started = time.perf_counter()
            for done, task in enumerate(tasks):  # noqa: B007
                reply = self._reply(self._limits.wall_seconds + _GRACE, task.run.function, f"item {task.index}")
                yield task, Outcome(item=reply["item"], seconds=reply["seconds"])
                started = time.perf_counter()
        except _Unready:
            for task in tasks:
                yield task, None
        except OSError:  # the worker ended, or is stopped
            yield tasks[done], Outcome(failure=self._why(self.end()), seconds=time.perf_counter() - started)
            for task in tasks[done + 1 :]:
                yield task, None

    def _send(self, tasks: Sequence[_Task]) -> None:
        """Returns when the function is loaded and the first item begins."""
        function, seconds = tasks[0].run.function, worker.LOAD_SECONDS[1] + _GRACE
        try:
            if self._process is None:
                self._start()
            self._socket.settimeout(seconds)
            self._write((function, [task.payload for task in tasks]))
            self._reply(seconds, function, "")
        except OSError:
            status = self.end()
            self._starts += 1
            if self._starts == _STARTS:
                raise RewardError(
                    f"{_STARTS} worker processes in a row ended before {function} was loaded, the last with status "
                    f"{status}: what they wrote to standard error says why."
                ) from None
            raise _Unready from None
        self._starts = 0

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair()
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ} | _SET
        command = [sys.executable, "-P", worker.__file__, str(theirs.fileno()), str(os.getpid())]
        with theirs:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True
            )
        with self._lock:
            self._process = process
        self._replies: BinaryIO = self._socket.makefile("rb")
        limits = self._limits
        self._write((sys.path, limits.cpu_seconds, limits.wall_seconds, limits.memory_mib * 2**20))

    def _write(self, request: Any) -> None:
        data = pickle.dumps(request)
        self._socket.sendall(worker.LENGTH.pack(len(data)) + data)

    def _reply(self, seconds: float, function: str, of: str) -> dict[str, Any]:
        """The next one within that time; OSError where there is none, RewardError where the function raised."""
        self._socket.settimeout(seconds)
        line = self._replies.readline()
        if not line.endswith(b"\n"):
            raise ConnectionError
        reply = json.loads(line)
        if "error" in reply:
            raise RewardError(f"{function} {f'on {of} ' if of else ''}raised {reply['error']}\n{reply['traceback']}")
        return reply

    def _why(self, status: int) -> str:
        limits = self._limits
        return {
            -signal.SIGPROF: f"it took more than {limits.cpu_seconds:g} s of CPU time",
            -signal.SIGALRM: f"it took more than {limits.wall_seconds:g} s",
            worker.OUT_OF_MEMORY: f"it needed more than {limits.memory_mib} MiB",
        }.get(status, f"its worker ended with status {status}")

    def kill(self) -> None:
        """Ends the process, and what its functions have started; from any thread."""
        with self._lock:
            if self._process is not None and self._process.returncode is None:
                # Until it is waited for, which is under this lock too, no other group can have this number.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> int:
        """Kills the process where it lives; its status."""
        self.kill()
        with self._lock:
            if self._process is None:
                return 0
            status, self._process = self._process.wait(), None
        self._replies.close()
        self._socket.close()
        return status


class _Unready(Exception):
    """A worker ended before the first of its items began: none is to blame."""


def _pickled(item: Mapping[str, Any], index: int, function: str) -> bytes:
    try:
        return pickle.dumps(dict(item))
    except Exception as error:
        raise RewardError(f"item {index} for {function} cannot be sent to a worker: {error}.") from error


def resolved(function: str) -> str:
    """`file.py:name` with the whole path of the file, `module:name` as it is.

    Raises:
      ValueError: it is neither, or there is no such file.
    """
    place, colon, name = function.rpartition(":")
    if not (colon and place and name.isidentifier()):
        raise ValueError(f"function={function!r} must be 'module:name' or 'file.py:name'.")
    if place.endswith(".py"):
        if not pathlib.Path(place).is_file():
            raise ValueError(f"function={function!r}: there is no file {place}.")
        place = str(pathlib.Path(place).resolve())
    return f"{place}:{name}"


def _raise(function: str, failed: Mapping[int, str], items: Sequence[Mapping[str, Any]]) -> None:
    index, why = next(iter(failed.items()))
    raise RewardError(f"{function} came to no verdict on item {index}, {_shown(items[index])}: {why}, twice.")


def _say(function: str, failed: Mapping[int, str], items: Sequence[Mapping[str, Any]]) -> None:
    index, why = next(iter(failed.items()))
    _LOG.warning(
        "%s came to no verdict on %d of %d items, which get none; the first was item %d, %s: %s, twice.",
        function, len(failed), len(items), index, _shown(items[index]), why,
    )  # fmt: skip


def _shown(item: Mapping[str, Any]) -> str:
    text = repr(dict(item))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


_FAILURES: Mapping[str, Callable[[str, Mapping[int, str], Sequence[Mapping[str, Any]]], None]] = {
    "error": _raise,
    "none": _say,
}


def judge(pool: Pool, function: str, items: Sequence[Mapping[str, Any]], on_failure: OnFailure = "error") -> Judged:
    """`Pool.run` as what a reward function returns; `on_failure` as in `pooled`.

    Raises:
      RewardError: as `Pool.run`, and where an item failed, by that policy.
    """
    outcomes = pool.run(function, items)
    failed = {i: outcome.failure for i, outcome in enumerate(outcomes) if outcome.failure is not None}
    if failed:
        _FAILURES[on_failure](function, failed, items)
    return Judged(
        (outcome.item for outcome in outcomes),
        failed=[outcome.failure is not None for outcome in outcomes],
        seconds=[outcome.seconds for outcome in outcomes],
    )


def pooled(
    function: str, pool: Pool | None = None, *, limits: Limits | None = None, on_failure: OnFailure = "error"
) -> Callable[..., Judged]:
    """A reward function out of a function of one completion that runs in worker processes.

    Args:
      function: where it is, "module:name" or "file.py:name": `def f(*, prompt, completion, completion_ids, **columns)`
        -> an item. It is imported in the workers alone.
      pool: whose workers; by default some of its own, which start at the first call.
      limits: of an item, for workers of its own.
      on_failure: where an item came to a limit, or crashed its worker, twice: "error" stops the run, "none" gives it
        None, which the metrics count, and says so in the log.

    Raises:
      ValueError: as `resolved`; an unknown policy; or limits for a pool that has its own.
    """
    path = resolved(function)
    check_policy(on_failure)
    if pool is not None and limits is not None:
        raise ValueError("limits are those of the pool: give one of the two.")
    workers = pool or Pool(limits=limits)

    def reward(
        prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> Judged:
        return judge(workers, path, arguments_of_each(prompts, completions, completion_ids, columns), on_failure)

    return reward


def check_policy(on_failure: str) -> None:
    """Raises ValueError where there is no such policy."""
    if on_failure not in _FAILURES:
        raise ValueError(f"on_failure={on_failure!r} must be one of {', '.join(_FAILURES)}.")

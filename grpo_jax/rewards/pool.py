"""Worker processes for rewards that need containment: what hangs, crashes or eats memory takes nothing with it.

    reward = pooled("my_rewards:judge", Pool(limits=Limits(cpu_seconds=2)))  # or "my_rewards.py:judge"

makes a reward function out of `judge(*, completion, answer, **rest) -> item`, a function of one completion. A worker
is a fresh Python that runs `worker.py`, without JAX, without the parent's `__main__`, and with little of its
environment. Limits are in CPU time, so that a busy machine changes no verdict; wall time is a backstop. This contains
accidents; it is no sandbox for hostile programs.

A thread of the parent serves each worker: it sends a few items at a time and reads a reply for each, so that the item
in whose course a worker ended is known, and the others are neither lost nor blamed.
"""

import atexit
import dataclasses
import logging
import os
import pathlib
import pickle
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from grpo_jax.rewards import Judged, RewardError
from grpo_jax.rewards.concurrent import arguments_of_each
from grpo_jax.rewards.process import Limits, Outcome, Process

__all__ = ["Limits", "Pool", "pooled"]

OnFailure: TypeAlias = Literal["error", "none"]

_LOG = logging.getLogger(__name__)
_ONE = "(A pooled function judges one completion: its parameters are prompt, completion, completion_ids, **columns.)"
_SHOWN = 300  # characters of an item in a message
_BATCH = 16  # items sent to a worker at a time, at most: what waits behind an item that hangs


class _Run:
    """Items that one caller waits for."""

    def __init__(self, function: str, items: Sequence[Mapping[str, Any]]):
        self.function, self.items = function, items
        self.outcomes, self.left = [Outcome()] * len(items), len(items)
        self.error: Exception | None = None
        self.done = threading.Event()

    def stop(self, error: Exception) -> None:
        self.error = self.error or error
        self.done.set()

    def shown(self, index: int) -> str:
        text = repr(dict(self.items[index]))
        return f"item {index}, {text if len(text) <= _SHOWN else f'{text[:_SHOWN]}...'}"


@dataclasses.dataclass(slots=True, eq=False)
class _Task:
    """One item of a run."""

    run: _Run
    index: int
    payload: bytes
    again: bool = False  # a worker has ended in its course


def _raise(message: str) -> None:
    raise RewardError(message)


_ON_FAILURE: Mapping[str, Callable[[str], None]] = {"error": _raise, "none": _LOG.warning}


class Pool:
    """Calls functions named by path in worker processes; from any thread, from several at once.

    Processes start when they are first needed, and end with `close`, at the end of a `with` block, at exit, and when
    this process is gone, however it ended.
    """

    def __init__(self, workers: int = 0, *, limits: Limits | None = None, on_failure: OnFailure = "error"):
        """Starts nothing yet.

        Args:
          workers: processes; 0: one for each core that this process may use.
          limits: of an item; `Limits()` by default.
          on_failure: where an item came to a limit, or crashed its worker, twice: "error" stops the run, "none" makes
            it None and `Judged.failed`, with a line in the log.

        Raises:
          ValueError: workers is below 0, or the policy unknown.
        """
        if workers < 0:
            raise ValueError(f"workers={workers} must be 1 or more, or 0 for one a core.")
        if on_failure not in _ON_FAILURE:
            raise ValueError(f"on_failure={on_failure!r} must be one of {', '.join(_ON_FAILURE)}.")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._count, self._limits, self._fail = workers or cores, limits or Limits(), _ON_FAILURE[on_failure]
        self._owner, self._closed = os.getpid(), False
        self._queue: deque[_Task] = deque()
        self._changed = threading.Condition()  # of the queue and of runs
        self._serving: list[tuple[Process, threading.Thread]] = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def judge(self, function: str, items: Sequence[Mapping[str, Any]]) -> Judged:
        """Calls a function with each item as its keyword arguments.

        An item in whose course a worker ends, by a limit or a crash, is tried once more, in a fresh one.

        Args:
          function: "module:name", or "file.py:name".
          items: what pickle can send, and no instances of classes of `__main__`, which workers do not have.

        Raises:
          ValueError: `function` is neither, or there is no such file.
          RewardError: it cannot be loaded, or raised, or an item cannot be sent; or an item failed, by that policy.
          RuntimeError: the pool is closed, or belongs to the process that this one was forked from, or the system
            starts no thread.
        """
        run = _Run(_resolved(function), items)
        tasks = [_Task(run, i, _pickled(run, i)) for i in range(len(items))]
        with self._changed:
            if self._closed or os.getpid() != self._owner:
                raise RuntimeError("this pool is closed, or was made before a fork: make another one.")
            self._start()
            self._queue.extend(tasks)
            self._changed.notify_all()
        try:
            if items:
                run.done.wait()
        finally:
            run.done.set()  # after an exception in this thread, what is left is dropped
        if run.error is not None:
            raise run.error
        return self._judged(run)

    def close(self) -> None:
        """Ends all workers. Who waits for items gets an error."""
        if os.getpid() != self._owner:
            return
        with self._changed:
            self._closed = True
            for task in self._queue:
                self._settle(task, None)
            self._changed.notify_all()
        for process, thread in self._serving:
            while thread.is_alive():  # it may be starting another one
                process.interrupt()
                thread.join(0.1)
        atexit.unregister(self.close)

    def _judged(self, run: _Run) -> Judged:
        failed = [outcome.failure is not None for outcome in run.outcomes]
        if any(failed):
            first = failed.index(True)
            kinds = Counter(outcome.failure for outcome in run.outcomes if outcome.failure is not None)
            counted = "; ".join(f"of {count}, {kind}" for kind, count in kinds.most_common())
            self._fail(
                f"{run.function} came to no verdict on {sum(failed)} of {len(failed)} items, the first of them "
                f"{run.shown(first)}: {run.outcomes[first].failure}{run.outcomes[first].detail}, twice."
                + (f" In all: {counted}." if len(kinds) > 1 else "")
            )
        seconds = [outcome.seconds for outcome in run.outcomes]
        return Judged((outcome.item for outcome in run.outcomes), failed=failed, seconds=seconds)

    def _start(self) -> None:
        """One thread a worker; after one that the system did not start, the next call starts what is missing."""
        if not self._serving:
            atexit.register(self.close)
        while len(self._serving) < self._count:
            process = Process(self._limits)
            thread = threading.Thread(target=self._serve, args=(process,), name="reward workers", daemon=True)
            self._serving.append((process, thread))  # before it may be interrupted: `close` must know it
            try:
                thread.start()
            except RuntimeError:
                self._serving.pop()
                raise

    def _serve(self, process: Process) -> None:
        try:
            while tasks := self._take():
                run = tasks[0].run
                try:
                    if tasks[0].again:
                        process.end()  # what others have left in this worker is not the item's fault
                    outcomes = process.judge(run.function, [task.payload for task in tasks])
                    for task, outcome in zip(tasks, outcomes, strict=True):
                        with self._changed:
                            self._settle(task, outcome)
                except Exception as error:
                    process.end()
                    run.stop(error)
        finally:
            process.end()

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
        """An item that failed goes alone; towards the end there are fewer at a time, so that workers end together."""
        tasks = [self._queue.popleft()]
        most = min(_BATCH, 1 + len(self._queue) // (2 * self._count))
        while len(tasks) < most and not tasks[0].again:
            if self._queue[0].again or self._queue[0].run is not tasks[0].run:
                break
            tasks.append(self._queue.popleft())
        return tasks

    def _settle(self, task: _Task, outcome: Outcome | None) -> None:
        """Records what came of an item; it is judged (again) where nothing came, or it failed for the first time."""
        run = task.run
        if self._closed:
            run.stop(RuntimeError("the pool was closed before all items were judged."))
        elif outcome is None:
            self._queue.append(task)  # behind the one that its worker ended of, for which there must be a fresh one
            self._changed.notify()
        elif outcome.failure is not None and not task.again:
            task.again = True
            self._queue.appendleft(task)
            self._changed.notify()
        elif outcome.error is not None:
            hint = _ONE if "missing 1 required" in outcome.error else ""
            run.stop(RewardError(f"{run.function} raised on {run.shown(task.index)}: {outcome.error}{hint}"))
        else:
            run.outcomes[task.index] = outcome
            run.left -= 1
            if not run.left:
                run.done.set()


def _pickled(run: _Run, index: int) -> bytes:
    try:
        return pickle.dumps(dict(run.items[index]))
    except Exception as error:
        raise RewardError(f"{run.shown(index)} for {run.function} cannot be sent to a worker: {error}.") from error


def _resolved(function: str) -> str:
    """`file.py:name` with the whole path of the file, `module:name` as it is."""
    place, colon, name = function.rpartition(":") if isinstance(function, str) else ("", "", "")
    if not (colon and place and name.isidentifier()) or (not place.endswith(".py") and ":" in place):
        raise ValueError(
            f"function={function!r} must be text, 'module:name' or 'file.py:name': workers import it by that."
        )
    if place.endswith(".py"):
        if not pathlib.Path(place).is_file():
            raise ValueError(f"function={function!r}: there is no file {place}.")
        place = str(pathlib.Path(place).resolve())
    return f"{place}:{name}"


def pooled(function: str, pool: Pool | None = None) -> Callable[..., Judged]:
    """A reward function out of a function of one completion that runs in worker processes.

    Args:
      function: where it is, "module:name" or "file.py:name": `def f(*, prompt, completion, completion_ids, **columns)`
        -> an item. It is imported in the workers alone.
      pool: whose workers; by default some of its own, `Pool()`, which start at the first call.

    Raises:
      ValueError: `function` is neither, or there is no such file.
    """
    path, workers = _resolved(function), pool or Pool()

    def reward(
        prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> Judged:
        return workers.judge(path, arguments_of_each(prompts, completions, completion_ids, columns))

    return reward

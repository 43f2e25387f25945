"""A sandbox for Python programs: a fresh process for each, with limits, without network, and with no writes outside.

    with Sandbox(Limits(cpu_seconds=1)) as sandbox:
        print(isolation().description)
        sandbox.run(Job(program="def add(a, b): return a + b", calls=(call("add", 1, 2),)))

`confined.py` is what stands at the other side. A program sees a user without privileges, an empty temporary
directory in memory, Python's standard library and the system's shared libraries, /dev/null and its like; no other
process, no other file, no environment and no interface of the network. It is forked from a process that has imported
the standard library and has never seen another program, which takes a few milliseconds where a new interpreter takes
some 30. Programs share nothing but that process's memory, as it was before all of them.

Limits are of CPU time first, so that a busy machine changes no verdict, with wall time as a backstop. Memory and CPU
time are each process's own: a program has up to `processes` times as much.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import queue
import socket
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from grpo_jax.rewards.programs import Job, Limits, Ran, SandboxError, Worker, call

__all__ = ["Isolation", "Job", "Limits", "Ran", "Sandbox", "SandboxError", "call", "isolation"]

# What isolates --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Isolation:
    """What keeps programs from everything else on this host, as tried."""

    mechanism: str  # namespaces, bubblewrap (which makes them too), or limits
    seccomp: bool
    landlock: bool
    network: bool  # nothing is reached, not even this host
    writes: bool  # nothing is written outside the temporary directory
    signals: bool  # no other process is signalled
    files: bool  # what is not Python's or the system's libraries cannot be read
    processes: bool  # no other process is seen
    why: str = ""  # there are no namespaces

    @property
    def strong(self) -> bool:
        """No network, and nothing outside is written or signalled: what a reward needs to start."""
        return self.network and self.writes and self.signals

    @property
    def complete(self) -> bool:
        """Strong, and nothing outside is seen."""
        return self.strong and self.files and self.processes

    @property
    def description(self) -> str:
        """In one line."""
        by = [_MECHANISMS[self.mechanism], "seccomp" if self.seccomp else "", "Landlock" if self.landlock else ""]
        kept = {
            "network": self.network, "writes outside": self.writes, "signals": self.signals,
            "files of the host": self.files, "other processes": self.processes,
        }  # fmt: skip
        open_ = ", ".join(what for what, isolated in kept.items() if not isolated)
        said = f"NOT isolated: {open_}{self._advice}" if open_ else "all is isolated"
        return f"sandbox: {' + '.join(filter(None, by))}; {said}"

    @property
    def _advice(self) -> str:
        seccomp = "" if self.seccomp else "; else `pip install pyseccomp` and libseccomp for a network filter"
        return (
            f" (namespaces: {self.why}; allow user namespaces: sysctl user.max_user_namespaces above 0, "
            "kernel.apparmor_restrict_unprivileged_userns=0, and in a container a seccomp profile that lets unshare "
            f"through; or install bubblewrap{seccomp})"
        )


# In this order: the second needs a program that may be allowed more than we are, and counts files less exactly.
_MECHANISMS = {
    "namespaces": "namespaces (user, pid, mount, net, ipc, uts)",
    "bubblewrap": "bubblewrap (the same namespaces)",
    "limits": "limits",
}


# Tries everything that must not work; says what did.
_TRY = """
import os, socket
def attempts(tcp, udp, path, pid):
    def works(attempt):
        try:
            attempt()
        except OSError:
            return False
        return True
    return {
        "connected": works(lambda: socket.create_connection(("127.0.0.1", tcp), timeout=5)),
        "sent": works(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"!", ("127.0.0.1", udp))),
        "writes": works(lambda: open(path + "/written", "w")) or works(lambda: os.chmod(path + "/secret", 0)),
        "files": works(lambda: open(path + "/secret").read()),
        "signals": works(lambda: os.kill(pid, 0)),
        "processes": works(lambda: open(f"/proc/{pid}/stat").read()),
    }
"""


@functools.cache
def isolation() -> Isolation:
    """What isolates here, found out once by trying what must not work.

    Raises:
      SandboxError: not even a process with limits can be started.
    """
    if sys.platform != "linux":
        raise SandboxError(f"the sandbox needs Linux, and this is {sys.platform}: judge code on another machine.")
    found, why = [], []
    for mechanism in _MECHANISMS:
        try:
            found.append(_tried(mechanism))
        except SandboxError as error:
            why.append(str(error).strip().splitlines()[-1])
        if found and found[0].complete:
            break
    if not found:
        raise SandboxError(f"no sandbox can be started: {'; '.join(why)}")
    best = max(found, key=lambda one: (one.complete, one.strong))  # the first of equals
    return dataclasses.replace(best, why="; ".join(why))


def _tried(mechanism: str) -> Isolation:
    arrived = False
    with (
        contextlib.closing(Worker(mechanism)) as worker,
        tempfile.TemporaryDirectory() as directory,
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
    ):
        udp.bind(("127.0.0.1", 0))
        os.chmod(directory, 0o777)
        pathlib.Path(directory, "secret").write_text("secret")
        ports = (bound.getsockname()[1] for bound in (tcp, udp))
        ran = worker.run(Job(program=_TRY, calls=(call("attempts", *ports, directory, os.getpid()),)), Limits())
        with contextlib.suppress(BlockingIOError):  # what is sent may go to a network of the sandbox's own
            udp.setblocking(False)
            arrived = bool(udp.recv(1))
    if not ran.results or ran.results[0][0] != "returned":
        raise SandboxError(f"what must not work could not be tried: {ran}")
    worked = dict(ran.results[0][1][1])
    return Isolation(
        mechanism=mechanism, seccomp=worker.hello["seccomp"], landlock=worker.hello["landlock"],
        network=not worked["connected"] and not arrived, writes=not worked["writes"], signals=not worked["signals"],
        files=not worked["files"], processes=not worked["processes"],
    )  # fmt: skip


# Who runs programs ----------------------------------------------------------------------------------


class _Crew:
    """Workers, each used by one thread at a time and replaced when it is broken."""

    def __init__(self, mechanism: str, size: int):
        self._mechanism, self._lock, self._stops, self.closed = mechanism, threading.Lock(), 0, False
        self._busy: set[Worker] = set()
        self._idle: queue.SimpleQueue[Worker | None] = queue.SimpleQueue()
        for _ in range(size):
            self._idle.put(None)

    def run(self, job: Job, limits: Limits) -> Ran:
        """Runs a program by the next free worker, and if that breaks, once more by a new one."""
        stops, worker = self._stops, self._idle.get()
        try:
            try:
                worker = self._take(worker, stops)
                return worker.run(job, limits)
            except SandboxError:
                worker = self._dropped(worker)
                worker = self._take(None, stops)
                return worker.run(job, limits)
        except BaseException:
            worker = self._dropped(worker)
            raise
        finally:
            if self.closed:
                worker = self._dropped(worker)
            with self._lock:
                self._busy.discard(worker)  # type: ignore[arg-type]
            self._idle.put(worker)

    def _take(self, worker: Worker | None, stops: int) -> Worker:
        self._check(stops)
        worker = worker or Worker(self._mechanism)
        with self._lock:
            self._busy.add(worker)
        try:
            self._check(stops)
        except SandboxError:  # nobody has seen it yet
            self._dropped(worker)
            raise
        return worker

    def _check(self, stops: int) -> None:
        if self.closed or stops != self._stops:
            raise SandboxError("the sandbox is closed." if self.closed else "the sandbox was interrupted.")

    def _dropped(self, worker: Worker | None) -> None:
        """Nothing, in the place of a worker that is closed."""
        with self._lock:
            self._busy.discard(worker)  # type: ignore[arg-type]
        if worker is not None:
            worker.close()

    def stop(self) -> None:
        """Ends the programs that run, and they fail."""
        with self._lock:
            self._stops += 1
            busy = list(self._busy)
        for worker in busy:
            worker.kill()

    def close(self) -> None:
        """Ends all processes, also where threads wait for them."""
        self.closed = True
        self.stop()
        with contextlib.suppress(queue.Empty):
            while True:
                if worker := self._idle.get_nowait():
                    worker.close()


class Sandbox:
    """Runs programs, up to `workers` at a time, from any thread; processes are started when they are first needed."""

    def __init__(self, limits: Limits | None = None, *, workers: int = 0, allow_weak: bool = False):
        """`workers`: programs at a time; 0: as many as there are cores for this process.

        Raises:
          SandboxError: what isolates here is less than no network and no writes outside, and `allow_weak` is not set.
        """
        found = isolation()
        if not found.strong and not allow_weak:
            raise SandboxError(
                f"{found.description}. Programs that a model writes would run unconfined: mend it, or accept the risk "
                "with allow_weak (--code.allow_weak on the command line)."
            )
        if workers < 0:
            raise ValueError(f"workers={workers} must be 1 or more, or 0 for one a core.")
        self.limits, self.workers = limits or Limits(), workers or len(os.sched_getaffinity(0))
        self._crew = _Crew(found.mechanism, self.workers)
        self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="sandbox")
        self.close = weakref.finalize(self, _close, self._crew, self._threads)  # ends all processes; at exit, too

    def run(self, job: Job) -> Ran:
        """Runs a program in a fresh process; waits for a free worker first.

        Raises:
          SandboxError: the sandbox is broken, a second time in a new process too, or it is closed.
        """
        if self._crew.closed:
            raise SandboxError("the sandbox is closed.")
        return self._crew.run(job, self.limits)

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """`function` of each item, in threads, as many at a time as there are workers.

        Where one raises, or Ctrl-C does, what has not begun is left out and what runs is ended.
        """
        futures = [self._threads.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            self._crew.stop()
            raise

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close(crew: _Crew, threads: ThreadPoolExecutor) -> None:
    threads.shutdown(wait=False, cancel_futures=True)
    crew.close()

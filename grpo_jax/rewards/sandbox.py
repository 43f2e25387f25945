"""A sandbox for Python programs: a fresh process for each, with limits, without network, and with no writes outside.

    with Sandbox(ProgramLimits(cpu_seconds=1)) as sandbox:
        sandbox.run(Job(program="def add(a, b): return a + b", calls=(call("add", 1, 2),)))

`confined.py` is what stands at the other side. A program sees a user without privileges, an empty temporary
directory in memory, Python's standard library and the system's shared libraries, /dev/null and its like; no other
process, no other file, no environment and no interface of the network. It is forked from a process that has imported
the standard library and has never seen another program, which takes a few milliseconds where a new interpreter takes
some 30. Programs share nothing but that process's memory, as it was before all of them.

Limits are of CPU time first, so that a busy machine changes no verdict, with wall time as a backstop. Memory and CPU
time are each process's own, but for the time of those that a program waits for: at a time it has up to `processes`
times as much. Time of processes that nobody waits for is not counted: wall time alone bounds one that goes on and on by
children.

With limits alone a program's files are on the host's disk. Who watches it looks at them every 20 ms, and ends it where
they are larger than `file_mib` together, more than 1000, or directories more than 100 in one another; it has what it
writes between two looks beyond that, and what it moves out of sight of one look another finds. Not seen is what it
deletes and holds open (64 files a process) or mapped: its time alone bounds that. And there the kernel counts all
processes of a user. Where root makes the sandbox, each worker's programs have a user of their own; else all have ours,
and each may go up to `workers * (processes + 1)` beyond those that there are when it starts. That leaves each its
`processes`, unless another program takes more than its own, or we start many ourselves.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from grpo_jax.rewards import fences, literals
from grpo_jax.rewards.programs import Job, ProgramLimits, Ran, SandboxError, Worker, call

__all__ = ["Isolation", "Job", "ProgramLimits", "Ran", "Sandbox", "SandboxError", "call", "isolation"]

_LOG = logging.getLogger(__name__)

# What isolates --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Isolation:
    """What keeps programs from everything else on this host, as tried."""

    mechanism: str  # namespaces, bubblewrap (which makes them too), or limits
    seccomp: bool
    landlock: bool
    network: bool  # nothing is reached, not even this host
    writes: bool  # nothing is written outside the temporary directory
    signals: bool  # no other process is signalled, or given other limits or priorities
    files: bool  # what is not Python's or the system's libraries cannot be read: no file, no environment, no key
    memory: bool  # there is none that no limit counts, and processes have a limit, too
    processes: bool  # no other process is seen
    why: str = ""  # there are no namespaces

    @property
    def strong(self) -> bool:
        """No network, nothing outside is read, written or signalled, memory has a bound: what a reward asks for."""
        return self.network and self.writes and self.signals and self.files and self.memory

    @property
    def complete(self) -> bool:
        """Strong, and nothing outside is seen."""
        return self.strong and self.processes

    @property
    def description(self) -> str:
        """In one line."""
        by = [_MECHANISMS[self.mechanism], "seccomp" if self.seccomp else "", "Landlock" if self.landlock else ""]
        kept = {
            "network": self.network, "writes outside": self.writes, "signals": self.signals,
            "files of the host": self.files, "memory beyond the limit": self.memory, "other processes": self.processes,
        }  # fmt: skip
        open_ = ", ".join(what for what, isolated in kept.items() if not isolated)
        said = f"NOT isolated: {open_} ({self._advice})" if open_ else "all is isolated"
        return f"sandbox: {' + '.join(filter(None, by))}; {said}"

    @property
    def _advice(self) -> str:
        namespaces = (
            f"namespaces: {self.why or 'they isolate less'}; allow user namespaces: sysctl user.max_user_namespaces "
            "above 0, kernel.apparmor_restrict_unprivileged_userns=0, and in a container a seccomp profile that lets "
            f"unshare through{'; or install bubblewrap' * (self.mechanism == 'limits')}"
        )
        seccomp = "`pip install pyseccomp` and the system's libseccomp for a filter of system calls"
        landlock = "a kernel with Landlock that keeps signals in, Linux 6.12"
        given = {namespaces: self.mechanism != "namespaces", seccomp: not self.seccomp, landlock: not self.signals}
        return "; and ".join(advice for advice, helps in given.items() if helps)


# In this order: the second needs a program that may be allowed more than we are, counts files less exactly, and bounds
# no processes of root, for whom it has no other user.
_MECHANISMS = {
    "namespaces": "namespaces (user, pid, mount, net, ipc, uts)",
    "bubblewrap": "bubblewrap (the same namespaces)",
    "limits": "limits",
}


# Tries everything that must not work; says what did.
_TRY = """
import ctypes, os, resource, signal, socket
from grpo_jax.rewards import fences
def forks(many):
    made = []
    try:
        while len(made) < many:
            made.append(os.fork())
            if not made[-1]:
                signal.pause()
    finally:
        for pid in made:
            os.kill(pid, signal.SIGKILL)
            os.wait()
def attempts(tcp, udp, path, pid, secret):
    def works(attempt):
        try:
            return attempt() is not False
        except OSError:
            return False
    def other(attempt):
        return works(lambda: attempt(pid))
    def writes(place):
        made = works(lambda: open(f"{place}/{secret}", "w"))
        works(lambda: os.unlink(f"{place}/{secret}"))
        return made
    left = os.path.exists(f"../{secret}")
    works(lambda: open(f"../{secret}", "w"))
    return {
        "left": left,
        "connected": works(lambda: socket.create_connection(("127.0.0.1", tcp), timeout=5)),
        "sent": works(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"!", ("127.0.0.1", udp))),
        "writes": any(list(map(writes, (path, "/", "/dev", "/dev/shm")))),
        "modes": works(lambda: os.chmod(path + "/secret", 0)),
        "files": works(lambda: open(path + "/secret").read()),
        "environment": other(lambda pid: secret in open(f"/proc/{pid}/environ").read()),
        "keyrings": [fences.session_keyring(), fences.user_keyring()],
        "signals": other(lambda pid: os.kill(pid, 0)),
        "limits": other(lambda pid: resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))),
        "priority": other(lambda pid: os.setpriority(os.PRIO_PROCESS, pid, 19)),
        "affinity": other(lambda pid: os.sched_setaffinity(pid, os.sched_getaffinity(0))),
        "shared": works(lambda: ctypes.CDLL(None).shmget(0, 1, 0o600) >= 0),
        "memfd": works(lambda: os.memfd_create("x")),
        "forks": works(lambda: forks(100)),
        "processes": other(lambda pid: os.stat(f"/proc/{pid}")),
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
    arrived, secret = False, uuid.uuid4().hex
    with (
        contextlib.closing(Worker(mechanism, ProgramLimits())) as worker,
        tempfile.TemporaryDirectory() as directory,
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        subprocess.Popen([sys.executable, "-ISc", "input()"], stdin=subprocess.PIPE, env={"SECRET": secret}) as other,
    ):
        udp.bind(("127.0.0.1", 0))
        os.chmod(directory, 0o777)
        pathlib.Path(directory, "secret").write_text("secret")
        ports = (bound.getsockname()[1] for bound in (tcp, udp))
        job = Job(program=_TRY, calls=(call("attempts", *ports, directory, other.pid, secret),))
        first, worked = (_said(worker.run(job)) for _ in range(2))
        with contextlib.suppress(BlockingIOError):  # what is sent may go to a network of the sandbox's own
            udp.setblocking(False)
            arrived = bool(udp.recv(1))
        other.communicate(b"\n")
    of = (first["keyrings"], worked["keyrings"], [fences.session_keyring(), fences.user_keyring()])
    keyrings = [ring for rings in of for ring in rings if ring is not None]
    # Else who watches, and what another worker runs, has the same user, and is not there to be tried.
    apart = mechanism == "namespaces" or worker.hello["user"] is not None or worker.hello["landlock"] >= 6
    none = lambda *names: not any(worked[name] for name in names)
    return Isolation(
        mechanism=mechanism, seccomp=worker.hello["seccomp"], landlock=worker.hello["landlock"] > 0,
        network=none("connected") and not arrived, writes=none("writes", "modes", "left"),
        signals=none("signals", "limits", "priority", "affinity") and apart,
        files=none("files", "environment") and len(set(keyrings)) == len(keyrings),
        memory=none("shared", "memfd", "forks"), processes=none("processes"),
    )  # fmt: skip


def _said(ran: Ran) -> dict[str, Any]:
    """What `_TRY` found."""
    if not ran.results or ran.results[0][0] != "returned":
        raise SandboxError(f"what must not work could not be tried: {ran}")
    return literals.plain(ran.results[0][1])


# Who runs programs ----------------------------------------------------------------------------------


class _Crew:
    """Workers, each used by one thread at a time and replaced when it is broken."""

    def __init__(self, mechanism: str, limits: ProgramLimits, size: int):
        self._mechanism, self._limits, self._size = mechanism, limits, size
        self._lock, self.closed = threading.Lock(), False
        self._busy: dict[threading.Thread, Worker] = {}
        self._stopped: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        self._idle: queue.SimpleQueue[Worker | None] = queue.SimpleQueue()
        for _ in range(size):
            self._idle.put(None)

    def run(self, job: Job) -> Ran:
        """Runs a program by the next free worker, and if that breaks, once more by a new one."""
        worker = self._idle.get()
        try:
            try:
                worker = self._take(worker)
                return worker.run(job)
            except SandboxError:
                worker = self._dropped(worker)
                worker = self._take(None)
                return worker.run(job)
        except BaseException:
            worker = self._dropped(worker)
            raise
        finally:
            if self.closed:
                worker = self._dropped(worker)
            with self._lock:
                self._busy.pop(threading.current_thread(), None)
            self._idle.put(worker)

    def _take(self, worker: Worker | None) -> Worker:
        self._check()
        worker = worker or Worker(self._mechanism, self._limits, self._size)
        with self._lock:
            self._busy[threading.current_thread()] = worker
        try:
            self._check()
        except SandboxError:  # nobody has seen it yet
            self._dropped(worker)
            raise
        return worker

    def _check(self) -> None:
        if self.closed or threading.current_thread() in self._stopped:
            raise SandboxError("the sandbox is closed." if self.closed else "the sandbox was interrupted.")

    def _dropped(self, worker: Worker | None) -> None:
        """Nothing, in the place of a worker that is closed."""
        with self._lock:
            self._busy.pop(threading.current_thread(), None)
        if worker is not None:
            worker.close()

    def stop(self, threads: Iterable[threading.Thread]) -> None:
        """Ends the programs that run for these threads, and they fail, as will whatever else these want to run."""
        with self._lock:
            self._stopped.update(threads)
            busy = [self._busy[thread] for thread in threads if thread in self._busy]
        for worker in busy:
            worker.kill()

    def close(self) -> None:
        """Ends all processes, also where threads wait for them."""
        self.closed = True
        with self._lock:
            busy = list(self._busy.values())
        for worker in busy:
            worker.kill()
        for _ in range(self._idle.qsize()):
            with contextlib.suppress(queue.Empty):
                if worker := self._idle.get_nowait():
                    worker.close()
                self._idle.put(None)  # who still comes hears that it is closed


class _Call:
    """Items that one caller waits for, and the threads that work through them.

    Threads of its own, which start in no time: nothing is shared with other callers but workers. They are daemons, for
    which an interpreter that ends does not wait.
    """

    def __init__(self, function: Callable[[Any], Any], items: Sequence[Any], most: int):
        self._function, self.results, self._error = function, [None] * len(items), None
        self._left, self._missing = deque(enumerate(items)), len(items)
        self._lock, self._done = threading.Lock(), threading.Event()
        self.threads = [
            threading.Thread(target=self._work, name="sandbox", daemon=True) for _ in range(min(most, len(items)))
        ]

    def wait(self) -> list[Any]:
        """Results in the order of items; raises what the function does, as soon as it does."""
        for thread in self.threads:
            thread.start()
        if self.threads:
            self._done.wait()
        if self._error is not None:
            raise self._error
        return self.results

    def drop(self) -> None:
        """What has not begun is left out."""
        self._left.clear()

    def _work(self) -> None:
        with contextlib.suppress(IndexError):  # nothing is left
            while True:
                self._settle(*self._left.popleft())

    def _settle(self, index: int, item: Any) -> None:
        try:
            result = self._function(item)
        except BaseException as error:
            self.drop()
            self._error = self._error or error
            self._done.set()
            return
        with self._lock:
            self.results[index] = result
            self._missing -= 1
            if not self._missing:
                self._done.set()


@functools.cache
def _say_once(level: int, text: str) -> None:
    _LOG.log(level, text)


class Sandbox:
    """Runs programs, up to `workers` at a time, from any thread; processes are started when they are first needed."""

    def __init__(self, limits: ProgramLimits | None = None, *, workers: int = 0, allow_weak: bool = False):
        """`workers`: programs at a time; 0: as many as there are cores for this process.

        What isolates is logged, once: a warning where programs could see or do anything outside.

        Raises:
          SandboxError: what isolates here is not `Isolation.strong`, and `allow_weak` is not set.
        """
        found = isolation()
        if not found.strong and not allow_weak:
            raise SandboxError(
                f"{found.description}. Programs that a model writes would run unconfined: mend it, or accept the risk "
                "with allow_weak (--code.allow_weak on the command line)."
            )
        if workers < 0:
            raise ValueError(f"workers={workers} must be 1 or more, or 0 for one a core.")
        _say_once(logging.INFO if found.complete else logging.WARNING, found.description)
        self.limits, self.workers = limits or ProgramLimits(), workers or len(os.sched_getaffinity(0))
        self._crew = _Crew(found.mechanism, self.limits, self.workers)
        self.close = weakref.finalize(self, self._crew.close)  # ends all processes; at exit, too

    def run(self, job: Job) -> Ran:
        """Runs a program in a fresh process; waits for a free worker first.

        Raises:
          SandboxError: the sandbox is broken, a second time in a new process too, or it is closed.
        """
        if self._crew.closed:
            raise SandboxError("the sandbox is closed.")
        return self._crew.run(job)

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """`function` of each item, in threads, as many at a time as there are workers.

        Where one raises, or Ctrl-C does, what has not begun of this call is left out and what runs of it is ended.
        """
        call = _Call(function, items, self.workers)
        try:
            return call.wait()
        except BaseException:
            call.drop()
            self._crew.stop(call.threads)
            raise

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

"""What runs in a worker process of `pool.Pool`: calls of functions named by path, each under limits.

The parent starts this file by its path, so that a worker holds neither the package nor anything of the parent but
what a function imports. Whatever is wrong with an item that is not an exception of the function ends the process: the
kernel's timers by their signals, also inside a call in C that holds the interpreter's lock, and memory by an exit
status. The parent reads which from how it ended.

Requests are a length and a pickle (the parent is trusted); replies are lines of JSON (items are not), numbered from 0,
so that nothing else is taken for one.
"""

import contextlib
import ctypes
import importlib
import importlib.util
import itertools
import json
import os
import pickle
import resource
import select
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO

OUT_OF_MEMORY = 97  # exit status
LENGTH = struct.Struct(">Q")
LOAD_SECONDS = (60.0, 600.0)  # CPU and wall time within which a function's module must have been imported
_WATCH = 0.5  # seconds between looks at who the parent is
_SAID = 2000  # bytes of what a worker wrote last that are kept
_PR_SET_CHILD_SUBREAPER = 36
_TIMERS = (signal.ITIMER_PROF, signal.ITIMER_REAL)  # CPU time of the process, wall time


def _supervise(child: int, parent: int, output: int, place: str) -> None:
    """Waits until the parent wants an end, or it or the worker has come to one; then ends all that the worker started.

    A process of its own, since no thread runs beside a call in C that holds the interpreter's lock. The parent's end is
    that of standard input, and where forked children of the parent hold that open, another parent. Passes on what the
    worker writes to standard error, and in the end reports its status and the last that it wrote.

    Args:
      child: the worker.
      parent: whose end is its own.
      output: where the worker's standard error can be read.
      place: its directory of temporary files, removed at the end.
    """
    disk = _module(os.path.join(os.path.dirname(__file__), "disk.py"))  # as a program this belongs to no package
    ended: dict[int, int] = {}  # statuses of children, of the worker and of those who lost their parent
    kept, pending, sources = b"", b"", [0, output]
    while os.getppid() == parent and child not in ended:
        # Never writes where that could block: somebody may have stopped reading.
        ready, free, _ = select.select([0] if pending else sources, [2] if pending else [], [], _WATCH)
        if 0 in ready:
            break
        if free:
            pending = _passed_on(pending)
        elif ready:
            pending = os.read(output, select.PIPE_BUF)
            kept, sources = (kept + pending)[-_SAID:], sources if pending else [0]
        with contextlib.suppress(ChildProcessError):
            while (dead := os.waitpid(-1, os.WNOHANG))[0]:
                ended[dead[0]] = dead[1]
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the latter on macOS, of zombies
        os.killpg(child, signal.SIGKILL)
    if child not in ended:
        os.kill(child, signal.SIGKILL)  # it may not have had a group yet
        ended[child] = os.waitpid(child, 0)[1]
    for orphans in iter(_children, []):  # the children of who ends become ours in turn
        for pid in orphans:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    os.set_blocking(output, False)
    with contextlib.suppress(BlockingIOError):
        last = os.read(output, 2**20)
        kept, pending = (kept + last)[-_SAID:], pending + last
    report = {"status": os.waitstatus_to_exitcode(ended[child]), "said": kept.decode(errors="replace")}
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(report).encode())
    pending += disk.removed(place).encode()
    while pending:
        pending = _passed_on(pending)
    os._exit(0)


def _passed_on(data: bytes) -> bytes:
    """What is left of it to write to standard error; nothing where there is none."""
    with contextlib.suppress(OSError):
        return data[os.write(2, data[: select.PIPE_BUF]) :]
    return b""


def _adopt() -> None:
    """Makes this process the parent of those among its descendants that lose theirs, whatever session they are in."""
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def _children() -> list[int]:
    """Of this process; none where the system does not say."""
    found, own = [], os.getpid()
    for name in filter(str.isdigit, os.listdir("/proc") if sys.platform == "linux" else ()):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            if int(file.read().rpartition(b")")[2].split()[1]) == own:
                found.append(int(name))
    return found


def _limit(cpu: float, wall: float) -> None:
    """Starts both timers, whose signals end the process; 0 stops them."""
    for timer, seconds in zip(_TIMERS, (cpu, wall), strict=True):
        signal.setitimer(timer, seconds)


def _limit_memory(extra: int) -> None:
    """So many bytes beyond what the worker has now; where the system does not say how much that is, no limit.

    Raises:
      MemoryError: the system's own limit leaves less.
    """
    try:
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY and size + extra > hard:
        raise MemoryError(
            f"the limit of address space (ulimit -v) is {hard >> 20} MiB, of which this worker has {size >> 20} "
            f"when its function is imported: expected memory_mib={extra >> 20} beyond that. Raise the one or lower the "
            "other."
        )
    resource.setrlimit(resource.RLIMIT_AS, (size + extra, hard))


def _module(file: str) -> Any:
    """What a file.py holds."""
    spec = importlib.util.spec_from_file_location(os.path.basename(file)[:-3], file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _load(path: str) -> Callable[..., Any]:
    """The function at `module:name` or `file.py:name`."""
    place, _, name = path.rpartition(":")
    return getattr(_module(place) if place.endswith(".py") else importlib.import_module(place), name)


def _loaded(path: str, functions: dict[str, Callable[..., Any]], memory: int) -> dict[str, Any]:
    """Loads a function where it is not, and says how that went."""
    if path in functions:
        return {"loaded": True}
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))  # what an import needs is not an item's
    _limit(*LOAD_SECONDS)
    try:
        function = _load(path)
        _limit_memory(memory)
    except BaseException as error:
        return {"error": _said(error)}
    finally:
        _limit(0, 0)
    functions[path] = function
    return {"loaded": True}


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}\n{traceback.format_exc()}"


def _judge(function: Callable[..., Any], payload: bytes, cpu: float, wall: float) -> bytes:
    """What the function says of an item, as JSON; an exception of its own is a reply, everything else the end."""
    started = time.perf_counter()
    _limit(cpu, wall)
    try:
        item = function(**pickle.loads(payload))
        return json.dumps({"item": item, "seconds": time.perf_counter() - started}, default=_number).encode()
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except Exception as error:
        return json.dumps({"error": _said(error)}).encode()
    except BaseException:  # sys.exit
        os._exit(1)
    finally:
        _limit(0, 0)


def _number(value: Any) -> Any:
    """A NumPy scalar as Python's own."""
    return value.item()


def _request(requests: BinaryIO) -> Any:
    """The next one, or None where there are no more."""
    header = requests.read(LENGTH.size)
    if len(header) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(header)
    data = requests.read(length)
    return pickle.loads(data) if len(data) == length else None


def _work(descriptor: int) -> None:
    """Answers requests until there are no more."""
    requests, replies = os.fdopen(descriptor, "rb"), os.fdopen(os.dup(descriptor), "wb")
    functions: dict[str, Callable[..., Any]] = {}
    own, numbers = os.getpid(), itertools.count()

    def reply(said: bytes) -> None:
        if os.getpid() != own:  # the function has forked, and this is the child, which has come back from it too
            os._exit(1)
        replies.write(b"[%d, %s]\n" % (next(numbers), said))
        replies.flush()  # one by one: the parent knows which item was the last

    sys.path[:], cpu, wall, memory = _request(requests)
    while (request := _request(requests)) is not None:
        path, payloads = request
        reply(json.dumps(_loaded(path, functions, memory)).encode())
        for payload in payloads if path in functions else ():
            reply(_judge(functions[path], payload, cpu, wall))


def main(descriptor: int, parent: int) -> None:
    """Becomes two processes: one that works, and one that ends it."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # these come from whichever thread of the parent started this
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves no file
    _adopt()
    place = tempfile.mkdtemp(prefix="grpo_jax_worker_")
    output, theirs = os.pipe()
    child = os.fork()
    if child:
        os.close(descriptor)  # so that the parent sees at once when the worker has ended
        os.close(theirs)
        _supervise(child, parent, output, place)
    os.setsid()  # an item that ends its own group does not end who cleans up behind it
    os.environ["TMPDIR"] = tempfile.tempdir = place
    os.close(output)
    os.set_inheritable(descriptor, False)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for standard in (1, 2):
        os.dup2(theirs, standard)  # what a function prints is seen and is no reply
    os.close(theirs)
    sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
    with contextlib.suppress(BrokenPipeError):  # nobody waits for replies any more
        _work(descriptor)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
    os._exit(0)  # whatever threads a function has left

"""The other side of the sandbox, which `sandbox.py` starts with the standard library and nothing else.

Jobs come in at stdin, and replies go out at stdout: a length, and JSON.

Three processes stand between the parent and a program. The first enters namespaces and waits; the second, the
first process of a process namespace, takes a job after the other; the third watches one program, which is the first
process of a process namespace of its own. Whichever of them dies takes everything below it along, and the first ends
when the parent is gone. A program is forked from a process that has never seen another one, and no expected
result ever comes to this side.
"""

import atexit
import base64
import contextlib
import gc
import importlib
import json
import os
import resource
import select
import signal
import site
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
import types

from grpo_jax.rewards import disk, fences, literals

# What programs import most: loaded once, before the first of them.
_LOADED = (
    "bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "enum", "fractions", "functools", "heapq",
    "io", "itertools", "math", "operator", "random", "re", "statistics", "string", "typing",
)  # fmt: skip
_PARKED, _READY = 60, 80  # free file descriptors
_TICK = 0.02  # seconds between looks at a program's clock, and at its files


# Messages -------------------------------------------------------------------------------------------


def _read_exactly(size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = os.read(0, size - len(data))
        if not part:
            os._exit(0)  # the parent is gone
        data += part
    return data


def receive() -> dict:
    """The next job: its length, then JSON."""
    (size,) = struct.unpack(">I", _read_exactly(4))
    return json.loads(_read_exactly(size))


def reply(message: dict) -> None:
    """Sends what came of a job."""
    data = json.dumps(message).encode()
    fences.write_all(1, struct.pack(">I", len(data)) + data)


# A program ------------------------------------------------------------------------------------------


def _limit(limits: dict, others: int) -> None:
    mib, cpu = 1 << 20, int(limits["cpu_seconds"]) + 2  # a backstop: whoever watches is more exact; each process's own
    for name, value in (
        ("CPU", cpu), ("AS", limits["memory_mib"] * mib), ("FSIZE", limits["file_mib"] * mib), ("CORE", 0),
        ("NPROC", limits["processes"] + others), ("NOFILE", 64), ("MEMLOCK", 0), ("MSGQUEUE", 0),
        ("STACK", 8 * mib), ("NICE", 0), ("RTPRIO", 0),
    ):  # fmt: skip
        which = getattr(resource, f"RLIMIT_{name}")
        _, hard = resource.getrlimit(which)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


def _set_up(job: dict, state: dict, files: list[int]) -> None:
    """Everything between a fork and the first line of a program, which finds these files at 0, 1, 2 and 3."""
    os.setsid()
    fences.no_new_privileges()
    fences.new_session_keyring()
    if state["landlock"]:  # as root yet, where nobody may not see the way to what may be read
        fences.landlock(state["directory"], state["reads"])
    for place, fd in enumerate(files):
        os.dup2(fd, _PARKED + place)
    for place in range(len(files)):
        os.dup2(_PARKED + place, place)
    os.closerange(len(files), _READY)
    os.chdir(state["directory"])
    tempfile.tempdir = state["directory"]  # it has looked for one already, as who we were
    os.umask(0o077)
    fences.drop_privileges(state["user"], reads_all=None not in (state["user"], state["reads"]))
    try:
        os.scandir(os.path.dirname(os.__file__)).close()
    except PermissionError as error:
        raise RuntimeError(
            f"root's programs run as another user, who may not read Python's library ({error}): make it readable "
            "for all, or run as an ordinary user"
        ) from None
    _limit(job["limits"], state["others"])
    if state["seccomp"] is not None:
        state["seccomp"].load()


def _run_main(text: str, module: types.ModuleType) -> None:
    """A main program, and what an interpreter does when it ends, however that is."""
    try:
        exec(compile(text, "<program>", "exec"), module.__dict__)
    finally:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads; idle ones of executors end
        atexit._run_exitfuncs()
        sys.stdout.flush()
        module.__dict__.clear()  # files that are still open are written, and what has a `__del__` may say something


def run_program(job: dict) -> int:
    """Runs a program, then its calls, each of which writes a line; or with `calls` None to its end.

    From here on nothing that this process says is true. It says what the program returned, of which it can say
    what it wants, because the parent alone knows what is right.
    """
    calls, text = job["calls"], job["program"]
    module = types.ModuleType("__main__" if calls is None else "program")
    module.__file__ = os.path.abspath(sys.argv[0])
    sys.modules[module.__name__] = module  # data classes look there

    def say(kind: str, content: object) -> None:
        fences.write_all(3, json.dumps([kind, content]).encode() + b"\n")

    try:
        if calls is None:
            _run_main(text, module)
            return 0
        exec(compile(text, "<program>", "exec"), module.__dict__)
        for call in calls:
            try:
                if "assert" in call:
                    exec(compile(call["assert"], "<test>", "exec"), module.__dict__)
                    value = None
                else:
                    arguments, named = literals.plain(call["args"]), literals.plain(call["kwargs"])
                    value = getattr(module, call["call"])(*arguments, **named)
                say("returned", literals.encode(value))
            except Exception as error:
                say("raised", f"{type(error).__name__}: {error}"[:200])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        with contextlib.suppress(Exception):
            say("failed", f"{type(error).__name__}: {error}"[:200])
        return 1
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
    return 0


# Whoever watches a program --------------------------------------------------------------------------


def watch(state: dict) -> None:
    """Takes one job, runs its program, and says what came of it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    fences.dies_with_parent()
    job = receive()
    if state["namespaces"]:
        fences.separate(job["limits"]["file_mib"])
        reply(_watched(job, state))
        return
    fences.adopt_orphans()
    state["directory"] = tempfile.mkdtemp(dir=state["scratch"])
    user = os.geteuid()
    if state["user"] is not None:
        user = state["user"]
        os.chown(state["directory"], user, fences.NOBODY)
    # Nor are this program's what the other workers start from here on: each who watches, and a program's processes.
    state["others"] = _processes_of(user) + (state["sharing"] - 1) * (1 + job["limits"]["processes"])
    try:
        message = _watched(job, state)
    finally:
        end_children()
        disk.empty(state["scratch"])  # all of it: without Landlock a program may have left something beside its own
    reply(message)


def _watched(job: dict, state: dict) -> dict:
    started = time.monotonic()
    stdin = os.memfd_create("stdin")  # a file: nobody waits for a program that does not read
    fences.write_all(stdin, job["stdin"].encode("utf-8", "surrogatepass"))
    os.lseek(stdin, 0, os.SEEK_SET)
    (out, stdout), (said, results), (ready, is_ready) = os.pipe(), os.pipe(), os.pipe()
    program = os.fork()
    if program == 0:
        try:
            os.dup2(is_ready, _READY)
            _set_up(job, state, [stdin, stdout, os.open("/dev/null", os.O_RDWR), results])
            os.close(_READY)  # that it is closed without a word says that all went well
        except BaseException:
            fences.write_all(_READY, traceback.format_exc().encode())
            os._exit(1)
        code = 1
        try:
            code = run_program(job)
        finally:
            os._exit(code & 255)
    for fd in (stdin, stdout, results, is_ready):
        os.close(fd)
    broken = b"".join(iter(lambda: os.read(ready, 1 << 16), b""))
    os.close(ready)
    files = None if state["namespaces"] else state["directory"]  # where no file system of its own bounds them
    ended, texts = _until_it_ends(program, {out: bytearray(), said: bytearray()}, job["limits"], started, files)
    with contextlib.suppress(ProcessLookupError):
        os.kill(program, signal.SIGKILL)
    _, status, usage = os.wait4(program, 0)
    _drain(texts, job["limits"])
    used = usage.ru_utime + usage.ru_stime
    if used > job["limits"]["cpu_seconds"]:
        ended = "cpu"  # however late a busy machine has let us look
    elif ended == "exit" and any(len(text) > job["limits"]["output_kib"] << 10 for text in texts.values()):
        ended = "output"  # it was quicker than whoever reads
    elif ended == "exit" and files is not None and disk.is_over(files, job["limits"]["file_mib"]):
        ended = "disk"
    if ended != "exit":
        texts[said] = bytearray()  # how far it got depends on when we looked
    if broken:
        return {"broken": broken.decode(errors="replace")}
    as_text = lambda fd: base64.b64encode(texts[fd]).decode()
    return {
        "ended": ended, "code": os.waitstatus_to_exitcode(status), "cpu_seconds": used,
        "seconds": time.monotonic() - started, "stdout": as_text(out), "results": as_text(said),
    }  # fmt: skip


def _until_it_ends(program: int, texts: dict, limits: dict, started: float, files: str | None) -> tuple[str, dict]:
    """Reads what a program says until it ends, or has used up a limit: which one."""
    most, end, poll = limits["output_kib"] << 10, os.pidfd_open(program), select.poll()
    clock = (~program << 3) | 2  # the CPU time of a process, of all its threads
    for fd in (end, *texts):
        poll.register(fd, select.POLLIN)
    poll.register(0, 0)  # says only when the parent is gone
    looked = started
    while True:
        for fd, event in poll.poll(1000 * _TICK):
            if fd == 0:
                os._exit(1)
            if fd == end:
                os.close(end)
                return "exit", texts
            part = os.read(fd, 1 << 16) if event & select.POLLIN else b""
            texts[fd] += part[: most + 1 - len(texts[fd])]
            if not part:
                poll.unregister(fd)
            elif len(texts[fd]) > most:
                return "output", texts
        with contextlib.suppress(OSError):
            if time.clock_gettime(clock) > limits["cpu_seconds"]:
                return "cpu", texts
        if time.monotonic() - started > limits["wall_seconds"]:
            return "wall", texts
        if files is not None and time.monotonic() - looked > _TICK:
            if disk.is_over(files, limits["file_mib"]):
                return "disk", texts
            looked = time.monotonic()


def _drain(texts: dict, limits: dict) -> None:
    """What was in the pipes when the program ended."""
    for fd, text in texts.items():
        os.set_blocking(fd, False)
        with contextlib.suppress(BlockingIOError):
            while len(text) <= limits["output_kib"] << 10 and (part := os.read(fd, 1 << 16)):
                text += part
        os.close(fd)


# Without a process namespace ------------------------------------------------------------------------


def _own_user() -> int:
    """A user that nobody else is: limits of processes, signals and keys go by users.

    No other sandbox takes it while this process lives: the name of a socket says that it is taken.
    """
    for user in range(fences.NOBODY, fences.NOBODY - 10_000, -1):
        taken = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(OSError):
            taken.bind(f"\0grpo-sandbox-{user}")
            if not _processes_of(user):
                taken.detach()
                return user
        taken.close()
    raise RuntimeError("there is no user left whom programs could be")


def _processes_of(user: int) -> int:
    """Processes and threads there are of a user: a limit on their number counts all."""
    count = 0
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == user:
                count += len(os.listdir(f"/proc/{name}/task"))
    return count


def end_children() -> None:
    """Kills whatever descends from this process until there is nothing left."""
    while True:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            children = [int(pid) for pid in file.read().split()]
        if not children:
            return
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


# One job after the other ----------------------------------------------------------------------------


def main(options: dict) -> None:
    """Says hello with what isolates, then takes jobs until the parent is gone."""
    os.environ.clear()
    sys.path[:] = map(os.path.realpath, sys.path)
    sys.argv[:] = sys.orig_argv[:] = ["program.py"]
    site.setquit()  # exit() and quit(): nobody has run `site`, which adds what is installed beside the library
    for name in _LOADED:
        importlib.import_module(name)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory runs out, the kernel takes this first, and not the training
    state = {
        "namespaces": False, "user": None, "sharing": 1, "directory": "/tmp", "scratch": None, "others": 0,
        "reads": None,
    }  # fmt: skip
    state["seccomp"] = fences.seccomp_filter(options["seccomp"])
    if options["mechanism"] == "namespaces":
        state["user"] = fences.enter_namespaces(options["visible"], options["hidden"])
        # A user namespace counts its own processes: of root's, nobody else is nobody; else three come before a program.
        state["namespaces"], state["others"] = True, 3 if state["user"] is None else 0
    else:
        fences.adopt_orphans()
        fences.hide_memory()  # programs may have the same user, and look neither into this process nor into who watches
        signal.signal(signal.SIGTERM, lambda *_: _tidy_up(state["scratch"]))  # before there is anything to leave
        state["scratch"] = options["scratch"] or tempfile.mkdtemp(prefix="grpo-sandbox-")
        if options["mechanism"] == "limits":  # in bubblewrap's namespace there is no other user, and no other worker
            if os.geteuid() == 0:
                state["user"] = _own_user()
                os.chmod(state["scratch"], 0o711)
            else:
                state["sharing"] = options["workers"]
    state["landlock"] = fences.landlock_version()
    if state["landlock"] and not state["namespaces"]:
        state["reads"] = fences.readable(options["visible"], options["hidden"], state["scratch"])
    fences.one_arena()
    gc.collect()
    gc.freeze()  # forks share this memory as long as nobody writes to it
    said = {name: state[name] for name in ("landlock", "scratch", "user")}
    reply({"seccomp": state["seccomp"] is not None, **said})
    parent, jobs = os.getppid(), select.poll()
    jobs.register(0, select.POLLIN)
    while os.getppid() == parent:
        if any(not event & select.POLLIN or not _one_job(state) for _, event in jobs.poll(1000)):
            break
    if state["scratch"] is not None:
        _tidy_up(state["scratch"])


def _tidy_up(scratch: str | None) -> None:
    """What the kernel does where there are namespaces."""
    end_children()
    if scratch is not None:
        sys.stderr.write(disk.removed(scratch))
    os._exit(0)


def _one_job(state: dict) -> bool:
    """Whether a job was done, and nothing is left of it."""
    watcher = os.fork()
    if watcher == 0:
        code = 1
        try:
            watch(state)
            code = 0
        except BaseException:
            reply({"broken": traceback.format_exc()})
        finally:
            os._exit(code)
    _, status = os.waitpid(watcher, 0)
    if status and not state["namespaces"]:
        end_children()
    return status == 0


def start(options: dict) -> None:
    """Never returns."""
    try:
        main(options)
    except BaseException:
        reply({"broken": traceback.format_exc()})
    os._exit(0)

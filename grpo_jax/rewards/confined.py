"""The other side of the sandbox: a script that `sandbox.py` starts, with the standard library and nothing else.

    python -c THIS OPTIONS    OPTIONS in JSON; jobs come in at stdin, replies go out at stdout

Three processes stand between the parent and a program. The first enters namespaces and waits; the second, the
first process of a process namespace, takes a job after the other; the third watches one program, which is the first
process of a process namespace of its own. Whichever of them dies takes everything below it along, and the first ends
when the parent is gone. A program is forked from a process that has never seen another one, and no expected
result ever comes to this side.
"""

import base64
import contextlib
import ctypes
import gc
import importlib
import importlib.util
import json
import os
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
import types

# What programs import most: loaded once, before the first of them.
_LOADED = (
    "bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "enum", "fractions", "functools", "heapq",
    "io", "itertools", "math", "operator", "random", "re", "statistics", "string", "typing",
)  # fmt: skip
_NOBODY = 65534
_CLONE = {"mount": 0x20000, "cgroup": 0x2000000, "uts": 0x4000000, "ipc": 0x8000000, "user": 0x10000000,
          "pid": 0x20000000, "net": 0x40000000}  # fmt: skip
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 4, 24, 36, 38
_PARKED, _READY = 60, 80  # free file descriptors
_TICK = 0.02  # seconds between looks at a program's clock
_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> int:
    """A function of the C library; raises OSError with its name."""
    result = getattr(_libc, name)(*arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return result


def _syscall(number: int, *arguments: object) -> int:
    return _call("syscall", ctypes.c_long(number), *arguments)


def _dies_with_parent() -> None:
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


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
    _write(1, struct.pack(">I", len(data)) + data)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


# Namespaces -----------------------------------------------------------------------------------------


def _map_ids(pid: int, root: bool) -> None:
    """Who is who in a new user namespace: inside a program is nobody, and outside nobody too, or its user."""
    if not root:
        with open(f"/proc/{pid}/setgroups", "w") as file:
            file.write("deny")
    for name, own in (("gid_map", os.getegid()), ("uid_map", os.geteuid())):
        with open(f"/proc/{pid}/{name}", "w") as file:
            file.write(f"0 0 1\n{_NOBODY} {_NOBODY} 1\n" if root else f"{_NOBODY} {own} 1\n")


def _unshare_all(root: bool) -> None:
    """New namespaces of all kinds; the next child is the first of the process namespace.

    Raises:
      OSError: the kernel, or whoever configured it, refuses.
    """
    if not root:
        _call("unshare", sum(_CLONE.values()))
        _map_ids(os.getpid(), root)
        return
    # Only who stays outside may map ids other than one's own: a child that waits until there is something to map.
    (listen, go), pid = os.pipe(), os.getpid()
    helper = os.fork()
    if helper == 0:
        os.close(go)
        mapped = False
        with contextlib.suppress(OSError):
            if os.read(listen, 1):
                _map_ids(pid, root)
                mapped = True
        os._exit(not mapped)
    os.close(listen)
    _call("unshare", sum(_CLONE.values()))
    _write(go, b"!")
    os.close(go)
    if os.waitpid(helper, 0)[1]:
        raise OSError("the ids of root and nobody cannot be mapped into a user namespace")


def enter_namespaces(visible: list[str]) -> bool:
    """Becomes the first process of namespaces of all kinds, with a file tree of its own; the process before waits.

    Returns:
      Whether programs have another user than the parent has: where that is root, they are nobody.
    """
    root, parent = os.geteuid() == 0, os.getppid()
    _unshare_all(root)
    first = os.fork()
    if first:
        end = os.pidfd_open(first)
        while not select.select([end], [], [], 1.0)[0]:
            if os.getppid() != parent:  # where another process holds the parent's pipe by accident
                break
        os._exit(0)
    _dies_with_parent()
    with contextlib.suppress(OSError), open("/proc/sys/user/max_user_namespaces", "w") as file:
        file.write("0")  # programs make no namespaces of their own, where they would be root
    with contextlib.suppress(OSError):
        name = b"sandbox"
        _call("sethostname", name, len(name))
    _own_tree(visible)
    return root


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    _call("mount", source.encode(), target.encode(), kind.encode() if kind else None, ctypes.c_ulong(flags),
          options.encode())  # fmt: skip


def _set_read_only(path: str, flags: int, recursive: bool) -> None:
    """mount_setattr(2): adds flags to a mount, or to all below it, whatever others they have."""
    attributes = struct.pack("=QQQQ", flags, 0, 0, 0)
    _syscall(442, -100, path.encode(), 0x8000 if recursive else 0, attributes, len(attributes))


def _own_tree(visible: list[str]) -> None:
    """A file tree of Python, system libraries and /dev/null and its like, read-only; the host's is gone."""
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    os.chdir("/tmp")
    os.mkdir("new", 0o755)
    os.mkdir("old", 0o755)
    _call("pivot_root", b"/tmp", b"/tmp/old")
    os.chdir("/")
    _mount("/new", "/new", None, _MS_BIND | _MS_REC)
    for path in visible:
        _show(path)
    os.makedirs("/new/dev", exist_ok=True)
    for name in ("null", "zero", "random", "urandom"):
        open(f"/new/dev/{name}", "w").close()
        _mount(f"/old/dev/{name}", f"/new/dev/{name}", None, _MS_BIND)
    os.makedirs("/new/tmp", exist_ok=True)
    os.chdir("/new")
    _call("pivot_root", b".", b".")
    _call("umount2", b".", 2)  # MNT_DETACH: the old root, and the first tmpfs
    os.chdir("/")
    _set_read_only("/", _MS_RDONLY | _MS_NOSUID | _MS_NODEV, recursive=False)


def _show(path: str) -> None:
    """Shows a directory, file or link of the host at the same place."""
    source, target = f"/old{path}", f"/new{path}"
    if not os.path.lexists(source) or os.path.lexists(target):
        return
    os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
    if os.path.islink(source):
        os.symlink(os.readlink(source), target)
        return
    if os.path.isdir(source):
        os.mkdir(target, 0o755)
    else:
        open(target, "w").close()
    _mount(source, target, None, _MS_BIND | _MS_REC)
    _set_read_only(target, _MS_RDONLY | _MS_NOSUID | _MS_NODEV, recursive=True)


# Less than namespaces: Landlock and seccomp ---------------------------------------------------------


def landlock(writable: str) -> None:
    """From here on nothing is written but below one directory (Landlock, Linux 5.13); reading is not restricted.

    Raises:
      OSError: the kernel has no Landlock.
    """
    version = _syscall(444, None, 0, 1)
    # All that writes, makes or removes: everything but execute, read a file, read a directory.
    file, other = 1 << 1 | (version >= 3) << 14, 0b1111111110000 | (version >= 2) << 13
    attributes = struct.pack("=Q", file | other)
    if version >= 4:
        attributes += struct.pack("=Q", 0b11)  # no TCP
    if version >= 6:
        attributes += struct.pack("=Q", 0b11)  # neither abstract sockets nor signals to others
    rules = _syscall(444, attributes, len(attributes), 0)
    for path, allowed in ((writable, file | other), ("/dev/null", file)):
        place = os.open(path, os.O_PATH)
        _syscall(445, rules, 1, struct.pack("=Qi", allowed, place), 0)
        os.close(place)
    _syscall(446, rules, 0)
    os.close(rules)


# Nothing of these is needed to compute, and each has been a way out of a sandbox, or into the kernel.
_REFUSED = (
    "socket", "unshare", "setns", "mount", "umount2", "pivot_root", "chroot", "move_mount", "open_tree", "fsopen",
    "fsmount", "mount_setattr", "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "bpf", "keyctl",
    "add_key", "request_key", "perf_event_open", "userfaultfd", "io_uring_setup", "io_uring_enter",
    "io_uring_register", "kexec_load", "init_module", "finit_module", "delete_module", "open_by_handle_at",
    "name_to_handle_at", "quotactl", "swapon", "swapoff", "reboot", "acct", "syslog", "personality", "fanotify_init",
    "memfd_secret", "vmsplice", "sched_setattr", "sched_setscheduler", "migrate_pages", "move_pages", "lookup_dcookie",
    # Landlock does not know these; where there are namespaces there is nothing to use them on.
    "chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat", "utime", "utimes", "utimensat",
    "futimesat", "setxattr", "lsetxattr", "fsetxattr", "removexattr", "lremovexattr", "fremovexattr",
)  # fmt: skip


def seccomp_filter(module: str | None):  # type: ignore[no-untyped-def]
    """A filter of system calls, by pyseccomp and libseccomp; None where they are not installed."""
    if module is None:
        return None
    import ctypes.util

    ctypes.util.find_library = {"c": "libc.so.6", "seccomp": "libseccomp.so.2"}.get  # it would ask a compiler
    try:
        spec = importlib.util.spec_from_file_location("pyseccomp", module)
        seccomp = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(seccomp)  # type: ignore[union-attr]
        made = seccomp.SyscallFilter(seccomp.ALLOW)
        for name in _REFUSED:
            with contextlib.suppress(OSError, ValueError):  # a call that this kernel or library does not know
                made.add_rule(seccomp.ERRNO(1), name)
        made.add_rule(seccomp.ERRNO(38), "clone3")  # whose flags lie in memory: without it clone is used
        for flag in _CLONE.values():
            made.add_rule(seccomp.ERRNO(1), "clone", seccomp.Arg(0, seccomp.MASKED_EQ, flag, flag))
    except (OSError, RuntimeError, AttributeError, TypeError):
        return None
    return made


# A program ------------------------------------------------------------------------------------------


def _drop_privileges(nobody: bool) -> None:
    if nobody:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    with contextlib.suppress(OSError):
        for capability in range(64):
            _call("prctl", _PR_CAPBSET_DROP, capability, 0, 0, 0)
    _call("capset", struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", *[0] * 6))
    _dies_with_parent()  # a change of user forgets it


def _limit(limits: dict, others: int) -> None:
    mib, cpu = 1 << 20, int(limits["cpu_seconds"]) + 2  # whoever watches is more exact; this is each process's own
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
    for place, fd in enumerate(files):
        os.dup2(fd, _PARKED + place)
    for place in range(len(files)):
        os.dup2(_PARKED + place, place)
    os.closerange(len(files), _READY)
    os.chdir(state["directory"])
    os.umask(0o077)
    if state["namespaces"]:
        _drop_privileges(state["nobody"])
    else:
        _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        _dies_with_parent()
    if state["landlock"]:
        landlock(state["directory"])
    _limit(job["limits"], state["others"])
    if state["seccomp"] is not None:
        state["seccomp"].load()


def run_program(job: dict) -> int:
    """Runs a program, then its calls, each of which writes a line; or with `calls` None to its end.

    From here on nothing that this process says is true. It says what the program returned, of which it can say
    what it wants, because the parent alone knows what is right.
    """
    literals = sys.modules["literals"]
    calls, text = job["calls"], job["program"]
    module = types.ModuleType("__main__" if calls is None else "program")
    sys.modules[module.__name__] = module  # data classes look there

    def say(kind: str, content: object) -> None:
        _write(3, json.dumps([kind, content]).encode() + b"\n")

    try:
        exec(compile(text, "<program>", "exec"), module.__dict__)
        for call in calls or ():
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
        if calls is None:
            for thread in threading.enumerate():
                if thread is not threading.current_thread() and not thread.daemon:
                    thread.join()
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
    _dies_with_parent()
    job = receive()
    if state["namespaces"]:
        _call("unshare", _CLONE["pid"] | _CLONE["mount"] | _CLONE["ipc"])
        size = f"size={job['limits']['file_mib']}m,nr_inodes=1000,mode=700,uid={_NOBODY},gid={_NOBODY}"
        _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, size)  # gone with the mount namespace
        reply(_watched(job, state))
        return
    _call("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what loses its parents comes here
    _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)  # the program has the same user, and may not look into this process
    state["directory"], state["others"] = tempfile.mkdtemp(dir=state["scratch"]), _processes_of_user()
    try:
        message = _watched(job, state)
    finally:
        end_children()
        shutil.rmtree(state["directory"], ignore_errors=True)
    reply(message)


def _watched(job: dict, state: dict) -> dict:
    started = time.monotonic()
    stdin = os.memfd_create("stdin")  # a file: nobody waits for a program that does not read
    _write(stdin, job["stdin"].encode("utf-8", "surrogatepass"))
    os.lseek(stdin, 0, os.SEEK_SET)
    (out, stdout), (said, results), (ready, is_ready) = os.pipe(), os.pipe(), os.pipe()
    program = os.fork()
    if program == 0:
        try:
            os.dup2(is_ready, _READY)
            _set_up(job, state, [stdin, stdout, os.open("/dev/null", os.O_RDWR), results])
            os.close(_READY)  # that it is closed without a word says that all went well
        except BaseException:
            _write(_READY, traceback.format_exc().encode())
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
    ended, texts = _until_it_ends(program, {out: bytearray(), said: bytearray()}, job["limits"], started)
    with contextlib.suppress(ProcessLookupError):
        os.kill(program, signal.SIGKILL)
    _, status, usage = os.wait4(program, 0)
    _drain(texts, job["limits"])
    if ended == "exit" and any(len(text) > job["limits"]["output_kib"] << 10 for text in texts.values()):
        ended = "output"  # it was quicker than whoever reads
    if broken:
        return {"broken": broken.decode(errors="replace")}
    as_text = lambda fd: base64.b64encode(texts[fd]).decode()
    return {
        "ended": ended, "code": os.waitstatus_to_exitcode(status), "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "seconds": time.monotonic() - started, "stdout": as_text(out), "results": as_text(said),
    }  # fmt: skip


def _until_it_ends(program: int, texts: dict, limits: dict, started: float) -> tuple[str, dict]:
    """Reads what a program says until it ends, or has used up a limit: which one."""
    most, end, poll = limits["output_kib"] << 10, os.pidfd_open(program), select.poll()
    clock = (~program << 3) | 2  # the CPU time of a process, of all its threads
    for fd in (end, *texts):
        poll.register(fd, select.POLLIN)
    poll.register(0, 0)  # says only when the parent is gone
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


def _drain(texts: dict, limits: dict) -> None:
    """What was in the pipes when the program ended."""
    for fd, text in texts.items():
        os.set_blocking(fd, False)
        with contextlib.suppress(BlockingIOError):
            while len(text) <= limits["output_kib"] << 10 and (part := os.read(fd, 1 << 16)):
                text += part
        os.close(fd)


# Without a process namespace ------------------------------------------------------------------------


def _processes_of_user() -> int:
    """Processes and threads there are of this user: a limit on their number counts all."""
    count, me = 0, os.geteuid()
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == me:
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
    for name in _LOADED:
        importlib.import_module(name)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory runs out, the kernel takes this first, and not the training
    state = {"namespaces": False, "nobody": False, "landlock": False, "directory": "/tmp", "scratch": None, "others": 0}
    state["seccomp"] = seccomp_filter(options["seccomp"])
    if options["mechanism"] == "namespaces":
        state["nobody"] = enter_namespaces(options["visible"])
        # A user namespace counts its own processes: of root's, nobody else is nobody; else three come before a program.
        state["namespaces"], state["others"] = True, 0 if state["nobody"] else 3
    else:
        _call("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        state["scratch"] = tempfile.mkdtemp(prefix="grpo-sandbox-")
        signal.signal(signal.SIGTERM, lambda *_: _tidy_up(state["scratch"]))
    with contextlib.suppress(OSError):
        state["landlock"] = _syscall(444, None, 0, 1) >= 1
    gc.collect()
    gc.freeze()  # forks share this memory as long as nobody writes to it
    reply({"seccomp": state["seccomp"] is not None, **{name: state[name] for name in ("landlock", "scratch")}})
    parent, jobs = os.getppid(), select.poll()
    jobs.register(0, select.POLLIN)
    while os.getppid() == parent:
        if any(not event & select.POLLIN or not _one_job(state) for _, event in jobs.poll(1000)):
            break
    if state["scratch"] is not None:
        _tidy_up(state["scratch"])


def _tidy_up(scratch: str) -> None:
    """What the kernel does where there are namespaces."""
    end_children()
    shutil.rmtree(scratch, ignore_errors=True)
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


if __name__ == "__main__":
    try:
        sys.modules["literals"] = literals = types.ModuleType("literals")
        given = json.loads(sys.argv[1])
        exec(compile(given["literals"], "literals.py", "exec"), literals.__dict__)
        main(given)
    except BaseException:
        reply({"broken": traceback.format_exc()})
    os._exit(0)

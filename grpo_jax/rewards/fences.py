"""What keeps a process in: namespaces, capabilities, Landlock and seccomp, by system calls of our own.

For `confined.py`, which has the standard library and nothing else. Linux 5.14 and later: from then on a user namespace
counts its own processes, which is what bounds a program's.
"""

import contextlib
import ctypes
import ctypes.util
import errno
import importlib.util
import os
import platform
import select
import signal
import struct
from collections.abc import Iterator
from typing import Any

__all__ = [
    "DEVICES", "NOBODY", "adopt_orphans", "dies_with_parent", "drop_privileges", "enter_namespaces", "hide_memory",
    "landlock", "landlock_version", "new_session_keyring", "no_new_privileges", "one_arena", "readable",
    "seccomp_filter", "separate", "session_keyring", "user_keyring", "write_all",
]  # fmt: skip

NOBODY = 65534
_CLONE = {"mount": 0x20000, "cgroup": 0x2000000, "uts": 0x4000000, "ipc": 0x8000000, "user": 0x10000000,
          "pid": 0x20000000, "net": 0x40000000}  # fmt: skip
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_KEEPCAPS, _PR_CAPBSET_DROP = 1, 4, 8, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_CAP_DAC_READ_SEARCH = 2
_KEYCTL = {"x86_64": 250, "aarch64": 219}  # this call's number; those below are the same everywhere
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
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


def dies_with_parent() -> None:
    """This process is killed when the one that started it ends."""
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def adopt_orphans() -> None:
    """What descends from this process comes to it when it loses its parents."""
    _call("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def hide_memory() -> None:
    """No process of the same user may trace this one."""
    _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)


def no_new_privileges() -> None:
    """No program that is executed has more than this one: setuid files are like others."""
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _keyctl(*arguments: object) -> int | None:
    """keyctl(2); None where there are no keys, or whoever started us refuses the call, to programs too."""
    if (machine := platform.machine()) not in _KEYCTL:
        raise OSError(errno.ENOSYS, f"the number of the system call keyctl on {machine} is not known")
    try:
        return _syscall(_KEYCTL[machine], *arguments)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EPERM, errno.EACCES):
            return None
        raise


def session_keyring() -> int | None:
    """The number of the session's keyring; None: this process can have no keys."""
    return _keyctl(0, -3, 0)


def user_keyring() -> int | None:
    """The same of the user's, which all processes of a user in a namespace share: only refusing calls is against it."""
    return _keyctl(0, -4, 0)


def new_session_keyring() -> None:
    """Neither keys of the host nor those that a program has left are found from here on."""
    _keyctl(1, None)


def one_arena() -> None:
    """Threads share a heap: the address space that glibc sets aside for each would count as memory."""
    with contextlib.suppress(AttributeError):  # another C library
        _libc.mallopt(-8, 1)  # M_ARENA_MAX


def write_all(fd: int, data: bytes) -> None:
    """Writes all of it, where `os.write` may write a part."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


# Namespaces -----------------------------------------------------------------------------------------


def _map_ids(pid: int, user: int, group: int) -> None:
    """Who is who in a new user namespace: inside a program is nobody, and outside nobody too, or this user."""
    if user:
        with open(f"/proc/{pid}/setgroups", "w") as file:
            file.write("deny")
    for name, own in (("gid_map", group), ("uid_map", user)):
        with open(f"/proc/{pid}/{name}", "w") as file:
            file.write(f"{NOBODY} {own} 1\n" if user else f"0 0 1\n{NOBODY} {NOBODY} 1\n")


def _unshare_all() -> None:
    """New namespaces of all kinds; the next child is the first of the process namespace.

    Raises:
      OSError: the kernel, or whoever configured it, refuses.
    """
    user, group = os.geteuid(), os.getegid()  # in a namespace that does not know them yet, nobody's would be said
    if user:
        _call("unshare", sum(_CLONE.values()))
        _map_ids(os.getpid(), user, group)
        return
    # Only who stays outside may map ids other than one's own: a child that waits until there is something to map.
    (listen, go), pid = os.pipe(), os.getpid()
    helper = os.fork()
    if helper == 0:
        os.close(go)
        mapped = False
        with contextlib.suppress(OSError):
            if os.read(listen, 1):
                _map_ids(pid, user, group)
                mapped = True
        os._exit(not mapped)
    os.close(listen)
    _call("unshare", sum(_CLONE.values()))
    write_all(go, b"!")
    os.close(go)
    if os.waitpid(helper, 0)[1]:
        raise OSError("the ids of root and nobody cannot be mapped into a user namespace")


def enter_namespaces(visible: list[str], hidden: list[str]) -> int | None:
    """Becomes the first process of namespaces of all kinds, with a file tree of its own; the process before waits.

    Returns:
      Whom programs are to become, where the parent is root: nobody.
    """
    root, parent = os.geteuid() == 0, os.getppid()
    _unshare_all()
    first = os.fork()
    if first:
        end = os.pidfd_open(first)
        while not select.select([end], [], [], 1.0)[0]:
            if os.getppid() != parent:  # where another process holds the parent's pipe by accident
                break
        os._exit(0)
    dies_with_parent()
    with contextlib.suppress(OSError), open("/proc/sys/user/max_user_namespaces", "w") as file:
        file.write("0")  # programs make no namespaces of their own, where they would be root
    with contextlib.suppress(OSError):
        name = b"sandbox"
        _call("sethostname", name, len(name))
    _own_tree(visible, hidden)
    return NOBODY if root else None


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    _call("mount", source.encode(), target.encode(), kind.encode() if kind else None, ctypes.c_ulong(flags),
          options.encode())  # fmt: skip


def _set_read_only(path: str, flags: int, recursive: bool) -> None:
    """mount_setattr(2): adds flags to a mount, or to all below it, whatever others they have."""
    attributes = struct.pack("=QQQQ", flags, 0, 0, 0)
    _syscall(442, -100, path.encode(), 0x8000 if recursive else 0, attributes, len(attributes))


def _own_tree(visible: list[str], hidden: list[str]) -> None:
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
    for path in hidden:
        if os.path.isdir(f"/new{path}"):
            _mount("tmpfs", f"/new{path}", "tmpfs", _MS_RDONLY | _MS_NOSUID | _MS_NODEV, "size=4k,mode=755")
    os.makedirs("/new/dev", exist_ok=True)
    for path in DEVICES:
        open(f"/new{path}", "w").close()
        _mount(f"/old{path}", f"/new{path}", None, _MS_BIND)
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


def separate(mib: int) -> None:
    """What is forked next is the first process of a process namespace, with an empty /tmp of this size in memory.

    It is gone with the mount namespace, which ends with its last process.
    """
    _call("unshare", _CLONE["pid"] | _CLONE["mount"] | _CLONE["ipc"])
    options = f"size={mib}m,nr_inodes=1000,mode=700,uid={NOBODY},gid={NOBODY}"
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, options)


# Less than namespaces: Landlock and seccomp ---------------------------------------------------------


def landlock_version() -> int:
    """Of the kernel's interface; 0: it has none."""
    try:
        return _syscall(444, None, 0, 1)
    except OSError:
        return 0


def readable(visible: list[str], hidden: list[str], scratch: str) -> int:
    """A set of rules for `landlock`: what may be read where there is no file tree of our own, and nothing is executed.

    Names of files may be listed also where they are hidden: importing lists directories.
    """
    execute, file, names = 1 << 0, 1 << 2, 1 << 3
    rules = _rules(struct.pack("=Q", execute | file | names))
    places = sorted({os.path.realpath(path) for path in visible if os.path.exists(path)})
    for path in places:
        if os.path.isdir(path):
            _allow(rules, path, names)
        for part in _without(path, hidden):
            _allow(rules, part, file)
    for path in DEVICES:
        _allow(rules, path, file)
    _allow(rules, scratch, file | names)
    return rules


def _without(path: str, hidden: list[str]) -> Iterator[str]:
    """A path, or where something below it is hidden, all the rest: rules can only add."""
    if path in hidden:
        return
    if not any(other.startswith(f"{path}/") for other in hidden):
        yield path
        return
    for entry in os.scandir(path):
        if not entry.is_symlink():  # what it leads to is visible itself, or is not to be
            yield from _without(entry.path, hidden)


def _rules(attributes: bytes) -> int:
    return _syscall(444, attributes, len(attributes), 0)


def _allow(rules: int, path: str, allowed: int) -> None:
    place = os.open(path, os.O_PATH)
    try:
        _syscall(445, rules, 1, struct.pack("=Qi", allowed, place), 0)
    finally:
        os.close(place)


def landlock(writable: str, reads: int | None) -> None:
    """From here on nothing is written but below one directory, and by `readable`'s rules, if any, little is read.

    Landlock, Linux 5.13. It needs `no_new_privileges`.

    Raises:
      OSError: the kernel has no Landlock.
    """
    version = landlock_version()
    # All that writes, makes or removes: everything but execute, read a file, read a directory.
    file, other = 1 << 1 | (version >= 3) << 14, 0b1111111110000 | (version >= 2) << 13
    attributes = struct.pack("=Q", file | other)
    if version >= 4:
        attributes += struct.pack("=Q", 0b11)  # no TCP
    if version >= 6:
        attributes += struct.pack("=Q", 0b11)  # neither abstract sockets nor signals to others
    writes = _rules(attributes)
    _allow(writes, writable, file | other)
    _allow(writes, "/dev/null", file)
    for rules in (writes, *([] if reads is None else [reads])):
        _syscall(446, rules, 0)
        os.close(rules)


# Nothing of these is needed to compute, and each has been a way out of a sandbox, or into the kernel.
_REFUSED = (
    "socket", "unshare", "setns", "mount", "umount2", "pivot_root", "chroot", "move_mount", "open_tree", "fsopen",
    "fsmount", "mount_setattr", "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "bpf", "keyctl",
    "add_key", "request_key", "perf_event_open", "userfaultfd", "io_uring_setup", "io_uring_enter",
    "io_uring_register", "io_setup", "kexec_load", "init_module", "finit_module", "delete_module", "open_by_handle_at",
    "name_to_handle_at", "quotactl", "swapon", "swapoff", "reboot", "acct", "syslog", "personality", "fanotify_init",
    "memfd_secret", "vmsplice", "migrate_pages", "move_pages", "lookup_dcookie",
    # Memory that no limit counts, or that is the host's where it shares an IPC namespace with programs.
    "memfd_create", "shmget", "shmat", "msgget", "msgsnd", "msgrcv", "semget", "semop", "semtimedop", "mq_open",
    # Of other processes of the same user, or of the host.
    "setpriority", "ioprio_set", "sched_setaffinity", "sched_setattr", "sched_setparam", "sched_setscheduler",
    "process_madvise", "process_mrelease", "sethostname", "setdomainname",
    # Landlock does not know these; where there are namespaces there is nothing to use them on.
    "chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat", "utime", "utimes", "utimensat",
    "futimesat", "setxattr", "lsetxattr", "fsetxattr", "removexattr", "lremovexattr", "fremovexattr",
)  # fmt: skip


def seccomp_filter(module: str | None) -> Any:
    """A filter of system calls, by pyseccomp and libseccomp; None where they are not installed."""
    if module is None:
        return None
    ctypes.util.find_library = {"c": "libc.so.6", "seccomp": "libseccomp.so.2"}.get  # it would ask a compiler
    try:
        spec = importlib.util.spec_from_file_location("pyseccomp", module)
        seccomp = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(seccomp)  # type: ignore[union-attr]
        made = seccomp.SyscallFilter(seccomp.ALLOW)
        for name in _REFUSED:
            with contextlib.suppress(OSError, ValueError):  # a call that this kernel or library does not know
                made.add_rule(seccomp.ERRNO(1), name)
        made.add_rule(seccomp.ERRNO(1), "prlimit64", seccomp.Arg(0, seccomp.NE, 0))  # limits of another process
        # These give a file room beyond the limit of its size: libraries write instead.
        made.add_rule(seccomp.ERRNO(errno.EOPNOTSUPP), "fallocate")
        for request in (0x40305828, 0x4030582A, 0x40305839):  # FS_IOC_RESVSP, FS_IOC_RESVSP64, FS_IOC_ZERO_RANGE
            wanted = seccomp.Arg(1, seccomp.MASKED_EQ, 0xFFFFFFFF, request)
            made.add_rule(seccomp.ERRNO(errno.EOPNOTSUPP), "ioctl", wanted)
        made.add_rule(seccomp.ERRNO(38), "clone3")  # whose flags lie in memory: without it clone is used
        for flag in _CLONE.values():
            made.add_rule(seccomp.ERRNO(1), "clone", seccomp.Arg(0, seccomp.MASKED_EQ, flag, flag))
    except (OSError, RuntimeError, AttributeError, TypeError):
        return None
    return made


def drop_privileges(user: int | None, *, reads_all: bool = False) -> None:
    """No capability is left, and none can be had again; `user`: root becomes that one first.

    `reads_all`: but for the one to read any file, where the host gives it: for who says by other means what is read.
    """
    if reads_all:
        _call("prctl", _PR_SET_KEEPCAPS, 1, 0, 0, 0)
    if user is not None:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(user, user, user)
    no_new_privileges()
    with contextlib.suppress(OSError):
        for capability in range(64):
            _call("prctl", _PR_CAPBSET_DROP, capability, 0, 0, 0)
    try:
        _set_capabilities(reads_all << _CAP_DAC_READ_SEARCH)
    except OSError:  # the host's root has not got it itself
        _set_capabilities(0)
    dies_with_parent()  # a change of user forgets it


def _set_capabilities(these: int) -> None:
    _call("capset", struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", these, these, 0, 0, 0, 0))

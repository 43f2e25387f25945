"""Hostile programs: none of many scores, harms the host, sees or reaches anything of it, or outlives its judge."""

import contextlib
import ctypes
import os
import pathlib
import platform
import resource
import socket
import subprocess
import sys
import threading
import uuid

import pytest

from grpo_jax.rewards import programs, sandbox
from grpo_jax.rewards.sandbox import Job, SandboxError, call, isolation
from tests import sandboxes, unavailable
from tests.hostile import CHEATS, HARMS
from tests.sandboxes import HONEST, LIMITS, judge, settled

CANARY = f"canary-{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def reward(marked):
    """By namespaces, or bubblewrap's."""
    if not isolation().complete:
        unavailable(isolation().description)
    with sandboxes.reward(marked) as made:
        yield made


@pytest.fixture(scope="module")
def limited(marked):
    """Where a host refuses namespaces: by limits, Landlock and seccomp."""
    found = sandbox._tried("limits")
    if not found.strong:
        unavailable(found.description)
    with contextlib.ExitStack() as stack:
        with sandboxes.by(found):  # no longer than it is made: the other one may be made while this one lives
            made = stack.enter_context(sandboxes.reward(marked))
        yield made


@pytest.fixture(scope="module", params=["reward", "limited"])
def either(request):
    return request.getfixturevalue(request.param)


def judged_and_gone(reward, marked, program):
    """A program's verdict is 0; nothing of it survives, and its worker does."""
    judged = judge(reward, program)
    assert judged == [0]
    assert judged.failed == [False], "what a program does is a verdict, and no failure"
    assert judge(reward, HONEST) == [1]
    mechanism = reward._sandbox._crew._mechanism
    idle = {"namespaces": 2, "bubblewrap": 3, "limits": 1}[mechanism]
    assert settled(marked, idle, mechanism=mechanism) == idle


def test_what_honest_programs_use_is_there(either):
    """Files, threads, event loops, what a library in C calls back: however tightly they are held."""
    program = """
import asyncio, concurrent.futures, ctypes, os, sqlite3, tempfile, zoneinfo
def f():
    with tempfile.TemporaryFile() as file, concurrent.futures.ThreadPoolExecutor(3) as threads:
        file.write(b'x')
        back = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(lambda x: x + 1)
        (row,) = sqlite3.connect(':memory:').execute('select 4').fetchall()
        return [sum(threads.map(abs, [1, -2])), asyncio.run(asyncio.sleep(0, 2)), back(2), *row, len(os.urandom(9))]
"""
    tests = [{"call": "f", "args": [], "result": [3, 2, 3, 4, 9]}]
    assert judge(either, program, tests=tests) == [1]


@pytest.mark.parametrize("name", CHEATS)
def test_no_claim_scores(either, marked, name):
    judged_and_gone(either, marked, CHEATS[name])


@pytest.mark.parametrize("name", HARMS)
def test_no_harm_is_done(either, marked, name):
    judged_and_gone(either, marked, HARMS[name])


FULL = "OSError: [Errno 28] No space left on device"
ENDS = {  # by namespaces, and by limits alone where they end it otherwise
    "a memory bomb": [("exit", (("failed", "MemoryError: "),))],
    "a sparse file": [("exit", (("failed", "OSError: [Errno 27] File too large"),))],
    "a full disk": [("exit", (("failed", FULL),)), ("disk", ())],
    "many files": [("exit", (("failed", f"{FULL}: '999'"),)), ("disk", ())],
    "endless output": [("output", ())],
    "endless errors": [("cpu", ())],
    "endless results": [("output", ())],
    "an endless loop that ignores signals": [("cpu", ())],
    "raising its limits": [("exit", (("returned", ["list", []]),))],  # none of them
}


@pytest.mark.parametrize("name", ENDS)
def test_what_ends_harm(either, name):
    ran = either._sandbox.run(Job(program=HARMS[name], calls=(call("f"),)))
    alone = either._sandbox._crew._mechanism == "limits"
    assert (ran.ended, ran.results) == ENDS[name][-1 if alone else 0]


def started(mechanism, **limits):
    """A worker, closed at the end of a block."""
    try:
        return contextlib.closing(programs.Worker(mechanism, programs.ProgramLimits(**limits)))
    except SandboxError as error:
        unavailable(f"{mechanism} does not work here: {error}")


def written(directory):
    """How many files and directories there are below one, and their MiB on the disk."""
    blocks = []
    for top, directories, files in os.walk(directory):
        for name in directories + files:
            with contextlib.suppress(OSError):
                blocks.append(os.lstat(os.path.join(top, name)).st_blocks)
    return len(blocks), sum(blocks) >> 11


TEMPORARY = """
import tempfile, os
for _ in range(20):
    made = [tempfile.mkdtemp(dir='.') for _ in range(60)]
    for place in made:
        os.rmdir(place)
"""
WRITES = {
    "a full disk": HARMS["a full disk"],
    "many files": HARMS["many files"],
    "deep": "import os\nwhile True:\n    os.mkdir('x')\n    os.chdir('x')\n",
    "deeper than a path": "import os\nwhile True:\n    os.mkdir('x' * 250)\n    os.chdir('x' * 250)\n",
    "not to be listed": "import os\nos.mkdir('x', 0o300)\nos.chdir('x')\n" + HARMS["a full disk"],
    "moved": """
import os, threading
os.mkdir('a')
place = os.open('a', os.O_RDONLY)
def move():
    while True:
        os.rename('a', 'b')
        os.rename('b', 'a')
threading.Thread(target=move).start()
for i in range(10**9):
    os.write(os.open(f'{i % 40}', os.O_RDWR | os.O_CREAT, dir_fd=place), b'x' * (1 << 20))
    os.closerange(place + 1, 60)
""",
    "by others": "import os\nfor _ in range(3): os.fork()\nos.mkdir(str(os.getpid()))\nos.chdir(str(os.getpid()))\n"
    + HARMS["a full disk"],
}  # fmt: skip


@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_without_namespaces_is_bounded(name):
    """By a look at it now and then: a program gets as far as it comes in that time, and CPU time is 20 s here."""
    with started("limits", file_mib=4, cpu_seconds=20) as worker:
        most, done = [(0, 0)], threading.Event()

        def look():
            while not done.wait(0.005):
                most.append(written(worker.hello["scratch"]))

        thread = threading.Thread(target=look)
        thread.start()
        ran = worker.run(Job(program=WRITES[name], calls=()))
        done.set()
        thread.join()
        assert written(worker.hello["scratch"]) == (0, 0)
    assert (ran.ended, ran.results) == ("disk", ())
    entries, mib = (max(each) for each in zip(*most, strict=True))
    assert entries < 10_000
    assert mib < 1000


def test_temporary_directories_may_come_and_go_without_namespaces():
    with started("limits", cpu_seconds=20) as worker:
        assert [worker.run(Job(program=TEMPORARY, calls=())).ended for _ in range(3)] == ["exit"] * 3


SET_ASIDE = """
import ctypes, fcntl, os, struct
def f():
    file = os.open('x', os.O_RDWR | os.O_CREAT)
    ctypes.CDLL(None).fallocate(file, 1, ctypes.c_long(0), ctypes.c_long(3 << 20))  # FALLOC_FL_KEEP_SIZE
    for request in (0x40305828, 0x4030582a, 0x40305839):
        try: fcntl.ioctl(file, request, struct.pack('hhqqiI4i', 0, 0, 0, 3 << 20, 0, 0, 0, 0, 0, 0))
        except OSError: pass
    aside = os.fstat(file).st_blocks
    os.posix_fallocate(file, 0, 1 << 20)
    return [aside, os.fstat(file).st_size]
"""


def test_no_room_is_set_aside_beyond_the_size_of_a_file(either):
    """One call would have the whole disk, whatever the limit of a file's size; libraries write instead."""
    ran = either._sandbox.run(Job(program=SET_ASIDE, calls=(call("f"),)))
    assert ran.results == (("returned", ["list", [["int", "0"], ["int", f"{1 << 20:x}"]]]),)


@pytest.fixture
def impatient(marked):
    """For programs that sleep: nothing honest is judged by it."""
    with sandboxes.reward(marked, wall_seconds=1.0) as made:
        yield made


@pytest.mark.parametrize(
    "program",
    ["import time\ntime.sleep(1000)", "import threading\nthreading.Event().wait()",
     "import os, signal\nos.read(0, 1)\nsignal.pause()",
     "import os, time\nfor _ in range(2): os.fork()\ntime.sleep(1000)"],
)  # fmt: skip
def test_who_sleeps_is_ended_by_the_clock(impatient, program):
    ran = impatient._sandbox.run(Job(program=program, calls=(call("f"),)))
    assert (ran.ended, ran.results) == ("wall", ())
    assert judge(impatient, program) == [0]


# Hostile programs: what they see and reach ----------------------------------------------------------


@pytest.fixture
def attempt(reward, monkeypatch):
    """What `f(*args)` of a program returns, or the name of what it raises."""
    monkeypatch.setenv("GRPO_CANARY", CANARY)

    def run(body, *args):
        ran = reward._sandbox.run(Job(program=f"def f(*args):\n    {body}", calls=(call("f", *args),)))
        assert CANARY not in repr(ran)
        ((kind, value),) = ran.results
        assert kind in ("returned", "raised"), ran
        return value if kind == "returned" else value.split(":")[0]

    return run


def test_no_environment(attempt):
    assert attempt("import os; return dict(os.environ)") == ["dict", []]
    assert attempt("import os; return [open(f'/proc/{p}/environ').read() for p in ('self', os.getppid(), 1)]") == (
        "FileNotFoundError"
    )


def test_files_of_the_host_cannot_be_read(attempt, tmp_path):
    (tmp_path / "secret").write_text(CANARY)
    os.chmod(tmp_path / "secret", 0o666)
    of_the_parent = [f"/proc/{os.getpid()}/{name}" for name in ("mem", "environ", "cmdline", "fd/0")]
    for path in (
        tmp_path / "secret", pathlib.Path(__file__), "/etc/passwd", "/etc/shadow", "/etc/hostname", "/proc/1/mem",
        "/sys/kernel", "/dev/mem", "/dev/shm", "/home", *of_the_parent,
    ):  # fmt: skip
        assert attempt("return open(args[0], 'rb').read(100)", str(path)) in ("FileNotFoundError", "PermissionError")
    assert attempt("import os; return sorted(os.listdir('/dev'))")[1] == ["null", "random", "urandom", "zero"]
    # What it may read, and that is all: Python's library and the system's.
    top = set(attempt("import os; return os.listdir('/')")[1])
    python = pathlib.Path(os.path.realpath(os.__file__)).parts[1]
    assert top <= {"dev", "tmp", "usr", "lib", "lib64", "etc", python}
    assert attempt("import os; return os.listdir('/etc')")[1] in ([], ["ld.so.cache"])


INSTALLED = """
import glob, itertools, os, sysconfig
def opens(path):
    try:
        return bool(open(path, 'rb'))
    except PermissionError:
        return False
def f():
    library = sysconfig.get_path('stdlib')
    roots = [library, *glob.glob('/usr/lib/python3*'), *glob.glob('/usr/lib64/python3*')]
    found = [f'{root}/{name}' for root in roots for name in ('site-packages', 'dist-packages')]
    files = (os.path.join(top, name) for root in found for top, _, names in os.walk(root) for name in names)
    return [opens(library + '/textwrap.py'), [path for path in itertools.islice(files, 1000) if opens(path)]]
"""


@pytest.mark.parametrize("mechanism", ["namespaces", "bubblewrap", "limits"])
def test_what_is_installed_beside_pythons_library_cannot_be_read(mechanism):
    there = [path for place in programs._hidden() for path in pathlib.Path(place).iterdir()]
    assert there, "else this says nothing"
    with started(mechanism) as worker:
        assert worker.run(Job(program=INSTALLED, calls=(call("f"),))).results == (
            ("returned", ["list", [True, ["list", []]]]),
        )


def test_nothing_is_written_outside(attempt, tmp_path):
    os.chmod(tmp_path, 0o777)
    places = [
        str(tmp_path / "new"),
        "/new",
        "/usr/new",
        "/lib/new",
        "/etc/new",
        "/dev/new",
        "/dev/shm/new",
        os.path.realpath(os.__file__),
    ]
    for place in places:
        assert attempt("open(args[0], 'a').write('x')", place) in ("OSError", "PermissionError", "FileNotFoundError")
    assert not list(tmp_path.iterdir())
    assert attempt("import os; os.chmod(args[0], 0o777)", os.path.realpath(os.__file__)) in (
        "OSError",
        "PermissionError",
    )
    assert attempt("import os; os.unlink(args[0])", os.path.realpath(os.__file__)) in ("OSError", "PermissionError")
    assert attempt("open('mine', 'w').write('x'); return open('/tmp/mine').read()") == "x"
    assert attempt("import os; return os.listdir('.')") == ["list", []], "nothing is left of the one before"


def test_no_network(attempt):
    with socket.create_server(("127.0.0.1", 0)) as server:
        reach = "import socket; s = socket.create_connection(('127.0.0.1', args[0]), timeout=20)"
        assert attempt(reach, server.getsockname()[1]) in ("OSError", "PermissionError", "ConnectionRefusedError")
    send = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', (args[0], 53))"
    assert attempt(send, "198.51.100.1") in ("OSError", "PermissionError")
    assert attempt("import socket; socket.getaddrinfo('example.org', 80)") in ("gaierror", "OSError", "PermissionError")


def test_no_sockets_of_the_host(attempt):
    """Abstract ones have no file: they belong to the network namespace."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0{CANARY}"[:20])
        server.listen()
        reach = "import socket; socket.socket(socket.AF_UNIX).connect(args[0])"
        assert attempt(reach, f"\0{CANARY}"[:20]) in ("ConnectionRefusedError", "PermissionError")


def test_no_other_process_is_there(attempt):
    assert attempt("import os; return [os.getpid(), os.getppid()]") == ["list", [["int", "1"], ["int", "0"]]]
    assert attempt("import os; os.kill(args[0], 0)", os.getpid()) == "ProcessLookupError"
    trace = "import ctypes; c = ctypes.CDLL(None); return [c.ptrace(16, p, 0, 0) for p in range(2, 200)].count(-1)"
    assert attempt(trace) == ["int", f"{198:x}"]
    read = "import os; return os.pidfd_open(args[0])"
    assert attempt(read, os.getpid()) in ("ProcessLookupError", "PermissionError")


def test_no_privileges(attempt):
    ids = "import os; return [os.getuid(), os.geteuid(), os.getgid(), os.getegid()]"
    assert attempt(ids) == ["list", [["int", f"{65534:x}"]] * 4]
    c = "import ctypes; c = ctypes.CDLL(None, use_errno=True); "
    for each in (
        "c.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None)", "c.mount(None, b'/', None, 32, None)", "c.umount2(b'/tmp', 2)",
        "c.unshare(0x10000000)", "c.unshare(0x20000)", "c.unshare(0x40000000)", "c.chroot(b'/tmp')", "c.setuid(0)",
        "c.setgid(0)", "c.sethostname(b'x', 1)", "c.pivot_root(b'/tmp', b'/tmp')", "c.mknod(b'x', 0o60777, 0x801)",
        "c.settimeofday(ctypes.create_string_buffer(16), None)", "c.reboot(0x1234567)", "c.setpriority(0, 0, -5)",
        "c.personality(0x0040000)", "c.acct(b'x')", "c.swapon(b'x', 0)", "c.iopl(3)",
    ):  # fmt: skip
        assert attempt(f"{c}return {each}") in (["int", "-1"], "AttributeError"), each
    assert attempt("import os; os.execv('/bin/sh', ['sh'])") in ("FileNotFoundError", "PermissionError")
    assert attempt("import subprocess; subprocess.run('id')") in ("FileNotFoundError", "PermissionError")


def test_descriptors_of_the_host_are_not_there(attempt, tmp_path):
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        body = "import os; return [fd for fd in range(4096) if _open(fd)]"
        probe = (
            "def _open(fd):\n    import os\n    try: os.fstat(fd)\n    except OSError: return False\n    return True\n"
        )
        ran = attempt(f"exec({probe!r}, globals()); {body}")
        assert ran == ["list", [["int", f"{fd:x}"] for fd in range(4)]]


BEYOND = {
    "shared": "import ctypes; return max(ctypes.CDLL(None).shmget(0, 1 << 20, 0o600) for _ in range(9))",
    "queue": "import ctypes; return max(ctypes.CDLL(None).msgget(0, 0o600) for _ in range(9))",
    "semaphores": "import ctypes; return max(ctypes.CDLL(None).semget(0, 9, 0o600) for _ in range(9))",
    "memfd": "import os; return os.memfd_create('x')",
    "requests": "import ctypes, os; number = 206 if os.uname().machine == 'x86_64' else 0; "
    "return ctypes.CDLL(None).syscall(number, 8, ctypes.create_string_buffer(8))",
}


@pytest.mark.parametrize("kind", BEYOND)
def test_there_is_no_memory_that_no_limit_counts(either, kind):
    ran = either._sandbox.run(Job(program=f"def f(): {BEYOND[kind]}", calls=(call("f"),)))
    assert ran.results in (
        (("returned", ["int", "-1"]),), (("raised", "PermissionError: [Errno 1] Operation not permitted"),)
    )  # fmt: skip


def test_no_segment_of_the_host_is_attached(either):
    c = ctypes.CDLL(None)
    segment = c.shmget(0, 4096, 0o666)
    assert segment >= 0
    try:
        attach = "def f(segment):\n    import ctypes\n    return ctypes.CDLL(None).shmat(segment, None, 0)"
        ran = either._sandbox.run(Job(program=attach, calls=(call("f", segment),)))
    finally:
        c.shmctl(segment, 0, None)
    assert ran.results == (("returned", ["int", "-1"]),)


OTHERS = {
    "limits": "import resource; resource.prlimit(pid, resource.RLIMIT_CPU, (1, 1))",
    "priority": "import os; os.setpriority(os.PRIO_PROCESS, pid, 19)",
    "affinity": "import os; os.sched_setaffinity(pid, {0})",
    "environment": "return open(f'/proc/{pid}/environ').read()",
    "command": "return open(f'/proc/{pid}/cmdline').read()",
    "a signal": "import os; os.kill(pid, 0)",
    "passwords": "return open('/etc/shadow').read()",
    "users": "return open('/etc/passwd').read()",
    "answers": "return open(path).read()",
    "a name": "import socket; socket.sethostname('x')",
    "a program": "import os; os.execv('/bin/sh', ['sh', '-c', 'exit 0'])",
}


@pytest.mark.parametrize("what", OTHERS)
def test_nothing_is_done_to_others_or_read_of_them_without_namespaces_either(limited, tmp_path, what):
    (tmp_path / "answers").write_text(CANARY)
    with subprocess.Popen([sys.executable, "-ISc", "input()"], stdin=subprocess.PIPE) as other:
        program = f"def f(pid, path):\n    {OTHERS[what]}"
        ran = limited._sandbox.run(Job(program=program, calls=(call("f", other.pid, str(tmp_path / "answers")),)))
        assert resource.prlimit(other.pid, resource.RLIMIT_CPU) == resource.getrlimit(resource.RLIMIT_CPU)
        assert os.getpriority(os.PRIO_PROCESS, other.pid) == os.getpriority(os.PRIO_PROCESS, 0)
        other.communicate(b"\n")
    ((kind, said),) = ran.results
    assert kind == "raised"
    assert said.startswith("PermissionError")


KEYS = """
from grpo_jax.rewards import fences
def put():
    return fences._syscall(248, b"user", b"grpo-jax", b"x", 1, -3) > 0
def get():
    return fences._keyctl(10, -3, b"user", b"grpo-jax", 0)
"""


@pytest.mark.parametrize("mechanism", ["namespaces", "limits"])
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers of system calls are this machine's")
def test_programs_share_no_keys_even_without_seccomp(monkeypatch, mechanism):
    monkeypatch.setattr(programs.importlib.util, "find_spec", lambda name: None)
    with started(mechanism) as worker:
        put, get = (worker.run(Job(program=KEYS, calls=(call(name),))).results for name in ("put", "get"))
    assert put == (("returned", True),)
    assert get == (("raised", "OSError: [Errno 126] syscall: Required key not available"),)


def test_a_program_may_start_few_processes_and_threads(attempt):
    count = (
        "import os, signal; n = 0\n    try:\n        while n < 100:\n            if os.fork() == 0: signal.pause()\n"
        "            n += 1\n    except BlockingIOError: pass\n    return n"
    )
    assert attempt(count) == ["int", f"{LIMITS['processes'] - 1:x}"]

"""The sandbox itself: what it says of itself, limits, and that nothing outlives it."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import uuid

import pytest

from grpo_jax.rewards import programs, sandbox
from grpo_jax.rewards.sandbox import Isolation, Job, Limits, Sandbox, SandboxError, call, isolation
from tests.test_rewards_code import settled

ROOT = pathlib.Path(__file__).parent.parent
STRONG = Isolation(
    mechanism="namespaces", seccomp=False, landlock=True, network=True, writes=True, signals=True, files=True,
    processes=True,
)  # fmt: skip


def test_isolation_is_found_out_and_said_in_a_line():
    found = isolation()
    print(found.description)
    assert "\n" not in found.description
    if os.environ.get("CI", "").lower() in ("true", "1"):
        assert found.strong, found.description


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (STRONG, "sandbox: namespaces (user, pid, mount, net, ipc, uts) + Landlock; all is isolated"),
        (Isolation(**{**vars(STRONG), "mechanism": "limits", "network": False, "landlock": False, "why": "no unshare"}),
         "sandbox: limits; NOT isolated: network (namespaces: no unshare; allow user namespaces"),
        (Isolation(**{**vars(STRONG), "mechanism": "limits", "seccomp": True, "files": False}),
         "sandbox: limits + seccomp + Landlock; NOT isolated: files of the host"),
    ],
)  # fmt: skip
def test_descriptions(found, said):
    assert found.description.startswith(said)
    assert ("pip install pyseccomp" in found.description) == (not found.strong)


def test_what_is_said_of_isolation_is_what_is_tried(monkeypatch):
    """A sandbox that lets everything through is found out: namespaces and Landlock are told to do nothing."""
    name, line = "grpo_jax.rewards.confined", 'if state["landlock"]:'
    assert line in programs._MODULES[name]
    monkeypatch.setitem(programs._MODULES, name, programs._MODULES[name].replace(line, "if False:"))
    monkeypatch.setattr(programs.importlib.util, "find_spec", lambda name: None)
    found = sandbox._tried("limits")
    assert (found.network, found.writes, found.files, found.processes) == (False, False, False, False)
    assert not found.strong


@pytest.fixture
def refused(monkeypatch):
    """A host that refuses some mechanisms; what is found there is forgotten again."""
    tried, asked = sandbox._tried, []

    def only(*works):
        def attempt(mechanism):
            asked.append(mechanism)
            if mechanism not in works:
                raise SandboxError(f"Traceback\nOSError: [Errno 1] {mechanism}: Operation not permitted")
            return tried(mechanism)

        monkeypatch.setattr(sandbox, "_tried", attempt)
        isolation.cache_clear()
        return asked

    yield only
    isolation.cache_clear()


def test_where_namespaces_are_refused_it_says_why_and_goes_on_with_less(refused):
    asked = refused("limits")
    found = isolation()
    assert asked == ["namespaces", "bubblewrap", "limits"]
    assert found.why.startswith("OSError: [Errno 1] namespaces: Operation not permitted; OSError: [Errno 1] bubble")
    assert (found.mechanism, found.processes, found.complete) == ("limits", False, False)
    if not found.strong:
        with pytest.raises(SandboxError, match=r"NOT isolated: .*Operation not permitted.*allow_weak"):
            Sandbox()


def test_the_first_that_isolates_everything_is_taken(refused):
    asked = refused("namespaces", "bubblewrap", "limits")
    if isolation().complete:
        assert asked == [isolation().mechanism] or asked[0] == "namespaces"
        assert isolation().mechanism == asked[-1]


def test_nothing_at_all(refused):
    refused()
    with pytest.raises(SandboxError, match=r"no sandbox can be started: OSError.* namespaces: .* limits: "):
        isolation()


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_bubblewrap(refused):
    refused("bubblewrap", "limits")
    found = isolation()
    if found.mechanism == "limits":
        pytest.skip(f"bubblewrap does not work here: {found.why}")
    assert found.network
    assert found.writes
    assert found.files
    assert found.processes
    secret = (
        "import os\ndef f(path): return os.path.exists(path), os.listdir('.'), os.getuid() == 0 and os.listdir('/etc')"
    )
    with Sandbox(Limits(cpu_seconds=1), workers=1) as box:
        ran = box.run(Job(program=secret, calls=(call("f", "/etc/passwd"),)))
        assert ran.results[0][1][1][:2] == [False, ["list", []]]
        assert box.run(Job(program="while True: pass", calls=())).ended == "cpu"
        left = box.run(Job(program="import os, time\nif os.fork() == 0: time.sleep(1000)", calls=()))
        assert left.ended == "exit"
        worker = box._crew._idle.get()
        end = time.monotonic() + 30  # whoever has watched the last program is about to end
        while len(children := descendants(worker._process.pid)) > 2 and time.monotonic() < end:
            time.sleep(0.05)
        box._crew._idle.put(worker)
    assert len(children) == 2, "bubblewrap's first process, and ours"
    while any(pathlib.Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(pathlib.Path(f"/proc/{pid}").exists() for pid in children)


def descendants(pid):
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [*children, *(each for child in children for each in descendants(child))]


def test_other_systems_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxError, match="needs Linux, and this is darwin"):
        isolation.__wrapped__()


# Limits ---------------------------------------------------------------------------------------------


def ran(program, *args, **limits):
    with Sandbox(Limits(**limits), workers=1) as box:
        return box.run(Job(program=program, calls=(call("f", *args),)))


def test_cpu_time_is_the_limit_and_not_the_clock():
    spin = """
import time
def f(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end: pass
"""
    over = ran(spin, 30, cpu_seconds=0.5)
    assert over.ended == "cpu"
    assert 0.5 <= over.cpu_seconds < 2
    assert over.results == ()
    assert ran(spin, 0.3, cpu_seconds=5).results == (("returned", None),)
    asleep = ran("import time\ndef f(): time.sleep(1.5)", cpu_seconds=0.5)  # longer than its CPU time, and idle
    assert asleep.results == (("returned", None),)
    assert asleep.seconds > 1.5


def test_memory():
    hold = "def f(n): return len(bytearray(n << 20))"
    assert ran(hold, 30, memory_mib=128).results[0][0] == "returned"
    assert ran(hold, 128, memory_mib=128).results == (("raised", "MemoryError: "),)
    assert ran(hold, 128, memory_mib=256).results[0][0] == "returned"


def test_files():
    write = "def f(n):\n    with open('x', 'wb') as file: return file.write(bytes(n << 20))"
    assert ran(write, 3, file_mib=4).results[0][0] == "returned"
    assert ran(write, 5, file_mib=4).results[0][0] == "raised"


def test_output():
    say = "def f(n): return 'x' * (n << 10)"
    assert ran(say, 7, output_kib=8).ended == "exit"
    assert ran(say, 9, output_kib=8).ended == "output"
    printed = "def f(n): print('x' * (n << 10), flush=True)"
    assert len(ran(printed, 7, output_kib=8).stdout) == 7169
    assert ran(printed, 90, output_kib=8).ended == "output"


def test_wall_time():
    over = ran("import time\ndef f(): time.sleep(1000)", wall_seconds=0.5)
    assert over.ended == "wall"
    assert over.cpu_seconds < 0.5


# Without namespaces ---------------------------------------------------------------------------------


@pytest.fixture
def plain(monkeypatch):
    """A sandbox with the limits alone, which knows what to look for in the table of processes."""
    mark = f"/mark-{uuid.uuid4().hex}"
    monkeypatch.setattr(programs, "_visible", lambda: [mark])
    monkeypatch.setattr(sandbox, "isolation", lambda: sandbox.Isolation(**{**vars(STRONG), "mechanism": "limits"}))
    box = Sandbox(Limits(cpu_seconds=1, wall_seconds=30), workers=1)
    yield box, mark
    box.close()
    assert settled(mark, 0) == 0


def test_without_namespaces_nothing_survives_either(plain):
    box, mark = plain
    daemon = """
import os, time
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(1000)
        os._exit(0)
def f(): return os.getcwd()
"""
    found = box.run(Job(program=daemon, calls=(call("f"),)))
    ((kind, place),) = found.results
    assert kind == "returned"
    assert not pathlib.Path(place).exists(), "its directory is removed"
    assert settled(mark, 1) == 1
    scratch = pathlib.Path(place).parent
    assert scratch.exists()
    box.close()
    assert not scratch.exists()


# The end --------------------------------------------------------------------------------------------

PARENT = """
import os, sys, threading, time
sys.path.insert(0, {root!r})
from grpo_jax.rewards import programs, sandbox
visible = programs._visible
programs._visible = lambda: [*visible(), {mark!r}]
if {plain}:
    sandbox.isolation = lambda: sandbox.Isolation(mechanism="limits", seccomp=False, landlock=True, network=True,
        writes=True, signals=True, files=True, processes=True)
box = sandbox.Sandbox(sandbox.Limits(wall_seconds=1000, cpu_seconds=1000), workers=2)
program = "import ctypes, os, time\\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\\nif os.fork() == 0: os.setsid()\\n"
program += "time.sleep(1000)"
for _ in range(2):
    threading.Thread(target=box.run, args=(sandbox.Job(program=program, calls=()),), daemon=True).start()
time.sleep(1000)
"""


@pytest.mark.parametrize("without", [False, True], ids=["namespaces", "without"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_outlives_the_parent(how, without, tmp_path):
    if not without and isolation().mechanism != "namespaces":
        (pytest.fail if os.environ.get("CI") else pytest.skip)(isolation().description)
    mark = f"/mark-{uuid.uuid4().hex}"
    script = PARENT.format(root=str(ROOT), mark=mark, plain=without)
    parent = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "TMPDIR": str(tmp_path)}, stderr=subprocess.DEVNULL
    )
    # Of each worker: two that wait, or one; who watches, the program, and its child. And the parent's own text.
    expected = 1 + 2 * (4 if without else 5)
    assert settled(mark, expected, 60) == expected
    os.kill(parent.pid, how)
    parent.wait()
    assert settled(mark, 0) == 0
    end = time.monotonic() + 30
    while list(tmp_path.iterdir()) and time.monotonic() < end:
        time.sleep(0.05)
    assert not list(tmp_path.iterdir())


def test_a_parent_that_forks_does_not_keep_them(tmp_path):
    """A child that holds the parent's pipe by accident, as multiprocessing's do, is not the parent."""
    mark = f"/mark-{uuid.uuid4().hex}"
    script = PARENT.format(root=str(ROOT), mark=mark, plain=False).replace(
        "time.sleep(1000)\n", "time.sleep(3)\nif os.fork() == 0: time.sleep(20)\nelse: os.kill(os.getpid(), 9)\n"
    )
    if isolation().mechanism != "namespaces":
        pytest.skip(isolation().description)
    parent = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "TMPDIR": str(tmp_path)})
    parent.wait()
    assert settled(mark, 1) == 1  # the child


def test_as_an_ordinary_user():
    """Root's tests do not show what others may: the same once more as nobody, with the system's own interpreter."""
    python = "/usr/bin/python3"
    if os.geteuid() != 0:
        pytest.skip("this is an ordinary user already")
    script = f"""
import sys
sys.path[:0] = {[str(ROOT), *[p for p in sys.path if p.endswith("site-packages")]]!r}
import os
from grpo_jax.rewards.sandbox import *
assert os.getuid() == 65534
program = "import os\\ndef f(): return [os.getuid(), os.getpid(), os.listdir('.')]"
with Sandbox(workers=1) as box:
    ran = box.run(Job(program=program, calls=(call("f"),)))
print(isolation().strong, isolation().processes, ran.results)
"""
    done = subprocess.run(
        [python, "-c", script], user=65534, group=65534, extra_groups=[], capture_output=True, text=True, cwd="/",
        env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    if "ModuleNotFoundError" in done.stderr or "ImportError" in done.stderr or "SyntaxError" in done.stderr:
        pytest.skip(f"nobody may not read this checkout, or has another Python: {done.stderr[-200:]}")
    assert done.stdout.strip() == (
        "True True (('returned', ['list', [['int', 'fffe'], ['int', '1'], ['list', []]]]),)"
    ), done.stderr

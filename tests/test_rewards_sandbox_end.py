"""Who calls the sandbox, and that nothing outlives it, however it ends."""

import importlib.util
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid

import pytest

from grpo_jax.rewards.sandbox import Job, ProgramLimits, Sandbox, call, isolation
from tests import unavailable
from tests.sandboxes import settled

ROOT = pathlib.Path(__file__).parent.parent

PARENT = """
import os, sys, threading, time
sys.path.insert(0, {root!r})
from grpo_jax.rewards import programs, sandbox
if {plain}:
    sandbox.isolation = lambda: sandbox.Isolation(mechanism="limits", seccomp=False, landlock=True, network=True,
        writes=True, signals=True, files=True, memory=True, processes=True)
sandbox.isolation()  # before anything is marked: what it tries is not waited for
visible = programs._visible
programs._visible = lambda: [*visible(), {mark!r}]
box = sandbox.Sandbox(sandbox.ProgramLimits(wall_seconds=1000, cpu_seconds=1000), workers=2)
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
        unavailable(isolation().description)
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
        unavailable(isolation().description)
    parent = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "TMPDIR": str(tmp_path)})
    parent.wait()
    assert settled(mark, 1) == 1  # the child


CALLER = """
import sys, threading, time
sys.path.insert(0, {root!r})
from grpo_jax.rewards import programs, sandbox
sandbox.isolation()
visible = programs._visible
programs._visible = lambda: [*visible(), {mark!r}]
box = sandbox.Sandbox(sandbox.ProgramLimits(wall_seconds=1000), workers=2)
jobs = [sandbox.Job(program="import time\\ntime.sleep(1000)", calls=())] * 20
ask = lambda: box.map(box.run, jobs)
if {main}:
    ask()
threading.Thread(target=ask, daemon=True).start()
time.sleep(1000)
"""


@pytest.mark.parametrize("main", [True, False], ids=["main", "thread"])
def test_an_interrupt_waits_for_no_program(main, tmp_path):
    """Neither for those that run nor for those that wait, whichever thread has called."""
    if isolation().mechanism != "namespaces":
        unavailable(isolation().description)
    mark = f"/mark-{uuid.uuid4().hex}"
    script = CALLER.format(root=str(ROOT), mark=mark, main=main)
    parent = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    expected = 1 + 2 * 4  # the parent's own text; of each worker two that wait, who watches, and the program
    assert settled(mark, expected, 60) == expected
    parent.send_signal(signal.SIGINT)
    said = parent.communicate(timeout=60)[1]  # a busy machine may take that long, and 20 programs 10000 s
    assert "KeyboardInterrupt" in said  # and in the thread an error, where it comes to that
    assert parent.returncode == -signal.SIGINT
    assert settled(mark, 0) == 0


def test_an_error_or_interrupt_of_one_caller_is_no_others():
    started = threading.Barrier(3)

    class Stop(BaseException):
        """As Ctrl-C."""

    with Sandbox(ProgramLimits(cpu_seconds=5), workers=3) as box:
        others: list = []

        def other():
            def patient(item):
                started.wait()
                return box.run(Job(program="import time\ndef f(): time.sleep(1.5)", calls=(call("f"),))).results

            others.extend(box.map(patient, [0]))

        def mine(item):
            if item == 0:
                started.wait()
                return box.run(Job(program="import time\ntime.sleep(1000)", calls=()))
            if item == 1:
                started.wait()
                time.sleep(0.5)
                raise Stop
            return begun.append(item)

        thread, begun = threading.Thread(target=other), []
        thread.start()
        before = time.monotonic()
        with pytest.raises(Stop):
            box.map(mine, [0, 1])
        assert time.monotonic() - before < 40
        thread.join()
        assert others == [(("returned", None),)]
        assert box.map(lambda item: box.run(Job(program="", calls=())).ended, [0] * 5) == ["exit"] * 5
        one = Sandbox(workers=1)
        with pytest.raises(ZeroDivisionError):
            one.map(lambda item: begun.append(item) or 1 // item, [1, 0, 2, 3])
        one.close()
        assert begun == [1, 0], "what has not begun is left out"


def test_map_of_nothing():
    with Sandbox(workers=1) as box:
        assert box.map(box.run, []) == []


ORDINARY = """
import os, sys
sys.path.insert(0, {place!r})
from grpo_jax.rewards import sandbox
from grpo_jax.rewards.sandbox import *
assert os.getuid() == {user}
program = "import os\\ndef f(): return [os.getuid(), os.getpid(), os.listdir('.')]"
with Sandbox(workers=1) as box:
    ran = box.run(Job(program=program, calls=(call("f"),)))
print(isolation().strong, isolation().processes, ran.results)
for mechanism in "bubblewrap", "limits":
    found = sandbox._tried(mechanism)
    print(found.strong, found.processes)
sandbox.isolation = lambda: found
many = "import os, time\\ndef f():\\n for _ in range(7):\\n  if not os.fork(): break\\n time.sleep(1000)"
late = "import time, threading\\ntime.sleep(1.5)\\ndef f():\\n for _ in range(5): threading.Timer(1, int).start()"
with Sandbox(ProgramLimits(wall_seconds=3), workers=3) as box:
    jobs = [Job(program=text, calls=(call("f"),)) for text in (late, many, many)]
    print(*((ran.ended, ran.results) for ran in box.map(box.run, jobs)))
"""


@pytest.mark.parametrize("user", [65534, 12345])
def test_as_an_ordinary_user(user):
    """Root's tests do not show what others may: the same once more as others, with the system's own interpreter.

    As nobody, whose number is the same in a namespace and outside, and as one whose number is not.

    And by a copy of what the sandbox is, since they may read neither every checkout nor every virtual environment.
    """
    python, seccomp = "/usr/bin/python3", importlib.util.find_spec("pyseccomp")
    if os.geteuid() != 0:
        pytest.skip("this is an ordinary user already")
    if subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]).returncode or not seccomp:
        unavailable(f"{python} is older than 3.11, or there is no pyseccomp")
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        package = pathlib.Path(place, "grpo_jax", "rewards")
        package.mkdir(parents=True)
        for init in (package, package.parent):
            (init / "__init__.py").touch()
        for name in ("sandbox", "programs", "confined", "disk", "fences", "literals"):
            shutil.copy(ROOT / f"grpo_jax/rewards/{name}.py", package)
        shutil.copy(str(seccomp.origin), place)
        done = subprocess.run(
            [python, "-c", ORDINARY.format(place=place, user=user)], user=user, group=user, extra_groups=[],
            capture_output=True, text=True, cwd="/", env={"PATH": os.environ["PATH"]},
        )  # fmt: skip
    assert done.stdout.split("\n") == [
        "True True (('returned', ['list', [['int', 'fffe'], ['int', '1'], ['list', []]]]),)", "True True", "True False",
        "('exit', (('returned', None),)) ('wall', ()) ('wall', ())", "",
    ], done.stderr  # fmt: skip

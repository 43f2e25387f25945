"""The sandbox itself: what it says of itself, limits, and that nothing outlives it."""

import contextlib
import dataclasses
import os
import pathlib
import signal
import sys
import threading
import time

import pytest

from grpo_jax.rewards import fences, literals, programs, sandbox
from grpo_jax.rewards.sandbox import Isolation, Job, ProgramLimits, Sandbox, SandboxError, call, isolation
from tests import unavailable
from tests.sandboxes import marked, settled

ROOT = pathlib.Path(__file__).parent.parent
STRONG = Isolation(
    mechanism="namespaces", seccomp=False, landlock=True, network=True, writes=True, signals=True, files=True,
    memory=True, processes=True,
)  # fmt: skip


def test_isolation_is_found_out_and_said_in_a_line():
    found = isolation()
    assert "\n" not in found.description
    if not found.strong:
        unavailable(found.description)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (STRONG, "sandbox: namespaces (user, pid, mount, net, ipc, uts) + Landlock; all is isolated"),
        (Isolation(**{**vars(STRONG), "mechanism": "limits", "network": False, "landlock": False, "why": "no unshare"}),
         "sandbox: limits; NOT isolated: network (namespaces: no unshare; allow user namespaces"),
        (Isolation(**{**vars(STRONG), "mechanism": "limits", "seccomp": True, "files": False}),
         "sandbox: limits + seccomp + Landlock; NOT isolated: files of the host (namespaces"),
        (Isolation(**{**vars(STRONG), "memory": False}),
         "sandbox: namespaces (user, pid, mount, net, ipc, uts) + Landlock; NOT isolated: memory beyond the limit ("),
        (Isolation(**{**vars(STRONG), "mechanism": "bubblewrap", "seccomp": True, "memory": False, "why": "no"}),
         "sandbox: bubblewrap (the same namespaces) + seccomp + Landlock; NOT isolated: memory beyond the limit ("
         "namespaces: no; allow user namespaces"),
        (Isolation(**{**vars(STRONG), "mechanism": "bubblewrap", "signals": False}),
         "sandbox: bubblewrap (the same namespaces) + Landlock; NOT isolated: signals (namespaces: "),
    ],
)  # fmt: skip
def test_descriptions(found, said):
    assert found.description.startswith(said)
    assert ("pip install pyseccomp" in found.description) == (not found.strong and not found.seccomp)
    assert found.strong == ("all is isolated" in said)
    assert ("Landlock that keeps signals in" in found.description) == (not found.signals)
    assert ("install bubblewrap" in found.description) == (found.mechanism == "limits")
    assert dataclasses.replace(found, processes=False).strong == found.strong


@pytest.mark.parametrize("name", ["network", "writes", "signals", "files", "memory"])
def test_isolation_is_strong_where_nothing_of_the_host_is_reached(name):
    assert STRONG.strong
    assert not dataclasses.replace(STRONG, **{name: False}).strong


def test_what_isolates_is_logged_once(monkeypatch, caplog):
    caplog.set_level("INFO", "grpo_jax.rewards.sandbox")
    sandbox._say_once.cache_clear()
    less = dataclasses.replace(STRONG, processes=False)
    for found in (STRONG, STRONG, less, less):
        monkeypatch.setattr(sandbox, "isolation", lambda found=found: found)
        Sandbox().close()
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", STRONG.description), ("WARNING", less.description)
    ]  # fmt: skip


def weakened(monkeypatch, **lines):
    """The other side with some lines replaced, and no seccomp."""
    monkeypatch.setattr(programs.importlib.util, "find_spec", lambda name: None)
    changed(monkeypatch, "confined", lines)


def changed(monkeypatch, module, lines):
    """A module of the other side with some lines replaced."""
    name = f"grpo_jax.rewards.{module}"
    for line, instead in lines.items():
        text = programs._MODULES[name]
        assert line in text
        monkeypatch.setitem(programs._MODULES, name, text.replace(line, instead))


NO_LANDLOCK = {"def landlock_version() -> int:\n": "def landlock_version() -> int:\n    return 0\n"}


def test_what_is_said_of_isolation_is_what_is_tried(monkeypatch):
    """A sandbox that lets everything through is found out: root stays root, and Landlock does nothing."""
    weakened(monkeypatch, **{
        'if state["landlock"]:': "if False:", 'os.geteuid() == 0:': "False:", "fences.new_session_keyring()": "pass",
    })  # fmt: skip
    found = sandbox._tried("limits")
    assert (found.network, found.writes, found.signals, found.files, found.memory, found.processes) == (False,) * 6
    assert not found.strong


@pytest.mark.parametrize("mechanism", ["namespaces", "limits"])
def test_without_seccomp_memory_has_no_bound_and_that_is_said(monkeypatch, mechanism):
    weakened(monkeypatch)
    found = sandbox._tried(mechanism)
    assert not found.memory
    assert found.files == (fences.user_keyring() is None), "a user's keyring is shared"
    assert not found.strong
    assert "memory beyond the limit" in found.description


def test_a_keyring_that_programs_share_is_found_out(monkeypatch):
    if fences.session_keyring() is None:
        unavailable("this process can have no keys")
    changed(monkeypatch, "fences", {"return _keyctl(0, -4, 0)": "return None"})  # the user's is shared anyway
    weakened(monkeypatch)
    assert sandbox._tried("limits").files
    weakened(monkeypatch, **{"fences.new_session_keyring()": "pass"})
    assert not sandbox._tried("limits").files


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


def test_bubblewrap(monkeypatch):
    try:
        found = sandbox._tried("bubblewrap")
    except SandboxError as error:
        unavailable(f"bubblewrap does not work here: {error}")
    assert (found.network, found.writes, found.signals, found.files, found.processes) == (True,) * 5
    assert found.memory == (os.geteuid() != 0), "root's processes have no bound"
    monkeypatch.setattr(sandbox, "isolation", lambda: dataclasses.replace(found, memory=True))
    secret = "import os\ndef f(path): return [os.path.exists(path), os.listdir('.')]"
    with Sandbox(ProgramLimits(cpu_seconds=1), workers=1) as box:
        ran = box.run(Job(program=secret, calls=(call("f", "/etc/passwd"),)))
        assert ran.results[0][1][1] == [False, ["list", []]]
        assert box.run(Job(program="while True: pass", calls=())).ended == "cpu"
        fill = "def f(): return sum(open(str(i), 'wb').write(bytes(1 << 20)) for i in range(20))"
        assert box.run(Job(program=fill, calls=(call("f"),))).results[0][1].startswith("OSError: [Errno 28]")
        left = box.run(Job(program="import os, time\nif os.fork() == 0: time.sleep(1000)", calls=()))
        assert left.ended == "exit"
        worker = box._crew._idle.get()
        assert worker is not None
        end = time.monotonic() + 30  # whoever has watched the last program is about to end
        while len(children := descendants(worker._process.pid)) > 2 and time.monotonic() < end:
            time.sleep(0.05)
        box._crew._idle.put(worker)
    assert len(children) == 2, "bubblewrap's first process, and ours"
    while any(pathlib.Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(pathlib.Path(f"/proc/{pid}").exists() for pid in children)


FILLS = """
import os
def fills(path):
    try:
        with open(f"{path}/x", "wb") as file:
            return file.write(bytes(8 << 20))
    except OSError:
        return 0
def f(*paths):
    found = [path for path in paths if os.path.exists(f"{path}/x")]
    return [found, [path for path in paths if fills(path)], sum(map(fills, [".", "..", "../.."])) >> 20]
"""


def test_bubblewrap_without_landlock(monkeypatch):
    """Nothing outside one directory of a program's size is written, and nothing there is left for the next program."""
    changed(monkeypatch, "fences", NO_LANDLOCK)
    try:
        found = sandbox._tried("bubblewrap")
    except SandboxError as error:
        unavailable(f"bubblewrap does not work here: {error}")
    assert (found.landlock, found.network, found.writes, found.files, found.processes) == (False, *[True] * 4)
    assert not found.signals, "who watches has the same user"
    hidden = [path for path in programs._hidden() if pathlib.Path(path).is_dir()]
    with contextlib.closing(programs.Worker("bubblewrap", ProgramLimits(file_mib=12))) as worker:
        job = Job(program=FILLS, calls=(call("f", "/", "/dev", "/dev/shm", "/run", "/tmp", "..", "/usr/lib", *hidden),))
        for _ in range(2):
            ((_, said),) = worker.run(job).results
            kept, filled, mib = literals.plain(said)
            assert (kept, filled) == ([], [".."])
            assert mib < 12


@pytest.mark.parametrize("what", ["/", "/dev", "left"])
def test_what_can_be_written_in_bubblewrap_is_found_out(monkeypatch, what):
    """Without Landlock, a root or /dev that can be written, and what one program leaves to the next."""
    changed(monkeypatch, "fences", NO_LANDLOCK)
    if what == "left":
        changed(monkeypatch, "confined", {'disk.empty(state["scratch"])': "pass"})
    made, mount = programs._in_bubblewrap, ["--remount-ro", what]

    def without(*args):
        words = made(*args)
        places = [place for place in range(len(words)) if words[place : place + 2] == mount]
        assert len(places) == (what != "left")
        return [word for place, word in enumerate(words) if not {place, place - 1} & {*places}]

    monkeypatch.setattr(programs, "_in_bubblewrap", without)
    try:
        assert not sandbox._tried("bubblewrap").writes
    except SandboxError as error:
        unavailable(f"bubblewrap does not work here: {error}")


def descendants(pid):
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [*children, *(each for child in children for each in descendants(child))]


def test_other_systems_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxError, match="needs Linux, and this is darwin"):
        isolation.__wrapped__()


# ProgramLimits ---------------------------------------------------------------------------------------------


def ran(program, *args, **limits):
    with Sandbox(ProgramLimits(**limits), workers=1) as box:
        return box.run(Job(program=program, calls=(call("f", *args),)))


def test_cpu_time_is_the_limit_and_not_the_clock():
    over = ran(SPIN, 30, cpu_seconds=0.5)
    assert over.ended == "cpu"
    assert 0.5 <= over.cpu_seconds < 3  # at the latest the kernel ends it
    assert over.results == ()
    assert ran(SPIN, 0.3, cpu_seconds=5).results == (("returned", None),)
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


def test_output_that_no_reply_could_hold_is_refused_at_once():
    most = programs._MOST_OUTPUT
    with pytest.raises(ValueError, match=f"output_kib={most + 1} must be {most} or less"):
        ProgramLimits(output_kib=most + 1)
    assert 2 * 4 * -(-(most << 10) // 3) < programs._LARGEST


SPIN = """
import time
def f(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end: pass
"""


WAITS = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
while signal.SIGUSR1 not in signal.sigpending(): time.sleep(0.01)
"""


def test_a_large_input_arrives():
    job = Job(program="import sys\nprint(len(sys.stdin.read()))", stdin="x" * 8_000_000)
    with Sandbox(ProgramLimits(), workers=1) as box:
        assert box.run(job).stdout == b"8000000\n"


def test_who_watches_too_late_changes_no_verdict():
    """A watcher that is stopped, as by a busy machine, while a program uses more than its limit and ends."""
    calls, limits = (call("f", 0.1), call("f", 0.7)), ProgramLimits(cpu_seconds=0.5)
    with contextlib.closing(programs.Worker("limits", limits)) as worker:
        punctual, found = worker.run(Job(program=SPIN, calls=calls)), []
        thread = threading.Thread(target=lambda: found.append(worker.run(Job(program=SPIN + WAITS, calls=calls))))
        thread.start()
        watcher, program = eventually(lambda: waiting(worker._process.pid))
        os.kill(watcher, signal.SIGSTOP)
        os.kill(program, signal.SIGUSR1)
        eventually(lambda: status(program)["State"].startswith("Z"))
        os.kill(watcher, signal.SIGCONT)
        thread.join()
    (late,) = found
    assert late.cpu_seconds > 0.79
    for each in (punctual, late):
        assert (each.ended, each.results) == ("cpu", ())


def eventually(found):
    """What it gives as soon as that is something."""
    end = time.monotonic() + 60
    while not (value := found()) and time.monotonic() < end:
        time.sleep(0.02)
    assert value
    return value


def waiting(worker):
    """Who watches, and the program, as soon as it has blocked the signal that it waits for."""
    for watcher in children(worker):
        for program in children(watcher):
            if int(status(program)["SigBlk"], 16) >> (signal.SIGUSR1 - 1) & 1:
                return watcher, program
    return None


def status(pid):
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def children(pid):
    with contextlib.suppress(OSError):
        return [int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def test_the_time_of_those_that_a_program_waits_for_is_its_own():
    both = SPIN + "    import os\n    if os.getpid() != parent: os._exit(0)\n    os.wait()\nimport os\n"
    both += "parent = os.getpid()\nos.fork()"
    assert ran(both, 0.4, cpu_seconds=0.6).ended == "cpu"


def test_wall_time():
    over = ran("import time\ndef f(): time.sleep(1000)", wall_seconds=0.5)
    assert over.ended == "wall"
    assert over.cpu_seconds < 0.5


GREEDY = """
import os, time
def f():
    n = 0
    try:
        while True:
            if os.fork() == 0:
                time.sleep(1000)
            n += 1
    except BlockingIOError:
        print(n, flush=True)
    time.sleep(1000)
"""
THREADS = """
import concurrent.futures
def f():
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        return sum(threads.map(abs, [1, -2, 3]))
"""


@pytest.mark.parametrize("mechanism", ["namespaces", "limits"])
def test_no_program_takes_the_processes_of_another(monkeypatch, mechanism):
    """Two that have started all that they may, while a third, which was there before them, has not begun."""
    if mechanism == "limits" and os.geteuid() != 0:
        pytest.skip("without namespaces they are counted together")
    try:
        found = sandbox._tried(mechanism)
    except SandboxError as error:
        unavailable(f"{mechanism}: {error}")
    monkeypatch.setattr(sandbox, "isolation", lambda: found)
    with Sandbox(ProgramLimits(wall_seconds=3), workers=3, allow_weak=True) as box:
        late = Job(program=f"import time\ntime.sleep(1.5)\n{THREADS}", calls=(call("f"),))
        greedy = Job(program=GREEDY, calls=(call("f"),))
        hungry = [box.run(greedy), *box.map(box.run, [late, greedy, greedy])]
    assert hungry[1].results == (("returned", ["int", "6"]),)
    for ran in (hungry[0], *hungry[2:]):
        assert ran.ended == "wall"
        if os.geteuid() == 0:
            assert ran.stdout == b"7\n"


def test_workers_of_roots_have_users_of_their_own():
    if os.geteuid() != 0:
        unavailable("this is no root")
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(contextlib.closing(programs.Worker("limits", ProgramLimits()))) for _ in range(3)]
        users = {worker.hello["user"] for worker in made}
        assert len(users) == 3
        for worker in made:
            ran = worker.run(Job(program="import os\ndef f(): return os.getuid()", calls=(call("f"),)))
            assert ran.results == (("returned", ["int", f"{worker.hello['user']:x}"]),)


# Without namespaces ---------------------------------------------------------------------------------


@pytest.fixture
def plain(monkeypatch):
    """A sandbox with the limits alone, which knows what to look for in the table of processes."""
    monkeypatch.setattr(sandbox, "isolation", lambda: dataclasses.replace(STRONG, mechanism="limits"))
    with marked() as mark:
        box = Sandbox(ProgramLimits(cpu_seconds=1), workers=1)
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

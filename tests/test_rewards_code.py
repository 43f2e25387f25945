"""The reward of code: honest programs score; none of many hostile ones does, or harms the host."""

import json
import os
import pathlib
import socket
import threading
import time
import uuid

import pytest

from grpo_jax.data.benchmarks import humaneval, mbpp
from grpo_jax.rewards import RewardError, programs, sandbox
from grpo_jax.rewards.code import CodeConfig, CodeReward, extract_code
from grpo_jax.rewards.sandbox import Job, SandboxError, call, isolation
from tests.hostile import CHEATS, HARMS

TESTS = [{"call": "f", "args": [[3, 1, 2], 2], "result": 12}, "assert f([5], 3) == 15", "assert f([], 1) == 0"]
HONEST = "def f(numbers, k):\n    return k * sum(numbers)\n"
CANARY = f"canary-{uuid.uuid4().hex}"


@pytest.fixture(scope="module", autouse=True)
def level():
    """What follows is about namespaces: where there are none, nothing of it says anything."""
    found = isolation()
    print(found.description)
    if not found.complete:
        (pytest.fail if os.environ.get("CI", "").lower() in ("true", "1") else pytest.skip)(found.description)


@pytest.fixture(scope="module")
def marked():
    """A text in the command line of every process of this module's sandboxes, and of all that are forked of them."""
    visible, mark = programs._visible, f"/mark-{uuid.uuid4().hex}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "_visible", lambda: [*visible(), mark])
        yield mark


def processes(mark):
    """How many processes there are with this text in their command line, zombies left out."""
    count = 0
    for place in pathlib.Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                count += mark.encode() in (place / "cmdline").read_bytes()
            except OSError:
                continue
    return count


def settled(mark, expected, seconds=30):
    """Waits for the number of processes to become what is expected, and gives it."""
    end = time.monotonic() + seconds
    while (count := processes(mark)) != expected and time.monotonic() < end:
        time.sleep(0.05)
    return count


LIMITS = {"cpu_seconds": 1.0, "wall_seconds": 30.0, "memory_mib": 128, "file_mib": 4, "output_kib": 64, "processes": 8}


@pytest.fixture(scope="module")
def reward(marked):
    made = CodeReward(CodeConfig(workers=1, **LIMITS))
    yield made
    made.close()
    assert settled(marked, 0) == 0


@pytest.fixture
def impatient(marked):
    """For programs that sleep: nothing honest is judged by it."""
    before = processes(marked)
    made = CodeReward(CodeConfig(workers=1, **{**LIMITS, "wall_seconds": 1.0}))
    yield made
    made.close()
    assert settled(marked, before) == before


def judge(reward, *completions, tests=TESTS, **columns):
    n = len(completions)
    return reward(
        prompts=["p"] * n, completions=list(completions), completion_ids=[[1]] * n, tests=[tests] * n,
        **{name: [value] * n for name, value in columns.items()}, other_column=[0] * n,
    )  # fmt: skip


# Honest programs ------------------------------------------------------------------------------------


def test_honest_programs_score_and_wrong_ones_do_not(reward):
    judged = judge(
        reward, HONEST, f"Here it is:\n```python\n{HONEST}```\nDone.", "def f(numbers, k):\n    return sum(numbers)",
        "def g(numbers, k):\n    return k * sum(numbers)", "def f(numbers, k) return 1", "", "I cannot do this.",
        "import math\nf = lambda numbers, k: math.prod([k, sum(numbers)])", HONEST,
    )  # fmt: skip
    assert judged == [1, 1, 0, 0, 0, 0, 0, 1, 1]
    assert judged.failed == [False] * 9
    assert all(s > 0 for s in judged.seconds)


def test_every_call_counts_and_a_share_may(marked):
    fraction = CodeReward(CodeConfig(workers=1, score="fraction", **LIMITS))
    partly = "def f(numbers, k):\n    return 15 if len(numbers) == 1 else 0"
    crashes = "def f(numbers, k):\n    return 15 if len(numbers) == 1 else 1 // len(numbers)"
    assert judge(fraction, partly, crashes, HONEST) == [2 / 3, 1 / 3, 1]
    fraction.close()


@pytest.mark.parametrize(
    ("value", "others"),
    [
        (5, ["4", "'5'", "[5]", "None"]),
        (0.1, ["0.1000001", "'0.1'", "1/10+1e-9"]),
        ("a\nü\ud800", ["'a'", "b'a'"]),
        (b"\x00\xff", ["'x'", "b''"]),
        ([1, [2]], ["(1, [2])", "[1, (2,)]", "[1]", "[1, [2], 3]"]),
        ((1,), ["[1]", "1", "()"]),
        ({"a": [1], 2: None}, ["{'a': [1]}", "{'a': [1], 2: 0}", "[('a', [1])]", "{'a': [1], 2: None, 3: 1}"]),
        ({1, "x"}, ["[1, 'x']", "{1}", "{1, 'x', 2}"]),
        (True, ["False", "'True'", "None"]),
        (None, ["False", "0", "()"]),
        (7**3000, ["7**3000 + 1", "0"]),
        (-3, ["3"]),
        (2j, ["-2j", "2"]),
    ],
)
def test_values_come_back_as_they_are(reward, value, others):
    tests = [{"call": "f", "args": [value], "result": value}]
    assert judge(reward, "def f(x): return x", *(f"def f(x): return {text}" for text in others), tests=tests) == [
        1,
        *[0] * len(others),
    ]


def test_equality_is_that_of_assertions(reward):
    """Which MBPP was written for: 5 == 5.0, True == 1; dictionaries of the standard library equal plain ones."""
    programs = {"5.0": 5, "1": True, "-0.0": 0, "__import__('collections').Counter('aab')": {"a": 2, "b": 1}}
    for text, expected in programs.items():
        tests = [{"call": "f", "args": [], "result": expected}]
        assert judge(reward, f"def f(): return {text}", tests=tests) == [1]
    tests = [{"call": "f", "args": [], "result": float("nan")}]
    assert judge(reward, "def f(): return float('nan')", tests=tests) == [0]


def test_standard_input_and_output(reward):
    tests = [{"stdin": "1 2\n", "stdout": "3\n\n"}, {"stdin": "5 6", "stdout": "11"}]
    good = "print(sum(map(int, input().split())), '')"
    threads = f"import threading\ndef main():\n    {good}\nthreading.Thread(target=main).start()"
    main = f"if __name__ == '__main__':\n    {good}\n    raise SystemExit(0)"
    late = f"{good}\nraise ValueError"  # an answer, and then a crash
    assert judge(reward, good, threads, main, "print(3)", "", late, f"{good}\nprint(4)", tests=tests) == [
        1, 1, 1, 0, 0, 0, 0,
    ]  # fmt: skip


def test_both_kinds_of_tests(reward):
    tests = [{"call": "f", "args": [2], "result": 4}, {"stdin": "3", "stdout": "6"}]
    both = "def f(x):\n    return 2 * x\nif __name__ == '__main__':\n    print(f(int(input())))"
    assert judge(reward, both, "def f(x): return 2 * x", tests=tests) == [1, 0]


def test_arguments_by_name_and_nothing_shared_between_calls(reward):
    tests = [{"call": "f", "args": [], "kwargs": {"b": [1]}, "result": [1, 9]}, "assert f(b=[1]) == [1, 9], 'again'"]
    assert judge(reward, "def f(b):\n    b.append(9)\n    return b", tests=tests) == [1]


def test_a_program_starts_as_if_there_had_been_none(reward):
    spoil = "import math, json\nmath.sqrt = lambda x: 0\nopen('note', 'w').write('x')\n__builtins__['sum'] = len\n"
    use = "import math, os\ndef f(): return math.sqrt(4) == 2 and not os.listdir('.') and sum([5]) == 5"
    tests = [{"call": "f", "args": [], "result": True}]
    assert judge(reward, f"{spoil}def f(): return True", use, tests=tests) == [1, 1]


def test_rows_without_tests_do_not_apply(reward):
    judged = reward(["p"] * 2, [HONEST] * 2, [[1]] * 2, tests=[None, TESTS])
    assert judged == [None, 1]
    assert judged.failed == [False, False]
    assert judge(reward) == []


def test_what_is_equal_runs_once(reward, monkeypatch):
    ran, run = [], reward._sandbox.run
    monkeypatch.setattr(reward._sandbox, "run", lambda job: ran.append(job) or run(job))
    assert judge(reward, HONEST, "def f(numbers, k): return 0", HONEST, HONEST) == [1, 0, 1, 1]
    assert len(ran) == 2


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        ("a\n```python\nx = 1\n```\nb\n```python\nx = 2\n```\nc", "x = 2\n"),
        ("```py\nx\n```\n```text\ny\n```", "x\n"),
        ("```\nx\n```", "```\nx\n```"),  # a block of nobody knows what
        ("```Python3\nx = '```'\n", "x = '```'\n"),  # cut: it never closes
        ("", ""),
    ],
)
def test_extract_code(text, code):
    assert extract_code(text) == code


# Published benchmarks -------------------------------------------------------------------------------

MBPP = {"task_id": 11, "text": "Add.", "code": "def add(a, b):\n    return a + b", "test_setup_code": "",
        "test_list": ["assert add(1, 2) == 3", "assert add((1,), (2,)) == (1, 2)"]}  # fmt: skip
HUMANEVAL = {
    "task_id": "HumanEval/0", "prompt": "def near(xs, t):\n    ''' '''\n", "entry_point": "near",
    "canonical_solution": "    return any(abs(a - b) < t for i, a in enumerate(xs) for b in xs[:i])\n",
    "test": "METADATA = {}\n\ndef check(candidate):\n    '''of pairs'''\n"
    "    assert candidate([1.0, 2.0], 1.5) == True\n"
    "    assert candidate([1.0, 2.0], 0.5) == False, 'far'\n    assert True, 'prints if it fails'\n",
}  # fmt: skip


def test_records_of_published_benchmarks(reward, tmp_path):
    (tmp_path / "mbpp.jsonl").write_text(json.dumps(MBPP))
    (tmp_path / "HumanEval.jsonl").write_text(json.dumps(HUMANEVAL))
    records = [*mbpp(tmp_path / "mbpp.jsonl"), *humaneval(tmp_path / "HumanEval.jsonl")]
    for record in records:
        columns = {name: record[name] for name in ("tests", "prefix", "setup")}
        wrong = "def add(a, b): return 3" if record["id"] == 11 else "    return True"
        assert judge(reward, record["solution"], wrong, **columns) == [1, 0]


def test_what_is_expected_never_enters_the_sandbox(reward, monkeypatch):
    """HumanEval's setup holds the answers: it stays outside, while imports go in, behind the program."""
    jobs, run = [], reward._sandbox.run
    monkeypatch.setattr(reward._sandbox, "run", lambda job: jobs.append(job) or run(job))
    secret = f"'{CANARY}'"
    setup = f"def check(candidate):\n    assert candidate(1) == {secret}\n"
    asked = [{"tests": ["check(f)"], "setup": setup}, {"tests": [f"assert f(1) == {secret}"], "setup": "import math"},
             {"tests": [{"call": "f", "args": [1], "result": CANARY}]},
             {"tests": [{"stdin": "1", "stdout": CANARY}]}]  # fmt: skip
    for columns in asked:
        assert judge(reward, "def f(x): return 'something else'", **columns) == [0]
    assert len(jobs) == 4
    assert CANARY not in repr(jobs)
    assert "import math" in jobs[1].program
    assert judge(reward, f"def f(x): return {secret}", **asked[0]) == [1]


@pytest.mark.parametrize(
    "test",
    [
        "assert abs(f(1) - 2) < 1e-6", "assert f(1) == g(2)", "assert f(x) == 2", "assert f(1)", "assert not f(1)",
        "assert f(f(1)) == 2", "assert o.f(1) == 2", "assert 2 == f(1)", "assert f(1) == 2 == f(3)",
        "assert f(*[1]) == 2", "assert f(1) == {1: open('x')}", "f(1) == 2", "assert f(1) == 2; assert f(2) == 3",
        "check(f)", "assert f(1) ==",
        "assert f([x for x in 'ab']) == 2", "assert f(1) != 2", "assert f(1) in (2, 3)", "assert f(**{'a': 1}) == 2",
    ],
)  # fmt: skip
def test_other_assertions_are_refused_by_name(reward, test):
    with pytest.raises(RewardError, match=r"could make it pass.*allow_asserts") as error:
        reward.check([test])
    assert test[:20] in str(error.value)
    with pytest.raises(RewardError, match="allow_asserts"):
        judge(reward, HONEST, tests=[test])


@pytest.mark.parametrize(
    "tests",
    [[], "assert f(1) == 2", None, [{}], [{"call": "f"}], [3], [{"call": "f", "args": [object()], "result": 1}],
     [{"call": "f", "args": [], "result": object()}], [{"stdin": "x"}], [{"call": "f", "args": 3, "result": 3}]],
)  # fmt: skip
def test_tests_of_no_kind_are_refused(reward, tests):
    with pytest.raises(RewardError, match="expected"):
        reward.check(tests)


def test_the_risk_of_assertions_can_be_accepted(marked):
    risky = CodeReward(CodeConfig(workers=1, allow_asserts=True, **LIMITS))
    tests, setup = ["assert abs(f(1) - 2) < tolerance", "assert f(3) == 4"], "tolerance = 0.1"
    patched = "import builtins\nbuiltins.abs = lambda x: 0\ndef f(x):\n    return x + 1 if x > 1 else 9"
    good, wrong = "def f(x): return x + 1.01 * (x < 2) + (x > 2)", "def f(x): return 0"
    assert judge(risky, good, wrong, tests=tests, setup=setup) == [1, 0]
    assert judge(risky, patched, tests=tests, setup=setup) == [1], "that is the risk"
    risky.close()


# Hostile programs: claims ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHEATS)
def test_no_claim_scores(reward, marked, name):
    judged = judge(reward, CHEATS[name])
    assert judged == [0]
    assert judged.failed == [False], "what a program does is a verdict, and no failure"
    assert judge(reward, HONEST) == [1]
    assert settled(marked, 2) == 2  # the two of the worker


# Hostile programs: harm -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", HARMS)
def test_no_harm_is_done(reward, marked, name):
    judged = judge(reward, HARMS[name])
    assert judged == [0]
    assert judged.failed == [False]
    assert settled(marked, 2) == 2, "nothing of it survives, and its worker does"
    assert judge(reward, HONEST) == [1]


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
def attempt(reward, marked, monkeypatch):
    """What `f(*args)` of a program returns, or the name of what it raises."""
    monkeypatch.setenv("GRPO_CANARY", CANARY)

    def run(body, *args):
        ran = reward._sandbox.run(Job(program=f"def f(*args):\n    {body}", calls=(call("f", *args),)))
        assert CANARY not in repr(ran)
        ((kind, value),) = ran.results
        assert kind in ("returned", "raised"), ran
        return value if kind == "returned" else value.split(":")[0]

    yield run
    assert settled(marked, 2) == 2


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


def test_links_lead_nowhere(attempt, tmp_path):
    (tmp_path / "secret").write_text(CANARY)
    body = "import os; os.symlink(args[0], 'link'); return open('link').read()"
    assert attempt(body, str(tmp_path / "secret")) == "FileNotFoundError"
    assert attempt("return open('/tmp/../../../../etc/passwd').read()") == "FileNotFoundError"
    assert attempt("import os; os.symlink('/', 'root'); return sorted(os.listdir('root/tmp'))") == ["list", ["root"]]


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
        "c.personality(0x0040000) if 0 else c.acct(b'x')", "c.swapon(b'x', 0)", "c.iopl(3)",
        "c.shmat(0, None, 0) if c.shmget(0x1234, 16, 0o666) >= 0 else -1",
    ):  # fmt: skip
        assert attempt(f"{c}return {each}") in (["int", "-1"], "AttributeError"), each
    assert attempt("import os; os.execv('/bin/sh', ['sh'])") in ("FileNotFoundError", "PermissionError")
    assert attempt("import subprocess; subprocess.run('id')") in ("FileNotFoundError", "PermissionError")


def test_descriptors_of_the_host_are_not_there(attempt, tmp_path):
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        body = "import os; return [fd for fd in range(4096) if __import__('contextlib').suppress and _open(fd)]"
        probe = (
            "def _open(fd):\n    import os\n    try: os.fstat(fd)\n    except OSError: return False\n    return True\n"
        )
        ran = attempt.__closure__ and attempt(f"exec({probe!r}, globals()); {body}")
        assert ran == ["list", [["int", f"{fd:x}"] for fd in range(4)]]


def test_a_program_may_start_few_processes_and_threads(attempt):
    count = (
        "import os, signal; n = 0\n    try:\n        while n < 100:\n            if os.fork() == 0: signal.pause()\n"
        "            n += 1\n    except BlockingIOError: pass\n    return n"
    )
    assert attempt(count) == ["int", f"{LIMITS['processes'] - 1:x}"]


# When the sandbox itself fails ----------------------------------------------------------------------


def broken(monkeypatch, reward, times):
    """A worker that dies at its next jobs."""
    left = [times]
    run = programs.Worker.run

    def dies(worker, job, limits):
        if left[0]:
            left[0] -= 1
            worker._process.kill()
            worker._process.wait()
        return run(worker, job, limits)

    monkeypatch.setattr(programs.Worker, "run", dies)


def test_a_worker_that_dies_is_replaced(reward, marked, monkeypatch):
    broken(monkeypatch, reward, 1)
    judged = judge(reward, HONEST)
    assert (list(judged), judged.failed) == ([1], [False])
    assert settled(marked, 2) == 2


def test_what_fails_twice_has_no_verdict(reward, marked, monkeypatch, capsys):
    broken(monkeypatch, reward, 2)
    with pytest.raises(SandboxError, match="has ended"):
        judge(reward, HONEST)
    forgiving = CodeReward(CodeConfig(workers=1, failure="none", **LIMITS))
    broken(monkeypatch, reward, 2)
    judged = judge(forgiving, HONEST, "def f(numbers, k): return 0")
    assert (list(judged), judged.failed) == ([None, 0], [True, False])
    assert "the sandbox failed, and a program has no verdict" in capsys.readouterr().out
    forgiving.close()
    assert judge(reward, HONEST) == [1]


def test_from_many_threads(marked):
    several = CodeReward(CodeConfig(workers=2, **LIMITS))
    scores: list = [None] * 6
    work = lambda i: scores.__setitem__(i, judge(several, *[f"{HONEST}# {i} {j}" for j in range(4)]))
    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert scores == [[1] * 4] * 6
    several.close()
    with pytest.raises(SandboxError, match="closed"):
        several._sandbox.run(Job(program=""))


def test_too_weak_isolation_is_refused(monkeypatch):
    weak = sandbox.Isolation(
        mechanism="limits", seccomp=False, landlock=True, network=False, writes=True, signals=True, files=False,
        processes=False,
        why="unshare: Operation not permitted",
    )  # fmt: skip
    monkeypatch.setattr(sandbox, "isolation", lambda: weak)
    with pytest.raises(RewardError, match=r"NOT isolated: network, files of the host.*unshare: Operation.*allow_weak"):
        CodeReward(CodeConfig())
    accepted = CodeReward(CodeConfig(allow_weak=True, workers=1))
    assert judge(accepted, HONEST, "def f(numbers, k): return 0") == [1, 0]
    accepted.close()


@pytest.mark.parametrize(
    "options",
    [{"score": "most"}, {"failure": "zero"}, {"workers": -1}, {"cpu_seconds": 0}, {"wall_seconds": -1},
     {"memory_mib": 8}, {"file_mib": 0}, {"output_kib": 0}, {"processes": 0}],
)  # fmt: skip
def test_config_errors(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        CodeConfig(**options)

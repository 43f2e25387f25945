"""The reward of code: honest programs score, and what is expected stays outside."""

import contextlib
import json
import threading
import time
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.data.benchmarks import humaneval, mbpp
from grpo_jax.rewards import RewardError, programs
from grpo_jax.rewards.code import CodeConfig, CodeReward, extract_code
from grpo_jax.rewards.sandbox import Isolation, Job, SandboxError, isolation
from tests import sandboxes, unavailable
from tests.sandboxes import HONEST, LIMITS, TESTS, judge, settled

CANARY = f"canary-{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def reward(marked):
    if not isolation().strong:
        unavailable(isolation().description)
    with sandboxes.reward(marked) as made:
        yield made


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


def test_every_call_counts_and_a_share_may(reward):
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


def test_standard_input_and_output(reward):
    tests = [{"stdin": "1 2\n", "stdout": "3\n\n"}, {"stdin": "5 6", "stdout": "11"}]
    good = "print(sum(map(int, input().split())), '')"
    threads = f"import threading\ndef main():\n    {good}\nthreading.Thread(target=main).start()"
    main = f"if __name__ == '__main__':\n    {good}\n    raise SystemExit(0)"
    late = f"{good}\nraise ValueError"  # an answer, and then a crash
    assert judge(reward, good, threads, main, "print(3)", "", late, f"{good}\nprint(4)", tests=tests) == [
        1, 1, 1, 0, 0, 0, 0,
    ]  # fmt: skip


LATE = "import threading, time\ndef late():\n    time.sleep(0.2)\n    print(3)\nthreading.Thread(target=late).start()\n"
MAINS = {
    "exit": "print(3)\nexit()\nprint(4)",
    "quit": "print(3)\nif True: quit(0)",
    "an exit with a thread left": f"{LATE}raise SystemExit",
    "a handler at exit": "import atexit, io, os, sys\nsys.stdout = io.StringIO()\n"
    "atexit.register(lambda: os.write(1, sys.stdout.getvalue().encode()))\nprint(3)\nsys.exit()",
    "a handler after threads": f"import atexit\natexit.register(print, 4)\n{LATE}",
    "threads that nobody ends": "from concurrent.futures import ThreadPoolExecutor\n"
    "print(next(ThreadPoolExecutor(2).map(abs, [-3])))",
    "a file that nobody closes": "out = open(1, 'w')\nout.write('3')",
    "a last word": "class C:\n    def __del__(self): print(3)\nc = C()",
    "its file and arguments": "import os, sys\nos.chdir(os.path.dirname(__file__))\nprint(len(sys.argv) + 2)",
}


@pytest.mark.parametrize("name", MAINS)
def test_main_programs_end_as_an_interpreter_does(reward, name):
    expected = "3\n4" if name == "a handler after threads" else "3"
    assert judge(reward, MAINS[name], tests=[{"stdin": "", "stdout": expected}]) == [1]


@pytest.mark.parametrize("end", ["exit(1)", "quit('no')", "raise ValueError", "import os\nos._exit(2)"])
def test_a_main_program_that_says_it_failed_has(reward, end):
    assert judge(reward, f"print(3, flush=True)\n{end}", tests=[{"stdin": "", "stdout": "3"}]) == [0]


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


PIECES = ["```", "```python", "```py3", "python", "\n", " ", "x = 1", "'", "\0", "\ud800"]


@given(st.one_of(st.text(st.characters()), st.lists(st.sampled_from(PIECES), max_size=30).map("".join)))
def test_any_text_holds_a_program(text):
    assert extract_code(text) in text


def test_a_program_is_found_in_a_long_text_at_once():
    started = time.process_time()
    for piece in ("```python\n", "```python ", "```", " ", "```python\n```\n", "   ```py3"):
        text = piece * (1_000_000 // len(piece))
        assert extract_code(text) in text
    assert time.process_time() - started < 10


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
        "check(f)",
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


@pytest.mark.parametrize(
    ("test", "why"),
    [
        ({"call": "f", "args": [], "kwarg": {"x": 1}, "result": 1}, "nobody reads its 'kwarg'"),
        ({"call": "f", "args": [], "result": 1, "stdin": "", "stdout": ""}, "nobody reads its 'stdin', 'stdout'"),
        ({"stdin": "", "stdout": "", "timeout": 3}, "nobody reads its 'timeout'"),
        ({"call": "f", "args": []}, "it has no 'result'"),
        ({"call": "f", "args": (1), "result": 1}, "its 'args' is of type int"),
        ({"stdin": b"", "stdout": ""}, "its 'stdin' is of type bytes"),
        ({"input": "", "output": ""}, "it has no 'stdin'"),
        (3, "it is of type int"),
        ("assert f(1) ==", "is no Python: invalid syntax"),
        ("return f(1)", "is no Python: 'return' outside function"),
        ({"call": "f", "args": [], "kwargs": None, "result": 1}, "its 'kwargs' is of type NoneType"),
        ({"call": "f", "args": [], "result": float("nan")}, "NaN is not even itself"),
        ({"call": "f", "args": [], "result": [1, {"x": float("nan")}]}, "NaN is not even itself"),
        ("assert f() == [1e999 - 1e999]", r"\[1e309 - 1e309\] is no literal"),
        ("assert f(1) == 1 + 2", r"\(1 \+ 2 is no literal\)"),
        ("assert f(1) == 1; assert f(2) == 2", "2 statements, where one is expected"),
        ({"call": "m.f", "args": [1], "result": 1}, "its 'call' is 'm.f', which is no name of a function"),
    ],
)
def test_tests_that_say_too_much_or_can_never_pass_are_refused(reward, test, why):
    with pytest.raises(RewardError, match=why):
        reward.check([test])


@pytest.mark.parametrize(
    ("setup", "why"),
    [("import (", "is no Python"), ("import math\nreturn 3", "is no Python"), ("x\0", "is no Python"),
     ("from __future__ import annotations\nimport math", "imports from __future__"), (3, "is no text")],
)  # fmt: skip
def test_a_setup_that_cannot_be_used_is_refused_by_name(reward, setup, why):
    for tests in (TESTS, ["check(f)"], [{"stdin": "", "stdout": ""}]):
        with pytest.raises(RewardError, match=f"the column 'setup' holds .*, which {why}"):
            reward.check(tests, setup)
        with pytest.raises(RewardError, match=why):
            judge(reward, HONEST, tests=tests, setup=setup)


WORDS = ["assert ", "f", "check", "candidate", "(", ")", "[", "]", "{", "}", "==", " == ", "1", "-", "+", ",", "=",
         "*", ":", "'a'", "1e999", "None", "lambda", " in ", "not ", ";", "\n", "    ", "\0", "\ud800",
         "9" * 5000, "(" * 300]  # fmt: skip
any_test = st.one_of(
    st.text(st.characters()),
    st.lists(st.sampled_from(WORDS), max_size=20).map("".join),
    st.lists(st.sampled_from(WORDS), max_size=8).map(lambda words: f"assert f({''.join(words)}) == 1"),
    st.fixed_dictionaries({}, optional=dict.fromkeys(("call", "args", "kwargs", "result", "stdin", "stdout"), st.one_of(
        st.none(), st.text(), st.integers(), st.lists(st.floats()), st.dictionaries(st.text(), st.binary())
    ))),
)  # fmt: skip


@given(st.lists(any_test, max_size=3), st.one_of(st.none(), st.text(), any_test))
def test_any_test_is_read_or_refused(reward, tests, setup):
    with contextlib.suppress(RewardError):
        assert reward.check(tests, setup) is None


@pytest.mark.parametrize(
    ("test", "why"),
    [
        ("assert f(" + "-" * 100_000 + "1) == 1", "no call with literals"),
        ("assert f(" + "1+" * 100_000 + "1) == 1", "no call with literals"),
        ("(" * 100_000, "no Python: too many nested"),
        ("assert f(" + "[" * 90 + "]" * 90 + ") == 1", "no call with literals"),
    ],
)
def test_tests_that_are_too_deep_are_refused(reward, test, why):
    with pytest.raises(RewardError, match=why):
        reward.check([test])


def test_an_argument_may_be_called_function(reward):
    tests = [{"call": "f", "args": [], "kwargs": {"function": 3}, "result": 3}]
    assert judge(reward, "def f(function): return function", tests=tests) == [1]


def test_the_risk_of_assertions_can_be_accepted(marked):
    risky = CodeReward(CodeConfig(workers=1, allow_asserts=True, **LIMITS))
    tests, setup = ["assert abs(f(1) - 2) < tolerance", "assert f(3) == 4"], "tolerance = 0.1"
    patched = "import builtins\nbuiltins.abs = lambda x: 0\ndef f(x):\n    return x + 1 if x > 1 else 9"
    with pytest.raises(RewardError, match="is no Python"):
        risky.check(["assert f(1"])
    good, wrong = "def f(x): return x + 1.01 * (x < 2) + (x > 2)", "def f(x): return 0"
    assert judge(risky, good, wrong, tests=tests, setup=setup) == [1, 0]
    assert judge(risky, patched, tests=tests, setup=setup) == [1], "that is the risk"
    risky.close()


# When the sandbox itself fails ----------------------------------------------------------------------


def broken(monkeypatch, reward, times):
    """A worker that dies at its next jobs."""
    left = [times]
    run = programs.Worker.run

    def dies(worker, job):
        if left[0]:
            left[0] -= 1
            worker._process.kill()
            worker._process.wait()
        return run(worker, job)

    monkeypatch.setattr(programs.Worker, "run", dies)


def test_a_worker_that_dies_is_replaced(reward, marked, monkeypatch):
    broken(monkeypatch, reward, 1)
    judged = judge(reward, HONEST)
    assert (list(judged), judged.failed) == ([1], [False])
    assert settled(marked, 2) == 2


def test_what_fails_twice_has_no_verdict(reward, marked, monkeypatch, caplog):
    broken(monkeypatch, reward, 2)
    with pytest.raises(SandboxError, match="has ended"):
        judge(reward, HONEST)
    forgiving = CodeReward(CodeConfig(workers=1, on_failure="none", **LIMITS))
    broken(monkeypatch, reward, 2)
    judged = judge(forgiving, HONEST, "def f(numbers, k): return 0")
    assert (list(judged), judged.failed) == ([None, 0], [True, False])
    assert "the sandbox failed, and a program has no verdict" in caplog.text
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


def test_too_weak_isolation_is_refused():
    weak = Isolation(
        mechanism="limits", seccomp=False, landlock=True, network=False, writes=True, signals=True, files=False,
        memory=False, processes=False, why="unshare: Operation not permitted",
    )  # fmt: skip
    with sandboxes.by(weak):
        with pytest.raises(RewardError, match=r"NOT isolated: network, files of the host.*unshare: Oper.*allow_weak"):
            CodeReward(CodeConfig())
        accepted = CodeReward(CodeConfig(allow_weak=True, workers=1))
    assert judge(accepted, HONEST, "def f(numbers, k): return 0") == [1, 0]
    accepted.close()


@pytest.mark.parametrize(
    "options",
    [{"score": "most"}, {"on_failure": "zero"}, {"workers": -1}, {"cpu_seconds": 0}, {"wall_seconds": -1},
     {"memory_mib": 8}, {"file_mib": 0}, {"output_kib": 0}, {"output_kib": 25_000}, {"processes": 0}],
)  # fmt: skip
def test_config_errors(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        CodeConfig(**options)

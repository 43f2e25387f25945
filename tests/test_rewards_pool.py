"""The pool under everything that functions do to it. CPU time is limited, never the wall clock of a test."""

import contextlib
import errno
import functools
import os
import pathlib
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.rewards import Reward, RewardError, process, score
from grpo_jax.rewards.pool import Limits, Pool, pooled

ROOT = pathlib.Path(__file__).parents[1]
JOBS = f"{pathlib.Path(__file__).parent / 'pool_jobs.py'}:"


@pytest.fixture(scope="module")
def pool():
    with Pool(2, limits=Limits(cpu_seconds=1, wall_seconds=300, memory_mib=100), on_failure="none") as made:
        yield made


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def gone(pids, within=60.0) -> bool:
    """Once all are; the kernel and the watching threads take their time on a busy machine."""
    until = time.monotonic() + within
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(alive, pids))


# What comes back -------------------------------------------------------------------------------------


def test_items_come_back_in_their_order(pool):
    judged = pool.judge(JOBS + "length", [{"completion": "x" * i} for i in range(200)])
    assert judged == list(range(200))
    assert judged.failed == [False] * 200
    assert all(0 <= seconds < 60 for seconds in judged.seconds)
    assert len(set(pool.judge(JOBS + "pid", [{}] * 50))) == 2  # both take part
    assert pool.judge(JOBS + "length", []) == []


@settings(max_examples=30)
@given(st.lists(st.text(), max_size=40))
def test_any_text_goes_there(pool, texts):
    assert pool.judge(JOBS + "length", [{"completion": text} for text in texts]) == list(map(len, texts))


def test_reward_function(pool, monkeypatch):
    monkeypatch.chdir(ROOT)
    reward = Reward(name="length", function=pooled("tests/pool_jobs.py:length", pool))
    monkeypatch.chdir("/")  # where it is was found when it was made
    columns = {"answer": [np.float32(1), None]}
    scores = score([reward], prompts=["p"] * 2, completions=["a", "bb"], completion_ids=[[1], [2]], columns=columns)
    np.testing.assert_array_equal(scores.by_name["length"], [1, 2])
    as_module = pooled("tests.pool_jobs:length", pool)
    assert as_module(prompts=["p"], completions=["abc"], completion_ids=[[1]]) == [3]
    with pytest.raises(RewardError, match="'completion' has the name of an argument of functions of an item"):
        as_module(prompts=["p"], completions=["abc"], completion_ids=[[1]], completion=["x"])


def test_what_a_function_prints_and_reads_is_no_part_of_the_protocol(capfd):
    with Pool(1) as fresh:  # whose standard error is that of this test
        assert fresh.judge(JOBS + "talk", [{"completion": "x"}]) == [[[0, 1.0], [1, 1.0]]]
    said = capfd.readouterr()
    assert "noise" in said.err
    assert said.out == ""


def test_a_worker_holds_nothing_of_its_parent(pool, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    names = ["jax", "numpy", "grpo_jax", "pytest", "SECRET_TOKEN", "JAX_PLATFORMS", "PATH", "json"]
    with Pool(1) as fresh:
        there = fresh.judge(JOBS + "surroundings", [{"name": name} for name in names])
    assert dict(zip(names, there, strict=True)) == {**dict.fromkeys(names, 0), "PATH": 1, "json": 1}


def test_from_several_threads_at_once(pool):
    found = {}

    def ask(k):
        found[k] = [pool.judge(JOBS + "length", [{"completion": "x" * (k + i)} for i in range(20)]) for _ in range(5)]

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {k: [list(range(k, k + 20))] * 5 for k in range(8)}


def test_workers_run_at_the_same_time(pool, tmp_path):
    meet = {"place": str(tmp_path)}
    assert pool.judge(JOBS + "meet", [{**meet, "name": "a", "other": "b"}, {**meet, "name": "b", "other": "a"}]) == [
        1,
        1,
    ]


# Limits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "arguments", "why"),
    [
        ("spin", {}, "it took more than 1 s of CPU time"),
        ("hold", {}, "it took more than 1 s of CPU time"),
        ("eat", {"mib": 1000}, "it needed more than 100 MiB"),
        ("leave", {"how": "exit"}, "its worker ended with status 1"),
        ("leave", {"how": "_exit"}, "its worker ended with status 3"),
        ("leave", {"how": "crash"}, "its worker ended with status -11"),
    ],
)
def test_an_item_that_fails_takes_no_other_with_it(pool, caplog, job, arguments, why):
    """Tried twice, counted, said, at the cost of twice its limit, and the worker is replaced."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    item = [{**arguments, "completion": "xyz"}]
    judged = pool.judge(JOBS + job, item)
    assert judged == [None]
    assert judged.failed == [True]
    (line,) = caplog.messages
    assert re.search(
        rf"{job} came to no verdict on 1 of 1 items, the first of them item 0, .*xyz.*: {why}, twice", line
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < 2 * 1 + 2  # twice the limit, and what starts took
    assert pool.judge(JOBS + "length", item * 5) == [3] * 5


def test_kinds_of_failures_are_counted(pool, caplog):
    assert pool.judge(JOBS + "leave", [{"how": how} for how in ("_exit", "crash", "_exit")]) == [None] * 3
    (line,) = caplog.messages
    assert line.endswith(" In all: of 2, its worker ended with status 3; of 1, its worker ended with status -11.")


def test_memory_up_to_the_limit_is_there_again_and_again(pool):
    judged = pool.judge(JOBS + "eat", [{"mib": mib} for mib in (50, 50, 1000, 50, 50)])
    assert judged == [50, 50, None, 50, 50]


def test_a_limit_of_the_system_that_leaves_less_is_an_error_at_the_start():
    """And no item is blamed, nor does it silently get less memory than was said."""
    script = f"""
import resource
from grpo_jax.rewards.pool import Limits, Pool
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
with Pool(1, limits=Limits(memory_mib=%d)) as pool:
    print(pool.judge({JOBS!r} + "length", [{{"completion": "xyz"}}]))
"""
    run = lambda mib: subprocess.run([sys.executable, "-c", script % mib], capture_output=True, text=True, cwd=ROOT)
    assert run(100).stdout == "[3]\n"
    said = run(2000).stderr
    assert re.search(
        r"length cannot be loaded: MemoryError: the limit of address space \(ulimit -v\) is 1024 MiB", said
    )
    assert "expected memory_mib=2000 beyond that" in said


def test_by_default_a_failure_is_an_error_that_names_the_item():
    with Pool(1, limits=Limits(cpu_seconds=0.1)) as strict:
        with pytest.raises(
            RewardError, match=r"on 1 of 3 items.* item 1, {'seconds': 5}: it took more than 0.1 s of CPU"
        ):
            strict.judge(JOBS + "burn", [{"seconds": 0}, {"seconds": 5}, {"seconds": 0}])
        assert strict.judge(JOBS + "length", [{"completion": "x"}]) == [1]  # and goes on


def test_wall_time_is_the_backstop():
    with Pool(1, limits=Limits(cpu_seconds=0.5, wall_seconds=0.5), on_failure="none") as patient:
        judged = patient.judge(JOBS + "sleep", [{"seconds": 0}, {"seconds": 1000}, {"seconds": 0}])
    assert judged == [1, None, 1]
    assert judged.failed == [False, True, False]


def test_a_busy_machine_changes_no_verdict(tmp_path):
    """Competitors on every core, and a worker that is stopped longer than its limit: only its own CPU time counts."""
    spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        with Pool(1, limits=Limits(cpu_seconds=0.6, wall_seconds=300), on_failure="none") as busy:
            judged = busy.judge(JOBS + "burn", [{"seconds": 0.4}, {"seconds": 0.9}, {"seconds": 0.4}])
            assert judged.failed == [False, True, False]
            answers = []
            asks = lambda: answers.extend(busy.judge(JOBS + "stop", [{"place": str(tmp_path)}]))
            thread = threading.Thread(target=asks)
            thread.start()
            while not (tmp_path / "pid").exists() or not (worker := (tmp_path / "pid").read_text()):
                time.sleep(0.01)
            os.kill(int(worker), signal.SIGSTOP)
            (tmp_path / "go").touch()
            time.sleep(1)
            os.kill(int(worker), signal.SIGCONT)
            thread.join()
            assert 0.2 <= answers[0] < 0.6
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


def test_injected_faults_lose_nothing(tmp_path):
    """10% of the items hang, 5% of the attempts end the worker: each verdict is the one that it should be."""
    rng, count = random.Random(0), 200
    die = lambda: rng.random() < 0.05
    items = [
        {"number": i, "place": str(tmp_path), "hangs": i % 10 == 7, "doomed": [die(), die()]} for i in range(count)
    ]
    items[50]["doomed"] = [True, True]
    items[51]["doomed"] = [True, False]
    lost = [item["hangs"] or all(item["doomed"]) for item in items]
    assert 21 <= sum(lost) < 25
    assert sum(any(item["doomed"]) for item in items) > 10
    with Pool(2, limits=Limits(cpu_seconds=0.1), on_failure="none") as faulty:
        judged = faulty.judge(JOBS + "fault", items)
    assert judged == [None if no else i for i, no in enumerate(lost)]
    assert judged.failed == lost
    attempts = [len((tmp_path / str(i)).read_text()) for i in range(count)]
    assert attempts == [1 + (item["hangs"] or item["doomed"][0]) for item in items]  # nobody else is tried again


def test_an_item_is_tried_again_by_a_worker_that_has_judged_no_other():
    """Whose memory may have grown as much: what waited behind the item goes before it, to the worker that replaces."""
    with Pool(1, on_failure="none") as once:
        judged = once.judge(JOBS + "remember", [{"alone": i == 1} for i in range(20)])
    assert judged[1] == 0
    assert judged.failed == [False] * 20
    assert sum(judged) > 20  # the others share workers


def test_workers_that_are_killed_while_idle_are_replaced_and_nothing_is_blamed(pool):
    for _ in range(3):
        for pid in set(pool.judge(JOBS + "pid", [{}] * 20)):
            os.kill(int(pid), signal.SIGKILL)
        judged = pool.judge(JOBS + "length", [{"completion": "xx"}] * 50)
        assert judged == [2] * 50
        assert not any(judged.failed)


@pytest.mark.parametrize("then", ["return", "raise", "eat"])
def test_a_child_that_comes_back_from_a_function_answers_nothing(pool, then):
    judged = pool.judge(JOBS + "fork", [{"completion": c, "then": then} for c in ("fork", "a", "fork", "b", "c")])
    assert judged == [0] * 5
    assert not any(judged.failed)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the socket in /proc")
@pytest.mark.parametrize(
    "said", ["{}", "noise", "[1, {}]", "[1, 2]", '[0, {"item": 1, "seconds": 0}]', '[1, {"item": 1}]'],
)  # fmt: skip
def test_what_is_no_reply_to_an_item_is_refused(caplog, said):
    with Pool(1, on_failure="none") as once:
        judged = once.judge(JOBS + "interject", [{"completion": said}, {"completion": ""}])
    assert judged == [None, 0]
    assert judged.failed == [True, False]
    line = f"{said}\n".encode()
    assert f"its worker said what is no reply to it: {line!r}, twice" in caplog.messages[0]


# What is an error ------------------------------------------------------------------------------------


def test_what_a_function_does_wrong_is_an_error_whatever_the_policy(pool, tmp_path):
    judge = lambda what: pool.judge(JOBS + "wrong", [{"what": "nan"}, {"what": what}])
    with pytest.raises(RewardError, match=r"wrong raised on item 1, {'what': 'raise'}: KeyError: 'no'\nTraceback"):
        judge("raise")
    with pytest.raises(RewardError, match=r"raised on item 1, .*'object' object has no attribute 'item'"):
        judge("object")
    with pytest.raises(RewardError, match=r"raised on item 0, {}: TypeError: length\(\) missing 1 required"):
        pool.judge(JOBS + "length", [{}])
    with pytest.raises(RewardError, match=r"cannot be loaded: AttributeError.* 'none'"):
        pool.judge(JOBS + "none", [{}])
    with pytest.raises(RewardError, match="cannot be loaded: ModuleNotFoundError: No module named 'nowhere'"):
        pool.judge("nowhere:f", [{}])
    with pytest.raises(RewardError, match=r"item 1, {'x': .*for nowhere:f cannot be sent to a worker"):
        pool.judge("nowhere:f", [{}, {"x": lambda: 0}])
    (tmp_path / "ends.py").write_text("import os\nos._exit(5)")
    with pytest.raises(RewardError, match=r"3 worker processes in a row ended before .*ends.py:f .* status 5"):
        pool.judge(f"{tmp_path}/ends.py:f", [{}])
    text, nan = (pooled(JOBS + "wrong", pool)([""], [""], [[]], what=[what]) for what in ("text", "nan"))
    assert text == ["2"]  # which `score` refuses, as it does nan
    assert nan[0] != nan[0]
    assert pool.judge(JOBS + "length", [{"completion": "x"}]) == [1]  # all of that has harmed nothing


def test_a_worker_that_cannot_be_started_is_an_error_that_says_why(monkeypatch):
    def refuse(*_, **__):
        raise BlockingIOError(errno.EAGAIN, "no room for a process")

    with Pool(1) as once:
        with monkeypatch.context() as full:
            full.setattr(subprocess, "Popen", refuse)
            with pytest.raises(
                RewardError, match=r"worker process for .*length could not be started: .*no room for a process"
            ) as refused:
                once.judge(JOBS + "length", [{"completion": "x"}])
        assert isinstance(refused.value.__cause__, OSError)
        assert once.judge(JOBS + "length", [{"completion": "x"}]) == [1]  # and goes on


@pytest.mark.parametrize("which", [0, 1])
def test_a_thread_that_cannot_be_started_is_an_error_and_the_next_call_starts_it(which, tmp_path, monkeypatch):
    start, asked, before = threading.Thread.start, [], threading.active_count()

    def refuse_one(thread):
        asked.append(thread)
        if len(asked) == which + 1:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_one)
    pair = [{"place": str(tmp_path), "name": name, "other": other} for name, other in ("ab", "ba")]
    with Pool(2) as both:
        with pytest.raises(RuntimeError, match="can't start new thread"):
            both.judge(JOBS + "length", [{"completion": "x"}])
        assert both.judge(JOBS + "meet", pair) == [1, 1]
    assert len(asked) == 3
    assert threading.active_count() == before


def test_bad_values_are_named():
    with pytest.raises(ValueError, match=r"function='judge' must be text, 'module:name' or 'file.py:name'"):
        pooled("judge")
    with pytest.raises(ValueError, match=r"function='none.py:judge': there is no file none.py"):
        pooled("none.py:judge")
    with pytest.raises(ValueError, match="workers=-1 must be 1 or more, or 0 for one a core"):
        Pool(-1)
    with pytest.raises(ValueError, match="on_failure='zero' must be one of error, none"):
        Pool(on_failure="zero")  # pyright: ignore[reportArgumentType]
    for bad in ({"cpu_seconds": 0}, {"cpu_seconds": 9, "wall_seconds": 8}, {"memory_mib": 0}):
        with pytest.raises(
            ValueError, match=r"cpu_seconds=.* must be above 0, wall_seconds=.*, memory_mib=.* 1 or more"
        ):
            Limits(**bad)


def test_a_closed_pool_and_one_of_another_process_refuse():
    closed = Pool(1)
    closed.close()
    with pytest.raises(RuntimeError, match="this pool is closed, or was made before a fork"):
        closed.judge(JOBS + "length", [{"completion": "x"}])
    forked = Pool(1)
    forked._owner = -1
    with pytest.raises(RuntimeError, match="made before a fork"):
        forked.judge(JOBS + "length", [{"completion": "x"}])


def test_who_waits_while_a_pool_is_closed_gets_an_error(tmp_path):
    errors = []
    closing = Pool(1, limits=Limits(cpu_seconds=300, wall_seconds=300))

    def ask():
        try:
            closing.judge(JOBS + "stop", [{"place": str(tmp_path)}] * 3)
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    while not (tmp_path / "pid").exists():
        time.sleep(0.01)
    closing.close()
    thread.join()
    assert errors == ["the pool was closed before all items were judged."]


# What is left behind ---------------------------------------------------------------------------------

PARENT = """
import sys, time
from grpo_jax.rewards.pool import Limits, Pool
print("main")
jobs = {jobs!r}
def judge(pool, **item):
    print("workers", *{{int(pid) for pid in pool.judge(jobs + "pid", [{{}}] * 20)}}, flush=True)
    if item:
        pool.judge(jobs + "busy", [item] * 2)
limits = Limits(cpu_seconds={cpu}, wall_seconds=1000)
"""
ENDS = {
    "with": "with Pool(2) as pool: judge(pool)",
    "exception": "with Pool(2) as pool: judge(pool); 1 / 0",
    "exit": "judge(Pool(2)); sys.exit(3)",
    "idle": "judge(Pool(2)); time.sleep(1000)",
    "sleep": "judge(Pool(2, limits=limits), how='sleep')",
    "spin": "judge(Pool(2, limits=limits), how='spin')",
    "hold": "judge(Pool(2, limits=limits), how='hold')",
}


@pytest.mark.parametrize(
    ("end", "number"),
    [
        ("with", 0), ("exception", 0), ("exit", 0), ("idle", signal.SIGINT), ("idle", signal.SIGTERM),
        ("idle", signal.SIGKILL), ("sleep", signal.SIGINT), ("sleep", signal.SIGKILL), ("spin", signal.SIGKILL),
        ("hold", signal.SIGINT), ("hold", signal.SIGKILL),
    ],
)  # fmt: skip
def test_nothing_is_left_behind(end, number, tmp_path):
    """Neither workers, nor what they started, nor files, however the parent ends and whatever they do."""
    place = tmp_path / "temporary"
    place.mkdir()
    # A call that holds the interpreter ends by its limit, 4 s; the others must not wait for theirs.
    script = PARENT.format(jobs=JOBS, cpu=4 if end == "hold" else 1000) + ENDS[end] + "\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(place), "PYTHONDONTWRITEBYTECODE": "1"}
    (tmp_path / "script.py").write_text(script)
    parent = subprocess.Popen(
        [sys.executable, "../script.py"], cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert parent.stdout is not None
    assert parent.stderr is not None
    assert parent.stdout.readline() == "main\n"
    workers = parent.stdout.readline().split()
    assert workers.pop(0) == "workers"
    assert len(workers) == 2
    pids = [int(pid) for pid in workers]
    if end in ("sleep", "spin", "hold"):
        for _ in range(2):
            said = parent.stderr.readline().split()
            assert said[0] == "busy"
            pids += [int(pid) for pid in said[1:]]
        assert len(set(pids)) == 4  # each worker, and what it started
    if number:
        assert all(map(alive, pids))
        parent.send_signal(number)
    out, _ = parent.communicate(timeout=100)
    assert out == ""  # no worker has run the parent's script
    assert gone(pids)
    assert os.listdir(place) == []


@pytest.mark.parametrize(("then", "rounds"), [("return", 1), ("end", 2), ("hold", 2)])
def test_sessions_and_files_of_items_end_with_their_worker(then, rounds, tmp_path, monkeypatch, capfd):
    """Where it is closed and where it is replaced; `rounds` as an item that fails is tried again."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with Pool(1, limits=Limits(cpu_seconds=0.5, wall_seconds=300), on_failure="none") as once:
        once.judge(JOBS + "scatter", [{"then": then}])
        assert len(os.listdir(tmp_path)) == (1 if then == "return" else 0)  # the directory of the worker that is there
    said = [line.split()[1:] for line in capfd.readouterr().err.splitlines() if line.startswith("scattered ")]
    assert len(said) == rounds
    assert gone([int(pid) for _, *pids in said for pid in pids], within=10)
    assert all(tmp_path in pathlib.Path(path).parents for path, *_ in said)
    assert os.listdir(tmp_path) == []


def test_what_is_deep_is_removed_and_the_reason_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with Pool(1, limits=Limits(cpu_seconds=1, wall_seconds=300), on_failure="none") as once:
        once.judge(JOBS + "nest", [{"levels": 2000}])
    assert "it took more than 1 s of CPU time, twice" in caplog.messages[0]
    assert os.listdir(tmp_path) == []


def test_a_failure_costs_one_worker_and_none_for_those_behind_it(tmp_path, monkeypatch):
    starts, start = [], process.Process._start
    monkeypatch.setattr(process.Process, "_start", lambda self: (starts.append(self), start(self))[1])
    with Pool(1, limits=Limits(cpu_seconds=0.5), on_failure="none") as once:
        judged = once.judge(JOBS + "leave_or_not", [{"completion": "x" if i == 50 else ""} for i in range(100)])
    assert [i for i, failed in enumerate(judged.failed) if failed] == [50]
    assert len(starts) == 3  # the first, that of the second try, and that of the rest


def test_an_item_that_ends_its_group_leaves_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with Pool(1, on_failure="none") as once:
        judged = once.judge(JOBS + "end_group", [{"completion": "end"}, {"completion": ""}])
    assert judged == [None, 0]
    pids = [int(line.split()[1]) for line in capfd.readouterr().err.splitlines()]
    assert len(pids) == 2
    assert gone(pids)
    assert os.listdir(tmp_path) == []


def test_a_supervisor_that_was_stopped_ends_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(process, "_GRACE", 0.5)
    with Pool(1) as once:
        (pid,) = once.judge(JOBS + "stop_supervisor", [{}])
    assert gone([int(pid)])
    assert os.listdir(tmp_path) == []


def test_what_a_worker_wrote_before_it_ended_is_said(caplog, capfd, tmp_path):
    (tmp_path / "speaks.py").write_text("import os\ndef f(**_): print(*range(2000), 'the end', sep='\\n'); os._exit(3)")
    with Pool(1, on_failure="none") as once:
        once.judge(f"{tmp_path}/speaks.py:f", [{}])
    assert caplog.messages[0].endswith(
        "its worker ended with status 3, after it wrote to standard error:\n  "
        + "\n  ".join([*map(str, range(1991, 2000)), "the end"])
        + ", twice."
    )
    assert capfd.readouterr().err == "".join(f"{i}\n" for i in [*range(2000), "the end"]) * 2
    (tmp_path / "breaks.py").write_text("import os\nos.write(2, b'no such thing')\nos._exit(5)")
    with Pool(1) as never, pytest.raises(RewardError, match=r"3 worker .* status 5, .*error:\n  no such thing\.$"):
        never.judge(f"{tmp_path}/breaks.py:f", [{}])


def test_what_nobody_reads_is_said_once(monkeypatch, tmp_path):
    """A worker that ends before its supervisor could pass on what it wrote."""
    (tmp_path / "breaks.py").write_text("import os\nos.write(2, b'no such thing')\nos._exit(5)")
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    monkeypatch.setattr(process, "_GRACE", 0.5)  # until a supervisor that cannot write is ended
    monkeypatch.setattr(subprocess, "Popen", functools.partial(subprocess.Popen, stderr=writer))
    with Pool(1) as never, pytest.raises(RewardError, match=r"status 5, .*error:\n  no such thing\.$"):
        never.judge(f"{tmp_path}/breaks.py:f", [{}])
    os.close(reader)
    os.close(writer)


def test_no_descriptor_and_no_thread_is_left_behind():
    def held():
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    with Pool(1) as first:
        first.judge(JOBS + "length", [{"completion": "x"}])
    before = held()
    for _ in range(3):
        with Pool(3, limits=Limits(cpu_seconds=0.1), on_failure="none") as once:
            once.judge(JOBS + "leave", [{"how": "_exit"}, {"how": "exit"}])
    assert held() == before

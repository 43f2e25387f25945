"""What stands between completions and their scores: the thread ahead, hosts that agree, and metrics."""

import dataclasses
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from grpo_jax import scoring
from grpo_jax.data.sources import Prompt
from grpo_jax.data.tokenizer import ByteTokenizer
from grpo_jax.loop import Stopped
from grpo_jax.rewards import Judged, Reward, RewardError, Scores
from grpo_jax.scoring import (
    Ahead,
    ScoredGroups,
    interruptibly,
    on_every_host,
    rollout_metrics,
    score_completions,
)
from grpo_jax.types import Groups
from tests.silent import silent_rollout

ROOT = pathlib.Path(__file__).parent.parent
LIMIT = 120  # seconds that nothing here takes, on a busy machine neither


def threads():
    return [t for t in threading.enumerate() if t.name == "rewards" and t.is_alive()]


# Ahead -------------------------------------------------------------------------------------------------------------


def test_one_after_the_other_in_order_while_the_caller_goes_on():
    happened, go = [], threading.Event()

    def work(i):
        assert threading.current_thread() is not threading.main_thread()
        assert go.wait(LIMIT)
        happened.append(("begins", i))
        time.sleep(0.01 * (3 - i))
        happened.append(("ends", i))
        return i

    with Ahead() as ahead:
        for i in range(3):
            ahead.add(lambda i=i: work(i))
        assert not happened
        ahead.check()
        go.set()
        assert ahead.results() == [0, 1, 2]
    assert happened == [(what, i) for i in range(3) for what in ("begins", "ends")]
    assert not threads()


def test_after_one_that_raises_no_other_begins():
    ran = []
    with Ahead() as ahead:
        ahead.add(lambda: 1 / 0)
        ahead.add(lambda: ran.append(1))
        with pytest.raises(ZeroDivisionError):
            ahead.results()
        with pytest.raises(ZeroDivisionError):
            ahead.check()
    assert not ran


def test_an_error_waits_for_what_runs_and_begins_no_other():
    ended, begun = [], threading.Event()

    def slow():
        begun.set()
        time.sleep(0.05)
        ended.append("slow")

    with pytest.raises(ArithmeticError), Ahead() as ahead:  # noqa: PT012
        ahead.add(slow)
        ahead.add(lambda: ended.append("next"))
        assert begun.wait(LIMIT)
        raise ArithmeticError
    assert ended == ["slow"]
    assert not threads()


def test_results_are_waited_for_until_somebody_wants_an_end():
    looks, go = [], threading.Event()

    def look():
        looks.append(threading.current_thread())
        if len(looks) == 3:
            raise Stopped

    with pytest.raises(Stopped), Ahead() as ahead:  # noqa: PT012
        ahead.add(lambda: go.wait(LIMIT))
        ahead.add(lambda: looks.append(None))
        ahead.results(look)
    (running, waiting) = threads()
    go.set()
    running.join(LIMIT)
    waiting.join(LIMIT)
    assert looks == [threading.main_thread()] * 3  # what waited has not begun


def test_what_is_raised_ends_the_wait():
    go = threading.Event()
    with pytest.raises(ZeroDivisionError), Ahead() as ahead:  # noqa: PT012
        ahead.add(lambda: 1 / 0)
        ahead.add(lambda: go.wait(LIMIT))
        ahead.results(lambda: None)
    assert not threads()


def test_where_the_device_is_used_this_thread_scores():
    where = lambda on_device: interruptibly(
        [threading.current_thread] * 2, [Reward(name="r", function=None, on_device=on_device)], lambda: None
    )
    assert where(True) == [threading.main_thread()] * 2
    assert threading.main_thread() not in where(False)


def test_a_second_ctrl_c_does_not_wait():
    """Nor does the interpreter, when it ends."""
    program = """
import threading
from grpo_jax.scoring import Ahead
begun = threading.Event()
def hangs():
    begun.set()
    threading.Event().wait()
with Ahead() as ahead:
    ahead.add(hangs)
    begun.wait()
    raise KeyboardInterrupt
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert "KeyboardInterrupt" in done.stderr
    assert done.returncode


# Hosts -------------------------------------------------------------------------------------------------------------

# Each scenario: what the reward function does on process 1, and what both must say.
PROGRAM = """
import functools, json, pathlib, sys, time, types
import jax
import numpy as np
port, process, workdir = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
from grpo_jax.data.sources import Prompt
from grpo_jax.data.tokenizer import ByteTokenizer
from grpo_jax.rewards import Reward, RewardError
from grpo_jax.scoring import journaled_scores, on_every_host, score_rollout
from grpo_jax.telemetry import RewardJournal, WorkdirError
from tests.silent import silent_rollout

assert jax.process_count() == 2
asked = []

def reward(completions, step, **_):
    asked.append(step[0])
    if (process, step[0]) == (1, 1):
        raise OSError("the judge is \u00e9teint" + "!" * 5000)
    if step[0] == 2:
        raise OSError(f"on {process}")
    return [float(process)] * len(completions)

def said(journal, step, name="r"):
    rollout, prompts = silent_rollout(2, 2), [Prompt(text="p", columns={"step": step})] * 2
    rewards = [Reward(name=name, function=reward)]
    score = lambda: score_rollout(rewards, prompts, rollout, ByteTokenizer(), 2)
    try:
        return journaled_scores(score, rewards, rollout, journal, step, 0).by_name[name].tolist()
    except (RewardError, WorkdirError) as error:
        return f"{error}", type(error.__cause__).__name__, type(error).__name__

def full():
    made = RewardJournal(workdir / f"full_{process}", process=process)
    if process == 0:
        made._lines._lines._file = types.SimpleNamespace(write=refused)
    return made

def refused(text):
    raise OSError(28, "No space left on device")

journal = RewardJournal(workdir, process=process)
results = [said(journal, step) for step in range(3)]
journal.close()
again = RewardJournal(workdir, process=process)
(workdir / f"full_{process}").mkdir()
results += [said(again, 0), said(full(), 4)]
if process == 1:  # one replays, the other does not
    again._recorded.clear()
results += [said(again, 0), asked]
if process == 1:  # nor here: the one has the name of before, and the other asks anew
    again._recorded.clear()
results.append(said(again, 0, "s"))
impatient = functools.partial(on_every_host, patience=2.0)
if process == 1:
    def late():
        while not (workdir / "impatient").exists():
            time.sleep(0.1)
else:
    late = lambda: None
try:
    impatient(late)
except RewardError as error:
    results.append(str(error))
(workdir / "impatient").touch()
results.append(on_every_host(lambda: process))
print("RESULTS", json.dumps(results))
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_what_fails_on_one_process_is_an_error_on_all_before_any_goes_on(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    port = free_port()
    command = lambda process: [sys.executable, "-c", PROGRAM, str(port), str(process), str(tmp_path)]
    both = [
        subprocess.Popen(
            command(i), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    try:
        ended = [process.communicate(timeout=2 * LIMIT) for process in both]
    finally:
        for process in both:
            process.kill()
    for process, (_, err) in zip(both, ended, strict=True):
        assert process.returncode == 0, err
    lines = [next(line for line in out.splitlines() if line.startswith("RESULTS")) for out, _ in ended]
    first, second = (json.loads(line.removeprefix("RESULTS")) for line in lines)
    assert (first[0], second[0]) == ([0.0] * 4, [1.0] * 4)  # each has its own

    assert first[1][0] == second[1][0]  # one failed
    assert first[1][0].startswith("process 1 of 2: reward function 'r' raised OSError: the judge is éteint!!!")
    assert 900 < len(first[1][0]) < 1100  # bounded
    assert (first[1][1], second[1][1]) == ("NoneType", "RewardError")  # where it happened its cause is there
    assert first[1][2] == second[1][2] == "RewardError"

    assert first[2][0] == second[2][0]  # both failed
    assert first[2][0].startswith("process 0 of 2 (and 1 more): reward function 'r' raised OSError: on 0")

    assert (first[3], second[3]) == ([0.0] * 4, [1.0] * 4)  # replayed
    # A full disk is no fault of a reward function, and all say so.
    assert first[4][0] == second[4][0]
    assert re.match(r"process 0 of 2: cannot write \S+full_0/rewards\.jsonl: No space left on device\.", first[4][0])
    assert (first[4][1:], second[4][1:]) == (["WorkdirError", "WorkdirError"], ["NoneType", "WorkdirError"])
    assert (first[5], second[5]) == ([0.0] * 4, [1.0] * 4)
    assert (first[6], second[6]) == ([0, 1, 2, 4], [0, 1, 2, 4, 0, 0])  # who replays asks nobody
    assert first[7][0] == second[7][0]
    assert first[7][0].startswith("process 0 of 2: the journal has rewards ['r'] of step 0, and the run has ['s']")
    for i, results in enumerate((first, second)):  # nobody waits for ever, and the next step finds all together
        assert results[8].startswith(f"process {i} of 2: not all processes had their rewards within 2 s of each other")
        assert results[9] == i

    steps = lambda name: [json.loads(line)["step"] for line in (tmp_path / name).read_text().splitlines()]
    assert steps("rewards.jsonl") == [0, 1]  # of step 1 its own part was scored
    assert steps("rewards.1.jsonl") == [0, 0, 0]


def test_with_one_process_it_is_the_error_itself():
    with pytest.raises(ZeroDivisionError):
        on_every_host(lambda: 1 / 0)
    assert on_every_host(lambda: 7) == 7


# Metrics -----------------------------------------------------------------------------------------------------------


def fresh(scores, rewards, size):
    total = scores.total(rewards).reshape(-1, size)
    rollout = silent_rollout(len(total), size)
    groups = Groups(rollout=rollout, rewards=total.astype(np.float32), step_rewards=None)
    constant = np.zeros(len(total), bool)
    return ScoredGroups(prompts=[], groups=groups, scores=scores, total=total, constant=constant)


def test_metrics_of_rewards_by_hand():
    scores = Scores(
        by_name={"a": np.array([1.0, 3.0, np.nan, 8.0]), "b": np.array([0.0, 0.0, 5.0, 1.0])},
        failed={"a": np.array([False, False, True, False])},
        seconds={"a": np.array([1.0, 2.0, 30.0, np.nan]), "b": np.full(4, 0.5)},
    )
    rewards = [Reward(name="a", function=None, high=4.0), Reward(name="b", function=None, weight=0.5)]
    metrics = rollout_metrics(rewards, fresh(scores, rewards, 2))
    named = lambda name: {k.rpartition("/")[2]: v for k, v in metrics.items() if k.startswith(f"rewards/{name}/")}
    # As they were said: mean and deviation of 1, 3 and 8; one of them is clipped.
    assert named("a") == pytest.approx(
        {"mean": 4, "std": 13**0.5, "not_applicable": 1, "failed": 1, "clipped": 1}
    )  # fmt: skip
    assert named("b") == pytest.approx({"mean": 1.5, "std": (17 / 3) ** 0.5, "not_applicable": 0, "failed": 0})
    # Sums 1, 3, unknown, 4.5: of the second group one is known, which has no deviation.
    assert metrics["reward"] == pytest.approx(8.5 / 3)
    assert metrics["reward_std"] == pytest.approx(2**0.5)
    assert metrics["completions/unknown_reward"] == 1
    assert metrics["accuracy"] == 1  # of the three that were judged
    times = {k: v for k, v in metrics.items() if k.startswith("time/")}
    assert times == pytest.approx({
        "time/rewards/a/p50_seconds": 2, "time/rewards/a/p95_seconds": 2 + 0.9 * 28, "time/rewards/a/max_seconds": 30,
        "time/rewards/b/p50_seconds": 0.5, "time/rewards/b/p95_seconds": 0.5, "time/rewards/b/max_seconds": 0.5,
    })  # fmt: skip


def test_accuracy_is_of_what_was_judged():
    """A problem that the judge has nothing to say of is neither right nor wrong."""
    scores = Scores(by_name={"a": np.array([1.0, np.nan, 0.0, np.nan])})
    rewards = [Reward(name="a", function=None)]
    assert rollout_metrics(rewards, fresh(scores, rewards, 2))["accuracy"] == 0.5


def test_a_reward_that_nobody_knows_is_null_in_the_samples():
    scores = Scores(by_name={"a": np.array([1.0, np.nan])}, failed={"a": np.array([False, True])})
    rewards = [Reward(name="a", function=None)]
    shown = dataclasses.replace(fresh(scores, rewards, 2), prompts=[Prompt(text="a")])
    samples = scoring.samples_of_group(shown, 0, np.zeros(2), ByteTokenizer("abcd"))
    assert [(sample["reward"], sample["rewards/a"]) for sample in samples] == [(1, 1), (None, None)]


def test_where_nothing_is_known_nothing_is_said_of_it():
    scores = Scores(
        by_name={"a": np.full(2, np.nan)}, failed={"a": np.ones(2, bool)}, seconds={"a": np.full(2, np.nan)}
    )
    rewards = [Reward(name="a", function=None)]
    metrics = rollout_metrics(rewards, fresh(scores, rewards, 2))
    assert all(np.isfinite(value) for value in metrics.values())
    assert (metrics["reward"], metrics["reward_std"], metrics["rewards/a/failed"]) == (0, 0, 2)
    assert not any(name.startswith("time/") for name in metrics)
    assert json.loads(json.dumps(metrics)) == metrics


def test_groups_that_are_joined_keep_failures_and_times():
    function = lambda n, **_: Judged([None if x else 1.0 for x in n], failed=[bool(x) for x in n], seconds=n)
    of = lambda n: score_completions(
        [Reward(name="r", function=function)], [Prompt(text="p", columns={"n": n})], [[1]] * 2, ["a", "b"], 2
    )
    parts = [fresh(of(n), [Reward(name="r", function=None)], 2) for n in (0, 3)]
    both = ScoredGroups.join(parts)
    assert both.scores.failed["r"].tolist() == [False, False, True, True]
    assert both.scores.seconds["r"].tolist() == [0, 0, 3, 3]
    np.testing.assert_array_equal(both.total, [[1, 1], [np.nan, np.nan]])


def test_columns_are_those_of_the_prompts_and_all_have_the_same():
    seen = {}

    def reward(prompts, completions, completion_ids, gold, tags):
        seen.update(prompts=prompts, gold=gold, tags=tags, texts=completions, ids=completion_ids)
        return [0.0] * 4

    rewards = [Reward(name="r", function=reward)]
    prompts = [Prompt(text=t, columns={"gold": i, "tags": [t, {"deep": i}]}) for i, t in enumerate("pq")]
    score_completions(rewards, prompts, [[1], [2], [3], [4]], list("abcd"), 2)
    assert seen == {
        "prompts": ["p", "p", "q", "q"], "gold": [0, 0, 1, 1], "texts": list("abcd"), "ids": [[1], [2], [3], [4]],
        "tags": [["p", {"deep": 0}]] * 2 + [["q", {"deep": 1}]] * 2,
    }  # fmt: skip
    prompts[1] = Prompt(text="q", columns={"gold": 1})
    with pytest.raises(RewardError, match=r"'q' has the columns \['gold'\], and prompt 'p' has \['gold', 'tags'\]"):
        score_completions(rewards, prompts, [[1]] * 4, list("abcd"), 2)


def test_everything_public_is_named():
    assert sorted(scoring.__all__) == scoring.__all__

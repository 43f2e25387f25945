import asyncio
import functools
import json
import math
import time

import numpy as np
import pytest

from grpo_jax.rewards import Reward, RewardError, Scores, score
from grpo_jax.telemetry import RewardJournal

ARGUMENTS = {
    "prompts": ["p", "p", "q"],
    "completions": ["a", "bb", "ccc"],
    "completion_ids": [[1], [2, 2], [3, 3, 3]],
    "columns": {"answer": [1, 1, 2]},
}


def run(*functions):
    rewards = [Reward(name=f"r{i}", function=f, weight=2.0**i) for i, f in enumerate(functions)]
    return score(rewards, **ARGUMENTS), rewards


def test_functions_get_texts_ids_and_columns_and_are_summed_by_weight():
    def length(prompts, completions, completion_ids, **columns):
        assert columns == {"answer": [1, 1, 2]}
        assert [len(i) for i in completion_ids] == [len(c) for c in completions]
        return [len(c) for c in completions]

    scores, rewards = run(length, lambda answer, **_: [None, 10.0 * answer[1], np.float32(0.5)])
    np.testing.assert_array_equal(scores.by_name["r0"], [1, 2, 3])
    assert math.isnan(scores.by_name["r1"][0])
    np.testing.assert_array_equal(scores.total(rewards), [1, 22, 4])  # None counts nothing


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda *_, **__: 1 / 0, "'r0' raised ZeroDivisionError"),
        (lambda *_, **__: [1.0, 2.0], "'r0' returned 2 values for 3 completions"),
        (lambda *_, **__: [1.0, math.nan, 2.0], "'r0' returned nan for completion 1, 'bb'"),
        (lambda *_, **__: [1.0, 2.0, -math.inf], "'r0' returned -inf for completion 2"),
        (lambda *_, **__: [1.0, "2", 3.0], "'r0' returned '2' for completion 1"),
        (lambda *_, **__: 1.0, "expected a list"),
        (lambda *_, **__: [10**400, 1, 1], "'r0' returned 1000"),
        (lambda *_, **__: [None, 1.0, 1.0], "returned None for completion 0"),
        (lambda prompts, completions, completion_ids: [0.0] * 3, r"'r0' does not take 'answer': end.*\*\*columns"),
        (lambda completions, gold, **_: [0.0] * 3, "'r0' needs the column 'gold', and the prompts have 'answer'"),
        (lambda **_: [1.0, [(0, 1.0), (2, 1.0)], 1.0], "completion 1, 'bb'.*end_token 2 must be above 0.*below 2"),
        (lambda **_: [1.0, [(1, 1.0), (1, 1.0)], 1.0], "end_token 1 must be above 1, where the step before it ends"),
        (lambda **_: [[(-1, 1.0)], 1.0, 1.0], "end_token -1 must be above -1"),
        (lambda **_: [[(0, math.nan)], 1.0, 1.0], "nan is not finite.*expected a finite number, a list of"),
        (lambda **_: [1.0, [(0, 1e308), (1, 1e308)], 1.0], "inf is not finite"),
        (lambda **_: [[(0.0, 1.0)], 1.0, 1.0], "'float' object cannot be interpreted as an integer"),
        (lambda **_: [[0, 1.0], 1.0, 1.0], r"returned \[0, 1.0\] for completion 0"),
    ],
)
def test_what_a_reward_function_does_wrong_is_said_at_once(function, message):
    with pytest.raises(RewardError, match=message):
        run(function)


def test_names_must_differ():
    reward = Reward(name="r", function=lambda *_, **__: [1.0] * 3)
    with pytest.raises(RewardError, match="same name"):
        score([reward, reward], **ARGUMENTS)


def test_a_column_must_not_be_named_as_an_argument():
    columns = {"completions": ["x"] * 3}
    with pytest.raises(RewardError, match="'completions' has the name of an argument"):
        score([Reward(name="r", function=lambda **_: [1.0] * 3)], **{**ARGUMENTS, "columns": columns})


def test_asynchronous_functions_run_at_the_same_time():
    """Each waits for the other: one after the other, they would wait for ever."""
    arrived: dict[str, asyncio.Event] = {}

    async def meet(me, other, **_):
        arrived.setdefault(me, asyncio.Event()).set()
        await asyncio.wait_for(arrived.setdefault(other, asyncio.Event()).wait(), timeout=10)
        return [1.0, None, 2.0]

    scores, rewards = run(
        functools.partial(meet, "a", "b"), lambda **_: meet("b", "a"), lambda completions, **_: [0.5] * 3
    )
    np.testing.assert_array_equal(scores.total(rewards), [5, 2, 8])  # 1 (1 + 2) + 4 / 2, ...


def test_asynchronous_functions_run_inside_a_running_loop_and_keep_theirs():
    loops = []

    async def reward(**_):
        loops.append(asyncio.get_running_loop())
        return [1.0] * 3

    async def notebook():
        return run(reward)[0]

    np.testing.assert_array_equal(asyncio.run(notebook()).by_name["r0"], [1, 1, 1])
    run(reward)
    assert loops[0] is loops[1]  # a client that is bound to a loop lives on


def test_one_that_fails_stops_the_others():
    ended = []

    async def slow(**_):
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("slow")

    async def fails(**_):
        raise OSError("no judge there")

    with pytest.raises(RewardError, match=r"'r0' raised OSError: no judge there.*'a' to prompt 'p'"):
        run(fails, slow)
    deadline = time.monotonic() + 10
    while not ended and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ended == ["slow"]


def test_steps_are_kept_and_their_sum_is_the_outcome():
    scores, rewards = run(
        lambda **_: [[(0, 1)], [(0, 0.5), (1, np.float32(0.25))], []], lambda **_: [None, 1.0, [(np.int64(2), -1.0)]]
    )
    np.testing.assert_array_equal(scores.by_name["r0"], [1, 0.75, 0])
    assert scores.steps == {"r0": [[(0, 1.0)], [(0, 0.5), (1, 0.25)], []], "r1": [None, None, [(2, -1.0)]]}
    np.testing.assert_array_equal(scores.total(rewards), [1, 2.75, -2])
    assert run(lambda **_: [1.0, 2.0, 3.0])[0].steps == {}


def test_rewards_by_token():
    """Steps where they end, a plain number at the last token, nothing where none applies or there is no step."""
    scores = Scores.of({"r0": [[(0, 0.5), (1, 0.25)], 3.0, []], "r1": [1.0, None, 2.0]})
    none = np.nan
    np.testing.assert_array_equal(
        scores.by_token("r0", [2, 2, 4], 4), [[0.5, 0.25, none, none], [none, 3, none, none], [none] * 4]
    )
    np.testing.assert_array_equal(
        scores.by_token("r1", np.array([2, 2, 4]), 4), [[none, 1, none, none], [none] * 4, [none, none, none, 2]]
    )


def test_a_journal_gives_back_the_same_scores(tmp_path):
    scores, _ = run(
        lambda **_: [[(0, 0.1)], [(0, 0.1), (1, 0.2)], []], lambda **_: [None, 1 / 3, [(2, -1e-300)]],
        lambda **_: [np.float32(0.1), None, -0.0],
    )  # fmt: skip
    journal = RewardJournal(tmp_path)
    journal.write(3, 0, "digest", scores.items())
    journal.close()
    recorded = RewardJournal(tmp_path).read(3, 0, "digest")
    assert recorded is not None
    assert json.dumps(recorded) == json.dumps(scores.items())
    again = Scores.of(recorded)
    assert again.steps == scores.steps
    assert {n: v.tobytes() for n, v in again.by_name.items()} == {n: v.tobytes() for n, v in scores.by_name.items()}

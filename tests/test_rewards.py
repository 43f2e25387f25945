import asyncio
import dataclasses
import functools
import json
import math
import sys
import time

import numpy as np
import pytest

from grpo_jax.rewards import Judged, Reward, RewardError, Scores, score
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
        (lambda **_: [1.0, [(0, 1e308), (1, 1e308)], 1.0], r"1e\+308 is beyond 1e\+18"),
        (lambda **_: [1.0, -1e300, 1.0], r"returned -1e\+300 for completion 1.*advantages are taken in float32"),
        (lambda **_: sys.exit(3), "raised SystemExit: 3"),
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
    with pytest.raises(RewardError, match="'completions' has the name of an argument of reward functions"):
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
    journal.write(3, 0, "digest", scores.record())
    journal.close()
    recorded = RewardJournal(tmp_path).read(3, 0, "digest")
    assert recorded is not None
    # Without failures, the record that journals have always had.
    assert json.dumps(recorded) == json.dumps({"scores": scores.items()})
    again = Scores.of_record(recorded)
    assert again.steps == scores.steps
    assert {n: v.tobytes() for n, v in again.by_name.items()} == {n: v.tobytes() for n, v in scores.by_name.items()}


# Composition -------------------------------------------------------------------------------------------------------


def test_each_number_is_clipped_before_the_sum_and_logged_as_it_is():
    scores = score(
        [
            Reward(name="a", function=lambda **_: [-5.0, 0.25, 7.0], weight=2.0, low=-1.0, high=1.0),
            Reward(name="steps", function=lambda **_: [[(0, 9.0)], [(0, -9.0), (1, 0.5)], None], high=1.0),
            Reward(name="free", function=lambda **_: [100.0, -100.0, None]),
        ],
        **ARGUMENTS,
    )
    rewards = [Reward(name="a", function=None, weight=2.0, low=-1.0, high=1.0),
               Reward(name="steps", function=None, high=1.0), Reward(name="free", function=None)]  # fmt: skip
    np.testing.assert_array_equal(scores.by_name["a"], [-5, 0.25, 7])
    np.testing.assert_array_equal(scores.by_name["steps"], [9, -8.5, np.nan])
    clipped = scores.clipped(rewards)
    np.testing.assert_array_equal(clipped.by_name["a"], [-1, 0.25, 1])
    assert clipped.steps["steps"] == [[(0, 1.0)], [(0, -9.0), (1, 0.5)], None]  # of steps, each
    np.testing.assert_array_equal(clipped.by_name["free"], scores.by_name["free"])
    np.testing.assert_array_equal(scores.total(rewards), [-2 + 1 + 100, 0.5 - 8.5 - 100, 2])
    assert scores.clipped(rewards[2:]) is scores


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 1.0, "high": 0.0}, r"low=1.0 at most high=0.0"),
        ({"high": math.nan}, "high=nan"),
        ({"weight": math.inf}, "weight=inf must be finite"),
        ({"after": "accuracy"}, r"after='accuracy' must be a tuple of names: \('accuracy',\)"),
    ],
)
def test_bad_rewards(options, message):
    with pytest.raises(ValueError, match=message):
        Reward(name="r", function=None, **options)


def test_a_reward_that_depends_on_others_sees_what_they_said():
    """Given in any order; of steps their sum, None where it does not apply, not clipped; they are waited for."""
    seen = {}

    def last(scores, completions, **_):
        seen["last"] = {name: list(values) for name, values in scores.items()}
        return [1.0] * len(completions)

    async def middle(scores, **_):
        await asyncio.sleep(0.01)
        return [None if x is None else -x for x in scores["first"]]

    async def first(**columns):
        assert "scores" not in columns
        await asyncio.sleep(0.01)
        return [3.0, [(0, 0.5), (1, 0.25)], None]

    rewards = [Reward(name="last", function=last, after=("middle", "first")),
               Reward(name="middle", function=middle, after=("first",), weight=0.0),
               Reward(name="first", function=first, high=1.0)]  # fmt: skip
    scores = score(rewards, **ARGUMENTS)
    assert seen["last"] == {"middle": [-3, -0.75, None], "first": [3, 0.75, None]}
    assert list(scores.by_name) == ["last", "middle", "first"]
    np.testing.assert_array_equal(scores.total(rewards), [1 + 1, 1 + 0.75, 1])


def test_one_that_fails_is_told_before_those_that_depend_on_it_run():
    ran = []
    rewards = [Reward(name="next", function=lambda scores, **_: ran.append(1), after=("first",)),
               Reward(name="first", function=lambda **_: [1.0, math.nan, 1.0])]  # fmt: skip
    with pytest.raises(RewardError, match="'first' returned nan for completion 1"):
        score(rewards, **ARGUMENTS)
    assert not ran


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ({"a": ("c",)}, "'a' depends on 'c', and the rewards are a, b: name one of those"),
        ({"a": ("b",), "b": ("a",)}, "in a circle: (a -> b -> a|b -> a -> b)"),
        ({"a": ("a",)}, "in a circle: a -> a"),
    ],
)
def test_what_cannot_be_ordered(after, message):
    of = lambda name: Reward(name=name, function=lambda scores=None, **_: [1.0] * 3, after=after.get(name, ()))
    with pytest.raises(RewardError, match=message):
        score([of("a"), of("b")], **ARGUMENTS)


def test_scores_are_for_rewards_that_depend_on_others():
    needs = Reward(name="r", function=lambda scores, **_: [1.0] * 3)
    with pytest.raises(RewardError, match=r"'r' needs the column 'scores'.*the rewards that Reward.after names"):
        score([needs], **ARGUMENTS)
    a = Reward(name="a", function=lambda **_: [1.0] * 3)
    takes_none = Reward(name="r", function=lambda prompts, completions, completion_ids, answer: 0, after=("a",))
    with pytest.raises(RewardError, match="'r' does not take 'scores'"):
        score([a, takes_none], **ARGUMENTS)
    columns = {"columns": {"scores": [1, 2, 3]}}
    column = Reward(name="r", function=lambda scores, **_: list(map(float, scores)))
    np.testing.assert_array_equal(score([column], **ARGUMENTS | columns).by_name["r"], [1, 2, 3])
    with pytest.raises(RewardError, match="column 'scores' has the name of an argument"):
        score([a, Reward(name="r", function=lambda scores, **_: [1.0] * 3, after=("a",))], **ARGUMENTS | columns)


# Failures and times ------------------------------------------------------------------------------------------------


def test_a_judge_that_came_to_no_verdict_is_no_zero():
    """Such a completion has no sum, where the judge counts; nor is it an error that nothing else applies to it."""
    judged = lambda items, failed: lambda **_: Judged(items, failed=failed, seconds=[0.1] * 3)
    rewards = [Reward(name="counts", function=judged([None, 1.0, None], [True, True, False])),
               Reward(name="logged", function=judged([0.5, None, 0.5], [False, True, False]), weight=0.0)]  # fmt: skip
    scores = score(rewards, **ARGUMENTS)
    assert {name: of.tolist() for name, of in scores.failed.items()} == {
        "counts": [True, True, False], "logged": [False, True, False]
    }  # fmt: skip
    # Completion 1 has a number in place of a verdict, 2 a reward that does not apply.
    assert scores.unknown(rewards).tolist() == [True, False, False]
    np.testing.assert_array_equal(scores.total(rewards), [np.nan, 1, 0])
    with pytest.raises(RewardError, match="returned None for completion 2"):
        score(rewards[:1], **ARGUMENTS)
    only = [Reward(name="only", function=judged([None, 1.0, 2.0], [True, False, False]))]
    np.testing.assert_array_equal(score(only, **ARGUMENTS).total(only), [np.nan, 1, 2])


def test_failures_are_in_the_record_and_times_are_not():
    rewards = [Reward(name="a", function=lambda **_: Judged([1.0, None, 0.0], failed=[0, 1, 0], seconds=[1, 2, 3])),
               Reward(name="b", function=lambda **_: [0.0, 0.0, 0.0])]  # fmt: skip
    scores = score(rewards, **ARGUMENTS)
    assert scores.record() == {"scores": {"a": [1, None, 0], "b": [0, 0, 0]}, "failed": {"a": [1]}}
    again = Scores.of_record(json.loads(json.dumps(scores.record())))
    assert again.record() == scores.record()
    assert again.of_failed("a").tolist() == [False, True, False]
    assert not again.of_failed("b").any()
    assert not again.seconds
    np.testing.assert_array_equal(again.total(rewards), scores.total(rewards))
    assert scores.seconds["a"].tolist() == [1, 2, 3]


def test_what_does_not_say_how_long_an_item_took_took_its_whole_call():
    async def later(**_):
        await asyncio.sleep(0.05)
        return [1.0] * 3

    def slow(**_):
        time.sleep(0.05)
        return [1.0] * 3

    scores = score([Reward(name="later", function=later), Reward(name="slow", function=slow)], **ARGUMENTS)
    for name in ("later", "slow"):
        first, *others = scores.seconds[name].tolist()
        assert first >= 0.05
        assert others == [first, first]


def test_joined_scores_are_those_of_all_completions():
    parts = [Scores.of({"a": [1.0, None], "b": [[(0, 1.0)], 2.0]}), Scores.of({"a": [-0.0], "b": [3.0]})]
    parts[1] = dataclasses.replace(parts[1], failed={"a": np.array([True])}, seconds={"a": np.array([9.0])})
    both = Scores.join(parts)
    assert both.items() == {"a": [1.0, None, -0.0], "b": [[(0, 1.0)], 2.0, 3.0]}
    assert both.of_failed("a").tolist() == [False, False, True]
    assert both.of_failed("b").tolist() == [False] * 3
    assert both.seconds == {}  # of a part nobody knows
    timed = [
        dataclasses.replace(part, seconds={"a": np.full(len(part.by_name["a"]), i)}) for i, part in enumerate(parts)
    ]
    assert Scores.join(timed).seconds["a"].tolist() == [0, 0, 1]
    assert Scores.join(parts[:1]) is parts[0]


def test_judged_has_one_of_everything():
    with pytest.raises(ValueError, match="2 items, 1 failed and 2 seconds: one each"):
        Judged([1.0, 2.0], failed=[False], seconds=[0.0, 0.0])

import asyncio

import numpy as np
import pytest

from grpo_jax.rewards import Reward, RewardError, score
from grpo_jax.rewards.concurrent import bounded


def scored(function, completions, **columns):
    n = len(completions)
    return score([Reward(name="asked", function=function)], prompts=["p"] * n, completions=completions,
                 completion_ids=[[1]] * n, columns=columns)  # fmt: skip


@pytest.mark.parametrize("concurrency", [1, 3, 100])
def test_at_most_so_many_at_once_and_all_of_them(concurrency):
    running, most = 0, 0

    async def judge(*, prompt, completion, completion_ids, answer):
        nonlocal running, most
        assert (prompt, completion_ids) == ("p", [1])
        running += 1
        most = max(most, running)
        for _ in range(5):
            await asyncio.sleep(0)
        running -= 1
        return None if answer is None else float(completion == answer)

    texts = [str(i) for i in range(20)]
    gold = [None if i % 5 == 4 else "7" for i in range(20)]
    alone = Reward(name="one", function=lambda completions, **_: [1.0] * len(completions))
    scores = score([Reward(name="asked", function=bounded(judge, concurrency)), alone], prompts=["p"] * 20,
                   completions=texts, completion_ids=[[1]] * 20, columns={"answer": gold})  # fmt: skip
    expected = [np.nan if i % 5 == 4 else float(i == 7) for i in range(20)]
    np.testing.assert_array_equal(scores.by_name["asked"], expected)
    assert most == min(concurrency, 20)


def test_seconds_are_of_the_call_and_not_of_the_wait_for_its_turn():
    turn = iter(range(4))

    async def judge(**_):
        await asyncio.sleep(0.2 if next(turn) == 0 else 0)
        return 1.0

    judged = asyncio.run(bounded(judge, 1)(["p"] * 4, list("abcd"), [[1]] * 4))
    assert judged == [1.0] * 4
    assert judged.failed == [False] * 4
    assert judged.seconds[0] >= 0.2
    assert min(judged.seconds) < 0.2


def test_the_first_that_raises_ends_the_others():
    ended, begun = [], []

    async def judge(*, completion, **_):
        begun.append(completion)
        if completion == "bad":
            raise OSError("no judge there")
        try:
            await asyncio.sleep(1000)
        finally:
            ended.append(completion)

    with pytest.raises(RewardError, match="'asked' raised OSError: no judge there"):
        scored(bounded(judge, 3), ["a", "bad", "b", "c", "d"])
    assert sorted(ended) == sorted(set(begun) - {"bad"})  # none goes on behind the step's back
    assert "a" in ended


def test_bad_values_are_named():
    async def judge(**_):
        return 1.0

    with pytest.raises(ValueError, match="concurrency=0 must be 1 or more"):
        bounded(judge, 0)
    with pytest.raises(RewardError, match="'prompt' has the name of an argument of functions of an item"):
        scored(bounded(judge, 1), ["a"], prompt=["x"])

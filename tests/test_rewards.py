import math

import numpy as np
import pytest

from grpo_jax.rewards import Reward, RewardError, score

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

    scores, rewards = run(length, lambda p, c, i, answer: [None, 10.0 * answer[1], np.float32(0.5)])
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
        (lambda prompts, completions, completion_ids: [0.0] * 3, "'r0' raised TypeError.*answer"),
    ],
)
def test_what_a_reward_function_does_wrong_is_said_at_once(function, message):
    with pytest.raises(RewardError, match=message):
        run(function)


def test_names_must_differ():
    reward = Reward(name="r", function=lambda *_, **__: [1.0] * 3)
    with pytest.raises(RewardError, match="same name"):
        score([reward, reward], **ARGUMENTS)

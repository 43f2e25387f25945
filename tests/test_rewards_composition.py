import dataclasses
import inspect
import math

import numpy as np
import pytest

from grpo_jax.outcomes import AdvantageConfig
from grpo_jax.rewards import Judged, Reward, RewardError, score
from grpo_jax.rewards.composition import gated
from tests import oracle

G = 4
ARGUMENTS = {
    "prompts": ["p"] * G + ["q"] * G,
    "completions": ["a", "bb", "ccc", "dddd", "e", "ff", "ggg", "hhhh"],
    "completion_ids": [[1] * n for n in (1, 2, 3, 4)] * 2,
    "columns": {"gold": list(range(8))},
}
RIGHT = [1.0, 0.0, 1.0, None, 0.0, 0.0, 0.5, 0.0]
ACCURACY = Reward(name="accuracy", function=lambda **_: RIGHT)
ANY = Reward(name="any", function=lambda completions, **_: [0.0] * len(completions), weight=0.0)  # always applies


def brevity(completions, **columns):
    return [-float(len(text)) for text in completions]


def run(*rewards):
    return score([*rewards, ACCURACY, ANY], **ARGUMENTS)


def test_correctness_gates_length():
    """Only those that are right are looked at, with their columns; for the others it does not apply."""
    seen = {}

    def watched(prompts, completions, completion_ids, gold):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, gold=gold)
        return brevity(completions)

    scores = run(gated(Reward(name="brevity", function=watched), by="accuracy"))
    assert seen == {"prompts": ["p", "p"], "completions": ["a", "ccc"], "ids": [[1], [1, 1, 1]], "gold": [0, 2]}
    none = math.nan
    np.testing.assert_array_equal(scores.by_name["brevity"], [-1, none, -3, none, none, none, none, none])
    scores = run(gated(Reward(name="brevity", function=brevity), by="accuracy", above=0.25, otherwise=-9.0))
    np.testing.assert_array_equal(scores.by_name["brevity"], [-1, -9, -3, -9, -9, -9, -3, -9])


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("later", [False, True])
def test_where_the_gate_failed_nobody_knows_what_is_gated(weight, later):
    """`otherwise` is said of those that do not pass; and a number counts that a judge gave in place of a verdict."""
    failed = [False, True, False, True, True, False, False, False]
    verdicts = Judged([1.0, None, 0.0, 0.0, 1.0, None, 1.0, 0.0], failed=failed, seconds=[0.5] * 8)
    gate = Reward(name="gate", function=lambda **_: verdicts, weight=weight)

    async def brevity_later(completions, **columns):
        return brevity(completions)

    reward = gated(Reward(name="r", function=brevity_later if later else brevity), by="gate", otherwise=-9.0)
    scores = run(reward, gate)
    np.testing.assert_array_equal(scores.by_name["r"], [-1, math.nan, -9, -9, -1, -9, -3, -9])
    assert np.flatnonzero(scores.failed["r"]).tolist() == [1]
    assert np.flatnonzero(np.isnan(scores.total([reward, gate, ANY]))).tolist() == [1]
    assert np.flatnonzero(~np.isnan(scores.seconds["r"])).tolist() == [0, 4, 6]
    own = gated(dataclasses.replace(ACCURACY, name="own", function=lambda scores, **_: [
        float(no) for no in scores["gate"].failed
    ], after=("gate",)), by="gate")  # fmt: skip
    np.testing.assert_array_equal(run(own, gate).by_name["own"][[0, 4, 6]], [0, 1, 0])


def test_where_none_passes_nothing_is_asked():
    def never(**_):
        raise AssertionError

    scores = run(gated(Reward(name="r", function=never), by="accuracy", above=1.0))
    assert np.isnan(scores.by_name["r"]).all()


def test_what_is_gated_stays_what_it_was():
    """Its weight and clip, its own dependences, asynchronous or not, judged or not, its steps."""

    async def own(scores, completions, **_):
        assert list(scores) == ["accuracy"]  # which it names itself, and not the gate
        assert len(scores["accuracy"]) == len(completions)
        items = [[(0, 1.0)] for _ in completions]
        return Judged(items, failed=[True] * len(items), seconds=[2.0] * len(items))

    reward = Reward(name="r", function=own, weight=0.5, high=0.25, after=("accuracy",))
    twice = gated(reward, by="long")
    assert (twice.name, twice.weight, twice.high, twice.after) == ("r", 0.5, 0.25, ("accuracy", "long"))
    long = Reward(name="long", function=lambda completions, **_: [float(len(c) > 3) for c in completions], weight=0.0)
    scores = run(twice, long)
    assert scores.steps["r"] == [[(0, 1.0)] if i % G == 3 else None for i in range(8)]
    assert scores.failed["r"].tolist() == [i % G == 3 for i in range(8)]
    np.testing.assert_array_equal(scores.seconds["r"], [2.0 if i % G == 3 else math.nan for i in range(8)])
    both = gated(gated(Reward(name="b", function=brevity), by="long"), by="accuracy", above=-1)
    np.testing.assert_array_equal(np.isnan(run(both, long).by_name["b"]), [i != 7 for i in range(8)])  # 3 is None


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda **_: [1.0], r"'r' raised RewardError: \[1.0\] is not one item for each of the 2 completions that pass"),
        (lambda **_: 7.0, "7.0 is not one item"),
        (lambda **_: [1.0, math.nan], "'r' returned nan for completion 2, 'ccc'"),
        (lambda **_: 1 / 0, "'r' raised ZeroDivisionError"),
        (lambda prompts, completions, completion_ids: [1.0, 1.0], "'r' does not take 'gold': end its parameters"),
        (lambda missing, **_: [1.0, 1.0], "'r' needs the column 'missing'"),
    ],
)
def test_what_a_gated_function_does_wrong_is_said_of_it(function, message):
    with pytest.raises(RewardError, match=message):
        run(gated(Reward(name="r", function=function), by="accuracy"))


def test_a_gate_that_there_is_not():
    with pytest.raises(RewardError, match="'r' depends on 'acuracy', and the rewards are r, accuracy, any"):
        run(gated(Reward(name="r", function=brevity), by="acuracy"))


def test_a_signature_without_one():
    gate = gated(Reward(name="r", function=max), by="accuracy")  # C has no signature to show
    assert "scores" in inspect.signature(gate.function).parameters


def test_with_normalization_only_those_that_pass_are_compared():
    """Clipped, then standardized among those to which it applies, then weighted."""
    reward = gated(Reward(name="brevity", function=brevity, weight=0.5, low=-2.0), by="accuracy", above=0.25)
    rewards = [reward, ACCURACY]
    scores = run(reward)
    clipped = scores.clipped(rewards)
    np.testing.assert_array_equal(clipped.by_name["brevity"][[0, 2, 6]], [-1, -2, -2])
    each = np.stack([clipped.by_name[r.name].reshape(2, G) for r in rewards])
    weights, all_count = np.array([0.5, 1.0]), np.ones((2, G), bool)
    got = AdvantageConfig(normalize_each=True).combine(each, weights, all_count)
    of_pair = oracle.group_advantages([[-1, -2]])[0]  # of the group of p; in that of q one passes alone
    of_right = oracle.group_advantages([[1, 0, 1]])[0]  # of the fourth nobody knows
    expected = [0.5 * of_pair[0] + of_right[0], of_right[1], 0.5 * of_pair[1] + of_right[2]]
    np.testing.assert_allclose(got[0, :3], expected, atol=1e-3)
    assert np.isnan(got[0, 3])  # nothing applies there
    np.testing.assert_allclose(got[1], oracle.group_advantages([[0, 0, 0.5, 0]])[0], atol=1e-3)

"""From what completions were worth to their advantages."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from grpo_jax.outcomes import (
    AdvantageConfig,
    Outcome,
    leave_one_out_gae,
    outcome_supervision,
    process_supervision,
    whitened_gae,
    without_signal,
)
from tests import oracle

P, G, T = 2, 3, 4
MASK = np.arange(T) < np.array([4, 1, 2, 3, 3, 2])[:, None]
ALL = np.ones((P, G), bool)


def at_the_end(rewards, mask):
    """[B, T]: each reward at its completion's last token, NaN elsewhere."""
    tokens = np.full(mask.shape, np.nan, np.float32)
    tokens[np.arange(len(mask)), mask.sum(axis=1) - 1] = rewards.reshape(-1)
    return tokens


@given(rewards=hnp.arrays(np.float32, (P, G), elements=st.sampled_from([0.0, 0.1, 1.0]) | st.floats(-9, 9, width=32)),
       counted=hnp.arrays(np.bool_, (P, G)), ddof=st.sampled_from([0, 1]))  # fmt: skip
def test_process_supervision_of_plain_rewards_is_outcome_supervision(rewards, counted, ddof):
    worth = Outcome(rewards=rewards, counted=counted, mask=MASK, step_rewards=at_the_end(rewards, MASK))
    options = {"ddof": ddof, "epsilon": 0.01}
    tokens, completions = (estimate(worth, **options) for estimate in (process_supervision, outcome_supervision))
    np.testing.assert_allclose(tokens, np.where(MASK, np.asarray(completions)[:, None], 0), rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(without_signal(worth), np.asarray(tokens).reshape(P, -1).any(axis=1) == 0)


def test_groups_without_signal():
    rewards, step_rewards = np.array([[1, 1, 2], [1, 1, 1]], np.float32), np.full((P * G, T), np.nan, np.float32)
    worth = Outcome(rewards=rewards, counted=ALL, mask=MASK)
    np.testing.assert_array_equal(without_signal(worth), [False, True])
    truncated = Outcome(rewards=rewards, counted=np.array([[1, 1, 0], [1, 1, 1]], bool), mask=MASK)
    np.testing.assert_array_equal(without_signal(truncated), [True, True])
    step_rewards[[0, 0, 1, 2, 3, 3, 4, 5], [0, 3, 0, 1, 0, 1, 0, 0]] = [1, 1, 1, 1, 0.5, 0.5, 1, 1]
    # Steps that are all alike, although there are more of them in one completion; and the other way around.
    worth = Outcome(rewards=rewards, counted=ALL, mask=MASK, step_rewards=step_rewards)
    np.testing.assert_array_equal(without_signal(worth), [True, False])


# Several rewards --------------------------------------------------------------------------------------------------


def test_rewards_are_summed_by_weight_as_they_are():
    rewards = np.array([[[1.0, np.nan, np.nan]], [[2.0, 4.0, np.nan]]])
    got = AdvantageConfig().combine(rewards, np.array([1.0, 0.5]), np.ones((1, 3), bool))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, [[2, 2, np.nan]])


@given(rewards=hnp.arrays(np.float32, (2, P, G), elements=st.just(np.nan) | st.integers(-3, 3).map(float)),
       counted=hnp.arrays(np.bool_, (P, G)), ddof=st.sampled_from([0, 1]))  # fmt: skip
def test_each_reward_is_normalized_among_those_that_count(rewards, counted, ddof):
    """GDPO (arXiv 2601.05242)."""
    weights = np.array([1.0, -0.5])
    config = AdvantageConfig(normalize_each=True, ddof=ddof, epsilon=0.01)
    each = [oracle.group_advantages(r, ddof, 0.01, counted=counted & ~np.isnan(r)) for r in rewards]
    expected = weights[0] * each[0] + weights[1] * each[1]
    expected[np.isnan(rewards).all(axis=0)] = np.nan
    np.testing.assert_allclose(config.combine(rewards, weights, counted), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"smoothing": 1.5}, "smoothing=1.5"),
        ({"discount": -0.5}, "discount=-0.5"),
        ({"ddof": 2}, "ddof=2 must be 0 or 1"),
        ({"epsilon": -1.0}, "epsilon=-1.0"),
        ({"baseline": "median"}, "baseline='median' must be one of group, leave_one_out, batch, none"),
    ],
)
def test_bad_configuration(changes, message):
    with pytest.raises(ValueError, match=message):
        AdvantageConfig(**changes)


# Generalized advantages without a critic --------------------------------------------------------------------------


def test_without_penalties_they_fade_from_the_end():
    """lambda^(|o| - 1 - t) (r - mean of the others)."""
    rewards = np.array([[1, 0, 3], [2, 2, 2]], np.float32)
    got = leave_one_out_gae(Outcome(rewards=rewards, counted=ALL, mask=MASK), smoothing=0.5, discount=1.0)
    # 1 - 3/2, 0 - 4/2, 3 - 1/2.
    np.testing.assert_allclose(got[:3], [[-1 / 16, -1 / 8, -1 / 4, -1 / 2], [-2, 0, 0, 0], [1.25, 2.5, 0, 0]])
    np.testing.assert_array_equal(got[3:], 0)


# A policy over all completions of one or two tokens, of which 0 ends them: its logits after each prefix, and all
# that depends on them, can be listed.
LOGITS = {(): np.array([0.3, -0.5, 1.1]), (1,): np.array([0.0, 1.0, -1.0]), (2,): np.array([0.5, -0.3, 0.2])}
COMPLETIONS = [(0,), *itertools.product((1, 2), (0, 1, 2))]
REWARDS = np.array([0.0, 1.0, 5.0, 0.5, -2.0, 3.0, 1.0])
PI = {prefix: oracle.softmax(logits) for prefix, logits in LOGITS.items()}
PROBABILITIES = np.array([np.prod([PI[o[:t]][o[t]] for t in range(len(o))]) for o in COMPLETIONS])


def score(completion, t):
    """grad log pi of a token, with respect to the logits after all prefixes, [9]."""
    prefixes = list(LOGITS)
    gradient = np.zeros((3, 3))
    gradient[prefixes.index(completion[:t])] = np.eye(3)[completion[t]] - PI[completion[:t]]
    return gradient.reshape(-1)


SCORES = np.array([[score(o, t) if t < len(o) else np.zeros(9) for t in range(2)] for o in COMPLETIONS])  # [7, 2, 9]


def expected_gradients(estimate, size, penalties=None):
    """E[sum_i sum_t A_it grad log pi(o_it)] / G over all groups, and grad E[r - penalties]."""
    groups = np.array(list(itertools.product(range(len(COMPLETIONS)), repeat=size)))
    mask = np.array([[True, len(o) == 2] for o in COMPLETIONS])
    taken = np.zeros((len(COMPLETIONS), 2), np.float32) if penalties is None else penalties

    def one(group):
        worth = Outcome(rewards=REWARDS.astype(np.float32)[group][None], counted=np.ones((1, size), bool),
                        mask=mask[group], penalties=taken[group])  # fmt: skip
        return worth

    stacked = jax.tree.map(lambda *x: np.stack(x), *map(one, groups))
    advantages = np.asarray(jax.jit(jax.vmap(estimate))(stacked), np.float64)  # [n, G, 2]
    gradient = np.einsum("n,nit,nito->o", PROBABILITIES[groups].prod(axis=1), advantages, SCORES[groups]) / size
    return gradient, np.einsum("n,nto->o", PROBABILITIES * (REWARDS - (taken * mask).sum(axis=1)), SCORES)


REFERENCE = {prefix: oracle.softmax(np.array([0.2, 0.4, -0.1])) for prefix in LOGITS}
# k1 of each token, whose own gradient has no expectation: what is left is the gradient of E[r] - KL.
K1 = np.array(
    [[np.log(PI[o[:t]][o[t]] / REFERENCE[o[:t]][o[t]]) if t < len(o) else 0 for t in range(2)] for o in COMPLETIONS],
    np.float32,
)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("penalties", [None, K1])
def test_without_smoothing_the_expected_gradient_is_the_policy_gradient(size, penalties):
    estimate = lambda worth: leave_one_out_gae(worth, smoothing=1.0, discount=1.0)
    got, true = expected_gradients(estimate, size, penalties)
    np.testing.assert_allclose(got, true, atol=1e-5)
    assert np.abs(true).max() > 0.1


@pytest.mark.parametrize(
    "estimate",
    [
        lambda worth: leave_one_out_gae(worth, smoothing=0.5, discount=1.0),
        lambda worth: whitened_gae(worth, ddof=1, epsilon=0.0, smoothing=1.0, discount=1.0),
    ],
    ids=["smoothing", "whitening"],
)
def test_smoothing_and_whitening_turn_it(estimate):
    """Early tokens count less; and a batch is divided by its own spread, shifted by the mean over its tokens."""
    got, true = expected_gradients(estimate, 3)
    assert got @ true / np.linalg.norm(got) / np.linalg.norm(true) < 0.99

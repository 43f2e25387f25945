import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from grpo_jax.advantages import (
    BASELINES,
    SCALES,
    combine_rewards,
    constant_groups,
    gae,
    group_advantages,
    process_advantages,
    whiten,
)
from grpo_jax.losses import grpo_loss
from grpo_jax.rewards import Reward, Scores
from tests import oracle

advantages_of = jax.jit(group_advantages, static_argnames=("ddof", "epsilon"))
groups = st.sampled_from([(1, 2), (3, 5), (2, 8)]).flatmap(
    lambda shape: st.lists(
        st.lists(st.floats(-10, 10, width=32), min_size=shape[1], max_size=shape[1]),
        min_size=shape[0],
        max_size=shape[0],
    )
)


@pytest.mark.parametrize(
    ("rewards", "ddof", "epsilon", "expected"),
    [
        # mean 1/2; squared deviations sum to 1: sample deviation sqrt(1/3), population deviation 1/2.
        ([1, 0, 0, 1], 1, 0.0, [0.8660254, -0.8660254, -0.8660254, 0.8660254]),
        ([1, 0, 0, 1], 0, 0.0, [1, -1, -1, 1]),
        ([1, 0, 0, 1], 0, 0.5, [0.5, -0.5, -0.5, 0.5]),
        ([0, 0, 3], 1, 0.0, [-0.5773503, -0.5773503, 1.1547005]),  # mean 1, deviation sqrt(3)
        ([2, 4], 1, 0.0, [-0.7071068, 0.7071068]),
    ],
)
def test_by_hand(rewards, ddof, epsilon, expected):
    got = group_advantages(jnp.array([rewards]), ddof=ddof, epsilon=epsilon)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, [expected], atol=1e-6)


def test_defaults_are_the_sample_deviation_and_1e_4():
    np.testing.assert_allclose(group_advantages(jnp.array([[0.0, 1.0]])), [[-0.7070068, 0.7070068]], rtol=1e-6)


@given(rewards=groups, ddof=st.sampled_from([0, 1]), epsilon=st.sampled_from([1e-4, 0.1]))
def test_oracle(rewards, ddof, epsilon):
    rewards = np.array(rewards, np.float32)
    got = advantages_of(rewards, ddof=ddof, epsilon=epsilon)
    # A mean rounds at 1e-6 of the largest reward, which a small deviation magnifies.
    scale = 1e-6 * np.abs(rewards).max(1, keepdims=True) / (rewards.std(1, keepdims=True) + epsilon)
    assert (np.abs(got - oracle.group_advantages(rewards, ddof, epsilon)) <= 1e-5 + 4 * scale).all()


@pytest.mark.parametrize("size", [2, 3, 7, 16, 64])
@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, -0.7, 1 / 3, 1e-30, 123456.7, 1e8, -1e30, 3e38])
@pytest.mark.parametrize("ddof", [0, 1])
def test_constant_groups_are_exactly_zero(value, size, ddof):
    rewards = jnp.full((1, size), value)
    assert constant_groups(rewards).all()
    assert (advantages_of(rewards, ddof=ddof, epsilon=1e-8) == 0).all()


def test_a_constant_group_does_not_touch_its_neighbours():
    rewards = jnp.array([[0.1, 0.1, 0.1], [0.0, 0.0, 3.0]])
    np.testing.assert_array_equal(constant_groups(rewards), [True, False])
    np.testing.assert_array_equal(group_advantages(rewards)[1:], group_advantages(rewards[1:]))


def test_inside_a_gradient():
    """Advantages computed inside a differentiated function are constants, and a std of 0 does no harm."""
    rewards, mask = jnp.array([[1.0, 0.0], [0.3, 0.3]]), jnp.ones((4, 3), bool)

    def loss(logprobs):
        return grpo_loss(logprobs, group_advantages(rewards).reshape(-1), mask, kl_coef=0.0)[0]

    gradient = jax.grad(loss)(-jnp.ones((4, 3)))
    assert (gradient[0] < 0).all()
    assert (gradient[1] > 0).all()
    assert (gradient[2:] == 0).all()


@pytest.mark.parametrize(("shape", "options", "match"), [((3, 1), {}, "group size 1"), ((3, 2), {"ddof": 2}, "ddof=2")])
def test_errors(shape, options, match):
    with pytest.raises(ValueError, match=match):
        group_advantages(jnp.zeros(shape), **options)


# Baselines and scales --------------------------------------------------------------------------------------------


ESTIMATORS = [(baseline, scale) for baseline in BASELINES for scale in SCALES]


@functools.partial(jax.jit, static_argnames=("baseline", "scale", "ddof"))
def estimated(rewards, *, baseline="group", scale="group", **options):
    return group_advantages(rewards, baseline=BASELINES[baseline], scale=SCALES[scale], **options)


@pytest.mark.parametrize(
    ("baseline", "scale", "expected"),
    [
        # Means 2 and 6, batch 4; deviations sqrt(8) within both groups.
        ("group", "none", [[-2, 2], [-2, 2]]),
        ("leave_one_out", "none", [[-4, 4], [-4, 4]]),
        ("batch", "none", [[-4, 0], [0, 4]]),
        ("none", "none", [[0, 4], [4, 8]]),
        ("none", "group", [[0, 2**0.5], [2**0.5, 8**0.5]]),
        # Squared deviations of -2 2 -2 2 sum to 16, of -4 0 0 4 and of 0 4 4 8 to 32: sqrt(16 / 3), sqrt(32 / 3).
        ("group", "batch", [[-(0.75**0.5), 0.75**0.5], [-(0.75**0.5), 0.75**0.5]]),
        ("leave_one_out", "batch", [[-(0.75**0.5), 0.75**0.5], [-(0.75**0.5), 0.75**0.5]]),
        ("batch", "batch", [[-(1.5**0.5), 0], [0, 1.5**0.5]]),
        ("none", "batch", [[0, 1.5**0.5], [1.5**0.5, 6**0.5]]),
    ],
)
def test_estimators_by_hand(baseline, scale, expected):
    got = estimated(jnp.array([[0, 4], [4, 8]]), baseline=baseline, scale=scale, epsilon=0.0)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_epsilon_does_not_count_without_a_scale():
    rewards = jnp.array([[0.0, 4.0]])
    np.testing.assert_array_equal(estimated(rewards, scale="none", epsilon=0.5), [[-2, 2]])
    np.testing.assert_allclose(estimated(rewards, scale="batch", ddof=0, epsilon=0.5), [[-0.8, 0.8]])


@pytest.mark.parametrize(
    ("baseline", "scale", "expected"),
    [
        # 0 and 2 count: mean 1, deviation sqrt(2). The completion with 4 is measured by them, that with NaN is not.
        ("group", "none", [-1, 1, 3, 0]),
        ("group", "group", [-(0.5**0.5), 0.5**0.5, 4.5**0.5, 0]),
        ("leave_one_out", "none", [-2, 2, 3, 0]),
        ("batch", "none", [-1, 1, 3, 0]),
        ("batch", "batch", [-(0.5**0.5), 0.5**0.5, 4.5**0.5, 0]),
        ("none", "none", [0, 2, 4, 0]),
    ],
)
def test_counted_by_hand(baseline, scale, expected):
    rewards, counted = jnp.array([[0, 2, 4, jnp.nan]]), jnp.array([[True, True, False, False]])
    got = estimated(rewards, baseline=baseline, scale=scale, epsilon=0.0, counted=counted)
    np.testing.assert_allclose(got, [expected], atol=1e-6)


counts = st.sampled_from([(1, 2), (3, 5)]).flatmap(
    lambda shape: st.tuples(
        # Few values, so that groups are constant often, or any.
        hnp.arrays(np.float32, shape, elements=st.sampled_from([0.0, 0.1, 1.0]) | st.floats(-10, 10, width=32)),
        hnp.arrays(np.bool_, shape),
        hnp.arrays(np.bool_, shape),
    )
)


@pytest.mark.parametrize(("baseline", "scale"), ESTIMATORS)
@given(batch=counts, ddof=st.sampled_from([0, 1]), epsilon=st.sampled_from([1e-4, 0.1]))
def test_estimators_oracle(baseline, scale, batch, ddof, epsilon):
    rewards, counted, scored = batch
    rewards = np.where(counted | scored, rewards, np.nan).astype(np.float32)
    got = np.asarray(
        estimated(rewards, baseline=baseline, scale=scale, ddof=ddof, epsilon=epsilon, counted=jnp.asarray(counted))
    )
    expected = oracle.group_advantages(rewards, ddof, epsilon, baseline, scale, counted)
    # Means and deviations round at 1e-6 of the largest reward, which a small divisor magnifies.
    unscaled = np.abs(oracle.group_advantages(rewards, ddof, epsilon, baseline, "none", counted))
    divisor = np.divide(unscaled, np.abs(expected), out=np.ones(rewards.shape), where=(expected != 0) & (unscaled != 0))
    rounding = 4e-6 * np.nanmax(np.abs(rewards), initial=0) / divisor
    assert np.isfinite(got).all()
    assert (np.abs(got - expected) <= 1e-5 + rounding * (1 + np.abs(expected))).all()
    if baseline in ("group", "leave_one_out"):
        assert (got[np.asarray(constant_groups(jnp.asarray(rewards), jnp.asarray(counted)))] == 0).all()
    assert (got[np.isnan(rewards)] == 0).all()


@pytest.mark.parametrize(("baseline", "scale"), ESTIMATORS)
def test_all_count_unless_said_otherwise(baseline, scale):
    rewards = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    got = estimated(rewards, baseline=baseline, scale=scale, counted=np.ones(rewards.shape, bool))
    np.testing.assert_allclose(got, estimated(rewards, baseline=baseline, scale=scale), rtol=1e-5)


@given(rewards=groups)
def test_leave_one_out_is_the_group_mean_without_its_own_share(rewards):
    """r - mean of the others = G/(G - 1) (r - mean of all)."""
    rewards = np.array(rewards, np.float32)
    size = rewards.shape[1]
    left_out = estimated(rewards, baseline="leave_one_out", scale="none")
    np.testing.assert_allclose(left_out * (size - 1) / size, estimated(rewards, scale="none"), atol=1e-5)


@pytest.mark.parametrize("epsilon", [0.0, 1e-8])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
@pytest.mark.parametrize("value", [0.1, 1 / 3, -1e30, 3e38])
def test_groups_whose_counted_rewards_are_equal_are_exactly_zero(value, baseline, scale, epsilon):
    """Also those that do not count: a truncated 0 among ones would get -1 / epsilon."""
    rewards = jnp.array([[value] * 7 + [0.0, jnp.nan], [0.0, 1.0] + [0.5] * 7])
    counted = jnp.array([[True] * 7 + [False] * 2, [True] * 2 + [False] * 7])
    np.testing.assert_array_equal(constant_groups(rewards, counted), [True, False])
    got = estimated(rewards, baseline=baseline, scale=scale, epsilon=epsilon, counted=counted)
    assert (got[0] == 0).all()
    assert got[1, 0] < 0 < got[1, 1]
    assert jnp.isfinite(got).all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
def test_groups_of_which_fewer_than_two_count_are_exactly_zero(baseline, scale):
    rewards = jnp.array([[5.0, 1.0, 7.0], [5.0, 1.0, jnp.nan], [0.0, 1.0, 5.0]])
    counted = jnp.array([[True, False, False], [False] * 3, [True] * 3])
    got = estimated(rewards, baseline=baseline, scale=scale, counted=counted)
    assert (got[:2] == 0).all()
    assert (got[2] != 0).any()


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_scale_without_spread_gives_zero(baseline):
    """Not reward / epsilon."""
    rewards = jnp.array([[0.1, 0.1, 0.1], [0.1, 0.1, 0.1]])
    for scale in ("group", "batch"):
        assert (estimated(rewards, baseline=baseline, scale=scale, epsilon=0.0) == 0).all()
    mixed = estimated(jnp.array([[0.3, 0.3, 0.3], [0.0, 0.0, 3.0]]), baseline=baseline)
    assert (mixed[0] == 0).all()
    assert (mixed[1] != 0).any()


def test_a_constant_group_carries_signal_against_the_batch():
    np.testing.assert_allclose(estimated(jnp.array([[1.0, 1.0], [0.0, 0.0]]), baseline="batch", scale="none"),
                               [[0.5, 0.5], [-0.5, -0.5]])  # fmt: skip


def test_a_nan_that_counts_is_seen():
    rewards = jnp.array([[0.0, 1.0], [jnp.nan, 1.0]])
    for baseline in ("group", "leave_one_out"):
        got = estimated(rewards, baseline=baseline)
        assert jnp.isfinite(got[0]).all()
        assert jnp.isnan(got[1, 0])
    assert jnp.isnan(estimated(rewards, baseline="batch", scale="none")).all()


def test_any_function_will_do():
    got = group_advantages(
        jnp.array([[0.0, 1.0, 5.0]]),
        baseline=lambda rewards, counted: jnp.median(rewards, axis=1, keepdims=True),
        scale=lambda rewards, centered, counted, *, ddof, epsilon: jnp.abs(centered).max(axis=1, keepdims=True),
    )
    np.testing.assert_allclose(got, [[-0.25, 0, 1]])


# What the baselines do to the gradient: a policy over few outcomes, whose every batch can be listed --------------


LOGITS = np.array([0.3, -0.5, 1.1])


def expected_gradients(rewards, prompts, size, logits=LOGITS, **options):
    """E[sum_i A_i grad log pi(o_i)] / (P G) over all batches, and grad E[r], with respect to the logits."""
    pi = oracle.softmax(logits)
    batches = np.array(list(itertools.product(range(len(pi)), repeat=prompts * size)))
    probabilities = pi[batches].prod(axis=1)
    one = lambda batch: estimated(batch, **options)
    advantages = jax.vmap(one)(np.asarray(rewards, np.float32)[batches].reshape(-1, prompts, size))
    advantages = np.asarray(advantages, np.float64).reshape(batches.shape)
    scores = np.eye(len(pi))[batches] - pi
    gradient = np.einsum("n,ni,nio->o", probabilities, advantages, scores) / batches.shape[1]
    return gradient, pi * (rewards - pi @ rewards)


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.mark.parametrize(("prompts", "size"), [(1, 2), (1, 3), (2, 2)])
@pytest.mark.parametrize(
    ("baseline", "factor"),
    [
        ("none", lambda prompts, size: 1),
        ("leave_one_out", lambda prompts, size: 1),
        ("group", lambda prompts, size: (size - 1) / size),
        ("batch", lambda prompts, size: (prompts * size - 1) / (prompts * size)),
    ],
)
def test_expected_gradient_without_scale(baseline, factor, prompts, size):
    got, true = expected_gradients(np.array([0.0, 1.0, 5.0]), prompts, size, baseline=baseline, scale="none")
    np.testing.assert_allclose(got, factor(prompts, size) * true, atol=1e-5)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
def test_the_scale_of_the_group_turns_the_expected_gradient(baseline, size):
    """Where a large reward is rare, by most of a right angle: groups that hold it are divided by its size."""
    rewards, logits = np.array([0.0, 1.0, 20.0]), np.array([0.0, 1.0, -2.0])
    got, true = expected_gradients(rewards, 1, size, logits=logits, baseline=baseline)
    assert cosine(got, true) < 0.5
    straight, _ = expected_gradients(rewards, 1, size, logits=logits, baseline=baseline, scale="none")
    assert cosine(straight, true) > 1 - 1e-9


def test_the_scale_of_the_group_favors_prompts_that_are_nearly_solved_or_hopeless():
    """With rewards of 0 and 1 the direction stays, and the length depends on the difficulty (Dr. GRPO)."""
    factors = []
    for logit in (0.0, 4.0):  # solved half of the time, and nearly always
        got, true = expected_gradients(np.array([0.0, 1.0]), 1, 6, logits=np.array([0.0, logit]))
        assert cosine(got, true) > 1 - 1e-6
        factors.append(np.linalg.norm(got) / np.linalg.norm(true))
    assert factors[1] > 1.2 * factors[0]


# Several rewards -------------------------------------------------------------------------------------------------


def test_combine_by_hand():
    rewards = jnp.array([[[1.0, jnp.nan], [0.0, 1.0]], [[2.0, 3.0], [jnp.nan, 4.0]]])
    got = combine_rewards(rewards, jnp.array([1.0, 0.5]))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, [[2, 1.5], [0, 3]])


def test_normalized_rewards_do_not_collapse():
    """GDPO's example: (0, 1) and (0, 2) sum to groups that GRPO cannot tell apart."""
    rewards, weights = jnp.array([[[0.0, 1.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 1.0]]]), jnp.ones(2)
    summed = group_advantages(combine_rewards(rewards, weights))
    np.testing.assert_allclose(summed[0], summed[1], atol=1e-4)
    each = combine_rewards(rewards, weights, each=group_advantages)
    np.testing.assert_allclose(2 * each[0], each[1], rtol=1e-6)


def test_each_reward_is_normalized_where_it_applies():
    rewards = jnp.array([[[0.0, 2.0, jnp.nan]], [[0.0, 100.0, 50.0]]])
    each = functools.partial(group_advantages, epsilon=0.0)
    got = combine_rewards(rewards, jnp.array([1.0, 3.0]), each=each)
    np.testing.assert_allclose(got, [[-(0.5**0.5) - 3, 0.5**0.5 + 3, 0]], atol=1e-6)


applying = hnp.arrays(
    np.float32, (3, 2, 4), elements=st.just(np.nan) | st.sampled_from([0.0, 0.1, 1.0]) | st.integers(-9, 9).map(float)
)


@given(rewards=applying, weights=st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3))
def test_combine_oracle(rewards, weights):
    got = combine_rewards(jnp.asarray(rewards), jnp.array(weights))
    np.testing.assert_allclose(got, oracle.combine_rewards(rewards, weights), atol=1e-5)
    names = "abc"
    scores = Scores(by_name={name: x.reshape(-1).astype(np.float64) for name, x in zip(names, rewards, strict=True)})
    total = scores.total([Reward(name=n, function=len, weight=w) for n, w in zip(names, weights, strict=True)])
    applies = ~np.isnan(rewards).all(axis=0)
    np.testing.assert_array_equal(np.isnan(total), ~applies.reshape(-1))  # it says that it is unknown
    np.testing.assert_allclose(got[applies], total.reshape(applies.shape)[applies], atol=1e-5)
    each = combine_rewards(jnp.asarray(rewards), jnp.array(weights), each=group_advantages)
    np.testing.assert_allclose(each, oracle.combine_rewards(rewards, weights, normalize=True), atol=1e-3)


# Advantages of tokens --------------------------------------------------------------------------------------------


processed = jax.jit(process_advantages, static_argnames=("group_size", "ddof", "epsilon"))


def test_process_by_hand():
    # Rewards 0, 4 | 2: mean 2, squared deviations 8, sample deviation 2: normalized -1, 1 | 0.
    none = np.nan
    rewards = jnp.array([[none, 0.0, none, 4.0, none], [2.0, none, none, none, none]])
    mask = jnp.array([[True] * 5, [True, True, False, False, False]])
    got = process_advantages(rewards, mask, 2, epsilon=0.0)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, [[0, 0, 1, 1, 0], [0, 0, 0, 0, 0]])
    # Divided by 3 in place of 2, and a step behind the end, where none can be.
    got = process_advantages(rewards.at[1, 3].set(9.0), mask, 2, ddof=0, epsilon=0.5)
    np.testing.assert_allclose(got[0], np.array([0, 0, 2, 2, 0]) / ((8 / 3) ** 0.5 + 0.5), rtol=1e-6)
    # The second completion, which does not count, is measured by the first: mean 2, sample deviation sqrt(8).
    got = process_advantages(rewards.at[1, 0].set(6.0), mask, 2, epsilon=0.0, counted=jnp.array([True, False]))
    np.testing.assert_allclose(got * 8**0.5, [[0, 0, 2, 2, 0], [4, 0, 0, 0, 0]], rtol=1e-6)


T = 6
lengths = st.lists(st.integers(0, T), min_size=6, max_size=6)


def ragged(lengths):
    return np.arange(T)[None, :] < np.array(lengths)[:, None]


@given(lengths=lengths, steps=hnp.arrays(np.bool_, (6, T)), ddof=st.sampled_from([0, 1]),
       values=hnp.arrays(np.float32, (6, T), elements=st.integers(-3, 3).map(float)),
       group_size=st.sampled_from([2, 3, 6]), counted=st.none() | hnp.arrays(np.bool_, 6))  # fmt: skip
def test_process_oracle(lengths, steps, values, ddof, group_size, counted):
    mask = ragged(lengths)
    rewards = np.where(steps & mask, values, np.nan)
    got = processed(rewards, mask, group_size, ddof=ddof, counted=None if counted is None else jnp.asarray(counted))
    expected = oracle.process_advantages(rewards, mask, group_size, ddof, counted=counted)
    np.testing.assert_allclose(got, expected, atol=1e-3, rtol=1e-4)
    assert (np.asarray(got)[~mask] == 0).all()


@pytest.mark.parametrize("ends", [[[0, 2], [1]], [[0], []], [[], []]])
def test_constant_steps_are_exactly_zero(ends):
    rewards = np.full((2, 4), np.nan)
    for row, at in zip(rewards, ends, strict=True):
        row[at] = 0.1
    assert (process_advantages(jnp.asarray(rewards), jnp.ones((2, 4), bool), 2, epsilon=0.0) == 0).all()


estimate = jax.jit(gae, static_argnames=("discount", "smoothing"))


def test_gae_by_hand():
    # Errors: 0 + 1/2 2 - 4 = -3, 8 - 2 = 6; advantages: -3 + 1/4 6 = -1.5, 6. What the mask hides is garbage.
    rewards, values = jnp.array([[0.0, 8.0, jnp.nan]]), jnp.array([[4.0, 2.0, jnp.inf]])
    advantages, returns = gae(rewards, values, jnp.array([[True, True, False]]), discount=0.5, smoothing=0.5)
    assert advantages.dtype == returns.dtype == jnp.float32
    np.testing.assert_array_equal(advantages, [[-1.5, 6, 0]])
    np.testing.assert_array_equal(returns, [[2.5, 8, 0]])


def test_gae_defaults():
    rewards, values, mask = jnp.array([[0.0, 1.0]]), jnp.array([[0.0, 0.0]]), jnp.ones((1, 2), bool)
    np.testing.assert_allclose(gae(rewards, values, mask)[0], [[0.95, 1]])


def random_tokens(lengths, seed):
    mask = ragged(lengths)
    rewards, values = np.random.default_rng(seed).normal(size=(2, *mask.shape))
    return [np.where(mask, x, np.nan).astype(np.float32) for x in (rewards, values)], mask


@given(lengths=lengths, seed=st.integers(0, 2**32 - 1), options=st.sampled_from([(1.0, 0.95), (0.9, 1.0), (0.7, 0.3)]))
def test_gae_oracle(lengths, seed, options):
    (rewards, values), mask = random_tokens(lengths, seed)
    got = estimate(rewards, values, mask, discount=options[0], smoothing=options[1])
    for mine, expected in zip(got, oracle.gae(rewards, values, mask, *options), strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-5)


@given(lengths=lengths, seed=st.integers(0, 2**32 - 1))
def test_gae_between_the_return_and_the_error_of_one_step(lengths, seed):
    (rewards, values), mask = random_tokens(lengths, seed)
    r, v = np.where(mask, rewards, 0), np.where(mask, values, 0)
    to_go = np.cumsum(r[:, ::-1], axis=1)[:, ::-1]
    advantages, returns = estimate(rewards, values, mask, discount=1.0, smoothing=1.0)
    np.testing.assert_allclose(advantages, np.where(mask, to_go - v, 0), atol=1e-5)
    np.testing.assert_allclose(returns, np.where(mask, to_go, 0), atol=1e-5)
    following = np.concatenate([v[:, 1:], np.zeros((6, 1))], axis=1)
    advantages, _ = estimate(rewards, values, mask, discount=0.9, smoothing=0.0)
    np.testing.assert_allclose(advantages, r + 0.9 * following - v, atol=1e-5)


def test_whiten_by_hand():
    # Four tokens 1 1 4 6: mean 3, squared deviations 4 + 4 + 1 + 9 = 18, deviation sqrt(18 / 4).
    advantages = jnp.array([[1.0, 1.0, jnp.nan], [4.0, 6.0, -jnp.inf]])
    mask = jnp.array([[True, True, False]] * 2)
    np.testing.assert_allclose(
        whiten(advantages, mask, epsilon=0.0), np.array([[-2, -2, 0], [1, 3, 0]]) / 4.5**0.5, rtol=1e-6
    )


@given(lengths=lengths, seed=st.integers(0, 2**32 - 1), epsilon=st.sampled_from([1e-4, 0.5]),
       ddof=st.sampled_from([0, 1]), counted=st.none() | hnp.arrays(np.bool_, 6))  # fmt: skip
def test_whiten_oracle(lengths, seed, epsilon, ddof, counted):
    (advantages, _), mask = random_tokens(lengths, seed)
    got = np.asarray(whiten(
        jnp.asarray(advantages), jnp.asarray(mask), epsilon=epsilon, ddof=ddof,
        counted=None if counted is None else jnp.asarray(counted),
    ))  # fmt: skip
    np.testing.assert_allclose(got, oracle.whiten(advantages, mask, epsilon, ddof, counted), atol=1e-4, rtol=1e-4)
    if mask.sum() > 1 and epsilon == 1e-4 and ddof == 0 and counted is None:
        np.testing.assert_allclose([got[mask].mean(), got[mask].std()], [0, 1], atol=1e-2)


@pytest.mark.parametrize("mask", [np.ones((2, 3), bool), np.arange(6).reshape(2, 3) == 4, np.zeros((2, 3), bool)])
def test_whitened_equals_are_exactly_zero(mask):
    assert (whiten(jnp.full((2, 3), 0.1), mask, epsilon=0.0) == 0).all()


zeros = jnp.zeros


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: group_advantages(zeros((3, 1)), baseline=BASELINES["leave_one_out"]), "group size 1.*at least 2"),
        (lambda: group_advantages(zeros((3, 1)), baseline=BASELINES["none"]), "group size 1"),
        (lambda: group_advantages(zeros((1, 1)), baseline=BASELINES["batch"], scale=SCALES["none"]), "batch size 1"),
        (lambda: group_advantages(zeros((1, 1)), baseline=BASELINES["none"], scale=SCALES["batch"]), "batch size 1"),
        (lambda: group_advantages(zeros((3, 2)), scale=SCALES["none"], ddof=2), "ddof=2 must be 0"),
        (lambda: group_advantages(zeros((3, 2)), counted=jnp.ones((2, 3), bool)), r"counted has shape \(2, 3\)"),
        (lambda: combine_rewards(zeros((2, 3, 4)), zeros(3)), "3 weights for 2 rewards"),
        (lambda: combine_rewards(zeros((2, 3, 1)), zeros(2), each=group_advantages), "group size 1"),
        (lambda: process_advantages(zeros((4, 5)), zeros((4, 5), bool), 3), "group_size=3"),
        (lambda: process_advantages(zeros((4, 5)), zeros((4, 5), bool), 1), "group_size=1"),
        (lambda: process_advantages(zeros((4, 2)), zeros((2, 5), bool), 2), r"mask has shape \(2, 5\)"),
        (lambda: process_advantages(zeros((4, 5)), zeros((4, 5), bool), 2, ddof=3), "ddof=3"),
        (lambda: gae(zeros((2, 3)), zeros((2, 4)), zeros((2, 3), bool)), r"values has shape \(2, 4\)"),
        (lambda: gae(zeros((2, 3)), zeros((2, 3)), zeros((3, 3), bool)), r"mask has shape \(3, 3\)"),
        (lambda: gae(zeros((2, 3)), zeros((2, 3)), zeros((2, 3), bool), discount=1.1), "discount=1.1"),
        (lambda: gae(zeros((2, 3)), zeros((2, 3)), zeros((2, 3), bool), smoothing=-1), "smoothing=-1"),
        (lambda: whiten(zeros((2, 3)), zeros((2, 1), bool)), r"mask has shape \(2, 1\)"),
    ],
)
def test_what_does_not_fit(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_no_baseline_and_no_scale_need_no_group():
    np.testing.assert_array_equal(estimated(jnp.array([[3.0]]), baseline="none", scale="none"), [[3]])
    np.testing.assert_array_equal(estimated(jnp.array([[3.0], [1.0]]), baseline="batch", scale="none"), [[1], [-1]])

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.advantages import constant_groups, group_advantages
from grpo_jax.losses import grpo_loss
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

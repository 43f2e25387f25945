import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax import losses
from grpo_jax.metrics import finalize
from tests import oracle

B, T = 5, 6
rows = st.one_of(
    st.integers(0, T).map(lambda n: [t < n for t in range(T)]), st.lists(st.booleans(), min_size=T, max_size=T)
)
masks = st.lists(rows, min_size=B, max_size=B).map(np.array)  # ragged, with holes, rows of no and of one token
seeds = st.integers(0, 2**32 - 1)


def random_batch(mask, seed, clip_low=0.2, clip_high=0.2):
    """Log-probabilities of the policy, the old one and the reference, -inf or NaN where the mask is false."""
    rng = np.random.default_rng(seed)
    logprobs = -rng.exponential(size=mask.shape)
    log_ratio = rng.normal(scale=0.4, size=mask.shape)
    for bound in (1 - clip_low, 1 + clip_high):  # float32 must fall on the same side of the clip as float64
        log_ratio[np.abs(np.exp(log_ratio) - bound) < 1e-4] = 0
    garbage = rng.choice([-np.inf, np.nan], size=(3, *mask.shape))
    arrays = [logprobs, logprobs - log_ratio, logprobs + rng.normal(scale=0.5, size=mask.shape)]
    return [np.where(mask, x, g).astype(np.float32) for x, g in zip(arrays, garbage, strict=True)]


@functools.partial(jax.jit, static_argnames=("clip_low", "clip_high", "kl_coef"))
def value_and_grad(logprobs, advantages, mask, **options):
    (loss, metrics), gradient = jax.value_and_grad(losses.grpo_loss, has_aux=True)(
        logprobs, advantages, mask, **options
    )
    return loss, gradient, finalize(metrics)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize(
    "options", [{"kl_coef": 0.0}, {"kl_coef": 0.3}, {"kl_coef": 0.0, "clip_low": 0.1, "clip_high": 0.4}]
)
@given(mask=masks, seed=seeds)
def test_grpo_loss_oracle(options, off_policy, per_token, mask, seed):
    clips = {name: value for name, value in options.items() if name != "kl_coef"}
    logprobs, old, ref = random_batch(mask, seed, **clips)
    advantages = np.random.default_rng(seed).normal(size=(B, T) if per_token else B).astype(np.float32)
    old, ref = old if off_policy else None, ref if options["kl_coef"] else None
    loss, gradient, metrics = value_and_grad(logprobs, advantages, mask, old_logprobs=old, ref_logprobs=ref, **options)
    expected = oracle.grpo(logprobs, advantages, mask, old=old, ref=ref, **options)
    np.testing.assert_allclose(loss, expected[0], atol=1e-5)
    np.testing.assert_allclose(gradient, expected[1], atol=1e-5)
    assert metrics.keys() == expected[2].keys()
    for name, value in expected[2].items():
        np.testing.assert_allclose(metrics[name], value, atol=1e-5, err_msg=name)


@given(mask=masks, seed=seeds)
def test_supervised_loss_oracle(mask, seed):
    logprobs = random_batch(mask, seed)[0]
    loss, gradient = jax.value_and_grad(lambda x: losses.supervised_loss(x, mask)[0])(logprobs)
    if not mask.any():
        assert loss == 0
        assert (gradient == 0).all()
        return
    expected = oracle.supervised(logprobs, mask)
    np.testing.assert_allclose(loss, expected[0], atol=1e-5)
    np.testing.assert_allclose(gradient, expected[1], atol=1e-5)


@pytest.mark.parametrize("token_weights", [losses.sequence_mean, losses.token_mean])
@given(mask=masks, seed=seeds)
def test_parts_with_the_weights_of_the_whole_add_up(token_weights, mask, seed):
    """What makes microbatches exact."""
    logprobs, old, ref = random_batch(mask, seed)
    advantages, weights = np.linspace(-1, 1, B, dtype=np.float32), np.asarray(token_weights(mask))

    def loss(part):
        rest = {"old_logprobs": old[part], "ref_logprobs": ref[part], "weights": weights[part]}
        return value_and_grad(logprobs[part], advantages[part], mask[part], **rest)[0]

    np.testing.assert_allclose(loss(slice(0, 2)) + loss(slice(2, B)), loss(slice(0, B)), atol=1e-5)
    expected = oracle.grpo(logprobs, advantages, mask, old=old, ref=ref, weights=weights)
    np.testing.assert_allclose(loss(slice(0, B)), expected[0], atol=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),  # slope: with respect to the log-ratio
    [
        (1.5, 2.0, 2.6, 0.0),  # up and good: clipped at 1.3
        (0.5, 2.0, 1.0, 1.0),  # down and good: not clipped
        (1.5, -2.0, -3.0, -3.0),  # up and bad: not clipped
        (0.5, -2.0, -1.8, 0.0),  # down and bad: clipped at 0.9
        (1.2, 2.0, 2.4, 2.4),  # within
        (0.95, -2.0, -1.9, -1.9),
        (1.0, 2.0, 2.0, 2.0),  # where both branches of the minimum are equal, the gradient is whole
    ],
)
def test_the_corners_of_the_clip(ratio, advantage, value, slope):
    def surrogate(log_ratio):
        return losses.clipped_surrogate(log_ratio, jnp.full((1, 1), advantage), clip_low=0.1, clip_high=0.3)[0, 0]

    got, gradient = jax.value_and_grad(surrogate)(jnp.full((1, 1), np.log(ratio)))
    np.testing.assert_allclose(got, value, rtol=1e-6)
    np.testing.assert_allclose(gradient[0, 0], slope, rtol=1e-6)


@pytest.mark.parametrize(("estimator", "expected"), [("kl_k1", -0.6931472), ("kl_k2", 0.2402265), ("kl_k3", 0.3068528)])
def test_kl_estimators(estimator, expected):
    """The reference finds the token twice as likely: d = log 2."""
    logprob, ref = np.log(0.25), np.log(0.5)
    np.testing.assert_allclose(getattr(losses, estimator)(jnp.array(logprob), jnp.array(ref)), expected, rtol=1e-6)
    np.testing.assert_allclose(getattr(oracle, estimator)(logprob, ref), expected, rtol=1e-6)
    assert getattr(losses, estimator)(jnp.array(-1.0), jnp.array(-1.0)) == 0


def test_k3_keeps_its_digits_between_close_policies():
    np.testing.assert_allclose(losses.kl_k3(jnp.float32(0), jnp.float32(2**-12)), 2**-25, rtol=1e-3)


@pytest.mark.parametrize(
    ("token_weights", "expected"),
    [
        (losses.sequence_mean, [[1 / 6, 1 / 6, 0, 0], [1 / 12] * 4, [0, 0, 0, 0]]),
        (losses.token_mean, [[1 / 6, 1 / 6, 0, 0], [1 / 6] * 4, [0, 0, 0, 0]]),
    ],
)
def test_token_weights(token_weights, expected):
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], bool)
    np.testing.assert_allclose(token_weights(mask), expected, rtol=1e-6)
    np.testing.assert_allclose(getattr(oracle, token_weights.__name__)(mask), expected, rtol=1e-6)
    assert (token_weights(jnp.zeros((2, 3), bool)) == 0).all()


def test_the_first_step_has_no_loss_but_a_gradient():
    logprobs, mask = -jnp.ones((2, 3)), jnp.ones((2, 3), bool)
    loss, gradient, metrics = value_and_grad(logprobs, jnp.array([1.0, -1.0]), mask, ref_logprobs=logprobs)
    assert abs(loss) < 1e-7
    np.testing.assert_allclose(gradient, [[-1 / 6] * 3, [1 / 6] * 3], rtol=1e-6)
    assert all(value == 0 for value in metrics.values())


def test_a_reference_is_asked_for():
    arguments = jnp.zeros((2, 3)), jnp.zeros(2), jnp.ones((2, 3), bool)
    with pytest.raises(ValueError, match=r"kl_coef=0\.04 needs ref_logprobs"):
        losses.grpo_loss(*arguments)
    assert "kl" not in losses.grpo_loss(*arguments, kl_coef=0.0)[1]

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
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
        (losses.fixed_length, [[1 / 12, 1 / 12, 0, 0], [1 / 12] * 4, [0, 0, 0, 0]]),
        (losses.sequence_sum, [[1 / 3, 1 / 3, 0, 0], [1 / 3] * 4, [0, 0, 0, 0]]),
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


# The family ------------------------------------------------------------------------------------------

CLIPS = {"clip_low": 0.2, "clip_high": 0.3}
SURROGATES = [
    ("clipped", CLIPS), ("clipped", {**CLIPS, "dual_clip": 1.5}), ("unclipped", {}),
    ("clipped_weight", CLIPS), ("clipped_weight", {"clip_low": 1.0, "clip_high": 0.5}),
    ("soft_gate", {"positive": 1.0, "negative": 1.05}), ("soft_gate", {"positive": 2.0, "negative": 5.0}),
    ("mirror_descent", {"kl_coef": 0.7}),
]  # fmt: skip
LEVELS = {
    "token": losses.token_level, "sequence": losses.sequence_level,
    "sequence with token gradient": losses.sequence_level_token_gradient,
}  # fmt: skip
ESTIMATORS = {
    "k1": losses.kl_k1, "k2": losses.kl_k2, "k3": losses.kl_k3, "k1+": losses.with_gradient_of_k2(losses.kl_k1),
    "k3+": losses.with_gradient_of_k2(losses.kl_k3),
}  # fmt: skip


@functools.cache
def compiled(kind, options, level, estimator="k3", **static):
    surrogate = getattr(losses, kind)(**dict(options))
    loss = functools.partial(
        losses.policy_loss, surrogate=surrogate, level=LEVELS[level], kl=ESTIMATORS[estimator], **static
    )
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def check(seed, mask, kind, options, level, *, off_policy=True, estimator="k3", arrays=(), **static):
    """Value and gradient beside the oracle's; `arrays`: which of the optional arrays there are."""
    rng = np.random.default_rng(seed)
    logprobs, old, ref = random_batch(mask, seed, 0.2, 0.3)
    old = old if off_policy else None
    frozen = np.where(mask, logprobs if old is None else old, 0).astype(np.float64)
    bounds = [1 - options.get("clip_low", 0.2), 1 + options.get("clip_high", 0.3), options.get("dual_clip", 9.0)]
    for i, t in zip(*np.nonzero(mask), strict=True):  # float32 must fall on the same side of the clip as float64
        weight = np.exp(oracle.log_weight(level, i, t, logprobs, logprobs, frozen, mask))
        assume(all(abs(weight - bound) > 1e-4 for bound in bounds))
    advantages = rng.normal(size=mask.shape if seed % 2 else B).astype(np.float32)
    extra = {
        "ref_logprobs": ref, "entropies": rng.exponential(size=mask.shape).astype(np.float32),
        "correction": rng.uniform(0, 2, mask.shape).astype(np.float32),
        "weights": rng.uniform(0, 1, mask.shape).astype(np.float32),
    }  # fmt: skip
    extra = {name: extra[name] for name in arrays}
    run = compiled(kind, tuple(options.items()), level, estimator, **static)
    (loss, metrics), gradient = run(logprobs, advantages, mask, old_logprobs=old, **extra)
    ref = extra.pop("ref_logprobs", None)
    expected = oracle.policy(
        logprobs, advantages, mask, kind=kind, options=options, level=level, old=old, ref=ref, estimator=estimator,
        **extra, **static,
    )  # fmt: skip
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-4, atol=2e-5)
    return finalize(metrics)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("kind", "options"), SURROGATES)
@settings(max_examples=10)
@given(mask=masks, seed=seeds, off_policy=st.booleans())
def test_surrogates_at_every_level(kind, options, level, mask, seed, off_policy):
    check(seed, mask, kind, options, level, off_policy=off_policy)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@settings(max_examples=10)
@given(mask=masks, seed=seeds, off_policy=st.booleans())
def test_estimators_of_the_kl(estimator, weighted, mask, seed, off_policy):
    check(
        seed, mask, "clipped", CLIPS, "token", off_policy=off_policy, estimator=estimator, arrays=("ref_logprobs",),
        kl_coef=0.3, weighted_kl=weighted,
    )  # fmt: skip


@settings(max_examples=10)
@given(mask=masks, seed=seeds)
def test_entropy_correction_weights_and_clamp(mask, seed):
    check(seed, mask, "clipped", CLIPS, "token", arrays=("entropies",), entropy_coef=0.1)
    check(seed, mask, "clipped", CLIPS, "sequence", arrays=("correction", "weights"))
    check(seed, mask, "unclipped", {}, "token", clamp=0.25)
    everything = ("ref_logprobs", "entropies", "correction", "weights")
    check(seed, mask, "soft_gate", SURROGATES[6][1], "sequence", arrays=everything, kl_coef=0.2, entropy_coef=-0.1)


@pytest.mark.parametrize(
    ("surrogate", "ratio", "advantage", "value", "slope"),  # slope: with respect to the log-probability of the token
    [
        (losses.clipped(0.2, 0.2, dual_clip=3.0), 5.0, -2.0, -6.0, 0.0),  # beyond 3: held at 3 A
        (losses.clipped(0.2, 0.2, dual_clip=3.0), 2.0, -2.0, -4.0, -4.0),  # bad and up, not so far
        (losses.clipped(0.2, 0.2, dual_clip=3.0), 5.0, 2.0, 2.4, 0.0),  # a good one is held by the clip
        (losses.unclipped(), 5.0, 2.0, 10.0, 10.0),
        (losses.clipped_weight(1.0, 2.0), 5.0, 2.0, -6.0, 6.0),  # the weight is 3, the token learns all the same
        (losses.clipped_weight(1.0, 2.0), 0.1, 2.0, -0.2, 0.2),  # nothing holds it from below
        (losses.clipped_weight(0.5, 2.0), 0.1, -2.0, 1.0, -1.0),
        (losses.soft_gate(2.0, 2.0), 1.0, 3.0, 3.0, 3.0),  # 4 / 2 * sigmoid(0) = 1, and the slope of the ratio
        (losses.mirror_descent(0.5), 2.0, 3.0, 6 - 0.5 * (2 * 0.6931472 - 1), 6 - 0.5 * 2 * 0.6931472),
    ],
)
def test_surrogates_by_hand(surrogate, ratio, advantage, value, slope):
    def term(logprob):
        log_weight = logprob + 1 + np.log(ratio)  # old: -1 - log ratio
        return surrogate(log_weight.reshape(1, 1), logprob.reshape(1, 1), jnp.full((1, 1), advantage))[0][0, 0]

    got, gradient = jax.value_and_grad(term)(jnp.float32(-1.0))
    np.testing.assert_allclose(got, value, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-6)


def test_levels_by_hand():
    log_ratio, mask = jnp.array([[0.1, 0.5, 9.0], [0.2, 0.2, 0.2]]), jnp.array([[True, True, False], [False] * 3])
    np.testing.assert_allclose(losses.sequence_level(log_ratio, mask)[0], [0.3] * 3, rtol=1e-6)
    assert np.isfinite(losses.sequence_level(log_ratio, mask)).all()  # no tokens, no mean
    value, pullback = jax.vjp(lambda x: losses.sequence_level_token_gradient(x, mask), log_ratio)
    np.testing.assert_allclose(value[0], [0.3] * 3, rtol=1e-6)
    weights = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(pullback(weights)[0], weights)


def test_where_the_clip_holds_is_counted():
    mask, advantages = jnp.ones((1, 4), bool), jnp.array([[1.0, -1.0, 1.0, -1.0]])
    old, logprobs = jnp.zeros((1, 4)), jnp.log(jnp.array([[2.0, 0.5, 0.5, 2.0]]))
    shares = lambda surrogate: {
        name.split("/")[1]: float(value)
        for name, value in finalize(
            losses.policy_loss(logprobs, advantages, mask, surrogate=surrogate, old_logprobs=old)[1]
        ).items()
    }
    assert shares(losses.clipped()) == {"low_mean": 0.25, "high_mean": 0.25, "region_mean": 0.5}
    assert shares(losses.clipped(dual_clip=1.5)) == {"low_mean": 0.25, "high_mean": 0.5, "region_mean": 0.75}
    assert shares(losses.clipped_weight(0.2, 0.2)) == {"low_mean": 0.5, "high_mean": 0.5, "region_mean": 1.0}
    assert shares(losses.unclipped()) == {"low_mean": 0, "high_mean": 0, "region_mean": 0}


def test_entropies_are_asked_for():
    arguments = jnp.zeros((2, 3)), jnp.zeros(2), jnp.ones((2, 3), bool)
    with pytest.raises(ValueError, match=r"entropy_coef=0\.1 needs entropies"):
        losses.policy_loss(*arguments, surrogate=losses.clipped(), entropy_coef=0.1)


@given(seed=seeds)
def test_dpo(seed):
    values = (-np.random.default_rng(seed).exponential(5, (4, 7))).astype(np.float32)
    loss, metrics = losses.dpo_loss(*values, beta=0.3)
    expected, margins = oracle.dpo(*values, beta=0.3)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(finalize(metrics)["accuracy"], np.mean(np.array(margins) > 0), rtol=1e-6)
    np.testing.assert_allclose(finalize(metrics)["margin"], np.mean(margins), rtol=1e-4, atol=1e-5)


def test_dpo_by_hand():
    """At the reference the loss is log 2, and its gradient half of beta for the chosen one, against the other."""
    zero = jnp.zeros(1)
    loss, gradient = jax.value_and_grad(lambda w, x: losses.dpo_loss(w, x, zero, zero, beta=0.4)[0], (0, 1))(zero, zero)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-0.2], [0.2]], rtol=1e-6)


# Expectations on a policy that can be enumerated: one token out of five --------------------------------

THETA, OLD, REF = (jnp.array(np.random.default_rng(i).normal(size=5), jnp.float32) for i in range(3))


def expected_gradient(estimator, weighted, sampled_by):
    """Of the KL's term under completions drawn from `sampled_by`, by summing over all of them: [5] by THETA."""

    def loss(theta):
        logprobs = jax.nn.log_softmax(theta)[:, None]
        columns = jnp.zeros((5, 1)), jnp.ones((5, 1), bool)
        return losses.policy_loss(
            logprobs, *columns, surrogate=losses.unclipped(), old_logprobs=jax.nn.log_softmax(sampled_by)[:, None],
            ref_logprobs=jax.nn.log_softmax(REF)[:, None], kl=ESTIMATORS[estimator], kl_coef=1.0, weighted_kl=weighted,
            weights=jax.nn.softmax(sampled_by)[:, None],
        )[0]  # fmt: skip

    return jax.grad(loss)(THETA)


def divergence(p, q):
    return (jax.nn.softmax(p) * (jax.nn.log_softmax(p) - jax.nn.log_softmax(q))).sum()


TRUE = jax.grad(divergence)(THETA, REF)


@pytest.mark.parametrize("estimator", ["k2", "k1+", "k3+"])
def test_the_gradient_of_the_kl_on_policy(estimator):
    np.testing.assert_allclose(expected_gradient(estimator, False, THETA), TRUE, atol=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("sampled_by", [THETA, OLD], ids=["on-policy", "off-policy"])
def test_weighted_estimators_have_the_gradient_of_the_kl_off_policy_too(estimator, sampled_by):
    np.testing.assert_allclose(expected_gradient(estimator, True, sampled_by), TRUE, atol=1e-6)


def test_what_the_other_estimators_do_instead():
    np.testing.assert_allclose(expected_gradient("k1", False, THETA), 0, atol=1e-6)  # nothing
    other = jax.grad(lambda theta: divergence(REF, theta))(THETA)
    np.testing.assert_allclose(expected_gradient("k3", False, THETA), other, atol=1e-6)  # the other direction
    # A wrong one would be seen: the bias is far above the tolerance.
    assert np.abs(other - TRUE).max() > 0.1
    for estimator in ("k2", "k1+", "k3+"):  # blind to who sampled
        assert np.abs(expected_gradient(estimator, False, OLD) - TRUE).max() > 0.01


@pytest.mark.parametrize(("estimator", "unbiased"), [("k1", True), ("k3", True), ("k2", False)])
def test_the_value_of_the_kl(estimator, unbiased):
    policy, ref = jax.nn.log_softmax(THETA), jax.nn.log_softmax(REF)
    mean = (jnp.exp(policy) * ESTIMATORS[estimator](policy, ref)).sum()
    assert (abs(mean - divergence(THETA, REF)) < 1e-6) == unbiased

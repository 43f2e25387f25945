import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.corrections import importance_correction, top_entropies
from grpo_jax.losses import sequence_product, token_level
from grpo_jax.metrics import finalize
from tests import oracle
from tests.test_losses import masks, random_batch, seeds


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
@settings(max_examples=10)
@given(mask=masks, seed=seeds, bound=st.sampled_from([1.2, 3.0]))
def test_importance_correction(level, masked, mask, seed, bound):
    old, sampler, _ = random_batch(mask, seed)
    expected, said = oracle.importance_correction(old, sampler, mask, level, bound, masked)
    levels = {"token": token_level, "sequence": sequence_product}
    options = {"level": levels[level], "bound": bound, "masked": masked}
    got, metrics = importance_correction(old, sampler, mask, **options)
    np.testing.assert_allclose(np.where(mask, got, 0), expected, rtol=1e-4)
    metrics = finalize(metrics)
    assert metrics.keys() == said.keys()
    for name, value in said.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_importance_correction_by_hand():
    """Ratios of 2 and 3 a token, so 6 of the whole; it has no gradient."""
    old, sampler, mask = jnp.log(jnp.array([[2.0, 3.0]])), jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
    product = {"level": sequence_product}
    for one, other, options, expected in [
        (old, sampler, {"bound": 2.5}, [2, 2.5]),
        (old, sampler, {"bound": 2.5, "masked": True}, [2, 0]),
        (sampler, old, {"bound": 2.5, "masked": True}, [0.5, 0]),
        (old, sampler, {"bound": 7.0, **product}, [6, 6]),
        (old, sampler, {"bound": 5.0, **product}, [5, 5]),
        (old, sampler, {"bound": 5.0, "masked": True, **product}, [0, 0]),
    ]:
        correction, _ = importance_correction(one, other, mask, **options)
        np.testing.assert_allclose(correction, [expected], rtol=1e-6)
    gradient = jax.grad(lambda old: importance_correction(old, sampler, mask)[0].sum())(old)
    assert gradient.tolist() == [[0, 0]]


def test_thousands_of_ratios_stay_finite():
    far, mask = jnp.full((1, 4000), 3.0), jnp.ones((1, 4000), bool)
    for old, sampler in ((far, -far), (-far, far)):
        correction, metrics = importance_correction(old, sampler, mask, level=sequence_product)
        assert jnp.isfinite(correction).all()
        assert all(jnp.isfinite(x) for x in finalize(metrics).values())


@settings(max_examples=20)
@given(mask=masks.filter(np.any), seed=seeds, share=st.sampled_from([0.01, 0.2, 0.3, 0.5, 0.7, 1.0]))
def test_top_entropies(mask, seed, share):
    entropies = np.random.default_rng(seed).integers(0, 9, mask.shape) / np.float32(4)  # with equals
    got = top_entropies(jnp.where(mask, entropies, jnp.nan), mask, share)
    np.testing.assert_array_equal(got, oracle.top_entropies(entropies, mask, share))


def test_top_entropies_of_nothing():
    assert not top_entropies(jnp.ones((2, 3)), jnp.zeros((2, 3), bool), 0.5).any()

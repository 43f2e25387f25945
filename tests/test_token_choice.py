import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax import token_choice
from grpo_jax.types import SamplingParams
from tests import oracle

V, SAMPLES = 20, 8192

truncate = jax.jit(token_choice.truncate)
choose_tokens = jax.jit(token_choice.choose_tokens)


@given(
    logits=st.lists(st.sampled_from([-30.0, -2.0, -1.0, -0.0, 0.0, 0.5, 1.0, 3.0]), min_size=6, max_size=6),
    top_k=st.integers(0, 8),
    top_p=st.sampled_from([0.01, 0.37, 0.73, 0.97, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 0.03, 0.3, 1.0]),
)
def test_truncate_oracle(logits, top_k, top_p, min_p):
    """Many ties: equals of the last one that is kept are kept."""
    logits = np.array(logits, np.float32)
    kept = oracle.truncate(logits, top_k)
    masses = np.cumsum(np.sort(oracle.softmax(np.where(kept, logits, -np.inf)))[::-1])
    if np.abs(masses - top_p).min() < 1e-6 and top_p < 1:
        return  # float32 may put the edge of the nucleus on either side
    got = truncate(logits, SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p))
    np.testing.assert_array_equal(got, np.where(oracle.truncate(logits, top_k, top_p, min_p), logits, -np.inf))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [1, 1, 1, 1]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 2}, [1, 1, 1, 0]),  # the second and the third are equal
        ({"top_k": 9}, [1, 1, 1, 1]),
        ({"top_p": 0.49}, [0, 1, 0, 0]),
        ({"top_p": 0.51}, [1, 1, 1, 0]),  # a tie again
        ({"top_p": 0.91}, [1, 1, 1, 1]),
        ({"top_k": 3, "top_p": 0.56}, [1, 1, 1, 0]),  # of the mass of the three, the first is 5/9
        ({"top_k": 3, "top_p": 0.55}, [0, 1, 0, 0]),
        ({"top_p": 1e-6}, [0, 1, 0, 0]),
        ({"top_p": 0.0}, [0, 1, 0, 0]),  # the likeliest stays
        ({"min_p": 0.19}, [1, 1, 1, 1]),
        ({"min_p": 0.39}, [1, 1, 1, 0]),
        ({"min_p": 0.41}, [0, 1, 0, 0]),
        ({"min_p": 0.41, "top_k": 2}, [0, 1, 0, 0]),
        ({"min_p": 1.0}, [0, 1, 0, 0]),
    ],
)
def test_truncate_by_hand(options, kept):
    logits = np.log(np.array([0.2, 0.5, 0.2, 0.1], np.float32))
    np.testing.assert_array_equal(truncate(logits, SamplingParams(**options)) > -np.inf, np.array(kept, bool))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("truncation", [{}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.2}])
def test_tokens_are_drawn_from_the_softmax(temperature, truncation):
    logits = np.random.default_rng(1).normal(scale=2, size=V).astype(np.float32)
    keys = jax.random.split(jax.random.key(3), SAMPLES)
    params = SamplingParams(temperature=temperature, **truncation)
    tokens = choose_tokens(np.broadcast_to(logits, (SAMPLES, V)), keys, params).ids
    scaled = logits.astype(np.float64) / temperature
    kept = np.where(oracle.truncate(scaled, **truncation), scaled, -np.inf)
    assert np.isfinite(kept).all() != bool(truncation)
    assert not oracle.rejected(tokens, oracle.softmax(kept))
    assert oracle.rejected(tokens, oracle.softmax(kept / 1.6))


@pytest.mark.parametrize("vocabulary", [300, 1000, 20_000])
def test_tokens_are_drawn_from_all_blocks(vocabulary):
    """Of a vocabulary of several blocks, the last not full; most of its tokens are as good as impossible."""
    rng = np.random.default_rng(vocabulary)
    logits = np.full(vocabulary, -200, np.float32)
    likely = np.append(rng.choice(vocabulary - 2, 30, replace=False), [vocabulary - 1])
    logits[likely] = rng.normal(size=31)
    count = 64 if vocabulary > 10_000 else 8
    draw = functools.partial(choose_tokens, np.broadcast_to(logits, (SAMPLES // count, vocabulary)))
    keys = jax.random.split(jax.random.key(0), (count, SAMPLES // count))
    tokens = np.concatenate([draw(k, SamplingParams()).ids for k in keys])
    expected = oracle.softmax(logits.astype(np.float64))
    assert not oracle.rejected(tokens, expected)
    assert oracle.rejected(tokens, np.roll(expected, 1) * 0.5 + expected * 0.5)
    assert (tokens == vocabulary - 1).any()


def test_greedy_is_the_first_of_the_largest():
    logits = np.random.default_rng(0).normal(size=(5, 700)).astype(np.float32)
    logits[:, [600, 77, 650]] = 9
    got = choose_tokens(logits, jax.random.split(jax.random.key(0), 5), SamplingParams(temperature=0.0, top_k=3))
    np.testing.assert_array_equal(got.ids, 77)
    np.testing.assert_array_equal(got.sampler_logprobs, 0)
    np.testing.assert_allclose(got.logprobs, np.log([oracle.softmax(x)[77] for x in logits]), atol=1e-5)


def test_nothing_impossible_is_drawn_however_sums_round():
    weights = np.zeros((3, 1000), np.float32)
    weights[0, 500], weights[1, [3, 4]], weights[2] = (
        1e-30,
        [1, 1e-9],
        np.random.default_rng(0).uniform(size=1000) < 0.1,
    )
    edge = np.array([0.0, np.nextafter(np.float32(1), np.float32(0))], np.float32)
    for uniform in edge:
        index = np.asarray(token_choice._invert(jnp.array(weights), jnp.full(3, uniform)))
        assert (weights[np.arange(3), index] > 0).all()


def test_what_is_all_but_impossible_is_not_drawn_at_0(monkeypatch):
    """A uniform number is 0 once in 2^23 draws, whatever the mass of what comes first."""
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.zeros(shape))
    logits = jnp.full(1000, -jnp.inf).at[jnp.array([3, 700])].set(jnp.array([-30.0, 0.0]))
    assert choose_tokens(logits, jax.random.key(0), SamplingParams()).ids == 700


def test_without_truncation_nothing_is_looked_for():
    """No sort anywhere, and the halving of floats stands behind a condition; no noise over the vocabulary."""
    logits, keys = jax.ShapeDtypeStruct((4, 4096), jnp.float32), jax.random.split(jax.random.key(0), 4)
    text = choose_tokens.lower(logits, keys, SamplingParams()).as_text()
    assert "stablehlo.sort" not in text
    assert text.count("stablehlo.case") + text.count("stablehlo.if") >= 3
    bits = [int(n) for n in re.findall(r"tensor<4x(\d+)xui32>", text.split("stablehlo.case")[0])]
    assert bits
    assert max(bits) < 8  # numbers that are drawn
    branches = jax.make_jaxpr(token_choice.choose_tokens)(jnp.zeros((4, 4096)), keys, SamplingParams()).eqns[-1]
    plain, truncated = branches.params["branches"]
    assert "scan" not in str(plain)
    assert "scan" in str(truncated)

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.logprobs import completion_logprobs, token_logprobs, unembed
from tests import oracle

PROMPTS = [[3, 4, 5], [6], [7, 8]]
COMPLETIONS = [[9, 1], [2, 3, 4, 1], [10]]
VOCABULARY, WIDTH = 7, 5


@pytest.fixture(scope="module")
def head():
    rng = np.random.default_rng(0)
    return jnp.array(rng.normal(size=(WIDTH, VOCABULARY)), jnp.float32), None, None


@pytest.fixture(scope="module")
def logprobs_of(policy):
    return jax.jit(functools.partial(completion_logprobs, policy))


def batch(prompt_width=3, side="right", completion_width=4):
    return *oracle.pad(PROMPTS, prompt_width, side), *oracle.pad(COMPLETIONS, completion_width)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_token_logprobs_and_entropies(head, temperature):
    rng = np.random.default_rng(1)
    hidden, tokens = rng.normal(size=(2, 3, WIDTH)).astype(np.float32), rng.integers(0, VOCABULARY, (2, 3))
    logprobs, entropies = token_logprobs(hidden, head, tokens, temperature)
    for i, t in np.ndindex(2, 3):
        p = oracle.softmax(hidden[i, t].astype(np.float64) @ np.asarray(head[0], np.float64) / temperature)
        np.testing.assert_allclose(logprobs[i, t], np.log(p[tokens[i, t]]), atol=1e-5)
        np.testing.assert_allclose(entropies[i, t], -(p * np.log(p)).sum(), atol=1e-5)


def test_one_temperature_a_row_and_zero_stands_for_one(head):
    hidden, tokens = jax.random.normal(jax.random.key(0), (3, 2, WIDTH)), jnp.ones((3, 2), jnp.int32)
    got = token_logprobs(hidden, head, tokens, jnp.array([0.0, 1.0, 2.0])[:, None, None])
    for row, temperature in enumerate([1.0, 1.0, 2.0]):
        expected = token_logprobs(hidden[row], head, tokens[row], temperature)
        np.testing.assert_allclose(got[0][row], expected[0], rtol=1e-6)
        np.testing.assert_allclose(got[1][row], expected[1], rtol=1e-6)


def test_impossible_tokens_give_finite_entropies(head):
    bias = jnp.array([0.0, 0.0] + [-jnp.inf] * (VOCABULARY - 2))
    _, entropies = token_logprobs(jnp.zeros((1, WIDTH)), (head[0], bias, None), jnp.zeros(1, jnp.int32))
    np.testing.assert_allclose(entropies, [np.log(2)], rtol=1e-6)


def test_no_gradient_flows_through_entropies(head):
    tokens = jnp.zeros(1, jnp.int32)
    gradient = jax.grad(lambda x: token_logprobs(x, head, tokens)[1].sum())(jnp.ones((1, WIDTH)))
    assert (gradient == 0).all()


def test_unembed_bias_then_soft_cap():
    hidden, kernel = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 0.0, -1.0], [1.0, 10.0, 0.5]])
    np.testing.assert_allclose(unembed(hidden, (kernel, None, None)), [[5, 20, 0]])
    np.testing.assert_allclose(unembed(hidden, (kernel, jnp.array([1.0, -2.0, 3.0]), None)), [[6, 18, 3]])
    capped = unembed(hidden, (kernel, jnp.array([1.0, -2.0, 3.0]), 6.0))
    np.testing.assert_allclose(capped, [[6 * np.tanh(1), 6 * np.tanh(3), 6 * np.tanh(0.5)]], rtol=1e-6)


def test_unembed_is_float32_of_bfloat16():
    hidden, kernel = jnp.ones((1, 3), jnp.bfloat16), jnp.full((3, 2), 100.5)  # 3 * 100.5 is no bfloat16
    logits = unembed(hidden, (kernel, None, None))
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, [[301.5, 301.5]])


def test_completions_follow_their_prompts(policy, params, logprobs_of):
    logprobs, entropies, aux = logprobs_of(params, *batch())
    hidden_of = jax.jit(policy.hidden)
    kernel = np.asarray(policy.head(params)[0], np.float64)
    assert aux == {}
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        line = jnp.array([prompt + completion])
        hidden, _ = hidden_of(params, line, jnp.arange(line.shape[1])[None], jnp.ones_like(line))
        for t, token in enumerate(completion):
            p = oracle.softmax(np.asarray(hidden[0, len(prompt) + t - 1], np.float64) @ kernel)
            np.testing.assert_allclose(logprobs[i, t], np.log(p[token]), atol=1e-5)
            np.testing.assert_allclose(entropies[i, t], -(p * np.log(p)).sum(), atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize(("prompt_width", "completion_width"), [(3, 4), (9, 4), (5, 8)])
def test_padding_changes_nothing(params, logprobs_of, prompt_width, completion_width, side):
    expected = logprobs_of(params, *batch())
    got = logprobs_of(params, *batch(prompt_width, side, completion_width))
    mask = batch()[-1]
    for a, b in zip(got[:2], expected[:2], strict=True):
        np.testing.assert_allclose(np.asarray(a)[:, :4][mask], np.asarray(b)[mask], atol=1e-5)

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from grpo_jax import logprobs as logprobs_lib
from grpo_jax.logprobs import CHUNK, completion_logprobs, token_logprobs, unembed
from grpo_jax.sharding import MeshConfig, make_mesh
from tests import oracle

PROMPTS = [[3, 4, 5], [6], [7, 8]]
COMPLETIONS = [[9, 1], [2, 3, 4, 1], [10]]
VOCABULARY, WIDTH = 7, 5


@pytest.fixture(scope="module")
def head():
    rng = np.random.default_rng(0)
    return jnp.array(rng.normal(size=(VOCABULARY, WIDTH)), jnp.float32), None, None


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
        p = oracle.softmax(hidden[i, t].astype(np.float64) @ np.asarray(head[0], np.float64).T / temperature)
        np.testing.assert_allclose(logprobs[i, t], np.log(p[tokens[i, t]]), atol=1e-5)
        np.testing.assert_allclose(entropies[i, t], -(p * np.log(p)).sum(), atol=1e-5)


def test_one_temperature_a_row_and_zero_stands_for_one(head):
    hidden, tokens = jax.random.normal(jax.random.key(0), (3, 2, WIDTH)), jnp.ones((3, 2), jnp.int32)
    got = token_logprobs(hidden, head, tokens, jnp.array([0.0, 1.0, 2.0])[:, None])
    for row, temperature in enumerate([1.0, 1.0, 2.0]):
        expected = token_logprobs(hidden[row], head, tokens[row], temperature)
        np.testing.assert_allclose(got[0][row], expected[0], rtol=1e-6)
        np.testing.assert_allclose(got[1][row], expected[1], rtol=1e-6)


def test_impossible_tokens_give_finite_entropies(head):
    bias = jnp.array([0.0, 0.0] + [-jnp.inf] * (VOCABULARY - 2))
    _, entropies = token_logprobs(jnp.zeros((1, WIDTH)), (head[0], bias, None), jnp.zeros(1, jnp.int32))
    np.testing.assert_allclose(entropies, [np.log(2)], rtol=1e-6)


def by_hand(hidden, head, tokens, temperature, mask, of_logprobs, of_entropies):
    """Values, and the gradients of their weighted sum, token by token in float64."""
    kernel, bias, cap = (None if x is None else np.asarray(x, np.float64) for x in head)
    hidden, out = np.asarray(hidden, np.float64), [np.zeros(mask.shape), np.zeros(mask.shape)]
    of_hidden, of_kernel, of_bias = np.zeros(hidden.shape), np.zeros(kernel.shape), np.zeros(len(kernel))
    for at in zip(*np.nonzero(mask), strict=True):
        raw = kernel @ hidden[at] + (0 if bias is None else bias)
        capped = raw if cap is None else cap * np.tanh(raw / cap)
        p = oracle.softmax(capped / temperature[at])
        logs = np.log(p)
        entropy = -(p * logs).sum()
        out[0][at], out[1][at] = logs[tokens[at]], entropy
        grad = of_logprobs[at] * ((np.arange(len(p)) == tokens[at]) - p) - of_entropies[at] * p * (logs + entropy)
        grad = grad / temperature[at] * (1 if cap is None else 1 - (capped / cap) ** 2)
        of_hidden[at] += kernel.T @ grad
        of_kernel += np.outer(grad, hidden[at])
        of_bias += grad
    return out, (of_hidden, of_kernel, of_bias)


MESHES = [None, {}, {"fsdp": 2}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 8}]


@functools.cache
def gradient(mesh, chunk, learns, cap, with_bias):
    """(values, gradients) of a weighted sum, compiled; `learns`: from entropies too."""
    mesh = None if mesh is None else make_mesh(MeshConfig(**dict(mesh)))

    def weighted(hidden, kernel, bias, tokens, temperature, mask, of_logprobs, of_entropies):
        head = kernel, bias if with_bias else None, cap
        out = token_logprobs(hidden, head, tokens, temperature, mask=mask, chunk=chunk, mesh=mesh)
        entropies = out[1] if learns else jax.lax.stop_gradient(out[1])
        return (of_logprobs * out[0]).sum() + (of_entropies * entropies).sum(), out

    return jax.jit(jax.grad(weighted, (0, 1, 2), has_aux=True))


@pytest.fixture
def narrow(monkeypatch):
    """Chunks of 16 ids, so that a small vocabulary has several; the last one overlaps where 16 does not divide."""
    monkeypatch.setattr(logprobs_lib, "_IDS", 16)


@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**31), mesh=st.sampled_from(MESHES), ids=st.sampled_from([40, 41, 44]), learns=st.booleans(),
    cap=st.sampled_from([None, 2.0]), with_bias=st.booleans(), chunk=st.sampled_from([64, 200, 10**6]),
    share=st.sampled_from([0.0, 0.5, 1.0]),
)  # fmt: skip
def test_chunks_are_the_whole(seed, mesh, ids, learns, cap, with_bias, chunk, share):
    rng, (rows, columns) = np.random.default_rng(seed), (8, 5)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    hidden, kernel, bias = normal(rows, columns, WIDTH), normal(ids, WIDTH), normal(ids)
    tokens, mask = rng.integers(0, ids, (rows, columns)), rng.random((rows, columns)) < share
    temperature = rng.choice([0.5, 1.0, 2.0], (rows, columns)).astype(np.float32)
    cotangents = normal(rows, columns), normal(rows, columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs_lib, "_IDS", 16)
        run = gradient(None if mesh is None else tuple(mesh.items()), chunk, learns, cap, with_bias)
        grads, out = run(hidden, kernel, bias, tokens, temperature, mask, *cotangents)
    weights = cotangents[0], cotangents[1] * learns
    expected, of = by_hand(
        hidden, (kernel, bias if with_bias else None, cap), tokens, temperature, mask, *weights
    )  # fmt: skip
    for ours, theirs in zip((*out, *grads[:2]), (*expected, *of[:2]), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    np.testing.assert_allclose(grads[2], of[2] * with_bias, atol=2e-5)


@pytest.mark.parametrize("scale", [1e-4, 30.0, 1e4])
def test_chunks_at_extreme_logits(narrow, scale):
    rng = np.random.default_rng(0)
    hidden, kernel = rng.normal(size=(8, 5, WIDTH)).astype(np.float32), rng.normal(size=(41, WIDTH)).astype(np.float32)
    tokens, ones = rng.integers(0, 41, (8, 5)), np.ones((8, 5), np.float32)
    bias = np.where(np.arange(41) == 7, -np.inf, 0).astype(np.float32)  # of an id that cannot be
    tokens[tokens == 7] = 8
    results = [
        gradient(None, chunk, True, None, True)(hidden * scale, kernel, bias, tokens, ones, ones > 0, ones, ones)
        for chunk in (64, 10**6)
    ]
    for chunked, whole in zip(*map(jax.tree.leaves, results), strict=True):
        assert np.isfinite(chunked).all()
        np.testing.assert_allclose(chunked, whole, rtol=1e-5, atol=1e-5 * np.abs(whole).max())


def test_chunks_in_bfloat16(narrow):
    rng = np.random.default_rng(0)
    hidden = jnp.array(rng.normal(size=(8, 5, 64)), jnp.bfloat16)
    kernel, tokens = rng.normal(size=(41, 64)).astype(np.float32) / 8, rng.integers(0, 41, (8, 5))
    ones, bias = np.ones((8, 5), np.float32), np.zeros(41, np.float32)
    chunked, whole = (
        gradient(None, chunk, True, None, False)(hidden, kernel, bias, tokens, ones, ones > 0, ones, ones)
        for chunk in (64, 10**6)
    )
    assert chunked[0][0].dtype == jnp.bfloat16
    for ours, theirs in zip(*map(jax.tree.leaves, (chunked, whole)), strict=True):
        theirs = np.asarray(theirs, np.float32)
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, atol=1e-2 * max(1, np.abs(theirs).max()))


def test_tokens_that_nobody_asks_for_cost_nothing(narrow):
    """A count below the mask's leaves the last tokens out: what runs is bound by it."""
    rng = np.random.default_rng(0)
    hidden, kernel = rng.normal(size=(8, 5, WIDTH)).astype(np.float32), rng.normal(size=(48, WIDTH)).astype(np.float32)
    tokens, mask = rng.integers(0, 48, (8, 5)), np.arange(40).reshape(8, 5) % 2 == 0
    run = jax.jit(lambda count: token_logprobs(hidden, (kernel, None, None), tokens, mask=mask, count=count, chunk=128))
    whole, _ = run(20)
    np.testing.assert_array_equal(whole != 0, mask)
    some, _ = run(8)  # 128 / 2 logits of 16 ids are 4 tokens at a time
    np.testing.assert_array_equal(some.ravel(), np.where(np.arange(40) < 16, whole.ravel(), 0))


def compiled(rows, ids, sizes=None, columns=1024):
    """Value and gradient of log-probabilities of rows of 1,024 tokens, from abstract arguments."""
    mesh = None if sizes is None else make_mesh(MeshConfig(**sizes))
    place = lambda *axes: None if mesh is None else NamedSharding(mesh, PartitionSpec(*axes))
    shape = lambda dims, dtype, *axes: jax.ShapeDtypeStruct(dims, dtype, sharding=place(*axes))

    def loss(hidden, kernel, tokens, weights):
        logprobs, entropies = token_logprobs(hidden, (kernel, None, None), tokens, mesh=mesh)
        return (weights * logprobs).sum(), jax.lax.stop_gradient(entropies).sum()

    out = None if mesh is None else ((place(), place()), (place("fsdp"), place("tensor", "fsdp")))
    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), out_shardings=out).lower(
        shape((rows, columns, 896), jnp.float32, "fsdp"), shape((ids, 896), jnp.float32, "tensor", "fsdp"),
        shape((rows, columns), jnp.int32, "fsdp"), shape((rows, columns), jnp.float32, "fsdp"),
    ).compile()  # fmt: skip


IDS = 151_936


@pytest.mark.parametrize(("rows", "ids"), [(64, IDS), (128, IDS), (64, 2 * IDS)])
def test_memory_is_two_chunks_whatever_the_batch_and_the_vocabulary(rows, ids):
    assert compiled(rows, ids).memory_analysis().temp_size_in_bytes < 2 * CHUNK * 4


@pytest.mark.parametrize("tokens", [8 * 1024 * 8, 880, 440])  # the last two: what one chunk could hold, and half of it
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"tensor": 8}])
def test_memory_and_collectives_over_a_mesh(sizes, tokens):
    done, matrix = compiled(8, IDS, sizes, tokens // 8), IDS * 896 * 4 // 8
    # Of the matrix, a device's part as the loop wants it, and the part of its gradient.
    assert done.memory_analysis().temp_size_in_bytes < 2 * CHUNK * 4 + matrix
    moved = re.findall(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\(", done.as_text())
    sizes_of = lambda shapes: [
        np.prod([int(n) for n in dims.split(",") if n]) for dims in re.findall(r"\[(.*?)\]", shapes)
    ]
    reduced = [max(sizes_of(shapes)) for shapes, name in moved if name in ("all-reduce", "reduce-scatter")]
    gathered = [max(sizes_of(shapes)) for shapes, name in moved if name == "all-gather"]
    # The matrix is split by ids: its gradient is whole where it is made, and what moves in loops are tokens.
    assert reduced
    assert max(*reduced, *gathered) <= CHUNK // 2 // 4096 * 896


def test_memory_where_one_chunk_is_just_enough():
    """Then it is computed plainly, which holds several copies."""
    assert compiled(1, IDS, columns=CHUNK // 4 // IDS).memory_analysis().temp_size_in_bytes < 2 * CHUNK * 4


def test_unembed_bias_then_soft_cap():
    hidden, kernel = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 1.0], [0.0, 10.0], [-1.0, 0.5]])
    np.testing.assert_allclose(unembed(hidden, (kernel, None, None)), [[5, 20, 0]])
    np.testing.assert_allclose(unembed(hidden, (kernel, jnp.array([1.0, -2.0, 3.0]), None)), [[6, 18, 3]])
    capped = unembed(hidden, (kernel, jnp.array([1.0, -2.0, 3.0]), 6.0))
    np.testing.assert_allclose(capped, [[6 * np.tanh(1), 6 * np.tanh(3), 6 * np.tanh(0.5)]], rtol=1e-6)


def test_unembed_is_float32_of_bfloat16():
    hidden, kernel = jnp.ones((1, 3), jnp.bfloat16), jnp.full((2, 3), 100.5)  # 3 * 100.5 is no bfloat16
    logits = unembed(hidden, (kernel, None, None))
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, [[301.5, 301.5]])


def test_completions_follow_their_prompts(policy, params, logprobs_of):
    logprobs, entropies, aux = logprobs_of(params, *batch())
    hidden_of = jax.jit(policy.hidden)
    kernel = np.asarray(policy.head(params)[0], np.float64).T
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

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.packing import pack
from tests import oracle

pack_rows = jax.jit(pack)
tokens = st.integers(1, 99)
lines = st.tuples(st.lists(tokens, min_size=1, max_size=4), st.lists(tokens, max_size=3))


def test_by_hand():
    prompts, prompt_mask = oracle.pad([[5, 6], [7]], 3, "left")
    completions, mask = oracle.pad([[1, 2], [3]], 2, value=42)
    rows = pack(prompts, prompt_mask, completions, mask)
    np.testing.assert_array_equal(rows.tokens, [[5, 6, 1, 2, 0], [7, 3, 0, 0, 0]])
    np.testing.assert_array_equal(rows.positions, [[0, 1, 2, 3, 0], [0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(rows.segments, [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(rows.predictors, [[1, 2], [0, 1]])
    np.testing.assert_array_equal(rows.completions(rows.tokens[..., None])[..., 0], [[6, 1], [7, 3]])


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("width", [4, 7])
@given(batch=st.lists(lines, min_size=3, max_size=3))
def test_rows_are_contiguous_whatever_the_padding(batch, width, side):
    prompts, prompt_mask = oracle.pad([prompt for prompt, _ in batch], width, side, value=77)
    completions, mask = oracle.pad([completion for _, completion in batch], 3, value=88)
    rows = pack_rows(prompts, prompt_mask, completions, mask)
    expected, real = oracle.pad([prompt + completion for prompt, completion in batch], width + 3)
    np.testing.assert_array_equal(rows.tokens, expected)
    np.testing.assert_array_equal(rows.segments, real)
    np.testing.assert_array_equal(rows.positions, np.where(real, np.arange(width + 3), 0))
    for (prompt, completion), predictors in zip(batch, rows.predictors, strict=True):
        ahead = np.array(prompt + completion)[predictors[: len(completion)]].tolist()
        assert ahead == (prompt + completion)[len(prompt) - 1 : -1]


def test_completions_gathers_along_columns():
    prompts, prompt_mask = oracle.pad([[5, 6, 7], [8]], 3)
    rows = pack(prompts, prompt_mask, *oracle.pad([[1], [2]], 1))
    values = jnp.arange(2 * 4 * 2).reshape(2, 4, 2)
    np.testing.assert_array_equal(rows.completions(values), [[[4, 5]], [[8, 9]]])

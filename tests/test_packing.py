import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.packing import pack
from tests import oracle

pack_rows = jax.jit(pack, static_argnames="slots")
tokens = st.integers(1, 99)
lines = st.tuples(st.lists(tokens, min_size=1, max_size=4), st.lists(tokens, max_size=3))


def test_one_completion_a_row_by_hand():
    prompts, prompt_mask = oracle.pad([[5, 6], [7]], 3, "left")
    completions, mask = oracle.pad([[1, 2], [3]], 2, value=42)
    rows = pack(prompts, prompt_mask, completions, mask, jnp.array([0.5, 2.0]))
    np.testing.assert_array_equal(rows.tokens, [[5, 6, 1, 2, 0], [7, 3, 0, 0, 0]])
    np.testing.assert_array_equal(rows.positions, [[0, 1, 2, 3, 0], [0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(rows.segments, [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(rows.targets, [[1, 2], [3, 0]])
    np.testing.assert_array_equal(rows.predictors, [[1, 2], [0, 0]])
    np.testing.assert_array_equal(rows.mask, mask)
    np.testing.assert_array_equal(rows.temperature, [[0.5, 0.5], [2, 1]])
    np.testing.assert_array_equal(rows.members, [[0], [1]])


def test_several_a_row_by_hand():
    """Longest first: completion 2 of 4 tokens, then 0 of 3, for which row 0 has no room, then 3 in the row of 0."""
    prompts, prompt_mask = oracle.pad([[5, 6], [7], [8], [9]], 2, "left")
    completions, mask = oracle.pad([[1], [], [2, 3, 4], [7]], 3, value=42)
    rows = pack(prompts, prompt_mask, completions, mask, slots=2)
    np.testing.assert_array_equal(rows.tokens, [[8, 2, 3, 4, 0], [5, 6, 1, 9, 7], [0] * 5, [0] * 5])
    np.testing.assert_array_equal(rows.positions, [[0, 1, 2, 3, 0], [0, 1, 2, 0, 1], [0] * 5, [0] * 5])
    np.testing.assert_array_equal(rows.segments, [[1, 1, 1, 1, 0], [1, 1, 1, 2, 2], [0] * 5, [0] * 5])
    np.testing.assert_array_equal(rows.targets, [[2, 3, 4], [1, 7, 0], [0] * 3, [0] * 3])
    np.testing.assert_array_equal(rows.predictors, [[0, 1, 2], [1, 3, 0], [0] * 3, [0] * 3])
    np.testing.assert_array_equal(rows.members, [[2, 4], [0, 3], [4, 4], [4, 4]])
    np.testing.assert_array_equal(rows.starts, [[0, 3], [0, 1], [0, 0], [0, 0]])
    values = jnp.array([[10.0, 11, 12], [20, 21, 0], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(rows.unpack(values, mask), [[20, 0, 0], [0, 0, 0], [10, 11, 12], [21, 0, 0]])
    slots, there = rows.slots(values), rows.of_members(jnp.asarray(mask))
    np.testing.assert_array_equal(
        np.where(there, slots, 0), [[10, 11, 12], [0] * 3, [20, 0, 0], [21, 0, 0], *[[0] * 3] * 4]
    )
    np.testing.assert_array_equal(rows.of_members(jnp.arange(1.0, 5)), [3, 0, 1, 4, 0, 0, 0, 0])


@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize(("width", "side"), [(4, "left"), (7, "right"), (5, "both")])
@given(batch=st.lists(lines, min_size=5, max_size=5))
def test_every_completion_is_found_again(batch, width, side, slots):
    """Each once, whole, behind its prompt, in a row that starts with real tokens and has no hole; few rows."""
    prompts, prompt_mask = oracle.pad([prompt for prompt, _ in batch], width, side, value=77)
    completions, mask = oracle.pad([completion for _, completion in batch], 3, value=88)
    rows = jax.device_get(pack_rows(prompts, prompt_mask, completions, mask, np.arange(1.0, 6), slots=slots))
    seen, used = [], 0
    for r in range(5):
        length, targets = int((rows.segments[r] > 0).sum()), int(rows.mask[r].sum())
        assert (rows.segments[r, :length] > 0).all()
        assert rows.mask[r, :targets].all()
        assert not rows.tokens[r, length:].any()
        members = [int(m) for m in rows.members[r] if m < 5]
        used += bool(members)
        assert slots > 1 or members in ([], [r])
        column, target = 0, 0
        for segment, b in enumerate(members, 1):
            prompt, completion = batch[b]
            line, n, c = prompt + completion, len(prompt + completion), len(completion)
            assert rows.tokens[r, column : column + n].tolist() == line
            assert rows.positions[r, column : column + n].tolist() == list(range(n))
            assert rows.segments[r, column : column + n].tolist() == [segment] * n
            assert rows.targets[r, target : target + c].tolist() == completion
            assert rows.tokens[r, rows.predictors[r, target : target + c]].tolist() == line[len(prompt) - 1 : -1]
            assert rows.temperature[r, target : target + c].tolist() == [b + 1] * c
            column, target = column + n, target + c
            seen.append(b)
        assert (column, target) == (length, targets)
    assert sorted(seen) == [b for b, (_, completion) in enumerate(batch) if completion]
    expected = oracle.first_fit([(len(p) + len(c), len(c)) for p, c in batch if c], (width + 3, 3), slots)
    assert used == (len(seen) if slots == 1 else expected)
    values = jnp.where(rows.mask, rows.targets * 0.5, -1.0)
    np.testing.assert_array_equal(rows.unpack(values, mask), np.where(mask, completions * 0.5, 0))


def test_what_is_asked_of_a_slot_has_a_gradient():
    prompts, prompt_mask = oracle.pad([[5], [7]], 1)
    completions, mask = oracle.pad([[1, 2], [3]], 4)
    rows = pack(prompts, prompt_mask, completions, mask, slots=2)
    weights = jnp.where(rows.of_members(jnp.asarray(mask)), jnp.arange(1.0, 17).reshape(4, 4), 0)
    gradient = jax.grad(lambda values: (weights * rows.slots(values)).sum())(jnp.zeros((2, 4)))
    np.testing.assert_array_equal(gradient, [[1, 2, 5, 0], [0, 0, 0, 0]])


def test_packing_saves_most_of_short_completions():
    """Lengths of the geometric distribution of mean T / 4: within a tenth of as few rows as hold all tokens."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.geometric(1 / 128, 256), 512)
    mask = np.arange(512) < lengths[:, None]
    ones = np.ones((256, 64), np.int32)
    rows = pack_rows(ones, ones > 0, mask.astype(np.int32), mask, slots=16)
    used = int((rows.members[:, 0] < 256).sum())
    assert used <= 1.1 * (lengths + 64).sum() / 576

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.metrics import EffectiveSampleSize, Max, Mean, add, empty, finalize, masked_mean, merge

VALUES = np.array([3.0, -1, 4, 1, -5, 9, 2, -6], np.float32)  # whole numbers: sums are exact in any order


@given(mask=st.lists(st.booleans(), min_size=8, max_size=8), parts=st.sampled_from([1, 2, 4, 8]))
def test_merge_does_not_depend_on_the_cut(mask, parts):
    mask = np.array(mask)
    cut = [masked_mean(v, m) for v, m in zip(VALUES.reshape(parts, -1), mask.reshape(parts, -1), strict=True)]
    stacked = Mean(total=jnp.stack([c.total for c in cut]), count=jnp.stack([c.count for c in cut]))
    tops = Max(top=jnp.array([v.max() for v in VALUES.reshape(parts, -1)]))
    got = finalize(merge({"mean": stacked, "max": tops}))
    assert got["mean"] == (np.float32(VALUES[mask].sum()) / np.float32(mask.sum()) if mask.any() else 0)
    assert got["max"] == 9


def test_merge_weighs_by_count_and_not_by_part():
    parts = Mean(total=jnp.array([10.0, 1.0]), count=jnp.array([10.0, 0.5]))
    assert merge({"m": parts})["m"].value() == pytest.approx(11 / 10.5)


@pytest.mark.parametrize("outside", [np.nan, np.inf, -np.inf, 1e30])
def test_masked_mean_ignores_what_is_outside(outside):
    mean = masked_mean(jnp.array([[1.0, outside], [4.0, outside]]), jnp.array([[True, False], [True, False]]))
    assert (mean.total, mean.count, mean.value()) == (5, 2, 2.5)


def test_masked_mean_of_booleans():
    assert masked_mean(jnp.array([True, False, True]), jnp.array([True, True, False])).value() == 0.5


def test_nothing_counted_is_zero():
    assert masked_mean(jnp.full(3, jnp.nan), jnp.zeros(3, bool)).value() == 0


def test_effective_sample_size():
    """Of weights 1, 1, 4 it is 36 / (3 x 18); two parts are one."""
    part = lambda *w: EffectiveSampleSize(
        total=jnp.float32(sum(w)), squares=jnp.float32(sum(x * x for x in w)), count=jnp.float32(len(w))
    )
    assert part(1, 1, 4).value() == pytest.approx(2 / 3)
    assert part(3, 3).value() == 1
    assert part().value() == 0
    assert add({"a": part(1, 4)}, {"a": part(1)})["a"].value() == pytest.approx(2 / 3)


def test_what_adds_nothing():
    metrics = {
        "a": Mean(total=jnp.float32(3), count=jnp.float32(2)),
        "b": Max(top=jnp.float32(-7)),
        "c": EffectiveSampleSize(total=jnp.float32(3), squares=jnp.float32(5), count=jnp.float32(2)),
    }
    assert finalize(add(empty(metrics), metrics)) == finalize(metrics)

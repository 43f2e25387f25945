"""Published shapes have the published numbers of parameters."""

import jax
import pytest

from grpo_jax.models.shapes import SHAPES, shape
from grpo_jax.models.transformer import abstract_params

# Of the safetensors that the models' pages count (Qwen2.5, Llama 3, Llama 3.2, Qwen3 from 8B; tied tables once), or of
# the cards' tables in billions, all parameters and those that are in no table (Qwen3 below 8B), or the technical
# report's, arXiv 2503.19786, table 1, in millions: the table of 262,144 ids, and the rest (Gemma 3).
COUNTED = {
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512, "qwen2.5-14b": 14_770_033_664, "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648, "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824, "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264,
}  # fmt: skip
BILLIONS = {"qwen3-0.6b": (0.6, 0.44), "qwen3-1.7b": (1.7, 1.4), "qwen3-4b": (4.0, 3.6)}
MILLIONS = {
    "gemma-3-1b": (302, 698),
    "gemma-3-4b": (675, 3209),
    "gemma-3-12b": (1012, 10_759),
    "gemma-3-27b": (1416, 25_600),
}


def counts(name):
    """All parameters, and those that are in no table of ids."""
    shapes = abstract_params(shape(name))[0]
    tables = sum(shapes[table].size for table in ("embedding", "head") if table in shapes)
    return (every := sum(x.size for x in jax.tree.leaves(shapes))), every - tables


@pytest.mark.parametrize("name", SHAPES)
def test_parameters(name):
    every, body = counts(name)
    if name in COUNTED:
        assert every == COUNTED[name]
    elif name in BILLIONS:
        assert (round(every / 1e9, 1), round(body / 1e9, 2 if name == "qwen3-0.6b" else 1)) == BILLIONS[name]
    else:
        table, rest = MILLIONS[name]
        assert body / 1e6 == pytest.approx(rest, rel=2e-3)
        assert (every - body) / 1e6 == pytest.approx(table, rel=1e-2)


def test_what_is_no_shape():
    with pytest.raises(ValueError, match=r"'llama-4' is no published shape .*qwen2\.5-0\.5b, "):
        shape("llama-4")

"""That every field of the decoder's configuration changes the program, and what is refused."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import pytest

from grpo_jax.models.transformer import TransformerConfig, abstract_params, make_policy
from tests.decoders import EVERYTHING, program, traced

OTHER = {
    "vocab_size": 25, "layers": 4, "width": 24, "heads": 2, "kv_heads": 4, "head_width": 4, "mlp_width": 16,
    "rope_base": 100.0, "norm_epsilon": 1e-3, "compute_dtype": "bfloat16", "sampler_dtype": "int8",
    "attention": "splash", "remat": "full", "score": True,
    "tied": True, "scale_embedding": False, "qkv_bias": False, "qk_norm": False, "post_norms": False,
    "unit_offset": False, "activation": "silu", "query_scale": 0, "attention_cap": 0.0, "logit_cap": 0.0,
    "windows": (3, 0), "window_rope_base": 0.0, "rope_factor": 4.0, "rope_low_factor": 0.5, "rope_high_factor": 8.0,
    "rope_length": 32,
}  # fmt: skip


def sampler_program(config):
    policy, (shapes, _) = make_policy(config), abstract_params(config)

    def step(params):
        one = jnp.zeros((1, 1, 1), jnp.int32)
        return policy.extend(policy.prepare(params), one, one, policy.init_cache(1, 1, 4), 0, jnp.zeros((1, 1, 4)))

    return jax.jit(step).lower(shapes).as_text()


def test_every_field_changes_the_program():
    before = program(EVERYTHING)
    assert program(dataclasses.replace(EVERYTHING)) == before  # and nothing else does
    for field, value in OTHER.items():
        after = dataclasses.replace(EVERYTHING, **{field: value})
        if field == "sampler_dtype":
            assert sampler_program(after) != sampler_program(EVERYTHING)
        elif field in ("attention", "remat"):  # splash is lowered for TPUs alone; remat is of gradients, see below
            assert str(traced(after).jaxpr) != str(traced(EVERYTHING).jaxpr), field
        else:
            assert program(after) != before, field
    assert set(OTHER) == {field.name for field in dataclasses.fields(TransformerConfig)}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"heads": 4, "kv_heads": 3}, "multiple of kv_heads=3"),
        ({"head_width": 5}, "head_width=5 must be even"),
        ({"compute_dtype": "float16"}, "compute_dtype='float16'"),
        ({"sampler_dtype": "int4"}, "sampler_dtype='int4'"),
        ({"layers": 0}, "^layers=0 must be 1 or more"),
        ({"remat": True}, "remat=True must be 'none', 'dots' or 'full'; True was what is 'full' now"),
        ({"remat": "False"}, "remat='False' must be"),
        ({"activation": "relu"}, r"activation='relu' must be one of \['gelu', 'silu'\]"),
        ({"windows": ()}, r"windows=\(\) must be numbers of tokens"),
        ({"windows": (4, -1)}, r"windows=\(4, -1\) must be"),
        ({"rope_low_factor": 4.0, "rope_high_factor": 1.0, "rope_length": 8}, "rope_high_factor=1.0 above it"),
        ({"rope_low_factor": 1.0, "rope_high_factor": 4.0}, "rope_length=0 above 0"),
    ],
)
def test_config_errors(options, match):
    with pytest.raises(ValueError, match=match):
        TransformerConfig(vocab_size=20, **options)


def test_int8_without_qwix(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ValueError, match=r"\.\[int8\]"):
        dataclasses.replace(config, sampler_dtype="int8")

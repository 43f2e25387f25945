"""config.json of published models, by hand; features that are refused by name; written and read again."""

import dataclasses
import math

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.models.families import PretrainedError, differences, parse_config, write_config
from grpo_jax.models.transformer import TransformerConfig, abstract_params
from tests.decoders import FAMILIES

# As published on the hub, the old spelling, with what is read there and what must not disturb.
PUBLISHED = {
    "Qwen2.5-0.5B": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
        "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2",
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1", "use_cache": True, "use_mrope": False, "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
        "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960,
        "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "Llama-3.2-1B": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
    },
    "gemma-2-2b": {
        "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
        "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "initializer_range": 0.02,
        "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8,
        "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0, "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "torch_dtype": "float32",
        "transformers_version": "4.42.4", "use_cache": True, "vocab_size": 256000,
    },
    "gemma-3-1b-pt": {
        "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
        "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152, "initializer_range": 0.02, "intermediate_size": 6912, "max_position_embeddings": 32768,
        "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
        "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "use_cache": True, "vocab_size": 262144,
    },
}  # fmt: skip
GEMMA = {"post_norms": True, "unit_offset": True, "activation": "gelu", "query_scale": 256, "head_width": 256}
READ = {
    "Qwen2.5-0.5B": TransformerConfig(
        vocab_size=151_936, layers=24, width=896, heads=14, kv_heads=2, head_width=64, mlp_width=4864, rope_base=1e6,
        scale_embedding=False, qkv_bias=True,
    ),
    "Qwen3-0.6B": TransformerConfig(
        vocab_size=151_936, layers=28, width=1024, heads=16, kv_heads=8, head_width=128, mlp_width=3072, rope_base=1e6,
        scale_embedding=False, qk_norm=True,
    ),
    "Llama-3.2-1B": TransformerConfig(
        vocab_size=128_256, layers=16, width=2048, heads=32, kv_heads=8, head_width=64, mlp_width=8192, rope_base=5e5,
        norm_epsilon=1e-5, scale_embedding=False, rope_factor=32.0, rope_low_factor=1.0, rope_high_factor=4.0,
        rope_length=8192,
    ),
    "gemma-2-2b": TransformerConfig(
        vocab_size=256_000, layers=26, width=2304, heads=8, kv_heads=4, mlp_width=9216, windows=(4096, 0),
        attention_cap=50.0, logit_cap=30.0, **GEMMA,
    ),
    "gemma-3-1b-pt": TransformerConfig(
        vocab_size=262_144, layers=26, width=1152, heads=4, kv_heads=1, mlp_width=6912, rope_base=1e6, qk_norm=True,
        windows=(512, 512, 512, 512, 512, 0), window_rope_base=1e4, **GEMMA,
    ),
}  # fmt: skip
PARAMETERS = {
    "Qwen2.5-0.5B": 494_032_768, "Qwen3-0.6B": 596_049_920, "Llama-3.2-1B": 1_235_814_400,
    "gemma-2-2b": 2_614_341_888, "gemma-3-1b-pt": 999_885_952,
}  # fmt: skip
QWEN, LLAMA, GEMMA3 = PUBLISHED["Qwen2.5-0.5B"], PUBLISHED["Llama-3.2-1B"], PUBLISHED["gemma-3-1b-pt"]


def without(raw, *names):
    return {name: value for name, value in raw.items() if name not in names}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name):
    config = parse_config(PUBLISHED[name])
    assert config == READ[name]
    shapes, _ = abstract_params(config)
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == PARAMETERS[name]
    # What their classes have by default need not be written; architectures neither, where model_type is.
    defaults = {
        "architectures", "rope_scaling", "hidden_act", "hidden_activation", "rope_local_base_freq",
        "sliding_window_pattern", "final_logit_softcapping", "query_pre_attn_scalar", "attention_bias", "mlp_bias",
    }  # fmt: skip
    needed = {"rope_scaling"} if name == "Llama-3.2-1B" else {"final_logit_softcapping"} if "gemma" in name else set()
    assert parse_config(without(PUBLISHED[name], *defaults - needed)) == READ[name]


def test_windows_of_qwen():
    of = lambda **changes: parse_config({**QWEN, "sliding_window": 64, "num_hidden_layers": 6, **changes}).windows
    assert of(max_window_layers=4) == (0,)
    assert of(use_sliding_window=True, max_window_layers=4) == (0, 0, 0, 0, 64, 64)
    assert of(use_sliding_window=True, max_window_layers=0) == (64,)
    assert of(use_sliding_window=True, layer_types=["sliding_attention", "full_attention"] * 3) == (64, 0)
    assert of(use_sliding_window=True, sliding_window=None) == (0,)


def test_rotary_positions_old_and_new():
    rope = lambda raw, **changes: {
        name: value for name, value in dataclasses.asdict(parse_config({**raw, **changes})).items() if "rope" in name
    }
    scaling = LLAMA["rope_scaling"]
    new = without(LLAMA, "rope_scaling", "rope_theta")
    assert rope(new, rope_parameters={**scaling, "rope_theta": 5e5}) == rope(LLAMA)
    older = {**without(scaling, "rope_type"), "type": "llama3"}
    assert rope(LLAMA, rope_scaling=older) == rope(LLAMA)
    linear = rope(QWEN, rope_scaling={"type": "linear", "factor": 4})
    assert linear == {**rope(QWEN), "rope_factor": 4.0}
    by_kind = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    assert rope(without(GEMMA3, "rope_theta", "rope_local_base_freq"), rope_parameters=by_kind) == {
        **rope(GEMMA3), "rope_factor": 8.0, "window_rope_base": 2e4,
    }  # fmt: skip
    same = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    assert rope(without(QWEN, "rope_theta"), rope_parameters=same) == rope(QWEN)


LAYER_TYPES = ["full_attention"] * 24


@pytest.mark.parametrize(
    ("raw", "changes", "match"),
    [
        (QWEN, {"architectures": ["Qwen2ForTokenClassification"]},
         r"architectures=\['Qwen2ForTokenClassification'\] of model_type='qwen2' .*Qwen2ForCausalLM"),
        (QWEN, {"architectures": None, "model_type": "gpt2"}, r"architectures=\[\] of model_type='gpt2'"),
        (QWEN, {"architectures": ["Gemma3ForConditionalGeneration"]}, "Gemma3ForConditionalGeneration"),
        (QWEN, {"hidden_size": None, "vocab_size": "many"}, "vocab_size, hidden_size missing: expected whole numbers"),
        (LLAMA, {"attention_bias": True}, "attention_bias=True is not supported"),
        (QWEN, {"tie_word_embeddings": "no"}, "tie_word_embeddings='no' must be true or false"),
        (GEMMA3, {"query_pre_attn_scalar": 168.5}, "query_pre_attn_scalar=168.5 must be a whole number"),
        (GEMMA3, {"query_pre_attn_scalar": "256"}, "query_pre_attn_scalar='256' must be a whole number"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias=True is not supported"),
        (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        (QWEN, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config={'quant_method': 'gptq'}"),
        (QWEN, {"hidden_act": "relu"}, r"activation 'relu' is not supported: \['gelu_pytorch_tanh', 'silu'\] are"),
        (GEMMA3, {"hidden_activation": "gelu"}, "activation 'gelu' is not supported"),
        (QWEN, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type='yarn' is not supported"),
        (QWEN, {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "rope_type='dynamic' is not supported"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs 'low_freq_factor', which is missing"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1"),
        (GEMMA3, {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
         "rope_type='linear' of sliding_attention"),
        (QWEN, {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
         "sliding_attention that differ from full_attention are not supported in qwen2"),
        (QWEN, {"use_sliding_window": True, "layer_types": LAYER_TYPES[1:]}, "for each of 24 layers"),
        (QWEN, {"use_sliding_window": True, "layer_types": ["linear_attention", *LAYER_TYPES[1:]]}, "layer_types="),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is not supported for gemma3_text"),
        (QWEN, {"num_key_value_heads": 4}, "heads=14 must be a multiple of kv_heads=4"),
        (LLAMA, {"rms_norm_eps": "small"}, "could not convert string to float: 'small'"),
    ],
)  # fmt: skip
def test_refused(raw, changes, match):
    with pytest.raises(PretrainedError, match=match):
        parse_config({**raw, **changes})


# Written and read -----------------------------------------------------------------------------------


@st.composite
def configs(draw):
    """Any model that some family has."""
    name = draw(st.sampled_from(list(FAMILIES)))
    kv_heads, gemma = draw(st.integers(1, 4)), name.startswith("gemma")
    positive = st.floats(1.0, 1e6)
    fields = {
        "vocab_size": draw(st.integers(1, 10**6)), "layers": draw(st.integers(1, 13)),
        "width": draw(st.integers(1, 4096)), "kv_heads": kv_heads, "heads": kv_heads * draw(st.integers(1, 5)),
        "head_width": 2 * draw(st.integers(1, 200)), "mlp_width": draw(st.integers(1, 10**5)),
        "rope_base": draw(positive), "norm_epsilon": draw(st.floats(1e-8, 1e-2)), "tied": draw(st.booleans()),
        "activation": draw(st.sampled_from(["silu", "gelu"])), "rope_factor": draw(st.just(1.0) | positive),
    }  # fmt: skip
    if draw(st.booleans()):
        fields |= {
            "rope_factor": draw(st.floats(1.5, 64)), "rope_low_factor": 1.5, "rope_high_factor": draw(st.floats(2, 9)),
            "rope_length": draw(st.integers(1, 10**5)),
        }  # fmt: skip
    if gemma:
        fields |= {"query_scale": draw(st.integers(1, 999)), "logit_cap": draw(st.just(0.0) | positive)}
    if name == "gemma2":
        fields |= {"attention_cap": draw(st.just(0.0) | positive)}
    if name == "gemma3":
        fields |= {"window_rope_base": draw(positive)}
    if name != "llama":
        window = draw(st.integers(1, 9999))
        full = draw(st.integers(0, fields["layers"]))
        fields["windows"] = draw(st.sampled_from([(0,), (window,), (window, 0), (0,) * full + (window,)]))
    off = {"windows": (0,), "rope_low_factor": 0.0, "rope_high_factor": 0.0, "rope_length": 0}
    return dataclasses.replace(FAMILIES[name], **{**off, **fields})


@given(configs())
def test_what_is_written_is_read(config):
    again = parse_config(write_config(config))
    assert differences(config, again) == []
    assert parse_config(write_config(again)) == again
    windows = lambda config: [config.windows[i % len(config.windows)] for i in range(config.layers)]
    assert windows(config) == windows(again)
    assert len(again.windows) <= len(config.windows)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_written_as_itself(family):
    raw = write_config(FAMILIES[family])
    assert raw["model_type"].startswith({"gemma3": "gemma3_text"}.get(family, family))
    assert parse_config(raw) == FAMILIES[family]
    with pytest.raises(PretrainedError, match=r"no family among llama, .* qwen2: \{'scale_embedding': False, 'qkv_bia"):
        write_config(dataclasses.replace(FAMILIES[family], qkv_bias=True, qk_norm=True))


def test_differences():
    config = FAMILIES["gemma2"]
    run = dataclasses.replace(config, compute_dtype="bfloat16", attention="splash", remat="full")
    assert differences(config, run) == []
    assert differences(config, dataclasses.replace(config, windows=(4, 0, 4, 0))) == []
    assert differences(config, dataclasses.replace(config, windows=(4, 0, 0, 0))) == [
        "windows: here (4, 0, 4, 0, 4), there (4, 0, 0, 0, 4)"
    ]
    default = dataclasses.replace(config, query_scale=0)
    assert differences(default, dataclasses.replace(config, query_scale=8)) == []
    assert differences(default, config) == ["query_scale: here 8, there 11"]
    assert write_config(default)["query_pre_attn_scalar"] == 8

"""The decoder against an independent implementation, where PyTorch and transformers are installed (`.[parity]`)."""

import jax
import numpy as np
import pytest

from grpo_jax.logprobs import unembed
from grpo_jax.models.transformer import TransformerConfig, init_params, make_policy

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def test_logits_equal_those_of_a_llama_with_the_same_weights():
    config = TransformerConfig(vocab_size=24, layers=2, width=32, heads=4, kv_heads=2, head_width=8, mlp_width=48)
    policy, params = make_policy(config), init_params(config, jax.random.key(0))
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=24, num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, intermediate_size=48, rms_norm_eps=config.norm_epsilon, tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
        )
    ).eval()  # fmt: skip
    embedding = params["embedding"]
    weights = {"model.embed_tokens": embedding * 32**0.5, "lm_head": embedding, "model.norm": params["norm"]}
    names = {
        "query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj",
        "output": "self_attn.o_proj",
        "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
        "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    }  # fmt: skip
    for ours, theirs in names.items():
        for i, leaf in enumerate(np.asarray(params["layers"][ours])):
            inputs = 48 if ours == "down" else 32
            matrix = leaf if leaf.ndim == 1 else leaf.reshape(inputs, -1).T  # theirs are (out, in)
            weights[f"model.layers.{i}.{theirs}"] = matrix
    state = {f"{name}.weight": torch.tensor(np.array(value)) for name, value in weights.items()}
    missing, unexpected = llama.load_state_dict(state, strict=False)
    assert not unexpected
    assert not missing

    tokens = np.random.default_rng(0).integers(0, 24, (3, 9))
    positions = np.broadcast_to(np.arange(9), (3, 9))
    hidden, _ = policy.hidden(params, tokens, positions, np.ones((3, 9), np.int32))
    with torch.no_grad():
        theirs = llama(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(unembed(hidden, policy.head(params)), theirs, atol=1e-4)

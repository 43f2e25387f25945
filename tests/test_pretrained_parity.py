"""Hugging Face directories written by `transformers`, read, computed with and written again (`.[parity]`)."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from grpo_jax.logprobs import unembed
from grpo_jax.models.pretrained import load, read_config, save
from grpo_jax.models.transformer import TransformerConfig, make_policy
from grpo_jax.sampling import generate
from grpo_jax.sharding import make_mesh
from grpo_jax.types import Policy, PyTree, SamplingParams
from tests import oracle

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # several wait for one another longer than such small products take

SIZES = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
GEMMA3 = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
FAMILIES = {
    "llama3": ("Llama", {"num_hidden_layers": 3, "rope_parameters": LLAMA3, "max_position_embeddings": 128}),
    "llama tied": ("Llama", {"num_hidden_layers": 2, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"num_hidden_layers": 3, "tie_word_embeddings": True}),
    "qwen2 untied": ("Qwen2", {"num_hidden_layers": 2, "tie_word_embeddings": False}),
    "qwen2 windows": ("Qwen2", {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 4,
                                "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"num_hidden_layers": 3, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {"num_hidden_layers": 5, "sliding_window": 4, "query_pre_attn_scalar": 11,
                          "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3", {"num_hidden_layers": 8, "sliding_window": 4, "query_pre_attn_scalar": 11,
                          "rope_parameters": GEMMA3}),
}  # fmt: skip
LINES = [[5, 9, 33, 12, 7, 8, 9, 40, 41, 3, 4, 4], [10, 11, 12], [20, 21, 22, 23, 24, 25, 47]]


def make(directory, family, dtype=torch.float32):
    """A small model with random numbers in every tensor, as `transformers` saves it."""
    name, options = FAMILIES[family]
    config_name = f"{name}TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, config_name)(**{**SIZES, **options})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Norms too: the scales they begin with hide whether they are used.
            around = 1.0 if "norm" in parameter_name and "Gemma" not in name else 0.0
            parameter.copy_(around + torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.15))
    model.to(dtype).save_pretrained(directory)
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """A model of theirs, and the same in ours."""

    directory: pathlib.Path
    model: Any
    config: TransformerConfig
    policy: Policy
    params: PyTree


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    @functools.cache
    def of(family):
        directory = tmp_path_factory.mktemp(family.replace(" ", "_"))
        model, config = make(directory, family), read_config(directory)
        return Saved(
            directory=directory, model=model, config=config, policy=make_policy(config),
            params=load(directory, make_mesh()),
        )  # fmt: skip

    return of


def their_logits(model, line):
    with torch.no_grad():
        return model(torch.tensor([line])).logits[0].float().numpy()


def their_greedy(model, lines, tokens):
    """Greedy continuations of a left-padded batch."""
    prompts, mask = oracle.pad(lines, max(map(len, lines)), "left")
    out = model.generate(
        torch.tensor(np.asarray(prompts)), attention_mask=torch.tensor(np.asarray(mask, np.int64)), do_sample=False,
        max_new_tokens=tokens, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return out[:, prompts.shape[1] :].numpy()


sample = jax.jit(generate, static_argnums=0, static_argnames=("group_size", "max_tokens"))


def our_greedy(policy, params, lines, tokens, side):
    prompts, mask = (jnp.asarray(x) for x in oracle.pad(lines, max(map(len, lines)) + 2, side))
    greedy = sample(
        policy, params, prompts, mask, jnp.arange(len(lines)), jax.random.key(0), group_size=1, max_tokens=tokens,
        eos_ids=jnp.array([2]), pad_id=0, sampling=SamplingParams(temperature=0.0),
    )  # fmt: skip
    return np.asarray(greedy.completion_tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family, saved):
    one = saved(family)
    tokens, real = oracle.pad(LINES, 16)
    positions = np.where(real, np.arange(16), 0)
    hidden, _ = jax.jit(one.policy.hidden)(one.params, tokens, positions, real.astype(np.int32))
    logits = unembed(hidden, one.policy.head(one.params))
    for i, line in enumerate(LINES):
        np.testing.assert_allclose(logits[i, : len(line)], their_logits(one.model, line), atol=1e-4)


@pytest.mark.parametrize("family", ["llama3", "qwen2", "qwen2 windows", "qwen3", "gemma2", "gemma3"])
def test_greedy_continuations(family, saved):
    one = saved(family)
    theirs = their_greedy(one.model, LINES, 12)
    for side in ("left", "right"):
        ours = our_greedy(one.policy, one.params, LINES, 12, side)
        np.testing.assert_array_equal(ours[:, : theirs.shape[1]], theirs)


@pytest.mark.parametrize(
    ("family", "config_from"), [*((family, "anew") for family in FAMILIES), ("qwen2", "source"), ("gemma3", "source")]
)
def test_round_trip(family, config_from, saved, tmp_path):
    """Loaded and saved: `transformers` finds every tensor, none too many, and the same model."""
    one = saved(family)
    source = one.directory if config_from == "source" else None
    save(tmp_path / "out", one.params, one.config, source=source, shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    before = load_file(one.directory / "model.safetensors")
    weight_map = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(weight_map) == set(before)
    files = {file: load_file(tmp_path / "out" / file) for file in set(weight_map.values())}
    for name, file in weight_map.items():
        np.testing.assert_array_equal(files[file][name], before[name])
    theirs, said = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(theirs) is type(one.model)
    assert not any(said.values()), said
    np.testing.assert_array_equal(their_logits(theirs.eval(), LINES[0]), their_logits(one.model, LINES[0]))


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_bfloat16_checkpoint(family, tmp_path):
    model = make(tmp_path / "in", family, torch.bfloat16)
    config = read_config(tmp_path / "in", compute_dtype="bfloat16")
    params = load(tmp_path / "in", make_mesh(), dtype=None)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    policy = make_policy(config)
    line = np.array([LINES[0]])
    hidden, _ = jax.jit(policy.hidden)(params, line, np.arange(line.size)[None], np.ones_like(line))
    logits = unembed(hidden, policy.head(params))[0]
    exact = their_logits(model.float(), LINES[0])
    model.to(torch.bfloat16)
    theirs = np.abs(their_logits(model, LINES[0]) - exact).max()
    assert np.abs(logits - exact).max() < max(2 * theirs, 0.02)  # as far from float32 as PyTorch's own bfloat16
    # Through float32 and back nothing is lost.
    wide = load(tmp_path / "in", make_mesh())
    assert {x.dtype for x in jax.tree.leaves(wide)} == {jnp.dtype("float32")}
    save(tmp_path / "out", wide, config, source=tmp_path / "in", dtype="bfloat16")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys()
    assert all((before[name].view(np.uint16) == after[name].view(np.uint16)).all() for name in before)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def old_spelling(raw):
    """config.json as `transformers` 4 wrote it."""
    raw = dict(raw)
    raw["torch_dtype"] = raw.pop("dtype")
    rope = raw.pop("rope_parameters")
    raw.pop("layer_types", None)
    if "full_attention" in rope:
        raw["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
        raw["sliding_window_pattern"] = 6
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return raw


@pytest.mark.parametrize("family", FAMILIES)
def test_old_and_new_spelling(family, saved, tmp_path):
    one = saved(family)
    raw = json.loads((one.directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(old_spelling(raw)))
    assert read_config(tmp_path) == one.config

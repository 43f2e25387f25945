"""ForSequenceClassification directories written by `transformers`: read, scored and written again (`.[parity]`)."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from grpo_jax.models.pretrained import PretrainedError, load, read_config, save
from grpo_jax.models.transformer import make_policy
from grpo_jax.reward_model import scores
from grpo_jax.sharding import make_mesh
from tests import oracle
from tests.test_pretrained_parity import FAMILIES as LANGUAGE_MODELS
from tests.test_pretrained_parity import LINES, SIZES, torch, transformers

FAMILIES = ("llama3", "llama tied", "qwen2", "qwen2 windows", "qwen3", "gemma2", "gemma3")


def make(directory, family, labels=1):
    name, options = LANGUAGE_MODELS[family]
    part = "Text" if name == "Gemma3" else ""
    config = getattr(transformers, f"{name}{part}Config")(**{**SIZES, **options, "num_labels": labels})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}{part}ForSequenceClassification")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            around = 1.0 if "norm" in parameter_name and "Gemma" not in name else 0.0
            parameter.copy_(around + torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.15))
    model.save_pretrained(directory)
    return model


def their_scores(model, lines, side="right"):
    tokens, mask = oracle.pad(lines, max(map(len, lines)), side)
    with torch.no_grad():
        out = model(torch.tensor(tokens), attention_mask=torch.tensor(mask.astype(np.int64)))
    return out.logits[:, 0].numpy()


def our_scores(directory, lines, pad_id=0):
    tokens, mask = oracle.pad(lines, 16)
    of = functools.partial(scores, make_policy(read_config(directory)), mesh=make_mesh(), pad_id=pad_id)
    return jax.jit(of)(load(directory, make_mesh()), jnp.asarray(tokens), jnp.asarray(mask))


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_round_trip(family, tmp_path):
    model = make(tmp_path / "in", family)
    lines = [*LINES, [5, 6, 0], [9, 0, 7, 0, 0]]  # padding that was sampled is padding to both
    ours = our_scores(tmp_path / "in", lines)
    np.testing.assert_allclose(ours, their_scores(model, lines), atol=1e-4)
    np.testing.assert_allclose(ours[:3], their_scores(model, LINES, "left"), atol=1e-4)
    assert np.ptp(ours) > 0.01
    config, params = read_config(tmp_path / "in"), load(tmp_path / "in", make_mesh())
    before = load_file(tmp_path / "in" / "model.safetensors")
    for name, source in (("anew", None), ("source", tmp_path / "in")):
        save(tmp_path / name, params, config, source=source, extra={"pad_token_id": 0})
        after = load_file(tmp_path / name / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[tensor], after[tensor]) for tensor in before)
        again, said = transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path / name, output_loading_info=True
        )
        assert type(again) is type(model)
        assert not any(said.values()), said
        assert again.config.num_labels == 1
        np.testing.assert_array_equal(their_scores(again.eval(), lines), their_scores(model, lines))


@pytest.mark.parametrize("family", ["llama3", "llama tied", "gemma3"])
def test_a_language_model_becomes_a_reward_model(family, tmp_path):
    name, options = LANGUAGE_MODELS[family]
    part = "Text" if name == "Gemma3" else ""
    config = getattr(transformers, f"{name}{part}Config")(**{**SIZES, **options})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    model.save_pretrained(tmp_path / "in")
    params = load(tmp_path / "in", make_mesh(), score=True)
    assert "head" not in params
    assert params["score"].shape == (1, 32)
    assert not params["score"].any()
    params["score"] = jnp.linspace(-1, 1, 32)[None]
    ours = read_config(tmp_path / "in", score=True)
    save(tmp_path / "out", params, ours, source=tmp_path / "in")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        hidden = model.model(torch.tensor([LINES[0]])).last_hidden_state[0, -1].numpy()
    np.testing.assert_allclose(their_scores(theirs, LINES[:1]), hidden @ np.linspace(-1, 1, 32), atol=1e-4)
    np.testing.assert_allclose(our_scores(tmp_path / "out", LINES[:1]), hidden @ np.linspace(-1, 1, 32), atol=1e-4)


@pytest.mark.parametrize("labels", [2, 3])
def test_a_classifier_is_no_reward_model(labels, tmp_path):
    make(tmp_path / "in", "qwen2", labels)
    with pytest.raises(PretrainedError, match=rf"config.json: num_labels={labels}: a reward model has one output"):
        read_config(tmp_path / "in")


def test_a_score_of_another_shape_or_none_is_said(tmp_path):
    make(tmp_path / "in", "qwen2", 3)
    path = tmp_path / "in" / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "id2label": {"0": "x"}}))
    with pytest.raises(PretrainedError, match=r"score.weight .* has shape \(3, 32\); config.json makes it \(1, 32\)"):
        load(tmp_path / "in", make_mesh())
    path.write_text(json.dumps({**raw, "architectures": ["Qwen2ForCausalLM"]}))
    with pytest.raises(PretrainedError, match=r"tensors? .*lm_head.weight|score.weight"):
        load(tmp_path / "in", make_mesh())
    path.write_text(json.dumps({**raw, "architectures": ["Gemma3ForSequenceClassification"]}))
    with pytest.raises(PretrainedError, match="Gemma3TextForSequenceClassification"):
        read_config(tmp_path / "in")

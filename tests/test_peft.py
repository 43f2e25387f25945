"""Adapters of Hugging Face's `peft`, read, computed with and written again (`.[parity]`)."""

import json

import jax
import numpy as np
import pytest

from grpo_jax.logprobs import unembed
from grpo_jax.models import lora, peft, pretrained
from grpo_jax.models.families import PretrainedError
from grpo_jax.models.lora import LoraConfig
from grpo_jax.models.transformer import make_policy
from grpo_jax.sharding import MeshConfig, make_mesh
from tests.test_pretrained_parity import LINES, make, their_logits

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def logits_of(policy, params):
    line = np.array([LINES[0]])
    hidden, _ = jax.jit(policy.hidden)(params, line, np.arange(line.size)[None], np.ones_like(line))
    return np.asarray(unembed(hidden, policy.head(params))[0])


def make_theirs(place, family, targets):
    """A model and an adapter of peft's, random in both its matrices, saved; and the model with it."""
    model = make(place / "model", family)
    config = theirs.LoraConfig(r=3, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM", lora_dropout=0.1)
    model = theirs.get_peft_model(model, config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(place / "adapter")
    return model


def loaded(place, config, sizes=(1, 1, 1)):
    """(model's configuration, policy, parameters) with that adapter."""
    model, mesh = (
        pretrained.read_config(place / "model"),
        make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])),
    )
    params, adapters = pretrained.load(place / "model", mesh), peft.load(place / "adapter", model, config, mesh)
    policy = lora.adapted_policy(make_policy(model, mesh), model, config)
    return model, policy, lora.adapted(params, adapters, config)


# Biases and one stack; windows, norms behind, caps, two stacks and a layer left over.
@pytest.mark.parametrize(("family", "targets"), [("qwen2", ["q_proj", "v_proj", "down_proj"]), ("gemma2", PROJECTIONS)])
def test_the_same_logits_there_and_back(tmp_path, family, targets):
    model = make_theirs(tmp_path, family, targets)
    config = peft.read_config(tmp_path / "adapter")
    assert (config.rank, config.alpha, len(config.targets)) == (3, 12.0, len(targets))
    ours, policy, params = loaded(tmp_path, config)
    expected = their_logits(model, LINES[0])
    logits = logits_of(policy, params)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    plain = make_policy(ours)
    assert np.abs(expected - logits_of(plain, pretrained.load(tmp_path / "model", make_mesh()))).max() > 0.1

    # Written again, peft reads it: the same tensors, to the bit, and the same model.
    peft.save(tmp_path / "again", params, ours, config, base=str(tmp_path / "model"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    again = theirs.PeftModel.from_pretrained(base, tmp_path / "again").eval()
    np.testing.assert_array_equal(their_logits(again, LINES[0]), expected)
    # And merged, `transformers` reads it, and nothing says that it was two.
    pretrained.save(tmp_path / "merged", params, ours, source=tmp_path / "model")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    np.testing.assert_allclose(their_logits(merged, LINES[0]), expected, atol=1e-4)
    with pytest.raises(PretrainedError, match="again is there already"):
        peft.save(tmp_path / "again", params, ours, config, base="another")

    if family == "qwen2":  # split over a mesh it is the same
        _, policy, params = loaded(tmp_path, config, (1, 2, 2))
        np.testing.assert_allclose(logits_of(policy, params), expected, atol=1e-4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    place = tmp_path_factory.mktemp("peft")
    make_theirs(place, "llama tied", ["q_proj"])
    return place


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"use_rslora": True}, r"use_rslora=True is not supported: its scale is alpha / sqrt\(r\)"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported: whole modules"),
        ({"layers_to_transform": [0]}, r"layers_to_transform=\[0\] is not supported"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern={'q_proj': 8} is not supported: expected 3 everywhere"),
        ({"rank_pattern": {"q_proj": 3}}, None),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' may have changed the model"),
        ({"target_modules": "all-linear"}, "target_modules='all-linear' is not supported: expected a list"),
        ({"target_modules": ["lm_head"]}, r"target_modules=\['lm_head'\] is not supported"),
        ({"target_modules": []}, r"target_modules=\[\] is not supported"),
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported"),
        ({"r": 0}, "r=0 and lora_alpha=12"),
        ({"something_new": {"on": 1}}, "something_new={'on': 1} is not supported: expected none"),
        ({"something_new": {"on": False}}, None),
        ({"r": None}, "r=None and lora_alpha=12 must be numbers above 0"),
    ],
)
def test_what_is_not_understood_is_refused(saved, tmp_path, says, message):
    """What peft itself writes is; and of the rest, what is off."""
    raw = json.loads((saved / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw | says))
    if message is None:
        assert peft.read_config(tmp_path) == LoraConfig(rank=3, alpha=12.0, targets=("query",))
        return
    with pytest.raises(PretrainedError, match=message):
        peft.read_config(tmp_path)


def test_an_adapter_of_another_run_or_model_is_refused(saved, tmp_path):
    with pytest.raises(PretrainedError, match=r"there is no adapter_config\.json"):
        peft.read_config(tmp_path)
    right = LoraConfig(rank=3, alpha=12.0, targets=("query",))
    model, mesh = pretrained.read_config(saved / "model"), make_mesh()
    for other in (LoraConfig(rank=3, targets=("query",)), LoraConfig(rank=3, alpha=12.0)):
        with pytest.raises(
            PretrainedError, match=r"give --lora.rank=3 --lora.alpha=12.* --lora.targets=\"\('query',\)\""
        ):
            peft.load(saved / "adapter", model, other, mesh)
    (tmp_path / "adapter_config.json").write_text((saved / "adapter" / "adapter_config.json").read_text())
    with pytest.raises(PretrainedError, match=r"cannot read .*adapter_model.safetensors"):
        peft.load(tmp_path, model, right, mesh)
    from safetensors.numpy import load_file, save_file

    tensors = load_file(saved / "adapter" / "adapter_model.safetensors")
    name = next(iter(sorted(tensors)))
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != name}, "is missing; this model's adapter has"),
        (tensors | {name: tensors[name][:, :-1]}, "is of shape"),
        (tensors | {"lm_head.lora_A.weight": tensors[name]}, "holds tensor lm_head.lora_A.weight, unexpected"),
    ):
        save_file({k: np.ascontiguousarray(v) for k, v in changed.items()}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(PretrainedError, match=message):
            peft.load(tmp_path, model, right, mesh)

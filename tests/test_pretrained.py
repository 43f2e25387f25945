"""Hugging Face directories of our own writing, on every mesh; what is wrong with one is said by file and tensor."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from grpo_jax import sharding
from grpo_jax.data.tokenizer import ByteTokenizer
from grpo_jax.models import pretrained
from grpo_jax.models.pretrained import PretrainedError, load, read_config, save, saved_dtype
from grpo_jax.models.transformer import make_policy
from grpo_jax.objectives import grpo
from grpo_jax.sampler import Sampler
from grpo_jax.sharding import MeshConfig, make_mesh
from grpo_jax.training import UpdateConfig, init_train_state, make_train_step, train_batch
from grpo_jax.types import SamplingParams
from tests.decoders import FAMILIES, random_params

ROOT = pathlib.Path(__file__).parent.parent
ONE = make_mesh()
CONFIG, TIED = FAMILIES["llama"], FAMILIES["qwen2"]
PARAMS = random_params(CONFIG)
QUERY, HEAD, EMBEDDING = "model.layers.1.self_attn.q_proj.weight", "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def directory(tmp_path):
    save(tmp_path / "model", PARAMS, CONFIG)
    return tmp_path / "model"


@pytest.fixture
def tied(tmp_path):
    save(tmp_path / "tied", random_params(TIED), TIED)
    return tmp_path / "tied"


@pytest.fixture
def shards(tmp_path):
    save(tmp_path / "shards", PARAMS, CONFIG, shard_bytes=8_000)
    return tmp_path / "shards"


def change_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(directory, changes):
    path = directory / "model.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({name: x for name, x in tensors.items() if x is not None}, path)


def assert_same(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


# There and back -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_over_meshes(family, tmp_path):
    """Bit-equal, and each leaf where the table says, of fewer devices or more, some of whose axes do not divide."""
    config = FAMILIES[family]
    params, axes = random_params(config), make_policy(config).param_axes
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    save(tmp_path / "out", jax.device_put(params, sharding.shardings(params, axes, mesh)), config, shard_bytes=8_000)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    assert read_config(tmp_path / "out") == config
    for sizes in ({"data": 2, "tensor": 4}, {"fsdp": 8}, {}):
        mesh = make_mesh(MeshConfig(**sizes))
        loaded = load(tmp_path / "out", mesh)
        assert_same(loaded, params)
        where = sharding.shardings(params, axes, mesh)
        assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, loaded, where))


def test_other_rules(directory):
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    loaded = load(directory, mesh, {**sharding.RULES, "embed": None, "mlp": None, "head": "fsdp", "layers": None})
    assert loaded["layers"][0]["query"].sharding.spec == P(None, None, "tensor", "fsdp")
    assert loaded["layers"][0]["gate"].sharding.spec == P(None, None, None)
    assert_same(loaded, PARAMS)


def test_key_value_heads_that_do_not_divide(caplog, tmp_path):
    """2 over tensor=4, as of Qwen2.5-0.5B: replicated, said, and a step and a rollout are as on one device."""
    config = FAMILIES["qwen2"]
    save(tmp_path / "out", random_params(config), config)
    sharding.warn_once.cache_clear()
    results = []
    for sizes in ({}, {"data": 2, "tensor": 4}):
        mesh = make_mesh(MeshConfig(**sizes))
        policy, params = make_policy(config, mesh), load(tmp_path / "out", mesh)
        state = init_train_state(policy, params, optax.sgd(0.1), grpo(), mesh)
        sampler = Sampler(
            policy, mesh, ByteTokenizer("abcdefgh"), group_size=2, max_tokens=6, max_prompt_tokens=3,
            key=jax.random.key(1),
        )  # fmt: skip
        rollout = sampler(params, ["abc", "de", "f", "gha"], range(4), SamplingParams())
        batch = train_batch(rollout, jnp.tile(jnp.array([1.0, -1.0]), (4, 1)))
        step = make_train_step(policy, optax.sgd(0.1), grpo(), UpdateConfig(), like=state, key=jax.random.key(0))
        after, _ = step(state, batch)
        results.append(jax.device_get((rollout.completion_tokens, rollout.logprobs, after.params)))
        assert params["layers"][0]["query"].sharding.spec[2] == "tensor"
        if sizes:
            for name in ("key", "value"):
                assert params["layers"][0][name].sharding.is_equivalent_to(NamedSharding(mesh, P(None, "fsdp")), 4)
    said = "['layers'][i]['key']: kv_heads of size 2 does not divide over ('tensor',) (4 parts): replicated."
    assert caplog.text.count(said) == 1  # of all layers
    one, many = results
    np.testing.assert_array_equal(one[0], many[0])
    assert np.abs(one[2]["layers"][0]["key"] - random_params(config)["layers"][0]["key"]).max() > 1e-3  # it learned
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), one[1:], many[1:])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes(dtype, tmp_path):
    save(tmp_path / "low", PARAMS, CONFIG, dtype=dtype)
    assert saved_dtype(tmp_path / "low") == dtype
    rounded = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    as_saved, wide = load(tmp_path / "low", ONE, dtype=None), load(tmp_path / "low", ONE)
    assert {x.dtype for x in jax.tree.leaves(as_saved)} == {jnp.dtype(dtype)}
    assert {x.dtype for x in jax.tree.leaves(wide)} == {jnp.dtype("float32")}
    assert_same(as_saved, rounded)
    assert_same(wide, jax.tree.map(lambda x: x.astype("float32"), rounded))
    save(tmp_path / "again", as_saved, CONFIG)  # None: as they are
    assert saved_dtype(tmp_path / "again") == dtype
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("low", "again"))
    assert all((ours[name].view(np.uint16) == theirs[name].view(np.uint16)).all() for name in ours)
    for call in (
        lambda: load(tmp_path / "low", ONE, dtype="int8"),
        lambda: save(tmp_path / "x", PARAMS, CONFIG, dtype="int8"),
    ):
        with pytest.raises(PretrainedError, match=r"dtype 'int8' of weights must be one of \['bfloat16', 'float16'"):
            call()


def test_old_names_of_the_dtype(directory):
    change_config(directory, dtype=None, torch_dtype="bfloat16")
    assert saved_dtype(directory) == "bfloat16"
    change_config(directory, torch_dtype=None)
    assert saved_dtype(directory) == "float32"


def test_buffers_of_old_versions_are_not_weights(directory):
    change_tensors(directory, {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)})
    assert_same(load(directory, ONE), PARAMS)


# Directories that are wrong -------------------------------------------------------------------------


def assert_fails(directory, *said):
    with pytest.raises(PretrainedError) as error:
        load(directory, ONE)
    for text in said:
        assert str(text) in str(error.value), f"{text!r} is not in: {error.value}"


def test_no_directory(tmp_path):
    assert_fails(tmp_path / "none", "there is no directory", tmp_path / "none", "Hugging Face hub")
    (tmp_path / "empty").mkdir()
    assert_fails(tmp_path / "empty", "there is no config.json in", tmp_path / "empty")
    (tmp_path / "empty" / "adapter_config.json").touch()
    assert_fails(tmp_path / "empty", "is an adapter and no model", "export/")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"vocab_size": 3', "cannot read"),
        (b"\xff\xfe\x00", "cannot read"),
        (b"[1]", "holds a list"),
        (b"", "cannot read"),
    ],
)
def test_a_corrupt_config(directory, content, said):
    (directory / "config.json").write_bytes(content)
    assert_fails(directory, directory / "config.json", said)


def test_a_wrong_config_is_named(directory):
    change_config(directory, architectures=["MambaForCausalLM"], model_type="mamba")
    assert_fails(directory, directory / "config.json", "['MambaForCausalLM']", "'mamba'", "LlamaForCausalLM")


def test_weights_that_are_not_there(directory):
    (directory / "model.safetensors").unlink()
    assert_fails(directory, "no safetensors files in", directory, "Download or convert")
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04K*.")  # pickle.dumps(42)
    assert_fails(directory, "no safetensors files in", "only pytorch_model.bin: pickles can run code and are not read")


def test_a_missing_tensor(directory):
    change_tensors(directory, {QUERY: None})
    assert_fails(directory, f"tensor {QUERY} is missing from", directory, "model.safetensors", "do not belong together")


def test_many_missing_tensors(directory):
    """A shallower model's weights."""
    change_config(directory, num_hidden_layers=5)
    assert_fails(directory, "tensors model.layers.3.", "and 13 more are missing")


def test_unexpected_tensors(directory):
    change_tensors(directory, {"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)})
    assert_fails(
        directory, "tensor model.layers.0.self_attn.q_proj.bias is in", directory / "model.safetensors", "unexpected"
    )
    change_config(directory, num_hidden_layers=2)
    assert_fails(directory, "and 5 more are in", directory / "model.safetensors", "unexpected", "give another model")


def test_a_wrong_shape(directory):
    change_tensors(directory, {QUERY: np.zeros((16, 32), np.float32)})
    path = directory / "model.safetensors"
    assert_fails(directory, f"tensor {QUERY} of {path} has shape (16, 32); config.json makes it (32, 16)")


def test_a_quantized_tensor(directory):
    change_tensors(directory, {QUERY: np.zeros((32, 16), np.int8)})
    assert_fails(directory, f"tensor {QUERY} of {directory / 'model.safetensors'} is of type I8", "Quantized")


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_truncated_file(directory, kept):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert_fails(directory, f"{path} is truncated or corrupt", "download it again")


def test_a_file_of_something_else(directory):
    path = directory / "model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n" * 20)
    assert_fails(directory, f"{path} is truncated or corrupt", "download it again")


def test_an_index_of_files_that_are_not_there(shards):
    gone = sorted(shards.glob("*.safetensors"))[1]
    gone.unlink()
    assert_fails(shards, f"{gone} is missing, though model.safetensors.index.json names it")


def test_an_index_of_tensors_that_are_not_there(shards):
    index = json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"]
    path = shards / index[QUERY]
    save_file({name: x for name, x in load_file(path).items() if name != QUERY}, path)
    assert_fails(
        shards, f"tensor {QUERY} is missing from {path}, though model.safetensors.index.json says that it is there"
    )


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_an_index_of_nothing(shards, content):
    path = shards / "model.safetensors.index.json"
    path.write_text(content)
    assert_fails(shards, f"{path} has no weight_map")


def test_another_file_beside_the_model(directory):
    before = load(directory, ONE)
    (directory / "adapter.safetensors").write_bytes(b"")
    assert_same(load(directory, ONE), before)


def test_several_files_without_an_index(shards):
    (shards / "model.safetensors.index.json").unlink()
    assert_fails(shards, shards, "safetensors files and no model.safetensors.index.json")


def test_heads(directory, tied):
    """An untied head must be there; a tied one may be, if it is the embedding."""
    change_tensors(directory, {HEAD: None})
    assert_fails(directory, f"tensor {HEAD} is missing from", "tie_word_embeddings=false, so the head must be there")
    embedding = load_file(tied / "model.safetensors")[EMBEDDING]
    change_tensors(tied, {HEAD: embedding})
    assert_same(load(tied, ONE), random_params(TIED))
    for other in (embedding + 1e-6, embedding[:-1]):
        change_tensors(tied, {HEAD: other})
        assert_fails(
            tied, f"tensor {HEAD} of {tied / 'model.safetensors'} differs from {EMBEDDING}", "tie_word_embeddings"
        )
    change_tensors(tied, {EMBEDDING: None})
    assert_fails(tied, f"tensor {EMBEDDING} is missing from")


# Writing --------------------------------------------------------------------------------------------


def assert_refused(match, directory, *args, **options):
    before = sorted(directory.parent.rglob("*"))
    with pytest.raises(PretrainedError, match=match):
        save(directory, *args, **options)
    assert sorted(directory.parent.rglob("*")) == before


def test_a_directory_in_use(directory):
    assert_refused("model is there already: name a new directory", directory, PARAMS, CONFIG)
    assert_refused("model is there already", directory, PARAMS, CONFIG, source=directory)  # the source itself
    assert_refused("config.json is there already", directory / "config.json", PARAMS, CONFIG)
    assert_same(load(directory, ONE), PARAMS)
    (directory.parent / "empty").mkdir()
    save(directory.parent / "empty", PARAMS, CONFIG, source=directory)
    assert_same(load(directory.parent / "empty", ONE), PARAMS)


def test_what_does_not_belong_together(directory, tmp_path):
    other, out = dataclasses.replace(CONFIG, rope_base=100.0, mlp_width=8), tmp_path / "out"
    assert_refused(r"config.json is of another model: mlp_width: here 8, there 24; rope_base: here 100.0, there 500.0",
            out, random_params(other), other, source=directory)  # fmt: skip
    assert_refused(r"params\['layers'\]\[0\]\['down'\] has shape \(3, 24, 16\); .* has \(3, 8, 16\)",
            out, PARAMS, other)  # fmt: skip
    assert_refused(r"params\['adapter'\] has shape \(2,\); .* has None", out, {**PARAMS, "adapter": np.ones(2)}, CONFIG)
    assert_refused("source .*nowhere is not a directory", out, PARAMS, CONFIG, source=tmp_path / "nowhere")
    assert_refused("`extra` would make config.json that of another model: vocab_size: here 24, there 25",
            out, PARAMS, CONFIG, extra={"vocab_size": 25})  # fmt: skip
    odd = dataclasses.replace(CONFIG, scale_embedding=True)
    assert_refused("no family among llama, qwen2, .* has models like", out, PARAMS, odd)


def test_a_failure_in_the_middle_leaves_nothing(directory, tmp_path, monkeypatch):
    calls = []

    def full(tensors, path, metadata):
        calls.append(path)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(pretrained, "save_file", full)
    assert_refused(r"cannot write .*out: .*No space left on device.*Nothing of it is left",
            tmp_path / "out", PARAMS, CONFIG, shard_bytes=8_000)  # fmt: skip
    assert len(calls) == 2
    monkeypatch.undo()
    (tmp_path / "out.part").mkdir()  # of a run that was killed
    (tmp_path / "out.part" / "model-00001-of-00009.safetensors").write_text("half")
    save(tmp_path / "out", PARAMS, CONFIG)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert not (tmp_path / "out.part").exists()


def test_what_is_carried_along(directory, tmp_path):
    carried = {
        "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
        "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
    }  # fmt: skip
    for name in {*carried, "README.md", "pytorch_model.bin", "training_args.bin", "model.safetensors.index.json.bak"}:
        (directory / name).write_text(f"of {name} \u00e9")
    (directory / "tokenizer_of_another").mkdir()
    change_config(directory, bos_token_id=7, transformers_version="4.1", torch_dtype="bfloat16", dtype=None)
    save(tmp_path / "out", PARAMS, CONFIG, source=directory, dtype="bfloat16", extra={"eos_token_id": [1, 5]})
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*carried, "config.json", "model.safetensors"}
    for name in carried:
        assert (tmp_path / "out" / name).read_bytes() == (directory / name).read_bytes()
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw == {**json.loads((directory / "config.json").read_text()), "eos_token_id": [1, 5]}
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1  # whoever may read config.json may read the weights


def test_a_source_with_a_tokenizer_alone(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    save(tmp_path / "out", PARAMS, CONFIG, source=tmp_path / "tokenizer")
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert read_config(tmp_path / "out") == CONFIG


def test_how_windows_are_written_does_not_matter(tmp_path):
    """Patterns longer than need be give other stacks, and the same model."""
    config = dataclasses.replace(FAMILIES["gemma2"], windows=(4, 0, 4, 0), layers=4)
    save(tmp_path / "out", random_params(config), config)
    short = read_config(tmp_path / "out")
    assert short.windows == (4, 0)
    tokens, ones = np.arange(6)[None], np.ones((1, 6), int)
    hidden = [
        jax.jit(make_policy(c).hidden)(p, tokens, tokens, ones)[0]
        for c, p in [(config, random_params(config)), (short, load(tmp_path / "out", ONE))]
    ]
    np.testing.assert_allclose(*hidden, atol=1e-5)
    save(tmp_path / "again", random_params(config), config, source=tmp_path / "out")
    assert_same(load(tmp_path / "again", ONE), load(tmp_path / "out", ONE))


# Memory ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_the_host_holds_a_few_tensors_and_no_more(tmp_path):
    """Of 200 MiB in tensors of at most 4 MiB, stacks of 52 MiB and files of 40 MiB; the rest is compiled programs."""

    def program(*args):
        command = [sys.executable, "-m", "tests.pretrained_memory", *map(str, args)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    program("make", tmp_path / "model", 200, "float32")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) >= 5
    measured = json.loads(program("load", tmp_path / "model", "fsdp=2", "tensor=4"))
    assert measured["arrays"] > 190 * 2**20
    assert measured["largest_tensor"] == 4 * 2**20
    assert measured["rss_beyond_arrays"] < 80 * 2**20

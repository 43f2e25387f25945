"""Models and adapters in a store: the same files as on disk, read by ranges onto any mesh; all of one or nothing."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import runs
from grpo_jax.models import lora, peft
from grpo_jax.models.lora import LoraConfig
from grpo_jax.models.pretrained import PretrainedError, copy_description, load, read_config, save
from grpo_jax.sharding import MeshConfig, make_mesh
from tests import object_store
from tests.decoders import FAMILIES, random_params
from tests.test_pretrained import assert_same

pytest.importorskip("gcsfs")
MESHES = [MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)]


@pytest.fixture(scope="module")
def bucket():
    with object_store.opened() as opened:
        yield opened


def on_disk(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(("family", "dtype"), [("llama", "bfloat16"), ("gemma2", "float32")])
def test_written_as_on_disk_and_read_onto_meshes(bucket, tmp_path, family, dtype):
    store, place = bucket
    config = FAMILIES[family]
    params = random_params(config)
    for directory in (tmp_path / family, place / family):
        save(directory, params, config, dtype=dtype, shard_bytes=8_000)
    assert store.files("bucket", f"{family}/") == on_disk(tmp_path / family)
    assert len(store.files("bucket", f"{family}/")) > 3  # several files, and their index
    assert read_config(place / family) == read_config(tmp_path / family)
    for mesh in map(make_mesh, MESHES):
        store.asked.clear()
        got = load(place / family, mesh)
        expected = load(tmp_path / family, mesh)
        assert_same(got, expected)
        assert [x.sharding for x in jax.tree.leaves(got)] == [x.sharding for x in jax.tree.leaves(expected)]
    for write in (
        lambda: save(place / family, params, config),
        lambda: copy_description(tmp_path / family, place / family),
    ):
        with pytest.raises(PretrainedError, match=rf"gs://bucket/{family} is there already"):
            write()
    assert store.files("bucket", f"{family}/") == on_disk(tmp_path / family)


def test_what_is_cut_off_or_missing_is_said_by_file(bucket):
    store, place = bucket
    config = FAMILIES["llama"]
    save(place / "cut", random_params(config), config)
    name, mesh = "cut/model.safetensors", make_mesh()
    whole = store.files("bucket")[name]
    header = 8 + int.from_bytes(whole[:8], "little")
    for damaged in (whole[:-1], whole[: header - 3], whole[:5], b"\xff" * 50, whole[:8] + b"[" * (header - 8)):
        store.put("bucket", name, damaged, {})
        with pytest.raises(PretrainedError, match=r"gs://bucket/cut/model.safetensors is truncated or corrupt"):
            load(place / "cut", mesh)
    store.delete("bucket", name, {})
    with pytest.raises(PretrainedError, match="there are no safetensors files in gs://bucket/cut"):
        load(place / "cut", mesh)
    with pytest.raises(PretrainedError, match=r"there is no config.json in gs://bucket/nothing"):
        load(place / "nothing", mesh)


def test_an_export_is_whole_or_nothing_and_made_anew_where_a_kill_left_a_rest(bucket, monkeypatch):
    store, place = bucket
    config, workdir = FAMILIES["llama"], place / "exported"
    params = random_params(config)
    save(place / "base", params, config)
    copy_description(place / "base", workdir / "model")
    assert set(store.files("bucket", "exported/")) == {"model/config.json"}

    def full(method, name):
        if name == "exported/export/config.json":
            raise object_store.Refused(403, "quota")

    monkeypatch.setattr(store, "before", full)
    with pytest.raises(
        PretrainedError, match=r"cannot write gs://bucket/exported/export: .*quota.*Nothing of it is left"
    ):
        runs.export(workdir, params, config)
    assert store.files("bucket", "exported/export/") == {}

    def gone(method, name):
        if method == "DELETE" or name.endswith("config.json"):
            raise object_store.Refused(403, "quota")

    monkeypatch.setattr(store, "before", gone)
    with pytest.raises(PretrainedError, match=r"What is left in gs://bucket/left could not be removed"):
        save(place / "left", params, config)
    monkeypatch.undo()
    store.put("bucket", "exported/export/7.safetensors", b"rest", {})  # as a kill leaves it
    runs.export(workdir, params, config)
    assert set(store.files("bucket", "exported/export/")) == {"config.json", "model.safetensors"}
    store.asked.clear()
    runs.export(workdir, params, config)  # it is there
    assert {method for method, _ in store.asked} == {"GET"}


def test_adapters_there_and_back(bucket, tmp_path):
    store, place = bucket
    config, adapters = FAMILIES["llama"], LoraConfig(rank=2, alpha=4)
    mesh = make_mesh()
    params = lora.adapted(
        random_params(config), lora.init_adapters(config, adapters, jax.random.key(0), mesh), adapters
    )
    for directory in (tmp_path / "adapter", place / "adapter"):
        peft.save(directory, params, config, adapters, base="base")
    assert store.files("bucket", "adapter/") == on_disk(tmp_path / "adapter")
    assert json.loads(store.files("bucket", "adapter/")["adapter_config.json"])["r"] == 2
    read = peft.read_config(place / "adapter")
    assert dataclasses.replace(read, adapter="") == dataclasses.replace(
        peft.read_config(tmp_path / "adapter"), adapter=""
    )
    theirs = [peft.load(directory, config, adapters, mesh) for directory in (tmp_path / "adapter", place / "adapter")]
    jax.tree.map(np.testing.assert_array_equal, *theirs)

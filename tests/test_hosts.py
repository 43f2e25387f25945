"""One program on several processes: the same bits again, to rounding the same on others, and how it ends."""

import json
import pathlib
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from grpo_jax import hosts, sharding, storage
from grpo_jax.jsonl import read_jsonl
from grpo_jax.models import pretrained
from grpo_jax.models.transformer import init_params
from grpo_jax.rewards import Reward, Scores
from grpo_jax.scoring import score_completions, scores_of_all
from tests import host_run, object_store, processes

DEVICES = 4  # in all
LIMIT = 300  # seconds that nothing here takes, on a busy machine neither


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def started(count: int, command) -> list[tuple[int, str, str]]:
    """Status and output of `count` processes, each of `command(its --distributed)`."""
    port = free_port()
    address = lambda i: f"127.0.0.1:{port},{i},{count}" if count > 1 else "off"
    all_of_them = [processes.begin(*command(address(i)), devices=DEVICES // count) for i in range(count)]
    try:
        with ThreadPoolExecutor(count) as readers:
            said = list(readers.map(lambda process: process.communicate(timeout=LIMIT), all_of_them))
    finally:
        for process in all_of_them:
            process.kill()
    return [(process.returncode, *words) for process, words in zip(all_of_them, said, strict=True)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("hosts")
    pretrained.save(place / "model", init_params(host_run.CONFIG, jax.random.key(1)), host_run.CONFIG)
    return place


def run(place: storage.Path, name: str, count: int, *die, status: int | None = 0) -> list[tuple[int, str, str]]:
    asked = {"workdir": str(place / name), "model": str(place / "model"), "die": die or [-1, -1, ""]}
    ended = started(count, lambda address: ("-m", "tests.host_run", json.dumps({"distributed": address, **asked})))
    for code, out, err in ended:
        assert status is None or code == status, out + err
    return ended


@pytest.fixture(scope="module")
def straight(place):
    """Two processes that nothing happens to."""
    run(place, "straight", 2)
    return place / "straight"


def said_in_python(text: str) -> list[str]:
    """What goes past Python comes from gloo; of several threads, which tear each other's lines."""
    return [line for line in text.splitlines() if not re.search(r"\[Gloo\]|peer ranks|^[\s\d.:]*$", line)]


def untimed(path: pathlib.Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def arrays(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(workdir / "state.npz") as file:
        return dict(file)


def test_a_process_that_dies_or_hears_a_signal_ends_all_and_the_next_start_ends_with_the_same_bits(place, straight):
    begun = time.monotonic()
    (_, _, first), (second_status, *_) = run(place, "ended", 2, 1, 1, "SIGKILL", status=None)
    assert second_status == -9
    assert "another" in first  # that another process is not there
    assert time.monotonic() - begun < LIMIT
    assert [row["step"] for row in untimed(place / "ended" / "metrics.jsonl")] == [0, 1]

    (status, out, _), (other, silent, _) = run(place, "ended", 2, 1, 2, "SIGTERM", status=None)
    assert status == other == 128 + 15
    assert "SIGTERM: stopped after step 3, which is saved" in out  # the update ends, then all hear of it
    assert not said_in_python(silent)

    (_, out, _), _ = run(place, "ended", 2)
    assert "continuing at step 3" in out
    for name in ("metrics.jsonl", "samples.jsonl", "rewards.jsonl", "rewards.1.jsonl"):
        assert untimed(place / "ended" / name) == untimed(straight / name), name
    ours, theirs = arrays(place / "ended"), arrays(straight)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.tobytes() == theirs[name].tobytes(), name
    # Each scored its own: two groups of four of each wave.
    for name in ("rewards.jsonl", "rewards.1.jsonl"):
        rows = untimed(straight / name)
        assert {len(row["scores"]["often"]) for row in rows} == {8}
    assert max(row["wave"] for row in rows) == 1
    assert sum(row.get("dynamic_sampling/surplus_groups", 0) for row in untimed(straight / "metrics.jsonl")) > 0


def test_two_processes_in_a_store_do_as_on_disk(place, straight):
    pytest.importorskip("gcsfs")
    with object_store.opened() as (store, bucket):
        storage.upload(place / "model", bucket / "model")
        run(bucket, "run", 2)
        for name in ("metrics.jsonl", "samples.jsonl", "rewards.jsonl", "rewards.1.jsonl"):
            assert untimed(straight / name) == [
                {key: value for key, value in row.items() if not key.startswith("time/")}
                for row in read_jsonl(bucket / "run" / name)
            ], name
        with storage.fetched(bucket / "run" / "state.npz") as file, np.load(file) as ours:
            theirs = arrays(straight)
            assert {name: ours[name].tobytes() for name in ours.files} == {n: x.tobytes() for n, x in theirs.items()}
        assert store.files("bucket", "run/export/") == {f.name: f.read_bytes() for f in (straight / "export").iterdir()}
        assert ".lock" not in store.files("bucket", "run/")


@pytest.mark.parametrize("count", [1, 4])
def test_other_layouts_do_the_same_to_rounding(place, straight, count):
    run(place, f"on_{count}", count)
    for name in ("metrics.jsonl", "samples.jsonl"):
        for ours, theirs in zip(untimed(place / f"on_{count}" / name), untimed(straight / name), strict=True):
            assert ours.keys() == theirs.keys()
            for key, value in ours.items():
                expected = theirs[key] if isinstance(value, str) else pytest.approx(theirs[key], rel=1e-4, abs=1e-6)
                assert value == expected, key
    ours, theirs = arrays(place / f"on_{count}"), arrays(straight)
    for name in theirs:
        if name == "greedy":
            assert ours[name].tolist() == theirs[name].tolist()
        else:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-6, err_msg=name)


def test_what_two_processes_load_and_export_is_what_one_saved(place, straight):
    for name in ("model.safetensors", "config.json"):
        assert (straight / "export" / name).read_bytes() == (place / "model" / name).read_bytes()


def test_an_error_on_one_process_ends_all(place):
    begun = time.monotonic()
    (first, _, _), (second, _, said) = run(place, "ill", 2, 1, -1, "raise", status=None)
    assert 0 not in (first, second)
    assert "ValueError: this host alone is ill" in said
    assert time.monotonic() - begun < 90


def test_an_experiment_on_two_processes(tmp_path):
    """The flag, on the command line of a user: one of them speaks and writes, and the policy is exported."""
    tiny = tmp_path / "tiny"
    processes.python("-m", "experiments.tiny_gsm8k", f"--output={tiny}", "--train=16", "--test=4")
    command = lambda address: (
        "-m", "experiments.gsm8k", f"--distributed={address}", f"--model={tiny / 'model'}",
        f"--workdir={tmp_path / 'run'}", f"--data.train_file={tiny / 'train.jsonl'}",
        f"--data.test_file={tiny / 'test.jsonl'}", "--mesh.fsdp=4", "--rollout.prompts=4", "--rollout.group_size=2",
        "--rollout.max_tokens=8", "--rollout.stop=()", "--update.microbatches=1", "--train.steps=1",
        "--evaluation.sampled_prompts=4", "--evaluation.samples=1", "--policy.compute_dtype=float32",
        "--lora.rank=2",
    )  # fmt: skip
    (status, out, err), (other, silent, error) = started(2, command)
    assert status == other == 0, err + error
    assert "2 processes, of which this is number 0; 4 devices, 2 of them here" in out
    assert "grpo: step 1/1" in out
    assert "the policy is in" in out
    assert not said_in_python(silent)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        ".lock", "adapter", "checkpoints", "config.json", "curve.png", "export", "metrics.jsonl", "model",
        "rewards.1.jsonl", "rewards.jsonl", "samples.jsonl", "summary.json", "tensorboard",
    }  # fmt: skip
    shapes = lambda place: {k: x.shape for k, x in load_file(place / "model.safetensors").items()}
    assert shapes(tmp_path / "run" / "export") == shapes(tiny / "model")


def test_all_places_are_shared_out_in_order(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    assert [list(hosts.share(range(10, 15), i)) for i in range(3)] == [[10], [11, 12], [13, 14]]
    assert [len(hosts.share(range(2), i)) for i in range(3)] == [0, 1, 1]
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    assert hosts.share(range(6)) == range(4, 6)


def test_scores_of_all_stand_in_the_order_of_completions_also_where_parts_were_sampled(monkeypatch):
    """Two processes, waves of 2 and of 3 prompts, groups of 2: the first has prompts 0 and 2."""
    completions = {0: [0, 1, 4, 5], 1: [2, 3, 6, 7, 8, 9]}
    of = lambda process: Scores(
        by_name={"r": np.array([np.nan if i == 3 else i for i in completions[process]])},
        failed={"r": np.array([i == 3 for i in completions[process]])} if process else {},
        seconds={"r": np.array(completions[process]) / 10},
    )
    said = lambda process: {"record": of(process).record(), "seconds": {"r": (of(process).seconds["r"]).tolist()}}
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "gathered", lambda value: [json.loads(json.dumps(x)) for x in (value, said(1))])
    scores = scores_of_all(of(0), [2, 3], 2)
    np.testing.assert_array_equal(scores.by_name["r"], [0, 1, 2, np.nan, 4, 5, 6, 7, 8, 9])
    assert np.flatnonzero(scores.of_failed("r")).tolist() == [3]
    np.testing.assert_array_equal(scores.seconds["r"], np.arange(10) / 10)
    assert score_completions([Reward(name="r", function=len)], [], [], [], 2).items() == {"r": []}  # one without a part


@pytest.mark.parametrize("asked", ["", None, "on", "host,0,2", "host:1,2,2", "host:1,0,0", "host:1,0"])
def test_what_is_no_address_of_a_process_is_refused(asked):
    with pytest.raises(ValueError, match="must be off, auto or HOST:PORT,PROCESS,COUNT"):
        hosts.initialize(asked)


def test_every_device_of_every_process_must_be_in_the_mesh(monkeypatch):
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4))
    hosts.check_mesh(mesh)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="fsdp=4 x tensor=1 has 4 devices, and 2 processes have 8 together"):
        hosts.check_mesh(mesh)

"""One program on several processes: the same bits again, to rounding the same on others, and how it ends."""

import json
import pathlib
import re
import shutil
import signal
import socket
import time
import types
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
from tests.pretrained_memory import FILE

DEVICES = 4  # in all
LIMIT = 300  # seconds that nothing here takes, on a busy machine neither
APART = 60  # seconds within which all processes end, whatever ends the first; a dead one is missed after 10


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
            ended = lambda process: (process.communicate(timeout=LIMIT), time.monotonic())
            said, times = zip(*readers.map(ended, all_of_them), strict=True)
    finally:
        for process in all_of_them:
            process.kill()
    assert max(times) - min(times) < APART
    return [(process.returncode, *words) for process, words in zip(all_of_them, said, strict=True)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("hosts")
    pretrained.save(place / "model", init_params(host_run.CONFIG, jax.random.key(1)), host_run.CONFIG)
    judge = init_params(host_run.JUDGE, jax.random.key(2))
    judge["score"] = jax.random.normal(jax.random.key(3), judge["score"].shape)
    pretrained.save(place / "judge", judge, host_run.JUDGE)
    return place


def run(
    place: storage.Path, name: str, count: int, *die, status: int | None = 0, judged: bool = False, **options
) -> list[tuple[int, str, str]]:
    asked = {"workdir": str(place / name), "model": str(place / "model"), "die": die or [-1, -1, ""], **options}
    asked |= {"judge": str(place / "judge")} if judged else {}
    ended = started(count, lambda address: ("-m", "tests.host_run", json.dumps({"distributed": address, **asked})))
    for code, out, err in ended:
        assert status is None or code == status, out + err
    return ended


def says_that_another_is_gone(said: str) -> bool:
    """In our words, or in those of JAX's coordination service, which ends a process where it hears of it first."""
    return bool(re.search(r"another process is gone|another task died", said))


@pytest.fixture(scope="module")
def straight(place):
    """Two processes that nothing happens to, but that one waits for the other longer than gloo would (30 s)."""
    run(place, "straight", 2, slow=33)
    return place / "straight"


def said_in_python(text: str) -> list[str]:
    """What goes past Python comes from gloo; of several threads, which tear each other's lines."""
    return [line for line in text.splitlines() if not re.search(r"\[Gloo\]|peer ranks|^[\s\d.:]*$", line)]


@pytest.fixture(scope="module")
def four(place):
    """The same on four."""
    run(place, "on_4", 4)
    return place / "on_4"


def untimed(path: pathlib.Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def arrays(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(workdir / "state.npz") as file:
        return dict(file)


def test_a_process_that_dies_or_hears_a_signal_ends_all_and_the_next_start_ends_with_the_same_bits(place, straight):
    (status, _, first), (second_status, *_) = run(place, "ended", 2, 1, 1, "SIGKILL", status=None)
    assert (status != 0, second_status) == (True, -9)
    assert says_that_another_is_gone(first)
    assert [row["step"] for row in untimed(place / "ended" / "metrics.jsonl")] == [0, 1]

    (first_status, *_), (status, _, second) = run(place, "ended", 2, 0, 1, "SIGKILL", status=None)
    assert (first_status, status != 0) == (-9, True)
    assert says_that_another_is_gone(second)

    (first_status, _, first), (status, _, said) = run(place, "ended", 2, 1, 1, "raise", status=None)
    assert first_status != 0
    assert says_that_another_is_gone(first)
    assert status == 1
    assert "ValueError: this host alone is ill" in said

    # Nothing but the signal has it save that step.
    (status, out, _), (other, silent, _) = run(place, "ended", 2, 1, 2, "SIGTERM", status=None, every=10)
    assert status == other == 128 + 15
    assert "SIGTERM: stopped after step 3, which is saved" in out  # the update ends, then all hear of it
    assert not said_in_python(silent)

    (status, out, _), (other, *_) = run(place, "ended", 2, 1, 3, "notice", status=None)
    assert status == other == 128 + 15
    assert "continuing at step 3" in out
    assert "SIGTERM: stopped after step 3, which is saved" in out  # a rollout is cut short

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


def test_a_process_reads_the_prompts_that_it_samples_and_scores_and_those_that_are_shown(straight):
    first, second = (json.loads((straight / f"read.{i}.json").read_text()) for i in range(2))
    waves = [row["wave"] for row in untimed(straight / "rewards.jsonl")]
    every, shown = set(range(4 * len(waves))), waves.count(0)  # a group of each step
    assert {*first} | {*second} == every
    of_first = {cursor for cursor in every if cursor % 4 < 2}
    for read, own in ((first, of_first), (second, every - of_first)):
        assert own <= {*read}
        assert len(read) <= len(own) + shown  # each once


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


@pytest.mark.parametrize("name", ["on_1", "on_4", "on_2_then_4"])
def test_other_layouts_do_the_same_to_rounding(place, straight, four, name):
    if name == "on_1":
        run(place, name, 1)
    if name == "on_2_then_4":
        run(place, name, 2, 0, 2, "SIGTERM", status=128 + 15)
        (_, out, _), *_ = run(place, name, 4)
        assert "continuing at step 3" in out
    for file in ("metrics.jsonl", "samples.jsonl"):
        for ours, theirs in zip(untimed(place / name / file), untimed(straight / file), strict=True):
            assert ours.keys() == theirs.keys()
            for key, value in ours.items():
                expected = theirs[key] if isinstance(value, str) else pytest.approx(theirs[key], rel=1e-4, abs=1e-6)
                assert value == expected, key
    ours, theirs = arrays(place / name), arrays(straight)
    for leaf in theirs:
        if leaf == "greedy":
            assert ours[leaf].tolist() == theirs[leaf].tolist()
        else:
            np.testing.assert_allclose(ours[leaf], theirs[leaf], rtol=1e-3, atol=1e-6, err_msg=leaf)


def test_four_of_which_one_is_killed_end_with_the_bits_of_four(place, four):
    ended = run(place, "on_4_ended", 4, 2, 2, "SIGKILL", status=None)
    assert ended.pop(2)[0] == -9
    assert all(status != 0 and says_that_another_is_gone(said) for status, _, said in ended)
    (_, out, _), *_ = run(place, "on_4_ended", 4)
    assert "continuing at step" in out
    assert untimed(place / "on_4_ended" / "metrics.jsonl") == untimed(four / "metrics.jsonl")
    ours, theirs = arrays(place / "on_4_ended"), arrays(four)
    assert {name: x.tobytes() for name, x in ours.items()} == {name: x.tobytes() for name, x in theirs.items()}


def scores_of(workdir: pathlib.Path, name: str) -> dict[tuple[int, int], list]:
    """By step and wave, of all completions in order: what each process has journaled of its groups."""
    said: dict[tuple[int, int], list] = {}
    for path in sorted(workdir.glob("rewards*.jsonl"), key=lambda path: (path.name != "rewards.jsonl", path.name)):
        for row in untimed(path):
            said.setdefault((row["step"], row["wave"]), []).extend(row["scores"][name])
    return said


def test_a_reward_model_that_each_process_asks_says_what_it_says_to_one(place):
    """And goes on where one of them had journaled a step when all were killed, and the other had not."""
    run(place, "judged", 2, judged=True)
    run(place, "judged_on_1", 1, judged=True)
    ours, theirs = (scores_of(place / name, "model") for name in ("judged", "judged_on_1"))
    assert ours.keys() == theirs.keys()
    said = [x for scores in ours.values() for x in scores]
    assert None in said  # the gate
    assert len({*said}) > 10
    for key, scores in ours.items():
        as_numbers = lambda x: np.array(x, np.float64)
        np.testing.assert_allclose(as_numbers(scores), as_numbers(theirs[key]), rtol=1e-5, atol=1e-5, err_msg=str(key))

    shutil.copytree(place / "judged", place / "judged_ended")  # as it was before its last checkpoint
    shutil.rmtree(place / "judged_ended" / "checkpoints" / str(host_run.STEPS))
    journal = place / "judged_ended" / "rewards.1.jsonl"
    *before, last = journal.read_text().splitlines(keepends=True)
    assert json.loads(last)["step"] == host_run.STEPS - 1
    journal.write_text("".join(before))
    (_, out, _), _ = run(place, "judged_ended", 2, judged=True)
    assert f"continuing at step {host_run.STEPS - 1}" in out
    for name in ("metrics.jsonl", "samples.jsonl", "rewards.jsonl", "rewards.1.jsonl"):
        assert untimed(place / "judged_ended" / name) == untimed(place / "judged" / name), name
    ended, straight = arrays(place / "judged_ended"), arrays(place / "judged")
    assert ended.keys() == straight.keys()
    assert all(value.tobytes() == straight[name].tobytes() for name, value in ended.items())


def test_what_two_processes_load_and_export_is_what_one_saved(place, straight):
    for name in ("model.safetensors", "config.json"):
        assert (straight / "export" / name).read_bytes() == (place / "model" / name).read_bytes()


@pytest.mark.parametrize(
    ("how", "status", "says"),
    [
        ("raise", 1, "ValueError: this host alone is ill"),
        ("SIGINT", 130, "interrupted; the same command goes on with what is saved"),
    ],
)
def test_an_error_on_one_process_ends_all_and_is_its_status(place, how, status, says):
    (first, _, _), (second, _, said) = run(place, f"ill_{how}", 2, 1, -1, how, status=None)
    assert first != 0
    assert second == status
    assert says in said
    assert "Fatal Python error" not in said


JOINS = """
from experiments import process
from grpo_jax import hosts

process.command(lambda argv: print(hosts.initialize({})))
"""


def test_who_waits_for_others_says_so_and_ends_with_a_line_or_at_once():
    asked = f"127.0.0.1:{free_port()},0,2"
    done = processes.python("-c", JOINS.format(f"{asked!r}, patience=2"), status=1)
    first, last = re.findall(r"^--distributed.*", done.stderr, re.MULTILINE)
    assert first == f"--distributed={asked}: waiting for the other processes, for 2 s at most"
    assert last.startswith(f"--distributed={asked}: error: not all processes came within 2 s. Start as many as it says")

    waits = processes.begin("-c", JOINS.format(repr(asked)))
    assert any("waiting for the other processes, for 300 s" in line for line in waits.stderr)
    time.sleep(1)
    waits.send_signal(signal.SIGINT)
    assert waits.wait(30) == -signal.SIGINT


def test_another_number_of_processes_is_said():
    told = lambda address: ("-c", JOINS.format(repr(address.replace(",1,2", ",1,3"))))
    (first, *_), (second, _, said) = started(2, told)
    assert (first, second) == (0, 1)
    assert ",1,3 says how many processes there are, and 2 have come." in said


def experiment(name: str, *flags: str) -> str:
    """What a command of a user says on two processes: one of them speaks."""
    command = lambda address: ("-m", f"experiments.{name}", f"--distributed={address}", "--mesh.fsdp=4", *flags)
    (status, out, err), (other, silent, error) = started(2, command)
    assert status == other == 0, err + error
    assert "2 processes, of which this is number 0; 4 devices, 2 of them here" in out
    assert not said_in_python(silent)
    return out


@pytest.fixture(scope="module")
def tiny(place):
    """A model, its problems, and a reward model that two processes have made of it."""
    tiny = place / "tiny"
    processes.python("-m", "experiments.tiny_gsm8k", f"--output={tiny}", "--train=16", "--test=4")
    for split in ("train", "test"):
        problems = untimed(tiny / f"{split}.jsonl")
        pairs = [{"prompt": p["question"], "chosen": p["answer"], "rejected": "#### 0"} for p in problems]
        (tiny / f"{split}_pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    out = experiment(
        "reward_model", f"--model={tiny / 'model'}", f"--workdir={tiny / 'reward_model'}",
        f"--data.train_file={tiny / 'train_pairs.jsonl'}", f"--data.test_file={tiny / 'test_pairs.jsonl'}",
        "--train.steps=1", "--train.batch=4", "--optimizer.learning_rate=1e-2", "--optimizer.warmup_steps=0",
        "--policy.compute_dtype=float32",
    )  # fmt: skip
    assert "the reward model is in" in out
    return tiny


def test_experiments_on_two_processes(tiny, tmp_path):
    """The flag, on the command line of a user: one of them speaks and writes, and what has learned is exported.

    The reward model comes from its workdir, whose checkpoint is read onto the devices of all and then moved.
    """
    made, workdir = tiny / "reward_model", tmp_path / "run"
    assert {"export", "reliability.json", "reliability.png", "summary.json"} <= {path.name for path in made.iterdir()}
    out = experiment(
        "gsm8k", f"--model={tiny / 'model'}", f"--workdir={workdir}", f"--data.train_file={tiny / 'train.jsonl'}",
        f"--data.test_file={tiny / 'test.jsonl'}", "--rollout.prompts=4", "--rollout.group_size=2",
        "--rollout.max_tokens=8", "--rollout.stop=()", "--update.microbatches=1", "--train.steps=1",
        "--evaluation.sampled_prompts=4", "--evaluation.samples=1", "--policy.compute_dtype=float32",
        "--lora.rank=2", f"--reward_model.directory={made}",
    )  # fmt: skip
    assert f"reward model: {made}, " in out
    assert "grpo: step 1/1" in out
    assert "the policy is in" in out
    assert {path.name for path in workdir.iterdir()} == {
        ".lock", "adapter", "checkpoints", "config.json", "curve.png", "export", "metrics.jsonl", "model",
        "rewards.1.jsonl", "rewards.jsonl", "samples.jsonl", "summary.json", "tensorboard",
    }  # fmt: skip
    shapes = lambda place: {k: x.shape for k, x in load_file(place / "model.safetensors").items()}
    assert shapes(workdir / "export") == shapes(tiny / "model")
    ((key, said),) = scores_of(workdir, "reward_model").items()
    assert (key, len(said)) == ((0, 0), 8)
    assert len({*said}) > 4
    metrics = untimed(workdir / "metrics.jsonl")[-1]
    assert metrics["rewards/reward_model/mean"] == pytest.approx(np.mean(said), abs=1e-6)
    assert metrics["reward"] == pytest.approx(metrics["rewards/flexible/mean"] + np.mean(said), abs=1e-5)


@pytest.mark.parametrize("full", [0, 1])
def test_a_checkpoint_that_one_cannot_write_is_said_by_all(tmp_path, full):
    begun = time.monotonic()
    ended = started(2, lambda address: ("-m", "tests.one_full_disk", address, str(tmp_path / "checkpoints"), str(full)))
    assert time.monotonic() - begun < LIMIT / 3  # Orbax by itself waits 20 minutes
    for _, _, err in ended:
        assert "HEARD cannot write a checkpoint in" in err, err


def test_no_process_holds_a_model_that_lies_on_two(tmp_path):
    """Loading costs a process its own part and little more, exporting the file that is filled and little more."""
    program, megabyte = "tests.pretrained_memory", 1e6
    processes.python("-m", program, "make", str(tmp_path / "model"), "400", "float32")
    command = lambda address: (
        "-m", program, "host", str(tmp_path / "model"), str(tmp_path / "export"), address, "fsdp=4"
    )  # fmt: skip
    for status, _, err in started(2, command):
        assert status == 0, err
        (line,) = re.findall(r"^{.*}$", err, re.MULTILINE)
        measured, little = json.loads(line), 130 * megabyte  # matrices on their way, of 4 MB; what compiles; gloo
        whole = 2 * measured["arrays"]
        assert whole > 400 * megabyte
        assert measured["load"] < whole / 2 + little
        assert measured["save"] < FILE + little
        # The negative control: what is read whole is seen, and would be too much for both.
        assert measured["whole"] > max(whole / 2, FILE) + little


def test_a_process_holds_the_rows_of_its_devices(monkeypatch):
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    rows = sharding.batch_sharding(mesh)
    assert hosts.held(8, rows) == [*range(8)]
    for tensor in range(2):  # a row is on both, and on every process that has one of them
        own = lambda self, shape, tensor=tensor: {
            device: index
            for device, index in self.devices_indices_map(shape).items()
            if device in mesh.devices[1, :, tensor]
        }
        monkeypatch.setattr(type(rows), "addressable_devices_indices_map", own)
        assert hosts.held(8, rows) == [4, 5, 6, 7]


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


@pytest.mark.parametrize(("asked", "why"), [("localhost:99999,0,2", "a port"), ("no.invalid:80,0,2", "no machine")])
def test_where_nobody_can_be_reached_is_refused_at_once(asked, why):
    with pytest.raises(ValueError, match=rf"--distributed={asked.partition(',')[0]},.*{why}"):
        hosts.initialize(asked)


def test_what_a_process_computes_alone_is_on_its_own_devices(monkeypatch):
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, tensor=2))
    assert hosts.own_mesh(mesh) is mesh
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    own = hosts.own_mesh(mesh)  # all of these are of this process
    assert own.shape == {"data": 1, "fsdp": 4, "tensor": 1}
    assert own.devices.flatten().tolist() == mesh.devices.flatten().tolist()
    of = lambda *processes: np.array([types.SimpleNamespace(process_index=i) for i in processes])
    with pytest.raises(ValueError, match=r"processes have \[1, 3\] devices of the mesh: give each as many"):
        hosts.own_mesh(types.SimpleNamespace(devices=of(0, 0, 1, 0)))


def test_every_device_of_every_process_must_be_in_the_mesh(monkeypatch):
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4))
    hosts.check_mesh(mesh)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="fsdp=4 x tensor=1 has 4 devices, and 2 processes have 8 together"):
        hosts.check_mesh(mesh)

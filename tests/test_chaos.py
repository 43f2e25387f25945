"""A run that is killed at random moments; the command `python -m tests.chaos` kills one fifty times."""

import collections
import json
import random
import shutil
import signal

import pytest

from tests import chaos, processes


def test_killed_at_random_moments_in_every_part_a_run_ends_with_the_same_bits(tmp_path):
    figures = chaos.chaos(tmp_path, kills=5, each=1, seed=0)
    assert figures["different"] == []
    assert figures["kills"] >= 5
    assert all(figures["parts"][part]["kills"] >= 1 for part in chaos.PARTS)
    assert json.loads((tmp_path / "chaos.json").read_text())["parts"] == figures["parts"]
    # What is compared would show.
    straight, other = tmp_path / "straight", tmp_path / "other"
    shutil.copytree(straight, other)
    weights = other / "export" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    rows = (other / "rewards.jsonl").read_text()
    (other / "rewards.jsonl").write_text(rows.replace('"step": 3', '"step": 4', 1))
    newest = max(int(path.name) for path in (other / "checkpoints").glob("[0-9]*"))
    shutil.rmtree(other / "checkpoints" / str(newest))
    found = chaos.differences(other, straight)
    assert found[:2] == ["export/model.safetensors", "rewards.jsonl"]
    assert any(name.startswith("checkpoint['params']") for name in found)


def test_a_run_that_is_asked_to_stop_in_any_part_has_saved_within_the_grace_period(tmp_path):
    """Of 30 s, which machines that are taken away give: the step that was done last, and that of an update.

    By the command, on two of the devices that there are, as where these are others than a CPU.
    """
    place = tmp_path / "chaos"
    done = processes.python(
        "-m", "tests.chaos", f"--output={place}", "--kills=4", "--each=1", "--seed=1", "--signal=SIGTERM", "--here",
        "--mesh.fsdp=2", devices=2,
    )  # fmt: skip
    figures = json.loads((place / "chaos.json").read_text())
    assert "all with the same bits; seed 1, 2 of 2 x cpu, " in done.stdout
    assert figures["different"] == []
    assert json.loads((place / "straight" / "config.json").read_text())["deterministic"]
    assert all(figures["parts"][part]["kills"] >= 1 for part in chaos.PARTS)
    assert max(part["grace"] for part in figures["parts"].values()) < 30
    for kill in figures["log"]:
        if kill["part"] in chaos.PARTS[:-1] and kill["step"]:
            done = kill["step"] if kill["part"] == "update" else kill["step"] - 1
            assert (kill["status"], kill["torn"]) == (128 + signal.SIGTERM, [])
            assert done <= kill["newest"] <= kill["step"]
        else:  # before the first step, and after the last
            assert kill["status"] in (-signal.SIGTERM, 128 + signal.SIGTERM)


@pytest.mark.parametrize(("kills", "each"), [(50, 5), (5, 1), (3, 2), (30, 0)])
def test_aims_end_when_there_were_enough_in_all_and_in_each_part_and_the_export_is_last(kills, each):
    rng, done, took = random.Random(0), collections.Counter(), {part: [0.1, 0.3] for part in chaos.PARTS}
    order = []
    while (aim := chaos.next_aim(rng, done, kills, each, took)) is not None:
        assert 0 <= aim.delay < 0.2
        # Every fifth kill came too late for its aim.
        done["log" if len(order) % 5 == 4 else aim.part] += 1
        order.append(aim.part)
    assert sum(done.values()) >= kills
    assert all(done[part] >= each for part in chaos.PARTS)
    assert set(order) == {*(chaos.PARTS if each else chaos.PARTS[:-1])}
    assert order == sorted(order, key="export".__eq__)

"""The task of `experiments.rlhf`, and a small run of it: whole, killed and gone on with, in iterations."""

import json
import pathlib

import numpy as np
import pytest

from experiments.rlhf_task import LETTERS, TOKENIZER, demonstration, prefers_first, prompt, rule
from grpo_jax.telemetry import read_jsonl
from tests import processes
from tests.ends import last_state, untimed
from tests.test_hosts import started

TINY = [
    "--model.layers=1", "--model.width=16", "--warm_start.steps=3", "--warm_start.batch=8", "--preferences.pairs=20",
    "--preferences.held_out=6", "--reward_model.steps=2", "--reward_model.batch=4", "--rollout.prompts=2",
    "--rollout.group_size=4", "--rollout.max_tokens=8", "--train.steps=2", "--optimizer.warmup_steps=0",
    "--checkpoints.every=1", "--iterations=2",
]  # fmt: skip


def run(workdir: pathlib.Path, *flags: str, kill_at: str = "") -> str:
    return processes.killed("rlhf", kill_at, f"--workdir={workdir}", *TINY, *flags).stdout


# The task ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "worth"),
    [
        ("", 0), ("a", 1 / 3), ("aaa", 1 / 3), ("cab", 1), ("h", 0), ("!", 0.25), ("!!!", 0.75), ("!!!!", 0.5),
        ("abc!!!", 1.75), ("abc!!!!!!!!!", 0.25), ("!!!!!!!!!!", -1.0),
    ],
)  # fmt: skip
def test_the_rule_by_hand(text, worth):
    assert rule(["abc>"], [text]) == [pytest.approx(worth / 1.75)]


def test_prompts_are_functions_of_seed_split_and_index_and_no_letters_are_in_two_splits():
    splits = {split: {prompt(0, split, i) for i in range(300)} for split in ("train", "held_out")}
    letters = [{"".join(sorted(asked)) for asked in asked_in} for asked_in in splits.values()]
    assert not letters[0] & letters[1]
    assert min(map(len, letters)) > 5
    for asked in splits["train"]:
        assert len({*asked}) == 4
        assert {*asked} <= {*LETTERS, ">"}
        assert len(TOKENIZER.encode(asked)) == 4
    assert prompt(3, "train", 5) == prompt(3, "train", 5)
    assert [prompt(0, "train", i) for i in range(9)] != [prompt(1, "train", i) for i in range(9)]


def test_hardly_a_demonstration_shouts_so_that_the_reward_model_never_sees_it():
    shown = [demonstration(0, i) for i in range(2000)]
    marks = np.array([text.count("!") for _, text in shown])
    assert 0.5 < marks.mean() < 1.1
    assert (marks > 3).mean() < 0.02
    assert 0.2 < np.mean(rule(*zip(*shown, strict=True))) < 0.7


def test_the_labeller_follows_the_truth_with_noise():
    said = [prefers_first("abc>", ["abc!!!", "h"], 0.1, str(i)) for i in range(50)]
    assert all(said)
    said = [prefers_first("abc>", ["ab", "ad"], 0.1, str(i)) for i in range(2000)]
    assert np.mean(said) == pytest.approx(1 / (1 + np.exp(-(1 / 3 / 1.75) / 0.1)), abs=0.03)
    assert prefers_first("abc>", ["ab", "ad"], 0.1, "7") == prefers_first("abc>", ["ab", "ad"], 0.1, "7")


# The run ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("rlhf") / "straight"
    said = run(workdir)
    assert "| 0 | without KL |" in said
    return workdir


def test_everything_is_there(straight):
    seed = straight / "seed0"
    assert (straight / "rlhf.png").read_bytes().startswith(b"\x89PNG")
    of = json.loads((straight / "summary.json").read_text())["seeds"]["0"]
    assert len(of["reward_models"]) == 3  # the first, and of each arm the second
    for arm, kl in (("without KL", False), ("with KL", True)):
        assert {"truth_first", "truth_best", "truth_worst", "truth_last", "proxy_first", "proxy_last", "kl_last"} == of[
            arm
        ].keys()
        for i in range(2):
            rows = untimed(seed / arm.replace(" ", "_") / f"policy_{i}" / "metrics.jsonl")
            assert [row["step"] for row in rows] == [0, 1, 2]
            assert {"rewards/rule/mean", "rewards/proxy/mean", "kl_to_start"} <= rows[-1].keys()
            assert ("kl" in rows[-1]) == kl  # and so no reference is held without
            assert rows[-1]["reward"] == pytest.approx(rows[-1]["rewards/proxy/mean"], abs=1e-6)
    first = untimed(seed / "without_KL" / "policy_0" / "metrics.jsonl")[1]
    assert first["kl_to_start"] == pytest.approx(0, abs=1e-4)  # the policy is the start
    later = untimed(seed / "with_KL" / "policy_1" / "metrics.jsonl")[1]
    assert later["kl_to_start"] != 0
    assert later["kl"] == pytest.approx(0, abs=1e-6)  # the reference is refreshed


def test_iterations_go_on_with_the_reward_model_on_new_pairs(straight):
    seed = straight / "seed0"
    pairs = [json.loads(line) for line in (seed / "preferences.jsonl").read_text().splitlines()]
    new = [json.loads(line) for line in (seed / "without_KL" / "preferences_1.jsonl").read_text().splitlines()]
    assert len(pairs) == len(new) == 26
    assert pairs != new
    for pair in pairs:
        assert [TOKENIZER.decode(ids) for ids in pair["tokens"]] == [pair["chosen"], pair["rejected"]]
    before, after = (last_state(seed / place) for place in ("reward_model", "without_KL/reward_model_1"))
    same = [np.array_equal(before[name], after[name]) for name in before if "params" in name]
    assert not all(same)
    losses = [
        untimed(seed / place / "metrics.jsonl")[1]["loss"] for place in ("reward_model", "without_KL/reward_model_1")
    ]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)  # a head that is 0 prefers neither
    assert abs(losses[1] - np.log(2)) > 1e-5  # one that has learned goes on


def test_killed_and_gone_on_with_it_ends_with_the_same_bits(straight, tmp_path):
    run(tmp_path / "killed", kill_at="journal:1")  # of the first policy, since only these have rewards
    assert not (tmp_path / "killed" / "seed0" / "with_KL").exists()
    run(tmp_path / "killed")
    logs = sorted(path.relative_to(straight) for path in straight.rglob("*.jsonl"))
    assert len(logs) > 15
    for name in logs:
        assert untimed(tmp_path / "killed" / name) == untimed(straight / name), name
    for place in ("with_KL/policy_1", "without_KL/policy_1", "with_KL/reward_model_1"):
        ours, theirs = (last_state(workdir / "seed0" / place) for workdir in (tmp_path / "killed", straight))
        assert ours.keys() == theirs.keys()
        assert all(value.tobytes() == theirs[name].tobytes() for name, value in ours.items()), place


def test_two_processes_do_the_same_to_rounding(straight, tmp_path):
    """Each asks the reward model about its own texts, on its own devices; it was trained on those of both."""
    flags = [
        *TINY, f"--workdir={tmp_path}/two", "--iterations=1", "--mesh.fsdp=2", "--mesh.tensor=2",
        "--rollout.prompts=16", "--train.steps=1",
    ]  # fmt: skip
    command = lambda address: ("-m", "experiments.rlhf", f"--distributed={address}", *flags)
    (status, out, err), (other, _, error) = started(2, command)
    assert status == other == 0, err + error
    assert "everything is in" in out
    pairs = "seed0/preferences.jsonl"
    assert (tmp_path / "two" / pairs).read_text() == (straight / pairs).read_text()
    for phase, rows in (("reward_model", 3), ("without_KL/policy_0", 1), ("with_KL/policy_0", 1)):  # the same prompts
        logs = (untimed(workdir / "seed0" / phase / "metrics.jsonl") for workdir in (tmp_path / "two", straight))
        for ours, theirs in zip(*(log[:rows] for log in logs), strict=True):
            assert ours == {name: pytest.approx(value, rel=1e-3, abs=1e-5) for name, value in theirs.items()}
    place = tmp_path / "two" / "seed0" / "with_KL" / "policy_0"
    own = [read_jsonl(place / name) for name in ("rewards.jsonl", "rewards.1.jsonl")]
    assert [[len(row["scores"]["proxy"]) for row in rows] for rows in own] == [[32]] * 2


@pytest.mark.parametrize(
    ("seeds", "why"),
    [
        ("", "name at least one, and none of them twice."), ("0,0", "name at least one, and none of them twice."),
        ("a", "be integers: --seeds=0,1,2."), ("1,x", "be integers: --seeds=0,1,2."),
    ],
)  # fmt: skip
def test_seeds_are_numbers(seeds, why, tmp_path):
    command = ["-m", "experiments.rlhf", f"--workdir={tmp_path}/none", f"--seeds={seeds}"]
    said = processes.python(*command, status=1).stderr
    assert said.startswith(f"error: --seeds={seeds} must {why}")


def test_every_flag_changes_something(tmp_path):
    done = processes.python("-m", "tests.flags_of_rlhf", str(tmp_path), devices=2)
    assert json.loads(done.stdout.splitlines()[-1]) == {"idle": [], "not covered": [], "unexplained": []}

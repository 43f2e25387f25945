"""A run that is killed at any moment and started again ends with the same bits as one that never was."""

import json
import pathlib

import pytest

from experiments import countdown_report
from tests import processes
from tests.ends import last_state, untimed

TINY = [
    "--model.layers=1", "--model.width=16", "--model.heads=2", "--model.kv_heads=1", "--model.head_width=8",
    "--model.mlp_width=16", "--task.numbers=2", "--task.max_number=9", "--warm_start.steps=4", "--warm_start.batch=16",
    "--rollout.prompts=4", "--rollout.group_size=4", "--train.steps=6", "--train.samples_every=2",
    "--evaluation.every=2", "--evaluation.prompts=8", "--evaluation.sampled_prompts=4", "--evaluation.samples=4",
    "--checkpoints.every=2",
]  # fmt: skip
SHOW_TIMES = {"metrics.jsonl", "warm_start/metrics.jsonl", "summary.json", "curve.png"}
# Enough supervision that some groups have signal, and waves in which too few do.
DYNAMIC_SAMPLING = ["--rollout.max_waves=3", "--warm_start.steps=400"]
SEVERAL_UPDATES = ["--update.epochs=2", "--update.minibatches=2", "--update.microbatches=2"]


def run(workdir: pathlib.Path, *flags: str, kill_at: str = "", kill_with: str = "SIGKILL", check: bool = True):
    command = [f"--workdir={workdir}", *TINY, *flags]
    return processes.killed("countdown", kill_at, *command, kill_with=kill_with, status=0 if check else None)


def different_files(killed: pathlib.Path, straight: pathlib.Path) -> set[str]:
    """Names of those that are not the same byte for byte, or there on one side alone.

    Left out are Orbax's directories, which name files by chance and note when they were written, event files, which
    have the time in their names, and the lock, which has the process's number.
    """
    own = lambda path: path.is_file() and not {"checkpoints", "tensorboard", ".lock"} & {*path.parts}
    paths = [{path.relative_to(place) for path in place.rglob("*") if own(path)} for place in (killed, straight)]
    same = lambda path: (killed / path).read_bytes() == (straight / path).read_bytes()
    return {str(path) for path in paths[0] | paths[1] if path not in paths[0] & paths[1] or not same(path)}


def assert_same_run(killed: pathlib.Path, straight: pathlib.Path) -> None:
    for name in ("metrics.jsonl", "samples.jsonl", "rewards.jsonl"):
        assert untimed(killed / name) == untimed(straight / name), name
    ours, theirs = last_state(killed), last_state(straight)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 20
    for name, value in ours.items():
        assert value.tobytes() == theirs[name].tobytes(), name


@pytest.mark.parametrize(
    ("flags", "kills"),
    [
        ([], ["rollout:0", "rewards:1", "journal:2", "log:3", "save:3", "update:5"]),
        ([*SEVERAL_UPDATES, "--compilation_cache=off"], ["journal:1", "save:1", "update:3"]),
    ],
)
def test_killed_at_any_moment_ends_with_the_same_bits(tmp_path, flags, kills):
    run(tmp_path / "straight", *flags)
    for kill in kills:
        run(tmp_path / "killed", *flags, kill_at=kill)
    run(tmp_path / "killed", *flags)
    assert_same_run(tmp_path / "killed", tmp_path / "straight")
    assert json.loads((tmp_path / "killed" / "summary.json").read_text())["steps"] == 6
    assert different_files(tmp_path / "killed", tmp_path / "straight") <= SHOW_TIMES


def test_dynamic_sampling_killed_between_waves_and_while_groups_wait(tmp_path):
    run(tmp_path / "straight", *DYNAMIC_SAMPLING)
    rows = untimed(tmp_path / "straight" / "metrics.jsonl")[1:]
    waves, waiting = ([row[f"dynamic_sampling/{name}"] for row in rows] for name in ("waves", "surplus_groups"))
    assert waves[2] > 1  # killed when its first wave is in the journal, and its second is not
    assert min(waiting[2:4]) > 0  # in the checkpoint of the signal, from which the last run goes on
    run(tmp_path / "killed", *DYNAMIC_SAMPLING, kill_at="journal:2")
    run(tmp_path / "killed", *DYNAMIC_SAMPLING, kill_at="journal:3", kill_with="SIGTERM")
    run(tmp_path / "killed", *DYNAMIC_SAMPLING)
    assert_same_run(tmp_path / "killed", tmp_path / "straight")
    assert any("surplus" in name and "count" in name for name in last_state(tmp_path / "killed"))
    evaluated = run(tmp_path / "killed", *DYNAMIC_SAMPLING, "--eval_only", "--eval_step=6")
    assert json.loads(evaluated.stdout.splitlines()[-1])["step"] == 6


def test_sigterm_saves_the_step_and_a_lost_torn_line_is_forgiven(tmp_path):
    run(tmp_path / "straight")
    stopped = run(tmp_path / "stopped", kill_at="rewards:3", kill_with="SIGTERM")
    assert "SIGTERM: stopped after step 4" in stopped.stdout  # the update finishes, then the flag is seen
    assert (tmp_path / "stopped" / "checkpoints" / "4").is_dir()
    with (tmp_path / "stopped" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')  # what a kill in the middle of a write leaves
    resumed = run(tmp_path / "stopped")
    assert "continuing at step 4" in resumed.stdout
    assert_same_run(tmp_path / "stopped", tmp_path / "straight")

    refused = run(tmp_path / "stopped", "--loss.kl_coef=0.5", "--train.seed=3", check=False)
    assert refused.returncode == 1
    assert "loss.kl_coef: there 0.0" in refused.stderr
    assert "train.seed: there 0, now 3" in refused.stderr
    assert "Traceback" not in refused.stderr
    evaluated = run(tmp_path / "stopped", "--eval_only", "--eval_step=6")
    assert json.loads(evaluated.stdout.splitlines()[-1])["step"] == 6


def test_baselines_get_the_time_that_grpo_took_and_the_report_shows_them(tmp_path):
    run(tmp_path / "warm", "--warm_start_only")
    assert (tmp_path / "warm" / "warm_start.msgpack").exists()
    assert not (tmp_path / "warm" / "metrics.jsonl").exists()

    run(tmp_path / "run", "--baselines", "--evaluation.samples=64")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(summary["baselines"]) == 2
    for place in countdown_report.METHODS.values():
        rows = untimed(tmp_path / "run" / place / "metrics.jsonl")
        assert {"eval/accuracy", "eval/pass@64"} <= set(rows[0]) & set(rows[-1])
    assert len(countdown_report.table([tmp_path / "run"]).splitlines()) == 2 + 1 + len(countdown_report.METHODS)
    for picture in ("curve.png", "comparison.png"):
        assert (tmp_path / "run" / picture).read_bytes().startswith(b"\x89PNG")


def test_help_is_for_people():
    shown = processes.python("-m", "experiments.countdown", "--help", status=None).stdout
    for flag in ("--workdir", "--loss.kl_coef", "--rollout.group_size", "--mesh.fsdp"):
        assert flag in shown
    assert "beta; 0: no reference is held" in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rollout.group_size=1"], "group_size=1: an advantage relative to a group"),
        (["--update.minibatches=3"], "16 completions a step do not divide into minibatches=3"),
        (["--mesh.tensor=9"], "needs 9 devices"),
        (["--mesh=fsdp:2"], "there is no flag --mesh; did you mean --mesh.data or --mesh.fsdp or --mesh.tensor?"),
        (["--train.samples_every=0"], "samples_every=0 must be 1 or more"),
        (["--advantages.ddof=2"], "ddof=2 must be 0 or 1"),
        (["--profile=6:7"], "the profile is of steps 6 to 7, and the run has steps 1 to 6"),
        (["--compilation_cache="], "--compilation_cache= must be auto, off or a directory"),
        (["--eval_only"], "is not the workdir of a run"),
    ],
)
def test_bad_flags_are_one_clear_line_before_anything_is_written(tmp_path, flags, message):
    refused = run(tmp_path / "none", *flags, check=False)
    assert refused.returncode == 1
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "none").exists()

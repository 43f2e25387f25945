"""A run that is killed at any moment and started again ends with the same bits as one that never was."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
# Tests compile much and run little.
FLAGS = "--xla_backend_optimization_level=0"
TINY = [
    "--model.layers=1", "--model.width=16", "--model.heads=2", "--model.kv_heads=1", "--model.head_width=8",
    "--model.mlp_width=16", "--task.numbers=2", "--warm_start.steps=4", "--warm_start.batch=16",
    "--rollout.prompts=4", "--rollout.group_size=4", "--train.steps=6", "--train.samples_every=2",
    "--evaluation.every=2", "--evaluation.prompts=8", "--evaluation.sampled_prompts=4", "--evaluation.samples=4",
    "--checkpoints.every=2",
]  # fmt: skip
SEVERAL_UPDATES = ["--update.epochs=2", "--update.minibatches=2", "--update.microbatches=2"]


def run(workdir: pathlib.Path, *flags: str, kill_at: str = "", kill_with: str = "SIGKILL", check: bool = True):
    environment = {**os.environ, "KILL_AT": kill_at, "KILL_WITH": kill_with, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS}
    command = [sys.executable, "-m", "tests.kill_at", f"--workdir={workdir}", *TINY, *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    if check:
        expected = 0 if not kill_at else -signal.SIGKILL if kill_with == "SIGKILL" else 128 + getattr(signal, kill_with)
        assert done.returncode == expected, done.stdout + done.stderr
    return done


def untimed(path: pathlib.Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def last_state(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint, by name: parameters, reference, optimizer state, step, cursor."""
    import jax
    from orbax.checkpoint import v1 as ocp

    with ocp.training.Checkpointer((workdir / "checkpoints").absolute()) as checkpointer:
        state = checkpointer.load_checkpointables(None, {"state": None})["state"]
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}


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
        ([], ["rollout:0", "rewards:1", "update:2", "save:3", "rollout:4", "update:5"]),
        (SEVERAL_UPDATES, ["rewards:1", "save:1", "update:3"]),
    ],
)
def test_killed_at_any_moment_ends_with_the_same_bits(tmp_path, flags, kills):
    run(tmp_path / "straight", *flags)
    for kill in kills:
        run(tmp_path / "killed", *flags, kill_at=kill)
    run(tmp_path / "killed", *flags)
    assert_same_run(tmp_path / "killed", tmp_path / "straight")
    assert json.loads((tmp_path / "killed" / "summary.json").read_text())["steps"] == 6


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

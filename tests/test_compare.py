"""Objectives side by side: tiny real runs, what is read from their logs, and what is refused."""

import json
import pathlib
import re
import shutil

import matplotlib.figure
import numpy as np
import pytest

from experiments import compare, countdown, plots
from grpo_jax.data.countdown import Countdown
from grpo_jax.objectives import OBJECTIVES
from tests import processes
from tests import test_resume as resume

TINY = [*resume.TINY, "--loss.entropy_coef=0.01"]  # so small a policy has no reward to learn from


def run(workdir: pathlib.Path, *given: str, module: str = "compare", check: bool = True):
    command = ["-m", f"experiments.{module}", f"--workdir={workdir}", *TINY, *given]
    return processes.python(*command, status=0 if check else None)


def log(workdir: pathlib.Path, name: str, seed: int) -> list[dict]:
    return [json.loads(line) for line in (workdir / name / f"seed_{seed}" / "metrics.jsonl").read_text().splitlines()]


def check(workdir: pathlib.Path, names: list[str], seeds: list[int], said: str) -> None:
    """The numbers against what the logs say, and the table against the numbers."""
    numbers = json.loads((workdir / "compare.json").read_text())
    assert list(numbers["objectives"]) == names
    for name, metrics in numbers["objectives"].items():
        logs = [log(workdir, name, seed) for seed in seeds]
        assert {len(rows) for rows in logs} == {7}
        assert {"eval/accuracy", "eval/pass@1", "reward", "kl", "entropy", "completions/mean_length"} <= set(metrics)
        for metric, of in metrics.items():
            at_end = metric.startswith(("eval/", "time/"))
            middle = lambda rows: sum(sorted(row[metric] for row in rows[1:])[1:5]) / 4  # noqa: B023
            each = [rows[6][metric] if at_end else middle(rows) for rows in logs]
            assert list(of["seeds"]) == [str(seed) for seed in seeds]
            np.testing.assert_allclose(list(of["seeds"].values()), each, rtol=1e-12)
            np.testing.assert_allclose(of["mean"], sum(each) / len(each), rtol=1e-12)
            if len(seeds) == 2:
                np.testing.assert_allclose(of["deviation"], abs(each[0] - each[1]) / 2**0.5, rtol=1e-9, atol=1e-12)
        for rows in logs:  # the same warm start
            assert {key: rows[0][key] for key in rows[0] if key in numbers["warm_start"]} == numbers["warm_start"]
    written = (workdir / "compare.md").read_text()
    assert written in said
    lines = written.splitlines()
    assert "6 steps of 4 prompts x 4 completions, 16 optimizer steps each" in lines[0]
    assert [line.split()[1].strip("`") for line in lines[4:]] == ["warm", *names]
    assert f"| {numbers['objectives'][names[-1]]['reward']['mean']:.3f} " in lines[-1]
    assert (workdir / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_objectives_side_by_side(tmp_path):
    """Runs that differ in the objective alone, go on where they were interrupted, and are not repeated."""
    workdir = tmp_path / "compare"
    done = run(workdir, "--objectives=rloo,gspo", "--seeds=3")
    check(workdir, ["rloo", "gspo"], [3], done.stdout)
    rloo, gspo = workdir / "rloo" / "seed_3", workdir / "gspo" / "seed_3"
    first, other = ((place / "rewards.jsonl").read_text().split("\n")[0] for place in (rloo, gspo))
    assert first == other  # the same prompts and completions, until an update was made
    assert log(workdir, "rloo", 3)[1]["loss"] != log(workdir, "gspo", 3)[1]["loss"] != 0
    config = json.loads((gspo / "config.json").read_text())
    own = {"epochs": 4, "minibatches": 4, "microbatches": 2}  # the comparison's
    assert {name: config["update"][name] for name in own} == own
    assert (config["loss"].pop("objective"), config["train"].pop("seed")) == ("gspo", 3)
    assert config == json.loads((workdir / "config.json").read_text())

    shutil.copytree(gspo, tmp_path / "straight")
    (gspo / "summary.json").unlink()  # as a kill before the last checkpoint leaves it
    shutil.rmtree(gspo / "checkpoints" / "6")
    times = lambda: {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    before = times()
    again = run(workdir, "--objectives=gspo,rloo", "--seeds=3")
    assert "2 runs, of which 1 are finished" in again.stdout
    assert "gspo, seed 3: continuing at step 4" in again.stdout
    resume.assert_same_run(gspo, tmp_path / "straight")
    check(workdir, ["gspo", "rloo"], [3], again.stdout)
    changed = {path for path, time in times().items() if before.get(path) != time}
    assert gspo / "summary.json" in changed
    # Checked, and written; and nobody else may have it meanwhile.
    assert {path for path in changed if path.is_relative_to(rloo)} == {rloo / "config.json", rloo / ".lock"}

    shutil.copytree(gspo, workdir / "gspo" / "seed_0")  # stands for another finished run
    seed = workdir / "gspo" / "seed_0" / "config.json"
    seed.write_text(seed.read_text().replace('"seed": 3', '"seed": 0'))
    more = run(workdir, "--objectives=gspo", "--seeds=0,3")
    assert "2 runs, of which 2 are finished" in more.stdout
    assert "warm start:" not in more.stdout
    check(workdir, ["gspo"], [0, 3], more.stdout)

    refused = run(workdir, "--objectives=rloo", "--seeds=3", "--update.epochs=2", check=False)
    assert refused.returncode == 1
    assert "update.epochs: there 4, now 2" in refused.stderr


# What is read from logs -----------------------------------------------------------------------------


def made(rewards: list[float], accuracy: float, **constant: float) -> list[dict]:
    """A log of these rewards, step by step, behind what is measured before."""
    rows = [{"step": i + 1, "reward": reward, **constant} for i, reward in enumerate(rewards)]
    return [{"step": 0, "eval/accuracy": 0.1}, *rows[:-1], {**rows[-1], "eval/accuracy": accuracy}]


def test_the_table_by_hand():
    logs = {
        "one": {0: made([9.0, *[1.0, 2.0] * 10], 0.5, kl=0.25), 5: made([9.0, *[2.0, 3.0] * 10], 0.53, kl=0.75)},
        "other": {0: made([0.5], 1.0), 5: made([1.5], 1.0)},
    }  # fmt: skip
    # Of the middle 10 of the last 20 steps 1.5 and 2.5: mean 2, deviation sqrt(1 / 2).
    assert compare.table(compare.summarized(logs)) == "\n".join(
        [
            "| objective | greedy | reward | KL |",
            "|---|---|---|---|",
            "| warm start | 10.0% |  |  |",
            "| `one` | 51.5% ± 2.1 | 2.000 ± 0.707 | 0.500 ± 0.354 |",
            "| `other` | 100.0% ± 0.0 | 1.000 ± 0.707 |  |",
        ]
    )
    alone = {"one": {0: made([1.0, 2.0], 0.5)}}
    assert compare.table(compare.summarized(alone)).splitlines()[-1] == "| `one` | 50.0% | 1.500 |"


def test_the_picture_by_hand(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    logs = {"one": [made([1.0, 3.0], 0.5), made([5.0, 9.0], 0.7)], "other": [made([0.0, 1.0], 0.2)]}
    plots.multiples(logs, compare.PANELS, tmp_path / "none.png")
    (figure,) = drawn
    panels = {axis.get_title(): axis for axis in figure.axes}
    assert list(panels) == ["reward (train, sampled)", "accuracy (held out, greedy)"]  # nothing else was measured
    reward, accuracy = panels.values()
    data = lambda line: np.asarray(line.get_xydata()).tolist()
    assert [data(line) for line in reward.lines] == [[[1, 3], [2, (2 + 7) / 2]], [[1, 0], [2, 0.5]]]  # means so far
    np.testing.assert_allclose(data(accuracy.lines[0]), [[0, 0.1], [2, 0.6]])
    top, bottom = reward.collections[0].get_paths()[0].get_extents().corners()[[3, 0], 1]
    np.testing.assert_allclose([top, bottom], [4.5 + 5 / 2**0.5, 3 - 4 / 2**0.5], rtol=1e-6)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "other"]


def test_every_objective_has_a_line_of_its_own(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    plots.multiples({name: [made([1.0], 1.0)] for name in OBJECTIVES}, compare.PANELS, tmp_path / "none.png")
    looks = {(line.get_color(), line.get_linestyle()) for line in drawn[0].axes[0].lines}
    assert len(looks) == len(OBJECTIVES)


# What is refused ------------------------------------------------------------------------------------


def sections() -> dict:
    model = {"vocab_size": Countdown.tokenizer.vocab_size}
    return {name: cls(**(model if name == "model" else {})) for name, cls in countdown.SECTIONS.items()}


def test_configurations_differ_in_what_is_compared_alone():
    base = sections()
    configs = compare.configurations(base, ["dapo", "grpo"], ["1", "-2"])
    assert list(configs) == [("dapo", 1), ("grpo", 1), ("dapo", -2), ("grpo", -2)]  # all objectives of a seed first
    for (name, seed), config in configs.items():
        assert (config["loss"].objective, config["train"].seed) == (name, seed)
        assert {key: value for key, value in config.items() if key not in ("loss", "train")} == {
            key: value for key, value in base.items() if key not in ("loss", "train")
        }


@pytest.mark.parametrize(
    ("objectives", "seeds", "message"),
    [
        (["grpo", "gpro"], ["0"], "objective='gpro' must be one of grpo, grpo_process, dr_grpo"),
        (["grpo", ""], ["0"], "--objectives=grpo, must name at least one, and none of them twice"),
        ([], ["0"], "--objectives= must name at least one"),
        (["dapo", "grpo", "dapo"], ["0"], "--objectives=dapo,grpo,dapo must name at least one, and none of them twice"),
        (["grpo"], [], "--seeds= must name at least one"),
        (["grpo"], ["0", "00"], "--seeds=0,0 must name at least one, and none of them twice"),
        (["grpo"], ["0", "1.5"], "--seeds=0,1.5 must be integers"),
    ],
)
def test_lists_that_are_refused(objectives, seeds, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        compare.configurations(sections(), objectives, seeds)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--objectives=grpo,gpro"], "error: objective='gpro' must be one of grpo, grpo_process, dr_grpo"),
        (["--loss.objective=grpo"], "error: --loss.objective is what differs between the runs: leave it out, and name"),
        (["--train.seed=0"], "error: --train.seed is what differs between the runs: leave it out, and name"),
        (["--profile=9:1"], "error: --profile='9:1' must be FIRST:LAST"),
        (["--baselines"], "error: --baselines is for experiments.countdown alone"),
        (["--loss.clip_low=0.1"], "objective 'sapo' has no place for clip_low=0.1"),
    ],
)
def test_bad_flags_are_one_clear_line_before_anything_is_written(tmp_path, given, message):
    refused = run(tmp_path / "none", *given, check=False)
    assert refused.returncode == 1
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "none").exists()


def test_the_default_list_is_of_objectives_there_are():
    assert {*compare.OBJECTIVES.default} <= {*OBJECTIVES}

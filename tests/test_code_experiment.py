"""`python -m experiments.code`, small; and that each of its own flags changes something."""

import dataclasses
import functools
import json
import pathlib
import types

import jax
import numpy as np
import pytest

from experiments import code
from experiments.flags import field_comments
from grpo_jax import workdirs
from grpo_jax.data.puzzles import Puzzles
from grpo_jax.rewards import RewardError, programs, sandbox
from grpo_jax.rewards.code import CodeReward
from grpo_jax.rewards.sandbox import Isolation, isolation
from tests import unavailable

SMALL = {
    "model": {"vocab_size": Puzzles.tokenizer.vocab_size, "layers": 1, "width": 16, "heads": 2, "kv_heads": 1,
              "head_width": 8, "mlp_width": 16},
    "code": {"workers": 1, "cpu_seconds": 5.0},
    "warm_start": {"steps": 3, "batch": 8},
    "rollout": {"prompts": 2, "group_size": 4},
    "update": {"microbatches": 1},
    "optimizer": {"warmup_steps": 0},
    "train": {"steps": 2, "samples_every": 1},
    "evaluation": {"every": 1, "prompts": 8, "sampled_prompts": 8, "samples": 2},
}  # fmt: skip
# Fields of the sections that are this experiment's own; tests/test_flags.py has the others.
OTHER = {
    "task": {"max_constant": 5, "tests": 2, "effort": 0.9},
    "code": {"score": "fraction", "on_failure": "none", "workers": 2, "allow_asserts": True, "allow_weak": True,
             "cpu_seconds": 1.0, "wall_seconds": 1.0, "memory_mib": 64, "file_mib": 1, "output_kib": 1, "processes": 1},
}  # fmt: skip
FIELDS = [(section, field) for section, fields in OTHER.items() for field in fields]


def config(**changes):
    return {name: cls(**{**SMALL.get(name, {}), **changes.get(name, {})}) for name, cls in code.SECTIONS.items()}


@pytest.fixture
def strong():
    if not isolation().strong:
        unavailable(isolation().description)


def test_a_run_from_start_to_end(strong, tmp_path, capsys):
    experiment = code.Experiment(config())
    experiment.check()
    workdirs.open_workdir(tmp_path, code.runs.as_json(experiment.config))
    code.run(experiment, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 2
    assert 0 <= summary["accuracy_after"] <= 1
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all("rewards/tests/mean" in row for row in rows[1:])
    assert (tmp_path / "warm_start" / "metrics.jsonl").exists()
    assert (tmp_path / "curve.png").exists()
    assert "held-out greedy accuracy" in capsys.readouterr().out
    experiment.judge.close()


def test_the_rewards_are_of_the_puzzles_own_solutions(strong):
    experiment = code.Experiment(config(code={"score": "fraction"}))
    puzzles = [experiment.task.problem("train", i) for i in range(12)]
    prompts = [experiment.task.source("train")(i) for i in range(12)]
    columns = {name: [prompt.columns[name] for prompt in prompts] for name in ("tests", "prefix")}
    score = lambda reward, texts: reward.function([p.text for p in prompts], texts, [[1]] * 12, **columns)
    (trains,) = experiment.rewards
    assert score(trains, [puzzle.solution for puzzle in puzzles]) == [1] * 12
    lazy = score(trains, [puzzle.lazy for puzzle in puzzles])
    assert 0 < sum(lazy) < 12
    strict = score(code.Reward(name="accuracy", function=experiment.judge.strict()), [p.lazy for p in puzzles])
    assert strict == [float(value == 1) for value in lazy], "an evaluation counts whole solutions alone"
    experiment.judge.close()


def test_too_weak_isolation_stops_before_anything_starts(monkeypatch):
    weak = Isolation(
        mechanism="limits",
        seccomp=False,
        landlock=False,
        network=False,
        writes=False,
        signals=False,
        files=False,
        memory=False,
        processes=False,
    )
    monkeypatch.setattr(sandbox, "isolation", lambda: weak)
    with pytest.raises(RewardError, match="NOT isolated: network, writes outside"):
        code.Experiment(config())


def test_a_broken_sandbox_is_an_error_in_one_line(monkeypatch, tmp_path):
    def broken():
        raise sandbox.SandboxError("no sandbox can be started: bwrap is not installed")

    monkeypatch.setattr(sandbox, "isolation", broken)
    makers = {name: functools.partial(cls, **SMALL.get(name, {})) for name, cls in code.SECTIONS.items()}
    flag = lambda value: types.SimpleNamespace(value=value)
    given = types.SimpleNamespace(
        workdir=flag(str(tmp_path / "run")), eval_only=flag(False), eval_step=flag(None), profile=flag(""),
        reward=flag([]), cache=flag("off"), debug_nans=flag(False),
        sections={name: flag(make) for name, make in makers.items()},
    )  # fmt: skip
    with pytest.raises(RewardError, match=r"^no sandbox can be started: bwrap is not installed$") as stopped:
        code.main(given, ["code"])  # pyright: ignore[reportArgumentType]
    assert stopped.value.__cause__ is None  # so that `process.command` makes a line of it
    assert not (tmp_path / "run" / "config.json").exists()


def test_rewards_of_the_user_train_here_too(strong, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def brevity(completions, **_):\n    return [1 / (1 + len(x)) for x in completions]"
    )
    made = code.games.configuration(
        {name: functools.partial(cls, **{k: v for k, v in SMALL.get(name, {}).items() if k != "vocab_size"})
         for name, cls in code.SECTIONS.items()},
        Puzzles.tokenizer, None, [f"{tmp_path}/mine.py:brevity=0.5"],
    )  # fmt: skip
    experiment = code.Experiment(made)
    assert [(r.name, r.weight) for r in experiment.rewards] == [("tests", 1.0), ("brevity", 0.5)]
    said = experiment.check_rewards(tmp_path).splitlines()
    assert [line.split(":")[0] for line in said] == ["reward tests x 1", "reward brevity x 0.5"]
    experiment.judge.close()


def test_demonstrations_teach(strong):
    """The warm start's parameters differ from fresh ones, and with its seed."""
    leaves = []
    for seed in (0, 1):
        experiment = code.Experiment(config(warm_start={"seed": seed, "steps": 1}))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(code.games.Experiment, "run", lambda self, params, **options: (Taken(params), options))
            leaves.append(
                [np.asarray(x) for x in jax.tree.leaves(code.games.warmed(experiment, pathlib.Path("unused")))]
            )
        experiment.judge.close()
    assert any(not np.array_equal(a, b) for a, b in zip(*leaves, strict=True))


@dataclasses.dataclass
class Taken:
    params: object


# Flags ----------------------------------------------------------------------------------------------


def observe_task(made):
    task = Puzzles(made["task"], 0)
    return [task.demonstration(i) for i in range(10)]


PROBES = {  # programs that a limit decides about; each returns True within the limits of SMALL
    "cpu_seconds": "import time\ndef f():\n    while time.process_time() < 2: pass\n    return True",
    "wall_seconds": "import time\ndef f():\n    time.sleep(2)\n    return True",
    "memory_mib": "def f():\n    return len(bytearray(100 << 20)) > 0",
    "file_mib": "def f():\n    return open('x', 'wb').write(bytes(3 << 20)) > 0",
    "output_kib": "def f():\n    print('x' * 3000, flush=True)\n    return True",
    "processes": "import threading\ndef f():\n    threading.Thread(target=int).start()\n    return True",
    "score": "def f(x=0):\n    return x == 0",
    "allow_asserts": "def f():\n    return True",
}


def observe_code(made, field):
    """What a probe of the field scores, or what is said in its place."""
    if field == "allow_weak":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sandbox, "isolation", lambda: dataclasses.replace(isolation(), network=False))
            try:
                return CodeReward(made["code"]).close()
            except RewardError as error:
                return str(error)
    reward = CodeReward(made["code"])
    try:
        if field == "workers":
            return reward._sandbox.workers
        if field == "on_failure":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(programs.Worker, "run", fails)
                return list(reward(["p"], ["x"], [[1]], tests=[["assert f() == True"]]))
        tests = ["assert f() == True"]
        if field == "score":
            tests.append("assert f(1) == True")
        if field == "allow_asserts":
            tests.append("assert f() or False")
        return list(reward(["p"], [PROBES[field]], [[1]], tests=[tests]))
    except (RewardError, sandbox.SandboxError) as error:
        return str(error)
    finally:
        reward.close()


def fails(*_):
    raise sandbox.SandboxError("broken")


@pytest.mark.parametrize(("section", "field"), FIELDS)
def test_every_flag_of_its_own_changes_something(strong, section, field):
    changed = {section: {field: OTHER[section][field]}}
    observe = observe_task if section == "task" else lambda made: observe_code(made, field)
    before = observe(config())
    assert observe(config()) == before
    assert observe(config(**changed)) != before


def test_the_table_above_is_complete_and_every_flag_explains_itself():
    for section, table in OTHER.items():
        assert {field.name for field in dataclasses.fields(code.SECTIONS[section])} == set(table)
    for cls in code.SECTIONS.values():
        comments = field_comments(cls)
        for field in dataclasses.fields(cls):
            assert len(comments[field.name]) > 5
            assert comments[field.name] != field.name.replace("_", " ")

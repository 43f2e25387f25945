"""--reward: what it finds, what it refuses, and what it changes."""

import json
import math
import pathlib
import re

import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import countdown, runs, user_rewards
from grpo_jax import workdirs
from grpo_jax.data.countdown import Countdown, CountdownConfig
from grpo_jax.rewards import Reward, RewardError
from grpo_jax.rewards.style import think_answer_format
from grpo_jax.telemetry import WorkdirError
from tests.test_flags import configs

FILE = """
from grpo_jax.rewards import Reward
from grpo_jax.rewards.composition import gated

NUMBER = 3

def brevity(completions, **columns):
    return [1 / (1 + len(text)) for text in completions]

short = gated(Reward(name="shortness", function=brevity, weight=0.5, high=0.2), by="accuracy")

def raises(completions, **columns):
    return 1 / 0

def nan(completions, **columns):
    return [float("nan")] * len(completions)

def one(completions, **columns):
    return [1.0]

def text(completions, **columns):
    return "text"

def no_columns(prompts, completions, completion_ids):
    return [1.0] * len(completions)

def other_column(gold, **columns):
    return [1.0] * len(gold)

def empty_text(completions, **columns):
    return [1 / len(text) for text in completions]

def accuracy(completions, **columns):
    return [1.0] * len(completions)

class Judge:
    def __call__(self, target, **columns):
        return [float(x) for x in target]

judge = Judge()
needs = Reward(name="needs", function=lambda scores, **columns: [x for x in scores["acuracy"]], after=("acuracy",))
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my rewards.py"  # which nobody could import
    path.write_text(FILE)
    return path


def named(*functions):
    return user_rewards.named(functions)["rewards"]


def rewards_of(*functions):
    return named(*functions).rewards


def test_a_function_or_a_reward_of_a_file_or_a_module(file):
    brevity, short, judge, form = rewards_of(
        f"{file}:brevity=0.25", f"{file}:short", f"{file}:judge=-2e-1",
        "grpo_jax.rewards.style:think_answer_format",
    )  # fmt: skip
    assert (brevity.name, brevity.weight, brevity.function(["a", ""])) == ("brevity", 0.25, [0.5, 1])
    assert (short.name, short.weight, short.high, short.after) == ("shortness", 0.5, 0.2, ("accuracy",))
    assert (judge.name, judge.weight) == ("judge", -0.2)
    assert (form.name, form.weight, form.function) == ("think_answer_format", 1.0, think_answer_format)
    assert rewards_of(f"{file}:short=3")[0].weight == 3
    assert user_rewards.named([]) == {}


def test_a_file_that_two_rewards_are_of_runs_once(tmp_path):
    file = tmp_path / "two.py"
    file.write_text("made = []\ndef a(**_): return made\ndef b(**_): return made\n")
    a, b = user_rewards.named([f"{file}:a", f"{file}:b"])["rewards"].rewards
    assert a.function() is b.function()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("brevity", "--reward=brevity: expected FILE.py:NAME or package.module:NAME, with =WEIGHT behind it"),
        ("FILE:", "expected FILE.py:NAME"),
        ("FILE:a b", "expected FILE.py:NAME"),
        ("FILE:brevity=", "expected FILE.py:NAME"),
        ("FILE:brevity=much", "'much' is no finite number; expected FILE.py:NAME"),
        ("FILE:brevity*2", "expected FILE.py:NAME"),
        ("none.py:brevity", "there is no file .*none.py"),
        ("no_such.module:f", "there is no module no_such.module"),
        ("no_such_module:f", "there is no module no_such_module; a file is named with .py at its end"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(file, function, message):
    with pytest.raises(ValueError, match=message):
        named(function.replace("FILE", str(file)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("brevitty", "has no brevitty; expected a function or a Reward. It has brevity, short, raises, nan, one,"),
        ("NUMBER", "has another kind of NUMBER"),
        ("Judge", "has another kind of Judge"),
    ],
)
def test_what_a_file_does_not_hold(file, name, message):
    with pytest.raises(RewardError, match=message):
        rewards_of(f"{file}:{name}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:\n", "cannot be loaded: SyntaxError: .*line 1"),
        ("import no_such", "ModuleNotFoundError: No module named"),
        ("1 / 0", "ZeroDivisionError"),
        ("", "has no f; expected a function or a Reward. It has neither"),
    ],
)
def test_a_file_that_does_not_load(tmp_path, text, message):
    (tmp_path / "f.py").write_text(text)
    with pytest.raises(RewardError, match=message):
        rewards_of(f"{tmp_path}/f.py:f")


PLACES = st.text(alphabet="qzx./\\\0é: =\n1", max_size=8)
SPECIFICATIONS = st.text() | st.builds(
    "{}{}:{}{}".format, PLACES, st.sampled_from(["", ".py"]), st.sampled_from(["f", "_", "1", "f f", ""]),
    st.one_of(st.just(""), st.text(max_size=5).map("={}".format), st.floats().map("={}".format)),
)  # fmt: skip


def value_or_message(function, argument):
    try:
        return function(argument), None
    except ValueError as error:
        return None, str(error)


@settings(max_examples=500)
@given(SPECIFICATIONS)
def test_any_specification_is_parts_or_an_error_that_says_what_was_expected(text):
    parts, message = value_or_message(user_rewards._parts, text)
    if message is not None:
        assert message.startswith(f"--reward={text}: ")
        assert "expected FILE.py:NAME or package.module:NAME" in message
    else:
        place, name, weight = parts
        assert text == f"{place}:{name}" or text.startswith(f"{place}:{name}=")
        assert place
        assert name.isidentifier()
        assert weight is None or math.isfinite(weight)


@settings(max_examples=300)
@given(SPECIFICATIONS)
def test_any_specification_names_something_or_is_an_error(text):
    section, message = value_or_message(user_rewards.named, [text])
    assert section["rewards"].functions == (text,) if message is None else message.startswith("--reward=")


# Checked on a sample -----------------------------------------------------------------------------------------------


def experiment(*functions):
    return countdown.Experiment(configs("train") | user_rewards.named(functions))


def test_a_sample_is_tried_before_training(file):
    said = experiment(f"{file}:short", f"{file}:judge=0").check_rewards(pathlib.Path("none")).splitlines()
    task = Countdown(CountdownConfig(), 0)
    problems = [task.problem("train", i) for i in range(2)]
    lengths = [len(problem.solution) for problem in problems]
    assert said == [
        "reward accuracy x 1: 1, 1 of right answers, 0, 0 of empty ones",
        "reward format x 0.1: 1, 1 of right answers, 0, 0 of empty ones",
        f"reward shortness x 0.5: {1 / (1 + lengths[0]):g}, {1 / (1 + lengths[1]):g} of right answers, none, none of "
        "empty ones",  # gated by accuracy
        f"reward judge x 0: {problems[0].target}, {problems[1].target} of right answers, {problems[0].target}, "
        f"{problems[1].target} of empty ones",
    ]
    assert countdown.Experiment(configs("train")).check_rewards(pathlib.Path("none")) == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "'raises' raised ZeroDivisionError: division by zero"),
        ("nan", "'nan' returned nan for completion 0"),
        ("one", "'one' returned 1 values for 4 completions"),
        ("text", "'text' returned 't' for completion 0"),
        ("no_columns", r"'no_columns' does not take 'numbers', 'target': end its parameters with \*\*columns"),
        ("other_column", "'other_column' needs the column 'gold', and the prompts have 'numbers', 'target'"),
        ("empty_text", "'empty_text' raised ZeroDivisionError"),
        ("accuracy", "two reward functions have the same name"),
        ("needs", "'needs' depends on 'acuracy', and the rewards are accuracy, format, needs"),
    ],
)
def test_what_is_wrong_is_said_before_training(file, name, message):
    with pytest.raises(RewardError, match=f"rewards, tried on a sample before training: .*{message}"):
        experiment(f"{file}:{name}").check_rewards(pathlib.Path("none"))


def test_a_reward_model_is_tried_too_and_changed_files_are_said(file, tmp_path):
    task = Countdown(CountdownConfig(), 0)
    samples = lambda: [(task.source("train")(0), "1+1")]
    asked = lambda config, on_device: user_rewards.check_rewards(
        tmp_path, config, [Reward(name="m", function=lambda completions, **_: [1.0] * 2, on_device=on_device)], samples,
        task.tokenizer, 1,
    )  # fmt: skip
    assert asked({}, True) == "reward m x 1: 1 of right answers, 1 of empty ones\n"
    assert asked({}, False) == ""
    mine = user_rewards.named([f"{file}:brevity"])
    workdirs.open_workdir(tmp_path, runs.as_json(mine))
    file.write_text(FILE + "\n")
    first, second = asked(user_rewards.named([f"{file}:brevity"]), False).splitlines()
    assert first.startswith("reward m x 1")
    assert second.startswith(f"--reward: {file} has changed")


# Part of the configuration -----------------------------------------------------------------------------------------


def test_a_run_does_not_go_on_with_other_rewards_and_says_when_a_file_has_changed(file, tmp_path):
    workdir = tmp_path / "run"
    section = lambda *functions: {"train": countdown.TrainConfig(), **user_rewards.named(functions)}
    open_ = lambda config: workdirs.open_workdir(workdir, runs.as_json(config))
    config = section(f"{file}:brevity", f"{file}:short")
    assert user_rewards.said_of_changes(workdir, config) == ""
    open_(config)
    (workdir / "metrics.jsonl").touch()
    open_(config)
    assert user_rewards.said_of_changes(workdir, config) == ""
    recorded = json.loads((workdir / "config.json").read_text())["rewards"]
    assert recorded["functions"] == [f"{file}:brevity", f"{file}:short"]

    for other in (section(f"{file}:brevity"), section(f"{file}:brevity=2", f"{file}:short"), section()):
        with pytest.raises(WorkdirError, match=r"rewards\.functions: there \["):
            open_(other)
    file.write_text(FILE + "\n")
    changed = section(f"{file}:brevity", f"{file}:short")
    said = user_rewards.said_of_changes(workdir, changed).splitlines()
    assert len(said) == 1  # of a file, however many rewards it has
    assert said[0].startswith(f"--reward: {file} has changed since the run was last started (")
    open_(changed)  # what raised is mended, and the run goes on
    assert user_rewards.said_of_changes(workdir, changed) == ""
    assert user_rewards.said_of_changes(workdir, section()) == ""


def test_the_flag_reaches_the_rewards_that_train(file):
    given = flags.FLAGS["reward"]
    assert given.help.startswith("FILE.py:NAME or package.module:NAME")
    before, parsed = given.value, flags.FLAGS.is_parsed()
    flags.FLAGS.mark_as_parsed()
    try:
        given.value = [f"{file}:brevity=0.5"]
        config = countdown.configuration(file)
        assert config["rewards"].functions == (f"{file}:brevity=0.5",)
        made = countdown.Experiment(configs("train") | {"rewards": config["rewards"]})
        assert [(r.name, r.weight) for r in made.rewards] == [("accuracy", 1.0), ("format", 0.1), ("brevity", 0.5)]
        assert list(made.rollouts().rewards) == list(made.rewards)
        given.value = []
        assert "rewards" not in countdown.configuration(file)  # as in every run before there was the flag
    finally:
        given.value = before
        if not parsed:
            flags.FLAGS.unparse_flags()


def test_what_is_said_is_one_line_a_reward():
    reward = Reward(
        name="r", function=lambda completions, **_: [None if not text else 0.123456789 for text in completions]
    )
    always = Reward(name="always", function=lambda completions, **_: [1.0] * len(completions), weight=0.0)
    task = Countdown(CountdownConfig(), 0)
    samples = [(task.source("train")(0), "1+1")]
    said = user_rewards.check([reward, always], samples, task.tokenizer, 1)
    assert re.fullmatch(
        r"reward r x 1: 0\.123457 of right answers, none of empty ones\nreward always x 0: 1 of .*", said
    )

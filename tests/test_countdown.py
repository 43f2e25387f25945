import ast
import builtins
import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.data.countdown import Countdown, CountdownConfig, is_held_out
from grpo_jax.data.tokenizer import ByteTokenizer
from grpo_jax.rewards.countdown import countdown_accuracy, countdown_format, evaluate_expression

CONFIGS = [
    CountdownConfig(),
    CountdownConfig(numbers=2, max_number=20, max_target=400),
    CountdownConfig(numbers=4, max_number=99, max_target=999),
    CountdownConfig(numbers=6, max_number=12, max_target=100, effort=0.9),
]
configs = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.numbers}x{c.max_number}")


def scores(reward, completion, numbers=(2, 3, 4), target=20):
    (score,) = reward(["2 3 4=20:"], [completion], [[1]], numbers=[numbers], target=[target], other_column=[0])
    return score


# The judge ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("1+2*3", 7, [1, 2, 3]),
        ("(1+2)*3", 9, [1, 2, 3]),
        ("10-2-3", 5, [10, 2, 3]),  # from the left
        ("24/4/2", 3, [24, 4, 2]),
        ("1/3*3", 1, [1, 3, 3]),  # exact
        ("1/3+1/6", Fraction(1, 2), [1, 3, 1, 6]),
        (" 7 - 9 ", -2, [7, 9]),
        ("0*5", 0, [0, 5]),
        ("42", 42, [42]),
        ("((((8))))", 8, [8]),
        ("99999999999999999999*1", 99999999999999999999, [99999999999999999999, 1]),
    ],
)
def test_values(text, value, numbers):
    assert evaluate_expression(text) == (value, numbers)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "-3+5", "+3", "2*-3", "2--3", "~1", "1+", "*2", "1 2", "()", "(1", "1)", ")(", "3(4)", "(1)(2)",
        "1//2", "9**9", "9**9**9", "1%2", "1^2", "1&2", "1/0", "5/(3-3)", "01+2", "007", "00", "00+1", "1_000", "0x1",
        "0b1", "1e3", "1.5", ".5", "1j", "1,2", "[1]", "{1}", "'1'", "1;2", "1\n+2", "1\t+2", "1+2\0", "#", "1#2",
        "True", "a", "x:=1", "1<2", "=5", "1+1=2", "1 if 1 else 2", "print(1)", "__import__('os')",
        "٣+٤", "１+２", "²", "5−3", "2×3", "6÷2",
        "1" * 201, "1+" * 100 + "1", "(" * 101 + "1" + ")" * 101, "(" * 200, "(" * 10**6, "-" * 199 + "1",
    ],
)  # fmt: skip
def test_what_is_no_expression(text):
    assert evaluate_expression(text) is None


@given(
    st.one_of(st.text(), st.text("0123456789+-*/() ", max_size=210), st.text("0123456789+-*/()_.eExX'[]", max_size=30))
)
def test_any_text_is_judged_and_never_raises(text):
    result = evaluate_expression(text)
    if result is not None:
        value, numbers = result
        assert isinstance(value, Fraction)
        assert all(type(n) is int and n >= 0 for n in numbers)
        assert len(text) <= 200


def test_nothing_is_executed(monkeypatch):
    def forbidden(*args, **options):
        raise AssertionError("the judge ran text")

    parse = ast.parse
    monkeypatch.setattr(ast, "parse", lambda text, **options: parse(text, **options))
    for name in ("eval", "exec", "__import__"):
        monkeypatch.setattr(builtins, name, forbidden)
    assert evaluate_expression("2*(3+4)") == (14, [2, 3, 4])
    assert evaluate_expression("__import__('os').system('true')") is None


expressions = st.recursive(
    st.integers(0, 99).map(lambda n: (Fraction(n), str(n), [n])),
    lambda parts: st.tuples(parts, st.sampled_from("+-*"), parts).map(
        lambda t: (
            {"+": t[0][0] + t[2][0], "-": t[0][0] - t[2][0], "*": t[0][0] * t[2][0]}[t[1]],
            f"({t[0][1]}{t[1]}{t[2][1]})",
            t[0][2] + t[2][2],
        )
    ),
    max_leaves=10,
)


@given(expressions)
def test_generated_expressions(expression):
    value, text, numbers = expression
    assert evaluate_expression(text) == (value, numbers)


# Rewards --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "accuracy", "form"),
    [
        ("(2+3)*4", 1, 1),
        (" 4 * (3+2)", 1, 1),  # in any order
        ("2*3*4", 0, 1),  # another value
        ("2/3/4", 0, 1),
        ("4*5", 0, 0),  # hits the target with a number that is not given
        ("2*3*4-4", 0, 0),  # uses one twice
        ("(2+3)*4*1", 0, 0),
        ("2+3", 0, 0),  # leaves one out
        ("20", 0, 0),
        ("", 0, 0),
        ("(2+3)*4=20", 0, 0),
        ("(2+3)*4/(3-3)", 0, 0),
        ("the answer is (2+3)*4", 0, 0),
    ],
)
def test_rewards(completion, accuracy, form):
    assert scores(countdown_accuracy, completion) == accuracy
    assert scores(countdown_format, completion) == form


@pytest.mark.parametrize(("completion", "score"), [("5+5", 1), ("10", 0), ("5+5+5-5", 0), ("5", 0)])
def test_repeated_numbers_count(completion, score):
    assert scores(countdown_accuracy, completion, numbers=(5, 5), target=10) == score


@pytest.mark.parametrize(
    ("completion", "numbers", "target", "score"),
    [("8/(3-8/3)", (3, 3, 8, 8), 24, 1), ("1/3", (1, 3), 0, 0), ("99/100", (99, 100), 1, 0)],
)
def test_values_are_exact(completion, numbers, target, score):
    assert scores(countdown_accuracy, completion, numbers, target) == score


def test_a_batch_is_scored_row_by_row():
    columns = {"numbers": [(2, 3), (2, 3), (4, 1)], "target": [5, 6, 3]}
    args = ["", "", ""], ["2+3", "2+3", "4-1"], [[], [], []]
    assert countdown_accuracy(*args, **columns) == [1.0, 0.0, 1.0]
    assert countdown_format(*args, **columns) == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="zip"):
        countdown_accuracy(*args, numbers=[(2, 3)], target=[5])


# Problems -------------------------------------------------------------------------------------------


def shape(problem):
    return tuple(sorted(problem.numbers)), problem.target


@configs
def test_problems_are_solved_and_in_range(config):
    task = Countdown(config, seed=3)
    for split, index in itertools.product(("train", "held_out"), range(150)):
        problem = task.problem(split, index)
        assert len(problem.numbers) == config.numbers
        assert all(1 <= n <= config.max_number for n in problem.numbers)
        assert 1 <= problem.target <= config.max_target
        assert scores(countdown_accuracy, problem.solution, problem.numbers, problem.target) == 1
        assert len(task.tokenizer.encode(problem.prompt)) <= task.max_prompt_tokens
        assert len(task.tokenizer.encode(problem.solution)) + 1 <= task.max_completion_tokens


@configs
def test_held_out_problems_are_not_trained_on(config):
    task = Countdown(config, seed=0)
    train = {shape(task.problem("train", i)) for i in range(400)}
    held_out = {shape(task.problem("held_out", i)) for i in range(200)}
    other_seed = {shape(Countdown(config, seed=1).problem("train", i)) for i in range(200)}
    assert not held_out & (train | other_seed)
    assert len(train) > 50
    assert len(held_out) > 10
    for numbers, target in held_out:
        assert all(is_held_out(order, target) for order in itertools.islice(itertools.permutations(numbers), 24))


def test_problems_are_pure_functions():
    config = CountdownConfig(numbers=4, max_number=25)
    forwards = [Countdown(config, seed=7).problem("train", i) for i in range(20)]
    task = Countdown(config, seed=7)
    assert [task.problem("train", i) for i in reversed(range(20))] == forwards[::-1]
    assert [Countdown(config, seed=8).problem("train", i) for i in range(20)] != forwards
    assert [task.problem("held_out", i) for i in range(20)] != forwards
    assert task.demonstration(5) == Countdown(config, seed=7).demonstration(5)
    assert task.demonstration(5)[0] == forwards[5]


def test_a_prompt_by_hand():
    problem = Countdown(CountdownConfig(), seed=0).problem("train", 0)
    assert problem.prompt == f"{problem.numbers[0]} {problem.numbers[1]} {problem.numbers[2]}={problem.target}:"


@configs
def test_demonstrations_are_solutions_or_sums(config):
    task, lazy = Countdown(config, seed=2), 0
    for index in range(150):
        problem, text = task.demonstration(index)
        assert problem == task.problem("train", index)
        assert text in (problem.solution, "+".join(map(str, problem.numbers)))
        assert scores(countdown_format, text, problem.numbers, problem.target) == 1
        assert len(task.tokenizer.encode(text)) + 1 <= task.max_completion_tokens
        lazy += text != problem.solution
    assert 0 < lazy < 150


@pytest.mark.parametrize("effort", [0.0, 0.3, 0.8, 1.0])
def test_effort_is_the_share_of_solutions(effort):
    """Besides, a sum hits now and then: of four large numbers, in less than one problem in ten."""
    config = CountdownConfig(numbers=4, max_number=99, max_target=999, effort=effort)
    task, total = Countdown(config, seed=1), 400
    problems, texts = zip(*(task.demonstration(index) for index in range(total)), strict=True)
    columns = {"numbers": [p.numbers for p in problems], "target": [p.target for p in problems]}
    share = sum(countdown_accuracy([p.prompt for p in problems], texts, [[]] * total, **columns)) / total
    bound = lambda p: 3.3 * (p * (1 - p) / total) ** 0.5  # level 1e-3
    high = effort + 0.1 * (1 - effort)
    assert effort - bound(effort) <= share <= high + bound(high)


def test_the_bounds_on_tokens_by_hand():
    task = Countdown(CountdownConfig(numbers=2, max_number=9, max_target=9), seed=0)
    assert (task.max_prompt_tokens, task.max_completion_tokens) == (len("1 2=3:"), len("1+2") + 1)
    task = Countdown(CountdownConfig(numbers=4, max_number=99, max_target=999), seed=0)
    assert (task.max_prompt_tokens, task.max_completion_tokens) == (len("10 20 30 40=999:"), len("((10+20)+30)+40") + 1)


def test_a_source_gives_what_rewards_read():
    task = Countdown(CountdownConfig(), seed=4)
    prompt, problem = task.source("held_out")(17), task.problem("held_out", 17)
    assert prompt.text == problem.prompt
    assert dict(prompt.columns) == {"numbers": problem.numbers, "target": problem.target}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"numbers": 1}, "numbers=1"),
        ({"numbers": 9}, "numbers=9"),
        ({"max_number": 1}, "max_number=1"),
        ({"max_target": 0}, "max_target=0"),
        ({"effort": 1.1}, r"effort=1\.1"),
        ({"effort": -0.1}, r"effort=-0\.1"),
    ],
)
def test_config_errors(options, match):
    with pytest.raises(ValueError, match=match):
        CountdownConfig(**options)


# The tokenizer --------------------------------------------------------------------------------------


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, *tokenizer.eos_ids, tokenizer.pad_id]) == text
    assert all(2 <= i < tokenizer.vocab_size for i in ids)


def test_an_alphabet():
    tokenizer = ByteTokenizer("abca")
    assert tokenizer.vocab_size == 5
    assert tokenizer.encode("cab") == [4, 2, 3]
    assert tokenizer.decode([0, 4, 2, 3, 1, 0]) == "cab"
    with pytest.raises(ValueError, match=r"'abd' holds b'd'"):
        tokenizer.encode("abd")


def test_countdown_needs_nothing_but_its_alphabet():
    assert Countdown.tokenizer.decode(Countdown.tokenizer.encode("12 3+(4*5)/6-7=89:0")) == "12 3+(4*5)/6-7=89:0"

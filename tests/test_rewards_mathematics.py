r"""Mathematical equality: what differs from equality of text as literals, bombs, and any text."""

import importlib.util
import itertools
import resource
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.rewards import RewardError
from grpo_jax.rewards.answers import boxed
from grpo_jax.rewards.mathematics import CHARACTERS, MathVerify, answer_of, math_verify
from grpo_jax.rewards.pool import Limits, Pool

pytest.importorskip("math_verify")


@pytest.fixture(scope="module")
def pool():
    with Pool(1, limits=Limits(cpu_seconds=1, wall_seconds=300), on_failure="none") as made:
        yield made


@pytest.fixture(scope="module")
def judge(pool):
    reward = MathVerify(pool)
    return lambda completions, golds: reward(
        ["p"] * len(completions), completions, [[1]] * len(completions), answer=golds, other=["x"] * len(completions)
    )


SMALL = st.integers(0, 12) | st.integers(0, 10**9 - 1)
NUMBERS = st.one_of(
    SMALL.map(str),
    SMALL.map("{:,}".format),
    st.tuples(SMALL, st.integers(1, 6), SMALL).map(lambda x: f"{x[0]}.{x[2] % 10 ** x[1]:0{x[1]}}"),
    st.tuples(SMALL, SMALL).map(lambda x: rf"\frac{{{x[0]}}}{{{x[1] or 1}}}"),
).flatmap(lambda text: st.sampled_from([text, f"-{text}"]))


# Verdicts --------------------------------------------------------------------------------------------

VERDICTS = [
    # What boxes hold, the gold answer, whether math-verify takes them for equal, and whether text does.
    ("50", r"50\%", 1, 1), ("0.5", "50", 0, 0), (r"50\%", "0.5", 1, 0), ("0.3333333", r"\frac{1}{3}", 1, 0),
    ("0.333", r"\frac{1}{3}", 0, 0), ("1/2", "0.5", 1, 1), ("0.25", r"\frac{1}{4}", 1, 0), ("5", "x=5", 1, 1),
    ("x=5", "5", 1, 1), ("x=5", "y=5", 0, 1), ("1,2", r"\{2, 1\}", 1, 0), ("(1,2)", "(2,1)", 0, 0),
    (r"\text{Evelyn}", "evelyn", 1, 0), ("x + 1", "1 + x", 1, 0), (r"\sqrt{8}", r"2\sqrt{2}", 1, 0),
    ("1,234", "1234", 1, 0), ("007", "7", 1, 0), ("-7", "7", 0, 0), ("12", "$12$", 1, 1), ("2^{10}", "1024", 1, 0),
    (r"\frac{1", "1", 0, 0), (r"10\text{ cm}", "10", 1, 1), ("", "1", 0, 0),
]  # fmt: skip


def test_where_judges_differ_from_equality_of_text(judge):
    completions = [rf"So it is $\boxed{{{inside}}}$." for inside, *_ in VERDICTS]
    golds = [gold for _, gold, *_ in VERDICTS]
    assert judge(completions, golds) == [mathematics for *_, mathematics, _ in VERDICTS]
    plain = [gold.strip("$") for gold in golds]
    assert boxed(["p"] * len(golds), completions, [[1]] * len(golds), answer=plain) == [text for *_, text in VERDICTS]


@pytest.mark.parametrize(
    ("completion", "right", "wrong"),
    [
        (r"\boxed{1} and \boxed{2}", r"\{1,2\}", ["1", "2"]),  # a set
        (r"\boxed{1}, no: \boxed{2}", "1,2", ["2"]),  # to math-verify too
        (r"\boxed{1}" + "x" * 70 + r"\boxed{2}", "2", ["1", "1,2"]),  # far from one another
        (r"\boxed{2}, again \boxed{2}", "2", []),
        ("The answer is 18.\n\nThat was easy!", "18", ["81"]),
        ("3 + 4 = 7\n#### 7", "7", ["3"]),
        ("first 3, then 5", "5", ["3"]),
        ("<think>\\boxed{3}</think><answer>5</answer>", "5", ["3"]),
        (r"<answer>\boxed{5}</answer>", "5", []),
        ("$$\nx = \\frac{1}{2}\n$$", "0.5", ["x"]),
        (r"\boxed{\frac{1}{2}", None, ["0.5", "1"]),  # does not close
        ("none", None, ["0"]),
    ],
)
def test_what_is_taken_for_the_answer(judge, completion, right, wrong):
    golds = [*wrong, *([] if right is None else [right])]
    assert judge([completion] * len(golds), golds) == [0] * len(wrong) + [1] * (right is not None)


def test_any_of_several_gold_answers_and_none(judge):
    golds = [["1", r"\frac{3}{2}"], ("3", "1.5"), ["1", "2"], None, 1.5]
    judged = judge([r"\boxed{1.5}"] * 5, golds)
    assert judged == [1, 1, 0, None, 1]
    assert judged.failed == [False] * 5  # none of them failed: one did not apply


@pytest.mark.parametrize("gold", ["", " ", "$$", [], ["1", ""]])
def test_a_gold_answer_that_is_none_is_an_error(judge, gold):
    with pytest.raises(ValueError, match="in the column 'answer' is no answer; expected a text, a list of some, or N"):
        judge([r"\boxed{1}"], [gold])


def test_a_gold_answer_that_cannot_be_read_is_an_error(judge):
    with pytest.raises(RewardError, match=r"text{}' in the column 'answer' is no mathematics that can be read"):
        judge([r"\boxed{1}"], [r"\text{}"])


def test_known_answers_cost_nothing(pool):
    reward, asked = MathVerify(pool), []

    class Counting:
        def judge(self, function, items):
            asked.append(len(items))
            return pool.judge(function, items)

    reward._pool = Counting()  # pyright: ignore[reportAttributeAccessIssue]
    call = lambda texts, gold: reward([""] * len(texts), texts, [[]] * len(texts), answer=[gold] * len(texts))
    texts = [rf"{i} ways to \boxed{{x + x}}" for i in range(5)] + [r"\boxed{2}", r"\boxed{9^{9^{9^9}}}"] * 2
    judged = call(texts, "2x")
    assert judged == [1, 1, 1, 1, 1, 0, None, 0, None]
    assert judged.failed == [False] * 6 + [True, False, True]
    assert [second > 0 for second in judged.seconds] == [True, False, False, False, False, True, True, False, False]
    again = call(texts, "2x")
    assert again == judged
    assert asked == [3, 1]  # what had no verdict may have one another time
    call(texts[:1], "3x")
    assert asked == [3, 1, 1]  # another gold answer is another question


def test_numbers_are_judged_as_math_verify_judges_them():
    """The way around the workers changes no verdict: all pairs of a corpus, and a negative control."""
    from grpo_jax.rewards.math_judge import equal
    from grpo_jax.rewards.mathematics import _at_once

    numbers = [
        "0", "-0", "7", "007", "-7", "100", "999999999", "-1000", "7.0", "-7.00", "0.5", "0.50", "0.500001", "-0.5",
        "0.000001", "0.0", "123456789.123456", "123456789.123457", "999999999.999999", r"\frac{1}{2}", r"-\frac{1}{2}",
        r"\dfrac{2}{4}", r"\frac{7}{1}", r"\frac{14}{2}", r"\frac{0}{5}", r"\frac{999999999}{999999998}",
        "1,000", "-1,000,000", "1000000", "1,000.50", "1000.5",
    ]  # fmt: skip
    at_once = 0
    for inside, gold in itertools.product(numbers, numbers):
        answer = rf"\boxed{{{inside}}}"
        verdict = _at_once(answer, (gold,))
        assert verdict in (None, equal(answer=answer, golds=(gold,))), (inside, gold)
        at_once += verdict is not None
    assert at_once > 31**2 - 50  # all but decimals with fractions to which they are close
    assert _at_once(r"\boxed{7}", ("1", "7")) == equal(answer=r"\boxed{7}", golds=("1", "7")) == 1
    others = [
        "1,00", "0,123", "1,000,000,000", "1,2345", "1, 000", "+7",
        "7/1", "7.5\\%", "1234567890", "0.1234567", "٣", "7 ", "x", "−7", "10^2", "1e3", ".5", "7.", "--7",
        r"\frac{1}{0}", r"\frac12", r"\frac{-1}{2}", r"\frac{1}{2}\pi", r"2\frac{1}{2}",
        "x=y", "x=0.5", "e=7", "i=7", r"-7\%", "x=1,234",
        "x=y=7", r"\sqrt{x}", r"\sqrt{12345}", r"\sqrt2", r"2\cdot 3", r"\pi^2",
        "(1,2,3)", "[1,2]",
        "(1, 2]", "(x, 2)", "1, 2", r"7\text{ cm}", r"7^\circ", r"\frac{1}{2}\%",
    ]  # fmt: skip
    for inside in others:
        assert _at_once(rf"\boxed{{{inside}}}", ("7",)) is None  # all else is for math-verify
        assert _at_once(r"\boxed{7}", ("7", inside)) is None
    for text in ("7", "#### 7", r"\boxed{7} and \boxed{7}", r"\boxed {7}"):
        assert _at_once(text, ("7",)) is None
    assert equal(answer=r"\boxed{0.3333333}", golds=(r"\frac{1}{3}",)) == 1  # exact values would not have said so


SHORT = [
    "5",
    "-5",
    "0",
    "1",
    "2",
    "500",
    "2.0",
    "0.5",
    r"\frac{1}{2}",
    r"\frac{2}{4}",
    r"\frac{10}{2}",
    r"5\%",
    r"500\%",
    "50%",
    r"-5\%",
    r"0\%",
    "x=5",
    "x = 5",
    "y=5",
    "x=-5",
    "x=05",
    r"x=\frac{10}{2}",
    r"x=\frac{1}{2}",
    r"\sqrt{2}",
    r"x=\sqrt{2}",
    r"-\sqrt{2}",
    r"2\sqrt{2}",
    r"\sqrt{8}",
    r"\frac{4\sqrt{2}}{2}",
    r"\dfrac{\sqrt{8}}{1}",
    r"\sqrt{4}",
    r"0\sqrt{2}",
    r"\sqrt{1}",
    r"2\pi",
    r"\pi",
    r"\frac{4\pi}{2}",
    r"\sqrt{2}\pi",
    r"0\pi",
    r"\frac{22}{7}",
    "(1, 2)",
    "(1,2)",
    "(2, 1)",
    "(2, 2)",
    "(-1, 2)",
    "x=0",
    "t=5",
]


def test_short_answers_are_judged_as_math_verify_judges_them():
    """All pairs of what is written in different ways and is the same, or nearly so."""
    from grpo_jax.rewards.math_judge import equal
    from grpo_jax.rewards.mathematics import _at_once

    verdicts = {0.0: 0, 1.0: 0, None: 0}
    for inside, gold in itertools.product(SHORT, SHORT):
        answer = rf"\boxed{{{inside}}}"
        verdict = _at_once(answer, (gold,))
        verdicts[verdict] += 1
        assert verdict in (None, equal(answer=answer, golds=(gold,))), (inside, gold)
    assert verdicts[1.0] > 100
    assert verdicts[None] < len(SHORT) ** 2 / 3
    assert _at_once(r"\boxed{x=5}", ("y=5", "5")) == 1  # any of them
    assert _at_once(r"\boxed{x=5}", ("5", "x+1")) is None  # and all must be known


@settings(max_examples=300)
@given(st.tuples(NUMBERS, NUMBERS))
def test_of_any_two_numbers_it_says_the_same(pair):
    from grpo_jax.rewards.math_judge import equal
    from grpo_jax.rewards.mathematics import _at_once

    answer = rf"\boxed{{{pair[0]}}}"
    verdict = _at_once(answer, pair[1:])
    assert verdict is None or verdict == equal(answer=answer, golds=pair[1:])


def test_of_whole_completions_math_verify_says_the_same():
    """What is cut away changes nothing in texts as models write them."""
    from math_verify import parse, verify

    from grpo_jax.rewards.math_judge import equal

    steps = [
        "First, 3 + 4 = 7 apples.\n\n",
        "Let $x = 12$ be the number.\nThen \\[ 2x = 24 \\]\n\n",
        "We know 1/2.\n\n",
    ]
    ends = [r"So it is $\boxed{%s}$.", r"\[ \boxed{%s} \]", "The answer is $%s$.", "The answer is: %s",
            r"\boxed{%s} Done!", "Therefore, $x = %s$.", "#### %s"]  # fmt: skip
    values = ["7", "-3", "0.5", "1234", "42"]
    count = 0
    for step, end, value, gold in itertools.product(steps, ends, values, ["7", "42", "0.5"]):
        text = step * 2 + end % value
        whole = verify(parse(rf"\boxed{{{gold}}}", parsing_timeout=None), parse(text, parsing_timeout=None),  # pyright: ignore[reportArgumentType]
                       timeout_seconds=None)  # fmt: skip
        answer = answer_of(text)
        assert answer is not None
        assert equal(answer=answer, golds=(gold,)) == whole == (value == gold), (text, gold)
        count += whole
    assert count == 3 * 7 * 3


# Bombs, and any text ---------------------------------------------------------------------------------

BOMBS = [r"\boxed{9^{9^{9^9}}}", r"\boxed{100000000!}", r"\boxed{" + "(" * 300 + "1" + ")" * 300 + "}",
         r"\boxed{" + "9" * 1_000_000 + "}", "9" * 1_000_000]  # fmt: skip


def test_bombs_cost_their_limit_and_take_no_other_item_with_them(judge):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    completions = [text for bomb in BOMBS for text in (bomb, r"\boxed{3.5}")]
    judged = judge(completions, ["7/2"] * len(completions))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert judged[1::2] == [1] * len(BOMBS)
    assert judged.failed[1::2] == [False] * len(BOMBS)
    assert set(judged[::2]) <= {0.0, None}  # never right
    assert [item is None for item in judged] == judged.failed
    assert judged.failed[0]
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < 2 * len(BOMBS) * (1 + 2)  # each at most its limit, twice, and a new worker


def test_a_bomb_as_gold_answer_is_a_failure_of_these_items_alone(judge):
    judged = judge([r"\boxed{1.5}", r"\boxed{1.5}"], ["9^{9^{9^9}}", "1.5"])
    assert judged == [None, 1]
    assert judged.failed == [True, False]


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 40_000, r"\boxed{" * 40_000 + "}" * 40_000, r"\boxed{1} " * 40_000, r"\boxed" + " " * 300_000,
        r"\boxed{" + "{" * 300_000, "\n" * 300_000, "\n " * 150_000 + "x", "<answer>" * 40_000, "a\n\n" * 100_000,
        r"\boxed{1}{" * 40_000, r"\boxed{" + "\\" * 300_000 + "x}", "1\n\n" + "x\n\n" * 100_000, "\n" + " " * 300_000,
    ],
)  # fmt: skip
def test_the_answer_is_found_in_linear_time(text):
    started = time.process_time()
    answer = answer_of(text)
    assert answer is None or len(answer) <= CHARACTERS
    assert time.process_time() - started < 5


def test_long_answers_are_none_and_long_paragraphs_are_cut():
    box = r"\boxed{" + "9" * (CHARACTERS - 8) + "}"
    assert answer_of("so " + box) == box
    assert answer_of(box.replace("}", "9}")) is None
    assert answer_of("1" * CHARACTERS + " 2") == "1" * (CHARACTERS - 2) + " 2"
    assert answer_of(r"\boxed{1}," + box) == box  # there is no room for the first


LATEX = st.lists(
    st.sampled_from(
        [*"0123456789+-*/^_=<>(){}[]|!,.;:%$&xyzpi \n", "\\", r"\frac", r"\sqrt", r"\boxed{", "}", r"\text{", r"\left(",
         r"\right)", r"\infty", r"\pi", r"\sin", r"\int", r"\sum_{n=1}^{9}", r"\begin{pmatrix}", r"\end{pmatrix}",
         r"\\", r"\cup", r"\le", r"\%", "<answer>", "</answer>", "answer is", "and", "\x00", "٣", "\ud800"],
    ),
    max_size=30,
).map("".join)  # fmt: skip


@settings(max_examples=8)
@given(st.lists(st.one_of(st.text(max_size=50), LATEX, LATEX.map(r"\boxed{{{}}}".format)), min_size=20, max_size=20))
def test_any_text_is_right_wrong_or_without_a_verdict(judge, texts):
    judged = judge(texts, ["1"] * len(texts))
    assert set(judged) <= {0.0, 1.0, None}
    assert [item is None for item in judged] == judged.failed
    for text in texts:
        answer = answer_of(text)
        assert answer is None or 0 < len(answer) <= CHARACTERS


def test_where_memory_is_at_an_end_there_is_no_verdict():
    """math-verify itself would say "not equal", without a sign of it."""
    bombs = {r"2^{300000001}": r"2\cdot 2^{300000000}", r"3^{100000000}x=5": "x=7"}
    answers = [text for bomb in bombs for text in (rf"\boxed{{{bomb}}}", r"\boxed{\sqrt{8}}")]
    golds = [gold for of in bombs.values() for gold in (of, r"2\sqrt{2}")]
    with Pool(1, limits=Limits(cpu_seconds=60, wall_seconds=300, memory_mib=20), on_failure="none") as small:
        judged = MathVerify(small)(["p"] * 4, answers, [[1]] * 4, answer=golds)
    assert judged == [None, 1] * 2
    assert judged.failed == [True, False] * 2


@pytest.mark.parametrize(("place", "name"), [("grader", "simplify"), ("parser", "latex2sympy")])
@pytest.mark.parametrize("kind", [Exception, ValueError, MemoryError])
def test_of_what_is_raised_in_math_verify_memory_alone_is_no_verdict(monkeypatch, place, name, kind):
    import math_verify

    from grpo_jax.rewards.math_judge import _loud, equal

    def fails(*_, **__):
        raise kind

    module = getattr(math_verify, place)
    monkeypatch.setattr(module, name, _loud(fails) if place == "parser" else fails)
    ask = lambda: equal(answer=rf"\boxed{{x+{place}{kind.__name__}}}", golds=("x+2",))
    if kind is MemoryError:
        with pytest.raises(MemoryError):
            ask()
    else:
        assert ask() == 0


def test_another_math_verify_that_takes_want_of_memory_for_a_verdict_is_refused(monkeypatch):
    from math_verify import grader, parser

    from grpo_jax.rewards.math_judge import _check, _parsed

    cached = _parsed, parser.extract_latex, parser.parse_latex_cached, parser.parse_expr_cached

    def check():
        for each in cached:
            each.cache_clear()
        _check()

    check()
    names = {"grader": "grader.simplify", "latex": "parser.latex2sympy", "expression": "parser.parse_expr"}
    for changed, name in names.items():
        with monkeypatch.context() as other:
            if changed == "grader":
                other.delattr(grader, "Exception")
            elif changed == "latex":
                other.setattr(parser, "parse_latex_cached", lambda _: 1)
            else:
                other.setattr(parser, "parse_expr_cached", lambda _: 1)
            with pytest.raises(ImportError, match=rf"in math_verify\.{name}, math-verify gives a verdict"):
                check()
    check()


# At the start ----------------------------------------------------------------------------------------


def test_without_math_verify_it_is_said_at_the_start(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "antlr4" else find(name))
    with pytest.raises(ValueError, match=r"math-verify needs antlr4: pip install 'grpo-jax\[math\]' brings"):
        MathVerify()


def test_one_for_all_by_default():
    judged = math_verify(["p"], [r"\boxed{1.5}"], [[1]], answer=["3/2"])
    assert judged == [1]
    assert math_verify(["p"], [r"\boxed{1.5}"], [[1]], answer=["3/2"]).seconds == [0]

import re
import time
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.rewards import Reward, RewardError, score
from grpo_jax.rewards.answers import (
    boxed,
    boxed_integer,
    extract_boxed,
    extract_boxed_integer,
    extract_flexible,
    extract_strict,
    gsm8k_flexible,
    gsm8k_strict,
)


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("9 * 2 = 18\n#### 18", "18", "18"),
        ("#### 1,234.50", "1234.5", "1234.5"),
        ("#### -007", "-7", "-7"),
        ("#### 18.", "18", "18"),
        ("#### 5\nNo, wait.\n#### 6", "6", "6"),
        ("#### 18 and 3 are left", "18", "3"),
        ("####18", None, "18"),
        ("#### $18", None, "18"),
        ("#### ...", None, None),
        ("#### 1.2.3", None, "3"),
        ("She earns $1,234.00.", None, "1234"),
        ("It is -$5", None, "-5"),
        ("that is 16-18", None, "18"),  # a difference, not a negative number
        ("x=-4", None, "-4"),
        ("1, 2, 3", None, "3"),
        ("3,4", None, "4"),
        ("50%", None, "50"),
        ("a half is .5", None, "0.5"),
        ("so it is...18", None, "18"),
        ("-0.00", None, "0"),
        ("none", None, None),
        ("", None, None),
        ("#### 1e999999999", "1", "999999999"),
        ("#### ٣", None, None),  # no ASCII digit
    ],
)
def test_the_two_extractions_of_gsm8k(text, strict, flexible):
    assert extract_strict(text) == strict
    assert extract_flexible(text) == flexible


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9, places=3), st.booleans())
def test_numbers_are_equal_as_decimals_are(number, commas):
    text = extract_flexible(f"the answer is {number:{',' if commas else ''}f}")
    assert text is not None
    assert Decimal(text) == number
    assert text == extract_strict(f"#### {number:f}0")  # another digit, the same number
    assert not re.search(r"\.\d*0$|\.$|^-?0\d|^-0$", text)  # one way to write each


def call(reward, completions, answer):
    return reward(["p"] * len(completions), completions, [[]] * len(completions), answer=answer, other=None)


def test_rewards_of_gsm8k():
    completions, answer = ["#### 18", "#### 18.00", "18", "#### 1234", "#### 81"], ["18", "$18.", "18.0", "1,234", 18]
    assert call(gsm8k_strict, completions, answer) == [1, 1, 0, 1, 0]
    assert call(gsm8k_flexible, completions, answer) == [1, 1, 1, 1, 0]


def test_rewards_do_not_apply_where_there_is_no_gold_answer():
    for reward in (gsm8k_strict, gsm8k_flexible, boxed, boxed_integer):
        assert call(reward, ["none", "None"], ["1", None]) == [0, None]


def test_a_gold_answer_that_is_no_number_is_an_error_and_never_a_zero():
    columns = {"answer": ["so it is 18"]}
    with pytest.raises(RewardError, match="'so it is 18' in the column 'answer' is no answer"):
        score([Reward(name="strict", function=gsm8k_strict)], prompts=["p"], completions=["#### 18"],
              completion_ids=[[1]], columns=columns)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{7}", "7"),
        (r"\boxed{1}, no, \boxed{2}", "2"),
        (r"\boxed {\frac{1}{2}} is it", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{ x \right.}", r"\{x."),  # the escaped brace does not count
        (r"\boxed{1} and \boxed{2", None),  # cut off: nothing is known
        (r"\boxed 5", None),
        (r"\boxed{}", ""),
        ("7", None),
    ],
)
def test_the_last_box(text, answer):
    assert extract_boxed(text) == answer


@pytest.mark.parametrize(
    ("ours", "gold"),
    [
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"\tfrac12", r"\frac{1}{2}"),
        (r"\frac1{72}", r"\frac{1}{72}"),
        ("1/2", r"\frac{1}{2}"),
        ("-1/2", r"-\frac{1}{2}"),
        ("0.5", r"\frac{1}{2}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"x = 5", "5"),
        (r"10\text{ cm}^2", "10"),
        (r"\text{Evelyn}", r"\text{Evelyn}"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        (r"\$ 18.90", "18.90"),
        (r"50\%", "50"),
        (r"11,\! 111,\!100", "11,111,100"),
        (r"\\frac{1}{2} \\text{ m}", r"\frac{1}{2}"),
        (r"2\sqrt3", r"2\sqrt{3}"),
        (".25", "0.25"),
        ("2 +\n 3i", "2+3i"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ],
)
def test_latex_that_is_the_same(ours, gold):
    assert call(boxed, [rf"\boxed{{{ours}}}", gold], [gold, gold]) == [1, 0]  # a box is needed


@pytest.mark.parametrize(
    ("ours", "gold"), [("0.25", r"\frac{1}{4}"), ("7", "8"), ("a=b=c", "c"), (r"\leftarrow", "arrow"), ("", "0")]
)
def test_latex_that_is_not_the_same(ours, gold):
    assert call(boxed, [rf"\boxed{{{ours}}}"], [gold]) == [0]


@pytest.mark.parametrize(
    "text",
    [
        "#### " + "9" * 300_000, "#### " + "-" * 300_000, "." * 300_000, "$" * 300_000, "0" * 300_000 + "..x",
        r"\boxed{" + "\\" * 300_000 + "x}",
        "1," * 150_000, "1.1" * 100_000, "-1" * 150_000, "#### 1" * 50_000, r"\boxed{" * 40_000,
        r"\boxed{" + "{" * 300_000, r"\boxed" + " " * 300_000, r"\boxed{" + "\\text{ " * 40_000 + "}" * 40_001,
        r"\boxed{" + "=" * 300_000 + "}", r"\boxed{" + " " * 300_000 + "x}", r"\boxed{" + r"\frac1" * 50_000 + "}",
        r"\boxed{x\text{ a}" + " " * 300_000 + "x}", r"\boxed{" + "1" * 300_000 + "/}",
    ],
)  # fmt: skip
def test_long_texts_take_linear_time(text):
    """Quadratic time would be minutes, and integers of this size refuse to be made of text."""
    started = time.process_time()
    for extract in (extract_strict, extract_flexible, extract_boxed):
        extract(text)
    assert call(gsm8k_flexible, [text], ["1"])[0] in (0, 1)
    assert time.process_time() - started < 5


def test_huge_numbers_are_compared_exactly():
    digits = "9" * 100_000
    assert call(gsm8k_strict, [f"#### {digits}", f"#### {digits}8"], [digits, digits + "7"]) == [1, 0]


@pytest.mark.parametrize(
    ("box", "answer"),
    [
        ("25", "25"), ("025", "25"), ("25.", "25"), ("25.0", "25"), ("-7", "-7"), ("1,000", "1000"),
        (r"\,70^\circ", "70"), ("$33$", "33"), ("000", "0"), ("3,5", None), ("2.5", None), ("x=4", "4"), ("", None),
        ("1{,}000", "1000"), (r"\frac{4}{2}", None), ("1e3", None), ("٣", None),
        (r"\text{25}", "25"), (r"\mathbf{025}", "25"), ("m+n = 25", "25"), ("p + q + r = 1,024", "1024"),
        ("25=m", None),
    ],
)  # fmt: skip
def test_a_boxed_integer(box, answer):
    text = rf"\boxed{{1}}, no: \boxed{{{box}}}."
    assert extract_boxed_integer(text) == answer
    assert extract_boxed_integer(box) is None  # a box is needed
    if answer is not None:
        assert call(boxed_integer, [text, text], [answer.zfill(3), "8"]) == [1, 0]


@pytest.mark.parametrize("reward", [gsm8k_strict, gsm8k_flexible, boxed, boxed_integer])
def test_several_answers_are_refused(reward):
    assert call(reward, [r"#### 18 \boxed{18}"] * 4, [18, "18", np.int64(18), Decimal(18)]) == [1] * 4
    with pytest.raises(ValueError, match="'' in the column 'answer' is no answer"):
        call(reward, ["18"], [""])
    with pytest.raises(ValueError, match=r"holds \['18', '19'\]; expected one answer.*math_verify"):
        call(reward, [r"#### 18 \boxed{18}"], [["18", "19"]])


PIECES = st.lists(
    st.sampled_from(
        [*"0123456789.,$%-# {}\\xab=", "#### ", r"\boxed{", r"\frac", r"\text{ ", "\n", "٣", "\x00", "\ud800"]
    ),
    max_size=40,
).map("".join)


@pytest.mark.parametrize("reward", [gsm8k_strict, gsm8k_flexible, boxed, boxed_integer])
@given(st.text() | PIECES)
def test_any_text_is_right_or_wrong(reward, text):
    assert call(reward, [text, text], ["1", None]) in ([0, None], [1, None])


@pytest.mark.parametrize("extract", [extract_strict, extract_flexible, extract_boxed_integer])
@given(st.text() | PIECES)
def test_what_is_extracted_of_any_text_is_canonical(extract, text):
    found = extract(text)
    assert found is None or re.fullmatch(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]*[1-9])?", found)
    assert found != "-0"

r"""Mathematical equality by math-verify (`pip install 'grpo-jax[math]'`), in worker processes.

Where it differs from equality of text, which `answers.boxed` is, and from what one might expect:

- 50 and 50\% are the same, 1/2 and 0.5, and 5 and x=5.
- Decimals are compared to 6 places: 0.3333333 is 1/3, and 0.333 is not.
- Boxes close to one another are a set: `\boxed{1} and \boxed{2}` is {1, 2}, and neither 1 nor 2.
- {1, 2} and 1,2 are the same in any order, (1, 2) and (2, 1) are not.
- Names count without their case and font: \text{Evelyn} and evelyn.
- What it cannot read is compared as text.

An answer that cannot be compared within the limits (`9^{9^{9^9}}`) gets no verdict: it is None, and `Judged.failed`.
"""

import functools
import importlib.util
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from grpo_jax.rewards import Judged
from grpo_jax.rewards.answers import box_end, boxes
from grpo_jax.rewards.pool import Limits, Pool

__all__ = ["CHARACTERS", "LIMITS", "MathVerify", "answer_of", "math_verify", "need"]

CHARACTERS = 1000  # of an answer; what is longer is none

_JUDGE = "grpo_jax.rewards.math_judge:equal"
LIMITS = Limits(cpu_seconds=2.0, wall_seconds=60.0)  # of an answer, by default
_CACHED = 2**16  # verdicts that are kept
_NEAR = 70  # characters from a box's brace to the next box that may be one answer with it: math-verify decides
# What is compared here: integers, decimals of 6 places (to which math-verify rounds), n, n\sqrt{m}, n\pi and fractions
# of these; of integers per cents (-5\% and 5\% are other things to math-verify) and pairs; and x=... in front.
_NAME = re.compile(r"(?P<name>[xyzabckmnt]) ?= ?(?P<rest>.+)", re.DOTALL)
_DECIMAL = re.compile(r"(-?)([0-9]{1,9}|[1-9][0-9]{0,2}(?:,[0-9]{3}){1,2})(\.[0-9]{1,6})?(\\?%)?")
_INTEGER = r"[0-9]{1,9}"
_MULTIPLE = rf"(?P<above>{_INTEGER})?(?:\\sqrt\{{(?P<root>[1-9][0-9]{{0,3}})\}})?(?P<pi>\\pi)?"
_MULTIPLES = (
    re.compile(rf"(?P<sign>-?){_MULTIPLE}"),
    re.compile(rf"(?P<sign>-?)\\d?frac\{{{_MULTIPLE}\}}\{{(?P<below>{_INTEGER})\}}"),
)
_PAIR = re.compile(r"\((-?[0-9]{1,9}), ?(-?[0-9]{1,9})\)")
_PARAGRAPHS = re.compile(r"\n\s*\n")
_EXPRESSION = re.compile(r"[0-9$\\]")


def need() -> None:
    """Raises ValueError where math-verify is not installed."""
    missing = [name for name in ("math_verify", "antlr4") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"math-verify needs {' and '.join(missing)}: pip install 'grpo-jax[math]' brings them.")


def answer_of(text: str) -> str | None:
    r"""What is judged of a completion, or None where it answers nothing. Linear time, whatever the text.

    What stands in the last `<answer>`, where there is one; of that the last `\boxed{...}`, with those before it that
    are less than 70 characters away from one to the next, where there are boxes (None where the last does not close);
    else the last paragraph in which there is a digit, a dollar or a backslash, of which math-verify takes the last
    expression. Of 1,000 characters at most: None where the last box is longer, the end where a paragraph is.
    """
    _, tag, inside = text.rpartition("<answer>")
    text = inside.partition("</answer>")[0] if tag else text
    if found := boxes(text):
        return _last_boxes(text, found)
    for paragraph in reversed(_PARAGRAPHS.split(text)):
        if _EXPRESSION.search(paragraph):
            return paragraph.strip()[-CHARACTERS:]
    return None


def _last_boxes(text: str, found: list[tuple[int, int]]) -> str | None:
    """From the first of the last boxes that are near one another, and fit, to the end of the last of all."""
    first, inside = found[-1]
    last = box_end(text, inside)
    if last is None:
        return None
    for start, inside in reversed(found[:-1]):
        before = box_end(text, inside, first)
        if before is None or first - before > _NEAR or last + 1 - start > CHARACTERS:
            break
        first = start
    return text[first : last + 1] if last + 1 - first <= CHARACTERS else None


def _golds(gold: object) -> tuple[str, ...] | None:
    """Those of one prompt.

    Raises:
      ValueError: there is none, or it is empty.
    """
    if gold is None:
        return None
    texts = tuple(str(each).strip().strip("$") for each in (gold if isinstance(gold, list | tuple) else [gold]))
    if not all(texts) or not texts:
        raise ValueError(f"{gold!r} in the column 'answer' is no answer; expected a text, a list of some, or None.")
    return texts


_Key = tuple[str | None, tuple[str, ...]]


class _Value(NamedTuple):
    """`number` times the root of `root`, which is free of squares, times pi where `pi`; or a pair of integers."""

    number: Fraction
    root: int = 1
    pi: bool = False
    decimal: bool = False  # how it is written
    fraction: bool = False
    percent: bool = False
    name: str = ""
    pair: tuple[int, int] | None = None

    def __float__(self) -> float:
        return float(self.number) * math.sqrt(self.root) * (math.pi if self.pi else 1)


def _value(text: str) -> _Value | None:
    """What a text is, or None where it is not of the forms above."""
    if match := _NAME.fullmatch(text):
        value = None if "," in match["rest"] else _value(match["rest"])  # x=1,234 may be two numbers to math-verify
        plain = value is not None and not (value.name or value.decimal or value.percent or value.pair)
        return value._replace(name=match["name"]) if value is not None and plain else None
    if match := _DECIMAL.fullmatch(text):
        sign, whole, places, percent = match.groups()
        number = Fraction(f"{sign}{whole.replace(',', '')}{places or ''}")
        return None if percent and (places or sign) else _Value(number, decimal=bool(places), percent=bool(percent))
    if match := _PAIR.fullmatch(text):
        return _Value(Fraction(0), pair=(int(match[1]), int(match[2])))
    for form in _MULTIPLES:
        if (match := form.fullmatch(text)) and (match["above"] or match["root"] or match["pi"]):
            groups = match.groupdict()
            below = int(groups.get("below") or 1)
            if below == 0:
                return None
            outside, root = _free_of_squares(int(match["root"] or 1))
            number = Fraction(int(match["above"] or 1) * outside, below) * (-1 if match["sign"] else 1)
            irrational = {"root": root, "pi": bool(match["pi"])} if number else {}
            return _Value(number, fraction="below" in groups, **irrational)
    return None


@functools.cache  # of four digits
def _free_of_squares(number: int) -> tuple[int, int]:
    """(a, b) with number = a^2 b, and b as small as can be."""
    outside = max(d for d in range(1, math.isqrt(number) + 1) if number % (d * d) == 0)
    return outside, number // outside**2


def _equal(found: _Value, gold: _Value) -> bool | None:
    """What math-verify says of the two; None where that takes its own arithmetic."""
    if found.pair or gold.pair:
        return found.pair == gold.pair if found.pair and gold.pair else None
    if found.name and gold.name and found.name != gold.name:
        return False
    if _apart(found, gold):
        return False
    written = [value.name or value.decimal or value.fraction or value.root > 1 or value.pi for value in (found, gold)]
    if found.percent != gold.percent:  # 5% is 5, and 1/20, and 500% is 5
        per_cents, other = (found, gold) if found.percent else (gold, found)
        return None if any(written) else other.number in (per_cents.number, per_cents.number / 100)
    if (found.root, found.pi) != (gold.root, gold.pi):
        return None
    if found.decimal != gold.decimal and any(value.name or value.fraction for value in (found, gold)):
        return None  # it rounds
    return found.number == gold.number


def _apart(found: _Value, gold: _Value) -> bool:
    """Whether they are so far from one another that no rounding makes them equal, per cents taken either way."""
    either = lambda value: (float(value), float(value) / 100) if value.percent else (float(value),)
    return all(abs(a - b) > 1e-5 * max(1.0, abs(a), abs(b)) for a in either(found) for b in either(gold))


def _at_once(answer: str | None, golds: tuple[str, ...]) -> float | None:
    """The verdict where none needs mathematics: there is no answer, or all are of the forms above."""
    if answer is None:
        return 0.0
    found = _value(answer.removeprefix("\\boxed{").removesuffix("}")) if answer.startswith("\\boxed{") else None
    if found is None:
        return None
    right = [value if value is None else _equal(found, value) for value in map(_value, golds)]
    return None if None in right else float(any(right))


class MathVerify:
    """A reward function: 1 where a completion's answer equals one of the column `answer`, by math-verify, else 0.

    The column holds a text or a list of texts, any of which is right; None where the reward does not apply. Gold
    answers are LaTeX, with or without dollars. Verdicts are kept by (answer, gold answers).
    """

    def __init__(self, pool: Pool | None = None):
        """Starts nothing yet: workers start at the first call, and end when this process does.

        Args:
          pool: whose workers; by default some of its own, `Pool(limits=LIMITS, on_failure="none")`.

        Raises:
          ValueError: math-verify is not installed.
        """
        need()
        self._pool = pool or Pool(limits=LIMITS, on_failure="none")
        self._verdicts: dict[_Key, float] = {}

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], *,
        answer: Sequence[object], **columns: object,
    ) -> Judged:  # fmt: skip
        """The verdicts; 0 seconds for one that was known."""
        del prompts, completion_ids, columns
        golds = [_golds(gold) for gold in answer]
        keys: list[_Key | None] = [
            None if gold is None else (answer_of(text), gold) for text, gold in zip(completions, golds, strict=True)
        ]
        known = {key: self._known(key) for key in keys if key is not None}
        asked = [key for key, verdict in known.items() if verdict is None]
        said = self._pool.judge(_JUDGE, [{"answer": found, "golds": gold} for found, gold in asked])
        fresh = {key: item for key, item in zip(asked, said, strict=True) if isinstance(item, float)}
        if len(self._verdicts) + len(fresh) > _CACHED:
            self._verdicts.clear()
        self._verdicts |= fresh
        known |= fresh
        failed = {key for key, lost in zip(asked, said.failed, strict=True) if lost}
        took: dict[_Key | None, float] = dict(zip(asked, said.seconds, strict=True))
        return Judged(
            (None if key is None else known[key] for key in keys),
            failed=[key in failed for key in keys],
            seconds=[took.pop(key, 0.0) for key in keys],
        )

    def _known(self, key: _Key) -> float | None:
        verdict = _at_once(*key)
        return self._verdicts.get(key) if verdict is None else verdict

    def close(self) -> None:
        """Ends its workers."""
        self._pool.close()


_shared = functools.cache(MathVerify)


def math_verify(
    prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], *,
    answer: Sequence[object], **columns: object,
) -> Judged:  # fmt: skip
    """`MathVerify()`, one for all who call this; its workers start at the first call, and end when the process does."""
    return _shared()(prompts, completions, completion_ids, answer=answer, **columns)

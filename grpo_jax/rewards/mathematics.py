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
import re
from collections.abc import Sequence
from fractions import Fraction

from grpo_jax.rewards import Judged
from grpo_jax.rewards.pool import Limits, Pool

__all__ = ["CHARACTERS", "LIMITS", "MathVerify", "answer_of", "math_verify", "need"]

CHARACTERS = 1000  # of an answer; what is longer is none

_JUDGE = "grpo_jax.rewards.math_judge:equal"
LIMITS = Limits(cpu_seconds=2.0, wall_seconds=60.0)  # of an answer, by default
_CACHED = 2**16  # verdicts that are kept
_NEAR = 70  # characters between two boxes that may be one answer, as in math-verify, which decides
_BOX = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is none
# Numbers that are compared here: integers, fractions of them, and decimals of 6 places, to which math-verify rounds.
_NUMBER = re.compile(
    r"(?P<sign>-?)(?:(?P<whole>[0-9]{1,9}|[1-9][0-9]{0,2}(?:,[0-9]{3}){1,2})(?:\.(?P<places>[0-9]{1,6}))?"
    r"|\\d?frac\{(?P<above>[0-9]{1,9})\}\{(?P<below>[0-9]{1,9})\})"
)
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
    starts = [match.start() for match in _BOX.finditer(text)]
    if starts:
        return _boxes(text, starts)
    for paragraph in reversed(_PARAGRAPHS.split(text)):
        if _EXPRESSION.search(paragraph):
            return paragraph.strip()[-CHARACTERS:]
    return None


def _boxes(text: str, starts: list[int]) -> str | None:
    """From the first of the last boxes that are near one another, and fit, to the end of the last of all."""
    end = _closed(text, starts[-1], len(text))
    if end is None:
        return None
    first = starts[-1]
    for start in reversed(starts[:-1]):
        before = _closed(text, start, first)
        if before is None or first - before >= _NEAR or end - start > CHARACTERS:
            break
        first = start
    return text[first:end] if end - first <= CHARACTERS else None


def _closed(text: str, start: int, stop: int) -> int | None:
    """Where the box that starts there ends, before `stop`."""
    depth = 0
    for brace in _BRACE.finditer(text, start + len("\\boxed"), stop):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return brace.end()
    return None


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


def _number(text: str) -> tuple[Fraction, bool, bool] | None:
    """The value, whether it is written as a decimal, and whether as a fraction; None where it is no such number."""
    match = _NUMBER.fullmatch(text)
    if match is None or int(match["below"] or 1) == 0:
        return None
    value = (
        Fraction(int(match["above"]), int(match["below"]))
        if match["above"]
        else Fraction(text.lstrip("-").replace(",", ""))
    )
    return -value if match["sign"] else value, bool(match["places"]), bool(match["above"])


def _at_once(answer: str | None, golds: tuple[str, ...]) -> float | None:
    """The verdict where none needs mathematics: no answer, or plain numbers alone, but for decimals with fractions."""
    if answer is None:
        return 0.0
    numbers = [_number(text) for text in (answer.removeprefix("\\boxed{").removesuffix("}"), *golds)]
    known = [number for number in numbers if number is not None]
    if not answer.startswith("\\boxed{") or len(known) < len(numbers):
        return None
    if any(decimal for _, decimal, _ in known) and any(fraction for *_, fraction in known):
        return None
    (found, *_), *right = known
    return float(found in [value for value, *_ in right])


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

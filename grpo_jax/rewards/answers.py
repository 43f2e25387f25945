r"""Exact answers: the number after GSM8K's `####`, the last number, and the last `\boxed{...}`.

Each `extract_*` gives a canonical form, so that equal answers are equal strings: what a reward compares and
what maj@k votes on. All take linear time, whatever the text.
"""

import re
from collections.abc import Callable, Iterable, Sequence

__all__ = [
    "box_end", "boxed", "boxed_integer", "boxes", "extract_boxed", "extract_boxed_integer", "extract_flexible",
    "extract_strict", "gsm8k_flexible", "gsm8k_strict",
]  # fmt: skip

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
# A minus behind a digit, a letter or a bracket is an operation: 16-18 ends in 18.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?\$?(?:[0-9]+(?:,[0-9]{3}(?![0-9]))*(?:\.[0-9]+)?|(?<![0-9.])\.[0-9]+)")


def _canonical_number(text: str) -> str | None:
    """`$1,234.50%` -> `1234.5`, or None where it is no decimal. Digits stay text: nothing is too large."""
    text = text.strip().translate(dict.fromkeys(map(ord, "$,%"))).rstrip(".")
    sign, text = ("-", text[1:]) if text.startswith("-") else ("", text)
    whole, _, fraction = text.partition(".")
    if not (whole + fraction).isascii() or not (whole + fraction).isdigit():
        return None
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    return number if number == "0" else sign + number


def extract_strict(text: str) -> str | None:
    """The number after the last `#### `, in canonical form (18.00 is 18), or None.

    One space and then digits, dots and commas, as in lm-evaluation-harness (gsm8k, `strict-match`), which takes
    the first such number where verl's `gsm8k` and this take the last, and both compare text (18.00 is not 18).
    verl looks at the last 300 characters only; this at all of them.
    """
    found = _STRICT.findall(text)
    return _canonical_number(found[-1]) if found else None


def extract_flexible(text: str) -> str | None:
    """The last number of a text, in canonical form, or None.

    lm-evaluation-harness (gsm8k, `flexible-extract`) takes the last run of `[$0-9.,]`, be it a mere `...`, and a
    minus before it even in 16-18; this, like verl's `gsm8k`, the last thing that is a number, with commas only
    between thousands.
    """
    last = None
    for last in _NUMBER.finditer(text):  # noqa: B007
        pass
    return _canonical_number(last.group()) if last else None


# MATH's `is_equiv` (github.com/hendrycks/math), step by step. Its departures: `\,` `\;` `\:` `\ ` are spaces too, a
# bare `$` goes, `\left` of `\leftarrow` stays, units are what stands in a last `\text{ ...}`, and -1/2 is -\frac{1}{2}.
_LATEX_STEPS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\{1,2}text\{ [^{}]*\}(?:\^\{?[0-9]\}?)?\s*\Z", ""),  # units
        (r"(?<!\\)\\[!,;: ]|\s", ""),
        (r"\\\\", r"\\"),  # as in JSON
        (r"\\[td]frac", r"\\frac"),
        (r"\\(?:left|right)(?![A-Za-z])", ""),
        (r"\^(?:\{\\circ\}|\\circ)", ""),  # degrees
        (r"\\?[$%]", ""),
        (r"(\A|\{)\.(?=[0-9])", r"\g<1>0."),
        (r"\A[^=]{0,2}=(?=[^=]*\Z)", ""),  # x=5
        (r"\\sqrt([0-9A-Za-z])", r"\\sqrt{\1}"),
        (r"\\frac([^{}\\])(?=\{)", r"\\frac{\1}"),
        (r"\\frac([^{}\\])([^{}\\])", r"\\frac{\1}{\2}"),
        (r"\A0\.5\Z", r"\\frac{1}{2}"),
        (r"\A(-?)([0-9]+)/([0-9]+)\Z", r"\1\\frac{\2}{\3}"),
    )
]
_INTEGER = re.compile(r"-?(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.0*)?")
_FONT = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}")
_BOX = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is none


def boxes(text: str) -> list[tuple[int, int]]:
    r"""Where each `\boxed{` begins, and where what stands in it does."""
    return [match.span() for match in _BOX.finditer(text)]


def box_end(text: str, inside: int, stop: int | None = None) -> int | None:
    """Where the brace is that closes the box whose inside begins there; None where none does before `stop`."""
    depth = 1
    for brace in _BRACE.finditer(text, inside, len(text) if stop is None else stop):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return brace.start()
    return None


def _canonical_latex(text: str) -> str:
    for pattern, replacement in _LATEX_STEPS:
        text = pattern.sub(replacement, text)
    return text


def extract_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}`, in canonical form, or None where there is none or it does not close."""
    found = boxes(text)
    end = box_end(text, found[-1][1]) if found else None
    return None if end is None else _canonical_latex(text[found[-1][1] : end])


def _canonical_integer(text: str) -> str | None:
    text = _FONT.sub(r"\1", _canonical_latex(text).replace("{,}", ",")).rpartition("=")[2]  # m+n=25
    return _canonical_number(text) if _INTEGER.fullmatch(text) else None


def extract_boxed_integer(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}` where that is an integer (025 and 25 are the same), else None."""
    found = extract_boxed(text)
    return None if found is None else _canonical_integer(found)


def _equal(
    extract: Callable[[str], str | None], canonical: Callable[[str], str | None], completions: Sequence[str],
    answer: Sequence[object],
) -> list[float | None]:  # fmt: skip
    """Compares what is extracted with the column `answer`; None where that is None, as in a mixture of tasks."""
    rewards: list[float | None] = []
    for text, gold in zip(completions, answer, strict=True):
        if isinstance(gold, Iterable) and not isinstance(gold, str):
            raise ValueError(
                f"the column 'answer' holds {gold!r}; expected one answer, as text or a number. `math_verify` takes a "
                "list of several."
            )
        right = None if gold is None else canonical(str(gold))
        if not right and gold is not None:
            raise ValueError(
                f"{gold!r} in the column 'answer' is no answer; expected the final one alone, such as '18' or '1,234'."
            )
        rewards.append(None if right is None else float(extract(text) == right))
    return rewards


def gsm8k_strict(
    prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], *,
    answer: Sequence[str | None], **columns: object,
) -> list[float | None]:  # fmt: skip
    """1 where `extract_strict` finds the number in the column `answer`, else 0; 18 and 18.00 are equal.

    None where the column is None.
    """
    del prompts, completion_ids, columns
    return _equal(extract_strict, _canonical_number, completions, answer)


def gsm8k_flexible(
    prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], *,
    answer: Sequence[str | None], **columns: object,
) -> list[float | None]:  # fmt: skip
    """1 where `extract_flexible` finds the number in the column `answer`, else 0; 18 and 18.00 are equal.

    None where the column is None.
    """
    del prompts, completion_ids, columns
    return _equal(extract_flexible, _canonical_number, completions, answer)


def boxed(
    prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], *,
    answer: Sequence[str | None], **columns: object,
) -> list[float | None]:  # fmt: skip
    r"""1 where `extract_boxed` finds the LaTeX in the column `answer`, else 0.

    Text against text, after MATH's light normalization of both: spaces, `\left`, `\dfrac`, units and their like
    do not count, while 0.25 and 1/4 differ. None where the column is None.
    """
    del prompts, completion_ids, columns
    return _equal(extract_boxed, _canonical_latex, completions, answer)


def boxed_integer(
    prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], *,
    answer: Sequence[str | None], **columns: object,
) -> list[float | None]:  # fmt: skip
    r"""1 where `extract_boxed_integer` finds the number in the column `answer`, else 0, as AIME's answers ask for.

    None where the column is None.
    """
    del prompts, completion_ids, columns
    return _equal(extract_boxed_integer, _canonical_integer, completions, answer)

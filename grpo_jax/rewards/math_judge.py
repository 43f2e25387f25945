"""The judge of `mathematics` as it runs in a worker: importing it imports SymPy, so the parent does not."""

import functools
import logging
from collections.abc import Sequence
from typing import Any

from math_verify import parse, verify

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own alarms are off, which they are


@functools.lru_cache(maxsize=4096)  # of a group all have one gold answer
def _parsed(text: str) -> list[Any]:
    """Expressions, the text of the last, or nothing; math-verify's own alarms are off: the worker has its limits."""
    return parse(text, parsing_timeout=None)  # pyright: ignore[reportArgumentType]


def equal(*, answer: str, golds: Sequence[str]) -> float:
    """1 where math-verify takes the answer for one of `golds`, else 0.

    Raises:
      ValueError: nothing can be read from one of `golds`.
    """
    expected = [_parsed(gold if "\\boxed" in gold else rf"\boxed{{{gold}}}") for gold in golds]
    if [] in expected:
        raise ValueError(f"{golds[expected.index([])]!r} in the column 'answer' is no mathematics that can be read.")
    found = _parsed(answer)
    return float(any(verify(gold, found, timeout_seconds=None) for gold in expected))


# What is built when it is first used is no item's: regular expressions, the parser's tables, SymPy's assumptions.
equal(answer=r"So it is $\boxed{\frac{1}{2} + \sqrt{x}}$", golds=(r"\sqrt{x}+0.5", "(1, 2)", "50\\%"))
equal(answer="The answer is 5/2.", golds=("2.5",))

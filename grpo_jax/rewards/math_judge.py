"""The judge of `mathematics` as it runs in a worker: importing it imports SymPy, so the parent does not."""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from math_verify import grader, parse, parser, verify

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own alarms are off, which they are


class _OutOfMemory(BaseException):
    """What no `except Exception` holds back."""


def _loud(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but that a MemoryError leaves math-verify."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except MemoryError as error:
            raise _OutOfMemory from error

    return called


# Where memory is at an end, math-verify says "cannot be read" or "not equal", as after any exception (its
# `raise_on_error` is of the outermost calls alone): a verdict that nobody has reached. So what it calls to read an
# expression is loud, and where it compares, `except Exception` finds every kind of them but one.
parser.latex2sympy = _loud(parser.latex2sympy)
parser.parse_expr = _loud(parser.parse_expr)
grader.Exception = tuple({*Exception.__subclasses__()} - {MemoryError})  # pyright: ignore[reportAttributeAccessIssue]


@functools.lru_cache(maxsize=4096)  # of a group all have one gold answer
def _parsed(text: str) -> list[Any]:
    """Expressions, the text of the last, or nothing; math-verify's own alarms are off: the worker has its limits."""
    return parse(text, parsing_timeout=None)  # pyright: ignore[reportArgumentType]


def equal(*, answer: str, golds: Sequence[str]) -> float:
    """1 where math-verify takes the answer for one of `golds`, else 0.

    Raises:
      ValueError: nothing can be read from one of `golds`.
      MemoryError: it takes more memory than there is.
    """
    try:
        expected = [_parsed(gold if "\\boxed" in gold else rf"\boxed{{{gold}}}") for gold in golds]
        if [] in expected:
            unread = golds[expected.index([])]
            raise ValueError(f"{unread!r} in the column 'answer' is no mathematics that can be read.")
        found = _parsed(answer)
        return float(any(_same(gold, found) for gold in expected))
    except _OutOfMemory as error:
        raise MemoryError from error


def _same(gold: list[Any], found: list[Any]) -> bool:
    """What math-verify says; what it cannot compare is not equal."""
    try:
        return verify(gold, found, timeout_seconds=None)
    except MemoryError:
        raise
    except Exception:  # of the one kind that its own `except` does not find here, the bare `Exception`
        return False


def _out_of_memory(*_: Any, **__: Any) -> NoReturn:
    raise MemoryError


def _check() -> None:
    """That a MemoryError gets out of math-verify from wherever it is mended above, which rests on private names.

    Raises:
      ImportError: one does not: this math-verify is another than the one that was mended.
    """
    places = ((parser, "latex2sympy", _loud), (parser, "parse_expr", _loud), (grader, "simplify", lambda f: f))
    answers = (r"\boxed{a+b}", "1+1", r"\boxed{a+b}")  # what comes there, and was not read before
    for (module, name, mended), answer in zip(places, answers, strict=True):
        original = getattr(module, name)
        setattr(module, name, mended(_out_of_memory))
        try:
            equal(answer=answer, golds=("a+c",))
        except MemoryError:
            continue
        finally:
            setattr(module, name, original)
        raise ImportError(
            f"where memory is at an end in {module.__name__}.{name}, math-verify gives a verdict: expected version "
            "0.9, which pip install 'grpo-jax[math]' brings."
        )


_check()
# What is built when it is first used is no item's: regular expressions, the parser's tables, SymPy's assumptions.
equal(answer=r"So it is $\boxed{\frac{1}{2} + \sqrt{x}}$", golds=(r"\sqrt{x}+0.5", "(1, 2)", "50\\%"))
equal(answer="The answer is 5/2.", golds=("2.5",))

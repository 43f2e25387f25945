"""Rewards of Countdown: combine the given numbers with + - * /, each exactly once, to reach the target.

The judge walks the syntax tree of an expression and computes with exact fractions; it never runs text.
"""

import ast
import operator
import re
from collections.abc import Sequence
from fractions import Fraction

__all__ = ["countdown_accuracy", "countdown_format", "evaluate_expression"]

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_ALPHABET = frozenset("0123456789+-*/() ")
_LEADING_ZERO = re.compile(r"(?<!\d)0\d")  # Python reads 00 as a number
_MAX_CHARACTERS = 200  # bounds the parser's work and the nesting of the tree


def evaluate_expression(text: str) -> tuple[Fraction, list[int]] | None:
    """The exact value of an arithmetic expression, and the numbers it uses.

    Args:
      text: digits, + - * / ( ) and spaces; at most 200 characters.

    Returns:
      (value, numbers in the order they stand), or None where the text is no such expression (also: a
      sign without a left side, a number with leading zeros) or divides by zero.
    """
    if len(text) > _MAX_CHARACTERS or not _ALPHABET.issuperset(text) or _LEADING_ZERO.search(text):
        return None
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    numbers: list[int] = []

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Constant) and type(node.value) is int:
            numbers.append(node.value)
            return Fraction(node.value)
        raise ValueError(f"not Countdown arithmetic: {ast.dump(node)}")

    try:
        return value(tree.body), numbers
    except (ValueError, ZeroDivisionError, RecursionError):
        return None


def countdown_format(
    prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], *,
    numbers: Sequence[Sequence[int]], **columns: object,
) -> list[float]:  # fmt: skip
    """1 where a completion is an expression that uses each given number exactly once, else 0."""
    del prompts, completion_ids, columns
    parsed = [evaluate_expression(text) for text in completions]
    return [float(p is not None and sorted(p[1]) == sorted(given)) for p, given in zip(parsed, numbers, strict=True)]


def countdown_accuracy(
    prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], *,
    numbers: Sequence[Sequence[int]], target: Sequence[int], **columns: object,
) -> list[float]:  # fmt: skip
    """1 where a completion is an expression that uses each given number exactly once and hits the target."""
    del prompts, completion_ids, columns
    parsed = [evaluate_expression(text) for text in completions]
    return [
        float(p is not None and sorted(p[1]) == sorted(given) and p[0] == goal)
        for p, given, goal in zip(parsed, numbers, target, strict=True)
    ]

"""Countdown (the task of TinyZero): reach a target from given numbers with + - * /, each number once.

Problems, and which of them are held out, are pure functions of (configuration, seed, index).
"""

import dataclasses
import random
import zlib
from fractions import Fraction

from grpo_jax.data.sources import Prompt, Source
from grpo_jax.data.tokenizer import ByteTokenizer

__all__ = ["Countdown", "CountdownConfig", "Problem", "is_held_out"]

_SUM, _PRODUCT, _ATOM = 1, 2, 3  # how tightly an expression binds: where brackets are needed
_MAX_DRAWS = 10_000
_HELD_OUT_SHARE = 10  # one problem in this many is held out


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountdownConfig:
    """How hard the task is, and how good its demonstrations are."""

    numbers: int = 3  # numbers in a problem
    max_number: int = 50  # they are drawn from 1 to this
    max_target: int = 100  # targets are from 1 to this
    effort: float = 0.4  # share of demonstrations that solve the problem; the others just add everything up

    def __post_init__(self) -> None:
        if not 2 <= self.numbers <= 8:
            raise ValueError(f"numbers={self.numbers} must be from 2 to 8.")
        if self.max_number < 2 or self.max_target < 1:
            raise ValueError(f"max_number={self.max_number} must be 2 or more, max_target={self.max_target} 1 or more.")
        if not 0 <= self.effort <= 1:
            raise ValueError(f"effort={self.effort} must lie in [0, 1].")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem, with an expression that solves it."""

    numbers: tuple[int, ...]
    target: int
    solution: str

    @property
    def prompt(self) -> str:
        """What the model reads, for example `7 5 3=22:`."""
        return f"{' '.join(map(str, self.numbers))}={self.target}:"


def is_held_out(numbers: tuple[int, ...], target: int) -> bool:
    """Whether a problem is held out: by a hash of the problem itself, whatever the order of its numbers."""
    return zlib.crc32(f"{sorted(numbers)}={target}".encode()) % _HELD_OUT_SHARE == 0


class Countdown:
    """The problems of one configuration and seed."""

    tokenizer = ByteTokenizer("0123456789+-*/()= :")

    def __init__(self, config: CountdownConfig, seed: int):
        self.config, self.seed = config, seed

    @property
    def max_prompt_tokens(self) -> int:
        """The longest prompt there can be, in tokens."""
        digits = len(str(self.config.max_number))
        return self.config.numbers * (digits + 1) + len(str(self.config.max_target)) + 1

    @property
    def max_completion_tokens(self) -> int:
        """The longest expression this module writes, in tokens, and its end: brackets around each part but the last."""
        numbers, digits = self.config.numbers, len(str(self.config.max_number))
        return numbers * digits + (numbers - 1) + 2 * (numbers - 2) + 1

    def problem(self, split: str, index: int) -> Problem:
        """Problem `index` of `train` or `held_out`: a random expression's numbers, and its value as the target.

        Raises:
          ValueError: the configuration leaves no such problem.
        """
        rng = random.Random(f"{self.seed}/{split}/{index}")
        for _ in range(_MAX_DRAWS):
            drawn = (1 + below(rng, self.config.max_number) for _ in range(self.config.numbers))
            numbers = tuple(sorted(drawn, reverse=True))
            value, text = self._expression(rng, numbers)
            if not (value.denominator == 1 and 1 <= value <= self.config.max_target):
                continue
            if is_held_out(numbers, int(value)) == (split == "held_out"):
                return Problem(numbers=numbers, target=int(value), solution=text)
        raise ValueError(f"{self.config} has hardly a {split} problem: make max_number or max_target larger.")

    def demonstration(self, index: int) -> tuple[Problem, str]:
        """Training problem `index`, and what an imperfect demonstrator writes: a solution, or lazily the sum."""
        problem = self.problem("train", index)
        rng = random.Random(f"{self.seed}/demonstration/{index}")
        lazy = rng.random() >= self.config.effort
        return problem, "+".join(map(str, problem.numbers)) if lazy else problem.solution

    def source(self, split: str) -> Source:
        """The problems of a split as prompts, with columns `numbers` and `target`."""

        def prompt(cursor: int) -> Prompt:
            problem = self.problem(split, cursor)
            return Prompt(text=problem.prompt, columns={"numbers": problem.numbers, "target": problem.target})

        return prompt

    @staticmethod
    def _expression(rng: random.Random, numbers: tuple[int, ...]) -> tuple[Fraction, str]:
        """A random expression over the numbers, in which no step is negative or fractional."""
        while True:
            parts = [(Fraction(n), str(n), _ATOM) for n in numbers]
            while len(parts) > 1:
                left = parts.pop(below(rng, len(parts)))
                right = parts.pop(below(rng, len(parts)))
                joined = _join(left, right, "+-*/"[below(rng, 4)])
                if joined is None:
                    break
                parts.append(joined)
            else:
                return parts[0][:2]


def below(rng: random.Random, n: int) -> int:
    """A number from 0 to n - 1."""
    return int(rng.random() * n)  # random() alone is the same in every version of Python


def _join(left, right, op):
    if left[0] < right[0] or (left[0] == right[0] and left[1] < right[1]):
        left, right = right, left  # the larger first: one way to write a sum or a product, no negative difference
    (a, a_text, a_binds), (b, b_text, b_binds) = left, right
    if op == "/" and (b == 0 or (a / b).denominator != 1):
        return None
    value = {"+": a + b, "-": a - b, "*": a * b}[op] if op != "/" else a / b
    binds = _SUM if op in "+-" else _PRODUCT
    # a-(b+c) needs brackets where a+(b+c) does not; the left side needs them only where it binds less.
    tight = b_binds > binds or (b_binds == binds and op in "+*")
    a_text = a_text if a_binds >= binds else f"({a_text})"
    b_text = b_text if tight else f"({b_text})"
    return value, f"{a_text}{op}{b_text}", binds

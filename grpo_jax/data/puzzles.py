"""Small programming puzzles: a function of a list of integers, described in words, with tests.

`over 5, times 3, sum:` asks for the sum of three times each number over 5. Puzzles, their tests, and which of them are
held out, are pure functions of (configuration, seed, index).
"""

import dataclasses
import operator
import random
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from grpo_jax.data.countdown import below
from grpo_jax.data.sources import Prompt, Source
from grpo_jax.data.tokenizer import ByteTokenizer

__all__ = ["Puzzle", "PuzzleConfig", "Puzzles", "is_held_out"]

_HELD_OUT_SHARE = 10  # one puzzle in this many is held out
_LONGEST, _LARGEST = 8, 20  # of the lists that functions are tested with
PREFIX = "def f(a):\n    return "  # of every program; a completion is the expression that follows


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Step:
    """A word of the description, what it means, and how it is written of an expression."""

    word: str
    does: Callable[..., Any]
    text: str  # {x}: the element, {k}: the constant
    loose: bool = False  # it binds less than % does


_KEEP = (
    _Step(word="even", does=lambda x, k: x % 2 == 0, text="{x}%2==0"),
    _Step(word="odd", does=lambda x, k: x % 2 == 1, text="{x}%2==1"),
    _Step(word="over {k}", does=operator.gt, text="{x}>{k}"),
    _Step(word="under {k}", does=operator.lt, text="{x}<{k}"),
    _Step(word="multiples of {k}", does=lambda x, k: x % k == 0, text="{x}%{k}==0"),
)
_CHANGE = (
    _Step(word="plus {k}", does=operator.add, text="x+{k}", loose=True),
    _Step(word="minus {k}", does=operator.sub, text="x-{k}", loose=True),
    _Step(word="times {k}", does=operator.mul, text="x*{k}"),
    _Step(word="mod {k}", does=operator.mod, text="x%{k}"),
    _Step(word="squared", does=lambda x, k: x * x, text="x*x"),
    _Step(word="negated", does=lambda x, k: -x, text="-x"),
)
_FOLD = (
    _Step(word="sum", does=sum, text="sum({x})"),
    _Step(word="max", does=max, text="max({x})"),
    _Step(word="min", does=min, text="min({x})"),
    _Step(word="sorted", does=sorted, text="sorted({x})"),
    _Step(word="reversed", does=lambda items: items[::-1], text="[{x}][::-1]"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PuzzleConfig:
    """How large the task is, how it is tested, and how good its demonstrations are."""

    max_constant: int = 9  # constants are from 2 to this
    tests: int = 4  # of each puzzle, all of them hidden
    effort: float = 0.4  # share of demonstrations that solve the puzzle; the others leave a step out

    def __post_init__(self) -> None:
        if not 2 <= self.max_constant <= 99:
            raise ValueError(f"max_constant={self.max_constant} must be from 2 to 99.")
        if self.tests < 1:
            raise ValueError(f"tests={self.tests} must be 1 or more.")
        if not 0 <= self.effort <= 1:
            raise ValueError(f"effort={self.effort} must lie in [0, 1].")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Puzzle:
    """One puzzle, with an expression that solves it, one that does not quite, and its tests."""

    description: str
    solution: str
    lazy: str
    tests: tuple[Mapping[str, Any], ...]  # {"call": "f", "args": [list], "result": ...}

    @property
    def prompt(self) -> str:
        """What the model reads, for example `over 5, times 3, sum:`."""
        return f"{self.description}:"


def is_held_out(description: str) -> bool:
    """Whether a puzzle is held out: by a hash of what it asks."""
    return zlib.crc32(description.encode()) % _HELD_OUT_SHARE == 0


class Puzzles:
    """The puzzles of one configuration and seed."""

    tokenizer = ByteTokenizer("abcdefghijklmnopqrstuvwxyz0123456789 ,:()[]+-*%=<>")

    def __init__(self, config: PuzzleConfig, seed: int):
        self.config, self.seed = config, seed

    @property
    def max_prompt_tokens(self) -> int:
        """The longest prompt there can be, in tokens."""
        k = str(self.config.max_constant)
        return sum(max(len(step.word.format(k=k)) for step in steps) for steps in (_KEEP, _CHANGE, _FOLD)) + 2 * 2 + 1

    @property
    def max_completion_tokens(self) -> int:
        """The longest solution there can be, in tokens, and its end."""
        k = self.config.max_constant
        kinds = ((keep, change, fold) for keep in _KEEP for change in _CHANGE for fold in _FOLD)
        return max(len(_solution(*steps, k, k, changes_first=True)) for steps in kinds) + 1

    def problem(self, split: str, index: int) -> Puzzle:
        """Puzzle `index` of `train` or `held_out`."""
        rng = random.Random(f"{self.seed}/{split}/{index}")
        while True:
            keep, change, fold = (steps[below(rng, len(steps))] for steps in (_KEEP, _CHANGE, _FOLD))
            kept, changed = (2 + below(rng, self.config.max_constant - 1) for _ in range(2))
            changes_first = rng.random() < 0.5
            words = [keep.word.format(k=kept), change.word.format(k=changed)]
            description = ", ".join([*(words[::-1] if changes_first else words), fold.word])
            if is_held_out(description) != (split == "held_out"):
                continue

            def reference(items: list[int]) -> list[int]:
                pairs = [(x, change.does(x, changed)) for x in items]  # noqa: B023
                return [y for x, y in pairs if keep.does(y if changes_first else x, kept)]  # noqa: B023

            lists = [items for items in (_list(rng) for _ in range(8 * self.config.tests)) if len(reference(items)) > 1]
            tests = [{"call": "f", "args": [a], "result": fold.does(reference(a))} for a in lists[: self.config.tests]]
            # Hardly a list may have what is asked for (of 0 to 3, those over 9), or a constant may be right for all.
            varied = len(tests) == 1 or any(test["result"] != tests[0]["result"] for test in tests)
            if len(tests) == self.config.tests and varied:
                break
        return Puzzle(
            description=description,
            solution=_solution(keep, change, fold, kept, changed, changes_first),
            lazy=fold.text.format(x=f"{change.text.format(k=changed)} for x in a"),
            tests=tuple(tests),
        )

    def demonstration(self, index: int) -> tuple[Puzzle, str]:
        """Training puzzle `index`, and what an imperfect demonstrator writes: a solution, or one that keeps all."""
        puzzle = self.problem("train", index)
        lazy = random.Random(f"{self.seed}/demonstration/{index}").random() >= self.config.effort
        return puzzle, puzzle.lazy if lazy else puzzle.solution

    def source(self, split: str) -> Source:
        """The puzzles of a split as prompts, with columns `tests` and `prefix`, which `CodeReward` reads."""

        def prompt(cursor: int) -> Prompt:
            puzzle = self.problem(split, cursor)
            return Prompt(text=puzzle.prompt, columns={"tests": puzzle.tests, "prefix": PREFIX})

        return prompt


def _solution(keep: _Step, change: _Step, fold: _Step, kept: int, changed: int, changes_first: bool) -> str:
    expression = change.text.format(k=changed)
    judged = "x" if not changes_first else f"({expression})" if change.loose and "%" in keep.text else expression
    return fold.text.format(x=f"{expression} for x in a if {keep.text.format(x=judged, k=kept)}")


def _list(rng: random.Random) -> list[int]:
    return [below(rng, 2 * _LARGEST + 1) - _LARGEST for _ in range(3 + below(rng, _LONGEST - 2))]

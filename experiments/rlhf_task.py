"""The task of experiments.rlhf: prompts, texts that answer them, a hidden rule, and a labeller who knows it.

Everything is a pure function of a seed and an index.
"""

import math
import random
import zlib
from collections.abc import Sequence

from grpo_jax.data.tokenizer import ByteTokenizer

__all__ = ["PROMPT_TOKENS", "TOKENIZER", "demonstration", "prefers_first", "prompt", "rule"]

LETTERS, MARK = "abcdefgh", "!"
TOKENIZER = ByteTokenizer(f"{LETTERS}{MARK}>")
PROMPT_TOKENS, LIKED_MARKS = 4, 3


def prompt(seed: int, split: str, index: int) -> str:
    """Three different letters and `>`; which split they belong to is a property of the letters."""
    rng = random.Random(f"{seed}/{split}/{index}")
    while True:
        letters = rng.sample(LETTERS, 3)
        if (zlib.crc32("".join(sorted(letters)).encode()) % 4 == 0) == (split == "held_out"):
            return "".join(letters) + ">"


def demonstration(seed: int, index: int) -> tuple[str, str]:
    """A prompt, and a text of 4 to 12 characters that somewhat keeps to it, with an exclamation mark now and then."""
    asked, rng = prompt(seed, "train", index), random.Random(f"{seed}/demonstration/{index}")
    weights = (0.35, 0.55, 0.10)
    pools = (asked[:3], LETTERS, MARK)
    drawn = rng.choices(pools, weights, k=rng.randint(4, 12))
    return asked, "".join(rng.choice(pool) for pool in drawn)


def rule(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """The truth: the share of the prompt's letters that are mentioned, and marks up to three; 1 is the best there is.

    A mark is worth 0.25, one too many costs as much, and everything is divided by what the best text has.
    """
    del columns

    def one(asked: str, text: str) -> float:
        mentioned = len({*asked[:3]} & {*text}) / 3
        marks = text.count(MARK)
        return (mentioned + 0.25 * (min(marks, LIKED_MARKS) - max(marks - LIKED_MARKS, 0))) / 1.75

    return [one(*pair) for pair in zip(prompts, completions, strict=True)]


def prefers_first(asked: str, texts: Sequence[str], noise: float, key: str) -> bool:
    """What the labeller says of two texts: Bradley and Terry's model, of the truth over `noise`; `key` is consumed."""
    first, second = rule([asked] * 2, texts)
    return random.Random(key).random() < 1 / (1 + math.exp(-(first - second) / noise))

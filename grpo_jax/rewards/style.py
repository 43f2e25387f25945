"""Rewards of form: think/answer tags, length and repetition."""

import re
from collections.abc import Callable, Sequence

__all__ = ["repetition", "soft_overlong", "think_answer_format"]

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_WHOLE = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)


def think_answer_format(
    prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **columns: object
) -> list[float]:
    """1 where a completion is `<think>...</think> <answer>...</answer>` (DeepSeek-R1, arXiv 2501.12948), else 0.

    Each tag stands exactly once, and nothing but white space stands around the two parts. Where the prompt ends
    with `<think>`, the completion begins behind it.
    """
    del completion_ids, columns

    def well_formed(prompt: str, completion: str) -> bool:
        text = f"<think>{completion}" if prompt.rstrip().endswith("<think>") else completion
        return all(text.count(tag) == 1 for tag in _TAGS) and _WHOLE.fullmatch(text) is not None

    return [float(well_formed(*pair)) for pair in zip(prompts, completions, strict=True)]


def soft_overlong(max_tokens: int, cache_tokens: int) -> Callable[..., list[float]]:
    r"""The soft overlong punishment of DAPO (arXiv 2503.14476, eq. 13), in tokens, the end included.

    .. math:: R(y) = \begin{cases}
        0 & |y| \le L_{max} - L_{cache} \\
        \frac{(L_{max} - L_{cache}) - |y|}{L_{cache}} & L_{max} - L_{cache} < |y| \le L_{max} \\
        -1 & L_{max} < |y| \end{cases}

    Args:
      max_tokens: L_max.
      cache_tokens: L_cache, from 1 to max_tokens: over how many tokens before L_max the punishment grows.

    Raises:
      ValueError: cache_tokens is not from 1 to max_tokens.
    """
    if not 1 <= cache_tokens <= max_tokens:
        raise ValueError(f"cache_tokens={cache_tokens} must be from 1 to max_tokens={max_tokens}.")
    free = max_tokens - cache_tokens

    def reward(
        prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **columns: object
    ) -> list[float]:
        del prompts, completions, columns
        return [-min(max(len(ids) - free, 0), cache_tokens) / cache_tokens for ids in completion_ids]

    return reward


def repetition(n: int, max_penalty: float) -> Callable[..., list[float]]:
    r"""A penalty on repeated n-grams of words (arXiv 2502.03373, appendix C.2, and its code; open-r1 has the same).

    .. math:: R(y) = p_{max} \Big(1 - \frac{\#\,\text{distinct n-grams of } y}{\#\,\text{n-grams of } y}\Big)

    Words are what white space separates, in lower case; fewer than n of them get 0.

    Args:
      n: words of an n-gram, 1 or more.
      max_penalty: below 0; approached where a completion is one n-gram over and over.

    Raises:
      ValueError: n is below 1, or max_penalty not below 0.
    """
    if n < 1 or max_penalty >= 0:
        raise ValueError(f"n={n} must be 1 or more, max_penalty={max_penalty} below 0.")

    def penalty(text: str) -> float:
        words = text.lower().split()
        total = len(words) - n + 1
        distinct = len(set(zip(*(words[i:] for i in range(n)), strict=False)))
        return max_penalty * (1 - distinct / total) if total > 0 else 0.0

    def reward(
        prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **columns: object
    ) -> list[float]:
        del prompts, completion_ids, columns
        return [penalty(text) for text in completions]

    return reward

"""Reward functions out of functions of one completion: its arguments, and coroutines that run at the same time."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from grpo_jax.rewards import Item, Judged, RewardError

__all__ = ["arguments_of_each", "bounded"]


def arguments_of_each(
    prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
) -> list[dict[str, Any]]:  # fmt: skip
    """What a function of one completion is called with: `prompt`, `completion`, `completion_ids`, and its columns.

    Raises:
      RewardError: a column has the name of one of the first two.
    """
    if taken := sorted({"prompt", "completion"} & columns.keys()):
        raise RewardError(f"the column {taken[0]!r} has the name of an argument of functions of an item: rename it.")
    rows = zip(prompts, completions, completion_ids, strict=True)
    each = [{"prompt": p, "completion": c, "completion_ids": ids} for p, c, ids in rows]
    for name, values in columns.items():
        for item, value in zip(each, values, strict=True):
            item[name] = value
    return each


def bounded(function: Callable[..., Awaitable[Item]], concurrency: int) -> Callable[..., Awaitable[Judged]]:
    """An asynchronous reward function that judges at most so many completions at the same time.

    Args:
      function: `async def f(*, prompt, completion, completion_ids, **columns)` -> an item: it asks another machine,
        for example. How long that may take is its own affair: `async with asyncio.timeout(...)`.
      concurrency: calls of it that run at once in a step, 1 or more.

    Returns:
      A reward function; `seconds` of an item are from its call to its answer. The first call that raises cancels
      the others.

    Raises:
      ValueError: concurrency is below 1.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency={concurrency} must be 1 or more.")

    async def judge(arguments: Mapping[str, Any], free: asyncio.Semaphore) -> tuple[Item, float]:
        async with free:
            started = time.perf_counter()
            return await function(**arguments), time.perf_counter() - started

    async def reward(
        prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> Judged:
        each, free = arguments_of_each(prompts, completions, completion_ids, columns), asyncio.Semaphore(concurrency)
        calls = [asyncio.ensure_future(judge(arguments, free)) for arguments in each]
        try:
            judged = await asyncio.gather(*calls)  # raises as soon as one does
        finally:
            for call in calls:
                call.cancel()  # does nothing to those that are done
            await asyncio.gather(*calls, return_exceptions=True)
        return Judged((item for item, _ in judged), failed=[False] * len(judged), seconds=[s for _, s in judged])

    return reward

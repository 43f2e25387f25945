"""Rewards made of rewards."""

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from typing import Any

from grpo_jax.rewards import Item, Judged, Reward, RewardError

__all__ = ["gated"]


def gated(reward: Reward, *, by: str, above: float = 0.5, otherwise: float | None = None) -> Reward:
    """The reward where another, named `by`, is above a threshold: correctness gates length.

    Its function sees the completions that pass and no others, so that a dear one costs less; where none passes it is
    not called.

    Args:
      reward: may depend on others itself.
      by: the name of the other. A completion to which it does not apply does not pass.
      above: what it must be more than; 0.5, as for what counts as right elsewhere.
      otherwise: what is said of the completions that do not pass. None: it does not apply to them, and
        `AdvantageConfig.normalize_each` compares those that pass among each other; with 0, it compares all.
    """
    function, own = reward.function, reward.after

    def passing(scores: Mapping[str, Sequence[float | None]], **arguments: Any) -> Any:
        chosen = [i for i, score in enumerate(scores[by]) if score is not None and score > above]
        places = chosen, len(scores[by]), otherwise
        if own:
            arguments |= {"scores": {name: scores[name] for name in own}}
        values = function(**{name: _taken(of, chosen) for name, of in arguments.items()}) if chosen else []
        return _spread_later(values, *places) if inspect.isawaitable(values) else _spread(values, *places)

    with contextlib.suppress(TypeError, ValueError):  # what is written in C may have none
        parameters = {**inspect.signature(function).parameters}
        parameters["scores"] = inspect.Parameter("scores", inspect.Parameter.KEYWORD_ONLY)
        ordered = sorted(parameters.values(), key=lambda p: p.kind)
        passing.__signature__ = inspect.Signature(ordered)  # pyright: ignore[reportFunctionMemberAccess]
    return dataclasses.replace(reward, function=passing, after=tuple(dict.fromkeys((*own, by))))


def _taken(values: Any, chosen: Sequence[int]) -> Any:
    """One item a completion, of those that are chosen; of `scores`, by name."""
    if isinstance(values, Mapping):
        return {name: _taken(of, chosen) for name, of in values.items()}
    return [values[i] for i in chosen]


def _spread(values: Any, chosen: Sequence[int], count: int, otherwise: float | None) -> list[Item]:
    """Items of the chosen completions -> of all."""
    values = list(values) if isinstance(values, Iterable) and not isinstance(values, Judged) else values
    if not isinstance(values, list) or len(values) != len(chosen):
        raise RewardError(f"{values!r:.100} is not one item for each of the {len(chosen)} completions that pass.")

    def over_all(of: Sequence[Any], other: Any) -> list[Any]:
        known = dict(zip(chosen, of, strict=True))
        return [known.get(i, other) for i in range(count)]

    items = over_all(values, otherwise)
    if not isinstance(values, Judged):
        return items
    return Judged(items, failed=over_all(values.failed, False), seconds=over_all(values.seconds, math.nan))


async def _spread_later(values: Awaitable[Any], *places: Any) -> list[Item]:
    return _spread(await values, *places)

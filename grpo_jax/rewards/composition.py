"""Rewards made of rewards."""

import contextlib
import dataclasses
import inspect
import math
import time
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from typing import Any

from grpo_jax.rewards import Judged, Reward, RewardError

__all__ = ["gated"]


def gated(reward: Reward, *, by: str, above: float = 0.5, otherwise: float | None = None) -> Reward:
    """The reward where another, named `by`, is above a threshold: correctness gates length.

    Its function sees the completions that pass and no others, so that a dear one costs less; where none passes it is
    not called.

    Args:
      reward: may depend on others itself.
      by: the name of the other. A completion to which it does not apply does not pass. Where its judge came to no
        verdict, whatever its weight, nobody knows whether it would: there this one has failed too (`Judged.failed`).
      above: what it must be more than; 0.5, as for what counts as right elsewhere.
      otherwise: what is said of the completions that do not pass. None: it does not apply to them, and
        `AdvantageConfig.normalize_each` compares those that pass among each other; with 0, it compares all.
    """
    function, own = reward.function, reward.after

    def passing(scores: Mapping[str, Judged], **arguments: Any) -> Any:
        gate = scores[by]
        chosen = [i for i, score in enumerate(gate) if isinstance(score, float) and score > above]
        unknown = [score is None and failed for score, failed in zip(gate, gate.failed, strict=True)]
        places = chosen, unknown, otherwise, time.perf_counter()
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
    taken = [values[i] for i in chosen]
    if not isinstance(values, Judged):
        return taken
    return Judged(taken, failed=_taken(values.failed, chosen), seconds=_taken(values.seconds, chosen))


def _spread(
    values: Any, chosen: Sequence[int], unknown: Sequence[bool], otherwise: float | None, started: float
) -> Judged:  # fmt: skip
    """Items of the chosen completions -> of all; of what does not say what an item took, it is the whole call."""
    values = list(values) if isinstance(values, Iterable) and not isinstance(values, Judged) else values
    if not isinstance(values, list) or len(values) != len(chosen):
        raise RewardError(f"{values!r:.100} is not one item for each of the {len(chosen)} completions that pass.")

    def over_all(of: Sequence[Any], others: Sequence[Any]) -> list[Any]:
        known = dict(zip(chosen, of, strict=True))
        return [known.get(i, other) for i, other in enumerate(others)]

    says = values if isinstance(values, Judged) else None
    took = says.seconds if says else [time.perf_counter() - started] * len(chosen)
    return Judged(
        over_all(values, [None if no else otherwise for no in unknown]),
        failed=over_all(says.failed if says else [False] * len(chosen), unknown),
        seconds=over_all(took, [math.nan] * len(unknown)),
    )


async def _spread_later(values: Awaitable[Any], *places: Any) -> Judged:
    return _spread(await values, *places)

"""Rewards: named, weighted functions of completions, and the one place that runs them.

A reward function has the signature that TRL users know,

    (prompts, completions, completion_ids, **columns) -> list of float or None

with one item a completion; `columns` are the columns of the prompts, repeated for each completion. None
means "does not apply to this one". What a reward function does wrong is an error at once, and never 0.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["Reward", "RewardError", "Scores", "score"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward:
    """A reward function, its name in the metrics, and its weight in the sum."""

    name: str
    function: Callable[..., Sequence[float | None]]
    weight: float = 1.0


class RewardError(ValueError):
    """A reward function raised, or returned something that is not one number or None a completion."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """The rewards of a step: one number a completion from each function, NaN where it does not apply."""

    by_name: Mapping[str, np.ndarray]  # each [B] float64

    def total(self, rewards: Sequence[Reward]) -> np.ndarray:
        """[B] float64: the weighted sum of the rewards that apply."""
        return sum((r.weight * np.nan_to_num(self.by_name[r.name]) for r in rewards), start=np.zeros(()))


def score(
    rewards: Sequence[Reward],
    *,
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
) -> Scores:
    """Runs every reward function on B completions and checks what comes back.

    Raises:
      RewardError: naming the function and the completion, if it raises, returns another number of
        values, or something that is neither a finite number nor None; or if no reward applies to a
        completion.
    """
    if len({r.name for r in rewards}) < len(rewards):
        raise RewardError(f"two reward functions have the same name: {[r.name for r in rewards]}.")
    by_name = {r.name: _checked(r, prompts, completions, completion_ids, columns) for r in rewards}
    nothing = np.all([np.isnan(values) for values in by_name.values()], axis=0)
    if nothing.any():
        i = int(np.argmax(nothing))
        raise RewardError(
            f"every reward function ({', '.join(by_name)}) returned None for completion {i}, {completions[i]!r} "
            f"to prompt {prompts[i]!r}: at least one must give a number."
        )
    return Scores(by_name=by_name)


def _checked(reward, prompts, completions, completion_ids, columns) -> np.ndarray:
    try:
        values = reward.function(prompts, completions, completion_ids, **columns)
    except Exception as error:
        raise RewardError(
            f"reward function {reward.name!r} raised {type(error).__name__}: {error} (on {len(completions)} "
            f"completions, the first {completions[0]!r} to prompt {prompts[0]!r})"
        ) from error
    try:
        values = list(values)
    except TypeError:
        raise RewardError(
            f"reward function {reward.name!r} returned {values!r}; expected a list with one number or None a "
            "completion."
        ) from None
    if len(values) != len(completions):
        raise RewardError(
            f"reward function {reward.name!r} returned {len(values)} values for {len(completions)} completions; "
            "expected one a completion, in their order."
        )
    for i, value in enumerate(values):
        try:
            good = value is None or math.isfinite(value)
        except (TypeError, OverflowError):
            good = False
        if not good:
            raise RewardError(
                f"reward function {reward.name!r} returned {value!r} for completion {i}, {completions[i]!r} to prompt "
                f"{prompts[i]!r}; expected a finite number, or None where it does not apply."
            )
    return np.array([math.nan if value is None else float(value) for value in values], np.float64)

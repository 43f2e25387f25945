"""What was seen when numbers went wrong: `WORKDIR/not_finite.json`, for the one who has to mend it."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from grpo_jax import hosts
from grpo_jax.guard import NotFiniteError
from grpo_jax.rollouts import Experience
from grpo_jax.storage import Path
from grpo_jax.telemetry import write_atomically
from grpo_jax.types import TrainBatch

__all__ = ["seen", "stopped"]

SHOWN = 64  # completions of a step, those with inputs that are not finite first


def seen(step: int, cursor: int, metrics: Mapping[str, float], experienced: Experience) -> dict[str, Any]:
    """What there is to say of a step, from 1, in which an optimizer step was skipped, as plain JSON; all must call it.

    Args:
      step: whose metrics these are.
      cursor: of its first prompt; a prompt is a function of the seed and its cursor.
      metrics: of the step.
      experienced: what it learned from.
    """
    return {
        "step": step,
        "not_finite": [name for name, value in metrics.items() if not math.isfinite(value)],
        "metrics": {name: _plain(value) for name, value in metrics.items()},
        "prompts": {"first": cursor, "count": experienced.prompts_consumed},
        "samples": [{name: _plain(value) for name, value in sample.items()} for sample in experienced.samples],
        "completions": _completions(experienced.batch),
    }


def stopped(workdir: Path, sightings: Sequence[Mapping[str, Any]], newest: int | None) -> NotFiniteError:
    """Writes `not_finite.json`, and returns what to raise.

    Args:
      workdir: of the run.
      sightings: `seen`, of the steps since the last that was finite.
      newest: the step of the newest checkpoint; None: there is none.
    """
    path, last = workdir / "not_finite.json", sightings[-1]
    names = sorted({name for one in sightings for name in one["not_finite"]})
    again = "the same command begins anew" if newest is None else f"the same command goes on from step {newest}"
    ways = [
        f"{again}, the newest checkpoint, and sees the same, unless the fault is of the machine.",
        "--debug_nans with it, where an experiment has that flag, names the first operation that makes a NaN.",
        "a larger --optimizer.max_skipped leaves more of such steps out; it may change within a run.",
        "what belongs to the run, as a lower --optimizer.learning_rate or --loss.clamp, needs another --workdir.",
        "the rewards of step n are in rewards.jsonl, which counts steps from 0.",
    ]
    said = {"skipped_in_a_row": last["metrics"]["skipped_in_a_row"], "newest_checkpoint": newest, "how_to_go_on": ways}
    if hosts.is_first():
        write_atomically(path, json.dumps({**said, "seen": list(sightings)}, indent=1, ensure_ascii=False) + "\n")
    return NotFiniteError(
        f"step {last['step']}: the last {last['metrics']['skipped_in_a_row']:.0f} optimizer steps were not finite and "
        f"were left out ({', '.join(names) or 'the parameters they would have made'}); the run stops, and {again}. "
        f"What was seen is in {path}; --debug_nans names the operation, where there is that flag."
    )


def _plain(value: Any) -> Any:
    """JSON has no NaN and no inf."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _completions(batch: Any) -> list[dict[str, Any]]:
    """Of a TrainBatch, ids of prompts and completions, advantages, and which inputs are not finite."""
    if not isinstance(batch, TrainBatch):
        return []
    host: TrainBatch = hosts.fetched(batch)
    floats = {name: x for name, x in vars(host).items() if x is not None and np.issubdtype(x.dtype, np.floating)}
    wrong = {name: ~np.isfinite(x.reshape(len(x), -1)).all(axis=1) for name, x in floats.items()}
    order = np.argsort(~np.any(list(wrong.values()), axis=0), kind="stable")
    return [
        {
            "completion": int(b),
            "not_finite": [name for name, rows in wrong.items() if rows[b]],
            "prompt_ids": host.prompt_tokens[b][host.prompt_mask[b]].tolist(),
            "completion_ids": host.completion_tokens[b][host.mask[b]].tolist(),
            "advantage": _plain(float(np.mean(host.advantages[b]))),
        }
        for b in order[:SHOWN]
    ]

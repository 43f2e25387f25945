"""The shell between sampled completions and their advantages: rewards, their journal, and what is said of both."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from grpo_jax.data.sources import Prompt
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.rewards import Item, Reward, RewardError, Scores, score
from grpo_jax.types import Groups, Rollout

__all__ = [
    "Journal",
    "ScoredGroups",
    "completion_texts",
    "journaled_scores",
    "rollout_metrics",
    "samples_of_group",
    "score_rollout",
]


class Journal(Protocol):
    """Where a step's rewards are written durably before they are used, and read when the step is replayed.

    A step has several waves of completions where groups are sampled until enough have signal; else it has wave 0.
    """

    def read(self, step: int, wave: int, digest: str) -> Mapping[str, Sequence[Item]] | None:
        """The recorded scores of these completions at this step, or None."""
        ...

    def write(self, step: int, wave: int, digest: str, scores: Mapping[str, Sequence[Item]]) -> None:
        """Returns when the scores are durable."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ScoredGroups:
    """P groups that were sampled, with all that rewards said of them; on the host."""

    prompts: Sequence[Prompt]
    groups: Groups
    scores: Scores
    total: np.ndarray  # [P, G] float64, the weighted sum of the rewards, as they are
    constant: np.ndarray  # [P] bool, groups without signal

    @classmethod
    def join(cls, parts: Sequence["ScoredGroups"]) -> "ScoredGroups":
        """All in one, in order."""
        items = [part.scores.items() for part in parts]
        return cls(
            prompts=[prompt for part in parts for prompt in part.prompts],
            groups=jax.tree.map(lambda *x: np.concatenate(x), *(part.groups for part in parts)),
            scores=Scores.of({name: [x for item in items for x in item[name]] for name in items[0]}),
            total=np.concatenate([part.total for part in parts]),
            constant=np.concatenate([part.constant for part in parts]),
        )


def completion_texts(rollout: Rollout, tokenizer: Tokenizer) -> tuple[list[list[int]], list[str]]:
    """Token ids and texts of the completions of a rollout that lies on the host."""
    ids = [row[keep].tolist() for row, keep in zip(rollout.completion_tokens, rollout.mask, strict=True)]
    return ids, [tokenizer.decode(row) for row in ids]


def score_rollout(
    rewards: Sequence[Reward], prompts: Sequence[Prompt], rollout: Rollout, tokenizer: Tokenizer, group_size: int
) -> Scores:
    """Rewards of a rollout that lies on the host.

    Raises:
      RewardError: a reward function did something wrong, or the prompts do not all have the same columns.
    """
    for prompt in prompts:
        if prompt.columns.keys() != prompts[0].columns.keys():
            raise RewardError(
                f"prompt {prompt.text!r} has the columns {sorted(prompt.columns)}, and prompt {prompts[0].text!r} has "
                f"{sorted(prompts[0].columns)}: give all the same, with None where one has no value."
            )
    ids, texts = completion_texts(rollout, tokenizer)
    each = [prompt for prompt in prompts for _ in range(group_size)]
    columns = {name: [p.columns[name] for p in each] for name in prompts[0].columns}
    return score(rewards, prompts=[p.text for p in each], completions=texts, completion_ids=ids, columns=columns)


@functools.partial(jax.profiler.annotate_function, name="rewards")  # a part of a step, in its profile
def journaled_scores(
    rewards: Sequence[Reward], prompts: Sequence[Prompt], rollout: Rollout, tokenizer: Tokenizer, group_size: int,
    journal: Journal, step: int, wave: int,
) -> Scores:  # fmt: skip
    """What the journal knows of these completions, else `score_rollout`, in the journal before this returns."""
    digest = hashlib.sha256(rollout.completion_tokens.tobytes() + rollout.mask.tobytes()).hexdigest()[:16]
    recorded = journal.read(step, wave, digest)
    if recorded is None:
        scores = score_rollout(rewards, prompts, rollout, tokenizer, group_size)
        journal.write(step, wave, digest, scores.items())
        return scores
    return Scores.of(recorded)


def rollout_metrics(rewards: Sequence[Reward], fresh: ScoredGroups) -> dict[str, float]:
    """Of all groups that a step sampled, whether it trains on them or not."""
    rollout, constant = fresh.groups.rollout, fresh.constant
    lengths, finished = rollout.mask.sum(axis=1), rollout.finished
    metrics = {
        "reward": fresh.total.mean(),
        "reward_std": fresh.total.std(axis=1, ddof=1).mean(),
        "frac_reward_zero_std": constant.mean(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1 - finished.mean(),
        "completions/mean_terminated_length": lengths[finished].mean() if finished.any() else 0.0,
    }
    # "All right" and "all wrong" are said of the first reward: the one that judges, by convention.
    judged = fresh.scores.by_name[rewards[0].name].reshape(fresh.total.shape)
    metrics["accuracy"] = (np.nan_to_num(judged) > 0.5).mean()
    metrics["frac_groups_all_right"] = (constant & (judged.min(axis=1) > 0.5)).mean()
    metrics["frac_groups_all_wrong"] = (constant & (judged.max(axis=1) <= 0.5)).mean()
    for reward in rewards:
        values = fresh.scores.by_name[reward.name]
        values = values[~np.isnan(values)]
        metrics[f"rewards/{reward.name}/mean"] = values.mean() if values.size else 0.0
        metrics[f"rewards/{reward.name}/std"] = values.std(ddof=1) if values.size > 1 else 0.0
        metrics[f"rewards/{reward.name}/not_applicable"] = float(fresh.total.size - values.size)
    return {name: float(value) for name, value in metrics.items()}


def samples_of_group(
    fresh: ScoredGroups, group: int, advantages: np.ndarray, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """One group for people to read, completion by completion; advantages [G] are those of its completions."""
    size, rollout = fresh.total.shape[1], fresh.groups.rollout
    members = range(group * size, (group + 1) * size)
    _, texts = completion_texts(jax.tree.map(lambda x: x[members.start : members.stop], rollout), tokenizer)
    said = fresh.scores.by_name
    return [
        {
            "prompt": fresh.prompts[group].text, "completion": text, "finished": bool(rollout.finished[i]),
            "reward": float(fresh.total.reshape(-1)[i]), "advantage": float(advantage),
            **{f"rewards/{name}": None if np.isnan(v[i]) else float(v[i]) for name, v in said.items()},
        }
        for i, text, advantage in zip(members, texts, advantages, strict=True)
    ]  # fmt: skip

"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): a step trains on groups that have signal.

Groups whose rewards are all equal are replaced by new ones, in waves of as many prompts as a step trains on, so
that every shape is always the same. What a step has no room for it leaves to the next one, in the state.
"""

import jax
import numpy as np

from grpo_jax.types import Groups, Rollout, Surplus

__all__ = ["abstract_surplus", "fill"]


def abstract_surplus(
    *, prompts: int, group_size: int, max_prompt_tokens: int, max_tokens: int, needs_steps: bool
) -> Surplus:
    """Shapes of what a step leaves to the next, for `training.init_train_state`."""
    completions = prompts * group_size
    shape = jax.ShapeDtypeStruct
    prompt, completion = (prompts, max_prompt_tokens), (completions, max_tokens)
    rollout = Rollout(
        prompt_tokens=shape(prompt, np.int32), prompt_mask=shape(prompt, bool),
        completion_tokens=shape(completion, np.int32), mask=shape(completion, bool),
        finished=shape((completions,), bool), logprobs=shape(completion, np.float32),
        sampler_logprobs=shape(completion, np.float32),
    )  # fmt: skip
    rewards = shape((prompts, group_size), np.float32)
    steps = shape(completion, np.float32) if needs_steps else None
    groups = Groups(rollout=rollout, rewards=rewards, step_rewards=steps)
    return Surplus(groups=groups, count=shape((), np.int32))


def fill(surplus: Surplus, fresh: Groups, constant: np.ndarray) -> tuple[Groups, Surplus, np.ndarray, dict[str, float]]:
    """A batch of groups with signal: first what the step before left, then fresh ones, in their order.

    Where they are not enough, fresh groups without signal fill the batch. Of the surplus nothing is ever left over,
    for it is smaller than a batch: each of its groups is one step old when it trains.

    Args:
      surplus: of the step before, with room for P groups; on the host, as all else.
      fresh: n groups, P or more. All but the last P of them must not fill the batch.
      constant: [n] bool, the fresh ones without signal.

    Returns:
      P groups to train on, the surplus for the next step, indices [k] of the fresh groups in the batch, which are
      its last k, and metrics.
    """
    room, reused = len(surplus.groups.rewards), int(surplus.count)
    kept, dull = np.flatnonzero(~constant), np.flatnonzero(constant)
    chosen = np.concatenate([kept, dull[: max(room - reused - len(kept), 0)]])[: room - reused]
    left = kept[room - reused :]
    batch = _concatenate(_take(surplus.groups, np.arange(reused)), _take(fresh, chosen))
    empty = jax.tree.map(np.zeros_like, _take(surplus.groups, np.arange(room - len(left))))
    metrics = {
        "kept_groups": len(kept),
        "reused_groups": reused,
        "surplus_groups": len(left),
        "filled_without_signal": max(room - reused - len(kept), 0),
    }
    surplus = Surplus(groups=_concatenate(_take(fresh, left), empty), count=np.int32(len(left)))
    return batch, surplus, chosen, {f"dynamic_sampling/{name}": float(n) for name, n in metrics.items()}


def _take(groups: Groups, index: np.ndarray) -> Groups:
    """Leaves are [P, ...] and [B, ...], and completions lie by group."""
    count = len(groups.rewards)

    def of(x):
        return x.reshape(count, -1, *x.shape[1:])[index].reshape(-1, *x.shape[1:])

    return jax.tree.map(of, groups)


def _concatenate(*groups: Groups) -> Groups:
    return jax.tree.map(lambda *x: np.concatenate(x), *groups)

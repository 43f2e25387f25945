"""A sampler that says nothing, for tests of what stands around it."""

import numpy as np

from grpo_jax.types import Rollout


def silent_rollout(prompts: int, group_size: int) -> Rollout:
    """Completions of 4 tokens, all alike, that cost nothing: prompts x group_size of them."""
    rows = (prompts * group_size, 4)
    return Rollout(
        prompt_tokens=np.zeros((prompts, 2), np.int32), prompt_mask=np.ones((prompts, 2), bool),
        completion_tokens=np.full(rows, 3), mask=np.ones(rows, bool), finished=np.ones(rows[0], bool),
        logprobs=np.zeros(rows), sampler_logprobs=np.zeros(rows),
    )  # fmt: skip

"""Prompts with the completions to learn -> a TrainBatch: what supervised fine-tuning trains on."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from grpo_jax.compiling import Lowering
from grpo_jax.data.tokenizer import Tokenizer, pad
from grpo_jax.rollouts import Experience
from grpo_jax.scoring import Journal
from grpo_jax.types import TrainBatch, TrainState

__all__ = ["Demonstrations"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demonstrations:
    """Supervised experience: prompts with the completions to learn, from the state's cursor on; nothing is sampled."""

    source: Callable[[int], tuple[str, str]]  # prompt and completion at a cursor
    tokenizer: Tokenizer
    batch: int  # demonstrations a step
    max_prompt_tokens: int
    max_tokens: int  # of a completion, its end included
    end_id: int  # what ends a completion

    def lowerings(self, state: TrainState, train_step: Any) -> list[Lowering]:
        """The train step of its batch, of a state or its shapes and places."""
        array = lambda dtype, *columns: jax.ShapeDtypeStruct((self.batch, *columns), dtype)
        tokens = lambda dtype: (array(dtype, self.max_prompt_tokens), array(dtype, self.max_tokens))
        (prompts, texts), (prompt_mask, mask) = tokens(np.int32), tokens(bool)
        batch = TrainBatch(
            prompt_tokens=prompts, prompt_mask=prompt_mask, completion_tokens=texts, mask=mask,
            advantages=array(np.float32), sampler_logprobs=None, temperature=array(np.float32),
        )  # fmt: skip
        return [lambda: train_step.lower(state, batch)]

    def __call__(self, state: TrainState, journal: Journal, interrupt: Callable[[], None]) -> Experience:
        """The next demonstrations.

        Raises:
          ValueError: one is too long.
        """
        del journal, interrupt
        encode, cursor = self.tokenizer.encode, int(state.cursor)
        pairs = [self.source(i) for i in range(cursor, cursor + self.batch)]
        end = [self.end_id]
        prompts, prompt_mask = pad([encode(prompt) for prompt, _ in pairs], self.max_prompt_tokens)
        texts, mask = pad([encode(text, continues=True) + end for _, text in pairs], self.max_tokens)
        batch = TrainBatch(
            prompt_tokens=prompts, prompt_mask=prompt_mask, completion_tokens=texts, mask=mask,
            advantages=np.ones(self.batch, np.float32), sampler_logprobs=None,
            temperature=np.ones(self.batch, np.float32),
        )  # fmt: skip
        return Experience(batch=batch, prompts_consumed=self.batch, train_tokens=int(prompt_mask.sum() + mask.sum()))

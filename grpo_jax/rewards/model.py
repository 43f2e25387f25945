"""A reward model as a reward: scores of token sequences, compiled for a mesh, and the reward function made of them.

Where there are several processes, each holds the whole reward model on its own devices (`hosts.own_mesh`) and asks it
about its own completions alone, as it asks every other function. So nothing that a process does or leaves out (a gate
that nothing passes, a step that its journal knows, an error) has to be done by the others too, as it would where one
program ran on the devices of all; the price is that the reward model must fit on the devices of one.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from grpo_jax import hosts, reward_model, sharding
from grpo_jax.data.tokenizer import PretrainedTokenizer, Tokenizer, pad
from grpo_jax.memory import least_memory
from grpo_jax.types import Policy, PyTree

__all__ = ["ModelReward", "Scorer", "round_up", "same_tokens"]

_LEAST = 16  # columns; narrower arrays are not worth a program of their own


def round_up(length: int, least: int = _LEAST) -> int:
    """So many columns, or rows, or more: a power of two, so that few programs are compiled, and the same again."""
    return max(least, 1 << max(length - 1, 0).bit_length())


class Scorer:
    """Scores of token sequences by a reward model; how many at a time is derived from the memory there is.

    On a mesh of several processes' devices all must call it, with the same sequences.
    """

    def __init__(
        self, policy: Policy, mesh: Mesh, *, vocab_size: int, pad_id: int | None, held: int = 0,
        memory: int | None = None,
    ):  # fmt: skip
        """A policy whose head has width 1.

        Args:
          policy: the reward model.
          mesh: where its parameters lie; sequences are split over data x fsdp.
          vocab_size: ids that the model has.
          pad_id: see `reward_model.scored_tokens`.
          held: bytes of a device that are taken: parameters and optimizer state, of this model and of others.
          memory: bytes of a device; None: what it says, of several processes the least, each of which makes a Scorer.
        """
        memory = least_memory() if memory is None else memory
        room = float("inf") if memory is None else 0.9 * memory - held
        self.mesh, self._vocab_size = mesh, vocab_size
        scores = functools.partial(reward_model.scores, policy, mesh=mesh, pad_id=pad_id, room=room)
        self._scores = jax.jit(scores, out_shardings=sharding.replicated(mesh))

    def __call__(self, params: PyTree, lines: Sequence[Sequence[int]]) -> np.ndarray:
        """Scores of sequences of token ids, [B] float32.

        Raises:
          ValueError: a sequence is empty, or holds an id that the model does not have.
        """
        for i, line in enumerate(lines):
            if not len(line) or min(line) < 0 or max(line) >= self._vocab_size:
                raise ValueError(
                    f"sequence {i} holds {list(line)[:20]}: expected at least one token, all of the "
                    f"{self._vocab_size} that the reward model has. Do the tokenizers of policy and reward model agree?"
                )
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        rows = shards * round_up(-(-len(lines) // shards), least=1)  # behind a gate their number is another each time
        tokens, mask = pad([*lines, *[()] * (rows - len(lines))], round_up(max(map(len, lines), default=1)))
        placed = hosts.put((tokens, mask), sharding.batch_sharding(self.mesh))
        return np.asarray(self._scores(params, *placed))[: len(lines)]


def same_tokens(ours: Tokenizer, theirs: Tokenizer) -> bool:
    """Whether every id means the same to both: vocabularies with added tokens, and which of these are special."""

    def of(tokenizer: Tokenizer) -> Any:
        if not isinstance(tokenizer, PretrainedTokenizer):
            return list(tokenizer.token_bytes)
        added = tokenizer.backend.get_added_tokens_decoder()
        return tokenizer.backend.get_vocab(), {i for i, token in added.items() if token.special}

    return of(ours) == of(theirs)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ModelReward:
    """A reward function: a reward model's score of prompt and completion, as its own tokens.

    Where the tokenizers agree, the ids that were sampled are the ids that are scored, the end of a completion included,
    behind those that the sampler was given for the prompt. Where they do not, text is between them: prompt and
    completion are encoded anew, with the reward model's own end behind a completion that ended.

    It runs on the device: `Reward(function=ModelReward(...), on_device=True)`.

    Raises:
      ValueError: the scorer's mesh has devices of other processes too, which have other completions to ask about.
    """

    scorer: Scorer
    params: PyTree  # on the scorer's mesh
    tokenizer: Tokenizer  # the policy's
    own: Tokenizer | None = None  # the reward model's, where it is another
    end_id: int | None = None  # of `own`, what ends a completion

    def __post_init__(self) -> None:
        if self.scorer.mesh.is_multi_process:
            raise ValueError(
                f"a reward model's mesh of {self.scorer.mesh.size} devices has some of other processes, and each "
                "process asks about its own completions alone: make policy, Scorer and parameters on "
                "hosts.own_mesh(mesh)."
            )

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]],
        **columns: object,
    ) -> list[float]:  # fmt: skip
        """Scores, one a completion."""
        del columns
        each = zip(prompts, completions, completion_ids, strict=True)
        encoded = {prompt: (self.own or self.tokenizer).encode(prompt) for prompt in {*prompts}}
        lines = [[*encoded[prompt], *self._completion(text, ids)] for prompt, text, ids in each]
        return self.scorer(self.params, lines).tolist()

    def _completion(self, text: str, ids: Sequence[int]) -> Sequence[int]:
        if self.own is None:
            return ids
        ended = len(ids) > 0 and ids[-1] in self.tokenizer.eos_ids
        end = [self.end_id] if ended and self.end_id is not None else []
        return [*self.own.encode(text, continues=True), *end]

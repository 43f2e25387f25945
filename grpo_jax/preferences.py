"""Preference pairs: records -> tokens -> batches of a reward model's training, and how good it is on held-out ones."""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from grpo_jax.data.sources import Record
from grpo_jax.data.tokenizer import Tokenizer, pad
from grpo_jax.reward_model import Pairs
from grpo_jax.rewards.model import Scorer, round_up
from grpo_jax.rollouts import Experience
from grpo_jax.scoring import Journal
from grpo_jax.types import PyTree, TrainState

__all__ = ["Bin", "Pair", "PairEvaluator", "PairExperience", "calibration_error", "encode_pairs", "pair_record",
           "reliability"]  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """A preference in tokens: whole sequences, prompt and end included."""

    chosen: Sequence[int]
    rejected: Sequence[int]
    margin: float = 0.0


def pair_record(record: Record) -> Record:
    """A record of preferences in the names used here: prompt, chosen, rejected (text), margin (a number).

    A record without `prompt` has it in both texts; one without `margin` has 0.

    Raises:
      KeyError: a field is missing.
      ValueError: a field is of another type, both texts are the same, or the margin is not finite.
    """
    prompt, margin = record.get("prompt"), record.get("margin")
    fields = {"prompt": "" if prompt is None else prompt, "chosen": record["chosen"], "rejected": record["rejected"]}
    for name, text in fields.items():
        if not isinstance(text, str):
            raise ValueError(f"field {name!r} is {str(text)[:80]!r}; expected text.")
    if fields["chosen"] == fields["rejected"]:
        raise ValueError(f"chosen and rejected are both {fields['chosen'][:80]!r}: nothing is preferred.")
    margin = 0.0 if margin is None else margin
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not abs(margin) <= sys.float_info.max:
        raise ValueError(f"field 'margin' is {margin!r:.80}; expected a finite number.")
    return {**fields, "margin": float(margin)}


def encode_pairs(
    records: Sequence[Record], tokenizer: Tokenizer, *, template: Callable[[str], str], end_id: int, max_tokens: int,
    say: Callable[[str], None] = print,
) -> list[Pair]:  # fmt: skip
    """Records of `pair_record` as tokens, without those that are longer than `max_tokens`; `say` is told of these.

    Raises:
      ValueError: none is left.
    """
    pairs = []
    for record in records:
        prompt = tokenizer.encode(template(record["prompt"]) if record["prompt"] else "")
        whole = lambda text, prompt=prompt: [*prompt, *tokenizer.encode(text, continues=True), end_id]
        pairs.append(Pair(chosen=whole(record["chosen"]), rejected=whole(record["rejected"]), margin=record["margin"]))
    kept = [pair for pair in pairs if max(len(pair.chosen), len(pair.rejected)) <= max_tokens]
    dropped = f"dropped {len(pairs) - len(kept)} of {len(pairs)} pairs: longer than {max_tokens} tokens"
    if not kept:
        raise ValueError(f"{dropped}. None is left: raise the limit.")
    if len(kept) < len(pairs):
        say(dropped)
    return kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairExperience:
    """`experience(state, journal, interrupt) -> Experience`: the pairs from the state's cursor on."""

    source: Callable[[int], Pair]  # the pair at a cursor
    batch: int  # pairs a step

    def __call__(self, state: TrainState, journal: Journal, interrupt: Callable[[], None]) -> Experience:
        """The next pairs."""
        del journal, interrupt
        cursor = int(state.cursor)
        pairs = [self.source(i) for i in range(cursor, cursor + self.batch)]
        lines = [line for pair in pairs for line in (pair.chosen, pair.rejected)]
        tokens, mask = pad(lines, round_up(max(map(len, lines))))
        batch = Pairs(tokens=tokens, mask=mask, margins=np.array([pair.margin for pair in pairs], np.float32))
        return Experience(batch=batch, prompts_consumed=self.batch, train_tokens=int(mask.sum()))


# Calibration ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bin:
    """Pairs of which the model is about equally sure."""

    low: float
    high: float
    count: int
    confidence: float  # mean; NaN where the bin is empty
    accuracy: float  # the share in which it is right; NaN where the bin is empty


def reliability(ahead: np.ndarray, bins: int) -> list[Bin]:
    r"""What a reward model is sure of, beside how often it is right.

    Its confidence that the sequence with the higher score is preferred is :math:`\sigma(|r^+ - r^-|)`, in [0.5, 1],
    which is cut into equal bins. Which of a pair is named first says nothing: [0, 0.5] would be the mirror image.

    Args:
      ahead: [n], r of the chosen minus r of the rejected; a tie is half right.
      bins: how many.
    """
    confidence, right = 1 / (1 + np.exp(-np.abs(ahead))), (1 + np.sign(ahead)) / 2
    edges = np.linspace(0.5, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, bins - 1)
    made = []
    for i in range(bins):
        here = place == i
        mean = lambda x, here=here: float(x[here].mean()) if here.any() else math.nan
        made.append(
            Bin(low=edges[i].item(), high=edges[i + 1].item(), count=int(here.sum()), confidence=mean(confidence),
                accuracy=mean(right))
        )  # fmt: skip
    return made


def calibration_error(bins: Sequence[Bin]) -> float:
    r"""Expected calibration error (arXiv 1706.04599, eq. 3): :math:`\sum_b \frac{n_b}{n} |acc_b - conf_b|`."""
    filled = [b for b in bins if b.count]
    return sum(b.count * abs(b.accuracy - b.confidence) for b in filled) / max(sum(b.count for b in filled), 1)


class PairEvaluator:
    """Measures a reward model on held-out pairs: `loop.Evaluation`."""

    def __init__(self, scorer: Scorer, pairs: Sequence[Pair], *, bins: int = 10, batch: int = 256):
        """`batch`: pairs at a time, between which the run can be interrupted."""
        self._scorer, self._pairs, self._bins, self._batch = scorer, pairs, bins, batch

    def ahead(self, params: PyTree, interrupt: Callable[[], None] = lambda: None) -> np.ndarray:
        """[n] float64: the score of each chosen minus that of its rejected."""
        return np.concatenate(list(self._parts(params, interrupt)))

    def _parts(self, params: PyTree, interrupt: Callable[[], None]) -> Iterator[np.ndarray]:
        for start in range(0, len(self._pairs), self._batch):
            interrupt()
            part = self._pairs[start : start + self._batch]
            filled = [*part, *[part[0]] * (self._batch - len(part))] if start else part  # as many as before: compiled
            lines = [line for pair in filled for line in (pair.chosen, pair.rejected)]
            scores = self._scorer(params, lines).astype(np.float64).reshape(-1, 2)[: len(part)]
            yield scores[:, 0] - scores[:, 1]

    def bins(self, params: PyTree) -> list[Bin]:
        """For a picture."""
        return reliability(self.ahead(params), self._bins)

    def greedy(self, params: PyTree, interrupt: Callable[[], None] = lambda: None) -> dict[str, float]:
        """`eval/accuracy` (ties half), `eval/loss` (without margins), `eval/margin` and `eval/calibration_error`."""
        ahead = self.ahead(params, interrupt)
        return {
            "eval/accuracy": float(((1 + np.sign(ahead)) / 2).mean()),
            "eval/loss": float(np.logaddexp(0, -ahead).mean()),
            "eval/margin": float(ahead.mean()),
            "eval/calibration_error": calibration_error(reliability(ahead, self._bins)),
        }

    full = greedy


def as_rows(bins: Sequence[Bin]) -> list[dict[str, Any]]:
    """Bins for JSON, which has no NaN."""
    return [
        {name: None if isinstance(value, float) and math.isnan(value) else value
         for name, value in dataclasses.asdict(b).items()} for b in bins
    ]  # fmt: skip

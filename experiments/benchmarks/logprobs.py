"""Log-probabilities of tokens and their gradients from hidden states: in chunks, plainly, and as TRL has them.

python -m experiments.benchmarks.logprobs [--tokens=16384] [--vocabulary=4096] [--width=896] [--memory]

`ours`: chunks as the library has them; `quarter chunks`: smaller ones; `plain`: whole logits. `trl full`: PyTorch's
matrix product and `selective_log_softmax`; `trl chunked`: what TRL's trainers run. Temporaries are by the compiler's
account and only ours; with `--memory` each is also run in a process of its own, for its peak beyond its arguments.
Needs `.[parity]`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import process
from experiments.benchmarks import measure
from grpo_jax.logprobs import CHUNK, token_logprobs

MODULE = "experiments.benchmarks.logprobs"
OURS = ("ours", "quarter chunks", "plain")
TRL = ("trl full", "trl chunked")
ROWS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(measure.Options):
    """Sizes."""

    tokens: int = 16_384  # N, a multiple of 16
    vocabulary: int = 4_096  # V
    width: int = 896  # D
    chunk: int = CHUNK  # logits of a chunk of ours; all of them must be more than a quarter of it
    memory: bool = False  # peaks too, each in a process of its own
    only: str = ""  # measure this side's memory here and nothing else: a side's name; empty: all sides

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens % ROWS or min(self.tokens, self.vocabulary, self.width) < 1:
            raise ValueError(f"tokens={self.tokens} must be a multiple of {ROWS}, vocabulary and width 1 or more.")
        if 4 * self.tokens * self.vocabulary <= self.chunk:
            raise ValueError(
                f"{self.tokens} x {self.vocabulary} logits are one chunk, {self.chunk}: nothing to compare. Give more."
            )
        if self.only not in ("", *OURS, *TRL):
            raise ValueError(f"only={self.only!r} must be one of {', '.join((*OURS, *TRL))}.")


def arguments(options: Options) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Hidden states [16, N / 16, D], a head [V, D], tokens and weights of the loss [16, N / 16]."""
    rng, rows = np.random.default_rng(options.seed), (ROWS, options.tokens // ROWS)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    hidden, kernel = normal(*rows, options.width), normal(options.vocabulary, options.width) * np.float32(0.05)
    return hidden, kernel, rng.integers(0, options.vocabulary, rows).astype(np.int32), normal(*rows)


def ours(options: Options, side: str, given: tuple[np.ndarray, ...]) -> tuple[Callable[[], float], int]:
    """What computes loss and gradients once and returns the loss, and the bytes of its temporaries."""
    whole = 4 * options.tokens * options.vocabulary
    chunk = {"ours": options.chunk, "quarter chunks": options.chunk // 4, "plain": whole}[side]
    hidden, kernel, tokens, weights = map(jnp.asarray, given)

    @jax.jit
    def gradient(hidden, kernel):
        def loss(hidden, kernel):
            logprobs, entropies = token_logprobs(hidden, (kernel, None, None), tokens, chunk=chunk)
            return (weights * logprobs).sum(), jax.lax.stop_gradient(entropies).sum()

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, kernel)

    compiled = gradient.lower(hidden, kernel).compile()
    run = lambda: float(jax.block_until_ready(compiled(hidden, kernel))[0][0])
    analysis: Any = compiled.memory_analysis()
    return run, analysis.temp_size_in_bytes


def theirs(side: str, given: tuple[np.ndarray, ...]) -> Callable[[], float]:
    """The same of TRL's."""
    from experiments.benchmarks import peers

    hidden, kernel, tokens, weights = given
    flat = hidden.reshape(-1, hidden.shape[-1]), kernel, tokens.reshape(-1), weights.reshape(-1)
    return peers.logprobs(*flat, chunked=side == "trl chunked")


def _alone(options: Options) -> dict[str, float]:
    given = arguments(options)
    run = ours(options, options.only, given)[0] if options.only in OURS else theirs(options.only, given)
    before = measure.rss()
    run()
    run()
    return {"peak_beyond_arguments_bytes": process.peak_rss() - before}


def run(options: Options) -> dict[str, Any]:
    """Measures all in turns; every side's loss is the same, or this is an error."""
    if options.memory or options.only:
        measure.need_host_memory()
    if options.only:
        return _alone(options)
    measure.need("torch", "transformers", "trl")
    given = arguments(options)
    made = {side: ours(options, side, given) for side in OURS}
    runs = {side: run for side, (run, _) in made.items()} | {side: theirs(side, given) for side in TRL}
    losses: dict[str, float] = {}

    def timed(side: str) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            seconds, losses[side] = measure.seconds(runs[side])
            return {"seconds": seconds}

        return run

    measured = measure.turns({side: timed(side) for side in runs}, options.rounds)
    scale = float(np.abs(given[3]).sum())
    if max(losses.values()) - min(losses.values()) > 1e-4 * scale:
        raise RuntimeError(f"the losses differ: {losses}")
    for side, (_, temporaries) in made.items():
        measured[side]["temporary_bytes"] = [temporaries]
    if options.memory:
        for side in runs:
            measured[side] |= {k: [v] for k, v in measure.fresh(MODULE, options, only=side, memory=False).items()}
    return measure.report(MODULE, options, measured, losses=losses)


if __name__ == "__main__":
    measure.command(Options, run)

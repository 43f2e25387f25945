"""How fast chunked log-probabilities are beside the plain ones, forward and backward, side by side.

python -m tests.logprobs_speed [--tokens=16384] [--vocabulary=4096] [--width=896] [--rounds=4]
"""

import time
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags

from grpo_jax.logprobs import CHUNK, token_logprobs

TOKENS = flags.DEFINE_integer("tokens", 16_384, "Tokens, a multiple of 16.")
VOCABULARY = flags.DEFINE_integer("vocabulary", 4_096, "V.")
WIDTH = flags.DEFINE_integer("width", 896, "D.")
ROUNDS = flags.DEFINE_integer("rounds", 4, "Of all, one after the other; the fastest counts.")


def main(argv: list[str]) -> None:
    """Prints seconds, and each one's speed relative to the plain version's."""
    del argv
    rows, ids, width = (16, TOKENS.value // 16), VOCABULARY.value, WIDTH.value
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, kernel = jax.random.normal(keys[0], (*rows, width)), jax.random.normal(keys[1], (ids, width)) * 0.05
    tokens, weights = jax.random.randint(keys[2], rows, 0, ids), jax.random.normal(keys[3], rows)

    def gradient(chunk: int) -> Callable[..., Any]:
        def loss(hidden, kernel):
            logprobs, entropies = token_logprobs(hidden, (kernel, None, None), tokens, chunk=chunk)
            return (weights * logprobs).sum(), jax.lax.stop_gradient(entropies).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))

    whole = 4 * tokens.size * ids
    runs = {"plain": gradient(whole), **{f"chunks of {n:,} logits": gradient(n) for n in (CHUNK // 4, CHUNK)}}
    if whole <= CHUNK:
        raise app.UsageError(f"{tokens.size} x {ids} logits are one chunk: nothing to compare. Give more.")
    seconds = {name: [] for name in runs}
    for repeat in range(1 + ROUNDS.value):  # the first compiles
        for name, run in runs.items():
            started = time.perf_counter()
            jax.block_until_ready(run(hidden, kernel))
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    for name, measured in seconds.items():
        print(f"{name:<32}{min(measured):8.3f} s  speed {min(seconds['plain']) / min(measured):5.2f}")


if __name__ == "__main__":
    app.run(main)

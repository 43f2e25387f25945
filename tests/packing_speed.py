"""How fast an update is where short completions share rows, beside one completion a row, side by side.

python -m tests.packing_speed [--completions=256] [--prompt=64] [--limit=512] [--microbatches=64] [--rounds=3]

Lengths are drawn geometrically, with a mean of a quarter of the limit.
"""

import dataclasses
import time

import jax
import numpy as np
from absl import app, flags

from grpo_jax.models.transformer import TransformerConfig, init_params, make_policy
from grpo_jax.objectives import grpo
from grpo_jax.sharding import make_mesh
from grpo_jax.training import OptimizerConfig, UpdateConfig, init_train_state, make_optimizer, make_train_step
from grpo_jax.types import TrainBatch

COMPLETIONS = flags.DEFINE_integer("completions", 256, "B, a multiple of the microbatches.")
PROMPT = flags.DEFINE_integer("prompt", 64, "L, of which all are tokens.")
LIMIT = flags.DEFINE_integer("limit", 512, "T.")
MICROBATCHES = flags.DEFINE_integer("microbatches", 64, "Of the update.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Of both, one after the other; the fastest counts.")
MODEL = TransformerConfig(vocab_size=4096, layers=4, width=128, heads=4, kv_heads=2, head_width=32, mlp_width=384)


def main(argv: list[str]) -> None:
    """Prints seconds of an update, the ratio, and by how much losses and parameters differ."""
    del argv
    rng, (count, limit) = np.random.default_rng(0), (COMPLETIONS.value, LIMIT.value)
    lengths = np.minimum(rng.geometric(4 / limit, count), limit)
    tokens = lambda columns: rng.integers(0, MODEL.vocab_size, (count, columns)).astype(np.int32)
    prompts = tokens(PROMPT.value)
    batch = TrainBatch(
        prompt_tokens=prompts, prompt_mask=np.ones(prompts.shape, bool), completion_tokens=tokens(limit),
        mask=np.arange(limit) < lengths[:, None], advantages=rng.normal(size=count).astype(np.float32),
        sampler_logprobs=None, temperature=np.ones(count, np.float32),
    )  # fmt: skip
    policy, mesh = make_policy(MODEL), make_mesh()
    optimizer, _ = make_optimizer(OptimizerConfig(warmup_steps=0, learning_rate=1e-3), 100)
    runs, seconds, last = {}, {}, {}
    for name, kind in (("a completion a row", dataclasses.replace(policy, max_segments=1)), ("packed", policy)):
        state = init_train_state(kind, init_params(MODEL, jax.random.key(0)), optimizer, grpo(), mesh)
        update = UpdateConfig(microbatches=MICROBATCHES.value)
        step = make_train_step(kind, optimizer, grpo(), update, like=state, key=jax.random.key(0))
        runs[name], seconds[name] = [step, state], []
    for _ in range(1 + ROUNDS.value):  # the first compiles
        for name, (step, state) in runs.items():
            started = time.perf_counter()
            runs[name][1], last[name] = jax.block_until_ready(step(state, batch))
            seconds[name].append(time.perf_counter() - started)
    real, padded = lengths.sum() + prompts.size, count * (limit + prompts.shape[1])
    slow, fast = (min(seconds[name][1:]) for name in runs)
    fill = {name: float(metrics["packing/fill"]) for name, metrics in last.items()}
    print(
        f"{count} completions of {lengths.mean():.0f} tokens on average; {real / padded:.2f} of the columns are tokens"
    )
    for name in runs:
        print(f"{name:<20}{min(seconds[name][1:]):8.3f} s  filled {fill[name]:.2f}  loss {last[name]['loss']:.7f}")
    far = jax.tree.map(lambda a, b: float(abs(a - b).max()), *(state.params for _, state in runs.values()))
    print(f"packed is {slow / fast:.2f} times as fast; parameters differ by at most {max(jax.tree.leaves(far)):.1e}")


if __name__ == "__main__":
    app.run(main)

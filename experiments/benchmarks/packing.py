"""How fast an update is where short completions share rows, beside one completion a row.

python -m experiments.benchmarks.packing [--completions=256] [--prompt=64] [--limit=512] [--microbatches=64]

Lengths are drawn geometrically, with a mean of a quarter of the limit.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.benchmarks import measure
from grpo_jax.models.transformer import TransformerConfig, init_params, make_policy
from grpo_jax.objectives import grpo
from grpo_jax.optimizers import OptimizerConfig, make_optimizer
from grpo_jax.sharding import make_mesh
from grpo_jax.training import UpdateConfig, init_train_state, make_train_step
from grpo_jax.types import TrainBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(measure.Options):
    """Sizes."""

    completions: int = 256  # B, a multiple of the microbatches
    prompt: int = 64  # L, of which all are tokens
    limit: int = 512  # T
    microbatches: int = 64  # of the update
    width: int = 128  # D, a multiple of 32
    rounds: int = 3  # turns of each side, after one that warms up


def batch_of(options: Options, vocab_size: int) -> tuple[np.ndarray, TrainBatch]:
    """Lengths [B], and random completions of them."""
    rng, (count, limit) = np.random.default_rng(options.seed), (options.completions, options.limit)
    lengths = np.minimum(rng.geometric(4 / limit, count), limit)
    tokens = lambda columns: rng.integers(0, vocab_size, (count, columns)).astype(np.int32)
    prompts = tokens(options.prompt)
    return lengths, TrainBatch(
        prompt_tokens=prompts, prompt_mask=np.ones(prompts.shape, bool), completion_tokens=tokens(limit),
        mask=np.arange(limit) < lengths[:, None], advantages=rng.normal(size=count).astype(np.float32),
        sampler_logprobs=None, temperature=np.ones(count, np.float32),
    )  # fmt: skip


def run(options: Options) -> dict[str, Any]:
    """Seconds of an update of both; in what they filled, and by how much parameters came to differ."""
    model = TransformerConfig(
        vocab_size=4096, layers=4, width=options.width, heads=options.width // 32, kv_heads=options.width // 64 or 1,
        head_width=32, mlp_width=3 * options.width,
    )  # fmt: skip
    lengths, batch = batch_of(options, model.vocab_size)
    policy, mesh = make_policy(model), make_mesh()
    optimizer, _ = make_optimizer(OptimizerConfig(warmup_steps=0, learning_rate=1e-3), 100)
    states, last = {}, {}

    def side(name: str, kind: Any) -> Callable[[], dict[str, float]]:
        states[name] = init_train_state(kind, init_params(model, jax.random.key(options.seed)), optimizer, grpo(), mesh)
        update, key = UpdateConfig(microbatches=options.microbatches), jax.random.key(options.seed)
        step = make_train_step(kind, optimizer, grpo(), update, like=states[name], key=key)

        def run() -> dict[str, float]:
            seconds, (states[name], last[name]) = measure.seconds(
                lambda: jax.block_until_ready(step(states[name], batch))
            )
            return {"seconds": seconds}

        return run

    kinds = {"ours": policy, "a completion a row": dataclasses.replace(policy, max_segments=1)}
    measured = measure.turns({name: side(name, kind) for name, kind in kinds.items()}, options.rounds)
    far = jax.tree.map(lambda a, b: float(abs(a - b).max()), *(state.params for state in states.values()))
    fill = {name: float(metrics["packing/fill"]) for name, metrics in last.items()}
    losses = {name: float(metrics["loss"]) for name, metrics in last.items()}
    note = (
        f"columns filled: {fill['ours']:.2f} where rows are shared, else {fill['a completion a row']:.2f}; completions "
        f"of {lengths.mean():.0f} tokens on average; parameters differ by at most {max(jax.tree.leaves(far)):.1e}"
    )
    return measure.report(
        "experiments.benchmarks.packing", options, measured, notes=[note], fill=fill, losses=losses,
        parameters_differ=max(jax.tree.leaves(far)),
    )  # fmt: skip


if __name__ == "__main__":
    measure.command(Options, run)

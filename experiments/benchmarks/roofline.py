"""What decoding and the update achieve of what the machine does: bytes and FLOP a second, measured just before.

python -m experiments.benchmarks.roofline [--size=5m] [--dtype=bfloat16 --attention=cudnn] [--profile=DIR]

The machine: a copy too large for its caches, and a matrix product, in float32 and on accelerators in bfloat16; the best
of the rounds. Decoding: what has to be read at every token, weights and live cache, a prompt's once for its group; its
seconds are those of T tokens less those of one, so that the prefill does not count. The update: 6 FLOP a parameter and
token, those of the head for completions only, and attention's products, without what is computed twice; without a
reference.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import measure
from experiments.benchmarks.profiles import Profiled, profiled
from experiments.benchmarks.workload import Ours, Workload
from grpo_jax import floors
from grpo_jax.objectives import LossConfig, make_objective
from grpo_jax.optimizers import OptimizerConfig, make_optimizer
from grpo_jax.training import UpdateConfig, init_train_state, make_train_step, train_batch

REPEATS = 8  # of a copy or a product inside a program, so that starting it does not count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Profiled):
    """The workload, and what the machine is measured with."""

    copy_mib: int = 0  # of the copy; 0: 512 on a CPU, 4096 on an accelerator
    matrix: int = 0  # rows and columns of the product; 0: 2048 on a CPU, 8192 on an accelerator

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 2:
            raise ValueError(f"tokens={self.tokens} must be 2 or more: the first comes with the prefill.")


def machine_rates(options: Options) -> dict[str, float]:
    """Bytes a second of a copy, read and written; FLOP a second of a matrix product by dtype."""
    accelerated = jax.devices()[0].platform != "cpu"
    size = (options.copy_mib or (4096 if accelerated else 512)) * 2**20 // 4
    columns = options.matrix or (8192 if accelerated else 2048)

    def best(work: float, step: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
        run = jax.jit(lambda x: jax.lax.fori_loop(0, REPEATS, lambda _, x: step(x), x), donate_argnums=0)
        taken = []
        for _ in range(1 + options.rounds):
            seconds, x = measure.seconds(lambda x=x: jax.block_until_ready(run(x)))
            taken.append(seconds)
        return REPEATS * work / min(taken[1:])

    rates = {"copy_bytes_per_second": best(8.0 * size, lambda x: -x, jnp.ones(size, jnp.float32))}
    for dtype in ("float32", "bfloat16") if accelerated else ("float32",):
        matrix = (
            jax.random.normal(jax.random.key(0), (columns, columns)) / columns**0.5
        )  # what it multiplies keeps its size
        matrix = matrix.astype(dtype)
        product = functools.partial(jnp.matmul, matrix)
        rates[f"{dtype}_flop_per_second"] = best(2.0 * columns**3, product, jnp.ones((columns, columns), dtype))
    return rates


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a workload needs at least."""

    decode_bytes: float  # weights and live cache, at every token after the first
    decode_flop: float
    update_flop: float


def work_of(workload: Workload, weight_bytes: int, slots: int) -> Work:
    """The floor of a workload, from its lengths, by `grpo_jax.floors`.

    Args:
      workload: the model, prompts and lengths.
      weight_bytes: of the sampler's parameters.
      slots: that it decodes at a time; 0: all.
    """
    m = workload.model
    model = floors.Model.of(m)
    step = floors.Step(
        prompt_tokens=workload.prompt_tokens, lengths=workload.limits, max_tokens=workload.tokens, slots=slots,
        cache_bytes=jnp.dtype(m.decoding_dtype).itemsize, reference=False,
    )  # fmt: skip
    decode = floors.decode(model, step, weight_bytes=weight_bytes)
    return Work(
        decode_bytes=sum(decode.memory.values()), decode_flop=decode.flop, update_flop=floors.update(model, step).flop
    )


def _update(ours: Ours) -> Callable[[], None]:
    """An update on a rollout of the workload."""
    w, policy = ours.workload, ours.policy
    rollout, objective = ours.rollout()(), make_objective(LossConfig(kl_coef=0.0))
    advantages = jax.random.normal(jax.random.key(w.seed), (w.prompts * w.group,))
    batch, (optimizer, _) = train_batch(rollout, advantages), make_optimizer(OptimizerConfig(), 1)
    state = init_train_state(policy, ours.params, optimizer, objective, ours.mesh)
    update, key = UpdateConfig(microbatches=w.microbatches), jax.random.key(w.seed)
    step = make_train_step(policy, optimizer, objective, update, like=state, key=key)

    def run() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    return run


def run(options: Options) -> dict[str, Any]:
    """Measures the machine, then decoding and the update."""
    rates = machine_rates(options)
    ours = Ours(options)
    weights = jax.eval_shape(ours.policy.prepare, ours.params)
    slots = ours.sampler.plan(ours.params, options.prompts).slots
    work = work_of(options, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(weights)), slots)
    one = Ours(options.workload(tokens=1, lengths="full"))
    parts = {"whole": ours.rollout(), "first": one.rollout(), "update": _update(ours)}

    def once() -> dict[str, float]:
        taken = {name: measure.seconds(part)[0] for name, part in parts.items()}
        decode, update = max(taken["whole"] - taken["first"], 1e-9), taken["update"]
        flops, decode_flops = (
            rates.get(f"{dtype}_flop_per_second", rates["float32_flop_per_second"])
            for dtype in (options.dtype, options.model.decoding_dtype)
        )
        return {
            "prefill_seconds": taken["first"], "decode_seconds": decode, "update_seconds": update,
            "decode_bytes_per_second": work.decode_bytes / decode, "decode_flop_per_second": work.decode_flop / decode,
            "update_flop_per_second": work.update_flop / update,
            "decode_share_of_copy": work.decode_bytes / decode / rates["copy_bytes_per_second"],
            "decode_share_of_product": work.decode_flop / decode / decode_flops,
            "update_share_of_product": work.update_flop / update / flops,
        }  # fmt: skip

    measured, floor = measure.turns({"ours": once}, options.rounds), dataclasses.asdict(work)
    said = lambda values: ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in values.items())
    return measure.report(
        "experiments.benchmarks.roofline", options, measured, machine_rates=rates, work=floor,
        tables=profiled(options, once),
        notes=[f"the machine: {said(rates)}", f"the floor: {said(floor)}"],
    )  # fmt: skip


if __name__ == "__main__":
    measure.command(Options, run)

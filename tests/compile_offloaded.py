"""Compiles a train step for four TPUs that are not here, whose optimizer's state is theirs, or is the host's.

`python -m tests.compile_offloaded`

A program of its own, since libtpu reads the environment when it is loaded. For either it prints a line of JSON: its
name, and the bytes that it needs of a chip, and of the host beside it.
"""

import json

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from grpo_jax import sharding
from grpo_jax.models.transformer import TransformerConfig, abstract_params, make_policy
from grpo_jax.objectives import LossConfig, grpo
from grpo_jax.optimizers import OptimizerConfig, make_optimizer
from grpo_jax.training import UpdateConfig, abstract_train_state, make_train_step
from grpo_jax.types import TrainBatch

MODEL = TransformerConfig(
    vocab_size=1024, layers=2, width=512, heads=4, kv_heads=4, head_width=128, mlp_width=2048, compute_dtype="bfloat16",
    remat="full",
)  # fmt: skip
COMPLETIONS, TOKENS = 256, 64  # of prompts, and of completions


def compiled(mesh, config):
    """The train step, and how many bytes of parameters a chip has."""
    policy, (shapes, axes) = make_policy(MODEL, mesh), abstract_params(MODEL)
    objective, (optimizer, _) = grpo(LossConfig(kl_coef=0.0)), make_optimizer(config, 100)
    state = abstract_train_state(policy, shapes, optimizer, objective, mesh, offload=config.offload)
    rows = sharding.batch_sharding(mesh)
    each = lambda dtype, *columns: jax.ShapeDtypeStruct((COMPLETIONS, *columns), dtype, sharding=rows)
    batch = TrainBatch(
        prompt_tokens=each(jnp.int32, TOKENS), prompt_mask=each(bool, TOKENS),
        completion_tokens=each(jnp.int32, TOKENS), mask=each(bool, TOKENS), advantages=each(jnp.float32),
        sampler_logprobs=None, temperature=each(jnp.float32),
    )  # fmt: skip
    step = make_train_step(policy, optimizer, objective, UpdateConfig(), like=state, key=jax.random.key(0))
    lowered = step.lower(state, batch)  # pyright: ignore[reportFunctionMemberAccess]
    return lowered.compile(), sharding.device_bytes(shapes, axes, mesh)


def main():
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4), devices)
    for name, offload in (("on chips", False), ("on the host", True)):
        program, params = compiled(mesh, OptimizerConfig(offload=offload))
        m = program.memory_analysis()
        needs = {
            "params": params, "arguments": m.argument_size_in_bytes, "temporaries": m.temp_size_in_bytes,
            "host": m.host_argument_size_in_bytes,
        }  # fmt: skip
        print(json.dumps({"name": name, **needs}), flush=True)


if __name__ == "__main__":
    main()

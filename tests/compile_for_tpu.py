"""Compiles what a Qwen2.5 0.5B needs, for TPUs that are not here: `python -m tests.compile_for_tpu v5e:4x4 DIRECTORY`.

A program of its own, since libtpu reads the environment when it is loaded. For each compiled program it writes the text
to DIRECTORY/NAME.txt, and prints a line of JSON: its name, the seconds it took and the bytes it needs a chip.
"""

import dataclasses
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from grpo_jax import sharding
from grpo_jax.data.tokenizer import ByteTokenizer
from grpo_jax.models.transformer import TransformerConfig, abstract_params, make_policy
from grpo_jax.objectives import LossConfig, grpo
from grpo_jax.sampler import Sampler
from grpo_jax.sharding import MeshConfig, make_mesh
from grpo_jax.training import OptimizerConfig, UpdateConfig, abstract_train_state, make_optimizer, make_train_step
from grpo_jax.types import TrainBatch

QWEN = TransformerConfig(
    vocab_size=151_936, layers=24, width=896, heads=14, kv_heads=2, head_width=64, mlp_width=4864, rope_base=1e6,
    scale_embedding=False, qkv_bias=True, compute_dtype="bfloat16", remat="full",
)  # fmt: skip
PROMPTS, GROUP, PROMPT_TOKENS, MAX_TOKENS = 128, 8, 256, 512  # of a step on GSM8K


def train(mesh, attention, microbatches):
    policy = make_policy(dataclasses.replace(QWEN, attention=attention), mesh)
    optimizer, _ = make_optimizer(OptimizerConfig(), 100)
    objective = grpo(LossConfig(kl_coef=0.04))
    state = abstract_train_state(policy, abstract_params(QWEN)[0], optimizer, objective, mesh)
    rows = sharding.batch_sharding(mesh)
    each = lambda dtype, *columns: jax.ShapeDtypeStruct((PROMPTS * GROUP, *columns), dtype, sharding=rows)
    batch = TrainBatch(
        prompt_tokens=each(jnp.int32, PROMPT_TOKENS), prompt_mask=each(bool, PROMPT_TOKENS),
        completion_tokens=each(jnp.int32, MAX_TOKENS), mask=each(bool, MAX_TOKENS), advantages=each(jnp.float32),
        sampler_logprobs=each(jnp.float32, MAX_TOKENS), temperature=each(jnp.float32),
    )  # fmt: skip
    update = UpdateConfig(microbatches=microbatches)
    step = make_train_step(policy, optimizer, objective, update, like=state, key=jax.random.key(0))
    return {"train": step.lower(state, batch).compile()}  # pyright: ignore[reportFunctionMemberAccess]


SLOTS = 256  # of a device, where completions pass through them


def sample(mesh, slots=0):
    shapes, axes = abstract_params(QWEN)
    where = sharding.shardings(shapes, axes, mesh)
    params = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, where)
    sampler = Sampler(
        make_policy(QWEN, mesh), mesh, ByteTokenizer(), group_size=GROUP, max_tokens=MAX_TOKENS,
        max_prompt_tokens=PROMPT_TOKENS, key=jax.random.key(0), slots=slots, memory=2**40,
    )  # fmt: skip
    return dict(zip(("start", "decode"), sampler.compile(params, PROMPTS), strict=True))


PROGRAMS = {
    "v5e:4x4": [
        (MeshConfig(fsdp=16), lambda mesh: train(mesh, "splash", 32)),
        (MeshConfig(data=4, fsdp=2, tensor=2), lambda mesh: train(mesh, "xla", 64)),
        (MeshConfig(fsdp=16), sample),
    ],
    "v6e:2x2": [
        (MeshConfig(fsdp=4), lambda mesh: train(mesh, "xla", 64)),
        (MeshConfig(fsdp=4), lambda mesh: sample(mesh, SLOTS)),
    ],
}


def main(topology, directory):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    for sizes, compiled_on in PROGRAMS[topology]:
        started = time.perf_counter()
        for name, compiled in compiled_on(make_mesh(sizes, devices)).items():
            name = f"{name} data={sizes.data} fsdp={sizes.fsdp} tensor={sizes.tensor}"
            pathlib.Path(directory, f"{name}.txt").write_text(compiled.as_text())
            m = compiled.memory_analysis()
            needs = {
                "arguments": m.argument_size_in_bytes, "temporaries": m.temp_size_in_bytes,
                "outputs": m.output_size_in_bytes - m.alias_size_in_bytes, "code": m.generated_code_size_in_bytes,
            }  # fmt: skip
            print(json.dumps({"name": name, "seconds": round(time.perf_counter() - started), **needs}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

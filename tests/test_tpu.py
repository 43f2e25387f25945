"""What a Qwen2.5 0.5B needs on TPUs, as their compiler says, which needs no TPU: see compile_for_tpu.py."""

import importlib.util
import json
import math
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from experiments.collectives import SLICES, sent
from grpo_jax.models.transformer import make_policy
from grpo_jax.objectives import grpo
from grpo_jax.sharding import MeshConfig, batch_sharding, make_mesh
from grpo_jax.training import UpdateConfig, init_train_state, make_train_step
from grpo_jax.types import TrainBatch
from tests import TPU_COMPILER, compile_slices
from tests.test_training import collectives, computations, reached

ROOT = pathlib.Path(__file__).parent.parent
GIGABYTES = {"v5e:4x4": 16, "v6e:2x2": 32}  # of memory a chip
PARAMETERS = 494_032_768  # of Qwen/Qwen2.5-0.5B, as its model card's files hold them
VOCABULARY, ROW, COMPLETION = 151_936, 256 + 512, 512  # tokens
COPIES = {"train": 4 * 4, "start": 4, "decode": 2}  # bytes a parameter: with reference and moments; alone; in bfloat16
CACHE = 24 * 2 * 2 * 64 * 2  # bytes a token: layers, keys and values, heads, width, bfloat16


def sizes_of(line):
    """The shapes that a line of compiled text says it returns: [(type, dimensions)]."""
    returned = re.split(r" [a-z\-]+\(", line.split(" = ")[1], maxsplit=1)[0]
    return [
        (kind, [*map(int, filter(None, dims.split(",")))]) for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", returned)
    ]


def check_train(text, vocabulary, tensor):
    outside, inside = collectives(text)
    assert outside
    assert inside
    for line in outside + inside:
        for kind, dims in sizes_of(line):
            assert not {vocabulary, COMPLETION} <= {*dims}, f"logits travel: {line[:300]}"
            assert vocabulary not in dims or " all-gather" not in line, f"the matrix is gathered: {line[:300]}"
            # Rows of the embedding table change places between devices, which is neither a gathering nor a sum.
            activation = kind in ("bf16", "f32") and ROW in dims and "all-to-all" not in line
            assert tensor > 1 or not activation, f"activations travel over fsdp: {line[:300]}"


def check_decode(text):
    """Nothing travels, and neither weights nor caches are copied, for a token: both lie where they are used."""
    _, inside = collectives(text)
    for line in inside:  # but a number that says how far completions have got
        assert all(math.prod(dims) == 1 for _, dims in sizes_of(line)), f"travels for every token: {line[:300]}"
    found = computations(text)
    for name in reached(found, re.findall(r"body=%?([\w.\-]+)", text)):
        for line in found[name]:
            if re.search(r" (copy|transpose)\(", line):
                for kind, dims in sizes_of(line):
                    assert kind != "bf16" or 2 * math.prod(dims) < 2**20, f"copied for every token: {line[:300]}"


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e .[tpu]")
@pytest.mark.parametrize("topology", GIGABYTES)
def test_a_half_billion_parameters_fit(topology, tmp_path):
    environment = {
        **TPU_COMPILER,
        # Half the time to compile; it reports from 7% less to 20% more memory than the usual level does.
        "JAX_OPTIMIZATION_LEVEL": "O0",
    }
    command = [sys.executable, "-m", "tests.compile_for_tpu", topology, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rematerialization" not in done.stderr, done.stderr[-3000:]
    programs = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"train", "start", "decode"} == {program["name"].split()[0] for program in programs}
    for needs in programs:
        kind, *axes = needs["name"].split()
        mesh = {axis: int(size) for axis, size in (part.split("=") for part in axes)}
        gigabytes = (needs["arguments"] + needs["temporaries"] + needs["outputs"] + needs["code"]) / 1e9
        assert gigabytes < GIGABYTES[topology], needs
        # Nothing is held twice that should be split: the arguments are what they must be, and some padding.
        parts = mesh["fsdp"] * mesh["tensor"] if kind != "decode" else mesh["tensor"]
        floor = PARAMETERS * COPIES[kind] / parts
        if kind == "decode":
            # Of v6e, 256 slots, 2 of a row, and the prompts of rows beside all prompts.
            columns = 128 * (256 + 8 * 512) if topology == "v5e:4x4" else (128 + 128) * 256 + 256 * 512
            floor += columns * CACHE / math.prod(mesh.values())
        assert floor < needs["arguments"] < 1.1 * floor + 2**25, (floor, needs)
        text = (tmp_path / f"{needs['name']}.txt").read_text()
        if kind == "train":
            check_train(text, VOCABULARY // mesh["tensor"], mesh["tensor"])
        elif kind == "decode":
            check_decode(text)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e .[tpu]")
def test_from_slice_to_slice_goes_one_sum_of_gradients_and_within_one_they_are_scattered(tmp_path):
    command = [sys.executable, "-m", "tests.compile_slices", str(tmp_path / "text")]
    environment = {**TPU_COMPILER, "JAX_OPTIMIZATION_LEVEL": "O0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = sent((tmp_path / "text").read_text(), [compile_slices.MICROBATCHES] * 5)
    slow, least = [one for one in found if one.kind == SLICES], float(done.stdout)
    assert {one.times for one in slow} == {1}  # none in the loop of microbatches
    assert least < sum(one.bytes for one in slow) < 1.02 * least + 2**14  # norms and metrics too, in whole tiles
    of_mlp = {1, compile_slices.WIDTH, compile_slices.MLP_WIDTH}
    of_matrices = [one for one in found if of_mlp in [{*dims} for _, dims in sizes_of(one.line)]]
    assert {one.kind for one in of_matrices} >= {"all-gather", "reduce-scatter"}
    assert "all-reduce" not in {one.kind for one in of_matrices}


def test_what_travels_is_found():
    """The negative controls: lines that XLA wrote when activations were left alone, and a copy in a loop."""
    loop = "%body (p: f32[]) -> f32[] {{\n  %x = {} \n}}\n\nENTRY %main (p: f32[]) -> f32[] {{\n" + (
        "  %w = f32[] while(%p), condition=%c, body=%body\n  %r = f32[] all-reduce(%w), to_apply=%add\n}}\n"
    )
    for line, message in [
        ("f32[16,512,151936]{1,2,0} all-reduce(%dot), to_apply=%add", "logits travel"),
        ("bf16[16,768,4864]{1,2,0} all-reduce(%dot), to_apply=%add", "activations travel"),
        ("bf16[151936,896]{1,0} all-gather(%cast), dimensions={1}", "the matrix is gathered"),
    ]:
        with pytest.raises(AssertionError, match=message):
            check_train(loop.format(line), VOCABULARY, 1)
    check_train(loop.format("f32[1,24,56,4864]{3,2,1,0} all-reduce(%dot), to_apply=%add"), VOCABULARY, 1)
    with pytest.raises(AssertionError, match="copied"):
        check_decode(loop.format("bf16[896,4864]{1,0} copy(%weight)"))
    check_decode(loop.format("bf16[896]{0} copy(%weight)"))


def test_a_policy_that_knows_the_mesh_is_split_by_rows(config, params, capfd):
    """On eight CPU devices: the same values, and the partitioner copies nothing whole as its last resort."""
    mesh, rng = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), np.random.default_rng(0)
    tokens = lambda columns: rng.integers(2, config.vocab_size, (64, columns)).astype(np.int32)
    batch = TrainBatch(
        prompt_tokens=tokens(6), prompt_mask=np.ones((64, 6), bool), completion_tokens=tokens(10),
        mask=np.arange(10) < rng.integers(1, 11, (64, 1)), advantages=rng.normal(size=64).astype(np.float32),
        sampler_logprobs=None, temperature=np.ones(64, np.float32),
    )  # fmt: skip
    results = {}
    for of_mesh in (None, mesh):
        policy = make_policy(config, of_mesh)
        state = init_train_state(policy, params, optax.sgd(1.0), grpo(), mesh)
        step = make_train_step(
            policy, optax.sgd(1.0), grpo(), UpdateConfig(microbatches=2), like=state, key=jax.random.key(0)
        )
        capfd.readouterr()
        results[of_mesh] = step(state, jax.device_put(batch, batch_sharding(mesh)))[0].params
        assert "rematerialization" not in capfd.readouterr().err
    jax.tree.map(lambda got, expected: np.testing.assert_allclose(got, expected, atol=1e-6), *results.values())
    moved = jax.tree.map(lambda got, before: jnp.abs(got - before).max(), results[mesh], params)
    assert min(jax.tree.leaves(moved)) > 1e-4

    # The negative control: a change of places for which the partitioner knows no other way.
    def careless(table, tokens):
        split = lambda x, *axes: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))
        looked_up = jnp.sin(split(table[tokens], None, None, "fsdp"))
        return split(split(looked_up, "data", None, None) * 2, "fsdp", None, "tensor")

    table = jax.ShapeDtypeStruct((20, 16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("tensor", "fsdp")))
    jax.jit(careless).lower(table, jax.ShapeDtypeStruct((8, 6), jnp.int32, sharding=batch_sharding(mesh))).compile()
    assert "rematerialization" in capfd.readouterr().err

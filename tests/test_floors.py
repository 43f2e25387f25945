"""Formulas of `floors` against loops in NumPy, token by token, and against what XLA sends."""

import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from grpo_jax import floors

ROOT = pathlib.Path(__file__).parent.parent
MODEL = floors.Model(
    vocab_size=50, layers=3, width=12, heads=4, kv_heads=2, head_width=6, mlp_width=20, tied=False, windows=(4, 0)
)
STEP = floors.Step(
    prompt_tokens=5, lengths=np.array([[1, 4, 7], [2, 2, 6]]), max_tokens=7, minibatches=2, microbatches=3,
    compute_bytes=2, sampler_bytes=1, cache_bytes=4,
)  # fmt: skip
WINDOWS = [4, 0, 4]  # of the three layers
HEAD = 50 * 12


def sees(position, window):
    """Columns that a token attends to, one by one."""
    return sum(1 for column in range(position + 1) if not window or position - column < window)


def attention(positions):
    """FLOP of queries on keys and of weights on values: 2 a number and column each, of all heads and layers."""
    return sum(2 * 2 * 4 * 6 * sees(p, window) for p in positions for window in WINDOWS)


@pytest.mark.parametrize("window", [0, 1, 4, 30])
def test_seen_is_a_sum_over_positions(window):
    for first, last in itertools.product((0, 3, 9), (9, 12)):
        assert floors.seen(first, last, window) == sum(sees(p, window) for p in range(first, last))


def test_a_model_counts_its_matrices():
    layer = 12 * 4 * 6 + 2 * 12 * 2 * 6 + 4 * 6 * 12 + 3 * 12 * 20
    assert (MODEL.layer, MODEL.body, MODEL.parameters) == (layer, 3 * layer, 3 * layer + 2 * HEAD)


def test_the_sampler_token_by_token():
    body = MODEL.body
    before = sum(2 * body for _ in range(2 * 5)) + 2 * (2 * HEAD + attention(range(5)))
    flop = read = 0
    weights = 1 * (body + HEAD)
    for t in range(1, 7):  # tokens after the first
        read += weights
        for group in STEP.lengths:
            alive = [n for n in group if n > t]
            for window in WINDOWS:
                columns = [c for c in range(5 + t) if not window or 5 + t - 1 - c < window]
                of_prompt = sum(c < 5 for c in columns)
                # A numbers of a key and a value; the prompt's are read once for all that are alive.
                read += 4 * 2 * 2 * 6 * (of_prompt * bool(alive) + (len(columns) - of_prompt) * len(alive))
            flop += sum(2 * (body + HEAD) + attention([5 + t - 1]) for _ in alive)
    prefill, decode = floors.prefill(MODEL, STEP), floors.decode(MODEL, STEP)
    assert prefill.flop == before
    assert prefill.memory["caches"] == 4 * 2 * 2 * 6 * 3 * 2 * 5
    assert decode.flop == flop
    assert sum(decode.memory.values()) == read
    assert not any({**prefill.interconnect, **decode.interconnect}.values())  # one device
    # With a slot for two completions, weights are read as often as 16 tokens take two at a time.
    assert floors.decode(MODEL, dataclasses.replace(STEP, slots=2)).memory["weights"] == 8 * weights


def test_a_pass_over_completions_token_by_token():
    tokens = flop = 0
    for n in STEP.lengths.reshape(-1):
        flop += sum(2 * MODEL.body for _ in range(5 + n)) + 2 * HEAD * n + attention(range(5 + n))
        tokens += n
    assert floors.reference(MODEL, STEP).flop == flop
    update = floors.update(MODEL, STEP)
    assert update.flop == 3 * flop
    # Six rows of 12 columns, 52 of 72 of which are filled, in 2 x 3 parts: five of them hold something.
    assert STEP.parts == 5
    parameters = MODEL.parameters
    assert update.memory == {
        "weights": 5 * 3 * 2 * (MODEL.body + HEAD), "gradients": 5 * 2 * 4 * parameters,
        "optimizer": 2 * 7 * 4 * parameters, "activations": 2 * 3 * 12 * 2 * (6 * 5 + tokens),
    }  # fmt: skip
    assert set(floors.of_step(MODEL, STEP)) == {"prefill", "decode", "reference", "old", "update"}


def test_a_mesh_divides_the_work():
    whole, layout = floors.of_step(MODEL, STEP), floors.Layout(data=2, fsdp=4, tensor=2)
    for name, part in floors.of_step(MODEL, STEP, layout).items():
        assert part.flop == whole[name].flop / 16
        assert 0 < sum(part.memory.values()) < sum(whole[name].memory.values())
    rates = floors.Rates(flop=1e3, memory=1e2, interconnect=1e1)
    work = floors.Work(flop=50, memory={"a": 3, "b": 4}, interconnect={"c": 0.8})
    assert work.milliseconds(rates) == {"compute": 50, "memory": 70, "interconnect": 80}
    assert work.bottleneck(rates) == "interconnect"

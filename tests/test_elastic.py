"""A run that was saved on one mesh goes on on another: to rounding; on the same one, bit for bit."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from grpo_jax import loop, objectives, optimizers, sharding, training
from grpo_jax.checkpoints import CheckpointConfig
from grpo_jax.data.sources import Prompt
from grpo_jax.data.tokenizer import ByteTokenizer
from grpo_jax.models.transformer import TransformerConfig, init_params, make_policy
from grpo_jax.rewards import Reward
from grpo_jax.rollouts import GroupRollouts, RolloutConfig
from grpo_jax.sampler import Sampler
from grpo_jax.telemetry import read_jsonl
from grpo_jax.types import TrainState

STEPS, KEY = 6, jax.random.key(3)
EIGHT, FOUR, ONE = {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4}, {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pieces:
    """What a run on one mesh is made of."""

    fresh: Callable[[], TrainState]
    train_step: Callable[..., Any]
    experience: GroupRollouts


@functools.cache
def pieces(**axes: int) -> Pieces:
    """Compiled once a mesh."""
    tokenizer, mesh = ByteTokenizer("abcd"), sharding.make_mesh(sharding.MeshConfig(**axes))
    config = TransformerConfig(
        vocab_size=tokenizer.vocab_size, layers=1, width=16, heads=4, kv_heads=2, head_width=8, mlp_width=16
    )
    policy, update = make_policy(config, mesh), training.UpdateConfig(minibatches=2)
    objective = objectives.make_objective(objectives.LossConfig(kl_coef=0.1))
    # Adam would make a whole step of the rounding of a gradient of nothing: with this epsilon it is one of nothing.
    adam = optimizers.OptimizerConfig(learning_rate=2e-2, warmup_steps=0, epsilon=1e-3)
    optimizer, _ = optimizers.make_optimizer(adam, 2 * STEPS)
    fresh = lambda: training.init_train_state(policy, init_params(config, KEY), optimizer, objective, mesh)
    rewards = [Reward(name="a", function=lambda completions, **_: [text.count("a") / 6 for text in completions])]
    experience = GroupRollouts(
        sampler=Sampler(policy, mesh, tokenizer, group_size=4, key=KEY, max_tokens=6, max_prompt_tokens=3),
        source=lambda i: Prompt(text="abc"[: 1 + i % 3], columns={}), rewards=rewards, objective=objective,
        config=RolloutConfig(prompts=4, group_size=4),
        reference_logprobs=training.make_reference_logprobs(policy, update, mesh),
    )  # fmt: skip
    step = training.make_train_step(policy, optimizer, objective, update, like=fresh(), key=KEY)
    return Pieces(fresh=fresh, train_step=step, experience=experience)


def run(workdir: pathlib.Path, axes: dict[str, int], steps: int = STEPS) -> TrainState:
    """The run in a workdir, from where it is, until so many steps are done."""
    made = pieces(**axes)
    state, _ = loop.train(
        made.fresh(), train_step=made.train_step, experience=made.experience, steps=steps, workdir=workdir,
        checkpoints=CheckpointConfig(every=2), samples_every=1,
    )  # fmt: skip
    return state


def logs(workdir: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    rows = {name: read_jsonl(workdir / f"{name}.jsonl") for name in ("metrics", "samples", "rewards")}
    without_times = lambda row: {name: value for name, value in row.items() if not name.startswith("time/")}
    return {name: [without_times(row) for row in found] for name, found in rows.items()}


def leaves(state: TrainState) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}


def distance(ours: TrainState, theirs: TrainState) -> float:
    """The largest difference between the parameters of two states."""
    pairs = zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)


def test_a_run_goes_on_on_other_meshes_to_rounding_and_on_its_own_bit_for_bit(tmp_path):
    straight = run(tmp_path / "straight", EIGHT)

    run(tmp_path / "same", EIGHT, 2)
    same = run(tmp_path / "same", EIGHT)
    assert logs(tmp_path / "same") == logs(tmp_path / "straight")
    ours, theirs = leaves(same), leaves(straight)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 20
    for name, value in ours.items():
        assert value.tobytes() == theirs[name].tobytes(), name

    for axes, steps in ((EIGHT, 2), (FOUR, 4), (ONE, STEPS)):
        elastic = run(tmp_path / "elastic", axes, steps)
        devices = [len(x.sharding.device_set) for x in jax.tree.leaves(elastic)]
        assert {*devices} == {int(np.prod([*axes.values()]))}
        split = {x.sharding.shard_shape(x.shape) != x.shape for x in jax.tree.leaves(elastic.params)}
        assert (True in split) == (axes != ONE)
    # The same completions and rewards at every step; and what was computed of them, to rounding.
    ours, theirs = logs(tmp_path / "elastic"), logs(tmp_path / "straight")
    assert ours["rewards"] == theirs["rewards"]
    assert [row["step"] for row in ours["metrics"]] == [*range(STEPS + 1)]
    for row, other in zip(ours["metrics"], theirs["metrics"], strict=True):
        assert row == {name: pytest.approx(value, rel=1e-3, abs=1e-5) for name, value in other.items()}
    assert distance(elastic, straight) < 1e-5
    assert distance(straight, pieces(**EIGHT).fresh()) > 0.05  # there was something to carry

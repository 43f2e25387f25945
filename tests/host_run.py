"""A tiny run of GRPO, on one process or as one of several; tests/test_hosts.py starts it.

    python -m tests.host_run '{"distributed": "127.0.0.1:1234,0,2", "workdir": "runs/a", "model": "runs/model"}'

`die`: `[process, step, how]`, how a process of the run ends when that step (from 0) has its rewards: `SIGKILL`,
`SIGTERM`, or `raise` an error that no other process has; at step -1 before anything is compiled. `notice` is one of
preemption, before the step is sampled.
`every`: steps between checkpoints.
`slow`: seconds that the second process takes for the rewards of the first step.
`judge`: directory of a reward model, which scores completions behind the other reward.
"""

import dataclasses
import json
import os
import signal
import time

import jax
import numpy as np
from absl import logging
from jax._src import compiler, distributed
from jax.sharding import Mesh

from experiments import process
from grpo_jax import hosts, loop, objectives, optimizers, preemption, rollouts, sharding, storage, training, workdirs
from grpo_jax.checkpoints import CheckpointConfig
from grpo_jax.data import sources
from grpo_jax.data.sources import Prompt
from grpo_jax.data.tokenizer import ByteTokenizer
from grpo_jax.evaluation import EvaluationConfig, Evaluator
from grpo_jax.models import pretrained
from grpo_jax.models.transformer import TransformerConfig, make_policy
from grpo_jax.rewards import Reward
from grpo_jax.rewards.composition import gated
from grpo_jax.rewards.model import ModelReward, Scorer
from grpo_jax.sampler import Sampler

STEPS = 5
TOKENIZER = ByteTokenizer("abcd")
CONFIG = TransformerConfig(
    vocab_size=TOKENIZER.vocab_size, layers=1, width=16, heads=2, kv_heads=2, head_width=8, mlp_width=16,
    scale_embedding=False,
)  # fmt: skip
JUDGE = dataclasses.replace(CONFIG, score=True)
OTHER = ByteTokenizer("dcba")  # of the reward model: what is between them is text


def reward(completions: list[str], letter: list[str], **_) -> list[float]:
    """How often a letter is in a completion; a string, so that groups without signal are common."""
    return [float(text.count(of)) for text, of in zip(completions, letter, strict=True)]


def judge(directory: str, mesh: Mesh) -> list[Reward]:
    """A reward model that is asked about completions with a letter: a process may have none of these."""
    own = hosts.own_mesh(mesh)
    scorer = Scorer(make_policy(JUDGE, own), own, vocab_size=OTHER.vocab_size, pad_id=None)
    function = ModelReward(
        scorer=scorer, params=pretrained.load(directory, own), tokenizer=TOKENIZER, own=OTHER, end_id=1
    )
    return [gated(Reward(name="model", function=function, weight=0.1, on_device=True), by="often")]


def keep_what_all_compile() -> None:
    """JAX keeps only what the first process compiles, and on CPUs what others compile is not the same."""
    write = getattr(compiler, "_cache_write", None)

    def as_the_first(*arguments) -> None:
        state = distributed.global_state
        process, state.process_id = state.process_id, 0
        try:
            write(*arguments)
        finally:
            state.process_id = process

    if write is not None:
        compiler._cache_write = as_the_first


class Greedy(Evaluator):
    """Everything that compiles costs every process that a test starts."""

    full = Evaluator.greedy


def main(asked: dict) -> None:
    """Trains, or goes on with, the run in a workdir."""
    workdir, (dies_on, dies_at, how) = storage.path(asked["workdir"]), asked.get("die", (-1, -1, ""))
    logging.set_verbosity(logging.WARNING)
    keep_what_all_compile()
    hosts.initialize(asked["distributed"], heartbeat=10)
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, tensor=2))
    hosts.check_mesh(mesh)
    workdirs.open_workdir(workdir, {"steps": {"of": STEPS}})

    def die_at(step: int) -> None:
        if (dies_on, dies_at) == (jax.process_index(), step):
            if how == "raise":
                raise ValueError("this host alone is ill")
            os.kill(os.getpid(), getattr(signal, how))

    die_at(-1)
    policy, key = make_policy(CONFIG, mesh), jax.random.key(0)
    params = pretrained.load(asked["model"], mesh)
    if not (workdir / "export").exists():
        pretrained.save(workdir / "export", params, CONFIG)
    objective = objectives.make_objective(objectives.LossConfig(kl_coef=0.1))
    update = training.UpdateConfig()
    config = rollouts.RolloutConfig(prompts=4, group_size=4, max_waves=2)
    optimizer, schedule = optimizers.make_optimizer(optimizers.OptimizerConfig(learning_rate=1e-2), STEPS)
    sizes = {"max_tokens": 8, "max_prompt_tokens": 2}
    surplus = rollouts.surplus_of(config, objective, **sizes)
    prompts = [Prompt(text=a + b, columns={"letter": b}) for a in "abcd" for b in "abcd"]
    waits = [asked.get("slow", 0)] * (jax.process_index() == 1)

    def slow(**columns) -> list[float]:
        time.sleep(waits.pop() if waits else 0)
        return reward(**columns)

    rewards = [Reward(name="often", function=reward)]
    beside = judge(asked["judge"], mesh) if "judge" in asked else []
    source, read, sampling = sources.shuffled(prompts, 0), [], []

    def noted(cursor: int) -> Prompt:
        if (dies_on, dies_at, how) == (jax.process_index(), sampling[-1], "notice"):
            preemption.notice().set()
        read.append(cursor)
        return source(cursor)

    collect = rollouts.GroupRollouts(
        sampler=Sampler(policy, mesh, TOKENIZER, group_size=4, key=key, chunk=4, slots=16, **sizes),
        source=noted, rewards=[dataclasses.replace(rewards[0], function=slow), *beside], config=config,
        objective=objective,
        reference_logprobs=training.make_reference_logprobs(policy, update, mesh),
    )  # fmt: skip

    def experience(state, journal, interrupt):
        sampling.append(int(state.step))
        experienced = collect(state, journal, interrupt)
        die_at(int(state.step))
        return experienced

    evaluator = Greedy(
        policy, mesh, TOKENIZER, sources.in_order(prompts), rewards, EvaluationConfig(prompts=6), key=key, **sizes
    )
    state = training.init_train_state(policy, params, optimizer, objective, mesh, surplus)
    state, _ = loop.train(
        state, train_step=training.make_train_step(policy, optimizer, objective, update, like=state, key=key),
        experience=experience, steps=STEPS, workdir=workdir, learning_rate=schedule, evaluate_every=2, samples_every=1,
        checkpoints=CheckpointConfig(every=asked.get("every", 1)),
        evaluator=evaluator,
    )  # fmt: skip
    greedy = [record["completion"] for record in evaluator.records(state.params, sampled=False)]
    named = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(hosts.fetched(state))}

    def write() -> None:
        with storage.written(workdir / "state.npz") as file:
            np.savez(file, greedy=greedy, **named)

    hosts.first_does(write)
    hosts.together(lambda: (workdir / f"read.{jax.process_index()}.json").write_text(json.dumps(read)))


if __name__ == "__main__":
    process.command(lambda argv: main(json.loads(argv[1])))

"""What is compiled ahead is what a run asks for, to the last shape and place."""

import dataclasses
import os
import threading

import jax
import numpy as np
import pytest

from experiments import phases
from grpo_jax import objectives, optimizers, sharding, training
from grpo_jax.checkpoints import CheckpointConfig
from grpo_jax.compiling import compile_all
from grpo_jax.data.sources import Prompt
from grpo_jax.data.tokenizer import ByteTokenizer
from grpo_jax.demonstrations import Demonstrations
from grpo_jax.evaluation import EvaluationConfig, Evaluator
from grpo_jax.models.transformer import TransformerConfig, init_params, make_policy
from grpo_jax.rewards import Reward
from grpo_jax.rollouts import GroupRollouts, RolloutConfig
from grpo_jax.sampler import Sampler
from tests.compilations import Compilations

TOKENIZER, KEY, SIZES = ByteTokenizer("abcd"), jax.random.key(0), {"max_tokens": 6, "max_prompt_tokens": 3}
MODEL = TransformerConfig(
    vocab_size=TOKENIZER.vocab_size, layers=1, width=16, heads=2, kv_heads=2, head_width=8, mlp_width=16
)
LARGE = {
    f"backend_compile_duration of jit({name})"
    for name in ("start", "decode", "collect", "logprobs", "train_step", "checked_fun")
}


def source(i):
    return Prompt(text="abc"[: 1 + i % 3], columns={})


def phase(workdir, mesh, loss, supervised=False, debug_nans=False):
    """Two steps of a run: what was compiled before the loop, and in it."""
    policy, objective = make_policy(MODEL, mesh), objectives.make_objective(loss)
    rewards = [Reward(name="short", function=lambda completions, **columns: [-len(text) for text in completions])]
    update = training.UpdateConfig(microbatches=2)
    experience = GroupRollouts(
        sampler=Sampler(policy, mesh, TOKENIZER, group_size=4, key=KEY, slots=8, **SIZES), source=source,
        rewards=rewards, config=RolloutConfig(prompts=4, group_size=4, top_p=0.9), objective=objective,
        reference_logprobs=training.make_reference_logprobs(policy, update, mesh),
    )  # fmt: skip
    if supervised:
        experience, objective = Demonstrations(
            source=lambda i: ("ab", "abc"), tokenizer=TOKENIZER, batch=8, end_id=TOKENIZER.eos_ids[0], **SIZES
        ), objectives.supervised()  # fmt: skip
    evaluation = EvaluationConfig(prompts=5, sampled_prompts=4, samples=4, completions=16)
    evaluator = Evaluator(policy, mesh, TOKENIZER, source, rewards, evaluation, key=KEY, **SIZES)
    with Compilations() as heard:
        begun = None

        def compiled(*arguments):
            nonlocal begun
            result = compile_all(*arguments)
            begun = len(heard)
            return result

        phases.compile_all, before = compiled, phases.compile_all
        try:
            phases.phase(
                lambda: init_params(MODEL, KEY), policy=policy, model=MODEL, mesh=mesh, key=KEY, objective=objective,
                experience=experience, workdir=workdir, title="test", optimizer=optimizers.OptimizerConfig(),
                update=update, steps=2, checkpoints=CheckpointConfig(), evaluator=evaluator,
                debug_nans=debug_nans,
            )  # fmt: skip
        finally:
            phases.compile_all = before
    return [name for name in heard[:begun] if name in LARGE], [name for name in heard[begun:] if name in LARGE]


@pytest.mark.parametrize(
    ("sizes", "loss", "supervised", "debug_nans"),
    [
        ({}, {"kl_coef": 0.1, "kl_in_reward": True}, False, True),
        ({"data": 2, "fsdp": 2}, {"kl_coef": 0.1}, False, False),
        ({}, {"kl_coef": 0.0}, True, False),
    ],
)
def test_a_run_compiles_nothing_large_after_it(tmp_path, sizes, loss, supervised, debug_nans):
    mesh = sharding.make_mesh(sharding.MeshConfig(**sizes))
    ahead, later = phase(tmp_path, mesh, objectives.LossConfig(**loss), supervised, debug_nans)
    assert not later
    samplers = 2 if supervised else 3
    assert len(ahead) == 3 * samplers + (1 if supervised else 2)


def test_programs_are_compiled_beside_each_other_and_errors_are_raised():
    together = threading.Barrier(2, timeout=60)

    @dataclasses.dataclass
    class Lowered:
        value: int

        def compile(self):
            if self.value == 2:
                raise ValueError("the second")
            return self.value

    def lowering(value):
        def lower():
            together.wait()
            return Lowered(value)

        return lower

    if len(os.sched_getaffinity(0)) > 1:
        assert compile_all([lowering(0), lowering(1)]) == [0, 1]
    with pytest.raises(ValueError, match="the second"):
        compile_all([lambda: Lowered(1), lambda: Lowered(2)])


def test_it_finds_what_was_compiled():
    """And a place of another mesh is another program: the negative control of the test above."""
    double = jax.jit(lambda x: 2 * x)
    here = sharding.replicated(sharding.make_mesh())
    with Compilations() as heard:
        compile_all([lambda: double.lower(jax.ShapeDtypeStruct((3,), np.float32, sharding=here))])
        count = len(heard)
        x = jax.device_put(np.ones(3, np.float32), here)
        double(x)
        assert not [name for name in heard[count:] if name.startswith("backend_compile")]
        other = sharding.replicated(sharding.make_mesh(sharding.MeshConfig(data=2)))
        double(jax.device_put(np.ones(3, np.float32), other))
        assert [name for name in heard[count:] if name.startswith("backend_compile")]

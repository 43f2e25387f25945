"""Groups with signal until the batch is full: by hand, beside a queue in plain Python, and with a real sampler."""

import collections
import dataclasses

import jax
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax import loop, sharding
from grpo_jax.data.sources import Prompt
from grpo_jax.data.tokenizer import ByteTokenizer
from grpo_jax.dynamic_sampling import abstract_surplus, fill
from grpo_jax.logprobs import completion_logprobs
from grpo_jax.models.transformer import TransformerConfig, init_params, make_policy
from grpo_jax.objectives import LossConfig, make_objective
from grpo_jax.rewards import Reward
from grpo_jax.rollouts import GroupRollouts, RolloutConfig, surplus_of
from grpo_jax.sampler import Sampler
from grpo_jax.training import UpdateConfig, init_train_state, make_reference_logprobs, make_train_step
from grpo_jax.types import Groups, Rollout
from tests import oracle
from tests.test_rollouts import Journal

P, G, L, T, WAVES = 4, 2, 2, 3, 3


def groups_of(ids):
    """Groups that can be told apart by every one of their arrays."""
    of = lambda *columns: np.arange(int(np.prod(columns, dtype=int))).reshape(1, *columns)
    by = lambda rows, dtype, *columns: (np.repeat(ids, rows // len(ids)).reshape(-1, *[1] * len(columns)) * 100
                                        + of(*columns)).astype(dtype)  # fmt: skip
    n = len(ids)
    rollout = Rollout(
        prompt_tokens=by(n, np.int32, L), prompt_mask=np.ones((n, L), bool), completion_tokens=by(n * G, np.int32, T),
        mask=np.ones((n * G, T), bool), finished=np.ones(n * G, bool), logprobs=by(n * G, np.float32, T),
        sampler_logprobs=by(n * G, np.float32, T),
    )  # fmt: skip
    return Groups(rollout=rollout, rewards=by(n, np.float32, G), step_rewards=None)


def no_surplus():
    shapes = abstract_surplus(prompts=P, group_size=G, max_prompt_tokens=L, max_tokens=T, needs_steps=False)
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


def ids_of(groups):
    """The ids, once every array says the same."""
    ids = groups.rewards[:, 0] // 100
    expected = groups_of(ids.astype(int)) if ids.any() else jax.tree.map(np.zeros_like, groups)
    jax.tree.map(np.testing.assert_array_equal, groups, expected)
    return ids.astype(int).tolist()


def test_the_surplus_goes_first_and_what_has_no_room_is_left():
    fresh = lambda *ids: groups_of(np.array(ids))
    signal = lambda *has: ~np.array(has, bool)
    _, surplus, _, _ = fill(no_surplus(), fresh(1, 2, 3, 4, 5, 6, 7, 8), signal(1, 0, 0, 0, 1, 1, 1, 1))
    assert (int(surplus.count), surplus.groups.rewards[:, 0].tolist()) == (1, [800, 0, 0, 0])
    batch, surplus, chosen, metrics = fill(surplus, fresh(9, 10, 11, 12), signal(0, 1, 0, 1))
    assert ids_of(batch) == [8, 10, 12, 9]  # of those without signal the first, for no more waves are to come
    assert chosen.tolist() == [1, 3, 0]
    assert int(surplus.count) == 0
    assert {name.partition("/")[2]: n for name, n in metrics.items()} == {
        "kept_groups": 2, "reused_groups": 1, "surplus_groups": 0, "filled_without_signal": 1
    }  # fmt: skip


@given(waves=st.lists(st.lists(st.booleans(), min_size=P, max_size=P), min_size=1, max_size=12))
def test_beside_a_queue(waves):
    """Steps of up to three waves, until four groups have signal."""
    queue, surplus, cursor = collections.deque(), no_surplus(), 1
    waves = collections.deque(waves)
    while waves:
        ids, signal, before = [], [], len(queue)
        while not ids or (len(queue) < P and len(ids) < WAVES * P and waves):
            for has in waves.popleft():
                ids.append(cursor)
                signal.append(has)
                queue.extend([cursor] if has else [])
                cursor += 1
        dull = [i for i, has in zip(ids, signal, strict=True) if not has]
        expected = [queue.popleft() if queue else dull.pop(0) for _ in range(P)]
        batch, surplus, chosen, metrics = fill(surplus, groups_of(np.array(ids)), ~np.array(signal))
        assert ids_of(batch) == expected
        assert [ids[i] for i in chosen] == expected[before:]
        assert surplus.groups.rewards[: int(surplus.count), 0].tolist() == [100 * i for i in queue]
        assert metrics["dynamic_sampling/reused_groups"] == before
        jax.tree.map(
            lambda x, y: np.testing.assert_equal((x.shape, x.dtype), (y.shape, y.dtype)), surplus, no_surplus()
        )


# With a real sampler and a real train step -----------------------------------------------------------------------


TOKENIZER = ByteTokenizer("abcdefgh")
CONFIG = TransformerConfig(
    vocab_size=TOKENIZER.vocab_size, layers=1, width=16, heads=2, kv_heads=1, head_width=8, mlp_width=16
)
POLICY = make_policy(CONFIG)
SIZES = {"max_prompt_tokens": L, "max_tokens": T}


class Run:
    """Steps of dynamic sampling, in which `signal(cursor)` says which prompts' groups have spread in their rewards."""

    def __init__(self, signal, objective="grpo", waves=WAVES, mesh=None, **loss):
        mesh = sharding.make_mesh(sharding.MeshConfig(**(mesh or {})))
        objective = make_objective(LossConfig(objective=objective, **{"kl_coef": 0.0, **loss}))
        config, self.asked = RolloutConfig(prompts=P, group_size=G, max_waves=waves), []
        self.sampler = Sampler(POLICY, mesh, TOKENIZER, group_size=G, key=jax.random.key(0), **SIZES)

        def reward(completion_ids, n, **_):
            self.asked.append(n[::G])
            return [float(i % G) if signal(cursor) else 0.5 for i, cursor in enumerate(n)]

        self.rollouts = GroupRollouts(
            sampler=self.sampler, source=lambda i: Prompt(text="ab"[: 1 + i % 2], columns={"n": i}), config=config,
            rewards=[Reward(name="r", function=reward)], objective=objective,
            reference_logprobs=make_reference_logprobs(POLICY, UpdateConfig(), mesh),
        )  # fmt: skip
        optimizer, params = optax.sgd(0.5), init_params(CONFIG, jax.random.key(0))
        surplus = surplus_of(config, objective, **SIZES)
        self.state = init_train_state(POLICY, params, optimizer, objective, mesh, surplus)
        self.train_step = make_train_step(POLICY, optimizer, objective, like=self.state, key=jax.random.key(1))
        self.journal, self.measured = Journal(), {}

    def step(self, interrupt=lambda: None):
        experience = self.rollouts(self.state, self.journal, interrupt)
        self.state, self.measured = self.train_step(self.state, experience.batch)
        self.state = loop._advance(self.state, experience)
        return experience


def of_dynamic(experience):
    return {k.partition("/")[2]: v for k, v in experience.metrics.items() if k.startswith("dynamic_sampling/")}


@pytest.mark.parametrize("mesh", [{}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["one device", "eight"])
def test_steps_of_many_waves_train_on_groups_with_signal(mesh, caplog):
    """Every third prompt has signal, later every one: the batch is full each time, and nothing compiles twice."""
    compiled = lambda: [r.getMessage() for r in caplog.records if "Finished XLA compilation" in r.getMessage()]
    run = Run(lambda cursor: cursor % 3 == 0 or cursor >= 24, mesh=mesh)
    queue, cursor, numbers = collections.deque(), 0, []
    sampled = {}  # what the sampler said of the groups that wait
    for _ in range(6):
        caplog.clear()
        with jax.log_compiles():
            experience = run.step()
        assert bool(compiled()) == (not numbers)  # only the first step compiles
        before, waves = len(queue), 0
        while waves == 0 or (len(queue) < P and waves < WAVES):
            queue.extend(i for i in range(cursor, cursor + P) if i % 3 == 0 or i >= 24)
            cursor, waves = cursor + P, waves + 1
        expected = [queue.popleft() for _ in range(P)]
        said = of_dynamic(experience)
        assert (said["waves"], said["reused_groups"], said["surplus_groups"]) == (waves, before, len(queue))
        assert said["filled_without_signal"] == 0
        assert experience.prompts_consumed == waves * P
        assert int(run.state.cursor) == cursor
        assert experience.metrics["frac_reward_zero_std"] == pytest.approx(1 - said["kept_groups"] / (waves * P))
        numbers.append(waves)
        batch = jax.device_get(experience.batch)
        advantages = np.tile(oracle.group_advantages([[0, 1]])[0], P)
        np.testing.assert_allclose(batch.advantages, advantages, rtol=1e-5)
        # Groups of even prompts have one token before their completions, those of odd ones two.
        assert batch.prompt_mask.sum(1)[::G].tolist() == [1 + i % 2 for i in expected]
        surplus = jax.device_get(run.state.surplus)
        assert int(surplus.count) == len(queue)
        if before:  # groups that waited are as they were sampled, and the trainer's policy has moved since
            of_before = slice(0, before * G)
            np.testing.assert_array_equal(batch.completion_tokens[of_before], sampled["tokens"][of_before])
            np.testing.assert_array_equal(batch.sampler_logprobs[of_before], sampled["logprobs"][of_before])
            assert run.measured["sampling/sampling_logp_difference/max"] > 1e-3
        else:
            assert run.measured["sampling/sampling_logp_difference/max"] < 1e-4
        rollout = surplus.groups.rollout
        sampled = {"tokens": rollout.completion_tokens, "logprobs": rollout.logprobs}
    assert len(set(numbers)) > 1


def test_a_bound_on_the_attempts():
    """Without signal anywhere the last step's first groups train, with advantages of 0; all that was sampled counts."""
    run = Run(lambda cursor: False)
    for step in range(2):
        experience = run.step()
        assert of_dynamic(experience) == {
            "waves": WAVES, "kept_groups": 0, "reused_groups": 0, "surplus_groups": 0, "filled_without_signal": P
        }  # fmt: skip
        assert int(run.state.cursor) == (step + 1) * WAVES * P
        assert not np.asarray(experience.batch.advantages).any()
        assert experience.metrics["frac_reward_zero_std"] == 1
        assert experience.rollout_tokens > experience.batch.mask.sum()
    assert [cursor for asked in run.asked for cursor in asked] == list(range(2 * WAVES * P))


def test_one_wave_is_no_dynamic_sampling():
    run = Run(lambda cursor: cursor == 1, waves=1)
    assert run.state.surplus is None
    experience = run.step()
    assert not of_dynamic(experience)
    assert experience.prompts_consumed == P
    np.testing.assert_array_equal(np.asarray(experience.batch.advantages) != 0, [False] * 2 + [True] * 2 + [False] * 4)


def test_an_interrupt_between_waves_and_what_was_scored_before_is_read_again():
    class Interrupted(Exception):
        pass

    def between_waves():
        if run.journal:
            raise Interrupted

    run, straight = Run(lambda cursor: cursor % 3 == 0), Run(lambda cursor: cursor % 3 == 0)
    with pytest.raises(Interrupted):
        run.rollouts(run.state, run.journal, between_waves)
    assert run.asked == [[0, 1, 2, 3]]
    assert [wave for _, wave, _ in run.journal] == [0]
    ours, theirs = run.step(), straight.step()
    assert run.asked == straight.asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]  # of wave 0 nobody asks twice
    jax.tree.map(np.testing.assert_array_equal, (ours.batch, ours.surplus), (theirs.batch, theirs.surplus))
    untimed = lambda metrics: {name: value for name, value in metrics.items() if not name.startswith("time/")}
    assert untimed(ours.metrics) == untimed(theirs.metrics)


def test_samples_are_of_the_step_and_have_the_advantages_that_train():
    run = Run(lambda cursor: cursor % 3 == 0)
    for _ in range(2):
        experience = run.step()
        advantages = np.asarray(experience.batch.advantages).reshape(P, G)
        assert [sample["advantage"] for sample in experience.samples] == pytest.approx(advantages[-1].tolist())
        assert [sample["reward"] for sample in experience.samples] == [0, 1]


def test_rewards_of_steps_and_penalties():
    """Groups in which steps differ have signal although their sums are equal; a penalty is of the batch alone."""
    steps = lambda completion_ids, n, **_: [
        [(0, 1.0)] if i % G or len(ids) < 2 or c % 2 else [(0, 0.25), (1, 0.75)]
        for i, (ids, c) in enumerate(zip(completion_ids, n, strict=True))
    ]
    run = Run(None, objective="grpo_process")
    run.rollouts = dataclasses.replace(run.rollouts, rewards=[Reward(name="r", function=steps)])
    experience = run.step()
    batch = jax.device_get(experience.batch)
    assert batch.advantages.shape == batch.mask.shape
    said = of_dynamic(experience)
    assert (batch.advantages.reshape(P, -1) != 0).any(axis=1).sum() == P - said["filled_without_signal"]
    assert 0 < said["kept_groups"] < P * said["waves"]
    assert run.state.surplus.groups.step_rewards.shape == (P * G, T)

    run = Run(lambda cursor: cursor % 3 == 0, objective="rloo", kl="k1", kl_coef=0.5, kl_in_reward=True)
    run.step()  # the policy leaves the reference
    experience = run.step()
    assert of_dynamic(experience)["filled_without_signal"] == 0
    assert experience.metrics["kl"] > 1e-3
    assert np.abs(np.asarray(experience.batch.advantages) - np.tile([-1.0, 1.0], P)).max() > 1e-3

    run = Run(lambda cursor: cursor % 3 == 0, kl_coef=0.5)
    run.step()
    before = jax.device_get(run.state.params)
    b = run.step().batch
    tokens = b.prompt_tokens, b.prompt_mask, b.completion_tokens, b.mask
    of = lambda params: completion_logprobs(POLICY, params, *tokens)[0]
    np.testing.assert_allclose(b.ref_logprobs, of(run.state.reference), atol=1e-5)  # of groups that waited too
    assert np.abs(b.ref_logprobs - of(before)).max() > 1e-3


def test_what_does_not_fit_is_refused():
    run = Run(lambda cursor: True, waves=1)
    waves = dataclasses.replace(run.rollouts.config, max_waves=2)
    with pytest.raises(ValueError, match="max_waves above 1 needs a place in the state"):
        dataclasses.replace(run.rollouts, config=waves)(run.state, run.journal, lambda: None)
    with pytest.raises(ValueError, match="max_waves=2 has no place for params_of or select"):
        dataclasses.replace(run.rollouts, config=waves, select=lambda scores: None)
    with pytest.raises(ValueError, match="max_waves=0 must be 1 or more"):
        RolloutConfig(max_waves=0)

import dataclasses
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import sharding
from grpo_jax.data.sources import Prompt
from grpo_jax.data.tokenizer import ByteTokenizer
from grpo_jax.logprobs import completion_logprobs
from grpo_jax.models.transformer import TransformerConfig, init_params, make_policy
from grpo_jax.objectives import LossConfig, make_objective
from grpo_jax.outcomes import AdvantageConfig
from grpo_jax.rewards import Judged, Reward, RewardError
from grpo_jax.rollouts import GroupRollouts, RolloutConfig
from grpo_jax.sampler import Sampler
from grpo_jax.telemetry import RewardJournal
from grpo_jax.training import UpdateConfig, make_reference_logprobs
from tests import oracle

TOKENIZER = ByteTokenizer("abcdefgh")
CONFIG = TransformerConfig(
    vocab_size=TOKENIZER.vocab_size, layers=1, width=16, heads=2, kv_heads=1, head_width=8, mlp_width=16
)
POLICY = make_policy(CONFIG)
P, G = 4, 4
LIMIT = 120  # seconds that nothing here takes, on a busy machine neither


def make_sampler(tokenizer=TOKENIZER, stop=(), **mesh):
    return Sampler(
        POLICY, sharding.make_mesh(sharding.MeshConfig(**mesh)), tokenizer, group_size=G, max_tokens=5,
        max_prompt_tokens=3, key=jax.random.key(0), chunk=2, stop=stop,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sampler():
    return make_sampler()


class Journal(dict):
    def knows(self, step, wave):
        return any(key[:2] == (step, wave) for key in self)

    def read(self, step, wave, digest):
        return self.get((step, wave, digest))

    def write(self, step, wave, digest, scores):
        self[step, wave, digest] = scores


def objective_of(name, **changes):
    return make_objective(LossConfig(objective=name, **changes))


def collect(
    sampler, function, journal=None, source=lambda i: Prompt(text="abc"[: 1 + i % 3], columns={"n": i}),
    interrupt=lambda: None, step=2, **options,
):  # fmt: skip
    """Of the policy with the first parameters; those of the reference are others."""
    rewards = function if isinstance(function, list) else [Reward(name="r", function=function)]
    options = {"config": RolloutConfig(prompts=P, group_size=G), "objective": objective_of("grpo"), **options}
    rollouts = GroupRollouts(sampler=sampler, source=source, rewards=rewards, **options)
    params, reference = (init_params(CONFIG, jax.random.key(seed)) for seed in (0, 1))
    state = types.SimpleNamespace(params=params, reference=reference, cursor=8, step=step)
    return rollouts(state, Journal() if journal is None else journal, interrupt)


def test_a_step_of_experience(sampler):
    seen = {}

    def reward(prompts, completions, completion_ids, n):
        seen.update(prompts=prompts, completions=completions, n=n)
        return [float(i == 0) for i in range(P * G)]

    experience = collect(sampler, reward)
    assert seen["prompts"][::G] == ["abc", "a", "ab", "abc"]  # cursors 8 to 11
    assert seen["n"][::G] == [8, 9, 10, 11]
    assert experience.prompts_consumed == P
    advantages = np.asarray(experience.batch.advantages).reshape(P, G)
    np.testing.assert_allclose(advantages[0], [1.5, -0.5, -0.5, -0.5], atol=1e-3)  # (1 - 1/4) / std, std = 1/2
    assert not advantages[1:].any()
    metrics = experience.metrics
    assert metrics["reward"] == pytest.approx(1 / 16)
    assert metrics["frac_reward_zero_std"] == 0.75
    assert metrics["frac_groups_all_wrong"] == 0.75
    assert metrics["frac_groups_all_right"] == 0
    lengths = np.asarray(experience.batch.mask).sum(1)
    assert metrics["completions/mean_length"] == pytest.approx(lengths.mean())
    assert metrics["advantage/abs_mean"] == pytest.approx(3 / 16, abs=1e-3)
    assert experience.rollout_tokens == lengths.sum()
    assert [len(c) <= 5 for c in seen["completions"]] == [True] * (P * G)


def test_a_replay_reads_the_journal_and_does_not_ask_the_world_again(sampler):
    answers = iter([1.0, 2.0])
    journal = Journal()
    reward = lambda prompts, completions, completion_ids, n: [next(answers) if i == 0 else 0.0 for i in range(P * G)]
    first, second = collect(sampler, reward, journal), collect(sampler, reward, journal)
    np.testing.assert_array_equal(first.batch.advantages, second.batch.advantages)
    assert next(answers) == 2.0


def test_a_reward_that_was_mended_counts_from_the_first_step_that_was_not_recorded(sampler, tmp_path):
    """Over a stop: the step that failed has no record, and those before it keep what they were judged with."""
    fails = True

    def reward(completions, **_):
        if fails and len(recorded) == 2:
            raise ValueError("mend me")
        return [float(i % 3) if fails else -float(i % 4) for i in range(len(completions))]

    def at(step):
        return np.asarray(collect(sampler, reward, journal, step=step).batch.advantages).reshape(-1)

    recorded, journal = [], RewardJournal(tmp_path)
    recorded += [at(step) for step in (0, 1)]
    with pytest.raises(RewardError, match="mend me"):
        at(2)
    journal.close()
    fails, journal = False, RewardJournal(tmp_path)
    mended = at(2)
    np.testing.assert_array_equal([at(step) for step in (0, 1)], recorded)
    values = -(np.arange(P * G) % 4.0).reshape(P, G)
    np.testing.assert_allclose(mended, oracle.group_advantages(values).reshape(-1), rtol=1e-4)
    journal.close()


def test_rewards_of_steps_reach_the_tokens(sampler):
    """Of two rewards one has steps; where both end a step they are summed by weight, and one is only logged."""
    rng = np.random.default_rng(0)
    seen = {}

    def steps(completion_ids, **_):
        """At the first token and at every second one behind; nothing at all for some."""
        seen["steps"] = [[(t, float(rng.normal())) for t in range(0, len(c), 2)] for c in completion_ids]
        seen["steps"][5], seen["steps"][6] = [], None
        return seen["steps"]

    def plain(completion_ids, **_):
        seen["plain"] = [float(x) for x in rng.normal(size=len(completion_ids))]
        return seen["plain"]

    rewards = [Reward(name="s", function=steps), Reward(name="p", function=plain, weight=0.5),
               Reward(name="logged", function=lambda completion_ids, **_: [9.0] * P * G, weight=0.0)]  # fmt: skip
    experience = collect(sampler, rewards, objective=objective_of("grpo_process"))
    mask = np.asarray(experience.batch.mask)
    tokens = np.full(mask.shape, np.nan)
    for row, of_steps, of_completion, length in zip(tokens, seen["steps"], seen["plain"], mask.sum(1), strict=True):
        for end, value in of_steps or []:
            row[end] = value
        row[length - 1] = np.nan_to_num(row[length - 1]) + 0.5 * of_completion
    expected = oracle.process_advantages(tokens, mask, G)
    np.testing.assert_allclose(experience.batch.advantages, expected, atol=1e-4)
    assert experience.metrics["advantage/abs_mean"] == pytest.approx(np.abs(expected[mask]).mean(), rel=1e-3)
    shown = experience.samples[0]
    assert shown["advantage"] == pytest.approx(expected[0][mask[0]].mean(), abs=1e-4)


def test_without_steps_process_supervision_is_grpo(sampler):
    values = np.random.default_rng(1).normal(size=P * G)
    rewards = [Reward(name="a", function=lambda **_: list(values)),
               Reward(name="b", function=lambda **_: list(values**2), weight=0.3)]  # fmt: skip
    ours = collect(sampler, rewards, objective=objective_of("grpo_process")).batch
    theirs = collect(sampler, rewards, objective=objective_of("grpo")).batch
    assert ours.advantages.shape == ours.mask.shape
    assert theirs.advantages.shape == (P * G,)
    np.testing.assert_allclose(ours.advantages, np.where(ours.mask, theirs.advantages[:, None], 0), rtol=1e-5)


def test_each_reward_may_be_normalized_first(sampler):
    a, b = np.random.default_rng(2).normal(size=(2, P * G))
    b *= 100
    rewards = [Reward(name="a", function=lambda **_: list(a)), Reward(name="b", function=lambda **_: list(b))]
    for normalize, parts in ((True, [oracle.group_advantages(x.reshape(P, G)) for x in (a, b)]), (False, [a, b])):
        got = collect(sampler, rewards, advantages=AdvantageConfig(normalize_each=normalize))
        expected = oracle.group_advantages(np.reshape(parts[0] + parts[1], (P, G)))
        np.testing.assert_allclose(np.reshape(got.batch.advantages, (P, G)), expected, atol=1e-4)
        assert got.metrics["reward"] == pytest.approx((a + b).mean(), rel=1e-4)  # as it is


@pytest.mark.parametrize("name", ["rloo", "ppo"])
@pytest.mark.parametrize("mesh", [{}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_the_kl_may_be_taken_from_the_reward(name, mesh):
    objective = objective_of(name, kl="k1", kl_coef=0.5, kl_in_reward=True)
    rewards, sampler = np.random.default_rng(3).normal(size=(P, G)), make_sampler(**mesh)
    update = UpdateConfig(microbatches=2)
    experience = collect(
        sampler, lambda **_: list(rewards.reshape(-1)), objective=objective,
        reference_logprobs=make_reference_logprobs(POLICY, update, sharding.make_mesh(sharding.MeshConfig(**mesh))),
    )  # fmt: skip
    batch = jax.device_get(experience.batch)
    tokens = batch.prompt_tokens, batch.prompt_mask, batch.completion_tokens, batch.mask
    of = lambda seed: completion_logprobs(POLICY, init_params(CONFIG, jax.random.key(seed)), *tokens, 1.0)[0]
    kl = np.where(batch.mask, of(0) - of(1), 0)
    assert np.abs(kl).max() > 0.01
    metrics = experience.metrics
    assert metrics["kl"] == pytest.approx(kl.sum() / batch.mask.sum(), rel=1e-3)
    assert metrics["reward/kl_penalty"] == pytest.approx(0.5 * kl.sum() / (P * G), rel=1e-3)
    assert metrics["reward"] == pytest.approx(rewards.mean(), rel=1e-4)
    returns = rewards - 0.5 * kl.sum(axis=1).reshape(P, G)
    others = (returns.sum(axis=1, keepdims=True) - returns) / (G - 1)
    if name == "rloo":
        np.testing.assert_allclose(batch.advantages, (returns - others).reshape(-1), atol=1e-4)
        return
    by_token = -0.5 * kl
    by_token[np.arange(P * G), batch.mask.sum(axis=1) - 1] += rewards.reshape(-1)
    values = np.broadcast_to(others.reshape(-1, 1), kl.shape)
    advantages, _ = oracle.gae(by_token, values, batch.mask, 1.0, 0.95)
    np.testing.assert_allclose(batch.advantages, oracle.whiten(advantages, batch.mask, 1e-4, ddof=1), atol=1e-4)


@pytest.mark.parametrize("kl_in_reward", [False, True])
def test_the_reference_and_the_rewards_are_computed_at_the_same_time(sampler, kl_in_reward):
    """Each waits for the other: a GPU's runtime holds who asks for the reference until it has been computed."""
    both, values = threading.Barrier(2, timeout=LIMIT), np.random.default_rng(4).normal(size=P * G)

    def reference(params, rollout, temperature):
        assert params is not None
        both.wait()
        return jnp.full(rollout.mask.shape, -2.0) * temperature

    def reward(**_):
        both.wait()
        return list(values)

    options = {"objective": objective_of("grpo", kl_coef=0.5, kl_in_reward=kl_in_reward)}
    batch = collect(sampler, reward, reference_logprobs=reference, **options).batch
    if kl_in_reward:
        assert batch.ref_logprobs is None  # spent
    else:
        np.testing.assert_array_equal(batch.ref_logprobs, np.full(batch.mask.shape, -2.0))


def test_what_the_reference_holds_us_for_is_its_own(sampler):
    def reference(params, rollout, temperature):
        time.sleep(0.2)
        return jnp.zeros(rollout.mask.shape)

    asks = {"objective": objective_of("grpo", kl_coef=0.5), "reference_logprobs": reference}
    experience = collect(sampler, lambda completions, **_: [1.0] * len(completions), **asks)
    assert experience.reference_seconds >= 0.2


def test_a_journal_of_rewards_with_other_names_is_no_replay(sampler):
    """A file may be mended while a run stands still, and its `Reward` renamed."""
    journal, ones = Journal(), lambda completions, **_: [1.0] * len(completions)
    collect(sampler, [Reward(name="before", function=ones)], journal)
    with pytest.raises(RewardError, match=r"\['before'\] of step 2, and the run has \['now'\]"):
        collect(sampler, [Reward(name="now", function=ones)], journal)


def test_nobody_computes_a_reference_that_nothing_asks_for(sampler):
    objective = objective_of("grpo", kl_coef=0.0)
    values = list(np.random.default_rng(4).normal(size=P * G))
    batch = collect(sampler, lambda **_: values, objective=objective, reference_logprobs=pytest.fail).batch
    assert batch.ref_logprobs is None


def test_what_does_not_fit_together_is_refused_at_once(sampler):
    with pytest.raises(ValueError, match="kl_in_reward needs reference_logprobs"):
        collect(sampler, None, objective=objective_of("grpo", kl_in_reward=True))
    with pytest.raises(ValueError, match=r"no place for smoothing=0\.5"):
        collect(sampler, None, advantages=AdvantageConfig(smoothing=0.5))


def test_a_reward_that_misbehaves_is_an_error(sampler):
    with pytest.raises(RewardError, match="returned nan"):
        collect(sampler, lambda *_, **__: [float("nan")] * (P * G))


def test_a_prompt_beyond_the_limit_or_outside_the_alphabet_is_an_error(sampler):
    with pytest.raises(ValueError, match=r"'abcd' has 4 tokens; expected from 1 to 3"):
        collect(sampler, None, source=lambda i: Prompt(text="abcd"))
    with pytest.raises(ValueError, match="has 0 tokens"):
        collect(sampler, None, source=lambda i: Prompt(text=""))
    with pytest.raises(ValueError, match="outside the alphabet"):
        collect(sampler, None, source=lambda i: Prompt(text="z"))


@pytest.mark.parametrize("changes", [{"eos_ids": ()}, {"pad_id": None}])
def test_a_tokenizer_without_eos_or_pad_is_an_error(changes):
    tokenizer = types.SimpleNamespace(**{"eos_ids": (1,), "pad_id": 0, **changes})
    with pytest.raises(ValueError, match="at least one id that ends a completion"):
        make_sampler(tokenizer)


def test_a_stop_string_may_be_a_special_token():
    tokenizer = ByteTokenizer("abcdefgh")
    special = tokenizer.encode("h")[0]
    tokenizer.token_bytes = [None if i == special else b for i, b in enumerate(tokenizer.token_bytes)]
    seen = {}

    def reward(completion_ids, **_):
        seen["ids"] = completion_ids
        return range(P * G)

    collect(make_sampler(tokenizer), reward)
    free = seen["ids"]
    cut = [ids[: ids.index(special) + 1] if special in ids else ids for ids in free]
    assert cut != free
    collect(make_sampler(tokenizer, stop=("h",)), reward)
    assert seen["ids"] == cut
    with pytest.raises(ValueError, match="stop string 'ah' holds a special token beside other text"):
        make_sampler(tokenizer, stop=("ah",))


def test_prompts_must_divide_over_the_mesh():
    with pytest.raises(ValueError, match="4 prompts do not divide over 8 devices"):
        collect(make_sampler(data=8), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 1}, "group_size=1: an advantage relative to a group needs at least 2"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"prompts": 0}, "prompts=0"),
        ({"stop": "ab"}, "stop='ab' must be a tuple of strings"),
        ({"stop": (1,)}, r"stop=\(1,\) must be a tuple of strings"),
    ],
)
def test_bad_configuration(changes, message):
    with pytest.raises(ValueError, match=message):
        RolloutConfig(**changes)


# What composes and what fails --------------------------------------------------------------------------------------


def test_each_reward_is_clipped_before_it_is_normalized(sampler):
    a, b = np.random.default_rng(5).normal(size=(2, P * G))
    rewards = [Reward(name="a", function=lambda **_: list(a), low=-0.5, high=0.5),
               Reward(name="b", function=lambda **_: list(b), weight=2.0)]  # fmt: skip
    of = lambda x: oracle.group_advantages(np.reshape(x, (P, G)))
    clipped = np.clip(a, -0.5, 0.5)
    for normalize, total in ((True, of(clipped) + 2 * of(b)), (False, (clipped + 2 * b).reshape(P, G))):
        got = collect(sampler, rewards, advantages=AdvantageConfig(normalize_each=normalize))
        np.testing.assert_allclose(np.reshape(got.batch.advantages, (P, G)), of(total), atol=1e-4)
        assert got.metrics["reward"] == pytest.approx((clipped + 2 * b).mean(), rel=1e-6)
        assert got.metrics["rewards/a/mean"] == pytest.approx(a.mean())  # as it is
        assert got.metrics["rewards/a/clipped"] == (np.abs(a) > 0.5).sum()
        assert "rewards/b/clipped" not in got.metrics
    steps = collect(sampler, rewards, objective=objective_of("grpo_process")).batch
    np.testing.assert_allclose(
        steps.advantages, np.where(steps.mask, of(clipped + 2 * b).reshape(-1, 1), 0), atol=1e-4
    )  # fmt: skip


@pytest.mark.parametrize("objective", ["grpo", "rloo", "reinforce_batch", "ppo", "grpo_process"])
def test_a_completion_that_nobody_could_judge_neither_trains_nor_counts(sampler, objective):
    """As if it had not been sampled, where the others of its group are compared."""
    values = np.random.default_rng(6).normal(size=P * G)
    values[:G], lost = [1.0, 0.0, 5.0, 0.5], 2

    def judge(broken):
        failed = [broken and i == lost for i in range(P * G)]
        items = [None if f else v for v, f in zip(values, failed, strict=True)]
        return Reward(name="judge", function=lambda **_: Judged(items, failed=failed, seconds=[0.0] * len(items)))

    form = Reward(name="form", function=lambda **_: [1.0] * P * G, weight=0.25)
    got, whole = (
        collect(sampler, [judge(broken), form], objective=objective_of(objective)) for broken in (True, False)
    )
    mask = np.asarray(got.batch.mask)
    assert not mask[lost].any()
    assert whole.batch.mask[lost].any()
    np.testing.assert_array_equal(np.delete(mask, lost, 0), np.delete(np.asarray(whole.batch.mask), lost, 0))
    advantages = np.asarray(got.batch.advantages)
    assert np.isfinite(advantages).all()
    assert not advantages[lost].any()
    if objective == "grpo":
        np.testing.assert_allclose(advantages[[0, 1, 3]], oracle.group_advantages([[1, 0, 0.5]])[0], atol=1e-3)
    if objective == "rloo":
        np.testing.assert_allclose(advantages[[0, 1, 3]], [0.75, -0.75, 0], atol=1e-6)
    metrics = got.metrics
    assert (metrics["rewards/judge/failed"], metrics["completions/unknown_reward"]) == (1, 1)
    assert metrics["reward"] == pytest.approx(np.delete(values, lost).mean() + 0.25, rel=1e-6)
    assert all(np.isfinite(value) for value in metrics.values())
    assert (whole.metrics["rewards/judge/failed"], whole.metrics["completions/unknown_reward"]) == (0, 0)
    logged = dataclasses.replace(judge(True), weight=0.0)
    assert collect(sampler, [logged, form], objective=objective_of(objective)).metrics["rewards/judge/failed"] == 1
    unharmed = collect(sampler, [logged, form], objective=objective_of(objective))
    assert unharmed.metrics["completions/unknown_reward"] == 0


def test_where_nobody_could_judge_a_whole_group_it_has_no_signal(sampler):
    failed = [i < G for i in range(P * G)]
    judge = lambda **_: Judged(
        [None if f else i % 2 for i, f in enumerate(failed)], failed=failed, seconds=[0.0] * P * G
    )
    got = collect(sampler, judge)
    assert got.metrics["frac_reward_zero_std"] == 1 / P
    assert got.metrics["frac_groups_all_wrong"] == 0
    assert not np.asarray(got.batch.mask)[:G].any()
    assert [sample["reward"] for sample in got.samples] == [0, 1, 0, 1]

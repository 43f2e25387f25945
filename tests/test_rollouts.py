import types

import jax
import numpy as np
import pytest

from grpo_jax import sharding
from grpo_jax.data.sources import Prompt
from grpo_jax.data.tokenizer import ByteTokenizer
from grpo_jax.models.transformer import TransformerConfig, init_params, make_policy
from grpo_jax.rewards import Reward, RewardError
from grpo_jax.rollouts import GroupRollouts, RolloutConfig, Sampler

TOKENIZER = ByteTokenizer("abcdefgh")
CONFIG = TransformerConfig(
    vocab_size=TOKENIZER.vocab_size, layers=1, width=16, heads=2, kv_heads=1, head_width=8, mlp_width=16
)
POLICY = make_policy(CONFIG)
P, G = 4, 4


def make_sampler(tokenizer=TOKENIZER, stop=(), **mesh):
    return Sampler(
        POLICY, sharding.make_mesh(sharding.MeshConfig(**mesh)), tokenizer, group_size=G, max_tokens=5,
        max_prompt_tokens=3, key=jax.random.key(0), chunk=2, stop=stop,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sampler():
    return make_sampler()


class Journal(dict):
    def read(self, step, digest):
        return self.get((step, digest))

    def write(self, step, digest, scores):
        self[step, digest] = scores


def collect(sampler, function, journal=None, source=lambda i: Prompt(text="abc"[: 1 + i % 3], columns={"n": i})):
    rollouts = GroupRollouts(
        sampler=sampler, source=source, rewards=[Reward(name="r", function=function)],
        config=RolloutConfig(prompts=P, group_size=G),
    )  # fmt: skip
    state = types.SimpleNamespace(params=init_params(CONFIG, jax.random.key(0)), cursor=8, step=2)
    return rollouts(state, Journal() if journal is None else journal, lambda: None)


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
    assert experience.rollout_tokens == lengths.sum()
    assert [len(c) <= 5 for c in seen["completions"]] == [True] * (P * G)


def test_a_replay_reads_the_journal_and_does_not_ask_the_world_again(sampler):
    answers = iter([1.0, 2.0])
    journal = Journal()
    reward = lambda prompts, completions, completion_ids, n: [next(answers) if i == 0 else 0.0 for i in range(P * G)]
    first, second = collect(sampler, reward, journal), collect(sampler, reward, journal)
    np.testing.assert_array_equal(first.batch.advantages, second.batch.advantages)
    assert next(answers) == 2.0


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

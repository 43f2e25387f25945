import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from grpo_jax import evaluation, sharding
from grpo_jax.data.sources import Prompt
from grpo_jax.data.tokenizer import ByteTokenizer
from grpo_jax.evaluation import EvaluationConfig, Evaluator, maj_at_k, pass_at_k
from grpo_jax.models.transformer import TransformerConfig, init_params, make_policy
from grpo_jax.rewards import Judged, Reward
from grpo_jax.screen import _by_number, _shown

TOKENIZER = ByteTokenizer("abcd")
CONFIG = TransformerConfig(
    vocab_size=TOKENIZER.vocab_size, layers=1, width=16, heads=2, kv_heads=1, head_width=8, mlp_width=16
)
POLICY = make_policy(CONFIG)
PARAMS = init_params(CONFIG, jax.random.key(0))
SHORT = Reward(name="short", function=lambda completions, **_: [float(len(c) < 4) for c in completions])
# Applies to the prompts of even cursors only.
LENGTH = Reward(
    name="length",
    function=lambda completion_ids, n, **_: [None if i % 2 else len(c) for c, i in zip(completion_ids, n, strict=True)],
)


def source(i):
    return Prompt(text="abcd"[i % 4] * (1 + i % 3), columns={"n": i})


def make(config=EvaluationConfig(prompts=11, sampled_prompts=5, samples=4), rewards=(SHORT, LENGTH), data=8, **options):
    return Evaluator(
        POLICY, sharding.make_mesh(sharding.MeshConfig(data=data)), TOKENIZER, source, rewards, config,
        max_tokens=5, max_prompt_tokens=3, key=jax.random.key(1), **options,
    )  # fmt: skip


def test_pass_at_k_is_the_mean_over_all_subsets():
    correct = np.array([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
    for k in range(1, 6):
        by_hand = np.mean([[row[list(s)].any() for s in itertools.combinations(range(5), k)] for row in correct])
        assert pass_at_k(correct, k) == pytest.approx(by_hand)


@pytest.mark.parametrize(
    ("answers", "correct", "by_hand"),
    [
        ("1221", "0110", [0, 0.5, 1, 0.5]),  # 1; 1 and 2 tied; 2; tied
        ("123.", "0010", [0, 0, 1 / 3, 1 / 3]),  # three tied; nobody votes for nothing
        ("...1", "0001", [0, 0, 0, 1]),
        ("...2", "1110", [0, 0, 0, 0]),  # without an answer nothing is right
        ("1111", "1101", [1, 1, 2 / 3, 0.75]),  # the judge does not say the same of the same answer
    ],
)
def test_maj_at_k_by_hand(answers, correct, by_hand):
    votes, right = [[None if a == "." else a for a in answers]], np.array([[c == "1" for c in correct]])
    assert [maj_at_k(votes, right, k) for k in range(1, 5)] == pytest.approx(by_hand)
    both = maj_at_k([*votes, ["x"] * 4], np.concatenate([right, np.ones((1, 4), bool)]), 4)
    assert both == pytest.approx((by_hand[3] + 1) / 2)  # the mean over prompts


@pytest.mark.parametrize("k", [0, 6])
def test_k_must_be_at_most_the_number_of_samples(k):
    with pytest.raises(ValueError, match=f"k={k} must be from 1 to"):
        pass_at_k(np.ones((2, 5), bool), k)
    with pytest.raises(ValueError, match=f"k={k} must be from 1 to"):
        maj_at_k([["1"] * 5] * 2, np.ones((2, 5), bool), k)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompts": 0, "every": -1}, r"^every=-1, prompts=0 must be 1 or more\.$"),
        ({"completions": 0}, "^completions=0 must be 1 or more"),
        ({"temperature": 0.0}, r"temperature=0\.0 must be above 0"),
        ({"top_p": 2.0}, r"top_p=2\.0 in \(0, 1\]"),
    ],
)
def test_bad_configuration(changes, said):
    with pytest.raises(ValueError, match=said):
        EvaluationConfig(**changes)


@pytest.mark.parametrize("names", [[], ["a", "a"], ["a", "accuracy"]])
def test_rewards_need_names_that_their_metrics_can_have(names):
    with pytest.raises(ValueError, match="expected at least one, of different names"):
        make(rewards=[dataclasses.replace(SHORT, name=name) for name in names])


def test_completions_must_hold_one_prompt_on_each_device():
    config = EvaluationConfig(samples=4, completions=31)
    with pytest.raises(ValueError, match=r"completions=31 .* 4 on each of 8 devices .* make it at least 32"):
        make(config)


def test_metrics_say_what_the_records_hold():
    evaluator = make(answer=lambda text: text[:1] or None)
    greedy = list(evaluator.records(PARAMS, sampled=False))
    sampled = list(evaluator.records(PARAMS, sampled=True))
    assert [(r["index"], r["sample"]) for r in greedy] == [(i, 0) for i in range(11)]  # on 8 devices
    assert [(r["index"], r["sample"]) for r in sampled] == [(i, j) for i in range(5) for j in range(4)]
    for record in greedy + sampled:
        assert record["prompt"] == source(record["index"]).text
        assert record["columns"] == {"n": record["index"]}
        letters, tokens = len(record["completion"]), record["tokens"]
        assert letters + record["finished"] <= tokens <= 5  # one a letter, and the end
        assert record["finished"] or tokens == 5
        assert record["rewards"] == {"short": letters < 4, "length": None if record["index"] % 2 else tokens}
    assert len({r["completion"] for r in sampled}) > 5
    assert json.loads(json.dumps(sampled)) == sampled

    metrics = evaluator.full(PARAMS)
    right = [[r["rewards"]["short"] for r in sampled[i : i + 4]] for i in range(0, 20, 4)]
    lengths = {kind: [r["tokens"] for r in rows if r["index"] % 2 == 0]
               for kind, rows in (("greedy", greedy), ("sampled", sampled))}  # fmt: skip
    answers = [[r["completion"][:1] or None for r in sampled[i : i + 4]] for i in range(0, 20, 4)]
    correct = np.array(right) > 0.5
    assert 0 < np.mean(right) < 1
    assert metrics == {
        "eval/accuracy": np.mean([r["rewards"]["short"] for r in greedy]),
        "eval/length": np.mean(lengths["greedy"]),
        "eval/length/not_applicable": 5,
        "eval/pass@1": pytest.approx(np.mean(right)),
        "eval/pass@4": np.mean([any(row) for row in right]),
        "eval/mean@4": np.mean(right),
        "eval/length/mean@4": np.mean(lengths["sampled"]),
        "eval/length/mean@4/not_applicable": 8,
        "eval/maj@1": maj_at_k(answers, correct, 1),
        "eval/maj@4": maj_at_k(answers, correct, 4),
    }
    assert evaluator.greedy(PARAMS).items() <= metrics.items()
    assert evaluator.summarize([*greedy, *sampled]) == metrics


def test_what_a_judge_does_not_know_is_counted_and_in_no_mean(caplog):
    """Of the judge, of another reward; pass@k has them as wrong."""

    def judge(n, completions, **_):  # of prompt 0 it knows nothing; of others, the first letters are right
        lost = [i == 0 for i in n]
        items = [None if f else float(text < "c") for f, text in zip(lost, completions, strict=True)]
        return Judged(items, failed=lost, seconds=[0.0] * len(n))

    rewards = [Reward(name="accuracy", function=judge), Reward(name="other", function=judge)]
    evaluator = make(rewards=rewards)
    records = [record for sampled in (False, True) for record in evaluator.records(PARAMS, sampled=sampled)]
    metrics = evaluator.summarize(records)
    for record in records:
        assert record["failed"] == (["accuracy", "other"] if record["index"] == 0 else [])
        assert (record["rewards"]["accuracy"] is None) == (record["index"] == 0)
    assert json.loads(json.dumps(records)) == records
    said = lambda rows: [r["rewards"]["accuracy"] for r in rows if r["index"] != 0]
    greedy, sampled = records[:11], records[11:]
    assert len(said(greedy)) == 10
    assert 0 < np.mean(said(sampled)) < 1
    right = [[bool(r["rewards"]["accuracy"]) for r in sampled[i : i + 4]] for i in range(0, 20, 4)]
    assert metrics == {
        "eval/accuracy": np.mean(said(greedy)), "eval/accuracy/failed": 1,
        "eval/other": np.mean(said(greedy)), "eval/other/failed": 1, "eval/other/not_applicable": 1,
        "eval/mean@4": np.mean(said(sampled)), "eval/mean@4/failed": 4,
        "eval/other/mean@4": np.mean(said(sampled)), "eval/other/mean@4/failed": 4,
        "eval/other/mean@4/not_applicable": 4,
        "eval/pass@1": pytest.approx(np.mean(right)), "eval/pass@4": np.mean([any(row) for row in right]),
    }  # fmt: skip
    assert [message.partition(", the first")[0] for message in caplog.messages] == [
        f"evaluation: {name} came to no verdict on 5 of 31 completions" for name in ("accuracy", "other")
    ]
    assert [_shown(name, metrics[name]) for name in ("eval/accuracy/failed", "eval/mean@4/failed")] == ["1", "4"]
    assert sorted(metrics, key=_by_number)[0] == "eval/accuracy"


def test_every_host_hears_what_the_judge_of_one_raises(monkeypatch):
    """`on_every_host` is where they meet, in tests/test_scoring.py with two processes: once a batch."""
    met = []
    monkeypatch.setattr(evaluation, "on_every_host", lambda compute: met.append(compute()) or met[-1])
    records = list(make(EvaluationConfig(prompts=11, samples=1, completions=8)).records(PARAMS, sampled=False))
    assert [scores.by_name["short"].tolist() for (scores,) in met] == [
        [r["rewards"]["short"] for r in records[:8]], [r["rewards"]["short"] for r in records[8:]]
    ]  # fmt: skip


def test_what_is_measured_does_not_depend_on_the_batches():
    """Batches of one compiled shape, the last filled up; rewards never see what fills it up."""
    config, seen = EvaluationConfig(prompts=11, sampled_prompts=5, samples=4), []
    counting = dataclasses.replace(SHORT, function=lambda **c: seen.append(len(c["n"])) or SHORT.function(**c))

    def records(completions, data):
        seen.clear()
        evaluator = make(dataclasses.replace(config, completions=completions), [counting, LENGTH], data)
        return [list(evaluator.records(PARAMS, sampled=s)) for s in (False, True)], list(seen)

    whole, sizes = records(8192, 8)
    assert sizes == [11, 20]
    assert records(10, 2) == (whole, [6, 5, 8, 8, 4])  # 6 and 2 prompts at a time, as evenly as it goes


def test_an_interruption_comes_through():
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make().full(PARAMS, stop)

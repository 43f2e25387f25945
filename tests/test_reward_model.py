"""Scores of sequences, the loss of preferences, and the step that learns from them; what stands around both."""

import dataclasses
import functools
import itertools
import json
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax import incidents, reward_model
from grpo_jax.data.sources import json_records
from grpo_jax.data.tokenizer import ByteTokenizer, PretrainedTokenizer
from grpo_jax.debugging import naming_nans
from grpo_jax.guard import NotFiniteError
from grpo_jax.memory import parts_that_fit
from grpo_jax.metrics import finalize
from grpo_jax.models.transformer import abstract_params, make_policy
from grpo_jax.objectives import supervised
from grpo_jax.preferences import (
    Pair,
    PairEvaluator,
    PairExperience,
    calibration_error,
    encode_pairs,
    pair_record,
    reliability,
)  # fmt: skip
from grpo_jax.reward_model import Pairs, bradley_terry, make_pair_step, scored_tokens, scores
from grpo_jax.rewards import Reward, score
from grpo_jax.rewards.composition import gated
from grpo_jax.rewards.model import ModelReward, Scorer, round_up, same_tokens
from grpo_jax.rollouts import Experience
from grpo_jax.sharding import MeshConfig, make_mesh
from grpo_jax.training import init_train_state
from tests import oracle

B, S = 16, 10
LENGTHS = np.array([1, 10, 3, 7, 2, 5, 10, 4, 6, 1, 8, 9, 3, 3, 2, 10])
MASK = np.arange(S)[None] < LENGTHS[:, None]
TOKENS = np.where(MASK, np.random.default_rng(1).integers(2, 20, (B, S)), 0).astype(np.int32)
MESHES = [MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(fsdp=4)]


@pytest.fixture(scope="module")
def judge(config):
    """A small reward model with random numbers in every leaf, on one device."""
    config = dataclasses.replace(config, score=True)
    rng, shapes = np.random.default_rng(2), abstract_params(config)[0]

    def fill(path, leaf):
        return jnp.asarray(rng.normal(1.0 * ("norm" in path[-1].key), 0.25, leaf.shape), jnp.float32)

    return config, jax.tree_util.tree_map_with_path(fill, shapes)


@pytest.fixture(scope="module")
def alone(judge):
    """The score of each sequence by itself, without padding, as the equation says; and all as a function."""
    config, _ = judge
    policy = make_policy(config)

    @jax.jit
    def of(params):
        # Causal: what stands behind the last token changes nothing.
        positions = jnp.broadcast_to(jnp.arange(S), (B, S))
        hidden, _ = policy.hidden(params, TOKENS, positions, jnp.ones((B, S), jnp.int32))
        return (hidden[jnp.arange(B), LENGTHS - 1] * params["score"]).sum(axis=1)

    return of


def small_parts(monkeypatch):
    monkeypatch.setattr(reward_model, "parts_that_fit", functools.partial(parts_that_fit, tokens=4 * S))


# Scores -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "parts"), [(MESHES[0], "parts"), (MESHES[1], "whole"), (MESHES[1], "parts"), (MESHES[2], "whole")], ids=str
)
def test_scores_are_those_of_the_last_tokens(judge, alone, mesh, parts, monkeypatch):
    if parts == "parts":
        small_parts(monkeypatch)
    config, params = judge
    mesh = make_mesh(mesh)
    of = jax.jit(functools.partial(scores, make_policy(config, mesh), mesh=mesh))
    np.testing.assert_allclose(of(params, TOKENS, MASK), alone(params), atol=1e-5)


def test_the_score_of_nothing_is_0_and_padding_is_what_the_mask_says(judge, alone):
    config, params = judge
    of = jax.jit(functools.partial(scores, make_policy(config), mesh=make_mesh()))
    mask = MASK.copy()
    mask[3] = False
    padded = np.where(MASK, TOKENS, 7).astype(np.int32)
    expected = np.where(np.arange(B) == 3, 0, alone(params))
    np.testing.assert_allclose(of(params, padded, mask), expected, atol=1e-5)
    mesh = make_mesh(MeshConfig(data=2))
    with pytest.raises(ValueError, match="3 sequences do not divide over 2 devices"):
        scores(make_policy(config, mesh), params, TOKENS[:3], MASK[:3], mesh=mesh)


@pytest.mark.parametrize(
    ("pad_id", "line", "real", "scored"),
    [
        (None, [5, 0, 0], 3, 3), (0, [5, 0, 0], 3, 1), (0, [5, 0, 6], 3, 3), (0, [5, 6, 0], 2, 2), (0, [0, 0, 0], 2, 1),
        (9, [5, 0, 0], 2, 2),
    ],
)  # fmt: skip
def test_the_last_token_that_is_no_padding_is_scored(pad_id, line, real, scored):
    mask = np.arange(3)[None] < real
    assert scored_tokens(jnp.array([line]), jnp.asarray(mask), pad_id)[0].tolist() == [i < scored for i in range(3)]


# The loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("center_coef", [0.0, 0.3])
@pytest.mark.parametrize("margins", [False, True])
def test_bradley_terry_against_loops(center_coef, margins):
    rng = np.random.default_rng(0)
    chosen, rejected = (rng.normal(0, 3, 9).astype(np.float32) for _ in range(2))
    given = rng.uniform(0, 2, 9).astype(np.float32) if margins else None
    loss = functools.partial(bradley_terry, margins=given, center_coef=center_coef)
    (value, metrics), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        jnp.array(chosen), jnp.array(rejected)
    )
    expected, *derivatives = oracle.bradley_terry(
        chosen, rejected, np.zeros(9) if given is None else given, center_coef
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for ours, theirs in zip(grads, derivatives, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7)
    said = finalize(metrics)
    np.testing.assert_allclose(said["accuracy"], (chosen > rejected).mean(), rtol=1e-6)
    np.testing.assert_allclose(said["margin"], (chosen - rejected).mean(), rtol=1e-4)
    np.testing.assert_allclose(said["calibration"], (1 / (1 + np.exp(-np.abs(chosen - rejected)))).mean(), rtol=1e-5)


def test_bradley_terry_by_hand():
    loss, metrics = bradley_terry(jnp.array([1.0, 0.0]), jnp.array([1.0, 0.0]))
    assert loss == pytest.approx(math.log(2))
    assert finalize(metrics)["accuracy"] == 0.5  # ties
    far = jnp.array([200.0]), jnp.array([-200.0])
    assert bradley_terry(*far)[0] == 0
    assert bradley_terry(*far[::-1])[0] == 400  # and finite
    assert bradley_terry(jnp.array([2.0]), jnp.array([0.0]), jnp.array([2.0]))[0] == pytest.approx(math.log(2))
    assert bradley_terry(jnp.array([1.0]), jnp.array([2.0]), center_coef=1.0)[0] == pytest.approx(
        math.log1p(math.e) + 9
    )


# The step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mesh", "parts"), [(MESHES[0], "whole"), (MESHES[1], "parts")], ids=str)
def test_a_step_is_that_of_the_loss_of_all_pairs(judge, alone, mesh, parts, monkeypatch):
    if parts == "parts":
        small_parts(monkeypatch)
    config, params = judge
    margins = np.linspace(0, 1, B // 2).astype(np.float32)
    whole = lambda p: bradley_terry(alone(p)[0::2], alone(p)[1::2], margins)[0]
    loss, grads = jax.jit(jax.value_and_grad(whole))(params)
    mesh, optimizer = make_mesh(mesh), optax.sgd(0.1)
    policy = make_policy(config, mesh)
    state = init_train_state(policy, params, optimizer, supervised(), mesh)
    step = make_pair_step(policy, optimizer, like=state, clip_norm=1e-3)
    state, metrics = step(state, Pairs(tokens=TOKENS, mask=MASK, margins=margins))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-4)
    assert metrics["grad_clipped"] == 1
    assert int(state.step) == 1
    for ours, before, grad in zip(*map(jax.tree.leaves, (state.params, params, grads)), strict=True):
        np.testing.assert_allclose(ours, before - 0.1 * grad, atol=2e-5)


def test_a_nan_in_a_step_is_named_and_reported(judge):
    """As of any train step; the metrics are those that the loop asks for."""
    config, params = judge
    optimizer, pairs = optax.sgd(0.1), Pairs(tokens=TOKENS, mask=MASK, margins=np.full(B // 2, np.nan, np.float32))
    policy, mesh = make_policy(dataclasses.replace(config, remat="full")), make_mesh()
    state = init_train_state(policy, params, optimizer, supervised(), mesh)
    step = make_pair_step(policy, optimizer, like=state)
    with pytest.raises(
        NotFiniteError, match=r"step 1 is not finite: nan generated by primitive: sub at .*reward_model"
    ):
        naming_nans(step)(state, pairs)
    _, metrics = step(state, pairs)
    assert metrics["skipped"] == metrics["skipped_in_a_row"] == 1
    said = incidents.seen(1, 0, metrics, Experience(batch=pairs, prompts_consumed=B // 2))
    assert said["not_finite"] == ["grad_norm", "loss"]


def test_parts_that_fit():
    bytes_of = lambda rows: rows * 100
    assert parts_that_fit(12, 8, bytes_of, math.inf, tokens=1000) == 1
    assert parts_that_fit(12, 8, bytes_of, math.inf, tokens=50) == 2  # 6 rows of 8
    assert parts_that_fit(12, 8, bytes_of, 450, tokens=1000) == 3
    assert parts_that_fit(12, 8, bytes_of, 10, tokens=1000) == 12  # nothing fits: one row at a time
    assert parts_that_fit(7, 8, bytes_of, math.inf, tokens=1) == 7


def test_less_room_makes_more_parts(judge, monkeypatch):
    config, params = judge
    asked = []
    monkeypatch.setattr(reward_model, "parts_that_fit", lambda *a: asked.append(parts_that_fit(*a)) or asked[-1])
    for room in (math.inf, 40_000.0, 1.0):
        jax.eval_shape(
            functools.partial(scores, make_policy(config), mesh=make_mesh(), room=room), params, TOKENS, MASK
        )
    assert asked[0] == 1 < asked[1] < asked[2] == B


# As a reward ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scorer(judge):
    return Scorer(make_policy(judge[0]), make_mesh(), vocab_size=20, pad_id=0)


def test_a_reward_model_scores_the_tokens_that_were_sampled(judge, scorer):
    tokenizer = ByteTokenizer("abcdefgh")
    asked = ["ab", "ab", "c"]
    ids = [[5, 1], [3, 4, 1], [9, 9, 9]]  # the last was cut
    reward = ModelReward(scorer=scorer, params=judge[1], tokenizer=tokenizer)
    texts = [tokenizer.decode(line) for line in ids]
    found = score(
        [Reward(name="model", function=reward)], prompts=asked, completions=texts, completion_ids=ids,
        columns={"answer": [1, 2, 3]},
    ).by_name["model"]  # fmt: skip
    lines = [[2, 3, 5, 1], [2, 3, 3, 4, 1], [4, 9, 9, 9]]
    np.testing.assert_array_equal(found, scorer(judge[1], lines))
    assert len({*found.tolist()}) == 3


@pytest.mark.parametrize("mesh", MESHES[:2], ids=str)
def test_few_numbers_of_sequences_are_compiled(judge, alone, mesh, monkeypatch):
    """As many as pass a gate, another number at every step."""
    config, params = judge
    mesh, rows = make_mesh(mesh), []
    of = reward_model.scores
    monkeypatch.setattr(reward_model, "scores", lambda *a, **b: rows.append(len(a[2])) or of(*a, **b))
    scorer = Scorer(make_policy(config, mesh), mesh, vocab_size=20, pad_id=None)
    lines, expected = [TOKENS[i, :n].tolist() for i, n in enumerate(LENGTHS)], alone(params)
    for count in (13, 3, 5, 7, 11):
        np.testing.assert_allclose(scorer(params, lines[:count]), expected[:count], atol=1e-5)
    assert sorted(rows) == [4, 8, 16]


def test_behind_a_gate_it_says_the_same_of_those_that_pass(judge, scorer):
    tokenizer, passes = ByteTokenizer("abcdefgh"), [False, True, True, False, True]
    ids = [[5, 1], [3, 4, 1], [9, 9, 9], [3, 1], [7, 6, 5, 1]]
    model = Reward(
        name="model", function=ModelReward(scorer=scorer, params=judge[1], tokenizer=tokenizer), on_device=True
    )
    exact = Reward(name="exact", function=lambda **_: [float(right) for right in passes])
    behind = gated(model, by="exact")
    assert behind.on_device
    of = lambda reward: score(
        [exact, reward], prompts=["ab"] * 5, completions=[*map(tokenizer.decode, ids)], completion_ids=ids, columns={}
    ).by_name["model"]  # fmt: skip
    np.testing.assert_allclose(of(behind), np.where(passes, of(model), math.nan), atol=1e-5)


def test_through_text_where_tokenizers_differ(judge, scorer):
    ours, theirs = ByteTokenizer("abcdefgh"), ByteTokenizer("hgfedcba")
    assert not same_tokens(ours, theirs)
    assert same_tokens(ours, ByteTokenizer("abcdefgh"))
    reward = ModelReward(scorer=scorer, params=judge[1], tokenizer=ours, own=theirs, end_id=1)
    ids = [[5, 1], [9, 9]]
    found = reward(prompts=["ab", "c"], completions=["d", "hh"], completion_ids=ids)
    np.testing.assert_array_equal(found, scorer(judge[1], [[9, 8, 6, 1], [7, 2, 2]]))


def test_a_mesh_of_several_processes_is_refused(judge):
    """Each has completions of its own; tests/test_hosts.py has two that ask on their own meshes."""
    of_all = types.SimpleNamespace(mesh=types.SimpleNamespace(is_multi_process=True, size=4))
    with pytest.raises(ValueError, match=r"mesh of 4 devices has some of other processes.*hosts\.own_mesh\(mesh\)"):
        ModelReward(scorer=of_all, params=judge[1], tokenizer=ByteTokenizer("ab"))


def pretrained_tokenizer(vocabulary, special=()):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.add_special_tokens(list(special))
    return PretrainedTokenizer(
        backend=backend, continuation=backend, eos_ids=(0,), pad_id=0, special_tokens={}, chat_template=None,
        decoder=None, model_vocab_size=None,
    )  # fmt: skip


def test_tokenizers_agree_where_every_id_means_the_same():
    words = {"x": 0, "a": 1, "b": 2}
    one = pretrained_tokenizer(words)
    assert same_tokens(one, pretrained_tokenizer(dict(words)))
    assert not same_tokens(one, pretrained_tokenizer({"x": 0, "a": 2, "b": 1}))
    assert not same_tokens(one, pretrained_tokenizer({**words, "c": 3}))
    assert not same_tokens(one, pretrained_tokenizer(words, special=["x"]))
    assert not same_tokens(one, ByteTokenizer("ab"))


@pytest.mark.parametrize("line", [[], [3, 20], [-1]])
def test_an_id_that_the_model_does_not_have_is_an_error(judge, scorer, line):
    with pytest.raises(ValueError, match=r"sequence 1 holds .* of the 20 that the reward model has"):
        scorer(judge[1], [[3], line])


@pytest.mark.parametrize(("length", "width"), [(1, 16), (16, 16), (17, 32), (32, 32), (33, 64)])
def test_few_widths_are_compiled(length, width):
    assert round_up(length) == width


# Preferences ------------------------------------------------------------------------------------------


def test_records_of_preferences():
    assert pair_record({"prompt": "p", "chosen": "a", "rejected": "b"}) == {
        "prompt": "p", "chosen": "a", "rejected": "b", "margin": 0.0,
    }  # fmt: skip
    assert pair_record({"chosen": "a", "rejected": "b", "margin": 2})["prompt"] == ""


@pytest.mark.parametrize(
    ("record", "error", "message"),
    [
        ({"prompt": "p", "chosen": "a"}, KeyError, "rejected"),
        ({"chosen": "a", "rejected": "a"}, ValueError, "nothing is preferred"),
        ({"chosen": ["a"], "rejected": "a"}, ValueError, "'chosen' is .* expected text"),
        ({"chosen": "b", "rejected": "a", "margin": "1"}, ValueError, "'margin' is '1'"),
        ({"chosen": "b", "rejected": "a", "margin": math.inf}, ValueError, "'margin' is inf"),
        ({"chosen": "b", "rejected": "a", "margin": True}, ValueError, "'margin' is True"),
        ({"chosen": "b", "rejected": "a", "margin": 10**400}, ValueError, "'margin' is 10000"),
        ({"prompt": 0, "chosen": "b", "rejected": "a"}, ValueError, "'prompt' is '0'"),
    ],
)
def test_what_is_wrong_with_a_record_is_said(record, error, message):
    with pytest.raises(error, match=message):
        pair_record(record)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)
LINES = st.fixed_dictionaries({}, optional=dict.fromkeys(("prompt", "chosen", "rejected", "margin", "other"), VALUES))


@given(st.one_of(LINES, VALUES, st.text()))
def test_any_line_of_preferences_is_a_pair_or_an_error_that_says_where(tmp_path_factory, line):
    file = tmp_path_factory.getbasetemp() / "pairs.jsonl"
    file.write_bytes((line if isinstance(line, str) else json.dumps(line)).encode(errors="surrogatepass"))
    records, message = [], ""
    try:
        records = json_records(file, pair_record)
    except ValueError as error:
        message = str(error)
    assert records or re.match(rf"{file}(, line \d+[ :]| holds no records)", message)
    for record in records:
        types = {name: type(value) for name, value in record.items()}
        assert types == {"prompt": str, "chosen": str, "rejected": str, "margin": float}
        assert record["chosen"] != record["rejected"]
        assert math.isfinite(record["margin"])


def test_pairs_are_tokenized_and_long_ones_dropped_and_counted():
    tokenizer, said = ByteTokenizer("abc>"), []
    records = [pair_record({"prompt": "a", "chosen": x, "rejected": "b", "margin": 1}) for x in ("c", "cccccc")]
    encode = functools.partial(encode_pairs, records, tokenizer, template=lambda p: f"{p}>", end_id=1, say=said.append)
    assert encode(max_tokens=8) == [Pair(chosen=[2, 5, 4, 1], rejected=[2, 5, 3, 1], margin=1.0)]
    assert said == ["dropped 1 of 2 pairs: longer than 8 tokens"]
    with pytest.raises(ValueError, match="None is left"):
        encode(max_tokens=3)
    batch = PairExperience(source=lambda i: encode(max_tokens=9)[i % 2], batch=2)(
        type("State", (), {"cursor": 1}), None, None
    ).batch  # fmt: skip
    assert batch.tokens.shape == (4, 16)
    assert batch.tokens[:, :4].tolist() == [[2, 5, 4, 4], [2, 5, 3, 1], [2, 5, 4, 1], [2, 5, 3, 1]]
    assert batch.mask.sum(axis=1).tolist() == [9, 4, 4, 4]
    assert batch.margins.tolist() == [1, 1]


def test_reliability_by_hand():
    sure = math.log(19)  # a confidence of 0.95
    bins = reliability(np.array([sure, sure, sure, -sure, 0.0]), 5)
    assert [b.count for b in bins] == [1, 0, 0, 0, 4]
    assert (bins[0].low, bins[4].high) == (0.5, 1.0)
    assert (bins[0].confidence, bins[0].accuracy) == (0.5, 0.5)
    assert bins[4].confidence == pytest.approx(0.95)
    assert bins[4].accuracy == 0.75
    assert calibration_error(bins) == pytest.approx(4 / 5 * 0.2)
    assert math.isnan(bins[1].accuracy)


def test_a_calibrated_model_has_no_calibration_error_and_an_overconfident_one_has():
    rng = np.random.default_rng(0)
    ahead = rng.normal(0, 1.5, 20_000)
    right = rng.random(len(ahead)) < 1 / (1 + np.exp(-np.abs(ahead)))
    signed = np.where(right, np.abs(ahead), -np.abs(ahead))
    assert calibration_error(reliability(signed, 10)) < 0.02
    assert calibration_error(reliability(3 * signed, 10)) > 0.1


def test_the_evaluator_measures_every_pair_once(judge, scorer):
    pairs = [Pair(chosen=TOKENS[i, :n].tolist(), rejected=TOKENS[i + 1, :m].tolist()) for i, (n, m) in
             enumerate(itertools.pairwise(LENGTHS))]  # fmt: skip
    ahead = PairEvaluator(scorer, pairs, batch=4).ahead(judge[1])
    one_by_one = [np.subtract(*scorer(judge[1], [pair.chosen, pair.rejected])) for pair in pairs]
    np.testing.assert_allclose(ahead, one_by_one, atol=1e-5)
    metrics = PairEvaluator(scorer, pairs, batch=4).full(judge[1])
    assert metrics["eval/accuracy"] == (ahead > 0).mean()
    assert metrics["eval/loss"] == pytest.approx(np.log1p(np.exp(-ahead)).mean())

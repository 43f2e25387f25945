"""Completions that pass through slots, caches in blocks, prompts in chunks: other ways to the same completions."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import prefill, sampling, sharding
from grpo_jax.data.stops import stop_table
from grpo_jax.logprobs import completion_logprobs
from grpo_jax.models import decoding, slot_attention
from grpo_jax.models.transformer import TransformerConfig, abstract_params, init_params, make_policy
from grpo_jax.slots import arrange
from grpo_jax.types import SamplingParams
from tests import oracle
from tests.test_sampling import (
    IDS,
    KEY,
    NEVER,
    PROMPTS,
    STATIC,
    G,
    T,
    V,
    assert_same_up_to_near_ties,
    flat_params,
    generate,
    options_of,
    quantiles,
    rollout,
)
from tests.test_slot_attention import interpreted

__all__ = ["flat_params", "interpreted", "quantiles", "rollout"]  # fixtures

P = len(PROMPTS)


def mesh_of(*sizes):
    return sharding.make_mesh(sharding.MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))))


@pytest.mark.parametrize(
    ("slots", "devices", "expected"),
    [
        (0, 1, (64, 8)),
        (512, 1, (64, 8)),
        (600, 1, (64, 8)),
        (64, 1, (32, 2)),
        (64, 8, (32, 2)),
        (16, 8, (8, 2)),
        (8, 8, (8, 1)),
        (1, 8, (8, 1)),  # every device has one at least
        (256, 1, (64, 4)),  # no more rows than prompts
        (1, 1, (1, 1)),
    ],
)
def test_arrangements(slots, devices, expected):
    assert arrange(64, 8, slots, devices) == expected


def test_what_cannot_be_arranged():
    with pytest.raises(ValueError, match="9 prompts do not divide over 4 devices"):
        arrange(9, 8, 0, 4)
    with pytest.raises(ValueError, match="slots=-1 must be 1 or more, or 0 for one for every completion"):
        arrange(8, 8, -1)


@pytest.mark.parametrize("slots", [1, 3, 8, 17])
def test_slots_do_not_matter(policy, params, rollout, quantiles, slots):
    got = generate(policy, params, slots=slots)
    assert_same_up_to_near_ties(rollout, got, quantiles)
    np.testing.assert_array_equal(rollout.finished, got.finished)
    np.testing.assert_allclose(rollout.sampler_logprobs, got.sampler_logprobs, atol=1e-4)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 4, 1), (1, 1, 2)])
@pytest.mark.parametrize("slots", [0, 8])
def test_neither_do_slots_on_a_mesh(policy, params, rollout, quantiles, sizes, slots):
    """Every device has a queue of its own."""
    mesh = mesh_of(*sizes)
    prompts, ids = jax.device_put((oracle.pad(PROMPTS, 5, "left"), IDS), sharding.batch_sharding(mesh))
    placed = jax.device_put(params, sharding.shardings(params, policy.param_axes, mesh))
    got = jax.device_get(generate(policy, placed, prompts, ids, slots=slots, mesh=mesh))
    assert_same_up_to_near_ties(rollout, got, quantiles)
    np.testing.assert_array_equal(rollout.finished, got.finished)
    greedy = {"sampling": SamplingParams(temperature=0.0)}
    got = jax.device_get(generate(policy, placed, prompts, ids, slots=slots, mesh=mesh, **greedy))
    np.testing.assert_array_equal(got.completion_tokens, generate(policy, params, **greedy).completion_tokens)


@pytest.mark.parametrize("slots", [0, 2, 9])
def test_limits(policy, flat_params, slots):
    """A completion is the one without a limit, cut; a limit of 0 costs nothing and samples nothing."""
    limits = np.random.default_rng(0).integers(0, T + 3, (P, G))
    limits[2], limits[4, :2] = 0, 1
    free = generate(policy, flat_params, eos=[5])
    got = generate(policy, flat_params, eos=[5], limits=limits, slots=slots)
    mask = np.asarray(free.mask) & (np.arange(T) < limits.reshape(-1, 1))
    np.testing.assert_array_equal(got.mask, mask)
    np.testing.assert_array_equal(got.completion_tokens, np.where(mask, free.completion_tokens, 0))
    np.testing.assert_array_equal(got.finished, free.finished & (free.mask.sum(1) <= limits.reshape(-1)))


def test_stop_strings_in_slots(policy, flat_params):
    letters = [None, None, *(bytes([97 + i % 3]) * (1 + i % 2) for i in range(V - 4))]
    options = {"eos": NEVER, "stop_table": stop_table(letters, ["ab", "cca"])}
    expected, got = (generate(policy, flat_params, slots=slots, **options) for slots in (0, 5))
    assert 8 < expected.finished.sum() < P * G
    jax.tree.map(np.testing.assert_array_equal, expected.mask, got.mask)
    np.testing.assert_array_equal(expected.completion_tokens, got.completion_tokens)


def test_the_layout_of_a_tpus_caches_does_not_matter(config, params, rollout, quantiles, monkeypatch):
    monkeypatch.setattr(decoding, "cache_axes", lambda _, heads: slot_attention.cache_axes("tpu", heads))
    policy = make_policy(config)
    assert jax.tree.map(jnp.shape, policy.init_cache(3, 2, 7))[0] == dict.fromkeys(("key", "turned"), (6, 2, 4, 7))
    for slots in (0, 5):
        assert_same_up_to_near_ties(rollout, generate(policy, params, slots=slots), quantiles)


def test_what_a_gpu_reads_of_caches_does_not_matter(config, params, rollout, quantiles, monkeypatch):
    monkeypatch.setattr(slot_attention, "_has_triton", lambda device: True)
    monkeypatch.setattr(slot_attention, "_SMALLEST_WIDTH", 1)
    policy = make_policy(config)
    assert policy.reads_visible
    assert sampling.blocks(policy, 512) == [512]
    for slots in (0, 5):
        assert_same_up_to_near_ties(rollout, generate(policy, params, slots=slots), quantiles)


# Long completions: windows, columns that go round, chunks of prompts ---------------------------------

LONG = 40
LONG_PROMPTS = [(prompt * 12)[: 2 + 3 * i] for i, prompt in enumerate(PROMPTS)]  # of up to 23 tokens


@pytest.fixture
def narrow(monkeypatch):
    """Caches in blocks of 4 columns and more, prompts' too, keys in tiles of at most 3, and prompts in chunks of 2."""
    monkeypatch.setattr(prefill, "_BLOCK", 4)
    monkeypatch.setattr(slot_attention, "_TILE", 3)
    monkeypatch.setattr(prefill, "_SMALLEST_CHUNK", 2)
    monkeypatch.setattr(prefill, "_PREFILL_TOKENS", 1)


OTHER_DEVICES = {
    "a TPU's caches": types.SimpleNamespace(platform="tpu"),
    "a GPU's kernel": types.SimpleNamespace(platform="gpu", compute_capability="8.0"),
    "an old GPU": types.SimpleNamespace(platform="gpu", compute_capability="7.5"),
}


@functools.lru_cache
def long_model(kind):
    changes = {
        "windows": {"windows": (0, 7)},
        "one head of keys": {"kv_heads": 1},
        "soft cap": {"attention_cap": 0.5},
        "int8": {"sampler_dtype": "int8"},
        "a GPU's kernel": {"head_width": 16},
    }.get(kind, {})
    sizes = {"layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "head_width": 4, "mlp_width": 24, **changes}
    config = TransformerConfig(vocab_size=V, **sizes)
    policy, params = make_policy(config), jax.tree.map(lambda x: 2 * x, init_params(config, jax.random.key(1)))
    if kind in OTHER_DEVICES:
        decoder = decoding.Decoder(config, *abstract_params(config), None, OTHER_DEVICES[kind])
        theirs = ("init_cache", "extend", "prefill", "cache_axes", "reads_visible", "prompts_in_blocks")
        policy = dataclasses.replace(policy, **{name: getattr(decoder, name) for name in theirs})
        layer = jax.eval_shape(lambda: policy.init_cache(3, 2, 7))[0]
        assert (set(layer), policy.reads_visible) == ({"key", "turned" if "TPU" in kind else "value"}, "kernel" in kind)
        assert not policy.prompts_in_blocks
    return policy, params


def long_rollout(kind, slots, **sampling_params):
    """And where its completions are cut."""
    policy, params = long_model(kind)
    limits = np.minimum(np.random.default_rng(3).geometric(4 / LONG, (P, G)), LONG)
    options = options_of(NEVER, max_tokens=LONG, limits=limits, slots=slots, sampling=SamplingParams(**sampling_params))
    # A function of its own: what is patched is read when it is traced.
    sample = jax.jit(functools.partial(sampling.generate, policy), static_argnames=STATIC)
    with pytest.MonkeyPatch.context() as patch:
        if "kernel" in kind:  # whose tiles are of 16 columns at least
            patch.setattr(slot_attention, "_TILE", 16)
        return sample(params, *oracle.pad(LONG_PROMPTS, 24), IDS, KEY, **options), limits.reshape(-1, 1)


KINDS = ["plain", "windows", "one head of keys", "soft cap", *OTHER_DEVICES]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [0, 6])
def test_through_windows_slots_and_chunks_of_prompts_the_trainer_agrees(kind, slots, narrow):
    got, limits = long_rollout(kind, slots)
    np.testing.assert_array_equal(got.mask, np.arange(LONG) < limits)
    prompts = (np.repeat(x, G, axis=0) for x in oracle.pad(LONG_PROMPTS, 24))
    expected, _, _ = completion_logprobs(*long_model(kind), *prompts, got.completion_tokens, got.mask)
    np.testing.assert_allclose(got.logprobs, expected, atol=1e-4)


@pytest.mark.parametrize(("length", "reads"), [(9, False), (30, True)], ids=["short", "long"])
def test_of_the_cache_of_refilled_slots_a_token_reads_the_blocks_that_a_slot_sees(length, reads, narrow):
    """Columns go round: in the second round those of the first are behind, and seen by what is longer than a block."""
    policy, params = long_model("plain")
    arguments = policy, params, *oracle.pad(PROMPTS, 5), IDS, KEY
    options = options_of(NEVER, max_tokens=LONG, limits=np.full((P, G), length), slots=3)
    prefilled, state = jax.jit(sampling.start, static_argnums=0, static_argnames=STATIC)(*arguments, **options)
    decode = jax.jit(functools.partial(sampling.decode, policy))
    sizes = [jax.tree.leaves(block)[-1].shape[-2] for block in state.cache]
    assert sizes == sampling.blocks(policy, LONG) == [12, 12, 16]
    state = decode(prefilled, state, LONG + 11)  # as far as the last column of the first block
    assert (int(state.step), bool(state.done())) == (LONG + 11, False)
    assert int(state.oldest) == np.where(state.slots.alive, state.slots.length, 0).max()
    spoiled = [state.cache[0], *jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), state.cache[1:])]
    after = decode(prefilled, dataclasses.replace(state, cache=spoiled), 1)
    assert bool(np.isnan(after.written.logprobs).any()) == reads


@pytest.mark.parametrize(("tokens", "reads"), [(12, [False, False]), (13, [True, False]), (30, [True, True])])
@pytest.mark.parametrize("slots", [0, 3])
def test_of_the_caches_of_prompts_a_token_reads_the_blocks_that_a_prompt_reaches(slots, tokens, reads, narrow):
    """And what none reaches is not computed either."""
    policy, params = long_model("plain")
    prompts = oracle.pad([*PROMPTS[1:], (PROMPTS[0] * tokens)[:tokens]], LONG)
    options = options_of(NEVER, slots=slots)
    start = jax.jit(sampling.start, static_argnums=0, static_argnames=STATIC)
    prefilled, state = start(policy, params, *prompts, IDS, KEY, **options)
    assert [len(columns) for columns in prefilled.columns] == prefill.cut(LONG) == [12, 12, 16]
    assert [bool(block[0]["value"].any()) for block in prefilled.prompts] == [True, *reads]
    decode = jax.jit(functools.partial(sampling.decode, policy))
    for block, read in enumerate(reads, start=1):
        spoiled = lambda caches, block=block: [
            jax.tree.map(lambda x, i=i: jnp.full_like(x, jnp.nan) if i == block else x, cache)
            for i, cache in enumerate(caches)
        ]
        wrong = dataclasses.replace(prefilled, prompts=spoiled(prefilled.prompts))
        before = state if state.prefix is None else dataclasses.replace(state, prefix=spoiled(state.prefix))
        assert bool(np.isnan(decode(wrong, before, 1).written.logprobs).any()) == read


@pytest.mark.parametrize(
    ("columns", "blocks"),
    [(1, [1]), (68, [68]), (96, [64, 32]), (130, [64, 66]), (288, [128, 160]), (2048, [512, 512, 1024])],
)
def test_the_last_block_is_not_much_smaller_than_others(columns, blocks):
    assert prefill.cut(columns) == blocks
    for columns in range(1, 3000):
        *others, last = prefill.cut(columns)
        assert sum(others) + last == columns
        assert not others or last >= min(others) / 2


@pytest.mark.parametrize("kind", [*KINDS[1:], "int8"])
@pytest.mark.parametrize("slots", [0, 6])
def test_greedy_tokens_are_those_of_the_plain_way(kind, slots, request):
    expected, _ = long_rollout(kind, 0, temperature=0.0)
    request.getfixturevalue("narrow")
    got, _ = long_rollout(kind, slots, temperature=0.0)
    np.testing.assert_array_equal(got.completion_tokens, expected.completion_tokens)
    assert len(np.unique(got.completion_tokens)) > 3


def steps_of(policy, params, limits, slots, tokens):
    """How many tokens of all slots it takes until every completion is at its limit [P, G]."""
    prompts, group = limits.shape
    arguments = policy, params, np.ones((prompts, 2), np.int32), np.ones((prompts, 2), bool), np.arange(prompts), KEY
    options = options_of(NEVER, group_size=group, max_tokens=tokens, limits=limits, slots=slots)
    prefilled, state = jax.jit(sampling.start, static_argnums=0, static_argnames=STATIC)(*arguments, **options)
    state = jax.jit(sampling.decode, static_argnums=0)(policy, prefilled, state, prompts * group * tokens)
    np.testing.assert_array_equal(state.results.lengths, limits)
    return int(state.step)


def test_the_cost_follows_the_tokens(policy, params):
    """Steps of all slots, beside the tokens there are: slots x longest would be more than twice as many."""
    rng, prompts, group, slots, tokens = np.random.default_rng(0), 32, 8, 16, 64
    limits = np.minimum(rng.geometric(4 / tokens, (prompts, group)), tokens)
    taken = steps_of(policy, params, limits, slots, tokens) * slots
    assert limits.sum() - limits.size <= taken < 1.35 * limits.sum()
    assert prompts * group * tokens > 2.5 * taken


def test_rows_that_are_done_help_one_that_is_late(policy, params):
    """One slot a row and eight rows: the last prompt's four completions are as long as all others together."""
    assert arrange(P, G, P) == (P, 1)
    limits = np.full((P, G), 2)
    limits[-1] = 30
    assert steps_of(policy, params, limits, P, 30) == 4 + 2 + 29  # one more row a step; in its own alone: 4 * 29


def test_two_rows_take_the_last_members_of_one_prompt_at_once(policy, params):
    """After a step both rows are free, and of the second prompt three members wait: each is dealt to one of them."""
    assert arrange(2, 4, 2) == (2, 1)
    limits = np.array([[2, 1, 1, 1], [2, 2, 2, 2]])
    assert steps_of(policy, params, limits, 2, 2) == 3

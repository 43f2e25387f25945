import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import sampling, sharding
from grpo_jax.data.stops import stop_table
from grpo_jax.logprobs import completion_logprobs, unembed
from grpo_jax.models.transformer import TransformerConfig, init_params, make_policy
from grpo_jax.packing import pack, take_columns
from grpo_jax.types import SamplingParams
from tests import oracle

G, T, V = 4, 6, 20
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10], [11, 12], [13], [14, 3, 4], [5, 5, 5, 5], [15, 16]]
IDS = np.array([100, 7, 8, 2**31 - 1, 0, 9, 10, 11], np.int32)
NEVER = [-1]
KEY = jax.random.key(42)

SAMPLES = 8192

STATIC = ("group_size", "max_tokens", "slots", "mesh")
generate_jit = jax.jit(sampling.generate, static_argnums=0, static_argnames=STATIC)
start_jit = jax.jit(sampling.start, static_argnums=0, static_argnames=STATIC)
decode_jit = jax.jit(sampling.decode, static_argnums=0)
completion_logprobs_jit = jax.jit(completion_logprobs, static_argnums=0)


def options_of(eos=(1, 2), **options):
    """Sets of EOS ids have one shape here, so that little is compiled."""
    sizes = {"group_size": G, "max_tokens": T, "pad_id": 0, "sampling": SamplingParams()}
    return {**sizes, "eos_ids": np.resize(np.array(eos), 20), **options}


def generate(policy, params, prompts=None, ids=IDS, **options):
    tokens, mask = oracle.pad(PROMPTS, 5, "left") if prompts is None else prompts
    return generate_jit(policy, params, tokens, mask, ids, KEY, **options_of(**options))


@pytest.fixture(scope="module")
def rollout(policy, params):
    return generate(policy, params)


@pytest.fixture(scope="module")
def flat_params(params):
    """Logits are exactly 0 for every token: what is sampled is the random numbers and nothing else."""
    return {**params, "embedding": jnp.zeros_like(params["embedding"])}


# What a completion should be, without a cache and with keys folded by hand -------------------------


@functools.partial(jax.jit, static_argnums=0)
def logits_of(policy, params, rollout):
    """[B, T, V]: logits before each token, from one uncached pass."""
    group = rollout.mask.shape[0] // rollout.prompt_mask.shape[0]
    repeat = lambda x: jnp.repeat(x, group, axis=0)
    rows = pack(repeat(rollout.prompt_tokens), repeat(rollout.prompt_mask), rollout.completion_tokens, rollout.mask)
    hidden, _ = policy.hidden(params, rows.tokens, rows.positions, rows.segments)
    return unembed(take_columns(hidden, rows.predictors), policy.head(params))


@functools.partial(jax.jit, static_argnums=(1, 2))
def uniforms_of(prompt_ids, group, tokens):
    """[B, T]: the number that says which token of a block; so small a vocabulary is one block."""
    fold = jax.random.fold_in
    one = lambda p, g, t: jax.random.uniform(fold(fold(fold(KEY, p), g), t), (2,))[1]
    over = jax.vmap(jax.vmap(jax.vmap(one, (None, None, 0)), (None, 0, None)), (0, None, None))
    return over(prompt_ids, jnp.arange(group), jnp.arange(tokens)).reshape(-1, tokens)


@pytest.fixture(scope="module")
def quantiles(policy, params, rollout):
    """[B, T, V + 1] float64: what is before each token in the distribution, less the number that chose."""
    logits = np.asarray(logits_of(policy, params, rollout), np.float64)
    probabilities = np.exp(logits - logits.max(axis=-1, keepdims=True))
    sums = np.cumsum(np.pad(probabilities, ((0, 0), (0, 0), (1, 0))), axis=-1)
    return sums / sums[..., -1:] - np.asarray(uniforms_of(IDS, G, T), np.float64)[..., None]


def assert_same_up_to_near_ties(rollout, other, quantiles):
    """Both are the same completions, each up to a first token that was drawn on the edge between two."""
    for b, (ours, theirs) in enumerate(zip(rollout.completion_tokens, other.completion_tokens, strict=True)):
        differ = np.asarray((ours != theirs) & (rollout.mask[b] | other.mask[b]))
        if differ.any():
            t = int(differ.argmax())
            gap = np.abs(quantiles[b, t]).min()
            assert gap < 1e-5, f"completion {b} diverges at {t} with a gap of {gap}"
        else:
            np.testing.assert_array_equal(rollout.mask[b], other.mask[b])
            np.testing.assert_allclose(rollout.logprobs[b], other.logprobs[b], atol=1e-4)


def select(rollout, prompts, completions):
    """Some of the prompts and completions of a rollout, in the order given."""
    of_prompts = ("prompt_tokens", "prompt_mask")
    fields = {f.name: getattr(rollout, f.name) for f in dataclasses.fields(rollout)}
    return type(rollout)(**{name: x[prompts if name in of_prompts else completions] for name, x in fields.items()})


def test_every_token_is_where_the_distribution_function_passes_a_number(rollout, quantiles):
    at = lambda index: np.take_along_axis(quantiles, np.asarray(index)[..., None], axis=-1)[..., 0]
    below, above = at(rollout.completion_tokens), at(rollout.completion_tokens + 1)
    assert rollout.mask.sum() > 60
    assert ((below < 1e-5) & (above > -1e-5))[rollout.mask].all()
    assert len({tuple(row) for row in rollout.completion_tokens.tolist()}) > 20


def test_stop_strings_end_where_they_are_completed(policy, flat_params):
    """A completion of random tokens is the one without stop strings, cut behind the token that completes one."""
    letters = [None, None, *(bytes([97 + i % 3]) * (1 + i % 2) for i in range(V - 4))]  # two ids the table lacks
    free = generate(policy, flat_params, eos=NEVER)
    stopped = generate(policy, flat_params, eos=NEVER, stop_table=stop_table(letters, ["ab", "cca"]))
    cut = 0
    for i, row in enumerate(np.asarray(free.completion_tokens)):
        text, end = b"", T
        for t, token in enumerate(row):
            written = letters[token] if token < len(letters) else None
            text = b"" if written is None else text + written
            if b"ab" in text or b"cca" in text:
                end, cut = t + 1, cut + 1
                break
        np.testing.assert_array_equal(stopped.mask[i], np.arange(T) < end)
        np.testing.assert_array_equal(stopped.completion_tokens[i, :end], row[:end])
        assert stopped.finished[i] == (end < T or b"ab" in text or b"cca" in text)
    assert 8 < cut < len(free.mask)


def test_greedy_is_the_argmax_roll_out(policy, params):
    got = generate(policy, params, sampling=SamplingParams(temperature=0.0), eos=[1])
    hidden_of = jax.jit(policy.hidden)
    for p, prompt in enumerate(PROMPTS):
        line = list(prompt)
        while len(line) < len(prompt) + T and (len(line) == len(prompt) or line[-1] != 1):
            tokens, real = oracle.pad([line], 10)
            hidden, _ = hidden_of(params, tokens, np.arange(10)[None], real.astype(np.int32))
            line.append(int(unembed(hidden[0, len(line) - 1], policy.head(params)).argmax()))
        expected, mask = oracle.pad([line[len(prompt) :]], T)
        for b in range(p * G, (p + 1) * G):
            np.testing.assert_array_equal(got.completion_tokens[b], expected[0])
            np.testing.assert_array_equal(got.mask[b], mask[0])
    assert (got.sampler_logprobs == 0).all()


# The end of a completion ----------------------------------------------------------------------------


@pytest.mark.parametrize("pad_id", [0, 1, 19])
@pytest.mark.parametrize("eos", [[1, 2], [19], range(12, 20)])
def test_the_mask_runs_through_the_first_eos(policy, params, eos, pad_id):
    """Also where padding is an EOS id, or a token that is sampled."""
    got = jax.device_get(generate(policy, params, eos=eos, pad_id=pad_id))
    lengths = []
    for tokens, mask, finished in zip(got.completion_tokens, got.mask, got.finished, strict=True):
        ends = [t for t, token in enumerate(tokens) if token in eos and mask[t]]
        lengths.append(ends[0] + 1 if ends else T)
        np.testing.assert_array_equal(mask, np.arange(T) < lengths[-1])
        assert finished == bool(ends)
        assert (tokens[lengths[-1] :] == pad_id).all()
    assert len(set(lengths)) > 2
    assert (1 in lengths) or eos == [19]  # an EOS as the first token
    assert (got.logprobs < 0)[got.mask].all()
    for values in (got.logprobs, got.sampler_logprobs):
        assert (values == 0)[~got.mask].all()


def test_padding_that_is_eos_changes_no_token(policy, params, rollout):
    """The completions of another pad_id are the same inside the mask."""
    other = generate(policy, params, pad_id=1)
    np.testing.assert_array_equal(rollout.mask, other.mask)
    np.testing.assert_array_equal(rollout.finished, other.finished)
    assert (rollout.completion_tokens == other.completion_tokens)[rollout.mask].all()
    assert (other.completion_tokens == 1)[~rollout.mask].all()


@pytest.mark.parametrize("eos", [range(20), range(1, 19)])
def test_decoding_stops_when_all_have_ended(policy, params, eos):
    arguments = policy, params, *oracle.pad(PROMPTS, 5), IDS, KEY
    state = decode_jit(policy, *start_jit(*arguments, **options_of(eos, max_tokens=20)), 20)
    assert state.step + 1 == state.slots.length.max() < 20
    assert state.step > 0 or eos == range(20)
    assert state.done()


# Log-probabilities ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "truncation"),
    [(1.0, {}), (0.7, {}), (0.7, {"top_k": 5, "top_p": 0.8}), (1.0, {"top_p": 0.6}), (0.0, {"top_k": 3})],
)
def test_logprobs_are_the_trainers_and_the_truncated(policy, params, temperature, truncation):
    got = generate(policy, params, sampling=SamplingParams(temperature=temperature, **truncation))
    prompts = np.repeat(got.prompt_tokens, G, axis=0), np.repeat(got.prompt_mask, G, axis=0)
    trainer, _, _ = completion_logprobs_jit(policy, params, *prompts, got.completion_tokens, got.mask, temperature)
    np.testing.assert_allclose(got.logprobs[got.mask], trainer[got.mask], atol=1e-4)

    logits = np.asarray(logits_of(policy, params, got), np.float64) / (temperature or 1)
    got = jax.device_get(got)
    for b, t in zip(*np.nonzero(got.mask), strict=True):
        kept = oracle.truncate(logits[b, t], **truncation)
        token = got.completion_tokens[b, t]
        assert kept[token]
        expected = np.log(oracle.softmax(np.where(kept, logits[b, t], -np.inf))[token]) if temperature else 0
        np.testing.assert_allclose(got.sampler_logprobs[b, t], expected, atol=1e-4)


# Randomness: (key, prompt id, member, token index) and nothing else ---------------------------------


@pytest.mark.parametrize(
    ("prompts", "members", "width", "side"),
    [
        ([3], G, 5, "left"),
        ([5, 2, 7, 0, 1, 6, 3, 4], G, 5, "left"),
        (range(8), G, 5, "right"),
        ([6, 1, 2], 2, 9, "both"),
    ],
    ids=["alone", "in another order", "padded on the right", "in a smaller group and batch, padded wide"],
)
def test_the_arrangement_does_not_matter(
    policy, params, flat_params, rollout, quantiles, prompts, members, width, side
):
    prompts = np.array(prompts)
    rows = (prompts[:, None] * G + np.arange(members)).reshape(-1)
    padded = oracle.pad([PROMPTS[p] for p in prompts], width, side)
    sample = functools.partial(generate, policy, prompts=padded, ids=IDS[prompts], group_size=members)
    assert_same_up_to_near_ties(select(rollout, prompts, rows), sample(params), quantiles[rows])
    # Without logits there are no near-ties, and the same random numbers give the same bits.
    expected = generate(policy, flat_params).completion_tokens[rows]
    np.testing.assert_array_equal(sample(flat_params).completion_tokens, expected)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 2), (2, 2, 2)])
def test_the_mesh_does_not_matter(policy, params, flat_params, rollout, quantiles, sizes):
    mesh = sharding.make_mesh(sharding.MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))))
    rows = sharding.batch_sharding(mesh)
    put = lambda params: jax.device_put(params, sharding.shardings(params, policy.param_axes, mesh))
    prompts = jax.device_put(oracle.pad(PROMPTS, 5, "left"), rows)
    sample = functools.partial(generate, policy, prompts=prompts, ids=jax.device_put(IDS, rows))
    got = sample(put(params))
    assert len(got.completion_tokens.sharding.device_set) == np.prod(sizes)
    assert_same_up_to_near_ties(rollout, jax.device_get(got), quantiles)
    expected = generate(policy, flat_params).completion_tokens
    np.testing.assert_array_equal(sample(put(flat_params)).completion_tokens, expected)


def test_other_ids_and_members_have_other_randomness(policy, flat_params):
    here, other = (
        np.asarray(generate(policy, flat_params, ids=ids, eos=NEVER).completion_tokens) for ids in (IDS, IDS ^ 1)
    )
    assert (here != other).any(axis=1).all()
    assert len({tuple(row) for row in here}) == len(here)


def test_a_divergence_that_is_no_near_tie_is_found(rollout, quantiles):
    """The negative control of the helper."""
    worst = rollout.completion_tokens.at[3, 0].set((rollout.completion_tokens[3, 0] + 1) % V)
    with pytest.raises(AssertionError, match="completion 3 diverges at 0"):
        assert_same_up_to_near_ties(rollout, dataclasses.replace(rollout, completion_tokens=worst), quantiles)


# Chunks, and what is traced -------------------------------------------------------------------------


def test_chunks_are_generate_bit_for_bit(policy, params, rollout):
    prompts = oracle.pad(PROMPTS, 5, "left")
    prefilled, state = start_jit(policy, params, *prompts, IDS, KEY, **options_of())
    steps = [int(state.step)]
    while not state.done():
        state = decode_jit(policy, prefilled, state, 2)
        steps.append(int(state.step))
    assert steps == [0, 2, 4, 5]
    jax.tree.map(np.testing.assert_array_equal, sampling.collect(prefilled, state, *prompts), rollout)


def test_sampling_parameters_are_traced(policy, params):
    traces = []

    def counted(*args, **options):
        traces.append(1)
        return sampling.generate(*args, **options)

    jitted = jax.jit(functools.partial(counted, policy), static_argnames=("group_size", "max_tokens"))
    variants = [
        {},
        {"sampling": SamplingParams(temperature=2.0)},
        {"sampling": SamplingParams(top_k=2)},
        {"sampling": SamplingParams(top_p=0.3)},
        {"sampling": SamplingParams(temperature=0.0)},
        {"eos": [3, 9]},
        {"pad_id": 17},
    ]
    arguments = params, *oracle.pad(PROMPTS, 5), IDS, KEY
    tokens = [jitted(*arguments, **options_of(**variant)).completion_tokens for variant in variants]
    assert len(traces) == 1
    assert len({tuple(np.ravel(x)) for x in tokens}) == len(variants)


# Distribution: a chi-squared test at a level fixed beforehand ------------------------------------


@pytest.mark.parametrize(("slots", "tensor"), [(0, 1), (64, 1), (64, 2)])
def test_members_of_a_group_are_drawn_from_the_softmax(policy, params, slots, tensor):
    """Through prefill, keys and cache: the first token, and the second after the most frequent first one."""
    prompts, mesh = oracle.pad(PROMPTS[:1], 3), sharding.make_mesh(sharding.MeshConfig(tensor=tensor))
    sizes = {"group_size": SAMPLES, "max_tokens": 2, "slots": slots, "mesh": mesh if tensor > 1 else None}
    placed = jax.device_put(params, sharding.shardings(params, policy.param_axes, mesh))
    got = generate(policy, placed, prompts, IDS[:1], eos=NEVER, **sizes)
    first, second = np.asarray(got.completion_tokens).T
    follow = first == np.bincount(first).argmax()
    one = select(jax.device_get(got), np.arange(1), np.flatnonzero(follow)[:1])
    before_first, before_second = np.asarray(logits_of(policy, params, one), np.float64)[0]
    for tokens, logits in [(first, before_first), (second[follow], before_second)]:
        assert not oracle.rejected(tokens, oracle.softmax(logits))
        assert oracle.rejected(tokens, oracle.softmax(logits / 1.3))


# What is compiled -----------------------------------------------------------------------------------


def test_the_prompt_cache_is_not_copied_per_slot():
    """Four more slots take less memory than the keys of one layer for one of them would."""
    config = TransformerConfig(vocab_size=V, layers=2, width=16, heads=2, kv_heads=2, head_width=64, mlp_width=16)
    columns, policy = 512, make_policy(config)
    keys_of_a_layer = columns * config.kv_heads * config.head_width * 4

    def extend_a_copy(params, tokens, positions, cache, column, seen, before=()):
        """The slots of a row as rows of their own, each with its copy of the prompt's cache."""
        rows, slots = tokens.shape[:2]
        apart = lambda x: x.reshape(rows * slots, 1, *x.shape[2:])
        copy = lambda x: jnp.repeat(x, slots, axis=0)
        tokens, positions, seen = map(apart, (tokens, positions, seen))
        before = [(*jax.tree.map(copy, block), live) for *block, live in before]
        hidden, cache = policy.extend(params, tokens, positions, cache, column, seen, before)
        return hidden.reshape(rows, slots, *hidden.shape[2:]), cache

    def temporaries(policy, slots):
        tokens = np.ones((1, columns), np.int32)
        start = functools.partial(sampling.start, policy, **options_of(group_size=slots, max_tokens=2))
        params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
        held = jax.eval_shape(start, params, tokens, tokens > 0, np.arange(1), KEY)
        return decode_jit.lower(policy, *held, 1).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(policy, 8) - temporaries(policy, 4) < keys_of_a_layer
    naive = dataclasses.replace(policy, extend=extend_a_copy)
    assert temporaries(naive, 8) - temporaries(naive, 4) > 4 * keys_of_a_layer  # the negative control

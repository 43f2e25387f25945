"""What is compiled for slots: nothing is copied, gathered or asked of the host for a token, and nothing twice."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import prefill, sampling, sharding
from grpo_jax.models.transformer import TransformerConfig, init_params, make_policy
from tests.compilations import asks_the_host
from tests.test_sampling import IDS, KEY, PROMPTS, STATIC, V, options_of
from tests.test_slots import mesh_of
from tests.test_training import collectives, computations, reached

P = len(PROMPTS)
CONFIG = TransformerConfig(vocab_size=V, layers=2, width=16, heads=4, kv_heads=2, head_width=64, mlp_width=32)
WIDE = TransformerConfig(vocab_size=V, layers=2, width=256, heads=4, kv_heads=2, head_width=16, mlp_width=1024)
ONE_HEAD = dataclasses.replace(WIDE, kv_heads=1)
COLUMNS = 256


def programs(group, slots, mesh=None, prompts=16, columns=64, config=CONFIG):
    """The compiled start, and the compiled decode, of parameters that lie over fsdp, if there is a mesh."""
    policy = make_policy(config)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    place = lambda x: None
    if mesh is not None:
        where = sharding.shardings(shapes, policy.param_axes, mesh)
        shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)
        place = lambda x: sharding.batch_sharding(mesh)
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((prompts, *shape), dtype, sharding=place(shape))
    start = jax.jit(functools.partial(sampling.start, policy, mesh=mesh), static_argnames=STATIC)
    lowered = start.lower(
        shapes, array(jnp.int32, columns), array(bool, columns), array(jnp.uint32), KEY,
        **options_of(group_size=group, max_tokens=COLUMNS, slots=slots),
    )  # fmt: skip
    compiled = lowered.compile()
    held = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place, weak_type=x.weak_type),
        lowered.out_info, compiled.output_shardings,
    )  # fmt: skip
    decode = jax.jit(functools.partial(sampling.decode, policy, mesh=mesh), donate_argnums=1)
    return compiled, held, decode.lower(*held, np.int32(8)).compile()


def in_the_loop(text):
    found = computations(text)
    return [line for name in reached(found, re.findall(r"body=%?([\w.\-]+)", text)) for line in found[name]]


def copied(text):
    """The largest array that is copied for every token, in elements."""
    copies = [line for line in in_the_loop(text) if re.search(r" (copy|transpose)\(", line)]
    shapes = [re.match(r"\s*(?:ROOT )?%?[\w.\-]+ = \w+\[([\d,]*)\]", line) for line in copies]
    return max((math.prod(map(int, filter(None, m[1].split(",")))) for m in shapes if m), default=0)


@pytest.mark.parametrize(
    ("config", "prompts", "group", "columns", "slots"),
    [
        (CONFIG, 16, 8, 64, 0),
        (CONFIG, 16, 8, 64, 16),
        # Weights larger than caches, prompts longer than completions; an axis of one slot, or of one head.
        (WIDE, 4, 4, 400, 0),
        (WIDE, 4, 4, 400, 4),
        (ONE_HEAD, 4, 4, 400, 0),
        (ONE_HEAD, 4, 4, 400, 8),
    ],
)
def test_neither_caches_nor_weights_are_copied_for_a_token(config, prompts, group, columns, slots):
    _, (prefilled, state), decode = programs(group, slots, prompts=prompts, columns=columns, config=config)
    caches = [x.size for x in jax.tree.leaves((state.cache, prefilled.prompts))]
    matrix = config.width * config.mlp_width
    assert " while(" in decode.as_text()
    assert not asks_the_host(decode.as_text())
    assert copied(decode.as_text()) < min(caches)
    # Activations, and not all keys or values of the largest block of a layer, or of a matrix, beside them.
    assert decode.memory_analysis().temp_size_in_bytes < 4 * max(*caches, matrix)


def test_a_loop_that_asks_the_host_is_found():
    asked = lambda x: jax.lax.fori_loop(0, 3, lambda i, x: jax.pure_callback(np.negative, x, x), x)
    assert asks_the_host(jax.jit(asked).lower(np.float32(1)).compile().as_text())


def test_every_block_of_the_cache_has_a_loop_that_reads_it_and_those_before():
    """Without a condition, which costs a GPU a trip to the host: as many as there are in the choice of a token.

    Prompts are of one block here.
    """
    loops = {}
    for layers in (1, 3):
        config = dataclasses.replace(CONFIG, layers=layers)
        policy = make_policy(config)
        params = jax.eval_shape(lambda config=config: init_params(config, jax.random.key(0)))
        prefilled, state = jax.eval_shape(
            functools.partial(sampling.start, policy, **options_of(max_tokens=COLUMNS)), params,
            np.ones((P, 5), np.int32), np.ones((P, 5), bool), IDS, KEY,
        )  # fmt: skip
        assert [cache[0]["value"].shape[-2] for cache in state.cache] == [64, 64, 128]
        assert [cache[0]["key"].shape[1:] for cache in state.cache] == [(2, 64, 64), (2, 64, 64), (2 * 2, 64, 64)]
        jaxpr = jax.make_jaxpr(functools.partial(sampling.decode, policy))(prefilled, state, np.int32(3))
        bodies = [str(e.params["body_jaxpr"]) for e in jaxpr.eqns if e.primitive.name == "while"]
        loops[layers] = [(body.count("dot_general["), body.count("cond[")) for body in bodies]
    for layers, counted in loops.items():
        products, conditions = zip(*counted, strict=True)
        assert [after - before for before, after in itertools.pairwise(products)] == [2 * layers] * 2
        assert conditions == (loops[1][0][1],) * 3


def test_a_copy_in_a_loop_is_found():
    """The negative control: a cache whose columns are reversed for every token."""

    def careless(cache):
        def body(i, cache):
            row = (cache @ cache[0, 0]).sum(axis=0)
            return jax.lax.dynamic_update_index_in_dim(cache, cache[::-1, ::-1].swapaxes(1, 2)[0] + row.sum(), i, 0)

        return jax.lax.fori_loop(0, 8, body, cache)

    text = jax.jit(careless).lower(jax.ShapeDtypeStruct((8, 64, 64), jnp.float32)).compile().as_text()
    assert copied(text) >= 8 * 64 * 64


def test_the_prompts_cache_and_prefill_do_not_grow_with_the_group():
    (small, (prefilled, _), _), (large, (same, _), _) = programs(4, 0), programs(16, 0)
    assert jax.tree.map(jnp.shape, prefilled.prompts) == jax.tree.map(jnp.shape, same.prompts)
    flops = [program.cost_analysis()["flops"] for program in (small, large)]
    choice = 16 * 16 * V * 40  # of the first tokens
    assert abs(flops[1] - flops[0]) < choice < 0.2 * flops[0]


@pytest.mark.parametrize("slots", [0, 32])
@pytest.mark.parametrize("sizes", [(1, 8, 1), (8, 1, 1)])
def test_nothing_travels_for_a_token(slots, sizes):
    """But a number or two that says whether anybody is alive; parameters over fsdp are gathered once a rollout."""
    start, _, decode = programs(8, slots, mesh_of(*sizes))
    _, inside = collectives(decode.as_text())
    for line in inside:
        (returned,) = re.findall(r"= (.*?) all-", line)
        assert "all-reduce" in line, line
        assert set(re.findall(r"\[([\d,]*)\]", returned)) == {""}, line
    assert sizes[1] == 1 or "all-gather" in start.as_text()


def test_decoding_compiles_once(policy, params):
    """What `start` returns and what `decode` returns are of one type."""
    for slots in (0, 3):
        prefilled, state = jax.eval_shape(
            functools.partial(sampling.start, policy, **options_of(slots=slots)), params,
            np.ones((P, 5), np.int32), np.ones((P, 5), bool), IDS, KEY,
        )  # fmt: skip
        after = jax.eval_shape(functools.partial(sampling.decode, policy), prefilled, state, np.int32(3))
        of = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype, x.weak_type))
        assert of(state) == of(after)


@pytest.mark.parametrize("columns", [60, 300])
@pytest.mark.parametrize("chunk", [64, 2**14])
def test_prompts_come_out_as_the_sampler_computes(columns, chunk, monkeypatch):
    monkeypatch.setattr(prefill, "_PREFILL_TOKENS", chunk)
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    policy, tokens = make_policy(config), np.ones((2, columns), np.int32)
    begun = lambda params: prefill.prefill(policy, params, policy.prepare(params), tokens, jnp.array([3, columns]), 1)
    hidden, caches, _ = jax.eval_shape(begun, jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
    assert {x.dtype for x in jax.tree.leaves((hidden, caches))} == {jnp.dtype("bfloat16")}

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import logprobs as logprobs_lib
from grpo_jax import sharding, training
from grpo_jax.logprobs import completion_logprobs, token_logprobs
from grpo_jax.losses import grpo_loss
from grpo_jax.models.transformer import init_params
from grpo_jax.objectives import LossConfig, grpo, make_objective, supervised
from grpo_jax.training import (
    UpdateConfig,
    init_train_state,
    make_reference_logprobs,
    make_train_step,
    train_batch,
)
from grpo_jax.types import Rollout, TrainBatch
from tests import oracle
from tests.compilations import asks_the_host

B, T = 32, 5
KEY = jax.random.key(9)
LOSS = LossConfig(kl_coef=0.2, clip_low=0.1, clip_high=0.3)
LOGPROBS = jax.jit(completion_logprobs, static_argnums=0)


def mesh_of(*sizes):
    return sharding.make_mesh(sharding.MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))))


def moved(params, seed, scale=0.1):
    """Other parameters, near the given ones."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return tree.unflatten([x + scale * rng.normal(size=x.shape).astype(np.float32) for x in leaves])


def make_batch(policy, params, width=4, side="right", columns=T):
    """Ragged prompts and completions, one completion without tokens; the sampler agrees with the trainer."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 20, rng.integers(1, 5)) for _ in range(B)]
    completions = [rng.integers(2, 20, 0 if b == 5 else rng.integers(1, T + 1)) for b in range(B)]
    tokens = *oracle.pad(prompts, width, side), *oracle.pad(completions, columns)
    temperature = np.where(np.arange(B) % 2, 0.7, 1.0).astype(np.float32)
    return TrainBatch(
        prompt_tokens=tokens[0], prompt_mask=tokens[1], completion_tokens=tokens[2], mask=tokens[3],
        advantages=rng.normal(size=B).astype(np.float32), temperature=temperature,
        sampler_logprobs=LOGPROBS(policy, params, *tokens, temperature)[0],
    )  # fmt: skip


def make_state(policy, params, optimizer, objective=None, sizes=(1, 1, 1)):
    """A state whose reference differs from its parameters, so that the penalty pulls."""
    mesh = mesh_of(*sizes)
    state = init_train_state(policy, params, optimizer, objective or grpo(LOSS), mesh)
    if state.reference is None:
        return state
    where = jax.tree.map(lambda x: x.sharding, state.reference)
    return dataclasses.replace(state, reference=jax.device_put(moved(params, 1), where))


def loss_by_hand(params, policy, batch, old=None, ref=None):
    tokens = batch.prompt_tokens, batch.prompt_mask, batch.completion_tokens, batch.mask
    logprobs = completion_logprobs(policy, params, *tokens, batch.temperature)[0]
    return grpo_loss(
        logprobs,
        batch.advantages,
        batch.mask,
        old_logprobs=old,
        ref_logprobs=ref,
        kl_coef=LOSS.kl_coef,
        clip_low=LOSS.clip_low,
        clip_high=LOSS.clip_high,
    )


gradient_by_hand = jax.jit(jax.value_and_grad(loss_by_hand, has_aux=True), static_argnums=1)


def logprobs_by_hand(policy, params, batch):
    tokens = batch.prompt_tokens, batch.prompt_mask, batch.completion_tokens, batch.mask
    return LOGPROBS(policy, params, *tokens, batch.temperature)[0]


def assert_trees_close(got, expected, atol=1e-5):
    compare = functools.partial(np.testing.assert_allclose, atol=atol, rtol=1e-5)
    jax.tree.map(compare, jax.device_get(got), jax.device_get(expected))


# One update: the gradient, whatever the layout ------------------------------------------------------


@pytest.fixture(scope="module")
def batch(policy, params):
    return make_batch(policy, params)


@pytest.fixture(scope="module")
def by_hand(policy, params, batch):
    """Loss, metrics and gradient of the batch, from `grpo_loss` and `completion_logprobs` alone."""
    ref = logprobs_by_hand(policy, moved(params, 1), batch)
    (loss, metrics), gradient = gradient_by_hand(params, policy, batch, None, ref)
    assert optax.tree.norm(gradient) > 0.3
    metrics = {name: metric.value() for name, metric in metrics.items()}
    assert metrics["kl"] > 0.01
    return gradient, {**metrics, "loss": loss, "grad_norm": optax.tree.norm(gradient)}


@pytest.mark.parametrize(
    ("sizes", "microbatches", "padding"),
    [
        ((1, 1, 1), 1, {}),
        ((1, 1, 1), 2, {"width": 6, "side": "both", "columns": 8}),
        ((1, 1, 1), 4, {"width": 7, "side": "left"}),
        ((8, 1, 1), 4, {}),
        ((2, 2, 2), 2, {"side": "left"}),
        ((1, 8, 1), 1, {}),
        ((1, 1, 2), 2, {}),
    ],
)
@pytest.mark.parametrize("chunked", [False, True])
def test_one_update_is_the_gradient(monkeypatch, policy, params, by_hand, sizes, microbatches, padding, chunked):
    """With plain gradient descent at rate 1, the change of the parameters is the gradient."""
    if chunked:
        monkeypatch.setitem(token_logprobs.__kwdefaults__, "chunk", 32)
        monkeypatch.setattr(logprobs_lib, "_IDS", 4)
    optimizer, update = optax.sgd(1.0), UpdateConfig(microbatches=microbatches)
    state = make_state(policy, params, optimizer, sizes=sizes)
    step = make_train_step(policy, optimizer, grpo(LOSS), update, like=state, key=KEY)
    where = jax.tree.map(lambda x: x.sharding, state)
    state, metrics = step(state, make_batch(policy, params, **padding))
    assert_trees_close(jax.tree.map(jnp.subtract, params, jax.device_get(state.params)), by_hand[0])
    assert_trees_close({name: metrics[name] for name in by_hand[1]}, by_hand[1])
    assert state.step == 1
    assert state.cursor == 0
    same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, where)
    assert jax.tree.all(same)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_an_entropy_bonus_is_learned_from(monkeypatch, policy, params, batch, sizes):
    monkeypatch.setitem(token_logprobs.__kwdefaults__, "chunk", 32)
    monkeypatch.setattr(logprobs_lib, "_IDS", 4)
    objective = make_objective(LossConfig(objective="dapo", kl_coef=0.0, entropy_coef=0.7))
    state = make_state(policy, params, optax.sgd(1.0), objective, sizes)
    step = make_train_step(policy, optax.sgd(1.0), objective, UpdateConfig(microbatches=2), like=state, key=KEY)
    state, _ = step(state, batch)

    def loss(params):
        tokens = batch.prompt_tokens, batch.prompt_mask, batch.completion_tokens, batch.mask
        logprobs, entropies, _ = completion_logprobs(policy, params, *tokens, batch.temperature)
        terms = jnp.exp(logprobs - jax.lax.stop_gradient(logprobs)) * batch.advantages[:, None] + 0.7 * entropies
        return -jnp.where(batch.mask, terms, 0).sum() / batch.mask.sum()

    monkeypatch.undo()
    gradient = jax.jit(jax.grad(loss))(params)
    assert_trees_close(jax.tree.map(jnp.subtract, params, jax.device_get(state.params)), gradient)


# Rows that completions share ----------------------------------------------------------------------------


def packed_and_not(policy, params, batch, update, objective=None, sizes=(1, 1, 1)):
    """(state, metrics) of an update, with one completion a row, and with as many as fit."""
    results = []
    for kind in (dataclasses.replace(policy, max_segments=1), policy):
        state = make_state(kind, params, optax.sgd(1.0), objective, sizes)
        step = make_train_step(kind, optax.sgd(1.0), objective or grpo(LOSS), update, like=state, key=KEY)
        state, metrics = step(state, batch)
        results.append((jax.device_get(state.params), jax.device_get(metrics)))
    return results


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 4, 1)])
@pytest.mark.parametrize("chunked", [False, True])
def test_shared_rows_change_nothing_but_how_many_there_are(monkeypatch, policy, params, sizes, chunked):
    if chunked:
        monkeypatch.setitem(token_logprobs.__kwdefaults__, "chunk", 32)
        monkeypatch.setattr(logprobs_lib, "_IDS", 4)
    batch = make_batch(policy, params, columns=3 * T)  # of which a completion has T at most
    advantages = np.random.default_rng(2).normal(size=batch.mask.shape).astype(np.float32)
    batch = dataclasses.replace(batch, advantages=advantages)
    objective = make_objective(LossConfig(objective="gspo_token", kl_coef=0.2, entropy_coef=0.1))
    update = UpdateConfig(epochs=2, microbatches=4)
    alone, shared = packed_and_not(policy, params, batch, update, objective, sizes)
    assert_trees_close(shared[0], alone[0], atol=2e-5)
    fill = [metrics.pop("packing/fill") for _, metrics in (alone, shared)]
    real = (batch.prompt_mask.sum(axis=1) * batch.mask.any(axis=1) + batch.mask.sum(axis=1)).sum()
    assert fill[0] == pytest.approx(real / (B * (4 + 3 * T)))
    assert fill[1] >= 1.99 * fill[0]  # half of the microbatches at most were run
    assert_trees_close(shared[1], alone[1], atol=2e-5)


def test_lengths_do_not_recompile(policy, params):
    traced = []

    def hidden(*arguments):
        traced.append(1)
        return policy.hidden(*arguments)

    counted = dataclasses.replace(policy, hidden=hidden)
    state = make_state(counted, params, optax.sgd(0.1))
    step = make_train_step(counted, optax.sgd(0.1), grpo(LOSS), UpdateConfig(microbatches=4), like=state, key=KEY)
    batch, counts = make_batch(policy, params), []
    for longest in (1, 3, 5, 2, 0):
        state, _ = step(state, dataclasses.replace(batch, mask=batch.mask & (np.arange(T)[None] < longest)))
        counts.append(len(traced))
    assert len(set(counts)) == 1
    assert step._cache_size() == 1


def test_an_update_without_a_token_changes_nothing(policy, params, batch):
    state = make_state(policy, params, optax.sgd(1.0))
    step = make_train_step(policy, optax.sgd(1.0), grpo(LOSS), UpdateConfig(microbatches=2), like=state, key=KEY)
    state, metrics = step(state, dataclasses.replace(batch, mask=np.zeros_like(batch.mask)))
    assert_trees_close(state.params, params, atol=0)
    assert all(np.isfinite(x) for x in jax.tree.leaves(metrics))


# What the update knows of sampler, entropies and reference ------------------------------------------------


@pytest.mark.parametrize("update", [UpdateConfig(microbatches=2), UpdateConfig(minibatches=2)], ids=["one", "two"])
@pytest.mark.parametrize("kind", ["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_the_correction_multiplies_the_surrogate(policy, params, batch, kind, update):
    """At rate 0 every minibatch sees the same parameters; then the loss is linear in the correction."""
    rng = np.random.default_rng(1)
    off = batch.sampler_logprobs + rng.normal(scale=0.6, size=batch.mask.shape).astype(np.float32)
    objective = make_objective(LossConfig(objective="dr_grpo", kl_coef=0.0, correction=kind, correction_bound=1.5))
    state = make_state(policy, params, optax.sgd(0.0), objective, (2, 2, 1))
    step = make_train_step(policy, optax.sgd(0.0), objective, update, like=state, key=KEY)
    _, metrics = step(state, dataclasses.replace(batch, sampler_logprobs=np.where(batch.mask, off, np.nan)))
    level, masked = ("token", False) if kind == "none" else (kind.split("_")[0], kind.endswith("mask"))
    correction, said = oracle.importance_correction(batch.sampler_logprobs, off, batch.mask, level, 1.5, masked)
    terms = (correction if kind != "none" else batch.mask) * batch.advantages[:, None]
    np.testing.assert_allclose(metrics["loss"], -terms.sum() / batch.mask.size, atol=1e-5)
    for name, value in said.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-3, err_msg=name)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_only_tokens_of_great_entropy_learn(policy, params, batch, sizes):
    objective = make_objective(LossConfig(objective="dapo", kl_coef=0.0, top_entropy=0.3))
    state = make_state(policy, params, optax.sgd(1.0), objective, sizes)
    step = make_train_step(policy, optax.sgd(1.0), objective, UpdateConfig(microbatches=2), like=state, key=KEY)
    state, _ = step(state, batch)
    tokens = batch.prompt_tokens, batch.prompt_mask, batch.completion_tokens, batch.mask
    entropies = np.asarray(LOGPROBS(policy, params, *tokens, batch.temperature)[1])
    learns = oracle.top_entropies(entropies, batch.mask, 0.3)
    assert learns.sum() == np.ceil(0.3 * batch.mask.sum())

    def loss(params):
        logprobs, *_ = completion_logprobs(policy, params, *tokens, batch.temperature)
        terms = jnp.exp(logprobs - jax.lax.stop_gradient(logprobs)) * batch.advantages[:, None]
        return -jnp.where(learns, terms, 0).sum() / batch.mask.sum()

    assert_trees_close(
        jax.tree.map(jnp.subtract, params, jax.device_get(state.params)), jax.jit(jax.grad(loss))(params)
    )


def test_a_correction_needs_the_sampler(policy, params, batch):
    objective = make_objective(LossConfig(kl_coef=0.0, correction="token_mask"))
    state = make_state(policy, params, optax.sgd(1.0), objective)
    step = make_train_step(policy, optax.sgd(1.0), objective, like=state, key=KEY)
    with pytest.raises(ValueError, match="correction needs the sampler's log-probabilities"):
        step(state, dataclasses.replace(batch, sampler_logprobs=None))


def test_the_reference_moves_every_so_many_steps(policy, params, batch):
    update = UpdateConfig(reference_every=2, reference_mix=0.25)
    state = make_state(policy, params, optax.sgd(0.5), sizes=(2, 2, 2))
    step = make_train_step(policy, optax.sgd(0.5), grpo(LOSS), update, like=state, key=KEY)
    expected = jax.device_get(state.reference)
    for n in range(1, 5):
        state, _ = step(state, batch)
        if n % 2 == 0:
            new = jax.device_get(state.params)
            expected = jax.tree.map(lambda ref, p: 0.75 * ref + 0.25 * p, expected, new)
        assert_trees_close(state.reference, expected, atol=1e-6)
    with pytest.raises(ValueError, match="reference_every=2: the objective has no reference"):
        make_train_step(policy, optax.sgd(0.5), grpo(LossConfig(kl_coef=0.0)), update, like=state, key=KEY)


def test_clipped_gradients_are_counted(policy, params, batch):
    state = make_state(policy, params, optax.sgd(0.0))
    for clip_norm, expected in ((1e-6, 1.0), (1e6, 0.0)):
        step = make_train_step(
            policy, optax.sgd(0.0), grpo(LOSS), UpdateConfig(epochs=2), like=state, key=KEY, clip_norm=clip_norm
        )
        state, metrics = step(state, batch)
        assert metrics["grad_clipped"] == expected


# Several updates ------------------------------------------------------------------------------------


def test_orders_are_permutations_and_differ_between_epochs():
    orders = training._orders(KEY, 12, UpdateConfig(epochs=3, minibatches=4)).reshape(3, 12)
    assert all(sorted(order) == list(range(12)) for order in orders.tolist())
    assert len({tuple(order) for order in orders.tolist()}) == 3


def test_epochs_and_minibatches_are_a_loop_of_optimizer_steps(policy, params, batch):
    """Old log-probabilities stay those from before the first of them."""
    optimizer, update = optax.adam(0.03), UpdateConfig(epochs=2, minibatches=2, microbatches=2)
    state = make_state(policy, params, optimizer, sizes=(2, 2, 2))
    state = dataclasses.replace(state, step=state.step + 3)
    orders = training._orders(jax.random.fold_in(KEY, 3), B, update)
    step = make_train_step(policy, optimizer, grpo(LOSS), update, like=state, key=KEY)
    got, metrics = step(state, batch)

    @jax.jit
    def descend(params, opt_state, part, old, ref):
        (loss, aux), gradient = jax.value_and_grad(loss_by_hand, has_aux=True)(params, policy, part, old, ref)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, aux

    def loop(stale):
        hand, opt_state, losses, kls, clips = params, optimizer.init(params), [], [], []
        old, ref = (np.asarray(logprobs_by_hand(policy, p, batch)) for p in (params, moved(params, 1)))
        for order in np.asarray(orders):
            part = jax.tree.map(lambda x: np.asarray(x)[order], batch)  # noqa: B023
            then = old[order] if stale else logprobs_by_hand(policy, hand, part)
            hand, opt_state, loss, aux = descend(hand, opt_state, part, then, ref[order])
            losses.append(loss)
            kls.append(aux["kl"])
            clips.append(aux["clip_ratio/region_mean"])
        mean = lambda ms: sum(m.total for m in ms) / sum(m.count for m in ms)
        return hand, {"loss": np.mean(losses), "kl": mean(kls), "clip_ratio/region_mean": mean(clips)}

    expected, expected_metrics = loop(stale=True)
    assert_trees_close(got.params, expected, atol=2e-5)
    assert_trees_close({name: metrics[name] for name in expected_metrics}, expected_metrics)
    assert metrics["clip_ratio/region_mean"] > 0.02
    assert got.step == 4
    fresh, _ = loop(stale=False)
    worst = jax.tree.map(lambda a, b: np.abs(a - b).max(), jax.device_get(got.params), fresh)
    assert max(jax.tree.leaves(worst)) > 1e-3  # the negative control


@pytest.mark.parametrize("update", [UpdateConfig(), UpdateConfig(epochs=2)], ids=["one update", "two epochs"])
def test_the_distance_of_sampler_and_trainer_is_logged(policy, params, batch, update):
    """Of the policy before the updates; 0 where both agree, and blind to what is outside of the mask."""
    name, objective = "sampling/sampling_logp_difference", grpo(LossConfig(kl_coef=0.0))
    state = make_state(policy, params, optax.sgd(0.0), objective)
    step = make_train_step(policy, optax.sgd(0.0), objective, update, like=state, key=KEY)
    off = batch.mask & (np.arange(B)[:, None] % 2 == 0)  # the rows in which the sampler is off by `error`
    for error in (0.0, 0.25):
        wrong = np.where(batch.mask, batch.sampler_logprobs + error * off, np.nan).astype(np.float32)
        state, metrics = step(state, dataclasses.replace(batch, sampler_logprobs=wrong))
        np.testing.assert_allclose(metrics[f"{name}/max"], error, atol=1e-5)
        np.testing.assert_allclose(metrics[f"{name}/mean"], error * off.sum() / batch.mask.sum(), atol=1e-5)


@pytest.mark.parametrize("selected", [None, np.array([1, 1, 0, 1], bool)])
def test_train_batch_joins_a_rollout_and_its_advantages(selected):
    mask = np.array([[1, 1], [1, 0], [1, 1], [1, 0]], bool)
    rollout = Rollout(
        prompt_tokens=jnp.array([[5, 6], [7, 0]]), prompt_mask=jnp.array([[True, True], [True, False]]),
        completion_tokens=jnp.arange(8).reshape(4, 2), mask=mask, finished=jnp.ones(4, bool),
        logprobs=-jnp.arange(8.0).reshape(4, 2), sampler_logprobs=jnp.zeros((4, 2)),
    )  # fmt: skip
    got = train_batch(rollout, jnp.array([[1.0, 2.0], [3.0, 4.0]]), temperature=0.5, selected=selected)
    for advantages in (jnp.arange(4.0), jnp.arange(8.0).reshape(4, 2)):  # of completions, of tokens
        np.testing.assert_array_equal(train_batch(rollout, advantages).advantages, advantages)
    expected = TrainBatch(
        prompt_tokens=[[5, 6], [5, 6], [7, 0], [7, 0]], prompt_mask=[[1, 1], [1, 1], [1, 0], [1, 0]],
        completion_tokens=rollout.completion_tokens, mask=mask if selected is None else mask & selected[:, None],
        advantages=[1, 2, 3, 4], sampler_logprobs=rollout.logprobs, temperature=[0.5] * 4,
    )  # fmt: skip
    for field in dataclasses.fields(TrainBatch):
        np.testing.assert_array_equal(getattr(got, field.name), getattr(expected, field.name), err_msg=field.name)


# The state ------------------------------------------------------------------------------------------


def test_the_state_is_donated_and_nothing_recompiles(policy, params, batch):
    optimizer = optax.adam(1e-3)
    state = make_state(policy, params, optimizer)
    step = make_train_step(policy, optimizer, grpo(LOSS), like=state, key=KEY)
    for n in range(3):
        before = state
        state, _ = step(before, batch)
        assert all(x.is_deleted() for x in jax.tree.leaves(before))
        assert state.step == n + 1
    assert step._cache_size() == 1
    assert not any(x.is_deleted() for x in jax.tree.leaves((params, state)))


def test_the_first_state_shares_no_buffer(policy, params):
    """Or donating it would delete its reference, or the parameters it was made from."""
    state = init_train_state(policy, params, optax.sgd(1.0), grpo(), mesh_of(1, 1, 1))
    jax.tree.map(np.testing.assert_array_equal, state.params, params)
    jax.tree.map(np.testing.assert_array_equal, state.reference, params)
    leaves = jax.tree.leaves((params, state.params, state.reference))
    assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)


def test_no_leaf_is_weakly_typed(policy, config):
    """Or it would be one no more after the first update, and the sampler and the train step would compile again."""
    params = init_params(config, jax.random.key(0))
    assert any(x.weak_type for x in jax.tree.leaves(params))
    state = init_train_state(policy, params, optax.adam(1.0), grpo(), mesh_of(1, 1, 1))
    assert not any(x.weak_type for x in jax.tree.leaves(state))


def test_without_a_penalty_there_is_no_reference(policy, params, batch):
    products = {}
    for kl_coef in (0.0, 0.1):
        objective = grpo(LossConfig(kl_coef=kl_coef))
        state = init_train_state(policy, params, optax.sgd(1.0), objective, mesh_of(1, 1, 1))
        assert (state.reference is None) == (kl_coef == 0)
        step = make_train_step(policy, optax.sgd(1.0), objective, like=state, key=KEY)
        products[kl_coef] = step.lower(state, batch).as_text().count("dot_general")
    assert products[0.0] < products[0.1]


@pytest.mark.parametrize(("sizes", "update"), [((1, 1, 1), {}), ((2, 2, 2), {"epochs": 2, "minibatches": 2})])
def test_a_reference_that_was_asked_before_is_not_asked_again(policy, params, batch, sizes, update):
    """The same update, from a program without the reference's parameters."""
    objective, update, optimizer = grpo(LOSS), UpdateConfig(microbatches=2, **update), optax.sgd(0.1)
    state = make_state(policy, params, optimizer, sizes=sizes)
    rollout = Rollout(
        **{name: getattr(batch, name) for name in ("prompt_tokens", "prompt_mask", "completion_tokens", "mask")},
        finished=batch.mask[:, 0], logprobs=batch.sampler_logprobs, sampler_logprobs=batch.sampler_logprobs,
    )  # fmt: skip
    batch = dataclasses.replace(batch, temperature=np.full(B, 0.7, np.float32))
    reference = make_reference_logprobs(policy, update, mesh_of(*sizes))(state.reference, rollout, 0.7)
    by_hand = logprobs_by_hand(policy, moved(params, 1), batch)
    np.testing.assert_allclose(reference, np.where(batch.mask, by_hand, 0), atol=1e-5)
    step = make_train_step(policy, optimizer, objective, update, like=state, key=KEY)
    given = dataclasses.replace(batch, ref_logprobs=reference)
    products = [step.lower(state, b).as_text().count("dot_general") for b in (batch, given)]
    assert products[0] > products[1]
    ours, metrics = step(jax.tree.map(jnp.copy, state), given)
    expected, expected_metrics = step(state, batch)
    assert_trees_close(ours.params, expected.params)
    assert_trees_close(metrics, expected_metrics)
    assert metrics["kl"] > 0.01


def test_supervised_update(policy, params, batch):
    """Maximum likelihood, mean over tokens, of completions that nobody sampled; NaN advantages do not touch it."""
    optimizer, objective = optax.sgd(1.0), supervised()
    state = make_state(policy, params, optimizer, objective)
    step = make_train_step(policy, optimizer, objective, UpdateConfig(microbatches=2), like=state, key=KEY)
    got, metrics = step(
        state, dataclasses.replace(batch, advantages=np.full(B, np.nan, np.float32), sampler_logprobs=None)
    )
    assert metrics.keys() == {"loss", "entropy", "grad_norm", "packing/fill", "skipped", "skipped_in_a_row"}

    @jax.jit
    @jax.value_and_grad
    def by_hand(params):
        tokens = batch.prompt_tokens, batch.prompt_mask, batch.completion_tokens, batch.mask
        logprobs = completion_logprobs(policy, params, *tokens, batch.temperature)[0]
        return -jnp.where(batch.mask, logprobs, 0).sum() / batch.mask.sum()

    loss, gradient = by_hand(params)
    assert_trees_close(metrics["loss"], loss)
    assert_trees_close(jax.tree.map(jnp.subtract, params, got.params), gradient)


@pytest.mark.parametrize(
    ("sizes", "update", "match"),
    [
        ((1, 1, 1), UpdateConfig(microbatches=3), r"32 completions .* microbatches=3 .* = 3 equal parts"),
        ((1, 1, 1), UpdateConfig(minibatches=5), r"minibatches=5"),
        ((2, 2, 2), UpdateConfig(minibatches=4, microbatches=4), r"minibatches=4 x microbatches=4 x 4 devices .* = 64"),
    ],
)
def test_what_does_not_divide(policy, params, batch, sizes, update, match):
    state = make_state(policy, params, optax.sgd(1.0), sizes=sizes)
    step = make_train_step(policy, optax.sgd(1.0), grpo(LOSS), update, like=state, key=KEY)
    with pytest.raises(ValueError, match=match):
        step(state, batch)


# Bad configurations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "options", "match"),
    [
        (LossConfig, {"kl_coef": -0.1}, r"kl_coef=-0\.1"),
        (LossConfig, {"clip_low": 1.5}, r"clip_low=1\.5"),
        (LossConfig, {"clip_low": 0.0}, r"clip_low=0\.0"),
        (LossConfig, {"clip_high": 0.0}, r"clip_high=0\.0"),
        (LossConfig, {"top_entropy": 0.0}, r"top_entropy=0\.0"),
        (LossConfig, {"correction": "tis"}, r"correction='tis' must be none or one of token_truncate"),
        (LossConfig, {"correction_bound": 1.0}, r"correction_bound=1\.0 must be above 1"),
        (UpdateConfig, {"reference_every": -1}, "reference_every=-1"),
        (UpdateConfig, {"reference_every": 1, "reference_mix": 0.0}, r"reference_mix=0\.0"),
        (UpdateConfig, {"reference_mix": 0.5}, r"reference_mix=0\.5 needs reference_every"),
    ],
)
def test_config_errors(config, options, match):
    with pytest.raises(ValueError, match=match):
        config(**options)


# What is compiled -----------------------------------------------------------------------------------


def computations(text):
    """Compiled text -> {name of a computation: its lines}."""
    found, name = {}, None
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = header[1]
            found[name] = []
        elif name:
            found[name].append(line)
    return found


def reached(found, names):
    """The computations that `names` call, and what those call."""
    seen, todo = set(), list(names)
    while todo:
        name = todo.pop()
        if name in found and name not in seen:
            seen.add(name)
            todo += [n for line in found[name] for n in re.findall(r"%([\w.\-]+)", line) if n in found]
    return seen


def collectives(text):
    """The collectives of a compiled program: those outside of loops, and those inside."""
    found = computations(text)
    looped = reached(found, re.findall(r"body=%?([\w.\-]+)", text))
    kinds = re.compile(r"= .* (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\(")
    places = [(name in looped, line) for name, lines in found.items() for line in lines if kinds.search(line)]
    return [line for inside, line in places if not inside], [line for inside, line in places if inside]


def test_gradients_are_reduced_over_data_once_and_not_in_the_loop_of_microbatches(policy, params, batch):
    state, update = make_state(policy, params, optax.sgd(1.0), sizes=(8, 1, 1)), UpdateConfig(microbatches=4)
    step = make_train_step(policy, optax.sgd(1.0), grpo(LOSS), update, like=state, key=KEY)
    text = step.lower(state, batch).compile().as_text()
    assert " while(" in text
    assert not asks_the_host(text)
    outside, inside = collectives(text)
    assert not inside
    gradient = "f32[" + ",".join(map(str, params["layers"][0]["gate"].shape)) + "]"
    assert sum(gradient in line.split(" all-")[0] for line in outside) == 1
    assert len(outside) <= 5


def test_a_reduction_in_a_loop_is_found():
    """The negative control of the parser: microbatches as they are written without care."""
    mesh = mesh_of(8, 1, 1)

    def descend(w, parts):
        return jax.lax.scan(lambda w, x: (w - jax.grad(lambda w: jnp.sin(x @ w).sum())(w), None), w, parts)[0]

    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    shapes = (
        jax.ShapeDtypeStruct((5,), jnp.float32, sharding=sharding.replicated(mesh)),
        jax.ShapeDtypeStruct((4, 16, 5), jnp.float32, sharding=rows),
    )
    text = jax.jit(descend, out_shardings=sharding.replicated(mesh)).lower(*shapes).compile().as_text()
    outside, inside = collectives(text)
    assert len(inside) == 1
    assert not outside

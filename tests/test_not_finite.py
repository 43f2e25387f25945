"""NaN and inf: steps that are left out, runs that stop, and the operation that is named."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import loop, optimizers, sharding, training
from grpo_jax.checkpoints import CheckpointConfig, Checkpoints
from grpo_jax.debugging import naming_nans
from grpo_jax.guard import NotFiniteError, guarded_update, skip_metrics
from grpo_jax.metrics import finalize
from grpo_jax.objectives import LossConfig, grpo
from grpo_jax.rollouts import Experience
from grpo_jax.telemetry import read_jsonl
from grpo_jax.types import TrainBatch, TrainState

OPTIMIZER, _ = optimizers.make_optimizer(optimizers.OptimizerConfig(learning_rate=0.1, weight_decay=0.1), 10)
NAN, INF = float("nan"), float("inf")


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    ("loss", "grads", "optimizer", "finite"),
    [
        (1.0, [3.0, -4.0], OPTIMIZER, True),
        (NAN, [3.0, -4.0], OPTIMIZER, False),  # a loss that no gradient comes from
        (1.0, [NAN, 0.0], OPTIMIZER, False),
        (1.0, [INF, 0.0], OPTIMIZER, False),
        (1.0, [-3e38, 3e38], OPTIMIZER, False),  # whose norm overflows
        (1.0, [0.0, 1.0], optax.adam(0.1, eps=0.0), False),  # 0 / 0 in Adam
        (1.0, [3.0, -4.0], optax.sgd(2e38), False),  # finite but for the parameters
    ],
)
def test_a_step_is_whole_or_not_at_all(loss, grads, optimizer, finite):
    params = {"w": jnp.array([1.0, -2.0]), "b": jnp.zeros(())}
    state = optimizer.init(params)
    grads = {"w": jnp.array(grads), "b": jnp.ones(())}
    made = jax.jit(lambda *x: guarded_update(optimizer, *x))(params, state, jnp.int32(3), jnp.float32(loss), grads)
    if finite:
        updates, wanted = jax.jit(optimizer.update)(grads, state, params)
        assert bits(made.opt_state) == bits(wanted)
        np.testing.assert_allclose(made.params["w"], optax.apply_updates(params, updates)["w"], rtol=1e-6)
        assert int(made.skipped) == 0
    else:
        assert bits((made.params, made.opt_state)) == bits((params, state))
        assert int(made.skipped) == 4
    np.testing.assert_equal(float(finalize(made.metrics)["loss"]), loss)


def test_no_second_copy_of_the_state():
    """Of the compiler: parameters and moments are replaced in place.

    On CPUs it keeps what the guard looks at, half as much again as the gradient; on TPUs nothing, where it fuses them.
    """
    params = {name: jax.ShapeDtypeStruct((256, 1024), jnp.float32) for name in "ab"}
    state = jax.eval_shape(OPTIMIZER.init, params)

    def step(params, opt_state, x, guarded):
        loss, grads = jax.value_and_grad(lambda p: jnp.square(p["a"] * x + p["b"]).sum())(params)
        if guarded:
            made = guarded_update(OPTIMIZER, params, opt_state, None, loss, grads)
            return made.params, made.opt_state
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def temporary(guarded):
        lowered = jax.jit(step, donate_argnums=(0, 1), static_argnums=3).lower(params, state, jnp.float32(1), guarded)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    size = sum(x.size * 4 for x in params.values())  # a third of the state
    assert temporary(True) - temporary(False) <= 1.6 * size


def test_of_two_minibatches_the_one_with_a_nan_is_left_out(policy, params):
    batch = TrainBatch(
        prompt_tokens=np.full((8, 1), 3, np.int32), prompt_mask=np.ones((8, 1), bool), mask=np.ones((8, 2), bool),
        completion_tokens=np.arange(2, 18, dtype=np.int32).reshape(8, 2), advantages=np.ones(8, np.float32),
        sampler_logprobs=None, temperature=np.ones(8, np.float32),
    )  # fmt: skip
    optimizer, objective, mesh = optax.adam(1e-2), grpo(LossConfig(kl_coef=0.0)), sharding.make_mesh()
    fresh = lambda: training.init_train_state(policy, params, optimizer, objective, mesh)
    step = training.make_train_step(
        policy, optimizer, objective, training.UpdateConfig(minibatches=2), like=fresh(), key=jax.random.key(0)
    )
    _, metrics = step(fresh(), batch)
    assert {name: float(metrics[name]) for name in ("skipped", "skipped_in_a_row")} == {
        "skipped": 0,
        "skipped_in_a_row": 0,
    }
    poisoned = dataclasses.replace(batch, advantages=np.where(np.arange(8) == 5, np.nan, 1).astype(np.float32))
    after, metrics = step(fresh(), poisoned)
    assert float(metrics["skipped"]) == 1
    assert float(metrics["skipped_in_a_row"]) == 1 >= int(after.skipped)  # whichever of the two it was
    assert int(loop._optimizer_count(after)) == 1
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(after.params))
    assert not np.array_equal(after.params["embedding"], params["embedding"])


# The loop ---------------------------------------------------------------------------------------------


@jax.jit
def descend(state, target):
    loss, grads = jax.value_and_grad(lambda p: jnp.square(p["w"] - target).sum())(state.params)
    made = guarded_update(OPTIMIZER, state.params, state.opt_state, state.skipped, loss, grads)
    new = dataclasses.replace(
        state, params=made.params, opt_state=made.opt_state, skipped=made.skipped, step=state.step + 1
    )
    return new, {**finalize(made.metrics), **skip_metrics(made.skipped[None])}


def run(workdir, steps, bad=(), **options):
    """Batches are functions of the cursor; those at the cursors `bad` are NaN, and 10 prompts make a step."""
    params = {"w": jnp.arange(3.0)}
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(
        params=params, reference=None, opt_state=OPTIMIZER.init(params), step=zero, cursor=zero + 0, skipped=zero + 0
    )
    state = jax.device_put(state, sharding.replicated(sharding.make_mesh()))

    def experience(state, journal, interrupt):
        at = int(state.cursor) // 10
        sample = {"prompt": f"p{at}", "completion": "c", "reward": 1.0, "advantage": NAN if at in bad else 0.5}
        return Experience(batch=np.float32(NAN if at in bad else at), prompts_consumed=10, samples=[sample])

    return loop.train(
        state, train_step=descend, experience=experience, steps=steps, workdir=workdir,
        checkpoints=CheckpointConfig(every=1), **options,
    )  # fmt: skip


def test_a_skipped_step_is_one_that_did_not_happen_and_resuming_is_exact(tmp_path, capsys):
    after, rows = run(tmp_path / "bad", 7, bad=(2, 3))
    assert [row["skipped"] for row in rows[1:]] == [0, 0, 1, 1, 0, 0, 0]
    assert [row["skipped_in_a_row"] for row in rows[1:]] == [0, 0, 1, 2, 0, 0, 0]
    said = capsys.readouterr().out
    assert "step 3: not finite: loss and grad_norm; 1 optimizer steps were left out (1 in a row by now)" in said
    state, _ = run(tmp_path / "first", 1)
    for target in (1, 4, 5, 6):  # by hand, without those two
        state, _ = descend(state, np.float32(target))
    assert bits((state.params, state.opt_state)) == bits((after.params, after.opt_state))
    for steps in (3, 4, 7):  # stopped in the middle of the two
        halves, again = run(tmp_path / "halves", steps, bad=(2, 3))
    assert bits(halves) == bits(after)
    untimed = lambda rows: [{k: repr(v) for k, v in row.items() if not k.startswith("time/")} for row in rows]
    assert untimed(again) == untimed(rows)


def test_too_many_in_a_row_stop_the_run_with_what_was_seen(tmp_path):
    with pytest.raises(NotFiniteError) as stopped:
        run(tmp_path, 9, bad=(3, 4, 5, 6), max_skipped=3)
    assert str(stopped.value) == (
        "step 6: the last 3 optimizer steps were not finite and were left out (grad_norm, loss); the run stops, and "
        f"the same command goes on from step 5. What was seen is in {tmp_path / 'not_finite.json'}; --debug_nans names "
        "the operation, where there is that flag."
    )
    said = json.loads((tmp_path / "not_finite.json").read_text(), parse_constant=pytest.fail)  # no NaN: JSON has none
    assert (said["skipped_in_a_row"], said["newest_checkpoint"]) == (3, 5)
    assert [one["step"] for one in said["seen"]] == [4, 5, 6]
    last = said["seen"][-1]
    assert last["not_finite"] == ["grad_norm", "loss"]
    assert last["prompts"] == {"first": 50, "count": 10}
    assert last["samples"] == [{"prompt": "p5", "completion": "c", "reward": 1.0, "advantage": "nan"}]
    assert read_jsonl(tmp_path / "metrics.jsonl")[-1]["step"] == 6
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).steps[-1] == 5
    straight, _ = run(tmp_path / "straight", 9)
    mended, _ = run(tmp_path, 9, max_skipped=3)  # from step 5 with the machine mended, two steps were left out
    assert int(mended.step) == 9
    assert int(mended.skipped) == 0
    assert bits(mended.params) != bits(straight.params)


def test_the_report_names_the_completions_whose_inputs_are_not_finite(tmp_path):
    batch = TrainBatch(
        prompt_tokens=np.array([[0, 5]] * 70), prompt_mask=np.array([[False, True]] * 70),
        completion_tokens=np.array([[7, 8]] * 70), mask=np.array([[True, False]] * 70),
        advantages=np.where(np.arange(70) == 66, np.inf, 1.0).astype(np.float32), sampler_logprobs=None,
        temperature=np.ones(70, np.float32),
    )  # fmt: skip
    said = loop.incidents.seen(1, 0, {"loss": NAN, "kl": 1.0}, Experience(batch=batch, prompts_consumed=7))
    assert len(said["completions"]) == 64
    assert said["completions"][0] == {
        "completion": 66, "not_finite": ["advantages"], "prompt_ids": [5], "completion_ids": [7], "advantage": "inf",
    }  # fmt: skip
    assert said["completions"][1]["completion"] == 0
    assert said["not_finite"] == ["loss"]


# The operation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1.0, -1.0, 0.0])
def test_the_operation_inside_a_remat_block_is_named_with_its_line(value):
    @jax.checkpoint
    def block(x):
        harmless = jnp.where(x > 0, jnp.sqrt(x), 0.0).sum()  # a NaN that no one sees
        return jax.lax.scan(lambda c, _: (c + jnp.log(x).sum(), None), harmless, length=2)[0]  # this line

    def step(state, batch):
        loss, grads = jax.value_and_grad(lambda p: block(p["w"] * batch))(state.params)
        made = guarded_update(OPTIMIZER, state.params, state.opt_state, state.skipped, loss, grads)
        skips = skip_metrics(made.skipped[None])
        return dataclasses.replace(state, step=state.step + 1, params=made.params), skips

    params = {"w": jnp.ones(3)}
    state = TrainState(
        params=params, reference=None, opt_state=OPTIMIZER.init(params), step=jnp.int32(4), cursor=jnp.int32(0),
        skipped=jnp.int32(0),
    )  # fmt: skip
    if value > 0:
        after, _ = naming_nans(jax.jit(step))(state, jnp.full(3, value))
        assert bits(after.params) == bits(jax.jit(step)(state, jnp.full(3, value))[0].params)
        return
    with pytest.raises(NotFiniteError) as named:
        naming_nans(jax.jit(step))(state, jnp.full(3, value))
    if value < 0:
        assert "step 5 is not finite: nan generated by primitive: sqrt at " in str(named.value)
        assert f"{__file__}:" in str(named.value)
        assert "harmless = " in str(named.value)
    else:
        assert "step 5 is not finite" in str(named.value)

import dataclasses
import resource

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import objectives, sharding, training
from grpo_jax.checkpoints import CheckpointConfig, Checkpoints
from grpo_jax.models.transformer import TransformerConfig, init_params, make_policy
from grpo_jax.telemetry import WorkdirError

CONFIG = TransformerConfig(vocab_size=16, layers=1, width=16, heads=2, kv_heads=2, head_width=8, mlp_width=16)


def state_on(config: TransformerConfig = CONFIG, **axes):
    mesh = sharding.make_mesh(sharding.MeshConfig(**axes))
    return training.init_train_state(
        make_policy(config), init_params(config, jax.random.key(0)), optax.adam(1e-3), objectives.grpo(), mesh
    )


def at(state, step):
    return dataclasses.replace(state, step=jax.device_put(np.int32(step), state.step.sharding))


def save(store, state, metric=None):
    store.save(state, metric)
    store.wait()


def test_restored_to_the_bit_on_another_mesh(tmp_path):
    state = at(state_on(data=4, fsdp=2), 7)
    store = Checkpoints(tmp_path)
    save(store, state)
    for axes in ({}, {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 2}):
        like = state_on(**axes)
        restored = store.restore(like)
        assert int(restored.step) == 7
        for ours, theirs, where in zip(*map(jax.tree.leaves, (restored, state, like)), strict=True):
            assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
            assert ours.sharding.is_equivalent_to(where.sharding, ours.ndim)
    store.close()


def test_the_latest_and_the_best_are_kept_over_restarts(tmp_path):
    config = CheckpointConfig(keep_latest=2, keep_best=1)
    state = state_on()
    for step, metric in enumerate([0.1, 0.9, 0.5, None, 0.2, 0.3]):
        store = Checkpoints(tmp_path, config)  # a restart every time
        save(store, at(state, step), metric)
        save(store, at(state, step), metric)  # twice does no harm
        store.close()
    store = Checkpoints(tmp_path, config)
    assert store.steps == [1, 4, 5]
    assert store.best == 1


def test_a_model_of_another_shape_is_refused_with_the_leaf_named(tmp_path):
    store = Checkpoints(tmp_path)
    save(store, state_on())
    with pytest.raises(ValueError, match=r"another model(.|\n)*embedding.*float32\[16, 16\].*float32\[20, 16\]"):
        store.restore(state_on(dataclasses.replace(CONFIG, vocab_size=20)))
    with pytest.raises(ValueError, match=r"no checkpoint of step 3 .*there are \[0\]"):
        store.restore(state_on(), 3)


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    store = Checkpoints(tmp_path)
    save(store, state_on())
    store.close()
    (tmp_path / "9.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    store = Checkpoints(tmp_path)
    assert store.steps == [0]
    assert jnp.isfinite(store.restore(state_on()).params["embedding"]).all()


def test_a_full_disk_is_an_error_and_what_was_saved_is_intact(tmp_path):
    store, state = Checkpoints(tmp_path), state_on()
    save(store, state)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # stands in for the disk: no file may grow beyond this
    try:
        with pytest.raises(WorkdirError, match=r"cannot write a checkpoint(.|\n)*of steps \[0\], are intact"):
            save(store, at(state, 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    again = Checkpoints(tmp_path)
    assert again.steps == [0]
    np.testing.assert_array_equal(again.restore(state).params["embedding"], state.params["embedding"])


@pytest.mark.parametrize("changes", [{"every": 0}, {"keep_latest": 0}, {"keep_best": -1}])
def test_bad_configuration(changes):
    with pytest.raises(ValueError, match="must be 1 or more"):
        CheckpointConfig(**changes)

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import objectives, sharding, training
from grpo_jax.checkpoints import CheckpointConfig, Checkpoints
from grpo_jax.models.transformer import TransformerConfig, init_params, make_policy

CONFIG = TransformerConfig(vocab_size=16, layers=1, width=16, heads=2, kv_heads=2, head_width=8, mlp_width=16)


def state_on(config: TransformerConfig = CONFIG, **axes):
    mesh = sharding.make_mesh(sharding.MeshConfig(**axes))
    return training.init_train_state(
        make_policy(config), init_params(config, jax.random.key(0)), optax.adam(1e-3), objectives.grpo(), mesh
    )


def at(state, step):
    return dataclasses.replace(state, step=jax.device_put(np.int32(step), state.step.sharding))


def test_restored_to_the_bit_on_another_mesh(tmp_path):
    state = at(state_on(data=4, fsdp=2), 7)
    store = Checkpoints(tmp_path)
    store.save(state)
    store.wait()
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
        store.save(at(state, step), metric)
        store.save(at(state, step), metric)  # twice does no harm
        store.wait()
        store.close()
    store = Checkpoints(tmp_path, config)
    assert store.steps == [1, 4, 5]
    assert store.best == 1


def test_a_model_of_another_shape_is_refused_with_the_leaf_named(tmp_path):
    store = Checkpoints(tmp_path)
    store.save(state_on())
    store.wait()
    with pytest.raises(ValueError, match=r"another model(.|\n)*embedding.*float32\[16, 16\].*float32\[20, 16\]"):
        store.restore(state_on(dataclasses.replace(CONFIG, vocab_size=20)))
    with pytest.raises(ValueError, match=r"no checkpoint of step 3 .*there are \[0\]"):
        store.restore(state_on(), 3)


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    store = Checkpoints(tmp_path)
    store.save(state_on())
    store.wait()
    store.close()
    (tmp_path / "9.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    store = Checkpoints(tmp_path)
    assert store.steps == [0]
    assert jnp.isfinite(store.restore(state_on()).params["embedding"]).all()


@pytest.mark.parametrize("changes", [{"every": 0}, {"keep_latest": 0}, {"keep_best": -1}])
def test_bad_configuration(changes):
    with pytest.raises(ValueError, match="must be 1 or more"):
        CheckpointConfig(**changes)

import dataclasses
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import hosts, objectives, sharding, training
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
    watching = Checkpoints(tmp_path, read_only=True)
    for one in (store, watching):
        assert one.steps == [1, 4, 5]


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


def bits(state):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


def removed(path):
    path.unlink()


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A directory with checkpoints of steps 1 and 2, and their states."""
    place, state = tmp_path_factory.mktemp("two") / "checkpoints", state_on()
    states = {1: at(jax.tree.map(lambda x: x + 1, state), 1), 2: at(state, 2)}
    store = Checkpoints(place)
    for of in states.values():
        save(store, of, 0.5)
    store.close()
    return place, states


def damaged(two, tmp_path, damage, names):
    """A copy in which files of step 2 are damaged."""
    place = tmp_path / "checkpoints"
    shutil.copytree(two[0], place)
    for name in names:
        damage(place / name)
    return place


@pytest.mark.parametrize("damage", [removed, truncated, flipped])
def test_whatever_happens_to_a_file_what_is_restored_is_what_was_saved(two, tmp_path, damage):
    names = [path.relative_to(two[0]) for path in sorted((two[0] / "2").rglob("*")) if path.is_file()]
    assert len(names) > 10
    taken, reasons = {}, ""
    for i, name in enumerate(names):
        said: list[str] = []
        place = damaged(two, tmp_path / str(i), damage, [name])
        reader = Checkpoints(place, read_only=True, say=said.append)
        read = reader.restore(two[1][1])
        assert reader.steps == [1, 2]
        store = Checkpoints(place, say=said.append)
        restored = store.restore(two[1][1])
        taken[name] = step = int(restored.step)
        assert bits(restored) == bits(read) == bits(two[1][step])
        bad = tmp_path / str(i) / "checkpoints_bad"
        assert (bad / "2").exists() == (step == 1)
        assert store.steps == list(range(1, step + 1))
        if step == 1:
            assert all(line.startswith("checkpoint 2 is bad (") and "\n" not in line for line in said)
            assert [line.partition("): ")[2] for line in said] == [
                "left where it is; taking that of step 1.", f"set aside in {bad / '2'}; taking that of step 1.",
            ]  # fmt: skip
            save(store, two[1][2])  # which comes again
            assert bits(store.restore(two[1][1])) == bits(two[1][2])
        store.close()
        reasons += "".join(said)
    of_the_state = [name for name in names if {"d", "manifest.ocdbt", "_CHECKPOINT_METADATA"} & {*name.parts}]
    # Some files are not read, and some bytes mean nothing; what holds the state, or says what it is, must be seen.
    assert sum(taken[name] == 1 for name in of_the_state) >= 4, taken
    assert ("arrays are not what was saved" in reasons) == (damage is flipped)  # Orbax itself does not see it


def test_where_none_is_good_nothing_is_touched(two, tmp_path):
    place = damaged(two, tmp_path, removed, ["1/state/manifest.ocdbt", "2/state/manifest.ocdbt"])
    before = sorted(place.rglob("*"))
    for read_only in (False, True):
        with pytest.raises(ValueError, match=r"can be read, and nothing was changed there:\n  step 2: .*\n  step 1: "):
            Checkpoints(place, read_only=read_only).restore(two[1][1])
    assert sorted(place.rglob("*")) == before
    assert not (tmp_path / "checkpoints_bad").exists()


def test_a_bad_step_that_is_asked_for_by_name_is_an_error(two, tmp_path):
    place = damaged(two, tmp_path, truncated, ["2/state/manifest.ocdbt"])
    with pytest.raises(ValueError, match=r"checkpoint 2 in .* cannot be read: .*There are \[1, 2\]"):
        Checkpoints(place).restore(two[1][1], 2)
    assert (place / "2").exists()


def test_another_model_is_not_set_aside(two, tmp_path):
    place = damaged(two, tmp_path, truncated, [])
    with pytest.raises(ValueError, match="is of another model"):
        Checkpoints(place).restore(state_on(dataclasses.replace(CONFIG, vocab_size=20)))
    assert (place / "2").exists()


def test_what_one_process_cannot_read_is_bad_for_all(two, tmp_path, monkeypatch):
    """Here as the process that could read it: the other says no to the first question about step 2."""
    answers, place = iter([True]), damaged(two, tmp_path, truncated, [])
    store = Checkpoints(place)
    monkeypatch.setattr(hosts, "agreed", lambda here: here or next(answers, False))
    assert int(store.restore(two[1][1]).step) == 1
    assert (tmp_path / "checkpoints_bad" / "2").exists()


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(WorkdirError, match=r"cannot write checkpoints in .*/checkpoints: .*Mend this first"):
        Checkpoints(tmp_path / "checkpoints")


@pytest.mark.parametrize("changes", [{"every": 0}, {"keep_latest": 0}, {"keep_best": -1}])
def test_bad_configuration(changes):
    with pytest.raises(ValueError, match="must be 1 or more"):
        CheckpointConfig(**changes)

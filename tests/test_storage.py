"""Runs in a store: refused at the start where they cannot be, whole whatever is cut off, and of the same bits."""

import contextlib
import itertools
import json
import pathlib
import re

import fsspec
import jax
import numpy as np
import pytest

from experiments import process, runs, scorers
from grpo_jax import loop, sharding, storage, workdirs
from grpo_jax.checkpoints import CheckpointConfig, CheckpointError, Checkpoints
from grpo_jax.telemetry import RewardJournal, WorkdirError, read_jsonl
from tests import object_store, processes
from tests.ends import last_state, untimed
from tests.test_checkpoints import at, save, state_on
from tests.test_loop import double, experience, fresh
from tests.test_resume import TINY

pytest.importorskip("gcsfs")


@pytest.fixture(scope="module")
def bucket():
    with object_store.opened() as opened:
        yield opened


def test_what_is_no_place_for_a_run_is_one_line(bucket, monkeypatch):
    store, place = bucket
    with pytest.raises(ValueError, match=r"s3://there/a: expected a directory on disk, or gs://BUCKET"):
        storage.path("s3://there/a")
    with pytest.raises(ValueError, match=r"gs:/there/a: expected a directory on disk, or gs://BUCKET"):
        storage.path("gs:/there/a")
    with pytest.raises(ValueError, match=r"gs:// names no bucket"):
        storage.path("gs://")
    for sign in "*?[":
        with pytest.raises(ValueError, match=rf"gs://bucket/a{re.escape(sign)}b: names in a store must be without"):
            storage.path(f"gs://bucket/a{sign}b")
    with pytest.raises(ValueError, match=r"gs://nowhere/a cannot be used: the bucket 'nowhere' is not there") as error:
        storage.check(storage.path("gs://nowhere/a"))
    assert "\n" not in str(error.value)
    storage.check(place / "empty")
    storage.check(pathlib.Path("/nowhere"))  # whoever writes there says it

    def forbidden(method, name):
        raise object_store.Refused(403, "storage.objects.list access denied")

    monkeypatch.setattr(store, "before", forbidden)
    with pytest.raises(ValueError, match=r"may not be read.*storage\.objects\.list access denied"):
        storage.check(place / "empty")
    with pytest.raises(WorkdirError, match=r"cannot write to workdir gs://bucket/a.*denied.*Choose another"):
        workdirs.open_workdir(place / "a", {})
    monkeypatch.undo()
    with pytest.raises(OSError, match="nowhere"):
        storage.write(storage.path("gs://nowhere/a"), b"")
    assert list(store.buckets) == ["bucket"]  # nobody makes one

    def missing(protocol):
        raise ImportError("Please install gcsfs to access Google Storage")

    storage._filesystem.cache_clear()
    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ValueError, match=r"needs gcsfs: pip install -e '\.\[gcs\]'"):
        storage.path("gs://bucket/a")


def test_what_a_paths_own_methods_raise_is_one_line(bucket, monkeypatch):
    store, place = bucket

    def ill(method, name):
        raise object_store.Refused(409, "not\nnow")

    monkeypatch.setattr(store, "before", ill)
    monkeypatch.setattr(process, "interruptible", lambda main: main([]))
    with pytest.raises(SystemExit, match=r"^error: Google Cloud Storage: HttpError: not now, 409$"):
        process.command(lambda argv: runs.saved_configuration(place / "a"))

    def bug(argv):
        raise KeyError("a")

    with pytest.raises(KeyError):
        process.command(bug)


def test_a_reward_model_is_looked_for_before_anything_begins(bucket):
    with pytest.raises(ValueError, match=r"gs://nobucket/rm cannot be used: the bucket 'nobucket' is not there"):
        scorers.OpenedScorer(scorers.RewardModelConfig(directory="gs://nobucket/rm"), sharding.make_mesh())


def test_files_and_directories_from_anywhere_to_anywhere(bucket, tmp_path):
    store, place = bucket
    (tmp_path / "here" / "in").mkdir(parents=True)
    large = np.random.default_rng(0).bytes(9_000_000)  # several chunks of an upload
    (tmp_path / "here" / "in" / "large").write_bytes(large)
    (tmp_path / "here" / "small").write_bytes(b"\r\n\n")
    storage.upload(tmp_path / "here", place / "there")
    storage.move(place / "there", place / "moved")
    assert store.files("bucket", "there/") == {}
    assert store.files("bucket", "moved/") == {"in/large": large, "small": b"\r\n\n"}
    storage.move(place / "moved" / "small", place / "moved" / "one")
    storage.copy(place / "moved" / "one", place / "moved" / "two")
    storage.copy(place / "moved" / "two", tmp_path / "two")
    with storage.fetched(place / "moved" / "in" / "large") as file:
        assert file.read_bytes() == large
    assert (tmp_path / "two").read_bytes() == b"\r\n\n"
    many = [place / "moved" / "many" / f"{i}" for i in range(2 * object_store.PAGE + 3)]  # three pages
    for file in many:
        storage.write(file, file.name.encode())
    assert storage.read_all([*many, place / "no"]) == [*(file.name.encode() for file in many), None]
    assert sorted(many[0].parent.iterdir()) == sorted(many)
    assert {path.name for path in (place / "moved").iterdir()} == {"in", "one", "two", "many"}
    storage.remove_tree(place / "moved")
    assert store.files("bucket", "moved/") == {}
    storage.remove_tree(place / "moved")  # there is none


def test_a_checkpoint_that_is_not_whole_is_not_seen_and_a_bad_one_is_set_aside(bucket):
    store, place = bucket
    place /= "set_aside/checkpoints"
    opened, state, said = Checkpoints(place, CheckpointConfig(keep_latest=3)), state_on(), []
    for step in (1, 2, 3):
        save(opened, at(state, step), metric=step / 10)
    opened.close()
    store.delete("bucket", "set_aside/checkpoints/3/commit_success.txt", {})  # as a kill leaves it
    assert Checkpoints(place, read_only=True).steps == [1, 2]
    arrays = {
        name: len(data) for name, data in store.files("bucket").items() if "set_aside/checkpoints/2/state/d/" in name
    }
    name = max(arrays, key=lambda name: arrays[name])
    data = store.files("bucket")[name]
    store.put("bucket", name, data[: len(data) // 2], {})
    before = store.files("bucket", "set_aside/checkpoints/2/")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Checkpoints(place, read_only=True).restore(state, 2)
    opened = Checkpoints(place, CheckpointConfig(keep_latest=2), say=said.append)
    assert store.files("bucket", "set_aside/checkpoints/3/") == {}  # at once: it may be written anew
    assert opened.steps == [1, 2]
    assert int(opened.restore(state).step) == 1
    assert "set aside in gs://bucket/set_aside/checkpoints_bad/2" in said[0]
    assert store.files("bucket", "set_aside/checkpoints_bad/2/") == before
    assert opened.steps == [1]
    save(opened, at(state, 2))  # as if it had never been
    assert [int(Checkpoints(place, read_only=True).restore(state, step).step) for step in (1, 2)] == [1, 2]
    opened.close()


def journaled(state, journal, interrupt):
    """Experience that comes from the journal, where it has that; the world never says the same twice."""
    step = int(state.step)
    known = journal.read(step, 0, "digest")
    if known is None:
        known = {"scores": {"r": [float(next(WORLD))]}}
        journal.write(step, 0, "digest", known)
    seen = experience(state, journal, interrupt)
    return type(seen)(**{**vars(seen), "batch": np.float32(known["scores"]["r"][0])})


WORLD = itertools.count()


def test_wherever_it_is_cut_off_the_next_start_ends_as_the_journal_says(bucket, monkeypatch):
    """The store is gone from one of its changes on, checkpoints included, and the run is started again.

    What was learned is what the journal holds: nothing that was used is forgotten, and nothing used that is not there.
    """
    store, place = bucket
    write = RewardJournal.write

    def run(workdir):
        checkpoints = CheckpointConfig(every=1)
        return loop.train(
            fresh(), steps=2, workdir=workdir, train_step=double, experience=journaled, checkpoints=checkpoints
        )  # fmt: skip

    store.asked.clear()
    run(place / "counted")
    changes = len([method for method, _ in store.asked if method != "GET"])
    assert changes > 40
    for number in range(0, changes, 6):
        workdir, left, used = place / f"cut{number}", itertools.count(), []

        def gone(method, name, left=left, number=number):
            gone.dead = gone.dead or (method != "GET" and next(left) >= number)
            if gone.dead:
                raise object_store.Refused(403, "gone")

        def recorded(self, step, *rest, used=used):
            write(self, step, *rest)
            used.append((step, rest[-1]["scores"]))  # from here on

        gone.dead = False
        with monkeypatch.context() as patched:
            patched.setattr(store, "before", gone)
            patched.setattr(RewardJournal, "write", recorded)
            with contextlib.suppress(WorkdirError, OSError, ValueError):
                run(workdir)
        assert gone.dead
        state, rows = run(workdir)
        assert [row["step"] for row in rows] == [0, 1, 2]
        journal = read_jsonl(workdir / "rewards.jsonl")
        assert [line["step"] for line in journal] == [0, 1]
        assert [journal[step]["scores"] for step, _ in used] == [scores for _, scores in used]
        expected = fresh()
        for line in journal:
            expected, _ = double(expected, np.float32(line["scores"]["r"][0]))
        np.testing.assert_array_equal(state.params["w"], expected.params["w"])
        assert untimed_rows(read_jsonl(workdir / "metrics.jsonl")) == untimed_rows(rows)
        assert not [name for name in store.files("bucket", f"cut{number}/") if ".parts/" in name]


def untimed_rows(rows):
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def test_a_journal_that_another_run_has_taken_over_ends_this_one_and_nothing_that_was_used_is_lost(bucket):
    _, place = bucket
    frozen = RewardJournal(place / "taken")
    frozen.write(0, 0, "digest", {"scores": {"r": [1.0]}})
    other = RewardJournal(place / "taken")
    other.write(1, 0, "digest", {"scores": {"r": [2.0]}})
    with pytest.raises(WorkdirError, match=r"^another run has written gs://bucket/taken/rewards\.jsonl"):
        frozen.write(1, 0, "digest", {"scores": {"r": [3.0]}})
    with pytest.raises(WorkdirError, match="another run has written"):
        frozen.close()
    other.close()
    assert [row["scores"]["r"] for row in read_jsonl(place / "taken" / "rewards.jsonl")] == [[1.0], [2.0]]


def countdown(workdir, at="", status=0):
    return processes.killed("countdown", at, f"--workdir={workdir}", *TINY, status=status)


def test_countdown_in_a_store_killed_and_started_again_ends_as_a_run_on_disk(bucket, tmp_path):
    store, place = bucket
    countdown(tmp_path / "straight")
    countdown(place / "runs" / "a", "save:5")
    assert json.loads(store.files("bucket", "runs/a/")[".lock"])["host"]
    done = countdown(place / "runs" / "a")
    assert "watching for up to 2 s whether that still runs" in done.stdout
    assert "everything is in gs://bucket/runs/a" in done.stdout
    straight = tmp_path / "straight"
    for name in ("metrics.jsonl", "samples.jsonl", "rewards.jsonl"):
        assert untimed_rows(read_jsonl(place / "runs" / "a" / name)) == untimed(straight / name), name
    found = store.files("bucket", "runs/a/")
    assert found["config.json"] == (straight / "config.json").read_bytes()
    assert json.loads(found["summary.json"])["steps"] == 6
    assert found["curve.png"].startswith(b"\x89PNG")
    assert len([name for name in found if name.startswith("tensorboard/events")]) == 1
    assert ".lock" not in found  # given back
    for name, data in found.items():  # where it can be compared
        if name.startswith("checkpoints/"):
            (tmp_path / "fetched" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "fetched" / name).write_bytes(data)
    ours, theirs = last_state(tmp_path / "fetched"), last_state(straight)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 20
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)


def test_a_profile_is_written_into_the_store(bucket):
    store, place = bucket
    loop.train(
        fresh(), steps=2, workdir=place / "profiled", train_step=double, experience=experience, profile=range(2, 3)
    )
    files = store.files("bucket", "profiled/profile/")
    assert any(name.endswith("perfetto_trace.json.gz") for name in files)


def test_deterministic_kernels_are_of_a_workdir_on_disk(bucket, monkeypatch):
    _, place = bucket
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match=r"--deterministic.*on disk alone, and --workdir is gs://bucket/x"):
        process.said_of_deterministic(place / "x")

import json
import os
import pathlib

import pytest

from grpo_jax.telemetry import RewardJournal, RunLog, WorkdirError, read_jsonl


def test_logs_are_cut_back_to_a_step_and_a_torn_line_is_dropped(tmp_path):
    log = RunLog(tmp_path, 0)
    for step in range(5):
        log.write(step, {"reward": step / 2, "kl": 0.1}, [{"completion": f"c{step}"}])
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')
    log = RunLog(tmp_path, 3)
    assert [row["step"] for row in log.rows] == [0, 1, 2, 3]
    log.write(4, {"reward": 9.0})
    log.close()
    assert [row["reward"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [0.0, 0.5, 1.0, 1.5, 9.0]
    assert [row["completion"] for row in read_jsonl(tmp_path / "samples.jsonl")] == ["c0", "c1", "c2", "c3"]
    (events,) = (tmp_path / "tensorboard").iterdir()  # one file, of the run as it now is
    assert events.stat().st_size > 200


def test_tensorboard_has_a_step_as_soon_as_it_is_written(tmp_path):
    log = RunLog(tmp_path, 0)
    (events,) = (tmp_path / "tensorboard").iterdir()
    for step in range(1, 4):
        before = events.stat().st_size
        log.write(step, {"reward": 1.0})
        assert events.stat().st_size > before
    log.close()


def test_journal_gives_back_what_was_recorded_for_the_same_completions_only(tmp_path):
    said = []
    journal = RewardJournal(tmp_path)
    assert journal.read(0, 0, "abc") is None
    journal.write(0, 0, "abc", {"scores": {"r": [0.1, None]}, "failed": {"r": [1]}})
    journal.close()
    journal = RewardJournal(tmp_path, said.append)
    assert journal.read(0, 0, "abc") == {"scores": {"r": [0.1, None]}, "failed": {"r": [1]}}
    assert journal.read(0, 0, "other") is None
    assert "step 0" in said[0]
    assert journal.read(1, 0, "abc") is None
    assert (journal.knows(0, 0), journal.knows(0, 1), journal.knows(1, 0)) == (True, False, False)
    journal.close()


def test_a_step_has_several_waves_and_a_journal_without_them_is_of_wave_0(tmp_path):
    (tmp_path / "rewards.jsonl").write_text('{"step": 3, "digest": "abc", "scores": {"r": [1.0]}}\n')
    journal = RewardJournal(tmp_path)
    assert journal.read(3, 0, "abc") == {"scores": {"r": [1.0]}}
    journal.write(4, 0, "first", {"scores": {"r": [1.0]}})
    journal.write(4, 1, "second", {"scores": {"r": [2.0]}})
    journal.close()
    journal = RewardJournal(tmp_path)
    assert journal.read(3, 1, "abc") is None
    assert journal.read(4, 0, "first") == {"scores": {"r": [1.0]}}
    assert journal.read(4, 1, "second") == {"scores": {"r": [2.0]}}
    journal.close()


def test_every_process_has_a_journal_of_its_own(tmp_path):
    for process in range(3):
        journal = RewardJournal(tmp_path, process=process)
        journal.write(0, 0, "abc", {"scores": {"r": [float(process)]}})
        journal.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rewards.1.jsonl", "rewards.2.jsonl", "rewards.jsonl"]
    for process in range(3):
        assert RewardJournal(tmp_path, process=process).read(0, 0, "abc") == {"scores": {"r": [float(process)]}}


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("rewards.jsonl", lambda path: RewardJournal(path).write(0, 0, "abc", {"scores": {}})),
        ("metrics.jsonl", lambda path: RunLog(path, 0).write(0, {"reward": 1.0})),
    ],
)
def test_a_full_disk_is_an_error_that_says_what_is_safe(tmp_path, monkeypatch, name, use):
    os.symlink("/dev/full", tmp_path / name)
    exists = pathlib.Path.exists
    monkeypatch.setattr(pathlib.Path, "exists", lambda path: path.name != name and exists(path))  # do not read it
    with pytest.raises(WorkdirError, match=rf"cannot write .*{name}.*No space left.*already saved are intact"):
        use(tmp_path)


def test_rows_are_plain_json(tmp_path):
    log = RunLog(tmp_path, 0)
    log.write(1, {"b": 2.0, "a": 1.0})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "a": 1.0, "b": 2.0}

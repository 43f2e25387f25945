import json
import tempfile

import pytest

from grpo_jax import hosts, workdirs
from grpo_jax.telemetry import WorkdirError


def test_workdir_of_another_configuration_is_refused_with_the_fields_named(tmp_path):
    config = {"loss": {"kl_coef": 0.04, "clip_low": 0.2}, "mesh": {"data": 1}}
    workdirs.open_workdir(tmp_path, {"loss": {"kl_coef": 1.0}})
    workdirs.open_workdir(tmp_path, config)  # nothing has been done there yet
    (tmp_path / "metrics.jsonl").touch()
    # A mesh may change, and how often there are checkpoints.
    workdirs.open_workdir(tmp_path, {**config, "mesh": {"data": 2}, "checkpoints": {"every": 3}})
    with pytest.raises(WorkdirError, match=r"loss\.kl_coef: there 0\.04, now 0\.0"):
        workdirs.open_workdir(tmp_path, {**config, "loss": {"kl_coef": 0.0, "clip_low": 0.2}})
    assert json.loads((tmp_path / "config.json").read_text())["loss"]["kl_coef"] == 0.04
    with pytest.raises(WorkdirError, match=r"x7: there 'absent', now 7\n  and 2 more\nGive the same flags"):
        workdirs.open_workdir(tmp_path, {**config, **{f"x{i}": i for i in range(12)}})


def test_the_workdir_of_another_experiment_is_said_to_be_one(tmp_path):
    workdirs.open_workdir(tmp_path, {"train": {"steps": 3}, "data": {"file": "a"}})
    (tmp_path / "metrics.jsonl").touch()
    ours = {name: {"a": 1} for name in ("train", "data", "loss", "rollout", "advantages", "mesh")}
    with pytest.raises(WorkdirError, match=r"is of another experiment: .* has advantages, loss, rollout\. "):
        workdirs.open_workdir(tmp_path, ours)


@pytest.mark.parametrize("name", ["model", "export", "metrics.jsonl", "checkpoints"])
def test_what_is_of_no_run_is_not_written_over(tmp_path, name, caplog):
    place = tmp_path / name
    place.mkdir() if "." not in name else place.write_text("mine")
    (tmp_path / "nohup.out").touch()
    with pytest.raises(WorkdirError, match=rf"has {name} and no config\.json, .*Choose another --workdir, or move"):
        workdirs.open_workdir(tmp_path, {})
    assert {path.name for path in tmp_path.iterdir()} <= {name, "nohup.out", ".lock"}
    place.rmdir() if "." not in name else place.unlink()
    workdirs.open_workdir(tmp_path, {})
    (said,) = [record.message for record in caplog.records]
    assert "is no run's and holds ['nohup.out']: the run's files will lie beside that" in said
    place.mkdir()  # what comes after config.json is of the run
    workdirs.open_workdir(tmp_path, {})


def test_a_damaged_configuration(tmp_path):
    (tmp_path / "config.json").write_text('{"loss":')
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(WorkdirError, match=r"config\.json is damaged \(Expecting value.*: put back what the run was"):
        workdirs.open_workdir(tmp_path, {})
    assert (tmp_path / "config.json").read_text() == '{"loss":'


def test_flags_that_processes_do_not_share_are_said_at_once(tmp_path, monkeypatch):
    config = {"loss": {"kl_coef": 0.04}, "mesh": {"data": 1, "fsdp": 4}}
    others = [config, {**config, "mesh": {"data": 2, "fsdp": 2}}]
    monkeypatch.setattr(hosts, "gathered", lambda value: [value, *others])
    said = r"given the same flags:\n  mesh\.data: process 0 has 1, process 2 has 2\n  mesh\.fsdp: "
    with pytest.raises(WorkdirError, match=said):
        workdirs.open_workdir(tmp_path, config)
    assert not [*tmp_path.iterdir()]
    others.pop()
    workdirs.open_workdir(tmp_path, config)


def test_unwritable_workdir(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match=r"cannot write to workdir .*Choose another --workdir"):
        workdirs.open_workdir(tmp_path / "file" / "below", {})


@pytest.mark.parametrize("obstacle", ["a file", "an immutable directory"])
def test_checkpoints_that_cannot_be_written_are_said_at_the_start(tmp_path, monkeypatch, obstacle):
    place = tmp_path / "checkpoints"
    if obstacle == "a file":
        place.write_text("")
    else:  # permissions do not hold root back
        place.mkdir()
        made = tempfile.NamedTemporaryFile

        def refused(*arguments, dir, **options):
            if dir == place:
                raise PermissionError(13, "Permission denied", str(dir))
            return made(*arguments, dir=dir, **options)

        monkeypatch.setattr(tempfile, "NamedTemporaryFile", refused)
    with pytest.raises(WorkdirError, match=r"cannot write checkpoints to workdir .*checkpoints"):
        workdirs.open_workdir(tmp_path, {})
    assert not (tmp_path / "config.json").exists()

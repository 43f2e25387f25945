"""Two runs on one workdir."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from grpo_jax import workdirs
from grpo_jax.locks import lock
from grpo_jax.telemetry import WorkdirError

ROOT = pathlib.Path(__file__).parent.parent
# Without JAX, which takes two seconds to import, until someone ends it.
HOLDER = """
import os, pathlib, sys
from grpo_jax.locks import lock
lock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
child = os.fork() if "fork" in sys.argv else 1  # a reward worker, for example, which outlives it
if child == 0:
    os.close(1)
sys.stdin.read()
"""


def holding(workdir: pathlib.Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLDER, str(workdir), *options]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_until_the_first_is_gone_even_by_sigkill(tmp_path):
    holder = holding(tmp_path, "fork")
    assert holder.stdin is not None
    try:
        for _ in range(2):  # to be refused changes nothing
            with pytest.raises(WorkdirError) as refused:
                workdirs.open_workdir(tmp_path, {})
            assert re.search(rf"is in use by process {holder.pid} on \S+, since \d{{4}}-\d\d-\d\d ", str(refused.value))
            assert "\n" not in str(refused.value)
        assert not (tmp_path / "config.json").exists()
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        workdirs.open_workdir(tmp_path, {})  # its child is alive, and holds nothing
    finally:
        holder.stdin.close()
    assert f'"pid": {os.getpid()}' in (tmp_path / ".lock").read_text()


def test_a_process_opens_its_workdir_as_often_as_it_likes_and_keeps_it(tmp_path):
    for _ in range(3):
        workdirs.open_workdir(tmp_path, {"train": {"steps": 1}})
    refused = subprocess.run(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, input="", capture_output=True, text=True, check=False
    )
    assert f"WorkdirError: workdir {tmp_path} is in use by process {os.getpid()}" in refused.stderr


def test_a_workdir_that_was_removed_is_locked_anew(tmp_path):
    workdir = tmp_path / "run"
    for _ in range(2):
        workdir.mkdir()
        lock(workdir)
        assert (workdir / ".lock").stat().st_size
        (workdir / ".lock").unlink()
        workdir.rmdir()


def test_where_a_file_system_has_no_locks_a_line_says_so(tmp_path, monkeypatch, capsys):
    def without(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", without)
    lock(tmp_path)
    assert "no lock (No locks available), a second run there would go unnoticed" in capsys.readouterr().out

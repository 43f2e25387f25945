import gzip
import json
import os
import signal

import jax
import pytest

from grpo_jax.profiling import steps_of
from grpo_jax.telemetry import WorkdirError, read_jsonl
from tests.test_loop import experience, run


def test_a_range_of_steps():
    assert steps_of("3:5", 8) == range(3, 6)
    assert steps_of(" 8:8 ", 8) == range(8, 9)
    assert not steps_of("", 8)
    assert not steps_of(None, 8)


@pytest.mark.parametrize("text", ["3", "5:3", "0:2", "a:b", "-1:2", "1:2:3", "3.5:4"])
def test_what_is_no_range_is_refused(text):
    with pytest.raises(ValueError, match=r"must be FIRST:LAST with 1 <= FIRST <= LAST, as 3:5"):
        steps_of(text, 8)


def test_a_range_beyond_the_last_step_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"the profile is of steps 7 to 9, and the run has steps 1 to 8"):
        steps_of("7:9", 8)
    with pytest.raises(ValueError, match=r"the profile is of step 9, and the run has steps 1 to 8"):
        run(tmp_path / "none", 8, profile=range(9, 10))
    assert not (tmp_path / "none").exists()


def traced(workdir):
    """Of the one trace: the steps in it, and the names of all that was going on."""
    (path,) = (workdir / "profile").glob("plugins/profile/*/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = [int(event["args"]["step_num"]) for event in events if event.get("name") == "step"]
    return sorted(steps), {event.get("name") for event in events}


def test_the_trace_holds_the_chosen_steps_and_their_parts(tmp_path, capsys):
    run(tmp_path, 8, profile=range(3, 6))
    steps, names = traced(tmp_path)
    assert steps == [3, 4, 5]
    assert {"experience", "update", "log", "checkpoint"} <= names
    assert any("double" in str(name) for name in names)  # the compiled update itself
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "profile" in line]
    assert line.startswith(f"profile: steps 3 to 5 in {tmp_path}/profile; look at it with `tensorboard --logdir=")


def test_a_run_that_goes_on_traces_what_it_has_not_done(tmp_path, capsys):
    run(tmp_path / "a", 4)
    run(tmp_path / "a", 8, profile=range(2, 7))
    assert traced(tmp_path / "a")[0] == [5, 6]
    run(tmp_path / "b", 4)
    capsys.readouterr()
    run(tmp_path / "b", 8, profile=range(2, 5))
    assert "profile: steps 2 to 4 were before this start of the run: nothing is traced" in capsys.readouterr().out
    assert not (tmp_path / "b" / "profile").exists()


@pytest.mark.parametrize("by", ["signal", "error"])
def test_an_interrupted_trace_is_written(tmp_path, by):
    def interrupted(state, journal, interrupt):
        if int(state.step) == 3 and by == "error":
            raise ArithmeticError
        if int(state.step) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return experience(state, journal, interrupt)

    with pytest.raises((SystemExit, ArithmeticError)):
        run(tmp_path, 9, experience=interrupted, profile=range(2, 9))
    assert traced(tmp_path)[0] == [2, 3, 4]  # the last of which was cut short
    with jax.profiler.trace(str(tmp_path / "another")):  # none is left open
        pass


def test_a_profile_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    (tmp_path / "profile").write_text("")
    with pytest.raises(WorkdirError, match=r"cannot write the profile of step 2 to .*profile"):
        run(tmp_path, 4, profile=range(2, 3))
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1, 2]

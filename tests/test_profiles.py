"""What a turn consists of: operations by hand, and those of a program that is run."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import profiles
from experiments.benchmarks.profiles import Profile, Profiled
from experiments.benchmarks.workload import Ours
from tests.test_benchmark_measure import TINY


@dataclasses.dataclass
class Event:
    name: str
    start_ns: float
    duration_ns: float
    stats: tuple = ()


@dataclasses.dataclass
class Line:
    name: str
    events: list[Event]


LOOP = Event("while.3", 0, 100), Event("dot.1", 10, 30), Event("fusion.12", 40, 20), Event("dot_2", 70, 30)


def test_a_loop_has_the_time_that_its_operations_have_not():
    events = profiles._operations("/device:GPU:0", Line("Stream #1(Compute)", [*LOOP, Event("dot", 100, 5)]))
    found = profiles._exclusive(reversed(events))
    assert sorted(found) == [(("", name), own) for name, own in
                             [("dot", 5), ("dot", 30), ("dot", 30), ("fusion", 20), ("while", 20)]]  # fmt: skip


def test_lines_that_say_the_same_again_do_not_count():
    names = "XLA Modules", "Steps", "XLA Ops", "Stream #7(Compute)"
    counts = [len(profiles._operations("/device:TPU:0", Line(name, [*LOOP]))) for name in names]
    assert counts == [0, 0, 4, 4]
    host = Event("dot.1", 0, 5, (("hlo_op", "dot.1"), ("hlo_module", "jit_f"))), Event("write", 0, 50)
    assert profiles._operations("/host:CPU", Line("a thread", [*host])) == [(0, 5, ("f", "dot"))]


def test_time_in_which_several_run_counts_once():
    assert profiles._union([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4


def test_table():
    lines = Profile(busy=0.5, operations={("f", "dot"): (0.4, 4), ("g", "add"): (0.2, 1), ("g", "sub"): (0.1, 1)})
    assert lines.table(1.0, 2).splitlines() == [
        "the profile of a turn of 1 s: devices were busy for 0.5 s; operations took 0.7 s together (f 0.4, g 0.3)",
        "",
        "| program | operation | seconds | times | us each |",
        "|---|---|---|---|---|",
        "| f | dot | 0.4 | 4 | 1e+05 |",
        "| g | add | 0.2 | 1 | 2e+05 |",
        "",
        "and 1 more of 0.1 s",
    ]


def test_a_program_is_named_with_its_operations(tmp_path):
    @jax.jit
    def square(x):
        return jax.lax.fori_loop(0, 7, lambda _, x: jnp.tanh(x @ x), x)

    x = jnp.ones((300, 300))
    square(x).block_until_ready()
    with jax.profiler.trace(str(tmp_path)):
        square(x).block_until_ready()
    profile = profiles.read(next(tmp_path.rglob("*.xplane.pb")))
    own = {name: value for (program, name), value in profile.operations.items() if program == "square"}
    assert max(times for _, times in own.values()) >= 7
    together = sum(seconds for seconds, _ in profile.operations.values())
    assert 0 < profile.busy <= together * (1 + 1e-12)  # the same where none ran beside another, added up otherwise


def test_a_turn_is_traced_where_it_is_asked_for(tmp_path):
    options = Profiled(**TINY, profile=str(tmp_path / "of"), operations=3)
    sample = Ours(options).rollout()
    sample()
    (table,) = profiles.profiled(options, sample)
    assert "decode" in table
    assert len([line for line in table.splitlines() if line.startswith("| ")]) == 1 + 3
    (trace,) = (tmp_path / "of").rglob("*.xplane.pb")
    assert f"The trace is in {trace.parent}: `tensorboard" in table
    assert profiles.profiled(dataclasses.replace(options, profile=""), pytest.fail) == []


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_where_no_profile_can_be_is_said_before_anything_runs(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=f"profile='.*/{place}' must be a directory, or make one: .*/file cannot"):
        Profiled(**TINY, profile=str(tmp_path / place))
    with pytest.raises(ValueError, match="operations=0 must be 1 or more"):
        Profiled(**TINY, operations=0)

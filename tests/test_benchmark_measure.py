"""What the benchmarks share: their workload, turns, report and command line."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments.benchmarks import measure, workload
from experiments.benchmarks.workload import Workload
from grpo_jax.models.transformer import init_params
from tests import processes

TINY = {"size": "tiny", "prompts": 2, "group": 3, "prompt_tokens": 5, "tokens": 8, "microbatches": 2, "rounds": 2}


def python(*command: str, status: int = 0) -> str:
    done = processes.python(*command, status=status, timeout=300, PYTHONPATH=str(processes.ROOT))
    return done.stdout + done.stderr


def test_turns_alternate_and_the_first_does_not_count():
    order, clock = [], iter(range(100))

    def side(name):
        def run():
            order.append(name)
            return {"seconds": next(clock)}

        return run

    measured = measure.turns({"ours": side("a"), "peer": side("b")}, 2)
    assert order == ["a", "b"] * 3
    assert measured == {"ours": {"seconds": [2, 4]}, "peer": {"seconds": [3, 5]}}


def test_report_by_hand():
    options = measure.Options(rounds=3, seed=7)
    measured = {
        "ours": {"seconds": [1.0, 2.0, 4.0], "tokens_per_second": [30.0, 20.0, 10.0]},
        "peer": {"seconds": [3.0, 4.0, 4.0], "tokens_per_second": [10.0, 10.0, 10.0]},
    }
    result = measure.report("experiments.benchmarks.step", options, measured)
    assert result["ratios"]["peer"]["seconds"] == {"median": 2.0, "min": 1.0, "max": 3.0, "values": [3.0, 2.0, 1.0]}
    assert result["ratios"]["peer"]["tokens_per_second"]["values"] == [3.0, 2.0, 1.0]
    assert result["command"] == "python -m experiments.benchmarks.step --rounds=3 --seed=7"
    assert "| seconds | 2 (1..4) | 4 (3..4) | 2 (1..3) |" in measure.table(result)


def test_busy_machine_is_named(monkeypatch):
    for busy, said in ((1.5, True), (0.1, False), (None, False)):
        monkeypatch.setattr(measure, "_busy_cores", lambda busy=busy: busy)
        result = measure.report("experiments.benchmarks.step", measure.Options(), {"ours": {"seconds": [1.0]}})
        assert ("others kept 1.5 cores busy" in measure.said(result)) == said


def test_limits():
    full, geometric = Workload(**TINY), Workload(lengths="geometric", prompts=64, group=64, tokens=400)
    assert (full.limits == 8).all()
    assert full.limits.shape == (2, 3)
    drawn = geometric.limits
    assert drawn.min() >= 1
    assert drawn.max() == 400  # cut
    # Mean of a geometric with mean m cut at T: m (1 - (1 - 1/m)^T); level 4 standard errors of 4,096 draws.
    assert drawn.mean() == pytest.approx(100 * (1 - 0.99**400), abs=4 * 100 / 64)
    assert (drawn == dataclasses.replace(geometric, rounds=9).limits).all()
    assert (drawn != dataclasses.replace(geometric, seed=1).limits).any()


@pytest.mark.parametrize("size", workload.SIZES)
def test_sizes(size):
    """What their names say."""
    config = Workload(size=size).model
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    count = sum(x.size for x in jax.tree.leaves(shapes))
    named = {"tiny": 2.3e4, "1m": 1e6, "5m": 5e6, "20m": 2e7, "0.1b": 1e8, "0.5b": 4.94e8, "1.5b": 1.54e9}
    assert count == pytest.approx(named[size], rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "7b"}, "must be one of tiny, 1m"),
        ({"lengths": "normal"}, "must be one of full, geometric"),
        ({"microbatches": 3}, "microbatches=3 must divide prompts x group = 64"),
        ({"peer_microbatches": 0}, "peer_microbatches=0 must divide prompts x group = 64"),
        ({"group": 1}, "group 2 or more"),
        ({"rounds": 0}, "must be 1 or more"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Workload(**options)


def test_missing_peer(monkeypatch):
    monkeypatch.setattr(measure.importlib.util, "find_spec", lambda name: None if name == "trl" else object())
    with pytest.raises(ValueError, match=r"trl not installed: pip install -e '\.\[parity\]'"):
        measure.need("torch", "trl")


def test_peak_is_of_this_process_alone():
    """A large parent does not count, as it does in ru_maxrss."""
    held = np.ones(2**27, np.uint8)
    code = "from experiments.benchmarks import measure; print(measure.rss(), measure.peak_rss())"
    now, peak = map(int, python("-c", code).split()[-2:])
    assert measure.rss() > held.nbytes
    assert now <= peak < measure.rss()


# The command line ------------------------------------------------------------------------------------


PROGRAM = """
import dataclasses, jax
from experiments.benchmarks import measure

@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(measure.Options):
    names: tuple[str, ...] = ("a", "b")  # of sides
    scale: float = 1.0  # of all

def run(options):
    sides = {name: lambda: {"seconds": options.scale} for name in ("ours", *options.names)}
    return measure.report("experiments.benchmarks.program", options, measure.turns(sides, options.rounds))

measure.command(Options, run)
"""


def test_command_line(tmp_path):
    out, program = tmp_path / "out.json", tmp_path / "program.py"
    program.write_text(PROGRAM)
    shown = python(str(program), "--names=x,y", "--scale=0.5", "--rounds=3", f"--json={out}")
    written = json.loads(out.read_text())
    assert measure.table(written) in shown
    assert written["command"] == "python -m experiments.benchmarks.program --rounds=3 --names=x,y --scale=0.5"
    assert {side: of["seconds"]["values"] for side, of in written["measured"].items()} == dict.fromkeys(
        ("ours", "x", "y"), [0.5] * 3
    )
    assert "of sides" in python(str(program), "--helpshort", status=1)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--size=7b", "error: size='7b' must be one of tiny"),
        ("--json=nowhere/x.json", "error: --json=nowhere/x.json: there is no directory"),
    ],
)
def test_bad_flag_is_a_line(flag, message):
    shown = python("-m", "experiments.benchmarks.step", flag, status=1)
    assert message in shown
    assert "Traceback" not in shown

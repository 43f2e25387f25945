"""What tests of the sandbox and of the reward of code share."""

import contextlib
import pathlib
import time
import uuid

import pytest

from grpo_jax.rewards import programs, sandbox
from grpo_jax.rewards.code import CodeConfig, CodeReward

TESTS = [{"call": "f", "args": [[3, 1, 2], 2], "result": 12}, "assert f([5], 3) == 15", "assert f([], 1) == 0"]
HONEST = "def f(numbers, k):\n    return k * sum(numbers)\n"
LIMITS = {"cpu_seconds": 1.0, "wall_seconds": 60.0, "memory_mib": 128, "file_mib": 4, "output_kib": 64, "processes": 8}


@contextlib.contextmanager
def marked():
    """A text in the command line of every process of sandboxes, and of all that are forked of them."""
    visible, mark = programs._visible, f"/mark-{uuid.uuid4().hex}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "_visible", lambda: [*visible(), mark])
        yield mark


@contextlib.contextmanager
def by(found):
    """Sandboxes are made with this isolation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "isolation", lambda: found)
        yield


@contextlib.contextmanager
def reward(mark, **limits):
    """A reward of code by one worker, which leaves nothing behind."""
    before = processes(mark)
    made = CodeReward(CodeConfig(workers=1, **{**LIMITS, **limits}))
    made._sandbox.run(sandbox.Job(program=""))  # its processes are there, for whoever else counts them
    yield made
    made.close()
    end = time.monotonic() + 30
    while processes(mark) > before and time.monotonic() < end:  # fewer where one was about to end before
        time.sleep(0.05)
    assert processes(mark) <= before


def processes(mark, mechanism=""):
    """How many processes there are with this text in their command line, or of one mechanism, zombies left out."""
    count = 0
    for place in pathlib.Path("/proc").iterdir():
        if place.name.isdigit():
            with contextlib.suppress(OSError):
                line = (place / "cmdline").read_text()
                count += mark in line and (not mechanism or f'"mechanism": "{mechanism}"' in line)
    return count


def settled(mark, expected, seconds=30, mechanism=""):
    """Waits for the number of processes to become what is expected, and gives it."""
    end = time.monotonic() + seconds
    while (count := processes(mark, mechanism)) != expected and time.monotonic() < end:
        time.sleep(0.05)
    return count


def judge(reward, *completions, tests=TESTS, **columns):
    """What the reward says of completions of one prompt."""
    n = len(completions)
    return reward(
        prompts=["p"] * n, completions=list(completions), completion_ids=[[1]] * n, tests=[tests] * n,
        **{name: [value] * n for name, value in columns.items()}, other_column=[0] * n,
    )  # fmt: skip

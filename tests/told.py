"""Runs an experiment that says, into a pipe, which part of a step it is in: `tests.chaos` kills it there.

    TOLD_IN=gsm8k TOLD_TO=3 python -m tests.told --workdir=...

Lines: `step N`, `> PART` when it begins and `< PART` when it ends. Parts are what a profile shows (`rollout`,
`rewards`, `update`, `log`, `evaluation` and what is around them), the journal's writes as `rewards` too, `save` (from
the call of Orbax until all is on disk, in the background) and `export`.
"""

import contextlib
import functools
import importlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

PIPE = int(os.environ["TOLD_TO"])
os.set_inheritable(PIPE, False)  # it is to end with this process


def tell(line: str) -> None:
    """In one write, so that threads do not mix."""
    os.write(PIPE, f"{line}\n".encode())


@contextlib.contextmanager
def part(name: str, **_: Any) -> Iterator[None]:
    """Tells that a part begins, and that it ends."""
    tell(f"> {name}")
    try:
        yield
    finally:
        tell(f"< {name}")


@contextlib.contextmanager
def step(name: str, step_num: int) -> Iterator[None]:
    """Tells which step it is."""
    tell(f"step {step_num}")
    yield


def told(module: Any, name: str, as_part: str) -> None:
    """Has calls of a function tell that it is one of the parts."""
    original = getattr(module, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with part(as_part):
            return original(*args, **kwargs)

    setattr(module, name, wrapped)


def told_in_background(original: Callable[..., Any]) -> Callable[..., Any]:
    """The same for what goes on after the call, and has a `result`."""

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        tell("> save")
        response = original(*args, **kwargs)

        def wait() -> None:
            with contextlib.suppress(Exception):  # which the loop hears of, too
                response.result()
            tell("< save")

        threading.Thread(target=wait, daemon=True).start()
        return response

    return wrapped


jax.profiler.TraceAnnotation, jax.profiler.StepTraceAnnotation = part, step  # pyright: ignore[reportAttributeAccessIssue]

from experiments import process, runs  # noqa: E402  its loop remembers what annotates
from grpo_jax import telemetry  # noqa: E402

told(telemetry.RewardJournal, "write", "rewards")
told(runs, "export", "export")
saver = ocp.training.Checkpointer
saver.save_checkpointables_async = told_in_background(saver.save_checkpointables_async)
process.command(importlib.import_module(f"experiments.{os.environ['TOLD_IN']}").main)

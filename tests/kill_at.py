"""Runs the experiment of KILL_IN and kills it, with SIGKILL or another, at a moment of a step.

    KILL_IN=countdown KILL_AT=rewards:3 KILL_WITH=SIGKILL python -m tests.kill_at --workdir=...

Moments of step n, which counts from 0, in their order: `rollout` (sampled, not scored), `rewards` (scored, not
journaled), `journal` (journaled, not used), `update` (updated, not logged), `log` (logged, not saved), `save` (while
the background writer is at work).
"""

import importlib
import os
import signal

from experiments import process
from grpo_jax import checkpoints, leases, rollouts, telemetry

leases.RENEWAL, leases.PATIENCE = 0.5, 2.0  # who is killed in a store is started again at once
MOMENT, _, STEP = os.environ.get("KILL_AT", "").partition(":")


def kill(moment: str, module: object, name: str, step_of, after: bool = False) -> None:
    """Kills this process before, or after, the call of `name` that belongs to the wanted step."""
    original = getattr(module, name)

    def wrapped(*args, **kwargs):
        wanted = step_of(*args) == int(STEP)
        if wanted and not after:
            os.kill(os.getpid(), getattr(signal, os.environ["KILL_WITH"]))
        result = original(*args, **kwargs)
        if wanted and after:
            os.kill(os.getpid(), getattr(signal, os.environ["KILL_WITH"]))
        return result

    if moment == MOMENT:
        setattr(module, name, wrapped)


kill("rollout", rollouts, "journaled_scores", lambda *args: args[-2])
kill("rewards", telemetry.RewardJournal, "write", lambda self, step, *_: step)
kill("journal", telemetry.RewardJournal, "write", lambda self, step, *_: step, after=True)
kill("update", telemetry.RunLog, "write", lambda self, step, *_: step - 1)
kill("log", telemetry.RunLog, "write", lambda self, step, *_: step - 1, after=True)
kill("save", checkpoints.Checkpoints, "save", lambda self, state, *_: int(state.step) - 1, after=True)
process.command(importlib.import_module(f"experiments.{os.environ['KILL_IN']}").main)

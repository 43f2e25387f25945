"""Runs `experiments.countdown` and kills it (SIGKILL, or another signal) at a phase of a step.

KILL_AT=rewards:3 python -m tests.kill_at --workdir=...   (phases: rollout, rewards, update, log, save)
"""

import os
import signal

from experiments import countdown
from grpo_jax import checkpoints, rollouts, telemetry


def _kill_before(module: object, name: str, phase: str, step_of) -> None:
    wanted, _, step = os.environ["KILL_AT"].partition(":")
    number = getattr(signal, os.environ.get("KILL_WITH", "SIGKILL"))
    original = getattr(module, name)

    def wrapped(*args, **kwargs):
        if phase == wanted and step_of(*args, **kwargs) == int(step):
            if phase == "save":  # in the middle: the background writer has begun
                original(*args, **kwargs)
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(module, name, wrapped)


if os.environ.get("KILL_AT"):

    def _journaled_step(rewards, prompts, rollout, tokenizer, group_size, journal, step):
        return step

    # Steps are counted from 0, as in the state before the update.
    _kill_before(rollouts, "_journaled_scores", "rollout", _journaled_step)
    _kill_before(telemetry.RewardJournal, "write", "rewards", lambda self, step, digest, scores: step)
    _kill_before(telemetry.RunLog, "write", "update", lambda self, step, *_: step - 1)
    _kill_before(checkpoints.Checkpoints, "save", "save", lambda self, state, *_: int(state.step) - 1)

countdown.run()

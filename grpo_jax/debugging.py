"""`--debug_nans`: which operation made the first NaN. Slow, since every operation is asked; it is for finding."""

import traceback
from collections.abc import Callable, Mapping

import jax
from jax.experimental import checkify

from grpo_jax.guard import NotFiniteError
from grpo_jax.types import PyTree, TrainState

__all__ = ["naming_nans"]

_Step = Callable[[TrainState, PyTree], tuple[TrainState, Mapping[str, jax.Array]]]


def naming_nans(train_step: _Step) -> _Step:
    """A train step that does the same and stops at the first optimizer step that is not finite, with the reason.

    By `checkify`, since `jax_debug_nans` does not look into `jax.checkpoint`. NaNs that are masked out afterwards, and
    skip no step, are no reason to stop; where one is skipped later in the same rollout step, they are named too.

    Args:
      train_step: as `loop.train` takes it, with the metric `skipped`. Its state is not donated here, which takes
        twice the memory; and on one device, since `checkify` does not get through `shard_map` over several.

    Raises:
      NotFiniteError: of the step that is returned: a step was skipped. It names the first operation that gave a NaN,
        its file and line.
    """
    return _NamingNans(train_step)


class _NamingNans:
    def __init__(self, train_step: _Step):
        self._checked = jax.jit(checkify.checkify(train_step, errors=checkify.nan_checks))
        self.lower = self._checked.lower  # of a jitted function, so that it is compiled beside the others

    def __call__(self, state: TrainState, batch: PyTree) -> tuple[TrainState, Mapping[str, jax.Array]]:
        error, (after, metrics) = self._checked(state, batch)
        if int(metrics["skipped"]):
            raise NotFiniteError(f"step {int(after.step)} is not finite: {_named(error)}")
        return after, metrics


def _named(error: checkify.Error) -> str:
    try:
        error.throw()
    except Exception as raised:
        said, frames = (
            str(raised).strip().splitlines()[0],
            traceback.extract_tb((raised.__cause__ or raised).__traceback__),
        )
        library = lambda frame: "site-packages" in frame.filename and __package__ not in frame.filename
        ours = [frame for frame in frames if not library(frame)] or list(frames)
        where = (
            f"{ours[-1].filename}:{ours[-1].lineno} ({ours[-1].name}): {ours[-1].line}"
            if ours
            else "nobody knows where"
        )
        return f"{said.rstrip('.')} at {where}"
    return "no operation made a NaN: it is an inf, of an overflow or a division by zero"

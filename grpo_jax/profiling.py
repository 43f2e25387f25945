"""Traces of chosen steps: what the host and the devices did when, for TensorBoard and Perfetto."""

import contextlib
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator

import jax

from grpo_jax import storage
from grpo_jax.storage import Path
from grpo_jax.telemetry import WorkdirError

__all__ = ["Profiler", "check_steps", "options", "steps_of"]


def options() -> jax.profiler.ProfileOptions:
    """How is traced: without every call of Python, which would drown the rest, and slow it."""
    chosen = jax.profiler.ProfileOptions()
    chosen.python_tracer_level = 0
    return chosen


def steps_of(text: str | None, steps: int) -> range:
    """The steps that `FIRST:LAST` names, both included and counted from 1; none where it is empty.

    Raises:
      ValueError: it is no such range, or beyond the last of `steps`.
    """
    if not text or not text.strip():
        return range(0)
    if not (match := re.fullmatch(r"\s*(\d+):(\d+)\s*", text)) or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--profile={text!r} must be FIRST:LAST with 1 <= FIRST <= LAST, as 3:5 for steps 3, 4 and 5.")
    chosen = range(int(match[1]), int(match[2]) + 1)
    check_steps(chosen, steps)
    return chosen


def check_steps(chosen: range, steps: int) -> None:
    """Raises ValueError where a run of `steps` has not all of the chosen ones."""
    if chosen and not (chosen.step == 1 <= chosen[0] and chosen[-1] <= steps):
        raise ValueError(
            f"the profile is of {_words(chosen)}, and the run has steps 1 to {steps}: choose among these, in one piece."
        )


def _words(chosen: range) -> str:
    return f"step {chosen[0]}" if len(chosen) == 1 else f"steps {chosen[0]} to {chosen[-1]}"


class Profiler:
    """Traces a range of steps with `jax.profiler`, in one trace, which is written when the last of them has ended."""

    def __init__(self, directory: Path, chosen: range, done: int, say: Callable[[str], None] = print):
        """`done`: steps before this start of the run; of those chosen, only what comes after them is traced."""
        self._directory, self._say = directory, say
        self._scratch: tempfile.TemporaryDirectory[str] | None = None  # for a store: JAX writes on disk
        self._chosen = range(max(done + 1, chosen.start), chosen.stop)
        self._traced = range(0)  # steps in the trace that is open
        if chosen and not self._chosen:
            say(f"profile: {_words(chosen)} were before this start of the run: nothing is traced")

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step, from 1; where an exception leaves it, `close` writes what there is."""
        if number in self._chosen:
            if not self._traced:
                self._start()
            self._traced = range(self._traced.start if self._traced else number, number + 1)
        with jax.profiler.StepTraceAnnotation("step", step_num=number):
            yield
        if number + 1 not in self._chosen:
            self.close()

    def _start(self) -> None:
        if storage.is_remote(self._directory):
            self._scratch = tempfile.TemporaryDirectory(prefix="grpo_jax_profile_")
        place = self._scratch.name if self._scratch else self._directory
        jax.profiler.start_trace(place, create_perfetto_trace=True, profiler_options=options())

    def close(self) -> None:
        """Writes the trace, if one is open.

        Raises:
          WorkdirError: it cannot be written.
        """
        traced, self._traced = self._traced, range(0)
        if not traced:
            return
        try:
            jax.profiler.stop_trace()
            if self._scratch:
                storage.upload(pathlib.Path(self._scratch.name), self._directory)
                self._scratch.cleanup()
        except (OSError, jax.errors.JaxRuntimeError) as error:
            raise WorkdirError(f"cannot write the profile of {_words(traced)} to {self._directory}: {error}") from error
        self._say(
            f"profile: {_words(traced)} in {self._directory}; look at it with `tensorboard --logdir={self._directory}` "
            "(pip install tensorboard xprof), or open the perfetto_trace.json.gz in it at https://ui.perfetto.dev"
        )

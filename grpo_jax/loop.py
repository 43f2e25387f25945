"""The one training loop: state[n+1] = update(state[n], experience(state[n])), with everything around it.

A run is a pure function of its configuration, its seed and the recorded rewards. Step n's rewards are on
disk before its update, and its log line before its checkpoint; so a run that is killed at any moment and
started again goes on from the newest checkpoint, with its logs cut back to it, to the same bits.
"""

import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, Protocol

import jax
import numpy as np
import optax

from grpo_jax import hosts, incidents, preemption
from grpo_jax.checkpoints import PATIENCE, CheckpointConfig, Checkpoints
from grpo_jax.profiling import Profiler, check_steps
from grpo_jax.rewards import RewardError
from grpo_jax.rollouts import Experience
from grpo_jax.scoring import Journal
from grpo_jax.screen import Screen, say
from grpo_jax.storage import Path
from grpo_jax.telemetry import RewardJournal, RunLog, WorkdirError
from grpo_jax.types import PyTree, TrainState

__all__ = ["Evaluation", "StopSignals", "Stopped", "train"]


class Evaluation(Protocol):
    """What measures parameters: `evaluation.Evaluator`, or one's own."""

    def greedy(self, params: PyTree, interrupt: Callable[[], None] = ...) -> dict[str, float]:
        """In between: `eval/accuracy`, by which checkpoints are kept, and what else is quick."""
        ...

    def full(self, params: PyTree, interrupt: Callable[[], None] = ...) -> dict[str, float]:
        """Before and after."""
        ...


class Stopped(BaseException):
    """A signal asked the run to stop: as a KeyboardInterrupt, nothing on the way takes it for an error."""


class StopSignals:
    """Turns SIGTERM and SIGINT into a flag that the loop looks at; the second one kills as usual.

    A notice of preemption (`preemption.notice`) is as a SIGTERM, which may then follow, and kills nothing.

    Of several processes each looks at the flags of all, at the same moments, so that all stop at the same step.

    A handler does not run while the main thread waits inside a compiled program, which is why sampling
    comes back to the host every few tokens.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._notice = preemption.notice()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        def handle(number: int, frame: FrameType | None) -> None:
            self.received = number
            self._restore()

        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, handle)
        except ValueError:  # not in the main thread, for example in a notebook's worker: no handlers there
            self._before.clear()
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def heard(self) -> int | None:
        """The signal that has come, to this process or another; all must ask."""
        own = self.received or (signal.SIGTERM if self._notice.is_set() else 0)
        if number := hosts.agreed(own):
            self.received = number
        return number or None

    @property
    def name(self) -> str:
        """Of what has come; empty: nothing has."""
        return "preempted" if self._notice.is_set() else signal.Signals(self.received).name if self.received else ""

    def check(self) -> None:
        """Raises Stopped once a signal has come, to this process or another; all must ask."""
        if self.heard() is not None:
            raise Stopped


def train(
    state: TrainState,
    *,
    train_step: Callable[[TrainState, PyTree], tuple[TrainState, Mapping[str, jax.Array]]],
    experience: Callable[[TrainState, Journal, Callable[[], None]], Experience],
    steps: int,
    workdir: Path,
    learning_rate: optax.Schedule | None = None,
    evaluator: Evaluation | None = None,
    evaluate_every: int = 50,
    samples_every: int = 50,
    checkpoints: CheckpointConfig = CheckpointConfig(),
    title: str = "train",
    profile: range = range(0),
    max_skipped: int = 5,
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Runs, or goes on with, the run in `workdir` until it has done `steps` steps.

    Args:
      state: the state before step 0, which also says where everything lies; its shapes alone
        (`training.abstract_train_state`) where there is a checkpoint.
      train_step: `(state, batch) -> (state, metrics)`, of the batches of `experience`; the state is donated.
      experience: `(state, journal, interrupt) -> Experience`: what the step learns from.
      steps: rollout steps in all.
      workdir: gets `checkpoints/`, `metrics.jsonl`, `samples.jsonl`, `rewards.jsonl`, `tensorboard/`.
      learning_rate: of the optimizer step, for the log.
      evaluator: measures the parameters; in full before and after, greedily in between.
      evaluate_every: steps between evaluations.
      samples_every: steps between sampled completions on the screen and in `samples.jsonl`.
      checkpoints: when to save and what to keep.
      title: of the progress bar.
      profile: the steps, from 1, of which a trace is written to `WORKDIR/profile/`.
      max_skipped: optimizer steps in a row that may be skipped, by the metric `skipped_in_a_row`.

    Returns:
      The last state, and the log: one dictionary of metrics a step, with evaluations under `eval/`.

    Raises:
      SystemExit: a signal came (128 + its number): the last finished step is saved.
      ValueError: steps to profile that the run does not have.
      WorkdirError: something cannot be written. RewardError: a reward function misbehaved.
      NotFiniteError: too many optimizer steps in a row were not finite; `not_finite.json` holds what was seen.
    """
    check_steps(profile, steps)
    store = Checkpoints(workdir / "checkpoints", checkpoints)
    state = _begin(store, state, steps, title, workdir)
    step = begun = int(state.step)
    first = hosts.is_first()  # it alone writes, but for the rewards: all have their own
    files = lambda: (RunLog(workdir, step, write=first), RewardJournal(workdir, say, jax.process_index()))
    log, journal = hosts.together(files, kind=WorkdirError)
    if not begun and log.rows:
        say(f"{title}: no whole checkpoint is in {workdir}: beginning again, with the rewards that are in the journal")
    screen = Screen(title, steps, step)
    profiler = Profiler(workdir / "profile", profile if first else range(0), step, say)
    evaluate = evaluator or _NoEvaluation()
    rate_at = jax.jit(lambda count: {"learning_rate": learning_rate(count)} if learning_rate else {})
    optimizer_steps, sightings, experienced = int(_optimizer_count(state)), [], None
    with StopSignals() as stop:
        try:
            if hosts.agreed(first and not log.rows):
                log.write(0, {"time/elapsed_seconds": 0.0, **_evaluation(evaluate.full, state.params, stop.check)})
                log.save()
                screen.evaluation(log.rows[-1])
            elapsed, ended = log.rows[-1]["time/elapsed_seconds"] if first else 0.0, time.perf_counter()
            while step < steps:
                stop.check()
                experienced = None
                with profiler.step(step + 1):
                    with _annotated("experience"):
                        experienced = experience(state, journal, stop.check)
                    started, updating = ended, time.perf_counter()
                    with _annotated("update"):
                        rate = rate_at(optimizer_steps)
                        state, measured = train_step(state, experienced.batch)
                        metrics, optimizer_steps = _fetched(state, {**measured, **rate})
                    ended = time.perf_counter()
                    step, elapsed, metrics = step + 1, elapsed + ended - started, metrics | dict(experienced.metrics)
                    cursor, state = int(state.cursor), _advance(state, experienced)
                    in_a_row = metrics.get("skipped_in_a_row", 0.0)
                    sightings = [*sightings, incidents.seen(step, cursor, metrics, experienced)] if in_a_row else []
                    metrics |= _times(experienced, ended - started, ended - updating, elapsed)
                    if in_a_row >= max_skipped:
                        log.write(step, metrics, experienced.samples)
                        raise incidents.stopped(workdir, sightings, store.steps[-1] if store.steps else None)
                    if step == steps:
                        metrics |= _evaluation(evaluate.full, state.params)
                    elif step % evaluate_every == 0:
                        metrics |= _evaluation(evaluate.greedy, state.params)
                    ended += metrics.get("time/evaluation_seconds", 0.0)  # of no step
                    with _annotated("log"):
                        shown = experienced.samples if step % samples_every == 0 or step == 1 else ()
                        log.write(step, metrics, shown)
                        screen.step(log.rows, shown)
                    if step == steps or step % checkpoints.every == 0 or "eval/accuracy" in metrics:
                        with _annotated("checkpoint"):
                            log.save()
                            store.save(state, metrics.get("eval/accuracy"))
        except Stopped:
            log.save()
            store.save(state)
        except (RewardError, WorkdirError) as error:
            # While experience is gathered: all processes hear of it then, and the step before is in the log. What comes
            # after an update is done again.
            if step > begun and experienced is None:
                _save_last(store, log, state, title, error)
            raise
        finally:  # whatever happened: what was being saved is saved, and every file is closed
            with contextlib.ExitStack() as closing:
                for thing in (store, profiler, journal, log, screen):
                    closing.callback(thing.close)
    if received := stop.heard():  # also where it came during the last step, for there may be another phase
        say(f"{stop.name}: stopped after step {step}, which is saved. The same command continues it.")
        sys.exit(128 + received)
    return state, log.rows


def _begin(store: Checkpoints, state: TrainState, steps: int, title: str, workdir: Path) -> TrainState:
    """The state to go on from: of the newest checkpoint, where there is one."""
    if not store.steps:
        store.prepare(state)
        return state
    state = store.restore(state)
    done = int(state.step)
    how = f"continuing at step {done} from" if done < steps else f"all {done} steps are in"
    say(f"{title}: {how} {workdir}")
    return state


_annotated = jax.profiler.TraceAnnotation  # a part of a step, in its profile


def _advance(state: TrainState, experienced: Experience) -> TrainState:
    """What a step has consumed, and what it leaves to the next."""
    cursor, surplus = np.int32(int(state.cursor) + experienced.prompts_consumed), experienced.surplus
    if surplus is not None:
        surplus = jax.tree.map(lambda new, old: hosts.put(new, old.sharding), surplus, state.surplus)
    return dataclasses.replace(state, cursor=hosts.put(cursor, state.cursor.sharding), surplus=surplus)


def _fetched(state: TrainState, measured: Mapping[str, jax.Array]) -> tuple[dict[str, float], int]:
    """What was measured of a step, and the optimizer steps so far.

    All that the host asks of a step, at once; an array remembers what was fetched of it.
    """
    metrics, count, *_ = hosts.fetched((measured, _optimizer_count(state), state.step, state.cursor))
    return {name: float(value) for name, value in metrics.items()}, int(count)


def _optimizer_count(state: TrainState) -> jax.Array | int:
    counts = [x for x in jax.tree.leaves(state.opt_state) if x.ndim == 0]  # every count of an optax chain agrees
    return counts[0] if counts else 0


def _save_last(store: Checkpoints, log: RunLog, state: TrainState, title: str, error: Exception) -> None:
    """As far as that is possible: what has ended the run may be a full disk, and is what it ends with."""
    try:
        log.save()
        # On several hosts who can write waits for who cannot.
        store.save(state, patience=120 if isinstance(error, WorkdirError) else PATIENCE)
        store.wait()
    except WorkdirError as refused:
        say(f"{title}: step {int(state.step)} cannot be saved either: {refused}")
    else:
        say(f"{title}: step {int(state.step)} is saved. Mend what is wrong, and the same command goes on.")


def _evaluation(measure: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """What it measures, and what it took."""
    started = time.perf_counter()
    with _annotated("evaluation"):
        metrics = measure(*arguments)
    return metrics | ({"time/evaluation_seconds": time.perf_counter() - started} if metrics else {})


def _times(experienced: Experience, step: float, update: float, elapsed: float) -> dict[str, float]:
    rollout, rewards, reference = (getattr(experienced, f"{of}_seconds") for of in ("rollout", "reward", "reference"))
    return {
        "time/elapsed_seconds": elapsed,
        "time/step_seconds": step,
        "time/rollout_seconds": rollout,
        "time/reward_seconds": rewards,
        "time/reference_seconds": reference,
        "time/update_seconds": update,
        "time/other_seconds": step - rollout - rewards - reference - update,
        "time/rollout_tokens_per_second": experienced.rollout_tokens / rollout if rollout else 0.0,
        "time/train_tokens_per_second": experienced.train_tokens / update,
    }


class _NoEvaluation:
    def greedy(self, params, interrupt=None):
        return {}

    full = greedy

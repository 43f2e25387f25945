"""The shell around the sampler: prompts -> completions -> rewards -> a TrainBatch."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import hosts, sharding
from grpo_jax.compiling import Lowering
from grpo_jax.data.sources import Mapped, Prompt, Source
from grpo_jax.dynamic_sampling import abstract_surplus, fill
from grpo_jax.objectives import Objective
from grpo_jax.outcomes import AdvantageConfig, Outcome, without_signal
from grpo_jax.rewards import Reward, Scores
from grpo_jax.sampler import Sampler, check_stop, join
from grpo_jax.scoring import (
    Ahead,
    Journal,
    ScoredGroups,
    groups_of,
    interruptibly,
    journaled_scores,
    rollout_metrics,
    samples_of_group,
    score_rollout,
    scores_of_all,
)
from grpo_jax.training import train_batch
from grpo_jax.types import Groups, PyTree, Rollout, SamplingParams, Surplus, TrainBatch, TrainState

__all__ = [
    "Experience",
    "GroupRollouts",
    "RolloutConfig",
    "reference_of",
    "surplus_of",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """What is sampled at every step: prompts x group_size completions."""

    prompts: int = 32  # prompts a step
    group_size: int = 8  # completions of each
    max_tokens: int = 0  # a completion is cut there; 0: what the task needs
    temperature: float = 1.0  # of sampling; the trainer's log-probabilities are at it too
    top_k: int = 0  # sample among the k likeliest tokens; 0: all
    top_p: float = 1.0  # sample among the likeliest tokens of this mass; 1: all
    min_p: float = 0.0  # sample among tokens at least this share as likely as the likeliest; 0: all
    stop: tuple[str, ...] = ()  # strings that end a completion too, as a Python tuple: ('Question:',)
    slots: int = 0  # completions decoded at a time, about; one that ends makes room for the next; 0: by the hardware
    max_waves: int = 1  # prompts again, so many times at most, until every group has signal (DAPO); 1: never again

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(
                f"group_size={self.group_size}: an advantage relative to a group needs at least 2 members; "
                "with 1 every advantage is 0 and nothing is learned."
            )
        if self.prompts < 1 or self.max_tokens < 0:
            raise ValueError(f"prompts={self.prompts} must be 1 or more, max_tokens={self.max_tokens} 0 or more.")
        if self.temperature <= 0:
            raise ValueError(
                f"temperature={self.temperature} must be above 0: a greedy group has no spread to learn from."
            )
        if self.max_waves < 1:
            raise ValueError(f"max_waves={self.max_waves} must be 1 or more; 1: what is sampled is trained on.")
        check_stop(self.stop)
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ValueError(
                f"top_k={self.top_k} must be 0 or more, top_p={self.top_p} in (0, 1], min_p={self.min_p} in [0, 1]."
            )
        if self.slots < 0:
            raise ValueError(f"slots={self.slots} must be 1 or more, or 0 to choose by the hardware.")

    @property
    def sampling(self) -> SamplingParams:
        """How tokens are chosen."""
        return SamplingParams(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experience:
    """What a step learns from, and what is worth logging about it."""

    batch: Any  # what the train step takes: a TrainBatch, or of preferences `reward_model.Pairs`
    prompts_consumed: int
    surplus: Surplus | None = None  # for the next step; None: the state has no place for any
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    samples: Sequence[Mapping[str, Any]] = ()
    rollout_tokens: int = 0  # sampled
    train_tokens: int = 0  # prompts and completions, as the update sees them
    rollout_seconds: float = 0.0
    reward_seconds: float = 0.0
    reference_seconds: float = 0.0  # what the reference's pass adds; a GPU holds us for all of it, beside the rewards


# One program, where its operations one by one would be a dozen to compile, and to wait for at every step.
_without_signal = jax.jit(without_signal)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Wave:
    """What was sampled at a time."""

    scored: ScoredGroups
    rollout: Rollout  # where the sampler left it
    reference: jax.Array | None  # [B, T] float32, the reference's log-probabilities; None: not asked for, or not yet
    rollout_seconds: float
    reward_seconds: float
    reference_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sampled:
    """A wave before it is scored."""

    rollout: Rollout  # where the sampler left it
    host: Rollout  # the same on the host
    own: Rollout  # of that, what this process scores and journals; with one process all of it
    score: Callable[[], Scores]  # of its own
    parts: Sequence[int]  # prompts that were sampled at a time


def _surplus(state: TrainState) -> Surplus:
    """Of a state, on the host."""
    if state.surplus is None:
        raise ValueError(
            "max_waves above 1 needs a place in the state: init_train_state(..., surplus=surplus_of(...))."
        )
    return hosts.fetched(state.surplus)


def reference_of(state: TrainState) -> PyTree:
    """What `make_reference_logprobs` takes: with adapters the reference is in the parameters."""
    return state.params if state.reference is None else state.reference


def _over_tokens(advantages: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, float]:
    """Advantages [B] or [B, T] -> the mean of each completion's [B], and the mean size of all, tokens where [B, T]."""
    if advantages.ndim == 1:
        return advantages, float(np.abs(advantages).mean())
    return advantages.sum(axis=1) / np.maximum(mask.sum(axis=1), 1), float(np.abs(advantages[mask]).mean())


def surplus_of(
    config: RolloutConfig, objective: Objective, *, max_prompt_tokens: int, max_tokens: int
) -> Surplus | None:
    """Shapes of what steps leave to the next in the state, for `training.init_train_state`; None without waves."""
    if config.max_waves == 1:
        return None
    return abstract_surplus(
        prompts=config.prompts, group_size=config.group_size, max_prompt_tokens=max_prompt_tokens,
        max_tokens=max_tokens, needs_steps=objective.needs_steps,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupRollouts:
    """`rollouts(state, journal, interrupt) -> Experience`: GRPO's half of a step that has no gradient."""

    sampler: Sampler
    source: Source
    rewards: Sequence[Reward]
    config: RolloutConfig
    objective: Objective  # whose advantages
    advantages: AdvantageConfig = dataclasses.field(default_factory=AdvantageConfig)
    # (params, rollout, temperature) -> [B, T]: `training.make_reference_logprobs`. Where a step is one wave, the device
    # computes them while the host scores. A penalty in the reward needs them; one in the loss can do without.
    reference_logprobs: Callable[[PyTree, Rollout, float], jax.Array] | None = None
    # Whose completions: the policy's own, or another's for comparison.
    params_of: Callable[[TrainState], PyTree] | None = None
    # Which completions train: [B] rewards by name -> [B] bool; all of them by default.
    select: Callable[[Scores], np.ndarray] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError where the pieces do not fit together."""
        if self.objective.reward_kl is not None and self.reference_logprobs is None:
            raise ValueError("kl_in_reward needs reference_logprobs: training.make_reference_logprobs makes them.")
        if self.config.max_waves > 1 and (self.params_of, self.select) != (None, None):
            raise ValueError(f"max_waves={self.config.max_waves} has no place for params_of or select: leave them out.")
        _ = self._estimate

    @functools.cached_property
    def _estimate(self) -> Callable[[Outcome], jax.Array]:
        return self.advantages.of(self.objective.advantages)

    @functools.cached_property
    def _train_batch(self) -> Callable[..., TrainBatch]:
        return jax.jit(
            train_batch, out_shardings=sharding.batch_sharding(self.sampler.mesh)
        )  # as `abstract_batch` says

    def lowerings(self, state: TrainState, train_step: Any) -> list[Lowering]:
        """The programs that a call runs, and the train step of its batch; of a state, or its shapes and places."""
        params = state.params if self.params_of is None else self.params_of(state)
        programs, prompts = self.sampler.lowerings(params, self.config.prompts), self.config.prompts
        if self.reference_logprobs is not None and self.objective.needs_reference:
            arguments = reference_of(state), self.sampler.abstract_rollout(prompts), self.config.temperature
            reference: Any = self.reference_logprobs
            programs.append(lambda: reference.lower(*arguments))
        return [*programs, lambda: train_step.lower(state, self.abstract_batch())]

    def abstract_batch(self) -> TrainBatch:
        """Shapes and places of the batch that a call returns."""
        rollout, groups = (
            self.sampler.abstract_rollout(self.config.prompts),
            (self.config.prompts, self.config.group_size),
        )
        array = lambda dtype, shape: jax.ShapeDtypeStruct(shape, dtype)
        of_tokens = lambda asked: array(np.float32, rollout.mask.shape) if asked else None
        outcome = Outcome(
            rewards=array(np.float32, groups), counted=array(bool, groups), mask=rollout.mask,
            step_rewards=of_tokens(self.objective.needs_steps),
            penalties=of_tokens(self.objective.reward_kl is not None),
        )  # fmt: skip
        batch = jax.eval_shape(
            self._train_batch, rollout, jax.eval_shape(self._estimate, outcome), temperature=self.config.temperature,
            selected=rollout.finished,
            ref_logprobs=of_tokens(self.objective.reference_in_loss and self.reference_logprobs is not None),
        )  # fmt: skip
        if self.params_of is not None:
            batch = dataclasses.replace(batch, sampler_logprobs=None)
        rows = sharding.batch_sharding(self.sampler.mesh)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch)

    def __call__(self, state: TrainState, journal: Journal, interrupt: Callable[[], None]) -> Experience:
        """Samples, scores and standardizes the groups of the prompts at the state's cursor.

        With dynamic sampling, `reward` and all that is said of completions is of all groups that the step sampled.
        """
        config, group = self.config, self.config.group_size
        waiting = _surplus(state) if config.max_waves > 1 else None
        waves = self._waves(state, 0 if waiting is None else int(waiting.count), journal, interrupt)
        fresh = waves[0].scored if len(waves) == 1 else ScoredGroups.join([wave.scored for wave in waves])
        metrics, surplus = rollout_metrics(self.rewards, fresh), None
        groups, rollout, chosen = fresh.groups, waves[0].rollout, np.arange(config.prompts)
        reference, reference_seconds = waves[0].reference, waves[0].reference_seconds
        if waiting is not None:
            groups, surplus, chosen, said = fill(waiting, fresh.groups, fresh.constant)
            rollout = hosts.put(groups.rollout, sharding.batch_sharding(self.sampler.mesh))
            asked = time.perf_counter()
            reference = jax.block_until_ready(self._reference(state, rollout))
            reference_seconds = time.perf_counter() - asked
            metrics |= {"dynamic_sampling/waves": float(len(waves)), **said}
        host: Rollout = groups.rollout

        penalties, penalty_metrics = self._penalties(reference, host)
        advantages = np.asarray(self._estimate(dataclasses.replace(self._outcome(groups), penalties=penalties)))
        known = ~np.isnan(groups.rewards).reshape(-1)
        if not known.all():  # they do not train
            advantages = np.where(known.reshape(-1, *[1] * (advantages.ndim - 1)), advantages, np.float32(0))
        selected = known if self.select is None else known & self.select(fresh.scores)
        if not self.advantages.train_truncated:
            selected = selected & host.finished
        batch = self._train_batch(
            rollout, advantages, temperature=config.temperature, selected=selected,
            ref_logprobs=reference if self.objective.reference_in_loss else None,
        )  # fmt: skip
        of_completions, abs_mean = _over_tokens(advantages, host.mask)
        metrics |= {"advantage/abs_mean": abs_mean, **penalty_metrics}
        if self.objective.needs_steps:
            steps = sum(len(x or ()) for given in fresh.scores.steps.values() for x in given)
            metrics["completions/mean_steps"] = steps / fresh.total.size
        if self.params_of is not None:
            # The sampler's policy is not the trainer's, and its advantages are not used: nothing to say of either.
            batch = dataclasses.replace(batch, sampler_logprobs=None)
            metrics = {name: value for name, value in metrics.items() if not name.startswith(("frac_", "advantage/"))}
        # To look at: the first of the batch's fresh groups, its last, in which rewards differ.
        shown = int(np.argmax(np.ptp(fresh.total[chosen], axis=1) > 0))
        of_group = of_completions.reshape(-1, group)[len(groups.rewards) - len(chosen) + shown]
        return Experience(
            batch=batch,
            prompts_consumed=len(fresh.prompts),
            surplus=surplus,
            metrics=metrics,
            samples=samples_of_group(fresh, int(chosen[shown]), of_group, self.sampler.tokenizer),
            rollout_tokens=int(fresh.groups.rollout.mask.sum()),
            train_tokens=int(group * host.prompt_mask.sum() + host.mask.sum()),
            rollout_seconds=sum(wave.rollout_seconds for wave in waves),
            reward_seconds=sum(wave.reward_seconds for wave in waves),
            reference_seconds=reference_seconds,
        )

    def _waves(
        self, state: TrainState, ready: int, journal: Journal, interrupt: Callable[[], None]
    ) -> list[_Wave]:  # fmt: skip
        """One, or as many as it takes until there are enough groups with signal, of which so many are `ready`."""
        waves: list[_Wave] = []
        while not waves or (ready < self.config.prompts and len(waves) < self.config.max_waves):
            waves.append(self._wave(state, len(waves), journal, interrupt))
            ready += int((~waves[-1].scored.constant).sum())
        return waves

    def _wave(self, state: TrainState, wave: int, journal: Journal, interrupt: Callable[[], None]) -> _Wave:
        """Groups of as many prompts as a step trains on."""
        config, step, started = self.config, int(state.step), time.perf_counter()
        first = int(state.cursor) + wave * config.prompts
        # Each is read by who asks for it, once: a process samples and scores its own.
        prompts = Mapped(functools.cache(self.source), range(first, first + config.prompts))
        with Ahead() as ahead:
            with jax.profiler.TraceAnnotation("rollout"):
                known = journal.knows(step, wave)
                sampled = self._sample(state, prompts, first, interrupt, None if known else ahead)
            ended = time.perf_counter()
            # Of what waves leave to train on, it is known only when they are scored. A GPU's runtime holds us here
            # until the pass ends, for it has a loop; others do not.
            reference = self._reference(state, sampled.rollout) if config.max_waves == 1 else None
            asked = time.perf_counter()
            scores = journaled_scores(sampled.score, self.rewards, sampled.own, journal, step, wave)
            scores = scores_of_all(scores, sampled.parts, config.group_size)
            scored = time.perf_counter()
        jax.block_until_ready(reference)  # what the device is asked next would wait for it too
        referred = time.perf_counter()
        groups = self._groups(scores, sampled.host)
        return _Wave(
            scored=ScoredGroups(
                prompts=prompts,
                groups=groups,
                scores=scores,
                total=scores.total(self.rewards).reshape(-1, config.group_size),
                constant=np.asarray(_without_signal(self._outcome(groups))),
            ),
            rollout=sampled.rollout,
            reference=reference,
            rollout_seconds=ended - started,
            reward_seconds=scored - asked,
            reference_seconds=(asked - ended) + (referred - scored),
        )

    def _sample(
        self, state: TrainState, prompts: Sequence[Prompt], first: int, interrupt: Callable[[], None],
        ahead: Ahead | None,
    ) -> _Sampled:  # fmt: skip
        """Completions, and what scores those that are this process's.

        Where the sampler cuts a rollout to the memory, functions see a part of it at a time, whole groups; and each
        part `ahead`, while the device samples the next or reads the last as the reference does, if none uses the
        device. None: the journal may know these, and they are scored only if it does not.
        """
        params = state.params if self.params_of is None else self.params_of(state)
        texts, ids = Mapped(lambda prompt: prompt.text, prompts), range(first, first + len(prompts))
        parts: list[Rollout] = []
        on_host: list[Rollout] = []
        own: list[Rollout] = []
        scored: list[Callable[[], Scores]] = []
        begun, ahead = 0, None if any(reward.on_device for reward in self.rewards) else ahead

        def look() -> None:
            interrupt()
            if ahead is not None and jax.process_count() == 1:  # else all are told, when all have sampled
                ahead.check()

        for part in self.sampler.waves(params, texts, ids, self.config.sampling, look):
            parts.append(part)
            on_host.append(hosts.fetched(part))
            of_part = range(begun, begun + len(part.prompt_tokens))
            own.append(groups_of(on_host[-1], hosts.share(range(len(of_part)))))
            mine = Mapped(prompts.__getitem__, hosts.share(of_part))
            begun += len(of_part)
            scored.append(functools.partial(self._score, mine, own[-1]))
            if ahead is not None:
                ahead.add(scored[-1])
        joined = lambda of: of[0] if len(of) == 1 else jax.tree.map(lambda *x: np.concatenate(x), *of)
        results = ahead.results if ahead is not None else functools.partial(interruptibly, scored, self.rewards)
        return _Sampled(
            rollout=join(parts),
            host=joined(on_host),
            own=joined(own),
            score=lambda: Scores.join(results(interrupt)),
            parts=[len(part.prompt_tokens) for part in parts],
        )

    def _score(self, prompts: Sequence[Prompt], rollout: Rollout) -> Scores:
        return score_rollout(self.rewards, prompts, rollout, self.sampler.tokenizer, self.config.group_size)

    def _groups(self, scores: Scores, rollout: Rollout) -> Groups:
        """With rewards as advantages see them: the weighted sum, of each normalized before if so wished."""
        names, weights = [r.name for r in self.rewards], np.array([r.weight for r in self.rewards])
        unknown, scores = scores.unknown(self.rewards), scores.clipped(self.rewards)
        counted = self.advantages.counted(rollout.finished.reshape(-1, self.config.group_size))
        rewards = np.stack([scores.by_name[name].reshape(counted.shape) for name in names])
        rewards[:, unknown.reshape(counted.shape)] = np.nan
        combined, steps = self.advantages.combine(rewards, weights, counted), None
        if self.objective.needs_steps:
            lengths, columns = rollout.mask.sum(axis=1), rollout.mask.shape[1]
            each = np.stack([scores.by_token(name, lengths, columns) for name in names])
            each[weights == 0] = np.nan  # a reward that is only logged has no steps
            each[:, unknown] = np.nan
            each = each.reshape(len(names), len(counted), -1)
            steps = self.advantages.combine(each, weights, np.repeat(counted, columns, axis=1))
            steps = steps.reshape(rollout.mask.shape)
        return Groups(rollout=rollout, rewards=combined, step_rewards=steps)

    def _outcome(self, groups: Groups) -> Outcome:
        """Without penalties. A completion whose reward nobody knows does not count; it has 0 in its place."""
        counted = self.advantages.counted(groups.rollout.finished).reshape(groups.rewards.shape)
        known = ~np.isnan(groups.rewards)
        return Outcome(
            rewards=np.where(known, groups.rewards, np.float32(0)), counted=counted & known, mask=groups.rollout.mask,
            step_rewards=groups.step_rewards,
        )  # fmt: skip

    def _reference(self, state: TrainState, rollout: Rollout) -> jax.Array | None:
        """The reference's log-probabilities [B, T] float32, if anything asks for them; nobody waits for them here."""
        if self.reference_logprobs is None or not self.objective.needs_reference:
            return None
        return self.reference_logprobs(reference_of(state), rollout, self.config.temperature)

    def _penalties(self, reference: jax.Array | None, host: Rollout) -> tuple[np.ndarray | None, dict]:
        """[B, T] float32 to take from the rewards, and their metrics."""
        if self.objective.reward_kl is None or reference is None:
            return None, {}
        kl = self.objective.reward_kl(host.logprobs, jnp.asarray(hosts.fetched(reference)))
        kl = np.where(host.mask, kl, 0).astype(np.float32)
        penalties = self.objective.reward_kl_coef * kl
        means = {"kl": kl.sum() / host.mask.sum(), "reward/kl_penalty": penalties.sum(axis=1).mean()}
        return penalties, {name: float(value) for name, value in means.items()}

"""The shell around the sampler: prompts -> completions -> rewards -> a TrainBatch."""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled

from grpo_jax import sampling, sharding
from grpo_jax.data.sources import Prompt, Source
from grpo_jax.data.stops import stop_table
from grpo_jax.data.tokenizer import Tokenizer, pad
from grpo_jax.objectives import Objective
from grpo_jax.outcomes import AdvantageConfig, Outcome, without_signal
from grpo_jax.rewards import Item, Reward, RewardError, Scores, score
from grpo_jax.training import train_batch
from grpo_jax.types import Policy, PyTree, Rollout, SamplingParams, TrainBatch, TrainState

__all__ = [
    "Demonstrations",
    "Experience",
    "GroupRollouts",
    "Journal",
    "RolloutConfig",
    "Sampler",
    "check_stop",
    "completion_texts",
    "score_rollout",
]


def check_stop(stop: Sequence[str]) -> None:
    """Raises ValueError unless these are stop strings: a string alone would be taken for its characters."""
    if isinstance(stop, str) or not all(isinstance(string, str) and string for string in stop):
        raise ValueError(f"stop={stop!r} must be a tuple of strings, none of them empty: ('Question:',).")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """What is sampled at every step: prompts x group_size completions."""

    prompts: int = 32  # prompts a step
    group_size: int = 8  # completions of each
    max_tokens: int = 0  # a completion is cut there; 0: what the task needs
    temperature: float = 1.0  # of sampling; the trainer's log-probabilities are at it too
    top_k: int = 0  # sample among the k likeliest tokens; 0: all
    top_p: float = 1.0  # sample among the likeliest tokens of this mass; 1: all
    stop: tuple[str, ...] = ()  # strings that end a completion too, as a Python tuple: ('Question:',)

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
        check_stop(self.stop)
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"top_k={self.top_k} must be 0 or more, top_p={self.top_p} in (0, 1].")


def _ends(tokenizer: Tokenizer, stop: Sequence[str]) -> tuple[list[int], list[str]]:
    """The ids that end a completion, and the strings that do: a stop string may be a special token, which is an id."""
    ids, strings = list(tokenizer.eos_ids), []
    for string in stop:
        tokens = tokenizer.encode(string, continues=True)
        silent = [i for i in tokens if tokenizer.token_bytes[i] is None]
        if silent and len(tokens) > 1:
            raise ValueError(f"stop string {string!r} holds a special token beside other text: give one of them alone.")
        ids += silent
        strings += [] if silent else [string]
    return ids, strings


class Sampler:
    """`sampling.generate`, compiled for a mesh, in chunks of tokens so that the host has a turn between them."""

    def __init__(
        self, policy: Policy, mesh: Mesh, tokenizer: Tokenizer, *, group_size: int, max_tokens: int,
        max_prompt_tokens: int, key: jax.Array, stop: Sequence[str] = (), chunk: int = 64,
    ):  # fmt: skip
        """`key` is the root of all randomness: with prompt id, member and token index it gives a token's.

        `stop`: strings, special tokens among them, that end a completion as an EOS does.
        """
        if not tokenizer.eos_ids or tokenizer.pad_id is None:
            raise ValueError(
                f"the tokenizer has eos_ids={tokenizer.eos_ids!r} and pad_id={tokenizer.pad_id!r}: sampling needs at "
                "least one id that ends a completion, and one to pad with (an EOS id will do)."
            )
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens} must be 1 or more.")
        self.tokenizer, self.group_size, self.max_prompt_tokens = tokenizer, group_size, max_prompt_tokens
        self._mesh, self._key = mesh, key
        self._eos_ids, strings = _ends(tokenizer, stop)
        self._stop_table = stop_table(tokenizer.token_bytes, strings) if strings else None

        def constrained(tree, axes, rules):
            return jax.lax.with_sharding_constraint(tree, sharding.shardings(tree, axes, mesh, rules))

        placed = dataclasses.replace(
            policy,
            prepare=lambda p: constrained(policy.prepare(p), policy.sampler_axes, sharding.SAMPLER_RULES),
            init_cache=lambda *shape: constrained(policy.init_cache(*shape), policy.cache_axes, sharding.SAMPLER_RULES),
        )
        self._start = jax.jit(functools.partial(sampling.start, placed, group_size=group_size, max_tokens=max_tokens))
        self._decode = jax.jit(functools.partial(sampling.decode, placed, steps=chunk), donate_argnums=1)
        self._collect = jax.jit(sampling.collect)

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts.

        Raises:
          ValueError: a prompt is empty or longer than `max_prompt_tokens`.
        """
        rows = [self.tokenizer.encode(text) for text in prompts]
        for text, row in zip(prompts, rows, strict=True):
            if not 1 <= len(row) <= self.max_prompt_tokens:
                raise ValueError(
                    f"prompt {text!r} has {len(row)} tokens; expected from 1 to {self.max_prompt_tokens}. "
                    "Shorten it, leave it out, or raise the limit."
                )
        return rows

    def __call__(
        self, params: PyTree, prompts: Sequence[str], prompt_ids: Sequence[int] | np.ndarray,
        sampling_params: SamplingParams, interrupt: Callable[[], None] = lambda: None,
    ) -> Rollout:  # fmt: skip
        """Samples a group for each prompt; `interrupt` is called between chunks and may raise.

        Raises:
          ValueError: the prompts do not divide over the mesh, or one is empty or too long.
        """
        shards = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        if len(prompts) % shards:
            raise ValueError(
                f"{len(prompts)} prompts do not divide over {shards} devices (data x fsdp); use a multiple of {shards}."
            )
        tokens, mask = pad(self.encode(prompts), self.max_prompt_tokens)
        ids = np.asarray(prompt_ids, np.uint32)
        tokens, mask, ids = jax.device_put((tokens, mask, ids), sharding.batch_sharding(self._mesh))
        prefilled, state = self._prefill(self._start, params, tokens, mask, ids, sampling_params)
        while True:
            interrupt()
            if state.done():
                return self._collect(state, tokens, mask)
            state = self._decode(prefilled, state)

    def compile(self, params: PyTree, prompts: int) -> tuple[Compiled, Compiled]:
        """Prefill and a chunk of decoding, compiled ahead: to see what they need, on devices that are not here too.

        Args:
          params: ShapeDtypeStructs with shardings.
          prompts: P, a multiple of data x fsdp.
        """
        rows = sharding.batch_sharding(self._mesh)
        shape = lambda dtype, *columns: jax.ShapeDtypeStruct((prompts, *columns), dtype, sharding=rows)
        tokens, mask = (shape(dtype, self.max_prompt_tokens) for dtype in (np.int32, bool))
        lowered = self._prefill(self._start.lower, params, tokens, mask, shape(np.uint32), SamplingParams())
        start = lowered.compile()
        abstract = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        return start, self._decode.lower(*jax.tree.map(abstract, lowered.out_info, start.output_shardings)).compile()

    def _prefill(self, run, params, tokens, mask, ids, sampling_params):
        return run(
            params, tokens, mask, ids, self._key, eos_ids=np.asarray(self._eos_ids, np.int32),
            pad_id=np.int32(self.tokenizer.pad_id), sampling=sampling_params, stop_table=self._stop_table,
        )  # fmt: skip


class Journal(Protocol):
    """Where a step's rewards are written durably before they are used, and read when the step is replayed."""

    def read(self, step: int, digest: str) -> Mapping[str, Sequence[Item]] | None:
        """The recorded scores of these completions at this step, or None."""
        ...

    def write(self, step: int, digest: str, scores: Mapping[str, Sequence[Item]]) -> None:
        """Returns when the scores are durable."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experience:
    """What a step learns from, and what is worth logging about it."""

    batch: TrainBatch
    prompts_consumed: int
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    samples: Sequence[Mapping[str, Any]] = ()
    rollout_tokens: int = 0  # sampled
    train_tokens: int = 0  # prompts and completions, as the update sees them
    rollout_seconds: float = 0.0
    reward_seconds: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupRollouts:
    """`rollouts(state, journal, interrupt) -> Experience`: GRPO's half of a step that has no gradient."""

    sampler: Sampler
    source: Source
    rewards: Sequence[Reward]
    config: RolloutConfig
    objective: Objective  # whose advantages
    advantages: AdvantageConfig = dataclasses.field(default_factory=AdvantageConfig)
    # (params, rollout, temperature) -> [B, T], for a penalty in the reward: `training.make_reference_logprobs`.
    reference_logprobs: Callable[[PyTree, Rollout, float], jax.Array] | None = None
    # Whose completions: the policy's own, or another's for comparison.
    params_of: Callable[[TrainState], PyTree] | None = None
    # Which completions train: [B] rewards by name -> [B] bool; all of them by default.
    select: Callable[[Scores], np.ndarray] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError where the pieces do not fit together."""
        if self.objective.reward_kl is not None and self.reference_logprobs is None:
            raise ValueError("kl_in_reward needs reference_logprobs: training.make_reference_logprobs makes them.")
        _ = self._estimate

    @functools.cached_property
    def _estimate(self) -> Callable[[Outcome], jax.Array]:
        return self.advantages.of(self.objective.advantages)

    def __call__(self, state: TrainState, journal: Journal, interrupt: Callable[[], None]) -> Experience:
        """Samples, scores and standardizes the groups of the prompts at the state's cursor."""
        config, tokenizer, group = self.config, self.sampler.tokenizer, self.config.group_size
        started = time.perf_counter()
        cursor = int(state.cursor)
        prompts = [self.source(i) for i in range(cursor, cursor + config.prompts)]
        params = state.params if self.params_of is None else self.params_of(state)
        rollout = self.sampler(
            params, [p.text for p in prompts], range(cursor, cursor + config.prompts),
            SamplingParams(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p), interrupt,
        )  # fmt: skip
        host: Rollout = jax.device_get(rollout)
        sampled = time.perf_counter()
        scores = _journaled_scores(self.rewards, prompts, host, tokenizer, group, journal, int(state.step))
        total = scores.total(self.rewards)
        scored = time.perf_counter()

        outcome = self._outcome(scores, host)
        constant = np.asarray(without_signal(outcome))
        penalties, penalty_metrics = self._penalties(state, rollout, host)
        advantages = self._estimate(dataclasses.replace(outcome, penalties=penalties))
        selected = np.ones(len(host.finished), bool) if self.select is None else self.select(scores)
        if not self.advantages.train_truncated:
            selected = selected & host.finished
        batch = train_batch(rollout, advantages, temperature=config.temperature, selected=jnp.asarray(selected))
        per_completion, abs_mean = _over_tokens(np.asarray(advantages), host.mask)
        metrics = _rollout_metrics(self.rewards, scores, total.reshape(-1, group), constant, host)
        metrics |= {"advantage/abs_mean": abs_mean, **penalty_metrics}
        if self.params_of is not None:
            # The sampler's policy is not the trainer's, and its advantages are not used: nothing to say of either.
            batch = dataclasses.replace(batch, sampler_logprobs=None)
            metrics = {name: value for name, value in metrics.items() if not name.startswith(("frac_", "advantage/"))}
        return Experience(
            batch=batch,
            prompts_consumed=config.prompts,
            metrics=metrics,
            samples=_samples(prompts, host, tokenizer, group, scores, total, per_completion),
            rollout_tokens=int(host.mask.sum()),
            train_tokens=int(group * host.prompt_mask.sum() + host.mask.sum()),
            rollout_seconds=sampled - started,
            reward_seconds=scored - sampled,
        )

    def _outcome(self, scores: Scores, rollout: Rollout) -> Outcome:
        """Of a rollout that lies on the host; without penalties."""
        names, weights = [r.name for r in self.rewards], np.array([r.weight for r in self.rewards])
        shape = (-1, self.config.group_size)
        counted = self.advantages.counted(rollout.finished.reshape(shape))
        rewards = np.stack([scores.by_name[name].reshape(shape) for name in names])
        steps = None
        if self.objective.needs_steps:
            lengths, columns = rollout.mask.sum(axis=1), rollout.mask.shape[1]
            each = np.stack([scores.by_token(name, lengths, columns) for name in names])
            each[weights == 0] = np.nan  # a reward that is only logged has no steps
            of_group, counted_tokens = (len(counted), -1), np.repeat(counted, columns, axis=1)
            steps = self.advantages.combine(each.reshape(len(names), *of_group), weights, counted_tokens)
            steps = steps.reshape(rollout.mask.shape)
        combined = self.advantages.combine(rewards, weights, counted)
        return Outcome(rewards=combined, counted=counted, mask=rollout.mask, step_rewards=steps)

    def _penalties(self, state: TrainState, rollout: Rollout, host: Rollout) -> tuple[np.ndarray | None, dict]:
        """[B, T] float32 to take from the rewards, and their metrics."""
        if self.objective.reward_kl is None or self.reference_logprobs is None:
            return None, {}
        reference = jax.device_get(self.reference_logprobs(state.reference, rollout, self.config.temperature))
        kl = np.where(host.mask, self.objective.reward_kl(host.logprobs, reference), 0).astype(np.float32)
        penalties = self.objective.reward_kl_coef * kl
        means = {"kl": kl.sum() / host.mask.sum(), "reward/kl_penalty": penalties.sum(axis=1).mean()}
        return penalties, {name: float(value) for name, value in means.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demonstrations:
    """Supervised experience: prompts with the completions to learn, from the state's cursor on; nothing is sampled."""

    source: Callable[[int], tuple[str, str]]  # prompt and completion at a cursor
    tokenizer: Tokenizer
    batch: int  # demonstrations a step
    max_prompt_tokens: int
    max_tokens: int  # of a completion, its end included
    end_id: int  # what ends a completion

    def __call__(self, state: TrainState, journal: Journal, interrupt: Callable[[], None]) -> Experience:
        """The next demonstrations.

        Raises:
          ValueError: one is too long.
        """
        del journal, interrupt
        encode, cursor = self.tokenizer.encode, int(state.cursor)
        pairs = [self.source(i) for i in range(cursor, cursor + self.batch)]
        end = [self.end_id]
        prompts, prompt_mask = pad([encode(prompt) for prompt, _ in pairs], self.max_prompt_tokens)
        texts, mask = pad([encode(text, continues=True) + end for _, text in pairs], self.max_tokens)
        batch = TrainBatch(
            prompt_tokens=prompts, prompt_mask=prompt_mask, completion_tokens=texts, mask=mask,
            advantages=np.ones(self.batch, np.float32), sampler_logprobs=None,
            temperature=np.ones(self.batch, np.float32),
        )  # fmt: skip
        return Experience(batch=batch, prompts_consumed=self.batch, train_tokens=int(prompt_mask.sum() + mask.sum()))


def completion_texts(rollout: Rollout, tokenizer: Tokenizer) -> tuple[list[list[int]], list[str]]:
    """Token ids and texts of the completions of a rollout that lies on the host."""
    ids = [row[keep].tolist() for row, keep in zip(rollout.completion_tokens, rollout.mask, strict=True)]
    return ids, [tokenizer.decode(row) for row in ids]


def score_rollout(
    rewards: Sequence[Reward], prompts: Sequence[Prompt], rollout: Rollout, tokenizer: Tokenizer, group_size: int
) -> Scores:
    """Rewards of a rollout that lies on the host.

    Raises:
      RewardError: a reward function did something wrong, or the prompts do not all have the same columns.
    """
    for prompt in prompts:
        if prompt.columns.keys() != prompts[0].columns.keys():
            raise RewardError(
                f"prompt {prompt.text!r} has the columns {sorted(prompt.columns)}, and prompt {prompts[0].text!r} has "
                f"{sorted(prompts[0].columns)}: give all the same, with None where one has no value."
            )
    ids, texts = completion_texts(rollout, tokenizer)
    each = [prompt for prompt in prompts for _ in range(group_size)]
    columns = {name: [p.columns[name] for p in each] for name in prompts[0].columns}
    return score(rewards, prompts=[p.text for p in each], completions=texts, completion_ids=ids, columns=columns)


def _journaled_scores(rewards, prompts, rollout, tokenizer, group_size, journal, step) -> Scores:
    digest = hashlib.sha256(rollout.completion_tokens.tobytes() + rollout.mask.tobytes()).hexdigest()[:16]
    recorded = journal.read(step, digest)
    if recorded is None:
        scores = score_rollout(rewards, prompts, rollout, tokenizer, group_size)
        journal.write(step, digest, scores.items())
        return scores
    return Scores.of(recorded)


def _over_tokens(advantages: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, float]:
    """Advantages [B] or [B, T] -> the mean of each completion's [B], and the mean size of all, tokens where [B, T]."""
    if advantages.ndim == 1:
        return advantages, float(np.abs(advantages).mean())
    return advantages.sum(axis=1) / np.maximum(mask.sum(axis=1), 1), float(np.abs(advantages[mask]).mean())


def _rollout_metrics(
    rewards, scores: Scores, grouped: np.ndarray, constant: np.ndarray, rollout: Rollout
) -> dict[str, float]:
    lengths, finished = rollout.mask.sum(axis=1), rollout.finished
    metrics = {
        "reward": grouped.mean(),
        "reward_std": grouped.std(axis=1, ddof=1).mean(),
        "frac_reward_zero_std": constant.mean(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1 - finished.mean(),
        "completions/mean_terminated_length": lengths[finished].mean() if finished.any() else 0.0,
    }
    # "All right" and "all wrong" are said of the first reward: the one that judges, by convention.
    judged = scores.by_name[rewards[0].name].reshape(grouped.shape)
    metrics["accuracy"] = (np.nan_to_num(judged) > 0.5).mean()
    metrics["frac_groups_all_right"] = (constant & (judged.min(axis=1) > 0.5)).mean()
    metrics["frac_groups_all_wrong"] = (constant & (judged.max(axis=1) <= 0.5)).mean()
    for reward in rewards:
        values = scores.by_name[reward.name]
        values = values[~np.isnan(values)]
        metrics[f"rewards/{reward.name}/mean"] = values.mean() if values.size else 0.0
        metrics[f"rewards/{reward.name}/std"] = values.std(ddof=1) if values.size > 1 else 0.0
        metrics[f"rewards/{reward.name}/not_applicable"] = float(scores.by_name[reward.name].size - values.size)
    return {name: float(value) for name, value in metrics.items()}


def _samples(prompts, rollout, tokenizer, group_size, scores, total, advantages) -> list[dict[str, Any]]:
    """One group for people to read, completion by completion: the first in which rewards differ, if there is one."""
    spread = np.ptp(total.reshape(-1, group_size), axis=1) > 0
    group = int(np.argmax(spread))
    members = range(group * group_size, (group + 1) * group_size)
    _, texts = completion_texts(jax.tree.map(lambda x: x[members.start : members.stop], rollout), tokenizer)
    return [
        {
            "prompt": prompts[group].text, "completion": text, "finished": bool(rollout.finished[i]),
            "reward": float(total[i]), "advantage": float(advantages[i]),
            **{f"rewards/{name}": None if np.isnan(v[i]) else float(v[i]) for name, v in scores.by_name.items()},
        }
        for i, text in zip(members, texts, strict=True)
    ]  # fmt: skip

"""The records that flow through GRPO, and the dimension key that every docstring uses.

    P prompts · G members of a group · B = P·G completions · L prompt tokens (padded)
    T completion tokens (padded) · R rows of a packed batch · S columns of a row · W slots of a row
    V vocabulary · D model width · N layers · H query heads · K key/value heads · C width of a head

Completion b belongs to prompt b // G and is that prompt's member b % G.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, dataclass_transform

import jax

__all__ = [
    "ALL",
    "Groups",
    "Policy",
    "PyTree",
    "Rollout",
    "SamplingParams",
    "Split",
    "Surplus",
    "TrainBatch",
    "TrainState",
    "record",
]

PyTree: TypeAlias = Any
Array: TypeAlias = Any  # jax.Array; also what stands in its place: NumPy on the host, shapes, shardings
# Metrics travel as (sum, count) so that adding over microbatches and devices is exact; `mean` divides.
SumCount = tuple[jax.Array, jax.Array]


_C = TypeVar("_C")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def record(cls: type[_C]) -> type[_C]:
    """A frozen, keyword-only dataclass that is a pytree of its fields."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, kw_only=True)(cls))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Which of a policy's parameters train: functions of trees like them, of arrays, shapes or logical axes."""

    # (params) -> (those that train, the others); of those alone there are gradients and moments
    parts: Callable[[PyTree], tuple[PyTree, PyTree]]
    # (those that train, the others) -> params
    join: Callable[[PyTree, PyTree], PyTree]
    # (params) -> the reference's, which training leaves in them as they were; None: a reference is a copy
    reference: Callable[[PyTree], PyTree] | None


ALL = Split(parts=lambda params: (params, None), join=lambda params, _: params, reference=None)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Policy:
    """A language model as a record of pure functions: all that the sampler and the trainer know of it.

    Static under jit and hashed by identity: build it once. Any framework can make one.
    """

    # (params, tokens [R, S], positions [R, S], segments [R, S], 0 = padding)
    #   -> (hidden [R, S, D], aux {name: (sum, count)}); causal within a segment
    hidden: Callable[..., tuple[jax.Array, dict[str, SumCount]]]
    # (params) -> (kernel [V, D], bias [V] or None, soft cap or None)
    head: Callable[..., tuple[jax.Array, jax.Array | None, float | None]]
    # (params) -> sampler parameters; runs once a rollout (a wave, where it is cut to the memory), inside jit
    prepare: Callable[[PyTree], PyTree]
    # (rows, width, columns) -> tree of leaves whose leading axis is R, or R * W with the slots of a row side by side
    init_cache: Callable[[int, int, int], PyTree]
    # (sampler params, tokens [R, W, J], positions [R, W, J] (-1 = padding), cache, column of the first of them,
    #  key_positions [R, W, columns] (-1 = empty, the new columns included), before = ())
    #   -> (hidden [R, W, J, D], cache)
    # before: a sequence of (cache, key_positions, live), what else is attended to, each of columns of its own; W may be
    # 1 there: all slots read it. live: None, or [] bool: false where no slot sees anything of that cache, which need
    # not be read then
    extend: Callable[..., tuple[jax.Array, PyTree]]
    # (params, sampler params, as `extend` with W = 1) -> as `extend`; None: `extend` does it.
    # What prompts are extended by: it may scan over layers that `prepare` takes apart, and so compile one of them.
    prefill: Callable[..., tuple[jax.Array, PyTree]] | None = None
    param_axes: PyTree  # like params, leaves are tuples of logical axis names
    sampler_axes: PyTree  # like what `prepare` returns, leaves are tuples of logical axis names
    cache_axes: PyTree  # like the cache, leaves are tuples of logical axis names
    reads_visible: bool = False  # `extend` of a token reads what is visible of a cache, so that it is not in blocks
    prompts_in_blocks: bool = False  # cheap conditions and dear columns: prompts' caches are in blocks as well
    max_segments: int | None = None  # a row for `hidden` holds no more; None: any number
    split: Split = ALL  # which parameters train


@record
class SamplingParams:
    """How a token is chosen. Traced values: changing one does not recompile anything."""

    temperature: Array = 1.0  # 0 = greedy
    top_k: Array = 0  # 0 = off
    top_p: Array = 1.0  # 1 = off
    min_p: Array = 0.0  # 0 = off


@record
class Rollout:
    """What the sampler returns: P prompts and G completions of each."""

    prompt_tokens: Array  # [P, L] int32
    prompt_mask: Array  # [P, L] bool, padding on either side
    completion_tokens: Array  # [B, T] int32, `pad_id` after the end
    mask: Array  # [B, T] bool, true through the first EOS inclusive
    finished: Array  # [B] bool, false where the completion was cut at T
    logprobs: Array  # [B, T] float32, untruncated, at the sampling temperature (greedy: at 1)
    sampler_logprobs: Array  # [B, T] float32, of the truncated distribution sampled from


@record
class Groups:
    """P groups of completions, and what they were worth."""

    rollout: Rollout
    rewards: Array  # [P, G] float32
    step_rewards: Array | None  # [B, T] float32, NaN where no step ends; None: nobody asks for steps


@record
class Surplus:
    """Groups that a step sampled and has no room for: the next one trains on them."""

    groups: Groups
    count: Array  # [] int32, the first so many of the groups are there


@record
class TrainBatch:
    """What an update sees: completions with their advantages. B need not be a multiple of G here."""

    prompt_tokens: Array  # [B, L] int32
    prompt_mask: Array  # [B, L] bool, padding on either side
    completion_tokens: Array  # [B, T] int32
    mask: Array  # [B, T] bool, the tokens that train
    advantages: Array  # [B] or [B, T] float32
    sampler_logprobs: Array | None  # [B, T] float32, untruncated, at the temperature; None: nothing was sampled
    temperature: Array  # [B] float32, at which the trainer takes log-probabilities (0 stands for 1)
    ref_logprobs: Array | None = (
        None  # [B, T] float32, the reference's; None: the update takes them where it needs them
    )


@record
class TrainState:
    """Everything that is carried from one step to the next."""

    params: PyTree  # of the policy; those that train (`Policy.split`) are float32
    reference: PyTree  # frozen, as params; None where kl_coef is 0, or where it is in them (`Split.reference`)
    opt_state: PyTree  # of those that train
    step: Array  # [] int32, rollout steps done
    cursor: Array  # [] int32, prompts consumed; prompts are a function of (seed, cursor)
    surplus: Surplus | None = None  # None: every step trains on what it samples
    skipped: Array | None = None  # [] int32, the last so many optimizer steps were skipped; None: nobody counts

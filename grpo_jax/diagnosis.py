"""What a step's metrics mean, where they mean something to act on: a pure function of the log."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

__all__ = ["diagnose"]

Row: TypeAlias = Mapping[str, float]

# Nats a token. bfloat16 alone makes 0.02 to 0.04, and up to 0.7 on a single token (Qwen2.5-0.5B, two engines);
# float32 here 1e-7, and up to 2e-5. 0.1 on average is half of what PPO's clip allows, before anything is learned.
MISMATCH = 0.1
MISMATCH_OF_A_TOKEN = 5.0
# Nats a token, the median of so many steps: a single token that the reference thinks impossible makes a spike of k3.
# Runs of `experiments.countdown` that learn stay at 0.1 to 0.5, with spikes to 1.8.
FAR, FAR_STEPS = 1.0, 5
# Of the first step's entropy. Runs that learn Countdown keep 0.4 of it; at 0.1, most of what a policy will gain has
# been gained (arXiv 2505.22617). One that solves its task so often has little entropy, and should.
COLLAPSED, SOLVED = 0.1, 0.9
# Steps of which each was clipped. A supervised warm start clips its first 30, which heals by itself.
ALWAYS = 50
# A loss that prints as 0.000, and a gradient that does not.
NEAR_ZERO = 1e-3


def diagnose(metrics: Row, history: Sequence[Row] = ()) -> list[str]:
    """What a step's metrics mean, where they mean something to act on.

    Args:
      metrics: of the step, by name; what is not there is not judged.
      history: of the steps before it, in order, for what only lasting makes remarkable.

    Returns:
      A sentence each, often none. It begins with its name and a colon, and says which flags to look at.
    """
    said = (rule(metrics, history) for rule in _RULES)
    return [sentence for sentence in said if sentence]


def _no_signal(metrics: Row, history: Sequence[Row]) -> str | None:
    if metrics.get("frac_reward_zero_std", 0.0) < 1:
        return None
    # Another baseline than the group's makes advantages of equal rewards too; a penalty does, and is no signal.
    if metrics.get("advantage/abs_mean", 0.0) > 0 and "reward/kl_penalty" not in metrics:
        return None
    right, wrong = metrics.get("frac_groups_all_right", 0.0), metrics.get("frac_groups_all_wrong", 0.0)
    more = "more members a group (--rollout.group_size) find more spread"
    if right >= 1:
        kind, remedy = "all right", "the prompts are too easy by now"
    elif wrong >= 1:
        kind = "all wrong"
        remedy = f"the prompts are too hard, or the reward cannot be reached: look at the samples; {more}"
    else:
        kind, remedy = f"{right:.0%} all right, {wrong:.0%} all wrong", f"look at the samples; {more}"
    return (
        f"no signal: in every group all rewards are equal ({kind}), so no reward makes an "
        f"advantage{', and only the penalty moves the policy' if 'kl' in metrics else ''}; {remedy}."
    )


def _unknown(metrics: Row, history: Sequence[Row]) -> str | None:
    unknown = metrics.get("completions/unknown_reward", 0.0)
    if not unknown:
        return None
    return (
        f"unknown rewards: of {unknown:.0f} completions nobody knows the reward, for a judge came to no verdict "
        "(rewards/NAME/failed): they do not train, and are in no baseline. Look at what it said in the log."
    )


def _not_filled(metrics: Row, history: Sequence[Row]) -> str | None:
    missing = metrics.get("dynamic_sampling/filled_without_signal", 0.0)
    if not missing:
        return None
    return (
        f"not filled: {metrics.get('dynamic_sampling/waves', 0.0):.0f} waves found too few groups with signal, and "
        f"{missing:.0f} without fill the batch: raise --rollout.max_waves or --rollout.group_size, or look for prompts "
        "that are neither too easy nor too hard."
    )


def _no_steps(metrics: Row, history: Sequence[Row]) -> str | None:
    if metrics.get("completions/mean_steps", 1.0) > 0:
        return None
    return (
        "no steps: the objective rewards steps, and no reward function gave any: each completion is one step, and the "
        "advantages are those of --loss.objective=grpo."
    )


def _no_advantage(metrics: Row, history: Sequence[Row]) -> str | None:
    if metrics.get("frac_reward_zero_std", 1.0) >= 1 or metrics.get("advantage/abs_mean", 1.0) > 0:
        return None
    return (
        "no advantage: every advantage is 0, and yet rewards differ within groups: those that count are equal, or too "
        "few. Look at --advantages.count_truncated, and at --rollout.max_tokens if most completions are cut."
    )


def _truncated(metrics: Row, history: Sequence[Row]) -> str | None:
    if metrics.get("completions/clipped_ratio", 0.0) < 1:
        return None
    return (
        "truncated: every completion was cut at the limit and none ended: raise --rollout.max_tokens, or check the EOS "
        "ids and --rollout.stop. With --advantages.train_truncated=False nothing trains."
    )


def _not_finite(metrics: Row, history: Sequence[Row]) -> str | None:
    skipped, in_a_row = metrics.get("skipped", 0.0), metrics.get("skipped_in_a_row", 0.0)
    names = [name for name in ("loss", "grad_norm") if not math.isfinite(metrics.get(name, 0.0))]
    if not skipped and not names:
        return None
    what = " and ".join(names) or "the parameters after a step"
    return (
        f"not finite: {what}; {skipped:.0f} optimizer steps were left out ({in_a_row:.0f} in a row by now), and the "
        "parameters are as they were: if it comes again, lower --optimizer.learning_rate or bound log-ratios with "
        "--loss.clamp; --debug_nans names the operation."
    )


def _mismatch(metrics: Row, history: Sequence[Row]) -> str | None:
    """Of the first update of a rollout, where both should say the same: the ratio is 1 by definition."""
    name = "sampling/sampling_logp_difference"
    mean, top = metrics.get(f"{name}/mean", 0.0), metrics.get(f"{name}/max", 0.0)
    far = mean > MISMATCH or top > MISMATCH_OF_A_TOKEN
    if far and metrics.get("dynamic_sampling/reused_groups", 0.0) > 0:
        return (
            f"mismatch: sampler and trainer disagree on the log-probability of the same tokens by {mean:.2g} on "
            "average, and some groups waited for a step (--rollout.max_waves): the policy has moved far since. Lower "
            "--optimizer.learning_rate, or let --loss.correction make up for it."
        )
    if mean > MISMATCH:
        return (
            "mismatch: sampler and trainer disagree on the log-probability of the same tokens by "
            f"{mean:.2g} on average: a bug, or a dtype too coarse, which --model.compute_dtype=float32 would mend."
        )
    if top > MISMATCH_OF_A_TOKEN:
        return (
            f"mismatch: sampler and trainer disagree on a token's log-probability by {top:.2g}, though by {mean:.2g} "
            "on average: too much for rounding. One of them masks what the other does not (EOS, padding, a stop), or "
            "--model.compute_dtype is too coarse for it."
        )
    return None


def _far_from_the_reference(metrics: Row, history: Sequence[Row]) -> str | None:
    recent = _last("kl", FAR_STEPS, metrics, history)
    kl = statistics.median_low(recent) if recent else 0.0  # of two, the one that is no spike
    if not kl > FAR:  # a NaN is another rule's
        return None
    return (
        f"KL blows up: the policy is {kl:.2g} nats a token from its reference (median of "
        f"{len(recent)} steps): raise --loss.kl_coef, or lower --optimizer.learning_rate. If the reward still rises, "
        "read the samples: it may be won by nonsense."
    )


def _entropy_collapse(metrics: Row, history: Sequence[Row]) -> str | None:
    first = next((row["entropy"] for row in history if "entropy" in row), None)
    if first is None or "reward" not in metrics or metrics.get("accuracy", 0.0) > SOLVED:
        return None
    entropy = metrics.get("entropy", first)
    if not entropy < COLLAPSED * first:
        return None
    return (
        f"entropy collapse: {entropy:.2g} nats a token, {entropy / first:.1%} of the first step's. The members of a "
        "group become alike, and little is left to learn from: look at --loss.clip_high (DAPO raises it), "
        "--loss.entropy_coef, --optimizer.learning_rate and --rollout.temperature."
    )


def _always_clipped(metrics: Row, history: Sequence[Row]) -> str | None:
    recent = _last("grad_clipped", ALWAYS, metrics, history)
    if len(recent) < ALWAYS or min(recent) < 1:
        return None
    norms = _last("grad_norm", ALWAYS, metrics, history)
    size = f" (its median norm is {statistics.median(norms):.2g})" if norms else ""
    return (
        f"always clipped: the gradient was longer than --optimizer.clip_norm at each of the last {ALWAYS} steps{size}, "
        "so that all count the same. Raise --optimizer.clip_norm above it, or lower --optimizer.learning_rate if it "
        "grows."
    )


def _loss_near_zero(metrics: Row, history: Sequence[Row]) -> str | None:
    """At the first step, where people wonder; from then on they know."""
    if metrics.get("step") != 1 or "reward" not in metrics or "loss" not in metrics:
        return None
    # Where a clip holds something, ratios are not 1: the loss is a mean over several updates.
    if not abs(metrics["loss"]) < NEAR_ZERO < metrics.get("grad_norm", 0.0) or metrics.get("clip_ratio/region_mean"):
        return None
    return (
        "loss near zero: so it is by construction, and no fault. At the first update all ratios are 1, and the "
        f"advantages of a group sum to 0; the gradient is not 0 (its norm is {metrics['grad_norm']:.2g}). Watch the "
        "reward."
    )


def _last(name: str, steps: int, metrics: Row, history: Sequence[Row]) -> list[float]:
    """A metric of the last steps, this one included; of fewer, where there are fewer or some do not have it."""
    return [row[name] for row in (*history[max(0, len(history) - steps + 1) :], metrics) if name in row]


_RULES: tuple[Callable[[Row, Sequence[Row]], str | None], ...] = (
    _not_finite,
    _unknown,
    _no_signal,
    _not_filled,
    _no_steps,
    _no_advantage,
    _truncated,
    _mismatch,
    _far_from_the_reference,
    _entropy_collapse,
    _always_clipped,
    _loss_near_zero,
)

"""GRPO in plain NumPy loops and float64, written from the papers and independent of the library."""

import fractions
import math

import numpy as np
from scipy.stats import chi2


def pad(rows, width, side="right", value=0):
    """Ragged lists -> values [B, width] and mask [B, width], padded on the right, the left or both sides."""
    values, mask = np.full((len(rows), width), value), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        first = {"right": 0, "left": width - len(row), "both": (width - len(row)) // 2}[side]
        values[i, first : first + len(row)] = row
        mask[i, first : first + len(row)] = True
    return values, mask


def first_fit(sizes, capacity, slots):
    """How many rows first-fit decreasing takes; a size, like the capacity, is (columns, completion tokens)."""
    rows = []
    for columns, tokens in sorted(sizes, key=lambda size: -size[0]):
        for row in rows:
            if row[0] >= columns and row[1] >= tokens and row[2]:
                break
        else:
            row = [*capacity, slots]
            rows.append(row)
        row[:] = row[0] - columns, row[1] - tokens, row[2] - 1
    return len(rows)


def group_advantages(rewards, ddof=1, epsilon=1e-4, baseline="group", scale="group", counted=None):
    rewards = np.asarray(rewards, np.float64)
    counted = np.ones(rewards.shape, bool) if counted is None else counted
    members = [[(i, r) for i, r in enumerate(group) if counted[p, i]] for p, group in enumerate(rewards)]
    everyone = [r for group in members for _, r in group]
    centered, advantages = np.zeros(rewards.shape), np.zeros(rewards.shape)
    for p, i in np.ndindex(rewards.shape):
        peers = everyone if baseline == "batch" else [r for _, r in members[p]]
        if baseline == "none":
            centered[p, i] = rewards[p, i]
        elif len(set(peers)) > 1:
            peers = [r for j, r in members[p] if j != i] if baseline == "leave_one_out" else peers
            centered[p, i] = rewards[p, i] - math.fsum(peers) / len(peers)
    for p, i in np.ndindex(rewards.shape):
        peers = centered[counted].tolist() if scale == "batch" else [r for _, r in members[p]]
        if math.isnan(rewards[p, i]):
            continue
        if scale == "none":
            advantages[p, i] = centered[p, i]
        elif len(set(peers)) > 1:
            advantages[p, i] = centered[p, i] / (deviation(peers, ddof) + epsilon)
    return advantages


def deviation(values, ddof):
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - ddof))


def combine_rewards(rewards, weights, normalize=False):
    total = np.zeros(np.shape(rewards)[1:])
    for reward, weight in zip(np.asarray(rewards, np.float64), weights, strict=True):
        values = group_advantages(reward, counted=~np.isnan(reward)) if normalize else reward
        for p, i in np.ndindex(total.shape):
            total[p, i] += 0 if math.isnan(reward[p, i]) else weight * values[p, i]
    return total


def process_advantages(step_rewards, mask, group_size, ddof=1, epsilon=1e-4, counted=None):
    """Rewards [B, T] of the steps that end at tokens, NaN where none does."""
    advantages = np.zeros(mask.shape)
    steps = [[(t, float(r)) for t, r in enumerate(row) if not math.isnan(r)] for row in step_rewards]
    for b, t in zip(*np.nonzero(mask), strict=True):
        first = b - b % group_size
        rows = [i for i in range(first, first + group_size) if counted is None or counted[i]]
        every = [r for i in rows for _, r in steps[i]]
        if len(set(every)) > 1:
            mean, std = math.fsum(every) / len(every), deviation(every, ddof)
            advantages[b, t] = math.fsum((r - mean) / (std + epsilon) for e, r in steps[b] if e >= t)
    return advantages


def gae(rewards, values, mask, discount, smoothing):
    advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
    for b, row in enumerate(mask):
        length = int(sum(row))
        value = [float(v) for v in values[b, :length]] + [0.0]
        errors = [float(rewards[b, t]) + discount * value[t + 1] - value[t] for t in range(length)]
        for t in range(length):
            advantages[b, t] = sum((discount * smoothing) ** k * error for k, error in enumerate(errors[t:]))
            returns[b, t] = advantages[b, t] + value[t]
    return advantages, returns


def whiten(advantages, mask, epsilon, ddof=0, counted=None):
    rows = range(len(mask)) if counted is None else np.flatnonzero(counted)
    tokens = [float(advantages[i, t]) for i, t in zip(*np.nonzero(mask), strict=True) if i in rows]
    if len(set(tokens)) < 2:
        return np.zeros(mask.shape)
    mean, std = math.fsum(tokens) / len(tokens), deviation(tokens, ddof)
    return np.array(
        [[(float(x) - mean) / (std + epsilon) if trains else 0.0 for x, trains in zip(*rows, strict=True)]
         for rows in zip(advantages, mask, strict=True)]
    )  # fmt: skip


def sequence_mean(mask):
    weights = np.zeros(mask.shape)
    for i, row in enumerate(mask):
        for t, trains in enumerate(row):
            weights[i, t] = 1 / (len(mask) * sum(row)) if trains else 0
    return weights


def token_mean(mask):
    tokens = sum(int(trains) for row in mask for trains in row)
    return np.array([[1 / tokens if trains else 0.0 for trains in row] for row in mask])


def clipped_surrogate(ratio, advantage, clip_low, clip_high):
    """The value of one token, and whether the clip holds it constant."""
    clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
    return min(ratio * advantage, clipped * advantage), clipped * advantage < ratio * advantage


def kl_k1(logprob, ref):
    return math.log(math.exp(logprob) / math.exp(ref))


def kl_k2(logprob, ref):
    return 0.5 * math.log(math.exp(logprob) / math.exp(ref)) ** 2


def kl_k3(logprob, ref):
    return math.exp(ref) / math.exp(logprob) - 1 - math.log(math.exp(ref) / math.exp(logprob))


def grpo(logprobs, advantages, mask, *, old=None, ref=None, weights=None, clip_low=0.2, clip_high=0.2, kl_coef=0.04):
    """Loss, gradient with respect to logprobs [B, T], and metrics."""
    weights = sequence_mean(mask) if weights is None else weights
    loss, gradient = 0.0, np.zeros(mask.shape)
    lows, highs, kls = [], [], []
    for i, t in zip(*np.nonzero(mask), strict=True):
        advantage = float(advantages[i] if np.ndim(advantages) == 1 else advantages[i, t])
        logprob = float(logprobs[i, t])
        ratio = 1.0 if old is None else math.exp(logprob - float(old[i, t]))
        surrogate, constant = clipped_surrogate(ratio, advantage, clip_low, clip_high)
        loss -= weights[i, t] * surrogate
        gradient[i, t] -= 0 if constant else weights[i, t] * ratio * advantage
        lows.append(ratio < 1 - clip_low and advantage < 0)
        highs.append(ratio > 1 + clip_high and advantage > 0)
        if kl_coef:
            kls.append(kl_k3(logprob, float(ref[i, t])))
            loss += weights[i, t] * kl_coef * kls[-1]
            gradient[i, t] += weights[i, t] * kl_coef * (1 - math.exp(float(ref[i, t]) - logprob))
    mean = lambda values: sum(values) / len(values) if values else 0.0
    metrics = {
        "clip_ratio/low_mean": mean(lows),
        "clip_ratio/high_mean": mean(highs),
        "clip_ratio/region_mean": mean(lows) + mean(highs),
    }
    return loss, gradient, metrics | ({"kl": mean(kls)} if kl_coef else {})


def importance_correction(old, sampler, mask, level, bound, masked):
    """The correction of each token, and what is logged of it."""
    correction, weights, differences = np.zeros(mask.shape), [], []
    for i, t in zip(*np.nonzero(mask), strict=True):
        tokens = [t] if level == "token" else [u for u in range(mask.shape[1]) if mask[i, u]]
        weight = math.prod(math.exp(float(old[i, u]) - float(sampler[i, u])) for u in tokens)
        weights.append(weight)
        differences.append(abs(float(old[i, t]) - float(sampler[i, t])))
        correction[i, t] = (weight if 1 / bound <= weight <= bound else 0.0) if masked else min(weight, bound)
    name, count = "sampling/sampling_logp_difference", max(len(weights), 1)
    squares = sum(w**2 for w in weights)
    return correction, {
        f"{name}/mean": sum(differences) / count,
        f"{name}/max": max(differences, default=0.0),
        "sampling/effective_sample_size": sum(weights) ** 2 / (count * squares) if weights else 0.0,
        "sampling/frac_out_of_bounds": sum(not 1 / bound <= w <= bound for w in weights) / count,
    }


def top_entropies(entropies, mask, share):
    count = math.ceil(fractions.Fraction(str(share)) * int(mask.sum()))
    kept = sorted((float(h) for h in entropies[mask]), reverse=True)[:count]
    return np.array(
        [[bool(m) and h >= kept[-1] for h, m in zip(*row, strict=True)] for row in zip(entropies, mask, strict=True)]
    )


def log_weight(level, i, t, logprobs, frozen, old, mask):
    """The logarithm of the importance weight of a token; `frozen` stands where no gradient flows."""
    ratio = lambda x, u: float(x[i, u]) - float(old[i, u])
    tokens = [u for u in range(mask.shape[1]) if mask[i, u]]
    mean = lambda x: sum(ratio(x, u) for u in tokens) / len(tokens)
    if level == "token":
        return ratio(logprobs, t)
    if level == "sequence":
        return mean(logprobs)
    return mean(frozen) + float(logprobs[i, t]) - float(frozen[i, t])


def surrogate(kind, options, log_weight, frozen_log_weight, logprob, advantage):
    """The term of one token."""
    weight, frozen = math.exp(log_weight), math.exp(frozen_log_weight)
    if kind == "clipped":
        value, _ = clipped_surrogate(weight, advantage, options["clip_low"], options["clip_high"])
        bound = options.get("dual_clip", 0.0)
        return max(value, bound * advantage) if bound and advantage < 0 else value
    if kind == "unclipped":
        return weight * advantage
    if kind == "clipped_weight":
        return min(max(frozen, 1 - options["clip_low"]), 1 + options["clip_high"]) * advantage * logprob
    if kind == "soft_gate":
        tau = options["positive"] if advantage > 0 else options["negative"]
        return advantage * 4 / tau / (1 + math.exp(-tau * (weight - 1)))
    return weight * advantage - options["kl_coef"] * (weight * math.log(weight) - weight + 1)  # mirror_descent


def kl(estimator, logprob, frozen, ref):
    """An estimate for one token; those with a plus have the value of one and the gradient of k2."""
    functions = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}
    if not estimator.endswith("+"):
        return functions[estimator](logprob, ref)
    return functions[estimator[:-1]](frozen, ref) - kl_k2(frozen, ref) + kl_k2(logprob, ref)


def policy_value(
    logprobs, advantages, mask, *, frozen, kind="clipped", options=None, level="token", old=None, clamp=0.0, ref=None,
    estimator="k3", kl_coef=0.0, weighted_kl=False, entropies=None, entropy_coef=0.0, correction=None, weights=None,
):  # fmt: skip
    """The loss of a policy gradient, token by token; `frozen` are the log-probabilities where no gradient flows."""
    weights = sequence_mean(mask) if weights is None else weights
    old = frozen if old is None else old
    bounded = lambda x: np.clip(x, old - clamp, old + clamp) if clamp else x
    loss = 0.0
    for i, t in zip(*np.nonzero(mask), strict=True):
        advantage = float(advantages[i] if np.ndim(advantages) == 1 else advantages[i, t])
        both = [log_weight(level, i, t, x, bounded(frozen), old, mask) for x in (bounded(logprobs), bounded(frozen))]
        term = surrogate(kind, options or {}, *both, float(logprobs[i, t]), advantage)
        term *= 1.0 if correction is None else float(correction[i, t])
        if kl_coef:
            divergence = kl(estimator, float(logprobs[i, t]), float(frozen[i, t]), float(ref[i, t]))
            ratio = math.exp(float(bounded(logprobs)[i, t]) - float(old[i, t]))
            term -= kl_coef * divergence * (ratio if weighted_kl else 1.0)
        if entropy_coef:
            term += entropy_coef * float(entropies[i, t])
        loss -= float(weights[i, t]) * term
    return loss


def policy(logprobs, advantages, mask, **options):
    """The loss, and its gradient with respect to logprobs [B, T], by central differences in float64."""
    frozen, gradient, step = np.asarray(logprobs, np.float64), np.zeros(mask.shape), 1e-6
    for at in zip(*np.nonzero(mask), strict=True):
        ends = []
        for sign in (1, -1):
            moved = frozen.copy()
            moved[at] += sign * step
            ends.append(policy_value(moved, advantages, mask, frozen=frozen, **options))
        gradient[at] = (ends[0] - ends[1]) / (2 * step)
    return policy_value(frozen, advantages, mask, frozen=frozen, **options), gradient


def sequence_sum(mask):
    return np.array([[1 / len(mask) if trains else 0.0 for trains in row] for row in mask])


def fixed_length(mask):
    return np.array([[1 / mask.size if trains else 0.0 for trains in row] for row in mask])


def dpo(chosen, rejected, ref_chosen, ref_rejected, beta):
    """The mean over pairs of minus log sigmoid of the margin."""
    margins = [
        beta * (math.log(math.exp(w) / math.exp(rw)) - math.log(math.exp(x) / math.exp(rx)))
        for w, x, rw, rx in zip(*(map(float, a) for a in (chosen, rejected, ref_chosen, ref_rejected)), strict=True)
    ]
    return sum(math.log(1 + math.exp(-m)) for m in margins) / len(margins), margins


def supervised(logprobs, mask, weights=None):
    """Loss, and gradient with respect to logprobs [B, T]."""
    weights = token_mean(mask) if weights is None else weights
    return -sum(weights[i, t] * logprobs[i, t] for i, t in zip(*np.nonzero(mask), strict=True)), -weights


def softmax(logits):
    top = max(logits)
    exps = [math.exp(x - top) for x in logits]
    return np.array([e / math.fsum(exps) for e in exps])


def truncate(logits, top_k=0, top_p=1.0, min_p=0.0):
    """One row of logits -> which of them may be sampled. Equals of the last one that is kept are kept too."""
    ordered = sorted((float(x) for x in logits), reverse=True)
    kept = [x for x in ordered if not top_k or x >= ordered[min(top_k, len(ordered)) - 1]]
    if top_p < 1:
        probabilities = softmax(kept)
        count = 1
        while math.fsum(probabilities[:count]) < top_p and count < len(kept):
            count += 1
        kept = kept[:count]
    return np.array([float(x) >= kept[-1] and math.exp(x - ordered[0]) >= min_p for x in logits])


LEVEL = 1e-3  # of chi-squared tests


def rejected(tokens, probabilities):
    """Whether a chi-squared test rejects that `tokens` were drawn from `probabilities`; rare tokens share a bin."""
    counts, expected = np.bincount(tokens, minlength=len(probabilities)), len(tokens) * probabilities
    assert (counts[probabilities == 0] == 0).all()
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] < 5:
        counts, expected = counts[:-1], expected[:-1]
    statistic = ((counts - expected) ** 2 / expected).sum()
    return statistic > chi2.isf(LEVEL, len(counts) - 1)


def bradley_terry(chosen, rejected, margins, center_coef=0.0):
    """Loss, and its derivatives by the scores of the chosen and of the rejected."""
    n, loss, by_chosen, by_rejected = len(chosen), 0.0, [], []
    for good, bad, margin in zip(chosen, rejected, margins, strict=True):
        ahead = float(good) - float(bad) - float(margin)
        loss += math.log1p(math.exp(-ahead)) if ahead > 0 else -ahead + math.log1p(math.exp(ahead))
        slope = -1 / (1 + math.exp(ahead))
        center = 2 * center_coef * (float(good) + float(bad))
        loss += center_coef * (float(good) + float(bad)) ** 2
        by_chosen.append((slope + center) / n)
        by_rejected.append((-slope + center) / n)
    return loss / n, by_chosen, by_rejected

"""GRPO in plain NumPy loops and float64, written from the papers and independent of the library."""

import math

import numpy as np


def pad(rows, width, side="right", value=0):
    """Ragged lists -> values [B, width] and mask [B, width], padded on the right, the left or both sides."""
    values, mask = np.full((len(rows), width), value), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        first = {"right": 0, "left": width - len(row), "both": (width - len(row)) // 2}[side]
        values[i, first : first + len(row)] = row
        mask[i, first : first + len(row)] = True
    return values, mask


def group_advantages(rewards, ddof=1, epsilon=1e-4):
    advantages = np.zeros(np.shape(rewards))
    for p, group in enumerate(np.asarray(rewards, np.float64)):
        if len(set(group.tolist())) == 1:
            continue
        mean = math.fsum(group) / len(group)
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in group) / (len(group) - ddof))
        for i, r in enumerate(group):
            advantages[p, i] = (r - mean) / (std + epsilon)
    return advantages


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


def supervised(logprobs, mask, weights=None):
    """Loss, and gradient with respect to logprobs [B, T]."""
    weights = token_mean(mask) if weights is None else weights
    return -sum(weights[i, t] * logprobs[i, t] for i, t in zip(*np.nonzero(mask), strict=True)), -weights


def softmax(logits):
    top = max(logits)
    exps = [math.exp(x - top) for x in logits]
    return np.array([e / math.fsum(exps) for e in exps])


def truncate(logits, top_k=0, top_p=1.0):
    """One row of logits -> which of them may be sampled. Equals of the last one that is kept are kept too."""
    ordered = sorted((float(x) for x in logits), reverse=True)
    kept = [x for x in ordered if not top_k or x >= ordered[min(top_k, len(ordered)) - 1]]
    if top_p < 1:
        probabilities = softmax(kept)
        count = 1
        while math.fsum(probabilities[:count]) < top_p and count < len(kept):
            count += 1
        kept = kept[:count]
    return np.array([float(x) >= kept[-1] for x in logits])

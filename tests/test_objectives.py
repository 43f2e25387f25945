"""Each row of the table beside the oracle: loss, gradient and advantages, with what it is made of written out here."""

import dataclasses

import jax
import numpy as np
import pytest

from grpo_jax.objectives import OBJECTIVES, LossConfig, make_objective
from grpo_jax.outcomes import AdvantageConfig, Outcome
from tests import oracle

B, T = 6, 5
TOKEN_CLIP, LONG_CLIP = {"clip_low": 0.2, "clip_high": 0.2}, {"clip_low": 3e-4, "clip_high": 4e-4}
PROCESS, GAE, REFUSED = "of steps", "GAE", ("grpo_process", True)
# Name -> surrogate, its options, level, token weights, baseline, scale.
ROWS = {
    "grpo": ("clipped", TOKEN_CLIP, "token", "sequence_mean", "group", "group"),
    "grpo_process": ("clipped", TOKEN_CLIP, "token", "sequence_mean", PROCESS, ""),
    "dr_grpo": ("clipped", TOKEN_CLIP, "token", "fixed_length", "group", "none"),
    "dapo": ("clipped", {"clip_low": 0.2, "clip_high": 0.28}, "token", "token_mean", "group", "group"),
    "gspo": ("clipped", LONG_CLIP, "sequence", "sequence_mean", "group", "group"),
    "gspo_token": ("clipped", LONG_CLIP, "sequence with token gradient", "sequence_mean", "group", "group"),
    "cispo": ("clipped_weight", {"clip_low": 1.0, "clip_high": 4.0}, "token", "token_mean", "group", "group"),
    "sapo": ("soft_gate", {"positive": 1.0, "negative": 1.05}, "token", "sequence_mean", "group", "group"),
    "rloo": ("unclipped", {}, "token", "sequence_sum", "leave_one_out", "none"),
    "reinforce": ("unclipped", {}, "token", "sequence_sum", "none", "none"),
    "reinforce_batch": ("unclipped", {}, "token", "sequence_sum", "batch", "none"),
    "reinforce_plus_plus": ("clipped", TOKEN_CLIP, "token", "token_mean", "group", "batch"),
    "ppo": ("clipped", TOKEN_CLIP, "token", "token_mean", GAE, ""),
    "mdpo": ("mirror_descent", {"kl_coef": 1.0}, "token", "sequence_mean", "group", "group"),
}


def batch():
    rng = np.random.default_rng(0)
    mask = np.arange(T) < np.array([5, 3, 1, 4, 0, 2])[:, None]
    logprobs, shift, ref = -rng.exponential(size=(B, T)), rng.normal(scale=0.5, size=(B, T)), rng.normal(size=(B, T))
    arrays = logprobs, logprobs - shift, logprobs + ref, rng.normal(size=B), rng.exponential(size=(B, T))
    return mask, *(x.astype(np.float32) for x in arrays)


def test_the_table_is_all_there():
    assert ROWS.keys() == OBJECTIVES.keys()


@pytest.mark.parametrize(
    "changes", [{"kl_coef": 0.0}, {"kl": "k3+", "weighted_kl": True, "entropy_coef": 0.2, "clamp": 0.6}]
)
@pytest.mark.parametrize("name", ROWS)
def test_loss_and_gradient(name, changes):
    kind, options, level, weights, _, _ = ROWS[name]
    config = LossConfig(objective=name, **changes)
    objective = make_objective(config)
    mask, logprobs, old, ref, advantages, entropies = batch()
    assert objective.needs_reference == (config.kl_coef != 0)
    given = {"entropies": entropies, "old_logprobs": old, "ref_logprobs": ref if config.kl_coef else None}
    (loss, _), gradient = jax.value_and_grad(objective.loss, has_aux=True)(
        logprobs, advantages, mask, weights=objective.token_weights(mask), **given
    )
    expected = oracle.policy(
        logprobs, advantages, mask, kind=kind, options=options, level=level, old=old, ref=ref, estimator=config.kl,
        kl_coef=config.kl_coef, weighted_kl=config.weighted_kl, entropies=entropies, entropy_coef=config.entropy_coef,
        clamp=config.clamp, weights=getattr(oracle, weights)(mask),
    )  # fmt: skip
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-4, atol=1e-6)


def outcome(penalties=None):
    """Two groups of three; the step rewards of the first completions add up, and the others have one step each."""
    rng = np.random.default_rng(1)
    mask = np.arange(T) < np.array([5, 3, 1, 4, 2, 2])[:, None]
    counted = np.array([[True, True, True], [True, True, False]])
    steps = np.full((B, T), np.nan, np.float32)
    steps[np.arange(B), mask.sum(1) - 1] = rng.normal(size=B)
    steps[0, 1], steps[3, 0] = 0.3, -0.4
    rewards = np.nansum(steps, axis=1).reshape(2, 3)
    return Outcome(rewards=rewards, counted=counted, mask=mask, step_rewards=steps, penalties=penalties)


def expected_advantages(name, worth, *, ddof=1, epsilon=1e-4, **gae):
    """[B] or [B, T]."""
    *_, baseline, scale = ROWS[name]
    taken = np.zeros(worth.mask.shape) if worth.penalties is None else np.where(worth.mask, worth.penalties, 0)
    returns, counted = worth.rewards - taken.sum(1).reshape(2, 3), worth.counted.reshape(-1)
    if baseline == PROCESS:
        return oracle.process_advantages(worth.step_rewards, worth.mask, 3, ddof, epsilon, counted)
    if baseline == GAE:
        values, rewards = np.zeros(worth.mask.shape), -taken
        for p, i in np.ndindex(2, 3):
            others = [returns[p, j] for j in range(3) if j != i and worth.counted[p, j]]
            values[3 * p + i] = sum(others) / len(others)
            rewards[3 * p + i, worth.mask[3 * p + i].sum() - 1] += worth.rewards[p, i]
        advantages, _ = oracle.gae(rewards, values, worth.mask, gae["discount"], gae["smoothing"])
        return oracle.whiten(advantages, worth.mask, epsilon, ddof, counted)
    return oracle.group_advantages(returns, ddof, epsilon, baseline, scale, worth.counted).reshape(-1)


@pytest.mark.parametrize(("name", "in_reward"), [(n, x) for n in ROWS for x in (False, True) if (n, x) != REFUSED])
def test_advantages(name, in_reward):
    penalties = np.random.default_rng(2).normal(size=(B, T)).astype(np.float32) if in_reward else None
    worth, options = outcome(penalties), {"ddof": 0, "epsilon": 0.1} if ROWS[name][5] != "none" else {}
    gae = {"smoothing": 0.5, "discount": 0.9} if ROWS[name][4] == GAE else {}
    got = AdvantageConfig(**options, **gae).of(make_objective(LossConfig(objective=name)).advantages)(worth)
    np.testing.assert_allclose(got, expected_advantages(name, worth, **options, **gae), atol=1e-5)
    np.testing.assert_equal(make_objective(LossConfig(objective=name)).needs_steps, name == "grpo_process")


@pytest.mark.parametrize("name", ROWS)
def test_a_penalty_in_the_reward_is_not_in_the_loss(name):
    if name == "grpo_process":
        with pytest.raises(ValueError, match="no place for kl_in_reward=True"):
            make_objective(LossConfig(objective=name, kl_in_reward=True))
        return
    inside, none = (
        make_objective(LossConfig(objective=name, **changes))
        for changes in ({"kl_coef": 0.5, "kl": "k2", "kl_in_reward": True}, {"kl_coef": 0.0})
    )
    assert inside.needs_reference
    assert not inside.reference_in_loss
    assert make_objective(LossConfig(objective=name)).reference_in_loss
    mask, logprobs, old, ref, advantages, entropies = batch()
    given = {"entropies": entropies, "old_logprobs": old, "ref_logprobs": None, "weights": inside.token_weights(mask)}
    ours, theirs = (objective.loss(logprobs, advantages, mask, **given)[0] for objective in (inside, none))
    assert ours == theirs
    assert inside.reward_kl_coef == 0.5
    np.testing.assert_allclose(inside.reward_kl(logprobs, ref), (logprobs - ref) ** 2 / 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("grpo", {"smoothing": 0.5}, "no place for smoothing=0.5"),
        ("dapo", {"discount": 0.5}, "no place for discount=0.5"),
        ("ppo", {"baseline": "batch", "scale": "none"}, "no place for baseline='batch', scale='none'"),
        ("grpo_process", {"scale": "batch"}, "no place for scale='batch'"),
        ("dr_grpo", {"ddof": 0, "epsilon": 0.5}, "no place for ddof=0, epsilon=0.5"),
        ("grpo", {"scale": "none", "epsilon": 0.5}, "no place for epsilon=0.5"),
        ("reinforce", {"count_truncated": False}, "no place for count_truncated=False"),
    ],
)
def test_what_the_advantages_have_no_place_for_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        AdvantageConfig(**changes).of(make_objective(LossConfig(objective=name)).advantages)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("dr_grpo", {"scale": "group", "epsilon": 0.5}),
        ("rloo", {"normalize_each": True, "ddof": 0}),
        ("reinforce", {"baseline": "batch", "count_truncated": False}),
    ],
)
def test_what_they_have_a_place_for_is_not(name, changes):
    AdvantageConfig(**changes).of(make_objective(LossConfig(objective=name)).advantages)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "gspo_token", "reinforce_plus_plus", "ppo"])
def test_the_clip_can_be_set(name):
    kind, _, level, weights, _, _ = ROWS[name]
    options = {"clip_low": 0.05, "clip_high": 0.5, "dual_clip": 1.2}
    objective = make_objective(LossConfig(objective=name, kl_coef=0.0, **options))
    mask, logprobs, old, _, advantages, entropies = batch()
    given = {"entropies": entropies, "old_logprobs": old, "ref_logprobs": None}
    loss, _ = objective.loss(logprobs, advantages, mask, weights=objective.token_weights(mask), **given)
    expected, _ = oracle.policy(
        logprobs, advantages, mask, kind=kind, options=options, level=level, old=old,
        weights=getattr(oracle, weights)(mask),
    )  # fmt: skip
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "ppo2"}, "objective='ppo2' must be one of grpo, grpo_process, dr_grpo"),
        ({"kl": "k4"}, "kl='k4' must be one of k1, k2, k3, k1+, k3+"),
        ({"kl_coef": -1.0}, "kl_coef=-1.0 must be 0 or more"),
        ({"kl_in_reward": True, "kl": "k1+"}, "a reward has no gradient to correct"),
        ({"kl_in_reward": True, "weighted_kl": True}, "a reward has no gradient to correct"),
        ({"clip_low": 0.0}, r"clip_low=0.0 must lie in \(0, 1\]"),
        ({"clip_high": 0.0}, "clip_high=0.0 must be above 0"),
        ({"dual_clip": 0.5}, "dual_clip=0.5 must be above 1 or 0"),
        ({"clamp": -1.0}, "clamp=-1.0 and"),
        ({"mdpo_coef": -1.0}, "mdpo_coef=-1.0 0 or more"),
        ({"mdpo_coef": 0.5}, "objective 'grpo' has no place for mdpo_coef=0.5"),
        ({"kl_coef": 0.0, "kl_in_reward": True}, "kl_in_reward=True.* with kl_coef=0 there is no KL"),
        ({"kl_coef": 0.0, "weighted_kl": True}, "weighted_kl=True: with kl_coef=0 there is no KL"),
        ({"kl_coef": 0.0, "kl": "k1"}, "kl='k1', .* with kl_coef=0 there is no KL"),
        ({"kl_coef": float("nan")}, "kl_coef=nan must be 0 or more"),
        ({"objective": "sapo", "clip_low": 0.1}, "objective 'sapo' has no place for clip_low=0.1"),
        ({"objective": "cispo", "dual_clip": 3.0}, "objective 'cispo' has no place for dual_clip=3.0"),
        ({"objective": "rloo", "clip_high": 0.1, "clip_low": 0.2}, "no place for clip_low=0.2, clip_high=0.1"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        make_objective(LossConfig(**changes))


def test_a_configuration_of_every_objective_can_be_saved_and_read():
    for name in OBJECTIVES:
        config = LossConfig(objective=name)
        assert LossConfig(**dataclasses.asdict(config)) == config


def test_the_coefficient_of_mirror_descent():
    mask, logprobs, old, _, advantages, entropies = batch()
    objective = make_objective(LossConfig(objective="mdpo", kl_coef=0.0, mdpo_coef=0.3))
    given = {"entropies": entropies, "old_logprobs": old, "ref_logprobs": None}
    loss, _ = objective.loss(logprobs, advantages, mask, weights=objective.token_weights(mask), **given)
    expected, _ = oracle.policy(logprobs, advantages, mask, kind="mirror_descent", options={"kl_coef": 0.3}, old=old)
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)

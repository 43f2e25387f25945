"""Each row of the table beside the oracle: loss, gradient and advantages, with what it is made of written out here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.objectives import OBJECTIVES, LossConfig, make_objective
from tests import oracle

B, T = 6, 5
TOKEN_CLIP, LONG_CLIP = {"clip_low": 0.2, "clip_high": 0.2}, {"clip_low": 3e-4, "clip_high": 4e-4}
# Name -> surrogate, its options, level, token weights, baseline, scale.
ROWS = {
    "grpo": ("clipped", TOKEN_CLIP, "token", "sequence_mean", "group", "group"),
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


@pytest.mark.parametrize("name", ROWS)
def test_advantages(name):
    *_, baseline, scale = ROWS[name]
    rewards = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
    got = make_objective(LossConfig(objective=name)).advantages(jnp.array(rewards), ddof=0, epsilon=0.1)
    expected = oracle.group_advantages(rewards, ddof=0, epsilon=0.1, baseline=baseline, scale=scale)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "gspo_token", "reinforce_plus_plus"])
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
        ({"objective": "ppo2"}, "objective='ppo2' must be one of grpo, dr_grpo, dapo"),
        ({"kl": "k4"}, "kl='k4' must be one of k1, k2, k3, k1+, k3+"),
        ({"kl_coef": -1.0}, "kl_coef=-1.0 must be 0 or more"),
        ({"clip_low": 0.0}, r"clip_low=0.0 must lie in \(0, 1\]"),
        ({"clip_high": 0.0}, "clip_high=0.0 above 0"),
        ({"dual_clip": 0.5}, "dual_clip=0.5 must be above 1 or 0"),
        ({"clamp": -1.0}, "clamp=-1.0 0 or more"),
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

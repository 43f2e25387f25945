"""Named objectives: what the train step minimizes, each a composition of the pieces in `losses` and `advantages`."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax

from grpo_jax import advantages, losses, outcomes
from grpo_jax.corrections import CORRECTIONS, importance_correction
from grpo_jax.metrics import Metrics

__all__ = [
    "OBJECTIVES",
    "LossConfig",
    "Objective",
    "cispo",
    "dapo",
    "dr_grpo",
    "grpo",
    "grpo_process",
    "gspo",
    "gspo_token",
    "make_objective",
    "mdpo",
    "ppo",
    "reinforce",
    "reinforce_batch",
    "reinforce_plus_plus",
    "rloo",
    "sapo",
    "supervised",
]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Objective:
    """A loss on arrays, and what has to be computed for it. Static under jit."""

    # (logprobs, advantages, mask, *, entropies, old_logprobs, ref_logprobs, correction, weights) -> (loss, metrics)
    loss: Callable[..., tuple[jax.Array, Metrics]]
    token_weights: Callable[[jax.Array], jax.Array]  # mask [b, T] of a whole minibatch -> weights
    needs_reference: bool = False  # the state holds one
    advantages: outcomes.Estimator = outcomes.outcome_supervision
    needs_steps: bool = False  # advantages look at the rewards of steps
    reward_kl: losses.Estimator | None = None  # of the KL that is taken from the reward; None: nothing is
    reward_kl_coef: float = 0.0
    # (old log-probabilities, the sampler's, mask) -> (correction, metrics); the metrics always, and where it
    # `corrects` the loss too
    correction: Callable[..., tuple[jax.Array, Metrics]] = importance_correction
    corrects: bool = False
    top_entropy: float = 1.0  # share of the rollout's tokens, those of the greatest entropy, whose surrogate counts

    @property
    def reference_in_loss(self) -> bool:
        """Whether the loss takes the reference's log-probabilities."""
        return self.needs_reference and self.reward_kl is None


ESTIMATORS: Mapping[str, losses.Estimator] = {
    "k1": losses.kl_k1,
    "k2": losses.kl_k2,
    "k3": losses.kl_k3,
    "k1+": losses.with_gradient_of_k2(losses.kl_k1),
    "k3+": losses.with_gradient_of_k2(losses.kl_k3),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The objective, and what can be combined with any."""

    objective: str = "grpo"  # by name: see docs/objectives.md
    kl_coef: float = 0.04  # beta; 0: no reference is held and no reference pass runs
    kl: str = "k3"  # estimator of the KL: k1, k2, k3; k1+ and k3+ have the gradient of k2, which is the KL's
    weighted_kl: bool = False  # the estimate times the token's ratio: unbiased off-policy too
    kl_in_reward: bool = False  # the penalty is taken from the reward, and the loss has none
    clip_low: float | None = None  # epsilon below a ratio of 1; None: the objective's own
    clip_high: float | None = None  # epsilon above a ratio of 1; None: the objective's own
    dual_clip: float = 0.0  # bound of the ratio where the advantage is negative, above 1; 0: none
    mdpo_coef: float = 1.0  # lambda, of the KL to the old policy that mdpo has in place of a clip
    clamp: float = 0.0  # log-ratios are cut to this; 0: they are not
    entropy_coef: float = 0.0  # of the entropy that is added to what is maximized
    top_entropy: float = 1.0  # the share of tokens, those of the greatest entropy, that learn; below 1 it costs a pass
    correction: str = "none"  # of sampler against trainer: token_truncate, token_mask, sequence_truncate, sequence_mask
    correction_bound: float = 2.0  # C: weights are cut above it, or left out above it and below 1 / C

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective={self.objective!r} must be one of {', '.join(OBJECTIVES)}.")
        if not self.kl_coef >= 0:
            raise ValueError(f"kl_coef={self.kl_coef} must be 0 or more.")
        if self.kl not in ESTIMATORS:
            raise ValueError(f"kl={self.kl!r} must be one of {', '.join(ESTIMATORS)}.")
        if not self.kl_coef and (self.kl_in_reward or self.weighted_kl or self.kl != "k3"):
            raise ValueError(
                f"kl={self.kl!r}, kl_in_reward={self.kl_in_reward}, weighted_kl={self.weighted_kl}: with kl_coef=0 "
                "there is no KL. Leave them out."
            )
        if self.kl_in_reward and (self.weighted_kl or self.kl.endswith("+")):
            raise ValueError(
                f"kl_in_reward=True with weighted_kl={self.weighted_kl}, kl={self.kl!r}: a reward has no gradient to "
                "correct. Leave weighted_kl out, and take k1, k2 or k3."
            )
        if self.clip_low is not None and not 0 < self.clip_low <= 1:
            raise ValueError(f"clip_low={self.clip_low} must lie in (0, 1].")
        if self.clip_high is not None and not self.clip_high > 0:
            raise ValueError(f"clip_high={self.clip_high} must be above 0.")
        if not 0 < self.top_entropy <= 1:
            raise ValueError(f"top_entropy={self.top_entropy} must be in (0, 1]; 1: every token learns.")
        if self.correction not in ("none", *CORRECTIONS):
            raise ValueError(f"correction={self.correction!r} must be none or one of {', '.join(CORRECTIONS)}.")
        if not self.correction_bound > 1:
            raise ValueError(f"correction_bound={self.correction_bound} must be above 1.")
        if 0 < self.dual_clip <= 1 or self.dual_clip < 0 or min(self.clamp, self.mdpo_coef) < 0:
            raise ValueError(
                f"dual_clip={self.dual_clip} must be above 1 or 0, clamp={self.clamp} and mdpo_coef={self.mdpo_coef} "
                "0 or more."
            )


def _bounds(config: LossConfig, low: float, high: float) -> tuple[float, float]:
    """Where the clip is: the configuration's, else the paper's."""
    return low if config.clip_low is None else config.clip_low, high if config.clip_high is None else config.clip_high


def _refuse(config: LossConfig, name: str, *fields: str) -> None:
    """Raises ValueError where a field is set that this objective has no place for."""
    default = LossConfig()
    if given := [
        f"{field}={getattr(config, field)}" for field in fields if getattr(config, field) != getattr(default, field)
    ]:
        raise ValueError(f"objective {name!r} has no place for {', '.join(given)}: leave it out, or take another.")


def _policy(
    config: LossConfig,
    surrogate: losses.Surrogate,
    *,
    level: losses.Level = losses.token_level,
    token_weights: Callable[[jax.Array], jax.Array] = losses.sequence_mean,
    estimator: outcomes.Estimator = outcomes.outcome_supervision,
    needs_steps: bool = False,
) -> Objective:
    in_reward = config.kl_in_reward and config.kl_coef != 0
    return Objective(
        loss=functools.partial(
            losses.policy_loss, surrogate=surrogate, level=level, clamp=config.clamp, kl=ESTIMATORS[config.kl],
            kl_coef=0.0 if in_reward else config.kl_coef, weighted_kl=config.weighted_kl,
            entropy_coef=config.entropy_coef,
        ),
        token_weights=token_weights,
        needs_reference=config.kl_coef != 0,
        advantages=estimator,
        needs_steps=needs_steps,
        reward_kl=ESTIMATORS[config.kl] if in_reward else None,
        reward_kl_coef=config.kl_coef if in_reward else 0.0,
        correction=functools.partial(
            importance_correction, bound=config.correction_bound, **CORRECTIONS.get(config.correction, {})
        ),
        corrects=config.correction != "none",
        top_entropy=config.top_entropy,
    )  # fmt: skip


def _relative(
    baseline: advantages.Baseline = advantages.group_mean, scale: advantages.Scale = advantages.group_std
) -> outcomes.Estimator:
    return functools.partial(outcomes.outcome_supervision, baseline=baseline, scale=scale)


def _clipped(config: LossConfig, low: float = 0.2, high: float = 0.2) -> losses.Surrogate:
    return losses.clipped(*_bounds(config, low, high), dual_clip=config.dual_clip)


# The table. Each docstring has its equation, with rho the ratio to the old policy, A the advantage. ----------


def grpo(config: LossConfig | None = None) -> Objective:
    r"""GRPO (DeepSeekMath, arXiv 2402.03300, eq. 3 and 4), with outcome supervision.

    .. math:: \frac1G \sum_i \frac1{|o_i|} \sum_t \min(\rho A, \mathrm{clip}(\rho, 1 \pm 0.2) A) - \beta k_3,
       \quad A_i = (r_i - \mathrm{mean}(r)) / \mathrm{std}(r)

    The paper says neither which deviation nor what is added to it: `AdvantageConfig` has TRL's, the sample's and 1e-4.
    """
    config = LossConfig() if config is None else config
    return _policy(config, _clipped(config))


def grpo_process(config: LossConfig) -> Objective:
    r"""GRPO with process supervision (DeepSeekMath, arXiv 2402.03300, section 4.1.3): rewards of steps.

    .. math:: A_{i,t} = \sum_{j:\ end(j) \ge t} (r_i^{(j)} - \mathrm{mean}(R)) / \mathrm{std}(R)

    in the loss of `grpo`, with R the rewards of all steps of the group. A plain reward is a step that ends with the
    completion; of several rewards the weighted sum counts, at every token where a step of one of them ends.
    """
    _refuse(config, "grpo_process", "kl_in_reward")
    return _policy(config, _clipped(config), estimator=outcomes.process_supervision, needs_steps=True)


def dr_grpo(config: LossConfig) -> Objective:
    r"""Dr. GRPO (arXiv 2503.20783): neither a completion's length nor its group's deviation weighs tokens.

    .. math:: \frac1{G\,T} \sum_i \sum_t \min(\rho A, \mathrm{clip}(\rho, 1 \pm 0.2) A), \quad
       A_i = r_i - \mathrm{mean}(r)

    The paper's equation divides by no length at all; its listing and its implementation divide by the limit T.
    """
    return _policy(
        config, _clipped(config), token_weights=losses.fixed_length, estimator=_relative(scale=advantages.no_scale)
    )


def dapo(config: LossConfig) -> Objective:
    r"""DAPO (arXiv 2503.14476, eq. 8): the clip is higher above, and every token weighs the same.

    .. math:: \frac1{\sum_i |o_i|} \sum_i \sum_t \min(\rho A, \mathrm{clip}(\rho, 1 - 0.2, 1 + 0.28) A)

    Over the whole minibatch, whatever it was cut into: what TRL calls `dapo`; its `bnpo` is that of one microbatch.
    The rest of DAPO: `kl_coef=0`, the reward for overlong completions, and dynamic sampling, of which the paper's
    implementation throws surplus groups away and ours keeps them for the next step.
    """
    return _policy(config, _clipped(config, 0.2, 0.28), token_weights=losses.token_mean)


def gspo(config: LossConfig) -> Objective:
    r"""GSPO (arXiv 2507.18071, eq. 5 and 7): one ratio for a completion, the geometric mean of its tokens'.

    .. math:: \frac1G \sum_i \min(s_i A_i, \mathrm{clip}(s_i, 1 - 3\cdot10^{-4}, 1 + 4\cdot10^{-4}) A_i), \quad
       s_i = \big(\pi(o_i) / \pi_{old}(o_i)\big)^{1 / |o_i|}
    """
    return _policy(config, _clipped(config, 3e-4, 4e-4), level=losses.sequence_level)


def gspo_token(config: LossConfig) -> Objective:
    r"""GSPO-token (arXiv 2507.18071, eq. 13 and 14): `gspo`, with a gradient for each token's own advantage.

    .. math:: \frac1G \sum_i \frac1{|o_i|} \sum_t \min(s_{i,t} A_{i,t}, \mathrm{clip}(s_{i,t}) A_{i,t}), \quad
       s_{i,t} = \mathrm{sg}[s_i]\, \pi(o_{i,t}) / \mathrm{sg}[\pi(o_{i,t})]
    """
    return _policy(config, _clipped(config, 3e-4, 4e-4), level=losses.sequence_level_token_gradient)


def cispo(config: LossConfig) -> Objective:
    r"""CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5): the weight is clipped, and no token loses its gradient.

    .. math:: \frac1{\sum_i |o_i|} \sum_i \sum_t \mathrm{sg}[\min(\rho, 1 + \epsilon_{high})]\, A \log\pi

    The paper gives no number for the bound; 1 + 4 is that of ScaleRL (arXiv 2510.13786). TRL's `epsilon_high` is the
    bound itself, and not what is above 1.
    """
    _refuse(config, "cispo", "dual_clip")
    return _policy(config, losses.clipped_weight(*_bounds(config, 1.0, 4.0)), token_weights=losses.token_mean)


def sapo(config: LossConfig) -> Objective:
    r"""SAPO (arXiv 2511.20347): a gate that closes softly, sooner where the advantage is negative.

    .. math:: \frac1G \sum_i \frac1{|o_i|} \sum_t \frac4\tau \sigma(\tau(\rho - 1))\, A

    with a temperature of 1 where A is positive, and of 1.05 where it is not.
    """
    _refuse(config, "sapo", "dual_clip", "clip_low", "clip_high")
    return _policy(config, losses.soft_gate())


def rloo(config: LossConfig) -> Objective:
    r"""RLOO (arXiv 2402.14740): REINFORCE on whole completions against the mean of the others.

    .. math:: \frac1G \sum_i A_i \log\pi(o_i), \quad A_i = r_i - \frac1{G-1} \sum_{j \ne i} r_j

    With the ratio in place of the logarithm, whose gradient on-policy is the same. The paper takes the KL from the
    reward (`kl_in_reward`); TRL's trainer has one clipped ratio for a completion, the product of its tokens'.
    """
    _refuse(config, "rloo", "dual_clip", "clip_low", "clip_high")
    return _reinforce(config, advantages.leave_one_out_mean)


def reinforce(config: LossConfig) -> Objective:
    r"""REINFORCE (Williams 1992), without a baseline.

    .. math:: \frac1G \sum_i r_i \log\pi(o_i)

    With the ratio in place of the logarithm, as `rloo`.
    """
    _refuse(config, "reinforce", "dual_clip", "clip_low", "clip_high")
    return _reinforce(config, advantages.no_baseline)


def reinforce_batch(config: LossConfig) -> Objective:
    r"""REINFORCE (Williams 1992) against the mean of the batch.

    .. math:: \frac1G \sum_i A_i \log\pi(o_i), \quad A_i = r_i - \mathrm{mean}_{batch}(r)
    """
    _refuse(config, "reinforce_batch", "dual_clip", "clip_low", "clip_high")
    return _reinforce(config, advantages.batch_mean)


def _reinforce(config: LossConfig, baseline: advantages.Baseline) -> Objective:
    return _policy(
        config,
        losses.unclipped(),
        token_weights=losses.sequence_sum,
        estimator=_relative(baseline, advantages.no_scale),
    )


def reinforce_plus_plus(config: LossConfig) -> Objective:
    r"""REINFORCE++ with its baseline (arXiv 2501.03262): the group's mean, the batch's deviation, PPO's clip.

    .. math:: \frac1{\sum_i |o_i|} \sum_i \sum_t \min(\rho A, \mathrm{clip}(\rho, 1 \pm 0.2) A), \quad
       A_i = (r_i - \mathrm{mean}(r)) / \mathrm{std}_{batch}

    REINFORCE++ without the group: `AdvantageConfig(baseline="batch")`. The paper's implementation has
    the KL in the rewards of tokens; `kl_in_reward` takes its sum from the completion's.
    """
    return _policy(
        config, _clipped(config), token_weights=losses.token_mean, estimator=_relative(scale=advantages.batch_std)
    )


def ppo(config: LossConfig) -> Objective:
    r"""PPO's clip (arXiv 1707.06347, eq. 7) with generalized advantages (arXiv 1506.02438), and without a critic.

    .. math:: \frac1{\sum_i |o_i|} \sum_i \sum_t \min(\rho A_{i,t}, \mathrm{clip}(\rho, 1 \pm 0.2) A_{i,t}), \quad
       A_{i,t} = \mathrm{whiten}\big(\sum_l (\gamma\lambda)^l \delta_{i,t+l}\big)

    A departure from the paper: there is no critic, and every state of a completion is worth what the others of its
    group got on average (`outcomes.leave_one_out_gae`). Those who have one call `gae` and `policy_loss` themselves.
    """
    return _policy(config, _clipped(config), token_weights=losses.token_mean, estimator=outcomes.whitened_gae)


def mdpo(config: LossConfig) -> Objective:
    r"""Mirror descent (MDPO, arXiv 2005.09814): the KL to the old policy in place of the clip.

    .. math:: \frac1G \sum_i \frac1{|o_i|} \sum_t \rho A - \lambda (\rho\log\rho - \rho + 1)

    The paper has the KL of whole distributions; this is its estimate from the tokens that were sampled. Its
    :math:`\lambda = 1 / t_k` may change with the steps; here it stays.
    """
    _refuse(config, "mdpo", "dual_clip", "clip_low", "clip_high")
    return _policy(config, losses.mirror_descent(config.mdpo_coef))


OBJECTIVES: Mapping[str, Callable[[LossConfig], Objective]] = {
    function.__name__: function
    for function in (
        grpo, grpo_process, dr_grpo, dapo, gspo, gspo_token, cispo, sapo, rloo, reinforce, reinforce_batch,
        reinforce_plus_plus, ppo, mdpo,
    )
}  # fmt: skip


def make_objective(config: LossConfig) -> Objective:
    """The objective that a configuration names.

    Raises:
      ValueError: the configuration sets what this objective has no place for.
    """
    if config.objective != "mdpo":
        _refuse(config, config.objective, "mdpo_coef")
    return OBJECTIVES[config.objective](config)


def supervised() -> Objective:
    """Maximum likelihood of the completions, mean per token; advantages are not looked at."""

    def loss(logprobs, advantages, mask, *, entropies, old_logprobs, ref_logprobs, correction, weights):
        del advantages, entropies, old_logprobs, ref_logprobs, correction
        return losses.supervised_loss(logprobs, mask, weights=weights)

    return Objective(loss=loss, token_weights=losses.token_mean)

"""TRL 1.16 beside ours: same log-probabilities, rewards and lengths in; same advantages, loss and gradient out.

Its trainers run as they are, from their configuration through `training_step`, over microbatches; only what they
generate and what their model says of it is given. (`.[parity]`)

Where TRL differs, and why we do not follow:

- `bnpo` divides by the tokens of a microbatch, so the gradient depends on how a minibatch was cut: here `dapo` is
  both. Its `dapo` and `cispo` divide by the mean number of tokens of a rollout's minibatches: ours, as DAPO's eq. 8,
  by those of the minibatch. The same, where a rollout is one minibatch.
- The entropy bonus is a mean over the tokens of a microbatch, whatever the loss: ours has the loss's token weights.
- `scale_rewards="batch"` is the deviation of the rewards: ours of what is left after the baseline (REINFORCE++), so
  that advantages have deviation 1.
- A group of equal rewards gets advantages of rounding / 1e-4, as large as 5e-3: ours are exactly 0. A completion to
  which no reward applies gets 0 and does not count: so here with `counted`; the rollout itself raises an error.
- `epsilon_high` of its `cispo` is the bound of the weight itself: ours is 1 + clip_high, as everywhere.
- `delta` bounds the ratio where the advantage is positive too. The same, where it is above 1 + epsilon_high.
- `use_bias_correction_kl` with the sequence's ratio multiplies a token's KL by the whole completion's ratio: ours by
  the token's, for which the estimate is unbiased. It is on by default there, and off (DeepSeekMath) here.
- `RLOOTrainer` has one ratio for a completion, the product of its tokens', and a clip: `rloo` has the tokens' ratios
  and none. On-policy the gradients are the same, and the losses are not. Another level and another surrogate make it.
- Metrics: `reward_std` is over the batch there and within groups here; with the sequence's ratio `clip_ratio/*` are
  means over completions there and over tokens here; what `delta` holds counts in `clip_ratio/high_mean` here only.

Not here, for only one of the two has it: `vespo`, GMPO, the off-policy sequence mask and adaptive entropy there;
`mdpo`, `reinforce*` and KL estimators other than k3 (and RLOO's k1) here. `gspo_token` is compared with their `gspo`,
as it is the same where all tokens of a completion have one advantage.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import advantages, losses
from grpo_jax.corrections import top_entropies
from grpo_jax.objectives import LossConfig, make_objective
from grpo_jax.outcomes import Outcome

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl", minversion="1.16")
transformers = pytest.importorskip("transformers")

import datasets  # noqa: E402  what trl brings
import tokenizers  # noqa: E402

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # what trl uses of it

P, G, T = 3, 4, 6
B = P * G
SEEDS = (0, 1, 2)
PAD, EOS, TOKEN, FIRST_PROMPT = 0, 1, 2, 3
ROW_NAMES = [f"row{i}" for i in range(B)]  # each completion's own prompt, so that a pass can tell which rows it gets


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """What goes into both: ragged completions, none as long as the limit T; the middle group's rewards are equal."""

    mask: np.ndarray  # [B, T] bool
    finished: np.ndarray  # [B] bool
    rewards: np.ndarray  # [K, P, G] float32
    logprobs: np.ndarray  # [B, T] float32; old, ref and entropies too
    old: np.ndarray
    ref: np.ndarray
    entropies: np.ndarray


def make_batch(seed):
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=(2, P, G))
    rewards += rng.normal(scale=2, size=(P, 1))  # some prompts are harder
    rewards[:, 1] = 0.25
    logprobs = -rng.exponential(size=(B, T))
    arrays = {
        "rewards": rewards, "logprobs": logprobs, "old": logprobs - rng.normal(scale=0.4, size=(B, T)),
        "ref": logprobs + rng.normal(scale=0.7, size=(B, T)), "entropies": rng.exponential(size=(B, T)),
    }  # fmt: skip
    return Batch(
        mask=np.arange(T) < rng.integers(1, T, size=(B, 1)), finished=rng.random(B) < 0.7,
        **{name: x.astype(np.float32) for name, x in arrays.items()},
    )  # fmt: skip


def worth(batch, penalties=None):
    """The outcome of the first reward."""
    return Outcome(
        rewards=jnp.asarray(batch.rewards[0]), counted=jnp.ones((P, G), bool), mask=batch.mask, penalties=penalties
    )


BATCHES = [make_batch(seed) for seed in SEEDS]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What an optimizer step says."""

    advantages: np.ndarray  # [B]
    loss: float
    gradient: np.ndarray  # [B, T], of the log-probabilities
    entropy_gradient: np.ndarray  # [B, T]
    parts: list[np.ndarray]  # the rows of each microbatch
    metrics: dict[str, list[float]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model that is loaded and never run."""
    path = tmp_path_factory.mktemp("trl")
    config = transformers.LlamaConfig(
        vocab_size=FIRST_PROMPT + B, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        eos_token_id=EOS, pad_token_id=PAD, bos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def tokenizer():
    vocabulary = {"<pad>": PAD, "<eos>": EOS, "token": TOKEN} | {
        name: FIRST_PROMPT + i for i, name in enumerate(ROW_NAMES)
    }
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="token"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<eos>")


def make_trainer(directory, name, rewards, *, off_policy, microbatches, steps, **options):
    """One of their trainers, whose reward functions return rewards [K, B], NaN as None."""
    arguments = getattr(trl, f"{name}Config")(
        output_dir=str(directory / "out"), report_to=[], use_cpu=True, bf16=False, num_generations=G,
        max_completion_length=T, per_device_train_batch_size=B // (microbatches * steps),
        gradient_accumulation_steps=microbatches, steps_per_generation=microbatches * steps,
        num_iterations=2 if off_policy else 1, **options,
    )  # fmt: skip
    nullable = [[None if np.isnan(value) else float(value) for value in row] for row in rewards]
    return getattr(trl, f"{name}Trainer")(
        model=str(directory), args=arguments, processing_class=tokenizer(),
        train_dataset=datasets.Dataset.from_dict({"prompt": ROW_NAMES}),
        reward_funcs=[functools.partial(lambda row, **_: row, row) for row in nullable],
    )  # fmt: skip


@pytest.fixture(scope="module")
def theirs(directory):
    """`(batch, trainer, *, off_policy, rewards [K, B], sampler, microbatches, steps, **options) -> Step`, the first."""

    def run(batch, name="GRPO", *, off_policy=False, rewards=None, sampler=None, microbatches=2, steps=1, **options):
        trainer = make_trainer(
            directory, name, batch.rewards[:1].reshape(-1, B) if rewards is None else rewards, off_policy=off_policy,
            microbatches=microbatches, steps=steps, **options,
        )  # fmt: skip
        exact = lambda x: torch.tensor(x, dtype=torch.float64)
        logprobs, entropies = exact(batch.logprobs).requires_grad_(), exact(batch.entropies).requires_grad_()
        ref, old = exact(batch.ref), exact(batch.old) if off_policy else logprobs
        parts = []

        def model_pass(model, input_ids, attention_mask, logits_to_keep, *_, **__):
            part, trains = input_ids[:, 0] - FIRST_PROMPT, torch.is_grad_enabled()
            if trains:
                parts.append(part.numpy())
            which = logprobs if trains else ref if model is trainer.ref_model else old
            return which[part, :logits_to_keep], entropies[part, :logits_to_keep], None

        completions = [[TOKEN] * (n - 1) + [EOS if end else TOKEN]
                       for n, end in zip(batch.mask.sum(axis=1), batch.finished, strict=True)]  # fmt: skip
        said = None
        if sampler is not None:  # the log-probabilities of another engine, which there is only vLLM
            said, trainer.use_vllm = [row[keep].tolist() for row, keep in zip(sampler, batch.mask, strict=True)], True
        trainer._generate_single_turn = lambda *_: (completions, said) if name == "GRPO" else completions
        trainer._get_per_token_logps_and_entropies = model_pass
        trainer.current_gradient_accumulation_steps = microbatches
        inputs = [{"prompt": row} for row in ROW_NAMES]
        loss = sum(float(trainer.training_step(trainer.model, inputs, None)) for _ in range(microbatches))
        return Step(
            advantages=np.array(trainer._logs["advantages"]), loss=loss, gradient=logprobs.grad.numpy(),
            entropy_gradient=np.zeros((B, T)) if entropies.grad is None else entropies.grad.numpy(),
            parts=parts, metrics=trainer._metrics["train"],
        )  # fmt: skip

    return run


@functools.partial(jax.jit, static_argnums=(0, 1))
@functools.partial(jax.value_and_grad, argnums=(2, 3), has_aux=True)
def differentiated(loss, token_weights, logprobs, entropies, advantage, mask, old, ref, correction):
    return loss(
        logprobs, advantage.reshape(-1), mask, weights=token_weights(mask), entropies=entropies, old_logprobs=old,
        ref_logprobs=ref, correction=correction,
    )  # fmt: skip


def ours(batch, loss, token_weights, advantage, *, off_policy, mask=None, kl=False, correction=None):
    """Loss, gradients of log-probabilities and of entropies, and metrics of a whole minibatch."""
    (value, metrics), (gradient, entropy_gradient) = differentiated(
        loss, token_weights, batch.logprobs, batch.entropies, advantage, batch.mask if mask is None else mask,
        batch.old if off_policy else None, batch.ref if kl else None, correction,
    )  # fmt: skip
    return value, gradient, entropy_gradient, {name: metric.value() for name, metric in metrics.items()}


def assert_same(step, value, gradient):
    np.testing.assert_allclose(value, step.loss, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, step.gradient, rtol=1e-5, atol=1e-6)
    assert np.abs(step.gradient).max() > 1e-3


# Ours, theirs. Their microbatches are two where nothing is said.
ROWS = {
    "grpo": ({"objective": "grpo"}, {"loss_type": "grpo"}),
    "other bounds": (
        {"objective": "grpo", "clip_low": 0.1, "clip_high": 0.4},
        {"loss_type": "grpo", "epsilon": 0.1, "epsilon_high": 0.4},
    ),
    "dual clip": (
        {"objective": "grpo", "dual_clip": 1.3, "clip_low": 0.1, "clip_high": 0.1},
        {"loss_type": "grpo", "delta": 1.3, "epsilon": 0.1},
    ),
    "dr_grpo": ({"objective": "dr_grpo"}, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "dapo": ({"objective": "dapo"}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "bnpo": ({"objective": "dapo", "clip_high": 0.2}, {"loss_type": "bnpo", "microbatches": 1}),
    "gspo": (
        {"objective": "gspo"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    ),
    "gspo_token": (
        {"objective": "gspo_token", "clip_low": 0.1, "clip_high": 0.1},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.1},
    ),
    "cispo": ({"objective": "cispo"}, {"loss_type": "cispo", "epsilon_high": 5.0}),
    "cispo, clipped": ({"objective": "cispo", "clip_high": 0.2}, {"loss_type": "cispo", "epsilon_high": 1.2}),
    "sapo": ({"objective": "sapo"}, {"loss_type": "sapo"}),
}
PLAIN_KL = ({"kl_coef": 0.1}, {"beta": 0.1, "use_bias_correction_kl": False})
WEIGHTED_KL = ({"kl_coef": 0.1, "weighted_kl": True}, {"beta": 0.1})


def compare(theirs, our_options, their_options, *, off_policy):
    """Asserts that all is the same, and returns their step and our metrics for each batch."""
    config = LossConfig(**{"kl_coef": 0.0, **our_options})
    objective, compared = make_objective(config), []
    for batch in BATCHES:
        step = theirs(batch, off_policy=off_policy, **their_options)
        advantage = objective.advantages(worth(batch), ddof=1, epsilon=1e-4)
        np.testing.assert_allclose(advantage.reshape(-1), step.advantages, rtol=1e-5, atol=1e-6)
        value, gradient, entropy_gradient, metrics = ours(
            batch, objective.loss, objective.token_weights, advantage, off_policy=off_policy, kl=config.kl_coef > 0
        )
        assert_same(step, value, gradient)
        np.testing.assert_allclose(entropy_gradient, step.entropy_gradient, rtol=1e-5, atol=1e-6)
        compared.append((step, metrics))
    return compared


@pytest.mark.parametrize("kl", [({}, {}), PLAIN_KL], ids=["without KL", "with KL"])
@pytest.mark.parametrize("off_policy", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("name", ROWS)
def test_advantages_loss_and_gradient(theirs, name, off_policy, kl):
    (our_row, their_row), (our_kl, their_kl) = ROWS[name], kl
    compare(theirs, our_row | our_kl, their_row | their_kl, off_policy=off_policy)


@pytest.mark.parametrize("off_policy", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("name", ["grpo", "dapo", "cispo"])
def test_kl_times_the_ratio(theirs, name, off_policy):
    (our_row, their_row), (our_kl, their_kl) = ROWS[name], WEIGHTED_KL
    compare(theirs, our_row | our_kl, their_row | their_kl, off_policy=off_policy)


def test_entropy_bonus(theirs):
    """Theirs is a mean over the tokens of a microbatch: ours with `dapo`'s weights and one microbatch."""
    our_row, their_row = ROWS["dapo"]
    theirs_too = {**their_row, "entropy_coef": 0.2, "microbatches": 1}
    for step, _ in compare(theirs, our_row | {"entropy_coef": 0.2}, theirs_too, off_policy=True):
        assert np.abs(step.entropy_gradient).max() > 1e-3


def test_metrics(theirs):
    names = ("kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")
    seen = []
    for step, metrics in compare(
        theirs, {"kl_coef": 0.1}, {"loss_type": "grpo", "microbatches": 1, **PLAIN_KL[1]}, off_policy=True
    ):
        seen.append([metrics[name] for name in names])
        np.testing.assert_allclose(seen[-1], [step.metrics[name][0] for name in names], rtol=1e-5)
        assert step.metrics["frac_reward_zero_std"] == [pytest.approx(1 / P)]
    assert (np.array(seen) > 0).all()


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo"])
def test_truncated_completions_do_not_train(theirs, name):
    """They count in the baseline, and in B."""
    our_row, their_row = ROWS[name]
    objective = make_objective(LossConfig(**{"kl_coef": 0.1, **our_row}))
    for batch in BATCHES:
        step = theirs(batch, off_policy=True, mask_truncated_completions=True, **their_row, **PLAIN_KL[1])
        advantage = objective.advantages(worth(batch), ddof=1, epsilon=1e-4)
        np.testing.assert_allclose(advantage.reshape(-1), step.advantages, rtol=1e-5, atol=1e-6)
        mask = batch.mask & batch.finished[:, None]
        assert 0 < batch.finished.sum() < B
        value, gradient, _, _ = ours(
            batch, objective.loss, objective.token_weights, advantage, off_policy=True, mask=mask, kl=True
        )
        assert_same(step, value, gradient)


@pytest.mark.parametrize("off_policy", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("kind", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_the_correction_for_the_sampler(theirs, kind, off_policy):
    """Ours masks on both sides of 1, theirs where it is told to; and the difference of log-probabilities is logged."""
    options = {"vllm_importance_sampling_mode": kind, "vllm_importance_sampling_clip_max": 1.5}
    options |= {"vllm_importance_sampling_clip_min": 1 / 1.5} if kind.endswith("mask") else {}
    objective = make_objective(LossConfig(kl_coef=0.1, correction=kind, correction_bound=1.5))
    for seed, batch in enumerate(BATCHES):
        old = batch.old if off_policy else batch.logprobs
        sampler = (old - np.random.default_rng(seed).normal(scale=0.3, size=(B, T))).astype(np.float32)
        step = theirs(
            batch, off_policy=off_policy, sampler=sampler, loss_type="grpo", microbatches=1, **options, **PLAIN_KL[1]
        )
        correction, metrics = objective.correction(old, sampler, jnp.asarray(batch.mask))
        assert 0.05 < metrics["sampling/frac_out_of_bounds"].value() < 0.95
        value, gradient, _, _ = ours(
            batch, objective.loss, objective.token_weights, jnp.asarray(step.advantages), off_policy=off_policy,
            kl=True, correction=correction,
        )  # fmt: skip
        assert_same(step, value, gradient)
        for name in ("sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"):
            np.testing.assert_allclose(metrics[name].value(), step.metrics[name][0], rtol=1e-5)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_tokens_of_the_greatest_entropy(theirs, share):
    """Of a microbatch there, so of one; with an interpolated quantile, so some shares differ by a token."""
    objective = make_objective(LossConfig(kl_coef=0.1, top_entropy=share))
    for batch in BATCHES:
        step = theirs(batch, loss_type="grpo", microbatches=1, top_entropy_quantile=share, **PLAIN_KL[1])
        learns = top_entropies(jnp.asarray(batch.entropies), jnp.asarray(batch.mask), objective.top_entropy)
        quantile = np.quantile(batch.entropies[batch.mask], 1 - share)
        theirs_learn = batch.mask & (batch.entropies >= quantile)
        assert 0 <= int(learns.sum()) - int(theirs_learn.sum()) <= 1
        value, gradient, _, _ = ours(
            batch, objective.loss, objective.token_weights, jnp.asarray(step.advantages), off_policy=False, kl=True,
            correction=jnp.asarray(theirs_learn, jnp.float32),
        )  # fmt: skip
        assert_same(step, value, gradient)


# What is no row of the table, but a composition.


@pytest.mark.parametrize("off_policy", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize(("loss_type", "token_weights"), [("luspo", losses.sequence_sum), ("dapo", losses.token_mean)])
def test_other_weights_at_the_level_of_sequences(theirs, loss_type, token_weights, off_policy):
    """LUSPO (arXiv 2602.05261) is GSPO times the length."""
    loss = functools.partial(losses.policy_loss, surrogate=losses.clipped(0.1, 0.3), level=losses.sequence_level)
    for batch in BATCHES:
        step = theirs(
            batch, off_policy=off_policy, loss_type=loss_type, importance_sampling_level="sequence", epsilon=0.1,
            epsilon_high=0.3,
        )  # fmt: skip
        value, gradient, _, _ = ours(batch, loss, token_weights, jnp.asarray(step.advantages), off_policy=off_policy)
        assert_same(step, value, gradient)


@pytest.mark.parametrize("normalized", [False, True], ids=["", "normalized"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_rloo(theirs, beta, normalized):
    """Its KL is in the reward: k1, summed over the completion."""
    objective = make_objective(LossConfig(objective="rloo", kl_coef=0.0))
    batch_normalized = functools.partial(
        advantages.group_advantages, baseline=advantages.batch_mean, scale=advantages.batch_std
    )
    for batch in BATCHES:
        step = theirs(batch, "RLOO", beta=beta, normalize_advantages=normalized)
        penalties = beta * losses.kl_k1(jnp.asarray(batch.logprobs), jnp.asarray(batch.ref))
        advantage = objective.advantages(worth(batch, penalties), ddof=1, epsilon=1e-4)
        advantage = batch_normalized(advantage.reshape(P, G)) if normalized else advantage
        np.testing.assert_allclose(advantage.reshape(-1), step.advantages, rtol=1e-4, atol=1e-5)
        _, gradient, _, _ = ours(batch, objective.loss, objective.token_weights, advantage, off_policy=False)
        np.testing.assert_allclose(gradient, step.gradient, rtol=1e-4, atol=1e-6)


def test_rloo_off_policy_is_ppo_on_completions(theirs):
    loss = functools.partial(losses.policy_loss, surrogate=losses.clipped(0.2, 0.2), level=losses.sequence_product)
    for batch in BATCHES:
        step = theirs(batch, "RLOO", off_policy=True)
        value, gradient, _, _ = ours(
            batch, loss, losses.sequence_mean, jnp.asarray(step.advantages), off_policy=True
        )  # fmt: skip
        assert_same(step, value, gradient)


# Advantages ---------------------------------------------------------------------------------------


def test_rewards_that_do_not_apply_do_not_count(theirs):
    for batch in BATCHES:
        rewards = batch.rewards[0].copy()
        rewards[0, 1] = rewards[1, :2] = rewards[2, 1:] = np.nan  # of the last group only one is left
        got = advantages.group_advantages(jnp.asarray(rewards), counted=jnp.asarray(~np.isnan(rewards)))
        step = theirs(batch, rewards=rewards.reshape(1, B), loss_type="grpo")
        np.testing.assert_allclose(got.reshape(-1), step.advantages, rtol=1e-5, atol=1e-6)
        assert not got[2].any()


@pytest.mark.parametrize("each", [None, advantages.group_advantages], ids=["sum, normalize", "normalize, sum"])
def test_several_rewards(theirs, each):
    """Normalized and then summed is GDPO's."""
    weights = [0.7, 2.0]
    for batch in BATCHES:
        rewards = batch.rewards.copy()
        rewards[0, 0, 2] = rewards[1, 2, 0] = np.nan
        total = advantages.combine_rewards(jnp.asarray(rewards), jnp.asarray(weights), each=each)
        over = {"baseline": advantages.batch_mean, "scale": advantages.batch_std} if each else {}
        step = theirs(
            batch, rewards=rewards.reshape(2, B), reward_weights=weights, loss_type="grpo",
            multi_objective_aggregation="normalize_then_sum" if each else "sum_then_normalize",
        )  # fmt: skip
        got = advantages.group_advantages(total, **over).reshape(-1)
        np.testing.assert_allclose(got, step.advantages, rtol=1e-5, atol=1e-5)


# Where TRL differs, by how much -----------------------------------------------------------------------


def test_scale_of_the_batch_is_of_rewards_there_and_of_what_the_baseline_leaves_here(theirs):
    def of_rewards(rewards, centered, counted, *, ddof, epsilon):
        return jnp.std(rewards, ddof=ddof, keepdims=True) + epsilon

    for batch in BATCHES:
        rewards = jnp.asarray(batch.rewards[0])
        step = theirs(batch, scale_rewards="batch", loss_type="grpo")
        same = advantages.group_advantages(rewards, scale=of_rewards).reshape(-1)
        np.testing.assert_allclose(same, step.advantages, rtol=1e-5, atol=1e-6)
        named = advantages.group_advantages(rewards, scale=advantages.batch_std)
        assert float(named.std(ddof=1)) == pytest.approx(1, abs=1e-3)
        assert step.advantages.std(ddof=1) < 0.9


def test_bnpo_depends_on_microbatches(theirs):
    """It is the mean over microbatches of `dapo` on each."""
    objective = make_objective(LossConfig(objective="dapo", clip_high=0.2, kl_coef=0.0))
    for batch in BATCHES:
        step = theirs(batch, off_policy=True, loss_type="bnpo")
        whole, _, _, _ = ours(batch, objective.loss, objective.token_weights, step.advantages, off_policy=True)
        each = [
            ours(rows_of(batch, part), objective.loss, objective.token_weights, step.advantages[part], off_policy=True)
            for part in step.parts
        ]
        assert len(each) == 2
        np.testing.assert_allclose(np.mean([value for value, *_ in each]), step.loss, rtol=1e-5, atol=1e-6)
        assert abs(whole - step.loss) > 1e-4


def test_dapo_divides_by_the_mean_minibatch(theirs):
    """Where a rollout is two minibatches, of which this is the first."""
    objective = make_objective(LossConfig(objective="dapo", kl_coef=0.0))
    for batch in BATCHES:
        step = theirs(batch, microbatches=1, steps=2, loss_type="dapo", epsilon_high=0.28)
        (part,) = step.parts
        minibatch = rows_of(batch, part)
        value, _, _, _ = ours(
            minibatch, objective.loss, objective.token_weights, step.advantages[part], off_policy=False
        )
        tokens, mean_tokens = minibatch.mask.sum(), batch.mask.sum() / 2
        np.testing.assert_allclose(value * tokens / mean_tokens, step.loss, rtol=1e-5, atol=1e-6)


def rows_of(batch, rows):
    return dataclasses.replace(
        batch,
        **{name: getattr(batch, name)[rows] for name in ("mask", "finished", "logprobs", "old", "ref", "entropies")},
    )


# Preferences --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES, ids=SEEDS)
def test_dpo(directory, batch):
    """The first half of the completions is preferred to the second."""
    trainer = trl.DPOTrainer(
        model=str(directory), processing_class=tokenizer(),
        args=trl.DPOConfig(output_dir=str(directory / "out"), report_to=[], use_cpu=True, bf16=False, beta=0.3),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["row0"], "chosen": ["token"], "rejected": ["token"]}),
    )  # fmt: skip

    def model_of(logprobs):
        none = torch.zeros(B, T)
        return lambda **_: types.SimpleNamespace(
            log_probs=logprobs, entropy=none, mean_logits=none, is_top1=none.bool()
        )

    policy, ref = batch.logprobs * batch.mask, batch.ref * batch.mask
    logprobs = torch.tensor(policy, dtype=torch.float64, requires_grad=True)
    trainer.ref_model = model_of(torch.tensor(ref, dtype=torch.float64))
    mask = torch.tensor(np.pad(batch.mask, ((0, 0), (1, 0))).astype(np.int64))  # behind one token of prompt
    inputs = {"input_ids": torch.full((B, T + 1), TOKEN), "attention_mask": mask, "completion_mask": mask}
    loss = trainer._compute_loss(model_of(logprobs), inputs, False)
    loss.backward()

    def ours_of(logprobs):
        sums = [*jnp.split(logprobs.sum(axis=1), 2), *jnp.split(ref.sum(axis=1), 2)]
        return losses.dpo_loss(*sums, beta=0.3)[0]

    value, gradient = jax.value_and_grad(ours_of)(policy)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, logprobs.grad, rtol=1e-5, atol=1e-6)

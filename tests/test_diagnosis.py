import dataclasses
import re

import pytest

from experiments import countdown
from grpo_jax import diagnosis
from grpo_jax.diagnosis import diagnose

MISMATCH = "sampling/sampling_logp_difference"
# Steps 1, 2, 10 and 61 of a run of `experiments.countdown` that learned, 4 minibatches x 2 epochs; at 61 a spike of k3.
HEALTHY = [
    {
        "step": step, "reward": reward, "accuracy": accuracy, "frac_reward_zero_std": right + wrong,
        "frac_groups_all_right": right, "frac_groups_all_wrong": wrong, "completions/clipped_ratio": 0.0,
        "entropy": entropy, "kl": kl, "grad_norm": grad_norm, "grad_clipped": float(grad_norm > 1), "loss": loss,
        "advantage/abs_mean": 0.4, f"{MISMATCH}/mean": 7e-8, f"{MISMATCH}/max": 5e-6,
    }
    for step, reward, accuracy, right, wrong, entropy, kl, grad_norm, loss in (
        (1, 0.377, 0.277, 0.0938, 0.312, 0.158, 0.00266, 0.253, -0.00343),
        (2, 0.56, 0.461, 0.219, 0.0938, 0.162, 0.0057, 0.183, -0.00787),
        (10, 0.709, 0.609, 0.25, 0.125, 0.141, 0.123, 0.199, -0.00308),
        (61, 0.697, 0.598, 0.312, 0.25, 0.0854, 1.82, 2.94, 0.0162),
    )
]  # fmt: skip


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({}, None),
        ({"frac_reward_zero_std": 0.9}, None),
        ({"frac_reward_zero_std": 1.0, "frac_groups_all_right": 1.0}, r"^no signal:.*\(all right\).*too easy"),
        ({"frac_reward_zero_std": 1.0, "frac_groups_all_wrong": 1.0}, r"^no signal:.*\(all wrong\).*too hard"),
        (
            {"frac_reward_zero_std": 1.0, "frac_groups_all_right": 0.25, "frac_groups_all_wrong": 0.75},
            "25% all right, 75%",
        ),
        ({"frac_reward_zero_std": 1.0, "frac_groups_all_right": 1.0, "advantage/abs_mean": 0.0}, "^no signal:"),
        # Against the mean of the batch, groups that differ from one another are a signal.
        ({"frac_reward_zero_std": 1.0, "advantage/abs_mean": 0.3}, None),
        (
            {"frac_reward_zero_std": 1.0, "advantage/abs_mean": 0.8, "reward/kl_penalty": 0.01, "kl": 0.1},
            "^no signal.*only the penalty",
        ),
        ({"frac_reward_zero_std": 0.5, "advantage/abs_mean": 0.0}, "^no advantage:.*rewards differ.*count_truncated"),
        ({"frac_reward_zero_std": 0.5, "advantage/abs_mean": 1e-6}, None),
        ({"completions/clipped_ratio": 1.0}, "^truncated:.*max_tokens"),
        ({"completions/clipped_ratio": 0.99}, None),
        (
            {"loss": float("nan"), "skipped": 2.0, "skipped_in_a_row": 3.0},
            "^not finite: loss; 2 .*left out .3 in a row",
        ),
        ({"grad_norm": float("inf"), "loss": 0.0}, "^not finite: grad_norm;"),
        ({"skipped": 1.0, "loss": 0.0, "grad_norm": 1.0}, "^not finite: the parameters after a step; 1 "),
        ({"skipped": 0.0, "skipped_in_a_row": 0.0}, None),
        (dict.fromkeys(("loss", "kl", "entropy", f"{MISMATCH}/mean"), float("nan")), "^not finite:"),
        ({f"{MISMATCH}/mean": 0.2}, "^mismatch:.*sampler and trainer disagree.*0.2"),
        ({f"{MISMATCH}/mean": 0.2, f"{MISMATCH}/max": 9.0}, "^mismatch:.*0.2 on average: a bug, or a dtype"),
        ({f"{MISMATCH}/mean": 0.01, f"{MISMATCH}/max": 9.0}, "^mismatch:.*a token's log-probability by 9, .*0.01 on"),
        ({f"{MISMATCH}/mean": 0.04, f"{MISMATCH}/max": 0.7}, None),  # bfloat16
        ({"completions/mean_steps": 0.0}, "^no steps:.*grpo"),
        ({"completions/mean_steps": 2.5}, None),
        ({"step": 1, "reward": 0.3, "loss": 2e-4, "grad_norm": 0.8, "clip_ratio/region_mean": 0.01}, None),
        ({f"{MISMATCH}/mean": 0.2, "dynamic_sampling/reused_groups": 3.0}, "^mismatch:.*waited.*--loss.correction"),
        ({f"{MISMATCH}/max": 9.0, "dynamic_sampling/reused_groups": 3.0}, "^mismatch:.*waited"),
        ({f"{MISMATCH}/mean": 0.2, "dynamic_sampling/reused_groups": 0.0}, "^mismatch:.*a bug"),
        (
            {"dynamic_sampling/filled_without_signal": 2.0, "dynamic_sampling/waves": 3.0},
            "^not filled: 3 waves .*2 without fill",
        ),
        ({"dynamic_sampling/filled_without_signal": 0.0, "dynamic_sampling/waves": 3.0}, None),
        ({f"{MISMATCH}/mean": 1e-5}, None),
        ({"kl": 1.5}, "^KL blows up:.*1.5 nats a token.*kl_coef"),
        ({"kl": 0.6}, None),
        ({"step": 1, "reward": 0.3, "loss": -2e-8, "grad_norm": 0.8}, "^loss near zero:.*by construction.*norm is 0.8"),
        ({"step": 1, "reward": 0.3, "loss": 0.02, "grad_norm": 0.8}, None),
        ({"step": 1, "reward": 0.3, "loss": -0.02, "grad_norm": 0.8}, None),
        ({"step": 1, "reward": 0.3, "loss": 0.0, "grad_norm": 0.0}, None),
        ({"step": 2, "reward": 0.3, "loss": -2e-8, "grad_norm": 0.8}, None),
        ({"step": 1, "loss": 1e-4, "grad_norm": 0.8}, None),  # supervised: there it would be a loss that is 0
        ({"entropy": 1e-3, "reward": 0.3}, None),  # of a first step
        ({"grad_clipped": 1.0, "grad_norm": 9.0}, None),
    ],
)
def test_of_one_step(metrics, said):
    lines = diagnose(metrics)
    assert len(lines) == (said is not None), lines
    if said:
        assert re.search(said, lines[0]), lines[0]


def test_healthy_steps_say_nothing():
    for i, row in enumerate(HEALTHY):
        assert diagnose(row, HEALTHY[:i]) == []
    # The baseline's evaluation comes before the first step, and has none of these names.
    assert diagnose(HEALTHY[-1], [{"step": 0, "eval/accuracy": 0.2}, *HEALTHY[:-1]]) == []


def rows(name, values, **others):
    return [{"step": i + 1, name: value, **others} for i, value in enumerate(values)]


def said_of(log):
    return [line.partition(":")[0] for line in diagnose(log[-1], log[:-1])]


@pytest.mark.parametrize(
    ("kl", "said"),
    [
        ([0.1, 0.1, 0.1, 0.1, 30.0], []),  # a spike heals
        ([0.1, 30.0, 0.1, 30.0, 0.1], []),
        ([0.1, 0.1, 2.0, 0.9, 2.0, 3.0], ["KL blows up"]),
        ([2.0, 2.0, 2.0, 0.1, 0.1, 0.1], []),  # it is over
        ([0.1, 0.1, 0.1, 0.1, 0.1, 2.0, 2.0, 2.0], ["KL blows up"]),
    ],
)
def test_kl(kl, said):
    assert said_of(rows("kl", kl)) == said


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ({"entropy": 0.09, "reward": 0.3}, ["entropy collapse"]),
        ({"entropy": 0.11, "reward": 0.3}, []),
        ({"entropy": 0.09, "reward": 0.3, "accuracy": 0.95}, []),  # it solves the task
        ({"entropy": 0.09, "reward": 0.3, "accuracy": 0.5}, ["entropy collapse"]),
        ({"entropy": 0.09}, []),  # supervised
        ({"reward": 0.3}, []),
    ],
)
def test_entropy(last, said):
    log = [{"step": 0, "eval/accuracy": 0.5}, {"step": 1, "entropy": 1.0}, {"step": 2, "entropy": 0.5}, last]
    assert said_of(log) == said


def test_always_clipped():
    always = diagnosis.ALWAYS
    assert said_of(rows("grad_clipped", [1.0] * always, grad_norm=3.0)) == ["always clipped"]
    assert said_of(rows("grad_clipped", [0.0] + [1.0] * always, grad_norm=3.0)) == ["always clipped"]
    assert said_of(rows("grad_clipped", [1.0] * (always - 1), grad_norm=3.0)) == []
    assert said_of(rows("grad_clipped", [1.0] * 7 + [0.75] + [1.0] * (always - 8), grad_norm=3.0)) == []
    assert said_of(rows("grad_norm", [3.0] * always)) == []  # without a clip
    log = rows("grad_clipped", [1.0] * always, grad_norm=3.0)
    assert "(its median norm is 3)" in diagnose(log[-1], log[:-1])[0]


def test_all_of_them_name_flags_that_exist():
    """With one step of everything that can be wrong; names before the colon have no numbers, so that they stay."""
    wrong = {
        "step": 1, "reward": 0.0, "loss": 0.0, "grad_norm": 1.0, "entropy": 0.0, "grad_clipped": 1.0, "kl": 9.0,
        "completions/clipped_ratio": 1.0, f"{MISMATCH}/mean": 9.0,
    }  # fmt: skip
    log = rows("grad_clipped", [1.0] * diagnosis.ALWAYS, entropy=1.0)
    variants = [
        {"frac_reward_zero_std": 1.0, "completions/unknown_reward": 3.0},
        {"frac_reward_zero_std": 0.5, "advantage/abs_mean": 0.0},
        {"loss": float("nan")},
        {f"{MISMATCH}/mean": 0.0, f"{MISMATCH}/max": 9.0},
        {
            "dynamic_sampling/reused_groups": 3.0,
            "dynamic_sampling/filled_without_signal": 2.0,
            "completions/mean_steps": 0.0,
        },
    ]
    lines = {line for variant in variants for line in diagnose(wrong | variant, log)}
    names = {line.partition(":")[0] for line in lines}
    assert len(names) == len(diagnosis._RULES)
    assert not any(re.search(r"\d", name) for name in names)
    flags = set(re.findall(r"--([a-z_]+)\.([a-z_0-9]+)", " ".join(lines)))
    assert len(flags) >= 10
    for section, field in flags:
        assert field in {f.name for f in dataclasses.fields(countdown.SECTIONS[section])}, (section, field)

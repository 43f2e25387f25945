"""What people read while a run goes on."""

from grpo_jax.screen import Screen

ROW = {
    "step": 1, "time/step_seconds": 1.0, "time/rollout_tokens_per_second": 0.0, "time/train_tokens_per_second": 0.0,
    **{f"time/{name}_seconds": 0.2 for name in ("rollout", "reward", "reference", "update", "other")},
}  # fmt: skip


def said(capsys, *samples):
    screen = Screen("grpo", 100, 0)
    rewards = [{"reward": 1.0, "advantage": 0.5}, {"reward": None, "advantage": 0.0}]
    shown = [{"prompt": p, "completion": c, **reward} for (p, c), reward in zip(samples, rewards, strict=True)]
    screen.step([ROW], shown)
    screen.close()
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]


def test_a_prompt_of_one_line_stands_before_its_completion(capsys):
    assert said(capsys, ("3 4", "7"), ("3 4", "8")) == [
        "    3 4 -> 7  reward 1.00  advantage +0.50",
        "    3 4 -> 8  reward unknown  advantage +0.00",
    ]


def test_a_prompt_of_several_stands_before_all_its_completions(capsys):
    assert said(capsys, ("Ann has 3.\nHow many?", "3\nso"), ("Ann has 3.\nHow many?", "4")) == [
        "    Ann has 3.",
        "    How many?",
        "     -> 3",
        "    so  reward 1.00  advantage +0.50",
        "     -> 4  reward unknown  advantage +0.00",
    ]


def test_no_character_commands_the_terminal(capsys):
    assert said(capsys, ("a", "b\x1b[31m\x00é"), ("a", "\r"))[0].startswith("    a -> b\\x1b[31m\\x00é  reward")

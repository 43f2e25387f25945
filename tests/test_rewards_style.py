import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.rewards.style import repetition, soft_overlong, think_answer_format


def call(reward, completions, prompts=None, ids=None):
    n = len(completions)
    return reward(
        prompts=prompts or ["p"] * n, completions=completions, completion_ids=ids or [[]] * n, answer=["x"] * n
    )


@pytest.mark.parametrize(
    ("completion", "whole", "behind_think"),
    [
        ("<think>a</think> <answer>b</answer>", 1, 0),
        ("<think>\na\nb\n</think>\n\n<answer>\n7\n</answer>\n", 1, 0),
        ("a</think><answer>b</answer>", 0, 1),
        ("so: <think>a</think> <answer>b</answer>", 0, 0),
        ("<think>a</think> so <answer>b</answer>", 0, 0),
        ("<think>a</think> <answer>b</answer> done", 0, 0),
        ("<think>a</think> <answer>b</answer> <answer>c</answer>", 0, 0),
        ("<think>a</think> <answer>b<answer></answer>", 0, 0),
        ("<think>a <answer>b</answer></think>", 0, 0),
        ("<answer>b</answer> <think>a</think>", 0, 0),
        ("<think>a</think> <answer>b", 0, 0),
        ("", 0, 0),
    ],
)
def test_think_answer_format(completion, whole, behind_think):
    prompts = ["What? Begin with <think>.", "What?\n<think>\n"]
    assert call(think_answer_format, [completion] * 2, prompts) == [whole, behind_think]


def test_soft_overlong_at_its_boundaries():
    """L_max 10, L_cache 4: 0 up to 6 tokens, then a quarter less each, -1 from 10 on."""
    lengths = [0, 1, 6, 7, 8, 9, 10, 11, 1000]
    rewards = call(soft_overlong(10, 4), ["x y"] * 9, ids=[[1] * n for n in lengths])
    assert rewards == [0, 0, 0, -0.25, -0.5, -0.75, -1, -1, -1]
    assert call(soft_overlong(2, 2), ["x"] * 4, ids=[[], [1], [1, 1], [1, 1, 1]]) == [0, -0.5, -1, -1]


@pytest.mark.parametrize("cache", [0, 11, -1])
def test_soft_overlong_needs_a_cache_within_the_limit(cache):
    with pytest.raises(ValueError, match=f"cache_tokens={cache} must be from 1 to max_tokens=10"):
        soft_overlong(10, cache)


def test_repetition():
    texts = ["a b a b a b", "A\nB  a b", "a b c d", "a a a a a a a a a a a", "a", ""]
    # Pairs: ab ba ab ba ab: 2 of 5 distinct; ab ba ab: 2 of 3; 3 of 3; 1 of 10; none; none.
    assert call(repetition(2, -0.5), texts) == pytest.approx([-0.3, -1 / 6, 0, -0.45, 0, 0])
    assert call(repetition(3, -1), ["a b c a b c a b c"]) == pytest.approx([-4 / 7])  # abc bca cab of 7


@pytest.mark.parametrize(("n", "max_penalty"), [(0, -1.0), (2, 0.0), (2, 1.0)])
def test_repetition_with_bad_numbers(n, max_penalty):
    with pytest.raises(ValueError, match=f"n={n} must be 1 or more, max_penalty={max_penalty} below 0"):
        repetition(n, max_penalty)


TAGS = st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", " ", "\n", "a", "A", "\ud800"])).map(
    "".join
)


@given(st.text() | TAGS, st.text() | TAGS, st.integers(0, 30))
def test_any_text_has_a_finite_reward_within_its_bounds(prompt, completion, tokens):
    def one(reward):
        (value,) = call(reward, [completion], [prompt], [[1] * tokens])
        assert math.isfinite(value)
        return value

    assert one(think_answer_format) in (0, 1)
    assert -1 <= one(soft_overlong(20, 7)) <= 0
    assert -0.5 < one(repetition(2, -0.5)) <= 0

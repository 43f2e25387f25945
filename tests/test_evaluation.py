import itertools

import numpy as np
import pytest

from grpo_jax.evaluation import EvaluationConfig, pass_at_k


def test_pass_at_k_is_the_mean_over_all_subsets():
    correct = np.array([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
    for k in range(1, 6):
        by_hand = np.mean([[row[list(s)].any() for s in itertools.combinations(range(5), k)] for row in correct])
        assert pass_at_k(correct, k) == pytest.approx(by_hand)


@pytest.mark.parametrize("k", [0, 6])
def test_k_must_be_at_most_the_number_of_samples(k):
    with pytest.raises(ValueError, match=f"k={k} must be from 1 to"):
        pass_at_k(np.ones((2, 5), bool), k)


@pytest.mark.parametrize("changes", [{"prompts": 0}, {"every": -1}, {"temperature": 0.0}])
def test_bad_configuration(changes):
    with pytest.raises(ValueError, match="must be above 0"):
        EvaluationConfig(**changes)

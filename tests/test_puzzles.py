import ast

import pytest

from grpo_jax.data.puzzles import PREFIX, PuzzleConfig, Puzzles, is_held_out

CONFIGS = [PuzzleConfig(), PuzzleConfig(max_constant=2, tests=1), PuzzleConfig(max_constant=30, tests=7, effort=0.9)]
configs = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.max_constant}x{c.tests}")


def passes(puzzle, expression):
    """Puzzles are this module's own: nothing hostile stands in them."""
    namespace: dict = {}
    exec(PREFIX + expression, namespace)
    return all(namespace["f"](*test["args"]) == test["result"] for test in puzzle.tests)


@configs
def test_solutions_solve_and_fit(config):
    task = Puzzles(config, seed=3)
    for split in ("train", "held_out"):
        for index in range(120):
            puzzle = task.problem(split, index)
            assert passes(puzzle, puzzle.solution), puzzle
            results = [test["result"] for test in puzzle.tests]
            assert len(results) == 1 or any(result != results[0] for result in results), "no constant is right"
            assert len(puzzle.tests) == config.tests
            assert len(task.tokenizer.encode(puzzle.prompt)) <= task.max_prompt_tokens
            for text in (puzzle.solution, puzzle.lazy):
                assert len(task.tokenizer.encode(text)) + 1 <= task.max_completion_tokens
                ast.parse(text)


@pytest.fixture(scope="module")
def first():
    """The first puzzles by what they ask."""
    task = Puzzles(PuzzleConfig(max_constant=3), seed=0)
    each = (task.problem(split, i) for split, count in (("train", 3000), ("held_out", 400)) for i in range(count))
    return {puzzle.description: puzzle for puzzle in each}


@pytest.mark.parametrize(
    ("description", "items", "result"),
    [
        ("over 3, times 3, sum", [3, 6, 7, -8], 39), ("times 3, over 3, sum", [5, 6, 1, -8], 33),
        ("odd, plus 2, sorted", [4, 3, -1], [1, 5]), ("plus 3, odd, reversed", [4, 3, -2], [1, 7]),
        ("mod 3, even, max", [-1, -2, 7], 2), ("negated, under 3, max", [-2, -9, 4], 2),
        ("multiples of 3, minus 3, sum", [3, -3, 4], -6), ("minus 2, multiples of 3, min", [2, 5, 3], 0),
        ("squared, over 2, sorted", [1, -2, 3], [4, 9]),
    ],
)  # fmt: skip
def test_meanings_by_hand(first, description, items, result):
    namespace: dict = {}
    exec(PREFIX + first[description].solution, namespace)
    assert namespace["f"](items) == result


def test_being_held_out_is_a_property_of_a_puzzle():
    train = {Puzzles(PuzzleConfig(), seed).problem("train", i).description for seed in (0, 1) for i in range(500)}
    held_out = {Puzzles(PuzzleConfig(), 0).problem("held_out", i).description for i in range(300)}
    assert not train & held_out
    assert all(map(is_held_out, held_out))
    assert len(train) > 500
    assert len(held_out) > 100


def test_puzzles_are_pure_functions():
    task = Puzzles(PuzzleConfig(), seed=7)
    forwards = [Puzzles(PuzzleConfig(), seed=7).problem("train", i) for i in range(20)]
    assert [task.problem("train", i) for i in reversed(range(20))] == forwards[::-1]
    assert [Puzzles(PuzzleConfig(), seed=8).problem("train", i) for i in range(20)] != forwards
    assert task.demonstration(5)[0] == forwards[5]
    prompt = task.source("train")(5)
    assert (prompt.text, dict(prompt.columns)) == (
        f"{forwards[5].description}:",
        {"tests": forwards[5].tests, "prefix": PREFIX},
    )


@pytest.mark.parametrize("effort", [0.0, 0.4, 1.0])
def test_effort_is_the_share_of_solutions(effort):
    """The others leave a step out, which hits now and then: in one puzzle in eight or so."""
    task, total = Puzzles(PuzzleConfig(effort=effort), seed=1), 400
    solved = sum(passes(*task.demonstration(i)) for i in range(total)) / total
    bound = 3.3 * (0.25 / total) ** 0.5  # level 1e-3
    assert effort - bound <= solved <= effort + 0.15 * (1 - effort) + bound


@pytest.mark.parametrize(
    ("options", "match"),
    [({"max_constant": 1}, "max_constant=1"), ({"max_constant": 100}, "max_constant=100"), ({"tests": 0}, "tests=0"),
     ({"effort": 1.1}, r"effort=1\.1")],
)  # fmt: skip
def test_config_errors(options, match):
    with pytest.raises(ValueError, match=match):
        PuzzleConfig(**options)

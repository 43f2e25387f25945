import gzip
import json

import pytest

from grpo_jax.data.benchmarks import MBPP_SPLITS, aime, humaneval, math500, mbpp

MATH = {
    "problem": "Convert $(0,3)$.", "solution": "We have $\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}.$",
    "answer": "\\left( 3, \\frac{\\pi}{2} \\right)", "subject": "Precalculus", "level": 2,
    "unique_id": "test/precalculus/807.json",
}  # fmt: skip
MBPP = {
    "text": "Write a function to add two numbers.", "code": "def add(a, b):\r\n  return a + b", "task_id": 11,
    "test_setup_code": "one = 1", "test_list": ["assert add(one, 2) == 3", "assert add(0, 0) == 0"],
    "challenge_test_list": [],
}  # fmt: skip
SANITIZED = {
    "source_file": "x.ipynb", "task_id": 12, "prompt": "Write a function to add two numbers.",
    "code": "def add(a, b):\n  return a + b", "test_imports": ["import math", "import re"],
    "test_list": ["assert add(math.floor(1.5), 2) == 3"],
}  # fmt: skip
HUMANEVAL = {
    "task_id": "HumanEval/38", "entry_point": "decode",
    "prompt": 'def encode(s: str):\n    return s[::-1]\n\n\ndef decode(s: str):\n    """\n    undo encode\n    """\n',
    "canonical_solution": "    return encode(s)\n",
    "test": "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate(encode('abc')) == 'abc'\n",
}  # fmt: skip
QUESTION = (
    "You are an expert Python programmer, and here is your task: Write a function to add two numbers. Your code should "
    "pass these tests:\n\nassert add(one, 2) == 3\nassert add(0, 0) == 0\n"
)


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def passed(record, completion):
    """What a judge of code does with a record."""
    scope = {}
    try:
        exec(record["prefix"] + completion, scope)
        exec(record["setup"], scope)
        for test in record["tests"]:
            exec(test, scope)
    except Exception:
        return False
    return True


def test_math500(tmp_path):
    assert math500(lines(tmp_path / "test.jsonl", MATH)) == [
        {
            "question": MATH["problem"], "answer": MATH["answer"], "solution": MATH["solution"],
            "id": "test/precalculus/807.json", "subject": "Precalculus", "level": 2,
        }
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "id", "answer", "solution"),
    [
        ({"ID": "2024-II-4", "Problem": "?", "Solution": "So 33.", "Answer": 33}, "2024-II-4", "33", "So 33."),
        ({"id": 60, "problem": "?", "solution": "s", "answer": "025", "url": "u", "year": "2024"}, "60", "25", "s"),
        ({"problem_idx": 1, "problem": "?", "answer": 0}, "1", "0", ""),
        ({"question": "?", "answer": "336^\\circ"}, "", "336", ""),
        ({"question": "?", "answer": " 000 "}, "", "0", ""),
        ({"question": "?", "answer": "999"}, "", "999", ""),
    ],
)
def test_aime(tmp_path, row, id, answer, solution):
    (record,) = aime(lines(tmp_path / "aime.jsonl", row))
    assert record == {"question": "?", "answer": answer, "solution": solution, "id": id}


@pytest.mark.parametrize("answer", ["1000", "-1", "3.0", "", None, "\\frac12"])
def test_aime_answers_are_integers(tmp_path, answer):
    path = lines(tmp_path / "aime.jsonl", {"problem": "?", "answer": 1}, {"problem": "?", "answer": answer})
    with pytest.raises(ValueError, match=r"line 2: answer .*expected an integer from 0 to 999"):
        aime(path)


def test_mbpp(tmp_path):
    (record,) = mbpp(lines(tmp_path / "mbpp.jsonl", MBPP))
    assert record == {
        "question": QUESTION, "prefix": "", "setup": "one = 1", "tests": MBPP["test_list"], "solution": MBPP["code"],
        "id": 11,
    }  # fmt: skip
    assert passed(record, record["solution"])
    assert not passed(record, "def add(a, b): return a - b")


def test_sanitized_mbpp(tmp_path):
    (tmp_path / "sanitized-mbpp.json").write_text(json.dumps([SANITIZED]))
    (record,) = mbpp(tmp_path / "sanitized-mbpp.json")
    assert (record["id"], record["setup"]) == (12, "import math\nimport re")
    assert "Write a function to add two numbers. Your code should pass" in record["question"]
    assert passed(record, record["solution"])


def test_mbpp_splits(tmp_path):
    path = lines(tmp_path / "mbpp.jsonl", *({**MBPP, "task_id": i} for i in range(1, 975)))
    ids = {split: [record["id"] for record in mbpp(path, split)] for split in MBPP_SPLITS}
    assert {split: (min(i), max(i), len(i)) for split, i in ids.items()} == {
        "prompt": (1, 10, 10), "test": (11, 510, 500), "validation": (511, 600, 90), "train": (601, 974, 374),
    }  # fmt: skip
    with pytest.raises(ValueError, match="no split 'dev'; expected one of prompt, test"):
        mbpp(path, "dev")
    with pytest.raises(ValueError, match="no task of the split 'train'"):
        mbpp(lines(tmp_path / "few.jsonl", MBPP), "train")


def test_humaneval(tmp_path):
    text = json.dumps(HUMANEVAL) + "\n"
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "HumanEval.jsonl").write_text(text)
    (record,) = humaneval(tmp_path / "HumanEval.jsonl.gz")
    assert [record] == humaneval(tmp_path / "HumanEval.jsonl")
    assert record == {
        "question": HUMANEVAL["prompt"], "prefix": HUMANEVAL["prompt"], "setup": HUMANEVAL["test"],
        "tests": ["check(decode)"], "solution": HUMANEVAL["canonical_solution"], "id": "HumanEval/38",
    }  # fmt: skip
    assert passed(record, record["solution"])
    assert passed(record, "def decode(s):\n    return encode(s)\n")  # the whole function; tests use the helper
    assert not passed(record, "    return s\n")


@pytest.mark.parametrize(
    ("loader", "row", "changed", "message"),
    [
        (math500, MATH, {"answer": None}, "line 2: field 'answer' is None; expected text"),
        (math500, MATH, {"problem": ...}, "line 2 has no field 'problem'; it has"),
        (math500, MATH, {"level": "Level 2"}, "line 2: invalid literal"),
        (aime, {"problem": "?", "answer": 1}, {"problem": ...}, "line 2 has no field 'question'"),
        (aime, {"problem": "?", "answer": 1}, {"answer": ...}, "line 2 has no field 'answer'"),
        (mbpp, MBPP, {"text": ...}, "line 2 has no field 'prompt'"),
        (mbpp, MBPP, {"test_setup_code": ...}, "line 2 has no field 'test_setup_code'"),
        (mbpp, MBPP, {"test_list": []}, r"line 2: test_list \[\]: expected a list of assertions"),
        (mbpp, MBPP, {"test_list": "assert True"}, "expected a list of assertions"),
        (humaneval, HUMANEVAL, {"entry_point": ...}, "line 2 has no field 'entry_point'"),
        (humaneval, HUMANEVAL, {"test": 3}, "line 2: field 'test' is 3; expected text"),
    ],
)
def test_errors_name_file_line_and_field(tmp_path, loader, row, changed, message):
    wrong = {name: value for name, value in {**row, **changed}.items() if value is not ...}
    with pytest.raises(ValueError, match=f"bench.jsonl, {message}" if message.startswith("line") else message):
        loader(lines(tmp_path / "bench.jsonl", row, wrong))

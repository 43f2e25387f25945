"""Published benchmarks, from local files as their authors publish them.

Every record has `question` (what a template takes), `solution` (the published one, "" where there is none) and `id`.
Mathematics adds `answer`, as text. Code adds what a judge runs, in this order:

    prefix + completion, then setup, then each of tests

where `prefix` is text that stands before the completion, and each of `tests` is one statement that raises where the
completion is wrong.
"""

import os
import re
from typing import Any

from grpo_jax.data.sources import Record, json_records, text_field

__all__ = ["MBPP_SPLITS", "aime", "humaneval", "math500", "mbpp"]

# Task ids of MBPP (arXiv 2108.07732, and the data set's card): prompt is for few-shot examples.
MBPP_SPLITS = {
    "prompt": range(1, 11), "test": range(11, 511), "validation": range(511, 601), "train": range(601, 975),
}  # fmt: skip


def math500(path: str | os.PathLike[str]) -> list[Record]:
    """MATH-500 (test.jsonl; arXiv 2305.20050): with `subject` and `level`; `answer` is LaTeX, as published.

    Raises:
      ValueError: the file is not in this format, naming the line and the field.
    """

    def parse(record: Record) -> Record:
        return {
            "question": text_field(record, "problem"),
            "answer": text_field(record, "answer"),
            "solution": text_field(record, "solution"),
            "id": text_field(record, "unique_id"),
            "subject": text_field(record, "subject"),
            "level": int(record["level"]),
        }

    return json_records(path, parse)


def aime(path: str | os.PathLike[str]) -> list[Record]:
    r"""AIME of any year, a problem a line, in the spellings of its releases on the Hugging Face hub.

    Problem, Answer, Solution, ID (Maxwell-Jia/AIME_2024); the same in lower case (AI-MO, HuggingFaceH4, math-ai);
    problem_idx (MathArena); question (opencompass). `answer` is an integer from 0 to 999 without leading zeros; a
    degree sign behind it (opencompass/AIME2025 has 336^\circ) is dropped.

    Raises:
      ValueError: the file is not in this format, naming the line and the field.
    """

    def parse(record: Record) -> Record:
        fields = {name.lower(): value for name, value in record.items()}
        answer = re.fullmatch(r"0*(\d{1,3})(\^\\circ)?", str(_first(fields, "answer")).strip())
        if answer is None:
            raise ValueError(f"answer {fields['answer']!r}: expected an integer from 0 to 999.")
        return {
            "question": text_field(fields, "problem" if "problem" in fields else "question"),
            "answer": answer[1],
            "solution": str(fields.get("solution", "")),
            "id": str(_first(fields, "id", "problem_idx", default="")),
        }

    return json_records(path, parse)


def mbpp(path: str | os.PathLike[str], split: str = "test") -> list[Record]:
    """A split of MBPP (arXiv 2108.07732): mbpp.jsonl, or the hand-verified sanitized-mbpp.json.

    The question is the one of the authors' README, which shows the tests: nothing else says what the function is to be
    called.

    Raises:
      ValueError: there is no such split, or the file is not in this format, naming the line and the field.
    """
    if split not in MBPP_SPLITS:
        raise ValueError(f"MBPP has no split {split!r}; expected one of {', '.join(MBPP_SPLITS)}.")

    def parse(record: Record) -> Record:
        task, tests = text_field(record, "text" if "text" in record else "prompt"), record["test_list"]
        if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
            raise ValueError(f"test_list {tests!r}: expected a list of assertions.")
        imports = "\n".join(record["test_imports"]) if "test_imports" in record else record["test_setup_code"]
        shown = "\n".join(tests)
        return {
            "question": f"You are an expert Python programmer, and here is your task: {task.strip()} Your code should "
            f"pass these tests:\n\n{shown}\n",
            "prefix": "",
            "setup": imports,
            "tests": tests,
            "solution": text_field(record, "code"),
            "id": int(record["task_id"]),
        }

    records = [record for record in json_records(path, parse) if record["id"] in MBPP_SPLITS[split]]
    if not records:
        raise ValueError(f"{path} holds no task of the split {split!r} (task ids {MBPP_SPLITS[split]}).")
    return records


def humaneval(path: str | os.PathLike[str]) -> list[Record]:
    """HumanEval (HumanEval.jsonl or .jsonl.gz; arXiv 2107.03374).

    The question is the beginning of a program: imports, sometimes helpers that tests use, a signature and a docstring.
    It is the `prefix` too: a completion that goes on from it and one that writes the whole function both run behind it.

    Raises:
      ValueError: the file is not in this format, naming the line and the field.
    """

    def parse(record: Record) -> Record:
        prompt = text_field(record, "prompt")
        return {
            "question": prompt,
            "prefix": prompt,
            "setup": text_field(record, "test"),
            "tests": [f"check({text_field(record, 'entry_point')})"],
            "solution": text_field(record, "canonical_solution"),
            "id": text_field(record, "task_id"),
        }

    return json_records(path, parse)


def _first(record: Record, *names: str, default: Any = None) -> Any:
    """The value of the first of these fields that is there."""
    for name in names:
        if name in record:
            return record[name]
    if default is None:
        raise KeyError(" or ".join(names))
    return default

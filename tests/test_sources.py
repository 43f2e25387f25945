import collections
import gzip
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from grpo_jax.data.sources import (
    Mapped,
    Prompt,
    drop_long,
    in_order,
    json_records,
    make_prompts,
    shuffled,
    tfds_records,
)
from grpo_jax.data.tokenizer import ByteTokenizer


def prompts(n):
    return [Prompt(text=str(i)) for i in range(n)]


def texts(source, cursors):
    return "".join(source(i).text for i in cursors)


# Orders ---------------------------------------------------------------------------------------------


def test_order_is_pinned():
    """A run that is continued with a newer version goes on with the same prompts."""
    assert texts(shuffled(prompts(10), seed=0), range(20)) == "08937512643742981650"
    assert texts(shuffled(prompts(10), seed=1), range(10)) == "2014567839"


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_every_epoch_has_every_prompt_once(n):
    source = shuffled(prompts(n), seed=3)
    for epoch in range(5):
        read = [int(source(i).text) for i in range(epoch * n, epoch * n + n)]
        assert sorted(read) == list(range(n))


def test_epochs_and_seeds_differ():
    orders = {texts(shuffled(prompts(50), seed), range(e * 50, e * 50 + 50)) for seed in range(4) for e in range(4)}
    assert len(orders) == 16  # (1, 0) is not (0, 1) either


def test_order_does_not_depend_on_what_was_read_before():
    forward, backward = shuffled(prompts(9), seed=5), shuffled(prompts(9), seed=5)
    there = [forward(i).text for i in range(60)]
    assert [backward(i).text for i in reversed(range(60))] == there[::-1]


def chi_square_of_permutations(orders):
    counts = collections.Counter(map(tuple, orders))
    expected = len(orders) / 24
    return sum((counts[p] - expected) ** 2 / expected for p in itertools.permutations(range(4)))


def test_permutations_are_uniform():
    source = shuffled(prompts(4), seed=0)
    orders = [[int(source(4 * e + i).text) for i in range(4)] for e in range(1200)]
    assert chi_square_of_permutations(orders) < 49.7  # 23 degrees of freedom, level 0.001
    rotations = [np.roll(range(4), e).tolist() for e in range(1200)]
    assert chi_square_of_permutations(rotations) > 49.7  # negative control


def test_in_order_wraps_around():
    assert texts(in_order(prompts(3)), range(8)) == "01201201"


def test_no_prompts():
    with pytest.raises(ValueError, match="at least one prompt"):
        shuffled([], seed=0)
    with pytest.raises(ValueError, match="at least one prompt"):
        in_order([])


def test_negative_seed():
    with pytest.raises(ValueError, match="seed=-1 must be 0 or more"):
        shuffled(prompts(3), seed=-1)


def test_prompts_of_a_python_function_are_made_when_they_are_read():
    made = []

    def prompt(i):
        made.append(i)
        return Prompt(text=f"{i}+{i}=", columns={"answer": str(2 * i)})

    source = shuffled(Mapped(prompt, range(1_000_000)), seed=0)
    read = [source(i) for i in (0, 999_999, 1_000_000)]
    assert [p.columns["answer"] for p in read] == [str(2 * i) for i in made]
    assert len(made) == 3


def test_mapped_is_a_sequence():
    squares = Mapped(lambda i: i * i, range(5))
    assert list(squares) == [0, 1, 4, 9, 16]
    assert (squares[-1], list(squares[1:4]), list(squares[1:][::-2]), len(squares[3:])) == (16, [1, 4, 9], [16, 4], 2)
    with pytest.raises(IndexError):
        squares[5]


# Prompts --------------------------------------------------------------------------------------------


def test_make_prompts():
    records = [{"question": "1+1?", "answer": "2"}, {"problem": "?"}]
    made = make_prompts(records, lambda question: f"Q: {question}")
    assert made[0] == Prompt(text="Q: 1+1?", columns={"question": "1+1?", "answer": "2"})
    with pytest.raises(ValueError, match=r"no field 'question', only \['problem'\]"):
        made[1]


def test_drop_long_counts_and_says_what_it_drops():
    said, given = [], [Prompt(text=text) for text in ("abc", "abcd", "", "ab", "abcdefg")]
    assert [p.text for p in drop_long(given, ByteTokenizer(), 3, said.append)] == ["abc", "ab"]
    assert said == ["dropped 3 of 5 prompts: 2 longer than 3 tokens (the longest has 7), 1 empty."]


def test_drop_long_is_silent_where_nothing_is_dropped(capsys):
    assert len(drop_long(prompts(3), ByteTokenizer(), 1)) == 3
    assert capsys.readouterr().out == ""
    drop_long([*prompts(3), Prompt(text="long")], ByteTokenizer(), 1)
    assert "dropped 1 of 4" in capsys.readouterr().out


@pytest.mark.parametrize("texts", [["abc", "abcd"], []])
def test_drop_long_leaves_something(texts):
    with pytest.raises(ValueError, match="None is left"):
        drop_long([Prompt(text=text) for text in texts], ByteTokenizer(), 2)


# Records --------------------------------------------------------------------------------------------


def test_json_lines(tmp_path):
    rows = [{"a": 1}, {"a": "zwei\u2028\u00fc"}]  # U+2028 ends a line for str.splitlines, and none of a file
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "x.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "x.json").write_text(json.dumps(rows, indent=2))
    assert json_records(tmp_path / "x.jsonl") == rows
    assert json_records(str(tmp_path / "x.jsonl.gz")) == rows
    assert json_records(tmp_path / "x.json") == rows
    assert json_records(tmp_path / "x.jsonl", lambda record: record["a"]) == [1, "zwei\u2028\u00fc"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"a": 1}\n\n{"a": 1', "x.jsonl, line 3 is not JSON"),
        ("x.jsonl", '{"a": 1}\n[1]\n', r"x.jsonl, line 2: expected an object with fields, found '\[1\]'"),
        ("x.jsonl", '{"a": 1}\n{"b": 1}\n', r"x.jsonl, line 2 has no field 'a'; it has \['b'\]"),
        ("x.jsonl", '{"a": "one"}\n', "x.jsonl, line 1: invalid literal for int"),
        ("x.jsonl", '{"a": null}\n', "x.jsonl, line 1: int"),
        ("x.jsonl", "\n", "x.jsonl holds no records"),
        ("x.json", '[{"a": 1}, {"b": 1}]', "x.json, item 1 has no field 'a'"),
        ("x.json", '{"a": 1}', "x.json holds a dict; expected a list"),
        ("x.json", '{"a": 1}\n{"a": 1}', "an object a line is named .jsonl"),
    ],
)
def test_json_errors_name_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        json_records(tmp_path / name, lambda record: int(record["a"]))


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        json_records(tmp_path / "x.jsonl")


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """A small data set `things`, written as TFDS does."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    with registered.skip_registration():

        class Things(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            code_path = None  # see gsm8k.py

            def _info(self):
                features = {"name": tfds.features.Text(), "tags": tfds.features.Sequence(tfds.features.Text())}
                features["size"] = tfds.features.Scalar(np.int32)
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples(20), "test": self._generate_examples(3)}

            def _generate_examples(self, n):
                for i in range(n):
                    yield i, {"name": f"größe {i}", "tags": ["x"] * i, "size": i}

    path = tmp_path_factory.mktemp("tfds")
    Things(data_dir=path, file_format="array_record").download_and_prepare()
    return path


def test_tfds_records_are_plain_values(tfds_dir):
    records = tfds_records("things", "test", tfds_dir)
    assert len(records) == 3
    expected = [{"name": f"größe {i}", "tags": ["x"] * i, "size": i} for i in range(3)]
    assert sorted(records, key=lambda record: record["size"]) == expected
    assert type(records[0]["size"]) is int
    assert json.loads(json.dumps(records[0])) == records[0]
    assert len(tfds_records("things", "train[:25%]", tfds_dir)) == 5


def test_tfds_errors(tfds_dir, tmp_path):
    with pytest.raises(ValueError, match="Unknown split 'dev'"):
        tfds_records("things", "dev", tfds_dir)
    for name in ("nothing_of_this_name", "mnist"):  # TFDS knows one of them, and not where it is
        with pytest.raises(FileNotFoundError, match=rf"tfds\.data_source\('{name}', data_dir='{tmp_path}'\)"):
            tfds_records(name, "train", tmp_path)


def test_tfds_without_tensorflow(tfds_dir):
    code = (
        "import sys; from grpo_jax.data.sources import tfds_records; "
        f"assert 'tensorflow_datasets' not in sys.modules; tfds_records('things', 'test', {str(tfds_dir)!r})[0]; "
        "print(sorted(name for name in sys.modules if name.split('.')[0] in ('tensorflow', 'jax')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

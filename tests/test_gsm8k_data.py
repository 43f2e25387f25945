import functools
import http.server
import json
import pathlib
import subprocess
import sys
import threading

import pytest

from grpo_jax.data.gsm8k import gsm8k_record, gsm8k_records, prepare
from grpo_jax.data.sources import json_records, make_prompts
from grpo_jax.data.templates import qa

ROOT = pathlib.Path(__file__).parents[1]
PUBLISHED = ROOT.parent / "shared" / "data" / "gsm8k"

TRAIN = [
    {"question": "Tom’s 3 pens?", "answer": "1+2=<<1+2=3>>3\n#### 3"},
    {"question": "A house?", "answer": "It is\n#### 1,450,000"},
    {"question": "The loss?", "answer": "Down.\n#### -5"},
    {"question": "The price?", "answer": "Up.\n####  2,125 "},
]
TEST = [{"question": "How many?", "answer": "One.\n#### 1"}]


def write(directory, train=TRAIN, test=TEST):
    directory.mkdir(exist_ok=True)
    for split, rows in (("train", train), ("test", test)):
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Prepared by the documented command."""
    files, data_dir = write(tmp_path_factory.mktemp("files")), tmp_path_factory.mktemp("data")
    command = [sys.executable, "-m", "experiments.prepare_gsm8k", f"--data_dir={data_dir}", f"--files={files}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1].startswith(f"gsm8k in {data_dir}: 4 train, 1 test; GSM8K has ")
    return data_dir


def test_records(prepared):
    records = {record["question"]: record for record in gsm8k_records("train", prepared)}
    assert {question: record["answer"] for question, record in records.items()} == {
        "Tom’s 3 pens?": "3", "A house?": "1450000", "The loss?": "-5", "The price?": "2125",
    }  # fmt: skip
    assert records["Tom’s 3 pens?"]["solution"] == "1+2=<<1+2=3>>3\n#### 3"
    assert list(gsm8k_records("test", prepared)) == [
        {"question": "How many?", "answer": "1", "solution": "One.\n#### 1"}
    ]
    assert len(gsm8k_records("train[:50%]", prepared)) == 2


def test_prompts(prepared):
    (prompt,) = make_prompts(gsm8k_records("test", prepared), qa)
    assert prompt.text == "Question:\nHow many?\nAnswer:\nLet's think step by step.\n"
    assert prompt.columns == {"question": "How many?", "answer": "1", "solution": "One.\n#### 1"}


def test_anyone_can_read_it_by_its_tfds_name(prepared):
    import tensorflow_datasets as tfds

    (item,) = tfds.data_source("gsm8k", split="test", data_dir=prepared, download=False)
    assert item == {
        "question": b"How many?", "answer": b"One.\n#### 1", "annotation": b"One.\n", "short_answer": b"1",
    }  # fmt: skip


def test_local_file_without_tfds(tmp_path):
    records = json_records(write(tmp_path / "files") / "train.jsonl", gsm8k_record)
    assert [record["answer"] for record in records] == ["3", "1450000", "-5", "2125"]


def test_preparing_again_replaces_what_was_there(tmp_path):
    assert prepare(tmp_path / "data", write(tmp_path / "files")) == {"train": 4, "test": 1}
    assert prepare(tmp_path / "data", write(tmp_path / "files", test=TRAIN[:2])) == {"train": 4, "test": 2}
    assert {r["answer"] for r in gsm8k_records("test", tmp_path / "data")} == {"3", "1450000"}
    with pytest.raises(ValueError, match=r"test\.jsonl, line 2: answer 'no end'"):
        prepare(tmp_path / "data", write(tmp_path / "files", test=[TEST[0], {"question": "?", "answer": "no end"}]))
    assert len(gsm8k_records("test", tmp_path / "data")) == 2  # a failure leaves it as it was


def test_download(tmp_path, monkeypatch):
    """From a server on this machine in place of the published address."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=write(tmp_path / "files"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("grpo_jax.data.gsm8k._URL", address + "/{}.jsonl")
        assert prepare(tmp_path / "data") == {"train": 4, "test": 1}
        server.shutdown()
    assert [record["answer"] for record in gsm8k_records("test", tmp_path / "data")] == ["1"]
    with pytest.raises(
        ConnectionError, match=rf"{address}/train\.jsonl was not downloaded .*Offline, name a directory"
    ):
        prepare(tmp_path / "data")  # nobody listens any more
    assert len(gsm8k_records("test", tmp_path / "data")) == 1


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"experiments\.prepare_gsm8k --data_dir={tmp_path}"):
        gsm8k_records("train", tmp_path)
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"test\.jsonl not found; expected train\.jsonl and test\.jsonl"):
        prepare(tmp_path / "data", tmp_path)


@pytest.mark.parametrize(
    ("record", "error", "message"),
    [
        ({"question": "?"}, KeyError, "answer"),
        ({"question": "?", "answer": "18"}, ValueError, "'18': expected a solution and one final answer"),
        ({"question": "?", "answer": "x #### "}, ValueError, "one final answer"),
        ({"question": "?", "answer": "x\n#### 1\n#### 2"}, ValueError, "one final answer"),
        ({"question": " ", "answer": "x\n#### 1"}, ValueError, "field 'question' is ' '; expected text"),
        ({"question": "?", "answer": 18}, ValueError, "field 'answer' is 18; expected text"),
    ],
)
def test_what_is_not_gsm8k(record, error, message):
    with pytest.raises(error, match=message):
        gsm8k_record(record)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published files are not here")
def test_published_files():
    for split, count in (("train", 7473), ("test", 1319)):
        records = json_records(PUBLISHED / f"{split}.jsonl", gsm8k_record)
        assert len(records) == count
        assert all(record["answer"].removeprefix("-").isdecimal() for record in records)

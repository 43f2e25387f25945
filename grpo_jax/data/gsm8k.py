"""GSM8K (arXiv 2110.14168): 7,473 training and 1,319 test problems of grade-school mathematics.

Read by its TFDS name. `python -m experiments.prepare_gsm8k` prepares it once, from the network or from local files.
"""

import os
import pathlib
import tempfile
import urllib.request
from collections.abc import Generator, Sequence
from typing import Any

from grpo_jax.data.sources import Mapped, Record, json_records, text_field, tfds_records

__all__ = ["PUBLISHED", "gsm8k_record", "gsm8k_records", "prepare"]

PUBLISHED = {"train": 7473, "test": 1319}  # records
_SPLITS = tuple(PUBLISHED)
_URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/{}.jsonl"


def gsm8k_record(record: Record) -> Record:
    """A published record (`question`, `answer` = solution, "####", final answer) in the names used here.

    Returns:
      question; answer: what follows "####", without commas; solution: the whole published answer.

    Raises:
      KeyError: a field is missing.
      ValueError: the published answer has no final answer, or several.
    """
    question, solution = text_field(record, "question"), text_field(record, "answer")
    parts = solution.split("####")
    if len(parts) != 2 or not parts[1].strip():
        raise ValueError(f"answer {solution!r}: expected a solution and one final answer behind '####'.")
    return {"question": question, "answer": parts[1].strip().replace(",", ""), "solution": solution}


def gsm8k_records(split: str, data_dir: str | os.PathLike[str] | None = None) -> Sequence[Record]:
    """Records with `question`, `answer` (the final answer) and `solution`, in the order in which TFDS stores them.

    Args:
      split: train, test, or a part of one: `train[:90%]`.
      data_dir: where `prepare` wrote; None: the data directory of TFDS.

    Raises:
      FileNotFoundError: the data set is not prepared; the message holds the command.
      ValueError: there is no such split.
    """
    try:
        return Mapped(gsm8k_record, tfds_records("gsm8k", split, data_dir))
    except FileNotFoundError:
        place = "" if data_dir is None else f" --data_dir={os.fspath(data_dir)}"
        raise FileNotFoundError(
            f"GSM8K is not prepared in {data_dir or 'the data directory of TFDS'}. Prepare it: "
            f"python -m experiments.prepare_gsm8k{place} (offline add --files=DIR with train.jsonl and test.jsonl)"
        ) from None


def prepare(
    data_dir: str | os.PathLike[str] | None = None, files: str | os.PathLike[str] | None = None
) -> dict[str, int]:
    """Writes GSM8K as the TFDS data set `gsm8k` in array_record format; what lay there is replaced.

    Args:
      data_dir: where; None: the data directory of TFDS.
      files: a directory with the published train.jsonl and test.jsonl; None: they are downloaded.

    Returns:
      The number of records of each split.

    Raises:
      FileNotFoundError: a file is not there.
      ConnectionError: the files cannot be downloaded.
      ValueError: a file is not GSM8K, naming the line.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered
    from tensorflow_datasets.text.gsm8k.gsm8k import Gsm8k  # no builder knows its name before this import

    # Read before anything is written: TFDS deletes what lies there first.
    records = _downloaded() if files is None else _read(files)

    with registered.skip_registration():

        class Local(Gsm8k):
            name = "gsm8k"
            code_path = None  # TFDS looks for the class in its package with a library that it does not require

            def _split_generators(self, dl_manager):
                return {split: _examples(records[split]) for split in _SPLITS}

    builder = Local(data_dir=data_dir, file_format="array_record")
    again = tfds.download.DownloadConfig(download_mode=tfds.GenerateMode.REUSE_CACHE_IF_EXISTS)
    builder.download_and_prepare(download_config=again)
    return {name: split.num_examples for name, split in builder.info.splits.items()}


def _downloaded() -> dict[str, list[Record]]:
    # Not TFDS's downloader: without a network it tries for three minutes before it says so.
    with tempfile.TemporaryDirectory() as directory:
        for split in _SPLITS:
            try:
                with urllib.request.urlopen(_URL.format(split), timeout=60) as response:
                    (pathlib.Path(directory) / f"{split}.jsonl").write_bytes(response.read())
            except OSError as error:
                raise ConnectionError(
                    f"{_URL.format(split)} was not downloaded ({error}). Offline, name a directory that holds "
                    "train.jsonl and test.jsonl (--files=DIR)."
                ) from error
        return _read(directory)


def _read(files: str | os.PathLike[str]) -> dict[str, list[Record]]:
    paths = {split: pathlib.Path(files) / f"{split}.jsonl" for split in _SPLITS}
    if missing := [str(path) for path in paths.values() if not path.is_file()]:
        raise FileNotFoundError(f"{' and '.join(missing)} not found; expected train.jsonl and test.jsonl in {files}.")
    return {split: json_records(path, gsm8k_record) for split, path in paths.items()}


def _examples(records: Sequence[Record]) -> Generator[tuple[int, Any], Any, None]:
    """Keys and fields as TFDS's own class makes them of the published files, so that the order is the same too."""
    for i, record in enumerate(records):
        annotation, _, final = record["solution"].partition("####")
        fields = {"annotation": annotation, "short_answer": final.removeprefix(" ")}
        yield i, {"question": record["question"], "answer": record["solution"], **fields}

"""Sources of prompts: pure functions of a cursor, so that nothing iterates and nothing is rewound.

    records (TFDS, a JSON file, a Python function of an index) -> prompts (a template) -> source (an order)

A Python function of the cursor is a source already; `Mapped(function, range(n))` makes n prompts of a function of
an index, with epochs.
"""

import dataclasses
import functools
import gzip
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

if TYPE_CHECKING:
    from grpo_jax.data.tokenizer import Tokenizer

__all__ = [
    "Mapped",
    "Prompt",
    "Record",
    "Source",
    "drop_long",
    "in_order",
    "json_records",
    "make_prompts",
    "shuffled",
    "text_field",
    "tfds_records",
]

_T = TypeVar("_T")
Record = Mapping[str, Any]  # an item of a data set: fields by name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the model reads, and the columns that rewards read."""

    text: str
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Source = Callable[[int], Prompt]  # the prompt at a cursor; the same every time it is asked for


class Mapped(Sequence[_T], Generic[_T]):
    """`function` of each item, computed when it is asked for: a million records cost nothing until they are read."""

    def __init__(self, function: Callable[[Any], _T], items: Sequence[Any]):
        self._function, self._items = function, items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        places = range(len(self._items))[index]  # random-access files know neither slices nor IndexError
        if isinstance(places, range):
            return Mapped(lambda place: self[place], places)
        return self._function(self._items[places])


# Records --------------------------------------------------------------------------------------------


def json_records(path: str | os.PathLike[str], parse: Callable[[Record], _T] = lambda record: record) -> list[_T]:
    """Records of a local file: an object a line (.jsonl, .jsonl.gz), or one list of them (.json).

    Args:
      path: the file.
      parse: makes of a record what is wanted; its KeyError says which field is missing, its ValueError what is wrong.

    Raises:
      ValueError: naming the file, the line (in a .json: the item) and what was expected there.
    """
    path = pathlib.Path(path)
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if path.name.removesuffix(".gz").endswith(".json"):
        items = _decoded(f"{path} (a file with an object a line is named .jsonl)", data)
        if not isinstance(items, list):
            raise ValueError(f"{path} holds a {type(items).__name__}; expected a list of objects.")
        records = [_parsed(f"{path}, item {i}", item, parse) for i, item in enumerate(items)]
    else:
        lines = [(f"{path}, line {i}", line) for i, line in enumerate(data.split(b"\n"), 1) if line.strip()]
        records = [_parsed(where, _decoded(where, line), parse) for where, line in lines]
    if not records:
        raise ValueError(f"{path} holds no records.")
    return records


def _decoded(where: str, text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{where} is not JSON: {error}, in {text[:80]!r}.") from None


def _parsed(where: str, record: Any, parse: Callable[[Record], _T]) -> _T:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with fields, found {str(record)[:80]!r}.")
    try:
        return parse(record)
    except KeyError as error:
        raise ValueError(f"{where} has no field {error}; it has {sorted(record)}.") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def text_field(record: Record, name: str) -> str:
    """A field that must hold text.

    Raises:
      KeyError: there is no such field.
      ValueError: it is empty, or no text.
    """
    value = record[name]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"field {name!r} is {value!r}; expected text.")
    return value


def tfds_records(name: str, split: str, data_dir: str | os.PathLike[str] | None = None) -> Sequence[Record]:
    """Records of a prepared TFDS data set, read from array_record files when asked for, without TensorFlow.

    Args:
      name: TFDS name, also `name/config:version`.
      split: for example `train`, or a part in the syntax of TFDS: `train[:90%]`.
      data_dir: where data sets lie; None: TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Returns:
      Records with text as str, numbers and arrays as plain Python values.

    Raises:
      FileNotFoundError: it is not there in a format of random access; the message holds the command that prepares it.
      ValueError: there is no such split.
    """
    import tensorflow_datasets as tfds  # slow: only who needs it pays

    try:
        stored: Any = tfds.data_source(name, split=split, data_dir=data_dir, download=False)
    except (tfds.core.DatasetNotFoundError, NotImplementedError):
        place = "" if data_dir is None else f", data_dir={os.fspath(data_dir)!r}"
        raise FileNotFoundError(
            f"no data set {name!r} in array_record format in {data_dir or 'the data directory of TFDS'}. Prepare it: "
            f'python -c "import tensorflow_datasets as tfds; tfds.data_source({name!r}{place})"'
        ) from None
    return Mapped(_plain, stored)


def _plain(value: Any) -> Any:
    """NumPy and bytes, as TFDS stores them, to what JSON knows."""
    if isinstance(value, dict):
        return {name: _plain(field) for name, field in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.decode() if isinstance(value, bytes) else value


# Prompts --------------------------------------------------------------------------------------------


def make_prompts(records: Sequence[Record], template: Callable[[str], str]) -> Sequence[Prompt]:
    """Prompts whose text is the template of a record's `question`, and whose columns are its fields.

    Raises (when the prompt is read):
      ValueError: a record has no `question`.
    """

    def prompt(record: Record) -> Prompt:
        if "question" not in record:
            raise ValueError(f"a record has no field 'question', only {sorted(record)}: rename the one that asks.")
        return Prompt(text=template(record["question"]), columns=record)

    return Mapped(prompt, records)


def drop_long(
    prompts: Sequence[Prompt], tokenizer: "Tokenizer", max_tokens: int, say: Callable[[str], None] = print
) -> list[Prompt]:
    """The prompts that have from 1 to `max_tokens` tokens, in their order; `say` is told of what is dropped.

    Raises:
      ValueError: none is left.
    """
    prompts = list(prompts)
    lengths = [len(tokenizer.encode(prompt.text)) for prompt in prompts]
    kept = [prompt for prompt, length in zip(prompts, lengths, strict=True) if 1 <= length <= max_tokens]
    dropped = (
        f"dropped {len(prompts) - len(kept)} of {len(prompts)} prompts: {sum(n > max_tokens for n in lengths)} longer "
        f"than {max_tokens} tokens (the longest has {max(lengths, default=0)}), {lengths.count(0)} empty."
    )
    if not kept:
        raise ValueError(f"{dropped} None is left: raise the limit, or look at what the template makes.")
    if len(kept) < len(prompts):
        say(dropped)
    return kept


# Orders ---------------------------------------------------------------------------------------------


def in_order(prompts: Sequence[_T]) -> Callable[[int], _T]:
    """The prompts as they stand, over and over; for evaluation.

    Raises:
      ValueError: there are none.
    """
    count = _count(prompts)
    return lambda cursor: prompts[cursor % count]


def shuffled(prompts: Sequence[_T], seed: int) -> Callable[[int], _T]:
    """Epochs, each a new permutation of the prompts, each prompt once; of preference pairs, or whatever else.

    The order of an epoch sorts raw 64-bit numbers of the counter-based generator Philox, whose key is made of (seed,
    epoch): it depends on seed, epoch and the number of prompts, and on no version of NumPy, machine or batch size.

    Raises:
      ValueError: there are no prompts, or the seed is negative.
    """
    count = _count(prompts)
    if seed < 0:
        raise ValueError(f"seed={seed} must be 0 or more.")

    @functools.lru_cache(maxsize=2)  # a step may lie on both sides of an epoch's end
    def order(epoch: int) -> np.ndarray:
        # Not Generator.permutation: NumPy promises raw streams for ever, but not what it makes of them (NEP 19).
        raw = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(count)
        return np.argsort(raw, kind="stable")

    def source(cursor: int) -> _T:
        epoch, place = divmod(cursor, count)
        return prompts[int(order(epoch)[place])]

    return source


def _count(prompts: Sequence[Any]) -> int:
    if not len(prompts):
        raise ValueError("a source needs at least one prompt; there is none.")
    return len(prompts)

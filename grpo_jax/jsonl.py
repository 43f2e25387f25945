"""JSON lines that grow: a file that is appended to; in a store, which has no appending, an object and others beside it.

There `NAME` is the beginning, and `NAME.parts/000000123` holds the rows from number 123 on, as they came: to append
costs what is appended, and it is there when that returns. Opened or closed, all are made one object again: it is
written, and then the parts are removed, before anything is appended. Read are the object, and of the parts those that
begin where the rows before them end: one that begins earlier is in the object already, and behind a gap nothing counts.
So at whatever moment that is cut off, what is read is the rows that stay, and of those to be dropped none or some first
ones, which the next start drops.

Whoever opens them writes the object anew, and where there is a part nobody writes another. So a process that was frozen
for so long that another has taken over its workdir (`leases`) finds that the object is no longer its own, or its next
part there already, and ends; of two that write at once, one does. It overwrites nothing that the other has written.
"""

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from grpo_jax import storage
from grpo_jax.storage import Path

__all__ = ["JsonLines", "OtherRunError", "open_lines", "read_jsonl"]


class OtherRunError(OSError):
    """Another run has written what only this one should."""

    def __init__(self, path: Path):
        super().__init__(
            f"another run has written {path}, while this process stood still, or since someone removed .lock: it ends "
            "here, and leaves the workdir to the other."
        )


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; a last line that was cut short by a kill is left out."""
    if storage.is_remote(path):
        return _Parts(path).rows
    return _rows(path.read_text()) if path.exists() else []


def _rows(text: str) -> list[dict[str, Any]]:
    rows = []
    for line in text.split("\n")[:-1]:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _text(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


class JsonLines:
    """Lines in a file on disk."""

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], bool]):
        """Opens the file and drops the lines for which `keep` is false; OSError where it cannot be written."""
        self.rows = [row for row in read_jsonl(path) if keep(row)]  # as it was opened
        if path.exists():
            storage.write(path, _text(self.rows).encode())
        self._file: Any = path.open("a")

    def append(self, row: Mapping[str, Any], durable: bool = False) -> None:
        """Adds a row, which no kill of the process takes back, and if `durable` no end of the machine."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if durable:
            os.fsync(self._file.fileno())

    def flush(self) -> None:
        """Returns when what was appended is in the file."""

    def close(self) -> None:
        """Closes the file."""
        self._file.close()  # flushes again what a full disk has refused


class _ObjectLines(JsonLines):
    """Lines in a store."""

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], bool]):
        """The rows that stay must come before those that do not."""
        self._path, found = path, _Parts(path)
        self.rows = list(itertools.takewhile(keep, found.rows))
        self._count, self._waiting = len(self.rows), ""
        self._stamp = found.make_one(_text(self.rows))

    def append(self, row: Mapping[str, Any], durable: bool = False) -> None:
        """If not `durable`, it waits for `flush`."""
        self._waiting += json.dumps(row) + "\n"
        if durable:
            self.flush()

    def flush(self) -> None:
        if self._waiting:
            part = _parts(self._path) / f"{self._count:09d}"
            if not storage.is_still(self._path, self._stamp) or not storage.create(part, self._waiting.encode()):
                raise OtherRunError(self._path)
            self._count += self._waiting.count("\n")
            self._waiting = ""

    def close(self) -> None:
        found = _Parts(self._path)
        if found.stamp != self._stamp:
            raise OtherRunError(self._path)
        if found.found or self._waiting:
            found.make_one(_text(found.rows) + self._waiting)
            self._waiting = ""


def open_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> JsonLines:
    """The lines of a file, on disk or in a store, without those from the first on for which `keep` is false."""
    return (_ObjectLines if storage.is_remote(path) else JsonLines)(path, keep)


def _parts(path: Path) -> Path:
    return path.with_name(path.name + ".parts")


class _Parts:
    """What there is of lines in a store, as it is read once."""

    def __init__(self, path: Path):
        self._path = path
        while True:
            self.found: list[Path] = []
            with contextlib.suppress(FileNotFoundError):
                self.found = sorted(_parts(path).iterdir())
            base, self.stamp = storage.stamped(path)
            contents = storage.read_all(self.found)
            if None not in contents:  # else they have become one with the rest meanwhile, which is to be read then
                break
        self.rows = _rows((base or b"").decode())
        for part, content in zip(self.found, contents, strict=True):
            if (begin := int(part.name)) > len(self.rows):  # some in between are gone: so is what they were to be of
                break
            if begin == len(self.rows):
                self.rows += _rows((content or b"").decode())

    def make_one(self, text: str) -> bytes:
        """Leaves one object with this text, and says which it is."""
        if (stamp := storage.overwrite(self._path, text.encode(), self.stamp)) is None:
            raise OtherRunError(self._path)
        storage.remove(self.found)
        return stamp

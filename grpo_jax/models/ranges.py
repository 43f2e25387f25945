"""Safetensors in an object store, read by ranges of bytes: what `safetensors.safe_open` is for a file on disk.

The format: eight bytes with the length of a header, the header as JSON (of each tensor type, shape and where its bytes
are, behind the header), and the bytes, rows first, little-endian.
"""

import json
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError

from grpo_jax import storage
from grpo_jax.storage import Path

__all__ = ["RangedFile", "RangedTensor"]

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_LONGEST = 100_000_000  # bytes of a header, as safetensors has it


class RangedTensor:
    """One tensor, of which nothing is read yet."""

    def __init__(self, path: Path, begin: int, described: dict[str, Any]):
        """`begin`: of its bytes in the file."""
        self._path, self._begin = path, begin
        self._dtype, self._shape = described["dtype"], tuple(described["shape"])
        self._held: tuple[tuple[int, int, int] | None, np.ndarray] = None, np.empty(0)

    def get_shape(self) -> list[int]:
        """As safetensors names it."""
        return list(self._shape)

    def get_dtype(self) -> str:
        """As the file names it: F32, BF16."""
        return self._dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """A slice; of the file the rows that it is of are read, and kept: the next may be of other columns."""
        rows, *columns = index if isinstance(index, tuple) else (index,)
        wanted = rows.indices(self._shape[0])
        if self._held[0] != wanted:
            self._held = wanted, self._rows(wanted[0], max(wanted[:2]))
        return self._held[1][(slice(None), *columns)]

    def _rows(self, first: int, end: int) -> np.ndarray:
        dtype, shape = jnp.dtype(_DTYPES[self._dtype]), self._shape[1:]
        row = math.prod(shape) * dtype.itemsize
        data = storage.read_range(self._path, self._begin + first * row, self._begin + end * row)
        if len(data) != (end - first) * row:
            raise SafetensorError(f"{self._path} ends before its header says")
        return np.frombuffer(data, dtype).reshape(end - first, *shape)


class RangedFile:
    """A file, of which the header is read."""

    def __init__(self, path: Path):
        """Raises SafetensorError where it is none, or ends before its header says; OSError where it cannot be read."""
        self._path, size = path, storage.size(path)
        length = int.from_bytes(storage.read_range(path, 0, min(8, size)), "little")
        if size < 8 or length > min(_LONGEST, size - 8):
            raise SafetensorError(f"{size} bytes, with a header of {length}")
        try:
            self._header = json.loads(storage.read_range(path, 8, 8 + length))
            self._header.pop("__metadata__", None)
            ends = {name: described["data_offsets"][1] for name, described in self._header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SafetensorError(f"its header is no safetensors header: {error}") from error
        if 8 + length + max(ends.values(), default=0) > size:
            raise SafetensorError(f"{size} bytes, and its header says {8 + length + max(ends.values())}")
        self._data = 8 + length

    def keys(self) -> list[str]:
        """Names of tensors."""
        return list(self._header)

    def get_slice(self, name: str) -> RangedTensor:
        """A tensor."""
        described = self._header[name]
        return RangedTensor(self._path, self._data + described["data_offsets"][0], described)

"""Where runs and models are: a directory on disk, or `gs://bucket/...` in an object store.

`path(name)` is a `pathlib.Path` where it is local, to which nothing here does anything new; of a store it is an
`etils.epath.Path`, which Orbax uses too and which has the same methods. What a store does otherwise is here: objects
are whole or not there, so that to write one is atomic; nothing is appended to, renamed or locked, no directory made.
Whatever goes wrong in a store is an OSError, as on disk, where a function of this module is asked; what a path's own
methods (`exists`, `read_text`, `iterdir`) let through of gcsfs and what that asks is what `said` tells in a line.

Through gcsfs (`pip install -e '.[gcs]'`), but for checkpoints and leases, for which TensorStore has a driver of its
own; both find credentials as Google's libraries do.
"""

import contextlib
import functools
import logging
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

from etils import epath

__all__ = [
    "Path",
    "check",
    "copy",
    "create",
    "fetched",
    "is_remote",
    "is_still",
    "kvstore",
    "make_directory",
    "move",
    "overwrite",
    "path",
    "probe",
    "read_all",
    "read_range",
    "remove",
    "remove_tree",
    "said",
    "size",
    "stamped",
    "upload",
    "write",
    "written",
]

Path: TypeAlias = pathlib.Path | epath.Path

_SCHEME = "gs://"
_ANSWER = 120.0  # seconds that TensorStore may take, which asks again where it gets no answer


def path(name: str | os.PathLike[str]) -> Path:
    """What a name, as users write it, stands for; nothing is asked of a store yet.

    Raises:
      ValueError: it is an address, and not of Google Cloud Storage; or has a character that stands for others there.
    """
    text = os.fspath(name)
    if text.startswith(_SCHEME):
        if not text.removeprefix(_SCHEME).strip("/"):
            raise ValueError(f"{text} names no bucket: expected gs://BUCKET/...")
        if found := {*text} & {*"*?["}:  # gcsfs would read, and remove, whatever matches
            raise ValueError(f"{text}: names in a store must be without {' '.join(sorted(found))}: choose another.")
        _filesystem()
        return epath.Path(text)
    if "://" in text or text.startswith("gs:"):
        raise ValueError(f"{text}: expected a directory on disk, or gs://BUCKET/... in Google Cloud Storage.")
    return pathlib.Path(text)


def is_remote(place: os.PathLike[str]) -> bool:
    """Whether it is in a store."""
    return os.fspath(place).startswith(_SCHEME)


@functools.cache
def _filesystem() -> Any:
    """gcsfs, which remembers no listings: other processes write, too.

    Raises:
      ValueError: it is not installed.
    """
    import fsspec
    from fsspec.config import conf

    try:
        fsspec.get_filesystem_class("gcs")
    except ImportError as error:
        raise ValueError(f"{_SCHEME}... needs gcsfs: pip install -e '.[gcs]' ({error}).") from error
    conf.setdefault("gcs", {})["use_listings_cache"] = False  # for etils' own instance as well
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it would say with a traceback what it raises
    return fsspec.filesystem("gcs")


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """What gcsfs, aiohttp and google-auth raise, as an OSError in a line."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise OSError(_line(error)) from error


def _line(error: Exception) -> str:
    kind = "" if isinstance(error, OSError) and str(error) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(str(error).split()):.300}"


def said(error: Exception) -> str | None:
    """An error of gcsfs, aiohttp, requests or google-auth in a line; None of all others."""
    package = type(error).__module__.partition(".")[0]
    return f"Google Cloud Storage: {_line(error)}" if package in ("gcsfs", "aiohttp", "requests", "google") else None


def kvstore(directory: Path) -> Any:
    """TensorStore's view of a directory in a store: reads, and writes that have a condition."""
    import tensorstore as ts

    bucket, _, inside = os.fspath(directory).removeprefix(_SCHEME).partition("/")
    return ts.KvStore.open({"driver": "gcs", "bucket": bucket, "path": f"{inside}/" if inside else ""}).result()


def check(place: Path) -> None:
    """Raises ValueError where a place in a store cannot be read, for want of a bucket, rights or credentials."""
    if not is_remote(place):
        return
    bucket, _, inside = os.fspath(place / ".lock").removeprefix(_SCHEME).partition("/")
    print(f"{place}: asking the store, which takes up to a minute where it cannot be reached", flush=True)
    try:
        with _explained():
            _filesystem().find(bucket, prefix=inside)  # of a bucket that is not there an error, of an empty one none
        kvstore(place).read(".lock").result()  # TensorStore finds credentials by itself
    except (OSError, ValueError) as error:
        reason = str(error).partition(" [")[0].strip()[:300]
        raise ValueError(
            f"{place} cannot be used: the bucket {bucket!r} is not there, or may not be read, or there are no "
            f"credentials (`gcloud auth application-default login`): {reason}"
        ) from error


def make_directory(directory: Path) -> None:
    """A directory, and those above it, on disk; nothing in a store, where names alone make them."""
    if not is_remote(directory):
        directory.mkdir(parents=True, exist_ok=True)


def probe(directory: Path) -> None:
    """Raises OSError where no file can be made there."""
    if not is_remote(directory):
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".writable-"):
            return
    file = directory / f".writable-{uuid.uuid4().hex}"
    write(file, b"")
    remove([file])


def write(file: Path, content: bytes) -> None:
    """A whole file or none of it; it is there, whatever happens, when this returns.

    Raises:
      OSError: it cannot be written.
    """
    if is_remote(file):
        with _explained():
            _filesystem().pipe_file(os.fspath(file), content)
        return
    part = file.with_name(file.name + ".part")
    with part.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    part.replace(file)


def create(file: Path, content: bytes) -> bool:
    """A whole file of a store, where there is none; whether that is what is there now. OSError: it cannot be."""
    with _explained():
        try:
            _filesystem().pipe_file(os.fspath(file), content, mode="create")
        except FileExistsError:  # which may be ours, where an answer was lost and gcsfs asked again
            return read_all([file]) == [content]
    return True


def stamped(file: Path) -> tuple[bytes | None, bytes]:
    """Content of a file in a store, None where there is none, and the stamp of it: each writing gives it another.

    Raises:
      OSError: it cannot be read.
    """
    with _explained():
        found = kvstore(file.parent).read(file.name).result(timeout=_ANSWER)
    return found.value if found.state == "value" else None, found.stamp.generation


def is_still(file: Path, stamp: bytes) -> bool:
    """Whether what is there of a file in a store has this stamp, without reading it; OSError where that is not said."""
    with _explained():
        found = kvstore(file.parent).read(file.name, if_not_equal=stamp).result(timeout=_ANSWER)
    return found.state == "unspecified"


def overwrite(file: Path, content: bytes, stamp: bytes) -> bytes | None:
    """A whole file of a store, in place of what has this stamp, and its own; None: something else is there.

    Raises:
      OSError: it cannot be written.
    """
    with _explained():
        written = kvstore(file.parent).write(file.name, content, if_equal=stamp).result(timeout=_ANSWER)
    if written.generation:
        return written.generation
    found, now = stamped(file)  # which may be ours, where an answer was lost and TensorStore asked again
    return now if found == content else None


def read_all(files: Iterable[Path]) -> list[bytes | None]:
    """Contents of files in a store, many at a time; None of one that is not there (any more).

    Raises:
      OSError: one cannot be read.
    """
    names = [os.fspath(file) for file in files]
    if not names:
        return []
    with _explained():
        found = _filesystem().cat(names, on_error="return")
        held = [found[name.removeprefix(_SCHEME)] for name in names]
        for content in held:
            if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
                raise content
    return [content if isinstance(content, bytes) else None for content in held]


def size(file: Path) -> int:
    """Bytes of a file in a store; OSError where there is none."""
    with _explained():
        return int(_filesystem().info(os.fspath(file))["size"])


def read_range(file: Path, start: int, end: int) -> bytes:
    """Bytes from `start` up to `end` of a file in a store; OSError where it cannot be read."""
    with _explained():
        return _filesystem().cat_file(os.fspath(file), start=start, end=end) if end > start else b""


def remove(files: Iterable[Path]) -> None:
    """Files of a store, in any order; one that is not there is no error, else OSError."""
    if names := [os.fspath(file) for file in files]:
        with _explained(), contextlib.suppress(FileNotFoundError):
            _filesystem().rm(names)


def remove_tree(directory: Path) -> None:
    """A directory and all that is in it, where there is one; of a store OSError where it cannot be."""
    if not is_remote(directory):
        shutil.rmtree(directory, ignore_errors=True)
        return
    with _explained():
        remove([epath.Path(_SCHEME + name) for name in _filesystem().find(os.fspath(directory))])


def copy(source: Path, target: Path) -> None:
    """One file, from anywhere to anywhere; OSError where it cannot be."""
    with _explained():
        if not is_remote(source) and not is_remote(target):
            shutil.copyfile(source, target)
        elif is_remote(source) and is_remote(target):
            _filesystem().cp_file(os.fspath(source), os.fspath(target))
        elif is_remote(target):
            _filesystem().put_file(os.fspath(source), os.fspath(target))
        else:
            _filesystem().get_file(os.fspath(source), os.fspath(target))


def move(source: Path, target: Path) -> None:
    """A file or directory, within one file system or store; OSError where it cannot be.

    In a store everything is copied, there, and then removed: what is killed in between has both, or leaves a rest.
    """
    if not is_remote(source):
        pathlib.Path(source).rename(target)
        return
    with _explained():
        found, inside = _filesystem().find(os.fspath(source)), os.fspath(source).removeprefix(_SCHEME)
        for name in found:
            _filesystem().cp_file(name, os.fspath(target) + name.removeprefix(inside))
        remove([epath.Path(_SCHEME + name) for name in found])


@contextlib.contextmanager
def _on_disk(file: Path) -> Iterator[pathlib.Path]:
    """The file, or in place of one in a store a name on disk, for as long as that is needed."""
    if not is_remote(file):
        yield pathlib.Path(file)
        return
    with tempfile.TemporaryDirectory(prefix="grpo_jax_") as scratch:
        yield pathlib.Path(scratch, file.name)


@contextlib.contextmanager
def written(file: Path) -> Iterator[pathlib.Path]:
    """For those who write files by their names alone: the file, or one on disk that is copied into the store."""
    with _on_disk(file) as local:
        yield local
        if is_remote(file):
            copy(local, file)


@contextlib.contextmanager
def fetched(file: Path) -> Iterator[pathlib.Path]:
    """For those who read files by their names alone: the file, or a copy on disk of one in a store."""
    with _on_disk(file) as local:
        if is_remote(file):
            copy(file, local)
        yield local


def upload(source: pathlib.Path, target: Path) -> None:
    """Every file of a directory on disk, into one of a store; OSError where it cannot be."""
    for file in sorted(source.rglob("*")):
        if file.is_file():
            copy(file, target / file.relative_to(source).as_posix())

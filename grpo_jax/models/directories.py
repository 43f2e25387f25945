"""Directories of files that are written as one: models and adapters, on disk or in an object store."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

from safetensors import SafetensorError

from grpo_jax import storage
from grpo_jax.models.families import PretrainedError
from grpo_jax.storage import Path

__all__ = ["made"]


def _check_new(directory: Path) -> None:
    """Raises PretrainedError where there is something already."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise PretrainedError(f"{directory} is there already: name a new directory, or move the old one away.")


@contextlib.contextmanager
def made(directory: Path) -> Iterator[Path]:
    """Where to write the files of a directory: all of them, durable, are in their place at the end, or none is.

    On disk they are written beside it and then renamed. In a store nothing is renamed: they are written in their place,
    and the one without which the others are nothing must come last.

    Raises:
      PretrainedError: there is something already, or they cannot be written.
    """
    _check_new(directory)
    remote = storage.is_remote(directory)
    part = directory if remote else directory.with_name(directory.name + ".part")
    try:
        storage.remove_tree(part)
        storage.make_directory(part)
        yield part
        if not remote:
            files = list(pathlib.Path(part).iterdir())
            mode = max(file.stat().st_mode for file in files)
            for path in files:
                path.chmod(mode)  # safetensors writes for its owner alone
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
            part.replace(directory)  # an empty directory gives way
    except (OSError, SafetensorError) as error:
        try:
            storage.remove_tree(part)
            left = "Nothing of it is left."
        except OSError:
            left = f"What is left in {part} could not be removed: remove it before you write there again."
        raise PretrainedError(f"cannot write {directory}: {error}. {left}") from error
    finally:
        if not remote:
            storage.remove_tree(part)

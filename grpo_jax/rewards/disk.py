"""What a program's files take of the host's disk, where it has no file system of its own, and how they are removed.

For `confined.py` and `worker.py`. That it is looked at, and not refused by the kernel, lets a program go beyond it
between two looks.
"""

import contextlib
import os
import stat
from collections.abc import Iterator

__all__ = ["DEPTH", "ENTRIES", "empty", "is_over", "removed"]

ENTRIES = 1000  # files and directories of a program
DEPTH = 100  # directories in one another


def is_over(directory: str, mib: int) -> bool:
    """Whether there are more files below a directory, or larger ones together, than a program may have.

    It may move and remove directories while one looks. One that was opened stays readable wherever it is now; what has
    gone before is not counted in this look, and will be in another. One that cannot be opened hides something.
    """
    size, entries = 0, 0
    try:
        for found in _all_below(directory):
            # Some systems set aside a little more than was written, and `fallocate` may set aside much.
            taken = found.st_blocks << 9
            size += taken if taken > 2 * found.st_size + (1 << 20) else min(taken, found.st_size)
            entries += 1
            if size > mib << 20 or entries > ENTRIES:
                return True
    except OSError:
        return True
    return False


def _all_below(directory: str, inside: int | None = None, depth: int = 0) -> Iterator[os.stat_result]:
    """Every file and directory; raises OSError where it may not look, or where there are too many in one another.

    `inside`: a descriptor of the directory that it lies in. An open one stays that of the same, wherever it is moved.
    """
    if depth > DEPTH:
        raise OSError(f"more than {DEPTH} directories in one another")
    place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=inside)
    try:
        for name in os.listdir(place):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # it has gone
                found = os.stat(name, dir_fd=place, follow_symlinks=False)
                yield found
                if stat.S_ISDIR(found.st_mode):
                    yield from _all_below(name, place, depth + 1)
    finally:
        os.close(place)


def empty(directory: str) -> None:
    """Removes what is in a directory, however deep and however it is protected; nobody else writes there any more."""
    os.chmod(directory, stat.S_IMODE(os.stat(directory).st_mode) | 0o700)
    while found := list(os.scandir(directory)):
        for entry in found:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, 0o700)
            for inner in list(os.scandir(entry.path)):
                if inner.is_dir(follow_symlinks=False):
                    os.chmod(inner.path, 0o700)
                    os.rename(inner.path, f"{directory}/{os.urandom(16).hex()}")  # here no path is ever long
                else:
                    os.unlink(inner.path)
            os.rmdir(entry.path)


def removed(directory: str) -> str:
    """Removes a directory and what is in it; says so where it stays, and why, and else nothing."""
    try:
        empty(directory)
        os.rmdir(directory)
    except OSError as error:
        return f"{directory} stays: {error}\n"
    return ""

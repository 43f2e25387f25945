"""What a program's files take of the host's disk, where it has no file system of its own.

For `confined.py`. That it is looked at, and not refused by the kernel, lets a program go beyond it between two looks.
"""

import contextlib
import os

__all__ = ["ENTRIES", "empty", "is_over"]

ENTRIES = 1000  # files and directories of a program
_LOOKS = 20  # at what moves meanwhile


def is_over(directory: str, mib: int) -> bool:
    """Whether there are more files below a directory, or larger ones together, than a program may have.

    It may move directories while one looks, so that what is in them is not found; who does so all the time is over.
    """
    for _ in range(_LOOKS):
        try:
            return _looked(directory, mib << 20)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            break  # not to be listed, or deeper than a path can say, and all the same a place for files
    return True


def _looked(directory: str, most: int) -> bool:
    """One look at everything; raises OSError where a directory is gone, or cannot be looked at."""
    size, entries, places = 0, 0, [directory]
    while places:
        with os.scandir(places.pop()) as found:
            for entry in found:
                with contextlib.suppress(FileNotFoundError):
                    stat = entry.stat(follow_symlinks=False)
                    size += min(stat.st_blocks << 9, stat.st_size)  # some systems set aside more than was written
                entries += 1
                if size > most or entries > ENTRIES:
                    return True
                if entry.is_dir(follow_symlinks=False):
                    places.append(entry.path)
    return False


def empty(directory: str) -> None:
    """Removes what is in a directory, however deep and however it is protected; nobody else writes there any more."""
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

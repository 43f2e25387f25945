"""A lock in an object store: an object that its holder renews, and that nobody else writes unless it stands still.

A store has no locks that end with a process. So the holder writes the object anew every `RENEWAL` seconds, and another
process takes it over where it has not changed for `PATIENCE` seconds by that process's own monotonic clock: no clock is
compared with another's. Every write has the condition that the object is still the one that was read, which the store
checks, so that of two processes one gets it. A holder that was frozen for so long finds that another has taken it, and
is ended at once: what it would still write would be into the other's run.
"""

import atexit
import contextlib
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from grpo_jax import storage
from grpo_jax.storage import Path

__all__ = ["PATIENCE", "RENEWAL", "InUse", "Lease"]

RENEWAL = 15.0  # seconds from one writing of the object to the next
PATIENCE = 45.0  # seconds without a change after which its holder counts as gone
_ANSWER = 20.0  # seconds that a renewal waits for an answer: TensorStore by itself asks again for many minutes
_GOODBYE = 5.0  # and that the end of the process waits for one, twice at most


class InUse(Exception):
    """Another process holds it; says what is known of it."""


def _end(why: str) -> None:
    """As a kill would, which a run survives: nothing else is written."""
    print(f"error: {why}", file=sys.stderr, flush=True)
    os._exit(1)


class Lease:
    """What one process holds until it ends, or `release`."""

    def __init__(
        self, path: Path, about: dict[str, Any], *, say: Callable[[str], None] = print,
        lost: Callable[[str], None] = _end, renewal: float | None = None, patience: float | None = None,
    ):  # fmt: skip
        """Takes the lease; where there is one already, once it has stood still for `patience`.

        Args:
          path: of the object.
          about: the holder, for those who find it held.
          say: gets a line where it is waited for.
          lost: gets a line when another process has taken it.
          renewal: in place of `RENEWAL`, in seconds; patience: in place of `PATIENCE`.

        Raises:
          InUse: it changes, or another was faster.
          TimeoutError: the store does not answer.
          ValueError: of TensorStore, why it cannot be read or written.
        """
        self._renewal, patience = renewal or RENEWAL, patience or PATIENCE
        self._path, self._about, self._lost, self._beat = path, {**about, "token": secrets.token_hex(8)}, lost, 0
        self._process = os.getpid()
        self._store, self._ended, self._lock = storage.kvstore(path.parent), threading.Event(), threading.Lock()
        found, since = self._read(), time.monotonic()
        if found.state == "value":
            say(f"{path} is of {owner(found.value)}: watching for up to {patience:.0f} s whether that still runs")
        while found.state == "value" and (left := since + patience - time.monotonic()) > 0:
            time.sleep(min(left, self._renewal / 10))
            before, found = found, self._read()
            if found.state == "value" and found.stamp.generation != before.stamp.generation:
                raise InUse(owner(found.value))
        self._generation = found.stamp.generation
        if not self._write():
            raise InUse(owner(self._read().value))
        atexit.register(self.release)
        threading.Thread(target=self._renew, name="lease", daemon=True).start()

    def _read(self) -> Any:
        return self._store.read(self._path.name).result(timeout=_ANSWER)

    def _write(self) -> bool:
        """Whether the object was still as we know it, and is now what we say; what was late may be repeated."""
        said = json.dumps({**self._about, "beat": self._beat}) + "\n"
        written = self._store.write(self._path.name, said.encode(), if_equal=self._generation).result(timeout=_ANSWER)
        if not written.generation:  # it is another; or ours, where an answer was lost and TensorStore asked again
            read = self._read()
            if read.state != "value" or read.value != said.encode():
                return False
            written = read.stamp
        self._generation, self._beat = written.generation, self._beat + 1
        return True

    def _renew(self) -> None:
        while not self._ended.wait(self._renewal):
            with self._lock:
                if self._ended.is_set():
                    return
                try:
                    held = self._write()
                except Exception:  # no network: a later renewal will see whether it was taken meanwhile
                    continue
            if not held:
                self._ended.set()
                who = owner(b"")
                with contextlib.suppress(Exception):  # only to say it: who has it is not why it ends
                    who = owner(self._read().value)
                self._lost(f"{self._path} has been taken over by {who}, while this process stood still: it ends here.")
                return

    @property
    def held(self) -> bool:
        """Whether it is ours as far as we know."""
        return not self._ended.is_set()

    def release(self) -> None:
        """Removes the object, if it is ours still, and the store answers within seconds; else it will stand still."""
        if os.getpid() != self._process or self._ended.is_set():  # a child that was forked, maybe while it was locked
            return
        self._ended.set()
        atexit.unregister(self.release)
        locked = self._lock.acquire(timeout=_GOODBYE)  # a renewal is being written
        try:
            if not locked:
                raise TimeoutError
            self._store.write(self._path.name, None, if_equal=self._generation).result(timeout=_GOODBYE)
        except Exception as error:
            why = f"{error!s:.300}" or f"the store has not answered within {_GOODBYE:g} s"
            print(f"{self._path} could not be removed: {why}", file=sys.stderr, flush=True)
        finally:
            if locked:
                self._lock.release()


def owner(content: bytes) -> str:
    """Who the object says it is."""
    try:
        said = json.loads(content)
        return f"process {said['pid']} on {said['host']}, since {said['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"

"""The lock of a workdir in a store: of two processes one has it, and it outlives its holder by a moment alone."""

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from grpo_jax import leases
from grpo_jax.leases import InUse, Lease
from tests import object_store

pytest.importorskip("gcsfs")
ROOT = pathlib.Path(__file__).parent.parent
HOLDER = """
import sys
from grpo_jax import leases, storage
from grpo_jax.locks import lock
leases.RENEWAL, leases.PATIENCE, leases._GOODBYE = 0.2, 1.0, 0.5
lock(storage.path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def bucket():
    with object_store.opened() as opened:
        yield opened


def holding(workdir) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLDER, str(workdir)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def lease(workdir, **options):
    about = {"pid": os.getpid(), "host": "here", "since": "now"}
    return Lease(workdir / ".lock", about, **{"renewal": 0.2, "patience": 1.0, "say": lambda line: None, **options})


def test_it_is_refused_while_its_holder_lives_and_taken_over_when_it_was_killed_but_not_at_once(bucket):
    _, place = bucket
    workdir, said = place / "killed", []
    holder = holding(workdir)
    started = time.monotonic()
    with pytest.raises(InUse, match=f"process {holder.pid} on "):
        lease(workdir, say=said.append)
    assert time.monotonic() - started < 0.9  # as soon as it changes
    assert f"is of process {holder.pid} on " in said[0]
    holder.kill()
    holder.wait()
    started = time.monotonic()
    ours = lease(workdir)
    assert 0.9 < time.monotonic() - started < 3
    ours.release()


def test_a_clean_end_gives_it_back_and_a_frozen_holder_that_lost_it_ends_itself(bucket):
    store, place = bucket
    workdir = place / "frozen"
    holder = holding(workdir)
    holder.communicate("")
    assert store.files("bucket", "frozen/") == {}
    holder = holding(workdir)
    os.kill(holder.pid, signal.SIGSTOP)
    ours = lease(workdir)
    os.kill(holder.pid, signal.SIGCONT)
    assert holder.wait(timeout=10) == 1
    assert holder.stderr is not None
    assert f"has been taken over by process {os.getpid()} on here" in holder.stderr.read()
    assert json.loads(store.files("bucket", "frozen/")[".lock"])["pid"] == os.getpid()  # and it left ours alone
    ours.release()
    assert store.files("bucket", "frozen/") == {}


def test_one_that_was_taken_over_is_told_so_and_leaves_the_other_alone(bucket):
    store, place = bucket
    lost, told = [], threading.Event()
    ours = lease(place / "told", lost=lambda why: (lost.append(why), told.set()))
    store.put("bucket", "told/.lock", b'{"pid": 7, "host": "there", "since": "then"}', {})
    assert told.wait(5)
    assert "has been taken over by process 7 on there" in lost[0]
    assert not ours.held
    ours.release()
    assert store.files("bucket", "told/")[".lock"].startswith(b'{"pid": 7')


def test_it_is_lost_also_where_nobody_can_say_to_whom(bucket, monkeypatch):
    store, place = bucket
    lost, told, reads = [], threading.Event(), itertools.count()
    ours = lease(place / "whose", lost=lambda why: (lost.append(why), told.set()))
    store.put("bucket", "whose/.lock", b'{"pid": 7, "host": "there", "since": "then"}', {})

    def once(method, name):
        if (method, name) == ("GET", "whose/.lock") and next(reads):
            raise object_store.Refused(403, "no rights")

    monkeypatch.setattr(store, "before", once)
    assert told.wait(5)
    assert "has been taken over by another process" in lost[0]
    assert not ours.held


def test_a_store_that_does_not_answer_keeps_no_process_from_its_end(bucket, monkeypatch):
    store, place = bucket
    holder = holding(place / "silent")

    def outage(method, name):
        raise object_store.Refused(503)

    monkeypatch.setattr(store, "before", outage)
    started = time.monotonic()
    _, said = holder.communicate("", timeout=30)
    assert time.monotonic() - started < 10
    assert holder.returncode == 0
    assert "silent/.lock could not be removed: the store has not answered within 0.5 s" in said
    monkeypatch.undo()
    # Nor does a child wait that was forked while a renewal was under way: of its lock nobody would let go.
    ours = lease(place / "forked")
    with ours._lock, monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: -1)
        started = time.monotonic()
        ours.release()
        assert time.monotonic() - started < 1
    assert ours.held
    ours.release()
    assert store.files("bucket", "forked/") == {}


def test_of_two_that_would_take_it_over_one_does(bucket):
    store, place = bucket
    store.put("bucket", "both/.lock", b"{}", {})
    got, refused = [], []

    def one():
        try:
            got.append(lease(place / "both"))
        except InUse:
            refused.append(True)

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 2)
    got[0].release()


def test_an_outage_and_an_answer_that_is_lost_take_it_from_nobody(bucket, monkeypatch):
    store, place = bucket
    lost, lose = [], iter([True])

    def answer(method, name):
        if next(lose, False):  # TensorStore asks again, and finds that the object is another than it was
            raise object_store.Refused(503)

    def outage(method, name):
        raise object_store.Refused(next(statuses))

    statuses = itertools.cycle([503, 403])  # one that TensorStore asks again after, and one that it does not
    monkeypatch.setattr(leases, "_ANSWER", 0.5)

    ours = lease(place / "outage", lost=lost.append)
    beat = lambda: json.loads(store.files("bucket", "outage/")[".lock"])["beat"]
    monkeypatch.setattr(store, "after", answer)
    until(lambda: beat() >= 3)
    monkeypatch.setattr(store, "before", outage)
    time.sleep(2.0)
    monkeypatch.setattr(store, "before", lambda method, name: None)
    before = beat()
    until(lambda: beat() > before)
    assert ours.held
    assert not lost
    ours.release()


def until(true):
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_it_outlives_its_holder_by_less_than_a_minute():
    assert 2 * leases.RENEWAL <= leases.PATIENCE < 60

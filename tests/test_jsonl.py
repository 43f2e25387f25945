"""JSON lines in a store: whatever is cut off, what is read is what was there, or a beginning of what was to go."""

import itertools
import json

import pytest

from grpo_jax import storage
from grpo_jax.jsonl import OtherRunError, open_lines, read_jsonl
from tests import object_store

pytest.importorskip("gcsfs")


class Cut(BaseException):
    """The process is killed: nothing of ours catches it."""


def row(step):
    return {"step": step, "text": "é\n" * (step % 3)}


def steps(path):
    rows = read_jsonl(path)
    assert rows == [row(r["step"]) for r in rows]
    return [r["step"] for r in rows]


@pytest.fixture(scope="module")
def bucket():
    with object_store.opened() as opened:
        yield opened


def everything(row):
    return True


def before(row, step):
    return row["step"] < step


def killed_at(number, monkeypatch, operation):
    """Runs `operation`, killed before its write or removal of that number; whether it came to its end."""
    done = itertools.count()
    overwrite, create, remove = storage.overwrite, storage.create, storage.remove

    def once():
        if next(done) == number:
            raise Cut

    def writing(*arguments):
        once()
        return overwrite(*arguments)

    def creating(*arguments):
        once()
        return create(*arguments)

    def removing(files):
        for file in files:
            once()
            remove([file])

    with monkeypatch.context() as patched:
        patched.setattr(storage, "overwrite", writing)
        patched.setattr(storage, "create", creating)
        patched.setattr(storage, "remove", removing)
        try:
            operation()
        except Cut:
            return False
    return True


def test_rows_are_there_when_append_returns_or_flush_and_are_one_object_when_closed(bucket):
    store, place = bucket
    path = place / "a" / "rows.jsonl"
    assert read_jsonl(path) == []
    assert store.files("bucket", "a/") == {}
    lines = open_lines(path, everything)
    lines.append(row(0), durable=True)
    assert steps(path) == [0]
    lines.append(row(1))
    lines.append(row(2))
    assert steps(path) == [0]  # it waits, and costs nothing
    lines.flush()
    assert steps(path) == [0, 1, 2]
    parts = ["rows.jsonl.parts/000000000", "rows.jsonl.parts/000000001"]
    assert sorted(store.files("bucket", "a/")) == ["rows.jsonl", *parts]
    lines.close()
    assert list(store.files("bucket", "a/")) == ["rows.jsonl"]
    assert store.files("bucket", "a/")["rows.jsonl"].decode() == "".join(json.dumps(row(i)) + "\n" for i in range(3))
    written = len([method for method, _ in store.asked if method != "GET"])
    open_lines(path, everything).close()  # opened, it is another's
    assert len([method for method, _ in store.asked if method != "GET"]) == written + 1


def test_opened_as_after_a_kill_at_every_moment(bucket, monkeypatch):
    """A run of 3 rows, one of 7 in parts of two, then cut back to `to` and closed: killed at each write and removal."""
    store, place = bucket
    for to in (0, 2, 3, 4, 6, 7):
        for number in itertools.count():
            path = place / f"b{to}.{number}" / "rows.jsonl"
            first = open_lines(path, everything)
            for i in range(3):
                first.append(row(i), durable=True)
            first.close()
            second = open_lines(path, everything)
            for i in range(3, 7):
                second.append(row(i), durable=i % 2 == 0)

            def cut(path=path, to=to):
                lines = open_lines(path, lambda r: before(r, to))
                lines.append(row(to), durable=True)
                lines.append(row(to + 1), durable=True)
                lines.close()

            ended = killed_at(number, monkeypatch, cut)
            found = steps(path)
            assert found == list(range(len(found)))
            assert len(found) >= to
            # Whatever was left, the next start cuts it back, and its own rows follow.
            cut()
            assert steps(path) == list(range(to + 2))
            assert list(store.files("bucket", f"b{to}.{number}/")) == ["rows.jsonl"]
            if ended:
                break
        assert number >= 4


def test_a_damaged_line_and_a_lost_part_end_what_is_read(bucket):
    store, place = bucket
    path = place / "c" / "rows.jsonl"
    lines = open_lines(path, everything)
    for i in range(5):
        lines.append(row(i), durable=True)
    store.delete("bucket", "c/rows.jsonl.parts/000000003", {})
    assert steps(path) == [0, 1, 2]
    store.put("bucket", "c/rows.jsonl.parts/000000001", b'{"step": 1, "te', {})
    assert steps(path) == [0]


def test_read_while_parts_become_one_it_is_whole(bucket, monkeypatch):
    """The object is read, and before its parts are, they have become one with it."""
    store, place = bucket
    path, closed = place / "d" / "rows.jsonl", []
    lines = open_lines(path, everything)
    for i in range(5):
        lines.append(row(i), durable=True)
    read_all = storage.read_all

    def meanwhile(files):
        if not closed:
            closed.append(lines)
            lines.close()
        return read_all(files)

    monkeypatch.setattr(storage, "read_all", meanwhile)
    assert steps(path) == [0, 1, 2, 3, 4]
    assert closed
    assert list(store.files("bucket", "d/")) == ["rows.jsonl"]


@pytest.mark.parametrize("how", ["append", "append late", "close", "close late"])
def test_one_that_was_frozen_changes_nothing_of_what_another_has_written_since(bucket, how, monkeypatch):
    """Late: it was frozen between its last look and its write."""
    _, place = bucket
    path, end = place / "e" / how / "rows.jsonl", 3 if how == "append" else 5  # the next part's number is free, or not
    frozen = open_lines(path, everything)
    for i in range(3):
        frozen.append(row(i), durable=True)
    other = []

    def thaw():
        if not other:
            other.append(open_lines(path, lambda r: before(r, 1)))
            for i in range(1, end):
                other[0].append({"step": i, "text": "another's"}, durable=True)

    if how.endswith("late"):
        name = {"append late": "create", "close late": "overwrite"}[how]
        write = getattr(storage, name)
        monkeypatch.setattr(storage, name, lambda *arguments: (monkeypatch.undo(), thaw(), write(*arguments))[-1])
    else:
        thaw()
    with pytest.raises(OtherRunError, match=r"another run has written gs://bucket/e/.*/rows\.jsonl"):
        frozen.append(row(3), durable=True) if how.startswith("append") else frozen.close()
    with pytest.raises(OtherRunError):
        frozen.close()
    assert [r["text"] for r in read_jsonl(path)] == [row(0)["text"], *["another's"] * (end - 1)]
    other[0].append(row(end), durable=True)
    other[0].close()
    assert [r["step"] for r in read_jsonl(path)] == list(range(end + 1))


def test_an_answer_that_is_lost_is_no_other_run(bucket, monkeypatch):
    store, place = bucket
    path, lost = place / "f" / "rows.jsonl", []

    def lose(method, name):
        if name and name not in lost:
            lost.append(name)
            raise object_store.Refused(503)

    monkeypatch.setattr(store, "after", lose)
    lines = open_lines(path, everything)
    lines.append(row(0), durable=True)
    lost.remove("f/rows.jsonl")
    lines.close()
    assert lost == ["f/rows.jsonl.parts/000000000", "f/rows.jsonl"]
    assert steps(path) == [0]

"""What counts as a program's on the disk; `test_rewards_hostile.py` has programs that write too much."""

import ctypes
import os

import pytest

from grpo_jax.rewards import disk


def test_what_all_files_take_is_bounded(tmp_path):
    assert not disk.is_over(str(tmp_path), 2)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "first").write_bytes(b"x" * (1 << 20))
    (tmp_path / "a" / "b" / "second").write_bytes(b"x" * (1 << 19))
    assert not disk.is_over(str(tmp_path), 2)
    (tmp_path / "a" / "third").write_bytes(b"x" * (1 << 20))
    assert disk.is_over(str(tmp_path), 2)
    assert not disk.is_over(str(tmp_path), 3)


def test_their_number_is_bounded(tmp_path):
    (tmp_path / "a").mkdir()
    for number in range(disk.ENTRIES - 1):
        (tmp_path / "a" / str(number)).touch()
    assert not disk.is_over(str(tmp_path), 1)
    (tmp_path / "one more").touch()
    assert disk.is_over(str(tmp_path), 1)


def test_holes_and_what_links_lead_to_are_not_its_own(tmp_path):
    (tmp_path / "outside").write_bytes(b"x" * (2 << 20))
    own = tmp_path / "own"
    own.mkdir()
    (own / "directory").symlink_to(tmp_path)
    (own / "file").symlink_to(tmp_path / "outside")
    (own / "nowhere").symlink_to(tmp_path / "nowhere")
    with open(own / "holes", "wb") as file:
        file.truncate(1 << 30)
    assert not disk.is_over(str(own), 1)


def test_what_fallocate_has_set_aside_counts(tmp_path):
    with open(tmp_path / "empty", "wb") as file:
        keep_size = 1
        if ctypes.CDLL(None).fallocate(file.fileno(), keep_size, ctypes.c_long(0), ctypes.c_long(3 << 20)):
            pytest.skip("this file system sets nothing aside")
    assert disk.is_over(str(tmp_path), 2)


def changing(monkeypatch, change):
    """Something happens each time when a directory has been listed, before what is in it is looked at."""
    listdir = os.listdir

    def listed(fd):
        found = listdir(fd)
        change()
        return found

    monkeypatch.setattr(os, "listdir", listed)


def test_directories_that_come_and_go_hide_nothing(tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    changing(monkeypatch, lambda: temporary.exists() and temporary.rmdir())
    assert not disk.is_over(str(tmp_path), 1)


def test_a_directory_that_is_moved_when_it_is_open_is_seen(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"x" * (2 << 20))
    changing(monkeypatch, lambda: (tmp_path / "a").rename(tmp_path / "b") if looks.append(0) or len(looks) == 2 else 0)
    looks: list[int] = []
    assert disk.is_over(str(tmp_path), 1)
    assert len(looks) == 2


def test_what_may_not_be_seen_is_over(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    assert not disk.is_over(str(tmp_path), 1)
    with monkeypatch.context() as closed:  # root may look everywhere
        closed.setattr(os, "listdir", lambda fd: (_ for _ in ()).throw(PermissionError()))
        assert disk.is_over(str(tmp_path), 1)
    assert disk.is_over(str(tmp_path / "none"), 1)


def test_depth_is_bounded(tmp_path):
    here = tmp_path
    for _ in range(disk.DEPTH):
        here = here / "x"
        here.mkdir()
    assert not disk.is_over(str(tmp_path), 1)
    (here / "x").mkdir()
    before = len(os.listdir("/proc/self/fd"))
    assert disk.is_over(str(tmp_path), 1)
    assert len(os.listdir("/proc/self/fd")) == before


def test_all_is_removed_however_deep(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    own = tmp_path / "own"
    own.mkdir()
    (own / "link").symlink_to(outside)
    here = os.open(own, os.O_RDONLY)
    for name in ["x"] * 1100 + ["y" * 250] * 20:
        os.mkdir(name, dir_fd=here)
        inner = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(os.open("file", os.O_CREAT, 0o000, dir_fd=inner))
        os.chmod(name, 0o300, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    os.chmod(own, 0o300)
    assert disk.removed(str(own)) == ""
    assert not own.exists()
    assert (outside / "kept").exists()


def test_what_stays_is_said(tmp_path):
    assert disk.removed(str(tmp_path / "none")).startswith(f"{tmp_path}/none stays: ")

"""What counts as a program's on the disk; `test_rewards_hostile.py` has programs that write too much."""

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


@pytest.mark.parametrize(
    ("error", "times", "over"),
    [(PermissionError, 1, True), (OSError, 1, True), (FileNotFoundError, 3, False), (NotADirectoryError, 3, False),
     (FileNotFoundError, 1000, True)],
)  # fmt: skip
def test_what_is_not_found_is_looked_for_again(tmp_path, monkeypatch, error, times, over):
    """A directory that has been moved, now and then or all the time; one that cannot be listed hides something."""
    (tmp_path / "a").mkdir()
    scandir, left = os.scandir, [error] * times

    def moved(path):
        if left and path != str(tmp_path):
            raise left.pop()
        return scandir(path)

    monkeypatch.setattr(os, "scandir", moved)
    assert disk.is_over(str(tmp_path), 1) == over


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
    disk.empty(str(own))
    assert list(own.iterdir()) == []
    assert (outside / "kept").exists()

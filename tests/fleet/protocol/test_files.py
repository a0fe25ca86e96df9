"""Files that survive a power cut: whole content, on the medium before its name, and the name on the medium too."""

import os
import stat

import pytest

from fleet.protocol.files import atomic_write, create_exclusive, move_into_place
from tests.fleet.disk import Medium


@pytest.fixture
def medium(monkeypatch):
    return Medium(monkeypatch)


def assert_survives(medium):
    assert (medium.torn, medium.at_risk) == ([], [])


def test_a_file_is_replaced_whole_and_on_the_medium(medium, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    atomic_write(path, "new ü", mode=0o640)
    assert path.read_text() == "new ü"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert_survives(medium)


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "directory"
    (path / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        atomic_write(path, b"new", mode=0o600)
    assert [each.name for each in tmp_path.iterdir()] == ["directory"]


def test_a_file_that_exists_is_not_created_again(medium, tmp_path):
    path = tmp_path / "key"
    create_exclusive(path, b"first", mode=0o600)
    assert_survives(medium)
    with pytest.raises(FileExistsError):
        create_exclusive(path, b"second", mode=0o600)
    assert path.read_bytes() == b"first"
    assert [each.name for each in tmp_path.iterdir()] == ["key"]


def test_a_link_to_nowhere_is_something_that_exists(tmp_path):
    path = tmp_path / "key"
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        create_exclusive(path, b"secret", mode=0o600)
    assert not (tmp_path / "elsewhere").exists()


def test_a_finished_file_is_moved_into_place(medium, tmp_path):
    source, target = tmp_path / "upload", tmp_path / "place" / "file"
    source.write_bytes(b"content")
    target.parent.mkdir()
    move_into_place(source, target)
    assert target.read_bytes() == b"content"
    assert_survives(medium)


def test_a_finished_tree_is_moved_into_place_with_everything_in_it(medium, monkeypatch, tmp_path):
    source, target = tmp_path / "draft", tmp_path / "place"
    (source / "inner").mkdir(parents=True)
    files = [source / "one", source / "inner" / "two"]
    for path in files:
        path.write_bytes(b"content")
    inodes = {path.stat().st_ino for path in (source, source / "inner", *files)}
    real, synced = os.fsync, set()
    monkeypatch.setattr(os, "fsync", lambda number: (synced.add(os.fstat(number).st_ino), real(number)))
    move_into_place(source, target)
    assert inodes <= synced
    assert (target / "inner" / "two").read_bytes() == b"content"
    assert_survives(medium)

"""Files that survive a power cut: whole content, on the medium before its name, and the name on the medium too."""

import errno
import logging
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fleet.protocol.files import (
    atomic_write,
    create_exclusive,
    damage,
    is_full,
    move_into_place,
    remove_leftovers,
    set_aside,
    sync_directory,
)
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


@pytest.fixture
def fat(monkeypatch):
    """A file system that has neither links nor modes, as the boot partition of a device and most USB sticks."""

    def refuse(*_args, **_more):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "fchmod", refuse)


def test_files_on_a_file_system_without_links_and_modes(fat, medium, tmp_path):
    atomic_write(tmp_path / "replaced", "old", mode=0o600)
    atomic_write(tmp_path / "replaced", "new", mode=0o600)
    create_exclusive(tmp_path / "created", b"first", mode=0o600)
    with pytest.raises(FileExistsError):
        create_exclusive(tmp_path / "created", b"second", mode=0o600)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        create_exclusive(tmp_path / "link", b"third", mode=0o600)
    assert {path.name for path in tmp_path.iterdir()} == {"replaced", "created", "link"}
    assert ((tmp_path / "replaced").read_bytes(), (tmp_path / "created").read_bytes()) == (b"new", b"first")
    assert_survives(medium)


@pytest.mark.parametrize("name", ["link", "fchmod"])
def test_other_errors_of_the_file_system_are_not_passed_over(monkeypatch, tmp_path, name):
    def fail(*_args, **_more):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match="Input/output"):
        create_exclusive(tmp_path / "file", b"", mode=0o600)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.json", b"", "empty"),
        ("a.json", b" \n", "empty"),
        ("a.json", b"\0\0", "full of zeros"),
        ("a.json", b'{"a": 1', "cut off"),
        ("a.json", b'{"a": 1}\n', ""),
        ("a.pem", b"-----BEGIN X-----\nabc", "cut off"),
        ("a.pem", b"-----BEGIN X-----\nabc\n-----END X-----\n", ""),
        ("a.toml", b"a = 1", ""),
    ],
)
def test_damage_that_a_power_cut_leaves(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    assert damage(tmp_path / name) == words


def test_what_an_earlier_version_left_half_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "inner").mkdir()
    for name in (".new-abc", "inner/.new-def", "inner/.newer", "new-ghi"):
        (tmp_path / name).write_bytes(b"")
    assert remove_leftovers(tmp_path) == 2
    assert {path.name for path in tmp_path.rglob("*")} == {"inner", ".newer", "new-ghi"}


CUT = """
import os, pathlib, signal, sys
from fleet.protocol.files import atomic_write
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
atomic_write(pathlib.Path(sys.argv[1]), b"half", mode=0o600)
"""


def cut_off(directory):
    """What a process leaves that ends in the middle of writing a file."""
    directory.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-c", CUT, str(directory / "file")], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = (path for path in directory.iterdir() if path.name.startswith(".new-"))
    return left


def after_a_boot(left):
    """The same file, as it was left in the boot before."""
    _, boot, rest = left.name.removeprefix(".").split("-", 2)
    return left.rename(left.with_name(f".new-{'0' * len(boot)}-{rest}"))


def test_what_a_power_cut_left_half_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / ".newer").write_text("kept")
    deep = tmp_path / "deep"
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    for directory in (tmp_path, deep, elsewhere):
        after_a_boot(cut_off(directory))
    (tmp_path / "link").symlink_to(elsewhere)
    assert remove_leftovers(tmp_path, recursive=False) == 1
    assert remove_leftovers(tmp_path) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".newer", "deep", "file", "link"]
    assert list(deep.iterdir()) == []
    assert len(list(elsewhere.iterdir())) == 1
    assert remove_leftovers(tmp_path / "nowhere") == 0


def test_what_another_process_may_be_writing_stays(tmp_path):
    left = cut_off(tmp_path)
    assert remove_leftovers(tmp_path) == 0
    assert left.exists()


def test_a_directory_that_the_kernel_does_not_sync_is_no_error():
    """With a file system of the kernel's own that answers EINVAL, as FUSE and CIFS do."""
    directory = os.open("/proc", os.O_DIRECTORY)
    with pytest.raises(OSError, match="Invalid argument"):
        os.fsync(directory)
    os.close(directory)
    sync_directory(Path("/proc"))


@pytest.fixture
def no_directory_sync(monkeypatch):
    """A file system whose directories cannot be synced, with the error that the test sets."""
    plain, answer = os.fsync, {"errno": errno.EINVAL}

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(answer["errno"], os.strerror(answer["errno"]))
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr("fleet.protocol.files._unsynced", set())
    return answer


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_files_are_stored_where_directories_cannot_be_synced(no_directory_sync, tmp_path, caplog, number):
    no_directory_sync["errno"] = number
    with caplog.at_level(logging.WARNING):
        atomic_write(tmp_path / "a", b"1", mode=0o600)
        create_exclusive(tmp_path / "b", b"2", mode=0o600)
        move_into_place(tmp_path / "b", tmp_path / "c")
        set_aside(tmp_path / "c")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "c.damaged"]
    (said,) = caplog.records
    assert str(tmp_path) in said.getMessage()


def test_a_directory_that_the_medium_does_not_take_is_an_error(no_directory_sync, tmp_path):
    no_directory_sync["errno"] = errno.EIO
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        atomic_write(tmp_path / "a", b"1", mode=0o600)


def test_a_look_for_room_writes_nothing(tmp_path):
    os.utime(tmp_path, (0, 0))
    assert not is_full(tmp_path, 1)
    assert is_full(tmp_path, 1 << 62)
    assert not is_full(tmp_path / "none", 1)
    assert tmp_path.stat().st_mtime == 0


@pytest.mark.parametrize(
    ("blocks", "free", "inodes", "free_inodes", "full"),
    [
        pytest.param(100, 1, 100, 1, False, id="room for one more"),
        pytest.param(100, 0, 100, 1, True, id="no space"),
        pytest.param(100, 1, 100, 0, True, id="no inode"),
        pytest.param(0, 0, 0, 0, False, id="a tmpfs without limits"),
        pytest.param(100, 1, 0, 0, False, id="a btrfs has no number of inodes"),
    ],
)
def test_what_a_file_system_says_of_its_room(monkeypatch, tmp_path, blocks, free, inodes, free_inodes, full):
    figures = (4096, 4096, blocks, free, free, inodes, free_inodes, free_inodes, 0, 255)
    monkeypatch.setattr("os.statvfs", lambda _: os.statvfs_result(figures))
    assert is_full(tmp_path, 4096) == full

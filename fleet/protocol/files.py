"""Files that survive a power cut: replaced whole, created once, moved into place.

Order of every function: write, fsync the file, give it its name, fsync the directory. Without the last step a power cut
may undo a rename although later writes to other files are kept. All functions raise `OSError`.

A file has a temporary name until it is whole, and a power cut leaves it there. That name says in which boot it was
given, so that `remove_leftovers` knows what nobody writes any more, whoever else writes in the same directory.
"""

import contextlib
import errno
import functools
import logging
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Final

log = logging.getLogger("fleet.protocol.files")

RESTORE: Final = (
    "restore this file from a copy, or the whole server from a backup (fleet server backup) with "
    "'fleet server rebuild --backup FILE'"
)
"""Advice about a damaged file of a server that cannot be made anew."""

_TEMPORARY: Final = ".new-"
_ENDS: Final = {".json": b"}", ".pem": b"-----", ".key": b"-----", ".crl": b"-----"}
"""End of a whole text file of ours, by suffix."""

READ_MAX_BYTES: Final = 64 << 20
"""Largest file that is read whole where nothing else is said: the largest component."""

_NO_LINKS: Final = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
_NO_SYNC: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})
"""Errors of fsync on a directory where the file system has no such operation (FUSE, CIFS, 9p)."""

_unsynced: Final[set[int]] = set()
"""Devices of file systems of which has been said that their directories cannot be synced."""

_NO_MODES: Final = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})


def atomic_write(path: Path, data: bytes | str, *, mode: int) -> None:
    """Replace a file: readers and a power cut see the old content or the new one, never a part.

    Args:
        path: the file; its directory exists.
        data: the whole content; text is written as UTF-8.
        mode: permissions of the file, whatever the umask.
    """
    temporary = _write_beside(path, data, mode)
    try:
        temporary.replace(path)
        sync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def create_exclusive(path: Path, data: bytes | str, *, mode: int) -> None:
    """Create a file whole, and leave one that exists as it is.

    Args:
        path: the file; its directory exists.
        data: the whole content; text is written as UTF-8.
        mode: permissions of the file, whatever the umask.

    Raises:
        FileExistsError: something has this name already, a symbolic link included.
    """
    temporary = _write_beside(path, data, mode)
    try:
        # link() fails where the name is taken, and rename() would replace what has it
        os.link(temporary, path, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _take_name(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def _take_name(source: Path, path: Path) -> None:
    """Give a file a free name where the file system has no links (FAT): take the name first, then replace it."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        source.replace(path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def temporary_name(path: Path) -> Path:
    """Return a name beside a file for its next content, until it is whole; no other process is given the same."""
    return path.with_name(f"{_TEMPORARY}{_boot()}-{os.urandom(8).hex()}")


def move_into_place(source: Path, target: Path) -> None:
    """Give a finished file or directory tree its final name in the same file system.

    A file replaces the one that has the name; a directory takes a name that is free, or that of an empty directory.
    """
    if source.is_dir():
        for directory, _, files in os.walk(source):
            for name in files:
                _sync_file(Path(directory) / name)
            sync_directory(Path(directory))
    else:
        _sync_file(source)
    source.replace(target)
    sync_directory(target.parent)


def remove_leftovers(directory: Path, *, recursive: bool = True) -> int:
    """Remove files that a power cut kept from getting their name; return how many.

    Args:
        directory: whose files are written by these functions; one that does not exist has no leftovers.
        recursive: look into the directories below too; links are not followed.
    """
    here = f"{_TEMPORARY}{_boot()}-"
    removed = 0
    for place, below, names in os.walk(directory):
        if not recursive:
            below.clear()
        for name in names:
            if name.startswith(_TEMPORARY) and not name.startswith(here):
                with contextlib.suppress(OSError):  # tidying up is no reason not to start
                    Path(place, name).unlink()
                    removed += 1
    return removed


@functools.cache
def _boot() -> str:
    """Return a word for this boot of the kernel; the same for every boot where the kernel has none."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8")[:8]
    return "0"


def sync_directory(directory: Path) -> None:
    """Bring the names in a directory (files created, renamed, removed) onto the medium.

    Not every file system can (FUSE, CIFS, 9p): there a warning says once that a power cut may undo the newest changes.
    """
    try:
        _sync(directory, os.O_DIRECTORY)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
        device = directory.stat().st_dev
        if device not in _unsynced:
            _unsynced.add(device)
            log.warning(
                "%s: the file system cannot sync directories (%s): a power cut may undo the newest changes",
                directory,
                error.strerror,
            )


def _write_beside(path: Path, data: bytes | str, mode: int) -> Path:
    temporary = temporary_name(path)
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            _set_mode(file.fileno(), mode)
            os.fsync(file.fileno())
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a write to a descriptor names no file
        raise
    return temporary


def _set_mode(descriptor: int, mode: int) -> None:
    """Set a file's mode; a file system without modes (FAT) has those of its mount."""
    try:
        os.fchmod(descriptor, mode)
    except OSError as error:
        if error.errno not in _NO_MODES:
            raise


def damage(path: Path) -> str:
    """Return how a text file of ours is damaged, as after a power cut: `empty`, `full of zeros` ...; empty for whole.

    Raises:
        OSError: it cannot be read.
    """
    data = read(path)
    if not data.strip():
        return "empty"
    if b"\0" in data:
        return "full of zeros"
    end = _ENDS.get(path.suffix, b"")
    return "" if data.rstrip().endswith(end) else "cut off"


def is_full(directory: Path, room_bytes: int) -> bool:
    """Return whether a directory's file system has no room for a new file of this size; quotas of users aside."""
    try:
        found = os.statvfs(directory)
    except OSError:
        return False
    as_root = os.geteuid() == 0  # whom file systems keep a reserve for
    blocks, inodes = (found.f_bfree, found.f_ffree) if as_root else (found.f_bavail, found.f_favail)
    # No number of blocks or inodes: no limit is known (tmpfs, FUSE, btrfs).
    no_space = found.f_blocks > 0 and blocks * found.f_frsize < room_bytes
    return no_space or (found.f_files > 0 and inodes == 0)


def is_read_only(directory: Path) -> bool:
    """Return whether a directory's file system is mounted read-only, or has become so after errors."""
    try:
        return bool(os.statvfs(directory).f_flag & os.ST_RDONLY)
    except OSError:
        return False


_KINDS: Final = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def irregular(path: Path) -> str:
    """Return in words what has the name of a file and is none; empty for a file, a link to one, and nothing.

    Whoever opens a named pipe waits for its other end.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "a link to nowhere" if path.is_symlink() else ""
    except OSError:
        return ""
    return next((words for is_kind, words in _KINDS if is_kind(mode)), "")


def open_descriptor(path: Path, flags: int, mode: int = 0o600, *, special: bool = False) -> int:
    """Open a file, and refuse what is none, without waiting for it: `open` waits for the other end of a named pipe.

    Args:
        path: of the file.
        flags: of `open`.
        mode: permissions of a new file.
        special: take pipes and devices too, as for what a user names to write to.

    Raises:
        OSError: it cannot be opened; with EINVAL, it is no file.
    """
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    except OSError as error:
        # sockets, and pipes that nobody reads, have errors that do not name them
        if error.errno in {errno.ENXIO, errno.EISDIR, errno.ENODEV} and (what := irregular(path)):
            raise _no_file(path, what) from error
        raise
    try:
        if not special and not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _no_file(path, irregular(path) or "no file")  # noqa: TRY301 - closed like after other errors
        os.set_blocking(descriptor, True)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _no_file(path: Path, what: str) -> OSError:
    return OSError(errno.EINVAL, f"it is {what}, not a file", str(path))


def open_to_read(path: Path, *, flags: int = 0) -> BufferedReader:
    """Open a file to read parts of it. Raises `OSError`, also for what is no file, without waiting for it."""
    return os.fdopen(open_descriptor(path, os.O_RDONLY | flags), "rb")


def read(path: Path, *, max_bytes: int = READ_MAX_BYTES) -> bytes:
    """Read a file whole. Raises `OSError`, also for what is no file, or larger, without waiting for it."""
    with open_to_read(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = b"" if size > max_bytes else file.read(max_bytes + 1)
    if max(size, len(data)) > max_bytes:
        raise OSError(errno.EFBIG, f"it has more than {max_bytes} bytes", str(path))
    return data


def read_text(path: Path, *, max_bytes: int = READ_MAX_BYTES) -> str:
    """Read a file of UTF-8 whole, without the mark that editors of Windows put first.

    Raises `UnicodeDecodeError`, and `OSError` as `read` does.
    """
    return read(path, max_bytes=max_bytes).decode("utf-8-sig")


def set_aside(path: Path) -> Path:
    """Move a damaged file, or what has its name, out of the way beside where it was; return where it is now."""
    aside = path.with_name(f"{path.name}.damaged")
    try:
        path.replace(aside)
    except OSError as error:  # a directory does not replace a file, nor a file a directory
        if error.errno not in {errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY}:
            raise
        aside = path.with_name(f"{path.name}.damaged-{os.urandom(4).hex()}")
        path.replace(aside)
    sync_directory(path.parent)
    return aside


def _sync_file(path: Path) -> None:
    if not path.is_symlink():
        _sync(path, os.O_NOFOLLOW)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

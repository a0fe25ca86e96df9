"""Files that survive a power cut: replaced whole, created once, moved into place.

Order of every function: write, fsync the file, give it its name, fsync the directory. Without the last step a power cut
may undo a rename although later writes to other files are kept. All functions raise `OSError`.
"""

import contextlib
import os
import tempfile
from pathlib import Path


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
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


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


def sync_directory(directory: Path) -> None:
    """Bring the names in a directory (files created, renamed, removed) onto the medium."""
    _sync(directory, os.O_DIRECTORY)


def _write_beside(path: Path, data: bytes | str, mode: int) -> Path:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise
    return Path(name)


def _sync_file(path: Path) -> None:
    if not path.is_symlink():
        _sync(path, os.O_NOFOLLOW)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

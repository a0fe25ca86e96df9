"""Doors to a device's disk: each write of the agent and of the host is made here, under its name.

`Write` is the list of what a device persists. A power cut may come before, in or after each of them; the device must
then run the old version or the new one. Tests cut the power at the points that `reached` marks, in a real process, and
have a row for each name: a new write without a row fails.

Files of the kernel (control groups, user namespaces) and of the runtime directory, which a boot empties, are no writes.
"""

import logging
import os
import shutil
import stat
from collections.abc import Callable
from enum import Enum, StrEnum
from pathlib import Path
from typing import IO

from fleet.protocol import files

log = logging.getLogger("agent.disk")


class Write(StrEnum):
    """Each write to the disk of a device, named after its file."""

    # agent, at enrolment and later
    NEW_IDENTITY = "identity.new/"
    NEW_KEY = "identity.new/*.key"
    NEW_FILE = "identity.new/*"
    TOKEN_SPENT = "identity/token.sha256 removed"  # noqa: S105 - a name
    IDENTITY = "identity/"
    IDENTITY_DROPPED = "identity/ removed"
    STATE_DROPPED = "state of an identity removed"
    CERTIFICATE = "identity/device.pem"
    PRODUCTION = "identity/enrolled.json: production"
    MACHINE = "identity/enrolled.json: machine"
    BOOT_TOKEN = "wasmfleet.token erased"  # noqa: S105 - a name
    BOOT_COMMAND = "cmdline.txt without the token"
    MAC_KEY = "identity/mac.key"
    MAC_KEY_DAMAGED = "identity/mac.key set aside"

    # agent, its own
    LOCK = "agent.lock"
    STARTED = "starts.json"
    ENDED = "starts.json removed"
    AGENT_LOG = "log/agent.log"
    AGENT_LOG_TURNED = "log/agent.log.1"
    WAKE = "wake"
    CHECK = "probe of 'fleet-agent check'"
    ARCHIVE = "archive of 'fleet-agent diagnose'"
    METRICS = "text file of 'fleet-agent metrics'"
    LEFTOVERS = "leftovers removed"

    # agent, its database
    STORE_SCHEMA = "store.db: schema"
    STORE_STEP = "store.db: step of a change"
    STORE_SAVED = "store.db: report, committed item or verifier state"
    STORE_FILLED = "store.db: filled from runset.json"
    STORE_ACCEPTED = "store.db: assignment"
    STORE_META = "store.db: sentences and versions"
    STORE_COUNTER = "store.db: number"
    STORE_ACKED = "store.db: reports acknowledged"
    STORE_UNACKED = "store.db: reports sent again"
    STORE_DAMAGED = "store.db set aside"
    RUNSET = "runset.json"

    # agent, messages of components
    READINGS = "readings/*.seg"
    READINGS_REMOVED = "readings/*.seg removed"
    READINGS_DAMAGED = "readings/*.seg removed, cut off at its begin"

    # agent, what is deployed
    PART = "artifacts/*.part"
    PART_DROPPED = "artifacts/*.part removed"
    MARK = "artifacts/*.part.mark"
    MARK_DROPPED = "artifacts/*.part.mark removed"
    ARTIFACT = "artifacts/*.wasm"
    ARTIFACT_AGAIN = "artifacts/*.wasm fetched again"
    ARTIFACT_DAMAGED = "artifacts/*.wasm removed"
    IMAGE = "images/*.cwasm"
    IMAGE_NOTE = "images/*.json"
    IMAGE_DAMAGED = "images/* removed"
    EVICTED = "least recently used file removed"
    BOX = "secrets/*.box"
    BOX_EVICTED = "secrets/*.box removed"
    TRUST = "trust/"
    BUNDLE_FILE = "bundle.new/*"
    BUNDLE_DROPPED = "bundle/ or bundle.new/ removed"
    BUNDLE = "bundle/"
    BUNDLE_VERDICT = "bundle/outcome.json"
    BUNDLE_DONE = "bundle/desired/ removed"
    BUNDLE_ARTIFACT = "bundle/artifacts/* moved"
    DIRECTORY = "directory of the agent's or the host's"

    # host
    UIDS = "uids.json"
    UIDS_DAMAGED = "uids.json removed"
    CRASHES = "crashes.json"
    CRASHES_RENAMED = "deaths.json renamed"
    QUOTA = "written.json"
    INSTANCE_LOG = "logs/*.log"
    INSTANCE_LOG_EVICTED = "logs/* removed"
    DATA = "data/*/"
    DATA_COPIED = "data/*/ of another schema"
    DATA_REMOVED = "data/*/ removed"
    KEYVALUE = "keyvalue/*/"
    KEYVALUE_SAVED = "keyvalue/*/*.db"
    KEYVALUE_COPIED = "keyvalue/*/*.db of another schema"
    KEYVALUE_DAMAGED = "keyvalue/*/*.db set aside"


class Point(Enum):
    """Place in a write at which the power may fail."""

    BEFORE = 1
    MIDDLE = 2
    AFTER = 3


def _nothing(_what: StrEnum, _point: Point, _path: Path, _data: bytes) -> None:
    pass


reached: Callable[[StrEnum, Point, Path, bytes], None] = _nothing
"""Called at each point of a write, with its path and, for a whole file, its new content; tests cut the power here."""


def write(what: Write, path: Path, data: bytes | str, *, mode: int) -> None:
    """Replace a file (see `files.atomic_write`). Raises `OSError`."""
    content = data.encode() if isinstance(data, str) else data
    reached(what, Point.BEFORE, path, content)
    _make_way(path)
    files.atomic_write(path, content, mode=mode)
    reached(what, Point.AFTER, path, content)


def _make_way(path: Path) -> None:
    """Set a directory aside that has the name of a file: a file does not replace it. Raises `OSError`."""
    if path.is_dir() and not path.is_symlink():
        log.warning("%s: it is a directory, not a file: moved to %s", path, files.set_aside(path))


def create(what: Write, path: Path, data: bytes, *, mode: int) -> None:
    """Create a file whole (see `files.create_exclusive`). Raises `FileExistsError` and other `OSError`."""
    reached(what, Point.BEFORE, path, data)
    files.create_exclusive(path, data, mode=mode)
    reached(what, Point.AFTER, path, data)


def move(what: Write, source: Path, target: Path) -> None:
    """Give a finished file or tree its name (see `files.move_into_place`). Raises `OSError`."""
    reached(what, Point.BEFORE, source, b"")
    if not source.is_dir():
        _make_way(target)
    files.move_into_place(source, target)
    reached(what, Point.AFTER, target, b"")


def set_aside(what: Write, path: Path) -> Path:
    """Move a damaged file out of the way (see `files.set_aside`). Raises `OSError`."""
    reached(what, Point.BEFORE, path, b"")
    aside = files.set_aside(path)
    reached(what, Point.AFTER, path, b"")
    return aside


def remove(what: Write, path: Path, *, missing_ok: bool = False) -> None:
    """Remove a file; a power cut may bring it back. Raises `OSError`."""
    reached(what, Point.BEFORE, path, b"")
    path.unlink(missing_ok=missing_ok)
    reached(what, Point.AFTER, path, b"")


def remove_tree(what: Write, path: Path) -> None:
    """Remove a directory with all that is in it, as far as that works; nothing where there is none."""
    if not path.exists():
        return
    reached(what, Point.BEFORE, path, b"")
    shutil.rmtree(path, ignore_errors=True)
    reached(what, Point.AFTER, path, b"")


def remove_leftovers(directory: Path, *, recursive: bool = True) -> int:
    """Remove files that a power cut kept from getting their name (see `files.remove_leftovers`)."""
    reached(Write.LEFTOVERS, Point.BEFORE, directory, b"")
    removed = files.remove_leftovers(directory, recursive=recursive)
    reached(Write.LEFTOVERS, Point.AFTER, directory, b"")
    return removed


def make_directory(what: Write, path: Path, *, mode: int) -> None:
    """Make a directory and those above it, if there is none. Raises `OSError`."""
    if path.is_dir():
        return
    reached(what, Point.BEFORE, path, b"")
    path.mkdir(mode=mode, parents=True, exist_ok=True)
    reached(what, Point.AFTER, path, b"")


def make_fifo(what: Write, path: Path, *, mode: int) -> None:
    """Make a named pipe. Raises `FileExistsError` and other `OSError`."""
    reached(what, Point.BEFORE, path, b"")
    os.mkfifo(path, mode)
    reached(what, Point.AFTER, path, b"")


def open_file(what: Write, path: Path, *, begin: bool) -> IO[bytes]:
    """Open a file that is written part by part: a new one, or to continue; the caller syncs it. Raises `OSError`."""
    reached(what, Point.BEFORE, path, b"")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC if begin else os.O_RDWR
    file = os.fdopen(files.open_descriptor(path, flags, 0o666), "wb" if begin else "r+b")
    reached(what, Point.MIDDLE, path, b"")
    return file


def open_descriptor(what: Write, path: Path, flags: int, mode: int = 0o600) -> int:
    """Open a file of which only the end matters, or nothing: a log, a lock, an archive. Raises `OSError`."""
    reached(what, Point.BEFORE, path, b"")
    # an owner may send an archive through a pipe
    descriptor = files.open_descriptor(path, flags | os.O_CREAT, mode, special=what is Write.ARCHIVE)
    reached(what, Point.AFTER, path, b"")
    return descriptor


def append(what: Write, path: Path, data: bytes, *, begin: bool) -> int:
    """Append to a log, or begin it anew, without waiting for the disk; return the bytes written. Raises `OSError`."""
    reached(what, Point.BEFORE, path, data)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    descriptor = files.open_descriptor(path, flags | (os.O_TRUNC if begin else 0))
    try:
        written = os.write(descriptor, data)
    finally:
        os.close(descriptor)
    reached(what, Point.AFTER, path, data)
    return written


def append_synced(what: Write, path: Path, data: bytes, *, begin: bool) -> None:
    """Append to a file, or begin it anew, and wait until that is on the disk. Raises `OSError`.

    After an error, or a power cut, the file may have some of the bytes at its end.
    """
    reached(what, Point.BEFORE, path, data)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    descriptor = files.open_descriptor(path, flags | (os.O_TRUNC if begin else 0))
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]
        reached(what, Point.MIDDLE, path, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if begin:
        files.sync_directory(path.parent)
    reached(what, Point.AFTER, path, data)


def take_name(what: Write, source: Path, target: Path) -> None:
    """Rename a log, or what is on the medium already. Raises `OSError`."""
    reached(what, Point.BEFORE, source, b"")
    source.replace(target)
    files.sync_directory(target.parent)
    reached(what, Point.AFTER, target, b"")


def probe(what: Write, path: Path) -> None:
    """Write, sync and remove a file of this name. Raises `OSError`."""
    reached(what, Point.BEFORE, path, b"")
    try:
        with path.open("xb") as file:
            file.write(b"\0")
            os.fsync(file.fileno())
        reached(what, Point.MIDDLE, path, b"")
    finally:
        path.unlink(missing_ok=True)
    reached(what, Point.AFTER, path, b"")


def erase(what: Write, path: Path) -> None:
    """Overwrite a file with zeros, in place, and remove it. Raises `OSError`."""
    reached(what, Point.BEFORE, path, b"")
    with path.open("r+b") as file:
        _zero(file)
    reached(what, Point.MIDDLE, path, b"")
    path.unlink()
    reached(what, Point.AFTER, path, b"")


def write_over(what: Write, path: Path, data: str) -> None:
    """Replace a file, and overwrite what it contained with zeros. Raises `OSError`."""
    with path.open("r+b") as before:
        write(what, path, data, mode=stat.S_IMODE(os.fstat(before.fileno()).st_mode))
        _zero(before)


def _zero(file: IO[bytes]) -> None:
    file.seek(0)
    file.write(b"\0" * os.fstat(file.fileno()).st_size)
    file.flush()
    os.fsync(file.fileno())

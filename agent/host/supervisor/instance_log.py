"""Log of an instance: its latest lines in memory, and the newest 4 MiB on the disk, over restarts of everything.

Workers mask secrets before a line leaves them. Lines on the disk have their time in UTC; they are written each tick of
the supervisor, and at once where the host says what went wrong. On a full or broken disk they are lost, and the
instance goes on.
"""

import contextlib
import os
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from agent import disk
from agent.disk import Write
from agent.host.ipc.host_api import plain
from fleet.protocol import bounds, files
from fleet.protocol.bounds import KIB, MIB

_LINE_MAX_CHARS: Final = 1100
FILE_MAX_BYTES: Final = 2 * MIB
"""Size of each of the two files of an instance: once one is full, the other begins anew."""

_ALL_MAX_BYTES: Final = 64 * MIB
_PENDING_MAX_BYTES: Final = 16 * KIB
OLDER: Final = ".1"


class LogFile:
    """Lines of an instance on the disk."""

    def __init__(self, path: Path, files: "LogFiles") -> None:
        both = [path, path.with_name(path.name + OLDER)]
        # the next lines follow the newest: the one that was written last
        self._path, self._other = sorted(both, key=_written_at, reverse=True)
        self._files = files
        self._pending: list[bytes] = []
        self._pending_bytes = 0

    def add(self, line: str, *, urgent: bool) -> None:
        """Keep a line for the next flush, which is now where it is `urgent`."""
        data = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}Z {line}\n".encode(errors="replace")
        self._pending.append(data)
        self._pending_bytes += len(data)
        if urgent or self._pending_bytes >= _PENDING_MAX_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the lines that are kept; those that cannot be written are lost."""
        if not self._pending:
            return
        data, self._pending, self._pending_bytes = b"".join(self._pending), [], 0
        with contextlib.suppress(OSError):
            begins = _size(self._path) + len(data) > FILE_MAX_BYTES
            if begins:
                self._path, self._other = self._other, self._path
            self._files.written_bytes += disk.append(Write.INSTANCE_LOG, self._path, data, begin=begins)


def tail_of(path: Path, most: int) -> tuple[str, ...]:
    """Return the newest lines of both files of an instance, at most `most` bytes; what cannot be read is lost."""
    data = b""
    for each in sorted([path, path.with_name(path.name + OLDER)], key=_written_at, reverse=True):
        with contextlib.suppress(OSError), files.open_to_read(each, flags=os.O_NOFOLLOW) as file:
            size, wanted = os.fstat(file.fileno()).st_size, most + 1 - len(data)
            file.seek(max(0, size - wanted))
            data = file.read(wanted) + data
    if len(data) > most:  # the first line is not whole
        data = data.partition(b"\n")[2]
    return tuple(data.decode(errors="replace").splitlines())


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


def _written_at(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0


class LogFiles:
    """Directory of the instances' logs; those of instances that are gone are kept within a bound.

    Attributes:
        written_bytes: since the host started.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open: set[str] = set()
        self.written_bytes = 0

    def open(self, instance: str) -> LogFile:
        """Return the file of an instance; its directory is made if there is none."""
        self._open.add(instance)
        with contextlib.suppress(OSError):
            disk.make_directory(Write.DIRECTORY, self._directory, mode=0o700)
            self._make_room()
        return LogFile(self._directory / f"{instance}.log", self)

    def excerpt(self, instance: str) -> tuple[str, ...]:
        """Return the newest lines of an instance, whether or not it runs."""
        return tail_of(self._directory / f"{Path(instance).name}.log", bounds.EXCERPT_MAX_BYTES)

    def _make_room(self) -> None:
        """Remove the oldest logs of instances that this host has not run, beyond the bound for all."""
        found = sorted((path.lstat().st_mtime, path, path.lstat().st_size) for path in self._directory.iterdir())
        total = sum(size for _, _, size in found)
        for _, path, size in found:
            if total <= _ALL_MAX_BYTES:
                return
            if path.name.partition(".")[0] not in self._open:
                disk.remove(Write.INSTANCE_LOG_EVICTED, path)
                total -= size


class InstanceLog:
    """Ring buffer of an instance's latest lines, and its file; `count` of all lines since the start."""

    def __init__(self, file: LogFile | None = None) -> None:
        self._log: deque[str] = deque(maxlen=bounds.LOG_LINES)
        self._file = file
        self.count = 0

    def note(self, text: str) -> None:
        """Add a line."""
        line = plain(text, _LINE_MAX_CHARS).replace("\n", " ")
        self._log.append(line)
        self.count += 1
        if self._file is not None:
            self._file.add(line, urgent=line.startswith("host:"))

    def flush(self) -> None:
        """Write what is kept for the file."""
        if self._file is not None:
            self._file.flush()

    def lines(self) -> tuple[str, ...]:
        """Return the last lines, oldest first, within the cap on bytes."""
        kept: list[str] = []
        size = 0
        for line in reversed(self._log):
            size += len(line.encode()) + 1
            if size > bounds.LOG_MAX_BYTES:
                break
            kept.append(line)
        return tuple(reversed(kept))

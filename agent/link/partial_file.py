"""Partial file of a download, with checkpoints: how much of it is known to be on the disk, and its hash up to there.

After a power cut a file may have its length and, near its end, blocks that were never written. What lies beyond the
last checkpoint is then cut off, and the rest of the transfer goes on from there.
"""

import contextlib
import hashlib
import os
import time
from pathlib import Path
from typing import IO, Any, Final, Self

import msgspec

from agent import disk
from agent.disk import Write
from fleet.protocol import bounds, files, wire
from fleet.protocol.bounds import Count

STEP_BYTES: Final = bounds.MIB
STEP_S: Final = 30.0
"""A checkpoint is made after so many bytes, or so much time, and at each end in order."""


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Content of the file beside a partial one."""

    bytes: Count
    sha256: str


class PartialFile:
    """Partial file `path`, and its newest checkpoint in a file beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mark = path.with_name(path.name + ".mark")

    def proven(self) -> int:
        """Cut off what lies beyond the checkpoint, and return what is left; without one, all of it counts.

        Raises:
            OSError: the file cannot be read or written.
        """
        try:
            known = msgspec.json.decode(files.read(self._mark), type=Checkpoint)
        except (OSError, *wire.JSON_ERRORS):
            return self.path.stat().st_size if self.path.is_file() else 0
        try:
            with disk.open_file(Write.PART, self.path, begin=False) as file:
                if _digest(file, known.bytes).hexdigest() == known.sha256:
                    file.truncate(known.bytes)
                    return known.bytes
        except FileNotFoundError:
            pass
        except OSError:
            if not files.irregular(self.path):
                raise
            return 0
        self.remove()
        return 0

    def remove(self) -> None:
        """Remove the file and its checkpoint."""
        self.forget()
        disk.remove(Write.PART_DROPPED, self.path, missing_ok=True)

    def forget(self) -> None:
        """Remove the checkpoint: the file is complete."""
        disk.remove(Write.MARK_DROPPED, self._mark, missing_ok=True)

    def open(self, have: int) -> "Writer":
        """Open the file to continue it after `have` bytes. Raises `OSError`."""
        if not have:
            self.forget()
            if files.irregular(self.path):
                disk.set_aside(Write.PART_DROPPED, self.path)
        return Writer(self.path, self._mark, have)


class Writer:
    """Open partial file that is continued; makes checkpoints, the last when it is closed."""

    def __init__(self, path: Path, mark: Path, have: int) -> None:
        self._file = disk.open_file(Write.PART, path, begin=not have)
        self._mark = mark
        self._digest = _digest(self._file, have)
        self._have = self._marked = have
        self._at = time.monotonic()
        self._file.seek(have)
        self._file.truncate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with contextlib.suppress(OSError):  # the disk is full, most likely: the one before counts
                self._checkpoint()
        finally:
            self._file.close()

    def write(self, chunk: bytes) -> None:
        """Append bytes. Raises `OSError`."""
        self._file.write(chunk)
        self._digest.update(chunk)
        self._have += len(chunk)
        if self._have - self._marked >= STEP_BYTES or time.monotonic() - self._at >= STEP_S:
            self._checkpoint()

    def _checkpoint(self) -> None:
        self._at = time.monotonic()
        self._file.flush()
        os.fsync(self._file.fileno())
        made = Checkpoint(bytes=self._have, sha256=self._digest.hexdigest())
        disk.write(Write.MARK, self._mark, msgspec.json.encode(made), mode=0o600)
        self._marked = self._have


def _digest(file: IO[bytes], size: int) -> Any:
    """Return the hash of the first `size` bytes of a file."""
    digest = hashlib.sha256()
    file.seek(0)
    while size and (chunk := file.read(min(size, 64 * bounds.KIB))):
        digest.update(chunk)
        size -= len(chunk)
    return digest

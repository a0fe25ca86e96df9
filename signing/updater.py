"""Where verified metadata files are kept between refreshes, so that what did not change is not fetched again.

A cache is a convenience and never an authority: what is read from it is verified like what comes from the network, and
what must not be forgotten is in `Facts`. So a torn, lost or planted file costs a download and nothing else.
"""

import contextlib
import os
from pathlib import Path

from fleet.protocol import bounds


class DirectoryCache:
    """A directory; files are replaced atomically. A full disk makes it forgetful, not wrong."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self, name: str) -> bytes | None:
        """See `Cache`; an unreadable file counts as none."""
        try:
            with self._path(name).open("rb") as file:
                return file.read(bounds.TARGETS_MAX_BYTES + 1)
        except OSError:
            return None

    def store(self, name: str, data: bytes) -> None:
        """See `Cache`; a file that is the same already is not written again."""
        if self.load(name) == data:
            return
        path = self._path(name)
        beside = path.with_name(f".{path.name}.new")
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)

    def _path(self, name: str) -> Path:
        assert ".." not in name.split("/")
        return self._directory / name

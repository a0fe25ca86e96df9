"""How much each instance has written today (UTC), over restarts of lanes and host: kept in a file, and not too often.

What a host that is killed has not saved yet is at most a mebibyte of each instance.
"""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Final

from fleet.protocol.caps import MIB

_DAY_S: Final = 86_400


class Daily:
    """The bytes of today, by instance."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._day = _today()
        self._written: dict[str, int] = {}
        self._unsaved = 0
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError, KeyError):
            kept = json.loads(path.read_text(encoding="utf-8"))
            if int(kept["day"]) == self._day:
                self._written = {str(name): int(count) for name, count in kept["written"].items()}
        self.written_bytes = 0

    def of(self, instance: str) -> int:
        """What it has written today."""
        self._turn()
        return self._written.get(instance, 0)

    def note(self, instance: str, count: int) -> None:
        """It has written so much more."""
        self._turn()
        self._written[instance] = self._written.get(instance, 0) + count
        self._unsaved += count
        if self._unsaved >= MIB:
            self.save()

    def save(self) -> None:
        """Keep what is known, if there is anything new."""
        if not self._unsaved:
            return
        data = json.dumps({"day": self._day, "written": self._written}).encode()
        part = self._path.with_suffix(".part")
        with contextlib.suppress(OSError):  # a disk that is full: it is known here, and kept later
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(self._path)
            self._unsaved = 0
            self.written_bytes += len(data)

    def _turn(self) -> None:
        day = _today()
        if day != self._day:
            self._day, self._written = day, {}


def _today() -> int:
    return int(time.time() // _DAY_S)

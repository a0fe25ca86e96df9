"""Starts of the agent: after three that ended by a fault within a minute, the next one leaves the broker alone.

Whatever a broker sends, it sends again at each start, and a broker needs no key of the fleet's to send it. HTTPS, which
only the fleet's server answers, is enough for everything.
"""

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from agent import disk
from agent.disk import Write
from fleet.protocol import files, wire

log = logging.getLogger("agent")

ENDS_MAX: Final = 3
WITHIN_S: Final = 60.0
PAUSE_S: Final = 3600.0
"""Time for which the broker is left alone."""


class StartLog(msgspec.Struct, frozen=True):
    """Content of the file: when the agent started, seconds since the boot, since it last ended in order."""

    boot_id: str = ""
    at: tuple[float, ...] = ()


class Starts:
    """Record of the agent's starts in a file that exists from a start to its end in order."""

    def __init__(self, file: Path, *, boot_id: str, clock: Callable[[], float]) -> None:
        self._file = file
        self._boot_id = boot_id
        self._clock = clock

    def begin(self) -> bool:
        """Record a start; return whether the last three ended by a fault, all within a minute."""
        now = self._clock()
        recent = [at for at in self._read().at if 0 <= now - at < WITHIN_S][-ENDS_MAX:]
        with contextlib.suppress(OSError):  # a disk that is full or read-only must not keep the agent from starting
            content = StartLog(self._boot_id, (*recent, now))
            disk.write(Write.STARTED, self._file, msgspec.json.encode(content), mode=0o600)
        return len(recent) >= ENDS_MAX

    def end(self) -> None:
        """Record an end in order."""
        with contextlib.suppress(OSError):
            disk.remove(Write.ENDED, self._file)

    def _read(self) -> StartLog:
        with contextlib.suppress(OSError, *wire.JSON_ERRORS):
            found = msgspec.json.decode(files.read(self._file), type=StartLog)
            if found.boot_id == self._boot_id:
                return found
        return StartLog()

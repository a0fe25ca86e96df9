"""Memory that a guest had when it trapped, so that an error can name its limit.

The engine answers a guest that asks for more memory than it may have with -1, and says so to nobody; allocators then
trap with `unreachable`, like any failed assertion. The process's own map shows how large its linear memories are: each
is a writable piece at the beginning of a reservation. A worker of one instance watches; where several instances share a
process, or memories are not reserved, nothing is said.
"""

import itertools
import os
from typing import Final

_READ_BYTES: Final = 64 * 1024
_ALMOST: Final = 0.75
"""Part of the limit from which on it is worth naming: allocators ask for more by a part of what they have."""


class MemoryInUse:
    """Size of this process's largest linear memory."""

    def __init__(self, limit_bytes: int, reservation_bytes: int) -> None:
        """Open the map, before the sandbox closes. Raises OSError where there is none."""
        self.limit_bytes = limit_bytes
        self._reservation_bytes = reservation_bytes
        self._fd = os.open("/proc/self/maps", os.O_RDONLY | os.O_CLOEXEC)

    def almost_all(self) -> int:
        """Return its bytes where they are most of what the limit allows, else 0."""
        found = max(self._sizes(), default=0)
        return found if found >= self.limit_bytes * _ALMOST else 0

    def _sizes(self) -> list[int]:
        pieces: list[bytes] = []
        try:
            while piece := os.pread(self._fd, _READ_BYTES, sum(map(len, pieces))):
                pieces.append(piece)
        except OSError:
            return []
        spans = [_span(line) for line in b"".join(pieces).splitlines()]
        return [
            end - start
            for (start, end, mode), (after, last, then) in itertools.pairwise(spans)
            if mode == b"rw-p" and then == b"---p" and end == after and last - start >= self._reservation_bytes
        ]


def _span(line: bytes) -> tuple[int, int, bytes]:
    """Return first and last address and mode of a line of the map (proc(5))."""
    where, mode, _ = line.split(maxsplit=2)
    start, _, end = where.partition(b"-")
    return int(start, 16), int(end, 16), mode


watched: list[MemoryInUse] = []
"""The process's own, at most one."""


def watch(limit_bytes: int, reservation_bytes: int) -> None:
    """Let errors of this process's guest name `limits.memory`, which is `limit_bytes`, where that may be their cause.

    `reservation_bytes`: of each linear memory; 0 where none is reserved.
    """
    if reservation_bytes:
        try:
            watched.append(MemoryInUse(limit_bytes, reservation_bytes))
        except OSError:
            return

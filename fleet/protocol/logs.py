"""How log lines come from a board to an operator who asked for them: over HTTPS, for minutes, stored nowhere.

A board posts `LogChunk`s to `/v1/logs` on the boards' listener, with its certificate, as long as it is told that there
is somebody to read them.
"""

from typing import ClassVar

import msgspec

from fleet.protocol import caps
from fleet.protocol.caps import Count, Stored
from fleet.protocol.wire import Message


class LogChunk(Message, frozen=True, kw_only=True):
    """Some lines of one instance's log, oldest first, without any secret.

    Attributes:
        command: sequence of the signed command that asked for them.
        left_out: lines since the last chunk that this board's policy keeps, or that came too fast.
        refused: why there are none, as a sentence; empty when there are.
        ended: nothing follows.
    """

    MAX_BYTES: ClassVar[int] = caps.LOG_CHUNK_MAX_BYTES
    instance: str
    command: Count
    lines: tuple[str, ...] = ()
    left_out: Count = 0
    refused: str = ""
    ended: bool = False


class LogAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Whether anybody still reads."""

    more: bool


class LogView(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /v1/devices/{id}/logs?command=N&after=K&wait=S`: the lines behind a place, and the next place.

    Attributes:
        heard: whether the board has answered the command at all.
    """

    lines: tuple[str, ...] = ()
    next: Stored = 0
    heard: bool = False
    ended: bool = False
    refused: str = ""
    left_out: Stored = 0

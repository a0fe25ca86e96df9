"""Log lines on their way from a board to the operator who asked: in memory, for minutes, and never stored.

A board is listened to only where an operator's command asked it for lines, and for as long as somebody reads them.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from fleet.protocol import wire
from fleet.protocol.logs import LogAnswer, LogChunk, LogView
from fleet.server import web
from fleet.server.web import Refusal, answer, number, param
from fleet.store.rows import DeviceRow
from signing.facts import VERSION_MAX

FOLLOWS_MAX: Final = 64
LINES_MAX: Final = 5000
READER_GONE_S: Final = 45.0
WAIT_MAX_S: Final = 20


@dataclass(slots=True)
class _Follow:
    instance: str
    until: float
    read_at: float
    lines: list[str] = field(default_factory=list)
    heard: bool = False
    ended: bool = False
    refused: str = ""
    left_out: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)


class Logs:
    """What is being followed."""

    def __init__(self, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self._follows: dict[tuple[str, int], _Follow] = {}

    def expect(self, device: str, command: int, instance: str, *, minutes: int) -> None:
        """An operator's signed command has asked this board for lines."""
        now = self._now()
        self._follows = {key: each for key, each in self._follows.items() if each.until > now}
        while len(self._follows) >= FOLLOWS_MAX:
            del self._follows[next(iter(self._follows))]
        self._follows[device, command] = _Follow(instance, now + 60.0 * (minutes + 1), now)

    async def take(self, request: Request, device: DeviceRow) -> Response:
        """POST /v1/logs, from a board."""
        try:
            chunk = wire.decode(LogChunk, await web.read(request, LogChunk.MAX_BYTES))
        except wire.WireError as error:
            raise Refusal(400, "bad-request", "these are no log lines", str(error)) from error
        follow = self._follows.get((device.id, chunk.command))
        now = self._now()
        if follow is None or follow.instance != chunk.instance or follow.until < now:
            raise Refusal(409, "not-asked", "nobody asked this board for these lines")
        follow.heard, follow.refused = True, chunk.refused[:500]
        follow.lines += chunk.lines
        follow.left_out += max(0, chunk.left_out) + max(0, len(follow.lines) - LINES_MAX)
        del follow.lines[LINES_MAX:]
        more = now - follow.read_at < READER_GONE_S and len(follow.lines) < LINES_MAX
        follow.ended = follow.ended or chunk.ended or bool(chunk.refused) or not more
        follow.news.set()
        return answer(LogAnswer(more=more))

    async def read(self, request: Request, _by: str) -> Response:
        """GET /v1/devices/{id}/logs."""
        command, after = number(request, "command", 0, VERSION_MAX), number(request, "after", 0, LINES_MAX)
        follow = self._follows.get((param(request, "id"), command))
        if follow is None:
            raise Refusal(404, "not-found", "nobody asked that board for lines, or that is over", action="fleet logs")
        wait_s = number(request, "wait", 0, WAIT_MAX_S)
        follow.read_at = self._now()
        if len(follow.lines) <= after and not follow.ended and wait_s:
            follow.news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(follow.news.wait(), wait_s)
        follow.read_at = self._now()
        return answer(
            LogView(
                lines=tuple(follow.lines[after:]),
                next=len(follow.lines),
                heard=follow.heard,
                ended=follow.ended or follow.until < self._now(),
                refused=follow.refused,
                left_out=follow.left_out,
            )
        )

    def _now(self) -> float:
        return self._clock().timestamp()

"""Relay of archives about devices: from the device that an operator's command asked, to that operator.

Each archive is sealed by the device to a key that only the operator has. It stays in memory until it is fetched, for
minutes at most, and is accepted only for a command of an operator, once, and no longer than its bound.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from fleet.protocol import bounds, wire
from fleet.protocol.messages import ArchiveNote, ArchiveTaken, ArchiveView
from fleet.protocol.operator_api import Refusal
from fleet.server.api import http
from fleet.server.api.http import answer, param
from fleet.server.api.query import Number, Word
from fleet.store.rows import DeviceRow
from fleet.store.store import AuditLog
from signing.state import VERSION_MAX

log = logging.getLogger(__name__)

ARCHIVES_MAX: Final = 8
"""Archives that may be on their way at once: a bound of memory, as each is kept whole."""

ASKED_S: Final = 1200.0
"""Time from the command to the end of the upload: a device sends the largest archive over 64 kbit/s in ten minutes."""

KEPT_S: Final = 600.0
"""Time for the operator to fetch an archive that has come."""

ARCHIVE_COMMAND: Final = Number(name="command", most=VERSION_MAX)
ARCHIVE_WAIT: Final = Number(name="wait", most=20)
ARCHIVE_KNOWN: Final = Word(name="known", pattern="[a-z]{1,20}", what="a step, as the last answer named it")
_UNDER_WAY: Final = frozenset({"made", "sent"})
_OVER: Final = frozenset({"ready", "refused", "failed"})


@dataclass(slots=True)
class _Asked:
    """Archive that an operator asked for; `content` only while `step` is `ready`."""

    by: str
    until: float
    step: str = "asked"
    received: int = 0
    size: int = 0
    refused: str = ""
    content: bytes = b""
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def move(self, step: str) -> None:
        self.step = step
        self.news.set()


class Archives:
    """Archives that were asked for. All methods run on the loop."""

    def __init__(self, audit: AuditLog, clock: Callable[[], datetime]) -> None:
        self._audit, self._clock = audit, clock
        self._asked: dict[tuple[str, int], _Asked] = {}
        self._over = False

    def close(self) -> None:
        """End every wait: the server is about to stop."""
        self._over = True
        for each in self._asked.values():
            each.news.set()

    def check_room(self, device: str, *, by: str) -> None:
        """Check that an operator may ask for an archive of a device now; raises `Refusal`."""
        self._forget_late()
        for (known, _), each in self._asked.items():
            if known == device and each.by != by and each.step in _UNDER_WAY:
                title = f"an archive of {device} is on its way to {each.by}, and a device makes one at a time"
                raise Refusal(409, "busy", title, action="try again in some minutes")
        if len(self._asked) >= ARCHIVES_MAX and (device, by) not in {
            (key[0], each.by) for key, each in self._asked.items()
        }:
            title = f"{ARCHIVES_MAX} archives of devices are on their way or wait to be fetched"
            raise Refusal(429, "busy", title, action="try again in some minutes")

    def expect(self, device: str, command: int, *, by: str) -> None:
        """Expect an archive from a device for an operator's signed command, in place of what was expected before."""
        self._asked = {
            key: each for key, each in self._asked.items() if key[0] != device or (each.by != by and each.step in _OVER)
        }
        self._asked[device, command] = _Asked(by, self._now() + ASKED_S)

    # -- from a device -----------------------------------------------------------------------------------------------

    async def note(self, request: Request, device: DeviceRow) -> Response:
        """POST /v1/diagnose."""
        try:
            said = wire.decode(ArchiveNote, await http.read(request, ArchiveNote.MAX_BYTES))
        except wire.WireError as error:
            raise Refusal(400, "bad-request", "this is no note about an archive", str(error)) from error
        asked = self._expected(device.id, said.command)
        asked.refused = said.refused
        if asked.step == "sent":
            pass  # the upload is under way on another connection
        elif said.refused:
            asked.move("failed" if said.failed else "refused")
        else:
            asked.move("made")
        return answer(ArchiveTaken())

    async def take(self, request: Request, device: DeviceRow) -> Response:
        """PUT /v1/diagnose?command=N: the sealed archive."""
        command = ARCHIVE_COMMAND.of(request)
        asked = self._expected(device.id, command)
        size = bounds.parse_number(request.headers.get("content-length", "").encode())
        if size is None or size > bounds.ARCHIVE_MAX_BYTES:
            raise Refusal(
                413, "too-large", f"an archive has at most {bounds.ARCHIVE_MAX_BYTES} bytes, and says how many"
            )
        if asked.step == "sent":
            raise Refusal(409, "busy", "this archive is being sent on another connection")
        asked.size, asked.received = size, 0
        asked.move("sent")
        content = bytearray()
        try:
            async for chunk in request.stream():
                content += chunk
                asked.received = len(content)
                if len(content) > size:
                    raise Refusal(413, "too-large", "the archive is larger than its length")
        finally:
            if len(content) == size:
                asked.content, asked.until = bytes(content), self._now() + KEPT_S
                asked.move("ready")
            else:  # the device tries again
                asked.move("made")
        return answer(ArchiveTaken(bytes=size))

    # -- from an operator --------------------------------------------------------------------------------------------

    async def look(self, request: Request, by: str) -> Response:
        """GET /v1/devices/{id}/diagnose?command=N&known=S&wait=W."""
        known, wait_s = ARCHIVE_KNOWN.of(request), ARCHIVE_WAIT.of(request)
        asked = self._of(request, by)
        if asked.step == known and known not in _OVER and wait_s and not self._over:
            asked.news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await asked.news.wait()
        return answer(ArchiveView(step=asked.step, received=asked.received, bytes=asked.size, refused=asked.refused))

    async def fetch(self, request: Request, by: str) -> Response:
        """GET /v1/devices/{id}/diagnose/archive?command=N: the sealed archive, which is forgotten."""
        asked = self._of(request, by)
        device, command = param(request, "id"), ARCHIVE_COMMAND.of(request)
        if asked.step != "ready":
            raise Refusal(409, "not-ready", f"the archive of {device} has not come: it is {asked.step}")
        del self._asked[device, command]
        self._audit.record(
            by, "diagnose", device, f"fetched the archive of command {command}, {asked.size} bytes sealed"
        )
        headers = {"cache-control": "no-store"}
        return Response(asked.content, media_type="application/octet-stream", headers=headers)

    def _of(self, request: Request, by: str) -> _Asked:
        self._forget_late()
        device = param(request, "id")
        asked = self._asked.get((device, ARCHIVE_COMMAND.of(request)))
        if asked is None or asked.by != by:
            title = f"{by} asked {device} for no archive by that command, or it was fetched, or its time is over"
            raise Refusal(404, "not-found", title, action=f"fleet device {device} --diagnose -o FILE")
        return asked

    def _expected(self, device: str, command: int) -> _Asked:
        self._forget_late()
        asked = self._asked.get((device, command))
        if asked is None or asked.step in _OVER:
            raise Refusal(409, "not-asked", "no operator asked this device for an archive by this command")
        return asked

    def _forget_late(self) -> None:
        now = self._now()
        self._asked = {key: each for key, each in self._asked.items() if each.until > now}

    def _now(self) -> float:
        return self._clock().timestamp()

"""Handlers for enrolled devices; log relay.

TLS has verified each client's certificate against the fleet's CA before a request is read.

The log relay passes lines from a device to the operator who requested them: in memory, for minutes, never stored. Lines
are accepted only for an operator's command, and only while somebody reads them.
"""

import asyncio
import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from fleet.protocol import bounds, wire
from fleet.protocol.assignment import Assignment
from fleet.protocol.messages import AHEAD, DesiredReply, Exchange, LogAnswer, LogChunk, LogView, RenewRequest
from fleet.protocol.operator_api import Refusal
from fleet.server.ahead import AheadDevices
from fleet.server.api import http
from fleet.server.api.archives import Archives
from fleet.server.api.http import answer, body, param
from fleet.server.api.publishing import Artifacts, artifact_file, tuf_file
from fleet.server.api.query import Number, Word
from fleet.server.api.secrets import box_of
from fleet.server.enrolment import Enrolment
from fleet.server.exchange import Exchanges
from fleet.server.listener import peer_certificate
from fleet.server.tuf_repository import TufRepository
from fleet.store.rows import DeviceRow
from fleet.store.store import Store
from signing.state import VERSION_MAX

FOLLOWS_MAX: Final = 64
LINES_MAX: Final = 5000
READER_GONE_S: Final = 45.0
LOGS_COMMAND: Final = Number(name="command", most=VERSION_MAX)
LOGS_AFTER: Final = Number(name="after", most=LINES_MAX)
LOGS_WAIT: Final = Number(name="wait", most=20)
NONCE: Final = Word(name="nonce", pattern="[0-9a-f]{16,64}", what="a nonce of 16 to 64 hexadecimal digits")


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


class LogRelay:
    """Followed logs: which device sends lines for which command."""

    def __init__(self, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self._follows: dict[tuple[str, int], _Follow] = {}
        self._over = False

    def close(self) -> None:
        """End every wait for lines: the server is about to stop."""
        self._over = True
        for follow in self._follows.values():
            follow.news.set()

    def expect(self, device: str, command: int, instance: str, *, minutes: int) -> None:
        """Expect lines from a device, for an operator's signed command."""
        now = self._now()
        self._follows = {key: each for key, each in self._follows.items() if each.until > now}
        while len(self._follows) >= FOLLOWS_MAX:
            del self._follows[next(iter(self._follows))]
        self._follows[device, command] = _Follow(instance, now + 60.0 * (minutes + 1), now)

    async def take(self, request: Request, device: DeviceRow) -> Response:
        """POST /v1/logs, from a device."""
        try:
            chunk = wire.decode(LogChunk, await http.read(request, LogChunk.MAX_BYTES))
        except wire.WireError as error:
            raise Refusal(400, "bad-request", "these are no log lines", str(error)) from error
        follow = self._follows.get((device.id, chunk.command))
        now = self._now()
        if follow is None or follow.instance != chunk.instance or follow.until < now:
            raise Refusal(409, "not-asked", "nobody asked this device for these lines")
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
        command, after = LOGS_COMMAND.of(request), LOGS_AFTER.of(request)
        follow = self._follows.get((param(request, "id"), command))
        if follow is None:
            raise Refusal(404, "not-found", "nobody asked that device for lines, or that is over", action="fleet logs")
        wait_s = LOGS_WAIT.of(request)
        follow.read_at = self._now()
        if len(follow.lines) <= after and not follow.ended and wait_s and not self._over:
            follow.news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await follow.news.wait()
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


BROKER_SLACK_S: Final = 120.0
"""Time for the broker to deliver an assignment; a device that still fetches it here did not get it from the broker."""

_ASKING_MAX_BYTES: Final = 4 * bounds.KIB
"""Largest `Exchange` of a suspended device: ten times one without messages."""

_NAMED_MAX: Final = 5


@dataclass(frozen=True, slots=True)
class Talk:
    """Ways by which devices and the server talk over HTTPS, beside requests for files.

    Attributes:
        suspended: devices whose messages are refused now (`DeviceBudget`).
    """

    logs: LogRelay
    archives: Archives
    exchanges: Exchanges
    suspended: Collection[str]


class DeviceApi:
    """Handlers of the API for devices: metadata, artifacts, the desired state, renewal."""

    def __init__(
        self,
        *,
        store: Store,
        repository: TufRepository,
        artifacts: Artifacts,
        enrolment: Enrolment,
        ahead: AheadDevices,
        clock: Callable[[], datetime],
        talk: Talk,
    ) -> None:
        self.logs, self._exchanges, self._suspended = talk.logs, talk.exchanges, talk.suspended
        self.archives = talk.archives
        self._ahead, self._controller = ahead, ahead.controller
        self._store, self._repository, self._artifacts = store, repository, artifacts
        self._enrolment, self._director, self._clock = enrolment, ahead.director, clock
        self._unheard: dict[str, float] = {}

    def caller(self, request: Request, *, renewing: bool) -> DeviceRow:
        """Return the enrolled device that sent a request; raises `Refusal`. `renewing`: also after its certificate."""
        return self._enrolment.authenticate(peer_certificate(request.scope), renewing=renewing)

    async def tuf(self, request: Request, _device: DeviceRow) -> Response:
        """GET /v1/tuf/{file}."""
        return tuf_file(self._repository, param(request, "file"))

    async def artifact(self, request: Request, _device: DeviceRow) -> Response:
        """GET /v1/artifacts/{sha256}."""
        return artifact_file(self._artifacts, self._store, request)

    async def secret(self, request: Request, device: DeviceRow) -> Response:
        """GET /v1/secrets/{sha256}: a box of this device's own, and of no other's."""
        return box_of(self._store, device.id, param(request, "sha256"))

    async def desired(self, request: Request, device: DeviceRow) -> Response:
        """GET /v1/desired: the way for a device that cannot reach the broker; with a nonce, vouched for."""
        if self._director.is_ahead(device):
            raise Refusal(409, AHEAD, "this server knows no assignment as new as this device's: show it")
        self._doubt_broker(device)
        self._controller.polled(device.id)
        row = self._director.reconcile(device.id)  # an assignment that an earlier director's key signed is signed again
        if row is None:
            raise Refusal(404, "not-found", "nothing was ever assigned to this device")
        body, nonce = row.envelope, NONCE.of(request)
        if nonce:
            vouched = self._director.vouch(row, nonce)
            body = wire.encode(DesiredReply(assignment=row.envelope.decode(), fresh=vouched.decode()))
        return Response(body, media_type="application/json", headers={"cache-control": "no-store"})

    async def show(self, request: Request, device: DeviceRow) -> Response:
        """POST /v1/assignment: a device that is ahead of this server shows the assignment that it has accepted."""
        self._ahead.show(device, await http.read(request, Assignment.MAX_BYTES))
        return Response(b"{}", media_type="application/json")

    async def exchange(self, request: Request, device: DeviceRow) -> Response:
        """POST /v1/exchange: the conversation of a device that cannot reach the broker."""
        data = await self._read_exchange(request, device)
        try:
            said = wire.decode(Exchange, data)
        except wire.WireError as error:
            raise Refusal(400, "bad-request", "this is no exchange of messages", str(error)) from error
        self._controller.polled(device.id)
        reply = await self._exchanges.answer(device.id, said)
        return Response(wire.encode(reply), media_type="application/json", headers={"cache-control": "no-store"})

    async def _read_exchange(self, request: Request, device: DeviceRow) -> bytes:
        """Read a request, of a suspended device no more than it takes to ask: it still receives, as over MQTT."""
        if device.id not in self._suspended:
            return await http.read(request, Exchange.MAX_BYTES)
        try:
            return await http.read(request, _ASKING_MAX_BYTES)
        except Refusal:
            title = f"{device.id} is suspended: the server reads no messages of it"
            raise Refusal(429, "suspended", title, action="wait until the suspension is over") from None

    def _doubt_broker(self, device: DeviceRow) -> None:
        """Note that the broker did not deliver an assignment to a device, until the device is heard over the broker."""
        newest = self._store.delivery.assignment(device.id)
        now = self._clock()
        if newest is None or newest.version <= device.accepted or now.timestamp() - newest.issued < BROKER_SLACK_S:
            return
        if device.id not in self._unheard:
            words = f"asked over HTTPS for assignment {newest.version}, which the broker did not bring"
            self._store.devices.note(device.id, "broker", words, now=now.timestamp(), assignment=newest.version)
        self._unheard[device.id] = now.timestamp()

    def problems(self) -> list[str]:
        """Return a sentence that names devices to which the broker does not deliver."""
        rows = {row.id: row for row in self._store.devices.some(self._unheard)}
        for device, since in list(self._unheard.items()):
            row = rows.get(device)
            if row is None or row.revoked or (row.seen_at or 0) > since:
                del self._unheard[device]
        if not self._unheard:
            return []
        some = ", ".join(sorted(self._unheard)[:_NAMED_MAX])
        return [f"the broker keeps assignments from {len(self._unheard)} devices, which ask over HTTPS: {some}"]

    async def renew(self, request: Request, device: DeviceRow) -> Response:
        """POST /v1/renew."""
        wish = await body(request, RenewRequest, bounds.ENROL_MAX_BYTES)
        return answer(self._enrolment.renew(device, wish.csr_pem, wish.sealing_proof))

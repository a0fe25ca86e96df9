"""The routes for enrolled boards. TLS has asked each for a certificate of the fleet's CA before a request is read."""

import re
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fleet.protocol import wire
from fleet.protocol.enrolment import RenewRequest
from fleet.protocol.messages import DesiredReply
from fleet.server import web
from fleet.server.artifacts import Artifacts
from fleet.server.director import Director
from fleet.server.enrolment import Enrolment
from fleet.server.logs import Logs
from fleet.server.peercert import peer_certificate
from fleet.server.publishing import artifact_file, tuf_file
from fleet.server.repository import Repository
from fleet.server.vault import box_of
from fleet.server.web import Refusal, answer, body, param
from fleet.store.rows import DeviceRow
from fleet.store.store import Store

BROKER_SLACK_S: Final = 120.0
"""How long the broker may take to bring an assignment before a board that asks here for it tells something."""
_NAMED_MAX: Final = 5
_NONCE: Final = re.compile(r"[0-9a-f]{16,64}")
Handler = Callable[[Request, DeviceRow], Awaitable[Response]]


class Devices:
    """The API for boards: metadata, artifacts, the desired state, renewal."""

    def __init__(
        self,
        *,
        store: Store,
        repository: Repository,
        artifacts: Artifacts,
        enrolment: Enrolment,
        director: Director,
        clock: Callable[[], datetime],
        logs: Logs,
    ) -> None:
        self._logs = logs
        self._store, self._repository, self._artifacts = store, repository, artifacts
        self._enrolment, self._director, self._clock = enrolment, director, clock
        self._unheard: dict[str, float] = {}

    def application(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                Route("/v1/tuf/{file}", self._known(self.tuf), methods=["GET"]),
                Route("/v1/artifacts/{sha256}", self._known(self.artifact), methods=["GET"]),
                Route("/v1/secrets/{sha256}", self._known(self.secret), methods=["GET"]),
                Route("/v1/desired", self._known(self.desired), methods=["GET"]),
                Route("/v1/logs", self._known(self._logs.take), methods=["POST"]),
                Route("/v1/renew", self._known(self.renew, renewing=True), methods=["POST"]),
            ],
            exception_handlers=web.HANDLERS,
        )

    def _known(self, handler: Handler, *, renewing: bool = False) -> web.Route:
        async def route(request: Request) -> Response:
            device = self._enrolment.authenticate(peer_certificate(request.scope), renewing=renewing)
            return await handler(request, device)

        return web.guarded(route)

    async def tuf(self, request: Request, _device: DeviceRow) -> Response:
        """GET /v1/tuf/{file}."""
        return tuf_file(self._repository, param(request, "file"))

    async def artifact(self, request: Request, _device: DeviceRow) -> Response:
        """GET /v1/artifacts/{sha256}."""
        return artifact_file(self._artifacts, request)

    async def secret(self, request: Request, device: DeviceRow) -> Response:
        """GET /v1/secrets/{sha256}: a box of this board's own, and of no other's."""
        return box_of(self._store, device.id, param(request, "sha256"))

    async def desired(self, request: Request, device: DeviceRow) -> Response:
        """GET /v1/desired: the way for a board that cannot reach the broker; with a nonce, vouched for."""
        self._doubt_broker(device)
        row = self._director.reconcile(device.id)  # what another director's key signed is nobody's word any more
        if row is None:
            raise Refusal(404, "not-found", "nothing was ever assigned to this board")
        body, nonce = row.envelope, request.query_params.get("nonce")
        if nonce is not None:
            if not _NONCE.fullmatch(nonce):
                raise Refusal(400, "bad-request", "a nonce is 16 to 64 hexadecimal digits")
            vouched = self._director.vouch(row, nonce)
            body = wire.encode(DesiredReply(assignment=row.envelope.decode(), fresh=vouched.decode()))
        return Response(body, media_type="application/json", headers={"cache-control": "no-store"})

    def _doubt_broker(self, device: DeviceRow) -> None:
        """A board asks here for what the broker should have brought: noted until the broker brings its word."""
        newest = self._store.delivery.assignment(device.id)
        now = self._clock()
        if newest is None or newest.version <= device.accepted or now.timestamp() - newest.issued < BROKER_SLACK_S:
            return
        if device.id not in self._unheard:
            words = f"asked over HTTPS for assignment {newest.version}, which the broker did not bring"
            self._store.devices.note(device.id, "broker", words, now=now.timestamp(), assignment=newest.version)
        self._unheard[device.id] = now.timestamp()

    def problems(self) -> list[str]:
        """Boards that the broker does not reach, or keeps from their newest assignment, in one sentence."""
        rows = {row.id: row for row in self._store.devices.some(self._unheard)}
        for device, since in list(self._unheard.items()):
            row = rows.get(device)
            if row is None or row.revoked or (row.seen_at or 0) > since:
                del self._unheard[device]
        if not self._unheard:
            return []
        some = ", ".join(sorted(self._unheard)[:_NAMED_MAX])
        return [f"the broker keeps assignments from {len(self._unheard)} boards, which ask over HTTPS: {some}"]

    async def renew(self, request: Request, device: DeviceRow) -> Response:
        """POST /v1/renew."""
        wish = await body(request, RenewRequest)
        return answer(self._enrolment.renew(device, wish.csr_pem, wish.sealing_proof))

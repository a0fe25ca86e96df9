"""The routes about the CA: what it issues with, a successor for it, and what counts no more. An admin changes it."""

from collections.abc import Awaitable, Callable
from datetime import datetime

from starlette.requests import Request
from starlette.responses import Response

from fleet import issuing
from fleet.ca import CaError, CertificateAuthority, serial
from fleet.protocol.authority import CaView, Issuer, IssuingRequest
from fleet.server.people import need_admin
from fleet.server.web import Refusal, answer, body, param
from fleet.store.store import Store


class Authority:
    """The CA, for operators.

    Args:
        hosts: for which server certificates are issued.
        changed: called when another issuing CA is in use, or one is accepted no more.
    """

    def __init__(
        self,
        *,
        ca: CertificateAuthority,
        store: Store,
        hosts: tuple[str, ...],
        changed: Callable[[], Awaitable[None]],
        clock: Callable[[], datetime],
    ) -> None:
        self._ca, self._store, self._hosts, self._changed, self._clock = ca, store, hosts, changed, clock

    async def show(self, _request: Request, _by: str) -> Response:
        """GET /v1/ca."""
        return answer(self._view())

    async def install(self, request: Request, by: str) -> Response:
        """PUT /v1/ca/issuing."""
        need_admin(self._store, request)
        wish = await body(request, IssuingRequest)
        try:
            made = issuing.install(self._ca.directory, wish.issuing_pem, now=self._clock())
        except CaError as error:
            raise Refusal(422, "refused", str(error)) from error
        return await self._after(by, "renew-ca", serial(made))

    async def revoke(self, request: Request, by: str) -> Response:
        """POST /v1/ca/issuers/{serial}/revoke."""
        need_admin(self._store, request)
        number = param(request, "serial")
        if self._ca.is_root:
            raise Refusal(409, "no-issuing-ca", "the root itself issues here: there is nothing below it to revoke")
        try:
            issuing.revoke(self._ca.directory, number)
        except CaError as error:
            raise Refusal(409, "conflict", str(error)) from error
        return await self._after(by, "revoke-ca", number)

    async def _after(self, by: str, act: str, subject: str) -> Response:
        self._ca.load_again()
        self._store.access.audit(actor=by, act=act, subject=subject, now=self._clock().timestamp())
        await self._changed()
        return answer(self._view())

    def _view(self) -> CaView:
        current = serial(self._ca.issuer)
        rows = (
            Issuer(
                serial=serial(each),
                name=each.subject.rfc4514_string(),
                ends=each.not_valid_after_utc,
                current=serial(each) == current,
            )
            for each in self._ca.accepted
        )
        return CaView(
            root_sha256=self._ca.sha256,
            root_on_server=self._ca.is_root,
            issuers=tuple(sorted(rows, key=lambda row: (not row.current, row.ends))),
            request=issuing.request(self._ca.directory, self._hosts),
        )

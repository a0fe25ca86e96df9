"""Handlers for operator accounts, the CA, and online roles (snapshot and timestamp signed on a signing host)."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from fleet import ca
from fleet.ca import CaError, CertificateAuthority, serial
from fleet.protocol import bounds, names
from fleet.protocol.operator_api import Refusal, RoleReply
from fleet.protocol.trust_api import (
    NONE,
    CaView,
    Issuer,
    IssuingRequest,
    OnlineRequest,
    OnlineView,
    OperatorReply,
    OperatorRequest,
    OperatorRow,
    Operators,
    Role,
)
from fleet.server.api import http
from fleet.server.api.http import answer, body, param
from fleet.server.api.query import Number
from fleet.server.tuf_repository import TufRepository, WaitingError
from fleet.store.sqlite import utc
from fleet.store.store import AuditLog, ChangeSignal, Store
from signing import repository as repositories

_TOKEN_BYTES: Final = 32


class OperatorAccounts:
    """Operators, their roles and tokens."""

    def __init__(self, *, store: Store, audit: AuditLog, clock: Callable[[], datetime]) -> None:
        self._store, self._audit, self._clock = store, audit, clock

    async def list(self, _request: Request, _by: str) -> Response:
        """GET /v1/operators."""
        return answer(self._rows())

    async def put(self, request: Request, by: str) -> Response:
        """PUT /v1/operators/{name}."""
        name = names.check_label(param(request, "name"), "operator")
        wish = await body(request, OperatorRequest)
        if name == by and wish.role is not Role.ADMIN:
            raise Refusal(409, "last-admin", "an admin cannot lower itself", action="let another admin do it")
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        now = self._clock().timestamp()
        with self._store.atomic():
            self._store.access.set_operator(name, token, role=wish.role, now=now)
            self._audit.record(by, "let-in", name, wish.role)
        return answer(OperatorReply(name=name, role=wish.role, token=token), 201)

    async def delete(self, request: Request, by: str) -> Response:
        """POST /v1/operators/{name}/remove."""
        name = param(request, "name")
        if name == by:
            raise Refusal(409, "last-admin", "an admin cannot remove itself", action="let another admin do it")
        with self._store.atomic():
            if not self._store.access.remove_operator(name):
                raise Refusal(404, "unknown-operator", f"there is no operator {name}")
            self._audit.record(by, "shut-out", name)
        return answer(self._rows())

    def _rows(self) -> Operators:
        return Operators(
            operators=tuple(
                OperatorRow(name=row.name, role=Role(row.role), created_at=utc(row.created_at))
                for row in self._store.access.operators()
            )
        )


class CaHandlers:
    """The CA, for operators.

    Args:
        hosts: for which server certificates are issued.
        changed: called when another issuing CA is in use, or one is accepted no more.
    """

    def __init__(
        self,
        *,
        ca: CertificateAuthority,
        hosts: tuple[str, ...],
        changed: Callable[[], Awaitable[None]],
        audit: AuditLog,
        clock: Callable[[], datetime],
    ) -> None:
        self._ca, self._hosts, self._changed, self._audit, self._clock = ca, hosts, changed, audit, clock

    async def show(self, _request: Request, _by: str) -> Response:
        """GET /v1/ca."""
        return answer(self._view())

    async def install(self, request: Request, by: str) -> Response:
        """PUT /v1/ca/issuing."""
        wish = await body(request, IssuingRequest)
        try:
            made = ca.install(self._ca.directory, wish.issuing_pem, now=self._clock())
        except CaError as error:
            raise Refusal(422, "refused", str(error)) from error
        return await self._after(by, "renew-ca", serial(made))

    async def revoke(self, request: Request, by: str) -> Response:
        """POST /v1/ca/issuers/{serial}/revoke."""
        number = param(request, "serial")
        if self._ca.is_root:
            raise Refusal(409, "no-issuing-ca", "the root itself issues here: there is nothing below it to revoke")
        try:
            ca.revoke(self._ca.directory, number)
        except CaError as error:
            raise Refusal(409, "conflict", str(error)) from error
        return await self._after(by, "revoke-ca", number)

    async def _after(self, by: str, act: str, subject: str) -> Response:
        self._ca.load_again()
        self._audit.record(by, act, subject)
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
            request=ca.request(self._ca.directory, self._hosts),
        )


PATIENCE_S: Final = 20.0
"""Time that a publishing request waits for the signing host, below the time-out of clients."""

ONLINE_WAIT: Final = Number(name="wait", most=60)
_LATE: Final = repositories.LIFE["timestamp"] / 4
"""Rest of a timestamp's life at which its signing host is late: it renews at half of the life."""


class OnlineRoles:
    """Exchange between a server and its signing host."""

    def __init__(
        self, *, repository: TufRepository, shown: Callable[[], None], audit: AuditLog, clock: Callable[[], datetime]
    ) -> None:
        """Create the exchange; `shown` is called when a waiting change was published."""
        self._repository, self._shown, self._audit, self._clock = repository, shown, audit, clock
        self._watch = ChangeSignal()
        self._since: datetime | None = None

    async def published(self, act: Callable[[], RoleReply]) -> RoleReply:
        """Carry out `act`, which publishes, and wait where the signing host must sign first.

        Raises:
            Refusal: not signed in time (the change is stored), or another change was waiting.
        """
        until = asyncio.get_running_loop().time() + PATIENCE_S
        while True:
            try:
                return act()
            except WaitingError:
                self._since = self._since or self._clock()
                self._watch.changed()
            left = until - asyncio.get_running_loop().time()
            if await self._watch.until(lambda: None if self._repository.waiting else True, timeout_s=left) is None:
                raise Refusal(
                    503,
                    "publisher-away",
                    "the publisher host has not signed in time",
                    "what was sent first is kept, and is published as soon as it has",
                    "look after 'fleet publisher run' on its host, then do the same again",
                )

    async def show(self, request: Request, _by: str) -> Response:
        """GET /v1/online; with `wait`, as soon as something waits for a signature."""
        await self._watch.until(lambda: self._repository.waiting or None, timeout_s=ONLINE_WAIT.of(request))
        return answer(self._view())

    async def bring(self, request: Request, by: str) -> Response:
        """POST /v1/online: open to every operator, since signatures authenticate it."""
        data = await http.read(request, bounds.SNAPSHOT_MAX_BYTES + bounds.TIMESTAMP_MAX_BYTES + bounds.KIB)
        wish = http.decoded(data, OnlineRequest)
        waited = bool(self._repository.waiting)
        self._repository.countersign(
            snapshot=None if bytes(wish.snapshot) == bytes(NONE) else bytes(wish.snapshot),
            timestamp=bytes(wish.timestamp),
            now=self._clock(),
        )
        self._since = None
        if waited:
            self._audit.record(by, "countersign", f"snapshot {self._repository.snapshot_version}")
            self._shown()
        self._watch.changed()
        return answer(self._view())

    async def discard(self, _request: Request, by: str) -> Response:
        """POST /v1/online/discard: discard the waiting change, such as one to lost keys."""
        if not self._repository.discard():
            raise Refusal(409, "conflict", "nothing waits for the publisher host")
        self._since = None
        self._audit.record(by, "discard-waiting", "")
        self._watch.changed()
        return answer(self._view())

    def problems(self) -> list[str]:
        """Return sentences for the status: a change waits, or the timestamp is about to expire, and no host signs."""
        if not self._repository.elsewhere and not self._repository.waiting:
            return []
        now, found = self._clock(), []
        if self._repository.waiting:
            since = f" since {self._since:%H:%M} UTC" if self._since is not None else ""
            found.append(f"what was published waits for the publisher host{since}: is 'fleet publisher run' up there?")
        left = next(role.expires for role in self._repository.roles() if role.role == "timestamp") - now
        if left < _LATE:
            hours = max(timedelta(0), left).total_seconds() / 3600
            found.append(f"the publisher host is silent: the timestamp expires in {hours:.0f} h")
        return found

    def _view(self) -> OnlineView:
        roles = {role.role: role.version for role in self._repository.roles()}
        return OnlineView(
            elsewhere=self._repository.elsewhere,
            snapshot=roles["snapshot"],
            timestamp=roles["timestamp"],
            waiting=self._repository.waiting.decode(),
            problems=tuple(self.problems()),
        )

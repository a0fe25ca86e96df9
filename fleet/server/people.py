"""The routes about operators themselves: who may come in, and as what. Only an admin changes that."""

import secrets
from collections.abc import Callable
from datetime import datetime
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from fleet.protocol import names
from fleet.protocol.people import OperatorReply, OperatorRequest, OperatorRow, Operators, Role
from fleet.server.web import Refusal, answer, bearer, body, param
from fleet.store.database import utc
from fleet.store.store import Store

_TOKEN_BYTES: Final = 32


class People:
    """Operators, their roles and tokens."""

    def __init__(self, store: Store, clock: Callable[[], datetime]) -> None:
        self._store, self._clock = store, clock

    async def everyone(self, _request: Request, _by: str) -> Response:
        """GET /v1/operators."""
        return answer(self._rows())

    async def let_in(self, request: Request, by: str) -> Response:
        """PUT /v1/operators/{name}."""
        need_admin(self._store, request)
        name = names.check_label(param(request, "name"), "operator")
        wish = await body(request, OperatorRequest)
        if name == by and wish.role is not Role.ADMIN:
            raise Refusal(409, "last-admin", "an admin cannot lower itself", action="let another admin do it")
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        now = self._clock().timestamp()
        with self._store.atomic():
            self._store.access.set_operator(name, token, role=wish.role, now=now)
            self._store.access.audit(actor=by, act="let-in", subject=name, detail=wish.role, now=now)
        return answer(OperatorReply(name=name, role=wish.role, token=token), 201)

    async def shut_out(self, request: Request, by: str) -> Response:
        """POST /v1/operators/{name}/remove."""
        need_admin(self._store, request)
        name = param(request, "name")
        if name == by:
            raise Refusal(409, "last-admin", "an admin cannot remove itself", action="let another admin do it")
        with self._store.atomic():
            if not self._store.access.remove_operator(name):
                raise Refusal(404, "unknown-operator", f"there is no operator {name}")
            now = self._clock().timestamp()
            self._store.access.audit(actor=by, act="shut-out", subject=name, now=now)
        return answer(self._rows())

    def _rows(self) -> Operators:
        return Operators(
            operators=tuple(
                OperatorRow(name=row.name, role=Role(row.role), created_at=utc(row.created_at))
                for row in self._store.access.operators()
            )
        )


def need_admin(store: Store, request: Request) -> None:
    """Refuse everybody else; raises `Refusal`."""
    operator = store.access.operator(bearer(request))
    if operator is None or operator[1] != Role.ADMIN:
        raise Refusal(403, "forbidden", "only an admin says who may come in")

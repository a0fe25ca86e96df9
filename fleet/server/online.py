"""Snapshot and timestamp that a publisher host signs: what waits for it, what it brings, what is late."""

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from fleet.protocol import caps
from fleet.protocol.api import RoleReply
from fleet.protocol.online import NONE, OnlineRequest, OnlineView
from fleet.server import web
from fleet.server.people import need_admin
from fleet.server.repository import Repository, WaitingError
from fleet.server.watch import Watch
from fleet.server.web import Refusal, answer, number
from fleet.store.store import Store
from signing import repository as repositories

PATIENCE_S: Final = 20.0
"""How long whoever publishes waits for the publisher host: less than a client waits for an answer."""
WAIT_MAX_S: Final = 60
_LATE: Final = repositories.LIFE["timestamp"] / 4
"""A publisher host signs the timestamp anew at half of its life: with a quarter left it is late."""


class Online:
    """The way between a server and its publisher host."""

    def __init__(
        self, *, store: Store, repository: Repository, shown: Callable[[], None], clock: Callable[[], datetime]
    ) -> None:
        """`shown` is called when something that waited became visible."""
        self._store, self._repository, self._shown, self._clock = store, repository, shown, clock
        self._watch = Watch()
        self._since: datetime | None = None

    async def published(self, act: Callable[[], RoleReply]) -> RoleReply:
        """Carry out `act`, which publishes; where the publisher host must sign first, as soon as it has.

        Raises:
            Refusal: it did not in time; what was sent is kept, or something else was waiting.
        """
        until = asyncio.get_running_loop().time() + PATIENCE_S
        kept = b""
        while True:
            try:
                return act()
            except WaitingError:
                kept = kept or self._repository.waiting
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
        wait = min(number(request, "wait", 0, WAIT_MAX_S), WAIT_MAX_S)
        await self._watch.until(lambda: self._repository.waiting or None, timeout_s=wait)
        return answer(self._view())

    async def bring(self, request: Request, by: str) -> Response:
        """POST /v1/online: open to every operator, since signatures say whether it counts."""
        data = await web.read(request, caps.SNAPSHOT_MAX_BYTES + caps.TIMESTAMP_MAX_BYTES + caps.KIB)
        wish = web.decoded(data, OnlineRequest)
        waited = bool(self._repository.waiting)
        self._repository.countersign(
            snapshot=None if bytes(wish.snapshot) == bytes(NONE) else bytes(wish.snapshot),
            timestamp=bytes(wish.timestamp),
            now=self._clock(),
        )
        self._since = None
        if waited:
            self._audit(by, "countersign", f"snapshot {self._repository.snapshot_version}")
            self._shown()
        self._watch.changed()
        return answer(self._view())

    async def discard(self, request: Request, by: str) -> Response:
        """POST /v1/online/discard: forget what waits, such as a change to keys that nobody has."""
        need_admin(self._store, request)
        if not self._repository.discard():
            raise Refusal(409, "conflict", "nothing waits for the publisher host")
        self._since = None
        self._audit(by, "discard-waiting", "")
        self._watch.changed()
        return answer(self._view())

    def problems(self) -> list[str]:
        """What an operator should know: nobody signs, and something waits or is about to expire."""
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

    def _audit(self, by: str, act: str, subject: str) -> None:
        self._store.access.audit(actor=by, act=act, subject=subject, now=self._clock().timestamp())

"""Handlers of `/v1/messages`: messages of components, for operators.

Each request looks through a bounded number of rows: one that asks for a rare topic is answered in pieces (`more`).
"""

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from fleet.protocol import bounds, message_topics, operator_api, wire
from fleet.protocol.operator_api import Refusal
from fleet.server.api.http import answer
from fleet.server.api.query import LABEL, Number, Parameter, Word
from fleet.store.readings import ReadingRow
from fleet.store.sqlite import utc
from fleet.store.store import ChangeSignal, Store

_ROWS_MAX: Final = 1000
_REPLY_MAX_BYTES: Final = 4 * bounds.MIB

_LIMIT: Final = Number(name="limit", default=100, most=_ROWS_MAX)
_AFTER: Final = Number(name="after", default=0, most=bounds.NUMBER_MAX)
_WAIT: Final = Number(name="wait", most=20)
_SINCE: Final = Number(name="since", most=bounds.NUMBER_MAX)
_DEVICE: Final = Word(name="device", pattern="[a-z0-9-]{1,63}", what="the id of a device")
_GROUP: Final = Word(name="group", pattern=LABEL, what="the name of a group")
_INSTANCE: Final = Word(name="instance", pattern=LABEL, what="the name of an instance")
_TOPIC: Final = Word(name="topic", pattern=r"[^\x00-\x1f\x7f]{1,256}", what="a topic, or a filter such as plant/+/#")
PARAMETERS: Final[tuple[Parameter, ...]] = (_GROUP, _DEVICE, _INSTANCE, _TOPIC, _SINCE, _AFTER, _LIMIT, _WAIT)
"""`since` is a time, seconds since 1970. Without `after`, the newest are listed."""


class MessageHandlers:
    """Handlers of messages of components."""

    def __init__(self, *, store: Store, changes: ChangeSignal) -> None:
        self._store, self._changes = store, changes

    async def read(self, request: Request, _by: str) -> Response:
        """GET /v1/messages."""
        wanted = self._wanted_topic(request)
        after, wait_s = _AFTER.of(request), _WAIT.of(request)
        if "after" not in request.query_params:
            return answer(self._newest(request, wanted))

        def look() -> operator_api.Messages | None:
            found = self._after(request, after, wanted)
            return found if found.messages or found.more else None

        found = await self._changes.until(look, timeout_s=wait_s)
        return answer(found or self._after(request, after, wanted))

    def _wanted_topic(self, request: Request) -> str:
        wanted = _TOPIC.of(request)
        try:
            return message_topics.check_filter(wanted) if wanted else "#"
        except message_topics.BadMessageTopicError as error:
            raise Refusal(400, "bad-request", str(error)) from error

    def _devices(self, request: Request) -> list[str] | None:
        """Return whose messages a request asks for; None for every device's. Raises `Refusal`."""
        device, name = _DEVICE.of(request), _GROUP.of(request)
        if not name:
            return [device] if device else None
        group = self._store.devices.group(name)
        if group is None:
            raise Refusal(404, "unknown-group", f"there is no group {name!r}", action="fleet groups")
        members = self._store.devices.members(group)
        return [each for each in members if device in {"", each}]

    def _newest(self, request: Request, wanted: str) -> operator_api.Messages:
        """Return the newest messages, and where those that follow begin."""
        newest = self._store.readings.newest()
        rows = self._store.readings.before(
            newest + 1,
            devices=self._devices(request),
            instance=_INSTANCE.of(request),
            since=float(_SINCE.of(request)),
            most=_ROWS_MAX,
        )
        fitting = _fitting([row for row in rows if message_topics.matches(wanted, row.topic)][: _LIMIT.of(request)])
        return operator_api.Messages(messages=tuple(map(view, reversed(fitting))), next=newest)

    def _after(self, request: Request, after: int, wanted: str) -> operator_api.Messages:
        newest, limit = self._store.readings.newest(), _LIMIT.of(request)
        rows = self._store.readings.after(
            after,
            devices=self._devices(request),
            instance=_INSTANCE.of(request),
            since=float(_SINCE.of(request)),
            most=_ROWS_MAX,
        )
        found = [row for row in rows if message_topics.matches(wanted, row.topic)]
        fitting = _fitting(found[:limit])
        if len(fitting) < len(found):
            return operator_api.Messages(messages=tuple(map(view, fitting)), next=fitting[-1].id, more=True)
        looked = len(rows) == _ROWS_MAX
        return operator_api.Messages(
            messages=tuple(map(view, fitting)), next=rows[-1].id if looked else max(after, newest), more=looked
        )


def _fitting(rows: list[ReadingRow]) -> list[ReadingRow]:
    """Return the first rows, as many as one reply may have, and at least one."""
    size = 0
    for number, row in enumerate(rows):
        size += len(wire.encode(view(row)))
        if number and size > _REPLY_MAX_BYTES:
            return rows[:number]
    return rows


def view(row: ReadingRow) -> operator_api.MessageView:
    """Return a message as operators see it."""
    return operator_api.MessageView(
        number=row.id,
        device=row.device,
        instance=row.instance,
        sequence=row.sequence,
        epoch=row.epoch,
        at=utc(row.at),
        received_at=utc(row.received_at),
        topic=row.topic,
        data=row.data,
        content_type=row.content_type,
        metadata=row.metadata,
    )

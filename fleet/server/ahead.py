"""Devices ahead of the server: their assignment is newer than any that this database knows.

After a server was made anew from a backup, a device may have accepted an assignment that was signed later. The server
neither takes it back silently nor guesses: such a device gets no assignment, is named in `fleet status`, and waits
for `fleet server reconcile`. Revocations pass, since they need no assignment. Nothing is signed for a device from
before the restore until it has said which assignment it has: a backup's database carries a mark.

Such a device shows its assignment over HTTPS, where it is verified by the director's own key. What was shown is kept in
memory: a device shows it again at each poll while it is ahead.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Final, NamedTuple

from fleet.protocol import wire
from fleet.protocol.assignment import Assignment, Item
from fleet.protocol.operator_api import AheadDevice, ReconcileRequest, Reconciliation, Refusal
from fleet.rollout.effective import Effective
from fleet.rollout.model import Value
from fleet.server.director import Director
from fleet.server.facts import chosen, read_selector
from fleet.server.rollout_controller import RolloutController
from fleet.server.tuf_repository import TufRepository
from fleet.store.rows import DeviceRow
from fleet.store.store import Store
from signing.errors import Rejected

log = logging.getLogger(__name__)
SHOWN_MAX_BYTES: Final = 64 * 1024 * 1024
"""Size of all shown assignments together; a device has a few KiB."""

_NAMED_MAX: Final = 5


class _Shown(NamedTuple):
    """Assignment as a device showed it, verified."""

    assignment: Assignment
    envelope: bytes


_SIGNS: Final = frozenset(" =<>()!")
"""Without any of these a selector is a device."""


class AheadDevices:
    """Names devices that are ahead, and reconciles them on an operator's word.

    Attributes:
        director: signs assignments.
        controller: of rollouts, which is told of devices that poll.

    Args:
        clock: the time, UTC.
    """

    def __init__(
        self,
        *,
        store: Store,
        repository: TufRepository,
        director: Director,
        controller: RolloutController,
        clock: Callable[[], datetime],
    ) -> None:
        self.director = self._director = director
        self._store, self._repository = store, repository
        self.controller = self._controller = controller
        self._clock = clock
        self._shown: dict[str, _Shown] = {}

    def show(self, device: DeviceRow, envelope: bytes) -> None:
        """Keep the assignment that a device shows.

        Raises:
            Refusal: the device is not ahead, or its director is not this one.
        """
        if not self._director.is_ahead(device):
            raise Refusal(409, "not-ahead", "this device is not ahead of its server")
        try:
            assignment = self._director.verified(device.id, envelope)
        except Rejected as error:
            raise Refusal(422, "bad-assignment", f"the assignment cannot be taken: {error.message}") from error
        if assignment.version < device.accepted:
            raise Refusal(422, "bad-assignment", f"assignment {assignment.version} is older than the accepted one")
        kept = sum(len(each.envelope) for name, each in self._shown.items() if name != device.id)
        if kept + len(envelope) > SHOWN_MAX_BYTES:
            self._shown.clear()
        self._shown[device.id] = _Shown(assignment, envelope)

    def count(self) -> int:
        """Return the number of devices with newer assignments than the server's."""
        return len(self._ahead(""))

    def problems(self) -> list[str]:
        """Name the devices that are ahead, and those of which a restored server does not know it yet."""
        rows = self._ahead("")
        unheard = [row.id for row in rows if self._director.is_unheard(row)]
        ahead = [row.id for row in rows if row.id not in set(unheard)]
        found = []
        if ahead:
            said = f"{len(ahead)} devices have newer assignments than this server, and get none: {_some(ahead)}"
            found.append(f"{said}; fleet server reconcile shows them, and --adopt or --impose decides")
        if unheard:
            said = "get no assignment until they say what they run, since this server was restored from a backup"
            found.append(f"{len(unheard)} devices {said}: {_some(unheard)}")
        return found

    def reconcile(self, request: ReconcileRequest, *, by: str) -> Reconciliation:
        """Tell what would be done with the devices that are ahead; do it unless it is a dry run.

        Devices with an obstacle are left as they are, and named with it.

        Raises:
            Refusal: the selector cannot be meant.
        """
        rows = self._ahead(request.selector)
        views = tuple(self._view(row, request) for row in rows)
        if not request.dry_run:
            for row, view in zip(rows, views, strict=True):
                if not view.obstacle:
                    self._carry_out(row, request.mode, by=by)
        return Reconciliation(devices=views, done=not request.dry_run)

    def _ahead(self, selector: str) -> list[DeviceRow]:
        rows = [row for row in self._store.devices.all() if not row.revoked and self._director.is_ahead(row)]
        gone = self._shown.keys() - {row.id for row in rows}
        if not selector:
            for device in gone:
                del self._shown[device]
            return rows
        if not _SIGNS & set(selector):
            if self._store.devices.get(selector) is None:
                raise Refusal(
                    404, "unknown-device", f"there is no device {selector}", action="fleet devices lists them"
                )
            return [row for row in rows if row.id == selector]
        taken = chosen(self._store, read_selector(selector, "selector"), rows)
        return [row for row in rows if row.id in taken]

    def _view(self, row: DeviceRow, request: ReconcileRequest) -> AheadDevice:
        current, shown = self._store.delivery.assignment(row.id), self._current(row)
        wanted = {name: each.value.target for name, each in sorted(self._director.effective(row).items())}
        return AheadDevice(
            device=row.id,
            online=row.online,
            accepted=row.accepted,
            assigned=0 if current is None else current.version,
            has=None if shown is None else {item.instance: item.target for item in shown.assignment.items},
            wants={name: target for name, target in wanted.items() if target is not None},
            obstacle=self._obstacle(row, shown, request),
        )

    def _current(self, row: DeviceRow) -> _Shown | None:
        """Return the assignment that the device showed, unless it has accepted a newer one since."""
        shown = self._shown.get(row.id)
        return shown if shown is not None and shown.assignment.version >= row.accepted else None

    def _obstacle(self, row: DeviceRow, shown: _Shown | None, request: ReconcileRequest) -> str:
        """Return why a device cannot be reconciled, in words; empty for nothing.

        The server's state is imposed on a device that has not been heard only by name: its version may be too low.
        """
        if request.mode == "impose":
            unheard = self._director.is_unheard(row) and request.selector != row.id
            return "it has said nothing since the restore: wait until it is online, or name it" if unheard else ""
        if shown is None:
            return "it has not shown its assignment: wait until it is online, or upgrade its agent"
        unknown = [item.target for item in shown.assignment.items if self._repository.release(item.target) is None]
        if unknown:
            return f"{unknown[0]} is not published here: publish it again"
        boxes = self._store.boxes.newest(row.id)
        for item in shown.assignment.items:
            for ref in item.secrets:
                box = boxes.get((item.instance, ref.name))
                if box is None or box.version < ref.version:
                    return f"it holds a newer secret {ref.name} than this server: fleet secret set {ref.name}"
        return ""

    def _carry_out(self, row: DeviceRow, mode: str, *, by: str) -> None:
        now = self._clock().timestamp()
        with self._store.atomic():
            if mode == "adopt":
                shown = self._current(row)
                assert shown is not None, "a device without an assignment has an obstacle"
                self._adopt(row, shown, now)
            detail = f"{mode}: assignment {row.accepted} of the device"
            self._store.access.audit(actor=by, act="reconcile", subject=row.id, detail=detail, now=now)
            self._store.devices.note(row.id, "reconcile", f"{mode} by {by}", now=now, assignment=row.accepted)
            signed = None if mode == "adopt" else self._director.prepare(row.id, above=True)[0]
        if signed is not None:
            self._director.publish_assignment(signed)
        self._shown.pop(row.id, None)
        self._controller.touch([row.id])

    def _adopt(self, row: DeviceRow, shown: _Shown, now: float) -> None:
        """Take a device's assignment for this server's newest; what differs from its groups' values becomes a pin."""
        effective, own = self._director.effective(row), self._store.rollouts.own_keys(row.id)
        attempts = self._store.delivery.attempts(row.id)
        self._director.adopt(row.id, shown.assignment, shown.envelope)
        for item in shown.assignment.items:
            value, held = _value_of(item), effective.get(item.instance)
            if item.attempt > attempts.get(item.instance, 0):
                self._store.delivery.set_attempt(row.id, item.instance, item.attempt)
            release, mine = self._repository.release(item.target), own.get(item.instance, {})
            for key in mine.keys() & (release.manifest.config.keys() if release is not None else set()):
                if item.config.get(key) != mine[key]:
                    self._store.rollouts.set_own_key(row.id, item.instance, key, item.config.get(key))
            shared = _without(value, mine)
            if held is None or not _without(held.value, mine).same(shared):
                self._pin(row.id, item.instance, shared, item.rollout, now)
        for instance in _unlisted(effective, shown.assignment):
            absent = Value(None, keep_data=instance in shown.assignment.keep_data)
            self._pin(row.id, instance, absent, "", now)

    def _pin(self, device: str, instance: str, value: Value, rollout: str, now: float) -> None:
        self._store.rollouts.settle(group="", device=device, instance=instance, value=value, rollout=rollout, now=now)


def _some(devices: list[str]) -> str:
    return ", ".join(devices[:_NAMED_MAX]) + (" ..." if len(devices) > _NAMED_MAX else "")


def _unlisted(effective: Mapping[str, Effective], assignment: Assignment) -> list[str]:
    """Return the instances that the server wants and the device's assignment does not have."""
    listed = {item.instance for item in assignment.items}
    return [name for name, each in effective.items() if each.value.target is not None and name not in listed]


def _without(value: Value, keys: Mapping[str, str]) -> Value:
    """Return a value without the device's own keys, which are no part of what a group or a pin supplies."""
    return replace(value, config=tuple(pair for pair in value.config if pair[0] not in keys))


def _value_of(item: Item) -> Value:
    return Value(
        item.target,
        tuple(sorted(item.config.items())),
        "" if item.grants is None else wire.canonical(item.grants).decode(),
        item.port,
        attempt=item.attempt,
        share_worker=item.share_worker,
    )

"""Director: signs each device's assignment, freshness statements and commands.

An assignment is a function of the store: settled values, pins and the rollouts offered to the device. The director
signs again only when the content changes, or before the assignment expires. A device that has accepted a newer one than
is stored here is ahead of a restored database: it gets none until an operator decides (`fleet.server.ahead`).
"""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

import msgspec
from securesystemslib.signer import Signer

from fleet.protocol import bounds, wire
from fleet.protocol.assignment import (
    Assignment,
    CheckIn,
    Command,
    Diagnose,
    FollowLogs,
    Fresh,
    Item,
    Restart,
    SecretRef,
)
from fleet.protocol.manifest import Grants
from fleet.protocol.messages import Ack, ReadingsAck
from fleet.protocol.topics import Down, Topic
from fleet.rollout.effective import (
    Effective,
    Fitness,
    Group,
    Key,
    Overlay,
    SettledValue,
    Withdrawal,
    effective,
    safe_value,
    sources,
)
from fleet.rollout.model import Member, held_back, wants
from fleet.server.tuf_repository import TufRepository
from fleet.store.delivery import BoxRow
from fleet.store.rows import AssignmentRow, DeviceRow, RolloutRow, SettledRow
from fleet.store.store import DeviceFacts, Store
from signing import director, dsse
from signing.policy import Release

log = logging.getLogger(__name__)
LIFE: Final = timedelta(days=30)
_SHOWN_CHARS: Final = 80
RENEW_BEFORE: Final = LIFE / 3
FRESH_LIFE: Final = timedelta(minutes=10)
COMMAND_LIFE: Final = timedelta(minutes=5)
_PLAUSIBLE: Final = 2**40
"""Largest plausible version of an assignment: 30,000 a second for a year."""

Publish = Callable[[Topic, bytes], bool]


class _Wanted(msgspec.Struct):
    """Part of an assignment that `_asked` compares."""

    items: tuple[Item, ...] = ()
    keep_data: tuple[str, ...] = ()


def items_of(row: AssignmentRow | None) -> tuple[Item, ...]:
    """Return the items of an assignment; none for None."""
    return () if row is None else msgspec.json.decode(row.wanted, type=_Wanted).items


class SentCommand(NamedTuple):
    """Signed command; `sent` tells whether the broker accepted it."""

    sequence: int
    expires: datetime
    sent: bool


class Director:
    """Signer of assignments, freshness statements and commands.

    Args:
        publish: sends a message to the broker; returns False without a connection.
        clock: returns the present time, UTC.
    """

    def __init__(
        self,
        *,
        store: Store,
        repository: TufRepository,
        signer: Signer,
        fleet: str,
        publish: Publish,
        clock: Callable[[], datetime],
    ) -> None:
        self._store, self._repository, self._signer, self._fleet = store, repository, signer, fleet
        self._publish, self._clock = publish, clock
        self._restored_at = store.restored_at(now=clock().timestamp())
        self._heard: set[str] = set()

    def effective(
        self,
        device: DeviceRow,
        assumed: Iterable[Overlay] = (),
        *,
        after: Withdrawal | None = None,
        facts: DeviceFacts | None = None,
    ) -> dict[str, Effective]:
        """Return the desired value of each instance of a device, also of removed ones, with its source.

        Args:
            device: of the fleet.
            assumed: rollouts that are not there yet, in force as if they had been offered.
            after: a withdrawal that is not there yet, as if it had been carried out.
            facts: of the device, where the caller has read them; otherwise they are read now.
        """
        facts = facts or self._store.facts([device])[device.id]
        groups = [Group(group.name, group.priority, self._settled(facts, group.name, after)) for group in facts.groups]
        pins = _values(facts.settled[""], after)
        in_force = facts.in_force
        if after is not None:
            in_force = _left(in_force, after.ended)
        overlays = [
            Overlay(row.id, row.number, row.group, row.instance, row.value)
            for row, member in in_force
            if wants(row.state, member)
        ]
        return effective(groups, pins, [*overlays, *assumed], own=facts.own)

    def _settled(self, facts: DeviceFacts, group: str, after: Withdrawal | None) -> dict[str, SettledValue]:
        """Return the settled values of a group for one device, by instance.

        A rollout whose selector left the device out settled nothing for it: the value before that one stands, or what
        takes its place when its release was withdrawn.
        """
        values, unselected = _values(facts.settled[group], after), facts.unselected
        for instance, held in list(values.items()):
            if held.rollout not in unselected:
                continue
            history = self._store.rollouts.settled_history(
                group=group, device="", instance=instance, without=unselected
            )
            found = self._standing(history, after)
            if found is None:
                del values[instance]
            else:
                values[instance] = found
        return values

    def _standing(self, history: Sequence[SettledValue], after: Withdrawal | None) -> SettledValue | None:
        """Return the newest of some values, or what takes its place where its release is not published any more."""
        if not history:
            return None
        newest, gone = history[0], "" if after is None else after.target
        target = newest.value.target
        if target is None or (target != gone and self._repository.release(target) is not None):
            return newest
        return self.replacement(newest.rollout, history[1:], without=gone)

    def replacement(self, rollout: str, history: Iterable[SettledValue], *, without: str = "") -> SettledValue | None:
        """Return the value that takes the place of a withdrawn one; None: the devices run nothing.

        Args:
            rollout: id of the rollout that brought the withdrawn value; empty for none.
            history: values before it, newest first.
            without: target of a release that is about to be withdrawn; empty for none.
        """
        brought = self._store.rollouts.get(rollout) if rollout else None
        published = {
            release.name.path: Fitness(release.manifest.security_epoch, release.manifest.data_schema)
            for release in self._repository.releases()
            if release.name.path != without
        }
        return safe_value(Fitness(0, 0) if brought is None else brought.plan.fitness, history, published)

    def keys(self, device: DeviceRow, wanted: Mapping[str, Effective]) -> dict[str, dict[str, Key]]:
        """Return the configuration keys of each wanted instance of a device, each with its value and source."""
        own, found = self._store.rollouts.own_keys(device.id), {}
        for instance, each in wanted.items():
            if each.value.target is None:
                continue
            release = self._repository.release(each.value.target)
            declared = None if release is None else {key: of.default for key, of in release.manifest.config.items()}
            found[instance] = sources(each.value, each.source, declared=declared, own=own.get(instance, {}))
        return found

    def targets_after(self, device: DeviceRow, withdrawal: Withdrawal) -> dict[str, str]:
        """Return the target of each instance that a device runs once a release is withdrawn."""
        facts, found = self._store.facts([device])[device.id], {}
        boxes, own = facts.boxes, facts.own
        for instance, each in self.effective(device, after=withdrawal, facts=facts).items():
            release = None if each.value.target is None else self._repository.release(each.value.target)
            if release is None or unfit(release, device):
                continue
            barred = bool(lacks(release, instance, boxes) or bad_key(release, own.get(instance, {})))
            kept = self._kept(device.id, instance, each, barred=barred)
            targets = [release.name.path] if kept is None else [item.target for item in kept]
            if targets and targets[0] != withdrawal.target:
                found[instance] = targets[0]
        return found

    def _held_back(self, device: str, each: Effective) -> bool:
        """Tell whether a settled value waits in its catch-up queue: the device keeps what it was assigned before."""
        if each.source.startswith("rollout ") or not each.rollout:
            return False
        found = self._store.rollouts.member_of(each.rollout, device)
        return found is not None and held_back(found)

    def reconcile(self, device: str, *, renew: bool = False) -> AssignmentRow | None:
        """Sign a device's assignment where its content changed, and publish it.

        Returns:
            The assignment in force; None for a device that never had one.
        """
        row, changed = self.prepare(device, renew=renew)
        if row is not None and changed:
            self.publish_assignment(row)
        return row

    def is_ahead(self, device: DeviceRow) -> bool:
        """Tell whether a device has accepted a newer assignment than is stored here, or may have, unheard."""
        return self.is_ahead_of(device, self._store.delivery.assignment(device.id))

    def is_ahead_of(self, device: DeviceRow, newest: AssignmentRow | None) -> bool:
        """Tell the same, given the newest assignment of the device."""
        if self.is_unheard(device, newest):
            return True
        # A larger version came from a stolen key of the director: devices forget it with that key, and so does this.
        return (0 if newest is None else newest.version) < device.accepted <= _PLAUSIBLE

    def heard(self, device: str) -> bool:
        """Note that a device has said which assignment it has accepted; true when that is news to a restored server."""
        if self._restored_at is None or device in self._heard:
            return False
        self._heard.add(device)
        return True

    def is_unheard(self, device: DeviceRow, newest: AssignmentRow | None = None) -> bool:
        """Tell whether a restored server has not heard yet what a device of before has accepted meanwhile."""
        since = self._restored_at
        if since is None or device.id in self._heard or device.enrolled_at >= since:
            return False
        current = newest or self._store.delivery.assignment(device.id)
        return current is None or current.issued < since

    def prepare(self, device: str, *, renew: bool = False, above: bool = False) -> tuple[AssignmentRow | None, bool]:
        """Sign and keep an assignment where it changed, without publishing it.

        Args:
            device: a device that is ahead of the server gets none.
            renew: sign although nothing changed.
            above: sign for a device that is ahead too, with a version that it accepts.

        Returns:
            The newest assignment, and whether there is something to publish.
        """
        row = self._store.devices.get(device)
        if row is None:
            return self._store.delivery.assignment(device), False
        return self.prepare_by(self._store.facts([row])[device], renew=renew, above=above)

    def prepare_by(
        self, facts: DeviceFacts, *, renew: bool = False, above: bool = False
    ) -> tuple[AssignmentRow | None, bool]:
        """Do as `prepare` does, by facts that were read a moment ago."""
        row, current, device = facts.device, facts.newest, facts.device.id
        if row.revoked or (not above and self.is_ahead_of(row, current)):
            return current, False
        wanted = self._wanted(facts)
        asked = _asked(wanted)
        if current is None and not wanted.items and not above:
            return None, False
        accepted = row.accepted if row.accepted <= _PLAUSIBLE else 0
        stands = current is not None and current.wanted == asked and current.version >= accepted
        if stands and not (renew or above) and current is not None and self._is_signed(current.envelope):
            return current, False
        version = max(current.version if current is not None else 0, accepted) + 1
        now = self._clock()
        assignment = msgspec.structs.replace(
            wanted, version=version, issued=now, expires=now + LIFE, snapshot=self._repository.snapshot_version
        )
        envelope = director.sign_assignment(assignment, self._signer)
        signed = AssignmentRow(
            device=device,
            version=version,
            sha256=director.payload_sha256(envelope),
            issued=now.timestamp(),
            expires=assignment.expires.timestamp(),
            wanted=asked,
            envelope=envelope,
        )
        with self._store.atomic():
            self._store.delivery.add_assignment(signed)
            words = ", ".join(f"{item.instance} = {item.target}" for item in assignment.items) or "nothing"
            self._store.devices.note(device, "assigned", f"should run {words}", now=now.timestamp(), assignment=version)
        return signed, True

    def verified(self, device: str, envelope: bytes) -> Assignment:
        """Return an assignment of this device that the director's present key signed.

        Raises:
            Rejected: another key did, or it is another device's.
        """
        return director.own_assignment(envelope, self._signer.public_key, fleet=self._fleet, device=device)

    def adopt(self, device: str, assignment: Assignment, envelope: bytes) -> None:
        """Keep an assignment that a device showed as the newest of this device; see `verified`."""
        self._store.delivery.add_assignment(
            AssignmentRow(
                device=device,
                version=assignment.version,
                sha256=director.payload_sha256(envelope),
                issued=assignment.issued.timestamp(),
                expires=assignment.expires.timestamp(),
                wanted=_asked(assignment),
                envelope=envelope,
            )
        )

    def _is_signed(self, envelope: bytes) -> bool:
        """Tell whether the director's present key signed an assignment; after a rotation each is signed again."""
        return self._signer.public_key.keyid in dsse.parse(envelope).signatures

    def publish_assignment(self, row: AssignmentRow) -> bool:
        """Put an assignment on the device's retained topic."""
        return self._publish(Topic(row.device, Down.DESIRED), row.envelope)

    def acknowledge(self, device: str, ack: Ack) -> bool:
        """Tell a device which of its reports are stored; unsigned, as it decides nothing."""
        return self._publish(Topic(device, Down.ACK), wire.encode(ack))

    def acknowledge_readings(self, device: str, ack: ReadingsAck) -> bool:
        """Tell a device which of its readings are stored; unsigned, as it decides nothing."""
        return self._publish(Topic(device, Down.READINGS), wire.encode(ack))

    def answer_nonce(self, device: str, nonce: str) -> bool:
        """Publish the freshness statement for a nonce; return False when the device has no assignment."""
        row = self._store.delivery.assignment(device)
        return row is not None and self._publish(Topic(device, Down.FRESH), self.vouch(row, nonce))

    def vouch(self, row: AssignmentRow, nonce: str) -> bytes:
        """Sign the freshness statement of an assignment for a nonce."""
        now = self._clock()
        fresh = Fresh(
            fleet=self._fleet,
            device=row.device,
            nonce=nonce,
            assignment_sha256=row.sha256,
            issued=now,
            expires=now + FRESH_LIFE,
        )
        return director.sign_fresh(fresh, self._signer)

    def command(self, device: str, verb: CheckIn | Restart | FollowLogs | Diagnose) -> SentCommand:
        """Sign and send a command."""
        now = self._clock()
        command = Command(
            fleet=self._fleet,
            device=device,
            sequence=self._store.devices.next_command(device, at_least=int(now.timestamp())),
            issued=now,
            expires=now + COMMAND_LIFE,
            verb=verb,
        )
        sent = self._publish(Topic(device, Down.COMMAND), director.sign_command(command, self._signer))
        return SentCommand(command.sequence, command.expires, sent)

    @property
    def fleet(self) -> str:
        """Name of the fleet."""
        return self._fleet

    def _assigned(self, device: str, instance: str) -> list[Item]:
        """Return the item of this name in the newest assignment, if its release may still run."""
        row = self._store.delivery.assignment(device)
        return [
            item
            for item in items_of(row)
            if item.instance == instance and self._repository.release(item.target) is not None
        ]

    def _before(self, device: str, instance: str, rollout: str) -> list[Item]:
        """Return the item that a device had under this name before a rollout offered it another."""
        for row in self._store.delivery.assignments(device):
            items = [item for item in items_of(row) if item.instance == instance]
            if not any(item.rollout == rollout for item in items):
                return [item for item in items if self._repository.release(item.target) is not None]
        return []

    def _kept(self, device: str, instance: str, each: Effective, *, barred: bool) -> list[Item] | None:
        """Return what a device keeps while it waits in a catch-up queue, or is barred; None where it gets the new one.

        A secret that it lacks bars it, or a key of its own that the release does not take.
        """
        if self._held_back(device, each):
            return self._before(device, instance, each.rollout)
        return self._assigned(device, instance) if barred else None

    def has_another(self, device: str, instance: str, rollout: str) -> bool:
        """Tell whether the newest assignment has an instance of this name that another rollout brought."""
        return any(item.rollout != rollout for item in self._assigned(device, instance))

    def _wanted(self, facts: DeviceFacts) -> Assignment:
        """Return the content of a device's assignment, without version and times."""
        device, attempts, boxes, own = facts.device, facts.attempts, facts.boxes, facts.own
        items: list[Item] = []
        wanted = self.effective(device, facts=facts)
        kept = _forgotten(facts.newest, wanted)
        for instance, each in sorted(wanted.items()):
            release = None if each.value.target is None else self._repository.release(each.value.target)
            if release is None:
                if each.value.target is not None:
                    log.warning("%s: %s is not published any more and is taken off", device.id, each.value.target)
                if each.value.keep_data or each.value.target is not None:
                    kept.append(instance)
                continue
            if unfit(release, device):  # the preflight said so
                kept.append(instance)
                continue
            barred = bool(lacks(release, instance, boxes) or bad_key(release, own.get(instance, {})))
            before = self._kept(device.id, instance, each, barred=barred)
            if before is not None:
                items += before
                kept += [] if before else [instance]
                continue
            items.append(
                Item(
                    instance=instance,
                    target=release.name.path,
                    length=release.length,
                    sha256=release.sha256,
                    manifest_sha256=release.manifest_sha256,
                    grants=msgspec.json.decode(each.value.grants, type=Grants) if each.value.grants else None,
                    config={key: value for key, value in each.value.config if key in release.manifest.config},
                    secrets=_refs(release, instance, boxes),
                    port=each.value.port,
                    share_worker=each.value.share_worker,
                    attempt=max(each.value.attempt, attempts.get(instance, 0)),
                    rollout=each.rollout,
                    atomic=each.value.atomic,
                )
            )
        epoch = datetime.fromtimestamp(0, self._clock().tzinfo)
        return Assignment(
            fleet=self._fleet,
            device=device.id,
            version=0,
            issued=epoch,
            expires=epoch,
            items=tuple(items[: bounds.ITEMS_MAX]),
            stop_all=not items,
            keep_data=tuple(sorted(kept)),
        )


def _forgotten(newest: AssignmentRow | None, wanted: Mapping[str, Effective]) -> list[str]:
    """Return instances of the newest assignment that nobody speaks of any more: nobody asked to delete their data.

    A rollout that was taken back may have brought them, or a group that the device has left.
    """
    if newest is None:
        return []
    before = msgspec.json.decode(newest.wanted, type=_Wanted)
    known = {*(item.instance for item in before.items), *before.keep_data}
    return [instance for instance in known if instance not in wanted]


def _values(rows: Iterable[SettledRow], after: Withdrawal | None) -> dict[str, SettledValue]:
    """Return settled values by instance, as a withdrawal leaves them."""
    replaced = {} if after is None else after.replaced
    found = {
        row.instance: replaced.get((row.group, row.device, row.instance), SettledValue(row.value, row.rollout))
        for row in rows
    }
    return {instance: held for instance, held in found.items() if held is not None}


def _left(in_force: Iterable[tuple[RolloutRow, Member]], ended: Collection[int]) -> list[tuple[RolloutRow, Member]]:
    """Return the rollouts that stay in force when some end, and with them those whose place they had taken."""
    gone, left = set(ended), []
    for row, member in sorted(in_force, key=lambda each: -each[0].number):
        if row.number in gone or row.superseded_by in gone:
            gone.add(row.number)
        else:
            left.append((row, member))
    return left


def lacks(release: Release | None, instance: str, boxes: Mapping[tuple[str, str], BoxRow]) -> tuple[str, ...]:
    """Return the secrets that a release requires and of which a device has no box."""
    declared = {} if release is None else release.manifest.secrets
    return tuple(name for name, key in sorted(declared.items()) if key.required and (instance, name) not in boxes)


def bad_value(release: Release, key: str, value: str) -> str:
    """Say why a release does not take a value of a configuration key; empty where it does, or does not know the key."""
    declared = release.manifest.config.get(key)
    wrong = "" if declared is None else declared.flaw(value)
    return f"{key}={value[:_SHOWN_CHARS]!r} is {wrong}" if wrong else ""


def bad_key(release: Release | None, own: Mapping[str, str]) -> str:
    """Say which of a device's own keys a release does not take, and why; empty for none."""
    flaws = () if release is None else (bad_value(release, key, value) for key, value in sorted(own.items()))
    return next((wrong for wrong in flaws if wrong), "")


def _refs(release: Release, instance: str, boxes: Mapping[tuple[str, str], BoxRow]) -> tuple[SecretRef, ...]:
    """Return references to the boxes of the secrets that a release declares; it gets no others."""
    found = [boxes[instance, name] for name in sorted(release.manifest.secrets) if (instance, name) in boxes]
    return tuple(SecretRef(name=box.name, sha256=box.sha256, version=box.version) for box in found)


def unfit(release: Release, device: DeviceRow) -> str:
    """Say why a device can never run a release; empty when it can."""
    machine = device.versions.machine or device.machine
    if release.manifest.arch and machine and machine not in release.manifest.arch:
        return f"its CPU is {machine}, the manifest allows {', '.join(release.manifest.arch)}"
    return ""


def _asked(wanted: Assignment) -> str:
    """Return the part of an assignment that is equal when two ask for the same."""
    asked: dict[str, Any] = {"items": wanted.items, "stop_all": wanted.stop_all, "keep_data": wanted.keep_data}
    return wire.canonical(asked).decode()

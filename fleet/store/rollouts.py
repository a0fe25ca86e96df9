"""Rollouts, the progress of each device in them, and the settled values that they leave behind."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import msgspec

from fleet.protocol import bounds
from fleet.protocol.codes import OPEN_STATES, RolloutState
from fleet.rollout.decide import Rollout
from fleet.rollout.effective import SettledValue
from fleet.rollout.model import Member, Value
from fleet.rollout.steady import Witness
from fleet.store.rows import Extra, RolloutPlan, RolloutRow, SettledRow, read
from fleet.store.sqlite import Database, text

_OPEN = tuple(sorted(OPEN_STATES))
_UNENDED = OPEN_STATES | {RolloutState.SCHEDULED}
_DECODER = msgspec.json.Decoder(Member)
_LIVE: Final = """
    WITH RECURSIVE live (number) AS (
        SELECT number FROM rollouts WHERE state IN (?, ?)
        UNION SELECT r.number FROM rollouts r JOIN live ON r.superseded_by = live.number
    )
"""
_STANDS: Final = """(r.id IN (SELECT rollout FROM settled) OR EXISTS (
    SELECT 1 FROM settled s JOIN rollouts n ON n.id = s.rollout
    JOIN rollout_devices o ON o.rollout = n.number AND o.device = b.device
    WHERE s."group" = r."group" AND s.device = r.device AND s.instance = r.instance
    AND o.outcome = 'not-affected' AND json_extract(o.member, '$.cancelled') AND json_extract(n.plan, '$.where') != ''
))"""
"""Condition that the value of a rollout `r` stands on its device `b`: settled, or left alone by the one that is."""


@dataclass(frozen=True, slots=True)
class NewRollout:
    """A rollout to be stored; fields as in `RolloutRow`."""

    id: str
    group: str
    device: str
    instance: str
    value: Value
    before: Value | None
    waves: str
    plan: RolloutPlan
    progress: Rollout
    members: tuple[Member, ...]
    by: str
    note: str = ""
    undoes: str = ""
    reason: str = ""


class Undecided(NamedTuple):
    """Device in a rollout that was offered to it: number of the rollout, progress, first assignment that offered it."""

    rollout: int
    member: Member
    version: int


class Rollouts:
    """Rollouts, open and ended, and settled values."""

    def __init__(self, db: Database) -> None:
        self._db = db

    # -- rollouts ----------------------------------------------------------------------------------------------------

    def create(self, new: NewRollout, *, now: float) -> RolloutRow:
        """Create a rollout, in the state of its progress."""
        with self._db.atomic():
            row = {
                "id": new.id,
                "group": new.group,
                "device": new.device,
                "instance": new.instance,
                "value": text(new.value),
                "before": text(new.before),
                "state": new.progress.state,
                "waves": new.waves,
                "plan": text(new.plan),
                "progress": text(new.progress),
                "reason": new.reason,
                "note": new.note,
                "by": new.by,
                "undoes": new.undoes,
                "created_at": now,
                "ended_at": None if new.progress.state in _UNENDED else now,
            }
            number = self._db.insert("rollouts", row)
            self.add_members(number, new.members)
        found = self.get(str(number))
        assert found is not None
        return found

    def add_members(self, number: int, members: Iterable[Member]) -> None:
        """Add devices to a rollout."""
        for member in members:
            self._db.insert("rollout_devices", {"rollout": number, **_columns(member)})

    def get(self, key: str) -> RolloutRow | None:
        """Return a rollout by id or number."""
        sql = "SELECT * FROM rollouts WHERE id = ? OR (number = ? AND ? GLOB '[0-9]*')"
        row = self._db.row(sql, key, key, key)
        return None if row is None else read(RolloutRow, row)

    def open(self) -> list[RolloutRow]:
        """Return rollouts that run or are paused, oldest first."""
        sql = "SELECT * FROM rollouts WHERE state IN (?, ?) ORDER BY number"
        return [read(RolloutRow, row) for row in self._db.rows(sql, *_OPEN)]

    def open_on(self, *, group: str, device: str, instance: str) -> list[RolloutRow]:
        """Return the open rollouts of an instance in one scope, oldest first."""
        sql = (
            'SELECT * FROM rollouts WHERE state IN (?, ?) AND "group" = ? AND device = ? AND instance = ? '
            "ORDER BY number"
        )
        return [read(RolloutRow, row) for row in self._db.rows(sql, *_OPEN, group, device, instance)]

    def together(self, row: RolloutRow) -> list[RolloutRow]:
        """Return the rollouts of the atomic set that contains `row`, oldest first; outside of a set, `row` alone."""
        if not row.value.atomic:
            return [row]
        sql = (
            "SELECT * FROM rollouts WHERE number BETWEEN ? AND ? AND json_extract(value, '$.atomic') = ? "
            "ORDER BY number"
        )
        span = bounds.ITEMS_MAX
        found = self._db.rows(sql, row.number - span, row.number + span, row.value.atomic)
        return [read(RolloutRow, each) for each in found]

    def newest(self, limit: int, *, group: str | None = None) -> list[RolloutRow]:
        """Return rollouts of a group or of all, newest first."""
        where = "" if group is None else 'WHERE "group" = ?'
        params = () if group is None else (group,)
        sql = f"SELECT * FROM rollouts {where} ORDER BY number DESC LIMIT ?"  # noqa: S608 - one of two constants
        return [read(RolloutRow, row) for row in self._db.rows(sql, *params, limit)]

    def overlays(self, device: str) -> list[tuple[RolloutRow, Member]]:
        """Return the rollouts in force that have a device, oldest first, with its progress.

        In force are open rollouts, and superseded ones while the rollout that superseded them is in force.
        """
        return self.overlays_of_each([device]).get(device, [])

    def overlays_of_each(self, devices: Iterable[str]) -> dict[str, list[tuple[RolloutRow, Member]]]:
        """Return the rollouts in force that have any of some devices, by device."""
        sql = (
            f"{_LIVE} SELECT b.rollout, b.member FROM rollout_devices b JOIN live ON live.number = b.rollout "  # noqa: S608 - ours
            "WHERE b.device IN (SELECT value FROM json_each(?)) ORDER BY b.rollout"
        )
        members = self._db.tuples(sql, *_OPEN, text(sorted(devices)))
        sql = "SELECT * FROM rollouts WHERE number IN (SELECT value FROM json_each(?))"
        numbers = text(sorted({number for number, _ in members}))
        rows = {row["number"]: read(RolloutRow, row) for row in self._db.rows(sql, numbers)} if members else {}
        found: dict[str, list[tuple[RolloutRow, Member]]] = {}
        for number, data in members:
            member = _member(data)
            found.setdefault(member.device, []).append((rows[number], member))
        return found

    def in_force(self) -> list[RolloutRow]:
        """Return the rollouts in force on any device, oldest first; see `overlays`."""
        sql = f"{_LIVE} SELECT r.* FROM rollouts r JOIN live USING (number) ORDER BY r.number"  # noqa: S608 - our own words
        return [read(RolloutRow, row) for row in self._db.rows(sql, *_OPEN)]

    def scheduled(self) -> list[RolloutRow]:
        """Return rollouts that begin at a time to come, oldest first."""
        sql = "SELECT * FROM rollouts WHERE state = ? ORDER BY number"
        return [read(RolloutRow, row) for row in self._db.rows(sql, RolloutState.SCHEDULED)]

    def queues(self) -> list[RolloutRow]:
        """Return succeeded rollouts whose value stands on some devices, of which some are to come or under way.

        The value stands where it is settled, and on devices that the selector of the rollout which settled another has
        left out.
        """
        sql = (
            "SELECT DISTINCT r.* FROM rollouts r JOIN rollout_devices b ON b.rollout = r.number "  # noqa: S608 - ours
            "WHERE r.state = ? AND b.outcome IN ('pending', 'waiting', 'deferred', 'in-progress', 'lost') "
            f"AND {_STANDS} ORDER BY r.number"
        )
        return [read(RolloutRow, row) for row in self._db.rows(sql, RolloutState.SUCCEEDED)]

    def queued_on(self, *, group: str, device: str, instance: str) -> list[RolloutRow]:
        """Return the succeeded rollouts of an instance in one scope that have devices without an outcome."""
        sql = (
            'SELECT DISTINCT r.* FROM rollouts r JOIN rollout_devices b ON b.rollout = r.number WHERE r."group" = ? '
            "AND r.device = ? AND r.instance = ? AND r.state = ? "
            "AND b.outcome IN ('pending', 'waiting', 'deferred', 'in-progress', 'lost') ORDER BY r.number DESC"
        )
        return [read(RolloutRow, row) for row in self._db.rows(sql, group, device, instance, RolloutState.SUCCEEDED)]

    def without(self, devices: Mapping[str, Iterable[str]]) -> dict[str, list[RolloutRow]]:
        """Return open rollouts of groups, and those that settled a present value, which do not have a device.

        Args:
            devices: the groups of each device.

        Returns:
            The rollouts of its groups that lack it, by device; devices that no rollout lacks are left out.
        """
        of = {device: set(groups) for device, groups in devices.items()}
        sql = (
            'SELECT r.* FROM rollouts r WHERE r."group" IN (SELECT value FROM json_each(?)) AND (r.state IN (?, ?) '
            "OR (r.state = ? AND r.id IN (SELECT rollout FROM settled WHERE device = ''))) ORDER BY r.number"
        )
        names = text(sorted(set().union(*of.values())))
        rows = [read(RolloutRow, row) for row in self._db.rows(sql, names, *_OPEN, RolloutState.SUCCEEDED)]
        sql = (
            "SELECT rollout, device FROM rollout_devices WHERE rollout IN (SELECT value FROM json_each(?)) "
            "AND device IN (SELECT value FROM json_each(?))"
        )
        known = set(self._db.tuples(sql, text([row.number for row in rows]), text(sorted(of)))) if rows else set()
        found = {
            device: [row for row in rows if row.group in groups and (row.number, device) not in known]
            for device, groups in of.items()
        }
        return {device: lacking for device, lacking in found.items() if lacking}

    def returning(self, device: str) -> list[RolloutRow]:
        """Return ended rollouts in which a device has not confirmed its previous version yet, newest first."""
        sql = (
            "SELECT r.* FROM rollouts r JOIN rollout_devices b ON b.rollout = r.number WHERE b.device = ? "
            "AND b.outcome = 'waiting' AND r.state NOT IN ('running', 'paused', 'succeeded') "
            "ORDER BY r.number DESC LIMIT 20"
        )
        return [read(RolloutRow, row) for row in self._db.rows(sql, device)]

    def save(self, number: int, progress: Rollout, *, reason: str, now: float) -> None:
        """Set how far a rollout is and why it waits; `now` is the time of its end where that is new."""
        ended = None if progress.state in _UNENDED else now
        self._db.run(
            "UPDATE rollouts SET state = ?, progress = ?, reason = ?, ended_at = coalesce(ended_at, ?), "
            "revision = revision + 1 WHERE number = ?",
            *(progress.state, text(progress), reason, ended, number),
        )

    def set_drawn(self, number: int, waves: str, before: Value | None) -> None:
        """Set the waves as they were drawn, and the settled value of that moment."""
        self._db.run("UPDATE rollouts SET waves = ?, before = ? WHERE number = ?", waves, text(before), number)

    def set_superseded_by(self, number: int, by: int) -> None:
        """Record the rollout that took the place of another."""
        self._db.run("UPDATE rollouts SET superseded_by = ? WHERE number = ?", by, number)

    def set_reason(self, number: int, reason: str) -> None:
        """Set why a rollout waits; nothing is written where that does not change."""
        self._db.run(
            "UPDATE rollouts SET reason = ?, revision = revision + 1 WHERE number = ? AND reason != ?",
            *(reason, number, reason),
        )

    # -- devices in a rollout -----------------------------------------------------------------------------------------

    def members(self, number: int) -> tuple[Member, ...]:
        """Return the devices of a rollout in the order of their waves, with only what decisions need."""
        sql = "SELECT member FROM rollout_devices WHERE rollout = ? ORDER BY wave, device"
        return tuple(_member(member) for (member,) in self._db.tuples(sql, number))

    def devices(self, number: int) -> list[tuple[Member, Extra]]:
        """Return the devices of a rollout in the order of their waves."""
        sql = "SELECT * FROM rollout_devices WHERE rollout = ? ORDER BY wave, device"
        return [(_member(row["member"]), read(Extra, row)) for row in self._db.rows(sql, number)]

    def member(self, number: int, device: str) -> tuple[Member, Extra] | None:
        """Return a device of a rollout."""
        row = self._db.row("SELECT * FROM rollout_devices WHERE rollout = ? AND device = ?", number, device)
        return None if row is None else (_member(row["member"]), read(Extra, row))

    def member_of(self, rollout: str, device: str) -> Member | None:
        """Return a device of a rollout by the id of the rollout."""
        found = self._db.value(
            "SELECT b.member FROM rollout_devices b JOIN rollouts r ON r.number = b.rollout "
            "WHERE r.id = ? AND b.device = ?",
            *(rollout, device),
        )
        return None if found is None else _member(found)

    def busy(self, but: Iterable[int]) -> frozenset[str]:
        """Return the devices that rollouts and catch-up queues have in progress, without those of some rollouts."""
        sql = (
            "SELECT DISTINCT b.device FROM rollouts r JOIN rollout_devices b ON b.rollout = r.number "  # noqa: S608 - ours
            f"WHERE (r.state IN (?, ?) OR (r.state = ? AND {_STANDS})) "
            "AND b.outcome IN ('waiting', 'deferred', 'in-progress', 'lost') "
            "AND r.number NOT IN (SELECT value FROM json_each(?))"
        )
        found = self._db.tuples(sql, *_OPEN, RolloutState.SUCCEEDED, text(sorted(but)))
        return frozenset(each for (each,) in found)

    def left_out(self, *, group: str, device: str, instance: str) -> set[str]:
        """Return the devices that an operator left out of the rollout which brought a settled value."""
        sql = (
            "SELECT b.device FROM settled s JOIN rollouts r ON r.id = s.rollout "
            'JOIN rollout_devices b ON b.rollout = r.number WHERE s."group" = ? AND s.device = ? AND s.instance = ? '
            "AND b.outcome = 'not-affected' AND json_extract(b.member, '$.cancelled')"
        )
        return {each for (each,) in self._db.tuples(sql, group, device, instance)}

    def unselected(self, devices: Iterable[str]) -> dict[str, set[str]]:
        """Return the ids of the rollouts whose selector left a device out and that have settled a value, by device."""
        sql = (
            "SELECT b.device, r.id FROM rollout_devices b JOIN rollouts r ON r.number = b.rollout "
            "WHERE b.device IN (SELECT value FROM json_each(?)) AND b.outcome = 'not-affected' "
            "AND r.state = 'succeeded' AND json_extract(b.member, '$.cancelled') "
            "AND json_extract(r.plan, '$.where') != ''"
        )
        found: dict[str, set[str]] = {}
        for device, rollout in self._db.tuples(sql, text(sorted(devices))):
            found.setdefault(device, set()).add(rollout)
        return found

    def waves(self, number: int) -> dict[int, int]:
        """Count a rollout's devices by wave; wave 0 has those that it does not concern."""
        sql = "SELECT wave, count(*) AS n FROM rollout_devices WHERE rollout = ? GROUP BY wave"
        return {row["wave"]: row["n"] for row in self._db.rows(sql, number)}

    def counts(self, number: int) -> dict[str, int]:
        """Count a rollout's devices by outcome."""
        sql = "SELECT outcome, count(*) AS n FROM rollout_devices WHERE rollout = ? GROUP BY outcome"
        return {row["outcome"]: row["n"] for row in self._db.rows(sql, number)}

    def failures(self, *, after: float) -> dict[str, int]:
        """Count devices that failed since `after`, by code, in rollouts that are open or ended since."""
        sql = (
            "SELECT json_extract(b.member, '$.code') AS code, count(*) AS n FROM rollouts r "
            "JOIN rollout_devices b ON b.rollout = r.number "
            "WHERE coalesce(r.ended_at, ?) >= ? AND b.outcome = 'failed' AND b.ended_at >= ? "
            "GROUP BY code ORDER BY code"
        )
        return {row["code"] or "": row["n"] for row in self._db.rows(sql, after, after, after)}

    def states(self) -> dict[str, int]:
        """Count rollouts by state."""
        rows = self._db.rows("SELECT state, count(*) AS n FROM rollouts GROUP BY state ORDER BY state")
        return {row["state"]: row["n"] for row in rows}

    def set_members(self, number: int, members: Iterable[Member], *, now: float) -> None:
        """Set the progress of devices, and raise the revision of the rollout; `now` is the time for people."""
        sql = f"{_SET_MEMBER} WHERE rollout = ? AND device = ?"
        for member in members:
            self._db.run(sql, *_progress(member, now), number, member.device)
        self.moved(number)

    def hear(
        self, number: int, member: Member, *, timings_ms: dict[str, int], log: tuple[str, ...], now: float
    ) -> None:
        """Set the progress of one device, and what it said beside it; the revision is raised by `moved`."""
        sql = f"{_SET_MEMBER}, timings_ms = ?, log = ? WHERE rollout = ? AND device = ?"
        self._db.run(sql, *_progress(member, now), text(timings_ms), text(log), number, member.device)

    def moved(self, number: int) -> None:
        """Raise the revision of a rollout, whose devices went on."""
        self._db.run("UPDATE rollouts SET revision = revision + 1 WHERE number = ?", number)

    def set_previous(self, number: int, device: str, target: str) -> None:
        """Record what the device should have run before the offer."""
        self._db.run("UPDATE rollout_devices SET previous = ? WHERE rollout = ? AND device = ?", target, number, device)

    def set_version(self, number: int, device: str, version: int) -> None:
        """Record which assignment first offered it to a device."""
        sql = "UPDATE rollout_devices SET version = ? WHERE rollout = ? AND device = ? AND version = 0"
        self._db.run(sql, version, number, device)

    def offered(self, device: str, *, undecided: bool) -> list[RolloutRow]:
        """Return rollouts offered to a device, newest first; with `undecided` those without an outcome on it."""
        extra = "AND b.outcome IN ('waiting', 'deferred', 'in-progress', 'lost')" if undecided else ""
        sql = (
            "SELECT r.* FROM rollouts r JOIN rollout_devices b ON b.rollout = r.number "  # noqa: S608 - one of two constants
            f"WHERE b.device = ? AND b.offered_at IS NOT NULL {extra} ORDER BY r.number DESC LIMIT 100"
        )
        return [read(RolloutRow, row) for row in self._db.rows(sql, device)]

    def undecided(self, devices: Iterable[str]) -> dict[str, list[Undecided]]:
        """Return what was offered to some devices and has no outcome on them, newest first, by device."""
        sql = (
            "SELECT rollout, member, version FROM rollout_devices WHERE device IN (SELECT value FROM json_each(?)) "
            "AND offered_at IS NOT NULL AND outcome IN ('waiting', 'deferred', 'in-progress', 'lost') "
            "ORDER BY rollout DESC"
        )
        found: dict[str, list[Undecided]] = {}
        for rollout, data, version in self._db.tuples(sql, text(sorted(devices))):
            member = _member(data)
            found.setdefault(member.device, []).append(Undecided(rollout, member, version))
        return found

    def settled_history(
        self, *, group: str, device: str, instance: str, without: Iterable[str] = ()
    ) -> list[SettledValue]:
        """Return the newest settled values of an instance in one scope, newest first, the present one left out.

        `without`: ids of rollouts whose values are left out, before any are counted.
        """
        sql = (
            'SELECT value, rollout FROM settled_history WHERE "group" = ? AND device = ? AND instance = ? '
            "AND rollout NOT IN (SELECT value FROM json_each(?)) ORDER BY id DESC LIMIT 100"
        )
        found = self._db.rows(sql, group, device, instance, text(sorted(without)))
        return [SettledValue(msgspec.json.decode(row["value"], type=Value), row["rollout"]) for row in found]

    def all_settled(self) -> list[SettledRow]:
        """Return every settled value of every group, and every pin."""
        return [
            read(SettledRow, row) for row in self._db.rows('SELECT * FROM settled ORDER BY "group", device, instance')
        ]

    # -- freezes, steady time, keys of devices ------------------------------------------------------------------------

    def freezes(self) -> dict[str, str]:
        """Return the reason of each freeze by group; the empty group stands for the whole fleet."""
        return {row["group"]: row["reason"] for row in self._db.rows('SELECT "group", reason FROM freezes')}

    def freeze(self, group: str, *, reason: str, by: str, now: float) -> None:
        """Record a freeze."""
        self._db.run("INSERT OR REPLACE INTO freezes VALUES (?, ?, ?, ?)", group, reason, by, now)

    def unfreeze(self, group: str) -> bool:
        """Remove a freeze; return False where there is none."""
        return self._db.run('DELETE FROM freezes WHERE "group" = ?', group) == 1

    def witness(self) -> Witness | None:
        """Return the last stored reading of both clocks."""
        found = self._db.value("SELECT value FROM meta WHERE key = 'steady'")
        return None if found is None else msgspec.json.decode(found, type=Witness)

    def set_witness(self, witness: Witness) -> None:
        """Store a reading of both clocks."""
        self._db.run("INSERT OR REPLACE INTO meta (key, value) VALUES ('steady', ?)", text(witness))

    def own_keys(self, device: str) -> dict[str, dict[str, str]]:
        """Return a device's own configuration keys by instance."""
        return self.own_keys_of_each([device]).get(device, {})

    def own_keys_of_each(self, devices: Iterable[str]) -> dict[str, dict[str, dict[str, str]]]:
        """Return the devices' own configuration keys, by device and instance."""
        found: dict[str, dict[str, dict[str, str]]] = {}
        sql = "SELECT device, instance, key, value FROM device_keys WHERE device IN (SELECT value FROM json_each(?))"
        for row in self._db.rows(sql, text(sorted(devices))):
            found.setdefault(row["device"], {}).setdefault(row["instance"], {})[row["key"]] = row["value"]
        return found

    def set_own_key(self, device: str, instance: str, key: str, value: str | None) -> None:
        """Set a device's own configuration key, or remove it (None)."""
        if value is None:
            sql = "DELETE FROM device_keys WHERE device = ? AND instance = ? AND key = ?"
            self._db.run(sql, device, instance, key)
        else:
            self._db.run("INSERT OR REPLACE INTO device_keys VALUES (?, ?, ?, ?)", device, instance, key, value)

    # -- settled values ----------------------------------------------------------------------------------------------

    def settled_in(self, groups: Iterable[str], devices: Iterable[str]) -> dict[tuple[str, str], list[SettledRow]]:
        """Return the settled values of groups and the pins of devices, by group and device, one of which is empty."""
        sql = (
            "SELECT * FROM settled WHERE (device = '' AND \"group\" IN (SELECT value FROM json_each(?))) "
            "OR (\"group\" = '' AND device IN (SELECT value FROM json_each(?))) ORDER BY instance"
        )
        found: dict[tuple[str, str], list[SettledRow]] = {}
        for row in self._db.rows(sql, text(sorted(groups)), text(sorted(devices))):
            found.setdefault((row["group"], row["device"]), []).append(read(SettledRow, row))
        return found

    def settled(self, *, group: str = "", device: str = "") -> list[SettledRow]:
        """Return the settled values of a group, or with `device` the pins of a device."""
        sql = 'SELECT * FROM settled WHERE "group" = ? AND device = ? ORDER BY instance'
        return [read(SettledRow, row) for row in self._db.rows(sql, group, device)]

    def pins(self) -> dict[str, list[str]]:
        """Return the pinned instances of each device."""
        found: dict[str, list[str]] = {}
        for row in self._db.rows("SELECT device, instance FROM settled WHERE device != '' ORDER BY device, instance"):
            found.setdefault(row["device"], []).append(row["instance"])
        return found

    def settled_value(self, *, group: str, device: str, instance: str) -> Value | None:
        """Return a settled value; None where there is none."""
        sql = 'SELECT value FROM settled WHERE "group" = ? AND device = ? AND instance = ?'
        found = self._db.value(sql, group, device, instance)
        return None if found is None else msgspec.json.decode(found, type=Value)

    def settled_by(self, *, group: str, device: str, instance: str) -> str:
        """Return the id of the rollout that brought a settled value; empty for none."""
        sql = 'SELECT rollout FROM settled WHERE "group" = ? AND device = ? AND instance = ?'
        return str(self._db.value(sql, group, device, instance) or "")

    def settle(self, *, group: str, device: str, instance: str, value: Value | None, rollout: str, now: float) -> None:
        """Set a settled value, or remove it (None); the value before goes to the history."""
        with self._db.atomic():
            self._db.run(
                'INSERT INTO settled_history ("group", device, instance, value, since, until, rollout) '
                'SELECT "group", device, instance, value, since, ?, rollout FROM settled '
                'WHERE "group" = ? AND device = ? AND instance = ?',
                *(now, group, device, instance),
            )
            self._db.run(
                'DELETE FROM settled WHERE "group" = ? AND device = ? AND instance = ?', group, device, instance
            )
            if value is not None:
                row = {"group": group, "device": device, "instance": instance, "value": text(value)}
                self._db.insert("settled", {**row, "since": now, "rollout": rollout})


def _columns(member: Member) -> dict[str, object]:
    return {"device": member.device, "outcome": member.outcome, "wave": member.wave, "member": text(member)}


_SET_MEMBER: Final = (
    "UPDATE rollout_devices SET outcome = ?, wave = ?, member = ?, offered_at = coalesce(offered_at, ?), "
    "acked_at = coalesce(acked_at, ?), ended_at = CASE WHEN ? IS NULL THEN NULL ELSE coalesce(ended_at, ?) END"
)


def _progress(member: Member, now: float) -> tuple[object, ...]:
    """Return the parameters of `_SET_MEMBER`."""
    times = [None if each is None else now for each in (member.offered_at, member.began_at, member.ended_at)]
    return (member.outcome, member.wave, text(member), *times, times[2])


def _member(column: str) -> Member:
    return _DECODER.decode(column)

"""Rollouts, the progress of each device in them, and the settled values that they leave behind."""

from collections.abc import Iterable

import msgspec

from fleet.protocol import bounds
from fleet.protocol.codes import OPEN_STATES, Outcome, RolloutState
from fleet.rollout.model import DeviceProgress, Value
from fleet.store.rows import Extra, RolloutRow, SettledRow, read
from fleet.store.sqlite import Database, text

_OPEN = tuple(sorted(OPEN_STATES))
_BOARD = tuple(name for name in DeviceProgress.__dataclass_fields__ if name != "online")


class Rollouts:
    """Rollouts, open and ended, and settled values."""

    def __init__(self, db: Database) -> None:
        self._db = db

    # -- rollouts ----------------------------------------------------------------------------------------------------

    def create(
        self,
        *,
        id: str,  # noqa: A002 - as the column
        group: str,
        device: str,
        instance: str,
        value: Value,
        before: Value | None,
        waves: str,
        sizes: tuple[int, ...],
        boards: Iterable[DeviceProgress],
        failures: int,
        soak_s: float,
        timeout_s: float,
        note: str,
        by: str,
        undoes: str,
        now: float,
    ) -> RolloutRow:
        """Create a rollout that runs."""
        with self._db.atomic():
            number = self._db.insert(
                "rollouts",
                {
                    "id": id,
                    "group": group,
                    "device": device,
                    "instance": instance,
                    "value": text(value),
                    "before": text(before),
                    "state": RolloutState.RUNNING,
                    "waves": waves,
                    "sizes": text(sizes),
                    "failures": failures,
                    "soak_s": soak_s,
                    "timeout_s": timeout_s,
                    "note": note,
                    "by": by,
                    "undoes": undoes,
                    "created_at": now,
                },
            )
            for board in boards:
                self._db.insert("rollout_devices", {"rollout": number, **_columns(board)})
        row = self.get(str(number))
        assert row is not None
        return row

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

    def overlays(self, device: str) -> list[RolloutRow]:
        """Return the rollouts in force that were offered to a device, oldest first.

        In force are open rollouts, and superseded ones while the rollout that superseded them is in force.
        """
        sql = """
            WITH RECURSIVE live (number) AS (
                SELECT number FROM rollouts WHERE state IN (?, ?)
                UNION SELECT r.number FROM rollouts r JOIN live ON r.superseded_by = live.number
            )
            SELECT r.* FROM rollouts r JOIN live USING (number) JOIN rollout_devices b ON b.rollout = r.number
            WHERE b.device = ? AND b.offered_at IS NOT NULL ORDER BY r.number
        """
        return [read(RolloutRow, row) for row in self._db.rows(sql, *_OPEN, device)]

    def offer(self, number: int, wave: int, *, now: float) -> None:
        """Record that a wave is offered to its devices."""
        with self._db.atomic():
            self._db.run(
                "UPDATE rollout_devices SET outcome = 'waiting', offered_at = ? "
                "WHERE rollout = ? AND wave = ? AND outcome = 'pending'",
                *(now, number, wave),
            )
            self._db.run("UPDATE rollouts SET wave = ?, revision = revision + 1 WHERE number = ?", wave, number)

    def set_state(
        self, number: int, state: RolloutState, *, reason: str = "", superseded_by: int = 0, now: float | None = None
    ) -> None:
        """Set the state of a rollout; `now` is the time of its end, None while it is open."""
        self._db.run(
            "UPDATE rollouts SET state = ?, reason = ?, superseded_by = ?, ended_at = ?, revision = revision + 1 "
            "WHERE number = ?",
            *(state, reason, superseded_by, now, number),
        )
        if state not in OPEN_STATES and state is not RolloutState.SUCCEEDED:
            self._db.run(
                "UPDATE rollout_devices SET outcome = 'skipped' WHERE rollout = ? "
                "AND outcome IN ('pending', 'waiting', 'deferred')",
                number,
            )

    def set_reason(self, number: int, reason: str) -> None:
        """Set why a rollout waits; nothing is written where that does not change."""
        self._db.run(
            "UPDATE rollouts SET reason = ?, revision = revision + 1 WHERE number = ? AND reason != ?",
            *(reason, number, reason),
        )

    # -- devices in a rollout -----------------------------------------------------------------------------------------

    def boards(self, number: int) -> list[tuple[DeviceProgress, Extra]]:
        """Return the devices of a rollout, in the order in which it is offered to them."""
        sql = (
            "SELECT b.*, coalesce(d.online, 0) AS online FROM rollout_devices b LEFT JOIN devices d ON d.id = b.device "
            "WHERE rollout = ? ORDER BY wave, b.device"
        )
        return [(read(DeviceProgress, row), read(Extra, row)) for row in self._db.rows(sql, number)]

    def standing(self, number: int) -> list[DeviceProgress]:
        """Return the devices with only what decisions need: there may be thousands, and decisions are frequent."""
        rows = self._db.tuples(
            "SELECT b.device, b.wave, b.outcome, coalesce(d.online, 0), b.offered_at, b.acked_at, b.ended_at, "
            "b.attempt, '', NULL, b.code, b.message FROM rollout_devices b LEFT JOIN devices d ON d.id = b.device "
            "WHERE b.rollout = ? ORDER BY wave, b.device",
            number,
        )
        known = {str(outcome): outcome for outcome in Outcome}
        return [
            DeviceProgress(device, wave, known[outcome], bool(online), *rest)
            for device, wave, outcome, online, *rest in rows
        ]

    def board(self, number: int, device: str) -> tuple[DeviceProgress, Extra] | None:
        """Return a device of a rollout."""
        sql = (
            "SELECT b.*, coalesce(d.online, 0) AS online FROM rollout_devices b LEFT JOIN devices d ON d.id = b.device "
            "WHERE rollout = ? AND device = ?"
        )
        row = self._db.row(sql, number, device)
        return None if row is None else (read(DeviceProgress, row), read(Extra, row))

    def counts(self, number: int) -> dict[str, int]:
        """Count a rollout's devices by outcome."""
        sql = "SELECT outcome, count(*) AS n FROM rollout_devices WHERE rollout = ? GROUP BY outcome"
        return {row["outcome"]: row["n"] for row in self._db.rows(sql, number)}

    def states(self) -> dict[str, int]:
        """Count rollouts by state."""
        rows = self._db.rows("SELECT state, count(*) AS n FROM rollouts GROUP BY state ORDER BY state")
        return {row["state"]: row["n"] for row in rows}

    def set_board(self, number: int, board: DeviceProgress, extra: Extra) -> None:
        """Set the progress of a device, and raise the revision of the rollout."""
        values = {**_columns(board), **_extra(extra)}
        assignments = ", ".join(f"{name} = ?" for name in values)
        sql = f"UPDATE rollout_devices SET {assignments} WHERE rollout = ? AND device = ?"  # noqa: S608 - names are ours
        self._db.run(sql, *values.values(), number, board.device)
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
        extra = "AND b.outcome IN ('waiting', 'deferred', 'in-progress')" if undecided else ""
        sql = (
            "SELECT r.* FROM rollouts r JOIN rollout_devices b ON b.rollout = r.number "  # noqa: S608 - one of two constants
            f"WHERE b.device = ? AND b.offered_at IS NOT NULL {extra} ORDER BY r.number DESC LIMIT 100"
        )
        return [read(RolloutRow, row) for row in self._db.rows(sql, device)]

    # -- settled values ----------------------------------------------------------------------------------------------

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


def _columns(board: DeviceProgress) -> dict[str, object]:
    return {name: getattr(board, name) for name in _BOARD}


def _extra(extra: Extra) -> dict[str, object]:
    return {
        "previous": extra.previous,
        "version": extra.version,
        "timings_ms": text(extra.timings_ms),
        "log": text(extra.log),
    }

"""Assignments, attempts, reports, artifacts and sealed secrets.

The server cannot open the boxes of secrets that it stores.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator

import msgspec

from fleet.protocol.trust_api import SealedBox
from fleet.store.rows import AssignmentRow, ReportRow, read
from fleet.store.sqlite import Database, text

KEPT_ASSIGNMENTS = 20
FORGET_BATCH = 500
"""Rows deleted in one transaction: a few milliseconds on an SD card."""


class Delivery:
    """Artifacts, assignments, attempts and reports."""

    def __init__(self, db: Database) -> None:
        self._db = db

    # -- artifacts (their bytes are files) ----------------------------------------------------------------------------

    def add_artifact(self, sha256: str, length: int, *, by: str, now: float) -> bool:
        """Add an artifact; return False where it was known already."""
        sql = "INSERT OR IGNORE INTO artifacts (sha256, length, stored_at, by) VALUES (?, ?, ?, ?)"
        return self._db.run(sql, sha256, length, now, by) == 1

    def artifact(self, sha256: str) -> int | None:
        """Return the length of an artifact in bytes; None for an unknown one."""
        found = self._db.value("SELECT length FROM artifacts WHERE sha256 = ?", sha256)
        return None if found is None else int(found)

    # -- assignments -------------------------------------------------------------------------------------------------

    def add_assignment(self, row: AssignmentRow) -> None:
        """Add a signed assignment, and keep only the last few before it."""
        with self._db.atomic():
            self._db.insert(
                "assignments",
                {
                    "device": row.device,
                    "version": row.version,
                    "sha256": row.sha256,
                    "issued": row.issued,
                    "expires": row.expires,
                    "wanted": row.wanted,
                    "envelope": row.envelope,
                },
            )
            sql = "DELETE FROM assignments WHERE device = ? AND version <= ?"
            self._db.run(sql, row.device, row.version - KEPT_ASSIGNMENTS)

    def assignment(self, device: str) -> AssignmentRow | None:
        """Return the newest assignment of a device."""
        sql = "SELECT * FROM assignments WHERE device = ? ORDER BY version DESC LIMIT 1"
        row = self._db.row(sql, device)
        return None if row is None else read(AssignmentRow, row)

    def newest(self, devices: Iterable[str]) -> dict[str, AssignmentRow]:
        """Return the newest assignment of each device that has one."""
        sql = (
            "SELECT a.* FROM assignments a JOIN (SELECT device, max(version) AS version FROM assignments "
            "WHERE device IN (SELECT value FROM json_each(?)) GROUP BY device) USING (device, version)"
        )
        return {row["device"]: read(AssignmentRow, row) for row in self._db.rows(sql, text(sorted(devices)))}

    def assignment_of(self, device: str, sha256: str) -> AssignmentRow | None:
        """Return the assignment of a device by the sha256 of its payload; None for none of the last ones."""
        row = self._db.row("SELECT * FROM assignments WHERE device = ? AND sha256 = ?", device, sha256)
        return None if row is None else read(AssignmentRow, row)

    def assignments(self, device: str) -> list[AssignmentRow]:
        """Return the kept assignments of a device, newest first."""
        sql = "SELECT * FROM assignments WHERE device = ? ORDER BY version DESC"
        return [read(AssignmentRow, row) for row in self._db.rows(sql, device)]

    def versions(self) -> dict[str, int]:
        """Return the version of the newest assignment of each device."""
        rows = self._db.rows("SELECT device, max(version) AS version FROM assignments GROUP BY device")
        return {row["device"]: row["version"] for row in rows}

    def expiring(self, before: float, *, after: float = math.inf) -> list[str]:
        """Return the devices whose newest assignment expires before a time, or after one: a wrong clock dated it."""
        sql = """
            SELECT device FROM (
                SELECT a.device AS device, a.expires AS expires, max(a.version) FROM assignments a
                JOIN devices d ON d.id = a.device WHERE NOT d.revoked GROUP BY a.device
            ) WHERE expires NOT BETWEEN ? AND ?
        """
        return [row["device"] for row in self._db.rows(sql, before, after)]

    def behind(self) -> list[str]:
        """Return the devices that have not reported acceptance of their newest assignment."""
        sql = """
            SELECT d.id FROM devices d JOIN assignments a ON a.device = d.id
            WHERE NOT d.revoked GROUP BY d.id HAVING max(a.version) > d.accepted
        """
        return [row["id"] for row in self._db.rows(sql)]

    # -- attempts ----------------------------------------------------------------------------------------------------

    def attempts(self, device: str) -> dict[str, int]:
        """Return the attempt that operators asked for, by instance of a device."""
        return self.attempts_of_each([device]).get(device, {})

    def attempts_of_each(self, devices: Iterable[str]) -> dict[str, dict[str, int]]:
        """Return the attempts that operators asked for, by device and instance."""
        found: dict[str, dict[str, int]] = {}
        sql = "SELECT device, instance, attempt FROM attempts WHERE device IN (SELECT value FROM json_each(?))"
        for row in self._db.rows(sql, text(sorted(devices))):
            found.setdefault(row["device"], {})[row["instance"]] = row["attempt"]
        return found

    def set_attempt(self, device: str, instance: str, attempt: int) -> None:
        """Set the attempt of an instance, so that its device retries it."""
        sql = (
            "INSERT INTO attempts (device, instance, attempt) VALUES (?, ?, ?) "
            "ON CONFLICT DO UPDATE SET attempt = excluded.attempt"
        )
        self._db.run(sql, device, instance, attempt)

    # -- reports -----------------------------------------------------------------------------------------------------

    def add_report(self, row: ReportRow) -> bool:
        """Add a report as received; return False where it is known already."""
        sql = (
            "INSERT OR IGNORE INTO reports (device, boot_id, sequence, at, rollout, raw) "
            "SELECT ?, ?, ?, ?, ?, ? WHERE EXISTS (SELECT 1 FROM devices WHERE id = ?)"
        )
        values = (row.device, row.boot_id, row.sequence, row.at, row.rollout, row.raw)
        return self._db.run(sql, *values, row.device) == 1

    def acked(self, devices: Iterable[str]) -> dict[str, int]:
        """Return the sequence up to which every report of each device was stored when it was last acknowledged."""
        sql = "SELECT id, acked FROM devices WHERE id IN (SELECT value FROM json_each(?))"
        return dict(self._db.tuples(sql, text(sorted(devices))))

    def acknowledge(self, device: str, acked: int, *, again: int | None) -> int:
        """Return the sequence up to which every report of a device is stored, so that the device may drop them.

        Args:
            device: id of the device.
            acked: up to which they were stored before; see `acked`.
            again: sequence of a report that came again, None for none. Devices resend from the oldest report that is
                not acknowledged, so reports missing below it are lost (after a restore from a backup, for example).
        """
        start = acked if again is None else max(acked, again)
        rows = self._db.rows(
            "SELECT DISTINCT sequence FROM reports WHERE device = ? AND sequence > ? ORDER BY sequence LIMIT 1000",
            *(device, start),
        )
        for row in rows:
            if row["sequence"] != start + 1:
                break
            start = row["sequence"]
        if start != acked:
            self._db.run("UPDATE devices SET acked = ? WHERE id = ?", start, device)
        return start

    def reports(self, device: str, limit: int) -> list[ReportRow]:
        """Return a device's reports, newest first."""
        sql = "SELECT * FROM reports WHERE device = ? ORDER BY at DESC, sequence DESC LIMIT ?"
        return [read(ReportRow, row) for row in self._db.rows(sql, device, limit)]

    def reports_after(self, device: str, sequence: int, *, rollout: str, limit: int) -> list[ReportRow]:
        """Return the reports that a device made later about a rollout, newest first."""
        sql = "SELECT * FROM reports WHERE device = ? AND sequence > ? AND rollout = ? ORDER BY sequence DESC LIMIT ?"
        return [read(ReportRow, row) for row in self._db.rows(sql, device, sequence, rollout, limit)]

    def history(self, device: str, *, after: tuple[str, int], limit: int) -> list[ReportRow]:
        """Return a device's reports by boot id and sequence, after a position in that order."""
        sql = (
            "SELECT * FROM reports WHERE device = ? AND (boot_id, sequence) > (?, ?) ORDER BY boot_id, sequence LIMIT ?"
        )
        return [read(ReportRow, row) for row in self._db.rows(sql, device, *after, limit)]

    def forgetting(self, *, before: float) -> Iterator[int]:
        """Delete reports and events older than a time, a few in each transaction; yield how many after each.

        The database is free between two of them, however many there are: the caller lets others write meanwhile.
        """
        for table, key in (("reports", "device, boot_id, sequence"), ("events", "id")):
            old = f"SELECT {key} FROM {table} WHERE device = ? AND at < ? ORDER BY at LIMIT ?"  # noqa: S608 - our words
            device: str | None = ""
            while device is not None:
                deleted = self._db.run(f"DELETE FROM {table} WHERE ({key}) IN ({old})", device, before, FORGET_BATCH)  # noqa: S608
                if deleted:
                    yield deleted
                if deleted < FORGET_BATCH:
                    device = self._db.value(f"SELECT min(device) FROM {table} WHERE device > ?", device)  # noqa: S608

    def forget(self, *, before: float) -> int:
        """Delete reports and events older than a time; return how many."""
        return sum(self.forgetting(before=before))

    def trim(self, rows_max: int) -> int:
        """Drop the oldest reports and events of each device that has more than `rows_max`; the number dropped."""
        dropped = 0
        for table, key in (("reports", "boot_id, sequence"), ("events", "id")):
            count = f"SELECT device FROM {table} GROUP BY device HAVING count(*) > ?"  # noqa: S608 - ours
            newest = ", ".join(f"{column} DESC" for column in ("at", *key.split(", ")[::-1]))
            drop = (
                f"DELETE FROM {table} WHERE device = ? AND ({key}) IN "  # noqa: S608 - ours
                f"(SELECT {key} FROM {table} WHERE device = ? ORDER BY {newest} LIMIT -1 OFFSET ?)"
            )
            for row in self._db.rows(count, rows_max):
                dropped += self._db.run(drop, row["device"], row["device"], rows_max)
        return dropped


KEPT_VERSIONS = 3
"""Versions kept of each box: an assignment on its way to a device may still name the version before."""


class BoxRow(msgspec.Struct, frozen=True, kw_only=True):
    """Box without its bytes."""

    device: str
    instance: str
    name: str
    version: int
    sha256: str
    sealed: str
    by: str
    at: float


_COLUMNS = "device, instance, name, max(version) AS version, sha256, sealed, by, at"


class Boxes:
    """Sealed boxes of secrets."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def next_version(self, instance: str, name: str) -> int:
        """Return the next version of a secret, above every version so far, also of removed boxes."""
        sql = "SELECT max(version) FROM secret_versions WHERE (instance, name) IN (VALUES (?, ?), ('', ''))"
        return int(self._db.value(sql, instance, name) or 0) + 1

    def count_on_from(self, version: int) -> None:
        """Let later versions of every secret be above `version`: devices may know some that this database lacks."""
        self._db.run(
            "INSERT INTO secret_versions (instance, name, version) VALUES ('', '', ?) "
            "ON CONFLICT DO UPDATE SET version = max(version, excluded.version)",
            version,
        )

    def put(self, *, instance: str, name: str, version: int, boxes: Iterable[SealedBox], by: str, now: float) -> None:
        """Add the boxes of a version."""
        with self._db.atomic():
            self._db.run(
                "INSERT INTO secret_versions (instance, name, version) VALUES (?, ?, ?) "
                "ON CONFLICT DO UPDATE SET version = excluded.version",
                *(instance, name, version),
            )
            for each in boxes:
                row = {
                    "device": each.device,
                    "instance": instance,
                    "name": name,
                    "version": version,
                    "sha256": hashlib.sha256(each.box).hexdigest(),
                    "box": each.box,
                    "sealed": each.sealed,
                    "by": by,
                    "at": now,
                }
                self._db.insert("boxes", row)
                self._db.run(
                    "DELETE FROM boxes WHERE device = ? AND instance = ? AND name = ? AND version NOT IN (SELECT "
                    "version FROM boxes WHERE device = ? AND instance = ? AND name = ? ORDER BY version DESC LIMIT ?)",
                    *(each.device, instance, name, each.device, instance, name, KEPT_VERSIONS),
                )

    def newest(self, device: str) -> dict[tuple[str, str], BoxRow]:
        """Return a device's newest boxes by instance and name."""
        return self.newest_of_each([device]).get(device, {})

    def newest_of_each(self, devices: Iterable[str]) -> dict[str, dict[tuple[str, str], BoxRow]]:
        """Return the newest boxes of devices, by device, and by instance and name."""
        sql = (
            f"SELECT {_COLUMNS} FROM boxes WHERE device IN (SELECT value FROM json_each(?)) "  # noqa: S608 - our own words
            "GROUP BY device, instance, name"
        )
        found: dict[str, dict[tuple[str, str], BoxRow]] = {}
        for row in (read(BoxRow, each) for each in self._db.rows(sql, text(sorted(devices)))):
            found.setdefault(row.device, {})[row.instance, row.name] = row
        return found

    def all(self) -> list[BoxRow]:
        """Return the newest boxes of every device."""
        sql = f"SELECT {_COLUMNS} FROM boxes GROUP BY instance, name, device ORDER BY instance, name, device"  # noqa: S608 - ours
        return [read(BoxRow, row) for row in self._db.rows(sql)]

    def box(self, device: str, sha256: str) -> bytes | None:
        """Return the bytes of a box, if it is this device's."""
        found = self._db.value("SELECT box FROM boxes WHERE device = ? AND sha256 = ? LIMIT 1", device, sha256)
        return None if found is None else bytes(found)

    def remove(self, device: str, instance: str, name: str) -> bool:
        """Delete a device's boxes of a secret; return False where there were none."""
        sql = "DELETE FROM boxes WHERE device = ? AND instance = ? AND name = ?"
        return self._db.run(sql, device, instance, name) > 0

    def forget(self, device: str) -> None:
        """Delete every box of a revoked device."""
        self._db.run("DELETE FROM boxes WHERE device = ?", device)

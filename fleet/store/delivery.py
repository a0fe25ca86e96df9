"""Assignments, reports, artifacts, secret boxes.

What goes to devices and what comes back: artifacts, assignments, attempts, reports.

Secrets in their boxes: what the server keeps of them, none of which it can open.
"""

import hashlib
from collections.abc import Iterable

import msgspec

from fleet.protocol.trust_api import SealedBox
from fleet.store.rows import AssignmentRow, ReportRow, read
from fleet.store.sqlite import Database

KEPT_ASSIGNMENTS = 20


class Delivery:
    """Everything on its way to a device, and every report of one."""

    def __init__(self, db: Database) -> None:
        self._db = db

    # -- artifacts (the bytes lie in files) --------------------------------------------------------------------------

    def add_artifact(self, sha256: str, length: int, *, by: str, now: float) -> bool:
        """Remember an artifact; false when it was known."""
        sql = "INSERT OR IGNORE INTO artifacts (sha256, length, stored_at, by) VALUES (?, ?, ?, ?)"
        return self._db.run(sql, sha256, length, now, by) == 1

    def artifact(self, sha256: str) -> int | None:
        """The length of an artifact; None for none."""
        found = self._db.value("SELECT length FROM artifacts WHERE sha256 = ?", sha256)
        return None if found is None else int(found)

    # -- assignments -------------------------------------------------------------------------------------------------

    def add_assignment(self, row: AssignmentRow) -> None:
        """Keep a signed assignment, and the last few before it."""
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
        """The newest assignment of a device."""
        sql = "SELECT * FROM assignments WHERE device = ? ORDER BY version DESC LIMIT 1"
        row = self._db.row(sql, device)
        return None if row is None else read(AssignmentRow, row)

    def versions(self) -> dict[str, int]:
        """By device, the version of its newest assignment."""
        rows = self._db.rows("SELECT device, max(version) AS version FROM assignments GROUP BY device")
        return {row["device"]: row["version"] for row in rows}

    def expiring(self, before: float) -> list[str]:
        """Devices whose newest assignment expires before a time."""
        sql = """
            SELECT a.device FROM assignments a JOIN devices d ON d.id = a.device WHERE NOT d.revoked
            GROUP BY a.device HAVING max(a.version) AND max(a.expires) < ?
        """
        return [row["device"] for row in self._db.rows(sql, before)]

    def behind(self) -> list[str]:
        """Devices that have not accepted their newest assignment, as far as they said."""
        sql = """
            SELECT d.id FROM devices d JOIN assignments a ON a.device = d.id
            WHERE NOT d.revoked GROUP BY d.id HAVING max(a.version) > d.accepted
        """
        return [row["id"] for row in self._db.rows(sql)]

    # -- attempts ----------------------------------------------------------------------------------------------------

    def attempts(self, device: str) -> dict[str, int]:
        """By instance, the attempt that `retry` asked for on this device."""
        rows = self._db.rows("SELECT instance, attempt FROM attempts WHERE device = ?", device)
        return {row["instance"]: row["attempt"] for row in rows}

    def set_attempt(self, device: str, instance: str, attempt: int) -> None:
        """Make a device try again what failed there."""
        sql = (
            "INSERT INTO attempts (device, instance, attempt) VALUES (?, ?, ?) "
            "ON CONFLICT DO UPDATE SET attempt = excluded.attempt"
        )
        self._db.run(sql, device, instance, attempt)

    # -- reports -----------------------------------------------------------------------------------------------------

    def add_report(self, row: ReportRow) -> bool:
        """Keep a report as it came; false when it is known already."""
        sql = (
            "INSERT OR IGNORE INTO reports (device, boot_id, sequence, at, rollout, raw) "
            "SELECT ?, ?, ?, ?, ?, ? WHERE EXISTS (SELECT 1 FROM devices WHERE id = ?)"
        )
        values = (row.device, row.boot_id, row.sequence, row.at, row.rollout, row.raw)
        return self._db.run(sql, *values, row.device) == 1

    def acknowledge(self, device: str, *, again: int | None) -> int:
        """Up to which report all are stored, and so may be forgotten by the device.

        Args:
            device: whose reports.
            again: the sequence of a report that came again. Devices resend from the oldest report that is not
                acknowledged, so what is missing below it is lost (the store was restored from a backup, for example).
        """
        acked = int(self._db.value("SELECT acked FROM devices WHERE id = ?", device) or 0)
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
        """A device's reports, newest first."""
        sql = "SELECT * FROM reports WHERE device = ? ORDER BY at DESC, sequence DESC LIMIT ?"
        return [read(ReportRow, row) for row in self._db.rows(sql, device, limit)]

    def history(self, device: str, *, after: tuple[str, int], limit: int) -> list[ReportRow]:
        """A device's reports in the order of boot id and sequence, behind a place in it."""
        sql = (
            "SELECT * FROM reports WHERE device = ? AND (boot_id, sequence) > (?, ?) ORDER BY boot_id, sequence LIMIT ?"
        )
        return [read(ReportRow, row) for row in self._db.rows(sql, device, *after, limit)]

    def forget(self, *, before: float, tables: Iterable[str] = ("reports", "events")) -> int:
        """Drop reports and events older than a time; the number dropped."""
        return sum(self._db.run(f"DELETE FROM {table} WHERE at < ?", before) for table in tables)  # noqa: S608 - ours


KEPT_VERSIONS = 3
"""Of each box: an assignment that is under way may still name the one before."""


class BoxRow(msgspec.Struct, frozen=True, kw_only=True):
    """A box without its bytes."""

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
    """Every box."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def next_version(self, instance: str, name: str) -> int:
        """The version after the newest that there ever was, also of one that was removed; above `count_on_from`."""
        sql = "SELECT max(version) FROM secret_versions WHERE (instance, name) IN (VALUES (?, ?), ('', ''))"
        return int(self._db.value(sql, instance, name) or 0) + 1

    def count_on_from(self, version: int) -> None:
        """No secret's next version is at or below this: devices may remember some that this database never knew."""
        self._db.run(
            "INSERT INTO secret_versions (instance, name, version) VALUES ('', '', ?) "
            "ON CONFLICT DO UPDATE SET version = max(version, excluded.version)",
            version,
        )

    def put(self, *, instance: str, name: str, version: int, boxes: Iterable[SealedBox], by: str, now: float) -> None:
        """Keep a version's boxes."""
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
        """A device's newest boxes by instance and name."""
        sql = f"SELECT {_COLUMNS} FROM boxes WHERE device = ? GROUP BY instance, name"  # noqa: S608 - our own words
        rows = [read(BoxRow, row) for row in self._db.rows(sql, device)]
        return {(row.instance, row.name): row for row in rows}

    def all(self) -> list[BoxRow]:
        """Every device's newest boxes."""
        sql = f"SELECT {_COLUMNS} FROM boxes GROUP BY instance, name, device ORDER BY instance, name, device"  # noqa: S608 - ours
        return [read(BoxRow, row) for row in self._db.rows(sql)]

    def box(self, device: str, sha256: str) -> bytes | None:
        """A box of this device, and of no other."""
        found = self._db.value("SELECT box FROM boxes WHERE device = ? AND sha256 = ? LIMIT 1", device, sha256)
        return None if found is None else bytes(found)

    def remove(self, device: str, instance: str, name: str) -> bool:
        """Take a secret from a device; false when it had none."""
        sql = "DELETE FROM boxes WHERE device = ? AND instance = ? AND name = ?"
        return self._db.run(sql, device, instance, name) > 0

    def forget(self, device: str) -> None:
        """A device that was shut out needs none any more."""
        self._db.run("DELETE FROM boxes WHERE device = ?", device)

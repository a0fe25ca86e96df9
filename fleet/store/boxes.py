"""Secrets in their boxes: what the server keeps of them, none of which it can open."""

import hashlib
from collections.abc import Iterable

import msgspec

from fleet.protocol.sealed import SealedBox
from fleet.store.database import Database
from fleet.store.rows import read

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
        """No secret's next version is at or below this: boards may remember some that this database never knew."""
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
        """A board's newest boxes by instance and name."""
        sql = f"SELECT {_COLUMNS} FROM boxes WHERE device = ? GROUP BY instance, name"  # noqa: S608 - our own words
        rows = [read(BoxRow, row) for row in self._db.rows(sql, device)]
        return {(row.instance, row.name): row for row in rows}

    def all(self) -> list[BoxRow]:
        """Every board's newest boxes."""
        sql = f"SELECT {_COLUMNS} FROM boxes GROUP BY instance, name, device ORDER BY instance, name, device"  # noqa: S608 - ours
        return [read(BoxRow, row) for row in self._db.rows(sql)]

    def box(self, device: str, sha256: str) -> bytes | None:
        """A box of this board, and of no other."""
        found = self._db.value("SELECT box FROM boxes WHERE device = ? AND sha256 = ? LIMIT 1", device, sha256)
        return None if found is None else bytes(found)

    def remove(self, device: str, instance: str, name: str) -> bool:
        """Take a secret from a board; false when it had none."""
        sql = "DELETE FROM boxes WHERE device = ? AND instance = ? AND name = ?"
        return self._db.run(sql, device, instance, name) > 0

    def forget(self, device: str) -> None:
        """A board that was shut out needs none any more."""
        self._db.run("DELETE FROM boxes WHERE device = ?", device)

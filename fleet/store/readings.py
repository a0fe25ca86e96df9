"""Readings: messages of components, as their devices brought them.

A device brings its readings in order, and again until they are acknowledged: the position up to which each device's are
stored makes a repeated one known, and so does the sequence of its instance. Both count within an epoch of the device.
"""

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Final

import msgspec

from fleet.protocol.messages import Reading, Readings
from fleet.store.delivery import FORGET_BATCH
from fleet.store.rows import read
from fleet.store.sqlite import Database, text

ROW_BYTES = 256
"""Bytes of a row beside its content, roughly: for the bounds of what is kept."""

_LATEST_S: Final = datetime(9999, 12, 31, tzinfo=UTC).timestamp()


class ReadingRow(msgspec.Struct, frozen=True, kw_only=True):
    """Stored reading; `received_at` by the server's clock, `at` by the device's."""

    id: int
    device: str
    epoch: str
    instance: str
    sequence: int
    at: float
    received_at: float
    topic: str
    content_type: str
    metadata: tuple[tuple[str, str], ...]
    data: bytes


class ReadingStore:
    """Readings of all devices, in the order in which they were stored."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def position(self, device: str, epoch: str) -> int:
        """Return the position up to which a device's readings of an epoch are stored; 0 for none."""
        sql = "SELECT position FROM reading_positions WHERE device = ? AND epoch = ?"
        return int(self._db.value(sql, device, epoch) or 0)

    def add(self, batch: Readings, *, now: float) -> int:
        """Store what is new of a batch, and return the position up to which its device's readings are stored."""
        stored = self.position(batch.device, batch.epoch)
        new = [each for each in batch.readings if each.position > stored]
        position = max((each.position for each in new), default=stored)
        self._db.run(
            "INSERT INTO reading_positions (device, epoch, position) VALUES (?, ?, ?) ON CONFLICT (device) "
            "DO UPDATE SET epoch = excluded.epoch, position = excluded.position",
            *(batch.device, batch.epoch, position),
        )
        self._db.many(
            "INSERT OR IGNORE INTO readings "
            "(device, epoch, instance, sequence, at, received_at, topic, content_type, metadata, data, size) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (_values(batch, each, now) for each in new),
        )
        return position

    def newest(self) -> int:
        """Return the number of the newest reading; 0 for none."""
        return int(self._db.value("SELECT max(id) FROM readings") or 0)

    def after(
        self, number: int, *, devices: Iterable[str] | None, instance: str, since: float, most: int
    ) -> list[ReadingRow]:
        """Return readings behind a number, oldest first.

        Args:
            number: of a reading; 0 for all.
            devices: whose; None for every device's.
            instance: whose; empty for every instance's.
            since: time from which on they came.
            most: how many.
        """
        where, values = _where(devices, instance, since)
        sql = f"SELECT * FROM readings WHERE id > ? AND {where} ORDER BY id LIMIT ?"  # noqa: S608 - ours
        return [read(ReadingRow, row) for row in self._db.rows(sql, number, *values, most)]

    def before(
        self, number: int, *, devices: Iterable[str] | None, instance: str, since: float, most: int
    ) -> list[ReadingRow]:
        """Return readings before a number, newest first; see `after`."""
        where, values = _where(devices, instance, since)
        sql = f"SELECT * FROM readings WHERE id < ? AND {where} ORDER BY id DESC LIMIT ?"  # noqa: S608 - ours
        return [read(ReadingRow, row) for row in self._db.rows(sql, number, *values, most)]

    def forgetting(self, *, before: float) -> Iterator[int]:
        """Delete the readings that came before a time, some at a time; yield how many."""
        sql = "DELETE FROM readings WHERE id IN (SELECT id FROM readings WHERE received_at < ? ORDER BY id LIMIT ?)"
        while deleted := self._db.run(sql, before, FORGET_BATCH):
            yield deleted

    def trimming(self, *, device_bytes: int, all_bytes: int) -> Iterator[int]:
        """Delete the oldest of the devices that have too many, some at a time, and then of those with the most."""
        sql = "DELETE FROM readings WHERE id IN (SELECT id FROM readings WHERE device = ? ORDER BY id LIMIT ?)"
        most = "SELECT device, bytes FROM reading_positions ORDER BY bytes DESC LIMIT 1"
        while (row := self._db.row(most)) is not None:
            total = int(self._db.value("SELECT sum(bytes) FROM reading_positions") or 0)
            if row["bytes"] <= device_bytes and total <= all_bytes:
                return
            deleted = self._db.run(sql, row["device"], FORGET_BATCH)
            if not deleted:
                return
            yield deleted


def _values(batch: Readings, reading: Reading, now: float) -> tuple[object, ...]:
    """Return the columns of a reading in the order of `ReadingStore.add`."""
    metadata = text(reading.metadata)
    at = min(max(reading.at.timestamp(), 0.0), _LATEST_S)  # in UTC, a device's time may be of no year that there is
    return (
        *(batch.device, batch.epoch, reading.instance, reading.sequence, at, now, reading.topic),
        *(reading.content_type, metadata, reading.data),
        ROW_BYTES
        + len(reading.data)
        + sum(len(each.encode()) for each in (reading.topic, reading.content_type, metadata)),
    )


def _where(devices: Iterable[str] | None, instance: str, since: float) -> tuple[str, list[object]]:
    where, values = ["received_at >= ?"], list[object]([since])
    if devices is not None:
        where.append("device IN (SELECT value FROM json_each(?))")
        values.append(text(sorted(devices)))
    if instance:
        where.append("instance = ?")
        values.append(instance)
    return " AND ".join(where), values

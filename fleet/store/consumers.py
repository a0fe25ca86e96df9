"""Consumers: systems of the operator that read messages from the broker, and how far these are passed on."""

import msgspec

from fleet.store.rows import read
from fleet.store.sqlite import Database, text


class ConsumerRow(msgspec.Struct, frozen=True, kw_only=True):
    """Consumer. `user` is the CN of its certificate; `ends_at` and `created_at` are seconds since 1970."""

    user: str
    name: str
    group: str
    topics: tuple[str, ...]
    created_at: float
    ends_at: float
    revoked: bool


class ConsumerStore:
    """Consumers of the fleet."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def add(self, row: ConsumerRow) -> None:
        """Add a consumer."""
        plain = msgspec.to_builtins(row)
        self._db.insert("consumers", {**plain, "topics": text(row.topics), "revoked": int(row.revoked)})

    def named(self, name: str) -> ConsumerRow | None:
        """Return the consumer with a name that is not revoked; None for none."""
        row = self._db.row("SELECT * FROM consumers WHERE name = ? AND NOT revoked", name)
        return None if row is None else read(ConsumerRow, row)

    def all(self, *, now: float) -> list[ConsumerRow]:
        """Return every consumer whose certificate is not over, revoked ones included, sorted by name."""
        rows = self._db.rows("SELECT * FROM consumers WHERE ends_at > ? ORDER BY name, user", now)
        return [read(ConsumerRow, row) for row in rows]

    def revoke(self, user: str) -> None:
        """Revoke a consumer."""
        self._db.run("UPDATE consumers SET revoked = 1 WHERE user = ?", user)

    def granted(self, *, now: float) -> list[tuple[str, tuple[str, ...]]]:
        """Return group and topics of each consumer that may read."""
        return [(row.group, row.topics) for row in self.all(now=now) if not row.revoked]

    def passed_on(self) -> int:
        """Return the number of the newest message that the broker has for them; 0 before the first."""
        return int(self._db.value("SELECT value FROM meta WHERE key = 'passed-on'") or 0)

    def set_passed_on(self, number: int) -> None:
        """Note how far the broker has the messages."""
        self._db.run("INSERT OR REPLACE INTO meta (key, value) VALUES ('passed-on', ?)", str(number))

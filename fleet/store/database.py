"""One SQLite file behind one connection, opened with the care that a server's memory deserves.

WAL, so that a reader never waits for a writer, and `synchronous=FULL`, since a report is acknowledged when it is
stored and the board then forgets it. Used from one thread: the server's loop. Transactions are short, and what comes
in by the thousand is written in batches.
"""

import os
import pwd
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import sqlite_utils

from fleet.store.errors import (
    DamagedError,
    OtherFleetError,
    OtherOwnerError,
    OtherVersionError,
    RolledBackError,
)
from fleet.store.migrations import MIGRATIONS

Row = dict[str, Any]


def utc(seconds: float) -> datetime:
    """Seconds since 1970 as a time in UTC."""
    return datetime.fromtimestamp(seconds, UTC)


def utc_or_none(seconds: float | None) -> datetime | None:
    """The same, where there may be none."""
    return None if seconds is None else utc(seconds)


def text(value: Any) -> str:
    """A value as JSON text, as columns that hold one have it."""
    return msgspec.json.encode(value, order="deterministic").decode()


class Database:
    """The few ways in which the store talks to SQLite."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._db = sqlite_utils.Database(sqlite3.connect(path, isolation_level=None))

    @classmethod
    def open(cls, path: Path, *, fleet: str) -> "Database":
        """Open the database of a fleet, made or brought up to date where needed.

        Raises:
            OtherOwnerError, OtherVersionError, OtherFleetError, DamagedError: as their names say.
        """
        check_owner(path if path.exists() else path.parent)
        try:
            db = cls(path)
            db._prepare()
            db._check_fleet(fleet)
        except sqlite3.DatabaseError as error:
            if "readonly" in str(error) or "unable to open" in str(error):
                raise OtherOwnerError(f"cannot write {path}: {error}") from error
            raise DamagedError(f"{path} is not a sound database ({error}): restore it from a backup") from error
        path.chmod(0o600)
        return db

    def _prepare(self) -> None:
        self._db.execute("PRAGMA journal_mode=wal")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("PRAGMA foreign_keys=ON")
        self._db.execute("PRAGMA busy_timeout=5000")
        done = int(self.value("PRAGMA user_version"))
        if done > len(MIGRATIONS):
            raise OtherVersionError(
                f"{self.path} was written by a newer wasmfleet (schema {done}, this one knows {len(MIGRATIONS)}): "
                "upgrade wasmfleet, or use another home"
            )
        for number, migrate in enumerate(MIGRATIONS[done:], done + 1):
            with self.atomic():
                migrate(self._db)
                self._db.execute(f"PRAGMA user_version={number}")

    def _check_fleet(self, fleet: str) -> None:
        row = self.row("SELECT value FROM meta WHERE key = 'fleet'")
        if row is None:
            self.run("INSERT INTO meta (key, value) VALUES ('fleet', ?)", fleet)
        elif row["value"] != fleet:
            raise OtherFleetError(f"{self.path} holds the fleet {row['value']!r}, the configuration says {fleet!r}")

    def close(self) -> None:
        """Close it; everything committed is on the disk."""
        self._db.close()

    @contextmanager
    def atomic(self) -> Iterator[None]:
        """All or nothing; may be nested."""
        if self._db.conn.in_transaction:
            yield
            return
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.conn.rollback()
            raise
        self._db.conn.commit()

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """A part of a transaction that is undone alone when it raises; what came before it in the transaction stays.

        Raises:
            RolledBackError: the whole transaction is gone.
        """
        self._db.execute("SAVEPOINT part")
        try:
            yield
        except BaseException as error:
            if not self._db.conn.in_transaction:
                raise RolledBackError(f"{self.path}: {error}") from error
            self._db.execute("ROLLBACK TO part")
            self._db.execute("RELEASE part")
            raise
        self._db.execute("RELEASE part")

    def rows(self, sql: str, *params: Any) -> list[Row]:
        """Every row of a query."""
        cursor = self._db.conn.execute(sql, params)
        keys = [column[0] for column in cursor.description]
        return [dict(zip(keys, values, strict=True)) for values in cursor]

    def tuples(self, sql: str, *params: Any) -> list[tuple[Any, ...]]:
        """Every row of a query, without names."""
        return self._db.conn.execute(sql, params).fetchall()

    def row(self, sql: str, *params: Any) -> Row | None:
        """The first row of a query, None for none."""
        return next(iter(self.rows(sql, *params)), None)

    def value(self, sql: str, *params: Any) -> Any:
        """The first column of the first row; None for none."""
        row = self.row(sql, *params)
        return None if row is None else next(iter(row.values()))

    def run(self, sql: str, *params: Any) -> int:
        """Carry out a statement; the number of rows it changed."""
        return int(self._db.conn.execute(sql, params).rowcount)

    def many(self, sql: str, rows: Iterable[tuple[Any, ...]]) -> None:
        """Carry out a statement for each row of parameters."""
        self._db.conn.executemany(sql, rows)

    def insert(self, table: str, row: Row) -> int:
        """Insert a row and return its rowid; a row that is there already raises `sqlite3.IntegrityError`."""
        columns = ", ".join(f'"{name}"' for name in row)
        marks = ", ".join("?" * len(row))
        sql = f'INSERT INTO "{table}" ({columns}) VALUES ({marks})'  # noqa: S608 - names are ours, values are bound
        return int(self._db.conn.execute(sql, tuple(row.values())).lastrowid or 0)

    def backup(self, path: Path) -> None:
        """A consistent copy into a new file; raises `DamagedError` where it cannot be made."""
        try:
            with sqlite3.connect(path) as copy:
                self._db.conn.backup(copy)
        except sqlite3.Error as error:
            raise DamagedError(f"{self.path} cannot be copied to {path}: {error}") from error


def check_owner(path: Path) -> None:
    """Refuse what belongs to another user.

    Raises:
        OtherOwnerError: it does, or it may not be written.
    """
    owner = path.stat().st_uid
    if owner != os.geteuid():
        raise OtherOwnerError(f"{path} belongs to the user {_user(owner)}: run as that user, or use another home")
    if not os.access(path, os.W_OK):
        raise OtherOwnerError(f"{path} may not be written: check its mode and its file system")


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)

"""SQLite connection, migrations, errors of the server's store.

WAL lets readers go on while a writer is at work. `synchronous=FULL`, since a device drops a report once the server has
acknowledged it as stored. Used from one thread, the server's event loop. Transactions are short, and messages that
arrive by the thousand are written in batches.

The schema is the list of migrations that lead to it. `PRAGMA user_version` counts those that ran; a migration never
changes once released.

    StoreError
      OtherVersionError   written by a newer program
      OtherOwnerError     belongs to another user, or may not be written
      OtherFleetError     holds another fleet
      DamagedError        not a database, or damaged
"""

import os
import pwd
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec
import sqlite_utils

Row = dict[str, Any]


def utc(seconds: float) -> datetime:
    """Convert seconds since 1970 to a time in UTC."""
    return datetime.fromtimestamp(seconds, UTC)


def utc_or_none(seconds: float | None) -> datetime | None:
    """Convert seconds since 1970 to a time in UTC, and None to None."""
    return None if seconds is None else utc(seconds)


def text(value: Any) -> str:
    """Encode a value as the JSON text of a column."""
    return msgspec.json.encode(value, order="deterministic").decode()


class Database:
    """Connection to a database file: queries, transactions, backup."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._db = sqlite_utils.Database(sqlite3.connect(path, isolation_level=None))

    @classmethod
    def open(cls, path: Path, *, fleet: str, create: bool = True) -> "Database":
        """Open the database of a fleet; create it, or migrate it to the newest schema, where needed.

        Args:
            path: its file.
            fleet: whose it must be.
            create: false for one that must be there: an empty one would be a fleet without devices and operators.

        Raises:
            OtherOwnerError, OtherVersionError, OtherFleetError, DamagedError: the file cannot be used.
        """
        check_owner(path if path.exists() else path.parent)
        if words := _lacking(path, create=create):
            raise DamagedError(f"{path} {words}: {_RESTORE}")
        try:
            db = cls(path)
            db._prepare()
            db._check_fleet(fleet)
        except sqlite3.DatabaseError as error:
            if "readonly" in str(error) or "unable to open" in str(error):
                raise OtherOwnerError(f"cannot write {path}: {error}") from error
            raise DamagedError(f"{path} is not a sound database ({error}): {_RESTORE}") from error
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
        """Close the connection; everything committed is on the disk."""
        self._db.close()

    @contextmanager
    def atomic(self) -> Iterator[None]:
        """Run a block in one transaction, all or nothing; may be nested."""
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
        """Run a part of a transaction that is rolled back alone when it raises.

        Raises:
            RolledBackError: the whole transaction is gone.
        """
        self._db.conn.execute("SAVEPOINT part")
        try:
            yield
        except BaseException as error:
            if not self._db.conn.in_transaction:
                raise RolledBackError(f"{self.path}: {error}") from error
            self._db.conn.execute("ROLLBACK TO part")
            self._db.conn.execute("RELEASE part")
            raise
        self._db.conn.execute("RELEASE part")

    def rows(self, sql: str, *params: Any) -> list[Row]:
        """Return every row of a query."""
        cursor = self._db.conn.execute(sql, params)
        keys = [column[0] for column in cursor.description]
        return [dict(zip(keys, values, strict=True)) for values in cursor]

    def tuples(self, sql: str, *params: Any) -> list[tuple[Any, ...]]:
        """Return every row of a query, without column names."""
        return self._db.conn.execute(sql, params).fetchall()

    def row(self, sql: str, *params: Any) -> Row | None:
        """Return the first row of a query; None for none."""
        return next(iter(self.rows(sql, *params)), None)

    def value(self, sql: str, *params: Any) -> Any:
        """Return the first column of the first row; None for none."""
        row = self.row(sql, *params)
        return None if row is None else next(iter(row.values()))

    def run(self, sql: str, *params: Any) -> int:
        """Execute a statement and return the number of changed rows."""
        return int(self._db.conn.execute(sql, params).rowcount)

    def many(self, sql: str, rows: Iterable[tuple[Any, ...]]) -> None:
        """Execute a statement for each row of parameters."""
        self._db.conn.executemany(sql, rows)

    def insert(self, table: str, row: Row) -> int:
        """Insert a row and return its rowid. Raises `sqlite3.IntegrityError` where it exists already."""
        columns = ", ".join(f'"{name}"' for name in row)
        marks = ", ".join("?" * len(row))
        sql = f'INSERT INTO "{table}" ({columns}) VALUES ({marks})'  # noqa: S608 - names are ours, values are bound
        return int(self._db.conn.execute(sql, tuple(row.values())).lastrowid or 0)

    def backup(self, path: Path) -> None:
        """Write a consistent copy, marked as one, to a new file. Raises `DamagedError`."""
        try:
            with closing(sqlite3.connect(path)) as copy, copy:  # closed, it leaves no log beside the file
                self._db.conn.backup(copy)
                copy.execute("INSERT OR REPLACE INTO meta (key, value) VALUES ('restored', '')")
        except sqlite3.Error as error:
            raise DamagedError(f"{self.path} cannot be copied to {path}: {error}") from error


_RESTORE: Final = "restore it from a backup (fleet server backup), with 'fleet server rebuild --backup FILE'"
_PAGE_SIZE_AT: Final = slice(16, 18)
_PAGES_AT: Final = slice(28, 32)
"""Size of a page, and number of pages, in the header of a database (SQLite's file format, section 1.3)."""


def _lacking(path: Path, *, create: bool) -> str:
    """Return what is wrong with a file before SQLite opens it: missing, empty, or shorter than its header says."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(100)
    except OSError:
        return "" if create or path.exists() else "is missing"
    log_path = path.with_name(f"{path.name}-wal")
    if log_path.exists() and log_path.stat().st_size:
        return ""  # pages may stand in the log
    if not size:
        return "" if create else "is empty"
    page = int.from_bytes(header[_PAGE_SIZE_AT], "big")
    pages = int.from_bytes(header[_PAGES_AT], "big")
    return "is cut off" if header.startswith(b"SQLite") and size < (65_536 if page == 1 else page) * pages else ""


def check_owner(path: Path) -> None:
    """Refuse a path of another user.

    Raises:
        OtherOwnerError: another user's, or not writable.
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


Migration = Callable[[sqlite_utils.Database], None]
MIGRATIONS: Final[list[Migration]] = []


def migration(function: Migration) -> Migration:
    """Register a migration. Migrations run in the order of this file, each in a transaction of its own."""
    MIGRATIONS.append(function)
    return function


def _run(db: sqlite_utils.Database, script: str) -> None:
    """Run the statements of a migration in its transaction, which `executescript` ends (sqlite-utils before 4)."""
    statement = ""
    for part in script.split(";"):
        statement += f"{part};"
        if sqlite3.complete_statement(statement):
            db.conn.execute(statement)
            statement = ""


@migration
def devices_and_groups(db: sqlite_utils.Database) -> None:
    """Create the tables of devices, groups, access and the audit log."""
    _run(
        db,
        """
        CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
        CREATE TABLE groups (
            name TEXT PRIMARY KEY, priority INTEGER NOT NULL DEFAULT 0, selector TEXT NOT NULL DEFAULT '{}',
            created_at REAL NOT NULL
        ) WITHOUT ROWID;
        CREATE TABLE devices (
            id TEXT PRIMARY KEY, name TEXT NOT NULL, machine TEXT NOT NULL DEFAULT '', sealing_key TEXT NOT NULL,
            key_sha256 TEXT NOT NULL UNIQUE, enrolled_at REAL NOT NULL, labels TEXT NOT NULL DEFAULT '{}',
            revoked INTEGER NOT NULL DEFAULT 0, commands INTEGER NOT NULL DEFAULT 0,
            online INTEGER NOT NULL DEFAULT 0, seen_at REAL, boot_id TEXT NOT NULL DEFAULT '',
            versions TEXT NOT NULL DEFAULT '{}', accepted INTEGER NOT NULL DEFAULT 0,
            deployed INTEGER NOT NULL DEFAULT 0, committed INTEGER NOT NULL DEFAULT 0,
            acked INTEGER NOT NULL DEFAULT 0,
            health_at REAL, health BLOB
        ) WITHOUT ROWID;
        CREATE TABLE members (
            "group" TEXT NOT NULL REFERENCES groups(name), device TEXT NOT NULL REFERENCES devices(id),
            PRIMARY KEY ("group", device)
        ) WITHOUT ROWID;
        CREATE INDEX members_device ON members (device);
        CREATE TABLE events (
            id INTEGER PRIMARY KEY, device TEXT NOT NULL, at REAL NOT NULL, kind TEXT NOT NULL, text TEXT NOT NULL,
            rollout TEXT NOT NULL DEFAULT '', assignment INTEGER NOT NULL DEFAULT 0
        );
        CREATE INDEX events_device ON events (device, at);
        CREATE TABLE tokens (
            secret_sha256 TEXT PRIMARY KEY, "group" TEXT NOT NULL, created_at REAL NOT NULL, expires REAL NOT NULL,
            used_at REAL, device TEXT, by TEXT NOT NULL, root_sha256 TEXT NOT NULL
        ) WITHOUT ROWID;
        CREATE TABLE certificates (
            serial TEXT PRIMARY KEY, device TEXT NOT NULL, not_after REAL NOT NULL, issued_at REAL NOT NULL,
            pem TEXT NOT NULL, revoked INTEGER NOT NULL DEFAULT 0
        ) WITHOUT ROWID;
        CREATE INDEX certificates_device ON certificates (device, issued_at);
        CREATE TABLE operators (
            name TEXT PRIMARY KEY, token_sha256 TEXT NOT NULL UNIQUE, role TEXT NOT NULL, created_at REAL NOT NULL
        ) WITHOUT ROWID;
        CREATE TABLE audit (
            number INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, actor TEXT NOT NULL, act TEXT NOT NULL,
            subject TEXT NOT NULL, detail TEXT NOT NULL DEFAULT ''
        );
        CREATE TRIGGER audit_is_append_only_1 BEFORE UPDATE ON audit
            BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
        CREATE TRIGGER audit_is_append_only_2 BEFORE DELETE ON audit
            BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
    """,
    )


@migration
def rollouts_and_delivery(db: sqlite_utils.Database) -> None:
    """Create the tables of assignments, their delivery, and reports."""
    _run(
        db,
        """
        CREATE TABLE artifacts (
            sha256 TEXT PRIMARY KEY, length INTEGER NOT NULL, stored_at REAL NOT NULL, by TEXT NOT NULL
        ) WITHOUT ROWID;
        CREATE TABLE settled (
            "group" TEXT NOT NULL, device TEXT NOT NULL, instance TEXT NOT NULL, value TEXT NOT NULL,
            since REAL NOT NULL, rollout TEXT NOT NULL, PRIMARY KEY ("group", device, instance)
        ) WITHOUT ROWID;
        CREATE TABLE settled_history (
            id INTEGER PRIMARY KEY, "group" TEXT NOT NULL, device TEXT NOT NULL, instance TEXT NOT NULL,
            value TEXT NOT NULL, since REAL NOT NULL, until REAL NOT NULL, rollout TEXT NOT NULL
        );
        CREATE TABLE rollouts (
            number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, "group" TEXT NOT NULL,
            device TEXT NOT NULL, instance TEXT NOT NULL, value TEXT NOT NULL, before TEXT NOT NULL,
            state TEXT NOT NULL, waves TEXT NOT NULL, sizes TEXT NOT NULL, wave INTEGER NOT NULL DEFAULT 0,
            failures INTEGER NOT NULL, soak_s REAL NOT NULL, timeout_s REAL NOT NULL,
            revision INTEGER NOT NULL DEFAULT 1, reason TEXT NOT NULL DEFAULT '', note TEXT NOT NULL DEFAULT '',
            by TEXT NOT NULL, undoes TEXT NOT NULL DEFAULT '', superseded_by INTEGER NOT NULL DEFAULT 0,
            created_at REAL NOT NULL, ended_at REAL
        );
        CREATE INDEX rollouts_state ON rollouts (state);
        CREATE TABLE boards (
            rollout INTEGER NOT NULL REFERENCES rollouts(number), device TEXT NOT NULL, wave INTEGER NOT NULL,
            outcome TEXT NOT NULL, offered_at REAL, acked_at REAL, ended_at REAL, attempt INTEGER NOT NULL,
            phase TEXT NOT NULL, progress INTEGER, code TEXT NOT NULL, message TEXT NOT NULL, running TEXT NOT NULL,
            exercised INTEGER NOT NULL, retrying INTEGER NOT NULL, previous TEXT NOT NULL DEFAULT '',
            version INTEGER NOT NULL DEFAULT 0, timings_ms TEXT NOT NULL DEFAULT '{}', log TEXT NOT NULL DEFAULT '[]',
            PRIMARY KEY (rollout, device)
        ) WITHOUT ROWID;
        CREATE INDEX boards_device ON boards (device);
        CREATE TABLE attempts (
            device TEXT NOT NULL, instance TEXT NOT NULL, attempt INTEGER NOT NULL, PRIMARY KEY (device, instance)
        ) WITHOUT ROWID;
        CREATE TABLE assignments (
            device TEXT NOT NULL, version INTEGER NOT NULL, sha256 TEXT NOT NULL, issued REAL NOT NULL,
            expires REAL NOT NULL, wanted TEXT NOT NULL, envelope BLOB NOT NULL, PRIMARY KEY (device, version)
        ) WITHOUT ROWID;
        CREATE TABLE reports (
            device TEXT NOT NULL, boot_id TEXT NOT NULL, sequence INTEGER NOT NULL, at REAL NOT NULL,
            rollout TEXT NOT NULL, raw BLOB NOT NULL, PRIMARY KEY (device, boot_id, sequence)
        ) WITHOUT ROWID;
        CREATE INDEX reports_device ON reports (device, at);
    """,
    )


@migration
def signed_reports(db: sqlite_utils.Database) -> None:
    """Add the mark of devices that have signed a report: unsigned ones are refused from then on."""
    _run(db, "ALTER TABLE devices ADD COLUMN signs INTEGER NOT NULL DEFAULT 0;")


@migration
def sealed_secrets(db: sqlite_utils.Database) -> None:
    """Add sealed secrets, and each device's proof of its sealing key."""
    _run(
        db,
        """
        ALTER TABLE devices ADD COLUMN sealing_proof TEXT NOT NULL DEFAULT '';
        CREATE TABLE secret_versions (
            instance TEXT NOT NULL, name TEXT NOT NULL, version INTEGER NOT NULL, PRIMARY KEY (instance, name)
        ) WITHOUT ROWID;
        CREATE TABLE boxes (
            device TEXT NOT NULL, instance TEXT NOT NULL, name TEXT NOT NULL, version INTEGER NOT NULL,
            sha256 TEXT NOT NULL, box BLOB NOT NULL, sealed TEXT NOT NULL, by TEXT NOT NULL, at REAL NOT NULL,
            PRIMARY KEY (device, instance, name, version)
        ) WITHOUT ROWID;
    """,
    )


@migration
def devices_of_rollouts_and_shared_workers(db: sqlite_utils.Database) -> None:
    """Rename the table `boards`, and the key `share_lane` of values and assignments to `share_worker`.

    What an assignment asked for is compared as text: under the earlier name every device would get a new one.
    """
    _run(
        db,
        """
        ALTER TABLE boards RENAME TO rollout_devices;
        DROP INDEX boards_device;
        CREATE INDEX rollout_devices_device ON rollout_devices (device);
    """,
    )
    db.conn.create_function("renamed", 1, _share_worker, deterministic=True)
    db.execute("UPDATE settled SET value = renamed(value)")
    db.execute("UPDATE settled_history SET value = renamed(value)")
    db.execute("UPDATE rollouts SET value = renamed(value), before = renamed(before)")
    db.execute("UPDATE assignments SET wanted = renamed(wanted)")


def _share_worker(column: str) -> str:
    """Rename the field in a value, or in each item of an assignment; the order of fields stays."""
    found = msgspec.json.decode(column)
    if isinstance(found, dict):
        found = _renamed(found)
        if "items" in found:
            found["items"] = [_renamed(item) for item in found["items"]]
    return msgspec.json.encode(found).decode()


def _renamed(fields: dict[str, Any]) -> dict[str, Any]:
    return {"share_worker" if name == "share_lane" else name: value for name, value in fields.items()}


@migration
def device_alerts(db: sqlite_utils.Database) -> None:
    """Create the table of security events that are shown for a time, suspensions among them."""
    _run(
        db,
        """
        CREATE TABLE alerts (
            device TEXT NOT NULL, kind TEXT NOT NULL, since REAL NOT NULL, until REAL NOT NULL, text TEXT NOT NULL,
            PRIMARY KEY (device, kind)
        ) WITHOUT ROWID;
    """,
    )


@migration
def proven_outcomes(db: sqlite_utils.Database) -> None:
    """Add plans, freezes, device keys and steady time; outcomes and states of earlier rollouts become the new ones."""
    _run(
        db,
        """
        CREATE TABLE new_rollouts (
            number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, "group" TEXT NOT NULL,
            device TEXT NOT NULL, instance TEXT NOT NULL, value TEXT NOT NULL, before TEXT NOT NULL,
            state TEXT NOT NULL, waves TEXT NOT NULL, plan TEXT NOT NULL, progress TEXT NOT NULL,
            revision INTEGER NOT NULL DEFAULT 1, reason TEXT NOT NULL DEFAULT '', note TEXT NOT NULL DEFAULT '',
            by TEXT NOT NULL, undoes TEXT NOT NULL DEFAULT '', superseded_by INTEGER NOT NULL DEFAULT 0,
            created_at REAL NOT NULL, ended_at REAL
        );
        CREATE TABLE new_devices (
            rollout INTEGER NOT NULL REFERENCES new_rollouts(number), device TEXT NOT NULL, outcome TEXT NOT NULL,
            wave INTEGER NOT NULL, member TEXT NOT NULL, offered_at REAL, acked_at REAL, ended_at REAL,
            previous TEXT NOT NULL DEFAULT '', version INTEGER NOT NULL DEFAULT 0,
            timings_ms TEXT NOT NULL DEFAULT '{}', log TEXT NOT NULL DEFAULT '[]', PRIMARY KEY (rollout, device)
        ) WITHOUT ROWID;
        CREATE TABLE device_keys (
            device TEXT NOT NULL, instance TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL,
            PRIMARY KEY (device, instance, key)
        ) WITHOUT ROWID;
        CREATE TABLE freezes (
            "group" TEXT PRIMARY KEY, reason TEXT NOT NULL, by TEXT NOT NULL, at REAL NOT NULL
        ) WITHOUT ROWID;
        ALTER TABLE groups ADD COLUMN policy TEXT NOT NULL DEFAULT 'null';
    """,
    )
    db.conn.create_function("as_plan", 4, _as_plan, deterministic=True)
    db.conn.create_function("as_progress", 4, _as_progress, deterministic=True)
    db.conn.create_function("as_outcome", 3, _as_outcome, deterministic=True)
    db.conn.create_function("as_member", 10, _as_member, deterministic=True)
    db.execute("""
        INSERT INTO new_rollouts
        SELECT number, id, "group", device, instance, value, before, replace(state, 'halted', 'reverted'), waves,
            as_plan(waves, failures, soak_s, timeout_s), as_progress(sizes, wave, soak_s, state), revision, reason,
            note, by, undoes, superseded_by, created_at, ended_at FROM rollouts
    """)
    db.execute("""
        INSERT INTO new_devices
        SELECT b.rollout, b.device, as_outcome(b.outcome, r.state, b.offered_at), b.wave,
            as_member(b.device, b.wave, as_outcome(b.outcome, r.state, b.offered_at), b.offered_at, b.acked_at,
                b.attempt, b.phase, b.code, b.message, b.running),
            b.offered_at, b.acked_at, b.ended_at, b.previous, b.version, b.timings_ms, b.log
        FROM rollout_devices b JOIN rollouts r ON r.number = b.rollout
    """)
    _run(
        db,
        """
        DROP TABLE rollout_devices;
        DROP TABLE rollouts;
        ALTER TABLE new_rollouts RENAME TO rollouts;
        ALTER TABLE new_devices RENAME TO rollout_devices;
        CREATE INDEX rollouts_state ON rollouts (state);
        CREATE INDEX rollout_devices_device ON rollout_devices (device);
    """,
    )


@migration
def readings(db: sqlite_utils.Database) -> None:
    """Create the tables of components' messages, and of how far each device has brought them."""
    _run(
        db,
        """
        CREATE TABLE readings (
            id INTEGER PRIMARY KEY AUTOINCREMENT, device TEXT NOT NULL, epoch TEXT NOT NULL, instance TEXT NOT NULL,
            sequence INTEGER NOT NULL, at REAL NOT NULL, received_at REAL NOT NULL, topic TEXT NOT NULL,
            content_type TEXT NOT NULL, metadata TEXT NOT NULL, data BLOB NOT NULL, size INTEGER NOT NULL
        );
        CREATE UNIQUE INDEX readings_sequence ON readings (device, epoch, instance, sequence);
        CREATE INDEX readings_device ON readings (device, id);
        CREATE INDEX readings_received ON readings (received_at);
        CREATE TABLE reading_positions (
            device TEXT PRIMARY KEY, epoch TEXT NOT NULL, position INTEGER NOT NULL, bytes INTEGER NOT NULL DEFAULT 0
        ) WITHOUT ROWID;
        CREATE TRIGGER readings_added AFTER INSERT ON readings
            BEGIN UPDATE reading_positions SET bytes = bytes + NEW.size WHERE device = NEW.device; END;
        CREATE TRIGGER readings_removed AFTER DELETE ON readings
            BEGIN UPDATE reading_positions SET bytes = bytes - OLD.size WHERE device = OLD.device; END;
    """,
    )


@migration
def consumers(db: sqlite_utils.Database) -> None:
    """Create the table of systems that read components' messages from the broker."""
    _run(
        db,
        """
        CREATE TABLE consumers (
            user TEXT PRIMARY KEY, name TEXT NOT NULL, "group" TEXT NOT NULL, topics TEXT NOT NULL,
            created_at REAL NOT NULL, ends_at REAL NOT NULL, revoked INTEGER NOT NULL
        ) WITHOUT ROWID;
    """,
    )


def _as_plan(waves: str, failures: int, soak_s: float, timeout_s: float) -> str:
    """Return the plan of a rollout that an earlier version began."""
    sizes = [part.strip() for part in waves.split(",")]
    stages = [{"size": {"number": int(each.rstrip("%")), "percent": each.endswith("%")}} for each in sizes]
    return text({"stages": stages, "limits": _as_limits(failures, timeout_s), "soak_s": soak_s})


def _as_limits(failures: int, timeout_s: float) -> dict[str, Any]:
    return {"failures": {"number": failures}, "timeout_s": timeout_s}


def _as_progress(sizes: str, wave: int, soak_s: float, state: str) -> str:
    """Return how far a rollout of an earlier version was; it keeps every wave, those without devices too."""
    gates = [{"soak_s": soak_s} for _ in msgspec.json.decode(sizes)]
    causes = ["operator"] if state == "paused" else []
    return text({"state": state.replace("halted", "reverted"), "gates": gates, "wave": wave, "causes": causes})


def _as_outcome(outcome: str, state: str, offered_at: float | None) -> str:
    """Return the present word for an outcome of an earlier version."""
    if outcome == "refused":
        return "failed"
    if outcome != "skipped":
        return outcome
    if offered_at is None:
        return "not-affected"
    return "superseded" if state == "superseded" else "reverted"


def _as_member(*columns: Any) -> str:
    """Return the progress of a device in a rollout of an earlier version; steady time begins now, at 0."""
    device, wave, outcome, offered_at, acked_at, attempt, phase, code, message, running = columns
    member: dict[str, Any] = {"device": device, "wave": wave, "outcome": outcome, "attempt": attempt, "phase": phase}
    member |= {"code": code, "message": message, "running": running}
    member |= {"reason": message} if outcome == "not-affected" else {}
    member |= {"offered_at": 0.0} if offered_at is not None else {}
    member |= {"began_at": 0.0} if acked_at is not None else {}
    return text(member | ({"ended_at": 0.0} if outcome in {"succeeded", "failed"} else {}))


class StoreError(Exception):
    """The database cannot be used."""


class OtherVersionError(StoreError):
    """The database was written by a newer program."""


class OtherOwnerError(StoreError):
    """The database belongs to another user, or may not be written."""


class OtherFleetError(StoreError):
    """The database holds another fleet than the configuration says."""


class RolledBackError(StoreError):
    """SQLite rolled back the whole transaction by itself, as on a full disk: nothing of it was kept."""


class DamagedError(StoreError):
    """The file is no database, or damaged."""

"""The schema, as the functions that lead to it. `PRAGMA user_version` counts those that ran; none is ever changed."""

from collections.abc import Callable
from typing import Final

from sqlite_utils import Database

Migration = Callable[[Database], None]
MIGRATIONS: Final[list[Migration]] = []


def migration(function: Migration) -> Migration:
    """Register a migration; they run in the order in which they stand here, each in a transaction of its own."""
    MIGRATIONS.append(function)
    return function


@migration
def boards_and_groups(db: Database) -> None:
    """Boards, groups, what each may do, and who did what."""
    db.executescript("""
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
    """)


@migration
def rollouts_and_delivery(db: Database) -> None:
    """What boards should run, how it gets there, and what they say."""
    db.executescript("""
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
    """)


@migration
def signed_reports(db: Database) -> None:
    """Whether a board has signed a report: from then on it is not heard without."""
    db.executescript("ALTER TABLE devices ADD COLUMN signs INTEGER NOT NULL DEFAULT 0;")


@migration
def sealed_secrets(db: Database) -> None:
    """Secrets in boxes, each for one board; and each board's own word on its sealing key."""
    db.executescript("""
        ALTER TABLE devices ADD COLUMN sealing_proof TEXT NOT NULL DEFAULT '';
        CREATE TABLE secret_versions (
            instance TEXT NOT NULL, name TEXT NOT NULL, version INTEGER NOT NULL, PRIMARY KEY (instance, name)
        ) WITHOUT ROWID;
        CREATE TABLE boxes (
            device TEXT NOT NULL, instance TEXT NOT NULL, name TEXT NOT NULL, version INTEGER NOT NULL,
            sha256 TEXT NOT NULL, box BLOB NOT NULL, sealed TEXT NOT NULL, by TEXT NOT NULL, at REAL NOT NULL,
            PRIMARY KEY (device, instance, name, version)
        ) WITHOUT ROWID;
    """)

"""The only SQL; its thread; the state directory's lock.

The board's memory: the only SQL of the agent.

One SQLite file in WAL mode with synchronous=FULL: what a method has returned from is on the medium. Each step of the
update machine is one transaction (`save`), together with the report that tells of it, so that a power cut leaves a
state and its report, or neither. All methods block and belong to the agent's one worker thread.

The agent's one worker thread: TUF, SQLite and fsync happen there, one after another, off the asyncio loop.

One agent for one state directory: a second would take the first one's place at the broker, again and again.
"""

import asyncio
import fcntl
import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

import msgspec

from agent.update.state import Change, Committed, FailedItem, Violation
from fleet.protocol import wire
from fleet.protocol.messages import Report
from signing.state import VerifierState

MIGRATIONS: Final = (
    """
    CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
    CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE committed (instance TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID;
    CREATE TABLE changes (instance TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID;
    CREATE TABLE failed (instance TEXT, key TEXT, attempt INTEGER, body BLOB NOT NULL,
                         PRIMARY KEY (instance, key, attempt)) WITHOUT ROWID;
    CREATE TABLE outbox (sequence INTEGER PRIMARY KEY AUTOINCREMENT, instance TEXT NOT NULL, progress INTEGER NOT NULL,
                         acked INTEGER NOT NULL DEFAULT 0, body BLOB NOT NULL);
    """,
)
"""Each entry brings the schema from the version of its index to the next; entries are never changed, only added."""

HISTORY_ROWS: Final = 200

UNACKED_ROWS_MAX: Final = 2000

FAILED_ROWS_MAX: Final = 256


class StoreError(Exception):
    """The state directory cannot be used; the message says why and what to do."""


def _check_owner(directory: Path) -> None:
    owner = directory.stat().st_uid
    if owner != os.geteuid() != 0:
        raise StoreError(f"{directory} belongs to another user (uid {owner}): run as that user")


class Store:
    """The agent's database in its state directory.

    Attributes:
        nonce: of the newest hello, for the reports from then on.
    """

    nonce = ""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open the database, creating or migrating it.

        Raises:
            StoreError: of another owner, of a newer version, damaged, or not writable.
        """
        self._path = path
        try:
            _check_owner(path.parent)
            self._db = sqlite3.connect(
                f"file:{path}?mode=ro" if read_only else path,
                uri=read_only,
                isolation_level=None,
                check_same_thread=False,
                timeout=10,
            )
            if not read_only:
                path.chmod(0o600)
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=FULL")
            self._migrate(read_only=read_only)
        except (sqlite3.Error, OSError) as error:
            remedy = "check its mode and the space on its file system"
            if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
                remedy = "move it away: what runs is known from runset.json, and the rest is learned anew"
            raise StoreError(f"cannot open {path}: {error}; {remedy}") from error

    def _migrate(self, *, read_only: bool) -> None:
        version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
        if version > len(MIGRATIONS):
            raise StoreError(
                f"{self._path} is of schema {version}, this agent knows up to {len(MIGRATIONS)}: "
                "install the newer agent again, or move the state directory away and enrol anew"
            )
        if read_only:
            if version < len(MIGRATIONS):
                raise StoreError(f"{self._path} is of the older schema {version}: start the agent once")
            return
        for number in range(version, len(MIGRATIONS)):
            script = f"BEGIN IMMEDIATE; {MIGRATIONS[number]}; PRAGMA user_version={number + 1}; COMMIT;"
            self._db.executescript(script)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield self._db
            self._db.execute("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise StoreError(
                    f"cannot write {self._path}: {error}; free space on this board, or mend its disk"
                ) from error
            raise

    # The update machine

    def save(
        self,
        change: Change | None = None,
        *,
        report: Report | None = None,
        committed: Committed | None = None,
        removed: str = "",
        failure: FailedItem | None = None,
        closed: str = "",
        facts: VerifierState | None = None,
    ) -> int:
        """One step of the machine, in one transaction.

        Args:
            change: its new state.
            report: to send; its sequence is given here.
            committed: what its instance runs from now on, also after a boot.
            removed: an instance that runs no more.
            failure: to be remembered.
            closed: an instance whose change is over.
            facts: what is to be remembered of trust.

        Returns:
            The report's sequence, 0 without one.
        """
        sequence = 0
        with self._transaction() as db:
            if change is not None:
                db.execute("REPLACE INTO changes VALUES (?, ?)", (change.instance, change.encode()))
            if committed is not None:
                row = (committed.item.instance, msgspec.json.encode(committed))
                db.execute("REPLACE INTO committed VALUES (?, ?)", row)
            if removed:
                db.execute("DELETE FROM committed WHERE instance = ?", (removed,))
            if failure is not None:
                self._remember(db, failure)
            if closed:
                db.execute("DELETE FROM changes WHERE instance = ?", (closed,))
            if facts is not None:
                db.execute("REPLACE INTO meta VALUES ('facts', ?)", (facts.encode(),))
            if report is not None:
                sequence = self._post(db, report)
        return sequence

    def _remember(self, db: sqlite3.Connection, failure: FailedItem) -> None:
        row = (failure.instance, failure.key, failure.attempt, msgspec.json.encode(failure))
        db.execute("REPLACE INTO failed VALUES (?, ?, ?, ?)", row)
        (count,) = db.execute("SELECT count(*) FROM failed").fetchone()
        if count > FAILED_ROWS_MAX:
            oldest = min(self.failed(), key=lambda each: each.at)
            key = (oldest.instance, oldest.key, oldest.attempt)
            db.execute("DELETE FROM failed WHERE instance = ? AND key = ? AND attempt = ?", key)

    def changes(self) -> tuple[Change, ...]:
        """What is under way."""
        rows = self._db.execute("SELECT body FROM changes ORDER BY instance")
        return tuple(Change.decode(body) for (body,) in rows)

    def committed(self) -> tuple[Committed, ...]:
        """What runs, and is to run after a boot.

        Raises:
            StoreError: the database is damaged.
        """
        try:
            rows = self._db.execute("SELECT body FROM committed ORDER BY instance").fetchall()
            return tuple(msgspec.json.decode(body, type=Committed) for (body,) in rows)
        except (sqlite3.Error, *wire.JSON_ERRORS) as error:
            raise StoreError(f"{self._path} is damaged: {error}") from error

    def failed(self) -> tuple[FailedItem, ...]:
        """What failed and is remembered."""
        rows = self._db.execute("SELECT body FROM failed ORDER BY instance")
        return tuple(msgspec.json.decode(body, type=FailedItem) for (body,) in rows)

    # Trust

    def facts(self) -> VerifierState:
        """What is remembered of signed metadata and assignments."""
        body = self._meta("facts")
        return VerifierState() if body is None else VerifierState.decode(body)

    def accept(self, envelope: bytes, version: int, facts: VerifierState) -> None:
        """Persist an assignment whose envelope has been verified, before anything of it is fetched."""
        with self._transaction() as db:
            db.execute("REPLACE INTO meta VALUES ('envelope', ?)", (envelope,))
            db.execute("REPLACE INTO meta VALUES ('facts', ?)", (facts.encode(),))
            db.execute("REPLACE INTO counters VALUES ('accepted', ?)", (version,))

    def envelope(self) -> bytes | None:
        """The accepted assignment, as it came."""
        return self._meta("envelope")

    # What stands against what runs or is wanted, for `fleet-agent why`

    def set_doubts(self, doubts: Iterable[Violation]) -> None:
        """What speaks against committed items, and was reported."""
        self._set_meta("doubts", msgspec.json.encode(tuple(doubts)))

    def doubts(self) -> tuple[Violation, ...]:
        """Read them back."""
        body = self._meta("doubts")
        return () if body is None else msgspec.json.decode(body, type=tuple[Violation, ...])

    def set_problems(self, problems: Iterable[str]) -> None:
        """What keeps this board from its newest assignment, as sentences for people."""
        self._set_meta("problems", msgspec.json.encode(tuple(problems)))

    def problems(self) -> tuple[str, ...]:
        """Read them back."""
        body = self._meta("problems")
        return () if body is None else msgspec.json.decode(body, type=tuple[str, ...])

    def _set_meta(self, name: str, value: bytes) -> None:
        if self._meta(name) != value:
            with self._transaction() as db:
                db.execute("REPLACE INTO meta VALUES (?, ?)", (name, value))

    def _meta(self, name: str) -> bytes | None:
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return None if row is None else bytes(row[0])

    # Numbers

    def counter(self, name: str) -> int:
        """A stored number, 0 if it was never set."""
        row = self._db.execute("SELECT value FROM counters WHERE name = ?", (name,)).fetchone()
        return 0 if row is None else int(row[0])

    def set_counter(self, name: str, value: int) -> None:
        """Store a number, if it is another than before."""
        if self.counter(name) != value:
            with self._transaction() as db:
                db.execute("REPLACE INTO counters VALUES (?, ?)", (name, value))

    def next_generation(self) -> int:
        """A generation that this board has never used."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO counters VALUES ('generation', 1) ON CONFLICT (name) DO UPDATE SET value = value + 1"
            )
            return int(db.execute("SELECT value FROM counters WHERE name = 'generation'").fetchone()[0])

    # Reports

    def _post(self, db: sqlite3.Connection, report: Report) -> int:
        progress = report.progress is not None
        db.execute("DELETE FROM outbox WHERE instance = ? AND progress = 1", (report.instance,))
        cursor = db.execute(
            "INSERT INTO outbox (instance, progress, body) VALUES (?, ?, '')", (report.instance, int(progress))
        )
        sequence = int(cursor.lastrowid or 0)
        accepted = self.facts().assignment
        full = msgspec.structs.replace(
            report,
            sequence=sequence,
            nonce=self.nonce,
            assignment_sha256="" if accepted is None else accepted.sha256,
            previous=(self._meta("last_report") or b"").decode(),
        )
        body = wire.encode(full)
        if not progress:
            last = hashlib.sha256(body).hexdigest().encode()
            db.execute("REPLACE INTO meta VALUES ('last_report', ?)", (last,))
        db.execute("UPDATE outbox SET body = ? WHERE sequence = ?", (body, sequence))
        db.execute(
            "DELETE FROM outbox WHERE acked = 0 AND sequence <= "
            "(SELECT sequence FROM outbox WHERE acked = 0 ORDER BY sequence DESC LIMIT 1 OFFSET ?)",
            (UNACKED_ROWS_MAX,),
        )
        return sequence

    def unacked(self, limit: int = 64, after: int = 0) -> tuple[tuple[int, bytes], ...]:
        """Reports that the server has not stored yet, oldest first, with their sequence."""
        rows = self._db.execute(
            "SELECT sequence, body FROM outbox WHERE acked = 0 AND sequence > ? ORDER BY sequence LIMIT ?",
            (after, limit),
        )
        return tuple((int(sequence), bytes(body)) for sequence, body in rows)

    def acknowledge(self, sequence: int) -> bool:
        """Every report up to `sequence` is stored by the server. Returns whether that was news."""
        pending = self._db.execute(
            "SELECT 1 FROM outbox WHERE acked = 0 AND sequence <= ? LIMIT 1", (sequence,)
        ).fetchone()
        if pending is None:
            return False
        with self._transaction() as db:
            db.execute("UPDATE outbox SET acked = 1 WHERE sequence <= ?", (sequence,))
            db.execute(
                "DELETE FROM outbox WHERE acked = 1 AND sequence <= "
                "(SELECT sequence FROM outbox WHERE acked = 1 ORDER BY sequence DESC LIMIT 1 OFFSET ?)",
                (HISTORY_ROWS,),
            )
        return True

    def unacknowledge(self, sequence: int) -> bool:
        """A server lost what came after `sequence`: what is still here is sent again. Returns whether there is any."""
        with self._transaction() as db:
            return db.execute("UPDATE outbox SET acked = 0 WHERE acked = 1 AND sequence > ?", (sequence,)).rowcount > 0

    def acked(self) -> int:
        """The newest report that a server has stored; 0 for none."""
        return int(self._db.execute("SELECT coalesce(max(sequence), 0) FROM outbox WHERE acked = 1").fetchone()[0])

    def history(self) -> tuple[Report, ...]:
        """The newest reports, oldest first, whether acknowledged or not."""
        rows = self._db.execute("SELECT body FROM outbox ORDER BY sequence DESC LIMIT ?", (HISTORY_ROWS,)).fetchall()
        return tuple(wire.decode(Report, bytes(body)) for (body,) in reversed(rows))


P = ParamSpec("P")

R = TypeVar("R")


class Database:
    """Runs blocking calls in order on a thread of its own."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def __call__(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run `call` after everything that was asked before; a cancelled caller does not stop a call that runs."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: call(*args, **kwargs))

    def close(self) -> None:
        """Wait for what was asked, then end the thread."""
        self._pool.shutdown(wait=True)


class NotAloneError(Exception):
    """Another agent runs on the same state directory; the message says what to do."""


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Hold a state directory's lock; the kernel lets go of it when the process ends, however it ends.

    Raises:
        NotAloneError: another process holds it.
        OSError: it cannot be written.
    """
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise NotAloneError(
                f"another agent runs on {lock.parent}: stop it, or give this one a --state of its own"
            ) from None
        yield
    finally:
        os.close(descriptor)

"""Device state on disk: the only SQL of the agent, the thread it runs on, and the lock of the state directory.

One SQLite file in WAL mode with synchronous=FULL: what a method has returned from is on the medium. Each step of
a change is one transaction (`Store.apply`), together with the report about it, so that a power cut leaves a
state and its report, or neither. All methods of `Store` block; `Database` owns the store and runs them, one after
another, on its thread, where TUF and fsync happen too.

The lock admits one agent to a state directory: a second would displace the first at the broker, again and again.
"""

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Concatenate, Final, NamedTuple, ParamSpec, Protocol, TypeVar

import msgspec

from agent import disk
from agent.disk import Point, Write
from agent.update.state import Change, Committed, FailedItem, FailureKey, Transition, Violation
from fleet.protocol import bounds, files, wire
from fleet.protocol.files import irregular, is_full, is_read_only
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
UNSENT_EXCERPTS_BYTES_MAX: Final = 4 * bounds.MIB
"""Reports that the server has not stored, beyond which new ones carry no lines of a log: about a hundred failures."""
FAILED_ROWS_MAX: Final = 256
LOST_GENERATIONS: Final = 1000
"""Generations that a lost database may have given since its last commit: far more than attempts between two commits."""


BUSY_S: Final = 10
"""Wait for another process that uses the database, such as `fleet-agent status`."""

BESIDE_BYTES: Final = 64 * 1024
"""Room for the log of an open database and its index."""

NEW_BYTES: Final = 256 * 1024
"""Room for a new database with what `runset.json` and the first reports bring, its log and its index."""

_MEMORY: Final = Path(":memory:")
_BESIDE: Final = ("-wal", "-shm")
_HEADER_BYTES: Final = 100
_IN_MEMORY_MAX_BYTES: Final = 256 * bounds.MIB
_VERSIONS: Final = slice(18, 20)
"""Bytes of the header with the versions needed to write and to read the file: SQLite, Database File Format."""

_IF_DAMAGED: Final = (
    "move it away, as the agent does when it starts: committed instances are then restored from runset.json"
)

log = logging.getLogger("agent.update.store")


class StoreError(Exception):
    """The state directory cannot be used; the message says why and what to do."""


class DamagedStoreError(StoreError):
    """Not a database, or a damaged one: `Store.renewed` sets it aside."""


class CannotWriteError(StoreError):
    """Nothing can be written for now: the disk is full, read-only or failing."""


class NewerStoreError(StoreError):
    """Database of a schema that this agent does not know; `writer` is the version of the agent that used it last."""

    def __init__(self, message: str, writer: bytes) -> None:
        super().__init__(message)
        self.writer = writer.decode(errors="replace")


class Applied(NamedTuple):
    """A step as it was stored.

    Attributes:
        step: with the generation that it was given.
        sequence: of the report; 0 without one.
        forgotten: oldest failure, dropped to keep the number of remembered failures within its limit.
    """

    step: Transition
    sequence: int
    forgotten: FailureKey | None


_ERRORS: Final = (sqlite3.Error, UnicodeDecodeError)
"""Errors of SQLite; the second where it quotes a damaged schema in its message."""


def _is_damage(error: BaseException) -> bool:
    """Return whether SQLite says that the file is damaged, or no database; its other errors have classes below this."""
    return type(error) is sqlite3.DatabaseError or isinstance(error, UnicodeDecodeError)


_NO_WRITES: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO})
_SQLITE_NO_WRITES: Final = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY})


def _why_not_written(directory: Path, room_bytes: int, error: BaseException | None = None) -> str:
    """Return why nothing new can be written to a disk for now, and until when; empty where it should be possible.

    Args:
        directory: on the disk.
        room_bytes: needed there.
        error: of the attempt, for quotas and failing disks, which can be told by nothing else.
    """
    if is_read_only(directory):
        return "the disk is read-only: nothing is recorded until it is writable"
    is_quota = isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if is_full(directory, room_bytes) or is_quota or code == sqlite3.SQLITE_FULL:
        return "the disk is full: nothing is recorded until there is space"
    if (isinstance(error, OSError) and error.errno in _NO_WRITES) or code in _SQLITE_NO_WRITES:
        return f"the disk fails ({getattr(error, 'strerror', None) or error}): nothing is recorded until it works again"
    return ""


def _is_newer(version: str, than: str) -> bool:
    """Compare two versions such as 0.2.0; one that cannot be read is not newer."""
    try:
        return tuple(map(int, version.split("."))) > tuple(map(int, than.split(".")))
    except ValueError:
        return False


def _connect(address: Path | str, *, uri: bool = False) -> sqlite3.Connection:
    return sqlite3.connect(address, uri=uri, isolation_level=None, check_same_thread=False, timeout=BUSY_S)


def holds_something(path: Path) -> bool:
    """Return whether there is a database, or something in its place: an attempt on a full disk leaves an empty file."""
    return bool(irregular(path)) or (path.exists() and path.stat().st_size > 0)


def lost_and_not_replaced(path: Path, error: BaseException | None = None) -> str:
    """Return a sentence on a damaged database that cannot be replaced for now; empty where nothing is in the way."""
    directory = path.parent
    fault = "is damaged" if holds_something(path) else "is lost"
    if is_read_only(directory):
        why = "its file system is read-only: make it writable"
    elif is_full(directory, NEW_BYTES):
        why = f"its disk is too full for a new one: free {NEW_BYTES // 1024} KiB"
    elif error is not None:
        why = f"no new one can be made ({getattr(error, 'strerror', None) or error}): repair its disk"
    else:
        return ""
    return f"{path} {fault}, and {why}, and the agent rebuilds it by itself; instances go on meanwhile"


@contextmanager
def _transaction(what: Write, db: sqlite3.Connection, path: Path) -> Iterator[sqlite3.Connection]:
    """Write to the database in one transaction, which is undone after an error: the only door to it."""
    disk.reached(what, Point.BEFORE, path, b"")
    try:
        db.execute("BEGIN IMMEDIATE")
        yield db
        disk.reached(what, Point.MIDDLE, path, b"")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    disk.reached(what, Point.AFTER, path, b"")


def _connect_to_read(path: Path) -> sqlite3.Connection:
    """Open a database to read it, also on a file system that is read-only or full.

    Raises:
        StoreError: the directory is not writable for this user, and somebody else may write there.
    """
    db = _connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    try:
        db.execute("PRAGMA user_version").fetchone()
    except sqlite3.OperationalError:
        db.close()
        if not is_read_only(path.parent):
            if not os.access(path.parent, os.W_OK):
                raise StoreError(f"{path.parent} is not writable: check its mode and its file system") from None
            if not is_full(path.parent, BESIDE_BYTES):
                raise
        db = _connect_without_index(path)
    return db


def _connect_to_write(path: Path) -> sqlite3.Connection:
    db = _connect(path)
    try:
        db.execute("PRAGMA temp_store=MEMORY")  # large sorts: there may be no disk for temporary files
        if path.exists():  # else in memory
            path.chmod(0o600)
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
    except BaseException:
        db.close()
        raise
    return db


def _connect_without_index(path: Path) -> sqlite3.Connection:
    """Open a database to read it where SQLite cannot make the index of its log on the disk.

    Nobody writes there meanwhile: no lock is needed, and the index may be in this process's memory.
    """
    log_file = path.with_name(f"{path.name}-wal")
    has_log = log_file.exists() and log_file.stat().st_size > 0
    db = _connect(f"{path.absolute().as_uri()}?mode=ro&{'nolock' if has_log else 'immutable'}=1", uri=True)
    db.execute("PRAGMA locking_mode=EXCLUSIVE")
    return db


@contextmanager
def _reading_apart(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the bytes of a database in memory, without its log and its disk; raises `OSError` where they cannot be read.

    A database in memory has no log: its versions are set to those of one without.
    """
    content = bytearray(files.read(path, max_bytes=_IN_MEMORY_MAX_BYTES))
    if content[_VERSIONS] == b"\2\2":
        content[_VERSIONS] = b"\1\1"
    with contextlib.closing(_connect(":memory:")) as db:
        db.deserialize(bytes(content))
        yield db


def _header(path: Path) -> bytes:
    """Return the first bytes of a database. Raises `StoreError`."""
    try:
        with files.open_to_read(path) as file:
            return file.read(_HEADER_BYTES)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}; check its disk") from error


def _check_files(path: Path) -> None:
    """Check that a database and what is beside it are files: SQLite would wait for a named pipe.

    Raises:
        DamagedStoreError: something else has one of their names.
    """
    for each in (path, *(path.with_name(path.name + suffix) for suffix in _BESIDE)):
        if what := irregular(each):
            raise DamagedStoreError(f"cannot open {each}: it is {what}, not a file; {_IF_DAMAGED}")


def _check_owner(directory: Path) -> None:
    owner = directory.stat().st_uid
    if owner != os.geteuid() != 0:
        raise StoreError(f"{directory} belongs to another user (uid {owner}): run as that user")


class Store:
    """The agent's database in its state directory.

    Attributes:
        nonce: of the newest hello, named in the reports after it.
        replaced: sentence on the damaged database that was set aside for this one; empty for none.
        waits: why nothing is recorded for now, and what is there is in memory; empty while the file itself is used.
        downgraded: sentence on a newer agent that used the database last; empty for none.
    """

    nonce = ""
    replaced = ""
    waits = ""
    downgraded = ""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open the database, creating or migrating it.

        Raises:
            StoreError: of another owner, of a newer version, damaged, or not writable.
        """
        self._path = path
        self._is_lost = False  # while it waits: no database is left that could be gone on with
        self._filled: tuple[tuple[Committed, ...], VerifierState, int] | None = None
        self._version = ""
        try:
            if path != _MEMORY:
                _check_owner(path.parent)
                _check_files(path)
            if read_only:
                self._db = _connect_to_read(path)
                self._db.execute("PRAGMA temp_store=MEMORY")
            else:
                self._db = _connect_to_write(path)
            self._migrate(read_only=read_only)
        except (*_ERRORS, OSError) as error:
            if _is_damage(error):
                raise DamagedStoreError(f"cannot open {path}: {error}; {_IF_DAMAGED}") from error
            raise StoreError(f"cannot open {path}: {error}; check its mode and the space on its file system") from error

    @classmethod
    def empty(cls) -> "Store":
        """Return a store in memory, for reading what a device without a database has."""
        return cls(_MEMORY)

    @classmethod
    def lost(cls, path: Path, reason: str) -> "Store":
        """Return a store in memory for a database that is damaged or lost, and cannot be made anew for this `reason`.

        Empty until `fill`. Nothing else can be written to it: each attempt first tries to make the file anew.
        """
        store = cls(_MEMORY)
        store._path, store._is_lost, store.waits = path, True, reason
        return store

    @classmethod
    def copied(cls, path: Path, reason: str) -> "Store":
        """Return a store in memory with the content of a database that cannot be opened on its own disk now.

        Nothing can be written to it for this `reason`: each attempt first tries to go on with the database itself.

        Raises:
            DamagedStoreError: its content is damaged.
            StoreError: the file cannot be read, or is of a newer agent.
        """
        store = cls(_MEMORY)
        store._path, store.waits = path, reason
        try:
            try:
                with contextlib.closing(_connect_without_index(path)) as found:
                    found.backup(store._db)
            except sqlite3.OperationalError as error:  # the file's content, or the disk's fault
                with _reading_apart(path) as found:
                    found.execute("SELECT count(*) FROM sqlite_schema").fetchone()
                raise StoreError(f"cannot read {path}: {error}; check its disk") from error
            store._migrate(read_only=False)
        except _ERRORS as error:
            store.close()
            raise DamagedStoreError(f"cannot read {path}: {error}; {_IF_DAMAGED}") from error
        except OSError as error:
            store.close()
            raise StoreError(f"cannot read {path}: {error.strerror}; check its disk") from error
        except StoreError:
            store.close()
            raise
        return store

    @classmethod
    def renewed(cls, path: Path, *, version: str = "") -> "Store":
        """Open the database; move a damaged one (as after a power cut on a worn disk) aside, and make a new one.

        While nothing can be written to the disk, what the database holds is read into memory, see `copied`; a damaged
        one stays where it is, see `lost`.

        Args:
            path: of the database.
            version: of this agent, noted in the database for an earlier one that cannot read it.

        Raises:
            StoreError: see the constructor; or rows of a newer agent, which this one cannot read.
        """
        try:
            store = cls._checked(path, version)
        except DamagedStoreError as error:
            log.error("%s", error)  # noqa: TRY400 - a sentence for people
            store = cls._in_place_of(path)
        return store.used_by(version) if version else store

    def used_by(self, version: str) -> "Store":
        """Note the version of the agent that uses this store, for an earlier one that cannot read it; return this."""
        self._version = version
        writer = (self._meta("agent_version") or b"").decode(errors="replace")
        if _is_newer(writer, version):
            self.downgraded = (
                f"this agent, version {version}, is older than the last one here, {writer}: what only that one "
                "knows is kept, and has no effect until it is installed again"
            )
            log.warning("%s", self.downgraded)
        with contextlib.suppress(CannotWriteError):  # noted once there is space, or at a later start
            self._set_meta("agent_version", version.encode())
        return self

    def detach(self) -> sqlite3.Connection:
        """Give away the connection to the file: this store is not used any more."""
        return self._db

    @classmethod
    def _in_place_of(cls, path: Path) -> "Store":
        """Return a new store for a damaged one: on the disk, or in memory while nothing can be written there."""
        try:
            return cls._made_anew(path)
        except (OSError, StoreError) as error:
            log.error("%s", error)  # noqa: TRY400 - a sentence for people
            return cls.lost(path, str(error))

    @classmethod
    def _made_anew(cls, path: Path) -> "Store":
        """Move a damaged database aside, and make a new one.

        Raises:
            CannotWriteError: nothing can be written for now.
        """
        if fault := lost_and_not_replaced(path):
            raise CannotWriteError(fault)
        try:
            for each in (path.with_name(path.name + suffix) for suffix in _BESIDE):  # of the damaged one
                if irregular(each):
                    disk.set_aside(Write.STORE_DAMAGED, each)
                else:
                    disk.remove(Write.STORE_DAMAGED, each, missing_ok=True)
            aside = path.with_name(f"{path.name}.damaged")
            if holds_something(path):
                aside = disk.set_aside(Write.STORE_DAMAGED, path)
                log.error("%s: moved to %s", path, aside)
            try:
                store = cls(path)
            except StoreError:
                disk.remove(Write.STORE_DAMAGED, path, missing_ok=True)  # nothing of it is of use
                raise
        except (OSError, StoreError) as error:
            raise CannotWriteError(lost_and_not_replaced(path, error)) from error
        store.replaced = f"{path} was damaged and is rebuilt; the damaged file is {aside.name} beside it"
        return store

    @classmethod
    def _checked(cls, path: Path, version: str) -> "Store":
        """Open the database, or a copy of it where the disk is full, and read all of it.

        Raises:
            DamagedStoreError: its content is damaged. SQLite has several errors for what a first page may hold, that of
                a missing right, a missing file or a missing column among them: so what it says of a copy in memory, for
                which there is no disk, decides.
            StoreError: for another reason.
        """
        was_there = holds_something(path)
        try:
            try:
                return cls(path).checked(version)
            except StoreError as error:
                if not isinstance(error.__cause__, sqlite3.OperationalError | OSError):
                    raise
                reason = _why_not_written(path.parent, BESIDE_BYTES, error.__cause__)
                if not was_there:  # SQLite may have made an empty file
                    if reason:
                        log.error("%s: %s", path, reason)  # noqa: TRY400 - a sentence for people
                        return cls.lost(path, f"{path} is lost, and {reason}")
                    raise
                store = cls.copied(path, f"{path}: {reason}").checked(version)
                if not reason:
                    store.close()
                    raise
                log.error("%s", store.waits)  # noqa: TRY400
                return store
        except NewerStoreError as error:
            if _is_newer(error.writer, version):
                raise
            raise DamagedStoreError(f"{error}; but version {error.writer} wrote it last") from error

    def checked(self, version: str) -> "Store":
        """Read every page and row, and return this store; one that is damaged is closed.

        Raises:
            DamagedStoreError: a page or a row is damaged.
            StoreError: the disk cannot be read now, or rows are of a newer agent than this one of `version`.
        """
        try:
            self._check(version)
        except BaseException:
            self.close()
            raise
        return self

    def _check(self, version: str) -> None:
        """See `checked`: SQLite itself notices a damaged page only when it is read, and rows never."""
        with self._reading():
            # SQLite would read another format, and refuse to write.
            if _header(self._path)[_VERSIONS] not in {b"", b"\1\1", b"\2\2"}:
                raise DamagedStoreError(f"{self._path} is damaged: it is of an unknown format")
            (found,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise DamagedStoreError(f"{self._path} is damaged: {found}")
            for (body,) in self._rows("SELECT body FROM outbox"):
                msgspec.json.decode(body)
            for name in ("accepted", "deployed", "committed", "generation"):
                self.counter(name)
            (self._meta("last_report") or b"").decode()
        try:
            for read in (self.changes, self.committed, self.failed, self.facts, self.doubts, self.problems):
                read()
        except DamagedStoreError as error:
            writer = (self._meta("agent_version") or b"").decode(errors="replace")
            if isinstance(error.__cause__, msgspec.ValidationError) and _is_newer(writer, version):
                raise StoreError(
                    f"{self._path} was last used by version {writer} of the agent, and this one, {version}, cannot "
                    f"read it ({error.__cause__}): install the newer agent again; instances go on meanwhile"
                ) from error
            raise

    def _migrate(self, *, read_only: bool) -> None:
        version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
        if not 0 <= version <= len(MIGRATIONS):
            writer = self._db.execute("SELECT value FROM meta WHERE name = 'agent_version'").fetchone()
            raise NewerStoreError(
                f"{self._path} is of schema {version}, this agent knows up to {len(MIGRATIONS)}: "
                "install the newer agent again, or move the state directory away and enrol again",
                b"" if writer is None else bytes(writer[0]),
            )
        if read_only:
            if version < len(MIGRATIONS):
                raise StoreError(f"{self._path} is of the older schema {version}: start the agent once")
            return
        for number in range(version, len(MIGRATIONS)):
            with _transaction(Write.STORE_SCHEMA, self._db, self._path) as db:
                for statement in MIGRATIONS[number].split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version={number + 1}")

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @contextmanager
    def _transaction(self, what: Write) -> Iterator[sqlite3.Connection]:
        if self.waits:
            self._go_on_with_the_file()
        try:
            with _transaction(what, self._db, self._path) as db:
                yield db
        except BaseException as error:
            if _is_damage(error):
                raise DamagedStoreError(f"{self._path} is damaged: {error}") from error
            if isinstance(error, sqlite3.Error):
                full = getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL
                kind = CannotWriteError if full else StoreError
                raise kind(
                    f"cannot write {self._path}: {error}; free space on this device, or repair its disk"
                ) from error
            raise

    def heal(self) -> bool:
        """Go on with the file where it can be written again; return whether it is used now.

        Raises:
            DamagedStoreError: the file was damaged meanwhile.
        """
        if self.waits:
            with contextlib.suppress(CannotWriteError):
                self._go_on_with_the_file()
        return not self.waits

    def _go_on_with_the_file(self) -> None:
        """Replace what is in memory, which nothing has changed, by the file. Raises `CannotWriteError`."""
        if self._is_lost:
            store = Store._made_anew(self._path)
            if self._filled is not None:
                committed, facts, sequence = self._filled
                try:
                    store.fill(committed, facts, sequence=sequence)
                except StoreError:
                    store.close()
                    disk.remove(Write.STORE_DAMAGED, self._path, missing_ok=True)  # the next attempt begins anew
                    raise
            db, self.replaced = store.detach(), store.replaced
        else:
            try:
                db = _connect_to_write(self._path)
            except (sqlite3.Error, OSError) as error:
                reason = _why_not_written(self._path.parent, BESIDE_BYTES, error)
                what = "its disk is read-only" if reason.startswith("the disk is read-only") else "its disk is full"
                raise CannotWriteError(
                    f"cannot write {self._path}: {what}; free space on this device, or repair its disk"
                ) from error
        self._db.close()
        self._db, self._is_lost, self.waits = db, False, ""
        log.info("%s: there is space again, and it is written again", self._path)
        if self._version:
            self._set_meta("agent_version", self._version.encode())

    def _rows(self, query: str, *values: object) -> list[Any]:
        with self._reading():
            return self._db.execute(query, values).fetchall()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.ProgrammingError:  # a bug in the agent, such as the use of a closed store
            raise
        except (*_ERRORS, *wire.JSON_ERRORS) as error:
            if isinstance(error, sqlite3.Error) and not _is_damage(error) and not self.waits:
                raise StoreError(f"cannot read {self._path}: {error}; check its file system") from error
            raise DamagedStoreError(f"{self._path} is damaged: {error}") from error

    # Changes

    def apply(self, step: Transition) -> Applied:
        """Store everything that one step persists, in one transaction.

        Epochs and secret versions are merged into the stored verifier state here, so that nobody reads that row before
        the transaction and writes it afterwards.

        Raises:
            StoreError: the database cannot be written, or is damaged; nothing of the step is stored.
        """
        with self._transaction(Write.STORE_STEP) as db:
            step = self._with_generation(db, step)
            if step.change is not None:
                self._set_change(db, step.change)
            if step.committed is not None:
                self._commit(db, step.committed)
                self._raise_versions(db, step, step.committed.item.instance)
            if step.removed:
                db.execute("DELETE FROM committed WHERE instance = ?", (step.removed,))
            if step.forgiven is not None:
                db.execute("DELETE FROM failed WHERE instance = ? AND key = ? AND attempt <= ?", step.forgiven)
            forgotten = None if step.failure is None else self._remember(db, step.failure)
            if step.closed:
                db.execute("DELETE FROM changes WHERE instance = ?", (step.closed,))
            sequence = 0 if step.report is None else self._post(db, step.report)
        return Applied(step, sequence, forgotten)

    def save(
        self,
        *,
        report: Report | None = None,
        committed: Committed | None = None,
        facts: VerifierState | None = None,
    ) -> int:
        """Store a report, a committed item or a verifier state that belongs to no change, in one transaction.

        Returns:
            The report's sequence, 0 without one.
        """
        sequence = 0
        with self._transaction(Write.STORE_SAVED) as db:
            if committed is not None:
                self._commit(db, committed)
            if facts is not None:
                self._set_facts(db, facts)
            if report is not None:
                sequence = self._post(db, report)
        return sequence

    def knows_nothing(self) -> bool:
        """Return whether both this database and the record beside it were lost, and nothing was accepted since."""
        made_anew = self.counter("generation") >= LOST_GENERATIONS
        return made_anew and not self.committed() and self.envelope() is None

    def is_new(self) -> bool:
        """Return whether nothing was accepted, committed or begun with this database."""
        return not self.counter("generation") and not self.committed() and self.facts() == VerifierState()

    def fill(self, committed: tuple[Committed, ...], facts: VerifierState, *, sequence: int) -> None:
        """Fill a new database with what another record kept, in one transaction: a power cut leaves it new.

        Generations go on beyond those that the lost database may have given to changes that were never committed, of
        which the host may still run one.

        Args:
            committed: items that run.
            facts: what the verifier remembers.
            sequence: reports go on after this one, as the server drops those whose sequence it has.
        """
        if self.waits:  # in memory now, and in the file once there is one
            self._filled = (committed, facts, sequence)
            transaction = _transaction(Write.STORE_FILLED, self._db, self._path)
        else:
            transaction = self._transaction(Write.STORE_FILLED)
        with transaction as db:
            for each in committed:
                self._commit(db, each)
            self._set_facts(db, facts)
            generation = LOST_GENERATIONS + max((each.generation for each in committed), default=0)
            db.execute("REPLACE INTO counters VALUES ('generation', ?)", (generation,))
            db.execute("INSERT INTO outbox (sequence, instance, progress, body) VALUES (?, '', 0, '')", (sequence,))
            db.execute("DELETE FROM outbox")  # AUTOINCREMENT remembers the sequence

    def _with_generation(self, db: sqlite3.Connection, step: Transition) -> Transition:
        if not step.new_generation:
            return step
        generation = self._next_generation(db)
        if step.change is not None:
            return replace(step, change=msgspec.structs.replace(step.change, generation=generation))
        assert step.committed is not None
        return replace(step, committed=msgspec.structs.replace(step.committed, generation=generation))

    def _commit(self, db: sqlite3.Connection, committed: Committed) -> None:
        instance, body = committed.item.instance, msgspec.json.encode(committed)
        for (before,) in db.execute("SELECT body FROM committed WHERE instance = ?", (instance,)):
            if msgspec.json.decode(before, type=Committed).generation == committed.generation:
                body = wire.keeping(before, committed)
        db.execute("REPLACE INTO committed VALUES (?, ?)", (instance, body))

    def _set_change(self, db: sqlite3.Connection, change: Change) -> None:
        body = change.encode()
        for (before,) in db.execute("SELECT body FROM changes WHERE instance = ?", (change.instance,)):
            earlier = Change.decode(before)
            if (earlier.assignment, earlier.item) == (change.assignment, change.item):
                body = wire.keeping(before, change, goes_on=("state",))
        db.execute("REPLACE INTO changes VALUES (?, ?)", (change.instance, body))

    def _raise_versions(self, db: sqlite3.Connection, step: Transition, instance: str) -> None:
        before = facts = self.facts()
        for component, epoch in step.epochs.items():
            facts = facts.with_committed(component, epoch)
        facts = facts.with_secrets(instance, step.secrets)
        if facts != before:
            self._set_facts(db, facts)

    def _set_facts(self, db: sqlite3.Connection, facts: VerifierState) -> None:
        before = self._meta("facts")
        body = facts.encode() if before is None else wire.keeping(before, facts)
        db.execute("REPLACE INTO meta VALUES ('facts', ?)", (body,))

    def _remember(self, db: sqlite3.Connection, failure: FailedItem) -> FailureKey | None:
        """Store a failure; return the key of the oldest one if that had to make room."""
        body = msgspec.json.encode(failure)
        query = "SELECT body FROM failed WHERE instance = ? AND key = ? AND attempt = ?"
        for (before,) in db.execute(query, failure.failure_key):
            body = wire.keeping(before, failure)
        row = (*failure.failure_key, body)
        db.execute("REPLACE INTO failed VALUES (?, ?, ?, ?)", row)
        (count,) = db.execute("SELECT count(*) FROM failed").fetchone()
        if count <= FAILED_ROWS_MAX:
            return None
        oldest = min(self.failed(), key=lambda each: each.at).failure_key
        db.execute("DELETE FROM failed WHERE instance = ? AND key = ? AND attempt = ?", oldest)
        return oldest

    def changes(self) -> tuple[Change, ...]:
        """Return the changes under way.

        Raises:
            StoreError: the database is damaged.
        """
        with self._reading():
            return tuple(Change.decode(body) for (body,) in self._rows("SELECT body FROM changes ORDER BY instance"))

    def committed(self) -> tuple[Committed, ...]:
        """Return the items that run and start again after a boot.

        Raises:
            StoreError: the database is damaged.
        """
        with self._reading():
            rows = self._rows("SELECT body FROM committed ORDER BY instance")
            return tuple(msgspec.json.decode(body, type=Committed) for (body,) in rows)

    def failed(self) -> tuple[FailedItem, ...]:
        """Return the remembered failures.

        Raises:
            StoreError: the database is damaged.
        """
        with self._reading():
            rows = self._rows("SELECT body FROM failed ORDER BY instance")
            return tuple(msgspec.json.decode(body, type=FailedItem) for (body,) in rows)

    # Trust

    def facts(self) -> VerifierState:
        """Return what the verifier remembers of signed metadata and assignments.

        Raises:
            StoreError: the database is damaged.
        """
        with self._reading():
            body = self._meta("facts")
            return VerifierState() if body is None else VerifierState.decode(body)

    def accept(self, envelope: bytes, version: int, facts: VerifierState) -> None:
        """Persist an assignment whose envelope has been verified, before anything of it is fetched."""
        with self._transaction(Write.STORE_ACCEPTED) as db:
            db.execute("REPLACE INTO meta VALUES ('envelope', ?)", (envelope,))
            self._set_facts(db, facts)
            db.execute("REPLACE INTO counters VALUES ('accepted', ?)", (version,))

    def envelope(self) -> bytes | None:
        """Return the accepted assignment as it was received; None before the first."""
        return self._meta("envelope")

    # Violations and problems, for `fleet-agent why`

    def set_doubts(self, doubts: Iterable[Violation]) -> None:
        """Store the violations of committed items that were reported."""
        self._set_meta("doubts", msgspec.json.encode(tuple(doubts)))

    def doubts(self) -> tuple[Violation, ...]:
        """Return the stored violations.

        Raises:
            StoreError: the database is damaged.
        """
        with self._reading():
            body = self._meta("doubts")
            return () if body is None else msgspec.json.decode(body, type=tuple[Violation, ...])

    def set_problems(self, problems: Iterable[str]) -> None:
        """Store sentences for people: the reasons that keep this device from its newest assignment."""
        self._set_meta("problems", msgspec.json.encode(tuple(problems)))

    def problems(self) -> tuple[str, ...]:
        """Return the stored problems.

        Raises:
            StoreError: the database is damaged.
        """
        with self._reading():
            body = self._meta("problems")
            return () if body is None else msgspec.json.decode(body, type=tuple[str, ...])

    def _set_meta(self, name: str, value: bytes) -> None:
        if self._meta(name) != value:
            with self._transaction(Write.STORE_META) as db:
                db.execute("REPLACE INTO meta VALUES (?, ?)", (name, value))

    def _meta(self, name: str) -> bytes | None:
        rows = self._rows("SELECT value FROM meta WHERE name = ?", name)
        return bytes(rows[0][0]) if rows else None

    # Numbers

    def counter(self, name: str) -> int:
        """Return a stored number, 0 if it was never set."""
        rows = self._rows("SELECT value FROM counters WHERE name = ?", name)
        return int(rows[0][0]) if rows else 0

    def set_counter(self, name: str, value: int) -> None:
        """Store a number if it differs from the stored one."""
        if self.counter(name) != value:
            with self._transaction(Write.STORE_COUNTER) as db:
                db.execute("REPLACE INTO counters VALUES (?, ?)", (name, value))

    def _next_generation(self, db: sqlite3.Connection) -> int:
        """Return a generation that this device has never used."""
        db.execute("INSERT INTO counters VALUES ('generation', 1) ON CONFLICT (name) DO UPDATE SET value = value + 1")
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
        if full.log and self._unsent_bytes() + len(body) > UNSENT_EXCERPTS_BYTES_MAX:
            # not those of older reports: each may have been sent, and is named by its hash in the next
            body = wire.encode(msgspec.structs.replace(full, log=()))
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

    def _unsent_bytes(self) -> int:
        return int(self._rows("SELECT coalesce(sum(length(body)), 0) FROM outbox WHERE acked = 0")[0][0])

    def unacked(self, limit: int = 64, after: int = 0) -> tuple[tuple[int, bytes], ...]:
        """Return the reports that the server has not stored yet, oldest first, with their sequence."""
        rows = self._rows(
            "SELECT sequence, body FROM outbox WHERE acked = 0 AND sequence > ? ORDER BY sequence LIMIT ?", after, limit
        )
        return tuple((int(sequence), bytes(body)) for sequence, body in rows)

    def acknowledge(self, sequence: int) -> bool:
        """Mark every report up to `sequence` as stored by the server; return whether any was not marked before."""
        if not self._rows("SELECT 1 FROM outbox WHERE acked = 0 AND sequence <= ? LIMIT 1", sequence):
            return False
        with self._transaction(Write.STORE_ACKED) as db:
            db.execute("UPDATE outbox SET acked = 1 WHERE sequence <= ?", (sequence,))
            db.execute(
                "DELETE FROM outbox WHERE acked = 1 AND sequence <= "
                "(SELECT sequence FROM outbox WHERE acked = 1 ORDER BY sequence DESC LIMIT 1 OFFSET ?)",
                (HISTORY_ROWS,),
            )
        return True

    def unacknowledge(self, sequence: int) -> bool:
        """Send the reports after `sequence`, which the server lost, again; return whether there are any left here."""
        with self._transaction(Write.STORE_UNACKED) as db:
            return db.execute("UPDATE outbox SET acked = 0 WHERE acked = 1 AND sequence > ?", (sequence,)).rowcount > 0

    def acked(self) -> int:
        """Return the sequence of the newest report that a server has stored; 0 for none."""
        return int(self._rows("SELECT coalesce(max(sequence), 0) FROM outbox WHERE acked = 1")[0][0])

    def history(self) -> tuple[Report, ...]:
        """Return the newest reports, oldest first, acknowledged or not, without those only a newer agent can read.

        Raises:
            StoreError: the database is damaged.
        """
        found = []
        for (body,) in reversed(self._rows("SELECT body FROM outbox ORDER BY sequence DESC LIMIT ?", HISTORY_ROWS)):
            with contextlib.suppress(wire.WireError):
                found.append(wire.decode(Report, bytes(body)))
        return tuple(found)


P = ParamSpec("P")
R = TypeVar("R")


class Run(Protocol):
    """Runner of blocking calls, one after another, on a thread of its own (`Database.run`)."""

    async def __call__(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run `call` after everything that was asked before, and return its result."""


class Database:
    """Owner of the store and of the thread on which it is used: `await db(Store.counter, "accepted")`.

    Attributes:
        store: for what still works with the store itself; to be used on this thread only (`run`).
        damaged: set once the database was found damaged: only the next start of the agent can rebuild it.
    """

    def __init__(self, store: Store) -> None:
        """Take over an opened store: from now on only this thread uses it."""
        self.store = store
        self.damaged = asyncio.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="store")

    async def __call__(self, method: Callable[Concatenate[Store, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a method of the store, or another function that takes the store first."""
        return await self.run(method, self.store, *args, **kwargs)

    async def run(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run `call` after everything that was asked before; a cancelled caller does not stop a call that runs."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: call(*args, **kwargs))
        except DamagedStoreError:
            self.damaged.set()
            raise

    def close(self) -> None:
        """Finish the calls that wait, end the thread, and close the store."""
        self._pool.shutdown(wait=True)
        self.store.close()


class NotAloneError(Exception):
    """Another agent runs on the same state directory; the message says what to do."""


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Hold a state directory's lock; the kernel releases it when the process ends, however it ends.

    Raises:
        NotAloneError: another process holds it.
        OSError: the lock file cannot be written.
    """
    try:
        descriptor = disk.open_descriptor(Write.LOCK, lock, os.O_RDWR)
    except OSError as error:
        if error.errno not in _NO_WRITES:
            raise
        # a lock needs no writable file, and nobody else makes the file either
        descriptor = os.open(lock if lock.exists() else lock.parent, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
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

"""Key-value store: the process that keeps the pairs of `wasi:keyvalue`; a fork of the supervisor, without network.

It exists while a worker may use it. For each such worker it has an end of a socket pair: a request is attributed to an
instance by its socket, never by its content, so an escaped guest reaches its own instance's pairs and no others. The
worker needs no file for that, and both generations of a swap use one database, through one process.

Each instance has a SQLite database for each `data_schema`. Writes are committed in groups: as often as the day's
write quota allows, between `_OFTEN_S` and `_RARELY_S`, and when the last worker of the instance ends. A power cut, a
full disk, or a crash of this process undoes the writes since then, as a whole. Guests see every write at once.

A database that is found damaged is set aside, and a new one begun, so that its instance goes on; both logs say so.
"""

import contextlib
import re
import select
import socket
import sqlite3
import sys
import time
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from agent import disk
from agent.disk import Point, Write
from agent.host.ipc import framing, keyvalue_api
from agent.host.ipc.keyvalue_api import PAIR_BYTES, RegisterUser, Reply, Request
from agent.host.ipc.write_quota import DAY_S, QuotaPage, day, open_counter, read_counter
from agent.host.sandbox import sandbox
from fleet.protocol import wire

_OFTEN_S: Final = 1.0
_RARELY_S: Final = 60.0
_COMMIT_BYTES: Final = 8192
"""Counted beside keys and values for a commit that is to come: a page of the table, one of the index, and headers.

What it writes beyond that is counted when it has.
"""

_CURSORS_MAX: Final = 64
"""Pages by number whose next key is remembered, for each database."""

_UNDONE: Final = "the store failed, and this may be undone: the device's log says why"
"""Reply to a write of a durable bucket that no commit has brought onto the disk."""

_DAMAGED: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})

_NUMBER: Final = re.compile(rb"-?[0-9]{1,19}")
_INTEGER: Final = range(-(2**63), 2**63)
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS pairs (
    bucket TEXT NOT NULL, key BLOB NOT NULL, value BLOB NOT NULL, version INTEGER NOT NULL, UNIQUE (bucket, key)
)"""
_SETTINGS: Final = (
    "PRAGMA locking_mode = EXCLUSIVE",  # no other process opens it, so no memory is shared through a file
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = FULL",
    "PRAGMA wal_autocheckpoint = 128",
    "PRAGMA journal_size_limit = 1048576",
    "PRAGMA cache_size = -256",
    "PRAGMA temp_store = MEMORY",
    "PRAGMA trusted_schema = OFF",
)


class RefusedError(Exception):
    """A request is not carried out; the sentence is for the guest."""


class Pairs:
    """Database of an instance, and the transaction that is open in it.

    Attributes:
        note: for its instance's log, of what was damaged; empty for nothing.
    """

    def __init__(self, path: Path, note: str = "") -> None:
        self.path = path
        self.note = note
        self._cursors: dict[tuple[str, int], bytes] = {}
        disk.reached(Write.KEYVALUE, Point.BEFORE, path, b"")
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            for setting in _SETTINGS:
                self._db.execute(setting)
            self._db.execute(_SCHEMA)
            self.used_bytes = self._size()
            newest = self._db.execute("SELECT coalesce(max(version), 0) FROM pairs").fetchone()[0]
            # Versions that were lost with an earlier process are not given again: guests may still expect them.
            self._version: int = max(newest, time.time_ns())
        except BaseException:
            self._db.close()
            raise
        disk.reached(Write.KEYVALUE, Point.AFTER, path, b"")
        self.dirty = False

    def _size(self) -> int:
        """Return the bytes of all pairs, as they count."""
        query = "SELECT coalesce(sum(length(key) + length(value) + ?), 0) FROM pairs"
        return int(self._db.execute(query, (PAIR_BYTES,)).fetchone()[0])

    def check_undone(self) -> bool:
        """After an error: return whether SQLite has undone the open transaction, as it does where it cannot write."""
        if not self.dirty or self._db.in_transaction:
            return False
        self.dirty = False
        self.used_bytes = self._size()
        return True

    def get(self, bucket: str, key: bytes) -> tuple[bytes, int] | None:
        """Return a pair's value and version."""
        row = self._db.execute(
            "SELECT value, version FROM pairs WHERE bucket = ? AND key = ?", (bucket, key)
        ).fetchone()
        return None if row is None else (bytes(row[0]), row[1])

    def keys(self, bucket: str, after: bytes | None, skip: int) -> tuple[list[bytes], bool]:
        """Return the keys that follow, in their order, as many as one answer has, and whether others follow.

        `skip`: how many came before. After a page that was asked for in this way, the next one is found by its key.
        """
        number = max(0, skip)
        if after is None and (known := self._cursors.pop((bucket, number), None)) is not None:
            after, skip = known, 0
        # From the first key on every key follows: the index finds the begin of a page, whichever that is.
        query = "SELECT key FROM pairs WHERE bucket = ? AND key {} ? ORDER BY key LIMIT ? OFFSET ?"
        since = query.format(">=" if after is None else ">")
        most = keyvalue_api.PAGE_KEYS + 1
        rows = self._db.execute(since, (bucket, after or b"", most, max(0, skip))).fetchall()
        found: list[bytes] = []
        size = 0
        for (key,) in rows[: keyvalue_api.PAGE_KEYS]:
            size += len(key) + 8
            if found and size > keyvalue_api.PAGE_BYTES:
                break
            found.append(bytes(key))
        if (more := len(found) < len(rows)) and (number or after is None):
            self._cursors[bucket, number + len(found)] = found[-1]
            if len(self._cursors) > _CURSORS_MAX:
                del self._cursors[next(iter(self._cursors))]
        return found, more

    def set(self, bucket: str, key: bytes, value: bytes, most_bytes: int) -> None:
        """Set a pair. Raises `RefusedError`: the database would have more than `most_bytes`."""
        before = self.get(bucket, key)
        had = 0 if before is None else len(key) + len(before[0]) + PAIR_BYTES
        used = self.used_bytes - had + len(key) + len(value) + PAIR_BYTES
        if used > most_bytes and used > self.used_bytes:
            raise RefusedError(f"its pairs would take {used} bytes, {most_bytes} are allowed (limits.storage)")
        self._begin()
        self._version += 1
        self._db.execute(
            "INSERT INTO pairs VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET value = excluded.value, "
            "version = excluded.version",
            (bucket, key, value, self._version),
        )
        self.used_bytes = used

    def delete(self, bucket: str, key: bytes) -> None:
        """Delete a pair, if it is there."""
        before = self.get(bucket, key)
        if before is not None:
            self._begin()
            self._db.execute("DELETE FROM pairs WHERE bucket = ? AND key = ?", (bucket, key))
            self.used_bytes -= len(key) + len(before[0]) + PAIR_BYTES

    def _begin(self) -> None:
        if not self.dirty:
            self._db.execute("BEGIN IMMEDIATE")
            self.dirty = True

    def commit(self) -> None:
        """Bring what was written onto the medium."""
        if self.dirty:
            disk.reached(Write.KEYVALUE_SAVED, Point.BEFORE, self.path, b"")
            self._db.execute("COMMIT")
            self.dirty = False
            disk.reached(Write.KEYVALUE_SAVED, Point.AFTER, self.path, b"")

    def close(self) -> None:
        """Commit and close."""
        try:
            with contextlib.suppress(sqlite3.Error):
                self.commit()
        finally:
            self._db.close()

    def abandon(self) -> None:
        """Close without a commit, as of a damaged database."""
        self._db.close()

    def copy(self, target: Path) -> None:
        """Write a whole copy to a file that does not exist."""
        self.commit()
        self._db.execute("VACUUM INTO ?", (str(target),))


def is_damage(error: BaseException) -> bool:
    """Tell whether an error says that a database is damaged."""
    return isinstance(error, sqlite3.DatabaseError) and getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED


def set_aside(path: Path, error: BaseException) -> str:
    """Set a damaged database aside, in place of an earlier one; return a sentence that says so."""
    place = path.with_suffix(".damaged")
    for suffix in ("-wal", ""):
        source, target = (each.with_name(each.name + suffix) for each in (path, place))
        disk.remove(Write.KEYVALUE_DAMAGED, target, missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            disk.move(Write.KEYVALUE_DAMAGED, source, target)
    where = f"{place.parent.name}/{place.name}"
    return f"its key-value pairs were damaged ({error}) and begin anew; {where} has the old ones"


def opened(path: Path) -> Pairs:
    """Open a database; one that is damaged is set aside. Raises `OSError` and `sqlite3.Error`."""
    try:
        return Pairs(path)
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise
        return Pairs(path, set_aside(path, error))


def open_pairs(directory: Path, about: RegisterUser, older: Pairs | None = None) -> Pairs:
    """Open the database of an instance; another schema begins with a copy of the pairs of the one before.

    `older`: the database of that, if it is open. Raises `OSError` and `sqlite3.Error`.
    """
    home = directory / about.instance
    path, before = home / f"{about.schema}.db", home / f"{about.before}.db"
    disk.make_directory(Write.KEYVALUE, home, mode=0o700)
    note = ""
    is_fresh = about.fresh and not about.again  # not after this process has died: the pairs have changed since
    if before != path and before.exists() and (is_fresh or not path.exists()):
        unfinished = home / ".copy"
        disk.remove(Write.KEYVALUE_COPIED, unfinished, missing_ok=True)
        source = older or opened(before)
        note = source.note
        try:
            source.copy(unfinished)
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
            disk.remove(Write.KEYVALUE_COPIED, unfinished, missing_ok=True)
            note = f"its key-value pairs of data schema {about.before} are damaged ({error}): the new ones begin empty"
        finally:
            if older is None:
                source.close()
        for left in (path, path.with_name(f"{path.name}-wal")):  # by an aborted attempt
            disk.remove(Write.KEYVALUE_COPIED, left, missing_ok=True)
        if unfinished.exists():
            disk.move(Write.KEYVALUE_COPIED, unfinished, path)
    pairs = opened(path)
    pairs.note = pairs.note or note
    return pairs


def open_shared(directory: Path, place: tuple[str, str]) -> Pairs:
    """Open a bucket that instances share. Raises `OSError` and `sqlite3.Error`."""
    home, name = directory / place[0], place[1]
    disk.make_directory(Write.KEYVALUE, home, mode=0o700)
    return opened(home / f"{name}.db")


class _User:
    """A worker that may use the store.

    Its instance's bytes of the day are in two pages: workers with files share the one, and could write anything there.
    """

    def __init__(self, sock: socket.socket, about: RegisterUser, shared: QuotaPage, own: QuotaPage) -> None:
        self.sock = sock
        self.about = about
        self._shared, self._own = shared, own

    def bytes_today(self, today: int) -> int:
        """Return what the instance has written today."""
        return max(self._shared.sum(today), self._own.sum(today))

    def count(self, size: int) -> None:
        """Count bytes that it has written."""
        today, place = day(), self.about.place
        written = self._own.at(place, today) + size
        self._own.put(place, written, today)
        self._shared.put(place, written, today)

    def close(self) -> None:
        """Close what it has."""
        self.sock.close()
        self._shared.close()
        self._own.close()


class _Instance:
    """Pairs of an instance under one schema."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs
        self.due_s = 0.0  # time of the next commit, once something was written
        self.writer: _User | None = None  # of the transaction that is open
        self.counted = 0  # bytes that were counted for it


class _Waiting(NamedTuple):
    """Reply that waits for a commit of a database."""

    key: tuple[str, str]
    found: _Instance
    user: _User
    reply: Reply


class Store:
    """Key-value store: the supervisor's socket, a socket for each worker, the databases below one directory."""

    def __init__(self, sock: socket.socket, directory: str, counter: int | None = None) -> None:
        """`counter`: of the bytes that this process writes (`open_counter`); None to open it here."""
        self._counter = open_counter() if counter is None else counter
        self._sock = sock
        self._directory = Path(directory)
        self._poll = select.epoll()
        self._users: dict[int, _User] = {}
        self._open: dict[tuple[str, str], _Instance] = {}
        self._waiting: list[_Waiting] = []
        self._unopened: set[tuple[str, str]] = set()  # of which the log says that they cannot be opened

    def run(self) -> None:
        """Serve until the supervisor closes its socket."""
        self._sock.setblocking(False)
        self._poll.register(self._sock, select.EPOLLIN)
        while True:
            ready = self._poll.poll(self._wait_s())
            # The supervisor's socket comes last: workers that have ended leave before new ones come.
            for fd, _ in sorted(ready, key=lambda each: each[0] == self._sock.fileno()):
                if fd != self._sock.fileno():
                    self._serve(self._users[fd])
                elif not self._obey():
                    self.close()
                    return
            self._answer_waiting()
            self._commit_due()

    def _answer_waiting(self) -> None:
        """Commit what durable buckets got, of each database at once, and answer who waits for that."""
        waiting, self._waiting = self._waiting, []
        done: dict[int, bool] = {}
        for each in waiting:
            # A store that is open no more was damaged and set aside meanwhile, or its last user has ended.
            is_open = self._open.get(each.key) is each.found
            if id(each.found) not in done:
                done[id(each.found)] = is_open and self._commit_or_report(each.key, each.found)
            well = done[id(each.found)]
            reply = each.reply if well else msgspec.structs.replace(each.reply, problem=_UNDONE)
            self._reply(each.user.sock, reply)

    def close(self) -> None:
        """Commit everything and close."""
        for fd in list(self._users):
            self._leave(fd)
        for key in list(self._open):
            self._open.pop(key).pairs.close()

    def _wrote(self) -> int:
        return 0 if self._counter is None else read_counter(self._counter) or 0

    def _commit(self, found: _Instance, *, close: bool = False) -> None:
        """Commit what was written, and count what that has written beyond what was counted. Raises as `Pairs`."""
        before = self._wrote()
        try:
            if close:
                found.pairs.close()
            else:
                found.pairs.commit()
        finally:
            if found.writer is not None and (more := self._wrote() - before - found.counted) > 0:
                found.writer.count(more)
            found.writer, found.counted = None, 0

    def _wait_s(self) -> float:
        due = [each.due_s for each in self._open.values() if each.pairs.dirty]
        return max(0.0, min(due) - time.monotonic()) if due else -1.0

    def _commit_due(self) -> None:
        now_s = time.monotonic()
        for key, each in list(self._open.items()):
            if each.pairs.dirty and each.due_s <= now_s and not self._commit_or_report(key, each):
                each.due_s = now_s + _RARELY_S

    def _commit_or_report(self, key: tuple[str, str], found: _Instance) -> bool:
        """Commit what was written; return whether that went well."""
        try:
            self._commit(found)
        except sqlite3.Error as error:
            self._failed(key, "cannot commit", error)
            return False
        return True

    def _failed(self, key: tuple[str, str], what: str, error: BaseException) -> None:
        """Report an error of a database; one that is damaged is set aside, and another begun."""
        found = self._open.get(key)
        if found is None:
            return
        if not is_damage(error):
            report_failure(what, found.pairs, error)
            return
        report(what, error)
        del self._open[key]
        with contextlib.suppress(sqlite3.Error):
            found.pairs.abandon()
        try:
            note = set_aside(found.pairs.path, error)
            self._open[key] = _Instance(Pairs(found.pairs.path, note))
        except (OSError, sqlite3.Error) as again:
            report(f"cannot begin the pairs of {key[0]} anew", again)

    def _obey(self) -> bool:
        try:
            data, fds = framing.receive_packet(self._sock)
        except BlockingIOError:
            return True
        except framing.DescriptorsLostError as error:
            report(f"no room for {keyvalue_api.register_user.decode(error.data).instance}", error)
            return True
        except framing.GoneError:
            return False
        about = keyvalue_api.register_user.decode(data)
        sock = socket.socket(fileno=fds[0])
        user = _User(sock, about, QuotaPage(fds[1]), QuotaPage(fds[-1]))
        framing.close_all(fds[1:])
        sock.setblocking(False)
        if about.fresh and not about.again and about.before != about.schema:
            self._put_out(about)
        self._users[sock.fileno()] = user
        self._poll.register(sock, select.EPOLLIN)
        self._instance(about)
        if about.again:
            self._reply(sock, Reply(keyvalue_api.RESTARTED))
        return True

    def _instance(self, about: RegisterUser, bucket: str = keyvalue_api.OWN) -> _Instance | None:
        """Return the pairs of an instance, or shared ones, opened at first; None where they cannot be."""
        key = about.place_of(bucket)
        found = self._open.get(key)
        if found is None:
            try:
                older = self._open.get((about.instance, str(about.before)))
                if key == about.place_of_own:
                    pairs = open_pairs(self._directory, about, None if older is None else older.pairs)
                else:
                    pairs = open_shared(self._directory, key)
                found = self._open[key] = _Instance(pairs)
                if pairs.note:
                    report(f"pairs of {about.instance}", RefusedError(pairs.note))
            except (OSError, sqlite3.Error) as error:
                if key not in self._unopened:
                    self._unopened.add(key)
                    report(
                        f"cannot open the pairs of {about.instance}{'' if key[0] == about.instance else bucket}", error
                    )
                return None
            self._unopened.discard(key)
        return found

    def _leave(self, fd: int) -> None:
        user = self._users.pop(fd)
        self._poll.unregister(fd)
        for key in user.about.places & self._open.keys():
            found = self._open[key]
            others = [each for each in self._users.values() if key in each.about.places]
            if not others:
                found.writer = user
                self._commit(self._open.pop(key), close=True)
            elif found.writer is user:  # counted as its own, while it has a page
                self._commit_or_report(key, found)
        user.close()

    def _put_out(self, about: RegisterUser) -> None:
        """End the use by workers of an aborted attempt at this schema, which are about to end: another one begins."""
        for fd, user in list(self._users.items()):
            if (user.about.instance, user.about.schema) == (about.instance, about.schema):
                self._leave(fd)

    def _serve(self, user: _User) -> None:
        try:
            request = keyvalue_api.request.decode(user.sock.recv(framing.PACKET_MAX_BYTES))
        except BlockingIOError:
            return
        except (OSError, *wire.JSON_ERRORS):  # the worker has ended, or is compromised
            self._leave(user.sock.fileno())
            return
        key = user.about.place_of(request.bucket)
        try:
            reply = self._answer(user, request)
        except RefusedError as error:
            reply = Reply(request.id, str(error))
        except (sqlite3.Error, OSError) as error:
            self._failed(key, f"{request.op} of {user.about.instance}", error)
            reply = Reply(request.id, f"the store failed: {error}")
        found = self._open.get(key)
        if found is not None and found.pairs.note:
            reply, found.pairs.note = msgspec.structs.replace(reply, note=found.pairs.note), ""
        is_write = request.op not in keyvalue_api.READS
        if is_write and not reply.problem and "durable" in user.about.buckets.get(request.bucket, ()):
            self._waiting.append(_Waiting(key, self._open[key], user, reply))
        else:
            self._reply(user.sock, reply)

    def _reply(self, sock: socket.socket, reply: Reply) -> None:
        with contextlib.suppress(OSError):  # the worker has ended, or does not read: nobody waits for it
            sock.send(keyvalue_api.encode(reply), socket.MSG_NOSIGNAL)

    def _answer(self, user: _User, request: Request) -> Reply:
        """Carry out a request. Raises `RefusedError`, and what the database raises."""
        if len(request.key) > keyvalue_api.KEY_MAX_BYTES or len(request.value) > keyvalue_api.VALUE_MAX_BYTES:
            raise RefusedError("the key or the value is too long")
        if request.bucket != keyvalue_api.OWN and request.bucket not in user.about.buckets:
            raise RefusedError("there is no such bucket")
        if request.number not in _INTEGER:
            raise RefusedError("the number is beyond 64 bits")
        found = self._instance(user.about, request.bucket)
        if found is None:
            raise RefusedError("the store cannot be opened")
        pairs, bucket, key = found.pairs, request.bucket, request.key
        match request.op:
            case "get" | "look":
                at = pairs.get(bucket, key)
                return Reply(request.id) if at is None else Reply(request.id, value=at[0], number=at[1])
            case "exists":
                return Reply(request.id, number=int(pairs.get(bucket, key) is not None))
            case "list" | "skip":
                keys, more = pairs.keys(bucket, key or None, request.number)
                return Reply(request.id, keys=tuple(keys), more=more)
            case _:
                return self._write(user, found, request)

    def _write(self, user: _User, found: _Instance, request: Request) -> Reply:
        pairs, bucket, key, most = found.pairs, request.bucket, request.key, user.about.storage_bytes
        today, most_today = user.bytes_today(day()), user.about.daily_written_bytes
        if today >= most_today:
            used = f"{today} bytes are written today, {most_today} are allowed (limits.daily_written)"
            raise RefusedError(f"{used}: no more until 00:00 UTC")
        reply, value, was_dirty = Reply(request.id, number=1), request.value, pairs.dirty
        match request.op:
            case "set":
                pairs.set(bucket, key, value, most)
            case "delete":
                pairs.delete(bucket, key)
            case "increment":
                number = _added(pairs.get(bucket, key), request.number)
                value = str(number).encode()
                pairs.set(bucket, key, value, most)
                reply = Reply(request.id, number=number)
            case "swap":
                at = pairs.get(bucket, key)
                if (0 if at is None else at[1]) != request.number:
                    return Reply(request.id)
                pairs.set(bucket, key, value, most)
            case _:
                raise RefusedError("no such operation")
        self._count(user, found, len(key) + len(value), first=found.pairs.dirty and not was_dirty)
        return reply

    def _count(self, user: _User, found: _Instance, size: int, *, first: bool) -> None:
        """Count what was written, and plan the commit: as often as the rest of the day's quota allows."""
        written = size + (_COMMIT_BYTES if first else 0)
        user.count(written)
        found.writer = user
        found.counted += written
        if first:
            most = user.about.daily_written_bytes
            rest_s, left = DAY_S - time.time() % DAY_S, max(most - user.bytes_today(day()), 1)
            found.due_s = time.monotonic() + min(_RARELY_S, max(_OFTEN_S, rest_s * _COMMIT_BYTES / left))


def _added(at: tuple[bytes, int] | None, delta: int) -> int:
    """Return the sum of a value, which is a decimal number as text, and `delta`. Raises `RefusedError`."""
    text = b"0" if at is None else at[0]
    if _NUMBER.fullmatch(text) is None:
        raise RefusedError("the value is no whole number as text, such as 42")
    number = int(text) + delta
    if number not in _INTEGER:
        raise RefusedError("the sum would be beyond 64 bits")
    return number


def run_keyvalue(sock: socket.socket, directory: Path, keep: tuple[int, ...] = ()) -> None:
    """Run the store in a process just forked from the supervisor, sandboxed before it reads a request."""
    sandbox.begin_helper({sock.fileno(), *keep})
    counter = open_counter()
    layers = sandbox.apply(sandbox.keyvalue_spec(str(directory)))
    Store(sock, sandbox.DATA if layers["mount"] else ".", counter).run()


def report_failure(what: str, pairs: Pairs, error: BaseException) -> None:
    """Report an error of a database, and take note of what SQLite has undone for it."""
    with contextlib.suppress(sqlite3.Error):  # a database that cannot even be read is one that later requests meet
        if pairs.check_undone():
            what += ", and what was written since the last commit is undone"
    report(what, error)


def report(what: str, error: BaseException) -> None:
    """Write a line to standard error, which is the host's log."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"key-value store: {what}: {type(error).__name__}: {error}\n")
        sys.stderr.flush()

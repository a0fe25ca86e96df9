"""wasi:keyvalue: pairs of the instance that outlive calls, swaps, rollbacks and restarts.

The worker's side: asks the process `agent.host.keyvalue` over its socket, one request at a time. Handles of buckets
hold nothing: a bucket's number is its place among those that are granted. Both drafts are served; where their types
differ, `_make` translates the earlier one.
"""

import contextlib
import socket
import struct
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Final, NamedTuple

from agent.host.engine.codec import Failure, Signature
from agent.host.engine.host_interface import Function, HostInterface, Surroundings, Variant, own, record
from agent.host.interfaces.package import Package
from agent.host.ipc import framing, keyvalue_api
from agent.host.ipc.keyvalue_api import (
    KEY_MAX_BYTES,
    NAME_MAX_BYTES,
    OWN,
    PAIR_BYTES,
    READS,
    RESTARTED,
    VALUE_MAX_BYTES,
    Reply,
    Request,
)
from fleet.component import wasi
from fleet.protocol import wire

NAME: Final = wasi.KEYVALUE
DRAFT: Final = "0.2.0-draft"
DRAFT2: Final = "0.2.0-draft2"

HANDLES_MAX: Final = 256
"""Handles of buckets, and of pairs to swap, that an instance may have at once."""

BATCH_MAX: Final = 256
"""Most pairs of one call of `wasi:keyvalue/batch`."""

_AGAIN: Final = READS | {"set", "delete"}
"""Requests that may be carried out twice."""

_ANSWER_S: Final = 5.0
_BUCKET, _CAS = 30, 31  # numbers of the host's resources
_BATCH_MAX_BYTES: Final = 256 * 1024
_U64: Final = 1 << 64
_S64: Final = 1 << 63


class _FailedError(Exception):
    """A call ends with an error of `wasi:keyvalue`: this one."""

    def __init__(self, case: str, text: str | None = None) -> None:
        super().__init__(case)
        self.error = Variant(case, text)


class _Cas(NamedTuple):
    bucket: str
    key: bytes
    version: int


class KeyValueClient:
    """Requests of one instance, and the handles that its guest has."""

    def __init__(
        self, sock: socket.socket, count: Callable[[int, int, int], None], buckets: Iterable[str] = ()
    ) -> None:
        """`count(reads, writes, bytes)`: called for each request that is carried out; `buckets`: beside `default`."""
        self.buckets: Final = tuple(dict.fromkeys((OWN, *buckets)))
        for way in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):  # of the kernel: Python's own would ignore MSG_DONTWAIT
            sock.setsockopt(socket.SOL_SOCKET, way, struct.pack("@ll", int(_ANSWER_S), 0))
        self._sock = sock
        self._count = count
        self._last = RESTARTED
        self.note = ""  # of the store, for the instance's log
        self._open = 0
        self._cas: dict[int, _Cas] = {}
        self._next = 0

    def reset(self) -> None:
        """Forget the handles of an instance that has ended."""
        self._open = 0
        self._cas.clear()

    def ask(self, op: str, bucket: str, key: bytes, value: bytes = b"", number: int = 0) -> Reply:
        """Send a request and wait for its reply. Raises `_FailedError`."""
        self._last += 1
        request = Request(self._last, op, bucket, key, value, number)
        try:
            self._forget_replies()
            reply = self._exchange(request)
            if reply.id == RESTARTED and op in _AGAIN:
                reply = self._exchange(request)
        except BlockingIOError:
            raise _FailedError("other", f"the store did not answer within {_ANSWER_S:g} s") from None
        except (OSError, *wire.JSON_ERRORS) as error:
            raise _FailedError("other", f"the store cannot be reached: {error}") from None
        if reply.id == RESTARTED:
            raise _FailedError("other", "the store was restarted, and may have done this: read the pair, then retry")
        self.note = reply.note or self.note
        if reply.problem:
            raise _FailedError("other", reply.problem)
        is_read = op in READS
        size = len(key) + len(value) + len(reply.value or b"") + sum(map(len, reply.keys))
        self._count(is_read, not is_read, size)
        return reply

    def _forget_replies(self) -> None:
        """Drop what has come since the last request: replies to those that were given up, and news of a restart."""
        with contextlib.suppress(BlockingIOError):
            while _stale := self._sock.recv(framing.PACKET_MAX_BYTES, socket.MSG_DONTWAIT):
                pass

    def _exchange(self, request: Request) -> Reply:
        self._sock.send(keyvalue_api.encode(request), socket.MSG_NOSIGNAL)
        while data := self._sock.recv(framing.PACKET_MAX_BYTES):
            reply = keyvalue_api.reply.decode(data)
            if reply.id in {RESTARTED, request.id}:
                return reply
        raise ConnectionResetError("it has ended")

    def handle(self) -> None:
        """Count a handle that the guest gets. Raises `_FailedError`: it has too many."""
        if self._open >= HANDLES_MAX:
            raise _FailedError("other", f"{HANDLES_MAX} handles are open: drop some")
        self._open += 1

    def dropped(self, number: int = -1) -> None:
        """Take note that the guest has dropped a handle; `number` of a pair to swap."""
        self._open = max(0, self._open - 1)
        self._cas.pop(number, None)

    def keep(self, cas: _Cas) -> int:
        """Keep what a handle of a pair to swap stands for, and return its number. Raises `_FailedError`."""
        self.handle()
        self._next = (self._next + 1) % (1 << 31)
        self._cas[self._next] = cas
        return self._next

    def kept(self, number: int) -> _Cas:
        """Return what a handle stands for. Raises `_FailedError`: of an instance that has ended."""
        found = self._cas.get(number)
        if found is None:
            raise _FailedError("other", "the handle is of an instance that has ended")
        return found


def _bytes_of(key: str) -> bytes:
    data = key.encode()
    if len(data) > KEY_MAX_BYTES:
        raise _FailedError("other", f"the key has {len(data)} bytes, {KEY_MAX_BYTES} are allowed")
    return data


def _fits(value: bytes) -> bytes:
    if len(value) > VALUE_MAX_BYTES:
        raise _FailedError("other", f"the value has {len(value)} bytes, {VALUE_MAX_BYTES} are allowed")
    return value


def _number(store: Any, handle: Any) -> int:
    """Return the number of a handle; it is used up, as a loan must be before the call ends."""
    return int(handle.to_host(store).rep)


class _Calls:
    """Functions of one import of `wasi:keyvalue` for one instance."""

    def __init__(self, around: Surroundings) -> None:
        part = around.parts.get(NAME)
        self._client = part if isinstance(part, KeyValueClient) else None
        self._log = around.log
        self.is_draft = around.name.endswith("@" + DRAFT)

    @property
    def client(self) -> KeyValueClient:
        """The way to the store. Raises `_FailedError` where there is none."""
        if self._client is None:
            raise _FailedError("other", "the key-value store is not available to this worker")
        return self._client

    def ask(self, op: str, bucket: str, key: bytes, value: bytes = b"", number: int = 0) -> Reply:
        """Ask the store, and log what it has to say to people. Raises `_FailedError`."""
        client = self.client
        try:
            return client.ask(op, bucket, key, value, number)
        finally:
            if client.note:
                self._log(f"host: {client.note}")
                client.note = ""

    def bucket(self, store: Any, handle: Any) -> str:
        """Return the name of the bucket of a handle."""
        return self.client.buckets[_number(store, handle)]

    def open(self, _store: Any, identifier: str) -> Any:
        """Open a bucket."""
        if len(identifier.encode()) > NAME_MAX_BYTES:
            raise _FailedError("no-such-store")
        buckets = (OWN,) if self._client is None else self._client.buckets
        if (identifier or OWN) not in buckets:
            said = f"{wasi.KEYVALUE_STORE}.open of {identifier!r} is denied: not granted (grants.buckets)"
            self._log.deny(wasi.KEYVALUE_STORE, said)
            raise _FailedError("access-denied")
        self.client.handle()
        return own(buckets.index(identifier or OWN), _BUCKET)

    def drop_bucket(self, _store: Any, _number: int) -> None:
        """Take note of a bucket's handle that the guest drops."""
        if self._client is not None:
            self._client.dropped()

    def get(self, store: Any, bucket: Any, key: str) -> bytes | None:
        """Return a value; None without a pair."""
        return self.ask("get", self.bucket(store, bucket), _bytes_of(key)).value

    def set(self, store: Any, bucket: Any, key: str, value: bytes) -> None:
        """Set a pair."""
        self.ask("set", self.bucket(store, bucket), _bytes_of(key), _fits(value))

    def delete(self, store: Any, bucket: Any, key: str) -> None:
        """Delete a pair."""
        self.ask("delete", self.bucket(store, bucket), _bytes_of(key))

    def exists(self, store: Any, bucket: Any, key: str) -> bool:
        """Tell whether there is a pair."""
        return bool(self.ask("exists", self.bucket(store, bucket), _bytes_of(key)).number)

    def list_keys(self, store: Any, bucket: Any, cursor: Any) -> Any:
        """List a page of keys, in their order; a cursor is the last key of the page before."""
        if self.is_draft:
            return self._list_by_number(self.bucket(store, bucket), cursor or 0)
        found = self.ask("list", self.bucket(store, bucket), b"" if cursor is None else _bytes_of(cursor))
        keys = [key.decode() for key in found.keys]
        return record(keys=keys, cursor=keys[-1] if found.more else None)

    def _list_by_number(self, bucket: str, skip: int) -> Any:
        """List a page for the draft whose cursor is a number: of keys that came before."""
        found = self.ask("skip", bucket, b"", number=min(skip, _S64 - 1))
        keys = [key.decode() for key in found.keys]
        return record(keys=keys, cursor=skip + len(keys) if found.more else None)

    def increment(self, store: Any, bucket: Any, key: str, delta: int) -> int:
        """Add to a value that is a decimal number as text; return the sum."""
        name = self.bucket(store, bucket)
        if delta >= _S64:
            raise _FailedError("other", "the sum would be beyond 64 bits")
        found = self.ask("increment", name, _bytes_of(key), number=delta).number
        if self.is_draft and found < 0:
            raise _FailedError("other", f"the sum is {found}, and this draft has no negative numbers")
        return found

    def new_cas(self, store: Any, bucket: Any, key: str) -> Any:
        """Return a handle of a pair as it is now."""
        name, data = self.bucket(store, bucket), _bytes_of(key)
        number = self.client.keep(_Cas(name, data, self.ask("look", name, data).number))
        return own(number, _CAS)

    def current(self, store: Any, handle: Any) -> bytes | None:
        """Return the value that a pair has now."""
        kept = self.client.kept(_number(store, handle))
        return self.ask("get", kept.bucket, kept.key).value

    def swap(self, store: Any, handle: Any, value: bytes) -> Any:
        """Set a pair if it is still as it was; the handle is used up, and a failure has the next one."""
        kept = self.client.kept(number := _number(store, handle))
        self.client.dropped(number)
        if self.ask("swap", kept.bucket, kept.key, _fits(value), kept.version).number:
            return None
        found = self.ask("look", kept.bucket, kept.key).number
        return Failure(own(self.client.keep(kept._replace(version=found)), _CAS))

    def drop_cas(self, _store: Any, number: int) -> None:
        """Forget a pair's handle that the guest drops."""
        if self._client is not None:
            self._client.dropped(number)

    def get_many(self, store: Any, bucket: Any, keys: list[str]) -> Any:
        """Return the values of several pairs."""
        name, found, size = self.bucket(store, bucket), [], 0
        for key in _few(keys):
            value = self.ask("get", name, _bytes_of(key)).value
            size += len(key) + len(value or b"")
            if size > _BATCH_MAX_BYTES:
                raise _FailedError("other", f"the values have more than {_BATCH_MAX_BYTES} bytes: ask for fewer")
            found.append((key, value))
        return [None if value is None else (key, value) for key, value in found] if self.is_draft else found

    def set_many(self, store: Any, bucket: Any, pairs: list[tuple[str, bytes]]) -> None:
        """Set several pairs."""
        name = self.bucket(store, bucket)
        for key, value in _few(pairs):
            self.ask("set", name, _bytes_of(key), _fits(value))

    def delete_many(self, store: Any, bucket: Any, keys: list[str]) -> None:
        """Delete several pairs."""
        name = self.bucket(store, bucket)
        for key in _few(keys):
            self.ask("delete", name, _bytes_of(key))


def _few(items: list[Any]) -> list[Any]:
    if len(items) > BATCH_MAX:
        raise _FailedError("other", f"{len(items)} pairs in one call, {BATCH_MAX} are allowed")
    return items


def _failing(call: Callable[..., Any]) -> Function:
    """Return a function for the linker whose errors are results."""

    def called(store: Any, *arguments: Any) -> Any:
        try:
            return call(store, *arguments)
        except _FailedError as error:
            return Failure(error.error)

    return called


_METHODS: Final[Mapping[str, Mapping[str, str]]] = {
    wasi.KEYVALUE_STORE: {
        "open": "open",
        "[method]bucket.get": "get",
        "[method]bucket.set": "set",
        "[method]bucket.delete": "delete",
        "[method]bucket.exists": "exists",
        "[method]bucket.list-keys": "list_keys",
    },
    wasi.KEYVALUE_ATOMICS: {
        "increment": "increment",
        "[static]cas.new": "new_cas",
        "[method]cas.current": "current",
        "swap": "swap",
    },
    wasi.KEYVALUE_BATCH: {"get-many": "get_many", "set-many": "set_many", "delete-many": "delete_many"},
}
"""By interface: which method of `_Calls` serves a function."""


def _make(interface: str, around: Surroundings) -> Mapping[str, Function]:
    calls = _Calls(around)
    found = {name: _failing(getattr(calls, method)) for name, method in _METHODS[interface].items()}
    return {**found, "[drop]bucket": calls.drop_bucket, "[drop]cas": calls.drop_cas}


_ERROR: Final = "variant { no-such-store, access-denied, other(string) }"
_PAGE: Final = "record {{ keys: list<string>, cursor: option<{}> }}"
_SELF, _KEY, _VALUE = ("self", "borrow"), ("key", "string"), ("value", "list<u8>")
_OPTION: Final = f"result<option<list<u8>>, {_ERROR}>"
_DONE: Final = f"result<_, {_ERROR}>"
_HANDLE: Final = f"result<own, {_ERROR}>"
_KEYS: Final = ("keys", "list<string>")


def _listing(cursor: str) -> Signature:
    return Signature((_SELF, ("cursor", f"option<{cursor}>")), f"result<{_PAGE.format(cursor)}, {_ERROR}>")


def _adding(number: str) -> Signature:
    return Signature((_SELF, _KEY, ("delta", number)), f"result<{number}, {_ERROR}>")


def _getting(pair: str) -> Signature:
    return Signature((_SELF, _KEYS), f"result<list<{pair}>, {_ERROR}>")


_STORE: Final = {
    "open": Signature((("identifier", "string"),), _HANDLE),
    "[method]bucket.get": Signature((_SELF, _KEY), _OPTION),
    "[method]bucket.set": Signature((_SELF, _KEY, _VALUE), _DONE),
    "[method]bucket.delete": Signature((_SELF, _KEY), _DONE),
    "[method]bucket.exists": Signature((_SELF, _KEY), f"result<bool, {_ERROR}>"),
    "[method]bucket.list-keys": _listing("string"),
}
_ATOMICS: Final = {
    "increment": _adding("s64"),
    "[static]cas.new": Signature((_SELF, _KEY), _HANDLE),
    "[method]cas.current": Signature((_SELF,), _OPTION),
    "swap": Signature((("cas", "own"), _VALUE), f"result<_, variant {{ store-error({_ERROR}), cas-failed(own) }}>"),
}
_BATCH: Final = {
    "get-many": _getting("tuple<string, option<list<u8>>>"),
    "set-many": Signature((_SELF, ("key-values", "list<tuple<string, list<u8>>>")), _DONE),
    "delete-many": Signature((_SELF, _KEYS), _DONE),
}
_BEFORE: Final = {
    wasi.KEYVALUE_STORE: {"[method]bucket.list-keys": _listing("u64")},
    wasi.KEYVALUE_ATOMICS: {"increment": _adding("u64")},
    wasi.KEYVALUE_BATCH: {"get-many": _getting("option<tuple<string, list<u8>>>")},
}
"""Types of the draft before, where they are others."""


def _interface(name: str, functions: Mapping[str, Signature], **resources: int) -> HostInterface:
    drafts = {DRAFT: _BEFORE[name]}
    return HostInterface(name, (DRAFT2, DRAFT), functions, partial(_make, name), resources, drafts)


PACKAGE: Final = Package(
    name=NAME,
    about="""\
Pairs of a key and a value that outlive calls, swaps, rollbacks and restarts of the component and of the device. `open`
of `default`, or of the empty name, gives the bucket of the instance; no other instance reaches it. A grant names more:
`durable` ones, where each write is on the disk when its call returns, and ones that instances of one namespace share.
Another `data_schema` begins with a copy of the pairs, and a rollback finds the earlier ones unchanged.

A write is seen at once, by every worker of the instance. Writes are committed in groups, as often as the rest of the
day's write quota allows: every second to every minute, about every ten seconds with the default quota, and when the
instance stops. A power cut, or a full disk, undoes the writes since the last commit, all of them together. `increment`
keeps decimal numbers as text (`42`). Keys are listed in the order of their bytes. Pairs whose database is found damaged
are set aside and begin anew; the instance's log says so.

The host implements `0.2.0-draft2`. `0.2.0-draft` is translated: the cursor of its `list-keys` is a number, so that keys
written or deleted between two pages shift them, and its `increment` has no sums below zero.""",
    grant='`interfaces = ["wasi:keyvalue"]`, and other buckets than `default` by their names in '
    "[`buckets`](component-toml.md#grants); any other is `access-denied`.",
    limits={
        "key": f"{KEY_MAX_BYTES:,} bytes",
        "value": f"{VALUE_MAX_BYTES:,} bytes",
        "all pairs": "`limits.storage` for all own buckets, and for each shared one, beside files; "
        f"{PAIR_BYTES} bytes count for each pair beside key and value",
        "bytes written a day": "`limits.daily_written`, together with files; keys, values, and all that commits write, "
        "which is 8 KiB or more for each: small writes spread over many keys cost a page of 4 KiB or two each",
        "handles open at once": f"{HANDLES_MAX}",
        "pairs of one batch": f"{BATCH_MAX}, and 256 KiB of `get-many`; each pair is set or deleted by itself",
        "one answer": "5 s, then `other`",
    },
    counters={
        "key-value reads, writes": "requests to the store, in the instance's health and in `fleet device`",
        "key-value bytes": "of keys and values, both ways",
        "denials": "buckets that are not granted",
        "written today": "with those of files",
    },
    rust="""\
use wasi::keyvalue::{atomics, store};

let bucket = store::open("default")?;
let total = atomics::increment(&bucket, "total", 1)?;
bucket.set("last", b"12.5")?;""",
    python="""\
from wit_world.imports import atomics, store

bucket = store.open("default")
total = atomics.increment(bucket, "total", 1)
bucket.set("last", b"12.5")""",
    interfaces=(
        _interface(wasi.KEYVALUE_STORE, _STORE, bucket=_BUCKET),
        _interface(wasi.KEYVALUE_ATOMICS, _ATOMICS, cas=_CAS),
        _interface(wasi.KEYVALUE_BATCH, _BATCH),
    ),
)

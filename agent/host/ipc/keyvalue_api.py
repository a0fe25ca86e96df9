"""Protocol of the key-value store's process: with the supervisor, and with each worker that may use it.

A worker's requests and their replies are one packet each, at most one request of a worker is under way. The process
knows a worker by its socket alone: what it may reach was said by the supervisor.
"""

from typing import Final, NamedTuple

import msgspec

from fleet.protocol.bounds import Count
from fleet.protocol.manifest import OWN_BUCKET, BucketRight

OWN: Final = OWN_BUCKET
"""Bucket that every instance with the grant has to itself; the empty name stands for it, too."""

SHARED: Final = "+"
"""Begin of a directory with the shared buckets of a namespace; no instance has such a name."""

KEY_MAX_BYTES: Final = 1024
VALUE_MAX_BYTES: Final = 64 * 1024
NAME_MAX_BYTES: Final = 63
PAIR_BYTES: Final = 64
"""Counted for each pair beside its key and value, so that empty ones count, too."""

PAGE_KEYS: Final = 256
PAGE_BYTES: Final = 64 * 1024
"""Most keys, and bytes of them, in one answer of list-keys."""

RESTARTED: Final = 0
"""`Reply.id` that says: an earlier process had this worker, and a request that it had read is lost."""


class RegisterUser(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that may use the store; its socket and two quota pages of its instance come along.

    The instance's workers share the first page; the second one is the supervisor's and the store's alone.

    Attributes:
        schema: of its data; `before`: of the generation that it replaces, whose pairs a new schema begins with.
        storage_bytes, daily_written_bytes: limits of the instance.
        place: for this process in the quota page.
        fresh: the first worker of a generation: with another schema, it begins with a copy in any case, also where an
            aborted attempt has left one.
        again: an earlier process had the worker.
        namespace: of its publisher, whose instances share the buckets that are `shared`.
        buckets: buckets that are granted, beside or as `default`.
    """

    instance: str
    schema: Count
    before: Count
    storage_bytes: Count
    daily_written_bytes: Count
    place: Count
    fresh: bool = False
    again: bool = False
    namespace: str = ""
    buckets: dict[str, tuple[BucketRight, ...]] = {}

    @property
    def place_of_own(self) -> tuple[str, str]:
        """Directory and name of the database of its own buckets."""
        return self.instance, str(self.schema)

    def place_of(self, bucket: str) -> tuple[str, str]:
        """Return the directory and name of the database that has a bucket."""
        shared = "shared" in self.buckets.get(bucket, ())
        return (f"{SHARED}{self.namespace}", bucket) if shared else self.place_of_own

    @property
    def places(self) -> set[tuple[str, str]]:
        """Databases that it may use."""
        return {self.place_of_own, *map(self.place_of, self.buckets)}


class Request(msgspec.Struct, frozen=True):
    """Request of a worker.

    Attributes:
        op: `get`, `set`, `delete`, `exists`, `list`, `skip`, `increment`, `look`, `swap`.
        key: of the pair; of `list`, the last key of the page before, empty for the first page.
        number: of `skip`, which lists, how many keys came before; delta of `increment`; version of the pair that
            `swap` expects, as `look` gives it, 0 for none.
    """

    id: int
    op: str
    bucket: str
    key: bytes = b""
    value: bytes = b""
    number: int = 0


class Reply(msgspec.Struct, frozen=True):
    """Reply to a request.

    Attributes:
        problem: a sentence for what went wrong; empty for nothing.
        value: of `get` and `look`; None without a pair.
        number: of `increment`; version of `look`; 1 of `exists` and `swap` for yes.
        keys: of `list` and `skip`; `more` tells whether others follow.
        note: for the instance's log, once: what was damaged.
    """

    id: int
    problem: str = ""
    value: bytes | None = None
    number: int = 0
    keys: tuple[bytes, ...] = ()
    more: bool = False
    note: str = ""


READS: Final = frozenset({"get", "look", "exists", "list", "skip"})
"""Operations that write nothing."""


class Figures(NamedTuple):
    """Counts of a worker's use of the store."""

    reads: int = 0
    writes: int = 0
    bytes: int = 0


UNUSED: Final = Figures()

register_user: Final[msgspec.json.Decoder[RegisterUser]] = msgspec.json.Decoder(RegisterUser)
request: Final[msgspec.msgpack.Decoder[Request]] = msgspec.msgpack.Decoder(Request)
reply: Final[msgspec.msgpack.Decoder[Reply]] = msgspec.msgpack.Decoder(Reply)
encode = msgspec.msgpack.encode

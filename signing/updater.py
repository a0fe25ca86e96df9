"""TUF client: the loop around `TrustedMetadata` that fetches, caches and stores.

`Updater` obtains the files that `TrustedMetadata` asks for, from the cache or the repository, and stores what is
remembered (`VerifierState`) after each refresh and query, even if it failed.

The cache is never trusted: a file read from it is verified like one from the network, and everything that must not be
forgotten is in the `StateStore`. A torn, lost or planted file only costs a download.
"""

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Protocol, TypeVar

from fleet.protocol import bounds, files
from fleet.protocol.codes import RejectCode
from signing.errors import FetchNotFound, Rejected
from signing.state import VerifierState
from signing.trusted_metadata import FileRequest, Found, RoleFile, TrustedMetadata

T = TypeVar("T")

Fetch = Callable[[str, int], bytes]
"""Fetch a repository file by its name (`7.root.json`, `timestamp.json`); the second argument limits its bytes.

Raises `FetchNotFound` after a 404, and `Rejected` (UNREACHABLE, TOO_SLOW or TOO_LARGE) after any other failure.
"""


class Cache(Protocol):
    """Cache of verified files by name, such as `timestamp.json`."""

    def load(self, name: str) -> bytes | None:
        """Return the file; None if there is none."""

    def store(self, name: str, data: bytes) -> None:
        """Keep a verified file."""


class MemoryCache:
    """Cache in memory.

    Args:
        files: initial content; modified in place.
    """

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        self.files = {} if files is None else files

    def load(self, name: str) -> bytes | None:
        """See `Cache`."""
        return self.files.get(name)

    def store(self, name: str, data: bytes) -> None:
        """See `Cache`."""
        self.files[name] = data


class DirectoryCache:
    """Cache in a directory; files are replaced atomically. On a full disk, files are not cached.

    Args:
        directory: of the files.
        write: replaces a file in a directory that exists, or raises `OSError`.
    """

    def __init__(self, directory: Path, *, write: Callable[[Path, bytes], None] | None = None) -> None:
        self._directory = directory
        self._write = write or (lambda path, data: files.atomic_write(path, data, mode=0o644))

    def load(self, name: str) -> bytes | None:
        """See `Cache`; an unreadable file counts as none."""
        try:
            with files.open_to_read(self._path(name)) as file:
                return file.read(bounds.TARGETS_MAX_BYTES + 1)
        except OSError:
            return None

    def store(self, name: str, data: bytes) -> None:
        """See `Cache`; an unchanged file is not written again."""
        if self.load(name) == data:
            return
        path = self._path(name)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write(path, data)

    def _path(self, name: str) -> Path:
        assert ".." not in name.split("/")
        return self._directory / name


class StateStore(Protocol):
    """Storage of a `VerifierState`; every read-modify-write happens within `lock`."""

    def lock(self) -> AbstractContextManager[object]:
        """Exclude other writers between `load` and `save`."""

    def load(self) -> VerifierState:
        """Return the saved state; an empty one at first."""

    def save(self, state: VerifierState) -> None:
        """Store the state durably, before anything that was accepted is acted on."""


class MemoryState:
    """State in memory, lost when the process ends."""

    def __init__(self, state: VerifierState | None = None) -> None:
        self._state = VerifierState() if state is None else state

    def lock(self) -> AbstractContextManager[object]:
        """See `StateStore`; there are no other writers."""
        return contextlib.nullcontext()

    def load(self) -> VerifierState:
        """See `StateStore`."""
        return self._state

    def save(self, state: VerifierState) -> None:
        """See `StateStore`."""
        self._state = state


class FileState:
    """State in a file that several processes share.

    Args:
        path: the file, replaced atomically.
        lock: the file to lock; created if missing.
    """

    def __init__(self, path: Path, *, lock: Path) -> None:
        self._path, self._lock = path, lock

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """See `StateStore`; blocks while another process holds the lock. Raises `OSError`."""
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        with self._lock.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def load(self) -> VerifierState:
        """See `StateStore`. Raises `OSError`, and `msgspec.DecodeError` for a damaged file."""
        try:
            return VerifierState.decode(self._path.read_bytes())
        except FileNotFoundError:
            return VerifierState()

    def save(self, state: VerifierState) -> None:
        """See `StateStore`. Raises `OSError`."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        files.atomic_write(self._path, state.encode(), mode=0o644)


class Updater:
    """TUF client of one repository. Blocking; not thread-safe.

    Args:
        pinned_root: the root pinned at enrolment, as served.
        fetch: see `Fetch`.
        states: storage of the verifier state.
        cache: of verified files; None for a cache in memory.
        production: refuse repositories made for development.
    """

    def __init__(
        self,
        *,
        pinned_root: bytes,
        fetch: Fetch,
        states: StateStore,
        cache: Cache | None = None,
        production: bool = False,
    ) -> None:
        self._pinned_root = pinned_root
        self._fetch = fetch
        self._states = states
        self._cache: Cache = MemoryCache() if cache is None else cache
        self._production = production
        self._trusted: TrustedMetadata | None = None

    @property
    def trusted(self) -> TrustedMetadata:
        """Metadata of the last successful refresh; raises `Rejected` (UNREACHABLE) before the first."""
        if self._trusted is None:
            raise Rejected(RejectCode.UNREACHABLE, "the repository has not been refreshed yet")
        return self._trusted

    def refresh(
        self, now: datetime, *, fetch: Fetch | None = None, allow_expired_online: bool = False
    ) -> TrustedMetadata:
        """Bring root, timestamp, snapshot and the top-level targets up to date.

        Args:
            now: the reference time of this refresh and of all queries after it: `state.time(wall_clock)`.
            fetch: another source for this refresh only.
            allow_expired_online: accept an expired timestamp and snapshot.

        Raises:
            Rejected: a file is not trusted or cannot be fetched. Metadata trusted before stays trusted until it expires
                or root changes, so that a device without a network can still verify assignments.
        """
        with self._states.lock():
            before = self._states.load()
            trusted = TrustedMetadata(
                pinned_root=self._pinned_root,
                state=before,
                now=now,
                production=self._production,
                allow_expired_online=allow_expired_online,
                reuse=self._trusted,
            )
            try:
                while (request := trusted.next()) is not None:
                    self._obtain(trusted, request, fetch or self._fetch)
            except BaseException:
                if self._trusted is not None and self._trusted.root.version != trusted.state.root:
                    self._trusted = None
                raise
            finally:
                self._cache.store("root.json", trusted.root_file)
                self._save(trusted, before)
            self._trusted = trusted
        return trusted

    def find(self, path: str) -> Found | None:
        """Search a target in the trusted metadata, see `TrustedMetadata.find`."""
        return self.ask(lambda trusted: trusted.find(path))

    def role(self, namespace: str) -> RoleFile:
        """Return the file of a namespace's role, see `TrustedMetadata.role`."""
        return self.ask(lambda trusted: trusted.role(namespace))

    def look_for_revocations(self, path: str) -> TrustedMetadata:
        """Fetch the roles that could revoke a path. A role that cannot be fetched or verified is skipped."""
        trusted = self.trusted
        for name in trusted.namespaces_of(path):
            with contextlib.suppress(Rejected):
                self.role(name)
        return trusted

    def ask(self, question: Callable[[TrustedMetadata], T | FileRequest]) -> T:
        """Run a query on the trusted metadata, fetching the roles that it needs.

        Args:
            question: a query of `TrustedMetadata`, called until it returns something other than a request.

        Raises:
            Rejected: raised by the query, or a role that it needs is not trusted or cannot be fetched.
        """
        trusted = self.trusted
        with self._states.lock():
            before = self._states.load()
            superseded = (
                before.root > trusted.root.version
            )  # another process verified a newer root; do not overwrite its state
            if not superseded:
                trusted.state = before
            try:
                while isinstance(answer := question(trusted), FileRequest):
                    self._obtain(trusted, answer, self._fetch)
            finally:
                if not superseded:
                    self._save(trusted, before)
        return answer

    def _obtain(self, trusted: TrustedMetadata, request: FileRequest, fetch: Fetch) -> None:
        cached = self._cache.load(request.cache_name)
        if cached is not None and trusted.learn(request, cached):
            return
        try:
            data: bytes | None = fetch(request.name, request.max_bytes)
        except FetchNotFound:
            data = None
        kept = trusted.accept(request, data)
        if kept is not None:
            self._cache.store(request.cache_name, kept)

    def _save(self, trusted: TrustedMetadata, before: VerifierState) -> None:
        if trusted.state != before:
            self._states.save(trusted.state)

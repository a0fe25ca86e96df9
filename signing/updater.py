"""Loop around `TrustedMetadata`: fetch, cache, remember.

`Updater` obtains the files that `TrustedMetadata` asks for, from the cache or the repository, and stores what is
remembered (`VerifierState`) after each refresh and question, also after one that failed.

The cache is a convenience and never an authority: what is read from it is verified like what comes from the network,
and what must not be forgotten is in the `StateStore`. A torn, lost or planted file costs a download and nothing else.
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
"""Fetch a repository file by name (`7.root.json`, `timestamp.json`), at most so many bytes.

Raises `FetchNotFound` for a 404, and `Rejected` with UNREACHABLE, TOO_SLOW or TOO_LARGE for the rest.
"""


class Cache(Protocol):
    """Files by name, such as `timestamp.json`."""

    def load(self, name: str) -> bytes | None:
        """Return the file, or None where there is none."""

    def store(self, name: str, data: bytes) -> None:
        """Keep a verified file."""


class MemoryCache:
    """Cache in memory.

    Args:
        files: to begin with; filled in place.
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
    """Cache in a directory; files are replaced atomically. A full disk makes it forgetful, not wrong."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self, name: str) -> bytes | None:
        """See `Cache`; an unreadable file counts as none."""
        try:
            with self._path(name).open("rb") as file:
                return file.read(bounds.TARGETS_MAX_BYTES + 1)
        except OSError:
            return None

    def store(self, name: str, data: bytes) -> None:
        """See `Cache`; a file that is the same already is not written again."""
        if self.load(name) == data:
            return
        path = self._path(name)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            files.atomic_write(path, data, mode=0o644)

    def _path(self, name: str) -> Path:
        assert ".." not in name.split("/")
        return self._directory / name


class StateStore(Protocol):
    """The only home of a `VerifierState`: whoever reads, computes and writes it does so within `lock`."""

    def lock(self) -> AbstractContextManager[object]:
        """Keep everyone else from writing between `load` and `save`."""

    def load(self) -> VerifierState:
        """Return what was saved last; an empty state at first."""

    def save(self, state: VerifierState) -> None:
        """Store it before anything is done about what was accepted."""


class MemoryState:
    """State of a verifier that lives as long as its process."""

    def __init__(self, state: VerifierState | None = None) -> None:
        self._state = VerifierState() if state is None else state

    def lock(self) -> AbstractContextManager[object]:
        """See `StateStore`; there is nobody else."""
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
        path: replaced atomically, and written only when it changes.
        lock: a file to lock meanwhile; made where it is missing.
    """

    def __init__(self, path: Path, *, lock: Path) -> None:
        self._path, self._lock = path, lock

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """See `StateStore`; waits for other processes. Raises `OSError`."""
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
    """Keeps the trusted metadata of one repository up to date. Blocks; belongs to its caller's thread.

    Args:
        pinned_root: the root pinned at enrolment, as served.
        fetch: see `Fetch`.
        states: home of what is remembered.
        cache: where verified files are kept; None for memory.
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
        """The metadata of the last refresh that succeeded; raises `Rejected` (UNREACHABLE) before the first."""
        if self._trusted is None:
            raise Rejected(RejectCode.UNREACHABLE, "the repository has not been refreshed yet")
        return self._trusted

    def refresh(
        self, now: datetime, *, fetch: Fetch | None = None, allow_expired_online: bool = False
    ) -> TrustedMetadata:
        """Bring root, timestamp, snapshot and the top-level targets up to date.

        Args:
            now: the reference time of this refresh and of all questions after it: `state.time(wall_clock)`.
            fetch: another source for this refresh alone.
            allow_expired_online: take timestamp and snapshot past their expiry.

        Raises:
            Rejected: with the code of what was found. What was trusted before stays trusted, until it expires or root
                changes: a network that is away does not take the director's word from a device.
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
        """Obtain the roles that could revoke a path, as far as they can be had; an unknown role is no failure."""
        trusted = self.trusted
        for name in trusted.namespaces_of(path):
            with contextlib.suppress(Rejected):
                self.role(name)
        return trusted

    def ask(self, question: Callable[[TrustedMetadata], T | FileRequest]) -> T:
        """Put a question to the trusted metadata, and obtain the roles that it needs for the answer.

        Raises:
            Rejected: of the question, or of a role that it needs.
        """
        trusted = self.trusted
        with self._states.lock():
            before = self._states.load()
            superseded = before.root > trusted.root.version  # another process followed root: its memory is not ours
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

"""Memory of an operator's machine: the verified repository, and the key first seen of each device.

`TrustStore` verifies the repository from the root pinned on this machine. `DeviceMemory` keeps the keys and states of
devices as first and last seen, so that a server cannot change them unnoticed.
"""

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeVar

import click
import msgspec
from tuf.api.metadata import Targets

from fleet.cli.base import Exit, Fault, reason
from fleet.cli.operator import Operator
from fleet.client import Client
from fleet.protocol import files, wire
from signing import hash_bins, metadata, policy, repository, rotation
from signing.device_statements import Seen
from signing.errors import FetchNotFound, Rejected, RepositoryError
from signing.metadata import is_revoked, profile
from signing.policy import Release
from signing.rotation import RoleKeys
from signing.state import VerifierState
from signing.trusted_metadata import FileRequest, TrustedMetadata
from signing.updater import DirectoryCache, FileState, Updater

T = TypeVar("T")
_LONG_AGO: Final = datetime(2000, 1, 1, tzinfo=UTC)
"""Reference time before any expiry, to read metadata that has expired."""

DEVICES_FILE: Final = "devices.json"
_DEVICES_LOCK: Final = "devices.lock"
_DEVICES_FILE_BEFORE: Final = "boards.json"
"""Older name of that file: read where there is no newer one, removed after the next write."""


class Cached:
    """Stand-in for a lost server: the head of the repository as this machine verified it last."""

    def __init__(self, who: Operator) -> None:
        self._cache = DirectoryCache(who.trust / "cache")

    def tuf(self, file: str) -> bytes | None:
        """Return the timestamp; the cache itself holds everything else."""
        return self._cache.load(file) if file == "timestamp.json" else None


class TrustStore:
    """Repository as this operator's machine verified it, from the pinned root; remembered between commands.

    Args:
        who: the operator, whose stored state and namespace are used.
        client: a connection to the server.
        expired: accept expired metadata, to report it and to renew it, never to publish into it.

    Raises:
        Fault: the root is missing, or the repository does not verify.
    """

    def __init__(self, who: Operator, client: Client | Cached, *, expired: bool = False) -> None:
        self._who = who
        self._expired = expired
        self._client = client
        self._states = _OperatorState(who.trust / "facts.json", lock=who.trust / "cache" / ".lock")
        self._updater = Updater(
            pinned_root=who.pinned_root(),
            fetch=self._fetch,
            states=self._states,
            cache=DirectoryCache(who.trust / "cache"),
        )
        self.refresh()

    def refresh(self) -> None:
        """Update the verified state from the server."""
        now = _LONG_AGO if self._expired else self._states.load().time(datetime.now(UTC))
        with _verifying():
            self._updater.refresh(now)
        self._files = self._ask(lambda trusted: trusted.files(bins=False))

    def _ask(self, question: Callable[[TrustedMetadata], T | FileRequest]) -> T:
        """Answer a query from the verified repository."""
        with _verifying():
            return self._updater.ask(question)

    @property
    def development(self) -> bool:
        """Return whether the repository was made for development, by its signed root."""
        return profile(self._updater.trusted.root).get("size") == "dev"

    @property
    def files(self) -> dict[str, bytes]:
        """Verified files of root, targets and namespaces, with all hash bins."""
        return self._ask(lambda trusted: trusted.files())

    def expired(self) -> list[str]:
        """Return sentences about expired roles among root, targets, snapshot and timestamp."""
        now = datetime.now(UTC)
        roles = self._updater.trusted.expiries().items()
        return [f"{role} expired on {at:%Y-%m-%d}" for role, at in roles if at <= now]

    @property
    def heads(self) -> dict[str, bytes]:
        """Verified files of root, targets and namespaces, without the many files of hash bins."""
        return dict(self._files)

    def holder(self, path: str) -> tuple[str, bytes]:
        """Return the role that holds or will hold a target of this namespace: the namespace's, or a hash bin's."""
        file = self._ask(lambda trusted: trusted.holder(self._who.namespace, path))
        return file.name.partition(".")[2].removesuffix(".json"), file.data

    def release(self, path: str) -> Release | None:
        """Return the release under a target path; None for none, or a revoked one."""
        with _verifying():
            found = self._updater.find(path)
            if found is None or found.revoked or found.target is None:
                return None
            return policy.release_of(path, found.target)

    def published(self, path: str) -> Release | None:
        """Return the release that was signed under a target path, even if revoked since; None for none."""
        with _verifying():
            found = self._updater.find(path)
            return None if found is None or found.target is None else policy.release_of(path, found.target)

    def is_revoked(self, path: str) -> bool:
        """Return whether this namespace has revoked a target."""
        if self.role is None:
            return False
        return is_revoked(metadata.parse(Targets, self.role, self._who.namespace).signed, path)

    @property
    def role(self) -> bytes | None:
        """Verified role of this operator's namespace; None for a new namespace that has none yet."""
        try:
            return repository.latest(self._files, self._who.namespace)[1]
        except RepositoryError:
            return None

    @property
    def publishers(self) -> RoleKeys:
        """Signers of this operator's namespace.

        Raises:
            Fault: the namespace does not exist.
        """
        if self._who.namespace not in repository.namespaces(self._files):
            raise Fault(
                f"the fleet has no namespace {self._who.namespace!r}",
                f"there are {', '.join(repository.namespaces(self._files))}",
                "create it with fleet keys rotate, or correct the namespace in operator/config.toml",
            )
        return rotation.keys_of(self._files, self._who.namespace)

    def ends(self, keyid: str) -> datetime | None:
        """Return when a key of this operator's namespace ends; None for never."""
        return rotation.namespace_of(self._files, self._who.namespace).ends.get(keyid)

    @property
    def releases(self) -> tuple[Release, ...]:
        """Published releases of the namespace."""
        return () if self.role is None else hash_bins.releases(self.files, self._who.namespace)

    def _fetch(self, name: str, _max_bytes: int) -> bytes:
        data = self._client.tuf(name)
        if data is None:
            raise FetchNotFound(name)
        return data


class _OperatorState(FileState):
    """Verifier state in `operator/trust/facts.json`, shared by all commands on this machine."""

    def __init__(self, path: Path, *, lock: Path) -> None:
        super().__init__(path, lock=lock)
        self._file = path

    def load(self) -> VerifierState:
        """Load the state, see `StateStore`. Raises `Fault` for a damaged file."""
        try:
            return super().load()
        except wire.JSON_ERRORS as error:
            raise Fault(
                f"cannot read {self._file}",
                f"it is damaged: {error}",
                "restore it, or delete it if nobody else writes there",
            ) from None


@contextlib.contextmanager
def _verifying() -> Iterator[None]:
    """Turn a rejection of the server's files into a `Fault`."""
    try:
        yield
    except Rejected as error:
        raise Fault(
            "the fleet's repository does not verify",
            error.message,
            "nothing was signed; find out who changed the repository before anything else",
            code=Exit.REFUSED,
        ) from None


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Groups and state of a device, as the server last showed them."""

    groups: tuple[str, ...] = ()
    revoked: bool = False


class DeviceMemory(msgspec.Struct):
    """Content of `operator/trust/devices.json`: first key and newest report of each device, by device id."""

    devices: dict[str, Seen] = {}
    places: dict[str, Place] = {}


class _DeviceMemoryBefore(msgspec.Struct):
    """Content of `boards.json`, as older versions wrote it."""

    boards: dict[str, Seen] = {}
    places: dict[str, Place] = {}


def load_devices(trust: Path) -> DeviceMemory:
    """Read the memory of devices from the operator's directory `trust`.

    Raises:
        Fault: the file cannot be read.
    """
    path = trust / DEVICES_FILE
    try:
        try:
            return msgspec.json.decode(path.read_bytes(), type=DeviceMemory)
        except FileNotFoundError:
            path = trust / _DEVICES_FILE_BEFORE
            older = msgspec.json.decode(path.read_bytes(), type=_DeviceMemoryBefore)
            return DeviceMemory(devices=older.boards, places=older.places)
    except FileNotFoundError:
        return DeviceMemory()
    except (OSError, *wire.JSON_ERRORS) as error:
        raise Fault(
            f"cannot read {path}",
            str(error),
            "restore it from a backup: without it every device's key is accepted as the server shows it",
        ) from None


def save_devices(trust: Path, memory: DeviceMemory) -> None:
    """Write the memory of devices.

    Raises:
        Fault: the file cannot be written.
    """
    path = trust / DEVICES_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.atomic_write(path, msgspec.json.format(msgspec.json.encode(memory)), mode=0o644)
        (trust / _DEVICES_FILE_BEFORE).unlink(missing_ok=True)
    except OSError as error:
        raise Fault(f"cannot write {path}", reason(error), "check its owner, and the space left there") from None


@contextlib.contextmanager
def remembering_devices(trust: Path) -> Iterator[DeviceMemory]:
    """Give the memory of devices to one command at a time, and write it back unless the command fails.

    Without the lock, of two commands the later would write back what it read before the other did, and a key first seen
    or a newest report would be forgotten.

    Raises:
        Fault: the file cannot be read or written.
    """
    path = trust / _DEVICES_LOCK
    with contextlib.ExitStack() as stack:
        try:
            trust.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(path.open("ab"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                click.echo("Waiting for another fleet command that looks at devices.", err=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise Fault(f"cannot lock {path}", reason(error), "check its owner, and the space left there") from None
        memory = load_devices(trust)
        yield memory
        save_devices(trust, memory)


def check_device_key(memory: DeviceMemory, device: str, fingerprint: str) -> None:
    """Compare a device's key with the one first seen, or remember it from now on.

    Raises:
        Fault: the key is another one.
    """
    seen = memory.devices.get(device)
    if seen is not None and seen.key and seen.key != fingerprint:
        raise Fault(
            f"the server shows another key for {device}",
            f"{fingerprint[:16]} and not {seen.key[:16]}, which was first seen",
            f"nothing was sealed; if it was enrolled anew, run 'fleet audit verify {device} --forget'",
            code=Exit.REFUSED,
        )
    if seen is None or not seen.key:
        memory.devices[device] = Seen(key=fingerprint)

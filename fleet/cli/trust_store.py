"""Verified state that an operator's machine keeps of the repository and of devices.

What this operator believes of the repository, verified from the root pinned on this machine.

What this machine remembers of boards from first sight, held against what a server shows of them.
"""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeVar

import msgspec
from tuf.api.metadata import Targets

from fleet.cli.base import Exit, Fault, read_file
from fleet.cli.operator import Operator
from fleet.client import Client
from fleet.protocol import bounds, wire
from signing import hash_bins, metadata, policy, repository, rotation
from signing.device_statements import Seen
from signing.errors import FetchNotFound, Rejected, RepositoryError
from signing.metadata import is_revoked, profile
from signing.policy import Release
from signing.rotation import RoleKeys
from signing.state import VerifierState
from signing.trusted_metadata import Workflow
from signing.updater import DirectoryCache

T = TypeVar("T")

_LONG_AGO: Final = datetime(2000, 1, 1, tzinfo=UTC)
"""Before anything can have expired."""


class Cached:
    """In place of a server that is gone: the head of the repository as this machine verified it last."""

    def __init__(self, who: Operator) -> None:
        self._cache = DirectoryCache(who.trust / "cache")

    def tuf(self, file: str) -> bytes | None:
        """The timestamp; everything else is in the cache itself."""
        return self._cache.load(file) if file == "timestamp.json" else None


class TrustStore:
    """What this operator believes of the repository: verified from the pinned root, remembered between commands.

    Args:
        who: whose memory and namespace.
        client: a connection to the server.
        expired: look at what has expired too: to say so and to sign it anew, never to publish into it.

    Raises:
        Fault: the root is missing, or what the server shows does not verify.
    """

    def __init__(self, who: Operator, client: Client | Cached, *, expired: bool = False) -> None:
        self._who = who
        self._expired = expired
        self._client = client
        self._facts_file = who.trust / "facts.json"
        pinned = read_file(who.root, bounds.ROOT_MAX_BYTES)
        self._workflow = Workflow(root=pinned, fetch=self._fetch, cache=DirectoryCache(who.trust / "cache"))
        self.refresh()

    def refresh(self) -> None:
        """Bring everything up to date with the server."""
        facts = self._load_facts()
        self._asked(lambda: self._bring_up(facts))

    def _bring_up(self, facts: VerifierState) -> None:
        self._workflow.refresh(facts=facts, now=_LONG_AGO if self._expired else facts.time(datetime.now(UTC)))
        self._files = self._workflow.files(bins=False)

    def _asked(self, question: Callable[[], T]) -> T:
        """An answer out of the verified repository; what was seen on the way is remembered in any case."""
        try:
            return question()
        except Rejected as error:
            raise Fault(
                "the fleet's repository does not verify",
                error.message,
                "nothing was signed; find out who changed it before anything else",
                code=Exit.REFUSED,
            ) from None
        finally:
            self._store_facts(self._workflow.facts)

    @property
    def development(self) -> bool:
        """Whether the repository was made for development, by its signed root."""
        return profile(self._workflow.loaded()[0]).get("size") == "dev"

    @property
    def files(self) -> dict[str, bytes]:
        """Root, targets and the namespaces' roles with all their hash bins, as verified."""
        return self._asked(self._workflow.files)

    def expired(self) -> list[str]:
        """What of root, targets, snapshot and timestamp has expired, in words."""
        now = datetime.now(UTC)
        roles = self._asked(self._workflow.expiries).items()
        return [f"{role} expired on {at:%Y-%m-%d}" for role, at in roles if at <= now]

    @property
    def heads(self) -> dict[str, bytes]:
        """The same without hash bins, which are many files."""
        return dict(self._files)

    def holder(self, path: str) -> tuple[str, bytes]:
        """The role that holds or will hold a target of this namespace: the namespace's, or a hash bin's."""
        name, data = self._asked(lambda: self._workflow.holder(self._who.namespace, path))
        return name.partition(".")[2].removesuffix(".json"), data

    def release(self, path: str) -> Release | None:
        """What is published under a target path; None for nothing, or what was revoked."""
        target = self._asked(lambda: self._workflow.target(path))
        return None if target is None else policy.release_of(path, target)

    def published(self, path: str) -> Release | None:
        """What was signed under a target path, whether it was revoked since or not; None for nothing."""

        def signed() -> Release | None:
            found = self._workflow.search(path)
            return None if found is None or found.target is None else policy.release_of(path, found.target)

        return self._asked(signed)

    def is_revoked(self, path: str) -> bool:
        """Whether this namespace has taken a target back."""
        if self.role is None:
            return False
        return is_revoked(metadata.parse(Targets, self.role, self._who.namespace).signed, path)

    @property
    def role(self) -> bytes | None:
        """The verified role of this operator's namespace; None for a new namespace that has none yet."""
        try:
            return repository.latest(self._files, self._who.namespace)[1]
        except RepositoryError:
            return None

    @property
    def publishers(self) -> RoleKeys:
        """Who signs for this operator's namespace.

        Raises:
            Fault: there is no such namespace.
        """
        if self._who.namespace not in repository.namespaces(self._files):
            raise Fault(
                f"the fleet has no namespace {self._who.namespace!r}",
                f"there are {', '.join(repository.namespaces(self._files))}",
                "fleet keys rotate makes one; the namespace of this machine stands in operator/config.toml",
            )
        return rotation.keys_of(self._files, self._who.namespace)

    def ends(self, keyid: str) -> datetime | None:
        """When a key of this operator's namespace ends; None for never."""
        return rotation.namespace_of(self._files, self._who.namespace).ends.get(keyid)

    @property
    def releases(self) -> tuple[Release, ...]:
        """What the namespace has published."""
        return () if self.role is None else hash_bins.releases(self.files, self._who.namespace)

    def _fetch(self, name: str, _max_bytes: int) -> bytes:
        data = self._client.tuf(name)
        if data is None:
            raise FetchNotFound(name)
        return data

    def _load_facts(self) -> VerifierState:
        try:
            return VerifierState.decode(self._facts_file.read_bytes())
        except FileNotFoundError:
            return VerifierState()
        except wire.JSON_ERRORS as error:
            raise Fault(
                f"{self._facts_file} is damaged",
                str(error),
                "restore it, or delete it if nobody else writes there",
            ) from None

    def _store_facts(self, facts: VerifierState) -> None:
        fresh = self._facts_file.with_suffix(".new")
        fresh.parent.mkdir(parents=True, exist_ok=True)
        with fresh.open("wb") as file:
            file.write(facts.encode())
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._facts_file)


DEVICES_FILE: Final = "boards.json"


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a board belongs, as the server said when it was looked at last."""

    groups: tuple[str, ...] = ()
    revoked: bool = False


class DeviceMemory(msgspec.Struct):
    """`operator/trust/boards.json`: what was seen of each board, by device id."""

    boards: dict[str, Seen] = {}
    places: dict[str, Place] = {}


def remembered(path: Path) -> DeviceMemory:
    """What this machine remembers of the boards; raises `Fault` when it cannot be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=DeviceMemory)
    except FileNotFoundError:
        return DeviceMemory()
    except (OSError, *wire.JSON_ERRORS) as error:
        raise Fault(
            f"{path} cannot be read",
            str(error),
            "restore it from a backup: without it every board's key is taken as the server shows it",
        ) from None


def save_devices(path: Path, memory: DeviceMemory) -> None:
    """Remember it; raises `Fault` when it cannot be written."""
    beside = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(memory)))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise Fault(f"{path} cannot be written", error.strerror or str(error)) from None


def load(trust: Path) -> DeviceMemory:
    """Read it back; raises `Fault`."""
    return remembered(trust / DEVICES_FILE)


def save(trust: Path, memory: DeviceMemory) -> None:
    """Write it; raises `Fault`."""
    save_devices(trust / DEVICES_FILE, memory)


def check(memory: DeviceMemory, device: str, fingerprint: str) -> None:
    """Hold a board's key against the one that was first seen, or remember it from now on.

    Raises:
        Fault: it is another.
    """
    seen = memory.boards.get(device)
    if seen is not None and seen.key and seen.key != fingerprint:
        raise Fault(
            f"the server shows another key for {device}",
            f"{fingerprint[:16]} and not {seen.key[:16]}, which was first seen",
            f"nothing was sealed; if the board was enrolled anew, 'fleet audit verify {device} --forget' takes its key",
            code=Exit.REFUSED,
        )
    if seen is None or not seen.key:
        memory.boards[device] = Seen(key=fingerprint)

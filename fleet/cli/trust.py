"""What this operator believes of the repository, verified from the root pinned on this machine."""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, TypeVar

from tuf.api.metadata import Targets

from fleet.cli.base import Exit, Fault
from fleet.cli.home import Operator
from fleet.cli.prepare import read_file
from fleet.client import Client
from fleet.protocol import caps, wire
from signing import bins, metadata, policy, repository, rotation
from signing.cache import DirectoryCache
from signing.errors import FetchNotFound, Rejected, RepositoryError
from signing.facts import Facts
from signing.policy import Release
from signing.rotation import RoleKeys
from signing.workflow import Workflow, is_revoked, profile

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


class Trust:
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
        pinned = read_file(who.root, caps.ROOT_MAX_BYTES)
        self._workflow = Workflow(root=pinned, fetch=self._fetch, cache=DirectoryCache(who.trust / "cache"))
        self.refresh()

    def refresh(self) -> None:
        """Bring everything up to date with the server."""
        facts = self._load_facts()
        self._asked(lambda: self._bring_up(facts))

    def _bring_up(self, facts: Facts) -> None:
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
        return () if self.role is None else bins.releases(self.files, self._who.namespace)

    def _fetch(self, name: str, _max_bytes: int) -> bytes:
        data = self._client.tuf(name)
        if data is None:
            raise FetchNotFound(name)
        return data

    def _load_facts(self) -> Facts:
        try:
            return Facts.decode(self._facts_file.read_bytes())
        except FileNotFoundError:
            return Facts()
        except wire.JSON_ERRORS as error:
            raise Fault(
                f"{self._facts_file} is damaged",
                str(error),
                "restore it, or delete it if nobody else writes there",
            ) from None

    def _store_facts(self, facts: Facts) -> None:
        fresh = self._facts_file.with_suffix(".new")
        fresh.parent.mkdir(parents=True, exist_ok=True)
        with fresh.open("wb") as file:
            file.write(facts.encode())
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._facts_file)

"""TUF client workflow (specification section 5): bytes in, trusted roles out, no I/O.

What exists: the client workflow of the TUF specification, section 5, with its step numbers in the comments.

Pure over bytes: files come from a `Fetch` function and a `Cache`, both taken for hostile; the time is given. Against
rollback stands `Facts`, which the caller stores apart from the cache: after each call, also one that raised `Rejected`,
`Workflow.facts` is what is to be stored.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Protocol
from urllib.parse import quote

from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from fleet.protocol import bounds
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import Grants
from signing import metadata
from signing.errors import FetchNotFound, Rejected
from signing.metadata import ceiling, is_revoked, profile, rollback_rejection, verify_root
from signing.state import Remembered, VerifierState


class Cache(Protocol):
    """Files by name, such as `timestamp.json`."""

    def load(self, name: str) -> bytes | None:
        """The file, or None where there is none."""

    def store(self, name: str, data: bytes) -> None:
        """Keep a verified file."""


class MemoryCache:
    """For as long as the process lives; a mapping given seeds it."""

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        self.files = {} if files is None else files

    def load(self, name: str) -> bytes | None:
        """See `Cache`."""
        return self.files.get(name)

    def store(self, name: str, data: bytes) -> None:
        """See `Cache`."""
        self.files[name] = data


Fetch = Callable[[str, int], bytes]
"""Fetch a repository file by name (`7.root.json`, `timestamp.json`), at most so many bytes.

Raises `FetchNotFound` for a 404, and `Rejected` with UNREACHABLE, TOO_SLOW or TOO_LARGE for the rest.
"""

DELEGATIONS_MAX: Final = 32
"""Roles visited in search of one target (TUF specification, 5.6.7.1)."""


@dataclass(frozen=True, slots=True)
class Found:
    """A target with everything that was met on the way to it.

    Attributes:
        target: None where all that is left of it is its revocation.
        ceilings: of the delegations that led to it.
        revoked: by a role on the way.
    """

    target: TargetFile | None
    ceilings: tuple[Grants, ...]
    revoked: bool


class Workflow:
    """What one verifier trusts of one repository.

    Args:
        root: the root metadata pinned at enrolment, as served.
        fetch: see `Fetch`.
        cache: where verified files are kept; None for memory.
        production: refuse repositories made for development.

    Attributes:
        facts: what is to be remembered; current after each call.
    """

    def __init__(self, *, root: bytes, fetch: Fetch, cache: Cache | None = None, production: bool = False) -> None:
        self._pinned = root
        self._fetch = fetch
        self._cache: Cache = MemoryCache() if cache is None else cache
        self._production = production
        self._root: Root | None = None
        self._root_file = root
        self._timestamp: Timestamp | None = None
        self._snapshot: Snapshot | None = None
        self._roles: dict[tuple[str, str], tuple[Targets, bytes]] = {}  # (delegator, role)
        self._parsed: dict[str, tuple[tuple[str, bytes], Targets]] = {}  # what was verified last of each role
        self._now: datetime | None = None
        self._late = False
        self.facts = VerifierState()

    def refresh(self, *, facts: VerifierState, now: datetime, late: bool = False) -> VerifierState:
        """Bring root, timestamp, snapshot and the top-level targets up to date.

        Args:
            facts: as stored by the caller.
            now: the reference time of this refresh and all that is resolved after it: `facts.time(wall clock)`.
            late: take timestamp and snapshot past their expiry; everything else about them is asked as always.

        Returns:
            The facts to store (`self.facts`).

        Raises:
            Rejected: with the code of what was found. What was trusted before stays trusted, until it expires or root
                changes: a network that is away does not take the director's word from a board.
        """
        before = self._root, self._timestamp, self._snapshot, self._roles
        self.facts, self._now, self._late = facts.together(self.facts), now, late
        try:
            root = self._update_root(now)
            timestamp = self._update_timestamp(root, now)
            self._root, self._timestamp = root, timestamp
            self._snapshot = self._update_snapshot(root, timestamp, now)
            self._roles = {}
            self.load("targets", root)
        except BaseException:
            stands = before[0] is not None and before[0].version == self.facts.root
            self._root, self._timestamp, self._snapshot, self._roles = before if stands else (None, None, None, {})
            raise
        return self.facts

    def _update_root(self, now: datetime) -> Root:
        """TUF specification, 5.3."""
        pinned = metadata.parse(Root, self._pinned, "the pinned root")
        metadata.verify_metadata(pinned.signed, "root", pinned)
        root, data = pinned.signed, self._pinned
        try:
            for _ in range(bounds.ROOT_ROTATIONS_MAX):
                following = self._next_root(root)
                if following is None:
                    break
                root, data = following
                self._cache.store(f"root_history/{root.version}.root.json", data)
        finally:
            self._cache.store("root.json", data)
        # 5.3.11 comes before the expiry, so that a rotation is noticed in any case.
        if root.version < self.facts.root:
            raise Rejected(RejectCode.ROLLBACK, f"root has version {root.version}, {self.facts.root} was seen before")
        online = metadata.key_set(root, ("timestamp", "snapshot"))
        self.facts = self.facts.with_root(root.version, online)
        self._root_file = data
        metadata.check_expiry(root, now, "root")  # 5.3.10
        if self._production and profile(root).get("size") == "dev":
            raise Rejected(
                RejectCode.DEVELOPMENT, "this repository was made for development, and the board is in production"
            )
        return root

    def _next_root(self, root: Root) -> tuple[Root, bytes] | None:
        version = root.version + 1
        cached = self._cache.load(f"root_history/{version}.root.json")
        if cached is not None:
            try:
                return verify_root(root, cached), cached
            except Rejected:
                pass  # torn or planted: the repository has a good one
        try:
            data = self._get(f"{version}.root.json", bounds.ROOT_MAX_BYTES)  # 5.3.3
        except FetchNotFound:
            return None
        return verify_root(root, data), data

    def _update_timestamp(self, root: Root, now: datetime) -> Timestamp:
        """TUF specification, 5.4."""
        cached = self._cached_timestamp(root)
        data = self._get_or_reject("timestamp.json", bounds.TIMESTAMP_MAX_BYTES)  # 5.4.1
        new = metadata.parse(Timestamp, data, "timestamp")
        metadata.verify_metadata(root, "timestamp", new)  # 5.4.2
        known = self.facts.role("timestamp", self.facts.online)
        if known is not None:  # 5.4.3
            if new.signed.version < known.version:
                raise rollback_rejection("timestamp", new.signed.version, known.version)
            if new.signed.version == known.version and metadata.sha256(data) != known.sha256:
                # 5.4.3.1: the one that was trusted first stays. Where it is lost, neither is believed.
                if cached is None or metadata.sha256(cached[1]) != known.sha256:
                    raise _equivocation("timestamp", known.version)
                new, data = cached
        promised = new.signed.snapshot_meta.version
        if promised < self.facts.meta.get("snapshot.json", 0):  # 5.4.3.2
            raise rollback_rejection("snapshot", promised, self.facts.meta["snapshot.json"])
        if not self._late:
            metadata.check_expiry(new.signed, now, "timestamp")  # 5.4.4
        self._remember("timestamp", new.signed.version, data, self.facts.online)
        self.facts = self.facts.with_meta({"snapshot.json": promised})
        self._cache.store("timestamp.json", data)
        return new.signed

    def _cached_timestamp(self, root: Root) -> tuple[Metadata[Timestamp], bytes] | None:
        """The cached timestamp if it verifies. It counts as seen, should the facts have been lost."""
        data = self._cache.load("timestamp.json")
        if data is None:
            return None
        try:
            cached = metadata.parse(Timestamp, data, "timestamp")
            metadata.verify_metadata(root, "timestamp", cached)
        except Rejected:
            return None
        known = self.facts.role("timestamp", self.facts.online)
        if known is None or known.version < cached.signed.version:
            self._remember("timestamp", cached.signed.version, data, self.facts.online)
            promised = max(cached.signed.snapshot_meta.version, self.facts.meta.get("snapshot.json", 0))
            self.facts = self.facts.with_meta({"snapshot.json": promised})
        return cached, data

    def _update_snapshot(self, root: Root, timestamp: Timestamp, now: datetime) -> Snapshot:
        """TUF specification, 5.5."""
        promise = timestamp.snapshot_meta
        self._learn_cached_snapshot(root)
        data = self._cached_or_fetched("snapshot", promise, root, bounds.SNAPSHOT_MAX_BYTES)
        metadata.check_file(promise, data, "snapshot")  # 5.5.2
        new = metadata.parse(Snapshot, data, "snapshot")
        metadata.verify_metadata(root, "snapshot", new)  # 5.5.3
        if new.signed.version != promise.version:  # 5.5.4
            raise rollback_rejection("snapshot", new.signed.version, promise.version)
        self._check_memory("snapshot", new.signed.version, data, self.facts.online)
        for name, version in self.facts.meta.items():  # 5.5.5
            if name == "snapshot.json":
                continue
            listed = new.signed.meta.get(name)
            if listed is None or listed.version < version:
                raise rollback_rejection(name, 0 if listed is None else listed.version, version)
        if not self._late:
            metadata.check_expiry(new.signed, now, "snapshot")  # 5.5.6
        self._remember("snapshot", new.signed.version, data, self.facts.online)
        self.facts = self.facts.with_meta({name: each.version for name, each in new.signed.meta.items()})
        self._cache.store("snapshot.json", data)
        return new.signed

    def _learn_cached_snapshot(self, root: Root) -> None:
        """What a cached snapshot promised still counts, should the facts have been lost."""
        data = self._cache.load("snapshot.json")
        if data is None or self.facts.role("snapshot", self.facts.online) is not None:
            return
        try:
            cached = metadata.parse(Snapshot, data, "snapshot")
            metadata.verify_metadata(root, "snapshot", cached)
        except Rejected:
            return
        listed = {name: each.version for name, each in cached.signed.meta.items()}
        self.facts = self.facts.with_meta({n: max(v, self.facts.meta.get(n, 0)) for n, v in listed.items()})

    def load(self, role: str, delegator: Root | Targets, *, parent: str = "root", late: bool = False) -> Targets:
        """A targets role, verified against its delegator (TUF specification, 5.6).

        Args:
            role: its name.
            delegator: who says which keys sign it.
            parent: the delegator's name.
            late: take it past its expiry too (to look for revocations, never to allow something).
        """
        assert self._snapshot is not None
        assert self._now is not None
        known = self._roles.get((parent, role))
        if known is not None:
            if not late:
                metadata.check_expiry(known[0], self._now, role)
            return known[0]
        promise = self._snapshot.meta.get(f"{role}.json")
        if promise is None:
            raise Rejected(RejectCode.MALFORMED, f"snapshot does not list the role {role}")
        keys = self.facts.online + metadata.key_set(delegator, (role,))
        data = self._cached_or_fetched(role, promise, delegator, bounds.TARGETS_MAX_BYTES)  # 5.6.1
        metadata.check_file(promise, data, role)  # 5.6.2
        new = self._verified(role, delegator, data, keys)  # 5.6.3
        if new.version != promise.version:  # 5.6.4
            raise rollback_rejection(role, new.version, promise.version)
        self._check_memory(role, new.version, data, keys)
        if not late:
            metadata.check_expiry(new, self._now, role)  # 5.6.5
        self._remember(role, new.version, data, keys)
        self._cache.store(f"{_file_name(role)}.json", data)
        self._roles[parent, role] = new, data
        return new

    def _verified(self, role: str, delegator: Root | Targets, data: bytes, keys: str) -> Targets:
        """The role in `data`, verified; the same bytes under the same keys are not verified a second time."""
        known = self._parsed.get(role)
        if known is not None and known[0] == (keys, data):
            return known[1]
        new = metadata.parse(Targets, data, role)
        metadata.verify_metadata(delegator, role, new)
        metadata.check_lives(delegator, role, new)
        self._parsed[role] = (keys, data), new.signed
        return new.signed

    def _cached_or_fetched(self, role: str, promise: MetaFile, delegator: Root | Targets, cap: int) -> bytes:
        """The cached file when it is the promised one, else the repository's; the caller verifies it either way."""
        cached = self._cache.load(f"{_file_name(role)}.json")
        if cached is not None:
            try:
                metadata.check_file(promise, cached, role)
                if promise.hashes:
                    return cached
                # Only its version was promised: it must verify to be taken for it.
                kind = Snapshot if role == "snapshot" else Targets
                parsed: Metadata[Any] = metadata.parse(kind, cached, role)
                metadata.verify_metadata(delegator, role, parsed)
            except Rejected:
                pass
            else:
                if parsed.signed.version == promise.version:
                    return cached
        limit = promise.length if promise.length is not None else cap
        if limit > cap:
            raise Rejected(RejectCode.TOO_LARGE, f"{role} is announced with {limit} bytes, at most {cap} are accepted")
        assert self._root is not None or isinstance(delegator, Root)
        root = delegator if isinstance(delegator, Root) else self._root
        assert root is not None
        prefix = f"{promise.version}." if root.consistent_snapshot else ""
        return self._get_or_reject(f"{prefix}{_file_name(role)}.json", limit)

    def _get(self, name: str, max_bytes: int) -> bytes:
        data = self._fetch(name, max_bytes)
        if len(data) > max_bytes:
            raise Rejected(RejectCode.TOO_LARGE, f"{name} has more than {max_bytes} bytes")
        return data

    def _get_or_reject(self, name: str, max_bytes: int) -> bytes:
        try:
            return self._get(name, max_bytes)
        except FetchNotFound as error:
            raise Rejected(RejectCode.NOT_FOUND, f"the repository has no {name}") from error

    def _check_memory(self, role: str, version: int, data: bytes, keys: str) -> None:
        known = self.facts.role(role, keys)
        if known is not None and version < known.version:
            raise rollback_rejection(role, version, known.version)
        if known is not None and version == known.version and known.sha256 != metadata.sha256(data):
            raise _equivocation(role, version)

    def _remember(self, role: str, version: int, data: bytes, keys: str) -> None:
        self.facts = self.facts.with_role(role, Remembered(version, metadata.sha256(data), keys))

    # -- asking what exists ---------------------------------------------------------------------------------------

    def target(self, path: str) -> TargetFile | None:
        """The signed length and hashes of any target path, None where nobody has published it."""
        found = self.search(path)
        return None if found is None or found.revoked else found.target

    def role(self, namespace: str) -> bytes:
        """The verified file of a namespace's role, to publish its next version from.

        Raises:
            Rejected: as `refresh` for that role.
        """
        _, targets = self.loaded()
        self.load(namespace, targets, parent="targets", late=True)
        return self._roles["targets", namespace][1]

    def files(self, *, bins: bool = True) -> dict[str, bytes]:
        """Root, targets and every namespace that has a role, as verified: name -> file, for `signing.events`.

        With `bins` their hash bins too, which may be many files. Expired ones as well: they are to be looked at and
        renewed, not run.

        Raises:
            Rejected: as `refresh` for those roles.
        """
        root, targets = self.loaded()
        assert self._snapshot is not None
        found = {
            f"{root.version}.root.json": self._root_file,
            f"{targets.version}.targets.json": self._roles["root", "targets"][1],
        }
        delegated = targets.delegations.roles if targets.delegations is not None else None
        for name in delegated or ():
            if f"{name}.json" in self._snapshot.meta:
                role = self.load(name, targets, parent="targets", late=True)
                found[f"{role.version}.{name}.json"] = self._roles["targets", name][1]
                for each in _bins(role) if bins else ():
                    found |= dict([self._bin(name, role, each)])
        return found

    def holder(self, namespace: str, path: str) -> tuple[str, bytes]:
        """The file name and bytes of the role of a namespace that holds, or will hold, a target path.

        Raises:
            Rejected: as `refresh` for that role.
        """
        _, targets = self.loaded()
        head = self.load(namespace, targets, parent="targets", late=True)
        for name, _ in head.delegations.get_roles_for_target(path) if head.delegations is not None else ():
            return self._bin(namespace, head, name)
        return f"{head.version}.{namespace}.json", self._roles["targets", namespace][1]

    def _bin(self, namespace: str, head: Targets, name: str) -> tuple[str, bytes]:
        role = self.load(name, head, parent=namespace, late=True)
        return f"{role.version}.{name}.json", self._roles[namespace, name][1]

    def expiries(self) -> dict[str, datetime]:
        """When root, targets, snapshot and timestamp expire, after a refresh."""
        root, targets = self.loaded()
        assert self._snapshot is not None
        assert self._timestamp is not None
        signed = {"root": root, "targets": targets, "snapshot": self._snapshot, "timestamp": self._timestamp}
        return {role: each.expires for role, each in signed.items()}

    def search(self, path: str) -> Found | None:
        """Pre-order, depth-first through the delegations (TUF specification, 5.6.7)."""
        root, _ = self.loaded()
        todo: list[tuple[str, str, Root | Targets, tuple[Grants, ...]]] = [("targets", "root", root, ())]
        visited: set[tuple[str, str]] = set()
        while todo and len(visited) <= DELEGATIONS_MAX:
            name, parent, delegator, ceilings = todo.pop()
            if (parent, name) in visited:
                continue
            role = self.load(name, delegator, parent=parent)
            visited.add((parent, name))
            target = role.targets.get(path)
            revoked = is_revoked(role, path)
            if target is not None or revoked:
                return Found(target, ceilings, revoked)
            if role.delegations is None:
                continue
            following = []
            for child, terminating in role.delegations.get_roles_for_target(path):
                following.append((child, name, role, (*ceilings, *ceiling(role, child))))
                if terminating:
                    todo.clear()
                    break
            todo.extend(reversed(following))
        return None

    def loaded(self) -> tuple[Root, Targets]:
        """The verified root and top-level targets; raises `Rejected` (UNREACHABLE) before the first refresh."""
        found = self._roles.get(("root", "targets"))
        if self._root is None or found is None:
            raise Rejected(RejectCode.UNREACHABLE, "the repository has not been refreshed yet")
        return self._root, found[0]


def _bins(role: Targets) -> Iterable[str]:
    succinct = None if role.delegations is None else role.delegations.succinct_roles
    return () if succinct is None else succinct.get_roles()


def _file_name(role: str) -> str:
    return quote(role, safe="")


def _equivocation(what: str, version: int) -> Rejected:
    return Rejected(RejectCode.EQUIVOCATION, f"{what} version {version} was seen with other bytes before")

"""TUF client workflow (TUF specification, section 5): bytes in, trusted roles out, no I/O.

`TrustedMetadata` says which file it needs next, takes that file, and either trusts it or raises `Rejected`. Fetching,
caching and storing belong to `signing.updater`, the only loop around this object:

    trusted = TrustedMetadata(pinned_root=pinned, state=state, now=state.time(wall_clock))
    while (request := trusted.next()) is not None:
        trusted.accept(request, fetch(request.name, request.max_bytes))
    found = trusted.find("components/main/hello/1.0.0.wasm")

Every file is treated as hostile, whether fetched or cached. Rollbacks are detected through `VerifierState`;
`TrustedMetadata.state` is current after each call, even if the call raised.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import quote

from securesystemslib.signer import Key
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from fleet.protocol import bounds
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import Grants
from signing import metadata
from signing.errors import Rejected
from signing.metadata import ceiling, is_revoked, profile, rollback_rejection, verify_root
from signing.state import Remembered, VerifierState

S = TypeVar("S", Timestamp, Snapshot, Targets)

DELEGATIONS_MAX: Final = 32
"""Roles visited in search of one target (TUF specification, 5.6.7.1)."""

ROOT_HISTORY: Final = "root_history/"
"""Folder of the cache with every root after the pinned one, under the names by which the repository serves them."""


@dataclass(frozen=True, slots=True)
class FileRequest:
    """Repository file that `TrustedMetadata` needs.

    Attributes:
        name: in the repository: `7.root.json`, `timestamp.json`, `12.main.json`.
        max_bytes: length above which the file is refused.
        cache_name: name in the cache, without a version: `timestamp.json`, `main.json`.
        may_be_missing: a missing file is not a failure (the chain of roots ends there).
    """

    name: str
    max_bytes: int
    cache_name: str
    may_be_missing: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """Target with the signed limits of the delegations that lead to it.

    Attributes:
        target: None if only the target's revocation is left.
        ceilings: of the delegations that lead to the target.
        revoked: whether a role on the way revokes the target.
    """

    target: TargetFile | None
    ceilings: tuple[Grants, ...]
    revoked: bool


class RoleFile(NamedTuple):
    """File of a verified role: its versioned name (`12.main.json`) and its bytes."""

    name: str
    data: bytes


class _Role(NamedTuple):
    """Trusted targets role with the bytes that it was read from."""

    signed: Targets
    data: bytes


class _Wanted(NamedTuple):
    """Requested targets role, with the delegation and the promise to verify it against."""

    role: str
    parent: str
    delegator: Root | Targets
    promise: MetaFile
    expired_too: bool


class _Verified(NamedTuple):
    """File whose signatures were verified, and the keys they were verified against."""

    data: bytes
    signers: tuple[int, Mapping[str, Key]]
    metadata: Metadata[Any]


class TrustedMetadata:
    """Trusted roles of a repository, built file by file, at a single reference time.

    Args:
        pinned_root: the root pinned at enrolment, as served.
        state: as stored by the caller.
        now: the reference time of all checks: `state.time(wall_clock)`.
        production: refuse repositories made for development.
        allow_expired_online: accept an expired timestamp and snapshot; every other check stays.
        reuse: an earlier object; signatures of the same bytes under the same keys are not verified again.

    Raises:
        Rejected: the pinned root is malformed or does not verify.

    Attributes:
        state: to be stored by the caller; current after each call, even if the call raised.
        root_file: bytes of the newest verified root.
    """

    def __init__(
        self,
        *,
        pinned_root: bytes,
        state: VerifierState,
        now: datetime,
        production: bool = False,
        allow_expired_online: bool = False,
        reuse: "TrustedMetadata | None" = None,
    ) -> None:
        self.state = state
        self._now = now
        self._production = production
        self._allow_expired_online = allow_expired_online
        self._verified: dict[str, _Verified] = {} if reuse is None else dict(reuse._verified)  # noqa: SLF001 - of its own class
        self._cached_timestamp: tuple[Metadata[Timestamp], bytes] | None = None
        self._rotations = 0
        self._root_is_final = False
        self._timestamp: Timestamp | None = None
        self._snapshot: Snapshot | None = None
        self._roles: dict[tuple[str, str], _Role] = {}  # (delegator, role)
        self._wanted: dict[FileRequest, _Wanted] = {}
        # 5.2: the update begins with the root that the device was given at enrolment.
        pinned = metadata.parse(Root, pinned_root, "the pinned root")
        metadata.verify_metadata(pinned.signed, "root", pinned)
        self._root, self.root_file = pinned.signed, pinned_root

    # -- the update, file by file -----------------------------------------------------------------------------------

    def next(self) -> FileRequest | None:
        """Return the next file needed; None once root, timestamp, snapshot and targets are trusted.

        Raises:
            Rejected: TOO_LARGE: a promised length is beyond the limit; MALFORMED: a file is not promised at all.
        """
        if not self._root_is_final:  # 5.3.3
            name = f"{self._root.version + 1}.root.json"
            return FileRequest(name, bounds.ROOT_MAX_BYTES, f"{ROOT_HISTORY}{name}", may_be_missing=True)
        if self._timestamp is None:  # 5.4.1
            return FileRequest("timestamp.json", bounds.TIMESTAMP_MAX_BYTES, "timestamp.json")
        if self._snapshot is None:  # 5.5.1
            return self._request("snapshot", self._timestamp.snapshot_meta, bounds.SNAPSHOT_MAX_BYTES)
        top = self._role("targets", "root", self._root)  # 5.6.1
        return top if isinstance(top, FileRequest) else None

    def learn(self, request: FileRequest, cached: bytes) -> bool:
        """Try a cached file: accept it if it verifies as the requested one.

        The versions in a cached timestamp or snapshot are remembered too, in case the state was lost.

        Args:
            request: from `next` or a query.
            cached: content of `request.cache_name`; damaged and planted files are ignored.

        Returns:
            True if the file was accepted and need not be fetched.

        Raises:
            Rejected: the file is the requested one, and `accept` refuses it.
        """
        wanted = self._wanted.get(request)
        if wanted is not None:
            promised = self._is_promised(Targets, wanted.role, wanted.delegator, wanted.promise, cached)
        elif not self._root_is_final:
            return self._learn_root(cached)
        elif self._timestamp is None:
            self._learn_timestamp(cached)
            return False
        else:
            self._learn_snapshot(cached)
            promised = self._is_promised(Snapshot, "snapshot", self._root, self._timestamp.snapshot_meta, cached)
        if promised:
            self.accept(request, cached)
        return promised

    def accept(self, request: FileRequest, data: bytes | None) -> bytes | None:
        """Verify a file and trust it.

        Args:
            request: from `next` or a query.
            data: the file; None if the repository has no file of that name.

        Returns:
            The bytes to cache under `request.cache_name`; None for none. They differ from `data` for a timestamp whose
            version is already trusted: the file that was seen first stays.

        Raises:
            Rejected: the file is not trusted.
            ValueError: the file was not requested.
        """
        if request not in self._wanted and request != self.next():
            raise ValueError(f"{request.name} was not requested")
        wanted = self._wanted.get(request)
        if data is not None and len(data) > request.max_bytes:
            raise Rejected(RejectCode.TOO_LARGE, f"{request.name} has more than {request.max_bytes} bytes")
        if data is None and not request.may_be_missing:
            raise Rejected(RejectCode.NOT_FOUND, f"the repository has no {request.name}")
        if data is None:
            self._finish_roots()
            return None
        if wanted is not None:
            self._accept_targets(wanted, data)
            del self._wanted[request]
        elif not self._root_is_final:
            self._accept_root(verify_root(self._root, data), data)
        elif self._timestamp is None:
            return self._accept_timestamp(data)
        else:
            self._accept_snapshot(self._timestamp.snapshot_meta, data)
        return data

    # -- root (TUF specification, 5.3) ------------------------------------------------------------------------------

    def _learn_root(self, cached: bytes) -> bool:
        try:
            root = verify_root(self._root, cached)
        except Rejected:
            return False  # torn or planted: fetch it from the repository instead
        self._accept_root(root, cached)
        return True

    def _accept_root(self, root: Root, data: bytes) -> None:
        self._root, self.root_file = root, data  # 5.3.4 to 5.3.8
        self._rotations += 1
        if self._rotations >= bounds.ROOT_ROTATIONS_MAX:
            self._finish_roots()

    def _finish_roots(self) -> None:
        """End the chain of roots: the newest must not be older than a root seen before, and must not have expired."""
        root = self._root
        # 5.3.11 precedes the check of the expiry, so that a rotation takes effect even under an expired root.
        if root.version < self.state.root:
            raise Rejected(
                RejectCode.ROLLBACK, f"root has version {root.version}, but version {self.state.root} was seen before"
            )
        self.state = self.state.with_root(root.version, metadata.key_set(root, ("timestamp", "snapshot")))
        metadata.check_expiry(root, self._now, "root")  # 5.3.10
        if self._production and profile(root).get("size") == "dev":
            raise Rejected(
                RejectCode.DEVELOPMENT, "this repository was made for development, and the device is in production"
            )
        self._root_is_final = True

    # -- timestamp (TUF specification, 5.4) -------------------------------------------------------------------------

    def _learn_timestamp(self, cached: bytes) -> None:
        try:
            seen = self._verify(Timestamp, "timestamp", self._root, cached)
        except Rejected:
            return
        self._cached_timestamp = seen, cached
        known = self.state.role("timestamp", self.state.online)
        if known is None or known.version < seen.signed.version:
            self._remember("timestamp", seen.signed.version, cached, self.state.online)
            promised = max(seen.signed.snapshot_meta.version, self.state.meta.get("snapshot.json", 0))
            self.state = self.state.with_meta({"snapshot.json": promised})

    def _accept_timestamp(self, data: bytes) -> bytes:
        new = self._verify(Timestamp, "timestamp", self._root, data)  # 5.4.2
        known = self.state.role("timestamp", self.state.online)
        if known is not None:  # 5.4.3
            if new.signed.version < known.version:
                raise rollback_rejection("timestamp", new.signed.version, known.version)
            if new.signed.version == known.version and metadata.sha256(data) != known.sha256:
                # 5.4.3.1: the file that was trusted first stays. If it is lost, neither is trusted.
                cached = self._cached_timestamp
                if cached is None or metadata.sha256(cached[1]) != known.sha256:
                    raise _equivocation("timestamp", known.version)
                new, data = cached
        promised = new.signed.snapshot_meta.version
        if promised < self.state.meta.get("snapshot.json", 0):  # 5.4.3.2
            raise rollback_rejection("snapshot", promised, self.state.meta["snapshot.json"])
        if not self._allow_expired_online:
            metadata.check_expiry(new.signed, self._now, "timestamp")  # 5.4.4
        self._remember("timestamp", new.signed.version, data, self.state.online)
        self.state = self.state.with_meta({"snapshot.json": promised})
        self._timestamp = new.signed
        return data

    # -- snapshot (TUF specification, 5.5) --------------------------------------------------------------------------

    def _learn_snapshot(self, cached: bytes) -> None:
        if self.state.role("snapshot", self.state.online) is not None:
            return
        try:
            seen = self._verify(Snapshot, "snapshot", self._root, cached).signed
        except Rejected:
            return
        listed = _listed(seen)
        self.state = self.state.with_meta({name: max(v, self.state.meta.get(name, 0)) for name, v in listed.items()})

    def _accept_snapshot(self, promise: MetaFile, data: bytes) -> None:
        metadata.check_file(promise, data, "snapshot")  # 5.5.2
        new = self._verify(Snapshot, "snapshot", self._root, data).signed  # 5.5.3
        if new.version != promise.version:  # 5.5.4
            raise rollback_rejection("snapshot", new.version, promise.version)
        self._check_seen("snapshot", new.version, data, self.state.online)
        for name, version in self.state.meta.items():  # 5.5.5
            if name == "snapshot.json":
                continue
            listed = new.meta.get(name)
            if listed is None or listed.version < version:
                raise rollback_rejection(name, 0 if listed is None else listed.version, version)
        if not self._allow_expired_online:
            metadata.check_expiry(new, self._now, "snapshot")  # 5.5.6
        self._remember("snapshot", new.version, data, self.state.online)
        self.state = self.state.with_meta(_listed(new))
        self._snapshot = new

    # -- targets and delegated roles (TUF specification, 5.6) -------------------------------------------------------

    def _role(
        self, role: str, parent: str, delegator: Root | Targets, *, expired_too: bool = False
    ) -> Targets | FileRequest:
        """Return a trusted targets role, or the request for its file.

        Args:
            role: the role's name.
            parent: the delegator's name.
            delegator: names the keys of the role.
            expired_too: accept an expired role (to look for revocations or to renew it, never to allow a target).
        """
        known = self._roles.get((parent, role))
        if known is not None:
            if not expired_too:
                metadata.check_expiry(known.signed, self._now, role)
            return known.signed
        assert self._snapshot is not None
        promise = self._snapshot.meta.get(f"{role}.json")
        if promise is None:
            raise Rejected(RejectCode.MALFORMED, f"snapshot does not list the role {role}")
        request = self._request(role, promise, bounds.TARGETS_MAX_BYTES)  # 5.6.1
        self._wanted = {request: _Wanted(role, parent, delegator, promise, expired_too)}
        return request

    def _accept_targets(self, wanted: _Wanted, data: bytes) -> None:
        role, delegator = wanted.role, wanted.delegator
        metadata.check_file(wanted.promise, data, role)  # 5.6.2
        new = self._verify(Targets, role, delegator, data)  # 5.6.3
        metadata.check_lives(delegator, role, new)
        signed = new.signed
        if signed.version != wanted.promise.version:  # 5.6.4
            raise rollback_rejection(role, signed.version, wanted.promise.version)
        keys = self.state.online + metadata.key_set(delegator, (role,))
        self._check_seen(role, signed.version, data, keys)
        if not wanted.expired_too:
            metadata.check_expiry(signed, self._now, role)  # 5.6.5
        self._remember(role, signed.version, data, keys)
        self._roles[wanted.parent, role] = _Role(signed, data)

    # -- steps that roles share -------------------------------------------------------------------------------------

    def _request(self, role: str, promise: MetaFile, cap: int) -> FileRequest:
        limit = cap if promise.length is None else promise.length
        if limit > cap:
            raise Rejected(RejectCode.TOO_LARGE, f"{role} is promised with {limit} bytes, at most {cap} are accepted")
        file = f"{quote(role, safe='')}.json"
        return FileRequest(f"{promise.version}.{file}" if self._root.consistent_snapshot else file, limit, file)

    def _verify(self, kind: type[S], role: str, delegator: Root | Targets, data: bytes) -> Metadata[S]:
        """Parse a file and verify its signatures, unless the same bytes were verified against the same keys before."""
        signers = _signers(delegator, role)
        known = self._verified.get(role)
        if known is not None and known.data == data and known.signers == signers:
            return known.metadata
        new = metadata.parse(kind, data, role)
        metadata.verify_metadata(delegator, role, new)
        self._verified[role] = _Verified(data, signers, new)
        return new

    def _is_promised(
        self, kind: type[S], role: str, delegator: Root | Targets, promise: MetaFile, cached: bytes
    ) -> bool:
        try:
            metadata.check_file(promise, cached, role)
            if promise.hashes:
                return True
            # Only a version was promised, without a hash: only the signatures tell whether it is that file.
            return self._verify(kind, role, delegator, cached).signed.version == promise.version
        except Rejected:
            return False

    def _check_seen(self, role: str, version: int, data: bytes, keys: str) -> None:
        known = self.state.role(role, keys)
        if known is not None and version < known.version:
            raise rollback_rejection(role, version, known.version)
        if known is not None and version == known.version and known.sha256 != metadata.sha256(data):
            raise _equivocation(role, version)

    def _remember(self, role: str, version: int, data: bytes, keys: str) -> None:
        self.state = self.state.with_role(role, Remembered(version, metadata.sha256(data), keys))

    # -- trusted roles ----------------------------------------------------------------------------------------------

    @property
    def root(self) -> Root:
        """The verified root; raises `Rejected` (UNREACHABLE) before the update is complete."""
        self.targets  # noqa: B018 - raises
        return self._root

    @property
    def timestamp(self) -> Timestamp:
        """The verified timestamp; raises like `root`."""
        if self._timestamp is None:
            raise _incomplete()
        return self._timestamp

    @property
    def snapshot(self) -> Snapshot:
        """The verified snapshot; raises like `root`."""
        if self._snapshot is None:
            raise _incomplete()
        return self._snapshot

    @property
    def targets(self) -> Targets:
        """The verified top-level targets; raises like `root`."""
        found = self._roles.get(("root", "targets"))
        if found is None:
            raise _incomplete()
        return found.signed

    def expiries(self) -> dict[str, datetime]:
        """Return when root, targets, snapshot and timestamp expire."""
        signed = {"root": self.root, "targets": self.targets, "snapshot": self.snapshot, "timestamp": self.timestamp}
        return {role: each.expires for role, each in signed.items()}

    # -- queries: each returns its result, or the request for a file that it needs first ------------------------------

    def find(self, path: str) -> Found | FileRequest | None:
        """Search a target, pre-order and depth-first through the delegations (TUF specification, 5.6.7).

        Returns:
            The target; None if it is not published. A `FileRequest` if a role's file is needed first.

        Raises:
            Rejected: EXPIRED, MALFORMED or TOO_LARGE: a role on the way.
        """
        todo: list[tuple[str, str, Root | Targets, tuple[Grants, ...]]] = [("targets", "root", self.root, ())]
        visited: set[tuple[str, str]] = set()
        while todo and len(visited) <= DELEGATIONS_MAX:  # 5.6.7.1
            name, parent, delegator, ceilings = todo.pop()
            if (parent, name) in visited:
                continue
            role = self._role(name, parent, delegator)
            if isinstance(role, FileRequest):
                return role
            visited.add((parent, name))
            target, revoked = role.targets.get(path), is_revoked(role, path)
            if target is not None or revoked:
                return Found(target, ceilings, revoked)
            if role.delegations is None:
                continue
            following = []
            for child, terminating in role.delegations.get_roles_for_target(path):  # 5.6.7.2
                following.append((child, name, role, (*ceilings, *ceiling(role, child))))
                if terminating:
                    todo.clear()
                    break
            todo.extend(reversed(following))
        return None

    def namespaces_of(self, path: str) -> tuple[str, ...]:
        """Return the names of the roles to which the top-level targets delegate a path."""
        delegations = self.targets.delegations
        return () if delegations is None else tuple(name for name, _ in delegations.get_roles_for_target(path))

    def role(self, namespace: str) -> RoleFile | FileRequest:
        """Return the file of a namespace's role, even if expired: to renew it or read revocations, never to allow one.

        Raises:
            Rejected: MALFORMED or TOO_LARGE: that role.
        """
        head = self._role(namespace, "targets", self.targets, expired_too=True)
        return head if isinstance(head, FileRequest) else self._file("targets", namespace)

    def is_revoked(self, path: str) -> bool:
        """Return whether one of the namespace roles fetched so far revokes a path (see `role`)."""
        heads = (self._roles.get(("targets", name)) for name in self.namespaces_of(path))
        return any(is_revoked(head.signed, path) for head in heads if head is not None)

    def files(self, *, bins: bool = True) -> dict[str, bytes] | FileRequest:
        """Return the files of root, targets and every namespace that has a role, even if expired: name -> bytes.

        Args:
            bins: include the hash bins of the namespaces, which may be many files.

        Raises:
            Rejected: MALFORMED or TOO_LARGE: one of those roles.
        """
        top = self.targets
        files = [RoleFile(f"{self._root.version}.root.json", self.root_file), self._file("root", "targets")]
        delegated = None if top.delegations is None else top.delegations.roles
        for name in delegated or ():
            if f"{name}.json" not in self.snapshot.meta:
                continue
            head = self._role(name, "targets", top, expired_too=True)
            if isinstance(head, FileRequest):
                return head
            files.append(self._file("targets", name))
            for each in _bins(head) if bins else ():
                role = self._role(each, name, head, expired_too=True)
                if isinstance(role, FileRequest):
                    return role
                files.append(self._file(name, each))
        return dict(files)

    def holder(self, namespace: str, path: str) -> RoleFile | FileRequest:
        """Return the role of a namespace, or its hash bin, that holds or will hold a target path.

        Raises:
            Rejected: MALFORMED or TOO_LARGE: that role.
        """
        head = self._role(namespace, "targets", self.targets, expired_too=True)
        if isinstance(head, FileRequest):
            return head
        for name, _ in () if head.delegations is None else head.delegations.get_roles_for_target(path):
            role = self._role(name, namespace, head, expired_too=True)
            return role if isinstance(role, FileRequest) else self._file(namespace, name)
        return self._file("targets", namespace)

    def _file(self, parent: str, role: str) -> RoleFile:
        found = self._roles[parent, role]
        return RoleFile(f"{found.signed.version}.{role}.json", found.data)


def _signers(delegator: Root | Targets, role: str) -> tuple[int, Mapping[str, Key]]:
    """Return the threshold and keys of a role, to compare with those of an earlier verification."""
    try:
        named = delegator.get_delegated_role(role)
    except ValueError as error:
        raise Rejected(RejectCode.UNSIGNED, f"no key is trusted to sign {role}") from error
    return named.threshold, metadata.keys_by_id(delegator, named.keyids)


def _listed(snapshot: Snapshot) -> dict[str, int]:
    """Return the versions of the roles in a snapshot, without the snapshot's own (only timestamp decides that)."""
    return {name: each.version for name, each in snapshot.meta.items() if name != "snapshot.json"}


def _bins(role: Targets) -> Iterable[str]:
    succinct = None if role.delegations is None else role.delegations.succinct_roles
    return () if succinct is None else succinct.get_roles()


def _equivocation(what: str, version: int) -> Rejected:
    return Rejected(RejectCode.EQUIVOCATION, f"{what} version {version} was seen with different content before")


def _incomplete() -> Rejected:
    return Rejected(RejectCode.UNREACHABLE, "the repository has not been refreshed yet")

"""Repository metadata: create, delegate, add and revoke targets; sign snapshot and timestamp, here or on another host.

Pure functions from metadata files to metadata files. A repository is a mapping of file names to bytes: `7.targets.json`
and so on, with `timestamp.json` as its head (consistent snapshots). A published file never changes: new files are added
in the order returned, `timestamp.json` last. People sign root and targets; each namespace is a delegation to its
publisher; snapshot and timestamp are signed online; `director`, a delegation without paths, signs assignments.

Publishing is compare-and-swap on a namespace's version: `check_role` accepts only the next version. A publisher who
loses the race fetches, verifies from root, and signs again.

A server without the online keys obtains snapshot and timestamp from a signing host, and checks them before serving
them. Such a server cannot add anything: it can only serve what the signing host has verified and signed.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar, cast

import msgspec
from securesystemslib.signer import Key, Signer
from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Signed,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from fleet.protocol import bounds, names, wire
from fleet.protocol.manifest import Evidence, Grants, Manifest
from fleet.protocol.names import TargetName
from signing import metadata, policy
from signing.errors import ConflictError, Rejected, RepositoryError
from signing.metadata import CEILING, DIRECTOR, PROFILE, REVOKED, ceiling
from signing.policy import Release

S = TypeVar("S", Root, Timestamp, Snapshot, Targets)
RESERVED: Final = frozenset({"root", "targets", "snapshot", "timestamp", DIRECTOR})
LIFE: Final[Mapping[str, timedelta]] = {
    "root": timedelta(days=730),
    "targets": timedelta(days=365),
    "namespace": timedelta(days=365),
    "snapshot": timedelta(days=14),
    "timestamp": timedelta(days=2),
}
"""Validity of each role's metadata, counted from signing."""

_FILE: Final = re.compile(r"(\d+)\.(.+)\.json")


def create(
    *,
    fleet: str,
    namespaces: Mapping[str, Signer],
    root: Signer,
    targets: Signer,
    snapshot: Signer,
    timestamp: Signer,
    director: Signer,
    now: datetime,
    dev: bool = False,
    ceilings: Mapping[str, Grants] | None = None,
    recovery: Key | None = None,
) -> dict[str, bytes]:
    """Create a repository: the first version of every role, each signed by a single key.

    Args:
        fleet: the fleet's name, a signed field of root; devices of other fleets refuse the repository.
        namespaces: name -> its publisher's key.
        root: root's key; the same key may serve for several roles.
        targets: the key of the top-level targets.
        snapshot: snapshot's key, online.
        timestamp: timestamp's key, online.
        director: the key that will sign assignments, online.
        now: UTC.
        dev: mark the repository as made for development: devices in production refuse it.
        ceilings: namespace -> the most that its components may be granted; absent for no limit.
        recovery: a second key that may sign root, kept on paper.

    Raises:
        RepositoryError: a bad or reserved namespace, or none.
    """
    if not namespaces:
        raise RepositoryError("a repository needs at least one namespace")
    limits = {} if ceilings is None else ceilings
    top = Targets(expires=until(now, "targets"), delegations=Delegations({}, {}))
    delegate(top, DIRECTOR, [director.public_key], paths=[])
    for name, signer in namespaces.items():
        delegate(top, name, [signer.public_key], ceiling=limits.get(name))
    profile = {"fleet": names.check_label(fleet, "fleet"), "size": "dev" if dev else "solo"}
    first = Root(expires=until(now, "root"), consistent_snapshot=True, unrecognized_fields={PROFILE: profile})
    for role, signer in (("root", root), ("targets", targets), ("snapshot", snapshot), ("timestamp", timestamp)):
        first.add_key(signer.public_key, role)
    if recovery is not None:
        first.add_key(recovery, "root")
    files = {"1.root.json": _signed(first, [root]), "1.targets.json": _signed(top, [targets])}
    for name, signer in namespaces.items():
        files[f"1.{name}.json"] = new_role(signer=signer, now=now)
    return files | online(files, snapshot_signer=snapshot, timestamp_signer=timestamp, now=now)


def new_role(*, signer: Signer, now: datetime, ends: datetime | None = None) -> bytes:
    """Make the first version of a namespace's role, empty, for `1.<namespace>.json`; `ends` as in `add_target`."""
    return _signed(Targets(expires=_life(now, ends)), [signer])


def delegate(
    top: Targets,
    name: str,
    keys: Sequence[Key],
    *,
    threshold: int = 1,
    paths: list[str] | None = None,
    ceiling: Grants | None = None,
    ends: Mapping[str, datetime] | None = None,
) -> None:
    """Add a terminating delegation to the top-level targets, in place; `paths` defaults to the namespace's.

    Args:
        top: the top-level targets.
        name: of the delegated role.
        keys: which may sign the role.
        threshold: number of signatures required.
        paths: patterns of target paths; None for the namespace's own.
        ceiling: the most that its components may be granted; None for no limit.
        ends: key id -> when that key ends, see `metadata.check_lives`.

    Raises:
        RepositoryError: a reserved or bad name, or one public key under several ids.
    """
    if paths is None:
        try:
            names.check_label(name, "namespace")
        except names.BadNameError as error:
            raise RepositoryError(str(error)) from error
        if name in RESERVED:
            raise RepositoryError(f"{name!r} is the name of another role and cannot be a namespace")
        paths = [f"components/{name}/*/*"]
    values = {metadata.identity(key) for key in keys}
    if len(values) != len(keys) or len(keys) < threshold:
        raise RepositoryError(f"{name} needs {threshold} different keys")
    fields: dict[str, Any] = {} if ceiling is None else {CEILING: msgspec.to_builtins(ceiling)}
    if ends:
        fields[metadata.KEY_ENDS] = {keyid: f"{end.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}" for keyid, end in ends.items()}
    assert top.delegations is not None
    assert top.delegations.roles is not None
    top.delegations.roles[name] = DelegatedRole(name, [], threshold, True, paths, unrecognized_fields=fields)
    for key in keys:
        top.add_key(key, name)


def latest(files: Mapping[str, bytes], role: str) -> tuple[int, bytes]:
    """Return the newest version of a role, and its file.

    Raises:
        RepositoryError: the repository has no such role.
    """
    versions = (int(m[1]) for name in files if (m := _FILE.fullmatch(name)) is not None and m[2] == role)
    version = max(versions, default=0)
    if version == 0:
        raise RepositoryError(f"the repository has no role {role!r}")
    return version, files[f"{version}.{role}.json"]


def newest(files: Mapping[str, bytes]) -> dict[str, int]:
    """Return the newest version of every role in one pass, without timestamp.json (no version in its name)."""
    found: dict[str, int] = {}
    for name in files:
        if (m := _FILE.fullmatch(name)) is not None:
            found[m[2]] = max(found.get(m[2], 0), int(m[1]))
    return found


def _exists(current: Mapping[str, bytes], role: str) -> bool:
    return any((m := _FILE.fullmatch(name)) is not None and m[2] == role for name in current)


def add_target(
    role: bytes,
    *,
    name: TargetName,
    length: int,
    sha256: str,
    manifest: Manifest,
    signer: Signer,
    now: datetime,
    ends: datetime | None = None,
    evidence: tuple[Evidence, ...] = (),
) -> bytes:
    """Add a target to a namespace's role and return the role's next version, signed.

    Args:
        role: the namespace's role as verified from root (`Updater.role`).
        name: of the target; the manifest must have the same name and version.
        length: of the artifact in bytes.
        sha256: of the artifact in hex.
        manifest: the normalised manifest.
        signer: the publisher's key.
        now: UTC; the role's expiry counts from here.
        ends: when the publisher's key ends; the role expires no later.
        evidence: documents to bind to the release; if empty, the evidence of an existing release is not compared.

    Returns:
        The new role, or `role` itself if the same release is already published.

    Raises:
        RepositoryError: the version exists with other bytes, manifest or evidence, was revoked, or is too large.
    """
    current = _parse(Targets, role, name.namespace)
    if len(wire.canonical(manifest)) > bounds.MANIFEST_MAX_BYTES:
        raise RepositoryError(f"the manifest of {name} has more than {bounds.MANIFEST_MAX_BYTES} bytes")
    custom: dict[str, Any] = {"manifest": manifest.plain()}
    if evidence:
        custom["evidence"] = msgspec.to_builtins(evidence)
    target = TargetFile(length, {"sha256": sha256}, name.path, {"custom": custom})
    try:
        release = policy.release_of(name.path, target)
    except Rejected as error:
        raise RepositoryError(error.message) from error
    if name.path in current.unrecognized_fields.get(REVOKED, []):
        raise RepositoryError(f"{name} was revoked: publish under another version")
    known = current.targets.get(name.path)
    if known is not None:
        before = policy.release_of(name.path, known)
        if before == (release if evidence else replace(release, evidence=before.evidence)):
            return role
        same = before.sha256 == sha256, before.manifest == manifest
        what = "other bytes" if not same[0] else "another SBOM or provenance" if same[1] else "another manifest"
        raise RepositoryError(f"{name} exists with {what}: a published version never changes, publish a new version")
    current.targets[name.path] = target
    return _next(current, signer, now, ends)


def revoke(role: bytes, *, name: TargetName, signer: Signer, now: datetime, ends: datetime | None = None) -> bytes:
    """Revoke a release: return the next version of its namespace's role, or `role` if it is already revoked there.

    Where the targets are in hash bins, the caller must have checked that the release is published.

    Raises:
        RepositoryError: the release was never published.
    """
    current = _parse(Targets, role, name.namespace)
    revoked: list[str] = current.unrecognized_fields.setdefault(REVOKED, [])
    if name.path in revoked:
        return role
    held = current.delegations is not None and current.delegations.succinct_roles is not None
    if not held and name.path not in current.targets:
        raise RepositoryError(f"{name} is not published")
    revoked.append(name.path)
    return _next(current, signer, now, ends)


def renew(role: bytes, *, signer: Signer, now: datetime, ends: datetime | None = None) -> bytes:
    """Make the next version of a namespace's role with only a new expiry; `ends` as in `add_target`."""
    return _next(_parse(Targets, role, "the role"), signer, now, ends)


def releases(role: bytes) -> tuple[Release, ...]:
    """Return the releases in a namespace's role that are not revoked, sorted by component and version."""
    signed = _parse(Targets, role, "the role")
    revoked = signed.unrecognized_fields.get(REVOKED, [])
    found = [policy.release_of(path, target) for path, target in signed.targets.items() if path not in revoked]
    return tuple(sorted(found, key=lambda each: (each.name.component, names.version_key(each.name.version))))


def namespaces(current: Mapping[str, bytes]) -> tuple[str, ...]:
    """List the namespaces that the top-level targets delegate to."""
    _, top = _verified_top(current)
    return tuple(name for name in _delegated(top) if name != DIRECTOR)


def begun(current: Mapping[str, bytes]) -> tuple[str, ...]:
    """List the namespaces that have a role: a new namespace has none until its publisher signs the first version."""
    return tuple(name for name in namespaces(current) if _exists(current, name))


def check_role(current: Mapping[str, bytes], namespace: str, data: bytes) -> int:
    """Verify an uploaded namespace role before it is published as `<version>.<namespace>.json`.

    Args:
        current: the repository's files.
        namespace: the role's name.
        data: the file as uploaded.

    Returns:
        The role's version: the next one, or the newest if the bytes are already published (nothing to do).

    Raises:
        Rejected: TOO_LARGE, MALFORMED, UNSIGNED, GRANT_DENIED.
        ConflictError: not the next version: someone else published in between.
        RepositoryError: no such namespace, or the role changes or withdraws what was published.
    """
    _, top = _verified_top(current)
    if namespace not in _delegated(top) or namespace in RESERVED:
        raise RepositoryError(f"the repository has no namespace {namespace!r}")
    new = metadata.parse(Targets, data, namespace)
    metadata.verify_metadata(top, namespace, new)
    metadata.check_lives(top, namespace, new)
    version, before = latest(current, namespace) if _exists(current, namespace) else (0, None)
    if before == data:
        return version
    if new.signed.version != version + 1:
        raise ConflictError(
            f"{namespace} is at version {version}, but version {new.signed.version} was uploaded: "
            "someone else published in between, fetch and sign again"
        )
    if before is not None:
        _check_growth(_parse(Targets, before, namespace), new.signed, namespace)
    if new.signed.delegations is not None:
        raise RepositoryError(f"{namespace} cannot delegate, except to its own hash bins (fleet sign bins)")
    limits = ceiling(top, namespace)
    for path, target in new.signed.targets.items():
        if not _delegated(top)[namespace].is_delegated_path(path):
            raise RepositoryError(f"{path} is not in the namespace {namespace}")
        release = policy.release_of(path, target)
        policy.check_ceiling(release, limits)
    return new.signed.version


def _check_growth(before: Targets, after: Targets, namespace: str) -> None:
    for path, target in before.targets.items():
        if after.targets.get(path) != target:
            raise RepositoryError(f"{path} was published and is changed or missing now: revoke it instead")
    gone = set(before.unrecognized_fields.get(REVOKED, [])) - set(after.unrecognized_fields.get(REVOKED, []))
    if gone:
        raise RepositoryError(f"{namespace} withdraws the revocation of {min(gone)}: a revocation is permanent")


def online(
    current: Mapping[str, bytes],
    *,
    snapshot_signer: Signer,
    timestamp_signer: Signer,
    now: datetime,
    above: Mapping[str, int] | None = None,
) -> dict[str, bytes]:
    """Make published files visible: sign a new timestamp, and a new snapshot where it must change.

    `above`: role -> version that was signed before but is not among the files: a newer one replaces a damaged file.

    Returns:
        File name -> bytes, to be written in this order.

    Raises:
        RepositoryError: root or targets is missing.
        Rejected: the repository's own files do not verify from their newest root.
    """
    root, _ = _verified_top(current)
    lost = {} if above is None else above
    version, old, stands = _newest_snapshot(current, root)
    meta = promised(current)
    files: dict[str, bytes] = {}
    if old is None or not stands or old.meta != meta or _is_due(old, now, "snapshot") or "snapshot" in lost:
        version = max(version, lost.get("snapshot", 0)) + 1
        files[f"{version}.snapshot.json"] = _signed(
            Snapshot(version, expires=until(now, "snapshot"), meta=meta), [snapshot_signer]
        )
    snapshot = files.get(f"{version}.snapshot.json") or current[f"{version}.snapshot.json"]
    before = current.get("timestamp.json")
    number = lost.get("timestamp", 0) if before is None else _parse(Timestamp, before, "timestamp").version
    promise = MetaFile(version, len(snapshot), {"sha256": metadata.sha256(snapshot)})
    files["timestamp.json"] = _signed(
        Timestamp(number + 1, expires=until(now, "timestamp"), snapshot_meta=promise), [timestamp_signer]
    )
    return files


def promised(current: Mapping[str, bytes]) -> dict[str, MetaFile]:
    """Return the content of the next snapshot: every role's newest version, with its hash."""
    root, top = _verified_top(current)
    _, old, _ = _newest_snapshot(current, root)
    meta = {} if old is None else dict(old.meta)
    for name, number in _shown(current, top):
        data = current[f"{number}.{name}.json"]
        meta[f"{name}.json"] = MetaFile(number, len(data), {"sha256": metadata.sha256(data)})
    return meta


def online_due(current: Mapping[str, bytes], now: datetime) -> bool:
    """Return whether to sign again (`online`): half of timestamp's life has passed, or a wrong clock dated a role."""
    data = current.get("timestamp.json")
    if data is None or _is_due(_parse(Timestamp, data, "timestamp"), now, "timestamp"):
        return True
    if "snapshot" not in newest(current):
        return True
    _, snapshot = latest(current, "snapshot")
    return _outlives(_parse(Snapshot, snapshot, "snapshot"), now, "snapshot")


def _shown(current: Mapping[str, bytes], top: Targets) -> Iterator[tuple[str, int]]:
    """Yield the roles in a snapshot (targets, namespaces that have a role, their bins) with their newest versions."""
    index = newest(current)
    yield "targets", index["targets"]
    for name in _delegated(top):
        if name not in index:
            continue
        yield name, index[name]
        data = current[f"{index[name]}.{name}.json"]
        if b'"bit_length"' in data:  # spares parsing a large role that has no bins
            delegations = _parse(Targets, data, name).delegations
            succinct = None if delegations is None else delegations.succinct_roles
            yield from ((each, index[each]) for each in (succinct.get_roles() if succinct else ()) if each in index)


def online_stands(current: Mapping[str, bytes]) -> bool:
    """Return whether snapshot and timestamp are signed by the current keys and show every role's newest version."""
    root, top = _verified_top(current)
    version, snapshot, stands = _newest_snapshot(current, root)
    head = current.get("timestamp.json")
    if head is None or snapshot is None or not stands:
        return False
    timestamp = metadata.parse(Timestamp, head, "timestamp")
    try:
        metadata.verify_metadata(root, "timestamp", timestamp)
    except Rejected:
        return False
    shown = {name: each.version for name, each in snapshot.meta.items()}
    whole = all(shown.get(f"{name}.json") == number for name, number in _shown(current, top))
    return whole and timestamp.signed.snapshot_meta.version == version


def _is_due(signed: Signed, now: datetime, role: str) -> bool:
    return signed.expires - now < LIFE[role] / 2 or _outlives(signed, now, role)


def _outlives(signed: Signed, now: datetime, role: str) -> bool:
    """Return whether metadata is valid for longer than its role allows, because it was signed with a wrong clock."""
    return signed.expires - now > LIFE[role] + SLACK


def _newest_snapshot(current: Mapping[str, bytes], root: Root) -> tuple[int, Snapshot | None, bool]:
    """Return the newest snapshot's version, the role, and whether root's current keys have signed it."""
    try:
        version, data = latest(current, "snapshot")
    except RepositoryError:
        return 0, None, False
    snapshot = metadata.parse(Snapshot, data, "snapshot")
    try:
        metadata.verify_metadata(root, "snapshot", snapshot)
    except Rejected:
        return version, snapshot.signed, False
    return version, snapshot.signed, True


def _verified_top(current: Mapping[str, bytes]) -> tuple[Root, Targets]:
    root = metadata.parse(Root, latest(current, "root")[1], "root")
    metadata.verify_metadata(root.signed, "root", root)
    top = metadata.parse(Targets, latest(current, "targets")[1], "targets")
    metadata.verify_metadata(root.signed, "targets", top)
    return root.signed, top.signed


def _delegated(top: Targets) -> dict[str, DelegatedRole]:
    found = top.delegations.roles if top.delegations is not None else None
    return {} if found is None else found


def _parse(kind: type[S], data: bytes, what: str) -> S:
    return metadata.parse(kind, data, what).signed


def _next(signed: Targets, signer: Signer, now: datetime, ends: datetime | None = None) -> bytes:
    signed.version += 1
    signed.expires = _life(now, ends)
    return _signed(signed, [signer])


def _life(now: datetime, ends: datetime | None) -> datetime:
    full = until(now, "namespace")
    return full if ends is None else min(full, ends.astimezone(UTC).replace(microsecond=0))


def _signed(signed: Signed, signers: Sequence[Signer]) -> bytes:
    file = Metadata(cast("Any", signed))
    try:
        for signer in signers:
            file.sign(signer, append=True)
    except UnsignedMetadataError as error:
        raise RepositoryError(f"the key cannot sign: {error.__cause__ or error}") from error
    return file.to_bytes()


def until(now: datetime, role: str) -> datetime:
    """Return when metadata of a role signed at `now` expires; see `LIFE`."""
    return (now + LIFE[role]).replace(microsecond=0)


SLACK: Final = timedelta(hours=1)
"""Tolerated difference between two hosts' clocks."""


def check(current: Mapping[str, bytes], *, snapshot: bytes | None, timestamp: bytes, now: datetime) -> dict[str, bytes]:
    """Verify a snapshot and timestamp from a signing host, and return the files to add, in order.

    Args:
        current: the repository's files, including those that are to become visible.
        snapshot: None if the newest one stays.
        timestamp: names that snapshot.
        now: UTC.

    Raises:
        Rejected: UNSIGNED, MALFORMED, TOO_LARGE, HASH_MISMATCH: not the snapshot that the timestamp names.
        ConflictError: not the next version.
        RepositoryError: the snapshot does not list every role's newest version, or a role has expired or is valid for
            too long.
    """
    root = metadata.parse(Root, latest(current, "root")[1], "root").signed
    if timestamp == current.get("timestamp.json") and snapshot is None and online_stands(current):
        return {}
    files = {} if snapshot is None else _snapshot(current, root, snapshot, now)
    head = metadata.parse(Timestamp, timestamp, "timestamp")
    metadata.verify_metadata(root, "timestamp", head)
    before = current.get("timestamp.json")
    known = 0 if before is None else metadata.parse(Timestamp, before, "timestamp").signed.version
    if head.signed.version <= known:
        raise ConflictError(f"the timestamp is at version {known}, but version {head.signed.version} was uploaded")
    _check_life("timestamp", head.signed.expires, now)
    version, data = latest(dict(current) | files, "snapshot")
    if head.signed.snapshot_meta.version != version:
        raise RepositoryError("the timestamp does not name the newest snapshot")
    metadata.check_file(head.signed.snapshot_meta, data, "snapshot")
    files["timestamp.json"] = timestamp
    if not online_stands(dict(current) | files):
        raise RepositoryError("the snapshot does not show every role's newest version")
    return files


def _snapshot(current: Mapping[str, bytes], root: Root, data: bytes, now: datetime) -> dict[str, bytes]:
    new = metadata.parse(Snapshot, data, "snapshot")
    metadata.verify_metadata(root, "snapshot", new)
    try:
        version = latest(current, "snapshot")[0]
    except RepositoryError:
        version = 0
    if new.signed.version != version + 1 and current.get(f"{version}.snapshot.json") != data:
        raise ConflictError(f"snapshot is at version {version}, but version {new.signed.version} was uploaded")
    _check_life("snapshot", new.signed.expires, now)
    if new.signed.meta != promised(current):
        raise RepositoryError("the snapshot lists other versions than were published")
    return {f"{new.signed.version}.snapshot.json": data}


def _check_life(role: str, expires: datetime, now: datetime) -> None:
    if expires <= now:
        raise RepositoryError(f"the {role} has expired")
    if expires > until(now, role) + SLACK:
        raise RepositoryError(f"the {role} is valid for too long: until {expires:%Y-%m-%d %H:%M}")

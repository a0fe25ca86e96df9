"""Key rotation: changes of root and the top-level targets, to other keys or to another size of fleet.

A change is a document that is proposed, signed by a threshold of people, checked and published, in this order:

    draft = propose_root(files, size=Size.TEAM, roles={"root": RoleKeys(keys, threshold=2)}, now=now)
    draft = cosign(draft, signer)        # by each person; a draft is a file that can be mailed
    missing(files, draft)                # {} when enough have signed
    files[f"{check_root(files, draft)}.root.json"] = draft

Devices follow the chain of roots (TUF specification, 5.3) without enrolling again, however long they were off. Sizes:

- dev: a single key for each role, all unencrypted; devices in production refuse it
- solo: an encrypted root key and a publisher's key on the operator's machine; the online keys on the server
- team: root needs the signatures of at least two of at least three people
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

import msgspec
from securesystemslib.signer import Key, Signer
from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import Metadata, Root, Targets

from fleet.protocol.manifest import Grants
from signing import metadata, repository
from signing.errors import ConflictError, Rejected, RepositoryError
from signing.metadata import CEILING, DIRECTOR, PROFILE, ceiling, profile, verify_root

TEAM_KEYS = 3
TEAM_THRESHOLD = 2
OFFLINE = ("root", "targets")


class Size(StrEnum):
    """Size of a fleet: over how many people and machines its trust is spread."""

    DEV = "dev"
    SOLO = "solo"
    TEAM = "team"


@dataclass(frozen=True, slots=True)
class RoleKeys:
    """Signers of a role: `threshold` of these public keys.

    Raises:
        RepositoryError: one key under several ids, or fewer keys than the threshold.
    """

    keys: tuple[Key, ...]
    threshold: int = 1

    def __post_init__(self) -> None:
        if len({metadata.identity(key) for key in self.keys}) != len(self.keys):
            raise RepositoryError("one public key is listed twice: a threshold counts people")
        if not 0 < self.threshold <= len(self.keys):
            raise RepositoryError(f"{self.threshold} signatures cannot come from {len(self.keys)} keys")


@dataclass(frozen=True, slots=True)
class Namespace:
    """Namespace: the keys of its publishers, and the most that its components may be granted (None for no limit).

    Attributes:
        ends: key id -> when that key ends; absent for keys without an end, see `signing.metadata.check_lives`.
    """

    signers: RoleKeys
    ceiling: Grants | None = None
    ends: Mapping[str, datetime] = field(default_factory=dict)


def propose_root(
    current: Mapping[str, bytes],
    *,
    now: datetime,
    size: Size | None = None,
    roles: Mapping[str, RoleKeys] | None = None,
) -> bytes:
    """Return the next root, unsigned: other keys for some of its roles, another size, and always a new expiry.

    Args:
        current: the repository's files.
        now: UTC.
        size: the fleet's new size; None to keep the current one.
        roles: new keys of root, targets, snapshot or timestamp.

    Raises:
        RepositoryError: the keys are too few for the size, or root does not delegate to a role.
    """
    root = metadata.parse(Root, repository.latest(current, "root")[1], "root").signed
    before = Size(profile(root).get("size", Size.SOLO))
    old = {role: _identities(root, role) for role in OFFLINE}
    for role, keys in (roles or {}).items():
        if role not in root.roles:
            raise RepositoryError(f"root does not delegate to {role!r}: change the top-level targets instead")
        _set_keys(root, role, keys)
    after = before if size is None else size
    if before is Size.DEV and after is not Size.DEV:
        kept = [role for role in OFFLINE if old[role] & _identities(root, role)]
        if kept:
            raise RepositoryError(
                f"the keys of {' and '.join(kept)} were not encrypted: a {after} fleet needs new ones"
            )
    root.unrecognized_fields[PROFILE] = profile(root) | {"size": str(after)}
    root.version += 1
    root.expires = repository.until(now, "root")
    _check_size(root)
    return Metadata(root).to_bytes()


def propose_targets(
    current: Mapping[str, bytes],
    *,
    now: datetime,
    director: RoleKeys | None = None,
    namespaces: Mapping[str, Namespace] | None = None,
    remove: tuple[str, ...] = (),
) -> bytes:
    """Return the next top-level targets, unsigned: other keys for the director, new, changed or fewer namespaces.

    The role of a namespace whose keys change must be signed again by the new keys (`repository.renew`) and published
    together with the targets.

    Args:
        current: the repository's files.
        now: UTC.
        director: the director's new keys; None to keep the current ones.
        namespaces: new and changed namespaces.
        remove: namespaces to remove; devices keep running their components until an assignment replaces them.

    Raises:
        RepositoryError: a bad or reserved name, or an unknown namespace to remove.
    """
    top = metadata.parse(Targets, repository.latest(current, "targets")[1], "targets").signed
    assert top.delegations is not None
    assert top.delegations.roles is not None
    for name in remove:
        if name == DIRECTOR or name not in top.delegations.roles:
            raise RepositoryError(f"there is no namespace {name!r}")
        _drop(top, name)
    if director is not None:
        _drop(top, DIRECTOR)
        repository.delegate(top, DIRECTOR, director.keys, threshold=director.threshold, paths=[])
    for name, space in (namespaces or {}).items():
        if name in top.delegations.roles:
            _drop(top, name)
        signers = space.signers
        repository.delegate(
            top, name, signers.keys, threshold=signers.threshold, ceiling=space.ceiling, ends=space.ends
        )
    top.version += 1
    top.expires = repository.until(now, "targets")
    return Metadata(top).to_bytes()


def keys_of(current: Mapping[str, bytes], role: str) -> RoleKeys:
    """Return the current keys of a role: one that root delegates to, the director, or a namespace.

    Raises:
        RepositoryError: there is no such role.
    """
    root = metadata.parse(Root, repository.latest(current, "root")[1], "root").signed
    top = metadata.parse(Targets, repository.latest(current, "targets")[1], "targets").signed
    delegator: Root | Targets = root if role in root.roles else top
    try:
        found = delegator.get_delegated_role(role)
    except ValueError as error:
        raise RepositoryError(f"there is no role or namespace {role!r}") from error
    return RoleKeys(tuple(delegator.get_key(keyid) for keyid in found.keyids), found.threshold)


def namespace_of(current: Mapping[str, bytes], name: str) -> Namespace:
    """Return a namespace's current keys, ceiling and key ends; raises `RepositoryError` if there is none."""
    if name not in repository.namespaces(current):
        raise RepositoryError(f"there is no namespace {name!r}")
    top = metadata.parse(Targets, repository.latest(current, "targets")[1], "targets").signed
    limits = ceiling(top, name)
    return Namespace(keys_of(current, name), limits[0] if limits else None, metadata.key_ends(top, name))


def cosign(draft: bytes, signer: Signer) -> bytes:
    """Add a signature to a draft and return it; signing twice with the same key changes nothing.

    Raises:
        RepositoryError: not TUF metadata, or the key cannot sign.
    """
    file = _open(draft)
    try:
        file.sign(signer, append=True)
    except UnsignedMetadataError as error:
        raise RepositoryError(f"the key cannot sign: {error.__cause__ or error}") from error
    return file.to_bytes()


def missing(current: Mapping[str, bytes], draft: bytes) -> dict[str, int]:
    """Count the signatures that a draft still needs: role -> number; empty when it can be published.

    A root needs signatures of the old root's keys (`root`) and of its own (`new root`).
    """
    file = _open(draft)
    root = metadata.parse(Root, repository.latest(current, "root")[1], "root").signed
    rows: list[tuple[str, Root | Targets, str]] = [(file.signed.type, root, file.signed.type)]
    if isinstance(file.signed, Root):
        rows.append(("new root", file.signed, "root"))
    found = {}
    for label, delegator, role in rows:
        result = delegator.get_verification_result(role, file.signed_bytes, file.signatures)
        lacking = result.threshold - len({metadata.identity(key) for key in result.signed.values()})
        if lacking > 0:
            found[label] = lacking
    return found


def check(current: Mapping[str, bytes], role: str, data: bytes) -> int:
    """Verify an uploaded offline role before it is published as `<version>.<role>.json`; return its version.

    Raises:
        Rejected, ConflictError, RepositoryError: see `check_root`, `check_targets` and `repository.check_role`.
    """
    if role == "root":
        return check_root(current, data)
    if role == "targets":
        return check_targets(current, data)
    return repository.check_role(current, role, data)


def check_root(current: Mapping[str, bytes], data: bytes) -> int:
    """Verify a root before it is published as `<version>.root.json`; return its version.

    Raises:
        Rejected: UNSIGNED, MALFORMED, TOO_LARGE.
        ConflictError: not the next version.
        RepositoryError: another fleet's root, duplicate keys, or too few keys for the size.
    """
    version, before = repository.latest(current, "root")
    if data == before:
        return version
    new = metadata.parse(Root, data, "root").signed
    _check_next("root", version, new.version)
    trusted = metadata.parse(Root, before, "root").signed
    verify_root(trusted, data)
    if profile(new).get("fleet") != profile(trusted).get("fleet"):
        raise RepositoryError("a root cannot move to another fleet: its devices would refuse it")
    if not new.consistent_snapshot:
        raise RepositoryError("root must keep consistent_snapshot set")
    _check_size(new)
    return new.version


def check_targets(current: Mapping[str, bytes], data: bytes) -> int:
    """Verify top-level targets before they are published as `<version>.targets.json`; return their version.

    Raises:
        Rejected: UNSIGNED, MALFORMED, TOO_LARGE.
        ConflictError: not the next version.
        RepositoryError: no director, targets of their own, or a delegation to another namespace's paths.
    """
    version, before = repository.latest(current, "targets")
    if data == before:
        return version
    new = metadata.parse(Targets, data, "targets")
    _check_next("targets", version, new.signed.version)
    root = metadata.parse(Root, repository.latest(current, "root")[1], "root").signed
    metadata.verify_metadata(root, "targets", new)
    delegations = new.signed.delegations
    roles = None if delegations is None else delegations.roles
    if new.signed.targets or not roles or DIRECTOR not in roles:
        raise RepositoryError("the top-level targets hold delegations only: the director's and the namespaces'")
    for name, role in roles.items():
        expected = [] if name == DIRECTOR else [f"components/{name}/*/*"]
        if role.paths != expected or not role.terminating or name in repository.RESERVED - {DIRECTOR}:
            raise RepositoryError(f"the delegation {name!r} is not limited to the paths of its own namespace")
        if CEILING in role.unrecognized_fields:
            _check_ceiling(name, role.unrecognized_fields[CEILING])
        try:
            metadata.key_ends(new.signed, name)
            metadata.check_duplicates(new.signed, name)
        except Rejected as error:
            raise RepositoryError(error.message) from error
    return new.signed.version


def _check_ceiling(name: str, value: Any) -> None:
    try:
        msgspec.convert(value, Grants)
    except msgspec.ValidationError as error:
        raise RepositoryError(f"the ceiling of {name} cannot be read: {error}") from error


def _check_next(role: str, version: int, new: int) -> None:
    if new != version + 1:
        raise ConflictError(f"{role} is at version {version}, but version {new} was uploaded: propose the change again")


def _check_size(root: Root) -> None:
    for role in root.roles:
        try:
            metadata.check_duplicates(root, role)
        except Rejected as error:
            raise RepositoryError(error.message) from error
    people = root.roles["root"]
    if profile(root).get("size") == Size.TEAM and (people.threshold < TEAM_THRESHOLD or len(people.keyids) < TEAM_KEYS):
        raise RepositoryError(f"root of a team fleet needs at least {TEAM_THRESHOLD} of at least {TEAM_KEYS} keys")


def _set_keys(root: Root, role: str, wanted: RoleKeys) -> None:
    for keyid in list(root.roles[role].keyids):
        root.revoke_key(keyid, role)
    for key in wanted.keys:
        root.add_key(key, role)
    root.roles[role].threshold = wanted.threshold


def _drop(top: Targets, name: str) -> None:
    """Remove a delegation, and every key that no other delegation uses."""
    assert top.delegations is not None
    assert top.delegations.roles is not None
    for keyid in list(top.delegations.roles[name].keyids):
        top.revoke_key(keyid, name)
    del top.delegations.roles[name]


def _identities(root: Root, role: str) -> set[bytes]:
    return {metadata.identity(root.keys[keyid]) for keyid in root.roles[role].keyids if keyid in root.keys}


def _open(draft: bytes) -> Metadata[Any]:
    for kind in (Root, Targets):
        try:
            file: Metadata[Any] = metadata.parse(kind, draft, "the draft")
        except Rejected:
            continue
        return file
    raise RepositoryError("this is neither a root nor a targets role")

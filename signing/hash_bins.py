"""Hash bins under a namespace: many small roles instead of one that every device would fetch whole (TAP 15).

With bins, a namespace's own role holds no targets. It delegates to `<namespace>.bins-00` and so on, by the sha256 of a
target's path, with the keys of the namespace, and keeps the revocations. Publishing changes a single bin, and a device
fetches only the bin of its target. A namespace's name cannot contain a dot, so none can be mistaken for a bin.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Final

from tuf.api.metadata import Delegations, Metadata, SuccinctRoles, TargetFile, Targets

from fleet.protocol.codes import RejectCode
from signing import metadata, policy, repository
from signing.errors import ConflictError, Rejected, RepositoryError
from signing.metadata import REVOKED, ceiling
from signing.policy import Release

MARK: Final = ".bins"
BITS: Final = 8


def namespace_of(role: str) -> str:
    """Return the namespace that a bin belongs to, or the role's own name."""
    return role.partition(MARK)[0]


def is_bin(role: str) -> bool:
    """Return whether a role's name is a bin's."""
    return MARK + "-" in role


def delegation(head: Targets) -> SuccinctRoles | None:
    """Return a namespace role's delegation to bins; None where the role holds its targets itself."""
    return None if head.delegations is None else head.delegations.succinct_roles


def holder(files: Mapping[str, bytes], namespace: str, path: str) -> str:
    """Return the role that holds, or will hold, a target path: the namespace's, or a bin's."""
    found = delegation(_newest(files, namespace).signed)
    return namespace if found is None else found.get_role_for_target(path)


def attach(head: Targets, top: Targets, namespace: str, bits: int) -> None:
    """Make a namespace's role delegate to bins with the namespace's current keys, in place."""
    role = top.get_delegated_role(namespace)
    keys = {keyid: top.get_key(keyid) for keyid in role.keyids}
    ends = {metadata.KEY_ENDS: role.unrecognized_fields[metadata.KEY_ENDS]} if metadata.key_ends(top, namespace) else {}
    succinct = SuccinctRoles(list(role.keyids), role.threshold, bits, namespace + MARK, ends)
    head.delegations = Delegations(keys, succinct_roles=succinct)


def releases(files: Mapping[str, bytes], namespace: str) -> tuple[Release, ...]:
    """Return what a namespace publishes and has not revoked, in its own role or in bins."""
    _, data = repository.latest(files, namespace)
    head = _newest(files, namespace).signed
    found = delegation(head)
    if found is None:
        return repository.releases(data)
    index = repository.newest(files)
    revoked = head.unrecognized_fields.get(REVOKED, [])
    there = [f"{index[name]}.{name}.json" for name in found.get_roles() if name in index]
    return tuple(each for name in there for each in repository.releases(files[name]) if each.name.path not in revoked)


def check(current: Mapping[str, bytes], role: str, data: bytes) -> int:
    """Verify a document of a namespace with bins: signatures, and version plus one. `check_whole` does the rest.

    Raises:
        Rejected: TOO_LARGE, MALFORMED, UNSIGNED.
        ConflictError: not the next version.
        RepositoryError: a delegation to keys other than the namespace's own, or a withdrawn revocation.
    """
    new = metadata.parse(Targets, data, role)
    namespace = namespace_of(role)
    top = _newest(current, "targets").signed
    delegator = _newest(current, namespace).signed if is_bin(role) else top
    metadata.verify_metadata(delegator, role, new)
    metadata.check_lives(delegator, role, new)
    version = repository.newest(current).get(role, 0)
    if new.signed.version != version + 1:
        raise ConflictError(
            f"{role} is at version {version}, and this is version {new.signed.version}: propose it again"
        )
    if is_bin(role):
        if new.signed.delegations is not None:
            raise RepositoryError(f"{role} is a bin and cannot delegate")
        return new.signed.version
    _check_head(new.signed, top, namespace)
    if version:
        before = _newest(current, role).signed.unrecognized_fields.get(REVOKED, [])
        gone = set(before) - set(new.signed.unrecognized_fields.get(REVOKED, []))
        if gone:
            raise RepositoryError(f"{role} withdraws the revocation of {min(gone)}: a revocation is permanent")
    return new.signed.version


def _check_head(head: Targets, top: Targets, namespace: str) -> None:
    wanted = Targets()
    found = delegation(head)
    if found is None:
        raise RepositoryError(f"{namespace} has bins, and cannot go back to one file")
    attach(wanted, top, namespace, found.bit_length)
    assert wanted.delegations is not None
    assert head.delegations is not None
    if wanted.delegations.to_dict() != head.delegations.to_dict() or head.targets:
        raise RepositoryError(f"the bins of {namespace} must be signed by its own keys, and hold all of its targets")


def check_whole(before: Mapping[str, bytes], after: Mapping[str, bytes], namespace: str) -> None:
    """Verify a changed namespace with bins: no target lost or changed, each in its bin and within the ceiling.

    Args:
        before: the repository's files as published.
        after: the same, with the documents that passed `check`.
        namespace: a namespace that those documents change.

    Raises:
        RepositoryError: a bin is missing or signed by other keys; a target was changed, lost, or is in the wrong bin.
        Rejected: GRANT_DENIED, MALFORMED.
    """
    head = _newest(after, namespace).signed
    found = delegation(head)
    assert found is not None
    old_files, new_files = repository.newest(before), repository.newest(after)
    old_head = _newest(before, namespace).signed if namespace in old_files else None
    same = old_head is not None and delegation(old_head) == found
    touched = [name for name in found.get_roles() if not same or old_files.get(name) != new_files.get(name)]
    top = _newest(after, "targets").signed
    limits, seen = ceiling(top, namespace), dict[str, TargetFile]()
    for name in touched:
        if name not in new_files:
            raise RepositoryError(f"the bin {name} is missing")
        role = metadata.parse(Targets, after[f"{new_files[name]}.{name}.json"], name)
        _check_signed(head, name, role)
        for path, target in role.signed.targets.items():
            if found.get_role_for_target(path) != name or not path.startswith(f"components/{namespace}/"):
                raise RepositoryError(f"{path} does not belong in {name}")
            policy.check_ceiling(policy.release_of(path, target), limits)
            seen[path] = target
    for path, target in _targets(before, old_files, namespace, touched if same else None):
        if seen.get(path) != target:
            raise RepositoryError(f"{path} was published and is changed or missing now: revoke it instead")


def _check_signed(head: Targets, name: str, role: Metadata[Targets]) -> None:
    try:
        metadata.verify_metadata(head, name, role)
        metadata.check_lives(head, name, role)
    except Rejected as error:
        if error.code is not RejectCode.UNSIGNED:
            raise
        raise RepositoryError(f"{name} must be signed again by its new keys, in the same event") from error


def _targets(
    files: Mapping[str, bytes], index: Mapping[str, int], namespace: str, bins: Iterable[str] | None
) -> Iterable[tuple[str, TargetFile]]:
    """Yield the published targets of all roles of a namespace, or of `bins` only."""
    if namespace not in index:
        return
    head = _newest(files, namespace).signed
    found = delegation(head)
    names = bins if bins is not None else [namespace, *(found.get_roles() if found is not None else ())]
    for name in names:
        if name in index:
            yield from metadata.parse(Targets, files[f"{index[name]}.{name}.json"], name).signed.targets.items()


def split(files: Mapping[str, bytes], namespace: str, *, ends: datetime, bits: int) -> dict[str, bytes]:
    """Return the unsigned documents that move a namespace's targets into bins: role -> metadata, the namespace's first.

    Args:
        files: the repository's.
        namespace: one without bins.
        ends: expiry of the new documents.
        bits: two to the power of this is the number of bins.

    Raises:
        RepositoryError: the namespace already has bins.
    """
    top, head = _newest(files, "targets").signed, _newest(files, namespace)
    if delegation(head.signed) is not None:
        raise RepositoryError(f"the targets of {namespace} are already in bins")
    targets = head.signed.targets
    head.signed.targets = {}
    attach(head.signed, top, namespace, bits)
    found = delegation(head.signed)
    assert found is not None
    head.signed.version += 1
    head.signed.expires = ends
    made = {name: Targets(expires=ends) for name in found.get_roles()}
    for path, target in targets.items():
        made[found.get_role_for_target(path)].targets[path] = target
    return {namespace: Metadata(head.signed).to_bytes()} | {name: Metadata(r).to_bytes() for name, r in made.items()}


def _newest(files: Mapping[str, bytes], role: str) -> Metadata[Targets]:
    return metadata.parse(Targets, repository.latest(files, role)[1], role)

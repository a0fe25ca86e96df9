"""Hash bins under a namespace: many small roles in place of one that every device would fetch whole (TAP 15).

A namespace's own role then holds no targets: it delegates to `<namespace>.bins-00` and so on, by the sha256 of a
target's path, with the very keys of the namespace, and keeps the revocations. Publishing changes one bin, and a device
fetches the one that its target is in. The dot cannot occur in a namespace's name, so no namespace is taken for a bin.
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
    """Of a bin, or the role's own name."""
    return role.partition(MARK)[0]


def is_bin(role: str) -> bool:
    """Return whether a role's name is a bin's."""
    return MARK + "-" in role


def delegation(head: Targets) -> SuccinctRoles | None:
    """Return how a namespace's role delegates to bins; None where it holds its targets itself."""
    return None if head.delegations is None else head.delegations.succinct_roles


def holder(files: Mapping[str, bytes], namespace: str, path: str) -> str:
    """The role that holds, or will hold, a target path: the namespace's, or a bin's."""
    found = delegation(_newest(files, namespace).signed)
    return namespace if found is None else found.get_role_for_target(path)


def attach(head: Targets, top: Targets, namespace: str, bits: int) -> None:
    """Make a namespace's role delegate to bins with the namespace's keys of now, in place."""
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
    """Judge one document of a namespace with bins: signatures, and the very next version. `check_whole` does the rest.

    Raises:
        Rejected: TOO_LARGE, MALFORMED, UNSIGNED.
        ConflictError: not the next version.
        RepositoryError: a delegation to others than the namespace's own keys, a revocation taken back.
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
            raise RepositoryError(f"{role} takes back the revocation of {min(gone)}")
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
    """Judge what became of a namespace with bins: nothing lost or changed, everything in its bin, below the ceiling.

    Args:
        before: the repository's files as published.
        after: with the documents that `check` has taken.
        namespace: one whose documents are among them.

    Raises:
        RepositoryError: a bin that is missing or signed by other keys, a target that was changed, lost, or is in a
            wrong place.
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
                raise RepositoryError(f"{path} does not belong into {name}")
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
    """Every target as published before, of all roles of a namespace or of these bins only."""
    if namespace not in index:
        return
    head = _newest(files, namespace).signed
    found = delegation(head)
    names = bins if bins is not None else [namespace, *(found.get_roles() if found is not None else ())]
    for name in names:
        if name in index:
            yield from metadata.parse(Targets, files[f"{index[name]}.{name}.json"], name).signed.targets.items()


def split(files: Mapping[str, bytes], namespace: str, *, ends: datetime, bits: int) -> dict[str, bytes]:
    """The unsigned documents that move a namespace's targets into bins: role -> metadata, the namespace's first.

    Args:
        files: the repository's.
        namespace: one without bins.
        ends: when what is signed now expires.
        bits: two to the power of this is the number of bins.

    Raises:
        RepositoryError: it has bins already.
    """
    top, head = _newest(files, "targets").signed, _newest(files, namespace)
    if delegation(head.signed) is not None:
        raise RepositoryError(f"the targets of {namespace} are in bins already")
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

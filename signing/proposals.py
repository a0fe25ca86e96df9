"""What has to change with what: one signing event for a change of keys, ceilings, size or expiry.

Whoever changes root's targets key must have targets signed again, and whoever changes a namespace's keys its role; an
event holds all of it, so that no board ever sees half of a change.
"""

from collections.abc import Collection, Iterator, Mapping
from datetime import datetime
from typing import TypeVar

from tuf.api.metadata import Metadata, Root, Targets

from signing import bins, metadata, repository, rotation
from signing.errors import Rejected, RepositoryError
from signing.events import Document, Event
from signing.rotation import Namespace, RoleKeys, Size
from signing.trust import DIRECTOR
from signing.workflow import profile

S = TypeVar("S", Root, Targets)


def propose(
    current: Mapping[str, bytes],
    *,
    now: datetime,
    size: Size | None = None,
    roles: Mapping[str, RoleKeys] | None = None,
    director: RoleKeys | None = None,
    namespaces: Mapping[str, Namespace] | None = None,
    remove: tuple[str, ...] = (),
    renew: Collection[str] = (),
    note: str = "",
) -> Event:
    """An unsigned event with every document that these changes need.

    Args:
        current: the repository's files.
        now: UTC.
        size: None to keep it.
        roles: of root, targets, snapshot and timestamp, those that change.
        director: None to keep its keys.
        namespaces: those that are new or change.
        remove: namespaces that end.
        renew: roles that get a new expiry and nothing else: root, targets, namespaces.
        note: a line for those who sign.

    Raises:
        RepositoryError: see `rotation.propose_root` and `rotation.propose_targets`; nothing to change.
    """
    files, documents = dict(current), list[Document]()

    def add(role: str, data: bytes, version: int) -> None:
        files[f"{version}.{role}.json"] = data
        documents.append(Document(role, data))

    if size is not None or roles or "root" in renew:
        draft = rotation.propose_root(files, size=size, roles=roles, now=now)
        add("root", draft, metadata.parse(Root, draft, "root").signed.version)
    root = _newest(Root, files, "root").signed
    moved = not _stands(root, "targets", _newest(Targets, files, "targets"))
    if director is not None or namespaces or remove or moved or "targets" in renew:
        draft = rotation.propose_targets(files, director=director, namespaces=namespaces, remove=remove, now=now)
        add("targets", draft, metadata.parse(Targets, draft, "targets").signed.version)
    top = _newest(Targets, files, "targets").signed
    for name in top.delegations.roles if top.delegations is not None and top.delegations.roles is not None else ():
        if name != DIRECTOR and name in repository.newest(files):
            for role, file in _space(files, top, name, fresh=name in renew, now=now):
                add(role, Metadata(file).to_bytes(), file.version)
    if not documents:
        raise RepositoryError("there is nothing to change")
    return Event(str(profile(root).get("fleet", "")), tuple(documents), note)


def _space(
    files: Mapping[str, bytes], top: Targets, name: str, *, fresh: bool, now: datetime
) -> Iterator[tuple[str, Targets]]:
    """What must be signed again of a namespace: all of it, or what its keys of now have not signed."""
    ends, role = until(top, name, now), _newest(Targets, files, name)
    if fresh or not _stands(top, name, role) or not _bins_stand(top, name, role.signed):
        if (found := bins.delegation(role.signed)) is not None:
            bins.attach(role.signed, top, name, found.bit_length)
        yield name, _next(role.signed, ends)
    for bin_name, each in _due(files, role.signed, fresh=fresh):
        yield bin_name, _next(each.signed, ends)


def _next(signed: Targets, ends: datetime) -> Targets:
    signed.version += 1
    signed.expires = ends
    return signed


def until(top: Targets, name: str, now: datetime) -> datetime:
    """As long as its keys allow: the full life where enough of them do not end, else until the first of them ends."""
    ends = metadata.key_ends(top, name)
    role = top.get_delegated_role(name)
    lasting = [keyid for keyid in role.keyids if keyid not in ends]
    full = repository.until(now, "namespace")
    alive = [end for end in ends.values() if end > now]
    return full if len(lasting) >= role.threshold else min([full, *alive])


def propose_bins(current: Mapping[str, bytes], namespace: str, *, now: datetime, bits: int = bins.BITS) -> Event:
    """An unsigned event that moves a namespace's targets into hash bins.

    Raises:
        RepositoryError: there is no such namespace, or as `bins.split`.
    """
    if namespace not in repository.namespaces(current):
        raise RepositoryError(f"the repository has no namespace {namespace[:80]!r}")
    top = _newest(Targets, current, "targets").signed
    made = bins.split(current, namespace, ends=until(top, namespace, now), bits=bits)
    fleet = str(profile(_newest(Root, current, "root").signed).get("fleet", ""))
    note = f"the targets of {namespace} move into {2**bits} hash bins"
    return Event(fleet, tuple(Document(role, data) for role, data in made.items()), note)


def _bins_stand(top: Targets, name: str, head: Targets) -> bool:
    """Whether a namespace's bins, if it has any, are delegated to its keys of now."""
    found = bins.delegation(head)
    if found is None or head.delegations is None:
        return True
    wanted = Targets()
    bins.attach(wanted, top, name, found.bit_length)
    return wanted.delegations is not None and wanted.delegations.to_dict() == head.delegations.to_dict()


def _due(files: Mapping[str, bytes], head: Targets, *, fresh: bool) -> Iterator[tuple[str, Metadata[Targets]]]:
    """The bins that must be signed again: all of them, or those that their keys of now have not signed."""
    found = bins.delegation(head)
    for name in found.get_roles() if found is not None else ():
        role = _newest(Targets, files, name)
        if fresh or not _stands(head, name, role):
            yield name, role


def _stands(delegator: Root | Targets, role: str, file: Metadata[Targets]) -> bool:
    try:
        metadata.verify_metadata(delegator, role, file)
        metadata.check_lives(delegator, role, file)
    except Rejected:
        return False
    return True


def _newest(kind: type[S], files: Mapping[str, bytes], role: str) -> Metadata[S]:
    return metadata.parse(kind, repository.latest(files, role)[1], role)


def expiry(data: bytes) -> datetime:
    """When a root, targets or namespace file expires.

    Raises:
        RepositoryError: it is none.
    """
    try:
        return metadata.parse(Root, data, "the role").signed.expires
    except Rejected:
        pass
    try:
        return metadata.parse(Targets, data, "the role").signed.expires
    except Rejected as error:
        raise RepositoryError("this is neither a root nor a targets role") from error

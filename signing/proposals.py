"""What has to change with what: one signing event for a change of keys, ceilings, size or expiry.

Whoever changes root's targets key must have targets signed again, and whoever changes a namespace's keys its role; an
event holds all of it, so that no board ever sees half of a change.
"""

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import TypeVar

from tuf.api.metadata import Metadata, Root, Targets

from signing import metadata, repository, rotation
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
    delegated = top.delegations.roles if top.delegations is not None else None
    for name in delegated or ():
        if name == DIRECTOR:
            continue
        try:
            role = _newest(Targets, files, name)
        except RepositoryError:
            continue  # new: its publisher begins it
        if name in renew or not _stands(top, name, role):
            role.signed.version += 1
            role.signed.expires = _until(top, name, now)
            add(name, Metadata(role.signed).to_bytes(), role.signed.version)
    if not documents:
        raise RepositoryError("there is nothing to change")
    return Event(str(profile(root).get("fleet", "")), tuple(documents), note)


def _until(top: Targets, name: str, now: datetime) -> datetime:
    """As long as its keys allow: the full life where enough of them do not end, else until the first of them ends."""
    ends = metadata.key_ends(top, name)
    role = top.get_delegated_role(name)
    lasting = [keyid for keyid in role.keyids if keyid not in ends]
    full = repository.until(now, "namespace")
    return full if len(lasting) >= role.threshold else min(full, *ends.values())


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

"""Signing events: propose, cosign, merge, apply.

A signing event is a file that can be mailed. The changes in it are proposed together, signed by several people, and
published together or not at all. The file holds the proposed documents (`signing.rotation`, `signing.repository`) in
the order in which they take effect, each with the signatures collected so far:

    event = Event(fleet="acme", note="...", documents=(Document("root", draft), Document("targets", draft)))
    event = sign(files, event, signer)    # on every document that this key may sign
    event = merge(event, the_copy_that_bob_signed)
    missing(files, event)                 # [] when enough have signed
    files |= apply(files, event)          # on the server: verify all documents, then add all

A new targets key in root requires signing targets again, and new keys of a namespace require signing its role again.
`propose` puts everything into one event, so that no device ever sees half of a change.

Pure: no file, no network, no clock.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final, TypeVar

import msgspec
from securesystemslib.signer import Signer
from tuf.api.metadata import Metadata, Root, Targets

from fleet.protocol import bounds, wire
from signing import hash_bins, metadata, repository, rotation
from signing.errors import ConflictError, Rejected, RepositoryError
from signing.metadata import DIRECTOR, profile
from signing.rotation import Namespace, RoleKeys, Size

_NAMED_MAX: Final = 4
KIND: Final = "wasmfleet-signing-event-1"
MAX_BYTES: Final = bounds.ROOT_MAX_BYTES + 4 * bounds.TARGETS_MAX_BYTES
DOCUMENTS_MAX: Final = 1100
"""Room for a namespace with 1,024 bins and the documents that change with it."""


@dataclass(frozen=True, slots=True)
class Document:
    """Next version of one role (`root`, `targets`, a namespace), with the signatures collected so far."""

    role: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Event:
    """Documents in the order in which they take effect: root, then targets, then namespaces."""

    fleet: str
    documents: tuple[Document, ...]
    note: str = ""

    def encode(self) -> bytes:
        """Encode the event as the content of a file."""
        rows = [_Row(role=each.role, metadata=msgspec.Raw(each.data)) for each in self.documents]
        file = _File(kind=KIND, fleet=self.fleet, note=self.note, documents=rows)
        return msgspec.json.format(msgspec.json.encode(file), indent=1) + b"\n"

    @property
    def name(self) -> str:
        """File name that says what the event changes, such as `acme-root-3-targets-5`."""
        parts = (f"{each.role}-{_read(each).signed.version}" for each in self.documents[:_NAMED_MAX])
        return "-".join((self.fleet, *parts))


@dataclass(frozen=True, slots=True)
class Wanted:
    """Signatures that a document still lacks.

    Attributes:
        role: the document's role.
        whose: whose keys must sign: `root`, `new root`, `targets`, or a namespace.
        count: number of signatures still needed.
        keyids: ids of the keys that could sign.
    """

    role: str
    whose: str
    count: int
    keyids: tuple[str, ...]


class _Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    role: str
    metadata: msgspec.Raw


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    kind: str
    fleet: str
    documents: list[_Row]
    note: str = ""


def decode(data: bytes) -> Event:
    """Read an event's file without judging its documents.

    Raises:
        RepositoryError: not a signing event, or too large.
    """
    if len(data) > MAX_BYTES:
        raise RepositoryError(f"the signing event has {len(data)} bytes, at most {MAX_BYTES} are accepted")
    try:
        file = msgspec.json.decode(data, type=_File)
    except wire.JSON_ERRORS as error:
        raise RepositoryError(f"this is not a signing event: {error}") from error
    if file.kind != KIND:
        raise RepositoryError(f"this is a signing event of another version: {file.kind[:50]!r}")
    if not 0 < len(file.documents) <= DOCUMENTS_MAX:
        raise RepositoryError(f"a signing event holds 1 to {DOCUMENTS_MAX} documents, this one {len(file.documents)}")
    documents = tuple(Document(row.role, _tidy(row.role, bytes(row.metadata))) for row in file.documents)
    return Event(file.fleet, documents, file.note)


def sign(current: Mapping[str, bytes], event: Event, signer: Signer) -> Event:
    """Add a key's signature to every document that the key may sign, and return the event.

    Raises:
        RepositoryError: the key may sign none of the documents, or cannot sign.
    """
    keyid = signer.public_key.keyid
    found = []
    signed = 0
    for number, (document, checks) in enumerate(_walk(current, event)):
        found.append(document)
        if any(keyid in delegator.get_delegated_role(role).keyids for _, delegator, role in checks):
            found[number] = replace(document, data=rotation.cosign(document.data, signer))
            signed += 1
    if not signed:
        raise RepositoryError("this key may sign none of the event's documents")
    return replace(event, documents=tuple(found))


def missing(current: Mapping[str, bytes], event: Event) -> list[Wanted]:
    """Return the signatures that the event still lacks; empty when it can be published.

    Raises:
        RepositoryError: no key is trusted to sign a document's role.
    """
    found = []
    for document, checks in _walk(current, event):
        file = _read(document)
        for whose, delegator, role in checks:
            result = delegator.get_verification_result(
                role, file.signed_bytes, metadata.counting(delegator, role, file)
            )
            lacking = result.threshold - len({metadata.identity(key) for key in result.signed.values()})
            if lacking > 0:
                ends = metadata.key_ends(delegator, role)
                able = (keyid for keyid in result.unsigned if keyid not in ends or file.signed.expires <= ends[keyid])
                found.append(Wanted(document.role, whose, lacking, tuple(sorted(able))))
    return found


def merge(first: Event, *others: Event) -> Event:
    """Merge copies of an event; the result has the signatures of all copies.

    Raises:
        RepositoryError: the files are not copies of the same event.
    """
    documents = list(first.documents)
    for other in others:
        if other.fleet != first.fleet or [each.role for each in other.documents] != [each.role for each in documents]:
            raise RepositoryError("these files are not copies of one signing event")
        for number, (mine, theirs) in enumerate(zip(documents, other.documents, strict=True)):
            file, copy = _read(mine), _read(theirs)
            if file.signed_bytes != copy.signed_bytes:
                raise RepositoryError(f"these files propose different changes of {mine.role}: they cannot be merged")
            file.signatures |= copy.signatures
            documents[number] = replace(mine, data=file.to_bytes())
    return replace(first, documents=tuple(documents))


def apply(current: Mapping[str, bytes], event: Event) -> dict[str, bytes]:
    """Verify the whole event against the repository's files, and return the files to add, in order.

    Documents that are already published are left out, so that sending an event twice is harmless.

    Raises:
        Rejected, ConflictError, RepositoryError: see `rotation.check`; also when a role that the event does not
            change is not signed by its new keys.
    """
    files, new = dict(current), dict[str, bytes]()
    spaces = set[str]()
    for document in event.documents:
        if _is_published(files, document):
            continue
        if _in_bins(files, document):
            version = hash_bins.check(files, document.role, document.data)
            spaces.add(hash_bins.namespace_of(document.role))
        else:
            version = rotation.check(files, document.role, document.data)
        name = f"{version}.{document.role}.json"
        if files.get(name) != document.data:
            files[name] = new[name] = document.data
    if new:
        check_whole(files)
    for name in spaces:
        hash_bins.check_whole(current, files, name)
    return new


def _in_bins(files: Mapping[str, bytes], document: Document) -> bool:
    """Return whether a document is of a namespace that has, or had, bins: a bin or the namespace's role itself."""
    if hash_bins.is_bin(document.role):
        return True
    if document.role in {"root", "targets"}:
        return False
    before = repository.newest(files).get(document.role)
    known = None if before is None else files[f"{before}.{document.role}.json"]
    return any(
        b'"bit_length"' in data and hash_bins.delegation(_read(Document(document.role, data)).signed) is not None
        for data in (document.data, known)
        if data is not None
    )


def check_whole(files: Mapping[str, bytes]) -> None:
    """Check that every role is signed by the keys that are trusted with it now.

    Raises:
        RepositoryError: a role's keys changed, and it must be signed again in the same event.
    """
    root = metadata.parse(Root, repository.latest(files, "root")[1], "root").signed
    top = metadata.parse(Targets, repository.latest(files, "targets")[1], "targets")
    _check_signed(root, "targets", top)
    for name in repository.namespaces(files):
        try:
            _, data = repository.latest(files, name)
        except RepositoryError:
            continue  # just added: its publisher has not signed its first role yet
        _check_signed(top.signed, name, metadata.parse(Targets, data, name))


def _check_signed(delegator: Root | Targets, role: str, file: Metadata[Targets]) -> None:
    try:
        metadata.verify_metadata(delegator, role, file)
        metadata.check_lives(delegator, role, file)
    except Rejected as error:
        raise RepositoryError(f"{role} must be signed again by its new keys, in the same event") from error


def _is_published(files: Mapping[str, bytes], document: Document) -> bool:
    signed = _read(document).signed
    published = files.get(f"{signed.version}.{document.role}.json")
    if published is None:
        return False
    before = _read(Document(document.role, published)).signed
    if before.to_dict() != signed.to_dict():
        raise ConflictError(
            f"{document.role} is already at version {signed.version} with other content: propose the change again"
        )
    return True


def _walk(
    current: Mapping[str, bytes], event: Event
) -> Iterator[tuple[Document, Sequence[tuple[str, Root | Targets, str]]]]:
    """Yield each document with its signature checks: (whose keys must sign, delegator, role name in the delegation)."""
    files = dict(current)
    for document in event.documents:
        signed = _read(document).signed
        published = _is_published(files, document)
        root = metadata.parse(Root, repository.latest(files, "root")[1], "root").signed
        checks: list[tuple[str, Root | Targets, str]]
        if published:
            checks = []
        elif isinstance(signed, Root):
            checks = [("root", root, "root"), ("new root", signed, "root")]
        elif document.role == "targets":
            checks = [("targets", root, "targets")]
        elif hash_bins.is_bin(document.role):
            space = hash_bins.namespace_of(document.role)
            head = metadata.parse(Targets, repository.latest(files, space)[1], space).signed
            checks = [(space, head, document.role)]
        else:
            top = metadata.parse(Targets, repository.latest(files, "targets")[1], "targets").signed
            if document.role not in (top.delegations.roles if top.delegations and top.delegations.roles else ()):
                raise RepositoryError(f"there is no namespace {document.role!r}")
            checks = [(document.role, top, document.role)]
        yield document, checks
        if not published:
            files[f"{signed.version}.{document.role}.json"] = document.data


def _read(document: Document) -> Metadata[Any]:
    kind = Root if document.role == "root" else Targets
    try:
        return metadata.parse(kind, document.data, document.role)
    except Rejected as error:
        raise RepositoryError(error.message) from error


def _tidy(role: str, data: bytes) -> bytes:
    """Restore this project's metadata layout, which mail programs and editors may have changed."""
    return _read(Document(role, data)).to_bytes()


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
    """Return an unsigned event with every document that these changes need.

    Args:
        current: the repository's files.
        now: UTC.
        size: the fleet's new size; None to keep the current one.
        roles: new keys of root, targets, snapshot or timestamp.
        director: the director's new keys; None to keep the current ones.
        namespaces: new and changed namespaces.
        remove: namespaces to remove.
        renew: roles that only get a new expiry: root, targets, namespaces.
        note: a line for the people who sign.

    Raises:
        RepositoryError: see `rotation.propose_root` and `rotation.propose_targets`; also if there is nothing to change.
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
    """Return the roles of a namespace to sign again: all (`fresh`), or those its current keys have not signed."""
    ends, role = until(top, name, now), _newest(Targets, files, name)
    if fresh or not _stands(top, name, role) or not _bins_stand(top, name, role.signed):
        if (found := hash_bins.delegation(role.signed)) is not None:
            hash_bins.attach(role.signed, top, name, found.bit_length)
        yield name, _next(role.signed, ends)
    for bin_name, each in _due(files, role.signed, fresh=fresh):
        yield bin_name, _next(each.signed, ends)


def _next(signed: Targets, ends: datetime) -> Targets:
    signed.version += 1
    signed.expires = ends
    return signed


def until(top: Targets, name: str, now: datetime) -> datetime:
    """Return a namespace role's expiry: the full life if enough of its keys have no end, else the first key's end."""
    ends = metadata.key_ends(top, name)
    role = top.get_delegated_role(name)
    lasting = [keyid for keyid in role.keyids if keyid not in ends]
    full = repository.until(now, "namespace")
    alive = [end for end in ends.values() if end > now]
    return full if len(lasting) >= role.threshold else min([full, *alive])


def propose_bins(current: Mapping[str, bytes], namespace: str, *, now: datetime, bits: int = hash_bins.BITS) -> Event:
    """Return an unsigned event that moves a namespace's targets into hash bins.

    Args:
        current: the repository's files.
        namespace: the one to split.
        now: UTC.
        bits: two to the power of this is the number of bins.

    Raises:
        RepositoryError: there is no such namespace, or see `hash_bins.split`.
    """
    if namespace not in repository.namespaces(current):
        raise RepositoryError(f"the repository has no namespace {namespace[:80]!r}")
    top = _newest(Targets, current, "targets").signed
    made = hash_bins.split(current, namespace, ends=until(top, namespace, now), bits=bits)
    fleet = str(profile(_newest(Root, current, "root").signed).get("fleet", ""))
    note = f"the targets of {namespace} move into {2**bits} hash bins"
    return Event(fleet, tuple(Document(role, data) for role, data in made.items()), note)


def _bins_stand(top: Targets, name: str, head: Targets) -> bool:
    """Return whether a namespace's bins, if it has any, are delegated to its current keys."""
    found = hash_bins.delegation(head)
    if found is None or head.delegations is None:
        return True
    wanted = Targets()
    hash_bins.attach(wanted, top, name, found.bit_length)
    return wanted.delegations is not None and wanted.delegations.to_dict() == head.delegations.to_dict()


def _due(files: Mapping[str, bytes], head: Targets, *, fresh: bool) -> Iterator[tuple[str, Metadata[Targets]]]:
    """Yield the bins to sign again: all (`fresh`), or those that their current keys have not signed."""
    found = hash_bins.delegation(head)
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
    """Return when a root, targets or namespace file expires (UTC).

    Raises:
        RepositoryError: neither a root nor a targets role.
    """
    try:
        return metadata.parse(Root, data, "the role").signed.expires
    except Rejected:
        pass
    try:
        return metadata.parse(Targets, data, "the role").signed.expires
    except Rejected as error:
        raise RepositoryError("this is neither a root nor a targets role") from error

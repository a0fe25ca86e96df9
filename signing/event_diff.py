"""Changes that a signing event makes, for people to read before they sign: keys, grants, releases, revocations.

An event is compared with the published metadata; its own note is not trusted.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import datetime
from typing import Any

from securesystemslib.signer import Key
from tuf.api.metadata import Root, Targets

from fleet.protocol import names, outbound
from fleet.protocol.manifest import Grants
from signing import hash_bins, metadata, policy, repository
from signing.errors import Rejected, RepositoryError
from signing.events import Document, Event
from signing.metadata import DIRECTOR, REVOKED, ceiling, profile
from signing.policy import Release

Namer = Callable[[str], str]
"""Key id -> this person's name for the key."""


def describe(current: Mapping[str, bytes], event: Event, *, called: Namer = lambda keyid: keyid[:12]) -> list[str]:
    """Describe an event: a heading and indented lines for each document.

    Args:
        current: the repository's files.
        event: as proposed, with any signatures.
        called: names keys for this reader.

    Raises:
        RepositoryError: a document is not metadata.
    """
    files, lines = dict(current), list[str]()
    moved, published, withdrawn = 0, dict[str, dict[str, Release]](), dict[str, set[str]]()
    for document in event.documents:
        try:
            version, description = _document(files, document, called)
            if hash_bins.is_bin(document.role):
                space = hash_bins.namespace_of(document.role)
                if space not in published:
                    found = hash_bins.releases(current, space) if _latest(current, space) is not None else ()
                    published[space] = {each.name.path: each for each in found}
                    before = _latest(current, space)
                    role = None if before is None else metadata.parse(Targets, before, space).signed
                    withdrawn[space] = set() if role is None else set(_revoked(role))
                description = list(_bin(published[space], withdrawn[space], document))
        except Rejected as error:
            raise RepositoryError(error.message) from error
        files[f"{version}.{document.role}.json"] = document.data
        if hash_bins.is_bin(document.role) and not description:
            moved += 1
            continue
        lines += [f"{document.role}, version {version}:", *(f"  {line}" for line in description)]
    if moved:
        lines.append(f"{moved} hash bins hold only what was published before")
    return lines


def _document(files: Mapping[str, bytes], document: Document, called: Namer) -> tuple[int, list[str]]:
    before = _latest(files, document.role)
    if document.role == "root":
        root = metadata.parse(Root, document.data, "root").signed
        assert before is not None
        old = metadata.parse(Root, before, "root").signed
        return root.version, [*_root(old, root, called), *_life(old.expires, root.expires)]
    new = metadata.parse(Targets, document.data, document.role).signed
    known = None if before is None else metadata.parse(Targets, before, document.role).signed
    if hash_bins.is_bin(document.role):
        return new.version, []
    changes = _top(known, new, called) if document.role == "targets" else _space(known, new, before, document.data)
    return new.version, [*changes, *_life(None if known is None else known.expires, new.expires)]


def _root(old: Root, new: Root, called: Namer) -> list[str]:
    lines = []
    sizes = profile(old).get("size"), profile(new).get("size")
    if sizes[0] != sizes[1]:
        lines.append(f"the fleet's size changes from {sizes[0]} to {sizes[1]}")
    for role in new.roles:
        lines += _signers(role, (old, role) if role in old.roles else None, (new, role), called)
    return lines


def _top(old: Targets | None, new: Targets, called: Namer) -> list[str]:
    lines = []
    before, after = _delegated(old), _delegated(new)
    for name in after:
        what = "the director" if name == DIRECTOR else f"the namespace {name}"
        if name not in before:
            lines.append(f"{what} is new")
        known = None if old is None or name not in before else (old, name)
        lines += _signers(what, known, (new, name), called)
        if name != DIRECTOR:
            lines += _ceiling(what, known, (new, name))
        lines += _ends(known, (new, name), called)
    return [
        *lines,
        *(f"the namespace {name} ends: its releases can no longer be deployed" for name in before if name not in after),
    ]


def _signers(
    what: str, old: tuple[Root | Targets, str] | None, new: tuple[Root | Targets, str], called: Namer
) -> Iterable[str]:
    before = {} if old is None else _keys(*old)
    after = _keys(*new)
    yield from (f"{what}: {called(keyid)} may sign from now on" for each, keyid in after.items() if each not in before)
    yield from (f"{what}: {called(keyid)} may no longer sign" for each, keyid in before.items() if each not in after)
    threshold = new[0].get_delegated_role(new[1]).threshold
    was = None if old is None else old[0].get_delegated_role(old[1]).threshold
    if threshold != was or before.keys() != after.keys():
        yield f"{what}: needs {threshold} of {len(after)}" + ("" if was in {None, threshold} else f", was {was}")


def _ceiling(what: str, old: tuple[Targets, str] | None, new: tuple[Targets, str]) -> Iterable[str]:
    before = [] if old is None else ceiling(*old)
    after = ceiling(*new)
    if before == after and old is not None:
        return
    if not after:
        yield f"{what}: no ceiling: its components may be granted anything"
        return
    allowed = _reach(after[0])
    yield f"{what}: its components may reach at most {', '.join(allowed) or 'nothing'}"
    if before and (newly := [each for each in allowed if each not in _reach(before[0])]):
        yield f"{what}: newly allows {', '.join(newly)}"


def _ends(old: tuple[Targets, str] | None, new: tuple[Targets, str], called: Namer) -> Iterable[str]:
    before = {} if old is None else metadata.key_ends(*old)
    for keyid, end in metadata.key_ends(*new).items():
        if before.get(keyid) != end:
            yield f"{called(keyid)} signs nothing that is valid after {end:%Y-%m-%d}"


def _space(old: Targets | None, new: Targets, before: bytes | None, data: bytes) -> Iterable[str]:
    known = {} if before is None else {each.name.path: each for each in repository.releases(before)}
    for release in repository.releases(data):
        if release.name.path not in known:
            yield from policy.describe(release, before=_previous(release, known.values())).split("\n")
    gone = set(_revoked(new)) - set(() if old is None else _revoked(old))
    yield from (f"{path} is revoked: devices stop it, and the revocation is permanent" for path in sorted(gone))


def _bin(known: Mapping[str, Release], withdrawn: Collection[str], document: Document) -> Iterable[str]:
    """Describe what a hash bin holds that the namespace as published does not, withdrawn releases apart."""
    for release in repository.releases(document.data):
        before = known.get(release.name.path)
        if before == release or release.name.path in withdrawn:
            continue
        if before is not None:
            yield "changes what was published:"
        yield from policy.describe(release, before=_previous(release, known.values())).split("\n")


def _previous(release: Release, known: Iterable[Release]) -> Release | None:
    """Return the newest published release of the same component with a lower version."""
    key = names.version_key(release.name.version)
    older = [
        each
        for each in known
        if each.name.component == release.name.component and names.version_key(each.name.version) < key
    ]
    return max(older, key=lambda each: names.version_key(each.name.version), default=None)


def _life(before: datetime | None, after: datetime) -> Iterable[str]:
    was = "" if before is None or before.date() == after.date() else f", was {before:%Y-%m-%d}"
    yield f"valid until {after:%Y-%m-%d}{was}"


def _reach(grants: Grants) -> list[str]:
    return [
        *grants.interfaces,
        *map(outbound.describe, grants.outbound),
        *(f"{each}.internal" for each in grants.instances),
        *grants.messages_beyond(Grants()),
        *grants.named_beyond(Grants()),
        *grants.devices.beyond(Grants().devices),
    ]


def _keys(delegator: Root | Targets, role: str) -> dict[bytes, str]:
    found: list[Key] = [delegator.get_key(keyid) for keyid in delegator.get_delegated_role(role).keyids]
    return {metadata.identity(key): key.keyid for key in found}


def _delegated(top: Targets | None) -> list[str]:
    found = None if top is None or top.delegations is None else top.delegations.roles
    return list(found or ())


def _revoked(role: Targets) -> list[str]:
    value: Any = role.unrecognized_fields.get(REVOKED, [])
    return value if isinstance(value, list) else []


def _latest(files: Mapping[str, bytes], role: str) -> bytes | None:
    try:
        return repository.latest(files, role)[1]
    except RepositoryError:
        return None

"""What is left of a TUF repository whose server is lost: taken from anywhere, believed only as far as it is signed.

An operator's cache, a backup, a copy of the lost disk: each is a heap of files. Of each role the newest version counts
that verifies from the root pinned on this machine, through the delegations of now. Snapshot and timestamp were signed
by keys that the thief has, so they are looked at for their numbers only. Pure over bytes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

from signing import bins, metadata, repository
from signing.errors import Rejected, RepositoryError
from signing.trust import DIRECTOR
from signing.workflow import verify_root

Files = Mapping[str, bytes]
_PLAUSIBLE: Final = 2**40
"""A version beyond it was driven up by a thief: numbering begins anew, as boards forget it with the stolen keys."""
_KINDS: Final[dict[str, Any]] = {"snapshot.json": Snapshot, "timestamp.json": Timestamp, "root.json": Root}


def from_cache(directory: Path) -> dict[str, bytes]:
    """The files of an operator's cache, under the names that a repository gives them."""
    found: dict[str, bytes] = {}
    for path in sorted((*directory.glob("*.json"), *directory.glob("root_history/*.json"))):
        data = path.read_bytes()
        if path.parent != directory or path.name == "timestamp.json":
            found[path.name] = data
            continue
        try:
            version = metadata.parse(_KINDS.get(path.name, Targets), data, path.name).signed.version
        except Rejected:
            continue
        found[f"{version}.{path.name}"] = data
    return found


def salvage(pinned: bytes, sources: Sequence[Files]) -> dict[str, bytes]:
    """The newest of everything that people signed: roots, targets, namespaces and their bins; and the newest numbers.

    Args:
        pinned: the root pinned on this machine.
        sources: heaps of files; of the same version in several, the first that verifies counts.

    Raises:
        RepositoryError: no targets, or the pinned root is none.
    """
    try:
        root = metadata.parse(Root, pinned, "the pinned root")
        metadata.verify_metadata(root.signed, "root", root)
    except Rejected as error:
        raise RepositoryError(f"the root pinned on this machine cannot be used: {error.message}") from error
    files = _older_roots(root.signed.version, sources) | {f"{root.signed.version}.root.json": pinned}
    newest = root.signed
    while (following := _next_root(newest, sources)) is not None:
        newest, data = following
        files[f"{newest.version}.root.json"] = data
    top = _newest(sources, "targets", newest)
    if top is None:
        raise RepositoryError("no targets role that this fleet's root vouches for was found: is there a backup?")
    files |= {f"{top[0].version}.targets.json": top[1]}
    for name in top[0].delegations.roles or {} if top[0].delegations is not None else ():
        if name == DIRECTOR or (space := _newest(sources, name, top[0])) is None:
            continue
        files[f"{space[0].version}.{name}.json"] = space[1]
        for each in _bins(space[0]):
            if (found := _newest(sources, each, space[0])) is not None:
                files[f"{found[0].version}.{each}.json"] = found[1]
    return files | _numbers(sources)


def _older_roots(version: int, sources: Sequence[Files]) -> dict[str, bytes]:
    """Those before the pinned one, for boards that enrolled earlier; they verify them themselves."""
    names = (f"{number}.root.json" for number in range(1, version))
    return {name: source[name] for name in names for source in reversed(sources) if name in source}


def _next_root(trusted: Root, sources: Sequence[Files]) -> tuple[Root, bytes] | None:
    for source in sources:
        data = source.get(f"{trusted.version + 1}.root.json")
        if data is not None:
            try:
                return verify_root(trusted, data), data
            except Rejected:
                continue
    return None


def _newest(sources: Sequence[Files], role: str, delegator: Root | Targets) -> tuple[Targets, bytes] | None:
    found: tuple[Targets, bytes] | None = None
    for data in _versions(sources, role):
        try:
            file: Metadata[Targets] = metadata.parse(Targets, data, role)
            metadata.verify_metadata(delegator, role, file)
            metadata.check_lives(delegator, role, file)
        except Rejected:
            continue
        if found is None or file.signed.version > found[0].version:
            found = file.signed, data
    return found


def _versions(sources: Sequence[Files], role: str) -> Iterator[bytes]:
    for source in sources:
        for name, data in source.items():
            number, _, rest = name.partition(".")
            if number.isdigit() and rest == f"{role}.json":
                yield data


def _bins(space: Targets) -> Iterator[str]:
    succinct = bins.delegation(space)
    yield from () if succinct is None else succinct.get_roles()


def _numbers(sources: Sequence[Files]) -> dict[str, bytes]:
    """The newest snapshot and timestamp, so that numbering goes on above them: names are never used twice."""
    best: dict[str, tuple[int, bytes]] = {}
    rows: tuple[tuple[Any, str, Iterable[bytes]], ...] = (
        (Snapshot, "snapshot", _versions(sources, "snapshot")),
        (Timestamp, "timestamp", (source["timestamp.json"] for source in sources if "timestamp.json" in source)),
    )
    for kind, role, versions in rows:
        for data in versions:
            try:
                version = metadata.parse(kind, data, role).signed.version
            except Rejected:
                continue
            if version <= _PLAUSIBLE and version > best.get(role, (0, b""))[0]:
                best[role] = version, data
    found = {f"{best['snapshot'][0]}.snapshot.json": best["snapshot"][1]} if "snapshot" in best else {}
    return found | ({"timestamp.json": best["timestamp"][1]} if "timestamp" in best else {})


def missing(files: Files, seen: Mapping[str, int]) -> list[str]:
    """Roles of which this machine has seen a newer version than was found, in words."""
    index = repository.newest(files)
    return [
        f"{role} was seen at version {version}, the newest that was found is {index.get(role, 0)}"
        for role, version in sorted(seen.items())
        if version > index.get(role, 0) and role not in {"snapshot", "timestamp"}
    ]

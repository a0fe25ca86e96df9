"""Backups, and servers rebuilt on another machine.

A backup is one tar with the configuration, a consistent copy of the database, the TUF metadata, the artifacts and the
root certificate of the CA. A backup contains no key: whoever finds one can read what devices run, but sign nothing.

A rebuilt server starts from what an operator has: people's keys, the root of the CA, the metadata that this machine
verified last, its memory of each device, and a backup if there is one. Devices reconnect without enrolling again, and
keys stolen from the old server become useless:

    begin    make new director, snapshot and timestamp keys, and the signing event that names them, in `server.new/`
    (people sign the event)
    finish   apply the event, make a new issuing CA, keep only the admin, with a new token; move to `server/`

Nothing of an old `server/` directory is used, and nothing is overwritten.

`salvage_metadata` finds the TUF repository in files from several sources (an operator's cache, a backup, a copy of the
lost disk): of each role the newest version that verifies from the root pinned on this machine, through the delegations
valid now. The keys of snapshot and timestamp may be stolen, so only their version numbers are used.
"""

import io
import os
import secrets
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.serialization import Encoding
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

from fleet import ca
from fleet.admin.bootstrap import issue
from fleet.ca import CaError
from fleet.protocol import bounds
from fleet.protocol.files import atomic_write, move_into_place, temporary_name
from fleet.server.config import HomeError, ServerConfig, ServerPaths
from fleet.store.sqlite import StoreError
from fleet.store.store import Store
from signing import events, hash_bins, keys, metadata, repository
from signing.errors import Rejected, RepositoryError, SigningError
from signing.events import Event
from signing.metadata import DIRECTOR, profile, verify_root
from signing.rotation import RoleKeys
from signing.state import VerifierState

_FILES_MAX: Final = 1_000_000
_DATABASE_MAX_BYTES: Final = 64 << 30
_LIMITS: Final = {
    "server.toml": 64 * bounds.KIB,
    "fleet.db": _DATABASE_MAX_BYTES,
    "ca/ca.pem": 64 * bounds.KIB,
    "repository/": bounds.TARGETS_MAX_BYTES,
    "artifacts/": bounds.DATA_MAX_BYTES,
}
"""Largest sizes of a backup's members, bytes: names, and directories of plain files."""


class BackupError(Exception):
    """The backup cannot be made or read; one line says what, why and what to do."""


def backup(home: Path, output: Path) -> int:
    """Write the backup of a server, which may be running, and return its size in bytes.

    Raises:
        BackupError: there is no server, or the file cannot be written.
    """
    place = ServerPaths(home)
    try:
        fleet = ServerConfig.load(place.config).fleet
        beside = temporary_name(output)
        with tempfile.TemporaryDirectory(dir=place.server, prefix=".backup-") as scratch:
            copy = Path(scratch) / "fleet.db"
            store = Store.open(place.database, fleet=fleet, create=False)
            try:
                store.backup(copy)
            finally:
                store.close()
            handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with os.fdopen(handle, "wb") as file:
                    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                        for name, path in _members(place, copy):
                            tar.add(path, arcname=name, recursive=False)
                    size = file.tell()
                move_into_place(beside, output)
            except BaseException:
                beside.unlink(missing_ok=True)  # a full disk stays no fuller than before
                raise
    except (HomeError, StoreError) as error:
        raise BackupError(str(error)) from error
    except OSError as error:
        raise BackupError(f"cannot write the backup {output}: {error.strerror or error}") from error
    return size


def _members(place: ServerPaths, database: Path) -> Iterator[tuple[str, Path]]:
    yield "server.toml", place.config
    yield "fleet.db", database
    yield "ca/ca.pem", place.ca / "ca.pem"
    for directory in (place.repository, place.artifacts):
        for path in sorted(directory.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                yield f"{directory.name}/{path.name}", path


def extract(backup: Path, into: Path) -> None:
    """Unpack a backup, which is untrusted, in a new directory.

    Raises:
        BackupError: not a backup, or it cannot be read or written.
    """
    try:
        with tarfile.open(backup, mode="r:") as tar:
            for number, member in enumerate(tar):
                if number >= _FILES_MAX or not member.isreg() or member.size > _limit(member.name):
                    raise BackupError(f"{backup} is not a server backup: it contains {member.name[:100]!r}")
                path = into / member.name
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                source = tar.extractfile(member)
                assert source is not None
                with path.open("xb") as file:
                    while block := source.read(io.DEFAULT_BUFFER_SIZE * 16):
                        file.write(block)
    except tarfile.TarError as error:
        raise BackupError(f"{backup} is not a server backup: {error}") from error
    except OSError as error:
        raise BackupError(f"cannot read the backup {backup}: {error}") from error
    for name in ("server.toml", "fleet.db", "repository/1.root.json"):
        if not (into / name).is_file():
            raise BackupError(f"{backup} is an incomplete server backup: {name} is missing")


def _limit(name: str) -> int:
    directory, slash, rest = name.partition("/")
    if name in _LIMITS:
        return _LIMITS[name]
    plain = rest and "/" not in rest and not rest.startswith(".")
    return _LIMITS.get(directory + slash, -1) if plain else -1


ONLINE: Final = ("snapshot", "timestamp")
EVENT: Final = "event.signing.json"


class RebuildError(Exception):
    """The server cannot be rebuilt; one line says what, why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """Device as this operator's machine remembers it.

    Attributes:
        key: fingerprint of its key, from first sight.
        groups: its groups.
        revoked: whether it was revoked.
    """

    key: str
    groups: tuple[str, ...] = ()
    revoked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuilt:
    """Result of `finish`.

    Attributes:
        url: of the API for operators.
        devices: number of devices that the new server knows.
        admitted: ids of devices that only this operator's machine remembered.
        lost: target paths of published releases whose artifacts are missing.
    """

    url: str
    devices: int
    admitted: tuple[str, ...]
    lost: tuple[str, ...]


def draft_of(home: Path) -> ServerPaths:
    """Return the paths of an unfinished server: `<home>/server.new` instead of `server`."""
    return _Draft(home)


class _Draft(ServerPaths):
    @property
    def server(self) -> Path:
        return self.root / "server.new"


def begin(home: Path, *, kept: Path | None, config: ServerConfig | None, now: datetime) -> tuple[Event, list[str]]:
    """Make `server.new/` with new online keys; return the unsigned event that names them, and what may be missing.

    Args:
        home: with `operator/`, without `server/`.
        kept: a backup, None for none.
        config: of the server, needed without a backup.
        now: UTC.

    Raises:
        RebuildError: there is a server already, or files that it needs are missing.
    """
    place, draft = ServerPaths(home), draft_of(home)
    if place.server.exists():
        raise RebuildError(f"{place.server} exists: move it away first; the rebuild uses no file of it")
    if not place.ca_root.exists():
        raise RebuildError(
            f"the root of the fleet's CA is not here ({place.ca_root}): without it devices must enrol in a new fleet"
        )
    shutil.rmtree(draft.server, ignore_errors=True)
    try:
        draft.server.mkdir(mode=0o700)
        if kept is not None:
            extract(kept, draft.server)
        for directory in (draft.ca, draft.tls, draft.keys, draft.repository, draft.artifacts, draft.broker):
            directory.mkdir(mode=0o700, exist_ok=True)
        sources = [_files(draft.repository), from_cache(place.operator / "trust" / "cache")]
        files = salvage_metadata((place.operator / "trust" / "1.root.json").read_bytes(), sources)
        event = _propose(draft, files, now)
        _write_files(draft.repository, files)
        found = ServerConfig.load(draft.config) if config is None else config
        root = metadata.parse(Root, repository.latest(files, "root")[1], "root").signed
        found = replace(found, fleet=event.fleet, size=str(profile(root).get("size", "solo")))
        atomic_write(draft.config, found.dump(), mode=0o644)
        atomic_write(draft.server / EVENT, event.encode(), mode=0o644)
    except (SigningError, HomeError, BackupError, OSError) as error:
        shutil.rmtree(draft.server, ignore_errors=True)
        raise RebuildError(str(error)) from error
    return event, missing(files, _seen(place))


def _propose(draft: ServerPaths, files: Mapping[str, bytes], now: datetime) -> Event:
    online = {role: RoleKeys((keys.generate(draft.keys / f"{role}.pem").public_key,)) for role in ONLINE}
    director = RoleKeys((keys.generate(draft.keys / f"{DIRECTOR}.pem").public_key,))
    return events.propose(
        files, roles=online, director=director, now=now, note="the server is made anew: the keys that it held change"
    )


def begun(home: Path) -> tuple[dict[str, bytes], Event]:
    """Read the files and the signing event of a rebuild that was begun. Raises `RebuildError` when there is none."""
    draft = draft_of(home)
    try:
        return _files(draft.repository), events.decode((draft.server / EVENT).read_bytes())
    except (OSError, SigningError) as error:
        raise RebuildError(
            f"no rebuild was started in {home}: run fleet server rebuild without --event first"
        ) from error


def finish(home: Path, event: Event, root: ca.Root, *, devices: Mapping[str, Known], now: datetime) -> Rebuilt:
    """Complete a rebuild with the signed event, and move the server into place.

    Args:
        home: as in `begin`.
        event: signed by enough people.
        root: of the CA.
        devices: memory of this operator's machine, by device id.
        now: UTC.

    Raises:
        RebuildError: the event lacks signatures, or belongs to another rebuild.
    """
    place, draft = ServerPaths(home), draft_of(home)
    files, begun_event = begun(home)
    if [each.role for each in event.documents] != [each.role for each in begun_event.documents]:
        raise RebuildError("this event belongs to another rebuild")
    try:
        files |= events.apply(files, event)
        signers = {role: keys.load(draft.keys / f"{role}.pem") for role in ONLINE}
        online = repository.online(
            files, snapshot_signer=signers["snapshot"], timestamp_signer=signers["timestamp"], now=now
        )
        if not repository.online_stands(files | online):
            raise RebuildError("this event does not name the new keys of this rebuild")
        _write_files(draft.repository, files | online)
        config = ServerConfig.load(draft.config)
        atomic_write(draft.ca / "ca.pem", root.certificate.public_bytes(Encoding.PEM), mode=0o644)
        issue(draft.ca, root, config, now)
        token = secrets.token_urlsafe(32)
        admitted, count = _people_and_devices(draft, config, token, devices, now)
        (draft.server / EVENT).unlink()
        move_into_place(draft.server, place.server)
        atomic_write(place.operator / "token", f"{token}\n", mode=0o600)
    except (SigningError, StoreError, HomeError, CaError, OSError) as error:
        raise RebuildError(str(error)) from error
    have = {path.name for path in place.artifacts.iterdir()}
    spaces = repository.begun(files)
    lost = (each.name.path for space in spaces for each in hash_bins.releases(files, space) if each.sha256 not in have)
    return Rebuilt(url=config.operators_url, devices=count, admitted=admitted, lost=tuple(lost))


def _people_and_devices(
    draft: ServerPaths, config: ServerConfig, token: str, devices: Mapping[str, Known], now: datetime
) -> tuple[tuple[str, ...], int]:
    """Remove every operator but the admin, and add devices that only this operator remembers."""
    store = Store.open(draft.database, fleet=config.fleet)
    admitted = []
    try:
        with store.atomic():
            store.mark_restored()
            store.access.start_over("admin", token, now=now.timestamp())
            store.set_witness(now.timestamp())  # a backup may be older than any jump of a clock that is believed
            # devices refuse older versions of a secret: the time in seconds is above every version so far
            store.boxes.count_on_from(int(now.timestamp()))
            for device, known in sorted(devices.items()):
                if store.devices.get(device) is None and not known.revoked:
                    _admit(store, device, known, now.timestamp())
                    admitted.append(device)
                elif known.revoked:
                    store.devices.revoke(device)
            store.access.audit(
                actor="rebuild", act="rebuild-server", subject=config.fleet, detail="", now=now.timestamp()
            )
        return tuple(admitted), store.devices.count().total
    finally:
        store.close()


def _admit(store: Store, device: str, known: Known, now: float) -> None:
    name = device.rpartition("-")[0] or device
    store.devices.add(device=device, name=name, machine="", sealing_key="", key_sha256=known.key, group="", now=now)
    for group in known.groups:
        store.devices.ensure_group(group, now=now)
        store.devices.join(group, [device])
    store.devices.note(device, "enrolled", "known from before: the server was made anew", now=now)


def _files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.json") if path.is_file()}


def _write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write exactly these files: other files that were found are not served."""
    for path in directory.glob("*.json"):
        if path.name not in files:
            path.unlink()
    for name, data in files.items():
        atomic_write(directory / name, data, mode=0o644)


def _seen(place: ServerPaths) -> dict[str, int]:
    """Return the newest version of each role that this operator's machine has verified."""
    try:
        facts = VerifierState.decode((place.operator / "trust" / "facts.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return {"root": facts.root} | {role: each.version for role, each in facts.roles.items()}


Files = Mapping[str, bytes]
_PLAUSIBLE: Final = 2**40
"""A version above it is an attacker's: numbering starts again, as devices forget versions with revoked keys."""

_KINDS: Final[dict[str, Any]] = {"snapshot.json": Snapshot, "timestamp.json": Timestamp, "root.json": Root}


def from_cache(directory: Path) -> dict[str, bytes]:
    """Read the files of an operator's cache, under their names in a repository."""
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


def salvage_metadata(pinned: bytes, sources: Sequence[Files]) -> dict[str, bytes]:
    """Collect the newest of what people signed (roots, targets, namespaces, bins), and the newest online roles.

    Args:
        pinned: the root pinned on this machine.
        sources: files by name; where several have the same version, the first that verifies counts.

    Raises:
        RepositoryError: no targets were found, or the pinned root is not valid.
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
        raise RepositoryError("no targets role that this fleet's root trusts was found: add a backup with --backup")
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
    """Return roots older than the pinned one, for devices that enrolled earlier; devices verify them."""
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
    succinct = hash_bins.delegation(space)
    yield from () if succinct is None else succinct.get_roles()


def _numbers(sources: Sequence[Files]) -> dict[str, bytes]:
    """Collect the newest snapshot and timestamp: versions continue above them, so that no file name is used twice."""
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
    """Return a sentence for each role of which this machine has seen a newer version than was found."""
    index = repository.newest(files)
    return [
        f"{role} was seen at version {version}, the newest version found is {index.get(role, 0)}"
        for role, version in sorted(seen.items())
        if version > index.get(role, 0) and role not in {"snapshot", "timestamp"}
    ]

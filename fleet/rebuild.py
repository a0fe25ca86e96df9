"""A server made anew on another machine, from what an operator has: boards come back, and none enrols again.

What an operator has: the keys that people hold, the CA's root, the metadata that this machine verified last, what it
remembers of each board, and a backup if there is one. What a thief of the old server has counts for nothing afterwards:

    begin    new director, snapshot and timestamp keys, and the signing event that names them, in `server.new/`
    (people sign the event)
    finish   the event applied, a new issuing CA, nobody let in but the admin with a new token; `server/` is in place

Nothing of an old `server/` directory is used, and nothing is overwritten.
"""

import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.serialization import Encoding
from tuf.api.metadata import Root

from fleet import backup, issuing, salvage
from fleet.backup import BackupError
from fleet.ca import CaError, write_secret
from fleet.server.home import Config, Home, HomeError
from fleet.setup import issue
from fleet.store.errors import StoreError
from fleet.store.store import Store
from signing import bins, events, keys, metadata, proposals, repository
from signing.errors import SigningError
from signing.events import Event
from signing.facts import Facts
from signing.rotation import RoleKeys
from signing.trust import DIRECTOR
from signing.workflow import profile

ONLINE: Final = ("snapshot", "timestamp")
EVENT: Final = "event.signing.json"


class RebuildError(Exception):
    """The server cannot be made anew; one line: what, why, what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A board as this operator remembers it.

    Attributes:
        key: fingerprint of its key, from first sight.
        groups: where it belonged.
        revoked: it was shut out.
    """

    key: str
    groups: tuple[str, ...] = ()
    revoked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuilt:
    """What was made.

    Attributes:
        url: of the API for operators.
        boards: how many are known to the new server.
        admitted: those that only this operator remembered.
        lost: artifacts of published releases that are not there: target paths.
    """

    url: str
    boards: int
    admitted: tuple[str, ...]
    lost: tuple[str, ...]


def draft_of(home: Path) -> Home:
    """Where the new server lies until it is complete: `<home>/server.new`, as if it were a home's `server`."""
    return _Draft(home)


class _Draft(Home):
    @property
    def server(self) -> Path:
        return self.root / "server.new"


def begin(home: Path, *, kept: Path | None, config: Config | None, now: datetime) -> tuple[Event, list[str]]:
    """Make `server.new/` with new online keys; the unsigned event that names them, and what may be missing.

    Args:
        home: with `operator/`, without `server/`.
        kept: a backup.
        config: of the server, where there is no backup.
        now: UTC.

    Raises:
        RebuildError: there is a server already, or what is here is not enough.
    """
    place, draft = Home(home), draft_of(home)
    if place.server.exists():
        raise RebuildError(f"{place.server} exists: move it away first; nothing of it is used")
    if not place.ca_root.exists():
        raise RebuildError(
            f"the root of the fleet's CA is not here ({place.ca_root}): without it boards must enrol in a new fleet"
        )
    shutil.rmtree(draft.server, ignore_errors=True)
    try:
        draft.server.mkdir(mode=0o700)
        if kept is not None:
            backup.extract(kept, draft.server)
        for directory in (draft.ca, draft.tls, draft.keys, draft.repository, draft.artifacts, draft.broker):
            directory.mkdir(mode=0o700, exist_ok=True)
        sources = [_files(draft.repository), salvage.from_cache(place.operator / "trust" / "cache")]
        files = salvage.salvage((place.operator / "trust" / "1.root.json").read_bytes(), sources)
        event = _propose(draft, files, now)
        _write_files(draft.repository, files)
        found = Config.load(draft.config) if config is None else config
        root = metadata.parse(Root, repository.latest(files, "root")[1], "root").signed
        found = replace(found, fleet=event.fleet, size=str(profile(root).get("size", "solo")))
        draft.config.write_text(found.dump(), encoding="utf-8")
        (draft.server / EVENT).write_bytes(event.encode())
    except (SigningError, HomeError, BackupError, OSError) as error:
        shutil.rmtree(draft.server, ignore_errors=True)
        raise RebuildError(str(error)) from error
    return event, salvage.missing(files, _seen(place))


def _propose(draft: Home, files: Mapping[str, bytes], now: datetime) -> Event:
    online = {role: RoleKeys((keys.generate(draft.keys / f"{role}.pem").public_key,)) for role in ONLINE}
    director = RoleKeys((keys.generate(draft.keys / f"{DIRECTOR}.pem").public_key,))
    return proposals.propose(
        files, roles=online, director=director, now=now, note="the server is made anew: the keys that it held change"
    )


def begun(home: Path) -> tuple[dict[str, bytes], Event]:
    """The files and the event of a server that was begun; raises `RebuildError` when there is none."""
    draft = draft_of(home)
    try:
        return _files(draft.repository), events.decode((draft.server / EVENT).read_bytes())
    except (OSError, SigningError) as error:
        raise RebuildError(f"no server was begun in {home}: run fleet server rebuild without --event first") from error


def finish(home: Path, event: Event, root: issuing.Root, *, boards: Mapping[str, Known], now: datetime) -> Rebuilt:
    """Complete what was begun with the signed event, and put it in place.

    Args:
        home: see `begin`.
        event: signed by enough people.
        root: of the CA.
        boards: what this operator remembers, by device id.
        now: UTC.

    Raises:
        RebuildError: the event is not signed by enough, or is another one.
    """
    place, draft = Home(home), draft_of(home)
    files, begun_event = begun(home)
    if [each.role for each in event.documents] != [each.role for each in begun_event.documents]:
        raise RebuildError("this event is not the one that this server was begun with")
    try:
        files |= events.apply(files, event)
        signers = {role: keys.load(draft.keys / f"{role}.pem") for role in ONLINE}
        online = repository.online(
            files, snapshot_signer=signers["snapshot"], timestamp_signer=signers["timestamp"], now=now
        )
        if not repository.online_stands(files | online):
            raise RebuildError("this event does not name the keys that this server was begun with")
        _write_files(draft.repository, files | online)
        config = Config.load(draft.config)
        (draft.ca / "ca.pem").write_bytes(root.certificate.public_bytes(Encoding.PEM))
        issue(draft.ca, root, config, now)
        token = secrets.token_urlsafe(32)
        admitted, count = _people_and_boards(draft, config, token, boards, now)
        (draft.server / EVENT).unlink()
        draft.server.rename(place.server)
        write_secret(place.operator / "token", token.encode() + b"\n")
    except (SigningError, StoreError, HomeError, CaError, OSError) as error:
        raise RebuildError(str(error)) from error
    have = {path.name for path in place.artifacts.iterdir()}
    spaces = repository.begun(files)
    lost = (each.name.path for space in spaces for each in bins.releases(files, space) if each.sha256 not in have)
    return Rebuilt(url=config.operators_url, boards=count, admitted=admitted, lost=tuple(lost))


def _people_and_boards(
    draft: Home, config: Config, token: str, boards: Mapping[str, Known], now: datetime
) -> tuple[tuple[str, ...], int]:
    """Nobody is let in but the admin; the boards that only this operator remembers are added."""
    store = Store.open(draft.database, fleet=config.fleet)
    admitted = []
    try:
        with store.atomic():
            store.access.start_over("admin", token, now=now.timestamp())
            # boards take no older version of a secret than they had: seconds grow faster than anybody counts
            store.boxes.count_on_from(int(now.timestamp()))
            for device, known in sorted(boards.items()):
                if store.devices.get(device) is None and not known.revoked:
                    _admit(store, device, known, now.timestamp())
                    admitted.append(device)
                elif known.revoked:
                    store.devices.revoke(device)
            store.access.audit(
                actor="rebuild", act="rebuild-server", subject=config.fleet, detail="", now=now.timestamp()
            )
        return tuple(admitted), store.devices.count()[0]
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
    """Exactly these: what was found and does not count is not served."""
    for path in directory.glob("*.json"):
        if path.name not in files:
            path.unlink()
    for name, data in files.items():
        with (directory / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def _seen(place: Home) -> dict[str, int]:
    """The newest version of each role that this operator's machine has verified."""
    try:
        facts = Facts.decode((place.operator / "trust" / "facts.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return {"root": facts.root} | {role: each.version for role, each in facts.roles.items()}

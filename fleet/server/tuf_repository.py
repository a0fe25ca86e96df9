"""TUF repository of the server: metadata files that are only added, `timestamp.json` as their head; online keys.

The server holds the snapshot and timestamp keys of the small sizes, never a publisher's. Publishing a namespace's
role is compare-and-swap, checked by `signing.repository.check_role`, and so are signing events, which change root and
targets too (`signing.events.apply`); then snapshot and timestamp follow. Files are replaced whole, the head last, so
that readers and power cuts see the old state or the new one.

Online keys are `<role>.pem`, and after a rotation `<role>-2.pem` and so on. The key named in signed metadata is looked
up for each signature, so that a rotation needs no restart: the new key is made first, then root or targets name it, and
from then on it signs.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import msgspec
from securesystemslib.signer import Key, SecretsHandler, Signature, Signer
from tuf.api.metadata import Root, Targets, Timestamp

from fleet.protocol import bounds
from fleet.protocol.bounds import Count, Utc
from fleet.protocol.files import RESTORE, atomic_write, damage, set_aside
from fleet.protocol.operator_api import Published, RoleReply
from signing import events, hash_bins, keys, metadata, repository, rotation
from signing.errors import KeyFileError, RepositoryError, SigningError
from signing.events import Document, Event
from signing.metadata import DIRECTOR, profile
from signing.policy import Release


class DamagedKeyError(SigningError):
    """A key file of this host is empty or torn, as after a power cut, and no other is trusted with the role."""


class OnlineKeys:
    """Directory of online keys."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._opened: dict[Path, Signer] = {}

    def signer(self, role: str, trusted: Iterable[Key]) -> Signer:
        """Return the key among `trusted` that this server holds for a role.

        Raises:
            SigningError: the server holds none of them.
        """
        wanted = {key.keyid for key in trusted}
        first = self._directory / f"{role}.pem"
        others = sorted(self._directory.glob(f"{role}-*.pem"))
        damaged = None
        for path in others if others and not first.exists() else (first, *others):
            try:
                signer = self._open(path)
            except KeyFileError as error:
                if not path.exists() or not damage(path):
                    raise
                damaged = error
                continue
            if signer.public_key.keyid in wanted:
                return signer
        if damaged is not None:
            raise DamagedKeyError(f"{damaged}: {RESTORE}") from damaged
        raise KeyFileError(
            f"the {role} key that is trusted now is not on this server: make one there with fleet keys rotate {role}"
        )

    def _open(self, path: Path) -> Signer:
        if path not in self._opened:
            self._opened[path] = keys.load(path)
        return self._opened[path]


class TrustedSigner(Signer):
    """Signer with the key that metadata names at the time of signing.

    Args:
        choose: returns that key; raises `SigningError` when this server does not hold it.
    """

    def __init__(self, choose: Callable[[], Signer]) -> None:
        self._choose = choose

    @property
    def public_key(self) -> Key:
        """Public half of the key that metadata names now."""
        return self._choose().public_key

    @classmethod
    def from_priv_key_uri(
        cls, priv_key_uri: str, public_key: Key, secrets_handler: SecretsHandler | None = None
    ) -> "TrustedSigner":
        """Refuse: this signer is not made from a URI."""
        del public_key, secrets_handler
        raise SigningError(f"{priv_key_uri} does not name a held key")

    def sign(self, payload: bytes) -> Signature:
        """Sign, see `Signer`."""
        return self._choose().sign(payload)


log = logging.getLogger(__name__)
_FILE: Final = re.compile(r"timestamp\.json|[1-9][0-9]{0,8}\.[a-z0-9-]{1,63}(\.bins-[0-9a-f]{1,3})?\.json")
ONLINE: Final = ("snapshot", "timestamp")


class WaitingError(Exception):
    """The change is stored, to be published once the signing host has signed snapshot and timestamp over it."""


class TufRepository:
    """Directory of metadata files, and their content.

    Args:
        directory: of the metadata.
        held: online keys of this host.
        signs_online: whether this is the signing host, with the keys of snapshot and timestamp and no director.

    Raises:
        RepositoryError: files are missing.
    """

    def __init__(self, directory: Path, held: OnlineKeys, *, signs_online: bool = False) -> None:
        self._directory, self._held, self._signs_online = directory, held, signs_online
        self._parked = directory / "waiting.json"
        self._waiting = self._read_waiting()
        self._releases: dict[str, Release] = {}
        self._chosen: dict[str, Signer] = {}
        self._lost: dict[str, int] = {}
        self._torn: list[Path] = []
        self._files = self._load()
        self._read()
        if self._lost and self.elsewhere and not signs_online:
            raise RepositoryError(f"{directory} has a damaged {' and '.join(self._lost)}: {RESTORE}")
        self._forget_published()

    def _read_waiting(self) -> bytes:
        """Return what waits; a damaged file is moved aside: whoever published it does so again."""
        if not self._parked.exists():
            return b""
        if words := damage(self._parked):
            log.warning("what waited for the publisher host is lost (%s), publish it again: %s", self._parked, words)
            set_aside(self._parked)
            return b""
        return self._parked.read_bytes()

    def _load(self) -> dict[str, bytes]:
        """Read the directory.

        A power cut or a worn disk may leave files empty, torn or lost. Snapshot and timestamp are signed anew above
        the version that they had; old versions of other roles are not needed; for the rest somebody has to help.

        Raises:
            RepositoryError: a damaged file that cannot be made anew.
        """
        paths = [path for path in sorted(self._directory.iterdir()) if _FILE.fullmatch(path.name)]
        torn = {path.name: words for path in paths if (words := damage(path))}
        newest = repository.newest({path.name: b"" for path in paths})
        for name, words in torn.items():
            path = self._directory / name
            version, _, role = name.removesuffix(".json").partition(".")
            if role == "snapshot":
                self._lost["snapshot"] = newest[role]
            elif role == "root" or (name != "timestamp.json" and int(version) == newest[role]):
                raise RepositoryError(f"{path} is damaged ({words}): {RESTORE}")
            log.warning("%s is %s: it is moved aside, and made anew where it is needed", path, words)
            if role in ONLINE or name == "timestamp.json":
                self._torn.append(path)
            else:
                set_aside(path)
        files = {path.name: path.read_bytes() for path in paths if path.name not in torn}
        head = files.get("timestamp.json")
        if head is not None:
            shown = metadata.parse(Timestamp, head, "timestamp").signed.snapshot_meta.version
            if f"{shown}.snapshot.json" not in files:
                self._lost["snapshot"] = max(shown, self._lost.get("snapshot", 0))
        elif "snapshot" in newest:
            # more than any server has signed in all its minutes, and below every bound of devices
            changed = max(path.stat().st_mtime for path in (self._directory, *paths))
            self._lost["timestamp"] = int(changed // 60)
        if self._signs_online:
            self._set_torn_aside()
        return files

    def _set_torn_aside(self) -> None:
        """Move torn snapshots and timestamp aside, once newer ones stand: a start that fails forgets no version."""
        for path in self._torn:
            if damage(path):
                set_aside(path)
        self._torn.clear()

    def _forget_published(self) -> None:
        """Discard an event that was published already: a power cut came between its publication and that."""
        if not self._waiting:
            return
        try:
            left = events.apply(self._files, events.decode(self._waiting))
        except SigningError as error:
            log.warning("what waits for the publisher host does not fit any more: %s", error)
            return
        if not left and repository.online_stands(self._files):
            log.warning("what waited for the publisher host was published before a power cut")
            self.discard()

    def check_keys(self) -> None:
        """Open the keys that this host signs with now; raises `SigningError` when one is missing or damaged."""
        for role in () if self.elsewhere else ONLINE:
            self._signer(role)
        _ = self.director

    def file(self, name: str) -> bytes | None:
        """Return a metadata file by its name; None for none."""
        return self._files.get(name)

    @property
    def newest_root(self) -> bytes:
        """Newest root, which new tokens pin: every later one can be verified from it."""
        return repository.latest(self._files, "root")[1]

    def root_by_hash(self, sha256: str) -> bytes | None:
        """Return the root with a hash that a token pinned; None when there is none."""
        roots = (data for name, data in self._files.items() if name.endswith(".root.json"))
        return next((data for data in roots if hashlib.sha256(data).hexdigest() == sha256), None)

    def release(self, path: str) -> Release | None:
        """Return the release under a target path; None for none, or a revoked one."""
        return self._releases.get(path)

    def is_withdrawn(self, path: str) -> bool:
        """Return whether a target was published under this path, and revoked since."""
        namespace = path.split("/")[1] if path.count("/") > 1 else ""
        if namespace not in repository.begun(self._files):
            return False
        roles = (namespace, hash_bins.holder(self._files, namespace, path))
        heads = (metadata.parse(Targets, repository.latest(self._files, role)[1], role).signed for role in roles)
        return any(metadata.is_revoked(head, path) for head in heads)

    def releases(self) -> tuple[Release, ...]:
        """Return published releases, sorted by name and version."""
        return tuple(self._releases.values())

    @property
    def size(self) -> str:
        """Size of the fleet in the newest root: `dev`, `solo` or `team`."""
        root = metadata.parse(Root, self.newest_root, "root").signed
        return str(profile(root).get("size", "solo"))

    @property
    def snapshot_version(self) -> int:
        """Version of the newest snapshot."""
        return repository.latest(self._files, "snapshot")[0]

    def roles(self) -> tuple[Published, ...]:
        """Return every role with its newest version and expiry."""
        names = ["root", "targets", *repository.begun(self._files), "snapshot"]
        found = [_published(role, repository.latest(self._files, role)[1]) for role in names]
        return (*found, _published("timestamp", self._files["timestamp.json"]))

    def publish(self, namespace: str, data: bytes, *, now: datetime) -> RoleReply:
        """Publish the next version of a namespace's role, and snapshot and timestamp over it.

        Raises:
            Rejected, ConflictError, RepositoryError: see `signing.events.apply`.
            WaitingError: the signing host must sign first.
        """
        if len(data) > bounds.TARGETS_MAX_BYTES:
            raise RepositoryError(f"the role has {len(data)} bytes, devices accept {bounds.TARGETS_MAX_BYTES} at most")
        self._take(Event(self.fleet, (Document(namespace, data),)), now)
        version = _published(namespace, data).version
        timestamp = _published("timestamp", self._files["timestamp.json"])
        return RoleReply(
            namespace=namespace, version=version, snapshot=self.snapshot_version, timestamp=timestamp.version
        )

    def publish_event(self, data: bytes, *, now: datetime) -> RoleReply:
        """Publish a signing event: all of its documents, and snapshot and timestamp over them, or nothing.

        Raises:
            Rejected, ConflictError, RepositoryError: see `signing.events.apply`; KeyFileError for online keys which
                this server does not hold.
            WaitingError: see `publish`.
        """
        event = events.decode(data)
        self._take(event, now)
        timestamp = _published("timestamp", self._files["timestamp.json"])
        last = event.documents[-1]
        return RoleReply(
            namespace=last.role,
            version=_published(last.role, last.data).version,
            snapshot=self.snapshot_version,
            timestamp=timestamp.version,
        )

    def _take(self, event: Event, now: datetime) -> None:
        """Publish an event, or store it until the signing host has signed."""
        if self._waiting:
            raise WaitingError
        new = events.apply(self._files, event)
        if not new:
            return
        files = self._files | new
        if not self._signs_online:
            self._signer(DIRECTOR, files)
            if self._held_elsewhere(files):
                atomic_write(self._parked, event.encode(), mode=0o644)
                self._waiting = event.encode()
                raise WaitingError
        for role in ONLINE:
            self._signer(role, files)
        self._add(new)
        self.sign_online(now=now)

    @property
    def fleet(self) -> str:
        """Name of the fleet, from root."""
        return str(profile(metadata.parse(Root, self.newest_root, "root").signed).get("fleet", ""))

    @property
    def elsewhere(self) -> bool:
        """Tell whether another host signs snapshot and timestamp."""
        return self._held_elsewhere(self._files)

    def _held_elsewhere(self, files: Mapping[str, bytes]) -> bool:
        """Tell whether both keys are elsewhere; with one of them here, the other is lost, and signing fails."""
        missing = 0
        for role in ONLINE:
            try:
                self._signer(role, files)
            except KeyFileError:
                missing += 1
        return missing == len(ONLINE)

    @property
    def waiting(self) -> bytes:
        """Event that waits for the signing host; empty for none."""
        return self._waiting

    def discard(self) -> bool:
        """Discard the waiting event; return False when there is none."""
        found, self._waiting = bool(self._waiting), b""
        self._parked.unlink(missing_ok=True)
        return found

    def countersign(self, *, snapshot: bytes | None, timestamp: bytes, now: datetime) -> None:
        """Publish the files of the signing host, and with them the waiting event.

        Raises:
            Rejected, ConflictError, RepositoryError: see `signing.repository.check`.
        """
        new = events.apply(self._files, events.decode(self._waiting)) if self._waiting else {}
        online = repository.check(self._files | new, snapshot=snapshot, timestamp=timestamp, now=now)
        self._add(new | online)
        self.discard()

    def _signer(self, role: str, files: Mapping[str, bytes] | None = None) -> Signer:
        """Return the key that metadata names for an online role. Raises `SigningError` when it is not here."""
        if files is not None:
            return self._held.signer(role, rotation.keys_of(files, role).keys)
        if role not in self._chosen:
            self._chosen[role] = self._held.signer(role, rotation.keys_of(self._files, role).keys)
        return self._chosen[role]

    @property
    def director(self) -> Signer:
        """Signer with the director's key that targets name."""
        return self._signer(DIRECTOR)

    def sign_online(self, *, now: datetime) -> None:
        """Sign timestamp again, and snapshot where it must change."""
        self._add(
            repository.online(
                self._files,
                snapshot_signer=self._signer("snapshot"),
                timestamp_signer=self._signer("timestamp"),
                now=now,
                above=self._lost,
            )
        )
        self._lost = {}
        self._set_torn_aside()

    def keep_fresh(self, *, now: datetime) -> bool:
        """Renew the online roles after half of their life, or when they lack a role; return True where renewed."""
        if not repository.online_due(self._files, now) and repository.online_stands(self._files):
            return False
        if self.elsewhere and not self._signs_online:
            return False
        self.sign_online(now=now)
        return True

    def _add(self, files: dict[str, bytes]) -> None:
        for name, data in files.items():
            atomic_write(self._directory / name, data, mode=0o644)
            self._files[name] = data
        self._read()

    def _read(self) -> None:
        self._chosen = {}
        found: dict[str, Release] = {}
        for namespace in repository.begun(self._files):
            for release in hash_bins.releases(self._files, namespace):
                found[release.name.path] = release
        self._releases = found


class _Signed(msgspec.Struct):
    version: Count
    expires: Utc


class _File(msgspec.Struct):
    signed: _Signed


def _published(role: str, data: bytes) -> Published:
    signed: Any = msgspec.json.decode(data, type=_File).signed
    return Published(role=role, version=signed.version, expires=signed.expires)

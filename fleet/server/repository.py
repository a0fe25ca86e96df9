"""TUF metadata as the server keeps it: files that are only ever added, and `timestamp.json` as their head.

The server holds the snapshot and timestamp keys of the small sizes, never a publisher's. Publishing a namespace's role
is compare-and-swap, judged by `signing.repository.check_role`, and so are signing events, which change root and targets
too (`signing.events.apply`); then snapshot and timestamp follow. Files are written
whole, the head last, so that a reader or a power cut sees the old state or the new one.
"""

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import msgspec
from securesystemslib.signer import Signer
from tuf.api.metadata import Root

from fleet.protocol import caps
from fleet.protocol.api import Published, RoleReply
from fleet.server.held import HeldKeys
from signing import bins, events, metadata, repository, rotation
from signing.errors import RepositoryError
from signing.events import Document, Event
from signing.policy import Release
from signing.trust import DIRECTOR
from signing.workflow import profile

log = logging.getLogger(__name__)
_FILE: Final = re.compile(r"timestamp\.json|[1-9][0-9]{0,8}\.[a-z0-9-]{1,63}(\.bins-[0-9a-f]{1,3})?\.json")
ONLINE: Final = ("snapshot", "timestamp")


class Repository:
    """The metadata directory and what it says.

    Args:
        directory: of the metadata.
        held: the online keys of this server.

    Raises:
        RepositoryError: files are missing.
    """

    def __init__(self, directory: Path, held: HeldKeys) -> None:
        self._directory, self._held = directory, held
        self._files = {path.name: path.read_bytes() for path in directory.iterdir() if _FILE.fullmatch(path.name)}
        self._releases: dict[str, Release] = {}
        self._chosen: dict[str, Signer] = {}
        self._read()

    def file(self, name: str) -> bytes | None:
        """A metadata file by its name; None for none."""
        return self._files.get(name)

    @property
    def newest_root(self) -> bytes:
        """The root that new tokens pin: every later one can be verified from it."""
        return repository.latest(self._files, "root")[1]

    def root_by_hash(self, sha256: str) -> bytes | None:
        """The root that a token pinned; None when it is not served."""
        roots = (data for name, data in self._files.items() if name.endswith(".root.json"))
        return next((data for data in roots if hashlib.sha256(data).hexdigest() == sha256), None)

    def release(self, path: str) -> Release | None:
        """What is published under a target path; None for nothing, or when it was revoked."""
        return self._releases.get(path)

    def releases(self) -> tuple[Release, ...]:
        """Everything published, by name and version."""
        return tuple(self._releases.values())

    @property
    def size(self) -> str:
        """`dev`, `solo` or `team`, as the newest root says."""
        root = metadata.parse(Root, self.newest_root, "root").signed
        return str(profile(root).get("size", "solo"))

    @property
    def snapshot_version(self) -> int:
        """The version of the newest snapshot."""
        return repository.latest(self._files, "snapshot")[0]

    def roles(self) -> tuple[Published, ...]:
        """Every role with its newest version and expiry."""
        names = ["root", "targets", *repository.begun(self._files), "snapshot"]
        found = [_published(role, repository.latest(self._files, role)[1]) for role in names]
        return (*found, _published("timestamp", self._files["timestamp.json"]))

    def publish(self, namespace: str, data: bytes, *, now: datetime) -> RoleReply:
        """Publish the next version of a namespace's role, and snapshot and timestamp over it.

        Raises:
            Rejected, ConflictError, RepositoryError: see `signing.events.apply`.
        """
        if len(data) > caps.TARGETS_MAX_BYTES:
            raise RepositoryError(f"the role has {len(data)} bytes, boards accept {caps.TARGETS_MAX_BYTES} at most")
        new = events.apply(self._files, Event("", (Document(namespace, data),)))
        if new:
            self._add(new)
            self.sign_online(now=now)
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
        """
        event = events.decode(data)
        new = events.apply(self._files, event)
        if new:
            for role in (*ONLINE, DIRECTOR):
                self._signer(role, self._files | new)
            self._add(new)
            self.sign_online(now=now)
        timestamp = _published("timestamp", self._files["timestamp.json"])
        last = event.documents[-1]
        return RoleReply(
            namespace=last.role,
            version=_published(last.role, last.data).version,
            snapshot=self.snapshot_version,
            timestamp=timestamp.version,
        )

    def _signer(self, role: str, files: Mapping[str, bytes] | None = None) -> Signer:
        """The key that is trusted with an online role now; raises `SigningError` when this server does not hold it."""
        if files is not None:
            return self._held.signer(role, rotation.keys_of(files, role).keys)
        if role not in self._chosen:
            self._chosen[role] = self._held.signer(role, rotation.keys_of(self._files, role).keys)
        return self._chosen[role]

    @property
    def director(self) -> Signer:
        """The director's key, as targets name it now."""
        return self._signer(DIRECTOR)

    def sign_online(self, *, now: datetime) -> None:
        """Sign snapshot (where it must change) and timestamp anew."""
        self._add(
            repository.online(
                self._files,
                snapshot_signer=self._signer("snapshot"),
                timestamp_signer=self._signer("timestamp"),
                now=now,
            )
        )

    def keep_fresh(self, *, now: datetime) -> bool:
        """Sign the online roles anew when half of their life is gone or they miss something; true when it did."""
        if not repository.online_due(self._files, now) and repository.online_stands(self._files):
            return False
        self.sign_online(now=now)
        return True

    def _add(self, files: dict[str, bytes]) -> None:
        for name, data in files.items():
            path = self._directory / name
            beside = path.with_name(f".{name}.new")
            with beside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
            self._files[name] = data
        self._read()

    def _read(self) -> None:
        self._chosen = {}
        found: dict[str, Release] = {}
        for namespace in repository.begun(self._files):
            for release in bins.releases(self._files, namespace):
                found[release.name.path] = release
        self._releases = found


class _Signed(msgspec.Struct):
    version: int
    expires: datetime


class _File(msgspec.Struct):
    signed: _Signed


def _published(role: str, data: bytes) -> Published:
    signed: Any = msgspec.json.decode(data, type=_File).signed
    return Published(role=role, version=signed.version, expires=signed.expires)

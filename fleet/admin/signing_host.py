"""Signing host (`fleet publisher`): holds the keys of snapshot and timestamp, apart from the server.

A signing host keeps a repository of its own, first copied from the server and verified from the pinned root. Each
change that waits on the server is checked against these files as the server checks it (signatures of the delegations,
ceilings, versions one above); snapshot and timestamp are signed over the result and stored, and only then sent to the
server. An attacker who controls the server can withhold files of the signing host, but cannot make it sign what
publishers did not sign, a mixture of versions, or older ones.

    <home>/publisher/keys/          snapshot.pem, timestamp.pem
    <home>/publisher/repository/    the verified and signed files
"""

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec
from securesystemslib.signer import Key

from fleet.client import Client, ClientError, UnreachableError
from fleet.protocol import bounds
from fleet.protocol.bounds import Count
from fleet.protocol.files import atomic_write
from fleet.protocol.trust_api import NONE, OnlineRequest, OnlineView
from fleet.server.tuf_repository import ONLINE, OnlineKeys, TufRepository
from signing import keys, repository
from signing.errors import ConflictError, FetchNotFound, Rejected, SigningError
from signing.trusted_metadata import ROOT_HISTORY
from signing.updater import MemoryCache, MemoryState, StateStore, Updater

log = logging.getLogger(__name__)
WAIT_S: Final = 50
AWAY_S: Final = 10.0


class PublisherError(Exception):
    """The signing host cannot do its work; one line says what, why and what to do."""


def make_keys(directory: Path) -> dict[str, Key]:
    """Make keys for snapshot and timestamp and return their public halves by role. Raises `SigningError`."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    made: dict[str, Key] = {}
    for role in ONLINE:
        number, path = 1, directory / f"{role}.pem"
        while path.exists():
            number += 1
            path = directory / f"{role}-{number}.pem"
        made[role] = keys.generate(path).public_key
    return made


class SigningHost:
    """Signing host of one fleet.

    Args:
        directory: `<home>/publisher`.
        root: the root pinned on this host.
        client: connection to the server.
        clock: returns the present time, UTC.
    """

    def __init__(
        self, directory: Path, *, root: bytes, client: Client, clock: Callable[[], datetime] | None = None
    ) -> None:
        self._place = directory / "repository"
        self._keys = OnlineKeys(directory / "keys")
        self._root, self._client = root, client
        self._clock = clock or (lambda: datetime.now(UTC))

    def run(self, *, stop: Callable[[], bool] = lambda: False) -> None:
        """Run rounds until `stop` returns True; after an error, log it and go on with the next round."""
        while not stop():
            try:
                self.step(wait_s=WAIT_S)
            except UnreachableError as error:
                log.warning("%s", error)
                time.sleep(AWAY_S)
            except (PublisherError, ClientError) as error:
                log.error("%s", error)  # noqa: TRY400 - a sentence for people
                time.sleep(AWAY_S)

    def step(self, *, wait_s: int = 0) -> bool:
        """Run one round: fetch the waiting change, verify, sign and send it. Return whether something was sent.

        Raises:
            PublisherError: files of the server do not verify, or the keys are not on this host.
            ClientError: the server is unreachable, or refuses.
        """
        try:
            return self._step(self._client.online(wait_s=wait_s))
        except Rejected as error:
            raise PublisherError(f"nothing was signed: the server's files do not verify: {error.message}") from error
        except ConflictError as error:
            raise PublisherError(f"nothing was signed: {error}") from error
        except (SigningError, OSError) as error:
            raise PublisherError(str(error)) from error

    def _step(self, view: OnlineView) -> bool:
        own = self._open(view)
        if view.waiting:
            own.publish_event(view.waiting.encode(), now=self._clock())
        if not self._named(own):
            if view.waiting:
                raise PublisherError("root does not name the keys of this host: run fleet sign move publisher")
            return False
        own.keep_fresh(now=self._clock())
        head = own.file("timestamp.json")
        assert head is not None
        if msgspec.json.decode(head, type=_Head).signed.version <= view.timestamp and not view.waiting:
            return False
        number = own.snapshot_version
        snapshot = own.file(f"{number}.snapshot.json") if number > view.snapshot else None
        self._client.countersign(
            OnlineRequest(timestamp=msgspec.Raw(head), snapshot=NONE if snapshot is None else msgspec.Raw(snapshot))
        )
        log.info("signed snapshot %d", number)
        return True

    def _named(self, own: TufRepository) -> bool:
        return not own.elsewhere

    def _open(self, view: OnlineView) -> TufRepository:
        """Open the own repository: create it, or update it from the server where that has newer files of our keys."""
        if not (self._place / "timestamp.json").exists():
            self._begin()
        own = TufRepository(self._place, self._keys, signs_online=True)
        head = own.file("timestamp.json")  # none where a power cut damaged it
        if head is None or msgspec.json.decode(head, type=_Head).signed.version < view.timestamp:
            if head is not None and self._named(own):
                log.warning(
                    "the server has a newer timestamp than this host has signed: was this host restored from a backup?"
                )
            self._begin()
            own = TufRepository(self._place, self._keys, signs_online=True)
        return own

    def _begin(self) -> None:
        """Copy the server's repository, verified from the pinned root by the same client as on a device."""

        def fetch(name: str, _max_bytes: int) -> bytes:
            data = self._client.tuf(name)
            if data is None:
                raise FetchNotFound(name)
            return data

        cache = MemoryCache()
        updater = Updater(pinned_root=self._root, fetch=fetch, states=self._remembered(), cache=cache)
        snapshot = updater.refresh(self._clock()).snapshot
        files = updater.ask(lambda trusted: trusted.files())
        for name, data in cache.files.items():
            if name.startswith(ROOT_HISTORY):
                files[name.removeprefix(ROOT_HISTORY)] = data
        files[f"{snapshot.version}.snapshot.json"] = cache.files["snapshot.json"]
        files["timestamp.json"] = cache.files["timestamp.json"]
        self._place.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, data in files.items():
            atomic_write(self._place / name, data, mode=0o644)

    def _remembered(self) -> StateStore:
        """Restore the verified state from the own directory, so that the server cannot roll this host back."""
        states = MemoryState()
        if not (self._place / "timestamp.json").exists():
            return states
        known = {path.name: path.read_bytes() for path in self._place.glob("*.json")}
        cache = MemoryCache(
            {
                "timestamp.json": known["timestamp.json"],
                "snapshot.json": repository.latest(known, "snapshot")[1],
                "targets.json": repository.latest(known, "targets")[1],
            }
        )

        def own(name: str, _max_bytes: int) -> bytes:
            if name not in known or len(known[name]) > bounds.TARGETS_MAX_BYTES:
                raise FetchNotFound(name)
            return known[name]

        long_ago = datetime(2000, 1, 1, tzinfo=UTC)  # before anything can have expired
        Updater(pinned_root=self._root, fetch=own, states=states, cache=cache).refresh(long_ago)
        return states


class _Version(msgspec.Struct):
    version: Count


class _Head(msgspec.Struct):
    signed: _Version

"""Device trust: the verifier of this device with its source, store and time; violations of committed items.

Provides the I/O around `signing.verifier`: metadata comes over HTTPS or from a bundle, the verifier's state is in the
store, time is the device's. All methods block and run on the database thread, as does the commit that raises security
epochs and versions of secrets, so read-modify-write cycles of the state are never interleaved. New state is stored
before anything is acted on, even after a refusal.

An item is verified when it is deployed. After that a release can be revoked, a ceiling lowered or this device's policy
narrowed, so `find_violations` holds everything committed against what is known after each refresh, whether or not a new
assignment came with it: a server that keeps a revocation's removal from its devices still has to show them metadata
that has not expired. Missing or expired metadata is no violation: expiry ends updates, never what runs.
"""

import contextlib
import platform
from collections.abc import Iterable
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from agent import disk
from agent.clock import ReferenceClock
from agent.config import Policy
from agent.disk import Write
from agent.identity.identity import Identity, note_production
from agent.link.bundle import BundleSource
from agent.link.https import FetchError, Source
from agent.update.state import Committed, Violation, item_key
from agent.update.store import Store
from fleet.protocol import wire
from fleet.protocol.assignment import Assignment, Command, Fresh, Item, LaterCommand
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import Manifest
from signing import dsse, verifier
from signing.errors import FetchNotFound, Rejected
from signing.metadata import profile
from signing.policy import Resolved
from signing.state import VerifierState
from signing.trusted_metadata import TrustedMetadata
from signing.updater import DirectoryCache, Fetch, Updater
from signing.verifier import Accepted

_NO_NEWS: Final = frozenset({RejectCode.UNREACHABLE, RejectCode.TOO_SLOW, RejectCode.EXPIRED})
ARCH: Final = {"arm64": "aarch64", "amd64": "x86_64"}.get(platform.machine(), platform.machine())


def remembered_assignment(envelope: bytes) -> Assignment | None:
    """Read an assignment that this device accepted and stored earlier; None if the store lost it.

    The assignment is not verified again: it stays in force when it has expired since, and without a network.
    """
    try:
        return wire.decode(Assignment, dsse.parse(envelope).payload)
    except (Rejected, wire.WireError):
        return None


class _DatabaseState:
    """State of the verifier in the agent's database, never below the time floor of the enrolment."""

    def __init__(self, store: Store, floor: datetime, clock: ReferenceClock) -> None:
        self._store, self._enrolled, self._clock = store, floor, clock

    def lock(self) -> AbstractContextManager[object]:
        """See `StateStore`; the database thread does one thing after another."""
        return contextlib.nullcontext()

    def load(self) -> VerifierState:
        """See `StateStore`."""
        state = self._store.facts().with_floor(self._enrolled)
        self._clock.raise_floor(state.floor)
        return state

    def save(self, state: VerifierState) -> None:
        """See `StateStore`. Raises `StoreError`."""
        self._store.save(facts=state)
        self._clock.raise_floor(state.floor)


def _write_metadata(path: Path, data: bytes) -> None:
    disk.write(Write.TRUST, path, data, mode=0o644)


def _fetch_from(source: Source) -> Fetch:
    def fetch(name: str, max_bytes: int) -> bytes:
        try:
            return source.request("GET", f"/v1/tuf/{name}", max_bytes=max_bytes)
        except FetchError as error:
            if error.code is RejectCode.NOT_FOUND:
                raise FetchNotFound(name) from error
            raise Rejected(error.code, error.message) from error

    return fetch


class Refreshed(NamedTuple):
    """Result of a refresh.

    Attributes:
        became_production: a fleet that was for development so far is none any more.
    """

    trusted: TrustedMetadata
    became_production: bool


class DeviceTrust:
    """Verifier of this device.

    Args:
        identity: of the enrolment.
        home: directory of the identity, where it is remembered that the fleet is in production now.
        root: the root metadata pinned at enrolment.
        cache: directory for verified metadata.
        https: the network together with a bundle, if there is one; `https.bundle` is the bundle alone.
        store: home of what is remembered.
        clock: reference time; its floor rises with what is verified.
        production: refuse repositories made for development.
        late: accept metadata from a bundle after the expiry of timestamp and snapshot.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        home: Path,
        root: bytes,
        cache: Path,
        https: BundleSource,
        store: Store,
        clock: ReferenceClock,
        production: bool,
        late: bool = False,
    ) -> None:
        self._identity = identity
        self._home = home
        self._https = https
        self._store = store
        self._state = _DatabaseState(store, identity.floor, clock)
        self._updater = Updater(
            pinned_root=root,
            fetch=self._fetch,
            states=self._state,
            cache=DirectoryCache(cache, write=_write_metadata),
            production=production,
        )
        self._refreshed = False
        self._late = late
        self._known_production = identity.production
        self._clock = clock

    def _fetch(self, name: str, max_bytes: int) -> bytes:
        return _fetch_from(self._https)(name, max_bytes)

    def now(self) -> datetime:
        """Return the reference time: the system clock, or the floor if the clock is behind it."""
        return self._clock.now()

    def refresh(self, *, source: Source | None = None, late: bool = False) -> Refreshed:
        """Bring the metadata up to date, and remember it when the fleet has become one for production.

        Args:
            source: only the bundle; None for the network together with a bundle.
            late: accept an expired timestamp and snapshot.

        Raises:
            Rejected: see `Updater.refresh`.
            OSError: that the fleet is in production now cannot be stored.
        """
        self._state.load()  # the floor of the stored state counts for the reference time
        fetch = None if source is None else _fetch_from(source)
        trusted = self._updater.refresh(self.now(), fetch=fetch, allow_expired_online=late)
        self._refreshed = True
        became_production = not self._known_production and profile(trusted.root).get("size") != "dev"
        if became_production:
            self._known_production = True
            note_production(self._home)
        return Refreshed(trusted, became_production)

    def _trusted(self) -> TrustedMetadata:
        """Return the trusted metadata, after a first refresh in this process."""
        return self._updater.trusted if self._refreshed else self.refresh().trusted

    def accept(self, envelope: bytes, *, bundle: bool = False) -> Accepted:
        """Verify an assignment after a refresh, and store it before anything in it is fetched.

        Args:
            envelope: as received.
            bundle: the assignment came in a bundle, and is verified only with that bundle's metadata.

        Raises:
            Rejected: the assignment is refused; only the verifier's state may have changed.
        """
        late = bundle and self._late
        trusted, _ = self.refresh(source=self._https.bundle if bundle else None, late=late)
        state = self._state.load()
        accepted = verifier.accept_assignment(
            trusted,
            envelope,
            fleet=self._identity.fleet,
            device=self._identity.device,
            state=state,
            now=self.now(),
            allow_expired_online=late,
        )
        if envelope != self._store.envelope() or accepted.state != state:
            self._store.accept(envelope, accepted.assignment.version, accepted.state)
        self._state.load()  # raises the floor
        return accepted

    def ended(self) -> datetime | None:
        """Return since when timestamp or snapshot have expired; None while both are valid."""
        expiries = self._updater.trusted.expiries()
        first = min(expiries["timestamp"], expiries["snapshot"])
        return first if first <= self.now() else None

    def resolve(self, item: Item) -> Resolved:
        """Find an item's target and verify it for this device; raises `Rejected`."""
        if not self._refreshed:
            try:
                self.refresh()
            except Rejected as error:
                # The agent was restarted after it accepted the assignment of a bundle.
                if error.code not in _NO_NEWS or not self._https.bundle.exists():
                    raise
                self.refresh(source=self._https.bundle, late=self._late)
        return verifier.resolve(self._updater.find(item.target), item, state=self._state.load(), arch=ARCH)

    def reconfirm(self, item: Item, manifest: Manifest) -> None:
        """Check a committed item against the current metadata; raises `Rejected` (UNREACHABLE: unknown)."""
        trusted = self._updater.look_for_revocations(item.target)
        verifier.reconfirm(trusted, item, manifest, state=self._state.load(), arch=ARCH)

    def command(self, envelope: bytes) -> Command | LaterCommand:
        """Verify a command, and store its sequence before it is carried out; raises `Rejected`."""
        trusted, state = self._trusted(), self._state.load()
        accepted = verifier.accept_command(
            trusted,
            envelope,
            fleet=self._identity.fleet,
            device=self._identity.device,
            state=state,
            now=self.now(),
        )
        self._remember(accepted.state, state)
        return accepted.command

    def fresh(self, envelope: bytes, *, nonce: str, sha256: str) -> Fresh:
        """Verify a freshness statement for this connection's nonce; raises `Rejected`."""
        trusted, state = self._trusted(), self._state.load()
        accepted = verifier.accept_freshness(
            trusted,
            envelope,
            fleet=self._identity.fleet,
            device=self._identity.device,
            challenge=verifier.Challenge(nonce, sha256),
            state=state,
            now=self.now(),
        )
        self._remember(accepted.state, state)
        return accepted.statement

    def _remember(self, state: VerifierState, before: VerifierState) -> None:
        if state != before:
            self._state.save(state)


REASONS: Final = frozenset({RejectCode.REVOKED, RejectCode.GRANT_DENIED, RejectCode.SECURITY_EPOCH})
"""Codes that are violations of running items; everything else was verified at the deployment."""


class Reconfirms(Protocol):
    """Part of `DeviceTrust` that `find_violations` needs."""

    def reconfirm(self, item: Item, manifest: Manifest) -> None:
        """Raise `Rejected` if a committed item was revoked, or exceeds its namespace's ceiling or epoch by now."""


def find_violations(trust: Reconfirms, policy: Policy, committed: Iterable[Committed]) -> tuple[Violation, ...]:
    """Return a violation for each committed item that must no longer run.

    Args:
        trust: checks revocations, ceilings and epochs.
        policy: the device owner's.
        committed: the items to check.
    """
    asked = ((each, _violation(trust, policy, each)) for each in committed)
    return tuple(
        Violation(
            instance=each.item.instance,
            key=item_key(each.item),
            target=each.item.target,
            code=error.code,
            message=error.message,
        )
        for each, error in asked
        if error is not None
    )


def _violation(trust: Reconfirms, policy: Policy, committed: Committed) -> Rejected | None:
    item, manifest = committed.item, committed.manifest
    try:
        trust.reconfirm(item, manifest)
    except Rejected as error:
        if error.code in REASONS:
            return error
    denied = policy.denied(manifest.grants if item.grants is None else item.grants, item.port)
    if denied:
        return Rejected(RejectCode.GRANT_DENIED, f"this device's own policy does not allow {', '.join(denied)}")
    return None

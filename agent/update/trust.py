"""This device's verifier: fetch, state, time; violations of what runs.

The rim of `signing.verifier`: metadata comes over HTTPS, facts come from and go to the store, time is the board's.

All methods block and belong to the worker thread. After each call, refused ones too, what is to be remembered is stored
before anything is done about it.

Whether what runs may go on running: committed items held against what publishers and the owner say by now.

An item is judged when it is deployed, and that was the last time that the server had a say in it: a release can be
revoked later, a ceiling lowered, this board's policy narrowed. So everything committed is looked at again after each
refresh, whether or not a new assignment came with it, for a server that keeps a revocation's removal from its boards
still has to show them metadata that has not expired. What cannot be known (no metadata, an expired role) is no doubt:
expiry ends updates, never what runs.
"""

import contextlib
import platform
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Protocol

from agent.config import Policy
from agent.identity.identity import Identity
from agent.link.bundle import BundleSource
from agent.link.https import FetchError, Source
from agent.update.state import Committed, Violation, item_key
from agent.update.store import Store
from fleet.protocol import wire
from fleet.protocol.assignment import Assignment, Command, Fresh, Item
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import Manifest
from signing import dsse
from signing.errors import FetchNotFound, Rejected
from signing.metadata import profile
from signing.policy import Resolved
from signing.state import VerifierState
from signing.updater import DirectoryCache
from signing.verifier import Accepted, Verifier

_NO_NEWS: Final = frozenset({RejectCode.UNREACHABLE, RejectCode.TOO_SLOW, RejectCode.EXPIRED})

ARCH: Final = {"arm64": "aarch64", "amd64": "x86_64"}.get(platform.machine(), platform.machine())


def remembered_assignment(envelope: bytes) -> Assignment | None:
    """The assignment in an envelope that this board accepted and stored earlier; None if the store lost it.

    It is not judged again: it stays in force when it has expired since, and on a board without a network.
    """
    try:
        return wire.decode(Assignment, dsse.parse(envelope).payload)
    except (Rejected, wire.WireError):
        return None


class DeviceTrust:
    """What this board trusts.

    Attributes:
        floor: it is no earlier than this, whatever the clock says; it never falls.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        root: bytes,
        cache: Path,
        https: BundleSource,
        store: Store,
        production: bool,
        late: bool = False,
        on_production: Callable[[], None] = lambda: None,
    ) -> None:
        """What a board trusts, from the `root` pinned at enrolment.

        With `late` what came in a bundle may be past the expiry of timestamp and snapshot. `on_production` hears, once,
        that a fleet which was for development when this board enrolled is none any more.
        """
        self._identity = identity
        self._https = https
        self._source: Source | None = None  # None for `https`; seen by this thread alone, like everything here
        self._store = store
        self._set = Verifier(root=root, fetch=self._fetch, cache=DirectoryCache(cache), production=production)
        self._refreshed = False
        self._late, self._on_production = late, on_production
        self._known_production = identity.production
        self.floor = identity.floor

    def _fetch(self, name: str, max_bytes: int) -> bytes:
        try:
            return (self._source or self._https).request("GET", f"/v1/tuf/{name}", max_bytes=max_bytes)
        except FetchError as error:
            if error.code is RejectCode.NOT_FOUND:
                raise FetchNotFound(name) from error
            raise Rejected(error.code, error.message) from error

    @contextlib.contextmanager
    def _fetching_from(self, source: Source) -> Iterator[None]:
        """Fetch metadata from this source meanwhile."""
        before, self._source = self._source, source
        try:
            yield
        finally:
            self._source = before

    def now(self) -> datetime:
        """The reference time: the wall clock, or the floor where the clock is behind it."""
        return max(datetime.now(UTC), self.floor)

    def _facts(self) -> VerifierState:
        facts = self._store.facts().with_floor(self._identity.floor)
        self.floor = facts.floor
        return facts

    def _remember(self, facts: VerifierState, before: VerifierState) -> None:
        if facts != before:
            self._store.save(facts=facts)
        self.floor = max(self.floor, facts.floor)

    def refresh(self, *, late: bool = False) -> None:
        """Bring the metadata up to date; raises `Rejected`."""
        facts = self._facts()
        try:
            self._set.refresh(facts=facts, now=self.now(), late=late)
            self._refreshed = True
        finally:
            self._remember(self._set.facts, facts)
        if not self._known_production and profile(self._set.loaded()[0]).get("size") != "dev":
            self._known_production = True
            self._on_production()

    def accept(self, envelope: bytes, *, bundle: bool = False) -> Accepted:
        """Judge an assignment after a refresh, and persist it before anything of it is fetched.

        Args:
            envelope: as it was received.
            bundle: it came in a bundle, whose metadata alone counts for it.

        Raises:
            Rejected: why not; nothing has changed but what is remembered.
        """
        if bundle:
            with self._fetching_from(self._https.bundle):
                return self._accept(envelope, late=self._late)
        return self._accept(envelope, late=False)

    def _accept(self, envelope: bytes, *, late: bool) -> Accepted:
        self.refresh(late=late)
        facts = self._facts()
        accepted = self._set.accept(
            envelope, fleet=self._identity.fleet, device=self._identity.device, facts=facts, now=self.now(), late=late
        )
        if envelope != self._store.envelope() or accepted.facts != facts:
            self._store.accept(envelope, accepted.assignment.version, accepted.facts)
        self.floor = max(self.floor, accepted.facts.floor)
        return accepted

    def ended(self) -> datetime | None:
        """Since when timestamp or snapshot have expired, as far as they are known; None while both are valid."""
        online = [at for role, at in self._set.expiries().items() if role in {"timestamp", "snapshot"}]
        return min(online) if min(online) <= self.now() else None

    def resolve(self, item: Item) -> Resolved:
        """Find an item's target and judge it for this board; raises `Rejected`."""
        if not self._refreshed:
            try:
                self.refresh()
            except Rejected as error:
                # The agent began anew while what a bundle brought was being taken: its assignment was accepted.
                if error.code not in _NO_NEWS or not self._https.bundle.exists():
                    raise
                with self._fetching_from(self._https.bundle):
                    self.refresh(late=self._late)
        return self._set.resolve(item, facts=self._facts(), arch=ARCH)

    def reconfirm(self, item: Item, manifest: Manifest) -> None:
        """Hold a committed item against what publishers say by now; raises `Rejected` (UNREACHABLE: unknown)."""
        self._set.reconfirm(item, manifest, facts=self._facts(), arch=ARCH)

    def command(self, envelope: bytes) -> Command:
        """Judge a command, and remember it before it is obeyed; raises `Rejected`."""
        if not self._refreshed:
            self.refresh()
        before = self._facts()
        command, facts = self._set.command(
            envelope, fleet=self._identity.fleet, device=self._identity.device, facts=before, now=self.now()
        )
        self._remember(facts, before)
        return command

    def fresh(self, envelope: bytes, *, nonce: str, sha256: str) -> Fresh:
        """Judge a freshness statement for this connection's nonce; raises `Rejected`."""
        if not self._refreshed:
            self.refresh()
        before = self._facts()
        statement, facts = self._set.fresh(
            envelope,
            fleet=self._identity.fleet,
            device=self._identity.device,
            nonce=nonce,
            sha256=sha256,
            facts=before,
            now=self.now(),
        )
        self._remember(facts, before)
        return statement


REASONS: Final = frozenset({RejectCode.REVOKED, RejectCode.GRANT_DENIED, RejectCode.SECURITY_EPOCH})
"""Codes that stand against something that runs; all others were judged when it was deployed."""


class Reconfirms(Protocol):
    """The part of `agent.update.trust.DeviceTrust` that is asked."""

    def reconfirm(self, item: Item, manifest: Manifest) -> None:
        """Raise `Rejected` if publishers no longer stand by a committed item."""


def find_violations(trust: Reconfirms, policy: Policy, committed: Iterable[Committed]) -> tuple[Violation, ...]:
    """What speaks against each committed item that should not run any more.

    Args:
        trust: asked for revocations, ceilings and epochs.
        policy: the board owner's.
        committed: what runs.
    """
    asked = ((each, _doubt(trust, policy, each)) for each in committed)
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


def _doubt(trust: Reconfirms, policy: Policy, committed: Committed) -> Rejected | None:
    item, manifest = committed.item, committed.manifest
    try:
        trust.reconfirm(item, manifest)
    except Rejected as error:
        if error.code in REASONS:
            return error
    denied = policy.denied(manifest.grants if item.grants is None else item.grants)
    if denied:
        return Rejected(RejectCode.GRANT_DENIED, f"this board's own policy does not allow {', '.join(denied)}")
    return None

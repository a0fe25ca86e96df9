"""Verifier: decides whether a device may act on what the director and publishers signed.

Pure functions: trusted metadata (`signing.trusted_metadata`), remembered versions (`VerifierState`) and the time go in;
the accepted document and the state to store come out, or `Rejected` is raised. Nothing here uses a file, a socket or a
clock, and a refusal changes no state.

    trusted = updater.refresh(state.time(wall_clock))
    accepted = accept_assignment(trusted, envelope, fleet=..., device=..., state=states.load(), now=...)
    states.save(accepted.state)                                         # before anything in it is fetched
    resolved = resolve(updater.find(item.target), item, state=accepted.state, arch="aarch64")

Together, the functions are what the Uptane Standard calls full verification: first the time, then the director's
metadata, then the publishers' metadata, and last that both name the same bytes, the same manifest and no older security
epoch. A single TUF repository serves as both of Uptane's repositories: the director signs envelopes under a delegation.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from fleet.protocol.assignment import Assignment, Command, Fresh, Item, LaterCommand
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import Grants, Manifest
from fleet.protocol.names import TargetName
from signing import director, metadata, policy
from signing.errors import Rejected
from signing.metadata import DIRECTOR, ceiling, profile
from signing.policy import Release, Resolved
from signing.state import VerifierState
from signing.trusted_metadata import Found, TrustedMetadata


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """Accepted assignment: store `state` before acting on it.

    Attributes:
        assignment: the device's complete desired state.
        sha256: of the payload, in hex; freshness statements and reports refer to it.
        state: with the accepted version and a raised time floor.
    """

    assignment: Assignment
    sha256: str
    state: VerifierState


class Challenge(NamedTuple):
    """Challenge that a freshness statement must answer.

    Attributes:
        nonce: chosen by the device for this connection.
        sha256: of the accepted assignment's payload.
    """

    nonce: str
    sha256: str


class AcceptedFreshness(NamedTuple):
    """Accepted freshness statement, and the state to store."""

    statement: Fresh
    state: VerifierState


class AcceptedCommand(NamedTuple):
    """Accepted command, and the state to store before it is carried out."""

    command: Command | LaterCommand
    state: VerifierState


# -- the director: what this device should run ------------------------------------------------------------------------


def accept_assignment(
    trusted: TrustedMetadata,
    envelope: bytes,
    *,
    fleet: str,
    device: str,
    state: VerifierState,
    now: datetime,
    allow_expired_online: bool = False,
) -> Accepted:
    """Verify an assignment.

    Order of the checks: expiry of the signed roles, size, signature, fleet and device, version (an equal version must
    have the same payload), expiry, emptiness, minimum snapshot version.

    Args:
        trusted: metadata of a successful refresh.
        envelope: the document as received.
        fleet: the device's fleet.
        device: the device's id.
        state: as stored after the refresh.
        now: the reference time; may be later than the refresh's, after a freshness statement.
        allow_expired_online: accept an expired timestamp and snapshot, as in the refresh.

    Raises:
        Rejected: TOO_LARGE, MALFORMED, UNSIGNED, WRONG_FLEET, WRONG_DEVICE, ROLLBACK, EQUIVOCATION, EXPIRED, FREEZE,
            EMPTY; UNREACHABLE before the first refresh.
    """
    _check_current(trusted, fleet, now, allow_expired_online=allow_expired_online)
    accepted, sha256, state = director.assignment(
        _director(trusted), envelope, fleet=fleet, device=device, state=state, now=now, clamp=_clamp(trusted)
    )
    if trusted.snapshot.version < accepted.snapshot:
        raise Rejected(
            RejectCode.FREEZE,
            f"the repository is at snapshot {trusted.snapshot.version}, but the director requires {accepted.snapshot}",
        )
    return Accepted(assignment=accepted, sha256=sha256, state=state)


def accept_freshness(
    trusted: TrustedMetadata,
    envelope: bytes,
    *,
    fleet: str,
    device: str,
    challenge: Challenge,
    state: VerifierState,
    now: datetime,
) -> AcceptedFreshness:
    """Verify a freshness statement.

    The expiry of the signed roles is not checked, as a device without a clock learns the time from this statement.

    Args:
        trusted: metadata of a successful refresh.
        envelope: the document as received.
        fleet: the device's fleet.
        device: the device's id.
        challenge: of this connection.
        state: as stored.
        now: the reference time.

    Raises:
        Rejected: as `accept_assignment`; REPLAY: another nonce; FREEZE: the director has another assignment.
    """
    _check_current(trusted, fleet, None)
    statement, state = director.fresh(
        _director(trusted),
        envelope,
        fleet=fleet,
        device=device,
        nonce=challenge.nonce,
        sha256=challenge.sha256,
        state=state,
        now=now,
        clamp=_clamp(trusted),
    )
    return AcceptedFreshness(statement, state)


def accept_command(
    trusted: TrustedMetadata, envelope: bytes, *, fleet: str, device: str, state: VerifierState, now: datetime
) -> AcceptedCommand:
    """Verify a command. Store the state before carrying it out, so that it is carried out at most once.

    Raises:
        Rejected: as `accept_assignment`; REPLAY: the sequence is not higher than the last one.
    """
    _check_current(trusted, fleet, now)
    command, state = director.command(_director(trusted), envelope, fleet=fleet, device=device, state=state, now=now)
    return AcceptedCommand(command, state)


def _check_current(
    trusted: TrustedMetadata, fleet: str, now: datetime | None, *, allow_expired_online: bool = False
) -> None:
    """Refuse signed roles of another fleet, or that have expired at `now` (None: skip the expiry)."""
    whose = profile(trusted.root).get("fleet", fleet)
    if whose != fleet:
        raise Rejected(RejectCode.WRONG_FLEET, f"the repository belongs to fleet {whose!r}, not {fleet!r}")
    if now is None:
        return
    metadata.check_expiry(trusted.root, now, "root")
    if not allow_expired_online:
        metadata.check_expiry(trusted.timestamp, now, "timestamp")
        metadata.check_expiry(trusted.snapshot, now, "snapshot")
    metadata.check_expiry(trusted.targets, now, "targets")


def _clamp(trusted: TrustedMetadata) -> datetime:
    """Return the limit of the time floor: no document raises it beyond the first expiry of the roles above it."""
    return min(trusted.expiries().values())


def _director(trusted: TrustedMetadata) -> director.Director:
    targets = trusted.targets
    return director.Director(targets=targets, role=DIRECTOR, keys=metadata.key_set(targets, (DIRECTOR,)))


# -- publishers: what an item is --------------------------------------------------------------------------------------


def published(found: Found | None, path: str) -> Release:
    """Return the release under a target path as its publisher signed it; this device may still refuse to run it.

    Args:
        found: result of `Updater.find(path)`.
        path: the target's path.

    Raises:
        Rejected: UNKNOWN_TARGET, REVOKED, MALFORMED.
    """
    if found is None:
        raise Rejected(RejectCode.UNKNOWN_TARGET, f"{path[:200]!r} is not published")
    if found.revoked or found.target is None:
        raise Rejected(RejectCode.REVOKED, f"{path} was revoked by its publisher")
    return policy.release_of(path, found.target)


def resolve(
    found: Found | None, item: Item, *, state: VerifierState, local: Grants | None = None, arch: str = ""
) -> Resolved:
    """Check an item of an accepted assignment against what its publisher signed, for this device.

    Args:
        found: result of `Updater.find(item.target)`.
        item: from an accepted assignment.
        state: source of the committed security epochs and versions of secrets.
        local: the device owner's policy; None for no limit.
        arch: the device's CPU, see `policy.check_allowed`.

    Raises:
        Rejected: UNKNOWN_TARGET, REVOKED, TARGET_MISMATCH, WRONG_ARCH, SECURITY_EPOCH, GRANT_DENIED, MALFORMED.
    """
    release = published(found, item.target)
    assert found is not None
    policy.check_same(item, release)
    grants = policy.check_allowed(item, release, state=state, ceilings=found.ceilings, local=local, arch=arch)
    return Resolved(item=item, release=release, grants=grants)


def reconfirm(
    trusted: TrustedMetadata,
    item: Item,
    manifest: Manifest,
    *,
    state: VerifierState,
    local: Grants | None = None,
    arch: str = "",
) -> Resolved:
    """Check a committed item against later changes (revocation, ceiling, policy) without searching the target again.

    An expired or unreachable namespace is no violation, so that it does not stop running components.

    Args:
        trusted: result of `Updater.look_for_revocations(item.target)`.
        item: equal to the committed item, except for attempt and rollout.
        manifest: the publisher's, as resolved at that time.
        state: see `resolve`.
        local: see `resolve`.
        arch: see `resolve`.

    Raises:
        Rejected: REVOKED, GRANT_DENIED, SECURITY_EPOCH.
    """
    release = Release(name=TargetName.from_path(item.target), manifest=manifest, length=item.length, sha256=item.sha256)
    if trusted.is_revoked(item.target):
        raise Rejected(RejectCode.REVOKED, f"{item.target} was revoked by its publisher")
    ceilings = [limit for name in trusted.namespaces_of(item.target) for limit in ceiling(trusted.targets, name)]
    grants = policy.check_allowed(item, release, state=state, ceilings=ceilings, local=local, arch=arch)
    return Resolved(item=item, release=release, grants=grants)

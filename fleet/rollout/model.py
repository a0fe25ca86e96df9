"""Outcome of one device in one rollout, and how a report or the end of the rollout changes it.

A signed report decides, nothing else: it must carry an assignment that offered the version, and the version's manifest.
Reports may be lost, late, doubled or reordered. Of those that decide, the one with the greatest sequence number counts,
so the order in which they arrive makes no difference; of the others the newest counts, until one decides.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from dataclasses import replace as with_fields
from typing import Final

import msgspec
from msgspec.structs import replace

from fleet.protocol.codes import OPEN_STATES, Outcome, Phase, RolloutState, outcome_of


@dataclass(frozen=True, slots=True)
class Value:
    """Desired state of an instance.

    Attributes:
        target: TUF target path; None for "not there", which a removal leaves behind.
        config: pairs of key and value, sorted by key.
        grants: narrowed grants as canonical JSON, empty for all that the manifest asks.
        port: a port of its own, None for the shared one.
        share_worker: whether it may share a worker with other instances of its publisher.
        keep_data: of an absent instance, whether its data stays on the device.
        attempt: raised to make a device try again what failed there.
        atomic: the word that it shares with what is swapped together with it; empty for what is swapped alone.
    """

    target: str | None
    config: tuple[tuple[str, str], ...] = ()
    grants: str = ""
    port: int | None = None
    keep_data: bool = False
    attempt: int = 0
    share_worker: bool = False
    atomic: str = ""

    def same(self, other: "Value") -> bool:
        """Tell whether a device would run the same by both."""
        return with_fields(self, attempt=0, atomic="") == with_fields(other, attempt=0, atomic="")


OPEN: Final = frozenset({Outcome.PENDING, Outcome.WAITING, Outcome.DEFERRED, Outcome.IN_PROGRESS, Outcome.LOST})
"""Outcomes that the device may still change by a report."""

UNDER_WAY: Final = frozenset({Outcome.WAITING, Outcome.IN_PROGRESS})
UNCOUNTED: Final = frozenset({Outcome.UNPROVEN, Outcome.NOT_AFFECTED, Outcome.REVERTED, Outcome.SUPERSEDED})
"""Outcomes that are named, in no count."""

FROM_SWAP: Final = frozenset({Phase.SWAPPING, Phase.PROBATION, Phase.ROLLING_BACK})
_TOO_OLD: Final = "its agent is too old to sign its state"
_DECIDED: Final = frozenset({Outcome.SUCCEEDED, Outcome.FAILED, Outcome.UNPROVEN})


class Member(msgspec.Struct, frozen=True):
    """A device in a rollout. Times are seconds of the caller's steady clock, None until it happened.

    Attributes:
        wave: from 1; 0 for a device that is never offered the change.
        rank: its place in the draw, which decides who takes an open vacancy of wave 1.
        reason: why it is deferred, lost, not affected or unproven; of a success, why it is undecided.
        until: when a deferred device goes on, by its own word.
        tries_ended: it does not try again by itself.
        site: value of the label by which the budget counts; empty for none.
        canary: whether it may take an open vacancy of wave 1.
        attempt, sequence: of the newest report that counted; `decided` of the newest that decided.
        offered_at: when it was offered the change first; an offer that was withdrawn keeps it.
        began_at, moved_at: its first report; its newest one that showed progress.
        heard_at: any message of it, signed or not.
        online_since: None while it is offline.
        busy: another rollout has it in progress.
        replaced: a canary that went away: its failure counts, it holds up nothing.
        accepted: the failure or loss that an operator accepted by resuming.
        arrival: offered from the catch-up queue, after the rollout succeeded.
        new: an arrival that runs nothing under this name yet, or has the value already: it does not wait in the queue.
        cancelled: an operator left it out of this rollout.
        returning: the rollout ended, and the device has not confirmed its previous version yet.
    """

    device: str
    wave: int
    outcome: Outcome = Outcome.PENDING
    rank: int = 0
    reason: str = ""
    until: float | None = None
    tries_ended: bool = False
    site: str = ""
    canary: bool = True
    phase: str = ""
    progress: int | None = None
    code: str = ""
    message: str = ""
    running: str = ""
    exercised: bool = True
    attempt: int = 0
    sequence: int = 0
    decided: int = 0
    offered_at: float | None = None
    began_at: float | None = None
    moved_at: float | None = None
    heard_at: float | None = None
    online_since: float | None = None
    busy: bool = False
    ended_at: float | None = None
    replaced: bool = False
    accepted: Outcome | None = None
    arrival: bool = False
    new: bool = False
    returning: bool = False
    cancelled: bool = False

    @property
    def online(self) -> bool:
        """Tell whether the device is connected, as far as the server knows."""
        return self.online_since is not None

    @property
    def counted(self) -> bool:
        """Tell whether the device is in the counts of its wave."""
        return self.wave > 0 and self.outcome not in UNCOUNTED

    @property
    def swapping(self) -> bool:
        """Tell whether the device had begun to swap by its newest report."""
        return self.phase in FROM_SWAP

    @property
    def undecided(self) -> bool:
        """Tell whether a gate on metrics had too few samples to be a success, and no operator has decided."""
        return self.outcome is Outcome.SUCCEEDED and bool(self.reason) and self.accepted is not self.outcome

    def counts_as(self, outcome: Outcome) -> bool:
        """Tell whether the device has this outcome and no operator accepted it."""
        return self.outcome is outcome and self.accepted is not outcome


class Observation(msgspec.Struct, frozen=True):
    """Report of a device about the instance of a rollout.

    Attributes:
        at: when the server had it, on its steady clock.
        sequence: grows with each report of the device, over reboots too.
        generation: of the instance as the device signs it; None from an agent that does not say it.
        undecided: which gates on metrics had too few samples; empty for none.
        until: when the device goes on by itself, None where it does not say.
        tries_ended: the device does not try again by itself, although it mostly does after this code.
    """

    at: float
    sequence: int
    phase: str
    signed: bool = True
    attempt: int = 0
    assignment_sha256: str = ""
    manifest_sha256: str = ""
    generation: int | None = None
    code: str = ""
    message: str = ""
    running: str = ""
    progress: int | None = None
    exercised: bool = True
    until: float | None = None
    tries_ended: bool = False
    undecided: str = ""


class Expected(msgspec.Struct, frozen=True):
    """Proof that a report must carry: an assignment that offered the value, and the manifest (empty for a removal)."""

    assignments: frozenset[str]
    manifest_sha256: str

    def proven_by(self, seen: Observation) -> bool:
        """Tell whether a report carries both."""
        return seen.assignment_sha256 in self.assignments and seen.manifest_sha256 == self.manifest_sha256


def observe(member: Member, seen: Observation, expected: Expected) -> Member:
    """Return the member after a report of an open rollout; the same object where the report changes nothing."""
    if member.offered_at is None or seen.attempt < member.attempt or seen.phase == Phase.IDLE:
        return member
    before = member if seen.attempt == member.attempt else _again(member, seen)
    outcome = _outcome(seen, expected)
    if outcome is None:
        return member
    if outcome in _DECIDED:
        return member if seen.sequence <= before.decided else _decide(before, seen, outcome)
    if before.decided or before.outcome is Outcome.SUPERSEDED or seen.sequence <= before.sequence:
        return member
    moved = (seen.phase, seen.progress) != (before.phase, before.progress) or outcome is not before.outcome
    return replace(
        _heard(before, seen),
        outcome=outcome,
        moved_at=seen.at if moved else before.moved_at,
        reason=(seen.code or seen.message) if outcome is Outcome.DEFERRED else "",
        until=seen.until if outcome is Outcome.DEFERRED else None,
        ended_at=seen.at if outcome is Outcome.SUPERSEDED else None,
    )


def _again(member: Member, seen: Observation) -> Member:
    """Return the member at the beginning of a later attempt."""
    return replace(
        member, attempt=seen.attempt, sequence=0, decided=0, outcome=Outcome.WAITING, ended_at=None, accepted=None
    )


def _outcome(seen: Observation, expected: Expected) -> Outcome | None:
    """Return the outcome that a report speaks for; None for a report that is about something else."""
    ended = seen.phase in {Phase.COMMITTED, Phase.FAILED, Phase.ROLLED_BACK}
    if ended and not seen.signed:
        return Outcome.UNPROVEN
    if seen.phase == Phase.COMMITTED:
        unsaid = seen.generation is None and bool(expected.manifest_sha256)  # a removed instance has no generation
        if unsaid and seen.assignment_sha256 in expected.assignments | {""}:
            return Outcome.UNPROVEN
        return Outcome.SUCCEEDED if expected.proven_by(seen) else None
    return outcome_of(seen.code, seen.phase) if ended else Outcome.IN_PROGRESS


def _decide(member: Member, seen: Observation, outcome: Outcome) -> Member:
    """Return the member after a report that decides."""
    again = member.outcome is outcome
    return replace(
        _heard(member, seen),
        outcome=outcome,
        message=_TOO_OLD if outcome is Outcome.UNPROVEN else seen.message,
        decided=seen.sequence,
        ended_at=member.ended_at if again and member.ended_at is not None else seen.at,
        moved_at=seen.at,
        reason={Outcome.UNPROVEN: _TOO_OLD, Outcome.SUCCEEDED: seen.undecided}.get(outcome, ""),
        until=None,
        accepted=member.accepted if again else None,
    )


def _heard(member: Member, seen: Observation) -> Member:
    return replace(
        member,
        sequence=max(member.sequence, seen.sequence),
        began_at=seen.at if member.began_at is None else member.began_at,
        heard_at=seen.at,
        phase=seen.phase,
        progress=seen.progress,
        code=seen.code,
        message=seen.message,
        running=seen.running or member.running,
        exercised=seen.exercised,
        tries_ended=seen.tries_ended,
    )


def returned(member: Member, seen: Observation, previous: Expected) -> Member:
    """Return the member of an ended rollout after a report: it is reverted once it has confirmed what it had before."""
    if not member.returning or not seen.signed or seen.phase != Phase.COMMITTED or not previous.proven_by(seen):
        return member
    return replace(
        _heard(member, seen), outcome=Outcome.REVERTED, returning=False, ended_at=seen.at, reason="", progress=None
    )


_HAS_OFFER: Final = UNDER_WAY | {
    Outcome.DEFERRED,
    Outcome.SUCCEEDED,
    Outcome.FAILED,
    Outcome.LOST,
    Outcome.UNPROVEN,
}


_OVERLAYS: Final = OPEN_STATES | {RolloutState.SUPERSEDED}


def wants(state: RolloutState, member: Member) -> bool:
    """Tell whether the device is to run what the rollout offers.

    While a rollout is open, and while one that is open has taken its place, that is who was offered it; once it has
    succeeded, everybody but who still waits in the catch-up queue or was left out.
    """
    if member.returning:
        return False
    if state is RolloutState.SUCCEEDED:
        return not held_back(member)
    return state in _OVERLAYS and member.outcome in _HAS_OFFER


def held_back(member: Member) -> bool:
    """Tell whether a settled value does not reach the device yet: it keeps what it was assigned before."""
    queued = member.outcome is Outcome.PENDING and not member.new
    return queued or (member.outcome is Outcome.NOT_AFFECTED and member.cancelled)


def leave(member: Member, reason: str) -> Member:
    """Return a member that leaves the counts: revoked, masked or out of the group."""
    if member.outcome in UNCOUNTED:
        return member
    return replace(member, outcome=Outcome.NOT_AFFECTED, reason=reason, until=None)


def cancel(member: Member, by: str) -> Member:
    """Return a member that an operator leaves out of the rollout: it keeps, or goes back to, what it had before."""
    return replace(member, outcome=Outcome.NOT_AFFECTED, reason=f"cancelled by {by}", until=None, cancelled=True)


def overtaken(member: Member, reason: str) -> Member:
    """Return a member that a pin or a later rollout offers something else."""
    if member.outcome in UNCOUNTED | {Outcome.FAILED}:
        return member
    return replace(member, outcome=Outcome.SUPERSEDED, reason=reason, until=None, returning=False)


def after_end(state: RolloutState, members: Iterable[Member], *, keep: bool = False) -> tuple[Member, ...]:
    """Return the members of a rollout that ended without success.

    With `keep` devices stay at what they run: those that have the version or began with it keep their outcome.
    """
    if state is RolloutState.SUPERSEDED:
        return tuple(overtaken(each, "a newer rollout took over") if each.outcome in OPEN else each for each in members)
    return tuple(_after_end(each, keep=keep) for each in members)


def _after_end(member: Member, *, keep: bool) -> Member:
    if member.outcome in UNCOUNTED | {Outcome.FAILED}:
        return member
    if member.offered_at is None:
        return replace(member, outcome=Outcome.NOT_AFFECTED, reason="the rollout ended before it was offered")
    if keep and (member.outcome is Outcome.SUCCEEDED or member.began_at is not None):
        return member
    return replace(
        member, outcome=Outcome.WAITING, returning=True, reason="goes back to what it had before", ended_at=None
    )

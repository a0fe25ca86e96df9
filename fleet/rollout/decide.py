"""Next step of a rollout and of its catch-up queue: pure functions of the rollout, its members and the time.

`decide` returns actions; `fleet.rollout.advance` applies them until the rollout waits. The gate of a wave opens when

1. every online member of the wave has an outcome or is deferred,
2. enough of its members have succeeded,
3. no more have failed than allowed: otherwise the rollout reverts, or pauses where it says so,
4. no more are lost than allowed: otherwise the rollout pauses; nobody is taken back for silence,
5. the soak is over, which runs from the success that met 2,
6. its stage is approved, where it wants that.

Absence is no verdict: a device that went away before its swap is `waiting`, from the swap on it is `lost`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from fleet.protocol.codes import OPEN_STATES, OnBreach, Outcome, PauseCause, RolloutState
from fleet.rollout.members import Amount
from fleet.rollout.model import FROM_SWAP, OPEN, UNDER_WAY, Member

LOST_S: Final = 600.0
"""Silence after which a device that began to swap is lost."""

CANARY_AWAY_S: Final = 60.0
"""Absence after which a canary that has not answered is replaced: longer than a broken connection takes to return."""

REPLACED_MAX: Final = 2
ARRIVALS_S: Final = 7 * 86_400.0
"""Arrivals that the limits of the catch-up queue count over."""

_MAY_BE_SILENT: Final = frozenset({Outcome.WAITING, Outcome.IN_PROGRESS, Outcome.DEFERRED})
_NAMED_MAX: Final = 3
_TENTH: Final = Amount(10, percent=True)
_HUNDREDTH: Final = Amount(1, percent=True)
_TWENTIETH: Final = Amount(5, percent=True)


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of each wave.

    Attributes:
        min_success: of the wave's members, rounded up, at least 1.
        failures: None for 0 in wave 1 and 1% in later ones, rounded down.
        lost: None for 0 in wave 1 and 5% in later ones.
        at_once: devices in progress at any time, 0 for no limit.
        min_available: members of each site that stay online and idle; None for no budget.
        catch_up: arrivals in progress at any time after the rollout succeeded, of the group, at least 1.
        timeout_s: time without progress after which an online device is deferred as stuck.
    """

    min_success: Amount = _TENTH
    failures: Amount | None = None
    lost: Amount | None = None
    on_breach: OnBreach = OnBreach.ROLLBACK
    at_once: int = 0
    min_available: int | None = None
    catch_up: Amount = _TWENTIETH
    timeout_s: float = 900.0


@dataclass(frozen=True, slots=True)
class Gate:
    """Gate of one wave beside the limits."""

    soak_s: float = 0.0
    approval: bool = False


class Rollout(msgspec.Struct, frozen=True):
    """A change on its way.

    Attributes:
        gates: one for each wave.
        wave: how many waves have been opened.
        vacancies: places of wave 1 for the first devices that come online.
        replaced: canaries that went away and were replaced.
        causes: why it is paused; it runs when none is left.
        approved: waves whose gate somebody approved; 0 for the approval before the first wave.
        approval: whether the first wave waits for that.
        closed: why its catch-up queue is closed; empty for open.
    """

    state: RolloutState
    gates: tuple[Gate, ...]
    limits: Limits = Limits()
    wave: int = 0
    vacancies: int = 0
    replaced: int = 0
    causes: frozenset[PauseCause] = frozenset()
    approved: frozenset[int] = frozenset()
    closed: str = ""
    approval: bool = False

    @property
    def unapproved(self) -> bool:
        """Tell whether it waits for the approval before the first wave."""
        return self.approval and 0 not in self.approved


@dataclass(frozen=True, slots=True)
class Open:
    """Open wave `wave` (from 1)."""

    wave: int


@dataclass(frozen=True, slots=True)
class Offer:
    """Offer the change to these devices."""

    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Take the offer to these devices back: none of them has begun, or it is away."""

    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Mark:
    """Give these devices an outcome for their silence: waiting, lost, or deferred as stuck."""

    outcome: Outcome
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Promote:
    """Move these devices, the first that came online, into wave 1."""

    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Replace:
    """Let another device be the canary, since `device` went away before it answered."""

    device: str
    by: str


@dataclass(frozen=True, slots=True)
class Pause:
    """Pause the rollout."""

    cause: PauseCause
    reason: str


@dataclass(frozen=True, slots=True)
class Revert:
    """End the rollout: every device that took the version goes back to the settled value."""

    reason: str


@dataclass(frozen=True, slots=True)
class Succeed:
    """Settle the value. The members without an outcome pass the catch-up queue."""

    stragglers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Close:
    """Close the catch-up queue: more arrivals failed than allowed."""

    reason: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do now.

    Attributes:
        reason: a sentence; empty for a settled rollout that nobody waits in.
        devices: whom the rollout waits for.
        until: when to look again, None: at the next report.
    """

    reason: str
    devices: tuple[str, ...] = ()
    until: float | None = None


Action = Open | Offer | Withdraw | Mark | Promote | Replace | Pause | Revert | Succeed | Close | Wait


def decide(rollout: Rollout, members: Sequence[Member], now: float, *, besides: int = 0) -> tuple[Action, ...]:
    """Return the next step; apply it and call again. Every sequence ends in a `Wait` or a state that is over.

    Args:
        rollout: as it is.
        members: all of them, without those of `besides`.
        now: the time.
        besides: counted members of a rollout that succeeded, without a budget for its sites, which are not given: they
            had an outcome by then, and are in the size of the catch-up queue alone.
    """
    if rollout.state is RolloutState.SUCCEEDED:
        return _catch_up(rollout, members, now, besides)
    if rollout.state not in OPEN_STATES:
        return ()
    return (
        _silences(rollout, members, now)
        or _judge(rollout, members)
        or _paused(rollout, members, now)
        or _canaries(rollout, members, now)
        or _offers(rollout, members)
        or _gate(rollout, members, now)
    )


# -- silence ---------------------------------------------------------------------------------------------------------


def _silences(rollout: Rollout, members: Iterable[Member], now: float) -> tuple[Action, ...]:
    """Give an outcome to each offered device that says nothing; none of them is a verdict on the version."""
    found: dict[Outcome, list[str]] = {}
    for member in members:
        outcome = _silence(rollout, member, now) if member.outcome in _MAY_BE_SILENT else None
        if outcome is not None:
            found.setdefault(outcome, []).append(member.device)
    return tuple(Mark(outcome, tuple(devices)) for outcome, devices in found.items())


def _silence(rollout: Rollout, member: Member, now: float) -> Outcome | None:
    if member.returning:
        return None
    if member.outcome is not Outcome.WAITING and member.swapping:
        if now >= _lost_at(member):
            return Outcome.LOST
    elif member.outcome is Outcome.IN_PROGRESS and not member.online:
        return Outcome.WAITING
    if member.outcome in UNDER_WAY and member.online and now >= _stuck_at(rollout, member):
        return Outcome.DEFERRED
    return None


def _lost_at(member: Member) -> float:
    return (member.heard_at or 0) + LOST_S


def _stuck_at(rollout: Rollout, member: Member) -> float:
    return max(member.offered_at or 0, member.moved_at or 0, member.online_since or 0) + rollout.limits.timeout_s


# -- breach and loss ---------------------------------------------------------------------------------------------------


def _judge(rollout: Rollout, members: Sequence[Member]) -> tuple[Action, ...]:
    """Return what must happen at once, in whichever wave: more failures or losses than a gate allows."""
    if not any(each.outcome in {Outcome.FAILED, Outcome.LOST} for each in members):
        return ()
    for wave in range(1, rollout.wave + 1):
        failed = [each for each in members if each.wave == wave and each.counts_as(Outcome.FAILED)]
        if len(failed) > _allowed(members, wave, rollout.limits.failures, _HUNDREDTH):
            return _breach(rollout, _blame(failed))
    for wave in range(1, rollout.wave + 1):
        lost = [each for each in members if each.wave == wave and each.counts_as(Outcome.LOST)]
        allowed = _allowed(members, wave, rollout.limits.lost, _TWENTIETH)
        if len(lost) > allowed and PauseCause.LOST not in rollout.causes:
            return (Pause(PauseCause.LOST, f"{_names(lost)} lost: silent since the swap began"),)
    return ()


def _allowed(members: Iterable[Member], wave: int, limit: Amount | None, later: Amount) -> int:
    """Return how many devices of a wave may fail or be lost."""
    if limit is None and wave == 1:
        return 0
    return (limit or later).down(sum(each.counted for each in members if each.wave == wave))


def _breach(rollout: Rollout, reason: str) -> tuple[Action, ...]:
    if rollout.limits.on_breach is OnBreach.ROLLBACK:
        return (Revert(reason),)
    return () if PauseCause.BREACH in rollout.causes else (Pause(PauseCause.BREACH, reason),)


def _paused(rollout: Rollout, members: Iterable[Member], now: float) -> tuple[Action, ...]:
    """Withdraw what no device has begun, then rest; waits for nobody."""
    if not rollout.causes:
        return ()
    unbegun = tuple(each.device for each in members if each.outcome is Outcome.WAITING and each.began_at is None)
    if unbegun:
        return (Withdraw(unbegun),)
    return (Wait("", until=_next_silence(rollout, members, now)),)


# -- canaries ----------------------------------------------------------------------------------------------------------


def _canaries(rollout: Rollout, members: Sequence[Member], now: float) -> tuple[Action, ...]:
    """Fill the open vacancies of wave 1 with the first that come, and replace canaries that went away."""
    if rollout.wave > 1 or len(rollout.gates) == 1:
        return ()
    fresh = (each for each in members if each.wave > 1 and each.online and each.canary and _fresh(each))
    idle = sorted(fresh, key=lambda each: each.rank)
    if not idle:
        return ()
    if rollout.vacancies:
        return (Promote(tuple(each.device for each in idle[: rollout.vacancies])),)
    first = [each for each in members if each.wave == 1 and not each.replaced]
    gone = [each for each in first if _gone(each, now)]
    if rollout.wave == 0 or not gone or rollout.replaced == REPLACED_MAX or _enough(rollout, first, len(gone)):
        return ()
    return (Replace(gone[0].device, idle[0].device),)


def _enough(rollout: Rollout, first: Sequence[Member], gone: int) -> bool:
    """Tell whether the canaries that are left can meet the gate."""
    counted = sum(each.counted for each in first)
    failed = sum(each.outcome is Outcome.FAILED for each in first)
    return len(first) - gone - failed >= max(1, rollout.limits.min_success.up(counted))


def _fresh(member: Member) -> bool:
    return member.outcome is Outcome.PENDING and member.offered_at is None


def _gone(member: Member, now: float) -> bool:
    """Tell whether a canary went away before it answered."""
    if not member.counted:
        return True
    away = member.outcome in {Outcome.PENDING, Outcome.WAITING} and not member.online
    return away and now >= _away_until(member)


def _away_until(member: Member) -> float:
    return max(member.heard_at or 0, member.offered_at or 0) + CANARY_AWAY_S


# -- offers ------------------------------------------------------------------------------------------------------------


def _offers(rollout: Rollout, members: Sequence[Member]) -> tuple[Action, ...]:
    """Offer the change to members of open waves, within the limit at once and the budget of each site."""
    if rollout.wave == 0 and rollout.unapproved:
        return (Pause(PauseCause.APPROVAL, "nothing is offered before the approval of a second person"),)
    if rollout.wave == 0:
        return (Open(1),)
    last = rollout.wave == len(rollout.gates)
    due = [
        each
        for each in members
        if each.outcome is Outcome.PENDING and 0 < each.wave <= rollout.wave and (last or not each.replaced)
    ]
    limits = rollout.limits
    if not limits.at_once and limits.min_available is None:
        return (Offer(tuple(each.device for each in due)),) if due else ()
    absent = tuple(each.device for each in members if _withdrawn(each))
    if absent:
        return (Withdraw(absent),)
    free = limits.at_once - _under_way(members) if limits.at_once else len(due)
    admitted = _within_budget(limits, members, [each for each in due if each.online], free)
    return (Offer(admitted),) if admitted else ()


def _withdrawn(member: Member) -> bool:
    """Tell whether an offer under a limit is taken back: the device is away, and has not begun to swap."""
    return member.outcome is Outcome.WAITING and not member.online and not member.returning


def _under_way(members: Iterable[Member]) -> int:
    return sum(each.outcome in UNDER_WAY and not each.returning for each in members)


def _within_budget(limits: Limits, members: Iterable[Member], due: Iterable[Member], free: int) -> tuple[str, ...]:
    """Return the first of `due` that leave every site its budget, at most `free`."""
    spare = _spare(limits, members)
    admitted: list[str] = []
    for member in due:
        if len(admitted) >= free:
            break
        if spare is not None and not member.busy:  # a member that is busy elsewhere is unavailable already
            if spare[member.site] <= 0:
                continue
            spare[member.site] -= 1
        admitted.append(member.device)
    return tuple(admitted)


def _spare(limits: Limits, members: Iterable[Member]) -> Counter[str] | None:
    """Return how many devices of each site may be taken away; None without a budget."""
    if limits.min_available is None:
        return None
    spare: Counter[str] = Counter()
    for site in {each.site for each in members}:
        spare[site] = -limits.min_available
    for member in members:
        spare[member.site] += member.online and not member.busy and not _occupied(member)
    return spare


def _occupied(member: Member) -> bool:
    """Tell whether a device has an offer that it may be at, or begin with, at any moment."""
    return member.outcome in {Outcome.WAITING, Outcome.IN_PROGRESS, Outcome.DEFERRED, Outcome.LOST}


# -- the gate ----------------------------------------------------------------------------------------------------------


def _gate(rollout: Rollout, members: Sequence[Member], now: float) -> tuple[Action, ...]:
    """Open the next wave, end the rollout, or say what the gate of the present wave waits for."""
    wave = rollout.wave
    inside = [each for each in members if each.wave == wave and each.counted and not each.replaced]
    if not any(each.counted or each.outcome is Outcome.UNPROVEN for each in members):
        return (Revert("no device is left that the change concerns"),)
    mute = [] if inside or rollout.vacancies else [each for each in members if each.wave == wave and _mute(each)]
    if mute:
        return (Pause(PauseCause.CANARY, f"no device of wave {wave} can answer: {_names(mute)} {mute[0].outcome}"),)
    held = _held(rollout, members, inside, now)
    if held is not None:
        return (held,) if not isinstance(held, Revert) else _breach(rollout, held.reason) or (Wait(held.reason),)
    gate = rollout.gates[wave - 1]
    if gate.approval and wave not in rollout.approved:
        return (Pause(PauseCause.APPROVAL, f"wave {wave} is done and wants the approval of a second person"),)
    if wave < len(rollout.gates):
        return (Open(wave + 1),)
    return (Succeed(tuple(each.device for each in members if each.wave and each.outcome in OPEN)),)


def _mute(member: Member) -> bool:
    """Tell whether a member that was to give evidence for the next wave never will."""
    if member.accepted is member.outcome:
        return False
    return member.outcome is Outcome.UNPROVEN or (member.wave == 1 and not member.counted)


def _held(rollout: Rollout, members: Sequence[Member], inside: Sequence[Member], now: float) -> Wait | Revert | None:
    """Return what keeps the gate of the present wave shut; None for nothing."""
    wave, until = rollout.wave, _next_silence(rollout, members, now)
    if rollout.vacancies and not inside:
        first = [each for each in members if each.canary and each.outcome is Outcome.PENDING]
        reason = f"wave {wave} waits for the first device that comes online: {_names(first)}"
        return Wait(reason, _devices(first), until)
    at_it = [each for each in inside if _holds(each)]
    if at_it:
        return Wait(f"wave {wave} waits for {_names(at_it)}", _devices(at_it), until)
    unaccepted = [each for each in inside if not (each.accepted and each.accepted is each.outcome)]
    done = sorted(each.ended_at or 0 for each in inside if each.outcome is Outcome.SUCCEEDED)
    need = max(1, rollout.limits.min_success.up(len(unaccepted))) if unaccepted else 0
    if len(done) < need:
        open_still = [each for each in inside if each.outcome in OPEN]
        if len(done) + len(open_still) < need:
            return Revert(_blame([each for each in inside if each.outcome is Outcome.FAILED]))
        successes = "1 success" if need == 1 else f"{need} successes"
        reason = f"wave {wave} needs {successes} and has {len(done)}; it waits for {_names(open_still)}"
        return Wait(reason, _devices(open_still), until)
    gate = rollout.gates[wave - 1]
    ready = done[need - 1] + gate.soak_s if need else now
    if now < ready:
        return Wait(f"wave {wave} soaks for {gate.soak_s:g} s", until=min(ready, until or ready))
    return None


def _holds(member: Member) -> bool:
    """Tell whether a member must answer before the gate opens."""
    if member.outcome is Outcome.IN_PROGRESS:
        return True
    return member.online and member.outcome in {Outcome.PENDING, Outcome.WAITING}


def _next_silence(rollout: Rollout, members: Iterable[Member], now: float) -> float | None:
    """Return when the next silence gets a name, or a canary is replaced."""
    return min((time for time in deadlines(rollout, members) if time > now), default=None)


def deadlines(rollout: Rollout, members: Iterable[Member]) -> Iterator[float]:
    """Yield each time at which the silence of a member gets a name, or a canary is replaced, past ones too."""
    for member in members:
        if member.outcome not in OPEN or member.returning:
            continue
        if member.phase in FROM_SWAP and member.outcome in {Outcome.IN_PROGRESS, Outcome.DEFERRED}:
            yield _lost_at(member)
        if member.outcome in UNDER_WAY and member.online:
            yield _stuck_at(rollout, member)
        if member.wave == 1 == rollout.wave and not member.online:
            yield _away_until(member)


# -- catch-up queue ----------------------------------------------------------------------------------------------------


def _catch_up(rollout: Rollout, members: Sequence[Member], now: float, besides: int) -> tuple[Action, ...]:
    """Admit devices that come after the rollout succeeded, at most so many at once, until too many of them fail."""
    marks = _silences(rollout, members, now)
    if marks:
        return marks
    recent = [each for each in members if each.arrival and (each.offered_at or -ARRIVALS_S) > now - ARRIVALS_S]
    failed = [each for each in recent if each.counts_as(Outcome.FAILED)]
    if not rollout.closed and len(failed) > (rollout.limits.failures or _HUNDREDTH).down(len(recent)):
        return (Close(_blame(failed)),)
    shut = bool(rollout.closed or rollout.causes)
    absent = tuple(
        each.device
        for each in members
        if (each.arrival and not each.new and _withdrawn(each)) or (shut and _unbegun_arrival(each))
    )
    if absent:
        return (Withdraw(absent),)
    due = [each for each in members if each.arrival and each.outcome is Outcome.PENDING]
    frozen = PauseCause.FREEZE in rollout.causes
    new = tuple(each.device for each in due if each.new and not frozen)
    if new:
        return (Offer(new),)
    queued = [each for each in due if each.online and not each.new]
    if not shut and queued:
        busy = {*UNDER_WAY, Outcome.LOST}
        at_once = max(1, rollout.limits.catch_up.down(besides + sum(each.counted for each in members)))
        free = at_once - sum(each.arrival and not each.new and each.outcome in busy for each in members)
        admitted = _within_budget(rollout.limits, members, queued, free)
        if admitted:
            return (Offer(admitted),)
    return (_queue(rollout, members, due, now),)


def _unbegun_arrival(member: Member) -> bool:
    unbegun = member.outcome is Outcome.WAITING and member.began_at is None
    return member.arrival and not member.new and unbegun


def _queue(rollout: Rollout, members: Sequence[Member], due: Sequence[Member], now: float) -> Wait:
    """Say who waits in the catch-up queue."""
    if not due:
        return Wait("", until=_next_silence(rollout, members, now))
    why = f"is closed: {rollout.closed}" if rollout.closed else "is open"
    reason = f"the catch-up queue {why}; in it: {_names(due)}"
    return Wait(reason, _devices(due), _next_silence(rollout, members, now))


# -- words -------------------------------------------------------------------------------------------------------------


def _devices(members: Iterable[Member]) -> tuple[str, ...]:
    return tuple(each.device for each in members)


def _names(members: Sequence[Member]) -> str:
    shown = ", ".join(each.device if each.online else f"{each.device} (offline)" for each in members[:_NAMED_MAX])
    return shown + (f" and {len(members) - _NAMED_MAX} more" if len(members) > _NAMED_MAX else "")


def _blame(failed: Sequence[Member]) -> str:
    first = min(failed, key=lambda each: (each.ended_at or 0, each.device))
    more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
    why = f" ({first.code})" if first.code else ""
    said = f": {first.message}" if first.message else ""
    return f"{first.device}{more} {first.outcome}{why}{said}"

"""Next step of a rollout and of its catch-up queue: pure functions of the rollout, its members and the time.

`decide` returns actions; `fleet.rollout.advance` applies them until the rollout waits. The gate of a wave opens when

1. every online member of the wave has an outcome or is deferred,
2. enough of its members have succeeded,
3. no more have failed than allowed: otherwise the rollout reverts, or pauses where it says so,
4. no more are lost than allowed: otherwise the rollout pauses; nobody is taken back for silence. It pauses too for
   a device that had too few samples for a gate on metrics: that is no success before an operator says so,
5. the soak is over, which runs from the success that met 2,
6. its stage is approved, where it wants that.

Absence is no verdict: a device that went away before its swap is `waiting`, from the swap on it is `lost`.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Final

import msgspec

from fleet.protocol.codes import OPEN_STATES, OnBreach, Outcome, PauseCause, RolloutState
from fleet.rollout.members import Amount
from fleet.rollout.model import OPEN, UNDER_WAY, Member
from fleet.rollout.standing import Chosen, Clock, Kind, Standing

LOST_S: Final = 600.0
"""Silence after which a device that began to swap is lost."""

CANARY_AWAY_S: Final = 60.0
"""Absence after which a canary that has not answered is replaced: longer than a broken connection takes to return."""

REPLACED_MAX: Final = 2
ARRIVALS_S: Final = 7 * 86_400.0
"""Arrivals that the limits of the catch-up queue count over."""

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


def decide(
    rollout: Rollout, members: Iterable[Member] | Standing, now: float, *, besides: int = 0
) -> tuple[Action, ...]:
    """Return the next step; apply it and call again. Every sequence ends in a `Wait` or a state that is over.

    Args:
        rollout: as it is.
        members: all of them, without those of `besides`. Of a `Standing` that is kept from decision to decision only
            what changed is read.
        now: the time.
        besides: counted members of a rollout that succeeded, without a budget for its sites, which are not given: they
            had an outcome by then, and are in the size of the catch-up queue alone.
    """
    if rollout.state is not RolloutState.SUCCEEDED and rollout.state not in OPEN_STATES:
        return ()
    standing = members if isinstance(members, Standing) else Standing(members)
    if rollout.state is RolloutState.SUCCEEDED:
        return _catch_up(rollout, standing, now, besides)
    return (
        _silences(rollout, standing, now)
        or _judge(rollout, standing)
        or _paused(rollout, standing, now)
        or _canaries(rollout, standing, now)
        or _offers(rollout, standing)
        or _gate(rollout, standing, now)
    )


# -- silence ---------------------------------------------------------------------------------------------------------


def _silences(rollout: Rollout, members: Standing, now: float) -> tuple[Action, ...]:
    """Give an outcome to each offered device that says nothing; none of them is a verdict on the version."""
    lost = members.due(_may_be_lost, _lost_at, now)
    gone = {each.device for each in lost}
    stuck = [
        each for each in members.due(_may_be_stuck, _stuck_at(rollout.limits.timeout_s), now) if each.device not in gone
    ]
    found = {
        Outcome.LOST: _devices(lost),
        Outcome.WAITING: members.devices(_went_away),
        Outcome.DEFERRED: _devices(stuck),
    }
    marks = [Mark(outcome, silent) for outcome, silent in found.items() if silent]
    return tuple(sorted(marks, key=lambda mark: members.place(mark.devices[0])))


def _may_be_lost(kind: Kind) -> bool:
    return kind.swapping and kind.outcome in {Outcome.IN_PROGRESS, Outcome.DEFERRED} and not kind.returning


def _lost_at(member: Member) -> float:
    return (member.heard_at or 0) + LOST_S


def _went_away(kind: Kind) -> bool:
    """Tell whether a device that was at it, and had not begun to swap, is away."""
    return kind.outcome is Outcome.IN_PROGRESS and not (kind.online or kind.swapping or kind.returning)


def _may_be_stuck(kind: Kind) -> bool:
    return kind.outcome in UNDER_WAY and kind.online and not kind.returning


@lru_cache(maxsize=32)
def _stuck_at(timeout_s: float) -> Clock:
    """Return the clock that tells when a device without progress counts as stuck."""
    return lambda member: max(member.offered_at or 0, member.moved_at or 0, member.online_since or 0) + timeout_s


# -- breach and loss ---------------------------------------------------------------------------------------------------


def _judge(rollout: Rollout, members: Standing) -> tuple[Action, ...]:
    """Return what must happen at once, in whichever wave: more failures or losses than a gate allows."""
    if not members.any(lambda kind: kind.undecided or kind.outcome in {Outcome.FAILED, Outcome.LOST}):
        return ()
    for wave in range(1, rollout.wave + 1):
        failed = _counted_as(Outcome.FAILED, wave)
        if members.count(failed) > _allowed(members, wave, rollout.limits.failures, _HUNDREDTH):
            return _breach(rollout, blame(members.select(failed)))
    for wave in range(1, rollout.wave + 1):
        lost = _counted_as(Outcome.LOST, wave)
        allowed = _allowed(members, wave, rollout.limits.lost, _TWENTIETH)
        if members.count(lost) > allowed and PauseCause.LOST not in rollout.causes:
            return (Pause(PauseCause.LOST, f"{names(members.select(lost))} lost: silent since the swap began"),)
    unsure = members.select(lambda kind: 0 < kind.wave <= rollout.wave and kind.undecided)
    if unsure and PauseCause.UNDECIDED not in rollout.causes:
        why = f"{names(unsure)} ran too little for a gate on metrics: {unsure[0].reason}"
        return (Pause(PauseCause.UNDECIDED, why),)
    return ()


def _counted_as(outcome: Outcome, wave: int) -> Chosen:
    return lambda kind: kind.wave == wave and kind.counts_as(outcome)


def _allowed(members: Standing, wave: int, limit: Amount | None, later: Amount) -> int:
    """Return how many devices of a wave may fail or be lost."""
    if limit is None and wave == 1:
        return 0
    return (limit or later).down(members.count(lambda kind: kind.wave == wave and kind.counted))


def _breach(rollout: Rollout, reason: str) -> tuple[Action, ...]:
    if rollout.limits.on_breach is OnBreach.ROLLBACK:
        return (Revert(reason),)
    return () if PauseCause.BREACH in rollout.causes else (Pause(PauseCause.BREACH, reason),)


def _paused(rollout: Rollout, members: Standing, now: float) -> tuple[Action, ...]:
    """Withdraw what no device has begun, then rest; waits for nobody."""
    if not rollout.causes:
        return ()
    unbegun = members.devices(lambda kind: kind.outcome is Outcome.WAITING and not kind.began)
    if unbegun:
        return (Withdraw(unbegun),)
    return (Wait("", until=next_silence(rollout, members, now)),)


# -- canaries ----------------------------------------------------------------------------------------------------------


def _canaries(rollout: Rollout, members: Standing, now: float) -> tuple[Action, ...]:
    """Fill the open vacancies of wave 1 with the first that come, and replace canaries that went away."""
    if rollout.wave > 1 or len(rollout.gates) == 1 or not members.any(_may_stand_in):
        return ()
    if rollout.vacancies:
        return (Promote(_devices(heapq.nsmallest(rollout.vacancies, members.walk(_may_stand_in), key=_rank))),)
    if rollout.wave == 0 or rollout.replaced == REPLACED_MAX:
        return ()
    first = members.select(lambda kind: kind.wave == 1 and not kind.replaced)
    gone = [each for each in first if _gone(each, now)]
    if not gone or _enough(rollout, first, len(gone)):
        return ()
    return (Replace(gone[0].device, min(members.walk(_may_stand_in), key=_rank).device),)


def _may_stand_in(kind: Kind) -> bool:
    """Tell whether a member of a later wave may take a place in wave 1."""
    return kind.wave > 1 and kind.online and kind.canary and kind.outcome is Outcome.PENDING and not kind.offered


def _rank(member: Member) -> int:
    return member.rank


def _enough(rollout: Rollout, first: Sequence[Member], gone: int) -> bool:
    """Tell whether the canaries that are left can meet the gate."""
    counted = sum(each.counted for each in first)
    failed = sum(each.outcome is Outcome.FAILED for each in first)
    return len(first) - gone - failed >= max(1, rollout.limits.min_success.up(counted))


def _gone(member: Member, now: float) -> bool:
    """Tell whether a canary went away before it answered."""
    if not member.counted:
        return True
    away = member.outcome in {Outcome.PENDING, Outcome.WAITING} and not member.online
    return away and now >= _away_until(member)


def _away_until(member: Member) -> float:
    return max(member.heard_at or 0, member.offered_at or 0) + CANARY_AWAY_S


# -- offers ------------------------------------------------------------------------------------------------------------


def _offers(rollout: Rollout, members: Standing) -> tuple[Action, ...]:
    """Offer the change to members of open waves, within the limit at once and the budget of each site."""
    if rollout.wave == 0 and rollout.unapproved:
        return (Pause(PauseCause.APPROVAL, "nothing is offered before the approval of a second person"),)
    if rollout.wave == 0:
        return (Open(1),)
    last, limits = rollout.wave == len(rollout.gates), rollout.limits

    def due(kind: Kind) -> bool:
        return kind.outcome is Outcome.PENDING and 0 < kind.wave <= rollout.wave and (last or not kind.replaced)

    if not limits.at_once and limits.min_available is None:
        everybody = members.devices(due)
        return (Offer(everybody),) if everybody else ()
    absent = members.devices(_withdrawn)
    if absent:
        return (Withdraw(absent),)
    free = limits.at_once - _under_way(members) if limits.at_once else members.count(due)
    admitted = _within_budget(limits, members, lambda kind: kind.online and due(kind), free)
    return (Offer(admitted),) if admitted else ()


def _withdrawn(kind: Kind) -> bool:
    """Tell whether an offer under a limit is taken back: the device is away, and has not begun to swap."""
    return kind.outcome is Outcome.WAITING and not kind.online and not kind.returning


def _under_way(members: Standing) -> int:
    return members.count(lambda kind: kind.outcome in UNDER_WAY and not kind.returning)


def _within_budget(limits: Limits, members: Standing, due: Chosen, free: int) -> tuple[str, ...]:
    """Return the first of those due that leave every site its budget, at most `free`."""
    spare = _spare(limits, members)
    if free <= 0:
        return ()
    if spare is None:
        return _devices(islice(members.walk(due), free))
    room = sum(left for left in spare.values() if left > 0)
    if not room:
        chosen, due = due, lambda kind: kind.busy and chosen(kind)
    admitted: list[str] = []
    for member in members.walk(due):
        if len(admitted) >= free:
            break
        if not member.busy:  # a member that is busy elsewhere is unavailable already
            if spare[member.site] <= 0:
                continue
            spare[member.site] -= 1
        admitted.append(member.device)
    return tuple(admitted)


def _spare(limits: Limits, members: Standing) -> Counter[str] | None:
    """Return how many devices of each site may be taken away; None without a budget."""
    if limits.min_available is None:
        return None
    spare = members.available()
    for site in spare:
        spare[site] -= limits.min_available
    return spare


# -- the gate ----------------------------------------------------------------------------------------------------------


def _gate(rollout: Rollout, members: Standing, now: float) -> tuple[Action, ...]:
    """Open the next wave, end the rollout, or say what the gate of the present wave waits for."""
    wave = rollout.wave

    def inside(kind: Kind) -> bool:
        return kind.wave == wave and kind.counted and not kind.replaced

    if not members.any(lambda kind: kind.counted or kind.outcome is Outcome.UNPROVEN):
        return (Revert("no device is left that the change concerns"),)
    if not rollout.vacancies and not members.any(inside):
        mute = members.select(lambda kind: kind.wave == wave and _mute(kind))
        if mute:
            reason = f"no device of wave {wave} can answer: {names(mute)} {mute[0].outcome}"
            return (Pause(PauseCause.CANARY, reason),)
    held = _held(rollout, members, inside, now)
    if held is not None:
        return (held,) if not isinstance(held, Revert) else _breach(rollout, held.reason) or (Wait(held.reason),)
    gate = rollout.gates[wave - 1]
    if gate.approval and wave not in rollout.approved:
        return (Pause(PauseCause.APPROVAL, f"wave {wave} is done and wants the approval of a second person"),)
    if wave < len(rollout.gates):
        return (Open(wave + 1),)
    return (Succeed(members.devices(lambda kind: bool(kind.wave) and kind.outcome in OPEN)),)


def _mute(kind: Kind) -> bool:
    """Tell whether a member that was to give evidence for the next wave never will."""
    if kind.accepted:
        return False
    return kind.outcome is Outcome.UNPROVEN or (kind.wave == 1 and not kind.counted)


def _held(rollout: Rollout, members: Standing, inside: Chosen, now: float) -> Wait | Revert | None:
    """Return what keeps the gate of the present wave shut; None for nothing."""
    wave, until = rollout.wave, next_silence(rollout, members, now)
    if rollout.vacancies and not members.any(inside):
        first = members.devices(lambda kind: kind.canary and kind.outcome is Outcome.PENDING)
        reason = f"wave {wave} waits for the first device that comes online: {_named(members, first)}"
        return Wait(reason, first, until)
    at_it = members.devices(lambda kind: inside(kind) and _holds(kind))
    if at_it:
        return Wait(f"wave {wave} waits for {_named(members, at_it)}", at_it, until)

    def succeeded(kind: Kind) -> bool:
        return inside(kind) and kind.outcome is Outcome.SUCCEEDED

    done, unaccepted = members.count(succeeded), members.count(lambda kind: inside(kind) and not kind.accepted)
    need = max(1, rollout.limits.min_success.up(unaccepted)) if unaccepted else 0
    if done < need:
        open_still = members.devices(lambda kind: inside(kind) and kind.outcome in OPEN)
        if done + len(open_still) < need:
            return Revert(blame(members.select(lambda kind: inside(kind) and kind.outcome is Outcome.FAILED)))
        successes = "1 success" if need == 1 else f"{need} successes"
        reason = f"wave {wave} needs {successes} and has {done}; it waits for {_named(members, open_still)}"
        return Wait(reason, open_still, until)
    gate = rollout.gates[wave - 1]
    ready = members.nth(succeeded, _ended_at, need) + gate.soak_s if need else now
    if now < ready:
        return Wait(f"wave {wave} soaks for {gate.soak_s:g} s", until=min(ready, until or ready))
    return None


def _holds(kind: Kind) -> bool:
    """Tell whether a member must answer before the gate opens."""
    if kind.outcome is Outcome.IN_PROGRESS:
        return True
    return kind.online and kind.outcome in {Outcome.PENDING, Outcome.WAITING}


def _ended_at(member: Member) -> float:
    return member.ended_at or 0


def next_silence(rollout: Rollout, members: Standing, after: float) -> float | None:
    """Return when the next silence gets a name, or a canary is replaced."""
    times = (members.next(chosen, clock, after) for chosen, clock in _deadlines(rollout))
    return min((each for each in times if each is not None), default=None)


def deadlines(rollout: Rollout, member: Member) -> list[float]:
    """Return each time at which the silence of a member gets a name, or it is replaced, past ones too."""
    kind = Kind.of(member)
    return [clock(member) for chosen, clock in _deadlines(rollout) if chosen(kind)]


def _deadlines(rollout: Rollout) -> Iterator[tuple[Chosen, Clock]]:
    yield _may_be_lost, _lost_at
    yield _may_be_stuck, _stuck_at(rollout.limits.timeout_s)
    if rollout.wave == 1:
        yield _may_be_replaced, _away_until


def _may_be_replaced(kind: Kind) -> bool:
    return kind.wave == 1 and not kind.online and kind.outcome in OPEN and not kind.returning


# -- catch-up queue ----------------------------------------------------------------------------------------------------


def _catch_up(rollout: Rollout, members: Standing, now: float, besides: int) -> tuple[Action, ...]:
    """Admit devices that come after the rollout succeeded, at most so many at once, until too many of them fail."""
    marks = _silences(rollout, members, now)
    if marks:
        return marks
    failed = [each for each in members.walk(_failed_arrival) if _arrived_at(each) > now - ARRIVALS_S]
    if not rollout.closed and failed:
        recent = members.later(lambda kind: kind.arrival, _arrived_at, now - ARRIVALS_S)
        if len(failed) > (rollout.limits.failures or _HUNDREDTH).down(recent):
            return (Close(blame(failed)),)
    shut = bool(rollout.closed or rollout.causes)
    absent = members.devices(lambda kind: kind.arrival and not kind.new and _taken_back(kind, shut=shut))
    if absent:
        return (Withdraw(absent),)
    frozen = PauseCause.FREEZE in rollout.causes
    new = () if frozen else members.devices(lambda kind: _due_arrival(kind) and kind.new)
    if new:
        return (Offer(new),)
    if not shut and members.any(_queued):
        at_once = max(1, rollout.limits.catch_up.down(besides + members.count(lambda kind: kind.counted)))
        admitted = _within_budget(rollout.limits, members, _queued, at_once - members.count(_catching_up))
        if admitted:
            return (Offer(admitted),)
    return (_queue(rollout, members, now),)


def _failed_arrival(kind: Kind) -> bool:
    return kind.arrival and kind.counts_as(Outcome.FAILED)


def _arrived_at(member: Member) -> float:
    return member.offered_at or -ARRIVALS_S


def _taken_back(kind: Kind, *, shut: bool) -> bool:
    """Tell whether the offer to an arrival is taken back; of a queue that is shut each that was not begun."""
    return _withdrawn(kind) or (shut and kind.outcome is Outcome.WAITING and not kind.began)


def _due_arrival(kind: Kind) -> bool:
    return kind.arrival and kind.outcome is Outcome.PENDING


def _queued(kind: Kind) -> bool:
    return _due_arrival(kind) and kind.online and not kind.new


def _catching_up(kind: Kind) -> bool:
    return kind.arrival and not kind.new and (kind.outcome in UNDER_WAY or kind.outcome is Outcome.LOST)


def _queue(rollout: Rollout, members: Standing, now: float) -> Wait:
    """Say who waits in the catch-up queue."""
    due, until = members.devices(_due_arrival), next_silence(rollout, members, now)
    if not due:
        return Wait("", until=until)
    why = f"is closed: {rollout.closed}" if rollout.closed else "is open"
    return Wait(f"the catch-up queue {why}; in it: {_named(members, due)}", due, until)


# -- words -------------------------------------------------------------------------------------------------------------


def _devices(members: Iterable[Member]) -> tuple[str, ...]:
    return tuple(each.device for each in members)


def names(members: Sequence[Member]) -> str:
    """Name the first members, and count the rest."""
    return _shown(members[:_NAMED_MAX], len(members))


def _named(members: Standing, devices: Sequence[str]) -> str:
    return _shown([members[device] for device in devices[:_NAMED_MAX]], len(devices))


def _shown(members: Iterable[Member], of: int) -> str:
    shown = ", ".join(each.device if each.online else f"{each.device} (offline)" for each in members)
    return shown + (f" and {of - _NAMED_MAX} more" if of > _NAMED_MAX else "")


def blame(failed: Sequence[Member]) -> str:
    """Name the first device that failed, and why."""
    first = min(failed, key=lambda each: (each.ended_at or 0, each.device))
    more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
    why = f" ({first.code})" if first.code else ""
    said = f": {first.message}" if first.message else ""
    return f"{first.device}{more} {first.outcome}{why}{said}"

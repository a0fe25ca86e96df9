"""Application of decisions: what a rollout and its members are after each action, until the rollout waits.

The server's controller and the simulator both drive a rollout by `advance`: the one stores what changed, the other
plays on with it.
"""

from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Final, assert_never

from msgspec.structs import replace

from fleet.protocol.codes import OPEN_STATES, Outcome, PauseCause, RolloutState
from fleet.rollout.decide import (
    Action,
    Close,
    Mark,
    Offer,
    Open,
    Pause,
    Promote,
    Replace,
    Revert,
    Rollout,
    Succeed,
    Wait,
    Withdraw,
    decide,
)
from fleet.rollout.model import OPEN, Member, after_end
from fleet.rollout.standing import Standing

_MAX_STEPS: Final = 200
_MAY_FALL_SILENT: Final = frozenset({Outcome.WAITING, Outcome.IN_PROGRESS, Outcome.DEFERRED})
_SILENT: Final = {
    Outcome.WAITING: "went away before it swapped",
    Outcome.LOST: "silent since the swap began",
    Outcome.DEFERRED: "stuck",
}


@dataclass(frozen=True, slots=True)
class Step:
    """A rollout at rest.

    Attributes:
        sets: the members of each rollout of an atomic set, of a single rollout alone, in the order given; none of a
            standing that was changed in place.
        changed: devices whose member is another one now; their assignments follow from it.
        actions: what was decided, in order; the last one is a `Wait` unless the rollout is over.
    """

    rollout: Rollout
    sets: tuple[tuple[Member, ...], ...]
    changed: tuple[str, ...]
    actions: tuple[Action, ...]

    @property
    def members(self) -> tuple[Member, ...]:
        """Return the members of a single rollout, or of the one that leads a set."""
        return self.sets[0]

    @property
    def wait(self) -> Wait:
        """Return what the rollout waits for."""
        last = self.actions[-1] if self.actions else None
        return last if isinstance(last, Wait) else Wait("")


def advance(rollout: Rollout, members: Iterable[Member], now: float, *, besides: int = 0) -> Step:
    """Decide and apply until the rollout waits or is over; `besides` as in `decide`."""
    return advance_set(rollout, [members], now, besides=besides)


def advance_set(rollout: Rollout, sets: Iterable[Iterable[Member]], now: float, *, besides: int = 0) -> Step:
    """Decide and apply for an atomic set as for one rollout, until it waits or is over."""
    standing = [Standing(members) for members in sets]
    rollout, taken = _come_to_rest(rollout, standing, now, besides)
    changed = dict.fromkeys(device for each in standing for device in each.changed())
    return Step(rollout, tuple(each.everybody() for each in standing), tuple(changed), taken)


def advance_standing(rollout: Rollout, members: Standing, now: float) -> Step:
    """Decide and apply in `members`, at the cost of what changed since the last time; the step names no members."""
    members.settle()
    rollout, taken = _come_to_rest(rollout, [members], now, 0)
    return Step(rollout, (), members.changed(), taken)


def _come_to_rest(
    rollout: Rollout, sets: Sequence[Standing], now: float, besides: int
) -> tuple[Rollout, tuple[Action, ...]]:
    taken: list[Action] = []
    for _ in range(_MAX_STEPS):
        actions = decide(rollout, _merged(sets), now, besides=besides)
        taken += actions
        moves = [each for each in actions if not isinstance(each, Wait)]
        if not moves:
            return rollout, tuple(taken)
        for action in moves:
            rollout, *_ = [apply(rollout, each, action, now) for each in sets]
    raise AssertionError(f"a rollout does not come to rest: {taken[-3:]}")


def _merged(sets: Sequence[Standing]) -> Standing:
    if len(sets) == 1:
        return sets[0]
    return Standing(merge_set([each.everybody() for each in sets]))


_ORDER: Final = (
    Outcome.FAILED,
    Outcome.LOST,
    Outcome.IN_PROGRESS,
    Outcome.DEFERRED,
    Outcome.WAITING,
    Outcome.PENDING,
    Outcome.UNPROVEN,
    Outcome.SUPERSEDED,
    Outcome.NOT_AFFECTED,
    Outcome.REVERTED,
    Outcome.SUCCEEDED,
)


def merge_set(sets: Sequence[tuple[Member, ...]]) -> tuple[Member, ...]:
    """Merge the members of an atomic set: a device stands as its worst; a single rollout is returned unchanged."""
    first, *rest = sets
    if not rest:
        return first
    others = [{each.device: each for each in members} for members in rest]
    return tuple(_worst([each, *(other[each.device] for other in others if each.device in other)]) for each in first)


def _worst(members: Sequence[Member]) -> Member:
    worst = min(members, key=lambda each: _ORDER.index(each.outcome))
    ends = [each.ended_at for each in members if each.ended_at is not None]
    return replace(worst, ended_at=max(ends, default=None))


def apply(rollout: Rollout, members: MutableMapping[str, Member], action: Action, now: float) -> Rollout:
    """Change `members` as an action says, and return the rollout after it."""
    if isinstance(action, Open | Promote | Replace | Offer | Withdraw | Mark):
        return _move(rollout, members, action, now)
    match action:
        case Pause(cause, _):
            rollout = replace(rollout, state=RolloutState.PAUSED, causes=rollout.causes | {cause})
        case Revert():
            rollout = end(rollout, members, RolloutState.REVERTED)
        case Succeed():
            members.update((each.device, _arrives(each)) for each in list(members.values()))
            rollout = replace(rollout, state=RolloutState.SUCCEEDED)
        case Close(reason):
            rollout = replace(rollout, closed=reason)
        case Wait():
            pass
        case _:
            assert_never(action)
    return rollout


def _move(
    rollout: Rollout,
    members: MutableMapping[str, Member],
    action: Open | Promote | Replace | Offer | Withdraw | Mark,
    now: float,
) -> Rollout:
    """Apply what moves devices and not the state of the rollout."""
    match action:
        case Open(wave):
            rollout = replace(rollout, wave=wave, vacancies=rollout.vacancies if wave == 1 else 0)
        case Promote(devices):
            members.update((device, replace(members[device], wave=1)) for device in devices)
            rollout = replace(rollout, vacancies=rollout.vacancies - len(devices))
        case Replace(device, by):
            gone = replace(members[device], replaced=True)
            members[device] = withdrawn(gone) if gone.outcome is Outcome.WAITING and gone.began_at is None else gone
            members[by] = replace(members[by], wave=1)
            rollout = replace(rollout, replaced=rollout.replaced + 1)
        case Offer(devices):
            fresh = [device for device in devices if members[device].outcome is Outcome.PENDING]
            members.update((device, offered(members[device], now)) for device in fresh)
        case Withdraw(devices):
            fresh = [device for device in devices if members[device].outcome is Outcome.WAITING]
            members.update((device, withdrawn(members[device])) for device in fresh)
        case Mark(outcome, devices):
            mute = [members[device] for device in devices if members[device].outcome in _MAY_FALL_SILENT]
            reason = _SILENT[outcome]
            members.update((each.device, replace(each, outcome=outcome, reason=reason, until=None)) for each in mute)
        case _:
            assert_never(action)
    return rollout


def offered(member: Member, now: float) -> Member:
    """Return a member that has just been offered the change, or offered it again."""
    first = now if member.offered_at is None or member.arrival else member.offered_at
    return replace(member, outcome=Outcome.WAITING, offered_at=first, moved_at=now, reason="")


def withdrawn(member: Member) -> Member:
    """Return a member whose offer was taken back; `offered_at` stays, since a report may still be under way."""
    return replace(member, outcome=Outcome.PENDING, reason="", began_at=None, phase="", progress=None, until=None)


def _arrives(member: Member) -> Member:
    if not member.wave or member.outcome not in OPEN:
        return member
    return replace(member, arrival=True)


def end(rollout: Rollout, members: MutableMapping[str, Member], state: RolloutState, *, keep: bool = False) -> Rollout:
    """End a rollout without success, at once: nothing here waits for a device."""
    for each in after_end(state, tuple(members.values()), keep=keep):
        members[each.device] = each
    return replace(rollout, state=state, causes=frozenset(), vacancies=0)


# -- acts of operators -------------------------------------------------------------------------------------------------


def pause(rollout: Rollout, cause: PauseCause = PauseCause.OPERATOR) -> Rollout:
    """Pause a rollout, or its catch-up queue when it is frozen."""
    state = RolloutState.PAUSED if rollout.state in OPEN_STATES else rollout.state
    return replace(rollout, state=state, causes=rollout.causes | {cause})


def resume(rollout: Rollout, members: Sequence[Member]) -> tuple[Rollout, tuple[Member, ...], tuple[Member, ...]]:
    """Go on with the wave that the rollout was in, or reopen its catch-up queue.

    The failures and losses counted so far are accepted by name, canaries that cannot answer, and what gates on metrics
    left undecided: only new ones count.
    A freeze stays.

    Returns:
        The rollout, its members, and those whose outcome was accepted.
    """
    accepted = tuple(each for each in members if _acceptable(rollout, each))
    named = {each.device for each in accepted}
    after = tuple(replace(each, accepted=each.outcome) if each.device in named else each for each in members)
    return replace(_freed(rollout, rollout.causes & {PauseCause.FREEZE}), closed=""), after, accepted


def _acceptable(rollout: Rollout, member: Member) -> bool:
    """Tell whether resuming accepts a member's outcome."""
    if member.accepted is member.outcome:
        return False
    mute = PauseCause.CANARY in rollout.causes and member.wave == rollout.wave and not member.counted
    return mute or member.undecided or member.outcome in {Outcome.FAILED, Outcome.LOST}


def approve(rollout: Rollout) -> Rollout:
    """Approve the gate of the present wave."""
    freed = _freed(rollout, rollout.causes - {PauseCause.APPROVAL})
    return replace(freed, approved=rollout.approved | {rollout.wave})


def unfreeze(rollout: Rollout) -> Rollout:
    """End a freeze: only what the freeze paused goes on."""
    return _freed(rollout, rollout.causes - {PauseCause.FREEZE})


def _freed(rollout: Rollout, causes: frozenset[PauseCause]) -> Rollout:
    goes_on = rollout.state is RolloutState.PAUSED and not causes
    return replace(rollout, causes=causes, state=RolloutState.RUNNING if goes_on else rollout.state)

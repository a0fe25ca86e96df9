"""Plain form of `fleet.rollout.decide`, which passes over all members for each question: what decisions must equal."""

from collections import Counter

from fleet.protocol.codes import OPEN_STATES, OnBreach, Outcome, PauseCause, RolloutState
from fleet.rollout.decide import (
    ARRIVALS_S,
    CANARY_AWAY_S,
    LOST_S,
    REPLACED_MAX,
    Close,
    Mark,
    Offer,
    Open,
    Pause,
    Promote,
    Replace,
    Revert,
    Succeed,
    Wait,
    Withdraw,
    blame,
    names,
)
from fleet.rollout.members import Amount
from fleet.rollout.model import FROM_SWAP, OPEN, UNDER_WAY

_MAY_BE_SILENT = frozenset({Outcome.WAITING, Outcome.IN_PROGRESS, Outcome.DEFERRED})
_HUNDREDTH = Amount(1, percent=True)
_TWENTIETH = Amount(5, percent=True)


def decide(rollout, members, now, *, besides=0):
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


def _silences(rollout, members, now):
    found = {}
    for member in members:
        outcome = _silence(rollout, member, now) if member.outcome in _MAY_BE_SILENT else None
        if outcome is not None:
            found.setdefault(outcome, []).append(member.device)
    return tuple((Mark(outcome, tuple(devices)) for outcome, devices in found.items()))


def _silence(rollout, member, now):
    if member.returning:
        return None
    if member.outcome is not Outcome.WAITING and member.swapping:
        if now >= _lost_at(member):
            return Outcome.LOST
    elif member.outcome is Outcome.IN_PROGRESS and (not member.online):
        return Outcome.WAITING
    if member.outcome in UNDER_WAY and member.online and (now >= _stuck_at(rollout, member)):
        return Outcome.DEFERRED
    return None


def _lost_at(member):
    return (member.heard_at or 0) + LOST_S


def _stuck_at(rollout, member):
    return max(member.offered_at or 0, member.moved_at or 0, member.online_since or 0) + rollout.limits.timeout_s


def _judge(rollout, members):
    if not any(each.undecided or each.outcome in {Outcome.FAILED, Outcome.LOST} for each in members):
        return ()
    for wave in range(1, rollout.wave + 1):
        failed = [each for each in members if each.wave == wave and each.counts_as(Outcome.FAILED)]
        if len(failed) > _allowed(members, wave, rollout.limits.failures, _HUNDREDTH):
            return _breach(rollout, blame(failed))
    for wave in range(1, rollout.wave + 1):
        lost = [each for each in members if each.wave == wave and each.counts_as(Outcome.LOST)]
        allowed = _allowed(members, wave, rollout.limits.lost, _TWENTIETH)
        if len(lost) > allowed and PauseCause.LOST not in rollout.causes:
            return (Pause(PauseCause.LOST, f"{names(lost)} lost: silent since the swap began"),)
    unsure = [each for each in members if 0 < each.wave <= rollout.wave and each.undecided]
    if unsure and PauseCause.UNDECIDED not in rollout.causes:
        why = f"{names(unsure)} ran too little for a gate on metrics: {unsure[0].reason}"
        return (Pause(PauseCause.UNDECIDED, why),)
    return ()


def _allowed(members, wave, limit, later):
    if limit is None and wave == 1:
        return 0
    return (limit or later).down(sum(each.counted for each in members if each.wave == wave))


def _breach(rollout, reason):
    if rollout.limits.on_breach is OnBreach.ROLLBACK:
        return (Revert(reason),)
    return () if PauseCause.BREACH in rollout.causes else (Pause(PauseCause.BREACH, reason),)


def _paused(rollout, members, now):
    if not rollout.causes:
        return ()
    unbegun = tuple(each.device for each in members if each.outcome is Outcome.WAITING and each.began_at is None)
    if unbegun:
        return (Withdraw(unbegun),)
    return (Wait("", until=_next_silence(rollout, members, now)),)


def _canaries(rollout, members, now):
    if rollout.wave > 1 or len(rollout.gates) == 1:
        return ()
    fresh = (each for each in members if each.wave > 1 and each.online and each.canary and _fresh(each))
    idle = sorted(fresh, key=lambda each: each.rank)
    if not idle:
        return ()
    if rollout.vacancies:
        return (Promote(tuple(each.device for each in idle[: rollout.vacancies])),)
    first = [each for each in members if each.wave == 1 and (not each.replaced)]
    gone = [each for each in first if _gone(each, now)]
    if rollout.wave == 0 or not gone or rollout.replaced == REPLACED_MAX or _enough(rollout, first, len(gone)):
        return ()
    return (Replace(gone[0].device, idle[0].device),)


def _enough(rollout, first, gone):
    counted = sum(each.counted for each in first)
    failed = sum(each.outcome is Outcome.FAILED for each in first)
    return len(first) - gone - failed >= max(1, rollout.limits.min_success.up(counted))


def _fresh(member):
    return member.outcome is Outcome.PENDING and member.offered_at is None


def _gone(member, now):
    if not member.counted:
        return True
    away = member.outcome in {Outcome.PENDING, Outcome.WAITING} and (not member.online)
    return away and now >= _away_until(member)


def _away_until(member):
    return max(member.heard_at or 0, member.offered_at or 0) + CANARY_AWAY_S


def _offers(rollout, members):
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


def _withdrawn(member):
    return member.outcome is Outcome.WAITING and (not member.online) and (not member.returning)


def _under_way(members):
    return sum(each.outcome in UNDER_WAY and (not each.returning) for each in members)


def _within_budget(limits, members, due, free):
    spare = _spare(limits, members)
    admitted = []
    for member in due:
        if len(admitted) >= free:
            break
        if spare is not None and (not member.busy):
            if spare[member.site] <= 0:
                continue
            spare[member.site] -= 1
        admitted.append(member.device)
    return tuple(admitted)


def _spare(limits, members):
    if limits.min_available is None:
        return None
    spare = Counter()
    for site in {each.site for each in members}:
        spare[site] = -limits.min_available
    for member in members:
        spare[member.site] += member.online and (not member.busy) and (not _occupied(member))
    return spare


def _occupied(member):
    return member.outcome in {Outcome.WAITING, Outcome.IN_PROGRESS, Outcome.DEFERRED, Outcome.LOST}


def _gate(rollout, members, now):
    wave = rollout.wave
    inside = [each for each in members if each.wave == wave and each.counted and (not each.replaced)]
    if not any(each.counted or each.outcome is Outcome.UNPROVEN for each in members):
        return (Revert("no device is left that the change concerns"),)
    mute = [] if inside or rollout.vacancies else [each for each in members if each.wave == wave and _mute(each)]
    if mute:
        return (Pause(PauseCause.CANARY, f"no device of wave {wave} can answer: {names(mute)} {mute[0].outcome}"),)
    held = _held(rollout, members, inside, now)
    if held is not None:
        return (held,) if not isinstance(held, Revert) else _breach(rollout, held.reason) or (Wait(held.reason),)
    gate = rollout.gates[wave - 1]
    if gate.approval and wave not in rollout.approved:
        return (Pause(PauseCause.APPROVAL, f"wave {wave} is done and wants the approval of a second person"),)
    if wave < len(rollout.gates):
        return (Open(wave + 1),)
    return (Succeed(tuple(each.device for each in members if each.wave and each.outcome in OPEN)),)


def _mute(member):
    if member.accepted is member.outcome:
        return False
    return member.outcome is Outcome.UNPROVEN or (member.wave == 1 and (not member.counted))


def _held(rollout, members, inside, now):
    wave, until = (rollout.wave, _next_silence(rollout, members, now))
    if rollout.vacancies and (not inside):
        first = [each for each in members if each.canary and each.outcome is Outcome.PENDING]
        reason = f"wave {wave} waits for the first device that comes online: {names(first)}"
        return Wait(reason, _devices(first), until)
    at_it = [each for each in inside if _holds(each)]
    if at_it:
        return Wait(f"wave {wave} waits for {names(at_it)}", _devices(at_it), until)
    unaccepted = [each for each in inside if not (each.accepted and each.accepted is each.outcome)]
    done = sorted(each.ended_at or 0 for each in inside if each.outcome is Outcome.SUCCEEDED)
    need = max(1, rollout.limits.min_success.up(len(unaccepted))) if unaccepted else 0
    if len(done) < need:
        open_still = [each for each in inside if each.outcome in OPEN]
        if len(done) + len(open_still) < need:
            return Revert(blame([each for each in inside if each.outcome is Outcome.FAILED]))
        successes = "1 success" if need == 1 else f"{need} successes"
        reason = f"wave {wave} needs {successes} and has {len(done)}; it waits for {names(open_still)}"
        return Wait(reason, _devices(open_still), until)
    gate = rollout.gates[wave - 1]
    ready = done[need - 1] + gate.soak_s if need else now
    if now < ready:
        return Wait(f"wave {wave} soaks for {gate.soak_s:g} s", until=min(ready, until or ready))
    return None


def _holds(member):
    if member.outcome is Outcome.IN_PROGRESS:
        return True
    return member.online and member.outcome in {Outcome.PENDING, Outcome.WAITING}


def _next_silence(rollout, members, now):
    return min((time for time in deadlines(rollout, members) if time > now), default=None)


def deadlines(rollout, members):
    for member in members:
        if member.outcome not in OPEN or member.returning:
            continue
        if member.phase in FROM_SWAP and member.outcome in {Outcome.IN_PROGRESS, Outcome.DEFERRED}:
            yield _lost_at(member)
        if member.outcome in UNDER_WAY and member.online:
            yield _stuck_at(rollout, member)
        if member.wave == 1 == rollout.wave and (not member.online):
            yield _away_until(member)


def _catch_up(rollout, members, now, besides):
    marks = _silences(rollout, members, now)
    if marks:
        return marks
    recent = [each for each in members if each.arrival and (each.offered_at or -ARRIVALS_S) > now - ARRIVALS_S]
    failed = [each for each in recent if each.counts_as(Outcome.FAILED)]
    if not rollout.closed and len(failed) > (rollout.limits.failures or _HUNDREDTH).down(len(recent)):
        return (Close(blame(failed)),)
    shut = bool(rollout.closed or rollout.causes)
    absent = tuple(
        each.device
        for each in members
        if (each.arrival and (not each.new) and _withdrawn(each)) or (shut and _unbegun_arrival(each))
    )
    if absent:
        return (Withdraw(absent),)
    due = [each for each in members if each.arrival and each.outcome is Outcome.PENDING]
    frozen = PauseCause.FREEZE in rollout.causes
    new = tuple(each.device for each in due if each.new and (not frozen))
    if new:
        return (Offer(new),)
    queued = [each for each in due if each.online and (not each.new)]
    if not shut and queued:
        busy = {*UNDER_WAY, Outcome.LOST}
        at_once = max(1, rollout.limits.catch_up.down(besides + sum(each.counted for each in members)))
        free = at_once - sum(each.arrival and (not each.new) and (each.outcome in busy) for each in members)
        admitted = _within_budget(rollout.limits, members, queued, free)
        if admitted:
            return (Offer(admitted),)
    return (_queue(rollout, members, due, now),)


def _unbegun_arrival(member):
    unbegun = member.outcome is Outcome.WAITING and member.began_at is None
    return member.arrival and (not member.new) and unbegun


def _queue(rollout, members, due, now):
    if not due:
        return Wait("", until=_next_silence(rollout, members, now))
    why = f"is closed: {rollout.closed}" if rollout.closed else "is open"
    reason = f"the catch-up queue {why}; in it: {names(due)}"
    return Wait(reason, _devices(due), _next_silence(rollout, members, now))


def _devices(members):
    return tuple(each.device for each in members)

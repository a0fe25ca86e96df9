"""Next step of a rollout: a pure function of the rollout, its devices and the time; atomic sets decided as one.

A wave is offered; its devices succeed, fail or refuse. A breach (more failures than allowed) halts everything at
once, in whichever wave it happens. The next wave is offered when no device of the offered ones is under way, enough
of them have completed, and the last of those has soaked. Devices that are offline or deferred are in no denominator:
they pass the gates later, by the same reports.

An atomic set is several rollouts, of instances that devices swap together. Each member keeps its own outcome on each
device; decisions are made over their sum: a device has succeeded when every member has, and has failed as soon as one
has.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fleet.protocol.codes import OPEN_STATES, Outcome, RolloutState
from fleet.rollout.model import BREACHES, COMPLETED, DECIDED, UNCOUNTED, DeviceProgress, Rollout


@dataclass(frozen=True, slots=True)
class Offer:
    """Offer wave `wave` (from 1) to its devices."""

    wave: int
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Expire:
    """This device took too long: it has failed."""

    device: str
    message: str


@dataclass(frozen=True, slots=True)
class Halt:
    """Stop, and offer every device its previous state again."""

    reason: str


@dataclass(frozen=True, slots=True)
class Complete:
    """Done: the value is what the group runs from now on. Stragglers get it when they come."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do now: why (empty while devices are under way), and when to look again (None: at the next report)."""

    reason: str
    until: float | None = None


Action = Offer | Expire | Halt | Complete | Wait


def decide(rollout: Rollout, boards: Sequence[DeviceProgress], now: float) -> tuple[Action, ...]:
    """Return the next step. Carry it out and call again: the sequence always ends in a `Wait` or an end state."""
    if rollout.state not in OPEN_STATES:
        return ()
    offered = [board for board in boards if board.wave <= rollout.wave]
    return _judge(rollout, offered, now) or _proceed(rollout, boards, offered, now)


def _judge(rollout: Rollout, offered: Sequence[DeviceProgress], now: float) -> tuple[Action, ...]:
    """Return what must happen at once, paused or not: a breach, or devices that took too long."""
    breached = [board for board in offered if board.outcome in BREACHES]
    if len(breached) > rollout.failures:
        return (Halt(_blame(breached)),)
    return tuple(
        Expire(board.device, f"{board.device} gave no outcome in {rollout.timeout_s:g} s")
        for board in offered
        if board.outcome is Outcome.IN_PROGRESS and board.acked_at is not None
        if now >= board.acked_at + rollout.timeout_s
    )


def _proceed(
    rollout: Rollout, boards: Sequence[DeviceProgress], offered: Sequence[DeviceProgress], now: float
) -> tuple[Action, ...]:
    """The next wave, the end, or why neither."""
    if rollout.state is RolloutState.PAUSED:
        return (Wait("paused by an operator", _next_timeout(rollout, offered)),)
    if rollout.wave == 0:
        return (_offer(rollout, boards, 1),)
    held = _held_up(rollout, offered, now)
    if held is not None:
        return (held,)
    if rollout.wave < len(rollout.sizes):
        return (_offer(rollout, boards, rollout.wave + 1),)
    return (Complete(),)


def _offer(rollout: Rollout, boards: Sequence[DeviceProgress], wave: int) -> Offer:
    assert 1 <= wave <= len(rollout.sizes)
    return Offer(wave, tuple(board.device for board in boards if board.wave == wave))


def _held_up(rollout: Rollout, offered: Sequence[DeviceProgress], now: float) -> Wait | Halt | None:
    """Why the next step must wait; None when the gates are open."""
    busy = [board for board in offered if board.outcome is Outcome.IN_PROGRESS]
    silent = [
        board
        for board in offered
        if board.outcome is Outcome.WAITING and board.online and now < (board.offered_at or 0) + rollout.answer_s
    ]
    if busy or silent:
        times = [_next_timeout(rollout, busy), *((board.offered_at or 0) + rollout.answer_s for board in silent)]
        return Wait("", min((time for time in times if time is not None), default=None))
    if rollout.wave == len(rollout.sizes):
        return _unproven(offered)
    present = [board for board in offered if board.outcome not in UNCOUNTED]
    completed = [board for board in present if board.outcome in COMPLETED]
    if len(completed) < min(rollout.minimum, len(present)):
        return Wait(f"wave {rollout.wave} waits for a device that answers: {_names(present)}")
    ready = max((board.ended_at or 0) for board in completed) + rollout.soak_s if completed else now
    return Wait(f"wave {rollout.wave} soaks for {rollout.soak_s:g} s", ready) if now < ready else None


def _unproven(offered: Sequence[DeviceProgress]) -> Wait | Halt | None:
    """A rollout that no device has taken is not done: it waits for the absent, or ends when there are none."""
    if any(board.outcome is Outcome.SUCCEEDED for board in offered):
        return None
    absent = [board for board in offered if board.outcome not in DECIDED]
    if absent:
        return Wait(f"no device has it yet; not heard of: {_names(absent)}")
    breached = [board for board in offered if board.outcome in BREACHES]
    return Halt(_blame(breached)) if breached else None


def _names(boards: Sequence[DeviceProgress]) -> str:
    return ", ".join(board.device for board in boards[:3]) + (f" and {len(boards) - 3} more" if len(boards) > 3 else "")  # noqa: PLR2004


def _next_timeout(rollout: Rollout, boards: Sequence[DeviceProgress]) -> float | None:
    ends = [
        board.acked_at + rollout.timeout_s
        for board in boards
        if board.acked_at is not None and board.outcome is Outcome.IN_PROGRESS
    ]
    return min(ends, default=None)


def _blame(breached: Sequence[DeviceProgress]) -> str:
    first = min(breached, key=lambda board: (board.ended_at or 0, board.device))
    why = f" ({first.code})" if first.code else ""
    more = f" and {len(breached) - 1} more" if len(breached) > 1 else ""
    said = f": {first.message}" if first.message else ""
    return f"{first.device}{more} {first.outcome}{why}{said}"


SET_FAILED = "set-failed"
_ORDER = (
    Outcome.IN_PROGRESS,
    Outcome.DEFERRED,
    Outcome.WAITING,
    Outcome.PENDING,
    Outcome.UNPROVEN,
    Outcome.SUPERSEDED,
    Outcome.SKIPPED,
    Outcome.SUCCEEDED,
)


def merge_set(members: Sequence[Sequence[DeviceProgress]]) -> list[DeviceProgress]:
    """Merge the devices' progress in the members of a set; a single member is returned unchanged."""
    first, *rest = members
    if not rest:
        return list(first)
    others = [{board.device: board for board in member} for member in rest]
    return [_worst([board, *(other[board.device] for other in others if board.device in other)]) for board in first]


def _worst(boards: Sequence[DeviceProgress]) -> DeviceProgress:
    breached = [board for board in boards if board.outcome in BREACHES]
    if breached:
        # the one that went wrong by itself says why, not those that went back with it
        return next((board for board in breached if board.code != SET_FAILED), breached[0])
    worst = min(boards, key=lambda board: _ORDER.index(board.outcome))
    ends = [board.ended_at for board in boards if board.ended_at is not None]
    return replace(worst, ended_at=max(ends, default=None))

"""Plan of changes and barriers of atomic sets: pure functions over plain values.

The plan compares the desired state with what is committed, under way and failed before. Removals come first and nothing
blocks them; one change per instance is in flight; a failed item waits until its attempt is raised or its retry is due.

An atomic set is committed as a whole or not at all. Every member walks the update machine by itself; `set_gate` holds
it back before its swap until all members are staged, and before its commit until all members are well.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, NamedTuple

from fleet.protocol.codes import Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """A desired, committed or in-flight item, as far as the plan needs it.

    Attributes:
        key: digest of everything that makes the item what it is (target, manifest, configuration, grants, port);
            neither attempt nor rollout.
        atomic: name of its atomic set; empty for an instance that is swapped alone.
    """

    instance: str
    key: str
    attempt: int = 0
    rollout: str = ""
    atomic: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class InFlight:
    """A change under way; `key` is empty for a removal."""

    instance: str
    key: str
    phase: Phase
    attempt: int = 0
    rollout: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An item that failed before.

    Attributes:
        retry_at: time of the next try without an operator, on the plan's clock; None for never.
        by_set: no failure of its own: another member of its atomic set failed.
        is_verdict: the failure speaks against the version or its configuration. Any other (no space, a port in use) may
            have passed when another rollout asks for the same: then it is tried again.
    """

    instance: str
    key: str
    attempt: int
    rollout: str = ""
    retry_at: float | None = None
    is_verdict: bool = True
    by_set: bool = False

    def is_in_force(self, now: float) -> bool:
        """Tell whether the item is not to be tried at this time."""
        return self.retry_at is None or self.retry_at > now


class Act(StrEnum):
    """Action on an instance, in the order in which a plan lists them."""

    REMOVE = "remove"
    SUPERSEDE = "supersede"  # end the change in flight: its item is no longer desired
    START = "start"
    ADOPT = "adopt"  # runs already: report that to the rollout that asks now
    REFUSE = "refuse"  # failed before: report that to the rollout that asks now
    RELABEL = "relabel"  # under way already: report from now on to another rollout, or as another attempt


@dataclass(frozen=True, slots=True)
class Step:
    """Line of a plan."""

    act: Act
    instance: str


_ORDER: Final = {act: place for place, act in enumerate(Act)}
_SUPERSEDABLE: Final = frozenset(
    {Phase.IDLE, Phase.FETCHING, Phase.VERIFYING, Phase.COMPILING, Phase.STAGED, Phase.PROBATION}
)

_DECIDED: Final = frozenset({Phase.COMMITTED, Phase.FAILED, Phase.ROLLING_BACK, Phase.ROLLED_BACK})


def plan(
    desired: Mapping[str, Want],
    committed: Mapping[str, Want],
    in_flight: Mapping[str, InFlight],
    failed: Mapping[tuple[str, str, int], Failure],
    now: float,
) -> tuple[Step, ...]:
    """List the steps to take now, removals first.

    Args:
        desired: complete desired list, by instance.
        committed: items that run and start again after a boot, by instance.
        in_flight: changes under way, by instance.
        failed: remembered failures, by (instance, key, attempt).
        now: time on the clock of `Failure.retry_at`.
    """
    held = {
        instance: replace(failure, is_verdict=_is_verdict(failure, mates))
        for instance, want in desired.items()
        if (failure := failed.get((instance, want.key, want.attempt))) is not None
        and _is_held(failure, mates := _mates(want, desired, committed, in_flight, failed), now)
    }
    steps = [
        step
        for instance in sorted({*desired, *committed, *in_flight})
        if (
            step := _step(
                instance, desired.get(instance), committed.get(instance), in_flight.get(instance), held.get(instance)
            )
        )
        is not None
    ]
    return tuple(sorted(steps, key=lambda step: (_ORDER[step.act], step.instance)))


def _step(
    instance: str,
    want: Want | None,
    have: Want | None,
    flight: InFlight | None,
    failure: Failure | None,
) -> Step | None:
    if flight is not None:
        return _beside_flight(instance, want, flight)
    if want is None:
        return Step(Act.REMOVE, instance) if have is not None else None
    runs = have is not None and have.key == want.key
    if runs and have is not None and not _asked_anew(want, have):
        return None
    if failure is not None:
        if want.rollout in {"", failure.rollout}:
            return None
        if failure.is_verdict:
            return Step(Act.REFUSE, instance)
    return Step(Act.ADOPT if runs else Act.START, instance)


class _Mate(NamedTuple):
    """Another desired member of an atomic set."""

    failure: Failure | None
    is_committed: bool
    is_going_back: bool


def _mates(
    want: Want,
    desired: Mapping[str, Want],
    committed: Mapping[str, Want],
    in_flight: Mapping[str, InFlight],
    failed: Mapping[tuple[str, str, int], Failure],
) -> tuple[_Mate, ...]:
    others = [each for each in desired.values() if want.atomic and each.atomic == want.atomic and each is not want]
    return tuple(
        _Mate(
            failed.get((each.instance, each.key, each.attempt)),
            each.instance in committed and committed[each.instance].key == each.key,
            each.instance in in_flight and in_flight[each.instance].phase in _GOING_BACK,
        )
        for each in others
    )


def _is_held(failure: Failure, mates: tuple[_Mate, ...], now: float) -> bool:
    """Tell whether an item that failed is not tried now.

    A member of an atomic set waits for all of them: it is tried again when each that failed by itself may be. Whoever
    failed for another's sake alone starts with that one, and never before that one has ended.
    """
    failures = [failure, *(mate.failure for mate in mates if mate.failure is not None)]
    if any(each.is_in_force(now) for each in failures if not each.by_set):
        return True
    if not failure.by_set or not mates:
        return False
    if any(mate.is_going_back for mate in mates):
        return True
    return all(mate.is_committed or (mate.failure is not None and mate.failure.by_set) for mate in mates)


def _is_verdict(failure: Failure, mates: tuple[_Mate, ...]) -> bool:
    """Tell whether a failure speaks against the version, or that of the member of its atomic set which caused it."""
    failures = [failure, *(mate.failure for mate in mates if mate.failure is not None)]
    return any(each.is_verdict for each in failures if not each.by_set)


def _beside_flight(instance: str, want: Want | None, flight: InFlight) -> Step | None:
    wanted_key = want.key if want is not None else ""
    if wanted_key == flight.key:
        if want is None or (want.attempt == flight.attempt and want.rollout in {"", flight.rollout}):
            return None
        if want.attempt != flight.attempt and flight.phase in _DECIDED:
            return None  # the attempt under way ends first; the next plan begins the new one
        return Step(Act.RELABEL, instance)
    if flight.key and flight.phase in _SUPERSEDABLE:
        return Step(Act.SUPERSEDE, instance)
    return None  # ends by itself within moments, and the next plan sees the result


def _asked_anew(want: Want, have: Want) -> bool:
    return want.rollout not in {"", have.rollout} or want.attempt != have.attempt


def may_report_committed(
    desired: Mapping[str, Want], committed: Mapping[str, Want], in_flight: Mapping[str, InFlight]
) -> bool:
    """Tell whether the assignment counts as committed: nothing in flight, and every desired item, no other, committed.

    The server counts a device as done by the version that is reported after this answer.
    """
    keys = {instance: want.key for instance, want in desired.items()}
    return not in_flight and keys == {instance: have.key for instance, have in committed.items()}


# Atomic sets

_PREPARING: Final = frozenset({Phase.IDLE, Phase.FETCHING, Phase.VERIFYING, Phase.COMPILING})

_SWITCHING: Final = frozenset({Phase.STAGED, Phase.SWAPPING})

_GOING_BACK: Final = frozenset({Phase.FAILED, Phase.ROLLING_BACK, Phase.ROLLED_BACK})


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """Another member of an atomic set.

    Attributes:
        phase: of its change towards this set; None while it has none, or none any more.
        well: its change has passed its own probation.
        is_busy: a change that does not belong to this set is under way for its instance.
        is_committed: its desired item is the committed one.
        has_failed: its desired item was tried and failed.
    """

    instance: str
    phase: Phase | None = None
    well: bool = False
    is_busy: bool = False
    is_committed: bool = False
    has_failed: bool = False


class Gate(StrEnum):
    """State of a barrier of an atomic set."""

    READY = "ready"
    WAITING = "waiting"
    FAILED = "failed"


class GateState(NamedTuple):
    """Barrier with the member that failed; empty unless `gate` is FAILED."""

    gate: Gate
    sibling: str = ""


def set_gate(phase: Phase, members: Iterable[Member]) -> GateState:
    """Decide whether a change may pass the barrier of its atomic set.

    Args:
        phase: of the change that asks: STAGED for the barrier before the swap, PROBATION for the one before the commit.
        members: the other members of the set; none for an instance that is swapped alone.
    """
    others = tuple(members)
    failed = next((each.instance for each in others if _member_failed(each)), "")
    if failed:
        return GateState(Gate.FAILED, failed)
    passes = _is_staged if phase is Phase.STAGED else _is_well
    return GateState(Gate.READY if all(passes(each) for each in others) else Gate.WAITING)


def _member_failed(member: Member) -> bool:
    return member.has_failed if member.phase is None else member.phase in _GOING_BACK


def _is_staged(member: Member) -> bool:
    if member.phase is None:
        return member.is_committed and not member.is_busy
    return member.phase not in _PREPARING


def _is_well(member: Member) -> bool:
    if member.phase is None:
        return member.is_committed
    return member.well or member.phase is Phase.COMMITTED


def swap_set(members: Iterable[Member]) -> tuple[str, ...]:
    """Name the members that switch in the same moment as the change that asks."""
    return tuple(each.instance for each in members if each.phase in _SWITCHING)

"""What is to be changed: the desired state against what is committed, what is in flight and what failed before.

Pure. Removals come first and nothing blocks them; one change per instance is in flight; a failed item is not tried
again until its attempt is raised, whoever asks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from agent.update.machine import Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """One desired, committed or in-flight item, as far as a plan has to know it.

    Attributes:
        key: a digest of everything that makes it what it is (target, manifest, configuration, grants, port);
            neither attempt nor rollout.
    """

    instance: str
    key: str
    attempt: int = 0
    rollout: str = ""


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
        retry_at: when it may be tried again by itself, in the plan's clock; None for never.
    """

    instance: str
    key: str
    attempt: int
    rollout: str = ""
    retry_at: float | None = None


class Act(StrEnum):
    """What to do with an instance."""

    REMOVE = "remove"
    SUPERSEDE = "supersede"  # what is in flight is not wanted any more
    START = "start"
    ADOPT = "adopt"  # it runs already: only say so to whoever asks now
    REFUSE = "refuse"  # it failed before: only say so to whoever asks now
    RELABEL = "relabel"  # it is under way already, for another rollout


@dataclass(frozen=True, slots=True)
class Step:
    """One line of a plan."""

    act: Act
    instance: str


_ORDER: Final = {act: place for place, act in enumerate(Act)}

_SUPERSEDABLE: Final = frozenset(
    {Phase.IDLE, Phase.FETCHING, Phase.VERIFYING, Phase.COMPILING, Phase.STAGED, Phase.PROBATION}
)


def plan(
    desired: Mapping[str, Want],
    committed: Mapping[str, Want],
    in_flight: Mapping[str, InFlight],
    failed: Mapping[tuple[str, str, int], Failure],
    now: float,
) -> tuple[Step, ...]:
    """The steps to take now, removals first. It is asked again whenever a change ends.

    Args:
        desired: by instance: the complete desired list.
        committed: by instance: what runs and is to run again after a boot.
        in_flight: by instance: what is being changed.
        failed: by (instance, key, attempt).
        now: of the clock that `Failure.retry_at` is in.
    """
    steps = [
        step
        for instance in sorted({*desired, *committed, *in_flight})
        if (
            step := _step(
                instance, desired.get(instance), committed.get(instance), in_flight.get(instance), failed, now
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
    failed: Mapping[tuple[str, str, int], Failure],
    now: float,
) -> Step | None:
    if flight is not None:
        return _beside_flight(instance, want, flight)
    if want is None:
        return Step(Act.REMOVE, instance) if have is not None else None
    if have is not None and have.key == want.key:
        return Step(Act.ADOPT, instance) if _asked_anew(want, have) else None
    failure = failed.get((instance, want.key, want.attempt))
    if failure is not None and (failure.retry_at is None or failure.retry_at > now):
        return Step(Act.REFUSE, instance) if want.rollout not in {"", failure.rollout} else None
    return Step(Act.START, instance)


def _beside_flight(instance: str, want: Want | None, flight: InFlight) -> Step | None:
    wanted_key = want.key if want is not None else ""
    if wanted_key == flight.key and (want is None or want.attempt == flight.attempt):
        if want is not None and want.rollout not in {"", flight.rollout}:
            return Step(Act.RELABEL, instance)
        return None
    if flight.key and flight.phase in _SUPERSEDABLE:
        return Step(Act.SUPERSEDE, instance)
    return None  # it ends by itself within moments, and then the plan is made anew


def _asked_anew(want: Want, have: Want) -> bool:
    return want.rollout not in {"", have.rollout} or want.attempt != have.attempt

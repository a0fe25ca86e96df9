"""Change, Committed, FailedItem, Violation, DeploymentState; reports about them.

What the agent keeps about components: plain values, as they are stored and as the agent speaks of them.

Where the board stands: what is wanted, what is committed, and what is being changed.

What is reported of changes and refusals, to the fleet and in the journal: from what is known to the message.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from agent import systemd
from agent.config import Paths
from agent.update.machine import Event, Happened, Phase, State, phase_of
from agent.update.plan import Failure, InFlight, Want
from agent.update.probation import ProbationSample
from fleet.protocol import bounds, wire
from fleet.protocol.assignment import Assignment, Item
from fleet.protocol.codes import RETRYABLE, RejectCode
from fleet.protocol.codes import Phase as WirePhase
from fleet.protocol.manifest import Manifest
from fleet.protocol.messages import Report

RETRY_FIRST_S: Final = 3600.0

RETRY_MAX_S: Final = 86_400.0

RETRY_TRIES_MAX: Final = 10


def item_key(item: Item) -> str:
    """A digest of all that makes an item what it is; attempt, rollout and what it is swapped with are no part of it."""
    return wire.digest(msgspec.structs.replace(item, attempt=0, rollout="", atomic=""))


class Committed(msgspec.Struct, frozen=True, kw_only=True):
    """What runs, and is to run again after a boot.

    Attributes:
        generation: of the instance in the host.
        assignment: version of the assignment that brought it.
    """

    item: Item
    manifest: Manifest
    generation: int
    assignment: int
    at: datetime


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One instance being changed.

    Attributes:
        item: what is to run; None for a removal.
        manifest: known once the target was found in the signed metadata.
        generation: in the host, given when the swap begins; 0 before.
        replaced: figures of what it replaces, taken before the swap.
        boot_id: of the boot in which `state.entered` counts.
        timings_ms: phase -> how long it took.
        well: it has passed its own probation, and waits for the rest of its atomic set.
    """

    instance: str
    assignment: int
    state: State
    well: bool = False
    item: Item | None = None
    manifest: Manifest | None = None
    generation: int = 0
    replaced: ProbationSample | None = None
    boot_id: str = ""
    timings_ms: dict[str, int] = {}

    @property
    def phase(self) -> Phase:
        """Where it stands."""
        return self.state.phase

    def encode(self) -> bytes:
        """As JSON, for the store."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> "Change":
        """Read what `encode` of this or another version made: an unknown phase rolls back, unknown fields are left.

        Raises:
            msgspec.DecodeError: damaged, in whichever way.
        """
        try:
            raw: dict[str, Any] = msgspec.json.decode(data, type=dict[str, Any])
            raw["state"]["phase"] = phase_of(str(raw["state"].get("phase", ""))).value
            return msgspec.convert(raw, cls)
        except (KeyError, TypeError, AttributeError, *wire.JSON_ERRORS) as error:
            raise msgspec.DecodeError(f"{type(error).__name__}: {error}") from error


class FailedItem(msgspec.Struct, frozen=True, kw_only=True):
    """An item that failed: not tried again by itself until its attempt is raised.

    Attributes:
        tries: how often it has been tried in all, where the failure is of a kind that may pass.
        retry_at: unix seconds; None for never.
    """

    instance: str
    key: str
    attempt: int
    target: str
    code: RejectCode
    message: str
    at: datetime
    rollout: str = ""
    tries: int = 1
    retry_at: float | None = None


class Violation(msgspec.Struct, frozen=True, kw_only=True):
    """What speaks by now against an item that is committed (`agent.update.trust`).

    Attributes:
        key: of the item (`item_key`).
        target: its target path.
    """

    instance: str
    key: str
    target: str
    code: RejectCode
    message: str


def want_of(item: Item) -> Want:
    """An item, as a plan has to know it."""
    return Want(instance=item.instance, key=item_key(item), attempt=item.attempt, rollout=item.rollout)


def in_flight_of(change: Change) -> InFlight:
    """A change under way, as a plan has to know it."""
    item = change.item
    if item is None:
        return InFlight(instance=change.instance, key="", phase=change.phase)
    want = want_of(item)
    return InFlight(
        instance=change.instance, key=want.key, phase=change.phase, attempt=want.attempt, rollout=want.rollout
    )


def failure_of(failed: FailedItem) -> Failure:
    """A remembered failure, as a plan has to know it."""
    return Failure(
        instance=failed.instance,
        key=failed.key,
        attempt=failed.attempt,
        rollout=failed.rollout,
        retry_at=failed.retry_at,
    )


def failed_item(change: Change, known: Iterable[FailedItem], now: datetime) -> FailedItem | None:
    """What is to be remembered of a change that failed; None for one that was only superseded.

    A failure of a kind that passes may be tried again by itself: after an hour, then doubling up to a day, ten times.
    """
    code = RejectCode(change.state.code or RejectCode.INTERNAL)
    if change.item is None or code is RejectCode.SUPERSEDED:
        return None
    key, attempt = item_key(change.item), change.item.attempt
    earlier = [
        each.tries for each in known if (each.instance, each.key, each.attempt) == (change.instance, key, attempt)
    ]
    tries = 1 + max(earlier, default=0)
    delay_s = min(RETRY_MAX_S, RETRY_FIRST_S * 2.0 ** (tries - 1))
    again = code in RETRYABLE and tries <= RETRY_TRIES_MAX
    return FailedItem(
        instance=change.instance,
        key=key,
        attempt=attempt,
        target=change.item.target,
        code=code,
        message=change.state.message,
        at=now,
        rollout=change.item.rollout,
        tries=tries,
        retry_at=now.timestamp() + delay_s if again else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceContext:
    """What a deployment has to know of the board it runs on.

    Attributes:
        clock: seconds that do not jump (boot time).
    """

    device: str
    boot_id: str
    places: Paths
    mac_key: bytes
    clock: Callable[[], float]


log = logging.getLogger("agent.update.state")

ANSWERS: Final = frozenset({Phase.PROBATION, Phase.COMMITTED})
"""Phases in which the new version is the one that answers."""


def about(
    board: DeviceContext,
    *,
    assignment: int,
    phase: WirePhase,
    item: Item | None = None,
    instance: str = "",
    running: str = "",
    code: RejectCode | None = None,
    message: str = "",
) -> Report:
    """A report in general: of an item, of a bare instance, or of an assignment as a whole."""
    report = Report(
        device=board.device,
        boot_id=board.boot_id,
        sequence=0,
        at=datetime.now(UTC),
        assignment=assignment,
        instance=instance,
        phase=phase,
        running=running,
        code=code,
        message=message,
    )
    if item is None:
        return report
    return msgspec.structs.replace(
        report,
        instance=item.instance,
        target=item.target,
        manifest_sha256=item.manifest_sha256,
        attempt=item.attempt,
        rollout=item.rollout,
    )


def of_change(board: DeviceContext, change: Change, *, before: str, log: tuple[str, ...] = ()) -> Report:
    """How a change stands.

    Args:
        board: this board.
        change: in its newest state.
        before: target path of what is committed, empty for nothing.
        log: the instance's last lines, for failures.
    """
    item, state = change.item, change.state
    report = about(
        board,
        assignment=change.assignment,
        phase=WirePhase(change.phase.value),
        item=item,
        instance=change.instance,
        running=item.target if item is not None and change.phase in ANSWERS else before,
        code=RejectCode(state.code) if state.code else None,
        message=state.message,
    )
    return msgspec.structs.replace(
        report,
        exercised=state.exercised,
        log=capped(log) if state.code else (),
        timings_ms=change.timings_ms,
    )


def tell(report: Report) -> None:
    """Put into the journal what a report says, with what it is about as fields, to be asked for by them."""
    about_it = systemd.fields(
        instance=report.instance,
        target=report.target,
        phase=report.phase,
        code=report.code,
        rollout=report.rollout,
        assignment=report.assignment,
    )
    name = report.instance or f"assignment {report.assignment}"
    said = ": ".join(filter(None, [name, f"{report.phase} {report.target}".rstrip(), report.code, report.message]))
    log.log(logging.WARNING if report.code else logging.INFO, "%s", said.partition("\n")[0], extra=about_it)


def capped(lines: tuple[str, ...]) -> tuple[str, ...]:
    """The last lines, at most 50 and 16 KiB."""
    kept: list[str] = []
    size = 0
    for line in reversed(lines[-bounds.LOG_LINES :]):
        size += len(line.encode())
        if size > bounds.LOG_MAX_BYTES:
            break
        kept.append(line)
    return tuple(reversed(kept))


@dataclass(frozen=True, slots=True)
class EffectResult:
    """How an effect ended.

    Attributes:
        fields: of the change that are known now (`manifest`, `replaced`).
        log: the instance's last lines, for the report.
    """

    happened: Happened
    fields: dict[str, Any] = field(default_factory=dict)
    log: tuple[str, ...] = ()


@dataclass(slots=True)
class ActiveChange:
    """A change under way.

    Attributes:
        superseded: something else is wanted, and it shall end as soon as it may.
        over: nothing of it is kept any more.
        work: the effect being carried out.
        log: the instance's last lines, for the next report of a failure.
        progress_at: when a download's progress was last said.
        lock: held while the change is advanced or relabelled, and persisted.
    """

    change: Change
    superseded: bool = False
    over: bool = False
    work: asyncio.Task[EffectResult] | None = None
    log: tuple[str, ...] = ()
    progress_at: float = 0.0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(slots=True)
class DeploymentState:
    """Everything that is wanted, committed, under way, and failed for good; by instance.

    Attributes:
        failed: (instance, key, attempt) of what was tried and failed.
    """

    assignment: Assignment | None = None
    committed: dict[str, Committed] = field(default_factory=dict)
    flights: dict[str, ActiveChange] = field(default_factory=dict)
    failed: set[tuple[str, str, int]] = field(default_factory=set)

    def wanted(self) -> dict[str, Item]:
        """The desired items by instance."""
        return {} if self.assignment is None else {item.instance: item for item in self.assignment.items}

    def is_committed(self, instance: str) -> bool:
        """Whether what is wanted under this name is what is committed."""
        item, have = self.wanted().get(instance), self.committed.get(instance)
        return item is not None and have is not None and item_key(have.item) == item_key(item)

    def has_failed(self, instance: str) -> bool:
        """Whether what is wanted under this name was tried and failed."""
        item = self.wanted().get(instance)
        return item is not None and (instance, item_key(item), item.attempt) in self.failed

    def planned(self) -> tuple[dict[str, Want], dict[str, Want], dict[str, InFlight]]:
        """What is wanted, committed and under way, as a plan has to know it."""
        return (
            {name: want_of(item) for name, item in self.wanted().items()},
            {name: want_of(each.item) for name, each in self.committed.items()},
            {name: in_flight_of(flight.change) for name, flight in self.flights.items()},
        )


DONE: Final = EffectResult(Happened(Event.DONE))


def refused(code: RejectCode, message: str, log: tuple[str, ...] = ()) -> EffectResult:
    """It can never be done."""
    return EffectResult(Happened(Event.REFUSED, code.value, message), log=log)


def lost(message: str) -> EffectResult:
    """The host went away."""
    return EffectResult(Happened(Event.HOST_LOST, RejectCode.HOST_GONE.value, message))

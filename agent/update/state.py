"""Deployment state: stored values, results of effects, one step of a change as a value, and reports about them.

`transition` is the pure core of the reconciler: from a change and the result of its effect to everything that one step
persists (`Transition`), with the report about it and the effect that follows. `Store.apply` writes a transition in one
database transaction, `DeploymentState.apply` then takes it over in memory.
"""

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from agent import systemd
from agent.config import Paths
from agent.update.machine import LIMITS, Counter, Effect, Event, Happened, State, advance, phase_of
from agent.update.plan import Failure, InFlight, Member, Want
from agent.update.probation import ProbationSample
from fleet.protocol import bounds, data_packages, wire
from fleet.protocol.assignment import Assignment, Item
from fleet.protocol.codes import RETRYABLE, Outcome, Phase, RejectCode, outcome_of
from fleet.protocol.manifest import Manifest
from fleet.protocol.messages import Report
from fleet.protocol.names import TargetName

log = logging.getLogger("agent.update.state")

RETRY_SOON_S: Final = 300.0
RETRY_FIRST_S: Final = 3600.0
RETRY_MAX_S: Final = 86_400.0
RETRY_TRIES_MAX: Final = 10
_OWN_FAULTS: Final = frozenset({RejectCode.INTERNAL, RejectCode.HOST_GONE, RejectCode.INTERRUPTED})
"""Failures of the device's own software and interruptions: retried later than others, and where the new version had
been started, which may have been its doing, not forever."""

FailureKey = tuple[str, str, int]
"""Key of a failure: instance, item key and attempt."""


# Stored values

_KEY_NAMES: Final = {"share_worker": "share_lane"}


def item_key(item: Item) -> str:
    """Return a digest of everything that identifies an item: not its attempt, its rollout, nor its atomic set.

    Fields go in under the names that they had in 0.1, since the keys of remembered failures were made with these.
    """
    plain = msgspec.structs.asdict(msgspec.structs.replace(item, attempt=0, rollout="", atomic=""))
    fields = {_KEY_NAMES.get(name, name): value for name, value in plain.items() if value is not msgspec.UNSET}
    body = b",".join(b"%s:%s" % (wire.canonical(name), wire.canonical(value)) for name, value in fields.items())
    return hashlib.sha256(b"{%s}" % body).hexdigest()


def bound_key(key: str, rebinds: str) -> str:
    """Return the key of an item with other data than it is committed with."""
    return f"{key}:{rebinds}" if rebinds else key


def digest_of(data: tuple["DataRef", ...]) -> str:
    """Return a digest of a binding."""
    return hashlib.sha256(wire.canonical([msgspec.to_builtins(each) for each in data])).hexdigest()[:16]


def _failure_key(item: Item) -> FailureKey:
    return item.instance, item_key(item), item.attempt


def reaches_running(before: "Committed", item: Item) -> bool:
    """Tell whether an item differs from a committed one only in keys whose change needs no restart."""
    unkeyed = [
        msgspec.structs.replace(each, config={}, attempt=0, rollout="", atomic="") for each in (before.item, item)
    ]
    old, new, known = before.item.config, item.config, before.manifest.config
    changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    if unkeyed[0] != unkeyed[1] or not changed or item.atomic or item.attempt > before.item.attempt:
        return False
    live = all(key in known and not known[key].restart for key in changed)
    return live and not any(known[key].flaw(new[key]) for key in changed & new.keys())


class DataRef(msgspec.Struct, frozen=True, kw_only=True):
    """Version of a data package to which an instance is bound.

    Attributes:
        name: of the package.
        target: its target path.
        attempt: of the package's item.
    """

    name: str
    target: str
    length: int
    sha256: str
    attempt: int = 0


class Committed(msgspec.Struct, frozen=True, kw_only=True):
    """Item that runs and starts again after a boot; a data package is kept.

    Attributes:
        generation: of the instance in the host.
        assignment: version of the assignment that brought the item.
        data: versions of the data packages that it reads.
    """

    item: Item
    manifest: Manifest
    generation: int
    assignment: int
    at: datetime
    data: tuple[DataRef, ...] = ()


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """Change of one instance.

    Attributes:
        item: the new item; None for a removal.
        manifest: known once the target has been found in the signed metadata.
        generation: in the host, given when the swap begins; 0 before.
        replaced: figures of the replaced generation, taken before the swap.
        boot_id: of the boot in which `state.entered` counts.
        timings_ms: duration of each phase.
        well: the new version has passed its own probation, and waits for the rest of its atomic set.
        data: versions of the data packages with which it starts, chosen when the swap begins.
        rebinds: digest of these, of a change of the committed item that brings it other data alone.
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
    data: tuple[DataRef, ...] = ()
    rebinds: str = ""

    @property
    def is_data(self) -> bool:
        """True for a change of a data package; False while its manifest is not known."""
        return self.manifest is not None and self.manifest.is_data

    @property
    def key(self) -> str:
        """Key of its item, and of the data that it brings; empty for a removal."""
        return "" if self.item is None else bound_key(item_key(self.item), self.rebinds)

    @property
    def phase(self) -> Phase:
        """Phase of the update machine."""
        return self.state.phase

    @property
    def atomic(self) -> str:
        """Name of the atomic set; empty for an instance that is swapped alone."""
        return "" if self.item is None else self.item.atomic

    def encode(self) -> bytes:
        """Return the change as JSON, for the store."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> "Change":
        """Read the result of `encode` of this or another version: an unknown phase rolls back, unknown fields are left.

        Raises:
            msgspec.DecodeError: damaged in any way.
        """
        try:
            raw: dict[str, Any] = msgspec.json.decode(data, type=dict[str, Any])
            raw["state"]["phase"] = phase_of(str(raw["state"].get("phase", ""))).value
            return msgspec.convert(raw, cls)
        except (KeyError, TypeError, AttributeError, *wire.JSON_ERRORS) as error:
            raise msgspec.DecodeError(f"{type(error).__name__}: {error}") from error


class FailedItem(msgspec.Struct, frozen=True, kw_only=True):
    """Failed item: not retried before `retry_at`, or before its attempt is raised.

    Attributes:
        went_back: the new version ran, and was taken back.
        tries: number of tries so far, for a temporary failure.
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
    went_back: bool = False
    tries: int = 1
    retry_at: float | None = None

    @property
    def failure_key(self) -> FailureKey:
        """Key under which the failure is remembered."""
        return self.instance, self.key, self.attempt


class Violation(msgspec.Struct, frozen=True, kw_only=True):
    """Reason why a committed item may no longer run (`agent.update.trust`).

    Attributes:
        key: of the item (`item_key`).
        target: its target path.
    """

    instance: str
    key: str
    target: str
    code: RejectCode
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceContext:
    """Properties of the device on which a deployment runs.

    Attributes:
        clock: seconds that do not jump (boot time).
    """

    device: str
    boot_id: str
    places: Paths
    mac_key: bytes
    clock: Callable[[], float]


# Results of effects


@dataclass(frozen=True, slots=True, kw_only=True)
class EffectResult:
    """Result of an effect, made by `agent.update.effects` and the reconciler.

    Attributes:
        event: for the update machine; None if the effect was cancelled.
        manifest: known after FETCH.
        replaced: figures of the replaced generation, known after SWAP.
        exercised: whether probation saw enough calls to mean something.
        undecided: which gates on metrics had too few samples; empty for none.
        log: last lines of the instance, for the report.
    """

    event: Event | None
    code: RejectCode | None = None
    message: str = ""
    manifest: Manifest | None = None
    replaced: ProbationSample | None = None
    exercised: bool = True
    undecided: str = ""
    log: tuple[str, ...] = ()

    @property
    def happened(self) -> Happened:
        """Event of the result for the update machine."""
        assert self.event is not None, "a cancelled effect is no event"
        return Happened(
            self.event,
            self.code.value if self.code else "",
            self.message,
            exercised=self.exercised,
            undecided=self.undecided,
        )


DONE: Final = EffectResult(event=Event.DONE)

CANCELLED: Final = EffectResult(event=None)

SUPERSEDED: Final = EffectResult(
    event=Event.SUPERSEDED, code=RejectCode.SUPERSEDED, message="another version is desired now"
)


def refused(code: RejectCode, message: str, log: tuple[str, ...] = ()) -> EffectResult:
    """Make the result of a permanent failure: no retry."""
    return EffectResult(event=Event.REFUSED, code=code, message=message, log=log)


def lost(message: str) -> EffectResult:
    """Make the result of an effect whose host connection was lost."""
    return EffectResult(event=Event.HOST_LOST, code=RejectCode.HOST_GONE, message=message)


def fault(message: str) -> EffectResult:
    """Make the result of an effect that failed because of a bug in the agent: no verdict on the component."""
    return EffectResult(event=Event.FAULT, code=RejectCode.INTERNAL, message=message)


def set_failed(phase: Phase, sibling: str) -> EffectResult:
    """Make the result of a change in `phase` whose atomic set failed because of `sibling`."""
    return EffectResult(
        event=Event.REFUSED if phase is Phase.STAGED else Event.UNWELL,
        code=RejectCode.SET_FAILED,
        message=f"not swapped, as {sibling} of the same atomic set failed",
    )


# Steps of a change


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """Step of a change: everything that it persists, and the effect that follows.

    Attributes:
        change: new state of the change under way.
        closed: instance whose change is over.
        new_generation: give `change`, or `committed` where there is no change, a generation never used before.
        committed: item that runs from now on, also after a boot.
        removed: instance that no longer runs.
        failure: to be remembered.
        forgiven: failures that are forgotten, of this attempt and earlier ones: the same item is committed now.
        epochs: security epoch by component, raised at a commit; epochs never fall.
        secrets: version by name of the secrets that the committed item uses; versions never fall.
        report: to be sent; its sequence is given when it is stored.
        effect: None for a step after which the change goes on as before.
    """

    change: Change | None = None
    closed: str = ""
    new_generation: bool = False
    committed: Committed | None = None
    removed: str = ""
    failure: FailedItem | None = None
    forgiven: FailureKey | None = None
    epochs: Mapping[str, int] = field(default_factory=dict)
    secrets: Mapping[str, int] = field(default_factory=dict)
    report: Report | None = None
    effect: Effect | None = None


_QUIET: Final = frozenset({Phase.IDLE, Phase.VERIFYING, Phase.STAGED, Phase.ROLLING_BACK})
"""Phases without a report of their own, as they last only moments."""

_REPORTED_AGAIN: Final = frozenset({Event.DELAYED, Event.FAULT})
"""Events that are reported although the phase stays as it is."""


def transition(
    change: Change,
    result: EffectResult,
    *,
    device: DeviceContext,
    now: float,
    at: datetime,
    committed: Committed | None = None,
    known: FailedItem | None = None,
) -> Transition:
    """Compute one step of a change (pure).

    Args:
        change: as persisted.
        result: of its effect.
        device: named in the report.
        now: seconds of the device's boot clock.
        at: time of day, for the report and the stored values.
        committed: committed item of the same instance.
        known: earlier failure of the same item and attempt.

    Raises:
        IllegalEventError: the update machine has no row for the event; nothing has changed.
    """
    state, effect = advance(change.state, result.happened, now)
    following = msgspec.structs.replace(
        change,
        state=state,
        timings_ms=_timed(change, state.phase, now),
        boot_id=device.boot_id,
        manifest=result.manifest or change.manifest,
        replaced=result.replaced or change.replaced,
    )
    running = committed.item.target if committed is not None else ""
    report = of_change(device, following, before=running, log=result.log, at=at)
    left, phase = change.phase, state.phase
    if effect is Effect.CLOSE:
        # A superseded change ends in FAILED without being stored in that phase, but is reported.
        is_news = phase is Phase.FAILED and left is not Phase.FAILED
        return Transition(closed=change.instance, report=report if is_news else None, effect=effect)
    new_generation = phase is Phase.SWAPPING and following.generation == 0 and following.item is not None
    if phase is left:
        reported = report if result.event in _REPORTED_AGAIN and phase not in _QUIET else None
        return Transition(change=following, new_generation=new_generation, report=reported, effect=effect)
    commits = phase is Phase.COMMITTED and following.item is not None
    failure = failed_item(following, known, at) if phase in {Phase.FAILED, Phase.ROLLED_BACK} else None
    if failure is not None and failure.retry_at is None and failure.code in RETRYABLE:
        report = msgspec.structs.replace(report, tries_ended=True)
    return Transition(
        change=following,
        new_generation=new_generation,
        committed=_committed(following, at) if commits else None,
        removed=change.instance if following.item is None and left is Phase.IDLE else "",
        failure=failure,
        forgiven=(following.instance, following.key, following.item.attempt)
        if commits and following.item is not None
        else None,
        epochs=_epochs(following) if commits else {},
        secrets=_secrets(following) if commits else {},
        report=None if phase in _QUIET else report,
        effect=effect,
    )


def _timed(change: Change, entered: Phase, now: float) -> dict[str, int]:
    """Add the time spent in the phase that is being left."""
    left = change.phase
    if left in {entered, Phase.IDLE}:
        return change.timings_ms
    spent_ms = int(1000 * max(0.0, now - change.state.entered))
    return {**change.timings_ms, left.value: change.timings_ms.get(left.value, 0) + spent_ms}


def _committed(change: Change, at: datetime) -> Committed:
    assert change.item is not None
    assert change.manifest is not None
    return Committed(
        item=change.item,
        manifest=change.manifest,
        generation=change.generation,
        assignment=change.assignment,
        at=at,
        data=change.data,
    )


def _epochs(change: Change) -> dict[str, int]:
    assert change.item is not None
    assert change.manifest is not None
    return {TargetName.from_path(change.item.target).component: change.manifest.security_epoch}


def _secrets(change: Change) -> dict[str, int]:
    assert change.item is not None
    return {ref.name: ref.version for ref in change.item.secrets}


def failed_item(change: Change, known: FailedItem | None, now: datetime) -> FailedItem | None:
    """Make the record of a change that failed; None for one that was only superseded.

    A failure of a kind that may pass (no space, a port in use, the network) is tried again without an operator as long
    as the assignment stands: after five minutes, then doubling up to a day. A fault of the device's own software, or an
    interruption, is tried again after an hour, then doubling up to a day. Where the version had been started, or its
    compiler was stopped, that may be its own doing, at a price for others: then ten times.
    """
    code = RejectCode(change.state.code or RejectCode.INTERNAL)
    if change.item is None or code is RejectCode.SUPERSEDED:
        return None
    tries = 1 + (known.tries if known is not None else 0)
    is_own = code in _OWN_FAULTS
    doublings = min(tries - 1, 20)  # far beyond the longest wait, and no overflow
    delay_s = min(RETRY_MAX_S, (RETRY_FIRST_S if is_own else RETRY_SOON_S) * 2.0**doublings)
    went_back = change.phase is Phase.ROLLED_BACK
    # Interruptions while it was compiled or ran may be its own doing.
    is_suspect = went_back or change.state.interruptions > LIMITS[Counter.INTERRUPTIONS]
    has_price = went_back or code is RejectCode.INTERRUPTED
    is_ended = (is_own and has_price and tries > RETRY_TRIES_MAX) or (code is RejectCode.INTERRUPTED and is_suspect)
    again = code in RETRYABLE and not is_ended
    return FailedItem(
        instance=change.instance,
        key=change.key,
        attempt=change.item.attempt,
        target=change.item.target,
        code=code,
        message=change.state.message,
        at=now,
        rollout=change.item.rollout,
        went_back=went_back,
        tries=tries,
        retry_at=now.timestamp() + delay_s if again else None,
    )


# State in memory

_PREPARING: Final = frozenset(
    {Phase.IDLE, Phase.FETCHING, Phase.VERIFYING, Phase.COMPILING, Phase.STAGED, Phase.SWAPPING}
)
"""Phases of a data package from which instances can have it a moment later."""


@dataclass(slots=True)
class ActiveChange:
    """Change under way.

    Attributes:
        serial: of the newest step; a result or progress with another serial is out of date.
        task: runs the effect of the newest step; None while none runs.
        effect: of the newest step.
        superseded: another item is desired; the change ends as soon as the update machine allows.
        held: result that waits at the barrier of the atomic set.
        log: last lines of the instance, for the next report of a failure.
        progress_at: time of the last report of a download's progress.
    """

    change: Change
    serial: int = 0
    task: asyncio.Task[EffectResult] | None = None
    effect: Effect | None = None
    superseded: bool = False
    held: EffectResult | None = None
    log: tuple[str, ...] = ()
    progress_at: float = float("-inf")


@dataclass(slots=True)
class DeploymentState:
    """Desired, committed, active and failed items. Written by the reconciler's task only; others read.

    Attributes:
        committed: by instance.
        active: changes under way, by instance.
        failed: remembered failures.
        violations: reasons found at the last check why committed items may no longer run.
    """

    desired: Assignment | None = None
    committed: dict[str, Committed] = field(default_factory=dict)
    active: dict[str, ActiveChange] = field(default_factory=dict)
    failed: dict[FailureKey, FailedItem] = field(default_factory=dict)
    violations: tuple[Violation, ...] = ()

    @property
    def problems(self) -> list[str]:
        """Sentences about items that violate a rule but keep running by the owner's policy."""
        return [
            f"{each.instance} keeps running, as this device's policy allows ({each.code}): {each.message}"
            for each in self.violations
            if self.in_force(each) is not None
        ]

    def apply(self, step: Transition) -> None:
        """Take over a step that has been persisted."""
        if step.change is not None and step.change.instance in self.active:
            self.active[step.change.instance].change = step.change
        if step.closed:
            self.active.pop(step.closed, None)
        if step.committed is not None:
            self.committed[step.committed.item.instance] = step.committed
        if step.removed:
            self.committed.pop(step.removed, None)
        if step.forgiven is not None:
            instance, item, newest = step.forgiven
            for attempt in [each for at, key, each in self.failed if (at, key) == (instance, item) and each <= newest]:
                del self.failed[instance, item, attempt]
        if step.failure is not None:
            self.failed[step.failure.failure_key] = step.failure

    def wanted(self) -> dict[str, Item]:
        """Return the desired items by instance."""
        return {} if self.desired is None else {item.instance: item for item in self.desired.items}

    def planned(self) -> tuple[dict[str, Want], dict[str, Want], dict[str, InFlight]]:
        """Return the desired, committed and active items as `plan` and `may_report_committed` take them."""
        wanted = {name: want_of(item) for name, item in self.wanted().items()}
        for name, (_, rebinds) in self.rebinding().items():
            have = self.committed[name].item
            key = bound_key(wanted[name].key, rebinds)
            known = self.failed.get((name, key, have.attempt))
            if known is None or known.retry_at is not None:
                wanted[name] = replace(wanted[name], key=key, attempt=have.attempt, rollout="")
        return (
            wanted,
            {name: want_of(each.item) for name, each in self.committed.items()},
            {name: in_flight_of(active.change) for name, active in self.active.items()},
        )

    def packages(self, namespace: str, name: str) -> tuple[DataRef, ...]:
        """Return the versions of a data package that instances may have, the one that is being switched to first."""
        switched = (
            active.change.item
            for active in self.active.values()
            if active.change.is_data and active.change.phase is Phase.PROBATION and not active.superseded
        )
        kept = (each.item for each in self.committed.values() if each.manifest.is_data)
        found = []
        for item in (*switched, *kept):
            assert item is not None
            of = TargetName.from_path(item.target)
            if (of.namespace, of.name) == (namespace, name):
                found.append(
                    DataRef(name=name, target=item.target, length=item.length, sha256=item.sha256, attempt=item.attempt)
                )
        return tuple(found)

    def bind(self, item: Item, manifest: Manifest) -> tuple[DataRef, ...] | str:
        """Choose the data with which an item starts; or say what it waits for.

        Of each package the version that is being switched to, else the committed one, else that which the instance has
        unless that was revoked.
        """
        revoked = {each.target for each in self.failed.values() if each.code is RejectCode.REVOKED}
        namespace, have = TargetName.from_path(item.target).namespace, self.committed.get(item.instance)
        bound = []
        for name, use in sorted(manifest.data.items()):
            own = (
                ()
                if have is None
                else tuple(each for each in have.data if each.name == name and each.target not in revoked)
            )
            choice = next(
                (
                    each
                    for each in (*self.packages(namespace, name), *own)
                    if data_packages.matches(use.version, TargetName.from_path(each.target).version)
                ),
                None,
            )
            if choice is None:
                wanted = "" if use.version == data_packages.ANY else f" {use.version}"
                return f"waits for data {name}{wanted}: no version of it that fits is on this device"
            bound.append(choice)
        return tuple(bound)

    def is_data_coming(self, change: Change) -> bool:
        """Tell whether a version of a package that a change waits for is being fetched."""
        assert change.item is not None
        assert change.manifest is not None
        namespace = TargetName.from_path(change.item.target).namespace
        for active in self.active.values():
            if active.change.item is None or active.change.phase not in _PREPARING:
                continue
            of = TargetName.from_path(active.change.item.target)
            use = change.manifest.data.get(of.name)
            if of.namespace == namespace and use is not None and data_packages.matches(use.version, of.version):
                return True
        return False

    def rebinding(self) -> dict[str, tuple[tuple[DataRef, ...], str]]:
        """Return the committed instances that are to have other data, with it and its digest."""
        found = {}
        for name, item in self.wanted().items():
            have = self.committed.get(name)
            if have is None or not have.manifest.data or item_key(have.item) != item_key(item):
                continue
            bound = self.bind(have.item, have.manifest)
            if isinstance(bound, tuple) and [each.sha256 for each in bound] != [each.sha256 for each in have.data]:
                found[name] = (bound, digest_of(bound))
        return found

    def known_failure(self, item: Item | None) -> FailedItem | None:
        """Return the remembered failure of this item and attempt."""
        return None if item is None else self.failed.get(_failure_key(item))

    def in_force(self, violation: Violation) -> Committed | None:
        """Return the committed item that a violation is about; None if another one is committed by now."""
        have = self.committed.get(violation.instance)
        return have if have is not None and item_key(have.item) == violation.key else None

    def members(self, change: Change) -> tuple[Member, ...]:
        """Return the other members of a change's atomic set; none for an instance that is swapped alone."""
        if not change.atomic:
            return ()
        return tuple(
            self._member(name, item)
            for name, item in self.wanted().items()
            if item.atomic == change.atomic and name != change.instance
        )

    def _member(self, name: str, item: Item) -> Member:
        active, have = self.active.get(name), self.committed.get(name)
        in_set = active is not None and active.change.atomic == item.atomic
        return Member(
            instance=name,
            phase=active.change.phase if active is not None and in_set else None,
            well=active is not None and in_set and active.change.well,
            is_busy=active is not None and not in_set,
            is_committed=have is not None and item_key(have.item) == item_key(item),
            has_failed=self.known_failure(item) is not None,
        )


def want_of(item: Item) -> Want:
    """Reduce an item to what the plan needs."""
    return Want(
        instance=item.instance,
        key=item_key(item),
        attempt=item.attempt,
        rollout=item.rollout,
        atomic=item.atomic,
    )


def in_flight_of(change: Change) -> InFlight:
    """Reduce a change under way to what the plan needs."""
    item = change.item
    if item is None:
        return InFlight(instance=change.instance, key="", phase=change.phase)
    want = want_of(item)
    return InFlight(
        instance=change.instance, key=change.key, phase=change.phase, attempt=want.attempt, rollout=want.rollout
    )


def failure_of(failed: FailedItem) -> Failure:
    """Reduce a remembered failure to what the plan needs."""
    return Failure(
        instance=failed.instance,
        key=failed.key,
        attempt=failed.attempt,
        rollout=failed.rollout,
        retry_at=failed.retry_at,
        by_set=failed.code is RejectCode.SET_FAILED,
        is_verdict=verdict_of(failed) is not None,
    )


def verdict_of(failed: FailedItem) -> Phase | None:
    """Return the phase in which a remembered failure is reported again; None where it says nothing of the version."""
    ended = (Phase.FAILED, Phase.ROLLED_BACK) if failed.went_back else (Phase.FAILED,)
    return next((phase for phase in ended if outcome_of(failed.code, phase) is Outcome.FAILED), None)


# Reports

ANSWERS: Final = frozenset({Phase.PROBATION, Phase.COMMITTED})
"""Phases in which the new version answers."""


def about(
    device: DeviceContext,
    *,
    assignment: int,
    phase: Phase,
    item: Item | None = None,
    instance: str = "",
    running: str = "",
    generation: int = 0,
    code: RejectCode | None = None,
    message: str = "",
    at: datetime | None = None,
) -> Report:
    """Make a report of an item, of a bare instance, or of an assignment as a whole; `at` is now by default."""
    report = Report(
        device=device.device,
        boot_id=device.boot_id,
        sequence=0,
        at=at or datetime.now(UTC),
        assignment=assignment,
        instance=instance,
        phase=phase,
        generation=generation,
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


def of_change(
    device: DeviceContext, change: Change, *, before: str, log: tuple[str, ...] = (), at: datetime | None = None
) -> Report:
    """Make the report of a change.

    Args:
        device: this device.
        change: in its newest state.
        before: target path of the committed item, empty for none.
        log: last lines of the instance, for failures.
        at: now by default.
    """
    item, state = change.item, change.state
    report = about(
        device,
        assignment=change.assignment,
        phase=change.phase,
        item=item,
        instance=change.instance,
        running=item.target if item is not None and change.phase in ANSWERS else before,
        generation=change.generation,
        code=RejectCode(state.code) if state.code else None,
        message=state.message,
        at=at,
    )
    return msgspec.structs.replace(
        report,
        exercised=state.exercised,
        undecided=state.undecided or msgspec.UNSET,
        log=capped(log) if state.code else (),
        timings_ms=change.timings_ms,
        rollout="" if change.rebinds else report.rollout,  # the data's own outcome is what a rollout asks for
    )


def log_report(report: Report) -> None:
    """Write a report into the journal, with its subject as fields to search by."""
    subject = systemd.fields(
        instance=report.instance,
        target=report.target,
        phase=report.phase,
        code=report.code,
        rollout=report.rollout,
        assignment=report.assignment,
    )
    name = report.instance or f"assignment {report.assignment}"
    text = ": ".join(filter(None, [name, f"{report.phase} {report.target}".rstrip(), report.code, report.message]))
    log.log(logging.WARNING if report.code else logging.INFO, "%s", text.partition("\n")[0], extra=subject)


def capped(lines: tuple[str, ...]) -> tuple[str, ...]:
    """Return the last lines, as many as fit into a report."""
    kept: list[str] = []
    size = 0
    for line in reversed(lines):
        size += len(msgspec.json.encode(line)) + 1
        if size > bounds.EXCERPT_MAX_BYTES:
            break
        kept.append(line)
    return tuple(reversed(kept))

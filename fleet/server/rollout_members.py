"""Members of a rollout as the store knows them: whom the change concerns, and the draw over them."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from msgspec.structs import replace

from fleet.protocol.codes import Outcome, RolloutState
from fleet.rollout.decide import Gate, Rollout
from fleet.rollout.effective import Overlay
from fleet.rollout.members import UNGUARDED, Candidate, draw
from fleet.rollout.model import Member, Value
from fleet.rollout.selector import parse
from fleet.server.director import Director, bad_key, lacks, unfit
from fleet.server.facts import chosen
from fleet.server.tuf_repository import TufRepository
from fleet.store.rows import DeviceRow, RolloutPlan, RolloutRow
from fleet.store.store import DeviceFacts, Store
from signing.policy import Release

_ASSUMED: Final = "assumed"
_NAMED_MAX: Final = 5
_UNSELECTED: Final = "--where leaves it out"
_BATCH: Final = 100
"""Devices of which the store is asked at once."""


@dataclass(frozen=True, slots=True)
class Change:
    """A value for an instance in one scope: a group, or a device; `where` chooses among the devices of a group."""

    group: str
    device: str
    instance: str
    value: Value
    where: str = ""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A rollout at its beginning, with its members.

    Attributes:
        left_out: the reason for each device that it does not concern.
        unguarded: why it must not begin, nor settle for an empty group; empty for no reason.
    """

    progress: Rollout
    waves: str
    members: tuple[Member, ...]
    left_out: dict[str, str]
    unguarded: str = ""

    @property
    def affected(self) -> tuple[Member, ...]:
        """Return the members that are offered it, in the order of the draw."""
        return tuple(sorted((each for each in self.members if each.wave or each.canary), key=lambda each: each.rank))


class Membership:
    """Resolves the members of rollouts."""

    def __init__(self, *, store: Store, repository: TufRepository, director: Director) -> None:
        self._store, self.repository, self._director = store, repository, director

    def devices(self, change: Change) -> list[DeviceRow]:
        """Return the devices of a scope."""
        if change.device:
            return self._store.devices.some([change.device])
        group = self._store.devices.group(change.group)
        return [] if group is None else self._store.devices.some(self._store.devices.members(group))

    def selected(self, change: Change) -> list[DeviceRow]:
        """Return the devices of a scope that its selector takes."""
        rows = self.devices(change)
        out = self.unselected(change.where, rows)
        return [row for row in rows if row.id not in out]

    def ids(self, group: str, device: str) -> set[str]:
        """Return the ids of the devices of a scope, without revoked ones."""
        if device:
            row = self._store.devices.get(device)
            return set() if row is None or row.revoked else {device}
        found = self._store.devices.group(group)
        return set() if found is None else set(self._store.devices.members(found))

    def draw(self, change: Change, plan: RolloutPlan, *, also_out: dict[str, str] | None = None) -> Drawn:
        """Resolve the members of a rollout, once and for all.

        Args:
            change: what is offered.
            plan: waves and limits.
            also_out: devices that another rollout of the same atomic set leaves out.
        """
        rows = self.devices(change)
        unselected = self.unselected(change.where, rows)
        left_out = self._left_out([change], rows) | (also_out or {})
        left_out |= dict.fromkeys(unselected, _UNSELECTED)
        candidates = [Candidate(row.id, row.online, row.labels) for row in rows if row.id not in left_out]
        drawn = draw(candidates, plan.stages, seed=plan.seed)
        refused = drawn.refusal
        if plan.approval and not candidates:  # to settle it would offer it, unapproved, to who comes later
            refused = refused or f"the plan {UNGUARDED}"
        if refused:
            reason = refused if candidates else f"{refusal(left_out)}; {refused}"
            return Drawn(Rollout(RolloutState.RUNNING, (), plan.limits), "", (), left_out, reason)
        wave_of = {device: wave for wave, devices in enumerate(drawn.waves, 1) for device in devices}
        rank = {device: place for place, device in enumerate(drawn.order)}
        members = tuple(
            Member(
                row.id,
                wave_of.get(row.id, 0),
                Outcome.NOT_AFFECTED if row.id in left_out else Outcome.PENDING,
                rank=rank.get(row.id, 0),
                reason=left_out.get(row.id, ""),
                site=row.labels.get(plan.site_label, ""),
                canary=row.id not in left_out and (not drawn.stages or drawn.stages[0].takes(row.labels)),
                attempt=change.value.attempt,
                cancelled=row.id in unselected,
            )
            for row in rows
        )
        gates = tuple(
            Gate(plan.soak_s if stage.soak_s is None else stage.soak_s, stage.approval) for stage in drawn.stages
        )
        progress = Rollout(RolloutState.RUNNING, gates, plan.limits, vacancies=drawn.vacancies, approval=plan.approval)
        return Drawn(progress, ", ".join(map(str, drawn.stages)), members, left_out)

    def joins(self, rollout: RolloutRow, row: DeviceRow, left_out: str) -> Member:
        """Return the member that a device becomes which joins the group while a rollout runs, or after it settled.

        Who has the value already waits in no queue: earlier versions assigned it to everybody who joined.

        Args:
            rollout: which the device enters.
            row: the device.
            left_out: why the rollout, or another one of its set, does not concern the device; empty for no reason.
        """
        if self.unselected(rollout.plan.where, [row]):
            return Member(row.id, 0, Outcome.NOT_AFFECTED, reason=_UNSELECTED, canary=False, cancelled=True)
        if left_out:
            return Member(row.id, 0, Outcome.NOT_AFFECTED, reason=left_out, canary=False)
        settled = rollout.state is RolloutState.SUCCEEDED
        return Member(
            row.id,
            len(rollout.progress.gates),
            attempt=rollout.value.attempt,
            canary=False,
            arrival=settled,
            new=settled and not self._director.has_another(row.id, rollout.instance, rollout.id),
            rank=1 << 30,
            site=row.labels.get(rollout.plan.site_label, ""),
        )

    def unselected(self, where: str, rows: Iterable[DeviceRow]) -> set[str]:
        """Return those devices that a selector leaves out, as they are now; none for an empty one."""
        devices = list(rows)
        return {row.id for row in devices} - chosen(self._store, parse(where), devices) if where else set()

    def left_out_of_all(self, changes: Sequence[Change]) -> dict[str, str]:
        """Return the devices that an atomic set leaves out, with the reason: each gets all of its members, or none."""
        return self._left_out(changes, self.devices(changes[0]))

    def _left_out(self, changes: Sequence[Change], rows: Sequence[DeviceRow]) -> dict[str, str]:
        """Return the devices that any of some changes does not concern, with the reason."""
        found: dict[str, str] = {}
        for start in range(0, len(rows), _BATCH):
            batch = rows[start : start + _BATCH]
            facts = self._store.facts(batch)
            found |= {
                row.id: reason
                for change in changes
                for row in batch
                if (reason := self.left_out(change, facts[row.id]))
            }
        return found

    def left_out(self, change: Change, facts: DeviceFacts) -> str:
        """Return why a change does not concern a device, in words; empty for no reason."""
        release = None if change.value.target is None else self.repository.release(change.value.target)
        if facts.device.revoked:
            return "it is revoked"
        return _misfit(release, facts, change.instance) or self._elsewhere(change, facts)

    def lacks(self, row: DeviceRow, release: Release | None, instance: str) -> tuple[str, ...]:
        """Return the secrets that a device needs and has not."""
        if release is None or not release.manifest.secrets:
            return ()
        return lacks(release, instance, self._store.boxes.newest(row.id))

    def _elsewhere(self, change: Change, facts: DeviceFacts) -> str:
        """Return what supplies the instance in spite of the change: a pin, or another group."""
        assumed = Overlay(_ASSUMED, math.inf, change.group, change.instance, change.value)  # type: ignore[arg-type]
        found = self._director.effective(facts.device, [assumed], facts=facts).get(change.instance)
        if found is None or found.rollout == _ASSUMED:
            return ""
        masked = found.source == "pin" and found.value.target is None
        return "it is masked by a pin" if masked else f"it is supplied by {found.source}"


def _misfit(release: Release | None, facts: DeviceFacts, instance: str) -> str:
    """Return why a device cannot run a release; empty where it can."""
    if release is None:
        return ""
    row, missing = facts.device, lacks(release, instance, facts.boxes)
    secret = f"it lacks the secret {missing[0]}: fleet secret set {missing[0]} --device {row.id}" if missing else ""
    engineless = "it has no wasm engine" if row.versions.host and not row.versions.engine else ""
    wrong = bad_key(release, facts.own.get(instance, {}))
    key = f"its own {wrong}: fleet device set {row.id} {instance} KEY=VALUE" if wrong else ""
    return unfit(release, row) or engineless or secret or key


def with_presence(
    members: Iterable[Member],
    online: Mapping[str, float],
    heard: Mapping[str, float],
    since: float,
    polling: Mapping[str, float],
    busy: Collection[str] = (),
) -> list[Member]:
    """Return members with what the server knows of their connections now.

    Args:
        members: as stored.
        online: since when each device is connected.
        heard: when each device sent anything.
        since: the beginning of what the server has heard.
        polling: since when each device polls that is not connected; in the catch-up queue it counts as online.
        busy: devices that another rollout has in progress.
    """
    return [
        replace(
            each,
            online_since=online.get(each.device, polling.get(each.device) if each.arrival else None),
            heard_at=max(each.heard_at or 0, heard.get(each.device, since)),
            busy=each.device in busy,
        )
        for each in members
    ]


def refusal(left_out: dict[str, str]) -> str:
    """Say why a rollout concerns no device."""
    if not left_out:
        return "the group has no devices"
    some = "; ".join(f"{device}: {reason}" for device, reason in sorted(left_out.items())[:_NAMED_MAX])
    more = len(left_out) - _NAMED_MAX
    return f"it concerns no device: {some}" + (f" and {more} more" if more > 0 else "")

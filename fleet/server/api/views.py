"""Views: replies of the operator API from rows of the store. Views never write."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Final

import msgspec

from fleet.protocol import operator_api, wire
from fleet.protocol.bounds import NUMBER_MAX
from fleet.protocol.codes import RETRYABLE, Outcome, Phase, RejectCode, remediation
from fleet.protocol.messages import Health, Report
from fleet.protocol.names import BadNameError, TargetName
from fleet.protocol.operator_api import GroupPlan, History
from fleet.rollout.effective import Withdrawal
from fleet.rollout.group_plan import stages_of
from fleet.rollout.members import taken
from fleet.rollout.model import Member
from fleet.rollout.selector import Selector
from fleet.server.director import Director, items_of
from fleet.server.facts import chosen, health_of
from fleet.store.rows import DeviceRow, EventRow, Extra, GroupRow, ReportRow, RolloutRow
from fleet.store.sqlite import utc, utc_or_none
from fleet.store.store import Store
from signing.device_statements import unverified
from signing.errors import Rejected

HISTORY_PAGE: Final = 200
_WAITS_MAX: Final = 20


class Views:
    """Replies of the operator API, made from the store."""

    def __init__(
        self,
        *,
        store: Store,
        director: Director,
        dropped: Counter[str],
        clock: Callable[[], datetime],
        waits: Mapping[int, tuple[str, ...]],
    ) -> None:
        """Prepare; `dropped` counts dropped messages by device, `waits` names whom each rollout waits for."""
        self._store, self._director, self._dropped, self._clock = store, director, dropped, clock
        self._waits = waits

    # -- devices ------------------------------------------------------------------------------------------------------

    def devices(self, selector: Selector | None = None) -> operator_api.Devices:
        """Return the devices, every one or those that a selector takes."""
        rows = self._store.devices.all()
        if selector is not None:
            taken_ids = chosen(self._store, selector, rows)
            rows = [row for row in rows if row.id in taken_ids]
        groups = self._store.devices.groups_of_each(rows)
        pins, versions = self._store.rollouts.pins(), self._store.delivery.versions()
        return operator_api.Devices(
            devices=tuple(
                _row(row, groups[row.id], pins=pins.get(row.id, []), assigned=versions.get(row.id, 0)) for row in rows
            )
        )

    def row(self, row: DeviceRow) -> operator_api.DeviceRow:
        """Return a device as in a listing."""
        assignment = self._store.delivery.assignment(row.id)
        return _row(
            row,
            self._store.devices.groups_of(row),
            pins=[each.instance for each in self._store.rollouts.settled(device=row.id)],
            assigned=0 if assignment is None else assignment.version,
        )

    def detail(self, row: DeviceRow) -> operator_api.DeviceDetail:
        """Return everything about one device."""
        certificate = self._store.access.newest_certificate(row.id)
        return operator_api.DeviceDetail(
            row=self.row(row),
            enrolled_at=utc(row.enrolled_at),
            boot_id=row.boot_id,
            health_at=utc_or_none(row.health_at),
            health=health_of(row),
            effective=self._effective(row),
            certificate_serial="" if certificate is None else certificate.serial,
            certificate_expires=None if certificate is None else utc(certificate.not_after),
            failed=self._failed(row.id),
            alerts=tuple(
                operator_api.Alert(kind=each.kind, since=utc(each.since), until=utc(each.until), text=each.text)
                for each in self._store.devices.alerts(row.id, now=self._clock().timestamp())
            ),
            dropped=self._dropped[row.id],
        )

    def _effective(self, row: DeviceRow) -> tuple[operator_api.Effective, ...]:
        """Return what a device should run, and what a pin keeps from it, each value with its source."""
        wanted = self._director.effective(row)
        keys, attempts = self._director.keys(row, wanted), self._store.delivery.attempts(row.id)
        found = []
        for instance, each in sorted(wanted.items()):
            if each.value.target is None and each.source != "pin":
                continue
            of = keys.get(instance, {})
            found.append(
                operator_api.Effective(
                    instance=instance,
                    target=each.value.target or "",
                    source=each.source,
                    config={key: value for key, value in each.value.config if key in of and of[key].declared},
                    keys={
                        key: operator_api.EffectiveKey(value=has.value, source=has.source, declared=has.declared)
                        for key, has in of.items()
                    },
                    port=each.value.port,
                    share_worker=each.value.share_worker,
                    attempt=max(each.value.attempt, attempts.get(instance, 0)),
                    rollout=each.rollout,
                )
            )
        return tuple(found)

    def _failed(self, device: str) -> tuple[operator_api.TimelineEntry, ...]:
        """Return the newest report of each instance whose last deployment failed."""
        newest: dict[str, operator_api.TimelineEntry] = {}
        for report in self._store.delivery.reports(device, 500):
            entry = _reported(report)
            final = entry.phase in {Phase.COMMITTED, Phase.FAILED, Phase.ROLLED_BACK}
            if entry.code is not RejectCode.SUPERSEDED and final:
                newest.setdefault(entry.instance, entry)
        return tuple(entry for entry in newest.values() if entry.phase is not Phase.COMMITTED)

    def timeline(self, device: str, limit: int) -> operator_api.Timeline:
        """Return what happened to a device, newest first."""
        reports = [_reported(row) for row in self._store.delivery.reports(device, limit)]
        events = [_happened(row) for row in self._store.devices.events(device, limit)]
        entries = sorted([*reports, *events], key=lambda entry: entry.at, reverse=True)
        return operator_api.Timeline(device=device, entries=tuple(entries[:limit]))

    def history(self, row: DeviceRow, *, after: tuple[str, int]) -> History:
        """Return a page of a device's signed reports, with its certificate."""
        certificate = self._store.access.newest_certificate(row.id)
        rows = self._store.delivery.history(row.id, after=after, limit=HISTORY_PAGE)
        return History(
            device=row.id,
            certificate_pem="" if certificate is None else certificate.pem,
            reports=tuple(_whole(each) for each in rows),
            boot_id=rows[-1].boot_id if rows else "",
            sequence=rows[-1].sequence if rows else 0,
        )

    # -- groups ------------------------------------------------------------------------------------------------------

    def groups(self) -> operator_api.Groups:
        """Return every group."""
        return operator_api.Groups(groups=tuple(self.group(row) for row in self._store.devices.groups()))

    def group(self, row: GroupRow) -> operator_api.GroupRow:
        """Return a group."""
        online = self._store.devices.online(self._store.devices.members(row))
        open_here = [each.number for each in self._store.rollouts.open() if each.group == row.name]
        return operator_api.GroupRow(
            name=row.name,
            priority=row.priority,
            selector=row.selector,
            devices=len(online),
            online=sum(online.values()),
            settled=tuple(
                operator_api.Settled(
                    instance=each.instance, target=each.value.target, since=utc(each.since), rollout=each.rollout
                )
                for each in self._store.rollouts.settled(group=row.name)
                if each.value.target is not None
            ),
            rollout=max(open_here, default=0),
            planned=row.policy is not None,
        )

    def policy(self, row: GroupRow, plan: GroupPlan | None) -> operator_api.GroupPolicy:
        """Return a plan as a group's, with how many devices each of its stages takes now."""
        stages = () if plan is None else stages_of(plan)
        devices = self._store.devices.some(self._store.devices.members(row))
        sizes = zip(stages, taken([each.labels for each in devices], stages), strict=True)
        views = (operator_api.StageView(text=str(each), devices=n, approval=each.approval) for each, n in sizes)
        return operator_api.GroupPolicy(group=row.name, plan=plan, stages=tuple(views))

    # -- rollouts ----------------------------------------------------------------------------------------------------

    def rollouts(self, rows: Iterable[RolloutRow]) -> operator_api.Rollouts:
        """Return rollouts without their devices."""
        return operator_api.Rollouts(rollouts=tuple(self.rollout(row, devices=False) for row in rows))

    def rollout(self, row: RolloutRow, *, devices: bool = True) -> operator_api.RolloutView:
        """Return a rollout."""
        counts = self._store.rollouts.waves(row.number)
        waves = tuple(
            operator_api.WaveView(text=text, devices=counts.get(number, 0), offered=number <= row.progress.wave)
            for number, text in enumerate(filter(None, map(str.strip, row.waves.split(","))), 1)
        )
        return operator_api.RolloutView(
            id=row.id,
            number=row.number,
            revision=row.revision,
            state=row.state,
            instance=row.instance,
            target=row.value.target or "",
            previous="" if row.before is None else row.before.target or "",
            where=row.plan.where,
            group=row.group,
            device=row.device,
            waves=waves,
            wave=row.progress.wave,
            devices=self._rollout_devices(row) if devices else (),
            counts=self._store.rollouts.counts(row.number),
            reason=row.reason,
            note=row.note,
            by=row.by,
            undoes=row.undoes,
            together=tuple(each.number for each in self._store.rollouts.together(row)) if row.value.atomic else (),
            seed=row.plan.seed,
            causes=tuple(sorted(row.progress.causes)),
            waits_for=self._waits.get(row.number, ())[:_WAITS_MAX],
            waits=len(self._waits.get(row.number, ())),
            queue_closed=row.progress.closed,
            starts_at=utc_or_none(row.plan.starts_at),
            created_at=utc(row.created_at),
            ended_at=utc_or_none(row.ended_at),
        )

    def _rollout_devices(self, row: RolloutRow) -> tuple[operator_api.RolloutDevice, ...]:
        online = self._store.devices.connected()
        found = self._store.rollouts.devices(row.number)
        return tuple(_rollout_device(member, extra, online=member.device in online) for member, extra in found)

    def withdrawal(self, foreseen: Withdrawal) -> operator_api.WithdrawalView:
        """Return the devices that the withdrawal of a release would concern, and what would become of them."""
        devices: list[operator_api.WithdrawnDevice] = []
        for row in self._store.devices.all():
            instances = {} if row.revoked else self._instances_of(row, foreseen.target)
            after = self._director.targets_after(row, foreseen) if instances else {}
            devices += [
                operator_api.WithdrawnDevice(
                    device=row.id, instance=name, online=row.online, runs=runs, next=after.get(name, "")
                )
                for name, runs in sorted(instances.items())
            ]
        return operator_api.WithdrawalView(
            target=foreseen.target, devices=tuple(devices), rollouts=tuple(sorted(foreseen.ended))
        )

    def _instances_of(self, row: DeviceRow, target: str) -> dict[str, bool]:
        """Return the instances with which a device has a target, and whether it runs it by its newest word."""
        health = health_of(row)
        running = {each.instance for each in (() if health is None else health.instances) if each.target == target}
        running |= {name for name, kept in ({} if health is None else health.data).items() if kept == target}
        items = items_of(self._store.delivery.assignment(row.id))
        return {name: name in running for name in running | {item.instance for item in items if item.target == target}}

    def audit(self, limit: int) -> operator_api.Audit:
        """Return acts, newest first."""
        return operator_api.Audit(
            entries=tuple(
                operator_api.AuditEntry(
                    number=row.number,
                    at=utc(row.at),
                    actor=row.actor,
                    act=row.act,
                    subject=row.subject,
                    detail=row.detail,
                )
                for row in self._store.access.acts(limit)
            )
        )


def _row(row: DeviceRow, groups: Iterable[GroupRow], *, pins: Iterable[str], assigned: int) -> operator_api.DeviceRow:
    health = health_of(row)
    return operator_api.DeviceRow(
        id=row.id,
        name=row.name,
        groups=tuple(group.name for group in groups),
        labels=row.labels,
        online=row.online and not row.revoked,
        seen_at=utc_or_none(row.seen_at),
        machine=row.versions.machine or row.machine,
        versions=row.versions,
        assigned=assigned,
        accepted=row.accepted,
        committed=row.committed,
        instances=() if health is None else health.instances,
        pins=tuple(pins),
        revoked=row.revoked,
        problem=_problem(row, health),
        memory_bytes=0 if health is None else health.resources.memory_total_bytes,
        data={} if health is None else health.data,
    )


def _problem(row: DeviceRow, health: Health | None) -> str:
    if row.revoked:
        return "revoked"
    if row.seen_at is None:
        return "enrolled, and not seen since"
    if health is None:
        return ""
    return next(iter((*health.problems, *(each.error for each in health.instances if each.error))), "")


def _rollout_device(progress: Member, extra: Extra, *, online: bool) -> operator_api.RolloutDevice:
    return operator_api.RolloutDevice(
        device=progress.device,
        wave=progress.wave,
        outcome=progress.outcome,
        online=online,
        previous=extra.previous,
        running=progress.running,
        phase=_phase(progress.phase),
        progress=progress.progress,
        code=_code(progress.code),
        message=progress.message,
        exercised=progress.exercised,
        reason=progress.reason,
        returning=progress.returning,
        accepted=progress.accepted is not None and progress.accepted is progress.outcome,
        retrying=progress.outcome is Outcome.DEFERRED and progress.code in RETRYABLE and not progress.tries_ended,
        offered_at=utc_or_none(extra.offered_at),
        acked_at=utc_or_none(extra.acked_at),
        ended_at=utc_or_none(extra.ended_at),
        timings_ms={name: min(spent, NUMBER_MAX) for name, spent in extra.timings_ms.items()},
        log=extra.log,
    )


def _phase(text: str) -> Phase | None:
    return Phase(text) if text in Phase.__members__.values() else None


def _code(text: str) -> RejectCode | None:
    return RejectCode(text) if text in RejectCode.__members__.values() else None


def _happened(row: EventRow) -> operator_api.TimelineEntry:
    return operator_api.TimelineEntry(
        at=utc(row.at), kind=row.kind, text=row.text, rollout=row.rollout, assignment=row.assignment
    )


def _whole(row: ReportRow) -> msgspec.Raw:
    """Return a report byte for byte; one that is damaged in the database in words, so that the others are shown."""
    try:
        return msgspec.json.decode(row.raw, type=msgspec.Raw)
    except wire.JSON_ERRORS:
        words = f"number {row.sequence} of boot {row.boot_id!r} is damaged in the server's database"
        return msgspec.Raw(msgspec.json.encode(words))


def _reported(row: ReportRow) -> operator_api.TimelineEntry:
    try:
        report = wire.decode(Report, unverified(row.raw))
    except (Rejected, wire.WireError) as error:  # stored by an older server, which had no bounds
        return operator_api.TimelineEntry(
            at=utc(row.at), kind="report", text="a report that cannot be read", message=str(error), rollout=row.rollout
        )
    return operator_api.TimelineEntry(
        at=utc(row.at),
        kind="report",
        text=_sentence(report),
        instance=report.instance,
        target=report.target,
        phase=report.phase,
        code=report.code,
        message=report.message,
        action=remediation(report.code),
        retryable=report.code in RETRYABLE and not report.tries_ended,
        rollout=report.rollout,
        assignment=report.assignment,
        log=report.log,
        timings_ms=report.timings_ms,
    )


def _sentence(report: Report) -> str:
    what = (
        f"{report.instance}: {_shown(report.target)}"
        if report.instance
        else f"assignment {report.refused or report.assignment}"
    )
    message = report.message.strip()  # a trap's ends with its last line
    said = f" ({report.code}): {message}" if report.code else f": {message}" if message else ""
    match report.phase:
        case Phase.COMMITTED if report.instance and not report.target:
            return f"{report.instance}: removed"
        case Phase.COMMITTED:
            few = "" if report.exercised else ", though few calls came to try it"
            return f"{what} is committed{few}" + (f"; undecided: {report.undecided}" if report.undecided else "")
        case Phase.ROLLED_BACK:
            back = f"; {_shown(report.running)} answers again" if report.running else ""
            return f"{what} was rolled back{said}{back}"
        case Phase.FAILED:
            return f"{what} was not started{said}"
        case _:
            done = "" if report.progress is None else f" {report.progress}%"
            return f"{what} {report.phase}{done}{said}"


def _shown(target: str) -> str:
    try:
        return str(TargetName.from_path(target))
    except BadNameError:
        return target

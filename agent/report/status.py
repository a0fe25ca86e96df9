"""Why the board runs what it runs: its own memory, told in sentences, without network or agent."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final

import msgspec

from agent.identity.identity import Identity
from agent.update.state import Violation
from agent.update.store import Store
from fleet.protocol.codes import Phase, RejectCode, remediation
from fleet.protocol.messages import Report

TIMELINE_ROWS: Final = 20


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """One committed instance."""

    instance: str
    target: str
    generation: int
    since: datetime
    assignment: int


class Changing(msgspec.Struct, frozen=True, kw_only=True):
    """One change under way; `target` is empty for a removal."""

    instance: str
    target: str
    phase: str
    code: str = ""
    message: str = ""


class Failed(msgspec.Struct, frozen=True, kw_only=True):
    """One remembered failure."""

    instance: str
    target: str
    code: RejectCode
    message: str
    at: datetime
    retry_at: datetime | None
    action: str = ""


class StatusReport(msgspec.Struct, frozen=True, kw_only=True):
    """Where the board stands; what `status` and `why` print, and their `--json`."""

    device: str
    fleet: str
    group: str
    accepted: int
    deployed: int
    committed: int
    unsent_reports: int
    running: tuple[Running, ...]
    changing: tuple[Changing, ...]
    failed: tuple[Failed, ...]
    doubts: tuple[Violation, ...] = ()
    problems: tuple[str, ...] = ()
    timeline: tuple[Report, ...] = ()


def standing(identity: Identity, store: Store, instance: str = "") -> StatusReport:
    """Read where the board stands; with an instance's name, only what concerns it."""

    def about(name: str) -> bool:
        return instance in {"", name}

    return StatusReport(
        device=identity.device,
        fleet=identity.fleet,
        group=identity.group,
        accepted=store.counter("accepted"),
        deployed=store.counter("deployed"),
        committed=store.counter("committed"),
        unsent_reports=len(store.unacked(1000)),
        running=tuple(
            Running(
                instance=each.item.instance,
                target=each.item.target,
                generation=each.generation,
                since=each.at,
                assignment=each.assignment,
            )
            for each in store.committed()
            if about(each.item.instance)
        ),
        changing=tuple(
            Changing(
                instance=each.instance,
                target=each.item.target if each.item is not None else "",
                phase=each.phase.value,
                code=each.state.code,
                message=each.state.message,
            )
            for each in store.changes()
            if about(each.instance)
        ),
        failed=tuple(
            Failed(
                instance=each.instance,
                target=each.target,
                code=each.code,
                message=each.message,
                at=each.at,
                retry_at=None if each.retry_at is None else datetime.fromtimestamp(each.retry_at, UTC),
                action=remediation(each.code),
            )
            for each in store.failed()
            if about(each.instance)
        ),
        doubts=tuple(each for each in store.doubts() if about(each.instance)),
        problems=store.problems(),
        timeline=tuple(each for each in store.history() if about(each.instance))[-TIMELINE_ROWS:],
    )


def tell(found: StatusReport) -> Iterable[str]:
    """The board's standing in lines for people."""
    yield f"{found.device} in the fleet {found.fleet}" + (f", group {found.group}" if found.group else "")
    yield f"  assignment: accepted {found.accepted}, committed {found.committed}"
    if found.unsent_reports:
        yield f"  {found.unsent_reports} reports wait to be acknowledged by the server"
    for problem in found.problems:
        yield f"  {problem}"
    if not found.running:
        yield "  nothing is committed: no instance runs"
    for running in found.running:
        yield f"  {running.instance}: runs {running.target} since {running.since:%Y-%m-%d %H:%M:%S} UTC"
    for doubt in found.doubts:
        yield f"  {doubt.instance}: goes on running, as [policy] on_revoked says ({doubt.code}): {doubt.message}"
    for change in found.changing:
        what = f"changes to {change.target}" if change.target else "is being removed"
        yield f"  {change.instance}: {what}, {change.phase}" + (f": {change.message}" if change.message else "")
    for failure in found.failed:
        yield f"  {failure.instance}: {failure.target} failed ({failure.code}): {failure.message}"
        if failure.retry_at is not None:
            yield f"      it is tried again by itself from {failure.retry_at:%Y-%m-%d %H:%M} UTC on"
        else:
            yield "      it is not tried again by itself ('fleet retry' does)"
        if failure.action:
            yield f"      what to do: {failure.action}"


def tell_timeline(found: StatusReport) -> Iterable[str]:
    """What happened, oldest first."""
    for report in found.timeline:
        line = f"  {report.at:%Y-%m-%d %H:%M:%S} {report.instance or 'assignment'} {report.phase}"
        if report.phase is Phase.COMMITTED and not report.exercised:
            line += " (too few calls to judge it)"
        if report.target:
            line += f" {report.target}"
        if report.code is not None:
            line += f" [{report.code}] {report.message}"
        yield line
        for text in report.log:
            yield f"      | {text}"

"""What is reported of changes and refusals, to the fleet and in the journal: from what is known to the message."""

import logging
from datetime import UTC, datetime
from typing import Final

import msgspec

from agent import systemd
from agent.records import Change
from agent.standing import Board
from agent.update.machine import Phase
from fleet.protocol import caps
from fleet.protocol.assignment import Item
from fleet.protocol.codes import Phase as WirePhase
from fleet.protocol.codes import RejectCode
from fleet.protocol.messages import Report

log = logging.getLogger("agent.reports")

ANSWERS: Final = frozenset({Phase.PROBATION, Phase.COMMITTED})
"""Phases in which the new version is the one that answers."""


def about(
    board: Board,
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


def of_change(board: Board, change: Change, *, before: str, log: tuple[str, ...] = ()) -> Report:
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
    for line in reversed(lines[-caps.LOG_LINES :]):
        size += len(line.encode())
        if size > caps.LOG_MAX_BYTES:
            break
        kept.append(line)
    return tuple(reversed(kept))

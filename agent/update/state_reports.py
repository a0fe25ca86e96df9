"""State reports: what the device signs of each instance when it is asked, and of an assignment as a whole.

Pure: from the deployment state and the host's figures to reports. A commit is reported of an instance that runs, and of
no other: one in quarantine is reported as failed, and of one that is being restarted nothing is known yet.
"""

from collections.abc import Mapping
from typing import Final

from agent.update.plan import may_report_committed
from agent.update.state import DeploymentState, DeviceContext, FailedItem, about, item_key, of_change, verdict_of
from fleet.protocol.assignment import Item
from fleet.protocol.codes import InstanceState, Phase, RejectCode
from fleet.protocol.messages import InstanceHealth, Report

_NOT_TRIED: Final = "failed before, and is not retried without `fleet retry`"


def of_committed(
    device: DeviceContext, item: Item, assignment: int, figure: InstanceHealth | None, *, is_data: bool = False
) -> Report | None:
    """Report a committed item as the host has it; None while the host does not run it, or restarts it.

    Args:
        device: this device.
        item: committed, with the label under which it is desired now.
        assignment: version that desires it.
        figure: of the instance, None where the host has none.
        is_data: of a data package, which the host does not run.
    """
    if is_data:
        return about(device, assignment=assignment, phase=Phase.COMMITTED, item=item, running=item.target)
    if figure is None or figure.target != item.target:
        return None
    match figure.state:
        case InstanceState.RUNNING:
            return about(
                device,
                assignment=assignment,
                phase=Phase.COMMITTED,
                item=item,
                running=item.target,
                generation=figure.generation,
            )
        case InstanceState.QUARANTINED:
            why = f": {figure.error}" if figure.error else ""
            return about(
                device,
                assignment=assignment,
                phase=Phase.FAILED,
                item=item,
                code=RejectCode.RESTARTED,
                message=f"in quarantine after {figure.restarts} restarts{why}; `fleet retry` tries it again",
            )
        case InstanceState.BACKOFF | InstanceState.STOPPED:
            return None


def of_failure(device: DeviceContext, item: Item, assignment: int, known: FailedItem, running: str) -> Report:
    """Report a failure that the device remembers, and what follows from it."""
    verdict = verdict_of(known)
    tries_itself = known.retry_at is not None
    again = "failed, and is retried automatically" if tries_itself else "failed, and waits for another deployment"
    return about(
        device,
        assignment=assignment,
        phase=verdict or Phase.FAILED,
        item=item,
        running=running,
        code=known.code,
        message=f"{_NOT_TRIED if verdict and not tries_itself else again}: {known.message}",
    )


def state_reports(
    device: DeviceContext, state: DeploymentState, figures: Mapping[str, InstanceHealth]
) -> tuple[Report, ...]:
    """Report the state of every desired instance, and that the assignment is committed where all of it is.

    Args:
        device: this device.
        state: of the deployment.
        figures: of the host's instances, by name.
    """
    if state.desired is None:
        return ()
    version = state.desired.version
    found = {name: _of_instance(device, state, item, version, figures) for name, item in state.wanted().items()}
    reports = tuple(report for report in found.values() if report is not None)
    is_whole = len(reports) == len(found) and all(report.phase is Phase.COMMITTED for report in reports)
    if is_whole and may_report_committed(*state.planned()):
        return (*reports, about(device, assignment=version, phase=Phase.COMMITTED))
    return reports


def _of_instance(
    device: DeviceContext, state: DeploymentState, item: Item, version: int, figures: Mapping[str, InstanceHealth]
) -> Report | None:
    active, have = state.active.get(item.instance), state.committed.get(item.instance)
    running = have.item.target if have is not None else ""
    if active is not None:
        return of_change(device, active.change, before=running) if active.change.item is not None else None
    known = state.known_failure(item)
    if known is not None:
        return of_failure(device, item, version, known, running)
    if have is None or item_key(have.item) != item_key(item):
        return None
    return of_committed(device, item, version, figures.get(item.instance), is_data=have.manifest.is_data)

"""Use of `fleet retry` on a device, judged by what the device signed last and by its health.

Another attempt of an instance that runs well, or is being tried, would help nobody: it is refused with the reason.
"""

from fleet.protocol import wire
from fleet.protocol.codes import InstanceState, Phase, RejectCode
from fleet.protocol.messages import Health, Report
from fleet.store.rows import DeviceRow
from fleet.store.store import Store
from signing.device_statements import unverified
from signing.errors import Rejected

_REPORTS_MAX = 200
_UNDER_WAY = frozenset(
    {Phase.FETCHING, Phase.VERIFYING, Phase.COMPILING, Phase.STAGED, Phase.SWAPPING, Phase.PROBATION}
)


def nothing_to_retry(store: Store, device: DeviceRow, instance: str, target: str) -> str:
    """Return why another attempt of an instance is not needed, in words; empty where it is, or nothing is known.

    Args:
        store: the server's.
        device: on which it should run.
        instance: its name.
        target: target path that it should run.
    """
    last = _newest(store, device.id, instance)
    if last is None or last.target != target:
        return ""
    if last.phase in _UNDER_WAY and not last.code:
        return f"{instance} is being tried on {device.id} already ({last.phase})"
    if last.phase is not Phase.COMMITTED or _ails(device, instance):
        return ""
    return f"{instance} runs well on {device.id}"


def _newest(store: Store, device: str, instance: str) -> Report | None:
    """Return the newest report about a change of an instance."""
    for row in store.delivery.reports(device, _REPORTS_MAX):
        try:
            report = wire.decode(Report, unverified(row.raw))
        except (Rejected, wire.WireError):
            continue
        if report.instance == instance and report.phase is not Phase.IDLE and report.code is not RejectCode.SUPERSEDED:
            return report
    return None


def _ails(device: DeviceRow, instance: str) -> bool:
    """Tell whether the device's newest health shows that the instance does not run."""
    if device.health is None:
        return False
    try:
        health = wire.decode(Health, device.health)
    except wire.WireError:
        return False
    return any(each.instance == instance and each.state is not InstanceState.RUNNING for each in health.instances)

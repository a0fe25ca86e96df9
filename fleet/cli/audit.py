"""`fleet audit verify`: prove what devices ran by their own signatures, without trusting the server."""

from typing import Final

import click
import msgspec
from rich.text import Text

from fleet.cli import base, operator, output
from fleet.cli.base import Exit, Fault, Group, Options, command
from fleet.cli.operator import load_operator
from fleet.cli.trust_store import DeviceMemory, Place, remembering_devices
from fleet.client import Client, ClientError, UnreachableError
from fleet.protocol.bounds import Count
from fleet.protocol.codes import Phase
from fleet.protocol.messages import Report
from fleet.protocol.printable import printable
from signing.device_statements import Seen, Verdict, audit
from signing.errors import Rejected

REPORTS_MAX: Final = 200_000
"""Reports read of one device, so that a server cannot keep the command busy for ever."""

_AWAY: Final = "the server has no key of this device: the device has not connected to it yet"
_GONE: Final = "the server no longer knows this device"


class _Shown(msgspec.Struct, frozen=True, kw_only=True):
    """Verdict on one device, for programs."""

    device: str
    key: str
    findings: tuple[str, ...]
    notes: tuple[str, ...]
    ran: tuple[Report, ...]
    good: Count = 0
    bad: Count = 0


@click.group("audit", cls=Group, short_help="Prove what devices ran, without trusting the server")
def audits() -> None:
    """Prove what devices ran, without trusting the server."""


@command("verify", examples="fleet audit verify\nfleet audit verify gate-7-1f2e3d4c --json")
@click.argument("device", required=False, default="", shell_complete=operator.devices)
@click.option(
    "--forget", is_flag=True, help="Accept the device's present key, when it was enrolled anew for a known reason"
)
@base.table_options
def verify(options: Options, *, device: str, forget: bool) -> Exit:
    """Check that devices signed what the server shows of them, whole and in order, and list what they ran.

    Each device's key is remembered from first sight in `operator/trust`, and so is its newest report: a server that
    changes, invents, omits or withdraws a report is detected. A record that cannot be read is named, and the others are
    judged. Exits with 1 when something does not hold.
    """
    who = load_operator(options)
    if forget and not device:
        raise Fault("--forget names no device", action="add the device: fleet audit verify DEVICE --forget")
    with remembering_devices(who.trust) as memory, who.client() as client:
        shown = _look(client, memory, device, forget=forget)
    if options.json:
        output.show_json({"devices": shown})
    else:
        _tell(shown)
    return Exit.FAILED if any(each.findings for each in shown) else Exit.OK


def _look(client: Client, memory: DeviceMemory, device: str, *, forget: bool) -> list[_Shown]:
    """Judge a device, or every device where none is named, and remember what was seen."""
    shown = []
    rows = client.devices().devices
    memory.places |= {row.id: Place(groups=row.groups, revoked=row.revoked) for row in rows}
    if device and device not in memory.places and device not in memory.devices:
        raise Fault(f"there is no device {device}", action="'fleet devices' lists them", code=Exit.REFUSED)
    devices = [device] if device else [row.id for row in rows]
    for each in devices:
        seen = None if forget else memory.devices.get(each)
        verdict = _examine(client, each, seen)
        if verdict.seen.key:
            memory.devices[each] = verdict.seen
        found = _Shown(
            device=each,
            key=verdict.seen.key,
            findings=verdict.findings,
            notes=verdict.notes,
            ran=verdict.ran(),
            good=len(verdict.reports),
            bad=verdict.bad,
        )
        shown.append(found)
    if not device:
        gone = sorted(memory.devices.keys() - set(devices))
        shown += [
            _Shown(device=each, key=memory.devices[each].key, findings=(_GONE,), notes=(), ran=()) for each in gone
        ]
    return shown


def _examine(client: Client, device: str, seen: Seen | None) -> Verdict:
    """Judge one device; an answer or a record that is not as it should be never keeps the others from being judged."""
    try:
        certificate, reports = _shown_by(client, device)
        if not certificate:
            return _unproven(_AWAY, seen)
        return audit(device, certificate.encode(), reports, seen)
    except UnreachableError:
        raise
    except Rejected as error:
        return _unproven(error.message, seen)
    except ClientError as error:
        return _unproven(f"the server's answer cannot be used: {error}", seen)
    except Exception as error:  # noqa: BLE001 - named for this device; the next one is judged
        return _unproven(f"its history cannot be judged: {type(error).__name__}: {error}", seen)


def _unproven(finding: str, seen: Seen | None) -> Verdict:
    return Verdict(findings=(finding,), notes=(), reports=(), seen=seen or Seen(key=""))


def _shown_by(client: Client, device: str) -> tuple[str, list[bytes]]:
    """Fetch what the server shows of a device: its certificate, and its reports as it signed them."""
    certificate = ""
    reports: list[bytes] = []
    place = ("", 0)
    while len(reports) < REPORTS_MAX:
        page = client.history(device, boot_id=place[0], after=place[1])
        certificate = page.certificate_pem
        reports += [bytes(each) for each in page.reports]
        if not page.sequence or (page.boot_id, page.sequence) <= place:
            break
        place = (page.boot_id, page.sequence)
    return certificate, reports


def _tell(shown: list[_Shown]) -> None:
    rows: list[tuple[str | Text, ...]] = [
        (
            each.device,
            f"{report.at:%Y-%m-%d %H:%M:%S}",
            report.instance,
            _said(report),
            output.target(report.running) if report.running else "nothing",
        )
        for each in shown
        for report in each.ran
    ]
    output.table(("DEVICE", "WHEN (UTC)", "INSTANCE", "WHAT", "RUNS THEN"), rows, empty="No device has reported yet.")
    for each in shown:
        for note in each.notes:
            click.echo(f"{each.device}: {printable(note)}")
        for finding in each.findings:
            click.echo(click.style("does not hold: ", fg="red", bold=True) + f"{each.device}: {printable(finding)}")
    broken = sum(bool(each.findings) for each in shown)
    good, bad = sum(each.good for each in shown), sum(each.bad for each in shown)
    click.echo(f"Reports: {good} good, {bad} bad.")
    click.echo(f"{len(shown) - broken} of {len(shown)} devices' histories are authentic, complete and in order.")


def _said(report: Report) -> str:
    if report.phase is Phase.COMMITTED:
        return "committed" if report.target else "removed"
    return f"{report.phase} ({report.code})" if report.code else str(report.phase)


audits.add_command(verify)

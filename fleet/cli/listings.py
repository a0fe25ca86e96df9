"""`fleet status`, `devices` and `groups`: what there is."""

import click
from rich.text import Text

from fleet.cli import complete, out
from fleet.cli.base import Exit, Options, command
from fleet.cli.home import connect
from fleet.protocol.api import DeviceRow, GroupRow
from fleet.protocol.codes import InstanceState, Phase
from fleet.protocol.messages import InstanceHealth


@command("status", examples="fleet status\nfleet status --json")
def status(options: Options) -> Exit:
    """The fleet at a glance: what is up, what expires, what is wrong."""
    with connect(options) as client:
        answer = client.status()
    if options.json:
        out.show_json(answer)
        return Exit.OK
    kind = f"{answer.size}, {'production' if answer.production else 'for development only'}"
    broker = f"{answer.broker}, {'connected' if answer.broker_connected else 'NOT connected'}"
    out.facts(
        [
            ("fleet", f"{answer.fleet} ({kind})"),
            ("server", f"{answer.operators_url}, version {answer.version}, up {out.ago(answer.started_at)[:-4]}"),
            ("boards meet it at", ", ".join([answer.devices_url, *answer.mqtt])),
            ("broker", broker),
            ("boards", f"{answer.devices}, {answer.online} online"),
            ("groups", str(answer.groups)),
            ("rollouts", f"{answer.open_rollouts} under way" if answer.open_rollouts else "none under way"),
        ]
    )
    rows = [
        (role.role, str(role.version), f"in {out.span((role.expires - answer.now).total_seconds())}")
        for role in answer.roles
    ]
    if rows:
        out.console().print()
        out.table(("ROLE", "VERSION", "EXPIRES"), rows, empty="")
    for problem in answer.problems:
        click.echo(click.style("problem: ", fg="yellow", bold=True) + problem)
    return Exit.OK


@command("devices", examples="fleet devices\nfleet devices --group edge-eu\nfleet devices --json")
@click.option("--group", default="", shell_complete=complete.groups, help="Of this group only")
def devices(options: Options, *, group: str) -> None:
    """List the boards."""
    with connect(options) as client:
        answer = client.devices()
    rows = tuple(row for row in answer.devices if not group or group in row.groups)
    if options.json:
        out.show_json({"devices": list(rows)})
        return
    out.table(
        ("DEVICE", "STATE", "GROUPS", "RUNS", "MACHINE", "SEEN", ""),
        [_device_row(row) for row in rows],
        empty="No board yet: 'fleet enroll-token --group G' makes a token for one.",
    )


def _device_row(row: DeviceRow) -> tuple[str | Text, ...]:
    word = "revoked" if row.revoked else "online" if row.online else "offline"
    return (
        row.id,
        word,
        ", ".join(row.groups) or "-",
        ", ".join(running(instance) for instance in row.instances) or "-",
        row.machine or "-",
        out.ago(row.seen_at),
        row.problem,
    )


def running(instance: InstanceHealth) -> str:
    """One instance in a listing: its name, what runs as it, and its state where that is not simply `running`."""
    name, _, version = out.target(instance.target).partition("/")[2].partition("@")
    what = f"{name}@{version}" if instance.instance == name else f"{instance.instance}={name}@{version}"
    states = [] if instance.state is InstanceState.RUNNING else [str(instance.state)]
    if instance.phase not in {Phase.IDLE, Phase.COMMITTED}:
        states.append(str(instance.phase))
    return f"{what} ({', '.join(states)})" if states else what


@command("groups", examples="fleet groups\nfleet groups --json")
def groups(options: Options) -> None:
    """List the groups and what each settled on."""
    with connect(options) as client:
        answer = client.groups()
    if options.json:
        out.show_json(answer)
        return
    out.table(
        ("GROUP", "BOARDS", "ONLINE", "RUNS", "ROLLOUT", "MEMBERS"),
        [_group_row(row) for row in answer.groups],
        empty="No group yet: 'fleet enroll-token --group G' makes one.",
    )


def _group_row(row: GroupRow) -> tuple[str, ...]:
    chosen = ", ".join(f"{key}={value}" for key, value in row.selector.items())
    members = f"by label {chosen}" if chosen else "listed"
    return (
        row.name,
        str(row.boards),
        str(row.online),
        ", ".join(out.target(settled.target).partition("/")[2] for settled in row.settled) or "-",
        str(row.rollout) if row.rollout else "-",
        f"{members}, priority {row.priority}" if row.priority else members,
    )

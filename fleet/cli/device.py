"""device, devices, why, logs, pin, retry, restart, label, revoke, enroll-token, group, groups, status.

`fleet device`, `why`, `group`, `enroll-token`, `pin`, `unpin`, `retry`, `restart`, `label` and `revoke`.

`fleet status`, `devices` and `groups`: what there is.

`fleet logs`: an instance's log lines from a board, as the board's owner allows, while somebody looks.
"""

import json
import re
import time
from typing import TYPE_CHECKING, Final

import click
from rich.text import Text

from fleet.cli import operator, output
from fleet.cli.base import Exit, Fault, Options, command, config_values, label_values
from fleet.cli.operator import connect, load_operator
from fleet.cli.rollout import finish
from fleet.protocol import bounds, operator_api
from fleet.protocol.assignment import FollowLogs, Restart
from fleet.protocol.codes import InstanceState, Phase
from fleet.protocol.messages import LATENCY_BOUNDS_MS, InstanceHealth, LogView
from fleet.protocol.operator_api import DeviceRow, GroupRow

if TYPE_CHECKING:
    from fleet.client import Client

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@command("device", examples="fleet device gate-7-1f2e3d4c\nfleet device gate-7-1f2e3d4c --json")
@click.argument("device", shell_complete=operator.devices)
@click.option("--effective", is_flag=True, help="Only what it should run, and who says so")
def device(options: Options, *, device: str, effective: bool) -> Exit:
    """One board: what it runs, what it should run and who says so, and how it is."""
    with connect(options) as client:
        detail = client.device(device)
    if options.json:
        output.show_json({"effective": list(detail.effective)} if effective else detail)
        return Exit.OK
    if not effective:
        output.facts(_device_facts(detail))
        output.console().print()
        reaching = any(instance.outgoing or instance.denials for instance in detail.row.instances)
        output.table(
            (
                *("INSTANCE", "RUNS", "STATE", "CALLS", "FAULTS", "P99", "MEMORY", "RESTARTS", "LANE"),
                *(("SENT", "DENIED") if reaching else ()),
            ),
            [
                (
                    instance.instance,
                    running(instance),
                    str(instance.state),
                    str(sum(instance.calls.values())),
                    str(sum(count for outcome, count in instance.calls.items() if outcome.startswith("guest-"))),
                    f"{instance.p99_us / 1000:.1f} ms",
                    output.size(instance.memory_bytes),
                    str(instance.restarts),
                    lane_of(instance, detail.row.instances),
                    *((str(instance.outgoing), str(instance.denials)) if reaching else ()),
                )
                for instance in detail.row.instances
            ],
            empty="It runs nothing.",
        )
        output.console().print()
        output.table(
            ("INSTANCE", "CPU", "P50", "LATENCIES", "ERRORS", "WRITTEN TODAY", "LINES DROPPED"),
            [statistics(instance) for instance in detail.row.instances if instance.calls],
            empty="Nothing has been asked of it yet.",
        )
        output.console().print()
    output.table(
        ("INSTANCE", "SHOULD RUN", "BECAUSE OF", "PORT", "CONFIGURATION"),
        [
            (
                item.instance,
                output.target(item.target),
                item.source,
                str(item.port or "shared"),
                " ".join(f"{key}={value}" for key, value in item.config.items()),
            )
            for item in detail.effective
        ],
        empty="Nothing is assigned to it.",
    )
    for entry in detail.failed:
        click.echo(click.style("problem: ", fg="yellow", bold=True) + " ".join(entry.text.split()))
        if entry.action:
            click.echo(f"         {entry.action}")
    return Exit.OK


def lane_of(instance: InstanceHealth, everyone: tuple[InstanceHealth, ...]) -> str:
    """Where it runs: lanes of its own, or one that it shares, and with how many."""
    if not instance.shared_lane:
        return "own"
    others = sum(other.shared_lane == instance.shared_lane for other in everyone) - 1
    return f"{instance.shared_lane}, with {others} more" if others else instance.shared_lane


def statistics(instance: InstanceHealth) -> tuple[str, ...]:
    """What it has done since its generation started; latencies of the last calls as `UP TO:COUNT`."""
    bounds = (*(f"{bound} ms" for bound in LATENCY_BOUNDS_MS), "more")
    spread = zip(bounds, instance.latencies, strict=False)
    return (
        instance.instance,
        f"{instance.cpu_ms / 1000:.1f} s",
        f"{instance.p50_us / 1000:.1f} ms",
        ", ".join(f"{bound}:{count}" for bound, count in spread if count),
        str(instance.errors),
        output.size(instance.written_bytes),
        str(instance.dropped_lines),
    )


def _device_facts(detail: operator_api.DeviceDetail) -> list[tuple[str, str]]:
    row = detail.row
    versions = row.versions
    software = [
        f"{name} {value}" for name, value in (("agent", versions.agent), ("wasmtime", versions.engine)) if value
    ]
    pairs = [
        ("device", row.id),
        (
            "state",
            "revoked" if row.revoked else "online" if row.online else f"offline (seen {output.ago(row.seen_at)})",
        ),
        ("groups", ", ".join(row.groups)),
        ("labels", " ".join(f"{key}={value}" for key, value in row.labels.items())),
        ("machine", ", ".join(part for part in (row.machine, versions.os, versions.kernel) if part)),
        ("software", ", ".join(software)),
        ("assignment", f"{row.assigned} published, {row.accepted} accepted, {row.committed} committed"),
        ("certificate", f"until {detail.certificate_expires:%Y-%m-%d}" if detail.certificate_expires else ""),
        ("enrolled", output.ago(detail.enrolled_at)),
        ("problem", row.problem),
    ]
    if detail.health is not None:
        board = detail.health.board
        memory = f"{output.size(board.memory_available_bytes)} of {output.size(board.memory_total_bytes)} free"
        heat = f", {board.temperature_c:.0f} °C" if board.temperature_c is not None else ""
        layers = ", ".join(name if holds else f"NO {name}" for name, holds in detail.health.containment.items())
        runs_as = f"{detail.health.host_runs_as}: " if detail.health.host_runs_as else ""
        pairs += [
            ("board", f"up {output.span(board.uptime_s)}, load {board.load:.2f} on {board.cpus} CPUs{heat}"),
            ("memory", memory),
            ("disk", f"{output.size(board.disk_free_bytes)} of {output.size(board.disk_total_bytes)} free"),
            ("walls", runs_as + layers),
        ]
    return pairs


@command("why", examples="fleet why gate-7-1f2e3d4c\nfleet why gate-7-1f2e3d4c --limit 50 --log")
@click.argument("device", shell_complete=operator.devices)
@click.option("--limit", default=15, show_default=True, type=click.IntRange(1, 1000), help="So many entries at most")
@click.option("--log", is_flag=True, help="With the log lines that came with a failure")
def why(options: Options, *, device: str, limit: int, log: bool) -> Exit:
    """What happened to a board, newest first; what is retried, and what to do."""
    with connect(options) as client:
        timeline = client.timeline(device, limit=limit)
    if options.json:
        output.show_json(timeline)
        return Exit.OK
    for entry in timeline.entries:
        when = f"{entry.at.astimezone():%Y-%m-%d %H:%M:%S}"
        click.echo(f"{click.style(when, dim=True)}  {_coloured(entry)}")
        if entry.retryable:
            click.echo("                     the board tries this again by itself")
        if entry.action:
            click.echo(f"                     {click.style('do:', bold=True)} {entry.action}")
        for line in entry.log if log else ():
            click.echo(f"                     | {line}")
    if not timeline.entries:
        click.echo(f"Nothing has happened to {timeline.device} yet.")
    return Exit.OK


def _coloured(entry: operator_api.TimelineEntry) -> str:
    bad = entry.code is not None or entry.kind == "revoked"
    text = " ".join(entry.text.split())
    return click.style(text, fg="red") if bad else text


@command("group", examples="fleet group edge-eu --add gate-7-1f2e3d4c\nfleet group spares --select site=berlin")
@click.argument("name", shell_complete=operator.groups)
@click.option(
    "--add",
    shell_complete=operator.devices,
    multiple=True,
    metavar="DEVICE",
    help="Add a board; may be given more than once",
)
@click.option(
    "--drop",
    shell_complete=operator.devices,
    multiple=True,
    metavar="DEVICE",
    help="Take a board out; may be given more than once",
)
@click.option(
    "--select", multiple=True, metavar="LABEL=VALUE", help="Choose the boards by label instead of listing them"
)
@click.option(
    "--priority", type=click.IntRange(-1_000_000, 1_000_000), help="Of two groups that set an instance, the higher wins"
)
def group(
    options: Options,
    *,
    name: str,
    add: tuple[str, ...],
    drop: tuple[str, ...],
    select: tuple[str, ...],
    priority: int | None,
) -> None:
    """Make the group NAME, or change who belongs to it."""
    labels = {key: value for key, value in label_values(select).items() if value is not None} if select else None
    with connect(options) as client:
        row = client.set_group(
            name, operator_api.GroupRequest(priority=priority, selector=labels, add=add, remove=drop)
        )
    if options.json:
        output.show_json(row)
    else:
        output.say(options, f"Group {row.name}: {row.boards} board{'' if row.boards == 1 else 's'}.")


@command(
    "enroll-token",
    examples=(
        "fleet enroll-token --group edge-eu\nfleet enroll-token --group edge-eu -q | ssh gate-7 sudo fleet-agent enroll"
    ),
)
@click.option("--group", default="", shell_complete=operator.groups, help="The board's group; made when there is none")
@click.option("--valid", default="1h", show_default=True, help="How long it can be used: 30m, 12h, 7d")
def enroll_token(options: Options, *, group: str, valid: str) -> None:
    """Make a one-time token with which one board joins.

    The token is a secret: it goes to standard output and is shown only now. Pipe it into
    `fleet-agent enroll` on the board; it is never an argument.
    """
    with connect(options) as client:
        reply = client.enroll_token(operator_api.EnrollTokenRequest(group=group, valid_s=seconds(valid)))
    if options.json:
        output.show_json(reply)
        return
    click.echo(reply.token)
    if not options.quiet:
        where = f" into group {reply.group}" if reply.group else ""
        click.echo(f"For one board{where}, until {reply.expires.astimezone():%Y-%m-%d %H:%M}.", err=True)


def seconds(text: str) -> int:
    """A duration as people write it, in seconds; raises `Fault`."""
    match = re.fullmatch(r"(\d{1,6})([smhd])", text.strip())
    if match is None or int(match[1]) == 0:
        raise Fault(f"{text!r} is no duration", "it is a whole number and a unit", "write 90s, 30m, 12h or 7d")
    return int(match[1]) * _UNITS[match[2]]


@command(
    "pin", examples="fleet pin gate-7-1f2e3d4c hello@1.4.0\nfleet pin gate-7-1f2e3d4c hello@1.4.0 --config level=debug"
)
@click.argument("device", shell_complete=operator.devices)
@click.argument("target", metavar="NAME@VERSION")
@click.option("--as", "instance", default="", help="Name of the instance  [the component's name]")
@click.option("--config", multiple=True, metavar="KEY=VALUE", help="A configuration value; may be given more than once")
@click.option("--port", type=click.IntRange(0, 65535), help="A port of its own; 0 for the shared one")
@click.option(
    "--share-lane/--own-lane", default=None, help="Whether it may share a process with its publisher's others"
)
@click.option("--detach", is_flag=True, help="Return at once instead of following")
def pin(
    options: Options,
    *,
    device: str,
    target: str,
    instance: str,
    config: tuple[str, ...],
    port: int | None,
    share_lane: bool | None,
    detach: bool,
) -> Exit:
    """Give one board a published version of its own, whatever its groups say."""
    who = load_operator(options)
    name = who.target(target)
    request = operator_api.RolloutRequest(
        instance=instance or name.name,
        target=name.path,
        device=device,
        waves="100%",
        config=config_values(config),
        port=port,
        share_lane=share_lane,
    )
    with who.client() as client:
        return finish(client, client.pin(device, request), options, detach=detach)


@command("unpin", examples="fleet unpin gate-7-1f2e3d4c hello")
@click.argument("device", shell_complete=operator.devices)
@click.argument("instance")
def unpin(options: Options, *, device: str, instance: str) -> None:
    """Let a board follow its groups again for one instance."""
    with connect(options) as client:
        detail = client.unpin(device, instance)
    _show_effective(options, detail, instance)


@command("retry", examples="fleet retry gate-7-1f2e3d4c hello")
@click.argument("device", shell_complete=operator.devices)
@click.argument("instance")
def retry(options: Options, *, device: str, instance: str) -> None:
    """Have an instance that failed on a board tried again."""
    with connect(options) as client:
        detail = client.retry(device, instance)
    _show_effective(options, detail, instance)


def _show_effective(options: Options, detail: operator_api.DeviceDetail, instance: str) -> None:
    if options.json:
        output.show_json(detail)
        return
    for item in detail.effective:
        if item.instance == instance:
            attempt = f", attempt {item.attempt}" if item.attempt else ""
            output.say(options, f"{detail.row.id} should run {output.target(item.target)} ({item.source}{attempt}).")
            return
    output.say(options, f"{detail.row.id} should run nothing as {instance}.")


@command("restart", examples="fleet restart gate-7-1f2e3d4c hello")
@click.argument("device", shell_complete=operator.devices)
@click.argument("instance")
def restart(options: Options, *, device: str, instance: str) -> None:
    """Restart an instance on a board, by a signed command."""
    with connect(options) as client:
        reply = client.command(device, operator_api.CommandRequest(verb=Restart(instance=instance)))
    if options.json:
        output.show_json(reply)
    else:
        output.say(
            options, f"Command {reply.sequence} is on its way; it is good until {reply.expires.astimezone():%H:%M:%S}."
        )


@command("label", examples="fleet label gate-7-1f2e3d4c site=berlin\nfleet label gate-7-1f2e3d4c site-")
@click.argument("device", shell_complete=operator.devices)
@click.argument("labels", nargs=-1, required=True, metavar="LABEL=VALUE|LABEL-...")
def label(options: Options, *, device: str, labels: tuple[str, ...]) -> None:
    """Set labels of a board, or remove one with a trailing '-'."""
    with connect(options) as client:
        detail = client.label(device, operator_api.LabelsRequest(labels=label_values(labels)))
    if options.json:
        output.show_json(detail)
    else:
        now = " ".join(f"{key}={value}" for key, value in detail.row.labels.items()) or "no labels"
        output.say(options, f"{detail.row.id}: {now}")


@command("revoke", examples="fleet revoke gate-7-1f2e3d4c")
@click.argument("device", shell_complete=operator.devices)
@click.option("--yes", is_flag=True, help="Do not ask")
def revoke(options: Options, *, device: str, yes: bool) -> None:
    """Shut a board out of the fleet: its certificate is refused from now on. It keeps running what it runs."""
    if not yes and not _confirmed(f"Shut {device} out? It can come back only by enrolling anew."):
        raise Fault("nothing was changed", "nobody said yes", "--yes says it", code=Exit.INTERRUPTED)
    with connect(options) as client:
        detail = client.revoke(device)
    if options.json:
        output.show_json(detail)
    else:
        output.say(options, f"{detail.row.id} is revoked.")


def _confirmed(question: str) -> bool:
    """Whether somebody at the terminal says yes."""
    try:
        return click.confirm(question, err=True)
    except click.Abort:
        click.echo(err=True)  # the question has no end of line
        return False


@command("status", examples="fleet status\nfleet status --json")
def status(options: Options) -> Exit:
    """The fleet at a glance: what is up, what expires, what is wrong."""
    with connect(options) as client:
        answer = client.status()
    if options.json:
        output.show_json(answer)
        return Exit.OK
    kind = f"{answer.size}, {'production' if answer.production else 'for development only'}"
    broker = f"{answer.broker}, {'connected' if answer.broker_connected else 'NOT connected'}"
    output.facts(
        [
            ("fleet", f"{answer.fleet} ({kind})"),
            ("server", f"{answer.operators_url}, version {answer.version}, up {output.ago(answer.started_at)[:-4]}"),
            ("boards meet it at", ", ".join([answer.devices_url, *answer.mqtt])),
            ("broker", broker),
            ("boards", f"{answer.devices}, {answer.online} online"),
            ("groups", str(answer.groups)),
            ("rollouts", f"{answer.open_rollouts} under way" if answer.open_rollouts else "none under way"),
        ]
    )
    rows = [
        (role.role, str(role.version), f"in {output.span((role.expires - answer.now).total_seconds())}")
        for role in answer.roles
    ]
    if rows:
        output.console().print()
        output.table(("ROLE", "VERSION", "EXPIRES"), rows, empty="")
    for problem in answer.problems:
        click.echo(click.style("problem: ", fg="yellow", bold=True) + problem)
    return Exit.OK


@command("devices", examples="fleet devices\nfleet devices --group edge-eu\nfleet devices --json")
@click.option("--group", default="", shell_complete=operator.groups, help="Of this group only")
def devices(options: Options, *, group: str) -> None:
    """List the boards."""
    with connect(options) as client:
        answer = client.devices()
    rows = tuple(row for row in answer.devices if not group or group in row.groups)
    if options.json:
        output.show_json({"devices": list(rows)})
        return
    output.table(
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
        output.ago(row.seen_at),
        row.problem,
    )


def running(instance: InstanceHealth) -> str:
    """One instance in a listing: its name, what runs as it, and its state where that is not simply `running`."""
    name, _, version = output.target(instance.target).partition("/")[2].partition("@")
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
        output.show_json(answer)
        return
    output.table(
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
        ", ".join(output.target(settled.target).partition("/")[2] for settled in row.settled) or "-",
        str(row.rollout) if row.rollout else "-",
        f"{members}, priority {row.priority}" if row.priority else members,
    )


ANSWER_S: Final = 30

LOOK_S: Final = 10


@command(
    "logs",
    examples="fleet logs hello --device gate-7-1f2e3d4c\n"
    "fleet logs hello --device gate-7-1f2e3d4c --follow --minutes 15",
)
@click.argument("instance")
@click.option("--device", required=True, shell_complete=operator.devices, metavar="ID", help="The board")
@click.option("--follow", is_flag=True, help="Go on, until --minutes are over or Ctrl-C")
@click.option(
    "--minutes",
    default=5,
    show_default=True,
    type=click.IntRange(1, bounds.LOGS_MINUTES_MAX),
    help="How long the board sends at most",
)
def logs(options: Options, *, instance: str, device: str, follow: bool, minutes: int) -> Exit:
    """Show the last log lines of INSTANCE on a board, asked for by a signed command.

    The board's owner decides what may leave it ([policy] logs: off, errors or all; errors is the default). Values of
    secrets are replaced on the board. Who asked is in the audit log, what was sent in the board's own history.
    """
    with connect(options) as client:
        asked = client.command(
            device, operator_api.CommandRequest(verb=FollowLogs(instance=instance, minutes=minutes if follow else 1))
        )
        return _show(options, client, device, asked.sequence, follow=follow)


def _show(options: Options, client: "Client", device: str, sequence: int, *, follow: bool) -> Exit:
    after, left_out, patience = 0, 0, time.monotonic() + ANSWER_S
    while True:
        view = client.logs(device, command=sequence, after=after, wait_s=LOOK_S)
        after = view.next
        _print(options, view)
        if view.refused:
            raise Fault(f"{device} refused", view.refused, code=Exit.REFUSED)
        if not view.heard and time.monotonic() >= patience:
            raise Fault(
                f"{device} does not answer",
                "it is offline, or cannot reach the devices' port",
                "fleet device shows when it was last seen",
                code=Exit.FAILED,
            )
        if view.left_out > left_out and not options.json:
            count = view.left_out - left_out
            click.echo(f"({count} lines left out: the board's policy, or faster than they are sent)", err=True)
        left_out = view.left_out
        if view.ended or (view.heard and not follow):
            return Exit.OK


def _print(options: Options, view: LogView) -> None:
    for line in view.lines:
        if options.json:
            click.echo(json.dumps({"line": line}, ensure_ascii=False))  # one object a line, as lines come
        else:
            click.echo(line)

"""`fleet status`, `devices`, `device`, `why`, `groups`, `logs` and the commands that act on one device."""

import functools
import json
import math
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
from msgspec.structs import replace
from rich.text import Text

from fleet.cli import base, operator, output
from fleet.cli.base import Exit, Fault, Options, command, config_values, confirm, label_values, share_worker_option
from fleet.cli.operator import connect, load_operator
from fleet.cli.rollout import finish, foreseen
from fleet.protocol import bounds, names, operator_api
from fleet.protocol.assignment import FollowLogs, Restart
from fleet.protocol.codes import InstanceState, Phase
from fleet.protocol.messages import LATENCY_BOUNDS_MS, InstanceHealth, LogView
from fleet.protocol.operator_api import DeviceRow, GroupRow
from fleet.protocol.printable import json_text

if TYPE_CHECKING:
    from fleet.client import Client

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

ANSWER_S: Final = 30
LOOK_S: Final = 10


@click.group(
    "device", cls=base.ShortGroup, short="show", epilog="`fleet device ID` is short for `fleet device show ID`."
)
def device() -> None:
    """Show one device, or set configuration keys of its own."""


@command(
    "show",
    examples="fleet device gate-7-1f2e3d4c --effective\nfleet device gate-7-1f2e3d4c --json\n"
    "fleet device gate-7-1f2e3d4c --diagnose -o gate-7.tar.gz",
)
@click.argument("device", shell_complete=operator.devices)
@click.option("--effective", is_flag=True, help="Show only what it should run, each value with its source")
@click.option("--diagnose", is_flag=True, help="Fetch an archive about it for whoever helps; needs -o")
@click.option(
    "-o",
    "--output",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the archive into this file (.tar.gz, mode 0600)",
)
@click.option("--force", is_flag=True, help="Replace the file of -o if there is one")
@base.WIDE_OPTION
def show(options: Options, *, device: str, effective: bool, diagnose: bool, file: Path | None, force: bool) -> Exit:
    """Show one device: what it runs, what it should run and why, and its health.

    With --diagnose, ask the device by a signed command for an archive: status, history, checks, figures, configuration
    and logs, without secrets, as far as its owner allows ([policy] diagnose: off, summary or all; summary is the
    default). The device seals it to a key made for this request, so the server cannot read it.
    """
    if diagnose or file is not None or force:
        if not diagnose or file is None or effective:
            raise Fault(
                "--diagnose and -o FILE belong together", "the archive goes into a file", "give both, and no more"
            )
        from fleet.cli.archive import fetch  # noqa: PLC0415 - only this needs cryptography

        fetch(options, device, file, force=force)
        return Exit.OK
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
                *("INSTANCE", "RUNS", "STATE", "CALLS", "FAULTS", "P99", "MEMORY", "RESTARTS", "WORKER"),
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
                    worker_of(instance, detail.row.instances),
                    *((str(instance.outgoing), str(instance.denials)) if reaching else ()),
                )
                for instance in detail.row.instances
            ],
            empty="The device runs nothing.",
        )
        output.console().print()
        output.table(
            ("INSTANCE", "CPU", "P50", "LATENCIES", "ERRORS", "WRITTEN TODAY", "LINES DROPPED"),
            [statistics(instance) for instance in detail.row.instances if instance.calls],
            empty="No instance has been called yet.",
        )
        output.console().print()
        _show_metrics(detail.row.instances)
        if keeping := [each for each in detail.row.instances if each.keyvalue_reads or each.keyvalue_writes]:
            output.table(
                ("INSTANCE", "KEY-VALUE READS", "WRITES", "BYTES"),
                [
                    (
                        each.instance,
                        str(each.keyvalue_reads),
                        str(each.keyvalue_writes),
                        output.size(each.keyvalue_bytes),
                    )
                    for each in keeping
                ],
                empty="",
            )
            output.console().print()
    output.table(
        ("INSTANCE", "SHOULD RUN", "BECAUSE OF", "PORT", "CONFIGURATION"),
        [
            (
                item.instance,
                output.target(item.target),
                item.source,
                str(item.port or "shared") if item.target else "-",
                " ".join(f"{key}={value}" for key, value in item.config.items()),
            )
            for item in detail.effective
        ],
        empty="Nothing is assigned to the device.",
    )
    if effective and any(item.keys for item in detail.effective):
        output.console().print()
        _show_keys(detail.effective)
    for entry in detail.failed:
        click.echo(click.style("problem: ", fg="yellow", bold=True) + names.readable(" ".join(entry.text.split())))
        if entry.action:
            click.echo(f"         {entry.action}")
        if entry.log:
            click.echo(f"         fleet why {detail.row.id} --log shows the log before it")
    return Exit.OK


@command(
    "set",
    examples="fleet device set gate-7-1f2e3d4c hello room=cellar\n"
    "fleet device set gate-7-1f2e3d4c hello level=debug retries=5",
)
@click.argument("device", shell_complete=operator.devices)
@click.argument("instance")
@click.argument("pairs", nargs=-1, required=True, metavar="KEY=VALUE...")
@base.DRY_RUN
def set_keys(options: Options, *, device: str, instance: str, pairs: tuple[str, ...], dry: bool) -> None:
    """Set configuration keys of one device, over those of its group.

    They apply at once, and stay through rollouts, pause, abort and undo, until 'fleet device unset'.
    """
    keys: dict[str, str | None] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise Fault(
                f"{pair!r} is not a setting", "it has no '='" if not equals else "it has no key", "write KEY=VALUE"
            )
        if key in keys:
            raise Fault(f"{key} is given twice", "one value can apply", "give it once")
        keys[key] = value
    _change_keys(options, device, operator_api.KeysRequest(instance=instance, keys=keys), dry=dry)


@command("unset", examples="fleet device unset gate-7-1f2e3d4c hello room")
@click.argument("device", shell_complete=operator.devices)
@click.argument("instance")
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
@base.DRY_RUN
def unset_keys(options: Options, *, device: str, instance: str, keys: tuple[str, ...], dry: bool) -> None:
    """Remove configuration keys of one device: those of its group apply again."""
    request = operator_api.KeysRequest(instance=instance, keys=dict.fromkeys(keys))
    _change_keys(options, device, request, dry=dry)


def _change_keys(options: Options, device: str, request: operator_api.KeysRequest, *, dry: bool) -> None:
    with connect(options) as client:
        if dry:
            client.device(device)  # the server refuses a name that no device has
            words = ", ".join(
                f"remove {key}" if value is None else f"set {key}={value}" for key, value in request.keys.items()
            )
            output.foresee(options, f"{words} for {request.instance}", [device])
            return
        detail = client.set_keys(device, request)
    if options.json:
        output.show_json(detail)
        return
    here = [item for item in detail.effective if item.instance == request.instance and item.target]
    output.say(
        options,
        f"{detail.row.id} has changed keys of its own for {request.instance}."
        if here
        else f"{detail.row.id} should run nothing as {request.instance} yet: its keys wait.",
    )
    if here and not options.quiet:
        _show_keys(here)


device.add_command(show)
device.add_command(set_keys)
device.add_command(unset_keys)


def _show_keys(effective: Iterable[operator_api.Effective]) -> None:
    """Print each configuration key of each instance with its value and source, the manifest's defaults included."""
    rows = [
        (item.instance, key, of.value, of.source if of.declared else f"{of.source}, not in this version's manifest")
        for item in effective
        for key, of in item.keys.items()
    ]
    if rows:
        output.table(("INSTANCE", "KEY", "VALUE", "SOURCE"), rows, empty="")


def worker_of(instance: InstanceHealth, everyone: tuple[InstanceHealth, ...]) -> str:
    """Describe the workers of an instance: its own, or a shared one and with how many others."""
    if not instance.shared_worker:
        return "own"
    others = sum(other.shared_worker == instance.shared_worker for other in everyone) - 1
    return f"{instance.shared_worker}, with {others} more" if others else instance.shared_worker


def _show_metrics(instances: Iterable[InstanceHealth]) -> None:
    """Print figures of components' own, where there are any."""
    rows = [row for each in instances for row in own_figures(each)]
    if rows:
        output.table(("INSTANCE", "METRIC", "KIND", "VALUE", "COUNT"), rows, empty="")
        output.console().print()


def own_figures(instance: InstanceHealth) -> Iterator[tuple[str, ...]]:
    """Return a row for each series that the component itself counts, as far as a device may say it."""
    for each in instance.metrics or ():
        if each.flaw:
            continue
        labels = ", ".join(f"{name}={value}" for name, value in each.labels.items())
        name = f"{each.name} {{{labels}}}" if labels else each.name
        yield instance.instance, name, each.kind, f"{each.value:g}", str(each.count)


def statistics(instance: InstanceHealth) -> tuple[str, ...]:
    """Summarise an instance since its generation started; latencies of the last calls as `UP TO:COUNT`."""
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
        ("security", "; ".join(f"{alert.kind}: {alert.text}" for alert in detail.alerts)),
        ("dropped", f"{detail.dropped} messages since the server started" if detail.dropped else ""),
    ]
    if detail.health is not None:
        resources = detail.health.resources
        memory = f"{output.size(resources.memory_available_bytes)} of {output.size(resources.memory_total_bytes)} free"
        heat = f", {resources.temperature_c:.0f} °C" if resources.temperature_c is not None else ""
        layers = ", ".join(name if holds else f"NO {name}" for name, holds in detail.health.containment.items())
        runs_as = f"{detail.health.host_runs_as}: " if detail.health.host_runs_as else ""
        pairs += [
            (
                "hardware",
                f"up {output.span(resources.uptime_s)}, load {resources.load:.2f} on {resources.cpus} CPUs{heat}",
            ),
            ("memory", memory),
            *([("data", kept)] if (kept := ", ".join(map(output.target, row.data.values()))) else []),
            ("disk", f"{output.size(resources.disk_free_bytes)} of {output.size(resources.disk_total_bytes)} free"),
            ("isolation", runs_as + layers),
        ]
    return pairs


@command("why", examples="fleet why gate-7-1f2e3d4c\nfleet why gate-7-1f2e3d4c --limit 50 --log")
@click.argument("device", shell_complete=operator.devices)
@click.option(
    "--limit",
    metavar="NUMBER",
    default=15,
    show_default=True,
    type=click.IntRange(1, 1000),
    help="Show at most this many entries",
)
@click.option("--log", is_flag=True, help="Add the log lines that came with a failure")
def why(options: Options, *, device: str, limit: int, log: bool) -> Exit:
    """Show what happened to a device, newest first, what it retries and what to do."""
    with connect(options) as client:
        timeline = client.timeline(device, limit=limit)
    if options.json:
        output.show_json(timeline)
        return Exit.OK
    for entry in timeline.entries:
        when = output.local(entry.at)
        click.echo(f"{click.style(when, dim=True)}  {_coloured(entry)}")
        if entry.retryable:
            click.echo("                     the device retries this by itself")
        if entry.action:
            click.echo(f"                     {click.style('do:', bold=True)} {entry.action}")
        for line in entry.log if log else ():
            click.echo(f"                     | {line}")
    if not timeline.entries:
        click.echo(f"Nothing has happened to {timeline.device} yet.")
    return Exit.OK


def _coloured(entry: operator_api.TimelineEntry) -> str:
    bad = entry.code is not None or entry.kind == "revoked"
    text = names.readable(" ".join(entry.text.split()))
    return click.style(text, fg="red") if bad else text


@command(
    "enroll-token",
    examples=(
        "fleet enroll-token --group edge-eu\nfleet enroll-token --group edge-eu -q | ssh gate-7 sudo fleet-agent enroll"
    ),
)
@click.option(
    "--group",
    default="",
    shell_complete=operator.groups,
    metavar="NAME",
    help="Put the device into this group, created if need be",
)
@click.option(
    "--valid", default="1h", show_default=True, metavar="TIME", help="Validity of the token: 90s, 30m, 12h, 7d"
)
def enroll_token(options: Options, *, group: str, valid: str) -> None:
    """Create a one-time token with which one device joins.

    The token is a secret, printed to standard output and shown only now. Pipe it into `fleet-agent enroll` on the
    device, where it is never an argument.
    """
    with connect(options) as client:
        reply = client.enroll_token(operator_api.EnrollTokenRequest(group=group, valid_s=seconds(valid)))
    if options.json:
        output.show_json(reply)
        return
    click.echo(reply.token)
    if not options.quiet:
        where = f" into group {reply.group}" if reply.group else ""
        click.echo(f"For one device{where}, until {output.local(reply.expires)}.", err=True)


def seconds(text: str) -> int:
    """Read a duration such as `90s`, `30m`, `12h` or `7d`, in seconds. Raises `Fault`."""
    match = re.fullmatch(r"(\d{1,6})([smhd])", text.strip())
    if match is None or int(match[1]) == 0:
        raise Fault(
            f"{text!r} is not a duration", "a duration is a whole number and a unit", "write 90s, 30m, 12h or 7d"
        )
    length = int(match[1]) * _UNITS[match[2]]
    if length > bounds.WAIT_MAX_S:
        raise Fault(f"{text!r} is too long", f"the most is {bounds.WAIT_MAX_S // 86_400}d", "give a shorter time")
    return length


@command(
    "pin", examples="fleet pin gate-7-1f2e3d4c hello@1.4.0\nfleet pin gate-7-1f2e3d4c hello@1.4.0 --config level=debug"
)
@click.argument("device", shell_complete=operator.devices)
@click.argument("target", metavar="NAME@VERSION")
@click.option("--as", "instance", default="", metavar="NAME", help="Name of the instance  [the component's name]")
@click.option("--config", multiple=True, metavar="KEY=VALUE", help="Set a configuration value; repeatable")
@click.option(
    "--port",
    metavar="PORT",
    type=click.IntRange(0, 65535),
    help="Give the instance a port of its own; 0 for the shared one",
)
@share_worker_option
@click.option("--detach", is_flag=True, help="Return at once instead of following the rollout")
@base.DRY_RUN
def pin(
    options: Options,
    *,
    device: str,
    target: str,
    instance: str,
    config: tuple[str, ...],
    port: int | None,
    share_worker: bool | None,
    detach: bool,
    dry: bool,
) -> Exit:
    """Give one device a published version of its own, whatever its groups say."""
    who = load_operator(options)
    name = who.target(target)
    request = operator_api.RolloutRequest(
        instance=instance or name.name,
        target=name.path,
        device=device,
        waves="100%",
        config=config_values(config),
        port=port,
        share_worker=share_worker,
    )
    with who.client() as client:
        if dry:
            return foreseen(client, replace(request, waves=""), options)
        return finish(client, client.pin(device, request), options, detach=detach)


@command("unpin", examples="fleet unpin gate-7-1f2e3d4c hello")
@click.argument("device", shell_complete=operator.devices)
@click.argument("instance")
@base.DRY_RUN
def unpin(options: Options, *, device: str, instance: str, dry: bool) -> None:
    """Let a device follow its groups again for one instance."""
    with connect(options) as client:
        if dry:
            _check_instance(client.device(device), instance, pinned=True)
            output.foresee(options, f"end the pin of {instance}, so that the groups decide", [device])
            return
        detail = client.unpin(device, instance)
    _show_effective(options, detail, instance)


@command("retry", examples="fleet retry gate-7-1f2e3d4c hello")
@click.argument("device", shell_complete=operator.devices)
@click.argument("instance")
@base.DRY_RUN
def retry(options: Options, *, device: str, instance: str, dry: bool) -> None:
    """Retry an instance that failed on a device."""
    with connect(options) as client:
        if dry:
            _check_instance(client.device(device), instance)
            output.foresee(options, f"have {instance} tried again", [device])
            return
        detail = client.retry(device, instance)
    _show_effective(options, detail, instance)


def _check_instance(detail: operator_api.DeviceDetail, instance: str, *, pinned: bool = False) -> None:
    """Refuse an instance that a device neither runs nor should run, or that has no pin. Raises `Fault`."""
    row = detail.row
    if pinned and instance not in row.pins:
        raise Fault(
            f"{row.id} has no pin for {instance}", "", "'fleet device ID --effective' shows them", code=Exit.REFUSED
        )
    known = {each.instance for each in row.instances} | {each.instance for each in detail.effective}
    if instance not in known:
        has = ", ".join(sorted(known)) or "none"
        raise Fault(f"{row.id} has no instance {instance}", f"there are {has}", code=Exit.REFUSED)


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
@base.DRY_RUN
def restart(options: Options, *, device: str, instance: str, dry: bool) -> None:
    """Restart an instance on a device, by a signed command."""
    with connect(options) as client:
        if dry:
            _check_instance(client.device(device), instance)
            output.foresee(options, f"restart {instance}", [device])
            return
        reply = client.command(device, operator_api.CommandRequest(verb=Restart(instance=instance)))
    output.result(options, reply, f"Command {reply.sequence} is on its way, valid until {output.local(reply.expires)}.")


@command("label", examples="fleet label gate-7-1f2e3d4c site=berlin\nfleet label gate-7-1f2e3d4c site-")
@click.argument("device", shell_complete=operator.devices)
@click.argument("labels", nargs=-1, required=True, metavar="LABEL=VALUE|LABEL-...")
@base.DRY_RUN
def label(options: Options, *, device: str, labels: tuple[str, ...], dry: bool) -> None:
    """Set labels of a device, or remove one with a trailing '-'."""
    values = label_values(labels)
    with connect(options) as client:
        if dry:
            client.device(device)  # the server refuses a name that no device has
            words = ", ".join(
                f"remove {key}" if value is None else f"set {key}={value}" for key, value in values.items()
            )
            output.foresee(options, f"{words}; groups that select by labels follow", [device])
            return
        detail = client.label(device, operator_api.LabelsRequest(labels=values))
    if options.json:
        output.show_json(detail)
    else:
        now = " ".join(f"{key}={value}" for key, value in detail.row.labels.items()) or "no labels"
        output.say(options, f"{detail.row.id}: {now}")


@command("revoke", examples="fleet revoke gate-7-1f2e3d4c")
@click.argument("device", shell_complete=operator.devices)
@click.option("--yes", is_flag=True, help="Revoke without asking")
@base.DRY_RUN
def revoke(options: Options, *, device: str, yes: bool, dry: bool) -> None:
    """Remove a device from the fleet: the server refuses its certificate from now on."""
    if dry:
        with connect(options) as client:
            output.foresee(options, "remove from the fleet, until it enrols anew", [client.device(device).row.id])
        return
    if not yes:
        question = f"Remove {device} from the fleet? It can come back only by enrolling anew."
        confirm(question, f"{device} was not revoked")
    with connect(options) as client:
        detail = client.revoke(device)
    output.result(options, detail, f"{detail.row.id} is revoked.")


@command("status", examples="fleet status\nfleet status --json")
def status(options: Options) -> Exit:
    """Show the state of the fleet: what is up, what expires, what is wrong."""
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
            ("device address", ", ".join([answer.devices_url, *answer.mqtt])),
            ("broker", broker),
            ("devices", f"{answer.devices}, {answer.online} online"),
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
    for each in answer.waiting:
        click.echo(click.style("waiting: ", bold=True) + each)
    for problem in answer.problems:
        click.echo(click.style("problem: ", fg="yellow", bold=True) + problem)
    return Exit.OK


@command(
    "devices",
    examples="fleet devices\nfleet devices --group edge-eu\n"
    "fleet devices --where 'arch=riscv64 and memory>=512MiB and site in (berlin, paris)'\nfleet devices --json",
)
@click.option(
    "--group", default="", shell_complete=operator.groups, metavar="NAME", help="List only the devices of this group"
)
@operator.where_option("List only devices that this takes, such as 'site in (berlin, paris) and not online'")
@base.table_options
def devices(options: Options, *, group: str, where: str) -> None:
    """List the devices."""
    with connect(options) as client:
        rows = tuple(row for row in client.devices(where).devices if not group or group in row.groups)
        if group and not rows:
            client.policy(group)  # the server refuses a name that no group has
    if options.json:
        output.show_json({"devices": list(rows)})
        return
    output.table(
        ("DEVICE", "STATE", "GROUPS", "RUNS", "MACHINE", "SEEN", "PROBLEM"),
        [_device_row(row) for row in rows],
        noun="devices",
        empty="No such device: 'fleet devices' lists every one."
        if group or where
        else "No device yet: 'fleet enroll-token --group G' creates a token for one.",
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
    """Describe an instance in a listing: name, target, and its state unless that is simply `running`."""
    name, _, version = output.target(instance.target).partition("/")[2].partition("@")
    what = f"{name}@{version}" if instance.instance == name else f"{instance.instance}={name}@{version}"
    states = [] if instance.state is InstanceState.RUNNING else [str(instance.state)]
    if instance.phase not in {Phase.IDLE, Phase.COMMITTED}:
        states.append(str(instance.phase))
    return f"{what} ({', '.join(states)})" if states else what


@command("groups", examples="fleet groups\nfleet groups --json")
@base.table_options
def groups(options: Options) -> None:
    """List the groups and what each of them runs."""
    with connect(options) as client:
        answer = client.groups()
    if options.json:
        output.show_json(answer)
        return
    output.table(
        ("GROUP", "DEVICES", "ONLINE", "RUNS", "ROLLOUT", "MEMBERS"),
        [_group_row(row) for row in answer.groups],
        empty="No group yet: 'fleet enroll-token --group G' creates one.",
        noun="groups",
    )


def _group_row(row: GroupRow) -> tuple[str, ...]:
    chosen = ", ".join(f"{key}={value}" for key, value in row.selector.items())
    members = f"by label {chosen}" if chosen else "listed"
    members += ", has a plan" if row.planned else ""
    return (
        row.name,
        str(row.devices),
        str(row.online),
        ", ".join(output.target(settled.target).partition("/")[2] for settled in row.settled) or "-",
        str(row.rollout) if row.rollout else "-",
        f"{members}, priority {row.priority}" if row.priority else members,
    )


@command(
    "logs",
    examples="fleet logs hello --device gate-7-1f2e3d4c\n"
    "fleet logs hello --device gate-7-1f2e3d4c --follow --minutes 15",
)
@click.argument("instance")
@click.option("--device", required=True, shell_complete=operator.devices, metavar="ID", help="Read from this device")
@click.option("--follow", is_flag=True, help="Keep printing new lines until --minutes are over or Ctrl-C")
@click.option(
    "--minutes",
    metavar="MINUTES",
    default=5,
    show_default=True,
    type=click.IntRange(1, bounds.LOGS_MINUTES_MAX),
    help="Minutes that the device sends at most, with --follow",
)
def logs(options: Options, *, instance: str, device: str, follow: bool, minutes: int) -> Exit:
    """Show the last log lines of INSTANCE on a device, requested by a signed command.

    The device's owner decides what may leave it ([policy] logs: off, errors or all; errors is the default). The device
    masks values of secrets. The audit log records who asked, the device's own history what was sent.
    """
    with connect(options) as client:
        return _show_logs(options, client, device, instance, minutes=minutes if follow else 0)


def _show_logs(options: Options, client: "Client", device: str, instance: str, *, minutes: int) -> Exit:
    """Show lines for some minutes, or one look with 0."""
    follow, until = minutes > 0, time.monotonic() + 60 * minutes
    sequence = _ask_for_lines(client, device, instance, minutes=max(1, minutes))
    after, left_out, shown, patience = 0, 0, False, time.monotonic() + ANSWER_S
    while True:
        look = functools.partial(_look, client, device, sequence, after)
        view = operator.patiently(look) if follow else client.logs(device, command=sequence, after=after, wait_s=LOOK_S)
        if view is None:
            # a server that was started again does not know who follows what
            left = math.ceil((until - time.monotonic()) / 60)
            if left <= 0:
                return Exit.OK
            again = functools.partial(_ask_for_lines, client, device, instance, minutes=left)
            sequence, after, left_out = operator.patiently(again), 0, 0
            patience = time.monotonic() + ANSWER_S
            click.echo("(the server was started again: lines may be missing, or be shown twice)", err=True)
            continue
        after = view.next
        _print_lines(options, view, device=device, instance=instance)
        shown = shown or bool(view.lines)
        if view.refused:
            raise Fault(f"{device} refused to send logs", view.refused, code=Exit.REFUSED)
        if not view.heard and time.monotonic() >= patience:
            raise Fault(
                f"{device} does not answer",
                "the device is offline, or cannot reach the devices' port",
                "fleet device shows when it was last seen",
                code=Exit.FAILED,
            )
        if view.left_out > left_out and not options.json:
            count = view.left_out - left_out
            click.echo(f"({count} lines left out, by the device's policy or because they came too fast)", err=True)
        left_out = view.left_out
        if view.ended or (view.heard and not follow):
            if not (shown or view.left_out or options.json):
                click.echo(f"({instance} on {device} has written no line since it began)", err=True)
            return Exit.OK


def _ask_for_lines(client: "Client", device: str, instance: str, *, minutes: int) -> int:
    """Have the device send lines; returns the number of the command."""
    verb = FollowLogs(instance=instance, minutes=minutes)
    return client.command(device, operator_api.CommandRequest(verb=verb)).sequence


def _look(client: "Client", device: str, sequence: int, after: int) -> LogView | None:
    """Fetch lines; None when the server knows nothing of that command."""
    from fleet.client import ProblemError  # noqa: PLC0415 - httpx is not for --help

    try:
        return client.logs(device, command=sequence, after=after, wait_s=LOOK_S)
    except ProblemError as error:
        if error.problem.type != "not-found":
            raise
        return None


_LOG_LINE: Final = re.compile(
    r"(?:(?P<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?Z) )?"
    r"(?:\[?(?P<level>trace|debug|info|warn|error|critical|stdout|stderr|host)\]?[:\]] ?)?"
)


def _print_lines(options: Options, view: LogView, *, device: str, instance: str) -> None:
    for line in view.lines:
        if not options.json:
            click.echo(line)
            continue
        # a JSON object for each line, as it arrives
        head = _LOG_LINE.match(line)
        found = {"time": head and head["time"], "level": head and head["level"]}
        words = {**found, "device": device, "instance": instance, "line": line}
        click.echo(json_text(json.dumps(words, ensure_ascii=False)))

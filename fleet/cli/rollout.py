"""`fleet rollouts`, `rollout`, `undo` and `remove`; following a rollout until its outcome is known.

Following draws live bars on a terminal, and prints one line for each change elsewhere. Changes come by long polling.
Following goes on after a restart of the server: the rollout is in its database and on the devices.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import click
from msgspec.structs import replace
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fleet.cli import base, operator, output
from fleet.cli.base import Command, Exit, Fault, Options, command
from fleet.cli.operator import connect
from fleet.protocol import bounds, operator_api
from fleet.protocol.codes import OPEN_STATES, Outcome, PauseCause, Phase, RolloutState
from fleet.protocol.operator_api import RolloutDevice, RolloutView

if TYPE_CHECKING:
    from fleet.client import Client
    from fleet.rollout.members import Amount, Stage

POLL_S: Final = 25

_STEPS: Final = {
    Phase.FETCHING: 1,
    Phase.VERIFYING: 2,
    Phase.COMPILING: 3,
    Phase.STAGED: 4,
    Phase.SWAPPING: 5,
    Phase.PROBATION: 6,
    Phase.COMMITTED: 7,
}
_ALL_STEPS: Final = 7
_PLAYED_ALONE: Final = 20_000
"""Devices times runs of a simulation that are played before further processes have started."""

_DETAILS_MAX: Final = 5
_DECIDED: Final = frozenset(
    {Outcome.SUCCEEDED, Outcome.FAILED, Outcome.NOT_AFFECTED, Outcome.REVERTED, Outcome.SUPERSEDED}
)
_NOT_YET: Final = frozenset({Outcome.PENDING, Outcome.WAITING, Outcome.DEFERRED, Outcome.IN_PROGRESS, Outcome.LOST})
_COUNTED_NOT: Final = frozenset({Outcome.NOT_AFFECTED, Outcome.UNPROVEN})
_FOLLOWED: Final = OPEN_STATES | {RolloutState.SCHEDULED}
_BY_ITSELF: Final = frozenset({PauseCause.LOST, PauseCause.BREACH, PauseCause.CANARY, PauseCause.UNDECIDED})
"""Causes of a pause that only an operator ends."""


@command("rollouts", examples="fleet rollouts\nfleet rollouts --group edge-eu --limit 5 --json")
@click.option(
    "--group", default="", shell_complete=operator.groups, metavar="NAME", help="List only rollouts of this group"
)
@click.option(
    "--limit", default=20, show_default=True, type=click.IntRange(1, 1000), metavar="N", help="List at most this many"
)
@base.table_options
def rollouts(options: Options, *, group: str, limit: int) -> None:
    """List the rollouts, newest first."""
    with connect(options) as client:
        answer = client.rollouts(group=group, limit=limit)
        if group and not answer.rollouts:
            client.policy(group)  # the server refuses a name that no group has
    if options.json:
        output.show_json(answer)
        return
    rows = [
        (
            str(row.number),
            str(row.state),
            row.instance,
            output.target(row.target) if row.target else "(removal)",
            row.group or row.device,
            " ".join(f"{count} {word}" for word, count in row.counts.items() if count),
            output.ago(row.created_at),
            output.first_line(row.reason),
        )
        for row in answer.rollouts
    ]
    columns = ("NO", "STATE", "INSTANCE", "TARGET", "TO", "DEVICES", "STARTED", "REASON")
    output.table(columns, rows, empty="No rollout yet: 'fleet push FILE --group G' starts one.", noun="rollouts")


@click.group(
    "rollout", cls=base.ShortGroup, short="show", epilog="`fleet rollout 7` is short for `fleet rollout show 7`."
)
def rollout() -> None:
    """Show, follow, steer or simulate a rollout, by its number or id."""


@command("show", examples="fleet rollout 7\nfleet rollout 7 --follow")
@click.argument("number", shell_complete=operator.rollouts)
@click.option(
    "--follow", "-f", "following", is_flag=True, help="Follow until the outcome is known; the exit code reports it"
)
@base.WIDE_OPTION
def show(options: Options, *, number: str, following: bool) -> Exit:
    """Show a rollout and each of its devices."""
    with connect(options) as client:
        view = client.rollout(number)
        if following:
            return follow(client, view, options)
    if options.json:
        output.show_json(view)
        return Exit.OK
    if output.console().is_terminal:
        output.console().print(picture(view, devices_max=1000))
    else:
        click.echo(title(view))
        rows = [(f"  {entry.device}", f"wave {entry.wave}", progress_of(entry)) for entry in view.devices]
        output.table(("  DEVICE", "WAVE", "STATE"), rows, empty="  no devices")
    click.echo()
    reason = output.first_line(view.reason)
    causes = ", ".join(view.causes)
    output.facts(
        [
            ("state", f"{view.state} ({causes})" if causes else str(view.state)),
            ("where", view.where),
            ("reason", reason),
            ("waits for", _waits_for(view)),
            ("approval", _approvers(view)),
            (
                "queue",
                f"closed: {view.queue_closed}; 'fleet rollout resume {view.number}'" if view.queue_closed else "",
            ),
            ("seed", str(view.seed)),
            ("by", view.by),
            ("note", view.note),
        ]
    )
    return Exit.OK


def _verb(name: str, done: str, text: str) -> Command:
    """Make the command for one act on a rollout."""

    @command(name, examples=f"fleet rollout {name} 7")
    @click.argument("number", shell_complete=operator.rollouts)
    @base.DRY_RUN
    def act(options: Options, *, number: str, dry: bool) -> None:
        with connect(options) as client:
            if dry:
                view = client.rollout(number)
                _foresee(options, view, f"{name} rollout {view.number}, which is {view.state}")
                return
            view = client.act(number, name)
        output.result(options, view, f"Rollout {view.number} {done}.")

    act.help = text
    return act


rollout.add_command(show)

rollout.add_command(
    _verb("pause", "is paused: no further wave is offered", "Offer no further wave until it is resumed.")
)

rollout.add_command(_verb("resume", "goes on", "Continue a paused rollout."))

rollout.add_command(
    _verb(
        "approve",
        "is approved: the next wave follows",
        "Approve the gate of a wave whose stage wants a second person, who is not the one who began the rollout.",
    )
)


@command("abort", examples="fleet rollout abort 7\nfleet rollout abort 7 --keep")
@click.argument("number", shell_complete=operator.rollouts)
@click.option("--keep", is_flag=True, help="Leave devices that have the version where they are, as pins")
@base.DRY_RUN
def abort(options: Options, *, number: str, keep: bool, dry: bool) -> None:
    """End a rollout and return its devices to what they had before."""
    with connect(options) as client:
        if dry:
            view = client.rollout(number)
            what = (
                "leave those that have the version where they are" if keep else "return devices to what they had before"
            )
            _foresee(options, view, f"end rollout {view.number}, and {what}")
            return
        view = client.abort(number, keep=keep)
    if not keep:
        output.result(options, view, f"Rollout {view.number} is aborted: its devices are offered what they had before.")
        return
    kept = ", ".join(each.device for each in view.devices if each.outcome is Outcome.SUCCEEDED) or "none"
    output.result(options, view, f"Rollout {view.number} is aborted; pinned where they are: {kept}.")


@command("retry", examples="fleet rollout retry 7")
@click.argument("number", shell_complete=operator.rollouts)
@click.option("--detach", is_flag=True, help="Return at once instead of following the rollout")
@base.DRY_RUN
def retry(options: Options, *, number: str, detach: bool, dry: bool) -> Exit:
    """Begin a reverted rollout once more, at wave 1.

    Devices that had refused the version try it again.
    """
    with connect(options) as client:
        if dry:
            view = client.rollout(number)
            _foresee(options, view, f"begin rollout {view.number} once more, at wave 1")
            return Exit.OK
        return finish(client, client.act(number, "retry"), options, detach=detach)


@command("cancel-device", examples="fleet rollout cancel-device 7 gate-7-1f2e3d4c")
@click.argument("number", shell_complete=operator.rollouts)
@click.argument("device", shell_complete=operator.devices)
@base.DRY_RUN
def cancel_device(options: Options, *, number: str, device: str, dry: bool) -> None:
    """Leave one device out of a rollout.

    The device keeps, or goes back to, what it had before.
    """
    with connect(options) as client:
        if dry:
            view = client.rollout(number)
            if device not in {each.device for each in view.devices}:
                raise Fault(
                    f"{device} is not in rollout {view.number}", f"see fleet rollout {view.number}", code=Exit.REFUSED
                )
            output.foresee(options, f"leave it out of rollout {view.number}", [device])
            return
        view = client.cancel_device(number, device)
    output.result(options, view, f"Rollout {view.number} goes on without {device}.")


for _each in (abort, retry, cancel_device):
    rollout.add_command(_each)


def _foresee(options: Options, view: RolloutView, would: str) -> None:
    """Print what would become of a rollout and its devices."""
    output.foresee(options, would, [each.device for each in view.devices])


def _foresee_freeze(options: Options, client: "Client", group: str, would: str) -> None:
    if group:
        client.policy(group)  # the server refuses a name that no group has
    rows = client.devices().devices
    concerned = [row.id for row in rows if not row.revoked and (not group or group in row.groups)]
    output.foresee(options, f"{would} in {group or 'the whole fleet'}", concerned)


def foreseen(client: "Client", request: operator_api.RolloutRequest, options: Options) -> Exit:
    """Print what a rollout would do; NOTHING_AFFECTED where the server would refuse it."""
    found = client.preflight(request)
    if options.json:
        output.show_json(found)
    else:
        what = f"{output.target(request.target)} as {request.instance}" if request.target else f"no {request.instance}"
        output.facts(
            [
                ("would run", what),
                ("before", output.target(found.previous) if found.previous else ""),
                *((f"wave {number}", ", ".join(wave)) for number, wave in enumerate(found.waves, 1)),
                *(("excluded", f"{each.device}: {each.reason}") for each in found.excluded),
                *(("note", each) for each in found.warnings),
            ]
        )
        output.say(options, "Nothing was changed.")
    return Exit.OK if any(found.waves) else Exit.NOTHING_AFFECTED


def amount(option: str, text: str) -> "Amount":
    """Read the number or share of devices given to an option. Raises `Fault`."""
    from fleet.rollout.members import Amount, BadWavesError  # noqa: PLC0415 - not for --help

    try:
        return Amount.parse(text)
    except BadWavesError as error:
        raise Fault(f"{option}: {error}") from None


@command("freeze", examples="fleet freeze --reason 'trade fair'\nfleet freeze --group edge-eu --reason 'night shift'")
@click.option(
    "--group", default="", shell_complete=operator.groups, metavar="NAME", help="Freeze this group  [the fleet]"
)
@click.option("--reason", required=True, metavar="TEXT", help="Say why, for everybody who meets the freeze")
@base.DRY_RUN
def freeze(options: Options, *, group: str, reason: str, dry: bool) -> None:
    """Pause every rollout and refuse new ones, until 'fleet unfreeze'.

    Aborts, withdrawals of releases and their consequences pass.
    """
    if not reason.strip():
        raise click.UsageError("--reason is empty: say why, for everybody who meets the freeze.")
    with connect(options) as client:
        if dry:
            _foresee_freeze(options, client, group, "pause every rollout and refuse new ones")
            return
        answer = client.freeze(group, reason)
    output.result(options, answer, f"{group or 'The fleet'} is frozen: {reason}.")


@command("unfreeze", examples="fleet unfreeze\nfleet unfreeze --group edge-eu")
@click.option("--group", default="", shell_complete=operator.groups, metavar="NAME", help="Of this group  [the fleet]")
@base.DRY_RUN
def unfreeze(options: Options, *, group: str, dry: bool) -> None:
    """End a freeze: what it paused goes on."""
    with connect(options) as client:
        if dry:
            _foresee_freeze(options, client, group, "end the freeze, so that what it paused goes on")
            return
        answer = client.unfreeze(group)
    output.result(options, answer, f"{group or 'The fleet'} is no longer frozen.")


@command(
    "simulate",
    examples="fleet rollout simulate --group edge-eu\n"
    "fleet rollout simulate --group edge-eu --waves '1, 10%, 100%' --soak 600 --seed 7",
)
@click.option("--group", required=True, shell_complete=operator.groups, metavar="NAME", help="Play over this group")
@operator.where_option("Of the group, only these devices")
@click.option(
    "--waves", default="", metavar="SIZES", help="Size of each wave  [by the size of the group: '1, 10%, 100%']"
)
@click.option(
    "--soak",
    type=click.IntRange(0, bounds.WAIT_MAX_S),
    metavar="SECONDS",
    help="Soak of each wave  [0, or as the group's plan says]",
)
@click.option("--failures", default="", metavar="N|P%", help="Devices of each wave that may fail")
@click.option("--max-lost", default="", metavar="N|P%", help="Devices of each wave that may be lost")
@click.option("--min-success", default="", metavar="N|P%", help="Devices of each wave that must succeed")
@click.option("--at-once", type=click.IntRange(0), metavar="N", help="Devices in progress at any time")
@click.option("--seed", default=1, type=click.IntRange(0), show_default=True, metavar="N", help="Play by this seed")
@click.option(
    "--runs",
    default=20,
    type=click.IntRange(1, 1000),
    show_default=True,
    metavar="N",
    help="Runs for each failure rate",
)
@base.table_options
def simulate(
    options: Options, *, group: str, where: str, waves: str, soak: int | None, seed: int, runs: int, **limits: Any
) -> None:
    """Play a plan over a group and show when it would halt.

    Nothing is changed: the simulated devices are slow, flap, reboot and go away by a seed, and a version that fails on
    a share of them is rolled out by the decisions of the server. What is not given is as the plan of the group says,
    whose approvals are given at once.
    """
    from fleet.rollout import group_plan, members  # noqa: PLC0415 - not for --help
    from fleet.simulator.forecast import Place, Plan, forecast  # noqa: PLC0415

    with connect(options) as client:
        plan = client.policy(group).plan or operator_api.GroupPlan()  # the server refuses a name that no group has
        rows = [row for row in client.devices(where).devices if group in row.groups and not row.revoked]
        if not rows:
            title = f"the group {group!r} has no devices{f' that --where {where!r} takes' if where else ''}"
            raise Fault(title, "", "'fleet devices' lists all, with their groups", code=Exit.REFUSED)
    given = {name: value for name, value in limits.items() if value not in (None, "")}
    by = "" if plan.budget is None else plan.budget.by
    try:
        for name in given.keys() - {"at_once"}:
            amount(f"--{name.replace('_', '-')}", given[name])
        asked = group_plan.limits_of(
            replace(plan.limits, **given), min_available=None if plan.budget is None else plan.budget.min_available
        )
        stages = () if waves else group_plan.stages_of(plan)
        stages = stages or members.parse_waves(waves or members.default_waves(len(rows)))
    except members.BadWavesError as error:
        raise Fault(str(error)) from None
    found = forecast(
        {row.id: Place(row.online, site=row.labels.get(by, ""), labels=row.labels) for row in rows},
        Plan(_played(stages, soak), asked, plan.soak_s or 0 if soak is None else soak),
        seed=seed,
        runs=runs,
        processes=(os.cpu_count() or 1) if len(rows) * runs > _PLAYED_ALONE else 1,
    )
    if options.json:
        output.show_json({"rates": [dataclasses.asdict(each) for each in found]})
        return
    columns = ("FAILS ON", "HALTS", "IN WAVE", "AFTER", "HURT", "AT MOST", "MET IT")
    table = [
        (
            f"{each.rate:.0%}",
            f"{each.halted} of {each.runs}",
            str(each.wave or "-"),
            f"{each.after_s / 60:.0f} min",
            str(each.hurt),
            str(each.hurt_most),
            f"{each.met} of {len(rows)}",
        )
        for each in found
    ]
    output.table(columns, table, empty="")


def _played(stages: "Sequence[Stage]", soak: int | None) -> "tuple[Stage, ...]":
    """Return stages that wait for no approval, and soak as asked."""
    return tuple(
        dataclasses.replace(each, approval=False, soak_s=each.soak_s if soak is None else None) for each in stages
    )


rollout.add_command(simulate)


@command("undo", examples="fleet undo\nfleet undo 7\nfleet undo --group edge-eu --detach")
@click.argument("number", shell_complete=operator.rollouts, required=False, default="")
@click.option(
    "--group",
    default="",
    shell_complete=operator.groups,
    metavar="NAME",
    help="Without NUMBER: the newest rollout of this group",
)
@click.option(
    "--waves",
    default="",
    metavar="SIZES",
    help="Size of each wave, as a number or share of the devices  [by the size of the group]",
)
@click.option("--detach", is_flag=True, help="Return at once instead of following the rollout")
@base.DRY_RUN
def undo(options: Options, *, number: str, group: str, waves: str, detach: bool, dry: bool) -> Exit:
    """Offer the previous state again, through the same gates.

    Undo the rollout NUMBER, or the newest one.
    """
    if dry and not number:
        raise click.UsageError("--dry-run needs the NUMBER of the rollout: 'fleet rollouts' lists them.")
    with connect(options) as client:
        if dry:
            view = client.rollout(number)
            back = output.target(view.previous) if view.previous else "nothing under that name"
            _foresee(options, view, f"undo rollout {view.number}: {view.instance} becomes {back}")
            return Exit.OK
        view = client.undo(operator_api.UndoRequest(rollout=number, group=group, waves=waves))
        return finish(client, view, options, detach=detach)


@command(
    "remove", examples="fleet remove hello --group edge-eu\nfleet remove hello --device gate-7-1f2e3d4c --keep-data"
)
@click.argument("instance")
@click.option("--group", default="", shell_complete=operator.groups, metavar="NAME", help="Remove it from this group")
@click.option("--device", default="", shell_complete=operator.devices, metavar="ID", help="Remove it from this device")
@click.option("--keep-data", is_flag=True, help="Keep the instance's own data on the devices")
@click.option(
    "--waves",
    default="100%",
    show_default=True,
    metavar="SIZES",
    help="Size of each wave, as a number or share of the devices",
)
@click.option("--detach", is_flag=True, help="Return at once instead of following the rollout")
@base.DRY_RUN
def remove(
    options: Options,
    *,
    instance: str,
    keep_data: bool,
    waves: str,
    detach: bool,
    dry: bool,
    **where: str,
) -> Exit:
    """Remove INSTANCE from a group or a device."""
    group, device = where["group"], where["device"]
    if bool(group) == bool(device):
        raise click.UsageError("Name either --group or --device.")
    request = operator_api.RemovalRequest(
        instance=instance, group=group, device=device, keep_data=keep_data, waves=waves
    )
    with connect(options) as client:
        if dry:
            asked = operator_api.RolloutRequest(
                instance=instance, group=group, device=device, keep_data=keep_data, waves="" if device else waves
            )
            return foreseen(client, asked, options)
        return finish(client, client.remove(request), options, detach=detach)


def follow(client: "Client", view: RolloutView, options: Options, *, everybody: bool = False) -> Exit:
    """Show the rollout until it is decided, and print its outcome.

    With `everybody`, go on after its success until each of its devices has an outcome, those of its catch-up queue too.

    Raises:
        UnreachableError: the server stayed unreachable for more than a minute.
    """
    changes = revisions(client, view, everybody=everybody)
    try:
        if options.json or options.quiet:
            for latest in changes:
                view = latest
        elif output.console().is_terminal:
            view = _live(changes, view)
        else:
            view = _lines(changes, view, everybody=everybody)
    except KeyboardInterrupt:
        click.echo(
            f"\nRollout {view.number} continues.\n"
            f"  fleet rollout {view.number} --follow    watch it again\n"
            f"  fleet rollout abort {view.number}       end it and return the devices to what they had",
            err=True,
        )
        return Exit.INTERRUPTED
    code = conclude(view, options)
    if everybody and view.state is RolloutState.SUCCEEDED and (missing := _without_outcome(view)):
        if options.json:
            return Exit.FAILED
        raise Fault(
            f"rollout {view.number} succeeded, and does not reach {output.some(missing, _DETAILS_MAX)}",
            f"its catch-up queue is closed: {view.queue_closed}"
            if view.queue_closed
            else "another value took its place",
            f"run 'fleet rollout resume {view.number}'" if view.queue_closed else "see 'fleet rollouts'",
            code=Exit.FAILED,
        )
    return code


def exit_code(view: RolloutView) -> Exit:
    """Return the exit code for the state of a rollout."""
    if view.state is RolloutState.REFUSED:
        return Exit.NOTHING_AFFECTED
    return Exit.OK if view.state in {RolloutState.SUCCEEDED, RolloutState.SCHEDULED} else Exit.FAILED


def conclude(view: RolloutView, options: Options) -> Exit:
    """Print the outcome of a decided rollout, and return its exit code."""
    if options.json:
        output.show_json(view)
        return exit_code(view)
    if view.state is RolloutState.SUCCEEDED:
        output.say(options, summary(view))
        return Exit.OK
    bad = [entry for entry in view.devices if entry.outcome is Outcome.FAILED]
    for entry in bad[:_DETAILS_MAX]:
        click.echo(f"\n{entry.device}:", err=True)
        for line in _details(entry):
            click.echo(f"  {line}", err=True)
    reason = "; ".join(f"{entry.device} {progress_of(entry)}" for entry in bad[:1]) or view.reason
    raise Fault(
        f"rollout {view.number} {view.state}",
        reason or "the rollout did not reach every device",
        _next_step(view),
        code=exit_code(view),
    )


def _details(entry: RolloutDevice) -> list[str]:
    """Return a device's message about its failure, and the last log lines of the instance."""
    message = [line.rstrip() for line in entry.message.splitlines() if line.strip()]
    more = [f"fleet why {entry.device} --log shows the log before it"] if entry.log else []
    return [*(message or ["the device gave no reason"]), *(f"| {line}" for line in entry.log), *more]


def revisions(client: "Client", view: RolloutView, *, everybody: bool = False) -> Iterator[RolloutView]:
    """Yield the rollout now and after each change, until it is decided or an operator has to decide.

    With `everybody`, go on after its success until each device has an outcome, or cannot get one any more.
    """
    yield view
    while _is_open(view) or (everybody and _catches_up(client, view)):
        latest = operator.patiently(functools.partial(client.rollout, view.id, wait_s=POLL_S, since=view.revision))
        if latest.revision > view.revision:
            view = latest
            yield view


def _is_open(view: RolloutView) -> bool:
    """Tell whether a rollout goes on without an operator."""
    return view.state in _FOLLOWED and not _BY_ITSELF.intersection(view.causes)


def _without_outcome(view: RolloutView) -> list[str]:
    """Name the devices that have no outcome yet."""
    return [entry.device for entry in view.devices if entry.outcome in _NOT_YET]


def _catches_up(client: "Client", view: RolloutView) -> bool:
    """Tell whether devices of a rollout that succeeded still get it: its queue is open, and its value settled."""
    if view.state is not RolloutState.SUCCEEDED or view.queue_closed or not _without_outcome(view):
        return False
    if not view.group:
        return True
    groups = operator.patiently(client.groups).groups
    return any(each.rollout == view.id for group in groups if group.name == view.group for each in group.settled)


def _lines(changes: Iterator[RolloutView], view: RolloutView, *, everybody: bool) -> RolloutView:
    click.echo(title(view))
    seen: dict[str, str] = {}
    states = {view.state}
    for latest in changes:
        view = latest
        for entry in view.devices:
            line = f"{entry.device}  {progress_of(entry)}"
            if entry.outcome is not Outcome.PENDING and seen.get(entry.device) != line:
                seen[entry.device] = line
                click.echo(f"  {line}")
        if view.state not in states and view.state in _FOLLOWED:
            click.echo(f"  {view.state}{': ' + output.first_line(view.reason) if view.reason else ''}")
            if approvers := _approvers(view):
                click.echo(f"  approval: {approvers}")
        succeeded = view.state is RolloutState.SUCCEEDED and view.state not in states
        if everybody and succeeded and (missing := _without_outcome(view)):
            click.echo(f"  succeeded: not yet on {output.some(missing, _DETAILS_MAX)}")
        states = {view.state}
    return view


def _live(changes: Iterator[RolloutView], view: RolloutView) -> RolloutView:
    with Live(picture(view), console=output.console(), auto_refresh=False, transient=False) as live:
        for latest in changes:
            view = latest
            live.update(picture(view), refresh=True)
    return view


def picture(view: RolloutView, *, devices_max: int = 24) -> Group:
    """Draw a title and a bar for each device; with many devices, the undecided ones first."""
    devices = view.devices
    if len(devices) > devices_max:
        devices = tuple(sorted(devices, key=lambda entry: entry.outcome in {Outcome.SUCCEEDED, Outcome.PENDING}))
    grid = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(width=20)
    grid.add_column(overflow="fold")
    for entry in devices[:devices_max]:
        grid.add_row(Text(f"  {entry.device}"), bar(entry), output.state(progress_of(entry)))
    hidden = len(devices) - devices_max
    foot = [Text(f"  and {hidden} more", style="dim")] if hidden > 0 else []
    if view.state is RolloutState.PAUSED:
        words = _approvers(view) or f"'fleet rollout resume {view.number}' goes on"
        foot.append(Text(f"  paused: {words}", style="yellow"))
    return Group(Text(title(view), style="bold"), grid, *foot)


def bar(entry: RolloutDevice) -> ProgressBar:
    """Draw a device's progress through the steps of an update."""
    match entry.outcome:
        case Outcome.SUCCEEDED:
            done, style = float(_ALL_STEPS), "green"
        case Outcome.FAILED:
            done, style = float(_ALL_STEPS), "red"
        case _:
            done, style = steps(entry), "cyan"
    return ProgressBar(
        total=_ALL_STEPS, completed=done, complete_style=style, finished_style=style, style="bright_black"
    )


def steps(entry: RolloutDevice) -> float:
    """Count the steps done, with the percentage of the current one as a fraction."""
    reached = _STEPS.get(entry.phase, 0) if entry.phase is not None else 0
    if not reached:
        return 0.0
    return reached - 1 + (entry.progress or 0) / 100 if entry.phase is not Phase.COMMITTED else float(_ALL_STEPS)


def title(view: RolloutView) -> str:
    """Describe the rollout in one line: change and devices."""
    where = f"group {view.group}" if view.group else f"device {view.device}"
    what = f"{output.target(view.target)} as {view.instance}" if view.target else f"removal of {view.instance}"
    waves = f", waves {', '.join(wave.text for wave in view.waves)}" if len(view.waves) > 1 else ""
    count = len(view.devices)
    size = f"{count} device{'' if count == 1 else 's'}"
    if view.state is RolloutState.SCHEDULED and view.starts_at is not None:
        size = f"begins {view.starts_at:%Y-%m-%d %H:%M} UTC"
    return f"Rollout {view.number}: {what} to {where} ({size}{waves})"


def progress_of(entry: RolloutDevice) -> str:
    """Describe a device's progress in a few words."""
    match entry.outcome:
        case Outcome.SUCCEEDED:
            took = f" in {_seconds(entry)}" if _seconds(entry) else ""
            unexercised = "" if entry.exercised else ", with few calls so far"
            undecided = f"; undecided: {output.first_line(entry.reason)}" if entry.reason and not entry.accepted else ""
            return f"succeeded{took}{unexercised}{undecided}"
        case Outcome.FAILED:
            code = f" ({entry.code})" if entry.code is not None else ""
            return f"rolled back{code}" if entry.phase is Phase.ROLLED_BACK else f"{entry.outcome}{code}"
        case Outcome.IN_PROGRESS if entry.phase is not None:
            percent = f" {entry.progress} %" if entry.progress is not None else ""
            retry = f", retrying: {output.first_line(entry.message)}" if entry.retrying and entry.message else ""
            return f"{entry.phase}{percent}{retry}"
        case Outcome.WAITING | Outcome.DEFERRED | Outcome.LOST | Outcome.NOT_AFFECTED | Outcome.UNPROVEN:
            return _standing_apart(entry)
        case _:
            return str(entry.outcome)


def _approvers(view: RolloutView) -> str:
    """Say who may approve the gate that a rollout waits at; empty where it waits for no approval."""
    if PauseCause.APPROVAL not in view.causes:
        return ""
    return f"somebody other than {view.by or 'who began it'}: 'fleet rollout approve {view.number}'"


def _waits_for(view: RolloutView) -> str:
    """Name the devices that a rollout waits for."""
    more = view.waits - len(view.waits_for)
    return ", ".join(view.waits_for) + (f" and {more} more" if more > 0 else "")


def _standing_apart(entry: RolloutDevice) -> str:
    """Describe a device that waits, or that does not count."""
    if entry.outcome is Outcome.WAITING:
        what = "goes back to what it had before" if entry.returning else "waiting"
        return what if entry.online else f"{what}: the device is offline"
    why = (entry.message or entry.reason) if entry.outcome is Outcome.DEFERRED else entry.reason
    return f"{entry.outcome}: {output.first_line(why)}" if why else str(entry.outcome)


def summary(view: RolloutView) -> str:
    """Describe a succeeded rollout in one line."""
    done = [entry for entry in view.devices if entry.outcome is Outcome.SUCCEEDED]
    stragglers = [entry.device for entry in view.devices if entry.outcome not in _DECIDED]
    took = ""
    if view.ended_at is not None:
        took = f" after {(view.ended_at - view.created_at).total_seconds():.1f} s"
    verb = f"run {output.target(view.target)}" if view.target else f"no longer run {view.instance}"
    rest = f"; not yet: {', '.join(stragglers)}" if stragglers else ""
    counted = [device for device in view.devices if device.outcome not in _COUNTED_NOT]
    left_out = len(view.devices) - len(counted)
    rest += f"; not affected or unproven: {left_out}" if left_out else ""
    return f"Rollout {view.number} succeeded{took}: {len(done)} of {len(counted)} devices {verb}{rest}"


def _seconds(entry: RolloutDevice) -> str:
    if entry.offered_at is None or entry.ended_at is None:
        return ""
    return f"{(entry.ended_at - entry.offered_at).total_seconds():.1f} s"


def _next_step(view: RolloutView) -> str:
    failed = [entry.device for entry in view.devices if entry.outcome is Outcome.FAILED]
    if view.state is RolloutState.PAUSED:
        return f"run 'fleet rollout resume {view.number}' or 'fleet rollout abort {view.number}'"
    if failed:
        return f"run 'fleet why {failed[0]}'"
    if view.state is RolloutState.REFUSED:
        from fleet.rollout.members import UNGUARDED  # noqa: PLC0415 - not for --help

        if UNGUARDED in view.reason:
            return f"label devices for that stage, or change the plan: 'fleet group policy {view.group}'"
        return "add --allow-empty to settle it for devices that come later"
    if view.state is RolloutState.SUPERSEDED:
        return "see 'fleet rollouts' for the rollout that replaced it"
    return f"run 'fleet rollout {view.number}'"


def finish(client: "Client", view: RolloutView, options: Options, *, detach: bool, everybody: bool = False) -> Exit:
    """Follow a rollout that was just started, or print how to follow it."""
    if not detach:
        return follow(client, view, options, everybody=everybody)
    if view.state not in _FOLLOWED:
        return conclude(view, options)
    output.result(options, view, f"{title(view)}\nFollow it with 'fleet rollout {view.number} --follow'.")
    return Exit.OK

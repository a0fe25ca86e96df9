"""`fleet group`: members of a group, and its plan."""

from pathlib import Path

import click

from fleet.cli import base, operator, output
from fleet.cli.base import Fault, Options, ShortGroup, command, label_values, read_file
from fleet.cli.operator import connect
from fleet.protocol import operator_api


@click.group(
    "group", cls=ShortGroup, short="change", epilog="`fleet group NAME` is short for `fleet group change NAME`."
)
def group() -> None:
    """Create a group, change its members, or show and set its plan."""


@command("change", examples="fleet group edge-eu --add gate-7-1f2e3d4c\nfleet group spares --select site=berlin")
@click.argument("name", shell_complete=operator.groups)
@click.option(
    "--add",
    shell_complete=operator.devices,
    multiple=True,
    metavar="DEVICE",
    help="Add a device; repeatable",
)
@click.option(
    "--drop",
    shell_complete=operator.devices,
    multiple=True,
    metavar="DEVICE",
    help="Take a device out; repeatable",
)
@click.option(
    "--select", multiple=True, metavar="LABEL=VALUE", help="Select devices by label instead of listing them; repeatable"
)
@click.option(
    "--priority",
    metavar="NUMBER",
    type=click.IntRange(-1_000_000, 1_000_000),
    help="Where two groups set the same instance, the higher number wins",
)
@base.DRY_RUN
def change(
    options: Options,
    *,
    name: str,
    add: tuple[str, ...],
    drop: tuple[str, ...],
    select: tuple[str, ...],
    priority: int | None,
    dry: bool,
) -> None:
    """Create the group NAME with --add, --select or --priority, or change its members."""
    labels = {key: value for key, value in label_values(select).items() if value is not None} if select else None
    with connect(options) as client:
        if dry:
            for device in (*add, *drop):
                client.device(device)  # the server refuses a name that no device has
            words = [f"add {len(add)}"] * bool(add) + [f"take out {len(drop)}"] * bool(drop)
            words += [f"select by {' '.join(select)}"] * bool(select) + [f"set priority {priority}"] * (
                priority is not None
            )
            output.foresee(
                options, f"create or change the group {name}: {', '.join(words) or 'nothing'}", (*add, *drop)
            )
            return
        row = client.set_group(
            name, operator_api.GroupRequest(priority=priority, selector=labels, add=add, remove=drop)
        )
    output.result(options, row, f"Group {row.name}: {row.devices} device{'' if row.devices == 1 else 's'}.")


@command(
    "policy",
    examples="fleet group policy edge-eu\n"
    "fleet group policy edge-eu --set plan.toml --dry-run\n"
    "fleet group policy edge-eu --set plan.toml\n"
    "fleet group policy edge-eu --clear",
)
@click.argument("name", shell_complete=operator.groups)
@click.option(
    "--set",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Make this TOML file the plan of the group, in place of the one before",
)
@click.option("--clear", is_flag=True, help="Remove the plan: rollouts go by the defaults again")
@click.option("--dry-run", "dry", is_flag=True, help="Change nothing: check FILE and show whom each stage would take")
def policy(options: Options, *, name: str, file: Path | None, clear: bool, dry: bool) -> None:
    """Show, set or clear the plan of the group NAME: how rollouts in it go.

    A plan has stages by labels or size, their soak and approval, limits, and a budget for each site. Options of
    'fleet push' and 'fleet deploy' win over it, which takes an admin and is recorded. An admin sets a plan.
    """
    if clear and file is not None:
        raise click.UsageError("Give either --set or --clear.")
    if dry and file is None:
        raise click.UsageError("--dry-run checks a file: add --set FILE.")
    wanted = None if file is None else _read(file)
    with connect(options) as client:
        if file is None and not clear:
            found = client.policy(name)
        else:
            found = client.set_policy(name, operator_api.GroupPolicyRequest(plan=wanted, dry_run=dry))
    if options.json:
        output.show_json(found)
    elif clear:
        output.say(options, f"{name} has no plan: rollouts go by the defaults.")
    elif found.plan is None:
        output.say(options, f"{name} has no plan: rollouts go by the defaults. 'fleet group policy --help' shows more.")
    else:
        _show(options, found)
        done = "" if file is None else "Nothing was changed." if dry else f"{name} has this plan from now on."
        if done:
            output.say(options, done)


def _read(file: Path) -> operator_api.GroupPlan:
    """Read a plan. Raises `Fault`."""
    from fleet.rollout import group_plan  # noqa: PLC0415 - not for --help

    data = read_file(file, group_plan.MAX_BYTES)
    if len(data) > group_plan.MAX_BYTES:
        raise Fault(f"{file} is no plan", f"it is larger than {group_plan.MAX_BYTES} bytes", "check the path")
    try:
        return group_plan.parse(data.decode())
    except UnicodeDecodeError:
        raise Fault(f"{file} is no plan", "it is not text in UTF-8", "check the path") from None
    except group_plan.BadPlanError as error:
        raise Fault(f"{file}: {error}") from None


def _show(options: Options, found: operator_api.GroupPolicy) -> None:
    """Print a plan as TOML, with whom its stages take as comments."""
    from fleet.rollout import group_plan  # noqa: PLC0415 - not for --help

    assert found.plan is not None
    if options.quiet:
        return
    click.echo(group_plan.write(found.plan), nl=False)
    if found.stages:
        click.echo()
    for number, stage in enumerate(found.stages, 1):
        then = ", then an approval" if stage.approval else ""
        text = " ".join(stage.text.split())
        click.echo(f"# stage {number} ({text}): {stage.devices} device{'' if stage.devices == 1 else 's'}{then}")


for each in (change, policy):
    group.add_command(each)

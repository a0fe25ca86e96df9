"""`fleet rollouts`, `rollout`, `undo` and `remove`."""

import click

from fleet.cli import complete, out
from fleet.cli.base import Command, Exit, Options, command
from fleet.cli.finish import finish
from fleet.cli.follow import follow, picture, standing, title
from fleet.cli.home import connect
from fleet.protocol import api


@command("rollouts", examples="fleet rollouts\nfleet rollouts --group edge-eu --limit 5 --json")
@click.option("--group", default="", shell_complete=complete.groups, help="Of this group only")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 1000), help="So many at most")
def rollouts(options: Options, *, group: str, limit: int) -> None:
    """List the rollouts, newest first."""
    with connect(options) as client:
        answer = client.rollouts(group=group, limit=limit)
    if options.json:
        out.show_json(answer)
        return
    rows = [
        (
            str(row.number),
            str(row.state),
            row.instance,
            out.target(row.target) if row.target else "(removal)",
            row.group or row.device,
            " ".join(f"{count} {word}" for word, count in row.counts.items() if count),
            out.ago(row.created_at),
            out.first_line(row.reason),
        )
        for row in answer.rollouts
    ]
    columns = ("NO", "STATE", "INSTANCE", "TARGET", "TO", "BOARDS", "STARTED", "")
    out.table(columns, rows, empty="No rollout yet: 'fleet push FILE --group G' starts one.")


class _RolloutGroup(click.Group):
    """`fleet rollout 7` is `fleet rollout show 7`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Take a word that is no command for the number of a rollout."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            return super().resolve_command(ctx, ["show", *args])
        return super().resolve_command(ctx, args)


@click.group("rollout", cls=_RolloutGroup, epilog="`fleet rollout 7` is short for `fleet rollout show 7`.")
def rollout() -> None:
    """Show, follow, pause, resume or abort a rollout, by its number or id."""


@command("show", examples="fleet rollout 7\nfleet rollout 7 --follow")
@click.argument("number", shell_complete=complete.rollouts)
@click.option("--follow", "-f", "following", is_flag=True, help="Stay until it is decided; the exit code says how")
def show(options: Options, *, number: str, following: bool) -> Exit:
    """Show a rollout and each of its boards."""
    with connect(options) as client:
        view = client.rollout(number)
        if following:
            return follow(client, view, options)
    if options.json:
        out.show_json(view)
        return Exit.OK
    if out.console().is_terminal:
        out.console().print(picture(view, boards_max=1000))
    else:
        click.echo(title(view))
        rows = [(f"  {board.device}", f"wave {board.wave}", standing(board)) for board in view.boards]
        out.table(("  BOARD", "WAVE", "STATE"), rows, empty="  no boards")
    click.echo()
    reason = out.first_line(view.reason)
    out.facts([("state", str(view.state)), ("reason", reason), ("by", view.by), ("note", view.note)])
    return Exit.OK


def _verb(name: str, done: str, text: str) -> Command:
    """Make the command for one act on a rollout."""

    @command(name, examples=f"fleet rollout {name} 7")
    @click.argument("number", shell_complete=complete.rollouts)
    def act(options: Options, *, number: str) -> None:
        with connect(options) as client:
            view = client.act(number, name)
        if options.json:
            out.show_json(view)
        else:
            out.say(options, f"Rollout {view.number} {done}.")

    act.help = text
    return act


rollout.add_command(show)
rollout.add_command(
    _verb("pause", "is paused: no further wave is offered", "Offer no further wave until it is resumed.")
)
rollout.add_command(_verb("resume", "goes on", "Go on with a paused rollout."))
rollout.add_command(
    _verb("abort", "is aborted: its boards are offered what they had before", "End a rollout and take its boards back.")
)


@command("undo", examples="fleet undo\nfleet undo 7\nfleet undo --group edge-eu --detach")
@click.argument("number", shell_complete=complete.rollouts, required=False, default="")
@click.option(
    "--group",
    default="",
    shell_complete=complete.groups,
    help="The newest rollout of this group, where no number is given",
)
@click.option("--waves", default="1, 100%", show_default=True, help="Boards of each wave, from the first on")
@click.option("--detach", is_flag=True, help="Return at once instead of following")
def undo(options: Options, *, number: str, group: str, waves: str, detach: bool) -> Exit:
    """Offer the previous state again, through the same gates.

    Takes back the rollout NUMBER, or the newest one.
    """
    with connect(options) as client:
        view = client.undo(api.UndoRequest(rollout=number, group=group, waves=waves))
        return finish(client, view, options, detach=detach)


@command(
    "remove", examples="fleet remove hello --group edge-eu\nfleet remove hello --device gate-7-1f2e3d4c --keep-data"
)
@click.argument("instance")
@click.option("--group", default="", shell_complete=complete.groups, help="Of this group")
@click.option("--device", default="", shell_complete=complete.devices, help="Of this board")
@click.option("--keep-data", is_flag=True, help="Leave the instance's own data on the boards")
@click.option("--waves", default="100%", show_default=True, help="Boards of each wave, from the first on")
@click.option("--detach", is_flag=True, help="Return at once instead of following")
def remove(
    options: Options,
    *,
    instance: str,
    group: str,
    device: str,
    keep_data: bool,
    waves: str,
    detach: bool,
) -> Exit:
    """Take INSTANCE off a group or a board."""
    if bool(group) == bool(device):
        raise click.UsageError("Name either --group or --device.")
    request = api.RemovalRequest(instance=instance, group=group, device=device, keep_data=keep_data, waves=waves)
    with connect(options) as client:
        return finish(client, client.remove(request), options, detach=detach)

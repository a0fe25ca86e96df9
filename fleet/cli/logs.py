"""`fleet logs`: an instance's log lines from a board, as the board's owner allows, while somebody looks."""

import json
import time
from typing import Final

import click

from fleet.cli import complete
from fleet.cli.base import Exit, Fault, Options, command
from fleet.cli.home import connect
from fleet.client import Client
from fleet.protocol import api, caps
from fleet.protocol.assignment import FollowLogs
from fleet.protocol.logs import LogView

ANSWER_S: Final = 30
LOOK_S: Final = 10


@command(
    "logs",
    examples="fleet logs hello --device gate-7-1f2e3d4c\n"
    "fleet logs hello --device gate-7-1f2e3d4c --follow --minutes 15",
)
@click.argument("instance")
@click.option("--device", required=True, shell_complete=complete.devices, metavar="ID", help="The board")
@click.option("--follow", is_flag=True, help="Go on, until --minutes are over or Ctrl-C")
@click.option(
    "--minutes",
    default=5,
    show_default=True,
    type=click.IntRange(1, caps.LOGS_MINUTES_MAX),
    help="How long the board sends at most",
)
def logs(options: Options, *, instance: str, device: str, follow: bool, minutes: int) -> Exit:
    """Show the last log lines of INSTANCE on a board, asked for by a signed command.

    The board's owner decides what may leave it ([policy] logs: off, errors or all; errors is the default). Values of
    secrets are replaced on the board. Who asked is in the audit log, what was sent in the board's own history.
    """
    with connect(options) as client:
        asked = client.command(
            device, api.CommandRequest(verb=FollowLogs(instance=instance, minutes=minutes if follow else 1))
        )
        return _show(options, client, device, asked.sequence, follow=follow)


def _show(options: Options, client: Client, device: str, sequence: int, *, follow: bool) -> Exit:
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

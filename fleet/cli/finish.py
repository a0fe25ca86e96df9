"""The end of every command that starts a rollout: follow it, or say how to."""

from fleet.cli import out
from fleet.cli.base import Exit, Options
from fleet.cli.follow import conclude, follow, title
from fleet.client import Client
from fleet.protocol.api import OPEN_STATES, RolloutView


def finish(client: Client, view: RolloutView, options: Options, *, detach: bool) -> Exit:
    """Follow a rollout that was just started, or say how to."""
    if not detach:
        return follow(client, view, options)
    if view.state not in OPEN_STATES:
        return conclude(view, options)
    if options.json:
        out.show_json(view)
    else:
        out.say(options, f"{title(view)}\nFollow it with 'fleet rollout {view.number} --follow'.")
    return Exit.OK

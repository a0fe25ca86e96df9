"""`fleet init`, `serve` and `completion`."""

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import get_completion_class

from fleet.cli import out
from fleet.cli.base import Exit, Fault, Options, command
from fleet.cli.home import home
from fleet.cli.team import hand_over, read_team, show_recovery
from fleet.cli.unlock import new_passphrase

if TYPE_CHECKING:
    from fleet.server.main import Ready
    from fleet.setup import Made

_SERVER_PARTS = "install them: pip install 'wasmfleet[server]'"


@command(
    "init",
    examples="fleet init --dev\n"
    "fleet init --solo --fleet acme --url https://fleet.example.com\n"
    "fleet init --team --root alice.pub --root bob.pub --root carol.pub --fleet acme\n"
    "fleet --home ./try init --dev",
)
@click.option("--dev", "size", flag_value="dev", help="For trying out: keys in the clear, refused by production boards")
@click.option("--solo", "size", flag_value="solo", help="One operator; the offline keys are encrypted")
@click.option("--team", "size", flag_value="team", help="As --solo, and root passes to several people (--root)")
@click.option(
    "--root",
    "people",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Public key of a person who holds root; three or more, with --team",
)
@click.option("--threshold", default=2, show_default=True, help="How many of them must sign, with --team")
@click.option("--fleet", default="fleet", show_default=True, help="Its name; boards refuse what is signed for another")
@click.option("--namespace", default="main", show_default=True, help="Namespace of the components published from here")
@click.option("--url", help="https://HOST[:PORT] under which boards reach this machine  [loopback]")
@click.option("--operators-port", type=click.IntRange(1, 65535), help="Of the API for operators  [8743]")
@click.option("--devices-port", type=click.IntRange(1, 65535), help="Of the API for boards  [8744]")
@click.option("--mqtt-port", type=click.IntRange(1, 65535), help="Of the broker  [8883]")
@click.option("--broker", default="auto", show_default=True, help="auto, mosquitto, embedded, or mqtts://HOST:PORT")
def init(
    options: Options,
    *,
    size: str | None,
    people: tuple[Path, ...],
    threshold: int,
    fleet: str,
    namespace: str,
    url: str | None,
    operators_port: int | None,
    devices_port: int | None,
    mqtt_port: int | None,
    broker: str,
) -> None:
    """Create a fleet on this machine: keys, repository, certificates and the admin's token.

    Nothing that exists is overwritten.
    """
    if size is None:
        raise click.UsageError("Choose --dev (for trying out), --solo or --team.")
    if (size == "team") != bool(people):
        raise click.UsageError(
            "--team and --root belong together: fleet init --team --root alice.pub --root bob.pub ..."
        )
    try:
        from fleet import setup  # noqa: PLC0415 - the server's parts may not be installed
    except ImportError as error:
        raise Fault("a fleet cannot be made here", f"{error.name} is not installed", _SERVER_PARTS) from None
    try:
        team = read_team(people, threshold) if size == "team" else None
        passphrase = None if size == "dev" else new_passphrase("the keys of root, targets and the publisher")
        made = setup.init(
            home(options),
            fleet=fleet,
            size="dev" if size == "dev" else "solo",
            url=url,
            namespace=namespace,
            operators_port=operators_port,
            devices_port=devices_port or setup.DEVICES_PORT,
            mqtt_port=mqtt_port or setup.MQTT_PORT,
            broker=broker,
            passphrase=passphrase,
        )
    except setup.SetupError as error:
        raise Fault(str(error)) from None
    event = None if team is None else hand_over(home(options), team, passphrase)
    _show_made(options, made, event)


def _show_made(options: Options, made: "Made", event: Path | None) -> None:
    if options.json:
        facts = {"home": str(made.home), "fleet": made.fleet, "size": made.size, "namespace": made.namespace}
        more = {"recovery": made.recovery, "event": None if event is None else str(event)}
        out.show_json({**facts, "url": made.url, "warnings": list(made.warnings), **more})
        return
    out.say(options, f"Made the fleet {made.fleet} in {made.home}.")
    for warning in made.warnings:
        click.echo(click.style("note: ", fg="yellow", bold=True) + warning, err=True)
    if made.recovery:
        show_recovery(made.recovery)
    if event is not None:
        click.echo(
            f"Root passes to the team when enough of them have signed: mail {event} to them,\n"
            f"'fleet sign approve {event.name}', then, with the server running, 'fleet sign publish {event.name}'."
        )
    out.say(
        options,
        "Next:\n"
        "  fleet serve                              run its server\n"
        "  fleet enroll-token --group edge-eu --quiet | ssh BOARD sudo fleet-agent enroll",
    )


@command("serve", json=False, examples="fleet serve\nfleet --home /srv/fleet serve --broker mosquitto")
@click.option("--broker", metavar="WHICH", help="In place of the configured one: auto, mosquitto, embedded, mqtts://…")
@click.option("--verbose", "-v", is_flag=True, help="Log more")
def serve(options: Options, *, broker: str | None, verbose: bool) -> None:
    """Run the fleet's server until it is told to stop: API, artifacts, rollouts, ingest and the broker.

    Where it listens stands in server/server.toml under the fleet's directory.
    """
    try:
        from fleet.server import main  # noqa: PLC0415 - the server's parts may not be installed
    except ImportError as error:
        raise Fault("the server cannot run here", f"{error.name} is not installed", _SERVER_PARTS) from None
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO if verbose else logging.WARNING
    )

    def ready(up: "Ready") -> None:
        out.say(
            options,
            f"The fleet {up.fleet} is up; Ctrl-C stops the server, boards go on.\n"
            f"  operators  {up.operators_url}\n"
            f"  boards     {', '.join([up.devices_url, *up.mqtt])}\n"
            f"  broker     {up.broker}",
        )

    try:
        asyncio.run(main.run(home(options), broker=broker, on_ready=ready))
    except main.ServeError as error:
        raise Fault(str(error), code=Exit.FAILED) from None


@command("completion", json=False, examples='eval "$(fleet completion bash)"\nfleet completion fish | source')
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(_options: Options, *, shell: str) -> None:
    """Print the completion script for SHELL; put it into the shell's start-up file."""
    from fleet.cli.main import main  # noqa: PLC0415 - it names this module

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "fleet", "_FLEET_COMPLETE").source())

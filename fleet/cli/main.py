"""`fleet`, the operator's command: the table of its commands, and `demo` and `completion`.

The table holds only names and one-line helps; a command's module is imported when the command is called.
"""

import importlib.util
import os
from pathlib import Path
from typing import Final

import click

from fleet.cli.base import (
    DEBUG,
    HOME,
    JSON,
    QUIET,
    Entry,
    Exit,
    Fault,
    LazyGroup,
    Options,
    Sections,
    check_choice,
    command,
)

SECTIONS: Final[Sections] = {
    "A fleet": {
        "init": Entry("fleet.cli.server:init", "Create a fleet: keys, repository, certificates, admin token"),
        "serve": Entry("fleet.cli.server:serve", "Run the server: API, artifacts, rollouts, broker"),
        "operators": Entry("fleet.cli.operators:operators", "Manage who may use the server, and in which role"),
        "server": Entry("fleet.cli.server:server", "Back up a server, make its keys, rebuild it"),
        "status": Entry("fleet.cli.device:status", "Show the state of the fleet"),
        "demo": Entry("fleet.cli.main:demo", "Play the whole main job on this machine, with three devices"),
    },
    "Components": {
        "push": Entry("fleet.cli.push:push", "Publish a component and deploy it to a group, in one go"),
        "publish": Entry("fleet.cli.push:publish", "Sign a component and upload it"),
        "deploy": Entry("fleet.cli.push:deploy", "Offer a published component to a group or a device"),
        "withdraw": Entry("fleet.cli.publish:withdraw", "Revoke a published release for good"),
        "data": Entry("fleet.cli.data:data", "Publish data packages, which components read, and deploy them"),
        "components": Entry("fleet.cli.component:components", "List what is published, and how many devices run it"),
        "sbom": Entry("fleet.cli.evidence:boms", "Show what a published component contains, and who built it"),
        "component": Entry("fleet.cli.develop:component", "Make, build, run, test or inspect a component here"),
    },
    "Rollouts": {
        "rollouts": Entry("fleet.cli.rollout:rollouts", "List the rollouts, newest first"),
        "rollout": Entry("fleet.cli.rollout:rollout", "Show, follow, steer or simulate a rollout"),
        "freeze": Entry("fleet.cli.rollout:freeze", "Pause every rollout and refuse new ones"),
        "unfreeze": Entry("fleet.cli.rollout:unfreeze", "End a freeze"),
        "bundle": Entry("fleet.cli.bundle:bundles", "Carry updates to devices that no network reaches"),
        "undo": Entry("fleet.cli.rollout:undo", "Offer the previous state again"),
        "remove": Entry("fleet.cli.rollout:remove", "Remove an instance from a group or a device"),
    },
    "Devices": {
        "devices": Entry("fleet.cli.device:devices", "List the devices"),
        "device": Entry("fleet.cli.device:device", "Show one device: what it runs, and why; set keys of its own"),
        "groups": Entry("fleet.cli.device:groups", "List the groups"),
        "group": Entry("fleet.cli.group:group", "Create a group, change its members, set its plan"),
        "why": Entry("fleet.cli.device:why", "Show what happened to a device, and what to do about it"),
        "enroll-token": Entry("fleet.cli.device:enroll_token", "Create a one-time token with which a device joins"),
        "image": Entry("fleet.cli.bundle:image", "Prepare a card's image, so that its device joins by itself"),
        "pin": Entry("fleet.cli.device:pin", "Give one device a version of its own"),
        "unpin": Entry("fleet.cli.device:unpin", "Let a device follow its groups again"),
        "retry": Entry("fleet.cli.device:retry", "Retry a failed instance"),
        "logs": Entry("fleet.cli.device:logs", "Show an instance's log from a device, as its owner allows"),
        "messages": Entry("fleet.cli.messages:messages", "Show what components publish, as their devices bring it"),
        "consumers": Entry(
            "fleet.cli.consumers:consumers", "Let systems of yours read components' messages from the broker"
        ),
        "restart": Entry("fleet.cli.device:restart", "Restart an instance on a device"),
        "label": Entry("fleet.cli.device:label", "Set or remove labels of a device"),
        "revoke": Entry("fleet.cli.device:revoke", "Remove a device from the fleet"),
    },
    "Trust": {
        "secret": Entry("fleet.cli.secret:secrets", "Give components secrets that only their devices can read"),
        "keys": Entry("fleet.cli.keys:keys", "Create, list, rotate and revoke signing keys"),
        "publisher": Entry("fleet.cli.server:publisher", "Sign snapshot and timestamp on a signing host"),
        "ca": Entry("fleet.cli.ca:authority", "Manage the CA by which devices and servers know each other"),
        "affected": Entry("fleet.cli.affected:affected", "List the devices that run a package"),
        "audit": Entry("fleet.cli.audit:audits", "Prove what devices ran, without trusting the server"),
        "sign": Entry("fleet.cli.sign:sign", "Sign changes of trust together; show and renew what expires"),
    },
    "Shell": {
        "completion": Entry("fleet.cli.main:completion", "Print a completion script for bash, zsh or fish"),
    },
}

EXAMPLES: Final = """
fleet init --dev                                a fleet on this machine
fleet serve                                     its server
fleet enroll-token --group edge-eu              a token for one device
fleet push component.wasm --group edge-eu       sign, upload, roll out, follow
fleet undo                                      and back again
"""


def _version(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:  # noqa: FBT001 - click calls it
    """Print the installed version."""
    if wanted and not ctx.resilient_parsing:
        from importlib import metadata  # noqa: PLC0415 - keeps the start fast

        try:
            click.echo(f"fleet {metadata.version('wasmfleet')}")
        except metadata.PackageNotFoundError:
            click.echo("fleet (a source tree, not installed)")
        ctx.exit()


class Fleet(LazyGroup):
    """Outermost group: the common options hold for every command."""

    def invoke(self, ctx: click.Context) -> object:
        """Store the common options for commands."""
        home = ctx.params.pop("home") or (Path(value) if (value := os.environ.get("WASMFLEET_HOME")) else None)
        ctx.obj = Options(
            home=home, json=ctx.params.pop("json"), quiet=ctx.params.pop("quiet"), debug=ctx.params.pop("debug")
        )
        return super().invoke(ctx)


@click.group(
    cls=Fleet,
    sections=SECTIONS,
    examples=EXAMPLES,
    params=[HOME, JSON, QUIET, DEBUG],
    context_settings={"max_content_width": 100},
)
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Print the version")
def main() -> None:
    """Push signed WebAssembly components to fleets of ARM and RISC-V boards.

    Every command has --help with examples. Listings print JSON for programs with --json.
    """


_PARTS: Final = {"wasmtime": "agent", "paho": "agent", "uvicorn": "server", "starlette": "server"}


@command("demo", json=False, examples="fleet demo\nfleet demo --once\nfleet demo --directory ./try")
@click.option("--once", is_flag=True, help="End after the last act; exit with 1 unless everything held")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep everything in this directory  [a temporary one]",
)
@click.option(
    "--broker",
    metavar="WHICH",
    default="auto",
    show_default=True,
    help="Broker: auto (mosquitto if installed, else embedded), mosquitto or embedded",
)
def demo(_options: Options, *, once: bool, directory: Path | None, broker: str) -> int:
    """Play the whole main job on this machine, as an ordinary user.

    Create a development fleet, start its server and three devices as real processes, push v1, push v2 while clients
    send requests without a pause, push a v3 that traps and is rolled back, and return the group to v1 with 'fleet
    undo'. The fleet then stays up until Ctrl-C, and no process is left behind.
    """
    check_choice(broker, ("auto", "mosquitto", "embedded"), "broker")
    missing = [name for name in _PARTS if importlib.util.find_spec(name) is None]
    if missing:
        raise Fault("cannot play the demo", f"{missing[0]} is not installed", "run pip install 'wasmfleet[all]'")
    if directory is not None and directory.exists() and any(directory.iterdir()):
        raise Fault(f"cannot play the demo in {directory}", "the directory is not empty", "name another --directory")
    from fleet.demo.run import run  # noqa: PLC0415 - not for --help

    return Exit(code) if (code := run(directory=directory, once=once, broker=broker)) in set(Exit) else code


@command("completion", json=False, examples='eval "$(fleet completion bash)"\nfleet completion fish | source')
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(_options: Options, *, shell: str) -> None:
    """Print the completion script for SHELL, for the shell's start-up file."""
    from click.shell_completion import get_completion_class  # noqa: PLC0415 - not for --help

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "fleet", "_FLEET_COMPLETE").source())


if __name__ == "__main__":
    main()

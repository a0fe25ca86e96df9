"""Command table; demo.

`fleet`: the operator's command.

Only the names and one-line helps of the verbs stand here; each is imported when it is called.

`fleet demo`.
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
        "operators": Entry("fleet.cli.operators:operators", "Who may come in to the server, and as what"),
        "server": Entry("fleet.cli.server:server", "A server's backup and keys, and a server made anew"),
        "status": Entry("fleet.cli.device:status", "The fleet at a glance"),
        "demo": Entry("fleet.cli.main:demo", "The whole main job on this machine, with three boards"),
    },
    "Components": {
        "push": Entry("fleet.cli.push:push", "Publish a component and deploy it to a group, in one go"),
        "publish": Entry("fleet.cli.push:publish", "Sign a component and upload it"),
        "deploy": Entry("fleet.cli.push:deploy", "Offer a published component to a group or a board"),
        "withdraw": Entry("fleet.cli.publish:withdraw", "Revoke a published release for good"),
        "sbom": Entry("fleet.cli.evidence:boms", "See what is in a published component, and who built it"),
        "component": Entry("fleet.cli.component:component", "Look into a component file, or put it into its adapter"),
    },
    "Rollouts": {
        "rollouts": Entry("fleet.cli.rollout:rollouts", "List the rollouts, newest first"),
        "rollout": Entry("fleet.cli.rollout:rollout", "Show, follow, pause, resume or abort a rollout"),
        "bundle": Entry("fleet.cli.bundle:bundles", "Carry updates to boards that no network reaches"),
        "undo": Entry("fleet.cli.rollout:undo", "Offer the previous state again"),
        "remove": Entry("fleet.cli.rollout:remove", "Take an instance off a group or a board"),
    },
    "Boards": {
        "devices": Entry("fleet.cli.device:devices", "List the boards"),
        "device": Entry("fleet.cli.device:device", "One board: what it runs, and why"),
        "groups": Entry("fleet.cli.device:groups", "List the groups"),
        "group": Entry("fleet.cli.device:group", "Make a group, or change who belongs to it"),
        "why": Entry("fleet.cli.device:why", "What happened to a board, and what to do about it"),
        "enroll-token": Entry("fleet.cli.device:enroll_token", "Make a one-time token with which a board joins"),
        "image": Entry("fleet.cli.bundle:image", "Make a card's image ready: its board joins by itself"),
        "pin": Entry("fleet.cli.device:pin", "Give one board a version of its own"),
        "unpin": Entry("fleet.cli.device:unpin", "Let a board follow its groups again"),
        "retry": Entry("fleet.cli.device:retry", "Have a failed instance tried again"),
        "logs": Entry("fleet.cli.device:logs", "An instance's log from a board, as its owner allows"),
        "restart": Entry("fleet.cli.device:restart", "Restart an instance on a board"),
        "label": Entry("fleet.cli.device:label", "Set or remove labels of a board"),
        "revoke": Entry("fleet.cli.device:revoke", "Shut a board out of the fleet"),
    },
    "Trust": {
        "secret": Entry("fleet.cli.secret:secrets", "Give components secrets that only their boards can read"),
        "keys": Entry("fleet.cli.keys:keys", "Make, list, rotate and revoke signing keys"),
        "publisher": Entry("fleet.cli.server:publisher", "Sign snapshot and timestamp on another host"),
        "ca": Entry("fleet.cli.ca:authority", "The CA by which boards and servers know each other"),
        "affected": Entry("fleet.cli.affected:affected", "List the boards that run a package"),
        "audit": Entry("fleet.cli.audit:audits", "Prove what boards ran, without believing the server"),
        "sign": Entry("fleet.cli.sign:sign", "Sign together what changes trust; see and renew what expires"),
    },
    "Shell": {
        "completion": Entry("fleet.cli.main:completion", "Print a completion script for bash, zsh or fish"),
    },
}

EXAMPLES: Final = """
fleet init --dev                                a fleet on this machine
fleet serve                                     its server
fleet enroll-token --group edge-eu              a token for one board
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
    """The outermost group: the common options hold for whatever command follows."""

    def invoke(self, ctx: click.Context) -> object:
        """Put the common options where commands find them."""
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

    Every command knows --help, with examples. A listing with --json prints what programs want.
    """


_PARTS: Final = {"wasmtime": "agent", "paho": "agent", "uvicorn": "server", "starlette": "server"}


@command("demo", json=False, examples="fleet demo\nfleet demo --once\nfleet demo --directory ./try")
@click.option("--once", is_flag=True, help="End after the last act; the exit code says whether all of it held")
@click.option("--directory", type=click.Path(path_type=Path, file_okay=False), help="For all it makes  [temporary]")
@click.option("--broker", default="auto", show_default=True, help="auto (Mosquitto where there is one) or embedded")
def demo(_options: Options, *, once: bool, directory: Path | None, broker: str) -> int:
    """The whole main job on this machine, as an ordinary user.

    Makes a development fleet, starts its server and three boards as real processes, pushes v1, pushes v2 while clients
    send requests without a pause, pushes a v3 that traps and is rolled back, and takes the group back with 'fleet
    undo'. Then it stays up until Ctrl-C. It leaves no process behind.
    """
    check_choice(broker, ("auto", "mosquitto", "embedded"), "broker")
    missing = [name for name in _PARTS if importlib.util.find_spec(name) is None]
    if missing:
        raise Fault("the demo needs every part", f"{missing[0]} is not installed", "pip install 'wasmfleet[all]'")
    if directory is not None and directory.exists() and any(directory.iterdir()):
        raise Fault(f"{directory} is not empty", "the demo makes everything anew", "name another --directory")
    from fleet.demo.run import run  # noqa: PLC0415 - not for --help

    return Exit(code) if (code := run(directory=directory, once=once, broker=broker)) in set(Exit) else code


@command("completion", json=False, examples='eval "$(fleet completion bash)"\nfleet completion fish | source')
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(_options: Options, *, shell: str) -> None:
    """Print the completion script for SHELL; put it into the shell's start-up file."""
    from click.shell_completion import get_completion_class  # noqa: PLC0415 - not for --help

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "fleet", "_FLEET_COMPLETE").source())


if __name__ == "__main__":
    main()

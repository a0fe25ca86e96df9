"""`fleet`: the operator's command.

Only the names and one-line helps of the verbs stand here; each is imported when it is called.
"""

import os
from pathlib import Path
from typing import Final

import click

from fleet.cli.base import DEBUG, HOME, JSON, QUIET, Entry, LazyGroup, Options, Sections

SECTIONS: Final[Sections] = {
    "A fleet": {
        "init": Entry("fleet.cli.setup:init", "Create a fleet: keys, repository, certificates, admin token"),
        "serve": Entry("fleet.cli.setup:serve", "Run the server: API, artifacts, rollouts, broker"),
        "operators": Entry("fleet.cli.operators:operators", "Who may come in to the server, and as what"),
        "server": Entry("fleet.cli.server:server", "A server's backup and keys, and a server made anew"),
        "status": Entry("fleet.cli.listings:status", "The fleet at a glance"),
        "demo": Entry("fleet.cli.demo:demo", "The whole main job on this machine, with three boards"),
    },
    "Components": {
        "push": Entry("fleet.cli.push:push", "Publish a component and deploy it to a group, in one go"),
        "publish": Entry("fleet.cli.push:publish", "Sign a component and upload it"),
        "deploy": Entry("fleet.cli.push:deploy", "Offer a published component to a group or a board"),
        "withdraw": Entry("fleet.cli.withdraw:withdraw", "Revoke a published release for good"),
        "sbom": Entry("fleet.cli.sbom:boms", "See what is in a published component, and who built it"),
        "component": Entry("fleet.cli.component:component", "Look into a component file, or put it into its adapter"),
    },
    "Rollouts": {
        "rollouts": Entry("fleet.cli.rollouts:rollouts", "List the rollouts, newest first"),
        "rollout": Entry("fleet.cli.rollouts:rollout", "Show, follow, pause, resume or abort a rollout"),
        "bundle": Entry("fleet.cli.bundle:bundles", "Carry updates to boards that no network reaches"),
        "undo": Entry("fleet.cli.rollouts:undo", "Offer the previous state again"),
        "remove": Entry("fleet.cli.rollouts:remove", "Take an instance off a group or a board"),
    },
    "Boards": {
        "devices": Entry("fleet.cli.listings:devices", "List the boards"),
        "device": Entry("fleet.cli.boards:device", "One board: what it runs, and why"),
        "groups": Entry("fleet.cli.listings:groups", "List the groups"),
        "group": Entry("fleet.cli.boards:group", "Make a group, or change who belongs to it"),
        "why": Entry("fleet.cli.boards:why", "What happened to a board, and what to do about it"),
        "enroll-token": Entry("fleet.cli.boards:enroll_token", "Make a one-time token with which a board joins"),
        "image": Entry("fleet.cli.image:image", "Make a card's image ready: its board joins by itself"),
        "pin": Entry("fleet.cli.boards:pin", "Give one board a version of its own"),
        "unpin": Entry("fleet.cli.boards:unpin", "Let a board follow its groups again"),
        "retry": Entry("fleet.cli.boards:retry", "Have a failed instance tried again"),
        "logs": Entry("fleet.cli.logs:logs", "An instance's log from a board, as its owner allows"),
        "restart": Entry("fleet.cli.boards:restart", "Restart an instance on a board"),
        "label": Entry("fleet.cli.boards:label", "Set or remove labels of a board"),
        "revoke": Entry("fleet.cli.boards:revoke", "Shut a board out of the fleet"),
    },
    "Trust": {
        "secret": Entry("fleet.cli.secret:secrets", "Give components secrets that only their boards can read"),
        "keys": Entry("fleet.cli.keys:keys", "Make, list, rotate and revoke signing keys"),
        "publisher": Entry("fleet.cli.publisher:publisher", "Sign snapshot and timestamp on another host"),
        "ca": Entry("fleet.cli.authority:authority", "The CA by which boards and servers know each other"),
        "affected": Entry("fleet.cli.affected:affected", "List the boards that run a package"),
        "audit": Entry("fleet.cli.audit:audits", "Prove what boards ran, without believing the server"),
        "sign": Entry("fleet.cli.sign:sign", "Sign together what changes trust; see and renew what expires"),
    },
    "Shell": {
        "completion": Entry("fleet.cli.setup:completion", "Print a completion script for bash, zsh or fish"),
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


if __name__ == "__main__":
    main()

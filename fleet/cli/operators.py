"""`fleet operators`: people who may use the server, and their roles. Tokens are shown once: the server keeps hashes."""

import os
from collections.abc import Iterable
from pathlib import Path

import click

from fleet.cli import base, output
from fleet.cli.base import Exit, Fault, Group, Options, command, reason
from fleet.cli.operator import TOKEN_VARIABLE, load_operator
from fleet.client import Client, ProblemError
from fleet.protocol import files
from fleet.protocol.trust_api import OperatorReply, Role

_ROLE = click.option(
    "--role",
    type=click.Choice([str(each) for each in Role]),
    help="scraper reads metrics alone, viewer everything, operator also changes what devices run, admin also manages "
    "operators  [operator, or as before]",
)
_SAVE = click.option(
    "--save",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the token into this new file (0600) instead of printing it",
)


@click.group("operators", cls=Group, short_help="Manage who may use the server, and in which role")
def operators() -> None:
    """Manage who may use the server, and in which role.

    A token gives access to the server's API and signs nothing: keys decide what devices run ('fleet keys').
    """


@command("list", examples="fleet operators list\nfleet operators list --json")
@base.table_options
def list_(options: Options) -> None:
    """List the operators with their roles."""
    with load_operator(options).client() as client:
        found = client.operators()
    if options.json:
        output.show_json(found)
    else:
        rows = [(each.name, str(each.role), f"{each.created_at:%Y-%m-%d}") for each in found.operators]
        output.table(("OPERATOR", "ROLE", "SINCE"), rows, empty="nobody")


@command(
    "add",
    examples="fleet operators add bob\nfleet operators add board-room --role viewer --save room.token\n"
    "fleet operators add prometheus --role scraper --save scraper.token",
)
@click.argument("name")
@_ROLE
@_SAVE
def add(options: Options, *, name: str, role: str | None, save: Path | None) -> None:
    """Add an operator NAME and show the new token once."""
    _check_free(save)
    with load_operator(options).client() as client:
        if any(each.name == name for each in client.operators().operators):
            raise Fault(
                f"{name} is an operator already", action=f"replace the token with 'fleet operators rotate {name}'"
            )
        _hand_over(options, client.set_operator(name, Role(role or Role.OPERATOR)), save)


@command("rotate", examples="fleet operators rotate bob\nfleet operators rotate admin    (this machine's own token)")
@click.argument("name")
@_ROLE
@_SAVE
def rotate(options: Options, *, name: str, role: str | None, save: Path | None) -> None:
    """Replace the token of NAME and, with --role, the role.

    A new token for this machine goes to operator/token, unless --save names another file.
    """
    _check_free(save)
    who = load_operator(options)
    with who.client() as client:
        known = {each.name: each.role for each in client.operators().operators}
        _check_known(name, known)
        reply = client.set_operator(name, Role(role) if role else known[name])
        own = who.directory / "token"
        if save is None and _was_mine(client) and not os.environ.get(TOKEN_VARIABLE):
            _write(own, reply.token, replace=True)
            _say(options, reply, f"{name} has a new token, in {own}.", token=False)
            return
    _hand_over(options, reply, save)


@command("revoke", examples="fleet operators revoke bob")
@click.argument("name")
def revoke(options: Options, *, name: str) -> None:
    """Remove the operator NAME."""
    with load_operator(options).client() as client:
        known = [each.name for each in client.operators().operators]
        _check_known(name, known)
        left = client.remove_operator(name)
    output.result(options, left, f"{name} is removed; the token is refused from now on.")


def _was_mine(client: Client) -> bool:
    """Tell whether the replaced token was this machine's own: the server now refuses it."""
    try:
        client.status()
    except ProblemError as error:
        return error.problem.type == "unauthorised"
    return False


def _hand_over(options: Options, reply: OperatorReply, save: Path | None) -> None:
    if save is None:
        _say(options, reply, "", token=True)
        return
    _write(save, reply.token)
    _say(
        options, reply, f"The token of {reply.name} ({reply.role}) is in {save}; nobody else may read it.", token=False
    )


def _say(options: Options, reply: OperatorReply, words: str, *, token: bool) -> None:
    if options.json:
        facts: dict[str, object] = {"name": reply.name, "role": reply.role.value}
        output.show_json(facts | ({"token": reply.token} if token else {}))
    elif token:
        output.say(options, f"{reply.name} has the role {reply.role}. Put this token into operator/token (mode 0600)")
        output.say(options, f"or in {TOKEN_VARIABLE}. It is not shown again:\n")
        click.echo(reply.token)
    else:
        output.say(options, words)


def _check_known(name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise Fault(f"there is no operator {name!r}", f"there are {', '.join(known) or 'none'}", code=Exit.REFUSED)


def _check_free(path: Path | None) -> None:
    if path is not None and path.exists():
        raise Fault(f"{path} exists", "a token is never overwritten", "choose another --save")


def _write(path: Path, token: str, *, replace: bool = False) -> None:
    write = files.atomic_write if replace else files.create_exclusive
    try:
        write(path, token + "\n", mode=0o600)
    except OSError as error:
        raise Fault(f"cannot write {path}", reason(error), "rotate the token again") from None


for each in (list_, add, rotate, revoke):
    operators.add_command(each)

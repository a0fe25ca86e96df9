"""`fleet ca`: the CA by which boards and servers know each other. Its root is with the operator, offline."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

from fleet import ca
from fleet.ca import CaError, Root, read_pair
from fleet.cli import output
from fleet.cli.base import SIGN_YES, Exit, Fault, Options, command
from fleet.cli.operator import Operator, home, load_operator
from fleet.cli.unlock import ask, new_passphrase
from fleet.client import Client, ProblemError
from fleet.protocol.trust_api import CaView, Issuer, IssuingRequest


@click.group("ca", short_help="The CA by which boards and servers know each other")
def authority() -> None:
    """The CA by which boards and servers know each other.

    Boards pin its root, whose key lies encrypted with the operator. The server issues with an issuing CA below it, for
    90 days at the most; another one needs no board enrolled again.
    """


@command("status", examples="fleet ca status\nfleet ca status --json")
def status(options: Options) -> Exit:
    """Show the issuing CAs whose certificates are accepted; exit with 1 when the one in use ends within 30 days."""
    with load_operator(options).client(late=True) as client:
        view = client.ca()
    if options.json:
        output.show_json(view)
    elif view.root_on_server:
        output.say(
            options, "A development fleet: the root of its CA lies on the server, in the clear, and issues by itself."
        )
    else:
        rows = [
            (each.serial, f"{each.ends:%Y-%m-%d}", "in use" if each.current else "accepted") for each in view.issuers
        ]
        output.table(("ISSUING CA", "ENDS", ""), rows, empty="none")
    late = due(view, within=ca.WARN)
    if late is None:
        return Exit.OK
    click.echo(f"the issuing CA ends on {late.ends:%Y-%m-%d}: fleet ca renew", err=True)
    return Exit.FAILED


@command("renew", examples="fleet ca renew")
@click.option("--days", default=ca.LIFE.days, show_default=True, type=click.IntRange(1, ca.LIFE.days))
@SIGN_YES
def renew(options: Options, *, days: int, yes: bool) -> None:
    """Sign the server's next issuing CA with the root's key of this machine, and put it in place.

    The server makes the key and keeps it. Boards notice nothing; the issuing CA before stays accepted until it ends.
    """
    who = load_operator(options)
    with who.client(late=True) as client:
        view = client.ca()
        if view.root_on_server:
            raise Fault(
                "the root of this CA lies on its server", "there is no issuing CA", "fleet ca offline makes one"
            )
        _install(client, view, open_root(who), options, life=timedelta(days=days), yes=yes)


@command("revoke", examples="fleet ca revoke 4f1c...    (fleet ca status shows them)")
@click.argument("serial")
def revoke(options: Options, *, serial: str) -> None:
    """Accept no certificate more that the issuing CA SERIAL made: it was stolen.

    Boards that have one renew it by themselves, with the key that is enrolled; whoever else has one is shut out.
    """
    with load_operator(options).client(late=True) as client:
        client.revoke_issuer(serial)
    output.say(options, f"Certificates of {serial} count for nothing; boards renew theirs by themselves.")


@command("offline", examples="fleet ca offline", json=False)
@SIGN_YES
def offline(options: Options, *, yes: bool) -> None:
    """Take the root's key off the server of this home, encrypt it here, and give the server an issuing CA.

    For a fleet that began as a development fleet. Its root lay in the clear: whoever copied it before has the CA.
    """
    who = load_operator(options)
    directory = home(options) / "server" / "ca"
    if not (directory / "ca.key").exists():
        raise Fault("no root of a CA lies on a server here", f"{directory / 'ca.key'} does not exist")
    if root_key(who).exists():
        raise Fault(f"{root_key(who)} exists", "a key is never overwritten", "the root of another CA? move it away")
    try:
        root = Root(*read_pair(directory / "ca.pem", directory / "ca.key"))
        with who.client() as client:
            view, now = client.ca(), datetime.now(UTC)
            ca.sign(root, view.request, now=now)  # says now if this root allows none below it
            ca.store(root_key(who), root.key, new_passphrase("the root of the CA"))
            # What the root itself has issued ends within the life of a certificate.
            ca.accept(directory, root.certificate, root.key, until=now + ca.LIFE, now=now)
            _install(client, view, root, options, life=ca.LIFE, yes=yes)
    except CaError as error:
        raise Fault(str(error), code=Exit.REFUSED) from None
    except BaseException:
        root_key(who).unlink(missing_ok=True)
        raise
    (directory / "ca.key").unlink()
    output.say(options, f"The root's key lies encrypted in {root_key(who)} now, and no more on the server.")


def root_key(who: Operator) -> Path:
    """Where the root's key lies, encrypted."""
    return who.directory / "ca.key"


def open_root(who: Operator) -> Root:
    """The root of the CA; raises `Fault` where it is not here, or the passphrase is wrong."""
    path = root_key(who)
    try:
        return ca.open_root(path, who.ca, ask(str(path)) if path.exists() else b"")
    except CaError as error:
        raise Fault(str(error)) from None


def due(view: CaView, *, within: timedelta) -> Issuer | None:
    """The issuing CA in use, where it ends within a time."""
    current = next((each for each in view.issuers if each.current), None)
    if view.root_on_server or current is None or current.ends - datetime.now(UTC) > within:
        return None
    return current


def known(client: Client) -> CaView | None:
    """The CA as the server has it; None of a server that does not say."""
    try:
        return client.ca()
    except ProblemError:
        return None


def _install(client: Client, view: CaView, root: Root, options: Options, *, life: timedelta, yes: bool) -> None:
    try:
        names = ", ".join(ca.asked(view.request))
        click.echo(f"an issuing CA for {life.days} days, which may name servers {names} and boards", err=True)
        if not yes and not click.confirm("Sign it with the root of the CA?", err=True):
            raise click.Abort
        made = ca.sign(root, view.request, now=datetime.now(UTC), life=life)
    except CaError as error:
        raise Fault(str(error), code=Exit.REFUSED) from None
    after = client.install_issuing(IssuingRequest(issuing_pem=made))
    if options.json:
        output.show_json(after)
    else:
        output.say(options, f"The server issues with it now, until {after.issuers[0].ends:%Y-%m-%d}.")


for each in (status, renew, revoke, offline):
    authority.add_command(each)

"""`fleet ca`: the CA by which devices and servers know each other. The operator keeps its root offline."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

from fleet import ca
from fleet.ca import CaError, Root, read_pair
from fleet.cli import base, output
from fleet.cli.base import SIGN_YES, Exit, Fault, Group, Options, command, confirm
from fleet.cli.operator import Operator, home, load_operator
from fleet.cli.unlock import ask, new_passphrase
from fleet.client import Client, ProblemError
from fleet.protocol.trust_api import CaView, Issuer, IssuingRequest


@click.group("ca", cls=Group, short_help="Manage the CA by which devices and servers know each other")
def authority() -> None:
    """Manage the CA by which devices and servers know each other.

    Devices pin its root, whose key the operator keeps encrypted. The server issues certificates with an issuing CA
    below it, valid for at most 90 days; replacing the issuing CA needs no device enrolled again.
    """


@command("status", examples="fleet ca status\nfleet ca status --json")
@base.table_options
def status(options: Options) -> Exit:
    """Show the issuing CAs whose certificates are accepted; exit with 1 when the one in use ends within 30 days."""
    with load_operator(options).client(late=True) as client:
        view = client.ca()
    if options.json:
        output.show_json(view)
    elif view.root_on_server:
        output.say(
            options,
            "A development fleet: the root key of its CA is unencrypted on the server and signs certificates itself.",
        )
    else:
        rows = [
            (each.serial, f"{each.ends:%Y-%m-%d}", "in use" if each.current else "accepted") for each in view.issuers
        ]
        output.table(("ISSUING CA", "ENDS", "STATE"), rows, empty="none")
    late = due(view, within=ca.WARN)
    if late is None:
        return Exit.OK
    click.echo(f"the issuing CA ends on {late.ends:%Y-%m-%d}: fleet ca renew", err=True)
    return Exit.FAILED


@command("renew", examples="fleet ca renew")
@click.option(
    "--days",
    metavar="DAYS",
    default=ca.LIFE.days,
    show_default=True,
    type=click.IntRange(1, ca.LIFE.days),
    help="Days until it ends",
)
@SIGN_YES
def renew(options: Options, *, days: int, yes: bool) -> None:
    """Sign the server's next issuing CA with the root's key of this machine, and put it in place.

    The server makes the key and keeps it. Devices notice nothing; the issuing CA before stays accepted until it ends.
    """
    who = load_operator(options)
    with who.client(late=True) as client:
        view = client.ca()
        if view.root_on_server:
            raise Fault(
                "the root of this CA is on its server", "there is no issuing CA", "make one with fleet ca offline"
            )
        _install(client, view, open_root(who), options, life=timedelta(days=days), yes=yes)


@command("revoke", examples="fleet ca revoke 4f1c...    (fleet ca status shows them)")
@click.argument("serial")
def revoke(options: Options, *, serial: str) -> None:
    """Stop accepting certificates that the issuing CA SERIAL signed, because its key was stolen.

    Devices with such a certificate renew it by themselves, with their enrolled key; anybody else with one is refused.
    """
    with load_operator(options).client(late=True) as client:
        left = client.revoke_issuer(serial)
    text = f"Certificates signed by {serial} are refused from now on; devices renew theirs by themselves."
    output.result(options, left, text)


@command("offline", examples="fleet ca offline", json=False)
@SIGN_YES
def offline(options: Options, *, yes: bool) -> None:
    """Take the root's key off the server of this home, encrypt it here, and give the server an issuing CA.

    For a fleet that began as a development fleet. Its root key was unencrypted: whoever copied it holds the CA.
    """
    who = load_operator(options)
    directory = home(options) / "server" / "ca"
    if not (directory / "ca.key").exists():
        raise Fault(
            "cannot take the root of the CA off the server",
            f"{directory / 'ca.key'} does not exist",
            "run this in the server's home",
        )
    if root_key(who).exists():
        raise Fault(
            f"{root_key(who)} exists", "a key is never overwritten", "move it away if it is the root of another CA"
        )
    try:
        root = Root(*read_pair(directory / "ca.pem", directory / "ca.key"))
        with who.client() as client:
            view, now = client.ca(), datetime.now(UTC)
            ca.sign(root, view.request, now=now)  # fails here, before any change, if this root allows no CA below it
            ca.store(root_key(who), root.key, new_passphrase("the root of the CA"))
            # Certificates issued by the root itself end within the life of a certificate.
            ca.accept(directory, root.certificate, root.key, until=now + ca.LIFE, now=now)
            _install(client, view, root, options, life=ca.LIFE, yes=yes)
    except CaError as error:
        raise Fault(str(error), code=Exit.REFUSED) from None
    except BaseException:
        root_key(who).unlink(missing_ok=True)
        raise
    (directory / "ca.key").unlink()
    output.say(options, f"The root key is now encrypted in {root_key(who)}, and no longer on the server.")


def root_key(who: Operator) -> Path:
    """Return the path of the root's encrypted key."""
    return who.directory / "ca.key"


def open_root(who: Operator) -> Root:
    """Open the root of the CA. Raises `Fault` when its key is missing or the passphrase is wrong."""
    path = root_key(who)
    try:
        return ca.open_root(path, who.ca, ask(str(path)) if path.exists() else b"")
    except CaError as error:
        raise Fault(str(error)) from None


def due(view: CaView, *, within: timedelta) -> Issuer | None:
    """Return the issuing CA in use if its certificate ends within a time, else None."""
    current = next((each for each in view.issuers if each.current), None)
    if view.root_on_server or current is None or current.ends - datetime.now(UTC) > within:
        return None
    return current


def view_or_none(client: Client) -> CaView | None:
    """Fetch the server's view of the CA; None from a server that has no such route."""
    try:
        return client.ca()
    except ProblemError:
        return None


def _install(client: Client, view: CaView, root: Root, options: Options, *, life: timedelta, yes: bool) -> None:
    try:
        names = ", ".join(ca.asked(view.request))
        click.echo(
            f"an issuing CA for {life.days} days, for certificates of the servers {names} and of devices", err=True
        )
        if not yes:
            confirm("Sign it with the root of the CA?")
        made = ca.sign(root, view.request, now=datetime.now(UTC), life=life)
    except CaError as error:
        raise Fault(str(error), code=Exit.REFUSED) from None
    after = client.install_issuing(IssuingRequest(issuing_pem=made))
    output.result(
        options, after, f"The server issues certificates with it now, until {after.issuers[0].ends:%Y-%m-%d}."
    )


for each in (status, renew, revoke, offline):
    authority.add_command(each)

"""`fleet withdraw`: take back a release that must not run any more, on whatever board."""

from datetime import UTC, datetime

import click

from fleet.cli import out
from fleet.cli.base import Exit, Fault, Options, command
from fleet.cli.home import Operator, operator
from fleet.cli.publishing import CONFLICTS_MAX, publisher
from fleet.cli.trust import Trust
from fleet.client import Client, ProblemError
from fleet.protocol.names import BadNameError, TargetName
from signing import repository
from signing.errors import RepositoryError

_CONFLICT = 409


@command("withdraw", examples="fleet withdraw hello@1.4.0\nfleet withdraw hello@1.4.0 --yes")
@click.argument("target", metavar="NAME@VERSION")
@click.option("--yes", is_flag=True, help="Do not ask")
def withdraw(options: Options, *, target: str, yes: bool) -> None:
    """Revoke a published release, with this namespace's key and for good.

    Every board that runs it stops it, nothing can deploy it again, and its version is never published again. To go
    back to another version first, deploy that.
    """
    who = operator(options)
    try:
        name = TargetName.parse(target, namespace=who.namespace)
    except BadNameError as error:
        raise Fault(str(error)) from None
    if name.namespace != who.namespace:
        raise Fault(f"{name} is not of the namespace {who.namespace}", "only its own publisher can take it back")
    with who.client() as client:
        trust = Trust(who, client)
        running = _running(client, name)
        boards = f"{len(running)} boards run it and stop it" if running else "no board runs it"
        if not yes and not click.confirm(f"Revoke {name} for good? By what boards report, {boards}.", err=True):
            raise click.Abort
        new = _revoke(who, client, trust, name)
    if options.json:
        out.show_json({"target": name.path, "revoked": True, "new": new, "running": running})
    else:
        out.say(options, f"{name} is revoked." if new else f"{name} was revoked before.")
        for board in running:
            out.say(options, f"  {board} stops it")


def _revoke(who: Operator, client: Client, trust: Trust, name: TargetName) -> bool:
    """Sign and publish the revocation; false when it was revoked before."""
    signer, ends = publisher(who, trust)
    for _ in range(CONFLICTS_MAX):
        role = trust.role
        if role is None:
            raise Fault(f"{name} is not published", "the namespace is empty", code=Exit.REFUSED)
        if not trust.is_revoked(name.path) and trust.release(name.path) is None:
            raise Fault(f"{name} is not published", "there is nothing to take back", code=Exit.REFUSED)
        try:
            new = repository.revoke(role, name=name, signer=signer, now=datetime.now(UTC), ends=ends)
        except RepositoryError as error:
            raise Fault(str(error), code=Exit.REFUSED) from None
        if new == role:
            return False
        shown = _published(client, who.namespace, new)
        trust.refresh()
        if shown and trust.release(name.path) is not None:
            raise Fault(f"the server took the revocation of {name} and does not show it", code=Exit.REFUSED)
        if shown:
            return True
    raise Fault(f"could not revoke {name}", "others published in between", "try again", code=Exit.FAILED)


def _published(client: Client, namespace: str, role: bytes) -> bool:
    """False when somebody else published in between."""
    try:
        client.publish_role(namespace, role)
    except ProblemError as error:
        if error.problem.status != _CONFLICT:
            raise
        return False
    return True


def _running(client: Client, name: TargetName) -> list[str]:
    return [row.id for row in client.devices().devices if any(each.target == name.path for each in row.instances)]

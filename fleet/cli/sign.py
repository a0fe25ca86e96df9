"""`fleet sign`: what several people sign together, and what expires unless somebody signs it anew."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import click

from fleet import issuing
from fleet.cli import authority, out
from fleet.cli.base import Exit, Fault, Options, command
from fleet.cli.ceremony import Ceremony, load, merged, save
from fleet.cli.home import operator
from fleet.cli.moving import move
from fleet.cli.trust import Cached
from fleet.cli.values import days
from fleet.client import Client, ProblemError
from fleet.protocol.online import OnlineView
from signing import bins, proposals, repository, rotation
from signing.errors import RepositoryError

DUE: Final = "60d"

_FILES = click.argument(
    "files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path, dir_okay=False)
)
_YES = click.option("--yes", is_flag=True, help="Do not ask before signing")


@click.group("sign")
def sign() -> None:
    """Look at signing events, sign them, publish them; see what expires.

    An event is a file that is mailed to those who must sign. It says what changes, and it is said in words, compared
    with what is published, before a signature is asked for.
    """


@command("status", examples="fleet sign status\nfleet sign status --fail-within 30d    for a cron job")
@click.option("--fail-within", metavar="DAYS", help="Exit with 1 when a role that people sign expires within this time")
def status(options: Options, *, fail_within: str | None) -> Exit:
    """Show every role: version, expiry, how many must sign, and who."""
    limit = days(fail_within) if fail_within else timedelta(0)
    who = operator(options)
    with who.client() as client:
        ceremony = Ceremony(options, who, client)
        view, signed = authority.known(client), known(client)
    now = datetime.now(UTC)
    rows = list(_rows(ceremony))
    issuer = None if view is None else authority.due(view, within=limit or issuing.WARN)
    for problem in () if signed is None else signed.problems:
        click.echo(f"note: {problem}", err=True)
    if issuer is not None:
        click.echo(f"the issuing CA ends on {issuer.ends:%Y-%m-%d}: fleet ca renew", err=True)
    late = [row for row in rows if row["expires"] - now < limit]
    if options.json:
        out.show_json({"roles": rows, "late": [row["role"] for row in late]})
    else:
        out.table(
            ("ROLE", "VERSION", "EXPIRES", "NEEDS", "KEYS"),
            [
                (
                    row["role"],
                    str(row["version"]),
                    _when(row["expires"], now),
                    f"{row['threshold']} of {len(row['keys'])}",
                    ", ".join(map(ceremony.ring.called, row["keys"])),
                )
                for row in rows
            ],
            empty="",
        )
    if not late:
        return Exit.FAILED if fail_within and issuer is not None else Exit.OK
    names = " ".join(row["role"] for row in late)
    click.echo(f"expires within {out.span(limit.total_seconds())}: {names}; fleet sign renew {names}", err=True)
    return Exit.FAILED


def known(client: Client) -> OnlineView | None:
    """Where snapshot and timestamp are signed; None of a server that does not say."""
    try:
        return client.online()
    except ProblemError:
        return None


def _rows(ceremony: Ceremony) -> Any:
    files = ceremony.files
    for role in ("root", "targets", *repository.namespaces(files)):
        try:
            version, data = repository.latest(files, role)
        except RepositoryError:
            continue  # a namespace whose publisher has not begun it
        keys = rotation.keys_of(files, role)
        yield {
            "role": role,
            "version": version,
            "expires": min(proposals.expiry(each) for each in (data, *_bins(files, role, data))),
            "threshold": keys.threshold,
            "keys": [key.keyid for key in keys.keys],
        }


def _bins(files: Mapping[str, bytes], namespace: str, data: bytes) -> Iterator[bytes]:
    """The hash bins under a namespace, if it has any."""
    if namespace in {"root", "targets"} or b'"bit_length"' not in data:
        return
    index = repository.newest(files)
    for name, version in index.items():
        if bins.is_bin(name) and bins.namespace_of(name) == namespace:
            yield files[f"{version}.{name}.json"]


def _when(expires: datetime, now: datetime) -> str:
    left = (expires - now).total_seconds()
    return f"{expires:%Y-%m-%d}, " + (f"in {out.span(left)}" if left > 0 else f"expired {out.span(-left)} ago")


@command("diff", json=False, examples="fleet sign diff acme-root-2.signing.json")
@_FILES
def diff(options: Options, *, files: Sequence[Path]) -> Exit:
    """Say in words what an event changes, and whose signatures it lacks; exit with 1 when it lacks some."""
    event = merged(files)
    who = operator(options)
    with who.client() as client:
        ceremony = Ceremony(options, who, client)
        ceremony.show(event)
        lacking = ceremony.missing(event)
        ceremony.say_missing(files[0], lacking)
    return Exit.FAILED if lacking else Exit.OK


@command("approve", examples="fleet sign approve acme-root-2.signing.json\nfleet sign approve event.json --key alice")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--key", default="", metavar="NAME", help="Sign with this key only  [every key here that counts]")
@click.option("--out", "to", type=click.Path(path_type=Path, dir_okay=False), help="Where to write it  [FILE]")
@click.option("--offline", is_flag=True, help="The server is gone: compare with what this machine verified last")
@_YES
def approve(options: Options, *, file: Path, key: str, to: Path | None, offline: bool, yes: bool) -> None:
    """Say what the event in FILE changes, and add this machine's signature to it."""
    event = load(file)
    who = operator(options)
    with contextlib.nullcontext(Cached(who)) if offline else who.client() as client:
        ceremony = Ceremony(options, who, client)
        ceremony.show(event)
        signed = ceremony.sign(event, yes=yes, using=key)
        lacking = ceremony.missing(signed)
        if signed == event and lacking:
            raise Fault(
                "no key here counts for it",
                f"it lacks {', '.join(sorted({each.whose for each in lacking}))}",
                "fleet keys list shows what is here",
                code=Exit.REFUSED,
            )
        save(to or file, signed)
        ceremony.say_missing(to or file, lacking, offline=offline)


@command(
    "publish", examples="fleet sign publish acme-root-2.signing.json\nfleet sign publish from-alice.json from-bob.json"
)
@_FILES
def publish(options: Options, *, files: Sequence[Path]) -> Exit:
    """Publish an event that enough have signed; several FILEs are copies that were signed apart."""
    event = merged(files)
    who = operator(options)
    with who.client() as client:
        ceremony = Ceremony(options, who, client)
        ceremony.show(event)
        lacking = ceremony.missing(event)
        if lacking:
            ceremony.say_missing(files[0], lacking)
            return Exit.REFUSED
        ceremony.publish(event)
    return Exit.OK


@command("renew", examples="fleet sign renew\nfleet sign renew root targets")
@click.argument("roles", nargs=-1, metavar="[ROLE...]")
@click.option(
    "--within", default=DUE, show_default=True, metavar="DAYS", help="Without ROLE: what expires in this time"
)
@click.option(
    "--out", "to", type=click.Path(path_type=Path, dir_okay=False), help="Save the signing event here; publish nothing"
)
@_YES
def renew(options: Options, *, roles: tuple[str, ...], within: str, to: Path | None, yes: bool) -> None:
    """Sign roles anew before they expire: root, targets, namespaces; nothing in them changes but their expiry."""
    who = operator(options)
    soon = datetime.now(UTC) + days(within)
    with who.client() as client:
        ceremony = Ceremony(options, who, client)
        known = {row["role"]: row["expires"] for row in _rows(ceremony)}
        for role in roles:
            if role not in known:
                raise Fault(f"there is no role {role!r}", f"people sign {', '.join(known)}")
        wanted = roles or tuple(role for role, expires in known.items() if expires < soon)
        if not wanted:
            out.say(options, f"Nothing expires within {days(within).days} days.")
            return
        try:
            event = proposals.propose(
                ceremony.files, renew=wanted, now=datetime.now(UTC), note=f"renews {', '.join(wanted)}"
            )
        except RepositoryError as error:
            raise Fault(str(error), code=Exit.REFUSED) from None
        ceremony.carry_through(event, yes=yes, to=to)


@command("bins", json=False, examples="fleet sign bins\nfleet sign bins edge")
@click.argument("namespace", required=False)
@click.option("--bits", type=click.IntRange(1, 10), default=bins.BITS, show_default=True, help="2^BITS hash bins")
@click.option(
    "--out", "to", type=click.Path(path_type=Path, dir_okay=False), help="Save the signing event here; publish nothing"
)
@_YES
def move_to_bins(options: Options, *, namespace: str | None, bits: int, to: Path | None, yes: bool) -> None:
    """Move the targets of NAMESPACE into hash bins, for good: worth it from about a thousand targets on.

    Publishing then signs one small role, and a board fetches the one that its target is in. Boards follow by
    themselves; what is published, revoked and running stays as it is.
    """
    who = operator(options)
    with who.client() as client:
        ceremony = Ceremony(options, who, client)
        try:
            event = proposals.propose_bins(ceremony.files, namespace or who.namespace, now=datetime.now(UTC), bits=bits)
        except RepositoryError as error:
            raise Fault(str(error), code=Exit.REFUSED) from None
        ceremony.carry_through(event, yes=yes, to=to)


for each in (status, diff, approve, publish, renew, move, move_to_bins):
    sign.add_command(each)

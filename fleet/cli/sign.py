"""`fleet sign`: changes of trust that several people sign, roles that expire, moves between sizes of fleet."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import click
from securesystemslib.signer import Key

from fleet import ca
from fleet.cli import base, output
from fleet.cli import ca as ca_commands
from fleet.cli.base import (
    FORCE_OPTION,
    SIGN_YES,
    Exit,
    Fault,
    Group,
    Options,
    command,
    days,
    new_file_option,
    read_file,
    save_event_option,
)
from fleet.cli.operator import load_operator
from fleet.cli.signing_event import Ceremony, Change, load, merged, save, show_recovery, signing_faults, team_keys
from fleet.cli.trust_store import Cached
from fleet.cli.unlock import new_passphrase
from fleet.client import Client, ProblemError
from fleet.protocol.trust_api import OnlineView
from signing import events, hash_bins, keys, repository, rotation
from signing.errors import RepositoryError
from signing.keyring import read_public, recovery_key
from signing.rotation import RoleKeys, Size

_PUBLIC = click.Path(path_type=Path, dir_okay=False, exists=True)

DUE: Final = "60d"

_FILES = click.argument(
    "files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path, dir_okay=False)
)


@command(
    "move",
    json=False,
    examples="fleet sign move solo\nfleet sign move team --root alice --root bob --root carol\n"
    "fleet sign move publisher --snapshot snapshot.pub --timestamp timestamp.pub",
)
@click.argument("size", metavar="solo|team|publisher", type=click.Choice(["solo", "team", "publisher"]))
@click.option(
    "--root",
    "people",
    multiple=True,
    metavar="KEY",
    help="With team: a key that holds root from now on (fleet keys list); repeatable",
)
@click.option(
    "--threshold", metavar="NUMBER", default=2, show_default=True, help="With team: number of keys that must sign"
)
@save_event_option
@SIGN_YES
@click.option("--snapshot", type=_PUBLIC, metavar="FILE", help="With publisher: public key of snapshot from now on")
@click.option("--timestamp", type=_PUBLIC, metavar="FILE", help="With publisher: public key of timestamp from now on")
def move(
    options: Options,
    *,
    size: str,
    people: tuple[str, ...],
    threshold: int,
    snapshot: Path | None,
    timestamp: Path | None,
    to: Path | None,
    yes: bool,
) -> None:
    """Move the fleet to another size, or its online keys to a signing host.

    solo and team: root, targets and the namespaces of a development fleet get new keys, since the old ones were
    unencrypted. publisher: root names the keys of snapshot and timestamp that 'fleet publisher keys' (or, to move back
    to the server, 'fleet server key') made; what is published then waits until they sign.
    """
    if (size == "publisher") != bool(snapshot and timestamp):
        raise click.UsageError("'fleet sign move publisher' needs --snapshot and --timestamp, and only that.")
    if snapshot and timestamp:
        _move_online(options, {"snapshot": snapshot, "timestamp": timestamp}, to=to, yes=yes)
        return
    if (size == "team") != bool(people):
        raise click.UsageError("'fleet sign move team' needs --root for each person, and only that.")
    who = load_operator(options)
    with who.client() as client:
        ceremony = Ceremony(options, who, client)
        mover = _Mover(ceremony)
        try:
            with signing_faults():
                change, words = mover.change(size, people, threshold)
                event = events.propose(
                    ceremony.files,
                    size=Size(size),
                    roles=change.roles,
                    namespaces=change.namespaces,
                    now=datetime.now(UTC),
                    note=f"the fleet becomes a {size} fleet",
                )
            published = ceremony.carry_through(event, yes=yes, to=to)
        except BaseException:
            mover.undo()
            raise
    if words:
        show_recovery(words)
    if published and mover.made:
        output.say(
            options,
            "Restart 'fleet serve': it serves a production fleet now. The old keys are worthless;\n"
            f"delete them: {', '.join(mover.replaced)}\n"
            "The root key of the CA was unencrypted, too: take it off the server with 'fleet ca offline'.",
        )


def _move_online(options: Options, files: Mapping[str, Path], *, to: Path | None, yes: bool) -> None:
    """Publish a root that names other keys for snapshot and timestamp."""
    who = load_operator(options)
    with signing_faults():
        roles = {
            role: RoleKeys((read_public(read_file(path, keys.MAX_BYTES), what=str(path)),))
            for role, path in files.items()
        }
    with who.client() as client:
        ceremony = Ceremony(options, who, client)
        with signing_faults():
            event = events.propose(
                ceremony.files, roles=roles, now=datetime.now(UTC), note="other keys for snapshot and timestamp"
            )
        if ceremony.carry_through(event, yes=yes, to=to):
            output.say(options, "The new keys count. Delete the old keys of snapshot and timestamp where they were.")


class _Mover:
    def __init__(self, ceremony: Ceremony) -> None:
        self._ceremony = ceremony
        self.made: list[str] = []
        self.replaced: list[str] = []

    def change(self, size: str, people: tuple[str, ...], threshold: int) -> tuple[Change, str]:
        """Return the new keys of each role, and the text of a recovery key if one was made."""
        ring, files = self._ceremony.ring, self._ceremony.files
        change, words = Change(), ""
        if self._ceremony.trust.development:
            names = ("targets", *repository.namespaces(files))
            passphrase = new_passphrase("the new keys")
            if size == "solo":
                recovery, words = recovery_key()
                name = ring.free("recovery")
                ring.add(name, recovery.public_key)
                self.made.append(name)
                root = RoleKeys((self._make("root", passphrase), recovery.public_key))
                change = change.with_keys(files, "root", root)
            for role in names:
                change = change.with_keys(files, role, RoleKeys((self._make(role, passphrase),)))
        elif size == "solo":
            raise Fault(
                "the fleet is not a development fleet", "there is nothing to move", "fleet sign status shows it"
            )
        if size == "team":
            team = team_keys(tuple(ring.get(name).key for name in people), threshold)
            change = change.with_keys(files, "root", team)
        return change, words

    def _make(self, role: str, passphrase: bytes) -> Key:
        ring = self._ceremony.ring
        for key in rotation.keys_of(self._ceremony.files, role).keys:
            if (entry := ring.by_id(key.keyid)) is not None:
                self.replaced.append(str(ring.file(entry.name)))
        name = ring.free(role)
        entry, _ = ring.generate(name, passphrase=passphrase)
        self.made.append(name)
        return entry.key

    def undo(self) -> None:
        """Remove the new keys, as nothing was published."""
        for name in self.made:
            self._ceremony.ring.file(name).unlink(missing_ok=True)
            self._ceremony.ring.forget(name)


@click.group("sign", cls=Group)
def sign() -> None:
    """Show, sign and publish signing events; show and renew what expires.

    An event is a file, mailed to those who must sign. Its changes are described in words, compared with what is
    published, before a signature is asked for.
    """


@command("status", examples="fleet sign status\nfleet sign status --fail-within 30d    (for a cron job)")
@click.option(
    "--fail-within",
    metavar="DAYS",
    help="Exit with 1 when a role that people sign expires within this time, such as 30d",
)
@base.table_options
def status(options: Options, *, fail_within: str | None) -> Exit:
    """Show every role: version, expiry, how many must sign, and who."""
    limit = days(fail_within) if fail_within else timedelta(0)
    who = load_operator(options)
    with who.client() as client:
        ceremony = Ceremony(options, who, client)
        view, signed = ca_commands.view_or_none(client), online_or_none(client)
    now = datetime.now(UTC)
    rows = list(_rows(ceremony))
    issuer = None if view is None else ca_commands.due(view, within=limit or ca.WARN)
    for problem in () if signed is None else signed.problems:
        output.note(f"note: {problem}")
    if issuer is not None:
        output.note(f"the issuing CA ends on {issuer.ends:%Y-%m-%d}: fleet ca renew")
    late = [row for row in rows if row["expires"] - now < limit]
    if options.json:
        output.show_json({"roles": rows, "late": [row["role"] for row in late]})
    else:
        output.table(
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
    output.note(f"expires within {output.span(limit.total_seconds())}: {names}; fleet sign renew {names}")
    return Exit.FAILED


def online_or_none(client: Client) -> OnlineView | None:
    """Fetch the state of online signing; None from a server without that route."""
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
            continue  # the namespace's publisher has signed nothing yet
        keys = rotation.keys_of(files, role)
        yield {
            "role": role,
            "version": version,
            "expires": min(events.expiry(each) for each in (data, *_bins(files, role, data))),
            "threshold": keys.threshold,
            "keys": [key.keyid for key in keys.keys],
        }


def _bins(files: Mapping[str, bytes], namespace: str, data: bytes) -> Iterator[bytes]:
    """Yield the hash bins of a namespace."""
    if namespace in {"root", "targets"} or b'"bit_length"' not in data:
        return
    index = repository.newest(files)
    for name, version in index.items():
        if hash_bins.is_bin(name) and hash_bins.namespace_of(name) == namespace:
            yield files[f"{version}.{name}.json"]


def _when(expires: datetime, now: datetime) -> str:
    left = (expires - now).total_seconds()
    return f"{expires:%Y-%m-%d}, " + (f"in {output.span(left)}" if left > 0 else f"expired {output.span(-left)} ago")


@command("diff", json=False, examples="fleet sign diff acme-root-2.signing.json")
@_FILES
def diff(options: Options, *, files: Sequence[Path]) -> Exit:
    """Describe in words what an event changes and whose signatures it lacks; exit with 1 when it lacks some."""
    event = merged(files)
    who = load_operator(options)
    with who.client() as client:
        ceremony = Ceremony(options, who, client)
        ceremony.show(event)
        lacking = ceremony.missing(event)
        ceremony.say_missing(*files, lacking=lacking)
    return Exit.FAILED if lacking else Exit.OK


@command("approve", examples="fleet sign approve acme-root-2.signing.json\nfleet sign approve event.json --key alice")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--key", default="", metavar="NAME", help="Sign only with this key  [every key here that counts]")
@new_file_option("--out", "to", metavar="FILE", help="Write the signed event to this file  [FILE]")
@FORCE_OPTION
@click.option("--offline", is_flag=True, help="Compare with what this machine verified last, when the server is lost")
@SIGN_YES
def approve(options: Options, *, file: Path, key: str, to: Path | None, offline: bool, yes: bool) -> None:
    """Describe in words what the event in FILE changes, and add this machine's signature to it."""
    event = load(file)
    who = load_operator(options)
    with contextlib.nullcontext(Cached(who)) if offline else who.client() as client:
        ceremony = Ceremony(options, who, client)
        ceremony.show(event)
        signed = ceremony.sign(event, yes=yes, using=key)
        lacking = ceremony.missing(signed)
        if signed == event and lacking:
            raise Fault(
                "cannot sign: no key here counts for this event",
                f"it lacks {', '.join(sorted({each.whose for each in lacking}))}",
                "see the keys here with fleet keys list",
                code=Exit.REFUSED,
            )
        save(to or file, signed)
        ceremony.say_missing(to or file, lacking=lacking, offline=offline)


@command(
    "publish", examples="fleet sign publish acme-root-2.signing.json\nfleet sign publish from-alice.json from-bob.json"
)
@_FILES
def publish(options: Options, *, files: Sequence[Path]) -> Exit:
    """Publish an event with enough signatures; several FILEs are copies signed by different people."""
    event = merged(files)
    who = load_operator(options)
    with who.client() as client:
        ceremony = Ceremony(options, who, client)
        ceremony.show(event)
        lacking = ceremony.missing(event)
        if lacking:
            ceremony.say_missing(*files, lacking=lacking)
            return Exit.REFUSED
        ceremony.publish(event)
    return Exit.OK


@command("renew", examples="fleet sign renew\nfleet sign renew root targets")
@click.argument("roles", nargs=-1, metavar="[ROLE...]")
@click.option(
    "--within", default=DUE, show_default=True, metavar="DAYS", help="Without ROLE: renew what expires within this time"
)
@save_event_option
@SIGN_YES
def renew(options: Options, *, roles: tuple[str, ...], within: str, to: Path | None, yes: bool) -> None:
    """Sign roles anew before they expire: root, targets, namespaces. Nothing but their expiry changes."""
    who = load_operator(options)
    soon = datetime.now(UTC) + days(within)
    with who.client() as client:
        ceremony = Ceremony(options, who, client)
        known = {row["role"]: row["expires"] for row in _rows(ceremony)}
        for role in roles:
            if role not in known:
                raise Fault(f"there is no role {role!r}", f"people sign {', '.join(known)}", code=Exit.REFUSED)
        wanted = roles or tuple(role for role, expires in known.items() if expires < soon)
        if not wanted:
            text = f"Nothing expires within {days(within).days} days."
            output.result(options, {"published": False, "missing": []}, text)
            return
        with signing_faults():
            note = f"renews {', '.join(wanted)}"
            event = events.propose(ceremony.files, renew=wanted, now=datetime.now(UTC), note=note)
        ceremony.carry_through(event, yes=yes, to=to)


@command("bins", json=False, examples="fleet sign bins\nfleet sign bins edge")
@click.argument("namespace", required=False)
@click.option(
    "--bits",
    metavar="NUMBER",
    type=click.IntRange(1, 10),
    default=hash_bins.BITS,
    show_default=True,
    help="Make 2^BITS hash bins",
)
@save_event_option
@SIGN_YES
def move_to_bins(options: Options, *, namespace: str | None, bits: int, to: Path | None, yes: bool) -> None:
    """Move the targets of NAMESPACE into hash bins, for good; worth it from about a thousand targets.

    Publishing then signs one small role, and a device fetches only the bin of its target. Devices follow by themselves;
    what is published, revoked and running stays as it is.
    """
    who = load_operator(options)
    with who.client() as client:
        ceremony = Ceremony(options, who, client)
        with signing_faults():
            event = events.propose_bins(ceremony.files, namespace or who.namespace, now=datetime.now(UTC), bits=bits)
        ceremony.carry_through(event, yes=yes, to=to)


for each in (status, diff, approve, publish, renew, move, move_to_bins):
    sign.add_command(each)

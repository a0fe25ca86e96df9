"""`fleet sign move`: from one size of fleet to the next, without a board enrolled again."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import click
from securesystemslib.signer import Key

from fleet.cli import out
from fleet.cli.base import Exit, Fault, Options, command
from fleet.cli.ceremony import Ceremony
from fleet.cli.home import operator
from fleet.cli.prepare import read_file
from fleet.cli.rotating import Change
from fleet.cli.team import show_recovery, team_keys
from fleet.cli.unlock import new_passphrase
from signing import keys, proposals, repository, rotation
from signing.errors import SigningError
from signing.keyring import read_public, recovery_key
from signing.rotation import RoleKeys, Size

_PUBLIC = click.Path(path_type=Path, dir_okay=False, exists=True)


@command(
    "move",
    json=False,
    examples="fleet sign move solo\nfleet sign move team --root alice --root bob --root carol\n"
    "fleet sign move publisher --snapshot snapshot.pub --timestamp timestamp.pub",
)
@click.argument("size", metavar="solo|team|publisher", type=click.Choice(["solo", "team", "publisher"]))
@click.option("--root", "people", multiple=True, metavar="KEY", help="Who holds root from now on (fleet keys list)")
@click.option("--threshold", default=2, show_default=True, help="How many of them must sign")
@click.option(
    "--out", "to", type=click.Path(path_type=Path, dir_okay=False), help="Save the signing event here; publish nothing"
)
@click.option("--yes", is_flag=True, help="Do not ask before signing")
@click.option("--snapshot", type=_PUBLIC, help="With 'publisher': the key of snapshot from now on")
@click.option("--timestamp", type=_PUBLIC, help="With 'publisher': the key of timestamp from now on")
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
    """Move the fleet to another size: from dev to solo, from either to team; or two keys to a publisher host.

    The keys of a development fleet lay in the clear: root, targets and the namespaces get new, encrypted ones. With
    'publisher' root names the keys of snapshot and timestamp that 'fleet publisher keys' (or, back on the server,
    'fleet server key') made; what is published then waits until they sign.
    """
    if (size == "publisher") != bool(snapshot and timestamp):
        raise click.UsageError("'fleet sign move publisher' needs --snapshot and --timestamp, and only that.")
    if snapshot and timestamp:
        _move_online(options, {"snapshot": snapshot, "timestamp": timestamp}, to=to, yes=yes)
        return
    if (size == "team") != bool(people):
        raise click.UsageError("'fleet sign move team' needs --root for each person, and only that.")
    who = operator(options)
    with who.client() as client:
        ceremony = Ceremony(options, who, client)
        mover = _Mover(ceremony)
        try:
            change, words = mover.change(size, people, threshold)
            event = proposals.propose(
                ceremony.files,
                size=Size(size),
                roles=change.roles,
                namespaces=change.namespaces,
                now=datetime.now(UTC),
                note=f"the fleet becomes a {size} fleet",
            )
            published = ceremony.carry_through(event, yes=yes, to=to)
        except SigningError as error:
            mover.undo()
            raise Fault(str(error), code=Exit.REFUSED) from None
        except BaseException:
            mover.undo()
            raise
    if words:
        show_recovery(words)
    if published and mover.made:
        out.say(
            options,
            "Restart 'fleet serve': it serves a fleet in production now. The keys of before count for nothing;\n"
            f"delete them: {', '.join(mover.replaced)}\n"
            "The root of the CA lay in the clear, too: 'fleet ca offline' takes it off the server.",
        )


def _move_online(options: Options, files: Mapping[str, Path], *, to: Path | None, yes: bool) -> None:
    """One root that names other keys for snapshot and timestamp."""
    who = operator(options)
    try:
        roles = {
            role: RoleKeys((read_public(read_file(path, keys.MAX_BYTES), what=str(path)),))
            for role, path in files.items()
        }
    except SigningError as error:
        raise Fault(str(error)) from None
    with who.client() as client:
        ceremony = Ceremony(options, who, client)
        try:
            event = proposals.propose(
                ceremony.files, roles=roles, now=datetime.now(UTC), note="other keys for snapshot and timestamp"
            )
        except SigningError as error:
            raise Fault(str(error), code=Exit.REFUSED) from None
        if ceremony.carry_through(event, yes=yes, to=to):
            out.say(options, "They count. Delete the old keys of snapshot and timestamp where they lay.")


class _Mover:
    def __init__(self, ceremony: Ceremony) -> None:
        self._ceremony = ceremony
        self.made: list[str] = []
        self.replaced: list[str] = []

    def change(self, size: str, people: tuple[str, ...], threshold: int) -> tuple[Change, str]:
        """The roles that get other keys, and the words of a recovery key where one was made."""
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
        """Nothing came of it: the keys that were made are worth nothing."""
        for name in self.made:
            self._ceremony.ring.file(name).unlink(missing_ok=True)
            self._ceremony.ring.forget(name)

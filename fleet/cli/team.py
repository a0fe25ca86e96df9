"""Handing root to several people, and the key on paper: what `fleet init` and `fleet sign move` share."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import click
from securesystemslib.signer import Key

from fleet.cli.base import Exit, Fault
from fleet.cli.ceremony import SUFFIX, save
from fleet.cli.prepare import read_file
from signing import events, keyring, keys, proposals
from signing.errors import KeyFileError, RepositoryError, SigningError
from signing.rotation import TEAM_KEYS, TEAM_THRESHOLD, RoleKeys, Size


def read_team(files: Sequence[Path], threshold: int) -> tuple[Mapping[str, Key], RoleKeys]:
    """People's public keys by their files' names, and what they are together.

    Raises:
        Fault: a file that is no public key, too few people, or one of them twice.
    """
    try:
        people = {file.stem: keyring.read_public(read_file(file, keys.MAX_BYTES), what=str(file)) for file in files}
    except KeyFileError as error:
        raise Fault(str(error), action="each of them prints it with 'fleet keys show NAME'") from None
    return people, team_keys(tuple(people.values()), threshold)


def team_keys(people: tuple[Key, ...], threshold: int) -> RoleKeys:
    """Root in the hands of several; raises `Fault` when they are too few."""
    if len(people) < TEAM_KEYS or threshold < TEAM_THRESHOLD:
        raise Fault(
            f"a team's root needs {TEAM_THRESHOLD} of {TEAM_KEYS} people or more",
            f"{threshold} of {len(people)} were given",
            "so that one key may be lost and one stolen",
        )
    try:
        return RoleKeys(people, threshold)
    except RepositoryError as error:
        raise Fault(str(error)) from None


def hand_over(home: Path, team: tuple[Mapping[str, Key], RoleKeys], passphrase: bytes | None) -> Path:
    """A new fleet's event that gives root to a team, signed by the root key made with the fleet; returns its file.

    Raises:
        Fault: it cannot be signed or written.
    """
    people, signers = team
    ring = keyring.Keyring(home / "operator" / "keys")
    files = {path.name: path.read_bytes() for path in (home / "server" / "repository").iterdir()}
    try:
        for name, key in people.items():
            ring.add(name, key)
        event = proposals.propose(
            files, size=Size.TEAM, roles={"root": signers}, now=datetime.now(UTC), note="root passes to the team"
        )
        event = events.sign(files, event, ring.open(ring.get("root"), lambda _what: passphrase))
    except SigningError as error:
        raise Fault(str(error), code=Exit.REFUSED) from None
    path = Path(event.name + SUFFIX)
    save(path, event)
    return path


def show_recovery(words: str) -> None:
    """Print the key on paper, once."""
    click.echo(
        "The recovery key. Write it down or print it, lock it away, and keep it on no disk; it is not shown again.\n"
        "With it root can be taken back when this machine is lost: 'fleet keys import recovery --recovery'.\n"
        f"\n    {words[:42]}\n    {words[42:]}\n"
    )

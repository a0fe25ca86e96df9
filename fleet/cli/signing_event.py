"""Changes of trust: described, signed with the keys of this machine, published or saved for others.

`Ceremony` carries out an event. `Change` and the functions after it turn a request into the keys of each role: pure,
without files, server or questions. `read_team` to `show_recovery` hand root to several
people, for `fleet init` and `fleet sign move`.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

import click
from securesystemslib.signer import Key, Signer

from fleet.cli import output
from fleet.cli.base import Exit, Fault, Options, confirm, read_file, write_file
from fleet.cli.operator import Operator
from fleet.cli.trust_store import Cached, TrustStore
from fleet.cli.unlock import keyring, open_key
from fleet.client import Client
from fleet.protocol.manifest import Grants
from signing import event_diff, events, hash_bins, keys, repository, rotation
from signing import keyring as keyrings
from signing.errors import KeyFileError, RepositoryError, SigningError
from signing.events import Event, Wanted
from signing.keyring import Entry, Keyring
from signing.metadata import DIRECTOR
from signing.rotation import TEAM_KEYS, TEAM_THRESHOLD, Namespace, RoleKeys, Size

SUFFIX: Final = ".signing.json"

TOP = ("root", "targets", "snapshot", "timestamp")


class Ceremony:
    """Signing of events that change what one fleet trusts, by one operator."""

    def __init__(self, options: Options, who: Operator, client: Client | Cached) -> None:
        self.options, self.who, self.client = options, who, client
        self.trust = TrustStore(who, client, expired=True)
        self.ring: Keyring = keyring(who)
        for what in self.trust.expired():
            output.note(f"note: {what}; an outdated copy of the repository looks the same")

    @property
    def files(self) -> dict[str, bytes]:
        """Root, targets and namespaces, verified from the root pinned on this machine."""
        return self.trust.files

    def show(self, event: Event) -> None:
        """Describe in words what the event changes, compared with what is published."""
        if event.fleet != self.who.fleet:
            raise Fault(
                f"this event belongs to the fleet {event.fleet!r}", f"this machine belongs to {self.who.fleet!r}"
            )
        with signing_faults():
            lines = event_diff.describe(self.files, event, called=self.ring.called)
        if event.note:
            output.note(f"note: {event.note}")
        for line in lines:
            output.note(line)

    def missing(self, event: Event) -> list[Wanted]:
        """List the signatures that the event lacks."""
        with signing_faults():
            return events.missing(self.files, event)

    def sign(self, event: Event, *, extra: Sequence[Signer] = (), yes: bool = False, using: str = "") -> Event:
        """Sign the event, shown before, with every key of this keyring that counts.

        Args:
            event: as proposed, possibly signed by others.
            extra: keys that are not in the keyring.
            yes: do not ask.
            using: name of the only key to sign with, empty for every key that counts.

        Raises:
            Fault: no key of this keyring counts.
        """
        mine = [each for each in self._able(event) if not using or each.name == using]
        others = [each for each in extra if any(each.public_key.keyid in w.keyids for w in self.missing(event))]
        if not mine and not others:
            return event
        named = ", ".join(entry.name for entry in mine)
        if self.options.json and not yes:
            raise click.UsageError("--json cannot ask before it signs: add --yes.")
        if not yes:
            confirm(f"Sign this with {named or 'the new key'}?")
        for signer in others:
            event = self._signed(event, signer)
        for entry in mine:
            if any(entry.key.keyid in wanted.keyids for wanted in self.missing(event)):
                event = self._signed(event, open_key(self.ring, entry))
        return event

    def carry_through(
        self, event: Event, *, extra: Sequence[Signer] = (), yes: bool = False, to: Path | None = None
    ) -> bool:
        """Show and sign an event, then publish it, or save it for others to sign; return True when published."""
        self.show(event)
        event = self.sign(event, extra=extra, yes=yes)
        lacking = self.missing(event)
        if lacking or to is not None:
            if to is None:
                path = save_named(event)
            else:
                save(path := to, event)
            self.say_missing(path, lacking=lacking)
            return False
        self.publish(event)
        return True

    def publish(self, event: Event) -> None:
        """Upload an event with enough signatures, and refresh the verified state."""
        assert isinstance(self.client, Client)
        reply = self.client.publish_event(event.encode())
        self.trust.refresh()
        roles = ", ".join(dict.fromkeys(hash_bins.namespace_of(each.role) for each in event.documents))
        if self.options.json:
            output.show_json({"published": True, "event": event.name, "snapshot": reply.snapshot})
        else:
            output.say(self.options, f"Published: {roles}. Devices follow by themselves.")

    def say_missing(self, *paths: Path, lacking: Sequence[Wanted], offline: bool = False) -> None:
        """Say who must still sign the event in these copies, and how; `offline` for a server that is being rebuilt."""
        if self.options.json:
            rows = [{"role": w.role, "whose": w.whose, "count": w.count, "keys": list(w.keyids)} for w in lacking]
            output.show_json({"published": False, "file": str(paths[0]), "missing": rows})
            return
        for wanted in lacking:
            able = ", ".join(self.ring.called(keyid) for keyid in wanted.keyids) or "nobody"
            click.echo(f"{wanted.role} lacks {wanted.count} of the keys of {wanted.whose}: {able}")
        copies = " ".join(path.name for path in paths)
        approve = f"fleet sign approve {'--offline ' if offline else ''}{paths[0].name}"
        rebuild = " ".join(f"--event {path.name}" for path in paths)
        finish = f"fleet server rebuild {rebuild}" if offline else f"fleet sign publish {copies}"
        named = " and ".join(map(str, paths))
        have = f"{named} together have" if len(paths) > 1 else f"{named} has"
        if lacking:
            click.echo(f"Mail {paths[0]} to them: '{approve}', then '{finish}'.")
        elif offline:
            click.echo(f"{have} enough signatures: mail it to the person who rebuilds the server, for '{finish}'.")
        else:
            click.echo(f"{have} enough signatures: '{finish}' publishes it.")

    def _able(self, event: Event) -> list[Entry]:
        wanted = {keyid for each in self.missing(event) for keyid in each.keyids}
        return [entry for entry in self.ring.entries() if entry.ours and entry.key.keyid in wanted]

    def _signed(self, event: Event, signer: Signer) -> Event:
        with signing_faults():
            return events.sign(self.files, event, signer)


def load(path: Path) -> Event:
    """Read an event from a file. Raises `Fault`."""
    try:
        return events.decode(read_file(path, events.MAX_BYTES))
    except RepositoryError as error:
        raise Fault(f"cannot read the signing event {path}", str(error)) from None


def merged(paths: Sequence[Path]) -> Event:
    """Merge copies of an event that different people signed. Raises `Fault`."""
    with signing_faults():
        return events.merge(*(load(path) for path in paths))


def save(path: Path, event: Event) -> None:
    """Write an event's file. Raises `Fault`."""
    write_file(path, event.encode(), "choose another --out")


def save_named(event: Event) -> Path:
    """Write an event to a file in this directory named after it, and return the path.

    Signatures of a copy that lies there are kept; another event under that name keeps its file, and this one gets the
    next free name.

    Raises:
        Fault: the file cannot be written.
    """
    path, number = Path(event.name + SUFFIX), 1
    while path.exists():
        try:
            event = events.merge(events.decode(read_file(path, events.MAX_BYTES)), event)
            break
        except SigningError:
            number += 1
            path = Path(f"{event.name}-{number}{SUFFIX}")
    save(path, event)
    return path


@contextlib.contextmanager
def signing_faults() -> Iterator[None]:
    """Turn errors of keys and of the repository into faults for people."""
    try:
        yield
    except KeyFileError as error:
        raise Fault(str(error)) from None
    except SigningError as error:
        raise Fault(str(error), code=Exit.REFUSED) from None


@dataclass(frozen=True, slots=True)
class Change:
    """Roles with new keys, and these keys."""

    roles: Mapping[str, RoleKeys] = field(default_factory=dict)
    director: RoleKeys | None = None
    namespaces: Mapping[str, Namespace] = field(default_factory=dict)

    def with_keys(self, files: Mapping[str, bytes], role: str, keys: RoleKeys) -> "Change":
        """Add the keys of one more role."""
        if role in TOP:
            return replace(self, roles={**self.roles, role: keys})
        if role == DIRECTOR:
            return replace(self, director=keys)
        space = Namespace(keys)
        if role in repository.namespaces(files):
            before = rotation.namespace_of(files, role)
            kept = {key.keyid for key in keys.keys}
            space = replace(before, signers=keys, ends={k: end for k, end in before.ends.items() if k in kept})
        return replace(self, namespaces={**self.namespaces, role: space})


def replaced(
    files: Mapping[str, bytes],
    role: str,
    *,
    mine: Collection[str],
    to: tuple[Key, ...],
    make: Callable[[], Key],
    threshold: int | None,
) -> Change:
    """Give a role other keys.

    Args:
        files: the repository's.
        role: of root, the director, or a namespace, which may be new.
        mine: ids of this person's keys; without `to`, a new key replaces those of the role.
        to: the keys to give it; empty for a new one.
        make: function that makes the new key.
        threshold: number of required signatures; None to keep it.

    Raises:
        Fault: none of the role's keys is this person's, and none was named.
    """
    known = (*TOP, DIRECTOR, *repository.namespaces(files))
    before = rotation.keys_of(files, role) if role in known else None
    if to:
        keys = to
    elif before is None:
        keys = (make(),)
    else:
        online = role in {"snapshot", "timestamp", DIRECTOR}
        kept = () if online else tuple(key for key in before.keys if key.keyid not in mine)
        if len(kept) == len(before.keys):
            raise Fault(
                f"none of the keys of {role} is yours", "so none can be replaced", "name the new keys with --to"
            )
        keys = (*kept, make())
    least = before.threshold if before is not None else 1
    return Change().with_keys(files, role, RoleKeys(keys, threshold or min(least, len(keys))))


def without(files: Mapping[str, bytes], keyid: str) -> Change:
    """Take a key out of every role.

    Raises:
        Fault: no role has the key, or a role would have too few keys left.
    """
    change, found = Change(), False
    for role in (*TOP, DIRECTOR, *repository.namespaces(files)):
        keys = rotation.keys_of(files, role)
        left = tuple(key for key in keys.keys if key.keyid != keyid)
        if len(left) == len(keys.keys):
            continue
        found = True
        if len(left) < keys.threshold:
            raise Fault(
                f"{role} would be left with {len(left)} keys",
                f"it needs {keys.threshold}",
                f"replace its keys first: fleet keys rotate {role}",
                code=Exit.REFUSED,
            )
        change = change.with_keys(files, role, RoleKeys(left, keys.threshold))
    if not found:
        raise Fault(f"the key {keyid[:12]} signs nothing", "no role has it", "see who signs what with fleet keys list")
    return change


def for_pipeline(
    files: Mapping[str, bytes], name: str, key: Key, *, now: datetime, ends: datetime, ceiling: Grants | None
) -> Namespace:
    """Add a pipeline's key with an end to a namespace, made if need be; drop keys that have ended.

    Raises:
        Fault: the namespace has no ceiling, and none was given.
    """
    if name in repository.namespaces(files):
        before = rotation.namespace_of(files, name)
        limit = before.ceiling if ceiling is None else ceiling
        over = {keyid for keyid, end in before.ends.items() if end <= now}
        kept = tuple(each for each in before.signers.keys if each.keyid not in over)
        lives = {keyid: end for keyid, end in before.ends.items() if keyid not in over}
        signers = RoleKeys((*kept, key), before.signers.threshold)
        space = Namespace(signers, limit, {**lives, key.keyid: ends})
    else:
        space = Namespace(RoleKeys((key,)), ceiling, {key.keyid: ends})
    if space.ceiling is None:
        raise Fault(
            f"the namespace {name} has no ceiling",
            "a stolen pipeline key could then grant anything in it",
            "set one with --ceiling wasi:http, or name another --namespace",
        )
    return space


class Team(NamedTuple):
    """People who hold root together: their public keys by name, and the keys of the role."""

    people: Mapping[str, Key]
    root: RoleKeys


def read_team(files: Sequence[Path], threshold: int) -> Team:
    """Read people's public keys.

    Raises:
        Fault: a file that is no public key, too few people, or one of them twice.
    """
    try:
        people = {file.stem: keyrings.read_public(read_file(file, keys.MAX_BYTES), what=str(file)) for file in files}
    except KeyFileError as error:
        raise Fault(str(error), action="each of them prints it with 'fleet keys show NAME'") from None
    return Team(people, team_keys(tuple(people.values()), threshold))


def team_keys(people: tuple[Key, ...], threshold: int) -> RoleKeys:
    """Put root into the hands of several people. Raises `Fault` when they are too few."""
    if len(people) < TEAM_KEYS or threshold < TEAM_THRESHOLD:
        raise Fault(
            f"a team's root needs {TEAM_THRESHOLD} of {TEAM_KEYS} people or more",
            f"{threshold} of {len(people)} were given",
            "add people with --root, so that one key may be lost and one stolen",
        )
    try:
        return RoleKeys(people, threshold)
    except RepositoryError as error:
        raise Fault(str(error)) from None


def hand_over(home: Path, team: Team, passphrase: bytes | None) -> Path:
    """Write a new fleet's event that gives root to a team, signed by the root key made with the fleet.

    Raises:
        Fault: it cannot be signed or written.
    """
    ring = keyrings.Keyring(home / "operator" / "keys")
    files = {path.name: path.read_bytes() for path in (home / "server" / "repository").iterdir()}
    try:
        for name, key in team.people.items():
            ring.add(name, key)
        event = events.propose(
            files, size=Size.TEAM, roles={"root": team.root}, now=datetime.now(UTC), note="root passes to the team"
        )
        event = events.sign(files, event, ring.open(ring.get("root"), lambda _what: passphrase))
    except SigningError as error:
        raise Fault(str(error), code=Exit.REFUSED) from None
    return save_named(event)


def show_recovery(words: str) -> None:
    """Print the recovery key, once, in two lines of whole groups."""
    groups = words.split("-")
    click.echo(
        "The recovery key. Write it down or print it, lock it away, and store it on no disk; it is not shown again.\n"
        "It restores root when this machine is lost: 'fleet keys import recovery --recovery'.\n"
        f"\n    {'-'.join(groups[:8])}-\n    {'-'.join(groups[8:])}\n"
    )

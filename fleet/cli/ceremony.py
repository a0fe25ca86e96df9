"""How a change of trust comes about: shown in words, signed with the keys that are here, published or mailed on."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

import click
from securesystemslib.signer import Signer

from fleet.cli import out
from fleet.cli.base import Exit, Fault, Options
from fleet.cli.home import Operator
from fleet.cli.prepare import read_file
from fleet.cli.trust import Cached, Trust
from fleet.cli.unlock import keyring, open_key
from fleet.client import Client
from signing import bins, events, words
from signing.errors import RepositoryError
from signing.events import Event, Wanted
from signing.keyring import Entry, Keyring

SUFFIX: Final = ".signing.json"
T = TypeVar("T")


class Ceremony:
    """One operator, one fleet, and the events that change what it trusts."""

    def __init__(self, options: Options, who: Operator, client: Client | Cached) -> None:
        self.options, self.who, self.client = options, who, client
        self.trust = Trust(who, client, expired=True)
        self.ring: Keyring = keyring(who)
        for what in self.trust.expired():
            click.echo(f"note: {what}; a repository that somebody holds back looks like this, too", err=True)

    @property
    def files(self) -> dict[str, bytes]:
        """Root, targets and namespaces, verified from the root pinned on this machine."""
        return self.trust.files

    def show(self, event: Event) -> None:
        """What the event changes, in words, against what is published."""
        if event.fleet != self.who.fleet:
            raise Fault(f"this event is of the fleet {event.fleet!r}", f"this machine's is {self.who.fleet!r}")
        lines = _checked(lambda: words.describe(self.files, event, called=self.ring.called))
        if event.note:
            click.echo(f"note: {printable(event.note)}", err=True)
        for line in lines:
            click.echo(printable(line), err=True)

    def missing(self, event: Event) -> list[Wanted]:
        """The signatures that it lacks."""
        return _checked(lambda: events.missing(self.files, event))

    def sign(self, event: Event, *, extra: Sequence[Signer] = (), yes: bool = False, using: str = "") -> Event:
        """The event, signed with every key of this keyring that counts; it was shown before.

        Args:
            event: as proposed, or signed by others already.
            extra: keys that are not in the keyring.
            yes: do not ask.
            using: the name of the one key to sign with, empty for all that count.

        Raises:
            Fault: none of them counts.
        """
        mine = [each for each in self._able(event) if not using or each.name == using]
        others = [each for each in extra if any(each.public_key.keyid in w.keyids for w in self.missing(event))]
        if not mine and not others:
            return event
        named = ", ".join(entry.name for entry in mine)
        if self.options.json and not yes:
            raise click.UsageError("--json cannot ask before it signs: add --yes.")
        if not yes and not click.confirm(f"Sign this with {named or 'the new key'}?", err=True):
            raise click.Abort
        for signer in others:
            event = self._signed(event, signer)
        for entry in mine:
            if any(entry.key.keyid in wanted.keyids for wanted in self.missing(event)):
                event = self._signed(event, open_key(self.ring, entry))
        return event

    def carry_through(
        self, event: Event, *, extra: Sequence[Signer] = (), yes: bool = False, to: Path | None = None
    ) -> bool:
        """Show, sign with what is here, and publish; or save it for the others to sign. True when published."""
        self.show(event)
        event = self.sign(event, extra=extra, yes=yes)
        lacking = self.missing(event)
        if lacking or to is not None:
            path = to or Path(event.name + SUFFIX)
            save(path, event)
            self.say_missing(path, lacking)
            return False
        self.publish(event)
        return True

    def publish(self, event: Event) -> None:
        """Upload an event that enough have signed, and remember what it made."""
        assert isinstance(self.client, Client)
        reply = self.client.publish_event(event.encode())
        self.trust.refresh()
        roles = ", ".join(dict.fromkeys(bins.namespace_of(each.role) for each in event.documents))
        if self.options.json:
            out.show_json({"published": True, "event": event.name, "snapshot": reply.snapshot})
        else:
            out.say(self.options, f"Published: {roles}. Boards follow by themselves.")

    def say_missing(self, path: Path, lacking: Sequence[Wanted], *, offline: bool = False) -> None:
        """Say who must still sign, and how; `offline`, for a server that is made anew."""
        if self.options.json:
            rows = [{"role": w.role, "whose": w.whose, "count": w.count, "keys": list(w.keyids)} for w in lacking]
            out.show_json({"published": False, "file": str(path), "missing": rows})
            return
        for wanted in lacking:
            able = ", ".join(self.ring.called(keyid) for keyid in wanted.keyids) or "nobody"
            click.echo(f"{wanted.role} lacks {wanted.count} of the keys of {wanted.whose}: {able}")
        approve = f"fleet sign approve {'--offline ' if offline else ''}{path.name}"
        finish = f"fleet server rebuild --event {path.name}" if offline else f"fleet sign publish {path.name}"
        if lacking:
            click.echo(f"Mail {path} to them: '{approve}', then '{finish}'.")
        elif offline:
            click.echo(f"{path} is signed by enough: mail it to whoever makes the server anew, for '{finish}'.")
        else:
            click.echo(f"{path} is signed by enough: '{finish}' publishes it.")

    def _able(self, event: Event) -> list[Entry]:
        wanted = {keyid for each in self.missing(event) for keyid in each.keyids}
        return [entry for entry in self.ring.entries() if entry.ours and entry.key.keyid in wanted]

    def _signed(self, event: Event, signer: Signer) -> Event:
        return _checked(lambda: events.sign(self.files, event, signer))


def load(path: Path) -> Event:
    """An event from a file; raises `Fault`."""
    return _checked(lambda: events.decode(read_file(path, events.MAX_BYTES)))


def merged(paths: Sequence[Path]) -> Event:
    """One event from copies that different people signed; raises `Fault`."""
    return _checked(lambda: events.merge(*(load(path) for path in paths)))


def save(path: Path, event: Event) -> None:
    """Write an event's file; raises `Fault`."""
    try:
        path.write_bytes(event.encode())
    except OSError as error:
        raise Fault(f"cannot write {path}", (error.strerror or str(error)).lower(), "choose another --out") from None


def _checked(act: Callable[[], T]) -> T:
    try:
        return act()
    except RepositoryError as error:
        raise Fault(str(error), code=Exit.REFUSED) from None


def printable(text: str) -> str:
    """Without what could move a terminal's cursor: an event comes by mail."""
    return "".join(each if each.isprintable() else "?" for each in text)

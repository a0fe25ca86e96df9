"""`fleet server`: a server's backup, and a server made anew on the day after."""

import fcntl
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from fleet.cli import out
from fleet.cli.audit import BOARDS, remembered
from fleet.cli.authority import open_root
from fleet.cli.base import Exit, Fault, Options, command
from fleet.cli.ceremony import SUFFIX, merged, printable, save
from fleet.cli.home import Operator, home, operator
from fleet.cli.unlock import keyring, open_key
from signing import events, words
from signing import keyring as keyrings
from signing import keys as key_files
from signing.errors import SigningError
from signing.events import Event

if TYPE_CHECKING:
    from fleet.server.home import Config

_PARTS = "install them: pip install 'wasmfleet[server]'"
T = TypeVar("T")


@click.group("server", short_help="A server's backup and keys, and a server made anew")
def server() -> None:
    """Back a server up, make its keys, and make it anew on another machine."""


@command("backup", examples="fleet server backup -o fleet.tar")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The file to write"
)
def backup(options: Options, *, output: Path) -> None:
    """Write what the server of this home knows into one file, without its keys; it may run meanwhile.

    Configuration, database, metadata and components. Keep it on another machine, and make one every day.
    """
    if not output.name:
        raise Fault("--output names no file", "", "give it one: -o fleet.tar")
    try:
        from fleet import backup as backups  # noqa: PLC0415 - the server's parts may not be installed
    except ImportError as error:
        raise Fault("no backup can be made here", f"{error.name} is not installed", _PARTS) from None
    try:
        size = backups.create(home(options), output)
    except backups.BackupError as error:
        raise Fault(str(error)) from None
    if options.json:
        out.show_json({"file": str(output), "bytes": size})
    else:
        out.say(options, f"{output}: {out.size(size)}; it holds no keys.")


@command("scrub", examples="fleet server scrub", json=False)
def scrub(options: Options) -> None:
    """Throw away what the broker kept, and the server's TLS keys; both are made anew at its next start.

    For the day after somebody got at the broker. Stop the server first. What the old keys open ends with the issuing CA
    that vouched for them: 'fleet ca renew', then 'fleet ca revoke' the one before.
    """
    place = home(options) / "server"
    if not place.is_dir():
        raise Fault("no server lies here", f"{place} does not exist", "run this on the server's machine")
    handle = os.open(place / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for name in ("tls", "broker"):
            shutil.rmtree(place / name, ignore_errors=True)
            (place / name).mkdir(mode=0o700)
    except BlockingIOError:
        raise Fault("the server runs", "its broker would go on with the old files", "stop it first") from None
    finally:
        os.close(handle)
    out.say(options, "The broker's memory and the TLS keys are gone; the next start makes them anew.")


@command("key", examples="fleet server key director > director.pub")
@click.argument("role", type=click.Choice(["director", "snapshot", "timestamp"]))
def key(options: Options, *, role: str) -> None:
    """Make another key for ROLE in the server's directory of this home, and print its public half.

    It counts from the moment at which root or targets name it: 'fleet keys import NAME FILE' and
    'fleet keys rotate ROLE --to NAME' on the operator's machine.
    """
    directory = home(options) / "server" / "keys"
    if not directory.is_dir():
        raise Fault("no server lies here", f"{directory} does not exist", "run this on the server's machine")
    number = 2
    while (path := directory / f"{role}-{number}.pem").exists():
        number += 1
    try:
        made = key_files.generate(path)
    except SigningError as error:
        raise Fault(str(error)) from None
    public = keyrings.public_pem(made.public_key)
    if options.json:
        out.show_json({"file": str(path), "keyid": made.public_key.keyid, "public": public})
    else:
        click.echo(public.rstrip())


@command(
    "rebuild",
    examples="fleet server rebuild --backup fleet.tar\n"
    "fleet server rebuild --backup fleet.tar --event from-alice.json --event from-bob.json",
)
@click.option(
    "--backup", "kept", type=click.Path(path_type=Path, dir_okay=False, exists=True), help="Of the old server"
)
@click.option(
    "--event",
    "signed",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="The signing event as others have signed it",
)
@click.option("--devices-port", type=click.IntRange(1, 65535), help="Without a backup: of the API for boards  [8744]")
@click.option("--mqtt-port", type=click.IntRange(1, 65535), help="Without a backup: of the broker  [8883]")
@click.option("--broker", default="auto", show_default=True, help="Without a backup: as 'fleet init' has it")
@click.option("--yes", is_flag=True, help="Do not ask before signing")
def rebuild(
    options: Options,
    *,
    kept: Path | None,
    signed: tuple[Path, ...],
    devices_port: int | None,
    mqtt_port: int | None,
    broker: str,
    yes: bool,
) -> Exit:
    """Make the fleet's server anew in this home, from the operator's directory and a backup.

    Director, snapshot, timestamp and issuing CA get new keys, so that what was stolen counts for nothing; everybody
    else's token ends, and this machine gets a new one. Boards come back by themselves, under the name that they know.
    Without a backup the boards are those that 'fleet audit verify' has seen; deploy again what they should run.
    """
    try:
        from fleet import rebuild as rebuilding  # noqa: PLC0415 - the server's parts may not be installed
        from fleet import setup  # noqa: PLC0415 - the same
    except ImportError as error:
        raise Fault("no server can be made here", f"{error.name} is not installed", _PARTS) from None
    who, place = operator(options), home(options)
    now = datetime.now(UTC)

    def done(act: Callable[[], T]) -> T:
        try:
            return act()
        except (rebuilding.RebuildError, setup.SetupError, SigningError) as error:
            raise Fault(str(error), code=Exit.REFUSED) from None

    if signed:
        event = merged(signed)
    else:
        config: Config | None = None
        if kept is None:
            config = done(
                lambda: setup.configure(
                    who.fleet,
                    "solo",
                    who.url,
                    who.namespace,
                    operators_port=None,
                    devices_port=devices_port or setup.DEVICES_PORT,
                    mqtt_port=mqtt_port or setup.MQTT_PORT,
                    broker=broker,
                )
            )
        event, gaps = done(lambda: rebuilding.begin(place, kept=kept, config=config, now=now))
        for gap in gaps:
            click.echo(f"note: {gap}", err=True)
    files, _ = done(lambda: rebuilding.begun(place))
    event = done(lambda: _sign(who, files, event, yes=yes))
    lacking = done(lambda: events.missing(files, event))
    if lacking:
        path = Path(event.name + SUFFIX)
        save(path, event)
        names = ", ".join(sorted({each.whose for each in lacking}))
        click.echo(
            f"The new server waits in {rebuilding.draft_of(place).server}: it lacks signatures of {names}.\n"
            f"Mail {path} to them: 'fleet sign approve --offline {path.name}'; then\n"
            f"'fleet server rebuild --event {path.name}' completes it."
        )
        return Exit.FAILED
    memory = remembered(who.trust / BOARDS)
    boards = {
        device: rebuilding.Known(
            key=seen.key,
            groups=memory.places[device].groups if device in memory.places else (),
            revoked=device in memory.places and memory.places[device].revoked,
        )
        for device, seen in memory.boards.items()
    }
    root = open_root(who)
    made = done(lambda: rebuilding.finish(place, event, root, boards=boards, now=now))
    if options.json:
        out.show_json({"url": made.url, "boards": made.boards, "admitted": made.admitted, "lost": made.lost})
        return Exit.OK
    out.say(options, f"The server of {who.fleet} is made anew in {place / 'server'}: {made.boards} boards are known.")
    for path_ in made.lost:
        out.say(options, f"  its bytes are lost: {path_}; 'fleet publish FILE' with the same file brings them back")
    out.say(options, "Move the directory to its machine if that is another one, and start 'fleet serve' there.")
    return Exit.OK


def _sign(who: Operator, files: dict[str, bytes], event: Event, *, yes: bool) -> Event:
    """The event with every signature that this machine can give, after it was said in words what it changes."""
    ring = keyring(who)
    for line in words.describe(files, event, called=ring.called):
        click.echo(printable(line), err=True)
    wanted = {keyid for each in events.missing(files, event) for keyid in each.keyids}
    mine = [entry for entry in ring.entries() if entry.ours and entry.key.keyid in wanted]
    if mine and not yes and not click.confirm(f"Sign this with {', '.join(each.name for each in mine)}?", err=True):
        raise click.Abort
    for entry in mine:
        if any(entry.key.keyid in each.keyids for each in events.missing(files, event)):
            event = events.sign(files, event, open_key(ring, entry))
    return event


for each in (backup, scrub, key, rebuild):
    server.add_command(each)

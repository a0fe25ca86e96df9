"""`fleet init`, `serve`, `server` and `publisher`: create, run, back up and rebuild a server; the signing host."""

import contextlib
import fcntl
import logging
import os
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

import click
from msgspec import structs

from fleet.cli import base, output
from fleet.cli.base import (
    FORCE_OPTION,
    SIGN_YES,
    Exit,
    Fault,
    Group,
    Options,
    command,
    confirm,
    keep,
    new_file_option,
    write_file,
)
from fleet.cli.ca import open_root
from fleet.cli.keys import write_public
from fleet.cli.operator import Operator, connect, default_home, home, load_operator
from fleet.cli.signing_event import hand_over, merged, read_team, save_named, show_recovery
from fleet.cli.trust_store import load_devices
from fleet.cli.unlock import free_key_file, keyring, new_passphrase, open_key
from fleet.protocol.operator_api import ReconcileRequest, Reconciliation
from fleet.protocol.printable import PrintableFormatter
from signing import event_diff, events
from signing import keyring as keyrings
from signing import keys as key_files
from signing.errors import SigningError
from signing.events import Event

if TYPE_CHECKING:
    from fleet.admin.bootstrap import Made
    from fleet.server.config import ServerConfig
    from fleet.server.service import Ready


T = TypeVar("T")


def _start_logging(template: str, *, verbose: bool) -> None:
    """Log to standard error; messages of devices in a record cannot forge another."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter(template))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
    # of each key that a rotation replaces it says "No signature for keyid", which is as it should be
    logging.getLogger("tuf").setLevel(logging.WARNING)


@contextlib.contextmanager
def _server_parts(what: str) -> Iterator[None]:
    """Guard imports of the server's parts, which an operator's machine may lack. Raises `Fault`."""
    try:
        yield
    except ImportError as error:
        raise Fault(
            f"cannot {what} here", f"{error.name} is not installed", "run pip install 'wasmfleet[server]'"
        ) from None


@command(
    "init",
    examples="fleet init --dev\n"
    "fleet init --solo --fleet acme --url https://fleet.example.com\n"
    "fleet init --team --root alice.pub --root bob.pub --root carol.pub --fleet acme\n"
    "fleet --home ./try init --dev",
)
@click.option("--dev", is_flag=True, help="For development: unencrypted keys, refused by production devices")
@click.option("--solo", is_flag=True, help="For one operator: the offline keys are encrypted")
@click.option("--team", is_flag=True, help="For several people: as --solo, and root passes to them (--root)")
@click.option(
    "--root",
    "people",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="With --team: public key of a person who holds root; three or more",
)
@click.option(
    "--threshold", metavar="NUMBER", default=2, show_default=True, help="With --team: number of people who must sign"
)
@click.option(
    "--fleet",
    metavar="NAME",
    default="fleet",
    show_default=True,
    help="Name of the fleet; devices refuse what is signed for another",
)
@click.option(
    "--namespace",
    metavar="NAME",
    default="main",
    show_default=True,
    help="Namespace of the components published from here",
)
@click.option(
    "--url", metavar="URL", help="Address https://HOST[:PORT] under which devices reach this machine  [loopback]"
)
@click.option(
    "--operators-port", metavar="PORT", type=click.IntRange(1, 65535), help="Port of the API for operators  [8743]"
)
@click.option(
    "--devices-port", metavar="PORT", type=click.IntRange(1, 65535), help="Port of the API for devices  [8744]"
)
@click.option("--mqtt-port", metavar="PORT", type=click.IntRange(1, 65535), help="Port of the broker  [8883]")
@click.option(
    "--broker",
    metavar="WHICH",
    default="auto",
    show_default=True,
    help="Broker: auto, mosquitto, embedded, or mqtts://HOST:PORT",
)
def init(
    options: Options,
    *,
    dev: bool,
    solo: bool,
    team: bool,
    people: tuple[Path, ...],
    threshold: int,
    fleet: str,
    namespace: str,
    url: str | None,
    operators_port: int | None,
    devices_port: int | None,
    mqtt_port: int | None,
    broker: str,
) -> None:
    """Create a fleet on this machine: keys, repository, certificates and the admin's token.

    Existing files are never overwritten.
    """
    if dev + solo + team != 1:
        raise click.UsageError("Choose one of --dev (for trying out), --solo and --team.")
    if team != bool(people):
        raise click.UsageError(
            "--team and --root belong together: fleet init --team --root alice.pub --root bob.pub ..."
        )
    with _server_parts("create a fleet"):
        from fleet.admin import bootstrap  # noqa: PLC0415 - the server's parts may not be installed
    try:
        members = read_team(people, threshold) if team else None
        passphrase = None if dev else new_passphrase("the keys of root, targets and the publisher")
        made = bootstrap.init(
            home(options),
            fleet=fleet,
            size="dev" if dev else "solo",
            url=url,
            namespace=namespace,
            operators_port=operators_port,
            devices_port=devices_port or bootstrap.DEVICES_PORT,
            mqtt_port=mqtt_port or bootstrap.MQTT_PORT,
            broker=broker,
            passphrase=passphrase,
        )
    except bootstrap.SetupError as error:
        raise Fault(str(error)) from None
    event = None if members is None else hand_over(home(options), members, passphrase)
    _show_new_fleet(options, made, event)


def _show_new_fleet(options: Options, made: "Made", event: Path | None) -> None:
    if options.json:
        facts = {"home": str(made.home), "fleet": made.fleet, "size": made.size, "namespace": made.namespace}
        more = {"recovery": made.recovery, "event": None if event is None else str(event)}
        output.show_json({**facts, "url": made.url, "warnings": list(made.warnings), **more})
        return
    output.say(options, f"Created the fleet {made.fleet!r} in {made.home}.")
    for warning in made.warnings:
        click.echo(click.style("note: ", fg="yellow", bold=True) + warning, err=True)
    if made.recovery:
        show_recovery(made.recovery)
    if event is not None:
        click.echo(
            f"Root passes to the team when enough of them have signed: mail {event} to them,\n"
            f"'fleet sign approve {event.name}', then, with the server running, 'fleet sign publish {event.name}'."
        )
    fleet = "fleet" if made.home == default_home() else f"fleet --home {shlex.quote(str(made.home))}"
    output.say(
        options,
        "Next:\n"
        f"  {fleet} serve                              run its server\n"
        f"  {fleet} enroll-token --group edge-eu --quiet | ssh DEVICE sudo fleet-agent enroll",
    )


@command("serve", json=False, examples="fleet serve\nfleet --home /srv/fleet serve --broker mosquitto")
@click.option(
    "--broker", metavar="WHICH", help="Use this broker: auto, mosquitto, embedded, mqtts://HOST:PORT  [as configured]"
)
@click.option("--verbose", "-v", is_flag=True, help="Log at level INFO")
@click.option(
    "--trust-clock", is_flag=True, help="Believe this machine's clock, far as it may be from the last time known here"
)
def serve(options: Options, *, broker: str | None, verbose: bool, trust_clock: bool) -> None:
    """Run the fleet's server: API, artifacts, rollouts, ingest and the broker.

    The addresses it listens on are set in server/server.toml under the fleet's directory.
    """
    with _server_parts("run the server"):
        import asyncio  # noqa: PLC0415 - not for --help

        from fleet.server import service  # noqa: PLC0415 - the server's parts may not be installed
        from fleet.server.config import ChoiceError  # noqa: PLC0415 - the server's parts may not be installed
    _start_logging("%(asctime)s %(levelname)s %(name)s: %(message)s", verbose=verbose)

    def ready(up: "Ready") -> None:
        output.say(
            options,
            f"The fleet {up.fleet} is up; Ctrl-C stops the server, devices keep running.\n"
            f"  operators  {up.operators_url}\n"
            f"  devices    {', '.join([up.devices_url, *up.mqtt])}\n"
            f"  broker     {up.broker}",
        )

    try:
        asyncio.run(service.run(home(options), broker=broker, trust_clock=trust_clock, on_ready=ready))
    except service.ServeError as error:
        named = isinstance(error.__cause__, ChoiceError)
        raise Fault(str(error), code=Exit.USAGE if named else Exit.FAILED) from None


@click.group("server", cls=Group, short_help="Back up a server, make its keys, rebuild it")
def server() -> None:
    """Back a server up, make its keys, and rebuild it on another machine."""


@command("backup", examples="fleet server backup -o fleet.tar")
@new_file_option("-o", "--output", "target", required=True, metavar="FILE", help="Write the backup to this file")
@FORCE_OPTION
def backup(options: Options, *, target: Path) -> None:
    """Write what the server of this home knows into one file, without its keys; the server may run meanwhile.

    The backup holds configuration, database, metadata and components. Keep it on another machine; make one every day.
    """
    if not target.name:
        raise Fault("--output names no file", action="name one: -o fleet.tar")
    with _server_parts("make a backup"):
        from fleet.admin import recovery as backups  # noqa: PLC0415 - the server's parts may not be installed
    try:
        size = backups.backup(home(options), target)
    except backups.BackupError as error:
        raise Fault(str(error)) from None
    output.result(options, {"file": str(target), "bytes": size}, f"{target}: {output.size(size)}; it contains no keys.")


@command(
    "reconcile",
    examples="fleet server reconcile --adopt\n"
    "fleet server reconcile --impose site=berlin\n"
    "fleet server reconcile --adopt gate-7-1f2e3d4c --yes",
)
@click.argument("selector", required=False, default="", metavar="[DEVICE|SELECTOR]")
@click.option("--adopt", is_flag=True, help="Take what the devices run, as pins where it differs")
@click.option("--impose", is_flag=True, help="Have the devices run what the server says")
@click.option("--yes", is_flag=True, help="Do it without asking")
@base.table_options
def reconcile(options: Options, *, selector: str, adopt: bool, impose: bool, yes: bool) -> Exit:
    """Decide on devices that are ahead of a server made anew from a backup: show what would be done, then ask.

    Such a device has accepted an assignment that the backup does not know. It gets none until this decides; revocations
    reach it meanwhile. `fleet status` names these devices.
    """
    if adopt == impose:
        raise click.UsageError("Choose one of --adopt and --impose; without --yes nothing is done before a question.")
    request = ReconcileRequest(mode="adopt" if adopt else "impose", selector=selector)
    with connect(options) as client:
        plan = client.reconcile(request)
        if not options.json:
            _show_ahead(plan, request.mode)
        able = [each for each in plan.devices if not each.obstacle]
        if not able or (options.json and not yes):
            return _reconciled(options, plan)
        if not yes:
            confirm(f"{request.mode.capitalize()} on {len(able)} devices?")
        return _reconciled(options, client.reconcile(structs.replace(request, dry_run=False)))


def _show_ahead(plan: Reconciliation, mode: str) -> None:
    """Print what each device has, what the server wants, and what stands against adopting it."""
    rows = [
        (
            each.device,
            f"{each.accepted} over {each.assigned}",
            "not shown" if each.has is None else _instances(each.has),
            _instances(each.wants),
            each.obstacle or f"can {mode}",
        )
        for each in plan.devices
    ]
    columns = ("DEVICE", "ASSIGNMENT", "DEVICE HAS", "SERVER WANTS", "VERDICT")
    output.table(columns, rows, empty="No device is ahead of the server.")


def _instances(targets: dict[str, str]) -> str:
    return ", ".join(f"{name} {output.target(path)}" for name, path in sorted(targets.items())) or "nothing"


def _reconciled(options: Options, result: Reconciliation) -> Exit:
    """Print the result; refused where a device was left as it is."""
    left = [each.device for each in result.devices if each.obstacle]
    if options.json:
        output.show_json(result)
    elif result.done:
        output.say(options, f"{len(result.devices) - len(left)} devices are reconciled.")
    if left and not options.json:
        output.say(options, f"Left as they are: {', '.join(left)}.")
    return Exit.REFUSED if left else Exit.OK


@command("scrub", examples="fleet server scrub", json=False)
def scrub(options: Options) -> None:
    """Delete the broker's stored messages and the server's TLS keys; the next start makes new ones.

    Use it after an intrusion into the broker. Stop the server first. Certificates of the old TLS keys end with the
    issuing CA that signed them: run 'fleet ca renew', then 'fleet ca revoke' for the one before.
    """
    place = home(options) / "server"
    if not place.is_dir():
        raise Fault("there is no server in this home", f"{place} does not exist", "run this on the server's machine")
    handle = os.open(place / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for name in ("tls", "broker"):
            shutil.rmtree(place / name, ignore_errors=True)
            (place / name).mkdir(mode=0o700)
    except BlockingIOError:
        raise Fault("the server is running", "its broker would keep the old files", "stop it first") from None
    finally:
        os.close(handle)
    output.say(options, "The broker's stored messages and the TLS keys are deleted; the next start makes new ones.")


@command("key", examples="fleet server key director > director.pub")
@click.argument("role", type=click.Choice(["director", "snapshot", "timestamp"]))
def key(options: Options, *, role: str) -> None:
    """Make another key for ROLE in the server directory of this home, and print its public half.

    The key counts once root or targets name it: 'fleet keys import NAME FILE' and
    'fleet keys rotate ROLE --to NAME' on the operator's machine.
    """
    directory = home(options) / "server" / "keys"
    if not directory.is_dir():
        raise Fault(
            "there is no server in this home", f"{directory} does not exist", "run this on the server's machine"
        )
    path = free_key_file(directory, role)
    try:
        made = key_files.generate(path)
    except SigningError as error:
        raise Fault(str(error)) from None
    public = keyrings.public_pem(made.public_key)
    if options.json:
        output.show_json({"file": str(path), "keyid": made.public_key.keyid, "public": public})
    else:
        click.echo(public.rstrip())


@command(
    "rebuild",
    examples="fleet server rebuild --backup fleet.tar\n"
    "fleet server rebuild --backup fleet.tar --event from-alice.json --event from-bob.json",
)
@click.option(
    "--backup",
    "kept",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    metavar="FILE",
    help="Use this backup of the old server",
)
@click.option(
    "--event",
    "signed",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    metavar="FILE",
    help="Add a copy of the signing event as others signed it; repeatable",
)
@click.option(
    "--devices-port",
    metavar="PORT",
    type=click.IntRange(1, 65535),
    help="Without a backup: port of the API for devices  [8744]",
)
@click.option(
    "--mqtt-port", metavar="PORT", type=click.IntRange(1, 65535), help="Without a backup: port of the broker  [8883]"
)
@click.option(
    "--broker", metavar="WHICH", default="auto", show_default=True, help="Without a backup: broker, as for 'fleet init'"
)
@SIGN_YES
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
    """Rebuild the fleet's server in this home, from the operator's directory and a backup.

    Director, snapshot, timestamp and issuing CA get new keys, so that stolen ones are worthless. All tokens end, and
    this machine gets a new one. Devices come back by themselves, under the name that they know. Without a backup the
    devices are those that 'fleet audit verify' has seen; deploy again what they should run.
    """
    with _server_parts("rebuild a server"):
        from fleet.admin import bootstrap  # noqa: PLC0415 - a part of the server
        from fleet.admin import recovery as rebuilding  # noqa: PLC0415 - the server's parts may not be installed
    who, place = load_operator(options), home(options)
    now = datetime.now(UTC)

    def done(act: Callable[[], T]) -> T:
        try:
            return act()
        except (rebuilding.RebuildError, bootstrap.SetupError, SigningError) as error:
            raise Fault(str(error), code=Exit.REFUSED) from None

    if signed:
        event = merged(signed)
    else:
        config: ServerConfig | None = None
        if kept is None:
            config = done(
                lambda: bootstrap.configure(
                    who.fleet,
                    "solo",
                    who.url,
                    who.namespace,
                    operators_port=None,
                    devices_port=devices_port or bootstrap.DEVICES_PORT,
                    mqtt_port=mqtt_port or bootstrap.MQTT_PORT,
                    broker=broker,
                )
            )
        event, gaps = done(lambda: rebuilding.begin(place, kept=kept, config=config, now=now))
        for gap in gaps:
            output.note(f"note: {gap}")
    files, _ = done(lambda: rebuilding.begun(place))
    event = done(lambda: _sign(who, files, event, yes=yes))
    lacking = done(lambda: events.missing(files, event))
    if lacking:
        path = save_named(event)
        names = ", ".join(sorted({each.whose for each in lacking}))
        click.echo(
            f"The new server is in {rebuilding.draft_of(place).server} and waits for signatures of {names}.\n"
            f"Mail {path} to them: 'fleet sign approve --offline {path.name}'; then\n"
            f"'fleet server rebuild --event {path.name}' completes it."
        )
        return Exit.FAILED
    memory = load_devices(who.trust)
    devices = {
        device: rebuilding.Known(
            key=seen.key,
            groups=memory.places[device].groups if device in memory.places else (),
            revoked=device in memory.places and memory.places[device].revoked,
        )
        for device, seen in memory.devices.items()
    }
    root = open_root(who)
    made = done(lambda: rebuilding.finish(place, event, root, devices=devices, now=now))
    if options.json:
        output.show_json({"url": made.url, "devices": made.devices, "admitted": made.admitted, "lost": made.lost})
        return Exit.OK
    output.say(
        options, f"The server of {who.fleet} is rebuilt in {place / 'server'}: {made.devices} devices are known."
    )
    for path_ in made.lost:
        output.say(options, f"  lost: the bytes of {path_}; 'fleet publish FILE' with the same file restores them")
    output.say(options, "Move the directory to its machine if that is another one, and start 'fleet serve' there.")
    return Exit.OK


def _sign(who: Operator, files: dict[str, bytes], event: Event, *, yes: bool) -> Event:
    """Describe the event in words and add every signature that this machine can give."""
    ring = keyring(who)
    for line in event_diff.describe(files, event, called=ring.called):
        output.note(line)
    wanted = {keyid for each in events.missing(files, event) for keyid in each.keyids}
    mine = [entry for entry in ring.entries() if entry.ours and entry.key.keyid in wanted]
    if mine and not yes:
        confirm(f"Sign this with {', '.join(each.name for each in mine)}?")
    for entry in mine:
        if any(entry.key.keyid in each.keyids for each in events.missing(files, event)):
            event = events.sign(files, event, open_key(ring, entry))
    return event


for each in (backup, reconcile, scrub, key, rebuild):
    server.add_command(each)


@click.group("publisher", cls=Group, short_help="Sign snapshot and timestamp on a signing host")
def publisher() -> None:
    """Sign snapshot and timestamp on a signing host, apart from the server.

    The signing host verifies each change as the server does, and signs what it has verified. An attacker who holds the
    server and the director can then neither publish nor mix releases. While the host is down, publishing waits.
    """


@command("init", examples="fleet publisher init ./publisher-host", json=False)
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
def publisher_init(options: Options, *, directory: Path) -> None:
    """Write what a signing host needs into the new DIRECTORY, which becomes its --home; run by the operator.

    The directory holds the server's address, the fleet's CA and the TUF root; none of them is secret.
    """
    who = load_operator(options)
    write_public(who, directory, who.namespace)
    output.say(
        options,
        f"Copy {directory} to the signing host, where it is the --home, and there:\n"
        "  fleet publisher keys\n"
        f"Its token: 'fleet operators add publisher --role viewer --save {directory}/operator/token'.",
    )


@command("keys", examples="fleet publisher keys --out .")
@click.option(
    "--out",
    "to",
    default=Path(),
    type=click.Path(path_type=Path, file_okay=False),
    help="Write the public keys into this directory  [.]",
)
@click.option("--force", is_flag=True, help="Replace files there that have the same names")
def publisher_keys(options: Options, *, to: Path, force: bool) -> None:
    """Make keys for snapshot and timestamp on the signing host, and write their public halves to *.pub.

    The keys count once root names them: run 'fleet sign move publisher' on the operator's machine.
    """
    module = _signing_host()
    paths = {role: to / f"{role}.pub" for role in ("snapshot", "timestamp")}
    for path in paths.values():
        keep(path, force=force)
    try:
        made = module.make_keys(home(options) / "publisher" / "keys")
    except SigningError as error:
        raise Fault(str(error)) from None
    for role, key in made.items():
        write_file(paths[role], keyrings.public_pem(key), "name another --out")
    output.result(
        options,
        {role: str(path) for role, path in paths.items()},
        f"Made both. On the operator's machine: fleet sign move publisher --snapshot {paths['snapshot']} "
        f"--timestamp {paths['timestamp']}",
    )


@command("run", examples="fleet publisher run\nfleet publisher run --once    (from cron)", json=False)
@click.option("--once", is_flag=True, help="Sign what is due now, then end")
@click.option("--verbose", "-v", is_flag=True, help="Log at level INFO")
def publisher_run(options: Options, *, once: bool, verbose: bool) -> Exit:
    """Verify waiting changes on the signing host, sign snapshot and timestamp over them, renew both in time."""
    module = _signing_host()
    _start_logging("%(asctime)s %(levelname)s %(message)s", verbose=verbose)
    who = load_operator(options)
    root = who.pinned_root()
    with who.client() as client:
        host = module.Publisher(home(options) / "publisher", root=root, client=client)
        if once:
            try:
                brought = host.step()
            except module.PublisherError as error:
                raise Fault(str(error), code=Exit.REFUSED) from None
            output.say(options, "Signed." if brought else "Nothing to sign.")
            return Exit.OK
        signal.signal(signal.SIGTERM, _end)
        output.say(options, f"Signing snapshot and timestamp of {who.fleet}; Ctrl-C stops it.")
        host.run()
    return Exit.OK


@command("discard", examples="fleet publisher discard", json=False)
def publisher_discard(options: Options) -> None:
    """Discard the change that waits for the signing host, such as one with keys that nobody has."""
    with load_operator(options).client() as client:
        client.discard_waiting()
    output.say(options, "Discarded; none of it was published.")


def _end(_number: int, _frame: object) -> None:
    raise SystemExit(Exit.OK)


def _signing_host() -> ModuleType:
    with _server_parts("run a signing host"):
        from fleet.admin import signing_host  # noqa: PLC0415 - the server's parts may not be installed
    return signing_host


for each in (publisher_init, publisher_keys, publisher_run, publisher_discard):
    publisher.add_command(each)

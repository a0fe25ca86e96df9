"""`fleet publisher`: snapshot and timestamp signed on a host of their own: a stolen server shows nothing new."""

import logging
import signal
from pathlib import Path
from types import ModuleType

import click

from fleet.cli import out
from fleet.cli.base import Exit, Fault, Options, command
from fleet.cli.home import home, operator
from fleet.cli.keys import write_public
from fleet.cli.prepare import read_file
from fleet.protocol import caps
from signing.errors import SigningError
from signing.keyring import public_pem

_PARTS = "install them: pip install 'wasmfleet[server]'"


@click.group("publisher", short_help="Sign snapshot and timestamp on another host than the server")
def publisher() -> None:
    """Sign snapshot and timestamp on another host than the server.

    That host verifies each change as the server does, and signs what it has verified. Whoever steals the server, with
    the director, can then publish nothing and mix nothing. While the host is down, publishing waits.
    """


@command("init", examples="fleet publisher init ./publisher-host", json=False)
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
def init(options: Options, *, directory: Path) -> None:
    """On the operator's machine: write what a publisher host needs into the new DIRECTORY, which becomes its --home.

    The server's address, the fleet's CA and the root to verify everything from; nothing of it is secret.
    """
    who = operator(options)
    write_public(who, directory, who.namespace)
    out.say(
        options,
        f"Copy {directory} to the publisher host, where it is the --home, and there:\n"
        "  fleet publisher keys\n"
        f"Its token: 'fleet operators add publisher --role viewer --save {directory}/operator/token'.",
    )


@command("keys", examples="fleet publisher keys --out .")
@click.option(
    "--out", "to", default=Path(), type=click.Path(path_type=Path, file_okay=False), help="For the public ones"
)
def keys(options: Options, *, to: Path) -> None:
    """On the publisher host: make keys for snapshot and timestamp, and write their public halves to *.pub.

    They count when root names them: 'fleet sign move publisher' on the operator's machine.
    """
    module = _module()
    try:
        made = module.make_keys(home(options) / "publisher" / "keys")
    except SigningError as error:
        raise Fault(str(error)) from None
    paths = {}
    for role, key in made.items():
        paths[role] = to / f"{role}.pub"
        paths[role].write_text(public_pem(key), encoding="ascii")
    if options.json:
        out.show_json({role: str(path) for role, path in paths.items()})
    else:
        out.say(
            options,
            f"Made them. On the operator's machine: fleet sign move publisher --snapshot {paths['snapshot']} "
            f"--timestamp {paths['timestamp']}",
        )


@command("run", examples="fleet publisher run\nfleet publisher run --once    (from cron)", json=False)
@click.option("--once", is_flag=True, help="Look once, sign what is due, and end")
@click.option("--verbose", "-v", is_flag=True, help="Log more")
def run(options: Options, *, once: bool, verbose: bool) -> Exit:
    """On the publisher host: verify what waits, sign snapshot and timestamp over it, renew them in time."""
    module = _module()
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO if verbose else logging.WARNING
    )
    who = operator(options)
    root = read_file(who.root, caps.ROOT_MAX_BYTES)
    with who.client() as client:
        host = module.Publisher(home(options) / "publisher", root=root, client=client)
        if once:
            try:
                brought = host.step()
            except module.PublisherError as error:
                raise Fault(str(error), code=Exit.REFUSED) from None
            out.say(options, "Signed." if brought else "Nothing to sign.")
            return Exit.OK
        signal.signal(signal.SIGTERM, _end)
        out.say(options, f"Signing snapshot and timestamp of {who.fleet}; Ctrl-C stops it.")
        host.run()
    return Exit.OK


@command("discard", examples="fleet publisher discard", json=False)
def discard(options: Options) -> None:
    """Have the server forget what waits for the publisher host: a change to keys that nobody has, for example."""
    with operator(options).client() as client:
        client.discard_waiting()
    out.say(options, "Forgotten; nothing of it was published.")


def _end(_number: int, _frame: object) -> None:
    raise SystemExit(Exit.OK)


def _module() -> ModuleType:
    try:
        from fleet import publisher as module  # noqa: PLC0415 - the server's parts may not be installed
    except ImportError as error:
        raise Fault("a publisher host cannot run here", f"{error.name} is not installed", _PARTS) from None
    return module


for each in (init, keys, run, discard):
    publisher.add_command(each)

"""`fleet-agent`: the command on a device. Errors are a single line: what failed, why, what to do."""

import argparse
import asyncio
import contextlib
import errno
import logging
import os
import resource
import select
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from agent import clock, config, disk, starts, systemd
from agent.arguments import leave_first_process, parse, until_closed
from agent.config import CONFIG_FILE, HOST_STATE_DIR, RUNTIME_DIR, STATE_DIR, ConfigError, Paths
from agent.disk import Write
from agent.host.ipc import host_api
from agent.identity import enrolment, identity
from agent.link.host_client import HostClient, HostGoneError
from agent.report import check, device_info, status
from agent.update import images, restore
from agent.update.secrets import SecretStore
from agent.update.store import HISTORY_ROWS, Database, NotAloneError, Store, StoreError, alone
from fleet.protocol import files
from fleet.protocol.files import is_read_only
from fleet.protocol.names import BadNameError, readable
from fleet.protocol.printable import json_text, printable

TOKEN_MAX_BYTES: Final = 8192
TOKEN_WAIT_S: Final = 10.0
HOST_WAIT_S: Final = 30.0
APPLY_LOOK_S: Final = 0.1
_LISTS_ROUTES: Final = 2
"""Version of the host's protocol from which on it lists routes."""

Command = Callable[[argparse.Namespace], int]

EXAMPLES: Final = """examples:
  fleet enroll-token --group edge-eu | ssh DEVICE sudo fleet-agent enroll
  fleet-agent enroll --token-file /run/credentials/enroll-token
  fleet-agent status                 show what runs on this device
  fleet-agent why hello              show what happened to the instance hello, and what to do
  fleet-agent routes                 show which instance answers at which address, host and path
  fleet-agent check                  test disk, network, certificate, engine and host, in order
  fleet-agent metrics                print figures for Prometheus
  fleet-agent apply /media/usb/fleet.bundle
                                     update without a network
"""

COMMAND_EXAMPLES: Final = {
    "enroll": """examples:
  fleet enroll-token --group edge-eu | ssh DEVICE sudo fleet-agent enroll
  fleet-agent enroll --token-file /run/credentials/enroll-token --name boiler-room
  fleet-agent enroll --force         join another fleet, and discard the state of the old one
""",
    "apply": """example:
  fleet-agent apply /media/usb/update.tar
The device's owner must allow bundles: [policy] bundles = true in agent.toml.
""",
    "run": """example:
  fleet-agent run --state ~/device/agent --runtime ~/device/run
The package runs it as a service: systemctl status fleet-agent.
""",
    "restore": """example:
  fleet-agent restore                start components while the agent is disabled
The package does so at every start of the host: fleet-restore.service.
""",
    "status": """examples:
  fleet-agent status
  fleet-agent status --json | jq .running
""",
    "why": """examples:
  fleet-agent why                    all instances
  fleet-agent why hello              only the instance hello
""",
    "routes": """examples:
  fleet-agent routes
  fleet-agent routes --json | jq '.routes[] | select(.answers | not)'
The device's owner writes routes, limits and certificates in /etc/wasmfleet/ingress.toml; they are in effect after
systemctl reload fleet-host.
""",
    "diagnose": """example:
  sudo fleet-agent diagnose -o device.tar.gz
                                     status, history, checks, logs, kernel messages and configuration
""",
    "metrics": """examples:
  fleet-agent metrics
  fleet-agent metrics --textfile /var/lib/prometheus/node-exporter/wasmfleet.prom
The agent answers GET /metrics on its socket, too: curl --unix-socket /run/wasmfleet-agent/metrics.sock http://device/metrics
""",
    "check": """examples:
  fleet-agent check
  fleet-agent check --json | jq '.[] | select(.ok | not)'
""",
}


class UsageError(Exception):
    """The command failed; the message says why and what to do."""


ERRORS: Final = (
    UsageError,
    NotAloneError,
    ConfigError,
    StoreError,
    BadNameError,
    enrolment.EnrolError,
    identity.IdentityError,
    images.ImageError,
    restore.RunsetError,
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fleet-agent",
        description="Run and inspect the agent of a device, which carries out signed assignments.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"fleet-agent {device_info.agent_version() or '(not installed)'}"
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--state", type=Path, default=STATE_DIR, metavar="DIR", help=f"state directory (default: {STATE_DIR})"
    )
    common.add_argument(
        "--runtime",
        type=Path,
        default=RUNTIME_DIR,
        metavar="DIR",
        help=f"directory of the host's socket (default: {RUNTIME_DIR})",
    )
    common.add_argument(
        "--config",
        type=Path,
        default=CONFIG_FILE,
        metavar="FILE",
        help=f"configuration file (default: {CONFIG_FILE})",
    )
    common.add_argument("-v", "--verbose", action="store_true", help="log at level DEBUG")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        name: str, run: Callable[[argparse.Namespace], int], text: str, *, json: bool = False
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            parents=[common],
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=COMMAND_EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if json:
            command.add_argument("--json", action="store_true", help="print JSON for programs")
        command.set_defaults(run=run)
        return command

    join = add("enroll", _enroll, "join a fleet with a one-time token, read from standard input or a file")
    join.add_argument(
        "--token-file", type=Path, metavar="FILE", help="read the token from a file instead of standard input"
    )
    join.add_argument(
        "--first-boot",
        action="store_true",
        help="take the token from the boot partition or the kernel's command line, and erase it",
    )
    join.add_argument("--name", default="", help="name of this device (default: its host name)")
    join.add_argument(
        "--same-device",
        action="store_true",
        help="keep the identity where the ids of this machine have changed, and record the new ones",
    )
    join.add_argument("--force", action="store_true", help="discard an existing identity and state")
    apply = add("apply", _apply, "apply a bundle that 'fleet bundle create' made, without a network")
    apply.add_argument("file", type=Path, metavar="FILE", help="bundle to apply")
    apply.add_argument(
        "--wait", type=float, default=60.0, metavar="S", help="seconds to wait for the verdict (default: 60)"
    )
    add("run", _run, "run the agent")
    add("restore", _restore, "start the committed instances on the host, without a network")
    add("status", _status, "show what runs on this device", json=True)
    reason = add("why", _why, "show what happened on this device, why, and what to do", json=True)
    reason.add_argument("instance", nargs="?", default="", help="only this instance")
    add("routes", _routes, "show which instance answers at which address, host and path", json=True)
    bundle = add("diagnose", _diagnose, "write an archive about this device for whoever helps, without any secret")
    bundle.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="archive to write (.tar.gz)")
    bundle.add_argument(
        "--host-state",
        type=Path,
        default=HOST_STATE_DIR,
        metavar="DIR",
        help=f"state directory of the host, for its logs (default: {HOST_STATE_DIR})",
    )
    figures = add("metrics", _metrics, "print the device's figures for Prometheus, or write them to a file")
    figures.add_argument(
        "--textfile",
        type=Path,
        metavar="FILE",
        help="write this file in one piece, for node_exporter; without the agent, only that it is down",
    )
    add("check", _check, "test what the agent needs, in order; exit with status 1 if a test fails", json=True)
    return parser


def _places(options: argparse.Namespace) -> Paths:
    return Paths(options.state, options.runtime)


def _enroll(options: argparse.Namespace) -> int:
    settings = options.settings
    if options.same_device:
        return _same_device(options)
    if options.first_boot:
        return _first_boot(options, settings)
    if options.token_file is not None:
        try:
            read = _token_in(options.token_file)
        except OSError as error:
            raise UsageError(f"cannot read {options.token_file}: {error.strerror}; check the path") from error
    elif sys.stdin is None:  # closed before the start
        raise UsageError("standard input is closed: give the token there, or in a file with --token-file")
    else:
        if sys.stdin.isatty():
            print("paste the enrolment token (fleet enroll-token makes one), then Enter:", file=sys.stderr)
        read = sys.stdin.buffer.readline(TOKEN_MAX_BYTES)
    text = read.decode("ascii", errors="replace")
    _join(options, enrolment.device_name(options.name or settings.name), text)
    return 0


def _token_in(path: Path) -> bytes:
    """Read a file with a token, or what somebody writes to a pipe within a while. Raises `OSError`."""
    descriptor = files.open_descriptor(path, os.O_RDONLY, special=True)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        if not select.select([file], [], [], TOKEN_WAIT_S)[0]:
            raise OSError(errno.ETIMEDOUT, f"nobody wrote to this pipe within {TOKEN_WAIT_S:.0f} s", str(path))
        return file.read(TOKEN_MAX_BYTES) or b""


def _same_device(options: argparse.Namespace) -> int:
    """Record that this machine, whatever its ids, is the device that enrolled."""
    found = identity.evidence()  # as root, who may read them all
    who = _identity(_places(options))
    identity.note_machine(_places(options).identity, found)
    print(f"this machine is {who.device}")
    return 0


def _join(options: argparse.Namespace, name: str, text: str) -> None:
    found, machine = identity.evidence(), identity.machine()  # as root, who may read them all
    _become_owner(options.state)
    joined = enrolment.enrol(
        text,
        state=options.state,
        name=name,
        production=options.settings.production,
        force=options.force,
        machine=machine,
        proxy=options.settings.network.proxy,
    )
    identity.note_machine(_places(options).identity, found)
    print(f"{joined.device} has joined the fleet {joined.fleet}" + (f", group {joined.group}" if joined.group else ""))


def _first_boot(options: argparse.Namespace, settings: config.Settings) -> int:
    """Enrol with a token found on this device; on a copied disk, discard the identity that it holds first."""
    directory = _places(options).identity
    if (directory / "enrolled.json").exists():
        who = identity.load(directory)
        if not identity.is_copied_disk(who):
            print(identity.doubt(who) or f"{who.device} is already enrolled")
            used = identity.find_token(credentials=os.environ.get("CREDENTIALS_DIRECTORY"))
            if used is not None and enrolment.enrolled_with(used.text, who):
                identity.erase(used)  # a power cut came before that
            return 0
        print(f"this disk was copied from device {who.device}: discarding its identity and state")
        options.force = True
    found = identity.find_token(credentials=os.environ.get("CREDENTIALS_DIRECTORY"))
    if found is None:
        if options.force:
            enrolment.discard_identity(options.state)
        print(f"no {identity.NAME} on the boot partition: nothing to do")
        return 0
    machine = identity.machine()
    named = options.name or settings.name
    name = enrolment.device_name(named) if named else identity.name_of(enrolment.device_name(), machine)
    pid = os.fork()  # root erases the token, but the identity is written by the agent's user
    if pid == 0:
        os._exit(_guarded(lambda: _join(options, name, found.text)))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == 0 and not identity.erase(found):
        print(f"the used token could not be erased from {found.where}; it does not work a second time", file=sys.stderr)
    return code


def _guarded(work: Callable[[], None]) -> int:
    try:
        work()
    except ERRORS as error:
        print(f"fleet-agent enroll: {error}", file=sys.stderr)
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _become_owner(state: Path) -> None:
    """As root, switch to the user who owns the state directory: the agent could not read files of root's there."""
    try:
        owner = state.stat()
    except OSError:
        return  # enrolment will create it
    if os.geteuid() == 0 and owner.st_uid != 0:
        os.setgroups([])
        os.setgid(owner.st_gid)
        os.setuid(owner.st_uid)
        os.environ["HOME"] = str(state)


@contextlib.contextmanager
def _as_owner(state: Path) -> Iterator[None]:
    """As root, be the owner of the state directory for a while."""
    owner = state.stat() if state.exists() else None
    if os.geteuid() != 0 or owner is None or owner.st_uid == 0:
        yield
        return
    groups, group = os.getgroups(), os.getegid()
    os.setgroups([])
    os.setegid(owner.st_gid)
    os.seteuid(owner.st_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)


def _identity(places: Paths, *, reads: bool = False) -> identity.Identity:
    """Become the owner of the state directory, and return the device's identity; `reads`: without writing there."""
    _become_owner(places.state)
    if places.state.exists() and not os.access(places.state, (0 if reads else os.W_OK) | os.X_OK):
        if is_read_only(places.state):
            raise UsageError(f"{places.state} is on a read-only file system: check the disk, then mount it writable")
        if places.state.stat().st_uid == os.geteuid():
            raise UsageError(f"{places.state} is not writable: check its mode and its file system")
        raise UsageError(f"{places.state} belongs to another user: run as that user, or give another --state")
    return identity.load(places.identity)


def _run(options: argparse.Namespace) -> int:
    from agent.clock import ReferenceClock  # noqa: PLC0415
    from agent.service import Enrolled, Links, build  # noqa: PLC0415 - only the service needs MQTT and TUF

    leave_first_process()
    places, settings = _places(options), options.settings
    read_only = is_read_only(places.state)  # instances go on, and nothing is recorded
    who = _identity(places, reads=read_only)
    if identity.is_copied_disk(who):
        raise UsageError(
            f"this disk was copied from device {who.device}, and two devices must not share an identity: "
            "run 'fleet-agent enroll --force' with a new token"
        )
    systemd.log_to_journal(
        logging.DEBUG if options.verbose else logging.INFO, places.log, device=who.device, fleet=who.fleet
    )
    if settings.production and not who.production:
        logging.getLogger("agent").warning(
            "the fleet is for development, but this device is in production mode: it accepts no assignment until the "
            "fleet has moved to production"
        )
    for problem in identity.damaged_files(places.identity):
        logging.getLogger("agent").error("%s", problem)
    try:
        root = files.read(places.identity / "root.json")
    except OSError:  # named above: what runs goes on, and nothing is accepted
        root = b""
    mac_key = images.load_key(places.identity / "mac.key")
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # keys must not get into core files

    enrolled = Enrolled(identity=who, root=root, mac_key=mac_key, places=places, settings=settings)

    async def main() -> int:
        with alone(places.lock):
            disk.remove_leftovers(places.state)
            reference = ReferenceClock(who.floor)
            db = Database(Store.renewed(places.database, version=device_info.agent_version()))
            if taken := await db(restore.take_over, places.runset, mac_key, now=reference.now()):
                logging.getLogger("agent").warning("the store was lost; took over %d instances from runset.json", taken)
            record = starts.Starts(places.starts, boot_id=clock.boot_id(), clock=clock.boot_clock)
            pause_s = starts.PAUSE_S if record.begin() else 0.0
            links = Links.of(enrolled, reference, broker_after_s=pause_s)
            code = await build(enrolled, db, reference, links).run()
            if code == 0:
                record.end()
            return code

    return asyncio.run(main())


def _apply(options: argparse.Namespace) -> int:
    from agent.link import bundle  # noqa: PLC0415 - only this command needs TUF

    places = _places(options)
    with files.open_to_read(options.file) as file:  # opened as root: only root may be able to read the medium
        who = _identity(places)
        try:
            bundle.stage(file, places.bundle, device=who.device)
        except bundle.BundleError as error:
            raise UsageError(str(error)) from error
    if not bundle.wake(places.wake):
        print("the agent does not run: it will apply the bundle when it starts")
        return 0
    deadline = time.monotonic() + options.wait
    outcome = places.bundle / "outcome.json"
    while not outcome.exists():
        if time.monotonic() >= deadline:
            raise UsageError(f"the bundle was not verified within {options.wait:g} s: see journalctl -u fleet-agent")
        time.sleep(APPLY_LOOK_S)
    found = msgspec.json.decode(files.read(outcome), type=bundle.BundleVerdict)
    if found.code:
        raise UsageError(f"the bundle was refused ({found.code}): {found.message}")
    print(f"assignment {found.version} is accepted; follow it with 'fleet-agent status'")
    return 0


def _restore(options: argparse.Namespace) -> int:
    places, settings = _places(options), options.settings
    _become_owner(places.state)
    if not (places.identity / "enrolled.json").exists():
        return 0  # a device that never enrolled has nothing to restore
    key = images.load_key(places.identity / "mac.key")
    items = restore.committed(places.database, places.runset, key)
    if not items:
        return 0
    policy = settings.policy
    sealed = SecretStore(places.secrets, places.identity / "sealing.key", identity.load(places.identity))
    made = images.ImageStore(places.images, key, memory_bytes=policy.compile_memory_bytes, seconds=policy.compile_s)

    async def main() -> list[restore.Restored]:
        link = HostClient(places.host_socket)
        welcome = await restore.wait_for_host(link, HOST_WAIT_S)
        try:
            return await restore.restore(link, welcome, items, made, places.artifacts, policy, sealed)
        finally:
            link.close()

    try:
        restored = asyncio.run(main())
    except HostGoneError as error:
        raise UsageError(f"{error}: start fleet-host first") from error
    while not made.damaged.empty():
        print(printable(made.damaged.get_nowait().message), file=sys.stderr)
    for each in restored:
        print(printable(f"{each.instance}: {each.problem or 'runs'}"), file=sys.stderr if each.problem else sys.stdout)
    return int(any(each.problem for each in restored))


def _read_status(options: argparse.Namespace, instance: str = "") -> status.StatusReport:
    """Read the status for people."""
    places = _places(options)
    who = _identity(places, reads=True)

    def warn(fault: str) -> None:
        print(printable(f"fleet-agent {options.command}: {fault}"), file=sys.stderr)

    return status.read_device(places, who, instance, warn=warn)


def _print_json(value: object) -> None:
    print(json_text(msgspec.json.format(msgspec.json.encode(value), indent=2).decode()))


def _print_lines(lines: Iterable[str]) -> None:
    """Print lines in which texts of the server and of components stand: none of them makes another line."""
    for line in lines:
        print(printable(readable(line)))


def _status(options: argparse.Namespace) -> int:
    found = _read_status(options)
    if options.json:
        _print_json(msgspec.structs.replace(found, timeline=()))
    else:
        _print_lines(status.format_status(found))
    return 0


def _why(options: argparse.Namespace) -> int:
    found = _read_status(options, options.instance)
    if options.instance and not (found.running or found.changing or found.failed or found.timeline):
        known = ", ".join(each.instance for each in _read_status(options).running) or "none"
        raise UsageError(f"no instance {options.instance!r} on this device; running: {known}")
    if options.json:
        _print_json(found)
    else:
        _print_lines([*status.format_status(found), "history, oldest first:", *status.format_timeline(found)])
    return 0


def _routes(options: argparse.Namespace) -> int:
    places = _places(options)
    _become_owner(options.state)

    async def ask() -> host_api.RouteList:
        link = HostClient(places.host_socket)
        try:
            welcome = await link.connect()
            if welcome.protocol < _LISTS_ROUTES:
                raise UsageError(f"the host ({welcome.version}) cannot list routes: systemctl restart fleet-host")
            return await link.ask(host_api.ListRoutes, host_api.RouteList)
        finally:
            link.close()

    try:
        found = asyncio.run(ask())
    except HostGoneError as error:
        raise UsageError(f"{error}: does fleet-host run? See systemctl status fleet-host") from error
    if options.json:
        _print_json({name: getattr(found, name) for name in ("ingress", "tls", "names", "routes")})
    else:
        _print_lines(status.format_routes(found))
    return 0


def _metrics(options: argparse.Namespace) -> int:
    from agent.report import metrics  # noqa: PLC0415 - only this command needs it

    down = ""
    try:
        found = metrics.fetch(_places(options).metrics_socket)
    except metrics.NoAnswerError as error:
        if options.textfile is None:
            raise UsageError(f"{error}: does fleet-agent run? See systemctl status fleet-agent") from error
        found, down = metrics.down(), str(error)
    if options.textfile is None:
        sys.stdout.write(found)
        return 0
    disk.write(Write.METRICS, options.textfile.absolute(), found, mode=0o644)
    if down:
        print(printable(f"fleet-agent metrics: {down}; {options.textfile} says so"), file=sys.stderr)
    return int(bool(down))


def _check(options: argparse.Namespace) -> int:
    settings = options.settings
    _become_owner(options.state)
    results = check.run_checks(_places(options), settings)
    if options.json:
        _print_json(results)
    else:
        _print_lines(f"{'ok  ' if each.ok else 'FAIL'} {each.name}: {each.text}" for each in results)
    return int(not all(each.ok for each in results))


def _diagnose(options: argparse.Namespace) -> int:
    from agent.report import diagnose  # noqa: PLC0415 - only this command needs it

    if str(options.output) == "-":
        raise UsageError("the archive does not go to standard output: give a file's name with -o")
    places = _places(options)
    as_owner = partial(_as_owner, places.state)
    faults: list[str] = []
    with as_owner():
        try:
            who = _identity(places, reads=True)
            found = status.read_device(places, who, rows=HISTORY_ROWS, warn=faults.append)
        except (identity.IdentityError, StoreError) as error:  # the rest is wanted all the more
            found = status.unknown(str(error))
    subject = diagnose.Subject(places, options.host_state, options.settings, found, as_owner)
    try:
        members = diagnose.write(subject, options.output)
    except OSError as error:
        raise UsageError(f"cannot write {options.output}: {error.strerror}; give another file with -o") from error
    _print_lines([*members, *faults, *(() if found.device else found.problems)])
    if os.geteuid() != 0:
        print("run as root, the archive also has the kernel's log and all lines of the instances")
    print(f"wrote {options.output}: it holds names, addresses and log lines, and no key; read it before you pass it on")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run `fleet-agent`; return its exit code."""
    return until_closed(lambda: _main(arguments))


def _main(arguments: list[str] | None) -> int:
    options = parse(_parser(), COMMAND_EXAMPLES, arguments)
    try:
        # before a command becomes another user; the default alone may be missing
        options.settings = config.load(options.config, required=options.config is not CONFIG_FILE)
        return int(options.run(options))
    except ERRORS as error:
        print(printable(f"fleet-agent {options.command}: {error}"), file=sys.stderr)
        return 1
    except BrokenPipeError:  # of standard output
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"fleet-agent {options.command}: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

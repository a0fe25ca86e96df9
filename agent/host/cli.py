"""`fleet-host`: run the WebAssembly host of a device, or report its engine and isolation layers."""

import argparse
import asyncio
import contextlib
import grp
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from agent import disk
from agent.arguments import leave_first_process, parse, until_closed
from agent.disk import Write
from agent.host import hardware_check
from agent.host.http.ingress_config import DEFAULT_FILE
from agent.host.ipc import host_api
from agent.host.sandbox import sandbox
from agent.host.supervisor import worker_pool
from agent.host.supervisor.supervisor import VERSION, HostError, HostSettings, IsolationError, Supervisor, TakenError
from fleet.protocol import wire
from fleet.protocol.bounds import MIB
from fleet.protocol.component_check import ComponentCheckRequest
from fleet.protocol.files import is_read_only

_DEFAULT_STATE: Final = "/var/lib/wasmfleet-host"
_DEFAULT_INGRESS: Final = "127.0.0.1:8080"
_STATUS_BELOW_MINIMUM: Final = 78  # EX_CONFIG of sysexits.h: a restart would not help

EXAMPLES: Final = """examples:
  fleet-host check                                   show engine, isolation layers and hardware of this device
  fleet-host check-component hello.wasm              say whether this machine's host could start a component
  fleet-host processes                               show memory, threads and files of agent and host, by process
  fleet-host run                                     run with the paths of the package, as root
  fleet-host run --state ~/device/host --runtime ~/device/run
  fleet-host run --ingress 0.0.0.0:8080              let other machines call components
  fleet-host run --minimum baseline --require all    refuse components if any isolation layer is missing
"""


def _address(text: str) -> tuple[str, int] | None:
    if text == "none":
        return None
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or not 0 <= int(port) < 65536:  # noqa: PLR2004
        raise argparse.ArgumentTypeError(f"{text!r} is not ADDRESS:PORT, such as 127.0.0.1:8080 (port 0: any), or none")
    return host.strip("[]") or "127.0.0.1", int(port)


COMMANDS: Final = ("run", "check", "check-component", "dev", "processes")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fleet-host",
        description="Run the WebAssembly host of a device, or check what the device supports.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fleet-host {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run components as the agent directs")
    _add_runtime(run)
    run.add_argument(
        "--state",
        type=Path,
        default=_DEFAULT_STATE,
        metavar="DIR",
        help="state directory (default: %(default)s)",
    )
    run.add_argument(
        "--ingress",
        type=_address,
        default=_DEFAULT_INGRESS,
        metavar="ADDRESS:PORT",
        help="shared HTTP port, or none (default: %(default)s)",
    )
    run.add_argument(
        "--ingress-config",
        type=Path,
        metavar="FILE",
        help="routes, limits and certificates of the shared port; read again on SIGHUP (default: "
        f"{DEFAULT_FILE}, if it exists)",
    )
    run.add_argument(
        "--require",
        type=_layers,
        default=frozenset(),
        metavar="LAYERS",
        help="run no component unless these isolation layers hold: baseline (all but landlock and cgroup), all, none, "
        "or names joined by commas (see fleet-host check)",
    )
    run.add_argument(
        "--minimum",
        type=_layers,
        default=frozenset(),
        metavar="LAYERS",
        help=f"exit with status {_STATUS_BELOW_MINIMUM} unless these isolation layers hold; named as for --require",
    )
    run.add_argument(
        "--agent-group",
        type=_group,
        metavar="GROUP",
        help="let members of this group command the host, besides root and its own user",
    )
    check_ = commands.add_parser(
        "check", help="report the engine, the isolation layers and the hardware of this device"
    )
    check_.add_argument(
        "--config",
        type=Path,
        default=hardware_check.CONFIG,
        metavar="FILE",
        help="the agent's configuration, whose policy names hardware for components (default: %(default)s)",
    )
    shown = commands.add_parser(
        "processes",
        help="show memory, threads, open files and start of the agent's and the host's processes",
        description="Show memory in MB, threads, open files and start (UTC) of each process of the agent and the host. "
        "PRIVATE is memory that no other process has; PSS divides what several share among them, so that its sum is "
        "what all take together. As root: components' processes let nobody else read theirs.",
    )
    _add_runtime(shown)
    shown.add_argument("--json", action="store_true", help="print JSON for programs")
    judge = commands.add_parser(
        "check-component",
        help="compile, link and start components as a device does; print a JSON line for each",
        description="Compile, link and start components as a device does, each in a process of its own, and print a "
        "JSON line for each. Exit with status 1 if one is refused, 2 if a request is not valid.",
        epilog="Without FILE, requests are read from standard input, one JSON line for each component: "
        '{"file": "hello.wasm", "manifest": {...}}. Without a manifest, everything that a device serves is granted.',
    )
    judge.add_argument("file", nargs="*", metavar="FILE", help="component to check")
    local = commands.add_parser(
        "dev",
        help="run one component for its author; requests and events are JSON lines",
        description="Run one component on a host of its own, as on a device, for 'fleet component run': each line of "
        "standard input asks for a version, which takes over from the one before; events go to standard output. Ends "
        "with standard input.",
    )
    local.add_argument(
        "--directory", type=Path, required=True, metavar="DIR", help="directory for sockets and state of this run"
    )
    local.add_argument(
        "--ingress",
        type=_address,
        default=_DEFAULT_INGRESS,
        metavar="ADDRESS:PORT",
        help="HTTP port (default: %(default)s)",
    )
    return parser


def _add_runtime(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--runtime",
        type=Path,
        default=host_api.RUNTIME,
        metavar="DIR",
        help="directory of the host's sockets (default: %(default)s)",
    )


def _group(text: str) -> int:
    try:
        return int(text) if text.isdigit() else grp.getgrnam(text).gr_gid
    except KeyError:
        raise argparse.ArgumentTypeError(f"there is no group {text!r} here") from None


def _layers(text: str) -> frozenset[str]:
    known = (*sandbox.LAYERS, "cgroup")
    short = {"": (), "none": (), "baseline": sandbox.BASELINE, "all": known}
    names = frozenset(short.get(text, text.split(",")))
    unknown = sorted(names - set(known))
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not an isolation layer; known are {', '.join(known)}")
    return names


def _own_directory(path: Path, what: str, mode: int) -> None:
    try:
        disk.make_directory(Write.DIRECTORY, path, mode=mode)
        owner = path.stat().st_uid
    except OSError as error:
        raise HostError(
            f"cannot use {path} as the {what} directory: {error.strerror}; give another with --{what}"
        ) from error
    if what == "state" and is_read_only(path):
        # instances start again: nothing of a start needs a write
        sys.stderr.write(f"host: {path} is on a read-only file system: nothing is kept over a restart\n")
        return
    if owner == os.geteuid() and not os.access(path, os.W_OK | os.X_OK):
        raise HostError(f"the {what} directory {path} is not writable: check its mode and its file system")
    if owner not in {os.geteuid(), 0} or not os.access(path, os.W_OK | os.X_OK):
        raise HostError(
            f"the {what} directory {path} belongs to another user (uid {owner}); give another one with --{what}"
        )


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return until_closed(lambda: _main(arguments))


def _main(arguments: list[str] | None) -> int:
    options = parse(_parser(), COMMANDS, arguments)
    if options.command == "check":
        return check(options.config)
    if options.command == "check-component":
        return check_components(options.file)
    if options.command == "dev":
        return serve_author(options.directory, options.ingress)
    if options.command == "processes":
        return show_processes(options.runtime, as_json=options.json)
    leave_first_process()
    try:
        _own_directory(options.runtime, "runtime", 0o700 if options.agent_group is None else 0o750)
        _own_directory(options.state, "state", 0o700)
        settings = HostSettings(
            runtime=options.runtime,
            state=options.state,
            ingress=options.ingress,
            require=options.require,
            minimum=options.minimum,
            agent_group=options.agent_group,
            ingress_config=options.ingress_config,
        )
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # memory of instances must not get into core files
        asyncio.run(_run(settings))
    except HostError as error:
        sys.stderr.write(f"fleet-host: {error}\n")
        if not isinstance(error, TakenError):
            _write_reason(options.runtime, str(error))
        return _STATUS_BELOW_MINIMUM if isinstance(error, IsolationError) else 1
    return 0


def _write_reason(runtime: Path, why: str) -> None:
    """Write the reason why the host does not start to a file, from which the agent reports it."""
    with contextlib.suppress(OSError):
        path = runtime / host_api.WHY_NOT
        path.write_text(why + "\n", encoding="utf-8")
        path.chmod(0o644)


def check(config: Path) -> int:
    """Print the engine, the isolation layers and the hardware for components; return 1 if none can run at all."""
    describe = [*worker_pool.python_argv("agent.host.compiler"), "--describe"]
    done = subprocess.run(describe, capture_output=True, text=True, check=False, timeout=120)
    facts = json.loads(done.stdout) if done.returncode == 0 else {}
    if facts:
        print(f"engine       wasmtime {facts['engine']}, {facts['triple']}")
        reserved, guard = (int(part) for part in facts["memory"].split("+"))
        print(f"memories     {reserved // MIB} MiB reserved and {guard // MIB} MiB guarded for each")
    else:
        print("engine       none for this device: components are refused")
    try:
        layers = sandbox.probe()
    except sandbox.SandboxError as error:
        print(f"isolation    none: {error}: components are refused")
        return 1
    here = sandbox.way(layers)
    print(f"isolation    of workers, by the way the host runs; tested now, as a {here}:")
    print("\n".join(sandbox.isolation_report(here, layers)))
    if missing := sandbox.needs_of([layer for layer, there in layers.items() if not there]):
        print(f"missing      {missing}")
    for line in hardware_check.report(config):
        print(line)
    return 0 if facts else 1


def check_components(files: list[str]) -> int:
    """Check components and print a JSON line for each; return 1 if one is refused, 2 for a bad request."""
    from agent.host.compiler import component_check  # noqa: PLC0415 - a running host has no use for it

    refused = False
    lines: Iterable[bytes] = sys.stdin.buffer
    if files:
        lines = (msgspec.json.encode(ComponentCheckRequest(file=file)) for file in files)
    for number, line in enumerate(lines, 1):
        try:
            request = msgspec.json.decode(line, type=ComponentCheckRequest)
        except wire.JSON_ERRORS as error:
            how = 'write {"file": "hello.wasm"}, or see fleet-host check-component --help'
            sys.stderr.write(f"fleet-host: line {number} is no request: {error}; {how}\n")
            return 2
        reply = component_check.check(request, worker_pool.python_argv)
        sys.stdout.buffer.write(msgspec.json.encode(reply) + b"\n")
        sys.stdout.buffer.flush()
        refused = refused or not reply.ok
    return int(refused)


def serve_author(directory: Path, ingress: tuple[str, int] | None) -> int:
    """Run what standard input asks for, until it ends; return the exit status."""
    from agent.host import dev  # noqa: PLC0415 - a running host has no use for it

    host, port = ingress or ("127.0.0.1", 8080)
    try:
        return dev.serve(directory, f"{host}:{port}")
    except dev.DevError as error:
        sys.stderr.write(f"fleet-host: {error}\n")
        return 1


def show_processes(runtime: Path, *, as_json: bool) -> int:
    """Print the processes of agent and host; return 1 if there are none."""
    from agent.host import processes  # noqa: PLC0415 - a running host has no use for it

    found = processes.read(runtime)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
    elif found:
        print("\n".join(processes.table(found)))
        if any(each.private_bytes is None for each in found):
            print("run as root for the memory and files of every process")
    if not found:
        sys.stderr.write(f"fleet-host: neither agent nor host runs with {runtime}; give another with --runtime\n")
    return int(not found)


async def _run(settings: HostSettings) -> None:
    await Supervisor(settings).run()


if __name__ == "__main__":
    sys.exit(main())

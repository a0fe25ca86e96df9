"""Fleet, server and devices of the demo, started by the project's own commands, and their processes.

Three safeguards keep the demo from leaving processes behind. Each child ends when this process dies (PR_SET_PDEATHSIG).
Each child leads a process group, so that its own children end with it. This process adopts orphans
(PR_SET_CHILD_SUBREAPER), so that a grandchild whose parent died is found and ended, whatever its group.
"""

import asyncio
import contextlib
import ctypes
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from fleet.client import Client, ClientError
from fleet.protocol import operator_api

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_GRACE_S: Final = 10.0
_libc: Final = ctypes.CDLL(None, use_errno=True)

READY_S: Final = 60.0
_POLL_S: Final = 0.1
_SHORT_CHARS: Final = 48

FLEET: Final = "fleet.cli.main"
AGENT: Final = "agent.cli"
HOST: Final = "agent.host.cli"

T = TypeVar("T")

_RANGE: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST: Final = 10_000
_TRIES: Final = 1000


class ChildDiedError(Exception):
    """Unexpected end of a process; the message has its exit code and last lines."""


@dataclass(frozen=True, slots=True)
class Child:
    """Process that runs until it is stopped, and its command."""

    name: str
    command: tuple[str, ...]
    process: asyncio.subprocess.Process
    log: Path

    def check(self) -> None:
        """Raise `ChildDiedError` if it has ended."""
        if self.process.returncode is not None:
            raise ChildDiedError(
                f"{self.name} ended with exit code {self.process.returncode}; the end of {self.log}:\n{tail(self.log)}"
            )


class Finished(NamedTuple):
    """Result of a process: exit code, standard output, standard error."""

    code: int
    output: str
    errors: str


class Processes:
    """Owner of the child processes.

    Args:
        logs: directory for one log file a process.
        environment: of every child.
    """

    def __init__(self, *, logs: Path, environment: Mapping[str, str]) -> None:
        self._logs = logs
        self._environment = dict(environment)
        self._children: list[Child] = []
        self._known = set(_children_of(os.getpid()))
        logs.mkdir(parents=True, exist_ok=True)
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    async def start(self, name: str, command: Sequence[str]) -> Child:
        """Start a process that runs until `stop_all`; its output goes to `<name>.log`."""
        log = self._logs / f"{name}.log"
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environment,
                start_new_session=True,
                preexec_fn=_die_with(os.getpid()),
            )
        child = Child(name, tuple(command), process, log)
        self._children.append(child)
        return child

    async def run(self, command: Sequence[str], *, stdin: bytes | None = None, show: bool = False) -> Finished:
        """Run a process to its end.

        Args:
            command: program and arguments.
            stdin: its standard input.
            show: let the command write to this process's output; both texts are then empty.
        """
        pipe = None if show else asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL if stdin is None else asyncio.subprocess.PIPE,
            stdout=pipe,
            stderr=pipe,
            env=self._environment,
            start_new_session=True,
            preexec_fn=_die_with(os.getpid()),
        )
        try:
            out, err = await process.communicate(stdin)
        except asyncio.CancelledError:
            await _end(process)
            raise
        assert process.returncode is not None
        return Finished(
            process.returncode, (out or b"").decode(errors="replace"), (err or b"").decode(errors="replace")
        )

    async def stop_all(self) -> None:
        """End every child, the last one started first, then the processes that they left behind."""
        for child in reversed(self._children):
            await _end(child.process)
        self._children.clear()
        while strays := [pid for pid in _children_of(os.getpid()) if pid not in self._known]:
            for pid in strays:
                _kill_and_reap(pid)


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a process: SIGTERM, time to end in order, SIGKILL for the whole group."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GRACE_S):
                await process.wait()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def _kill_and_reap(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def _children_of(pid: int) -> list[int]:
    """List the direct children of every thread."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found += [int(word) for word in (task / "children").read_text().split()]
    return found


def _die_with(parent: int) -> Callable[[], None]:
    """Make the child, between fork and exec, end with `parent`, also if that has ended already."""

    def prepare() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def tail(log: Path, lines: int = 15) -> str:
    """Return the last lines of a log, indented."""
    try:
        text = log.read_text(errors="replace").splitlines()[-lines:]
    except OSError as error:
        return f"  (cannot be read: {error.strerror})"
    return "\n".join(f"  {line}" for line in text) or "  (empty)"


def python_environment(**more: str) -> dict[str, str]:
    """Return an environment in which a child imports the same packages as this process."""
    own = str(Path(__file__).resolve().parents[2])
    rest = os.environ.get("PYTHONPATH", "")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in (own, rest) if part), **more}


def module(name: str, *arguments: str) -> list[str]:
    """Return the command line that runs one of this project's command modules with this Python."""
    return [sys.executable, "-P", "-m", name, *arguments]


class DemoError(Exception):
    """Failure that ends the demo; the message names the command and has its output."""


@dataclass(frozen=True, slots=True)
class DemoDevice:
    """Device of the demo: an agent and a host with directories of their own.

    Attributes:
        device: its id in the fleet.
        port: of its ingress, on loopback.
    """

    name: str
    device: str
    group: str
    port: int
    agent: Child
    host: Child

    def url(self, instance: str = "") -> str:
        """Return the URL of the device's ingress, or of an instance on it."""
        return f"http://127.0.0.1:{self.port}/{instance + '/' if instance else ''}"


class Environment:
    """Server and devices of the demo.

    Args:
        directory: for the fleet, the devices and the logs.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.home = directory / "fleet"
        # A socket path has at most 108 bytes; the directory given may be longer.
        short = len(str(directory)) <= _SHORT_CHARS
        self._runtime = directory / "run" if short else Path(tempfile.mkdtemp(prefix="wf-"))
        self.processes = Processes(
            logs=directory / "logs", environment=python_environment(WASMFLEET_HOME=str(self.home))
        )
        self.devices: list[DemoDevice] = []
        self._server: Child | None = None
        self._client: Client | None = None

    async def close(self) -> None:
        """End every process and remove their runtime files."""
        if self._client is not None:
            self._client.__exit__(None, None, None)
        await self.processes.stop_all()
        shutil.rmtree(self._runtime, ignore_errors=True)

    async def command(self, *arguments: str, stdin: bytes | None = None) -> str:
        """Run `fleet ...` to its end and return what it printed.

        Raises:
            DemoError: it failed.
        """
        return await self._checked(FLEET, arguments, stdin)

    async def shown(self, *arguments: str) -> int:
        """Run `fleet ...` on this process's own terminal; returns its exit code."""
        return (await self.processes.run(module(FLEET, *arguments), show=True)).code

    async def _checked(self, what: str, arguments: tuple[str, ...], stdin: bytes | None = None) -> str:
        code, output, errors = await self.processes.run(module(what, *arguments), stdin=stdin)
        if code != 0:
            name = {FLEET: "fleet", AGENT: "fleet-agent", HOST: "fleet-host"}[what]
            raise DemoError(f"{name} {' '.join(arguments)} ended with exit code {code}: {(errors or output).strip()}")
        return output

    async def make_fleet(self, *, broker: str = "auto") -> None:
        """Run `fleet init --dev` on free ports."""
        operators, devices, mqtt = free_ports(3)
        ports = ["--operators-port", str(operators), "--devices-port", str(devices), "--mqtt-port", str(mqtt)]
        await self.command("init", "--dev", "--fleet", "demo", "--broker", broker, *ports)

    async def serve(self) -> operator_api.Status:
        """Start `fleet serve` and wait for its first answer with the broker connected."""
        self._server = await self.processes.start("server", module(FLEET, "serve"))
        await asyncio.to_thread(self._connect)
        return await self.eventually("the server answers, with its broker", lambda: self._ready(self.client.status()))

    @staticmethod
    def _ready(status: operator_api.Status) -> operator_api.Status | None:
        return status if status.broker_connected else None

    def _connect(self) -> None:
        operator = self.home / "operator"
        url = str(tomllib.loads((operator / "config.toml").read_text())["url"])
        self._client = Client(
            url=url, ca=operator / "ca.pem", token=(operator / "token").read_text().strip(), clean=True
        )

    @property
    def client(self) -> Client:
        """Connection to the demo's server."""
        assert self._client is not None, "call serve() first"
        return self._client

    async def ask(self, question: Callable[[Client], T]) -> T:
        """Call the client in a thread, off the event loop."""
        return await asyncio.to_thread(question, self.client)

    async def eventually(self, what: str, question: Callable[[], T | None]) -> T:
        """Repeat a question until the answer is not None.

        Raises:
            DemoError: not within a minute.
            ChildDiedError: one of the processes ended meanwhile.
        """
        error = "no answer yet"
        loop = asyncio.get_running_loop()
        until = loop.time() + READY_S
        while loop.time() < until:
            self.check()
            try:
                answer = await asyncio.to_thread(question)
            except ClientError as failure:
                answer, error = None, str(failure)
            else:
                error = "not yet"
            if answer is not None:
                return answer
            await asyncio.sleep(_POLL_S)
        raise DemoError(f"waited {READY_S:.0f} s until {what}: {error}; see {self.directory / 'logs'}")

    def check(self) -> None:
        """Raise `ChildDiedError` when a process that should run has ended."""
        children = [child for device in self.devices for child in (device.agent, device.host)]
        for child in (*children, *([self._server] if self._server else [])):
            child.check()

    async def add_device(self, name: str, group: str) -> DemoDevice:
        """Start a host, enrol with a one-time token on standard input, and start the agent."""
        here = self.directory / "devices" / name
        state, runtime, config = here / "agent", self._runtime / name, here / "agent.toml"
        await asyncio.to_thread(_make_device, here, runtime, name)
        port = free_ports(1)[0]
        host = await self.processes.start(
            f"{name}-host",
            module(
                HOST, "run", "--runtime", str(runtime), "--state", str(here / "host"), "--ingress", f"127.0.0.1:{port}"
            ),
        )
        token = await self.command("enroll-token", "--group", group, "--quiet")
        places = ("--state", str(state), "--runtime", str(runtime), "--config", str(config))
        await self._checked(AGENT, ("enroll", *places), token.encode())
        await self._checked(AGENT, ("restore", *places))
        agent = await self.processes.start(f"{name}-agent", module(AGENT, "run", *places))
        row = await self.eventually(f"{name} is online", lambda: self._online(name, agent, host))
        device = DemoDevice(name=name, device=row.id, group=group, port=port, agent=agent, host=host)
        self.devices.append(device)
        return device

    def _online(self, name: str, *children: Child) -> operator_api.DeviceRow | None:
        for child in children:
            child.check()
        return next((row for row in self.client.devices().devices if row.name == name and row.online), None)


def _make_device(here: Path, runtime: Path, name: str) -> None:
    for directory in (here / "agent", here / "host", runtime):
        directory.mkdir(mode=0o700, parents=True)
    (here / "agent.toml").write_text(f'name = "{name}"\nhealth_s = 5.0\n', encoding="utf-8")


def program(name: str) -> str:
    """Return the name of a command of this project, or its path where it is not on PATH."""
    if shutil.which(name):
        return name
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else f"{sys.executable} -m {FLEET}"


def free_ports(count: int) -> list[int]:
    """Find free loopback ports that the kernel does not assign to outgoing connections meanwhile.

    Outgoing connections get ports of `ip_local_port_range`; these lie below that range.

    Raises:
        OSError: no port is free.
    """
    below = int(_RANGE.read_text(encoding="ascii").split()[0])
    # where the range leaves no room below it, the kernel chooses
    ports = random.SystemRandom().sample(range(_LOWEST, below), k=_TRIES) if below > 2 * _LOWEST else [0] * count
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        for port in ports:
            if len(found) == count:
                break
            sock = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                sock.bind(("127.0.0.1", port))
                found.append(int(sock.getsockname()[1]))
    if len(found) < count:
        raise OSError("no free port on the loopback interface")
    return found

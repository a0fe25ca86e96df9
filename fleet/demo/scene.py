"""The demo's stage: a fleet, its server and its boards, started as a person would, by this project's commands."""

import asyncio
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from fleet.client import Client, ClientError
from fleet.demo.ports import free_ports
from fleet.demo.processes import Child, Processes, module, python_environment
from fleet.protocol import api

READY_S: Final = 60.0
_POLL_S: Final = 0.1
_SHORT_CHARS: Final = 48

FLEET: Final = "fleet.cli.main"
AGENT: Final = "agent.cli"
HOST: Final = "agent.host.cli"

T = TypeVar("T")


class DemoError(Exception):
    """The demo cannot go on; the message says at which command, and what it said."""


@dataclass(frozen=True, slots=True)
class Board:
    """One board: an agent and a host with directories of their own.

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
        """The board's ingress, or where an instance answers on it."""
        return f"http://127.0.0.1:{self.port}/{instance + '/' if instance else ''}"


class Scene:
    """Everything the demo has started.

    Args:
        directory: for the fleet, the boards and the logs.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.home = directory / "fleet"
        # Socket paths are short by law (108 bytes), and the directory given may not be.
        short = len(str(directory)) <= _SHORT_CHARS
        self._runtime = directory / "run" if short else Path(tempfile.mkdtemp(prefix="wf-"))
        self.processes = Processes(
            logs=directory / "logs", environment=python_environment(WASMFLEET_HOME=str(self.home))
        )
        self.boards: list[Board] = []
        self._server: Child | None = None
        self._client: Client | None = None

    async def close(self) -> None:
        """End every process and remove what only they needed."""
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
        """Run `fleet ...` on this process's own terminal; its exit code."""
        code, _, _ = await self.processes.run(module(FLEET, *arguments), show=True)
        return code

    async def _checked(self, what: str, arguments: tuple[str, ...], stdin: bytes | None = None) -> str:
        code, output, errors = await self.processes.run(module(what, *arguments), stdin=stdin)
        if code != 0:
            name = {FLEET: "fleet", AGENT: "fleet-agent", HOST: "fleet-host"}[what]
            raise DemoError(f"{name} {' '.join(arguments)} ended with exit code {code}: {(errors or output).strip()}")
        return output

    async def make_fleet(self, *, broker: str = "auto") -> None:
        """`fleet init --dev`, on ports that are free."""
        operators, devices, mqtt = free_ports(3)
        ports = ["--operators-port", str(operators), "--devices-port", str(devices), "--mqtt-port", str(mqtt)]
        await self.command("init", "--dev", "--fleet", "demo", "--broker", broker, *ports)

    async def serve(self) -> api.Status:
        """`fleet serve`, up to its first answer with the broker connected."""
        self._server = await self.processes.start("server", module(FLEET, "serve"))
        await asyncio.to_thread(self._connect)
        return await self.eventually("the server answers, with its broker", lambda: self._ready(self.client.status()))

    @staticmethod
    def _ready(status: api.Status) -> api.Status | None:
        return status if status.broker_connected else None

    def _connect(self) -> None:
        operator = self.home / "operator"
        url = str(tomllib.loads((operator / "config.toml").read_text())["url"])
        self._client = Client(url=url, ca=operator / "ca.pem", token=(operator / "token").read_text().strip())

    @property
    def client(self) -> Client:
        """A connection to the demo's server."""
        assert self._client is not None, "serve first"
        return self._client

    async def ask(self, question: Callable[[Client], T]) -> T:
        """Ask the server something, off the event loop."""
        return await asyncio.to_thread(question, self.client)

    async def eventually(self, what: str, question: Callable[[], T | None]) -> T:
        """Ask until the answer is not None.

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
                error = "not so"
            if answer is not None:
                return answer
            await asyncio.sleep(_POLL_S)
        raise DemoError(f"waited {READY_S:.0f} s until {what}: {error}; see {self.directory / 'logs'}")

    def check(self) -> None:
        """Raise `ChildDiedError` when a process that should run has ended."""
        children = [child for board in self.boards for child in (board.agent, board.host)]
        for child in (*children, *([self._server] if self._server else [])):
            child.check()

    async def add_board(self, name: str, group: str) -> Board:
        """Start a host, enrol with a one-time token on standard input, and start the agent."""
        here = self.directory / "boards" / name
        state, runtime, config = here / "agent", self._runtime / name, here / "agent.toml"
        await asyncio.to_thread(_make_board, here, runtime, name)
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
        board = Board(name=name, device=row.id, group=group, port=port, agent=agent, host=host)
        self.boards.append(board)
        return board

    def _online(self, name: str, *children: Child) -> api.DeviceRow | None:
        for child in children:
            child.check()
        return next((row for row in self.client.devices().devices if row.name == name and row.online), None)


def _make_board(here: Path, runtime: Path, name: str) -> None:
    for directory in (here / "agent", here / "host", runtime):
        directory.mkdir(mode=0o700, parents=True)
    (here / "agent.toml").write_text(f'name = "{name}"\nhealth_s = 5.0\n', encoding="utf-8")


def program(name: str) -> str:
    """How a person on this machine starts a command of this project: its name, or its path where PATH has none."""
    if shutil.which(name):
        return name
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else f"{sys.executable} -m {FLEET}"

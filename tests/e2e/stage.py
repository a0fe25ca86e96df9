"""Fleet of real processes for the end-to-end tests: the demo's scene, with parts that can be broken and repaired.

with Stage(directory) as stage:
    stage.do(stage.push("v1.wasm"))
"""

import asyncio
import base64
import dataclasses
import json
import signal
import sqlite3
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
import wasmtime

from fleet.demo.environment import AGENT, FLEET, Child, DemoDevice, Environment, module
from fleet.demo.load import Load
from fleet.demo.scenario import fixture
from fleet.protocol import operator_api
from fleet.protocol.codes import Phase, RejectCode
from tests.eventually import eventually_async

GROUP = "edge-eu"
HELLO = "hello"
BEGINNING = datetime.min.replace(tzinfo=UTC)
T = TypeVar("T")


class Stage:
    """One fleet with its server and as many devices as a test adds; everything is gone on leaving.

    Attributes:
        scene: the demo's scene underneath.
    """

    def __init__(self, directory: Path) -> None:
        self._runner = asyncio.Runner()
        self._directory = directory
        self.scene = self.do(self._make())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.do(self.scene.close())
        finally:
            self._runner.close()

    def do(self, story: Coroutine[Any, Any, T]) -> T:
        """Play a part of the test's story on the stage's event loop."""
        return self._runner.run(story)

    async def _make(self) -> Environment:
        scene = Environment(self._directory)
        await scene.make_fleet()
        await scene.serve()
        return scene

    # -- what an operator does -------------------------------------------------------------------------------------

    async def fleet(self, *arguments: str, stdin: bytes | None = None) -> tuple[int, str, str]:
        """Run `fleet ...`: exit code, output, errors."""
        return await self.scene.processes.run(module(FLEET, *arguments), stdin=stdin)

    async def push(self, component: str | Path, *arguments: str, group: str = GROUP) -> tuple[int, str, str]:
        """`fleet push` of one of the demo's components, or of a file."""
        file = fixture(component) if isinstance(component, str) else component
        return await self.fleet("push", str(file), "--as", HELLO, "--group", group, "--waves", "100%", *arguments)

    async def pushed(self, component: str | Path, *arguments: str) -> None:
        """`push` that must succeed."""
        code, output, errors = await self.push(component, *arguments)
        assert code == 0, output + errors

    async def newest_rollout(self) -> operator_api.RolloutView:
        """The rollout that was made last."""
        found = await self.scene.ask(lambda client: client.rollouts(limit=1).rollouts[0].id)
        return await self.scene.ask(lambda client: client.rollout(found))

    async def until(self, what: str, question: Callable[[], T | None]) -> T:
        """Wait until the server's answer to `question` is not None."""
        return await self.scene.eventually(what, question)

    async def reported(
        self,
        *devices: DemoDevice,
        code: RejectCode | None = None,
        phase: Phase | None = None,
        after: datetime = BEGINNING,
    ) -> operator_api.TimelineEntry:
        """Wait for a report of one of the devices with a code or in a phase, later than `after` (see `latest`)."""

        def seen() -> operator_api.TimelineEntry | None:
            entries = [e for each in devices for e in self.scene.client.timeline(each.device, limit=200).entries]
            wanted = (each for each in entries if each.kind == "report" and each.at > after)
            return next(
                (e for e in wanted if (code is None or e.code == code) and (phase is None or e.phase == phase)), None
            )

        return await self.until(f"{' or '.join(each.name for each in devices)} reports {code or phase}", seen)

    async def latest(self, device: DemoDevice) -> datetime:
        """When the newest thing in a device's timeline happened."""
        return (await self.scene.ask(lambda client: client.timeline(device.device, limit=1))).entries[0].at

    async def push_meter(self, device: DemoDevice) -> None:
        """Push the component that publishes, and wait until it answers."""
        file = await asyncio.to_thread(meter, self._directory)
        words = ("--as", METER, "--group", GROUP, "--waves", "100%")
        code, output, errors = await self.fleet("push", str(file), *words)
        assert code == 0, output + errors
        await eventually_async(lambda: asyncio.to_thread(publish, device, 0), "the component publishes")

    async def messages(self) -> list[int]:
        """Numbers that the component published and the operator is shown, as they came; zeros are left out."""
        code, output, errors = await self.fleet("--json", "messages", "--since", "1h", "--group", GROUP)
        assert code == 0, output + errors
        found = [json.loads(line) for line in output.splitlines()]
        assert [each["sequence"] for each in found] == sorted({each["sequence"] for each in found})
        assert {(each["instance"], each["topic"]) for each in found} <= {(METER, "plant/counter")}
        return [number for each in found if (number := int(base64.b64decode(each["data"])))]

    # -- what is asked of a device ----------------------------------------------------------------------------------

    async def version(self, device: DemoDevice) -> str:
        """Which version answers on a device now; empty when none does."""
        async with Load(port=device.port, path=f"/{HELLO}/", kept_alive=0, fresh=1) as load:
            await load.sent(1)
            return next(iter((await load.stop()).by_version), "")

    async def answers(self, device: DemoDevice, version: str) -> None:
        """Wait until a version answers on a device."""
        async with Load(port=device.port, path=f"/{HELLO}/", kept_alive=0, fresh=1, pause_s=0.05) as load:
            async with asyncio.timeout(60):
                await load.seen(version)

    def state(self, device: DemoDevice) -> Path:
        """The agent's state directory."""
        return self.scene.directory / "devices" / device.name / "agent"

    # -- what breaks, and is mended --------------------------------------------------------------------------------

    async def kill(self, child: Child) -> None:
        """SIGKILL, as a power cut of one process; returns when it is gone."""
        child.process.send_signal(signal.SIGKILL)
        await child.process.wait()

    async def stop(self, child: Child) -> None:
        """SIGTERM, as `systemctl stop`; returns when it is gone."""
        child.process.terminate()
        await child.process.wait()

    async def start_host(self, device: DemoDevice, *, restore: bool = True) -> DemoDevice:
        """Start a device's host again, and `fleet-agent restore` after it, as the unit does."""
        host = await self.scene.processes.start(device.host.name, device.host.command)
        device = self._now(device, host=host)
        if not restore:
            return device
        places = device.agent.command[device.agent.command.index("--state") :]
        code, _, errors = await self.scene.processes.run(module(AGENT, "restore", *places))
        assert code == 0, errors
        return device

    async def start_agent(self, device: DemoDevice) -> DemoDevice:
        """Start a device's agent again."""
        return self._now(device, agent=await self.scene.processes.start(device.agent.name, device.agent.command))

    def _now(self, device: DemoDevice, **changed: Child) -> DemoDevice:
        again = dataclasses.replace(device, **changed)
        index = next(i for i, each in enumerate(self.scene.devices) if each.device == device.device)
        self.scene.devices[index] = again
        return again

    async def restart_server(self, *, harm: Callable[[sqlite3.Connection], object] | None = None) -> None:
        """Stop `fleet serve` (SIGKILL), let `harm` change its database, and start it again."""
        server = self.scene._server
        assert server is not None
        await self.kill(server)
        if harm is not None:
            with sqlite3.connect(self.scene.home / "server" / "fleet.db") as database:
                harm(database)
        await self.scene.serve()

    def published(self, version: str) -> operator_api.ComponentRow:
        """A published version of the demo's component."""
        rows = self.scene.client.components().components
        return next(row for row in rows if row.version == version)

    def artifact(self, sha256: str) -> Path:
        """An artifact as the server stores it."""
        return next((self.scene.home / "server" / "artifacts").rglob(f"{sha256}*"))


METER = "meter"
METER_TOML = """name = "meter"
trigger = "http"

[grants]
interfaces = ["wasi:messaging"]
publish = ["plant/#"]
"""


def meter(directory: Path) -> Path:
    """Write a component that publishes what it is sent, with its manifest beside it; return its file."""
    text = (Path(__file__).parents[2] / "components/guests/publishes.wat").read_text()
    (directory / "meter.wasm").write_bytes(wasmtime.wat2wasm(text))
    (directory / "meter.toml").write_text(METER_TOML)
    return directory / "meter.wasm"


def publish(device: DemoDevice, number: int) -> bool:
    """Have the component publish a number; return whether it says that the device keeps it."""
    try:
        reply = httpx.post(f"http://127.0.0.1:{device.port}/{METER}/plant/counter", content=str(number), timeout=30)
    except httpx.HTTPError:
        return False
    return reply.status_code == httpx.codes.OK


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def descendants(pid: int) -> list[int]:
    """Every process below one."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for word in (task / "children").read_text().split():
            found += [int(word), *descendants(int(word))]
    return found

"""The operator's side of the board tests: a real fleet with its server and broker on this machine, on loopback.

A board sees this machine's loopback as 10.0.2.2, so that is the address in its token and in the certificates.
"""

import asyncio
import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import rig

from fleet.demo.fixtures import fixture
from fleet.demo.load import Load, LoadResult
from fleet.demo.scene import Scene, free_ports
from fleet.protocol import api

GROUP = "boards"
HELLO = "hello"
T = TypeVar("T")


class OperatorSide:
    """One fleet; boards come and go."""

    def __init__(self, directory: Path) -> None:
        self._runner = asyncio.Runner()
        self.scene = Scene(directory)
        self._do(self._make())

    def _do(self, story: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(story)

    async def _make(self) -> None:
        operators, devices, mqtt = free_ports(3)
        ports = ["--operators-port", str(operators), "--devices-port", str(devices), "--mqtt-port", str(mqtt)]
        url = f"https://{rig.HOST}:{operators}"
        await self.scene.command("init", "--dev", "--fleet", "boards", "--url", url, *ports)
        # the emulator's address of this machine is its loopback: nothing needs to listen beyond that
        server = self.scene.home / "server" / "server.toml"
        server.write_text(server.read_text().replace("0.0.0.0", "127.0.0.1"))
        config = self.scene.home / "operator" / "config.toml"
        config.write_text(config.read_text().replace(url, f"https://127.0.0.1:{operators}"))
        await self.scene.serve()

    def close(self) -> None:
        try:
            self._do(self.scene.close())
        finally:
            self._runner.close()

    def fleet(self, *arguments: str) -> str:
        """`fleet ...`, which must succeed; what it printed."""
        return self._do(self.scene.command(*arguments))

    def token(self, group: str = GROUP) -> str:
        """A one-time token."""
        return self.fleet("enroll-token", "--group", group, "--quiet").strip()

    def until(self, what: str, question: Callable[[], T | None], *, timeout_s: float = 180.0) -> T:
        """Ask the server until the answer is not None; emulated boards take their time."""
        deadline = time.monotonic() + timeout_s
        while True:
            self.scene.check()
            answer = question()
            if answer is not None:
                return answer
            assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s until {what}"
            time.sleep(0.25)  # the API's listings have nothing to wait on

    def device(self, device: str) -> api.DeviceRow:
        return next(row for row in self.scene.client.devices().devices if row.id == device)

    def online(self, device: str, *, timeout_s: float = 180.0) -> api.DeviceRow:
        def seen() -> api.DeviceRow | None:
            rows = self.scene.client.devices().devices
            return next((row for row in rows if row.id == device and row.online), None)

        return self.until(f"{device} is online", seen, timeout_s=timeout_s)

    def push(self, component: str | Path, *arguments: str, group: str = GROUP) -> tuple[int, str]:
        """`fleet push`, followed to its end; exit code and what it said."""
        code, output, errors = self._do(self._fleet(*_push(component, group), *arguments))
        return code, output + errors

    async def _fleet(self, *arguments: str) -> tuple[int, str, str]:
        from fleet.demo.processes import module

        return await self.scene.processes.run(module("fleet.cli.main", *arguments))

    def pushed(self, component: str | Path, *arguments: str, group: str = GROUP) -> str:
        code, said = self.push(component, *arguments, group=group)
        assert code == 0, said
        return said

    def version(self, port: int) -> str:
        """Which version answers at a port; empty when none does."""

        async def ask() -> str:
            async with Load(port=port, path=f"/{HELLO}/", kept_alive=0, fresh=1) as load:
                await load.sent(1)
                return next(iter((await load.stop()).by_version), "")

        return self._do(ask())

    def answers(self, port: int, version: str, *, timeout_s: float = 180.0) -> None:
        """Wait until a version answers at a port."""

        async def wait() -> None:
            async with Load(port=port, path=f"/{HELLO}/", kept_alive=0, fresh=1, pause_s=0.2) as load:
                async with asyncio.timeout(timeout_s):
                    await load.seen(version)

        try:
            self._do(wait())
        except TimeoutError:
            raise AssertionError(f"version {version} does not answer within {timeout_s:.0f} s") from None

    def under_load(self, port: int, component: str, version: str, *, group: str = GROUP) -> LoadResult:
        """Push while clients that never retry keep asking; what became of their requests."""

        async def story() -> LoadResult:
            async with Load(port=port, path=f"/{HELLO}/", kept_alive=2, fresh=1, pause_s=0.05) as load:
                await load.sent(5)
                code, output, errors = await self._fleet(*_push(component, group))
                assert code == 0, output + errors
                async with asyncio.timeout(120):
                    await load.seen(version)
                return await load.stop()

        return self._do(story())

    @contextlib.contextmanager
    def asking(self, port: int) -> Iterator[Callable[[], LoadResult]]:
        """Clients that keep asking from a thread of their own, while this one does something else."""
        stop = threading.Event()
        found: list[LoadResult] = []

        async def story() -> None:
            async with Load(port=port, path=f"/{HELLO}/", kept_alive=1, fresh=1, pause_s=0.2) as load:
                await asyncio.to_thread(stop.wait)
                found.append(await load.stop())

        thread = threading.Thread(target=lambda: asyncio.run(story()), daemon=True)
        thread.start()
        try:
            yield lambda: found[0]
        finally:
            stop.set()
            thread.join()

    def publish(self, component: str, *, version: str) -> str:
        """`fleet publish`; the sha256 of the bytes."""
        self.fleet("publish", str(fixture(component)), "--version", version)
        return hashlib.sha256(fixture(component).read_bytes()).hexdigest()

    def tamper(self, sha256: str) -> None:
        """Change one byte of an artifact where the server keeps it."""
        path = next((self.scene.home / "server" / "artifacts").rglob(f"{sha256}*"))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.chmod(0o644)
        path.write_bytes(data)

    def deploy(self, target: str, *, group: str) -> tuple[int, str]:
        """`fleet deploy`, followed to its end; exit code and what it said."""
        places = ["--as", HELLO, "--group", group, "--waves", "100%", "--timeout", "600"]
        code, output, errors = self._do(self._fleet("deploy", target, *places))
        return code, output + errors

    def settled(self, device: str, *, timeout_s: float = 300.0) -> None:
        """Wait until a board has carried out its newest assignment."""

        def done() -> bool | None:
            row = self.device(device)
            return True if row.online and row.committed == row.assigned else None

        self.until(f"{device} has settled", done, timeout_s=timeout_s)

    def rolled_back(self, component: str, port: int, *, group: str = GROUP) -> tuple[int, str]:
        """Push while clients ask, which is what makes a bad version show; exit code and what `fleet push` said."""

        async def story() -> tuple[int, str]:
            async with Load(port=port, path=f"/{HELLO}/", kept_alive=1, fresh=1, pause_s=0.05):
                code, output, errors = await self._fleet(*_push(component, group))
                return code, output + errors

        return self._do(story())


def _push(component: str | Path, group: str) -> list[str]:
    file = fixture(component) if isinstance(component, str) else component
    return ["push", str(file), "--as", HELLO, "--group", group, "--waves", "100%", "--timeout", "600"]


@contextlib.contextmanager
def budget(name: str, seconds: float) -> Iterator[None]:
    """Print how long a stage took, beside what it may take on two idle cores."""
    started = time.monotonic()
    yield
    print(f"\n=== {name}: {time.monotonic() - started:.0f} s of {seconds:.0f} s", flush=True)

"""The operator's side of the board tests: a real fleet with its server and broker on this machine, on loopback.

A board sees this machine's loopback as 10.0.2.2, so that is the address in its token and in the certificates.
"""

import asyncio
import contextlib
import hashlib
import http.client
import itertools
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import rig

from fleet.client import UnreachableError
from fleet.demo import load
from fleet.demo.environment import Environment, free_ports, python_environment
from fleet.demo.load import Load, LoadResult
from fleet.demo.scenario import fixture
from fleet.protocol import codes, operator_api

GROUP = "boards"
HELLO = "hello"
T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """A request, by the monotonic clock, and the version that answered it."""

    asked: float
    answered: float
    version: str

    @property
    def took(self) -> float:
        """How long the client waited, in seconds."""
        return self.answered - self.asked


@dataclass(frozen=True)
class Update:
    """A version of the demo's component whose bytes no board has fetched or compiled yet.

    Attributes:
        component: the file; its manifest lies beside it.
        version: the version to publish it as.
        answer: the version that its answers name, which is that of the demo's component it is a copy of.
    """

    component: Path
    version: str
    answer: str


def swap_gap(found: list[Asked]) -> float:
    """From the last answer of the old version to the first of the new one, less what lies between two answers usually.

    Seconds; 0 where the swap made no difference.
    """
    between = [after.answered - before.answered for before, after in pairwise(found)]
    new = next(number for number, each in enumerate(found) if each.version != found[0].version)
    return max(0.0, between[new - 1] - statistics.median(between))


class OperatorSide:
    """One fleet; boards come and go. With `made=False` somebody else says `fleet init`, and then `serve`."""

    def __init__(self, directory: Path, *, made: bool = True) -> None:
        self._runner = asyncio.Runner()
        self._numbers = itertools.count(1)
        self.scene = Environment(directory)
        self.ports = free_ports(3)
        if made:
            self.fleet("init", "--dev", "--fleet", "boards", *self.init_options())
            self.serve()

    def init_options(self) -> list[str]:
        """What `fleet init` needs to know here: free ports, and this machine's address as boards see it."""
        operators, devices, mqtt = map(str, self.ports)
        url = f"https://{rig.HOST}:{operators}"
        return ["--url", url, "--operators-port", operators, "--devices-port", devices, "--mqtt-port", mqtt]

    def serve(self) -> None:
        """`fleet serve`."""
        # the emulator's address of this machine is its loopback: nothing needs to listen beyond that
        server = self.scene.home / "server" / "server.toml"
        server.write_text(server.read_text().replace("0.0.0.0", "127.0.0.1"))
        config = self.scene.home / "operator" / "config.toml"
        config.write_text(config.read_text().replace(f"https://{rig.HOST}:", "https://127.0.0.1:"))
        self._do(self.scene.serve())

    def _do(self, story: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(story)

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
            # a machine that emulates two boards may be slow to answer: asked again, like everything here
            with contextlib.suppress(UnreachableError):
                answer = question()
                if answer is not None:
                    return answer
            assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s until {what}"
            time.sleep(0.25)  # the API's listings have nothing to wait on

    def device(self, device: str) -> operator_api.DeviceRow:
        return next(row for row in self.scene.client.devices().devices if row.id == device)

    def online(self, device: str, *, timeout_s: float = 180.0) -> operator_api.DeviceRow:
        def seen() -> operator_api.DeviceRow | None:
            rows = self.scene.client.devices().devices
            return next((row for row in rows if row.id == device and row.online), None)

        return self.until(f"{device} is online", seen, timeout_s=timeout_s)

    def offline(self, device: str, *, timeout_s: float = 180.0) -> None:
        """Wait until the server takes a board for gone."""
        self.until(f"{device} is offline", lambda: None if self.device(device).online else True, timeout_s=timeout_s)

    def runs(self, device: str, version: str) -> None:
        """Wait until a board says itself that it runs this version."""

        def said() -> bool | None:
            targets = [each.target for each in self.device(device).instances if each.instance == HELLO]
            return True if targets and targets[0].endswith(f"/{version}.wasm") else None

        self.until(f"{device} reports {HELLO} {version}", said)

    def push(
        self, component: Update | Path, *arguments: str, group: str = GROUP, instance: str = HELLO
    ) -> tuple[int, str]:
        """`fleet push`, followed to its end; exit code and what it said."""
        code, output, errors = self._do(self._fleet(*_push(component, group, instance), *arguments))
        return code, output + errors

    async def _fleet(self, *arguments: str) -> tuple[int, str, str]:
        from fleet.demo.environment import module

        return await self.scene.processes.run(module("fleet.cli.main", *arguments))

    def pushed(self, component: Update | Path, *arguments: str, group: str = GROUP, instance: str = HELLO) -> str:
        code, said = self.push(component, *arguments, group=group, instance=instance)
        assert code == 0, said
        return said

    def shell(self, line: str) -> str:
        """What a person types on the laptop, in the repository's directory; what it printed."""
        functions = f'fleet() {{ "{sys.executable}" -m fleet.cli.main "$@"; }}'
        environment = python_environment(WASMFLEET_HOME=str(self.scene.home))
        done = subprocess.run(
            ["bash", "-ec", f"{functions}\n{line}"],
            cwd=Path(__file__).parents[2],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
        return done.stdout

    def finished(self, *, group: str, timeout_s: float = 300.0) -> operator_api.RolloutView:
        """Wait until the group's newest rollout has come to its end, and return how it ended."""

        def ended() -> operator_api.RolloutView | None:
            newest = self.scene.client.rollouts(group=group, limit=1).rollouts[0]
            return None if newest.state in codes.OPEN_STATES else newest

        return self.until(f"the newest rollout to {group} has ended", ended, timeout_s=timeout_s)

    def succeeded(self, *, group: str, timeout_s: float = 300.0) -> None:
        """Wait until the group's newest rollout has succeeded."""
        ended = self.finished(group=group, timeout_s=timeout_s)
        assert ended.state is codes.RolloutState.SUCCEEDED, f"{ended.state}: {ended.reason}"

    def wat(self, source: Path, manifest: str) -> Path:
        """A component from its text, with a manifest beside it."""
        from wasmtime import wat2wasm

        place = self.scene.directory / "variants" / f"{source.stem}.wasm"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(wat2wasm(source.read_text()))
        place.with_suffix(".toml").write_text(manifest)
        return place

    def broker(self) -> int:
        """The broker's process, which the server keeps running."""
        listing = subprocess.run(["ps", "-ww", "-eo", "pid=,args="], capture_output=True, text=True, check=True).stdout
        rows = [line.split(maxsplit=1) for line in listing.splitlines() if str(self.scene.home) in line]
        return next(int(pid) for pid, command in rows if command.split()[0].endswith("mosquitto"))

    def fresh(self, answer: str) -> Update:
        """Make an update that answers as version 1 or 2 of the demo's component, or traps as version 3 does."""
        number, original = next(self._numbers), fixture(f"v{answer}.wasm")
        name = b"variant"
        content = bytes([len(name)]) + name + number.to_bytes(4, "little")
        place = self.scene.directory / "variants" / f"v{answer}-{number}.wasm"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(original.read_bytes() + bytes([0, len(content)]) + content)  # a custom section
        place.with_suffix(".toml").write_text(original.with_suffix(".toml").read_text())
        return Update(place, f"{answer}.0.{number}", answer)

    def version(self, port: int) -> str:
        """Which version answers at a port; empty when none does."""

        async def ask() -> str:
            async with Load(port=port, path=f"/{HELLO}/", kept_alive=0, fresh=1) as clients:
                await clients.sent(1)
                return next(iter((await clients.stop()).by_version), "")

        return self._do(ask())

    def answers(self, port: int, version: str, *, timeout_s: float = 180.0) -> None:
        """Wait until a version answers at a port."""

        async def wait() -> None:
            async with Load(port=port, path=f"/{HELLO}/", kept_alive=0, fresh=1, pause_s=0.2) as clients:
                async with asyncio.timeout(timeout_s):
                    await clients.seen(version)

        try:
            self._do(wait())
        except TimeoutError:
            raise AssertionError(f"version {version} does not answer within {timeout_s:.0f} s") from None

    def under_load(self, port: int, update: Update, *, group: str = GROUP) -> LoadResult:
        """Push while clients that never retry keep asking; what became of their requests."""

        async def story() -> LoadResult:
            async with Load(port=port, path=f"/{HELLO}/", kept_alive=1, fresh=1, pause_s=0.1) as clients:
                await clients.sent(5)
                code, output, errors = await self._fleet(*_push(update, group))
                assert code == 0, output + errors
                async with asyncio.timeout(120):
                    await clients.seen(update.answer)
                return await clients.stop()

        return self._do(story())

    @contextlib.contextmanager
    def asking(self, port: int) -> Iterator[Callable[[], LoadResult]]:
        """Clients that keep asking from a thread of their own, while this one does something else."""
        stop = threading.Event()
        found: list[LoadResult] = []

        async def story() -> None:
            async with Load(port=port, path=f"/{HELLO}/", kept_alive=1, fresh=1, pause_s=0.2) as clients:
                await asyncio.to_thread(stop.wait)
                found.append(await clients.stop())

        thread = threading.Thread(target=lambda: asyncio.run(story()), daemon=True)
        thread.start()
        try:
            yield lambda: found[0]
        finally:
            stop.set()
            thread.join()

    @contextlib.contextmanager
    def asking_steadily(self, port: int) -> Iterator[list[Asked]]:
        """One client on one connection that asks again as soon as it has its answer; what it was answered, and when."""
        stop = threading.Event()
        found: list[Asked] = []

        def client() -> None:
            while not stop.is_set():
                with contextlib.suppress(OSError, http.client.HTTPException):
                    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                    while not stop.is_set():
                        asked = time.monotonic()
                        connection.request("GET", f"/{HELLO}/")
                        answer = connection.getresponse()
                        answer.read()
                        found.append(Asked(asked, time.monotonic(), answer.headers["x-version"]))
                        stop.wait(0.01)  # an emulated board has more to do than to answer

        thread = threading.Thread(target=client, daemon=True)
        thread.start()
        try:
            yield found
        finally:
            stop.set()
            thread.join()

    @contextlib.contextmanager
    def first_answer(self, port: int, version: str) -> Iterator[Callable[[], float]]:
        """When a version first answers, by the monotonic clock, while something else is done."""
        found: list[float] = []

        async def ask() -> None:
            async with asyncio.timeout(300):
                found.append(await load.first_answer(port=port, version=version, path=f"/{HELLO}/"))

        thread = threading.Thread(target=lambda: asyncio.run(ask()), daemon=True)
        thread.start()
        try:
            yield lambda: found[0]
        finally:
            thread.join()

    def publish(self, update: Update) -> str:
        """`fleet publish`; the sha256 of the bytes."""
        self.fleet("publish", str(update.component), "--version", update.version)
        return hashlib.sha256(update.component.read_bytes()).hexdigest()

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
        """Wait until a board has carried out its newest assignment, and says so."""

        def done() -> bool | None:
            row = self.device(device)
            return True if row.online and row.committed == row.assigned else None

        self.until(f"{device} has settled", done, timeout_s=timeout_s)

    def rolled_back(self, update: Update, port: int, *, group: str = GROUP) -> tuple[int, str]:
        """Push while clients ask, which is what makes a bad version show; exit code and what `fleet push` said."""

        async def story() -> tuple[int, str]:
            async with Load(port=port, path=f"/{HELLO}/", kept_alive=1, fresh=1, pause_s=0.05):
                code, output, errors = await self._fleet(*_push(update, group))
                return code, output + errors

        return self._do(story())


def _push(component: Update | Path, group: str, instance: str = HELLO) -> list[str]:
    named, version = (
        (component.component, ["--version", component.version]) if isinstance(component, Update) else (component, [])
    )
    return ["push", str(named), *version, "--as", instance, "--group", group, "--waves", "100%", "--timeout", "600"]

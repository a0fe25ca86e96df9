"""`fleet-host dev`: an author's local loop. One component at a time, on a host of its own as on a device.

Requests come on standard input and events leave on standard output, both as JSON lines (`fleet.protocol.dev`). The
host is the program that devices run, with its isolation layers as far as this user may have them, in a directory that
who starts it removes. A request for a further version is a swap: the one before answers until it is ready.
"""

import asyncio
import contextlib
import itertools
import json
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from agent.host.compiler import component_check
from agent.host.ipc import framing, host_api
from agent.host.supervisor import worker_pool
from fleet.protocol import dev, wire
from fleet.protocol.codes import InstanceState
from fleet.protocol.component_check import ComponentCheckRequest, Step
from fleet.protocol.manifest import Http

_LOOK_S: Final = 0.2  # from one look at logs and counters to the next; a device's agent asks for them too
_PROGRESS_S: Final = 10
_STOP_S: Final = 15
_NAMESPACE: Final = "dev"

R = TypeVar("R")
Emit = Callable[[dev.Event], None]


class DevError(Exception):
    """The host itself does not run: a sentence for the author."""


class _Host:
    """Host of its own, as a child process, and the connection to it."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[host_api.Reply]] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._sock: socket.socket | None = None
        self._last_words: list[str] = []
        self._is_ending = False
        self.gone = asyncio.Event()

    async def start(self, directory: Path, ingress: str) -> host_api.Welcome:
        """Start it, wait until it listens, and greet it. Raises `DevError`."""
        runtime, state = directory / "run", directory / "state"
        self._process = await asyncio.create_subprocess_exec(
            *worker_pool.python_argv("agent.host.cli"),
            *("run", "--runtime", str(runtime), "--state", str(state), "--ingress", ingress),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        self._reading = asyncio.ensure_future(self._read_stderr())
        self._sock = await self._connect(runtime / "host.sock")
        asyncio.get_running_loop().add_reader(self._sock, self._readable)
        return await self.ask(host_api.Hello, host_api.Welcome, protocol=host_api.PROTOCOL)

    async def _connect(self, path: Path) -> socket.socket:
        assert self._process is not None
        ended = asyncio.ensure_future(self._process.wait())
        try:
            while not ended.done():
                sock = host_api.new_socket()
                sock.setblocking(False)
                try:
                    await asyncio.get_running_loop().sock_connect(sock, str(path))
                except OSError:
                    sock.close()
                    await asyncio.wait({ended}, timeout=0.02)
                else:
                    return sock
        finally:
            ended.cancel()
        await self._reading
        raise DevError(self._last_words[-1] if self._last_words else "the host ended, and said nothing")

    async def _read_stderr(self) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        with contextlib.suppress(ValueError):  # a line without an end
            while line := await self._process.stderr.readline():
                text = host_api.plain(line.decode(errors="replace").rstrip())
                self._last_words = [*self._last_words[-1:], text.removeprefix("fleet-host: ")]
                self._emit(dev.HostSaid(text))
        self.gone.set()

    def _readable(self) -> None:
        assert self._sock is not None
        with contextlib.suppress(BlockingIOError, host_api.UnreadableError):
            while True:
                try:
                    message = host_api.receive_from_host(self._sock)
                except host_api.IpcError:
                    asyncio.get_running_loop().remove_reader(self._sock)
                    self.gone.set()
                    for future in self._waiting.values():
                        if not future.done():
                            future.set_exception(DevError("the host ended"))
                    return
                if isinstance(message, host_api.Event):
                    self._tell(message)
                elif message.id in self._waiting:
                    self._answer(self._waiting.pop(message.id), message)

    @staticmethod
    def _answer(future: asyncio.Future[host_api.Reply], reply: host_api.Reply) -> None:
        if not future.done():
            future.set_result(reply)

    def _tell(self, event: host_api.Event) -> None:
        if self._is_ending:
            return
        match event:
            case host_api.Trapped(code=code, message=message):
                self._emit(dev.Fault(code, message))
            case host_api.Changed(state=state, message=message) if state is not InstanceState.RUNNING:
                self._emit(dev.Fault(state, message))

    async def ask(self, kind: Callable[..., host_api.Request], answer: type[R], fd: int | None = None, **how: Any) -> R:
        """Send a request and return the reply. Raises `host_api.StartError` where the host refuses it, `DevError`."""
        assert self._sock is not None
        number = next(self._ids)
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            host_api.send(self._sock, kind(id=number, **how), fd)
        except host_api.IpcError as error:
            raise DevError(str(error)) from error
        reply = await future
        if isinstance(reply, host_api.Failed):
            raise host_api.StartError(reply.code, reply.message)
        assert isinstance(reply, answer)
        return reply

    async def stop(self) -> None:
        """End it, and wait for that."""
        if self._process is None:
            return
        self._is_ending = True
        if self._process.returncode is None:
            self._process.terminate()
            try:
                async with asyncio.timeout(_STOP_S):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        if self._sock is not None:
            asyncio.get_running_loop().remove_reader(self._sock)
            self._sock.close()
        await self._reading


class _Instance:
    """The component that runs, and how far its log and counters have been told."""

    def __init__(self, host: _Host, ingress: str, emit: Emit) -> None:
        self._host, self._ingress, self._emit = host, ingress, emit
        self._generation = 0
        self._name = ""
        self._lines = 0
        self._calls: Counter[str] = Counter()

    async def run(self, request: dev.DevRequest) -> None:
        """Compile the component and give it the calls; say what was refused."""
        manifest = request.manifest
        began_s = time.monotonic()
        asked = ComponentCheckRequest(file=request.file, manifest=manifest)
        try:
            image = await self._compiled(asked)
        except component_check.Refusal as refusal:
            self._emit(dev.Refused(refusal.step, refusal.code, str(refusal)))
            return
        compiled_s = time.monotonic()
        before, self._generation = self._generation, self._generation + 1
        try:
            await self._start(request, image)
        except host_api.StartError as error:
            self._emit(dev.Refused(Step.START, error.code, str(error), await self._log_of(manifest.name)))
            return
        if self._name != manifest.name:
            if self._name:
                await self._host.ask(host_api.Stop, host_api.Done, instance=self._name)
            before, self._name, self._lines, self._calls = 0, manifest.name, 0, Counter()
        await self._host.ask(host_api.Commit, host_api.Done, instance=self._name, generation=self._generation)
        self._emit(
            dev.Serving(
                url=f"http://{self._ingress}/{self._name}/" if manifest.triggers_of(Http) else "",
                generation=self._generation,
                swapped=before > 0,
                compile_ms=round((compiled_s - began_s) * 1000),
                start_ms=round((time.monotonic() - compiled_s) * 1000),
                image_bytes=len(image),
            )
        )

    async def _compiled(self, asked: ComponentCheckRequest) -> bytes:
        size = await asyncio.to_thread(_size_of, Path(asked.file))
        making = asyncio.ensure_future(asyncio.to_thread(component_check.make_image, asked, worker_pool.python_argv))
        elapsed_s = 0
        while not making.done():
            self._emit(dev.Compiling(size, elapsed_s))
            await asyncio.wait({making}, timeout=_PROGRESS_S)
            elapsed_s += _PROGRESS_S
        return (await making)[0]

    async def _start(self, request: dev.DevRequest, image: bytes) -> None:
        manifest = request.manifest
        if request.secrets:
            await self._give(
                json.dumps(request.secrets).encode(),
                host_api.PutSecrets,
                host_api.Done,
                instance=manifest.name,
                generation=self._generation,
            )
        defaults = {name: key.default for name, key in manifest.config.items() if key.default is not None}
        run = host_api.Run(
            instance=manifest.name,
            generation=self._generation,
            target=f"components/{_NAMESPACE}/{manifest.name}/{manifest.version}.wasm",
            manifest=manifest,
            grants=manifest.grants,
            limits=manifest.limits,
            config={**defaults, **request.config},
            secrets=tuple(request.secrets),
        )
        await self._give(image, host_api.Start, host_api.Started, run=run)

    async def _give(self, data: bytes, kind: Callable[..., host_api.Request], answer: type[R], **how: Any) -> R:
        def fill(fd: int) -> None:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(fd, rest) :]

        fd = framing.constant_memfd("given", fill)
        try:
            return await self._host.ask(kind, answer, fd, **how)
        finally:
            os.close(fd)

    async def _log_of(self, name: str) -> tuple[str, ...]:
        with contextlib.suppress(host_api.StartError):
            return (await self._host.ask(host_api.Logs, host_api.Lines, instance=name)).lines
        return ()

    async def look(self) -> None:
        """Tell what the component has logged, and which calls have ended, since the last time."""
        if not self._name:
            return
        with contextlib.suppress(host_api.StartError):  # stopped just now
            log = await self._host.ask(host_api.Logs, host_api.Lines, instance=self._name)
            new = log.count - self._lines if log.count >= self._lines else log.count
            self._lines = log.count
            if new > len(log.lines):
                self._emit(dev.Logged(f"host: {new - len(log.lines)} lines are not shown: it logs too fast"))
            for line in log.lines[len(log.lines) - min(new, len(log.lines)) :]:
                self._emit(dev.Logged(line))
        stats = await self._host.ask(host_api.Status, host_api.HostStats)
        for health in stats.instances:
            if health.instance == self._name:
                calls = Counter({str(outcome): count for outcome, count in health.calls.items()})
                more = calls - self._calls
                self._calls = calls
                if more:
                    self._emit(dev.Called(dict(more), health.p99_us))


def _size_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0  # the reader says why


async def _lines() -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=dev.LINE_MAX_BYTES)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer)
    return reader


def serve(directory: Path, ingress: str) -> int:
    """Run what standard input asks for, one component at a time, until that ends.

    Args:
        directory: of the host's sockets and state, for this run alone.
        ingress: address of the HTTP port.

    Returns:
        0; 1 if the host ended by itself, 2 for a line that is no request.

    Raises:
        DevError: the host does not start.
    """
    return asyncio.run(_serve(directory.resolve(), ingress))


def _emit(event: dev.Event) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(event) + b"\n")
    sys.stdout.buffer.flush()


async def _serve(directory: Path, ingress: str) -> int:
    requests = await _lines()
    host = _Host(_emit)
    try:
        welcome = await host.start(directory, ingress)
        return await _loop(requests, host, _Instance(host, welcome.ingress, _emit))
    finally:
        await host.stop()


async def _loop(requests: asyncio.StreamReader, host: _Host, instance: _Instance) -> int:
    gone = asyncio.ensure_future(host.gone.wait())
    reading = asyncio.ensure_future(requests.readline())
    try:
        while True:
            await asyncio.wait({gone, reading}, timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                return 1
            if reading.done():
                line = reading.result()
                if not line:
                    await instance.look()
                    return 0
                try:
                    request = msgspec.json.decode(line, type=dev.DevRequest)
                except wire.JSON_ERRORS as error:
                    sys.stderr.write(f"fleet-host: not a request: {error}\n")
                    return 2
                reading = asyncio.ensure_future(requests.readline())
                await instance.run(request)
            await instance.look()
    finally:
        gone.cancel()
        reading.cancel()

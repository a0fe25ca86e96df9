"""The host's supervisor: policy, sockets and configuration; no wasm, ever.

It listens for the agent on `<runtime>/host.sock`, keeps the instances, their listeners and their lanes, and owns the
board's shared HTTP port, which it lends to the router. Everything it starts dies with it.
"""

import array
import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from agent import systemd
from agent.host.ipc import host_api
from agent.host.ipc.host_api import StartError, plain
from agent.host.ipc.stats_page import count_of
from agent.host.ipc.write_quota import QuotaStore
from agent.host.sandbox import sandbox
from agent.host.supervisor import worker_pool
from agent.host.supervisor.agent_server import AgentConnection
from agent.host.supervisor.helpers import EgressHandle, RouterHandle
from agent.host.supervisor.instance import Instance
from agent.host.supervisor.resources import BACKLOG, Cgroups, CrashCounter, Listeners, PendingSecrets, UidAllocator
from agent.host.supervisor.swap import SwapBarrier
from agent.host.supervisor.worker_handle import WorkerGoneError
from agent.host.supervisor.worker_pool import ZygotePool
from fleet.protocol.codes import InstanceState, RejectCode

VERSION: Final = "0.2.0"

_SOCKET: Final = "host.sock"

_PEERS_MAX: Final = 8

_WATCH_S: Final = 10.0

_STOP_S: Final = 15.0

_DESCRIBE_S: Final = 60.0

_UCRED: Final = struct.Struct("=iII")

_SO_PEERGROUPS: Final = 59

_GROUPS_MAX_BYTES: Final = 4096


class HostError(Exception):
    """The host cannot start; the message is one sentence for the board's owner."""


class TakenError(HostError):
    """Another host runs there."""


class WallsError(HostError):
    """It may not: the walls that its owner asks for are not to be had here."""


@dataclass(frozen=True, slots=True)
class HostSettings:
    """Where the host lives.

    Attributes:
        ingress: address and port of the shared HTTP port; None for no router.
        require: containment layers without which no component runs here.
        minimum: containment layers without which the host does not start.
        agent_group: the group whose members may command this host, beside root and the host's own user.
    """

    runtime: Path
    state: Path
    ingress: tuple[str, int] | None
    require: frozenset[str] = frozenset()
    minimum: frozenset[str] = frozenset()
    agent_group: int | None = None


class Supervisor:
    """The host's one supervisor."""

    def __init__(self, settings: HostSettings) -> None:
        self._settings = settings
        self._session = uuid.uuid4().hex
        self._engine = ""
        self._cgroups = Cgroups()
        self._containment = {**sandbox.probe(), "cgroup": self._cgroups.available}
        self._runs_as = sandbox.way(os.geteuid(), self._containment)
        self._missing = self._lacks(settings.require)
        self._deaths = CrashCounter(settings.state / "deaths.json")
        self._daily = QuotaStore(settings.state / "written.json")
        self._uids = UidAllocator(settings.state / "uids.json")
        self._nursery = ZygotePool()
        self._muster = SwapBarrier()
        self._front: RouterHandle | None = None
        self._outlet = EgressHandle(settings.runtime / "in")
        self._instances: dict[str, Instance] = {}
        self._entrusted = PendingSecrets()
        self._peers: set[AgentConnection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()
        address = settings.ingress[0] if settings.ingress else "127.0.0.1"
        self._listeners = Listeners(settings.runtime / "in", address)

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain and leave no process.

        Raises:
            HostError: it cannot start.
        """
        if lacks := self._lacks(self._settings.minimum):
            raise WallsError(
                f"this board lacks {', '.join(lacks)} around components, as a {self._runs_as}: without that it does "
                "not start; 'fleet-host check' shows the walls there are, --minimum names fewer"
            )
        _many_descriptors()
        listener = self._listen()
        ingress = self._open_ingress()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        self._engine = await self._ask_engine()
        if ingress is not None:
            self._front = RouterHandle(ingress, self._settings.runtime / "in")
        loop.add_reader(listener, self._accept, listener)
        watch = asyncio.ensure_future(self._watch())
        dog = asyncio.ensure_future(_pet_watchdog(self._status))
        systemd.notify(READY="1", STATUS=self._status())
        try:
            await self._stop.wait()
        finally:
            systemd.notify(STOPPING="1")
            watch.cancel()
            dog.cancel()
            loop.remove_reader(listener)
            listener.close()
            (self._settings.runtime / _SOCKET).unlink(missing_ok=True)
            await self._end()

    def _status(self) -> str:
        engine = f"wasmtime {self._engine}" if self._engine else "no engine on this board: components are refused"
        return f"{systemd.instances(len(self._instances))}; {engine}"

    def _lacks(self, wanted: frozenset[str]) -> list[str]:
        return sorted(layer for layer in wanted if not self._containment.get(layer))

    def _listen(self) -> socket.socket:
        path = self._settings.runtime / _SOCKET
        probe = host_api.new_socket()
        with probe:
            try:
                probe.connect(str(path))
            except OSError:
                path.unlink(missing_ok=True)
            else:
                raise TakenError(f"another host already runs here: {path} is in use")
        listener = host_api.new_socket()
        mask = os.umask(0o177)
        try:
            listener.bind(str(path))
        except OSError as error:
            why = error.strerror or f"{error} (of {len(str(path))} characters); give a shorter --runtime"
            raise HostError(f"cannot listen on {path}: {why}") from error
        finally:
            os.umask(mask)
        if self._settings.agent_group is not None:
            try:
                os.chown(path, -1, self._settings.agent_group)
                path.chmod(0o660)
            except OSError as error:
                raise HostError(f"cannot give {path} to the agent's group: {error.strerror}") from error
        (self._settings.runtime / host_api.WHY_NOT).unlink(missing_ok=True)
        listener.listen(_PEERS_MAX)
        listener.setblocking(False)
        return listener

    def _open_ingress(self) -> socket.socket | None:
        if self._settings.ingress is None:
            return None
        address, port = self._settings.ingress
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((address, port))
        except OSError as error:
            sock.close()
            raise HostError(
                f"cannot listen on {address}:{port}: {error.strerror}; choose another address with --ingress"
            ) from error
        sock.listen(BACKLOG)
        return sock

    async def _ask_engine(self) -> str:
        """The engine's version, asked of a process of its own; empty where there is none."""
        process = await asyncio.create_subprocess_exec(
            *worker_pool.python_argv("agent.host.compiler"),
            "--describe",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            out, _ = await asyncio.wait_for(process.communicate(), _DESCRIBE_S)
            return str(json.loads(out)["engine"])
        except (TimeoutError, ValueError, KeyError):
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            return ""

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_S)
            for instance in self._instances.values():
                instance.watch()
            self._nursery.retire()

    async def _end(self) -> None:
        if self._front is not None:
            await self._front.drain()
        stops = [asyncio.ensure_future(self._stop_one(instance)) for instance in self._instances.values()]
        if stops:
            await asyncio.wait(stops, timeout=_STOP_S)
        self._daily.save()
        for peer in list(self._peers):
            peer.close()
        self._nursery.close()
        self._outlet.close()
        if self._front is not None:
            self._front.close()

    async def _stop_one(self, instance: Instance) -> None:
        async with instance.lock:
            await instance.stop()

    # The agent.

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        if not self._may_command(sock) or len(self._peers) >= _PEERS_MAX:
            sock.close()
            return
        peer = AgentConnection(sock, self._hung_up)
        self._peers.add(peer)
        asyncio.get_running_loop().add_reader(sock, self._readable, peer)

    def _hung_up(self, peer: AgentConnection) -> None:
        self._peers.discard(peer)
        if not self._peers:
            self._entrusted.clear()

    def _may_command(self, sock: socket.socket) -> bool:
        _, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        group = self._settings.agent_group
        if uid in {0, os.geteuid()} or group is None or gid == group:
            return uid in {0, os.geteuid()} or group is not None
        groups = array.array("i")
        with contextlib.suppress(OSError):
            groups.frombytes(sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_MAX_BYTES))
        return group in groups

    def _readable(self, peer: AgentConnection) -> None:
        try:
            request, fd = host_api.receive_request(peer.sock)
        except BlockingIOError:
            return
        except host_api.IpcError:
            peer.close()
            return
        task = asyncio.ensure_future(self._serve(peer, request, fd))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, peer: AgentConnection, request: host_api.Request, fd: int | None) -> None:
        try:
            reply = await self._answer(request, fd)
        except (StartError, WorkerGoneError) as error:
            code = error.code if isinstance(error, StartError) else RejectCode.INTERNAL
            instance = self._instances.get(getattr(request, "instance", "") or _name(request))
            reply = host_api.Failed(
                id=request.id, code=code, message=plain(str(error)), log=() if instance is None else instance.lines()
            )
        except Exception as error:  # noqa: BLE001 - our own bug: say so, and go on serving
            sys.stderr.write(f"host: {type(request).__name__}: {type(error).__name__}: {error}\n")
            reply = host_api.Failed(id=request.id, code=RejectCode.INTERNAL, message=f"the host failed: {error!r}")
        peer.say(reply)

    async def _answer(self, request: host_api.Request, fd: int | None) -> host_api.Reply:
        if fd is not None and not isinstance(request, host_api.Start | host_api.PutSecrets):
            os.close(fd)
        match request:
            case host_api.Hello():
                return self._welcome(request)
            case host_api.Start() | host_api.PutSecrets():
                return await self._receive(request, fd)
            case host_api.Status():
                return await self._figures(request)
            case host_api.Logs():
                found = self._instances.get(request.instance)
                return host_api.Lines(id=request.id) if found is None else found.told(request.id)
            case host_api.Revert():
                instance = self._instances.get(request.instance)
                if instance is None:
                    raise StartError(RejectCode.HOST_GONE, f"{request.instance} does not run here")
                async with instance.lock:
                    swap_ms = await instance.revert(request.generation)
                    assert instance.current is not None
                    return host_api.Started(
                        id=request.id,
                        instance=instance.name,
                        generation=instance.current.number,
                        swap_ms=swap_ms,
                    )
            case host_api.Commit() | host_api.Stop() | host_api.Restart():
                instance = self._instances.get(request.instance)
                if instance is not None:
                    async with instance.lock:
                        await self._change(instance, request)
                return host_api.Done(id=request.id)

    async def _figures(self, request: host_api.Status) -> host_api.HostStats:
        if (asked := self._instances.get(request.check)) is not None:
            await asked.ask_health(host_api.CHECK_WAIT_S)
        figures, more = host_api.page(one.health() for one in self._after(request.after))
        written = count_of(self._deaths.written_bytes + self._daily.written_bytes)
        return host_api.HostStats(id=request.id, instances=figures, written_bytes=written, more=more)

    async def _change(self, instance: Instance, request: host_api.Commit | host_api.Stop | host_api.Restart) -> None:
        match request:
            case host_api.Commit():
                await instance.commit(request.generation)
            case host_api.Restart():
                await instance.restart()
            case host_api.Stop():
                await instance.stop()
                self._instances.pop(instance.name, None)
                self._cgroups.dismiss(instance.name)

    async def _receive(self, request: host_api.Start | host_api.PutSecrets, fd: int | None) -> host_api.Reply:
        """What comes with a descriptor."""
        if isinstance(request, host_api.PutSecrets):
            self._entrusted.hold(request, fd)
            return host_api.Done(id=request.id)
        try:
            return await self._start(request, fd)
        finally:
            self._entrusted.drop(request.run)

    async def _start(self, request: host_api.Start, fd: int | None) -> host_api.Reply:
        run = request.run
        if fd is None:
            raise StartError(RejectCode.MALFORMED, f"{run.instance}: no image came with the request to start it")
        if not self._engine:
            os.close(fd)
            raise StartError(RejectCode.NO_ENGINE, "there is no WebAssembly engine for this board")
        if self._missing:
            os.close(fd)
            layers = ", ".join(self._missing)
            raise StartError(RejectCode.CONTAINMENT, f"this board demands {layers} around components and has it not")
        instance = self._instances.get(run.instance)
        if instance is None:
            instance = self._instances[run.instance] = Instance(
                run.instance,
                nursery=self._nursery,
                listeners=self._listeners,
                uid=self._uids.of,
                deaths=self._deaths,
                daily=self._daily,
                data=self._settings.state / "data",
                cgroups=self._cgroups,
                emit=self._emit,
                route=self._route,
                outlet=self._outlet,
            )
        async with instance.lock:
            if instance.current is not None and instance.current.number == run.generation:
                os.close(fd)
                if instance.state is InstanceState.QUARANTINED:
                    await instance.restart()
                previous = None if instance.previous is None else instance.previous.number
                return host_api.Started(
                    id=request.id, instance=run.instance, generation=run.generation, replaced=previous
                )
            try:
                replaced, swap_ms = await self._begin(instance, request, fd)
            finally:
                if instance.current is None:
                    self._instances.pop(run.instance, None)
        return host_api.Started(
            id=request.id, instance=run.instance, generation=run.generation, replaced=replaced, swap_ms=swap_ms
        )

    async def _begin(self, instance: Instance, request: host_api.Start, fd: int) -> tuple[int | None, int]:
        try:
            secrets_fd = self._entrusted.take(request.run)
        except StartError:
            os.close(fd)
            raise
        start = partial(instance.start, request.run, fd, secrets_fd, probation=request.probation)
        if not request.together:
            return await start()
        async with self._muster.joined(request.run.instance, request.together) as place:
            return await start(ready=lambda: place.ready(request.run.limits.start_ms / 1000))

    def _after(self, name: str) -> Iterable[Instance]:
        """The instances there are, in the order of their names, from the one after `name` on."""
        names = sorted(each for each in self._instances if each > name)
        return (one for each in names if (one := self._instances[each]).current is not None)

    def _welcome(self, request: host_api.Hello) -> host_api.Welcome:
        running, more = host_api.page(one.running() for one in self._after(request.after))
        ingress = self._settings.ingress
        return host_api.Welcome(
            id=request.id,
            session=self._session,
            version=VERSION,
            engine=self._engine,
            containment=self._containment,
            runs_as=self._runs_as,
            ingress="" if ingress is None else f"{ingress[0]}:{ingress[1]}",
            running=running,
            more=more,
        )

    def _emit(self, event: host_api.Event) -> None:
        for peer in list(self._peers):
            peer.say(event)

    async def _route(self, instance: str, *, up: bool | None, spread: bool) -> None:
        """Tell the router of an instance behind it: whether it answers, None for gone."""
        if self._front is not None:
            await self._front.route(instance, up=up, spread=spread)


def _many_descriptors() -> None:
    """Take what the system allows: an instance needs a few, and there may be thousands."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _pet_watchdog(status: Callable[[], str]) -> None:
    """Tell systemd that the loop turns, for as long as it does."""
    interval_s = systemd.watchdog_s()
    while interval_s is not None:
        systemd.notify(WATCHDOG="1", STATUS=status())
        await asyncio.sleep(interval_s)


def _name(request: host_api.Request) -> str:
    return request.run.instance if isinstance(request, host_api.Start) else ""

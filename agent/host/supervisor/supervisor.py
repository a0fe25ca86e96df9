"""Supervisor of the host: composition, requests of the agent, start and stop. Never runs WebAssembly itself.

The supervisor owns the instances, their resources and the helper processes; all processes end with it. It forks the
router and the egress without exec, so it must stay single-threaded: no executor, no `to_thread`.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from agent import systemd
from agent.host.http.ingress_config import IngressError
from agent.host.ipc import framing, host_api
from agent.host.ipc.host_api import StartError, plain
from agent.host.ipc.keyvalue_api import SHARED
from agent.host.ipc.stats_page import count_of
from agent.host.sandbox import sandbox
from agent.host.supervisor import agent_server, worker_pool
from agent.host.supervisor.agent_server import AgentServer, EventQueue
from agent.host.supervisor.generation import names_in, namespace_of, remove_tree
from agent.host.supervisor.helpers import EgressHandle, RouterHandle
from agent.host.supervisor.instance import Instance, Swapped
from agent.host.supervisor.keyvalue_handle import KeyValueHandle
from agent.host.supervisor.pinned_modules import PinnedModules
from agent.host.supervisor.resources import BACKLOG, HostResources, no_room
from agent.host.supervisor.shared_ingress import SharedIngress
from agent.host.supervisor.swap import SwapBarrier
from agent.host.supervisor.worker_handle import WorkerGoneError
from agent.host.supervisor.worker_pool import WorkerPool, ZygotePool
from fleet.component.wasi import CALLED, SERVED
from fleet.protocol.codes import InstanceState, RejectCode

VERSION: Final = "0.2.0"

_TICK_S: Final = 10.0

_STOP_S: Final = 15.0
_DESCRIBE_S: Final = 60.0


class HostError(Exception):
    """The host cannot start; the message is a sentence for the device's owner."""


class TakenError(HostError):
    """Another host already runs."""


class IsolationError(HostError):
    """Isolation layers that the device's owner requires are missing."""


@dataclass(frozen=True, slots=True)
class HostSettings:
    """Settings of the host.

    Attributes:
        ingress: address and port of the shared HTTP port, 0 for any that is free; None for no router.
        require: isolation layers without which no component runs.
        minimum: isolation layers without which the host does not start.
        agent_group: group whose members may command this host, besides root and the host's own user.
        ingress_config: the owner's file of routes and certificates; None for the usual one, if there is one.
    """

    runtime: Path
    state: Path
    ingress: tuple[str, int] | None
    require: frozenset[str] = frozenset()
    minimum: frozenset[str] = frozenset()
    agent_group: int | None = None
    ingress_config: Path | None = None


class Supervisor:
    """Supervisor of the host: handles the agent's requests."""

    def __init__(self, settings: HostSettings) -> None:
        self._settings = settings
        self._session = uuid.uuid4().hex
        self._engine = ""
        sockets = settings.runtime / "in"
        address = settings.ingress[0] if settings.ingress else "127.0.0.1"
        self._resources = HostResources.open(state=settings.state, sockets=sockets, address=address)
        self._layers = {**_probed(), "cgroup": self._resources.cgroups.available}
        self._runs_as = sandbox.way(self._layers)
        self._pinned = PinnedModules()
        self._pool = WorkerPool(ZygotePool(self._pinned), self._resources.cgroups, self._resources.uids)
        self._barrier = SwapBarrier()
        self._ingress: SharedIngress | None = None
        self._router: RouterHandle | None = None  # of the shared port, or without one for workers that get frames
        self._egress = EgressHandle(sockets)
        self._keyvalue = KeyValueHandle(self._resources.pairs)
        self._instances: dict[str, Instance] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.events: EventQueue = asyncio.Queue()

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain and end all processes.

        Raises:
            HostError: the host cannot start.
        """
        if missing := self._missing(self._settings.minimum):
            raise IsolationError(
                f"cannot start: isolation layers missing around components, as a {self._runs_as}: "
                f"{', '.join(missing)}; needed are {sandbox.needs_of(missing) or 'limits of this process'}; "
                "'fleet-host check' shows the layers there are, --minimum names fewer"
            )
        _raise_descriptor_limit()
        server = AgentServer(self._listen(), self, self.events, agent_group=self._settings.agent_group)
        self._pin_modules()
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        if self._settings.ingress is not None:
            await self._open_ingress(*self._settings.ingress)
        else:
            self._router = RouterHandle(None)
        self._engine = await _ask_engine()
        if self._engine:
            self._pool.prepare()
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        server.start()
        background = [asyncio.ensure_future(self._tick()), asyncio.ensure_future(_pet_watchdog(self._status))]
        systemd.notify(READY="1", STATUS=self._status())
        try:
            await stop.wait()
        finally:
            systemd.notify(STOPPING="1")
            for task in background:
                task.cancel()
            server.stop_accepting()
            (self._settings.runtime / agent_server.SOCKET_NAME).unlink(missing_ok=True)
            await self._end(server)

    def _pin_modules(self) -> None:
        """Keep this version's files for the helpers to come; without that the host goes on."""
        try:
            self._pinned.pin(self._settings.runtime / "modules")
        except OSError as error:
            sys.stderr.write(
                f"host: cannot keep its modules for helpers: {error.strerror}; restart fleet-host after an upgrade\n"
            )
            sys.stderr.flush()

    async def _open_ingress(self, address: str, port: int) -> None:
        """Serve the shared port as the device's owner configured it. Raises `HostError`."""
        try:
            self._ingress = SharedIngress(self._settings.ingress_config, _listen)
            listener = _listen(address, port)
            if not port:
                self._settings = dataclasses.replace(self._settings, ingress=(address, listener.getsockname()[1]))
            self._router = await self._ingress.start(listener)
        except IngressError as error:
            raise HostError(f"cannot serve the shared port: {error}") from error

    def _reload(self) -> None:
        """Read again what the device's owner may change while the host runs."""
        if self._ingress is not None:
            self._tasks.add(task := asyncio.ensure_future(self._ingress.reload()))
            task.add_done_callback(self._tasks.discard)

    def _status(self) -> str:
        engine = f"wasmtime {self._engine}" if self._engine else "no engine on this device: components are refused"
        return f"{systemd.instances(len(self._instances))}; {engine}"

    def _missing(self, wanted: frozenset[str]) -> list[str]:
        return sorted(layer for layer in wanted if not self._layers.get(layer))

    def _listen(self) -> socket.socket:
        try:
            listener = agent_server.open_listener(self._settings.runtime, self._settings.agent_group)
        except agent_server.InUseError as error:
            raise TakenError(str(error)) from error
        except agent_server.ListenError as error:
            raise HostError(str(error)) from error
        (self._settings.runtime / host_api.WHY_NOT).unlink(missing_ok=True)
        return listener

    async def _tick(self) -> None:
        """Run the periodic housekeeping of every instance, and end idle zygotes."""
        while True:
            await asyncio.sleep(_TICK_S)
            for instance in self._instances.values():
                instance.tick()
            self._pool.retire_idle()

    async def _end(self, server: AgentServer) -> None:
        if self._ingress is not None:
            await self._ingress.drain()
        elif self._router is not None:
            await self._router.drain()
        stops = [asyncio.ensure_future(self._stop_one(instance)) for instance in self._instances.values()]
        if stops:
            await asyncio.wait(stops, timeout=_STOP_S)
        self._resources.quotas.save()
        server.close()
        self._pool.close()
        self._egress.close()
        self._resources.messages.close()
        await self._keyvalue.close()
        if self._ingress is not None:
            self._ingress.close()
        elif self._router is not None:
            self._router.close()
        self._pinned.close()

    async def _stop_one(self, instance: Instance) -> None:
        async with instance.lock:
            await instance.stop()

    # Requests of the agent.

    async def handle(self, request: host_api.Request, fd: int | None) -> host_api.Reply:
        """Handle a request of the agent and return the reply. This object owns the descriptor."""
        name = _instance_of(request)
        try:
            return await self._handle(request, fd)
        except (StartError, WorkerGoneError) as error:
            code = error.code if isinstance(error, StartError) else RejectCode.INTERNAL
            return self._failed(request, name, code, error)
        except OSError as error:
            if error.errno not in framing.NO_DESCRIPTORS:
                raise
            return self._failed(request, name, RejectCode.INTERNAL, no_room(name or "the host", error))
        finally:
            self._forget_stopped(name)

    def _failed(self, request: host_api.Request, name: str, code: RejectCode, error: Exception) -> host_api.Failed:
        instance = self._instances.get(name)
        log = () if instance is None else instance.lines()
        return host_api.Failed(id=request.id, code=code, message=plain(str(error)), log=log)

    def agent_gone(self) -> None:
        """Close the secrets that wait for a start, which no client can request any more."""
        self._resources.secrets.clear()

    async def _handle(self, request: host_api.Request, fd: int | None) -> host_api.Reply:
        if fd is not None and not isinstance(request, host_api.Start | host_api.PutSecrets):
            os.close(fd)
        match request:
            case host_api.Hello() | host_api.ListRoutes() | host_api.Logs():
                return self._told(request)
            case host_api.Start():
                return await self._start(request, fd)
            case host_api.Status():
                return await self._stats(request)
            case host_api.Revert():
                return await self._revert(request)
            case host_api.TakeMessages():
                return await self._resources.messages.take(request, self._session)
            case host_api.PutSecrets():
                self._resources.secrets.hold(request, fd)
            case host_api.KeepData():
                await self._keep_data(request)
            case host_api.Commit() | host_api.Stop() | host_api.Restart() | host_api.Configure():
                await self._change(request)
        return host_api.Done(id=request.id)

    async def _keep_data(self, request: host_api.KeepData) -> None:
        """Remove the data of instances that are neither named nor run, and buckets that none of them can share."""
        found = {*names_in(self._resources.data), *names_in(self._resources.pairs)}
        shared = {name for name in found if name.startswith(SHARED)}
        if request.namespaces is not None:
            run = {namespace_of(one.current.run) for one in self._instances.values() if one.current is not None}
            for name in sorted(shared - {f"{SHARED}{each}" for each in {*run, *request.namespaces}}):
                await remove_tree(self._resources.pairs / name)
        for name in sorted(found - shared - frozenset(request.instances)):
            async with self._locked(name) as instance:
                if instance.current is None:
                    sys.stderr.write(f"host: removes the data of {name}, which is no longer to be kept\n")
                    sys.stderr.flush()
                await instance.forget_data()
            self._forget_stopped(name)

    def _told(self, request: host_api.Hello | host_api.ListRoutes | host_api.Logs) -> host_api.Reply:
        """Answer what changes nothing and waits for nobody."""
        match request:
            case host_api.Hello():
                return self._welcome(request)
            case host_api.ListRoutes():
                return self._routes(request)
            case host_api.Logs():
                found = self._instances.get(request.instance)
                reply = host_api.Lines(id=request.id) if found is None else found.logs(request.id)
                if not request.excerpt:
                    return reply
                lines = self._resources.logs.excerpt(request.instance) or reply.lines
                return msgspec.structs.replace(reply, lines=lines)

    async def _change(self, request: host_api.Commit | host_api.Stop | host_api.Restart | host_api.Configure) -> None:
        instance = self._instances.get(request.instance)
        if instance is None:
            if isinstance(request, host_api.Configure):
                raise StartError(RejectCode.HOST_GONE, f"{request.instance} does not run")
            return
        async with instance.lock:
            match request:
                case host_api.Commit():
                    await instance.commit(request.generation)
                case host_api.Configure():
                    await instance.configure(request.generation, request.config)
                case host_api.Restart():
                    await instance.restart()
                case host_api.Stop():
                    await instance.stop()
                    self._resources.cgroups.dismiss(instance.name)

    async def _revert(self, request: host_api.Revert) -> host_api.Started:
        instance = self._instances.get(request.instance)
        if instance is None:
            raise StartError(RejectCode.HOST_GONE, f"{request.instance} does not run")
        async with instance.lock:
            swap_ms = await instance.revert(request.generation)
            assert instance.current is not None
            return host_api.Started(
                id=request.id, instance=instance.name, generation=instance.current.number, swap_ms=swap_ms
            )

    async def _start(self, request: host_api.Start, fd: int | None) -> host_api.Started:
        try:
            return await self._start_with(request, fd)
        finally:
            self._resources.secrets.drop(request.run)

    async def _start_with(self, request: host_api.Start, fd: int | None) -> host_api.Started:
        run = request.run
        if fd is None:
            raise StartError(RejectCode.MALFORMED, f"{run.instance}: no image came with the request to start it")
        try:
            self._check_device()
        except StartError:
            os.close(fd)
            raise
        async with self._locked(run.instance) as instance:
            if instance.current is not None and instance.current.number == run.generation:
                os.close(fd)
                if instance.state is InstanceState.QUARANTINED:
                    await instance.restart()
                previous = None if instance.previous is None else instance.previous.number
                return host_api.Started(
                    id=request.id, instance=run.instance, generation=run.generation, replaced=previous
                )
            swapped = await self._swap(instance, request, fd)
        return host_api.Started(
            id=request.id,
            instance=run.instance,
            generation=run.generation,
            replaced=swapped.replaced,
            swap_ms=swapped.swap_ms,
        )

    @contextlib.asynccontextmanager
    async def _locked(self, name: str) -> AsyncIterator[Instance]:
        """Lock an instance for its start: a new one if there is none, or if the one waited for has stopped."""
        while True:
            instance = self._instances.get(name)
            if instance is None:
                instance = self._instances[name] = Instance(
                    name,
                    self._resources,
                    self._pool,
                    egress=self._egress,
                    keyvalue=self._keyvalue,
                    router=self._router,
                    events=self.events,
                )
            async with instance.lock:
                if self._instances.get(name) is instance:
                    yield instance
                    return

    def _forget_stopped(self, name: str) -> None:
        """Forget an instance that does not run, unless a request is changing it."""
        instance = self._instances.get(name)
        if instance is not None and instance.current is None and not instance.lock.locked():
            del self._instances[name]

    def _check_device(self) -> None:
        """Raise `StartError` if no component may run on this device."""
        if not self._engine:
            raise StartError(RejectCode.NO_ENGINE, "there is no WebAssembly engine for this device")
        if missing := self._missing(self._settings.require):
            raise StartError(
                RejectCode.CONTAINMENT,
                f"component refused: the device requires {', '.join(missing)}, which this host does not provide",
            )

    async def _swap(self, instance: Instance, request: host_api.Start, fd: int) -> Swapped:
        run = request.run
        try:
            secrets_fd = self._resources.secrets.take(run)
        except StartError:
            os.close(fd)
            raise
        if not request.together:
            return await instance.start(run, fd, secrets_fd, probation=request.probation)
        async with self._barrier.joined(run.instance, request.together) as place:
            return await instance.start(run, fd, secrets_fd, probation=request.probation, place=place)

    def _welcome(self, request: host_api.Hello) -> host_api.Welcome:
        running, more = host_api.page(one.running() for one in self._running_after(request.after))
        ingress = self._settings.ingress
        return host_api.Welcome(
            id=request.id,
            session=self._session,
            version=VERSION,
            engine=self._engine,
            containment=self._layers,
            runs_as=self._runs_as,
            ingress="" if ingress is None else f"{ingress[0]}:{ingress[1]}",
            running=running,
            more=more,
            interfaces=(*SERVED, *CALLED) if self._engine else (),
            protocol=host_api.PROTOCOL,
        )

    async def _stats(self, request: host_api.Status) -> host_api.HostStats:
        if (checked := self._instances.get(request.check)) is not None:
            await checked.ask_health(host_api.CHECK_WAIT_S)
        figures, more = host_api.page(one.health() for one in self._running_after(request.after))
        written = count_of(self._resources.written_bytes)
        return host_api.HostStats(id=request.id, instances=figures, written_bytes=written, more=more)

    def _routes(self, request: host_api.ListRoutes) -> host_api.RouteList:
        ports = [
            host_api.RouteView(instance=one.name, port=one.current.run.port, answers=one.state is InstanceState.RUNNING)
            for one in self._running_after("")
            if one.current is not None and one.current.run.port
        ]
        if self._ingress is None:
            return host_api.RouteList(id=request.id, routes=tuple(ports))
        ingress = self._settings.ingress
        assert ingress is not None, "there is an ingress"
        tls = self._ingress.config.tls
        return host_api.RouteList(
            id=request.id,
            ingress=f"{ingress[0]}:{ingress[1]}",
            tls="" if tls is None else tls.listen,
            names=() if tls is None else tuple(name for each in tls.certificates for name in each.names),
            routes=(*self._ingress.routes(), *ports)[: host_api.ROUTES_MAX],
        )

    def _running_after(self, name: str) -> Iterable[Instance]:
        """Yield the running instances after `name`, sorted by name."""
        names = sorted(each for each in self._instances if each > name)
        return (one for each in names if (one := self._instances[each]).current is not None)


def _probed() -> dict[str, bool]:
    """Return which isolation layers hold here. Raises `HostError`: no process can be confined."""
    try:
        return sandbox.probe()
    except sandbox.SandboxError as error:
        raise HostError(f"cannot start: no process can be confined here: {error}; see docs/containers.md") from error


def _instance_of(request: host_api.Request) -> str:
    return request.run.instance if isinstance(request, host_api.Start) else str(getattr(request, "instance", ""))


def _listen(address: str, port: int) -> socket.socket:
    """Open a listening socket of the shared port. Raises `IngressError`."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((address, port))
    except OSError as error:
        sock.close()
        raise IngressError(
            f"cannot listen on {address}:{port}: {error.strerror}; choose another address (--ingress, ingress.toml)"
        ) from error
    sock.listen(BACKLOG)
    return sock


async def _ask_engine() -> str:
    """Return the engine's version, from a separate process; empty without an engine."""
    process = await asyncio.create_subprocess_exec(
        *worker_pool.python_argv("agent.host.compiler"),
        "--describe",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(_DESCRIBE_S):
            out, _ = await process.communicate()
        return str(json.loads(out)["engine"])
    except (TimeoutError, ValueError, KeyError):
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        return ""


def _raise_descriptor_limit() -> None:
    """Raise the limit of open files as far as allowed: there may be thousands of instances."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _pet_watchdog(status: Callable[[], str]) -> None:
    """Notify systemd's watchdog as long as the event loop runs."""
    interval_s = systemd.watchdog_s()
    while interval_s is not None:
        systemd.notify(WATCHDOG="1", STATUS=status())
        await asyncio.sleep(interval_s)

"""Workers of one instance: start them, give them calls, retire them; autoscaler.

`WorkerSet` is mechanism without policy: `Instance` decides when to use it. Clients stay with the router whatever
happens to workers; an instance's memory does not move with it.
"""

import asyncio
import contextlib
import socket
import time
from collections.abc import Coroutine, Iterator
from typing import Final, NamedTuple
from weakref import WeakKeyDictionary

import msgspec

from agent.host.ipc import host_api, keyvalue_api, metrics_page, worker_api
from agent.host.ipc.host_api import StartError
from agent.host.ipc.write_quota import QuotaLedger
from agent.host.supervisor.generation import Generation, data_directory, namespace_of
from agent.host.supervisor.hardware import HardwareError
from agent.host.supervisor.helpers import EgressHandle, RouterHandle, RouterRefusedError, needs_egress
from agent.host.supervisor.instance_log import InstanceLog
from agent.host.supervisor.keyvalue_handle import KeyValueHandle, needs_keyvalue
from agent.host.supervisor.messages import may_publish
from agent.host.supervisor.resources import HostResources, NoRoomError, no_room
from agent.host.supervisor.worker_handle import (
    WorkerChannel,
    WorkerEvents,
    WorkerGoneError,
    WorkerHandle,
    WorkerRefusedError,
)
from agent.host.supervisor.worker_pool import WorkerPool, WorkerSpec, why_not_shared
from fleet.component.wasi import METRICS
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import STOP_MAX_MS, Http

DRAIN_MS: Final = 10_000
"""Time for a worker that is replaced to end its calls."""

GRACE_S: Final = 5.0
"""Time beyond a worker's own limit of a call, after which the supervisor kills a worker whose watchdog has failed."""

_INTERRUPT_S: Final = 1.0  # for an epoch to end a service; one that is blocked in the host ends with its process

_HANDOVER_WAIT_S: Final = 1.0  # a swap waits no longer for connections; the rest follow while the new worker serves

_SPARE_S: Final = 60.0
_CONFIGURE_S: Final = 5.0
"""Wait for a worker to take its configuration; a worker in a long call takes it in turn, and nobody waits for that."""


class Tasks:
    """Background tasks that end with their owner."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        """Start a task."""
        task = asyncio.ensure_future(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def cancel(self) -> None:
        """Cancel every task."""
        for task in list(self._running):
            task.cancel()


class _SetupPacket(NamedTuple):
    """First message to a worker; `channel`: the router's end, open as long as the packet."""

    message: worker_api.Setup
    fds: tuple[int, ...]
    channel: socket.socket | None


class WorkerSet:
    """Workers of an instance, of all its generations. `events` receives their reports."""

    def __init__(
        self,
        name: str,
        resources: HostResources,
        pool: WorkerPool,
        *,
        egress: EgressHandle,
        keyvalue: KeyValueHandle,
        events: WorkerEvents,
        router: RouterHandle | None = None,
    ) -> None:
        self.tasks = Tasks()
        self._name = name
        self._resources = resources
        self._pool = pool
        self._egress = egress
        self._keyvalue = keyvalue
        self._router = router
        self._events = events
        self._ledger = QuotaLedger(name, resources.quotas)
        self._ending: set[asyncio.Future[int]] = set()
        self._generations: WeakKeyDictionary[WorkerHandle, Generation] = WeakKeyDictionary()

    def generation_of(self, worker: WorkerHandle) -> Generation:
        """Return the generation of a worker of this set."""
        return self._generations[worker]

    def bytes_today(self) -> int:
        """Return what the instance has written to its data today, and save what is new of it."""
        return self._ledger.bytes_today()

    async def prepare_data(self, generation: Generation, old: Generation | None) -> None:
        """Make the generation's data directory. Raises `StartError`."""
        run, uid = generation.run, self._resources.uids.allocate(self._name)
        generation.before_schema = None if old is None else old.run.manifest.data_schema
        generation.data = await data_directory(run, uid, self._resources.data, old)
        if run.share_worker:
            generation.unshared_reason = why_not_shared(
                run.grants,
                run.limits,
                generation.image_bytes,
                files=bool(generation.data or run.directories or run.packages),
                secrets=generation.secrets_fd >= 0,
                service=generation.service is not None,
            )

    async def start_worker(self, generation: Generation, *, serve: bool = True) -> WorkerHandle:
        """Start a worker of a generation: sandboxed, guest instantiated; with `serve`, accepting connections.

        Raises:
            StartError: the worker could not be started; INTERNAL for a fault of the device's.
        """
        limits = generation.run.limits
        worker: WorkerHandle | None = None
        try:
            worker = await self._pool.acquire(self._spec(generation), self._events)
            self._generations[worker] = generation
            generation.workers.append(worker)
            with self._setup(worker, generation) as setup:
                ready = await worker.request(
                    setup.message, *setup.fds, reply=worker_api.Ready, timeout_s=limits.start_ms / 1000 + GRACE_S
                )
                channel = None if setup.channel is None else setup.channel.dup()
            worker.set_ready(ready, log_lines_a_minute=limits.log_lines_per_minute, channel=channel)
            await self._attach(generation, worker)
        except WorkerRefusedError as error:
            said, code = f"{self._name}: {error}", error.refusal.code
            raise (NoRoomError if code is RejectCode.INTERNAL else StartError)(code, said) from error
        except WorkerGoneError as error:
            raise StartError(RejectCode.START_FAILED, str(error)) from error
        except TimeoutError as error:
            if worker is not None:
                worker.end("it did not start in time")
            raise StartError(RejectCode.START_FAILED, f"{self._name}: it did not start in time") from error
        except (OSError, RouterRefusedError) as error:
            if worker is not None and worker.ready is not None:
                self.retire(generation, worker)
            raise no_room(self._name, error) from error
        finally:
            if worker is not None and worker.ready is None:
                if worker in generation.workers:  # else it was retired meanwhile
                    generation.workers.remove(worker)
                worker.end("it did not start")
                self._close_when_ended(worker)
        generation.kinds, generation.layers = frozenset(ready.kinds), ready.layers
        generation.started.set()
        if serve:
            await self._serve_at_once(generation, worker)
        return worker

    async def _serve_at_once(self, generation: Generation, worker: WorkerHandle) -> None:
        try:
            await self.listen(generation)
        except StartError:
            self.retire(generation, worker)
            raise
        self.serve(generation, worker)

    async def _attach(self, generation: Generation, worker: WorkerHandle) -> None:
        """Give the router the worker's channel, if it has one. Raises as `RouterHandle.attach`."""
        if worker.channel is not None:
            assert self._router is not None
            limits = generation.run.limits
            reuses = limits.requests_per_instance > 1 and not limits.fuel
            worker.attached = await self._router.attach(self._name, worker, limits, reuses=reuses)

    async def listen(self, generation: Generation) -> None:
        """Have the router accept clients from the generation's listener.

        Raises:
            StartError: the router has no room for it; the one before stays.
        """
        if generation.listener is not None:
            assert self._router is not None
            try:
                await self._router.listen(self._name, generation.listener)
            except (OSError, RouterRefusedError) as error:
                raise no_room(self._name, error) from error

    @contextlib.contextmanager
    def _setup(self, worker: WorkerHandle, generation: Generation) -> Iterator[_SetupPacket]:
        """Yield the worker's `Setup` and its descriptors, in the order that `Setup` documents.

        A slot in a shared worker gets no image, since that was opened before the sandbox was shut, and no egress.
        """
        run, shared = generation.run, worker.process.is_shared
        fds = [worker.page_fd] if shared else [generation.image_fd, worker.page_fd]
        with contextlib.ExitStack() as stack:
            place = 0
            if generation.data:
                place = self._ledger.take()
                worker.ended.add_done_callback(lambda _: self._ledger.give_back(place))
                fds.append(self._ledger.fd)
            egress = needs_egress(run.grants) and not shared
            if egress:
                ticket = self._egress.admit(self._name, run.grants)
                worker.ended.add_done_callback(lambda _: self._egress.release(ticket.number))
                fds.append(stack.enter_context(ticket.worker_end).fileno())
            pairs = needs_keyvalue(run.grants) and not shared
            if pairs:
                fds.append(stack.enter_context(self._admit_to_pairs(worker, generation)).fileno())
            if generation.secrets_fd >= 0:
                fds.append(generation.secrets_fd)
            channel = None
            if generation.run.manifest.triggers_of(Http):
                channel, theirs = (stack.enter_context(end) for end in socket.socketpair())
                fds.append(theirs.fileno())
            messages = may_publish(run.grants) and not shared
            if messages:
                gate = self._resources.messages
                admitted, end = gate.admit(self._name, run.grants, worker.kill)
                worker.ended.add_done_callback(lambda _: gate.release(admitted))
                fds.append(stack.enter_context(end).fileno())
            if has_metrics := run.grants.allows(METRICS):
                worker.metrics_fd = metrics_page.create_page(worker.name)
                fds.append(worker.metrics_fd)
            hardware = () if shared else self._hardware(run)
            fds += hardware
            message = worker_api.Setup(
                instance=self._name,
                grants=run.grants,
                limits=run.limits,
                config=run.config,
                uid=self._resources.uids.allocate(self._name),
                data=generation.data,
                place=place,
                image=generation.image_sha256 if shared else "",
                secrets=generation.secrets_fd >= 0,
                egress=egress,
                channel=channel is not None,
                service=generation.service is not None,
                messages=messages,
                keyvalue=pairs,
                packages=tuple(
                    worker_api.Package(path=each.path, file=each.file, owner=each.owner) for each in run.packages
                ),
                directories=run.directories,
                metrics=has_metrics,
                hardware=len(hardware),
            )
            yield _SetupPacket(message, tuple(fds), channel)

    def _hardware(self, run: host_api.Run) -> tuple[int, ...]:
        """Return descriptors of granted hardware, which stay the host's.

        Raises:
            NoRoomError: the device does not have it now, which is no crash of the component.
        """
        try:
            return self._resources.hardware.take(self._name, run.grants.devices, run.serial)
        except HardwareError as error:
            raise NoRoomError(RejectCode.START_FAILED, f"{self._name}: {error}") from error

    def _admit_to_pairs(self, worker: WorkerHandle, generation: Generation) -> socket.socket:
        """Let a worker use the key-value store; return its end of the socket. Raises `OSError`: no room for it."""
        place = self._ledger.take()
        run = generation.run
        schema = run.manifest.data_schema
        about = keyvalue_api.RegisterUser(
            instance=self._name,
            schema=schema,
            before=schema if generation.before_schema is None else generation.before_schema,
            storage_bytes=run.limits.storage_bytes,
            daily_written_bytes=run.limits.daily_written_bytes,
            place=place,
            fresh=not generation.had_pairs,
            namespace=namespace_of(run),
            buckets=run.grants.stores,
        )
        try:
            ticket = self._keyvalue.admit(about, *self._ledger.fds)
        except OSError:
            self._ledger.give_back(place)
            raise
        generation.had_pairs = True

        def release(_ended: object) -> None:
            self._keyvalue.release(ticket.number)
            self._ledger.give_back(place)

        worker.ended.add_done_callback(release)
        return ticket.worker_end

    def _spec(self, generation: Generation) -> WorkerSpec:
        run = generation.run
        return WorkerSpec(
            instance=self._name,
            name=f"{self._name}/{run.generation}",
            namespace=namespace_of(run),
            fuel=run.manifest.limits.fuel > 0,
            limits=run.limits,
            image_fd=generation.image_fd,
            image_sha256=generation.image_sha256,
            may_share=generation.may_share,
        )

    def can_move(self, generation: Generation) -> bool:
        """Return whether its only worker is idle and a fuller shared worker has a slot for it."""
        workers = generation.alive
        if not generation.may_share or generation.is_exclusive or len(workers) != 1 or not workers[0].is_idle:
            return False
        return self._pool.has_fuller(workers[0], self._spec(generation))

    def serve(self, generation: Generation, worker: WorkerHandle) -> None:
        """Let a worker take calls from its channel, or run the service. Raises `WorkerGoneError`."""
        if generation.service is not None:
            worker.notify(worker_api.RunService(args=generation.service.args))
        if generation.listener is None:
            return
        assert worker.attached is not None
        if worker.route is None:
            worker.route = worker.attached
            worker.notify(worker_api.Serve())
        worker.route.serve()

    def stop_listening(self) -> None:
        """Close the listener that the router has, if it has one."""
        if self._router is not None:
            self._router.stop_listening(self._name)

    def serve_all(self, generation: Generation) -> None:
        """Make all workers of a generation accept connections. Raises `WorkerGoneError` if none is left."""
        if not generation.alive:
            raise WorkerGoneError(f"{self._name}: {generation.lost or 'its worker has ended'}")
        for worker in generation.alive:
            self.serve(generation, worker)

    async def configure(self, generation: Generation, config: dict[str, str]) -> None:
        """Give every worker of a generation this configuration, those that start later included.

        Raises:
            StartError: the component cannot take it without a restart; nothing has changed.
        """
        before = generation.run
        generation.run = msgspec.structs.replace(before, config=config)
        for worker in generation.alive:
            # a worker in a long call takes it in turn; for a worker that has ended another starts
            with contextlib.suppress(WorkerGoneError, TimeoutError):
                said = await worker.request(
                    worker_api.Configure(config=config), reply=worker_api.Configured, timeout_s=_CONFIGURE_S
                )
                if said.problem is not None:
                    generation.run = before
                    raise StartError(RejectCode.START_FAILED, f"{self._name}: {said.problem}")

    async def finish_task(self, generation: Generation) -> None:
        """Wait until a task in flight has ended: two generations never run one at once."""
        timeout_s = generation.run.limits.total_ms / 1000 + GRACE_S
        for worker in generation.alive:
            with contextlib.suppress(WorkerGoneError, TimeoutError):
                await worker.request(worker_api.Probe(), reply=worker_api.Probed, timeout_s=timeout_s)

    async def end_service(self, generation: Generation) -> None:
        """End the run of a service: by the end of its standard input, after `stop_ms` by an epoch, or with its process.

        Its workers count no more as the generation's from the begin on, so that none is replaced.
        """
        service = generation.service
        if service is None:
            return
        ends = []
        for worker in list(generation.workers):
            self._set_aside(generation, worker)
            ends.append(self._end_service(worker, min(service.stop_ms, STOP_MAX_MS) / 1000))
        await asyncio.gather(*ends)

    async def _end_service(self, worker: WorkerHandle, stop_s: float) -> None:
        try:
            for message, wait_s in ((worker_api.Drain(), stop_s), (worker_api.Interrupt(call=0), _INTERRUPT_S)):
                if not worker.alive:
                    break
                with contextlib.suppress(WorkerGoneError):
                    worker.notify(message)
                await asyncio.wait([worker.ended], timeout=wait_s)
        finally:
            worker.end("its service did not end in time")

    async def halt(self, generation: Generation) -> None:
        """End every worker of a generation, when its calls have ended; it can be started again."""
        await self.end_service(generation)
        await self.hand_over(generation.alive, wait_s=DRAIN_MS / 1000)
        await self.end_all(generation)

    async def end_all(self, generation: Generation) -> None:
        """End every worker of a generation now, and wait for that."""
        old = list(generation.workers)
        for worker in old:
            self.retire(generation, worker, drained=True)
        if old:
            await asyncio.wait([worker.ended for worker in old], timeout=GRACE_S)

    async def hand_over(self, old: list[WorkerHandle], *, wait_s: float = _HANDOVER_WAIT_S) -> None:
        """Give no more calls to `old` workers, and wait a little until they have ended those that they have."""
        drains = [self._drain_channel(worker, worker.route, wait_s) for worker in old if worker.alive and worker.route]
        await asyncio.gather(*drains)

    async def _drain_channel(self, worker: WorkerHandle, channel: WorkerChannel, wait_s: float) -> None:
        await channel.drain(wait_s)
        with contextlib.suppress(WorkerGoneError):
            worker.notify(worker_api.Resume())  # from `SaveState`; the worker may serve again later

    async def replace(self, generation: Generation, old: list[WorkerHandle]) -> None:
        """Let `old` workers end their calls, and retire them: others have taken over."""
        if (service := generation.service) is not None:
            for worker in old:
                self._set_aside(generation, worker)
                self.tasks.spawn(self._end_service(worker, min(service.stop_ms, STOP_MAX_MS) / 1000))
            return
        await self.hand_over(old)
        for worker in old:
            self.retire(generation, worker)

    def drop(self, generation: Generation, *, drained: bool = False) -> None:
        """End a generation for good; `drained`: its calls have ended."""
        generation.dropped, generation.is_serving = True, False
        for worker in list(generation.workers):
            self.retire(generation, worker, drained=drained)
        generation.close()

    def retire(self, generation: Generation, worker: WorkerHandle, *, drained: bool = False) -> None:
        """End a worker on purpose and keep its figures: now if `drained`, else when its calls have ended."""
        self._set_aside(generation, worker)
        if worker.is_draining and not drained:
            self.tasks.spawn(worker.end_when_drained("it was replaced", DRAIN_MS / 1000))
        else:
            worker.end("it was replaced")

    def _set_aside(self, generation: Generation, worker: WorkerHandle) -> None:
        """Keep the figures of a worker that is about to end."""
        if worker in generation.workers:
            generation.workers.remove(worker)
            generation.keep_figures(worker)
        self._close_when_ended(worker)

    def _close_when_ended(self, worker: WorkerHandle) -> None:
        worker.ended.add_done_callback(lambda _: worker.close())
        self._ending.add(worker.ended)
        worker.ended.add_done_callback(self._ending.discard)

    async def wait_ended(self) -> None:
        """Wait until every retired worker has ended: a matter of milliseconds."""
        if self._ending:
            await asyncio.wait(set(self._ending), timeout=GRACE_S)


class Autoscaler:
    """Number and place of an instance's workers: one more while calls wait, one fewer when they no longer do.

    An instance that shares moves to a fuller worker when it can, so that its own may become empty and end.
    """

    def __init__(self, workers: WorkerSet, lock: asyncio.Lock, log: InstanceLog) -> None:
        """`lock` is the instance's: nothing is scaled while a change is under way."""
        self._workers = workers
        self._lock = lock
        self._log = log
        self._starting = False
        self._busy_s = 0.0

    def busy(self, generation: Generation) -> None:
        """Start a further worker, if the instance may have one: a call of the serving generation takes its time."""
        self._busy_s = time.monotonic()
        few = len(generation.workers) < generation.run.limits.concurrency
        if few and not self._starting and not self._lock.locked():
            self._starting = True
            self._workers.tasks.spawn(self._start_another(generation))

    def tick(self, generation: Generation) -> None:
        """Retire or move a worker of the serving generation, if there is reason to."""
        if self._lock.locked():
            return
        if len(generation.alive) > 1 and time.monotonic() - self._busy_s > _SPARE_S:
            self._workers.tasks.spawn(self._retire_youngest(generation))
        elif self._workers.can_move(generation):
            self._workers.tasks.spawn(self._move(generation))

    async def _start_another(self, generation: Generation) -> None:
        try:
            async with self._lock:
                if generation.is_serving:
                    await self._workers.start_worker(generation)
        except (StartError, WorkerGoneError) as error:
            self._log.note(f"host: no further worker: {error}")
        finally:
            self._starting = False

    async def _retire_youngest(self, generation: Generation) -> None:
        async with self._lock:
            alive = generation.alive
            if generation.is_serving and len(alive) > 1:
                await self._workers.replace(generation, alive[-1:])

    async def _move(self, generation: Generation) -> None:
        async with self._lock:
            old = generation.alive
            if not generation.is_serving or not self._workers.can_move(generation):
                return
            try:
                await self._workers.start_worker(generation)
            except (StartError, WorkerGoneError) as error:
                self._log.note(f"host: it stays in its worker: {error}")
                return
            await self._workers.replace(generation, old)

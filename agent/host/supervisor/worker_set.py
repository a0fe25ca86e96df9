"""Workers of a generation; autoscaler.

The lanes of an instance: raising them, giving them traffic, moving connections between them, ending them.

Mechanics without policy: when to do which is `agent.host.supervisor.instance`'s to say.

How many lanes an instance has, and where: one more while calls wait, one fewer when they no longer do.

One that shares moves to a fuller lane when it can, so that its own may become empty and end. Whatever is moved, the
clients' connections go along, and nobody is lost. What an instance keeps in its memory is not moved.
"""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Final

from agent.host.ipc import framing, host_api, worker_api
from agent.host.ipc.host_api import StartError
from agent.host.ipc.write_quota import QuotaLedger
from agent.host.sandbox import sandbox
from agent.host.supervisor.generation import Generation, data_directory
from agent.host.supervisor.helpers import EgressHandle, wanted
from agent.host.supervisor.resources import Cgroups
from agent.host.supervisor.worker_handle import WorkerGoneError, WorkerHandle
from agent.host.supervisor.worker_pool import SEATS, Wanted, ZygotePool, why_alone
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import Limits
from fleet.protocol.names import BadNameError, TargetName

DRAIN_MS: Final = 10_000

HANDOVER_WAIT_S: Final = 1.0

GRACE_S: Final = 5.0


def _namespace(run: host_api.Run) -> str:
    try:
        return TargetName.from_path(run.target).namespace
    except BadNameError:
        return ""


class Tasks:
    """Work in the background, that ends with its owner."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        """Begin it."""
        task = asyncio.ensure_future(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def cancel(self) -> None:
        """End all of it."""
        for task in list(self._running):
            task.cancel()


class WorkerSet:
    """How one instance's lanes are handled.

    `on_said(generation, lane, message)` hears what lanes say of themselves, and `on_end(generation, lane, uptime_s)`
    that one has ended.
    """

    def __init__(
        self,
        name: str,
        *,
        nursery: ZygotePool,
        uid: Callable[[str], int | None],
        data: Path,
        cgroups: Cgroups,
        tasks: Tasks,
        account: QuotaLedger,
        on_said: Callable[[Generation, WorkerHandle, worker_api.FromWorker], None],
        on_end: Callable[[Generation, WorkerHandle, float], None],
        outlet: EgressHandle,
    ) -> None:
        self._name = name
        self._nursery = nursery
        self._uid = uid
        self._data = data
        self._cgroups = cgroups
        self._tasks = tasks
        self._account = account
        self._ending: set[asyncio.Future[int]] = set()
        self._on_said = on_said
        self._on_end = on_end
        self._outlet = outlet

    async def prepare_data(self, generation: Generation, old: Generation | None) -> None:
        """Make the generation's data directory. Raises `StartError`."""
        run = generation.run
        generation.data = await data_directory(run, self._uid(self._name), self._data, old)
        if run.share_lane:
            generation.alone = why_alone(
                run.grants,
                run.limits,
                generation.image_bytes,
                files=bool(generation.data),
                secrets=generation.secrets_fd >= 0,
            )

    async def raise_lane(self, generation: Generation, *, serve: bool = True) -> WorkerHandle:
        """A lane more for a generation, in its cell, with the guest instantiated; it accepts at once if `serve`.

        Raises:
            StartError: it could not be raised.
        """
        run = generation.run
        lane: WorkerHandle | None = None
        asks: socket.socket | None = None
        try:
            lane = await self._fork(generation)
            generation.lanes.append(lane)
            if wanted(run.grants) and lane.shared is None:
                number, asks = self._outlet.admit(self._name, run.grants)
                lane.ended.add_done_callback(lambda _: self._outlet.release(number))
            place = 0
            if generation.data:
                place = self._account.take()
                lane.ended.add_done_callback(lambda _: self._account.give_back(place))
            setup = worker_api.Setup(
                instance=self._name,
                grants=run.grants,
                limits=run.limits,
                config=run.config,
                uid=self._uid(self._name),
                data=generation.data,
                place=place,
                image=generation.image if lane.shared is not None else "",
                secrets=generation.secrets_fd >= 0,
                egress=asks is not None,
            )
            answer = await lane.ask(
                setup,
                *(() if lane.shared is not None else (generation.image_fd,)),
                lane.page_fd,
                *((self._account.fd,) if generation.data else ()),
                *(() if asks is None else (asks.fileno(),)),
                *((generation.secrets_fd,) if generation.secrets_fd >= 0 else ()),
                answer=worker_api.Ready,
                timeout_s=run.limits.start_ms / 1000 + GRACE_S,
            )
        except WorkerGoneError as error:
            raise StartError(RejectCode.START_FAILED, str(error)) from error
        except TimeoutError as error:
            assert lane is not None
            lane.end("it did not start in time")
            raise StartError(RejectCode.START_FAILED, f"{self._name}: it did not start in time") from error
        finally:
            if asks is not None:
                asks.close()
            if lane is not None and lane.ready is None:
                generation.lanes.remove(lane)
                lane.end("it did not start")
                self._see_off(lane)
        if isinstance(answer, worker_api.Refused):
            raise StartError(answer.code, f"{self._name}: {answer.message}")
        assert isinstance(answer, worker_api.Ready)
        lane.is_set_up(log_lines_a_minute=run.limits.log_lines_per_minute)
        generation.kinds, generation.layers = frozenset(answer.kinds), answer.layers
        began_s = time.monotonic()
        lane.ended.add_done_callback(lambda _: self._on_end(generation, lane, time.monotonic() - began_s))
        if serve and generation.listener is not None:
            self.serve(generation, lane)
        return lane

    async def _fork(self, generation: Generation) -> WorkerHandle:
        """A lane, or a seat in one that is shared. Raises `LaneGoneError`."""
        run = generation.run
        name = f"{self._name}/{run.generation}"
        namespace, fuel = _namespace(run), run.manifest.limits.fuel > 0

        def said(who: WorkerHandle, message: worker_api.FromWorker) -> None:
            self._on_said(generation, who, message)

        if not generation.shares:
            lane = await self._nursery.lane(namespace, name, said, fuel=fuel)
            self._admit(self._name, lane.pid, run.limits, lanes=2 * run.limits.concurrency)  # two generations at a swap
            return lane
        return await self._nursery.sharing.seat(self._wanted(generation, namespace), name, said)

    def fuller(self, generation: Generation) -> bool:
        """Whether there is a shared lane with more seats taken that would take this one too, and it is at rest."""
        lanes = generation.alive
        if not generation.shares or len(lanes) != 1 or lanes[0].page.began_ns():
            return False
        return self._nursery.sharing.better(lanes[0], self._wanted(generation, _namespace(generation.run)))

    def _wanted(self, generation: Generation, namespace: str) -> Wanted:
        limits = generation.run.limits
        common = f"+{namespace}"  # no instance has such a name
        return Wanted(
            namespace=namespace,
            image=generation.image,
            image_fd=generation.image_fd,
            limits=limits,
            fuel=generation.run.manifest.limits.fuel > 0,
            uid=self._uid(common),
            admit=lambda pid: self._admit(common, pid, limits, lanes=SEATS),
            dismiss=lambda: self._cgroups.dismiss(common),
        )

    def _admit(self, group: str, pid: int, limits: Limits, *, lanes: int) -> None:
        """Into its control group, which may have `lanes` of these limits."""
        each = sandbox.worker_bytes(
            memory_bytes=limits.memory_bytes, body_bytes=limits.request_bytes + limits.response_bytes
        )
        self._cgroups.admit(group, pid, lanes=lanes, lane_bytes=each)

    def serve(self, generation: Generation, lane: WorkerHandle) -> None:
        """Let a lane accept. Raises `LaneGoneError`."""
        assert generation.listener is not None
        if generation.queue is None and generation.run.limits.concurrency > 1:
            generation.queue = framing.socket_pair()
        lane.send(
            worker_api.Serve(), generation.listener.sock.fileno(), *(end.fileno() for end in generation.queue or ())
        )

    def offer(self, generation: Generation) -> None:
        """Let all lanes of a generation accept. Raises `LaneGoneError`: it has none any more."""
        if not generation.alive:
            raise WorkerGoneError(f"{self._name}: {generation.lost or 'its lane has ended'}")
        if generation.listener is not None:
            for lane in generation.alive:
                self.serve(generation, lane)

    async def settle(self, old: Generation) -> None:
        """Wait until a task in flight has ended: two generations never run at once."""
        timeout_s = old.run.limits.total_ms / 1000 + GRACE_S
        for lane in old.alive:
            with contextlib.suppress(WorkerGoneError, TimeoutError):
                await lane.ask(worker_api.Probe(), answer=worker_api.Probed, timeout_s=timeout_s)

    async def hand_over(
        self, old: list[WorkerHandle], new: list[WorkerHandle], *, wait_s: float = HANDOVER_WAIT_S
    ) -> None:
        """Let `old` lanes accept no more, and pass their connections to `new` ones (or, without any, end them)."""
        waits = []
        for number, lane in enumerate(old):
            if not lane.alive:
                continue
            order = worker_api.Drain(deadline_ms=DRAIN_MS)
            fds: tuple[int, ...] = ()
            pair = None
            try:
                if new:
                    pair = framing.socket_pair()
                    new[number % len(new)].send(worker_api.AcceptConnections(), pair[1].fileno())
                    fds = (pair[0].fileno(),)
                waits.append(
                    asyncio.ensure_future(lane.ask(order, *fds, answer=worker_api.HandedOver, timeout_s=wait_s))
                )
                await asyncio.sleep(0)  # let it send before its descriptor is closed here
            except WorkerGoneError:
                pass
            finally:
                for sock in pair or ():
                    sock.close()
        await asyncio.gather(*waits, return_exceptions=True)

    def drop(self, generation: Generation, *, drained: bool = False) -> None:
        """End a generation for good."""
        generation.dropped = True
        for lane in list(generation.lanes):
            self.retire(generation, lane, drained=drained)
        if generation.saved is not None:
            generation.saved.close()
        for end in generation.queue or ():
            end.close()
        generation.queue = None
        for fd in (generation.image_fd, generation.secrets_fd):
            if fd >= 0:
                os.close(fd)
        generation.image_fd = generation.secrets_fd = -1

    def _see_off(self, lane: WorkerHandle) -> None:
        """Close what is left of it here once it has ended."""
        lane.ended.add_done_callback(lambda _: lane.close())
        self._ending.add(lane.ended)
        lane.ended.add_done_callback(self._ending.discard)

    async def gone(self) -> None:
        """Wait until the processes of all lanes that were retired have ended; it is a matter of milliseconds."""
        if self._ending:
            await asyncio.wait(set(self._ending), timeout=GRACE_S)

    def retire(self, generation: Generation, lane: WorkerHandle, *, drained: bool = False) -> None:
        """End a lane on purpose and keep its figures; if it is handing over still (not `drained`), when it has."""
        if lane in generation.lanes:
            generation.lanes.remove(lane)
            generation.past = generation.past.plus(lane.page.read())
        self._see_off(lane)
        if not drained and lane.drained is not None and not lane.drained.done():
            self._tasks.spawn(lane.end_when_drained("it was replaced", DRAIN_MS / 1000))
        else:
            lane.end("it was replaced")


_SPARE_S: Final = 60.0


class Autoscaler:
    """The lanes of one instance, by what there is to do."""

    def __init__(
        self,
        crew: WorkerSet,
        tasks: Tasks,
        lock: asyncio.Lock,
        *,
        note: Callable[[str], None],
        is_current: Callable[[Generation], bool],
    ) -> None:
        """`lock` is the instance's, `note(text)` takes a line for its log."""
        self._crew = crew
        self._tasks = tasks
        self._lock = lock
        self._note = note
        self._is_current = is_current
        self._raising = False
        self._busy_s = 0.0

    def busy(self, generation: Generation) -> None:
        """A call of the current generation takes its time: another lane would be of use, if it may have one."""
        self._busy_s = time.monotonic()
        few = len(generation.lanes) < generation.run.limits.concurrency
        if few and not self._raising and not self._lock.locked():
            self._raising = True
            self._tasks.spawn(self._raise_another(generation))

    def watch(self, generation: Generation) -> None:
        """Look after the current generation, from time to time."""
        if self._lock.locked():
            return
        if len(generation.alive) > 1 and time.monotonic() - self._busy_s > _SPARE_S:
            self._tasks.spawn(self._fewer(generation))
        elif self._crew.fuller(generation):
            self._tasks.spawn(self._move(generation))

    async def _raise_another(self, generation: Generation) -> None:
        try:
            async with self._lock:
                if self._is_current(generation) and not generation.dropped:
                    await self._crew.raise_lane(generation)
        except (StartError, WorkerGoneError) as error:
            self._note(f"host: no further lane: {error}")
        finally:
            self._raising = False

    async def _fewer(self, generation: Generation) -> None:
        """Let the youngest lane go; its connections move to another."""
        async with self._lock:
            alive = generation.alive
            if self._is_current(generation) and len(alive) > 1:
                await self._crew.hand_over([alive[-1]], alive[:-1])
                self._crew.retire(generation, alive[-1])

    async def _move(self, generation: Generation) -> None:
        """To a shared lane with more seats taken."""
        async with self._lock:
            old = generation.alive
            if not self._is_current(generation) or not self._crew.fuller(generation):
                return
            try:
                lane = await self._crew.raise_lane(generation)
            except (StartError, WorkerGoneError) as error:
                self._note(f"host: it stays in its lane: {error}")
                return
            await self._crew.hand_over(old, [lane])
            for each in old:
                self._crew.retire(generation, each)

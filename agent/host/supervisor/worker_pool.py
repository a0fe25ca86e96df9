"""Zygotes, workers from them, shared workers.

The supervisor's side of zygotes: starting them, and having lanes forked by them.

Lanes that several instances of one publisher share, where the operator allows it: the supervisor's side.

Each instance in one has a *seat*: a `Lane` handle with a control socket and figures of its own, so that whoever raises,
swaps and ends lanes need not know the difference. What differs is how seats end:

    ended for itself     its socket is closed; the process and the others go on
    its call must end    only ending the process helps: it is to blame, the others are bystanders and are told its name
    the process dies     whoever was in a call is to blame; if nobody was, each has lost its lane as it would its own
    one left in a call   the process ends itself once that call is past a limit, and the others are bystanders

An image can only be mapped before the cell is shut. So an instance takes a seat where its image is already open, and
else a lane is opened for it, with the images of its whole set, that seats of emptier lanes can move to later.

How this host starts its own programs: the same Python, finding modules the same way.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from agent.host.ipc import framing, host_api, worker_api
from agent.host.supervisor.worker_handle import WorkerGoneError, WorkerHandle
from fleet.protocol.bounds import MIB
from fleet.protocol.manifest import Grants, Limits

SEATS: Final = 64

_OPEN_S: Final = 20.0

_IMAGE_MAX_BYTES: Final = 4 * MIB

OnMessage = Callable[[WorkerHandle, worker_api.FromWorker], None]


def why_alone(grants: Grants, limits: Limits, image_bytes: int, *, files: bool, secrets: bool) -> str:
    """Why an instance that may share a lane has one of its own all the same, as a sentence; empty where it shares.

    Whoever breaks out of one instance has what its process has: so what is worth taking stays out of shared lanes.
    """
    if files:
        return "it has files, which no neighbour may come near"
    if secrets:
        return "it has secrets, which no neighbour may come near"
    if grants.outbound or grants.instances:
        return "it may connect to others, which no neighbour may do in its name"
    if limits.concurrency > 1:
        return f"it may have {limits.concurrency} calls at once, and a shared lane has one"
    if image_bytes > _IMAGE_MAX_BYTES:
        return f"its image has {image_bytes} bytes, and small ones share: at most {_IMAGE_MAX_BYTES}"
    return ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A seat that is wanted.

    Attributes:
        namespace: the publisher's: only its instances share.
        image, image_fd: the image's name and its memfd.
        limits: of the instance.
        fuel: whether its images count instructions.
        uid: what all lanes of the namespace that are shared become; None to stay.
        admit: puts a new process into its control group.
        dismiss: removes that group, when none is left in it.
    """

    namespace: str
    image: str
    image_fd: int
    limits: Limits
    fuel: bool
    uid: int | None
    admit: Callable[[int], None]
    dismiss: Callable[[], None]

    @property
    def needs(self) -> tuple[int, int, int]:
        """What the process is limited by: the largest of each of its instances."""
        return self.limits.memory_bytes, self.limits.request_bytes, self.limits.response_bytes


class SharedWorkerHandle:
    """One process and its seats."""

    def __init__(self, number: int, process: WorkerHandle, wanted: Wanted, images: frozenset[str]) -> None:
        self.name = process.name
        self._number = number
        self.process = process
        self.seats: list[WorkerHandle] = []
        self.images = images
        self._needs = wanted.needs
        self._blamed: WorkerHandle | None = None
        self._ending = False
        process.ended.add_done_callback(lambda _: self._ended())
        process.ended.add_done_callback(lambda _: wanted.dismiss())

    @property
    def rank(self) -> tuple[int, int]:
        """The higher, the better a place for one more."""
        return len(self.seats), self._number

    def takes(self, wanted: Wanted) -> bool:
        """Whether there is a seat for this one."""
        return (
            self.process.alive
            and not self._ending
            and len(self.seats) < SEATS
            and wanted.image in self.images
            and all(need <= most for need, most in zip(wanted.needs, self._needs, strict=True))
        )

    def seat(self, name: str, on_message: OnMessage) -> WorkerHandle:
        """An instance more. Raises `LaneGoneError`."""
        ours, theirs = framing.socket_pair()
        with theirs:
            seat = WorkerHandle(name, ours, on_message)
            seat.pid, seat.shared = self.process.pid, self
            try:
                self.process.send(worker_api.AddSlot(), theirs.fileno())
            except WorkerGoneError:
                seat.close()
                raise
        self.seats.append(seat)
        return seat

    def private_bytes(self) -> int:
        """A seat's part of the process's own memory."""
        return self.process.private_bytes() // max(1, len(self.seats))

    def kill(self, asked: WorkerHandle, because: str, *, at_fault: bool = False) -> None:
        """End the process, for what `asked` did (`at_fault`), or rather for whoever is in a call."""
        if self._blamed is None:
            self._blamed = asked if at_fault else self._in_call() or asked
        self._ending = True
        self.process.kill(because)

    def _in_call(self) -> WorkerHandle | None:
        return next((seat for seat in self.seats if seat.page.began_ns()), None)

    def leave(self, seat: WorkerHandle) -> None:
        """End one seat alone, and the process if it was the last."""
        if seat in self.seats:
            self.seats.remove(seat)
            seat.has_ended(0)
        if not self.seats:
            self._ending = True
            self.process.kill("nobody is left in it")

    def _ended(self) -> None:
        blamed = self._blamed or self._in_call()
        seats, self.seats = self.seats, []
        for seat in seats:
            seat.killed_because = seat.killed_because or self.process.describe_end()
            seat.blamed = seat is blamed
            if blamed is not None and not seat.blamed:
                seat.bystander_of = blamed.name.partition("/")[0]
            elif blamed is None and self.process.exit_status == worker_api.ABANDONED:
                seat.bystander_of = "one that had left it"
            seat.has_ended(self.process.exit_status or 0)
        self.process.close()


class SharedWorkerPool:
    """Every shared lane, by namespace."""

    def __init__(self, fork: Callable[[Wanted, str, OnMessage], Awaitable[WorkerHandle]]) -> None:
        """`fork(wanted, name, on_message)` gives a new process; raises `LaneGoneError`."""
        self._fork = fork
        self._lanes: dict[tuple[str, bool], list[SharedWorkerHandle]] = {}
        self._images: dict[tuple[str, bool], dict[str, int]] = {}
        self._locks: dict[tuple[str, bool], asyncio.Lock] = {}
        self._opened = 0

    async def seat(self, wanted: Wanted, name: str, on_message: OnMessage) -> WorkerHandle:
        """A seat for an instance, in a lane that has its image, or in a new one.

        Raises:
            LaneGoneError: there is none to be had.
            TimeoutError: the new lane did not open in time.
        """
        key = wanted.namespace, wanted.fuel
        async with self._locks.setdefault(key, asyncio.Lock()):
            lanes = self._lanes[key] = [lane for lane in self._lanes.get(key, []) if lane.process.alive]
            self._forget(key, wanted.image)
            fitting = [lane for lane in lanes if lane.takes(wanted)]
            if not fitting:
                fitting = [await self._open(key, wanted)]
                lanes += fitting
            return max(fitting, key=lambda lane: lane.rank).seat(name, on_message)

    def better(self, seat: WorkerHandle, wanted: Wanted) -> bool:
        """Whether a fuller lane would take this one too: then its own may become empty, and end.

        Of two that are equally full the newer is the fuller: it has the more images open. So seats only ever move up.
        """
        lanes = self._lanes.get((wanted.namespace, wanted.fuel), [])
        mine = next((lane.rank for lane in lanes if lane is seat.shared), (SEATS, 0))
        return mine[0] < SEATS and any(lane.rank > mine and lane.takes(wanted) for lane in lanes)

    def _forget(self, key: tuple[str, bool], but: str) -> None:
        """Close the images that no seat's lane has open."""
        kept = self._images.setdefault(key, {})
        used = frozenset[str]().union(*(lane.images for lane in self._lanes[key] if lane.seats))
        for image in [image for image in kept if image != but and image not in used]:
            os.close(kept.pop(image))

    async def _open(self, key: tuple[str, bool], wanted: Wanted) -> SharedWorkerHandle:
        kept = self._images[key]
        if wanted.image not in kept:
            kept[wanted.image] = os.dup(wanted.image_fd)
        chosen = list(kept)[-worker_api.IMAGES_MAX :]
        if wanted.image not in chosen:
            chosen[0] = wanted.image
        self._opened += 1
        name = f"{wanted.namespace}-{self._opened}"
        process = await self._fork(wanted, name, _unheard)
        wanted.admit(process.pid)
        order = worker_api.OpenShared(images=tuple(chosen), limits=wanted.limits, seats=SEATS, uid=wanted.uid)
        try:
            answer = await process.ask(
                order, *(kept[image] for image in chosen), answer=worker_api.Opened, timeout_s=_OPEN_S
            )
        except (WorkerGoneError, TimeoutError):
            process.kill("it did not open in time")
            raise
        if isinstance(answer, worker_api.Refused):
            process.kill(answer.message)
            raise WorkerGoneError(answer.message)
        return SharedWorkerHandle(self._opened, process, wanted, frozenset(chosen))

    def close(self) -> None:
        """Let go of the images."""
        for images in self._images.values():
            for fd in images.values():
                with contextlib.suppress(OSError):
                    os.close(fd)
        self._images.clear()


def _unheard(_lane: WorkerHandle, _message: worker_api.FromWorker) -> None:
    """A shared lane's process says nothing of itself."""


FORK: Final = b"F"

_MESSAGE_BYTES: Final = 12

_FORK_TIMEOUT_S: Final = 60.0

_ENVIRONMENT: Final = frozenset(
    {"PATH", "LANG", "LC_ALL", "TZ", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR"}
)

_IDLE_S: Final = 60.0


def _environment() -> dict[str, str]:
    """What a zygote, and so every lane, may know of this host's environment: how to find Python, and nothing else.

    The WASI implementation would start a thread for each processor of the board; one does.
    """
    kept = {name: value for name, value in os.environ.items() if name in _ENVIRONMENT or name.startswith("PYTHON")}
    return {**kept, "TOKIO_WORKER_THREADS": "1"}


class ZygoteGoneError(WorkerGoneError):
    """It has ended, by itself or by somebody's hand; another can be started."""


class ZygoteHandle:
    """The supervisor's handle of one namespace's zygote, started when it is first needed."""

    def __init__(self, namespace: str, *, fuel: bool, shared: bool) -> None:
        self.namespace = namespace
        self.idle_since_s: float | None = None
        self.lanes: dict[int, WorkerHandle] = {}
        self._forking: list[tuple[WorkerHandle, asyncio.Future[None]]] = []
        ours, theirs = framing.socket_pair()
        with theirs:
            self.process = subprocess.Popen(
                [
                    *python_argv("agent.host.worker.zygote"),
                    str(theirs.fileno()),
                    *(["--fuel"] if fuel else []),
                    *(["--shared"] if shared else []),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=_environment(),
            )
        self._sock = ours
        ours.setblocking(False)
        self._writer = host_api.Writer(ours, lambda _: self.close())
        asyncio.get_running_loop().add_reader(ours, self._readable)

    @property
    def alive(self) -> bool:
        """Whether it still serves."""
        return self._sock.fileno() >= 0

    async def lane(self, name: str, on_message: Callable[[WorkerHandle, worker_api.FromWorker], None]) -> WorkerHandle:
        """Fork a lane. Raises `ZygoteGoneError`, or `LaneGoneError` if the zygote does not answer."""
        if not self.alive:
            raise ZygoteGoneError(f"the zygote of {self.namespace} is gone")
        ours, theirs = framing.socket_pair()
        lane = WorkerHandle(name, ours, on_message)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._forking.append((lane, future))
        with theirs:
            try:
                self._writer.send(FORK + bytes(_MESSAGE_BYTES - 1), theirs.fileno())
            except OSError as error:
                self._forking.remove((lane, future))
                lane.close()
                raise WorkerGoneError(f"the zygote of {self.namespace} cannot be asked: {error.strerror}") from error
        try:
            await asyncio.wait_for(future, _FORK_TIMEOUT_S)
        except ZygoteGoneError:
            lane.close()
            raise
        except TimeoutError as error:
            lane.close()
            self.close()
            raise WorkerGoneError(f"the zygote of {self.namespace} does not answer") from error
        return lane

    def _readable(self) -> None:
        try:
            data, fds = framing.receive_packet(self._sock)
        except BlockingIOError:
            return
        except framing.GoneError:
            self.close()
            return
        pid = int.from_bytes(data[4:8], sys.byteorder, signed=True)
        status = int.from_bytes(data[8:12], sys.byteorder, signed=True)
        if data.startswith(FORK):
            lane, future = self._forking.pop(0)
            lane.pid, lane.pidfd = pid, fds[0]
            self.lanes[pid] = lane
            if not future.done():
                future.set_result(None)
        elif (ended := self.lanes.pop(pid, None)) is not None:
            ended.has_ended(status)

    def close(self) -> None:
        """End it and every lane of it."""
        if self._sock.fileno() >= 0:
            self._writer.close()
            asyncio.get_running_loop().remove_reader(self._sock)
            self._sock.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for _, future in self._forking:
            if not future.done():
                future.set_exception(ZygoteGoneError(f"the zygote of {self.namespace} is gone"))
        self._forking.clear()
        for lane in list(self.lanes.values()):
            lane.has_ended(-signal.SIGKILL)
        self.lanes.clear()


class ZygotePool:
    """Every zygote: one for each namespace, and others for its components with a fuel limit and those that share."""

    def __init__(self) -> None:
        self._zygotes: dict[tuple[str, bool, bool], ZygoteHandle] = {}
        self.sharing = SharedWorkerPool(self._fork_shared)

    async def lane(
        self,
        namespace: str,
        name: str,
        on_message: Callable[[WorkerHandle, worker_api.FromWorker], None],
        *,
        fuel: bool,
        shared: bool = False,
    ) -> WorkerHandle:
        """Fork a lane of a namespace, starting its zygote if there is none. Raises `LaneGoneError`."""
        try:
            return await self._zygote(namespace, fuel=fuel, shared=shared).lane(name, on_message)
        except ZygoteGoneError:  # it had ended, and nobody had noticed yet
            return await self._zygote(namespace, fuel=fuel, shared=shared).lane(name, on_message)

    def _zygote(self, namespace: str, *, fuel: bool, shared: bool) -> ZygoteHandle:
        zygote = self._zygotes.get((namespace, fuel, shared))
        if zygote is None or not zygote.alive:
            zygote = self._zygotes[namespace, fuel, shared] = ZygoteHandle(namespace, fuel=fuel, shared=shared)
        zygote.idle_since_s = None
        return zygote

    async def _fork_shared(
        self, wanted: Wanted, name: str, on_message: Callable[[WorkerHandle, worker_api.FromWorker], None]
    ) -> WorkerHandle:
        return await self.lane(wanted.namespace, name, on_message, fuel=wanted.fuel, shared=True)

    def retire(self) -> None:
        """End the zygotes that have had no lanes for a while."""
        now_s = time.monotonic()
        for key, zygote in list(self._zygotes.items()):
            if zygote.lanes:
                zygote.idle_since_s = None
            elif zygote.idle_since_s is None:
                zygote.idle_since_s = now_s
            elif now_s - zygote.idle_since_s > _IDLE_S:
                zygote.close()
                del self._zygotes[key]

    def close(self) -> None:
        """End everything."""
        for zygote in self._zygotes.values():
            zygote.close()
        self._zygotes.clear()
        self.sharing.close()


def python_argv(module: str) -> list[str]:
    """The command line of one of our modules; it looks into the current directory for modules only if this one does."""
    return [sys.executable, *(["-P"] if sys.flags.safe_path else []), "-m", module]

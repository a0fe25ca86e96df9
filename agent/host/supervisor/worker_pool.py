"""Worker processes: forked by zygotes, one for each instance or shared by several of one publisher.

`WorkerPool.acquire` gives an instance a slot: in a shared worker if the operator allows it and no reason forbids it,
otherwise in a process of its own.

An image can only be mapped before the sandbox is closed. So an instance takes a slot where its image is already open;
otherwise a shared worker is started with the images of its whole set, so that slots of emptier workers can move there.
"""

import asyncio
import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from agent.host.ipc import framing, worker_api
from agent.host.ipc.packet_writer import PacketWriter
from agent.host.ipc.worker_api import ZygoteMessage
from agent.host.sandbox import sandbox
from agent.host.supervisor.pinned_modules import PinnedModules
from agent.host.supervisor.resources import Cgroups, UidAllocator
from agent.host.supervisor.worker_handle import WorkerEvents, WorkerGoneError, WorkerHandle, WorkerProcess
from fleet.component import wasi
from fleet.protocol.bounds import MIB
from fleet.protocol.hardware import NONE as NO_HARDWARE
from fleet.protocol.manifest import Grants, Limits

MAX_SLOTS: Final = 64
"""Slots of a shared worker."""

_OPEN_S: Final = 20.0

_SHARED_IMAGE_MAX_BYTES: Final = 4 * MIB


def why_not_shared(
    grants: Grants, limits: Limits, image_bytes: int, *, files: bool, secrets: bool, service: bool = False
) -> str:
    """Return why an instance that may share a worker still gets one of its own; empty if it shares.

    Code that escapes from an instance has access to the whole process: instances with anything to protect never share.
    """
    reasons = (
        (files, "it has files, which no other instance may reach"),
        (grants.allows(wasi.KEYVALUE_STORE), "it has key-value pairs, which no other instance may reach"),
        (secrets, "it has secrets, which no other instance may reach"),
        (grants.outbound or grants.instances, "it may open connections, which no other instance may do in its name"),
        (
            grants.publishes or grants.publishes_locally,
            "it may publish messages, which no other instance may do in its name",
        ),
        (grants.subscribes, "it may receive messages, which no other instance may read"),
        (grants.devices != NO_HARDWARE, "it has hardware, which no other instance may reach"),
        (service, "it is a service, whose run does not end, but a shared worker runs one call at a time"),
        (limits.concurrency > 1, f"it may have {limits.concurrency} calls at once, but a shared worker runs one"),
        (
            image_bytes > _SHARED_IMAGE_MAX_BYTES,
            f"its image has {image_bytes} bytes, but only images up to {_SHARED_IMAGE_MAX_BYTES} share",
        ),
    )
    return next((reason for holds, reason in reasons if holds), "")


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """A worker that an instance needs.

    Attributes:
        name: of the slot, for errors: the instance and its generation.
        namespace: the publisher; only its instances share a worker.
        fuel: whether the image counts instructions.
        image_fd: memfd of the image.
        image_sha256: name of the image among those that a shared worker has open.
        may_share: take a slot in a shared worker.
    """

    instance: str
    name: str
    namespace: str
    fuel: bool
    limits: Limits
    image_fd: int
    image_sha256: str
    may_share: bool

    @property
    def needs(self) -> tuple[int, int, int]:
        """Limits of a process that runs it: a shared worker has the largest of each of its instances."""
        return self.limits.memory_bytes, self.limits.request_bytes, self.limits.response_bytes

    @property
    def process_bytes(self) -> int:
        """Address space and body memory of a process with these limits."""
        return sandbox.worker_bytes(
            memory_bytes=self.limits.memory_bytes, body_bytes=self.limits.request_bytes + self.limits.response_bytes
        )


class _PublisherKey(NamedTuple):
    namespace: str
    fuel: bool


class _SharedWorker:
    """A shared worker process, and what its slots may need at most."""

    def __init__(self, number: int, process: WorkerProcess, spec: WorkerSpec) -> None:
        self.process = process
        self._number = number
        self._needs = spec.needs

    @property
    def rank(self) -> tuple[int, int]:
        """Rank: the higher, the better a place for a further slot.

        Of two that are equally full the newer ranks higher: it has more images open. So slots only ever move up.
        """
        return len(self.process.slots), self._number

    def fits(self, spec: WorkerSpec) -> bool:
        """Return whether there is a slot for this instance."""
        return (
            self.process.alive
            and not self.process.is_ending
            and len(self.process.slots) < MAX_SLOTS
            and spec.image_sha256 in self.process.images
            and all(need <= most for need, most in zip(spec.needs, self._needs, strict=True))
        )


class _Publisher:
    """Shared workers of one publisher, and the images that they have open."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()  # workers are opened one at a time: the next instance may fit into a new one
        self.workers: list[_SharedWorker] = []
        self._images: dict[str, int] = {}

    def best_for(self, spec: WorkerSpec) -> _SharedWorker | None:
        """Return the fullest worker with a slot for this instance."""
        fitting = [worker for worker in self.workers if worker.fits(spec)]
        return max(fitting, key=lambda worker: worker.rank, default=None)

    def forget_ended(self, image_sha256: str) -> None:
        """Forget workers that have ended, and close the images that no other one has open, except the one named."""
        self.workers = [worker for worker in self.workers if worker.process.alive]
        used = frozenset[str]().union(*(each.process.images for each in self.workers if each.process.slots))
        for image in [image for image in self._images if image != image_sha256 and image not in used]:
            os.close(self._images.pop(image))

    def images_with(self, spec: WorkerSpec) -> Mapping[str, int]:
        """Return the newest images of this publisher, as many as a worker may open, the one of `spec` among them."""
        if spec.image_sha256 not in self._images:
            self._images[spec.image_sha256] = os.dup(spec.image_fd)
        chosen = list(self._images)[-worker_api.IMAGES_MAX :]
        if spec.image_sha256 not in chosen:
            chosen[0] = spec.image_sha256
        return {image: self._images[image] for image in chosen}

    def close(self) -> None:
        """Close the images."""
        for fd in self._images.values():
            with contextlib.suppress(OSError):
                os.close(fd)
        self._images.clear()


class WorkerPool:
    """Every worker process: gives out slots, and admits processes to control groups."""

    def __init__(self, zygotes: "ZygotePool", cgroups: Cgroups, uids: UidAllocator) -> None:
        self._zygotes = zygotes
        self._cgroups = cgroups
        self._uids = uids
        self._publishers: dict[_PublisherKey, _Publisher] = {}
        self._opened = 0

    async def acquire(self, spec: WorkerSpec, events: WorkerEvents) -> WorkerHandle:
        """Return a slot for an instance: where its image is open, in a new shared worker, or in one of its own.

        Raises:
            WorkerGoneError: there is none to be had.
            TimeoutError: a new shared worker did not open in time.
            OSError: the device has no process, memory or descriptor left for one.
        """
        if not spec.may_share:
            process = await self._zygotes.fork(spec.namespace, spec.name, fuel=spec.fuel)
            with _ended_on_error(process):
                # Two generations at a swap, each with as many workers as it may have calls at once.
                self._admit(process, spec.instance, spec, workers=2 * spec.limits.concurrency)
                return process.only_slot(spec.name, events)
        publisher = self._publishers.setdefault(_PublisherKey(spec.namespace, spec.fuel), _Publisher())
        async with publisher.lock:
            publisher.forget_ended(spec.image_sha256)
            worker = publisher.best_for(spec)
            if worker is None:
                worker = await self._open(publisher, spec)
            return worker.process.add_slot(spec.name, events)

    def has_fuller(self, worker: WorkerHandle, spec: WorkerSpec) -> bool:
        """Return whether a fuller shared worker has a slot for this one: then its own may become empty, and end."""
        publisher = self._publishers.get(_PublisherKey(spec.namespace, spec.fuel))
        if publisher is None or not spec.may_share:
            return False
        own = next((each for each in publisher.workers if each.process is worker.process), None)
        best = publisher.best_for(spec)
        return own is not None and best is not None and best.rank > own.rank

    async def _open(self, publisher: _Publisher, spec: WorkerSpec) -> _SharedWorker:
        images = publisher.images_with(spec)
        group = f"+{spec.namespace}"  # no instance has such a name
        self._opened += 1
        name = f"{spec.namespace}-{self._opened}"
        process = await self._zygotes.fork(spec.namespace, name, fuel=spec.fuel, shared=True)
        with _ended_on_error(process):
            self._admit(process, group, spec, workers=MAX_SLOTS)
            process.ended.add_done_callback(lambda _: self._cgroups.dismiss(group))
            order = worker_api.OpenShared(
                images=tuple(images), limits=spec.limits, slots=MAX_SLOTS, uid=self._uids.allocate(group)
            )
        await process.open_shared(order, *images.values(), timeout_s=_OPEN_S)
        worker = _SharedWorker(self._opened, process, spec)
        publisher.workers.append(worker)
        return worker

    def _admit(self, process: WorkerProcess, group: str, spec: WorkerSpec, *, workers: int) -> None:
        self._cgroups.admit(group, process.pid, workers=workers, worker_bytes=spec.process_bytes)

    def prepare(self) -> None:
        """Start a zygote for the first component."""
        self._zygotes.prepare()

    def retire_idle(self) -> None:
        """End the zygotes that have had no workers for a while."""
        self._zygotes.retire_idle()

    def close(self) -> None:
        """End every process."""
        self._zygotes.close()
        for publisher in self._publishers.values():
            publisher.close()
        self._publishers.clear()


@contextlib.contextmanager
def _ended_on_error(process: WorkerProcess) -> Iterator[None]:
    """End a process that the device has no room to go on with."""
    try:
        yield
    except OSError as error:
        process.kill(f"it could not be set up: {error.strerror}")
        raise


_FORK_TIMEOUT_S: Final = 60.0
_ENVIRONMENT: Final = frozenset(
    {"PATH", "LANG", "LC_ALL", "TZ", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR"}
)
_IDLE_S: Final = 60.0


def _environment() -> dict[str, str]:
    """Return the environment of a zygote, and so of every worker: how to find Python, and nothing else.

    The WASI implementation would start a thread for each processor of the device; one does.
    """
    kept = {name: value for name, value in os.environ.items() if name in _ENVIRONMENT or name.startswith("PYTHON")}
    return {**kept, "TOKIO_WORKER_THREADS": "1"}


class ZygoteGoneError(WorkerGoneError):
    """The zygote has ended, by itself or killed; another can be started."""


@dataclass(frozen=True, slots=True)
class _Fork:
    """A fork that the zygote was asked for."""

    process: WorkerProcess
    done: asyncio.Future[None]


class ZygoteHandle:
    """Handle of a zygote process, and the registry of the workers that it forked."""

    def __init__(self, namespace: str, pinned: PinnedModules, *, fuel: bool, shared: bool) -> None:
        self.namespace = namespace
        self.idle_since_s: float | None = None
        self.workers: dict[int, WorkerProcess] = {}
        self._forks: deque[_Fork] = deque()
        ours, theirs = framing.socket_pair()
        with theirs, contextlib.ExitStack() as undo:
            undo.callback(ours.close)
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
                env=_environment() | pinned.environment(),
            )
            undo.pop_all()
        self._sock = ours
        ours.setblocking(False)
        self._writer = PacketWriter(ours, lambda _: self.close())
        asyncio.get_running_loop().add_reader(ours, self._readable)

    @property
    def alive(self) -> bool:
        """True while it serves."""
        return self._sock.fileno() >= 0

    def has_idled(self, now_s: float) -> bool:
        """Return whether it has had no workers for a while, asked now and then."""
        if self.workers:
            self.idle_since_s = None
        elif self.idle_since_s is None:
            self.idle_since_s = now_s
        return self.idle_since_s is not None and now_s - self.idle_since_s > _IDLE_S

    async def fork(self, name: str) -> WorkerProcess:
        """Fork a worker process.

        Raises:
            ZygoteGoneError: the zygote has ended.
            WorkerGoneError: it does not answer.
            OSError: this process has no descriptor left for a worker.
        """
        if not self.alive:
            raise ZygoteGoneError(f"the zygote of {self.namespace} is gone")
        ours, theirs = framing.socket_pair()
        fork = _Fork(WorkerProcess(name, ours), asyncio.get_running_loop().create_future())
        self._forks.append(fork)
        with theirs:
            try:
                self._writer.send(ZygoteMessage.fork().encode(), theirs.fileno())
            except OSError:
                self._forks.remove(fork)
                fork.process.close()
                raise
        try:
            async with asyncio.timeout(_FORK_TIMEOUT_S):
                await fork.done
        except TimeoutError as error:
            self.close()
            raise WorkerGoneError(f"the zygote of {self.namespace} does not answer") from error
        except (WorkerGoneError, OSError):
            fork.process.close()
            raise
        except asyncio.CancelledError:
            # Forked in the same turn of the loop. What is forked later is ended by `_readable`.
            fork.process.kill("the request for it was cancelled")
            raise
        return fork.process

    def _give_up(self, message: ZygoteMessage) -> None:
        """End a forked worker that there is no descriptor for; the others stay."""
        fork = self._forks.popleft()
        with contextlib.suppress(ProcessLookupError):
            os.kill(message.pid, signal.SIGKILL)
        if fork.done.done():  # the caller was cancelled, and does not close it
            fork.process.close()
        else:
            fork.done.set_exception(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))

    def _readable(self) -> None:
        try:
            data, fds = framing.receive_packet(self._sock)
            message = ZygoteMessage.decode(data)
        except BlockingIOError:
            return
        except framing.DescriptorsLostError as error:
            self._give_up(ZygoteMessage.decode(error.data))
            return
        except framing.GoneError:
            self.close()
            return
        if message.kind == worker_api.FORKED:
            fork = self._forks.popleft()
            fork.process.pid, fork.process.pidfd = message.pid, fds[0]
            self.workers[message.pid] = fork.process
            if fork.done.done():  # the caller was cancelled
                fork.process.kill("the request for it was cancelled")
            else:
                fork.done.set_result(None)
        elif (ended := self.workers.pop(message.pid, None)) is not None:
            ended.has_ended(message.status)

    def close(self) -> None:
        """End the zygote and every worker of it."""
        if self._sock.fileno() >= 0:
            self._writer.close()
            asyncio.get_running_loop().remove_reader(self._sock)
            self._sock.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for fork in self._forks:
            if fork.done.done():  # the caller was cancelled, and does not close it
                fork.process.close()
            else:
                fork.done.set_exception(ZygoteGoneError(f"the zygote of {self.namespace} is gone"))
        self._forks.clear()
        for worker in list(self.workers.values()):
            worker.has_ended(-signal.SIGKILL)
        self.workers.clear()


class _ZygoteKey(NamedTuple):
    namespace: str
    fuel: bool
    shared: bool


class ZygotePool:
    """Every zygote: one for each namespace, and others for its components with a fuel limit and those that share."""

    def __init__(self, pinned: PinnedModules | None = None) -> None:
        """Start zygotes from these modules; without any, from the files that there are."""
        self._pinned = PinnedModules() if pinned is None else pinned
        self._zygotes: dict[_ZygoteKey, ZygoteHandle] = {}
        self._spare: ZygoteHandle | None = None

    def prepare(self) -> None:
        """Start a zygote for the first namespace that asks: starting one takes longer than all else about a start.

        Components with a fuel limit, and workers that are shared, have others.
        """
        self._spare = ZygoteHandle("", self._pinned, fuel=False, shared=False)

    async def fork(self, namespace: str, name: str, *, fuel: bool, shared: bool = False) -> WorkerProcess:
        """Fork a worker process of a namespace, starting its zygote if there is none. Raises `WorkerGoneError`."""
        key = _ZygoteKey(namespace, fuel, shared)
        try:
            return await self._zygote(key).fork(name)
        except ZygoteGoneError:  # already ended, but not noticed yet
            return await self._zygote(key).fork(name)

    def _zygote(self, key: _ZygoteKey) -> ZygoteHandle:
        zygote = self._zygotes.get(key)
        if zygote is None or not zygote.alive:
            zygote = self._zygotes[key] = self._take_spare(key) or ZygoteHandle(
                key.namespace, self._pinned, fuel=key.fuel, shared=key.shared
            )
        zygote.idle_since_s = None
        return zygote

    def _take_spare(self, key: _ZygoteKey) -> ZygoteHandle | None:
        """Return the zygote that was started before anybody asked, if it fits; it is this namespace's from now on."""
        if self._spare is None or key.fuel or key.shared:
            return None
        spare, self._spare = self._spare, None
        spare.namespace = key.namespace
        return spare if spare.alive else None

    def retire_idle(self) -> None:
        """End the zygotes that have had no workers for a while."""
        now_s = time.monotonic()
        for key, zygote in list(self._zygotes.items()):
            if zygote.has_idled(now_s):
                zygote.close()
                del self._zygotes[key]
        if self._spare is not None and self._spare.has_idled(now_s):
            self._spare.close()
            self._spare = None

    def close(self) -> None:
        """End every zygote and every worker."""
        for zygote in [*self._zygotes.values(), *([] if self._spare is None else [self._spare])]:
            zygote.close()
        self._zygotes.clear()
        self._spare = None


def python_argv(module: str) -> list[str]:
    """Return the command line of a module of ours: the same Python, which finds modules the same way as this one."""
    return [sys.executable, *(["-P"] if sys.flags.safe_path else []), "-m", module]

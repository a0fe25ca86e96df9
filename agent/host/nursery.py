"""The supervisor's side of zygotes: starting them, and having lanes forked by them."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Final

from agent.host import control, ipc, program
from agent.host.handle import Lane, LaneGoneError
from agent.host.sharing import Sharing, Wanted

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


class ZygoteGoneError(LaneGoneError):
    """It has ended, by itself or by somebody's hand; another can be started."""


class Zygote:
    """The supervisor's handle of one namespace's zygote, started when it is first needed."""

    def __init__(self, namespace: str, *, fuel: bool, shared: bool) -> None:
        self.namespace = namespace
        self.idle_since_s: float | None = None
        self.lanes: dict[int, Lane] = {}
        self._forking: list[tuple[Lane, asyncio.Future[None]]] = []
        ours, theirs = control.pair()
        with theirs:
            self.process = subprocess.Popen(
                [
                    *program.command("agent.host.zygote"),
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
        self._writer = ipc.Writer(ours, lambda _: self.close())
        asyncio.get_running_loop().add_reader(ours, self._readable)

    @property
    def alive(self) -> bool:
        """Whether it still serves."""
        return self._sock.fileno() >= 0

    async def lane(self, name: str, on_message: Callable[[Lane, control.FromLane], None]) -> Lane:
        """Fork a lane. Raises `ZygoteGoneError`, or `LaneGoneError` if the zygote does not answer."""
        if not self.alive:
            raise ZygoteGoneError(f"the zygote of {self.namespace} is gone")
        ours, theirs = control.pair()
        lane = Lane(name, ours, on_message)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._forking.append((lane, future))
        with theirs:
            try:
                self._writer.send(FORK + bytes(_MESSAGE_BYTES - 1), theirs.fileno())
            except OSError as error:
                self._forking.remove((lane, future))
                lane.close()
                raise LaneGoneError(f"the zygote of {self.namespace} cannot be asked: {error.strerror}") from error
        try:
            await asyncio.wait_for(future, _FORK_TIMEOUT_S)
        except ZygoteGoneError:
            lane.close()
            raise
        except TimeoutError as error:
            lane.close()
            self.close()
            raise LaneGoneError(f"the zygote of {self.namespace} does not answer") from error
        return lane

    def _readable(self) -> None:
        try:
            data, fds = control.receive_packet(self._sock)
        except BlockingIOError:
            return
        except control.GoneError:
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


class Nursery:
    """Every zygote: one for each namespace, and others for its components with a fuel limit and those that share."""

    def __init__(self) -> None:
        self._zygotes: dict[tuple[str, bool, bool], Zygote] = {}
        self.sharing = Sharing(self._fork_shared)

    async def lane(
        self,
        namespace: str,
        name: str,
        on_message: Callable[[Lane, control.FromLane], None],
        *,
        fuel: bool,
        shared: bool = False,
    ) -> Lane:
        """Fork a lane of a namespace, starting its zygote if there is none. Raises `LaneGoneError`."""
        try:
            return await self._zygote(namespace, fuel=fuel, shared=shared).lane(name, on_message)
        except ZygoteGoneError:  # it had ended, and nobody had noticed yet
            return await self._zygote(namespace, fuel=fuel, shared=shared).lane(name, on_message)

    def _zygote(self, namespace: str, *, fuel: bool, shared: bool) -> Zygote:
        zygote = self._zygotes.get((namespace, fuel, shared))
        if zygote is None or not zygote.alive:
            zygote = self._zygotes[namespace, fuel, shared] = Zygote(namespace, fuel=fuel, shared=shared)
        zygote.idle_since_s = None
        return zygote

    async def _fork_shared(
        self, wanted: Wanted, name: str, on_message: Callable[[Lane, control.FromLane], None]
    ) -> Lane:
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

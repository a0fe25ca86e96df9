"""Readings: messages of components from the host into the spool, and from there to the server.

A message is on the disk before it is acknowledged to the host, and so to the component. The server gets readings in
order, one batch at a time: the next one goes once the last is acknowledged, at a pace that leaves the link and the
server's budget to everything else. A server that does not say how far it has them takes none, and gets none.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Final, Protocol, TypeVar

from agent.clock import ReferenceClock
from agent.config import ReadingsSettings
from agent.host.ipc import host_api
from agent.link.host_client import HostClient, HostGoneError, HostRefusedError
from agent.report.spool import Bounds, Draft, Spool
from agent.update.problems import Problems
from fleet.protocol import bounds, wire
from fleet.protocol.messages import Reading, Readings, ReadingsAck, ReadingsHealth
from fleet.protocol.topics import Up

log = logging.getLogger("agent.report.readings")

RETRY_S: Final = 1.0
RESEND_FIRST_S: Final = 30.0
RESEND_MAX_S: Final = 900.0
PACE_BYTES_S: Final = 16 * bounds.KIB
"""Half of what a server lets a device send in the long run."""

GAP_S: Final = 0.5
"""Shortest time between two batches, so that readings that are made meanwhile travel together."""

EXPIRE_S: Final = 3600.0
_HEAD_BYTES: Final = bounds.KIB  # of a batch, beside its readings

T = TypeVar("T")


class Publisher(Protocol):
    """Connection to the fleet (`agent.link.conversation.Conversation`)."""

    @property
    def connected(self) -> bool:
        """True while messages can be published."""

    def publish(self, channel: Up, payload: bytes, *, retain: bool = False) -> bool:
        """Hand over a message; return false without a connection."""


class ReadingsUplink:
    """Keeper and sender of readings."""

    name = "readings"

    def __init__(
        self,
        *,
        device: str,
        spool: Spool,
        host: HostClient,
        mqtt: Publisher,
        problems: Problems,
        clock: ReferenceClock,
    ) -> None:
        self._device, self._spool = device, spool
        self._host, self._mqtt, self._problems, self._clock = host, mqtt, problems, clock
        self._disk = asyncio.Lock()
        self._due = asyncio.Event()
        self._news = asyncio.Event()
        self._taken = False
        """True while the server of this connection is known to take readings."""
        self._again = False
        self._refused = 0

    @property
    def epoch(self) -> str:
        """Epoch of the spool."""
        return self._spool.epoch

    async def run(self) -> None:
        """Keep and send readings, forever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._collect())
            tasks.create_task(self._drain())
            tasks.create_task(self._expire())

    async def _on_disk(self, work: Callable[[], T]) -> T:
        """Use the spool, in a thread, one at a time."""
        async with self._disk:
            return await asyncio.to_thread(work)

    # From the host

    async def _collect(self) -> None:
        session, done = self._spool.session, self._spool.number
        refused: dict[int, str] = {}
        while True:
            welcome = await self._host.connection()
            if welcome.protocol < host_api.TAKES_MESSAGES:
                await self._host.lost()
                continue
            try:
                found = await self._host.ask(
                    host_api.TakeMessages,
                    host_api.Messages,
                    session=session,
                    done=done,
                    refused=refused,
                    wait_s=host_api.TAKE_WAIT_S,
                )
            except (HostGoneError, HostRefusedError) as error:
                log.debug("no messages from the host: %s", error)
                await asyncio.sleep(RETRY_S)
                continue
            refused = await self._keep(found)
            session = found.session
            if found.messages:
                done = found.messages[-1].number
            else:
                if found.session != self._spool.session:
                    done = 0
                await asyncio.sleep(RETRY_S)  # a host that answers at once, whatever it is asked, costs little

    async def _keep(self, found: host_api.Messages) -> dict[int, str]:
        """Keep messages; return which are not kept, by number, and why."""
        if not found.messages:
            return {}
        drafts = [
            Draft(
                instance=each.instance,
                topic=each.topic,
                data=each.data,
                content_type=each.content_type,
                metadata=each.metadata,
                session=found.session,
                number=each.number,
            )
            for each in found.messages
        ]
        before = self._spool.dropped
        try:
            kept, why = await self._on_disk(lambda: self._spool.append(drafts, now=self._clock.now()))
        except OSError as error:
            kept, why = 0, f"the device cannot write its disk: {error.strerror}"
            log.exception("messages of components cannot be kept")
        if self._spool.dropped > before:
            self._warn(f"{self._spool.dropped} messages of components were dropped for want of room")
        if kept < len(drafts):
            self._refused += len(drafts) - kept
            self._warn(f"messages of components are refused: {why}")
        self._due.set()
        return {each.number: why for each in found.messages[kept:]}

    def _warn(self, text: str) -> None:
        self._problems.set("readings", f"{text} (agent.toml, [uplink.readings])")

    # To the server

    def reconnected(self) -> None:
        """Send nothing on this connection before its server says how far it has the readings."""
        self._taken = False
        self._news.set()

    def resend(self) -> None:
        """Send again what is not acknowledged: the server was started again."""
        self._again = True
        self._news.set()
        self._due.set()

    async def acknowledge(self, payload: bytes) -> None:
        """Take what the server says of the readings that it has."""
        try:
            ack = wire.decode(ReadingsAck, payload)
        except wire.WireError as error:
            log.warning("dropped an acknowledgement of readings: %s", error)
            return
        if ack.epoch != self._spool.epoch:
            return
        if self._taken:
            await self._on_disk(lambda: self._spool.acknowledge(ack.position))
        else:
            self._taken = True
            await self._on_disk(lambda: self._spool.rewind(ack.position))
        if not self._spool.waiting:
            self._problems.clear("readings")
        self._due.set()
        self._news.set()

    async def _drain(self) -> None:
        delay = RESEND_FIRST_S
        while True:
            await self._due.wait()
            self._due.clear()
            while self._taken and self._spool.waiting and self._mqtt.connected:
                after = self._spool.acknowledged
                size = await self._send(after)
                if not size:
                    break
                if await self._moved(after, delay):
                    delay = RESEND_FIRST_S
                    await asyncio.sleep(max(GAP_S, size / PACE_BYTES_S))
                else:
                    delay = min(RESEND_MAX_S, delay * 2)

    async def _send(self, after: int) -> int:
        """Send the readings after a position, as many as fit; return the bytes sent, 0 for none."""
        newest = self._spool.newest
        try:
            batch = await self._on_disk(lambda: self._batch(after))
        except OSError:
            log.exception("readings cannot be read")
            await asyncio.sleep(RESEND_FIRST_S)
            return 0
        if not batch:  # damaged on the disk: nobody can read them
            await self._on_disk(lambda: self._spool.acknowledge(newest))
            self._due.set()
            return 0
        payload = wire.encode(Readings(device=self._device, epoch=self._spool.epoch, readings=batch))
        return len(payload) if self._mqtt.publish(Up.READINGS, payload) else 0

    def _batch(self, after: int) -> tuple[Reading, ...]:
        return self._spool.read(after, most=bounds.READINGS_MAX, most_bytes=bounds.READINGS_MAX_BYTES - _HEAD_BYTES)

    async def _moved(self, after: int, wait_s: float) -> bool:
        """Wait until more than `after` is acknowledged; False if that takes too long, or the connection is another."""
        self._again = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while self._spool.acknowledged == after and self._taken and not self._again:
                    self._news.clear()
                    await self._news.wait()
        return self._spool.acknowledged != after

    # Health

    async def _expire(self) -> None:
        while True:
            if self._clock.is_trustworthy():
                with contextlib.suppress(OSError):
                    if gone := await self._on_disk(lambda: self._spool.expire(self._clock.now())):
                        self._warn(f"{gone} messages of components were dropped, as they were too old")
            await asyncio.sleep(EXPIRE_S)

    def health(self) -> ReadingsHealth:
        """Return the figures of what is kept."""
        oldest, now = self._spool.oldest(), self._clock.now()
        return ReadingsHealth(
            waiting=self._spool.waiting,
            waiting_bytes=self._spool.waiting_bytes,
            oldest_s=0 if oldest is None else max(0, int((now - oldest).total_seconds())),
            dropped=self._spool.dropped,
            refused=self._refused,
        )


def open_spool(directory: Path, settings: ReadingsSettings, *, reserve_bytes: int) -> Spool:
    """Open the spool of a device as its owner wants it; one that cannot be read is set aside by its damaged parts."""
    limits = Bounds(
        max_bytes=settings.max_bytes,
        keep=timedelta(milliseconds=settings.keep_ms),
        full=settings.full,
        reserve_bytes=reserve_bytes,
    )
    return Spool.open(directory, limits)

"""Health messages and the outbox of reports.

Says how the board and its instances are: health now and then, and soon after something changed.

Sends what the server has to know and has not stored yet: reports lie in the store until they are acknowledged.

A report is sent when it is made, again after each reconnect, and again when it stays unacknowledged for a while; the
server knows it by its sequence, so that nothing counts twice.
"""

import asyncio
import contextlib
import random
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

import msgspec

from agent.host.ipc import host_api
from agent.link.host_client import HostClient, HostGoneError, HostRefusedError
from agent.report import device_info
from agent.update.reconciler import Reconciler
from agent.update.state import DeviceContext
from agent.update.store import Database, Store
from fleet.protocol import wire
from fleet.protocol.codes import Phase
from fleet.protocol.messages import Health, InstanceHealth, Versions

AFTER_CHANGE_S: Final = 1.0


class Vitals:
    """The board's health messages."""

    def __init__(
        self,
        *,
        board: DeviceContext,
        store: Store,
        worker: Database,
        deployer: Reconciler,
        link: HostClient,
        problems: Callable[[], list[str]],
        publish: Callable[[bytes], bool],
    ) -> None:
        """Messages about `board`; `problems` gives sentences for people, `publish` hands a message to the bus."""
        self._board = board
        self._store = store
        self._worker = worker
        self._deployer = deployer
        self._link = link
        self._problems = problems
        self._publish = publish
        self._due = asyncio.Event()
        self.welcome: host_api.Welcome | None = None

    def changed(self) -> None:
        """Something changed: say so soon, once for all that changes meanwhile."""
        self._due.set()

    def changed_soon(self) -> None:
        """As `changed`, after figures had time to follow."""
        asyncio.get_running_loop().call_later(AFTER_CHANGE_S, self._due.set)

    async def run(self, interval_s: float) -> None:
        """Send health every `interval_s` seconds, and after changes."""
        while True:
            with contextlib.suppress(TimeoutError):
                jitter = random.uniform(0.9, 1.1)  # noqa: S311 - jitter, not a secret
                async with asyncio.timeout(interval_s * jitter):
                    await self._due.wait()
                    await asyncio.sleep(AFTER_CHANGE_S)
            self._due.clear()
            self._publish(wire.encode(await self.health()))

    def versions(self) -> Versions:
        """What software the board runs."""
        welcome = self.welcome
        if welcome is None:
            return device_info.versions()
        return device_info.versions(host=welcome.version, engine=welcome.engine)

    async def health(self) -> Health:
        """How everything is now."""
        figures: tuple[InstanceHealth, ...] = ()
        problems = self._problems()
        written = 0
        try:
            answer = await self._link.ask(host_api.Status, host_api.HostStats)
            figures, written = answer.instances, answer.written_bytes
        except (HostGoneError, HostRefusedError):
            why = await asyncio.to_thread(host_api.why_not, self._board.places.runtime)
            said = f"; it did not start, and says: {why}" if why else ""
            problems.insert(0, f"the host does not run: no instance answers{said}")
        board = await asyncio.to_thread(
            device_info.device_resources, self._board.places.state, host_written_bytes=written
        )
        return Health(
            device=self._board.device,
            boot_id=self._board.boot_id,
            at=datetime.now(UTC),
            accepted=await self._worker(self._store.counter, "accepted"),
            committed=await self._worker(self._store.counter, "committed"),
            versions=self.versions(),
            board=board,
            instances=tuple(self._with_phase(each) for each in figures),
            containment=self.welcome.containment if self.welcome is not None else {},
            host_runs_as=self.welcome.runs_as if self.welcome is not None else "",
            problems=tuple(problems),
        )

    def _with_phase(self, figure: InstanceHealth) -> InstanceHealth:
        """A figure of the host's with what only the agent knows of the instance."""
        standing = self._deployer.state
        flight = standing.active.get(figure.instance)
        committed = standing.committed.get(figure.instance)
        manifest = committed.item.manifest_sha256 if committed is not None else ""
        phase = Phase.IDLE
        if flight is not None:
            phase = Phase(flight.change.phase.value)
            if flight.change.item is not None and flight.change.generation == figure.generation:
                manifest = flight.change.item.manifest_sha256
        return msgspec.structs.replace(figure, phase=phase, manifest_sha256=manifest)


RESEND_FIRST_S: Final = 30.0

RESEND_MAX_S: Final = 900.0

WINDOW: Final = 64


class Outbox:
    """The way of reports to the server."""

    def __init__(self, *, store: Store, worker: Database, publish: Callable[[bytes], bool]) -> None:
        """An outbox.

        Args:
            store: where reports lie; used on `worker` only.
            worker: the thread for SQLite.
            publish: hands one report to the bus; false when there is no connection.
        """
        self._store = store
        self._worker = worker
        self._publish = publish
        self._sent = 0
        self._asked_again = False
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """There is a new report."""
        self._wake.set()

    def reconnected(self) -> None:
        """Nothing that was sent before is taken for received."""
        self._sent = 0
        self._asked_again = False
        self._wake.set()

    async def acknowledge(self, sequence: int) -> None:
        """The server has stored every report up to `sequence`."""
        if await self._worker(self._store.acknowledge, sequence):
            self._wake.set()

    async def again(self, sequence: int) -> None:
        """A server that lost reports asks for what came after `sequence`. Nobody signs this, so once a connection."""
        if self._asked_again:
            return
        self._asked_again = True
        if await self._worker(self._store.unacknowledge, sequence):
            self._sent = 0
            self._wake.set()

    async def run(self) -> None:
        """Send, for ever."""
        delay = RESEND_FIRST_S
        while True:
            self._wake.clear()
            pending = await self._worker(self._store.unacked, WINDOW)
            sent = self._sent
            for sequence, body in pending:
                if sequence > sent and self._publish(body):
                    self._sent = sequence
            if self._sent > sent:
                delay = RESEND_FIRST_S
            if not pending:
                await self._wake.wait()
                continue
            try:
                async with asyncio.timeout(delay):
                    await self._wake.wait()
            except TimeoutError:
                self._sent = 0
                delay = min(RESEND_MAX_S, delay * 2)

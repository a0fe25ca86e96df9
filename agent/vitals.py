"""Says how the board and its instances are: health now and then, and soon after something changed."""

import asyncio
import contextlib
import random
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

import msgspec

from agent import health
from agent.deploy import Deployer
from agent.host import ipc
from agent.hostlink import HostGoneError, HostLink, HostRefusedError
from agent.standing import Board
from agent.store import Store
from agent.worker import Worker
from fleet.protocol import wire
from fleet.protocol.codes import Phase
from fleet.protocol.messages import Health, InstanceHealth, Versions

AFTER_CHANGE_S: Final = 1.0


class Vitals:
    """The board's health messages."""

    def __init__(
        self,
        *,
        board: Board,
        store: Store,
        worker: Worker,
        deployer: Deployer,
        link: HostLink,
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
        self.welcome: ipc.Welcome | None = None

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
            return health.versions()
        return health.versions(host=welcome.version, engine=welcome.engine)

    async def health(self) -> Health:
        """How everything is now."""
        figures: tuple[InstanceHealth, ...] = ()
        problems = self._problems()
        written = 0
        try:
            answer = await self._link.ask(ipc.Status, ipc.Figures)
            figures, written = answer.instances, answer.written_bytes
        except (HostGoneError, HostRefusedError):
            why = await asyncio.to_thread(ipc.why_not, self._board.places.runtime)
            said = f"; it did not start, and says: {why}" if why else ""
            problems.insert(0, f"the host does not run: no instance answers{said}")
        board = await asyncio.to_thread(health.board, self._board.places.state, host_written_bytes=written)
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
        standing = self._deployer.standing
        flight = standing.flights.get(figure.instance)
        committed = standing.committed.get(figure.instance)
        manifest = committed.item.manifest_sha256 if committed is not None else ""
        phase = Phase.IDLE
        if flight is not None:
            phase = Phase(flight.change.phase.value)
            if flight.change.item is not None and flight.change.generation == figure.generation:
                manifest = flight.change.item.manifest_sha256
        return msgspec.structs.replace(figure, phase=phase, manifest_sha256=manifest)

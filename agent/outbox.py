"""Sends what the server has to know and has not stored yet: reports lie in the store until they are acknowledged.

A report is sent when it is made, again after each reconnect, and again when it stays unacknowledged for a while; the
server knows it by its sequence, so that nothing counts twice.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from agent.store import Store
from agent.worker import Worker

RESEND_FIRST_S: Final = 30.0
RESEND_MAX_S: Final = 900.0
WINDOW: Final = 64


class Outbox:
    """The way of reports to the server."""

    def __init__(self, *, store: Store, worker: Worker, publish: Callable[[bytes], bool]) -> None:
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

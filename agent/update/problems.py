"""Problems of this device as sentences for people: shown by `fleet-agent why`, sent with its health."""

import asyncio
import contextlib
from typing import Protocol

from agent.update.store import Database, Store, StoreError
from fleet.protocol.messages import Report


class ReportSink(Protocol):
    """Whoever acts on changes of this device (`agent.report.uplink.Uplink`). Neither method waits for anything."""

    def saved(self, report: Report | None = None) -> None:
        """Note that a report was stored."""

    def changed(self) -> None:
        """Note that the device's health changed."""


class Problems:
    """Current problems, one for each source."""

    name = "problems"

    def __init__(self, db: Database) -> None:
        self._db = db
        self._texts: dict[str, str] = {}
        self._changed = asyncio.Event()

    def set(self, source: str, text: str) -> None:
        """Note the problem of a source, in place of its earlier one."""
        self._texts[source] = text
        self._changed.set()

    def clear(self, source: str) -> None:
        """Note that a source has no problem any more."""
        self._texts.pop(source, None)
        self._changed.set()

    def text(self, source: str) -> str:
        """Return the problem of one source; empty for none."""
        return self._texts.get(source, "")

    def texts(self) -> list[str]:
        """Return all problems, in the order in which they began."""
        return list(self._texts.values())

    async def run(self) -> None:
        """Store the problems whenever they change, so that `why` can tell them while no agent runs."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self.save()

    async def save(self) -> None:
        """Store the problems as they are now; a disk that takes nothing is a problem that `why` finds by itself."""
        with contextlib.suppress(StoreError):
            await self._db(Store.set_problems, self.texts())

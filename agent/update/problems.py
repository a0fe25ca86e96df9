"""Problems of this device as sentences for people: shown by `fleet-agent why`, sent with its health."""

import asyncio
import contextlib
from typing import Final, Protocol

from agent.update.store import Database, Store, StoreError
from fleet.protocol.messages import Report

NOT_STARTED: Final = "{} could not be started: "
"""Beginning of the problem of a committed instance, by its name, that does not run; the reason follows."""


class ReportSink(Protocol):
    """Receiver of changes of this device (`agent.report.uplink.Uplink`). Neither method blocks."""

    def saved(self, report: Report | None = None) -> None:
        """Note that a report was stored."""

    def changed(self) -> None:
        """Note that the device's health changed."""


class Problems:
    """Current problems of this device, at most one for each source."""

    name = "problems"

    def __init__(self, db: Database) -> None:
        self._db = db
        self._texts: dict[str, str] = {}
        self._changed = asyncio.Event()

    def set(self, source: str, text: str) -> None:
        """Set the problem of a source, in place of an earlier one."""
        self._texts[source] = text
        self._changed.set()

    def clear(self, source: str) -> None:
        """Remove the problem of a source."""
        self._texts.pop(source, None)
        self._changed.set()

    def text(self, source: str) -> str:
        """Return the problem of a source; empty for none."""
        return self._texts.get(source, "")

    def texts(self) -> list[str]:
        """Return all problems, in the order in which they began."""
        return list(self._texts.values())

    async def run(self) -> None:
        """Store the problems whenever they change, so that `why` can show them while no agent runs."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self.save()

    async def save(self) -> None:
        """Store the current problems; errors are ignored, as `why` will report an unusable store by itself."""
        with contextlib.suppress(StoreError):
            await self._db(Store.set_problems, self.texts())

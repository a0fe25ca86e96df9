"""Waiting for news: long polls sleep here until something was written that they may want to see."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Watch:
    """One bell for everybody: it rings, and each looks for itself whether it is meant."""

    def __init__(self) -> None:
        self._bell = asyncio.Event()

    def changed(self) -> None:
        """Ring."""
        self._bell.set()
        self._bell = asyncio.Event()

    async def until(self, look: Callable[[], T | None], *, timeout_s: float) -> T | None:
        """What `look` finds, as soon as it finds something; None when the time is over."""
        found = look()
        if found is not None or timeout_s <= 0:
            return found
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while found is None:
                    await self._bell.wait()
                    found = look()
        return found

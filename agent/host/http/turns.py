"""Turns of the router's event loop: bounds of what one client or one worker may take of it at once.

The router has one thread, so every other client waits for as long as one event takes. Calls are bounded by their
instance's workers, each of which has one at a time. What needs no worker is bounded here: requests that are sent
together, frames that are sent together, and answers of the router's own.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

FRAMES_A_TURN: Final = 64
"""Frames of one channel; a worker that is in order sends a dozen at once, in the 128 KiB that are read."""

PIECES_A_TURN: Final = 16
"""Pieces of one client that are parsed: heads, bodies with a length, parts of others."""

REFUSALS_A_TURN: Final = 32


class Refusals:
    """Answers of the router's own: clients that had one take turns from then on, few in each turn of the event loop.

    Such an answer costs no worker anything, so nothing else slows down who asks for one after another.
    """

    def __init__(self) -> None:
        self._left = REFUSALS_A_TURN
        self._waiting: deque[Callable[[], None]] = deque()
        self._is_scheduled = self._is_calling = False

    def take(self, again: Callable[[], None]) -> bool:
        """Return whether it is the caller's turn; if not, `again` is called when it is."""
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._turn)
        if self._left and (self._is_calling or not self._waiting):
            self._left -= 1
            return True
        self._waiting.append(again)
        return False

    def _turn(self) -> None:
        self._is_scheduled = False
        self._left = REFUSALS_A_TURN
        self._is_calling = True
        for _ in range(min(len(self._waiting), REFUSALS_A_TURN)):
            self._waiting.popleft()()
        self._is_calling = False
        if self._waiting and not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._turn)

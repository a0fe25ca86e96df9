"""Wait until something holds of which no event tells.

For what another process does and says to nobody: entries below /proc, files that it writes, figures that the host or
the server answers only when asked. Whatever has an event (a pidfd, a message of the host, a long poll, a callback) is
awaited by that event instead.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

WITHIN_S = 60.0  # far beyond what a loaded machine takes, and below pytest's own limit, so that the test says what hung
FIRST_PAUSE_S, PAUSE_S = 0.005, 0.05  # whoever is waited for needs the processor more than who asks


class NeverError(AssertionError):
    """The condition did not come to hold in time."""


def eventually(condition: Callable[[], T], what: str, *, within_s: float = WITHIN_S, pause_s: float = PAUSE_S) -> T:
    """Ask again and again until `condition()` is true, and return its answer.

    Args:
        condition: the question.
        what: is waited for, in words.
        within_s: the bound of the wait, in seconds.
        pause_s: the longest pause between two questions; the first are shorter. Less where a state is short-lived.

    Raises:
        NeverError: naming `what`, after `within_s` seconds.
    """
    end, next_s = time.monotonic() + within_s, FIRST_PAUSE_S
    while not (answer := condition()):
        if time.monotonic() > end:
            raise NeverError(f"{what}: not within {within_s:.0f} s")
        time.sleep(min(next_s, pause_s))
        next_s *= 2
    return answer


async def eventually_async(
    condition: Callable[[], T | Awaitable[T]], what: str, *, within_s: float = WITHIN_S, pause_s: float = PAUSE_S
) -> T:
    """`eventually` for coroutines: other tasks of the loop go on between two questions, which may be awaitable."""
    end, next_s = time.monotonic() + within_s, FIRST_PAUSE_S
    while True:
        asked = condition()
        answer = await asked if isinstance(asked, Awaitable) else asked
        if answer:
            return answer
        if time.monotonic() > end:
            raise NeverError(f"{what}: not within {within_s:.0f} s")
        await asyncio.sleep(min(next_s, pause_s))
        next_s *= 2

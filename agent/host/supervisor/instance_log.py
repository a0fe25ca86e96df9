"""Log of one instance: its last lines, and the events about its faults and changes of state."""

import asyncio
from collections import deque
from typing import Final

from agent.host.ipc import host_api
from agent.host.ipc.host_api import plain
from agent.host.ipc.stats_page import count_of
from agent.host.supervisor.generation import Generation
from fleet.protocol import bounds
from fleet.protocol.codes import GUEST_FAULTS, InstanceState, RejectCode

_LINE_MAX_CHARS: Final = 1100

EventQueue = asyncio.Queue[host_api.Event]
"""Events for the agent; `AgentServer` sends them to every connection."""


class InstanceLog:
    """The last lines of one instance, and its events."""

    def __init__(self, name: str, events: EventQueue) -> None:
        self._name = name
        self._events = events
        self._log: deque[str] = deque(maxlen=bounds.LOG_LINES)
        self.count = 0

    def note(self, text: str) -> None:
        """Add a line."""
        self._log.append(plain(text, _LINE_MAX_CHARS).replace("\n", " "))
        self.count += 1

    def lines(self) -> tuple[str, ...]:
        """Return the last lines, oldest first, within the cap on bytes."""
        kept: list[str] = []
        size = 0
        for line in reversed(self._log):
            size += len(line.encode()) + 1
            if size > bounds.LOG_MAX_BYTES:
                break
            kept.append(line)
        return tuple(reversed(kept))

    def fault(self, generation: Generation, code: RejectCode, message: str) -> None:
        """Count a fault of the guest, add it to the log, and report it with the log."""
        generation.faults += 1
        first = message.splitlines()[0] if message else ""
        self.note(f"host: {first}")
        counted = sum(generation.figures().calls.get(outcome, 0) for outcome in GUEST_FAULTS)
        if not generation.dropped:
            self._events.put_nowait(
                host_api.Trapped(
                    instance=self._name,
                    generation=generation.number,
                    code=code,
                    message=plain(message),
                    faults=count_of(max(generation.faults, counted)),
                    log=self.lines(),
                )
            )

    def changed(self, generation: Generation, state: InstanceState, message: str) -> None:
        """Report another state of the instance."""
        self._events.put_nowait(
            host_api.Changed(
                instance=self._name,
                generation=generation.number,
                state=state,
                message=plain(message),
                log=self.lines(),
            )
        )

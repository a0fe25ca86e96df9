"""What an instance has to tell: its last log lines, and the events that go to whoever is connected."""

from collections import deque
from collections.abc import Callable

from agent.host import ipc
from agent.host.generation import Generation
from fleet.protocol import caps
from fleet.protocol.codes import GUEST_FAULTS, InstanceState, RejectCode


class Record:
    """The log of one instance, and the way to tell of its faults and changes."""

    def __init__(self, name: str, emit: Callable[[ipc.Event], None]) -> None:
        self._name = name
        self._emit = emit
        self._log: deque[str] = deque(maxlen=caps.LOG_LINES)
        self.count = 0

    def note(self, text: str) -> None:
        """A line for the log."""
        self._log.append(text)
        self.count += 1

    def lines(self) -> tuple[str, ...]:
        """The last log lines, oldest first, within the cap on bytes."""
        kept: list[str] = []
        size = 0
        for line in reversed(self._log):
            size += len(line.encode()) + 1
            if size > caps.LOG_MAX_BYTES:
                break
            kept.append(line)
        return tuple(reversed(kept))

    def fault(self, generation: Generation, code: RejectCode, message: str) -> None:
        """A guest's fault: into the log, and told with it."""
        generation.faults += 1
        first = message.splitlines()[0] if message else ""
        self.note(f"host: {first}")
        counted = sum(generation.figures().calls.get(outcome, 0) for outcome in GUEST_FAULTS)
        if not generation.dropped:
            self._emit(
                ipc.Trapped(
                    instance=self._name,
                    generation=generation.number,
                    code=code,
                    message=message,
                    faults=max(generation.faults, counted),
                    log=self.lines(),
                )
            )

    def changed(self, generation: Generation, state: InstanceState, message: str) -> None:
        """Its state is another."""
        event = ipc.Changed(
            instance=self._name, generation=generation.number, state=state, message=message, log=self.lines()
        )
        self._emit(event)

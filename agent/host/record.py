"""What an instance has to tell: its last log lines, and the events that go to whoever is connected."""

from collections import deque
from collections.abc import Callable
from typing import Final

from agent.host import ipc
from agent.host.generation import Generation
from agent.host.page import count_of
from fleet.protocol import caps
from fleet.protocol.codes import GUEST_FAULTS, InstanceState, RejectCode

_LINE_MAX_CHARS: Final = 1100
_MESSAGE_MAX_CHARS: Final = 4096
# What moves a terminal's cursor, and grows sixfold in JSON: a report of it would be too large to be taken.
_CONTROLS: Final = dict.fromkeys({*range(32), *range(0x7F, 0xA0)} - {ord("\t"), ord("\n")}, "\N{REPLACEMENT CHARACTER}")


def plain(text: str, most_chars: int = _MESSAGE_MAX_CHARS) -> str:
    """What a guest or its engine says, fit for reports and terminals: no control characters, and not more than that."""
    return text[:most_chars].translate(_CONTROLS)


class Record:
    """The log of one instance, and the way to tell of its faults and changes."""

    def __init__(self, name: str, emit: Callable[[ipc.Event], None]) -> None:
        self._name = name
        self._emit = emit
        self._log: deque[str] = deque(maxlen=caps.LOG_LINES)
        self.count = 0

    def note(self, text: str) -> None:
        """A line for the log."""
        self._log.append(plain(text, _LINE_MAX_CHARS).replace("\n", " "))
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
                    message=plain(message),
                    faults=count_of(max(generation.faults, counted)),
                    log=self.lines(),
                )
            )

    def changed(self, generation: Generation, state: InstanceState, message: str) -> None:
        """Its state is another."""
        event = ipc.Changed(
            instance=self._name, generation=generation.number, state=state, message=plain(message), log=self.lines()
        )
        self._emit(event)

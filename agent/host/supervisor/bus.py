"""Bus of a device: messages between its instances, and the queue of each that receives any.

A queue belongs to an instance, not to one of its generations: what waits during a swap, a crash or a rollback is handed
to whichever worker comes next. A message stays in its queue until the handler has returned well, and comes again
otherwise, so each is handled at least once while the host runs; after `ATTEMPTS` it is a dead letter. Nothing is kept
on disk (decision 34): the end of the host loses what waits.

Messages of one sender on one topic are handed over in order, one at a time. Nothing here parses what guests say: topics
have been checked, and content is passed on as it is.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from agent.host.ipc.host_api import Run, plain
from fleet.protocol import bounds, message_topics
from fleet.protocol.bounds import Metadata
from fleet.protocol.manifest import OnMessage
from fleet.protocol.messages import QueueHealth

ATTEMPTS: Final = 5
"""Runs of the handler that a message gets."""

RETRY_FIRST_S: Final = 0.25
"""Pause before the second attempt; doubled for each further one. Messages behind it wait, so that their order holds."""

ALL_BYTES: Final = 32 * bounds.MIB
"""Bytes that may wait in all queues of the device together."""

MESSAGE_BYTES: Final = 512
"""Bytes that a message counts for beside its topic and content: the memory of its objects here."""

_SAID_EVERY_S: Final = 60.0
_WHY_MAX_CHARS: Final = 200

Deliver = Callable[["BusMessage"], Awaitable[str | None]]
"""Runs the handler once: None for handled, else why not."""


@dataclass(frozen=True, slots=True)
class BusMessage:
    """Message of one instance to all that subscribe to its topic."""

    sender: str
    topic: str
    data: bytes = b""
    content_type: str = ""
    metadata: Metadata = ()

    @property
    def size(self) -> int:
        """Bytes that it counts for in a queue."""
        words = sum(len(key) + len(value) for key, value in self.metadata)
        return MESSAGE_BYTES + len(self.topic) + len(self.data) + len(self.content_type) + 4 * words


@dataclass(slots=True)
class _Waiting:
    """Message in a queue; `due_s`: not to be handed over before."""

    message: BusMessage
    since_s: float
    attempts: int = 0
    due_s: float = 0.0


class Queue:
    """Messages that wait for one instance."""

    def __init__(self, instance: str, bus: "Bus", clock: Callable[[], float]) -> None:
        self.instance = instance
        self._bus = bus
        self._clock = clock
        self._topics: tuple[str, ...] = ()
        self._granted: tuple[str, ...] = ()
        self._most_bytes = self._most_messages = 0
        self._drops_oldest = self._is_closed = False
        self.is_stalled = False
        """True while nobody takes messages, and none is about to: then the oldest are dropped, and no sender waits."""
        self._note: Callable[[str], None] = lambda _line: None
        self._waiting: deque[_Waiting] = deque()
        self._in_hand: _Waiting | None = None
        self._flight: asyncio.Task[None] | None = None
        self._bytes = 0
        self._news = asyncio.Event()
        self._delivered = self._dropped = self._dead = self._failed = 0
        self._unsaid = 0
        self._said_s = -_SAID_EVERY_S

    def configure(self, run: Run, trigger: OnMessage, note: Callable[[str], None]) -> None:
        """Follow a generation that is about to take messages; those that it may not have are dropped."""
        self._topics, self._granted = trigger.topics, run.grants.subscribes
        self._most_bytes, self._most_messages = run.limits.queue_bytes, run.limits.queue_messages
        self._drops_oldest, self.is_stalled, self._note = trigger.full == "drop-oldest", False, note
        before, self._waiting = self._waiting, deque()
        for each in before:
            if self.takes(each.message.topic):
                self._waiting.append(each)
            else:
                self._drop(each)

    # The senders' side

    def takes(self, topic: str) -> bool:
        """Tell whether a message on this topic is for the instance: subscribed to, and granted."""
        return message_topics.any_matches(self._topics, topic) and message_topics.any_matches(self._granted, topic)

    def has_room(self, size: int) -> bool:
        """Tell whether a message of this size is taken now, if only in the place of others, or never will be."""
        return self._drops_oldest or self.is_stalled or size > self._most_bytes or self._fits(size)

    def _fits(self, size: int) -> bool:
        most = min(self._most_bytes, self._bytes + ALL_BYTES - self._bus.bytes)
        return self._bytes + size <= most and self._count < self._most_messages

    @property
    def _count(self) -> int:
        return len(self._waiting) + (self._in_hand is not None)

    def put(self, message: BusMessage) -> None:
        """Take a message for which there is room, or which takes the place of the oldest."""
        new = _Waiting(message, self._clock())
        self._add(message.size)
        while self._waiting and message.size <= self._most_bytes and not self._fits(0):
            self._drop(self._waiting.popleft())
        if not self._fits(0):
            self._drop(new)
            return
        self._waiting.append(new)
        self._news.set()

    def _add(self, size: int) -> None:
        self._bytes += size
        self._bus.bytes += size

    def _drop(self, gone: _Waiting) -> None:
        self._add(-gone.message.size)
        self._dropped += 1
        self._unsaid += 1
        if self._clock() - self._said_s >= _SAID_EVERY_S:
            self._note(
                f"host: {self._unsaid} messages for it were dropped, the last on {plain(gone.message.topic)} from "
                f"{gone.message.sender}: its queue is full, or it may not have them"
            )
            self._unsaid, self._said_s = 0, self._clock()

    # The instance's side

    async def due(self) -> None:
        """Wait until there is a message to hand over, and none is being handled."""
        while True:
            if self._flight is not None:
                await asyncio.wait([self._flight])
            elif not self._waiting:
                self._news.clear()
                await self._news.wait()
            elif (pause_s := self._waiting[0].due_s - self._clock()) > 0:
                await asyncio.sleep(pause_s)
            else:
                return

    async def attempt(self, deliver: Deliver) -> None:
        """Hand over the oldest message once. A cancelled wait does not end what the handler has begun."""
        if self._flight is None:
            if not self._waiting:
                return
            self._in_hand = self._waiting.popleft()
            self._flight = asyncio.ensure_future(self._deliver(self._in_hand, deliver))
        await asyncio.wait([self._flight])

    async def _deliver(self, one: _Waiting, deliver: Deliver) -> None:
        one.attempts += 1
        problem: str | None = "the host failed"
        try:
            problem = await deliver(one.message)
        finally:
            self._flight = self._in_hand = None
            self._settle(one, problem)
            self._bus.has_changed()

    def _settle(self, one: _Waiting, problem: str | None) -> None:
        if problem is None:
            self._delivered += 1
            self._add(-one.message.size)
            return
        self._failed += 1
        if self._is_closed or not self.takes(one.message.topic):
            self._drop(one)
        elif one.attempts >= ATTEMPTS:
            self._dead += 1
            self._add(-one.message.size)
            why = plain(problem, _WHY_MAX_CHARS).replace("\n", " ")
            self._note(
                f"host: a message on {plain(one.message.topic)} from {one.message.sender} is a dead letter: "
                f"it was handed over {ATTEMPTS} times, the last time: {why}"
            )
        else:
            one.due_s = self._clock() + RETRY_FIRST_S * 2 ** (one.attempts - 1)
            self._waiting.appendleft(one)
            self._news.set()

    def close(self) -> None:
        """Drop what waits: the instance does not run any more, or takes no messages."""
        self._is_closed = True
        while self._waiting:
            self._drop(self._waiting.popleft())

    def health(self) -> QueueHealth:
        """Return its figures since the host started."""
        oldest = self._in_hand or (self._waiting[0] if self._waiting else None)
        return QueueHealth(
            waiting=self._count,
            waiting_bytes=self._bytes,
            oldest_s=0 if oldest is None else max(0, int(self._clock() - oldest.since_s)),
            delivered=self._delivered,
            failed=self._failed,
            dropped=self._dropped,
            dead_letters=self._dead,
        )


class Bus:
    """Queues of the device's instances. Everything here belongs to the supervisor's event loop.

    Attributes:
        bytes: what waits in all queues.
        has_changed: called when there may be room in a queue that had none.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.bytes = 0
        self.has_changed: Callable[[], None] = lambda: None
        self._clock = clock
        self._queues: dict[str, Queue] = {}

    def subscribe(self, run: Run, note: Callable[[str], None]) -> Queue | None:
        """Return the queue of an instance whose generation takes over; None where that has no such trigger."""
        trigger = next(iter(run.manifest.triggers_of(OnMessage)), None)
        if trigger is None:
            self.unsubscribe(run.instance)
            return None
        queue = self._queues.get(run.instance)
        if queue is None:
            queue = self._queues[run.instance] = Queue(run.instance, self, self._clock)
        queue.configure(run, trigger, note)
        self.has_changed()
        return queue

    def unsubscribe(self, instance: str) -> None:
        """Forget the queue of an instance, if it has one."""
        queue = self._queues.pop(instance, None)
        if queue is not None:
            queue.close()
            self.has_changed()

    def stall(self, instance: str) -> None:
        """Take note that an instance takes no messages until its next generation or restart."""
        queue = self._queues.get(instance)
        if queue is not None:
            queue.is_stalled = True
            self.has_changed()

    def put(self, message: BusMessage) -> str:
        """Put a message into every queue that it is for; empty for done, else the instance whose queue is full."""
        found = [queue for queue in self._queues.values() if queue.takes(message.topic)]
        full = next((queue for queue in found if not queue.has_room(message.size)), None)
        if full is not None:
            return full.instance
        for queue in found:
            queue.put(message)
        return ""

    def health(self, instance: str) -> QueueHealth | None:
        """Return the figures of an instance's queue; None where it has none."""
        queue = self._queues.get(instance)
        return None if queue is None else queue.health()

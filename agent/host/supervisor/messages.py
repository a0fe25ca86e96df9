"""Messages of components on their way from workers to the device's bus, and to the agent.

Each worker that may publish has a socket here, and waits for the reply to each of its messages: so no more messages
wait than there are workers. One goes to the bus first (`agent.host.supervisor.bus`), once every instance that gets it
has room; where it is for the operator too, the agent asks for it, keeps it, and says so with its next question. Only
then does `send` return in the component. An agent that is started again gets those that it has not said to keep.

Nothing that a worker says is believed further than its instance's grants reach.
"""

import asyncio
import contextlib
import itertools
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import msgspec

from agent.host.ipc import framing, host_api, message_api
from agent.host.ipc.message_api import (
    BLOCKED_S,
    BYTES_A_MINUTE,
    LOCAL_BYTES_A_MINUTE,
    LOCAL_MESSAGES_A_MINUTE,
    MESSAGES_A_MINUTE,
    SEND_S,
    Publish,
    Published,
)
from agent.host.ipc.worker_api import TokenBucket
from agent.host.supervisor.bus import Bus, BusMessage
from fleet.component.wasi import MESSAGING_PRODUCER
from fleet.protocol import wire
from fleet.protocol.manifest import Grants
from fleet.protocol.message_topics import any_matches

_OTHER_MAX: Final = 8  # packets of one worker without a reply; an intact one waits for each
_publish: Final[msgspec.json.Decoder[Publish]] = msgspec.json.Decoder(Publish)


def may_publish(grants: Grants) -> bool:
    """Return whether an instance with these grants may publish anything."""
    return grants.allows(MESSAGING_PRODUCER) and bool(grants.publishes or grants.publishes_locally)


@dataclass(slots=True)
class _Rate:
    """Budget of an instance, shared by its workers: of messages, and of their bytes."""

    most_messages: int
    most_bytes: int
    messages: TokenBucket = field(init=False)
    size: TokenBucket = field(init=False)

    def __post_init__(self) -> None:
        self.messages, self.size = TokenBucket(self.most_messages), TokenBucket(self.most_bytes)

    def refused(self, size: int) -> str:
        """Take a message of this size; say why it is one too many, or empty."""
        if not self.messages.take():
            return f"{self.most_messages} messages a minute are allowed"
        if not self.size.take(max(1, size)):
            return f"{self.most_bytes // 1024} KiB of messages a minute are allowed"
        return ""


class _Rates(NamedTuple):
    """Budgets of an instance: of what goes to the operator, and of what stays on the device."""

    uplink: _Rate
    local: _Rate

    @classmethod
    def fresh(cls) -> "_Rates":
        return cls(_Rate(MESSAGES_A_MINUTE, BYTES_A_MINUTE), _Rate(LOCAL_MESSAGES_A_MINUTE, LOCAL_BYTES_A_MINUTE))


@dataclass(slots=True)
class _Worker:
    """Worker that may publish.

    Attributes:
        kill: ends it, for a reason.
    """

    instance: str
    uplink: tuple[str, ...]
    local: tuple[str, ...]
    sock: socket.socket
    kill: Callable[[str], None]


@dataclass(slots=True)
class _Blocked:
    """Message that waits for room; `full`: the instance in whose queue there was none."""

    worker: _Worker
    message: BusMessage
    asked: int
    until_s: float
    full: str

    def is_before(self, message: BusMessage) -> bool:
        """Tell whether a message has to wait for this one, for their order."""
        return (self.message.sender, self.message.topic) == (message.sender, message.topic)


@dataclass(slots=True)
class _Pending:
    """Message whose worker waits for the reply."""

    worker: _Worker
    message: host_api.Message
    asked: int
    until_s: float


class MessageGate:
    """Messages that wait to be kept, or for room. Everything here belongs to the supervisor's event loop.

    Attributes:
        bus: takes what instances of the device are to get.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.bus = Bus(clock)
        self.bus.has_changed = self._try_again
        self._blocked: list[_Blocked] = []
        self._workers: dict[int, _Worker] = {}
        self._worker_numbers = itertools.count(1)
        self._numbers = itertools.count(1)
        self._pending: deque[_Pending] = deque()
        self._rates: dict[str, _Rates] = {}
        self._news = asyncio.Event()

    def admit(self, instance: str, grants: Grants, kill: Callable[[str], None]) -> tuple[int, socket.socket]:
        """Admit a worker of an instance; return its number, for `release`, and its end of the socket."""
        ours, theirs = framing.socket_pair()
        ours.setblocking(False)
        number = next(self._worker_numbers)
        worker = self._workers[number] = _Worker(instance, grants.publishes, grants.publishes_locally, ours, kill)
        asyncio.get_running_loop().add_reader(ours, self._readable, number, worker)
        return number, theirs

    def release(self, number: int) -> None:
        """Forget a worker that has ended; what it said last is kept all the same, if anybody asks for it in time."""
        worker = self._workers.pop(number, None)
        if worker is not None:
            asyncio.get_running_loop().remove_reader(worker.sock)
            worker.sock.close()
        instances = {each.instance for each in self._workers.values()}
        self._rates = {instance: rate for instance, rate in self._rates.items() if instance in instances}

    def close(self) -> None:
        """Forget every worker."""
        for number in list(self._workers):
            self.release(number)

    def _readable(self, number: int, worker: _Worker) -> None:
        try:
            data, fds = framing.receive_packet(worker.sock)
            framing.close_all(fds)
            said = _publish.decode(data)
        except BlockingIOError:
            return
        except framing.GoneError:
            self.release(number)
            return
        except wire.JSON_ERRORS:
            self.release(number)
            worker.kill("it sent a message that its host cannot read")
            return
        without_reply = [each.worker is worker for each in self._pending]
        without_reply += [each.worker is worker for each in self._blocked]
        if sum(without_reply) >= _OTHER_MAX:
            self.release(number)
            worker.kill("it sent messages without waiting for the replies")
            return
        if error := self._refused(worker, said):
            self._reply(worker, Published(number=said.number, error=error))
            return
        message = BusMessage(worker.instance, said.topic, said.data, said.content_type, said.metadata)
        before = next((each for each in self._blocked if each.is_before(message)), None)
        full = self.bus.put(message) if before is None else before.full
        if not full:
            self._hand_on(worker, message, said.number)
        elif full == message.sender:  # a handler that sends to itself would wait for its own end
            self._reply(worker, Published(number=said.number, error="its own queue of messages is full"))
        else:
            self._blocked.append(_Blocked(worker, message, said.number, self._clock() + BLOCKED_S, full))
            asyncio.get_running_loop().call_later(BLOCKED_S, self.expire)

    def _hand_on(self, worker: _Worker, message: BusMessage, asked: int) -> None:
        """Go on with a message that the bus has: to the agent, or back to its sender, who may send the next."""
        if not any_matches(worker.uplink, message.topic):
            self._reply(worker, Published(number=asked))
            return
        kept = host_api.Message(
            number=next(self._numbers),
            instance=message.sender,
            topic=message.topic,
            data=message.data,
            content_type=message.content_type,
            metadata=message.metadata,
        )
        self._pending.append(_Pending(worker, kept, asked, self._clock() + SEND_S))
        asyncio.get_running_loop().call_later(SEND_S, self.expire)
        self._news.set()

    def _try_again(self) -> None:
        """Put what waits for room into the queues, in order; of one sender and topic none passes another."""
        if not self._blocked:
            return
        waiting, self._blocked = self._blocked, []
        held: set[tuple[str, str]] = set()
        for each in waiting:
            if each.worker.sock.fileno() < 0:
                continue  # the sender has ended, and was told nothing
            key = each.message.sender, each.message.topic
            full = each.full if key in held else self.bus.put(each.message)
            if full:
                held.add(key)
                each.full = full
                self._blocked.append(each)
            else:
                self._hand_on(each.worker, each.message, each.asked)

    def _refused(self, worker: _Worker, said: Publish) -> str:
        """Say why a message is not taken; empty where it is."""
        if error := message_api.denied(said.topic, (*worker.uplink, *worker.local)):
            return error
        if flaw := message_api.metadata_flaw(said.metadata):
            return flaw
        rates = self._rates.setdefault(worker.instance, _Rates.fresh())
        rate = rates.uplink if any_matches(worker.uplink, said.topic) else rates.local
        return rate.refused(len(said.data))

    def _reply(self, worker: _Worker, reply: Published) -> None:
        if worker.sock.fileno() < 0:
            return
        with contextlib.suppress(OSError):  # a worker that reads nothing waits for nothing
            framing.send_packet(worker.sock, msgspec.json.encode(reply))

    def expire(self) -> None:
        """Tell the workers that have waited long enough."""
        now = self._clock()
        while self._pending and self._pending[0].until_s <= now:
            pending = self._pending.popleft()
            self._reply(pending.worker, Published(number=pending.asked, late=True))
        over = [each for each in self._blocked if each.until_s <= now]
        self._blocked = [each for each in self._blocked if each.until_s > now]
        for each in over:
            said = f"the queue of {each.full}, which gets this message, is full"
            self._reply(each.worker, Published(number=each.asked, error=said))

    # The agent's side

    async def take(self, request: host_api.TakeMessages, session: str) -> host_api.Messages:
        """Note what the agent has kept, and return what it has not, waiting for the first one."""
        done = request.done if request.session == session else 0
        self._settle(done, request.refused)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(host_api.TAKE_WAIT_S, request.wait_s)):
                while not self._after(done):
                    self._news.clear()
                    await self._news.wait()
        messages, _ = host_api.page(self._after(done))
        return host_api.Messages(id=request.id, session=session, messages=messages)

    def _after(self, done: int) -> list[host_api.Message]:
        return [each.message for each in self._pending if each.message.number > done]

    def _settle(self, done: int, refused: dict[int, str]) -> None:
        """Reply to the workers whose messages the agent has kept or refused."""
        while self._pending and self._pending[0].message.number <= done:
            pending = self._pending.popleft()
            error = refused.get(pending.message.number, "")
            self._reply(pending.worker, Published(number=pending.asked, error=error))

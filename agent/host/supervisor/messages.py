"""Messages of components on their way from workers to the agent.

Each worker that may publish has a socket here, and waits for the reply to each of its messages: so no more messages
wait than there are workers. The agent asks for them, keeps them, and says so with its next question; only then does
`send` return in the component. An agent that is started again gets those that it has not said to keep.

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
from typing import Final

import msgspec

from agent.host.ipc import framing, host_api, message_api
from agent.host.ipc.message_api import BYTES_A_MINUTE, MESSAGES_A_MINUTE, SEND_S, Publish, Published
from agent.host.ipc.worker_api import TokenBucket
from fleet.component.wasi import MESSAGING_PRODUCER
from fleet.protocol import wire
from fleet.protocol.manifest import Grants

_OTHER_MAX: Final = 8  # packets of one worker without a reply; an intact one waits for each
_publish: Final[msgspec.json.Decoder[Publish]] = msgspec.json.Decoder(Publish)


def may_publish(grants: Grants) -> bool:
    """Return whether an instance with these grants may publish anything."""
    return grants.allows(MESSAGING_PRODUCER) and bool(grants.publishes)


@dataclass(slots=True)
class _Rate:
    """Budget of an instance, shared by its workers."""

    messages: TokenBucket = field(default_factory=lambda: TokenBucket(MESSAGES_A_MINUTE))
    size: TokenBucket = field(default_factory=lambda: TokenBucket(BYTES_A_MINUTE))


@dataclass(slots=True)
class _Worker:
    """Worker that may publish.

    Attributes:
        kill: ends it, for a reason.
    """

    instance: str
    publish: tuple[str, ...]
    sock: socket.socket
    kill: Callable[[str], None]


@dataclass(slots=True)
class _Pending:
    """Message whose worker waits for the reply."""

    worker: _Worker
    message: host_api.Message
    asked: int
    until_s: float


class MessageGate:
    """Messages that wait to be kept. Everything here belongs to the supervisor's event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._workers: dict[int, _Worker] = {}
        self._worker_numbers = itertools.count(1)
        self._numbers = itertools.count(1)
        self._pending: deque[_Pending] = deque()
        self._rates: dict[str, _Rate] = {}
        self._news = asyncio.Event()

    def admit(self, instance: str, grants: Grants, kill: Callable[[str], None]) -> tuple[int, socket.socket]:
        """Admit a worker of an instance; return its number, for `release`, and its end of the socket."""
        ours, theirs = framing.socket_pair()
        ours.setblocking(False)
        number = next(self._worker_numbers)
        worker = self._workers[number] = _Worker(instance, grants.publishes, ours, kill)
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
        if sum(each.worker is worker for each in self._pending) >= _OTHER_MAX:
            self.release(number)
            worker.kill("it sent messages without waiting for the replies")
            return
        if error := self._refused(worker, said):
            self._reply(worker, Published(number=said.number, error=error))
            return
        message = host_api.Message(
            number=next(self._numbers),
            instance=worker.instance,
            topic=said.topic,
            data=said.data,
            content_type=said.content_type,
            metadata=said.metadata,
        )
        self._pending.append(_Pending(worker, message, said.number, self._clock() + SEND_S))
        asyncio.get_running_loop().call_later(SEND_S, self.expire)
        self._news.set()

    def _refused(self, worker: _Worker, said: Publish) -> str:
        """Say why a message is not taken; empty where it is."""
        if error := message_api.denied(said.topic, worker.publish):
            return error
        if flaw := message_api.metadata_flaw(said.metadata):
            return flaw
        rate = self._rates.setdefault(worker.instance, _Rate())
        if not rate.messages.take():
            return f"{MESSAGES_A_MINUTE} messages a minute are allowed"
        if not rate.size.take(max(1, len(said.data))):
            return f"{BYTES_A_MINUTE // 1024} KiB of messages a minute are allowed"
        return ""

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

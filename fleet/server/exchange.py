"""Conversation with devices whose network blocks MQTT, over their HTTPS port.

A device posts its messages, and asks for those to it; the server holds that request until there is one. For a device
that does so, `Exchanges` takes the broker's place: messages from it are judged as the broker's are, those to it are
kept until it has them, and when it is silent for long, it is offline. All of it is in memory: a device whose session
is unknown starts another one, says hello, and sends what was not acknowledged again.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from fleet.protocol import bounds, topics, wire
from fleet.protocol.messages import Exchange, ExchangeReply, Packet, State
from fleet.protocol.operator_api import Refusal
from fleet.protocol.topics import BadTopicError, Down, Topic, Up

NEXT_S: Final = 300
"""Interval of a device whose request cannot be held, because too many others are; it may wait twice as long."""

SILENCE_S: Final = 60.0
"""Delay beyond the time of a device's next request after which it is offline."""

_LOOK_S: Final = 15.0
_NEWEST_ONLY: Final = frozenset({Down.DESIRED, Down.FRESH, Down.ACK, Down.READINGS})


@dataclass(slots=True)
class _Session:
    """Session of a device.

    Attributes:
        kept: messages to the device by number, oldest first.
        due: time by which the device is heard again, seconds of a clock that never jumps.
        held: number of the newest request that waits.
    """

    name: str
    due: float
    kept: dict[int, Packet] = field(default_factory=dict)
    last: int = 0
    held: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)


class Exchanges:
    """Sessions of the devices that talk over HTTPS. All methods run on the loop.

    Args:
        take: takes a message from a device, by topic, as from the broker; raises nothing.
        clock: seconds that never jump.
        most_held: requests that may wait at the same time.
    """

    def __init__(self, *, take: Callable[[str, bytes], None], clock: Callable[[], float], most_held: int) -> None:
        self._take, self._clock, self._most_held = take, clock, most_held
        self._sessions: dict[str, _Session] = {}
        self._holding = 0
        self._over = False

    def has(self, device: str) -> bool:
        """Tell whether a device talks over HTTPS now."""
        return device in self._sessions

    def put(self, topic: Topic, payload: bytes) -> bool:
        """Keep a message for a device; false when it does not talk over HTTPS."""
        session = self._sessions.get(topic.device)
        if session is None or not isinstance(topic.channel, Down):
            return False
        if topic.channel in _NEWEST_ONLY:
            session.kept = {number: each for number, each in session.kept.items() if each.channel != topic.channel}
        session.last += 1
        session.kept[session.last] = Packet(channel=topic.channel, payload=payload.decode(), number=session.last)
        while len(session.kept) > bounds.EXCHANGE_MESSAGES_MAX:
            del session.kept[next(iter(session.kept))]
        session.news.set()
        return True

    def overrides(self, topic: str, payload: bytes) -> bool:
        """Tell whether a message from the broker is void: the will of a connection that the device has replaced.

        Any other message shows that the device uses the broker again, and ends its session.
        """
        device = topics.sender(topic)
        if device not in self._sessions:
            return False
        if _says_offline(topic, payload):
            return True
        self.forget(device)
        return False

    def forget(self, device: str) -> None:
        """End a device's session, if any."""
        session = self._sessions.pop(device, None)
        if session is not None:
            session.news.set()

    def close(self) -> None:
        """Answer every held request, as the server is about to stop."""
        self._over = True
        for session in self._sessions.values():
            session.news.set()

    async def answer(self, device: str, said: Exchange) -> ExchangeReply:
        """Take what a device sends, and return what there is for it, or what comes within the time that it waits.

        Raises:
            Refusal: a message is on no channel of a device.
        """
        packets = [(_topic(device, packet), packet.payload.encode()) for packet in said.up]
        session = self._sessions.get(device)
        known = session is not None and session.name == said.session
        if session is None or not known:
            self.forget(device)
            session = self._sessions[device] = _Session(secrets.token_hex(8), 0.0)
        wait_s = min(said.wait_s, bounds.EXCHANGE_WAIT_MAX_S)
        self._expect(session, wait_s)
        for topic, payload in packets:
            self._take(topic, payload)
        if said.ends:
            self.forget(device)
            return ExchangeReply(session=session.name)
        next_s = 0
        if known:
            session.kept = {number: each for number, each in session.kept.items() if number > said.received}
            if wait_s and not session.kept and not self._over:
                next_s = await self._hold(session, wait_s)
        return ExchangeReply(session=session.name, down=_fitting(session.kept), next_s=next_s)

    async def _hold(self, session: _Session, wait_s: float) -> int:
        """Wait for a message; return after how many seconds the device shall ask again."""
        if self._holding >= self._most_held:
            self._expect(session, 2 * NEXT_S)
            return NEXT_S
        session.news.set()  # an earlier request of this device that still waits is over
        session.news = asyncio.Event()
        self._holding += 1
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await session.news.wait()
        finally:
            self._holding -= 1
        self._expect(session, 0)
        return 0

    def _expect(self, session: _Session, seconds: float) -> None:
        session.due = max(session.due, self._clock() + seconds + SILENCE_S)

    async def run(self) -> None:
        """Note that devices went offline whose sessions are silent, forever."""
        while True:
            await asyncio.sleep(_LOOK_S)
            self.end_silent()

    def end_silent(self) -> None:
        """Note that the devices went offline that have not asked for longer than they said."""
        now = self._clock()
        for device in [device for device, session in self._sessions.items() if session.due < now]:
            self.forget(device)
            self._take(str(Topic(device, Up.STATE)), wire.encode(State(device=device, online=False)))


def _topic(device: str, packet: Packet) -> str:
    try:
        return str(Topic(device, Up(packet.channel)))
    except ValueError as error:
        raise Refusal(400, "bad-request", f"a device has no channel {packet.channel[:50]!r}") from error


def _fitting(kept: dict[int, Packet]) -> tuple[Packet, ...]:
    """Return the oldest messages that fit into one reply, and at least one."""
    found: list[Packet] = []
    size = 0
    for packet in kept.values():
        size += len(packet.payload)
        if found and size > bounds.EXCHANGE_MAX_BYTES:
            break
        found.append(packet)
    return tuple(found)


def _says_offline(topic: str, payload: bytes) -> bool:
    try:
        return Topic.parse(topic).channel is Up.STATE and not (payload and wire.decode(State, payload).online)
    except (BadTopicError, wire.WireError):
        return False

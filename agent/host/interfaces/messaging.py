"""wasi:messaging: messages that a component publishes, on their way to the operator.

`send` returns once the device keeps the message on its disk, or says why it does not. The draft that is served has the
topic beside the message; others do not link.
"""

import itertools
import select
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from agent.host.engine.adapter_abi import Denials
from agent.host.engine.codec import Signature
from agent.host.engine.host_interface import Function, HostInterface, Surroundings
from agent.host.engine.host_values import case, handle_of, resource
from agent.host.interfaces.package import Package
from agent.host.ipc import framing, message_api
from agent.host.ipc.message_api import SEND_S, Publish, Published
from fleet.component import wasi
from fleet.protocol import bounds, wire
from fleet.protocol.bounds import Metadata
from fleet.protocol.manifest import Grants, Limits

NAME: Final = "wasi:messaging"
MESSAGES_MAX: Final = 32
"""Messages that a component may have at once; another one takes the place of the oldest."""

_MARGIN: Final = 0.8  # of the limit on waiting, so that the guest gets its error before the worker is ended for it
_CLIENT_NUMBER: Final = 20
_MESSAGE_NUMBER: Final = 21
_THE_CLIENT: Final = 1
_published: Final[msgspec.json.Decoder[Published]] = msgspec.json.Decoder(Published)


@dataclass(slots=True)
class _Message:
    """Message that a component has made."""

    data: bytes
    content_type: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    topic: str | None = None

    def flaw(self) -> str:
        """Say why it cannot be sent; empty where it can."""
        if len(self.data) > bounds.MESSAGE_MAX_BYTES:
            return f"the message has {len(self.data)} bytes, at most {bounds.MESSAGE_MAX_BYTES} are taken"
        if len(self.content_type or "") > bounds.MESSAGE_TYPE_MAX_CHARS:
            return f"its content-type has more than {bounds.MESSAGE_TYPE_MAX_CHARS} characters"
        return message_api.metadata_flaw(tuple(self.metadata.items()))


class Publisher:
    """Messages of one worker's component, and its socket to the supervisor; without one nothing is granted."""

    def __init__(self, sock: socket.socket | None, grants: Grants, limits: Limits) -> None:
        self._sock = sock
        self._granted = (*grants.publishes, *grants.publishes_locally)
        self._wait_s = min(SEND_S, limits.idle_ms / 1000 * _MARGIN)
        self._messages: dict[int, _Message] = {}
        self._received: dict[int, _Message] = {}
        self._handles = itertools.count(1)
        self._numbers = itertools.count(1)

    def reset(self) -> None:
        """Forget the messages of an instance that has ended."""
        self._messages.clear()
        self._received.clear()

    def received(self, topic: str, data: bytes, content_type: str, metadata: Metadata) -> Any:
        """Keep a message that comes from the device's bus, until the next one, and return it for the guest."""
        handle = next(self._handles)
        self._received = {handle: _Message(data, content_type or None, dict(metadata), topic)}
        return resource(handle, _MESSAGE_NUMBER)

    def add(self, data: bytes) -> int:
        """Keep a new message, and return its handle."""
        handle = next(self._handles)
        self._messages[handle] = _Message(data[: bounds.MESSAGE_MAX_BYTES + 1])
        if len(self._messages) > MESSAGES_MAX:
            del self._messages[next(iter(self._messages))]
        return handle

    def get(self, handle: int) -> _Message:
        """Return a message. Raises `KeyError` once others have taken its place, which ends the call in a trap."""
        return self._received[handle] if handle in self._received else self._messages[handle]

    def drop(self, handle: int) -> None:
        """Forget a message."""
        self._take(handle)

    def _take(self, handle: int) -> _Message | None:
        return self._received.pop(handle, None) or self._messages.pop(handle, None)

    def send(self, denials: Denials, topic: str, handle: int) -> Any:
        """Publish a message, and wait until the device keeps it; None, or the error."""
        message = self._take(handle)
        if error := message_api.denied(topic, self._granted):
            denials.deny(f"{wasi.MESSAGING_PRODUCER}.send", f"{wasi.MESSAGING_PRODUCER}.send is denied: {error}")
            return case("permission-denied", error)
        if message is None:
            return case("other", f"more than {MESSAGES_MAX} messages were made before this one was sent")
        if flaw := message.flaw():
            return case("other", flaw)
        asked = Publish(
            number=next(self._numbers),
            topic=topic,
            data=message.data,
            content_type=message.content_type or "",
            metadata=tuple(message.metadata.items()),
        )
        return self._ask(asked)

    def _ask(self, asked: Publish) -> Any:
        assert self._sock is not None, "grants without a socket"
        try:
            framing.send_packet(self._sock, msgspec.json.encode(asked))
            reply = self._reply(asked.number)
        except (OSError, framing.GoneError, *wire.JSON_ERRORS) as error:
            return case("connection", f"the host does not answer: {error}")
        if reply is None or reply.late:
            return case("timeout")
        return case("other", reply.error) if reply.error else None

    def _reply(self, number: int) -> Published | None:
        """Wait for the reply to a message; None when none comes in time. Raises `OSError`, `framing.GoneError`."""
        assert self._sock is not None
        until_s = time.monotonic() + self._wait_s
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        while (left_s := until_s - time.monotonic()) > 0 and poll.poll(left_s * 1000):
            with suppress(BlockingIOError):
                data, fds = framing.receive_packet(self._sock)
                framing.close_all(fds)
                reply = _published.decode(data)
                if reply.number == number:
                    return reply
        return None


def _publisher(around: Surroundings) -> Publisher:
    found = around.parts.get(NAME)
    return found if isinstance(found, Publisher) else Publisher(None, Grants(), Limits())


def _types(around: Surroundings) -> Mapping[str, Function]:
    publisher = _publisher(around)

    def message(store: Any, handle: Any) -> _Message:
        return publisher.get(handle_of(store, handle))

    def create(_store: object, data: bytes) -> Any:
        return resource(publisher.add(data), _MESSAGE_NUMBER)

    def set_content_type(store: object, handle: Any, value: str) -> None:
        message(store, handle).content_type = value

    def set_data(store: object, handle: Any, data: bytes) -> None:
        message(store, handle).data = data[: bounds.MESSAGE_MAX_BYTES + 1]

    def add_metadata(store: object, handle: Any, key: str, value: str) -> None:
        metadata = message(store, handle).metadata
        if len(metadata) <= bounds.MESSAGE_METADATA_MAX:  # an entry too many shows when the message is sent
            metadata[key] = value[: bounds.MESSAGE_METADATA_MAX_BYTES + 1]

    def set_metadata(store: object, handle: Any, entries: list[tuple[str, str]]) -> None:
        found = message(store, handle)
        found.metadata = {}
        for key, value in entries:
            add_metadata(store, handle, key, value)

    def remove_metadata(store: object, handle: Any, key: str) -> None:
        message(store, handle).metadata.pop(key, None)

    return {
        "[static]client.connect": lambda _store, _name: resource(_THE_CLIENT, _CLIENT_NUMBER),
        "[method]client.disconnect": lambda store, client: client.drop(store),
        "[constructor]message": create,
        "[method]message.topic": lambda store, handle: message(store, handle).topic,
        "[method]message.content-type": lambda store, handle: message(store, handle).content_type,
        "[method]message.set-content-type": set_content_type,
        "[method]message.data": lambda store, handle: message(store, handle).data,
        "[method]message.set-data": set_data,
        "[method]message.metadata": lambda store, handle: list(message(store, handle).metadata.items()) or None,
        "[method]message.add-metadata": add_metadata,
        "[method]message.set-metadata": set_metadata,
        "[method]message.remove-metadata": remove_metadata,
        "[drop]client": lambda _store, _rep: None,
        "[drop]message": lambda _store, rep: publisher.drop(rep),
    }


def _producer(around: Surroundings) -> Mapping[str, Function]:
    publisher, denials = _publisher(around), around.log

    def send(store: Any, client: Any, topic: str, handle: Any) -> Any:
        client.drop(store)  # ends the borrow, and the client stays
        return publisher.send(denials, topic, handle_of(store, handle))

    return {"send": send}


_ERROR: Final = "variant { timeout, connection(string), permission-denied(string), other(string) }"
_SELF: Final = ("self", "borrow")
_PAIRS: Final = "list<tuple<string, string>>"


def _signature(*params: tuple[str, str], result: str = "") -> Signature:
    return Signature(params, result)


_TYPES: Final = {
    "[static]client.connect": _signature(("name", "string"), result=f"result<own, {_ERROR}>"),
    "[method]client.disconnect": _signature(_SELF, result=f"result<_, {_ERROR}>"),
    "[constructor]message": _signature(("data", "list<u8>"), result="own"),
    "[method]message.topic": _signature(_SELF, result="option<string>"),
    "[method]message.content-type": _signature(_SELF, result="option<string>"),
    "[method]message.set-content-type": _signature(_SELF, ("content-type", "string")),
    "[method]message.data": _signature(_SELF, result="list<u8>"),
    "[method]message.set-data": _signature(_SELF, ("data", "list<u8>")),
    "[method]message.metadata": _signature(_SELF, result=f"option<{_PAIRS}>"),
    "[method]message.add-metadata": _signature(_SELF, ("key", "string"), ("value", "string")),
    "[method]message.set-metadata": _signature(_SELF, ("meta", _PAIRS)),
    "[method]message.remove-metadata": _signature(_SELF, ("key", "string")),
}
_SEND: Final = _signature(("c", "borrow"), ("topic", "string"), ("message", "own"), result=f"result<_, {_ERROR}>")
_VERSIONS: Final = ("0.2.0-draft",)

PACKAGE: Final = Package(
    name=NAME,
    about="""\
Messages to the operator and between components ([messages](messages.md)): `send` returns once every component that
subscribes to the topic has the message in its queue and, on topics of `publish`, once the device keeps it on its disk,
from where it reaches the server, also after days without a network. A component with a trigger of type `message`
exports `wasi:messaging/incoming-handler`, version `0.2.0-draft`, which is called for each message. The draft is the one
in which `send` takes the topic; `request-reply` is not served.""",
    grant='`interfaces = ["wasi:messaging"]`, and topics: `publish = ["plant/#"]` to the operator and to components of '
    "the device, `publish_local` to components alone, `subscribe` to receive",
    limits={
        "size of a message": "16 KiB; topic 256 bytes; 16 entries of metadata, together 4 KiB, a word 1,024 characters",
        "messages a minute": "600, and 1 MiB, of all workers of the instance together; of those that stay on the "
        "device 6,000, and 16 MiB",
        "messages that wait for the handler": "`limits.queue` and `limits.queue_messages`",
        "attempts": "5 for each message, then it is a dead letter",
        "messages at once": "32 that are made and not sent",
        "wait in `send`": "10 seconds, or 0.8 of `limits.idle` if that is less: then `timeout`",
    },
    counters={
        "denials": "messages on a topic that no grant covers",
        "messages": "how many wait, their size, age of the oldest; delivered, failed, dropped, dead letters",
    },
    rust="""\
use wasi::messaging::{producer, types::{Client, Message}};

let client = Client::connect("")?;
producer::send(&client, "plant/boiler/temperature", Message::new(b"21.5"))?;

// A component that receives: an error has the message come again.
impl exports::wasi::messaging::incoming_handler::Guest for Alarm {
    fn handle(message: Message) -> Result<(), Error> {
        let text = String::from_utf8(message.data()).map_err(|_| Error::Other("no text".into()))?;
        println!("{} is {text}", message.topic().unwrap_or_default());
        Ok(())
    }
}""",
    python="""\
from wit_world.imports import producer
from wit_world.imports.types import Client, Message

producer.send(Client.connect(""), "plant/boiler/temperature", Message(b"21.5"))


class IncomingHandler:  # of a component that receives: an error that is raised has the message come again
    def handle(self, message: Message) -> None:
        print(message.topic(), "is", message.data().decode())""",
    interfaces=(
        HostInterface(
            wasi.MESSAGING_TYPES,
            _VERSIONS,
            _TYPES,
            _types,
            resources={"client": _CLIENT_NUMBER, "message": _MESSAGE_NUMBER},
        ),
        HostInterface(wasi.MESSAGING_PRODUCER, _VERSIONS, {"send": _SEND}, _producer),
    ),
)

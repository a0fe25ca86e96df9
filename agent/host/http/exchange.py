"""An exchange between a client and an instance, and what its two sides are to each other. No socket, no policy."""

from collections import deque
from typing import Final, Protocol

from agent.host.http.parser import Fields, RequestHead

_IDEMPOTENT: Final = frozenset({b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"TRACE"})


class Asker(Protocol):
    """Client side of an exchange."""

    @property
    def moved(self) -> int:
        """A number that grows with each byte that the client sends or takes."""

    def send(self, data: bytes) -> None:
        """Send bytes of the response."""

    def upstream_failed(self, exchange: "Exchange") -> None:
        """Retry or fail the exchange: the instance hung up before its response was complete."""

    def resume_client(self) -> None:
        """Read on from the client: the instance takes more."""

    def reply(self, exchange: "Exchange", status: int, why: str) -> None:
        """Answer with a sentence in place of the instance."""

    def finish(self, exchange: "Exchange", data: bytes) -> None:
        """Send the rest of the answer, which is then complete."""

    def cut(self, exchange: "Exchange", data: bytes = b"") -> None:
        """Send `data` and end the connection within the answer."""

    def close(self) -> None:
        """End the connection at once."""


class Upstream(Protocol):
    """Instance's side of an exchange."""

    def send_body(self, data: bytes) -> None:
        """Send a piece of the request's body."""

    def end_body(self, trailers: Fields) -> None:
        """Send the end of the request's body."""

    @property
    def full(self) -> bool:
        """True while more waits to be sent than is wise."""

    def pause(self) -> None:
        """Read no further for now."""

    def resume(self) -> None:
        """Read on."""

    def drop(self) -> None:
        """Take note that the client wants the answer no more."""

    def drop_slow(self) -> None:
        """Take note that the client is not waited for any longer."""


class Exchange:
    """Request of a client, and how far its response has come."""

    def __init__(self, head: RequestHead) -> None:
        self.request = head
        self.body: deque[bytes] = deque()
        self.trailers: Fields = []
        self.complete = False
        self.keep_alive = True
        self.refusal = 0
        self.instance = ""
        self.head = b""
        self.upstream: Upstream | None = None
        self.ended = False  # the end of its body was sent
        self.sent_body = False
        self.answering = False
        self.retried = False
        self.received = 0  # bytes of its body
        self.request_max: int | None = None

    @property
    def repeatable(self) -> bool:
        """True if the request may be sent again after an upstream that ended without a byte of response."""
        return not (self.answering or self.retried or self.sent_body) and self.request.method in _IDEMPOTENT

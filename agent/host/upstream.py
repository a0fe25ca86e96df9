"""Connections from the router to instances: which are kept, and what may be sent on one.

An exchange takes a connection of its own, which waits at the instance's listener for a lane that is free, and outlives
the death of a lane that has not come to it. When its answer is complete the connection may be kept for another. A kept
one belongs to one lane, which may end at any moment, so only what may be sent twice goes there: requests of idempotent
methods, whole and without a body. Such a one is sent again, once, on a connection of its own, if the instance hung up
before it said a word (RFC 9110, section 9.2.2). At a swap lanes hand kept connections to the next generation.

A connection is kept only if nothing is left in it: the request was whole and sent, the answer ended where the bytes
did, and nothing in between has begun to close it. That is asked again when it is taken: what the kernel knows by then
(an end, a word out of turn), and what the loop has decided but not told yet.
"""

import asyncio
import socket
import time
from collections import deque
from typing import Any, Final, Protocol

import httptools

from agent.host.forward import Known
from agent.host.reader import Fields, Head

KEPT_MAX: Final = 4
"""Of one instance; few, since a seat in a shared lane takes few clients in all, and these must not be all of them."""
KEPT_IN_ALL_MAX: Final = 256
KEPT_S: Final = 60
READ_BYTES: Final = 64 * 1024  # at once: beyond 128 KiB each read would map memory and give it back
_HIGH_BYTES: Final = 256 * 1024
_IDEMPOTENT: Final = frozenset({b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"TRACE"})
_BODILESS: Final = frozenset({204, 304})


class Asker(Protocol):
    """Whose exchange it is."""

    def send(self, data: bytes) -> None:
        """Bytes of the answer."""

    def answered(self, exchange: "Exchange") -> None:
        """The answer is complete."""

    def upstream_failed(self, exchange: "Exchange") -> None:
        """The instance hung up before its answer was complete."""

    def resume_client(self) -> None:
        """The instance takes more."""


class Exchange:
    """One request of a client's, and how far its answer has come."""

    def __init__(self, head: Head) -> None:
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

    @property
    def repeatable(self) -> bool:
        """Whether it may be sent again after an upstream that ended without a word."""
        return not (self.answering or self.retried or self.sent_body) and self.request.method in _IDEMPOTENT

    @property
    def light(self) -> bool:
        """Whether it may go on a kept connection: there is nothing of it that could not be sent again."""
        return self.complete and not self.body and not self.request.chunked and self.repeatable


class Pool:
    """Kept connections by instance, how to make more, and what is known of requests to instances."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self.known: dict[bytes, Known] = {}  # until an instance comes, goes, or answers no longer
        self.spread: set[str] = set()  # instances with several lanes: a kept connection would wait for one of them
        self._kept: dict[str, list[Upstream]] = {}
        self._count = 0

    def take(self, exchange: Exchange) -> "Upstream | None":
        """A kept connection for this exchange, the one used last; None if it needs another."""
        kept = self._kept.get(exchange.instance)
        while kept and exchange.light:
            upstream = kept.pop()
            self._count -= 1
            if upstream.open:
                return upstream
            upstream.close()
        return None

    def give(self, upstream: "Upstream") -> None:
        """Keep this connection, if there is room."""
        kept = self._kept.setdefault(upstream.instance, [])
        full = len(kept) >= KEPT_MAX or self._count >= KEPT_IN_ALL_MAX
        if full or not upstream.open or upstream.instance in self.spread:
            upstream.close()
            return
        upstream.kept_s = time.monotonic()
        kept.append(upstream)
        self._count += 1

    def connect(self, instance: str) -> "Upstream":
        """A new connection; it may still have to wait for its lane. Raises OSError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            sock.connect(f"{self._directory}/{instance}")
        except OSError:
            sock.close()
            raise
        return Upstream(self, instance, sock)

    def forget(self, instance: str) -> None:
        """The instance is gone, or has several lanes now: keep nothing of it."""
        for upstream in self._kept.pop(instance, []):
            self._count -= 1
            upstream.close()

    def sweep(self) -> None:
        """Close what was not used for long: it holds a client's place in its lane."""
        old_s = time.monotonic() - KEPT_S
        for instance, kept in list(self._kept.items()):
            stay = [each for each in kept if each.kept_s > old_s and each.open]
            for upstream in kept:
                if upstream not in stay:
                    self._count -= 1
                    upstream.close()
            if stay:
                self._kept[instance] = stay
            else:
                del self._kept[instance]


class Upstream(asyncio.Protocol):
    """A connection to an instance."""

    def __init__(self, pool: Pool, instance: str, sock: socket.socket) -> None:
        self.instance = instance
        self.lost = False
        self.kept_s = 0.0
        self.client: Asker | None = None
        self.exchange: Exchange | None = None
        self._pool = pool
        self._sock = sock
        self._parser: Any = None
        self._head_done = self._done = self._reusable = self._more = False
        loop = asyncio.get_running_loop()
        self._transport: Any = loop._make_socket_transport(sock, self)  # type: ignore[attr-defined]  # noqa: SLF001 - there at once, without a task
        self._transport.max_size = READ_BYTES

    def begin(self, client: Asker, exchange: Exchange) -> None:
        """Carry this exchange."""
        self.client, self.exchange = client, exchange
        self._parser = httptools.HttpResponseParser(self)
        self._head_done = self._done = self._reusable = self._more = False
        self._transport.write(exchange.head)

    def write(self, data: bytes) -> None:
        """Send bytes to the instance."""
        self._transport.write(data)

    @property
    def open(self) -> bool:
        """Whether it is fit for another exchange, as far as the loop and the kernel know at this moment."""
        if self.lost or self._transport.is_closing() or self._transport.get_write_buffer_size():
            return False
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False  # an end, or a word out of turn

    @property
    def full(self) -> bool:
        """Whether more waits to be sent than is wise."""
        return bool(self._transport.get_write_buffer_size() > _HIGH_BYTES)

    def pause(self) -> None:
        """Read no further for now."""
        self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if not self.lost:
            self._transport.resume_reading()

    def resume_writing(self) -> None:
        """There is room to send again."""
        if self.client is not None:
            self.client.resume_client()

    def data_received(self, data: bytes) -> None:
        """Bytes from the other side."""
        client, exchange = self.client, self.exchange
        if client is None or exchange is None:
            self.close()  # it speaks out of turn
            return
        exchange.answering = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._done = self._more = True
        except httptools.HttpParserError:
            self._more = True
        if self._more:  # what follows would be taken for the answer to the client's next request
            self.client = self.exchange = None
            self.close()
            client.upstream_failed(exchange)
            return
        client.send(data)
        if self._done:
            self.client = self.exchange = None
            if exchange.complete and self._reusable:
                self._pool.give(self)
            else:
                self.close()
            client.answered(exchange)

    def on_message_begin(self) -> None:
        """A message begins."""
        self._more = self._done

    def on_headers_complete(self) -> None:
        """The head is complete."""
        assert self.exchange is not None
        self._head_done = True
        self._reusable = self._parser.should_keep_alive()
        if self.exchange.request.method == b"HEAD" or self._parser.get_status_code() in _BODILESS:
            self._done = True

    def on_body(self, _body: bytes) -> None:
        """A piece of the body."""
        self._more = self._more or self._done

    def on_message_complete(self) -> None:
        """The message is complete."""
        self._done = True

    def connection_lost(self, exc: Exception | None) -> None:
        """The other side is gone."""
        del exc
        self.lost = True
        client, exchange = self.client, self.exchange
        self.client = self.exchange = None
        if client is None or exchange is None:
            return
        if self._head_done and exchange.request.old:
            exchange.keep_alive = False  # HTTP/1.0: an answer without a length ends with the connection
            client.answered(exchange)
        else:
            client.upstream_failed(exchange)

    def drop(self) -> None:
        """Its client wants the answer no more."""
        self.client = self.exchange = None
        self.close()

    def close(self) -> None:
        """Hang up."""
        self.lost = True
        self._transport.abort()

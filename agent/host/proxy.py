"""Proxying HTTP/1.1 between the board's clients and instances' Unix sockets. No policy: `Routes` says what goes where.

A request is read by its head and streamed on; its answer goes back as the bytes it is (lanes frame with content-length
alone), parsed only to find its end. A request without a body that comes again byte by byte, as a client's mostly do, is
not read again: between two messages, the same bytes mean the same (`Known`). Each exchange has a connection of its own
to the instance, so that a free lane takes it and nothing of another client's stands before it. A request is sent a
second time only where it was idempotent and had no body (RFC 9110, section 9.2.2).
"""

import asyncio
import time
from collections import deque
from typing import Any, Final

import httptools

from agent.host import connection
from agent.host.forward import Known, forwarded
from agent.host.reader import Fields, Head, Reader
from agent.host.routes import Routes

_HIGH_BYTES: Final = 256 * 1024
_IDEMPOTENT: Final = frozenset({b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"TRACE"})
_READ_BYTES: Final = 64 * 1024  # at once: beyond 128 KiB each read would map memory and give it back
_KNOWN_MAX: Final = 128
_KNOWN_MAX_BYTES: Final = 2048
_LINGER_S: Final = 5  # for so long it is read what a client sends after an answer that refused it
_LINGER_MAX_BYTES: Final = 32 * 1024 * 1024


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


class Pool:
    """How to reach instances, and what is known of requests to them."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self.known: dict[bytes, Known] = {}  # until an instance comes, goes, or answers no longer

    async def connect(self, instance: str) -> "Upstream":
        """A new connection; raises OSError."""
        loop = asyncio.get_running_loop()
        path = f"{self._directory}/{instance}"
        _, upstream = await loop.create_unix_connection(lambda: Upstream(instance), path)
        return upstream


class Upstream(asyncio.Protocol):
    """A connection to an instance."""

    def __init__(self, instance: str) -> None:
        self.instance = instance
        self.lost = False
        self.client: Client | None = None
        self.exchange: Exchange | None = None
        self._transport: Any = None
        self._parser: Any = None
        self._done = False
        self._head_done = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self._transport = transport
        transport.max_size = _READ_BYTES  # type: ignore[attr-defined]

    def begin(self, client: "Client", exchange: Exchange) -> None:
        """Carry this exchange."""
        self.client, self.exchange = client, exchange
        self._parser = httptools.HttpResponseParser(self)
        self._done = self._head_done = False
        self._transport.write(exchange.head)

    def write(self, data: bytes) -> None:
        """Send bytes to the instance."""
        self._transport.write(data)

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
            self._done = True
        except httptools.HttpParserError:
            self.close()
            client.upstream_failed(exchange)
            return
        client.send(data)
        if self._done:
            self.client = self.exchange = None
            self.close()
            client.answered(exchange)

    def on_headers_complete(self) -> None:
        """The head is complete."""
        assert self.exchange is not None
        self._head_done = True
        if self.exchange.request.method == b"HEAD" or self._parser.get_status_code() in {204, 304}:
            self._done = True

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

    def close(self) -> None:
        """Hang up."""
        self.lost = True
        self._transport.abort()


class Client(asyncio.Protocol):
    """A connection of a client of the board."""

    def __init__(self, routes: Routes, pool: Pool, all_clients: "set[Client]") -> None:
        self.last_s = time.monotonic()
        self._routes = routes
        self._pool = pool
        self._all = all_clients
        self._transport: Any = None
        self._reader = Reader(self, spare=True)
        self._queue: deque[Exchange] = deque()
        self._paused = False
        self._full = False
        self._closing = False
        self._discarded = 0
        self._connecting: asyncio.Task[None] | None = None

    # The client's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self._transport = transport
        transport.max_size = _READ_BYTES  # type: ignore[attr-defined]
        self._all.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The other side is gone."""
        del exc
        self._all.discard(self)
        self._closing = True
        if self._connecting is not None:
            self._connecting.cancel()
        for exchange in self._queue:
            if exchange.upstream is not None:
                exchange.upstream.client = None
                exchange.upstream.close()
        self._queue.clear()

    @property
    def idle(self) -> bool:
        """Whether it stands between requests."""
        return not self._queue

    def close(self) -> None:
        """Hang up."""
        self._transport.abort()

    def end_when_idle(self) -> None:
        """Answer what was asked, then hang up."""
        if self.idle:
            self._transport.close()
        else:
            self._queue[-1].keep_alive = False

    def data_received(self, data: bytes) -> None:
        """Bytes from the other side."""
        self.last_s = time.monotonic()
        if self._closing:
            self._discarded += len(data)
            if self._discarded > _LINGER_MAX_BYTES:
                self._transport.abort()
            return
        if self._queue or self._reader.within:
            self._reader.feed(data)
        elif (known := self._pool.known.get(data)) is not None:
            exchange = Exchange(known.request)
            exchange.complete, exchange.instance, exchange.head = True, known.instance, known.head
            self._queue.append(exchange)
        else:
            self._reader.feed(data)
            self._learn(data)
        if len(self._queue) > 1 and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        self._advance()

    def _learn(self, data: bytes) -> None:
        """Remember these bytes, which came between two messages, if they are one whole request without a body."""
        if len(self._queue) != 1 or self._reader.within or len(data) > _KNOWN_MAX_BYTES:
            return
        exchange = self._queue[0]
        request = exchange.request
        whole = exchange.complete and exchange.keep_alive and not exchange.refusal
        if not whole or request.chunked or request.length is not None or request.expects:
            return
        route = self._routes.find(request.host, request.target)
        if not route.status:
            if len(self._pool.known) >= _KNOWN_MAX:
                self._pool.known.clear()
            exchange.instance, exchange.head = route.instance, forwarded(request, route)
            self._pool.known[data] = Known(request, exchange.instance, exchange.head)

    def eof_received(self) -> bool:
        """The client will send no more; what it asked for whole is still answered."""
        if not self._queue or not self._queue[-1].complete:
            return False
        self._closing = True
        return True

    # What the reader says.

    def head(self, head: Head) -> None:
        """A request begins."""
        self._queue.append(Exchange(head))

    def body(self, data: bytes) -> None:
        """A piece of its body."""
        self._queue[-1].body.append(data)

    def end(self, trailers: Fields, *, keep_alive: bool) -> None:
        """It is whole."""
        exchange = self._queue[-1]
        exchange.trailers = trailers
        exchange.keep_alive = keep_alive
        exchange.complete = True

    def refused(self, status: int) -> None:
        """What comes is no request; after what was asked before it this is said, and the connection ends."""
        self._closing = True
        if self._queue and not self._queue[-1].complete:
            broken = self._queue.pop()
            if broken.upstream is not None:
                broken.upstream.client = None
                broken.upstream.close()
            if broken.answering:
                self._transport.abort()
                return
        exchange = Exchange(Head())
        exchange.refusal, exchange.keep_alive, exchange.complete = status, False, True
        self._queue.append(exchange)

    # The exchange at the head of the queue.

    def _advance(self) -> None:
        if not self._queue or self._connecting is not None:
            return
        exchange = self._queue[0]
        if exchange.upstream is not None:
            self._stream(exchange)
            return
        if not exchange.head and not self._routed(exchange):
            return
        self._connecting = asyncio.ensure_future(self._connect(exchange))

    def _routed(self, exchange: Exchange) -> bool:
        """Find where it goes; answer it here and now if nowhere."""
        if exchange.refusal:
            self._reply(exchange, exchange.refusal, connection.REFUSALS[exchange.refusal])
            return False
        request = exchange.request
        route = self._routes.find(request.host, request.target)
        if route.status:
            self._reply(exchange, route.status, route.why)
            return False
        exchange.instance = route.instance
        exchange.head = forwarded(request, route)
        return True

    async def _connect(self, exchange: Exchange) -> None:
        try:
            upstream = await self._pool.connect(exchange.instance)
        except OSError:
            self._connecting = None
            if self._queue and self._queue[0] is exchange:
                self._reply(exchange, 502, f"{exchange.instance} does not answer")
            else:
                self._advance()
            return
        self._connecting = None
        if self._queue and self._queue[0] is exchange:
            self._begin(exchange, upstream)
        else:  # the client sent what is no request meanwhile
            upstream.close()
            self._advance()

    def _begin(self, exchange: Exchange, upstream: Upstream) -> None:
        exchange.upstream = upstream
        if exchange.request.expects and not exchange.complete and not exchange.body:
            self._transport.write(connection.CONTINUE)
        upstream.begin(self, exchange)
        if self._full:
            upstream.pause()
        self._stream(exchange)

    def _stream(self, exchange: Exchange) -> None:
        """Pass on what has come of the body."""
        upstream = exchange.upstream
        assert upstream is not None
        chunked = exchange.request.chunked
        while exchange.body:
            chunk = exchange.body.popleft()
            exchange.sent_body = True
            upstream.write(b"%x\r\n%b\r\n" % (len(chunk), chunk) if chunked else chunk)
        if exchange.complete and chunked and not exchange.ended:
            exchange.ended = exchange.sent_body = True
            upstream.write(b"0\r\n%b\r\n" % connection.lines(exchange.trailers))
        if upstream.full and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def resume_client(self) -> None:
        """The upstream has room again."""
        if self._paused and len(self._queue) <= 1 and not self._closing:
            self._paused = False
            self._transport.resume_reading()

    # Answers.

    def send(self, data: bytes) -> None:
        """Bytes of the answer."""
        self.last_s = time.monotonic()
        self._transport.write(data)

    def pause_writing(self) -> None:
        """What is sent piles up."""
        self._full = True
        if self._queue and self._queue[0].upstream is not None:
            self._queue[0].upstream.pause()

    def resume_writing(self) -> None:
        """There is room to send again."""
        self._full = False
        self.last_s = time.monotonic()
        if self._queue and self._queue[0].upstream is not None:
            self._queue[0].upstream.resume()

    def answered(self, exchange: Exchange) -> None:
        """The answer is complete."""
        exchange.upstream = None
        self._next(exchange)

    def upstream_failed(self, exchange: Exchange) -> None:
        """The instance hung up before its answer was complete."""
        exchange.upstream = None
        if not self._queue or self._queue[0] is not exchange:
            return
        if exchange.answering:
            self._transport.abort()
        elif exchange.repeatable:
            exchange.retried = True
            self._connecting = asyncio.ensure_future(self._connect(exchange))
        else:
            self._reply(exchange, 502, f"{exchange.instance} ended before it answered")

    def _reply(self, exchange: Exchange, status: int, why: str) -> None:
        keep_alive = exchange.keep_alive and exchange.complete
        exchange.keep_alive = keep_alive
        self.send(connection.note(status, why, head=exchange.request.method == b"HEAD", keep_alive=keep_alive))
        self._next(exchange)

    def _next(self, exchange: Exchange) -> None:
        self._queue.popleft()
        if not exchange.keep_alive or not exchange.complete:
            self._closing = True
            if exchange.complete and not self._reader.refused:
                self._transport.close()
            else:
                self._linger()
            return
        if self._closing and not self._queue:
            self._transport.close()
            return
        self.resume_client()
        if self._queue:
            self._advance()

    def _linger(self) -> None:
        """It has its answer and may still be sending: to close now would make its kernel throw the answer away."""
        if self._transport.can_write_eof() and not self._transport.is_closing():
            self._transport.write_eof()
            if self._paused:
                self._transport.resume_reading()
            asyncio.get_running_loop().call_later(_LINGER_S, self._transport.abort)

"""Proxying HTTP/1.1 between the board's clients and instances' Unix sockets. No policy: `Routes` says what goes where.

A request is read by its head and streamed on; its answer goes back as the bytes it is (lanes frame with content-length
alone), parsed only to find its end. Upstream connections are kept alive: at a swap the lanes hand them to the next
generation, so neither side sees anything. A request is sent a second time only where it was idempotent and had no body
(RFC 9110, section 9.2.2).
"""

import asyncio
import time
from collections import deque
from typing import Any, Final

import httptools

from agent.host import connection
from agent.host.routes import Routes

POOL_MAX: Final = 32
_HIGH_BYTES: Final = 256 * 1024
_IDEMPOTENT: Final = frozenset({b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"TRACE"})
_HOP: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"content-length",
        b"expect",
        b"x-forwarded-prefix",
    }
)
_HEADERS_MAX: Final = 100


class Exchange:
    """One request of a client's, and how far its answer has come."""

    def __init__(self) -> None:
        self.method = b""
        self.target = b""
        self.fields: list[bytes] = []
        self.host = b""
        self.length: bytes | None = None
        self.chunked = False
        self.expects = False
        self.head_bytes = 0
        self.head_done = False
        self.body: deque[bytes] = deque()
        self.complete = False
        self.keep_alive = True
        self.refusal = 0
        self.instance = ""
        self.head = b""
        self.upstream: Upstream | None = None
        self.sent_body = False
        self.answering = False
        self.retried = False

    @property
    def repeatable(self) -> bool:
        """Whether it may be sent again after an upstream that ended without a word."""
        return not (self.answering or self.retried or self.sent_body) and self.method in _IDEMPOTENT


class Pool:
    """Idle upstream connections by instance, and how to make more."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._idle: dict[str, list[Upstream]] = {}

    def take(self, instance: str) -> "Upstream | None":
        """An idle connection, the one used last."""
        idle = self._idle.get(instance)
        while idle:
            upstream = idle.pop()
            if not upstream.lost:
                return upstream
        return None

    def give(self, upstream: "Upstream") -> None:
        """Back to the idle ones."""
        idle = self._idle.setdefault(upstream.instance, [])
        if upstream.lost or len(idle) >= POOL_MAX:
            upstream.close()
        else:
            idle.append(upstream)

    async def connect(self, instance: str) -> "Upstream":
        """A new connection; raises OSError."""
        loop = asyncio.get_running_loop()
        path = f"{self._directory}/{instance}"
        _, upstream = await loop.create_unix_connection(lambda: Upstream(self, instance), path)
        return upstream

    def forget(self, instance: str) -> None:
        """The instance is gone: close what is idle."""
        for upstream in self._idle.pop(instance, []):
            upstream.close()


class Upstream(asyncio.Protocol):
    """A connection to an instance."""

    def __init__(self, pool: Pool, instance: str) -> None:
        self.instance = instance
        self.lost = False
        self.client: Client | None = None
        self.exchange: Exchange | None = None
        self._pool = pool
        self._transport: Any = None
        self._parser: Any = None
        self._done = False
        self._head_done = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self._transport = transport

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
            reusable = exchange.complete and self._parser.should_keep_alive()
            self.client = self.exchange = None
            if reusable:
                self._pool.give(self)
            else:
                self.close()
            client.answered(exchange)

    def on_headers_complete(self) -> None:
        """The head is complete."""
        assert self.exchange is not None
        if self.exchange.method == b"HEAD" or self._parser.get_status_code() in {204, 304}:
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
        if client is not None and exchange is not None:
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
        self._parser: Any = httptools.HttpRequestParser(self)
        self._queue: deque[Exchange] = deque()
        self._paused = False
        self._closing = False
        self._peer = b""
        self._connecting: asyncio.Task[None] | None = None

    # The client's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self._transport = transport
        self._all.add(self)
        peer = transport.get_extra_info("peername")
        self._peer = str(peer[0]).encode() if isinstance(peer, tuple) else b""

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
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._closing = True
            if self._queue:
                self._queue[-1].keep_alive = False
        except httptools.HttpParserError:
            self._refuse(400)
        if len(self._queue) > 1 and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        self._advance()

    def _refuse(self, status: int) -> None:
        self._closing = True
        if self._queue and not self._queue[-1].complete:
            broken = self._queue.pop()
            if broken.upstream is not None:
                broken.upstream.client = None
                broken.upstream.close()
        refused = Exchange()
        refused.refusal, refused.keep_alive, refused.complete, refused.head_done = status, False, True, True
        self._queue.append(refused)

    def on_message_begin(self) -> None:
        """A message begins."""
        self._queue.append(Exchange())

    def on_url(self, url: bytes) -> None:
        """A piece of the request target."""
        exchange = self._queue[-1]
        exchange.target += url
        exchange.head_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header field."""
        exchange = self._queue[-1]
        low = name.lower()
        exchange.head_bytes += len(name) + len(value) + 4
        if exchange.head_bytes > connection.HEAD_MAX_BYTES or len(exchange.fields) >= _HEADERS_MAX:
            exchange.refusal = 431
        elif low not in _HOP:
            exchange.fields.append(low + b": " + value + b"\r\n")
        if low == b"host":
            exchange.host = value
        elif low == b"content-length":
            exchange.length = value
        elif low == b"transfer-encoding":
            exchange.chunked = True
        elif low == b"expect":
            exchange.expects = value.lower() == b"100-continue"

    def on_headers_complete(self) -> None:
        """The head is complete."""
        exchange = self._queue[-1]
        exchange.method = self._parser.get_method()
        exchange.head_done = True
        if exchange.expects and not exchange.refusal:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._queue[-1].body.append(body)

    def on_message_complete(self) -> None:
        """The message is complete."""
        exchange = self._queue[-1]
        exchange.keep_alive = self._parser.should_keep_alive()
        exchange.complete = True

    # The exchange at the head of the queue.

    def _advance(self) -> None:
        if not self._queue or not self._queue[0].head_done or self._connecting is not None:
            return
        exchange = self._queue[0]
        if exchange.upstream is not None:
            self._stream(exchange)
            return
        if not exchange.head and not self._routed(exchange):
            return
        upstream = self._pool.take(exchange.instance)
        if upstream is None:
            self._connecting = asyncio.ensure_future(self._connect(exchange))
        else:
            self._begin(exchange, upstream)

    def _routed(self, exchange: Exchange) -> bool:
        """Find where it goes; answer it here and now if nowhere."""
        if exchange.refusal:
            self._reply(exchange, exchange.refusal, "this request is not one that can be served")
            return False
        route = self._routes.find(exchange.host, exchange.target)
        if route.status:
            self._reply(exchange, route.status, route.why)
            return False
        exchange.instance = route.instance
        lines = [exchange.method, b" ", route.target, b" HTTP/1.1\r\n", *exchange.fields]
        if route.prefix:
            lines.append(b"x-forwarded-prefix: " + route.prefix + b"\r\n")
        if exchange.chunked:
            lines.append(b"transfer-encoding: chunked\r\n")
        elif exchange.length is not None:
            lines.append(b"content-length: " + exchange.length + b"\r\n")
        exchange.head = b"".join([*lines, b"\r\n"])
        return True

    async def _connect(self, exchange: Exchange) -> None:
        try:
            upstream = await self._pool.connect(exchange.instance)
        except OSError:
            self._connecting = None
            if self._queue and self._queue[0] is exchange:
                self._reply(exchange, 502, f"{exchange.instance} does not answer")
            return
        self._connecting = None
        if self._queue and self._queue[0] is exchange:
            self._begin(exchange, upstream)
        else:
            self._pool.give(upstream)

    def _begin(self, exchange: Exchange, upstream: Upstream) -> None:
        exchange.upstream = upstream
        upstream.begin(self, exchange)
        self._stream(exchange)

    def _stream(self, exchange: Exchange) -> None:
        """Pass on what has come of the body."""
        upstream = exchange.upstream
        assert upstream is not None
        while exchange.body:
            chunk = exchange.body.popleft()
            exchange.sent_body = True
            upstream.write(b"%x\r\n%b\r\n" % (len(chunk), chunk) if exchange.chunked else chunk)
        if exchange.complete and exchange.chunked:
            upstream.write(b"0\r\n\r\n")
            exchange.chunked = False
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
        if self._queue and self._queue[0].upstream is not None:
            self._queue[0].upstream.pause()

    def resume_writing(self) -> None:
        """There is room to send again."""
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
        self.send(connection.note(status, why, head=exchange.method == b"HEAD", keep_alive=keep_alive))
        self._next(exchange)

    def _next(self, exchange: Exchange) -> None:
        self._queue.popleft()
        if not exchange.keep_alive or not exchange.complete:
            self._closing = True
            self._transport.close()
            return
        if self._closing and not self._queue:
            self._transport.close()
            return
        self.resume_client()
        if self._queue:
            self._advance()

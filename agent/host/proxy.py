"""Proxying HTTP/1.1 between the board's clients and instances' Unix sockets. No policy: `Routes` says what goes where.

A request is read by its head and streamed on; its answer goes back as the bytes it is, parsed only to find its end. A
request without a body that comes again byte by byte, as a client's mostly do, is not read again: between two messages,
the same bytes mean the same (`Known`). What it goes on is `upstream`'s business.
"""

import asyncio
import contextlib
import time
from collections import deque
from typing import Any, Final

from agent.host import connection
from agent.host.forward import Known, forwarded
from agent.host.reader import Fields, Head, Reader
from agent.host.routes import Routes
from agent.host.upstream import READ_BYTES, Exchange, Pool, Upstream

_KNOWN_MAX: Final = 128
_KNOWN_MAX_BYTES: Final = 2048
_LINGER_S: Final = 5  # for so long it is read what a client sends after an answer that refused it
_LINGER_MAX_BYTES: Final = 32 * 1024 * 1024


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
        self._closing = False  # it sends nothing more that is read
        self._over = False  # it gets nothing more
        self._discarded = 0

    # The client's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self._transport = transport
        transport.max_size = READ_BYTES  # type: ignore[attr-defined]
        self._all.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The other side is gone."""
        del exc
        self._all.discard(self)
        self._closing = self._over = True
        for exchange in self._queue:
            if exchange.upstream is not None:
                exchange.upstream.drop()
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
                broken.upstream.drop()
            if broken.answering:
                self._transport.abort()
                return
        exchange = Exchange(Head())
        exchange.refusal, exchange.keep_alive, exchange.complete = status, False, True
        self._queue.append(exchange)

    # The exchange at the head of the queue.

    def _advance(self) -> None:
        """Carry on with the exchange at the head of the queue; what is answered here, is at once."""
        while self._queue and not self._over:
            exchange = self._queue[0]
            if exchange.upstream is None:
                if not exchange.head and not self._routed(exchange):
                    continue
                if not self._reach(exchange):
                    continue
            self._stream(exchange)
            return

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

    def _reach(self, exchange: Exchange) -> bool:
        """Find what it goes on; answer it here and now if there is nothing."""
        try:
            upstream = self._pool.take(exchange) or self._pool.connect(exchange.instance)
        except BlockingIOError:
            self._reply(exchange, 503, f"{exchange.instance} has too many clients who wait")
            return False
        except OSError:
            self._reply(exchange, 502, f"{exchange.instance} does not answer")
            return False
        self._begin(exchange, upstream)
        return True

    def _begin(self, exchange: Exchange, upstream: Upstream) -> None:
        exchange.upstream = upstream
        if exchange.request.expects and not exchange.complete and not exchange.body:
            self._transport.write(connection.CONTINUE)
        upstream.begin(self, exchange)
        if self._full:
            upstream.pause()
        else:
            upstream.resume()  # it may have been left paused at the end of an answer that piled up

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
        self._advance()

    def upstream_failed(self, exchange: Exchange) -> None:
        """The instance hung up before its answer was complete."""
        exchange.upstream = None
        if not self._queue or self._queue[0] is not exchange:
            return
        if exchange.answering:
            self._transport.abort()
        elif exchange.repeatable:
            exchange.retried = True
            self._advance()
        else:
            self._reply(exchange, 502, f"{exchange.instance} ended before it answered")
            self._advance()

    def _reply(self, exchange: Exchange, status: int, why: str) -> None:
        keep_alive = exchange.keep_alive and exchange.complete
        exchange.keep_alive = keep_alive
        self.send(connection.note(status, why, head=exchange.request.method == b"HEAD", keep_alive=keep_alive))
        self._next(exchange)

    def _next(self, exchange: Exchange) -> None:
        self._queue.popleft()
        if not exchange.keep_alive or not exchange.complete:
            self._closing = self._over = True
            if exchange.complete and not self._reader.refused:
                self._transport.close()
            else:
                self._linger()
            return
        if self._closing and not self._queue:
            self._transport.close()
            return
        self.resume_client()

    def _linger(self) -> None:
        """It has its answer and may still be sending: to close now would make its kernel throw the answer away."""
        if self._transport.can_write_eof() and not self._transport.is_closing():
            with contextlib.suppress(OSError):  # it has hung up meanwhile
                self._transport.write_eof()
            if self._paused:
                self._transport.resume_reading()
            asyncio.get_running_loop().call_later(_LINGER_S, self._transport.abort)

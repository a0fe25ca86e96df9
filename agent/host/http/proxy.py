"""Client and instance connections of the router.

HTTP/1.1 is proxied between the device's clients and the Unix sockets of instances. No policy: `RouteTable` decides
where a request goes.

The head of a request is parsed, its body streamed. The response is passed on byte for byte, parsed only to find its
end. A request without a body whose bytes were seen before is not parsed again: between two messages, equal bytes mean
the same (`Known`).

Each exchange takes an upstream connection of its own. The connection waits at the instance's listener for an idle
worker, so the death of a worker that has not accepted it does no harm. When the response is complete, the connection
may be kept for another exchange. A kept connection belongs to one worker, which may end at any moment, so only requests
that may be sent twice go there: of idempotent methods, complete and without a body. If the instance hangs up before
the first byte of its response, the request is sent again, once, on a new connection (RFC 9110, section 9.2.2). At a
swap, workers hand kept connections to the next generation.

A connection is kept only if nothing is left in it: the request was sent whole, the response ended where the bytes did,
and neither side has begun to close. The same is checked again before it is reused: by then the kernel may know of an
end or of unexpected bytes, and the event loop may have decided to close it.
"""

import asyncio
import contextlib
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import httptools

from agent.host.http import connection
from agent.host.http.call import Call
from agent.host.http.channel import InstanceCalls
from agent.host.http.exchange import Asker, Exchange, Upstream
from agent.host.http.pace import Pace, acknowledged
from agent.host.http.parser import Fields, RequestHead, RequestParser
from agent.host.http.routing import (
    Known,
    OwnRoute,
    Peer,
    Route,
    RouteTable,
    forwarded_head,
    guest_head,
    plain_address,
)
from agent.host.http.turns import PIECES_A_TURN, Refusals
from fleet.protocol.codes import CallOutcome

KEPT_MAX: Final = 4
"""Connections of one instance; few, since a slot in a shared worker takes few in all, and these must not be all."""

KEPT_IN_ALL_MAX: Final = 256
KEPT_S: Final = 60
READ_BYTES: Final = 64 * 1024  # at once: beyond 128 KiB each read would map memory and give it back
_HIGH_BYTES: Final = 256 * 1024
_SHORT_S: Final = 0.1
"""Time in which a worker may end by accident: a request that it had read for longer is not sent to another."""


class UpstreamPool:
    """Kept connections by instance, how to make more, and what is known of requests to instances."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self.calls: dict[str, InstanceCalls] = {}  # instances whose workers have channels
        self.refusals = Refusals()
        self.known: dict[bytes, Known] = {}  # until an instance comes, goes, or answers no longer
        self.spread: set[str] = set()  # of several workers: a kept connection would wait for one of them
        self._kept: dict[str, list[UpstreamConnection]] = {}
        self._count = 0

    def take(self, exchange: Exchange) -> "UpstreamConnection | None":
        """Return the kept connection used last; None if the exchange needs a new one."""
        kept = self._kept.get(exchange.instance)
        while kept and exchange.light:
            upstream = kept.pop()
            self._count -= 1
            if upstream.open:
                return upstream
            upstream.close()
        return None

    def give(self, upstream: "UpstreamConnection") -> None:
        """Keep this connection, if there is room."""
        kept = self._kept.setdefault(upstream.instance, [])
        full = len(kept) >= KEPT_MAX or self._count >= KEPT_IN_ALL_MAX
        if full or not upstream.open or upstream.instance in self.spread:
            upstream.close()
            return
        upstream.kept_s = time.monotonic()
        kept.append(upstream)
        self._count += 1

    def connect(self, instance: str) -> "UpstreamConnection":
        """Open a new connection, which may still have to wait for its worker. Raises OSError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            sock.connect(f"{self._directory}/{instance}")
        except OSError:
            sock.close()
            raise
        return UpstreamConnection(self, instance, sock)

    def forget(self, instance: str) -> None:
        """Close the kept connections of an instance that is gone or has several workers now."""
        for upstream in self._kept.pop(instance, []):
            self._count -= 1
            upstream.close()

    def sweep(self) -> None:
        """Close connections not used for long: each takes a client's place in its worker."""
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


class HttpUpstream:
    """Request's body in HTTP/1.1, by its own framing."""

    exchange: Exchange | None = None

    def write(self, data: bytes) -> None:
        """Send bytes to the instance."""
        raise NotImplementedError

    def send_body(self, data: bytes) -> None:
        """Send a piece of the request's body."""
        assert self.exchange is not None
        self.write(b"%x\r\n%b\r\n" % (len(data), data) if self.exchange.request.chunked else data)

    def end_body(self, trailers: Fields) -> None:
        """Send the end of the request's body."""
        assert self.exchange is not None
        if self.exchange.request.chunked:
            self.write(b"0\r\n%b\r\n" % connection.lines(trailers))


class UpstreamConnection(HttpUpstream, asyncio.Protocol):
    """Connection to an instance."""

    def __init__(self, pool: UpstreamPool, instance: str, sock: socket.socket) -> None:
        self.instance = instance
        self.lost = False
        self.kept_s = 0.0
        self.client: Asker | None = None
        self.exchange: Exchange | None = None
        self._pool = pool
        self._sock = sock
        self._parser: Any = None
        self._head_done = self._done = self._reusable = self._more = False
        self._begun_s = 0.0
        loop = asyncio.get_running_loop()
        self._transport: Any = loop._make_socket_transport(sock, self)  # type: ignore[attr-defined]  # noqa: SLF001 - there at once, without a task
        self._transport.max_size = READ_BYTES

    def begin(self, client: Asker, exchange: Exchange) -> None:
        """Carry this exchange."""
        self.client, self.exchange = client, exchange
        self._parser = httptools.HttpResponseParser(self)
        self._head_done = self._done = self._reusable = self._more = False
        self._begun_s = time.monotonic()
        self._transport.write(exchange.head)

    def write(self, data: bytes) -> None:
        """Send bytes to the instance."""
        self._transport.write(data)

    @property
    def open(self) -> bool:
        """True if the connection is fit for another exchange, as far as event loop and kernel know now."""
        if self.lost or self._transport.is_closing() or self._transport.get_write_buffer_size():
            return False
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False  # the end of the stream, or unexpected bytes

    @property
    def full(self) -> bool:
        """True if more bytes wait to be sent than the client should add to."""
        return bool(self._transport.get_write_buffer_size() > _HIGH_BYTES)

    def pause(self) -> None:
        """Read no further for now."""
        self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if not self.lost:
            self._transport.resume_reading()

    def resume_writing(self) -> None:
        """Let the client send on: there is room again."""
        if self.client is not None:
            self.client.resume_client()

    def data_received(self, data: bytes) -> None:
        """Take bytes of the response."""
        client, exchange = self.client, self.exchange
        if client is None or exchange is None:
            self.close()  # bytes without a request
            return
        exchange.answering = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._done = self._more = True
        except httptools.HttpParserError:
            self._more = True
        if self._more:  # else its rest would be taken for the response to the client's next request
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
        """Begin a message."""
        self._more = self._done

    def on_headers_complete(self) -> None:
        """Take the head, which is complete."""
        assert self.exchange is not None
        self._head_done = True
        self._reusable = self._parser.should_keep_alive()
        if self.exchange.request.method == b"HEAD" or self._parser.get_status_code() in connection.BODILESS:
            self._done = True

    def on_body(self, _body: bytes) -> None:
        """Take note of a piece of the body."""
        self._more = self._more or self._done

    def on_message_complete(self) -> None:
        """End the message."""
        self._done = True

    def connection_lost(self, exc: Exception | None) -> None:
        """End the exchange under way: the instance hung up."""
        self.lost = True
        client, exchange = self.client, self.exchange
        self.client = self.exchange = None
        if client is None or exchange is None:
            return
        if self._head_done and exchange.request.old:
            exchange.keep_alive = False  # HTTP/1.0: an answer without a length ends with the connection
            client.answered(exchange)
        else:
            # A worker that ends with the request unread resets the connection; without that, the guest had begun.
            begun = exc is None and time.monotonic() - self._begun_s > _SHORT_S
            exchange.retried = exchange.retried or begun
            client.upstream_failed(exchange)

    def drop(self) -> None:
        """Hang up without telling the client, which wants the response no more."""
        self.client = self.exchange = None
        self.close()

    def close(self) -> None:
        """Hang up."""
        self.lost = True
        self._transport.abort()


_KNOWN_MAX: Final = 128
_KNOWN_MAX_BYTES: Final = 2048
_LINGER_S: Final = 5  # time for which bytes after a refusal are read and discarded
_LINGER_MAX_BYTES: Final = 32 * 1024 * 1024


class Clients(set["ClientConnection"]):
    """Clients of a port.

    Attributes:
        left: called after a client has left.
    """

    def __init__(self, left: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.left = left

    def discard(self, client: object) -> None:
        """Forget a client that has gone."""
        super().discard(client)
        self.left()

    def may_wait(self, waiting: int) -> bool:
        """Return whether another client may wait for an instance for which `waiting` of them do."""
        del waiting
        return True


class ClientConnection(asyncio.Protocol):
    """Connection of a client of the device."""

    def __init__(
        self,
        routes: RouteTable | OwnRoute,
        pool: UpstreamPool,
        all_clients: Clients,
        peer: Peer | None = None,
        *,
        is_trusted: bool = False,
    ) -> None:
        """`is_trusted`: a neighbour on the device, which is not timed."""
        self._peer = peer
        self.last_s = time.monotonic()
        self.is_trusted = is_trusted
        self._routes = routes
        self._known = routes.known if isinstance(routes, OwnRoute) else pool.known
        self._pool = pool
        self._all = all_clients
        self._transport: Any = None
        self._reader = RequestParser(self, spare=True)
        self._rest = b""  # read, and not parsed yet: requests behind those in the queue
        self._reads_on = False
        self._was_refused = self._awaits_turn = False  # see `Refusals`
        self._queue: deque[Exchange] = deque()
        self._paused = False
        self._full = False
        self._closing = False  # nothing more is read from the client
        self._over = False  # nothing more is sent to the client
        self._discarded = 0
        self._turn = 0  # of the client's: it has ended a request, or may send again
        self._received = self._sent = 0
        self._sending, self._reading = Pace(), Pace()

    # The client's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Register the connection."""
        self._transport = transport
        transport.max_size = READ_BYTES  # type: ignore[attr-defined]
        self._all.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Drop all exchanges: the client hung up."""
        del exc
        self._all.discard(self)
        self._closing = self._over = True
        for exchange in self._queue:
            if exchange.upstream is not None:
                exchange.upstream.drop()
        self._queue.clear()

    @property
    def idle(self) -> bool:
        """True between requests."""
        return not self._queue

    @property
    def is_between_requests(self) -> bool:
        """True while nothing has come of a next request."""
        return not (self._queue or self._reader.within or self._rest)

    @property
    def waits_for_guest(self) -> bool:
        """True while its request is in a call, which has limits of its own, or waits for one: nothing of it is read."""
        is_call = bool(self._queue) and isinstance(self._queue[0].upstream, Call)
        return is_call and (self._queue[0].complete or self._paused)

    def close(self) -> None:
        """Hang up."""
        self._transport.abort()

    def mind_pace(self, now_s: float) -> None:
        """End a connection whose client sends or reads too slowly."""
        is_reading = self._transport.get_write_buffer_size() > 0
        if self._reading.is_slow(now_s, self._taken() if is_reading else 0, 0 if is_reading else None):
            self._leave_slow()
            self.close()
            return
        is_sending = self._reader.within and not (self._paused or self._closing)
        lacks = is_sending and (not self._queue or not self._queue[0].complete)
        if self._sending.is_slow(now_s, self._received, self._turn if lacks else None):
            self._leave_slow()
            self._reader.give_up(408)
            self._advance()

    def _taken(self) -> int:
        """Return how much the client has taken so far; only differences mean anything."""
        sock = self._transport.get_extra_info("socket")
        unsent: int = self._transport.get_write_buffer_size()
        return self._sent - unsent + acknowledged(sock)

    @property
    def moved(self) -> int:
        """A number that grows with each byte that the client sends or takes."""
        return self._received + self._taken()

    def _leave_slow(self) -> None:
        """End the call under way, if there is one, as its client's doing."""
        if self._queue and isinstance(call := self._queue[0].upstream, Call):
            call.drop_slow()

    def end_when_idle(self) -> None:
        """Answer what was asked, then hang up."""
        if self.idle:
            self._transport.close()
        else:
            self._queue[-1].keep_alive = False

    def data_received(self, data: bytes) -> None:
        """Take bytes of requests."""
        self._received += len(data)
        if self._closing:
            self._discarded += len(data)
            if self._discarded > _LINGER_MAX_BYTES:
                self._transport.abort()
            return
        self._parse(self._rest + data if self._rest else data)

    def _parse(self, data: bytes) -> None:
        """Read what has come of requests, as far as the second of them."""
        self._rest = b""
        begins = not (self._queue or self._reader.within)
        if begins and not self._routes.forwarding.by_client and (known := self._known.get(data)) is not None:
            exchange = Exchange(known.request)
            exchange.complete, exchange.instance, exchange.head = True, known.instance, known.head
            self._queue.append(exchange)
        else:
            rest = self._feed(data)
            if begins and not rest:
                self._learn(data)
            self._rest = b"" if self._closing else rest
        if (len(self._queue) > 1 or self._rest) and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        if self._queue or self._reader.within:  # empty lines between requests do not keep a connection
            self.last_s = time.monotonic()
        self._advance()
        if self._rest:
            self.resume_client()

    def _feed(self, data: bytes) -> bytes:
        """Parse request by request, and return what is left for a later turn."""
        for _ in range(PIECES_A_TURN):
            if not data or len(self._queue) > 1 or self._closing:
                break
            size = self._piece_bytes(data)
            self._reader.feed(data[:size])
            data = data[size:]
        return data

    def _piece_bytes(self, data: bytes) -> int:
        """Return how many of these bytes are of one request: an empty line ends a head, and a body in chunks."""
        exchange = self._queue[-1] if self._queue else None
        if exchange is not None and not exchange.complete and exchange.request.length is not None:
            return exchange.request.length - exchange.received
        end = data.find(b"\r\n\r\n")
        return len(data) if end < 0 else end + 4

    def _parse_rest(self) -> None:
        self._reads_on = False
        if not self._closing:
            self._parse(self._rest)
            self.resume_client()

    def _learn(self, data: bytes) -> None:
        """Remember these bytes, which came between two messages, if they are one whole request without a body."""
        if len(self._queue) != 1 or self._reader.within or len(data) > _KNOWN_MAX_BYTES:
            return
        exchange = self._queue[0]
        request = exchange.request
        whole = exchange.complete and exchange.keep_alive and not exchange.refusal
        whole = whole and not self._routes.forwarding.by_client
        if not whole or request.chunked or request.length is not None or request.expects:
            return
        route = self._routes.route(request)
        if not route.status:
            if len(self._known) >= _KNOWN_MAX:
                self._known.clear()
            exchange.instance, exchange.head = route.instance, self._head(request, route)
            self._known[data] = Known(request, exchange.instance, exchange.head)

    def eof_received(self) -> bool:
        """Keep the connection until complete requests are answered: the client sends no more."""
        if not self._queue or not self._queue[-1].complete:
            return False
        self._closing = True
        return True

    # Called by the parser.

    def head(self, head: RequestHead) -> None:
        """Begin an exchange."""
        self._queue.append(Exchange(head))

    def body(self, data: bytes) -> None:
        """Add a piece of the request's body."""
        exchange = self._queue[-1]
        exchange.body.append(data)
        exchange.received += len(data)
        if exchange.request_max is not None and exchange.received > exchange.request_max:
            self._reader.refuse(413)

    def end(self, trailers: Fields, *, keep_alive: bool) -> None:
        """End the request, which is complete."""
        exchange = self._queue[-1]
        exchange.trailers = trailers
        exchange.keep_alive = exchange.keep_alive and keep_alive  # a head may have said already that it ends
        exchange.complete = True
        self._turn += 1

    def refused(self, status: int) -> None:
        """Queue a refusal behind the requests before it; the connection ends with it."""
        self._closing = True
        if self._queue and not self._queue[-1].complete:
            broken = self._queue.pop()
            if broken.upstream is not None:
                broken.upstream.drop()
            if broken.answering:
                self._transport.abort()
                return
        exchange = Exchange(RequestHead())
        exchange.refusal, exchange.keep_alive, exchange.complete = status, False, True
        self._queue.append(exchange)

    # The exchange at the head of the queue.

    def _advance(self) -> None:
        """Carry on with the exchange at the head of the queue; responses of the router's own are sent at once."""
        while self._queue and not (self._over or self._awaits_turn):
            exchange = self._queue[0]
            if exchange.upstream is None:
                if self._was_refused and not self._pool.refusals.take(self._take_turn):
                    self._awaits_turn = True
                    return
                if not exchange.head and not self._routed(exchange):
                    continue
                if not self._reach(exchange):
                    continue
            self._stream(exchange)
            return

    def _take_turn(self) -> None:
        self._awaits_turn = False
        self._advance()

    def _routed(self, exchange: Exchange) -> bool:
        """Find the instance; send a refusal if there is none."""
        if exchange.refusal:
            self._reply(exchange, exchange.refusal, connection.REFUSALS[exchange.refusal])
            return False
        request = exchange.request
        route = self._routes.route(request)
        if route.status:
            self._reply(exchange, route.status, route.why)
            return False
        if route.request_max is not None and exchange.received > route.request_max:
            self._reply(exchange, 413, connection.REFUSALS[413])
            return False
        exchange.instance, exchange.request_max = route.instance, route.request_max
        exchange.head = self._head(request, route)
        return True

    def _head(self, request: RequestHead, route: Route) -> bytes:
        """Return the head in the form in which the instance gets requests, with what it is told of this client."""
        if self._peer is None and self._routes.forwarding.by_client:
            name = self._transport.get_extra_info("peername")
            self._peer = Peer(plain_address(name[0]) if name else "")
        write_head = guest_head if route.instance in self._pool.calls else forwarded_head
        return write_head(request, route, self._routes.forwarding, self._peer)

    def _reach(self, exchange: Exchange) -> bool:
        """Find an upstream connection; send a refusal if there is none."""
        calls = self._pool.calls.get(exchange.instance)
        if calls is not None:
            return self._call(exchange, calls)
        try:
            upstream = self._pool.take(exchange) or self._pool.connect(exchange.instance)
        except BlockingIOError:
            self._reply(exchange, 503, f"{exchange.instance} has too many clients who wait")
            return False
        except OSError:
            self._reply(exchange, 502, f"{exchange.instance} does not answer")
            return False
        self._continue(exchange)
        exchange.upstream = upstream
        upstream.begin(self, exchange)
        self._pace(upstream)
        return True

    def _call(self, exchange: Exchange, calls: InstanceCalls) -> bool:
        """Make a call to a worker that has a channel."""
        most = calls.request_max
        if most is not None and (exchange.request.length or 0) > most:
            calls.count(CallOutcome.HOST_ERROR)
            exchange.keep_alive = False
            self._reply(exchange, 413, connection.REFUSALS[413])
            return False
        if not self._all.may_wait(calls.waiting):
            exchange.keep_alive = False
            self._reply(exchange, 503, f"{exchange.instance} has too many clients who wait")
            return False
        self._continue(exchange)
        call = calls.call(self, exchange)
        exchange.upstream = call
        self._was_refused = False
        self._pace(call)
        return True

    def _continue(self, exchange: Exchange) -> None:
        """Have a client send its body that asks first."""
        if exchange.request.expects and not exchange.complete and not exchange.body:
            self._transport.write(connection.CONTINUE)

    def _pace(self, upstream: Upstream) -> None:
        if self._full:
            upstream.pause()
        else:
            upstream.resume()  # a response that piled up may have left it paused

    def _stream(self, exchange: Exchange) -> None:
        """Pass on the body as far as it was received."""
        upstream = exchange.upstream
        assert upstream is not None
        if exchange.body:
            exchange.sent_body = True
            data = exchange.body[0] if len(exchange.body) == 1 else b"".join(exchange.body)
            exchange.body.clear()
            upstream.send_body(data)
        if exchange.complete and not exchange.ended and exchange.upstream is upstream:
            exchange.ended = True
            exchange.sent_body = exchange.sent_body or exchange.request.chunked
            upstream.end_body(exchange.trailers)
        if exchange.upstream is upstream and upstream.full and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def resume_client(self) -> None:
        """Read on from the client: the instance takes more."""
        if not self._paused or len(self._queue) > 1 or self._closing:
            return
        if not self._rest:
            self._paused = False
            self._turn += 1
            self._transport.resume_reading()
        elif not self._reads_on:
            self._reads_on = True
            asyncio.get_running_loop().call_soon(self._parse_rest)

    # Answers.

    def send(self, data: bytes) -> None:
        """Send bytes of the response."""
        self.last_s = time.monotonic()
        self._sent += len(data)
        self._transport.write(data)

    def pause_writing(self) -> None:
        """Stop reading the response: the client does not keep up."""
        self._full = True
        if self._queue and self._queue[0].upstream is not None:
            self._queue[0].upstream.pause()

    def resume_writing(self) -> None:
        """Let the instance send on: there is room again."""
        self._full = False
        self.last_s = time.monotonic()
        if self._queue and self._queue[0].upstream is not None:
            self._queue[0].upstream.resume()

    def answered(self, exchange: Exchange) -> None:
        """Go on to the next exchange: the response is complete."""
        exchange.upstream = None
        self._next(exchange)
        self._advance()

    def upstream_failed(self, exchange: Exchange) -> None:
        """Retry or fail the exchange: the instance hung up before its response was complete."""
        exchange.upstream = None
        if not self._queue or self._queue[0] is not exchange:
            return
        if exchange.answering:
            self._transport.abort()
        elif exchange.repeatable:
            exchange.retried = True
            exchange.ended, exchange.head = False, b""  # there may be another way to it by now
            self._advance()
        else:
            self._reply(exchange, 502, f"{exchange.instance} ended before it answered")
            self._advance()

    def reply(self, exchange: Exchange, status: int, why: str) -> None:
        """Answer with a sentence in place of the instance."""
        exchange.upstream = None
        if self._queue and self._queue[0] is exchange:
            self._reply(exchange, status, why)
            self._advance()

    def finish(self, exchange: Exchange, data: bytes) -> None:
        """Send the rest of the answer, which is then complete."""
        if data:
            self.send(data)
        self.answered(exchange)

    def cut(self, exchange: Exchange, data: bytes = b"") -> None:
        """Send `data` and end the connection within the answer."""
        exchange.upstream = None
        if data:
            self.send(data)
        self._closing = self._over = True
        self._transport.close()

    def _reply(self, exchange: Exchange, status: int, why: str) -> None:
        keep_alive, request = exchange.keep_alive and exchange.complete, exchange.request
        exchange.keep_alive = keep_alive
        self._was_refused = True
        head = request.method == b"HEAD"
        self.send(connection.note(status, why, head=head, keep_alive=keep_alive, old=request.old))
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
        """Close in two steps: a client that still sends would lose the response to a reset (RFC 9112, section 9.6)."""
        if self._transport.can_write_eof() and not self._transport.is_closing():
            with contextlib.suppress(OSError):  # the client has hung up meanwhile
                self._transport.write_eof()
            if self._paused:
                self._transport.resume_reading()
            asyncio.get_running_loop().call_later(_LINGER_S, self._transport.abort)

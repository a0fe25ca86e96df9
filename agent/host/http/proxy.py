"""Connections of the router's clients: HTTP/1.1 in, calls to instances out. No policy: `RouteTable` decides.

A request without a body whose bytes were seen before is not parsed again: between two messages, equal bytes mean the
same (`Known`). If a worker ends before the first byte of its answer, the request is sent again, once, if its method is
idempotent and all of it is still here (RFC 9110, section 9.2.2).
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from agent.host.http import connection
from agent.host.http.call import LARGE_REQUEST
from agent.host.http.channel import InstanceCalls
from agent.host.http.exchange import Exchange, Upstream
from agent.host.http.pace import Pace, acknowledged
from agent.host.http.parser import Fields, RequestHead, RequestParser
from agent.host.http.routing import (
    Known,
    OwnRoute,
    Peer,
    Route,
    RouteTable,
    guest_head,
    plain_address,
)
from agent.host.http.turns import PIECES_A_TURN, Refusals
from fleet.protocol.codes import CallOutcome

READ_BYTES: Final = 64 * 1024  # at once: beyond 128 KiB each read would map memory and give it back


class Instances:
    """Instances that take calls, what is known of requests to them, and answers of the router's own."""

    def __init__(self) -> None:
        self.calls: dict[str, InstanceCalls] = {}
        self.refusals = Refusals()
        self.known: dict[bytes, Known] = {}  # until an instance comes, goes, or answers no longer


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
        instances: Instances,
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
        self._known = routes.known if isinstance(routes, OwnRoute) else instances.known
        self._instances = instances
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
        is_call = bool(self._queue) and self._queue[0].upstream is not None
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
        if is_reading:
            self.last_s = now_s  # an answer may take as long as this pace allows
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
        if self._queue and (call := self._queue[0].upstream) is not None:
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
        if len(self._queue) > 1 or self._rest:
            self._pause_client()
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
                if not self._may_begin():
                    self._pause_client()
                    return
                if not exchange.head and not self._routed(exchange):
                    continue
                if not self._reach(exchange):
                    continue
            self._stream(exchange)
            return

    def _may_begin(self) -> bool:
        """Return whether an exchange may begin; if not, `_advance` is called when it may."""
        if self._full:  # the client has answers to read
            return False
        if self._was_refused and not self._instances.refusals.take(self._take_turn):
            self._awaits_turn = True
            return False
        return True

    def _take_turn(self) -> None:
        self._awaits_turn = False
        self._advance()
        self.resume_client()

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
        return guest_head(request, route, self._routes.forwarding, self._peer)

    def _reach(self, exchange: Exchange) -> bool:
        """Make a call; send a refusal if there can be none."""
        calls = self._instances.calls.get(exchange.instance)
        if calls is None:
            self._reply(exchange, 503, f"{exchange.instance} is not answering at present; try again in a little while")
            return False
        return self._call(exchange, calls)

    def _call(self, exchange: Exchange, calls: InstanceCalls) -> bool:
        """Make a call."""
        most = calls.request_max
        if most is not None and (exchange.request.length or 0) > most:
            calls.count(CallOutcome.HOST_ERROR)
            calls.note(LARGE_REQUEST.format(most))
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
        if exchange.upstream is upstream and upstream.full:
            self._pause_client()

    def resume_client(self) -> None:
        """Read on from the client, unless it is ahead of its instance."""
        if not self._paused or len(self._queue) > 1 or self._closing or self._is_ahead:
            return
        if not self._rest:
            self._paused = False
            self._turn += 1
            self._transport.resume_reading()
        elif not self._reads_on:
            self._reads_on = True
            asyncio.get_running_loop().call_soon(self._parse_rest)

    @property
    def _is_ahead(self) -> bool:
        """True while the request may not begin, or more of its body is here than its guest takes."""
        if not self._queue:
            return False
        upstream = self._queue[0].upstream
        return self._full or self._awaits_turn if upstream is None else upstream.full

    def _pause_client(self) -> None:
        if not self._paused:
            self._paused = True
            self._transport.pause_reading()

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
        else:
            self._advance()
            self.resume_client()

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

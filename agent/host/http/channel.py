"""Calls of instances over channels: which worker takes a call, and an exchange with its guest in frames.

A worker runs one call at a time. `InstanceCalls` gives each call to a worker that has none, or else lets it wait; a few
calls whose request is whole and small are written ahead into the channel of an instance with a single worker, which
saves a wake-up for each. A call that was written ahead begins when the one before it ends.

Bodies flow both ways by credit: each side may send `INITIAL_CREDIT_BYTES` of a call's body at once, and then as much as
the other side has asked for. So neither a slow client nor a slow guest makes anything pile up here.

The answer of a guest goes out as the guest flushes it. What has come whole by the time that it is read here goes out
with its length; else it goes out in chunks, unless the guest said the length.

After a trap, the worker goes on with a new store and does not know where in the stream that one stopped. It sends a
token, which is sent back to it, and then every call that had not begun (`Kind.FAILED`).

A call that was reported as long may be interrupted, and the interrupt may come when the call has just ended. So nothing
is written behind a reported call, and after its end the worker leaves its loop once before it gets another: there it
reads what was sent to it, and knows that the call has ended. A call that had been written ahead before the report can
still be hit by such an interrupt. It is sent again, which is safe, as only idempotent requests are written ahead.
"""

import asyncio
import contextlib
import math
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from agent.host.http import connection
from agent.host.http.connection import BadAnswerError
from agent.host.http.exchange import Asker, Exchange
from agent.host.http.parser import Fields, tokens
from agent.host.ipc import heads
from agent.host.ipc.frames import (
    FROM_GUEST,
    INITIAL_CREDIT_BYTES,
    PAYLOAD_MAX_BYTES,
    TOKEN_BYTES,
    Frame,
    FrameDecoder,
    FrameError,
    Kind,
    encode,
    encode_body,
)
from agent.host.ipc.helper_api import (
    LONG_CALL_S,
    CallAbandoned,
    ChannelBroken,
    ChannelDrained,
    ChannelNote,
    FromRouter,
    LongCall,
)
from agent.host.ipc.stats_page import CallPage
from agent.host.ipc.worker_api import TokenBucket
from fleet.protocol.codes import CallOutcome
from fleet.protocol.manifest import Limits

WAITING_MAX: Final = 1024
"""Calls of an instance that wait for a worker; as many clients wait at the listener of a worker (`BACKLOG`)."""

AHEAD_MAX: Final = 4
"""Calls in one channel, the one that runs included (decision 15)."""

AHEAD_MAX_BYTES: Final = 16 * 1024

_READ_BYTES: Final = 128 * 1024
_CREDIT_STEP_BYTES: Final = 16 * 1024  # credit in smaller steps would cost a frame for each small body
_CREDIT: Final = struct.Struct("<I")
_ABANDON_S: Final = 0.1  # from CANCEL, which ends a guest that waits, to the interrupt, which ends one that computes
_TOTAL_MARGIN_S: Final = 0.25  # a call that its client delays ends before the supervisor would blame the guest
_CLIENT_SHARE: Final = 0.25  # of limits.total: a client that took as much is the cause, not the guest
_NOTES_A_MINUTE: Final = 60
_FIRST_FLUSH_S: Final = 0.002  # most answers are whole by then, and go out with their length in one piece
_QUEUE_SAID_EVERY_S: Final = 60
_QUEUED: Final = "host: requests wait for one that takes long: limits.concurrency allows {} at a time"
_SERVER_ERROR: Final = 500


class Reports(Protocol):
    """Receiver of what the supervisor is to know."""

    def report(self, message: FromRouter) -> None:
        """Send a message to the supervisor."""


class Settled(NamedTuple):
    """End of a call: how it counts, and what remains to be done for its client."""

    outcome: CallOutcome
    error: bool
    deliver: Callable[[], None]


def _nothing() -> None:
    """Do nothing: there is no client any more."""


class Call:
    """Request of a client on its way to a guest, and the answer on its way back.

    Attributes:
        number: of the call in its channel; 0 until it is in one.
        channel: the channel that it is in, or None.
    """

    def __init__(self, calls: "InstanceCalls", client: Asker, exchange: Exchange) -> None:
        self.number = 0
        self.channel: Channel | None = None
        self.began_ns = 0
        self._calls = calls
        self._client: Asker | None = client
        self._exchange = exchange
        self._submitted = False
        self._abandoned: CallOutcome | None = None
        # Request.
        self._body: deque[bytes] = deque()
        self._pending_bytes = self._body_bytes = 0
        self._ended = self._end_sent = False
        self._trailers = b""
        self._credit = INITIAL_CREDIT_BYTES
        self._sent: list[bytes] | None = []  # pieces of a small body, to send them again
        # Answer.
        self._status = 0
        self._fields = b""
        self._length: int | None = None
        self._out: list[bytes] = []
        self._spool_bytes = self._sent_bytes = self._owed = 0
        self._answering = False
        self._begun = False
        self._problem = ""
        self._sentence = BadAnswerError("").sentence  # of the problem, for the client
        # The client.
        self._paused = False
        self._waits_since_s: float | None = None
        self._waited_s = 0.0
        self._moved = 0
        self._timer: asyncio.TimerHandle | None = None
        self._flush_timer: asyncio.TimerHandle | None = None

    # Calls of the client's connection.

    def send_body(self, data: bytes) -> None:
        """Take a piece of the request's body."""
        self._body_bytes += len(data)
        if self._body_bytes > self._calls.limits.request_bytes:
            self._refuse_body()
            return
        self._body.append(data)
        self._pending_bytes += len(data)
        self._go_on()

    def end_body(self, trailers: Fields) -> None:
        """Take the end of the request's body."""
        self._ended = True
        self._trailers = connection.lines(trailers)
        self._go_on()

    @property
    def full(self) -> bool:
        """True while the client should send no more."""
        # Otherwise the body is at most `limits.request`, and is kept here until it is whole.
        return self._pending_bytes >= INITIAL_CREDIT_BYTES and not (self._calls.whole and self.channel is None)

    def pause(self) -> None:
        """Take note that the client takes no more of the answer for now."""
        self._paused = True
        self.watch_client()

    def resume(self) -> None:
        """Take note that the client takes more of the answer."""
        self._paused = False
        self._give_credit()
        self.watch_client()

    def drop(self) -> None:
        """Take note that the client has gone."""
        self._leave(CallOutcome.CLIENT_GONE)

    def drop_slow(self) -> None:
        """Take note that the client is not waited for any longer."""
        self._leave(CallOutcome.CLIENT_SLOW)

    def _leave(self, outcome: CallOutcome) -> None:
        self._client = None
        if self.channel is None:
            self._calls.withdraw(self)
        elif self._begun or not self._ended:
            self._abandon(outcome)

    # The request.

    @property
    def is_whole(self) -> bool:
        """True for a request without any body."""
        return self._ended and not self._body_bytes and not self._trailers

    @property
    def may_go_ahead(self) -> bool:
        """True for a request that may be written ahead: without any body, and it may begin twice."""
        return self.is_whole and self._exchange.repeatable

    @property
    def is_written(self) -> bool:
        """True once all of the request is in the channel."""
        return self.is_whole or self._end_sent

    @property
    def head_bytes(self) -> int:
        """Size of the request's head."""
        return len(self._exchange.head)

    def request_frames(self) -> bytes:
        """Return the frames of the request as far as it may be sent: all of a small one."""
        self._credit = INITIAL_CREDIT_BYTES
        if self.is_whole:
            return encode(Frame(Kind.WHOLE_REQUEST, self.number, self._exchange.head))
        if self._sent:  # again, in a stream that begins anew
            self._body.extendleft(reversed(self._sent))
            self._pending_bytes += sum(map(len, self._sent))
        self._sent, self._end_sent = [], False
        return encode(Frame(Kind.REQUEST, self.number, self._exchange.head)) + self._body_frames()

    @property
    def can_be_sent_again(self) -> bool:
        """True while everything that was sent of the request is still here, and the guest has not answered."""
        return self._sent is not None and not self._status and not self._answering

    def begin_again(self) -> bool:
        """Forget what came of the answer, so that the call can be sent again; False where it must not be."""
        if self._begun or self._client is None or not self._exchange.repeatable or self._sent is None:
            return False
        self._exchange.retried = True
        self._status, self._fields, self._length, self._problem = 0, b"", None, ""
        self._spool_bytes = self._sent_bytes = self._owed = 0
        self._answering = False
        self._out.clear()
        if self._flush_timer is not None:
            self._flush_timer.cancel()
            self._flush_timer = None
        return True

    def _body_frames(self) -> bytes:
        """Take what may be sent of the body by now."""
        parts = []
        while self._body and self._credit:
            piece = self._body.popleft()
            if len(piece) > self._credit:
                self._body.appendleft(piece[self._credit :])
                piece = piece[: self._credit]
            self._credit -= len(piece)
            self._pending_bytes -= len(piece)
            parts.append(encode_body(self.number, piece))
            self._keep(piece)
        if self._ended and not self._body and not self._end_sent:
            self._end_sent = True
            parts.append(encode(Frame(Kind.END, self.number, self._trailers[:PAYLOAD_MAX_BYTES])))
        return b"".join(parts)

    def _keep(self, piece: bytes) -> None:
        if self._sent is not None:
            self._sent.append(piece)
            if self._body_bytes > INITIAL_CREDIT_BYTES:
                self._sent = None

    def _go_on(self) -> None:
        """Submit the call once its body is whole, or too large to wait for; send more of it when it runs."""
        if self._client is None:
            return
        if not self._submitted:
            if self.head_bytes > PAYLOAD_MAX_BYTES:  # field values that are no ASCII take more room in a frame
                self.refuse(431, connection.REFUSALS[431])
            elif self._ended or self.full:
                self._submitted = True
                self._calls.submit(self)
        elif self.channel is not None and not self.is_whole:
            self.channel.write(self._body_frames())
        self.watch_client()

    def credited(self, more: int) -> None:
        """Take credit for the request's body. Raises `FrameError`: it is for more than was sent."""
        self._credit += more
        if self._credit > INITIAL_CREDIT_BYTES:
            raise FrameError("credit for more than was sent")
        if self.channel is not None:
            self.channel.write(self._body_frames())
        if self._client is not None:
            self._client.resume_client()
        self.watch_client()

    def refuse(self, status: int, why: str) -> None:
        """Answer in place of the guest, which has not been asked."""
        client, self._client = self._client, None
        if client is not None:
            client.reply(self._exchange, status, why)

    def _refuse_body(self) -> None:
        client = self._client
        if client is None:
            return
        self._calls.count(CallOutcome.HOST_ERROR)
        self._exchange.keep_alive = False
        begun = self._begun
        self.drop()
        if begun:
            client.cut(self._exchange)
        else:
            client.reply(self._exchange, 413, connection.REFUSALS[413])

    # The answer.

    def respond(self, payload: bytes) -> None:
        """Take the response's head; empty: the guest begins its body before it has set its answer."""
        if self._status or (self._answering and not payload):
            raise FrameError("a second response to one call")
        self._answering = True
        if payload:
            self._take_head(payload)

    def _take_head(self, payload: bytes) -> None:
        try:
            status, headers, _ = heads.split_head(payload + b"\r\n")
            self._set_head(status, headers)
        except ValueError as error:
            self._problem = self._problem or str(error)

    def _set_head(self, status: int, headers: bytes) -> None:
        try:
            self._length = connection.declared_length(headers)
            has_body = self._exchange.request.method != b"HEAD" and status not in connection.BODILESS
            most = self._calls.limits.response_bytes
            self._fields = connection.guest_fields(status, headers, (self._length or 0) if has_body else 0, most)
        except BadAnswerError as error:
            self._reject(error)
        else:
            self._status = status

    def _reject(self, error: BadAnswerError) -> None:
        if not self._problem:
            self._problem, self._sentence = str(error), error.sentence

    def take_body(self, data: bytes) -> None:
        """Take a piece of the answer's body."""
        self._owed += len(data)
        if self._owed > INITIAL_CREDIT_BYTES:
            raise FrameError("more of a body than its credit")
        self._spool_bytes += len(data)
        if self._client is None or self._problem:
            return
        if self._spool_bytes > self._calls.limits.response_bytes:
            self._problem = f"a body of more than {self._calls.limits.response_bytes} bytes"
            self._out.clear()
        else:
            self._out.append(data)

    def flush_soon(self) -> None:
        """Give out what has come of the answer; the first piece of a small one a little later, in case it ends."""
        if self._begun or self._client is None or self._spool_bytes >= _CREDIT_STEP_BYTES:
            self._flush()
        elif self._status and self._flush_timer is None:
            self._flush_timer = asyncio.get_running_loop().call_later(_FIRST_FLUSH_S, self._flush)

    def _flush(self) -> None:
        if self._client is None:
            if self._owed and self._abandoned is None:  # the guest writes on, for nobody
                self._abandon(CallOutcome.CLIENT_GONE)
            return
        if self._status and not self._problem:
            self._client.send(self._begin() + self._framed())
        self._give_credit()

    def _begin(self) -> bytes:
        """Return the head of an answer that goes out before its end; nothing the second time."""
        if self._begun:
            return b""
        self._begun = self._exchange.answering = True
        if self._length is None and self._exchange.request.old:
            self._exchange.keep_alive = False  # HTTP/1.0: an answer without a length ends with the connection
        return connection.answer_head(
            self._status,
            self._fields,
            length=self._length,
            chunked=self._chunked,
            keep_alive=self._keeps_alive(),
            old=self._exchange.request.old,
        )

    @property
    def _chunked(self) -> bool:
        return self._length is None and not self._exchange.request.old

    @property
    def _bodiless(self) -> bool:
        return self._exchange.request.method == b"HEAD" or self._status in connection.BODILESS

    def _framed(self) -> bytes:
        """Take what has come of the body, as it goes out."""
        parts = []
        for data in self._out:
            self._sent_bytes += len(data)
            if self._bodiless:
                continue
            if self._length is not None and self._sent_bytes > self._length:
                self._problem = "a body longer than its content-length"
                break
            parts.append(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        self._out.clear()
        return b"".join(parts)

    def _keeps_alive(self) -> bool:
        self._exchange.keep_alive = self._exchange.keep_alive and self._exchange.complete
        return self._exchange.keep_alive

    def _give_credit(self) -> None:
        if self._owed >= _CREDIT_STEP_BYTES and not self._paused and self.channel is not None:
            self.channel.write(encode(Frame(Kind.CREDIT, self.number, _CREDIT.pack(self._owed))))
            self._owed = 0

    # The end.

    def settle(self, end: heads.ResponseHead) -> Settled:
        """Take the guest's end of the answer."""
        self._cancel_timers()
        if self._abandoned is not None:
            return Settled(self._abandoned, error=False, deliver=_nothing)
        if self._client is None:
            return Settled(CallOutcome.OK, error=end.problem is not None, deliver=_nothing)
        if end.problem is not None:
            self._calls.note(f"host: {end.problem}")
            if not self._begun:
                return self._reply(end.status, end.problem)
            self._problem = self._problem or end.problem
        elif not self._status and not self._problem:
            if end.status:
                self._set_head(end.status, end.headers)
            else:
                self._problem = "no head"
        if self._begun:
            return self._end_begun(end.trailers)
        return self._whole(end.trailers)

    def _reply(self, status: int, why: str) -> Settled:
        client, exchange = self._client, self._exchange
        assert client is not None
        return Settled(CallOutcome.OK, status >= _SERVER_ERROR, lambda: client.reply(exchange, status, why))

    def _taken_trailers(self, trailers: bytes) -> bytes:
        """Return the guest's trailers as far as the client takes any."""
        request = self._exchange.request
        if not trailers or request.old or b"trailers" not in tokens(request.fields, b"te"):
            return b""
        try:
            return connection.guest_fields(_SERVER_ERROR, trailers, 0, 0)
        except BadAnswerError as error:
            self._reject(error)
            return b""

    def _end_begun(self, trailers: bytes) -> Settled:
        client, exchange = self._client, self._exchange
        assert client is not None
        trailers = self._taken_trailers(trailers)
        data = b"" if self._problem else self._framed()
        if not self._problem and self._length is not None and self._sent_bytes < self._length and not self._bodiless:
            self._problem = "a body shorter than its content-length"
        if self._problem:
            self._calls.note(f"host: its answer is cut off: {self._problem}")
            return Settled(CallOutcome.OK, error=True, deliver=lambda: client.cut(exchange, data))
        if self._chunked and not self._bodiless:
            data += b"0\r\n%b\r\n" % trailers
        return Settled(CallOutcome.OK, self._status >= _SERVER_ERROR, lambda: client.finish(exchange, data))

    def _whole(self, trailers: bytes) -> Settled:
        client, exchange = self._client, self._exchange
        assert client is not None
        trailers = self._taken_trailers(trailers)
        head, old = exchange.request.method == b"HEAD", exchange.request.old
        body = self._out[0] if len(self._out) == 1 else b"".join(self._out)
        if not self._problem:
            try:
                connection.check_length(self._status, self._length, len(body), head=head)
            except BadAnswerError as error:
                self._reject(error)
        if self._problem:
            self._calls.note(f"host: its answer is refused: {self._problem}")
            return self._reply(502, self._sentence)._replace(error=True)
        exchange.answering = True
        keep_alive, failed = self._keeps_alive(), self._status >= _SERVER_ERROR
        if head and self._length is not None:
            answer = connection.answer_head(
                self._status, self._fields, length=self._length, chunked=False, keep_alive=keep_alive, old=old
            )
        else:
            answer = connection.answer(
                self._status, self._fields, body, head=head, keep_alive=keep_alive, trailers=trailers, old=old
            )
        return Settled(CallOutcome.OK, failed, lambda: client.finish(exchange, answer))

    def fail(self, outcome: CallOutcome, why: str) -> Settled:
        """Take the end of a call that ended without an answer."""
        self._cancel_timers()
        client, exchange = self._client, self._exchange
        if self._abandoned is not None or client is None:
            return Settled(self._abandoned or outcome, error=self._abandoned is None, deliver=_nothing)
        if self._begun:
            return Settled(outcome, error=True, deliver=lambda: client.cut(exchange))
        status = 504 if outcome is CallOutcome.GUEST_TIMEOUT else 500
        return Settled(outcome, error=True, deliver=lambda: client.reply(exchange, status, why))

    def lose(self, *, may_repeat: bool) -> None:
        """Take note that the worker ended in this call, which nobody has counted."""
        self._cancel_timers()
        client, self._client = self._client, None
        if client is not None:
            self._exchange.retried = self._exchange.retried or not may_repeat
            client.upstream_failed(self._exchange)

    # The client's pace.

    def _abandon(self, outcome: CallOutcome) -> None:
        """Have a guest end that works for nobody: at once where it waits for the client, else by an interrupt."""
        self._client = None
        if self._abandoned is not None or self.channel is None:
            return
        self._abandoned = outcome
        self._cancel_timers()
        self.channel.cancel(self)

    @property
    def waits_for_client(self) -> bool:
        """True while the guest can go no further until the client sends or reads, as far as is known here."""
        return self._client is not None and (self._paused or not (self._ended or self._body))

    @property
    def is_delayed_by_client(self) -> bool:
        """True while the client is waited for, or once it has taken a large part of the time that a call may take."""
        return self.waits_for_client or self._waited_s >= _CLIENT_SHARE * self._calls.limits.total_ms / 1000

    def watch_client(self) -> None:
        """Note since when the client is waited for; no longer than a guest may wait for others."""
        if self.channel is None or not self.waits_for_client:
            if self._waits_since_s is not None:
                self._waited_s += time.monotonic() - self._waits_since_s
                if self.channel is not None:
                    self.channel.page.wait(False)
            self._waits_since_s = None
        elif self._waits_since_s is None:
            self._waits_since_s = time.monotonic()
            assert self._client is not None
            self._moved = self._client.moved
            self.channel.page.wait(True)
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(self._calls.idle_s, self._judge_client)

    def _judge_client(self) -> None:
        self._timer = None
        if self._waits_since_s is None or self._client is None:
            return
        if (moved := self._client.moved) != self._moved:  # a slow client, which has a rate to keep (`pace`)
            now_s = time.monotonic()
            self._waited_s += now_s - self._waits_since_s
            self._moved, self._waits_since_s = moved, now_s
        left_s = self._waits_since_s + self._calls.idle_s - time.monotonic()
        if left_s > 0:
            self._timer = asyncio.get_running_loop().call_later(left_s, self._judge_client)
        else:
            self.end_for_slow_client()

    def end_for_slow_client(self) -> None:
        """End a call whose client takes too long."""
        client = self._client
        self._abandon(CallOutcome.CLIENT_SLOW)
        if client is not None:
            client.close()

    def _cancel_timers(self) -> None:
        for timer in (self._timer, self._flush_timer):
            if timer is not None:
                timer.cancel()
        self._timer = self._flush_timer = None


class Channel:
    """Channel of a worker.

    Attributes:
        worker: number of the worker.
        flight: calls in it, of which the first runs.
        serves: whether it takes calls.
    """

    def __init__(self, calls: "InstanceCalls", worker: int, sock: socket.socket, page: CallPage) -> None:
        self.worker = worker
        self.page = page
        self.flight: deque[Call] = deque()
        self.serves = False
        self.is_open = True
        self._calls = calls
        self._sock = sock
        self._decoder = FrameDecoder(FROM_GUEST)
        self._unsent = bytearray()
        self._number = 0
        self._yields = 0  # requests of the supervisor's for which the worker has not left the loop yet
        self._yielding = False
        self._lost_place = False  # the store is about to end: everything written now is to be written again
        self._is_draining = False
        self._timer: asyncio.TimerHandle | None = None
        self._told = 0  # number of the call that was reported last
        self._began_behind = 0  # number of the call that was written behind a reported one
        sock.setblocking(False)
        asyncio.get_running_loop().add_reader(sock, self._readable)

    # Calls.

    @property
    def is_free(self) -> bool:
        """True while a call would begin at once."""
        return self._takes and not self.flight

    @property
    def _takes(self) -> bool:
        return self.is_open and self.serves and not (self._yielding or self._yields or self._lost_place)

    def may_write_ahead(self, call: Call) -> bool:
        """Return whether a call may be written behind those that are in the channel."""
        if not self._takes or self.is_in_long_call or len(self.flight) >= AHEAD_MAX or not call.may_go_ahead:
            return False
        ahead_bytes = call.head_bytes + sum(each.head_bytes for each in self.flight)
        return ahead_bytes <= AHEAD_MAX_BYTES and self.flight[-1].is_written

    def take(self, call: Call) -> None:
        """Write a call; it begins at once, or when the one before it ends."""
        self.flight.append(call)
        call.channel = self
        self._write_call(call)
        if len(self.flight) == 1:
            self._begin()

    def _write_call(self, call: Call) -> None:
        self._number = self._number % 0xFFFFFFFF + 1
        call.number = self._number
        self.write(call.request_frames())

    def _begin(self) -> None:
        """Let the first call in the channel begin, as far as can be known here."""
        call = self.flight[0]
        call.began_ns = time.monotonic_ns()
        self.page.begin(call.began_ns, call.number)
        call.watch_client()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LONG_CALL_S, self._look)

    def _look(self) -> None:
        """Report a call once it takes long; one timer serves many calls."""
        self._timer = None
        if not self.flight:
            return
        call, loop = self.flight[0], asyncio.get_running_loop()
        age_s = (time.monotonic_ns() - call.began_ns) / 1e9
        if age_s < LONG_CALL_S:
            self._timer = loop.call_later(LONG_CALL_S - age_s, self._look)
            return
        if self._told != call.number:
            self._told = call.number
            self._calls.reports.report(LongCall(self.worker, call.number))
            self._calls.note_queue()
        total_s = self._calls.limits.total_ms / 1000
        left_s = total_s - min(_TOTAL_MARGIN_S, total_s / 4) - age_s
        if left_s > 0:
            self._timer = loop.call_later(left_s, self._look)
        elif call.is_delayed_by_client:
            call.end_for_slow_client()

    def _end(self, settled: Settled) -> None:
        """Count the end of the first call, begin the next, and then serve the client, who may have another request."""
        call = self.flight.popleft()
        call.channel = None
        self.page.end(settled.outcome, (time.monotonic_ns() - call.began_ns) // 1000, error=settled.error)
        self.page.rest()
        if self._timer is not None and self._told == call.number:
            self._timer.cancel()  # set for the end of this call
            self._timer = None
        if self.flight:
            self._begin()
        settled.deliver()

    def cancel(self, call: Call) -> None:
        """Tell the guest that the client of its call has gone, and the supervisor if that does not end the call."""
        if self.flight and self.flight[0] is call:
            self.write(encode(Frame(Kind.CANCEL, call.number)))
            asyncio.get_running_loop().call_later(_ABANDON_S, self._still_there, call)

    def _still_there(self, call: Call) -> None:
        if self.is_open and self.flight and self.flight[0] is call:
            self._told = call.number
            self._calls.reports.report(CallAbandoned(self.worker, call.number))

    # Orders of the supervisor's.

    @property
    def is_in_long_call(self) -> bool:
        """True while the call that runs has been reported."""
        return bool(self.flight) and self.flight[0].number == self._told

    def leave_loop(self) -> None:
        """Have the worker read its control socket, once no call is in the channel."""
        self._yields += 1
        self._go_on()

    def drain(self) -> None:
        """Take no more calls, and report when there are none."""
        self.serves = False
        self._is_draining = True
        self._go_on()

    def serve(self) -> None:
        """Take calls."""
        self.serves, self._is_draining = True, False
        self._calls.pump()

    def _go_on(self) -> None:
        """Do what waited for the channel to be empty."""
        if self.flight or not self.is_open:
            return
        if self._yields and not (self._yielding or self._lost_place):
            self._yields, self._yielding = 0, True
            self.write(encode(Frame(Kind.YIELD, 0)))
        if self._is_draining:
            self._is_draining = False
            self._calls.reports.report(ChannelDrained(self.worker))

    # The socket.

    def write(self, data: bytes) -> None:
        """Send frames, or keep them until there is room: no more than credit and calls ahead allow."""
        if not data or not self.is_open:
            return
        if not self._unsent:
            try:
                sent = self._sock.send(data, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                sent = 0
            except OSError:
                return  # the end is read, with what came before it
            if sent == len(data):
                return
            data = data[sent:]
            asyncio.get_running_loop().add_writer(self._sock, self._writable)
        self._unsent += data

    def _writable(self) -> None:
        try:
            sent = self._sock.send(self._unsent, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return
        except OSError:
            sent = len(self._unsent)
        del self._unsent[:sent]
        if not self._unsent:
            asyncio.get_running_loop().remove_writer(self._sock)

    def _forget_unsent(self) -> None:
        if self._unsent:
            self._unsent.clear()
            asyncio.get_running_loop().remove_writer(self._sock)

    def _readable(self) -> None:
        try:
            data = self._sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lose()
            return
        try:
            for frame in self._decoder.feed(data):
                self._take(frame)
                if not self.is_open:
                    return
        except (FrameError, ValueError, struct.error) as error:
            self._calls.reports.report(ChannelBroken(self.worker, str(error)))
            self._lose()
            return
        if self.flight:
            self.flight[0].flush_soon()
        self._go_on()
        self._calls.pump()

    def _take(self, frame: Frame) -> None:
        if frame.kind is Kind.FAILED:
            self._resume_after_failure(frame.payload)
            return
        if frame.kind is Kind.END and frame.call == 0 and self._yielding:
            self._yielding = False
            return
        if not self.flight or self.flight[0].number != frame.call:
            raise FrameError(f"a frame of call {frame.call}, which does not run")
        call = self.flight[0]
        match frame.kind:
            case Kind.RESPONSE:
                call.respond(frame.payload)
            case Kind.BODY:
                call.take_body(frame.payload)
            case Kind.CREDIT:
                call.credited(_CREDIT.unpack(frame.payload)[0])
            case _:
                end = heads.answer_head(frame.payload)
                self._lost_place = self._calls.reuses and end.problem is not None
                if self.is_in_long_call:
                    self._yields += 1
                    self._began_behind = self.flight[1].number if len(self.flight) > 1 else 0
                self._end(call.settle(end))

    def _resume_after_failure(self, payload: bytes) -> None:
        """End the call that failed, if one did, and write everything else anew for the next store."""
        text, token = payload[:-TOKEN_BYTES], payload[-TOKEN_BYTES:]
        outcome, _, why = text.partition(b"\r\n")
        if len(token) != TOKEN_BYTES:
            raise FrameError("a failure without a token")
        self._lost_place = False
        self._forget_unsent()
        self.write(token)
        if self._yielding:  # written before the token, and so not read
            self._yields, self._yielding = self._yields + 1, False
        failed = self.flight[0] if outcome and self.flight else None
        if failed is not None and self._was_meant_for_another(failed, outcome) and failed.begin_again():
            failed = None
        for call in [each for each in self.flight if each is not failed]:
            if call.can_be_sent_again:
                self._write_call(call)
            else:  # cannot be: only calls without a body are written ahead
                raise FrameError("the store ended in a call and said nothing of it")
        if failed is not None:
            why = why.removesuffix(b"\r\n")
            self._end(failed.fail(CallOutcome(outcome.decode()), why.decode(errors="replace")))
        elif self.flight:
            self.page.begin(self.flight[0].began_ns, self.flight[0].number)

    def _was_meant_for_another(self, call: Call, outcome: bytes) -> bool:
        """Return whether a call was ended by an interrupt of the call before it: nobody has asked for its own."""
        late = outcome == CallOutcome.GUEST_TIMEOUT.encode()
        return late and call.number == self._began_behind and not self.is_in_long_call

    def _lose(self) -> None:
        """Give the calls in the channel up, or to another worker where they had not begun."""
        flight = list(self.flight)
        self.close()
        if self._is_draining:
            self._is_draining = False
            self._calls.reports.report(ChannelDrained(self.worker))
        self._calls.lose(self, flight)

    def close(self) -> None:
        """Close the channel; the worker ends for want of it."""
        if not self.is_open:
            return
        self.is_open = self.serves = False
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._sock)
        self._forget_unsent()
        self._sock.close()
        self.page.rest()
        self.page.close()
        if self._timer is not None:
            self._timer.cancel()
        self.flight.clear()


class InstanceCalls:
    """Calls of one instance, and the channels of its workers."""

    def __init__(self, instance: str, reports: Reports) -> None:
        self.instance = instance
        self.reports = reports
        self.limits = Limits()
        self.reuses = self.whole = False
        self.channels: list[Channel] = []
        self._waiting: deque[Call] = deque()
        self._notes = TokenBucket(_NOTES_A_MINUTE)
        self._queue_said_s = -math.inf

    @property
    def idle_s(self) -> float:
        """Seconds that a client may keep its call waiting."""
        return self.limits.idle_ms / 1000

    def call(self, client: Asker, exchange: Exchange) -> Call:
        """Return a new call, which is submitted once enough of its body has come."""
        return Call(self, client, exchange)

    def add(self, worker: int, sock: socket.socket, page: CallPage) -> Channel:
        """Add the channel of a worker."""
        channel = Channel(self, worker, sock, page)
        self.channels.append(channel)
        return channel

    def submit(self, call: Call) -> None:
        """Give a call to a worker, or let it wait."""
        if len(self._waiting) >= WAITING_MAX:
            call.refuse(503, f"{self.instance} has too many clients who wait")
            return
        self._waiting.append(call)
        self.pump()
        if call.channel is None or call.channel.flight[0] is not call:
            self.note_queue()

    def note_queue(self) -> None:
        """Log, once in a while, that calls wait for others that take long, with as many workers as there may be."""
        serving = [channel for channel in self.channels if channel.serves]
        if len(serving) < self.limits.concurrency or not all(channel.is_in_long_call for channel in serving):
            return
        waits = self._waiting or any(len(channel.flight) > 1 for channel in serving)
        now_s = time.monotonic()
        if waits and now_s - self._queue_said_s > _QUEUE_SAID_EVERY_S:
            self._queue_said_s = now_s
            self.note(_QUEUED.format(self.limits.concurrency))

    def withdraw(self, call: Call) -> None:
        """Forget a call that waits."""
        with contextlib.suppress(ValueError):
            self._waiting.remove(call)

    def pump(self) -> None:
        """Give waiting calls to workers."""
        while self._waiting:
            channel = self._choose(self._waiting[0])
            if channel is None:
                return
            channel.take(self._waiting.popleft())

    def _choose(self, call: Call) -> Channel | None:
        serving = [channel for channel in self.channels if channel.serves]
        for channel in serving:
            if channel.is_free:
                return channel
        # With several workers a call would wait behind one of them while another becomes free.
        if (
            len(serving) == 1
            and self.limits.concurrency == 1
            and serving[0].flight
            and serving[0].may_write_ahead(call)
        ):
            return serving[0]
        return None

    def lose(self, channel: Channel, flight: list[Call]) -> None:
        """Give up the call that ran in a channel that has ended; the calls behind it had not begun."""
        self.channels.remove(channel)
        running, behind = flight[:1], flight[1:]
        for call in reversed(behind):
            call.channel = None
            self._waiting.appendleft(call)
        for call in running:
            call.channel = None
            age_ms = (time.monotonic_ns() - call.began_ns) // 1_000_000
            call.lose(may_repeat=age_ms < min(self.limits.call_ms, self.limits.idle_ms, self.limits.total_ms))
        self.pump()

    def refuse_all(self, status: int, why: str) -> None:
        """Answer every call that waits."""
        waiting, self._waiting = self._waiting, deque()
        for call in waiting:
            call.refuse(status, why)

    def rest(self) -> None:
        """Take note that no calls come any more; what is logged once in a while may be logged again."""
        self._queue_said_s = -math.inf

    def count(self, outcome: CallOutcome) -> None:
        """Count a request that was answered without the guest."""
        if self.channels:
            self.channels[-1].page.count(outcome)

    def note(self, text: str) -> None:
        """Write a line to the instance's log, as far as there is room for it."""
        if self.channels and self._notes.take():
            self.reports.report(ChannelNote(self.channels[-1].worker, text))

"""Call of an instance: the request of a client on its way to a guest, in frames, and the answer on its way back.

Bodies flow both ways by credit: each side may send `INITIAL_CREDIT_BYTES` of a call's body at once, and then as much as
the other side has asked for. So neither a slow client nor a slow guest makes anything pile up here.

The answer of a guest goes out as the guest flushes it. What has come whole by the time that it is read here goes out
with its length; else it goes out in chunks, unless the guest said the length.

No socket: `agent.host.http.channel` carries the frames.
"""

import asyncio
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
    INITIAL_CREDIT_BYTES,
    PAYLOAD_MAX_BYTES,
    Frame,
    FrameError,
    Kind,
    encode,
    encode_body,
)
from agent.host.ipc.stats_page import CallPage
from fleet.protocol.codes import CallOutcome
from fleet.protocol.manifest import Limits

CREDIT: Final = struct.Struct("<I")
"""Payload of `Kind.CREDIT`."""

LARGE_REQUEST: Final = "host: a request is refused: a body of more than {} bytes (limits.request)"
"""Line of an instance's log."""

_CREDIT_STEP_BYTES: Final = 16 * 1024  # credit in smaller steps would cost a frame for each small body
_CLIENT_SHARE: Final = 0.25  # of limits.total: a client that took as much is the cause, not the guest
_FIRST_FLUSH_S: Final = 0.002  # most answers are whole by then, and go out with their length in one piece
_SERVER_ERROR: Final = 500
_NO_CONTENT: Final = 204  # without any framing (RFC 9112, section 6.1; RFC 9110, section 8.6)
_NOT_MODIFIED: Final = 304  # a length is that of the 200 in its place (RFC 9110, section 8.6)


class CallCarrier(Protocol):
    """Channel of a call."""

    page: CallPage

    def write(self, data: bytes) -> None:
        """Send frames to the guest."""

    def cancel(self, call: "Call") -> None:
        """Tell the guest that the client of its call has gone."""


class CallQueue(Protocol):
    """Instance of a call."""

    limits: Limits
    whole: bool  # workers keep a request's body until it is complete

    @property
    def request_max(self) -> int | None:
        """Largest body of a request; None for any, where bodies stream."""

    @property
    def idle_s(self) -> float:
        """Seconds that a client may keep its call waiting."""

    def submit(self, call: "Call") -> None:
        """Give a call to a worker, or let it wait."""

    def withdraw(self, call: "Call") -> None:
        """Forget a call that waits."""

    def keep(self, call: "Call") -> None:
        """Let a call keep a large body until it is whole, by `keep_body`, at once or in its turn."""

    def release(self, call: "Call") -> None:
        """Take note that a call keeps no large body, or no longer."""

    def count(self, outcome: CallOutcome) -> None:
        """Count a request that was answered without the guest."""

    def note(self, text: str) -> None:
        """Write a line to the instance's log."""


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
        began_ns: when its channel let it begin (monotonic clock); 0 before.
        is_answered: whether its answer has ended and its client is served; the guest may go on.
    """

    def __init__(self, calls: CallQueue, client: Asker, exchange: Exchange) -> None:
        self.number = 0
        self.channel: CallCarrier | None = None
        self.began_ns = 0
        self.is_answered = False
        self._calls = calls
        self._client: Asker | None = client
        self._exchange = exchange
        self._submitted = False
        self._abandoned: CallOutcome | None = None
        self._is_error = False  # abandoned for a fault of its answer
        # Request.
        self._body: deque[bytes] = deque()
        self._pending_bytes = self._body_bytes = 0
        self._ended = self._end_sent = False
        self._asked_to_keep = self._keeps = False
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
        most = self._calls.request_max
        if most is not None and self._body_bytes > most:
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
        return self._pending_bytes >= INITIAL_CREDIT_BYTES and not (self._keeps and self.channel is None)

    def keep_body(self) -> None:
        """Keep the body here until it is whole: at most `limits.request`, of a guest that takes no other."""
        self._keeps = True
        if self._client is not None:
            self._client.resume_client()

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
        self._calls.release(self)
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
    def is_kept(self) -> bool:
        """True for a request that is here as a whole, and stays so while it is sent."""
        return self._ended and self._body_bytes <= INITIAL_CREDIT_BYTES

    @property
    def head_bytes(self) -> int:
        """Size of the request's head."""
        return len(self._exchange.head)

    def request_frames(self) -> bytes:
        """Return the frames of the request as far as it may be sent: all of a small one."""
        self._credit = INITIAL_CREDIT_BYTES
        self._calls.release(self)
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
            elif self._ended or (self.full and not self._calls.whole):
                self._submitted = True
                self._calls.submit(self)
            elif self.full and not self._asked_to_keep:
                self._asked_to_keep = True
                self._calls.keep(self)
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
        self._calls.release(self)
        if client is not None:
            client.reply(self._exchange, status, why)

    def _refuse_body(self) -> None:
        client = self._client
        if client is None:
            return
        self._calls.count(CallOutcome.HOST_ERROR)
        self._calls.note(LARGE_REQUEST.format(self._calls.request_max))
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
            status, headers, behind = heads.split_head(payload + b"\r\n")
            self._set_head(status, headers)
            if behind and self._status:
                self._status = 0
                self._reject(BadAnswerError("its head has an empty line"))
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
        """Take a piece of the answer's body. Raises `FrameError`: there is nothing in it, or no credit for it."""
        if not data:
            raise FrameError("a piece of a body without any bytes")
        self._owed += len(data)
        if self._owed > INITIAL_CREDIT_BYTES:
            raise FrameError("more of a body than its credit")
        self._spool_bytes += len(data)
        if self._client is None or self._problem:
            return
        if self._spool_bytes > self._calls.limits.response_bytes:
            self._end_too_large()
        else:
            self._out.append(data)

    def _end_too_large(self) -> None:
        """End a call whose answer is larger than it may be; the guest could write on for a long time."""
        client, exchange = self._client, self._exchange
        assert client is not None
        self._out.clear()
        self._is_error = True
        what = "cut off" if self._begun else "refused"
        most = self._calls.limits.response_bytes
        self._calls.note(f"host: its answer is {what}: a body of more than {most} bytes (limits.response)")
        self._abandon(CallOutcome.OK)
        if self._begun:
            client.cut(exchange)
        else:
            client.reply(exchange, 502, self._sentence)

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
            length=None if self._status == _NO_CONTENT else self._length,
            chunked=self._chunked and self._status not in connection.BODILESS,
            keep_alive=self._may_keep_alive(),
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
        data = b"".join(self._out)
        self._out.clear()
        self._sent_bytes += len(data)
        if self._bodiless or not data:
            return b""
        if self._length is not None and self._sent_bytes > self._length:
            self._problem = "a body longer than its content-length"
            return b""
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data

    def _may_keep_alive(self) -> bool:
        """Return if the head of an answer leaves its connection open: the request may end before the answer does."""
        exchange = self._exchange
        if exchange.complete:
            return exchange.keep_alive
        if exchange.request.old or b"close" in tokens(exchange.request.fields, b"connection"):
            exchange.keep_alive = False
        return exchange.keep_alive

    def _keeps_alive(self) -> bool:
        self._exchange.keep_alive = self._exchange.keep_alive and self._exchange.complete
        return self._exchange.keep_alive

    def _give_credit(self) -> None:
        if self._owed >= _CREDIT_STEP_BYTES and not self._paused and self.channel is not None:
            self.channel.write(encode(Frame(Kind.CREDIT, self.number, CREDIT.pack(self._owed))))
            self._owed = 0

    # The end.

    def settle(self, end: heads.ResponseHead) -> Settled:
        """Take the guest's end of the answer."""
        self._cancel_timers()
        if self._abandoned is not None:
            return Settled(self._abandoned, error=self._is_error, deliver=_nothing)
        if self._client is None:
            return Settled(CallOutcome.OK, error=end.problem is not None, deliver=_nothing)
        if end.problem is not None:
            self._calls.note(f"host: {end.problem}")
            if not self._begun:  # JavaScript answers an exception with 500, and drops the body
                own = self._status if self._status >= _SERVER_ERROR else 0
                return self._reply(own or end.status, end.problem)
            self._problem = self._problem or end.problem
        elif not self._status and not self._problem:
            if end.status:
                self._set_head(end.status, end.headers)
            else:
                self._problem = "no head"
        if self._begun:
            return self._end_begun(end.trailers)
        return self._whole(end.trailers)

    def let_client_go(self) -> bytes:
        """Forget the client, who is served, and return a frame for a guest that waits for more of the request."""
        self.is_answered = True
        self._client = None
        self.watch_client()
        if self._ended or self._end_sent:
            return b""
        self._body.clear()
        self._end_sent = True
        return encode(Frame(Kind.CANCEL, self.number))

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
        has_length = self._length is not None and self._status != _NO_CONTENT
        if has_length and (head or self._status == _NOT_MODIFIED):
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
            return Settled(
                self._abandoned or outcome, error=self._abandoned is None or self._is_error, deliver=_nothing
            )
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

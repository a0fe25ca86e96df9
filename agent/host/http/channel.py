"""Channels of workers: which worker takes a call (`Call`), and the stream of frames to its guest and back.

A worker runs one call at a time. `InstanceCalls` gives each call to a worker that has none, or else lets it wait; a few
calls whose request is whole and small are written ahead into the channel of an instance with a single worker, which
saves a wake-up for each. A call that was written ahead begins when the one before it ends.

After a trap, the worker goes on with a new store and does not know where in the stream that one stopped. It sends a
token, which is sent back to it, and then every call that had not begun (`Kind.FAILED`).

A call that was reported as long may be interrupted, and the interrupt may come when the call has just ended. So nothing
is written behind a reported call, and after its end the worker leaves its loop once before it gets another: there it
reads what was sent to it, and knows that the call has ended. A call that had been written ahead before the report can
still be hit by such an interrupt. It is sent again, which is safe, as only idempotent requests are written ahead.

A guest may go on after its answer has ended (`Kind.ANSWERED`): the client is served then, and the call ends when the
guest returns. A worker says nothing of that by itself, which would cost a write for each call: the first frame of the
next call says it, or `Kind.ASK` finds it out, once the call would be a long one or somebody waits. So the next call may
stand behind one whose guest still runs. Where the worker cannot know which of the two has failed, the next one, which
may begin twice, is sent again; if it fails again, the failure was its own. Before a call that may not begin twice, the
worker is asked, and answers before it begins.
"""

import asyncio
import contextlib
import math
import socket
import struct
import time
from collections import deque
from collections.abc import Iterator
from typing import Final, Protocol

from agent.host.http.call import CREDIT, Call, Settled
from agent.host.http.exchange import Asker, Exchange
from agent.host.http.turns import FRAMES_A_TURN
from agent.host.ipc import heads
from agent.host.ipc.frames import FROM_GUEST, TOKEN_BYTES, Frame, FrameDecoder, FrameError, Kind, encode
from agent.host.ipc.helper_api import (
    LONG_CALL_S,
    AddChannel,
    CallAbandoned,
    ChannelBroken,
    ChannelDrained,
    ChannelNote,
    FromRouter,
    LongCall,
)
from agent.host.ipc.stats_page import CallPage
from agent.host.ipc.worker_api import QUEUE_SAID_EVERY_S, QUEUED, TokenBucket
from fleet.protocol.codes import CallOutcome
from fleet.protocol.manifest import Limits

WAITING_MAX: Final = 1024
"""Calls of an instance that wait for a worker; as many clients wait at its listener (`BACKLOG`)."""

KEPT_BYTES: Final = 8 * 1024 * 1024
"""Large bodies of an instance that are kept until they are whole, or one of them, by their limit: other clients wait.

Otherwise the clients of one instance could fill the memory of the process that serves all.
"""

AHEAD_MAX: Final = 4
"""Calls in one channel, the one that runs included (decision 15)."""

AHEAD_MAX_BYTES: Final = 16 * 1024

_READ_BYTES: Final = 128 * 1024
_ABANDON_S: Final = 0.1  # from CANCEL, which ends a guest that waits, to the interrupt, which ends one that computes
_TOTAL_MARGIN_S: Final = 0.25  # a call that its client delays ends before the supervisor would blame the guest
_NOTES_A_MINUTE: Final = 60
_WHY_MAX_CHARS: Final = 200  # of an error that may quote the worker: a larger report would end the router


class Reports(Protocol):
    """Receiver of what the supervisor is to know."""

    def report(self, message: FromRouter) -> None:
        """Send a message to the supervisor."""


class Channel:
    """Channel of a worker.

    Attributes:
        worker: number of the worker.
        flight: calls in it, of which the first runs.
        serves: whether it takes calls.
    """

    def __init__(self, calls: "InstanceCalls", terms: AddChannel, sock: socket.socket, page: CallPage) -> None:
        self.worker = terms.worker
        self.terms = terms
        self.page = page
        self.flight: deque[Call] = deque()
        self.serves = False
        self.is_open = True
        self._calls = calls
        self._sock = sock
        self._decoder = FrameDecoder(FROM_GUEST)
        self._frames: Iterator[Frame] | None = None  # read, and not handled yet
        self._unsent = bytearray()
        self._number = 0
        self._yields = 0  # requests of the supervisor's for which the worker has not left the loop yet
        self._yielding = False
        self._lost_place = False  # the store is about to end: everything written now is to be written again
        self._is_draining = False
        self._timer: asyncio.TimerHandle | None = None
        self._told = 0  # number of the call that was reported last
        self._started = 0  # number of the call of which a shared worker said that it begins
        self._began_behind = 0  # number of the call that was written behind a reported one
        # The worker says by itself when a guest has returned.
        self._is_prompt = terms.shared or calls.limits.concurrency > 1
        self._asked = 0  # number of the call of which was asked last whether its guest has returned
        self._suspect: tuple[Call, CallOutcome] | None = None  # the call that has failed, unless the one before it has
        sock.setblocking(False)
        asyncio.get_running_loop().add_reader(sock, self._readable)

    # Calls.

    @property
    def is_free(self) -> bool:
        """True while a call would begin at once."""
        return self._takes and not self.flight

    @property
    def _is_settling(self) -> bool:
        """True while the first call in the channel is answered: its guest may have returned, or go on."""
        return bool(self.flight) and self.flight[0].is_answered

    @property
    def _current(self) -> Call | None:
        """The call to which time is counted: the first that is not answered, if there is one."""
        if self._is_settling and len(self.flight) > 1:
            return self.flight[1]
        return self.flight[0] if self.flight else None

    @property
    def _takes(self) -> bool:
        return self.is_open and self.serves and not (self._yielding or self._yields or self._lost_place)

    def may_write_ahead(self, call: Call) -> bool:
        """Return whether a call may be written behind those that are in the channel."""
        if not self._takes or self.is_in_long_call or len(self.flight) >= AHEAD_MAX or not call.may_go_ahead:
            return False
        ahead_bytes = call.head_bytes + sum(each.head_bytes for each in self.flight)
        return ahead_bytes <= AHEAD_MAX_BYTES and self.flight[-1].is_written

    def may_write_behind(self, call: Call) -> bool:
        """Return whether a call may be written behind an answered one, with the question if its guest is back."""
        if not (self._takes and len(self.flight) == 1 and self._is_settling) or self.is_in_long_call:
            return False
        return call.is_kept and self.flight[0].is_written

    def take(self, call: Call) -> None:
        """Write a call; it begins at once, or when the one before it ends."""
        question = b"" if call.may_go_ahead else self._question()
        self.flight.append(call)
        call.channel = self
        self._write_call(call, question)
        if call is self._current:
            self._begin(call)

    def _write_call(self, call: Call, question: bytes = b"") -> None:
        self._number = self._number % 0xFFFFFFFF + 1
        call.number = self._number
        self.write(question + call.request_frames())

    def ask(self) -> None:
        """Ask whether the guest of an answered call has returned, where no frame of a next call will say it."""
        if len(self.flight) == 1:
            self.write(self._question())

    def _question(self) -> bytes:
        if not self._is_settling or self._is_prompt or self._asked == self.flight[0].number:
            return b""
        self._asked = self.flight[0].number
        return encode(Frame(Kind.ASK, self._asked))

    def _begin(self, call: Call) -> None:
        """Let a call begin, as far as can be known here."""
        call.began_ns = time.monotonic_ns()
        self.page.begin(call.began_ns, call.number)
        call.watch_client()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LONG_CALL_S, self._look)

    def _look(self) -> None:
        """Report a call once it takes long; one timer serves many calls."""
        self._timer = None
        call, loop = self._current, asyncio.get_running_loop()
        if call is None:
            return
        age_s = (time.monotonic_ns() - call.began_ns) / 1e9
        if age_s < LONG_CALL_S:
            self._timer = loop.call_later(LONG_CALL_S - age_s, self._look)
            return
        if call.is_answered and not self._is_prompt and self._asked != call.number:
            self.ask()
            self._timer = loop.call_later(LONG_CALL_S, self._look)
            return
        if self._told != call.number:
            self._told = call.number
            self._calls.reports.report(LongCall(self.worker, call.number))
            self._calls.note_queue()
        total_s = self._calls.limits.total_ms / 1000
        left_s = total_s - min(_TOTAL_MARGIN_S, total_s / 4) - age_s
        if left_s > 0:
            self._timer = loop.call_later(left_s, self._look)
        elif call.is_delayed_by_client and not call.is_answered:
            call.end_for_slow_client()

    def _end(self, settled: Settled) -> None:
        """Count the end of the first call, begin the next, and then serve the client, who may have another request."""
        call = self.flight[0]
        self.page.end(settled.outcome, self._age_us(call), error=settled.error)
        self._leave(call)
        settled.deliver()

    @staticmethod
    def _age_us(call: Call) -> int:
        return (time.monotonic_ns() - call.began_ns) // 1000

    def _leave(self, call: Call) -> None:
        """Take the first call, which has ended, from the channel, and begin the next."""
        self.flight.popleft()
        call.channel = None
        if self._suspect is not None and self._suspect[0] is call:
            self._suspect = None
        if self._timer is not None and self._told == call.number:
            self._timer.cancel()  # set for the end of this call
            self._timer = None
        if self.flight and self.flight[0].began_ns:
            return  # begun when this one was answered
        self.page.rest()
        if self.flight:
            self._begin(self.flight[0])

    def _answer(self, call: Call, end: heads.ResponseHead) -> None:
        """Serve the client of the first call, whose guest may go on."""
        self._lost_place = self._calls.reuses and end.problem is not None
        self._note_late_interrupts()
        self._clear_suspicion(call)
        settled = call.settle(end)
        self.page.answered(settled.outcome, self._age_us(call), error=settled.error)
        self.write(call.let_client_go())
        if len(self.flight) > 1:
            self._begin(self.flight[1])
        settled.deliver()

    def _return(self) -> None:
        """Take note that the guest has returned from the first call, which is answered."""
        call = self.flight[0]
        if self._told == call.number:
            self._yields += 1
        self._leave(call)

    def _note_late_interrupts(self) -> None:
        """Remember which call an interrupt of the first one, which is over for its client, could still hit."""
        if self.is_in_long_call:
            self._began_behind = self.flight[1].number if len(self.flight) > 1 else 0

    def _clear_suspicion(self, call: Call) -> None:
        """Blame the call before this one for a failure, as this one has not failed again."""
        if self._suspect is not None and self._suspect[0] is call:
            self.page.fail_later(self._suspect[1])
            self._suspect = None

    def cancel(self, call: Call) -> None:
        """Tell the guest that the client of its call has gone, and the supervisor if that does not end the call."""
        if call is self._current:
            self.write(encode(Frame(Kind.CANCEL, call.number)))
            asyncio.get_running_loop().call_later(_ABANDON_S, self._still_there, call)

    def _still_there(self, call: Call) -> None:
        if self.is_open and call is self._current and not call.is_answered:
            self._told = call.number
            self._calls.reports.report(CallAbandoned(self.worker, call.number))

    # Orders of the supervisor's.

    @property
    def is_in_long_call(self) -> bool:
        """True while the call that runs has been reported, or an answered one before it."""
        current = self._current
        return current is not None and self._told in {current.number, self.flight[0].number}

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
        self._calls.adopt(self.terms)
        self._calls.pump()

    def _go_on(self) -> None:
        """Do what waited for the channel to be empty."""
        if not self.is_open:
            return
        if self.flight:
            if self._yields or self._is_draining:
                self.ask()
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
        self._frames = self._decoder.feed(data)
        if not self._handle_frames():
            asyncio.get_running_loop().remove_reader(self._sock)
            asyncio.get_running_loop().call_soon(self._go_on_with_frames)

    def _go_on_with_frames(self) -> None:
        if not self.is_open:
            return
        if not self._handle_frames():
            asyncio.get_running_loop().call_soon(self._go_on_with_frames)
        elif self.is_open:
            asyncio.get_running_loop().add_reader(self._sock, self._readable)

    def _handle_frames(self) -> bool:
        """Handle frames that have come, not too many at once; return whether none is left."""
        assert self._frames is not None
        done = True
        try:
            for number, frame in enumerate(self._frames, 1):
                self._take(frame)
                if not self.is_open:
                    return True
                if number == FRAMES_A_TURN:
                    done = False
                    break
        except (FrameError, ValueError, struct.error) as error:
            self._calls.reports.report(ChannelBroken(self.worker, str(error)[:_WHY_MAX_CHARS]))
            self._lose()
            return True
        if done:
            if self.flight and not self._is_settling:
                self.flight[0].flush_soon()
            self._go_on()
            self._calls.pump()
        return done

    def _take(self, frame: Frame) -> None:
        if frame.kind is Kind.FAILED:
            self._resume_after_failure(frame.call, frame.payload)
            return
        if frame.kind is Kind.NUDGE:
            if not self._unsent:  # otherwise the guest wakes for what is on its way
                self.write(encode(frame))
            return
        if frame.kind is Kind.END and frame.call == 0 and self._yielding:
            self._yielding = False
            return
        if self._is_settling and self.flight[0].number != frame.call:
            self._return()
        if not self.flight or self.flight[0].number != frame.call:
            raise FrameError(f"a frame of call {frame.call}, which does not run")
        self._take_of_call(self.flight[0], frame)

    def _take_of_call(self, call: Call, frame: Frame) -> None:
        """Take a frame of the first call."""
        match frame.kind:
            case Kind.END if call.is_answered and not frame.payload:
                self._return()
            case kind if call.is_answered and kind is not Kind.CREDIT:
                raise FrameError(f"a frame of call {frame.call}, which is answered")
            case Kind.RESPONSE:
                call.respond(frame.payload)
            case Kind.BODY:
                call.take_body(frame.payload)
            case Kind.CREDIT:
                call.credited(more := CREDIT.unpack(frame.payload)[0])
                self._started = self._started if more else frame.call
            case Kind.ANSWERED:
                self._answer(call, heads.answer_head(frame.payload))
            case _:
                self._take_end(call, heads.answer_head(frame.payload))

    def _take_end(self, call: Call, end: heads.ResponseHead) -> None:
        self._lost_place = self._calls.reuses and end.problem is not None
        if self.is_in_long_call:
            self._yields += 1
            self._note_late_interrupts()
        self._clear_suspicion(call)
        self._end(call.settle(end))

    def _resume_after_failure(self, returned: int, payload: bytes) -> None:
        """End the call that failed, if one did, and write everything else anew for the next store.

        `returned`: number of the last call from which the worker knows that its guest has returned.
        """
        text, token = payload[:-TOKEN_BYTES], payload[-TOKEN_BYTES:]
        outcome, _, why = text.partition(b"\r\n")
        if len(token) != TOKEN_BYTES:
            raise FrameError("a failure without a token")
        self._lost_place = False
        self._forget_unsent()
        self.write(token)
        if self._yielding:  # written before the token, and so not read
            self._yields, self._yielding = self._yields + 1, False
        failed = self._failed_call(returned, outcome)
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

    def _failed_call(self, returned: int, outcome: bytes) -> Call | None:
        """Return the call that has failed, unless it was answered before; answered calls leave the channel."""
        if not self._is_settling:
            return self.flight[0] if outcome and self.flight else None
        answered, behind = self.flight[0], self._current
        self._return()
        if not outcome:
            return None
        knows = self._is_prompt or behind is answered  # the answered one has failed
        if not knows and (answered.number == returned or (behind and not behind.can_be_sent_again)):
            return behind
        if knows or not self._calls.reuses or self._asked == answered.number:
            self.page.fail_later(CallOutcome(outcome.decode()))
        else:
            assert behind is not None
            self._suspect = (behind, CallOutcome(outcome.decode()))
        return None

    def _was_meant_for_another(self, call: Call, outcome: bytes) -> bool:
        """Return whether a call was ended by an interrupt of the call before it: nobody has asked for its own."""
        late = outcome == CallOutcome.GUEST_TIMEOUT.encode()
        return late and call.number == self._began_behind and not self.is_in_long_call

    def _lose(self) -> None:
        """Give the calls in the channel up, or to another worker where they had not begun."""
        if self._is_settling:
            has_begun = len(self.flight) > 1 and self._asked != self.flight[0].number
            self._return()
        else:
            has_begun = True
        flight = list(self.flight)
        waits = not has_begun or (self.terms.shared and bool(flight) and flight[0].number != self._started)
        waits = waits and bool(flight) and flight[0].can_be_sent_again
        self.close()
        if self._is_draining:
            self._is_draining = False
            self._calls.reports.report(ChannelDrained(self.worker))
        self._calls.lose(self, running=[] if waits else flight[:1], behind=flight if waits else flight[1:])

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
        self._keeping: list[Call] = []  # large bodies until they are whole, see `KEPT_BYTES`
        self._to_keep: deque[Call] = deque()
        self._notes = TokenBucket(_NOTES_A_MINUTE)
        self._queue_said_s = -math.inf

    @property
    def request_max(self) -> int | None:
        """Largest body of a request; None for any, where bodies stream."""
        return self.limits.request_bytes if self.whole else None

    @property
    def idle_s(self) -> float:
        """Seconds that a client may keep its call waiting."""
        return self.limits.idle_ms / 1000

    @property
    def waiting(self) -> int:
        """Number of calls that wait for a worker."""
        return len(self._waiting)

    def call(self, client: Asker, exchange: Exchange) -> Call:
        """Return a new call, which is submitted once enough of its body has come."""
        return Call(self, client, exchange)

    def add(self, terms: AddChannel, sock: socket.socket, page: CallPage) -> Channel:
        """Add the channel of a worker; where none serves yet, calls already keep to its limits."""
        if not any(channel.serves for channel in self.channels):
            self.adopt(terms)
        channel = Channel(self, terms, sock, page)
        self.channels.append(channel)
        return channel

    def adopt(self, terms: AddChannel) -> None:
        """Keep to the limits of a channel that serves from now on."""
        self.limits, self.reuses, self.whole = terms.limits, terms.reuses, terms.whole

    @property
    def _latest(self) -> Channel:
        """Latest channel of those that serve, else of all: a worker of a version to come has nothing to do with it."""
        return next((channel for channel in reversed(self.channels) if channel.serves), self.channels[-1])

    def submit(self, call: Call) -> None:
        """Give a call to a worker, or let it wait."""
        if len(self._waiting) >= WAITING_MAX:
            call.refuse(503, f"{self.instance} has too many clients who wait")
            return
        self._waiting.append(call)
        self.pump()
        if not call.began_ns:
            self.note_queue()

    def note_queue(self) -> None:
        """Log, once in a while, that calls wait for others that take long, with as many workers as there may be."""
        serving = [channel for channel in self.channels if channel.serves]
        if len(serving) < self.limits.concurrency or not all(channel.is_in_long_call for channel in serving):
            return
        waits = self._waiting or any(len(channel.flight) > 1 for channel in serving)
        now_s = time.monotonic()
        if waits and now_s - self._queue_said_s > QUEUE_SAID_EVERY_S:
            self._queue_said_s = now_s
            self.note(QUEUED.format(self.limits.concurrency))

    def withdraw(self, call: Call) -> None:
        """Forget a call that waits."""
        with contextlib.suppress(ValueError):
            self._waiting.remove(call)

    def keep(self, call: Call) -> None:
        """Let a call keep a large body until it is whole, at once or in its turn."""
        self._to_keep.append(call)
        self._keep_next()

    def release(self, call: Call) -> None:
        """Take note that a call keeps no large body, or no longer."""
        for known in (self._keeping, self._to_keep):
            if call in known:
                known.remove(call)
        self._keep_next()

    def _keep_next(self) -> None:
        while self._to_keep and len(self._keeping) < max(1, KEPT_BYTES // max(1, self.limits.request_bytes)):
            self._keeping.append(self._to_keep.popleft())
            self._keeping[-1].keep_body()

    def pump(self) -> None:
        """Give waiting calls to workers."""
        while self._waiting:
            channel = self._choose(self._waiting[0])
            if channel is None:
                for each in self.channels:
                    each.ask()
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
            and (serving[0].may_write_ahead(call) or serving[0].may_write_behind(call))
        ):
            return serving[0]
        return None

    def lose(self, channel: Channel, *, running: list[Call], behind: list[Call]) -> None:
        """Give up the call that ran in a channel that has ended; the calls behind it had not begun."""
        self.channels.remove(channel)
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
            self._latest.page.count(outcome)

    def note(self, text: str) -> None:
        """Write a line to the instance's log, as far as there is room for it."""
        if self.channels and self._notes.take():
            self.reports.report(ChannelNote(self._latest.worker, text))

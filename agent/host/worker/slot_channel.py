"""Channel of a slot in a shared worker: its calls as frames, read and answered here, one call of all slots at a time.

A slot has no loop in its guest, as all slots have one thread. A request's body is whole before its guest begins. The
answer of a wasi:http guest goes out while it is written, by the watchdog's thread, as far as the router gives credit;
what is left after the call waits for credit while other slots have their turn. A guest may go on after its answer has
ended (`Kind.ANSWERED`); a slot always says when it has returned.
"""

import os
import select
import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

from agent.host.engine.adapter_abi import READ_BYTES, drain_stdout, stdout_pipe
from agent.host.ipc import frames, framing, heads
from agent.host.ipc.frames import INITIAL_CREDIT_BYTES, TO_GUEST, Frame, FrameDecoder, FrameError, Kind
from fleet.protocol.codes import CallOutcome

_READ_BYTES: Final = 256 * 1024
_CREDIT_STEP_BYTES: Final = INITIAL_CREDIT_BYTES // 4
_HIGH_BYTES: Final = 128 * 1024


class SlotStream:
    """Frames of a slot's channel. In a call the watchdog's thread uses it, otherwise the main thread."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.frames: deque[Frame] = deque()
        self.is_open = True
        self._decoder = FrameDecoder(TO_GUEST)
        self._token = b""
        self._data = b""

    def read(self) -> None:
        """Take what has come, without waiting."""
        try:
            data = self.sock.recv(_READ_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.is_open = False
            return
        if self._token:
            self._data += data
            before, found, data = self._data.partition(self._token)
            if not found:
                self._data = before[-len(self._token) :]
                return
            self._token = self._data = b""
        try:
            self.frames.extend(self._decoder.feed(data))
        except FrameError:
            self.is_open = False

    def write(self, data: bytes) -> None:
        """Send frames; the router always reads."""
        try:
            self.sock.sendall(data)
        except OSError:
            self.is_open = False

    def align(self, token: str) -> None:
        """Forget everything up to a token."""
        self.frames.clear()
        self._decoder, self._token, self._data = FrameDecoder(TO_GUEST), token.encode(), b""


class SlotResponse:
    """Answer to one call, given out while the guest writes it."""

    notes_problems = False
    """The router does."""

    def __init__(self, stream: SlotStream, call: int, request_trailers: bytes = b"") -> None:
        self.call = call
        self.request_trailers = request_trailers
        self.lock = threading.Lock()
        self.over = False
        """True once the call has ended: the watchdog uses it no more."""
        self.live = False
        """True while the watchdog moves bytes; before that, nothing does."""
        self.begun = False
        self.out = bytearray()
        self.read_bytes = 0
        """Bytes that the guest has written, its head included."""
        self.ended = ""
        """Why the guest is to end, or empty."""
        self.problem, self.failed = "", False
        self.said = b""
        """Words of the adapter at the answer's end, for the frame that ends it."""
        self.has_ended = False
        """True once the guest has finished its answer, of which there may still be something to send."""
        self.failure: tuple[CallOutcome, str] | None = None
        """Reason for the end of the guest after its answer."""
        self._said: bytes | None = None
        self._stream = stream
        self._frames = bytearray()
        self._answered = False
        self._credit = INITIAL_CREDIT_BYTES
        self._taken = bytearray()

    # On the watchdog's thread.

    def wait(self, most_ms: int) -> bool:
        """Wait until there is something to move; False after `most_ms`. Holds no lock: the call may end meanwhile."""
        poll = select.poll()
        if len(self.out) < _HIGH_BYTES:
            poll.register(stdout_pipe[0], select.POLLIN)
        if self._stream.is_open:
            poll.register(self._stream.sock, select.POLLIN)
        return any(not mask & select.POLLNVAL for _, mask in poll.poll(most_ms))

    def pump(self) -> None:
        """Move what can be moved, without waiting."""
        with self.lock:
            if self.over:
                return
            self._stream.read()
            self.heed()
            while len(self.out) < _HIGH_BYTES:
                try:
                    data = os.read(stdout_pipe[0], READ_BYTES)
                except BlockingIOError:
                    break
                self._take(data)
            self.send()

    def end(self, why: str) -> None:
        """Serve the client no further; discard what the guest still writes."""
        self.ended = self.ended or why
        self.out.clear()

    # On either thread.

    def heed(self) -> None:
        """Take credit for this call, and note that its client has gone; requests behind it stay."""
        kept = []
        for frame in self._stream.frames:
            if frame.call != self.call:
                kept.append(frame)
            elif frame.kind is Kind.CREDIT:
                self._credit += int.from_bytes(frame.payload, "little")
            elif frame.kind is Kind.CANCEL and not self._answered:
                self.end("gone")
        self._stream.frames = deque(kept)
        if not self._stream.is_open:
            self.end("gone")

    def _take(self, data: bytes) -> None:
        self.read_bytes += len(data)
        if self.ended or self.problem or self.has_ended:
            return
        if self.begun:
            self.out += data
            return
        self._taken += data
        if self._taken.startswith(b"\r\n"):  # the body was begun before the head was known
            self._begin(b"", 2)
        elif (end := self._taken.find(b"\r\n\r\n")) >= 0:
            self._begin(bytes(self._taken[: end + 2]), end + 4)
        elif len(self._taken) > frames.PAYLOAD_MAX_BYTES:
            self.problem = "its head is too large"

    def _begin(self, head: bytes, at: int) -> None:
        if len(head) > frames.PAYLOAD_MAX_BYTES:
            self.problem = "its head is too large"
            return
        self._frames += frames.encode(Frame(Kind.RESPONSE, self.call, head))
        self.begun = True
        self.out += self._taken[at:]
        self._taken.clear()

    def send(self) -> None:
        """Send as much as there is credit for, and the answer's end while the guest goes on."""
        size = min(len(self.out), self._credit)
        if size:
            self._credit -= size
            self._frames += frames.encode_body(self.call, bytes(self.out[:size]))
            del self.out[:size]
        if self.has_ended and not (self.out or self.ended or self._answered):
            self._answered = True
            self._frames += frames.encode(Frame(Kind.ANSWERED, self.call, self._last))
        if self._frames:
            self._stream.write(bytes(self._frames))
            self._frames.clear()

    # On the main thread.

    def end_answer(self, said: bytes) -> None:
        """Take the end of the answer, said by a guest that may go on; a second one counts for nothing."""
        with self.lock:
            if self.has_ended:
                return
            self._take(drain_stdout())
            head = heads.answer_head(said)
            if head.problem is not None:
                self.problem, self.failed = self.problem or head.problem, True
            elif not (self.begun or head.status):
                self.problem = self.problem or "no head"
            self._said, self.has_ended = said, True
            self.send()

    def rest(self) -> bytes:
        """Take what the guest wrote and nobody has sent."""
        with self.lock:
            self.over = True
        self._take(drain_stdout())
        return b""

    def native(self, status: int, fields: bytes, body: bytes) -> None:
        """Take the whole answer of a native guest."""
        self._taken += body
        self._begin(heads.native_head(status, fields, len(body)), 0)
        self.said = heads.WHOLE

    @property
    def end_of_call(self) -> bytes:
        """Payload of the frame that ends the call, and the answer if nothing has."""
        return b"" if self._answered else self._last

    @property
    def _last(self) -> bytes:
        if self.ended:
            return heads.CUT
        if self.problem and not self.begun and not self.failed:
            return heads.HEADLESS
        said = self.said if self._said is None else self._said
        # A guest may stand in the adapter's place.
        return said if len(said) <= frames.PAYLOAD_MAX_BYTES else heads.HEAD_TOO_LARGE


class SlotRequest:
    """Request whose body is on its way."""

    def __init__(self, call: int, head: bytes) -> None:
        self.call = call
        self.head = head
        self.body = bytearray()
        self.size = self.owed = 0
        self.trailers = b""


class SlotChannel:
    """Calls of one slot: which of its frames begin a call, and what is left of the last answer."""

    def __init__(self, sock: socket.socket, request_max: int, fail: Callable[[CallOutcome, str], str]) -> None:
        """`fail`: tells the router that a store has ended early, and returns the token behind which to read on."""
        self.stream = SlotStream(sock)
        self._request_max = request_max
        self._fail = fail
        self._request: SlotRequest | None = None
        self._answer: SlotResponse | None = None

    def read(self) -> None:
        """Take what has come. Raises `framing.GoneError`: the router, or this channel of it, is gone."""
        self.stream.read()
        if not self.stream.is_open:
            raise framing.GoneError("the channel has ended")

    def next(self) -> SlotRequest | Frame | None:
        """Return the next request that is whole, or the order to leave the loop; None if neither has come."""
        if self._answer is not None and not self._go_on(self._answer):
            return None
        while self.stream.frames:
            frame = self.stream.frames.popleft()
            if frame.kind is Kind.YIELD:
                return frame
            if frame.kind is Kind.WHOLE_REQUEST:
                return SlotRequest(frame.call, frame.payload)
            if frame.kind is Kind.REQUEST:
                self._request = SlotRequest(frame.call, frame.payload)
            elif self._request is not None and frame.call == self._request.call:
                whole = self._add(self._request, frame)
                if whole is not None:
                    return whole
        return None

    def _add(self, request: SlotRequest, frame: Frame) -> SlotRequest | None:
        """Add a frame to the request that is on its way; return that once it is whole."""
        match frame.kind:
            case Kind.BODY:
                request.size += len(frame.payload)
                if request.size <= self._request_max:
                    request.body += frame.payload
                request.owed += len(frame.payload)
                if request.owed >= _CREDIT_STEP_BYTES:
                    self.stream.write(
                        frames.encode(Frame(Kind.CREDIT, request.call, request.owed.to_bytes(4, "little")))
                    )
                    request.owed = 0
                return None
            case Kind.CANCEL:
                self._request = None
                self.end(request.call, heads.CUT)
                return None
            case Kind.END:
                self._request = None
                if request.size > self._request_max:
                    self.end(request.call, heads.REQUEST_TOO_LARGE)
                    return None
                request.trailers = frame.payload
                return request
            case _:
                return None

    def begin(self, call: int) -> None:
        """Say that a call begins, which may have waited for those of other slots."""
        self.stream.write(frames.encode(Frame(Kind.CREDIT, call, bytes(4))))

    def end(self, call: int, said: bytes) -> None:
        """End a call."""
        self.stream.write(frames.encode(Frame(Kind.END, call, said)))

    def answer(self, response: SlotResponse) -> None:
        """Send an answer, its end and what ended the guest behind it, or keep what there is no credit for yet."""
        self._answer = response
        self._go_on(response)

    def _go_on(self, response: SlotResponse) -> bool:
        response.heed()
        response.send()
        if response.out and not response.ended:
            return False
        self._answer = None
        if response.failure is None:
            self.end(response.call, response.end_of_call)
        else:
            self.fail(*response.failure)
        return True

    def fail(self, outcome: CallOutcome, why: str) -> None:
        """Say that the guest has ended, and read on behind what the router had sent to it."""
        self._request = self._answer = None
        self.stream.align(self._fail(outcome, why))

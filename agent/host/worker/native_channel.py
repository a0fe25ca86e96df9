"""Channel of a native guest: its calls as frames, read and answered here, since it has no adapter with a loop.

A body is whole before its guest begins, and an answer is whole before its first frame. Otherwise this is the loop of
components/adapter/channel.c: one call in hand, whole requests written ahead behind it, credit both ways, and a token to
find the place in the stream again after a call that failed.
"""

import socket
from collections import deque
from typing import Final

from agent.host.engine.guest import Turn
from agent.host.ipc import frames, heads
from agent.host.ipc.frames import INITIAL_CREDIT_BYTES, TO_GUEST, Frame, FrameDecoder, FrameError, Kind
from agent.host.worker.control_thread import ControlThread
from agent.host.worker.runner import GuestRunner

_READ_BYTES: Final = 256 * 1024
_CREDIT_STEP_BYTES: Final = INITIAL_CREDIT_BYTES // 4


class _ChannelEndedError(Exception):
    """The router, or this channel of it, is gone."""


class _CancelledError(Exception):
    """The client of the call in hand is gone."""


class NativeChannel:
    """Calls of one guest over the socket that is the process's standard input and output."""

    def __init__(self, runner: GuestRunner, control: ControlThread, sock: socket.socket) -> None:
        """`control` interrupts calls; `sock` is the channel."""
        self._runner = runner
        self._control = control
        self._sock = sock
        self._decoder = FrameDecoder(TO_GUEST)
        self._frames: deque[Frame] = deque()

    def serve(self, token: str) -> Turn:
        """Serve calls until there is a reason not to, other than a number of them.

        `token`: discard what the channel has before it.

        Raises:
            GuestError: the call in flight ended in a trap or a limit.
        """
        try:
            if token:
                self._align(token.encode())
            while True:
                frame = self._next()
                if frame.kind is Kind.YIELD:
                    return Turn.LEAVE
                if frame.kind in {Kind.REQUEST, Kind.WHOLE_REQUEST}:  # otherwise of a call that has ended
                    self._serve(frame)
        except (_ChannelEndedError, FrameError):
            return Turn.CHANNEL_ENDED

    def _serve(self, request: Frame) -> None:
        call = request.call
        try:
            body = self._body(call) if request.kind is Kind.REQUEST else b""
            if body is None:
                self._write(Frame(Kind.END, call, heads.REQUEST_TOO_LARGE))
            else:
                status, fields, answer = self._runner.answer(*heads.request_parts(request.payload), body, self._control)
                self._answer(call, status, fields, memoryview(answer))
        except _CancelledError:
            self._write(Frame(Kind.END, call, heads.CUT))
        self._control.ended(call)

    def _body(self, call: int) -> bytes | None:
        """Return the body of a request, or None if it is larger than the instance takes, once it has ended."""
        body, owed, most = bytearray(), 0, self._runner.limits.request_bytes
        while (frame := self._next_of(call)).kind is not Kind.END:
            if len(body) <= most:
                body += frame.payload
            owed += len(frame.payload)
            if owed >= _CREDIT_STEP_BYTES:
                self._write(Frame(Kind.CREDIT, call, owed.to_bytes(4, "little")))
                owed = 0
        return bytes(body) if len(body) <= most else None

    def _answer(self, call: int, status: int, fields: bytes, body: memoryview) -> None:
        head = heads.native_head(status, fields, len(body))
        if len(head) > frames.PAYLOAD_MAX_BYTES:
            self._write(Frame(Kind.END, call, heads.HEAD_TOO_LARGE))
            return
        out, credit = frames.encode(Frame(Kind.RESPONSE, call, head)), INITIAL_CREDIT_BYTES
        while len(body) > credit:
            self._send(out + frames.encode_body(call, body[:credit]))
            body = body[credit:]
            out, credit = b"", self._credit(call)
        self._send(out + frames.encode_body(call, body) + frames.encode(Frame(Kind.END, call, heads.WHOLE)))

    def _credit(self, call: int) -> int:
        """Wait for credit for the answer in hand. Raises `_CancelledError`."""
        while (frame := self._next_of(call)).kind is not Kind.CREDIT:
            pass
        return int.from_bytes(frame.payload, "little")

    def _next_of(self, call: int) -> Frame:
        """Return the next frame of the call in hand; whole requests behind it stay. Raises `_CancelledError`."""
        kept: list[Frame] = []
        try:
            while True:
                frame = self._next()
                if frame.kind is Kind.WHOLE_REQUEST:
                    kept.append(frame)
                elif frame.call == call and frame.kind is Kind.CANCEL:
                    raise _CancelledError
                elif frame.call == call:
                    return frame
        finally:
            self._frames.extendleft(reversed(kept))

    def _next(self) -> Frame:
        while not self._frames:
            self._frames.extend(self._decoder.feed(self._read()))
        return self._frames.popleft()

    def _align(self, token: bytes) -> None:
        self._frames.clear()
        self._decoder = FrameDecoder(TO_GUEST)
        data = b""
        while token not in data:
            data = data[-len(token) :] + self._read()
        self._frames.extend(self._decoder.feed(data.partition(token)[2]))

    def _read(self) -> bytes:
        try:
            data = self._sock.recv(_READ_BYTES)
        except OSError:  # reset: the router has ended with something unread
            data = b""
        if not data:
            raise _ChannelEndedError
        return data

    def _write(self, frame: Frame) -> None:
        self._send(frames.encode(frame))

    def _send(self, data: bytes) -> None:
        try:
            self._sock.sendall(data)
        except OSError as error:
            raise _ChannelEndedError from error

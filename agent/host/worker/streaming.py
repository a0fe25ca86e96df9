"""Streaming of wasi:http responses: a pipe in place of the worker's standard output, and its way to the client.

The engine passes the guest's output to the pipe, without a callback. A short response is read after the call and sent
whole, with its length. A longer one is streamed while the guest writes: the watchdog's thread moves it from the pipe to
the client's socket, in chunks unless the guest announced its length. The pipe is the buffer: a guest that is faster
than its client blocks in a write, and that time does not count as its own. A client that is gone, or takes nothing for
too long, ends the call, without blame for the guest.

One call at a time, so one `StreamingResponse` at a time. The watchdog uses it under its lock until the call is over,
the worker's main thread from then on.
"""

import os
import select
import socket
import threading
from typing import Final

from agent.host.engine import adapter_abi
from agent.host.engine.adapter_abi import READ_BYTES, drain_stdout, stdout_pipe
from agent.host.http import connection
from agent.host.http.connection import BadAnswerError, Request
from agent.host.http.pace import Pace, acknowledged
from agent.host.http.parser import HEAD_MAX_BYTES

_HIGH_BYTES: Final = 128 * 1024
_HEAD_MAX_BYTES: Final = HEAD_MAX_BYTES + 1024  # with the status and the end of it


class StreamingResponse:
    """Response to one request, streamed while the guest writes it."""

    notes_problems = True
    __slots__ = (
        *(
            "_bodiless",
            "_chunked",
            "_fd",
            "_left",
            "_moved",
            "_pace",
            "_sock",
            "_spooling",
            "_taken",
            "_taken_bytes",
            "_waited_ms",
            "begun",
            "ended",
            "failed",
            "live",
            "lock",
        ),
        *("most", "out", "over", "read_bytes", "problem", "request", "said", "sent_bytes", "stalled_ms", "trailers"),
    )

    def __init__(self, sock: socket.socket | None, request: Request, most: int) -> None:
        """`sock`: the client's, None for nobody; `most`: how long a body may be, in bytes."""
        self._sock = sock
        self._fd = -1 if sock is None else sock.fileno()
        self._taken = bytearray()
        self._spooling = self._bodiless = self._chunked = False
        self._left = -1  # bytes announced by the guest and not written yet; -1: none announced
        self.request = request
        self.most = most
        self.lock = threading.Lock()
        self.over = False
        """True once the call has ended: the watchdog uses it no more."""
        self.live = False
        """True while the watchdog moves bytes; before that, nothing does."""
        self.begun = False
        """True once some of the response was sent: no other can replace it."""
        self.out = bytearray()
        self.sent_bytes = 0
        self.read_bytes = 0
        """Bytes that the guest has written, its head included."""
        self.stalled_ms = 0
        self._pace = Pace()
        self._waited_ms = self._taken_bytes = self._moved = 0  # `_taken_bytes`: by the kernel; `_moved`: to the client
        self.ended = ""
        """Why the guest is to end: `gone`, `slow`, or empty."""
        self.problem = ""
        """Fault of the answer, as a sentence; `failed`: the guest says so itself, by the adapter."""
        self.failed = False
        self.trailers = self.said = b""

    @property
    def request_trailers(self) -> bytes:
        """Trailer fields of the request, as lines."""
        return self.request.trailers

    # On the watchdog's thread.

    def wait(self, most_ms: int) -> bool:
        """Wait until there is something to move; False after `most_ms`. Holds no lock: the call may end meanwhile."""
        poll = select.poll()
        if len(self.out) < _HIGH_BYTES:
            poll.register(stdout_pipe[0], select.POLLIN)
        if self.out and not self.ended:
            poll.register(self._fd, select.POLLOUT)
        return any(not mask & select.POLLNVAL for _, mask in poll.poll(most_ms))

    def pump(self) -> None:
        """Move what can be moved, without waiting."""
        with self.lock:
            while not self.over and len(self.out) < _HIGH_BYTES:
                try:
                    data = os.read(stdout_pipe[0], READ_BYTES)
                except BlockingIOError:
                    break
                self.read_bytes += len(data)
                self._take(data)
            if not self.over:
                self._send()

    def waited(self, ms: int, *, most_ms: int) -> None:
        """Count `ms` more of the call; end it for a client that has taken nothing for `most_ms`, or takes too little.

        The router, which is no TCP client, takes care of its own clients' pace.
        """
        if not self.out or self.ended or self._sock is None:
            self.stalled_ms = 0
            self._pace.is_slow(0, 0, None)
            return
        self._waited_ms += ms
        self.stalled_ms += ms
        moved = self._taken_bytes + acknowledged(self._sock)
        if moved != self._moved:
            self._moved, self.stalled_ms = moved, 0
        is_slow = self._sock.family != socket.AF_UNIX and self._pace.is_slow(self._waited_ms / 1000, moved, 0)
        if is_slow or self.stalled_ms > most_ms:
            self.end("slow")

    def end(self, why: str) -> None:
        """Serve the client no further; discard what the guest still writes."""
        self.ended = self.ended or why
        self.out.clear()

    # On either thread.

    def _take(self, data: bytes) -> None:
        if self.ended or self.problem:
            return
        if self.begun:
            self._frame(data)
            return
        before = max(0, len(self._taken) - 3)  # the end of a head may lie across two pieces
        self._taken += data
        if self._spooling or self._taken.startswith(b"\r\n"):
            self._spooling = True
            if len(self._taken) > self.most + 2:
                self.problem = f"a body of more than {self.most} bytes"
        elif self._taken.find(b"\r\n\r\n", before) >= 0:
            self._begin()
        elif len(self._taken) > _HEAD_MAX_BYTES:
            self.problem = f"more than {_HEAD_MAX_BYTES} bytes without the end of a head"
            self._taken.clear()

    def _begin(self) -> None:
        try:
            status, headers, body = adapter_abi.split_head(bytes(self._taken))
            fields = connection.guest_fields(status, headers, 0, self.most)
            length = connection.declared_length(headers)
        except (BadAnswerError, ValueError) as error:
            self.problem = str(error)
            return
        self._taken.clear()
        self._bodiless = self.request.method == b"HEAD" or status in connection.BODILESS
        self._chunked = length is None and not self.request.old
        self._left = -1 if length is None else length
        if length is None and self.request.old:
            self.request.keep_alive = False  # HTTP/1.0: an answer without a length ends with the connection
        self.out += connection.answer_head(
            status,
            fields,
            length=length,
            chunked=self._chunked,
            keep_alive=self.request.keep_alive,
            old=self.request.old,
        )
        self.begun = True
        self._frame(body)

    def _frame(self, body: bytes) -> None:
        self.sent_bytes += len(body)
        if self.sent_bytes > self.most:
            self.problem = f"a body of more than {self.most} bytes"
        elif self._left >= 0 and len(body) > self._left and not self._bodiless:
            self.problem = "a body longer than its content-length"
        elif body and not self._bodiless:
            self._left -= len(body) if self._left >= 0 else 0
            self.out += b"%x\r\n%b\r\n" % (len(body), body) if self._chunked else body

    def _send(self) -> None:
        while self.out and self._sock is not None:
            try:
                sent = self._sock.send(self.out, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                self.end("gone")
                return
            self._taken_bytes += sent
            self.stalled_ms = 0
            del self.out[:sent]

    # On the main thread, after the call.

    def rest(self) -> bytes:
        """Return what the guest wrote and nobody has sent: all of it, if nothing was sent."""
        with self.lock:
            self.over = True
        data = drain_stdout()
        self.read_bytes += len(data)
        if self.begun:
            self._take(data)
            return b""
        return bytes(self._taken) + data if self._taken else data

    def finish(self, problem: str = "") -> bytes:
        """Return what is still to be sent of a response that has begun; one with a problem is cut off."""
        self.problem = self.problem or problem
        if not self.problem and self._left > 0 and not self._bodiless:
            self.problem = "a body shorter than its content-length"
        if self.problem or self.ended:
            self.request.keep_alive = False
        elif self._chunked and not self._bodiless:
            self.out += b"0\r\n%b\r\n" % (self.trailers if self.request.takes_trailers else b"")
        return bytes(self.out)

"""Formats that host and adapter exchange: heads, error codes, standard-output pipe.

An exchange with a guest of wasi:http: what its heads look like, and where its answer's body goes.

It is one call: the request's head as a string in, a few words as a string back (components/adapter/wit/adapter.wit).
The request's body is the store's standard input. The answer's head and body are the process's own standard output:
written there by the engine without a callback, which would cost a change of threads for each chunk;
`agent.host.worker.slot_channel` says where they go. No wasmtime here, and no descriptor.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable
from typing import Final, Protocol

from agent.host.ipc.heads import (
    ERRORS,
    REQUEST_DENIED,
    ResponseHead,
    answer_head,
    request_head,
    split_head,
    utf8,
)
from fleet.component.wasi import OUTGOING_HANDLER, SOCKETS

__all__ = [
    "ERRORS",
    "PIPE_BYTES",
    "READ_BYTES",
    "REQUEST_DENIED",
    "Denials",
    "DenyOutgoing",
    "Requests",
    "ResponseHead",
    "answer_head",
    "catch_stdout",
    "drain_stdout",
    "request_head",
    "split_head",
    "stdout_pipe",
    "utf8",
]


class Requests(Protocol):
    """Outgoing requests as the adapter asks for them: functions of its interface `host`. None but `poll` may wait."""

    def begin(self, hops: int) -> int:
        """Begin a request of a call that came through `hops` neighbours on this device, and return its number."""

    def room(self, number: int) -> int:
        """Return how many bytes of its body are taken now."""

    def write(self, number: int, data: str) -> int:
        """Send a piece of its body."""

    def send(self, number: int, head: str) -> int:
        """Send it, with the body that it has."""

    def start(self, number: int, head: str) -> int:
        """Hand it over; its body goes on."""

    def finish(self, number: int, trailers: str) -> int:
        """End its body."""

    def abort(self, number: int) -> None:
        """Give it up within its body."""

    def head(self, number: int) -> str:
        """Return the head of its answer."""

    def read(self, number: int, most: int) -> str:
        """Return a piece of its answer's body."""

    def poll(self, wanted: str, wait: int) -> str:
        """Tell what is there of what the guest waits for; see the interface."""

    def close(self, number: int) -> None:
        """Forget a request that is not needed any more."""

    def reset(self) -> None:
        """Forget all requests: the call is over."""

    def ask(self, question: str) -> str:
        """Answer a question about sockets; see the interface `sockets`. Does not wait."""

    def renew(self) -> None:
        """Close all sockets: the instance that had them is gone."""


SOCKET_DENIED: Final = "!1"
"""Answer for a call of wasi:sockets that no grant allows: the case access-denied."""


class Denials:
    """Log of a guest that counts the calls denied for want of a grant, and names the first of each."""

    def __init__(self, log: Callable[[str], None], count: Callable[[], None] = lambda: None) -> None:
        """`count`: called for each."""
        self._log = log
        self._count = count
        self._named: set[str] = set()

    def __call__(self, text: str) -> None:
        """Log a line."""
        self._log(text)

    def deny(self, function: str, said: str) -> None:
        """Count a call; `said`: what was denied and why, for the log."""
        self._count()
        self.note(function, f"{said}; further ones are counted alone")

    def note(self, about: str, said: str) -> None:
        """Log a sentence, once for what it is about."""
        if about not in self._named:
            self._named.add(about)
            self._log(f"host: {said}")


class DenyOutgoing:
    """The requests of an instance that may send none."""

    def __init__(self, denials: Denials) -> None:
        self._denials = denials

    def begin(self, _hops: int) -> int:
        """See `Requests`."""
        return 1

    def room(self, _number: int) -> int:
        """See `Requests`."""
        return READ_BYTES

    def write(self, _number: int, _data: str) -> int:
        """See `Requests`."""
        return 0

    def send(self, _number: int, head: str) -> int:
        """Denied, and said in the log."""
        method, target, scheme, authority, *_ = head.partition("\r\n")[0].split(" ")
        said = f"{method} {scheme}://{authority}{target} is denied: no outgoing requests are granted"
        self._denials.deny(OUTGOING_HANDLER, said)
        return 1 + REQUEST_DENIED

    start = send

    def finish(self, _number: int, _trailers: str) -> int:
        """See `Requests`."""
        return 0

    def abort(self, _number: int) -> None:
        """See `Requests`."""

    def head(self, _number: int) -> str:
        """See `Requests`."""
        return f"error {REQUEST_DENIED}"

    def read(self, _number: int, _most: int) -> str:
        """See `Requests`."""
        return "."

    def poll(self, wanted: str, _wait: int) -> str:
        """See `Requests`."""
        return "1" * len(wanted.split())

    def close(self, _number: int) -> None:
        """See `Requests`."""

    def reset(self) -> None:
        """See `Requests`."""

    def ask(self, question: str) -> str:
        """Denied, and said in the log."""
        verb, _, what = question.partition("\n")[0].partition(" ")
        self._denials.deny(SOCKETS, f"{verb} {what[:80]} is denied: no sockets are granted")
        return SOCKET_DENIED

    def renew(self) -> None:
        """See `Requests`."""


PIPE_BYTES: Final = 1024 * 1024
READ_BYTES: Final = 64 * 1024

_OUT: Final = 1
_SET_PIPE_SIZE: Final = 1031

stdout_pipe: list[int] = []


def catch_stdout() -> None:
    """Put a pipe in place of standard output, before the cell is shut. Raises OSError where there can be none."""
    inner, outer = os.pipe2(os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a user has only so many large pipes: then guests stand still sooner
            fcntl.fcntl(inner, _SET_PIPE_SIZE, PIPE_BYTES)
        os.set_blocking(inner, False)
        os.dup2(outer, _OUT, inheritable=False)
    finally:
        os.close(outer)
    while stdout_pipe:
        os.close(stdout_pipe.pop())
    stdout_pipe.append(inner)


def drain_stdout() -> bytes:
    """Return what stands in the pipe; nothing where there is none."""
    pieces = []
    with contextlib.suppress(BlockingIOError):
        while stdout_pipe:
            pieces.append(os.read(stdout_pipe[0], PIPE_BYTES))
            if len(pieces[-1]) < READ_BYTES:
                break
    return b"".join(pieces)

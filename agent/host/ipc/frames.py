"""Frames of a channel: the stream socket between the router and the event loop in a worker's sandbox.

    u32 length of the payload, u8 kind, u32 call, payload, line feed     (integers little-endian)

The line feed is there for the engine: its standard output is line-buffered, so bytes that end in a line feed leave in
one write and need no flush. It also shows a peer that has lost its place in the stream.

No I/O and no wasmtime here: bytes in, frames out. Each end reads only the kinds that the other may send. Whatever else
arrives raises `FrameError`; the stream has then no next frame, and the channel must be closed.
"""

import enum
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

PAYLOAD_MAX_BYTES: Final = 64 * 1024
"""Payload of one frame at most; longer bodies take several. A head fits: `HEAD_MAX_BYTES` of the HTTP parser."""

INITIAL_CREDIT_BYTES: Final = 64 * 1024
"""Bytes of a body that each side may send for a call before the other has given credit."""

TOKEN_BYTES: Final = 16
"""Random bytes by which a worker finds its place in the stream again, see `Kind.FAILED`."""

HEADER: Final = struct.Struct("<IBI")
_END: Final = b"\n"
_CALL_MAX: Final = 2**32 - 1


class Kind(enum.IntEnum):
    """Kind of a frame; the numbers are part of the protocol with compiled adapters, so none is used again."""

    REQUEST = 1  # request head; a body follows
    WHOLE_REQUEST = 2  # request head; no body follows
    BODY = 3  # piece of a body, either way
    END = 4  # end of a body, with trailers; of a call also the answer's outcome, unless ANSWERED has said that
    CREDIT = 5  # u32: bytes of body that the peer may send more
    RESPONSE = 6  # response head; without payload where the guest begins its body before it has set its answer
    YIELD = 7  # leave the loop for one control message; call 0, as has the END that says it is done
    FAILED = 8  # the store has ended early: outcome of the call in flight, if it failed, and a token; its call is the
    # last one from which the worker knows that the guest has returned
    CANCEL = 9  # the client of the call in flight is gone
    NUDGE = 10  # call 0: from the worker's thread while its guest waits, and straight back, to wake the guest
    ANSWERED = 11  # end of an answer, as END says it, whose guest may go on: the call ends later
    ASK = 12  # has the guest returned from this call, which is answered? END without payload says that it has


TO_GUEST: Final = frozenset(
    {Kind.REQUEST, Kind.WHOLE_REQUEST, Kind.BODY, Kind.END, Kind.CREDIT, Kind.YIELD, Kind.CANCEL, Kind.NUDGE, Kind.ASK}
)
FROM_GUEST: Final = frozenset({Kind.RESPONSE, Kind.BODY, Kind.END, Kind.CREDIT, Kind.FAILED, Kind.NUDGE, Kind.ANSWERED})


class FrameError(ValueError):
    """The peer sent bytes that are no frame of its direction."""


class Frame(NamedTuple):
    """Frame of a call, whose number is `call`."""

    kind: Kind
    call: int
    payload: bytes = b""


def encode(frame: Frame) -> bytes:
    """Return the bytes of a frame.

    Raises:
        ValueError: the payload is longer than `PAYLOAD_MAX_BYTES`, or the number of the call has more than 32 bits.
    """
    if len(frame.payload) > PAYLOAD_MAX_BYTES:
        raise ValueError(f"a payload of {len(frame.payload)} bytes, at most {PAYLOAD_MAX_BYTES} fit in a frame")
    if not 0 <= frame.call <= _CALL_MAX:
        raise ValueError(f"call {frame.call} has more than 32 bits")
    return HEADER.pack(len(frame.payload), frame.kind, frame.call) + frame.payload + _END


def encode_body(call: int, data: bytes | memoryview) -> bytes:
    """Return the frames of a piece of a body of any length; none for no bytes."""
    pieces = range(0, len(data), PAYLOAD_MAX_BYTES)
    return b"".join(encode(Frame(Kind.BODY, call, bytes(data[at : at + PAYLOAD_MAX_BYTES]))) for at in pieces)


class FrameDecoder:
    """Incremental decoder of one direction. Keeps less than one frame between two calls of `feed`."""

    def __init__(self, kinds: frozenset[Kind]) -> None:
        """Accept only `kinds`: `TO_GUEST` or `FROM_GUEST`."""
        self._kinds = kinds
        self._rest = b""

    @property
    def within(self) -> bool:
        """True inside a frame: the end of the stream here cuts it."""
        return bool(self._rest)

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield the frames that end in `data`; take all of them before the next call.

        Raises:
            FrameError: what comes next is no frame that the peer may send.
        """
        data = self._rest + data if self._rest else data
        at = 0
        while len(data) - at >= HEADER.size:
            length, kind, call = HEADER.unpack_from(data, at)
            self._check(length, kind)
            end = at + HEADER.size + length
            if len(data) <= end:
                break
            if data[end : end + 1] != _END:
                raise FrameError(f"no line feed after the {length} bytes of a frame of kind {kind}")
            yield Frame(Kind(kind), call, data[at + HEADER.size : end])
            at = end + 1
        self._rest = data[at:]

    def _check(self, length: int, kind: int) -> None:
        """Refuse a header before anything of its payload is kept."""
        if kind not in self._kinds:
            raise FrameError(f"a frame of kind {kind}, which this peer may not send")
        if length > PAYLOAD_MAX_BYTES:
            raise FrameError(f"a frame of {length} bytes, at most {PAYLOAD_MAX_BYTES} are allowed")

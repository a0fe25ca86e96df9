"""Frames of a channel: what one end writes the other reads, however the stream is cut; nothing else is read."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.host.ipc import frames
from agent.host.ipc.frames import FROM_GUEST, HEADER, PAYLOAD_MAX_BYTES, TO_GUEST, Frame, FrameDecoder, FrameError, Kind

CALLS = st.integers(0, 2**32 - 1)


def framed(kinds):
    return st.builds(Frame, st.sampled_from(sorted(kinds)), CALLS, st.binary(max_size=300))


def cut(data, places):
    """The pieces of `data` between these places."""
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("kinds", [TO_GUEST, FROM_GUEST])
@given(data=st.data())
def test_frames_are_read_as_they_were_written_however_the_stream_is_cut(kinds, data):
    sent = data.draw(st.lists(framed(kinds), max_size=6))
    stream = b"".join(map(frames.encode, sent))
    decoder = FrameDecoder(kinds)
    pieces = cut(stream, data.draw(st.lists(st.integers(0, 5000), max_size=12)))
    assert [frame for piece in pieces for frame in decoder.feed(piece)] == sent
    assert not decoder.within


@given(frame=framed(TO_GUEST), missing=st.integers(1, 400))
def test_a_stream_that_ends_inside_a_frame_gives_no_frame_and_says_so(frame, missing):
    stream = frames.encode(frame)
    decoder = FrameDecoder(TO_GUEST)
    kept = stream[: max(1, len(stream) - missing)]
    assert list(decoder.feed(kept)) == []
    assert decoder.within


@given(st.binary(max_size=3 * PAYLOAD_MAX_BYTES // 2), CALLS)
def test_a_body_of_any_length_takes_as_many_frames_as_it_needs(body, call):
    read = list(FrameDecoder(TO_GUEST).feed(frames.encode_body(call, body)))
    assert b"".join(frame.payload for frame in read) == body
    assert {(frame.kind, frame.call) for frame in read} <= {(Kind.BODY, call)}
    assert len(read) == -(-len(body) // PAYLOAD_MAX_BYTES)


@given(st.binary(max_size=200), st.sampled_from([TO_GUEST, FROM_GUEST]))
def test_arbitrary_bytes_are_frames_or_an_error_and_never_more_than_came(noise, kinds):
    decoder = FrameDecoder(kinds)
    try:
        read = list(decoder.feed(noise))
    except FrameError:
        return
    assert noise.startswith(b"".join(map(frames.encode, read)))
    assert {frame.kind for frame in read} <= kinds


def header(*, length=0, kind=Kind.BODY, call=1):
    return HEADER.pack(length, kind, call)


@pytest.mark.parametrize(
    ("kinds", "stream", "why"),
    [
        (TO_GUEST, header(kind=0) + b"\n", "kind 0"),
        (TO_GUEST, header(kind=255) + b"\n", "kind 255"),
        (TO_GUEST, frames.encode(Frame(Kind.RESPONSE, 1, b"200\r\n")), "may not send"),
        (FROM_GUEST, frames.encode(Frame(Kind.REQUEST, 1)), "may not send"),
        (FROM_GUEST, frames.encode(Frame(Kind.WHOLE_REQUEST, 1)), "may not send"),
        (TO_GUEST, header(length=PAYLOAD_MAX_BYTES + 1), "at most 65536"),
        (FROM_GUEST, header(length=2**32 - 1), "at most 65536"),
        (TO_GUEST, header(length=2) + b"abc", "no line feed"),
    ],
)
def test_what_is_no_frame_is_refused_as_soon_as_its_header_shows_it(kinds, stream, why):
    with pytest.raises(FrameError, match=why):
        list(FrameDecoder(kinds).feed(stream))


def test_frames_before_one_that_is_refused_are_read():
    stream = frames.encode(Frame(Kind.BODY, 3, b"one")) + header(kind=0)
    read = FrameDecoder(TO_GUEST).feed(stream)
    assert next(read) == Frame(Kind.BODY, 3, b"one")
    with pytest.raises(FrameError):
        next(read)


@pytest.mark.parametrize(
    "frame", [Frame(Kind.BODY, 1, bytes(PAYLOAD_MAX_BYTES + 1)), Frame(Kind.BODY, 2**32), Frame(Kind.BODY, -1)]
)
def test_a_frame_that_does_not_fit_is_not_written(frame):
    with pytest.raises(ValueError, match=r"at most|32 bits"):
        frames.encode(frame)


def test_the_largest_frame_passes():
    largest = Frame(Kind.END, 2**32 - 1, bytes(PAYLOAD_MAX_BYTES))
    assert list(FrameDecoder(FROM_GUEST).feed(frames.encode(largest))) == [largest]

"""HTTP/1.1 by rows: raw bytes, what they are answered with, and whether the connection lives on. Each row twice:
through the router on the shared port, and at an instance's own port, so that neither takes what the other would not.
"""

import socket

import pytest
import support
from echo_guest import ECHO
from http_cases import HOST, KEPT, OK, ROWS, at, chunked, get, post
from support import Limits
from wire import Wire

from agent.host.ipc import host_api

LIMITS = Limits(request_bytes=1 << 20, response_bytes=1 << 20)


@pytest.fixture(scope="module")
def ways(_shared):
    """The port of each way in, and what stands before the path there."""
    own, host = support.free_port(), _shared()
    for run in (support.a_run("echo", 1, limits=LIMITS), support.a_run("alone", 1, port=own, limits=LIMITS)):
        assert isinstance(host.start(ECHO, run), host_api.Started)
    yield {"router": (host.port, b"/echo"), "own port": (own, b"")}
    for name in ("echo", "alone"):
        host.ask(host_api.Stop, instance=name)


@pytest.mark.parametrize("way", ["router", "own port"])
@pytest.mark.parametrize("row", ROWS)
def test_every_row_is_answered_as_it_stands(ways, way, row):
    raw, statuses, then = ROWS[row]
    port, prefix = ways[way]
    with Wire(port) as wire:
        wire.send(at(prefix, raw))
        assert [wire.answer()[0] for _ in statuses] == statuses
        if then == KEPT:
            wire.send(at(prefix, OK))
            assert wire.answer()[0] == 200
        else:
            assert wire.rest() == b""


@pytest.mark.parametrize("way", ["router", "own port"])
class TestWhatArrives:
    """The guest answers with the fields and the body that it was given."""

    def ask(self, ways, way, raw, **how):
        port, prefix = ways[way]
        with Wire(port) as wire:
            wire.send(at(prefix, raw))
            return wire.answer(**how)

    def test_trailers_are_no_fields_of_the_head(self, ways, way):
        raw = chunked(b"3\r\nabc\r\n0\r\nx-role: admin\r\nhost: other\r\n\r\n", b"x-role: guest")
        _, fields, body = self.ask(ways, way, raw)
        assert (fields["x-role"], fields["host"], body) == ("guest", "board", b"abc")

    def test_an_absolute_target_overrides_the_host(self, ways, way):
        _, fields, _ = self.ask(ways, way, get(target=b"http://elsewhere:81@/"))
        assert fields["host"] == "elsewhere:81"

    def test_white_space_around_a_value_is_not_the_value(self, ways, way):
        assert self.ask(ways, way, get(b"x-a: \t b c \t"))[1]["x-a"] == "b c"

    def test_sixteen_pieces_of_a_body_arrive_as_one(self, ways, way):
        pieces = [bytes([n]) * (n * 999 + 1) for n in range(16)]
        raw = chunked(b"".join(b"%x;n=%d\r\n%b\r\n" % (len(p), n, p) for n, p in enumerate(pieces)) + b"0\r\n\r\n")
        assert self.ask(ways, way, raw)[2] == b"".join(pieces)

    def test_an_answer_to_head_has_a_length_and_no_body(self, ways, way):
        port, prefix = ways[way]
        with Wire(port) as wire:
            wire.send(at(prefix, b"HEAD @/ HTTP/1.1\r\n" + HOST + b"\r\n" + OK))
            assert wire.answer(method="HEAD")[1]["content-length"] == "0"
            assert wire.answer()[0] == 200, "and the next answer begins right after it"

    def test_a_client_that_asks_first_is_told_in_its_turn(self, ways, way):
        port, prefix = ways[way]
        asking = post(b"expect: 100-continue", b"content-length: 2")
        with Wire(port) as wire:
            wire.send(at(prefix, OK + asking))
            assert wire.head()[0] == 200, "the answer before it comes first"
            assert wire.head()[0] == 100
            wire.send(b"hi")
            assert wire.answer()[2] == b"hi"

    def test_a_client_that_has_said_all_may_close_its_side(self, ways, way):
        port, prefix = ways[way]
        with Wire(port) as wire:
            wire.send(at(prefix, post(b"content-length: 2", body=b"hi")))
            wire.sock.shutdown(socket.SHUT_WR)
            assert wire.answer()[2] == b"hi"
            assert wire.rest() == b""

    def test_a_client_that_leaves_in_the_middle_is_nobody_elses_trouble(self, ways, way):
        port, prefix = ways[way]
        for cut in (b"GET", b"POST @/ HTTP/1.1\r\nhost: b\r\ncontent-length: 9\r\n\r\nab", b"POST @/ HTTP/1.1\r\nho"):
            with Wire(port) as wire:
                wire.send(at(prefix, cut))
        assert self.ask(ways, way, OK)[0] == 200


def test_a_client_that_asks_for_too_much_is_not_told_to_go_on(ways):
    """At its own port; the router does not know what an instance takes, and passes its refusal on."""
    with Wire(ways["own port"][0]) as wire:
        wire.send(at(b"", post(b"expect: 100-continue", b"content-length: 99999999")))
        assert wire.head()[0] == 413

"""Outgoing requests of one component, answered here and under `wasmtime serve` by the same peers, compared.

Accepted differences stand beside their cases: what the guest gets here, as its own answer says it.
"""

import contextlib
import socket

import pytest
import support
from peers import HANDLER, OK, Peer
from serve import serving

from agent.host.engine import adapter_abi
from agent.host.ipc import host_api
from fleet.protocol.manifest import Grants, Limits
from tests import packed
from tests.rotation import rotated

PROBE = packed.guest_file("probe")
HEAD = b"HTTP/1.1 200 OK\r\n"
EMPTY = b"content-length: 0\r\n\r\n"


def error(name):
    return b"error %d" % adapter_abi.ERRORS.index(name)


def broken(name):
    return b"\nbroken %d" % adapter_abi.ERRORS.index(name)


SAME = {
    "with a length": OK,
    "in chunks": HEAD + b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n",
    "in chunks with extensions": HEAD + b"transfer-encoding: chunked\r\n\r\n3;a=b\r\nabc\r\n0\r\n\r\n",
    "in chunks with trailers": HEAD + b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nx-sum: 1\r\n\r\n",
    "in chunks, in capitals": HEAD + b"Transfer-Encoding: Chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "until the end": HEAD + b"\r\nuntil the end",
    "HTTP/1.0 until the end": b"HTTP/1.0 200 OK\r\n\r\nuntil the end",
    "HTTP/1.0 with a length": b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nab",
    "nothing": HEAD + EMPTY,
    "204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "304": b"HTTP/1.1 304 Not Modified\r\netag: x\r\n\r\n",
    "304 with a length": b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n",
    "302": b"HTTP/1.1 302 Found\r\nlocation: /there\r\ncontent-length: 0\r\n\r\n",
    "404": b"HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\nno",
    "418": b"HTTP/1.1 418 I'm a teapot\r\n" + EMPTY,
    "500": b"HTTP/1.1 500 Oh\r\n" + EMPTY,
    "599": b"HTTP/1.1 599 Oh\r\n" + EMPTY,
    "999": b"HTTP/1.1 999 Oh\r\n" + EMPTY,
    "without a reason": b"HTTP/1.1 200\r\n" + EMPTY,
    "with an empty reason": b"HTTP/1.1 200 \r\n" + EMPTY,
    "lines that end with LF alone": b"HTTP/1.1 200 OK\ncontent-length: 2\n\nab",
    "an empty field": HEAD + b"x-empty:\r\n" + EMPTY,
    "white space around a value": HEAD + b"x-a: \t b \t\r\n" + EMPTY,
    "a field twice": HEAD + b"set-cookie: a=1\r\nset-cookie: b=2\r\n" + EMPTY,
    "names in capitals": HEAD + b"X-Shout: Yes\r\n" + EMPTY,
    "bytes that are no ASCII": HEAD + b"x-name: caf\xe9\r\n" + EMPTY,
    "connection: close": HEAD + b"connection: close\r\ncontent-length: 2\r\n\r\nab",
    "an offer to upgrade": HEAD + b"connection: upgrade\r\nupgrade: h2c\r\ncontent-length: 2\r\n\r\nab",
    "90 fields": HEAD + b"".join(b"x-%d: y\r\n" % each for each in range(90)) + EMPTY,
    "a field of 30 KiB": HEAD + b"x-long: " + b"y" * 30_000 + b"\r\n" + EMPTY,
    "100 first": b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
    "102 first": b"HTTP/1.1 102 Processing\r\n\r\n" + OK,
    "103 first": b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" + OK,
    "three informational ones": b"HTTP/1.1 100 -\r\n\r\nHTTP/1.1 103 -\r\n\r\nHTTP/1.1 103 -\r\n\r\n" + OK,
    "half a mebibyte": HEAD + b"content-length: 524288\r\n\r\n" + b"0123456789abcdef" * 32768,
    "a length and chunks": HEAD + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
    "a folded value": HEAD + b"x: a\r\n b\r\n" + EMPTY,
    "an informational one with a body": b"HTTP/1.1 103 -\r\ncontent-length: 3\r\n\r\nabc" + OK,
    "nonsense": b"nonsense\r\n\r\n",
    "HTTP/3.0": b"HTTP/3.0 200 OK\r\n" + EMPTY,
    "a status of four digits": b"HTTP/1.1 2000 OK\r\n" + EMPTY,
    "a status below 100": b"HTTP/1.1 099 OK\r\n" + EMPTY,
    "a field without a name": HEAD + b": x\r\n" + EMPTY,
    "a name with a space": HEAD + b"x y: z\r\n" + EMPTY,
    "two lengths that differ": HEAD + b"content-length: 1\r\ncontent-length: 2\r\n\r\nab",
    "a length that is no number": HEAD + b"content-length: two\r\n\r\nab",
    "a NUL in a value": HEAD + b"x: a\0b\r\n" + EMPTY,
}


FIELDS = HEAD + b"".join(b"x-%d: y\r\n" % each for each in range(120)) + EMPTY
HELLO = b"5\r\nhello\r\n0\r\n\r\n"
DIFFERENT = {
    "more than 100 fields": (FIELDS, error("HTTP-response-header-section-size")),
    "a field of 70 KiB": (HEAD + b"x: " + b"y" * 70_000 + b"\r\n" + EMPTY, error("HTTP-response-header-section-size")),
    "the same length twice": (
        HEAD + b"content-length: 2\r\ncontent-length: 2\r\n\r\nab",
        error("HTTP-protocol-error"),
    ),
    "a coding before the chunks": (
        HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n" + HELLO,
        error("HTTP-response-transfer-coding"),
    ),
    "a coding without chunks": (
        HEAD + b"transfer-encoding: gzip\r\n\r\nabc",
        error("HTTP-response-transfer-coding"),
    ),
    "101": (
        b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n",
        error("HTTP-upgrade-failed"),
    ),
    "chunks in HTTP/1.0": (b"HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + HELLO, b"200\n\nhello"),
    "an end before the head": (b"", error("connection-terminated")),
    "an end within the head": (HEAD, error("connection-terminated")),
    "an end within a body": (
        HEAD + b"content-length: 9\r\n\r\nhalf",
        b"200\ncontent-length=9\n\nhalf" + broken("HTTP-response-incomplete"),
    ),
    "an end within chunks": (
        HEAD + b"transfer-encoding: chunked\r\n\r\n9\r\nhalf",
        b"200\n\nhalf" + broken("HTTP-response-incomplete"),
    ),
    "chunks that are none": (
        HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        b"200\n\n" + broken("HTTP-protocol-error"),
    ),
}


class Answers:
    """A peer that answers every request so and hangs up."""

    def __init__(self, data):
        def behave(peer, connection):
            if peer.request(connection):
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                connection.recv(65536)
            connection.close()

        self._peer = Peer(behave)
        self.port = self._peer.port
        self.close = self._peer.close


@pytest.fixture(scope="module")
def theirs():
    with serving(PROBE, "-Scli") as port:
        yield port, ""


@pytest.fixture
def ours(host):
    grants = Grants(interfaces=HANDLER, outbound=("http://127.0.0.1:*", "http://127.0.0.0/8:*"))
    # A request that hangs is found by its client's time-out; before that, no limit of time ends it on a busy machine.
    run = support.a_run("asks", 1, grants=grants, limits=Limits(call_ms=60_000, idle_ms=60_000, total_ms=120_000))
    reply = host.start("probe", run)
    assert isinstance(reply, host_api.Started), reply
    return host.port, "/asks"


def ask(where, peer, how="get"):
    port, prefix = where
    return support.http(port, f"GET {prefix}/{how}?127.0.0.1:{peer.port}/ HTTP/1.1\r\nhost: board\r\n\r\n")[2]


def in_order(body):
    """The answer with its fields sorted: they come in another order there."""
    head, end, rest = body.partition(b"\n\n")
    first, *fields = head.split(b"\n")
    return [first, *sorted(fields)], end + rest


@pytest.mark.parametrize("case", rotated(SAME))
def test_a_component_gets_the_same_answer(ours, theirs, case):
    with contextlib.closing(Answers(SAME[case])) as peer:
        assert in_order(ask(ours, peer)) == in_order(ask(theirs, peer))


CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
TRAILING = {
    "one": CHUNKED + b"3\r\nabc\r\n0\r\nx-sum: 1\r\n\r\n",
    "several, of a large body": CHUNKED + b"20000\r\n" + bytes(0x20000) + b"\r\n0\r\nx-a: 1\r\nx-b: 2\r\n\r\n",
    "behind nothing": CHUNKED + b"0\r\nx-sum: 1\r\n\r\n",
    "none": CHUNKED + b"3\r\nabc\r\n0\r\n\r\n",
    "none of a body with its length": OK,
}


@pytest.mark.parametrize("how", ["get", "rest"])
@pytest.mark.parametrize("case", TRAILING)
def test_a_component_gets_the_trailers_of_an_answer_whether_it_reads_that_or_not(ours, theirs, case, how):
    with contextlib.closing(Answers(TRAILING[case])) as peer:
        here = in_order(ask(ours, peer, how))
        assert here == in_order(ask(theirs, peer, how))
    assert here[1].partition(b"\ntrailers\n")[1] == (b"" if "none" in case else b"\ntrailers\n")


def test_a_body_that_breaks_off_unread_is_an_error_in_place_of_its_trailers(ours):
    with contextlib.closing(Answers(CHUNKED + b"9\r\nhalf")) as peer:
        wrong = adapter_abi.ERRORS.index("HTTP-response-incomplete")
        assert ask(ours, peer, "rest") == b"200\n\n\nno trailers %d" % wrong


@pytest.mark.parametrize("case", rotated(DIFFERENT))
def test_a_difference_is_one_of_the_accepted(ours, theirs, case):
    data, expected = DIFFERENT[case]
    with contextlib.closing(Answers(data)) as peer:
        assert ask(ours, peer) == expected
        assert ask(theirs, peer) != expected

"""Reader of servers' responses: one response, whatever pieces its bytes come in."""

import pytest

from agent.host.http.response import HEAD_MAX_BYTES, INFORMATIONAL_MAX, ResponseError, ResponseParser

HELLO = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"


def parsed(data, *, method="GET", end=False, piece=None):
    parser = ResponseParser(method)
    for at in range(0, len(data), piece or len(data) or 1):
        parser.feed(data[at : at + (piece or len(data))])
    if end:
        parser.end()
    return parser


GOOD = [
    (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n", "GET",
     (200, b"ab", False)),
    (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n", "GET",
     (200, b"ab", False)),
    (HELLO, "GET", (200, b"hello", True)),
    (b"\r\n" + HELLO, "GET", (200, b"hello", True)),
    (b"HTTP/1.1 204 No Content\r\n\r\n", "GET", (204, b"", True)),
    (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n", "GET", (304, b"", True)),
    (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", "HEAD", (200, b"", True)),
    (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", "GET", (200, b"", True)),
    (b"HTTP/1.1 999 Own\r\ncontent-length: 0\r\n\r\n", "GET", (999, b"", True)),
    (b"HTTP/1.1 200\r\ncontent-length: 0\r\n\r\n", "GET", (200, b"", True)),
    (b"HTTP/1.1 200 OK\ncontent-length: 2\n\nab", "GET", (200, b"ab", True)),
    (b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nab", "GET", (200, b"ab", False)),
    (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nab", "GET", (200, b"ab", False)),
    (b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\nab", "GET", (200, b"ab", True)),
    (b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n", "GET",
     (200, b"ab", False)),
    (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2;x=y\r\nab\r\n1\r\nc\r\n0\r\nsum: 1\r\n\r\n", "GET",
     (200, b"abc", True)),
    (b"HTTP/1.1 200 OK\r\nconnection: upgrade\r\nupgrade: h2c\r\ncontent-length: 2\r\n\r\nab", "GET",
     (200, b"ab", True)),
]  # fmt: skip


@pytest.mark.parametrize("piece", [None, 1])
@pytest.mark.parametrize(("data", "method", "expected"), GOOD)
def test_a_response_is_read_to_its_end(data, method, expected, piece):
    parser = parsed(data, method=method, piece=piece)
    assert parser.complete
    assert (parser.status, bytes(parser.body), parser.reusable) == expected


@pytest.mark.parametrize("status", [*range(100, 101), *range(102, 200)])
def test_every_informational_response_is_skipped(status):
    early = b"HTTP/1.1 %d Early\r\nlink: </style.css>\r\n\r\n" % status
    parser = ResponseParser("GET")
    parser.feed(early)
    assert (parser.status, parser.complete, parser.reusable) == (0, False, False)
    parser.feed(early + HELLO)
    assert (parser.status, bytes(parser.body), parser.fields) == (200, b"hello", [("content-length", "5")])
    assert parser.reusable


@pytest.mark.parametrize("after", [b"x", HELLO, b"HTTP/1.1 103 Early\r\n\r\n", b"HTTP/1.1 408 Request Timeout\r\n\r\n"])
@pytest.mark.parametrize(("data", "method"), [(HELLO, "GET"), (HELLO[:-5], "HEAD"), (b"HTTP/1.1 204 -\r\n\r\n", "GET")])
def test_a_connection_with_anything_after_the_response_is_not_reusable(data, method, after):
    parser = ResponseParser(method)
    parser.feed(data + after)
    assert parser.complete
    assert not parser.reusable
    later = ResponseParser(method)
    later.feed(data)
    later.feed(after)
    assert not later.reusable


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"nonsense\r\n\r\n", "HTTP-protocol-error"),
        (b"HTTP/2.0 200 OK\r\ncontent-length: 0\r\n\r\n", "HTTP-protocol-error"),
        (b"HTTP/1.1 099 OK\r\n\r\n", "HTTP-protocol-error"),
        (b"HTTP/1.1 1000 OK\r\n\r\n", "HTTP-protocol-error"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n", "HTTP-protocol-error"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n", "HTTP-protocol-error"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: %b\r\n\r\n" % (b"9" * 4400), "HTTP-protocol-error"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", "HTTP-protocol-error"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n", "HTTP-response-transfer-coding"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n", "HTTP-response-transfer-coding"),
        (b"HTTP/1.1 103 -\r\ncontent-length: 3\r\n\r\n", "HTTP-protocol-error"),
        (b"HTTP/1.1 103 -\r\ntransfer-encoding: chunked\r\n\r\n", "HTTP-protocol-error"),
        (b"HTTP/1.1 101 Switching\r\n\r\n", "HTTP-upgrade-failed"),
        (b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n", "HTTP-upgrade-failed"),
        (b"HTTP/1.1 100 -\r\n\r\n" * (INFORMATIONAL_MAX + 1), "HTTP-protocol-error"),
        (b"HTTP/1.1 200 OK\r\nx: %b" % (b"y" * 2 * HEAD_MAX_BYTES), "HTTP-response-header-section-size"),
        (b"HTTP/1.1 200 OK\r\nx: %b\r\n\r\n" % (b"y" * HEAD_MAX_BYTES), "HTTP-response-header-section-size"),
        (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 101 + b"\r\n", "HTTP-response-header-section-size"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1;%b" % (b"y" * 2 * HEAD_MAX_BYTES),
         "HTTP-protocol-error"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n" + b"x: y\r\n" * 102,
         "HTTP-response-trailer-section-size"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("piece", [16 * 1024, 1000])
def test_what_is_no_response_is_an_error_with_its_name(data, error, piece):
    with pytest.raises(ResponseError) as caught:
        parsed(data, piece=piece)
    assert caught.value.error == error


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", "connection-terminated"),
        (b"HTTP/1.1 200 OK\r\n", "connection-terminated"),
        (b"HTTP/1.1 103 Early\r\n\r\n", "connection-terminated"),
        (HELLO[:-1], "HTTP-response-incomplete"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n", "HTTP-response-incomplete"),
    ],
)
def test_a_connection_that_ends_too_early_is_an_error(data, error):
    with pytest.raises(ResponseError) as caught:
        parsed(data, end=True)
    assert caught.value.error == error


def test_a_body_without_framing_ends_with_the_connection_and_only_so():
    parser = parsed(b"HTTP/1.1 200 OK\r\n\r\nhello")
    assert not parser.complete
    parser.end()
    assert (bytes(parser.body), parser.complete, parser.reusable) == (b"hello", True, False)

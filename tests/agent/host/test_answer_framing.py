"""Framing of guests' answers as clients see it: lengths, HEAD, HTTP/1.0, statuses and methods beyond the usual ones.

On an instance's own port and on the shared one, from a guest of either world.
"""

import socket

import pytest
import support

from agent.host.ipc import host_api
from tests.eventually import eventually

HELLO = '(data (i32.const 64) "\\c8\\00\\00\\00" "\\00\\00\\00\\00\\00\\00\\00\\00" "\\10\\00\\00\\00\\06\\00\\00\\00")'


def native(status, headers, body):
    """A guest of wasmfleet:http that answers so."""
    pointers = [200, len(headers), 200 + len(headers), len(body)]
    words = b"".join(each.to_bytes(4, "little") for each in (status, *pointers))
    text = support.wasm("hello").decode().partition("\n")[2]
    assert HELLO in text
    return text.replace(
        HELLO,
        f'(data (i32.const 64) "{support.hexed(words)}")\n(data (i32.const 200) "{support.hexed(headers + body)}")',
    )


def adapted(status, headers, body):
    """A guest of wasi:http whose adapter says so; without a body."""
    assert not body
    return support.in_place_of_the_adapter(b"%d whole\r\n%b\r\n" % (status, headers))


@pytest.fixture(params=["own port", "shared port"])
def start(host, request):
    """Start a guest; how to ask it with a request line's method and version."""

    def started(guest):
        shared = request.param == "shared port"
        port = None if shared else support.free_port()
        reply = host.start(guest, support.a_run("framed", 1, **({} if shared else {"port": port})))
        assert isinstance(reply, host_api.Started), reply

        def ask(method="GET", version="1.1", fields=b"", times=1):
            path = b"/framed/" if shared else b"/"
            line = b"%b %b HTTP/%b\r\nhost: x\r\n%b\r\n" % (method.encode(), path, version.encode(), fields)
            with socket.create_connection(("127.0.0.1", host.port if shared else port), timeout=30) as sock:
                answers = []
                for _ in range(times):
                    sock.sendall(line)
                    data = b""
                    while b"\r\n\r\n" not in data:
                        data += sock.recv(65536) or pytest.fail(f"closed after {data!r}")
                    head, _, body = data.partition(b"\r\n\r\n")
                    lines = head.decode("latin-1").lower().split("\r\n")
                    fields_of = dict(each.split(": ", 1) for each in lines[1:])
                    length = 0 if method == "HEAD" else int(fields_of.get("content-length", "0"))
                    while len(body) < length:
                        body += sock.recv(65536) or pytest.fail("closed in the body")
                    answers.append((int(lines[0].split()[1]), fields_of, body))
                return answers if times > 1 else answers[0]

        return ask

    return started


@pytest.mark.parametrize("guest", [native, adapted])
def test_an_answer_to_head_keeps_the_guests_length(start, guest):
    status, fields, body = start(guest(200, b"content-length: 1234\r\n", b""))("HEAD")
    assert (status, fields["content-length"], body) == (200, "1234", b"")


@pytest.mark.parametrize(
    ("guest", "length", "body"), [(native, 3, b"hello"), (native, 9, b"hello"), (native, 5, b""), (adapted, 5, b"")]
)
def test_a_body_that_is_not_as_long_as_it_says_is_an_error_of_client_and_log(host, start, guest, length, body):
    status, _, said = start(guest(200, b"content-length: %d\r\n" % length, body))()
    words = f"a body of {len(body)} bytes, its content-length says {length}"
    assert (status, words in said.decode()) == (502, True)
    eventually(lambda: any(words in line for line in host.lines_of("framed")), "the log says it")


def test_two_lengths_that_differ_are_an_error(host, start):
    status, _, said = start(native(200, b"content-length: 5\r\ncontent-length: 6\r\n", b"hello"))()
    words = "a content-length of 5, and one of 6"
    assert (status, words in said.decode()) == (502, True)
    eventually(lambda: any(words in line for line in host.lines_of("framed")), "the log says it")


def test_the_same_length_twice_is_no_error(start):
    assert start(native(200, b"content-length: 5\r\ncontent-length: 5\r\n", b"hello"))()[::2] == (200, b"hello")


def test_a_length_that_is_right_is_no_error(start):
    assert start(native(200, b"content-length: 5\r\n", b"hello"))()[::2] == (200, b"hello")


def test_a_client_of_http_1_0_that_asks_for_it_is_told_that_its_connection_is_kept(start):
    ask = start(native(200, b"", b"hello"))
    for status, fields, body in ask(version="1.0", fields=b"connection: keep-alive\r\n", times=3):
        assert (status, fields["connection"], body) == (200, "keep-alive", b"hello")
    assert ask(version="1.0")[1]["connection"] == "close"
    assert "connection" not in ask()[1]


@pytest.mark.parametrize("status", [100, 199, 600, 999])
def test_a_status_of_no_final_response_is_named(host, start, status):
    got, _, said = start(adapted(status, b"", b""))()
    assert got == 502
    assert f"status {status}" in said.decode()
    eventually(lambda: any(f"status {status}" in line for line in host.lines_of("framed")), "the log says it")


@pytest.mark.parametrize("method", ["BREW", "FOO", "get", "G!#$%&'*+-.^_`|~", "X" * 60])
def test_a_method_that_nobody_knows_is_not_implemented(start, method):
    assert start(native(200, b"", b"hello"))(method)[0] == 501


@pytest.mark.parametrize("method", ["", "\x16\x03\x01", "G\0T", "X" * 100])
def test_what_is_no_method_is_no_request(start, method):
    assert start(native(200, b"", b"hello"))(method)[0] == 400

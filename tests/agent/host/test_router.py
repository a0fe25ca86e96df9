"""Shared port: requests and responses pass the router unchanged, whatever their framing."""

import os
import signal
import socket
import subprocess
import sys

import pytest
import support
from echo_guest import ECHO
from host_processes import lanes_of
from support import Grants, Limits

from agent.host.ipc import host_api
from agent.host.sandbox import seccomp


@pytest.fixture
def echo(host):
    """An instance that answers with the request's header fields and body, behind the router."""
    host.start(ECHO, support.a_run("echo", 1, limits=Limits(request_bytes=1 << 20)))
    return host


def test_a_request_arrives_as_it_was_sent(echo):
    status, headers, body = support.http(
        echo.port,
        b"POST /echo/x?y HTTP/1.1\r\nHost: board\r\nX-Mine: 1\r\nx-forwarded-prefix: /forged\r\n"
        b"content-length: 5\r\n\r\nhello",
    )
    assert (status, body) == (200, b"hello")
    assert (headers["x-mine"], headers["host"], headers["x-forwarded-prefix"]) == ("1", "board", "/echo")


def test_bodies_of_every_framing_and_size(echo):
    body = bytes(range(256)) * 3000
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:7], body[7:100_000], body[100_000:]))
    head = b"POST /echo/ HTTP/1.1\r\nhost: x\r\n"
    with socket.create_connection(("127.0.0.1", echo.port), timeout=30) as kept:
        for _ in range(2):
            assert support.http(echo.port, head + b"content-length: %d\r\n\r\n" % len(body) + body, kept)[2] == body
            chunked = head + b"transfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
            assert support.http(echo.port, chunked, kept)[2] == body


def test_an_answer_of_the_routers_own_tells_a_client_of_http_1_0_that_its_connection_is_kept(host):
    """Such a client waits for the connection's end unless the answer says otherwise."""
    with socket.create_connection(("127.0.0.1", host.port), timeout=30) as kept:
        for _ in range(2):
            status, headers, _ = support.http(
                host.port, b"GET /nobody/ HTTP/1.0\r\nhost: x\r\nconnection: keep-alive\r\n\r\n", kept
            )
            assert (status, headers["connection"]) == (404, "keep-alive")
    status, headers, _ = support.http(host.port, b"GET /nobody/ HTTP/1.0\r\nhost: x\r\n\r\n")
    assert (status, headers["connection"]) == (404, "close")


def test_requests_sent_at_once_are_answered_in_their_order(echo):
    requests = b"".join(
        b"POST /echo/ HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\n%d" % n
        if n % 3
        else b"GET /nobody/ HTTP/1.1\r\nhost: x\r\n\r\n"
        for n in range(9)
    )
    with socket.create_connection(("127.0.0.1", echo.port), timeout=30) as sock:
        sock.sendall(requests)
        data = b""
        while data.count(b"HTTP/1.1 ") < 9 or not data.endswith(b"8"):
            data += sock.recv(65536) or pytest.fail(f"closed after {data!r}")
    statuses = [part[:3] for part in data.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"404", b"200", b"200"] * 3
    assert [part[-1:] for part in data.split(b"HTTP/1.1 ")[1:] if part.startswith(b"200")] == [
        b"1",
        b"2",
        b"4",
        b"5",
        b"7",
        b"8",
    ]


def test_head_and_http_1_0_and_close(echo):
    with socket.create_connection(("127.0.0.1", echo.port), timeout=30) as sock:
        sock.sendall(b"HEAD /echo/ HTTP/1.1\r\nhost: x\r\n\r\nGET /echo/ HTTP/1.0\r\nhost: x\r\n\r\n")
        data = b""
        while more := sock.recv(65536):
            data += more
    assert data.count(b"HTTP/1.1 200 OK") == 2, "and then it was closed, as HTTP/1.0 has it"
    with socket.create_connection(("127.0.0.1", echo.port), timeout=30) as sock:
        support.http(echo.port, "GET /echo/ HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", sock)
        assert sock.recv(1) == b""


def test_a_client_that_asks_first_is_told_to_go_on(echo):
    with socket.create_connection(("127.0.0.1", echo.port), timeout=30) as sock:
        sock.sendall(b"POST /echo/ HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n")
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert support.http(echo.port, b"ok", sock)[2] == b"ok"


def test_a_body_that_is_too_large_is_refused_by_the_instance_through_the_router(echo):
    head = b"POST /echo/ HTTP/1.1\r\nhost: x\r\ncontent-length: 3000000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", echo.port), timeout=30) as sock:
        sock.sendall(head + b"x" * 1_200_000)
        assert support.read_answer(sock)[0] == 413


def test_an_instance_that_dies_in_a_call_is_a_502_and_nobody_elses_trouble(echo):
    echo.start("spin", support.a_run("bad", 1, limits=Limits(call_ms=20_000)))
    with socket.create_connection(("127.0.0.1", echo.port), timeout=30) as sock:
        sock.sendall(b"POST /bad/ HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
        assert support.http(echo.port, "GET /echo/ HTTP/1.1\r\nhost: x\r\n\r\n")[0] == 200
        lane = max(lanes_of(echo))  # the one started last
        os.kill(lane, signal.SIGKILL)
        assert support.read_answer(sock)[0] == 502
        # The client's connection is as good as before.
        assert support.http(echo.port, "GET /echo/ HTTP/1.1\r\nhost: x\r\n\r\n", sock)[0] == 200


def test_a_request_that_was_ended_for_waiting_too_long_is_not_run_a_second_time(host):
    """The worker ends with its request, and looks like one that ended before it had read it."""
    grants = Grants(interfaces=("wasi:io", "wasi:clocks"))
    run = support.a_run("waits", 1, grants=grants, limits=Limits(idle_ms=500))
    assert isinstance(host.start("sleep", run), host_api.Started)
    status, _, body = support.http(host.port, "GET /waits/ HTTP/1.1\r\nhost: x\r\n\r\n")
    assert (status, body) == (502, b"waits ended before it answered\n")
    host.event(lambda event: isinstance(event, host_api.Changed) and event.instance == "waits")
    health = host.health("waits")
    assert (health.calls, health.restarts) == ({"guest-timeout": 1}, 1)


CONFINED = """
import errno, socket
from agent.host.sandbox import sandbox

kept = socket.socket(socket.AF_UNIX)
sandbox.apply(sandbox.router_spec())
for attempt in (lambda: socket.socket(socket.AF_UNIX), lambda: kept.connect("there")):
    try:
        attempt()
    except OSError as error:
        print(errno.errorcode[error.errno])
    else:
        print("done")
"""


@pytest.mark.skipif(not seccomp.AVAILABLE, reason="no seccomp")
def test_whoever_takes_the_router_over_can_make_and_connect_no_socket():
    done = subprocess.run([sys.executable, "-c", CONFINED], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["EPERM", "EPERM"]

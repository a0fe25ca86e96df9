"""Clients that send or read a byte now and then, on running hosts with a shorter window."""

import os
import socket
from pathlib import Path

import pytest
import support

from agent.host.ipc import host_api

HASTY = Path(__file__).with_name("hasty")
PATHS = os.pathsep.join([str(HASTY), *filter(None, [os.environ.get("PYTHONPATH")])])
HEAD = b"POST /web/echo HTTP/1.1\r\nhost: x\r\ncontent-length: 200000\r\n\r\n"
GET = b"GET /web/ HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    with support.shared_host(tmp_path_factory.mktemp("host"), env={"PYTHONPATH": PATHS}) as host:
        yield host


def started(host, port=None):
    """Start an instance that answers with the body of its request, in place of the one before."""
    if any(one.instance == "web" for one in host.ask(host_api.Status).instances):
        host.ask(host_api.Stop, instance="web")
    reply = host.start("probe", support.a_run("web", 1, port=port))
    assert isinstance(reply, host_api.Started), reply


def trickled(sock, begin, piece):
    """Send a piece five times a second; return what the host says, nothing if it only hangs up."""
    sock.sendall(begin)
    sock.settimeout(0.2)
    for _ in range(300):
        try:
            return sock.recv(1000)
        except TimeoutError:
            sock.sendall(piece)
        except ConnectionError:
            return b""
    raise AssertionError("it holds the connection for ever")


@pytest.mark.parametrize("own_port", [False, True])
@pytest.mark.parametrize("begin", [b"GET /web/", HEAD], ids=["head", "body"])
def test_who_sends_a_byte_now_and_then_holds_no_connection(host, own_port, begin):
    port = support.free_port() if own_port else None
    started(host, port)
    with socket.create_connection(("127.0.0.1", port or host.port), timeout=60) as slow:
        assert trickled(slow, begin, b"x").startswith(b"HTTP/1.1 408 ")
    assert support.http(port or host.port, GET)[0] == 200


def test_64_kbit_s_are_enough(host):
    started(host)
    body = b"x" * 16_000
    with socket.create_connection(("127.0.0.1", host.port), timeout=60) as slow:
        said = trickled(slow, HEAD.replace(b"200000", b"16000"), body[: 8_000 // 5])
        assert said.startswith(b"HTTP/1.1 200 ")

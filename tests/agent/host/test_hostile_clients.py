"""Hostile clients on the shared port, each with one way to do harm, beside a good client of a neighbour.

Whatever they do, each answer of the neighbour is right, a new client is served afterwards, and the router is the one of
before, with the memory of before. The good client's p99 is printed beside each kind, and not judged.
"""

import contextlib
import os
import resource
import socket
import struct

import pytest
import support
from host_processes import forks
from neighbour import GROWTH_MAX_BYTES, Neighbour, private_bytes
from support import Grants, Limits

from agent.host.ipc import host_api
from tests.eventually import eventually

CONNECTIONS = 8000
DESCRIPTORS = CONNECTIONS + 500
STEPS = 20
GET = b"GET /bad/count HTTP/1.1\r\nhost: x\r\n\r\n"
LONG_HEAD = b"GET /bad/count HTTP/1.1\r\nhost: x\r\n" + b"x-long: " + b"y" * (1 << 20)
UPLOAD = b"POST /bad/echo HTTP/1.1\r\nhost: x\r\ncontent-length: 100000000\r\n\r\n"


class Crowd:
    """Clients of the shared port that wait for nothing."""

    def __init__(self, stack, port):
        self._stack, self._port = stack, port
        self.socks = []

    def join(self, count, first=b"", **options):
        """Connect some, and send what the port takes of their first bytes."""
        for _ in range(count):
            sock = self._stack.enter_context(socket.socket())
            if options.get("reads") is False:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect(("127.0.0.1", self._port))
            self.socks.append(sock)
        self.send(first)

    def send(self, data):
        """Send as much as each connection takes now."""
        for sock in self.socks:
            with contextlib.suppress(OSError):
                sock.send(data)

    def leave(self, *, reset=False):
        """Hang up; with `reset`, without waiting for anything."""
        for sock in self.socks:
            if reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        self.socks.clear()


def slow_heads(crowd):
    crowd.join(300, b"GET /bad/count HTTP/1.1\r\nhost: x\r\nx-slow: ")
    for _ in range(STEPS):
        crowd.send(b"y")
        yield


def slow_bodies(crowd):
    crowd.join(100, UPLOAD)
    for _ in range(STEPS):
        crowd.send(b"y")
        yield


def readers_that_do_not_read(crowd):
    crowd.join(100, b"GET /bad/large/4 HTTP/1.1\r\nhost: x\r\n\r\n", reads=False)
    for _ in range(STEPS):
        yield


def endless_heads(crowd):
    for _ in range(STEPS):
        crowd.join(10, LONG_HEAD)
        yield


def huge_bodies(crowd):
    crowd.join(20, UPLOAD)
    for _ in range(STEPS * 4):
        crowd.send(b"z" * (1 << 18))
        yield


def pipelined_requests(crowd):
    crowd.join(20)
    for _ in range(STEPS):
        crowd.send(GET * 500)
        yield


def pipelined_refusals(crowd):
    crowd.join(20)
    for _ in range(STEPS):
        crowd.send(b"GET /nobody/ HTTP/1.1\r\nhost: x\r\n\r\n" * 500)
        yield


def half_closed(crowd):
    for number in range(STEPS):
        crowd.join(20, GET if number % 2 else GET[: len(GET) // 2])
        for sock in crowd.socks[-20:]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
        yield


def resets(crowd):
    for number in range(STEPS):
        crowd.join(100, (b"", GET, GET[:20], UPLOAD + b"z" * 1000)[number % 4])
        yield
        crowd.leave(reset=True)


def no_http_at_all(crowd):
    for _ in range(STEPS):
        crowd.join(20, b"\x16\x03\x01" + os.urandom(4000))
        yield


def eight_thousand_connections(crowd):
    for _ in range(STEPS):
        crowd.join(CONNECTIONS // STEPS)
        yield
    for _ in range(STEPS):
        yield


KINDS = {
    kind.__name__.replace("_", " "): kind
    for kind in (
        *(slow_heads, slow_bodies, readers_that_do_not_read, endless_heads, huge_bodies, pipelined_requests),
        *(pipelined_refusals, half_closed, resets, no_http_at_all, eight_thousand_connections),
    )
}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A host for this file alone, with an instance that anybody may ask."""
    with support.shared_host(tmp_path_factory.mktemp("clients")) as host:
        limits = Limits(requests_per_instance=1000, request_bytes=1 << 20)
        grants = Grants(interfaces=("wasi:http/outgoing-handler",))
        assert isinstance(host.start("probe", support.a_run("bad", 1, grants=grants, limits=limits)), host_api.Started)
        yield host


@pytest.fixture(scope="module")
def beside(host):
    neighbour = Neighbour(host, shared=True)
    yield neighbour
    neighbour.close()


@pytest.fixture
def descriptors():
    """Room for as many connections."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < DESCRIPTORS:
        pytest.skip(f"this user may have {before[1]} descriptors, the test needs {DESCRIPTORS}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], DESCRIPTORS), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def is_served(host):
    """Whether a new client gets the neighbour's answer."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", host.port), timeout=20) as sock:
        head = b"POST /neighbour/ HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nnew"
        return support.http(host.port, head, sock=sock)[::2] == (200, b"new")
    return False


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_clients_take_no_answer_from_others(host, beside, kind, capsys, descriptors):
    support.TESTS.append(kind)
    own = forks(host) | {host.process.pid}
    before, since, first = private_bytes(own), host.health("neighbour").since, len(beside.took_s)
    with contextlib.ExitStack() as stack:
        crowd = Crowd(stack, host.port)
        for _ in KINDS[kind](crowd):
            beside.asked()
        crowd.leave()
    eventually(lambda: is_served(host), "a new client is served")
    beside.asked()
    assert beside.wrong == []
    health = host.health("neighbour")
    assert (health.since, health.restarts, health.errors) == (since, 0, 0)
    assert forks(host) | {host.process.pid} == own
    assert private_bytes(own) - before < GROWTH_MAX_BYTES
    took = sorted(beside.took_s[first:])
    with capsys.disabled():
        print(f"\n{kind}: neighbour's p99 {took[len(took) * 99 // 100] * 1000:.1f} ms of {len(took)}")

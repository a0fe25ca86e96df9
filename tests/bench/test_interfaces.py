"""The cost of a call of each interface, printed; run by `make bench`. Nothing here asserts a time.

A row is the median of requests that make the call once, less the median of the same guest's requests without it, or of
a guest's that does nothing: what the call adds to a request, with everything that it waits for.
"""

import socket
import statistics
import struct
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "agent" / "host"))
sys.path.insert(0, str(Path(__file__).parent))

import support
from peers import Peer
from rates import row

from agent.host.ipc import host_api
from fleet.protocol.manifest import Grants, Limits
from tests.agent.host import pairs_guest

pytestmark = [pytest.mark.bench, pytest.mark.timeout(300)]

REQUESTS = 400
LIMITS = Limits(call_ms=20_000, log_lines_per_minute=60_000, daily_written_bytes=1 << 40, storage_bytes=1 << 30)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    with support.shared_host(tmp_path_factory.mktemp("bench")) as running:
        yield running


@pytest.fixture(scope="module")
def nothing(host):
    """Median of a request that makes no call, in microseconds."""
    return median_us(started(host, "hello", Grants()))


def started(host, guest, grants, **more):
    name = f"bench-{guest[:8].strip('(')}" if guest.isascii() and len(guest) < 40 else "bench-pairs"
    port = support.free_port()
    reply = host.start(guest, support.a_run(name, 1, port=port, grants=grants, limits=LIMITS, **more))
    assert isinstance(reply, host_api.Started), reply
    return port


def median_us(port, body=b"", path="/", accepted=(200,), requests=REQUESTS):
    """Median of a request on a kept connection, in microseconds; tells a refusal by its status."""
    request = b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (path.encode(), len(body), body)
    took = []
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        for _ in range(requests):
            began = time.perf_counter()
            status, _, said = support.http(port, request, sock)
            took.append((time.perf_counter() - began) * 1e6)
            assert status in accepted, (status, said)
    return statistics.median(took)


def call(what, us, than):
    row(f"{what}, us", f"{us - than:.0f}")


def test_a_call_of_the_engines_own(host, nothing):
    call("wasi:clocks now", median_us(started(host, "wants-clock", Grants())), nothing)


def test_configuration(host, nothing):
    grants = Grants(interfaces=("wasi:config/store",))
    call("wasi:config get", median_us(started(host, "config", grants, config={"greeting": "hello"})), nothing)


def test_a_line_of_the_log(host, nothing):
    grants = Grants(interfaces=("wasi:logging", "wasi:config/store"))
    port = started(host, "secret", grants, config={"db-password": "none"})
    call("wasi:logging log, and a look at wasi:config", median_us(port), nothing)


def test_key_value_pairs(host, nothing):
    port = started(host, pairs_guest.guest(), Grants(interfaces=("wasi:keyvalue",)))

    def body(op, value=b""):
        return op.encode() + struct.pack("<I", 0) + struct.pack("<I", 3) + b"key" + value

    opened = median_us(port, body("?"))
    call("wasi:keyvalue open", opened, nothing)
    call("wasi:keyvalue set", median_us(port, body("s", b"v" * 100)), opened)
    call("wasi:keyvalue get", median_us(port, body("g")), opened)
    median_us(port, body("d"), requests=1)  # what stands there is no number
    call("wasi:keyvalue increment", median_us(port, body("i", struct.pack("<q", 1))), opened)


def test_a_message_that_is_taken_at_once(host, nothing):
    """The agent's disk is not in it: whoever takes the message says at once that it is kept."""
    port = started(host, "publishes", Grants(interfaces=("wasi:messaging",), publish=("plant/#",)))
    end = threading.Event()

    def take():
        taker = host_api.new_socket()
        taker.settimeout(60)
        taker.connect(str(host.runtime / "host.sock"))
        number, done, session = 0, 0, ""
        while not end.is_set():
            number += 1
            host_api.send(taker, host_api.TakeMessages(id=number, session=session, done=done, refused={}, wait_s=1))
            said = iter(lambda: host_api.receive_from_host(taker), None)
            reply = next(each for each in said if getattr(each, "id", None) == number)
            session, done = reply.session, reply.messages[-1].number if reply.messages else 0
        taker.close()

    agent = threading.Thread(target=take)
    agent.start()
    try:
        call(
            "wasi:messaging send, without the agent's disk", median_us(port, b"21.5", "/plant/t", requests=100), nothing
        )
    finally:
        end.set()
        agent.join()


def test_files(host, nothing):
    port = started(host, "writes", Grants(interfaces=("wasi:filesystem",)))
    call("wasi:filesystem open, write 64 KiB, close", median_us(port, requests=100), nothing)


def test_sockets(host):
    def echo(_peer, connection):
        while piece := connection.recv(65536):
            connection.sendall(piece)

    there = Peer(echo)
    try:
        port = started(host, "dial", Grants(outbound=(f"tcp://127.0.0.1:{there.port}",)))
        alone = median_us(port, b"")
        connected = median_us(port, f"t 0 4\nc 0 127.0.0.1 {there.port}\nd 0".encode())
        call("wasi:sockets connect, and close", connected, alone)
        steps = f"t 0 4\nc 0 127.0.0.1 {there.port}\n" + "w 0 x\nR 0 1\n" * 20 + "d 0"
        call(
            "wasi:sockets write and read the echo", (median_us(port, steps.encode(), requests=100) - connected) / 20, 0
        )
    finally:
        there.close()

"""What a request to a guest of wasi:http costs beside the native world, and beside `wasmtime serve` where that is here.

Ratios and counts, printed; run by `make bench`. The client is one Python process on the same cores.
"""

import re
import select
import socket
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "agent" / "host"))

import support
from serve import serving
from support import Grants, Limits

from agent.host.ipc import host_api

pytestmark = [pytest.mark.bench, pytest.mark.timeout(600)]

GRANTS = Grants(interfaces=("wasi:http/outgoing-handler",))
LIMITS = Limits(request_bytes=1 << 20, response_bytes=1 << 20)
BODY = bytes(n % 251 for n in range(65_536))
SMALL = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
LARGE = b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(BODY), BODY)


@pytest.fixture
def host(tmp_path):
    running = support.Host(tmp_path)
    yield running
    running.close()


def row(what, value):
    print(f"\n  {what:<66} {value}", flush=True)


def whole(data):
    """How long an answer is, with its head; None while that is not known, 0 for one in chunks that has not ended."""
    head, end, rest = data.partition(b"\r\n\r\n")
    if not end:
        return None
    if (length := re.search(rb"\r\ncontent-length: (\d+)", head, re.IGNORECASE)) is not None:
        return len(head) + 4 + int(length[1])
    return len(data) if rest.endswith(b"0\r\n\r\n") else 0


def rate(port, request, *, seconds=3.0, connections=4):
    """Requests a second over kept-alive connections, and the latencies in milliseconds, sorted."""
    poll = select.epoll()
    socks, got, sent, took = {}, {}, {}, []
    for _ in range(connections):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        fd = sock.fileno()
        socks[fd], got[fd], sent[fd] = sock, bytearray(), time.perf_counter()
        poll.register(sock, select.EPOLLIN)
        sock.sendall(request)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for fd, _ in poll.poll():
            more = socks[fd].recv(1 << 18)
            assert more, bytes(got[fd][:200])
            got[fd] += more
            if (length := whole(got[fd])) is None or not length or len(got[fd]) < length:
                continue
            assert got[fd].startswith(b"HTTP/1.1 200"), bytes(got[fd][:200])
            took.append((time.perf_counter() - sent[fd]) * 1000)
            got[fd].clear()
            sent[fd] = time.perf_counter()
            socks[fd].sendall(request)
    for sock in socks.values():
        sock.close()
    return len(took) / seconds, sorted(took)


def figures(port, request):
    rate(port, request, seconds=0.3)
    each, took = rate(port, request)
    return each, took[len(took) // 2], took[int(len(took) * 0.99)]


@pytest.mark.parametrize(("what", "request_bytes"), [("a small answer", SMALL), ("64 KiB there and back", LARGE)])
def test_requests(host, what, request_bytes):
    native, adapted = support.free_port(), support.free_port()
    assert isinstance(host.start("v1", support.a_run("native", 1, port=native, limits=LIMITS)), host_api.Started)
    run = support.a_run("adapted", 1, port=adapted, grants=GRANTS, limits=LIMITS)
    assert isinstance(host.start("probe", run), host_api.Started)
    ours = figures(native, request_bytes)
    theirs = figures(adapted, request_bytes)
    row(f"{what}, native world (warm): requests a second, p50, p99 ms", "{:.0f}, {:.2f}, {:.2f}".format(*ours))
    row(f"{what}, wasi:http (fresh instance each): the same", "{:.0f}, {:.2f}, {:.2f}".format(*theirs))
    row(f"{what}, wasi:http as a share of the native rate", f"{theirs[0] / ours[0]:.2f}")
    if b"POST" not in request_bytes:
        reused = support.free_port()
        limits = Limits(requests_per_instance=1_000_000)
        host.start("probe", support.a_run("reused", 1, port=reused, grants=GRANTS, limits=limits))
        again = figures(reused, request_bytes)
        row(f"{what}, wasi:http (requests_per_instance): the same", "{:.0f}, {:.2f}, {:.2f}".format(*again))
        row("the same as a share of the native rate", f"{again[0] / ours[0]:.2f}")
    with serving(support.ADAPTER / "probe.wasm") as port:
        serve = figures(port, request_bytes)
    row(f"{what}, wasmtime serve (all cores): the same", "{:.0f}, {:.2f}, {:.2f}".format(*serve))
    row(f"{what}, one lane as a share of wasmtime serve's rate", f"{theirs[0] / serve[0]:.2f}")


def test_a_request_sent_on_beside_the_same_asked_for_directly(host):
    there, sends = support.free_port(), support.free_port()
    assert isinstance(host.start("v1", support.a_run("there", 1, port=there, limits=LIMITS)), host_api.Started)
    grants = Grants(interfaces=GRANTS.interfaces, outbound=(f"http://127.0.0.1:{there}",))
    limits = Limits(requests_per_instance=1_000_000)
    assert isinstance(
        host.start("probe", support.a_run("sends", 1, port=sends, grants=grants, limits=limits)), host_api.Started
    )
    direct = figures(there, SMALL)
    through = figures(sends, b"GET /get?127.0.0.1:%d/ HTTP/1.1\r\nhost: x\r\n\r\n" % there)
    row("a small answer, asked for directly: requests a second, p50, p99 ms", "{:.0f}, {:.2f}, {:.2f}".format(*direct))
    row("the same, sent on by a component over a kept connection", "{:.0f}, {:.2f}, {:.2f}".format(*through))
    row("the same as a share of the direct rate", f"{through[0] / direct[0]:.2f}")

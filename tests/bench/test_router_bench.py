"""What the router adds to a request, against what the same server takes for one without wasm; printed, not judged.

Both figures are the processor's time of one process: the router's, and that of a worker's own loop (`Clients`), whose
guest is a function that answers what `hello` answers. The client and its connections are the same. A short run says
little on a machine with other work, so the best of several is printed, each side's by itself.
"""

import os
import select
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "agent" / "host"))
sys.path.insert(0, str(Path(__file__).parent))

import support
from host_processes import children
from rates import rate, row

from agent.host.ipc import host_api
from agent.host.worker.http_server import HttpServer
from fleet.protocol.manifest import Limits

pytestmark = [pytest.mark.bench, pytest.mark.timeout(600)]

RUNS = 7
SECONDS = 0.7


@pytest.fixture
def host(tmp_path):
    running = support.Host(tmp_path)
    yield running
    running.close()


class Function:
    """A guest without wasm."""

    streams = False

    def handle(self, request, way):
        return 200, b"", b"hello\n"

    def count(self, outcome, began_ns, *, error=False):
        pass


def serve(listener):
    """A worker's loop, without a worker."""
    poll = select.epoll()
    clients = HttpServer(poll, Function(), Limits(), lambda passed, cut: None)
    clients.serve(listener)
    while True:
        for fd, mask in poll.poll(clients.wait_s()):
            clients.event(fd, mask)
        clients.tick()


@pytest.fixture
def without_wasm():
    """(its port, its process)."""
    listener = socket.create_server(("127.0.0.1", 0))
    pid = os.fork()
    if not pid:
        try:
            serve(listener)
        finally:
            os._exit(1)
    port = listener.getsockname()[1]
    listener.close()
    yield port, pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def used_ns(pid):
    """The processor's time that a process has had in its life."""
    return time.clock_gettime_ns((~pid << 3) | 2)


def cost_us(pid, port, path, **how):
    """Microseconds of the processor's time for a request: the best of several short runs."""
    found = []
    for _ in range(RUNS):
        before = used_ns(pid)
        _, took = rate(port, path, seconds=SECONDS, **how)
        found.append((used_ns(pid) - before) / len(took) / 1000)
    return min(found)


def router_of(running):
    """The one child of the host that is there before any instance."""
    running.ask(host_api.Hello)
    (pid,) = children(running.process.pid)
    return pid


@pytest.mark.parametrize("connections", [1, 4])
def test_the_routers_share_of_a_request(host, without_wasm, connections):
    router = router_of(host)
    host.start("hello", support.a_run("web", 1))
    share = cost_us(router, host.port, "/web/", connections=connections)
    port, pid = without_wasm
    one = cost_us(pid, port, "/web/", connections=connections)
    row(f"the router's processor time for a request, {connections} clients, microseconds", f"{share:.1f}")
    row("a request of the same server without wasm, microseconds", f"{one:.1f}")
    row("the router's share (budget: 1)", f"{share / one:.2f}")

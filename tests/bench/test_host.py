"""The host's rows of the budget table: counts and ratios, printed; run by `make bench`. Nothing here asserts a time."""

import os
import socket
import statistics
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "agent" / "host"))
sys.path.insert(0, str(Path(__file__).parent))

import support
from echo_guest import ECHO
from host_processes import children
from rates import rate, row
from traffic import Traffic

from agent.host.ipc import host_api

pytestmark = [pytest.mark.bench, pytest.mark.timeout(900)]


@pytest.fixture
def host(tmp_path):
    running = support.Host(tmp_path)
    yield running
    running.close()


def test_a_neighbour_of_a_guest_that_spins(host):
    quiet, loud = support.free_port(), support.free_port()
    host.start("hello", support.a_run("quiet", 1, port=quiet))
    host.start("spin", support.a_run("loud", 1, port=loud, limits=support.Limits(call_ms=30_000)))
    alone, took = rate(quiet, "/")
    before = took[int(len(took) * 0.99)]
    with socket.create_connection(("127.0.0.1", loud)) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        beside, took = rate(quiet, "/")
    row("beside a guest that spins, share of the undisturbed rate", f"{beside / alone:.2f}")
    row("the same, p99 against the undisturbed", f"{took[int(len(took) * 0.99)] / before:.1f}x")


def test_memory_of_a_worker(host):
    port = support.free_port()
    host.start("hello", support.a_run("web", 1, port=port))
    rate(port, "/", seconds=0.01)
    first = host.health("web").memory_bytes
    with socket.create_connection(("127.0.0.1", port)) as sock:
        for _ in range(10_000):
            support.http(port, sock=sock)
    row(
        "private memory of a lane: first request / after 10,000, MB",
        f"{first / 1e6:.1f} / {host.health('web').memory_bytes / 1e6:.1f}",
    )


def test_starting(host):
    port = support.free_port()
    host.start("hello", support.a_run("web", 1, port=port))
    took = []
    for generation in range(2, 22):
        began = time.perf_counter()
        reply = host.start("hello", support.a_run("web", generation, port=port))
        assert isinstance(reply, host_api.Started), reply
        support.http(port)
        took.append((time.perf_counter() - began) * 1000)
    row(
        "image handed over -> lane in its cell -> swapped -> first answer, ms (median of 20)",
        f"{statistics.median(took):.1f}",
    )


@pytest.mark.parametrize("way", ["own port", "router"])
def test_two_hundred_swaps(host, way):
    port = support.free_port() if way == "own port" else None
    limits = support.Limits(request_bytes=1 << 20, response_bytes=1 << 20)
    host.start(ECHO, support.a_run("web", 1, port=port, limits=limits))
    traffic = Traffic(port or host.port, "/" if port else "/web/", kept=3, new=1, slow=1)
    try:
        for generation in range(2, 202):
            before = traffic.answers
            reply = host.start(ECHO, support.a_run("web", generation, port=port, limits=limits))
            assert isinstance(reply, host_api.Started), reply
            traffic.await_answers(before + 20)
    finally:
        traffic.stop()
    row(
        f"200 swaps, {way}: requests / lost / connections opened by 3 kept-alive clients",
        f"{traffic.answers} / {len(traffic.lost)} / {traffic.opened}",
    )
    row("  beside them two slow clients, a mebibyte each way: requests", traffic.slow_answers)
    assert traffic.lost == []
    assert traffic.slow_answers > 0


def switches(pid):
    lines = [
        line for task in Path(f"/proc/{pid}/task").iterdir() for line in (task / "status").read_text().splitlines()
    ]
    return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))


def pss_kb(pid):
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0


def test_at_rest(host):
    host.ask(host_api.Hello)
    row("host at rest without instances, sum of PSS, MB", f"{sum(map(pss_kb, family(host))) / 1000:.1f}")
    port = support.free_port()
    host.start("hello", support.a_run("web", 1, port=port))
    support.http(port)
    seconds = 20
    before = {pid: switches(pid) for pid in family(host)}
    time.sleep(seconds)
    most = max((switches(pid) - before[pid]) * 60 // seconds for pid in before)
    row("wake-ups a minute at rest, the busiest process", most)


def family(host):
    return [host.process.pid, *children(host.process.pid)]


def test_many_instances(host):
    count = int(os.environ.get("WASMFLEET_BENCH_INSTANCES", "40"))
    host.start("hello", support.a_run("i0", 1))
    base = sum(map(pss_kb, family(host)))
    for number in range(1, count):
        assert isinstance(host.start("hello", support.a_run(f"i{number}", 1)), host_api.Started)
    each = (sum(map(pss_kb, family(host))) - base) / (count - 1)
    row(f"a further idle instance in a lane of its own (of {count}), PSS in KB", f"{each:.0f}")
    row("the instance's own linear memory beside the engine, KB", 64)
    host.start("hello", support.a_run("s0", 1, share_worker=True))
    base = sum(map(pss_kb, family(host)))
    for number in range(1, count):
        assert isinstance(host.start("hello", support.a_run(f"s{number}", 1, share_worker=True)), host_api.Started)
    each = (sum(map(pss_kb, family(host))) - base) / (count - 1)
    row(f"the same in a shared lane, its part of the supervisor included (of {count}), PSS in KB", f"{each:.0f}")

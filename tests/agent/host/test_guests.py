"""Misbehaving guests: contained, reported, and without effect on other instances."""

import socket

import pytest
import support
from echo_guest import ECHO
from support import Grants, Health, Limits

from agent.host.ipc import host_api
from tests.eventually import eventually


@pytest.mark.parametrize(
    ("guest", "status", "outcome", "words"),
    [
        ("trap", 500, "guest-trap", "unreachable"),
        ("recurse", 500, "guest-trap", "call stack exhausted"),
        ("hoard", 500, "guest-trap", "unreachable"),
        ("spin", 504, "guest-timeout", "used up its time"),
        ("answer-1gib", 500, "guest-trap", "out of bounds"),
    ],
)
def test_a_failed_call_affects_only_itself(host, neighbour, guest, status, outcome, words):
    port = support.free_port()
    host.start(guest, support.a_run("bad", 1, port=port, limits=Limits(call_ms=200)))
    with socket.create_connection(("127.0.0.1", port), timeout=30) as kept:
        # The connection stays usable, and the next call gets a store of its own (a trap poisons the old one).
        for _ in range(3):
            answered, _, body = support.http(port, sock=kept)
            assert answered == status
            assert words in body.decode()
    trapped = host.event(lambda event: isinstance(event, host_api.Trapped) and event.faults >= 3)
    assert (trapped.instance, trapped.code) == ("bad", "trapped")
    assert words in trapped.message
    assert any(words in line for line in trapped.log)
    health = host.health("bad")
    assert health.calls == {outcome: 3}
    assert (health.errors, health.restarts, health.workers) == (3, 0, 1)


def test_an_instance_reports_the_time_of_its_calls(host):
    busy, idle = support.free_port(), support.free_port()
    host.start("busy", support.a_run("busy", 1, port=busy))
    grants = Grants(interfaces=("wasi:io", "wasi:clocks"))
    nap = support.wasm("sleep").decode().partition("\n")[2].replace("3600000000000", "50000000")
    host.start(nap, support.a_run("naps", 1, port=idle, grants=grants))
    for _ in range(5):
        assert (support.http(busy)[0], support.http(idle)[0]) == (200, 200)
    busy_figures, naps = host.health("busy"), host.health("naps")
    # Counting to twenty million takes the processor, fifty milliseconds of sleep do not: but both take their time.
    assert busy_figures.cpu_ms >= 5
    assert naps.cpu_ms < busy_figures.cpu_ms
    assert naps.p50_us >= 50_000
    assert (sum(naps.latencies), sum(naps.latencies[:4])) == (5, 0), "none took up to 30 ms"
    # A restart begins no new account: it is the generation's.
    host.ask(host_api.Restart, instance="busy")
    support.http(busy)
    after = host.health("busy")
    assert (after.cpu_ms > busy_figures.cpu_ms, sum(after.latencies)) == (True, 6)


def test_a_trap_is_reported_with_a_symbolic_backtrace(host):
    port = support.free_port()
    host.start("recurse", support.a_run("bad", 1, port=port))
    support.http(port)
    assert "guest!deeper" in host.event(lambda event: isinstance(event, host_api.Trapped)).message


@pytest.mark.parametrize(
    ("guest", "code", "words"),
    [
        ("trap-in-start", "start-failed", "unreachable"),
        ("spin-in-start", "start-failed", "used up its time"),
        ("flood", "grant-denied", "wasi:logging/logging"),
        ("unhealthy", "health-failed", "not well"),
        ("trap-in-check", "health-failed", "unreachable"),
        ("spin-in-check", "health-failed", "used up its time"),
        ("declares-1gib", "start-failed", "memory"),
        ("huge-table", "start-failed", "table"),
        ("config", "grant-denied", "wasi:config/store"),
    ],
)
def test_a_guest_that_cannot_start_is_refused_with_the_reason(host, neighbour, guest, code, words):
    run = support.a_run("bad", 1, port=support.free_port(), limits=Limits(start_ms=200), health=Health(check=True))
    reply = host.start(guest, run)
    assert (type(reply), reply.code) == (host_api.Failed, code)
    assert words in reply.message
    assert [one.instance for one in host.ask(host_api.Status).instances] == ["neighbour"]


def test_a_granted_interface_is_served_and_only_that(host):
    port = support.free_port()
    grants = Grants(interfaces=("wasi:logging/logging",))
    assert isinstance(host.start("flood", support.a_run("flood", 1, port=port, grants=grants)), host_api.Started)
    assert support.http(port)[0] == 200
    assert host.start("config", support.a_run("config", 1, grants=grants)).code == "grant-denied"


@pytest.mark.parametrize(
    ("guest", "why"),
    [("bad-answer", b": status 7, which is none of a final response (200 to 599)"), ("large-answer", b"")],
)
def test_an_invalid_response_becomes_a_502_without_any_of_its_bytes(host, guest, why):
    port = support.free_port()
    host.start(guest, support.a_run("bad", 1, port=port, limits=Limits(response_bytes=1 << 20)))
    status, headers, body = support.http(port)
    assert status == 502
    assert body == b"the component's answer is not one%b\n" % why
    assert "x-a" not in headers
    assert host.health("bad").errors == 1


def test_an_image_of_another_engine_is_refused(host):
    fd = support.sealed(b"\x7fELF not an image")
    reply = host.ask(host_api.Start, fd, run=support.a_run("bad", 1))
    assert (type(reply), reply.code) == (host_api.Failed, "image-damaged")


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 200 + b"\r\n", 431),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", 431),
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2000000\r\n\r\n" + b"x" * 1_100_000, 413),
        (b"GARBAGE\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n", 400),
    ],
)
def test_an_oversized_request_never_reaches_the_guest(host, request_bytes, status):
    port = support.free_port()
    host.start("trap", support.a_run("web", 1, port=port))
    assert support.http(port, request_bytes)[0] == status
    assert "guest-trap" not in host.health("web").calls


def test_a_client_that_disconnects_or_never_reads_is_not_a_fault_of_the_guest(host):
    port = support.free_port()
    run = support.a_run("web", 1, port=port, limits=Limits(response_bytes=16 << 20))
    host.start("large-answer", run)
    slow = socket.create_connection(("127.0.0.1", port), timeout=30)
    slow.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    gone = socket.create_connection(("127.0.0.1", port), timeout=30)
    gone.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    gone.close()
    # Megabytes wait for the slow one; others are answered meanwhile.
    status, _, whole = support.http(port)
    assert (status, len(whole) > 1 << 20) == (200, True)
    assert support.read_answer(slow)[2] == whole
    slow.close()
    calls = host.health("web").calls
    assert set(calls) <= {"ok", "client-gone"}
    assert host.health("web").restarts == 0


def test_a_guest_that_sleeps_in_the_host_is_ended_by_the_host(host, neighbour):
    """Its own time stands still in there: only the end of its process ends it."""
    port = support.free_port()
    grants = Grants(interfaces=("wasi:io", "wasi:clocks"))
    host.start("sleep", support.a_run("bad", 1, port=port, grants=grants, limits=Limits(call_ms=100, idle_ms=300)))
    assert support.http(port)[0] == 502
    ended = host.event(lambda event: isinstance(event, host_api.Trapped))
    assert (ended.code, "blocked" in ended.message) == ("restarted", True)
    # It comes back, and what it did is counted as its own doing.
    host.event(lambda event: isinstance(event, host_api.Changed) and event.state == "running")
    health = host.health("bad")
    assert (health.calls, health.restarts, health.state) == ({"guest-timeout": 1}, 1, "running")


def test_waiting_for_others_is_not_counted_as_guest_time(host):
    port = support.free_port()
    nap = support.wasm("sleep").decode().partition("\n")[2].replace("3600000000000", "400000000")
    grants = Grants(interfaces=("wasi:io", "wasi:clocks"))
    host.start(nap, support.a_run("naps", 1, port=port, grants=grants, limits=Limits(call_ms=50)))
    assert support.http(port)[0] == 200
    assert host.health("naps").calls == {"ok": 1}


def test_a_flood_of_log_lines_is_cut_off_and_counted(host, neighbour):
    port = support.free_port()
    grants = Grants(interfaces=("wasi:logging",))
    limits = Limits(log_lines_per_minute=30, call_ms=20_000)
    host.start("flood", support.a_run("bad", 1, port=port, grants=grants, limits=limits))
    assert support.http(port)[0] == 200
    lines = host.ask(host_api.Logs, instance="bad").lines
    assert 0 < len(lines) <= 50
    assert sum(len(line) for line in lines) <= 16 * 1024
    assert support.http(port)[0] == 200


def test_each_line_of_what_is_logged_at_once_counts(host):
    """One call to the log with ten thousand lines in it is no way round the limit."""
    port = support.free_port()
    text = support.wasm("flood").decode().partition("\n")[2]
    text = text.replace('(memory (export "memory") 1)\n    (data', '(memory (export "memory") 3)\n    (data')
    text = text.replace(
        '"the flood rises and the flood rises and the flood rises and the "', '"' + "x\\n" * 10_000 + '"'
    )
    text = text.replace("(i32.const 256) (i32.const 64))", "(i32.const 256) (i32.const 20000))").replace(
        "(i32.const 9)", "(i32.const 0)"
    )
    text = text.replace("(i32.const 20000)))", "(i32.const 2)))")
    grants, limits = Grants(interfaces=("wasi:logging",)), Limits(log_lines_per_minute=1)
    assert isinstance(
        host.start(text, support.a_run("bad", 1, port=port, grants=grants, limits=limits)), host_api.Started
    )
    assert support.http(port)[0] == 200
    assert host.health("bad").dropped_lines == 20_000 - 1
    assert host.ask(host_api.Logs, instance="bad").count <= 1


def test_the_thousandth_call_traps_and_the_next_one_is_answered(host):
    port = support.free_port()
    host.start("trap-at-1000", support.a_run("web", 1, port=port))
    with socket.create_connection(("127.0.0.1", port), timeout=30) as kept:
        answered = [support.http(port, sock=kept)[0] for _ in range(1002)]
    assert answered == [200] * 999 + [500] + [200] * 2
    assert host.health("web").calls == {"ok": 1001, "guest-trap": 1}


def test_fuel_ends_a_call_after_so_many_instructions(host):
    port = support.free_port()
    limits = Limits(call_ms=20_000, fuel=1_000_000)
    host.start("spin", support.a_run("bad", 1, port=port, limits=limits), fuel=True)
    status, _, body = support.http(port)
    assert (status, "fuel" in body.decode()) == (504, True)
    host.start("hello", support.a_run("good", 1, port=support.free_port(), limits=limits), fuel=True)
    assert host.health("good").state == "running"


def test_workers_are_added_while_calls_wait_and_connections_share_them(host):
    port = support.free_port()
    host.start("spin", support.a_run("slow", 1, port=port, limits=Limits(call_ms=1500, concurrency=3)))
    clients = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(3)]
    for client in clients:
        client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    eventually(lambda: host.health("slow").workers >= 2, "a lane is added")
    assert [support.read_answer(client)[0] for client in clients] == [504] * 3
    for client in clients:
        client.close()


def test_a_guest_has_its_own_files_within_its_limit_and_keeps_them_over_a_swap(host, neighbour):
    port = support.free_port()
    files = Grants(interfaces=("wasi:filesystem", "wasi:io"))
    limits = Limits(storage_bytes=1 << 20)
    assert isinstance(
        host.start("writes", support.a_run("keeper", 1, port=port, grants=files, limits=limits)), host_api.Started
    )
    path = host.state / "data" / "keeper" / "0" / "log"
    assert support.http(port)[0] == 200
    assert path.stat().st_size == 64 * 1024
    host.start("writes", support.a_run("keeper", 2, port=port, grants=files, limits=limits))
    with socket.create_connection(("127.0.0.1", port), timeout=30) as kept:
        answered = [support.http(port, sock=kept)[0] for _ in range(20)]
    # Sixteen times 64 KiB fit; more is refused to it, and to nobody else.
    assert answered == [200] * 16 + [507] * 4
    assert path.stat().st_size == 1 << 20
    # Without the grant, the same component has no directory to write to.
    assert isinstance(
        host.start("writes", support.a_run("bare", 1, port=(bare := support.free_port()))), host_api.Started
    )
    assert support.http(bare)[0] != 200
    assert not (host.state / "data" / "bare").exists()


def test_the_daily_write_quota_is_not_reset_by_a_new_worker_version_or_host(tmp_path):
    """Its file is small, and is written again and again: what wears the flash out is the sum of it."""
    files = Grants(interfaces=("wasi:filesystem", "wasi:io"))
    limits = Limits(storage_bytes=64 << 20, daily_written_bytes=256 * 1024)

    def start(host, generation):
        port = support.free_port()
        run = support.a_run("keeper", generation, port=port, grants=files, limits=limits)
        assert isinstance(host.start("writes", run), host_api.Started)
        return port

    host = support.Host(tmp_path)
    try:
        port = start(host, 1)
        assert [support.http(port)[0] for _ in range(6)] == [200] * 4 + [507] * 2
        health = host.health("keeper")
        assert (health.written_bytes, health.denials, health.restarts) == (256 * 1024, 1, 0)
        assert "262144 bytes today, 262144 are allowed" in host.lines_of("keeper")[-1]
        assert support.http(start(host, 2))[0] == 507
    finally:
        host.close()
    again = support.Host(tmp_path)
    try:
        assert support.http(start(again, 3))[0] == 507
        assert again.health("keeper").written_bytes == 256 * 1024
    finally:
        again.close()


def test_another_schema_gets_a_copy_of_the_data_and_a_rollback_finds_the_old_data(host):
    port = support.free_port()
    files = Grants(interfaces=("wasi:filesystem", "wasi:io"))
    log = {schema: host.state / "data" / "ledger" / str(schema) / "log" for schema in (1, 2)}

    def start(generation, schema):
        return host.start("writes", support.a_run("ledger", generation, port=port, grants=files, schema=schema))

    start(1, 1)
    support.http(port)
    log[1].with_name("mark").write_text("old")
    assert start(2, 2).replaced == 1
    assert log[2].with_name("mark").read_text() == "old"
    log[2].with_name("mark").write_text("new")
    support.http(port)
    # Back: the old generation has what it had, whatever the new one did to its copy.
    assert host.ask(host_api.Revert, instance="ledger", generation=2).generation == 1
    assert log[1].with_name("mark").read_text() == "old"
    assert support.http(port)[0] == 200
    # Forward again, from the old data and not from the failed attempt; then there is no way back.
    start(3, 2)
    assert log[2].with_name("mark").read_text() == "old"
    host.ask(host_api.Commit, instance="ledger", generation=3)
    assert not log[1].parent.exists()
    assert log[2].exists()


def test_an_answer_beyond_what_one_call_can_carry_is_named(host):
    port = support.free_port()
    limits = Limits(request_bytes=8 << 20, response_bytes=8 << 20, memory_bytes=32 << 20, call_ms=20_000)
    host.start(ECHO, support.a_run("echo", 1, port=port, limits=limits))

    def echo(size):
        return support.http(port, b"PUT / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % size + b"x" * size)

    assert echo(2_700_000)[0] == 200
    status, _, body = echo(3_000_000)
    assert (status, "larger than 2796202 bytes" in body.decode()) == (500, True)
    assert echo(1)[0] == 200


def test_eight_workers_of_a_component_with_wasi_run_as_one_user(host):
    """Each has threads of its own, and the limit on threads counts them all."""
    port = support.free_port()
    grants = Grants(interfaces=("wasi:io", "wasi:clocks"))
    limits = Limits(idle_ms=1500, concurrency=8)
    host.start("sleep", support.a_run("slow", 1, port=port, grants=grants, limits=limits))
    clients = []
    most = 0

    def grown():
        health = host.health("slow")
        return health if health.workers > len(clients) or health.restarts else None

    for _ in range(7):
        # A worker in a call accepts no client: another worker takes the next one, and once that is busy, one is added.
        clients.append(socket.create_connection(("127.0.0.1", port), timeout=30))
        clients[-1].sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        health = eventually(grown, "a lane is added")
        most = max(most, health.workers)
    assert most >= 4
    for client in clients:
        client.close()
    assert not any("failed" in line for line in host.ask(host_api.Logs, instance="slow").lines)

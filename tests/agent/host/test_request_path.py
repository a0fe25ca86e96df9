"""Requests to workers by frames, on a running host: the router is the only HTTP server, and workers run a loop."""

import contextlib
import os
import re
import select
import signal
import socket
import struct
import threading

import pytest
import support
from host_processes import children, forks, lanes_of
from support import Grants, Health, Limits
from traffic import Traffic
from wire import Wire, streamed

from agent.host.ipc import host_api

GRANTS = Grants(interfaces=("wasi:http/outgoing-handler",))


def start(host, generation=1, *, port=None, name="web", guest="probe", **limits):
    run = support.a_run(name, generation, port=port, grants=GRANTS, limits=Limits(**limits))
    reply = host.start(guest, run)
    assert isinstance(reply, host_api.Started), reply
    return reply


def ask(port, path, *, method="GET", fields="", body=b"", sock=None):
    length = f"content-length: {len(body)}\r\n" if body else ""
    return support.http(port, f"{method} {path} HTTP/1.1\r\nhost: board\r\n{fields}{length}\r\n".encode() + body, sock)


@pytest.fixture
def port():
    return support.free_port()


@pytest.mark.parametrize(("per_instance", "counted"), [(0, [b"1"] * 3), (2, [b"1", b"2", b"1"])])
def test_an_instance_answers_as_many_requests_as_it_may(host, port, per_instance, counted):
    start(host, port=port, requests_per_instance=per_instance)
    assert [ask(port, "/count")[2].strip() for _ in range(3)] == counted
    assert host.health("web").calls == {"ok": 3}


@pytest.mark.parametrize("per_instance", [0, 100])
def test_what_a_guest_writes_goes_out_from_the_moment_its_answer_is_set(host, port, per_instance):
    """The guest writes before it sets its answer, and never flushes, as JavaScript does."""
    start(host, port=port, requests_per_instance=per_instance)
    body = b"x" * 200_000
    assert streamed(port, body) == (200, b"first\n" + body)


@pytest.mark.parametrize("size", [1, 60_000, 300_000, 3_000_000])
@pytest.mark.parametrize("per_instance", [0, 100])
def test_bodies_stream_both_ways_at_once(host, port, size, per_instance):
    start(host, port=port, requests_per_instance=per_instance, request_bytes=4 << 20, response_bytes=4 << 20)
    body = os.urandom(size)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as kept:
        for _ in range(3):
            head = f"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: {size}\r\n\r\n".encode()
            writer = threading.Thread(target=kept.sendall, args=(head + body,))
            writer.start()
            assert support.read_answer(kept)[2] == body
            writer.join()


@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_an_upload_may_be_larger_than_limits_request_and_than_the_memory_of_the_guest(host, port, framing):
    """A mebibyte for a whole body says nothing of one that streams; the guest's memory here is two."""
    start(host, port=port, memory_bytes=2 << 20, response_bytes=4 << 20)
    size, piece = 3 << 20, b"x" * 65536
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:

        def send():
            sized = framing == "length"
            kind = b"content-length: %d" % size if sized else b"transfer-encoding: chunked"
            sock.sendall(b"POST /echo HTTP/1.1\r\nhost: x\r\n%b\r\n\r\n" % kind)
            for _ in range(0, size, len(piece)):
                sock.sendall(piece if sized else b"%x\r\n%b\r\n" % (len(piece), piece))
            if not sized:
                sock.sendall(b"0\r\n\r\n")

        writer = threading.Thread(target=send)
        writer.start()
        status, _, body = support.read_answer(sock)
        writer.join()
    assert (status, len(body)) == (200, size)
    health = host.health("web")
    assert (health.calls, health.errors) == ({"ok": 1}, 0)


def test_an_echo_answers_before_its_request_has_ended(host, port):
    start(host, port=port, request_bytes=4 << 20, response_bytes=4 << 20)
    with Wire(port) as wire:
        wire.send(b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 300000\r\n\r\n" + b"x" * 200_000)
        assert wire.head()[0] == 200
        first = wire.chunk()
        assert first
        wire.send(b"x" * 100_000)
        assert first + b"".join(iter(wire.chunk, b"")) == b"x" * 300_000


@pytest.mark.parametrize("per_instance", [0, 100])
def test_a_guest_that_spins_is_interrupted_at_its_limit_and_the_next_request_is_answered(host, port, per_instance):
    start(host, port=port, call_ms=300, requests_per_instance=per_instance)
    status, _, body = ask(port, "/spin")
    assert (status, b"used up its time" in body) == (504, True)
    assert ask(port, "/")[0] == 200
    health = host.health("web")
    assert (health.calls, health.restarts) == ({"ok": 1, "guest-timeout": 1}, 0)
    assert host.event(lambda event: isinstance(event, host_api.Trapped)).instance == "web"


@pytest.mark.parametrize("per_instance", [0, 100])
def test_a_trap_is_the_guests_fault_and_costs_no_worker(host, port, per_instance):
    start(host, port=port, requests_per_instance=per_instance)
    before = lanes_of(host)
    for _ in range(3):
        assert ask(port, "/trap")[0] == 500
        assert ask(port, "/", method="POST", body=b"x" * 100_000)[0] == 200
    assert lanes_of(host) == before
    health = host.health("web")
    assert (health.calls, health.restarts, health.errors) == ({"ok": 3, "guest-trap": 3}, 0, 3)


def test_requests_sent_at_once_are_answered_in_their_order(host, port):
    start(host, port=port, requests_per_instance=1000)
    requests = b"".join(b"GET /status/%d HTTP/1.1\r\nhost: x\r\n\r\n" % (400 + n) for n in range(20))
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        sock.sendall(requests)
        data = b""
        while data.count(b"HTTP/1.1 ") < 20:  # several may come at once
            more = sock.recv(65536)
            assert more, data
            data += more
        assert [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3})", data)] == [400 + n for n in range(20)]


def test_requests_that_are_always_written_ahead_find_room_in_the_guest(host, port):
    """Four clients who ask again at once leave no moment in which no request waits behind the one in hand."""
    start(host, port=port, requests_per_instance=1000)
    answers = []

    def client():
        with socket.create_connection(("127.0.0.1", port), timeout=30) as kept:
            fields = f"x-room: {'x' * 3000}\r\n"
            answers.extend(ask(port, "/large/1", fields=fields, sock=kept)[::2] for _ in range(15))

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(status, len(body)) for status, body in answers] == [(200, 1 << 20)] * 60
    assert host.health("web").calls == {"ok": 60}


@pytest.mark.parametrize("per_instance", [0, 1000])
def test_swaps_and_reverts_lose_nothing(host, port, per_instance):
    limits = {"requests_per_instance": per_instance, "request_bytes": 2 << 20, "response_bytes": 2 << 20}
    start(host, 1, port=port, **limits)
    traffic = Traffic(port, path="/echo", kept=4, new=2, slow=1)
    try:
        for generation in range(2, 8):
            traffic.await_answers(traffic.answers + 100)
            start(host, generation, port=port, **limits)
            if generation % 3 == 0:
                assert isinstance(host.ask(host_api.Revert, instance="web", generation=generation), host_api.Started)
            else:
                host.ask(host_api.Commit, instance="web", generation=generation)
        traffic.await_answers(traffic.answers + 100)
    finally:
        traffic.stop()
    assert traffic.lost == []
    assert host.health("web").restarts == 0


def test_a_worker_that_is_killed_in_a_call_is_replaced_and_who_waits_is_answered(host, port):
    start(host, port=port, total_ms=60_000)
    with contextlib.ExitStack() as stack:
        stuck = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30)) for _ in range(3)]
        stuck[0].sendall(b"POST /spin HTTP/1.1\r\nhost: x\r\n\r\n")
        support.await_read(stuck[0])
        for other in stuck[1:]:
            other.sendall(b"POST / HTTP/1.1\r\nhost: x\r\n\r\n")
            support.await_read(other)
        (lane,) = lanes_of(host)
        os.kill(lane, signal.SIGKILL)
        assert support.read_answer(stuck[0])[0] == 502
        assert [support.read_answer(other)[0] for other in stuck[1:]] == [200, 200]


@pytest.fixture(scope="module")
def killable(tmp_path_factory):
    with support.shared_host(tmp_path_factory.mktemp("killable")) as host:
        yield host


@pytest.mark.parametrize(
    ("victim", "keeps", "restarts"),
    [
        ("worker", {"connection", "memory"}, {"web": 1, "other": 0, "asks": 0}),
        ("router", set(), {"web": 0, "other": 0, "asks": 0}),
        ("egress", {"call", "connection", "memory"}, {"web": 0, "other": 0, "asks": 0}),
        ("zygote", {"connection"}, {"web": 1, "other": 1, "asks": 1}),
        ("supervisor", set(), {}),
    ],
)
def test_who_loses_what_when_a_process_is_killed(killable, port, victim, keeps, restarts):
    """The rows of docs/host.md: a call in flight, and of another instance a client's connection and the memory."""
    start(killable, port=port)
    (worker,), (router,) = lanes_of(killable), forks(killable)
    grants = Grants(interfaces=("wasi:http/outgoing-handler",), outbound=("http://127.0.0.1:9",))
    killable.start("probe", support.a_run("asks", 1, grants=grants))
    killable.start("counter", support.a_run("other", 1, port=(own := support.free_port())))
    with contextlib.ExitStack() as stack:
        begun, kept = (stack.enter_context(socket.create_connection(("127.0.0.1", each), 30)) for each in (port, own))
        assert int(ask(own, "/", sock=kept)[2]) == 1
        begun.sendall(b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 300000\r\n\r\n" + b"x" * 100_000)
        assert begun.recv(12, socket.MSG_WAITALL) == b"HTTP/1.1 200"
        (egress,) = forks(killable) - {router}
        (zygote,) = [
            pid
            for pid, command in children(killable.process.pid).items()
            if b"worker.zygote" in command and pid not in lanes_of(killable)
        ]
        pids = {"worker": worker, "router": router, "egress": egress, "zygote": zygote}
        pid = pids.get(victim, killable.process.pid)
        gone, routed = os.pidfd_open(pid), os.pidfd_open(router)
        stack.callback(os.close, gone)
        stack.callback(os.close, routed)
        os.kill(pid, signal.SIGKILL)
        assert select.select([gone], [], [], 30)[0]
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            begun.sendall(b"x" * 200_000)
        assert (read_to_end(begun) >= 300_000) == ("call" in keeps)
        if "connection" in keeps:
            assert int(ask(own, "/", sock=kept)[2]) == (2 if "memory" in keeps else 1)
        else:
            assert read_to_end(kept) == 0
        if victim == "supervisor":
            assert select.select([routed], [], [], 30)[0], "the router ends with it"
            with pytest.raises(ConnectionRefusedError):
                ask(own, "/")
            return
        assert ask(port, "/")[0] == 200
        assert int(ask(own, "/")[2]) == (3 if "memory" in keeps else 2 if "connection" in keeps else 1)
        assert {name: killable.health(name).restarts for name in restarts} == restarts
        for name in restarts:
            killable.ask(host_api.Stop, instance=name)


def read_to_end(sock):
    """How many bytes came until the end, or until an answer in chunks was complete."""
    count, data = 0, b""
    with contextlib.suppress(ConnectionResetError):
        while not data.endswith(b"0\r\n\r\n") and (more := sock.recv(65536)):
            count += len(more)
            data = (data + more)[-5:]
    return count


def test_the_death_of_the_router_is_no_crash_of_any_component(tmp_path, port):
    host = support.Host(tmp_path)
    start(host, port=port)
    start(host, name="shared")
    assert ask(port, "/")[0] == 200
    (router,) = forks(host)
    os.kill(router, signal.SIGKILL)
    assert ask(port, "/")[0] == 200
    assert ask(host.port, "/shared/")[0] == 200
    for name in ("web", "shared"):
        assert host.health(name).restarts == 0
    assert not [event for event in host.events if isinstance(event, host_api.Trapped)]
    host.close()


def test_a_client_that_leaves_a_stream_ends_it_without_blame(host, port):
    start(host, port=port)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        sock.sendall(b"GET /events HTTP/1.1\r\nhost: x\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 200")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert ask(port, "/")[0] == 200
    health = host.health("web")
    assert (health.calls, health.errors, health.restarts) == ({"ok": 1, "client-gone": 1}, 0, 0)


def test_neighbours_reach_an_instance_that_takes_frames(host, port):
    start(host, name="server")
    grants = Grants(interfaces=("wasi:http/outgoing-handler",), instances=("server",))
    host.start("probe", support.a_run("web", 1, port=port, grants=grants))
    body = ask(port, "/get?server.internal/")[2]
    assert b"hello over wasi:http" in body


@pytest.mark.parametrize("side", ["answer", "body"])
def test_a_client_that_stands_still_is_ended_and_the_guest_is_not_blamed(host, port, side):
    start(host, port=port, idle_ms=300, request_bytes=1 << 20, response_bytes=64 << 20)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(30)
        sock.connect(("127.0.0.1", port))
        if side == "answer":
            sock.sendall(b"GET /large/32 HTTP/1.1\r\nhost: x\r\n\r\n")
        else:
            sock.sendall(b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 500000\r\n\r\n" + b"x" * 100_000)
        assert sock.recv(12) == b"HTTP/1.1 200"
        assert ask(port, "/")[0] == 200  # which had to wait for the end of that call
    health = host.health("web")
    assert (health.calls, health.errors, health.restarts) == ({"ok": 1, "client-slow": 1}, 0, 0)


def test_health_is_asked_between_two_calls_while_the_loop_runs(host, port):
    run = support.a_run("web", 1, port=port, grants=GRANTS, health=Health(check=True))
    assert isinstance(host.start("probe", run), host_api.Started)
    for n in range(1, 4):
        assert ask(port, "/")[0] == 200
        host.ask(host_api.Status, check="web")
        checks = host.health("web").checks
        assert (checks.asked >= n, checks.missed, checks.well) == (True, 0, True)
    assert host.health("web").calls == {"ok": 3}


def test_an_instance_behind_the_shared_port_gets_what_the_router_forwards(host):
    start(host)
    request = b"PUT /web/describe?q=1 HTTP/1.1\r\nhost: device\r\nx-a: 1\r\nconnection: x-b\r\nx-b: 2\r\n\r\n"
    assert support.http(host.port, request)[2] == b"put /describe?q=1 http device\nx-a=1\nx-forwarded-prefix=/web\n"


def test_who_waits_for_an_instance_that_is_stopped_is_told(host, port):
    start(host, port=port)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as kept:
        assert ask(port, "/", sock=kept)[0] == 200
        assert isinstance(host.ask(host_api.Stop, instance="web"), host_api.Done)
        assert kept.recv(100) == b""
    with pytest.raises(ConnectionRefusedError):
        ask(port, "/")

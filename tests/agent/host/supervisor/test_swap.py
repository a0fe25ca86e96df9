"""Swaps lose no request: of kept-alive and new clients, GET and POST, through the router and on own ports.

In each run 200 swaps, half of them each way. A million requests through a thousand swaps, some ten minutes each way:

    WASMFLEET_TEST_SWAPS=1000 WASMFLEET_TEST_SWAP_REQUESTS=1000000 pytest -s -n 0 -k 1000 .../test_swap.py
"""

import os
import socket
import time

import pytest
import support
from traffic import Traffic

from agent.host.ipc import host_api

SWAPS = int(os.environ.get("WASMFLEET_TEST_SWAPS", "100"))
REQUESTS = int(os.environ.get("WASMFLEET_TEST_SWAP_REQUESTS", str(SWAPS * 40)))
MANY = pytest.param(200, 200 * 40, marks=pytest.mark.nightly)


@pytest.mark.parametrize(("swaps", "requests"), [(SWAPS, REQUESTS), MANY])
@pytest.mark.parametrize("way", ["own port", "router"])
def test_swaps_lose_no_request_and_keep_connections_open(host, way, swaps, requests, capsys):
    port = support.free_port() if way == "own port" else None
    assert isinstance(host.start("hello", support.a_run("web", 1, port=port)), host_api.Started)
    traffic = Traffic(port or host.port, "/" if port else "/web/")
    try:
        spans = []
        for generation in range(2, 2 + swaps):
            before, began_s = traffic.answers, time.monotonic()
            reply = host.start("hello", support.a_run("web", generation, port=port))
            assert reply == host_api.Started(
                id=reply.id, instance="web", generation=generation, replaced=generation - 1, swap_ms=reply.swap_ms
            )
            spans.append((began_s, time.monotonic()))
            traffic.await_answers(before + requests // swaps)
            if generation % 3 == 0:
                host.ask(host_api.Commit, instance="web", generation=generation)
    finally:
        traffic.stop()
    assert traffic.lost == []
    assert traffic.answers > requests - swaps
    apart, within = (1000 * each for each in traffic.p99_s(spans))
    with capsys.disabled():
        print(
            f"\n{way}: {swaps} swaps, {traffic.answers} answers, 0 lost; "
            f"p99 {apart:.0f} ms, and {within - apart:+.0f} ms within swaps"
        )
    # The three kept-alive clients were handed from generation to generation: nobody had to connect again.
    assert traffic.opened == 3


def test_undo_brings_the_warm_generation_back_without_an_image(host):
    port = support.free_port()
    host.start("hello", support.a_run("web", 1, port=port))
    host.start("error-500", support.a_run("web", 2, port=port))
    with socket.create_connection(("127.0.0.1", port), timeout=30) as kept:
        assert support.http(port, sock=kept)[0] == 500
        reply = host.ask(host_api.Revert, instance="web", generation=2)
        assert (reply.generation, type(reply)) == (1, host_api.Started)
        # The same connection is answered by the generation before.
        assert support.http(port, sock=kept)[0] == 200
    # Asking again changes nothing, and after a commit there is no way back.
    assert host.ask(host_api.Revert, instance="web", generation=2).generation == 1
    host.start("hello", support.a_run("web", 3, port=port))
    host.ask(host_api.Commit, instance="web", generation=3)
    assert host.ask(host_api.Revert, instance="web", generation=3).code == "host-gone"


def test_a_new_generation_that_is_unwell_never_sees_traffic(host):
    port = support.free_port()
    host.start("hello", support.a_run("web", 1, port=port))
    reply = host.start("unhealthy", support.a_run("web", 2, port=port, health=support.Health(check=True)))
    assert (type(reply), reply.code) == (host_api.Failed, "health-failed")
    assert support.http(port)[0] == 200
    assert host.health("web").generation == 1


def test_the_same_start_twice_is_answered_at_once(host):
    port = support.free_port()
    host.start("hello", support.a_run("web", 1, port=port))
    workers = host.health("web").since
    assert host.start("hello", support.a_run("web", 1, port=port)).generation == 1
    assert host.health("web").since == workers


def test_a_port_in_use_fails_the_start_and_names_the_port(host):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        reply = host.start("hello", support.a_run("web", 1, port=taken.getsockname()[1]))
    assert (type(reply), reply.code) == (host_api.Failed, "port-in-use")
    assert str(reply.message).count("port")


def test_stop_answers_what_was_asked_and_then_refuses(host):
    port = support.free_port()
    host.start("hello", support.a_run("web", 1, port=port))
    with socket.create_connection(("127.0.0.1", port), timeout=30) as kept:
        support.http(port, sock=kept)
        assert isinstance(host.ask(host_api.Stop, instance="web"), host_api.Done)
        assert kept.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=30)
    assert isinstance(host.ask(host_api.Stop, instance="web"), host_api.Done)


def test_a_request_in_pieces_and_an_unread_answer_outlive_three_swaps(host):
    """Slow clients: one has sent half a request, one has not read its answer. Neither notices."""
    port = support.free_port()
    large = support.Limits(response_bytes=16 << 20)
    host.start("large-answer", support.a_run("web", 1, port=port, limits=large))
    slow = socket.create_connection(("127.0.0.1", port), timeout=30)
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
    slow.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    half = socket.create_connection(("127.0.0.1", port), timeout=30)
    half.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n12345")
    for generation in range(2, 5):
        reply = host.start("hello", support.a_run("web", generation, port=port))
        assert isinstance(reply, host_api.Started)
        host.ask(host_api.Commit, instance="web", generation=generation)
    half.sendall(b"67890")
    assert support.read_answer(half)[2] == b"hello\n"
    status, _, body = support.read_answer(slow)
    assert (status, len(body) > 1 << 20) == (200, True)
    # Once it has read the old answer, its next request goes to the newest generation.
    assert support.http(port, sock=slow)[2] == b"hello\n"


def test_a_swap_to_another_port_and_back(host):
    first, second = support.free_port(), support.free_port()
    host.start("hello", support.a_run("web", 1, port=first))
    host.start("hello", support.a_run("web", 2, port=second))
    assert support.http(second)[0] == 200
    with pytest.raises(ConnectionRefusedError):
        support.http(first)
    assert host.ask(host_api.Revert, instance="web", generation=2).generation == 1
    assert support.http(first)[0] == 200
    with pytest.raises(ConnectionRefusedError):
        support.http(second)

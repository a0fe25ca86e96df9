"""Instance with several workers: no client waits for a busy worker while another is idle."""

import socket
from contextlib import ExitStack

import pytest
import support
from support import Grants, Limits

from agent.host.ipc import host_api
from tests.eventually import eventually

CLOCK = Grants(interfaces=("wasi:io", "wasi:clocks"))
PATIENT = {"idle_ms": 3_600_000, "total_ms": 3_600_000}
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"


def sleeps_when_posted():
    """It answers a GET at once, and a POST after an hour."""
    text = support.wasm("sleep").decode().partition("\n")[2]
    sleep = "(call $block (call $subscribe (i64.const 3600000000000)))"
    assert sleep in text
    return text.replace(sleep, f"(if (i32.eq (local.get 1) (i32.const 4)) (then {sleep}))")


@pytest.fixture
def kept():
    """Connections of clients that keep them."""
    with ExitStack() as stack:

        def connect(port):
            return stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))

        yield connect


def start(host, **limits):
    port = support.free_port()
    run = support.a_run("several", 1, port=port, grants=CLOCK, limits=Limits(**{**PATIENT, **limits}))
    assert isinstance(host.start(sleeps_when_posted(), run), host_api.Started)
    return port


def test_a_client_whose_worker_is_in_a_long_call_is_answered_by_another_worker(host, kept):
    port = start(host, concurrency=2)
    clients = [kept(port) for _ in range(5)]
    for client in clients:
        assert support.http(port, GET, client)[0] == 200  # all of them are the only worker's
    # One has begun its next request already when another's takes the worker away.
    clients[1].sendall(GET[:20])
    support.await_read(clients[1])
    clients[0].sendall(POST)
    clients[1].sendall(GET[20:])
    assert support.read_answer(clients[1])[0] == 200
    for client in clients[2:]:
        assert support.http(port, GET, client)[0] == 200
    assert support.http(port, GET, kept(port))[0] == 200, "new clients too"
    health = host.health("several")
    assert (health.workers, health.restarts, health.errors) == (2, 0, 0)


def test_a_client_waiting_for_busy_workers_is_answered_by_the_first_idle_one(host, kept):
    port = start(host, concurrency=2, idle_ms=400)
    waiting, first, second = kept(port), kept(port), kept(port)
    for client in (waiting, first, second):
        assert support.http(port, GET, client)[0] == 200
    first.sendall(POST)
    assert support.http(port, GET, second)[0] == 200  # by the second worker
    second.sendall(POST)
    # Both workers are ended for their calls, as they are past their limits; who was not asking loses nothing by that.
    waiting.sendall(GET)
    assert support.read_answer(waiting)[0] == 200
    host.event(lambda event: isinstance(event, host_api.Trapped) and "blocked" in event.message)


@pytest.mark.parametrize("through", ["a new connection", "a kept connection"])
def test_the_log_says_when_a_request_waits_for_another(host, kept, through):
    port = start(host)
    slow, other = kept(port), kept(port)
    for client in (slow, other):
        assert support.http(port, GET, client)[0] == 200
    slow.sendall(POST)
    support.await_read(slow)
    assert not any("limits.concurrency" in line for line in host.lines_of("several"))
    (other if through == "a kept connection" else kept(port)).sendall(GET)
    line = "host: requests wait for one that takes long: limits.concurrency allows 1 at a time"
    eventually(lambda: any(line in each for each in host.lines_of("several")), "the line")

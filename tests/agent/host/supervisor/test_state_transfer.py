"""State transfer in a swap: saved by the old version, loaded by the new; after a failure, the old version continues."""

import socket
import threading

import pytest
import support
from support import Grants, Limits

from agent.host.ipc import host_api

WAITS = Grants(interfaces=("wasi:io", "wasi:clocks"))


def number(port, sock=None):
    """What the guest counts: how many requests there were."""
    status, _, body = support.http(port, sock=sock)
    assert status == 200, body
    return int(body)


def test_the_new_version_goes_on_counting_where_the_old_one_was_and_so_does_a_rollback(host):
    port = support.free_port()
    host.start("remembers", support.a_run("count", 1, port=port))
    with socket.create_connection(("127.0.0.1", port), timeout=30) as kept:
        assert [number(port, kept) for _ in range(3)] == [1, 2, 3]
        assert isinstance(host.start("remembers", support.a_run("count", 2, port=port)), host_api.Started)
        assert [number(port, kept), number(port)] == [4, 5]
        assert host.ask(host_api.Revert, instance="count", generation=2).generation == 1
        assert [number(port, kept), number(port)] == [6, 7]
        assert host.lines_of("count") == ()


def test_no_request_is_lost_or_counted_twice_while_clients_go_on_asking(host):
    port = support.free_port()
    host.start("remembers", support.a_run("count", 1, port=port))
    seen, stop, news = [], threading.Event(), threading.Condition()

    def ask():
        with socket.create_connection(("127.0.0.1", port), timeout=30) as kept:
            while not stop.is_set():
                answer = number(port, kept)
                with news:
                    seen.append(answer)
                    news.notify_all()

    clients = [threading.Thread(target=ask) for _ in range(3)]
    for client in clients:
        client.start()
    try:
        for generation in range(2, 12):
            before = len(seen)
            assert isinstance(host.start("remembers", support.a_run("count", generation, port=port)), host_api.Started)
            with news:
                assert news.wait_for(lambda: len(seen) >= before + 20, 60)  # noqa: B023 - called before the next round
    finally:
        stop.set()
        for client in clients:
            client.join()
    assert sorted(seen) == list(range(1, len(seen) + 1))


@pytest.mark.parametrize(
    ("guest", "grants", "words"),
    [
        ("hostage", Grants(), "used up its time"),
        ("hostage-asleep", WAITS, "blocked"),
        ("hoards-state", Grants(), "2097152 bytes, 1048576 are allowed"),
        ("loses-state", Grants(), "this is no state I wrote!"),
        ("trap-in-save", Grants(), "unreachable"),
    ],
)
def test_a_version_that_does_not_save_goes_on_and_is_named(host, neighbour, guest, grants, words):
    port = support.free_port()
    limits = Limits(start_ms=300, idle_ms=300, memory_bytes=4 << 20)
    host.start(guest, support.a_run("bad", 1, port=port, grants=grants, limits=limits))
    kept = socket.create_connection(("127.0.0.1", port), timeout=30)
    number(port, kept)
    reply = host.start("remembers", support.a_run("bad", 2, port=port, limits=limits))
    assert (type(reply), reply.code) == (host_api.Failed, "state-failed")
    assert "1.0.1 did not save its state" in reply.message
    assert words in reply.message
    assert reply.message.endswith("1.0.1 goes on")
    # It does, for old clients (unless its process had to be ended) and for new ones.
    if guest != "hostage-asleep":
        number(port, kept)
    assert number(port) >= 1
    assert host.health("bad").generation == 1
    kept.close()
    # And it cannot keep its place: a version that takes no state is swapped in over its head.
    assert isinstance(host.start("hello", support.a_run("bad", 3, port=port)), host_api.Started)
    assert support.http(port)[2] == b"hello\n"


@pytest.mark.parametrize(
    ("guest", "words"), [("takes-no-state", "this is no state I wrote!"), ("trap-in-load", "unreachable")]
)
def test_a_version_that_does_not_load_is_not_swapped_in(host, neighbour, guest, words):
    port = support.free_port()
    host.start("remembers", support.a_run("web", 1, port=port))
    with socket.create_connection(("127.0.0.1", port), timeout=30) as kept:
        assert number(port, kept) == 1
        reply = host.start(guest, support.a_run("web", 2, port=port))
        assert (type(reply), reply.code) == (host_api.Failed, "state-failed")
        assert "1.0.2 did not load the state of 1.0.1" in reply.message
        assert words in reply.message
        # The old one has forgotten nothing, and holds nobody up any more.
        assert [number(port, kept), number(port)] == [2, 3]


@pytest.mark.parametrize("guest", ["trap-in-save", "hostage"])
def test_a_rollback_from_a_version_that_does_not_save_finds_what_there_was_at_the_swap(host, guest):
    port = support.free_port()
    limits = Limits(start_ms=300)
    host.start("remembers", support.a_run("web", 1, port=port, limits=limits))
    assert [number(port), number(port)] == [1, 2]
    host.start(guest, support.a_run("web", 2, port=port, limits=limits))
    assert number(port) == 3
    assert host.ask(host_api.Revert, instance="web", generation=2).generation == 1
    assert number(port) == 3, "two before the swap, and this one"
    assert any("1.0.1 goes on with the state it had" in line for line in host.lines_of("web"))


def test_a_rollback_to_a_version_that_cannot_read_the_newer_state_finds_its_own(host):
    # `trap-in-load` saves and never loads: what the newer one saved costs it its memory, and its own cannot help
    port = support.free_port()
    host.start("trap-in-load", support.a_run("web", 1, port=port))
    assert number(port) == 1
    host.start("remembers", support.a_run("web", 2, port=port))
    assert number(port) == 2
    assert host.ask(host_api.Revert, instance="web", generation=2).generation == 1
    assert number(port) == 1, "a fresh start, and it is said so"
    assert any("1.0.1 starts without its state" in line for line in host.lines_of("web"))


def test_where_only_one_of_both_has_state_the_new_one_starts_empty(host):
    port = support.free_port()
    host.start("counter", support.a_run("web", 1, port=port))
    assert number(port) == 1
    assert isinstance(host.start("remembers", support.a_run("web", 2, port=port)), host_api.Started)
    assert number(port) == 1
    assert isinstance(host.start("counter", support.a_run("web", 3, port=port)), host_api.Started)
    assert number(port) == 1


@pytest.mark.parametrize("limits", [Limits(concurrency=2), Limits(requests_per_instance=1)])
def test_state_of_what_has_no_one_memory_is_refused_at_the_start(host, limits):
    reply = host.start("remembers", support.a_run("web", 1, limits=limits))
    assert (reply.code, "wasmfleet:state" in reply.message) == ("start-failed", True)


def test_a_large_state_arrives_whole(host):
    """Half a megabyte that depends on what was asked."""
    port = support.free_port()
    keeps = (
        support.wasm("hoards-state")
        .decode()
        .partition("\n")[2]
        .replace("(i32.const 2097152)", "(i32.const 524288)")
        .replace("(i32.store (i32.const 116) (i32.const 0))", "(i32.store (i32.const 116) (i32.const 16))")
        .replace(
            "(if (i32.ne (local.get $length) (i32.const 8))", "(if (i32.ne (local.get $length) (i32.const 524288))"
        )
    )
    limits = Limits(memory_bytes=4 << 20)
    host.start(keeps, support.a_run("web", 1, port=port, limits=limits))
    assert [number(port), number(port)] == [1, 2]
    assert isinstance(host.start(keeps, support.a_run("web", 2, port=port, limits=limits)), host_api.Started)
    assert number(port) == 3

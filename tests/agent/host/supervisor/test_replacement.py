"""Swap by replacement: the old version stops before the new one starts, and comes back if that fails."""

import re
import socket
import threading

import pytest
import support
from support import Limits

from agent.host.ipc import host_api
from fleet.protocol.manifest import Service
from tests.eventually import eventually


def number(port, sock=None):
    """What the guest counts: how many requests there were."""
    status, _, body = support.http(port, sock=sock)
    assert status == 200, body
    return int(body)


def gaps(host, name):
    return [int(found[1]) for line in host.lines_of(name) if (found := re.search(r"neither ran for (\d+) ms", line))]


def serves(host, number, swap="replace", args=("serve",)):
    return host.start("command", support.a_run("serves", number, trigger=Service(args=args), swap=swap))


def ups_and_downs(host, count):
    def found():
        words = [line.split()[-1] for line in host.lines_of("serves") if line.endswith((" up", " down"))]
        return words if len(words) >= count else None

    return eventually(found, f"{count} lines")


def test_one_run_ends_before_the_next_begins(host):
    assert isinstance(serves(host, 1), host_api.Started)
    ups_and_downs(host, 1)
    reply = serves(host, 2)
    assert reply.replaced == 1
    assert ups_and_downs(host, 3) == ["up", "down", "up"]
    (gap_ms,) = gaps(host, "serves")
    assert 0 < gap_ms <= reply.swap_ms + 1000
    assert host.ask(host_api.Revert, instance="serves", generation=2).generation == 1
    assert ups_and_downs(host, 5) == ["up", "down", "up", "down", "up"]
    assert len(gaps(host, "serves")) == 2
    assert isinstance(host.ask(host_api.Restart, instance="serves"), host_api.Done)
    assert ups_and_downs(host, 7) == ["up", "down"] * 3 + ["up"]
    health = host.health("serves")
    assert (health.state, health.workers, health.generation) == ("running", 1, 1)


@pytest.mark.parametrize("way", [("replace", "overlap"), ("overlap", "replace")])
def test_either_version_may_ask_for_it(host, way):
    assert isinstance(serves(host, 1, way[0]), host_api.Started)
    ups_and_downs(host, 1)
    assert serves(host, 2, way[1]).replaced == 1
    assert ups_and_downs(host, 3) == ["up", "down", "up"]


def test_state_is_carried_over_and_requests_wait_meanwhile(host):
    port = support.free_port()
    host.start("remembers", support.a_run("count", 1, port=port, swap="replace"))
    seen, stop = [], threading.Event()

    def ask():
        with socket.create_connection(("127.0.0.1", port), timeout=30) as kept:
            while not stop.is_set():
                seen.append(number(port, kept))

    clients = [threading.Thread(target=ask) for _ in range(3)]
    for client in clients:
        client.start()
    try:
        eventually(lambda: len(seen) >= 20, "requests are answered")
        assert host.start("remembers", support.a_run("count", 2, port=port, swap="replace")).replaced == 1
        before = len(seen)
        eventually(lambda: len(seen) >= before + 20, "requests are answered again")
        assert host.ask(host_api.Revert, instance="count", generation=2).generation == 1
        before = len(seen)
        eventually(lambda: len(seen) >= before + 20, "requests are answered by the first again")
    finally:
        stop.set()
        for client in clients:
            client.join()
    assert sorted(seen) == list(range(1, len(seen) + 1)), "each request was answered and counted once"


@pytest.mark.parametrize(
    ("guest", "code"),
    [("trap-in-start", "start-failed"), ("takes-no-state", "state-failed"), ("task", "start-failed")],
)
def test_the_old_version_runs_again_where_the_new_one_does_not_start(host, guest, code):
    port = support.free_port()
    host.start("remembers", support.a_run("count", 1, port=port, swap="replace"))
    assert [number(port) for _ in range(3)] == [1, 2, 3]
    reply = host.start(guest, support.a_run("count", 2, port=port, swap="replace"))
    assert reply.code == code
    assert number(port) == 4, "with the state that it had"
    health = host.health("count")
    assert (health.state, health.generation, health.workers) == ("running", 1, 1)


def test_a_version_that_cannot_save_its_state_is_replaced_by_one_that_has_none(host):
    port = support.free_port()
    host.start("loses-state", support.a_run("count", 1, port=port, swap="replace"))
    reply = host.start("remembers", support.a_run("count", 2, port=port, swap="replace"))
    assert reply.code == "state-failed"
    assert support.http(port)[0] == 200
    reply = host.start("hello", support.a_run("count", 3, port=port, swap="replace", limits=Limits()))
    assert reply.replaced == 1
    assert support.http(port)[0] == 200

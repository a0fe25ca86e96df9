"""Shared workers: instances of a publisher stay separate for their clients, and learn which one ended their worker."""

import os
import signal
import socket
from pathlib import Path

import pytest
import support
from host_processes import children, ended, forks, lanes_of

from agent.host.ipc import host_api
from fleet.protocol.codes import InstanceState
from fleet.protocol.manifest import Grants, Limits
from tests.eventually import eventually


def share(host, guest, name, generation=1, **rest):
    reply = host.start(guest, support.a_run(name, generation, share_worker=True, **rest))
    assert isinstance(reply, host_api.Started), reply
    return host.health(name).shared_worker


def get(host, name, sock=None):
    return support.http(host.port, f"GET /{name}/ HTTP/1.1\r\nhost: x\r\n\r\n", sock)


def count(host, name):
    """What the guest `counter` answers: how many requests this instance has had since it was made."""
    status, _, body = get(host, name)
    assert status == 200, body
    return int(body)


CLOCK = Grants(interfaces=("wasi:io", "wasi:clocks"))
SLEEPS = {"grants": CLOCK, "limits": Limits(call_ms=100, idle_ms=300)}


def test_instances_of_a_publisher_share_a_worker_and_are_called_separately(host):
    before = set(lanes_of(host))
    workers = {share(host, "counter", f"c{number}") for number in range(3)}
    assert len(workers) == 1
    assert workers != {""}
    assert len(set(lanes_of(host)) - before) == 1
    assert [count(host, f"c{number}") for number in (0, 1, 1, 2, 1)] == [1, 1, 2, 1, 3], "each has its own memory"
    assert [sum(host.health(f"c{number}").calls.values()) for number in range(3)] == [1, 3, 1]
    host.ask(host_api.Stop, instance="c1")
    assert (count(host, "c0"), count(host, "c2")) == (2, 2), "one that is stopped takes nobody along"
    assert get(host, "c1")[0] == 404


def test_the_last_to_leave_ends_the_worker(host):
    before = set(lanes_of(host))
    for name in ("a", "b"):
        share(host, "hello", name)
    (worker,) = set(lanes_of(host)) - before
    end = os.pidfd_open(worker)
    for name in ("a", "b"):
        host.ask(host_api.Stop, instance=name)
    assert ended([end])
    os.close(end)


@pytest.mark.parametrize(
    ("rest", "why"),
    [
        ({"namespace": "others"}, "a stranger's"),
        ({"grants": Grants(interfaces=("wasi:filesystem",))}, "files"),
        ({"grants": Grants(outbound=("https://example.com:443",))}, "may open connections"),
        ({"limits": Limits(concurrency=2)}, "calls at once"),
    ],
)
def test_instances_that_do_not_share_although_allowed(host, rest, why):
    ours = share(host, "hello", "a")
    theirs = share(host, "hello", "b", **rest)
    assert ours not in {"", theirs}
    if why != "a stranger's":
        assert theirs == ""
        assert why in host.ask(host_api.Logs, instance="b").lines[0], "and the log says why"


def test_without_the_operators_permission_each_instance_has_its_own_worker(host):
    for name in ("a", "b"):
        host.start("hello", support.a_run(name, 1))
    assert {host.health(name).shared_worker for name in ("a", "b")} == {""}


def test_a_trap_discards_only_the_store_of_its_own_instance(host):
    share(host, "counter", "good")
    assert count(host, "good") == 1
    share(host, "trap", "bad")
    share(host, "counter", "good2")
    for _ in range(3):
        assert get(host, "bad")[0] == 500
    assert count(host, "good") == 2, "its memory is as it was"
    assert host.health("bad").calls == {"guest-trap": 3}
    assert host.health("good").restarts == host.health("bad").restarts == 0


def test_a_hanging_guest_is_killed_with_its_worker_and_named_to_the_others(host):
    shared = share(host, "sleep", "bad", **SLEEPS)
    assert share(host, "sleep", "mate", **SLEEPS) == shared
    post = "POST /bad/ HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"  # nothing that is asked for a second time
    assert support.http(host.port, post)[0] == 502
    told = host.event(lambda event: isinstance(event, host_api.Changed) and event.instance == "mate")
    assert (told.state, "on account of bad" in told.message) == (InstanceState.BACKOFF, True)
    back = set()
    while back != {"bad", "mate"}:
        back.add(host.event(lambda event: isinstance(event, host_api.Changed) and event.state == "running").instance)
    assert (host.health("bad").restarts, host.health("mate").restarts) == (1, 0), "one is to blame, and only one"
    assert any("on account of bad" in line for line in host.ask(host_api.Logs, instance="mate").lines)
    # Whoever cost others their worker gets one of its own.
    assert host.health("bad").shared_worker == ""
    assert host.health("mate").shared_worker not in {"", shared}


def test_a_shared_worker_that_dies_between_calls_is_replaced_for_all(host):
    before = set(lanes_of(host))
    for name in ("a", "b"):
        share(host, "hello", name)
    (worker,) = set(lanes_of(host)) - before
    os.kill(worker, signal.SIGKILL)
    back = set()
    while back != {"a", "b"}:
        back.add(host.event(lambda event: isinstance(event, host_api.Changed) and event.state == "running").instance)
    assert {host.health(name).restarts for name in ("a", "b")} == {1}
    assert len({host.health(name).shared_worker for name in ("a", "b")}) == 1
    assert [get(host, name)[0] for name in ("a", "b")] == [200, 200]


def test_a_swap_in_a_shared_worker_loses_no_client_and_affects_no_other(host):
    for name in ("a", "b"):
        share(host, "counter", name)
    assert (count(host, "a"), count(host, "b")) == (1, 1)
    with socket.create_connection(("127.0.0.1", host.port), timeout=30) as kept:
        assert get(host, "a", kept)[0] == 200
        share(host, "hello", "a", generation=2)
        assert get(host, "a", kept)[0] == 200
        assert isinstance(host.ask(host_api.Revert, instance="a", generation=2), host_api.Started)
        assert int(get(host, "a", kept)[2]) == 3, "the old one was kept as it was"
    assert count(host, "b") == 2


def test_state_is_carried_in_a_shared_worker_as_in_one_of_its_own(host):
    shared = share(host, "remembers", "a")
    assert share(host, "remembers", "b") == shared
    assert [count(host, "a"), count(host, "a"), count(host, "b")] == [1, 2, 1]
    assert share(host, "remembers", "a", generation=2) == shared
    assert [count(host, "a"), count(host, "b")] == [3, 2]
    assert host.ask(host_api.Revert, instance="a", generation=2).generation == 1
    assert [count(host, "a"), count(host, "b")] == [4, 3]
    assert host.lines_of("a") == ()


@pytest.mark.parametrize(
    ("guest", "words"), [("hostage", "used up its time"), ("trap-in-save", "unreachable"), ("loses-state", "no state")]
)
def test_a_failed_save_in_a_shared_worker_affects_no_other(host, guest, words):
    limits = Limits(start_ms=300)
    shared = share(host, guest, "bad", limits=limits)
    assert share(host, guest, "mate", limits=limits) == shared
    assert [count(host, "mate"), count(host, "bad")] == [1, 1]
    reply = host.start("remembers", support.a_run("bad", 2, share_worker=True, limits=limits))
    assert (type(reply), reply.code) == (host_api.Failed, "state-failed")
    assert words in reply.message
    assert count(host, "mate") == 2
    assert (host.health("mate").restarts, host.health("mate").shared_worker) == (0, shared)
    assert count(host, "bad") >= 1, "and it goes on itself"


def test_a_hanging_save_in_a_shared_worker_is_killed_named_and_no_longer_shared(host):
    limits = Limits(start_ms=300, idle_ms=300)
    shared = share(host, "hostage-asleep", "bad", grants=CLOCK, limits=limits)
    assert share(host, "hostage-asleep", "mate", grants=CLOCK, limits=limits) == shared
    reply = host.start("remembers", support.a_run("bad", 2, share_worker=True, limits=limits))
    assert (type(reply), reply.code) == (host_api.Failed, "state-failed")
    assert "blocked" in reply.message
    host.event(
        lambda event: isinstance(event, host_api.Changed) and (event.instance, event.state) == ("bad", "running")
    )
    assert host.health("bad").shared_worker == ""
    assert get(host, "mate")[0] == 200
    assert host.health("mate").restarts == 0


def test_a_zygote_of_shared_workers_has_one_thread_too(host):
    for number in range(3):
        share(host, "hello", f"i{number}", namespace="crowd")
        get(host, f"i{number}")
    share(host, "trap", "bad", namespace="crowd")
    get(host, "bad")
    host.ask(host_api.Stop, instance="i0")
    host.ask(host_api.Restart, instance="i1")
    zygotes = [pid for pid, command in children(host.process.pid).items() if b"--shared" in command]
    top = [pid for pid in zygotes if Path(f"/proc/{pid}/stat").read_text().split()[3] == str(host.process.pid)]
    assert [len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in top] == [1] * len(top)
    assert top


def test_slots_with_different_images_come_together_in_a_quiet_moment(host):
    """Each new image opens a worker, since none can be mapped later; the newest has them all, and the others empty."""
    for guest in ("hello", "counter", "trap"):
        share(host, guest, guest, namespace="mixed")
    with socket.create_connection(("127.0.0.1", host.port), timeout=30) as kept:

        def together():
            assert get(host, "hello", kept)[0] == 200
            return len({host.health(name).shared_worker for name in ("hello", "counter", "trap")}) == 1

        eventually(together, "all three are in one worker")
    assert count(host, "counter") == 1


HTTP = Grants(interfaces=("wasi:http/outgoing-handler",))


def post(host, path, body, sock=None):
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    return support.http(host.port, head.encode() + body, sock)


@pytest.mark.parametrize("size", [1, 60_000, 300_000, 3_000_000])
def test_bodies_reach_a_slot_whole_and_its_answers_go_out_by_credit(host, size):
    large = Limits(request_bytes=4 << 20, response_bytes=4 << 20)
    shared = share(host, "probe", "echo", grants=HTTP, limits=large)
    assert share(host, "probe", "mate", grants=HTTP, limits=large) == shared
    body = os.urandom(size)
    for _ in range(2):
        assert post(host, "/echo/echo", body)[::2] == (200, body)
        assert get(host, "mate")[0] == 200
    assert host.health("echo").calls == {"ok": 2}
    assert post(host, "/echo/echo", bytes((4 << 20) + 1))[0] == 413


def test_a_client_of_one_slot_that_reads_nothing_of_a_whole_answer_keeps_no_other_waiting(host):
    large = Limits(response_bytes=8 << 20)
    shared = share(host, "large-answer", "large", limits=large)
    assert share(host, "large-answer", "mate", limits=large) == shared
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(30)
        slow.connect(("127.0.0.1", host.port))
        slow.sendall(b"GET /large/ HTTP/1.1\r\nhost: x\r\n\r\n")
        assert slow.recv(12, socket.MSG_WAITALL) == b"HTTP/1.1 200"
        assert [get(host, "mate")[0] for _ in range(3)] == [200] * 3
    eventually(lambda: sum(host.health("large").calls.values()) == 1, "its call is over")
    assert get(host, "mate")[0] == 200


def test_a_stream_from_a_slot_reaches_its_client_event_by_event(host):
    share(host, "probe", "events", grants=HTTP)
    with socket.create_connection(("127.0.0.1", host.port), timeout=30) as sock:
        sock.sendall(b"GET /events/events HTTP/1.1\r\nhost: x\r\n\r\n")
        data = b""
        while not data.partition(b"\r\n\r\n")[2]:
            more = sock.recv(1000)
            assert more, data
            data += more
        assert data.startswith(b"HTTP/1.1 200")
    assert get(host, "events")[0] == 200, "a client that leaves ends its call"
    health = host.health("events")
    assert (health.calls, health.errors, health.restarts) == ({"ok": 1, "client-gone": 1}, 0, 0)


def test_the_end_of_the_router_is_no_crash_of_those_who_share_a_worker(tmp_path):
    host = support.Host(tmp_path)
    for name in ("a", "b"):
        share(host, "counter", name)
        assert count(host, name) == 1
    (router,) = forks(host)
    os.kill(router, signal.SIGKILL)
    eventually(lambda: "host: the router ended" in (tmp_path / "host.log").read_text(), "the router has ended")

    def answer(name):
        try:
            return get(host, name)[0]
        except OSError:
            return 0

    for name in ("a", "b"):
        eventually(lambda name=name: answer(name) == 200, name)
        assert host.health(name).restarts == 0
    host.close()

"""Late verdicts on calls in real workers, and on instances that have left a shared worker."""

import os
import socket
from pathlib import Path

import pytest
import support

from agent.host.ipc import host_api
from agent.host.supervisor import worker_set
from fleet.protocol.manifest import Grants, Limits

LATE = Path(__file__).with_name("late")
PATHS = os.pathsep.join([str(LATE), *filter(None, [os.environ.get("PYTHONPATH")])])
CLOCK = Grants(interfaces=("wasi:io", "wasi:clocks"))
NAP = support.wasm("sleep").decode().partition("\n(")[2].replace("3600000000000", "300000000")


def started(host, guest, name, **rest):
    reply = host.start(guest, support.a_run(name, 1, **rest))
    assert isinstance(reply, host_api.Started), reply


def get(host, name):
    return support.http(host.port, f"GET /{name}/ HTTP/1.1\r\nhost: x\r\n\r\n")[0]


def test_a_verdict_on_a_call_that_has_ended_ends_nobody(tmp_path):
    assert "300000000" in NAP
    host = support.Host(tmp_path, env={"PYTHONPATH": PATHS})
    for name in ("alone", "shared", "mate"):
        started(host, "(" + NAP, name, grants=CLOCK, share_worker=name != "alone")
    assert host.health("shared").shared_worker == host.health("mate").shared_worker != ""
    for name in ("alone", "shared", "mate") * 2:
        assert get(host, name) == 200
    for name in ("alone", "shared", "mate"):
        health = host.health(name)
        assert (health.restarts, health.calls) == (0, {"ok": 2}), name
    host.close()


@pytest.mark.parametrize("way", ["GET /stays/ HTTP/1.1\r\n", "PATCH /stays/ HTTP/1.1\r\ncontent-length: 1\r\n"])
def test_who_leaves_a_shared_worker_in_the_middle_of_a_call_does_not_hang_the_others(host, way):
    """Nobody hears the verdict on its call any more: the worker's own ticker ends it, and the others get another."""
    sleeps = "(call $block (call $subscribe (i64.const 3600000000000)))"
    guest = support.wasm("sleep").decode().partition("\n(")[2]
    assert sleeps in guest
    post_alone = guest.replace(sleeps, f"(if (i32.eq (local.get 1) (i32.const 4)) (then {sleeps}))")
    for name in ("leaves", "stays"):
        limits = Limits(call_ms=100, idle_ms=worker_set.DRAIN_MS + 1500)  # its place is gone before it is too late
        started(host, "(" + post_alone, name, grants=CLOCK, limits=limits, share_worker=True)
    assert host.health("leaves").shared_worker == host.health("stays").shared_worker != ""
    with socket.create_connection(("127.0.0.1", host.port), timeout=60) as client:
        client.sendall(b"POST /leaves/ HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
        support.await_read(client)
        host.ask(host_api.Stop, instance="leaves")
        assert support.http(host.port, f"{way}host: x\r\n\r\n" + "x" * ("PATCH" in way))[0] == 200
    assert host.health("stays").restarts == 0, "no fault of its own"
    assert any("on account of one that had left it" in line for line in host.lines_of("stays"))

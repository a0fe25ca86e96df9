"""Atomic sets on the host: all new generations take over in the same moment, or none does."""

import asyncio
import os
import socket

import pytest
import support

from agent.host.ipc import host_api
from agent.host.ipc.host_api import StartError
from agent.host.supervisor import swap
from agent.host.supervisor.swap import SwapBarrier


def send(host, guest, run, together):
    """Ask for a start, and do not wait for its answer."""
    host._id += 1
    fd = support.sealed(support.compiled(guest))
    host_api.send(host.sock, host_api.Start(id=host._id, run=run, together=together), fd)
    os.close(fd)
    return host._id


def answers(host, *numbers):
    found = {}
    while set(numbers) - set(found):
        message = host_api.receive_from_host(host.sock)
        found[getattr(message, "id", None)] = message
    return [found[number] for number in numbers]


@pytest.fixture
def pair(host):
    """Two instances, first versions."""
    for name in ("front", "back"):
        assert isinstance(host.start("hello", support.a_run(name, 1)), host_api.Started)
    return host


def generations(host):
    return {one.instance: one.generation for one in host.ask(host_api.Status).instances}


def test_both_take_over_once_both_can(pair):
    first = send(pair, "hello", support.a_run("front", 2), ("back",))
    # The first may be ready by now: it waits, and the old pair answers.
    assert generations(pair) == {"front": 1, "back": 1}
    second = send(pair, "hello", support.a_run("back", 2), ("front",))
    assert [type(answer) for answer in answers(pair, first, second)] == [host_api.Started, host_api.Started]
    assert generations(pair) == {"front": 2, "back": 2}


@pytest.mark.parametrize("order", [("front", "back"), ("back", "front")])
def test_if_a_member_cannot_start_the_other_is_not_swapped(pair, order):
    guests = {"front": "hello", "back": "trap-in-start"}
    others = {"front": ("back",), "back": ("front",)}
    numbers = {name: send(pair, guests[name], support.a_run(name, 2), others[name]) for name in order}
    front, back = answers(pair, numbers["front"], numbers["back"])
    assert (back.code, front.code) == ("start-failed", "set-failed"), (back, front)
    assert "front: not swapped, as it belongs to an atomic set with back, which failed" in front.message
    assert generations(pair) == {"front": 1, "back": 1}
    assert support.http(pair.port, "GET /front/ HTTP/1.1\r\nhost: x\r\n\r\n")[0] == 200
    # Corrected, both go.
    numbers = [send(pair, "hello", support.a_run(name, 3), others[name]) for name in order]
    assert [type(answer) for answer in answers(pair, *numbers)] == [host_api.Started, host_api.Started]


@pytest.mark.parametrize("before", [None, "another port"])
def test_a_start_that_fails_at_the_barrier_leaves_no_port_open(host, before):
    """Else clients would connect and wait forever: nobody accepts there."""
    port = support.free_port()
    assert isinstance(host.start("hello", support.a_run("back", 1)), host_api.Started)
    if before:
        assert isinstance(host.start("hello", support.a_run("front", 1, port=support.free_port())), host_api.Started)
    front = send(host, "hello", support.a_run("front", 2, port=port), ("back",))
    back = send(host, "trap-in-start", support.a_run("back", 2), ("front",))
    assert [answer.code for answer in answers(host, front, back)] == ["set-failed", "start-failed"]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=30)


async def at_the_barrier(barrier, instance, other, start_s):
    """Arrive ready; return what kept the instance from taking over."""
    try:
        async with barrier.joined(instance, (other,)) as place:
            await place.ready(start_s)
    except StartError as error:
        return str(error)
    return ""


@pytest.mark.asyncio
async def test_a_set_that_is_complete_in_the_turn_of_the_time_out_takes_over_as_a_whole():
    barrier, no_time = SwapBarrier(), -swap._BARRIER_GRACE_S
    waits = [at_the_barrier(barrier, "front", "back", no_time), at_the_barrier(barrier, "back", "front", no_time)]
    assert await asyncio.gather(*waits) == ["", ""]


@pytest.mark.asyncio
async def test_a_member_that_does_not_arrive_is_named_and_fails_when_it_does():
    barrier, no_time = SwapBarrier(), -swap._BARRIER_GRACE_S
    assert "with back, which did not arrive" in await at_the_barrier(barrier, "front", "back", no_time)
    assert "with front, which failed" in await at_the_barrier(barrier, "back", "front", 1000)

"""A native guest behind a channel: the same frames, read and answered by the worker, in the real sandbox."""

import os
import socket

import pytest
from echo_guest import ECHO

from agent.host.engine.guest import Turn
from agent.host.ipc import frames, worker_api
from agent.host.ipc.frames import Frame, Kind
from agent.host.worker.native_channel import NativeChannel
from fleet.protocol.manifest import Grants, Limits

WINDOW = frames.INITIAL_CREDIT_BYTES


@pytest.fixture
def native(worker):
    return lambda guest, **how: worker(guest, grants=Grants(), **how)


def test_it_says_that_it_takes_frames_and_whole_bodies(native):
    ready = native("hello").ready
    assert ready.whole


def test_calls_are_answered_by_one_instance_in_order_also_when_they_were_written_ahead(native):
    it = native("counter")
    ahead = [it.request("/") for _ in range(4)]
    it.write(*(frame for each in ahead for frame in each))
    assert [int(it.answer(number).body) for number in (1, 2, 3, 4)] == [1, 2, 3, 4]


def test_an_instance_serves_as_many_calls_as_it_may(native):
    it = native("counter", limits=Limits(requests_per_instance=2))
    assert [int(it.get("/").body) for _ in range(5)] == [1, 2, 1, 2, 1]


@pytest.mark.parametrize("size", [0, 1, WINDOW, WINDOW + 1, 1_000_000])
def test_a_body_goes_through_the_guest_within_its_credit(native, size):
    it = native(ECHO, limits=Limits(request_bytes=1 << 20))
    body = os.urandom(size)
    for _ in range(2):
        answer = it.post("/", body)
        assert answer.body == body
        assert (answer.end, sum(answer.credits) <= size) == (b"0 whole\r\n\r\n", True)


def test_field_values_of_any_bytes_arrive_and_come_back_as_the_adapters_do(native):
    answer = native(ECHO).get("/", headers=b"x: caf\xe9\r\n")
    (head,) = answer.heads
    assert head.startswith(b"200\r\ncontent-length: 0\r\nhost: test\r\nx: caf")
    assert head.decode().encode("latin-1").decode().endswith("x: caf\u00e9\r\n"), (
        "UTF-8 for the guest, each byte a character"
    )


def test_a_body_larger_than_the_instance_takes_is_an_error(native):
    it = native(ECHO, limits=Limits(request_bytes=1000))
    assert it.post("/", bytes(300_000)).end == b"error 17"
    assert it.post("/", b"small").body == b"small"


def test_a_guest_writes_no_more_than_its_credit(native):
    it = native("large-answer")
    call = it.send("/")
    got = 0
    while got < WINDOW:
        got += len(frame.payload) if (frame := it.frame()).kind is Kind.BODY else 0
    ahead = it.request("/")
    it.write(*ahead, Frame(Kind.CREDIT, call, (1 << 30).to_bytes(4, "little")))  # behind the head of another call
    while (frame := it.frame()).kind is Kind.BODY:
        got += len(frame.payload)
    assert (frame, got) == (Frame(Kind.END, call, b"0 whole\r\n\r\n"), 2 << 20)
    assert len(it.answer(ahead[0].call).body) == 2 << 20


def test_a_trap_ends_the_call_and_the_next_instance_goes_on(native):
    it = native("trap")
    for _ in range(2):
        it.write(*it.request("/"), *it.request("/"))
        answer = it.answer(it.number - 1)
        assert answer.failed[0] == "guest-trap"
        it.realign(answer)
    it.receive(worker_api.Fault)


def test_an_interrupt_ends_a_guest_that_does_not_end(native):
    it = native("spin")
    for _ in range(2):
        call = it.send("/")
        worker_api.send(it.control, worker_api.Interrupt(call=call))
        answer = it.answer(call)
        assert answer.failed[0] == "guest-timeout"
        it.realign(answer)


def test_a_call_whose_client_is_gone_is_dropped(native):
    it = native(ECHO)
    it.write(*it.request("/", method=b"POST", body=b"half")[:-1], Frame(Kind.CANCEL, 1))
    assert it.answer(1).end == b"0 cut\r\n\r\n"
    assert it.post("/", b"next").body == b"next"


def left(worker, message, reply, *fds):
    """Have a message carried out between two calls."""
    answer = worker.ask(message, reply, *fds)
    assert worker.frame() == Frame(Kind.END, 0)
    return answer


def test_health_is_asked_while_calls_are_taken(native):
    it = native("unhealthy")
    assert left(it, worker_api.Check(id=1), worker_api.Checked).problem == "the sensor does not answer"
    assert it.get("/").body == b"hello\n"


@pytest.fixture
def memfd():
    fd = os.memfd_create("state", os.MFD_CLOEXEC)
    os.ftruncate(fd, 4096)
    yield fd
    os.close(fd)


def test_state_goes_from_one_worker_to_the_next_and_the_first_answers_nothing_before_it_is_told_to(native, memfd):
    old, new = native("remembers"), native("remembers", serve=False)
    for _ in range(41):
        old.get("/")
    saved = old.ask(worker_api.SaveState(id=1), worker_api.StateSaved, memfd)
    assert (saved.length > 0, saved.problem) == (True, None)
    loaded = new.ask(worker_api.LoadState(length=saved.length, id=2), worker_api.StateLoaded, memfd, leave=False)
    assert loaded.problem is None
    worker_api.send(new.control, worker_api.Serve())
    assert int(new.get("/").body) == 42
    old.send("/")
    worker_api.send(old.control, worker_api.Resume())
    assert old.frame() == Frame(Kind.END, 0)
    assert int(old.answer(old.number).body) == 42


def test_an_instance_that_traps_in_a_control_message_is_replaced_before_the_next_call(native, memfd):
    it = native("trap-in-save")
    assert "unreachable" in left(it, worker_api.SaveState(id=1), worker_api.StateSaved, memfd).problem
    assert it.get("/").heads[0].startswith(b"200")


def test_a_worker_whose_channel_ends_asks_for_another(native, zygote):
    it = native("hello")
    it.channel.close()
    assert zygote.exit_status(it.pid) == worker_api.RENEW


def test_a_router_that_ends_with_something_unread_is_the_end_of_the_channel_and_no_crash():
    ours, theirs = socket.socketpair()
    theirs.sendall(b"what nobody reads")
    ours.close()
    with theirs:
        assert NativeChannel(None, None, theirs).serve("") is Turn.CHANNEL_ENDED

"""A worker with a channel: the guest's loop in the real sandbox; these tests are its router and its supervisor."""

import os

import pytest
from channel_worker import Zygote

from agent.host.ipc import frames, worker_api
from agent.host.ipc.frames import Frame, Kind
from agent.host.sandbox import sandbox
from fleet.protocol.manifest import Limits

REUSED = Limits(requests_per_instance=1000)
WINDOW = frames.INITIAL_CREDIT_BYTES
HELLO = b"hello over wasi:http\n"


@pytest.fixture(params=["fresh", "reused"])
def probe(worker, request):
    return worker(limits=REUSED if request.param == "reused" else Limits())


@pytest.fixture
def reused(worker):
    return worker(limits=REUSED)


def test_the_worker_is_in_its_sandbox_and_says_that_it_takes_frames(worker):
    ready = worker().ready
    assert not ready.whole
    here = {layer for layer, holds in sandbox.probe().items() if holds}
    assert {layer for layer, holds in ready.layers.items() if holds} >= here


# Calls


def test_calls_one_after_the_other(probe):
    for _ in range(10):
        answer = probe.get("/")
        assert answer.heads[0].startswith(b"200\r\n")
        assert answer.head.status == 0
        assert answer.body == HELLO


@pytest.mark.parametrize(("most", "seen"), [(1, "1111111"), (3, "1231231"), (1000, "1234567")])
def test_an_instance_serves_as_many_calls_as_it_may(worker, most, seen):
    it = worker(limits=Limits(requests_per_instance=most))
    assert "".join(it.get("/count").body.decode().strip() for _ in seen) == seen


@pytest.mark.parametrize("most", [1, 2, 3, 4, 5, 1000])
def test_calls_that_were_written_ahead_are_answered_in_order_across_instances(worker, most):
    it = worker(limits=Limits(requests_per_instance=most))
    for _ in range(3):
        ahead = [it.request("/count") for _ in range(4)]
        it.write(*(frame for each in ahead for frame in each))
        numbers = [each[0].call for each in ahead]
        seen = [int(it.answer(number).body) for number in numbers]
        assert seen == [1 + (number - 1) % most for number in numbers]


def test_the_head_arrives_as_it_was_sent_and_the_answers_fields_too(probe):
    answer = probe.get("/describe?a=b", method=b"PATCH", headers=b"x: caf\xe9\r\n")
    assert answer.body == b"patch /describe?a=b http test\nx=caf\xe9\n"
    assert answer.heads == [b"200\r\ncontent-type: text/plain\r\nx-bytes: caf\xc3\xa9\r\n"]
    assert answer.head.status == 0


@pytest.mark.parametrize(
    ("path", "end"),
    [
        ("/error", b"error 38"),
        ("/silent", b"unanswered"),
        ("/cut", b"0 cut\r\n\r\n"),
        ("/status/418", b"0 whole\r\n\r\n"),
        ("/trailers", b"0 whole\r\n\r\nx-sum: 7\r\n"),
    ],
)
def test_the_end_says_what_became_of_the_answer(worker, path, end):
    assert worker().get(path).end == end


def test_a_body_that_begins_before_its_answer_is_set_says_so_and_the_head_follows(probe):
    answer = probe.get("/late")
    assert answer.heads == [b"", b"200\r\n"]
    assert answer.body == b"written first\n"


def test_an_answers_head_that_no_frame_can_hold_is_an_error_of_the_guests(reused):
    assert reused.get("/fields/500").head.status == 0
    refused = reused.get("/fields/700")
    assert (refused.heads, refused.end) == ([], b"error 26")


def test_standard_input_of_a_guest_is_empty_whatever_the_channel_holds(probe):
    first, second = probe.request("/stdin"), probe.request("/")
    probe.write(*first, *second)
    assert probe.answer(1).body == b"0"
    assert probe.answer(2).body == HELLO


def test_what_a_guest_prints_is_its_log_while_the_loop_runs(probe):
    assert probe.get("/log").body == b"logged\n"
    lines = [probe.receive(worker_api.Line).text for _ in range(2)]
    assert sorted(lines) == ["to standard error", "to standard output"]


# Bodies


@pytest.mark.parametrize("size", [1, 4096, WINDOW, WINDOW + 1, 1_000_000])
def test_a_body_goes_through_the_guest_within_its_credit(probe, size):
    body = os.urandom(size)
    answer = probe.post("/echo", body)
    assert answer.body == body
    assert answer.head.status == 0
    assert sum(answer.credits) <= size
    if size <= WINDOW // 4:
        assert not answer.credits, "a small body costs no frame of credit"


def test_trailers_of_a_request_come_behind_its_body(probe):
    assert b"x-sum=7" in probe.post("/sum", b"body", trailers=b"x-sum: 7\r\n").body
    assert b"x-sum" not in probe.post("/sum", b"body").body


def test_a_guest_writes_no_more_than_its_credit_and_goes_on_once_there_is_more(probe):
    call = probe.send("/large/1")
    head = probe.frame()
    assert (head.kind, head.call) == (Kind.RESPONSE, call)
    got = 0
    while got < WINDOW:
        got += len(probe.frame().payload)
    assert got == WINDOW
    probe.channel.setblocking(False)
    with pytest.raises(BlockingIOError):  # nothing on its way: the guest waits, since the last byte was its last credit
        probe.channel.recv(1)
    probe.channel.settimeout(60)
    probe.write(Frame(Kind.CREDIT, call, (1 << 20).to_bytes(4, "little")))
    while (frame := probe.frame()).kind is Kind.BODY:
        got += len(frame.payload)
    assert (frame.kind, got) == (Kind.ANSWERED, 1 << 20)


@pytest.mark.parametrize("most", [1, 2, 1000])
def test_credit_behind_calls_that_were_written_ahead_reaches_the_call_in_hand(worker, most):
    it = worker(limits=Limits(requests_per_instance=most))
    large, ahead = it.request("/large/1"), [it.request("/count") for _ in range(3)]
    it.write(*large, *(frame for each in ahead for frame in each))
    answer = it.answer(1)
    assert len(answer.body) == 1 << 20
    frame = it.frame()
    if most == 1:  # the first store has read what was the next one's
        assert frame.kind is Kind.FAILED
        outcome, _, token = frame.payload.decode().split("\r\n")
        assert outcome == ""
        it.channel.sendall(token.encode())
        it.write(*(frame for each in ahead for frame in each))
    else:
        it.arrived.appendleft(frame)
    seen = []
    for number in (2, 3, 4):
        answer = it.answer(number)
        if answer.failed:  # after the second call of two, where the third and fourth were kept by the first store
            it.realign(answer)
            it.write(*(frame for each in ahead[number - 2 :] for frame in each))
            answer = it.answer(number)
        seen.append(int(answer.body))
    assert seen == [1 + number % most for number in (1, 2, 3)]


def test_what_a_guest_left_unread_of_a_body_is_skipped(probe):
    body = os.urandom(WINDOW)
    for _ in range(3):
        probe.write(*probe.request("/", method=b"POST", body=body))
        assert probe.answer(probe.number).body == HELLO
    assert probe.post("/echo", b"read again").body == b"read again"


# Ends


def ended(answer, outcome):
    assert answer.failed[0] == outcome, answer
    return answer.failed[1]


def test_a_trap_ends_the_call_and_the_next_instance_goes_on_in_the_same_process(probe):
    for _ in range(3):
        answer = probe.get("/trap")
        assert "unreachable" in ended(answer, "guest-trap")
        probe.realign(answer)
        assert probe.get("/count").body == b"1\n"
    assert "unreachable" in probe.receive(worker_api.Fault).message


def test_calls_behind_one_that_traps_are_void_and_are_sent_again(probe):
    probe.write(*probe.request("/trap"), *probe.request("/count"), *probe.request("/count"))
    answer = probe.answer(1)
    ended(answer, "guest-trap")
    probe.realign(answer)
    assert probe.get("/").body == HELLO, "the calls before the token are never answered"


def test_a_token_is_found_wherever_a_body_was_cut(probe):
    """Before the token come beginnings of it, and the frame in hand is never finished."""
    probe.write(probe.request("/trap", method=b"POST", body=b"")[0])
    answer = probe.answer(1)
    token = answer.failed[-1].encode()
    torn = frames.encode(Frame(Kind.BODY, 1, os.urandom(5000)))[:-700]
    probe.channel.sendall(torn + token[:-1] + b"-" + token[:5] + b"-" + token[:2] + token[:3] + token)
    assert probe.get("/").body == HELLO


def test_an_instance_takes_no_call_after_an_answer_that_failed(reused):
    for path in ("/error", "/silent"):
        call = reused.send(path)
        assert reused.answer(call).end
        said = reused.answer(call)
        assert ended(said, "") == ""
        reused.realign(said)
        assert reused.get("/count").body == b"1\n"


def test_an_interrupt_ends_a_guest_that_does_not_end(probe):
    call = probe.send("/spin")
    worker_api.send(probe.control, worker_api.Interrupt(call=call))
    answer = probe.answer(call)
    assert "time" in ended(answer, "guest-timeout")
    probe.realign(answer)
    assert probe.get("/").body == HELLO
    assert "time" in probe.receive(worker_api.Fault).message


def test_an_interrupt_that_comes_too_late_ends_nothing(probe):
    assert probe.get("/").body == HELLO
    worker_api.send(probe.control, worker_api.Interrupt(call=1))
    probe.ask(worker_api.Probe(id=5), worker_api.Probed)  # read by now
    assert probe.frame() == Frame(Kind.END, 0)
    assert probe.get("/").body == HELLO


def test_a_call_whose_client_is_gone_ends_at_its_next_write_and_nobody_is_blamed(probe):
    call = probe.send("/events")
    probe.frame()
    probe.write(Frame(Kind.CANCEL, call))
    answer = probe.answer(call, credit=False)
    assert ended(answer, "guest-trap") == "cancelled"
    probe.realign(answer)
    probe.write(Frame(Kind.CANCEL, call))  # of a call that has ended: stale
    assert probe.get("/").body == HELLO
    probe.ask(worker_api.Probe(id=5), worker_api.Probed)
    assert not [said for said in probe.said if isinstance(said, worker_api.Fault)]


def test_a_call_whose_body_will_not_come_ends(probe):
    probe.write(*probe.request("/echo", method=b"POST", body=b"half of it")[:-1])
    probe.write(Frame(Kind.CANCEL, 1))
    answer = probe.answer(1)
    assert ended(answer, "guest-trap") == "cancelled"


@pytest.mark.parametrize("when", ["idle", "in a call"])
def test_a_worker_whose_channel_ends_asks_for_another(probe, zygote, when):
    if when == "in a call":
        probe.send("/events")
        probe.frame()
    probe.channel.close()
    assert zygote.exit_status(probe.pid) == worker_api.RENEW


def test_a_worker_ends_with_its_supervisor_in_the_middle_of_a_call(probe, zygote):
    probe.send("/spin")
    probe.control.close()
    assert zygote.exit_status(probe.pid) == 0


def test_a_limit_of_fuel_ends_one_call_and_each_call_has_its_own(worker):
    counting = Zygote(fuel=True)
    try:
        it = worker(zygote=counting, limits=Limits(fuel=2_000_000, requests_per_instance=100))
        for _ in range(3):
            assert it.get("/").body == HELLO
            answer = it.get("/spin")
            assert "fuel" in ended(answer, "guest-timeout")
            it.realign(answer)
    finally:
        counting.close()


# Control messages while the loop runs


def left(worker, message, reply, *fds):
    """Have a message carried out between two calls."""
    answer = worker.ask(message, reply, *fds)
    assert worker.frame() == Frame(Kind.END, 0)
    return answer


def test_health_is_asked_while_the_loop_runs(reused):
    assert left(reused, worker_api.Check(id=1), worker_api.Checked).problem is None
    assert reused.get("/sick").body == b"sick\n"
    assert left(reused, worker_api.Check(id=2), worker_api.Checked).problem == "it is sick"
    assert reused.get("/count").body == b"2\n", "the same instance goes on"


def test_a_worker_that_is_asked_to_leave_the_loop_for_nothing_goes_on(probe):
    probe.write(Frame(Kind.YIELD, 0))
    assert probe.frame() == Frame(Kind.END, 0)
    assert probe.get("/").body == HELLO


def test_an_instance_that_traps_in_a_control_message_is_replaced_before_the_next_call(reused):
    assert reused.get("/poison").body == b"poisoned\n"
    assert "unreachable" in left(reused, worker_api.Check(id=1), worker_api.Checked).problem
    assert reused.get("/count").body == b"1\n"
    assert left(reused, worker_api.Check(id=2), worker_api.Checked).problem is None


def test_processor_time_of_calls_is_counted(worker):
    it = worker()
    before = it.page.read().cpu_ns
    it.get("/large/1")
    left(it, worker_api.Probe(id=1), worker_api.Probed)
    assert it.page.read().cpu_ns > before


def test_secrets_do_not_leave_with_a_failure(worker):
    it = worker(secrets={"KEY": "unreachable"})
    answer = it.get("/trap")
    assert "unreachable" not in ended(answer, "guest-trap")


def test_a_guest_that_waits_for_a_timer_ends_with_its_client(reused):
    number = reused.send("/sleep")
    reused.write(Frame(Kind.CANCEL, number))
    answer = reused.answer(number)
    assert answer.failed[:2] == ["guest-trap", "cancelled"]
    reused.realign(answer)
    assert reused.get("/").body == HELLO


def test_a_nudge_that_nobody_waits_for_is_passed_over(probe):
    for _ in range(3):
        probe.write(Frame(Kind.NUDGE, 0))
        assert probe.get("/").body == HELLO
        probe.write(Frame(Kind.NUDGE, 0))
        assert probe.post("/echo", b"x" * 200_000).body == b"x" * 200_000


def test_an_answer_that_is_never_flushed_goes_out_whole(probe):
    for size in (1, 65_530, 70_000, 300_000):
        assert probe.post("/stream", b"x" * size).body == b"first\n" + b"x" * size

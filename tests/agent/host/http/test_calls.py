"""Calls over channels, between clients of the router and simulated workers that speak frames."""

import asyncio
import struct

import pytest
from router_board import GET, HEAD, TOKEN, board

from agent.host.http import channel
from agent.host.ipc import helper_api
from agent.host.ipc.frames import INITIAL_CREDIT_BYTES, Frame, Kind
from fleet.protocol.codes import CallOutcome


@pytest.mark.asyncio
async def test_a_request_reaches_its_worker_as_it_was_sent_and_its_answer_goes_out_whole(tmp_path):
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(), await the_board.client()
        client.ask(b"GET /a?b HTTP/1.1\r\nHost: board\r\nX-Mine: 1\r\n\r\n")
        frame = await worker.next(Kind.WHOLE_REQUEST)
        assert frame.payload == b"GET /a?b http board\r\nhost: board\r\nx-mine: 1\r\n"
        assert (worker.page.number(), worker.own.number(), worker.own.began_ns()) == (1, 1, 0)
        worker.answer(frame.call)
        status, fields, body = await client.answer()
        assert (status, fields[b"content-type"], fields[b"content-length"], body) == (200, b"text/plain", b"2", b"hi")
        assert worker.page.read().calls == {CallOutcome.OK: 1}
        assert worker.page.number() == 0


@pytest.mark.parametrize("size", [1, 5000, INITIAL_CREDIT_BYTES, INITIAL_CREDIT_BYTES + 1, 700_000])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.asyncio
async def test_bodies_pass_both_ways_whatever_their_size_and_framing(tmp_path, size, chunked):
    sent = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(), await the_board.client()
        if chunked:
            framed = b"%x\r\n%b\r\n0\r\nx-end: 1\r\n\r\n" % (size, sent)
            client.ask(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + framed)
        else:
            client.ask(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % size + sent)
        call = (await worker.next(Kind.REQUEST)).call
        got = b""
        while (frame := await worker.next(Kind.BODY, Kind.END)).kind is Kind.BODY:
            got += frame.payload
            worker.say(Frame(Kind.CREDIT, call, struct.pack("<I", len(frame.payload))))
        assert got == sent
        assert frame.payload == (b"x-end: 1\r\n" if chunked else b"")
        credit, left = INITIAL_CREDIT_BYTES, sent
        worker.say(Frame(Kind.RESPONSE, call, HEAD))
        answer = asyncio.ensure_future(client.answer())
        while left:
            while not credit:
                credit += struct.unpack("<I", (await worker.next(Kind.CREDIT)).payload)[0]
            piece = left[: min(credit, 65536)]
            credit, left = credit - len(piece), left[len(piece) :]
            worker.say(Frame(Kind.BODY, call, piece))
        worker.say(Frame(Kind.END, call, b"0 whole\r\n\r\n"))
        assert (await answer)[2] == sent


@pytest.mark.asyncio
async def test_a_worker_runs_one_call_at_a_time_and_small_ones_are_written_ahead(tmp_path):
    async with board(tmp_path) as the_board:
        worker = await the_board.worker()
        clients = [await the_board.client() for _ in range(6)]
        for client in clients:
            client.ask()
        calls = [(await worker.next(Kind.WHOLE_REQUEST)).call for _ in range(channel.AHEAD_MAX)]
        assert calls == [1, 2, 3, 4]
        assert worker.page.number() == 1
        worker.answer(1, b"first")
        assert (await worker.next(Kind.WHOLE_REQUEST)).call == 5
        assert worker.page.number() == 2
        for call in (2, 3, 4, 5):
            worker.answer(call)
        worker.answer((await worker.next(Kind.WHOLE_REQUEST)).call)
        answers = [await client.answer() for client in clients]
        assert sorted(body for _, _, body in answers) == [b"first", *[b"hi"] * 5]


@pytest.mark.asyncio
async def test_nothing_is_written_ahead_to_a_worker_while_there_is_another_or_behind_a_body(tmp_path):
    async with board(tmp_path) as the_board:
        one = await the_board.worker()
        first, second = await the_board.client(), await the_board.client()
        first.ask(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n" + b"x" * 80_000)
        await one.next(Kind.REQUEST)
        second.ask()
        two = await the_board.worker()
        worker_two_call = (await two.next(Kind.WHOLE_REQUEST)).call
        two.answer(worker_two_call)
        assert (await second.answer())[0] == 200
        first.ask(b"x" * 20_000)
        assert len(await one.body()) == 100_000
        one.answer(1)
        assert (await first.answer())[0] == 200


@pytest.mark.asyncio
async def test_an_answer_goes_out_as_the_guest_flushes_it(tmp_path):
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(), await the_board.client()
        client.ask(GET.replace(b"host", b"te: trailers\r\nhost"))
        call = (await worker.next(Kind.WHOLE_REQUEST)).call
        worker.say(Frame(Kind.RESPONSE, call, HEAD))
        assert b"transfer-encoding: chunked" in await client.reader.readuntil(b"\r\n\r\n")
        for piece in (b"one", b"two"):
            worker.say(Frame(Kind.BODY, call, piece))
            assert await client.reader.readexactly(8) == b"3\r\n%b\r\n" % piece
        worker.say(Frame(Kind.END, call, b"0 whole\r\n\r\nx-sum: 6\r\n"))
        assert await client.reader.readuntil(b"\r\n\r\n") == b"0\r\nx-sum: 6\r\n\r\n"


@pytest.mark.asyncio
async def test_a_body_that_begins_before_the_answer_is_set_waits_for_its_head(tmp_path):
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(), await the_board.client()
        client.ask()
        call = (await worker.next(Kind.WHOLE_REQUEST)).call
        worker.say(Frame(Kind.RESPONSE, call), Frame(Kind.BODY, call, b"early "))
        worker.say(Frame(Kind.RESPONSE, call, HEAD), Frame(Kind.BODY, call, b"late"))
        worker.say(Frame(Kind.END, call, b"0 whole\r\n\r\n"))
        assert (await client.answer())[::2] == (200, b"early late")


@pytest.mark.parametrize("goes_out_before_its_end", [False, True])
@pytest.mark.parametrize(
    ("status", "method", "framing"),
    [
        (204, b"GET", {}),
        (304, b"GET", {b"content-length": b"5"}),
        (200, b"HEAD", {b"content-length": b"5"}),
        (304, b"HEAD", {b"content-length": b"5"}),
        (204, b"HEAD", {}),
    ],
)
@pytest.mark.asyncio
async def test_a_length_is_said_of_a_body_that_is_not_sent(tmp_path, status, method, framing, goes_out_before_its_end):
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(), await the_board.client()
        client.ask(GET.replace(b"GET", method))
        call = (await worker.next()).call
        worker.say(Frame(Kind.RESPONSE, call, b"%d\r\ncontent-length: 5\r\n" % status))
        if goes_out_before_its_end:
            await client.reader.readuntil(b"HTTP/1.1")
        worker.say(Frame(Kind.END, call, b"0 whole\r\n\r\n"))
        head = (await client.reader.readuntil(b"\r\n\r\n")).lower()
        fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
        assert {name: fields[name] for name in fields.keys() & {b"content-length", b"transfer-encoding"}} == framing


@pytest.mark.asyncio
async def test_no_chunks_are_announced_for_a_status_without_a_body(tmp_path):
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(), await the_board.client()
        for status in (204, 304):
            client.ask()
            call = (await worker.next()).call
            worker.say(Frame(Kind.RESPONSE, call, b"%d\r\n" % status))
            assert b"transfer-encoding" not in await client.reader.readuntil(b"\r\n\r\n")
            worker.say(Frame(Kind.END, call, b"0 whole\r\n\r\n"))
            await worker.answer_next(client)


@pytest.mark.parametrize(("said", "status"), [(200, 502), (404, 502), (500, 500), (503, 503)])
@pytest.mark.asyncio
async def test_a_guest_that_says_an_error_and_drops_its_body_keeps_its_status(tmp_path, said, status):
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(), await the_board.client()
        client.ask()
        call = (await worker.next()).call
        worker.say(Frame(Kind.RESPONSE, call, b"%d\r\n" % said), Frame(Kind.END, call, b"0 cut\r\n\r\n"))
        assert (await client.answer())[::2] == (status, b"the component dropped its answer's body before its end\n")


@pytest.mark.parametrize(
    ("end", "status", "body"),
    [
        (b"error 15\r\n", 500, b"the component answered with the error HTTP-request-denied\n"),
        (b"unanswered", 500, b"the component gave no answer\n"),
    ],
)
@pytest.mark.asyncio
async def test_a_guest_without_an_answer_is_said_to_its_client_and_in_its_log(tmp_path, end, status, body):
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(), await the_board.client()
        client.ask()
        worker.say(Frame(Kind.END, (await worker.next()).call, end))
        assert (await client.answer())[::2] == (status, body)
        assert (await the_board.report(helper_api.ChannelNote)).text == f"host: {body.decode().strip()}"
        assert (worker.page.read().calls, worker.page.read().errors) == ({CallOutcome.OK: 1}, 1)


@pytest.mark.parametrize(
    ("head", "why"),
    [
        (HEAD + b"content-length: 101\r\n", "a body of 101 bytes, at most 100 are allowed"),
        (b"99\r\n", "status 99"),
        (b"200\r\nbad name: x\r\n", "header line"),
        (b"no head\r\n", "begins with no status"),
        (b"200\r\ncontent-length: 99999999999999999999\r\n", "a content-length of 20 digits"),
    ],
)
@pytest.mark.asyncio
async def test_an_answer_that_is_not_http_is_refused(tmp_path, head, why):
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(response_bytes=100), await the_board.client()
        client.ask()
        worker.answer((await worker.next()).call, head=head)
        status, _, body = await client.answer()
        assert (status, body.startswith(b"the component's answer is not one")) == (502, True)
        assert why in (await the_board.report(helper_api.ChannelNote)).text


@pytest.mark.parametrize(
    ("head", "pieces", "got"),
    [
        (HEAD + b"content-length: 4\r\n", [b"too long"], b""),
        (HEAD + b"content-length: 40\r\n", [b"too short"], b"too short"),
        (HEAD, [b"x" * 60, b"y" * 60], b"3c\r\n" + b"x" * 60 + b"\r\n"),
    ],
)
@pytest.mark.asyncio
async def test_an_answer_that_breaks_its_own_length_is_cut_off(tmp_path, head, pieces, got):
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(response_bytes=100), await the_board.client()
        client.ask()
        call = (await worker.next()).call
        worker.say(Frame(Kind.RESPONSE, call, head))
        await client.reader.readuntil(b"\r\n\r\n")
        read = b""
        for piece in pieces:
            worker.say(Frame(Kind.BODY, call, piece))
            if len(read) < len(got):
                read += await client.reader.readexactly(len(got))
        worker.say(Frame(Kind.END, call, b"0 whole\r\n\r\n"))
        assert await client.reader.read() == b""
        assert read == got
        assert "cut off" in (await the_board.report(helper_api.ChannelNote)).text


@pytest.mark.parametrize(("outcome", "status"), [(CallOutcome.GUEST_TRAP, 500), (CallOutcome.GUEST_TIMEOUT, 504)])
@pytest.mark.asyncio
async def test_a_call_that_fails_is_answered_and_those_written_ahead_run_after_the_token(tmp_path, outcome, status):
    async with board(tmp_path) as the_board:
        worker = await the_board.worker()
        clients = [await the_board.client() for _ in range(3)]
        for client in clients:
            client.ask()
            await worker.next(Kind.WHOLE_REQUEST)
        worker.fail(outcome.encode(), b"it broke")
        assert (await clients[0].answer())[::2] == (status, b"it broke\n")
        for client in clients[1:]:
            worker.answer((await worker.next(Kind.WHOLE_REQUEST)).call)
            assert (await client.answer())[0] == 200
        assert worker.page.read().calls == {outcome: 1, CallOutcome.OK: 2}


@pytest.mark.asyncio
async def test_a_store_that_was_replaced_between_calls_costs_none(tmp_path):
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(reuses=True), await the_board.client()
        client.ask()
        call = (await worker.next()).call
        worker.lose_place()
        worker.say(Frame(Kind.END, call, b"unanswered"))
        assert (await client.answer())[0] == 500
        client.ask()  # waits: the stream is about to begin anew
        worker.fail(b"", b"")
        worker.answer((await worker.next(Kind.WHOLE_REQUEST)).call)
        assert (await client.answer())[0] == 200


@pytest.mark.parametrize("method", [b"GET", b"POST"])
@pytest.mark.asyncio
async def test_calls_that_had_not_begun_go_to_another_worker_whatever_their_method(tmp_path, method):
    async with board(tmp_path) as the_board:
        worker = await the_board.worker()
        clients = [await the_board.client() for _ in range(3)]
        clients[0].ask(GET.replace(b"GET", b"POST"))
        await worker.next(Kind.WHOLE_REQUEST)
        for client in clients[1:]:
            client.ask(GET.replace(b"GET", method))
            if method == b"GET":  # only what may begin twice is written ahead
                await worker.next(Kind.WHOLE_REQUEST)
        worker.close()
        assert (await clients[0].answer())[0] == 502
        another = await the_board.worker()
        for client in clients[1:]:
            another.answer((await another.next(Kind.WHOLE_REQUEST)).call)
            assert (await client.answer())[0] == 200


@pytest.mark.parametrize(("method", "statuses"), [(b"GET", [200]), (b"POST", [502])])
@pytest.mark.asyncio
async def test_a_call_that_ran_in_a_worker_that_died_is_repeated_only_where_that_is_safe(tmp_path, method, statuses):
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(), await the_board.client()
        client.ask(GET.replace(b"GET", method))
        await worker.next(Kind.WHOLE_REQUEST)
        worker.close()
        another = await the_board.worker()
        if statuses == [200]:
            another.answer((await another.next(Kind.WHOLE_REQUEST)).call)
        assert (await client.answer())[0] == statuses[0]


@pytest.mark.asyncio
async def test_a_swap_gives_new_calls_to_the_new_worker_and_lets_the_old_one_finish(tmp_path):
    async with board(tmp_path) as the_board:
        old, first = await the_board.worker(), await the_board.client()
        first.ask()
        call = (await old.next()).call
        new = await the_board.worker()
        the_board.tell(helper_api.DrainChannel(old.number))
        for _ in range(3):
            other = await the_board.client()
            other.ask()
            new.answer((await new.next(Kind.WHOLE_REQUEST)).call)
            assert (await other.answer())[0] == 200
        old.answer(call)
        assert (await first.answer())[0] == 200
        assert (await the_board.report(helper_api.ChannelDrained)).worker == old.number
        first.ask()  # its connection stays where it is
        new.answer((await new.next(Kind.WHOLE_REQUEST)).call)
        assert (await first.answer())[0] == 200
        assert not old.has_more


@pytest.mark.asyncio
async def test_calls_keep_to_the_limits_of_the_worker_that_serves_before_a_swap_and_after_a_revert(tmp_path):
    async with board(tmp_path) as the_board:

        async def status(serving):
            client = await the_board.client()
            client.ask(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n" + b"x" * 100)
            if serving is not None:
                call = (await serving.next(Kind.REQUEST)).call
                assert await serving.body() == b"x" * 100
                serving.answer(call)
            return (await client.answer())[0]

        strict = await the_board.worker(whole=True, request_bytes=10)
        ample = await the_board.worker(whole=True, request_bytes=1000, serve=False)
        assert await status(None) == 413
        for gone, comes in ((strict, ample), (ample, strict)):
            the_board.tell(helper_api.ServeChannel(comes.number))
            the_board.tell(helper_api.DrainChannel(gone.number))
            await the_board.report(helper_api.ChannelDrained)
            assert await status(None if comes is strict else ample) == (413 if comes is strict else 200)


@pytest.mark.asyncio
async def test_a_worker_leaves_its_loop_between_two_calls_and_is_given_none_meanwhile(tmp_path):
    async with board(tmp_path) as the_board:
        worker, client, other = await the_board.worker(), await the_board.client(), await the_board.client()
        client.ask()
        worker.leaves = False
        call = (await worker.next()).call
        the_board.tell(helper_api.YieldChannel(worker.number))
        worker.answer(call)
        assert await worker.next() == Frame(Kind.YIELD, 0)
        assert (await client.answer())[0] == 200
        other.ask()
        the_board.tell(helper_api.DrainChannel(worker.number))  # as after a state was saved
        await the_board.report(helper_api.ChannelDrained)
        assert not worker.has_more
        worker.say(Frame(Kind.END, 0))
        the_board.tell(helper_api.ServeChannel(worker.number))
        worker.answer((await worker.next(Kind.WHOLE_REQUEST)).call)
        assert (await other.answer())[0] == 200


@pytest.mark.asyncio
async def test_each_call_that_takes_long_is_reported_also_if_it_was_written_ahead(tmp_path):
    async with board(tmp_path) as the_board:
        worker, clients = await the_board.worker(), [await the_board.client() for _ in range(3)]
        for client in clients:
            client.ask()
        for client in clients:
            call = (await worker.next()).call
            assert await the_board.report(helper_api.LongCall) == helper_api.LongCall(worker.number, call)
            worker.answer(call)
            assert (await client.answer())[0] == 200


@pytest.mark.asyncio
async def test_after_a_reported_call_the_worker_leaves_its_loop_before_it_gets_another(tmp_path):
    """An interrupt that comes too late for the call meets no other: the worker reads it outside of its loop."""
    async with board(tmp_path) as the_board:
        worker, client, other = await the_board.worker(), await the_board.client(), await the_board.client()
        worker.leaves = False
        client.ask()
        call = (await worker.next()).call
        await the_board.report(helper_api.LongCall)
        other.ask()  # not written behind it
        worker.answer(call)
        assert await worker.next() == Frame(Kind.YIELD, 0)
        assert (await client.answer())[0] == 200
        assert worker.page.number() == 0
        worker.say(Frame(Kind.END, 0))
        worker.answer((await worker.next(Kind.WHOLE_REQUEST)).call)
        assert (await other.answer())[0] == 200


@pytest.mark.parametrize("answers", [False, True])
@pytest.mark.asyncio
async def test_an_interrupt_that_came_too_late_costs_the_call_behind_nothing(tmp_path, answers):
    async with board(tmp_path) as the_board:
        worker, client, other = await the_board.worker(), await the_board.client(), await the_board.client()
        client.ask()
        call = (await worker.next()).call
        other.ask()
        behind = (await worker.next(Kind.WHOLE_REQUEST)).call
        await the_board.report(helper_api.LongCall)
        worker.lose_place()
        end = [Frame(Kind.RESPONSE, call, HEAD), Frame(Kind.END, call, b"0 whole\r\n\r\n")]
        begun = [Frame(Kind.RESPONSE, behind, HEAD), Frame(Kind.BODY, behind, b"half")] if answers else []
        worker.say(*end, *begun, Frame(Kind.FAILED, 0, b"guest-timeout\r\nit used up its time\r\n" + TOKEN))
        assert (await client.answer())[0] == 200
        worker.answer((await worker.next(Kind.WHOLE_REQUEST)).call, b"all of it")
        assert (await other.answer())[::2] == (200, b"all of it")
        assert worker.page.read().calls == {CallOutcome.OK: 2}


@pytest.mark.asyncio
async def test_a_call_behind_another_that_ends_by_limits_of_its_own_is_blamed_for_it(tmp_path):
    async with board(tmp_path) as the_board:
        worker, client, other = await the_board.worker(), await the_board.client(), await the_board.client()
        client.ask()
        call = (await worker.next()).call
        other.ask()
        behind = (await worker.next(Kind.WHOLE_REQUEST)).call
        await the_board.report(helper_api.LongCall)
        worker.answer(call)
        assert (await the_board.report(helper_api.LongCall)).call == behind
        worker.fail(b"guest-timeout", b"it used up its time")
        assert (await other.answer())[0] == 504
        assert worker.page.read().calls == {CallOutcome.OK: 1, CallOutcome.GUEST_TIMEOUT: 1}


@pytest.mark.asyncio
async def test_a_worker_whose_store_ends_before_it_has_left_its_loop_is_asked_again(tmp_path):
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(reuses=True), await the_board.client()
        worker.leaves = False
        the_board.tell(helper_api.YieldChannel(worker.number))
        assert await worker.next() == Frame(Kind.YIELD, 0)
        worker.fail(b"", b"")
        assert await worker.next() == Frame(Kind.YIELD, 0)
        client.ask()
        worker.say(Frame(Kind.END, 0))
        worker.answer((await worker.next(Kind.WHOLE_REQUEST)).call)
        assert (await client.answer())[0] == 200


@pytest.mark.asyncio
async def test_a_client_that_was_slow_before_is_the_cause_of_a_call_that_takes_all_its_time(tmp_path):
    """The guest waits for the client no more when the time is up; the client has had a large part of it."""
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(total_ms=100), await the_board.client()
        head = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (INITIAL_CREDIT_BYTES + 1)
        client.ask(head + b"x" * INITIAL_CREDIT_BYTES)
        call = (await worker.next(Kind.REQUEST)).call
        await the_board.report(helper_api.LongCall)
        assert worker.page.waits()
        client.ask(b"x")
        assert len(await worker.body()) == INITIAL_CREDIT_BYTES + 1
        assert await worker.next() == Frame(Kind.CANCEL, call)
        assert await client.reader.read() == b""
        worker.fail(b"guest-trap", b"cancelled")
        await worker.answer_next(await the_board.client())
        assert worker.page.read().calls == {CallOutcome.CLIENT_SLOW: 1, CallOutcome.OK: 1}


@pytest.mark.asyncio
async def test_the_log_says_that_requests_wait_for_one_that_takes_long(tmp_path):
    async with board(tmp_path) as the_board:
        worker, clients = await the_board.worker(), [await the_board.client() for _ in range(2)]
        clients[0].ask()
        call = (await worker.next()).call
        await the_board.report(helper_api.LongCall)
        clients[1].ask()
        assert "limits.concurrency allows 1 at a time" in (await the_board.report(helper_api.ChannelNote)).text
        worker.answer(call)
        worker.answer((await worker.next()).call)
        for client in clients:
            assert (await client.answer())[0] == 200


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.asyncio
async def test_a_guest_that_streams_for_nobody_is_ended_and_one_that_answers_is_not(tmp_path, streams):
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(), await the_board.client()
        client.ask()
        call = (await worker.next()).call
        if streams:
            worker.say(Frame(Kind.RESPONSE, call, HEAD), Frame(Kind.BODY, call, b"first"))
            await client.reader.readuntil(b"first")
        client.reset()
        if streams:
            assert await worker.next() == Frame(Kind.CANCEL, call)
            assert await the_board.report(helper_api.CallAbandoned) == helper_api.CallAbandoned(worker.number, call)
            worker.fail(b"guest-trap", b"cancelled")
        else:
            worker.answer(call)
        await worker.answer_next(await the_board.client())
        counted = {CallOutcome.CLIENT_GONE: 1, CallOutcome.OK: 1} if streams else {CallOutcome.OK: 2}
        assert worker.page.read().calls == counted


@pytest.mark.asyncio
async def test_a_client_that_stands_still_in_its_body_is_not_waited_for_longer_than_a_guest_may_be_idle(tmp_path):
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(idle_ms=50), await the_board.client()
        client.ask(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n" + b"x" * 70_000)
        call = (await worker.next(Kind.REQUEST)).call
        worker.say(Frame(Kind.CREDIT, call, struct.pack("<I", 65536)))
        got = 0
        while (frame := await worker.next(Kind.BODY, Kind.CANCEL)).kind is Kind.BODY:
            got += len(frame.payload)
        assert (got, frame) == (70_000, Frame(Kind.CANCEL, call))
        assert await client.reader.read() == b""
        worker.fail(b"guest-trap", b"cancelled")
        await worker.answer_next(await the_board.client())
        assert worker.page.read().calls == {CallOutcome.CLIENT_SLOW: 1, CallOutcome.OK: 1}


@pytest.mark.asyncio
async def test_a_client_that_sends_a_byte_now_and_then_ends_its_call_and_no_other(tmp_path):
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(), await the_board.client()
        client.ask(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n" + b"x" * 65_536)
        call = (await worker.next(Kind.REQUEST)).call
        await worker.next(Kind.BODY)
        worker.say(Frame(Kind.CREDIT, call, struct.pack("<I", 65536)))
        (theirs,) = the_board.router._all_clients()
        now_s = theirs.last_s
        for _ in range(6):
            the_board.router.mind_clients(now_s)
            client.ask(b"x")
            frame = await worker.next(Kind.BODY, Kind.CANCEL)
            if frame.kind is Kind.CANCEL:
                break
            now_s += 8
            theirs.last_s = now_s
        assert frame == Frame(Kind.CANCEL, call)
        assert (await client.reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 408 ")
        worker.fail(b"guest-trap", b"cancelled")
        await worker.answer_next(await the_board.client())
        assert worker.page.read().calls == {CallOutcome.CLIENT_SLOW: 1, CallOutcome.OK: 1}


@pytest.mark.asyncio
async def test_a_client_that_goes_on_sending_is_waited_for_longer_than_a_guest_may_be_idle(tmp_path):
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(idle_ms=60_000), await the_board.client()
        client.ask(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 200000\r\n\r\n" + b"x" * 65_536)
        call = (await worker.next(Kind.REQUEST)).call
        await worker.next(Kind.BODY)
        worker.say(Frame(Kind.CREDIT, call, struct.pack("<I", 65_536)))
        client.ask(b"x" * 8000)
        await worker.next(Kind.BODY)  # from now on there is credit for more, and the client is waited for
        running = the_board.router._calls["web"].channels[0].flight[0]
        for _ in range(4):
            client.ask(b"x" * 8000)
            await worker.next(Kind.BODY)
            running._waits_since_s -= 61  # as if it had taken the client so long
            running._judge_client()
            assert running.waits_for_client
        assert running._waited_s > 4 * 61, "which is the client's time, should the call end at its limit"
        running._waits_since_s -= 61
        running._judge_client()
        assert await worker.next(Kind.CANCEL) == Frame(Kind.CANCEL, call), "and now it has stood still"


@pytest.mark.parametrize("framing_", ["length", "chunks"])
@pytest.mark.asyncio
async def test_a_body_beyond_the_limit_is_refused_where_the_guest_takes_whole_bodies(tmp_path, framing_):
    async with board(tmp_path) as the_board:
        await the_board.worker(whole=True, request_bytes=1000)
        client = await the_board.client()
        if framing_ == "length":
            client.ask(b"POST / HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 1001\r\n\r\n")
        else:
            client.ask(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3e9\r\n" + b"x" * 1001)
        assert (await client.answer())[0] == 413


@pytest.mark.parametrize("framing_", ["length", "chunks"])
@pytest.mark.asyncio
async def test_a_body_that_streams_may_be_of_any_size(tmp_path, framing_):
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(request_bytes=1000), await the_board.client()
        if framing_ == "length":
            client.ask(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 300000\r\n\r\n" + b"x" * 300_000)
        else:
            chunk = b"493e0\r\n%b\r\n0\r\n\r\n" % (b"x" * 300_000)
            client.ask(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + chunk)
        call = (await worker.next(Kind.REQUEST)).call
        assert await worker.body() == b"x" * 300_000
        worker.answer(call)
        assert (await client.answer())[0] == 200


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.asyncio
async def test_an_answer_beyond_its_limit_ends_its_call(tmp_path, begun):
    """The guest may have much more to write, which nobody would get."""
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(response_bytes=100_000), await the_board.client()
        client.ask()
        call = (await worker.next(Kind.WHOLE_REQUEST)).call
        worker.say(Frame(Kind.RESPONSE, call, HEAD if begun else b""), Frame(Kind.BODY, call, b"x" * 60_000))
        assert (await worker.next(Kind.CREDIT)).call == call
        worker.say(Frame(Kind.BODY, call, b"x" * 60_000))
        assert await worker.next(Kind.CANCEL, Kind.CREDIT) == Frame(Kind.CANCEL, call)
        worker.fail(b"guest-trap", b"cancelled")
        if begun:
            assert b"\r\n0\r\n" not in await client.reader.read()
        else:
            assert (await client.answer())[0] == 502
        note = (await the_board.report(helper_api.ChannelNote)).text
        assert "a body of more than 100000 bytes (limits.response)" in note
        other = await the_board.client()
        other.ask()
        worker.answer((await worker.next(Kind.WHOLE_REQUEST)).call)
        assert (await other.answer())[0] == 200
        figures = worker.page.read()
        assert (figures.calls, figures.errors) == ({CallOutcome.OK: 2}, 1)


@pytest.mark.asyncio
async def test_what_is_no_frame_ends_the_channel_and_the_supervisor_hears_of_it(tmp_path):
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(), await the_board.client()
        client.ask(GET.replace(b"GET", b"POST"))
        await worker.next()
        worker.writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        assert (await client.answer())[0] == 502
        assert (await the_board.report(helper_api.ChannelBroken)).worker == worker.number
        assert await worker.next() is None


@pytest.mark.asyncio
async def test_calls_that_wait_are_refused_when_their_instance_goes(tmp_path):
    async with board(tmp_path) as the_board:
        client = await the_board.client()
        client.ask()
        await the_board.client()  # its connection shows that the router has read what came before
        the_board.tell(helper_api.RemoveListener("web"))
        assert (await client.answer())[0] == 503


@pytest.mark.asyncio
async def test_a_worker_that_takes_whole_bodies_waits_for_none(tmp_path):
    async with board(tmp_path) as the_board:
        worker, slow, other = await the_board.worker(whole=True), await the_board.client(), await the_board.client()
        slow.ask(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 300000\r\n\r\n" + b"x" * 200_000)
        other.ask()
        worker.answer((await worker.next(Kind.WHOLE_REQUEST)).call)
        assert (await other.answer())[0] == 200
        slow.ask(b"x" * 100_000)
        call = (await worker.next(Kind.REQUEST)).call
        assert len(await worker.body()) == 300_000
        worker.answer(call)
        assert (await slow.answer())[0] == 200


OVERRUNS = [
    Frame(Kind.CREDIT, 1, struct.pack("<I", 1)),
    Frame(Kind.CREDIT, 1, b"\xff" * 4),
    *[Frame(Kind.BODY, 1, b"x" * 1024)] * 65,
]


EMPTY = [Frame(Kind.BODY, 1)]  # costs no credit, and a place in memory


@pytest.mark.parametrize(
    "said", [OVERRUNS[:1], OVERRUNS[1:2], OVERRUNS[2:], EMPTY], ids=["credit", "all", "body", "empty"]
)
@pytest.mark.asyncio
async def test_a_worker_that_overruns_its_credit_or_grants_more_than_it_took_loses_its_channel(tmp_path, said):
    """Else the router would keep whole bodies for a guest that does not read, or a client that does not."""
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(), await the_board.client()
        client.ask(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
        call = (await worker.next(Kind.REQUEST, Kind.WHOLE_REQUEST)).call
        worker.say(*(frame._replace(call=call) for frame in said))
        assert (await the_board.report(helper_api.ChannelBroken)).worker == worker.number


ENDED = b"0 whole\r\n\r\n"
POST = b"POST /a HTTP/1.1\r\nhost: board\r\ncontent-length: 2\r\n\r\nhi"


async def answered(worker, client, request=GET):
    """A request whose answer has ended, while its guest may go on."""
    client.ask(request)
    call = (await worker.next(Kind.WHOLE_REQUEST, Kind.REQUEST)).call
    worker.say(Frame(Kind.RESPONSE, call, HEAD), Frame(Kind.BODY, call, b"hi"), Frame(Kind.ANSWERED, call, ENDED))
    assert (await client.answer())[::2] == (200, b"hi")
    return call


@pytest.mark.asyncio
async def test_an_answer_that_has_ended_goes_out_and_the_next_call_says_that_its_guest_is_back(tmp_path):
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(reuses=True), await the_board.client()
        first = await answered(worker, client)
        assert worker.page.read().calls == {CallOutcome.OK: 1}
        assert worker.page.number() == first
        client.ask()
        second = (await worker.next(Kind.WHOLE_REQUEST)).call
        assert worker.page.number() == second
        worker.answer(second)
        assert (await client.answer())[0] == 200
        assert worker.page.number() == 0


@pytest.mark.asyncio
async def test_a_guest_is_asked_for_once_its_call_would_be_long(tmp_path):
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(), await the_board.client()
        call = await answered(worker, client)
        assert await worker.next() == Frame(Kind.ASK, call)
        assert (await the_board.report(helper_api.LongCall)).call == call
        worker.say(Frame(Kind.END, call))
        await worker.answer_next(client)
        assert worker.page.read().calls == {CallOutcome.OK: 2}


@pytest.mark.asyncio
async def test_a_guest_is_asked_for_when_its_worker_is_to_leave_its_loop_or_take_no_more(tmp_path):
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(), await the_board.client()
        call = await answered(worker, client)
        the_board.tell(helper_api.DrainChannel(worker.number))
        assert await worker.next() == Frame(Kind.ASK, call)
        worker.say(Frame(Kind.END, call))
        assert (await the_board.report(helper_api.ChannelDrained)).worker == worker.number


@pytest.mark.asyncio
async def test_before_a_call_that_may_not_begin_twice_the_worker_is_asked(tmp_path):
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(reuses=True), await the_board.client()
        call = await answered(worker, client)
        client.ask(POST)
        assert await worker.next() == Frame(Kind.ASK, call)
        behind = await worker.next(Kind.REQUEST)
        worker.say(Frame(Kind.END, call))
        worker.fail(b"guest-trap", b"its own")
        assert (await client.answer())[0] == 500
        assert worker.page.read().calls == {CallOutcome.OK: 1, CallOutcome.GUEST_TRAP: 1}
        assert behind.call != call


@pytest.mark.parametrize("request_bytes", [GET, POST])
@pytest.mark.asyncio
async def test_a_failure_after_an_answer_is_that_calls_and_the_next_is_sent_again(tmp_path, request_bytes):
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(), await the_board.client()
        await answered(worker, client)
        client.ask(request_bytes)
        await worker.next_request()
        worker.fail(b"guest-trap", b"after its answer")
        worker.answer((await worker.next_request()).call, b"all of it")
        assert (await client.answer())[::2] == (200, b"all of it")
        assert worker.page.read().calls == {CallOutcome.OK: 2, CallOutcome.GUEST_TRAP: 1}
        assert worker.page.read().errors == 1


@pytest.mark.asyncio
async def test_a_worker_that_knows_that_a_guest_had_returned_blames_the_next_call(tmp_path):
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(), await the_board.client()
        call = await answered(worker, client)
        client.ask()
        await worker.next(Kind.WHOLE_REQUEST)
        worker.lose_place()
        worker.say(Frame(Kind.FAILED, call, b"guest-trap\r\nits own\r\n" + TOKEN))
        assert (await client.answer())[0] == 500
        assert worker.page.read().calls == {CallOutcome.OK: 1, CallOutcome.GUEST_TRAP: 1}


@pytest.mark.parametrize("fails_again", [False, True])
@pytest.mark.asyncio
async def test_where_nobody_knows_whose_a_failure_is_the_second_try_tells(tmp_path, fails_again):
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(reuses=True), await the_board.client()
        await answered(worker, client)
        client.ask()
        await worker.next(Kind.WHOLE_REQUEST)
        worker.fail(b"guest-trap", b"of one or the other")
        again = (await worker.next(Kind.WHOLE_REQUEST)).call
        assert worker.page.read().calls == {CallOutcome.OK: 1}
        if fails_again:
            worker.fail(b"guest-trap", b"its own")
        else:
            worker.answer(again)
        assert (await client.answer())[0] == (500 if fails_again else 200)
        assert worker.page.read().calls == {CallOutcome.OK: 1 if fails_again else 2, CallOutcome.GUEST_TRAP: 1}


@pytest.mark.asyncio
async def test_a_call_behind_an_answered_one_outlives_their_worker(tmp_path):
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(), await the_board.client()
        await answered(worker, client)
        client.ask(POST)
        await worker.next(Kind.ASK)
        await worker.next(Kind.REQUEST)
        worker.close()
        other = await the_board.worker()
        call = (await other.next(Kind.REQUEST)).call
        assert await other.body() == b"hi"
        other.answer(call, b"from another")
        assert (await client.answer())[::2] == (200, b"from another")


@pytest.mark.asyncio
async def test_a_client_that_was_answered_before_it_sent_all_leaves_the_guest_without_the_rest(tmp_path):
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(), await the_board.client()
        await answered(worker, client, POST.replace(b"length: 2", b"length: 200000") + bytes(70_000))
        seen = []
        while Kind.CANCEL not in seen:
            seen.append((await worker.next(Kind.BODY, Kind.CANCEL)).kind)
        assert await client.reader.read() == b""


@pytest.mark.parametrize("kind", [Kind.RESPONSE, Kind.BODY, Kind.ANSWERED, Kind.END])
@pytest.mark.asyncio
async def test_nothing_comes_behind_the_end_of_an_answer(tmp_path, kind):
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(), await the_board.client()
        call = await answered(worker, client)
        worker.say(Frame(kind, call, ENDED))
        assert (await the_board.report(helper_api.ChannelBroken)).worker == worker.number

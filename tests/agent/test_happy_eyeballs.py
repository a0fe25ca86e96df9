"""A name with dead addresses costs a moment, and a failure names each address."""

import asyncio
import contextlib
import errno
import socket

import pytest

from agent import happy_eyeballs
from agent.happy_eyeballs import NoAnswerError, first_connected, interleave
from tests.agent.silent_address import silent

LONG_S = 60.0  # never waited for


def listening(host: str, port: int) -> socket.socket:
    server = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((host, port))
    server.listen(8)
    return server


def test_families_alternate_and_the_preferred_one_is_first():
    assert interleave(["::1", "::2", "::3", "10.0.0.1", "10.0.0.1"]) == ["::1", "10.0.0.1", "::2", "::3"]
    assert interleave(["10.0.0.1", "::1", "10.0.0.2"]) == ["10.0.0.1", "::1", "10.0.0.2"]
    assert interleave([]) == []


@pytest.mark.asyncio
@pytest.mark.parametrize("dead", [("127.0.0.2",), ("127.0.0.2", "127.0.0.3")], ids=["one", "two"])
async def test_dead_addresses_before_a_good_one_delay_it_only(dead):
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(silent(dead[0]))
        for address in dead[1:]:
            stack.enter_context(silent(address, port))
        server = stack.enter_context(listening("127.0.0.9", port))
        sock = await first_connected([*dead, "127.0.0.9"], port, timeout_s=LONG_S)
        with sock:
            assert sock.getpeername() == ("127.0.0.9", port)
            peer, _ = server.accept()
            peer.close()


@pytest.mark.asyncio
async def test_the_next_address_follows_a_refusal_at_once():
    with listening("127.0.0.9", 0) as server:
        port = server.getsockname()[1]
        sock = await first_connected(["127.0.0.2", "127.0.0.3", "127.0.0.9"], port, timeout_s=LONG_S, delay_s=LONG_S)
        sock.close()


@pytest.mark.asyncio
async def test_a_failure_names_each_address_and_its_reason():
    with silent("127.0.0.2") as port, pytest.raises(NoAnswerError) as caught:
        await first_connected(["127.0.0.2", "127.0.0.3"], port, timeout_s=0.5)
    assert [address for address, _ in caught.value.failures] == ["127.0.0.2", "127.0.0.3"]
    assert "127.0.0.2: no answer in 0.5 s" in str(caught.value)
    assert "127.0.0.3: " in str(caught.value)
    assert "refused" in str(caught.value)
    assert not caught.value.timed_out


@pytest.mark.asyncio
async def test_a_failure_of_every_address_for_one_reason_has_its_number():
    with listening("127.0.0.2", 0) as server:
        port = server.getsockname()[1]
    with pytest.raises(NoAnswerError) as caught:
        await first_connected(["127.0.0.2", "127.0.0.3"], port, timeout_s=LONG_S)
    assert caught.value.errno == errno.ECONNREFUSED


@pytest.mark.asyncio
async def test_no_address_is_a_failure():
    with pytest.raises(NoAnswerError, match="no address"):
        await first_connected([], 443, timeout_s=LONG_S)


@pytest.mark.asyncio
async def test_the_silence_of_all_is_a_timeout():
    with silent("127.0.0.2") as port, pytest.raises(NoAnswerError) as caught:
        await first_connected(["127.0.0.2"], port, timeout_s=0.3)
    assert caught.value.timed_out


@pytest.mark.asyncio
async def test_the_end_of_the_caller_ends_all_attempts(monkeypatch):
    began, open_sockets = asyncio.Event(), []

    async def attempt(address: str, _port: int) -> socket.socket:
        open_sockets.append(address)
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            open_sockets.remove(address)
        raise AssertionError

    monkeypatch.setattr(happy_eyeballs, "_connected", attempt)
    caller = asyncio.create_task(first_connected(["127.0.0.2"], 1, timeout_s=LONG_S))
    await began.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    await asyncio.sleep(0)
    assert not open_sockets


def test_connect_resolves_and_returns_a_blocking_socket():
    with listening("127.0.0.1", 0) as server:
        sock = happy_eyeballs.connect("127.0.0.1", server.getsockname()[1], timeout_s=LONG_S)
        with sock:
            assert sock.gettimeout() == LONG_S


def test_a_name_that_is_none_is_not_resolved():
    with pytest.raises(socket.gaierror):
        happy_eyeballs.connect("a..b", 443, timeout_s=LONG_S)

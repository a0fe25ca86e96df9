"""Figures in a worker's page after every kind of call."""

import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import support

from agent.host.engine import adapter_abi
from agent.host.engine.runtime import Engine
from agent.host.http import connection
from agent.host.http.connection import BadAnswerError
from agent.host.ipc import worker_api
from agent.host.ipc.stats_page import StatsPage, create_page
from agent.host.sandbox import sandbox
from agent.host.worker.runner import GuestRunner
from agent.host.worker.watchdog import WATCHDOG_FAILED_STATUS, Call, CallWatchdog
from fleet.protocol import bounds
from fleet.protocol.manifest import Grants, Limits
from tests.eventually import eventually


@pytest.fixture
def page():
    fd = create_page("test")
    mapped = StatsPage(fd)
    os.close(fd)
    yield mapped
    mapped.close()


def caller(guest, page, **limits):
    engine = Engine()
    fd = support.sealed(support.compiled(guest))
    image = engine.load(f"/proc/self/fd/{fd}")
    os.close(fd)
    return GuestRunner(image, limits=Limits(**limits), grants=Grants(), config={}, page=page, say=lambda _message: None)


@pytest.mark.parametrize("guest", ["hello", "unhealthy", "trap-in-check"])
def test_no_call_is_in_flight_after_a_health_check(guest, page):
    # or the supervisor would take the idle instance for one that hangs, and kill it
    asked = caller(guest, page)
    asked.start()
    asked.check()
    assert page.read().began_ns == 0


class Watched:
    """A ticker without its thread: a test says what passed, and hears what it did."""

    def __init__(self, monkeypatch, **limits):
        monkeypatch.setattr(
            "agent.host.worker.runner.threading.Thread", lambda **_: SimpleNamespace(start=lambda: None)
        )
        self.said: list[worker_api.FromWorker] = []
        self.epochs = 0
        self.ticker = CallWatchdog(self._tick)
        self.call = Call(self.ticker.number(), 250, Limits(**limits), self.said.append)
        self.ticker.begin(self.call)
        self.used_ns = 0
        self.ticker.passed(self.call, 10, 0)
        self.epochs = 0

    def _tick(self):
        self.epochs += 1

    def pass_time(self, ticks, *, ms=10, own_ms=0):
        for _ in range(ticks):
            self.used_ns += own_ms * 1_000_000
            self.ticker.passed(self.call, ms, self.used_ns)
        return [message.why for message in self.said if isinstance(message, worker_api.Overdue)]


def test_only_the_guests_own_time_lets_epochs_pass(monkeypatch):
    watched = Watched(monkeypatch)
    watched.pass_time(100)
    assert watched.epochs == 0, "it waited for a peer"
    watched.pass_time(25, own_ms=4)
    assert watched.epochs == 10, "a hundred milliseconds of its own"


def test_a_call_may_wait_so_long_in_one_piece(monkeypatch):
    watched = Watched(monkeypatch, idle_ms=500)
    assert watched.pass_time(49) == []
    watched.pass_time(1, own_ms=1)  # it went on
    assert watched.pass_time(50) == []
    (why,) = watched.pass_time(1)
    assert "blocked for 510 ms in one piece, 500 are allowed" in why
    assert watched.pass_time(10) == [why], "said once"


def test_a_call_that_may_run_and_is_not_let_does_not_wait(monkeypatch):
    watched = Watched(monkeypatch, idle_ms=500)
    watched.ticker._waits = lambda: False
    assert watched.pass_time(200) == []


def test_what_waits_is_told_from_what_may_run():
    fd = sandbox.scheduling()
    assert not sandbox.waits(fd), "this thread runs, now"
    os.close(fd)
    told, begun, done = [], threading.Event(), threading.Event()

    def wait():
        told.append(sandbox.scheduling())
        begun.set()
        done.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    assert begun.wait(60)
    eventually(lambda: sandbox.waits(told[0]), "the thread waits")
    done.set()
    thread.join()
    os.close(told[0])


def test_a_call_that_waits_again_and_again_has_a_limit_in_all(monkeypatch):
    watched = Watched(monkeypatch, idle_ms=500, total_ms=2000)
    for _ in range(6):
        assert watched.pass_time(30) == []
        watched.pass_time(1, own_ms=1)
    assert "in all, 2000 are allowed" in watched.pass_time(30)[0]


def test_a_call_that_epochs_do_not_end_is_ended_all_the_same(monkeypatch):
    (why,) = Watched(monkeypatch).pass_time(127, own_ms=10)
    assert "1260 ms of its own time, 250 are allowed" in why


def test_a_call_is_not_overdue_because_its_device_was_suspended(monkeypatch):
    # an hour went by in one tick: nobody was there to give the processor, nor the peer to answer
    assert Watched(monkeypatch, idle_ms=500, total_ms=500).pass_time(1, ms=3_600_000) == []


def test_a_call_that_takes_a_while_asks_for_another_worker_once(monkeypatch):
    watched = Watched(monkeypatch, concurrency=2)
    watched.pass_time(20)
    assert watched.said == [worker_api.Busy()]


def test_what_passed_of_one_call_is_not_held_against_the_next(monkeypatch):
    """A call ends, and another begins with closer limits, while the ticker is still at the first one's tick."""
    watched = Watched(monkeypatch, idle_ms=60_000)
    watched.pass_time(500)
    heard = []
    following = Call(watched.ticker.number(), 250, Limits(idle_ms=1000, total_ms=1000), heard.append)

    def another_begins():
        watched.ticker.end()
        watched.ticker.begin(following)
        return True

    watched.ticker._waits = another_begins
    assert watched.pass_time(1, own_ms=0) == []
    assert heard == [], "it had no time at all yet"
    watched.ticker._waits = lambda: True
    watched.used_ns += 50_000_000
    watched.ticker.passed(watched.call, 10, watched.used_ns)
    assert watched.epochs == 0, "no epoch passes for a call that has ended"
    watched.call = following
    watched.pass_time(100)
    assert heard == []
    watched.pass_time(1)
    (verdict,) = heard
    assert verdict.call == following.number
    assert "1010 ms in one piece, 1000 are allowed" in verdict.why


def test_a_verdict_that_ended_nothing_is_said_again(monkeypatch):
    watched = Watched(monkeypatch, idle_ms=500)
    assert len(watched.pass_time(50)) == 1
    assert len(watched.pass_time(99)) == 1
    assert len(watched.pass_time(1)) == 2


FAULT = """
import sys, threading
from agent.host.worker.watchdog import Call, CallWatchdog
from fleet.protocol.manifest import Limits

def tick():
    raise RuntimeError("a bug of ours")

ticker = CallWatchdog(tick)
ticker.begin(Call(ticker.number(), 250, Limits(), lambda message: print(message.message, flush=True)))
threading.Event().wait()
"""


def test_a_ticker_that_fails_ends_its_process():
    # without one no limit of time holds
    done = subprocess.run([sys.executable, "-c", FAULT], capture_output=True, text=True, cwd=support.ROOT, check=False)
    assert (done.returncode, done.stdout.strip()) == (
        WATCHDOG_FAILED_STATUS,
        "the worker's ticker failed: RuntimeError: a bug of ours",
    )


@pytest.mark.parametrize("said", [b"9" * 5000, b"9" * 19, b"+200", b"2_00", b" 200", b"", "²".encode()])
def test_a_number_of_a_guests_is_read_within_bounds(said):
    assert bounds.parse_number(said) is None
    assert adapter_abi.answer_head(said + b" whole\r\n\r\n").status == 500
    assert adapter_abi.answer_head(b"error " + said).status == 500
    with pytest.raises(ValueError, match="begins with no status"):
        adapter_abi.split_head(said + b"\r\nx: y\r\n\r\n")


def test_a_length_that_no_body_has_is_a_problem_of_the_answer():
    with pytest.raises(BadAnswerError, match="a content-length of 5000 digits"):
        connection.declared_length(b"content-length: %b\r\n" % (b"9" * 5000))


def numbers(guest, requests):
    return [int(guest.handle((b"GET", b"/", b""), b"", None)[2]) for _ in range(requests)]


@pytest.mark.parametrize(("each", "expected"), [(0, [1, 2, 3, 4, 5]), (1, [1, 1, 1, 1, 1]), (2, [1, 2, 1, 2, 1])])
def test_a_manifest_says_how_many_requests_one_instance_answers(page, each, expected):
    asked = caller("counter", page, requests_per_instance=each)
    asked.start()
    assert numbers(asked, 5) == expected

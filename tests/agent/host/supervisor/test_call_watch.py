"""Limits of a call's time, watched from outside: real processes that compute or sleep stand for workers."""

import asyncio
import contextlib
import subprocess
import sys
import time

import pytest

from agent.host.ipc import stats_page, worker_api
from agent.host.supervisor import call_watch
from agent.host.supervisor.call_watch import CallWatch
from fleet.protocol.manifest import Limits

SPINS, SLEEPS = "while True: pass", "import time; time.sleep(3600)"


class Worker:
    """A process, and the page in which the router says which call runs in it."""

    def __init__(self, program):
        self.process = subprocess.Popen([sys.executable, "-c", program])
        self.pid = self.process.pid
        self.alive = True
        self.calls = stats_page.StatsPage(stats_page.create_page("web"))
        self.messages = asyncio.Queue()

    def notify(self, message):
        self.messages.put_nowait(message)

    def begin(self, call):
        self.calls.begin(time.monotonic_ns(), call)


class Judge:
    def __init__(self):
        self.verdicts = asyncio.Queue()

    def call_must_end(self, worker, reason, *, at_fault):
        self.verdicts.put_nowait((worker, at_fault, reason))


@contextlib.contextmanager
def a_worker(program, call=7):
    worker = Worker(program)
    worker.begin(call)
    try:
        yield worker
    finally:
        worker.process.kill()
        worker.process.wait()


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch):
    monkeypatch.setattr(call_watch, "_GRACE_S", 0.05)


@pytest.mark.asyncio
async def test_a_guest_that_computes_past_its_time_is_interrupted_and_ended_if_that_does_not_help():
    judge = Judge()
    async with asyncio.timeout(30):
        with a_worker(SPINS) as worker:
            CallWatch(worker, 7, Limits(call_ms=100), judge)
            assert await worker.messages.get() == worker_api.Interrupt(call=7)
            ended, at_fault, reason = await judge.verdicts.get()
            assert (ended, at_fault) == (worker, True)
            assert "ms of its own time, 100 are allowed" in reason


@pytest.mark.asyncio
async def test_an_interrupt_that_helps_is_all():
    judge = Judge()
    async with asyncio.timeout(30):
        with a_worker(SPINS) as worker, a_worker(SPINS) as other:
            CallWatch(worker, 7, Limits(call_ms=50), judge)
            await worker.messages.get()
            worker.calls.rest()
            CallWatch(other, 7, Limits(call_ms=50), judge)
            assert (await judge.verdicts.get())[0] is other
            assert judge.verdicts.empty()


@pytest.mark.parametrize(
    ("limits", "client", "words"),
    [
        (Limits(idle_ms=50), False, "blocked for"),
        (Limits(idle_ms=50, total_ms=300), True, "in all, 300 are allowed"),
        (Limits(total_ms=50), False, "in all, 50 are allowed"),
    ],
)
@pytest.mark.asyncio
async def test_a_guest_that_stands_still_is_ended_unless_it_waits_for_its_client(limits, client, words):
    judge = Judge()
    async with asyncio.timeout(30):
        with a_worker(SLEEPS) as worker:
            worker.calls.wait(client)
            CallWatch(worker, 7, limits, judge)
            _, at_fault, reason = await judge.verdicts.get()
            assert (at_fault, words in reason) == (True, True), reason
            assert worker.messages.empty()


@pytest.mark.asyncio
async def test_a_call_whose_begin_is_not_written_yet_has_taken_no_time():
    """The router writes number and begin one after the other, and takes the begin back first at the end."""
    judge = Judge()
    async with asyncio.timeout(30):
        with a_worker(SLEEPS) as worker, a_worker(SLEEPS) as other:
            worker.calls.begin(0, 7)
            CallWatch(worker, 7, Limits(total_ms=50), judge)
            CallWatch(other, 7, Limits(total_ms=50), judge)
            assert (await judge.verdicts.get())[0] is other
            worker.begin(7)
            ended, _, reason = await judge.verdicts.get()
            assert ended is worker
            assert int(reason.split("took ")[1].split()[0]) < 30_000


@pytest.mark.parametrize("call", [0, 8])
@pytest.mark.asyncio
async def test_a_call_that_has_ended_is_not_judged_whatever_runs_meanwhile(call):
    judge = Judge()
    async with asyncio.timeout(30):
        with a_worker(SLEEPS) as worker, a_worker(SLEEPS) as other:
            CallWatch(worker, 7, Limits(total_ms=50), judge)
            worker.begin(call)
            CallWatch(other, 7, Limits(total_ms=100), judge)
            assert (await judge.verdicts.get())[0] is other
            assert judge.verdicts.empty()


@pytest.mark.asyncio
async def test_a_call_that_nobody_waits_for_is_ended_without_blame():
    judge = Judge()
    async with asyncio.timeout(30):
        with a_worker(SLEEPS) as worker:
            CallWatch(worker, 7, Limits(), judge).abandon()
            assert await worker.messages.get() == worker_api.Interrupt(call=7, abandoned=True)
            assert (await judge.verdicts.get())[1] is False

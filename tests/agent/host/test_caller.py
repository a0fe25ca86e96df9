"""What the supervisor sees in a lane's page, whatever kind of call has just ended."""

import os
from types import SimpleNamespace

import pytest
import support

from agent.host import control
from agent.host.caller import Caller, Ticker
from agent.host.engine import Engine
from agent.host.page import Page, create
from fleet.protocol.manifest import Grants, Limits


@pytest.fixture
def page():
    fd = create("test")
    mapped = Page(fd)
    os.close(fd)
    yield mapped
    mapped.close()


def caller(guest, page):
    engine = Engine()
    fd = support.sealed(support.compiled(guest))
    image = engine.load(f"/proc/self/fd/{fd}")
    os.close(fd)
    return Caller(image, limits=Limits(), grants=Grants(), config={}, page=page, say=lambda _message: None)


@pytest.mark.parametrize("guest", ["hello", "unhealthy", "trap-in-check"])
def test_no_call_is_in_flight_after_a_health_check(guest, page):
    # or the supervisor would take the idle instance for one that hangs, and kill it
    asked = caller(guest, page)
    asked.start()
    asked.check()
    assert page.read().began_ns == 0


@pytest.mark.parametrize(("late_ms", "overdue"), [(10, True), (1500, False)])
def test_a_call_is_not_overdue_because_its_board_was_busy(monkeypatch, late_ms, overdue):
    # 1500 ms late: the lane was not given the processor, so neither was the call; a hundred such ticks are no hang
    clock = SimpleNamespace(ns=1)
    monkeypatch.setattr("agent.host.caller.time.monotonic_ns", lambda: clock.ns)
    monkeypatch.setattr("agent.host.caller.threading.Thread", lambda **_: SimpleNamespace(start=lambda: None))
    said: list[control.FromLane] = []
    ticker = Ticker(lambda: None, said.append, report_busy=False)
    ticker.begin(clock.ns, 250)
    for _ in range(1 if not overdue else 200):
        ticker.passed(1, late_ms)
    assert [message for message in said if isinstance(message, control.Busy) and message.overdue] == [
        control.Busy(ms=1260, overdue=True)
    ][: int(overdue)]

"""What the supervisor sees in a lane's page, whatever kind of call has just ended."""

import os

import pytest
import support

from agent.host.caller import Caller
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

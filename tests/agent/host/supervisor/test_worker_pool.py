"""Zygotes come and go, and who asks for a lane need not know."""

import signal

import pytest

from agent.host.supervisor.worker_pool import ZygotePool


@pytest.mark.asyncio
async def test_a_zygote_that_has_just_ended_is_replaced_for_whoever_asks_next():
    nursery = ZygotePool()
    try:
        first = await nursery.lane("main", "a", lambda *_: None, fuel=False)
        (zygote,) = nursery._zygotes.values()
        zygote.process.send_signal(signal.SIGKILL)
        zygote.process.wait()  # and the loop, which this keeps, has not heard of it
        assert zygote.alive
        second = await nursery.lane("main", "b", lambda *_: None, fuel=False)
        assert second.pid not in {0, first.pid}
        assert first.ended.done(), "what it had forked has ended with it"
    finally:
        nursery.close()

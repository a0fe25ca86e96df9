"""A worker with a channel: the guest's loop in the real sandbox; these tests are its router and its supervisor."""

import pytest
from channel_worker import ChannelWorker, Zygote

from agent.host.sandbox import sandbox
from fleet.protocol.manifest import Limits

REUSED = Limits(requests_per_instance=1000)


@pytest.fixture(scope="module")
def zygote():
    made = Zygote()
    yield made
    made.close()


@pytest.fixture
def worker(zygote):
    """Make workers; each ends with the test."""
    made = []

    def make(guest="probe", **how):
        made.append(ChannelWorker(zygote, guest, **how))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(params=["fresh", "reused"])
def probe(worker, request):
    return worker(limits=REUSED if request.param == "reused" else Limits())


def test_the_worker_is_in_its_sandbox_and_says_that_it_takes_frames(worker):
    ready = worker().ready
    assert ready.frames
    here = {layer for layer, holds in sandbox.probe().items() if holds}
    assert {layer for layer, holds in ready.layers.items() if holds} >= here


def test_calls_one_after_the_other(probe):
    for _ in range(10):
        answer = probe.get("/")
        assert answer.heads[0].startswith(b"200\r\n")
        assert answer.head.status == 0
        assert answer.body == b"hello over wasi:http\n"

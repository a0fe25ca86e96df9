"""Consecutive crashes lead to quarantine; half a minute of uptime resets the counter, also on disk."""

import asyncio
import time
from types import SimpleNamespace

import pytest
import support

from agent.host.ipc.stats_page import CallStats
from agent.host.supervisor.generation import Generation
from agent.host.supervisor.instance import Instance
from agent.host.supervisor.resources import CrashCounter, HostResources
from fleet.protocol.codes import InstanceState

LONG_S, SHORT_S = 31.0, 29.0


class Case:
    """An instance whose workers die as the test says, and are replaced by nobody."""

    def __init__(self, tmp_path):
        self.kept = tmp_path / "crashes.json"
        resources = HostResources.open(state=tmp_path, sockets=tmp_path / "in", address="127.0.0.1")
        self.instance = Instance("web", resources, pool=None, egress=None, router=None, events=asyncio.Queue())
        self.instance._start_after = self._nobody
        self.instance.state = InstanceState.RUNNING
        self.instance.current = self.generation = Generation(support.a_run("web", 1), -1, is_serving=True)

    async def _nobody(self, *_):
        pass

    def dies(self, uptime_s):
        self.instance._crashed(self.generation, "it crashed", uptime_s)

    @property
    def count(self):
        """Of the deaths in a row, as another host would find it."""
        return CrashCounter(self.kept).count("web", self.generation.run.target)


@pytest.fixture
def case(tmp_path):
    return Case(tmp_path)


@pytest.mark.asyncio
async def test_five_short_lives_in_a_row_are_a_quarantine(case):
    for _ in range(4):
        case.dies(SHORT_S)
        assert case.instance.state == "backoff"
    case.dies(SHORT_S)
    assert case.instance.state == "quarantined"
    assert "5 crashes in a row; the last: it crashed" in case.instance.error


@pytest.mark.asyncio
async def test_a_life_of_some_length_resets_the_count(case):
    for uptime_s in (*[SHORT_S] * 4, LONG_S, *[SHORT_S] * 3):
        case.dies(uptime_s)
    assert (case.instance.state, case.count) == ("backoff", 4)
    case.dies(SHORT_S)
    assert case.instance.state == "quarantined"


@pytest.mark.asyncio
@pytest.mark.parametrize(("up_s", "count"), [(SHORT_S - 5, 3), (LONG_S, 0)])
async def test_a_worker_with_enough_uptime_resets_the_count(case, up_s, count):
    worker = SimpleNamespace(alive=True, ready=object(), since_s=time.monotonic() - up_s)
    worker.page = SimpleNamespace(began_ns=lambda: 0, read=CallStats)

    for _ in range(3):
        case.dies(SHORT_S)
    case.generation.workers.append(worker)
    case.instance.tick()
    assert case.count == count

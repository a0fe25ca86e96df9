"""Quarantine of an instance: consecutive crashes, which half a minute of uptime resets, also on disk; too much data."""

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
        self.kept, self.starts = tmp_path / "crashes.json", 0
        resources = HostResources.open(state=tmp_path, sockets=tmp_path / "in", address="127.0.0.1")
        self.instance = Instance(
            "web", resources, pool=None, egress=None, keyvalue=None, router=None, events=asyncio.Queue()
        )
        self.instance._start_after = self._nobody
        self.instance.state = InstanceState.RUNNING
        self.instance.current = self.generation = Generation(support.a_run("web", 1), -1, is_serving=True)

    async def _nobody(self, *_):
        self.starts += 1

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


def a_worker(up_s):
    worker = SimpleNamespace(alive=True, ready=object(), since_s=time.monotonic() - up_s, is_draining=False)
    worker.began_ns, worker.figures, worker.metrics = lambda: 0, CallStats, dict
    worker.ended = asyncio.get_running_loop().create_future()
    worker.end = lambda _reason: None
    return worker


@pytest.mark.asyncio
@pytest.mark.parametrize(("up_s", "count"), [(SHORT_S - 5, 3), (LONG_S, 0)])
async def test_a_worker_with_enough_uptime_resets_the_count(case, up_s, count):
    for _ in range(3):
        case.dies(SHORT_S)
    case.generation.workers.append(a_worker(up_s))
    case.instance.tick()
    assert case.count == count


@pytest.mark.asyncio
async def test_too_much_data_is_a_quarantine_after_the_change_that_is_under_way(case, tmp_path):
    """The change would end with an instance that is said to run, and has no worker."""
    case.generation.data = str(tmp_path)
    (tmp_path / "large").write_bytes(bytes(2 * case.generation.run.limits.storage_bytes))
    case.generation.workers.append(a_worker(SHORT_S))
    async with case.instance.lock:
        case.instance.tick()
        await asyncio.sleep(0)  # one step of what the tick began: it waits for the lock
        assert (case.instance.state, len(case.generation.workers)) == ("running", 1)
    async with case.instance.lock:
        assert (case.instance.state, case.generation.workers) == ("quarantined", [])


@pytest.mark.asyncio
async def test_a_worker_that_ends_while_it_takes_over_is_replaced_once(case):
    """Its exit is reported a moment after its end is known."""
    worker = a_worker(SHORT_S)
    worker.alive = False
    new = Generation(support.a_run("web", 2), -1, workers=[worker])
    await case.instance._switch(None, new)
    await asyncio.sleep(0)
    assert (case.instance.restarts, case.starts) == (0, 0)


@pytest.mark.parametrize("at_fault", [True, False])
@pytest.mark.asyncio
async def test_the_end_of_a_worker_before_its_generation_serves_counts_as_what_it_was(case, at_fault):
    new = Generation(support.a_run("web", 2), -1, lost="its process ended", lost_at_fault=at_fault)
    await case.instance._switch(None, new)
    await asyncio.sleep(0)
    assert (case.instance.restarts, case.starts) == (int(at_fault), 1)

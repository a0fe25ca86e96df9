"""Workers of an instance that are ended while they start."""

import asyncio
from types import SimpleNamespace

import pytest
import support

from agent.host.ipc.host_api import StartError
from agent.host.ipc.stats_page import CallStats
from agent.host.supervisor.generation import Generation
from agent.host.supervisor.resources import HostResources
from agent.host.supervisor.worker_handle import WorkerGoneError
from agent.host.supervisor.worker_set import WorkerSet


class Worker:
    """A worker that is retired, as by a quarantine, while it is being set up."""

    def __init__(self):
        self.process = SimpleNamespace(is_shared=False)
        self.figures = CallStats
        self.metrics = dict
        self.page_fd = -1
        self.ready = None
        self.is_draining = False
        self.ended = asyncio.get_running_loop().create_future()

    async def request(self, *_, **__):
        self.retire(self)
        raise WorkerGoneError("it was replaced")

    def end(self, _reason):
        pass


@pytest.mark.asyncio
async def test_a_worker_that_is_retired_while_it_starts_is_a_start_that_failed(tmp_path):
    worker = Worker()

    async def acquire(_spec, _events):
        return worker

    resources = HostResources.open(state=tmp_path, sockets=tmp_path / "in", address="127.0.0.1")
    workers = WorkerSet("web", resources, SimpleNamespace(acquire=acquire), egress=None, keyvalue=None, events=None)
    generation = Generation(support.a_run("web", 1), -1)
    worker.retire = lambda it: workers.retire(generation, it)
    with pytest.raises(StartError, match="it was replaced"):
        await workers.start_worker(generation)
    assert generation.workers == []

"""Reports are kept on the device and sent again until the server has stored them."""

import asyncio
import contextlib
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from agent.config import Paths
from agent.host.ipc import host_api
from agent.link.host_client import HostClient
from agent.report import uplink as outbox_module
from agent.report.uplink import HealthSources, Uplink
from agent.update.problems import Problems
from agent.update.state import DeploymentState, DeviceContext
from agent.update.store import Database, Store
from fleet.protocol import wire
from fleet.protocol.codes import InstanceState
from fleet.protocol.messages import InstanceHealth, QueueHealth, Report
from fleet.protocol.topics import Up

NOW = datetime(2026, 5, 1, tzinfo=UTC)


@contextlib.asynccontextmanager
async def outbox(tmp_path):
    store = Store(tmp_path / "store.db")
    db = Database(store)
    sent, event = [], asyncio.Event()
    link = {"up": True}

    def publish(channel, body):
        if link["up"] and channel is Up.REPORT:
            sent.append(wire.decode(Report, body).sequence)
            event.set()
        return link["up"]

    box = Uplink(
        device=DeviceContext(
            device="b-01234567", boot_id="x", places=Paths(tmp_path, tmp_path), mac_key=b"", clock=lambda: 0.0
        ),
        mqtt=SimpleNamespace(publish=publish),
        db=db,
        sources=HealthSources(HostClient(tmp_path / "host.sock"), DeploymentState(), Problems(db)),
        signer=SimpleNamespace(sign=lambda body: body),
        health_s=3600,
    )

    def post():
        store.save(report=Report(device="b-01234567", boot_id="x", sequence=0, at=NOW, assignment=1))
        box.saved()

    async def until(expected):
        async with asyncio.timeout(60):
            while sent != expected:
                event.clear()
                await event.wait()

    task = asyncio.ensure_future(box.run())
    yield box, post, until, link, sent
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    db.close()


@pytest.mark.asyncio
async def test_each_report_is_sent_once_per_connection(tmp_path):
    async with outbox(tmp_path) as (box, post, until, _link, _sent):
        post()
        await until([1])
        post()
        await until([1, 2])
        await box.acknowledge(2)
        post()
        await until([1, 2, 3])


@pytest.mark.asyncio
async def test_reports_made_offline_are_sent_after_reconnecting(tmp_path):
    async with outbox(tmp_path) as (box, post, until, link, sent):
        link["up"] = False
        for _ in range(3):
            post()
        await asyncio.sleep(0)
        assert sent == []
        link["up"] = True
        box.reconnected()
        await until([1, 2, 3])


@pytest.mark.asyncio
async def test_unacknowledged_reports_are_sent_again(tmp_path, monkeypatch):
    monkeypatch.setattr(outbox_module, "RESEND_FIRST_S", 0.05)

    async with outbox(tmp_path) as (box, post, until, _link, _sent):
        post()
        post()
        await until([1, 2, 1, 2])
        await box.acknowledge(1)
        await until([1, 2, 1, 2, 2])


@pytest.mark.asyncio
async def test_an_instance_that_has_lost_messages_is_named_until_it_is_gone(tmp_path):
    store = Store(tmp_path / "store.db")
    problems = Problems(Database(store))
    figures = []

    async def stats():
        return host_api.HostStats(id=1, instances=tuple(figures))

    box = Uplink(
        device=DeviceContext(
            device="b-01234567", boot_id="x", places=Paths(tmp_path, tmp_path), mac_key=b"", clock=lambda: 0.0
        ),
        mqtt=None,
        db=Database(store),
        sources=HealthSources(SimpleNamespace(stats=stats, welcome=None), DeploymentState(), problems),
        signer=None,
        health_s=3600,
    )

    async def said(**lost):
        queue = QueueHealth(delivered=7, **lost)
        figures[:] = [
            InstanceHealth(instance="log", target="t", generation=1, state=InstanceState.RUNNING, messages=queue)
        ]
        return (await box.health()).problems

    assert await said() == ()
    assert await said(dead_letters=2, dropped=3) == (
        "log: 2 messages from other components are dead letters, 3 were dropped; its log names them",
    )
    assert problems.texts() == list(await said(dead_letters=2, dropped=3))
    figures.clear()
    assert (await box.health()).problems == ()
    assert problems.texts() == []

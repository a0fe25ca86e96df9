"""Agent and host of different versions: unknown fields, requests, replies and events end no connection."""

import asyncio
import json
from types import SimpleNamespace

import msgspec
import pytest

from agent.config import Paths
from agent.host.ipc import framing, host_api
from agent.link.host_client import HostGoneError, HostRefusedError
from agent.report.uplink import HealthSources, Uplink
from agent.update.problems import Problems
from agent.update.state import DeploymentState, DeviceContext
from agent.update.store import Database, Store
from fleet.protocol import wire
from fleet.protocol.codes import InstanceState, RejectCode
from fleet.protocol.manifest import Http, Limits, Manifest
from fleet.protocol.messages import Health, HealthChecks, InstanceHealth
from fleet.protocol.topics import Up
from tests.eventually import eventually_async


@pytest.fixture
def socks():
    ours, theirs = framing.socket_pair()
    yield ours, theirs
    ours.close()
    theirs.close()


MANIFEST = Manifest(name="web", version="1.0.0", trigger=Http())


def sent_start(socks, manifest=MANIFEST, limits=MANIFEST.limits):
    run = host_api.Run(
        instance="web", generation=1, target="t", manifest=manifest, grants=manifest.grants, limits=limits
    )
    host_api.send(socks[0], host_api.Start(id=1, run=run))
    return json.loads(socks[1].recv(1 << 17))["run"]


def test_newer_limits_are_sent_only_where_they_are_used(socks):
    """Hosts of earlier versions refuse a limit that they do not know, as they cannot enforce it."""
    plain = sent_start(socks)
    assert {"table_elements", "core_instances"} & (plain["limits"].keys() | plain["manifest"]["limits"].keys()) == set()
    used = sent_start(socks, limits=Limits(table_elements=7))
    assert used["limits"]["table_elements"] == 7
    decoded = msgspec.convert(used, host_api.Run)
    assert decoded.limits == Limits(table_elements=7)


@pytest.mark.parametrize(
    ("message", "number"),
    [
        (b'{"type":"levitate","id":7}', 7),
        (b'{"type":"start","id":8}', 8),
        (b'{"type":"levitated"}', None),
    ],
)
def test_a_message_of_another_version_is_told_from_garbage(socks, message, number):
    for receive in (host_api.receive_request, host_api.receive_from_host):
        socks[0].send(message)
        with pytest.raises(host_api.UnreadableError) as raised:
            receive(socks[1])
        assert raised.value.id == number
        socks[0].send(b"\xff\xff")
        with pytest.raises(host_api.IpcError):
            receive(socks[1])


@pytest.mark.asyncio
async def test_a_reply_that_cannot_be_read_fails_its_request_and_an_event_is_dropped(kit):
    await kit.boot()
    try:
        answer = kit.host._answer
        kit.host._answer = lambda request, fd: (
            msgspec.defstruct("Later", [("id", int), ("new", int)], tag="later")(id=request.id, new=1)
            if isinstance(request, host_api.Logs)
            else answer(request, fd)
        )
        welcome = kit.link.welcome
        for peer in kit.host._peers:
            peer.send(b'{"type":"levitated","instance":"web"}')
        with pytest.raises(HostRefusedError, match="cannot read") as raised:
            await kit.link.ask(host_api.Logs, host_api.Lines, instance="web")
        assert raised.value.failed.code is RejectCode.INTERNAL, "no verdict on a component"
        await kit.link.stats()
        assert kit.link.welcome is welcome, "the same connection"
    finally:
        await kit.pull_plug()


@pytest.mark.parametrize(
    ("protocol", "words"),
    [(host_api.PROTOCOL + 3, "this program is too old for fleet-host"), (0, "fleet-host is too old")],
)
@pytest.mark.asyncio
async def test_a_host_that_is_too_far_away_is_named(kit, protocol, words):
    await kit.boot()
    try:
        answer = kit.host._answer

        def other(request, fd):
            reply = answer(request, fd)
            return msgspec.structs.replace(reply, protocol=protocol) if isinstance(reply, host_api.Welcome) else reply

        kit.host._answer = other
        with pytest.raises(HostGoneError, match=words):
            await kit.link.connect()
        assert "restart fleet-host" in kit.link.mismatch
        kit.host._answer = answer
        await kit.link.connect()
        assert kit.link.mismatch == ""
    finally:
        await kit.pull_plug()


class NewerChecks(HealthChecks, frozen=True, kw_only=True):
    """Checks as a later host counts them."""

    slowest_ms: int = 21


class NewerFigures(InstanceHealth, frozen=True, kw_only=True):
    """Figures of a later host."""

    gpu_ms: int = 42
    queue: tuple[int, ...] = (3,)


@pytest.mark.asyncio
async def test_figures_of_a_newer_host_reach_the_server_although_the_agent_knows_them_not(kit, tmp_path):
    await kit.boot()
    try:
        answer = kit.host._answer

        def newer(request, fd):
            """One instance in a packet, with more than the agent knows."""
            if not isinstance(request, host_api.Status):
                return answer(request, fd)
            name = "web" if request.after else "api"
            figure = NewerFigures(
                instance=name, target="t", generation=1, state=InstanceState.RUNNING, checks=NewerChecks(asked=5)
            )
            return host_api.HostStats(id=request.id, instances=(figure,), more=name == "api")

        kit.host._answer = newer
        await kit.link.connect()
        sent = []
        places = Paths(state=tmp_path, runtime=tmp_path)
        db = Database(Store(places.database))
        uplink = Uplink(
            device=DeviceContext(device="crane-0a1b2c3d", boot_id="b", places=places, mac_key=b"", clock=lambda: 0.0),
            mqtt=SimpleNamespace(publish=lambda channel, body: sent.append((channel, body))),
            db=db,
            sources=HealthSources(kit.link, DeploymentState(), Problems(db)),
            signer=None,
            health_s=3600,
        )
        uplink.changed()
        running = asyncio.ensure_future(uplink.run())
        await eventually_async(lambda: sent, "health is sent")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        db.close()
        ((channel, body),) = sent
        assert channel == Up.HEALTH
        said = json.loads(body)["instances"]
        assert [each["instance"] for each in said] == ["api", "web"]
        for each in said:
            assert (each["gpu_ms"], each["queue"], each["phase"]) == (42, [3], "idle")
            assert each["checks"] == {"asked": 5, "missed": 0, "well": True, "slowest_ms": 21}
        assert len(wire.decode(Health, body).instances) == 2
        # What does not fit is left out, rather than the whole message.
        kit.link._figures["web"]["queue"] = {"x" * Health.MAX_BYTES: 1}
        assert len(wire.decode(Health, uplink.encoded(wire.decode(Health, body))).instances) == 2
    finally:
        await kit.pull_plug()

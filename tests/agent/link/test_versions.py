"""Agent and host of different versions: unknown fields, requests, replies and events end no connection."""

import json

import msgspec
import pytest

from agent.host.ipc import framing, host_api
from agent.link.host_client import HostGoneError, HostRefusedError
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import Http, Limits, Manifest


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

"""Archives about devices on their way through the server: asked for, bounded, fetched once, by who asked."""

import asyncio

import pytest

from fleet.protocol import bounds, operator_api, wire
from fleet.protocol.assignment import COMMANDS, Diagnose
from fleet.protocol.messages import ArchiveNote, ArchiveView, Versions
from fleet.protocol.trust_api import OperatorReply, OperatorRequest, Role
from signing import sealing
from tests.eventually import eventually_async

KEY = sealing.archive_key()
ASK = operator_api.CommandRequest(verb=Diagnose(recipient=sealing.public_key(KEY)))


async def gate(fleet, name="gate", commands=COMMANDS):
    """A device whose agent knows these commands, and has said so."""
    device = await fleet.device(name)
    device.versions = Versions(agent="0.3.0", commands=commands)
    device._say_hello()

    async def known():
        detail = await fleet.operator.get(operator_api.DeviceDetail, f"/v1/devices/{device.id}")
        return detail.row.versions.agent == "0.3.0"

    await eventually_async(known, "the server knows the agent's commands")
    return device


async def asked(fleet, device):
    reply = await fleet.operator.send(operator_api.CommandReply, "POST", f"/v1/devices/{device.id}/command", ASK)
    await device.until(lambda device: any(each.sequence == reply.sequence for each in device.commands))
    return reply.sequence


async def view(fleet, device, command, **query):
    return await fleet.operator.get(ArchiveView, f"/v1/devices/{device.id}/diagnose", command=command, **query)


async def noted(device, command, **more):
    with device.http() as http:
        note = wire.encode(ArchiveNote(command=command, **more))
        return (await asyncio.to_thread(http.post, "/v1/diagnose", content=note)).status_code


async def put(device, command, content, **headers):
    with device.http() as http:
        path = f"/v1/diagnose?command={command}"
        return (await asyncio.to_thread(lambda: http.put(path, content=content, headers=headers))).status_code


def archive_of(device, command):
    return f"/v1/devices/{device.id}/diagnose/archive?command={command}"


@pytest.mark.asyncio
async def test_an_archive_comes_to_who_asked_and_is_forgotten(new_fleet):
    async with new_fleet("embedded") as fleet:
        device = await gate(fleet)
        command = await asked(fleet, device)
        assert await view(fleet, device, command) == ArchiveView(step="asked")
        waiting = asyncio.ensure_future(view(fleet, device, command, known="asked", wait=20))
        assert await noted(device, command) == 200
        assert (await waiting).step == "made"
        early = await fleet.operator.problem("GET", archive_of(device, command))
        assert (early.type, early.status) == ("not-ready", 409)
        content = bytes(range(256)) * 1000
        assert await put(device, command, content) == 200
        seen = await view(fleet, device, command, known="sent", wait=20)
        assert seen == ArchiveView(step="ready", received=len(content), bytes=len(content))
        assert await put(device, command, b"another") == 409, "it has come"

        # Nobody else is given it, not even an admin; a viewer may not look.
        path = archive_of(device, command)
        for role, status in ((Role.ADMIN, 404), (Role.VIEWER, 403)):
            wanted = OperatorRequest(role=role)
            made = await fleet.operator.send(OperatorReply, "PUT", f"/v1/operators/other-{role}", wanted)
            other = await fleet.operator.http.get(path, headers={"authorization": f"Bearer {made.token}"})
            assert other.status_code == status, other.text
        reply = await fleet.operator.http.get(path)
        assert (reply.status_code, reply.content) == (200, content)
        assert (await fleet.operator.problem("GET", path)).status == 404
        acts = (await fleet.operator.get(operator_api.Audit, "/v1/audit")).entries
        assert "fetched the archive of command" in next(each.detail for each in acts if each.act == "diagnose")
        assert "diagnose" in next(each.detail for each in acts if each.act == "command")


@pytest.mark.asyncio
async def test_what_nobody_asked_for_or_is_too_large_is_refused(new_fleet):
    async with new_fleet("embedded") as fleet:
        device = await gate(fleet)
        assert await noted(device, 7) == await put(device, 7, b"x") == 409
        command = await asked(fleet, device)
        assert await put(device, command, bytes(bounds.ARCHIVE_MAX_BYTES + 1)) == 413
        assert await put(device, command, iter([b"of no length"])) == 413
        with device.http() as http:
            junk = await asyncio.to_thread(lambda: http.post("/v1/diagnose", content=b"{"))
            long = ArchiveNote(command=command, refused="x" * 2001)
            words = await asyncio.to_thread(lambda: http.post("/v1/diagnose", content=wire.encode(long)))
        assert (junk.status_code, words.status_code) == (400, 400)
        assert await noted(device, command, refused="its owner says no") == 200
        assert await view(fleet, device, command) == ArchiveView(step="refused", refused="its owner says no")
        assert await put(device, command, b"x") == 409, "that is over"


@pytest.mark.asyncio
async def test_a_device_is_asked_anew_and_the_first_answer_is_void(new_fleet):
    async with new_fleet("embedded") as fleet:
        device = await gate(fleet)
        first, second = await asked(fleet, device), await asked(fleet, device)
        assert await put(device, first, b"late") == 409
        assert await noted(device, second, refused="no space", failed=True) == 200
        assert (await view(fleet, device, second)).step == "failed"
        missing = await fleet.operator.problem("GET", f"/v1/devices/{device.id}/diagnose?command={first}")
        assert (missing.status, "--diagnose" in missing.action) == (404, True)


@pytest.mark.asyncio
async def test_an_earlier_agent_is_not_sent_what_it_does_not_know(new_fleet):
    async with new_fleet("embedded") as fleet:
        device = await fleet.device("a")
        problem = await fleet.operator.problem("POST", f"/v1/devices/{device.id}/command", ASK)
        assert (problem.status, problem.type) == (409, "unknown-command")
        assert f"diagnose is not known to this agent: {device.id} runs version 1" in problem.title
        assert "fleet-agent diagnose" in problem.action
        bad = operator_api.CommandRequest(verb=Diagnose(recipient="no key"))
        device = await gate(fleet, "b")
        assert (await fleet.operator.problem("POST", f"/v1/devices/{device.id}/command", bad)).status == 422
        assert device.commands == []

"""A device that refuses an assignment as a whole: the rollout hears of it, and nobody else's word stops one."""

import hashlib

import msgspec
import pytest

from fleet.protocol.codes import Outcome, Phase, RejectCode, RolloutState


def refusal(device, item, envelope, code=RejectCode.UNSIGNED):
    report = device.report(item, Phase.FAILED, code=code, message="metadata with a bad signature")
    return msgspec.structs.replace(
        report,
        instance="",
        target="",
        rollout="",
        refused=1,
        refused_sha256=hashlib.sha256(envelope).hexdigest(),
    )


@pytest.mark.asyncio
async def test_a_refused_assignment_defers_the_device_with_its_code_and_is_no_verdict(new_fleet, behaviours):
    async with new_fleet() as fleet:
        device = await fleet.device("a")
        device.behaviour = lambda item: [refusal(device, item, device.envelopes[-1])]
        view = await fleet.operator.deploy(await fleet.operator.publish("1.0.0"))
        view = await fleet.operator.follow(view, lambda view: view.devices[0].outcome is Outcome.DEFERRED)
        assert (view.state, view.devices[0].code) == (RolloutState.RUNNING, RejectCode.UNSIGNED)
        assert view.devices[0].message == "metadata with a bad signature"
        # once the device takes it, the same rollout goes on
        for report in behaviours["good"](device.items["hello"]):
            device._say(report, device.accepted[-1])
        assert (await fleet.operator.decided(view)).state is RolloutState.SUCCEEDED


@pytest.mark.asyncio
async def test_refusing_what_the_server_never_signed_or_has_replaced_stops_no_rollout(new_fleet, behaviours):
    async with new_fleet() as fleet:
        device = await fleet.device("a")
        first = await fleet.operator.publish("1.0.0")
        await fleet.operator.decided(await fleet.operator.deploy(first))
        old = device.envelopes[-1]
        good = device.behaviour
        device.behaviour = lambda item: [
            refusal(device, item, b"forged by whoever owns the broker"),
            refusal(device, item, old, RejectCode.ROLLBACK),
            *good(item),
        ]
        view = await fleet.operator.decided(await fleet.operator.deploy(await fleet.operator.publish("2.0.0")))
        assert view.state is RolloutState.SUCCEEDED, view.reason

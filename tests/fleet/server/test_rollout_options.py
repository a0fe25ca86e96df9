"""Options of `fleet deploy` over a real server: the command as its own process, and devices that speak the protocol."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from fleet.protocol import operator_api
from fleet.protocol.codes import Outcome, Phase, RolloutState


async def newest(operator, number: int):
    """Return a rollout, once there is one of this number."""
    return await operator.get(operator_api.RolloutView, f"/v1/rollouts/{number}")


def commit(device):
    """Have a silent device say that it runs what it was assigned."""
    device._say(device.report(device.items["hello"], Phase.PROBATION), device.accepted[-1])
    device._say(device.report(device.items["hello"], Phase.COMMITTED), device.accepted[-1])


@pytest.mark.asyncio
async def test_a_deploy_that_waits_for_all_ends_with_the_last_device_of_the_queue(new_fleet):
    async with new_fleet() as fleet:
        here, away = await fleet.device("here"), await fleet.enrol("away")
        third = await fleet.device("third")
        await fleet.operator.publish("1.0.0")
        command = asyncio.create_task(fleet.command("deploy", "hello@1.0.0", "--group", "edge", "--wait", "all"))
        await here.until(lambda device: device.items)
        view = await fleet.operator.decided(await newest(fleet.operator, 1))
        assert (view.state, view.counts) == (RolloutState.SUCCEEDED, {"succeeded": 2, "pending": 1})
        assert not command.done()
        await away.connect()
        done = await command
        assert done.code == 0, done.stderr
        assert f"  succeeded: not yet on {away.id}\n" in done.stdout
        assert "3 of 3 devices run main/hello@1.0.0" in done.stdout
        assert all(device.items for device in (here, away, third))


@pytest.mark.asyncio
async def test_a_deploy_for_later_offers_nothing_before_its_time(new_fleet):
    async with new_fleet() as fleet:
        operator, device = fleet.operator, await fleet.device("a")
        await operator.publish("1.0.0")
        never = await fleet.command("deploy", "hello@1.0.0", "--group", "edge", "--at", "2999-01-02T03:04", "--detach")
        assert (never.code, "(begins 2999-01-02 03:04 UTC)" in never.stdout) == (0, True), never
        soon = datetime.now(UTC) + timedelta(seconds=3)
        done = await fleet.command("deploy", "hello@1.0.0", "--group", "edge", "--at", soon.isoformat())
        assert done.code == 0, done.stderr
        late, view = await newest(operator, 1), await newest(operator, 2)
        assert (late.state, late.devices) == (RolloutState.SCHEDULED, ())
        assert (view.state, view.counts, view.starts_at) == (RolloutState.SUCCEEDED, {"succeeded": 1}, soon)
        assert view.created_at < soon <= view.devices[0].offered_at
        assert [item.rollout for each in device.accepted for item in each.items] == [view.id]
        assert (await fleet.command("rollout", "abort", "1")).code == 0
        assert (await newest(operator, 1)).state is RolloutState.ABORTED


@pytest.mark.asyncio
async def test_no_more_devices_are_in_progress_than_at_once_says(new_fleet, behaviours):
    async with new_fleet() as fleet:
        operator = fleet.operator
        devices = {device.id: device for device in [await fleet.device(name) for name in ("a", "b", "c")]}
        for device in devices.values():
            device.behaviour = behaviours["silent"]
        await operator.publish("1.0.0")
        done = await fleet.command(
            "deploy", "hello@1.0.0", "--group", "edge", "--waves", "100%", "--at-once", 1, "--detach"
        )
        assert done.code == 0, done.stderr
        view = await newest(operator, 1)
        for finished in range(3):
            expected = {"waiting": 1, "succeeded": finished, "pending": 2 - finished}
            wanted = {word: count for word, count in expected.items() if count}
            view = await operator.follow(view, lambda view, wanted=wanted: view.counts == wanted)
            (under_way,) = [each.device for each in view.devices if each.outcome is Outcome.WAITING]
            offered = {name for name, device in devices.items() if device.accepted}
            assert offered <= {under_way, *(each.device for each in view.devices if each.outcome is Outcome.SUCCEEDED)}
            await devices[under_way].until(lambda device: device.items)
            commit(devices[under_way])
        assert (await operator.decided(view)).counts == {"succeeded": 3}


@pytest.mark.asyncio
@pytest.mark.parametrize(("share", "state"), [("50%", RolloutState.SUCCEEDED), ("49%", RolloutState.REVERTED)])
async def test_a_share_of_the_wave_may_fail(new_fleet, behaviours, share, state):
    async with new_fleet() as fleet:
        devices = [await fleet.device("a"), await fleet.device("b")]
        devices[0].behaviour = behaviours["trapping"]
        await fleet.operator.publish("1.0.0")
        done = await fleet.command(
            "deploy", "hello@1.0.0", "--group", "edge", "--waves", "100%", "--failures", share, "--min-success", "50%"
        )
        view = await newest(fleet.operator, 1)
        assert (view.state, done.code) == (state, 0 if state is RolloutState.SUCCEEDED else 1), done


@pytest.mark.asyncio
async def test_a_share_of_the_wave_must_succeed(new_fleet):
    async with new_fleet() as fleet:
        operator, away = fleet.operator, await fleet.enrol("away")
        await fleet.device("a")
        await operator.publish("1.0.0")
        words = ("deploy", "hello@1.0.0", "--group", "edge", "--waves", "100%", "--min-success", "51%", "--detach")
        assert (await fleet.command(*words)).code == 0
        view = await operator.follow(await newest(operator, 1), lambda view: view.counts.get("succeeded") == 1)
        view = await operator.follow(view, lambda view: view.waits_for == (away.id,))
        assert view.state is RolloutState.RUNNING
        await away.connect()
        assert (await operator.decided(view)).counts == {"succeeded": 2}


@pytest.mark.asyncio
async def test_a_share_of_the_group_catches_up_at_a_time(new_fleet, behaviours):
    async with new_fleet() as fleet:
        operator = fleet.operator
        devices = [await fleet.device(name) for name in ("a", "b", "c", "d")]
        await operator.publish("1.0.0")
        await operator.decided(await operator.deploy(await operator.publish("2.0.0")))
        late = devices[1:]
        for device in late:
            await device.disconnect(politely=False)
            bell = fleet.server._conductor._watch
            gone = device.id
            await bell.until(lambda gone=gone: not fleet.server._store.devices.get(gone).online, timeout_s=60)
            device.behaviour = behaviours["silent"]
        done = await fleet.command("deploy", "hello@1.0.0", "--group", "edge", "--waves", "100%", "--catch-up", "50%")
        assert done.code == 0, done.stderr
        for device in late:
            await device.connect()
        view = await newest(operator, 2)
        view = await operator.follow(view, lambda view: view.counts == {"succeeded": 1, "waiting": 2, "pending": 1})
        (first, *_) = [each.device for each in view.devices if each.outcome is Outcome.WAITING]
        (device,) = [device for device in late if device.id == first]
        await device.until(lambda device: device.items["hello"].rollout == view.id)
        commit(device)
        await operator.follow(view, lambda view: view.counts == {"succeeded": 2, "waiting": 2})


@pytest.mark.asyncio
async def test_another_configuration_supersedes_an_open_rollout_only_where_asked(
    new_fleet, behaviours, manifest_with_key
):
    async with new_fleet() as fleet:
        operator, device = fleet.operator, await fleet.device("a")
        for version in ("1.0.0", "2.0.0"):
            await operator.publish(version, **manifest_with_key)
        device.behaviour = behaviours["silent"]
        deploy = ("deploy", "--group", "edge", "--config", "place=here")
        assert (await fleet.command(*deploy, "hello@1.0.0", "--detach")).code == 0
        await device.until(lambda device: device.items)
        device.behaviour = behaviours["good"]
        deploy = (*deploy, "hello@2.0.0", "--config", "greeting=hi")
        refused = await fleet.command(*deploy)
        assert (refused.code, "add --supersede" in refused.stderr) == (4, True), refused
        assert (await newest(operator, 1)).state is RolloutState.RUNNING
        done = await fleet.command(*deploy, "--supersede")
        assert done.code == 0, done.stderr
        assert (await newest(operator, 1)).state is RolloutState.SUPERSEDED
        assert (await newest(operator, 2)).state is RolloutState.SUCCEEDED
        assert dict(device.items["hello"].config) == {"place": "here", "greeting": "hi"}

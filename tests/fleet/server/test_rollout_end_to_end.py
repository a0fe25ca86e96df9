"""The main job over real sockets: a push reaches devices that verify it, wave by wave, and a bad one is stopped."""

import asyncio

import pytest

from fleet.protocol import operator_api, wire
from fleet.protocol.assignment import Assignment
from fleet.protocol.codes import Outcome, RejectCode, RolloutState
from fleet.protocol.messages import DesiredReply
from fleet.rollout.model import Member
from fleet.server.rollout_members import with_presence
from signing import dsse
from signing.state import VerifierState
from tests.eventually import eventually_async


def outcomes(view: operator_api.RolloutView) -> dict[int, list[Outcome]]:
    waves: dict[int, list[Outcome]] = {}
    for device in view.devices:
        waves.setdefault(device.wave, []).append(device.outcome)
    return waves


@pytest.mark.asyncio
async def test_a_push_reaches_every_device_and_becomes_what_the_group_runs(new_fleet, broker):
    async with new_fleet(broker) as fleet:
        devices = [await fleet.device(f"device{number}") for number in range(3)]
        target = await fleet.operator.publish("1.0.0")
        view = await fleet.operator.decided(await fleet.operator.deploy(target))

        assert view.state is RolloutState.SUCCEEDED, view.reason
        assert outcomes(view) == {1: [Outcome.SUCCEEDED], 2: [Outcome.SUCCEEDED] * 2}
        for device in devices:
            await device.until(lambda device: device.items)
            # it verified the envelope against the pinned root before it believed it
            assert device.items["hello"].target == target
            assert device.items["hello"].rollout == view.id
        (group,) = (await fleet.operator.get(operator_api.Groups, "/v1/groups")).groups
        assert [each.target for each in group.settled] == [target]
        # settling changes nothing that devices run: no second assignment
        assert all(len(device.accepted) == 1 for device in devices)


@pytest.mark.asyncio
async def test_a_version_that_traps_is_stopped_before_the_second_device_and_taken_back(new_fleet, broker, behaviours):
    async with new_fleet(broker) as fleet:
        devices = {device.id: device for device in [await fleet.device("a"), await fleet.device("b")]}
        good = await fleet.operator.publish("1.0.0")
        await fleet.operator.decided(await fleet.operator.deploy(good))
        for device in devices.values():
            device.behaviour = behaviours["trapping"]
        bad = await fleet.operator.publish("2.0.0")
        view = await fleet.operator.decided(await fleet.operator.deploy(bad))

        assert view.state is RolloutState.REVERTED
        assert outcomes(view) == {1: [Outcome.FAILED], 2: [Outcome.NOT_AFFECTED]}
        first = view.devices[0]
        assert (first.code, first.log) == (RejectCode.TRAPPED, ("boom",))
        assert first.device in view.reason
        # the first device is offered what it had; the second never heard of the bad one
        tried = devices.pop(first.device)
        (spared,) = devices.values()
        await tried.until(lambda device: device.items["hello"].target == good)
        assert bad not in {item.target for each in spared.accepted for item in each.items}
        assert bad in {item.target for each in tried.accepted for item in each.items}


@pytest.mark.asyncio
async def test_undo_goes_back_through_history_and_removal_takes_the_instance_off(new_fleet):
    async with new_fleet() as fleet:
        operator, device = fleet.operator, await fleet.device("a")
        targets = [await operator.publish(f"{number}.0.0") for number in (1, 2)]
        for target in targets:
            await operator.decided(await operator.deploy(target))
        undone = await operator.decided(
            await operator.send(operator_api.RolloutView, "POST", "/v1/undo", operator_api.UndoRequest(group="edge"))
        )
        assert (undone.state, undone.target) == (RolloutState.SUCCEEDED, targets[0])
        assert device.items["hello"].target == targets[0]

        # a second undo would take the good version back: it is refused, and names the one before
        problem = await operator.problem("POST", "/v1/undo", operator_api.UndoRequest())
        assert (problem.type, problem.action) == ("nothing-to-undo", "to take rollout 1 back: fleet undo 1")
        gone = await operator.send(operator_api.RolloutView, "POST", "/v1/undo", operator_api.UndoRequest(rollout="1"))
        assert (await operator.decided(gone)).state is RolloutState.SUCCEEDED
        await device.until(lambda device: not device.items)
        assert device.accepted[-1].stop_all
        problem = await operator.problem("POST", "/v1/undo", operator_api.UndoRequest())
        assert problem.type == "nothing-to-undo"

        await operator.decided(await operator.deploy(targets[1]))
        removal = operator_api.RemovalRequest(instance="hello", group="edge", keep_data=True)
        view = await operator.send(operator_api.RolloutView, "POST", "/v1/removals", removal)
        assert (await operator.decided(view)).state is RolloutState.SUCCEEDED
        await device.until(lambda device: not device.items)
        assert device.accepted[-1].keep_data == ("hello",)


@pytest.mark.asyncio
async def test_a_wave_waits_for_a_success_and_names_whom_it_waits_for(new_fleet):
    async with new_fleet() as fleet:
        here, away = await fleet.device("here"), await fleet.enrol("away")
        view = await fleet.operator.deploy(await fleet.operator.publish("1.0.0"))
        view = await fleet.operator.follow(view, lambda view: view.waits_for == (away.id,))
        assert view.state is RolloutState.RUNNING
        assert view.reason == f"wave 2 needs 1 success and has 0; it waits for {away.id} (offline)"
        assert {each.device: each.outcome for each in view.devices} == {
            here.id: Outcome.SUCCEEDED,
            away.id: Outcome.WAITING,
        }
        await away.connect()
        assert (await fleet.operator.decided(view)).counts == {"succeeded": 2}


@pytest.mark.asyncio
async def test_a_device_that_is_offline_gets_it_from_the_queue_when_it_comes_back(new_fleet, broker):
    async with new_fleet(broker) as fleet:
        await fleet.device("here"), await fleet.device("there")
        away = await fleet.enrol("away")
        target = await fleet.operator.publish("1.0.0")
        view = await fleet.operator.decided(await fleet.operator.deploy(target))
        assert view.state is RolloutState.SUCCEEDED
        assert [each.outcome for each in view.devices if each.device == away.id] == [Outcome.PENDING]
        await away.connect()
        view = await fleet.operator.follow(view, lambda view: view.counts == {"succeeded": 3})
        assert away.items["hello"].target == target


@pytest.mark.asyncio
async def test_a_device_without_the_broker_gets_it_from_the_queue_by_its_polls(new_fleet):
    async with new_fleet() as fleet:
        await fleet.device("here"), await fleet.device("there")
        away, dead = await fleet.enrol("away"), await fleet.enrol("dead")
        target = await fleet.operator.publish("1.0.0")
        view = await fleet.operator.decided(await fleet.operator.deploy(target))
        assert view.counts == {"succeeded": 2, "pending": 2}

        def poll():
            with away.http() as http:
                reply = http.get("/v1/desired", params={"nonce": "0" * 32})
            assignment = dsse.parse(wire.decode(DesiredReply, reply.content).assignment.encode()).payload
            return [item.target for item in wire.decode(Assignment, assignment).items]

        assert await asyncio.to_thread(poll) == []
        view = await fleet.operator.follow(view, lambda view: view.counts.get("waiting"))
        assert {each.device: each.outcome for each in view.devices if each.device in {away.id, dead.id}} == {
            away.id: Outcome.WAITING,
            dead.id: Outcome.PENDING,
        }

        async def offered():
            return await asyncio.to_thread(poll) == [target]

        await eventually_async(offered, "the assignment that follows from the offer is there")
        # by its own signed word, once it reaches the broker, it has succeeded
        await away.connect()
        view = await fleet.operator.follow(view, lambda view: view.counts.get("succeeded") == 3)
        assert view.counts == {"succeeded": 3, "pending": 1}


def test_polls_admit_from_the_queue_and_hold_up_no_wave():
    in_wave, in_queue = Member("a", 1), Member("a", 1, arrival=True)
    polls = {"a": 5.0}
    assert [each.online_since for each in with_presence([in_wave, in_queue], {}, {}, 0.0, polls)] == [None, 5.0]
    assert [each.online_since for each in with_presence([in_wave, in_queue], {"a": 9.0}, {}, 0.0, polls)] == [9.0, 9.0]


@pytest.mark.asyncio
async def test_polls_of_a_device_at_the_broker_wake_nobody(new_fleet):
    async with new_fleet() as fleet:
        device, away = await fleet.device("here"), await fleet.enrol("away")
        conductor = fleet.server._conductor
        conductor.wake()
        await eventually_async(lambda: device.id in conductor._online, "the loop has seen the device")
        conductor._wake.clear()
        conductor.polled(device.id)
        assert not conductor._wake.is_set()
        conductor.polled(away.id)
        assert conductor._wake.is_set()


@pytest.mark.asyncio
async def test_a_server_that_is_restarted_in_mid_rollout_goes_on(new_fleet, broker, behaviours):
    async with new_fleet(broker) as fleet:
        devices = [await fleet.device("a"), await fleet.device("b")]
        for device in devices:
            device.behaviour = behaviours["silent"]
        target = await fleet.operator.publish("1.0.0")
        view = await fleet.operator.deploy(target, waves="100%")
        for device in devices:
            await device.until(lambda device: device.items)
        await fleet.stop()
        for device in devices:
            await device.disconnect()

        await fleet.start()
        view = await fleet.operator.get(operator_api.RolloutView, f"/v1/rollouts/{view.id}")
        assert view.state is RolloutState.RUNNING
        for device in devices:
            device.behaviour, device.items = behaviours["good"], {}
            device.states.save(VerifierState())
            device.accepted.clear()
            await device.connect()
        assert (await fleet.operator.decided(view)).state is RolloutState.SUCCEEDED


@pytest.mark.asyncio
async def test_a_broker_that_dies_is_started_again_and_nothing_is_lost(new_fleet, broker):
    async with new_fleet(broker) as fleet:
        import os
        import signal

        device = await fleet.device("a")
        first = await fleet.operator.publish("1.0.0")
        await fleet.operator.decided(await fleet.operator.deploy(first))
        pid = fleet.server.broker_pid
        os.kill(pid, signal.SIGKILL)
        second = await fleet.operator.publish("2.0.0")
        view = await fleet.operator.decided(await fleet.operator.deploy(second))
        assert view.state is RolloutState.SUCCEEDED
        assert fleet.server.broker_pid not in {None, pid}
        assert device.items["hello"].target == second

"""Several components as one rollout: offered in one assignment, decided as one, taken back as one."""

from datetime import UTC, datetime

import pytest

from fleet.protocol import operator_api
from fleet.protocol.codes import Outcome, RejectCode, RolloutState


def deploy_both(fleet, target, **more):
    request = operator_api.RolloutRequest(
        instance="front",
        target=target,
        also={"back": target},
        group="edge",
        **more,
    )
    return fleet.operator.send(operator_api.RolloutView, "POST", "/v1/rollouts", request)


@pytest.fixture
def broker():
    return "embedded"


def words(device):
    return {name: item.atomic for name, item in device.items.items()}


@pytest.mark.asyncio
async def test_a_device_is_asked_for_the_whole_set_at_once_and_all_of_it_is_settled(new_fleet, broker):
    async with new_fleet(broker) as fleet:
        device = await fleet.device("a")
        target = await fleet.operator.publish("1.0.0")
        view = await fleet.operator.decided(await deploy_both(fleet, target))
        assert view.state is RolloutState.SUCCEEDED, view.reason
        assert len(view.together) == 2
        await device.until(lambda device: len(device.items) == 2)
        # never a part of it, and both by one word
        assert all(len(each.items) == 2 for each in device.accepted)
        assert len(set(words(device).values())) == 1
        assert "" not in words(device).values()
        (group,) = (await fleet.operator.get(operator_api.Groups, "/v1/groups")).groups
        assert {each.instance: each.target for each in group.settled} == {"front": target, "back": target}


@pytest.mark.asyncio
async def test_one_bad_member_halts_the_set_before_the_next_wave_and_takes_all_of_it_back(
    new_fleet, broker, behaviours
):
    async with new_fleet(broker) as fleet:
        devices = {device.id: device for device in [await fleet.device("a"), await fleet.device("b")]}
        good = await fleet.operator.publish("1.0.0")
        await fleet.operator.decided(await deploy_both(fleet, good))

        def back_traps(item):
            return behaviours["trapping" if item.instance == "back" else "good"](item)

        for device in devices.values():
            device.behaviour = back_traps
        bad = await fleet.operator.publish("2.0.0")
        view = await fleet.operator.decided(await deploy_both(fleet, bad))
        assert view.state is RolloutState.REVERTED
        other = await fleet.operator.get(operator_api.RolloutView, f"/v1/rollouts/{max(view.together)}")
        assert (other.instance, other.state) == ("back", RolloutState.REVERTED)
        assert [each.code for each in other.devices if each.outcome is Outcome.FAILED] == [RejectCode.TRAPPED]
        assert "boom" in view.reason or "trapped" in view.reason
        tried = {each.device for each in other.devices if each.outcome is Outcome.FAILED}
        for name, device in devices.items():
            await device.until(lambda device: {item.target for item in device.items.values()} == {good})
            asked = {item.target for each in device.accepted for item in each.items}
            assert (bad in asked) == (name in tried)


@pytest.mark.asyncio
async def test_an_undo_takes_the_whole_set_back_and_so_does_what_is_said_to_one_of_it(new_fleet, broker, behaviours):
    async with new_fleet(broker) as fleet:
        device = await fleet.device("a")
        targets = [await fleet.operator.publish(version) for version in ("1.0.0", "2.0.0", "3.0.0")]
        for target in targets[:2]:
            await fleet.operator.decided(await deploy_both(fleet, target))
        undone = await fleet.operator.send(
            operator_api.RolloutView, "POST", "/v1/undo", operator_api.UndoRequest(group="edge")
        )
        assert (await fleet.operator.decided(undone)).state is RolloutState.SUCCEEDED
        await device.until(lambda device: {item.target for item in device.items.values()} == {targets[0]})
        assert len(set(words(device).values())) == 1
        # Paused by one of its numbers, both are; aborted by the other, both are.
        device.behaviour = behaviours["silent"]
        view = await deploy_both(fleet, targets[2])
        first, second = view.together
        paused = await fleet.operator.send(operator_api.RolloutView, "POST", f"/v1/rollouts/{second}/pause")
        assert paused.state is RolloutState.PAUSED
        assert (
            await fleet.operator.get(operator_api.RolloutView, f"/v1/rollouts/{first}")
        ).state is RolloutState.PAUSED
        await fleet.operator.send(operator_api.RolloutView, "POST", f"/v1/rollouts/{first}/abort")
        assert (
            await fleet.operator.get(operator_api.RolloutView, f"/v1/rollouts/{second}")
        ).state is RolloutState.ABORTED


@pytest.mark.asyncio
async def test_a_set_that_names_an_instance_twice_is_refused(new_fleet, broker):
    async with new_fleet(broker) as fleet:
        await fleet.device("a")
        target = await fleet.operator.publish("1.0.0")
        request = operator_api.RolloutRequest(instance="hello", target=target, also={"hello": target}, group="edge")
        problem = await fleet.operator.problem("POST", "/v1/rollouts", request)
        assert "hello is named twice" in problem.title


async def pin(fleet, device, instance, target):
    wish = operator_api.RolloutRequest(instance=instance, target=target)
    path = f"/v1/devices/{device.id}/pin"
    return await fleet.operator.decided(await fleet.operator.send(operator_api.RolloutView, "PUT", path, wish))


@pytest.mark.asyncio
async def test_a_set_that_begins_later_leaves_a_device_out_of_all_of_it(new_fleet, broker):
    async with new_fleet(broker) as fleet:
        pinned, other = await fleet.device("a"), await fleet.device("b")
        one, two = await fleet.operator.publish("1.0.0"), await fleet.operator.publish("2.0.0")
        await pin(fleet, pinned, "front", one)
        view = await deploy_both(fleet, two, starts_at=datetime.now(UTC))
        view = await fleet.operator.follow(view, lambda view: view.state is RolloutState.SUCCEEDED)
        await other.until(lambda device: len(device.items) == 2)
        assert set(pinned.items) == {"front"}
        for number in view.together:
            member = await fleet.operator.get(operator_api.RolloutView, f"/v1/rollouts/{number}")
            assert member.counts == {"succeeded": 1, "not-affected": 1}


@pytest.mark.asyncio
async def test_a_set_that_begins_later_begins_each_member_once(new_fleet, broker, caplog):
    async with new_fleet(broker) as fleet:
        await fleet.operator.token("edge")
        target = await fleet.operator.publish("1.0.0")
        empty = await deploy_both(fleet, target, starts_at=datetime.now(UTC), allow_empty=True)
        for number in empty.together:
            member = await fleet.operator.get(operator_api.RolloutView, f"/v1/rollouts/{number}")
            await fleet.operator.follow(member, lambda view: view.state is RolloutState.SUCCEEDED)
        await fleet.device("a")
        other = await fleet.operator.publish("2.0.0")
        view = await deploy_both(fleet, other, starts_at=datetime.now(UTC))
        await fleet.operator.follow(view, lambda view: view.state is RolloutState.SUCCEEDED)
        entries = (await fleet.operator.get(operator_api.Audit, "/v1/audit")).entries
        ended = [each.subject for each in entries if each.act == "rollout-succeeded"]
        assert len(ended) == len(set(ended)) == 4
        assert "a round of the rollout loop failed" not in caplog.text


@pytest.mark.asyncio
async def test_a_device_that_joins_while_a_set_is_open_gets_all_of_it_or_none(new_fleet, broker):
    async with new_fleet(broker) as fleet:
        await fleet.device("a")
        one, two = await fleet.operator.publish("1.0.0"), await fleet.operator.publish("2.0.0")
        view = await deploy_both(fleet, two, soak_s=3600)
        joins = await fleet.device("b", group="other")
        await pin(fleet, joins, "front", one)
        wish = operator_api.GroupRequest(add=(joins.id,))
        await fleet.operator.send(operator_api.GroupRow, "PUT", "/v1/groups/edge", wish)
        for number in view.together:
            member = await fleet.operator.get(operator_api.RolloutView, f"/v1/rollouts/{number}")
            member = await fleet.operator.follow(member, lambda view: len(view.devices) == 2)
            outcomes = {each.device: each.outcome for each in member.devices}
            assert outcomes[joins.id] is Outcome.NOT_AFFECTED


async def shown(fleet, number):
    return await fleet.operator.get(operator_api.RolloutView, f"/v1/rollouts/{number}")


def deploy_back_as_it_is(fleet, front, back, *, first="front"):
    """A set of which only `front` changes."""
    named = {"front": front, "back": back}
    (other,) = named.keys() - {first}
    request = operator_api.RolloutRequest(
        instance=first, target=named[first], also={other: named[other]}, group="edge", soak_s=0
    )
    return fleet.operator.send(operator_api.RolloutView, "POST", "/v1/rollouts", request)


@pytest.mark.parametrize("first", ["front", "back"])
@pytest.mark.asyncio
async def test_a_set_with_an_unchanged_member_is_steered_and_undone_by_the_others(new_fleet, broker, behaviours, first):
    async with new_fleet(broker) as fleet:
        device = await fleet.device("a")
        one, two, three = [await fleet.operator.publish(version) for version in ("1.0.0", "2.0.0", "3.0.0")]
        await fleet.operator.decided(await deploy_both(fleet, one))
        view = await deploy_back_as_it_is(fleet, two, one, first=first)
        assert (view.instance, view.state) == ("front", RolloutState.RUNNING)
        view = await fleet.operator.decided(view)
        undo = operator_api.UndoRequest(rollout=str(view.number))
        undone = await fleet.operator.send(operator_api.RolloutView, "POST", "/v1/undo", undo)
        assert (await fleet.operator.decided(undone)).state is RolloutState.SUCCEEDED
        await device.until(lambda device: {item.target for item in device.items.values()} == {one})
        device.behaviour = behaviours["silent"]
        view = await deploy_back_as_it_is(fleet, three, one, first=first)
        (refused,) = set(view.together) - {view.number}
        before = await shown(fleet, refused)
        assert (before.state, "nothing would change" in before.reason) == (RolloutState.REFUSED, True)
        for verb in ("pause", "resume"):
            await fleet.operator.send(operator_api.RolloutView, "POST", f"/v1/rollouts/{view.number}/{verb}")
            after = await shown(fleet, refused)
            assert (after.state, after.reason) == (before.state, before.reason)
        wish = operator_api.AbortRequest(keep=True)
        await fleet.operator.send(operator_api.RolloutView, "POST", f"/v1/rollouts/{view.number}/abort", wish)
        assert (await shown(fleet, refused)).reason == before.reason


@pytest.mark.asyncio
async def test_a_set_that_takes_the_place_of_an_open_one_judges_each_member_before_it_ends(
    new_fleet, broker, behaviours
):
    async with new_fleet(broker) as fleet:
        device = await fleet.device("a")
        one, two, three = [await fleet.operator.publish(version) for version in ("1.0.0", "2.0.0", "3.0.0")]
        await fleet.operator.decided(await deploy_both(fleet, one))
        device.behaviour = behaviours["silent"]
        await deploy_both(fleet, two)
        await device.until(lambda device: {item.target for item in device.items.values()} == {two})
        device.behaviour = behaviours["good"]
        view = await deploy_back_as_it_is(fleet, three, one)
        states = [(await shown(fleet, number)).state for number in view.together]
        assert RolloutState.REFUSED not in states
        assert (await fleet.operator.decided(view)).state is RolloutState.SUCCEEDED

"""Meaning of an outcome, on a whole server: what was found wrong there, each with the right value.

The decisions themselves are told in `tests/fleet/rollout`; here the server, its store and its director carry them out.
"""

import sqlite3
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from fleet.protocol import operator_api
from fleet.protocol.codes import Outcome, PauseCause, RolloutState


def of(view, device):
    return next(each for each in view.devices if each.device == device.id)


async def act(operator, view, verb, body=None):
    return await operator.send(operator_api.RolloutView, "POST", f"/v1/rollouts/{view.number}/{verb}", body)


async def shown(operator, view):
    return await operator.get(operator_api.RolloutView, f"/v1/rollouts/{view.number}")


@pytest.mark.asyncio
async def test_a_release_that_is_withdrawn_while_it_soaks_is_revoked_and_nobody_is_left_without(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        devices = [await fleet.device("a"), await fleet.device("b")]
        one, two = await operator.publish("1.0.0"), await operator.publish("2.0.0")
        await operator.decided(await operator.deploy(one))
        view = await operator.deploy(two, soak_s=3600)
        view = await operator.follow(view, lambda view: view.counts.get("succeeded") == 1)
        await operator.revoke("2.0.0")
        view = await operator.decided(view)
        assert (view.state, view.reason) == (RolloutState.REVOKED, f"{two} was withdrawn")
        for device in devices:
            await device.until(lambda device: device.items["hello"].target == one)
        view = await operator.follow(view, lambda view: view.counts == {"reverted": 1, "not-affected": 1})
        (group,) = (await operator.get(operator_api.Groups, "/v1/groups")).groups
        assert [each.target for each in group.settled] == [one]


@pytest.mark.asyncio
async def test_no_group_keeps_pointing_at_a_withdrawn_release(new_fleet):
    async with new_fleet() as fleet:
        operator, device = fleet.operator, await fleet.device("a")
        one, two = await operator.publish("1.0.0"), await operator.publish("2.0.0")
        for target in (one, two):
            await operator.decided(await operator.deploy(target))
        await operator.revoke("2.0.0")
        await device.until(lambda device: device.items["hello"].target == one)
        (group,) = (await operator.get(operator_api.Groups, "/v1/groups")).groups
        assert [each.target for each in group.settled] == [one]
        await operator.revoke("1.0.0")
        await device.until(lambda device: not device.items)
        assert device.accepted[-1].keep_data == ("hello",)
        (group,) = (await operator.get(operator_api.Groups, "/v1/groups")).groups
        assert group.settled == ()


@pytest.mark.asyncio
async def test_a_device_that_is_pinned_elsewhere_is_never_the_canary(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        pinned, other = await fleet.device("a"), await fleet.device("b")
        one, two = await operator.publish("1.0.0"), await operator.publish("2.0.0")
        wish = operator_api.RolloutRequest(instance="hello", target=one)
        pin = await operator.send(operator_api.RolloutView, "PUT", f"/v1/devices/{pinned.id}/pin", wish)
        assert (await operator.decided(pin)).state is RolloutState.SUCCEEDED
        view = await operator.decided(await operator.deploy(two))
        assert (view.state, view.counts) == (RolloutState.SUCCEEDED, {"not-affected": 1, "succeeded": 1})
        left_out = of(view, pinned)
        assert (left_out.outcome, left_out.wave, left_out.reason) == (Outcome.NOT_AFFECTED, 0, "it is supplied by pin")
        assert (of(view, other).outcome, of(view, other).wave) == (Outcome.SUCCEEDED, 1)
        assert pinned.items["hello"].target == one


@pytest.mark.asyncio
async def test_a_removal_from_one_group_leaves_the_wish_of_another(new_fleet):
    async with new_fleet() as fleet:
        operator, device = fleet.operator, await fleet.device("a", group="ga")
        for group, priority in (("ga", 0), ("gb", 10)):
            wish = operator_api.GroupRequest(priority=priority, add=(device.id,))
            await operator.send(operator_api.GroupRow, "PUT", f"/v1/groups/{group}", wish)
        one, two = await operator.publish("1.0.0"), await operator.publish("2.0.0")
        await operator.decided(await operator.deploy(one, group="ga"))
        await operator.decided(await operator.deploy(two, group="gb"))
        await device.until(lambda device: device.items["hello"].target == two)
        remove = operator_api.RemovalRequest(instance="hello", group="gb")
        view = await operator.send(operator_api.RolloutView, "POST", "/v1/removals", remove)
        await operator.decided(view)
        await device.until(lambda device: device.items and device.items["hello"].target == one)
        remove = operator_api.RemovalRequest(instance="hello", group="ga")
        view = await operator.send(operator_api.RolloutView, "POST", "/v1/removals", remove)
        await operator.decided(view)
        await device.until(lambda device: not device.items)


@pytest.mark.asyncio
async def test_an_aborted_rollout_shows_who_went_back(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        await fleet.device("a"), await fleet.device("b")
        one, two = await operator.publish("1.0.0"), await operator.publish("2.0.0")
        await operator.decided(await operator.deploy(one))
        view = await operator.deploy(two, soak_s=3600)
        view = await operator.follow(view, lambda view: view.counts.get("succeeded") == 1)
        view = await act(operator, view, "abort")
        assert view.state is RolloutState.ABORTED, "an abort waits for nobody"
        assert "succeeded" not in view.counts
        view = await operator.follow(view, lambda view: view.counts == {"reverted": 1, "not-affected": 1})
        problem = await operator.problem("POST", "/v1/undo", operator_api.UndoRequest(group="edge"))
        assert (problem.type, problem.action) == ("nothing-to-undo", "to take rollout 1 back: fleet undo 1")


@pytest.mark.asyncio
async def test_an_abort_that_keeps_pins_what_runs(new_fleet):
    async with new_fleet() as fleet:
        operator, device = fleet.operator, await fleet.device("a")
        await fleet.device("b")
        one, two = await operator.publish("1.0.0"), await operator.publish("2.0.0")
        await operator.decided(await operator.deploy(one))
        view = await operator.deploy(two, soak_s=3600)
        view = await operator.follow(view, lambda view: view.counts.get("succeeded") == 1)
        view = await act(operator, view, "abort", operator_api.AbortRequest(keep=True))
        (kept,) = [each.device for each in view.devices if each.outcome is Outcome.SUCCEEDED]
        detail = await operator.get(operator_api.DeviceDetail, f"/v1/devices/{kept}")
        assert [(each.target, each.source) for each in detail.effective] == [(two, "pin")]
        assert device.items["hello"].target == (two if device.id == kept else one)


@pytest.mark.asyncio
async def test_a_rollout_that_would_change_nothing_is_refused(new_fleet):
    async with new_fleet() as fleet:
        operator, _ = fleet.operator, await fleet.device("a")
        target = await operator.publish("1.0.0")
        await operator.decided(await operator.deploy(target))
        view = await operator.decided(await operator.deploy(target))
        assert (view.state, view.reason) == (RolloutState.REFUSED, "nothing would change: edge is settled on it")


@pytest.mark.asyncio
async def test_the_clock_that_jumps_a_year_for_a_moment_ends_nothing(new_fleet, behaviours):
    async with new_fleet() as fleet:
        operator, device = fleet.operator, await fleet.device("a")
        device.behaviour = behaviours["silent"]
        view = await operator.deploy(await operator.publish("1.0.0"))
        await device.until(lambda device: device.items)
        controller = fleet.server._conductor
        clock = controller._clock
        controller._clock = lambda: clock() + timedelta(days=365)
        await controller.step()
        controller._clock = clock
        await controller.step()
        view = await shown(operator, view)
        assert (view.state, view.counts) == (RolloutState.RUNNING, {"waiting": 1})


@pytest.mark.asyncio
async def test_a_freeze_pauses_and_refuses_until_it_ends(new_fleet, behaviours):
    async with new_fleet() as fleet:
        operator, device = fleet.operator, await fleet.device("a")
        device.behaviour = behaviours["silent"]
        view = await operator.deploy(await operator.publish("1.0.0"))
        await device.until(lambda device: device.items)
        freeze = operator_api.FreezeRequest(group="edge", reason="trade fair")
        await operator.send(operator_api.Freezes, "POST", "/v1/freeze", freeze)
        view = await operator.follow(view, lambda view: view.state is RolloutState.PAUSED)
        assert (view.causes, view.reason) == ((PauseCause.FREEZE,), "frozen: trade fair")
        wish = operator_api.RolloutRequest(instance="x", target=view.target, group="edge")
        assert (await operator.problem("POST", "/v1/rollouts", wish)).type == "frozen"
        assert (await operator.problem("POST", f"/v1/rollouts/{view.number}/resume")).type == "frozen"
        status = await operator.get(operator_api.Status, "/v1/status")
        assert "edge is frozen: trade fair" in status.waiting
        await operator.send(operator_api.Freezes, "POST", "/v1/unfreeze", operator_api.UnfreezeRequest(group="edge"))
        view = await operator.follow(view, lambda view: view.state is RolloutState.RUNNING)


@pytest.mark.asyncio
async def test_a_version_that_a_gate_on_metrics_left_undecided_waits_for_an_operator(new_fleet, behaviours):
    def undecided(item):
        *before, committed = behaviours["good"](item)
        return [*before, msgspec.structs.replace(committed, undecided="read_errors: 12 of 50 calls")]

    async with new_fleet() as fleet:
        operator = fleet.operator
        devices = [await fleet.device("a"), await fleet.device("b")]
        target = await operator.publish("1.0.0")
        for device in devices:
            device.behaviour = undecided
        view = await operator.deploy(target, waves="1, 100%")
        view = await operator.follow(view, lambda view: view.state is RolloutState.PAUSED)
        assert view.causes == (PauseCause.UNDECIDED,)
        assert view.reason.endswith("ran too little for a gate on metrics: read_errors: 12 of 50 calls")
        assert view.counts == {"succeeded": 1, "pending": 1}
        for device in devices:
            device.behaviour = behaviours["good"]
        view = await operator.decided(await act(operator, view, "resume"))
        assert (view.state, view.counts) == (RolloutState.SUCCEEDED, {"succeeded": 2})
        assert sorted(each.accepted for each in view.devices) == [False, True]
        acts = (await operator.get(operator_api.Audit, "/v1/audit")).entries
        assert any(each.detail.startswith("undecided of ") for each in acts)


@pytest.mark.asyncio
async def test_a_breach_that_pauses_is_accepted_by_name_and_goes_on(new_fleet, behaviours):
    async with new_fleet() as fleet:
        operator = fleet.operator
        devices = [await fleet.device("a"), await fleet.device("b")]
        target = await operator.publish("1.0.0")
        for device in devices:
            device.behaviour = behaviours["trapping"]
        view = await operator.deploy(target, waves="1, 100%", on_breach="pause")
        view = await operator.follow(view, lambda view: view.state is RolloutState.PAUSED)
        assert view.causes == (PauseCause.BREACH,)
        for device in devices:
            device.behaviour = behaviours["good"]
        view = await act(operator, view, "resume")
        view = await operator.decided(view)
        assert (view.state, view.counts) == (RolloutState.SUCCEEDED, {"failed": 1, "succeeded": 1})
        assert [each.accepted for each in view.devices if each.outcome is Outcome.FAILED] == [True]
        acts = (await operator.get(operator_api.Audit, "/v1/audit")).entries
        failed = next(each.device for each in view.devices if each.outcome is Outcome.FAILED)
        assert f"failures and losses of {failed}" in [each.detail for each in acts]


@pytest.mark.asyncio
async def test_a_reverted_rollout_is_retried_with_a_raised_attempt(new_fleet, behaviours):
    async with new_fleet() as fleet:
        operator, device = fleet.operator, await fleet.device("a", behaviour=behaviours["trapping"])
        view = await operator.decided(await operator.deploy(await operator.publish("1.0.0")))
        assert view.state is RolloutState.REVERTED
        device.behaviour = behaviours["good"]
        view = await operator.decided(await act(operator, view, "retry"))
        assert (view.state, view.counts) == (RolloutState.SUCCEEDED, {"succeeded": 1})
        assert device.items["hello"].attempt == 1


@pytest.mark.asyncio
async def test_one_device_is_cancelled(new_fleet, behaviours):
    async with new_fleet() as fleet:
        operator = fleet.operator
        slow, good = await fleet.device("a", behaviour=behaviours["silent"]), await fleet.device("b")
        view = await operator.deploy(await operator.publish("1.0.0"), waves="100%")
        await slow.until(lambda device: device.items)
        view = await operator.follow(view, lambda view: view.counts.get("succeeded") == 1)
        view = await act(operator, view, "cancel-device", operator_api.CancelRequest(device=slow.id))
        view = await operator.decided(view)
        assert (view.state, of(view, slow).outcome) == (RolloutState.SUCCEEDED, Outcome.NOT_AFFECTED)
        await slow.until(lambda device: not device.items)
        assert good.items


@pytest.mark.asyncio
async def test_a_device_that_joins_after_a_rollout_gets_what_the_group_runs(new_fleet):
    async with new_fleet() as fleet:
        operator, _ = fleet.operator, await fleet.device("a")
        target = await operator.publish("1.0.0")
        view = await operator.decided(await operator.deploy(target))
        late = await fleet.device("late")
        await late.until(lambda device: device.items)
        view = await operator.follow(view, lambda view: view.counts == {"succeeded": 2})
        assert (late.items["hello"].target, of(view, late).wave) == (target, 1)


@pytest.mark.asyncio
async def test_a_device_that_joined_under_an_earlier_version_keeps_what_it_runs(new_fleet):
    """Earlier versions assigned the settled value to devices that joined, and kept no progress of theirs."""
    async with new_fleet() as fleet:
        operator, _ = fleet.operator, await fleet.device("a")
        target = await operator.publish("1.0.0")
        view = await operator.decided(await operator.deploy(target))
        late = await fleet.device("late")
        await operator.follow(view, lambda view: view.counts == {"succeeded": 2})
        before = late.items["hello"]
        freeze = operator_api.FreezeRequest(group="edge", reason="upgrade")
        await operator.send(operator_api.Freezes, "POST", "/v1/freeze", freeze)
        await late.disconnect(politely=True)
        await fleet.stop()
        with sqlite3.connect(fleet.home / "server" / "fleet.db") as db:
            db.execute("DELETE FROM rollout_devices WHERE device = ?", (late.id,))
        await fleet.start()
        await late.connect()
        await operator.follow(view, lambda view: len(view.devices) == 2)
        await operator.send(operator_api.Freezes, "POST", "/v1/unfreeze", operator_api.UnfreezeRequest(group="edge"))
        await operator.follow(view, lambda view: view.counts == {"succeeded": 2})
        assert [item for assignment in late.accepted for item in assignment.items or [None]] == [before]


@pytest.mark.asyncio
async def test_a_rollout_that_begins_later_takes_the_place_of_an_open_one_and_goes_back_to_what_was_settled_then(
    new_fleet, behaviours
):
    async with new_fleet() as fleet:
        operator, device = fleet.operator, await fleet.device("a")
        one, two, three = [await operator.publish(version) for version in ("1.0.0", "2.0.0", "3.0.0")]
        later = await operator.deploy(three, starts_at=datetime.now(UTC) + timedelta(days=1))
        await operator.decided(await operator.deploy(one))
        device.behaviour = behaviours["silent"]
        open_still = await operator.deploy(two)
        await device.until(lambda device: device.items["hello"].target == two)
        device.behaviour = behaviours["good"]
        controller = fleet.server._conductor
        clock = controller._clock
        controller._clock = lambda: clock() + timedelta(days=2)
        controller._witness = replace(controller._witness, utc=controller._now())
        controller.wake()
        later = await operator.follow(later, lambda view: view.state is RolloutState.SUCCEEDED)
        assert (await shown(operator, open_still)).state is RolloutState.SUPERSEDED
        await device.until(lambda device: device.items["hello"].target == three)
        undo = operator_api.UndoRequest(rollout=str(later.number))
        assert (await operator.send(operator_api.RolloutView, "POST", "/v1/undo", undo)).target == one


@pytest.mark.asyncio
async def test_a_rollout_that_is_paused_before_its_time_begins_when_it_is_resumed(new_fleet):
    async with new_fleet() as fleet:
        operator, device = fleet.operator, await fleet.device("a")
        target = await operator.publish("1.0.0")
        later = await operator.deploy(target, starts_at=datetime.now(UTC) + timedelta(days=1))
        path = f"/v1/rollouts/{later.number}"
        await operator.send(operator_api.RolloutView, "POST", f"{path}/pause")
        controller = fleet.server._conductor
        clock = controller._clock
        controller._clock = lambda: clock() + timedelta(days=2)
        controller._witness = replace(controller._witness, utc=controller._now())
        await controller.step()
        view = await shown(operator, later)
        assert (view.state, view.causes) == (RolloutState.SCHEDULED, (PauseCause.OPERATOR,))
        assert not device.items
        await operator.send(operator_api.RolloutView, "POST", f"{path}/resume")
        assert (await operator.follow(view, lambda view: view.state is RolloutState.SUCCEEDED)).counts == {
            "succeeded": 1
        }


@pytest.mark.asyncio
async def test_a_rollout_that_begins_later_settles_for_an_empty_group_where_it_may(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        await operator.token("edge")
        target = await operator.publish("1.0.0")
        view = await operator.deploy(target, starts_at=datetime.now(UTC), allow_empty=True)
        view = await operator.follow(view, lambda view: view.state is not RolloutState.SCHEDULED)
        assert (view.state, view.reason) == (RolloutState.SUCCEEDED, "the group has no devices")
        (group,) = (await operator.get(operator_api.Groups, "/v1/groups")).groups
        assert [each.target for each in group.settled] == [target]

"""Rollouts beside each other, and what holds one back: freezes, approvals, the budget of a site, catch-up queues."""

from datetime import UTC, datetime, timedelta

import pytest

from fleet.protocol import operator_api
from fleet.protocol.codes import Outcome, PauseCause, Phase, RolloutState
from fleet.protocol.operator_api import GroupPlan, PlanBudget, PlanStage


async def approve(operator, view, headers):
    """Approve a rollout as the operator of a token; return the status."""
    return (await operator.http.post(f"/v1/rollouts/{view.number}/approve", headers=headers)).status_code


def say(device, instance, *phases):
    """Have a silent device report of an instance."""
    for phase in phases:
        device._say(device.report(device.items[instance], phase), device.accepted[-1])


# -- approval before anything is offered -------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_nothing_is_offered_before_the_approval_that_the_plan_wants_first(new_fleet):
    async with new_fleet() as fleet:
        operator, device = fleet.operator, await fleet.device("a")
        target = await operator.publish("1.0.0")
        await operator.set_plan(GroupPlan(approval=True))
        bob = await operator.another()
        view = await operator.deploy(target)
        view = await operator.follow(view, lambda view: view.state is RolloutState.PAUSED)
        assert (view.causes, view.wave) == ((PauseCause.APPROVAL,), 0)
        assert view.reason == "nothing is offered before the approval of a second person"
        assert {each.outcome for each in view.devices} == {Outcome.PENDING}
        waiting = (await operator.get(operator_api.Status, "/v1/status")).waiting
        assert any(f"somebody other than admin: fleet rollout approve {view.number}" in each for each in waiting)
        assert (await operator.problem("POST", f"/v1/rollouts/{view.number}/resume")).type == "approval"
        assert await approve(operator, view, {}) == 403
        assert not device.accepted
        assert await approve(operator, view, bob) == 200
        assert (await operator.decided(view)).state is RolloutState.SUCCEEDED
        undo = await operator.send(operator_api.RolloutView, "POST", "/v1/undo", operator_api.UndoRequest())
        assert (await operator.decided(undo)).state is RolloutState.SUCCEEDED


@pytest.mark.asyncio
async def test_an_approval_before_the_time_of_a_scheduled_rollout_lets_it_begin(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        await fleet.device("a")
        target = await operator.publish("1.0.0")
        await operator.set_plan(GroupPlan(approval=True))
        bob = await operator.another()
        later = datetime.now(UTC) + timedelta(days=1)
        view = await operator.deploy(target, starts_at=later)
        waiting = (await operator.get(operator_api.Status, "/v1/status")).waiting
        said = f"scheduled: {view.reason}; somebody other than admin: fleet rollout approve {view.number}"
        assert any(each.endswith(said) for each in waiting), waiting
        assert view.reason == "it wants the approval of a second person"
        assert await approve(operator, view, {}) == 403
        assert await approve(operator, view, bob) == 200
        assert not (await operator.get(operator_api.Status, "/v1/status")).waiting
        assert (await operator.get(operator_api.RolloutView, f"/v1/rollouts/{view.id}")).state is RolloutState.SCHEDULED
        fleet.pass_time(later)
        await operator.follow(view, lambda view: view.state is RolloutState.SUCCEEDED)


@pytest.mark.asyncio
async def test_an_empty_group_does_not_settle_what_nobody_approved(new_fleet):
    async with new_fleet() as fleet:
        operator, device = fleet.operator, await fleet.device("a")
        target = await operator.publish("1.0.0")
        await operator.set_plan(GroupPlan(approval=True))
        change = operator_api.GroupRequest(remove=(device.id,))
        await operator.send(operator_api.GroupRow, "PUT", "/v1/groups/edge", change)
        view = await operator.deploy(target, allow_empty=True)
        assert (view.state, "the plan wants an approval" in view.reason) == (RolloutState.REFUSED, True), view.reason


# -- freezes -----------------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_freeze_holds_a_scheduled_rollout_back_and_its_members_are_those_of_its_beginning(new_fleet):
    async with new_fleet() as fleet:
        operator, device = fleet.operator, await fleet.device("a")
        target = await operator.publish("1.0.0")
        later = datetime.now(UTC) + timedelta(days=1)
        view = await operator.deploy(target, starts_at=later)
        freeze = operator_api.FreezeRequest(group="edge", reason="trade fair")
        await operator.send(operator_api.Freezes, "POST", "/v1/freeze", freeze)
        fleet.pass_time(later)
        view = await operator.follow(view, lambda view: view.reason == "frozen: trade fair")
        assert (view.state, view.causes, view.devices) == (RolloutState.SCHEDULED, (), ())
        late = await fleet.device("late")
        await operator.send(operator_api.Freezes, "POST", "/v1/unfreeze", operator_api.UnfreezeRequest(group="edge"))
        view = await operator.follow(view, lambda view: view.state is RolloutState.SUCCEEDED)
        assert (view.counts, view.reason) == ({"succeeded": 2}, "")
        assert {each.device for each in view.devices} == {device.id, late.id}


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_rollout_that_cannot_begin_holds_up_no_other_one(new_fleet, caplog):
    async with new_fleet() as fleet:
        operator, device = fleet.operator, await fleet.device("a")
        one, two = await operator.publish("1.0.0"), await operator.publish("1.0.0", name="other")
        tomorrow = datetime.now(UTC) + timedelta(days=1)
        broken = await operator.deploy(one, where="site=berlin", starts_at=tomorrow)
        # as a server leaves it that reads selectors which this one does not
        plan = "json_set(plan, '$.where', 'site ~ berlin', '$.starts_at', 0)"
        fleet.server._store._db.run(f"UPDATE rollouts SET plan = {plan} WHERE number = ?", broken.number)
        view = await operator.deploy(two, instance="other", starts_at=datetime.now(UTC))
        await operator.follow(view, lambda view: view.state is RolloutState.SUCCEEDED)
        assert device.items["other"].target == two
        assert f"a round of the rollout loop failed over rollout {broken.number}" in caplog.text
        view = await operator.get(operator_api.RolloutView, f"/v1/rollouts/{broken.id}")
        assert view.state is RolloutState.SCHEDULED


# -- catch-up queues ---------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_who_waits_in_a_queue_is_superseded_when_another_value_takes_its_place(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        await fleet.device("a"), await fleet.device("b")
        away = await fleet.enrol("away")
        first = await operator.decided(await operator.deploy(await operator.publish("1.0.0")))
        assert first.counts == {"succeeded": 2, "pending": 1}
        second = await operator.decided(await operator.deploy(await operator.publish("2.0.0")))
        first = await operator.follow(first, lambda view: "pending" not in view.counts)
        assert first.counts == {"succeeded": 2, "superseded": 1}
        (said,) = [each.reason for each in first.devices if each.device == away.id]
        assert said == "another value took its place"
        await away.connect()
        second = await operator.follow(second, lambda view: view.counts == {"succeeded": 3})
        assert [item.target for each in away.accepted for item in each.items] == [second.target]


@pytest.mark.asyncio
async def test_a_new_rollout_closes_the_queue_of_the_one_before_and_its_end_opens_it(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        await fleet.device("a"), await fleet.device("b")
        away = await fleet.enrol("away")
        first = await operator.decided(await operator.deploy(await operator.publish("1.0.0")))
        second = await operator.deploy(await operator.publish("2.0.0"), waves="1, 100%", soak_s=3600)
        second = await operator.follow(second, lambda view: view.counts.get("succeeded") == 1)
        await away.connect()
        said = f"the catch-up queue is closed: rollout {second.number} is running; in it: {away.id}"
        first = await operator.follow(first, lambda view: view.reason == said)
        assert (away.accepted, first.queue_closed, first.counts["pending"]) == ([], "", 1)
        await operator.send(operator_api.RolloutView, "POST", f"/v1/rollouts/{second.number}/abort")
        first = await operator.follow(first, lambda view: view.counts == {"succeeded": 3})
        assert away.items["hello"].target == first.target


# -- the budget of a site ----------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_rollouts_of_two_instances_share_the_budget_of_a_site(new_fleet, behaviours):
    async with new_fleet() as fleet:
        operator = fleet.operator
        devices = {device.id: device for device in [await fleet.device(name) for name in ("a", "b", "c")]}
        for device in devices.values():
            device.behaviour = behaviours["silent"]
            await operator.label(device, site="berlin")
        hello, other = await operator.publish("1.0.0"), await operator.publish("1.0.0", name="other")
        await operator.set_plan(GroupPlan(budget=PlanBudget(by="site", min_available=2), stages=(PlanStage(),)))
        first = await operator.deploy(hello)
        first = await operator.follow(first, lambda view: view.counts == {"waiting": 1, "pending": 2})
        (busy,) = [each.device for each in first.devices if each.outcome is Outcome.WAITING]
        second = await operator.deploy(other, instance="other")
        # the one that is unavailable already costs the site nothing: it alone is offered the second instance
        second = await operator.follow(second, lambda view: view.counts == {"waiting": 1, "pending": 2})
        assert [each.device for each in second.devices if each.outcome is Outcome.WAITING] == [busy]
        await devices[busy].until(lambda device: {"hello", "other"} <= device.items.keys())
        say(devices[busy], "hello", Phase.COMMITTED)
        first = await operator.follow(first, lambda view: view.counts.get("succeeded") == 1)
        taken = {each.device for view in (first, second) for each in view.devices if each.outcome is Outcome.WAITING}
        assert taken == {busy}, "the site has two devices left, and no third may be taken"
        say(devices[busy], "other", Phase.COMMITTED)
        second = await operator.follow(second, lambda view: view.counts.get("succeeded") == 1)
        first = await operator.follow(first, lambda view: view.counts.get("waiting") == 1)
        second = await operator.get(operator_api.RolloutView, f"/v1/rollouts/{second.id}")
        taken = {each.device for view in (first, second) for each in view.devices if each.outcome is Outcome.WAITING}
        assert len(taken) == 1

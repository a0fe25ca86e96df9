"""Plan of a group on a whole server: rollouts take its values unless a request names others, which admins may."""

from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from fleet.protocol import operator_api
from fleet.protocol.codes import OnBreach, PauseCause, Phase, RejectCode, RolloutState
from fleet.protocol.operator_api import GroupPlan, GroupPolicy, GroupPolicyRequest, PlanBudget, PlanLimits, PlanStage
from fleet.protocol.trust_api import Role

PATH = "/v1/groups/edge/policy"


async def audit(operator, act):
    entries = (await operator.get(operator_api.Audit, "/v1/audit")).entries
    return [(each.actor, each.subject, each.detail) for each in entries if each.act == act]


@pytest.mark.asyncio
async def test_a_plan_is_set_shown_tried_and_cleared(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        canary, _ = await fleet.device("a"), await fleet.device("b")
        await operator.label(canary, ring="canary")
        plan = GroupPlan(stages=(PlanStage(select={"ring": "canary"}, approval=True), PlanStage()))
        tried = await operator.set_plan(plan, dry_run=True)
        assert [(each.text, each.devices, each.approval) for each in tried.stages] == [
            ("ring=canary: 100%", 1, True),
            ("100%", 1, False),
        ]
        assert (await operator.get(GroupPolicy, PATH)).plan is None
        assert await operator.set_plan(plan) == tried == await operator.get(GroupPolicy, PATH)
        (group,) = (await operator.get(operator_api.Groups, "/v1/groups")).groups
        assert group.planned
        ((by, subject, detail),) = await audit(operator, "group-policy")
        assert (by, subject, '"ring":"canary"' in detail) == ("admin", "edge", True)
        assert (await operator.set_plan(None)).plan is None
        assert await operator.get(GroupPolicy, PATH) == GroupPolicy(group="edge")


@pytest.mark.asyncio
async def test_a_plan_that_cannot_be_meant_and_one_for_no_group_are_refused(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        await fleet.device("a")
        bad = GroupPolicyRequest(plan=GroupPlan(stages=(PlanStage(size="1"),)))
        problem = await operator.problem("PUT", PATH, bad)
        assert (problem.status, problem.type, problem.title[:14]) == (400, "bad-plan", "stages[1].size")
        problem = await operator.problem("PUT", PATH, b'{"plan":{"soka":1}}')
        assert (problem.status, "soka" in problem.title + problem.detail) == (400, True)
        for method in ("GET", "PUT"):
            body = None if method == "GET" else GroupPolicyRequest()
            assert (await operator.problem(method, "/v1/groups/nowhere/policy", body)).type == "unknown-group"
        operator.http.headers.update(await operator.another())
        assert (await operator.problem("PUT", PATH, GroupPolicyRequest())).status == 403


@pytest.mark.asyncio
async def test_a_rollout_takes_what_the_plan_says_and_an_explicit_value_wins(new_fleet, behaviours):
    async with new_fleet() as fleet:
        operator = fleet.operator
        devices = [await fleet.device(name) for name in "abcd"]
        await operator.label(devices[2], ring="canary")
        one, two, three = [await operator.publish(f"{number}.0.0") for number in (1, 2, 3)]
        limits = PlanLimits(on_breach=OnBreach.PAUSE)
        stages = (PlanStage(select={"ring": "canary"}, size="1"), PlanStage(size="2", soak_s=3600), PlanStage())
        await operator.set_plan(GroupPlan(limits=limits, stages=stages))
        view = await operator.deploy(one)
        view = await operator.follow(view, lambda view: view.counts == {"succeeded": 3, "pending": 1})
        assert [(each.text, each.devices) for each in view.waves] == [("ring=canary: 1", 1), ("2", 2), ("100%", 1)]
        assert {each.device: each.wave for each in view.devices}[devices[2].id] == 1
        for device in devices:
            device.behaviour = behaviours["trapping"]
        view = await operator.deploy(two)
        view = await operator.follow(view, lambda view: view.state is RolloutState.PAUSED)
        assert view.causes == (PauseCause.BREACH,)
        view = await operator.decided(await operator.deploy(three, waves="100%", on_breach="rollback"))
        assert (view.state, len(view.waves)) == (RolloutState.REVERTED, 1)
        assert await audit(operator, "plan-override") == [
            ("admin", view.id, "instead of the plan of edge: waves, on_breach")
        ]


@pytest.mark.asyncio
async def test_an_operator_who_is_no_admin_keeps_to_the_plan(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        await fleet.device("a")
        one = await operator.publish("1.0.0")
        await operator.set_plan(GroupPlan(soak_s=0, limits=PlanLimits(failures="0"), stages=(PlanStage(),)))
        operator.http.headers.update(await operator.another())
        wish = operator_api.RolloutRequest(instance="hello", target=one, group="edge", waves="1, 100%", failures=3)
        problem = await operator.problem("POST", "/v1/rollouts", wish)
        assert (problem.status, problem.type) == (403, "plan")
        assert "sets waves, failures, and bob is not an admin" in problem.title
        assert "fleet group policy edge" in problem.action
        same = await operator.deploy(one, failures=0, soak_s=0, timeout_s=60)
        assert (await operator.decided(same)).state is RolloutState.SUCCEEDED
        assert await audit(operator, "plan-override") == []


@pytest.mark.asyncio
async def test_the_budget_of_a_site_holds_for_an_undo_and_the_stages_do_not(new_fleet, behaviours):
    async with new_fleet() as fleet:
        operator = fleet.operator
        devices = [await fleet.device(name) for name in "ab"]
        for device in devices:
            await operator.label(device, site="berlin")
        one, two, three = [await operator.publish(f"{number}.0.0") for number in (1, 2, 3)]
        for target in (one, two):
            await operator.decided(await operator.deploy(target))
        budget = PlanBudget(by="site", min_available=1)
        await operator.set_plan(GroupPlan(soak_s=0, budget=budget, stages=(PlanStage(),)))
        view = await operator.send(operator_api.RolloutView, "POST", "/v1/undo", operator_api.UndoRequest(group="edge"))
        view = await operator.decided(view)
        assert (view.state, [each.text for each in view.waves]) == (RolloutState.SUCCEEDED, ["1", "100%"])
        view = await operator.decided(await operator.deploy(three))
        assert (view.state, [each.text for each in view.waves]) == (RolloutState.SUCCEEDED, ["100%"])
        for device in devices:
            device.behaviour = behaviours["silent"]
        undo = operator_api.UndoRequest(group="edge", waves="100%")
        view = await operator.send(operator_api.RolloutView, "POST", "/v1/undo", undo)
        view = await operator.follow(view, lambda view: view.counts == {"waiting": 1, "pending": 1})
        assert [each.text for each in view.waves] == ["100%"]


@pytest.mark.asyncio
async def test_a_device_that_joins_counts_in_the_budget_of_its_site(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        first = await fleet.device("a")
        await operator.label(first, site="berlin")
        await operator.set_plan(GroupPlan(budget=PlanBudget(by="site", min_available=1), stages=(PlanStage(),)))
        one = await operator.publish("1.0.0")
        view = await operator.deploy(one)
        view = await operator.follow(view, lambda view: bool(view.reason))
        assert view.counts == {"pending": 1}, "the site has no device to spare"
        later = await fleet.device("b", group="other")
        await operator.label(later, site="berlin")
        await operator.send(operator_api.GroupRow, "PUT", "/v1/groups/edge", operator_api.GroupRequest(add=(later.id,)))
        view = await operator.decided(view)
        assert (view.state, view.counts) == (RolloutState.SUCCEEDED, {"succeeded": 2})


# -- approval ----------------------------------------------------------------------------------------------------------

CANARY = PlanStage(select={"ring": "canary"}, approval=True)


async def act(operator, view, verb, token=None):
    return await operator.http.post(f"/v1/rollouts/{view.number}/{verb}", headers=token)


async def waiting_for_approval(fleet, **more):
    """A rollout whose canary has succeeded, at the gate that wants an approval; the canary and the other device."""
    operator = fleet.operator
    canary, other = await fleet.device("a"), await fleet.device("b")
    await operator.label(canary, ring="canary")
    await operator.set_plan(GroupPlan(stages=(CANARY, PlanStage())))
    one = await operator.publish("1.0.0")
    view = await operator.deploy(one, **more)
    return canary, other, await operator.follow(view, lambda view: view.state is RolloutState.PAUSED)


@pytest.mark.asyncio
async def test_a_stage_waits_for_the_approval_of_somebody_else(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        canary, other, view = await waiting_for_approval(fleet)
        assert (view.causes, view.counts) == ((PauseCause.APPROVAL,), {"succeeded": 1, "pending": 1})
        assert view.reason == "wave 1 is done and wants the approval of a second person"
        (said,) = (await operator.get(operator_api.Status, "/v1/status")).waiting
        assert said.endswith(f"{view.reason}; somebody other than admin: fleet rollout approve {view.number}")
        bob, eve = await operator.another(), await operator.another("eve", Role.VIEWER)
        own = await act(operator, view, "approve")
        assert (own.status_code, "admin began rollout" in own.text) == (403, True)
        assert (await act(operator, view, "approve", eve)).status_code == 403
        assert (await act(operator, view, "resume", bob)).status_code == 409
        assert not other.items
        assert (await act(operator, view, "approve", bob)).is_success
        view = await operator.decided(view)
        assert (view.state, view.counts) == (RolloutState.SUCCEEDED, {"succeeded": 2})
        assert await audit(operator, "rollout-approve") == [("bob", view.id, "")]
        assert canary.items.keys() == other.items.keys() == {"hello"}


@pytest.mark.asyncio
async def test_a_canary_that_fails_while_its_stage_waits_for_an_approval_takes_the_version_back(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        canary, other, view = await waiting_for_approval(fleet)
        canary.sequence += 1
        (item,) = canary.items.values()
        failed = canary.report(item, Phase.ROLLED_BACK, code=RejectCode.TRAPPED, message="it trapped")
        canary._say(failed, canary.accepted[-1])
        view = await operator.decided(view)
        assert (view.state, other.items) == (RolloutState.REVERTED, {})
        late = await act(operator, view, "approve", await operator.another())
        assert (late.status_code, "is over" in late.text) == (409, True)


@pytest.mark.asyncio
async def test_who_retries_a_rollout_is_the_one_who_asked(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        _, _, view = await waiting_for_approval(fleet)
        bob = await operator.another()
        await operator.send(
            operator_api.RolloutView, "POST", f"/v1/rollouts/{view.number}/abort", operator_api.AbortRequest()
        )
        again = operator_api.RolloutView
        reply = await act(operator, view, "retry", bob)
        assert reply.is_success, reply.text
        view = msgspec.json.decode(reply.content, type=again)
        view = await operator.follow(view, lambda view: PauseCause.APPROVAL in view.causes)
        assert (view.by, (await act(operator, view, "approve", bob)).status_code) == ("bob", 403)
        assert (await act(operator, view, "approve")).is_success
        assert (await operator.decided(view)).state is RolloutState.SUCCEEDED


@pytest.mark.asyncio
async def test_a_retry_goes_by_the_plan_that_the_group_has_by_now(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        device = await fleet.device("a")
        await operator.label(device, ring="canary")
        at = {"starts_at": datetime.now(UTC) + timedelta(days=1)}
        view = await operator.deploy(await operator.publish("1.0.0"), **at)
        assert (await act(operator, view, "abort")).is_success
        await operator.set_plan(GroupPlan(stages=(CANARY, PlanStage())))
        reply = await act(operator, view, "retry")
        assert reply.is_success, reply.text
        view = msgspec.json.decode(reply.content, type=operator_api.RolloutView)
        view = await operator.follow(view, lambda view: view.state is not RolloutState.RUNNING)
        assert (view.state, view.causes) == (RolloutState.PAUSED, (PauseCause.APPROVAL,))


@pytest.mark.asyncio
async def test_an_approval_holds_over_a_restart_of_the_server(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        _, other, view = await waiting_for_approval(fleet)
        await fleet.stop()
        await fleet.start()
        view = await operator.get(operator_api.RolloutView, f"/v1/rollouts/{view.number}")
        assert (view.state, view.causes, other.items) == (RolloutState.PAUSED, (PauseCause.APPROVAL,), {})
        assert (await act(operator, view, "approve", await operator.another())).is_success
        assert (await operator.decided(view)).state is RolloutState.SUCCEEDED


@pytest.mark.asyncio
async def test_who_empties_a_group_does_not_get_round_its_approval(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        device = await fleet.device("a")
        await operator.label(device, ring="canary")
        await operator.set_plan(GroupPlan(stages=(CANARY, PlanStage())))
        one = await operator.publish("1.0.0")
        operator.http.headers.update(await operator.another())
        leave = operator_api.GroupRequest(remove=(device.id,))
        await operator.send(operator_api.GroupRow, "PUT", "/v1/groups/edge", leave)
        view = await operator.deploy(one, allow_empty=True)
        assert view.state is RolloutState.REFUSED
        assert view.reason.startswith("the group has no devices; the stage ring=canary: 100% wants an approval, and")
        (group,) = (await operator.get(operator_api.Groups, "/v1/groups")).groups
        assert group.settled == ()


@pytest.mark.asyncio
async def test_a_dry_run_tells_which_approvals_the_plan_wants(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        await operator.label(await fleet.device("a"), ring="canary")
        await fleet.device("b")
        wish = operator_api.RolloutRequest(instance="hello", target=await operator.publish("1.0.0"), group="edge")
        for plan, told in (
            (GroupPlan(approval=True), ("nothing is offered before the approval of a second person",)),
            (
                GroupPlan(stages=(CANARY, PlanStage())),
                ("wave 1 wants the approval of a second person once it is done",),
            ),
            (GroupPlan(soak_s=1), ()),
        ):
            await operator.set_plan(plan)
            foreseen = await operator.send(operator_api.Preflight, "POST", "/v1/preflight", wish)
            assert foreseen.warnings == told


@pytest.mark.asyncio
async def test_a_group_cut_to_its_canary_waits_for_the_approval_of_a_later_stage(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        await operator.label(await fleet.device("a"), ring="canary")
        beta = PlanStage(select={"ring": "beta"}, approval=True)
        await operator.set_plan(GroupPlan(stages=(PlanStage(select={"ring": "canary"}), beta, PlanStage())))
        view = await operator.deploy(await operator.publish("1.0.0"))
        view = await operator.follow(view, lambda view: view.state is not RolloutState.RUNNING)
        assert (view.state, view.causes) == (RolloutState.PAUSED, (PauseCause.APPROVAL,))
        assert (await act(operator, view, "approve", await operator.another())).is_success
        assert (await operator.decided(view)).state is RolloutState.SUCCEEDED


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.asyncio
async def test_a_rollout_that_could_ask_for_no_approval_is_refused(new_fleet, scheduled):
    async with new_fleet() as fleet:
        operator = fleet.operator
        device = await fleet.device("a")
        await operator.set_plan(GroupPlan(stages=(CANARY, PlanStage())))
        one = await operator.publish("1.0.0")
        at = {"starts_at": datetime.now(UTC)} if scheduled else {}
        view = await operator.deploy(one, allow_empty=True, **at)
        view = await operator.follow(view, lambda view: view.state is RolloutState.REFUSED)
        assert view.reason == (
            "the stage ring=canary: 100% wants an approval, and takes no device that the change concerns"
        )
        assert not device.items

"""Rollouts in awkward company: withdrawals, cancels, groups and pins that meet --where, approvals and schedules."""

from datetime import UTC, datetime, timedelta

import pytest

from fleet.protocol import operator_api
from fleet.protocol.codes import Outcome, RolloutState
from fleet.protocol.operator_api import GroupPlan


async def sited(fleet, *names):
    """Return a device at each site, which is named as the device is."""
    devices = [await fleet.device(name) for name in names]
    for name, device in zip(names, devices, strict=True):
        await fleet.operator.label(device, site=name)
    return devices


async def act(operator, view, verb, headers=None):
    return await operator.http.post(f"/v1/rollouts/{view.number}/{verb}", headers=headers)


async def is_in(operator, view, state):
    return await operator.follow(view, lambda view: view.state is state)


async def runs(device, target, instance="hello"):
    """Wait until a device is assigned a target; None for none under this name."""
    await device.until(lambda device: getattr(device.items.get(instance), "target", None) == target)


@pytest.mark.asyncio
async def test_a_withdrawn_release_ends_rollouts_that_have_offered_nothing_yet(new_fleet):
    async with new_fleet() as fleet:
        operator, device = fleet.operator, await fleet.device("a")
        one, two = await operator.publish("1.0.0"), await operator.publish("1.0.0", name="other")
        await operator.set_plan(GroupPlan(approval=True))
        unapproved = await is_in(operator, await operator.deploy(one), RolloutState.PAUSED)
        later = datetime.now(UTC) + timedelta(days=1)
        scheduled = await operator.deploy(two, instance="other", starts_at=later)
        headers = await operator.another()
        assert (await act(operator, scheduled, "approve", headers)).status_code == 200
        again = await act(operator, scheduled, "approve", headers)
        assert (again.status_code, again.json()["type"]) == (409, "approval")
        await operator.revoke("1.0.0")
        await operator.revoke("1.0.0", name="other")
        for view in (unapproved, scheduled):
            await is_in(operator, view, RolloutState.REVOKED)
            assert (await act(operator, view, "approve", headers)).json()["type"] == "rollout-over"
        assert not device.accepted


@pytest.mark.asyncio
async def test_pauses_for_several_causes_each_end_by_their_own_act(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        await fleet.device("a")
        target = await operator.publish("1.0.0")
        await operator.set_plan(GroupPlan(approval=True))
        headers = await operator.another()
        view = await is_in(operator, await operator.deploy(target), RolloutState.PAUSED)
        freeze = operator_api.FreezeRequest(group="edge", reason="fair")
        await operator.send(operator_api.Freezes, "POST", "/v1/freeze", freeze)
        assert (await act(operator, view, "pause")).status_code == 200
        assert (await act(operator, view, "approve", headers)).status_code == 200
        view = await operator.follow(view, lambda view: set(view.causes) == {"operator", "freeze"})
        await operator.send(operator_api.Freezes, "POST", "/v1/unfreeze", operator_api.UnfreezeRequest(group="edge"))
        view = await operator.follow(view, lambda view: set(view.causes) == {"operator"})
        assert view.wave == 0
        assert (await act(operator, view, "resume")).status_code == 200
        assert (await operator.decided(view)).state is RolloutState.SUCCEEDED


@pytest.mark.asyncio
async def test_a_scheduled_rollout_has_no_devices_to_cancel_and_judges_where_at_its_beginning(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        berlin, paris = await sited(fleet, "berlin", "paris")
        target = await operator.publish("1.0.0")
        later = datetime.now(UTC) + timedelta(days=1)
        view = await operator.deploy(target, where="site=berlin", starts_at=later)
        cancel = operator_api.CancelRequest(device=berlin.id)
        problem = await operator.problem("POST", f"/v1/rollouts/{view.number}/cancel-device", cancel)
        assert (problem.status, problem.type) == (409, "not-begun")
        assert "over" not in problem.title
        await operator.label(paris, site="berlin")
        await operator.label(berlin, site="paris")
        fleet.pass_time(later)
        view = await is_in(operator, view, RolloutState.SUCCEEDED)
        assert {each.device: each.outcome for each in view.devices} == {
            berlin.id: Outcome.NOT_AFFECTED,
            paris.id: Outcome.SUCCEEDED,
        }
        assert not berlin.accepted


@pytest.mark.asyncio
async def test_where_takes_no_place_of_an_open_rollout_whose_devices_it_leaves_out(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        devices = await sited(fleet, "berlin", "paris")
        one, two = await operator.publish("1.0.0"), await operator.publish("2.0.0")
        first = await operator.deploy(one, waves="1, 100%", soak_s=3600)
        first = await operator.follow(first, lambda view: view.counts.get("succeeded") == 1)
        later = await operator.deploy(two, where="site=paris", starts_at=datetime.now(UTC) + timedelta(seconds=1))
        wish = operator_api.RolloutRequest(instance="hello", target=two, group="edge", where="site=paris")
        for path in ("/v1/rollouts", "/v1/preflight"):
            problem = await operator.problem("POST", path, wish)
            assert (problem.status, problem.type) == (409, "open-rollout")
        later = await is_in(operator, later, RolloutState.REFUSED)
        assert "also on devices that --where leaves out" in later.reason
        assert (await operator.get(operator_api.RolloutView, f"/v1/rollouts/{first.id}")).state is RolloutState.RUNNING
        assert {each.target for device in devices for item in device.accepted for each in item.items} == {one}


@pytest.mark.asyncio
async def test_who_was_left_out_follows_the_value_before_through_withdrawal_and_removal(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        berlin, paris = await sited(fleet, "berlin", "paris")
        one, two, three = [await operator.publish(f"{number}.0.0") for number in (1, 2, 3)]
        for target in (one, two):
            await operator.decided(await operator.deploy(target))
        await operator.decided(await operator.deploy(three, where="site=berlin"))
        assert (berlin.items["hello"].target, paris.items["hello"].target) == (three, two)
        await operator.revoke("2.0.0")
        await runs(paris, one)
        assert berlin.items["hello"].target == three
        await operator.revoke("1.0.0")
        await runs(paris, None)
        assert paris.accepted[-1].keep_data == ("hello",)
        removal = operator_api.RemovalRequest(instance="hello", group="edge")
        view = await operator.send(operator_api.RolloutView, "POST", "/v1/removals", removal)
        assert (await operator.decided(view)).state is RolloutState.SUCCEEDED
        await runs(berlin, None)


@pytest.mark.asyncio
async def test_pins_and_other_groups_stand_beside_where(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        berlin, paris = await sited(fleet, "berlin", "paris")
        one, two, three = [await operator.publish(f"{number}.0.0") for number in (1, 2, 3)]
        await operator.decided(await operator.deploy(one))
        pin = operator_api.RolloutRequest(instance="hello", target=two)
        view = await operator.send(operator_api.RolloutView, "PUT", f"/v1/devices/{berlin.id}/pin", pin)
        await operator.decided(view)
        refused = await operator.deploy(three, where="site=berlin")
        assert refused.state is RolloutState.REFUSED
        assert refused.reason.startswith("it concerns no device")
        # the other group has the higher priority, and supplies it wherever it wants it
        lab = operator_api.GroupRequest(add=(paris.id,), priority=5)
        await operator.send(operator_api.GroupRow, "PUT", "/v1/groups/lab", lab)
        await operator.decided(await operator.deploy(two, group="lab", where="site=paris"))
        await runs(paris, two)
        await operator.decided(
            await operator.deploy(three, group="lab", where="site=oslo or not site", allow_empty=True)
        )
        await operator.decided(await operator.deploy(one, group="lab", where="site=paris"))
        await runs(paris, one)
        unpinned = operator_api.InstanceRequest(instance="hello")
        await operator.send(operator_api.DeviceDetail, "POST", f"/v1/devices/{berlin.id}/unpin", unpinned)
        await runs(berlin, one)


@pytest.mark.asyncio
async def test_a_set_is_chosen_as_one_and_who_was_cancelled_is_reached_by_the_same_deploy(new_fleet, behaviours):
    async with new_fleet() as fleet:
        operator = fleet.operator
        berlin, paris = await sited(fleet, "berlin", "paris")
        hello, other = await operator.publish("1.0.0"), await operator.publish("1.0.0", name="other")
        view = await operator.decided(await operator.deploy(hello, also={"other": other}, where="not site=paris"))
        assert (view.state, len(view.together)) == (RolloutState.SUCCEEDED, 2)
        assert (sorted(berlin.items), paris.accepted) == (["hello", "other"], [])
        two = await operator.publish("2.0.0")
        paris.behaviour = behaviours["silent"]
        view = await operator.deploy(two, waves="100%", min_success="1")
        await runs(paris, two)
        cancel = operator_api.CancelRequest(device=paris.id)
        path = f"/v1/rollouts/{view.number}/cancel-device"
        view = await operator.decided(await operator.send(operator_api.RolloutView, "POST", path, cancel))
        assert view.state is RolloutState.SUCCEEDED
        await runs(paris, None)
        paris.behaviour = behaviours["good"]
        view = await operator.decided(await operator.deploy(two))
        assert (view.state, view.counts) == (RolloutState.SUCCEEDED, {"succeeded": 2})
        await runs(paris, two)


@pytest.mark.asyncio
async def test_hostile_selectors_are_refused_by_name_and_shown_without_their_signs(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        await sited(fleet, "berlin")
        target = await operator.publish("1.0.0")
        for where in (
            "site=" + "b" * 1500,
            "(" * 500,
            "not " * 400 + "site",
            "site in (" + "a," * 400,
            "\x00",
            "site=\u202e'",
        ):
            request = operator_api.RolloutRequest(instance="hello", target=target, group="edge", where=where)
            problem = await operator.problem("POST", "/v1/rollouts", request)
            assert (problem.status, problem.title[:14]) == (400, "where: column "), where
            reply = await operator.http.get("/v1/devices", params={"where": where})
            assert reply.status_code == 400, where
        for query in ("where=a&where=b", "where=%ff", "were=site"):
            assert (await operator.http.get(f"/v1/devices?{query}")).status_code == 400, query
        body = b'{"instance":"hello","target":"x","group":"edge","where":%s}'
        for value in (b"1e400", b"[]", b"9007199254740993", b'{"site":"berlin"}'):
            assert (await operator.problem("POST", "/v1/rollouts", body % value)).status == 400
        view = await operator.deploy(target, where="site != '\x1b[31mred\u202e\nROLLOUT 9 succeeded'")
        shown = await fleet.command("rollout", str(view.number))
        assert shown.code == 0
        assert not {"\x1b", "\u202e"} & set(shown.stdout)
        assert not any(line.startswith("ROLLOUT 9") for line in shown.stdout.splitlines())


@pytest.mark.asyncio
async def test_who_was_left_out_does_not_go_to_a_version_with_other_data(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        berlin, paris = await sited(fleet, "berlin", "paris")
        one = await operator.publish("1.0.0")
        two, three, four = [await operator.publish(f"{number}.0.0", data_schema=2) for number in (2, 3, 4)]
        for target in (one, two, three):
            await operator.decided(await operator.deploy(target))
        await operator.decided(await operator.deploy(four, where="site=berlin"))
        await operator.revoke("3.0.0")
        await runs(paris, two)
        await operator.revoke("2.0.0")
        await paris.until(lambda device: device.items.get("hello") is None or device.items["hello"].target != two)
        assert not paris.items, "1.0.0 has another schema"
        assert berlin.items["hello"].target == four


@pytest.mark.asyncio
async def test_an_undo_offers_nobody_a_version_that_where_kept_from_it(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        berlin, paris = await sited(fleet, "berlin", "paris")
        one, two, three = [await operator.publish(f"{number}.0.0") for number in (1, 2, 3)]
        await operator.decided(await operator.deploy(one))
        await operator.decided(await operator.deploy(two, where="site=berlin"))
        await operator.decided(await operator.deploy(three, where="site=paris"))
        problem = await operator.problem("POST", "/v1/undo", operator_api.UndoRequest())
        assert (problem.status, problem.type) == (409, "nothing-to-undo")
        assert problem.title == f"not all devices of rollout 3 had {two} before it: --where left out {paris.id}"
        assert (berlin.items["hello"].target, paris.items["hello"].target) == (two, three)
        await operator.decided(await operator.deploy(one, where="site=paris"))
        assert (berlin.items["hello"].target, paris.items["hello"].target) == (two, one)


@pytest.mark.asyncio
async def test_who_waits_in_a_queue_goes_on_waiting_there_when_where_leaves_it_out(new_fleet, behaviours):
    async with new_fleet() as fleet:
        operator = fleet.operator
        await sited(fleet, "berlin", "paris")
        away = [await fleet.device(f"away-{number}") for number in range(2)]
        for device in away:
            await operator.label(device, site="berlin")
        one, two, three = [await operator.publish(f"{number}.0.0") for number in (1, 2, 3)]
        await operator.decided(await operator.deploy(one))
        for device in away:
            await device.disconnect()
        view = await operator.deploy(two, where="site=berlin", waves="100%", min_success="1")
        view = await operator.decided(view)
        waits = {"succeeded": 1, "pending": 2, "not-affected": 1}
        assert view.counts == waits
        await operator.decided(await operator.deploy(three, where="site=paris"))
        view = await operator.get(operator_api.RolloutView, f"/v1/rollouts/{view.id}")
        assert view.counts == waits
        for device in away:
            device.behaviour = behaviours["silent"]
            await device.connect()
        view = await operator.follow(view, lambda view: "waiting" in view.counts)
        assert view.counts == waits | {"waiting": 1, "pending": 1}, "one at once"
        for device in away:
            await device.disconnect()
        view = await operator.deploy(three, where="site=berlin", waves="100%", min_success="1")
        assert (await operator.decided(view)).counts == waits
        view = await operator.get(operator_api.RolloutView, "/v1/rollouts/2")
        assert view.counts == {"succeeded": 1, "superseded": 2, "not-affected": 1}


@pytest.mark.asyncio
async def test_who_waits_beside_a_settled_value_for_a_withdrawn_release_is_superseded(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        _, _, away = await sited(fleet, "berlin", "paris", "away")
        one, two, three = [await operator.publish(f"{number}.0.0") for number in (1, 2, 3)]
        await operator.decided(await operator.deploy(one))
        await away.disconnect()
        view = await operator.deploy(two, where="not site=paris", waves="100%", min_success="1")
        await operator.decided(view)
        await operator.decided(await operator.deploy(three, where="site=paris"))
        await operator.revoke("2.0.0")
        view = await operator.follow(view, lambda view: "pending" not in view.counts)
        assert view.counts == {"succeeded": 1, "superseded": 1, "not-affected": 1}
        await away.connect()
        await runs(away, one)
        assert two not in {item.target for each in away.accepted for item in each.items}

"""A server made anew from a backup: devices ahead of it are not taken back silently, but named, and wait for a word."""

import asyncio

import pytest

from fleet.protocol import operator_api
from fleet.protocol.assignment import CheckIn
from fleet.protocol.codes import RolloutState
from fleet.protocol.manifest import ConfigKey
from fleet.store.store import Store


async def restored(fleet, *, devices=("a",), meanwhile=None):
    """Two versions were pushed after the backup from which the server is made anew; the devices are back."""
    operator = fleet.operator
    found = [await fleet.device(name) for name in devices]
    first = await operator.publish("1.0.0")
    await operator.decided(await operator.deploy(first, waves="100%"))
    newest = first

    async def push():
        nonlocal newest
        for number in (2, 3):
            newest = await operator.publish(f"{number}.0.0")
            await operator.decided(await operator.deploy(newest, waves="100%"))

    await made_anew(fleet, found, after=push, meanwhile=meanwhile)
    return found, first, newest


async def made_anew(fleet, found, *, after, meanwhile=None):
    """A backup, what comes `after` it, and the server made anew from it; the devices are back."""
    fleet.server._store.backup(fleet.directory / "backup.db")
    await after()
    for device in found:
        await device.disconnect()
    await fleet.stop()
    database = fleet.home / "server" / "fleet.db"
    for leftover in database.parent.glob("fleet.db-*"):
        leftover.unlink()
    (fleet.directory / "backup.db").replace(database)
    await fleet.start()
    if meanwhile is not None:
        await meanwhile(found)
    for device in found:
        await device.connect()
        await device.until(lambda device: any(isinstance(each.verb, CheckIn) for each in device.commands))


async def set_key(fleet, device, value):
    """Set a key of the device's own, and wait until the device has it."""
    request = operator_api.KeysRequest(instance="hello", keys={"level": value})
    await fleet.operator.send(operator_api.DeviceDetail, "PUT", f"/v1/devices/{device.id}/keys", request)
    await device.until(lambda device: device.items["hello"].config == {"level": value})


@pytest.mark.asyncio
async def test_adopting_takes_the_devices_own_keys_and_makes_no_pin_of_them(new_fleet):
    async with new_fleet() as fleet:
        operator, device = fleet.operator, await fleet.device("a")
        target = await operator.publish("1.0.0", config={"level": ConfigKey(default="info")})
        await operator.decided(await operator.deploy(target, waves="100%"))
        await set_key(fleet, device, "warn")
        await made_anew(fleet, [device], after=lambda: set_key(fleet, device, "debug"))
        assert await asyncio.to_thread(show, device) == 200
        assert (await reconcile(fleet, "adopt")).done
        detail = await operator.get(operator_api.DeviceDetail, f"/v1/devices/{device.id}")
        (item,) = detail.effective
        level = item.keys["level"]
        assert (item.source, level.value, level.source) == ("group edge", "debug", "device")
        await fleet.server._conductor.step()
        assert device.accepted[-1].version == 3, "nothing changes on the device"


def show(device):
    """Poll, and show the assignment as the server asks; the reply's status."""
    with device.http() as http:
        refusal = http.get("/v1/desired")
        assert (refusal.status_code, refusal.json()["type"]) == (409, "ahead")
        return http.post("/v1/assignment", content=device.accepted_envelope).status_code


def post(device, content):
    with device.http() as http:
        return http.post("/v1/assignment", content=content).status_code


async def reconcile(fleet, mode, *, selector="", dry_run=False):
    request = operator_api.ReconcileRequest(mode=mode, selector=selector, dry_run=dry_run)
    return await fleet.operator.send(operator_api.Reconciliation, "POST", "/v1/reconcile", request)


async def problems(fleet):
    status = await fleet.operator.get(operator_api.Status, "/v1/status")
    return [each for each in status.problems if "newer assignments than this server" in each]


@pytest.mark.asyncio
async def test_a_device_that_is_ahead_gets_nothing_and_is_named(new_fleet):
    async with new_fleet() as fleet:
        (device,), _, newest = await restored(fleet)
        before = len(device.envelopes)
        (named,) = await problems(fleet)
        assert device.id in named
        assert "fleet server reconcile" in named
        # neither what happens to it nor what is deployed brings it an assignment
        view = await fleet.operator.deploy(await fleet.operator.publish("4.0.0"))
        await fleet.operator.send(
            operator_api.DeviceDetail, "PUT", f"/v1/devices/{device.id}/labels",
            operator_api.LabelsRequest(labels={"site": "berlin"}),
        )  # fmt: skip
        await fleet.server._conductor.step()
        fleet.server.keep_up()
        assert fleet.server._director.reconcile(device.id, renew=True).version == 1
        view = await fleet.operator.get(operator_api.RolloutView, f"/v1/rollouts/{view.id}")
        assert view.state is RolloutState.RUNNING
        assert len(device.envelopes) == before
        assert device.items["hello"].target == newest
        # nothing is done before it has shown what it has, nor by a dry run
        (row,) = (await reconcile(fleet, "adopt")).devices
        assert (row.device, row.accepted, row.assigned, row.has) == (device.id, 3, 1, None)
        assert "has not shown" in row.obstacle
        (row,) = (await reconcile(fleet, "impose", dry_run=True)).devices
        assert row.obstacle == ""
        assert await problems(fleet)


@pytest.mark.asyncio
async def test_adopting_takes_what_the_device_runs_and_changes_nothing_there(new_fleet):
    async with new_fleet() as fleet:
        (device,), first, newest = await restored(fleet)
        assert await asyncio.to_thread(show, device) == 200
        plan = await reconcile(fleet, "adopt", dry_run=True)
        assert not plan.done
        (row,) = plan.devices
        assert (row.has, row.wants, row.obstacle) == ({"hello": newest}, {"hello": first}, "")
        assert (await reconcile(fleet, "adopt")).done
        assert await problems(fleet) == []
        await fleet.server._conductor.step()
        assert device.accepted[-1].version == 3
        detail = await fleet.operator.get(operator_api.DeviceDetail, f"/v1/devices/{device.id}")
        assert [(each.target, each.source) for each in detail.effective] == [(newest, "pin")]
        # from here on it is a device like any other: without its pin it follows its group
        await fleet.operator.send(
            operator_api.DeviceDetail, "POST", f"/v1/devices/{device.id}/unpin",
            operator_api.InstanceRequest(instance="hello"),
        )  # fmt: skip
        await device.until(lambda device: device.items["hello"].target == first)
        assert device.accepted[-1].version == 4


@pytest.mark.asyncio
async def test_imposing_signs_the_servers_state_above_the_devices_assignment(new_fleet):
    async with new_fleet() as fleet:
        (one, two), first, newest = await restored(fleet, devices=("a", "b"))
        done = await reconcile(fleet, "impose", selector=one.id)
        assert [each.device for each in done.devices] == [one.id]
        await one.until(lambda device: device.items["hello"].target == first)
        assert one.accepted[-1].version == 4
        assert two.items["hello"].target == newest
        (named,) = await problems(fleet)
        assert two.id in named
        assert one.id not in named
        acts = (await fleet.operator.get(operator_api.Audit, "/v1/audit")).entries
        assert ("reconcile", one.id, "impose: assignment 3 of the device") in [
            (each.act, each.subject, each.detail) for each in acts
        ]


@pytest.mark.asyncio
async def test_only_an_assignment_that_this_director_signed_for_the_device_is_shown(new_fleet):
    async with new_fleet() as fleet:
        (one, two), _, _ = await restored(fleet, devices=("a", "b"))
        forged = one.accepted_envelope.replace(b'"sig":"', b'"sig":"00')
        for content in (two.accepted_envelope, forged, b"{}", b""):
            assert await asyncio.to_thread(post, one, content) == 422
        (row, _) = (await reconcile(fleet, "adopt", dry_run=True)).devices
        assert row.has is None
        # one that is not ahead has nothing to show
        late = await fleet.device("late")
        assert await asyncio.to_thread(post, late, one.accepted_envelope) == 409


@pytest.mark.asyncio
async def test_a_selector_is_a_device_or_labels(new_fleet):
    async with new_fleet() as fleet:
        (one, two), _, _ = await restored(fleet, devices=("a", "b"))
        path = f"/v1/devices/{two.id}/labels"
        await fleet.operator.send(
            operator_api.DeviceDetail, "PUT", path, operator_api.LabelsRequest(labels={"site": "berlin"})
        )
        found = await reconcile(fleet, "impose", selector="site=berlin", dry_run=True)
        assert [each.device for each in found.devices] == [two.id]
        assert (await reconcile(fleet, "impose", selector="site=oslo", dry_run=True)).devices == ()
        for selector, kind in (("nobody", "unknown-device"), ("site=berlin,oslo", "bad-request")):
            request = operator_api.ReconcileRequest(mode="impose", selector=selector)
            assert (await fleet.operator.problem("POST", "/v1/reconcile", request)).type == kind
        # a device that is shut out is no longer ahead: revocations pass
        await fleet.operator.send(operator_api.DeviceDetail, "POST", f"/v1/devices/{two.id}/revoke")
        (named,) = await problems(fleet)
        assert two.id not in named
        assert one.id in named


@pytest.mark.asyncio
async def test_nothing_is_signed_for_a_device_before_it_has_said_what_it_has(new_fleet):
    """Two changes before the device is back would otherwise be newer than its assignment, and take it back."""
    async with new_fleet() as fleet:

        async def meanwhile(devices):
            (device,) = devices
            for number in (4, 5, 6):
                await fleet.operator.deploy(await fleet.operator.publish(f"{number}.0.0"))
                await fleet.server._conductor.step()
            assert fleet.server._store.delivery.assignment(device.id).version == 1
            # neither over HTTPS
            with device.http() as http:
                refusal = await asyncio.to_thread(http.get, "/v1/desired")
            assert refusal.json()["type"] == "ahead"
            status = await fleet.operator.get(operator_api.Status, "/v1/status")
            (named,) = [each for each in status.problems if "restored from a backup" in each]
            assert device.id in named
            (row,) = (await reconcile(fleet, "impose")).devices
            assert "said nothing since the restore" in row.obstacle

        (device,), _, newest = await restored(fleet, meanwhile=meanwhile)
        assert await problems(fleet)
        assert device.items["hello"].target == newest
        assert device.accepted[-1].version == 3


@pytest.mark.asyncio
async def test_a_device_that_is_not_ahead_goes_on_after_a_restore(new_fleet):
    async with new_fleet() as fleet:
        device = await fleet.device("a")
        first = await fleet.operator.publish("1.0.0")
        await fleet.operator.decided(await fleet.operator.deploy(first))
        await device.disconnect()
        await fleet.stop()
        # the backup is as new as the device
        store = Store.open(fleet.home / "server" / "fleet.db", fleet="test")
        store.mark_restored()
        store.close()
        await fleet.start()
        await device.connect()
        view = await fleet.operator.deploy(await fleet.operator.publish("2.0.0"))
        assert (await fleet.operator.decided(view)).state is RolloutState.SUCCEEDED
        assert await problems(fleet) == []
        # and one that enrolled after it needs no word
        late = await fleet.enrol("late")
        assert fleet.server._director.reconcile(late.id) is not None

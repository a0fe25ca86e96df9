"""Withdrawal of a release over a real server: what `fleet withdraw` foretells is what follows."""

import json
from datetime import UTC, datetime

import pytest

from fleet.protocol import operator_api
from fleet.protocol.codes import InstanceState, Outcome, RolloutState
from fleet.protocol.manifest import ConfigKey
from fleet.protocol.messages import Health, InstanceHealth
from fleet.protocol.names import TargetName
from fleet.protocol.topics import Up


async def say_health(fleet, device):
    """Have a device say what it runs, and wait until the server knows."""
    running = tuple(
        InstanceHealth(instance=name, target=item.target, generation=1, state=InstanceState.RUNNING)
        for name, item in device.items.items()
    )
    health = Health(device=device.id, boot_id="boot", at=datetime.now(UTC), instances=running)
    device.publish(Up.HEALTH, health)
    bell = fleet.server._conductor._watch
    await bell.until(lambda: fleet.server._store.devices.get(device.id).health, timeout_s=60)


def named(shown: dict) -> dict[str, str]:
    """The path of the target that each device goes to."""
    following = {each["device"]: each.get("next", "") for each in shown["devices"]}
    return {device: name and TargetName.parse(name, namespace="").path for device, name in following.items()}


async def foretold(fleet, target="hello@2.0.0"):
    done = await fleet.command("withdraw", target, "--dry-run", "--json")
    assert done.code == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.asyncio
async def test_what_becomes_of_each_device_is_told_before_and_comes_about(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        member, other = await fleet.device("member"), await fleet.device("other", group="lab")
        pinned = await fleet.device("pinned")
        one, two = await operator.publish("1.0.0"), await operator.publish("2.0.0")
        await operator.decided(await operator.deploy(one))
        pin = operator_api.RolloutRequest(instance="hello", target=two)
        view = await operator.send(operator_api.RolloutView, "PUT", f"/v1/devices/{pinned.id}/pin", pin)
        await operator.decided(view)
        await operator.decided(await operator.deploy(two))
        await operator.decided(await operator.deploy(two, group="lab"))
        devices = (member, other, pinned)
        for device in devices:
            await say_health(fleet, device)

        shown = await foretold(fleet)
        # the pin has no other value and goes: the group decides then
        assert named(shown) == {member.id: one, other.id: "", pinned.id: one}
        assert shown["running"] == sorted(device.id for device in devices)
        done = await fleet.command("withdraw", "hello@2.0.0", stdin="y\n")
        assert done.code == 0, done.stderr
        assert "3 devices run it." in done.stderr
        assert f"1 runs nothing in its place, and keeps its data: {other.id}" in done.stderr
        for device in (member, pinned):
            await device.until(lambda device: device.items["hello"].target == one)
        await other.until(lambda device: not device.items)
        assert other.accepted[-1].keep_data == ("hello",)
        assert named(await foretold(fleet, "hello@2.0.0"))[other.id] == ""


@pytest.mark.asyncio
async def test_rollouts_that_would_end_are_named_and_their_devices_go_back(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        devices = [await fleet.device("a"), await fleet.device("b")]
        one, two = await operator.publish("1.0.0"), await operator.publish("2.0.0")
        await operator.decided(await operator.deploy(one))
        view = await operator.deploy(two, soak_s=3600)
        view = await operator.follow(view, lambda view: view.counts.get("succeeded") == 1)
        (canary,) = [device for device in devices if device.items["hello"].target == two]

        shown = await foretold(fleet)
        assert (named(shown), shown["running"], shown["rollouts"]) == ({canary.id: one}, [], [view.number])
        assert (await fleet.command("withdraw", "hello@2.0.0", "--yes")).code == 0
        assert (await operator.decided(view)).state is RolloutState.REVOKED
        await canary.until(lambda device: device.items["hello"].target == one)


@pytest.mark.asyncio
async def test_a_device_whose_own_key_the_earlier_version_does_not_take_runs_nothing(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        plain, keyed = await fleet.device("plain"), await fleet.device("keyed")
        levels = [{"level": ConfigKey(enum=values, default=values[0])} for values in (("low", "high"), ("low", "top"))]
        one, two = [await operator.publish(f"{number}.0.0", config=of) for number, of in enumerate(levels, 1)]
        for target in (one, two):
            await operator.decided(await operator.deploy(target))
        assert (await fleet.command("device", "set", keyed.id, "hello", "level=top")).code == 0
        await keyed.until(lambda device: device.items["hello"].config == {"level": "top"})
        assert named(await foretold(fleet)) == {plain.id: one, keyed.id: ""}
        assert (await fleet.command("withdraw", "hello@2.0.0", "--yes")).code == 0
        await plain.until(lambda device: device.items["hello"].target == one)
        await keyed.until(lambda device: not device.items)


@pytest.mark.asyncio
async def test_a_rollout_whose_place_another_took_ends_with_it_when_that_one_is_withdrawn(new_fleet, behaviours):
    async with new_fleet() as fleet:
        operator = fleet.operator
        devices = [await fleet.device("a"), await fleet.device("b"), await fleet.device("c")]
        one, two, three = [await operator.publish(f"{number}.0.0") for number in (1, 2, 3)]
        await operator.decided(await operator.deploy(one))
        view = await operator.deploy(two, waves="2, 100%", soak_s=3600)
        await operator.follow(view, lambda view: view.counts.get("succeeded") == 2)
        for device in devices:
            device.behaviour = behaviours["silent"]
        view = await operator.deploy(three, waves="1, 100%")
        view = await operator.follow(view, lambda view: view.counts.get("waiting") == 1)
        (canary,) = [each.device for each in view.devices if each.outcome is Outcome.WAITING]
        after = fleet.server._conductor.foresee(three)
        rows = {row.id: row for row in fleet.server._store.devices.all()}
        # no command shows it of devices that the newer rollout has not reached
        foreseen = {device: fleet.server._director.targets_after(row, after) for device, row in rows.items()}
        assert foreseen == {device.id: {"hello": one} for device in devices}, canary
        asked = await fleet.command("withdraw", "hello@3.0.0")  # its input is at the end, as of a job that cron runs
        said = "nothing was changed; the input ended before the question was answered; add --yes"
        assert (asked.code, said in asked.stderr) == (130, True), asked
        assert (await fleet.command("withdraw", "hello@3.0.0", "--yes")).code == 0
        for device in devices:
            await device.until(lambda device: device.items["hello"].target == one)


@pytest.mark.asyncio
async def test_a_version_with_other_data_takes_nobodys_place(new_fleet):
    async with new_fleet() as fleet:
        operator, device = fleet.operator, await fleet.device("a")
        await operator.decided(await operator.deploy(await operator.publish("1.0.0")))
        await operator.decided(await operator.deploy(await operator.publish("2.0.0", data_schema=2)))
        await device.until(lambda device: device.items)
        assert named(await foretold(fleet)) == {device.id: ""}
        assert (await fleet.command("withdraw", "hello@2.0.0", "--yes")).code == 0
        await device.until(lambda device: not device.items)

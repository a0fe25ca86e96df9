"""Withdrawal of a release over a real server: what `fleet withdraw` foretells is what follows."""

import json
from datetime import UTC, datetime

import pytest

from fleet.protocol import operator_api
from fleet.protocol.codes import InstanceState, RolloutState
from fleet.protocol.messages import Health, InstanceHealth
from fleet.protocol.topics import Up


async def say_health(fleet, board):
    """Have a board say what it runs, and wait until the server knows."""
    running = tuple(
        InstanceHealth(instance=name, target=item.target, generation=1, state=InstanceState.RUNNING)
        for name, item in board.items.items()
    )
    health = Health(device=board.device, boot_id="boot", at=datetime.now(UTC), instances=running)
    board.publish(Up.HEALTH, health)
    bell = fleet.server._conductor._watch
    await bell.until(lambda: fleet.server._store.devices.get(board.device).health, timeout_s=60)


def named(shown: dict) -> dict[str, str]:
    return {each["device"]: each.get("next", "") for each in shown["devices"]}


async def foretold(fleet, target="hello@2.0.0"):
    done = await fleet.command("withdraw", target, "--dry-run", "--json")
    assert done.code == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.asyncio
async def test_what_becomes_of_each_device_is_told_before_and_comes_about(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        member, other = await fleet.board("member"), await fleet.board("other", group="lab")
        pinned = await fleet.board("pinned")
        one, two = await operator.publish("1.0.0"), await operator.publish("2.0.0")
        await operator.decided(await operator.deploy(one))
        pin = operator_api.RolloutRequest(instance="hello", target=two)
        view = await operator.send(operator_api.RolloutView, "PUT", f"/v1/devices/{pinned.device}/pin", pin)
        await operator.decided(view)
        await operator.decided(await operator.deploy(two))
        await operator.decided(await operator.deploy(two, group="lab"))
        boards = (member, other, pinned)
        for board in boards:
            await say_health(fleet, board)

        shown = await foretold(fleet)
        # the pin has no other value and goes: the group decides then
        assert named(shown) == {member.device: one, other.device: "", pinned.device: one}
        assert shown["running"] == sorted(board.device for board in boards)
        done = await fleet.command("withdraw", "hello@2.0.0", stdin="y\n")
        assert done.code == 0, done.stderr
        assert "3 devices run it." in done.stderr
        assert f"1 runs nothing in its place, and keeps its data: {other.device}" in done.stderr
        for board in (member, pinned):
            await board.until(lambda board: board.items["hello"].target == one)
        await other.until(lambda board: not board.items)
        assert other.accepted[-1].keep_data == ("hello",)
        assert named(await foretold(fleet, "hello@2.0.0"))[other.device] == ""


@pytest.mark.asyncio
async def test_rollouts_that_would_end_are_named_and_their_devices_go_back(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        boards = [await fleet.board("a"), await fleet.board("b")]
        one, two = await operator.publish("1.0.0"), await operator.publish("2.0.0")
        await operator.decided(await operator.deploy(one))
        view = await operator.deploy(two, soak_s=3600)
        view = await operator.follow(view, lambda view: view.counts.get("succeeded") == 1)
        (canary,) = [board for board in boards if board.items["hello"].target == two]

        shown = await foretold(fleet)
        assert (named(shown), shown["running"], shown["rollouts"]) == ({canary.device: one}, [], [view.number])
        assert (await fleet.command("withdraw", "hello@2.0.0", "--yes")).code == 0
        assert (await operator.decided(view)).state is RolloutState.REVOKED
        await canary.until(lambda board: board.items["hello"].target == one)


@pytest.mark.asyncio
async def test_a_version_with_other_data_takes_nobodys_place(new_fleet):
    async with new_fleet() as fleet:
        operator, board = fleet.operator, await fleet.board("a")
        await operator.decided(await operator.deploy(await operator.publish("1.0.0")))
        await operator.decided(await operator.deploy(await operator.publish("2.0.0", data_schema=2)))
        await board.until(lambda board: board.items)
        assert named(await foretold(fleet)) == {board.device: ""}
        assert (await fleet.command("withdraw", "hello@2.0.0", "--yes")).code == 0
        await board.until(lambda board: not board.items)

"""Desired state of a device as the server tells it: each value with the layer that it comes from."""

import pytest

from fleet.protocol import operator_api
from fleet.protocol.manifest import ConfigKey

CONFIG = {"level": ConfigKey(default="info"), "retries": ConfigKey(default="3")}


async def effective(operator, board):
    return (await operator.get(operator_api.DeviceDetail, f"/v1/devices/{board.device}")).effective


def told(each):
    return each.target, each.source, {key: (of.value, of.source) for key, of in each.keys.items()}


@pytest.mark.asyncio
async def test_each_value_is_told_with_its_source_from_layer_to_layer(new_fleet):
    async with new_fleet() as fleet:
        operator, board = fleet.operator, await fleet.board("a")
        one, two = [await operator.publish(version, config=CONFIG) for version in ("1.0.0", "2.0.0")]
        await operator.decided(await operator.deploy(one, config={"level": "warn"}))
        (shown,) = await effective(operator, board)
        assert told(shown) == (one, "group edge", {"level": ("warn", "group edge"), "retries": ("3", "manifest")})
        assert shown.config == {"level": "warn"}

        view = await operator.deploy(two, soak_s=3600, config={"retries": "5"})
        await operator.follow(view, lambda view: view.counts.get("succeeded") == 1)
        overlay = f"rollout {view.number} (group edge)"
        (shown,) = await effective(operator, board)
        assert told(shown) == (two, overlay, {"level": ("info", "manifest"), "retries": ("5", overlay)})

        path = f"/v1/rollouts/{view.number}/abort"
        await operator.send(operator_api.RolloutView, "POST", path, operator_api.AbortRequest())
        wish = operator_api.RolloutRequest(instance="hello", target=two, config={"level": "debug"}, port=8081)
        pin = await operator.send(operator_api.RolloutView, "PUT", f"/v1/devices/{board.device}/pin", wish)
        await operator.decided(pin)
        (shown,) = await effective(operator, board)
        assert told(shown) == (two, "pin", {"level": ("debug", "pin"), "retries": ("3", "manifest")})
        assert shown.port == 8081


@pytest.mark.asyncio
async def test_an_instance_that_a_pin_masks_is_told_as_such(new_fleet):
    async with new_fleet() as fleet:
        operator, board = fleet.operator, await fleet.board("a")
        one = await operator.publish("1.0.0", config=CONFIG)
        await operator.decided(await operator.deploy(one))
        removal = operator_api.RemovalRequest(instance="hello", device=board.device)
        await operator.decided(await operator.send(operator_api.RolloutView, "POST", "/v1/removals", removal))
        await board.until(lambda board: not board.items)
        assert [told(each) for each in await effective(operator, board)] == [("", "pin", {})]

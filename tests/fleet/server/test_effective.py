"""Desired state of a device as the server tells it: each value with the layer that it comes from."""

import pytest

from fleet.protocol import operator_api
from fleet.protocol.manifest import ConfigKey

CONFIG = {"level": ConfigKey(default="info"), "retries": ConfigKey(default="3")}


async def effective(operator, device):
    return (await operator.get(operator_api.DeviceDetail, f"/v1/devices/{device.id}")).effective


def told(each):
    return each.target, each.source, {key: (of.value, of.source) for key, of in each.keys.items()}


@pytest.mark.asyncio
async def test_each_value_is_told_with_its_source_from_layer_to_layer(new_fleet):
    async with new_fleet() as fleet:
        operator, device = fleet.operator, await fleet.device("a")
        one, two = [await operator.publish(version, config=CONFIG) for version in ("1.0.0", "2.0.0")]
        await operator.decided(await operator.deploy(one, config={"level": "warn"}))
        (shown,) = await effective(operator, device)
        assert told(shown) == (one, "group edge", {"level": ("warn", "group edge"), "retries": ("3", "manifest")})
        assert shown.config == {"level": "warn"}

        view = await operator.deploy(two, soak_s=3600, config={"retries": "5"})
        await operator.follow(view, lambda view: view.counts.get("succeeded") == 1)
        overlay = f"rollout {view.number} (group edge)"
        (shown,) = await effective(operator, device)
        assert told(shown) == (two, overlay, {"level": ("info", "manifest"), "retries": ("5", overlay)})

        path = f"/v1/rollouts/{view.number}/abort"
        await operator.send(operator_api.RolloutView, "POST", path, operator_api.AbortRequest())
        wish = operator_api.RolloutRequest(instance="hello", target=two, config={"level": "debug"}, port=8081)
        pin = await operator.send(operator_api.RolloutView, "PUT", f"/v1/devices/{device.id}/pin", wish)
        await operator.decided(pin)
        (shown,) = await effective(operator, device)
        assert told(shown) == (two, "pin", {"level": ("debug", "pin"), "retries": ("3", "manifest")})
        assert shown.port == 8081


@pytest.mark.asyncio
async def test_an_instance_that_a_pin_masks_is_told_as_such(new_fleet):
    async with new_fleet() as fleet:
        operator, device = fleet.operator, await fleet.device("a")
        one = await operator.publish("1.0.0", config=CONFIG)
        await operator.decided(await operator.deploy(one))
        removal = operator_api.RemovalRequest(instance="hello", device=device.id)
        await operator.decided(await operator.send(operator_api.RolloutView, "POST", "/v1/removals", removal))
        await device.until(lambda device: not device.items)
        assert [told(each) for each in await effective(operator, device)] == [("", "pin", {})]


async def change(operator, device, **keys):
    request = operator_api.KeysRequest(instance="hello", keys=keys)
    return await operator.send(operator_api.DeviceDetail, "PUT", f"/v1/devices/{device.id}/keys", request)


def runs(**config):
    return lambda device: device.items and device.items["hello"].config == config


@pytest.mark.asyncio
async def test_a_devices_own_keys_apply_at_once_and_stay_through_rollout_abort_and_undo(new_fleet):
    async with new_fleet() as fleet:
        operator, device, other = fleet.operator, await fleet.device("a"), await fleet.device("b")
        one, two = [await operator.publish(version, config=CONFIG) for version in ("1.0.0", "2.0.0")]
        await operator.decided(await operator.deploy(one, config={"level": "warn"}))
        detail = await change(operator, device, level="debug")
        (shown,) = detail.effective
        assert told(shown) == (one, "group edge", {"level": ("debug", "device"), "retries": ("3", "manifest")})
        assert shown.config == {"level": "debug"}
        await device.until(runs(level="debug"))
        assert other.items["hello"].config == {"level": "warn"}

        view = await operator.deploy(two, soak_s=3600, waves="100%")
        await operator.follow(view, lambda view: view.counts.get("succeeded") == 2)
        assert (device.items["hello"].target, device.items["hello"].config) == (two, {"level": "debug"})
        await change(operator, device, retries="9")
        await device.until(runs(level="debug", retries="9"))
        path = f"/v1/rollouts/{view.number}/abort"
        await operator.send(operator_api.RolloutView, "POST", path, operator_api.AbortRequest())
        await device.until(lambda device: device.items["hello"].target == one)
        assert device.items["hello"].config == {"level": "debug", "retries": "9"}
        await other.until(lambda device: device.items["hello"].target == one)
        assert other.items["hello"].config == {"level": "warn"}

        await change(operator, device, level=None, retries=None)
        await device.until(runs(level="warn"))
        acts = [
            each for each in (await operator.get(operator_api.Audit, "/v1/audit")).entries if each.act == "device-keys"
        ]
        assert acts[0].detail == "hello: level removed, retries removed"


@pytest.mark.asyncio
async def test_keys_of_the_device_do_not_make_a_change_of_the_group(new_fleet):
    """Left out when it is judged whether a rollout would change anything."""
    async with new_fleet() as fleet:
        operator, device = fleet.operator, await fleet.device("a")
        one = await operator.publish("1.0.0", config=CONFIG)
        await operator.decided(await operator.deploy(one, config={"level": "warn"}))
        await change(operator, device, level="debug")
        await device.until(runs(level="debug"))
        wish = operator_api.RolloutRequest(instance="hello", target=one, group="edge", config={"level": "warn"})
        refused = await operator.send(operator_api.RolloutView, "POST", "/v1/rollouts", wish)
        assert refused.state == "refused"


@pytest.mark.asyncio
async def test_keys_wait_for_their_instance_and_for_a_version_that_declares_them(new_fleet):
    async with new_fleet() as fleet:
        operator, device = fleet.operator, await fleet.device("a")
        assert (await change(operator, device, level="debug", room="cellar")).effective == ()
        one = await operator.publish("1.0.0", config=CONFIG)
        await operator.decided(await operator.deploy(one))
        assert device.items["hello"].config == {"level": "debug"}
        (shown,) = await effective(operator, device)
        assert shown.config == {"level": "debug"}
        assert {key: of.declared for key, of in shown.keys.items()} == {"level": True, "retries": True, "room": False}


@pytest.mark.asyncio
async def test_keys_that_nothing_takes_are_refused_and_nothing_is_kept(new_fleet):
    async with new_fleet() as fleet:
        operator, device = fleet.operator, await fleet.device("a")
        one = await operator.publish("1.0.0", config=CONFIG)
        await operator.decided(await operator.deploy(one))
        path = f"/v1/devices/{device.id}/keys"
        for keys, kind, words in (
            ({"level": "debug", "rom": "x"}, "unknown-config", "it knows level, retries"),
            ({"level": None}, "unknown-config", "it has none"),
            ({"a b": "x"}, "bad-name", ""),
            ({"level": "x" * 8193}, "too-large", ""),
        ):
            problem = await operator.problem("PUT", path, operator_api.KeysRequest(instance="hello", keys=keys))
            assert problem.type == kind
            assert words in problem.detail
        assert fleet.server._store.rollouts.own_keys(device.id) == {}
        many = {f"k{number}": "x" * 8000 for number in range(9)}
        problem = await operator.problem("PUT", path, operator_api.KeysRequest(instance="later", keys=many))
        assert problem.type == "too-large"


@pytest.mark.asyncio
async def test_own_keys_count_as_they_are_written_so_that_an_assignment_holds_them(new_fleet):
    async with new_fleet() as fleet:
        operator, device = fleet.operator, await fleet.device("a")
        names = [f"k{number}" for number in range(8)]
        one = await operator.publish("1.0.0", config={name: ConfigKey(default="") for name in names})
        await operator.decided(await operator.deploy(one))
        path = f"/v1/devices/{device.id}/keys"
        escaped = operator_api.KeysRequest(instance="hello", keys=dict.fromkeys(names, "\x01" * 8000))
        problem = await operator.problem("PUT", path, escaped)
        assert (problem.status, problem.type) == (413, "too-large")
        fits = {names[0]: "\x01" * 8000, names[1]: "x" * 8000}
        await change(operator, device, **fits)
        await device.until(runs(**fits))


@pytest.mark.asyncio
async def test_keys_beyond_the_bound_of_today_can_be_taken_away_one_by_one(new_fleet):
    async with new_fleet() as fleet:
        operator, device = fleet.operator, await fleet.device("a")
        names = [f"k{number}" for number in range(20)]
        one = await operator.publish("1.0.0", config={name: ConfigKey(default="") for name in names})
        await operator.decided(await operator.deploy(one))
        for name in names:  # kept by a server from before the bound
            fleet.server._store.rollouts.set_own_key(device.id, "hello", name, "x" * 8000)
        path = f"/v1/devices/{device.id}/keys"
        more = operator_api.KeysRequest(instance="hello", keys={"k0": "y", "k1": None})
        assert (await operator.problem("PUT", path, more)).status == 413
        await change(operator, device, k0=None)
        assert sorted(fleet.server._store.rollouts.own_keys(device.id)["hello"]) == sorted(names[1:])


RETRIES = {"retries": ConfigKey(description="1 to 9", type="integer", min=1, max=9, default="3")}


@pytest.mark.asyncio
async def test_a_value_that_is_none_of_its_key_is_refused_at_deploy_and_for_a_device(new_fleet):
    async with new_fleet() as fleet:
        operator, device = fleet.operator, await fleet.device("a")
        loose = await operator.publish("1.0.0", config={"retries": ConfigKey(default="3")})
        tight = await operator.publish("2.0.0", config=RETRIES)
        await operator.decided(await operator.deploy(loose, config={"retries": "many"}))
        wish = operator_api.RolloutRequest(instance="hello", target=tight, group="edge")
        problem = await operator.problem("POST", "/v1/rollouts", wish)
        said = "retries='many' is not a whole number, such as 5"
        assert (problem.type, problem.title, problem.detail) == ("bad-config", said, "the instance has it from before")
        wish = operator_api.RolloutRequest(instance="hello", target=tight, group="edge", config={"retries": "10"})
        problem = await operator.problem("POST", "/v1/rollouts", wish)
        assert (problem.type, problem.title) == ("bad-config", "retries='10' is more than 9")
        await operator.decided(await operator.deploy(tight, config={"retries": "9"}))
        request = operator_api.KeysRequest(instance="hello", keys={"retries": "0"})
        problem = await operator.problem("PUT", f"/v1/devices/{device.id}/keys", request)
        assert (problem.type, problem.title, problem.detail) == ("bad-config", "retries='0' is less than 1", "1 to 9")
        await change(operator, device, retries="1")
        await device.until(runs(retries="1"))


@pytest.mark.asyncio
async def test_a_device_whose_own_value_does_not_fit_a_new_version_is_left_out_and_keeps_what_it_has(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        device, other = await fleet.device("a"), await fleet.device("b")
        loose = await operator.publish("1.0.0", config={"retries": ConfigKey(default="3")})
        tight = await operator.publish("2.0.0", config=RETRIES)
        await operator.decided(await operator.deploy(loose))
        await change(operator, device, retries="many")
        await device.until(runs(retries="many"))
        view = await operator.decided(await operator.deploy(tight))
        (left,) = [each for each in view.devices if each.device == device.id]
        assert (left.outcome, left.reason.partition(":")[0]) == (
            "not-affected",
            "its own retries='many' is not a whole number, such as 5",
        )
        assert (device.items["hello"].target, other.items["hello"].target) == (loose, tight)
        await change(operator, device, retries="5")
        await device.until(lambda device: device.items["hello"].target == tight)
        assert device.items["hello"].config == {"retries": "5"}

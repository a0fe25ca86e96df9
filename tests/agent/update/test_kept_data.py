"""Data of instances that are no longer listed: kept where the assignment says so, removed by the host otherwise."""

import msgspec
import pytest

from agent.host.ipc import host_api
from tests.eventually import eventually_async


async def asked(kit, number=1):
    """The instances whose data stays, as the host heard it so many times."""
    await eventually_async(lambda: len(kit.host.kept_data) >= number, "asked")
    return kit.host.kept_data


@pytest.mark.asyncio
async def test_the_host_keeps_the_data_of_what_is_listed_or_kept_and_removes_the_rest(kit):
    async with kit.running():
        web, api = kit.publish("1.0.0"), kit.publish("1.0.0", instance="api")
        await kit.run(kit.assignment(1, web, api))
        assert await asked(kit) == [("api", "web")]
        await kit.run(msgspec.structs.replace(kit.assignment(2, web), keep_data=("api",)))
        assert (await asked(kit, 2))[1:] == [("api", "web")]
        await kit.run(kit.assignment(3, web))
        assert (await asked(kit, 3))[2:] == [("web",)]


@pytest.mark.asyncio
async def test_an_instance_is_stopped_before_its_data_goes(kit):
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        await asked(kit)
        kit.host.hold_on.add(host_api.Stop)
        await kit.deployer.desire(kit.assignment(2))
        await eventually_async(lambda: kit.host.held, "asked to stop")
        await kit.handled()
        assert kit.host.kept_data == [("web",)]
        kit.host.hold_on.clear()
        kit.host.release()
        assert (await asked(kit, 2))[1:] == [()]


@pytest.mark.asyncio
async def test_the_host_is_asked_again_after_a_power_cut_unless_it_had_answered(kit):
    kit.host.hold_on = {host_api.KeepData}
    async with kit.running():
        await kit.deployer.desire(kit.assignment(1, kit.publish("1.0.0")))
        await eventually_async(lambda: kit.host.held, "asked")
    kit.host.hold_on, kit.host.held = set(), []
    for _ in range(2):
        async with kit.running():
            await kit.run(kit.assignment(1, kit.publish("1.0.0")))
            await asked(kit)
            await kit.handled()
            await eventually_async(lambda: kit.store.counter("kept") == 1, "noted")
    assert kit.host.kept_data == [("web",)]


@pytest.mark.asyncio
async def test_an_earlier_host_is_not_asked(kit):
    kit.host.protocol = host_api.KEEPS_DATA - 1
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        await kit.carrier.keep_data(("web",))
        assert kit.host.kept_data == []


@pytest.mark.asyncio
async def test_more_instances_than_a_host_is_told_of_keep_everything(kit):
    async with kit.running():
        many = tuple(f"old-{number}" for number in range(host_api.KEPT_MAX))
        await kit.run(msgspec.structs.replace(kit.assignment(1, kit.publish("1.0.0")), keep_data=many))
        await kit.carrier.keep_data((*many, "web"))
        assert kit.host.kept_data == []

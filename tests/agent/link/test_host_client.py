"""The agent's link to a host that runs more instances than it can name in one packet."""

import contextlib
from types import SimpleNamespace

import pytest

from agent.report.uplink import HealthSources, Uplink
from agent.update.problems import Problems
from tests.eventually import eventually_async

NAMES = ("a", "b", "c", "d", "e")


@contextlib.asynccontextmanager
async def with_pages(kit, page):
    """Device that runs five instances, on a host that names so many of them in a packet."""
    await kit.boot()
    try:
        kit.host.page = page
        await kit.run(kit.assignment(1, *(kit.publish("1.0.0", instance=name) for name in NAMES)))
        yield
    finally:
        await kit.pull_plug()


@pytest.mark.parametrize("page", [1, 2, 5])
@pytest.mark.asyncio
async def test_every_instance_passes_its_probation_and_has_its_figures(kit, page):
    async with with_pages(kit, page):
        assert {name: kit.chain(name)[-1] for name in NAMES} == dict.fromkeys(NAMES, "committed")
        assert [each.instance for each in (await kit.link.stats()).instances] == list(NAMES)


@pytest.mark.asyncio
async def test_health_tells_of_every_instance(kit):
    async with with_pages(kit, 2):
        uplink = Uplink(
            device=kit.device,
            mqtt=SimpleNamespace(),
            db=kit.worker,
            sources=HealthSources(kit.link, kit.deployer.state, Problems(kit.worker)),
            signer=SimpleNamespace(),
            health_s=60,
        )
        assert [each.instance for each in (await uplink.health()).instances] == list(NAMES)


@pytest.mark.asyncio
async def test_a_version_is_taken_back_wherever_the_host_names_it(kit):
    async with with_pages(kit, 1):
        v2 = kit.publish("2.0.0", instance="e")
        kit.host.faults[v2.target] = 2
        kept = [kit.publish("1.0.0", instance=name) for name in NAMES[:-1]]
        await kit.run(kit.assignment(2, *kept, v2))
        assert kit.chain("e")[-1] == "rolled-back"
        assert kit.host.targets()["e"] == "components/acme/web/1.0.0.wasm"


@pytest.mark.asyncio
async def test_what_belongs_to_nobody_is_stopped_wherever_the_host_names_it(kit):
    async with with_pages(kit, 2):
        kit.host.running["z"] = kit.host.running["a"]
        kit.link.close()
        await eventually_async(lambda: "z" not in kit.host.running, "it is stopped")
        assert sorted(kit.host.running) == list(NAMES)


@pytest.mark.asyncio
async def test_an_entry_too_large_for_a_packet_does_not_end_in_a_circle(kit):
    async with with_pages(kit, 5):
        kit.host.page = 0
        assert (await kit.link.stats()).instances == ()

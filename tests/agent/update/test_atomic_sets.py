"""Atomic sets on a device: committed as a whole or not at all, despite failures and power cuts."""

import msgspec
import pytest

from agent.host.ipc import host_api
from fleet.protocol.codes import RejectCode
from signing.errors import Rejected

V1, V2, V3 = (f"components/acme/web/{n}.0.0.wasm" for n in "123")


@pytest.mark.asyncio
async def test_an_atomic_set_is_swapped_as_a_whole_or_not_at_all(kit):
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0", instance="front"), kit.publish("1.0.0", instance="back")))
        kit.host.refuse[V3] = RejectCode.START_FAILED
        front = kit.publish("2.0.0", instance="front", atomic="pair", probation_ms=60_000)
        back = kit.publish("3.0.0", instance="back", atomic="pair")
        await kit.run(kit.assignment(2, front, back))
        assert kit.host.targets() == {"front": V1, "back": V1}
        assert kit.reports()[-1].phase == "rolled-back"
        codes = {report.instance: report.code for report in kit.reports() if report.phase in {"failed", "rolled-back"}}
        assert codes == {"front": RejectCode.SET_FAILED, "back": RejectCode.START_FAILED}
        # Without the fault, both are committed.
        kit.host.refuse.clear()
        front = kit.publish("2.0.0", instance="front", atomic="pair", attempt=1)
        back = kit.publish("3.0.0", instance="back", atomic="pair", attempt=1)
        await kit.run(kit.assignment(3, front, back))
        assert kit.host.targets() == {"front": V2, "back": V3}


@pytest.mark.asyncio
async def test_a_members_refusal_before_the_swap_stops_its_set(kit):
    async with kit.running():
        front = kit.publish("2.0.0", instance="front", atomic="pair")
        back = kit.publish("3.0.0", instance="back", atomic="pair")
        kit.trust.trouble[V3] = [Rejected(RejectCode.REVOKED, "revoked")]
        await kit.run(kit.assignment(1, front, back))
        assert kit.host.targets() == {}
        assert {failure.code for failure in kit.store.failed()} == {RejectCode.SET_FAILED, RejectCode.REVOKED}


@pytest.mark.parametrize("instance", ["front", "back"])
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("phase", ["staged", "swapping", "probation", "committed", "rolling-back"])
@pytest.mark.parametrize("good", [True, False])
@pytest.mark.asyncio
async def test_a_power_cut_never_leaves_half_a_set(kit, instance, moment, phase, good):
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0", instance="front"), kit.publish("1.0.0", instance="back")))
        if not good:
            kit.host.faults[V3] = 5
        wanted = kit.assignment(
            2,
            kit.publish("2.0.0", instance="front", atomic="pair"),
            kit.publish("3.0.0", instance="back", atomic="pair"),
        )
        kit.store.cut = (instance, phase, moment)
        await kit.deployer.desire(wanted)
        await kit.until(lambda: kit.store.dead or kit.deployer.is_idle)
        await kit.pull_plug()
        await kit.boot()
        await kit.until(kit.link.ready.is_set)
        await kit.run(wanted)
        both = {"front": V2, "back": V3}
        assert kit.host.targets() in ([both] if good else [{"front": V1, "back": V1}])
        assert {each.item.target for each in kit.store.committed()} == set(kit.host.targets().values())


@pytest.mark.asyncio
async def test_a_member_that_passed_probation_with_its_set_is_not_judged_again(kit):
    """Power is cut between two commits, then the second member fails its health check: it is still committed."""

    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0", instance="front"), kit.publish("1.0.0", instance="back")))
        wanted = kit.assignment(
            2,
            kit.publish("2.0.0", instance="front", atomic="pair"),
            kit.publish("3.0.0", instance="back", atomic="pair"),
        )
        kit.store.cut = ("back", "committed", "before")
        await kit.deployer.desire(wanted)
        await kit.until(lambda: kit.store.dead)
        await kit.pull_plug()
        kit.host.faults[V3] = 5
        await kit.boot()
        await kit.run(wanted)
        # Both had passed probation before the first was committed.
        assert kit.host.targets() == {"front": V2, "back": V3}


@pytest.mark.asyncio
async def test_a_set_waits_for_a_members_change_and_keeps_running_members(kit):
    async with kit.running():
        slow = kit.publish("1.0.0", instance="back", probation_ms=60_000)
        await kit.deployer.desire(kit.assignment(1, kit.publish("1.0.0", instance="front"), slow))
        await kit.until(lambda: kit.chain("back")[-1:] == ["probation"])
        front = kit.publish("2.0.0", instance="front", atomic="pair")
        back = kit.publish("3.0.0", instance="back", atomic="pair")
        await kit.run(kit.assignment(2, front, back))
        assert kit.host.targets() == {"front": V2, "back": V3}
        # One member of the next set already runs: it is not changed, and the other is swapped.
        starts = sum(isinstance(each, host_api.Start) for each in kit.host.requests)
        front = kit.publish("1.0.0", instance="front", atomic="other")
        await kit.run(kit.assignment(3, front, msgspec.structs.replace(back, atomic="other", rollout="r3")))
        assert kit.host.targets() == {"front": V1, "back": V3}
        assert sum(isinstance(each, host_api.Start) for each in kit.host.requests) == starts + 1


@pytest.mark.asyncio
async def test_starts_of_a_set_name_all_members(kit):
    async with kit.running():
        front = kit.publish("2.0.0", instance="front", atomic="pair")
        back = kit.publish("3.0.0", instance="back", atomic="pair")
        await kit.run(kit.assignment(1, front, back, kit.publish("1.0.0", instance="alone")))
        named = {each.run.instance: each.together for each in kit.host.requests if isinstance(each, host_api.Start)}
        # This host has no barrier: the second has switched when the first starts. A real host makes them wait.
        assert {named.pop("front"), named.pop("back")} & {("front",), ("back",)}
        assert named == {"alone": ()}


@pytest.mark.parametrize("effect", ["fetch", "verify", "swap", "watch"])
@pytest.mark.asyncio
async def test_a_set_whose_member_failed_in_passing_is_tried_again_as_a_whole(kit, monkeypatch, effect):
    monkeypatch.setattr("agent.update.machine.RETRY_MAX_S", 0.01)
    monkeypatch.setattr("agent.update.state.RETRY_FIRST_S", 0.05)
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0", instance="front"), kit.publish("1.0.0", instance="back")))
        whole, faults = getattr(kit.carrier, effect), {"back": 1 if effect == "swap" else 13}

        async def sometimes(change, *rest):
            if faults.get(change.instance, 0):
                faults[change.instance] -= 1
                raise RuntimeError("a passing trouble")
            return await whole(change, *rest)

        monkeypatch.setattr(kit.carrier, effect, sometimes)
        front = kit.publish("2.0.0", instance="front", atomic="pair")
        back = kit.publish("3.0.0", instance="back", atomic="pair")
        await kit.deployer.desire(kit.assignment(2, front, back))
        await kit.until(
            lambda: kit.chain("front")[-1:] == kit.chain("back")[-1:] == ["committed"] and not faults["back"]
        )
        await kit.settled()
        assert kit.host.targets() == {"front": V2, "back": V3}
        failed = [(each.instance, each.code) for each in kit.reports() if each.phase in {"failed", "rolled-back"}]
        assert sorted(failed) == [("back", RejectCode.INTERNAL), ("front", RejectCode.SET_FAILED)], "each of them once"


@pytest.mark.asyncio
async def test_a_set_whose_bad_member_is_replaced_is_tried_as_a_whole(kit):
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0", instance="front"), kit.publish("1.0.0", instance="back")))
        kit.host.refuse[V2] = RejectCode.START_FAILED
        front = kit.publish("3.0.0", instance="front", atomic="pair")
        await kit.run(kit.assignment(2, front, kit.publish("2.0.0", instance="back", atomic="pair")))
        assert kit.host.targets() == {"front": V1, "back": V1}
        await kit.run(kit.assignment(3, front, kit.publish("3.0.0", instance="back", atomic="pair")))
        assert kit.host.targets() == {"front": V3, "back": V3}

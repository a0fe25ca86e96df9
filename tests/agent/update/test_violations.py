"""Violations of running items: stopped or kept by the owner's policy, reported with their code, despite power cuts."""

import asyncio

import msgspec
import pytest

from agent.config import Policy, Settings
from agent.host.ipc import host_api
from agent.identity.identity import Identity
from agent.report import status
from agent.update.state import Violation, item_key
from fleet.protocol.codes import RejectCode
from tests.agent.conftest import NOW


def doubt(item, code=RejectCode.REVOKED):
    return Violation(
        instance=item.instance, key=item_key(item), target=item.target, code=code, message="revoked by its publisher"
    )


def told(kit):
    who = Identity(device="d-01234567", fleet="f", group="", devices_url="", mqtt=(), production=False, floor=NOW)
    return "\n".join(status.format_status(status.read_status(who, kit.store)))


@pytest.mark.asyncio
async def test_a_revoked_component_is_stopped_and_not_started_again(kit):
    await kit.boot()
    item = kit.publish("1.0.0", rollout="r1")
    await kit.run(kit.assignment(1, item))
    await kit.deployer.hold([doubt(item)])
    await kit.settled()
    assert kit.host.targets() == {}
    assert kit.store.committed() == ()
    last = kit.reports()[-1]
    assert (last.phase, last.code, last.running) == ("failed", RejectCode.REVOKED, "")
    # Neither the server's assignment nor a restart of host and agent starts it again.
    await kit.run(kit.assignment(2, item))
    await kit.pull_plug()
    await kit.boot()
    await kit.deployer.desire(kit.assignment(2, item))
    await kit.settled()
    assert kit.host.targets() == {}
    assert "(revoked)" in told(kit)
    await kit.stop_agent()


@pytest.mark.asyncio
async def test_a_revoked_component_kept_by_policy_is_reported_once(kit):
    kit.settings = Settings(policy=Policy(on_revoked="keep"))

    await kit.boot()
    item = kit.publish("1.0.0")
    await kit.run(kit.assignment(1, item))
    for _ in range(3):
        await kit.deployer.hold([doubt(item)])
        await kit.settled()
    assert kit.host.targets() == {"web": item.target}
    said = [report for report in kit.reports() if report.code is RejectCode.REVOKED]
    assert [(report.phase, report.running) for report in said] == [("idle", item.target)]
    assert kit.deployer.state.problems
    assert "keeps running" in told(kit)
    # Once the item is replaced, the violation is gone.
    await kit.run(kit.assignment(2, kit.publish("2.0.0")))
    assert kit.deployer.state.problems == []
    assert kit.store.doubts() == ()
    await kit.stop_agent()


@pytest.mark.asyncio
async def test_a_slow_download_of_the_replacement_does_not_hold_up_the_stop(kit):
    await kit.boot()
    item = kit.publish("1.0.0")
    await kit.run(kit.assignment(1, item))
    arrives = asyncio.Event()

    async def slow(change, progress):
        await arrives.wait()
        return await fetch(change, progress)

    fetch, kit.carrier.fetch = kit.carrier.fetch, slow
    newer = kit.publish("2.0.0")
    await kit.deployer.desire(kit.assignment(2, newer))
    await kit.until(lambda: kit.deployer.state.active)
    await kit.deployer.hold([doubt(item)])
    await kit.until(lambda: kit.host.targets() == {})
    assert kit.deployer.state.active["web"].change.phase == "fetching"
    arrives.set()
    await kit.settled()
    assert kit.host.targets() == {"web": newer.target}
    await kit.stop_agent()


@pytest.mark.asyncio
async def test_a_rollback_from_probation_does_not_return_to_a_revoked_release(kit):
    await kit.boot()
    item = kit.publish("1.0.0")
    await kit.run(kit.assignment(1, item))
    bad = kit.publish("2.0.0", probation_ms=60_000)
    await kit.deployer.desire(kit.assignment(2, bad))
    await kit.until(lambda: kit.host.targets() == {"web": bad.target})
    await kit.deployer.hold([doubt(item)])
    await kit.handled()
    assert kit.host.targets() == {"web": bad.target}, "what is on probation is not what was revoked"
    kit.host.faults[bad.target] = 50
    await kit.settled()
    assert kit.host.targets() == {}
    await kit.stop_agent()


@pytest.mark.parametrize("host", ["lives", "dies"])
@pytest.mark.asyncio
async def test_power_cut_between_the_record_and_the_stop(kit, host):
    await kit.boot()
    item = kit.publish("1.0.0")
    await kit.run(kit.assignment(1, item))
    kit.host.hang_on = {host_api.Stop}
    await kit.deployer.hold([doubt(item)])
    await kit.until(lambda: any(isinstance(each, host_api.Stop) for each in kit.host.requests))
    assert kit.committed() == ()
    assert kit.reports()[-1].code is RejectCode.REVOKED
    kit.host.hang_on = set()
    if host == "dies":
        await kit.pull_plug()
        await kit.boot()
        assert kit.host.targets() == {}
    await kit.stop_agent()


@pytest.mark.asyncio
async def test_a_raised_epoch_does_not_stop_a_component_that_is_being_replaced(kit):
    await kit.boot()
    item = kit.publish("1.0.0")
    await kit.run(kit.assignment(1, item))
    newer = msgspec.structs.replace(kit.publish("2.0.0"), rollout="r2")
    await kit.deployer.desire(kit.assignment(2, newer))
    await kit.deployer.hold([doubt(item, RejectCode.SECURITY_EPOCH)])
    await kit.settled()
    assert kit.host.targets() == {"web": newer.target}
    assert RejectCode.SECURITY_EPOCH not in [report.code for report in kit.reports()]
    await kit.stop_agent()


@pytest.mark.asyncio
async def test_a_host_that_does_not_answer_a_stop_blocks_no_other_instance(kit):
    await kit.boot()
    item = kit.publish("1.0.0")
    await kit.run(kit.assignment(1, item))
    kit.host.hang_on = {host_api.Stop}
    await kit.deployer.hold([doubt(item)])
    other = kit.publish("1.0.0", instance="other")
    await kit.deployer.desire(kit.assignment(2, other, kit.publish("2.0.0")))
    await kit.until(lambda: kit.chain("other")[-1:] == ["committed"])
    assert kit.chain("web")[-1] == "failed", "started again once it has been stopped, and not beside the stop"
    await kit.stop_agent()

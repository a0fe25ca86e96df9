"""What ran and must not run any more: stopped or kept as the owner decided, said with its code, over power cuts too."""

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
    return "\n".join(status.tell(status.standing(who, kit.store)))


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
    # The server goes on asking for it, and the host and the agent start anew: nothing brings it back.
    await kit.run(kit.assignment(2, item))
    await kit.pull_plug()
    await kit.boot()
    await kit.deployer.desire(kit.assignment(2, item))
    await kit.settled()
    assert kit.host.targets() == {}
    assert "(revoked)" in told(kit)
    await kit.stop_agent()


@pytest.mark.asyncio
async def test_the_owner_may_keep_what_was_revoked_and_it_is_said_once(kit):
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
    assert kit.deployer.problems
    assert "goes on running" in told(kit)
    # What is replaced is in doubt no more.
    await kit.run(kit.assignment(2, kit.publish("2.0.0")))
    assert kit.deployer.problems == []
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
async def test_going_back_from_probation_does_not_lead_to_what_was_revoked_meanwhile(kit):
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
async def test_an_epoch_is_no_reason_to_stop_what_is_just_being_replaced(kit):
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
async def test_a_host_that_does_not_answer_a_stop_holds_up_nobody_else(kit):
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

"""State of each instance as the device signs it: when it commits, when the fleet asks, and when nothing was to do."""

import pytest

from agent.link.https import FetchError
from agent.update.store import StoreError
from fleet.protocol.codes import InstanceState, Phase, RejectCode

V1, V2 = (f"components/acme/web/{n}.0.0.wasm" for n in "12")


async def asked(kit):
    """Ask the device for its state; the reports that it makes."""
    before = len(kit.reports())
    kit.deployer.report_states()
    await kit.settled()
    return kit.reports()[before:]


@pytest.mark.asyncio
async def test_a_commit_names_the_generation_that_answers(kit):
    async with kit.running():
        for version, number in (("1.0.0", 1), ("2.0.0", 2)):
            await kit.run(kit.assignment(number, kit.publish(version)))
            last = kit.reports()[-1]
            assert (last.phase, last.generation) == (Phase.COMMITTED, kit.host.running["web"].generation)
        await kit.run(kit.assignment(3))
        last = kit.reports()[-1]
        assert (last.instance, last.phase, last.target, last.generation) == ("web", Phase.COMMITTED, "", 0)


@pytest.mark.asyncio
async def test_the_state_of_each_instance_is_reported_again_when_the_fleet_asks(kit):
    async with kit.running():
        kit.host.faults[V2] = 2
        bad = kit.publish("2.0.0", instance="api", rollout="r2")
        good = kit.publish("1.0.0", rollout="r1")
        await kit.run(kit.assignment(1, good, bad))
        web, api = await asked(kit)
        assert (api.instance, api.rollout, api.phase, api.code) == ("api", "r2", Phase.FAILED, RejectCode.TRAPPED)
        assert (web.instance, web.rollout, web.phase, web.target) == ("web", "r1", Phase.COMMITTED, V1)
        assert web.manifest_sha256 == good.manifest_sha256
        assert web.generation == kit.host.running["web"].generation
        # asked again, it says the same under new sequences
        again = await asked(kit)
        assert [each.phase for each in again] == [Phase.COMMITTED, Phase.FAILED]
        assert again[0].sequence > api.sequence


def host_lost(kit, monkeypatch):
    monkeypatch.setattr(kit.carrier, "figures", once(lost, kit.carrier.figures))


def disk_full(kit, monkeypatch):
    monkeypatch.setattr(kit.store, "apply", once(full, kit.store.apply))


def once(first, then):
    calls = iter((first,))

    def call(*args):
        return next(calls, then)(*args)

    return call


async def lost():
    return None


def full(_step):
    raise StoreError("no space left")


@pytest.mark.asyncio
@pytest.mark.parametrize("trouble", [host_lost, disk_full])
async def test_the_fleet_gets_the_state_that_it_asked_for_after_a_trouble_that_passes(kit, monkeypatch, trouble):
    monkeypatch.setattr("agent.update.reconciler.STORE_AGAIN_S", 0.01)
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        before = len(kit.reports())
        trouble(kit, monkeypatch)
        kit.deployer.report_states()
        await kit.until(lambda: len(kit.reports()) == before + 2)
        assert [each.instance for each in kit.reports()[before:]] == ["web", ""]


@pytest.mark.asyncio
async def test_a_change_under_way_is_reported_as_it_stands(kit):
    async with kit.running():
        await kit.deployer.desire(kit.assignment(1, kit.publish("1.0.0", probation_ms=60_000)))
        await kit.until(lambda: kit.chain()[-1:] == ["probation"])
        before = len(kit.reports())
        kit.deployer.report_states()
        await kit.until(lambda: len(kit.reports()) > before)
        assert [each.phase for each in kit.reports()[before:]] == [Phase.PROBATION]


@pytest.mark.asyncio
async def test_an_assignment_with_nothing_to_do_is_reported_as_committed(kit):
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        before = len(kit.reports())
        await kit.run(kit.assignment(2, kit.publish("1.0.0")))
        (whole,) = kit.reports()[before:]
        assert (whole.instance, whole.phase, whole.assignment) == ("", Phase.COMMITTED, 2)
        # and when the fleet asks, after that of each instance
        assert [(each.instance, each.phase) for each in await asked(kit)] == [
            ("web", Phase.COMMITTED),
            ("", Phase.COMMITTED),
        ]
        await kit.stop_agent()
        await kit.start_agent()
        before = len(kit.reports())
        await kit.run(kit.assignment(2, kit.publish("1.0.0")))
        assert kit.reports()[before:] == []  # it was said before the restart


@pytest.mark.asyncio
async def test_what_the_host_does_not_run_is_never_reported_as_committed(kit):
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0", rollout="r1")))
        for state, phases in (
            (InstanceState.BACKOFF, []),
            (InstanceState.STOPPED, []),
            (InstanceState.QUARANTINED, [Phase.FAILED]),
        ):
            kit.host.states[V1] = state
            assert [each.phase for each in await asked(kit)] == phases
        kit.host.running.clear()
        assert await asked(kit) == []


@pytest.mark.asyncio
async def test_the_same_version_deployed_again_on_an_instance_in_quarantine_is_no_success(kit):
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0", rollout="r1")))
        kit.host.states[V1] = InstanceState.QUARANTINED
        await kit.run(kit.assignment(2, kit.publish("1.0.0", rollout="r2")))
        last = kit.reports()[-1]
        assert (last.rollout, last.phase, last.code) == ("r2", Phase.FAILED, RejectCode.RESTARTED)
        assert "quarantine after 5 restarts" in last.message
        assert last.running == ""
        # another attempt starts it anew, with a probation of its own
        before = kit.host.running["web"].generation
        await kit.run(kit.assignment(3, kit.publish("1.0.0", rollout="r2", attempt=1)))
        assert kit.chain()[-3:] == ["swapping", "probation", "committed"]
        assert kit.host.running["web"].generation > before
        assert kit.reports()[-1].attempt == 1


@pytest.mark.asyncio
async def test_another_attempt_that_falls_again_is_tried_once(kit):
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0", rollout="r1")))
        kit.host.states[V1], kit.host.faults[V1] = InstanceState.QUARANTINED, 2
        await kit.run(kit.assignment(2, kit.publish("1.0.0", rollout="r1", attempt=1)))
        last = kit.reports()[-1]
        assert (last.phase, last.code, last.attempt) == (Phase.ROLLED_BACK, RejectCode.TRAPPED, 1)
        before = len(kit.reports())
        await kit.run(kit.assignment(3, kit.publish("1.0.0", rollout="r3", attempt=1)))
        assert [each.phase for each in kit.reports()[before:]] == [Phase.FAILED]


@pytest.mark.asyncio
async def test_an_instance_that_is_restarted_is_waited_for(kit, monkeypatch):
    monkeypatch.setattr("agent.update.reconciler.INSPECT_AGAIN_S", 0.01)
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0", rollout="r1")))
        kit.host.states[V1] = InstanceState.BACKOFF
        await kit.deployer.desire(kit.assignment(2, kit.publish("1.0.0", rollout="r2")))
        await kit.until(lambda: kit.host.requests[-1:] and kit.deployer.is_idle)
        assert {each.rollout for each in kit.reports()} == {"r1"}
        kit.host.states.clear()
        await kit.until(lambda: (kit.reports()[-1].rollout, kit.reports()[-1].phase) == ("r2", Phase.COMMITTED))


@pytest.mark.asyncio
async def test_another_attempt_of_what_is_on_probation_leaves_it_there(kit):
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        await kit.deployer.desire(kit.assignment(2, kit.publish("2.0.0", rollout="r2", probation_ms=300)))
        await kit.until(lambda: kit.chain()[-1:] == ["probation"])
        generation = kit.host.running["web"].generation
        await kit.run(kit.assignment(3, kit.publish("2.0.0", rollout="r2", attempt=1, probation_ms=300)))
        assert "rolled-back" not in kit.chain()
        last = kit.reports()[-1]
        assert (last.phase, last.attempt, last.generation) == (Phase.COMMITTED, 1, generation)


@pytest.mark.asyncio
async def test_the_same_version_deployed_again_after_space_was_freed_is_a_new_attempt(kit):
    async with kit.running():
        item = kit.publish("1.0.0", rollout="r1")
        kit.server.trouble = [FetchError(RejectCode.NO_SPACE, "full"), FetchError(RejectCode.NO_SPACE, "full")]
        await kit.run(kit.assignment(1, item))
        assert (kit.reports()[-1].phase, kit.reports()[-1].code) == (Phase.FAILED, RejectCode.NO_SPACE)
        # still full: it is tried, and nothing says that it is not
        await kit.run(kit.assignment(2, kit.publish("1.0.0", rollout="r2")))
        last = kit.reports()[-1]
        assert (last.rollout, last.phase, last.code) == ("r2", Phase.FAILED, RejectCode.NO_SPACE)
        assert kit.chain() == ["fetching", "failed"] * 2
        (said,) = await asked(kit)
        assert "is retried automatically" in said.message
        assert "not retried" not in said.message
        # space was freed
        await kit.run(kit.assignment(3, kit.publish("1.0.0", rollout="r3")))
        assert (kit.reports()[-1].rollout, kit.reports()[-1].phase) == ("r3", Phase.COMMITTED)
        # and what once failed is forgotten with the commit, here and on the disk
        assert kit.deployer.state.failed == {}
        with kit.recorded() as store:
            assert store.failed() == ()
        await kit.run(kit.assignment(4, kit.publish("1.0.0", rollout="r4")))
        assert (kit.reports()[-1].rollout, kit.reports()[-1].phase) == ("r4", Phase.COMMITTED)

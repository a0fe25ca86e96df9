"""Only a device's signed report decides a rollout: whatever else is heard makes the server ask for that report."""

import itertools
import json
from datetime import UTC, datetime

import msgspec
import pytest

from fleet.protocol import bounds
from fleet.protocol.assignment import CheckIn
from fleet.protocol.codes import InstanceState, Outcome, Phase, RejectCode, RolloutState
from fleet.protocol.messages import Health, Hello, InstanceHealth
from fleet.protocol.topics import Up


def hello(device, committed):
    version = device.accepted[-1].version if device.accepted else 0
    return Hello(device=device.id, nonce="0" * 16, boot_id="boot", accepted=version, committed=committed)


def health(device, committed=0, **figure):
    figures = ()
    if figure:
        figures = (InstanceHealth(instance="hello", generation=1, calls={}, **figure),)
    return Health(device=device.id, boot_id="boot", at=datetime.now(UTC), committed=committed, instances=figures)


def check_ins(device):
    return [command for command in device.commands if isinstance(command.verb, CheckIn)]


async def running(fleet, device, behaviour, **more):
    """A rollout whose only device has taken the assignment and behaves so."""
    device.behaviour = behaviour
    view = await fleet.operator.deploy(await fleet.operator.publish("1.0.0"), **more)
    await device.until(lambda device: "hello" in device.items)
    return view


async def heard(fleet, device, message, channel=Up.HEALTH):
    """Send a message, and wait until everything before it was taken in."""
    counts = fleet.server._ingest.counts
    before = counts[str(channel)]
    device.publish(channel, message)
    while counts[str(channel)] == before:
        await fleet.server._conductor._watch._event.wait()


def outcome(fleet, view, device):
    return fleet.server._store.rollouts.member(view.number, device.id)[0].outcome


@pytest.mark.parametrize("kind", ["hello", "health"])
@pytest.mark.asyncio
async def test_a_commit_that_was_lost_is_asked_for_and_decides(new_fleet, behaviours, kind):
    async with new_fleet() as fleet:
        device = await fleet.device("a")
        device.answers_check_in = False
        view = await running(fleet, device, behaviours["silent"])
        version = device.accepted[-1].version
        # hello and health name the version, and are not signed
        if kind == "hello":
            device.publish(Up.HELLO, hello(device, version))
        else:
            device.publish(Up.HEALTH, health(device, version))
        await device.until(check_ins)
        assert outcome(fleet, view, device) is Outcome.WAITING
        # the device answers with its signed state
        (report,) = behaviours["good"](device.items["hello"])[-1:]
        device._say(report, device.accepted[-1])
        assert (await fleet.operator.decided(view)).state is RolloutState.SUCCEEDED


@pytest.mark.asyncio
async def test_a_device_is_asked_once_however_often_it_says_so(new_fleet, behaviours):
    async with new_fleet() as fleet:
        device = await fleet.device("a")
        device.answers_check_in = False
        await running(fleet, device, behaviours["silent"])
        for _ in range(5):
            await heard(fleet, device, health(device, device.accepted[-1].version))
        device.publish(Up.HELLO, hello(device, device.accepted[-1].version))
        asked = len(device.fresh)
        await device.until(lambda device: len(device.fresh) > asked)  # what comes after a hello has come
        assert len(check_ins(device)) == 1


@pytest.mark.asyncio
async def test_an_agent_that_does_not_sign_or_does_not_say_its_generation_is_unproven(new_fleet):
    async with new_fleet() as fleet:
        old, older, new = await fleet.device("a"), await fleet.device("b"), await fleet.device("c")
        older.signer = None
        good = new.behaviour
        old.behaviour = lambda item: [msgspec.structs.replace(report, generation=None) for report in good(item)]
        view = await fleet.operator.deploy(await fleet.operator.publish("1.0.0"), waves="100%")
        view = await fleet.operator.decided(view)
        assert view.state is RolloutState.SUCCEEDED
        found = {each.device: each for each in view.devices}
        assert found[new.id].outcome is Outcome.SUCCEEDED
        for device in (old, older):
            assert found[device.id].outcome is Outcome.UNPROVEN
            assert found[device.id].message == "its agent is too old to sign its state"


@pytest.mark.parametrize("lie", [{"assignment_sha256": "0" * 64}, {"manifest_sha256": "0" * 64}])
@pytest.mark.asyncio
async def test_a_commit_of_another_assignment_or_manifest_decides_nothing_and_is_asked_again(
    new_fleet, behaviours, lie
):
    async with new_fleet() as fleet:
        device = await fleet.device("a")
        device.answers_check_in = False

        def other(item):
            return [msgspec.structs.replace(report, **lie) for report in behaviours["good"](item)]

        view = await running(fleet, device, other)
        await device.until(check_ins)
        assert outcome(fleet, view, device) is Outcome.IN_PROGRESS
        (report,) = behaviours["good"](device.items["hello"])[-1:]
        device._say(report, device.accepted[-1])
        assert (await fleet.operator.decided(view)).state is RolloutState.SUCCEEDED


@pytest.mark.asyncio
async def test_quarantine_in_a_health_is_no_verdict_and_the_signed_report_is(new_fleet):
    async with new_fleet() as fleet:
        device = await fleet.device("a")
        device.answers_check_in = False
        view = await fleet.operator.deploy(await fleet.operator.publish("1.0.0"), waves="1, 100%", soak_s=3600)
        await fleet.device("b")
        view = await fleet.operator.follow(view, lambda view: view.devices[0].outcome is Outcome.SUCCEEDED)
        device.publish(
            Up.HEALTH, health(device, state=InstanceState.QUARANTINED, target=device.items["hello"].target, restarts=5)
        )
        await device.until(check_ins)
        assert outcome(fleet, view, device) is Outcome.SUCCEEDED
        fallen = device.report(
            device.items["hello"], Phase.FAILED, code=RejectCode.RESTARTED, message="in quarantine after 5 restarts"
        )
        device._say(fallen, device.accepted[-1])
        view = await fleet.operator.decided(view)
        assert view.state is RolloutState.REVERTED
        assert "in quarantine after 5 restarts" in view.reason


@pytest.mark.asyncio
async def test_reports_that_are_doubled_late_or_reordered_end_in_the_same(new_fleet, behaviours):
    async with new_fleet() as fleet:
        device = await fleet.device("a")
        view = await running(fleet, device, behaviours["silent"], waves="1, 100%", soak_s=3600)
        item, assignment = device.items["hello"], device.accepted[-1]

        def said(sequence, phase, **more):
            device.sequence = sequence - 1
            device._say(device.report(item, phase, **more), assignment)

        # it fell after its commit: the commit and the way there come late, and twice
        said(4, Phase.FAILED, code=RejectCode.RESTARTED, message="in quarantine")
        for _ in range(2):
            said(3, Phase.COMMITTED)
            said(2, Phase.PROBATION)
            said(1, Phase.FETCHING)
        said(5, Phase.IDLE)
        device.sequence = 5
        view = await fleet.operator.decided(view)
        await device.until(lambda device: device.acked == 5)
        assert outcome(fleet, view, device) is Outcome.FAILED
        assert view.state is RolloutState.REVERTED


@pytest.mark.asyncio
async def test_a_device_without_space_is_deferred_and_costs_no_rollout(new_fleet, behaviours):
    async with new_fleet() as fleet:
        full, other = await fleet.device("a"), await fleet.device("b")
        full.behaviour = lambda item: [
            full.report(item, Phase.FAILED, code=RejectCode.NO_SPACE, message="the disk is full")
        ]
        view = await fleet.operator.deploy(await fleet.operator.publish("1.0.0"), waves="100%")
        view = await fleet.operator.decided(view)
        assert view.state is RolloutState.SUCCEEDED
        found = {each.device: each for each in view.devices}
        assert found[other.id].outcome is Outcome.SUCCEEDED
        assert (found[full.id].outcome, found[full.id].code) == (Outcome.DEFERRED, RejectCode.NO_SPACE)
        assert (found[full.id].retrying, found[full.id].message) == (True, "the disk is full")
        code = RejectCode.INTERNAL
        last = full.report(full.items["hello"], Phase.FAILED, code=code, message="a bug", tries_ended=True)
        full._say(last, full.accepted[-1])
        view = await fleet.operator.follow(
            view, lambda view: not {each.device: each.retrying for each in view.devices}[full.id]
        )
        assert {each.device: (each.outcome, each.code) for each in view.devices}[full.id] == (Outcome.DEFERRED, code)
        why = await fleet.command("why", full.id)
        assert "(internal): a bug" in why.stdout
        newest, _, earlier = why.stdout.partition("(no-space)")
        assert ("retries this by itself" in newest, "retries this by itself" in earlier) == (False, True), why.stdout


@pytest.mark.asyncio
async def test_the_log_before_a_failure_reaches_the_operator(new_fleet, behaviours):
    """Whole in the device's history; its last lines in the rollout, of which there may be thousands."""
    log = tuple(f"2026-05-01T10:00:00Z line {number} {'x' * 200}" for number in range(190))
    async with new_fleet() as fleet:
        bad = await fleet.device("a")
        bad.behaviour = lambda item: [
            bad.report(item, Phase.ROLLED_BACK, code=RejectCode.TRAPPED, message="it traps", log=log)
        ]
        view = await fleet.operator.deploy(await fleet.operator.publish("1.0.0"), waves="100%")
        view = await fleet.operator.decided(view)
        assert view.devices[0].log == log[-bounds.LOG_LINES :]
        why = await fleet.command("why", bad.id, "--json")
        entries = json.loads(why.stdout)["entries"]
        assert next(each["log"] for each in entries if each.get("log")) == list(log)
        bare = await fleet.command("why", bad.id)
        assert ("fleet why DEVICE --log" in bare.stdout, log[-1] in bare.stdout) == (True, False)
        shown = await fleet.command("why", bad.id, "--log")
        assert (log[0] in shown.stdout, log[-1] in shown.stdout) == (True, True)


@pytest.mark.asyncio
async def test_a_removal_where_there_is_nothing_to_remove_is_decided_by_the_whole_assignment(new_fleet, behaviours):
    async with new_fleet() as fleet:
        device = await fleet.device("a")
        await fleet.operator.decided(await fleet.operator.deploy(await fleet.operator.publish("1.0.0")))
        view = await fleet.operator.deploy(None, instance="other")
        view = await fleet.operator.decided(view)
        assert view.state is RolloutState.SUCCEEDED
        assert view.devices[0].outcome is Outcome.SUCCEEDED
        # the assignment was the same as before, so the device was asked for its word
        assert len(check_ins(device)) == 1
        assert device.sequence == 5


def test_the_wait_between_requests_doubles_until_a_device_answers():
    from fleet.server.check_ins import ASK_FIRST_S, ASK_MAX_S, CheckIns

    now, sent = [0.0], []

    class Director:
        def command(self, device, verb):
            sent.append((now[0], device))

    asks = CheckIns(Director(), clock=lambda: now[0])
    while now[0] < 4 * ASK_MAX_S:
        asks.ask("a")
        now[0] += 10.0
    times = [at for at, _ in sent]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert gaps[:3] == [ASK_FIRST_S, 2 * ASK_FIRST_S, 4 * ASK_FIRST_S]
    assert max(gaps) == ASK_MAX_S
    asks.answered("a")
    assert not asks.ask("a")
    now[0] += ASK_FIRST_S
    assert asks.ask("a")
    assert asks.ask("b")

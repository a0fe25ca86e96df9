"""No device costs the server more than its budget: throttled, suspended, heard again; clones and certificates."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from fleet.protocol import operator_api, wire
from fleet.protocol.codes import AlertKind
from fleet.protocol.messages import Health, Hello, RenewRequest, Report
from fleet.protocol.topics import Topic, Up
from fleet.server import device_budget
from fleet.server.device_budget import DeviceBudget, TokenBucket
from fleet.server.limits import Rate, ServerLimits
from tests.eventually import eventually_async

NOW = datetime(2025, 6, 1, tzinfo=UTC)


def report(device, sequence, **more):
    return Report(device=device.id, boot_id="boot", sequence=sequence, at=NOW, assignment=0, **more)


def ingest_of(fleet):
    return fleet.server._ingest


async def kinds_shown(fleet, device):
    detail = await fleet.operator.get(operator_api.DeviceDetail, f"/v1/devices/{device.id}")
    return {alert.kind for alert in detail.alerts}


async def acts(fleet):
    audit = await fleet.operator.get(operator_api.Audit, "/v1/audit")
    return [(entry.act, entry.subject) for entry in audit.entries]


def publish(device, channel, payload):
    return device._client.publish(str(Topic(device.id, channel)), payload, qos=1)


@pytest.mark.asyncio
async def test_a_flood_is_throttled_then_refused_by_the_broker_and_heard_again_after_a_time(new_fleet, broker):
    async with new_fleet(broker) as fleet:
        hostile, witness = await fleet.device("hostile"), await fleet.device("witness")
        ingest, store = ingest_of(fleet), fleet.server._store
        flood = wire.encode(report(hostile, 1, message="x" * 60_000))
        for _ in range(600):
            sent = publish(hostile, Up.REPORT, flood)
            if broker == "embedded":  # slow: straight to the server, as Mosquitto would deliver them
                ingest.on_message(str(Topic(hostile.id, Up.REPORT)), flood)
        await asyncio.to_thread(sent.wait_for_publish, 120)
        witness.publish(Up.REPORT, report(witness, 1))
        await witness.until(lambda device: device.acked == 1)

        assert store.devices.suspended() == [hostile.id]
        assert len(store.delivery.reports(hostile.id, 1000)) == 1
        assert await kinds_shown(fleet, hostile) == {AlertKind.THROTTLED, AlertKind.SUSPENDED}
        assert await kinds_shown(fleet, witness) == set()
        status = await fleet.operator.get(operator_api.Status, "/v1/status")
        assert any(hostile.id in problem and "the broker refuses" in problem for problem in status.problems)
        metrics = (await fleet.operator.http.get("/metrics")).text
        assert 'wasmfleet_device_alerts{kind="suspended"} 1' in metrics
        assert 'wasmfleet_messages_total{kind="throttled"}' in metrics

        # the broker itself refuses what comes now, and still brings what is for the device
        before = ingest.dropped[hostile.id]
        sent = publish(hostile, Up.HELLO, b"{}")
        await asyncio.to_thread(sent.wait_for_publish, 60)
        witness.publish(Up.REPORT, report(witness, 2))
        await witness.until(lambda device: device.acked == 2)
        assert ingest.dropped[hostile.id] == before
        await fleet.operator.deploy(await fleet.operator.publish("1.0.0"))
        await hostile.until(lambda device: device.accepted)

        store._db.run("UPDATE alerts SET until = 1")
        fleet.server.keep_up()
        assert store.devices.suspended() == []

        def heard_again():
            hostile.publish(Up.REPORT, report(hostile, 2))  # the broker reads its list some time after the signal
            return hostile.acked == 2

        await eventually_async(heard_again, "a report of the device is stored again")
        assert ("alert-suspended", hostile.id) in await acts(fleet)
        assert ("lift-suspension", hostile.id) in await acts(fleet)


@pytest.mark.asyncio
async def test_a_suspension_outlives_the_server(new_fleet):
    async with new_fleet() as fleet:
        device = await fleet.device("a")
        fleet.server._store.devices.alert(device.id, AlertKind.SUSPENDED, "why", now=1, until=2**40)
        await fleet.stop()
        await fleet.start()
        assert f"user {device.id}\n" in (fleet.home / "server" / "broker" / "acl").read_text()
        assert not fleet.server._budget.admit(device.id, Up.STATE, 1)


@pytest.mark.asyncio
async def test_a_device_that_repeats_a_bad_message_is_read_no_more(new_fleet):
    async with new_fleet() as fleet:
        hostile, witness = await fleet.device("hostile"), await fleet.device("witness")
        ingest = ingest_of(fleet)
        bad = wire.encode(Hello(device=hostile.id, nonce="0" * 16, boot_id="b")).replace(
            b'"accepted":0', b'"accepted":9e99'
        )
        for _ in range(2 * int(device_budget.BAD_MESSAGES.burst)):
            ingest.on_message(str(Topic(hostile.id, Up.HELLO)), bad)
        assert ingest.bad[hostile.id] == device_budget.BAD_MESSAGES.burst
        assert ingest.counts["throttled"] == device_budget.BAD_MESSAGES.burst
        assert await kinds_shown(fleet, hostile) == {AlertKind.THROTTLED}
        detail = await fleet.operator.get(operator_api.DeviceDetail, f"/v1/devices/{hostile.id}")
        assert detail.dropped == 2 * device_budget.BAD_MESSAGES.burst
        witness.publish(Up.REPORT, report(witness, 1))
        await witness.until(lambda device: device.acked == 1)


@pytest.mark.asyncio
async def test_four_hundred_reports_with_fresh_keys_neither_grow_a_row_nor_stop_the_server(new_fleet, behaviours):
    async with new_fleet() as fleet:
        hostile = await fleet.device("hostile", behaviour=behaviours["silent"])
        rollout = await fleet.operator.deploy(await fleet.operator.publish("1.0.0"))
        await hostile.until(lambda device: device.accepted)
        for number in range(400):
            keys = {f"k{number}-{key}": 1 for key in range(2200)}
            hostile.publish(
                Up.REPORT, report(hostile, number + 1, rollout=rollout.id, instance="hello", timings_ms=keys)
            )
        witness = await fleet.device("witness", group="other")
        witness.publish(Up.REPORT, report(witness, 1))
        await witness.until(lambda device: device.acked == 1)
        view = await fleet.operator.send(operator_api.RolloutView, "POST", f"/v1/rollouts/{rollout.id}/abort")
        assert all(not device.timings_ms for device in view.devices)
        assert fleet.server._store.delivery.reports(hostile.id, 1000) == []


@pytest.mark.asyncio
async def test_of_one_device_a_number_of_rows_is_kept_and_nothing_of_others_is_dropped(new_fleet):
    async with new_fleet() as fleet:
        hostile, witness = await fleet.device("hostile"), await fleet.device("witness")
        store, now = fleet.server._store, datetime.now(UTC).timestamp()
        for number in range(1, 31):
            hostile.publish(Up.REPORT, report(hostile, number))
            store.devices.note(hostile.id, "online", f"{number}", now=now)
        witness.publish(Up.REPORT, report(witness, 1))
        await witness.until(lambda device: device.acked == 1)
        await hostile.until(lambda device: device.acked == 30)
        events = len(store.devices.events(witness.id, 100))
        fleet.server._config = replace(fleet.server._config, limits=ServerLimits(device_rows=20))
        fleet.server.keep_up()
        assert [row.sequence for row in store.delivery.reports(hostile.id, 100)] == list(range(30, 10, -1))
        assert [row.text for row in store.devices.events(hostile.id, 100)] == [f"{n}" for n in range(30, 10, -1)]
        assert len(store.delivery.reports(witness.id, 100)) == 1
        assert len(store.devices.events(witness.id, 100)) == events


@pytest.mark.asyncio
async def test_a_certificate_on_two_machines_is_seen(new_fleet):
    async with new_fleet() as fleet:
        device, rebooted = await fleet.device("cloned"), await fleet.device("rebooted")
        for number, boot in enumerate(("one", "two", "one", "two")):
            device.publish(Up.HELLO, Hello(device=device.id, nonce=f"{number:016x}", boot_id=boot))
        for number, boot in enumerate(("one", "two", "two", "three")):
            rebooted.publish(Up.HELLO, Hello(device=rebooted.id, nonce=f"{number:016x}", boot_id=boot))
        for each in (device, rebooted):
            each.publish(Up.REPORT, report(each, 1))
            await each.until(lambda device: device.acked == 1)
        assert await kinds_shown(fleet, device) == {AlertKind.CLONED}
        assert await kinds_shown(fleet, rebooted) == set()
        assert (await acts(fleet)).count(("alert-cloned", device.id)) == 1
        status = await fleet.operator.get(operator_api.Status, "/v1/status")
        assert any(device.id in problem and "two machines" in problem for problem in status.problems)


@pytest.mark.asyncio
async def test_a_key_is_given_few_certificates_and_others_theirs(new_fleet):
    async with new_fleet() as fleet:
        greedy, other = await fleet.device("greedy"), await fleet.device("other")

        def renew(device):
            with device.http() as http:
                request = RenewRequest(csr_pem=device.certificate_request())
                return http.post("/v1/renew", content=wire.encode(request)).status_code

        answers = [await asyncio.to_thread(renew, greedy) for _ in range(6)]
        assert answers == [200] * 4 + [429] * 2, "the first of five was given at enrolment"
        assert await asyncio.to_thread(renew, other) == 200


@pytest.mark.asyncio
async def test_a_device_that_asks_without_end_over_https_is_told_to_wait(new_fleet, monkeypatch):
    monkeypatch.setattr(ServerLimits, "requests", Rate(5, 0))
    async with new_fleet() as fleet:
        greedy, other = await fleet.device("greedy"), await fleet.device("other")

        def ask(device, times):
            with device.http() as http:
                return [http.get("/v1/tuf/timestamp.json").status_code for _ in range(times)]

        assert await asyncio.to_thread(ask, greedy, 8) == [200] * 5 + [429] * 3
        assert await asyncio.to_thread(ask, other, 1) == [200]


# Budgets alone


class Clock:
    """A clock that tests move."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_a_bucket_gives_its_burst_at_once_and_its_rate_in_the_long_run():
    bucket = TokenBucket(Rate(burst=3, per_s=0.5), 0.0)
    assert [bucket.take(1, 0.0) for _ in range(4)] == [True, True, True, False]
    assert not bucket.take(1, 1.0)
    assert bucket.take(1, 2.0)
    assert bucket.left(1000.0) == 3
    assert bucket.left(0.0) == 3, "a clock that falls gives nothing"


@pytest.mark.asyncio
async def test_what_an_agent_kept_for_a_server_that_was_away_is_within_the_budget(new_fleet):
    async with new_fleet() as fleet:
        device = await fleet.device("a")
        clock = Clock()
        budget = DeviceBudget(
            store=fleet.server._store,
            clock=lambda: NOW,
            monotonic=clock,
            silence=lambda: pytest.fail("suspended"),
            clear=pytest.fail,
        )
        assert budget.admit(device.id, Up.HELLO, 400)
        assert all(budget.admit(device.id, Up.REPORT, 4000) for _ in range(2000))
        for _ in range(60):
            clock.now += 60
            size = len(wire.encode(Health(device=device.id, boot_id="b", at=NOW))) * 20
            assert budget.admit(device.id, Up.HEALTH, size)


@pytest.mark.asyncio
async def test_a_hello_that_the_broker_delivers_twice_is_no_clone(new_fleet):
    async with new_fleet() as fleet:
        device = await fleet.enrol("a")
        budget = fleet.server._budget
        hellos = [Hello(device=device.id, nonce=f"{number:016x}", boot_id=f"boot-{number}") for number in range(3)]
        for hello in (*hellos, *hellos, hellos[0]):
            budget.greet(hello)
        assert fleet.server._store.devices.alerts() == []


@pytest.mark.asyncio
async def test_a_device_that_connects_without_end_is_shown(new_fleet):
    """A copied memory image has the same boot id on both machines."""

    async with new_fleet() as fleet:
        device = await fleet.enrol("a")
        for number in range(int(device_budget.CONNECTS.burst) + 1):
            fleet.server._budget.greet(Hello(device=device.id, nonce=f"{number:016x}", boot_id="boot"))
        (alert,) = fleet.server._store.devices.alerts()
        assert (alert.device, alert.kind) == (device.id, AlertKind.CLONED)


@pytest.mark.asyncio
async def test_a_clock_that_is_set_back_makes_no_suspension_longer(new_fleet):
    async with new_fleet() as fleet:
        device = await fleet.enrol("a")
        times, told = [NOW], []
        budget = DeviceBudget(
            store=fleet.server._store,
            clock=lambda: times[-1],
            monotonic=Clock(),
            silence=lambda: told.append(fleet.server._store.devices.suspended()),
            clear=lambda topic: None,
        )

        def flood():
            while device.id not in budget.suspended:
                budget.admit(device.id, Up.REPORT, 60_000)

        flood()
        times.append(NOW - timedelta(seconds=60))
        budget.lift()
        assert budget.suspended == {device.id}
        times.append(NOW - timedelta(hours=20))
        budget.lift()
        assert budget.suspended == set()
        flood()
        assert told == [[device.id], [], [device.id]], "a second suspension is the broker's too"

"""A bad message loses itself alone: whatever one device or one client sends, the others are heard and answered."""

import asyncio
import json
import logging
import re
from datetime import UTC, datetime

import msgspec
import pytest

from fleet.protocol import bounds, messages, operator_api, trust_api, wire
from fleet.protocol.codes import InstanceState, Phase
from fleet.protocol.messages import Health, Hello, InstanceHealth, LogChunk, Report, State
from fleet.protocol.topics import Topic, Up
from fleet.server.api.routes import ROUTES

NOW = datetime(2025, 6, 1, tzinfo=UTC)
CLASSES = {
    kind.__name__ for module in (messages, operator_api, trust_api) for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and re.fullmatch("([A-Z][a-z]+){2,}", kind.__name__)
}  # fmt: skip
HUGE = (2**63, 2**64, 10**400, -(2**63) - 1)


def said(device):
    """One sound message of each kind."""
    figure = InstanceHealth(instance="hello", target="", generation=1, state=InstanceState.RUNNING, calls={"ok": 1})
    return {
        Up.HELLO: Hello(device=device, nonce="0" * 16, boot_id="boot"),
        Up.STATE: State(device=device, online=True),
        Up.HEALTH: Health(device=device, boot_id="boot", at=NOW, instances=(figure,)),
        Up.REPORT: Report(device=device, boot_id="boot", sequence=1, at=NOW, assignment=1, timings_ms={"idle": 1}),
    }


def places(value, path=()):
    """Where whole numbers stand in a message."""
    match value:
        case bool():
            return
        case int():
            yield path
        case dict():
            for key, each in value.items():
                yield from places(each, (*path, key))
        case list():
            for number, each in enumerate(value):
                yield from places(each, (*path, number))


def spoiled(message, path, value):
    """The JSON of a message with another value in one place."""
    tree = msgspec.to_builtins(message)
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return json.dumps(tree).encode()


def ingest_of(fleet):
    return fleet.server._ingest


@pytest.mark.asyncio
async def test_a_number_that_no_database_holds_loses_its_own_message_alone(new_fleet):
    async with new_fleet() as fleet:
        hostile, witness = await fleet.device("hostile"), await fleet.device("witness")
        ingest, sequence, sent = ingest_of(fleet), 0, 0
        for channel, message in said(hostile.id).items():
            for path in places(msgspec.to_builtins(message)):
                for number in HUGE:
                    ingest.on_message(str(Topic(hostile.id, channel)), spoiled(message, path, number))
                    sent += 1
                # in the same batch
                sequence += 1
                report = Report(device=witness.id, boot_id="boot", sequence=sequence, at=NOW, assignment=0)
                ingest.on_message(str(Topic(witness.id, Up.REPORT)), wire.encode(report))
                ingest.flush()
                assert len(fleet.server._store.delivery.reports(witness.id, 1000)) == sequence, (channel, path)
        await witness.until(lambda device: device.acked == sequence)
        assert ingest.bad[hostile.id] == ingest.counts["malformed"] == sent
        assert ingest.bad[witness.id] == 0
        status = await fleet.operator.get(operator_api.Status, "/v1/status")
        assert any(hostile.id in problem and str(sent) in problem for problem in status.problems)


@pytest.mark.asyncio
async def test_it_is_dropped_when_it_comes_through_the_broker_too(new_fleet):
    async with new_fleet() as fleet:
        hostile, witness = await fleet.device("hostile"), await fleet.device("witness")
        hello = Hello(device=hostile.id, nonce="0" * 16, boot_id="boot", accepted=2**63)
        for sequence in range(1, 4):
            hostile.publish(Up.HELLO, hello)
            witness.publish(
                Up.REPORT, Report(device=witness.id, boot_id="boot", sequence=sequence, at=NOW, assignment=0)
            )
        await witness.until(lambda device: device.acked == 3)


@pytest.mark.asyncio
async def test_a_handler_that_always_fails_for_one_device_does_not_cost_the_connection(new_fleet):
    async with new_fleet() as fleet:
        hostile, witness = await fleet.device("hostile"), await fleet.device("witness")
        bus = fleet.server._bus
        sound, connection = bus._on_message, bus._client

        def broken(topic, payload):
            if hostile.id in topic:
                raise ValueError("a fault of our own")
            sound(topic, payload)

        bus._on_message = broken
        for sequence in (1, 2, 3):
            for device in (hostile, witness):
                report = Report(device=device.id, boot_id="boot", sequence=sequence, at=NOW, assignment=0)
                device.publish(Up.REPORT, report)
        await witness.until(lambda device: device.acked == 3)
        assert bus._client is connection


@pytest.mark.parametrize("step", ["hear_hello", "hear_state", "hear_health", "add_report", "acknowledge", "get"])
@pytest.mark.asyncio
async def test_a_fault_with_one_message_leaves_the_rest_of_its_batch(new_fleet, monkeypatch, caplog, step):
    """Whatever goes wrong with one device's message, at whichever step of a batch."""

    async with new_fleet() as fleet:
        hostile, witness = await fleet.device("hostile"), await fleet.device("witness")
        ingest, store = ingest_of(fleet), fleet.server._store
        ingest.flush()
        part = store.delivery if step in {"add_report", "acknowledge"} else store.devices
        sound = getattr(part, step)

        def broken(first, *more, **named):
            found = sound(first, *more, **named)
            if hostile.id in repr(first):
                raise ValueError("a fault with this one")
            return found

        monkeypatch.setattr(part, step, broken)
        caplog.set_level(logging.WARNING)
        for _ in range(3):
            for channel, message in said(hostile.id).items():
                ingest.on_message(str(Topic(hostile.id, channel)), wire.encode(message))
            for channel, message in said(witness.id).items():
                ingest.on_message(str(Topic(witness.id, channel)), wire.encode(message))
            ingest.flush()
        assert len(store.delivery.reports(witness.id, 10)) == 1
        assert store.devices.get(witness.id).health is not None
        assert ingest.bad[hostile.id] >= 1
        assert ingest.bad[witness.id] == 0
        assert len(store.delivery.reports(hostile.id, 10)) == (0 if step == "add_report" else 1)
        assert sum(hostile.id in record.getMessage() for record in caplog.records) == 1, "said once"
        await witness.until(lambda device: device.acked == 1)


@pytest.mark.asyncio
async def test_an_answer_that_fails_stops_neither_the_rollouts_nor_other_answers(new_fleet, monkeypatch):
    async with new_fleet() as fleet:
        hostile, witness = await fleet.device("hostile"), await fleet.device("witness")
        ingest, woken = ingest_of(fleet), []
        ingest.flush()
        director, controller = fleet.server._director, fleet.server._conductor
        sound = director.acknowledge

        def broken(name, ack):
            if name == hostile.id:
                raise ValueError("a fault with this one")
            return sound(name, ack)

        monkeypatch.setattr(director, "acknowledge", broken)
        monkeypatch.setattr(controller, "wake", lambda: woken.append(True))
        for device in (hostile, witness):
            data = wire.encode(said(device.id)[Up.REPORT])
            ingest.on_message(str(Topic(device.id, Up.REPORT)), data)
        ingest.flush()
        assert woken
        await witness.until(lambda device: device.acked == 1)
        assert ingest.bad == {hostile.id: 1}


@pytest.mark.asyncio
async def test_what_a_database_gave_up_as_a_whole_is_not_acknowledged_and_taken_when_it_comes_again(
    new_fleet, monkeypatch
):
    async with new_fleet() as fleet:
        device = await fleet.device("a")
        ingest, store = ingest_of(fleet), fleet.server._store
        ingest.flush()
        data = wire.encode(said(device.id)[Up.REPORT])

        def full(_row):
            store._db.run("INSERT OR ROLLBACK INTO devices SELECT * FROM devices")  # as a full disk may do

        with monkeypatch.context() as patch:
            patch.setattr(store.delivery, "add_report", full)
            ingest.on_message(str(Topic(device.id, Up.REPORT)), data)
            ingest.flush()
        assert (store.delivery.reports(device.id, 10), ingest.counts["failed"], ingest.bad) == ([], 1, {})
        ingest.on_message(str(Topic(device.id, Up.REPORT)), data)
        ingest.flush()
        await device.until(lambda device: device.acked == 1)


@pytest.mark.asyncio
async def test_a_report_whose_time_has_no_zone_is_refused(new_fleet):
    async with new_fleet() as fleet:
        device = await fleet.device("a")
        ingest = ingest_of(fleet)
        for channel, field in ((Up.REPORT, "at"), (Up.HEALTH, "at")):
            data = spoiled(said(device.id)[channel], (field,), "2025-06-01T00:00:00")
            ingest.on_message(str(Topic(device.id, channel)), data)
        ingest.flush()
        assert ingest.counts["malformed"] == 2
        assert fleet.server._store.delivery.reports(device.id, 10) == []


@pytest.mark.asyncio
async def test_what_was_stored_before_there_were_bounds_stays_readable(new_fleet):
    """Health and reports lie in the store as they came, from servers that took any number."""

    async with new_fleet() as fleet:
        device = await fleet.device("a")
        store, operator = fleet.server._store, fleet.operator
        messages = said(device.id)
        health = spoiled(messages[Up.HEALTH], ("instances", 0, "restarts"), 2**70)
        report = spoiled(messages[Up.REPORT], ("timings_ms", "idle"), 2**70)
        store._db.run("UPDATE devices SET health = ?, health_at = 1, accepted = ?", health, 2**63 - 1)
        columns = {
            "device": device.id,
            "boot_id": "boot",
            "sequence": 2**62,
            "at": 1.0,
            "rollout": "",
            "raw": report,
        }
        store._db.insert("reports", columns)
        (row,) = (await operator.get(operator_api.Devices, "/v1/devices")).devices
        assert (row.accepted, row.instances) == (2**63 - 1, ())
        assert (await operator.get(operator_api.DeviceDetail, f"/v1/devices/{device.id}")).health is None
        timeline = await operator.get(operator_api.Timeline, f"/v1/devices/{device.id}/timeline")
        assert "a report that cannot be read" in [entry.text for entry in timeline.entries]


@pytest.mark.asyncio
async def test_the_row_that_all_reports_of_a_rollout_add_to_does_not_grow_with_them(new_fleet, behaviours):
    async with new_fleet() as fleet:
        device = await fleet.device("a", behaviour=behaviours["silent"])
        rollout = await fleet.operator.deploy(await fleet.operator.publish("1.0.0"))
        await device.until(lambda device: device.accepted)
        ingest = ingest_of(fleet)
        for sequence in (1, 2):
            report = Report(
                device=device.id,
                boot_id="boot",
                sequence=sequence,
                at=NOW,
                assignment=1,
                rollout=rollout.id,
                instance="hello",
                phase=Phase.FETCHING,
                progress=sequence,
                timings_ms={"fetching": sequence, **{f"x{sequence}-{number}": 1 for number in range(60)}},
            )
            ingest.on_message(str(Topic(device.id, Up.REPORT)), wire.encode(report))
        ingest.flush()
        (view,) = (await fleet.operator.get(operator_api.RolloutView, f"/v1/rollouts/{rollout.id}")).devices
        assert view.timings_ms == {"fetching": 2}


# The API

QUERIES = ("²", "٣", "-1", "1e3", "0x10", "1.5", "", " 1", "9" * 19, "9" * 400, "NaN", "1_000")
ASKED = [
    ("/v1/devices/{id}/timeline", "limit"),
    ("/v1/devices/{id}/reports", "after"),
    ("/v1/devices/{id}/logs", "command"),
    ("/v1/devices/{id}/logs", "after"),
    ("/v1/rollouts", "limit"),
    ("/v1/rollouts/{id}", "since"),
    ("/v1/rollouts/{id}", "wait"),
    ("/v1/audit", "limit"),
    ("/v1/online", "wait"),
]


@pytest.mark.asyncio
async def test_a_query_that_is_no_number_is_refused_by_name(new_fleet):
    async with new_fleet() as fleet:
        device = await fleet.device("a")
        target = await fleet.operator.publish("1.0.0")
        rollout = await fleet.operator.deploy(target)
        for path, name in ASKED:
            where = path.replace("{id}", rollout.id if "rollouts" in path else device.id)
            for value in QUERIES:
                reply = await fleet.operator.http.get(where, params={name: value})
                assert reply.status_code == 400, (path, name, value, reply.text)
                assert name in msgspec.json.decode(reply.content, type=operator_api.Problem).title


ODD = ("²", "9" * 19, "9" * 400, "-1", "%00", "%ED%A0%80", "1e400", "٣")


@pytest.mark.asyncio
async def test_no_path_and_no_body_of_any_route_ends_in_a_fault_of_the_server(new_fleet):
    """Every route of the table, with odd path parts, and with huge numbers in each number of its body."""

    async with new_fleet() as fleet:
        device = await fleet.device("a")
        http = fleet.operator.http
        for route in ROUTES:
            method, path, request = route.method, route.path, route.request
            for value in ODD if "{" in path else ("",):
                reply = await http.request(method.upper(), re.sub(r"{\w+}", value, path), content=b"{}")
                assert reply.status_code < 500, (method, path, value, reply.text)
                assert not CLASSES & set(re.findall(r"\w+", reply.text)), (method, path)
            if not isinstance(request, type):
                continue
            where = path.replace("{id}", device.id).replace("{name}", "edge")
            for name, number in ((name, number) for name in _numbers(request) for number in (*HUGE, 1e300)):
                reply = await http.request(method.upper(), where, content=json.dumps({name: number}).encode())
                problem = msgspec.json.decode(reply.content, type=operator_api.Problem)
                assert reply.status_code == 400, (path, name, number, reply.text)
                assert f"$.{name}" in problem.detail, problem
                assert not CLASSES & set(re.findall(r"\w+", f"{problem.title} {problem.detail}")), problem


@pytest.mark.asyncio
async def test_nothing_that_a_device_asks_for_ends_in_a_fault_of_the_server(new_fleet):
    """The listener for devices, with odd path parts, odd nonces and huge numbers."""

    async with new_fleet() as fleet:
        device = await fleet.device("a")
        chunk = LogChunk(instance="hello", command=1, left_out=1)

        def ask():
            with device.http() as http:
                for path in ("/v1/tuf/{}", "/v1/artifacts/{}", "/v1/secrets/{}", "/v1/desired?nonce={}"):
                    for value in ODD:
                        yield path.format(value), http.get(path.format(value)).status_code
                for name in ("v", "command", "left_out"):
                    for number in HUGE:
                        reply = http.post("/v1/logs", content=spoiled(chunk, (name,), number))
                        yield f"{name}={number}", reply.status_code

        answers = await asyncio.to_thread(lambda: list(ask()))
        assert len(answers) > len(HUGE)
        assert {status for _, status in answers} <= {400, 404}, answers


def _numbers(kind):
    return [
        field.name
        for field in msgspec.inspect.type_info(kind).fields
        if "IntType" in repr(field.type) and field.name not in {"v", "verb"}
    ]


@pytest.mark.asyncio
async def test_a_rollout_with_a_number_that_cannot_be_meant_is_refused_by_name(new_fleet):
    async with new_fleet() as fleet:
        await fleet.device("a")
        target = await fleet.operator.publish("1.0.0")
        for name in ("port", "attempt", "soak_s", "failures", "timeout_s"):
            for number in (*HUGE, bounds.NUMBER_MAX + 1, -1):
                body = {"instance": "hello", "target": target, "group": "edge", name: number}
                for path in ("/v1/rollouts", "/v1/preflight"):
                    reply = await fleet.operator.http.post(path, content=json.dumps(body).encode())
                    assert reply.status_code == 400, (path, name, number, reply.text)
                    assert name in reply.text


@pytest.mark.asyncio
async def test_the_largest_numbers_are_taken(new_fleet):
    async with new_fleet() as fleet:
        device = await fleet.device("a")
        ingest = ingest_of(fleet)
        most = Report(
            device=device.id,
            boot_id="boot",
            sequence=1,
            at=NOW,
            assignment=bounds.NUMBER_MAX,
            progress=100,
            phase=Phase.FETCHING,
            refused=bounds.NUMBER_MAX,
            timings_ms={"fetching": bounds.NUMBER_MAX},
        )
        ingest.on_message(str(Topic(device.id, Up.REPORT)), wire.encode(most))
        ingest.flush()
        assert len(fleet.server._store.delivery.reports(device.id, 10)) == 1

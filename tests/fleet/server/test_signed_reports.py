"""Signed reports: a device's word counts by its own key, and nobody on the bus, nor a server, speaks for it."""

import asyncio
import base64
import sys
from datetime import UTC, datetime

import msgspec
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fleet.protocol import operator_api, wire
from fleet.protocol.codes import Phase, RejectCode
from fleet.protocol.messages import Health, Report, State
from fleet.protocol.operator_api import History
from fleet.protocol.topics import Topic, Up
from signing import dsse
from signing.device_statements import DeviceSigner, audit


def voice(device):
    return DeviceSigner(device.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def report(device, sequence, previous="", **more):
    made = Report(
        device=device.id,
        boot_id="boot",
        sequence=sequence,
        at=datetime.now(UTC),
        assignment=1,
        instance="hello",
        target="components/main/hello/1.0.0.wasm",
        phase=Phase.COMMITTED,
        previous=previous,
    )
    return wire.encode(msgspec.structs.replace(made, **more))


@pytest.mark.asyncio
async def test_reports_are_heard_from_the_devices_own_key_only(new_fleet):
    async with new_fleet() as fleet:
        crane, lift = await fleet.device("crane"), await fleet.device("lift")
        ingest, topic = fleet.server._ingest, str(Topic(crane.id, Up.REPORT))

        def stored():
            ingest.flush()
            return len(fleet.server._store.delivery.reports(crane.id, 10))

        first = voice(crane).sign(report(crane, 1))
        ingest.on_message(topic, first)
        assert stored() == 1
        # spoofed: by another device's key, without a signature, changed, or another device's own report
        ingest.on_message(topic, voice(lift).sign(report(crane, 2)))
        ingest.on_message(topic, report(crane, 2))
        at = first.index(b'"payload":"') + 30
        ingest.on_message(topic, first[:at] + bytes([first[at] ^ 1]) + first[at + 1 :])
        ingest.on_message(topic, voice(lift).sign(report(lift, 2)))
        assert stored() == 1
        assert ingest.counts["forged"] == 4
        # replayed: it counts once
        ingest.on_message(topic, first)
        assert stored() == 1
        await crane.until(lambda device: device.acked == 1)

        # and what the server keeps is the device's own word, byte for byte
        page = await fleet.operator.get(History, f"/v1/devices/{crane.id}/reports")
        assert [bytes(each) for each in page.reports] == [first]
        assert (page.boot_id, page.sequence) == ("boot", 1)
        more = await fleet.operator.get(
            History, f"/v1/devices/{crane.id}/reports", boot_id=page.boot_id, after=page.sequence
        )
        assert more.reports == ()
        verdict = audit(crane.id, page.certificate_pem.encode(), [bytes(each) for each in page.reports], None)
        assert verdict.findings == ()
        assert verdict.seen.sha256 == dsse.parse(first).sha256
        timeline = await fleet.operator.get(operator_api.Timeline, f"/v1/devices/{crane.id}/timeline")
        assert "hello: main/hello@1.0.0 is committed" in [entry.text for entry in timeline.entries]


async def audit_verify(fleet, *arguments):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fleet.cli.main", "--home", str(fleet.home), "audit", "verify", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, " ".join(output.decode().split()), errors.decode()


@pytest.mark.asyncio
async def test_records_that_an_earlier_server_stored_are_named_and_everything_else_is_judged(new_fleet):
    """A time without a zone, numbers beyond 64 bits, and rows that a power cut filled with zeros."""
    async with new_fleet() as fleet:
        crane, lift = await fleet.device("crane"), await fleet.device("lift")
        ingest = fleet.server._ingest
        for device in (crane, lift):
            ingest.on_message(str(Topic(device.id, Up.REPORT)), voice(device).sign(report(device, 1)))
        no_zone = report(crane, 2).replace(b'Z"', b'"')
        assert b"+00:00" not in no_zone
        ingest.on_message(str(Topic(crane.id, Up.REPORT)), voice(crane).sign(no_zone))
        ingest.flush()
        assert ingest.counts["malformed"] == 1, "refused now"
        rows = (
            voice(crane).sign(no_zone),
            voice(crane).sign(report(crane, 3).replace(b'"sequence":3', b'"sequence":' + b"9" * 40)),
            voice(crane).sign(b"[" * 5000),
            b"\0" * 400,
            b"",
            b'{"payloadType": "' + base64.b64encode(b"\xff" * 20),
        )
        with fleet.server._store.atomic():
            for number, raw in enumerate(rows, 2):
                sql = (
                    "INSERT INTO reports (device, boot_id, sequence, at, rollout, raw) VALUES (?, 'boot', ?, 1, '', ?)"
                )
                fleet.server._store._db.run(sql, crane.id, number, raw)
        code, output, errors = await audit_verify(fleet)
        assert (code, errors) == (1, "")
        assert "Reports: 2 good, 6 bad." in output
        assert "1 of 2 devices' histories are authentic" in output
        assert "3 reports that this device signed and that cannot be read: number 2 of boot 'boot'" in output
        assert "number 5 of boot 'boot' is damaged in the server's database" in output
        assert output.count("hello committed nothing") == 2, "the good report of each device is listed"


def statements(fleet):
    """Record the statements that the server's database runs from now on, but for what only reads."""
    seen = []

    def note(statement):
        if not statement.lstrip().upper().startswith(("SELECT", "WITH")):
            seen.append(" ".join(statement.split()))

    fleet.server._store._db._db.conn.set_trace_callback(note)
    return seen


@pytest.mark.asyncio
async def test_that_a_device_signs_is_written_with_its_first_report(new_fleet):
    async with new_fleet() as fleet:
        crane, lift = await fleet.device("crane"), await fleet.device("lift")
        ingest, store = fleet.server._ingest, fleet.server._store
        ingest.flush()
        seen = statements(fleet)
        for device in (crane, lift):
            ingest.on_message(str(Topic(device.id, Up.REPORT)), voice(device).sign(report(device, 1)))
        assert not seen, "a transaction for each device would wait for the disk each time"
        # what comes unsigned in the same batch is refused already
        ingest.on_message(str(Topic(crane.id, Up.REPORT)), report(crane, 2))
        assert ingest.counts["forged"] == 1
        ingest.flush()
        assert seen.count("COMMIT") == 1
        assert store.devices.signs(crane.id)
        assert store.devices.signs(lift.id)


@pytest.mark.asyncio
async def test_the_health_of_many_devices_asks_the_store_once(new_fleet):
    async with new_fleet() as fleet:
        ingest, store = fleet.server._ingest, fleet.server._store
        devices = [f"b{number}-{number:08x}" for number in range(30)]
        for device in devices:
            store.devices.add(
                device=device, name="b", machine="", sealing_key="", key_sha256=device, group="edge", now=1.0
            )
            store.devices.hear_state(State(device=device, online=True), 2.0)
        ingest.flush()
        seen = []
        store._db._db.conn.set_trace_callback(seen.append)
        for device in devices:
            health = Health(device=device, boot_id="boot", at=datetime.now(UTC), committed=1)
            ingest.on_message(str(Topic(device, Up.HEALTH)), wire.encode(health))
        ingest.flush()
        store._db._db.conn.set_trace_callback(None)
        written = [each for each in seen if each.startswith("UPDATE devices SET health_at")]
        assert len(written) == 30
        assert len(seen) - len(written) < 10, "queries and savepoints of the whole batch"
        assert [row.committed for row in store.devices.some(devices)] == [1] * 30


@pytest.mark.asyncio
async def test_that_a_device_signs_is_written_later_when_its_batch_is_lost(new_fleet, monkeypatch):
    async with new_fleet() as fleet:
        crane = await fleet.device("crane")
        ingest, store = fleet.server._ingest, fleet.server._store
        ingest.flush()

        def full(_row):
            store._db.run("INSERT OR ROLLBACK INTO devices SELECT * FROM devices")  # as a full disk may do

        with monkeypatch.context() as patch:
            patch.setattr(store.delivery, "add_report", full)
            ingest.on_message(str(Topic(crane.id, Up.REPORT)), voice(crane).sign(report(crane, 1)))
            ingest.flush()
        assert not store.devices.signs(crane.id)
        ingest.on_message(str(Topic(crane.id, Up.REPORT)), report(crane, 2))
        assert ingest.counts["forged"] == 1, "its key has spoken"
        ingest.flush()
        assert store.devices.signs(crane.id)


@pytest.mark.asyncio
async def test_reports_of_one_batch_raise_the_revision_of_their_rollout_once(new_fleet, behaviours):
    async with new_fleet() as fleet:
        device = await fleet.device("a", behaviour=behaviours["silent"])
        view = await fleet.operator.deploy(await fleet.operator.publish("1.0.0"))
        await device.until(lambda device: device.accepted)
        ingest, store = fleet.server._ingest, fleet.server._store
        ingest.flush()
        before = store.rollouts.get(view.id).revision
        for sequence, phase in enumerate((Phase.FETCHING, Phase.COMPILING, Phase.SWAPPING), 1):
            words = report(device, sequence, rollout=view.id, phase=phase, timings_ms={phase.value: sequence})
            ingest.on_message(str(Topic(device.id, Up.REPORT)), voice(device).sign(words))
        ingest.flush()
        assert store.rollouts.get(view.id).revision == before + 1
        member, extra = store.rollouts.member(view.number, device.id)
        assert (member.phase, member.sequence) == (Phase.SWAPPING, 3)
        assert extra.timings_ms == {"fetching": 1, "compiling": 2, "swapping": 3}


@pytest.mark.asyncio
async def test_a_message_that_ends_with_its_last_line_leaves_no_gap_in_the_sentence(new_fleet):
    async with new_fleet("embedded") as fleet:
        crane = await fleet.device("crane")
        running = "components/main/hello/0.9.0.wasm"
        body = report(
            crane,
            1,
            phase=Phase.ROLLED_BACK,
            code=RejectCode.TRAPPED,
            message="wasm trap: unreachable\n",
            running=running,
        )
        fleet.server._ingest.on_message(str(Topic(crane.id, Up.REPORT)), voice(crane).sign(body))
        fleet.server._ingest.flush()
        entries = (await fleet.operator.get(operator_api.Timeline, f"/v1/devices/{crane.id}/timeline")).entries
        text = next(each.text for each in entries if each.kind == "report")
        assert "wasm trap: unreachable; main/hello@0.9.0 answers again" in text

"""Days, losses and restarts: what expires is renewed, what was restored catches up, what was said is heard."""

import asyncio
import contextlib
import ssl
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from cryptography import x509

from fleet import ca
from fleet.protocol import operator_api, wire
from fleet.protocol.assignment import Assignment
from fleet.protocol.codes import Outcome, Phase, RolloutState
from fleet.protocol.messages import Ack, Hello
from fleet.protocol.topics import Up
from fleet.protocol.trust_api import OperatorReply, OperatorRequest, Operators, Role
from fleet.server import director
from fleet.server.broker import broker
from fleet.server.service import Server
from signing import dsse, repository
from signing.state import VERSION_MAX


class Ahead(Server):
    """A server whose clock the story sets ahead."""

    ahead = timedelta()


@pytest.fixture
def later(new_fleet):
    """A fleet whose server's clock can be set ahead: `async with later() as fleet`."""

    @contextlib.asynccontextmanager
    async def run():
        Ahead.ahead = timedelta()
        async with new_fleet() as fleet:
            await fleet.stop()
            fleet.server = Ahead(fleet.home, clock=lambda: datetime.now(UTC) + Ahead.ahead)
            await fleet.server.start()
            await fleet.server._bus.wait_connected()
            yield fleet
        Ahead.ahead = timedelta()

    return run


@pytest.mark.asyncio
async def test_online_roles_are_signed_again_before_they_expire(later):
    async with later() as fleet:

        async def timestamp():
            status = await fleet.operator.get(operator_api.Status, "/v1/status")
            return next(role for role in status.roles if role.role == "timestamp")

        first = await timestamp()
        fleet.server.keep_up()
        assert await timestamp() == first
        Ahead.ahead = repository.LIFE["timestamp"] * 0.6
        fleet.server.keep_up()
        second = await timestamp()
        assert second.version == first.version + 1
        assert second.expires > first.expires


@pytest.mark.asyncio
async def test_an_expired_role_is_named_in_the_status(later):
    async with later() as fleet:
        Ahead.ahead = repository.LIFE["namespace"] + timedelta(days=1)
        status = await fleet.operator.get(operator_api.Status, "/v1/status")
        assert any("main expired" in problem for problem in status.problems)


@pytest.mark.asyncio
async def test_an_assignment_is_issued_again_before_it_expires_and_asks_for_the_same(later):
    async with later() as fleet:
        device = await fleet.device("a")
        target = await fleet.operator.publish("1.0.0")
        await fleet.operator.decided(await fleet.operator.deploy(target))
        Ahead.ahead = director.LIFE * 0.5
        fleet.server.keep_up()
        assert len(device.envelopes) == 1
        Ahead.ahead = director.LIFE * 0.7
        fleet.server.keep_up()
        envelope = (await device.until(lambda device: device.envelopes[1:]))[0]
        again = msgspec.json.decode(dsse.parse(envelope).payload, type=Assignment)
        assert (again.version, again.items) == (2, device.accepted[0].items)
        assert again.expires > device.accepted[0].expires


@pytest.mark.asyncio
async def test_the_listeners_certificate_is_renewed_while_they_listen(later):
    async with later() as fleet:

        async def shown():
            host, _, port = fleet.made.url.removeprefix("https://").rpartition(":")
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the new one is of the day after
            _, writer = await asyncio.open_connection(host, int(port), ssl=context)
            der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            writer.close()
            return x509.load_der_x509_certificate(der)

        first = await shown()
        Ahead.ahead = ca.SERVER_LIFE * 0.6
        fleet.server.keep_up()
        assert (await shown()).serial_number == first.serial_number
        Ahead.ahead = ca.SERVER_LIFE * 0.7
        fleet.server.keep_up()
        renewed = await shown()
        assert renewed.serial_number != first.serial_number


@pytest.mark.asyncio
async def test_old_reports_are_forgotten_and_the_audit_log_is_not(later):
    async with later() as fleet:
        device = await fleet.device("a")
        target = await fleet.operator.publish("1.0.0")
        await fleet.operator.decided(await fleet.operator.deploy(target))
        acts = (await fleet.operator.get(operator_api.Audit, "/v1/audit")).entries
        Ahead.ahead = timedelta(days=91)
        fleet.server.keep_up()
        assert fleet.server._store.delivery.reports(device.id, 10) == []
        assert (await fleet.operator.get(operator_api.Audit, "/v1/audit")).entries == acts


@pytest.mark.asyncio
async def test_a_database_that_was_restored_from_a_backup_goes_on_above_what_devices_accepted_once_asked(new_fleet):
    async with new_fleet() as fleet:
        operator, device = fleet.operator, await fleet.device("a")
        target = await operator.publish("1.0.0")
        await operator.decided(await operator.deploy(target))
        fleet.server._store.backup(fleet.directory / "backup.db")
        for number in (2, 3):
            await operator.decided(await operator.deploy(await operator.publish(f"{number}.0.0")))
        assert device.accepted[-1].version == 3
        await device.disconnect()
        await fleet.stop()
        database = fleet.home / "server" / "fleet.db"
        for leftover in database.parent.glob("fleet.db-*"):
            leftover.unlink()
        (fleet.directory / "backup.db").replace(database)

        await fleet.start()
        await device.connect()
        # what the restored server wants comes on an operator's word, with a version that the device accepts
        wish = operator_api.ReconcileRequest(mode="impose", dry_run=False)
        while (await operator.send(operator_api.Reconciliation, "POST", "/v1/reconcile", wish)).devices[0].obstacle:
            await fleet.server._conductor._watch._event.wait()
        await device.until(lambda device: device.items["hello"].target == target)
        assert device.accepted[-1].version == 4
        view = await operator.decided(await operator.deploy(await operator.publish("4.0.0")))
        assert view.state is RolloutState.SUCCEEDED


@pytest.mark.skipif(broker.find() is None, reason="mosquitto is not installed")
@pytest.mark.asyncio
async def test_what_devices_report_while_the_server_is_away_is_kept_by_a_broker_of_its_own(new_fleet, external_broker):
    """Somebody else's broker outlives the server; reports wait there, and the device still has them besides."""

    async with new_fleet() as fleet:
        broker = await external_broker(fleet)
        device = await fleet.device("a")
        try:
            device.behaviour = lambda _item: []
            target = await fleet.operator.publish("1.0.0")
            view = await fleet.operator.deploy(target)
            await device.until(lambda device: device.items)
            await fleet.stop()
            device._say(device.report(device.items["hello"], Phase.COMMITTED), device.accepted[-1])
            await fleet.start()
            view = await fleet.operator.decided(view)
            assert [each.outcome for each in view.devices] == [Outcome.SUCCEEDED]
            status = await fleet.operator.get(operator_api.Status, "/v1/status")
            assert status.broker == "external"
        finally:
            await device.disconnect(politely=True)
            await fleet.stop()
            await broker.stop()


@pytest.mark.asyncio
async def test_a_silent_broker_is_raised_by_the_server(later):
    """Devices that ask over HTTPS for what the broker should have brought them tell on it."""

    async with later() as fleet:

        async def problems():
            found = (await fleet.operator.get(operator_api.Status, "/v1/status")).problems
            return [each for each in found if "the broker keeps assignments" in each]

        device = await fleet.enrol("a")  # it is never heard on the broker
        await fleet.operator.deploy(await fleet.operator.publish("1.0.0"))
        with device.http() as http:
            assert (await asyncio.to_thread(http.get, "/v1/desired")).status_code == 200
            assert not await problems(), "it may be a moment late"
            Ahead.ahead = timedelta(minutes=5)
            assert (await asyncio.to_thread(http.get, "/v1/desired")).status_code == 200
        assert device.id in (await problems())[0]
        timeline = await fleet.operator.get(operator_api.Timeline, f"/v1/devices/{device.id}/timeline")
        assert any("which the broker did not bring" in entry.text for entry in timeline.entries)
        Ahead.ahead = timedelta(minutes=6)
        await device.connect()
        await fleet.online(device)
        assert not await problems()


@pytest.mark.asyncio
async def test_versions_that_a_thief_of_the_director_drove_up_do_not_lock_the_server_out(new_fleet):
    """Fast-forward, and the recovery after it: devices forget with the key, and so does the server."""

    async with new_fleet("embedded") as fleet:
        device = await fleet.enrol("a")
        await fleet.operator.deploy(await fleet.operator.publish("1.0.0"))
        store, told = fleet.server._store, fleet.server._director
        hello = Hello(device=device.id, nonce="0" * 16, boot_id="b", accepted=VERSION_MAX)
        store.devices.hear_hello(hello, datetime.now(UTC).timestamp())
        row = told.reconcile(device.id)
        assert row is not None
        assert row.version < 1000
        # a plausible version is gone above on an operator's word, as after a restored backup
        store.devices.hear_hello(msgspec.structs.replace(hello, accepted=500), datetime.now(UTC).timestamp())
        assert told.reconcile(device.id).version < 1000
        row, _ = told.prepare(device.id, above=True)
        assert row is not None
        assert row.version == 501
        # and commands go on above what a lost database had counted
        first = store.devices.next_command(device.id, at_least=int(datetime.now(UTC).timestamp()))
        assert first > 1_700_000_000
        assert store.devices.next_command(device.id, at_least=7) == first + 1


@pytest.mark.asyncio
async def test_a_server_that_lost_reports_asks_for_them_again(new_fleet):
    async with new_fleet("embedded") as fleet:
        device = await fleet.device("a")
        loop, acks = asyncio.get_running_loop(), asyncio.Queue()

        def received(topic, payload):
            if topic.endswith("/down/ack"):
                loop.call_soon_threadsafe(acks.put_nowait, payload)

        device._received = received
        hello = Hello(device=device.id, nonce="0" * 16, boot_id="boot", acked=7)
        device.publish(Up.HELLO, hello)
        ack = wire.decode(Ack, await asyncio.wait_for(acks.get(), 60))
        assert (ack.sequence, ack.again) == (0, True)


@pytest.mark.asyncio
async def test_operators_come_and_go_by_an_admins_word(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        reply = await operator.send(OperatorReply, "PUT", "/v1/operators/eve", OperatorRequest())
        assert reply.role is Role.OPERATOR
        admin = operator.http.headers["authorization"]
        operator.http.headers["authorization"] = f"Bearer {reply.token}"
        await operator.token("edge")
        problem = await operator.problem("PUT", "/v1/operators/mallory", OperatorRequest())
        assert (problem.status, problem.type) == (403, "forbidden")
        operator.http.headers["authorization"] = admin
        again = await operator.send(OperatorReply, "PUT", "/v1/operators/eve", OperatorRequest())
        assert again.token != reply.token
        left = await operator.send(Operators, "POST", "/v1/operators/eve/remove")
        assert [each.name for each in left.operators] == ["admin"]
        for path in ("/v1/operators/admin/remove", "/v1/operators/eve/remove"):
            assert (await operator.problem("POST", path)).status in {404, 409}
        operator.http.headers["authorization"] = f"Bearer {again.token}"
        assert (await operator.problem("GET", "/v1/status")).status == 401

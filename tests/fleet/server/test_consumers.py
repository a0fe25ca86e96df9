"""Consumers: systems of the operator that read components' messages from the real broker, and nothing else."""

import asyncio
import contextlib
import json
import ssl
from datetime import UTC, datetime

import paho.mqtt.client as mqtt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from paho.mqtt.enums import CallbackAPIVersion

from fleet.protocol import wire
from fleet.protocol.messages import Reading, Readings, State
from fleet.protocol.topics import POKE, Topic, Up
from fleet.protocol.trust_api import ConsumerReply, ConsumerRequest, Consumers
from fleet.server.broker import broker as brokers
from tests.eventually import eventually_async

pytestmark = pytest.mark.skipif(brokers.find() is None, reason="Mosquitto is not installed")
NOW = datetime(2025, 6, 1, tzinfo=UTC)


def a_request():
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private.decode(), request.public_bytes(pem).decode()


async def grant(fleet, name="historian", group="edge", topics=("plant/#",)):
    key, request = a_request()
    wanted = ConsumerRequest(name=name, group=group, topics=topics, request=request)
    return key, await fleet.operator.send(ConsumerReply, "POST", "/v1/consumers", wanted)


def bring(fleet, device, *topics, first=1, instance="meter"):
    readings = tuple(
        Reading(position=each, instance=instance, sequence=each, at=NOW, topic=topic, data=topic.encode())
        for each, topic in enumerate(topics, first)
    )
    batch = Readings(device=device.id, epoch="e", readings=readings)
    fleet.server._ingest.on_message(str(Topic(device.id, Up.READINGS)), wire.encode(batch))
    fleet.server._ingest.flush()


class Reader:
    """A consumer's own client, which subscribes to everything that it can think of."""

    def __init__(self, directory, key, reply):
        directory.mkdir()
        (directory / "client.pem").write_text(reply.certificate + key)
        self.context = ssl.create_default_context(cadata=reply.ca)
        self.context.load_cert_chain(directory / "client.pem")
        self.reply = reply
        self.heard = asyncio.Queue()
        self.ended = asyncio.Event()
        self.loop = asyncio.get_running_loop()

    def _tell(self, what, *arguments):
        self.loop.call_soon_threadsafe(what, *arguments)

    async def connect(self, *more, clean=True):
        ready = asyncio.Event()
        client = self.client = mqtt.Client(
            CallbackAPIVersion.VERSION2, client_id=self.reply.user, reconnect_on_failure=False, clean_session=clean
        )
        client.tls_set_context(self.context)
        subscriptions = [(topic, 1) for topic in (*self.reply.subscriptions, *more)]
        client.on_connect = lambda client, *_: client.subscribe(subscriptions)
        client.on_subscribe = lambda *_: self._tell(ready.set)
        client.on_message = lambda _c, _d, message: self._tell(self.heard.put_nowait, (message.topic, message.payload))
        client.on_disconnect = lambda *_: self._tell(self.ended.set)
        host, _, port = self.reply.brokers[0].removeprefix("mqtts://").rpartition(":")
        await asyncio.to_thread(client.connect, host, int(port), 30)
        client.loop_start()
        async with asyncio.timeout(60):
            await ready.wait()

    async def hear(self):
        async with asyncio.timeout(60):
            topic, payload = await self.heard.get()
        return topic, json.loads(payload)

    async def publish(self, topic, payload=b"forged", *, retain=False):
        sent = self.client.publish(topic, payload, qos=1, retain=retain)
        await asyncio.to_thread(sent.wait_for_publish, 60)

    async def close(self):
        self.client.disconnect()
        await asyncio.to_thread(self.client.loop_stop)


@contextlib.asynccontextmanager
async def reader(tmp_path, fleet, *more, **granted):
    found = Reader(tmp_path / granted.get("name", "historian"), *await grant(fleet, **granted))
    await found.connect(*more)
    try:
        yield found
    finally:
        await found.close()


@pytest.mark.asyncio
async def test_a_consumer_reads_what_it_was_granted_and_writes_nothing(new_fleet, tmp_path):
    everything = ("#", "fleet/v1/#", POKE, "fleet/v1/messages/#", "fleet/v1/+/+/up/+", "fleet/v1/+/+/down/+")
    async with new_fleet("mosquitto") as fleet:
        mine, other = await fleet.device("mine"), await fleet.device("other", group="elsewhere")
        async with reader(tmp_path, fleet, *everything, topics=("plant/+/t", "alarms/#")) as one:
            user = one.reply.user
            reached, plain = [], fleet.server._ingest.on_message
            fleet.server._ingest.on_message = lambda topic, data: (reached.append(topic), plain(topic, data))
            state = Up.STATE, State(device=mine.id, online=True, boot_id="boot")
            assert user.startswith("consumer.historian.")
            prefix = f"fleet/v1/messages/edge/{mine.id}/meter"
            for topic in (
                f"{prefix}/plant/x/t",
                f"fleet/v1/00/{user}/up/report",
                f"fleet/v1/00/{user}/down/desired",
                str(Topic(mine.id, Up.REPORT)),
                str(Topic(mine.id, Up.STATE)),
                POKE,
                "other",
            ):
                await one.publish(topic, retain=True)
            await eventually_async(lambda: str(Topic(mine.id, Up.STATE)) in reached or mine.publish(*state), "a state")
            assert not [topic for topic in reached if user in topic], "what devices may write, no consumer may"
            fleet.server._bus.publish(POKE, b"x")
            bring(fleet, other, "plant/x/t")
            bring(fleet, mine, "plant/x/p", "secret/t", "plant/x/t", "alarms")
            topic, said = await one.hear()
            assert topic == f"{prefix}/plant/x/t"
            assert (said["device"], said["instance"], said["topic"], said["sequence"]) == (
                mine.id,
                "meter",
                "plant/x/t",
                3,
            )
            topic, said = await one.hear()
            assert (topic, said["data"]) == (f"{prefix}/alarms", "YWxhcm1z")
            assert one.heard.empty()


@pytest.mark.asyncio
async def test_messages_that_come_while_it_is_away_wait_for_it_and_come_in_order(new_fleet, tmp_path):
    async with new_fleet("mosquitto") as fleet:
        mine = await fleet.device("mine")
        bring(fleet, mine, "plant/before")
        one = Reader(tmp_path / "c", *await grant(fleet))
        await one.connect(clean=False)
        await one.close()
        for first in (2, 152):
            bring(fleet, mine, *(f"plant/{number}" for number in range(first, first + 150)), first=first)
        await one.connect(clean=False)
        bring(fleet, mine, "plant/last", first=302)
        heard = [(await one.hear())[1]["sequence"] for _ in range(301)]
        assert heard == list(range(2, 303))
        await one.close()


@pytest.mark.asyncio
async def test_revocation_ends_the_live_connection_and_what_comes_back_reads_nothing(new_fleet, tmp_path):
    async with new_fleet("mosquitto") as fleet:
        mine = await fleet.device("mine")
        async with reader(tmp_path, fleet, name="gone") as gone, reader(tmp_path, fleet, name="stays") as stays:
            bring(fleet, mine, "plant/1")
            assert (await gone.hear())[1]["sequence"] == (await stays.hear())[1]["sequence"] == 1
            left = await fleet.operator.send(Consumers, "POST", "/v1/consumers/gone/revoke")
            assert [each.name for each in left.consumers] == ["stays"]
            async with asyncio.timeout(60):
                await gone.ended.wait()
            await asyncio.to_thread(gone.client.loop_stop)
            await gone.connect("#")
            bring(fleet, mine, "plant/2", first=2)
            assert (await stays.hear())[1]["sequence"] == 2
            assert not stays.ended.is_set()
            await gone.publish("fleet/v1/00/x/up/report")  # whose acknowledgement comes behind anything it was sent
            assert gone.heard.empty()
            # the name is free again, for another certificate
            async with reader(tmp_path, fleet, name="gone-2") as again:
                bring(fleet, mine, "plant/3", first=3)
                assert (await again.hear())[1]["sequence"] == 3
            assert gone.heard.empty()


@pytest.mark.asyncio
async def test_a_message_that_no_broker_takes_holds_up_no_other(new_fleet, tmp_path):
    # a device that is no longer its owner's says what it likes: wildcards, no characters, levels in an instance's name
    odd = ("+", "a/#", "a/+/b", "a//b", "/a", "$SYS/a", "a\0b", "a\nuser x", "a/\uffff", "a/\ufdd0", "a/\U0002fffe")
    async with new_fleet("mosquitto") as fleet:
        mine = await fleet.device("mine")
        async with reader(tmp_path, fleet, topics=("#",)) as one:
            lost, plain = [], fleet.server._bus._disconnected
            fleet.server._bus._client.on_disconnect = lambda *said: (lost.append(said), plain(*said))
            for first, topic in enumerate(odd, 1):
                bring(fleet, mine, topic, first=first)
            bring(fleet, mine, "plant/1", first=50, instance="m/x")
            bring(fleet, mine, "plant/1", first=51, instance="+")
            bring(fleet, mine, "plant/1", first=52)
            topic, said = await one.hear()
            assert (topic, said["sequence"]) == (f"fleet/v1/messages/edge/{mine.id}/meter/plant/1", 52)
            assert not lost


@pytest.mark.asyncio
async def test_what_no_consumer_may_be(new_fleet):
    async with new_fleet("mosquitto") as fleet:
        await fleet.device("mine")
        _, request = a_request()

        async def refused(**more):
            wanted = ConsumerRequest(**{"name": "x", "group": "edge", "topics": ("a",), "request": request, **more})
            reply = await fleet.operator.http.request("POST", "/v1/consumers", content=wire.encode(wanted))
            return reply.status_code, reply.json()["title"]

        assert (await refused(group="nowhere"))[0] == 404
        assert (await refused(topics=("a/#/b",)))[0] == 400
        assert (await refused(topics=("a ",)))[0] == 400  # an access list ends its lines before a space
        assert (await refused(topics=()))[0] == 400
        assert (await refused(topics=tuple(map(str, range(17)))))[0] == 400
        assert (await refused(request="no request"))[0] == 400
        assert (await refused(name="A b"))[0] == 400
        await grant(fleet, name="x", topics=("a",))
        assert await refused() == (409, "there is a consumer x")


@pytest.mark.asyncio
async def test_without_mosquitto_there_is_none(new_fleet):
    async with new_fleet("embedded") as fleet:
        await fleet.device("mine")
        with pytest.raises(Exception, match="409"):
            await grant(fleet)

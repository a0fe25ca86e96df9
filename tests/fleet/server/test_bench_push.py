"""Cost of a push to a thousand devices, and of their health, for the server: printed, and never timed to pass."""

import asyncio
import time
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fleet.protocol import codes, operator_api, wire
from fleet.protocol.assignment import Assignment
from fleet.protocol.codes import InstanceState, Phase
from fleet.protocol.messages import Health, InstanceHealth, Report, State
from fleet.protocol.topics import Down, Topic, Up
from signing import dsse
from signing.device_statements import DeviceSigner

pytestmark = [pytest.mark.bench, pytest.mark.timeout(300)]
DEVICES = 1000
PHASES = (Phase.FETCHING, Phase.COMPILING, Phase.PROBATION, Phase.COMMITTED)


def self_signed(key):
    """A certificate for a key, PEM: the server reads its public key alone."""
    name, now = x509.Name([]), datetime.now(UTC)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(now).not_valid_after(now + timedelta(days=1))
    return made.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()


class Crowd:
    """Devices that exist in the store alone, and answer each assignment with four reports, past the broker.

    They sign with one key. `spent` is the processor's time that they took themselves.
    """

    def __init__(self, fleet):
        store = fleet.server._store
        self.ids = [f"b{number}-{number:08x}" for number in range(DEVICES)]
        self._ingest = fleet.server._ingest
        self._assigned = asyncio.Queue()
        self.spent = 0.0
        key = ec.generate_private_key(ec.SECP256R1())
        self._signer = DeviceSigner(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        certificate = self_signed(key)
        store.devices.ensure_group("edge", now=1.0)
        with store.atomic():
            for device in self.ids:
                store.devices.add(
                    device=device, name="b", machine="", sealing_key="", key_sha256=device, group="edge", now=1.0
                )
                store.devices.hear_state(State(device=device, online=True), 2.0)
                store.access.add_certificate(serial=device, device=device, not_after=1e12, pem=certificate, now=1.0)
        publish = fleet.server._director._publish

        def overhear(topic, payload):
            if topic.channel is Down.DESIRED:
                self._assigned.put_nowait((topic.device, payload))
            return publish(topic, payload)

        fleet.server._director._publish = overhear

    async def answer(self, view):
        for _ in self.ids:
            device, envelope = await self._assigned.get()
            began = time.process_time()
            signed = [self._signer.sign(wire.encode(each)) for each in self._reports(view, device, envelope)]
            self.spent += time.process_time() - began
            for report in signed:
                self._ingest.on_message(str(Topic(device, Up.REPORT)), report)

    def _reports(self, view, device, envelope):
        (item,) = wire.decode(Assignment, dsse.parse(envelope).payload).items
        for sequence, phase in enumerate(PHASES, 1):
            yield Report(
                device=device, boot_id="x", sequence=sequence, at=datetime.now(UTC), assignment=1,
                instance=view.instance, target=view.target, rollout=view.id, phase=phase, generation=1,
                manifest_sha256=item.manifest_sha256, assignment_sha256=dsse.parse(envelope).sha256,
            )  # fmt: skip

    def say_health(self, target):
        figure = InstanceHealth(instance="hello", target=target, generation=1, state=InstanceState.RUNNING)
        messages = [
            (
                str(Topic(device, Up.HEALTH)),
                wire.encode(Health(device=device, boot_id="x", at=datetime.now(UTC), committed=1, instances=(figure,))),
            )
            for device in self.ids
        ]
        began = time.process_time()
        for topic, payload in messages:
            self._ingest.on_message(topic, payload)
        self._ingest.flush()
        return (time.process_time() - began) / DEVICES


@pytest.mark.asyncio
async def test_a_push_to_a_thousand_devices(new_fleet):
    async with new_fleet() as fleet:
        crowd = Crowd(fleet)
        target = await fleet.operator.publish("1.0.0")
        wall, cpu = time.perf_counter(), time.process_time()
        view = await fleet.operator.deploy(target)
        answers = asyncio.create_task(crowd.answer(view))
        async with asyncio.timeout(200):
            while view.state in codes.OPEN_STATES:
                path = f"/v1/rollouts/{view.id}"
                view = await fleet.operator.get(operator_api.RolloutView, path, wait=10, since=view.revision)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu - crowd.spent
        await answers
        assert view.counts == {"succeeded": DEVICES}
        health = crowd.say_health(target)
        each = cpu / DEVICES * 1e3
        print(f"\npush -> {DEVICES} devices, {4 * DEVICES} reports: {wall:.1f} s, CPU {each:.2f} ms a device")
        print(f"one health report: CPU {health * 1e6:.0f} us (budget 100)")

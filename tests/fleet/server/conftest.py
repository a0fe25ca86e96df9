"""A whole server on free ports, and small devices that speak the real protocol: TLS, MQTT, verified assignments."""

import asyncio
import contextlib
import functools
import hashlib
import os
import re
import secrets
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import httpx
import msgspec
import paho.mqtt.client as mqtt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from paho.mqtt.enums import CallbackAPIVersion

from fleet.admin.bootstrap import init
from fleet.demo.environment import free_ports
from fleet.protocol import codes, operator_api, wire
from fleet.protocol.assignment import Assignment, CheckIn, Command, Fresh, Item
from fleet.protocol.codes import Phase, RejectCode
from fleet.protocol.manifest import ConfigKey, Http, Manifest
from fleet.protocol.messages import Ack, Enrolled, EnrolRequest, Hello, Report, State, Token, Versions
from fleet.protocol.names import TargetName
from fleet.protocol.topics import Down, Topic, Up, device_subscriptions
from fleet.protocol.trust_api import OperatorReply, OperatorRequest, Role
from fleet.server.broker import broker as brokers
from fleet.server.broker.broker import Child
from fleet.server.config import Address, ServerConfig, ServerPaths
from fleet.server.service import Server
from signing import dsse, keys, repository
from signing.device_statements import DeviceSigner
from signing.errors import FetchNotFound
from signing.updater import MemoryState, Updater
from signing.verifier import accept_assignment, resolve
from tests.eventually import eventually_async

T = TypeVar("T")

ANSWERS = (Phase.PROBATION, Phase.COMMITTED)
Behaviour = Callable[[Item], list[Report]]
PATIENCE_S = 60
PASSPHRASE = b"correct horse"


class Operator:
    """The operators' API over real TLS."""

    def __init__(self, home: Path, url: str) -> None:
        token = (home / "operator" / "token").read_text().strip()
        context = ssl.create_default_context(cafile=str(home / "operator" / "ca.pem"))
        self.http = httpx.AsyncClient(
            base_url=url, verify=context, headers={"authorization": f"Bearer {token}"}, timeout=PATIENCE_S
        )
        try:
            self._key = keys.load(home / "operator" / "keys" / "main.pem")
        except keys.EncryptedError:
            self._key = keys.load(home / "operator" / "keys" / "main.pem", passphrase=PASSPHRASE)

    async def get(self, kind: type[Any], path: str, **query: Any) -> Any:
        return self._read(kind, await self.http.get(path, params=query))

    async def send(self, kind: type[Any], method: str, path: str, body: msgspec.Struct | None = None) -> Any:
        content = b"" if body is None else msgspec.json.encode(body)
        return self._read(kind, await self.http.request(method, path, content=content))

    async def problem(self, method: str, path: str, body: msgspec.Struct | bytes | None = None) -> operator_api.Problem:
        content = body if isinstance(body, bytes) else b"" if body is None else msgspec.json.encode(body)
        reply = await self.http.request(method, path, content=content)
        assert reply.status_code >= 400, reply.text
        return msgspec.json.decode(reply.content, type=operator_api.Problem)

    def _read(self, kind: type[Any], reply: httpx.Response) -> Any:
        assert reply.is_success, reply.text
        return msgspec.json.decode(reply.content, type=kind)

    async def token(self, group: str = "edge") -> str:
        request = operator_api.EnrollTokenRequest(group=group)
        return (await self.send(operator_api.EnrollTokenReply, "POST", "/v1/enroll-tokens", request)).token

    async def publish(self, version: str, *, name: str = "hello", **manifest: Any) -> str:
        """Sign and upload a component; its target path."""
        artifact = f"{name} {version}".encode()
        sha256 = hashlib.sha256(artifact).hexdigest()
        reply = await self.http.put(f"/v1/artifacts/{sha256}", content=artifact)
        assert reply.is_success, reply.text
        current = await self._newest_role()
        target = TargetName("main", name, version)
        role = repository.add_target(
            current,
            name=target,
            length=len(artifact),
            sha256=sha256,
            manifest=Manifest(name=name, version=version, **{"trigger": Http(), **manifest}),
            signer=self._key,
            now=datetime.now(UTC),
        )
        reply = await self.http.post("/v1/roles/main", content=role)
        assert reply.is_success, reply.text
        return target.path

    async def revoke(self, version: str, *, name: str = "hello") -> None:
        """Withdraw a release."""
        target = TargetName("main", name, version)
        role = repository.revoke(await self._newest_role(), name=target, signer=self._key, now=datetime.now(UTC))
        reply = await self.http.post("/v1/roles/main", content=role)
        assert reply.is_success, reply.text

    async def _newest_role(self) -> bytes:
        number, found = 1, b""
        while (reply := await self.http.get(f"/v1/tuf/{number}.main.json")).is_success:
            number, found = number + 1, reply.content
        return found

    async def deploy(self, target: str | None, *, group: str = "edge", instance: str = "hello", **more: Any) -> Any:
        request = operator_api.RolloutRequest(instance=instance, target=target, group=group, **more)
        return await self.send(operator_api.RolloutView, "POST", "/v1/rollouts", request)

    async def follow(
        self, rollout: operator_api.RolloutView, until: Callable[[operator_api.RolloutView], bool]
    ) -> operator_api.RolloutView:
        """Long-poll until `until` holds."""
        async with asyncio.timeout(PATIENCE_S):
            view = rollout
            while not until(view):
                view = await self.get(operator_api.RolloutView, f"/v1/rollouts/{view.id}", wait=10, since=view.revision)
        return view

    async def decided(self, rollout: operator_api.RolloutView) -> operator_api.RolloutView:
        return await self.follow(rollout, lambda view: view.state not in codes.OPEN_STATES)

    async def label(self, device: "Device", **labels: str | None) -> None:
        """Set labels of a device; None takes one away."""
        request = operator_api.LabelsRequest(labels=labels)
        await self.send(operator_api.DeviceDetail, "PUT", f"/v1/devices/{device.id}/labels", request)

    async def set_plan(self, plan: operator_api.GroupPlan | None, **more: Any) -> operator_api.GroupPolicy:
        """Set the plan of the group edge; None takes it away."""
        request = operator_api.GroupPolicyRequest(plan=plan, **more)
        found: operator_api.GroupPolicy = await self.send(
            operator_api.GroupPolicy, "PUT", "/v1/groups/edge/policy", request
        )
        return found

    async def another(self, name: str = "bob", role: Role = Role.OPERATOR) -> dict[str, str]:
        """Make another operator; return the headers with the token."""
        reply = await self.send(OperatorReply, "PUT", f"/v1/operators/{name}", OperatorRequest(role=role))
        return {"authorization": f"Bearer {reply.token}"}


def good(item: Item) -> list[Report]:
    return [_report(item, Phase.FETCHING), _report(item, Phase.PROBATION), _report(item, Phase.COMMITTED)]


def trapping(item: Item) -> list[Report]:
    rolled_back = _report(item, Phase.ROLLED_BACK, code=RejectCode.TRAPPED, message="it trapped", log=("boom",))
    return [_report(item, Phase.PROBATION), rolled_back]


def refusing(item: Item) -> list[Report]:
    return [_report(item, Phase.FAILED, code=RejectCode.GRANT_DENIED, message="no such grant here")]


def silent(_item: Item) -> list[Report]:
    return []


def _report(item: Item, phase: Phase, **more: Any) -> Report:
    return Report(
        device="", boot_id="", sequence=0, at=datetime.now(UTC), assignment=0,
        instance=item.instance, target=item.target, manifest_sha256=item.manifest_sha256, attempt=item.attempt,
        rollout=item.rollout, phase=phase, generation=1 if phase in ANSWERS else 0, **more,
    )  # fmt: skip


def _whole() -> Report:
    """Everything that the assignment asks for is committed."""
    now = datetime.now(UTC)
    return Report(device="", boot_id="", sequence=0, at=now, assignment=0, phase=Phase.COMMITTED, generation=0)


class Device:
    """A device that verifies what it is told, and acts as its behaviour says."""

    def __init__(self, directory: Path, enrolled: Enrolled, key: ec.EllipticCurvePrivateKey) -> None:
        self.enrolled, self.key, self.id = enrolled, key, enrolled.device
        self.behaviour: Behaviour = good
        self.accepted: list[Assignment] = []
        self.envelopes: list[bytes] = []
        self.fresh: list[Fresh] = []
        self.commands: list[Command] = []
        self.acked = 0
        self.nonce = ""
        self.sequence = 0
        self.states = MemoryState()
        self.items: dict[str, Item] = {}
        self.states_said: dict[str, Report] = {}
        self.answers_check_in = True
        self.versions = Versions(agent="1", engine="1")
        self.signer: DeviceSigner | None = DeviceSigner(
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )
        self.accepted_sha256, self.accepted_envelope = "", b""
        self.news = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._accepting = asyncio.Lock()
        self._client: mqtt.Client | None = None
        self._files = (directory / f"{self.id}.pem", directory / f"{self.id}-ca.pem")
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
        self._secret = secret
        self.hold(enrolled.certificate_pem)
        self._files[1].write_text(enrolled.ca_pem)
        self.updater = Updater(pinned_root=enrolled.root.encode(), fetch=self._fetch, states=self.states)

    def hold(self, certificate_pem: str) -> None:
        """Put a certificate for its key in place."""
        self._files[0].write_text(certificate_pem + self._secret)

    def certificate_request(self) -> str:
        """Ask for a certificate for its key, as to renew the one that it has."""
        return request_certificate(self.key)

    def context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self._files[1]))
        context.load_cert_chain(self._files[0])
        return context

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.enrolled.devices_url, verify=self.context(), timeout=PATIENCE_S)

    def _fetch(self, name: str, max_bytes: int) -> bytes:
        with self.http() as http:
            reply = http.get(f"/v1/tuf/{name}")
        if reply.status_code == 404:
            raise FetchNotFound(name)
        assert reply.is_success
        assert len(reply.content) <= max_bytes
        return reply.content

    # -- MQTT --------------------------------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Connect, say hello, and be ready for what comes."""
        client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=self.id, clean_session=True)
        client.tls_set_context(self.context())
        will = State(device=self.id, online=False)
        client.will_set(str(Topic(self.id, Up.STATE)), wire.encode(will), qos=1, retain=True)
        ready = asyncio.Event()

        def connected(client: mqtt.Client, *_: Any) -> None:
            client.subscribe([(topic, 1) for topic in device_subscriptions(self.id)])

        def message(_client: mqtt.Client, _data: Any, message: mqtt.MQTTMessage) -> None:
            self._loop.call_soon_threadsafe(self._received, message.topic, message.payload)

        def subscribed(*_: Any) -> None:
            self._say_hello()
            self._loop.call_soon_threadsafe(ready.set)

        client.on_connect, client.on_message, client.on_subscribe = connected, message, subscribed
        client.reconnect_delay_set(min_delay=1, max_delay=1)
        self._client = client
        address = httpx.URL(self.enrolled.mqtt[0])
        await asyncio.to_thread(client.connect, address.host, address.port, 30)
        client.loop_start()
        async with asyncio.timeout(PATIENCE_S):
            await ready.wait()

    def _say_hello(self) -> None:
        self.nonce = secrets.token_hex(8)
        version = self.accepted[-1].version if self.accepted else 0
        self.publish(Up.STATE, State(device=self.id, online=True, boot_id="boot"), retain=True)
        hello = Hello(
            device=self.id,
            nonce=self.nonce,
            boot_id="boot",
            accepted=version,
            versions=self.versions,
        )
        self.publish(Up.HELLO, hello)

    def publish(self, channel: Up, message: msgspec.Struct, *, retain: bool = False, device: str = "") -> None:
        data = wire.encode(message)
        if isinstance(message, Report) and self.signer is not None:
            data = self.signer.sign(data)
        if (client := self._client) is not None:
            client.publish(str(Topic(device or self.id, channel)), data, qos=1, retain=retain)

    async def disconnect(self, *, politely: bool = False) -> None:
        """Be gone: without a goodbye the broker publishes the will."""
        client, self._client = self._client, None
        if client is None:
            return
        if politely:
            client.disconnect()
        elif (sock := client.socket()) is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        await asyncio.to_thread(client.loop_stop)

    def _received(self, topic: str, payload: bytes) -> None:
        if topic.endswith("/poke"):
            return
        match Topic.parse(topic).channel:
            case Down.DESIRED:
                self.envelopes.append(payload)
                self._loop.create_task(self._accept(payload))
            case Down.ACK:
                self.acked = max(self.acked, wire.decode(Ack, payload).sequence)
            case Down.FRESH:
                self.fresh.append(msgspec.json.decode(dsse.parse(payload).payload, type=Fresh))
            case Down.COMMAND:
                command = msgspec.json.decode(dsse.parse(payload).payload, type=Command)
                self.commands.append(command)
                if isinstance(command.verb, CheckIn) and self.answers_check_in:
                    self.report_states()
        self._ring()

    async def _accept(self, envelope: bytes) -> None:
        """Accept one assignment after the other, in the order in which they came, as the agent does."""
        async with self._accepting:
            await self._apply(envelope)

    async def _apply(self, envelope: bytes) -> None:
        now = datetime.now(UTC)
        trusted = await _patiently(lambda: self.updater.refresh(now))
        state = self.states.load()
        accepted = accept_assignment(trusted, envelope, fleet=self.enrolled.fleet, device=self.id, state=state, now=now)
        again = bool(self.accepted) and self.accepted[-1].version == accepted.assignment.version
        self.states.save(accepted.state)
        if again:
            return
        self.accepted.append(accepted.assignment)
        self.accepted_sha256, self.accepted_envelope = accepted.sha256, envelope
        wanted = {item.instance: item for item in accepted.assignment.items}
        if wanted == self.items:
            self._say(_whole(), accepted.assignment)
        for gone in self.items.keys() - wanted.keys():
            removed = _report(self.items[gone], Phase.COMMITTED)
            self._say(
                msgspec.structs.replace(removed, target="", manifest_sha256="", rollout="", attempt=0, generation=0),
                accepted.assignment,
            )
        for instance, item in wanted.items():
            if self.items.get(instance) != item:
                found = await _patiently(functools.partial(self.updater.find, item.target))
                resolve(found, item, state=accepted.state)
                self.states_said.pop(instance, None)
                for report in self.behaviour(item):
                    self._say(report, accepted.assignment)
        self.items = wanted
        self._ring()

    def report_states(self) -> None:
        """Sign again how each instance stands, and that the assignment is committed where all of it is."""
        states = [self.states_said[each] for each in self.items if each in self.states_said]
        if len(states) == len(self.items) and all(each.phase is Phase.COMMITTED for each in states):
            states.append(_whole())
        for each in states if self.accepted else []:
            self._say(each, self.accepted[-1])

    def _say(self, report: Report, assignment: Assignment) -> None:
        self.sequence += 1
        if report.instance and report.target and report.phase in (Phase.COMMITTED, Phase.FAILED, Phase.ROLLED_BACK):
            self.states_said[report.instance] = report
        running = report.target if report.phase is Phase.COMMITTED else ""
        full = msgspec.structs.replace(
            report,
            device=self.id,
            boot_id="boot",
            sequence=self.sequence,
            assignment=assignment.version,
            assignment_sha256=report.assignment_sha256 or self.accepted_sha256,
            running=running,
        )
        self.publish(Up.REPORT, full)

    def _ring(self) -> None:
        self.news.set()
        self.news = asyncio.Event()

    report = staticmethod(_report)

    async def until(self, what: Callable[["Device"], Any]) -> Any:
        """Wait until this holds of the device."""
        async with asyncio.timeout(PATIENCE_S):
            while not (found := what(self)):
                await self.news.wait()
        return found


async def _patiently(call: Callable[[], T]) -> T:
    """Call until the server is there: a device tries again."""

    async def answered() -> tuple[T] | None:
        try:
            return (await asyncio.to_thread(call),)
        except httpx.TransportError:
            return None

    (found,) = await eventually_async(answered, "the server is there", within_s=PATIENCE_S, pause_s=0.1)
    return found


def request_certificate(key: ec.EllipticCurvePrivateKey) -> str:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()


class Done(NamedTuple):
    """Command that has ended."""

    code: int
    stdout: str
    stderr: str


class Fleet:
    """A server in this process, its operator, and devices."""

    def __init__(self, directory: Path, broker: str, size: str = "dev") -> None:
        self.directory, self.home = directory, directory / "home"
        operators_port, devices_port, mqtt_port = free_ports(3)  # together, so that no two are the same
        self.made = init(
            self.home,
            fleet="test",
            size=size,
            passphrase=None if size == "dev" else PASSPHRASE,
            operators_port=operators_port,
            devices_port=devices_port,
            mqtt_port=mqtt_port,
            broker=broker,
        )
        self.devices: list[Device] = []

    async def __aenter__(self) -> Self:
        await self.start()
        self.operator = Operator(self.home, self.made.url)
        return self

    async def __aexit__(self, *_: object) -> None:
        for device in self.devices:
            await device.disconnect(politely=True)
        await self.operator.http.aclose()
        await self.stop()

    async def start(self) -> None:
        self.server = Server(self.home)
        self.ready = await self.server.start()
        async with asyncio.timeout(PATIENCE_S):
            await self.server._bus.wait_connected()

    async def stop(self) -> None:
        await self.server.stop()

    def pass_time(self, at: datetime) -> None:
        """Have the rollouts begin whose time comes until `at`, without a wait for it."""
        controller = self.server._conductor
        clock = controller._clock
        ahead = at - clock()
        controller._clock = lambda: clock() + ahead
        controller._witness = replace(controller._witness, utc=at.timestamp())
        controller.wake()

    async def start_with(self, broker: str) -> None:
        """Start the server with another broker."""
        path = self.home / "server" / "server.toml"
        path.write_text(re.sub('broker = ".*"', f'broker = "{broker}"', path.read_text()))
        await self.start()

    async def enrol(
        self,
        name: str,
        *,
        group: str = "edge",
        token: str = "",
        key: Any = None,
        sealing_key: str = "",
        proof: str = "",
    ) -> Device:
        """A new device, enrolled and not yet connected."""
        line = token or await self.operator.token(group)
        key = key or ec.generate_private_key(ec.SECP256R1())
        request = EnrolRequest(
            secret=Token.decode(line).secret,
            name=name,
            csr_pem=request_certificate(key),
            sealing_key=sealing_key,
            sealing_proof=proof,
            machine="x86_64",
        )
        context, url = self.operator_context(), self.made.url
        async with httpx.AsyncClient(verify=context, base_url=url, timeout=PATIENCE_S) as http:
            reply = await http.post("/v1/enrol", content=wire.encode(request))
        assert reply.is_success, reply.text
        enrolled = wire.decode(Enrolled, reply.content)
        device = Device(self.directory, enrolled, key)
        self.devices.append(device)
        return device

    def operator_context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.home / "operator" / "ca.pem"))

    async def device(self, name: str, *, group: str = "edge", behaviour: Behaviour = good) -> Device:
        """A new device, connected, and known to be online."""
        device = await self.enrol(name, group=group)
        device.behaviour = behaviour
        await device.connect()
        await self.online(device)
        return device

    async def command(self, *words: object, stdin: str = "") -> Done:
        """Run `fleet` with these words as a process of its own, against this server, in the directory of the test."""
        environment = {**os.environ, "WASMFLEET_HOME": str(self.home), "WASMFLEET_KEY_PASSPHRASE": PASSPHRASE.decode()}
        process = await asyncio.create_subprocess_exec(
            str(Path(sys.executable).parent / "fleet"),
            *map(str, words),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
            cwd=self.directory,
        )
        async with asyncio.timeout(PATIENCE_S):
            stdout, stderr = await process.communicate(stdin.encode())
        assert process.returncode is not None
        return Done(process.returncode, stdout.decode(), stderr.decode())

    async def online(self, *devices: Device) -> None:
        async with asyncio.timeout(PATIENCE_S):
            for device in devices:
                while not self.server._store.devices.online([device.id]).get(device.id):
                    await self.server._conductor._watch._event.wait()


BROKERS = [
    pytest.param("embedded", id="embedded"),
    pytest.param(
        "mosquitto",
        id="mosquitto",
        marks=pytest.mark.skipif(brokers.find() is None, reason="mosquitto is not installed"),
    ),
]


@pytest.fixture(params=BROKERS)
def broker(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def new_fleet(tmp_path: Path) -> Callable[..., contextlib.AbstractAsyncContextManager[Fleet]]:
    """`async with new_fleet() as fleet`: a server that runs; Mosquitto where it is installed.

    `settings` are added to its `server.toml`.
    """

    @contextlib.asynccontextmanager
    async def make(broker: str = "auto", size: str = "dev", settings: str = "") -> AsyncIterator[Fleet]:
        made = Fleet(tmp_path, broker, size)
        with (made.home / "server" / "server.toml").open("a") as file:
            file.write(settings)
        async with made as fleet:
            yield fleet

    return make


@pytest.fixture
def behaviours() -> dict[str, Behaviour]:
    return {"good": good, "trapping": trapping, "refusing": refusing, "silent": silent}


@pytest.fixture
def manifest_with_key() -> dict[str, Any]:
    return {"config": {"greeting": ConfigKey(default="hello"), "place": ConfigKey()}}


@pytest.fixture
def new_home(tmp_path: Path) -> Callable[..., Path]:
    """A home on free ports, without a server."""

    def make(broker: str = "auto", size: str = "dev") -> Path:
        return Fleet(tmp_path / size, broker, size).home

    return make


@pytest.fixture
def external_broker() -> Callable[[Fleet], Any]:
    """Moves a fleet to a Mosquitto that is not the server's child; returns it."""

    async def start(fleet: Fleet) -> Child:
        home = ServerPaths(fleet.home)
        await fleet.stop()
        address = Address.parse(ServerConfig.load(home.config).mqtt, "mqtt")
        files = {"ca": home.ca / "ca.pem", "certificate": home.tls / "server.pem", "key": home.tls / "server.key"}
        path = brokers.configure(home.broker, address=address, **files)
        brokers.write_acl(home.broker, brokers.Denied())
        child = Child("mosquitto", [str(brokers.find()), "-c", str(path)], address)
        await child.start()
        await fleet.start_with(f"mqtts://{address}")
        return child

    return start

"""Device with real store, plan, machine, effects, images and host client; with a simulated host that speaks the real
protocol but runs nothing, a simulated repository, and a power switch."""

import asyncio
import contextlib
import fcntl
import hashlib
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from msgspec import UNSET

from agent.config import Paths, Settings
from agent.host.ipc import host_api
from agent.host.ipc.framing import CONSTANT_SEALS
from agent.identity.identity import Identity
from agent.link.host_client import HostClient
from agent.link.https import FetchError
from agent.update import restore
from agent.update.effects import EffectRunner
from agent.update.images import ImageStore
from agent.update.problems import Problems
from agent.update.reconciler import Reconciler
from agent.update.secrets import SecretStore
from agent.update.state import DeviceContext
from agent.update.store import Database, Store
from fleet.demo.environment import free_ports
from fleet.protocol.assignment import Assignment, Item, SecretRef
from fleet.protocol.codes import InstanceState, RejectCode
from fleet.protocol.manifest import Grants, Health, Http, Manifest
from fleet.protocol.messages import HealthChecks, InstanceHealth
from signing import sealing
from signing.sealing import Purpose
from tests.eventually import eventually_async

NOW = datetime(2026, 5, 1, tzinfo=UTC)
# Smallest possible component: preamble and component layer.
EMPTY_COMPONENT = b"\0asm\x0d\0\x01\0"


class PowerCut(BaseException):
    """Simulated power cut."""


def manifest(version, *, probation_ms=40, name="web", grants=None, **more):
    return Manifest(
        name=name,
        version=version,
        trigger=Http(),
        grants=grants or Grants(),
        health=Health(probation_ms=probation_ms, min_calls=0, **more),
    )


class SimHost:
    """Simulated host on a socket: starts instances (checking that memfds are sealed), and keeps the previous warm."""

    def __init__(self, path: Path):
        self.path = path
        self.session = os.urandom(4).hex()
        self.running = {}
        self.warm = {}
        self.refuse = {}  # target -> RejectCode
        self.faults = {}  # target -> number of traps
        self.answers = {}  # target -> results of its health check: True for healthy, None for no worker; then True
        self.checks = {}  # target -> HealthChecks
        self.metrics = {}  # target -> figures of the component's own
        self.states = {}  # target -> InstanceState, until it is started again
        self.requests = []
        self.entrusted = {}  # (instance, generation) -> values by name
        self.hang_on = set()  # request types that are never answered
        self.hold_on = set()  # request types that are carried out and answered by `release`
        self.held = []
        self.die_on = None  # a request type at which the host dies
        self.protocol = host_api.PROTOCOL
        self.engine = "50.0.1"
        self.kept_log = ("a line",)  # on its disk
        self.page = 64  # instances that fit in one packet
        self.kept_data = []  # by each request to remove the data of others
        self._peers = []
        self._listener = None

    def start(self):
        self.path.unlink(missing_ok=True)
        self._listener = host_api.new_socket()
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._listener.setblocking(False)
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _accept(self):
        with contextlib.suppress(BlockingIOError):
            peer, _ = self._listener.accept()
            peer.setblocking(False)
            self._peers.append(peer)
            asyncio.get_running_loop().add_reader(peer, self._read, peer)

    def _read(self, peer):
        while peer in self._peers:
            try:
                request, fd = host_api.receive_request(peer)
            except BlockingIOError:
                return
            except host_api.IpcError:
                self._drop(peer)
                return
            if isinstance(request, host_api.TakeMessages):
                continue  # no component publishes anything
            self.requests.append(request)
            if self.die_on is not None and isinstance(request, self.die_on):
                self.die_on = None
                self.kill()
                return
            if type(request) in self.hang_on:
                continue
            if type(request) in self.hold_on:
                self.held.append((peer, request))
                continue
            host_api.send(peer, self._answer(request, fd))
            if fd is not None:
                os.close(fd)

    def release(self):
        held, self.held = self.held, []
        for peer, request in held:
            host_api.send(peer, self._answer(request, None))

    def _drop(self, peer):
        asyncio.get_running_loop().remove_reader(peer)
        peer.close()
        self._peers.remove(peer)

    def _answer(self, request, fd):  # noqa: C901, PLR0911 - one answer for each request
        match request:
            case host_api.Hello():
                return host_api.Welcome(
                    id=request.id,
                    session=self.session,
                    version="1",
                    engine=self.engine,
                    containment={},
                    ingress="",
                    protocol=self.protocol,
                    **self._paged("running", request.after, self._running),
                )
            case host_api.PutSecrets():
                assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == CONSTANT_SEALS
                values = msgspec.json.decode(os.pread(fd, 1 << 20, 0))
                self.entrusted[request.instance, request.generation] = values
                return host_api.Done(id=request.id)
            case host_api.Start(run=run):
                assert hashlib.sha256(os.pread(fd, 1 << 20, 0)).hexdigest() == run.image_sha256
                assert set(run.secrets) == set(self.entrusted.get((run.instance, run.generation), ()))
                if run.target in self.refuse:
                    return host_api.Failed(
                        id=request.id, code=self.refuse[run.target], message="refused", log=("last words",)
                    )
                if (old := self.running.get(run.instance)) is not None and old.generation != run.generation:
                    assert run.generation > old.generation, "a generation never falls"
                    self.warm[run.instance] = old
                self.running[run.instance] = run
                self.states.pop(run.target, None)
                return host_api.Started(id=request.id, instance=run.instance, generation=run.generation)
            case host_api.Configure():
                run = self.running[request.instance]
                if request.config.get("refuse") or run.generation != request.generation:
                    return host_api.Failed(id=request.id, code="start-failed", message="not without a restart")
                self.running[request.instance] = msgspec.structs.replace(run, config=request.config)
                return host_api.Done(id=request.id)
            case host_api.Commit():
                self.warm.pop(request.instance, None)
                return host_api.Done(id=request.id)
            case host_api.Revert():
                self.running[request.instance] = self.warm.pop(request.instance)
                return host_api.Done(id=request.id)
            case host_api.Stop() | host_api.KeepData():
                self.running.pop(getattr(request, "instance", ""), None)
                self.kept_data += [request.instances] if isinstance(request, host_api.KeepData) else []
                return host_api.Done(id=request.id)
            case host_api.Status():
                self._ask_health(request.check)
                return host_api.HostStats(id=request.id, **self._paged("instances", request.after, self._figure))
            case host_api.Logs():
                return host_api.Lines(id=request.id, lines=self.kept_log if request.excerpt else ("a line",))
        raise AssertionError(request)

    def _paged(self, field, after, entry):
        """What fits in one packet of the instances after this one, and whether there are more."""
        names = sorted(name for name in self.running if name > after)
        return {field: tuple(map(entry, names[: self.page])), "more": len(names) > self.page}

    def _ask_health(self, wanted):
        """Run a requested health check, and repeat those that failed the last time."""
        for run in self.running.values():
            if run.target not in self.answers:
                continue
            before = self.checks.setdefault(run.target, HealthChecks())
            if run.instance != wanted and before.well:
                continue
            answer = self.answers[run.target].pop(0) if self.answers[run.target] else True
            if answer is not None:
                missed = before.missed + (not answer)
                self.checks[run.target] = HealthChecks(asked=before.asked + 1, missed=missed, well=answer)

    def _running(self, name):
        run = self.running[name]
        warm = self.warm.get(name)
        return host_api.Running(
            instance=name,
            generation=run.generation,
            target=run.target,
            state=InstanceState.RUNNING,
            previous=None if warm is None else warm.generation,
        )

    def _figure(self, name):
        run = self.running[name]
        faults = self.faults.get(run.target, 0)
        return InstanceHealth(
            instance=run.instance,
            target=run.target,
            generation=run.generation,
            state=self.states.get(run.target, InstanceState.RUNNING),
            restarts=5 if run.target in self.states else 0,
            calls={"ok": 10, "guest-trap": faults} if faults else {"ok": 10},
            checks=self.checks.get(run.target),
            metrics=self.metrics.get(run.target, UNSET),
        )

    def kill(self):
        """Lose everything, as after SIGKILL or a power cut."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        for peer in list(self._peers):
            self._drop(peer)
        self.running, self.warm = {}, {}
        self.session = os.urandom(4).hex()
        self.path.unlink(missing_ok=True)

    def targets(self):
        return {name: run.target for name, run in self.running.items()}


class SimTrust:
    """Simulated trust: target path -> manifest."""

    def __init__(self, manifests):
        self.manifests = manifests
        self.trouble = {}  # target -> exceptions to raise, one after another

    def resolve(self, item):
        if self.trouble.get(item.target):
            raise self.trouble[item.target].pop(0)
        found = self.manifests[item.target]
        return SimpleNamespace(manifest=found, grants=found.grants, length=item.length, sha256=item.sha256)


class SimServer:
    """Simulated server: artifacts by sha256, boxes by path."""

    def __init__(self):
        self.artifacts = {}
        self.boxes = {}
        self.trouble = []
        self.fetched = []

    def download(self, path, into, *, length, sha256, progress, cancelled):
        self.fetched.append(sha256)
        if self.trouble:
            raise self.trouble.pop(0)
        into.parent.mkdir(exist_ok=True, parents=True)
        part = into.with_suffix(".part")  # like the real one: an existing file is complete
        part.write_bytes(self.artifacts[sha256])
        part.replace(into)

    def request(self, method, path, *, max_bytes):
        assert method == "GET"
        self.fetched.append(path)
        box = self.boxes.get(path)
        if box is None:
            raise FetchError(RejectCode.NOT_FOUND, f"{path} is not there")
        if len(box) > max_bytes:
            raise FetchError(RejectCode.TOO_LARGE, f"{path}: more than {max_bytes} bytes")
        return box


class QuickImages(ImageStore):
    """Real image store with a compiler that only outputs "compiled"; other tests run the real compiler."""

    async def _run(self, arguments, data, seconds):
        if "--describe" in arguments:
            return b'{"engine": "50.0.1"}', b"", 0
        return b"compiled " + data, b"", 0


class CutStore(Store):
    """Real store with a power switch at a chosen write."""

    def __init__(self, path):
        super().__init__(path)
        self.cut = None
        self.dead = False

    def apply(self, step):
        self._power()
        change = step.change
        if self.cut is None or change is None or (self.cut[0], self.cut[1]) != (change.instance, change.phase.value):
            return super().apply(step)
        if self.cut[2] == "after":
            super().apply(step)
        self.dead = True
        raise PowerCut

    def set_counter(self, name, value):
        self._power()
        super().set_counter(name, value)

    def _power(self):
        if self.dead:
            raise PowerCut


class DeviceKit:
    """Device across boots; only its directory survives a power cut."""

    def __init__(self, directory: Path):
        self.places = Paths(directory / "state", directory / "run")
        for path in (self.places.state, self.places.runtime):
            path.mkdir()
        self.manifests, self.server = {}, SimServer()
        self.places.identity.mkdir()
        self.sealing_key = X25519PrivateKey.generate()
        pem = self.sealing_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (self.places.identity / "sealing.key").write_bytes(pem)
        self.trust = SimTrust(self.manifests)
        self.host = SimHost(self.places.host_socket)
        self.boots = 0
        self.settings = Settings()
        self.images_kind, self.compile_s = QuickImages, 10
        self.mending = {}  # arguments of the restorer: its clock and its pauses
        self.store = self.deployer = None

    def publish(self, version, *, instance="web", attempt=0, rollout="", atomic="", **more):
        target = f"components/acme/web/{version}.wasm"
        data = EMPTY_COMPONENT
        sha256 = hashlib.sha256(data).hexdigest()
        self.server.artifacts[sha256] = data
        self.manifests[target] = manifest(version, **more)
        return Item(
            instance=instance,
            target=target,
            length=len(data),
            sha256=sha256,
            manifest_sha256=self.manifests[target].digest(),
            attempt=attempt,
            rollout=rollout,
            atomic=atomic,
        )

    def seal(self, value, *, name="key", version=1, instance="web", device="device-01234567", **more):
        """Put a box for this device on the server; return the assignment's reference to it."""
        purpose = Purpose(fleet="f", device=device, instance=instance, name=name, version=version, **more)
        box = sealing.seal(value, recipient=sealing.public_key(self.sealing_key), purpose=purpose)
        sha256 = hashlib.sha256(box).hexdigest()
        self.server.boxes[f"/v1/secrets/{sha256}"] = box
        return SecretRef(name=name, sha256=sha256, version=version)

    @staticmethod
    def assignment(version, *items):
        return Assignment(
            fleet="f",
            device="device-01234567",
            version=version,
            issued=NOW,
            expires=NOW + timedelta(days=1),
            items=items,
            stop_all=not items,
        )

    async def boot(self, *, host=True):
        """Boot: start the host, run `restore` as its unit does, then start the agent."""
        self.boots += 1
        if host:
            self.host.start()
        await self.start_agent()

    async def start_agent(self):
        self.store = CutStore(self.places.database)
        self.worker = Database(self.store)
        self.images = self.images_kind(self.places.images, b"k" * 32, memory_bytes=1 << 30, seconds=self.compile_s)
        identity = Identity(
            device="device-01234567", fleet="f", group="", devices_url="", mqtt=(), production=False, floor=NOW
        )
        self.sealed = SecretStore(self.places.secrets, self.places.identity / "sealing.key", identity)
        self.link = HostClient(self.places.host_socket)
        self.carrier = EffectRunner(
            places=self.places,
            settings=self.settings,
            worker=self.worker.run,
            trust=self.trust,
            https=self.server,
            images=self.images,
            sealed=self.sealed,
            host=self.link,
            clock=asyncio.get_running_loop().time,
            jitter=lambda: 0.0,
        )
        self.device = DeviceContext(
            device="device-01234567",
            boot_id=f"boot-{self.boots}",
            places=self.places,
            mac_key=b"k" * 32,
            clock=asyncio.get_running_loop().time,
        )
        self.deployer = Reconciler(
            device=self.device,
            store=self.store,
            worker=self.worker.run,
            carrier=self.carrier,
            sink=self,
            on_revoked=self.settings.policy.on_revoked,
        )
        self.problems = Problems(self.worker)
        self.restorer = restore.HostRestorer(
            host=self.link,
            db=self.worker,
            materials=restore.Materials(self.images, self.places.artifacts, self.settings.policy, self.sealed),
            source=self.server,
            problems=self.problems,
            sink=SimpleNamespace(changed=lambda: None),
            **self.mending,
        )
        self.linking = asyncio.gather(self.link.run(), self.restorer.run())
        await self.deployer.recover()
        self.reconciling = asyncio.ensure_future(self.deployer.run())

    def saved(self, report):
        """Ignore the report."""

    async def stop_agent(self):
        """Stop the agent as by SIGKILL, as far as possible within a process."""
        # first the readers of the host's events: a killed agent receives none
        for task in (self.reconciling, self.linking):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self.link.close()
        self.carrier.close()
        self.worker.close()

    @contextlib.asynccontextmanager
    async def running(self):
        """The agent from its start to a power cut."""
        await self.boot()
        try:
            yield
        finally:
            await self.pull_plug()

    async def pull_plug(self):
        await self.stop_agent()
        self.host.kill()

    async def until(self, condition, what="it", *, seconds=60):
        await eventually_async(condition, what, within_s=seconds, pause_s=0.005)

    async def settled(self, *, seconds=60):
        """Wait until every input is handled, no effect runs, and no change is under way."""
        await self.until(lambda: self.reconciling.done() or self.deployer.is_idle, "settled", seconds=seconds)
        if self.reconciling.done() and not self.store.dead:
            self.reconciling.result()

    async def handled(self):
        """Wait until every input so far is handled."""
        await self.deployer.inbox.join()

    async def run(self, assignment, *, seconds=60):
        await self.deployer.desire(assignment)
        await self.settled(seconds=seconds)

    def recorded(self):
        """Open the store as another process would: the agent's own connection belongs to its database thread."""
        return contextlib.closing(Store(self.places.database, read_only=True))

    def reports(self):
        with self.recorded() as store:
            return [report for report in store.history() if report.progress is None]

    def committed(self):
        with self.recorded() as store:
            return store.committed()

    def chain(self, instance="web"):
        return [report.phase.value for report in self.reports() if report.instance == instance]


@pytest.fixture
def kit(tmp_path):
    return DeviceKit(tmp_path)


@pytest.fixture
def power_cut():
    return PowerCut


@pytest.fixture
def free_port():
    """Return an unused loopback port."""
    return free_ports(1)[0]

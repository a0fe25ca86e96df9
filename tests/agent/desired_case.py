"""Test case of a device with a real repository behind a simulated server."""

import asyncio
import hashlib
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import msgspec

from agent.clock import ReferenceClock
from agent.config import Policy, Settings
from agent.identity.identity import Identity
from agent.link.https import FetchError
from agent.update.problems import Problems
from agent.update.receiver import AssignmentArrived, AssignmentReceiver, FreshnessArrived
from agent.update.state import Committed, DeviceContext
from agent.update.store import Database, Store
from agent.update.trust import DeviceTrust
from fleet.protocol import wire
from fleet.protocol.assignment import Assignment, Fresh, Item
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import Grants, Http, Manifest
from fleet.protocol.messages import DesiredReply
from fleet.protocol.names import TargetName
from signing import director, repository
from signing.keys import generate
from tests.eventually import eventually_async

FLEET, DEVICE = "harbour", "crane-0a1b2c3d"
NOW = datetime.now(UTC).replace(microsecond=0)


class Server:
    """Server with a real repository behind the agent's HTTPS interface."""

    def __init__(self, directory: Path):
        names = ("root", "targets", "snapshot", "timestamp", "director", "main")
        self.keys = {name: generate(directory / f"{name}.pem") for name in names}
        top = {name: self.keys[name] for name in names if name != "main"}
        self.files = repository.create(
            fleet=FLEET, namespaces={"main": self.keys["main"]}, now=NOW, dev=True, ceilings=None, **top
        )
        self.root, self.reachable, self.envelope = self.files["1.root.json"], True, None
        self.replay, self.behind, self.shown = "", False, []

    failure = None

    def request(self, method, path, *, max_bytes, body=None, headers=None):
        if not self.reachable:
            raise FetchError(RejectCode.UNREACHABLE, "no route")
        if self.failure is not None:
            raise self.failure
        if method == "POST":
            self.shown.append((path, body))
            return b""
        if self.behind and path.startswith("/v1/desired"):
            raise FetchError(RejectCode.UNREACHABLE, "409", status=409, body=b'{"type": "ahead"}')
        if path.startswith("/v1/desired?nonce=") and self.envelope is not None:
            nonce = path.rpartition("=")[2]
            fresh = self.fresh(self.replay or nonce, self.envelope)
            return wire.encode(DesiredReply(assignment=self.envelope.decode(), fresh=fresh.decode()))
        name = path.rpartition("/")[2]
        if name not in self.files:
            raise FetchError(RejectCode.NOT_FOUND, name)
        return self.files[name]

    def assignment(self, version, *, signer="director", **more):
        fields = {"fleet": FLEET, "device": DEVICE, "issued": NOW, "expires": NOW + timedelta(days=1)} | more
        made = Assignment(version=version, stop_all=True, **fields)
        return director.sign_assignment(made, self.keys[signer])

    def publish(self, component):
        """Publish a release of the namespace's publisher."""
        described = Manifest(name="web", version="1.0.0", trigger=Http())
        described = msgspec.structs.replace(described, grants=Grants(interfaces=("wasi:clocks",)))
        name = TargetName("main", "web", "1.0.0")
        role = repository.add_target(
            self.newest("main"),
            name=name,
            length=len(component),
            sha256=hashlib.sha256(component).hexdigest(),
            manifest=described,
            signer=self.keys["main"],
            now=NOW,
        )
        self.show(role)
        item = Item(
            instance="web",
            target=name.path,
            length=len(component),
            sha256=hashlib.sha256(component).hexdigest(),
            manifest_sha256=described.digest(),
        )
        return Committed(item=item, manifest=described, generation=1, assignment=1, at=NOW)

    def revoke(self):
        name = TargetName("main", "web", "1.0.0")
        self.show(repository.revoke(self.newest("main"), name=name, signer=self.keys["main"], now=NOW))

    def newest(self, role):
        named = [name for name in self.files if name.endswith(f".{role}.json")]
        return self.files[max(named, key=lambda name: int(name.split(".")[0]))]

    def show(self, role):
        version = json.loads(role)["signed"]["version"]
        self.files[f"{version}.main.json"] = role
        self.files |= repository.online(
            self.files, snapshot_signer=self.keys["snapshot"], timestamp_signer=self.keys["timestamp"], now=NOW
        )

    def fresh(self, nonce, envelope):
        now = datetime.now(UTC).replace(microsecond=0)
        statement = Fresh(
            fleet=FLEET,
            device=DEVICE,
            nonce=nonce,
            assignment_sha256=director.payload_sha256(envelope),
            issued=now,
            expires=now + timedelta(minutes=10),
        )
        return director.sign_fresh(statement, self.keys["director"])


class Deployed:
    def __init__(self):
        self.versions, self.doubts = [], ()

    async def desire(self, assignment):
        self.versions.append(assignment.version)

    async def hold(self, doubts):
        self.doubts = doubts


class SetClock(ReferenceClock):
    """Reference clock whose trustworthiness the test sets."""

    def __init__(self, floor, *, trustworthy):
        super().__init__(floor)
        self.trustworthy = trustworthy

    def is_trustworthy(self):
        return self.trustworthy


class Sink:
    """Report sink that ignores everything."""

    def saved(self, report=None):
        pass

    def changed(self):
        pass


class Hello:
    """Connection to the director: records nonces, and delivers the case's answers as the broker would."""

    def __init__(self, case):
        self.case, self.connected, self.reachable = case, False, True

    @property
    def broker_connected(self):
        return self.connected

    async def hello(self, nonce):
        if not self.reachable:
            return False
        self.case.nonces.append(nonce)
        reply = self.case.answer(nonce)
        if reply is not None:
            self.case.desired.post(FreshnessArrived(reply))
        return True


class Case:
    def __init__(self, tmp_path, *, clock_set=True, strict=True, policy=None):
        self.server, self.deployer, self.nonces = Server(tmp_path), Deployed(), []
        self.directory = tmp_path
        self.store = Store(tmp_path / "store.db")
        self.worker = Database(self.store)
        self.identity = Identity(
            device=DEVICE,
            fleet=FLEET,
            group="",
            devices_url="",
            mqtt=(),
            production=False,
            floor=NOW - timedelta(days=1),
        )
        (tmp_path / "enrolled.json").write_bytes(msgspec.json.encode(self.identity))
        self.clock = SetClock(self.identity.floor, trustworthy=clock_set)
        self.presence = Hello(self)
        self.renewal = SimpleNamespace(renewed=asyncio.Event(), request=lambda: None)
        self.problems = Problems(self.worker)
        self.settings = Settings(production=strict, policy=policy or Policy())
        self.answer = lambda nonce: None
        self.start(self.server)

    def lose_database(self):
        """Replace the database by a new one; `start` restarts the agent with it."""
        self.worker.close()
        for path in self.directory.glob("store.db*"):
            path.unlink()
        self.store = Store(self.directory / "store.db")
        self.worker = Database(self.store)
        self.problems = Problems(self.worker)

    def start(self, source, **trust):
        """Restart the agent with the stored state: another process, source or policy."""
        fields = {"identity": self.identity, "home": self.directory, "production": False} | trust
        self.trust = DeviceTrust(
            root=self.server.root,
            cache=self.directory / "trust",
            https=source,
            store=self.store,
            clock=self.clock,
            **fields,
        )
        self.desired = AssignmentReceiver(
            device=DeviceContext(device=DEVICE, boot_id="b", places=None, mac_key=b"", clock=lambda: 0.0),
            settings=self.settings,
            clock=self.clock,
            trust=self.trust,
            source=source,
            db=self.worker,
            reconciler=self.deployer,
            presence=self.presence,
            renewal=self.renewal,
            problems=self.problems,
            sink=Sink(),
        )

    async def judge(self, *envelopes):
        """Deliver envelopes from the broker, one after another."""
        for envelope in envelopes:
            await self.work(AssignmentArrived(envelope))

    async def poll(self):
        """Poll over HTTPS once."""
        await self.desired.poll()
        await self.work()

    async def work(self, *inputs):
        """Wait until all inputs, and inputs that follow from them, are handled."""
        for each in inputs:
            self.desired.post(each)
        working = asyncio.ensure_future(self.desired.work())
        settled = asyncio.ensure_future(self._settled())
        await asyncio.wait({working, settled}, return_when=asyncio.FIRST_COMPLETED)
        for task in (working, settled):
            task.cancel()
        await asyncio.gather(working, settled, return_exceptions=True)
        for task in (working, settled):
            if not task.cancelled():
                task.result()  # an internal error, or it never settled
        await self.problems.save()

    async def _settled(self):
        await self.desired.inbox.join()
        await eventually_async(lambda: not self.desired.awaits_freshness, "freshness is known, or given up")
        await self.desired.inbox.join()

    def codes(self):
        return [report.code for report in self.store.history()]

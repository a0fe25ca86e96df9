"""Simulated repository in memory: honest by default, hostile on demand.

`Repository` implements the fetch interface of `signing.updater`, signs on demand, and records the fetched files, so
that a test can also prove which files were *not* fetched.
"""

import copy
import hashlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Root, Signed, Snapshot, Targets, Timestamp

from fleet.protocol.assignment import Assignment, Item
from fleet.protocol.manifest import Grants, Http, Manifest
from fleet.protocol.names import TargetName
from signing import director, repository
from signing.errors import FetchNotFound
from signing.policy import Release, Resolved
from signing.state import VerifierState
from signing.trusted_metadata import TrustedMetadata
from signing.updater import MemoryState, Updater
from signing.verifier import Accepted, accept_assignment, published, reconfirm, resolve

START = datetime(2030, 1, 1, tzinfo=UTC)
FLEET = "harbour"
DEVICE = "crane-0a1b2c3d"
TOP_LEVEL = ("root", "targets", "snapshot", "timestamp")


def signer() -> CryptoSigner:
    return CryptoSigner.generate_ed25519()


class Repository:
    """Repository whose `files` tests may change at will; `fetched` lists the names of fetched files."""

    def __init__(
        self,
        namespaces: tuple[str, ...] = ("main",),
        ceilings: dict[str, Grants] | None = None,
        *,
        dev: bool = False,
        fleet: str = FLEET,
    ) -> None:
        self.now = START
        self.fleet = fleet
        self.keys = {name: signer() for name in (*TOP_LEVEL, "director", *namespaces)}
        self.files = repository.create(
            fleet=fleet,
            namespaces={name: self.keys[name] for name in namespaces},
            now=self.now,
            dev=dev,
            ceilings=ceilings,
            **{name: self.keys[name] for name in (*TOP_LEVEL, "director")},
        )
        self.pinned = self.files["1.root.json"]
        self.fetched: list[str] = []
        self.on_fetch: Callable[[str, bytes | None], bytes | None] = lambda _name, data: data
        self.assignments = 0

    # -- the network

    def fetch(self, name: str, max_bytes: int) -> bytes:
        self.fetched.append(name)
        data = self.on_fetch(name, self.files.get(name))
        if data is None:
            raise FetchNotFound(name)
        return data

    # -- the honest publisher, server and director

    def publish(self, version: str = "1.0.0", *, name: str = "hello", space: str = "main", **fields: Any) -> Item:
        """Publish a component and return the item that asks a device to run it."""
        bits = f"{space}/{name}/{version}/{fields.pop('bits', '')}".encode()
        manifest = Manifest(name=name, version=version, trigger=Http(), **fields)
        target = TargetName(space, name, version)
        number, role = repository.latest(self.files, space)
        sha256 = hashlib.sha256(bits).hexdigest()
        new = repository.add_target(
            role, name=target, length=len(bits), sha256=sha256, manifest=manifest, signer=self.keys[space], now=self.now
        )
        self.files[f"{number + 1}.{space}.json"] = new
        self.online()
        return Item(
            instance=name,
            target=target.path,
            length=len(bits),
            sha256=sha256,
            manifest_sha256=manifest.digest(),
        )

    def revoke(self, version: str, *, name: str = "hello", space: str = "main") -> None:
        number, role = repository.latest(self.files, space)
        target = TargetName(space, name, version)
        new = repository.revoke(role, name=target, signer=self.keys[space], now=self.now)
        self.files[f"{number + 1}.{space}.json"] = new
        self.online()

    def online(self) -> None:
        self.files |= repository.online(
            self.files, snapshot_signer=self.keys["snapshot"], timestamp_signer=self.keys["timestamp"], now=self.now
        )

    def assignment(self, *items: Item, **fields: Any) -> Assignment:
        self.assignments += 1
        defaults: dict[str, Any] = {
            "fleet": self.fleet,
            "device": DEVICE,
            "version": self.assignments,
            "issued": self.now,
            "expires": self.now + timedelta(days=7),
            "items": items,
        }
        return Assignment(**(defaults | fields))

    def assign(self, *items: Item, **fields: Any) -> bytes:
        return director.sign_assignment(self.assignment(*items, **fields), self.keys["director"])

    # -- an attacker with keys

    def rewrite(self, role: str, change: Callable[[Any], None], *, key: str | None = None, bump: bool = True) -> None:
        """Change a role's newest metadata at will and sign it with the role's key, or with another."""
        if role == "timestamp":
            data = self.files["timestamp.json"]
        else:
            _, data = repository.latest(self.files, role)
        signed = copy.deepcopy(Metadata.from_bytes(data).signed)
        signed.version += bump
        change(signed)
        self.put(role, signed, key=key)

    def put(self, role: str, signed: Signed, *, key: str | None = None) -> None:
        file: Metadata[Any] = Metadata(signed)
        file.sign(self.keys[key or role])
        name = "timestamp.json" if role == "timestamp" else f"{signed.version}.{role}.json"
        self.files[name] = file.to_bytes()

    def rotate(self, role: str) -> None:
        """Give a top-level role a new key in root, and sign the role again with it."""
        old, new = self.keys[role], signer()
        root: Root = self.signed("root")
        root.version += 1
        root.revoke_key(old.public_key.keyid, role)
        root.add_key(new.public_key, role)
        self.keys[role] = new
        file: Metadata[Any] = Metadata(root)
        file.sign(old if role == "root" else self.keys["root"])
        if role == "root":
            file.sign(new, append=True)
        self.files[f"{root.version}.root.json"] = file.to_bytes()
        if role == "targets":
            self.rewrite("targets", lambda signed: None)

    def rotate_delegation(self, role: str) -> None:
        """Give the director or a namespace a new key in targets."""
        new = signer()

        def change(top: Targets) -> None:
            top.revoke_key(self.keys[role].public_key.keyid, role)
            top.add_key(new.public_key, role)

        self.rewrite("targets", change)
        self.keys[role] = new
        if role != "director":
            self.rewrite(role, lambda signed: None)
        self.online()

    def signed(self, role: str) -> Any:
        data = self.files["timestamp.json"] if role == "timestamp" else repository.latest(self.files, role)[1]
        return copy.deepcopy(Metadata.from_bytes(data).signed)


def promise_snapshot(timestamp: Timestamp, data: bytes, version: int) -> None:
    """Make a timestamp promise this snapshot by length, hash and version."""
    timestamp.snapshot_meta = MetaFile(version, len(data), {"sha256": hashlib.sha256(data).hexdigest()})


def promise_role(snapshot: Snapshot, role: str, data: bytes, version: int) -> None:
    """Make a snapshot promise this role by length, hash and version."""
    snapshot.meta[f"{role}.json"] = MetaFile(version, len(data), {"sha256": hashlib.sha256(data).hexdigest()})


class Device:
    """Device with its verifier and state, over a simulated repository; works as the agent does."""

    def __init__(
        self, repo: Repository, *, device: str = DEVICE, state: VerifierState | None = None, **options: Any
    ) -> None:
        self.repo = repo
        self.device = device
        self.states = MemoryState(state)
        self.updater = Updater(pinned_root=repo.pinned, fetch=repo.fetch, states=self.states, **options)

    @property
    def state(self) -> VerifierState:
        return self.states.load()

    @state.setter
    def state(self, state: VerifierState) -> None:
        self.states.save(state)

    @property
    def trusted(self) -> TrustedMetadata:
        return self.updater.trusted

    @property
    def now(self) -> datetime:
        return self.state.time(self.repo.now)

    def refresh(self) -> None:
        self.updater.refresh(self.now)

    def accept(self, envelope: bytes) -> Accepted:
        self.refresh()
        accepted = accept_assignment(
            self.trusted, envelope, fleet=self.repo.fleet, device=self.device, state=self.state, now=self.now
        )
        self.state = accepted.state
        return accepted

    def resolve(self, item: Item, *, committed: Resolved | None = None, **options: Any) -> Resolved:
        """Check a committed item for revocations, and search any other in the metadata."""
        if committed is not None and item.same_as(committed.item):
            trusted = self.updater.look_for_revocations(item.target)
            return reconfirm(trusted, item, committed.manifest, state=self.state, **options)
        return resolve(self.updater.find(item.target), item, state=self.state, **options)

    def lookup(self, path: str) -> Release:
        return published(self.updater.find(path), path)

    def run(self, envelope: bytes, **options: Any) -> list[Resolved]:
        """Accept an assignment and resolve its items, as a device does before it downloads."""
        accepted = self.accept(envelope)
        return [self.resolve(item, **options) for item in accepted.assignment.items]

    def commit(self, name: str, epoch: int) -> None:
        self.state = self.state.with_committed(name, epoch)


def tampered(data: bytes, path: list[str], value: Any) -> bytes:
    """Return metadata with a field changed and the old signatures."""
    tree = msgspec.json.decode(data)
    node = tree
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = value
    return msgspec.json.encode(tree)

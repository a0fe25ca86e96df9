"""Restoration of everything committed, after a boot or a host that died: without network, TUF or a running agent.

Committed items stand in the store and once more in `runset.json` under the device's MAC, so that a damaged database
does not keep components from running. A missing or damaged image is compiled again from its artifact, whose sha256 is
known.
"""

import asyncio
import contextlib
import hashlib
import hmac
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from agent import systemd
from agent.config import Policy
from agent.host.ipc import host_api
from agent.link.host_client import (
    HostClient,
    HostConnected,
    HostEvent,
    HostGoneError,
    HostLost,
    HostRefusedError,
)
from agent.link.https import FetchError, Source
from agent.update.images import ImageError, ImageStore, OpenImage
from agent.update.problems import Problems, ReportSink
from agent.update.secrets import SecretStore
from agent.update.state import Committed
from agent.update.store import Database, Store, StoreError
from fleet.protocol import wire
from fleet.protocol.assignment import Item
from fleet.protocol.codes import InstanceState
from fleet.protocol.files import atomic_write
from fleet.protocol.manifest import Manifest
from signing.errors import Rejected

log = logging.getLogger("agent.update.restore")

CONNECT_AGAIN_S: Final = 0.2


class RunsetError(Exception):
    """There is no sound record of what is committed."""


class _Runset(msgspec.Struct, frozen=True, kw_only=True):
    v: int = 1
    items: tuple[Committed, ...] = ()
    mac: str = ""


def _mac(runset: bytes, key: bytes) -> str:
    """Return the MAC of a record as it was written, by whichever version, with an empty `mac` in it.

    Raises:
        msgspec.MsgspecError: not a JSON object.
    """
    plain = msgspec.json.decode(runset, type=dict[str, msgspec.Raw])
    return hmac.new(key, msgspec.json.encode({**plain, "mac": ""}), hashlib.sha256).hexdigest()


def write_runset(path: Path, committed: Iterable[Committed], key: bytes) -> None:
    """Write what is committed beside the database; raises `OSError`."""
    runset = _Runset(items=tuple(committed))
    mac = _mac(wire.canonical(runset), key)
    atomic_write(path, wire.canonical(msgspec.structs.replace(runset, mac=mac)), mode=0o600)


def read_runset(path: Path, key: bytes) -> tuple[Committed, ...]:
    """Read it back.

    Raises:
        RunsetError: there is none, or its MAC does not hold.
    """
    try:
        written = path.read_bytes()
        runset, mac = msgspec.json.decode(written, type=_Runset), _mac(written, key)
    except (OSError, *wire.JSON_ERRORS) as error:
        raise RunsetError(f"cannot read {path}: {error}") from error
    if not hmac.compare_digest(mac, runset.mac):
        raise RunsetError(f"{path} was changed: its MAC does not hold")
    return runset.items


def committed(database: Path, runset: Path, key: bytes) -> tuple[Committed, ...]:
    """What is to run: from the store, or from `runset.json` where the store cannot be read.

    Raises:
        RunsetError: neither can be read.
    """
    if not database.exists():
        return read_runset(runset, key) if runset.exists() else ()
    try:
        store = Store(database, read_only=True)
        try:
            return store.committed()
        finally:
            store.close()
    except StoreError:
        return read_runset(runset, key)


def run_of(item: Item, manifest: Manifest, generation: int, policy: Policy) -> host_api.Run:
    """What the host is told of an instance: its manifest, narrowed by the operator and by the board's policy."""
    defaults = {name: key.default for name, key in manifest.config.items() if key.default is not None}
    return host_api.Run(
        instance=item.instance,
        generation=generation,
        target=item.target,
        manifest=manifest,
        grants=manifest.grants if item.grants is None else item.grants,
        limits=policy.limit(manifest.limits),
        config={**defaults, **item.config},
        port=item.port,
        share_worker=item.share_worker,
        secrets=tuple(ref.name for ref in item.secrets),
    )


def take_over(store: Store, runset: Path, key: bytes) -> int:
    """Into a store that was made anew (the old one was lost), take what runs, so that it goes on running.

    Returns:
        How many instances.
    """
    if store.counter("generation") or store.committed():
        return 0
    try:
        items = read_runset(runset, key)
    except RunsetError:
        return 0
    for item in items:
        store.save(committed=item)
    store.set_counter("generation", max((item.generation for item in items), default=0))
    return len(items)


@dataclass(frozen=True, slots=True)
class Restored:
    """How it went with one instance; `problem` is empty when it runs."""

    instance: str
    problem: str = ""


async def wait_for_host(link: HostClient, seconds: float) -> host_api.Welcome:
    """Connect as soon as there is a host; raises `HostGoneError` after so many seconds without one."""
    deadline = asyncio.get_running_loop().time() + seconds
    while True:
        try:
            return await link.connect()
        except HostGoneError:
            if asyncio.get_running_loop().time() >= deadline:
                raise
        await asyncio.sleep(CONNECT_AGAIN_S)


async def restore(
    link: HostClient,
    welcome: host_api.Welcome,
    items: Iterable[Committed],
    images: ImageStore,
    artifacts: Path,
    policy: Policy,
    sealed: SecretStore,
) -> list[Restored]:
    """Start every committed instance that the host does not run.

    Args:
        link: connected.
        welcome: what the host said it runs.
        items: what is committed.
        images: of this board.
        artifacts: where artifacts lie, for images that have to be made anew.
        policy: the board owner's.
        sealed: this board's secrets.

    Raises:
        HostGoneError: the host went away meanwhile.
    """
    there = {each.instance for each in welcome.running if each.state is not InstanceState.STOPPED}
    restored = []
    for item in items:
        if item.item.instance in there:
            continue
        run = run_of(item.item, item.manifest, item.generation, policy)
        try:
            await start(link, item.item, run, images, artifacts, sealed)
        except (ImageError, HostRefusedError, Rejected) as error:
            restored.append(Restored(item.item.instance, str(error)))
        else:
            restored.append(Restored(item.item.instance))
    return restored


async def start(
    link: HostClient,
    item: Item,
    run: host_api.Run,
    images: ImageStore,
    artifacts: Path,
    sealed: SecretStore,
    together: tuple[str, ...] = (),
    *,
    probation: bool = False,
) -> host_api.Started:
    """Start one instance with its checked image and its secrets; a missing or damaged image is made anew first.

    Args:
        link: to the host.
        item: what to start.
        run: what the host is told of it.
        images: of this board.
        artifacts: where artifacts lie.
        sealed: this board's secrets.
        together: the instances that take over in the same moment, each by a start of its own.
        probation: it is not committed yet; the host asks its health check more often until it is.

    Raises:
        ImageError: it cannot be.
        Rejected: a secret cannot be opened.
        HostRefusedError: the host could not start it; what ran before still runs.
        HostGoneError: no host.
    """
    image = await checked_image(item, run.manifest, images, artifacts)
    try:
        run = msgspec.structs.replace(run, image_sha256=image.sha256)
        secrets = sealed.descriptor(item)
        if secrets >= 0:
            try:
                await link.ask(
                    host_api.PutSecrets, host_api.Done, fd=secrets, instance=run.instance, generation=run.generation
                )
            finally:
                os.close(secrets)
        return await link.ask(
            host_api.Start, host_api.Started, fd=image.descriptor, run=run, together=together, probation=probation
        )
    finally:
        os.close(image.descriptor)


async def checked_image(item: Item, manifest: Manifest, images: ImageStore, artifacts: Path) -> OpenImage:
    """Open the checked image; made anew when there is none or it is damaged. Raises `ImageError`."""
    fuel = manifest.limits.fuel > 0
    try:
        return await images.open(sha256=item.sha256, manifest_sha256=item.manifest_sha256, fuel=fuel)
    except ImageError:
        artifact = artifacts / f"{item.sha256}.wasm"
        await images.make(artifact, sha256=item.sha256, manifest_sha256=item.manifest_sha256, fuel=fuel)
        return await images.open(sha256=item.sha256, manifest_sha256=item.manifest_sha256, fuel=fuel)


@dataclass(frozen=True, slots=True)
class Materials:
    """Everything that an instance is started from on this device.

    Attributes:
        artifacts: directory of artifacts, for images that have to be compiled again.
        policy: the device owner's.
    """

    images: ImageStore
    artifacts: Path
    policy: Policy
    secrets: SecretStore


class HostRestorer:
    """Reader of the host's events: restores everything committed on each new host, and only then lets others ask."""

    name = "host events"

    def __init__(
        self,
        *,
        host: HostClient,
        db: Database,
        materials: Materials,
        source: Source,
        problems: Problems,
        sink: ReportSink,
    ) -> None:
        """Prepare a restorer.

        Args:
            host: whose events are read, here alone.
            db: the store.
            materials: of this device.
            source: of boxes that were damaged on the disk.
            problems: shows which instance could not be started.
            sink: told that health changed.
        """
        self._host = host
        self._db = db
        self._materials = materials
        self._source = source
        self._problems = problems
        self._sink = sink

    async def run(self) -> None:
        """Handle the host's events, for ever. A restoration ends with the connection that it was begun on."""
        restoring: asyncio.Task[None] | None = None
        async with asyncio.TaskGroup() as tasks:
            async for event in self._host.events():
                if isinstance(event, HostConnected | HostLost) and restoring is not None:
                    restoring.cancel()
                    await asyncio.wait({restoring})
                    restoring = None
                if isinstance(event, HostConnected):
                    restoring = tasks.create_task(self._restore_all(event.welcome))
                self._tell(event)

    def _tell(self, event: HostEvent) -> None:
        match event:
            case host_api.Trapped():
                said = f"{event.instance}: {event.code}: {event.message}".partition("\n")[0]
                log.warning("%s", said, extra=systemd.fields(instance=event.instance, code=event.code))
            case host_api.Changed():
                log.info("%s: %s %s", event.instance, event.state, event.message)
                self._sink.changed()
            case _:
                pass

    async def _restore_all(self, welcome: host_api.Welcome) -> None:
        try:
            await self._restore(welcome)
        except HostGoneError:
            if self._host.welcome is welcome:  # else this is another connection already
                self._host.close()

    async def _restore(self, welcome: host_api.Welcome) -> None:
        items = await self._db(Store.committed)
        await self._stop_unknown(welcome, items)
        for each in items:
            with contextlib.suppress(FetchError, Rejected, OSError):  # starting the instance says what is wrong
                await asyncio.to_thread(self._materials.secrets.fetch, each.item, self._source)
        of = self._materials
        restored = await restore(self._host, welcome, items, of.images, of.artifacts, of.policy, of.secrets)
        for one in restored:
            source = f"restore {one.instance}"
            if one.problem:
                self._problems.set(source, f"{one.instance} could not be started: {one.problem}")
                log.error("%s", self._problems.text(source))
            else:
                self._problems.clear(source)
                log.info("%s runs again", one.instance)
        if self._host.connected and self._host.welcome is welcome:  # else another host follows, with its own welcome
            self._host.ready.set()
        self._sink.changed()

    async def _stop_unknown(self, welcome: host_api.Welcome, items: Iterable[Committed]) -> None:
        """Stop instances that are neither committed nor being changed."""
        changing = {each.instance for each in await self._db(Store.changes)}
        known = {each.item.instance for each in items} | changing
        for running in welcome.running:
            if running.instance not in known:
                log.warning("%s runs on the host and belongs to nothing: stopped", running.instance)
                with contextlib.suppress(HostRefusedError):
                    await self._host.ask(host_api.Stop, host_api.Done, instance=running.instance)

"""Restoration of the committed instances after a boot or a crash of the host, without network, TUF or running agent.

Committed items are stored in the database and also in `runset.json` with the device's MAC, so that components run even
if the database is damaged. The versions that the verifier remembers stand there too, as of the last commit: a lost
database does not make the device accept an assignment again that is older than that. A missing or damaged image is
compiled again from its artifact, whose sha256 is known. Where the artifact is lost too, the agent fetches it again.
"""

import asyncio
import contextlib
import hashlib
import hmac
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from agent import disk, systemd
from agent.config import Policy, packages_of
from agent.disk import Write
from agent.host.ipc import host_api
from agent.link.host_client import (
    HostClient,
    HostConnected,
    HostEvent,
    HostGoneError,
    HostLost,
    HostRefusedError,
)
from agent.link.https import ArtifactSource, CancelledError, FetchError
from agent.update import packages
from agent.update.images import ImageError, ImageStore, OpenImage
from agent.update.problems import NOT_STARTED, Problems, ReportSink
from agent.update.secrets import SecretStore
from agent.update.state import Committed, DataRef
from agent.update.store import Database, Store, StoreError
from fleet.protocol import files, wire
from fleet.protocol.assignment import Item
from fleet.protocol.codes import InstanceState, RejectCode
from fleet.protocol.manifest import Manifest
from signing.errors import Rejected
from signing.state import VerifierState

log = logging.getLogger("agent.update.restore")

CONNECT_AGAIN_S: Final = 0.2
MEND_FIRST_S: Final = 5.0
MEND_MAX_S: Final = 900.0
MEND_LASTING_MAX_S: Final = 86400.0
"""Pauses before an instance that could not be restored is tried again: doubling, from the first to the longest.

The longest is a day where only another release or a person is likely to help: each try may cost a download or a
compilation. PORT_IN_USE costs neither.
"""
_PASSING: Final = frozenset(
    {
        RejectCode.UNREACHABLE,
        RejectCode.TOO_SLOW,
        RejectCode.PORT_IN_USE,
        RejectCode.HOST_GONE,
        RejectCode.INTERRUPTED,
    }
)


class RunsetError(Exception):
    """No intact record of the committed items."""


class _Runset(msgspec.Struct, frozen=True, kw_only=True):
    v: int = 1
    items: tuple[Committed, ...] = ()
    facts: VerifierState = VerifierState()
    mac: str = ""


def _mac(runset: bytes, key: bytes) -> str:
    """Return the MAC of a record as it was written, by whichever version, with an empty `mac` in it.

    Raises:
        msgspec.MsgspecError: not a JSON object.
    """
    plain = msgspec.json.decode(runset, type=dict[str, msgspec.Raw])
    return hmac.new(key, msgspec.json.encode({**plain, "mac": ""}), hashlib.sha256).hexdigest()


def write_runset(path: Path, committed: Iterable[Committed], facts: VerifierState, key: bytes) -> None:
    """Write the committed items and what the verifier remembers to the run set; raises `OSError`.

    What only a newer version knows of the items that stay is kept.
    """
    runset = _Runset(items=tuple(committed), facts=facts)
    try:
        before = files.read(path)
        earlier = {(each.item.instance, each.generation): each for each in _read(path, key).items}
        raw = [msgspec.json.encode(each) for each in msgspec.json.decode(before).get("items", [])]
    except (OSError, RunsetError, *wire.JSON_ERRORS):
        plain = msgspec.json.decode(wire.canonical(runset))
    else:
        bodies = dict(zip(earlier, raw, strict=True)) if len(earlier) == len(raw) else {}
        kept = [wire.keeping(bodies.get((each.item.instance, each.generation), b""), each) for each in runset.items]
        plain = msgspec.json.decode(wire.keeping(before, runset, goes_on=("facts",)))
        plain["items"] = [msgspec.json.decode(each) for each in kept]
    written = wire.canonical(plain)
    disk.write(Write.RUNSET, path, wire.canonical({**plain, "mac": _mac(written, key)}), mode=0o600)


def read_runset(path: Path, key: bytes) -> tuple[Committed, ...]:
    """Read the committed items from the run set.

    Raises:
        RunsetError: the file cannot be read, or its MAC does not match.
    """
    return _read(path, key).items


def _read(path: Path, key: bytes) -> _Runset:
    try:
        written = files.read(path)
        runset, mac = msgspec.json.decode(written, type=_Runset), _mac(written, key)
    except (OSError, *wire.JSON_ERRORS) as error:
        raise RunsetError(f"cannot read {path}: {error}") from error
    if not hmac.compare_digest(mac, runset.mac):
        raise RunsetError(f"{path} was changed: its MAC does not match")
    return runset


def committed(database: Path, runset: Path, key: bytes) -> tuple[Committed, ...]:
    """Read the committed items from the database, or from `runset.json` if the database cannot be read or is new.

    A power cut may come between the making of a database for one that was lost and its filling.

    Raises:
        RunsetError: neither file can be read.
    """
    if not database.exists():
        return read_runset(runset, key) if runset.exists() else ()
    try:
        store = Store(database, read_only=True)
        try:
            if not store.is_new():
                return store.committed()
        finally:
            store.close()
    except StoreError:
        return read_runset(runset, key)
    try:
        return read_runset(runset, key)
    except RunsetError:
        return ()


def run_of(item: Item, manifest: Manifest, generation: int, policy: Policy) -> host_api.Run:
    """Make the host's request for an item: its manifest, narrowed by the operator and the device owner's policy."""
    defaults = {name: key.default for name, key in manifest.config.items() if key.default is not None}
    grants = manifest.grants if item.grants is None else item.grants
    return host_api.Run(
        instance=item.instance,
        generation=generation,
        target=item.target,
        manifest=manifest,
        grants=grants,
        limits=policy.limit(manifest.limits),
        config={**defaults, **item.config},
        port=item.port,
        share_worker=item.share_worker and policy.share_workers,
        secrets=tuple(ref.name for ref in item.secrets),
        directories=policy.mounts(grants),
        serial={each.name: policy.serial[each.name] for each in grants.devices.serial if each.name in policy.serial},
    )


def take_over(store: Store, runset: Path, key: bytes, *, now: datetime | None = None) -> int:
    """Copy the run set into a new store after the old one was lost: instances keep running, versions do not fall.

    Args:
        store: of this device.
        runset: file with the run set.
        key: of its MAC.
        now: not before the true time of the device's last report; the system clock by default.

    Returns:
        The number of instances.
    """
    if not store.is_new():
        return 0
    try:
        found = _read(runset, key)
    except RunsetError:
        if not (store.replaced or store.waits):
            return 0
        found = _Runset()
    # Nobody knows how many reports there were, but a device makes fewer than one a second.
    store.fill(found.items, found.facts, sequence=int((now or datetime.now(UTC)).timestamp()))
    return len(found.items)


@dataclass(frozen=True, slots=True)
class Restored:
    """Outcome of the restoration of an instance; `problem` is empty if it runs, `code` says of which kind it is."""

    instance: str
    problem: str = ""
    code: RejectCode = RejectCode.INTERNAL


async def wait_for_host(link: HostClient, seconds: float) -> host_api.Welcome:
    """Connect as soon as a host listens; raises `HostGoneError` after `seconds`."""
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
        link: connection to the host.
        welcome: names the instances that the host runs.
        items: committed items.
        images: images of this device.
        artifacts: directory of artifacts, for images that must be compiled again.
        policy: the device owner's.
        sealed: secrets of this device.

    Raises:
        HostGoneError: the host connection was lost.
    """
    there = _running(welcome)
    restored = []
    for item in items:
        if item.item.instance in there or item.manifest.is_data:
            continue
        run = run_of(item.item, item.manifest, item.generation, policy)
        try:
            run = await with_data(link, run, artifacts, item.data)
            await start(link, item.item, run, images, artifacts, sealed)
        except HostRefusedError as error:
            restored.append(Restored(item.item.instance, str(error), error.failed.code))
        except (ImageError, Rejected) as error:
            restored.append(Restored(item.item.instance, str(error), error.code))
        else:
            restored.append(Restored(item.item.instance))
    return restored


def _running(welcome: host_api.Welcome) -> set[str]:
    return {each.instance for each in welcome.running if each.state is not InstanceState.STOPPED}


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
    """Start an instance with its verified image and its secrets; compile the image again if it is missing or damaged.

    Args:
        link: connection to the host.
        item: the item to start.
        run: the host's request for it.
        images: images of this device.
        artifacts: directory of artifacts.
        sealed: secrets of this device.
        together: instances of the same atomic set, which take over in the same moment, each by its own start.
        probation: the item is not committed yet; the host runs its health check more often until then.

    Raises:
        ImageError: the image cannot be made or used.
        Rejected: a secret cannot be opened.
        HostRefusedError: the host could not start the instance; the previous generation keeps running.
        HostGoneError: no host, or the connection was lost.
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


async def with_data(link: HostClient, run: host_api.Run, artifacts: Path, data: tuple[DataRef, ...]) -> host_api.Run:
    """Return the host's request with the data packages that the instance reads.

    Raises:
        ImageError: NOT_FOUND: a package is lost or damaged; HOST_GONE: the host that runs mounts none.
        HostGoneError: no host.
    """
    if not data:
        return run
    welcome = link.welcome or await link.hello()
    if welcome.protocol < host_api.MOUNTS_DATA:
        why = "fleet-host is of an earlier version, which mounts no data packages: restart fleet-host"
        raise ImageError(RejectCode.HOST_GONE, why)
    directory = packages_of(artifacts.parent)
    found = await asyncio.to_thread(packages.mounts, directory, run.manifest, data)
    return msgspec.structs.replace(run, packages=found)


async def checked_image(item: Item, manifest: Manifest, images: ImageStore, artifacts: Path) -> OpenImage:
    """Open an item's verified image, compiled again if missing or damaged. Raises `ImageError`."""
    fuel = manifest.limits.fuel > 0
    try:
        return await images.open(sha256=item.sha256, manifest_sha256=item.manifest_sha256, fuel=fuel)
    except ImageError:
        artifact = artifacts / f"{item.sha256}.wasm"
        await images.make(
            artifact,
            sha256=item.sha256,
            manifest_sha256=item.manifest_sha256,
            fuel=fuel,
            sockets=manifest.grants.sockets,
        )
        return await images.open(sha256=item.sha256, manifest_sha256=item.manifest_sha256, fuel=fuel)


@dataclass(frozen=True, slots=True)
class Materials:
    """Objects from which instances are started on this device.

    Attributes:
        artifacts: directory of artifacts, for images that have to be compiled again.
        policy: the device owner's.
    """

    images: ImageStore
    artifacts: Path
    policy: Policy
    secrets: SecretStore


@dataclass(slots=True)
class _Mending:
    """Tries to mend an instance, over all connections to the host.

    Attributes:
        code: what was wrong at the last try.
        pause_s: before the try after the next.
        due: when to try next, in seconds of the clock.
    """

    code: RejectCode
    pause_s: float
    due: float

    def put_off(self, now: float, *, has_tried: bool) -> None:
        """Plan the next try, after one that failed or one that a change held up."""
        longest = MEND_LASTING_MAX_S if has_tried and self.code not in _PASSING else MEND_MAX_S
        self.due = now + min(longest, self.pause_s)
        self.pause_s = min(longest, 2 * self.pause_s)


class Pauses(NamedTuple):
    """Pauses between tries: a clock of seconds that do not jump, and how to wait for some of them."""

    clock: Callable[[], float]
    sleep: Callable[[float], Awaitable[None]]


PAUSES: Final = Pauses(time.monotonic, asyncio.sleep)


class HostRestorer:
    """Reader of the host's events: restores the committed instances on each new host before others may use it."""

    name = "host events"

    def __init__(
        self,
        *,
        host: HostClient,
        db: Database,
        materials: Materials,
        source: ArtifactSource,
        problems: Problems,
        sink: ReportSink,
        pauses: Pauses = PAUSES,
    ) -> None:
        """Prepare a restorer.

        Args:
            host: connection to the host; its events are read only here.
            db: the store.
            materials: of this device.
            source: of artifacts and boxes that were lost or damaged on disk.
            problems: lists instances that could not be started.
            sink: notified of changes of health.
            pauses: between two tries.
        """
        self._host = host
        self._db = db
        self._materials = materials
        self._source = source
        self._problems = problems
        self._sink = sink
        self._clock, self._sleep = pauses
        self._failed: dict[str, _Mending] = {}

    async def run(self) -> None:
        """Handle the host's events, forever. A restoration ends with the connection on which it began."""
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
                text = f"{event.instance}: {event.code}: {event.message}".partition("\n")[0]
                log.warning("%s", text, extra=systemd.fields(instance=event.instance, code=event.code))
            case host_api.Changed():
                log.info("%s: %s %s", event.instance, event.state, event.message)
                self._sink.changed()
            case _:
                pass

    async def _restore_all(self, welcome: host_api.Welcome) -> None:
        try:
            await self._restore(welcome)
            while self._failed:
                await self._mend()
                if self._failed:
                    # an instance that was removed is no problem any more: looked at more often than mended
                    due = min(each.due for each in self._failed.values())
                    await self._sleep(min(MEND_MAX_S, max(0.0, due - self._clock())))
        except HostGoneError:
            if self._host.welcome is welcome:  # otherwise this is already another connection
                self._host.close()

    async def _restore(self, welcome: host_api.Welcome) -> None:
        items = await self._db(Store.committed)
        await self._stop_unknown(welcome, items)
        await self._revert_unknown(welcome)
        for each in items:
            with contextlib.suppress(FetchError, Rejected, OSError):  # starting the instance reports the error
                await asyncio.to_thread(self._materials.secrets.fetch, each.item, self._source)
        await self._start(welcome, items)
        # Otherwise another host follows, with its own welcome.
        if self._host.connected and self._host.welcome is welcome:
            self._host.ready.set()
        self._sink.changed()

    async def _start(self, welcome: host_api.Welcome, items: Iterable[Committed]) -> None:
        """Start those of the items that the host does not run, and note which of them could not be started."""
        of = self._materials
        restored = await restore(self._host, welcome, items, of.images, of.artifacts, of.policy, of.secrets)
        for one in restored:
            self._note(one)

    def _note(self, one: Restored) -> None:
        source = f"restore {one.instance}"
        if not one.problem:
            self._failed.pop(one.instance, None)
            self._problems.clear(source)
            log.info("%s runs again", one.instance)
            return
        self._failed.setdefault(one.instance, _Mending(one.code, MEND_FIRST_S, self._clock())).code = one.code
        text = NOT_STARTED.format(one.instance) + one.problem
        if text != self._problems.text(source):
            self._problems.set(source, text)
            log.error("%s", text)

    async def _mend(self) -> None:
        """Make the files of instances whose time has come anew, and start them.

        Changes go on meanwhile, and a start may take minutes. So before each start, the host and the store are asked
        again: an item that was removed, stopped or replaced in between stays as it is now.
        """
        missing, now = await self._missing(await self._host.hello()), self._clock()
        due = {instance for instance, each in self._failed.items() if each.due <= now}
        tried = [each for each in missing if each.item.instance in due]
        ready = {each.item.instance for each in tried if await self._has_files(each)}
        for instance in sorted(ready):
            welcome = await self._host.hello()
            missing = await self._missing(welcome)
            await self._start(welcome, [each for each in missing if each.item.instance == instance])
        names = {each.item.instance for each in tried}
        for instance in due & self._failed.keys():
            self._failed[instance].put_off(self._clock(), has_tried=instance in names)
        self._sink.changed()

    async def _missing(self, welcome: host_api.Welcome) -> list[Committed]:
        """Return the items that could not be started, and still are to run; those being changed wait for that."""
        there = _running(welcome)
        changing = {each.instance for each in await self._db(Store.changes)}
        items = {each.item.instance: each for each in await self._db(Store.committed)}
        for instance in [each for each in self._failed if each in there or each not in items]:
            self._failed.pop(instance)
            self._problems.clear(f"restore {instance}")
        return [items[instance] for instance in sorted(self._failed.keys() - changing)]

    async def _has_files(self, committed: Committed) -> bool:
        """Make sure of an item's artifact, image and secrets; note the problem if that fails."""
        item, of = committed.item, self._materials
        try:
            with contextlib.suppress(FetchError, Rejected, OSError):  # starting the instance reports the error
                await asyncio.to_thread(of.secrets.fetch, item, self._source)
            try:
                image = await checked_image(item, committed.manifest, of.images, of.artifacts)
            except ImageError as error:
                if error.code not in {RejectCode.NOT_FOUND, RejectCode.HASH_MISMATCH}:
                    raise
                artifact = of.artifacts / f"{item.sha256}.wasm"
                await self._fetch(item, item.sha256, item.length, artifact)
                image = await checked_image(item, committed.manifest, of.images, of.artifacts)
            await self._fetch_data(committed)
        except (FetchError, ImageError, OSError) as error:
            code = RejectCode.NO_SPACE if isinstance(error, OSError) else error.code
            self._note(Restored(item.instance, str(error), code))
            return False
        os.close(image.descriptor)
        return True

    async def _fetch_data(self, committed: Committed) -> None:
        """Fetch again the data packages of an instance that were lost. Raises as `_fetch`."""
        directory = packages_of(self._materials.artifacts.parent)
        for ref in committed.data:
            path = packages.file_of(directory, ref.target, ref.sha256)
            if not await asyncio.to_thread(packages.is_sound, path, ref.length, ref.sha256):
                await self._fetch(committed.item, ref.sha256, ref.length, path)

    async def _fetch(self, item: Item, sha256: str, length: int, into: Path) -> None:
        """Fetch a lost file beside its place, where no change's download writes, and then put it there."""
        cancelled = threading.Event()
        log.warning("%s: a file of %s is lost or damaged on the disk, and is fetched again", item.instance, item.target)

        def run() -> None:
            beside = into.with_name(f"{sha256}.again")
            with contextlib.suppress(CancelledError):
                self._source.download(
                    f"/v1/artifacts/{sha256}",
                    beside,
                    length=length,
                    sha256=sha256,
                    progress=lambda _received: None,
                    cancelled=cancelled,
                )
                disk.move(Write.ARTIFACT_AGAIN, beside, into)

        try:
            await asyncio.to_thread(run)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def _revert_unknown(self, welcome: host_api.Welcome) -> None:
        """Take back new versions on probation of which the agent knows nothing, as after the loss of its database."""
        changing = {each.instance for each in await self._db(Store.changes)}
        # read after the changes: one that has ended by then is committed
        committed = {each.item.instance: each.generation for each in await self._db(Store.committed)}
        for running in welcome.running:
            known = None if running.instance in changing else committed.get(running.instance)
            if running.previous is not None and running.previous == known:
                log.warning("%s: its newer version is neither committed nor being changed", running.instance)
                with contextlib.suppress(HostRefusedError):
                    await self._host.ask(
                        host_api.Revert, msgspec.Struct, instance=running.instance, generation=running.generation
                    )

    async def _stop_unknown(self, welcome: host_api.Welcome, items: Iterable[Committed]) -> None:
        """Stop instances that are neither committed nor being changed; none while no record tells which those are."""
        if await self._db(Store.knows_nothing):
            log.warning("no record tells what is to run: what runs stays until the fleet says so")
            return
        changing = {each.instance for each in await self._db(Store.changes)}
        known = {each.item.instance for each in items} | changing
        for running in welcome.running:
            if running.instance not in known:
                log.warning("stopped %s: it is neither committed nor being changed", running.instance)
                with contextlib.suppress(HostRefusedError):
                    await self._host.ask(host_api.Stop, host_api.Done, instance=running.instance)

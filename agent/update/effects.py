"""Effects of the update machine: fetch, verify, compile, swap, watch, commit, revert, stop; and eviction.

Each effect is a coroutine that returns an `EffectResult`. Effects make no decisions and keep no state. An expected
failure is a result with a code; an exception that leaves this module is a bug in the agent. Every effect may be
repeated from its start, as happens after a power cut.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from agent import disk
from agent.config import Paths, Settings
from agent.disk import Point, Write
from agent.host.ipc import host_api
from agent.link.bundle import BundleSource
from agent.link.host_client import HostClient, HostGoneError, HostRefusedError
from agent.link.https import CancelledError, FetchError
from agent.update import images, packages
from agent.update.images import ImageError, ImageStore
from agent.update.machine import Effect, Event, retry_delay_s
from agent.update.probation import Judgement, ProbationSample, Terms, Verdict, confirm, judge
from agent.update.restore import run_of, start, with_data
from agent.update.secrets import SecretStore
from agent.update.state import DONE, Change, Committed, DeploymentState, EffectResult, fault, lost, refused
from agent.update.store import Run
from agent.update.trust import DeviceTrust
from fleet.component import reader
from fleet.protocol import files
from fleet.protocol.assignment import Item
from fleet.protocol.codes import RETRYABLE, InstanceState, RejectCode
from fleet.protocol.manifest import Manifest, MetricGate, Service
from fleet.protocol.messages import InstanceHealth
from signing.errors import Rejected
from signing.policy import Resolved

log = logging.getLogger("agent.update.effects")

WATCH_S: Final = 1.0
PROGRESS_BYTES: Final = 1 << 20
_NOTHING_FOR_DATA: Final = frozenset({Effect.COMPILE, Effect.SWAP, Effect.COMMIT, Effect.REVERT})
"""Effects on what runs: data starts nothing, and instances that read it are swapped by changes of their own."""

_OF_THIS_DISK: Final = frozenset({RejectCode.NOT_FOUND, RejectCode.HASH_MISMATCH, RejectCode.IMAGE_DAMAGED})
"""Codes of the image store for files that this device lost or damaged after their check: no verdict on them."""


def _delayed(code: RejectCode, message: str) -> EffectResult:
    event = Event.DELAYED if code in RETRYABLE and code is not RejectCode.NO_SPACE else Event.REFUSED
    return EffectResult(event=event, code=code, message=message)


def _sound(path: Path, length: int, sha256: str) -> bool:
    """Return whether an artifact on disk is as signed; remove one that was changed."""
    try:
        with files.open_to_read(path) as file:
            size = os.fstat(file.fileno()).st_size
            found = size, hashlib.file_digest(file, "sha256").hexdigest() if size == length else ""
    except OSError:
        return False
    if found == (length, sha256):
        return True
    disk.remove(Write.ARTIFACT_DAMAGED, path, missing_ok=True)
    return False


def _read(path: Path, item: Item) -> reader.Component | None:
    """Read an artifact on disk as a component; remove one that was changed, and return None for it.

    Raises:
        OSError: it cannot be read.
        reader.NotAComponentError: not a component that can run here.
    """
    data = files.read(path)
    if len(data) != item.length or hashlib.sha256(data).hexdigest() != item.sha256:
        disk.remove(Write.ARTIFACT_DAMAGED, path, missing_ok=True)
        return None
    return reader.read(data, file_name=item.target)


@dataclass(frozen=True, slots=True, kw_only=True)
class EffectContext:
    """Context of an effect, besides its change.

    Attributes:
        progress: takes the percentage of a download, on the event loop.
        together: instances that switch in the same moment as this one.
        committed: committed item of the instance; None for none.
        renew: gives the committed item a generation under which it may be started beside a newer one.
        after_fault: the effect failed by a bug before, so that it waits as a delayed download does.
        in_use: sha256 of the data packages that stay.
    """

    progress: Callable[[int], None]
    together: tuple[str, ...] = ()
    committed: Committed | None = None
    renew: Callable[[Committed], Awaitable[Committed]]
    after_fault: bool = False
    in_use: frozenset[str] = frozenset()


class EffectRunner:
    """Runs the effects of the update machine on this device."""

    def __init__(
        self,
        *,
        places: Paths,
        settings: Settings,
        worker: Run,
        trust: DeviceTrust,
        https: BundleSource,
        images: ImageStore,
        sealed: SecretStore,
        host: HostClient,
        clock: Callable[[], float],
        jitter: Callable[[], float],
    ) -> None:
        """Prepare a runner.

        Args:
            places: directories of the agent.
            settings: of the device's owner.
            worker: the thread for TUF and SQLite.
            trust: resolves items.
            https: source of artifacts and sealed secrets.
            images: compiles artifacts.
            sealed: sealed secrets.
            host: runs instances.
            clock: seconds that do not jump (boot time).
            jitter: gives a number from 0 to 1.
        """
        self._places = places
        self._settings = settings
        self._worker = worker
        self._trust = trust
        self._https = https
        self._images = images
        self._sealed = sealed
        self._host = host
        self._clock = clock
        self._jitter = jitter
        self._downloads = ThreadPoolExecutor(1, thread_name_prefix="download")

    def _artifact(self, sha256: str) -> Path:
        return self._places.artifacts / f"{sha256}.wasm"

    async def run(self, effect: Effect, change: Change, context: EffectContext) -> EffectResult:
        """Carry out an effect of a change.

        STAGE, REMEMBER and CLOSE have nothing to carry out, and are not asked for.
        """
        if context.after_fault and effect is not Effect.RETRY:
            await self._back_off(change)
        carry_out: dict[Effect, Callable[[], Awaitable[EffectResult]]] = {
            Effect.FETCH: lambda: self.fetch(change, context),
            Effect.RETRY: lambda: self.retry(change, context),
            Effect.VERIFY: lambda: self.verify(change),
            Effect.COMPILE: lambda: self.compile(change),
            Effect.SWAP: lambda: self.swap(change, context.together),
            Effect.STOP: lambda: self.stop(change),
            Effect.WATCH: lambda: self.runs(change) if change.well else self.watch(change),
            Effect.COMMIT: lambda: self.commit(change),
            Effect.REVERT: lambda: self.revert(change, context.committed, context.renew),
        }
        disk.reached(effect, Point.BEFORE, self._places.state, b"")
        result = DONE if change.is_data and effect in _NOTHING_FOR_DATA else await carry_out[effect]()
        disk.reached(effect, Point.AFTER, self._places.state, b"")
        return result

    async def fetch(self, change: Change, context: EffectContext) -> EffectResult:
        """Find the target in the signed metadata, verify it, and download its artifact unless it is on disk."""
        assert change.item is not None
        item = change.item
        try:
            resolved = await self._worker(self._trust.resolve, item)
        except Rejected as error:
            return _delayed(error.code, error.message)
        denied = self._settings.policy.denied(resolved.grants, item.port)
        if denied:
            return refused(RejectCode.GRANT_DENIED, f"this device's own policy does not allow {', '.join(denied)}")
        before = None if context.committed is None else context.committed.manifest
        if wrong := packages.same_kind(item, resolved.manifest, before):
            return refused(RejectCode.TARGET_MISMATCH, wrong)
        if resolved.manifest.is_data:
            return await self._fetch_data(item, resolved, context)
        return await self._fetch_component(item, resolved, context)

    async def _fetch_component(self, item: Item, resolved: Resolved, context: EffectContext) -> EffectResult:
        into = self._artifact(item.sha256)
        if not await asyncio.to_thread(_sound, into, item.length, item.sha256):
            try:
                await self._download(
                    f"/v1/artifacts/{item.sha256}", into, resolved.length, item.sha256, context.progress
                )
            except FetchError as error:
                return _delayed(error.code, error.message)
        try:
            await asyncio.to_thread(self._sealed.fetch, item, self._https)
        except (FetchError, Rejected) as error:
            return _delayed(error.code, error.message)
        except OSError as error:
            return _delayed(RejectCode.NO_SPACE, f"a sealed secret cannot be written: {error.strerror}")
        return EffectResult(event=Event.DONE, manifest=resolved.manifest)

    async def _fetch_data(self, item: Item, resolved: Resolved, context: EffectContext) -> EffectResult:
        """Download a data package, unless it is there, within the quota of all together."""
        directory = self._places.packages
        into = packages.file_of(directory, item.target, item.sha256)
        if await asyncio.to_thread(packages.is_sound, into, item.length, item.sha256):
            return EffectResult(event=Event.DONE, manifest=resolved.manifest)
        most = self._settings.disk.data_bytes
        missing = await asyncio.to_thread(
            packages.make_room, directory, set(context.in_use), most_bytes=most, need_bytes=item.length
        )
        if missing:
            why = (
                f"{item.target} has {item.length} bytes, {missing} more than are left of the {most} bytes that this "
                "device keeps of data packages (disk.data_bytes)"
            )
            return _delayed(RejectCode.NO_SPACE, why)
        try:
            path = f"/v1/artifacts/{item.sha256}"
            await self._download(path, into, resolved.length, item.sha256, context.progress)
        except FetchError as error:
            return _delayed(error.code, error.message)
        return EffectResult(event=Event.DONE, manifest=resolved.manifest)

    async def _download(self, path: str, into: Path, length: int, sha256: str, progress: Callable[[int], None]) -> None:
        cancelled = threading.Event()
        loop = asyncio.get_running_loop()
        reported = 0

        def received(count: int) -> None:
            nonlocal reported
            if count - reported >= PROGRESS_BYTES:
                reported = count
                loop.call_soon_threadsafe(progress, 100 * count // max(1, length))

        def run() -> None:
            if _sound(into, length, sha256):
                return  # another instance's change has fetched it meanwhile
            with contextlib.suppress(CancelledError):
                self._https.download(path, into, length=length, sha256=sha256, progress=received, cancelled=cancelled)

        try:
            await loop.run_in_executor(self._downloads, run)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def retry(self, change: Change, context: EffectContext) -> EffectResult:
        """Wait with jitter and fetch again."""
        await self._back_off(change)
        return await self.fetch(change, context)

    async def _back_off(self, change: Change) -> None:
        await asyncio.sleep(retry_delay_s(change.state) * (0.1 + 0.9 * self._jitter()))

    async def verify(self, change: Change) -> EffectResult:
        """Hash the artifact on the disk, and read it as a component unless it is data."""
        assert change.item is not None
        if change.is_data:
            path = packages.file_of(self._places.packages, change.item.target, change.item.sha256)
            sound = await asyncio.to_thread(packages.is_sound, path, change.item.length, change.item.sha256)
            return DONE if sound else fault("the data package was changed on this device's disk, and is removed")
        path = self._artifact(change.item.sha256)
        try:
            # In a thread: hashing and reading 64 MiB of somebody's bytes would hold up every other instance.
            read = await asyncio.to_thread(_read, path, change.item)
        except OSError as error:
            return fault(f"cannot read {path}: {error.strerror}")
        except reader.NotAComponentError as error:
            return refused(RejectCode.NOT_A_COMPONENT, str(error))
        if read is None:
            return fault("the artifact was changed on this device's disk, and is removed")
        assert change.manifest is not None
        grants = change.manifest.grants if change.item.grants is None else change.item.grants
        missing = read.missing(grants)
        if missing:
            return refused(RejectCode.GRANT_DENIED, f"imports without a grant: {', '.join(missing)}")
        return DONE

    async def compile(self, change: Change) -> EffectResult:
        """Compile the artifact to an image."""
        item, manifest = change.item, change.manifest
        assert item is not None
        assert manifest is not None
        try:
            await self._images.make(
                self._artifact(item.sha256),
                sha256=item.sha256,
                manifest_sha256=item.manifest_sha256,
                fuel=manifest.limits.fuel > 0,
                sockets=manifest.grants.sockets,
            )
            await self._check_host_engine(manifest)
        except ImageError as error:
            return fault(error.message) if error.code in _OF_THIS_DISK else _delayed(error.code, error.message)
        return DONE

    async def _check_host_engine(self, manifest: Manifest) -> None:
        """Raise `ImageError` (HOST_GONE) where the host that runs has another engine than the compiler.

        They differ after an upgrade of the package under a running host, which would call the images damaged.
        """
        host, ours = self._host.welcome, (await self._images.engine(fuel=manifest.limits.fuel > 0)).version
        if host is not None and host.engine and ours and host.engine != ours:
            why = f"fleet-host still runs wasmtime {host.engine}, and wasmtime {ours} is installed: restart fleet-host"
            raise ImageError(RejectCode.HOST_GONE, why)

    async def swap(self, change: Change, together: tuple[str, ...] = ()) -> EffectResult:
        """Have the host start the new generation beside the old one, and hand over; in one moment with `together`."""
        item, manifest = change.item, change.manifest
        assert item is not None
        assert manifest is not None
        replaced = None
        try:
            before = next((each for each in await self._figures() if each.instance == change.instance), None)
            if before is not None and before.generation != change.generation:
                replaced = ProbationSample.of(before, manifest.health.metrics)
            await self._check_host_engine(manifest)
            run = run_of(item, manifest, change.generation, self._settings.policy)
            artifacts = self._places.artifacts
            run = await with_data(self._host, run, artifacts, change.data)
            await start(self._host, item, run, self._images, artifacts, self._sealed, together, probation=True)
        except (ImageError, Rejected) as error:
            if error.code is RejectCode.INTERRUPTED:
                await self._back_off(change)
                return lost(error.message)  # the compiler was stopped: no verdict, and the swap is repeated
            if isinstance(error, ImageError) and error.code in _OF_THIS_DISK:
                return fault(error.message)
            return refused(error.code, error.message)
        except HostRefusedError as error:
            log = await self._log(change.instance, error.failed.log)
            return refused(error.failed.code, error.failed.message, log)
        except HostGoneError as error:
            await self._settle()
            return lost(str(error))
        return EffectResult(event=Event.DONE, replaced=replaced)

    async def _settle(self) -> None:
        """Close the lost link, so that the next effect waits for a host instead of counting losses in a spin."""
        self._host.close()
        await asyncio.sleep(0)

    async def watch(self, change: Change) -> EffectResult:
        """Watch the probation: judge the figures each second, and at once when the guest traps."""
        assert change.manifest is not None
        health = change.manifest.health
        terms = Terms(
            probation_s=health.probation_ms / 1000,
            min_calls=0 if change.manifest.triggers_of(Service) else health.min_calls,  # exercised by its run
            max_faults=health.max_faults,
            max_error_percent=health.max_error_percent,
            gates=health.metrics,
        )
        nudge = self._host.nudges.setdefault(change.instance, asyncio.Event())
        try:
            while True:
                nudge.clear()
                elapsed_s = self._clock() - change.state.entered
                outcome = await self._judged(change, terms, elapsed_s)
                if outcome is not None:
                    return outcome
                left_s = terms.probation_s - elapsed_s
                left_s = min(WATCH_S, left_s) if left_s > 0 else WATCH_S
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left_s):
                        await nudge.wait()
        finally:
            self._host.nudges.pop(change.instance, None)

    async def runs(self, change: Change) -> EffectResult:
        """Check whether a new version that has passed probation still runs."""
        try:
            figures = await self._figures()
        except HostGoneError as error:
            await self._settle()
            return lost(str(error))
        if any((each.instance, each.generation) == (change.instance, change.generation) for each in figures):
            return EffectResult(event=Event.WELL)
        return lost("the host was restarted and no longer runs the new version")

    async def _judged(self, change: Change, terms: Terms, elapsed_s: float) -> EffectResult | None:
        try:
            judgement = await self._judgement(change, terms, elapsed_s)
        except HostGoneError as error:
            await self._settle()
            return lost(str(error))
        if judgement is None:
            return lost("the host was restarted and no longer runs the new version")
        match judgement.verdict:
            case Verdict.CONTINUE:
                return None
            case Verdict.COMMIT:
                return EffectResult(event=Event.WELL, exercised=judgement.exercised, undecided=judgement.undecided)
            case Verdict.ROLL_BACK:
                trouble = self._host.faults.get((change.instance, change.generation))
                log = await self._log(change.instance, () if trouble is None else trouble.log)
                detail = f": {trouble.message}" if trouble is not None and trouble.message else ""
                message = judgement.message if judgement.message.endswith(detail) else judgement.message + detail
                return EffectResult(event=Event.UNWELL, code=RejectCode(judgement.code), message=message, log=log)

    async def _judgement(self, change: Change, terms: Terms, elapsed_s: float) -> Judgement | None:
        """Judge the figures, before a commit those after one more health check; None if the version no longer runs."""
        gates = terms.gates
        facts = await self._facts(change, gates)
        if facts is None:
            return None
        judgement = judge(terms, facts, change.replaced, elapsed_s)
        if judgement.verdict is not Verdict.COMMIT or facts.checks is None:
            return judgement
        after = await self._facts(change, gates, check=change.instance)
        return None if after is None else confirm(terms, facts, after, change.replaced, elapsed_s)

    async def _figures(self, *, check: str = "") -> tuple[InstanceHealth, ...]:
        """Return the figures of every instance, once everything committed was restored."""
        await self._host.wait()
        return (await self._host.stats(check=check)).instances

    async def _facts(
        self, change: Change, gates: Mapping[str, MetricGate], *, check: str = ""
    ) -> ProbationSample | None:
        figures = await self._figures(check=check)
        mine = (change.instance, change.generation)
        found = (each for each in figures if (each.instance, each.generation) == mine)
        return next((ProbationSample.of(each, gates) for each in found), None)

    async def configure(self, committed: Committed, item: Item) -> bool:
        """Give the instance that runs the configuration of an item; False where that needs a change of its own."""
        run = run_of(item, committed.manifest, committed.generation, self._settings.policy)
        try:
            await self._host.wait()
            if self._host.welcome is None or self._host.welcome.protocol < host_api.CONFIGURES:
                return False
            await self._host.ask(
                host_api.Configure,
                host_api.Done,
                instance=item.instance,
                generation=committed.generation,
                config=run.config,
            )
        except (HostGoneError, HostRefusedError):
            return False
        return True

    async def figures(self) -> tuple[InstanceHealth, ...] | None:
        """Return the host's figures of all instances; None while there is no host."""
        try:
            return await self._figures()
        except (HostGoneError, HostRefusedError):
            return None

    async def _log(self, instance: str, last: tuple[str, ...]) -> tuple[str, ...]:
        """Return the log before a failure, as far as the owner lets it go; `last`: lines that came with the failure."""
        lines = last
        with contextlib.suppress(HostGoneError, HostRefusedError):
            found = await self._host.ask(host_api.Logs, host_api.Lines, instance=instance, excerpt=True)
            lines = found.lines or last
        return self._settings.policy.excerpt(lines)

    async def commit(self, change: Change) -> EffectResult:
        """Let the host drop the previous generation; a host that was lost has none."""
        if change.item is not None:
            with contextlib.suppress(HostGoneError, HostRefusedError):
                await self._host.ask(
                    host_api.Commit, host_api.Done, instance=change.instance, generation=change.generation
                )
        return DONE

    async def stop(self, change: Change) -> EffectResult:
        """Stop an instance; a host that was lost runs nothing, and is not asked to start the instance again."""
        with contextlib.suppress(HostGoneError, HostRefusedError):
            await self._host.ask(host_api.Stop, host_api.Done, instance=change.instance)
        return EffectResult(event=Event.STOPPED)

    async def revert(
        self, change: Change, before: Committed | None, renew: Callable[[Committed], Awaitable[Committed]]
    ) -> EffectResult:
        """Roll back to the committed item: to the previous generation if it is warm, else from its image.

        Args:
            change: the change to roll back.
            before: the committed item; None for none.
            renew: gives the committed item a generation under which it may be started beside a newer one.
        """
        if change.generation == 0:
            return DONE
        try:
            await self._host.wait()
            running = await self._running(change.instance)
            if before is None:
                if running is not None:
                    await self._host.ask(host_api.Stop, host_api.Done, instance=change.instance)
                return DONE
            if running is not None and running.generation == change.generation:
                with contextlib.suppress(HostRefusedError):
                    await self._host.ask(
                        host_api.Revert, msgspec.Struct, instance=change.instance, generation=change.generation
                    )
                running = await self._running(change.instance)
            if running is None or running.generation == change.generation:
                before = await renew(before)
                run = run_of(before.item, before.manifest, before.generation, self._settings.policy)
                await start(
                    self._host,
                    before.item,
                    await with_data(self._host, run, self._places.artifacts, before.data),
                    self._images,
                    self._places.artifacts,
                    self._sealed,
                )
        except HostGoneError as error:
            await self._settle()
            return lost(str(error))
        except (HostRefusedError, ImageError, Rejected) as error:
            if isinstance(error, ImageError) and error.code is RejectCode.INTERRUPTED:
                await self._back_off(change)
            return lost(f"the previous version could not be started again: {error}")
        return DONE

    async def keep_data(self, instances: tuple[str, ...], namespaces: tuple[str, ...] | None = None) -> bool:
        """Have the host remove the data of all other instances; return whether it has: an earlier one cannot.

        `namespaces`: whose shared buckets stay; None for all.
        """
        if len(instances) > host_api.KEPT_MAX:
            log.warning("data of removed instances stays: more than %d are to be kept", host_api.KEPT_MAX)
            return False
        while True:
            try:
                await self._host.wait()
                if self._host.welcome is None or self._host.welcome.protocol < host_api.KEEPS_DATA:
                    return False
                await self._host.ask(host_api.KeepData, host_api.Done, instances=instances, namespaces=namespaces)
            except HostGoneError:
                await self._settle()
            except HostRefusedError as error:
                log.warning("data of removed instances stays for now: %s", error)
                return False
            else:
                return True

    async def _running(self, instance: str) -> host_api.Running | None:
        welcome = await self._host.hello()
        return next(
            (each for each in welcome.running if each.instance == instance and each.state is not InstanceState.STOPPED),
            None,
        )

    def close(self) -> None:
        """End the download thread once its transfer has noticed."""
        self._downloads.shutdown(wait=False, cancel_futures=True)


async def make_room(
    places: Paths, settings: Settings, made: ImageStore, standing: DeploymentState, sealed: SecretStore
) -> int:
    """Evict least recently used artifacts and images beyond the budget; returns bytes freed.

    Everything stays that is committed, under way, or that a change would go back to.
    """
    most = settings.disk.data_bytes
    await asyncio.to_thread(packages.make_room, places.packages, packages.in_use(standing), most_bytes=most)
    items = [(each.item, each.manifest) for each in standing.committed.values() if not each.manifest.is_data]
    keep = {item.sha256 for item, _ in items}
    for flight in standing.active.values():
        if flight.change.item is not None:
            keep.add(flight.change.item.sha256)
            if flight.change.manifest is not None and not flight.change.is_data:
                items.append((flight.change.item, flight.change.manifest))
    wanted = [flight.change.item for flight in standing.active.values() if flight.change.item is not None]
    await asyncio.to_thread(sealed.evict, [*(item for item, _ in items), *wanted])
    try:
        for item, manifest in items:
            keep.add(await made.name(item.sha256, item.manifest_sha256, fuel=manifest.limits.fuel > 0))
    except ImageError:
        return 0  # no engine, no images
    return await asyncio.to_thread(
        images.evict, places.images, places.artifacts, keep=keep, budget_bytes=settings.disk.budget_bytes
    )

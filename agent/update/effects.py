"""Fetch, verify, compile, swap, watch, commit, revert, evict.

Carries out what the update machine decided: each effect is one coroutine here, and ends in an event.

Nothing here decides and nothing here remembers. Whatever goes wrong becomes an `Outcome` with a typed code; an
exception that leaves this module is our own bug. Every effect may be repeated from its start: after a power cut it is.

What has to be done now and then: renew the certificate, make room on the disk, pet the watchdog.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import msgspec

from agent.config import Paths, Settings
from agent.host.ipc import host_api
from agent.link.bundle import BundleSource
from agent.link.host_client import Host, HostGoneError, HostRefusedError
from agent.link.https import CancelledError, FetchError
from agent.update import images
from agent.update.images import ImageError, ImageStore
from agent.update.machine import Event, Happened, retry_delay_s
from agent.update.probation import Judgement, ProbationSample, Terms, Verdict, confirm, judge
from agent.update.restore import run_of, start
from agent.update.secrets import SecretStore
from agent.update.state import DONE, Change, Committed, DeploymentState, EffectResult, lost, refused
from agent.update.store import Database
from agent.update.trust import DeviceTrust
from fleet.component import reader
from fleet.protocol.codes import RETRYABLE, InstanceState, RejectCode
from signing.errors import Rejected

WATCH_S: Final = 1.0

PROGRESS_BYTES: Final = 1 << 20


def _delayed(code: RejectCode, message: str) -> EffectResult:
    event = Event.DELAYED if code in RETRYABLE and code is not RejectCode.NO_SPACE else Event.REFUSED
    return EffectResult(Happened(event, code.value, message))


def _sound(path: Path, length: int, sha256: str) -> bool:
    """Whether an artifact lies there as signed; one that was changed on the disk is removed, to be fetched anew."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return False
    if found == (length, sha256):
        return True
    path.unlink(missing_ok=True)
    return False


class EffectRunner:
    """The effects of the update machine, on this board."""

    def __init__(
        self,
        *,
        places: Paths,
        settings: Settings,
        worker: Database,
        trust: DeviceTrust,
        https: BundleSource,
        images: ImageStore,
        sealed: SecretStore,
        host: Host,
        clock: Callable[[], float],
        jitter: Callable[[], float],
    ) -> None:
        """The effects, on what this board has.

        `worker` is the thread for TUF and SQLite, `clock` gives seconds that do not jump (boot time), `jitter` a number
        from 0 to 1.
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
        self._compiling = asyncio.Semaphore(1)

    def _artifact(self, sha256: str) -> Path:
        return self._places.artifacts / f"{sha256}.wasm"

    async def fetch(self, change: Change, progress: Callable[[int], None]) -> EffectResult:
        """Find the target in the signed metadata, judge it, and download it unless it is here."""
        assert change.item is not None
        item = change.item
        try:
            resolved = await self._worker(self._trust.resolve, item)
        except Rejected as error:
            return _delayed(error.code, error.message)
        denied = self._settings.policy.denied(resolved.grants)
        if denied:
            return refused(RejectCode.GRANT_DENIED, f"this board's own policy does not allow {', '.join(denied)}")
        into = self._artifact(item.sha256)
        if not await asyncio.to_thread(_sound, into, item.length, item.sha256):
            try:
                await self._download(f"/v1/artifacts/{item.sha256}", into, resolved.length, item.sha256, progress)
            except FetchError as error:
                return _delayed(error.code, error.message)
        try:
            await asyncio.to_thread(self._sealed.fetch, item, self._https)
        except (FetchError, Rejected) as error:
            return _delayed(error.code, error.message)
        except OSError as error:
            return _delayed(RejectCode.NO_SPACE, f"a sealed secret cannot be written: {error.strerror}")
        return EffectResult(Happened(Event.DONE), {"manifest": resolved.manifest})

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
                return  # another instance's change has just fetched it
            with contextlib.suppress(CancelledError):
                self._https.download(path, into, length=length, sha256=sha256, progress=received, cancelled=cancelled)

        try:
            await loop.run_in_executor(self._downloads, run)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def retry(self, change: Change, progress: Callable[[int], None]) -> EffectResult:
        """Wait, with full jitter, and fetch again."""
        await asyncio.sleep(retry_delay_s(change.state) * (0.1 + 0.9 * self._jitter()))
        return await self.fetch(change, progress)

    async def verify(self, change: Change) -> EffectResult:
        """Hash what lies on the disk, and read it as a component."""
        assert change.item is not None
        path, sha256 = self._artifact(change.item.sha256), change.item.sha256
        try:
            data = await asyncio.to_thread(path.read_bytes)
        except OSError as error:
            return refused(RejectCode.NOT_FOUND, f"cannot read {path}: {error.strerror}")
        if len(data) != change.item.length or hashlib.sha256(data).hexdigest() != sha256:
            path.unlink(missing_ok=True)
            return refused(RejectCode.HASH_MISMATCH, "the artifact was changed on this board's disk; it is removed")
        try:
            read = reader.read(data, file_name=change.item.target)
        except reader.NotAComponentError as error:
            return refused(RejectCode.NOT_A_COMPONENT, str(error))
        assert change.manifest is not None
        grants = change.manifest.grants if change.item.grants is None else change.item.grants
        missing = read.missing(grants, world=change.manifest.world)
        if missing:
            return refused(RejectCode.GRANT_DENIED, f"it imports {', '.join(missing)}, which nobody granted")
        return DONE

    async def compile(self, change: Change) -> EffectResult:
        """Make the image, one at a time."""
        item, manifest = change.item, change.manifest
        assert item is not None
        assert manifest is not None
        async with self._compiling:
            try:
                await self._images.make(
                    self._artifact(item.sha256),
                    sha256=item.sha256,
                    manifest_sha256=item.manifest_sha256,
                    fuel=manifest.limits.fuel > 0,
                )
            except ImageError as error:
                return refused(error.code, error.message)
        return DONE

    async def swap(self, change: Change, together: tuple[str, ...] = ()) -> EffectResult:
        """Have the host start the new generation beside the old one, and hand over; in one moment with `together`."""
        item, manifest = change.item, change.manifest
        assert item is not None
        assert manifest is not None
        fields: dict[str, Any] = {}
        try:
            before = next((each for each in await self._host.figures() if each.instance == change.instance), None)
            if before is not None and before.generation != change.generation:
                fields["replaced"] = ProbationSample.of(before)
            run = run_of(item, manifest, change.generation, self._settings.policy)
            link, places = self._host.link, self._places
            await start(link, item, run, self._images, places.artifacts, self._sealed, together, probation=True)
        except (ImageError, Rejected) as error:
            return refused(error.code, error.message)
        except HostRefusedError as error:
            return refused(error.failed.code, error.failed.message, error.failed.log)
        except HostGoneError as error:
            await self._settle()
            return lost(str(error))
        return EffectResult(Happened(Event.DONE), fields)

    async def _settle(self) -> None:
        """After the host was lost: give the link a moment to notice, so that losses are not counted in a spin."""
        self._host.link.close()
        await asyncio.sleep(0)

    async def watch(self, change: Change) -> EffectResult:
        """Probation: judge the figures each second, and at once when the guest traps."""
        assert change.manifest is not None
        health = change.manifest.health
        terms = Terms(
            probation_s=health.probation_ms / 1000,
            min_calls=health.min_calls,
            max_faults=health.max_faults,
            max_error_percent=health.max_error_percent,
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
        """Whether the new version, which has been found well before, is there."""
        try:
            figures = await self._host.figures()
        except HostGoneError as error:
            await self._settle()
            return lost(str(error))
        if any((each.instance, each.generation) == (change.instance, change.generation) for each in figures):
            return EffectResult(Happened(Event.WELL))
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
                return EffectResult(Happened(Event.WELL, exercised=judgement.exercised))
            case Verdict.ROLL_BACK:
                trouble = self._host.trapped.get((change.instance, change.generation))
                log = trouble.log if trouble is not None and trouble.log else await self._log(change.instance)
                detail = f": {trouble.message}" if trouble is not None and trouble.message else ""
                message = judgement.message if judgement.message.endswith(detail) else judgement.message + detail
                return EffectResult(Happened(Event.UNWELL, judgement.code, message), log=log)

    async def _judgement(self, change: Change, terms: Terms, elapsed_s: float) -> Judgement | None:
        """Judge the figures, before a commit those after one more health check; None where it runs no more."""
        facts = await self._facts(change)
        if facts is None:
            return None
        judgement = judge(terms, facts, change.replaced, elapsed_s)
        if judgement.verdict is not Verdict.COMMIT or facts.checks is None:
            return judgement
        after = await self._facts(change, check=change.instance)
        return None if after is None else confirm(terms, facts, after, change.replaced, elapsed_s)

    async def _facts(self, change: Change, *, check: str = "") -> ProbationSample | None:
        figures = await self._host.figures(check=check)
        mine = (change.instance, change.generation)
        return next((ProbationSample.of(each) for each in figures if (each.instance, each.generation) == mine), None)

    async def _log(self, instance: str) -> tuple[str, ...]:
        with contextlib.suppress(HostGoneError, HostRefusedError):
            return (await self._host.link.ask(host_api.Logs, host_api.Lines, instance=instance)).lines
        return ()

    async def commit(self, change: Change) -> EffectResult:
        """Let the host drop the previous generation. A host that is gone has none."""
        if change.item is not None:
            with contextlib.suppress(HostGoneError, HostRefusedError):
                await self._host.link.ask(
                    host_api.Commit, host_api.Done, instance=change.instance, generation=change.generation
                )
        return DONE

    async def stop(self, change: Change) -> EffectResult:
        """Stop an instance. A host that is gone runs nothing, and is not told to start it again."""
        with contextlib.suppress(HostGoneError, HostRefusedError):
            await self._host.link.ask(host_api.Stop, host_api.Done, instance=change.instance)
        return EffectResult(Happened(Event.STOPPED))

    async def revert(
        self, change: Change, before: Committed | None, renew: Callable[[Committed], Awaitable[Committed]]
    ) -> EffectResult:
        """Go back to what is committed: the warm previous generation if there is one, else from its image.

        Args:
            change: what is taken back.
            before: what is committed; None if nothing is.
            renew: gives what is committed a generation under which it may be started beside a newer one.
        """
        if change.generation == 0:
            return DONE
        try:
            await self._host.wait()
            running = await self._running(change.instance)
            if before is None:
                if running is not None:
                    await self._host.link.ask(host_api.Stop, host_api.Done, instance=change.instance)
                return DONE
            if running is not None and running.generation == change.generation:
                with contextlib.suppress(HostRefusedError):
                    await self._host.link.ask(
                        host_api.Revert, msgspec.Struct, instance=change.instance, generation=change.generation
                    )
                running = await self._running(change.instance)
            if running is None or running.generation == change.generation:
                before = await renew(before)
                await start(
                    self._host.link,
                    before.item,
                    run_of(before.item, before.manifest, before.generation, self._settings.policy),
                    self._images,
                    self._places.artifacts,
                    self._sealed,
                )
        except HostGoneError as error:
            await self._settle()
            return lost(str(error))
        except (HostRefusedError, ImageError, Rejected) as error:
            return lost(f"the previous version could not be started again: {error}")
        return DONE

    async def _running(self, instance: str) -> host_api.Running | None:
        welcome = await self._host.link.ask(host_api.Hello, host_api.Welcome)
        return next(
            (each for each in welcome.running if each.instance == instance and each.state is not InstanceState.STOPPED),
            None,
        )

    def close(self) -> None:
        """End the download thread once its transfer noticed."""
        self._downloads.shutdown(wait=False, cancel_futures=True)


log = logging.getLogger("agent.update.effects")


async def make_room(
    places: Paths, settings: Settings, made: ImageStore, standing: DeploymentState, sealed: SecretStore
) -> int:
    """Evict least recently used artifacts and images beyond the budget; returns bytes freed.

    What is committed, and what is being changed, stays, and so does what a change would go back to.
    """
    items = [(each.item, each.manifest) for each in standing.committed.values()]
    keep = {item.sha256 for item, _ in items}
    for flight in standing.flights.values():
        if flight.change.item is not None:
            keep.add(flight.change.item.sha256)
            if flight.change.manifest is not None:
                items.append((flight.change.item, flight.change.manifest))
    wanted = [flight.change.item for flight in standing.flights.values() if flight.change.item is not None]
    await asyncio.to_thread(sealed.evict, [*(item for item, _ in items), *wanted])
    try:
        for item, manifest in items:
            keep.add(await made.name(item.sha256, item.manifest_sha256, fuel=manifest.limits.fuel > 0))
    except ImageError:
        return 0  # no engine, no images
    return await asyncio.to_thread(
        images.evict, places.images, places.artifacts, keep=keep, budget_bytes=settings.disk.budget_bytes
    )

"""Carries out what the update machine decided: each effect is one coroutine here, and ends in an event.

Nothing here decides and nothing here remembers. Whatever goes wrong becomes an `Outcome` with a typed code; an
exception that leaves this module is our own bug. Every effect may be repeated from its start: after a power cut it is.
"""

import asyncio
import contextlib
import hashlib
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from agent.bundle import Offline
from agent.config import Places, Settings
from agent.fetch import CancelledError, FetchError
from agent.host import ipc
from agent.hostlink import HostGoneError, HostLink, HostRefusedError
from agent.images import ImageError, Images
from agent.records import Change, Committed
from agent.restore import run_of, start
from agent.sealed import Sealed
from agent.trust import Trust
from agent.update.machine import Event, Happened, retry_delay_s
from agent.update.probation import Facts, Judgement, Terms, Verdict, confirm, judge
from agent.worker import Worker
from fleet.protocol import caps, component
from fleet.protocol.codes import RETRYABLE, InstanceState, RejectCode
from fleet.protocol.messages import InstanceHealth
from signing.errors import Rejected

WATCH_S: Final = 1.0
HOST_WAIT_S: Final = 60.0
PROGRESS_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an effect ended.

    Attributes:
        fields: of the change that are known now (`manifest`, `replaced`).
        log: the instance's last lines, for the report.
    """

    happened: Happened
    fields: dict[str, Any] = field(default_factory=dict)
    log: tuple[str, ...] = ()


DONE: Final = Outcome(Happened(Event.DONE))


def refused(code: RejectCode, message: str, log: tuple[str, ...] = ()) -> Outcome:
    """It can never be done."""
    return Outcome(Happened(Event.REFUSED, code.value, message), log=log)


def lost(message: str) -> Outcome:
    """The host went away."""
    return Outcome(Happened(Event.HOST_LOST, RejectCode.HOST_GONE.value, message))


def _delayed(code: RejectCode, message: str) -> Outcome:
    event = Event.DELAYED if code in RETRYABLE and code is not RejectCode.NO_SPACE else Event.REFUSED
    return Outcome(Happened(event, code.value, message))


class Host:
    """The host as the effects see it: a link, and whether what is committed has been restored on it."""

    def __init__(self, link: HostLink) -> None:
        self.link = link
        self.ready = asyncio.Event()
        self.nudges: dict[str, asyncio.Event] = {}
        self.trapped: dict[tuple[str, int], ipc.Trapped | ipc.Changed] = {}
        # Whoever asks before what is committed runs again would be overtaken by it.
        link.on_lost = self.ready.clear

    def on_event(self, event: ipc.Event) -> None:
        """Remember the newest trouble of an instance, and wake whoever watches it."""
        if isinstance(event, ipc.Trapped) or event.message:
            self.trapped[event.instance, event.generation] = event
            while len(self.trapped) > 2 * caps.ITEMS_MAX:
                del self.trapped[next(iter(self.trapped))]
        nudge = self.nudges.get(event.instance)
        if nudge is not None:
            nudge.set()

    async def wait(self) -> None:
        """Until there is a host with everything committed on it; raises `HostGoneError` after a minute."""
        try:
            async with asyncio.timeout(HOST_WAIT_S):
                await self.ready.wait()
        except TimeoutError as error:
            raise HostGoneError(f"there was no host for {HOST_WAIT_S:.0f} s") from error

    async def figures(self, *, check: str = "") -> tuple[InstanceHealth, ...]:
        """Every instance's figures, once what is committed has been restored; raises `HostGoneError`.

        `check` names an instance whose health check is asked first.
        """
        await self.wait()
        return (await self.link.ask(ipc.Status, ipc.Figures, check=check)).instances


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


class Carrier:
    """The effects of the update machine, on this board."""

    def __init__(
        self,
        *,
        places: Places,
        settings: Settings,
        worker: Worker,
        trust: Trust,
        https: Offline,
        images: Images,
        sealed: Sealed,
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

    async def fetch(self, change: Change, progress: Callable[[int], None]) -> Outcome:
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
        return Outcome(Happened(Event.DONE), {"manifest": resolved.manifest})

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

    async def retry(self, change: Change, progress: Callable[[int], None]) -> Outcome:
        """Wait, with full jitter, and fetch again."""
        await asyncio.sleep(retry_delay_s(change.state) * (0.1 + 0.9 * self._jitter()))
        return await self.fetch(change, progress)

    async def verify(self, change: Change) -> Outcome:
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
            read = component.read(data, file_name=change.item.target)
        except component.NotAComponentError as error:
            return refused(RejectCode.NOT_A_COMPONENT, str(error))
        assert change.manifest is not None
        grants = change.manifest.grants if change.item.grants is None else change.item.grants
        missing = read.missing(grants, world=change.manifest.world)
        if missing:
            return refused(RejectCode.GRANT_DENIED, f"it imports {', '.join(missing)}, which nobody granted")
        return DONE

    async def compile(self, change: Change) -> Outcome:
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

    async def swap(self, change: Change, together: tuple[str, ...] = ()) -> Outcome:
        """Have the host start the new generation beside the old one, and hand over; in one moment with `together`."""
        item, manifest = change.item, change.manifest
        assert item is not None
        assert manifest is not None
        fields: dict[str, Any] = {}
        try:
            before = next((each for each in await self._host.figures() if each.instance == change.instance), None)
            if before is not None and before.generation != change.generation:
                fields["replaced"] = Facts.of(before)
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
        return Outcome(Happened(Event.DONE), fields)

    async def _settle(self) -> None:
        """After the host was lost: give the link a moment to notice, so that losses are not counted in a spin."""
        self._host.link.close()
        await asyncio.sleep(0)

    async def watch(self, change: Change) -> Outcome:
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

    async def runs(self, change: Change) -> Outcome:
        """Whether the new version, which has been found well before, is there."""
        try:
            figures = await self._host.figures()
        except HostGoneError as error:
            await self._settle()
            return lost(str(error))
        if any((each.instance, each.generation) == (change.instance, change.generation) for each in figures):
            return Outcome(Happened(Event.WELL))
        return lost("the host was restarted and no longer runs the new version")

    async def _judged(self, change: Change, terms: Terms, elapsed_s: float) -> Outcome | None:
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
                return Outcome(Happened(Event.WELL, exercised=judgement.exercised))
            case Verdict.ROLL_BACK:
                trouble = self._host.trapped.get((change.instance, change.generation))
                log = trouble.log if trouble is not None and trouble.log else await self._log(change.instance)
                detail = f": {trouble.message}" if trouble is not None and trouble.message else ""
                message = judgement.message if judgement.message.endswith(detail) else judgement.message + detail
                return Outcome(Happened(Event.UNWELL, judgement.code, message), log=log)

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

    async def _facts(self, change: Change, *, check: str = "") -> Facts | None:
        figures = await self._host.figures(check=check)
        mine = (change.instance, change.generation)
        return next((Facts.of(each) for each in figures if (each.instance, each.generation) == mine), None)

    async def _log(self, instance: str) -> tuple[str, ...]:
        with contextlib.suppress(HostGoneError, HostRefusedError):
            return (await self._host.link.ask(ipc.Logs, ipc.Lines, instance=instance)).lines
        return ()

    async def commit(self, change: Change) -> Outcome:
        """Let the host drop the previous generation. A host that is gone has none."""
        if change.item is not None:
            with contextlib.suppress(HostGoneError, HostRefusedError):
                await self._host.link.ask(ipc.Commit, ipc.Done, instance=change.instance, generation=change.generation)
        return DONE

    async def stop(self, change: Change) -> Outcome:
        """Stop an instance. A host that is gone runs nothing, and is not told to start it again."""
        with contextlib.suppress(HostGoneError, HostRefusedError):
            await self._host.link.ask(ipc.Stop, ipc.Done, instance=change.instance)
        return Outcome(Happened(Event.STOPPED))

    async def revert(
        self, change: Change, before: Committed | None, renew: Callable[[Committed], Awaitable[Committed]]
    ) -> Outcome:
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
                    await self._host.link.ask(ipc.Stop, ipc.Done, instance=change.instance)
                return DONE
            if running is not None and running.generation == change.generation:
                with contextlib.suppress(HostRefusedError):
                    await self._host.link.ask(
                        ipc.Revert, msgspec.Struct, instance=change.instance, generation=change.generation
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

    async def _running(self, instance: str) -> ipc.Running | None:
        welcome = await self._host.link.ask(ipc.Hello, ipc.Welcome)
        return next(
            (each for each in welcome.running if each.instance == instance and each.state is not InstanceState.STOPPED),
            None,
        )

    def close(self) -> None:
        """End the download thread once its transfer noticed."""
        self._downloads.shutdown(wait=False, cancel_futures=True)

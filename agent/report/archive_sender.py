"""Archives about this device for operators who ask by a signed command: `fleet device ID --diagnose`.

A process of its own makes the archive and seals it to the key in the command (`agent.report.sealed_archive`). It goes
to the server over HTTPS, which cannot open it. The owner's `[policy] diagnose` decides what is in it, and each request
is a line in the device's signed history, with the hash of what was sent.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import resource
import sys
from dataclasses import dataclass
from typing import IO, Final

import msgspec

from agent.config import Settings
from agent.host.ipc import framing
from agent.link.https import FetchError, HttpsClient
from agent.update import state
from agent.update.problems import ReportSink
from agent.update.state import DeviceContext
from agent.update.store import Database, Store, StoreError
from fleet.protocol import bounds, wire
from fleet.protocol.codes import Phase
from fleet.protocol.messages import ArchiveNote

log = logging.getLogger("agent.report.archive_sender")

ARCHIVES_PER_HOUR: Final = 6
MAKE_S: Final = 300.0
"""Time for an archive: checks wait for a network that is away, up to a minute for each step."""

CPU_S: Final = 120
UPLOAD_S: Final = 900.0
UPLOADS_MAX: Final = 3
PATH: Final = "/v1/diagnose"
_ERRORS_MAX_BYTES: Final = 2000
_JSON: Final = {"Content-Type": "application/json"}


class ArchiveRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Request to `agent.report.sealed_archive`.

    Attributes:
        state, runtime: directories of the agent.
        recipient: as in the command.
    """

    state: str
    runtime: str
    settings: Settings
    recipient: str
    device: str
    command: int


class ArchiveError(Exception):
    """No archive was made; the message says why."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """Verified request for an archive."""

    recipient: str
    command: int


class ArchiveSender:
    """Maker and sender of archives, one at a time; a newer command ends what an older one began."""

    name = "archives"

    def __init__(
        self, *, device: DeviceContext, https: HttpsClient, settings: Settings, db: Database, sink: ReportSink
    ) -> None:
        """Prepare under the owner's policy in `settings`; `https` is for archives alone."""
        self._device = device
        self._https = https
        self._settings = settings
        self._db = db
        self._sink = sink
        self._asked: asyncio.Queue[_Asked] = asyncio.Queue()
        self._made: list[float] = []

    def send(self, *, recipient: str, command: int) -> None:
        """Make an archive for the holder of a key, and send it."""
        self._asked.put_nowait(_Asked(recipient, command))

    async def run(self) -> None:
        """Make and send archives, forever."""
        asked = await self._asked.get()
        while True:
            working = asyncio.create_task(self._answer(asked))
            newer = asyncio.create_task(self._asked.get())
            try:
                await asyncio.wait((working, newer), return_when=asyncio.FIRST_COMPLETED)
                asked = await newer
            finally:
                self._https.close()  # for a thread that still sends
                for task in (working, newer):
                    task.cancel()
                await asyncio.gather(working, newer, return_exceptions=True)

    async def _answer(self, asked: _Asked) -> None:
        """Answer a command; what fails is said, and does not end the agent."""
        who = f"command {asked.command} asked for an archive about this device"
        try:
            if self._settings.policy.diagnose == "off":
                await self.note(f"{who}: refused by [policy] diagnose")
                reason = "the device's owner lets no archive leave it: [policy] diagnose in agent.toml"
                await self._tell(ArchiveNote(command=asked.command, refused=reason))
                return
            if self._is_too_often():
                await self.note(f"{who}: at most {ARCHIVES_PER_HOUR} an hour are made")
                reason = f"the device makes at most {ARCHIVES_PER_HOUR} archives an hour"
                await self._tell(ArchiveNote(command=asked.command, refused=reason))
                return
            await self._tell(ArchiveNote(command=asked.command))
            try:
                await self._make_and_send(asked, who)
            except FetchError:
                raise
            except Exception as error:
                if not isinstance(error, ArchiveError | OSError):
                    log.exception("%s, which failed", who)
                await self.note(f"{who}: {error}")
                reason = f"the archive could not be made: {error}"[:2000]
                await self._tell(ArchiveNote(command=asked.command, refused=reason, failed=True))
        except FetchError as error:
            log.warning("%s, which could not be sent: %s", who, error)
        except Exception:
            log.exception("%s, which failed", who)

    def _is_too_often(self) -> bool:
        now = asyncio.get_running_loop().time()
        self._made = [at for at in self._made if now - at < 3600]  # noqa: PLR2004 - an hour
        self._made.append(now)
        return len(self._made) > ARCHIVES_PER_HOUR

    async def _make_and_send(self, asked: _Asked, who: str) -> None:
        with framing.memory_file("archive") as archive:
            await self._make(asked, archive)
            size = os.fstat(archive.fileno()).st_size
            if not 0 < size <= bounds.ARCHIVE_MAX_BYTES:
                raise ArchiveError(f"it has {size} bytes, and may have {bounds.ARCHIVE_MAX_BYTES}")
            digest = await asyncio.to_thread(_sha256, archive)
            policy = f"[policy] diagnose = {self._settings.policy.diagnose}"
            await self.note(f"{who}: {size} bytes go to the fleet ({policy}), sealed, sha256 {digest}")
            await self._upload(asked.command, archive, size)
        log.info("sent the archive of command %d: %d bytes", asked.command, size)

    async def _make(self, asked: _Asked, archive: IO[bytes]) -> None:
        request = ArchiveRequest(
            state=str(self._device.places.state),
            runtime=str(self._device.places.runtime),
            settings=self._settings,
            recipient=asked.recipient,
            device=self._device.device,
            command=asked.command,
        )
        with framing.memory_file("archive-errors") as errors:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "agent.report.sealed_archive"),
                stdin=asyncio.subprocess.PIPE,
                stdout=archive,
                stderr=errors,
                start_new_session=True,  # a signal to the agent's process group is for the agent, which ends it
            )
            try:
                _confine(process.pid)
                async with asyncio.timeout(MAKE_S):
                    await process.communicate(wire.encode(request))
            except TimeoutError as error:
                raise ArchiveError(f"it took more than {MAKE_S:.0f} s") from error
            finally:
                if process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
                    await process.wait()
            if process.returncode:
                errors.seek(0, os.SEEK_END)
                errors.seek(max(0, errors.tell() - _ERRORS_MAX_BYTES))
                last = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
                raise ArchiveError(f"its process ended with {process.returncode}: {last or 'no reason'}")

    async def _upload(self, command: int, archive: IO[bytes], size: int) -> None:
        for attempt in range(1, UPLOADS_MAX + 1):
            archive.seek(0)
            try:
                await asyncio.to_thread(
                    self._https.request,
                    "PUT",
                    f"{PATH}?command={command}",
                    max_bytes=bounds.KIB,
                    body=archive,
                    headers={"Content-Type": "application/octet-stream", "Content-Length": str(size)},
                    within_s=UPLOAD_S,
                )
            except FetchError as error:
                if attempt == UPLOADS_MAX or error.status:
                    raise
                log.warning("an archive is sent again: %s", error)
                await asyncio.sleep(2.0**attempt)
            else:
                return

    async def _tell(self, note: ArchiveNote) -> None:
        await asyncio.to_thread(
            self._https.request, "POST", PATH, max_bytes=bounds.KIB, body=wire.encode(note), headers=_JSON
        )

    async def note(self, text: str) -> None:
        """Put a sentence into the device's signed history."""
        await note(text, device=self._device, db=self._db, sink=self._sink)


async def note(text: str, *, device: DeviceContext, db: Database, sink: ReportSink) -> None:
    """Put a sentence on what left the device, or did not, into its signed history."""
    version = await db(Store.counter, "accepted")
    with contextlib.suppress(StoreError):
        report = state.about(device, assignment=version, phase=Phase.IDLE, message=text)
        await db(Store.save, report=report)
    sink.saved()


def _confine(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        resource.prlimit(pid, resource.RLIMIT_CPU, (CPU_S, CPU_S + 1))
        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
        os.setpriority(os.PRIO_PROCESS, pid, 10)


def _sha256(file: IO[bytes]) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]

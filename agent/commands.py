"""Signed commands from the fleet: check in, restart, follow logs, send an archive about the device.

Each command is verified, remembered, and only then carried out; refused commands are counted. An operator asks for log
lines with a signed command. As far as the device's owner allows, they are sent for some minutes: over HTTPS with the
device certificate, as the host keeps them (secrets masked), and only while the server reports a reader. Nothing is
polled while nobody follows.
"""

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import msgspec

from agent.config import is_error
from agent.host.ipc import host_api
from agent.link.host_client import HostClient, HostGoneError, HostRefusedError
from agent.link.https import FetchError, Poster
from agent.report.archive_sender import ArchiveSender, note
from agent.report.device_info import agent_version
from agent.update.problems import Problems, ReportSink
from agent.update.state import DeviceContext
from agent.update.store import Database, StoreError
from agent.update.trust import DeviceTrust
from fleet.protocol import bounds, wire
from fleet.protocol.assignment import CheckIn, Diagnose, FollowLogs, LaterVerb, Restart
from fleet.protocol.messages import LogAnswer, LogChunk
from fleet.protocol.topics import Down
from signing.errors import Rejected

log = logging.getLogger("agent.commands")

RESTARTS_PER_HOUR: Final = 6

COMMANDS_MAX: Final = 16
"""Maximum number of waiting commands; a director sends them singly."""


class ChecksIn(Protocol):
    """Poller of the assignment (`agent.update.receiver.AssignmentReceiver`)."""

    def check_in(self) -> None:
        """Poll now, and report the state of each instance."""


@dataclass(frozen=True, slots=True)
class Senders:
    """Senders of what an operator asks for."""

    logs: "LogFollower"
    archives: ArchiveSender


class Commands:
    """Executor of commands, strictly in sequence.

    Attributes:
        inbox: envelopes as received.
        refused: number of commands refused since the agent started.
    """

    name = "commands"

    def __init__(
        self,
        *,
        trust: DeviceTrust,
        db: Database,
        host: HostClient,
        receiver: ChecksIn,
        senders: "Senders",
        problems: Problems,
        sink: ReportSink,
    ) -> None:
        """Prepare; `trust` runs on the database thread, and stores a command's sequence before it returns."""
        self._trust = trust
        self._db = db
        self._host = host
        self._receiver = receiver
        self._follower, self._archives = senders.logs, senders.archives
        self._problems = problems
        self._sink = sink
        self._restarts: list[float] = []
        self.inbox: asyncio.Queue[bytes] = asyncio.Queue()
        self.refused = 0

    def post(self, envelope: bytes) -> None:
        """Put a command into the inbox without waiting; beyond COMMANDS_MAX, commands are dropped."""
        if self.inbox.qsize() >= COMMANDS_MAX:
            log.warning("dropped a command: %d wait already", COMMANDS_MAX)
            return
        self.inbox.put_nowait(envelope)

    async def run(self) -> None:
        """Carry out commands, forever; a command that fails is dropped, and does not end the agent."""
        while True:
            envelope = await self.inbox.get()
            try:
                await self.carry_out(envelope)
            except StoreError as error:
                log.warning("dropped a message on down/%s: %s", Down.COMMAND, error)
            except Exception:
                log.exception("dropped a message on down/%s", Down.COMMAND)
            finally:
                self.inbox.task_done()

    async def carry_out(self, envelope: bytes) -> None:
        """Verify a command and carry it out; a refused command is counted and reported as a problem."""
        try:
            command = await self._db.run(self._trust.command, envelope)
        except Rejected as error:
            log.warning("command refused: %s", error)
            self.refused += 1
            text = (
                f"{self.refused} commands were refused since the agent started, the last with {error.code}: "
                "no valid command of the fleet's director for this device and this time"
            )
            self._problems.set("commands", text)
            self._sink.changed()
            return
        match command.verb:
            case CheckIn():
                self._receiver.check_in()
                self._sink.changed()
            case Restart(instance=instance):
                await self._restart(instance)
            case FollowLogs(instance=instance, minutes=minutes):
                log.info("command %d asks for the log of %s", command.sequence, instance)
                self._follower.follow(instance, minutes=minutes, command=command.sequence)
            case Diagnose(recipient=recipient):
                log.info("command %d asks for an archive about this device", command.sequence)
                self._archives.send(recipient=recipient, command=command.sequence)
            case LaterVerb(verb=verb):
                await self._unknown(verb, command.sequence)

    async def _unknown(self, verb: str, command: int) -> None:
        """Put a command of a later vocabulary into the device's history: the director sent it, so it is no attack."""
        text = f"command {command} is {verb!r}, which is not known to this agent {agent_version()}: upgrade the agent"
        log.warning("%s", text)
        await self._archives.note(text)

    async def _restart(self, instance: str) -> None:
        now = asyncio.get_running_loop().time()
        self._restarts = [at for at in self._restarts if now - at < 3600]  # noqa: PLR2004 - an hour
        if len(self._restarts) >= RESTARTS_PER_HOUR:
            log.warning("did not restart %s: at most %d restarts an hour are allowed", instance, RESTARTS_PER_HOUR)
            return
        self._restarts.append(now)
        try:
            await self._host.ask(host_api.Restart, host_api.Done, instance=instance)
        except (HostGoneError, HostRefusedError) as error:
            log.warning("%s could not be restarted: %s", instance, error)


LOOK_S: Final = 0.5
KEEP_ALIVE_S: Final = 10.0
FOLLOWS_MAX: Final = 4
FAILURES_MAX: Final = 5


@dataclass(frozen=True, slots=True)
class _Follow:
    """Verified request for an instance's log."""

    instance: str
    minutes: int
    command: int


class LogFollower:
    """Device end of `fleet logs`.

    Attributes:
        following: instance -> sequence of the latest command for it.
    """

    name = "logs"

    def __init__(
        self,
        *,
        device: DeviceContext,
        host: HostClient,
        https: Poster,
        policy: Literal["off", "errors", "all"],
        db: Database,
        sink: ReportSink,
    ) -> None:
        """Prepare under the owner's `policy`; all log access is recorded in the device's signed history."""
        self._device = device
        self._host = host
        self._https = https
        self._policy = policy
        self._db = db
        self._sink = sink
        self._requests: asyncio.Queue[_Follow] = asyncio.Queue()
        self.following: dict[str, int] = {}

    async def run(self) -> None:
        """Send the followed logs, forever."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                request = await self._requests.get()
                tasks.create_task(self._run(request.instance, request.minutes, request.command))

    def follow(self, instance: str, *, minutes: int, command: int) -> None:
        """Start sending an instance's log; a newer command for the same instance replaces an older one."""
        if instance not in self.following and len(self.following) >= FOLLOWS_MAX:
            log.warning("the log of %s is not sent: %d logs are already followed", instance, FOLLOWS_MAX)
            return
        self.following[instance] = command
        self._requests.put_nowait(_Follow(instance, min(max(1, minutes), bounds.LOGS_MINUTES_MAX), command))

    async def _note(self, text: str) -> None:
        await note(text, device=self._device, db=self._db, sink=self._sink)

    async def _run(self, instance: str, minutes: int, command: int) -> None:
        try:
            if self._policy == "off":
                reason = "the device's owner allows no logs to leave it: [policy] logs in agent.toml"
                await self._post(LogChunk(instance=instance, command=command, refused=reason, ended=True))
                await self._note(f"command {command} asked for the log of {instance}: refused by [policy] logs")
                return
            what = "errors of the log" if self._policy == "errors" else "log"
            await self._note(f"the {what} of {instance} goes to the fleet for {minutes} minutes: command {command}")
            await self._send(instance, minutes, command)
        except (FetchError, HostGoneError, HostRefusedError, wire.WireError, *wire.JSON_ERRORS) as error:
            log.warning("stopped sending the log of %s: %s", instance, error)
        finally:
            if self.following.get(instance) == command:
                del self.following[instance]

    async def _send(self, instance: str, minutes: int, command: int) -> None:
        loop = asyncio.get_running_loop()
        end, posted_at, seen = loop.time() + 60.0 * minutes, -KEEP_ALIVE_S, 0
        failures = 0
        while loop.time() < end and self.following.get(instance) == command:
            answer = await self._host.ask(host_api.Logs, host_api.Lines, instance=instance)
            fresh, lost = _fresh(answer, seen)
            kept = [line for line in fresh if self._policy == "all" or is_error(line)]
            if kept or loop.time() - posted_at >= KEEP_ALIVE_S:
                chunk = LogChunk(
                    instance=instance, command=command, lines=tuple(kept), left_out=lost + len(fresh) - len(kept)
                )
                try:
                    more = await self._post(chunk)
                except FetchError:
                    failures += 1
                    if failures >= FAILURES_MAX:
                        raise
                    await asyncio.sleep(LOOK_S * 2**failures)
                    continue
                if not more:
                    return
                seen, posted_at, failures = answer.count, loop.time(), 0
            await asyncio.sleep(LOOK_S)
        with contextlib.suppress(FetchError):
            await self._post(LogChunk(instance=instance, command=command, ended=True))

    async def _post(self, chunk: LogChunk) -> bool:
        answer = await asyncio.to_thread(
            self._https.request,
            "POST",
            "/v1/logs",
            max_bytes=bounds.KIB,
            body=wire.encode(chunk),
            headers={"Content-Type": "application/json"},
        )
        return msgspec.json.decode(answer, type=LogAnswer).more


def _fresh(answer: host_api.Lines, seen: int) -> tuple[tuple[str, ...], int]:
    """Return the new lines, and the number of lines lost in between. A restarted host counts from zero."""
    new = answer.count - seen if answer.count >= seen else answer.count
    lines = answer.lines[-new:] if new else ()
    return lines, new - len(lines)

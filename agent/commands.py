"""Signed commands: check in, restart, follow logs.

Commands from the fleet: judged, remembered, and only then obeyed; what was refused is counted and said.

Sends an instance's log lines to an operator who asked by a signed command: as the board's owner allows, for minutes.

The lines are as the host has them, so without any secret. They go over HTTPS with the board's certificate, to the
fleet's own server, and only as long as that says that somebody reads them. Nothing is polled while nobody follows.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, Literal, Protocol

import msgspec

from agent.host.ipc import host_api
from agent.link.host_client import HostClient, HostGoneError, HostRefusedError
from agent.link.https import FetchError
from fleet.protocol import bounds, wire
from fleet.protocol.assignment import CheckIn, Command, FollowLogs, Restart
from fleet.protocol.messages import LogAnswer, LogChunk
from signing.errors import Rejected

log = logging.getLogger("agent.commands")


class Commands:
    """The closed vocabulary, and what each word does here.

    Attributes:
        refused: how many were refused since the agent started.
        problem: a sentence about them; empty for none.
    """

    def __init__(
        self,
        *,
        judge: Callable[[bytes], Awaitable[Command]],
        check_in: Callable[[], None],
        restart: Callable[[str], Awaitable[None]],
        follow: Callable[[FollowLogs, int], None],
        on_refused: Callable[[], None],
    ) -> None:
        """`judge` raises `Rejected`, and has remembered what it returns; `follow` gets the command's sequence too."""
        self._judge = judge
        self._check_in = check_in
        self._restart = restart
        self._follow = follow
        self._on_refused = on_refused
        self.refused = 0
        self.problem = ""

    async def obey(self, envelope: bytes) -> None:
        """Carry out a command, if it is one."""
        try:
            command = await self._judge(envelope)
        except Rejected as error:
            log.warning("command refused: %s", error)
            self.refused += 1
            self.problem = (
                f"{self.refused} commands were refused since the agent started, the last as {error.code}: "
                "the fleet's director did not sign it for this board and for now"
            )
            self._on_refused()
            return
        match command.verb:
            case CheckIn():
                self._check_in()
            case Restart(instance=instance):
                await self._restart(instance)
            case FollowLogs():
                log.info("command %d asks for the log of %s", command.sequence, command.verb.instance)
                self._follow(command.verb, command.sequence)


LOOK_S: Final = 0.5

KEEP_ALIVE_S: Final = 10.0

FOLLOWS_MAX: Final = 4

FAILURES_MAX: Final = 5

_ERRORS: Final = ("error", "critical", "host:")


class Poster(Protocol):
    """What posts a chunk (`agent.link.https.HttpsClient`)."""

    def request(
        self,
        method: str,
        path: str,
        *,
        max_bytes: int,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> bytes:
        """The body of the answer; raises `FetchError`."""


class LogFollower:
    """The board's end of `fleet logs`."""

    def __init__(
        self,
        *,
        link: HostClient,
        https: Poster,
        policy: Literal["off", "errors", "all"],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        told: Callable[[str], Coroutine[Any, Any, None]],
    ) -> None:
        """`policy` is the owner's; `told` writes what was sent into this board's signed history."""
        self._link = link
        self._https = https
        self._policy = policy
        self._spawn = spawn
        self._told = told
        self._following: dict[str, int] = {}

    def follow(self, instance: str, *, minutes: int, command: int) -> None:
        """A verified command asks for lines; a newer one of the same instance takes over."""
        if instance not in self._following and len(self._following) >= FOLLOWS_MAX:
            log.warning("the log of %s is not sent: %d are followed already", instance, FOLLOWS_MAX)
            return
        self._following[instance] = command
        self._spawn(self._run(instance, min(max(1, minutes), bounds.LOGS_MINUTES_MAX), command))

    async def _run(self, instance: str, minutes: int, command: int) -> None:
        try:
            if self._policy == "off":
                why = "this board's owner lets no log leave it: [policy] logs in agent.toml"
                await self._post(LogChunk(instance=instance, command=command, refused=why, ended=True))
                await self._told(f"command {command} asked for the log of {instance}: refused, by [policy] logs")
                return
            what = "errors of the log" if self._policy == "errors" else "log"
            await self._told(f"the {what} of {instance} goes to the fleet for {minutes} minutes: command {command}")
            await self._send(instance, minutes, command)
        except (FetchError, HostGoneError, HostRefusedError, wire.WireError, *wire.JSON_ERRORS) as error:
            log.warning("the log of %s is not sent any more: %s", instance, error)
        finally:
            if self._following.get(instance) == command:
                del self._following[instance]

    async def _send(self, instance: str, minutes: int, command: int) -> None:
        loop = asyncio.get_running_loop()
        end, posted_at, seen = loop.time() + 60.0 * minutes, -KEEP_ALIVE_S, 0
        failures = 0
        while loop.time() < end and self._following.get(instance) == command:
            answer = await self._link.ask(host_api.Logs, host_api.Lines, instance=instance)
            fresh, lost = _fresh(answer, seen)
            kept = [line for line in fresh if self._policy == "all" or line.startswith(_ERRORS)]
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
    """The lines that were not seen yet, and how many went by unseen. A host that was restarted counts anew."""
    new = answer.count - seen if answer.count >= seen else answer.count
    lines = answer.lines[-new:] if new else ()
    return lines, new - len(lines)

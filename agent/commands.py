"""Commands from the fleet: judged, remembered, and only then obeyed; what was refused is counted and said."""

import logging
from collections.abc import Awaitable, Callable

from fleet.protocol.assignment import CheckIn, Command, FollowLogs, Restart
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

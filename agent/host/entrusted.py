"""Secrets between their arrival and the start of the generation that they are for: descriptors, held and never read."""

import os

from agent.host import ipc
from agent.host.generation import StartError
from fleet.protocol import caps
from fleet.protocol.codes import RejectCode


class Entrusted:
    """What the agent has entrusted to this host and not yet started, one descriptor an instance."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[int, int]] = {}

    def hold(self, request: ipc.Entrust, fd: int | None) -> None:
        """Hold a descriptor, in place of an earlier one of the instance; raises `StartError`."""
        if fd is None:
            raise StartError(RejectCode.MALFORMED, f"{request.instance}: no secrets came with the request to hold them")
        if len(self._held) >= caps.ITEMS_MAX and request.instance not in self._held:
            os.close(fd)
            raise StartError(RejectCode.TOO_LARGE, f"secrets of {caps.ITEMS_MAX} instances wait for their start")
        self._close(self._held.pop(request.instance, None))
        self._held[request.instance] = request.generation, fd

    def take(self, run: ipc.Run) -> int:
        """The descriptor for a generation, the caller's from now on; -1 where it has no secrets.

        Raises:
            StartError: it has some, and they did not come.
        """
        held = self._held.pop(run.instance, None)
        if run.secrets and held is not None and held[0] == run.generation:
            return held[1]
        self._close(held)
        if run.secrets:
            raise StartError(RejectCode.START_FAILED, f"{run.instance}: its secrets did not come before it")
        return -1

    def drop(self, run: ipc.Run) -> None:
        """It was not started after all."""
        if (held := self._held.get(run.instance)) is not None and held[0] <= run.generation:
            self._close(self._held.pop(run.instance))

    def clear(self) -> None:
        """Nobody is left who could start anything."""
        for instance in list(self._held):
            self._close(self._held.pop(instance))

    @staticmethod
    def _close(held: tuple[int, int] | None) -> None:
        if held is not None:
            os.close(held[1])

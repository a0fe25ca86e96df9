"""From a request to the bytes of its answer: the guest is asked, and what became of that is counted and said.

An answer that its guest still wrote while it went out (`Flow`) has only its end left when the call returns; nothing can
be said to its client any more but by ending the connection early.
"""

import socket
import time
from typing import Final

from agent.host import connection
from agent.host.caller import Caller
from agent.host.connection import BadAnswerError, Request
from agent.host.faults import GuestError
from agent.host.flow import Flow
from fleet.protocol.codes import CallOutcome
from fleet.protocol.manifest import Limits

_LEFT: Final = {"gone": CallOutcome.CLIENT_GONE, "slow": CallOutcome.CLIENT_SLOW}
_SERVER_ERROR: Final = 500


class Answers:
    """Asks one guest."""

    def __init__(self, caller: Caller, limits: Limits) -> None:
        self._caller = caller
        self._limits = limits

    def answer(self, sock: socket.socket, request: Request) -> bytes:
        """Ask the guest; what is left to be sent of the answer. `request.keep_alive` may change."""
        head = request.method == b"HEAD"
        if request.refusal:
            self._caller.count(CallOutcome.HOST_ERROR, None)
            return connection.note(request.refusal, connection.REFUSALS[request.refusal], keep_alive=False)
        began_ns = time.monotonic_ns()
        way = Flow(sock, request, self._limits.response_bytes) if self._caller.streams else None
        try:
            status, headers, body = self._caller.handle(request, way)
        except GuestError as error:
            if way is not None and way.begun:
                return self._break_off(way, error, began_ns)
            self._caller.count(error.outcome, began_ns, error=True)
            status = 504 if error.outcome is CallOutcome.GUEST_TIMEOUT else 500
            return connection.note(status, str(error).splitlines()[0], head=head, keep_alive=request.keep_alive)
        try:
            trailers = b"" if way is None else _trailers(way)
            if way is not None and way.begun:
                return self._end(way, began_ns)
            fields = connection.guest_fields(status, headers, len(body), self._limits.response_bytes)
        except BadAnswerError as error:
            return self._refuse(way, request, error, began_ns)
        self._caller.count(CallOutcome.OK, began_ns, error=status >= _SERVER_ERROR)
        return connection.answer(status, fields, body, head=head, keep_alive=request.keep_alive, trailers=trailers)

    def _refuse(self, way: Flow | None, request: Request, error: BadAnswerError, began_ns: int) -> bytes:
        if way is not None and way.begun:
            way.problem = way.problem or str(error)
            return self._end(way, began_ns)
        self._caller.count(CallOutcome.OK, began_ns, error=True)
        self._caller.log(f"host: its answer is refused: {error}")
        head = request.method == b"HEAD"
        return connection.note(502, "the component's answer is not one", head=head, keep_alive=request.keep_alive)

    def _end(self, way: Flow, began_ns: int) -> bytes:
        """The end of an answer that was given out while it was written."""
        left = way.finish()
        if way.ended:
            self._caller.count(_LEFT[way.ended], began_ns)
            return b""
        if way.problem:
            self._caller.log(f"host: its answer is cut off: {way.problem}")
        self._caller.count(CallOutcome.OK, began_ns, error=bool(way.problem))
        return left

    def _break_off(self, way: Flow, error: GuestError, began_ns: int) -> bytes:
        """Its guest failed, or was ended since its client is gone."""
        left = way.finish(str(error))
        if way.ended:
            self._caller.count(_LEFT[way.ended], began_ns)
            return b""
        self._caller.count(error.outcome, began_ns, error=True)
        return left


def _trailers(way: Flow) -> bytes:
    """The guest's trailers as far as its client takes any; raises BadAnswerError where the answer is none."""
    if way.problem and not way.begun and not way.failed:
        raise BadAnswerError(way.problem)
    if not way.request.takes_trailers:
        way.trailers = b""
    if way.trailers:
        way.trailers = connection.guest_fields(_SERVER_ERROR, way.trailers, 0, 0)
    return way.trailers

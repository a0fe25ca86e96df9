"""A guest of wasi:http inside its adapter, called like any other: by default a fresh instance for each request.

Fresh, because that is what such guests are built for, and because a store's standard input, which carries the request's
body, is fixed when the store is made. A manifest may allow an instance more requests; those with a body get one of
their own all the same. The linker is made once, and the instance that shows at the start that the component can be
instantiated serves the first request without a body.

The engine keeps an unfinished line of standard output in a buffer of the process. The adapter flushes it at the end of
an exchange; after one that did not end well, the next store's adapter is asked to, and what comes is thrown away.
"""

from typing import ClassVar

from agent.host import flow, heads
from agent.host.codec import Answer
from agent.host.engine import Guest, Image, Log, ResponseSink
from fleet.protocol.compose import BRIDGE
from fleet.protocol.manifest import Grants, Limits


class WholeResponse:
    """Sink that keeps an answer until the call is over; for callers without a client."""

    begun = False
    request_trailers = b""

    def __init__(self) -> None:
        self.problem, self.failed, self.trailers = "", False, b""

    def rest(self) -> bytes:
        """See `ResponseSink.rest`."""
        return flow.drain()


def start(
    image: Image,
    *,
    limits: Limits,
    grants: Grants,
    config: dict[str, str],
    log: Log,
    data: str = "",
    outgoing: heads.Requests | None = None,
) -> Guest:
    """Instantiate a guest of either world; raises what `Guest` raises."""
    kind = Adapted if image.adapted else Guest
    return kind(image, limits=limits, grants=grants, config=config, log=log, data=data, outgoing=outgoing)


class Adapted(Guest):
    """A guest of wasi:http. The process's standard output must have been caught (`flow.catch`)."""

    _entries: ClassVar[tuple[tuple[str, str], ...]] = ((BRIDGE, "handle"), (BRIDGE, "flush"))
    _left = 0  # how many more requests this instance may answer
    # Whether nothing is left unwritten by an earlier store that ended in a trap: the process's, whoever's store it was.
    _clean: ClassVar[bool] = False

    def _open(self, stdin: bytes | None = None) -> None:
        super()._open(stdin or b"")
        # What the guest left unread of a body would be the next request's.
        self._left = 1 if stdin else self._limits.requests_per_instance or 1
        self._flush()

    def _flush(self) -> None:
        if not Adapted._clean:
            flush = self._function(BRIDGE, "flush")
            assert flush is not None
            self._call(flush)
            flow.drain()
            Adapted._clean = True

    def handle(
        self, method: bytes, target: bytes, headers: bytes, body: bytes, way: ResponseSink | None = None
    ) -> Answer:
        """See `Guest.handle`."""
        way = WholeResponse() if way is None else way
        if body or not self._left:
            self._store.close()
            self._open(body)
        else:
            self._flush()
        left, self._left, Adapted._clean = self._left - 1, 0, False
        try:
            said = self.exchange(heads.request_head(method, target, headers, way.request_trailers))
        finally:
            answer = way.rest()
            self._outgoing.reset()
        head = heads.answer_head(said)
        Adapted._clean = True
        if head.problem is not None:
            self._log(f"host: {head.problem}")
            way.problem, way.failed = way.problem or head.problem, True
            return head.status, b"content-type: text/plain\r\n", head.problem.encode() + b"\n"
        self._left = left
        way.trailers = head.trailers
        if way.begun:
            return 0, b"", b""
        if head.status:
            return head.status, head.headers, answer[2:]  # behind an empty line: it was begun before the head was known
        try:
            return heads.split_head(answer)
        except ValueError as error:
            way.problem = way.problem or str(error)
            return 0, b"", b""

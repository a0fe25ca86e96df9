"""Clients that send requests continuously, never retry, and count the result of each request.

Half of the clients keep their connection, half open one for each request; one request in `post_every` is a POST with a
body. A request is *answered* when a complete response with a status below 500 arrived. It is *lost* when the
client saw anything else: a refused or reset connection, an early end, silence, or a 5xx. A client that keeps its
connection writes without looking whether the peer has closed it, as the harshest real client does; only a response that
says `Connection: close` makes it open another one.

    async with Load(port=8080, path="/hello/") as load:
        before = load.count()
        ...                                # swap
        await load.seen("2.0.0")
        assert (load.count() - before).lost == 0
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

_HEAD_MAX_BYTES: Final = 64 * 1024
_SERVER_ERROR: Final = 500
_LOSSES_KEPT: Final = 20


class _LostError(Exception):
    """The client did not receive a whole response; the message says what it saw."""


@dataclass(frozen=True, slots=True)
class LoadResult:
    """Counts of requests over a span of time; `later - earlier` counts those between the two.

    Attributes:
        answered: complete responses with a status below 500.
        lost: everything else.
        posts: number of POST requests.
        connections: connections opened.
        by_version: answered responses by their `x-version` header ('' where it is missing).
        by_status: complete responses by status.
        reasons: lost requests by reason.
        losses: descriptions of the first few lost requests.
    """

    answered: int = 0
    lost: int = 0
    posts: int = 0
    connections: int = 0
    by_version: Counter[str] = field(default_factory=Counter)
    by_status: Counter[int] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    losses: tuple[str, ...] = ()

    @property
    def sent(self) -> int:
        """Number of finished requests, answered or lost."""
        return self.answered + self.lost

    def __sub__(self, earlier: "LoadResult") -> "LoadResult":
        return LoadResult(
            answered=self.answered - earlier.answered,
            lost=self.lost - earlier.lost,
            posts=self.posts - earlier.posts,
            connections=self.connections - earlier.connections,
            by_version=self.by_version - earlier.by_version,
            by_status=self.by_status - earlier.by_status,
            reasons=self.reasons - earlier.reasons,
            losses=self.losses[len(earlier.losses) :],
        )

    def __add__(self, other: "LoadResult") -> "LoadResult":
        return LoadResult(
            answered=self.answered + other.answered,
            lost=self.lost + other.lost,
            posts=self.posts + other.posts,
            connections=self.connections + other.connections,
            by_version=self.by_version + other.by_version,
            by_status=self.by_status + other.by_status,
            reasons=self.reasons + other.reasons,
            losses=(self.losses + other.losses)[:_LOSSES_KEPT],
        )


class Load:
    """Steady load on one HTTP address, from `__aenter__` to `stop` or `__aexit__`.

    Args:
        port: of the address.
        path: request target.
        kept_alive: clients that keep their connection.
        fresh: clients that open a connection for each request.
        pause_s: each client's pause after a response.
        post_every: one request in so many is a POST with `body`.
        timeout_s: silence after which a request counts as lost.
    """

    def __init__(
        self,
        *,
        port: int,
        host: str = "127.0.0.1",
        path: str = "/",
        kept_alive: int = 2,
        fresh: int = 2,
        pause_s: float = 0.01,
        post_every: int = 10,
        body: bytes = b"a small body",
        timeout_s: float = 10.0,
    ) -> None:
        self._host, self._port, self._path = host, port, path
        self._kept_alive, self._fresh = kept_alive, fresh
        self._pause_s, self._post_every, self._body, self._timeout_s = pause_s, post_every, body, timeout_s
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._progress = asyncio.Event()
        self._answered = self._lost = self._posts = self._connections = 0
        self._by_version: Counter[str] = Counter()
        self._by_status: Counter[int] = Counter()
        self._reasons: Counter[str] = Counter()
        self._losses: list[str] = []
        self._first: dict[str, float] = {}
        self._began = time.monotonic()

    async def __aenter__(self) -> Self:
        self._began = time.monotonic()
        kinds = [True] * self._kept_alive + [False] * self._fresh
        self._tasks = [asyncio.create_task(self._client(keep=keep), name="load") for keep in kinds]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def count(self) -> LoadResult:
        """Return the counts so far."""
        return LoadResult(
            answered=self._answered,
            lost=self._lost,
            posts=self._posts,
            connections=self._connections,
            by_version=Counter(self._by_version),
            by_status=Counter(self._by_status),
            reasons=Counter(self._reasons),
            losses=tuple(self._losses),
        )

    async def stop(self) -> LoadResult:
        """Let every request in flight end, close the connections, and return the final count."""
        self._stopping = True
        await asyncio.gather(*self._tasks)
        return self.count()

    async def seen(self, version: str, times: int = 1) -> None:
        """Return when `version` has answered at least `times` requests (since the start of this load)."""
        await self._until(lambda: self._by_version[version] >= times)

    async def sent(self, requests: int) -> None:
        """Return when `requests` more requests have finished."""
        goal = self._answered + self._lost + requests
        await self._until(lambda: self._answered + self._lost >= goal)

    def first_answer(self, version: str) -> float | None:
        """Return the monotonic time of the first answer of `version`; None when there was none."""
        return self._first.get(version)

    async def _until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            self._progress.clear()
            await self._progress.wait()

    async def _client(self, *, keep: bool) -> None:
        connection: _Connection | None = None
        number = 0
        while not self._stopping:
            number += 1
            post = number % self._post_every == 0
            self._posts += post
            try:
                async with asyncio.timeout(self._timeout_s):
                    if connection is None:
                        connection = await _Connection.open(self._host, self._port)
                        self._connections += 1
                    status, version, close = await connection.request(self._request(post=post, keep=keep))
            except (OSError, EOFError, TimeoutError, _LostError, ValueError) as error:
                self._note_loss(_reason(error))
                done = True
            else:
                self._note(status, version)
                done = close or not keep
            if done and connection is not None:
                connection.close()
                connection = None
            self._progress.set()
            await asyncio.sleep(self._pause_s)
        if connection is not None:
            connection.close()

    def _request(self, *, post: bool, keep: bool) -> bytes:
        lines = [
            f"{'POST' if post else 'GET'} {self._path} HTTP/1.1",
            f"Host: {self._host}:{self._port}",
            "Connection: " + ("keep-alive" if keep else "close"),
        ]
        if post:
            lines += ["Content-Type: text/plain", f"Content-Length: {len(self._body)}"]
        return "\r\n".join([*lines, "", ""]).encode() + (self._body if post else b"")

    def _note(self, status: int, version: str) -> None:
        self._by_status[status] += 1
        if status >= _SERVER_ERROR:
            self._note_loss(f"status {status}")
        else:
            self._answered += 1
            self._by_version[version] += 1
            self._first.setdefault(version, time.monotonic())

    def _note_loss(self, reason: str) -> None:
        self._lost += 1
        self._reasons[reason] += 1
        if len(self._losses) < _LOSSES_KEPT:
            self._losses.append(f"{time.monotonic() - self._began:.3f} s: {reason}")


class _Connection:
    """HTTP/1.1 client connection with one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, host: str, port: int) -> "_Connection":
        reader, writer = await asyncio.open_connection(host, port, limit=_HEAD_MAX_BYTES)
        return cls(reader, writer)

    async def request(self, data: bytes) -> tuple[int, str, bool]:
        """Send a request and read its whole response: status, `x-version`, whether the peer will close."""
        self._writer.write(data)
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        start, *lines = head.rstrip("\r\n").split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        await self._body(headers)
        close = headers.get("connection", "").lower() == "close" or start.startswith("HTTP/1.0")
        return int(start.split(" ", 2)[1]), headers.get("x-version", ""), close

    async def _body(self, headers: dict[str, str]) -> None:
        if headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int((await self._reader.readline()).split(b";")[0], 16):
                await self._reader.readexactly(size + 2)
            while (await self._reader.readline()).strip():
                pass
        elif "content-length" in headers:
            await self._reader.readexactly(int(headers["content-length"]))
        elif headers.get("connection", "").lower() == "close":
            await self._reader.read()
        else:
            raise _LostError("a response without a length")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._writer.close()


async def first_answer(
    *, port: int, version: str, host: str = "127.0.0.1", path: str = "/", every_s: float = 0.05
) -> float:
    """Send requests until `version` answers, and return the monotonic time of that. Cancel to give up."""
    while True:
        try:
            connection = await _Connection.open(host, port)
            try:
                request = f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n"
                _, answered, _ = await connection.request(request.encode())
            finally:
                connection.close()
            if answered == version:
                return time.monotonic()
        except (OSError, EOFError, _LostError, ValueError):
            pass  # no listener yet, or no whole answer: try again
        await asyncio.sleep(every_s)


def _reason(error: Exception) -> str:
    match error:
        case ConnectionRefusedError():
            return "connection refused"
        case ConnectionResetError() | BrokenPipeError():
            return "connection reset"
        case TimeoutError():
            return "no answer in time"
        case asyncio.IncompleteReadError():
            return "connection ended early" if error.partial else "connection closed without an answer"
        case _LostError():
            return str(error)
        case _:
            return f"{type(error).__name__}: {error}"

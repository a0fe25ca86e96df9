"""Smuggling, looked for by force: what the router accepts, the worker behind it must read as the same requests, and
nothing that a stranger sends may end either process or put an answer on the wrong request.

Seeded and bounded by count; `make fuzz` tries many times as many.
"""

import asyncio

import pytest
import support
from echo_guest import ECHO
from host_processes import lanes_of
from mutants import TIMES, at, cut, mutant
from support import Limits
from wire import Wire

from agent.host.http.connection import Http1Connection
from agent.host.http.proxy import ClientConnection, Clients, HttpUpstream
from agent.host.http.routing import RouteTable
from agent.host.ipc import host_api

BATCHES = range(20)
BATCH = 100 * TIMES
LIMITS = Limits(request_bytes=1 << 20, response_bytes=1 << 20)
BODY_MAX = 1 << 62  # sizes are not the question here
HOP = (b"connection:", b"te:", b"trailer:", b"upgrade:", b"expect:", b"keep-alive:", b"transfer-encoding:")


class Instance(HttpUpstream):
    """Stands for an upstream connection: reads what the router sends as a worker would, and answers what is whole."""

    full = False

    def __init__(self):
        self.lane = Http1Connection(body_max_bytes=BODY_MAX)
        self.read = []
        self.client = None

    def pause(self):
        pass

    resume = pause

    def begin(self, client, exchange):
        self.client, self.exchange = client, exchange
        self.write(exchange.head)

    def write(self, data):
        self.lane.feed(data)
        while self.lane.requests:
            self.read.append(self.lane.requests.popleft())

    def close(self):
        self.lane = Http1Connection(body_max_bytes=BODY_MAX)  # what was half sent is gone with the connection

    drop = close


class Pool:
    """A pool with one connection, read as one stream whoever is on it: what was left in it would be noticed."""

    def __init__(self):
        self.instance = Instance()
        self.known = {}
        self.calls = {}

    def take(self, _exchange):
        return self.instance


class Transport:
    """The client's side of the router: keeps nothing, refuses nothing."""

    def write(self, _data):
        pass

    def pause_reading(self):
        pass

    resume_reading = close = abort = pause_reading

    def can_write_eof(self):
        return False


async def through_the_router(pieces):
    """The requests that a worker reads behind a router which is sent these pieces."""
    routes, pool = RouteTable(), Pool()
    routes.up = {"echo": True}
    client = ClientConnection(routes, pool, Clients())
    client.connection_made(Transport())
    for piece in pieces:
        client.data_received(piece)
        while True:
            # the instance answers whatever has become whole
            while client._queue and client._queue[0].complete and client._queue[0].upstream is not None:
                exchange = client._queue[0]
                exchange.answering = True
                client.answered(exchange)
            if not (client._reads_on or client._awaits_turn):
                break
            await asyncio.sleep(0)  # for the turn in which the next request is read, or refused
    return pool.instance.read


def directly(pieces):
    """The requests that a worker reads of the same bytes at a port of its own; refusals left out."""
    state = Http1Connection(body_max_bytes=BODY_MAX)
    read = []
    for piece in pieces:
        state.feed(piece)
        while state.requests:
            request = state.requests.popleft()
            read.append(request)
            state.closing |= not request.keep_alive
    return [request for request in read if not request.refusal]


def seen(request, prefix=b""):
    named = [line for line in request.headers.split(b"\r\n") if line.startswith(b"connection:")]
    hop = {token.strip().lower() + b":" for line in named for token in line[11:].split(b",")} - {b"host:"}
    fields = [
        line
        for line in request.headers.split(b"\r\n")
        if not line.startswith((*HOP, b"x-forwarded-prefix:", b"content-length:", *hop))
    ]
    target = request.target.removeprefix(prefix)
    target = target if target.startswith((b"/", b"*")) else b"/" + target
    return request.method, target, fields, bytes(request.body), request.trailers


def routed(request):
    """Whether the router has an instance for it."""
    routes = RouteTable()
    routes.up = {"echo": True}
    host = next((line[6:] for line in request.headers.split(b"\r\n") if line.startswith(b"host: ")), b"")
    return not routes.find(host, request.target).status


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.asyncio
async def test_what_the_router_passes_on_is_what_was_asked(batch):
    compared = 0
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        raw = at(b"/echo", mutant(seed))
        pieces = cut(seed, raw)
        passed_on = await through_the_router(pieces)
        assert not any(request.refusal for request in passed_on), f"seed {seed}: {raw!r}"
        behind = [seen(request) for request in passed_on]
        alone = directly(pieces)
        there = [seen(request, b"/echo") for request in alone if routed(request)]
        # A request for nobody is answered as soon as its head has come, and may be the connection's last.
        wanted = there if len(there) == len(alone) else there[: len(behind)]
        assert behind == wanted, f"seed {seed}: {raw!r}"
        compared += len(there)
    assert compared > BATCH // 4, "enough is understood to be compared"


def test_mutants_end_no_process_and_misplace_no_answer(host):
    own = support.free_port()
    limits = LIMITS
    for run in (support.a_run("echo", 1, limits=limits), support.a_run("alone", 1, port=own, limits=limits)):
        assert isinstance(host.start(ECHO, run), host_api.Started)
    before = sorted(lanes_of(host))
    log = host.runtime.parent / "host.log"
    said = log.stat().st_size
    with Wire(host.port) as through, Wire(own) as beside:
        for seed in range(100_000, 100_000 + 100 * TIMES):
            raw = mutant(seed)
            for port, prefix, kept in ((host.port, b"/echo", through), (own, b"", beside)):
                with Wire(port) as stranger:
                    stranger.send(at(prefix, raw))
                    # Someone else's requests right behind it get their own answers, the first on a kept connection.
                    kept.send(at(prefix, b"GET @/ HTTP/1.1\r\nhost: b\r\nx-mine: %d\r\n\r\n" % seed))
                    status, fields, _ = kept.answer()
                    assert (status, fields.get("x-mine")) == (200, str(seed)), f"seed {seed}: {raw!r}"
                    body = b"%d" % seed
                    kept.send(
                        at(prefix, b"POST @/ HTTP/1.1\r\nhost: b\r\ncontent-length: %d\r\n\r\n" % len(body)) + body
                    )
                    assert kept.answer()[::2] == (200, body), f"seed {seed}: {raw!r}"
    assert sorted(lanes_of(host)) == before
    assert log.read_bytes()[said:] == b"", "nothing ended, nothing complained"
    for name in ("echo", "alone"):
        assert (host.health(name).restarts, host.health(name).calls.get("guest-trap", 0)) == (0, 0)

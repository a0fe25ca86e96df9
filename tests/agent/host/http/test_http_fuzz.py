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
from whole_calls import WholeCalls
from wire import Wire

from agent.host.http.proxy import ClientConnection, Clients, Instances
from agent.host.http.routing import OwnRoute, RouteTable
from agent.host.ipc import host_api

BATCHES = range(20)
BATCH = 100 * TIMES
LIMITS = Limits(request_bytes=1 << 20, response_bytes=1 << 20)
HOP = (b"connection:", b"te:", b"trailer:", b"upgrade:", b"expect:", b"keep-alive:", b"transfer-encoding:")


class Transport:
    """The client's side of the router: keeps nothing, refuses nothing."""

    def write(self, _data):
        pass

    def pause_reading(self):
        pass

    resume_reading = close = abort = pause_reading

    def can_write_eof(self):
        return False


async def asked(pieces, routes, instances):
    """The requests that a guest reads behind a router which is sent these pieces."""
    client = ClientConnection(routes, instances, Clients())
    client.connection_made(Transport())
    for piece in pieces:
        client.data_received(piece)
        while client._reads_on or client._awaits_turn:
            turn = asyncio.Event()
            asyncio.get_running_loop().call_soon(turn.set)
            await turn.wait()  # behind the turn in which the next request is read, or refused


async def through_the_router(pieces):
    """The same on the shared port: requests that the instance `echo` is asked."""
    routes, instances = RouteTable(), Instances()
    routes.up = {"echo": True}
    calls = instances.calls["echo"] = WholeCalls()
    await asked(pieces, routes, instances)
    return calls.asked


async def directly(pieces):
    """The same at a port of the instance's own."""
    instances = Instances()
    calls = instances.calls["echo"] = WholeCalls()
    await asked(pieces, OwnRoute("echo"), instances)
    return calls.asked


def seen(request, prefix=b""):
    line, *lines = request.head.split(b"\r\n")
    method, target, _, _ = line.split(b" ")
    named = [each for each in lines if each.startswith(b"connection:")]
    hop = {token.strip().lower() + b":" for each in named for token in each[11:].split(b",")} - {b"host:"}
    fields = [each for each in lines if not each.startswith((*HOP, b"x-forwarded-prefix:", b"content-length:", *hop))]
    target = target.removeprefix(prefix)
    target = target if target.startswith((b"/", b"*")) else b"/" + target
    return method, target, fields, bytes(request.body), request.trailers


def routed(request):
    """Whether the router has an instance for it."""
    routes = RouteTable()
    routes.up = {"echo": True}
    line, *lines = request.head.split(b"\r\n")
    host = next((each[6:] for each in lines if each.startswith(b"host: ")), b"")
    return not routes.find(host, line.split(b" ")[1]).status


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.asyncio
async def test_what_the_router_passes_on_is_what_was_asked(batch):
    compared = 0
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        raw = at(b"/echo", mutant(seed))
        pieces = cut(seed, raw)
        passed_on = await through_the_router(pieces)
        behind = [seen(request) for request in passed_on]
        alone = await directly(pieces)
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

"""Memory of the router: bounded for each client and each worker, whatever they send and however little they read.

Routers run in the loop of these tests. A round ends when a worker's NUDGE has come back; after so many of them, the
router has taken all that it is willing to take.
"""

import asyncio
import contextlib
import socket
import struct

import pytest
from router_board import GET, Client, board

from agent.host.http.proxy import ClientConnection, Clients, Instances
from agent.host.http.routing import OwnRoute
from agent.host.ipc.frames import Frame, Kind
from agent.host.ipc.helper_api import AddListener, ChannelBroken

BODY_BYTES = 16 << 20
ROUNDS = 400  # of 64 KiB: more than the body
BUFFER_BYTES = 256 * 1024  # of each socket, of which the kernel doubles it
KEPT_BYTES = 4 << 20  # in all buffers between a client and the router's own
POST = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % BODY_BYTES
CHUNKED = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
PIECE = (b"\r\n\r\n" + bytes(3000)) * 10  # empty lines may end a message, so the router reads up to each


def small(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
    return sock


@contextlib.asynccontextmanager
async def small_board(tmp_path):
    """A board, a worker of `web`, and a client; little is kept in the sockets between them."""
    async with board(tmp_path) as the_board:
        listener = small(socket.create_server(("127.0.0.1", 0)))
        address = listener.getsockname()
        the_board.tell(AddListener("web"), listener.detach())
        sock = small(socket.socket())
        sock.connect(address)
        client = Client(*await asyncio.open_connection(sock=sock))
        yield the_board, await the_board.worker(), client
        client.writer.transport.abort()


async def round_trip(worker):
    """Return once the router has come back to this worker, with the requests that have come meanwhile."""
    worker.say(Frame(Kind.NUDGE, 0))
    requests = []
    while (frame := await worker.next()).kind is not Kind.NUDGE:
        if frame.kind is Kind.WHOLE_REQUEST:
            requests.append(frame.call)
    return requests


def unsent_bytes(client):
    return client.writer.transport.get_write_buffer_size()


@pytest.mark.asyncio
@pytest.mark.parametrize("credit", [0, 1, 16384], ids=["nothing", "a byte", "a quarter"])
async def test_a_body_waits_at_its_client_while_its_guest_takes_less_than_comes(tmp_path, credit):
    async with small_board(tmp_path) as (_, worker, client):
        client.ask(POST + bytes(BODY_BYTES))
        call = (await worker.next(Kind.REQUEST)).call
        for _ in range(ROUNDS):
            worker.say(Frame(Kind.CREDIT, call, struct.pack("<I", credit)))
            await round_trip(worker)
        assert unsent_bytes(client) > BODY_BYTES - ROUNDS * credit - KEPT_BYTES


@pytest.mark.asyncio
async def test_a_body_of_many_pieces_waits_at_its_client_while_its_guest_takes_none(tmp_path):
    async with small_board(tmp_path) as (_, worker, client):
        client.ask(CHUNKED + (b"%x\r\n%b\r\n" % (len(PIECE), PIECE)) * (BODY_BYTES // len(PIECE)))
        await worker.next(Kind.REQUEST)
        for _ in range(4 * ROUNDS):
            await round_trip(worker)
        assert unsent_bytes(client) > BODY_BYTES - KEPT_BYTES


@pytest.mark.asyncio
async def test_a_client_that_reads_no_answers_is_given_no_more_of_them(tmp_path):
    async with small_board(tmp_path) as (_, worker, client):
        client.ask(GET * ROUNDS + POST + bytes(BODY_BYTES))
        answered = 0
        for _ in range(2 * ROUNDS):
            for call in await round_trip(worker):
                worker.answer(call, bytes(60_000))
                answered += 1
        assert answered * 60_000 < 2 * KEPT_BYTES
        assert unsent_bytes(client) > BODY_BYTES - KEPT_BYTES
        for _ in range(answered):
            assert len((await client.answer())[2]) == 60_000
        reading = asyncio.ensure_future(client.answer())
        for _ in range(ROUNDS - answered):
            worker.answer((await worker.next(Kind.WHOLE_REQUEST)).call, b"more")
            assert (await reading)[2] == b"more"
            reading = asyncio.ensure_future(client.answer())
        call = (await worker.next(Kind.REQUEST)).call
        assert await worker.body() == bytes(BODY_BYTES)
        worker.answer(call, b"the end")
        assert (await reading)[2] == b"the end"


class Transport(asyncio.Transport):
    """The client's side of the router, which is read or not."""

    def __init__(self):
        super().__init__()
        self.is_read, self.written = True, b""

    def pause_reading(self):
        self.is_read = False

    def resume_reading(self):
        self.is_read = True

    def write(self, data):
        self.written += data

    def can_write_eof(self):
        return False


@pytest.mark.asyncio
async def test_a_body_behind_an_unread_answer_waits_at_its_client():
    transport = Transport()
    client = ClientConnection(OwnRoute("web"), Instances(), Clients())
    client.connection_made(transport)
    client.pause_writing()
    client.data_received(POST + b"x")
    assert (transport.is_read, transport.written) == (False, b"")
    client.resume_writing()
    assert transport.written.startswith(b"HTTP/1.1 503 ")


@pytest.mark.asyncio
async def test_a_worker_whose_frame_is_quoted_in_a_report_does_not_end_the_router(tmp_path):
    async with small_board(tmp_path) as (the_board, worker, client):
        client.ask(GET.replace(b"GET", b"POST"))
        await worker.next(Kind.WHOLE_REQUEST)
        worker.fail(b"\x01" * 60_000, b"no outcome")
        assert (await the_board.report(ChannelBroken)).worker == worker.number
        assert (await client.answer())[0] == 502

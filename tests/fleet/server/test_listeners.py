"""Clients that hold connections and say nothing, or half of something, take neither memory nor the others' turn.

`fleet serve` as a process, real TLS, more connections than one address may have. Counted is what the server closes by
itself, and that others are answered meanwhile.
"""

import asyncio
import contextlib
import json
import ssl
from datetime import UTC, datetime

import httpx
import pytest

from fleet.ca import CertificateAuthority
from fleet.server.config import Address
from fleet.server.connections import Limits
from fleet.server.limits import ServerLimits
from fleet.server.listener import Deadlines, Listener, abort, bind
from tests.eventually import eventually_async
from tests.fleet.server.server_process import Crowd, serving

OPERATORS, DEVICES = ServerLimits().operators, ServerLimits().devices
MORE = 150
"""Connections beyond what one address may have."""

HALF_A_HELLO = bytes.fromhex("16030100f8010000f4")
"""Begin of a record of 248 bytes, which begins a handshake; no more of it comes."""


def client(server):
    token = (server.home / "operator" / "token").read_text().strip()
    return httpx.AsyncClient(
        base_url=f"https://{server.operators}",
        verify=server.tls(),
        headers={"authorization": f"Bearer {token}"},
        timeout=60,
    )


async def answered(server):
    """Ask as an operator, on a connection of its own."""
    async with client(server) as http:
        return (await http.get("/v1/status")).status_code


def without_check():
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


async def no_content(_scope, _receive, send):
    """Answer everyone with 204."""
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


def server_tls(directory):
    """Make an authority and the server's TLS context."""
    ca = CertificateAuthority.create(directory, fleet="test", now=datetime.now(UTC))
    pair = ca.server(["127.0.0.1"], now=datetime.now(UTC))
    (directory / "server.pem").write_bytes(pair.certificate_pem)
    (directory / "server.key").write_bytes(pair.key_pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "server.pem", directory / "server.key")
    return ca, context


@contextlib.asynccontextmanager
async def small_listener(directory, application=no_content):
    """Serve an application, four connections to one address; yield where, and a client's context."""
    ca, context = server_tls(directory)
    sockets = bind("127.0.0.1:0", "a test")
    listener = Listener(application, sockets, context, Limits(connections=10, per_address=4, per_device=1))
    await listener.start()
    try:
        yield Address(*sockets[0].getsockname()), ssl.create_default_context(cadata=ca.pem)
    finally:
        await listener.stop()


@pytest.mark.asyncio
async def test_a_connection_that_was_closed_twice_can_be_aborted(tmp_path):
    """Close as a deadline and an answer's end do in the same moment: Debian's Python raised for TLS."""
    _, context = server_tls(tmp_path)
    accepted = asyncio.get_running_loop().create_future()

    async def served(_reader, writer):
        accepted.set_result(writer)

    server = await asyncio.start_server(served, "127.0.0.1", 0, ssl=context)
    _, writer = await asyncio.open_connection(*server.sockets[0].getsockname(), ssl=without_check())
    for_client = await accepted
    for_client.close()
    for_client.close()
    abort(for_client.transport)
    writer.close()
    server.close()


@pytest.mark.asyncio
@pytest.mark.timeout(300)
async def test_bare_connections_to_the_devices_port_end_and_take_no_memory(new_home):
    async with serving(new_home("embedded")) as server:
        assert await answered(server) == 200
        files, memory = server.files(), server.memory_mib()
        crowd = await Crowd().join(server.devices, DEVICES.per_address + MORE)
        await eventually_async(lambda: crowd.open <= DEVICES.per_address, "the oldest of too many end")
        assert server.files() <= files + DEVICES.per_address
        # the operators' port has limits of its own, and on the devices' port there is room for who speaks
        assert await answered(server) == 200
        _, writer = await asyncio.open_connection(
            server.devices.host, server.devices.port, ssl=without_check(), server_hostname="anything"
        )
        writer.transport.abort()
        await crowd.closed()
        await eventually_async(lambda: server.files() <= files, "their files are closed")
        assert server.memory_mib() <= memory * 1.2
        assert await answered(server) == 200


@pytest.mark.asyncio
@pytest.mark.timeout(300)
async def test_idle_tls_on_the_operators_port_ends_for_those_who_ask(new_home):
    async with serving(new_home("embedded")) as server, client(server) as http:
        assert await answered(server) == 200
        files = server.files()
        # a request that is being answered never ends for a newer connection: nothing in this fleet waits for a
        # signature, so this one takes as long as it says
        poll = asyncio.create_task(http.get("/v1/online", params={"wait": 25}))
        crowd = await Crowd().join(server.operators, OPERATORS.per_address + MORE // 3, tls=server.tls())
        await eventually_async(lambda: crowd.open < OPERATORS.per_address, "the oldest of too many end")
        assert server.files() <= files + OPERATORS.per_address
        assert await answered(server) == 200
        await crowd.closed()
        crowd.hang_up()
        assert (await poll).status_code == 200
        await http.aclose()
        await eventually_async(lambda: server.files() <= files, "their files are closed")


@pytest.mark.asyncio
@pytest.mark.timeout(300)
async def test_each_port_has_as_many_connections_as_server_toml_says(new_home):
    home = new_home("embedded")
    with (home / "server" / "server.toml").open("a") as file:
        file.write("[limits]\ndevice_connections = 16\ndevice_connections_per_address = 5\n")
        file.write("operator_connections_per_address = 7\n")
    async with serving(home) as server:
        for where, most in ((server.devices, 5), (server.operators, 7)):
            crowd = await Crowd().join(where, most + 6)
            await eventually_async(lambda crowd=crowd, most=most: crowd.open == most, "the oldest of too many end")
            crowd.hang_up()
        assert await answered(server) == 200


@pytest.mark.asyncio
async def test_a_client_finishes_its_handshake_while_others_behind_its_address_begin_theirs(tmp_path):
    async with small_listener(tmp_path) as (where, context):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        with pytest.raises(ssl.SSLWantReadError):
            tls.do_handshake()
        reader, writer = await asyncio.open_connection(where.host, where.port)
        writer.write(outgoing.read())
        incoming.write(await reader.read(65536))
        storm = await Crowd().join(where, 6, says=HALF_A_HELLO)  # four is what one address may have
        await eventually_async(lambda: storm.open <= 1, "no second one of the storm is in a handshake")
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                writer.write(outgoing.read())
                incoming.write(await reader.read(65536))
        tls.write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        writer.write(outgoing.read())
        said = b""
        while b"\r\n\r\n" not in said and (data := await reader.read(65536)):
            incoming.write(data)
            with contextlib.suppress(ssl.SSLWantReadError):
                said += tls.read(65536)
        assert said.startswith(b"HTTP/1.1 204 ")
        writer.transport.abort()
        storm.hang_up()


async def asked(where, context):
    """Connect, have one request answered, and ask nothing more."""
    reader, writer = await asyncio.open_connection(where.host, where.port, ssl=context)
    writer.write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204 ")
    return reader, writer


@pytest.mark.asyncio
async def test_a_client_that_goes_on_sending_its_body_does_not_end_for_a_newer_one(tmp_path):
    came = asyncio.Queue()

    async def application(scope, receive, send):
        while (message := await receive()).get("more_body"):
            came.put_nowait(len(message["body"]))
        await no_content(scope, receive, send)

    part = Deadlines().body_bytes
    async with small_listener(tmp_path, application) as (where, context):
        reader, writer = await asyncio.open_connection(where.host, where.port, ssl=context)
        writer.write(f"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {part + 2}\r\n\r\nx".encode())
        assert await came.get() == 1
        idle = [await asked(where, context) for _ in range(3)]  # four is what one address may have
        writer.write(b"x" * part)
        while part:
            part -= await came.get()
        idle.append(await asked(where, context))
        writer.write(b"x")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204 ")
        assert await idle[0][0].read() == b""
        for each in (writer, *(writer for _, writer in idle)):
            each.transport.abort()


@pytest.mark.asyncio
@pytest.mark.timeout(300)
async def test_whoever_sends_half_of_something_is_closed(new_home):
    halves = [
        b"GET /v1/status HTTP/1.1\r\nhost: a\r\nx-half: ",
        b"POST /v1/enrol HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\n{",
        b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\nGET /hea",
    ]
    async with serving(new_home("embedded")) as server:
        assert await answered(server) == 200
        files = server.files()
        crowds = [await Crowd().join(server.operators, 20, tls=server.tls(), says=half) for half in halves]
        crowds.append(await Crowd().join(server.devices, 20, says=HALF_A_HELLO))
        assert await answered(server) == 200
        for crowd in crowds:
            await crowd.closed()
            crowd.hang_up()
        assert all(b"200 OK" in said for said in crowds[2].said)
        await eventually_async(lambda: server.files() <= files, "their files are closed")
        assert await answered(server) == 200


@pytest.mark.asyncio
@pytest.mark.timeout(300)
async def test_a_server_told_to_end_ends_with_connections_of_every_kind_and_never_answers_500(new_home):
    async with serving(new_home("embedded")) as server:
        token = (server.home / "operator" / "token").read_text().strip()
        poll = f"GET /v1/online?wait=60 HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {token}\r\n\r\n".encode()
        half = b"POST /v1/enrol HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\n{"
        crowd = await Crowd().join(server.devices, 50)
        for says in (b"", half, poll):
            await crowd.join(server.operators, 20, tls=server.tls(), says=says)
        assert await answered(server) == 200
        assert await server.ended() == 0
        await crowd.closed()
        assert not [said for said in crowd.said if b" 500 " in said]
        crowd.hang_up()


@pytest.mark.asyncio
async def test_the_answer_of_a_server_carries_its_date(new_home):
    async with serving(new_home("embedded")) as server, client(server) as http:
        reply = await http.get("/v1/status")
        assert reply.headers["date"].endswith("GMT")
        assert json.loads(reply.content)["fleet"] == "test"

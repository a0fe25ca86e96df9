"""TLS terminator in the test's own loop, whose clock is set forward: clients that take their time to read."""

import asyncio
import socket
import ssl

import pytest
from peers import certificate

from agent.host.http import tls
from agent.host.http.ingress_config import Certificate
from agent.host.ipc import framing

BODY = bytes(range(256)) * 800  # more than the sockets take, and less than is written ahead
SMALL = 4096


def read_all(sock):
    data = b""
    while piece := sock.recv(65536):
        data += piece
    return data


@pytest.mark.asyncio
@pytest.mark.parametrize(("later_s", "gets"), [(30, True), (300, False)])
async def test_a_client_has_a_while_to_read_what_was_written_before_the_end(tmp_path, monkeypatch, later_s, gets):
    file, _ = certificate(tmp_path, "meter.example")
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)  # as on a slow link; the client's have it too
    supervisor, sock = framing.socket_pair()
    router, to_router = framing.socket_pair()
    trust = ssl.create_default_context(cafile=file)

    def connect():
        plain = socket.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        plain.settimeout(60)
        plain.connect(listener.getsockname())
        return trust.wrap_socket(plain, server_hostname="meter.example")

    port = listener.dup()
    context = tls.contexts([Certificate(certificate=str(file), key=str(file))])
    loop = asyncio.get_running_loop()
    terminator = asyncio.create_task(tls.Terminator(port, sock, to_router, context).run())
    client = await asyncio.to_thread(connect)
    _, (fd,) = await asyncio.to_thread(framing.receive_packet, router)
    with socket.socket(fileno=fd) as answering:
        answering.setblocking(False)
        await loop.sock_sendall(answering, BODY)
        answering.shutdown(socket.SHUT_WR)
        assert await loop.sock_recv(answering, 1) == b"", "the terminator has read it all"
    supervisor.close()
    now = loop.time
    monkeypatch.setattr(loop, "time", lambda: now() + later_s)
    if gets:
        assert await asyncio.to_thread(read_all, client) == BODY
    else:  # nobody holds a place for ever
        await terminator
    client.close()
    await terminator
    for each in (listener, sock, router, to_router):
        each.close()

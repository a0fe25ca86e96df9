"""TLS terminator: clients that take their time to read, in the test's own loop, whose clock is set forward.

Without descriptors: in a process of its own, whose limit the test lowers.
"""

import asyncio
import socket
import ssl
import subprocess
import sys

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


NO_DESCRIPTORS = """
import asyncio, contextlib, encodings.idna, resource, socket, ssl, sys
from agent.host.http import tls
from agent.host.http.ingress_config import Certificate
from agent.host.ipc import framing

asked = []

class Counted(socket.socket):
    def accept(self):
        asked.append(1)
        return super().accept()

def shake_hands(trust, plain):
    with contextlib.suppress(OSError), trust.wrap_socket(plain, server_hostname="meter.example") as client:
        client.recv(1)

async def main(file, spare):
    supervisor, sock = framing.socket_pair()
    router, to_router = framing.socket_pair()
    trust = ssl.create_default_context(cafile=file)
    listener = Counted(fileno=socket.create_server(("127.0.0.1", 0)).detach())
    terminator = tls.Terminator(listener, sock, to_router, tls.contexts([Certificate(certificate=file, key=file)]))
    plain = socket.create_connection(listener.getsockname())
    await asyncio.to_thread(int)  # modules of threads are files too
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (plain.fileno() + 1 + spare, before[1]))
    running = asyncio.create_task(terminator.run())
    client = asyncio.create_task(asyncio.to_thread(shake_hands, trust, plain))
    if not spare:
        for _ in range(200):
            await asyncio.sleep(0)
        print(len(asked))
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        _, (fd,) = await asyncio.to_thread(framing.receive_packet, router)
        socket.socket(fileno=fd).close()
    await client
    supervisor.close()
    await running

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


def without_descriptors(tmp_path, spare):
    """Run a terminator with `spare` descriptors left until it has ended; return what it printed."""
    file, _ = certificate(tmp_path, "meter.example")
    command = [sys.executable, "-c", NO_DESCRIPTORS, str(file), str(spare)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert not done.stderr, done.stderr
    return done.stdout


def test_a_terminator_without_a_descriptor_left_does_not_ask_for_one_again_and_again(tmp_path):
    assert int(without_descriptors(tmp_path, 0)) == 1


def test_a_terminator_ends_that_had_a_descriptor_for_a_client_and_none_for_its_way_to_the_router(tmp_path):
    without_descriptors(tmp_path, 1)

"""HTTP server of a worker, on sockets, with a function in place of the guest."""

import os
import select
import socket

import pytest

from agent.host.ipc import framing
from agent.host.worker.http_server import HttpServer
from fleet.protocol.manifest import Limits

ANSWER = os.urandom(4 << 20)


class Caller:
    streams = False

    def handle(self, request, way):
        return 200, b"", ANSWER

    def count(self, outcome, began_ns, *, error=False):
        pass


def test_a_large_answer_is_sent_piece_by_piece_from_where_it_lies():
    """Whatever is left of it is a view of the one answer: copying the rest for each piece would be quadratic."""
    poll = select.epoll()
    clients = HttpServer(poll, Caller(), Limits(response_bytes=len(ANSWER)), lambda passed, cut: None)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)  # else the kernel may take it all at once
    with socket.create_connection(listener.getsockname()) as client:
        client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        clients.serve(listener)
        client.setblocking(False)
        received, wholes = b"", set()
        while not received.endswith(ANSWER):
            for fd, mask in poll.poll(0):
                clients.event(fd, mask)
            wholes |= {id(one.out.obj) for one in clients._clients.values() if one.out}
            try:
                received += client.recv(1 << 20) or pytest.fail("closed")
            except BlockingIOError:
                continue
    assert len(wholes) == 1


class Busy(Caller):
    """In each call it is noticed that it takes its time."""

    def handle(self, request, way):
        self.relieve()
        return 200, b"", b"ok"


@pytest.fixture
def two_clients():
    """A worker that may have siblings, with two connections: its clients, its loop, the queue, both connections."""
    poll = select.epoll()
    clients = HttpServer(poll, Busy(), Limits(concurrency=2), lambda passed, cut: None)
    listener = socket.create_server(("127.0.0.1", 0))
    queue = framing.socket_pair()
    clients.serve(listener, queue)

    def turn():
        for fd, mask in poll.poll(60):
            clients.event(fd, mask)

    with socket.create_connection(listener.getsockname()) as one, socket.create_connection(one.getpeername()) as other:
        while len(clients._clients) < 2:
            turn()
        yield clients, turn, queue, (one, other)
    clients.close()


def waiting(sock):
    """What has been passed on by this socket: what had come of the next message of each."""
    found = []
    while select.select([sock], [], [], 0)[0]:
        try:
            data, fds = framing.receive_packet(sock)
        except framing.GoneError:
            break
        found.append(data[1:])
        for fd in fds:
            os.close(fd)
    return found


def test_who_does_not_ask_waits_in_no_worker_that_is_busy(two_clients):
    clients, turn, queue, (one, other) = two_clients
    other.sendall(b"GET /lat")
    turn()
    one.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    turn()
    assert waiting(queue[1]) == [b"GET /lat"]
    assert one.recv(1000).endswith(b"ok"), "whose call it is stays until it is answered"
    assert len(clients._clients) == 1
    clients.relieve()
    assert waiting(queue[1]) == [], "and between calls nobody goes"


def test_whoever_leaves_takes_along_who_waits_in_the_queue(two_clients):
    clients, turn, _, (one, _) = two_clients
    one.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    turn()
    assert len(clients._clients) == 1
    theirs, ours = framing.socket_pair()
    clients.hand_over(theirs, deadline_s=60)
    assert waiting(ours) == [b"", b""]


def test_who_is_left_alone_takes_its_clients_back(two_clients):
    _, turn, _, (one, other) = two_clients
    one.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    turn()
    other.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    other.settimeout(60)
    while not select.select([other], [], [], 0)[0]:
        turn()
    assert other.recv(1000).endswith(b"ok")

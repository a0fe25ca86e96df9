"""A lane's clients, without a lane: sockets on one side, a guest that is a function on the other."""

import os
import select
import socket

from agent.host.clients import Clients
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
    clients = Clients(poll, Caller(), Limits(response_bytes=len(ANSWER)), lambda passed, cut: None)
    listener = socket.create_server(("127.0.0.1", 0))
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
                received += client.recv(1 << 20)
            except BlockingIOError:
                continue
    assert len(wholes) == 1

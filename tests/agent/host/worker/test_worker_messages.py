"""Messages of a worker to a supervisor that is behind: lines of a log are dropped, and nothing else is."""

import select
import socket
import threading

import pytest

from agent.host.ipc import framing, worker_api
from agent.host.worker.worker import Worker


class Announced(socket.socket):
    """A socket that says when a message is about to wait for room, or was not sent for want of it."""

    def sendmsg(self, data, rights, flags):
        if not flags & socket.MSG_DONTWAIT:
            self.tried.set()
        try:
            return super().sendmsg(data, rights, flags)
        finally:
            self.tried.set()


@pytest.mark.parametrize(
    ("message", "arrives"), [(worker_api.Fault(message="it trapped"), True), (worker_api.Line(text="a line"), False)]
)
def test_a_fault_waits_for_room_and_a_line_does_not(message, arrives):
    ours, theirs = framing.socket_pair()
    sock = Announced(fileno=theirs.detach())
    sock.tried = threading.Event()
    with ours, sock:
        worker = Worker(sock, select.epoll())
        filler = worker_api.encode(worker_api.Line(text="x" * 1000))
        sent = 0
        while True:
            try:
                socket.socket.sendmsg(sock, [filler], [], socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            sent += 1
        saying = threading.Thread(target=worker.say, args=(message,))
        saying.start()
        assert sock.tried.wait(60)
        read = [worker_api.receive_from_worker(ours)[0] for _ in range(sent + arrives)]
        saying.join()
        assert (read[-1] == message) is arrives
        ours.setblocking(False)
        with pytest.raises(BlockingIOError):
            worker_api.receive_from_worker(ours)

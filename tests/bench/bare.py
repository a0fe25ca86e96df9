"""Bare pieces of a request, as floors: sockets without HTTP or wasm, the same over two processes, the engine alone.

    python -m tests.bench.bare one ADDRESS        one process that answers what `probe.wasm` would, in length
    python -m tests.bench.bare two ADDRESS        the same, each answer fetched from a second process
    python -m tests.bench.bare engine N SECONDS   calls of `probe.wasm` in the product's engine, N requests an instance

ADDRESS: a port of 127.0.0.1, or the path of a Unix socket. Run by `tests/bench/request_path.py`.
"""

import os
import re
import select
import socket
import struct
import sys
import time

SMALL = b"hello over wasi:http\n"
LARGE = {b"/large/1": bytes(1 << 20), b"/pages/16": bytes(1 << 16)}
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


def answer(head, body):
    target = head.split(b" ", 2)[1]
    content = body if target == b"/echo" else LARGE.get(target, SMALL)
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(content), content)


def whole(data):
    """Length of the request's head and of all of it; None before it is whole."""
    end = data.find(b"\r\n\r\n") + 4
    if end < 4:
        return None
    found = LENGTH.search(data, 0, end)
    size = end + (int(found[1]) if found else 0)
    return (end, size) if len(data) >= size else None


def serve(listener, respond):
    poll = select.epoll()
    poll.register(listener, select.EPOLLIN)
    clients = {}
    while True:
        for fd, _ in poll.poll():
            if fd == listener.fileno():
                sock, _ = listener.accept()
                if sock.family == socket.AF_INET:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                clients[sock.fileno()] = sock, bytearray()
                poll.register(sock, select.EPOLLIN)
                continue
            sock, data = clients[fd]
            try:
                more = sock.recv(1 << 18)
                data += more
                if more and (found := whole(data)):
                    head, size = found
                    sock.sendall(respond(bytes(data[:head]), bytes(data[head:size])))
                    del data[:size]
            except ConnectionError:
                more = b""
            if not more:
                poll.unregister(fd)
                sock.close()
                del clients[fd]


def receive(sock, size):
    data = bytearray()
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            os._exit(0)  # the other process has ended
        data += more
    return bytes(data)


def behind(sock):
    """The second process: one request after the other."""
    while True:
        head, body = struct.unpack("<II", receive(sock, 8))
        data = answer(receive(sock, head), receive(sock, body))
        sock.sendall(struct.pack("<I", len(data)) + data)


def second_process():
    ours, theirs = socket.socketpair()
    if not os.fork():
        ours.close()
        behind(theirs)
    theirs.close()

    def respond(head, body):
        ours.sendall(struct.pack("<II", len(head), len(body)) + head + body)
        return receive(ours, struct.unpack("<I", receive(ours, 4))[0])

    return respond


def engine(requests_per_instance, seconds):
    """Print the calls, and the median and 99th percentile of their times in microseconds."""
    from agent.host.engine import adapter_abi, guest, runtime
    from fleet.protocol.manifest import Grants, Limits
    from tests.agent.host import support

    adapter_abi.catch_stdout()
    image = support.compiled("probe")
    fd = support.sealed(image)
    one = guest.start(
        runtime.Engine().load(f"/proc/self/fd/{fd}"),
        limits=Limits(requests_per_instance=requests_per_instance),
        grants=Grants(interfaces=("wasi:http/outgoing-handler",)),
        config={},
        log=lambda line: None,
    )
    took = []
    end = time.perf_counter_ns() + int(seconds * 1e9)
    before = time.perf_counter_ns()
    while before < end:
        status, _, body = one.handle(b"GET", b"/", b"host: x\r\n", b"")
        assert (status, body) == (200, SMALL), (status, body)
        after = time.perf_counter_ns()
        took.append((after - before) / 1000)
        before = after
    took.sort()
    print(len(took), took[len(took) // 2], took[len(took) * 99 // 100], file=sys.stderr)


def main():
    kind, *rest = sys.argv[1:]
    if kind == "engine":
        engine(int(rest[0]), float(rest[1]))
        return
    if rest[0].isdigit():
        listener = socket.create_server(("127.0.0.1", int(rest[0])), backlog=1024)
    else:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(rest[0])
        listener.listen(1024)
    serve(listener, second_process() if kind == "two" else answer)


if __name__ == "__main__":
    main()

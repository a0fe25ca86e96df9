"""Requests a second over kept connections, and the rows that benches print."""

import select
import socket
import time


def row(what, value):
    print(f"\n  {what:<66} {value}", flush=True)


def rate(port, path, seconds=3.0, connections=4):
    """Requests a second over kept-alive connections, from one client thread, and the latencies in milliseconds."""
    request = f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode()
    poll = select.epoll()
    socks = {}
    for _ in range(connections):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        socks[sock.fileno()] = sock
        poll.register(sock, select.EPOLLIN)
    sent, took = {}, []
    for fd, sock in socks.items():
        sent[fd] = time.perf_counter()
        sock.send(request)
    end = time.perf_counter() + seconds
    while (now := time.perf_counter()) < end:
        for fd, _ in poll.poll():
            data = socks[fd].recv(65536)
            assert data.startswith(b"HTTP/1.1 200"), data
            now = time.perf_counter()
            took.append((now - sent[fd]) * 1000)
            sent[fd] = now
            socks[fd].send(request)
    for sock in socks.values():
        sock.close()
    return len(took) / seconds, sorted(took)

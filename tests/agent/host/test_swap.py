"""A swap loses nothing: not a request of a kept-alive client, not one of a new client, not a POST, on either way in."""

import socket
import threading

import pytest
import support

from agent.host import ipc

SWAPS = 12
SLOW = bytes(n * 7 % 251 for n in range(1 << 20))  # more than the kernel holds of an answer


class Traffic:
    """Clients that never retry, until told to stop; `lost` holds what went wrong, in words."""

    def __init__(self, port, path, *, kept=3, new=1, slow=0):
        """`slow`: so many clients who keep their connections, and as many who do not; the guest must echo for them."""
        self.port, self.path = port, path
        self.answers = 0
        self.opened = 0
        self.lost = []
        self.slow_answers = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._kept, args=(n,)) for n in range(kept)]
        self._threads += [threading.Thread(target=self._new) for _ in range(new)]
        self._threads += [threading.Thread(target=self._slow, kwargs={"kept": bool(n % 2)}) for n in range(2 * slow)]
        for thread in self._threads:
            thread.start()

    def _request(self, n):
        body = b"x" * (n * 37 % 5000)
        head = f"{'POST' if n % 2 else 'GET'} {self.path} HTTP/1.1\r\nhost: x\r\n"
        return (head + f"content-length: {len(body)}\r\n\r\n").encode() + body if n % 2 else (head + "\r\n").encode()

    def _exchange(self, n, sock):
        request = self._request(n)
        if n % 5 == 0 and len(request) > 20:  # in two pieces: the swap may fall into the middle of a message
            sock.sendall(request[:20])
            self._stop.wait(0.002)
            sock.sendall(request[20:])
        else:
            sock.sendall(request)
        status, headers, _ = support.read_answer(sock)
        if status != 200:
            self.lost.append(f"status {status}")
        self.answers += 1
        return headers.get("connection") == "close"

    def _kept(self, n):
        sock = None
        while not self._stop.is_set():
            try:
                if sock is None:
                    sock = socket.create_connection(("127.0.0.1", self.port), timeout=30)
                    self.opened += 1
                if self._exchange(n, sock):
                    sock.close()
                    sock = None
            except OSError as error:
                self.lost.append(f"kept-alive: {error!r}")
                sock = None
            n += 1
        if sock is not None:
            sock.close()

    def _new(self):
        n = 0
        while not self._stop.is_set():
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=30) as sock:
                    self._exchange(n, sock)
            except OSError as error:
                self.lost.append(f"new: {error!r}")
            n += 1

    def _slow(self, *, kept):
        """Sends a request over several swaps, and reads over several more an answer that fits into no buffer."""
        sock = None
        try:
            while not self._stop.is_set():
                if sock is None:
                    sock = socket.socket()
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                    sock.settimeout(60)
                    sock.connect(("127.0.0.1", self.port))
                self._dawdle(sock)
                self.slow_answers += 1
                if not kept:
                    sock.close()
                    sock = None
        except (OSError, AssertionError) as error:
            self.lost.append(f"slow, {'kept-alive' if kept else 'new'}: {error!r}")
        finally:
            if sock is not None:
                sock.close()

    def _dawdle(self, sock):
        head = f"POST {self.path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(SLOW)}\r\n\r\n".encode()
        for piece in (head[:20], head[20:], SLOW[:9], SLOW[9:5000], SLOW[5000:]):
            sock.sendall(piece)
            self._stop.wait(0.01)
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._some(sock, 100)
        got, _, body = data.partition(b"\r\n\r\n")
        assert got.startswith(b"HTTP/1.1 200 "), got
        while len(body) < len(SLOW):
            body += self._some(sock, 1 << 16)
            self._stop.wait(0.002)
        assert body == SLOW, "what came back is what was sent"

    def _some(self, sock, most):
        data = sock.recv(most)
        if not data:
            raise ConnectionError("closed in an answer")
        return data

    def stop(self):
        self._stop.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize("way", ["own port", "router"])
def test_swaps_lose_no_request_and_keep_connections_open(host, way):
    port = support.free_port() if way == "own port" else None
    assert isinstance(host.start("hello", support.a_run("web", 1, port=port)), ipc.Started)
    traffic = Traffic(port or host.port, "/" if port else "/web/")
    try:
        for generation in range(2, 2 + SWAPS):
            before = traffic.answers
            reply = host.start("hello", support.a_run("web", generation, port=port))
            assert reply == ipc.Started(
                id=reply.id, instance="web", generation=generation, replaced=generation - 1, swap_ms=reply.swap_ms
            )
            while traffic.answers < before + 40 and not traffic.lost:
                threading.Event().wait(0.005)
            if generation % 3 == 0:
                host.ask(ipc.Commit, instance="web", generation=generation)
    finally:
        traffic.stop()
    assert traffic.lost == []
    assert traffic.answers > SWAPS * 40
    # The three kept-alive clients were handed from generation to generation: nobody had to connect again.
    assert traffic.opened == 3


def test_undo_brings_the_warm_generation_back_without_an_image(host):
    port = support.free_port()
    host.start("hello", support.a_run("web", 1, port=port))
    host.start("error-500", support.a_run("web", 2, port=port))
    with socket.create_connection(("127.0.0.1", port), timeout=30) as kept:
        assert support.http(port, sock=kept)[0] == 500
        reply = host.ask(ipc.Revert, instance="web", generation=2)
        assert (reply.generation, type(reply)) == (1, ipc.Started)
        # The same connection is answered by the generation before.
        assert support.http(port, sock=kept)[0] == 200
    # Asking again changes nothing, and after a commit there is no way back.
    assert host.ask(ipc.Revert, instance="web", generation=2).generation == 1
    host.start("hello", support.a_run("web", 3, port=port))
    host.ask(ipc.Commit, instance="web", generation=3)
    assert host.ask(ipc.Revert, instance="web", generation=3).code == "host-gone"


def test_a_new_generation_that_is_unwell_never_sees_traffic(host):
    port = support.free_port()
    host.start("hello", support.a_run("web", 1, port=port))
    reply = host.start("unhealthy", support.a_run("web", 2, port=port, health=support.Health(check=True)))
    assert (type(reply), reply.code) == (ipc.Failed, "health-failed")
    assert support.http(port)[0] == 200
    assert host.health("web").generation == 1


def test_the_same_start_twice_is_answered_at_once(host):
    port = support.free_port()
    host.start("hello", support.a_run("web", 1, port=port))
    lanes = host.health("web").since
    assert host.start("hello", support.a_run("web", 1, port=port)).generation == 1
    assert host.health("web").since == lanes


def test_a_port_in_use_fails_the_start_and_names_the_port(host):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        reply = host.start("hello", support.a_run("web", 1, port=taken.getsockname()[1]))
    assert (type(reply), reply.code) == (ipc.Failed, "port-in-use")
    assert str(reply.message).count("port")


def test_stop_answers_what_was_asked_and_then_refuses(host):
    port = support.free_port()
    host.start("hello", support.a_run("web", 1, port=port))
    with socket.create_connection(("127.0.0.1", port), timeout=30) as kept:
        support.http(port, sock=kept)
        assert isinstance(host.ask(ipc.Stop, instance="web"), ipc.Done)
        assert kept.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=30)
    assert isinstance(host.ask(ipc.Stop, instance="web"), ipc.Done)


def test_a_request_in_pieces_and_an_unread_answer_outlive_three_swaps(host):
    """Slow clients: one has sent half a request, one has not read its answer. Neither notices."""
    port = support.free_port()
    large = support.Limits(response_bytes=16 << 20)
    host.start("large-answer", support.a_run("web", 1, port=port, limits=large))
    slow = socket.create_connection(("127.0.0.1", port), timeout=30)
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
    slow.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    half = socket.create_connection(("127.0.0.1", port), timeout=30)
    half.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n12345")
    for generation in range(2, 5):
        reply = host.start("hello", support.a_run("web", generation, port=port))
        assert isinstance(reply, ipc.Started)
        host.ask(ipc.Commit, instance="web", generation=generation)
    half.sendall(b"67890")
    assert support.read_answer(half)[2] == b"hello\n"
    status, _, body = support.read_answer(slow)
    assert (status, len(body) > 1 << 20) == (200, True)
    # Once it has read the old answer, its next request goes to the newest generation.
    assert support.http(port, sock=slow)[2] == b"hello\n"


def test_a_swap_to_another_port_and_back(host):
    first, second = support.free_port(), support.free_port()
    host.start("hello", support.a_run("web", 1, port=first))
    host.start("hello", support.a_run("web", 2, port=second))
    assert support.http(second)[0] == 200
    with pytest.raises(ConnectionRefusedError):
        support.http(first)
    assert host.ask(ipc.Revert, instance="web", generation=2).generation == 1
    assert support.http(first)[0] == 200
    with pytest.raises(ConnectionRefusedError):
        support.http(second)

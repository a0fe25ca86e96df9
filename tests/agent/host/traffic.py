"""Clients that send requests without pause while a test swaps instances."""

import array
import socket
import statistics
import threading
import time

import support

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
        self.times_s = array.array("d")  # begin and end of each exchange but the slow ones, one after the other
        self._stop, self._news = threading.Event(), threading.Condition()
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
        began_s = time.monotonic()
        if n % 5 == 0 and len(request) > 20:  # in two pieces: the swap may fall into the middle of a message
            sock.sendall(request[:20])
            self._stop.wait(0.002)
            sock.sendall(request[20:])
        else:
            sock.sendall(request)
        status, headers, _ = support.read_answer(sock)
        if status != 200:
            self._lose(f"status {status}")
        with self._news:
            self.answers += 1
            self.times_s.extend((began_s, time.monotonic()))
            self._news.notify_all()
        return headers.get("connection") == "close"

    def _lose(self, why):
        with self._news:
            self.lost.append(why)
            self._news.notify_all()

    def await_answers(self, most):
        """Wait until there are so many answers, or something is lost."""
        with self._news:
            assert self._news.wait_for(lambda: self.answers >= most or self.lost, 60), "the clients stand still"

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
                self._lose(f"kept-alive: {error!r}")
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
                self._lose(f"new: {error!r}")
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
            self._lose(f"slow, {'kept-alive' if kept else 'new'}: {error!r}")
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
        if b"transfer-encoding: chunked" in got:
            body = support.read_chunks(sock, body, pause=lambda: self._stop.wait(0.002))
        while len(body) < len(SLOW):
            body += self._some(sock, 1 << 16)
            self._stop.wait(0.002)
        assert body == SLOW, "what came back is what was sent"

    def _some(self, sock, most):
        data = sock.recv(most)
        if not data:
            raise ConnectionError("closed in an answer")
        return data

    def p99_s(self, spans):
        """99 of 100 answers took no longer: those within none of these spans of time, and those within one."""
        apart, within, spans = [], [], sorted(spans)
        for began_s, ended_s in sorted(zip(self.times_s[::2], self.times_s[1::2], strict=True)):
            while spans and spans[0][1] < began_s:
                del spans[0]
            (within if spans and spans[0][0] < ended_s else apart).append(ended_s - began_s)
        return [statistics.quantiles(each, n=100)[-1] if len(each) > 1 else 0.0 for each in (apart, within)]

    def stop(self):
        self._stop.set()
        for thread in self._threads:
            thread.join()

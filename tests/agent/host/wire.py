"""Raw HTTP client for tests: sends bytes that no client library would send."""

import contextlib
import socket

AT_MOST = 1 << 26


class Wire:
    """One connection to a port of the device."""

    def __init__(self, port, *, timeout_s=60):
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=timeout_s)
        self._data = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sock.close()

    def send(self, data):
        """Send; what the other side no longer takes is not this client's trouble: its answer is read anyway."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.sock.sendall(data)

    def _more(self):
        try:
            more = self.sock.recv(1 << 16)
        except ConnectionResetError:
            more = b""
        if not more:
            raise EOFError(self._data)
        self._data += more
        assert len(self._data) < AT_MOST

    def line(self):
        while b"\r\n" not in self._data:
            self._more()
        line, _, self._data = self._data.partition(b"\r\n")
        return line

    def exactly(self, size):
        while len(self._data) < size:
            self._more()
        data, self._data = self._data[:size], self._data[size:]
        return data

    def head(self):
        """(status, fields): the next answer's head, 1xx too. EOFError at the end of the connection."""
        status = int(self.line().split(b" ")[1])
        fields = {}
        while line := self.line():
            name, _, value = line.partition(b":")
            fields[name.decode("latin-1").lower()] = value.strip().decode("latin-1")
        return status, fields

    def chunk(self):
        """The next chunk of a body in chunks; empty at its end (then come the trailers)."""
        size = int(self.line(), 16)
        data = self.exactly(size)
        if size:
            assert self.line() == b""
        return data

    def trailers(self):
        return [line.decode("latin-1") for line in iter(self.line, b"")]

    def answer(self, *, method="GET"):
        """(status, fields, body) of the next answer that is not 1xx; trailers stand in fields[None]."""
        status, fields = self.head()
        while status < 200:
            status, fields = self.head()
        if method == "HEAD" or status in (204, 304):
            return status, fields, b""
        if fields.get("transfer-encoding") == "chunked":
            body = b"".join(iter(self.chunk, b""))
            fields[None] = self.trailers()
            return status, fields, body
        if "content-length" in fields:
            return status, fields, self.exactly(int(fields["content-length"]))
        return status, fields, self.rest()

    def rest(self):
        """All that comes until the end of the connection."""
        try:
            while True:
                self._more()
        except EOFError:
            data, self._data = self._data, b""
            return data

    def answers(self):
        """The status of every answer until the connection ends."""
        found = []
        try:
            while True:
                found.append(self.answer()[0])
        except EOFError:
            return found


def streamed(port, body):
    """(status, body) of the answer to POST /stream: the line `first`, then the request's body, whose last byte is held
    back until that line is there.
    """
    with Wire(port) as wire:
        wire.send(b"POST /stream HTTP/1.1\r\nhost: board\r\ncontent-length: %d\r\n\r\n" % len(body) + body[:-1])
        status, _ = wire.head()
        heard = b""
        while b"first\n" not in heard:
            piece = wire.chunk()
            assert piece, heard
            heard += piece
        wire.send(body[-1:])
        return status, heard + b"".join(iter(wire.chunk, b""))

"""What a server answered on one connection, in words that two servers can be compared by.

Left out: `date`, the order of fields of different names, sizes of chunks. Unless `exact`, the reason after a status
and how a body ends (its length, chunks, or the end of the connection); of an answer that the guest did not give
(without `x-guest`) all but its status.
"""

import hashlib
import re
import socket
from dataclasses import dataclass, field

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
EOF = object()
"""Step of a client: end its sending."""

LAST = b"GET /~/hx-last:1/r/. HTTP/1.1\r\nhost: board\r\nconnection: close\r\n\r\n"
FRAMING = {"content-length", "transfer-encoding", "keep-alive"}
WAIT_S = 60
SHOWN_BYTES = 400


class Until(bytes):
    """Step of a client: read until this has come; where it is withheld, until something else was answered meanwhile."""

    __slots__ = ()


@dataclass(frozen=True)
class Case:
    """Steps of a client on one connection, and the methods of the requests that should be answered."""

    steps: tuple
    methods: tuple = ("GET",)
    exact: bool = False
    fate: bool = True  # compare what becomes of the connection


@dataclass
class Answer:
    status: str
    fields: list
    body: bytes = b""
    framing: str = "no body"
    trailers: list = field(default_factory=list)

    @property
    def _number(self):
        """The status without its reason, but with a version that is not the usual one."""
        return re.match(r"(HTTP/1.0 )?\d*", self.status)[0]

    def words(self, *, exact, fate=True):
        from_guest = any(name == "x-guest" for name, _ in self.fields)
        if not exact and not from_guest and not self.status.startswith("1"):
            return f"{self._number} by the host"
        left_out = {"date", "x-guest"} | (set() if exact else FRAMING)
        left_out |= set() if fate else {"connection"}
        fields = sorted(each for each in self.fields if each[0] not in left_out)
        cut = self.framing.startswith("cut")
        parts = [self.status if exact else self._number, *(f"{name}: {value}" for name, value in fields)]
        if exact or cut:
            parts.append(self.framing)
        if self.body and not cut:  # how much had gone out by then is chance
            long = len(self.body) > SHOWN_BYTES
            digest = hashlib.sha256(self.body).hexdigest()[:12]
            parts.append(f"{len(self.body)} bytes {digest}" if long else ascii(self.body.decode("latin-1")))
        parts += [f"trailer {name}: {value}" for name, value in self.trailers]
        return "; ".join(parts)


class Connection:
    """A client's connection, and what has come on it so far."""

    def __init__(self, port):
        self._port = port
        self._sock = socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)
        self._data = b""
        self._open = True
        self._sends = True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._sock.close()

    def nothing_came(self):
        """Whether it is still waiting after another client was answered."""
        with Connection(self._port) as other:
            assert other.fate() == "kept"
        self._sock.setblocking(False)
        try:
            self._data += self._sock.recv(1 << 20)
        except BlockingIOError:
            pass
        finally:
            self._sock.settimeout(WAIT_S)
        self._data = self._data.removeprefix(CONTINUE)
        return not self._data

    def do(self, step):
        try:
            if step is EOF:
                self._sends = False
                self._sock.shutdown(socket.SHUT_WR)
            elif isinstance(step, Until):
                self._read_until(lambda: step in self._data)
                assert step in self._data, f"{bytes(step)!r} did not come, but {self._data[-SHOWN_BYTES:]!r}"
            else:
                self._sock.sendall(step)
        except OSError:
            self._sends = False  # it has answered and hung up

    def _more(self):
        if not self._open:
            return False
        try:
            data = self._sock.recv(1 << 20)
        except TimeoutError:
            raise AssertionError(f"nothing came any more after {self._data[-SHOWN_BYTES:]!r}") from None
        except ConnectionError:
            data = b""
        self._data += data
        self._open = bool(data)
        return self._open

    def _read_until(self, enough):
        """Read until it is enough, or the connection's end."""
        while not enough():
            if not self._more():
                return

    def _take(self, size):
        self._read_until(lambda: len(self._data) >= size)
        taken, self._data = self._data[:size], self._data[size:]
        return taken

    def _line(self):
        self._read_until(lambda: b"\r\n" in self._data)
        line, end, self._data = self._data.partition(b"\r\n")
        return line + end

    def _lines(self):
        """Field lines until the empty one; None if they have no end."""
        lines = []
        while (line := self._line()) != b"\r\n":
            if not line.endswith(b"\r\n"):
                return None
            name, _, value = line[:-2].decode("latin-1").partition(":")
            lines.append((name.lower(), value.strip()))
        return lines

    def answers(self, method):
        """The answer to a request, and informational ones before; None in its place at the connection's end."""
        found = []
        while not found or found[-1].status.startswith("1"):
            version, _, status = self._line().decode("latin-1").strip().partition(" ")
            if not version:
                found.append(None)
                return found
            assert version in {"HTTP/1.1", "HTTP/1.0"}, version
            fields = self._lines()
            assert fields is not None, "a head without an end"
            found.append(Answer((f"{version} " if version != "HTTP/1.1" else "") + status, fields))
        self._body(found[-1], method)
        return found

    def _body(self, answer, method):
        fields = dict(answer.fields)
        if method == "HEAD" or answer.status[:3] in {"204", "304"}:
            return
        if "transfer-encoding" in fields:
            answer.framing = "in chunks"
            while (line := self._line()).endswith(b"\r\n") and (size := int(line.partition(b";")[0], 16)):
                piece = self._take(size + 2)
                answer.body += piece[:size]
                if len(piece) < size + 2:
                    break
            else:
                trailers = self._lines() if line else None
                if trailers is not None:
                    answer.trailers = trailers
                    return
            answer.framing = "cut off in chunks"
        elif "content-length" in fields:
            size = int(fields["content-length"])
            answer.body = self._take(size)
            short = len(answer.body) < size
            answer.framing = f"cut off before its {size} bytes" if short else "by its length"
        else:
            self._read_until(lambda: False)
            answer.body, self._data = self._data, b""
            answer.framing = "until the end"

    def fate(self):
        """What the server does with the connection, asked by one more request."""
        if not self._sends:
            self._read_until(lambda: False)
        else:
            self.do(LAST)
            self._sends = False
            if not self._data and not self._more():
                return "closed"
            last = self.answers("GET")[-1]
            if last is None or ("x-last", "1") not in last.fields:
                return f"then {last.words(exact=True) if last else 'nothing'}"
            return "kept"
        return f"then {self._data[:SHOWN_BYTES]!r}" if self._data else "closed"


def observe(port, case, *, withheld=False):
    """What is answered, a line each, and what becomes of the connection.

    `withheld`: here nothing is answered before the request has come whole, which is seen without waiting for it.
    """
    said = []
    with Connection(port) as connection:
        for step in case.steps:
            if withheld and isinstance(step, Until):
                said.append("nothing before the request is whole" if connection.nothing_came() else "too early")
            else:
                connection.do(step)
        for method in case.methods:
            for answer in connection.answers(method):
                if answer is None:
                    return [*said, "closed"]
                if not answer.status.startswith("100") or CONTINUE in case.steps:
                    said.append(answer.words(exact=case.exact, fate=case.fate))
        return [*said, connection.fate()] if case.fate else said

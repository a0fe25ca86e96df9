"""wasi:sockets over the egress: TCP clients, datagrams and names.

The worker's side, asked by the adapter inside the sandbox through its interface `sockets` (components/adapter/wit).
Streams and waiting are those of outgoing requests, under numbers above theirs. A TCP connection comes from the egress
as a connected socket, and is read and written here. A UDP socket stays there: one end of a pair carries its datagrams,
each peer has a pair of its own, and nobody can send to another through it.

Nothing here waits for the network. Each connection is a generator on the thread of outgoing requests. What a guest
writes and the peer does not take is kept up to `WINDOW_BYTES`, and goes out after the guest drops the socket for
`_LINGER_S` at most. A guest that waits for one socket for most of `limits.idle` gets the error `timeout`, before its
worker is ended for it.
"""

import errno
import ipaddress
import os
import select
import socket
import time
from collections import deque
from collections.abc import Generator
from typing import Final

from agent.host.engine.adapter_abi import SOCKET_DENIED
from agent.host.interfaces.outgoing_http import (
    HEAD,
    READ,
    WRITE,
    DroppedError,
    OutgoingHttp,
    Question,
    Steps,
    Wait,
)
from agent.host.interfaces.outgoing_request import WINDOW_BYTES
from agent.host.ipc import helper_api
from agent.host.ipc.helper_api import BROKEN, DATAGRAM, DATAGRAM_MAX_BYTES, RefusedError

AT_ONCE: Final = 16
"""Connections that an instance may have, each peer of its UDP sockets counted as one."""

_FIRST: Final = 1 << 27  # as FIRST_SOCKET in components/adapter/sockets.h, and SOCKET_ERROR, SOCKET_CLOSED
_ERROR: Final = 64
_CLOSED: Final = 128
_NUMBERS_MAX: Final = 64  # sockets and lookups of a guest, those included that have no connection
_PENDING: Final = 16  # datagrams to a peer whose socket is being made
_NAMES_KEPT: Final = 256
_LINGER_S: Final = 5.0
_MARGIN: Final = 0.8  # of limits.idle
_SECOND_NS: Final = 10**9
_BUFFER_MAX: Final = 1 << 20

# Cases of wasi:sockets/network.error-code
_UNKNOWN, _NOT_SUPPORTED, _INVALID_ARGUMENT, _TIMEOUT = 0, 2, 3, 5
_INVALID_STATE, _LIMIT, _UNREACHABLE, _REFUSED, _RESET, _ABORTED = 9, 10, 13, 14, 15, 16
_TOO_LARGE, _UNRESOLVABLE, _RESOLVER_LATE = 17, 18, 19
_ACCESS_DENIED: Final = 1
_PENDING_ANSWER: Final = "?"

_OF_EGRESS: Final = {
    helper_api.DENIED: _ACCESS_DENIED,
    helper_api.PROHIBITED: _ACCESS_DENIED,
    "connection-refused": _REFUSED,
    "connection-timeout": _TIMEOUT,
    "destination-unavailable": _UNREACHABLE,
    "connection-limit-reached": _LIMIT,
    "DNS-timeout": _RESOLVER_LATE,
    "DNS-error": _UNRESOLVABLE,
    "HTTP-request-URI-invalid": _INVALID_ARGUMENT,
}
_OF_KERNEL: Final = {
    errno.ECONNREFUSED: _REFUSED,
    errno.ECONNRESET: _RESET,
    errno.EPIPE: _RESET,
    errno.ECONNABORTED: _ABORTED,
    errno.ETIMEDOUT: _TIMEOUT,
    errno.EMSGSIZE: _TOO_LARGE,
    **dict.fromkeys((errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN), _UNREACHABLE),
}


class _Held:
    """Socket or lookup that a guest holds by a number.

    Attributes:
        error: the case of error-code that ended it; -1 while none has.
        wants: parts that the guest waits for.
        until_s: when it has waited for too long.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.error = -1
        self.dropped = False
        self.wants: set[int] = set()
        self.until_s = 0.0

    def has(self, part: int) -> bool:
        raise NotImplementedError

    def is_wanted(self) -> bool:
        return bool(self.wants) and any(map(self.has, self.wants))


class _Tcp(_Held):
    def __init__(self, number: int, address: str, port: int) -> None:
        super().__init__(number)
        self.address, self.port = address, port
        self.sock: socket.socket | None = None
        self.out = bytearray()
        self.reads = self.writes = True
        self.ended = False  # the sending side, at the kernel's

    def has(self, part: int) -> bool:
        if self.error >= 0:
            return True
        if part == HEAD or self.sock is None:
            return self.sock is not None
        return not self.reads or _readable(self.sock) if part == READ else len(self.out) < WINDOW_BYTES

    def flush(self) -> None:
        """Send what is to be sent, and then the end of it."""
        assert self.sock is not None
        try:
            while self.out:
                del self.out[: self.sock.send(memoryview(self.out)[:WINDOW_BYTES].tobytes())]
            if not self.writes and not self.ended:
                self.ended = True
                self.sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        except OSError as error:
            self.out.clear()
            self.error = _code_of(error)


class _Flow:
    """The datagrams of a UDP socket that go to one peer and come from it."""

    def __init__(self, number: int, address: str, port: int) -> None:
        self.number = number
        self.address, self.port = address, port
        self.sock: socket.socket | None = None
        self.local = ("", 0)
        self.pending: deque[bytes] = deque()

    @property
    def has_room(self) -> bool:
        return len(self.pending) < _PENDING if self.sock is None else _ready(self.sock, select.POLLOUT)


class _Udp(_Held):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.flows: dict[tuple[str, int], _Flow] = {}
        self.errors: deque[int] = deque(maxlen=_PENDING)

    def has(self, part: int) -> bool:
        if part == WRITE:
            return all(each.has_room for each in self.flows.values())
        return bool(self.errors) or any(each.sock is not None and _readable(each.sock) for each in self.flows.values())


class _Lookup(_Held):
    def __init__(self, number: int, name: str) -> None:
        super().__init__(number)
        self.name = name
        self.addresses: tuple[str, ...] = ()

    def has(self, _part: int) -> bool:
        return self.error >= 0 or bool(self.addresses)


class Network(OutgoingHttp):
    """The requests and sockets of one instance's calls."""

    def _prepare(self) -> None:
        self._held: dict[int, _Held] = {}
        self._connections = 0  # made, or being made
        self._last = _FIRST
        self._names: dict[str, str] = {}  # names by the addresses that were found for them
        self._named: set[str] = set()  # denials that the log has

    # -- calls of the adapter

    def ask(self, question: str) -> str:
        """See `Requests.ask`."""
        verb, _, rest = question.partition(" ")
        line, _, data = rest.partition("\n")
        words = line.split(" ")
        with self._lock:
            try:
                return self._answer(verb, words, data)
            except RefusedError as error:
                return self._refuse(error)
            except (ValueError, IndexError, OverflowError):  # of a guest that has put itself in the adapter's place
                return f"!{_INVALID_ARGUMENT}"
            finally:
                self._flush_notes()

    def _answer(self, verb: str, words: list[str], data: str) -> str:
        begin = {"tcp": self._connect_tcp, "udp": self._open_udp}.get(verb)
        if begin is not None:
            return begin(*_place(words))
        if verb == "name":
            return self._look_up(" ".join(words))
        if verb == "denied":
            raise RefusedError(helper_api.DENIED, f"{words[0][:64]} is denied: components serve no sockets")
        match self._held.get(int(words[0])):
            case _Tcp() as held:
                said = self._answer_tcp(held, verb, words[1:])
            case _Udp() as held:
                said = self._answer_udp(held, verb, words[1:], data)
            case _Lookup() as held:
                said = self._found(held) if verb == "addresses" else None
            case _:
                said = None
        return f"!{_INVALID_STATE}" if said is None else said

    def _answer_tcp(self, held: _Tcp, verb: str, words: list[str]) -> str | None:
        if verb == "connected":
            return f"!{held.error}" if held.error >= 0 else _PENDING_ANSWER if held.sock is None else "+"
        if held.sock is None:
            return None
        match verb:
            case "local":
                return "+" + _said(*held.sock.getsockname()[:2])
            case "options":
                _set_options(held.sock, list(map(int, words)))
                return "+"
            case "shutdown":
                return self._shut(held, int(words[0]))
        return None

    def _answer_udp(self, held: _Udp, verb: str, words: list[str], data: str) -> str | None:
        match verb:
            case "local":
                known = [each.local for each in held.flows.values() if each.local[1]]
                return "+" + (_said(*known[0]) if known else "00000000 0")
            case "send":
                return self._send_datagram(held, *_place(words), data.encode("latin-1"))
            case "receive":
                return self._receive(held)
        return None

    def _refuse(self, error: RefusedError) -> str:
        code = _OF_EGRESS.get(error.error, _UNKNOWN)
        if code == _ACCESS_DENIED:
            self._count(True)
            self._name_once(str(error))
            return SOCKET_DENIED
        return f"!{code}"

    def _name_once(self, said: str) -> None:
        if said not in self._named and len(self._named) < _NAMES_KEPT:
            self._named.add(said)
            self._log(f"host: {said}; further ones are counted alone")

    def room(self, number: int) -> int:
        """See `Requests.room`; of a UDP socket, datagrams."""
        if number <= _FIRST:
            return super().room(number)
        with self._lock:
            match self._held.get(number):
                case _Tcp() as held if held.error < 0:
                    return WINDOW_BYTES - len(held.out)
                case _Udp() as held:
                    return _PENDING if held.has(WRITE) else 0
            return WINDOW_BYTES  # whose writing says what is wrong

    def write(self, number: int, data: str) -> int:
        """See `Requests.write`."""
        if number <= _FIRST:
            return super().write(number, data)
        with self._lock:
            held = self._held.get(number)
            if not isinstance(held, _Tcp) or held.sock is None or not held.writes:
                return _CLOSED
            if held.error < 0:
                try:
                    piece = data.encode("latin-1")
                except UnicodeEncodeError:
                    return _CLOSED
                if len(held.out) + len(piece) > 2 * WINDOW_BYTES:  # the adapter asks for room first
                    return _CLOSED
                held.out += piece
                held.flush()
                if held.out:
                    self._loop.poke(number)
            return 0 if held.error < 0 else 1 + _ERROR + held.error

    def read(self, number: int, most: int) -> str:
        """See `Requests.read`."""
        if number <= _FIRST:
            return super().read(number, most)
        with self._lock:
            held = self._held.get(number)
            if not isinstance(held, _Tcp) or held.sock is None or not held.reads:
                return "."
            return self._read(held, held.sock, most) if most else "+"

    @staticmethod
    def _read(held: _Tcp, sock: socket.socket, most: int) -> str:
        try:
            piece = sock.recv(min(most, WINDOW_BYTES))
        except BlockingIOError:
            return f"!{_ERROR + held.error}" if held.error >= 0 else "+"
        except OSError as error:
            held.error = _code_of(error)
            return f"!{_ERROR + held.error}"
        if not piece:
            held.reads = False
            return "."
        return "+" + piece.decode("latin-1")

    def close(self, number: int) -> None:
        """See `Requests.close`."""
        if number <= _FIRST:
            super().close(number)
            return
        with self._lock:
            self._let_fall(number)
            self._flush_notes()

    def renew(self) -> None:
        """See `Requests.renew`."""
        with self._lock:
            self._armed = ()
            for number in list(self._held):
                self._let_fall(number)
            self._names.clear()
            self._flush_notes()

    def end(self) -> None:
        """See `OutgoingHttp.end`."""
        self.renew()
        super().end()

    def _let_fall(self, number: int) -> None:
        held = self._held.pop(number, None)
        if held is None:
            return
        held.dropped = True
        held.wants.clear()
        held.until_s = time.monotonic() + _LINGER_S
        self._poke(held)

    def _poke(self, held: _Held) -> None:
        for number in [each.number for each in held.flows.values()] if isinstance(held, _Udp) else [held.number]:
            self._loop.poke(number)

    def poll(self, wanted: str, wait: int) -> str:
        """See `OutgoingHttp.poll`."""
        with self._lock:
            for held in self._held.values():
                held.wants.clear()  # of an earlier wait
            return super().poll(wanted, wait)

    def _is_there(self, wanted: int) -> bool:
        if wanted >> 2 <= _FIRST:
            return super()._is_there(wanted)
        held = self._held.get(wanted >> 2)
        return held is None or held.has(wanted & 3)

    def _wait(self, numbers: tuple[int, ...], wait: int) -> None:
        until_s = time.monotonic() + self._limits.idle_ms / 1000 * _MARGIN
        for each in numbers:
            held = self._held.get(each >> 2)
            if held is not None:
                held.wants.add(each & 3)
                held.until_s = until_s
                self._poke(held)
        super()._wait(numbers, wait)

    # -- sockets

    def _next_number(self) -> int:
        if len(self._held) >= _NUMBERS_MAX:
            raise RefusedError("connection-limit-reached", "too many sockets")
        self._last = _FIRST + (self._last - _FIRST) % (_FIRST - 1) + 1
        return self._last

    def _connection(self) -> None:
        """Count a further connection. Raises `RefusedError`."""
        if self._connections >= AT_ONCE:
            self._name_once(f"a socket is refused: {AT_ONCE} are open, as many as an instance may have at once")
            raise RefusedError("connection-limit-reached", "too many connections")
        self._connections += 1

    def _connect_tcp(self, address: str, port: int) -> str:
        helper_api.check_socket(self._grants, "tcp", address, port, self._names.get(address, ""))
        number = self._next_number()
        self._connection()
        held = self._held[number] = _Tcp(number, address, port)
        self._loop.run(number, self._run_tcp(held))
        return f"+{number}"

    def _run_tcp(self, held: _Tcp) -> Steps:
        where = f"tcp://{_bracketed(held.address)}:{held.port}"
        try:
            _, held.sock = yield from self._connected(held, "tcp", held.address, held.port, held.number)
            held.sock.setblocking(False)
            self._note_count(denied=False)
            self._changed()
            while not (held.dropped and (held.error >= 0 or not held.out)):
                events = (select.POLLIN if READ in held.wants else 0) | (select.POLLOUT if held.out else 0)
                timed = bool(held.wants) or held.dropped
                yield Wait(held.sock.fileno() if events else -1, events, held.until_s if timed else None)
                held.flush()
                late = timed and time.monotonic() >= held.until_s
                if held.dropped and late:
                    break
                self._tell(held, late=late)
        except DroppedError:
            pass
        except RefusedError as error:
            self._note_refused(held, error, where)
        except Exception as error:  # noqa: BLE001 - whatever it is: the guest must not wait in vain
            self._note_refused(held, RefusedError("internal-error", f"{type(error).__name__}: {error}"), where)
        finally:
            self._connections -= 1
            if held.sock is not None:
                held.sock.close()
            self._changed()

    def _tell(self, held: _Held, *, late: bool) -> None:
        """Wake a guest if what it waits for is there, or will not come in time."""
        if held.wants and (late or held.is_wanted()):
            if not held.is_wanted():
                self._expire(held)
            held.wants.clear()
            self._changed()

    @staticmethod
    def _expire(held: _Held) -> None:
        if isinstance(held, _Udp):
            held.errors.append(_TIMEOUT)
        else:
            held.error = _TIMEOUT

    def _note_refused(self, held: _Held, error: RefusedError, where: str) -> None:
        held.error = _OF_EGRESS.get(error.error, _UNKNOWN)
        if held.error == _ACCESS_DENIED:
            self._note_count(denied=True)
            self._notes.append(lambda: self._name_once(str(error)))
        else:
            self._note_count(denied=False)
            self._notes.append(lambda: self._log(f"host: {where}: {error}"))

    def _connected(
        self, held: _Held, scheme: str, address: str, port: int, number: int
    ) -> Generator[Wait, None, tuple[helper_api.ConnectReply, socket.socket]]:
        """Return a socket from the egress, with what came along."""
        timeout_s = min(helper_api.CONNECT_MAX_S, self._limits.idle_ms / 1000 * _MARGIN)
        name, authority = self._names.get(address, ""), f"{_bracketed(address)}:{port}"
        try:
            question = self._loop.ask(number, scheme, authority, timeout_s, name=name)
        except OSError as error:
            raise RefusedError("internal-error", f"no egress: {error}") from error
        reply, fd = yield from self._heard(held, question, timeout_s)
        if fd < 0:
            raise RefusedError("internal-error", "the egress sent no socket")
        return reply, socket.socket(fileno=fd)

    def _heard(
        self, held: _Held, question: Question, timeout_s: float
    ) -> Generator[Wait, None, tuple[helper_api.ConnectReply, int]]:
        until_s = time.monotonic() + timeout_s * (1 + (1 - _MARGIN) / 2)
        try:
            while question.reply is None:
                if question.failure:
                    raise RefusedError("internal-error", question.failure)
                if held.dropped:
                    raise DroppedError
                if time.monotonic() >= until_s:
                    raise RefusedError("connection-timeout", f"no connection in {timeout_s:g} s")
                yield Wait(until_s=until_s)
            reply, fd = question.reply, question.fd
            question.fd = -1
        finally:
            self._loop.forget(question)
            if question.fd >= 0:
                os.close(question.fd)
        if reply.error:
            raise RefusedError(reply.error, reply.why)
        return reply, fd

    def _shut(self, held: _Tcp, which: int) -> str:
        assert held.sock is not None
        if which in {0, 2}:
            held.reads = False
        if which in {1, 2}:
            held.writes = False
            held.flush()
            self._loop.poke(held.number)
        return "+"

    # -- datagrams

    def _open_udp(self, address: str, port: int) -> str:
        number = self._next_number()
        held = _Udp(number)
        if port:
            self._flow(held, address, port)
        self._held[number] = held
        return f"+{number}"

    def _flow(self, held: _Udp, address: str, port: int) -> _Flow:
        """Return the way to a peer. Raises `RefusedError`."""
        flow = held.flows.get((address, port))
        if flow is None:
            helper_api.check_socket(self._grants, "udp", address, port, self._names.get(address, ""))
            number = self._next_number()
            self._connection()
            flow = held.flows[address, port] = _Flow(number, address, port)
            self._loop.run(number, self._run_flow(held, flow))
        return flow

    def _run_flow(self, held: _Udp, flow: _Flow) -> Steps:
        where = f"udp://{_bracketed(flow.address)}:{flow.port}"
        try:
            reply, sock = yield from self._connected(held, "udp", flow.address, flow.port, flow.number)
            sock.setblocking(False)
            flow.sock, flow.local = sock, reply.local
            self._note_count(denied=False)
            while flow.pending:
                _put(sock, flow.pending.popleft())
            self._changed()
            while not held.dropped and flow.sock is not None:
                events = select.POLLIN if READ in held.wants else 0
                if WRITE in held.wants and not flow.has_room:  # else it is another peer that has none
                    events |= select.POLLOUT
                until_s = held.until_s if held.wants else None
                yield Wait(sock.fileno() if events else -1, events, until_s)
                self._tell(held, late=until_s is not None and time.monotonic() >= until_s)
        except DroppedError:
            pass
        except RefusedError as error:
            self._note_refused(held, error, where)
            held.errors.append(held.error)
        except Exception as error:  # noqa: BLE001 - whatever it is: the guest must not wait in vain
            self._note_refused(held, RefusedError("internal-error", f"{type(error).__name__}: {error}"), where)
            held.errors.append(held.error)
        finally:
            self._connections -= 1
            held.flows.pop((flow.address, flow.port), None)
            if flow.sock is not None:
                flow.sock.close()
            self._changed()

    def _send_datagram(self, held: _Udp, address: str, port: int, data: bytes) -> str:
        if len(data) > DATAGRAM_MAX_BYTES:
            return f"!{_TOO_LARGE}"
        flow = self._flow(held, address, port)
        if not flow.has_room:
            return _PENDING_ANSWER
        if flow.sock is None:
            flow.pending.append(data)
        else:
            _put(flow.sock, data)
        return "+"

    def _receive(self, held: _Udp) -> str:
        for key, flow in list(held.flows.items()):
            if flow.sock is None:
                continue
            try:
                packet = flow.sock.recv(DATAGRAM_MAX_BYTES + 1)
            except BlockingIOError:
                continue
            except OSError:
                packet = b""
            # The next to be asked is another, so that no peer hides the others.
            held.flows[key] = held.flows.pop(key)
            if packet.startswith(DATAGRAM):
                return f"+{_said(*key)}\n{packet[1:].decode('latin-1')}"
            if packet.startswith(BROKEN):
                return f"!{_OF_KERNEL.get(int(packet[1:]), _UNKNOWN)}"
            del held.flows[key]  # the egress has ended: the next datagram to this peer finds another
            flow.sock.close()
            flow.sock = None
            self._loop.poke(flow.number)
            return f"!{_ABORTED}"
        return f"!{held.errors.popleft()}" if held.errors else _PENDING_ANSWER

    # -- names

    def _look_up(self, name: str) -> str:
        number = self._next_number()
        held = _Lookup(number, name)
        try:
            held.addresses = (str(ipaddress.ip_address(name)),)
        except ValueError:
            held.name = helper_api.check_lookup(self._grants, name)
            self._loop.run(number, self._run_lookup(held))
        self._held[number] = held
        return f"+{number}"

    def _run_lookup(self, held: _Lookup) -> Steps:
        timeout_s = min(helper_api.CONNECT_MAX_S, self._limits.idle_ms / 1000 * _MARGIN)
        try:
            question = self._loop.look_up(held.number, held.name, timeout_s)
            reply, _ = yield from self._heard(held, question, timeout_s)
            held.addresses = reply.addresses
        except DroppedError:
            pass
        except RefusedError as error:
            self._note_refused(held, error, held.name)
        except Exception as error:  # noqa: BLE001 - whatever it is: the guest must not wait in vain
            self._note_refused(held, RefusedError("internal-error", f"{type(error).__name__}: {error}"), held.name)
        self._changed()

    def _found(self, held: _Lookup) -> str:
        if held.error >= 0:
            return f"!{_RESOLVER_LATE if held.error == _TIMEOUT else held.error}"
        if not held.addresses:
            return _PENDING_ANSWER
        for each in held.addresses:
            self._names.pop(each, None)
            if each != held.name:  # an address that was looked up has no name
                self._names[each] = held.name
        while len(self._names) > _NAMES_KEPT:
            del self._names[next(iter(self._names))]
        return "+" + " ".join(ipaddress.ip_address(each).packed.hex() for each in held.addresses)


def _place(words: list[str]) -> tuple[str, int]:
    """Read an address and a port. Raises `ValueError`, `IndexError`."""
    address = ipaddress.ip_address(bytes.fromhex(words[0]))
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        raise ValueError("an IPv4 address goes over an IPv4 socket")
    port = int(words[1])
    if not 0 <= port < 1 << 16:
        raise ValueError("no port")
    return str(address), port


def _said(address: str, port: int) -> str:
    return f"{ipaddress.ip_address(address.partition('%')[0]).packed.hex()} {port}"


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _set_options(sock: socket.socket, values: list[int]) -> None:
    """Set what a guest asked for, as far as the device has it."""
    keep_alive, idle_ns, interval_ns, count, hops, receive, send = values
    hop_limit = (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS)
    if sock.family == socket.AF_INET:
        hop_limit = (socket.IPPROTO_IP, socket.IP_TTL)
    for level, option, value, least, most in (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, keep_alive, 0, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle_ns // _SECOND_NS, 1, 32767),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval_ns // _SECOND_NS, 1, 32767),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, count, 1, 127),
        (*hop_limit, hops, 1, 255),
        (socket.SOL_SOCKET, socket.SO_RCVBUF, receive, 2048, _BUFFER_MAX),
        (socket.SOL_SOCKET, socket.SO_SNDBUF, send, 2048, _BUFFER_MAX),
    ):
        sock.setsockopt(level, option, min(max(value, least), most))


def _put(sock: socket.socket, data: bytes) -> None:
    """Pass a datagram on; one for which there is no room is lost, as any may be."""
    try:
        sock.send(DATAGRAM + data)
    except OSError:
        return


def _ready(sock: socket.socket, events: int) -> bool:
    poll = select.poll()
    poll.register(sock, events)
    return bool(poll.poll(0))


def _readable(sock: socket.socket) -> bool:
    return _ready(sock, select.POLLIN)


def _code_of(error: OSError) -> int:
    return _OF_KERNEL.get(error.errno or 0, _UNKNOWN)

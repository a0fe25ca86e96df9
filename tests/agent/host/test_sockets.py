"""Sockets of components: TCP, datagrams and names, by a guest in a real worker under a real host."""

import os
import signal
import socket
import threading

import pytest
import support
from host_processes import ended, forks
from support import Limits

from agent.host.interfaces.sockets import AT_ONCE
from agent.host.ipc import host_api
from fleet.protocol.manifest import Grants, Schedule
from tests.eventually import eventually

ACCESS_DENIED, NOT_SUPPORTED, INVALID_ARGUMENT, TIMEOUT, INVALID_STATE = "e1", "e2", "e3", "e5", "e9"
REFUSED, TOO_LARGE, UNRESOLVABLE = "e14", "e17", "e18"
OK = "ok"
PATIENT = {"call_ms": 20_000}  # a busy machine gives a call its time late, and counts that as its own
LETTERS = bytes(b"abcdefghijklmnopqrstuvwxyz"[i % 26] for i in range(4096))


def echo(_peer, connection):
    """Send back what comes, and the end behind it."""
    while piece := connection.recv(65536):
        connection.sendall(piece)
    connection.close()


def hears(_peer, connection):
    """Say nothing until the guest goes."""
    for _ in iter(lambda: connection.recv(65536), b""):
        continue


class Datagrams:
    """A UDP socket on loopback that answers each datagram with `reply(data)`."""

    def __init__(self, reply, address="127.0.0.1"):
        self._socket = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((address, 0))
        self.port = self._socket.getsockname()[1]
        self._reply = reply
        self.heard = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        while True:
            data, client = self._socket.recvfrom(65536)
            if data == b"end of the test":
                return
            self.heard.append(data)
            for each in self._reply(data):
                self._socket.sendto(each, client)

    def close(self):
        with socket.socket(self._socket.family, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"end of the test", self._socket.getsockname())
        self._thread.join(30)
        self._socket.close()


@pytest.fixture
def datagrams():
    """Start a UDP server: `datagrams(reply)`."""
    made = []

    def make(reply=lambda data: [data], **where):
        made.append(Datagrams(reply, **where))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def dial(host):
    """Have the guest do steps, with these grants; the lines of its answer."""

    def do(*steps, outbound, **limits):
        grants = Grants(outbound=tuple(outbound))
        reply = host.start("dial", support.a_run("dial", 1, grants=grants, limits=Limits(**PATIENT | limits)))
        assert isinstance(reply, host_api.Started), reply
        return again(*steps)

    def again(*steps):
        body = "\n".join(steps).encode()
        head = f"POST /dial/ HTTP/1.1\r\nhost: board\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        status, _, said = support.http(host.port, head + body)
        assert status == 200, (said, host.lines_of("dial"))
        return said.decode("latin-1").split("\n")[:-1]

    do.again = again
    return do


def to(there, address="127.0.0.1"):
    return f"{address} {there.port}"


def tcp(there, address="127.0.0.1"):
    return f"tcp://{address}:{there.port}"


@pytest.fixture
def closed_port():
    """A port that is bound, so that nobody else gets it, and on which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


@pytest.mark.parametrize("per_instance", [0, 100])
def test_a_client_writes_and_reads_and_ends(dial, peer, per_instance):
    there = peer(echo)
    steps = ["t 0 4", f"c 0 {to(there)}", "w 0 hello", "r 0 100", "s 0 1", "r 0 100", "w 0 more", "d 0"]
    said = dial(*steps, outbound=[tcp(there)], requests_per_instance=per_instance)
    assert said == [OK, OK, OK, "hello", OK, "closed", "closed", OK]


def test_an_ipv6_address(dial):
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        port = server.getsockname()[1]
        one = "0" * 31 + "1"
        thread = threading.Thread(target=lambda: echo(None, server.accept()[0]), daemon=True)
        thread.start()
        steps = ["t 0 6", f"c 0 {one} {port}", "w 0 hello", "r 0 100", "a 0", "s 0 1", "r 0 1"]
        *said, ends, shut, end = dial(*steps, outbound=[f"tcp://[::1]:{port}"])
        thread.join(30)
    assert said == [OK, OK, OK, "hello"]
    assert ends.split(" ")[::2] == [one, one]
    assert ends.split(" ")[3] == str(port)
    assert (shut, end) == (OK, "closed")


def test_a_task_without_wasi_http_has_sockets_too(host, peer):
    there = peer(echo)
    run = support.a_run(
        "dial",
        1,
        grants=Grants(outbound=(tcp(there),), interfaces=("wasi:config",)),
        trigger=Schedule(every_ms=1000),
        config={"steps": f"t 0 4\nc 0 {to(there)}\nw 0 hello\nr 0 100\np 0 10\ns 0 1\nr 0 1"},
    )
    assert isinstance(host.start("dial-task", run), host_api.Started)
    failed = eventually(lambda: [line for line in host.lines_of("dial") if "failed" in line], "the task tells")
    assert "hello" in failed[0]


def test_more_than_fits_in_any_buffer_goes_both_ways(dial, peer):
    there = peer(echo)
    size = 3_000_000

    def behave(_peer, connection):
        got = b""
        while len(got) < size and (piece := connection.recv(65536)):
            got += piece
        connection.sendall(got)

    there = peer(behave)
    said = dial("t 0 4", f"c 0 {to(there)}", f"W 0 {size}", f"R 0 {size}", outbound=[tcp(there)])
    whole = (LETTERS * (size // len(LETTERS) + 1))[:size]
    assert said[2] == str(size)
    count, total = said[3].split(" ")
    assert int(count) == size
    assert abs(int(total) - sum(whole)) < size * 26  # pieces begin where there is room, each with an a


def test_timers_fire_beside_a_socket_that_is_silent(dial, peer):
    there = peer(hears)
    assert dial("t 0 4", f"c 0 {to(there)}", "p 0 20", outbound=[tcp(there)]) == [OK, OK, "1"]


def test_the_one_of_two_sockets_that_has_something_wakes_the_guest(dial, peer):
    silent, there = peer(hears), peer(echo)
    steps = ["t 0 4", f"c 0 {to(silent)}", "t 1 4", f"c 1 {to(there)}", "w 1 hello", "q 0 1", "r 1 100"]
    assert dial(*steps, outbound=[tcp(silent), tcp(there)])[-2:] == ["1", "hello"]


def test_a_silent_peer_is_an_error_that_the_guest_hears_of(dial, peer):
    there = peer(hears)
    assert dial("t 0 4", f"c 0 {to(there)}", "r 0 1", outbound=[tcp(there)], idle_ms=1000) == [OK, OK, "failed"]


def _denied(host, count):
    lines = [line for line in host.lines_of("dial") if "is denied" in line]
    return lines if len(lines) >= count else []


def test_what_is_refused_and_what_is_denied(dial, host, peer, closed_port):
    there = peer(echo)
    steps = ["t 0 4", f"c 0 127.0.0.1 {closed_port}", f"c 0 {to(there)}", "t 1 4", f"c 1 {to(there)}", "t 2 4"]
    steps += [f"c 2 127.0.0.2 {closed_port}", "t 3 4", f"c 3 0.0.0.0 {closed_port}", "t 4 6", f"c 4 {to(there)}"]
    said = dial(*steps, outbound=[f"tcp://127.0.0.1:{closed_port}"])
    assert said == [OK, REFUSED, INVALID_STATE, OK, ACCESS_DENIED, OK, ACCESS_DENIED, OK, INVALID_ARGUMENT, OK, "e3"]
    assert there.connections == 0
    # the answer may come before the lines that the worker has written meanwhile
    lines = eventually(lambda: _denied(host, 2), "both denials are in the log")
    assert len(lines) == 2
    assert f"tcp://127.0.0.1:{there.port} is denied: grants.outbound does not name" in lines[0]
    assert host.health("dial").denials == 2


def test_a_grant_for_requests_is_none_for_sockets(dial, peer):
    there = peer(echo)
    said = dial("t 0 4", f"c 0 {to(there)}", outbound=[f"http://127.0.0.1:{there.port}", "tcp://127.0.0.9:1"])
    assert said == [OK, ACCESS_DENIED]


def test_nobody_serves(dial, host):
    steps = ["t 0 4", "b 0 127.0.0.1 0", "b 0 0.0.0.0 80", "b 0 0.0.0.0 0", "l 0"]
    said = dial(*steps, outbound=["tcp://127.0.0.9:1"])
    assert said == [OK, ACCESS_DENIED, ACCESS_DENIED, OK, ACCESS_DENIED]
    said_so = lambda: any("components serve no sockets" in line for line in host.lines_of("dial"))  # noqa: E731
    eventually(said_so, "the log says that nobody serves")


def test_addresses_and_options(dial, peer):
    there = peer(echo)
    steps = ["t 0 4", "a 0", f"c 0 {to(there)}", "a 0", "o 0", "w 0 on", "r 0 9"]
    _, before, _, ends, options, _, said = dial(*steps, outbound=[tcp(there)])
    assert before == f"{INVALID_STATE} {INVALID_STATE}"
    local, port, remote, other = ends.split(" ")
    assert (local, remote, other) == ("127.0.0.1", "127.0.0.1", str(there.port))
    assert int(port) > 0
    assert options == f"1 {INVALID_ARGUMENT} 9 10000"
    assert said == "on"


def test_a_network_and_its_ports(dial, peer, closed_port):
    there = peer(echo)
    steps = ["t 0 4", f"c 0 {to(there)}", "t 1 4", f"c 1 127.0.0.1 {closed_port}", "t 2 4", "c 2 127.0.0.1 0"]
    assert dial(*steps, outbound=["tcp://127.0.0.0/24:*"]) == [OK, OK, OK, REFUSED, OK, INVALID_ARGUMENT]


def test_datagrams_to_one_peer(dial, datagrams):
    there = datagrams()
    steps = ["u 0 4", f"U 0 {to(there)}", "S 0 - hello", "T 0 20000", f"S 0 {to(there)} again", "T 0 20000"]
    steps += ["S 0 127.0.0.1 9 other", "a 0"]
    *said, ends = dial(*steps, outbound=[f"udp://127.0.0.1:{there.port}"])
    where = to(there)
    assert said == [OK, OK, "1", f"{where} hello", "1", f"{where} again", INVALID_ARGUMENT]
    assert ends.split(" ")[2:] == ["127.0.0.1", str(there.port)]
    assert there.heard == [b"hello", b"again"]


def test_datagrams_to_several_peers(dial, host, datagrams):
    first, second, third = datagrams(), datagrams(), datagrams()
    steps = ["u 0 4", "U 0", f"S 0 {to(first)} one", "T 0 20000", f"S 0 {to(second)} two", "T 0 20000"]
    steps += [f"S 0 {to(third)} three", "S 0 - none"]
    said = dial(*steps, outbound=[f"udp://127.0.0.1:{each.port}" for each in (first, second)])
    assert said[2:6] == ["1", f"{to(first)} one", "1", f"{to(second)} two"]
    assert said[6:] == [ACCESS_DENIED, INVALID_ARGUMENT]
    assert not third.heard
    assert any(f"udp://127.0.0.1:{third.port} is denied" in line for line in host.lines_of("dial"))


def test_empty_and_large_datagrams(dial, datagrams):
    there = datagrams()
    sizes = [0, 1, 1500, 60000, 65508]
    steps = ["u 0 4", f"U 0 {to(there)}", *(step for size in sizes for step in (f"G 0 {size}", "T 0 20000"))]
    said = dial(*steps[:-1], outbound=[f"udp://127.0.0.1:{there.port}"])
    assert said[2::2] == ["1", "1", "1", "1", TOO_LARGE]
    assert [len(each) for each in there.heard] == sizes[:-1]
    assert [len(each) for each in said[3::2]] == [len(to(there)) + 1 + size for size in sizes[:-1]]


def test_a_datagram_that_never_comes_and_a_port_on_which_nobody_listens(dial, datagrams):
    there = datagrams(lambda _data: [])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        closed = sock.getsockname()[1]
    steps = ["u 0 4", f"U 0 {to(there)}", "S 0 - hello", "T 0 20", "u 1 4", f"U 1 127.0.0.1 {closed}", "S 1 - hello"]
    said = dial(*steps, "T 1 20000", outbound=["udp://127.0.0.0/8:*"])
    assert said[3] == "nothing"
    assert said[-1] == REFUSED


def test_a_name_and_what_it_leads_to(dial, host, peer):
    there = peer(echo)
    steps = ["n localhost", "t 0 4", f"C 0 {there.port}", "n 127.0.0.1", "n other.example"]
    found, *said = dial(*steps, outbound=[f"tcp://localhost:{there.port}"])
    assert "127.0.0.1" in found.split(" ")
    assert said[0] == OK
    assert said[2:] == ["127.0.0.1", ACCESS_DENIED]
    assert any("the name other.example is denied" in line for line in host.lines_of("dial"))
    assert dial.again("n 127.0.0.1", "t 0 4", "C 0 9") == ["127.0.0.1", OK, ACCESS_DENIED]
    denied = "tcp://127.0.0.1:9 is denied: grants.outbound does not name 127.0.0.1:9"
    assert any(denied in line for line in host.lines_of("dial"))


def test_without_a_grant_nothing_is_there(dial):
    assert dial("t 0 4", "u 1 4", "n localhost", outbound=[]) == [ACCESS_DENIED, ACCESS_DENIED, ACCESS_DENIED]


def test_connections_last_from_call_to_call_of_an_instance_and_no_longer(dial, host, peer):
    there = peer(echo)
    connect = ("t 0 4", f"c 0 {to(there)}", "w 0 hello", "r 0 100")
    dial(*connect, outbound=[tcp(there)], requests_per_instance=2)
    assert dial.again("w 0 again", "r 0 100") == [OK, "again"]
    assert dial.again(*connect)[1:] == [OK, OK, "hello"]  # the third call has another instance


def test_as_many_sockets_as_an_instance_may_have(dial, host, peer):
    there = peer(echo)
    steps = [step for n in range(AT_ONCE + 1) for step in (f"t {n} 4", f"c {n} {to(there)}")]
    said = dial(*steps, "d 3", f"c {AT_ONCE} {to(there)}", outbound=[tcp(there)])
    assert said[1 : 2 * AT_ONCE : 2] == [OK] * AT_ONCE
    assert said[2 * AT_ONCE + 1] == "e10"
    assert any("as many as an instance may have at once" in line for line in host.lines_of("dial"))


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        pytest.param(["m 1000"], ["64"], id="a storm of sockets"),
        pytest.param(["t 0 4", "c 0 {peer}", "w 0 ", "r 0 0", "W 0 0"], [OK, OK, OK, "", "0"], id="nothing"),
        pytest.param(
            ["t 0 4", "c 0 {peer}", "W 0 200000", "s 0 1", "d 0"], [OK, OK, "200000", OK, OK], id="never read"
        ),
        pytest.param(["k 200 {peer}"], ["200"], id="connections that are dropped at once"),
        pytest.param(["u 0 4", "U 0", *["S 0 127.0.0.1 9 x"] * 200], [OK, OK, *["e1"] * 200], id="denied datagrams"),
        pytest.param(["n " + "a" * 5000, "n a..b", "n ", "n \x01"], ["e3", "e3", "e3", "e3"], id="names that are none"),
    ],
)
def test_a_hostile_guest_harms_nobody(dial, host, peer, steps, expected):
    there = peer(echo)
    assert host.start("hello", support.a_run("neighbour", 1))
    said = dial(*(each.replace("{peer}", to(there)) for each in steps), outbound=[tcp(there)])
    assert said == expected
    assert support.http(host.port, "GET /neighbour/ HTTP/1.1\r\nhost: x\r\n\r\n")[0] == 200
    again = dial.again("t 0 4", f"c 0 {to(there)}", "w 0 hello", "r 0 100")
    assert again == [OK, OK, OK, "hello"], "its sockets are gone with it"
    assert host.health("dial").restarts == 0


def test_subscriptions_without_end_are_the_guests_own_end(dial, host, peer):
    there = peer(echo)
    dial("t 0 4", f"c 0 {to(there)}", outbound=[tcp(there)])
    body = f"t 0 4\nc 0 {to(there)}\nx 1000000".encode()
    head = f"POST /dial/ HTTP/1.1\r\nhost: board\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    assert support.http(host.port, head + body)[0] == 500
    assert set(host.health("dial").calls) == {"ok", "guest-trap"}
    assert dial.again("t 0 4", f"c 0 {to(there)}", "w 0 hello", "r 0 100") == [OK, OK, OK, "hello"]


def test_a_connection_outlasts_the_egress_and_datagrams_find_another(dial, host, peer, datagrams):
    there, where = peer(echo), datagrams()
    host.start("hello", support.a_run("neighbour", 1))
    assert support.http(host.port, "GET /neighbour/ HTTP/1.1\r\nhost: x\r\n\r\n")[0] == 200
    before = forks(host)  # the router among them
    steps = ["t 0 4", f"c 0 {to(there)}", "u 1 4", "U 1", f"S 1 {to(where)} one", "T 1 20000"]
    grants = [tcp(there), f"udp://127.0.0.1:{where.port}"]
    assert dial(*steps, outbound=grants, requests_per_instance=100)[-1] == f"{to(where)} one"
    (egress,) = forks(host) - before
    pidfd = os.pidfd_open(egress)
    os.kill(egress, signal.SIGKILL)
    assert ended([pidfd])
    os.close(pidfd)
    assert dial.again("w 0 still", "r 0 100") == [OK, "still"]
    for _ in range(20):  # a datagram on its way to the egress that ended is lost
        said = dial.again(f"S 1 {to(where)} two", "T 1 2000")
        if said == ["1", f"{to(where)} two"]:
            break
    else:
        raise AssertionError(said)

"""Outgoing requests of a guest: through the adapter, over connections from the egress, to good and bad peers.

The egress runs here in a thread, with its own code; its resolver is the one seam at which a test answers. Peers are
sockets on loopback, which a grant has to name.
"""

import asyncio
import errno
import itertools
import os
import socket
import ssl
import threading

import msgspec
import pytest
from peers import HANDLER, OK, Device, answers, certificate, encrypted, says

from agent.host import egress
from agent.host.engine import adapter_abi
from agent.host.engine.runtime import Engine
from agent.host.interfaces.outgoing_http import HOPS_MAX, OutgoingHttp
from agent.host.ipc import framing, helper_api
from agent.host.ipc.helper_api import ConnectRequest, RefusedError, check_grant, filter_addresses
from fleet.protocol.manifest import Grants, Limits
from tests import packed

PROBE = packed.guest("probe")


# What the egress decides, without a connection


@pytest.mark.parametrize(
    ("authority", "error"),
    [
        ("api.example.com", ""),
        ("other.example.com", helper_api.DENIED),
        ("api.example.com:81", helper_api.DENIED),
        ("127.0.0.1", helper_api.DENIED),
        ("[::1]", helper_api.DENIED),
        ("2130706433", "HTTP-request-URI-invalid"),
        ("0177.0.0.1", "HTTP-request-URI-invalid"),
        ("0x7f.1", "HTTP-request-URI-invalid"),
        ("user@api.example.com", "HTTP-request-URI-invalid"),
        ("meter.internal", ""),
        ("meter.internal:8080", helper_api.DENIED),
        ("other.internal", helper_api.DENIED),
    ],
)
def test_only_what_is_granted_is_a_place_to_go(authority, error):
    grants = Grants(outbound=("http://api.example.com:80",), instances=("meter",))
    if not error:
        assert check_grant(grants, "http", authority)[1] == 80
        return
    with pytest.raises(RefusedError) as caught:
        check_grant(grants, "http", authority)
    assert caught.value.error == error


@pytest.mark.parametrize(
    ("addresses", "kept"),
    [
        (["93.184.216.34"], ["93.184.216.34"]),
        (["127.0.0.1"], None),
        (["10.1.2.3", "93.184.216.34"], ["93.184.216.34"]),
        (["::ffff:127.0.0.1"], None),
        (["64:ff9b::7f00:1"], None),
        (["169.254.169.254"], None),
        (["fe80::1%eth0"], None),
        (["192.168.7.7"], ["192.168.7.7"]),
        (["::ffff:192.168.7.7"], ["::ffff:192.168.7.7"]),
    ],
)
def test_an_address_that_is_not_public_is_connected_to_only_when_it_is_named(addresses, kept):
    grants = Grants(outbound=("https://api.example.com:443", "https://192.168.7.0/24:443"))
    if kept is None:
        with pytest.raises(RefusedError) as caught:
            filter_addresses(grants, "https", "api.example.com", 443, addresses)
        assert caught.value.error == helper_api.PROHIBITED
        assert "api.example.com" in str(caught.value)
    else:
        assert filter_addresses(grants, "https", "api.example.com", 443, addresses) == kept


@pytest.fixture
def no_ipv6(monkeypatch):
    """A device without IPv6: it makes no such sockets."""
    make = socket.socket

    def made(family=-1, *args, **kwargs):
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "no such family")
        return make(family, *args, **kwargs)

    monkeypatch.setattr(socket, "socket", made)


async def connected(port, *addresses):
    """Connect as the egress does for a name with these addresses."""

    async def resolver(_host, _port):
        return list(addresses)

    grants = Grants(outbound=tuple(f"http://{host}:{port}" for host in ("api.example.com", "127.0.0.1", "[::1]")))
    request = ConnectRequest(id=1, scheme="http", authority=f"api.example.com:{port}", timeout_ms=10_000)
    return await egress.connect(grants, request, directory="", resolver=resolver)


@pytest.mark.asyncio
async def test_an_address_for_which_there_is_no_socket_counts_as_one_that_does_not_answer(no_ipv6):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with await connected(port, "::1", "127.0.0.1") as sock:
            assert sock.getpeername() == ("127.0.0.1", port)
        with pytest.raises(RefusedError, match="Address family not supported") as caught:
            await connected(port, "::1")
    assert caught.value.error == "destination-unavailable"


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    engine = Engine()
    file = tmp_path_factory.mktemp("image") / "probe.cwasm"
    file.write_bytes(engine.compile(PROBE))
    return engine.load(str(file))


@pytest.fixture
def addresses():
    """What names resolve to, one list for each time they are asked for; the last one stays."""
    return {}


@pytest.fixture
def device(image, tmp_path, addresses):
    async def resolver(host, _port):
        if host not in addresses:
            raise OSError("no such name")
        answers = addresses[host]
        return answers.pop(0) if len(answers) > 1 else answers[0]

    made = Device(image, tmp_path, resolver)
    yield made
    made.close()


def ask(guest, path, headers=b"host: b\r\n"):
    before = os.dup(1)
    adapter_abi.catch_stdout()
    try:
        status, _, body = guest.handle(b"GET", path.encode(), headers, b"")
    finally:
        os.dup2(before, 1)
        os.close(before)
    assert status == 200, body
    return body


def code(name):
    return b"error %d" % adapter_abi.ERRORS.index(name)


def test_a_granted_peer_is_asked_and_its_answer_arrives(device, peer):
    there = peer(answers(OK))
    guest = device.guest(f"http://127.0.0.1:{there.port}")
    assert ask(guest, f"/get?127.0.0.1:{there.port}/x?y=1") == b"200\ncontent-length=5\nx-peer=here\n\nhello"
    head = there.received.split(b"\r\n")
    assert head[0] == b"GET /x?y=1 HTTP/1.1"
    assert b"host: 127.0.0.1:%d" % there.port in head
    assert device.counted == [False]


def test_a_body_goes_out_whole_and_a_large_answer_comes_back(device, peer):
    body = bytes(range(256)) * 3000
    there = peer(answers(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)))
    guest = device.guest(f"http://127.0.0.1:{there.port}", limits=Limits(request_bytes=1 << 20))
    said = ask(guest, f"/post?127.0.0.1:{there.port}/in")
    assert said.endswith(b"\n\n" + body)
    sent = there.received.partition(b"\r\n\r\n")[2]
    assert len(sent) == 300_000
    assert sent[:4096] == bytes(range(256)) * 16


def test_a_body_larger_than_allowed_is_an_error_of_the_guests(device, peer):
    there = peer(answers(OK))
    guest = device.guest(f"http://127.0.0.1:{there.port}", limits=Limits(request_bytes=100_000))
    assert ask(guest, f"/post?127.0.0.1:{there.port}/in") == code("HTTP-request-body-size")
    assert not there.received


def test_chunks_are_put_together(device, peer):
    there = peer(answers(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"))
    guest = device.guest(f"http://127.0.0.1:{there.port}")
    assert ask(guest, f"/get?127.0.0.1:{there.port}/").endswith(b"\n\nabcde")


def test_a_connection_is_used_again_and_a_closed_one_is_not(device, peer):
    there = peer(answers(OK, OK, OK.replace(b"x-peer", b"connection: close\r\nx-peer")))
    guest = device.guest(f"http://127.0.0.1:{there.port}")
    for _ in range(3):
        ask(guest, f"/get?127.0.0.1:{there.port}/")
    assert there.connections == 1
    ask(guest, f"/get?127.0.0.1:{there.port}/")
    assert there.connections == 2


def test_two_requests_are_under_way_at_once(device, peer):
    both = threading.Barrier(2, timeout=30)

    def behave(peer, connection):
        peer.request(connection)
        both.wait()  # neither is answered before the other has arrived
        connection.sendall(OK)

    there = peer(behave)
    guest = device.guest(f"http://127.0.0.1:{there.port}")
    assert ask(guest, f"/both?127.0.0.1:{there.port}/") == b"1 200 200"


def test_a_connection_that_the_worker_has_no_descriptor_for_is_an_error_of_that_request_alone(
    device, peer, monkeypatch
):
    there, send, kept = peer(answers(OK, OK)), framing.send_packet, []

    def send_both_at_once(sock, data, fds=()):
        """Send the first reply just before the second, so that its end finds both requests waiting."""
        if b"outbound" in data:
            send(sock, data, fds)
        elif not kept:
            kept.append((data, os.dup(fds[0])))
        else:
            first, fd = kept[0]
            # More than a packet has room for: the receiver learns the same as where its own limit cuts them off.
            send(sock, first, (fd,) * (framing.FDS_MAX + 1))
            os.close(fd)
            send(sock, data, fds)

    monkeypatch.setattr(framing, "send_packet", send_both_at_once)
    guest = device.guest(f"http://127.0.0.1:{there.port}")
    broken = adapter_abi.ERRORS.index("internal-error")
    assert ask(guest, f"/both?127.0.0.1:{there.port}/") in {b"1 %d 200" % broken, b"1 200 %d" % broken}
    assert any("no more files may be open in the worker" in line for line in device.lines)


def test_an_ungranted_host_is_denied_counted_and_named(device, peer):
    there = peer(answers(OK))
    guest = device.guest("http://127.0.0.1:1")
    assert ask(guest, f"/get?127.0.0.1:{there.port}/") == code("HTTP-request-denied")
    assert device.counted == [True]
    assert f"grants.outbound does not name 127.0.0.1:{there.port}" in device.lines[-1]
    assert there.connections == 0


@pytest.mark.parametrize("form", ["2130706433", "0x7f000001", "017700000001", "127.1", "0177.0.0.1"])
def test_an_address_in_disguise_is_no_host(device, peer, form):
    there = peer(answers(OK))
    guest = device.guest("http://*:*", f"http://127.0.0.1:{there.port}")
    assert ask(guest, f"/get?{form}:{there.port}/") == code("HTTP-request-URI-invalid")
    assert not device.resolved
    assert there.connections == 0


def test_a_name_that_leads_to_loopback_is_prohibited_unless_that_is_named_too(device, peer, addresses):
    there = peer(answers(OK))
    addresses["rebound.example"] = [["127.0.0.1"]]
    guest = device.guest(f"http://rebound.example:{there.port}")
    assert ask(guest, f"/get?rebound.example:{there.port}/") == code("destination-IP-prohibited")
    assert "a loopback address" in device.lines[-1]
    assert there.connections == 0
    named = device.guest(f"http://rebound.example:{there.port}", f"http://127.0.0.0/8:{there.port}")
    assert ask(named, f"/get?rebound.example:{there.port}/").startswith(b"200")


def test_the_address_that_was_judged_is_the_one_connected_to(device, peer, addresses):
    """A resolver that answers something else each time: the name is asked for once, and not again to connect."""
    there = peer(answers(OK))
    addresses["rebound.example"] = [["127.0.0.2"], ["127.0.0.1"]]
    guest = device.guest(f"http://rebound.example:{there.port}", f"http://127.0.0.2:{there.port}")
    assert ask(guest, f"/get?rebound.example:{there.port}/") in {
        code("connection-refused"),
        code("destination-unavailable"),
    }
    assert device.resolved == ["rebound.example"]
    assert there.connections == 0


def test_a_redirect_is_the_guests_to_follow_and_is_judged_like_any_request(device, peer):
    inner = peer(answers(OK))
    moved = b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:%d/\r\ncontent-length: 0\r\n\r\n" % inner.port
    outer = peer(answers(moved))
    guest = device.guest(f"http://127.0.0.1:{outer.port}")
    assert ask(guest, f"/get?127.0.0.1:{outer.port}/").startswith(b"302\nlocation=")
    assert inner.connections == 0
    assert ask(guest, f"/get?127.0.0.1:{inner.port}/") == code("HTTP-request-denied")


SMALL = Limits(response_bytes=100_000, requests_per_instance=100)
FAST = Limits(idle_ms=1500, requests_per_instance=100)


@pytest.mark.parametrize(
    ("behave", "error"),
    [
        (says(b""), "connection-terminated"),
        (says(b"", then="keep"), "connection-read-timeout"),
        (says(b"nonsense\r\n\r\n"), "HTTP-protocol-error"),
        (says(b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000 + b"\r\n\r\n"), "HTTP-response-header-section-size"),
        (says(b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 200 + b"\r\n"), "HTTP-response-header-section-size"),
    ],
)
def test_a_peer_without_a_good_head_is_an_error_with_its_name(device, peer, behave, error):
    there = peer(behave)
    guest = device.guest(f"http://127.0.0.1:{there.port}", limits=FAST)
    assert ask(guest, f"/get?127.0.0.1:{there.port}/") == code(error)


@pytest.mark.parametrize(
    ("behave", "error"),
    [
        (says(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf"), "HTTP-response-incomplete"),
        (says(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf", then="keep"), "connection-read-timeout"),
        (says(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n"), "HTTP-response-incomplete"),
    ],
)
def test_a_body_that_breaks_off_is_an_error_of_the_stream(device, peer, behave, error):
    there = peer(behave)
    guest = device.guest(f"http://127.0.0.1:{there.port}", limits=FAST)
    said = ask(guest, f"/get?127.0.0.1:{there.port}/")
    assert b"half\nbroken %d" % adapter_abi.ERRORS.index(error) in said


def drips(head, pieces):
    """Says the head, then the pieces for as long as somebody listens, one after the other: never silent for long."""

    def behave(peer, connection):
        peer.request(connection)
        connection.sendall(head)
        for piece in pieces:
            connection.sendall(piece)
            peer.paused.wait(0.05)

    return behave


def test_a_head_that_drips_in_has_one_time_for_all_of_it(device, peer):
    """Each byte comes soon after the other, so no wait for one of them is too long."""
    there = peer(drips(b"HTTP/1.1 200 OK\r\nx: ", itertools.repeat(b"y")))
    guest = device.guest(f"http://127.0.0.1:{there.port}", limits=FAST)
    assert ask(guest, f"/get?127.0.0.1:{there.port}/") == code("connection-read-timeout")


def test_a_body_that_drips_in_is_taken_as_it_comes(device, peer):
    """It lasts longer than a piece of it may: only the call as a whole has a limit then."""
    text = b"in thirty pieces, with pauses."
    there = peer(drips(b"HTTP/1.1 200 OK\r\ncontent-length: 30\r\n\r\n", [bytes([each]) for each in text]))
    guest = device.guest(f"http://127.0.0.1:{there.port}", limits=FAST)
    assert ask(guest, f"/get?127.0.0.1:{there.port}/").endswith(b"\n\n" + text)


@pytest.mark.parametrize("framing", [b"", b"transfer-encoding: chunked\r\n", b"content-length: 999999999999\r\n"])
def test_a_body_without_an_end_is_taken_up_to_the_limit(device, peer, framing):
    piece = b"x" * 8192
    pieces = itertools.repeat(b"2000\r\n%b\r\n" % piece if b"chunked" in framing else piece)

    def behave(peer, connection):
        peer.request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\n%b\r\n" % framing)
        for each in pieces:  # until nobody takes it any more
            connection.sendall(each)

    there = peer(behave)
    guest = device.guest(f"http://127.0.0.1:{there.port}", limits=SMALL)
    said = ask(guest, f"/get?127.0.0.1:{there.port}/")
    assert said.endswith(b"x\nbroken %d" % adapter_abi.ERRORS.index("HTTP-response-body-size"))
    assert said.count(b"x") <= SMALL.response_bytes
    assert "has more than 100000 bytes" in device.lines[-1]


def test_nobody_there_is_connection_refused(device):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    guest = device.guest(f"http://127.0.0.1:{port}")
    assert ask(guest, f"/get?127.0.0.1:{port}/") == code("connection-refused")


def test_a_neighbour_on_the_device_is_reached_by_name_alone_and_only_so_often(device, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "meter"))
        listener.listen()
        heard = []

        def serve():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                heard.append(connection.recv(65536))
                connection.sendall(OK)
                connection.close()

        threading.Thread(target=serve, daemon=True).start()
        guest = device.guest(instances=("meter",))
        assert ask(guest, "/get?meter.internal/now").startswith(b"200")
        assert b"x-wasmfleet-hops: 1\r\n" in heard[0]
        assert ask(guest, "/get?other.internal/") == code("HTTP-request-denied")
        tired = b"host: b\r\nx-wasmfleet-hops: %d\r\n" % HOPS_MAX
        assert ask(guest, "/get?meter.internal/now", tired) == code("loop-detected")
        assert len(heard) == 1
        listener.shutdown(socket.SHUT_RDWR)


# TLS


@pytest.mark.parametrize(
    ("served", "trusted", "said"),
    [
        ("peer.example", True, b"200"),
        ("peer.example", False, code("TLS-certificate-error")),
        ("other.example", True, code("TLS-certificate-error")),
    ],
)
def test_a_certificate_is_verified_with_its_name(device, peer, addresses, tmp_path, served, trusted, said):
    file, context = certificate(tmp_path, served)
    there = peer(encrypted(context))
    addresses["peer.example"] = [["127.0.0.1"]]
    ours = ssl.create_default_context(cafile=str(file)) if trusted else ssl.create_default_context()
    sock = device.lane(outbound=(f"https://peer.example:{there.port}", f"https://127.0.0.1:{there.port}"))
    granted = Grants(interfaces=HANDLER, outbound=(f"https://peer.example:{there.port}",))
    out = OutgoingHttp(sock, granted, Limits(), log=device.lines.append, context=ours)
    number = out.begin(0)
    wrong = out.send(number, f"GET / https peer.example:{there.port}   \r\n")
    answer = code(adapter_abi.ERRORS[wrong - 1]) if wrong else out.head(number).encode()
    assert answer.startswith(said)
    out.reset()
    sock.close()


# The identity of who asks


@pytest.mark.parametrize(
    "raw",
    [
        b'{"id": 1, "scheme": "http", "authority": "\xff", "timeout_ms": 1}',
        b'{"id": 9223372036854775808, "scheme": "http", "authority": "a", "timeout_ms": 1}',
        b'{"id": 1, "scheme": "http", "authority": "a", "timeout_ms": -1}',
        b"[" * 4000,
    ],
)
def test_a_worker_that_asks_what_is_no_question_is_not_heard_again(device, raw):
    lane = device.lane()
    lane.settimeout(30)
    lane.send(raw)
    with pytest.raises(framing.GoneError, match="closed"):
        framing.receive_packet(lane)
    lane.close()


def test_a_worker_is_who_its_socket_says_and_gets_connected_sockets_only(device, peer):
    there, mine = peer(answers(OK)), peer(answers(OK))
    lane = device.lane(outbound=(f"http://127.0.0.1:{mine.port}",))
    other = device.lane(outbound=(f"http://127.0.0.1:{there.port}",))
    lane.settimeout(30)

    def asked(raw):
        lane.send(raw)
        data, fds = framing.receive_packet(lane)
        return msgspec.json.decode(data), fds

    question = {
        "type": "connect",
        "id": 7,
        "scheme": "http",
        "authority": f"127.0.0.1:{there.port}",
        "timeout_ms": 1000,
    }
    told, fds = asked(msgspec.json.encode(question | {"instance": "other", "outbound": ["http://*:*"]}))
    assert (told["id"], told["error"], fds) == (7, "HTTP-request-denied", ())
    told, fds = asked(msgspec.json.encode(ConnectRequest(8, "http", f"127.0.0.1:{mine.port}", 1000)))
    with socket.socket(fileno=fds[0]) as got:
        assert got.getpeername() == ("127.0.0.1", mine.port)
    lane.send(b"not a question")
    with pytest.raises(framing.GoneError):
        framing.receive_packet(lane)
    other.close()
    lane.close()


@pytest.mark.asyncio
async def test_names_of_one_instance_that_nobody_answers_leave_the_threads_to_others():
    """A thread that resolves a name cannot be ended: it is taken until the resolver gives up."""
    asked, answered = [], asyncio.Event()

    async def resolver(host, _port):
        asked.append(host)
        await answered.wait()
        return ["93.184.216.34"]

    slow, other = egress.Names(resolver), egress.Names(resolver)
    for number in range(5):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await slow(f"slow-{number}.test", 80)
    assert asked == ["slow-0.test", "slow-1.test"], "whoever gave up is still being resolved"
    lookup = asyncio.ensure_future(other("other.test", 80))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert asked[2:] == ["other.test"]
    answered.set()
    assert await lookup == ["93.184.216.34"]
    assert await slow("slow-5.test", 80) == ["93.184.216.34"]

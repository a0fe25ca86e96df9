"""What a guest waits for: answers, bodies and timers, in a real worker under a real host."""

import threading

import pytest
import support
from peers import HANDLER, OK
from support import Limits

from agent.host.engine import adapter_abi
from agent.host.interfaces.outgoing_http import AT_ONCE
from agent.host.ipc import host_api
from fleet.protocol.manifest import Grants

WAIT_S = 30


@pytest.fixture
def web(host):
    """Ask the probe, which may send requests to a peer; the answer's body."""

    def ask(there, path, *, body=b"", **limits):
        grants = Grants(interfaces=HANDLER, outbound=(f"http://127.0.0.0/8:{there.port}",))
        reply = host.start("probe", support.a_run("web", 1, grants=grants, limits=Limits(**limits)))
        assert isinstance(reply, host_api.Started), reply
        head = f"POST /web/{path}?127.0.0.1:{there.port}/ HTTP/1.1\r\nhost: board\r\n"
        status, _, said = support.http(host.port, f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        assert status == 200, said
        return said

    return ask


def hears(peer, connection):
    """Read a request, and say nothing until the guest goes."""
    peer.request(connection)
    connection.recv(1)


@pytest.mark.parametrize("per_instance", [0, 100])
def test_a_guest_waits_for_an_answer_no_longer_than_for_its_timer(web, peer, per_instance):
    assert web(peer(hears), "race", requests_per_instance=per_instance) == b"timer"


def test_an_answer_that_comes_first_is_heard_first(web, peer):
    there = peer(lambda peer, connection: peer.request(connection) and connection.sendall(OK))
    assert web(there, "race") == b"answer"


@pytest.mark.parametrize("size", [4, 1_000_000])
def test_a_body_goes_on_after_the_answers_head_and_ends_with_trailers(web, peer, size):
    heard = bytearray()

    def behave(_peer, connection):
        while b"6\r\nfirst \r\n" not in heard and (piece := connection.recv(65536)):
            heard.extend(piece)
        connection.sendall(b"HTTP/1.1 202 Accepted\r\ntransfer-encoding: chunked\r\n\r\n")
        while not heard.endswith(b"\r\n0\r\nx-sum: 7\r\n\r\n") and (piece := connection.recv(65536)):
            heard.extend(piece)
        connection.sendall(b"5\r\nthere\r\n0\r\n\r\n")

    body = bytes(range(97, 101)) * (size // 4)
    assert web(peer(behave), "early", body=body, request_bytes=1_000_000) == b"202 there"
    head, _, chunks = bytes(heard).partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head
    assert b"content-length" not in head
    pieces = []
    while not chunks.startswith(b"0\r\n"):
        said, _, rest = chunks.partition(b"\r\n")
        pieces.append(rest[: int(said, 16)])
        chunks = rest[int(said, 16) + 2 :]
    assert b"".join(pieces) == b"first " + body


def test_as_many_requests_as_an_instance_may_have_are_under_way_at_once(web, host, peer):
    here = threading.Barrier(AT_ONCE, timeout=WAIT_S)

    def behave(peer, connection):
        peer.request(connection)
        here.wait()  # none is answered before all are here
        connection.sendall(OK)

    refused = f"e{adapter_abi.ERRORS.index('connection-limit-reached')}"
    assert web(peer(behave), "crowd").decode().split() == ["200"] * AT_ONCE + [refused] * (20 - AT_ONCE)
    assert any("as many as an instance may have at once" in line for line in host.lines_of("web"))

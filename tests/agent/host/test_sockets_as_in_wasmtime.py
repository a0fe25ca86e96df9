"""Sockets of one component, here by grant and under `wasmtime serve` with the whole network, compared answer by answer.

docs/component-toml.md has the accepted difference, with its reason.
"""

import http.client
import re
import socket

import pytest
import support
from serve import serving

from agent.host.ipc import host_api
from fleet.protocol.manifest import Grants, Limits
from tests import packed
from tests.rotation import rotated

OPTIONS = ("-Scli,tcp,udp,inherit-network,allow-ip-name-lookup",)


def echo(_peer, connection):
    while piece := connection.recv(65536):
        connection.sendall(piece)
    connection.close()


def ends(_peer, connection):
    connection.sendall(b"bye")
    connection.close()


def resets(_peer, connection):
    connection.recv(1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


TO = "c 0 127.0.0.1 {port}"
CASES = {
    "written and read": (echo, ("t 0 4", TO, "w 0 hello", "R 0 5", "d 0")),
    "written in pieces": (echo, ("t 0 4", TO, "w 0 one", "w 0 two", "R 0 6", "d 0")),
    "a lot of it": (echo, ("t 0 4", TO, "W 0 1000", "R 0 1000", "d 0")),
    "bytes": (echo, ("t 0 4", TO, "h 0 00ff10", "H 0 3", "d 0")),
    "this end says that it ends": (echo, ("t 0 4", TO, "w 0 hello", "s 0 1", "R 0 5", "r 0 10", "d 0")),
    "written behind that end": (echo, ("t 0 4", TO, "s 0 1", "w 0 more", "d 0")),
    "reading ended": (echo, ("t 0 4", TO, "s 0 0", "r 0 10", "d 0")),
    "both ended": (echo, ("t 0 4", TO, "s 0 2", "r 0 10", "w 0 x", "d 0")),
    "the other end ends": (ends, ("t 0 4", TO, "R 0 3", "r 0 10", "r 0 10", "d 0")),
    "the other end resets": (resets, ("t 0 4", TO, "w 0 x", "r 0 10", "d 0")),
    "a timer beside it": (echo, ("t 0 4", TO, "p 0 20", "w 0 x", "p 0 5000", "R 0 1", "d 0")),
    "of two, the one that has something": (
        echo,
        ("t 0 4", TO, "t 1 4", TO.replace("c 0", "c 1"), "w 1 x", "q 0 1", "R 1 1"),
    ),
    "before it is connected": (echo, ("t 0 4", "s 0 1", "a 0", "d 0")),
    "connected again": (echo, ("t 0 4", TO, TO, "d 0")),
    "of the other family": (echo, ("t 0 6", TO, "d 0")),
    "to nobody": (None, ("t 0 4", TO, "d 0")),
    "to port 0": (None, ("t 0 4", "c 0 127.0.0.1 0", "d 0")),
    "to no address": (None, ("t 0 4", "c 0 0.0.0.0 {port}", "d 0")),
    "many, one after another": (echo, ("k 0 127.0.0.1 {port}",)),
    "a name that is an address": (None, ("n 127.0.0.1",)),
    "no name": (None, ("n ",)),
    "a name with an empty label": (None, ("n a..b",)),
}

# invalid-argument, which WASI has for a name whose syntax is wrong; and name-unresolvable, after asking a resolver
DIFFERENCES = {"a name with an empty label": (["e3", ""], ["e18", ""])}


@pytest.fixture(scope="module")
def theirs():
    with serving(packed.guest_file("dial"), *OPTIONS) as port:
        yield port


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    with support.shared_host(tmp_path_factory.mktemp("compared")) as host:
        port = support.free_port()
        grants = Grants(outbound=("tcp://127.0.0.0/8:*", "tcp://0.0.0.0:*", "udp://127.0.0.0/8:*"))
        run = support.a_run("dial", 1, port=port, grants=grants, limits=Limits(call_ms=20_000))
        assert isinstance(host.start("dial", run), host_api.Started)
        yield port


@pytest.fixture
def nobody():
    """A port that is bound, so that nobody else gets it, and on which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


def said(port, steps, there):
    body = "\n".join(steps).format(port=there).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/", body, {"host": "board"})
        answer = connection.getresponse()
        text = answer.read().decode("latin-1")
    finally:
        connection.close()
    assert answer.status == 200, text
    return re.sub(r"\b\d{4,5}\b", "PORT", text).split("\n")


@pytest.mark.parametrize("case", rotated(CASES))
def test_sockets_do_the_same(ours, theirs, peer, nobody, case):
    behave, steps = CASES[case]
    there = nobody if behave is None else peer(behave).port
    here, under_wasmtime = said(ours, steps, there), said(theirs, steps, there)
    if case in DIFFERENCES:
        assert (here, under_wasmtime) == DIFFERENCES[case]
    else:
        assert here == under_wasmtime

"""The main paths of each confined process, where every import after confinement is refused.

`confined/sitecustomize.py` refuses them, in the workers, the router, the egress and the compiler of a real host.
Zygotes are not confined: they start workers, which have whatever a zygote imported.
"""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import support
from heard import Heard
from peers import HANDLER, OK, Peer, answers, certificate, encrypted

from agent.host.engine import adapter_abi
from agent.host.ipc import host_api
from fleet.protocol.manifest import Grants, Health, Limits, Schedule

CONFINED = Path(__file__).with_name("confined")
MARK = "import after confinement"
PATHS = os.pathsep.join([str(CONFINED), *filter(None, [os.environ.get("PYTHONPATH")])])
TLS = (support.GUESTS / "asks-tls.wat").read_text().partition("\n(")[2]


def asks(place):
    return "(" + TLS.replace("localhost:1 ", f"{place} ")


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """A private authority's file, and the context of a server that it vouches for as `localhost`."""
    return certificate(tmp_path_factory.mktemp("authority"), "localhost")


@pytest.fixture(scope="module")
def running(tmp_path_factory, authority):
    """A host whose processes import nothing more once they are confined, and what they say."""
    directory = tmp_path_factory.mktemp("confined")
    heard = Heard(directory)
    host = support.Host(directory, env={"PYTHONPATH": PATHS, "SSL_CERT_FILE": str(authority[0])})
    host.shared = True
    heard.start()
    yield host, heard
    host.close()
    said = heard.close()
    assert "confined: router" in said
    assert MARK not in said, said


@pytest.fixture
def heard(running):
    return running[1]


@pytest.fixture
def confined(running, request):
    """The host, without instances."""
    host, heard = running
    support.TESTS.append(request.node.nodeid)
    yield host
    for one in host.ask(host_api.Status).instances:
        host.ask(host_api.Stop, instance=one.instance)
    host.events.clear()
    assert MARK not in heard.said, heard.said


def ask(host, instance, path="/", method="GET", body=""):
    request = f"{method} /{instance}{path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n{body}"
    return support.http(host.port, request)


def started(host, guest, name, generation=1, **rest):
    reply = host.start(guest, support.a_run(name, generation, **rest))
    assert isinstance(reply, host_api.Started), reply


@contextlib.contextmanager
def served(behave):
    peer = Peer(behave)
    try:
        yield peer
    finally:
        peer.close()


def test_a_component_reaches_a_host_by_its_name_over_tls(confined, heard, authority):
    with served(encrypted(authority[1])) as peer:
        place = f"localhost:{peer.port}"
        grants = Grants(interfaces=HANDLER, outbound=(f"https://{place}", f"https://127.0.0.0/8:{peer.port}"))
        started(confined, asks(place), "asks", grants=grants)
        assert ask(confined, "asks")[0] == 200, confined.lines_of("asks")
        assert b"GET / HTTP/1.1" in peer.received
    assert heard.has("confined: egress")


def test_an_untrusted_certificate_is_reported_as_such(confined, tmp_path):
    (tmp_path / "other").mkdir()
    _, context = certificate(tmp_path / "other", "localhost")
    with served(encrypted(context)) as peer:
        place = f"localhost:{peer.port}"
        grants = Grants(interfaces=HANDLER, outbound=(f"https://{place}", f"https://127.0.0.0/8:{peer.port}"))
        started(confined, asks(place), "asks", grants=grants)
        assert b"TLS-certificate-error" in ask(confined, "asks")[2]


STRANGE = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nx-name: caf\xc3\xa9 \xff\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
MOVED = b"HTTP/1.1 302 Found\r\nlocation: /there\r\nset-cookie: a=b; expires=x\r\ncontent-length: 0\r\n\r\n"


@pytest.mark.parametrize(
    ("replies", "said"),
    [
        ((OK,), b"200\n"),
        ((STRANGE,), b"200\n"),
        ((MOVED,), b"302\n"),
        ((b"HTTP/1.1 100 Continue\r\n\r\n" + OK,), b"200\n"),
        ((b"nonsense\r\n\r\n",), b"error %d" % adapter_abi.ERRORS.index("HTTP-protocol-error")),
        ((b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf",), b"200\n"),
        ((b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 200 + b"\r\n",), b"error"),
    ],
)
def test_answers_of_every_kind(confined, replies, said):
    def behave(peer, connection):
        answers(*replies)(peer, connection)
        connection.close()

    with served(behave) as peer:
        place = f"localhost:{peer.port}"
        grants = Grants(interfaces=HANDLER, outbound=(f"http://{place}", f"http://127.0.0.0/8:{peer.port}"))
        limits = Limits(idle_ms=2000, requests_per_instance=5)
        started(confined, "probe", "asks", grants=grants, limits=limits)
        for path in (f"/get?{place}/", f"/post?{place}/", f"/get?{place}/"):
            assert ask(confined, "asks", path)[2].startswith(said)


def test_places_that_cannot_be_reached(confined):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    places = f"nobody.invalid:{port}", f"localhost:{port}", f"127.0.0.1:{port}"
    grants = Grants(
        interfaces=HANDLER, outbound=(*(f"http://{place}" for place in places), f"http://127.0.0.0/8:{port}")
    )
    started(confined, "probe", "asks", grants=grants)
    said = [ask(confined, "asks", f"/get?{place}/")[2].strip() for place in (*places, "elsewhere.example:80")]
    names = [adapter_abi.ERRORS[int(each.split()[1])] for each in said]
    assert names[1:] == ["connection-refused", "connection-refused", "HTTP-request-denied"]
    assert names[0] in {"DNS-error", "DNS-timeout"}


def test_guests_good_and_bad(confined, heard):
    limits = Limits(call_ms=100, idle_ms=300)
    for guest in ("hello", "trap", "spin", "bad-answer", "not-utf8", "large-answer", "recurse", "error-500"):
        started(confined, guest, guest, limits=limits)
        ask(confined, guest)
        ask(confined, guest, method="POST", body="x" * 5000)
    assert ask(confined, "hello")[0] == 200
    assert ask(confined, "nobody")[0] == 404
    with socket.create_connection(("127.0.0.1", confined.port), timeout=30) as client:
        client.sendall(b"BREW / HTTP/9.9\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 ")
    assert heard.has("confined: worker_spec")
    assert heard.has("confined: router")


@pytest.mark.parametrize("path", ["/describe", "/echo", "/fields", "/trailers", "/late", "/log", "/error", "/silent",
                                  "/cut", "/trap", "/large/3", "/half", "/status/418"])  # fmt: skip
def test_guests_of_wasi_http(confined, path):
    started(confined, "probe", "probe")
    with contextlib.suppress(ConnectionError):
        ask(
            confined,
            "probe",
            path,
            method="POST",
            body="caf\N{LATIN SMALL LETTER E WITH ACUTE}".encode().decode("latin-1"),
        )
    assert ask(confined, "probe")[0] == 200


def test_state_health_schedules_files_and_ends(confined, heard):
    started(confined, "remembers", "state", health=Health(check=True))
    ask(confined, "state")
    started(confined, "remembers", "state", generation=2, health=Health(check=True))
    assert ask(confined, "state")[2] == b"00000002\n"
    started(confined, "task", "task", trigger=Schedule(every_ms=50))
    started(
        confined, "writes", "files", grants=Grants(interfaces=("wasi:filesystem", "wasi:io", "wasi:clocks", "wasi:cli"))
    )
    ask(confined, "files")
    started(confined, "config", "config", config={"greeting": "x"}, grants=Grants(interfaces=("wasi:config",)))
    ask(confined, "config")
    for name in ("a", "b"):
        started(confined, "counter", name, share_worker=True)
        ask(confined, name)
    assert heard.has("confined: shared_worker_spec")
    for name in ("state", "task", "files", "a"):
        confined.ask(host_api.Stop, instance=name)


@pytest.mark.parametrize(
    ("artifact", "status"),
    [
        (support.wasm("probe"), 0),
        (support.wasm("v1"), 0),
        (b"no wasm", 2),
        (b"\0asm\1\0\0\0", 3),
        (b"\0asm\x0d\0\1\0 cut off", 3),
    ],
)
def test_the_compiler_imports_nothing_more_either(artifact, status):
    environment = {**os.environ, "PYTHONPATH": PATHS}
    command = [sys.executable, "-m", "agent.host.compiler"]
    done = subprocess.run(command, input=artifact, capture_output=True, env=environment, cwd=support.ROOT, check=False)
    said = done.stderr.decode()
    assert "confined: compiler" in said
    assert (MARK in said, done.returncode) == (False, status), said

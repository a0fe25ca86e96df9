"""Requests of components in real workers: names, TLS and responses of every kind, through a real egress.

The host runs under the system's own Python where there is one, with a name server, a trust store and a hosts file of
the tests' own, and reaches peers on loopback.
"""

import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import pytest
import resolver
import support
from authority import DAY, Authority
from heard import Heard
from host_processes import forks
from peers import HANDLER, OK, answers, encrypted, says

from agent.host.engine import adapter_abi
from agent.host.ipc import host_api
from fleet.protocol.manifest import Grants, Limits
from tests.agent.silent_address import silent
from tests.eventually import NeverError, eventually

pytestmark = pytest.mark.root  # a name server at port 53, and mounts

TLS = (support.GUESTS / "asks-tls.wat").read_text().partition("\n(")[2]
ANYWHERE = "{scheme}://127.0.0.0/8:{port}", "{scheme}://[::1]:{port}"


def system_python():
    """The interpreter that a packaged host runs under, and what it has to be told of this environment's libraries."""
    system = Path("/usr/bin/python3")
    code = f"import sys; raise SystemExit(sys.version_info[:2] != {sys.version_info[:2]})"
    if system.exists() and not subprocess.run([system, "-c", code], check=False).returncode:
        return str(system), {"PYTHONPATH": sysconfig.get_path("purelib")}
    return sys.executable, {}


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"), "authority")


@pytest.fixture(scope="module")
def names():
    try:
        server = resolver.NameServer()
    except OSError as error:
        pytest.skip(f"there can be no name server here: {error}")
    yield server
    server.close()


@contextlib.contextmanager
def started_host(directory, *, certificates=(), env=None):
    resolver.files(directory, hosts=["127.0.0.1 in-hosts.test"], certificates=certificates)
    python, more = system_python()
    paths = filter(None, (more.get("PYTHONPATH"), (env or {}).get("PYTHONPATH")))
    env = {**(env or {}), "PYTHONPATH": os.pathsep.join(paths)}
    with support.shared_host(directory, prefix=resolver.prefix(directory), python=python, env=env) as host:
        yield host


@pytest.fixture(scope="module")
def running(tmp_path_factory, authority, names):
    directory = tmp_path_factory.mktemp("outgoing")
    bundle = {"ca-certificates.crt": authority.file.read_bytes()}
    with started_host(directory, certificates=bundle) as host:
        yield host


@pytest.fixture
def outward(running, names, request):
    """The host without instances, and no names."""
    support.TESTS.append(request.node.nodeid)
    names.clear()
    yield running
    for one in running.ask(host_api.Status).instances:
        running.ask(host_api.Stop, instance=one.instance)
    running.events.clear()


def code(name):
    return b"error %d" % adapter_abi.ERRORS.index(name)


def grants(scheme, host, port):
    anywhere = [each.format(scheme=scheme, port=port) for each in ANYWHERE]
    return Grants(interfaces=HANDLER, outbound=(f"{scheme}://{host}:{port}", *anywhere))


def start(host, guest, scheme, name, port, *, limits=None):
    run = support.a_run("asks", 1, grants=grants(scheme, name, port), limits=limits or Limits(requests_per_instance=9))
    reply = host.start(guest, run)
    assert isinstance(reply, host_api.Started), reply


def call(host, path="/"):
    return support.http(host.port, f"GET /asks{path} HTTP/1.1\r\nhost: board\r\n\r\n")


def says_in_log(host, words):
    """Wait for these words in the instance's log; they come beside the answer, not before it."""
    said = []

    def found():
        said[:] = host.lines_of("asks")
        return any(words in line for line in said)

    try:
        eventually(found, f"{words!r} in the log", within_s=20)
    except NeverError as error:
        raise AssertionError(f"{error}: {said}") from None


def ask_tls(host, name, port, **more):
    """Ask for https://name:port/ once: the peer's status, or the name of the error."""
    start(host, "(" + TLS.replace("localhost:1 ", f"{name}:{port} "), "https", name, port, **more)
    status, _, body = call(host)
    return body.decode().strip().rpartition(" ")[2] if status == 500 else status


# TLS


def versions(context, only):
    context.minimum_version = context.maximum_version = only
    if only < ssl.TLSVersion.TLSv1_2:
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
    return context


def wants_certificate(context, authority, only):
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(authority.file)
    return versions(context, only)


def needs_name(context):
    """A server that has a certificate for those only who say whom they want."""

    def choose(_socket, name, _context):
        return None if name == "server.test" else ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME

    context.sni_callback = choose
    return context


def patient(context):
    """As `encrypted`, but reads on after a failure: a close with something unread could overtake its last word."""

    def behave(peer, connection):
        inside = context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        try:
            inside.do_handshake()
            peer.request(inside)
            inside.sendall(OK)
        except OSError:
            with socket.socket(fileno=inside.detach()) as raw:
                raw.shutdown(socket.SHUT_WR)
                raw.makefile("rb").read()

    return behave


TLS_CASES = {
    "1.2": (lambda a: versions(a.context("server.test"), ssl.TLSVersion.TLSv1_2), 200, ""),
    "1.3": (lambda a: versions(a.context("server.test"), ssl.TLSVersion.TLSv1_3), 200, ""),
    "name asked for": (lambda a: needs_name(a.context("server.test")), 200, ""),
    "intermediate": (lambda a: (m := a.below("middle")).context("server.test", chain=[m]), 200, ""),
    "intermediate missing": (
        lambda a: a.below("middle").context("server.test"),
        "TLS-certificate-error", "unable to get local issuer certificate",
    ),
    "expired": (
        lambda a: a.context("server.test", start=-2 * DAY, end=-DAY), "TLS-certificate-error", "has expired",
    ),
    "not yet valid": (
        lambda a: a.context("server.test", start=DAY, end=2 * DAY), "TLS-certificate-error", "is not yet valid",
    ),
    "wrong name": (lambda a: a.context("other.test"), "TLS-certificate-error", "not valid for 'server.test'"),
    "no name": (lambda a: a.context(), "TLS-certificate-error", "not valid for 'server.test'"),
    "unknown authority": (
        lambda a: a.another("unknown").context("server.test"),
        "TLS-certificate-error", "unable to get local issuer certificate",
    ),
    "signs itself": (
        lambda a: a.context("server.test", signs_itself=True), "TLS-certificate-error", "self-signed certificate",
    ),
    "1.1 only": (
        lambda a: versions(a.context("server.test"), ssl.TLSVersion.TLSv1_1), "TLS-alert-received", "protocol version",
    ),
    "wants a certificate, 1.2": (
        lambda a: wants_certificate(a.context("server.test"), a, ssl.TLSVersion.TLSv1_2),
        "TLS-alert-received", "alert handshake failure",
    ),
    "wants a certificate, 1.3": (
        lambda a: wants_certificate(a.context("server.test"), a, ssl.TLSVersion.TLSv1_3),
        "TLS-alert-received", "certificate required",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TLS_CASES)
def test_every_outcome_of_tls_has_its_error_code_and_its_reason_in_the_log(outward, names, peer, authority, case):
    make, expected, words = TLS_CASES[case]
    there = peer(patient(make(authority)))
    names.names["server.test"] = ["127.0.0.1"]
    assert ask_tls(outward, "server.test", there.port) == expected
    if words:
        says_in_log(outward, words)
    assert (b"GET / HTTP/1.1" in there.received) is (expected == 200)


def speaks_plain_http(peer, connection):
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")


def hangs_up(peer, connection):
    connection.recv(65536)
    connection.close()


def resets(peer, connection):
    connection.recv(1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


@pytest.mark.parametrize(
    ("behave", "expected"),
    [
        (speaks_plain_http, "TLS-protocol-error"),
        (hangs_up, "connection-terminated"),
        (resets, "connection-terminated"),
        (says(b"", then="keep"), "connection-timeout"),
    ],
)
def test_a_port_that_does_not_speak_tls_is_named(outward, names, peer, behave, expected):
    there = peer(behave)
    names.names["server.test"] = ["127.0.0.1"]
    assert ask_tls(outward, "server.test", there.port, limits=Limits(idle_ms=1500)) == expected


def test_an_address_is_verified_as_one_and_is_not_sent_as_a_name(outward, peer, authority):
    heard = []
    context = authority.context("127.0.0.1")
    context.sni_callback = lambda _socket, name, _context: heard.append(name)
    there = peer(encrypted(context))
    assert ask_tls(outward, "127.0.0.1", there.port) == 200
    assert heard == [None]


def test_a_server_that_serves_only_those_who_name_it_says_so_to_others(outward, peer, authority):
    there = peer(encrypted(needs_name(authority.context("127.0.0.1"))))
    assert ask_tls(outward, "127.0.0.1", there.port) == "TLS-alert-received"
    says_in_log(outward, "unrecognized name")


def test_a_name_of_the_hosts_file_is_reached_over_tls(outward, peer, authority):
    there = peer(encrypted(authority.context("in-hosts.test")))
    assert ask_tls(outward, "in-hosts.test", there.port) == 200


def cut_off(context):
    """Sends a part of a body that only the connection's end would end, and is cut off: TLS is not closed."""

    def behave(peer, connection):
        inside = context.wrap_socket(connection, server_side=True)
        peer.request(inside)
        inside.sendall(b"HTTP/1.1 200 OK\r\n\r\nhalf")
        with socket.socket(fileno=inside.detach()) as raw:
            raw.shutdown(socket.SHUT_RDWR)

    return behave


def test_a_body_that_is_cut_off_within_tls_has_not_ended(outward, names, peer, authority):
    there = peer(cut_off(authority.context("server.test")))
    names.names["server.test"] = ["127.0.0.1"]
    ask_tls(outward, "server.test", there.port)
    says_in_log(outward, "closed the connection within its response")


@pytest.mark.parametrize("store", ["directory alone", "SSL_CERT_FILE", "SSL_CERT_DIR", "nothing"])
def test_the_devices_trust_store_is_read_whatever_form_it_has(tmp_path, names, peer, authority, store, request):
    support.TESTS.append(request.node.nodeid)
    there = peer(encrypted(authority.context("server.test")))
    names.names["server.test"] = ["127.0.0.1"]
    given = authority.file.read_bytes()
    others = tmp_path / "others"
    others.mkdir()
    (others / "private.pem").write_bytes(given)
    certificates = {"private.pem" if store == "directory alone" else "readme": given if "alone" in store else b"x"}
    places = {"SSL_CERT_FILE": authority.file, "SSL_CERT_DIR": others}
    env = {store: str(places[store])} if store in places else {}
    with started_host(tmp_path, certificates=certificates, env=env) as host:
        assert ask_tls(host, "server.test", there.port) == ("TLS-certificate-error" if store == "nothing" else 200)
        if store == "nothing":
            says_in_log(host, "install ca-certificates")


# Whatever happens in the egress

RAISES = Path(__file__).with_name("raises")


@pytest.mark.parametrize("kind", ["RuntimeError", "MemoryError", "KeyError", "RecursionError", "AssertionError"])
def test_a_question_is_answered_whatever_is_raised_in_the_egress(raising, kind):
    host, heard = raising
    name = f"raises-{kind.lower()}.test"
    assert get(host, name, 80) == code("internal-error")
    assert heard.has(f"egress: cannot connect to {name}:80: {kind}: ")
    says_in_log(host, f"the egress failed: {kind}")
    host.ask(host_api.Stop, instance="asks")


@pytest.fixture(scope="module")
def raising(tmp_path_factory, names):
    directory = tmp_path_factory.mktemp("raising")
    heard = Heard(directory)
    with started_host(directory, env={"PYTHONPATH": str(RAISES)}) as host:
        heard.start()
        yield host, heard
    heard.close()


def test_a_question_that_an_egress_takes_with_it_into_its_end_is_asked_again(outward, names, peer):
    there = peer(answers(OK))
    call(outward)  # the router is there too
    before = forks(outward)
    start(outward, "probe", "http", "server.test", there.port)
    (egress,) = forks(outward) - before
    names.silent.add("server.test")
    said = []
    client = threading.Thread(target=lambda: said.append(call(outward, f"/get?server.test:{there.port}/")[2]))
    client.start()
    assert names.asked("server.test")
    names.silent.clear()
    names.names["server.test"] = ["127.0.0.1"]
    os.kill(egress, signal.SIGKILL)
    client.join(60)
    assert said[0].startswith(b"200\n"), said


# Names and addresses


def get(host, name, port, path="/", **more):
    start(host, "probe", "http", name, port, **more)
    return call(host, f"/get?{name}:{port}{path}")[2]


def test_a_name_is_resolved_in_the_egress(outward, names, peer):
    there = peer(answers(OK))
    names.names["server.test"] = ["127.0.0.1"]
    assert get(outward, "server.test", there.port).startswith(b"200\n")
    assert b"host: server.test:%d\r\n" % there.port in there.received


def test_a_dead_address_beside_a_good_one_costs_a_moment(outward, names, peer):
    there = peer(answers(OK))
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(silent("::1", there.port))
        except OSError as error:
            pytest.skip(f"there is no IPv6 here: {error}")
        names.names["server.test"] = ["::1", "127.0.0.1"]
        assert get(outward, "server.test", there.port, limits=Limits(idle_ms=3000)).startswith(b"200\n")


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        (None, "DNS-error"),
        ([], "DNS-error"),
        (["127.0.0.1"], "connection-refused"),
        (["127.0.0.1", "127.0.0.2"], "connection-refused"),
        (["10.255.255.1"], "destination-IP-prohibited"),
    ],
)
def test_a_name_that_leads_nowhere_is_named(outward, names, addresses, expected):
    if addresses is not None:
        names.names["server.test"] = addresses
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert get(outward, "server.test", port) == code(expected)


def test_a_name_server_that_is_silent_is_named_within_the_time_of_one_wait(outward, names):
    names.silent.add("server.test")
    assert get(outward, "server.test", 80, limits=Limits(idle_ms=1000)) == code("DNS-timeout")
    says_in_log(outward, "could not be resolved")


# Responses

EARLY = b"HTTP/1.1 %d Early\r\nlink: </style.css>\r\n\r\n"


def own_answers(first):
    """Answers the request for /1 with `first`, in its pieces, and each with its own path as the body."""

    def behave(peer, connection):
        while request := peer.request(connection):
            path = request.split(b" ")[1]
            for piece in first if path == b"/1" else ():
                connection.sendall(piece)
                peer.paused.wait(0.05)
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(path), path))

    return behave


@pytest.mark.parametrize(
    "early",
    [[EARLY % 100], [EARLY % 102], [EARLY % 103], [EARLY % 199], [EARLY % 103] * 3, [EARLY % 100 + EARLY % 103]],
)
def test_an_informational_response_is_not_the_answer_and_no_request_gets_anothers(outward, peer, early):
    there = peer(own_answers(early))
    start(outward, "probe", "http", "127.0.0.1", there.port)
    for number in (b"1", b"2", b"3"):
        body = call(outward, f"/get?127.0.0.1:{there.port}/{number.decode()}")[2]
        assert body == b"200\ncontent-length=2\n\n/" + number
    assert there.connections == 1


@pytest.mark.parametrize(
    "first",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n/1HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n/X",
        b"HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n/X",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n/X",
    ],
)
def test_what_a_server_says_beyond_its_response_is_nobodys(outward, peer, first):
    there = peer(own_answers([first]))
    start(outward, "probe", "http", "127.0.0.1", there.port)
    call(outward, f"/get?127.0.0.1:{there.port}/1")
    for number in (b"2", b"3"):
        body = call(outward, f"/get?127.0.0.1:{there.port}/{number.decode()}")[2]
        assert body == b"200\ncontent-length=2\n\n/" + number


def test_an_answer_that_is_too_large_names_the_limit(outward, peer):
    there = peer(answers(b"HTTP/1.1 200 OK\r\ncontent-length: 5000\r\n\r\n" + b"x" * 5000))
    body = get(outward, "127.0.0.1", there.port, limits=Limits(response_bytes=2000))
    assert body.endswith(b"broken %d" % adapter_abi.ERRORS.index("HTTP-response-body-size")), body
    says_in_log(outward, "limits.response")

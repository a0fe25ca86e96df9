"""The shared ingress of a real host as its owner configures it: TLS, routes, limits, forwarded fields, reload."""

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import support
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from echo_guest import ECHO
from host_processes import forks
from peers import certificate
from wire import Wire

from agent.host.ipc import host_api
from tests.eventually import eventually

TARGET = ECHO.replace(
    "(i32.store (i32.const 68) (local.get 4)) (i32.store (i32.const 72) (local.get 5))",
    "(i32.store (i32.const 68) (i32.const 0)) (i32.store (i32.const 72) (i32.const 0))",
).replace(
    "(i32.store (i32.const 76) (local.get 6)) (i32.store (i32.const 80) (local.get 7))",
    "(i32.store (i32.const 76) (local.get 2)) (i32.store (i32.const 80) (local.get 3))",
)
"""Component that answers with the target of the request as its body, and no fields."""

ROUTES = """
[[routes]]
host = "meter.example"
path = "/api"
instance = "target"
strip = true
request = "10B"

[[routes]]
path = "/"
instance = "echo"
head = "2KiB"
"""


EARLIER_WELCOME = {"session": "s", "version": "0.1.0", "engine": "1", "containment": {}, "ingress": "", "running": []}


class Ingress:
    """A host with a file of its owner, and the certificates that it names."""

    def __init__(self, directory, text="", **how):
        self.file = directory / "ingress.toml"
        self.file.write_text(text)
        self.tls_port = support.free_port()
        self.host = support.Host(directory, arguments=("--ingress-config", str(self.file)), **how)
        for name, guest in (("echo", ECHO), ("target", TARGET)):
            assert isinstance(self.host.start(guest, support.a_run(name, 1)), host_api.Started)

    @property
    def log(self):
        return Path(self.host.stderr.name).read_text(encoding="utf-8")

    def reload(self, text=None, *, said="the ingress was read again"):
        """Write another file, and wait until the host says what it made of it."""
        if text is not None:
            self.file.write_text(text)
        before = self.log.count(said)
        os.kill(self.host.process.pid, signal.SIGHUP)
        eventually(lambda: self.log.count(said) > before, said)


@pytest.fixture
def ingress(tmp_path):
    """Start a host with this text as its owner's file; it is closed with every host that a test leaves."""
    return lambda text="": Ingress(tmp_path, text)


def get(port, host, target, *fields, sock=None):
    lines = [f"GET {target} HTTP/1.1", f"Host: {host}", *fields, "", ""]
    return support.http(port, "\r\n".join(lines), sock)


def test_routes_by_host_and_path_and_one_instance_at_the_root(ingress):
    port = ingress(ROUTES).host.port
    assert get(port, "meter.example", "/api/x?y")[2] == b"/x?y"
    assert get(port, "meter.example:8080", "/api")[2] == b"/"
    assert get(port, "meter.example", "/other")[0] == 404
    assert get(port, "10.0.0.1", "/target/z")[2] == b"/z"
    assert get(port, "10.0.0.1", "/anything")[1]["host"] == "10.0.0.1"
    assert "x-forwarded-prefix" not in get(port, "10.0.0.1", "/anything")[1]


def test_limits_of_a_route_hold_whatever_the_framing(ingress):
    port = ingress(ROUTES).host.port
    post = b"POST /api/ HTTP/1.1\r\nHost: meter.example\r\n"
    assert support.http(port, post + b"Content-Length: 10\r\n\r\n0123456789")[0] == 200
    assert support.http(port, post + b"Content-Length: 11\r\n\r\n01234567890")[0] == 413
    chunks = b"Transfer-Encoding: chunked\r\n\r\n6\r\n012345\r\n6\r\n012345\r\n0\r\n\r\n"
    assert support.http(port, post + chunks)[0] == 413
    with Wire(port) as wire:
        wire.send(post + b"Transfer-Encoding: chunked\r\n\r\n6\r\n012345\r\n")
        wire.send(b"6\r\n012345\r\n")
        assert wire.answer()[0] == 413
    with Wire(port) as wire:
        wire.send(post + b"Content-Length: 11\r\nExpect: 100-continue\r\n\r\n")
        assert wire.answer()[0] == 413
    assert get(port, "h", "/", "X: " + "x" * 1500)[0] == 200
    assert get(port, "h", "/", "X: " + "x" * 2048)[0] == 431


def test_instances_are_told_of_clients_by_the_owners_policy(ingress):
    made = ingress(ROUTES)
    port, forged = made.host.port, ("X-Forwarded-For: 1.2.3.4", "X-Forwarded-Proto: https", "X-Real-IP: 1.2.3.4")
    for _ in range(2):  # the second is known byte by byte
        told = get(port, "h", "/", *forged)[1]
        assert (told["x-forwarded-for"], told["x-forwarded-proto"], told["x-forwarded-host"]) == (
            "127.0.0.1",
            "http",
            "h",
        )
        assert "x-real-ip" not in told
    made.reload('[forwarded]\ntrust = ["127.0.0.0/8"]\n' + ROUTES)
    told = get(port, "h", "/", *forged)[1]
    assert (told["x-forwarded-for"], told["x-forwarded-proto"]) == ("1.2.3.4, 127.0.0.1", "https")
    made.reload('[forwarded]\nmode = "drop"\n' + ROUTES)
    assert not any(name.startswith("x-forwarded") for name in get(port, "h", "/", *forged)[1])
    made.reload('[forwarded]\nmode = "pass"\n' + ROUTES)
    assert get(port, "h", "/", *forged)[1]["x-forwarded-for"] == "1.2.3.4"


def tls_text(port, *files, more=ROUTES):
    entries = "".join(
        f'[[tls.certificates]]\ncertificate = "{file}"\nkey = "{file}"\nnames = ["{file.stem}"]\n' for file in files
    )
    return f'[tls]\nlisten = "127.0.0.1:{port}"\n{entries}{more}'


def connect(port, name, file, *, check=True):
    context = ssl.create_default_context(cafile=file)
    if not check:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "http/1.1"])
    sock = socket.create_connection(("127.0.0.1", port), timeout=60)
    return context.wrap_socket(sock, server_hostname=name)


@pytest.fixture
def files(tmp_path):
    return [certificate(tmp_path, name)[0] for name in ("meter.example", "other.example")]


def test_the_owners_certificates_are_picked_by_name(ingress, files):
    made = ingress()
    made.reload(tls_text(made.tls_port, *files))
    for file in files:
        with connect(made.tls_port, file.stem, file) as sock:
            assert sock.selected_alpn_protocol() == "http/1.1"
            for _ in range(3):
                status, told, _ = get(0, "h", "/", "X-Forwarded-Proto: gopher", sock=sock)
                assert (status, told["x-forwarded-proto"], told["x-forwarded-for"]) == (200, "https", "127.0.0.1")
    with connect(made.tls_port, "unknown.example", files[0], check=False) as sock:
        assert sock.getpeercert(binary_form=True) == ssl.PEM_cert_to_DER_cert(
            files[0].read_text().partition("-----END PRIVATE KEY-----\n")[2]
        )
        assert get(0, "meter.example", "/api/x", sock=sock)[2] == b"/x"


def test_large_bodies_both_ways_and_old_protocols(ingress, files):
    made = ingress()
    made.reload(tls_text(made.tls_port, *files, more=""))
    body = bytes(range(256)) * 3000
    with connect(made.tls_port, "meter.example", files[0]) as sock:
        head = b"POST /echo/ HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
        for _ in range(3):
            assert support.http(0, head + body, sock)[2] == body
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.load_verify_locations(files[0])
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with (
        closing(socket.create_connection(("127.0.0.1", made.tls_port), timeout=60)) as sock,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        old.wrap_socket(sock, server_hostname="meter.example")
    assert support.http(made.host.port, "GET /echo/ HTTP/1.1\r\nhost: x\r\n\r\n")[0] == 200


def test_who_speaks_no_tls_or_nothing_keeps_nobody_out(ingress, files):
    made = ingress()
    made.reload(tls_text(made.tls_port, *files))
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", made.tls_port))) for _ in range(50)]
        silent[0].sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        with connect(made.tls_port, "meter.example", files[0]) as sock:
            assert get(0, "h", "/", sock=sock)[0] == 200


def test_a_reload_changes_certificates_without_a_lost_request(ingress, files, tmp_path):
    made = ingress()
    made.reload(tls_text(made.tls_port, *files))
    kept = connect(made.tls_port, "meter.example", files[0])
    first = kept.getpeercert(binary_form=True)
    answers, stop = [], threading.Event()

    def ask(sock):
        while not stop.is_set():
            try:
                answers.append(get(0, "h", "/", sock=sock)[0])
            except OSError as error:
                answers.append(repr(error))
                return

    def come_and_go():
        while not stop.is_set():
            try:
                with connect(made.tls_port, "meter.example", None, check=False) as sock:
                    answers.append(get(0, "h", "/", sock=sock)[0])
            except OSError as error:
                answers.append(repr(error))
                return

    clients = [threading.Thread(target=ask, args=(kept,)), threading.Thread(target=come_and_go)]
    for client in clients:
        client.start()
    for _ in range(3):
        certificate(tmp_path, "meter.example")
        made.reload()
    stop.set()
    for client in clients:
        client.join()
    assert set(answers) == {200}
    assert get(0, "h", "/", sock=kept)[0] == 200, "a connection of before goes on"
    with connect(made.tls_port, "meter.example", files[0]) as sock:
        assert sock.getpeercert(binary_form=True) != first
    kept.close()


PAIR = (
    '[tls]\nlisten = "127.0.0.1:PORT"\n[[tls.certificates]]\ncertificate = "DIR/meter.example.pem"\nkey = "DIR/KEY"\n'
)


def encrypted_key():
    encryption = serialization.BestAvailableEncryption(b"secret")
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("routes = 3", "ingress.toml"),
        ('[tls]\nlisten = "127.0.0.1:1x"\n[[tls.certificates]]\ncertificate = "a"\nkey = "a"\n', "tls.listen"),
        (
            '[tls]\nlisten = "127.0.0.1:PORT"\n[[tls.certificates]]\ncertificate = "/none.pem"\nkey = "/none.pem"\n',
            "cannot read certificate /none.pem",
        ),
        (
            '[tls]\nlisten = "127.0.0.1:PORT"\n[[tls.certificates]]\ncertificate = "FILE"\nkey = "FILE"\n',
            "broken.pem: one of them is not valid PEM",
        ),
        (
            PAIR.replace("KEY", "other.example.pem"),
            "other.example.pem: the key does not belong to the certificate",
        ),
        (
            PAIR.replace("KEY", "encrypted.key"),
            "encrypted.key: the key is encrypted, and the host can ask nobody for its passphrase",
        ),
    ],
)
def test_what_is_not_valid_leaves_all_as_it_was_and_keeps_a_host_from_starting(ingress, files, tmp_path, text, said):
    (tmp_path / "broken.pem").write_text("no certificate\n")
    (tmp_path / "encrypted.key").write_bytes(encrypted_key())
    made = ingress()
    made.reload(tls_text(made.tls_port, *files))
    text = text.replace("PORT", str(support.free_port())).replace("FILE", str(tmp_path / "broken.pem"))
    text = text.replace("DIR", str(tmp_path))
    made.reload(text, said="the ingress goes on as before")
    assert said in made.log
    with connect(made.tls_port, "meter.example", files[0]) as sock:
        assert get(0, "h", "/", sock=sock)[0] == 200
    made.host.close()
    command = [sys.executable, "-m", "agent.host.cli", "run", "--ingress", f"127.0.0.1:{made.host.port}"]
    places = ["--runtime", str(made.host.runtime), "--state", str(made.host.state), "--ingress-config", str(made.file)]
    done = subprocess.run([*command, *places], capture_output=True, check=False, timeout=120, cwd=support.ROOT)
    assert done.returncode == 1
    assert said in done.stderr.decode()


def test_a_taken_port_leaves_all_as_it_was(ingress, files):
    made = ingress()
    made.reload(tls_text(made.tls_port, *files))
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        made.reload(tls_text(port, *files), said="the ingress goes on as before")
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in made.log
    assert "Traceback" not in made.log
    with connect(made.tls_port, "meter.example", files[0]) as sock:
        assert get(0, "h", "/", sock=sock)[0] == 200


def test_tls_can_come_move_and_go_while_the_host_runs(ingress, files):
    made = ingress(ROUTES)
    made.reload(tls_text(made.tls_port, files[0]))
    with connect(made.tls_port, "meter.example", files[0]) as kept:
        assert get(0, "h", "/", sock=kept)[0] == 200
        other = support.free_port()
        made.reload(tls_text(other, files[0]))
        with connect(other, "meter.example", files[0]) as sock:
            assert get(0, "h", "/", sock=sock)[0] == 200
        with pytest.raises(ConnectionRefusedError):
            connect(made.tls_port, "meter.example", files[0])
        made.reload(ROUTES)
        with pytest.raises(ConnectionRefusedError):
            connect(other, "meter.example", files[0])
        assert get(0, "h", "/", sock=kept)[0] == 200


def test_a_terminator_or_router_that_is_killed_is_replaced(ingress, files):
    made = ingress()
    made.reload(tls_text(made.tls_port, *files))
    for pid in forks(made.host):
        os.kill(pid, signal.SIGKILL)
    for name in ("router", "TLS terminator"):
        eventually(lambda said=f"host: the {name} ended": said in made.log, name)

    def answers():
        try:
            with connect(made.tls_port, "meter.example", files[0]) as sock:
                return get(0, "h", "/", sock=sock)[0] == 200
        except OSError:
            return False

    eventually(answers, "answers over TLS")


def test_a_terminator_that_cannot_start_again_says_why(ingress, files):
    made = ingress()
    made.reload(tls_text(made.tls_port, *files))
    files[0].write_text("no certificate\n")
    for pid in forks(made.host):
        os.kill(pid, signal.SIGKILL)
    said = f"host: the TLS terminator cannot start: cannot use certificate {files[0]}"
    eventually(lambda: said in made.log, said)


def test_routes_of_a_host_of_an_earlier_version_are_not_asked_for(tmp_path):
    command = [sys.executable, "-m", "agent.cli", "routes", "--runtime", str(tmp_path), "--state", str(tmp_path)]
    with host_api.new_socket() as listener:
        listener.bind(str(tmp_path / "host.sock"))
        listener.listen()
        asked = subprocess.Popen(command, stderr=subprocess.PIPE, cwd=support.ROOT, text=True)
        host, _ = listener.accept()
        with host:
            hello = host_api.receive_request(host)[0]
            host.send(json.dumps({"type": "welcome", "id": hello.id, **EARLIER_WELCOME}).encode())
            errors = asked.communicate(timeout=60)[1]
    assert asked.returncode == 1
    assert "the host (0.1.0) cannot list routes" in errors


def test_routes_lists_what_answers_where(ingress, files):
    made = ingress()
    made.reload(tls_text(made.tls_port, *files))
    own = support.free_port()
    assert isinstance(made.host.start("hello", support.a_run("alone", 1, port=own)), host_api.Started)
    command = [sys.executable, "-m", "agent.cli", "routes", "--runtime", str(made.host.runtime)]
    command += ["--state", str(made.host.state / "agent")]
    text = subprocess.run(command, capture_output=True, check=True, timeout=60, text=True, cwd=support.ROOT).stdout
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines == [
        f"shared port http://127.0.0.1:{made.host.port}",
        f"with TLS https://127.0.0.1:{made.tls_port} for meter.example, other.example",
        "meter.example/api target answers; without /api; bodies up to 10B",
        "/echo/ echo answers; by its name, also as echo.ANYTHING",
        "/target/ target answers; by its name, also as target.ANYTHING",
        "/ echo answers; heads up to 2KiB",
        f":{own} alone answers",
    ]
    made.host.ask(host_api.Stop, instance="target")
    done = subprocess.run([*command, "--json"], capture_output=True, check=True, timeout=60, cwd=support.ROOT)
    found = json.loads(done.stdout)
    assert [each["answers"] for each in found["routes"] if each["instance"] == "target"] == [None]


class EndedSending:
    """A client of TLS that sends a request, ends its sending side and then reads."""

    def __init__(self, port, file, how):
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = ssl.create_default_context(cafile=file)
        self._tls = context.wrap_bio(self._in, self._out, server_hostname=file.stem)
        self._sock = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._how = how
        self._do(self._tls.do_handshake)

    def _do(self, act):
        while True:
            try:
                return act()
            except ssl.SSLWantReadError:
                self._send()
                data = self._sock.recv(65536)
                self._in.write(data) if data else self._in.write_eof()
            finally:
                self._send()

    def _send(self):
        if data := self._out.read():
            with contextlib.suppress(BrokenPipeError):  # TCP's half is ended
                self._sock.sendall(data)

    def exchange(self, request):
        self._do(lambda: self._tls.write(request))
        if self._how == "close_notify":
            with contextlib.suppress(ssl.SSLWantReadError):
                self._tls.unwrap()
            self._send()
        if self._how == "end of TCP":
            self._sock.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ssl.SSLZeroReturnError, ssl.SSLEOFError):
            while data := self._do(lambda: self._tls.read(65536)):
                answer += data
        self._sock.close()
        return answer


@pytest.mark.parametrize("how", ["close_notify", "end of TCP"])
@pytest.mark.parametrize(
    "steps",
    [
        "r/whello/.",
        "p300/r/whello/.",
        "hcontent-length:900000/r/b900000/.",
        "hcontent-length:3/r/u1/f/p300/u2/f/p300/u3/.",
    ],
)
def test_a_client_of_tls_that_ends_its_sending_side_gets_its_answer(ingress, files, how, steps):
    made = ingress()
    made.host.start("script", support.a_run("script", 1))
    made.reload(tls_text(made.tls_port, *files, more=""))
    request = f"GET /script/~/{steps} HTTP/1.1\r\nhost: meter.example\r\n\r\n".encode()
    answer = EndedSending(made.tls_port, files[0], how).exchange(request)
    plain = socket.create_connection(("127.0.0.1", made.host.port), timeout=60)
    with plain:
        plain.sendall(request)
        plain.shutdown(socket.SHUT_WR)
        expected = b""
        while data := plain.recv(65536):
            expected += data
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.partition(b"\r\n\r\n")[2] == expected.partition(b"\r\n\r\n")[2]


def test_half_a_request_over_tls_reaches_no_guest(ingress, files):
    made = ingress()
    made.reload(tls_text(made.tls_port, *files))
    head = b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 10\r\n\r\nhalf"
    for how in ("close_notify", "end of TCP"):
        answer = EndedSending(made.tls_port, files[0], how).exchange(head)
        assert not answer.startswith(b"HTTP/1.1 200")

"""The API client names whose fault it is: the network, the server's refusal, or an answer that nobody understands."""

import datetime as dt
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fleet.client import AnswerError, Client, ProblemError, RequestError, UnreachableError


@pytest.fixture
def certificate(tmp_path) -> Path:
    return self_signed(tmp_path / "cert.pem")


def self_signed(file: Path) -> Path:
    """A self-signed certificate for loopback with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "loopback")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    file.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return file


@contextmanager
def listening(answer: bytes | None, certificate: Path | None = None) -> Iterator[int]:
    """A server that answers one request with these bytes (None: with silence), and then is gone."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ended = threading.Event()

        def serve() -> None:
            try:
                raw, _ = server.accept()
                if certificate is not None:
                    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                    context.load_cert_chain(certificate)
                    raw = context.wrap_socket(raw, server_side=True)
                with raw:
                    raw.recv(65536)
                    if answer is None:
                        ended.wait(20)
                    else:
                        raw.sendall(answer)
            except OSError:
                pass  # the client went away: that is the test

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            ended.set()
            thread.join(20)


def client(port: int, certificate: Path, host: str = "localhost") -> Client:
    return Client(url=f"https://{host}:{port}", ca=certificate, token="secret")


def http(status: str, body: bytes) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


def test_nothing_listens(certificate):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with client(port, certificate) as api, pytest.raises(UnreachableError) as caught:
        api.devices()
    assert str(port) in caught.value.what
    assert "refused" in caught.value.why
    assert "fleet serve" in caught.value.action


def test_a_certificate_of_another_fleet_is_not_trusted(certificate, tmp_path):
    other = self_signed(tmp_path / "other.pem")
    with (
        listening(b"", certificate) as port,
        client(port, other) as api,
        pytest.raises(UnreachableError, match="its certificate is not this fleet's"),
    ):
        api.devices()


def test_a_server_that_hangs_up(certificate):
    with (
        listening(b"", certificate) as port,
        client(port, certificate) as api,
        pytest.raises(UnreachableError, match="the connection was lost"),
    ):
        api.devices()


def test_a_server_that_stays_silent(certificate, monkeypatch):
    monkeypatch.setattr("fleet.client.READ_TIMEOUT_S", 0.2)
    with (
        listening(None, certificate) as port,
        client(port, certificate) as api,
        pytest.raises(UnreachableError, match="did not answer in time"),
    ):
        api.devices()


def test_a_server_without_tls(certificate):
    with listening(http("200 OK", b"hello")) as port, client(port, certificate) as api, pytest.raises(UnreachableError):
        api.devices()


def test_a_refusal_keeps_the_servers_words(certificate):
    body = b'{"type":"unknown-group","title":"no group x","status":404,"detail":"there are a, b","action":"make it"}'
    with (
        listening(http("404 Not Found", body), certificate) as port,
        client(port, certificate) as api,
        pytest.raises(ProblemError) as caught,
    ):
        api.groups()
    assert str(caught.value) == "no group x; there are a, b; make it"
    assert (caught.value.problem.type, caught.value.problem.status) == ("unknown-group", 404)


@pytest.mark.parametrize(
    "answer",
    [
        http("200 OK", b"<html>"),
        http("200 OK", b"[]"),
        http("302 Found", b""),
        http("200 OK", b'{"devices":[{"name":"no id"}]}'),
    ],
)
def test_an_answer_that_is_none(answer, certificate):
    with listening(answer, certificate) as port, client(port, certificate) as api, pytest.raises(AnswerError):
        api.devices()


@pytest.mark.parametrize("status", ["502 Bad Gateway", "503 Service Unavailable", "504 Gateway Timeout"])
def test_a_proxy_whose_server_is_away(status, certificate):
    with (
        listening(http(status, b"<html>"), certificate) as port,
        client(port, certificate) as api,
        pytest.raises(UnreachableError, match=f"a proxy in between answered {status}"),
    ):
        api.devices()


@pytest.mark.parametrize("url", ["https://", "ftp://localhost:1", "https://local host", "https://localhost:99999999"])
def test_an_address_that_is_none(url, certificate):
    with Client(url=url, ca=certificate, token="secret") as api, pytest.raises(UnreachableError):
        api.devices()


def test_a_ca_that_is_none(tmp_path):
    (tmp_path / "ca.pem").write_text("nothing")
    for name in ("ca.pem", "missing.pem"):
        with pytest.raises(UnreachableError, match="cannot use the fleet's CA certificate"):
            Client(url="https://localhost:1", ca=tmp_path / name, token="secret")


def test_names_that_people_type_stay_one_segment_of_the_path(certificate):
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.raw_path.decode())
        return httpx.Response(404, content=b'{"type":"x","title":"x","status":404}')

    with (
        Client(url="https://localhost:1", ca=certificate, token="s", transport=httpx.MockTransport(answer)) as api,
        pytest.raises(ProblemError),
    ):
        api.device("status?x=1")
    assert asked == ["/v1/devices/status%3Fx%3D1"]


@pytest.mark.parametrize("name", ["", ".", "..", "../status", "a/b"])
def test_a_name_that_no_path_can_hold_is_not_sent(name, certificate):
    transport = httpx.MockTransport(lambda request: pytest.fail(f"asked for {request.url}"))
    with (
        Client(url="https://localhost:1", ca=certificate, token="s", transport=transport) as api,
        pytest.raises(RequestError, match="is not a name"),
    ):
        api.device(name)


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(certificate, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    with listening(http("200 OK", b'{"devices":[]}'), certificate) as port, client(port, certificate) as api:
        assert api.devices().devices == ()


def test_the_upload_counts_every_byte(certificate):
    sent: list[int] = []

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers["content-length"] == str(len(request.read()))
        assert "transfer-encoding" not in request.headers
        return httpx.Response(200, content=b'{"sha256":"a","length":150000,"new":true}')

    with Client(url="https://localhost:1", ca=certificate, token="s", transport=httpx.MockTransport(answer)) as api:
        api.upload("a", b"x" * 150_000, progress=sent.append)
    assert sum(sent) == 150_000
    assert len(sent) == 3

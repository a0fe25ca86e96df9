"""`fleet-agent check` with a single fault at a time: it is reported, after all earlier checks."""

import shlex
import socket
import ssl
import sys
import threading
from contextlib import closing
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from agent.config import Disk, Network, Paths, Settings
from agent.host.ipc import host_api
from agent.identity.identity import Identity
from agent.report import check
from fleet.ca import CertificateAuthority

ORDER = ["machine", "identity", "disk", "DNS", "TCP", "proxy", "TLS", "clock", "HTTP", "MQTT", "engine", "host"]
DEVICE = "crane-0a1b2c3d"
HOST = "127.0.0.1"
ENGINE = '{"engine": "50.0.1", "triple": "aarch64-unknown-linux-gnu"}'


class Answers(BaseHTTPRequestHandler):
    """Server without an assignment for this device, or one that refuses it; as a proxy, it refuses all tunnels."""

    def do_GET(self):
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    def do_CONNECT(self):
        self.send_error(403)

    def log_message(self, *_):
        pass


def served(context=None):
    server = ThreadingHTTPServer((HOST, 0), Answers)
    if context is not None:
        # the handshake runs on the connection's thread: a client that aborts it must not end the server
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.daemon_threads, server.status, server.body = True, 404, b""
    server.handle_error = lambda *_: None
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


@pytest.fixture(scope="module")
def ca(tmp_path_factory):
    return CertificateAuthority.create(tmp_path_factory.mktemp("ca"), fleet="harbour", now=datetime.now(UTC))


@pytest.fixture
def server(ca, tmp_path):
    pair = ca.server((HOST,), now=datetime.now(UTC))
    (tmp_path / "server.pem").write_bytes(pair.certificate_pem + pair.key_pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    context.load_verify_locations(cadata=ca.pem)
    context.verify_mode = ssl.CERT_REQUIRED
    made = served(context)
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def proxy():
    made = served()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def closed_port():
    with closing(socket.socket()) as taken:
        taken.bind((HOST, 0))  # bound but not listening: connections are refused, and no other process gets the port
        yield taken.getsockname()[1]


class Device:
    """Working device, on which tests break a single part."""

    def __init__(self, place, ca, server, monkeypatch):
        self.places, self.settings = Paths(place / "state", place / "run"), Settings(disk=Disk(reserve_bytes=0))
        self.places.identity.mkdir(parents=True)
        self.places.runtime.mkdir()
        key = Ed25519PrivateKey.generate()
        issued = ca.device(key.public_key(), DEVICE, now=datetime.now(UTC))
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (self.places.identity / "device.key").write_bytes(pem)
        (self.places.identity / "device.pem").write_text(issued.pem)
        (self.places.identity / "ca.pem").write_text(ca.pem)
        self.url = f"https://{HOST}:{server.server_port}"
        self.write()
        self.engine(monkeypatch, f"print({ENGINE!r})")

    def write(self, **changes):
        who = Identity(
            device=DEVICE,
            fleet="harbour",
            group="edge",
            devices_url=self.url,
            mqtt=(self.url.replace("https", "mqtts"),),
            production=False,
            floor=datetime(2026, 1, 1, tzinfo=UTC),
        )
        who = msgspec.structs.replace(who, **changes)
        (self.places.identity / "enrolled.json").write_bytes(msgspec.json.encode(who))

    def engine(self, monkeypatch, code):
        monkeypatch.setenv("WASMFLEET_COMPILER", shlex.join([sys.executable, "-c", code]))

    def check(self, **machine):
        return check.run_checks(self.places, self.settings, **({"machine": "aarch64", "bits": 64} | machine))


@pytest.fixture
def device(tmp_path, ca, server, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return Device(tmp_path, ca, server, monkeypatch)


@pytest.fixture
def host(device):
    """Host that reports its isolation layers."""
    listener = host_api.new_socket()
    listener.bind(str(device.places.host_socket))
    listener.listen()

    def serve():
        with closing(listener.accept()[0]) as peer:
            request, _ = host_api.receive_request(peer)
            walls = {"user": True, "landlock": False}
            host_api.send(
                peer,
                host_api.Welcome(
                    id=request.id,
                    session="s",
                    version="1",
                    engine="50",
                    containment=walls,
                    ingress="",
                    running=(),
                    protocol=host_api.PROTOCOL,
                ),
            )

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield
    listener.close()


def test_all_checks_pass_in_order_on_a_working_device(device, host):
    results = device.check()
    assert [(each.name, each.ok) for each in results] == [(name, True) for name in ORDER], results[-1]
    said = {each.name: each.text for each in results}
    assert said["engine"] == "wasmtime 50.0.1 for aarch64-unknown-linux-gnu"
    assert said["host"] == "fleet-host 1, isolation layers: user; missing landlock"


def first_failure(results, name):
    """Return the sentence of the failed check, which must be the last one, after all earlier checks."""
    assert [each.name for each in results] == ORDER[: ORDER.index(name) + 1], results[-1]
    assert [each.ok for each in results] == [True] * (len(results) - 1) + [False]
    assert "\n" not in results[-1].text
    return results[-1].text


@pytest.mark.parametrize("machine", ["armv7l", "armv6l", "i686"])
def test_a_32_bit_processor_is_refused_in_one_sentence(device, machine):
    assert first_failure(device.check(machine=machine, bits=32), "machine") == (
        f"{machine} is not supported: install a 64-bit system (x86_64, aarch64 or riscv64)"
    )


def test_a_32_bit_system_under_a_64_bit_kernel_is_refused_too(device):
    assert first_failure(device.check(machine="aarch64", bits=32), "machine") == (
        "aarch64 with a 32-bit system is not supported: install a 64-bit system (x86_64, aarch64 or riscv64)"
    )


def test_by_default_this_machine_is_checked(device):
    assert check.run_checks(device.places, device.settings)[0].ok


def test_an_unresolvable_name(device):
    device.write(devices_url="https://fleet.invalid:8744")
    assert "fleet.invalid cannot be resolved" in first_failure(device.check(), "DNS")


def test_a_closed_port(device, closed_port):
    device.write(devices_url=f"https://{HOST}:{closed_port}")
    assert f"{HOST}:{closed_port}" in first_failure(device.check(), "TCP")


def test_a_proxy_that_refuses(device, proxy):
    device.settings = Settings(network=Network(proxy=f"http://{HOST}:{proxy.server_port}"))
    assert "does not connect to" in first_failure(device.check(), "proxy")


def test_a_tls_interceptor(device, tmp_path_factory):
    other = CertificateAuthority.create(tmp_path_factory.mktemp("other"), fleet="harbour", now=datetime.now(UTC))
    (device.places.identity / "ca.pem").write_text(other.pem)
    assert "no proxy intercepts TLS" in first_failure(device.check(), "TLS")


def test_a_clock_behind_the_floor_is_reported_but_not_a_failure(device, host):
    device.write(floor=datetime.now(UTC) + timedelta(days=1))
    results = device.check()
    assert all(each.ok for each in results), results[-1]
    assert "is before" in next(each.text for each in results if each.name == "clock")


def test_an_unreachable_broker(device, closed_port):
    device.write(mqtt=(f"mqtts://{HOST}:{closed_port}",))
    assert "without MQTT" in first_failure(device.check(), "MQTT")


def test_a_server_that_refuses_this_device(device, server):
    server.status = 403
    assert "403" in first_failure(device.check(), "HTTP")


def test_a_revoked_device_is_told_so_in_a_sentence(device, server):
    server.status, server.body = 403, b'{"type": "revoked", "title": "crane-0a1b2c3d is revoked", "status": 403}'
    said = first_failure(device.check(), "HTTP")
    assert "the fleet has revoked this device" in said
    assert "{" not in said


def test_a_refusal_is_told_in_the_servers_words(device, server):
    server.status = 403
    server.body = b'{"type": "unknown-device", "title": "not of this fleet", "action": "enrol again"}'
    assert "refuses this device: not of this fleet (enrol again)" in first_failure(device.check(), "HTTP")


def test_a_device_without_an_engine(device, monkeypatch):
    device.engine(monkeypatch, "import sys; sys.exit('unsupported architecture')")
    said = first_failure(device.check(), "engine")
    assert said == "no WebAssembly engine on this device: unsupported architecture"


def test_a_missing_host(device):
    assert "start fleet-host" in first_failure(device.check(), "host")
    device.places.runtime.mkdir(exist_ok=True)
    (device.places.runtime / host_api.WHY_NOT).write_text("seccomp is missing\n")
    assert first_failure(device.check(), "host") == "the host does not start: seccomp is missing"


def test_free_space_below_the_reserve(device, host):
    device.settings = Settings(disk=Disk(reserve_bytes=1 << 60))
    assert "below the reserve" in first_failure(device.check(), "disk")

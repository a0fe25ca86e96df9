"""Enrolment: the secret is sent only to the fleet that the token names, and the identity is created atomically."""

import base64
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec
import pytest
from cryptography import x509

from agent.identity import enrolment, identity
from agent.identity.enrolment import EnrolError
from fleet.ca import CertificateAuthority
from signing import sealing
from tests.agent.enrolment_server import Fleet


@pytest.fixture
def fleet(tmp_path):
    made = Fleet(tmp_path / "fleet")
    yield made
    made.close()


def join(token, tmp_path, **more):
    return enrolment.enrol(token, state=tmp_path / "state", name="crane", **({"production": False} | more))


def test_a_device_enrols(fleet, tmp_path):
    joined = join(fleet.token(), tmp_path, machine="serial-1")
    assert joined == identity.load(tmp_path / "state" / "identity")
    assert joined.device.startswith("crane-")
    assert (joined.fleet, joined.group, joined.machine) == ("harbour", "edge", "serial-1")
    (heard,) = fleet.heard
    assert heard.secret == "hush"
    assert len(base64.b64decode(heard.sealing_key)) == 32
    certificate = (tmp_path / "state" / "identity" / "device.pem").read_bytes()
    again = enrolment.sealing_proof(tmp_path / "state" / "identity", "harbour").encode()
    for proof in (heard.sealing_proof.encode(), again):
        proved, _ = sealing.proved(proof, certificate=certificate, fleet="harbour", device=joined.device)
        assert proved == heard.sealing_key
    directory = tmp_path / "state" / "identity"
    assert {path.name for path in directory.iterdir()} == {
        "device.key", "device.pem", "ca.pem", "sealing.key", "mac.key", "root.json", "enrolled.json",
    }  # fmt: skip
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}
    assert directory.stat().st_mode & 0o777 == 0o700
    assert not (tmp_path / "state" / enrolment.NEW).exists()


def test_the_secret_is_not_sent_under_another_ca(fleet, tmp_path):
    other = Fleet(tmp_path / "other")
    try:
        token = fleet.token(url=f"https://127.0.0.1:{other.server.server_port}")
        with pytest.raises(EnrolError, match="does not present the CA"):
            join(token, tmp_path)
        assert other.heard == []
        assert not (tmp_path / "state" / "identity").exists()
    finally:
        other.close()


def test_presenting_the_right_ca_without_a_certificate_of_it_is_refused(fleet, tmp_path, monkeypatch):
    """An interceptor may present the fleet's CA, but has no certificate from it."""
    other = Fleet(tmp_path / "other")
    try:
        monkeypatch.setattr(enrolment, "presented_ca", lambda _url, _sha256, **_: fleet.ca.pem)
        with pytest.raises(EnrolError, match="TLS"):
            join(fleet.token(url=f"https://127.0.0.1:{other.server.server_port}"), tmp_path)
        assert other.heard == []
    finally:
        other.close()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"root": '{"signed": "mine"}'}, "a different trust root"),
        ({"fleet": "pirates"}, "belongs to fleet 'pirates'"),
        ({"device": "crane-00000000"}, "another key or another device"),
        ({"certificate_pem": "nonsense"}, "cannot be used"),
    ],
)
def test_the_servers_answer_is_checked_against_the_token(fleet, tmp_path, change, sentence):
    fleet.change = lambda enrolled: msgspec.structs.replace(enrolled, **change)
    with pytest.raises(EnrolError, match=sentence):
        join(fleet.token(), tmp_path)
    assert not (tmp_path / "state" / "identity").exists()


def test_a_production_device_refuses_a_development_fleet(fleet, tmp_path):
    with pytest.raises(EnrolError, match="development"):
        join(fleet.token(), tmp_path, production=True)


def test_an_enrolled_device_keeps_its_identity_unless_forced(fleet, tmp_path):
    first = join(fleet.token(), tmp_path)
    with pytest.raises(EnrolError, match="--force"):
        join(fleet.token(secret="second"), tmp_path)
    (tmp_path / "state" / "store.db").write_bytes(b"of the old fleet")
    second = join(fleet.token(secret="second"), tmp_path, force=True)
    assert second.device != first.device
    assert not (tmp_path / "state" / "store.db").exists(), "another fleet's memory means nothing here"


def test_after_a_lost_answer_enrolment_repeats_with_the_same_key(fleet, tmp_path):
    fleet.change = lambda enrolled: msgspec.structs.replace(enrolled, fleet="garbled")
    with pytest.raises(EnrolError):
        join(fleet.token(), tmp_path)
    fleet.change = lambda enrolled: enrolled
    join(fleet.token(), tmp_path)
    assert fleet.heard[0].csr_pem.split()[1] is not None
    keys = {x509.load_pem_x509_csr(each.csr_pem.encode()).public_key().public_numbers() for each in fleet.heard}
    assert len(keys) == 1
    # Another token means another attempt with new keys.
    join(fleet.token(secret="other"), tmp_path, force=True)
    assert fleet.heard[-1].sealing_key != fleet.heard[0].sealing_key


def test_the_servers_refusal_is_shown_in_its_words(fleet, tmp_path):
    fleet.status = 403
    with pytest.raises(EnrolError, match=r"this token was used.*make another"):
        join(fleet.token(), tmp_path)


@pytest.mark.parametrize(
    ("token", "sentence"),
    [("", "not an enrolment token"), ("wf1.%%%", "damaged"), ("wf1.e30", "damaged")],
)
def test_text_that_is_not_a_token_is_refused(tmp_path, token, sentence):
    with pytest.raises(EnrolError, match=sentence):
        join(token, tmp_path)


def test_an_expired_token_is_not_sent(fleet, tmp_path):
    token = fleet.token(expires=fleet.now - timedelta(seconds=1))
    with pytest.raises(EnrolError, match="expired"):
        join(token, tmp_path)
    assert fleet.heard == []


def test_a_device_without_a_clock_enrols_at_the_tokens_time_floor(fleet, tmp_path):
    """The system clock is far behind the token's floor, at which TLS certificates are then checked."""
    floor = fleet.now + timedelta(days=10)
    joined = join(fleet.token(floor=floor, expires=floor + timedelta(hours=1)), tmp_path)
    assert joined.floor == floor.replace(tzinfo=UTC)


def test_a_host_name_becomes_a_valid_name(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "Kran_Süd.local")
    assert enrolment.device_name() == "kran-s-d"
    assert enrolment.device_name("Lift 7") == "lift-7"
    assert enrolment.device_name("***") == "device"


@pytest.mark.parametrize("devices", [True, False])
def test_the_servers_listeners_present_the_ca(tmp_path, devices):
    """Required for enrolment, as the token only contains the CA's hash."""
    from types import SimpleNamespace

    from fleet.server.clock import ServerClock
    from fleet.server.listener import Certificates

    for name in ("ca", "tls"):
        (tmp_path / name).mkdir()
    now = datetime.now(UTC)
    ca = CertificateAuthority.create(tmp_path / "ca", fleet="harbour", now=now)
    home = SimpleNamespace(tls=tmp_path / "tls", ca=tmp_path / "ca")
    context = Certificates(home, ca, "127.0.0.1", ServerClock(lambda: now)).context(devices=devices)
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None
    thread = threading.Thread(target=server.handle_request, daemon=True)
    thread.start()
    try:
        assert enrolment.presented_ca(f"https://127.0.0.1:{server.server_port}", ca.sha256) == ca.pem
    finally:
        thread.join(5)
        server.server_close()

"""Periodic tasks: certificate renewal and eviction."""

import asyncio
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from agent import clock
from agent.clock import ReferenceClock
from agent.config import Disk, Paths, Settings
from agent.identity import enrolment
from agent.identity.enrolment import CertificateRenewal, EnrolError
from agent.identity.identity import Identity
from agent.link.https import FetchError
from agent.update import effects
from agent.update.machine import State
from agent.update.secrets import SecretStore
from agent.update.state import Change, Committed, DeploymentState
from fleet import ca
from fleet.ca import CertificateAuthority
from fleet.protocol.assignment import Item
from fleet.protocol.codes import Phase, RejectCode
from fleet.protocol.manifest import Http, Manifest
from fleet.protocol.messages import RenewReply, RenewRequest

NOW = datetime.now(UTC)


class Server:
    """Server that renews certificates, for any key on demand."""

    def __init__(self, ca):
        self.ca, self.key, self.asked = ca, None, []

    def request(self, method, path, *, max_bytes, body, headers):
        assert (method, path) == ("POST", "/v1/renew")
        request = msgspec.json.decode(body, type=RenewRequest)
        self.asked.append(request)
        key = self.key or x509.load_pem_x509_csr(request.csr_pem.encode()).public_key()
        pem = self.ca.device(key, "crane-0a1b2c3d", now=NOW).pem
        return msgspec.json.encode(RenewReply(certificate_pem=pem, ca_pem=self.ca.pem))


@pytest.fixture
def device(tmp_path):
    places = Paths(tmp_path / "state", tmp_path / "run")
    places.identity.mkdir(parents=True)
    (tmp_path / "ca").mkdir()
    ca = CertificateAuthority.create(tmp_path / "ca", fleet="harbour", now=NOW)
    key = ec.generate_private_key(ec.SECP256R1())
    (places.identity / "device.key").write_bytes(enrolment._private_pem(key))
    (places.identity / "device.pem").write_text(ca.device(key.public_key(), "crane-0a1b2c3d", now=NOW).pem)
    return places, Server(ca)


def who():
    return Identity(
        device="crane-0a1b2c3d", fleet="harbour", group="", devices_url="", mqtt=(), production=False, floor=NOW
    )


def test_a_device_enrolled_without_a_sealing_proof_sends_it_with_the_renewal(device):
    places, server = device
    enrolment.renew_now(places, server, who())
    assert server.asked[0].sealing_proof == "", "it has no sealing key"
    (places.identity / "sealing.key").write_bytes(enrolment._private_pem(X25519PrivateKey.generate()))
    enrolment.renew_now(places, server, who())
    assert "wasmfleet.sealing" in server.asked[1].sealing_proof


def test_the_certificate_is_renewed_for_the_existing_key(device):
    places, server = device
    before = (places.identity / "device.pem").read_text()
    enrolment.renew_now(places, server, who())
    after = (places.identity / "device.pem").read_text()
    assert after != before
    assert "PRIVATE" not in server.asked[0].csr_pem


def test_a_certificate_for_another_key_is_not_installed(device):
    places, server = device
    before = (places.identity / "device.pem").read_text()
    server.key = ec.generate_private_key(ec.SECP256R1()).public_key()
    with pytest.raises(EnrolError, match="another key"):
        enrolment.renew_now(places, server, who())
    assert (places.identity / "device.pem").read_text() == before


@pytest.mark.asyncio
async def test_an_outdated_certificate_is_renewed_at_once(device):
    """Long before two thirds of its life, as its issuing CA was stolen with the server."""
    places, server = device
    before = (places.identity / "device.pem").read_text()

    retried = []
    renewal = CertificateRenewal(
        places=places,
        identity=who(),
        https=server,
        clock=ReferenceClock(NOW),
        mqtt=SimpleNamespace(retry=lambda: retried.append(True)),
    )
    task = asyncio.create_task(renewal.run())
    await asyncio.sleep(0)
    assert not server.asked
    renewal.request()
    async with asyncio.timeout(60):
        await renewal.renewed.wait()
    task.cancel()
    assert retried == [True], "the broker may have refused the certificate of before"
    assert (places.identity / "device.pem").read_text() != before


@pytest.mark.parametrize(
    ("status", "body", "wanted"),
    [
        (403, b'{"type":"certificate-outdated"}', True),
        (403, b'{"type":"certificate-expired"}', True),
        (403, b'{"type":"revoked"}', False),
        (403, b"<html>", False),
        (500, b'{"type":"certificate-outdated"}', False),
    ],
)
def test_only_expired_and_outdated_certificates_are_renewed_after_a_refusal(status, body, wanted):
    error = FetchError(RejectCode.UNREACHABLE, "no", status=status, body=body)
    assert enrolment.wants_renewal(error) is wanted


class Named:
    async def name(self, sha256, manifest_sha256, *, fuel=False):
        return f"image-of-{sha256}"


@pytest.mark.asyncio
async def test_eviction_spares_running_and_incoming_components(device):
    places, _ = device

    def item(sha256):
        return Item(instance="web", target="components/a/web/1.0.0.wasm", length=1, sha256=sha256, manifest_sha256="")

    manifest = Manifest(name="web", version="1.0.0", trigger=Http())
    running = Committed(item=item("runs"), manifest=manifest, generation=1, assignment=1, at=NOW)
    coming = Change(
        instance="web", assignment=2, state=State(phase=Phase.COMPILING), item=item("comes"), manifest=manifest
    )
    standing = DeploymentState(committed={"web": running})
    standing.active["web"] = SimpleNamespace(change=coming)
    for directory, suffix in ((places.artifacts, "wasm"), (places.images, "cwasm")):
        directory.mkdir()
        for name in ("runs", "comes", "old"):
            stem = name if suffix == "wasm" else f"image-of-{name}"
            (directory / f"{stem}.{suffix}").write_bytes(b"x" * 1000)
    settings = Settings(disk=Disk(budget_bytes=10))
    sealed = SecretStore(places.secrets, places.identity / "sealing.key", who())
    freed = await effects.make_room(places, settings, Named(), standing, sealed)
    assert freed == 2000
    kept = {path.stem for directory in (places.artifacts, places.images) for path in directory.iterdir()}
    assert kept == {"runs", "comes", "image-of-runs", "image-of-comes"}


@pytest.mark.parametrize(
    ("ahead", "life", "due"),
    [
        (timedelta(), timedelta(days=90), False),
        (timedelta(days=-61), timedelta(days=90), True),
        (timedelta(days=730), timedelta(days=90), True),
        (timedelta(), timedelta(days=820), True),
    ],
    ids=["fresh", "two thirds over", "not valid yet", "valid for years"],
)
def test_a_certificate_that_a_wrong_clock_dated_is_renewed(device, monkeypatch, ahead, life, due):
    places, server = device
    monkeypatch.setattr(ca, "DEVICE_LIFE", life)
    monkeypatch.setattr(clock, "clock_synchronised", lambda: True)
    key = enrolment._load_key(places.identity).public_key()
    now = datetime.now(UTC)
    (places.identity / "device.pem").write_text(server.ca.device(key, "crane-0a1b2c3d", now=now + ahead).pem)
    assert enrolment.renewal_due(places.identity, ReferenceClock(now)) is due


def test_a_device_whose_own_clock_is_wrong_does_not_renew_for_it(device, monkeypatch):
    places, server = device
    monkeypatch.setattr(clock, "clock_synchronised", lambda: False)
    key = enrolment._load_key(places.identity).public_key()
    later = datetime.now(UTC) + timedelta(days=730)
    (places.identity / "device.pem").write_text(server.ca.device(key, "crane-0a1b2c3d", now=later).pem)
    assert not enrolment.renewal_due(places.identity, ReferenceClock(NOW))

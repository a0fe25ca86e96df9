"""Audit of a device's history: detects a server that changes, invents or withholds reports."""

from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from fleet.protocol import wire
from fleet.protocol.codes import Phase, RejectCode
from fleet.protocol.messages import Report
from signing import device_statements, dsse
from signing.device_statements import DeviceSigner, DeviceVerifier, Seen, audit
from signing.errors import KeyFileError, Rejected
from signing.keys import generate

NOW = datetime(2030, 1, 1, tzinfo=UTC)
CRANE, LIFT = "crane-0a1b2c3d", "lift-0a1b2c3d"


class Device:
    """Device key, certificate, and the reports signed so far."""

    def __init__(self, device=CRANE, key=None):
        self.device, self.key = device, ec.generate_private_key(ec.SECP256R1()) if key is None else key
        pem = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        self.signer = DeviceSigner(pem)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device)])
        algorithm = None if isinstance(self.key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self.key.public_key())
            .serial_number(1)
            .not_valid_before(NOW)
            .not_valid_after(NOW + timedelta(days=1))
            .sign(self.key, algorithm)
            .public_bytes(Encoding.PEM)
        )
        self.previous, self.sequence, self.reports = "", 0, []

    def report(self, phase=Phase.COMMITTED, **more):
        self.sequence += 1
        report = Report(
            device=self.device,
            boot_id="b",
            sequence=self.sequence,
            at=NOW + timedelta(minutes=self.sequence),
            assignment=1,
            instance="web",
            target=f"components/main/web/{self.sequence}.0.0.wasm",
            phase=phase,
            previous=self.previous,
        )
        payload = wire.encode(msgspec.structs.replace(report, **more))
        envelope = self.signer.sign(payload)
        if more.get("progress") is None:
            self.previous = dsse.parse(envelope).sha256
        self.reports.append(envelope)
        return envelope

    def audit(self, shown=None, seen=None):
        return audit(self.device, self.certificate, self.reports if shown is None else shown, seen)


@pytest.fixture(params=["P-256", "Ed25519"])
def device(request):
    made = Device(key=None if request.param == "P-256" else ed25519.Ed25519PrivateKey.generate())
    for _ in range(4):
        made.report()
    return made


def test_an_audit_shows_what_a_device_ran(device):
    verdict = device.audit()
    assert verdict.findings == ()
    assert verdict.notes == ()
    assert [report.sequence for report in verdict.ran()] == [1, 2, 3, 4]
    assert (verdict.seen.sequence, verdict.seen.key) == (4, DeviceVerifier(device.certificate).fingerprint)
    # A later audit, from the remembered state:
    device.report()
    assert device.audit(seen=verdict.seen).findings == ()


def test_skipped_progress_reports_are_not_a_gap(device):
    device.report(Phase.FETCHING, progress=40)
    device.report()
    shown = [*device.reports[:4], device.reports[5]]
    assert device.audit(shown).findings == ()


def changed(device):
    at = device.reports[2].index(b'"payload":"') + 40
    data = device.reports[2]
    return [*device.reports[:2], data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], device.reports[3]]


def invented(device):
    """Append a report that the server signed with a key of its own."""
    server = Device()
    server.sequence, server.previous = device.sequence, device.previous
    return [*device.reports, server.report()]


def of_another_device(device):
    """Append another device's report under this device's name."""
    return [*device.reports, Device(LIFT).report()]


def replayed_as_another_kind(device):
    """Append a statement that the device signed with another payload type."""
    payload = dsse.parse(device.reports[3]).payload
    return [*device.reports, dsse.sign("application/other", payload, [device.signer._signer])]


LIES = [
    ("one is changed", changed, "did not sign"),
    ("one is invented", invented, "did not sign"),
    ("another device's is shown", of_another_device, "did not sign"),
    ("a signature for something else", replayed_as_another_kind, "did not sign"),
    ("one is unsigned", lambda device: [*device.reports, dsse.parse(device.reports[0]).payload], "without a signature"),
    ("one is left out", lambda device: [*device.reports[:1], *device.reports[2:]], "left out"),
]


@pytest.mark.parametrize(("what", "lie", "words"), LIES, ids=[row[0] for row in LIES])
def test_a_server_that_changes_a_history_is_detected(device, what, lie, words):
    verdict = device.audit(lie(device))
    assert words in " ".join(verdict.findings), what


def test_a_report_shown_twice_counts_once(device):
    verdict = device.audit([*device.reports, *device.reports])
    assert verdict.findings == ()
    assert len(verdict.reports) == 4


def test_a_server_that_withholds_the_newest_reports_is_detected(device):
    seen = device.audit().seen
    verdict = device.audit(device.reports[:2], seen)
    assert "is no longer shown" in " ".join(verdict.findings)
    assert verdict.seen == seen, "what was seen stays remembered"


def test_a_server_that_has_deleted_the_oldest_reports_is_only_noted(device):
    verdict = device.audit(device.reports[2:])
    assert verdict.findings == ()
    assert "older ones are not shown" in verdict.notes[0]


def test_a_server_that_leaves_out_reports_since_the_last_audit_is_detected(device):
    seen = device.audit(device.reports[:1]).seen
    verdict = device.audit(device.reports[2:], seen)
    assert "left out" in " ".join(verdict.findings)


def test_a_key_other_than_the_first_seen_is_detected(device):
    other = Device()
    other.report()
    verdict = audit(CRANE, other.certificate, other.reports, device.audit().seen)
    assert "another key" in verdict.findings[0]
    assert verdict.reports == ()


def test_two_histories_of_the_same_key_are_detected(device):
    fork = Device(key=device.key)
    fork.sequence, fork.previous = 3, dsse.parse(device.reports[2]).sha256
    verdict = device.audit([*device.reports, fork.report(phase=Phase.ROLLED_BACK)])
    assert "follow the same one" in " ".join(verdict.findings)


def test_a_device_that_lost_its_store_starts_a_new_history_with_a_note(device):
    device.previous, device.sequence = "", 10
    device.report()
    verdict = device.audit()
    assert verdict.findings == ()
    assert "began a new history" in verdict.notes[0]


def test_an_unseen_device_without_reports_has_no_findings():
    device = Device()
    assert device.audit().seen == Seen(key=DeviceVerifier(device.certificate).fingerprint)


@pytest.mark.parametrize("data", [b"", b"{}", b'{"payloadType":1}', b"x" * (device_statements.ENVELOPE_MAX_BYTES + 1)])
def test_data_that_is_not_an_envelope_is_refused_with_a_code(device, data):
    with pytest.raises(Rejected) as verdict:
        DeviceVerifier(device.certificate).verify(data)
    assert verdict.value.code in {RejectCode.MALFORMED, RejectCode.TOO_LARGE}


def test_certificates_with_other_kinds_of_keys_are_refused(tmp_path):
    with pytest.raises(KeyFileError):
        DeviceSigner(b"no key")
    with pytest.raises(Rejected):
        DeviceVerifier(b"no certificate")
    generate(tmp_path / "key.pem")
    assert DeviceSigner((tmp_path / "key.pem").read_bytes()).sign(b"{}")


@pytest.mark.parametrize(
    ("field", "value"),
    [("at", datetime(2030, 1, 1)), ("sequence", 2**63), ("assignment", -1)],  # noqa: DTZ001
)
def test_an_unreadable_report_is_a_finding_and_the_audit_continues(device, field, value):
    """Older servers stored reports with values out of bounds and times without a zone."""
    before = device.audit()
    device.report(**{field: value})
    number = value if field == "sequence" else device.sequence
    device.report()
    verdict = device.audit()
    (finding,) = verdict.findings
    assert finding.startswith("1 reports that this device signed and that cannot be read: ")
    assert finding.endswith(f"number {number} of boot 'b'")
    assert verdict.bad == 1
    assert verdict.reports[:-1] == before.reports


@pytest.mark.parametrize("error", [TypeError, ValueError, OverflowError, RecursionError, KeyError, AttributeError])
def test_an_error_while_checking_a_record_is_a_finding_and_the_audit_continues(device, monkeypatch, error):
    before = device.audit()
    bad = device.report()
    real = DeviceVerifier.verify

    def verify(self, data, *more):
        if data == bad:
            raise error("boom")
        return real(self, data, *more)

    monkeypatch.setattr(DeviceVerifier, "verify", verify)
    verdict = device.audit()
    assert verdict.reports == before.reports
    assert verdict.findings == (f"1 reports that cannot be checked ({error.__name__}): number 5 of boot 'b'",)

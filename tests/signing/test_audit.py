"""What an operator can prove of a board's history when the server lies about it."""

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


class Board:
    """A board's key, certificate, and what it has signed so far."""

    def __init__(self, device=CRANE, key=None):
        self.device, self.key = device, ec.generate_private_key(ec.SECP256R1()) if key is None else key
        pem = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        self.voice = DeviceSigner(pem)
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
        self.previous, self.sequence, self.said = "", 0, []

    def say(self, phase=Phase.COMMITTED, **more):
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
        envelope = self.voice.sign(payload)
        if more.get("progress") is None:
            self.previous = dsse.parse(envelope).sha256
        self.said.append(envelope)
        return envelope

    def audit(self, shown=None, seen=None):
        return audit(self.device, self.certificate, self.said if shown is None else shown, seen)


@pytest.fixture(params=["P-256", "Ed25519"])
def board(request):
    made = Board(key=None if request.param == "P-256" else ed25519.Ed25519PrivateKey.generate())
    for _ in range(4):
        made.say()
    return made


def test_a_board_says_what_it_ran(board):
    verdict = board.audit()
    assert verdict.findings == ()
    assert verdict.notes == ()
    assert [report.sequence for report in verdict.ran()] == [1, 2, 3, 4]
    assert (verdict.seen.sequence, verdict.seen.key) == (4, DeviceVerifier(board.certificate).fingerprint)
    # And later, from what was remembered:
    board.say()
    assert board.audit(seen=verdict.seen).findings == ()


def test_progress_that_was_overtaken_on_the_board_is_no_gap(board):
    board.say(Phase.FETCHING, progress=40)
    board.say()
    shown = [*board.said[:4], board.said[5]]
    assert board.audit(shown).findings == ()


def changed(board):
    at = board.said[2].index(b'"payload":"') + 40
    data = board.said[2]
    return [*board.said[:2], data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], board.said[3]]


def invented(board):
    """The server signs with a key of its own."""
    server = Board()
    server.sequence, server.previous = board.sequence, board.previous
    return [*board.said, server.say()]


def of_another_board(board):
    """Another board's report, under this board's name."""
    return [*board.said, Board(LIFT).say()]


def replayed_as_another_kind(board):
    """What the board's key signed as something else is no report."""
    payload = dsse.parse(board.said[3]).payload
    return [*board.said, dsse.sign("application/other", payload, [board.voice._signer])]


LIES = [
    ("one is changed", changed, "did not sign"),
    ("one is invented", invented, "did not sign"),
    ("another board's is shown", of_another_board, "did not sign"),
    ("a signature for something else", replayed_as_another_kind, "did not sign"),
    ("one is unsigned", lambda board: [*board.said, dsse.parse(board.said[0]).payload], "without a signature"),
    ("one is left out", lambda board: [*board.said[:1], *board.said[2:]], "left out"),
]


@pytest.mark.parametrize(("what", "lie", "words"), LIES, ids=[row[0] for row in LIES])
def test_a_server_that_lies_about_a_board_is_found_out(board, what, lie, words):
    verdict = board.audit(lie(board))
    assert words in " ".join(verdict.findings), what


def test_a_replayed_report_is_the_same_report(board):
    verdict = board.audit([*board.said, *board.said])
    assert verdict.findings == ()
    assert len(verdict.reports) == 4


def test_a_server_that_takes_back_the_newest_reports_is_found_out(board):
    seen = board.audit().seen
    verdict = board.audit(board.said[:2], seen)
    assert "not shown any more" in " ".join(verdict.findings)
    assert verdict.seen == seen, "what was seen stays remembered"


def test_a_server_that_forgets_the_oldest_is_only_said_to(board):
    verdict = board.audit(board.said[2:])
    assert verdict.findings == ()
    assert "older ones are not shown" in verdict.notes[0]


def test_a_server_that_leaves_out_what_came_since_is_found_out(board):
    seen = board.audit(board.said[:1]).seen
    verdict = board.audit(board.said[2:], seen)
    assert "left out" in " ".join(verdict.findings)


def test_another_key_than_first_seen_is_found_out(board):
    other = Board()
    other.say()
    verdict = audit(CRANE, other.certificate, other.said, board.audit().seen)
    assert "another key" in verdict.findings[0]
    assert verdict.reports == ()


def test_two_histories_of_one_key_are_found_out(board):
    fork = Board(key=board.key)
    fork.sequence, fork.previous = 3, dsse.parse(board.said[2]).sha256
    verdict = board.audit([*board.said, fork.say(phase=Phase.ROLLED_BACK)])
    assert "follow the same one" in " ".join(verdict.findings)


def test_a_board_that_lost_its_store_begins_anew_and_that_is_said(board):
    board.previous, board.sequence = "", 10
    board.say()
    verdict = board.audit()
    assert verdict.findings == ()
    assert "began a new history" in verdict.notes[0]


def test_a_board_that_was_never_heard_of_has_nothing_to_prove():
    board = Board()
    assert board.audit().seen == Seen(key=DeviceVerifier(board.certificate).fingerprint)


@pytest.mark.parametrize("data", [b"", b"{}", b'{"payloadType":1}', b"x" * (device_statements.ENVELOPE_MAX_BYTES + 1)])
def test_what_is_no_envelope_is_refused_with_a_code(board, data):
    with pytest.raises(Rejected) as verdict:
        DeviceVerifier(board.certificate).verify(data)
    assert verdict.value.code in {RejectCode.MALFORMED, RejectCode.TOO_LARGE}


def test_keys_that_no_board_has(tmp_path):
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
def test_a_report_that_nobody_can_read_is_named_and_the_audit_goes_on(board, field, value):
    """Servers of before took what had no bounds, and times without a zone."""
    before = board.audit()
    board.say(**{field: value})
    number = value if field == "sequence" else board.sequence
    board.say()
    verdict = board.audit()
    (finding,) = verdict.findings
    assert finding.startswith("1 reports that this device signed and that cannot be read: ")
    assert finding.endswith(f"number {number} of boot 'b'")
    assert verdict.bad == 1
    assert verdict.reports[:-1] == before.reports


@pytest.mark.parametrize("error", [TypeError, ValueError, OverflowError, RecursionError, KeyError, AttributeError])
def test_a_record_that_raises_whatever_error_is_named_and_the_audit_goes_on(board, monkeypatch, error):
    before = board.audit()
    bad = board.say()
    real = DeviceVerifier.verify

    def verify(self, data, *more):
        if data == bad:
            raise error("boom")
        return real(self, data, *more)

    monkeypatch.setattr(DeviceVerifier, "verify", verify)
    verdict = board.audit()
    assert verdict.reports == before.reports
    assert verdict.findings == (f"1 reports that cannot be judged ({error.__name__}): number 5 of boot 'b'",)

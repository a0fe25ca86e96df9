"""Statements of a device, signed by its device key; audit of a device's report chain.

A report travels in a DSSE envelope signed by the key of the device's certificate (P-256 or Ed25519), so neither a
broker nor a server can forge what a device runs. The payload is the report's JSON; nothing in it is trusted before
`DeviceVerifier.verify` has returned it.

Each report names the sha256 of the one before it. Anyone who remembers the device's key and the newest report seen can
therefore detect a report that the server left out, changed or forged. The audit is pure: what the server shows and what
is remembered go in, findings and the new memory come out. A progress report ("40 %") may be replaced on the device
before it is sent, so progress reports are signed but are not part of the chain.
"""

import functools
import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from securesystemslib.signer import CryptoSigner

from fleet.protocol import bounds, wire
from fleet.protocol.codes import Phase, RejectCode
from fleet.protocol.messages import Report
from signing import dsse
from signing.errors import KeyFileError, Rejected

REPORT_TYPE: Final = "application/vnd.wasmfleet.report.v1+json"
ENVELOPE_MAX_BYTES: Final = bounds.REPORT_MAX_BYTES * 4 // 3 + bounds.KIB
_P256_BITS: Final = 256
_NAMED_MAX: Final = 10
_NAME_CHARS: Final = 40
_WORDS_CHARS: Final = 120
_ECDSA: Final = ECDSA(SHA256())
_START: Final = b'{"payloadType"'


class DeviceSigner:
    """Signer of a device's statements, with its device key."""

    def __init__(self, pem: bytes) -> None:
        """Read a device key.

        Args:
            pem: content of the key file, PKCS#8.

        Raises:
            KeyFileError: not a private key, or neither P-256 nor Ed25519.
        """
        try:
            key = load_pem_private_key(pem, password=None)
        except (ValueError, TypeError) as error:
            raise KeyFileError(f"the device key cannot be read: {error}") from error
        if not isinstance(key, EllipticCurvePrivateKey | Ed25519PrivateKey):
            raise KeyFileError("the device key is neither P-256 nor Ed25519: enrol the device again")
        self._signer = CryptoSigner(key)

    def sign(self, statement: bytes, payload_type: str = REPORT_TYPE) -> bytes:
        """Sign a statement (by default a report's JSON) and return its DSSE envelope."""
        return dsse.sign(payload_type, statement, [self._signer])


class DeviceVerifier:
    """Verifier for one device's statements.

    Attributes:
        fingerprint: sha256 of the public key (SubjectPublicKeyInfo, DER) in hex; pinned when first seen.
    """

    def __init__(self, certificate: bytes) -> None:
        """Read the device's certificate (PEM).

        Raises:
            Rejected: MALFORMED: not a certificate, or its key is neither P-256 nor Ed25519.
        """
        try:
            key = x509.load_pem_x509_certificate(certificate).public_key()
        except ValueError as error:
            raise Rejected(RejectCode.MALFORMED, f"the device's certificate cannot be read: {error}") from error
        if isinstance(key, EllipticCurvePublicKey) and key.key_size == _P256_BITS:
            self._verify: Callable[[bytes, bytes], None] = functools.partial(_ecdsa, key)
        elif isinstance(key, Ed25519PublicKey):
            self._verify = key.verify
        else:
            raise Rejected(RejectCode.MALFORMED, "the device's key is neither P-256 nor Ed25519")
        der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self.fingerprint = hashlib.sha256(der).hexdigest()

    def verify(self, data: bytes, payload_type: str = REPORT_TYPE) -> bytes:
        """Verify an envelope and return the statement in it (by default a report's JSON).

        Raises:
            Rejected: TOO_LARGE, MALFORMED; UNSIGNED: signed by another key, or as another type of statement.
        """
        envelope = dsse.parse(data, max_bytes=ENVELOPE_MAX_BYTES)
        if envelope.payload_type != payload_type:
            raise Rejected(RejectCode.UNSIGNED, f"signed as {envelope.payload_type[:80]!r}, not as {payload_type}")
        for signature in envelope.signatures.values():
            try:
                self._verify(bytes.fromhex(signature.signature), envelope.pae)
            except InvalidSignature:
                continue
            return envelope.payload
        raise Rejected(RejectCode.UNSIGNED, "the statement is not signed by this device's key")


def _ecdsa(key: EllipticCurvePublicKey, signature: bytes, data: bytes) -> None:
    """Verify with a parsed key: parsing it again would cost half as much as the verification."""
    key.verify(signature, data, _ECDSA)


def is_signed(data: bytes) -> bool:
    """Return whether `data` looks like an envelope, without verifying the signature."""
    return data.startswith(_START)


def unverified(data: bytes) -> bytes:
    """Return the report's JSON from stored bytes, in an envelope or not, without verifying them again.

    Raises:
        Rejected: MALFORMED.
    """
    return dsse.parse(data, max_bytes=ENVELOPE_MAX_BYTES).payload if is_signed(data) else data


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """Newest state of a device's history that an operator's machine has seen.

    Attributes:
        key: fingerprint of the device's key when it was first seen.
        sequence: number of the newest report seen; 0 for none.
        sha256: hash of that report; empty for none.
    """

    key: str
    sequence: int = 0
    sha256: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Result of an audit.

    Attributes:
        findings: evidence of tampering, as sentences; empty when the history is intact.
        bad: number of bad records.
        notes: observations that prove nothing.
        reports: the verified reports, in the order of the chain.
        seen: the state to remember.
    """

    findings: tuple[str, ...]
    notes: tuple[str, ...]
    reports: tuple[Report, ...]
    seen: Seen
    bad: int = 0

    def ran(self) -> tuple[Report, ...]:
        """Return the reports that changed what the device runs: commits, removals and rollbacks."""
        ends = (Phase.COMMITTED, Phase.ROLLED_BACK)
        return tuple(each for each in self.reports if each.phase in ends or (each.instance and each.code is not None))


@dataclass(frozen=True, slots=True)
class _Link:
    report: Report
    sha256: str


def audit(device: str, certificate: bytes, shown: Iterable[bytes], seen: Seen | None) -> Verdict:
    """Check one device's history against what is remembered of it.

    Args:
        device: the device's id.
        certificate: the device's certificate (PEM) as the server shows it.
        shown: the device's reports as the server stored them, in any order.
        seen: what is remembered of the device; None the first time.

    Raises:
        Rejected: MALFORMED: the certificate cannot be read.
    """
    verifier = DeviceVerifier(certificate)
    if seen is not None and seen.key != verifier.fingerprint:
        finding = f"the server shows another key ({verifier.fingerprint[:16]}) than was first seen ({seen.key[:16]})"
        return Verdict(findings=(finding,), notes=(), reports=(), seen=seen)
    links, unread, wrong = _links(device, verifier, shown)
    links.sort(key=lambda link: (link.report.sequence, link.report.at))
    known = seen or Seen(key=verifier.fingerprint)
    more, notes = _chain(links, known, unread)
    last = max(links, key=lambda link: (link.report.at, link.report.sequence), default=None)
    if last is not None and not more:
        known = msgspec.structs.replace(known, sequence=last.report.sequence, sha256=last.sha256)
    reports = tuple(link.report for link in links)
    findings = [f"{len(named)} reports {what}: {_some(named)}" for what, named in sorted(wrong.items())]
    bad = sum(map(len, wrong.values()))
    return Verdict(findings=(*findings, *more), notes=tuple(notes), reports=reports, seen=known, bad=bad)


def _links(
    device: str, verifier: DeviceVerifier, shown: Iterable[bytes]
) -> tuple[list[_Link], set[str], dict[str, list[str]]]:
    """Verify the records and drop reports of mere progress; no bad record prevents the others from being verified.

    Returns:
        This device's reports; the sha256 of reports that it signed but that cannot be parsed; and for each kind of
        fault, the names of the bad records.
    """
    links: dict[str, _Link] = {}
    unread: set[str] = set()
    wrong: defaultdict[str, list[str]] = defaultdict(list)
    for data in shown:
        try:
            fault, report, sha256 = _check(device, verifier, data)
        except Exception as error:  # noqa: BLE001 - a bug, ours or a library's: reported, without ending the audit
            fault, report, sha256 = f"that cannot be checked ({type(error).__name__})", None, ""
        if fault:
            wrong[fault].append(_name(data))
        if fault == _UNREADABLE:
            unread.add(sha256)
        elif not fault and report is not None and report.progress is None:
            links[sha256] = _Link(report, sha256)
    return list(links.values()), unread, wrong


_UNREADABLE: Final = "that this device signed and that cannot be read"


def _check(device: str, verifier: DeviceVerifier, data: bytes) -> tuple[str, Report | None, str]:
    """Return the fault of a record (empty for none), the report, and the sha256 of the signed payload."""
    if not is_signed(data):
        return "without a signature", None, ""
    try:
        payload = verifier.verify(data)
    except Rejected:
        return "that this device did not sign", None, ""
    sha256 = hashlib.sha256(payload).hexdigest()
    try:
        report = wire.decode(Report, payload)
    except wire.WireError:
        return _UNREADABLE, None, sha256
    return ("" if report.device == device else "about another device"), report, sha256


def _name(data: bytes) -> str:
    """Name a record for people: by its number, the server's text, or its hash."""
    try:
        content = msgspec.json.decode(unverified(data), type=dict[str, Any] | str)
    except (Rejected, *wire.JSON_ERRORS):
        content = {}
    if isinstance(content, str):
        return repr(content[:_WORDS_CHARS])
    number = content.get("sequence")
    if not isinstance(number, int | float):
        return f"sha256 {hashlib.sha256(data).hexdigest()[:16]}"
    return f"number {str(number)[:_NAME_CHARS]} of boot {str(content.get('boot_id', ''))[:_NAME_CHARS]!r}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED_MAX]) + (", ..." if len(names) > _NAMED_MAX else "")


def _chain(links: Sequence[_Link], known: Seen, unread: set[str]) -> tuple[list[str], list[str]]:
    """Look for gaps, forks and withdrawn reports; return findings and notes."""
    findings: list[str] = []
    notes: list[str] = []
    shown = unread | {link.sha256 for link in links}
    named = Counter(link.report.previous for link in links if link.report.previous)
    findings += [f"two reports follow the same one ({sha256[:16]})" for sha256, count in named.items() if count > 1]
    oldest = True
    for link in links:
        previous = link.report.previous
        if previous == "" and (link.report.sequence > 1 or not oldest):
            notes.append(f"the device began a new history on {link.report.at:%Y-%m-%d %H:%M} UTC: its store was lost")
        elif previous and previous not in shown and previous != known.sha256:
            if not oldest or 0 < known.sequence < link.report.sequence:
                findings.append(f"reports before number {link.report.sequence} are left out")
            else:
                notes.append(f"the history begins with report {link.report.sequence}: older ones are not shown")
        oldest = False
    if known.sha256 and known.sha256 not in shown and known.sha256 not in named:
        findings.append(f"report {known.sequence}, which was seen before, is no longer shown")
    return findings, notes

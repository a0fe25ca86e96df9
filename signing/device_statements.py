"""Statements of a device, signed by its device key; audit of a device's report chain.

A report travels in a DSSE envelope under the key of the device's certificate (P-256, or Ed25519), so neither a broker
nor a server can invent what a device runs. The payload is the report's own JSON; nothing of it is trusted before
`DeviceVerifier.verify` returned it.

Each report names the sha256 of the one before it, so a server that leaves one out, changes one or invents one is found
out by whoever remembers the device's key and the newest report that was seen. The audit is pure: what the server shows
and what is remembered go in, findings and what is to be remembered come out. A progress report ("40 %") may be
overtaken on the device before it was ever sent; it is signed, and no link of the chain.
"""

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

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
from signing.dsse import parse
from signing.errors import KeyFileError, Rejected

REPORT_TYPE: Final = "application/vnd.wasmfleet.report.v1+json"
ENVELOPE_MAX_BYTES: Final = bounds.REPORT_MAX_BYTES * 4 // 3 + bounds.KIB
_P256_BITS: Final = 256
_ECDSA: Final = ECDSA(SHA256())
_START: Final = b'{"payloadType"'


class DeviceSigner:
    """Signer of a device's statements, with its device key."""

    def __init__(self, pem: bytes) -> None:
        """Read the device key's file.

        Raises:
            KeyFileError: no private key, or one of a kind that no device has.
        """
        try:
            key = load_pem_private_key(pem, password=None)
        except (ValueError, TypeError) as error:
            raise KeyFileError(f"the device key cannot be read: {error}") from error
        if not isinstance(key, EllipticCurvePrivateKey | Ed25519PrivateKey):
            raise KeyFileError("the device key is neither of P-256 nor of Ed25519: enrol the device anew")
        self._signer = CryptoSigner(key)

    def sign(self, said: bytes, payload_type: str = REPORT_TYPE) -> bytes:
        """Sign a report's JSON, or another statement, and return the envelope."""
        return dsse.sign(payload_type, said, [self._signer])


class DeviceVerifier:
    """Verifier of one device's statements.

    Attributes:
        fingerprint: sha256 of the public key (SubjectPublicKeyInfo, DER) in hex, compared from first sight on.
    """

    def __init__(self, certificate: bytes) -> None:
        """Read the device's certificate, PEM.

        Raises:
            Rejected: MALFORMED: no certificate, or a key of another kind.
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
            raise Rejected(RejectCode.MALFORMED, "the device's key is neither of P-256 nor of Ed25519")
        der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self.fingerprint = hashlib.sha256(der).hexdigest()

    def verify(self, data: bytes, payload_type: str = REPORT_TYPE) -> bytes:
        """Return the report's JSON, or another statement, in an envelope that this device signed.

        Raises:
            Rejected: TOO_LARGE, MALFORMED; UNSIGNED for what another key signed, or signed as something else.
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
        raise Rejected(RejectCode.UNSIGNED, "it is not signed by this device's key")


def _ecdsa(key: EllipticCurvePublicKey, signature: bytes, data: bytes) -> None:
    """Verify with a key that was parsed once: parsing costs as much as half of the verification."""
    key.verify(signature, data, _ECDSA)


def is_signed(data: bytes) -> bool:
    """Return whether data look like an envelope; the signature may still be anybody's."""
    return data.startswith(_START)


def unverified(data: bytes) -> bytes:
    """Return the report's JSON, in an envelope or not, from bytes that were verified before they were stored.

    Raises:
        Rejected: MALFORMED.
    """
    return dsse.parse(data, max_bytes=ENVELOPE_MAX_BYTES).payload if is_signed(data) else data


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of one device on an operator's machine.

    Attributes:
        key: fingerprint of its key, from first sight on.
        sequence, sha256: of the newest report that was seen; 0 and empty for none.
    """

    key: str
    sequence: int = 0
    sha256: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Result of an audit.

    Attributes:
        findings: what does not hold, as sentences; none when the history is the device's own.
        notes: what is worth knowing and proves nothing.
        reports: those that hold, in the order of the chain.
        seen: what is to be remembered.
    """

    findings: tuple[str, ...]
    notes: tuple[str, ...]
    reports: tuple[Report, ...]
    seen: Seen

    def ran(self) -> tuple[Report, ...]:
        """Return what the device ran, and from when on: commits, removals and rollbacks."""
        ends = (Phase.COMMITTED, Phase.ROLLED_BACK)
        return tuple(each for each in self.reports if each.phase in ends or (each.instance and each.code is not None))


@dataclass(frozen=True, slots=True)
class _Link:
    report: Report
    sha256: str


def audit(device: str, certificate: bytes, shown: Iterable[bytes], seen: Seen | None) -> Verdict:
    """Check one device's history.

    Args:
        device: its id.
        certificate: of the device, PEM, as the server shows it.
        shown: its reports as the server stored them, in any order.
        seen: what is remembered of it; None at first sight.

    Raises:
        Rejected: MALFORMED: the certificate cannot be read.
    """
    ear = DeviceVerifier(certificate)
    if seen is not None and seen.key != ear.fingerprint:
        words = f"the server shows another key ({ear.fingerprint[:16]}) than was first seen ({seen.key[:16]})"
        return Verdict(findings=(words,), notes=(), reports=(), seen=seen)
    links, unread, findings = _links(device, ear, shown)
    links.sort(key=lambda link: (link.report.sequence, link.report.at))
    known = seen or Seen(key=ear.fingerprint)
    more, notes = _chain(links, known, unread)
    last = max(links, key=lambda link: (link.report.at, link.report.sequence), default=None)
    if last is not None and not more:
        known = msgspec.structs.replace(known, sequence=last.report.sequence, sha256=last.sha256)
    reports = tuple(link.report for link in links)
    return Verdict(findings=(*findings, *more), notes=tuple(notes), reports=reports, seen=known)


def _links(device: str, ear: DeviceVerifier, shown: Iterable[bytes]) -> tuple[list[_Link], set[str], list[str]]:
    """Sort out what was shown.

    Returns:
        The reports that are this device's, without those of mere progress; the sha256 of those that it signed and
        nobody can read; what is wrong with the others.
    """
    links: dict[str, _Link] = {}
    unread: set[str] = set()
    wrong: Counter[str] = Counter()
    for data in shown:
        if not is_signed(data):
            wrong["without a signature"] += 1
            continue
        try:
            said = ear.verify(data)
        except Rejected:
            wrong["that this device did not sign"] += 1
            continue
        try:
            report = wire.decode(Report, said)
        except wire.WireError:
            wrong["that this device signed and nobody can read"] += 1
            unread.add(hashlib.sha256(said).hexdigest())
            continue
        if report.device != device:
            wrong["about another device"] += 1
        elif report.progress is None:
            sha256 = parse(data, max_bytes=ENVELOPE_MAX_BYTES).sha256
            links[sha256] = _Link(report, sha256)
    return list(links.values()), unread, [f"{count} reports {what}" for what, count in sorted(wrong.items())]


def _chain(links: Sequence[_Link], known: Seen, unread: set[str]) -> tuple[list[str], list[str]]:
    """Gaps, forks and what was taken back; and what is only to be noted."""
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
        findings.append(f"report {known.sequence}, which was seen before, is not shown any more")
    return findings, notes

"""The issuing CA: what a server issues certificates with, while the root's key stays with the operator.

Its key is made on the server and never leaves it; the operator signs its request with the root, for at most 90 days,
for the server's own names, and for nothing below it. Boards pin the root, so another issuing CA needs no enrolment.

    pem = request(server_directory, hosts)              # on the server
    signed = sign(root, pem, now=now)                   # where the root's key is
    install(server_directory, signed, now=now)          # on the server again

What is accepted is a list (`issuers/`): an issuing CA that was stolen is taken off it, and every certificate made with
it counts for nothing, except that a board may renew with a key that is enrolled.
"""

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat, load_pem_private_key, pkcs12
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fleet.ca import (
    CaError,
    CertificateAuthority,
    builder,
    make_root,
    private_pem,
    read_certificate,
    san,
    serial,
    usage,
    write_secret,
)

LIFE: Final = timedelta(days=90)
WARN: Final = timedelta(days=30)
"""How long before its end the operator is told to renew it."""
_ROUNDS: Final = 600_000
_REQUEST_MAX_BYTES: Final = 16 * 1024
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Root:
    """The fleet's root with its key: on the operator's machine, encrypted."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate


def create(fleet: str, *, now: datetime) -> Root:
    """A new root."""
    return Root(*make_root(fleet, now=now))


def store(path: Path, key: ec.EllipticCurvePrivateKey, passphrase: bytes) -> None:
    """Write the root's key, encrypted (PKCS#12, 600,000 rounds), to a new file of mode 0600."""
    if path.exists():
        raise CaError(f"{path} exists: a key is never overwritten")
    strong = (
        PrivateFormat.PKCS12.encryption_builder()
        .kdf_rounds(_ROUNDS)
        .key_cert_algorithm(pkcs12.PBES.PBESv2SHA256AndAES256CBC)
        .hmac_hash(hashes.SHA256())
        .build(passphrase)
    )
    write_secret(path, pkcs12.serialize_key_and_certificates(b"wasmfleet CA", key, None, None, strong))


def open_root(path: Path, certificate: Path, passphrase: bytes | None) -> Root:
    """The root from the operator's files.

    Raises:
        CaError: not there, another fleet's, or the passphrase is missing or wrong.
    """
    root = read_certificate(certificate)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CaError(f"the CA's root key is not here ({path}: {error.strerror}): run this where it is") from error
    if passphrase is None:
        raise CaError(f"{path} is encrypted: give its passphrase")
    try:
        key = pkcs12.load_key_and_certificates(data, passphrase)[0]
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise CaError(f"{path} is no key of a CA, or the passphrase is wrong") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != root.public_key():
        raise CaError(f"{path} is not the key of {certificate}")
    return Root(key, root)


def request(directory: Path, hosts: Iterable[str]) -> str:
    """A request for the next issuing CA of a server; its key is made once and waits as `next.key`."""
    path = directory / "next.key"
    if path.exists():
        key = load_pem_private_key(path.read_bytes(), password=None)
    else:
        key = ec.generate_private_key(ec.SECP256R1())
        write_secret(path, private_pem(key))
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CaError(f"{path} is no key of a CA: remove it")
    names = [san(host) for host in dict.fromkeys((*hosts, *_LOOPBACK))]
    made = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "issuing CA")]))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(Encoding.PEM).decode()


def asked(pem: str) -> tuple[str, ...]:
    """The names for which a request wants to issue server certificates; raises `CaError`."""
    return tuple(str(name.value) for name in _names(_read_request(pem)))


def sign(root: Root, pem: str, *, now: datetime, life: timedelta = LIFE) -> str:
    """The issuing CA that a request asks for, PEM: constrained in length, purpose and names.

    Raises:
        CaError: no sound request, a life beyond 90 days, or a root that allows none below it.
    """
    constraints = root.certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    if constraints.path_length == 0:
        raise CaError("this fleet's root allows no issuing CA below it: it was made by an earlier wasmfleet")
    if life > LIFE:
        raise CaError(f"an issuing CA lives {LIFE.days} days at the most")
    wanted = _read_request(pem)
    key = wanted.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise CaError("an issuing CA has an EC key")
    name = x509.Name(
        [
            *root.certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME),
            x509.NameAttribute(NameOID.COMMON_NAME, f"issuing CA of {now:%Y-%m-%d %H:%M:%S}"),
        ]
    )
    identifier = root.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    made = (
        builder(name, root.certificate.subject, key, now, life)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage(sign_certificates=True), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.NameConstraints([_subtree(each) for each in _names(wanted)], None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(root.key, hashes.SHA256())
    )
    return made.public_bytes(Encoding.PEM).decode()


def install(directory: Path, pem: str, *, now: datetime) -> x509.Certificate:
    """Put an issuing CA that was signed for this server's request in place; the ones before stay accepted.

    Raises:
        CaError: not below this fleet's root, not for the request that waits, or over already.
    """
    try:
        made = x509.load_pem_x509_certificate(pem.encode())
        made.verify_directly_issued_by(read_certificate(directory / "ca.pem"))
    except (ValueError, TypeError, InvalidSignature) as error:
        raise CaError("this is no issuing CA below this fleet's root") from error
    constraints = made.extensions.get_extension_for_class(x509.BasicConstraints).value
    if not constraints.ca or made.not_valid_after_utc <= now:
        raise CaError(f"this certificate cannot issue: it ended on {made.not_valid_after_utc:%Y-%m-%d}, or is no CA")
    try:
        key = load_pem_private_key((directory / "next.key").read_bytes(), password=None)
    except OSError as error:
        raise CaError("no request waits for this issuing CA: run fleet ca renew again") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != made.public_key():
        raise CaError("this issuing CA is for another request: run fleet ca renew again")
    accept(directory, made, key, until=made.not_valid_after_utc, now=now)
    forget_ended(directory, now=now)
    write_secret(directory / "issuing.key", private_pem(key))
    (directory / "issuing.pem").write_bytes(made.public_bytes(Encoding.PEM))
    (directory / "next.key").unlink()
    return made


def accept(
    directory: Path, issuer: x509.Certificate, key: ec.EllipticCurvePrivateKey, *, until: datetime, now: datetime
) -> None:
    """Put an issuer on the list of those whose certificates count, with its revocation list, valid for as long."""
    place = directory / "issuers"
    place.mkdir(mode=0o700, exist_ok=True)
    identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    crl = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.subject)
        .last_update(issuer.not_valid_before_utc)
        .next_update(max(until, now + timedelta(days=1)))
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .add_extension(x509.CRLNumber(int(now.timestamp())), critical=False)
        .sign(key, hashes.SHA256())
    )
    (place / f"{serial(issuer)}.crl").write_bytes(crl.public_bytes(Encoding.PEM))
    (place / f"{serial(issuer)}.pem").write_bytes(issuer.public_bytes(Encoding.PEM))


def revoke(directory: Path, number: str) -> None:
    """Take an issuing CA off the list: certificates made with it count for nothing.

    Raises:
        CaError: it is not on the list, or is the one in use.
    """
    if serial(read_certificate(directory / "issuing.pem")) == number:
        raise CaError("this issuing CA is in use: make its successor first (fleet ca renew), then revoke it")
    path = directory / "issuers" / f"{number}.pem"
    if not number.isalnum() or not path.exists():
        raise CaError(f"no issuing CA {number[:40]!r} is accepted: fleet ca status lists them")
    path.unlink()
    path.with_suffix(".crl").unlink(missing_ok=True)


def forget_ended(directory: Path, *, now: datetime) -> None:
    """Take what has ended off the list: nothing made with it is valid any more."""
    for path in (directory / "issuers").glob("*.crl"):
        if (x509.load_pem_x509_crl(path.read_bytes()).next_update_utc or now) <= now:
            path.with_suffix(".pem").unlink(missing_ok=True)
            path.unlink()


def warnings(ca: CertificateAuthority, *, now: datetime) -> list[str]:
    """What an operator should know of a server's issuing CA: that it ends soon, or has ended."""
    ends = ca.issuer.not_valid_after_utc
    if ca.is_root or ends - now > WARN:
        return []
    if ends <= now:
        return [f"the issuing CA ended on {ends:%Y-%m-%d}: no board can connect until 'fleet ca renew'"]
    return [f"the issuing CA ends on {ends:%Y-%m-%d}: sign the next one with 'fleet ca renew'"]


def _read_request(pem: str) -> x509.CertificateSigningRequest:
    try:
        found = x509.load_pem_x509_csr(pem[:_REQUEST_MAX_BYTES].encode())
        sound = found.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise CaError(f"this is no request of a server: {error}") from error
    if not sound:
        raise CaError("the request is not signed by its own key")
    return found


def _names(found: x509.CertificateSigningRequest) -> list[x509.DNSName | x509.IPAddress]:
    try:
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound as error:
        raise CaError("the request names no host") from error
    return [name for name in names if isinstance(name, x509.DNSName | x509.IPAddress)]


def _subtree(name: x509.DNSName | x509.IPAddress) -> x509.GeneralName:
    if isinstance(name, x509.DNSName):
        return name
    return x509.IPAddress(ipaddress.ip_network(str(name.value)))

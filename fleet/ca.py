"""The fleet's certificate authority: who may connect. It says nothing about what may run; that is `signing`'s.

One CA a fleet, EC P-256, made once. It gives certificates to the server's listeners (names in SAN), to the server
itself as a client of its broker, and to boards: a board's CN is its id, and nothing of its request but the key is used.
Certificates carry what strict verification asks for (RFC 5280, sections 4.2.1.1 to 4.2.1.3 and 4.2.1.9).
"""

import ipaddress
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_LIFE: Final = timedelta(days=3650)
SERVER_LIFE: Final = timedelta(days=90)
DEVICE_LIFE: Final = timedelta(days=90)
BACKDATED: Final = timedelta(hours=1)
"""How far a certificate's start lies back, so that a clock that is a little slow accepts it."""
SERVER_CN: Final = "fleet-server"
"""The server's own name on its broker; no device id looks like this."""
_CSR_MAX_BYTES: Final = 16 * 1024

DeviceKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey


class CaError(Exception):
    """The CA's own files cannot be used."""


class BadRequestError(ValueError):
    """A certificate request that cannot be accepted; one sentence for people."""


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate that was given out; `serial` in hex, times in UTC."""

    serial: str
    not_after: datetime
    pem: str


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate with its private key, both PEM."""

    certificate_pem: bytes
    key_pem: bytes


class CertificateAuthority:
    """The fleet's CA with its key."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self._certificate = certificate

    @classmethod
    def create(cls, directory: Path, *, fleet: str, now: datetime) -> "CertificateAuthority":
        """Make the CA and write `ca.pem` and `ca.key` (0600) into a directory."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "wasmfleet"),
                x509.NameAttribute(NameOID.COMMON_NAME, f"{fleet} fleet CA"),
            ]
        )
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        certificate = (
            _builder(name, name, key.public_key(), now, CA_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(sign_certificates=True), critical=True)
            .add_extension(identifier, critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
            .sign(key, hashes.SHA256())
        )
        write_secret(directory / "ca.key", _private_pem(key))
        (directory / "ca.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
        return cls(key, certificate)

    @classmethod
    def load(cls, directory: Path) -> "CertificateAuthority":
        """Read the CA from its directory.

        Raises:
            CaError: files missing, damaged, or not belonging to each other.
        """
        try:
            key = load_pem_private_key((directory / "ca.key").read_bytes(), password=None)
            certificate = x509.load_pem_x509_certificate((directory / "ca.pem").read_bytes())
        except OSError as error:
            raise CaError(f"cannot read the CA in {directory}: {error.strerror}") from error
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise CaError(f"the CA in {directory} is damaged: {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise CaError(f"ca.key and ca.pem in {directory} do not belong to each other")
        return cls(key, certificate)

    @property
    def pem(self) -> str:
        """The CA's certificate."""
        return self._certificate.public_bytes(Encoding.PEM).decode()

    @property
    def sha256(self) -> str:
        """The sha256 of its certificate as DER, in hex: what enrolment tokens pin."""
        return self._certificate.fingerprint(hashes.SHA256()).hex()

    def server(self, hosts: Iterable[str], *, now: datetime) -> Pair:
        """A certificate for the server's listeners, valid for these host names and addresses and for loopback."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = dict.fromkeys([*hosts, "localhost", "127.0.0.1", "::1"])
        certificate = self._leaf(
            key.public_key(),
            SERVER_CN,
            ExtendedKeyUsageOID.SERVER_AUTH,
            now,
            SERVER_LIFE,
            [_san(name) for name in names],
        )
        return Pair(certificate.public_bytes(Encoding.PEM), _private_pem(key))

    def server_client(self, *, now: datetime) -> Pair:
        """A certificate with which the server connects to its broker."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._leaf(key.public_key(), SERVER_CN, ExtendedKeyUsageOID.CLIENT_AUTH, now, SERVER_LIFE)
        return Pair(certificate.public_bytes(Encoding.PEM), _private_pem(key))

    def device(self, key: DeviceKey, device: str, *, now: datetime) -> Issued:
        """A certificate for a board's key; CN is its id."""
        certificate = self._leaf(key, device, ExtendedKeyUsageOID.CLIENT_AUTH, now, DEVICE_LIFE)
        pem = certificate.public_bytes(Encoding.PEM).decode()
        return Issued(serial(certificate), certificate.not_valid_after_utc, pem)

    def _leaf(
        self,
        key: DeviceKey,
        name: str,
        purpose: x509.ObjectIdentifier,
        now: datetime,
        life: timedelta,
        alternatives: list[x509.GeneralName] | None = None,
    ) -> x509.Certificate:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        issuer = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        builder = (
            _builder(subject, self._certificate.subject, key, now, life)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(sign_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), critical=False)
        )
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        return builder.sign(self._key, hashes.SHA256())


def read_request(pem: str) -> DeviceKey:
    """The key of a PKCS#10 request (RFC 2986) that was signed with it.

    Raises:
        BadRequestError: not a request, not signed by its own key, or a key other than P-256 and Ed25519.
    """
    if len(pem) > _CSR_MAX_BYTES:
        raise BadRequestError("the certificate request is too large")
    try:
        request = x509.load_pem_x509_csr(pem.encode())
        key = request.public_key()
        sound = request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise BadRequestError(f"not a certificate request: {error}") from error
    if not sound:
        raise BadRequestError("the certificate request is not signed by its own key")
    if isinstance(key, ed25519.Ed25519PublicKey) or (
        isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)
    ):
        return key
    raise BadRequestError("a board's key must be EC P-256 or Ed25519")


def key_der(key: DeviceKey) -> bytes:
    """A public key as SubjectPublicKeyInfo, DER."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def serial(certificate: x509.Certificate) -> str:
    """A certificate's serial number in hex."""
    return f"{certificate.serial_number:x}"


def due(pem: bytes, *, now: datetime) -> bool:
    """Whether a certificate has used up two thirds of its life."""
    certificate = x509.load_pem_x509_certificate(pem)
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    return now >= certificate.not_valid_before_utc + life * 2 / 3


def write_secret(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read, from its first byte on."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        os.fchmod(handle, 0o600)
        file.write(data)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: DeviceKey, now: datetime, life: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + life)
    )


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _san(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return x509.DNSName(name)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

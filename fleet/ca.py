"""Certificate authority of a fleet: root and issuing CA.

Certificates say who may connect; `signing` says what may run.

Each fleet has one root, EC P-256, made once, which devices and operators pin. In production the root's key stays with
the operator, and the server issues with an issuing CA below it; in a development fleet the server issues with the
root. Certificates go to the server's listeners (names in SAN), to the server itself as a client of its broker, and to
devices: a device's CN is its id, and of its request only the key is used. Certificates have the extensions that strict
verification requires (RFC 5280, sections 4.2.1.1 to 4.2.1.3 and 4.2.1.9).

    ca.pem        the root's certificate
    ca.key        its key, in a development fleet
    issuing.pem   the issuing CA, with issuing.key; in production
    next.key      the key of a request for the next issuing CA
    issuers/      the issuing CAs whose certificates are accepted, each with its revocation list

The issuing CA's key is made on the server and never leaves it; the operator signs its request with the root, for at
most 90 days, for the server's own names, and for no CA below it. Devices pin the root, so a new issuing CA needs no
enrolment.

    pem = request(server_directory, hosts)              # on the server
    signed = sign(root, pem, now=now)                   # where the root's key is
    install(server_directory, signed, now=now)          # on the server again

A stolen issuing CA is removed from `issuers/`: certificates made with it are no longer accepted, except that a device
may renew with a key that is enrolled.
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
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    pkcs12,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fleet.protocol.files import RESTORE, atomic_write, create_exclusive, damage, move_into_place, set_aside

CA_LIFE: Final = timedelta(days=3650)
SERVER_LIFE: Final = timedelta(days=90)
DEVICE_LIFE: Final = timedelta(days=90)
BACKDATED: Final = timedelta(hours=1)
"""Time by which a certificate's start lies back, so that slow clocks accept it."""

SERVER_CN: Final = "fleet-server"
"""Name of the server on its broker; no device id has this form."""

_CSR_MAX_BYTES: Final = 16 * 1024

DeviceKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey


class CaError(Exception):
    """The files of the CA cannot be used."""


class BadRequestError(ValueError):
    """The certificate request cannot be accepted; the message is one sentence."""


@dataclass(frozen=True, slots=True)
class Issued:
    """Issued certificate; `serial` in hex, times in UTC."""

    serial: str
    not_after: datetime
    pem: str


@dataclass(frozen=True, slots=True)
class Pair:
    """Certificate with its private key, both PEM."""

    certificate_pem: bytes
    key_pem: bytes


class CertificateAuthority:
    """CA of a server: issues certificates, and knows whose certificates are accepted."""

    def __init__(self, directory: Path) -> None:
        """Read the CA's directory; see `load`."""
        self.directory = directory
        self.load_again()

    @classmethod
    def create(cls, directory: Path, *, fleet: str, now: datetime) -> "CertificateAuthority":
        """Make a root that issues by itself; write `ca.pem` and `ca.key` (0600) to a directory."""
        key, certificate = make_root(fleet, now=now)
        atomic_write(directory / "ca.key", private_pem(key), mode=0o600)
        atomic_write(directory / "ca.pem", certificate.public_bytes(Encoding.PEM), mode=0o644)
        return cls(directory)

    @classmethod
    def load(cls, directory: Path) -> "CertificateAuthority":
        """Read the CA from its directory.

        Raises:
            CaError: files are missing, damaged, or do not match.
        """
        return cls(directory)

    def load_again(self) -> None:
        """Read the directory again, after an issuing CA was installed or removed. Raises `CaError`."""
        issuing = self.directory / "issuing.pem"
        pem, key = ("issuing.pem", "issuing.key") if issuing.exists() else ("ca.pem", "ca.key")
        if issuing.exists():
            _finish_install(self.directory)
        if pem == "ca.pem" and not (self.directory / key).exists():
            raise CaError(
                f"the CA in {self.directory} has neither an issuing CA nor its root's key: "
                "rebuild the server's directory with 'fleet server rebuild'"
            )
        self._key, self._certificate = read_pair(self.directory / pem, self.directory / key)
        self._root = self._certificate if pem == "ca.pem" else read_certificate(self.directory / "ca.pem")
        found = [read_certificate(path) for path in sorted((self.directory / "issuers").glob("*.pem"))]
        self._accepted = tuple(found) or (self._certificate,)

    @property
    def pem(self) -> str:
        """Certificate of the root in PEM, which devices and operators pin."""
        return self._root.public_bytes(Encoding.PEM).decode()

    @property
    def sha256(self) -> str:
        """Sha256 of the root's certificate (DER) in hex, which enrolment tokens pin."""
        return self._root.fingerprint(hashes.SHA256()).hex()

    @property
    def root(self) -> x509.Certificate:
        """Certificate of the root."""
        return self._root

    @property
    def issuer(self) -> x509.Certificate:
        """Certificate of the CA that issues now: an issuing CA, or the root itself."""
        return self._certificate

    @property
    def accepted(self) -> tuple[x509.Certificate, ...]:
        """Issuers whose certificates are accepted."""
        return self._accepted

    @property
    def is_root(self) -> bool:
        """Tell whether the root itself issues, with its key on this server."""
        return self._certificate == self._root

    def accepts(self, leaf: x509.Certificate) -> bool:
        """Tell whether one of the accepted issuers issued a certificate, whatever its dates."""
        return any(_issued_by(leaf, issuer) for issuer in self._accepted)

    @property
    def revocation_lists(self) -> bytes:
        """Return the revocation list of each accepted issuer, PEM; empty where the root issues.

        A broker that requires a list of every issuer accepts no certificate of other issuers.
        """
        if self.is_root:
            return b""
        return b"".join(path.read_bytes() for path in sorted((self.directory / "issuers").glob("*.crl")))

    def server(self, hosts: Iterable[str], *, now: datetime, life: timedelta = SERVER_LIFE) -> Pair:
        """Issue a certificate for the server's listeners, valid for these host names and addresses and for loopback."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = dict.fromkeys([*hosts, "localhost", "127.0.0.1", "::1"])
        certificate = self._leaf(
            key.public_key(),
            SERVER_CN,
            ExtendedKeyUsageOID.SERVER_AUTH,
            now,
            life,
            [san(name) for name in names],
        )
        # With the root, which OpenSSL does not add to an issuing CA, and whose hash devices compare at enrolment.
        chain = certificate.public_bytes(Encoding.PEM) + self._chain + (b"" if self.is_root else self.pem.encode())
        return Pair(chain, private_pem(key))

    def server_client(self, *, now: datetime, life: timedelta = SERVER_LIFE) -> Pair:
        """Issue a certificate with which the server connects to its broker."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._leaf(key.public_key(), SERVER_CN, ExtendedKeyUsageOID.CLIENT_AUTH, now, life)
        return Pair(certificate.public_bytes(Encoding.PEM) + self._chain, private_pem(key))

    def device(self, key: DeviceKey, device: str, *, now: datetime) -> Issued:
        """Issue a certificate for a device's key; CN is the device's id. The issuing CA follows it in the chain."""
        certificate = self._leaf(key, device, ExtendedKeyUsageOID.CLIENT_AUTH, now, DEVICE_LIFE)
        pem = (certificate.public_bytes(Encoding.PEM) + self._chain).decode()
        return Issued(serial(certificate), certificate.not_valid_after_utc, pem)

    def consumer(self, key: DeviceKey, user: str, *, now: datetime, life: timedelta) -> Issued:
        """Issue a certificate with which a system of the operator reads from the broker; CN is its user there."""
        certificate = self._leaf(key, user, ExtendedKeyUsageOID.CLIENT_AUTH, now, life)
        pem = (certificate.public_bytes(Encoding.PEM) + self._chain).decode()
        return Issued(serial(certificate), certificate.not_valid_after_utc, pem)

    @property
    def _chain(self) -> bytes:
        return b"" if self.is_root else self._certificate.public_bytes(Encoding.PEM)

    def _leaf(
        self,
        key: DeviceKey,
        name: str,
        purpose: x509.ObjectIdentifier,
        now: datetime,
        life: timedelta,
        alternatives: list[x509.GeneralName] | None = None,
    ) -> x509.Certificate:
        left = self._certificate.not_valid_after_utc - now
        if left <= timedelta(0):
            raise CaError(f"the issuing CA ended on {self._certificate.not_valid_after_utc:%Y-%m-%d}: fleet ca renew")
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        issuer = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        made = (
            builder(subject, self._certificate.subject, key, now, min(life, left))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage(sign_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), critical=False)
        )
        if alternatives:
            made = made.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        return made.sign(self._key, hashes.SHA256())


def make_root(fleet: str, *, now: datetime) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """Make a root: key and certificate. Issuing CAs may stand below it, and no CA below those."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "wasmfleet"),
            x509.NameAttribute(NameOID.COMMON_NAME, f"{fleet} fleet CA"),
        ]
    )
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        builder(name, name, key.public_key(), now, CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        .add_extension(usage(sign_certificates=True), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(key, hashes.SHA256())
    )
    return key, certificate


def read_certificate(path: Path) -> x509.Certificate:
    """Read a certificate from a file. Raises `CaError`."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise CaError(f"cannot read the CA's {path}: {error.strerror}") from error
    except ValueError as error:
        raise CaError(f"the CA's {path} is damaged: {error}") from error


def read_pair(pem: Path, key_file: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """Read a CA's key and certificate. Raises `CaError` where they are missing, damaged or do not match."""
    certificate = read_certificate(pem)
    try:
        key = load_pem_private_key(key_file.read_bytes(), password=None)
    except OSError as error:
        raise CaError(f"cannot read the CA's {key_file}: {error.strerror}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise CaError(f"the CA's {key_file} is damaged: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise CaError(f"{key_file.name} and {pem.name} in {pem.parent} do not match")
    return key, certificate


def _issued_by(leaf: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        leaf.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def read_request(pem: str) -> DeviceKey:
    """Read the key of a PKCS#10 request (RFC 2986), which must be signed with that key.

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
    raise BadRequestError("a device's key must be EC P-256 or Ed25519")


def key_der(key: DeviceKey) -> bytes:
    """Encode a public key as SubjectPublicKeyInfo, DER."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def serial(certificate: x509.Certificate) -> str:
    """Return a certificate's serial number in hex."""
    return f"{certificate.serial_number:x}"


def due(pem: bytes, *, now: datetime, life: timedelta = SERVER_LIFE) -> bool:
    """Tell whether a certificate has to be made anew: two thirds of its life are over, or a wrong clock dated it.

    Args:
        pem: any certificate; the first of several counts.
        now: UTC.
        life: that such a certificate has at the most.
    """
    certificate = x509.load_pem_x509_certificate(pem)
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if begins > now or ends - now > life + BACKDATED:
        return True
    return now >= begins + (ends - begins) * 2 / 3


def builder(
    subject: x509.Name, issuer: x509.Name, key: DeviceKey, now: datetime, life: timedelta
) -> x509.CertificateBuilder:
    """Return a builder with the fields of every certificate."""
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + life)
    )


def usage(*, sign_certificates: bool) -> x509.KeyUsage:
    """Return the key usage of a CA, or of any other certificate."""
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


def san(name: str) -> x509.DNSName | x509.IPAddress:
    """Make the subject alternative name of a host name or address."""
    try:
        return x509.IPAddress(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return x509.DNSName(name)


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Encode a private key as PEM, unencrypted."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


LIFE: Final = timedelta(days=90)
WARN: Final = timedelta(days=30)
"""Time before the end of an issuing CA from which the status asks to renew it."""

_ROUNDS: Final = 600_000
_REQUEST_MAX_BYTES: Final = 16 * 1024
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Root:
    """Root of a fleet with its key, which the operator's machine stores encrypted."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate


def create(fleet: str, *, now: datetime) -> Root:
    """Make a root."""
    return Root(*make_root(fleet, now=now))


def store(path: Path, key: ec.EllipticCurvePrivateKey, passphrase: bytes) -> None:
    """Write the root's key, encrypted (PKCS#12, 600,000 rounds), to a new file of mode 0600."""
    strong = (
        PrivateFormat.PKCS12.encryption_builder()
        .kdf_rounds(_ROUNDS)
        .key_cert_algorithm(pkcs12.PBES.PBESv2SHA256AndAES256CBC)
        .hmac_hash(hashes.SHA256())
        .build(passphrase)
    )
    try:
        create_exclusive(
            path, pkcs12.serialize_key_and_certificates(b"wasmfleet CA", key, None, None, strong), mode=0o600
        )
    except FileExistsError:
        raise CaError(f"{path} exists: a key is never overwritten") from None


def open_root(path: Path, certificate: Path, passphrase: bytes | None) -> Root:
    """Open the root from the operator's files.

    Raises:
        CaError: missing, of another fleet, or the passphrase is missing or wrong.
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
        raise CaError(f"{path} is not the key of a CA, or the passphrase is wrong") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != root.public_key():
        raise CaError(f"{path} is not the key of {certificate}")
    return Root(key, root)


def request(directory: Path, hosts: Iterable[str]) -> str:
    """Make a request for a server's next issuing CA; its key is made once and kept as `next.key`."""
    path = directory / "next.key"
    if path.exists():
        key = load_pem_private_key(path.read_bytes(), password=None)
    else:
        key = ec.generate_private_key(ec.SECP256R1())
        atomic_write(path, private_pem(key), mode=0o600)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CaError(f"{path} is not the key of a CA: remove it")
    names = [san(host) for host in dict.fromkeys((*hosts, *_LOOPBACK))]
    made = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "issuing CA")]))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(Encoding.PEM).decode()


def asked(pem: str) -> tuple[str, ...]:
    """Return the names for which a request wants to issue server certificates. Raises `CaError`."""
    return tuple(str(name.value) for name in _names(_read_request(pem)))


def sign(root: Root, pem: str, *, now: datetime, life: timedelta = LIFE) -> str:
    """Sign the issuing CA that a request asks for, PEM: constrained in length, purpose and names.

    Raises:
        CaError: the request is malformed, the life exceeds 90 days, or the root allows no CA below it.
    """
    constraints = root.certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    if constraints.path_length == 0:
        raise CaError("this fleet's root allows no issuing CA below it: it was made by an earlier wasmfleet")
    if life > LIFE:
        raise CaError(f"an issuing CA is valid for at most {LIFE.days} days")
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
    """Install an issuing CA that was signed for this server's request; earlier ones stay accepted.

    Raises:
        CaError: not below this fleet's root, not for the pending request, or expired.
    """
    try:
        made = x509.load_pem_x509_certificate(pem.encode())
        made.verify_directly_issued_by(read_certificate(directory / "ca.pem"))
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise CaError("this is not an issuing CA below this fleet's root") from error
    if not _may_issue(made):
        raise CaError("this certificate cannot issue: it is not a CA; install what fleet ca renew has signed")
    if made.not_valid_after_utc <= now:
        raise CaError(f"this certificate cannot issue: it expired on {made.not_valid_after_utc:%Y-%m-%d}")
    try:
        key = load_pem_private_key((directory / "next.key").read_bytes(), password=None)
    except OSError as error:
        raise CaError("no request waits for this issuing CA: run fleet ca renew again") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != made.public_key():
        raise CaError("this issuing CA is for another request: run fleet ca renew again")
    accept(directory, made, key, until=made.not_valid_after_utc, now=now)
    forget_ended(directory, now=now)
    atomic_write(directory / "issuing.pem", made.public_bytes(Encoding.PEM), mode=0o644)
    _finish_install(directory)
    return made


def _may_issue(certificate: x509.Certificate) -> bool:
    """Tell whether a certificate is one of a CA. One without the extension is not; nor is one that cannot be read."""
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        return False


def mend(directory: Path, *, now: datetime) -> list[str]:
    """Replace the damaged files of a server's CA that can be made anew; return a note on each.

    Raises:
        CaError: one cannot be made anew.
    """
    for name in ("ca.pem", "ca.key", "issuing.pem", "issuing.key"):
        path = directory / name
        if path.exists() and (words := damage(path)):
            raise CaError(f"{path} is damaged ({words}): {RESTORE}")
    waiting = directory / "next.key"
    notes = []
    if waiting.exists() and damage(waiting):
        notes.append(f"{set_aside(waiting)} was the key of a request: run 'fleet ca renew' again")
    issuers = directory / "issuers"
    for path in sorted((*issuers.glob("*.pem"), *issuers.glob("*.crl"))):
        if path.exists() and damage(path):
            for each in {path.with_suffix(".pem"), path.with_suffix(".crl")}:
                if each.exists():
                    set_aside(each)
            notes.append(f"{path} was damaged: devices renew certificates of that issuer, unless it issues now")
    if (directory / "issuing.pem").exists():
        _finish_install(directory)
        key, issuing = read_pair(directory / "issuing.pem", directory / "issuing.key")
        listed = issuers / f"{serial(issuing)}.pem"
        if not listed.exists() or not listed.with_suffix(".crl").exists():
            accept(directory, issuing, key, until=issuing.not_valid_after_utc, now=now)
    return notes


def _finish_install(directory: Path) -> None:
    """Move `next.key` to `issuing.key` when it belongs to `issuing.pem`, also after a power cut in `install`."""
    waiting = directory / "next.key"
    if not waiting.exists():
        return
    key = load_pem_private_key(waiting.read_bytes(), password=None)
    if key.public_key() == read_certificate(directory / "issuing.pem").public_key():
        move_into_place(waiting, directory / "issuing.key")


def accept(
    directory: Path, issuer: x509.Certificate, key: ec.EllipticCurvePrivateKey, *, until: datetime, now: datetime
) -> None:
    """Accept an issuer's certificates: store it with a revocation list of the same validity."""
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
    atomic_write(place / f"{serial(issuer)}.crl", crl.public_bytes(Encoding.PEM), mode=0o644)
    atomic_write(place / f"{serial(issuer)}.pem", issuer.public_bytes(Encoding.PEM), mode=0o644)


def revoke(directory: Path, number: str) -> None:
    """Stop accepting an issuing CA and its certificates.

    Raises:
        CaError: not an accepted issuer, or the one in use.
    """
    if serial(read_certificate(directory / "issuing.pem")) == number:
        raise CaError("this issuing CA is in use: replace it first (fleet ca renew), then revoke it")
    path = directory / "issuers" / f"{number}.pem"
    if not number.isalnum() or not path.exists():
        raise CaError(f"no issuing CA {number[:40]!r} is accepted: fleet ca status lists them")
    path.unlink()
    path.with_suffix(".crl").unlink(missing_ok=True)


def forget_ended(directory: Path, *, now: datetime) -> None:
    """Remove issuers that have expired, and with them their certificates."""
    for path in (directory / "issuers").glob("*.crl"):
        if (x509.load_pem_x509_crl(path.read_bytes()).next_update_utc or now) <= now:
            path.with_suffix(".pem").unlink(missing_ok=True)
            path.unlink()


def warnings(ca: CertificateAuthority, *, now: datetime) -> list[str]:
    """Return sentences for the status, when the issuing CA expires soon or has expired."""
    ends = ca.issuer.not_valid_after_utc
    if ca.is_root or ends - now > WARN:
        return []
    if ends <= now:
        return [f"the issuing CA ended on {ends:%Y-%m-%d}: no device can connect until 'fleet ca renew'"]
    return [f"the issuing CA ends on {ends:%Y-%m-%d}: sign the next one with 'fleet ca renew'"]


def _read_request(pem: str) -> x509.CertificateSigningRequest:
    try:
        found = x509.load_pem_x509_csr(pem[:_REQUEST_MAX_BYTES].encode())
        sound = found.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise CaError(f"this is not the request of a server: {error}") from error
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

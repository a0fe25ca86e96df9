"""Device with its two keys: the device key in its certificate, and the sealing key."""

from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from fleet.protocol import names
from signing import sealing
from signing.device_statements import DeviceSigner

KEY = X25519PrivateKey.generate()
OURS = sealing.public_key(KEY)


class Device:
    """Device key with a certificate, as enrolment makes them."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        der = self.key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self.id = names.device_id("crane", der)
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, self.id)])
        now = datetime.now(UTC)
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self.key.public_key())
            .serial_number(1)
            .not_valid_before(now)
            .not_valid_after(now + timedelta(days=1))
            .sign(self.key, hashes.SHA256())
            .public_bytes(Encoding.PEM)
        )
        self.signer = DeviceSigner(self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))

    def prove(self, sealing_key: str = OURS, fleet: str = "harbour") -> bytes:
        return sealing.prove(self.signer, fleet=fleet, sealing_key=sealing_key)

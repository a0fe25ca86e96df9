"""A certificate authority for tests, and servers' TLS contexts with certificates of every kind from it."""

import datetime as dt
import ipaddress
import ssl

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

DAY = dt.timedelta(days=1)


def _pem(key, *certificates):
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private + b"".join(each.public_bytes(serialization.Encoding.PEM) for each in certificates)


class Authority:
    """An authority; `above`: the one that vouches for it, None for a root."""

    def __init__(self, directory, name, *, above=None):
        self._directory = directory
        self._above = above
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        issuer, key = (above._name, above._key) if above else (self._name, self._key)
        self._certificate = self._sign(self._name, self._key.public_key(), issuer, key, ca=True)
        self.file = directory / f"{name}.pem"
        self.file.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    def below(self, name):
        """An authority for which this one vouches."""
        return Authority(self._directory, name, above=self)

    def another(self, name):
        """A root that has nothing to do with this one."""
        return Authority(self._directory, name)

    @staticmethod
    def _sign(subject, public, issuer, key, *, ca=False, start=-DAY, end=DAY, names=()):
        now = dt.datetime.now(dt.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + start)
            .not_valid_after(now + end)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(key, hashes.SHA256())

    def context(self, *hosts, start=-DAY, end=DAY, signs_itself=False, chain=()):
        """A server's context with a certificate for these names or addresses, and the certificates of `chain`."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "server")])
        names = [
            x509.IPAddress(ipaddress.ip_address(each)) if each[0].isdigit() else x509.DNSName(each) for each in hosts
        ]
        issuer, signer = (subject, key) if signs_itself else (self._name, self._key)
        made = self._sign(subject, key.public_key(), issuer, signer, start=start, end=end, names=names)
        file = self._directory / f"server-{made.serial_number}.pem"
        file.write_bytes(_pem(key, made, *(each._certificate for each in chain)))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return context

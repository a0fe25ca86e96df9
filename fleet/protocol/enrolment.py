"""How a board joins a fleet: the one-time token, what it asks, and what it is given.

A token is one line of text, `wf1.<base64url of JSON>`. It travels on standard input, in a file or a systemd credential,
never as an argument. It is sent to the server only after TLS verified against the CA whose hash the token holds.
"""

import base64
import binascii
from typing import ClassVar, Final

import msgspec

from fleet.protocol import caps, wire
from fleet.protocol.caps import Utc
from fleet.protocol.wire import Message

TOKEN_PREFIX: Final = "wf1."  # noqa: S105 - a format's name, not a secret

EXPIRED: Final = "certificate-expired"
OUTDATED: Final = "certificate-outdated"
"""Types of the problems that a new certificate mends: the old one is over, or its issuing CA is accepted no more."""


class BadTokenError(ValueError):
    """Not an enrolment token."""


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """What a one-time token tells a board before it has talked to anyone.

    Attributes:
        url: of the enrolment API, `https://host:port`.
        ca_sha256: of the fleet CA's certificate, DER.
        root_sha256: of TUF's root metadata to pin, as served.
        floor: no earlier than this is it now (boards without a clock).
        secret: known to the server only as a hash; good once.
    """

    url: str
    fleet: str
    ca_sha256: str
    root_sha256: str
    floor: Utc
    expires: Utc
    secret: str
    group: str = ""

    def encode(self) -> str:
        """The token as one line of text."""
        return TOKEN_PREFIX + base64.urlsafe_b64encode(msgspec.json.encode(self)).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> "Token":
        """Read a token.

        Raises:
            BadTokenError: not one, or damaged (a copied line that lost its end, for example).
        """
        line = text.strip()
        if not line.startswith(TOKEN_PREFIX) or len(line) > 4096:  # noqa: PLR2004
            raise BadTokenError("this is not an enrolment token: one starts with 'wf1.' (fleet enroll-token)")
        body = line.removeprefix(TOKEN_PREFIX)
        try:
            return msgspec.json.decode(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)), type=cls)
        except (binascii.Error, ValueError, *wire.JSON_ERRORS) as error:
            raise BadTokenError("this enrolment token is damaged: was it copied whole?") from error


class EnrolRequest(Message, frozen=True, kw_only=True):
    """`POST /v1/enrol`: what a board asks with. The token's secret authenticates it.

    Attributes:
        csr_pem: PKCS#10; its key is the device key, its subject is ignored.
        sealing_key: X25519 public key, base64, for secrets.
        sealing_proof: the same, signed by the device key (`signing.sealing.prove`).
    """

    MAX_BYTES: ClassVar[int] = caps.API_BODY_MAX_BYTES
    secret: str
    name: str
    csr_pem: str
    sealing_key: str
    machine: str = ""
    sealing_proof: str = ""


class Enrolled(Message, frozen=True, kw_only=True):
    """What an enrolled board is given.

    Attributes:
        device: its id, also the CN of the certificate.
        certificate_pem, ca_pem: leaf first, then any issuing CA; the fleet CA apart.
        root: TUF root metadata, as JSON text, whose sha256 the token pinned.
        devices_url: the HTTPS API for devices.
        mqtt: broker addresses in the order to try, `mqtts://host:8883`.
    """

    MAX_BYTES: ClassVar[int] = caps.API_BODY_MAX_BYTES
    device: str
    fleet: str
    group: str
    certificate_pem: str
    ca_pem: str
    root: str
    devices_url: str
    mqtt: tuple[str, ...]
    production: bool


class RenewRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/renew` on the boards' listener: a PKCS#10 request for the enrolled key; its subject is ignored.

    Attributes:
        sealing_proof: as at enrolment, from a board that enrolled before there was one.
    """

    csr_pem: str
    sealing_proof: str = ""


class RenewReply(msgspec.Struct, frozen=True, kw_only=True):
    """The new certificate, leaf first."""

    certificate_pem: str
    ca_pem: str

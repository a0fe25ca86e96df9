"""The part of the operator API that is about the fleet's CA."""

from fleet.protocol.api import Body, View
from fleet.protocol.caps import Utc


class Issuer(View, frozen=True, kw_only=True):
    """An issuer whose certificates are accepted; `serial` in hex."""

    serial: str
    name: str
    ends: Utc
    current: bool = False


class CaView(View, frozen=True, kw_only=True):
    """The fleet's CA as its server has it.

    Attributes:
        root_sha256: of the root's certificate, DER, in hex: what boards pin.
        root_on_server: a development fleet's server issues with the root itself.
        issuers: what is accepted, the one in use first.
        request: for the next issuing CA, PKCS#10 in PEM; the operator signs it with the root.
    """

    root_sha256: str
    root_on_server: bool
    issuers: tuple[Issuer, ...]
    request: str


class IssuingRequest(Body, frozen=True, kw_only=True):
    """The issuing CA that the operator signed, PEM."""

    issuing_pem: str

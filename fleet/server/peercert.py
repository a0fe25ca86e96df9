"""The one place that looks into uvicorn: it puts the verified certificate of a TLS client into the ASGI scope.

uvicorn has the certificate and does not pass it on. The ASGI TLS extension names where it belongs:
`scope["extensions"]["tls"]["client_cert_chain"]`, PEM, leaf first. TLS has verified it against the listener's CA before
a byte of the request is read. A test with real TLS guards this against a change in uvicorn.
"""

import asyncio
import ssl
from typing import Any

from cryptography import x509
from uvicorn.protocols.http.h11_impl import H11Protocol


class PeerCertificateProtocol(H11Protocol):
    """uvicorn's protocol, with the client's certificate in the scope of each request."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wrap the application of this connection."""
        super().connection_made(transport)
        tls = transport.get_extra_info("ssl_object")
        der = None if tls is None else tls.getpeercert(binary_form=True)
        chain = [] if der is None else [ssl.DER_cert_to_PEM_cert(der)]
        application = self.app

        async def with_certificate(scope: Any, receive: Any, send: Any) -> None:
            extensions = scope.setdefault("extensions", {})
            extensions["tls"] = {"client_cert_chain": chain}
            await application(scope, receive, send)

        self.app = with_certificate


def peer_certificate(scope: Any) -> x509.Certificate | None:
    """The verified certificate of the client of a request; None where TLS asked for none."""
    chain = scope.get("extensions", {}).get("tls", {}).get("client_cert_chain", [])
    return x509.load_pem_x509_certificate(chain[0].encode()) if chain else None

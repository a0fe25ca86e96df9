"""Enrolment server, honest or hostile as a test requires."""

import hashlib
import ssl
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fleet.ca import CertificateAuthority
from fleet.protocol import names, wire
from fleet.protocol.messages import Enrolled, EnrolRequest, Token

ROOT = '{"signed": {}}'


class Fleet:
    """Enrolment server of a fleet, on loopback and under the name `host`; every other request finds nothing."""

    def __init__(self, directory, *, shows_ca=True, host="127.0.0.1"):
        self.now = datetime.now(UTC)
        directory.mkdir(parents=True)
        self.ca = CertificateAuthority.create(directory, fleet="harbour", now=self.now)
        pair = self.ca.server([host], now=self.now)
        (directory / "cert.pem").write_bytes(pair.certificate_pem)
        (directory / "key.pem").write_bytes(pair.key_pem)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(directory / "cert.pem", directory / "key.pem")
        if shows_ca:
            context.load_verify_locations(directory / "ca.pem")
        self.host = host
        self.heard, self.status, self.change = [], 200, lambda enrolled: enrolled
        fleet = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                request = wire.decode(EnrolRequest, body)
                fleet.heard.append(request)
                answer = fleet.answer(request)
                self.send_response(fleet.status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def do_GET(self):
                self.send_error(404)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.server.handle_error = lambda *_: None
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"https://{self.host}:{self.server.server_port}"

    def answer(self, request):
        if self.status != 200:
            return b'{"type": "token-used", "title": "this token was used", "status": 403, "action": "make another"}'
        csr = x509.load_pem_x509_csr(request.csr_pem.encode())
        der = csr.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        device = names.device_id(request.name, der)
        enrolled = Enrolled(
            device=device,
            fleet="harbour",
            group="edge",
            certificate_pem=self.ca.device(csr.public_key(), device, now=self.now).pem,
            ca_pem=self.ca.pem,
            root=ROOT,
            devices_url=self.url if self.host != "127.0.0.1" else "https://127.0.0.1:1",
            mqtt=("mqtts://127.0.0.1:2",),
            production=False,
        )
        return wire.encode(self.change(enrolled))

    def token(self, **more):
        facts = {
            "url": self.url,
            "fleet": "harbour",
            "ca_sha256": self.ca.sha256,
            "root_sha256": hashlib.sha256(ROOT.encode()).hexdigest(),
            "floor": self.now - timedelta(minutes=1),
            "expires": self.now + timedelta(hours=1),
            "secret": "hush",
        }
        return Token(**(facts | more)).encode()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

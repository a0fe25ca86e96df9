"""Good and bad peers on loopback, and a guest with an egress in a thread, for tests of outgoing requests."""

import asyncio
import contextlib
import datetime as dt
import socket
import ssl
import threading

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent.host.egress import Egress
from agent.host.engine.guest import start
from agent.host.engine.host_interface import Served
from agent.host.interfaces.outgoing_http import OutgoingHttp
from agent.host.ipc import framing, helper_api
from fleet.protocol.manifest import Grants, Limits

HANDLER = ("wasi:http/outgoing-handler",)
MANY = Limits(requests_per_instance=100)
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nx-peer: here\r\n\r\nhello"


class Peer:
    """A server on loopback: `behave(connection)` is called for each connection, one after the other."""

    def __init__(self, behave):
        self._behave = behave
        self.connections = 0
        self.received = b""
        self.paused = threading.Event()  # never set: to wait for
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._open = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with contextlib.suppress(OSError):
            self._behave(self, connection)

    def request(self, connection):
        """The next request's bytes, body included; empty at the end."""
        data = b""
        while b"\r\n\r\n" not in data:
            more = connection.recv(65536)
            if not more:
                return b""
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        length = next(
            (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
        )
        while len(body) < length:
            more = connection.recv(65536)
            if not more:
                return b""
            body += more
        self.received = head + b"\r\n\r\n" + body
        return self.received

    def close(self):
        self._socket.close()
        for connection in self._open:
            connection.close()


def answers(*replies):
    """Answers each request on a connection with the next reply, the last one forever; then it is kept open."""

    def behave(peer, connection):
        for reply in [*replies, *[replies[-1]] * 100]:
            if not peer.request(connection):
                return
            connection.sendall(reply)

    return behave


def says(data, *, then="close"):
    def behave(peer, connection):
        peer.request(connection)
        connection.sendall(data)
        if then == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        if then != "keep":
            connection.close()
        else:
            connection.recv(1)

    return behave


class Device:
    """A guest, its worker's `Outgoing`, and an egress in a thread."""

    def __init__(self, image, directory, resolver):
        self._image = image
        self._ours, theirs = framing.socket_pair()
        self._ready = threading.Event()
        self.resolved = []
        self.lines = []
        self.counted = []
        self._guests = []

        async def resolve(host, port):
            self.resolved.append(host)
            return await resolver(host, port)

        async def run():
            self._ready.set()
            await Egress(theirs, str(directory), resolver=resolve).run()

        self._thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
        self._thread.start()
        assert self._ready.wait(30)

    def lane(self, **grants):
        """A worker's end of its socket, as the supervisor makes it."""
        ours, theirs = framing.socket_pair()
        admit = helper_api.RegisterWorker(
            "probe", tuple(grants.get("outbound", ())), tuple(grants.get("instances", ()))
        )
        framing.send_packet(self._ours, msgspec.json.encode(admit), (ours.fileno(),))
        ours.close()
        return theirs

    def guest(self, *outbound, context=None, instances=(), limits=MANY):
        granted = Grants(interfaces=HANDLER, outbound=outbound, instances=instances)
        sock = self.lane(outbound=outbound, instances=instances)
        out = OutgoingHttp(sock, granted, limits, log=self.lines.append, count=self.counted.append, context=context)
        made = start(
            self._image, limits=limits, grants=granted, config={}, log=self.lines.append, served=Served(outgoing=out)
        )
        self._guests.append((made, sock))
        return made

    def close(self):
        for made, sock in self._guests:
            made.close()
            sock.close()
        self._ours.close()
        self._thread.join(30)


def certificate(tmp_path, name):
    """A certificate for `name` that signs itself: its file, and a server's context with it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path / f"{name}.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return file, context


def encrypted(context):
    def behave(peer, connection):
        with context.wrap_socket(connection, server_side=True) as inside:
            peer.request(inside)
            inside.sendall(OK)

    return behave

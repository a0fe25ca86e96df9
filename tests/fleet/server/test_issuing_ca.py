"""The issuing CA: devices pin the root, which is offline; what is below it may be stolen, and is shut out."""

import asyncio
import shutil
import ssl
from datetime import UTC, datetime, timedelta

import httpx
import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fleet import ca as fleet_ca
from fleet.ca import SERVER_CN, CaError, CertificateAuthority, private_pem, serial
from fleet.protocol.messages import RenewReply, RenewRequest
from fleet.protocol.trust_api import CaView, IssuingRequest
from fleet.server.broker import broker
from fleet.server.config import ServerPaths
from tests.fleet.server.conftest import BROKERS, PASSPHRASE, request_certificate
from tests.fleet.server.device_requests import ask

NOW = datetime.now(UTC)
needs_mosquitto = pytest.mark.skipif(broker.find() is None, reason="mosquitto is not installed")


def root_of(fleet):
    place = ServerPaths(fleet.home)
    return fleet_ca.open_root(place.ca_root, place.operator / "ca.pem", PASSPHRASE)


async def renewed(fleet, root, **more):
    """`fleet ca renew`: the server's request, signed with the root."""
    view = await fleet.operator.get(CaView, "/v1/ca")
    made = fleet_ca.sign(root, view.request, now=datetime.now(UTC), **more)
    return await fleet.operator.send(CaView, "PUT", "/v1/ca/issuing", IssuingRequest(issuing_pem=made))


async def renew_device(device, key=None):
    body = msgspec.json.encode(RenewRequest(csr_pem=request_certificate(key or device.key)))
    with device.http() as http:
        return await asyncio.to_thread(http.post, "/v1/renew", content=body)


async def refused_by_the_broker(device):
    """Tell whether a TLS connection with what the device holds comes to nothing."""
    address = httpx.URL(device.enrolled.mqtt[0])
    try:
        reader, writer = await asyncio.open_connection(address.host, address.port, ssl=device.context())
        # TLS 1.3 tells a client that it was refused with the first byte: ask for one
        writer.write(b"\x10\x0f\x00\x04MQTT\x04\x02\x00\x3c\x00\x03abc")
        await writer.drain()
        answered = await reader.read(1)
        writer.close()
    except (ssl.SSLError, ConnectionError):
        return True
    return answered == b""


@needs_mosquitto
@pytest.mark.asyncio
async def test_the_root_stays_with_the_operator_and_another_issuing_ca_needs_no_enrolment(new_fleet):
    async with new_fleet("auto", "solo") as fleet:
        place = ServerPaths(fleet.home)
        on_the_server = b"".join(path.read_bytes() for path in place.server.rglob("*") if path.is_file())
        root = root_of(fleet)
        assert private_pem(root.key).splitlines()[1] not in on_the_server
        with pytest.raises(CaError, match="passphrase is wrong"):
            fleet_ca.open_root(place.ca_root, place.operator / "ca.pem", b"wrong horse")

        device = await fleet.device("gate")
        pinned = device.enrolled.ca_pem
        assert x509.load_pem_x509_certificate(pinned.encode()) == root.certificate
        view = await renewed(fleet, root)
        assert [each.current for each in view.issuers] == [True, False]
        # What was issued before still counts, on both ways; what is issued now hangs below the new one.
        assert (await ask(device)).status_code == 200
        assert not await refused_by_the_broker(device)
        other = await fleet.device("lift")
        assert other.enrolled.ca_pem == pinned
        leaf = x509.load_pem_x509_certificate(other.enrolled.certificate_pem.encode())
        assert leaf.issuer.rfc4514_string() == view.issuers[0].name
        assert leaf.not_valid_after_utc <= view.issuers[0].ends
        assert view.issuers[0].ends <= datetime.now(UTC) + fleet_ca.LIFE
        await fleet.stop()
        await fleet.start()
        assert (await ask(device)).status_code == 200


def to_production(fleet):
    """`fleet ca offline` on a development fleet, on its files: the embedded broker is for development only."""
    place = ServerPaths(fleet.home)
    root = fleet_ca.Root(*(fleet.server._ca._key, fleet.server._ca.root))
    fleet_ca.accept(place.ca, root.certificate, root.key, until=NOW + fleet_ca.LIFE, now=NOW)
    return root


@pytest.mark.parametrize("which", BROKERS)
@pytest.mark.asyncio
async def test_who_stole_an_issuing_ca_is_shut_out_and_the_devices_are_not(new_fleet, tmp_path, which):
    async with new_fleet(which) as fleet:
        root = to_production(fleet)
        await renewed(fleet, root)
        device = await fleet.device("gate")
        await device.disconnect()
        # The thief copies the server's CA, and makes himself a device, and the server of the broker.
        shutil.copytree(ServerPaths(fleet.home).ca, tmp_path / "loot")
        loot = CertificateAuthority.load(tmp_path / "loot")
        own = ec.generate_private_key(ec.SECP256R1())
        stolen = serial(loot.issuer)
        impostor = await fleet.enrol("spy", key=own)
        impostor.id = device.id
        impostor.hold(loot.device(own.public_key(), device.id, now=NOW).pem)
        assert (await ask(impostor)).json()["type"] == "unknown-device", "not with another key than the device's"

        await renewed(fleet, root)
        view = await fleet.operator.send(CaView, "POST", f"/v1/ca/issuers/{stolen}/revoke")
        assert stolen not in [each.serial for each in view.issuers]
        for name in (device.id, SERVER_CN):
            impostor.hold(loot.device(own.public_key(), name, now=NOW).pem)
            assert (await ask(impostor)).status_code == 403
            assert (await renew_device(impostor, own)).status_code == 403
            assert await refused_by_the_broker(impostor)

        # The device's certificate is of the stolen CA too: with its own key it may renew, and only that.
        refused = await ask(device)
        assert (refused.status_code, refused.json()["type"]) == (403, "certificate-outdated")
        assert await refused_by_the_broker(device)
        answer = await renew_device(device)
        assert answer.status_code == 200, answer.text
        device.hold(msgspec.json.decode(answer.content, type=RenewReply).certificate_pem)
        assert (await ask(device)).status_code == 200
        await device.connect()
        await fleet.online(device)
        await fleet.stop()
        await fleet.start()


def test_what_an_issuing_ca_may_do_is_written_in_it(tmp_path):
    root = fleet_ca.create("acme", now=NOW)
    request = fleet_ca.request(tmp_path, ["fleet.example.com"])
    assert fleet_ca.asked(request) == ("fleet.example.com", "localhost", "127.0.0.1", "::1")
    made = x509.load_pem_x509_certificate(fleet_ca.sign(root, request, now=NOW).encode())
    basic = made.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (basic.critical, basic.value.ca, basic.value.path_length) == (True, True, 0)
    names = made.extensions.get_extension_for_class(x509.NameConstraints)
    assert names.critical
    assert x509.DNSName("fleet.example.com") in (names.value.permitted_subtrees or [])
    assert made.not_valid_after_utc - NOW <= fleet_ca.LIFE
    with pytest.raises(CaError, match="at most"):
        fleet_ca.sign(root, request, now=NOW, life=timedelta(days=91))
    with pytest.raises(CaError, match="not the request"):
        fleet_ca.sign(root, "nonsense", now=NOW)
    # Nobody else's, and not for another request.
    (tmp_path / "ca.pem").write_text(fleet_ca.sign(root, request, now=NOW))
    with pytest.raises(CaError, match="below this fleet's root"):
        fleet_ca.install(tmp_path, fleet_ca.sign(root, request, now=NOW), now=NOW)


@pytest.mark.parametrize(
    "extension",
    [
        None,
        x509.BasicConstraints(ca=False, path_length=None),
        x509.UnrecognizedExtension(x509.BasicConstraints.oid, b"nonsense"),
    ],
)
def test_a_certificate_of_the_root_that_is_no_ca_is_refused(tmp_path, extension):
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import Encoding

    root = fleet_ca.create("acme", now=NOW)
    (tmp_path / "ca.pem").write_bytes(root.certificate.public_bytes(Encoding.PEM))
    request = x509.load_pem_x509_csr(fleet_ca.request(tmp_path, ["fleet.example.com"]).encode())
    builder = fleet_ca.builder(request.subject, root.certificate.subject, request.public_key(), NOW, timedelta(days=1))
    if extension is not None:
        builder = builder.add_extension(extension, critical=True)
    pem = builder.sign(root.key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()
    with pytest.raises(CaError, match="cannot issue: it is not a CA"):
        fleet_ca.install(tmp_path, pem, now=NOW)


def test_a_server_name_outside_its_constraints_convinces_nobody(tmp_path):
    """A stolen issuing CA cannot pose as any other server than the fleet's own."""
    root = fleet_ca.create("acme", now=NOW)
    for name in ("here", "server"):
        (tmp_path / name).mkdir()
    from cryptography.hazmat.primitives.serialization import Encoding

    (tmp_path / "server/ca.pem").write_bytes(root.certificate.public_bytes(Encoding.PEM))
    request = fleet_ca.request(tmp_path / "server", ["fleet.example.com"])
    fleet_ca.install(tmp_path / "server", fleet_ca.sign(root, request, now=NOW), now=NOW)
    ca = CertificateAuthority.load(tmp_path / "server")
    for host, good in (("fleet.example.com", True), ("bank.example.com", False)):
        pair = ca.server([host], now=NOW)
        (tmp_path / "leaf.pem").write_bytes(pair.certificate_pem + pair.key_pem)
        assert handshake(tmp_path / "leaf.pem", tmp_path / "server/ca.pem", host) is good


def handshake(leaf, ca, host):
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=ca)
    server.load_cert_chain(leaf)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    ends = [ssl.MemoryBIO() for _ in range(4)]
    ours = client.wrap_bio(ends[0], ends[1], server_hostname=host)
    theirs = server.wrap_bio(ends[2], ends[3], server_side=True)
    for _ in range(10):
        for end, out, peer in ((ours, ends[1], ends[2]), (theirs, ends[3], ends[0])):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLCertVerificationError:
                return False
            peer.write(out.read())
    return True


@pytest.mark.asyncio
async def test_an_issuing_ca_that_ends_is_named_and_then_renewed_over_its_own_ruins(new_fleet, tmp_path):
    async with new_fleet("embedded") as fleet:
        root = to_production(fleet)
        await renewed(fleet, root, life=timedelta(days=20))
        status = (await fleet.operator.http.get("/v1/status")).json()
        assert any("fleet ca renew" in problem for problem in status["problems"])
        await renewed(fleet, root)
        status = (await fleet.operator.http.get("/v1/status")).json()
        assert not any("fleet ca renew" in problem for problem in status["problems"])
        viewer = await fleet.operator.http.put("/v1/operators/eve", content=b'{"role":"operator"}')
        fleet.operator.http.headers["authorization"] = "Bearer " + viewer.json()["token"]
        problem = await fleet.operator.problem("PUT", "/v1/ca/issuing", IssuingRequest(issuing_pem=""))
        assert problem.status == 403
